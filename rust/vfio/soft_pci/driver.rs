// SPDX-License-Identifier: GPL-2.0

//! The driver that is bound to functions, and its registration.
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use super::{
    configfs::Directory,
    host::Host,
    iommu::Endpoint,
    Driver, //
};
use crate::{
    bindings,
    device::wait_for_tasks,
    emulated::{
        self,
        Files,
        Path, //
    }, //
};
use core::{
    marker::PhantomData,
    mem::offset_of, //
};
use kernel::{
    device::{
        self,
        Bound, //
    },
    error::{
        from_result,
        to_result, //
    },
    module::this_module,
    prelude::*,
    sync::Arc,
    types::{
        ForeignOwnable,
        Opaque, //
    },
};

/// A `struct pci_driver`, and the host of the functions that it can be bound to.
#[repr(C)]
struct RawDriver {
    driver: bindings::pci_driver,
    host: *const Host,
}

/// A registered driver of functions.
///
/// Dropping it unbinds the driver from its functions: it asks their users to release them, and
/// waits for that.
///
/// # Invariants
///
/// `raw` is registered. It points to `_host` and `_files`.
#[pin_data(PinnedDrop)]
pub(super) struct PciDriver<T: Driver> {
    #[pin]
    raw: Opaque<RawDriver>,
    _host: Arc<Host>,
    _files: Files<T>,
    _driver: PhantomData<T>,
}

// SAFETY: A shared reference allows no operations.
unsafe impl<T: Driver> Sync for PciDriver<T> {}

// SAFETY: The driver may be unregistered from any thread.
unsafe impl<T: Driver> Send for PciDriver<T> {}

