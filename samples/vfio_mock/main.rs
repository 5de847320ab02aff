// SPDX-License-Identifier: GPL-2.0

//! A migratable VFIO device without hardware.
//!
//! For who writes a driver of a migratable device, to read and to copy, and for who writes a
//! virtual machine monitor, to migrate at will. The device looks like a PCI endpoint: BAR0 has
//! registers, BAR2 is its state memory. Create one, of 1 MiB, with:
//!
//! ```sh
//! echo $(uuidgen) > /sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-1M/create
//! ```
//!
//! What is where:
//!
//! * `device`: the driver: types, BARs, and what the migration engine asks for.
//! * `chip`: the device behind its bus.
//! * `registers`, `config_space`: what the bus sees of it.
//! * `dma`: the DMA engine; [`queue`]: its descriptors; pure, without the kernel.
//! * `save`, `load`: the device's state as a stream, and back; `delay`: how slow that may be.
//! * [`stream`]: the format of the stream; pure, without the kernel.

use kernel::{
    prelude::*,
    InPlaceModule, //
};
use vfio::{
    mdev,
    migration::Flags, //
};

mod chip;
mod config_space;
mod delay;
mod device;
mod dma;
mod load;
pub mod queue;
mod registers;
mod save;
pub mod stream;

use device::Mock;

module! {
    type: MockModule,
    name: "vfio_mock",
    authors: ["The vfio_mock authors"],
    description: "A migratable VFIO device without hardware",
    license: "GPL",
    params: {
        migration_flags: u64 {
            default: 7,
            description: "What the devices support: 1 (STOP_COPY) + 2 (P2P) + 4 (PRE_COPY)",
        },
    },
}

/// Returns the migration states that the devices support, as the module's parameter says.
fn migration_flags() -> Option<Flags> {
    Flags::from_raw(module_parameters::migration_flags.value())
}

#[pin_data]
struct MockModule {
    #[pin]
    _registration: mdev::Registration<Mock>,
}

impl InPlaceModule for MockModule {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            if migration_flags().is_none() {
                pr_err!("migration_flags must be 1, 3, 5 or 7\n");
                return Err(EINVAL);
            }
            Ok(try_pin_init!(Self {
                _registration <- mdev::Registration::new(),
            }? Error))
        })
    }
}
