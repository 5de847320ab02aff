// SPDX-License-Identifier: GPL-2.0

//! Abstractions for VFIO drivers, above all live migration.
//!
//! What is where:
//!
//! * [`Device`]: the `struct vfio_device` of any VFIO driver, and what may be done with it when.
//! * [`migration`]: the migration engine. A driver says how it stops, saves and loads; the engine
//!   owns the states, the transfer sessions and the data_fd. It asks for nothing but a [`Device`].
//! * [`emulated`]: devices without an IOMMU of their own, made of software.
//! * [`mdev`]: the mediated device bus, on which emulated devices are created by the administrator.
//! * [`config_space`], [`endpoint`]: what such a device is on its PCI bus.
//! * [`region`]: what a user reads and writes of a device.
//! * [`memory`]: device memory that many access at the same time, and the tracking of changes.
//!
//! A driver implements [`emulated::Operations`] for its registration data,
//! [`migration::Migratable`] for its open data, and [`mdev::Driver`] to be created through sysfs.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h),
//! [`include/linux/mdev.h`](srctree/include/linux/mdev.h)

#[path = "../bindings/mod.rs"]
mod bindings;
#[path = "../compat.rs"]
mod compat;

mod device;
mod irq;
mod user;

mod dma;

pub mod config_space;
pub mod emulated;
pub mod endpoint;
pub mod mdev;
pub mod memory;
pub mod migration;
pub mod prelude;
pub mod region;

pub use self::device::{
    Device,
    DeviceContext,
    Normal,
    Open, //
};
