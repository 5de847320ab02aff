// SPDX-License-Identifier: GPL-2.0

//! The `struct vfio_device` of any VFIO driver.
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use crate::bindings;
use core::{
    marker::PhantomData,
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    device,
    error::to_result,
    prelude::*,
    sync::aref::AlwaysRefCounted,
    types::Opaque, //
};

mod private {
    pub trait Sealed {}
}

/// The context of a [`Device`] reference.
///
/// The context is part of the device's type: methods that need an open device cannot be called on a
/// device that may be closed.
pub trait DeviceContext: private::Sealed {}

/// Context of a device that exists. Only in this context can the device be reference-counted.
pub struct Normal;

/// Context of an open device: from before `open_device()` returns to after `close_device()` was
/// called.
///
/// All callbacks on behalf of a device file have this context, and so do the functions of a `struct
/// vfio_migration_ops` that are called by ioctls of that file. It also holds between callbacks, for
/// the worker of a device and for a mapping.
pub struct Open;

impl private::Sealed for Normal {}
impl private::Sealed for Open {}
impl DeviceContext for Normal {}
impl DeviceContext for Open {}

/// A VFIO device on any bus.
///
/// Corresponds to the C `struct vfio_device`.
///
/// # Invariants
///
/// - `self.0` is a `struct vfio_device` allocated by `_vfio_alloc_device()`, whose reference count
///   is not zero.
/// - If `Ctx` is [`Open`], the device stays open as long as the reference to it lives.
#[repr(transparent)]
pub struct Device<Ctx: DeviceContext = Normal>(Opaque<bindings::vfio_device>, PhantomData<Ctx>);

impl<Ctx: DeviceContext> Device<Ctx> {
    /// Returns the raw `struct vfio_device` pointer.
    #[inline]
    pub fn as_raw(&self) -> *mut bindings::vfio_device {
        self.0.get()
    }

    /// Converts a raw pointer to a reference, for the callbacks of a bus front end.
    ///
    /// # Safety
    ///
    /// `ptr` must point to a `struct vfio_device` allocated by `_vfio_alloc_device()`. For `'a`,
    /// its reference count must not be zero, and the condition of `Ctx` must hold: with [`Open`],
    /// the device must stay open.
    #[inline]
    pub unsafe fn from_raw<'a>(ptr: *mut bindings::vfio_device) -> &'a Self {
        // INVARIANT: Both hold by the safety requirements.
        // SAFETY: `Device` is a transparent wrapper of `struct vfio_device`.
        unsafe { &*ptr.cast() }
    }

    /// Returns whether the user opted in to `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`.
    ///
    /// The core sets this flag at the user's request, at any time, and clears it on the last close.
    #[inline]
    pub(crate) fn precopy_info_v2(&self) -> bool {
        // SAFETY: By the type invariants the pointer is valid; the field is one byte that the
        // core writes without a lock, hence the volatile read.
        unsafe { (&raw const (*self.as_raw()).precopy_info_v2).read_volatile() != 0 }
    }
}

impl Device<Open> {
    /// Returns the name of the device on its bus.
    pub(crate) fn parent_name(&self) -> &CStr {
        // SAFETY: By the type invariants the device is valid and open, so its parent exists and
        // is not renamed.
        unsafe { device::Device::<device::Normal>::from_raw((*self.as_raw()).dev) }.name()
    }

    /// Returns whether the device has no IOMMU and accesses memory that is mapped in an iommufd,
    /// which does not track its writes.
    pub(crate) fn is_untracked(&self) -> bool {
        // SAFETY: By the type invariants the device is valid and open. The core sets the pointer
        // before the first open, and clears it after the last close.
        unsafe { !(*self.as_raw()).iommufd_access.is_null() }
    }

    /// Returns the next state on the path from `cur` to `target`, or `cur` if they are equal.
    /// All are values of `enum vfio_device_mig_state`.
    ///
    /// Fails with `EINVAL` if the uAPI refuses the request: the device does not support `target`,
    /// or no path is permitted. `cur` must be a supported state other than `ERROR`; otherwise vfio
    /// core warns.
    pub(crate) fn next_state(&self, cur: u32, target: u32) -> Result<u32> {
        let mut next = bindings::vfio_device_mig_state(cur);
        // SAFETY: By the type invariants the device is valid. The function accepts any states,
        // reads only the flags of the device, which do not change while it is open, and writes to
        // `next`.
        to_result(unsafe {
            bindings::vfio_mig_get_next_state(
                self.as_raw(),
                bindings::vfio_device_mig_state(cur),
                bindings::vfio_device_mig_state(target),
                &mut next,
            )
        })?;
        Ok(next.0)
    }
}

impl Deref for Device<Open> {
    type Target = Device;

    #[inline]
    fn deref(&self) -> &Device {
        // SAFETY: An open device is also a device that exists.
        unsafe { Device::from_raw(self.as_raw()) }
    }
}

impl<Ctx: DeviceContext> AsRef<device::Device> for Device<Ctx> {
    /// Returns the `struct device` in the `vfio-dev` class, not the parent on the bus.
    #[inline]
    fn as_ref(&self) -> &device::Device {
        // SAFETY: By the type invariants the pointer is valid, and the `struct device` embedded
        // in a `struct vfio_device` carries its reference count.
        unsafe { device::Device::from_raw(&raw mut (*self.as_raw()).device) }
    }
}

// SAFETY: `get_device()` and `put_device()` on the embedded `struct device` count references of the
// `struct vfio_device`, like `vfio_put_device()`.
unsafe impl AlwaysRefCounted for Device {
    #[inline]
    fn inc_ref(&self) {
        // SAFETY: By the type invariants the reference count is not zero.
        unsafe { bindings::get_device(&raw mut (*self.as_raw()).device) };
    }

    #[inline]
    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference that it owns.
        unsafe { bindings::put_device(&raw mut (*obj.as_ref().as_raw()).device) };
    }
}

// SAFETY: A `struct vfio_device` may be released in any sleepable context, on any thread.
unsafe impl Send for Device {}

// SAFETY: The core synchronises all operations that a shared reference allows.
unsafe impl Sync for Device {}

/// Waits until no task executes code of the module for a device that it has dropped. May sleep.
///
/// The drop of a driver's registration calls it last. The task that dropped a device may be
/// preempted before it returns to the core, while it still has to execute some instructions of the
/// module. Only RCU Tasks waits for such a task. Kernels with kprobes, BPF or function tracing have
/// it if they have preemption. Without preemption, the unloading of a module waits long enough.
pub(crate) fn wait_for_tasks() {
    #[cfg(CONFIG_TASKS_RCU)]
    // SAFETY: An FFI call with no additional requirements.
    unsafe {
        bindings::synchronize_rcu_tasks()
    };
}
