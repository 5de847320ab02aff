// SPDX-License-Identifier: GPL-2.0

//! Devices attached with `vfio-ioctls`: with a group and a container, or with a character device
//! and an iommufd.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use iommufd_ioctls::IommuFd;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};
use rustix::io::{pread, pwrite, Errno};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioIommufd, VfioOps};

use crate::error::Error;
use crate::migrate;
use crate::record::{DeviceRecord, State};
use crate::region::{name, Bytes};
use crate::uapi::{self, PrecopyInfo, RegionInfo};

/// Way to attach a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// Use iommufd if the device and the kernel support it, group otherwise.
    Auto,
    /// Use the group of the device and a container.
    Group,
    /// Use the character device and an iommufd.
    Iommufd,
}

/// Finds the folder of a device in sysfs by its path, UUID or PCI address.
pub(crate) fn find(device: &str) -> Result<PathBuf, Error> {
    let candidates = if device.contains('/') {
        vec![PathBuf::from(device)]
    } else {
        ["mdev", "pci"]
            .map(|bus| Path::new("/sys/bus").join(bus).join("devices").join(device))
            .to_vec()
    };
    let found = candidates.iter().find_map(|path| path.canonicalize().ok());
    match found {
        Some(path) if path.join("vfio-dev").is_dir() => Ok(path),
        Some(path) => Err(Error::Attach(format!(
            "{}: not bound to a VFIO driver",
            path.display()
        ))),
        None => {
            let paths: Vec<_> = candidates.iter().map(|p| p.display().to_string()).collect();
            Err(Error::Attach(format!("no device {}", paths.join(" or "))))
        }
    }
}

/// Returns the verdict of the driver on the last client of a device, if it has one and this user
/// may read it.
pub(crate) fn verdict(path: &Path) -> Option<String> {
    let folder = Path::new("/sys/kernel/debug/vfio").join(path.file_name()?);
    let text = std::fs::read_to_string(folder.join("verdict")).ok()?;
    Some(text.trim_end().to_owned())
}

/// Device opened by this process.
pub(crate) struct Device {
    path: PathBuf,
    backend: &'static str,
    flags: u64,
    regions: Vec<RegionInfo>,
    device: VfioDevice,
}

impl Device {
    /// Attaches the device with the sysfs folder `path`.
    pub(crate) fn open(path: &Path, backend: Backend) -> Result<Self, Error> {
        let fail =
            |what: &dyn std::fmt::Display| Error::Attach(format!("{}: {what}", path.display()));
        let iommufd = match backend {
            Backend::Auto => Path::new("/dev/iommu").exists() && has_cdev(path),
            Backend::Group => false,
            Backend::Iommufd => true,
        };
        let ops: Arc<dyn VfioOps> = if iommufd {
            let iommufd = IommuFd::new()
                .map_err(|error| fail(&format_args!("cannot open /dev/iommu: {error}")))?;
            let ops = VfioIommufd::new(Arc::new(iommufd), None, None);
            Arc::new(ops.map_err(|error| fail(&error))?)
        } else {
            if !path.join("iommu_group").exists() {
                return Err(fail(&"not in an IOMMU group"));
            }
            Arc::new(VfioContainer::new(None).map_err(|error| fail(&error))?)
        };
        let device = VfioDevice::new(path, ops, true).map_err(|error| match error {
            // The kernel has no errno of its own for this case.
            VfioError::VfioDeviceBindIommufd(error)
                if error.errno() == Errno::INVAL.raw_os_error() =>
            {
                fail(&"cannot be bound to an iommufd: the device is already open")
            }
            error => fail(&error),
        })?;
        let flags = device
            .query_migration_support()
            .map_err(|error| fail(&error))?
            .ok_or_else(|| fail(&"does not support migration"))?;
        let fd = uapi::device_fd(&device);
        let regions = uapi::regions(fd)
            .map_err(|error| fail(&format_args!("cannot get its regions: {error}")))?;
        // Like QEMU, fail on any other errno.
        if flags & uapi::MIGRATION_PRE_COPY != 0 {
            match uapi::set_precopy_info_v2(fd) {
                Err(error) if Errno::from_io_error(&error) != Some(Errno::NOTTY) => {
                    return Err(fail(&format_args!(
                        "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 failed: {error}"
                    )));
                }
                _ => {}
            }
        }
        Ok(Self {
            path: path.into(),
            backend: if iommufd { "iommufd" } else { "group" },
            flags,
            regions,
            device,
        })
    }

