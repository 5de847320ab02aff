// SPDX-License-Identifier: GPL-2.0

//! The written pages: the content of a log that is on.
//!
//! This file uses the containers of the kernel, but nothing else of it. The same source runs on the
//! host, in tests and under the fuzzer, with stand-ins for the containers.

use core::ops::Range;
use kernel::{
    alloc::Flags,
    prelude::*,
    rbtree::RBTree, //
};

/// Maximum number of ranges of pages in a log that are in no zone.
pub(super) const REST: usize = 64;

/// Pages in a [`Zone`].
const ZONE_PAGES: u64 = 4096;

/// Number of zones that are scanned before a lock is released.
const ZONES_AT_ONCE: usize = 16;

/// Pages in a word.
const WORD_PAGES: u64 = u64::BITS as u64;

/// The written pages of an aligned part of the address space, one bit each.
type Zone = KBox<[u64; (ZONE_PAGES / WORD_PAGES) as usize]>;

/// Returns the index of the first one of the two nearest ranges.
fn nearest(ranges: &[(u64, u64)]) -> usize {
    let gaps = ranges.windows(2).map(|pair| pair[1].0 - pair[0].1);
    let nearest = gaps.enumerate().min_by_key(|(_, gap)| *gap);
    nearest.map_or(0, |(index, _)| index)
}

/// Ranges of bytes that are in no zone. Each is a first and a last byte; ranges are sorted and not
/// adjacent.
///
/// When there are too many of them, the two nearest ranges are merged. Therefore, this can contain
/// more than the added ranges, but never less. Removed bytes may be included again, if the removal
/// left two ranges that are merged.
struct Rest {
    ranges: KBox<[(u64, u64); REST + 1]>,
    count: usize,
}

impl Rest {
    fn new() -> Result<Self> {
        Ok(Self {
            ranges: KBox::new([(0, 0); REST + 1], GFP_KERNEL_ACCOUNT)?,
            count: 0,
        })
    }

    /// Returns the indexes of the ranges that overlap `first..=last`.
    fn overlapping(&self, first: u64, last: u64) -> Range<usize> {
        let ranges = &self.ranges[..self.count];
        let start = ranges.partition_point(|range| range.1 < first);
        let end = ranges.partition_point(|range| range.0 <= last);
        start..end.max(start)
    }

    /// Replaces the ranges `old` by `new`.
    fn replace(&mut self, old: Range<usize>, new: &[(u64, u64)]) {
        let end = old.start + new.len();
        self.ranges.copy_within(old.end..self.count, end);
        self.ranges[old.start..end].copy_from_slice(new);
        self.count = self.count - old.len() + new.len();
        if self.count > REST {
            let index = nearest(&self.ranges[..self.count]);
            let joined = (self.ranges[index].0, self.ranges[index + 1].1);
            self.replace(index..index + 2, &[joined]);
        }
    }

    /// Adds `first..=last`.
    fn add(&mut self, first: u64, last: u64) {
        // Include adjacent ranges.
        let old = self.overlapping(first.saturating_sub(1), last.saturating_add(1));
        let mut new = (first, last);
        for range in &self.ranges[old.clone()] {
            new = (new.0.min(range.0), new.1.max(range.1));
        }
        self.replace(old, &[new]);
    }

    /// Removes the first part of `first..=last` that is in a range. Returns [`None`] if there is
    /// none, or if `first` is greater than `last`, which is the case after the last part.
    fn take(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
        if first > last {
            return None;
        }
        let index = self.overlapping(first, last).next()?;
        let (start, end) = self.ranges[index];
        let part = (start.max(first), end.min(last));
        let before = (start, part.0.wrapping_sub(1));
        let behind = (part.1.wrapping_add(1), end);
        match (start < part.0, part.1 < end) {
            (false, false) => self.replace(index..index + 1, &[]),
            (true, false) => self.replace(index..index + 1, &[before]),
            (false, true) => self.replace(index..index + 1, &[behind]),
            (true, true) => self.replace(index..index + 1, &[before, behind]),
        }
        Some(part)
    }
}

