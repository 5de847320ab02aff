// SPDX-License-Identifier: GPL-2.0

//! Log of the pages of user memory that a device has written to.

use super::written::Written;
use crate::{
    memory::GFP_MAYFAIL,
    user::cond_resched_killable, //
};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::Mutex, //
};

/// Maximum page size of a log, in bytes.
const MAX_PAGE_SIZE: u64 = 1 << 30;

// The minimum page size is that of the kernel.
static_assert!(PAGE_SIZE as u64 <= MAX_PAGE_SIZE);

/// Maximum number of zones in a log: 5 MiB, for 128 GiB if pages have 4 KiB.
///
/// A client can cause a log of this size without that much memory: it can map one page at many
/// addresses one after the other.
const ZONES: usize = 8192;

/// Number of runs that are taken from the log at once.
const BATCH: usize = 256;

/// The DMA log of an open device, for `struct vfio_log_ops`.
///
/// The core does not track whether logging is on. Therefore, this type does, and refuses requests
/// in the wrong order. Logging is independent of the migration state and of resets.
#[pin_data]
pub(crate) struct Log {
    /// Never held while user memory is accessed.
    #[pin]
    active: Mutex<Option<Written>>,
}

impl Log {
    /// Creates a log that is off.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            active <- new_mutex!(None, "vfio::dma::Log::active"),
        })
    }

    /// Starts logging in `ranges`, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`. Each range is a
    /// first and a last byte; ranges are sorted and do not overlap. Returns the page size of the
    /// log, in bytes: `page_size`, or the nearest supported one.
    ///
    /// Fails with `EINVAL` if logging is on or `page_size` is not a power of two, and with
    /// `ENOMEM`. May sleep.
    pub(crate) fn start(&self, ranges: KVVec<(u64, u64)>, page_size: u64) -> Result<u64> {
        if !page_size.is_power_of_two() {
            return Err(EINVAL);
        }
        let page_size = page_size.clamp(PAGE_SIZE as u64, MAX_PAGE_SIZE);
        let mut active = self.active.lock();
        if active.is_some() {
            return Err(EINVAL);
        }
        *active = Some(Written::new(page_size, ranges, ZONES, GFP_MAYFAIL)?);
        Ok(page_size)
    }

    /// Returns whether logging is on and there are pages to report. May sleep.
    pub(crate) fn has_pages(&self) -> bool {
        self.with(|written| !written.is_empty()).unwrap_or(false)
    }

    /// Stops logging, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`. Does nothing if it is off.
    ///
    /// May sleep.
    pub(crate) fn stop(&self) {
        let active = self.active.lock().take();
        drop(active);
    }

    /// Reports the pages in `first..=last`, in bytes, that were written to since their last report,
    /// for `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`. Calls `report` with the first byte and the
    /// length of each run of them.
    ///
    /// Fails with `EINVAL` if logging is off, and with `EINTR` if the task is killed: then pages
    /// that were not reported stay in the log. May sleep. No lock is held while `report` runs.
    pub(crate) fn report(&self, first: u64, last: u64, mut report: impl FnMut(u64, u64)) -> Result {
        let mut runs = KVec::from_elem((0, 0), BATCH, GFP_KERNEL_ACCOUNT)?;
        let mut from = Some(first);
        while let Some(first) = from {
            cond_resched_killable()?;
            from = self
                .with(|written| written.take_rest(first, last))?
                .and_then(|(first, last)| {
                    report(first, last - first + 1);
                    last.checked_add(1)
                });
        }
        from = Some(first);
        while let Some(first) = from {
            cond_resched_killable()?;
            let (count, next) = self.with(|written| written.take(first, last, &mut runs))?;
            for (first, last) in runs.iter().take(count) {
                report(*first, last - first + 1);
            }
            from = next;
        }
        Ok(())
    }

    /// Calls `with` with the log locked. Fails with `EINVAL` if logging is off.
    fn with<R>(&self, with: impl FnOnce(&mut Written) -> R) -> Result<R> {
        let mut active = self.active.lock();
        Ok(with((*active).as_mut().ok_or(EINVAL)?))
    }

    /// Marks the pages of written bytes. Returns whether logging is on. May sleep.
    pub(super) fn mark(&self, iova: u64, len: usize) -> bool {
        let last = (len as u64)
            .checked_sub(1)
            .and_then(|more| iova.checked_add(more));
        let mark = |written: &mut Written| {
            if let Some(last) = last {
                written.mark(iova, last);
            }
        };
        self.with(mark).is_ok()
    }
}
