// SPDX-License-Identifier: GPL-2.0

//! Which pages of the user's memory a device has written to.

use super::written::Written;
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::Mutex, //
};

/// The largest page that is agreed on, in bytes.
const MAX_PAGE_SIZE: u64 = 1 << 30;

/// How many runs are taken out of the log at once.
const BATCH: usize = 256;

/// The DMA log of an open device, for `struct vfio_log_ops`.
///
/// The core does not know whether logging is on, so this does: what a user asks for out of order
/// is refused here. Logging has nothing to do with the migration state, nor with a reset.
#[pin_data]
pub(crate) struct Log {
    /// Never held while user memory is accessed.
    #[pin]
    active: Mutex<Option<Written>>,
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
        *active = Some(Written::new(page_size, ranges));
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
