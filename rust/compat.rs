// SPDX-License-Identifier: GPL-2.0

//! Stand-ins for items that are `pub(crate)` in the kernel crate. Upstreaming deletes this file.

use kernel::{
    bindings,
    device, //
};

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
