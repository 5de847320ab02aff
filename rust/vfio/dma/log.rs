// SPDX-License-Identifier: GPL-2.0

//! Which pages of the user's memory a device has written to.

use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    rbtree::RBTree,
    sync::Mutex, //
};

/// Pages in a [`Zone`].
const ZONE_PAGES: u64 = 4096;

/// Pages in a word.
const WORD_PAGES: u64 = u64::BITS as u64;

/// The largest page that is agreed on, in bytes.
const MAX_PAGE_SIZE: u64 = 1 << 30;

/// How many runs are taken out of the log at once.
const BATCH: usize = 256;

/// The pages of an aligned part of the address space that was written to, one bit each.
type Zone = KBox<[u64; (ZONE_PAGES / WORD_PAGES) as usize]>;

/// A log that is on.
struct Active {
    /// The size of a page, as a power of two.
    shift: u32,
    /// What is logged: first and last byte, in order and apart from each other.
    ranges: KVVec<(u64, u64)>,
    /// What was written to since logging began, by number. So the cost follows what is written,
    /// however large the ranges are.
    zones: RBTree<u64, Zone>,
    /// First and last byte of what there was no memory to tell apart in. Reported as a whole.
    rest: Option<(u64, u64)>,
}

impl Active {
    /// Marks the pages of `first..=last`, in bytes, that are in a range.
    fn mark(&mut self, first: u64, last: u64) {
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
    fn take_rest(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
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
    fn take(&mut self, first: u64, last: u64, runs: &mut [(u64, u64)]) -> (usize, Option<u64>) {
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

/// The DMA log of an open device, for `struct vfio_log_ops`.
///
/// The core does not know whether logging is on, so this does: what a user asks for out of order
/// is refused here. Logging has nothing to do with the migration state, nor with a reset.
#[pin_data]
pub(crate) struct Log {
    /// Never held while user memory is accessed.
    #[pin]
    active: Mutex<Option<Active>>,
}

impl Log {
    /// Makes a log that is off.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            active <- new_mutex!(None, "vfio::dma::Log::active"),
        })
    }

    /// Starts logging, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, in `ranges`: first and last
    /// byte, in order and apart from each other. Returns the page size of the log, in bytes:
    /// `page_size`, or the nearest that is possible.
    ///
    /// Fails with `EINVAL` if logging is on or `page_size` is not a power of two. May sleep.
    pub(crate) fn start(&self, ranges: KVVec<(u64, u64)>, page_size: u64) -> Result<u64> {
        if !page_size.is_power_of_two() {
            return Err(EINVAL);
        }
        let page_size = page_size.clamp(PAGE_SIZE as u64, MAX_PAGE_SIZE);
        let mut active = self.active.lock();
        if active.is_some() {
            return Err(EINVAL);
        }
        *active = Some(Active {
            shift: page_size.trailing_zeros(),
            ranges,
            zones: RBTree::new(),
            rest: None,
        });
        Ok(page_size)
    }

    /// Stops logging, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`. Without effect if it is off.
    ///
    /// May sleep.
    pub(crate) fn stop(&self) {
        let active = self.active.lock().take();
        drop(active);
    }

    /// Reports which pages in `first..=last`, in bytes, were written to since they were reported
    /// last, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: calls `report` with the first byte and
    /// the length of each run of them.
    ///
    /// Fails with `EINVAL` if logging is off. May sleep. No lock is held while `report` runs.
    pub(crate) fn report(&self, first: u64, last: u64, mut report: impl FnMut(u64, u64)) -> Result {
        let mut runs = KVec::from_elem((0, 0), BATCH, GFP_KERNEL)?;
        let rest = (*self.active.lock())
            .as_mut()
            .ok_or(EINVAL)?
            .take_rest(first, last);
        if let Some((first, last)) = rest {
            report(first, last - first + 1);
        }
        let mut from = Some(first);
        while let Some(first) = from {
            let mut active = self.active.lock();
            let (count, next) = (*active)
                .as_mut()
                .ok_or(EINVAL)?
                .take(first, last, &mut runs);
            drop(active);
            for (first, last) in runs.iter().take(count) {
                report(*first, last - first + 1);
            }
            from = next;
        }
        Ok(())
    }

    /// Marks the pages of what was written. May sleep.
    pub(super) fn mark(&self, iova: u64, len: usize) {
        let last = (len as u64)
            .checked_sub(1)
            .and_then(|more| iova.checked_add(more));
        if let (Some(last), Some(active)) = (last, &mut *self.active.lock()) {
            active.mark(iova, last);
        }
    }
}