    /// Returns its description for the record.
    pub(crate) fn record(&self) -> DeviceRecord {
        let names = [
            (uapi::MIGRATION_STOP_COPY, "STOP_COPY"),
            (uapi::MIGRATION_P2P, "P2P"),
            (uapi::MIGRATION_PRE_COPY, "PRE_COPY"),
        ];
        let has = names.iter().filter(|(flag, _)| self.flags & flag != 0);
        DeviceRecord {
            path: self.path.display().to_string(),
            backend: self.backend,
            flags: has.map(|(_, name)| *name).collect(),
            verdict: None,
        }
    }

    /// Returns its regions with a size above 0.
    pub(crate) fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// Returns the region with this index.
    pub(crate) fn region(&self, index: u32) -> Option<Region<'_>> {
        let info = *self.regions.iter().find(|region| region.index == index)?;
        Some(Region { device: self, info })
    }

    /// Like [`Self::region`], but fails if the region cannot be written.
    pub(crate) fn writable_region(&self, index: u32) -> Result<Region<'_>, Error> {
        match self.region(index) {
            Some(region) if region.info.writable => Ok(region),
            Some(_) => Err(Error::Usage(format!("{} cannot be written", name(index)))),
            None => Err(Error::Usage(format!(
                "the source has no {}, only {}",
                name(index),
                self.regions
                    .iter()
                    .map(|region| name(region.index))
                    .collect::<Vec<_>>()
                    .join(", ")
            ))),
        }
    }
}

fn has_cdev(path: &Path) -> bool {
    let cdev = |entry: io::Result<std::fs::DirEntry>| {
        Some(Path::new("/dev/vfio/devices").join(entry.ok()?.file_name()))
    };
    path.join("vfio-dev")
        .read_dir()
        .is_ok_and(|mut entries| entries.any(|entry| cdev(entry).is_some_and(|f| f.exists())))
}

/// Region of a device.
pub(crate) struct Region<'a> {
    device: &'a Device,
    /// Index, size and access.
    pub(crate) info: RegionInfo,
}

impl Bytes for Region<'_> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = self.info.offset + offset + done as u64;
            match pread(
                uapi::device_fd(&self.device.device),
                &mut buffer[done..],
                at,
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => done += bytes,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = self.info.offset + offset + done as u64;
            match pwrite(uapi::device_fd(&self.device.device), &data[done..], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => done += bytes,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl migrate::Device for Device {
    fn flags(&self) -> u64 {
        self.flags
    }

    fn state(&self) -> io::Result<State> {
        let number = self
            .device
            .get_migration_state()
            .map_err(io::Error::other)?;
        State::from_uapi(number).ok_or_else(|| io::Error::other(format!("unknown state {number}")))
    }

    fn set_state(&self, state: State) -> io::Result<Option<Box<dyn migrate::Stream>>> {
        let fd = uapi::device_fd(&self.device);
        let Some(stream) = uapi::set_state(fd, state as u32)? else {
            return Ok(None);
        };
        if state != State::Resuming {
            // The user must be able to cancel while a device is slow.
            fcntl_setfl(&stream, fcntl_getfl(&stream)? | OFlags::NONBLOCK)?;
        }
        Ok(Some(Box::new(Stream(stream))))
    }

    fn data_size(&self) -> Option<u64> {
        self.device.get_mig_data_size().ok()
    }

    fn reset(&self) -> io::Result<()> {
        uapi::reset(uapi::device_fd(&self.device))
    }
}

/// data_fd of a device.
struct Stream(File);

impl migrate::Stream for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn write(&mut self, data: &[u8]) -> (usize, io::Result<()>) {
        let mut done = 0;
        while done < data.len() {
            match self.0.write(&data[done..]) {
                Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    }

    fn info(&self) -> io::Result<PrecopyInfo> {
        uapi::precopy_info(&self.0)
    }

    fn wait(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
