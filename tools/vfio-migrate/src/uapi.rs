// SPDX-License-Identifier: GPL-2.0

//! Calls of the VFIO uAPI that `vfio-ioctls` lacks, or whose result it does not return in full.
//!
//! This is the only module with `unsafe` and the only one that uses the generated bindings.
//! `Documentation/vfio_vmms.rst` lists the gaps of that crate.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use vfio_bindings::bindings::vfio as sys;
use vfio_ioctls::VfioDevice;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref};
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(DEVICE_GET_INFO, sys::VFIO_TYPE.into(), sys::VFIO_BASE + 7);
ioctl_io_nr!(
    DEVICE_GET_REGION_INFO,
    sys::VFIO_TYPE.into(),
    sys::VFIO_BASE + 8
);
ioctl_io_nr!(DEVICE_RESET, sys::VFIO_TYPE.into(), sys::VFIO_BASE + 11);
ioctl_io_nr!(DEVICE_FEATURE, sys::VFIO_TYPE.into(), sys::VFIO_BASE + 17);
ioctl_io_nr!(
    MIG_GET_PRECOPY_INFO,
    sys::VFIO_TYPE.into(),
    sys::VFIO_BASE + 21
);

/// The device supports `PRE_COPY`.
pub(crate) const MIGRATION_PRE_COPY: u64 = sys::VFIO_MIGRATION_PRE_COPY as u64;
/// The device supports `RUNNING_P2P`, and with `PRE_COPY` also `PRE_COPY_P2P`.
pub(crate) const MIGRATION_P2P: u64 = sys::VFIO_MIGRATION_P2P as u64;
/// The device supports `STOP_COPY`, which is mandatory.
pub(crate) const MIGRATION_STOP_COPY: u64 = sys::VFIO_MIGRATION_STOP_COPY as u64;

/// Index of the configuration space of a PCI device; the BARs start at 0.
pub(crate) const REGION_CONFIG: u32 = sys::VFIO_PCI_CONFIG_REGION_INDEX;
/// Index of the expansion ROM of a PCI device.
pub(crate) const REGION_ROM: u32 = sys::VFIO_PCI_ROM_REGION_INDEX;
/// Index of the VGA region of a PCI device.
pub(crate) const REGION_VGA: u32 = sys::VFIO_PCI_VGA_REGION_INDEX;

/// Types that the kernel may fill with any bytes.
///
/// # Safety
///
/// Every bit pattern is a value of the type, and it has no padding.
unsafe trait Plain: Default {}

// SAFETY: two integers of 4 bytes.
unsafe impl Plain for sys::vfio_device_feature_mig_state {}
// SAFETY: no bytes.
unsafe impl Plain for () {}

/// `struct vfio_device_feature` followed by its data.
#[repr(C)]
#[derive(Default)]
struct Feature<T> {
    argsz: u32,
    flags: u32,
    data: T,
}

