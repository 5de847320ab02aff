// SPDX-License-Identifier: GPL-2.0

//! Interrupts of a device, which are delivered to its user by eventfds.
//!
//! C headers: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h),
//! [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h)

// Public for tests, which build the file as a crate of its own.
#[allow(unreachable_pub)]
pub(crate) mod msix;

use self::msix::{
    Listener,
    Msix,
    Vector, //
};
use crate::{
    bindings,
    user::GFP_MAYFAIL, //
};
use core::ptr::NonNull;
use kernel::{
    device::Device,
    error::{
        from_err_ptr,
        to_result, //
    },
    new_mutex,
    new_spinlock_irq,
    prelude::*,
    sync::{
        Mutex,
        SpinLockIrq, //
    },
    uaccess::UserSliceReader, //
};

// `msix` uses `core` alone.
static_assert!(msix::ENTRY_SIZE == bindings::PCI_MSIX_ENTRY_SIZE as usize);
static_assert!(msix::CONTROL == bindings::PCI_MSIX_ENTRY_VECTOR_CTRL as usize);
static_assert!(msix::CONTROL_MASKED as u32 == bindings::PCI_MSIX_ENTRY_CTRL_MASKBIT);

/// Interrupt index of MSI-X.
const MSIX: u32 = bindings::VFIO_PCI_MSIX_IRQ_INDEX;
/// Interrupt index of the request to release the device.
const REQ: u32 = bindings::VFIO_PCI_REQ_IRQ_INDEX;
/// Number of interrupt indexes of a PCI device, present or not.
pub(crate) const COUNT: u32 = bindings::VFIO_PCI_NUM_IRQS;

/// Number of requests for each log message of a removal that waits for the user, like `vfio-pci`.
const REQUESTS_PER_NOTICE: u32 = 10;

/// An eventfd of the user.
///
/// # Invariants
///
/// The pointer is valid, and a reference to the `struct eventfd_ctx` is owned.
pub(crate) struct EventFd(NonNull<bindings::eventfd_ctx>);

impl EventFd {
    /// Takes a reference to the eventfd `fd`. Returns [`None`] if `fd` is negative.
    ///
    /// Fails with `EBADF` or `EINVAL` if `fd` is not an eventfd.
    fn from_fd(fd: i32) -> Result<Option<Self>> {
        if fd < 0 {
            return Ok(None);
        }
        // SAFETY: Any value is valid.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;
        // INVARIANT: `eventfd_ctx_fdget()` takes the reference that is now owned.
        Ok(NonNull::new(ctx).map(Self))
    }
}

impl Listener for EventFd {
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

// SAFETY: A reference to an eventfd is not bound to a thread.
unsafe impl Send for EventFd {}

/// Unchecked arguments of `VFIO_DEVICE_SET_IRQS`.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// Data after the header of `VFIO_DEVICE_SET_IRQS`.
enum Data {
    /// No data: the action is for all vectors of the range.
    None,
    /// The action is for the vectors whose byte is not zero.
    Bool(KVec<u8>),
    /// The action is bound to these files.
    EventFd(KVec<u8>),
}

impl Data {
    /// Returns whether the action is for the vector at this position in the range.
    fn includes(&self, index: u32) -> bool {
        match self {
            Self::None => true,
            Self::Bool(bytes) => bytes.get(index as usize).is_some_and(|byte| *byte != 0),
            Self::EventFd(_) => false,
        }
    }
}

/// Returns the file descriptors in the user's data.
fn fds(bytes: &[u8]) -> impl Iterator<Item = i32> + '_ {
    bytes
        .chunks_exact(size_of::<i32>())
        .filter_map(|fd| Some(i32::from_ne_bytes(fd.try_into().ok()?)))
}

/// State of [`Irqs`] that the spinlock protects.
struct Inner {
    msix: Msix<KVec<Vector<EventFd>>>,
    /// MSI-X is on: the user has set eventfds.
    enabled: bool,
    request: Option<EventFd>,
}

/// The interrupts of an open device.
///
/// This is a part of the device's open data, so that no eventfd is signalled after the last close.
#[pin_data]
pub(crate) struct Irqs {
    vectors: u32,
    /// Held during a change by the user, which takes more than one step. Taken before `inner`.
    #[pin]
    gate: Mutex<()>,
    /// Also taken in hard interrupts, because a device may signal there.
    #[pin]
    inner: SpinLockIrq<Inner>,
}

