// SPDX-License-Identifier: GPL-2.0

//! A DMA log like that of a device.

#[path = "../../../../rust/vfio/dma/written.rs"]
mod written;

use self::written::Written;
use crate::prelude::GFP_KERNEL_ACCOUNT;
use std::hint::black_box;

/// The page size in bytes.
pub(crate) const PAGE: u64 = 4096;

/// The same number as the device.
const ZONES: usize = 8192;

/// Number of runs that are moved out of the log at once, the same as in the device.
const BATCH: usize = 256;

/// The log of a range of addresses, and room for the pages that are moved out of it.
pub(crate) struct Log {
    written: Written,
    runs: [(u64, u64); BATCH],
}

impl Log {
    /// Creates the log of the addresses up to `last`.
    pub(crate) fn new(last: u64) -> Self {
        let written = Written::new(PAGE, vec![(0, last)], ZONES, GFP_KERNEL_ACCOUNT);

        Self {
            written: written.expect("there is memory"),
            runs: [(0, 0); BATCH],
        }
    }

    /// Marks the page that starts at `address`.
    pub(crate) fn mark(&mut self, address: u64) {
        self.written.mark(address, address + PAGE - 1);
    }

    /// Moves all pages out of the log. Returns the number of ranges that were in no zone.
    pub(crate) fn take_all(&mut self) -> usize {
        let mut rest = 0;
        let mut from = Some(0);

        while let Some(part) = self.written.take_rest(0, u64::MAX) {
            black_box(part);
            rest += 1;
        }
        while let Some(first) = from {
            let count;

            (count, from) = self.written.take(first, u64::MAX, &mut self.runs);
            black_box(&self.runs[..count]);
        }
        assert!(self.written.is_empty());
        rest
    }
}
