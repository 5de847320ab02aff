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
mod pieces;
mod written;

pub(crate) use self::log::Log;
use self::pieces::pieces;

use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    gate::Gate,
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
    /// How many bytes were transferred before: all up to the page of user memory where it failed.
    /// Of that page some may have been written, and of what is behind it nothing.
    pub done: usize,
    /// Why: `EPERM` or `EACCES` if the user does not allow it, `EINVAL` or `ENOENT` if there is no
    /// memory at that address, `EFAULT` if the user has taken the memory away, `EINTR` if the
    /// device is being reset, `ENOMEM`.
    pub error: Error,
}

/// The way of an open device to the user's memory.
///
/// There is one only while the device is open, and only on the device's own thread, so that nothing
/// waits for the user while he does not serve a page fault.
///
/// # Examples
///
/// A device that copies its memory to where the user asks for it. Its `Operations::work` calls
/// `work()`, and its `Operations::write` calls `ask()`.
///
/// ```
/// use kernel::sync::SpinLock;
/// use vfio::{
///     dma::Bus,
///     emulated::Work, //
/// };
///
/// #[pin_data]
/// struct Copier {
///     endpoint: Arc<Endpoint>,
///     memory: StateMemory,
///     #[pin]
///     asked: SpinLock<Option<u64>>,
/// }
///
/// impl Copier {
///     fn ask(&self, iova: u64) {
///         *self.asked.lock() = Some(iova);
///         self.endpoint.wake();
///     }
///
///     fn work(&self, bus: &Bus<'_>) -> Work {
///         // The lock must not be held while the user is waited for.
///         let Some(iova) = self.asked.lock().take() else {
///             return Work::Wait;
///         };
///         match bus.write(iova, &self.memory, 0..self.memory.size()) {
///             Ok(()) => self.endpoint.signal(0),
///             Err(fault) => pr_debug!("{} bytes, {:?}\n", fault.done, fault.error),
///         }
///         Work::Again
///     }
/// }
/// ```
pub struct Bus<'a> {
    device: &'a Device<Open>,
    log: &'a Log,
    gate: &'a Gate,
}

impl<'a> Bus<'a> {
    /// Makes the way of `device`, whose writes are logged in `log`.
    pub(crate) fn new(device: &'a Device<Open>, log: &'a Log, gate: &'a Gate) -> Self {
        Self { device, log, gate }
    }

    /// Reads user memory from `iova` on into a range of the device's memory, in bytes, and marks
    /// its pages.
    ///
    /// May sleep, for as long as the user does not serve a page fault. Fails with `EINVAL`, and
    /// transfers nothing, if the range is empty or not inside the memory, or if it reaches beyond
    /// the end of the address space.
    pub fn read(&self, iova: u64, to: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        checked(to, range.clone())?;
        let pieces = pieces(iova, range.len())?;
        // A copy from the user that fails leaves zeroes, which must not get into the memory.
        let len = PAGE_SIZE.min(range.len());
        let mut bytes = KVec::from_elem(0u8, len, GFP_KERNEL).map_err(Error::from)?;
        for piece in pieces {
            let fault = |error| Fault {
                done: piece.start,
                error,
            };
            let page = bytes.get_mut(..piece.len()).ok_or(fault(EINVAL))?;
            // SAFETY: `page` is borrowed for writing.
            unsafe { self.copy(iova + piece.start as u64, page, false) }.map_err(fault)?;
            to.write(range.start + piece.start, page).map_err(fault)?;
        }
        Ok(())
    }

    /// Writes a range of the device's memory, in bytes, to user memory from `iova` on.
    ///
    /// May sleep and fails as [`read()`](Self::read) does.
    pub fn write(&self, iova: u64, from: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        let bytes = checked(from, range)?;
        // SAFETY: The bytes are inside of the memory, which is borrowed, and may be read by a copy
        // to the user.
        unsafe { self.write_pages(iova, bytes) }
    }

    /// Writes bytes to user memory from `iova` on.
    ///
    /// May sleep and fails as [`read()`](Self::read) does.
    pub fn write_bytes(&self, iova: u64, from: &[u8]) -> Result<(), Fault> {
        if from.is_empty() {
            return Err(EINVAL.into());
        }
        // SAFETY: The bytes are borrowed and only read.
        unsafe { self.write_pages(iova, from) }
    }

    /// Writes bytes to user memory, page by page, because the core does not tell how far it got,
    /// and logs the pages.
    ///
    /// # Safety
    ///
    /// `bytes` must be valid for a copy to the user.
    unsafe fn write_pages(&self, iova: u64, bytes: *const [u8]) -> Result<(), Fault> {
        for piece in pieces(iova, bytes.len())? {
            let start = bytes.cast::<u8>().wrapping_add(piece.start);
            let page = core::ptr::slice_from_raw_parts(start, piece.len());
            let at = iova + piece.start as u64;
            // SAFETY: It is a part of `bytes`, and the core only reads it.
            unsafe { self.copy(at, page.cast_mut(), true) }.map_err(|error| Fault {
                done: piece.start,
                error,
            })?;
            // Not before: who takes the log and then looks must find what was logged.
            self.log.mark(at, piece.len());
        }
        Ok(())
    }

    /// Copies bytes between kernel and user.
    ///
    /// # Safety
    ///
    /// `bytes` must be valid, for a copy to the user if `write` is true, else for a copy from the
    /// user.
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result {
        // A reset waits for this transfer.
        if self.gate.is_halted() {
            return Err(EINTR);
        }
        // SAFETY: The device is open, and `bytes` is valid by the safety requirements.
        to_result(unsafe {
            bindings::vfio_dma_rw(self.device.as_raw(), iova, bytes.cast(), bytes.len(), write)
        })
    }
}

/// Returns the bytes in a range of a memory.
///
/// Fails with `EINVAL` if the range is empty or not inside.
fn checked(memory: &StateMemory, range: Range<usize>) -> Result<*const [u8], Fault> {
    let bytes = memory.bytes(range.clone());
    if bytes.len() == range.len() && !range.is_empty() {
        Ok(bytes)
    } else {
        Err(EINVAL.into())
    }
}

impl From<Error> for Fault {
    /// A failure before anything was transferred.
    fn from(error: Error) -> Self {
        Self { done: 0, error }
    }
}
