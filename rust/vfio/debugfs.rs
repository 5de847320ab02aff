// SPDX-License-Identifier: GPL-2.0

//! Files of a device in debugfs, beside those of vfio core: its verdict and its statistics.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

#![cfg_attr(not(CONFIG_VFIO_DEBUGFS), allow(dead_code))]

use crate::{
    bindings,
    migration::Ledger, //
};
use kernel::{
    container_of,
    prelude::*,
    seq_file::SeqFile, //
};

/// A device with a ledger.
///
/// # Safety
///
/// `ledger()` must return the ledger of the device that it gets.
pub(crate) unsafe trait Watched: 'static {
    /// Returns the ledger of a device.
    ///
    /// # Safety
    ///
    /// `vdev` must point to a device of this type, which is not released before `'a` ends.
    unsafe fn ledger<'a>(vdev: *mut bindings::vfio_device) -> &'a Ledger;
}

/// Calls `show` with the ledger of the device that a file belongs to.
///
/// # Safety
///
/// Must be called by the core to read a file that [`create()`] has created for this type.
unsafe fn show<W: Watched>(file: *mut bindings::seq_file, show: fn(&Ledger, &SeqFile)) -> c_int {
    // SAFETY: The private data of the file is the `struct device` in a `struct vfio_device`, which
    // is registered until the core has removed the file; see `create()`.
    let (ledger, file) = unsafe {
        let device = (*file).private.cast::<bindings::device>();
        let vdev = container_of!(device, bindings::vfio_device, device);
        (W::ledger(vdev), SeqFile::from_raw(file))
    };
    show(ledger, file);
    0
}

/// # Safety
///
/// The same as for [`show()`].
unsafe extern "C" fn show_verdict<W: Watched>(
    file: *mut bindings::seq_file,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: By the safety requirements.
    unsafe { show::<W>(file, Ledger::show_verdict) }
}

/// # Safety
///
/// The same as for [`show()`].
unsafe extern "C" fn show_statistics<W: Watched>(
    file: *mut bindings::seq_file,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: By the safety requirements.
    unsafe { show::<W>(file, Ledger::show_statistics) }
}

/// Creates the files of a device, which the core removes when the device is unregistered. May
/// sleep. A failure is ignored, as usual in debugfs.
///
/// The memory that a file refers to is managed by the `struct device` of the device (devres).
/// Hence this relies on `vfio_unregister_group_dev()` to remove the files, which waits for calls on
/// them, before `device_del()` releases the memory. Linux 7.3 does so.
///
/// # Safety
///
/// `vdev` must point to a registered device of type `W`, which is not unregistered meanwhile.
pub(crate) unsafe fn create<W: Watched>(vdev: *mut bindings::vfio_device) {
    #[cfg(CONFIG_VFIO_DEBUGFS)]
    // SAFETY: The device and its folder exist until it is unregistered.
    unsafe {
        let device = &raw mut (*vdev).device;
        let folder = (*vdev).debug_root;
        let verdict = c"verdict".as_char_ptr();
        let statistics = c"statistics".as_char_ptr();
        bindings::debugfs_create_devm_seqfile(device, verdict, folder, Some(show_verdict::<W>));
        bindings::debugfs_create_devm_seqfile(
            device,
            statistics,
            folder,
            Some(show_statistics::<W>),
        );
    }
    #[cfg(not(CONFIG_VFIO_DEBUGFS))]
    let _ = vdev;
}