/// Calls `VFIO_DEVICE_FEATURE`.
///
/// `data` must have the type that the feature and the operation in `flags` require.
fn feature<T: Plain>(fd: BorrowedFd<'_>, flags: u32, data: T) -> io::Result<T> {
    let mut feature = Feature {
        argsz: size_of::<Feature<T>>() as u32,
        flags,
        data,
    };
    // SAFETY: the kernel reads and writes at most `argsz` bytes, which is the size of `feature`,
    // and any bytes that it writes to `data` are a valid `T`.
    match unsafe { ioctl_with_mut_ref(&fd, DEVICE_FEATURE(), &mut feature) } {
        0.. => Ok(feature.data),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Borrows the file of a device; `vfio-ioctls` only provides its number.
pub(crate) fn device_fd(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: `device` owns the file, and the lifetime keeps it open.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Sets the migration state and returns the new data_fd, if any.
///
/// `VfioDevice::set_migration_state` does not return the data_fd.
pub(crate) fn set_state(device: BorrowedFd<'_>, state: u32) -> io::Result<Option<File>> {
    let answer = feature(
        device,
        sys::VFIO_DEVICE_FEATURE_SET | sys::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
        sys::vfio_device_feature_mig_state {
            device_state: state,
            data_fd: -1,
        },
    )?;
    Ok((answer.data_fd >= 0).then(|| {
        // SAFETY: the kernel has just installed this file for us, and no other code uses it.
        unsafe { File::from_raw_fd(answer.data_fd) }
    }))
}

/// Opts in to `VFIO_PRECOPY_INFO_REINIT`; fails with `ENOTTY` if the kernel does not support it.
pub(crate) fn set_precopy_info_v2(device: BorrowedFd<'_>) -> io::Result<()> {
    feature(
        device,
        sys::VFIO_DEVICE_FEATURE_SET | sys::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
        (),
    )
}

/// Resets the device; `VfioDevice::reset` does not return whether that succeeded.
pub(crate) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument.
    match unsafe { ioctl(&device, DEVICE_RESET()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Amount of data that is left to stream in pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrecopyInfo {
    /// Bytes of the initial device state that were not streamed yet.
    pub(crate) initial: u64,
    /// Bytes that changed since they were streamed.
    pub(crate) dirty: u64,
    /// The device has new initial data; only reported after [`set_precopy_info_v2`].
    pub(crate) reinit: bool,
}

impl PrecopyInfo {
    /// Returns the sum of both.
    pub(crate) fn left(&self) -> u64 {
        self.initial.saturating_add(self.dirty)
    }
}

/// Calls `VFIO_MIG_GET_PRECOPY_INFO` on a data_fd.
pub(crate) fn precopy_info(stream: &File) -> io::Result<PrecopyInfo> {
    let mut info = sys::vfio_precopy_info {
        argsz: size_of::<sys::vfio_precopy_info>() as u32,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes at most `argsz` bytes, the size of `info`, which is
    // integers only.
    match unsafe { ioctl_with_mut_ref(stream, MIG_GET_PRECOPY_INFO(), &mut info) } {
        0 => Ok(PrecopyInfo {
            initial: info.initial_bytes,
            dirty: info.dirty_bytes,
            reinit: info.flags & sys::VFIO_PRECOPY_INFO_REINIT != 0,
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Region of a device, from `VFIO_DEVICE_GET_REGION_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    /// Index of the region.
    pub(crate) index: u32,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Offset in the file of the device.
    pub(crate) offset: u64,
    /// Whether it can be read.
    pub(crate) readable: bool,
    /// Whether it can be written.
    pub(crate) writable: bool,
}

/// Returns the regions of the device with a size above 0, with their real indexes.
///
/// In `vfio-ioctls`, a region without an info shifts the indexes of all later ones.
pub(crate) fn regions(device: BorrowedFd<'_>) -> io::Result<Vec<RegionInfo>> {
    let mut info = sys::vfio_device_info {
        argsz: size_of::<sys::vfio_device_info>() as u32,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes at most `argsz` bytes, the size of `info`, which is
    // integers only.
    if unsafe { ioctl_with_mut_ref(&device.as_fd(), DEVICE_GET_INFO(), &mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut regions = Vec::new();
    for index in 0..info.num_regions {
        let mut region = sys::vfio_region_info {
            argsz: size_of::<sys::vfio_region_info>() as u32,
            index,
            ..Default::default()
        };
        // SAFETY: as above, with the size of `region`.
        let status =
            unsafe { ioctl_with_mut_ref(&device.as_fd(), DEVICE_GET_REGION_INFO(), &mut region) };
        // A device without this region fails with EINVAL.
        if status == 0 && region.size > 0 {
            regions.push(RegionInfo {
                index,
                size: region.size,
                offset: region.offset,
                readable: region.flags & sys::VFIO_REGION_INFO_FLAG_READ != 0,
                writable: region.flags & sys::VFIO_REGION_INFO_FLAG_WRITE != 0,
            });
        }
    }
    Ok(regions)
}