/// The pages that were written to since logging started.
pub(super) struct Written {
    /// The size of a page, as a power of two.
    shift: u32,
    /// The logged ranges: first and last byte, sorted. They do not overlap.
    ranges: KVVec<(u64, u64)>,
    /// Zones with written pages, by number. The cost depends on the number of written pages and not
    /// on the size of the ranges. Each zone has at least one written page.
    zones: RBTree<u64, Zone>,
    /// Number of zones.
    count: usize,
    /// Maximum number of zones.
    most: usize,
    /// Allocation flags of zones.
    flags: Flags,
    /// Written ranges without a zone, because an allocation failed or there are too many zones.
    rest: Rest,
}

impl Written {
    /// Creates an empty log. `page_size` is a power of two. `ranges` are the logged ranges: first
    /// and last byte, sorted. They do not overlap. `most` is the maximum number of zones, and
    /// `flags` are used to allocate them.
    ///
    /// Fails with `ENOMEM`.
    pub(super) fn new(
        page_size: u64,
        ranges: KVVec<(u64, u64)>,
        most: usize,
        flags: Flags,
    ) -> Result<Self> {
        Ok(Self {
            shift: page_size.trailing_zeros(),
            ranges,
            zones: RBTree::new(),
            count: 0,
            most,
            flags,
            rest: Rest::new()?,
        })
    }

    /// Returns whether no page is marked.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0 && self.rest.count == 0
    }

    /// Marks the pages of `first..=last`, in bytes, that are in a range.
    pub(super) fn mark(&mut self, first: u64, last: u64) {
        let start = self.ranges.partition_point(|range| range.1 < first);
        // An iterator would borrow the ranges.
        let mut index = start;
        while let Some(range) = self.ranges.get(index).filter(|range| range.0 <= last) {
            for page in first.max(range.0) >> self.shift..=last.min(range.1) >> self.shift {
                if self.mark_page(page).is_err() {
                    let (start, end) = (page << self.shift, (page << self.shift) | self.offset());
                    self.rest.add(start, end);
                }
            }
            index += 1;
        }
    }

    /// Marks a page in its zone. Fails with `ENOMEM`, also if there are too many zones.
    fn mark_page(&mut self, page: u64) -> Result {
        let number = page / ZONE_PAGES;
        let index = page % ZONE_PAGES;
        let word = (index / WORD_PAGES) as usize;
        let bit = 1 << (index % WORD_PAGES);
        let zone = self.zones.get_mut(&number);
        if let Some(word) = zone.and_then(|zone| zone.get_mut(word)) {
            *word |= bit;
            return Ok(());
        }
        if self.count >= self.most {
            return Err(ENOMEM);
        }
        let mut zone = KBox::new([0; (ZONE_PAGES / WORD_PAGES) as usize], self.flags)?;
        if let Some(word) = zone.get_mut(word) {
            *word |= bit;
        }
        self.zones.try_create_and_insert(number, zone, self.flags)?;
        self.count += 1;
        Ok(())
    }

    /// Returns the largest offset in a page.
    const fn offset(&self) -> u64 {
        (1 << self.shift) - 1
    }

    /// Removes and returns the first written part of `first..=last`, in bytes, that has no zone.
    pub(super) fn take_rest(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
        self.rest.take(first, last)
    }

    /// Moves runs of written pages from `first` up to `last` out of the log into `runs`, as first
    /// and last byte, until `runs` is full. Scans a limited number of zones. Returns the number of
    /// runs and the byte at which to continue.
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
        let mut zones = 0;
        let mut cursor = self
            .zones
            .cursor_lower_bound_mut(&((first >> shift) / ZONE_PAGES));
        while let Some(mut zone) = cursor {
            let (number, words) = zone.current_mut();
            let number = *number;
            let base = number * ZONE_PAGES;
            if base > last >> shift {
                break;
            }
            if zones == ZONES_AT_ONCE {
                return (count, Some(base << shift));
            }
            zones += 1;
            let mut empty = true;
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
                empty &= *word == 0;
            }
            cursor = if empty {
                self.count -= 1;
                // After the last zone, this returns to the previous one.
                let (other, _zone) = zone.remove_current();
                other.filter(|other| *other.current().0 > number)
            } else {
                zone.move_next()
            };
        }
        (count, None)
    }
}
