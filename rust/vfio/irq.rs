// SPDX-License-Identifier: GPL-2.0

//! Interrupts: eventfds by which a device tells its user.
//!
//! C headers: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h),
//! [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h)

use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    new_spinlock,
    prelude::*,
    sync::SpinLock,
    uaccess::UserSliceReader, //
};

/// Message signalled interrupts of the extended kind.
pub(crate) const MSIX: u32 = bindings::VFIO_PCI_MSIX_IRQ_INDEX;
/// Errors of PCI Express, which `vfio-pci` denies to exist where a device cannot have them.
pub(crate) const ERR: u32 = bindings::VFIO_PCI_ERR_IRQ_INDEX;
/// The request that the user let go of the device.
pub(crate) const REQ: u32 = bindings::VFIO_PCI_REQ_IRQ_INDEX;
/// How many interrupt indexes a PCI device has, present or not.
pub(crate) const COUNT: u32 = bindings::VFIO_PCI_NUM_IRQS;

/// An eventfd that somebody else waits on.
///
/// # Invariants
///
/// The pointer is valid, and a reference on the `struct eventfd_ctx` is owned.
struct EventFd(NonNull<bindings::eventfd_ctx>);

impl EventFd {
    /// Takes a reference on what `fd` stands for.
    ///
    /// Fails with `EBADF` or `EINVAL` if that is no eventfd.
    fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Any value may be asked for.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;
        // INVARIANT: `eventfd_ctx_fdget()` takes the reference that is now owned.
        NonNull::new(ctx).map(Self).ok_or(EBADF)
    }

    /// Adds one to the counter. Does not sleep.
    fn signal(&self) {
        // SAFETY: By the type invariants the pointer is valid.
        unsafe { bindings::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: By the type invariants a reference is owned, and it is given up here.
        unsafe { bindings::eventfd_ctx_put(self.0.as_ptr()) };
    }
}

// SAFETY: A reference on an eventfd belongs to no thread.
unsafe impl Send for EventFd {}

/// How many vectors a device has at each interrupt index.
pub(crate) type Counts = [u32; COUNT as usize];

/// What the user asked for in `VFIO_DEVICE_SET_IRQS`, as it was given.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// The interrupts of an open device.
///
/// Lives in the device's open data, so that nobody is signalled after the last close.
#[pin_data]
pub(crate) struct Irqs {
    counts: Counts,
    /// The vectors of all indexes, one after the other.
    #[pin]
    vectors: SpinLock<KVec<Option<EventFd>>>,
}

impl Irqs {
    /// Makes the interrupts of a device with `counts[index]` vectors at each index, all of them
    /// silent.
    pub(crate) fn new(counts: Counts) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            counts,
            vectors <- {
                let mut vectors = KVec::new();
                for _ in 0..counts.iter().sum::<u32>() {
                    vectors.push(None, GFP_KERNEL)?;
                }
                new_spinlock!(vectors, "vfio::irq::Irqs")
            },
        }? Error)
    }

    /// Returns how many vectors there are at `index`; none if there is no such index.
    pub(crate) fn count(&self, index: u32) -> u32 {
        self.counts.get(index as usize).copied().unwrap_or(0)
    }

    /// Returns the place of a vector among those of all indexes.
    fn slot(&self, index: u32, vector: u32) -> Option<usize> {
        if vector >= self.count(index) {
            return None;
        }
        let before: u32 = self.counts.iter().take(index as usize).sum();
        Some((before + vector) as usize)
    }

    /// Signals a vector, if its user asked for that. Does not sleep.
    pub(crate) fn trigger(&self, index: u32, vector: u32) {
        if let Some(slot) = self.slot(index, vector) {
            if let Some(Some(eventfd)) = self.vectors.lock().get(slot) {
                eventfd.signal();
            }
        }
    }

    /// Sets the eventfd of a vector and returns the one it had.
    fn replace(&self, index: u32, vector: u32, new: Option<EventFd>) -> Option<EventFd> {
        let slot = self.slot(index, vector)?;
        let mut vectors = self.vectors.lock();
        core::mem::replace(vectors.get_mut(slot)?, new)
    }

    /// Serves `VFIO_DEVICE_SET_IRQS`. `data` is what follows the header in the user's memory.
    ///
    /// Fails with `EINVAL` for arguments that `vfio_set_irqs_validate_and_prepare()` refuses, with
    /// `ENOTTY` for what such an interrupt cannot do, and with `EFAULT`, `EBADF` or `EINVAL` for
    /// eventfds that are none; then nothing has changed. May sleep.
    pub(crate) fn set(&self, request: Request, data: &mut UserSliceReader) -> Result {
        let Request {
            argsz,
            flags,
            index,
            start,
            count,
        } = request;
        let mut header = bindings::vfio_irq_set {
            argsz,
            flags,
            index,
            start,
            count,
            ..Default::default()
        };
        let mut size = 0;
        // SAFETY: `header` and `size` are valid for the call. The counts are small numbers.
        to_result(unsafe {
            bindings::vfio_set_irqs_validate_and_prepare(
                &raw mut header,
                self.count(index) as c_int,
                COUNT as c_int,
                &raw mut size,
            )
        })?;
        if flags & bindings::VFIO_IRQ_SET_ACTION_TYPE_MASK != bindings::VFIO_IRQ_SET_ACTION_TRIGGER
        {
            return Err(ENOTTY);
        }
        match flags & bindings::VFIO_IRQ_SET_DATA_TYPE_MASK {
            bindings::VFIO_IRQ_SET_DATA_NONE if count == 0 => {
                for vector in 0..self.count(index) {
                    drop(self.replace(index, vector, None));
                }
            }
            bindings::VFIO_IRQ_SET_DATA_NONE => {
                for vector in start..start + count {
                    self.trigger(index, vector);
                }
            }
            bindings::VFIO_IRQ_SET_DATA_BOOL => {
                let mut fire = KVec::zeroed(count as usize, GFP_KERNEL_ACCOUNT)?;
                data.read_slice(&mut fire)?;
                for (vector, _) in (start..).zip(&fire).filter(|(_, fire)| **fire != 0) {
                    self.trigger(index, vector);
                }
            }
            _ => {
                // All the new ones are held before the first old one is let go.
                let mut eventfds = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
                for _ in 0..count {
                    let fd = data.read::<i32>()?;
                    let eventfd = if fd < 0 {
                        None
                    } else {
                        Some(EventFd::from_fd(fd)?)
                    };
                    eventfds.push(eventfd, GFP_KERNEL_ACCOUNT)?;
                }
                for (vector, eventfd) in (start..).zip(eventfds) {
                    drop(self.replace(index, vector, eventfd));
                }
            }
        }
        Ok(())
    }
}
