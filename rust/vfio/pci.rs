// SPDX-License-Identifier: GPL-2.0

//! Variant drivers of PCI devices.
//!
//! A variant driver is bound to a real PCI device instead of `vfio-pci`, and adds live migration.
//! It gets everything else from `vfio_pci_core`: interrupts, the configuration space, resets, power
//! management, the group and the iommufd. The user assigns such a device to a driver by
//! `driver_override`; libvirt and driverctl find the driver by its module aliases, which begin with
//! `vfio_pci:`.
//!
//! # Resets
//!
//! The core calls `reset_prepare` and `reset_done` of a PCI driver with locks held that accesses to
//! the device need: its `memory_lock`, and the locks of all devices on the bus. A state change, a
//! saver or a loader may wait for `memory_lock` at the same time, while it holds a lock of the
//! engine. So these callbacks must not take the same lock of the engine, and must not access the
//! device.
//!
//! The crate implements both callbacks for all drivers. They take no mutex and call no method of
//! the driver. `reset_prepare` records the reset, makes all accesses of the driver and all calls on
//! the data_fd fail with `ENODEV`, and zaps the mappings. The reset is completed after
//! `reset_done`, by the next call of the user: read(), write() and most ioctls of the device file,
//! and page faults of tracked BARs. `VFIO_DEVICE_RESET`, `VFIO_DEVICE_PCI_HOT_RESET` and a write to
//! the configuration space that starts an FLR complete their own reset before they return. To
//! complete a reset is to end the session and to call [`Migratable::reset`], without locks of the
//! core, before anything else. A call during the reset waits for its end.
//!
//! The user is not told of another reset. If it has discarded the state of a stopped device, the
//! next state change fails with `ECANCELED`, so that no cleared device runs unnoticed. A hot reset
//! by the file of another device counts, too: the crate cannot tell it from a reset by the host.
//!
//! A reset by the host does not take `memory_lock`, so it may begin while the driver accesses the
//! device. Such an access fails, too.
//!
//! # Errors
//!
//! `error_detected` and `slot_reset` are called with locks of the PCI core held, too. They record
//! the failure, and the next call of the user completes it: the session ends, and the state is
//! `ERROR` until a reset. A reset of the bus that recovers from an error comes without
//! `reset_prepare`. The crate notices it by the command register and the BARs, which it clears, and
//! restores them before the driver resets the device.
//!
//! The order of the locks is: that of the reset to complete, those of the engine, those of
//! [`Function`], `memory_lock`.
//!
//! C header: [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

mod device;
mod driver;
mod function;
mod mapping;
mod memory;
mod resets;
mod vtable;

pub use self::{
    driver::Registration,
    function::Function,
    memory::{
        BarMemory,
        BarRun,
        BarTracking, //
    },
};

use crate::{
    bindings,
    migration::{
        Flags,
        Migratable, //
    },
    region::Position,
};
use kernel::{
    device::Bound,
    device_id::RawDeviceId,
    pci,
    prelude::*,
    sync::Arc, //
};

/// The identity of devices that a driver can be bound to.
///
/// Like with the C macro `PCI_DRIVER_OVERRIDE_DEVICE_VFIO`, it applies only to devices with a
/// `driver_override`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings::pci_device_id);

impl DeviceId {
    /// Creates the identity of devices with a vendor and a device id, and any subsystem.
    pub const fn from_id(vendor: u16, device: u16) -> Self {
        Self(bindings::pci_device_id {
            vendor: vendor as u32,
            device: device as u32,
            subvendor: !0,
            subdevice: !0,
            class: 0,
            class_mask: 0,
            driver_data: 0,
            override_only: bindings::PCI_ID_F_VFIO_DRIVER_OVERRIDE,
        })
    }

    /// Restricts the identity to devices of a class, for example `0x03_8000`.
    pub const fn with_class(mut self, class: u32) -> Self {
        self.0.class = class;
        self.0.class_mask = 0xff_ffff;
        self
    }

