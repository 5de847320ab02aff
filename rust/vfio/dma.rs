// SPDX-License-Identifier: GPL-2.0

//! DMA: what a device reads and writes of the user's memory.
//!
//! The user says which of its memory the device can reach, and at which address (IOVA): by a
//! container or by an iommufd. A device made of software gets there by [`Bus`], which a driver has
//! in [`emulated::Operations::work`](crate::emulated::Operations::work): on a thread of its own,
//! where it holds nothing that somebody else waits for.
//!
//! What the device has written to is remembered while the user wants that: `DMA logging`, by which
//! a user who migrates knows what to copy again.
//!
//! C header: `vfio_dma_rw()` and `struct vfio_log_ops` in
//! [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

mod log;

pub(crate) use self::log::Log;

use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    memory::StateMemory,
};
use core::ops::Range;
use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*, //
};

/// A transfer that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How many bytes were transferred before, exactly: what follows was not touched up to the end
    /// of its page, and what is behind that was not either.
    pub done: usize,
    /// Why: `EPERM` or `EACCES` if the user does not allow it, `EINVAL` or `ENOENT` if there is no
    /// memory at that address, `EFAULT` if the user has taken the memory away, `ENOMEM`.
    pub error: Error,
}

/// The way of an open device to the user's memory.
///
/// There is one only while the device is open, and only on the device's own thread, so that nothing
/// waits for the user while he does not serve a page fault.
pub struct Bus<'a> {
    device: &'a Device<Open>,
    log: &'a Log,
}

impl<'a> Bus<'a> {
    /// Makes the way of `device`, whose writes are logged in `log`.
    pub(crate) fn new(device: &'a Device<Open>, log: &'a Log) -> Self {
        Self { device, log }
    }

    /// Reads user memory from `iova` on into a range of the device's memory, in bytes, and marks
    /// its pages.
    ///
    /// May sleep, for as long as the user does not serve a page fault. Fails with `EINVAL`, and
    /// transfers nothing, if the range is empty or not inside the memory.
    pub fn read(&self, iova: u64, to: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        let bytes = Self::checked(to, range.clone())?;
        // SAFETY: The bytes are inside of the memory, which is borrowed, and may be written to by
        // a copy from the user.
        let result = unsafe { self.transfer(iova, bytes, false) };
        // Whether it succeeded or not.
        to.changed(range);
        result
    }

    /// Writes a range of the device's memory, in bytes, to user memory from `iova` on.
    ///
    /// May sleep and fails as [`read()`](Self::read) does.
    pub fn write(&self, iova: u64, from: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        let bytes = Self::checked(from, range)?;
        // SAFETY: The bytes are inside of the memory, which is borrowed, and may be read by a copy
        // to the user.
        unsafe { self.transfer(iova, bytes, true) }
    }

    /// Writes bytes to user memory from `iova` on.
    ///
    /// May sleep and fails as [`read()`](Self::read) does.
    pub fn write_bytes(&self, iova: u64, from: &[u8]) -> Result<(), Fault> {
        // SAFETY: The bytes are borrowed and only read.
        unsafe { self.transfer(iova, from, true) }
    }

    fn checked(memory: &StateMemory, range: Range<usize>) -> Result<*const [u8], Fault> {
        let bytes = memory.bytes(range.clone());
        if bytes.len() == range.len() {
            Ok(bytes)
        } else {
            Err(EINVAL.into())
        }
    }

    /// Transfers bytes, and logs what is written.
    ///
    /// # Safety
    ///
    /// `bytes` must be valid, for a copy to the user if `write` is true, else for a copy from the
    /// user.
    unsafe fn transfer(&self, iova: u64, bytes: *const [u8], write: bool) -> Result<(), Fault> {
        // SAFETY: By the safety requirements.
        if unsafe { self.piece(iova, bytes, write) }.is_ok() {
            return Ok(());
        }
        // The core does not tell how far it got, so do it again page by page. It has written the
        // same bytes before, and nothing behind the page where it fails again.
        let base = bytes.cast::<u8>();
        let mut done = 0;
        while done < bytes.len() {
            let at = iova.wrapping_add(done as u64);
            let page_left = PAGE_SIZE - at as usize % PAGE_SIZE;
            let len = page_left.min(bytes.len() - done);
            let piece = core::ptr::slice_from_raw_parts(base.wrapping_add(done), len);
            // SAFETY: It is a part of `bytes`.
            unsafe { self.piece(at, piece, write) }.map_err(|error| Fault { done, error })?;
            done += len;
        }
        Ok(())
    }

    /// Transfers bytes, and logs them if all of them were written.
    ///
    /// # Safety
    ///
    /// As for [`transfer()`](Self::transfer).
    unsafe fn piece(&self, iova: u64, bytes: *const [u8], write: bool) -> Result {
        let data = bytes.cast::<c_void>().cast_mut();
        // SAFETY: The device is open, and `data` is valid by the safety requirements.
        to_result(unsafe {
            bindings::vfio_dma_rw(self.device.as_raw(), iova, data, bytes.len(), write)
        })?;
        if write {
            // Not before: who takes the log and then looks must find what was logged.
            self.log.mark(iova, bytes.len());
        }
        Ok(())
    }
}

impl From<Error> for Fault {
    /// A failure before anything was transferred.
    fn from(error: Error) -> Self {
        Self { done: 0, error }
    }
}
