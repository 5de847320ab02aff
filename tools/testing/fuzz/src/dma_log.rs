// SPDX-License-Identifier: GPL-2.0

//! DMA log, compared with a set of pages.

#[path = "../../../../rust/vfio/dma/written.rs"]
mod written;

use self::written::{
    Written,
    REST, //
};
use crate::{
    prelude::{
        fail_allocations,
        GFP_KERNEL_ACCOUNT, //
    },
    Input, //
};
use std::collections::BTreeSet;

/// Pages for which memory is allocated at once, in two allocations.
const ZONE_PAGES: u64 = 4096;

/// Written pages by number, and written ranges without a zone in bytes.
struct Model {
    page_size: u64,
    ranges: Vec<(u64, u64)>,
    pages: BTreeSet<u64>,
    rest: Vec<(u64, u64)>,
    /// Maximum number of zones.
    most: usize,
    /// Written and unreported ranges, in bytes.
    truth: Vec<(u64, u64)>,
}

impl Model {
    fn first_byte(&self, page: u64) -> u64 {
        page * self.page_size
    }

    fn last_byte(&self, page: u64) -> u64 {
        page * self.page_size + (self.page_size - 1)
    }

    /// Marks the pages of `first..=last` that are in a range. Allocations fail if their bit is set.
    fn mark(&mut self, first: u64, last: u64, mut failures: u32) {
        for (start, end) in self.ranges.clone() {
            let (first, last) = (first.max(start), last.min(end));

            if first > last {
                continue;
            }
            for page in first / self.page_size..=last / self.page_size {
                let zones: BTreeSet<u64> =
                    self.pages.iter().map(|page| page / ZONE_PAGES).collect();
                let mut allocated = zones.contains(&(page / ZONE_PAGES));

                self.truth
                    .push((self.first_byte(page), self.last_byte(page)));
                if !allocated && zones.len() < self.most {
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
                    self.pages.insert(page);
                } else {
                    self.rest
                        .push((self.first_byte(page), self.last_byte(page)));
                    self.join_rest();
                }
            }
        }
    }

    /// Merges overlapping and adjacent ranges, and the nearest ones as long as there are too many.
    fn join_rest(&mut self) {
        let mut within = Some(1);

        self.rest.sort_unstable();
        while let Some(distance) = within {
            let mut joined: Vec<(u64, u64)> = Vec::new();
            let mut more = self.rest.iter().copied();

            while let Some((first, last)) = more.next() {
                match joined.last_mut() {
                    Some(before) if first <= before.1.saturating_add(distance) => {
                        before.1 = before.1.max(last);
                        if distance > 1 {
                            joined.extend(more);
                            break;
                        }
                    }
                    _ => joined.push((first, last)),
                }
            }
            self.rest = joined;
            let gaps = self.rest.windows(2).map(|pair| pair[1].0 - pair[0].1);
            within = gaps.min().filter(|_| self.rest.len() > REST);
        }
    }

    /// Removes and returns the reported pages between these bytes, as first and last byte.
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

    /// Removes and returns the ranges without a zone between these bytes.
    fn take_rest(&mut self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let taken = cut(&mut self.rest, first, last);

        self.join_rest();
        taken
    }

    /// Checks that all written ranges between these bytes were reported.
    fn check(&mut self, first: u64, last: u64, reported: &[(u64, u64)]) {
        for part in cut(&mut self.truth, first, last) {
            let told = |run: &(u64, u64)| run.0 <= part.0 && part.1 <= run.1;

            assert!(reported.iter().any(told), "{part:x?} is not reported");
        }
    }
}

/// Removes and returns the parts of ranges between these bytes.
fn cut(ranges: &mut Vec<(u64, u64)>, first: u64, last: u64) -> Vec<(u64, u64)> {
    let mut taken = Vec::new();

    for (start, end) in std::mem::take(ranges) {
        if end < first || start > last {
            ranges.push((start, end));
            continue;
        }
        taken.push((start.max(first), end.min(last)));
        if start < first {
            ranges.push((start, first - 1));
        }
        if end > last {
            ranges.push((last + 1, end));
        }
    }
    taken
}

/// Merges adjacent runs.
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

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let page_size = 4096 << input.below(19);

    // Sorted and without overlap, like the core passes them.
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

    let most = input.one_of(&[0, 1, 2, 40]);
    let mut log = Written::new(page_size, ranges.clone(), most, GFP_KERNEL_ACCOUNT)
        .expect("nothing fails here");
    let mut model = Model {
        page_size,
        ranges,
        pages: BTreeSet::new(),
        rest: Vec::new(),
        most,
        truth: Vec::new(),
    };
    while !input.is_empty() {
        let op = input.below(5);
        let mut first = input.number();
        // Near a written range.
        if input.bool() && !model.ranges.is_empty() {
            let (start, end) = input.one_of(&model.ranges);
            let near = if input.bool() { start } else { end };

            first = near.wrapping_add(first).wrapping_sub(0x1000);
        }
        match op {
            0 | 1 => {
                // A device writes one page at a time, this test a few.
                let Some(last) = first.checked_add(input.below(0x6000) as u64) else {
                    continue;
                };
                let failures = if op == 1 { input.number() as u32 } else { 0 };

                fail_allocations(failures);
                log.mark(first, last);
                fail_allocations(0);
                model.mark(first, last, failures);
            }
            2 => {
                // Many distant pages, with failing allocations.
                let stride = input.number();

                for _ in 0..input.below(2 * REST) {
                    fail_allocations(u32::MAX);
                    log.mark(first, first);
                    fail_allocations(0);
                    model.mark(first, first, u32::MAX);
                    first = first.wrapping_add(stride);
                }
            }
            _ => {
                // Limited like in the core.
                let length = input.number().max(1);
                let Some(last) = first.checked_add(length - 1) else {
                    continue;
                };
                let room = 1 + input.below(4);
                let mut runs = vec![(0, 0); room];
                let mut rest = Vec::new();
                let mut got = Vec::new();
                let mut from = Some(first);

                while let Some(part) = from.and_then(|from| log.take_rest(from, last)) {
                    rest.push(part);
                    from = part.1.checked_add(1);
                }
                assert_eq!(rest, model.take_rest(first, last));
                from = Some(first);
                while let Some(first) = from {
                    let (count, next) = log.take(first, last, &mut runs);

                    assert!(
                        next.is_none_or(|next| next > first || count > 0),
                        "no progress"
                    );
                    got.extend_from_slice(&runs[..count]);
                    from = next;
                }
                assert_eq!(joined(got.iter().copied()), joined(model.take(first, last)));
                got.extend(rest);
                model.check(first, last, &got);
            }
        }
        let empty = model.pages.is_empty() && model.rest.is_empty();
        assert_eq!(log.is_empty(), empty);
    }
}
