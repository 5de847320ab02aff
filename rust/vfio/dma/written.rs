// SPDX-License-Identifier: GPL-2.0

//! The pages that were written to: what a log that is on holds.
//!
//! This file uses the containers of the kernel and nothing else of it, so that the same text runs
//! on the host, under the fuzzer, where they are stood in for.

use kernel::{
    prelude::*,
    rbtree::RBTree, //
};

/// Pages in a [`Zone`].
const ZONE_PAGES: u64 = 4096;

/// Pages in a word.
const WORD_PAGES: u64 = u64::BITS as u64;

/// The pages of an aligned part of the address space that was written to, one bit each.
type Zone = KBox<[u64; (ZONE_PAGES / WORD_PAGES) as usize]>;

/// What was written to since logging began.
pub(super) struct Written {
    /// The size of a page, as a power of two.
    shift: u32,
    /// What is logged: first and last byte, in order and apart from each other.
    ranges: KVVec<(u64, u64)>,
    /// What was written to, by number. So the cost follows what is written, however large the
    /// ranges are.
    zones: RBTree<u64, Zone>,
    /// First and last byte of what there was no memory to tell apart in. Reported as a whole.
    rest: Option<(u64, u64)>,
}

impl Written {
    /// Nothing yet. `page_size` is a power of two, `ranges` are what is logged: first and last
    /// byte, in order and apart from each other.
    pub(super) fn new(page_size: u64, ranges: KVVec<(u64, u64)>) -> Self {
        Self {
            shift: page_size.trailing_zeros(),
            ranges,
            zones: RBTree::new(),
            rest: None,
        }
    }

    /// Marks the pages of `first..=last`, in bytes, that are in a range.
    pub(super) fn mark(&mut self, first: u64, last: u64) {
        let start = self.ranges.partition_point(|range| range.1 < first);
        for range in self.ranges.iter().skip(start) {
            if range.0 > last {
                break;
            }
            for page in first.max(range.0) >> self.shift..=last.min(range.1) >> self.shift {
                if Self::mark_page(&mut self.zones, page).is_err() {
                    let (start, end) = (page << self.shift, (page << self.shift) | self.offset());
                    let (first, last) = self.rest.unwrap_or((start, end));
                    self.rest = Some((first.min(start), last.max(end)));
                }
            }
        }
    }

    /// Marks a page. Fails with `ENOMEM`.
    fn mark_page(zones: &mut RBTree<u64, Zone>, page: u64) -> Result {
        let number = page / ZONE_PAGES;
        let index = page % ZONE_PAGES;
        let word = (index / WORD_PAGES) as usize;
        let bit = 1 << (index % WORD_PAGES);
        if let Some(word) = zones.get_mut(&number).and_then(|zone| zone.get_mut(word)) {
            *word |= bit;
            return Ok(());
        }
        let mut zone = KBox::new([0; (ZONE_PAGES / WORD_PAGES) as usize], GFP_KERNEL)?;
        if let Some(word) = zone.get_mut(word) {
            *word |= bit;
        }
        zones.try_create_and_insert(number, zone, GFP_KERNEL)?;
        Ok(())
    }

    /// Returns the largest offset in a page.
    const fn offset(&self) -> u64 {
        (1 << self.shift) - 1
    }

    /// Takes what could not be told apart, as far as it is in `first..=last`, in bytes.
    pub(super) fn take_rest(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
        let rest = self.rest?;
        if first <= rest.0 && rest.1 <= last {
            self.rest = None;
        }
        let part = (rest.0.max(first), rest.1.min(last));
        (part.0 <= part.1).then_some(part)
    }

    /// Moves runs of pages that were written to out of the log into `runs`, as first and last
    /// byte, from `first` up to `last`, as many as there is room for. Returns where to go on.
    ///
    /// A page that is only in part inside is reported but stays in the log.
    pub(super) fn take(
        &mut self,
        first: u64,
        last: u64,
        runs: &mut [(u64, u64)],
    ) -> (usize, Option<u64>) {
        let (shift, offset) = (self.shift, self.offset());
        let mut count = 0usize;
        let mut cursor = self
            .zones
            .cursor_lower_bound_mut(&((first >> shift) / ZONE_PAGES));
        while let Some(mut zone) = cursor {
            let (number, words) = zone.current_mut();
            let base = number * ZONE_PAGES;
            if base > last >> shift {
                break;
            }
            for (index, word) in words.iter_mut().enumerate() {
                let mut left = *word;
                while left != 0 {
                    let bit = u64::from(left.trailing_zeros());
                    left &= left - 1;
                    let page = base + index as u64 * WORD_PAGES + bit;
                    let (start, end) = (page << shift, (page << shift) | offset);
                    if end < first || start > last {
                        continue;
                    }
                    match count.checked_sub(1).and_then(|at| runs.get_mut(at)) {
                        Some(run) if run.1.wrapping_add(1) == start => run.1 = end.min(last),
                        _ => match runs.get_mut(count) {
                            Some(run) => {
                                *run = (start.max(first), end.min(last));
                                count += 1;
                            }
                            None => return (count, Some(start)),
                        },
                    }
                    if first <= start && end <= last {
                        *word &= !(1 << bit);
                    }
                }
            }
            cursor = zone.move_next();
        }
        (count, None)
    }
}