    /// Returns the vendor id, in the lower half, and the device id.
    pub const fn as_raw(&self) -> u32 {
        self.0.device << 16 | self.0.vendor
    }

    /// Returns whether this is the identity of a device. The administrator can bind a driver to any
    /// device.
    pub fn matches(&self, device: &pci::Device<Bound>) -> bool {
        let id = Self::from_id(device.vendor_id().as_raw(), device.device_id());
        let other_class = (device.pci_class().as_raw() ^ self.0.class) & self.0.class_mask;
        self.as_raw() == id.as_raw() && other_class == 0
    }
}

// SAFETY: `DeviceId` is a transparent wrapper of `struct pci_device_id`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::pci_device_id;
}

/// A table of identities, declared by [`vfio_pci_device_table!`](crate::vfio_pci_device_table).
pub type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Handling of the user's accesses to a BAR.
pub enum Region<'a> {
    /// Reads, writes and mappings reach the device, like with `vfio-pci`. The crate does not drop
    /// writes to a stopped device.
    Direct,
    /// The BAR cannot be mapped. [`Operations::read`] and [`Operations::write`] serve accesses.
    /// Writes are dropped while the device is stopped.
    Trapped,
    /// The BAR is memory that is part of the state. Writes are tracked, and dropped while the
    /// device is stopped, and so are stores to its mappings.
    Tracked(&'a BarMemory),
}

/// A variant driver.
///
/// The implementing type is the data of the device while it is bound to the driver. Data of a user
/// belongs in [`OpenData`](Self::OpenData) instead, which is created by the first open and dropped
/// by the last close.
///
/// [`Migratable::reset`] of the open data brings the device to its state at power on, as far as a
/// reset of the bus does not. It is called on the first open, after each reset, and on the last
/// close, so that the next user sees nothing of the last one.
///
/// # Examples
///
/// A driver of a device whose state is the memory in its BAR2. `Open` implements [`Migratable`].
///
/// ```
/// use kernel::device::Bound;
/// use vfio::pci::{
///     self,
///     BarMemory,
///     Region, //
/// };
///
/// # type Open = Chip;
/// #
/// # impl Chip {
/// #     fn new(_memory: Result<BarMemory>) -> impl PinInit<Self, Error> {
/// #         Err::<Self, Error>(ENODEV)
/// #     }
/// # }
/// #
/// struct Variant {
///     memory: u32,
/// }
///
/// #[vtable]
/// impl pci::Operations for Variant {
///     type OpenData = Open;
///     const NAME: &'static CStr = c"variant";
///
///     fn open(&self, function: Arc<pci::Function>) -> impl PinInit<Open, Error> {
///         Open::new(BarMemory::new(function, self.memory))
///     }
///
///     fn region(_open: &Open, region_index: u32) -> Region<'_> {
///         match region_index {
///             region::BAR0 => Region::Trapped,
///             _ => Region::Direct,
///         }
///     }
/// }
///
/// vfio::vfio_pci_device_table!(TABLE, [pci::DeviceId::from_id(0x1af4, 0x1110)]);
///
/// impl pci::Driver for Variant {
///     const ID_TABLE: pci::IdTable = &TABLE;
///
///     fn probe(_device: &kernel::pci::Device<Bound>) -> impl PinInit<Self, Error> {
///         Ok(Variant {
///             memory: region::BAR2,
///         })
///     }
/// }
/// ```
#[vtable]
pub trait Operations: Sized + Send + Sync + 'static {
    /// The data of an open device.
    type OpenData: Migratable;

    /// The name of the driver.
    const NAME: &'static CStr;

    /// Returns the migration states that the device supports. Called once, before it is registered.
    /// May sleep.
    ///
    /// By default, all states that the open data supports. A driver may return fewer, but not more.
    fn migration_flags(&self) -> Flags {
        Self::OpenData::FLAGS
    }

    /// Creates the data of an open device.
    ///
    /// Called on the first open, after the core has enabled the device. [`Migratable::reset`] is
    /// called next; until then all accesses by `function` fail with `ENODEV`. May sleep. If it
    /// fails, the open fails with the same error.
    fn open(&self, function: Arc<Function>) -> impl PinInit<Self::OpenData, Error>;

    /// Returns how the crate handles the user's accesses to a BAR. Called once for each BAR when
    /// the device is opened. May sleep.
    ///
    /// The open fails with `EINVAL`, and the log has the reason, if tracked memory is not that of
    /// this BAR, or if a BAR that is not direct has I/O ports or the MSI-X table, which belongs to
    /// the core. A device with such a BAR has no ioeventfds: they would bypass the crate.
    fn region(_open: &Self::OpenData, _region_index: u32) -> Region<'_> {
        Region::Direct
    }

    /// Reads from a [trapped](Region::Trapped) BAR. The whole range is inside the BAR.
    ///
    /// Called in any migration state. May sleep. The bytes are copied to the user after this has
    /// returned. By default, it reads from the device.
    fn read(_open: &Self::OpenData, _pos: Position, _to: &mut [u8]) -> Result {
        Err(EINVAL)
    }

    /// Writes to a [trapped](Region::Trapped) BAR. The whole range is inside the BAR.
    ///
    /// Not called while the device is stopped. [`Migratable::stop`] is called after the write under
    /// way has returned; there is at most one. A write that arrives while a state change stops
    /// the device waits for the end of that change. May sleep. The bytes were copied from the user
    /// before the call. By default, it writes to the device.
    fn write(_open: &Self::OpenData, _pos: Position, _from: &[u8]) -> Result {
        Err(EINVAL)
    }
}

