// SPDX-License-Identifier: GPL-2.0

//! Stand-ins for items that are `pub(crate)` in the kernel crate. Upstreaming deletes this file.

use kernel::{
    alloc::Flags,
    bindings,
    device, //
};

/// Makes an allocation fail instead of invoking the OOM killer.
///
/// Stands in for a flag that is missing in `kernel::alloc::flags`.
// SAFETY: `Flags` is a struct of one `u32`, for which any value is valid.
pub(crate) const __GFP_RETRY_MAYFAIL: Flags =
    unsafe { core::mem::transmute::<u32, Flags>(1 << bindings::___GFP_RETRY_MAYFAIL_BIT) };

/// Stands in for `device::Device::as_raw()`, which takes precedence in the kernel crate.
pub(crate) trait AsRaw {
    /// Returns the raw `struct device` pointer.
    fn as_raw(&self) -> *mut bindings::device;
}

impl<Ctx: device::DeviceContext> AsRaw for device::Device<Ctx> {
    fn as_raw(&self) -> *mut bindings::device {
        // `Device` is a transparent wrapper of an `Opaque<bindings::device>`.
        core::ptr::from_ref(self).cast_mut().cast()
    }
}
