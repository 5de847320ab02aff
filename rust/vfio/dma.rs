// SPDX-License-Identifier: GPL-2.0

//! DMA logging: which pages of the user's memory the device wrote to.
//!
//! C header: `struct vfio_log_ops` in [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::Mutex, //
};

/// The DMA log of an open device that does not do DMA.
///
/// The core does not know whether logging is on, so this does: what a user asks for out of order
/// is refused here. Since there is no DMA, no page is ever dirty.
#[pin_data]
pub(crate) struct Log {
    /// The page size agreed on in bytes, while logging is on.
    #[pin]
    page_size: Mutex<Option<u64>>,
}

impl Log {
    /// Makes a log that is off.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            page_size <- new_mutex!(None, "vfio::dma::Log"),
        })
    }

    /// Starts logging, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, and returns the page size
    /// that reports will have, in bytes: `page_size`, or the kernel's if that is larger.
    ///
    /// Fails with `EINVAL` if logging is on or `page_size` is not a power of two. May sleep.
    pub(crate) fn start(&self, page_size: u64) -> Result<u64> {
        if !page_size.is_power_of_two() {
            return Err(EINVAL);
        }
        let mut active = self.page_size.lock();
        if active.is_some() {
            return Err(EINVAL);
        }
        let page_size = page_size.max(PAGE_SIZE as u64);
        *active = Some(page_size);
        Ok(page_size)
    }

    /// Stops logging, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`. Without effect if it is off.
    ///
    /// May sleep.
    pub(crate) fn stop(&self) {
        *self.page_size.lock() = None;
    }

    /// Reports dirty pages, for `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
    ///
    /// Fails with `EINVAL` if logging is off. May sleep.
    pub(crate) fn report(&self) -> Result {
        self.page_size.lock().map(|_| ()).ok_or(EINVAL)
    }
}