impl Irqs {
    /// Creates the interrupts of a running device with `vectors` vectors of MSI-X and no eventfds.
    pub(crate) fn new(vectors: u32) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            gate <- new_mutex!((), "vfio::emulated::Irqs::gate"),
            inner <- {
                let mut all = KVec::with_capacity(vectors as usize, GFP_MAYFAIL)?;
                for _ in 0..vectors {
                    all.push(Vector::POWER_ON, GFP_MAYFAIL)?;
                }
                let inner = Inner {
                    msix: Msix::new(all),
                    enabled: false,
                    request: None,
                };
                new_spinlock_irq!(inner, "vfio::emulated::Irqs::inner")
            },
            vectors,
        }? Error)
    }

    /// Returns the number of vectors at `index`, 0 if the index does not exist.
    fn count(&self, index: u32) -> u32 {
        match index {
            MSIX => self.vectors,
            REQ => 1,
            _ => 0,
        }
    }

    /// Returns flags and count of an interrupt index, for `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// Fails with `EINVAL` if the index does not exist, and for errors of PCI Express, which a
    /// conventional PCI device cannot have.
    pub(crate) fn info(&self, index: u32) -> Result<(u32, u32)> {
        let kind = match index {
            // Like `vfio-pci`, even without INTx.
            bindings::VFIO_PCI_INTX_IRQ_INDEX => {
                bindings::VFIO_IRQ_INFO_MASKABLE | bindings::VFIO_IRQ_INFO_AUTOMASKED
            }
            // Single vectors can be added and removed.
            MSIX => bindings::VFIO_IRQ_INFO_MASKABLE,
            bindings::VFIO_PCI_MSI_IRQ_INDEX | REQ => bindings::VFIO_IRQ_INFO_NORESIZE,
            _ => return Err(EINVAL),
        };
        Ok((bindings::VFIO_IRQ_INFO_EVENTFD | kind, self.count(index)))
    }

    /// Raises an interrupt of MSI-X. It is pending until it can be delivered. Does not sleep, and
    /// may be called in a hard interrupt.
    pub(crate) fn signal(&self, vector: u32) {
        self.inner.lock().msix.signal(vector as usize);
    }

    /// Asks the user for the `count`th time to release the device, which is being removed. Logs
    /// that the removal waits, like `vfio-pci`.
    pub(crate) fn request(&self, dev: &Device, count: u32) {
        let inner = self.inner.lock();
        if let Some(eventfd) = &inner.request {
            eventfd.signal();
        }
        let asked = inner.request.is_some();
        drop(inner);
        if asked && count % REQUESTS_PER_NOTICE == 0 {
            dev_notice!(dev, "Relaying device request to user (#{})\n", count);
        } else if !asked && count == 0 {
            dev_warn!(
                dev,
                "No device request channel registered, blocked until released by user\n"
            );
        }
    }

    /// Calls `work` with the MSI-X side of the device locked.
    pub(crate) fn msix<R>(&self, work: impl FnOnce(&mut Msix<KVec<Vector<EventFd>>>) -> R) -> R {
        work(&mut self.inner.lock().msix)
    }

    /// Releases all eventfds, so that none is signalled any more. May sleep.
    pub(crate) fn silence(&self) {
        let _gate = self.gate.lock();
        self.disable();
        let request = self.inner.lock().request.take();
        // Dropped outside of the lock.
        drop(request);
    }

    /// Switches MSI-X off, and clears the masks. Pending interrupts stay pending. Called with
    /// `gate` held.
    fn disable(&self) {
        self.inner.lock().enabled = false;
        for vector in 0..self.vectors as usize {
            let mut inner = self.inner.lock();
            let listener = inner.msix.listen(vector, None);
            inner.msix.mask(vector, false);
            drop(inner);
            // Dropped outside of the lock.
            drop(listener);
        }
    }

    /// Handles `VFIO_DEVICE_SET_IRQS`. `reader` is at the data after the header in the user's
    /// memory.
    ///
    /// Fails like `vfio-pci`, and then changes nothing:
    ///
    /// * with `EINVAL` for arguments that `vfio_set_irqs_validate_and_prepare()` refuses, for
    ///   MSI-X that is not switched on, and for arguments that the request interrupt does not
    ///   support;
    /// * with `ENOTTY` for actions that such an interrupt does not support;
    /// * with `ERANGE` if MSI-X is switched on without a vector;
    /// * with `EBADF` or `EINVAL` for files that are not eventfds;
    /// * with `EFAULT` and `ENOMEM`.
    ///
    /// May sleep.
    pub(crate) fn set(&self, request: Request, reader: &mut UserSliceReader) -> Result {
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
        let mut bytes = KVec::zeroed(size, GFP_MAYFAIL)?;
        reader.read_slice(&mut bytes)?;
        let data = match flags & bindings::VFIO_IRQ_SET_DATA_TYPE_MASK {
            bindings::VFIO_IRQ_SET_DATA_NONE => Data::None,
            bindings::VFIO_IRQ_SET_DATA_BOOL => Data::Bool(bytes),
            _ => Data::EventFd(bytes),
        };
        let _gate = self.gate.lock();
        match (index, flags & bindings::VFIO_IRQ_SET_ACTION_TYPE_MASK) {
            (MSIX, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => self.trigger(start, count, &data),
            (MSIX, bindings::VFIO_IRQ_SET_ACTION_MASK) => self.mask(start, count, &data, true),
            (MSIX, bindings::VFIO_IRQ_SET_ACTION_UNMASK) => self.mask(start, count, &data, false),
            (REQ, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => self.trigger_request(count, &data),
            _ => Err(ENOTTY),
        }
    }

    /// Sets the eventfds of a range of vectors, raises their interrupts like the device would, or,
    /// without vectors, switches MSI-X off.
    fn trigger(&self, start: u32, count: u32, data: &Data) -> Result {
        if let Data::EventFd(bytes) = data {
            // Get all new eventfds before an old one is released.
            let mut eventfds = KVec::with_capacity(count as usize, GFP_MAYFAIL)?;
            for fd in fds(bytes) {
                eventfds.push(EventFd::from_fd(fd)?, GFP_MAYFAIL)?;
            }
            let mut inner = self.inner.lock();
            if !inner.enabled && start + count == 0 {
                return Err(ERANGE);
            }
            inner.enabled = true;
            for (vector, eventfd) in (start as usize..).zip(eventfds.iter_mut()) {
                *eventfd = inner.msix.listen(vector, eventfd.take());
            }
            drop(inner);
            // The old eventfds are dropped outside of the lock.
            return Ok(());
        }
        let mut inner = self.inner.lock();
        if !inner.enabled {
            return Err(EINVAL);
        }
        if count == 0 && matches!(data, Data::None) {
            drop(inner);
            self.disable();
            return Ok(());
        }
        for index in (0..count).filter(|index| data.includes(*index)) {
            inner.msix.trigger((start + index) as usize);
        }
        Ok(())
    }

    /// Masks or unmasks a range of vectors. `vfio-pci` supports this for INTx only, with the same
    /// errors.
    fn mask(&self, start: u32, count: u32, data: &Data, masked: bool) -> Result {
        let mut inner = self.inner.lock();
        if !inner.enabled {
            return Err(EINVAL);
        }
        if let Data::EventFd(_) = data {
            return Err(ENOTTY);
        }
        for index in (0..count).filter(|index| data.includes(*index)) {
            inner.msix.mask((start + index) as usize, masked);
        }
        Ok(())
    }

    /// Sets, removes or signals the eventfd of the request interrupt.
    fn trigger_request(&self, count: u32, data: &Data) -> Result {
        let new = match data {
            Data::EventFd(bytes) => match fds(bytes).next() {
                Some(fd) if fd >= -1 => EventFd::from_fd(fd)?,
                _ => return Err(EINVAL),
            },
            Data::Bool(_) if count == 0 => return Err(EINVAL),
            Data::None if count == 0 => None,
            _ => {
                let inner = self.inner.lock();
                match &inner.request {
                    Some(eventfd) if data.includes(0) => eventfd.signal(),
                    None if matches!(data, Data::None) => return Err(EINVAL),
                    _ => (),
                }
                return Ok(());
            }
        };
        let mut inner = self.inner.lock();
        if matches!(data, Data::None) && inner.request.is_none() {
            return Err(EINVAL);
        }
        let old = core::mem::replace(&mut inner.request, new);
        drop(inner);
        // Dropped outside of the lock.
        drop(old);
        Ok(())
    }
}
