// SPDX-License-Identifier: GPL-2.0

//! The DMA log against a set of pages.

#[path = "../../../../rust/vfio/dma/written.rs"]
mod written;

use self::written::Written;
use crate::{
    prelude::fail_allocations,
    Input, //
};
use std::collections::BTreeSet;

/// Pages for which memory is allocated at once, in two allocations.
const ZONE_PAGES: u64 = 4096;

/// The pages that were written to, by number, and what could not be told apart, in bytes.
struct Model {
    page_size: u64,
    ranges: Vec<(u64, u64)>,
    pages: BTreeSet<u64>,
    rest: Option<(u64, u64)>,
    /// For which pages there is memory, in units of [`ZONE_PAGES`].
    zones: BTreeSet<u64>,
}

impl Model {
    fn first_byte(&self, page: u64) -> u64 {
        page * self.page_size
    }

    fn last_byte(&self, page: u64) -> u64 {
        page * self.page_size + (self.page_size - 1)
    }

    /// Marks the pages of `first..=last` that are in a range. Of the allocations those fail whose
    /// bit is set.
    fn mark(&mut self, first: u64, last: u64, mut failures: u32) {
        for (start, end) in self.ranges.clone() {
            let (first, last) = (first.max(start), last.min(end));

            if first > last {
                continue;
            }
            for page in first / self.page_size..=last / self.page_size {
                let mut allocated = self.zones.contains(&(page / ZONE_PAGES));

                if !allocated {
                    allocated = true;
                    for _ in 0..2 {
                        allocated &= failures & 1 == 0;
                        failures >>= 1;
                        if !allocated {
                            break;
                        }
                    }
                }
                if allocated {
                    self.zones.insert(page / ZONE_PAGES);
                    self.pages.insert(page);
                } else {
                    let (start, end) = (self.first_byte(page), self.last_byte(page));
                    let (low, high) = self.rest.unwrap_or((start, end));

                    self.rest = Some((low.min(start), high.max(end)));
                }
            }
        }
    }

    /// Takes what is reported of the pages between these bytes, as first and last byte.
    fn take(&mut self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let (from, to) = (first / self.page_size, last / self.page_size);
        let pages: Vec<u64> = self.pages.range(from..=to).copied().collect();

        pages
            .into_iter()
            .map(|page| {
                let (start, end) = (self.first_byte(page), self.last_byte(page));
                if first <= start && end <= last {
                    self.pages.remove(&page);
                }
                (start.max(first), end.min(last))
            })
            .collect()
    }

    fn take_rest(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
        let (start, end) = self.rest?;
        if first <= start && end <= last {
            self.rest = None;
        }
        (start <= last && first <= end).then_some((start.max(first), end.min(last)))
    }
}

/// Joins what follows each other.
fn joined(runs: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();

    for (first, last) in runs {
        assert!(first <= last, "an empty run");
        match joined.last_mut() {
            Some(before) if before.1.checked_add(1) == Some(first) => before.1 = last,
            Some(before) => {
                assert!(before.1 < first, "out of order");
                joined.push((first, last));
            }
            None => joined.push((first, last)),
        }
    }
    joined
}

/// Does to a log what the input says.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let page_size = 4096 << input.below(19);

    // In order and apart from each other, as the crate has them from the core.
    let mut ranges = Vec::new();
    let mut from = Some(0_u64);
    for _ in 0..input.below(5) {
        let Some(first) = from.and_then(|from| from.checked_add(input.number())) else {
            break;
        };
        let last = first.saturating_add(input.number());

        ranges.push((first, last));
        from = last.checked_add(1);
    }

    let mut log = Written::new(page_size, ranges.clone());
    let mut model = Model {
        page_size,
        ranges,
        pages: BTreeSet::new(),
        rest: None,
        zones: BTreeSet::new(),
    };
    while !input.is_empty() {
        let op = input.below(4);
        let mut first = input.number();
        // Near where something is.
        if input.bool() && !model.ranges.is_empty() {
            let (start, end) = input.one_of(&model.ranges);
            let near = if input.bool() { start } else { end };

            first = near.wrapping_add(first).wrapping_sub(0x1000);
        }
        match op {
            0 | 1 => {
                // A device writes a page at a time, here a few.
                let Some(last) = first.checked_add(input.below(0x6000) as u64) else {
                    continue;
                };
                let failures = if op == 1 { input.number() as u32 } else { 0 };

                fail_allocations(failures);
                log.mark(first, last);
                fail_allocations(0);
                model.mark(first, last, failures);
            }
            _ => {
                // No more than the core lets through.
                let length = input.number().max(1);
                let Some(last) = first.checked_add(length - 1) else {
                    continue;
                };
                let room = 1 + input.below(4);
                let mut runs = vec![(0, 0); room];
                let mut got = Vec::new();
                let mut from = Some(first);

                assert_eq!(log.take_rest(first, last), model.take_rest(first, last));
                while let Some(first) = from {
                    let (count, next) = log.take(first, last, &mut runs);

                    assert!(next.is_none() || count == room, "room was left");
                    got.extend_from_slice(&runs[..count]);
                    from = next;
                }
                assert_eq!(joined(got), joined(model.take(first, last)));
            }
        }
    }
}
