// SPDX-License-Identifier: GPL-2.0

//! Stand-ins for items that are `pub(crate)` in the kernel crate, and support for users of
//! interfaces that were never merged. Upstreaming deletes this file.

use crate::bindings;
use kernel::{
    device,
    ioctl::_IO, //
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

/// Number of `VFIO_MIG_GET_PRECOPY_INFO` in the first proposal of pre-copy, with the same argument.
const DRAFT_PRECOPY_INFO: u32 = _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + 22);

/// Translates the number of an ioctl of a data_fd from the proposal to mainline: users of the
/// proposal still pass the old number.
pub(crate) fn mainline_ioctl(cmd: u32) -> u32 {
    match cmd {
        DRAFT_PRECOPY_INFO => bindings::VFIO_MIG_GET_PRECOPY_INFO,
        _ => cmd,
    }
}
