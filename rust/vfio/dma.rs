// SPDX-License-Identifier: GPL-2.0

//! DMA: accesses of a device to the user's memory.
//!
//! The user maps memory for the device at an address (IOVA), in a container or in an iommufd. A
//! software device accesses it with [`Bus`], which
//! [`emulated::Operations::work`](crate::emulated::Operations::work) gets as an argument. This
//! method runs on a thread of its own, where no locks are held that other tasks wait for.
//!
//! While the user has enabled *DMA logging*, the crate logs the pages that the device writes to, so
//! that the user knows which pages to copy again in a migration.
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
    memory::{
        StateMemory,
        GFP_MAYFAIL, //
    },
};
use core::ops::Range;
use kernel::{
    alloc::AllocError,
    error::to_result,
    page::PAGE_SIZE,
    prelude::*, //
};

/// A transfer that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Number of bytes transferred before, up to the page of user memory where the transfer failed.
    /// A part of that page may have been written, but nothing after it.
    pub done: usize,
    /// Cause of the failure.
    pub cause: Cause,
}

/// Cause of a failed transfer. It is the same for a container and for an iommufd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The range is empty, not inside the memory, or beyond the end of the address space.
    Range,
    /// There is no user memory at that address.
    Unmapped,
    /// The user does not allow the access.
    Denied,
    /// The mapped memory cannot be accessed: the user has unmapped or protected it, or a page fault
    /// was not served before the device was reset.
    Fault,
    /// Out of memory.
    NoMemory,
    /// The transfer was interrupted: by a reset, the last close, a request to release the device,
    /// or a write to the command register that disables bus mastering.
    Interrupted,
    /// Another failure of the core.
    Other(Error),
}

impl Cause {
    /// Returns the cause for an error of `vfio_dma_rw()`.
    fn of_core(error: Error) -> Self {
        match error {
            EINVAL | ENOENT => Self::Unmapped,
            EPERM | EACCES => Self::Denied,
            EFAULT => Self::Fault,
            other => other.into(),
        }
    }

    /// Returns whether a part of the page may have been written: the core had begun to copy.
    fn is_torn(self) -> bool {
        matches!(self, Self::Fault | Self::NoMemory | Self::Other(_))
    }
}

impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        match error {
            EINVAL => Self::Range,
            ENOMEM => Self::NoMemory,
            EINTR => Self::Interrupted,
            other => Self::Other(other),
        }
    }
}

/// A request of the user for the DMA log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogRequest {
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`.
    Start,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
    Report,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`.
    Stop,
}

/// The part of a device that can interrupt its transfers.
pub(crate) trait Interrupter {
    /// Returns whether the work under way must return as soon as possible: during a reset, and when
    /// it was interrupted. Called by the worker. Does not sleep.
    fn is_halted(&self) -> bool;
}

/// User memory in the address space of a device.
pub(crate) trait Memory {
    /// Copies bytes between kernel and user memory at `iova`, to the user if `write` is true. All
    /// of them are in the same page of user memory. May sleep.
    ///
    /// Fails like `vfio_dma_rw()`: with `EINVAL` or `ENOENT` if there is no memory at that address,
    /// with `EPERM` or `EACCES` if the user does not allow the access, and with `EFAULT` if the
    /// memory cannot be accessed.
    ///
    /// # Safety
    ///
    /// `bytes` must be valid, for a copy to the user if `write` is true, else for a copy from the
    /// user. The device must be open.
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result;
}

/// Memory of a device without an IOMMU. The core accesses it on behalf of the user.
impl Memory for Device<Open> {
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result {
        // SAFETY: The device is open, and `bytes` is valid by the safety requirements.
        to_result(unsafe {
            bindings::vfio_dma_rw(self.as_raw(), iova, bytes.cast(), bytes.len(), write)
        })
    }
}

/// Access of an open device to the user's memory.
///
/// It exists only while the device is open, and only on the device's own thread, so that an
/// unserved page fault of the user delays that thread only.
///
/// # Examples
///
/// A device that copies its memory to an address that the user requests. Its `Operations::work`
/// calls `work()`, and its `Operations::write` calls `ask()`.
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
///     function: Arc<Function>,
///     memory: StateMemory,
///     #[pin]
///     asked: SpinLock<Option<u64>>,
/// }
///
/// impl Copier {
///     fn ask(&self, iova: u64) {
///         *self.asked.lock() = Some(iova);
///         self.function.wake();
///     }
///
///     fn work(&self, bus: &Bus<'_>) -> Work {
///         // The lock must not be held while the transfer waits for the user.
///         let Some(iova) = self.asked.lock().take() else {
///             return Work::Wait;
///         };
///         match bus.write(iova, &self.memory, 0..self.memory.size()) {
///             Ok(()) => self.function.signal(0),
///             Err(fault) => pr_debug!("{} bytes, {:?}\n", fault.done, fault.cause),
///         }
///         Work::Again
///     }
/// }
/// ```
pub struct Bus<'a> {
    memory: &'a dyn Memory,
    log: &'a Log,
    unlogged: &'a dyn Fn(),
    interrupter: &'a dyn Interrupter,
}

impl<'a> Bus<'a> {
    /// Creates the access of a device that is open as long as the result lives. Writes are logged
    /// in `log`; `unlogged` is called for each page that was written while it is off. `interrupter`
    /// interrupts transfers.
    pub(crate) fn new(
        memory: &'a dyn Memory,
        log: &'a Log,
        unlogged: &'a dyn Fn(),
        interrupter: &'a dyn Interrupter,
    ) -> Self {
        Self {
            memory,
            log,
            unlogged,
            interrupter,
        }
    }

