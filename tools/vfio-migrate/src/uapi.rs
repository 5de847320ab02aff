// SPDX-License-Identifier: GPL-2.0

//! The calls of the migration uAPI that `vfio-ioctls` has not, or not with all of their answers.
//!
//! The only module with `unsafe`, and the only one that names the generated bindings. What it
//! replaces is listed in `Documentation/vfio-migrate.rst` as proposals for that crate.

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
/// The device supports `STOP_COPY`, as all that migrate must.
pub(crate) const MIGRATION_STOP_COPY: u64 = sys::VFIO_MIGRATION_STOP_COPY as u64;

/// Index of the configuration space of a PCI device; the BARs come before it, from 0.
pub(crate) const REGION_CONFIG: u32 = sys::VFIO_PCI_CONFIG_REGION_INDEX;
/// Index of the expansion ROM of a PCI device.
pub(crate) const REGION_ROM: u32 = sys::VFIO_PCI_ROM_REGION_INDEX;
/// Index of the VGA region of a PCI device.
pub(crate) const REGION_VGA: u32 = sys::VFIO_PCI_VGA_REGION_INDEX;

/// What a struct is that the kernel may fill with any bytes.
///
/// # Safety
///
/// Every bit pattern is a value of the type, and it has no padding.
unsafe trait Plain: Default {}

// SAFETY: two integers of 4 bytes.
unsafe impl Plain for sys::vfio_device_feature_mig_state {}
// SAFETY: no bytes.
unsafe impl Plain for () {}

/// `struct vfio_device_feature` with what belongs behind it.
#[repr(C)]
#[derive(Default)]
struct Feature<T> {
    argsz: u32,
    flags: u32,
    data: T,
}

/// `VFIO_DEVICE_FEATURE`; `data` must be what the feature and the operation in `flags` call for.
fn feature<T: Plain>(fd: BorrowedFd<'_>, flags: u32, data: T) -> io::Result<T> {
    let mut feature = Feature {
        argsz: size_of::<Feature<T>>() as u32,
        flags,
        data,
    };
    // SAFETY: the kernel reads and writes at most `argsz` bytes, which is the size of `feature`,
    // and whatever it writes there is a `T`.
    match unsafe { ioctl_with_mut_ref(&fd, DEVICE_FEATURE(), &mut feature) } {
        0.. => Ok(feature.data),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The file of a device, which `vfio-ioctls` shows as a number only.
pub(crate) fn device_fd(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: `device` owns the file, and the lifetime keeps it open.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Sets the migration state and hands over the data_fd when there is a new one.
///
/// `VfioDevice::set_migration_state` keeps it to itself.
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
        // SAFETY: the kernel has just installed this file for us, and nobody else knows of it.
        unsafe { File::from_raw_fd(answer.data_fd) }
    }))
}

/// Opts in to `VFIO_PRECOPY_INFO_REINIT`; `ENOTTY` when the device has no such flag.
pub(crate) fn set_precopy_info_v2(device: BorrowedFd<'_>) -> io::Result<()> {
    feature(
        device,
        sys::VFIO_DEVICE_FEATURE_SET | sys::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
        (),
    )
}

/// Resets the device; `VfioDevice::reset` does not say whether that worked.
pub(crate) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument.
    match unsafe { ioctl(&device, DEVICE_RESET()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What is left to stream in pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrecopyInfo {
    /// Bytes that belong to the state as it was when pre-copy began.
    pub(crate) initial: u64,
    /// Bytes that changed since they were streamed.
    pub(crate) dirty: u64,
    /// There is new initial data; only after [`set_precopy_info_v2`].
    pub(crate) reinit: bool,
}

impl PrecopyInfo {
    /// All bytes that are left.
    pub(crate) fn left(&self) -> u64 {
        self.initial.saturating_add(self.dirty)
    }
}

/// `VFIO_MIG_GET_PRECOPY_INFO` with its flags, on a data_fd.
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

/// What `VFIO_DEVICE_GET_REGION_INFO` tells of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    /// Its number.
    pub(crate) index: u32,
    /// How many bytes it has.
    pub(crate) size: u64,
    /// Where it begins in the device's file.
    pub(crate) offset: u64,
    /// It can be read.
    pub(crate) readable: bool,
    /// It can be written.
    pub(crate) writable: bool,
}

/// The regions of the device that have bytes, by their true numbers.
///
/// In `vfio-ioctls`, a region that the kernel refuses to describe moves all later ones.
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
        // A device without this region says EINVAL.
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
