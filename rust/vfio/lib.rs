// SPDX-License-Identifier: GPL-2.0

//! Abstractions for VFIO drivers, in particular for live migration.
//!
//! A driver describes its device, and implements how the device stops, saves and loads.
//! The crate implements the common part of all drivers: the states of the migration uAPI and the
//! paths between them, the transfer sessions and their data_fd, reset and close at any time,
//! regions, interrupts, and the configuration space. A driver needs no `unsafe`, and many errors do
//! not compile.
//!
//! # Getting started
//!
//! A driver has four types, each with a shorter lifetime than the previous one:
//!
//! | type | lifetime | implements |
//! |---|---|---|
//! | the device | from its creation to its removal | [`mdev::Driver`], [`emulated::Operations`] |
//! | its open data | from the first open to the last close | [`Migratable`] |
//! | its saver | while its state is read | [`Saver`], or uses [`ImageSaver`] |
//! | its loader | while a state is written | [`Loader`], or uses [`ImageLoader`] |
//!
//! 1. Read the [example](#examples) below, which is a complete driver.
//! 2. Read [`Migratable`], the operations of a migratable device. The page of the module
//!    [`migration`] lists the methods that each state change calls.
//! 3. Copy `samples/vfio_minimal`, a driver in one file. Its device continues to run while it is
//!    saved, and it uses [`StateMemory`](memory::StateMemory) to track changes.
//!    `samples/vfio_mock` also has interrupts, DMA, mmap(), a checksum of the stream and a slow
//!    saver. `samples/vfio_fw` is for a device whose state comes from firmware.
//! 4. Build it in a folder of its own, which `tools/new-driver` creates, and run the conformance
//!    suite in `tools/testing/selftests/vfio_migration` on it. It tests any migratable VFIO device.
//!
//! A driver of a real PCI device uses the module [`pci`] instead of the first row, and
//! `vfio_pci_core` serves everything but the migration. `samples/vfio_membar` is such a driver.
//!
//! [`Migratable`]: migration::Migratable
//! [`Saver`]: migration::Saver
//! [`Loader`]: migration::Loader
//! [`ImageSaver`]: migration::ImageSaver
//! [`ImageLoader`]: migration::ImageLoader
//!
//! # Modules
//!
//! * [`Device`]: the `struct vfio_device` of any VFIO driver, and the contexts in which its methods
//!   can be called.
//! * [`migration`]: the migration engine. A driver implements how it stops, saves and loads. The
//!   engine owns the states, the transfer sessions and the data_fd. It does not depend on
//!   [`emulated`] or [`mdev`].
//! * [`emulated`]: software devices with their regions, interrupts and PCI configuration space.
//! * [`mdev`]: the mediated device bus, on which the administrator creates emulated devices.
//! * [`soft_pci`]: emulated devices that are PCI functions, with an address and an IOMMU.
//! * [`memory`]: device memory for concurrent accesses, also by mmap(), and the tracking of
//!   changes.
//! * [`pci`]: variant drivers of real PCI devices.
//! * [`region`]: positions in the regions of a device.
//! * [`dma`]: access to the user's memory, and the log of the written pages.
//! * [`module_param`]: parameters of modules that are texts.
//! * [`prelude`]: items that nearly every driver uses.
//!
//! There are no circular imports: drivers use [`mdev`] or [`soft_pci`], which use [`emulated`],
//! which uses [`dma`], [`memory`] and [`migration`], which use [`Device`]. [`pci`] is on the level
//! of [`emulated`].
//!
//! # Examples
//!
//! A driver of a device that stores 16 bytes. It is migrated while it is stopped, with
//! `VFIO_MIGRATION_STOP_COPY` only.
//!
//! ```
//! use kernel::{
//!     new_mutex,
//!     prelude::*,
//!     sync::{
//!         Arc,
//!         Mutex, //
//!     },
//! };
//! use vfio::prelude::*;
//!
//! vfio::module_mdev_driver! {
//!     type: Note,
//!     name: "note",
//!     authors: ["Author name"],
//!     description: "A device that keeps 16 bytes",
//!     license: "GPL",
//! }
//!
//! const SIZE: usize = 16;
//!
//! /// Size of the stream: the configuration space and the bytes.
//! const STREAM: usize = config_space::SIZE + SIZE;
//!
//! /// The device, from its creation to its removal.
//! struct Note;
//!
//! impl mdev::Driver for Note {
//!     const TYPES: &'static [mdev::Type] = &[mdev::Type {
//!         name: c"16",
//!         pretty_name: c"Note",
//!         description: c"A device that keeps 16 bytes",
//!     }];
//!     const MAX_INSTANCES: u32 = 8;
//!
//!     fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
//!         Ok(Note)
//!     }
//! }
//!
//! #[vtable]
//! impl emulated::Operations for Note {
//!     type OpenData = Chip;
//!     const NAME: &'static CStr = c"note";
//!
//!     fn config_space(&self) -> Result<ConfigSpace> {
//!         let id = config_space::Id {
//!             vendor: 0x1af4,
//!             device: 0x10f2,
//!             class: 0xff_0000,
//!         };
//!         ConfigSpace::new(id).memory_bar(region::BAR0 as usize, SIZE as u64, false)
//!     }
//!
//!     fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
//!         try_pin_init!(Chip {
//!             function,
//!             registers <- new_mutex!(Registers::default(), "Chip::registers"),
//!         }? Error)
//!     }
//!
//!     fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
//!         pos.read(&chip.registers.lock().bytes, to)
//!     }
//!
//!     fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
//!         pos.write(&mut chip.registers.lock().bytes, from)
//!     }
//! }
//!
//! /// Registers of the device, zeroes at power on.
//! #[derive(Default)]
//! struct Registers {
//!     bytes: [u8; SIZE],
//! }
//!
//! /// The device, from the first open to the last close.
//! #[pin_data]
//! struct Chip {
//!     function: Arc<Function>,
//!     #[pin]
//!     registers: Mutex<Registers>,
//! }
//!
//! #[vtable]
//! impl Migratable for Chip {
//!     type Saver = ImageSaver;
//!     type Loader = ImageLoader;
//!     const FLAGS: Flags = Flags::STOP_COPY;
//!
//!     // Nothing but a write changes the device, and the crate drops writes to a stopped device.
//!     fn stop(&self) -> Result {
//!         Ok(())
//!     }
//!
//!     fn start(&self) -> Result {
//!         Ok(())
//!     }
//!
//!     fn save(this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageSaver> {
//!         let config = this.function.save_config();
//!         ImageSaver::new(&[&config, &this.registers.lock().bytes])
//!     }
//!
//!     fn load(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageLoader> {
//!         ImageLoader::new(STREAM)
//!     }
//!
//!     fn loaded(&self, loader: &mut ImageLoader) -> Result {
//!         let (config, bytes) = loader.image()?.split_first_chunk().ok_or(EINVAL)?;
//!         let bytes = bytes.try_into().map_err(|_| EINVAL)?;
//!         if !self.function.accepts_config(config) {
//!             return Err(EINVAL);
//!         }
//!         self.registers.lock().bytes = bytes;
//!         Ok(())
//!     }
//!
//!     fn data_size(&self) -> Result<u64> {
//!         Ok(STREAM as u64)
//!     }
//!
//!     fn reset(&self) -> Result {
//!         *self.registers.lock() = Registers::default();
//!         Ok(())
//!     }
//! }
//! ```
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h),
//! [`include/linux/mdev.h`](srctree/include/linux/mdev.h)

/// Prefix of log messages that belong to no device.
const __LOG_PREFIX: &[u8] = b"vfio\0";

#[path = "../bindings/mod.rs"]
mod bindings;
#[path = "../compat.rs"]
mod compat;

mod debugfs;
mod device;
mod notifier;
mod user;
mod wait;

pub mod dma;
pub mod emulated;
pub mod mdev;
pub mod memory;
pub mod migration;
pub mod module_param;
#[cfg(CONFIG_PCI)]
pub mod pci;
pub mod prelude;
pub mod region;
#[cfg(CONFIG_PCI)]
pub mod soft_pci;

// With 32 bits, the offset of a region does not fit into a `vm_pgoff`, and a size does not fit into
// an `unsigned long`.
const _: () = assert!(cfg!(CONFIG_64BIT), "VFIO drivers in Rust need CONFIG_64BIT");

pub use self::{
    device::{
        Device,
        DeviceContext,
        Normal,
        Open, //
    },
    user::cond_resched_killable,
    wait::WaitQueue, //
};