    /// Reads user memory at `iova` into a range of the device's memory, in bytes, and marks its
    /// pages.
    ///
    /// May sleep, until the user serves a page fault. Fails with [`Cause::Range`], and transfers
    /// nothing, if the range is empty or not inside the memory, or if it reaches beyond the end of
    /// the address space.
    pub fn read(&self, iova: u64, to: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        checked(to, range.clone())?;
        let pieces = pieces(iova, range.len())?;
        // A failed copy from the user leaves zeroes, which must not be written to the memory.
        let len = PAGE_SIZE.min(range.len());
        let mut bytes = KVec::from_elem(0u8, len, GFP_MAYFAIL)?;
        for piece in pieces {
            let fault = |cause| Fault {
                done: piece.start,
                cause,
            };
            let page = bytes.get_mut(..piece.len()).ok_or(fault(Cause::Range))?;
            self.read_bytes(iova + piece.start as u64, page)
                .map_err(|page| fault(page.cause))?;
            to.write(range.start + piece.start, page)
                .map_err(|error| fault(error.into()))?;
        }
        Ok(())
    }

    /// Reads bytes of user memory at `iova`.
    ///
    /// May sleep and fails like [`read()`](Self::read). Then the content of `to` after
    /// [`Fault::done`] bytes is undefined.
    ///
    /// # Examples
    ///
    /// A device that reads its descriptors from user memory.
    ///
    /// ```
    /// use vfio::dma::{
    ///     Bus,
    ///     Fault, //
    /// };
    ///
    /// fn descriptor(bus: &Bus<'_>, ring: u64, index: u64) -> Result<(u64, u64), Fault> {
    ///     let mut words = [[0; 8]; 2];
    ///     bus.read_bytes(ring + index * 16, words.as_flattened_mut())?;
    ///     let [addr, len] = words.map(u64::from_le_bytes);
    ///     Ok((addr, len))
    /// }
    /// ```
    pub fn read_bytes(&self, iova: u64, to: &mut [u8]) -> Result<(), Fault> {
        if to.is_empty() {
            return Err(Cause::Range.into());
        }
        for piece in pieces(iova, to.len())? {
            let done = piece.start;
            let page = to.get_mut(piece).ok_or(Cause::Range)?;
            // SAFETY: `page` is borrowed for writing.
            unsafe { self.copy(iova + done as u64, page, false) }
                .map_err(|cause| Fault { done, cause })?;
        }
        Ok(())
    }

    /// Writes a range of the device's memory, in bytes, to user memory at `iova`.
    ///
    /// May sleep and fails like [`read()`](Self::read).
    pub fn write(&self, iova: u64, from: &StateMemory, range: Range<usize>) -> Result<(), Fault> {
        let bytes = checked(from, range)?;
        // SAFETY: The bytes are inside of the memory, which is borrowed, and may be read by a copy
        // to the user.
        unsafe { self.write_pages(iova, bytes) }
    }

    /// Writes bytes to user memory at `iova`.
    ///
    /// May sleep and fails like [`read()`](Self::read).
    pub fn write_bytes(&self, iova: u64, from: &[u8]) -> Result<(), Fault> {
        if from.is_empty() {
            return Err(Cause::Range.into());
        }
        // SAFETY: The bytes are borrowed and only read.
        unsafe { self.write_pages(iova, from) }
    }

    /// Writes bytes to user memory and logs the pages. Writes page by page, because the core does
    /// not report partial transfers.
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
            let result = unsafe { self.copy(at, page.cast_mut(), true) };
            // Mark after the copy: a client that takes the log and then reads the page must see
            // the logged bytes. If the copy failed, a part of the page may have been written.
            if result.map_or_else(Cause::is_torn, |()| true) && !self.log.mark(at, piece.len()) {
                (self.unlogged)();
            }
            result.map_err(|cause| Fault {
                done: piece.start,
                cause,
            })?;
        }
        Ok(())
    }

    /// Copies bytes between kernel and user.
    ///
    /// # Safety
    ///
    /// `bytes` must be valid, for a copy to the user if `write` is true, else for a copy from the
    /// user.
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result<(), Cause> {
        // A reset waits for this transfer.
        if self.interrupter.is_halted() {
            return Err(Cause::Interrupted);
        }
        // SAFETY: The device is open, and `bytes` is valid by the safety requirements.
        unsafe { self.memory.copy(iova, bytes, write) }.map_err(Cause::of_core)
    }
}

/// Returns the bytes in a range of a memory.
///
/// Fails with [`Cause::Range`] if the range is empty or not inside.
fn checked(memory: &StateMemory, range: Range<usize>) -> Result<*const [u8], Cause> {
    let bytes = memory.bytes(range.clone());
    if bytes.len() == range.len() && !range.is_empty() {
        Ok(bytes)
    } else {
        Err(Cause::Range)
    }
}

impl From<Cause> for Fault {
    /// Converts a failure before any transfer.
    fn from(cause: Cause) -> Self {
        Self { done: 0, cause }
    }
}

impl From<Error> for Fault {
    /// Converts a failure before any transfer.
    fn from(error: Error) -> Self {
        Cause::from(error).into()
    }
}

impl From<AllocError> for Fault {
    /// Converts a failed allocation before any transfer.
    fn from(_: AllocError) -> Self {
        Cause::NoMemory.into()
    }
}
