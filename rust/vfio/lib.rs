// SPDX-License-Identifier: GPL-2.0

//! Abstractions for VFIO drivers, above all live migration.
//!
//! A driver says what its device is, and how the device stops, saves and loads. The crate does what
//! all drivers have in common, and does it once: the states of the migration uAPI and the paths
//! between them, the transfer sessions and their data_fd, reset and close at any time, regions,
//! interrupts, and the configuration space. A driver needs no `unsafe`, and much of what it could
//! do wrong does not compile.
//!
//! # Where to begin
//!
//! A driver has four types, each of which lives shorter than the one before:
//!
//! | type | lives | implements |
//! |---|---|---|
//! | the device | from its creation to its removal | [`mdev::Driver`], [`emulated::Operations`] |
//! | its open data | from the first open to the last close | [`Migratable`] |
//! | its saver | while its state is read | [`Saver`], or [`ImageSaver`] is enough |
//! | its loader | while a state is written | [`Loader`], or [`ImageLoader`] is enough |
//!
//! 1. Read the [example](#examples) below, which is a complete driver.
//! 2. Read [`Migratable`]: what the device must be able to do, and when. The page of the module
//!    [`migration`] tells which state change asks for what.
//! 3. Copy `samples/vfio_minimal`, one file, in which the device goes on while it is saved: it uses
//!    [`StateMemory`](memory::StateMemory) to know what has changed. `samples/vfio_mock` is what
//!    has grown from there: interrupts, DMA, mmap(), a checksum of the stream, a slow saver.
//! 4. Build it as the samples are built, in `Kbuild`, and run the conformance suite in
//!    `tools/testing/selftests/vfio_migration` on it. It tests any migratable VFIO device.
//!
//! A driver of a real PCI device, which has the core's `vfio_pci` for everything else, takes only
//! the [`Engine`](migration::Engine) and calls it from its `struct vfio_migration_ops`.
//!
//! [`Migratable`]: migration::Migratable
//! [`Saver`]: migration::Saver
//! [`Loader`]: migration::Loader
//! [`ImageSaver`]: migration::ImageSaver
//! [`ImageLoader`]: migration::ImageLoader
//!
//! # What is where
//!
//! * [`Device`]: the `struct vfio_device` of any VFIO driver, and what may be done with it when.
//! * [`migration`]: the migration engine. A driver says how it stops, saves and loads; the engine
//!   owns the states, the transfer sessions and the data_fd. It asks for nothing but a [`Device`].
//! * [`emulated`]: devices without an IOMMU of their own, made of software.
//! * [`mdev`]: the mediated device bus, on which emulated devices are created by the administrator.
//! * [`config_space`], [`endpoint`]: what such a device is on its PCI bus.
//! * [`region`]: what a user reads and writes of a device.
//! * [`memory`]: device memory that many access at the same time, by mmap() too, and the tracking
//!   of changes.
//! * [`dma`]: the way to the user's memory, and the log of what was written there.
//!
//! * [`prelude`]: what nearly every driver uses.
//!
//! # Examples
//!
//! A driver of a device that keeps 16 bytes. It is migrated while it is stopped: with
//! `VFIO_MIGRATION_STOP_COPY` and nothing more.
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
//! /// What the stream has: the configuration space, and the bytes.
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
//!     fn open(&self, endpoint: Arc<Endpoint>) -> impl PinInit<Chip, Error> {
//!         try_pin_init!(Chip {
//!             endpoint,
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
//!     endpoint: Arc<Endpoint>,
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
//!         let config = this.endpoint.save_config();
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
//!         if !self.endpoint.accepts_config(config) {
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

/// What messages of the crate begin with that are about no device.
const __LOG_PREFIX: &[u8] = b"vfio\0";

#[path = "../bindings/mod.rs"]
mod bindings;
#[path = "../compat.rs"]
mod compat;

mod device;
mod gate;
mod irq;
mod user;
mod worker;

pub mod config_space;
pub mod dma;
pub mod emulated;
pub mod endpoint;
pub mod mdev;
pub mod memory;
pub mod migration;
pub mod prelude;
pub mod region;

// The offset of a region does not fit into a `vm_pgoff` of 32 bits, nor a size into an
// `unsigned long`.
const _: () = assert!(cfg!(CONFIG_64BIT), "VFIO drivers in Rust need CONFIG_64BIT");

pub use self::{
    device::{
        Device,
        DeviceContext,
        Normal,
        Open, //
    },
    user::cond_resched_killable, //
};
