// SPDX-License-Identifier: GPL-2.0

//! A migratable VFIO device without hardware.
//!
//! An example for driver authors, and a test device for VMM developers. The device is a PCI
//! function: BAR0 has registers, BAR2 is the state memory. Create one with 1 MiB, as a mediated
//! device:
//!
//! ```sh
//! echo $(uuidgen) > /sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-1M/create
//! ```
//!
//! Or with an address on a PCI bus and an IOMMU:
//!
//! ```sh
//! mkdir /sys/kernel/config/vfio_mock/first
//! echo 1M > /sys/kernel/config/vfio_mock/first/type
//! echo 1 > /sys/kernel/config/vfio_mock/first/power
//! ```
//!
//! Modules:
//!
//! * `device`: the driver: device types, configuration space and BARs.
//! * [`migration`]: saving and loading of the device state.
//! * `chip`: the device: its registers, commands and state memory.
//! * `registers`: layout of the registers.
//! * [`knobs`]: settings of the host, with which it misbehaves.
//! * `dma`: the DMA engine; [`queue`]: its descriptors, without the kernel.
//!
//! Three paths through them:
//!
//! * A byte that the guest writes to BAR2 reaches the target by `device`, `chip` and the crate's
//!   `memory`, which marks the page; `migration::save` and the crate's data_fd; then
//!   `migration::load`, [`migration::stream`] and `chip` of the target.
//! * An interrupt: the worker calls `device`, `chip` and `dma`, which takes the vectors of ended
//!   descriptors from [`queue`] and signals them.
//! * A state change: the crate stops or starts work and accesses, and calls `migration`, which
//!   saves and loads `chip`.

use kernel::{
    prelude::*,
    InPlaceModule, //
};
use vfio::{
    mdev,
    migration::Flags,
    soft_pci, //
};

mod chip;
mod device;
mod dma;
pub mod knobs;
pub mod migration;
pub mod queue;
mod registers;

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
            description: "Supported migration features: 1 (STOP_COPY) + 2 (P2P) + 4 (PRE_COPY)",
        },
        max_instances: u32 {
            default: 64,
            description: "Maximum number of devices, up to 64, and of PCI functions, up to 32",
        },
    },
}

vfio::module_text_param!(
    vfio_mock,
    defaults,
    "Knobs of new devices: NAME=VALUE, separated by commas"
);

/// Returns the migration features in the module parameter, or [`None`] if they are invalid.
fn migration_flags() -> Option<Flags> {
    Flags::from_raw(module_parameters::migration_flags.value())
}

/// Returns the maximum number of devices on each bus.
fn max_instances() -> u32 {
    module_parameters::max_instances.value()
}

#[pin_data]
struct MockModule {
    #[pin]
    _mediated: mdev::Registration<Mock>,
    #[pin]
    _functions: soft_pci::Registration<Mock>,
}

impl InPlaceModule for MockModule {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            if migration_flags().is_none() {
                pr_err!("migration_flags must be 1, 3, 5 or 7\n");
                return Err(EINVAL);
            }
            Ok(try_pin_init!(Self {
                _mediated <- mdev::Registration::new(),
                _functions <- soft_pci::Registration::new(),
            }? Error))
        })
    }
}