impl<T: Driver> PciDriver<T> {
    /// Registers the driver. May sleep. Functions can be bound before this returns.
    pub(super) fn new(host: Arc<Host>) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let mut files = Files::new()?;
            let groups = files.groups.as_mut_ptr();
            let pointer: *const Host = &raw const *host;
            // INVARIANT: The initialiser of `raw` registers it. Moving the fields does not move
            // what they point to.
            Ok(try_pin_init!(Self {
                _files: files,
                _host: host,
                raw <- Opaque::try_ffi_init(move |raw| {
                    // SAFETY: `raw` is valid for writes, and pinned until it is unregistered. What
                    // it points to is dropped later.
                    unsafe { Self::register(raw, pointer, groups) }
                }),
                _driver: PhantomData,
            }? Error))
        })
    }

    /// Registers the driver in the memory that `raw` points to.
    ///
    /// # Safety
    ///
    /// `raw` must be valid for writes. It must not move, and `host` and `groups` must live, until
    /// the driver is unregistered.
    unsafe fn register(
        raw: *mut RawDriver,
        host: *const Host,
        groups: *mut *const bindings::attribute_group,
    ) -> Result {
        let name = T::NAME.as_char_ptr();
        let module = this_module::<T::OwnerModule>().as_ptr();
        // SAFETY: By the safety requirements. The table ends with an empty entry.
        unsafe {
            raw.write(RawDriver {
                driver: bindings::pci_driver {
                    name,
                    id_table: T::ID_TABLE.as_ptr(),
                    probe: Some(Self::probe),
                    remove: Some(Self::remove),
                    driver_managed_dma: true,
                    dev_groups: groups,
                    ..pin_init::zeroed()
                },
                host,
            });
            to_result(bindings::__pci_register_driver(
                &mut (*raw).driver,
                module,
                name,
            ))
        }
    }

    /// # Safety
    ///
    /// Must be called by the core with a device to bind to such a driver.
    unsafe extern "C" fn probe(
        pdev: *mut bindings::pci_dev,
        _id: *const bindings::pci_device_id,
    ) -> c_int {
        const { assert!(offset_of!(RawDriver, driver) == 0) };
        from_result(|| {
            // SAFETY: The core has set the driver, which is in a `RawDriver` whose host lives while
            // it is registered.
            let host = unsafe { &*(*(*pdev).driver.cast::<RawDriver>()).host };
            // The administrator can bind any device to the driver.
            // SAFETY: The device is being bound.
            let kind = unsafe { host.function(pdev) }?;
            // SAFETY: The device is valid.
            let dev = unsafe { &raw mut (*pdev).dev };
            // SAFETY: From here to `remove()`, the device is bound.
            let bound = unsafe { device::Device::<Bound>::from_raw(dev) };
            let path = Path::Iommu {
                memory: Endpoint::of(bound)?,
                dma_log: kind.has_dma_log,
            };
            // SAFETY: The driver has an owner, `remove()` drops the registration, and each device
            // has only one.
            let registration = unsafe {
                emulated::Registration::<T>::new(
                    bound,
                    T::probe(kind.type_index),
                    |data| Host::set_defaults(data, &kind),
                    path,
                )
            }?;
            let registration = KBox::new(registration, GFP_KERNEL)?;
            // SAFETY: `dev` is valid, and its driver data belongs to the driver.
            unsafe { bindings::dev_set_drvdata(dev, registration.into_foreign().cast()) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core with a device that [`probe()`](Self::probe) has bound.
    unsafe extern "C" fn remove(pdev: *mut bindings::pci_dev) {
        // SAFETY: `probe()` has set the driver data to the result of `into_foreign()`.
        drop(unsafe {
            let registration = bindings::dev_get_drvdata(&raw const (*pdev).dev);
            KBox::<emulated::Registration<T>>::from_foreign(registration.cast())
        });
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for PciDriver<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants, the driver is registered. It is the first field.
        unsafe { bindings::pci_unregister_driver(self.raw.get().cast()) };
    }
}

/// Ends the use of the module by tasks.
struct Tasks;

impl Drop for Tasks {
    fn drop(&mut self) {
        wait_for_tasks();
    }
}

/// A driver of functions, their bus and their directory in configfs, all named
/// [`emulated::Operations::NAME`](crate::emulated::Operations::NAME).
///
/// The functions keep the module loaded, so dropping it finds none.
///
/// # Examples
///
/// A module whose devices can be created on both buses.
///
/// ```
/// use vfio::{
///     pci,
///     soft_pci, //
/// };
///
/// vfio::vfio_pci_device_table!(NOTES, [pci::DeviceId::from_id(0x1af4, 0x10f2)]);
///
/// impl soft_pci::Driver for Note {
///     const ID_TABLE: pci::IdTable = &NOTES;
/// }
///
/// #[pin_data]
/// struct Module {
///     #[pin]
///     _mediated: mdev::Registration<Note>,
///     #[pin]
///     _functions: soft_pci::Registration<Note>,
/// }
///
/// impl kernel::InPlaceModule for Module {
///     fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
///         try_pin_init!(Self {
///             _mediated <- mdev::Registration::new(),
///             _functions <- soft_pci::Registration::new(),
///         })
///     }
/// }
/// ```
#[pin_data]
pub struct Registration<T: Driver> {
    // Dropped in this order.
    #[pin]
    _directory: Directory<T>,
    #[pin]
    _driver: PciDriver<T>,
    _tasks: Tasks,
}

impl<T: Driver> Registration<T> {
    /// Registers the driver. May sleep. Functions can be created before this returns.
    ///
    /// Fails with `ENOMEM`, with `ENOSPC` if there is no PCI domain left, and with the errors of
    /// `iommu_device_register()`, `__pci_register_driver()` and `configfs_register_subsystem()`.
    pub fn new() -> impl PinInit<Self, Error>
    where
        T: 'static,
    {
        pin_init::pin_init_scope(|| {
            let host = Host::new::<T>()?;
            Ok(try_pin_init!(Self {
                _tasks: Tasks,
                _driver <- PciDriver::new(host.clone()),
                _directory <- Directory::new(host),
            }? Error))
        })
    }
}
