// SPDX-License-Identifier: GPL-2.0

//! Software PCI functions behind a software IOMMU.
//!
//! Each driver of [emulated] devices has its own host bridge. On its bus, an administrator plugs
//! and unplugs functions at run time. A function has an address (a BDF) and its own IOMMU group, so
//! that programs that accept only PCI devices can use it. It does DMA through an IOMMU that tracks
//! dirty pages, and is opened like a device that is bound to `vfio-pci`: by its group in a
//! container, or by its character device in an iommufd.
//!
//! # Creating functions
//!
//! Functions are created in configfs, like the devices of `gpio-sim` and `null_blk`: a function
//! needs settings before it exists, and a script needs its address afterwards.
//!
//! ```sh
//! mkdir /sys/kernel/config/vfio_mock/first
//! echo 1M >/sys/kernel/config/vfio_mock/first/type
//! echo 1 >/sys/kernel/config/vfio_mock/first/power
//! cat /sys/kernel/config/vfio_mock/first/address
//! ```
//!
//! | file | content |
//! |---|---|
//! | `type` | the name of its type, one of [`Driver::TYPES`](emulated::Driver::TYPES) |
//! | `dma_log` | whether it has the feature `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`, by default 1 |
//! | `defaults` | its first [settings](emulated::Attribute): `NAME=VALUE`, separated by commas |
//! | `bind` | whether it is bound to its driver when it is plugged, by default 1 |
//! | `power` | 1 while it is plugged |
//! | `address` | its address while it is plugged; otherwise reading fails with `ENODEV` |
//!
//! The settings cannot be changed while the function is plugged. Writing 0 to `power`, or removing
//! the directory, asks the user to release the function and waits for that. While a removal waits,
//! no directory of the driver can be created or removed. Each directory keeps the module of the
//! driver loaded.
//!
//! # Drivers
//!
//! `driver_override` of a function selects the driver. The function can be bound and unbound in
//! sysfs. libvirt and driverctl find the driver by its alias, which begins with `vfio_pci:`.
//! The [settings](emulated::Attribute) of the device are in the directory of the function in sysfs
//! while the driver is bound.
//!
//! Nothing answers at the addresses in BARs, and the interrupts of a function are eventfds only. No
//! other driver can use it.
//!
//! # Supported systems
//!
//! x86 with an IOMMU driver, MSI and configfs in the kernel. On other systems, [`Registration`]
//! does nothing.

/// Declares the items of systems that support functions, and of those that do not.
macro_rules! supported {
    ($condition:meta { $($item:item)* } else { $($other:item)* }) => {
        $(#[cfg($condition)] $item)*
        $(#[cfg(not($condition))] $other)*
    };
}

supported! {
    all(CONFIG_X86_64, CONFIG_PCI_MSI, CONFIG_IOMMU_API, CONFIG_CONFIGFS_FS) {
        mod bridge;
        mod configfs;
        mod driver;
        mod host;
        mod iommu;
        // Public for tests, which build the file as a crate of its own.
        #[allow(unreachable_pub)]
        mod table;

        pub use self::driver::Registration;
    } else {
        mod absent;

        pub use self::absent::Registration;
    }
}

use crate::{
    emulated,
    pci, //
};

/// A driver of functions; see [`emulated::Driver`].
/// [`module_emulated_driver!`](crate::module_emulated_driver) implements it.
pub trait Driver: emulated::Driver {
    /// The identities of the functions, for the aliases of the module. See
    /// [`vfio_pci_device_table!`](crate::vfio_pci_device_table).
    const ID_TABLE: pci::IdTable;
}

/// Declares a kernel module with a driver of emulated devices, which can be created as mediated
/// devices and as PCI functions.
///
/// Loading the module fails like [`mdev::Registration::new()`](crate::mdev::Registration::new) and
/// [`soft_pci::Registration::new()`](crate::soft_pci::Registration::new).
///
/// # Examples
///
/// The driver is a type that implements [`emulated::Driver`](crate::emulated::Driver). `id` is the
/// identity of the functions. All other fields are passed to the kernel's `module!`.
///
/// ```
/// # type MyDriver = Note;
/// const ID: config_space::Id = config_space::Id {
///     vendor: 0x1af4,
///     device: 0x10f2,
///     class: 0xff_0000,
/// };
///
/// vfio::module_emulated_driver! {
///     type: MyDriver,
///     id: ID,
///     name: "my_driver",
///     authors: ["Author name"],
///     description: "What it is",
///     license: "GPL",
/// }
/// ```
#[macro_export]
macro_rules! module_emulated_driver {
    (type: $driver:ty, id: $id:expr, $($info:tt)*) => {
        $crate::vfio_pci_device_table!(
            FUNCTIONS,
            [$crate::pci::DeviceId::from_id($id.vendor, $id.device)]
        );

        impl $crate::soft_pci::Driver for $driver {
            const ID_TABLE: $crate::pci::IdTable = &FUNCTIONS;
        }

        #[::kernel::prelude::pin_data]
        struct DriverModule {
            #[pin]
            _mediated: $crate::mdev::Registration<$driver>,
            #[pin]
            _functions: $crate::soft_pci::Registration<$driver>,
        }

        impl ::kernel::InPlaceModule for DriverModule {
            fn init(
                _module: &'static ::kernel::ThisModule,
            ) -> impl ::pin_init::PinInit<Self, ::kernel::error::Error> {
                ::kernel::try_pin_init!(Self {
                    _mediated <- $crate::mdev::Registration::new(),
                    _functions <- $crate::soft_pci::Registration::new(),
                })
            }
        }

        ::kernel::prelude::module! {
            type: DriverModule,
            $($info)*
        }
    };
}