/// A variant driver that can be registered; see [`Operations`].
pub trait Driver: Operations {
    /// The devices that it can be bound to.
    const ID_TABLE: IdTable;

    /// Returns an initializer for the data of a device that is being bound to the driver. May
    /// sleep.
    ///
    /// The device is not enabled, and its BARs must not be accessed. If it fails, the device is not
    /// bound.
    fn probe(device: &pci::Device<Bound>) -> impl PinInit<Self, Error>;
}

/// Declares the table of devices that a variant driver can be bound to, and its module aliases.
///
/// # Examples
///
/// ```
/// use vfio::pci;
///
/// vfio::vfio_pci_device_table!(
///     TABLE,
///     [
///         pci::DeviceId::from_id(0x1234, 0x1111),
///         pci::DeviceId::from_id(0x1af4, 0x1110),
///     ]
/// );
///
/// fn table() -> pci::IdTable {
///     &TABLE
/// }
/// ```
#[macro_export]
macro_rules! vfio_pci_device_table {
    ($name:ident, [$($id:expr),* $(,)?]) => {
        ::kernel::module_device_table!("pci", $crate::pci::DeviceId, $name, @none, [$($id),*]);
    };
}

/// Declares a kernel module with a variant driver.
///
/// Loading the module fails like [`Registration::new()`](crate::pci::Registration::new).
///
/// # Examples
///
/// The driver is a type that implements [`pci::Driver`](crate::pci::Driver). All other fields are
/// passed to the kernel's `module!`.
///
/// ```ignore
/// vfio::module_vfio_pci_driver! {
///     type: MyDriver,
///     name: "my_driver",
///     authors: ["Author name"],
///     description: "What it is",
///     license: "GPL",
/// }
/// ```
#[macro_export]
macro_rules! module_vfio_pci_driver {
    (type: $driver:ty, $($info:tt)*) => {
        #[::kernel::prelude::pin_data]
        struct DriverModule {
            #[pin]
            _registration: $crate::pci::Registration<$driver>,
        }

        impl ::kernel::InPlaceModule for DriverModule {
            fn init(
                _module: &'static ::kernel::ThisModule,
            ) -> impl ::pin_init::PinInit<Self, ::kernel::error::Error> {
                ::kernel::try_pin_init!(Self {
                    _registration <- $crate::pci::Registration::new(),
                })
            }
        }

        ::kernel::prelude::module! {
            type: DriverModule,
            $($info)*
        }
    };
}
