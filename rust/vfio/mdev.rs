// SPDX-License-Identifier: GPL-2.0

//! The mediated device bus.
//!
//! An administrator creates a mediated device by writing a UUID to the `create` file of a type:
//! `/sys/class/mdev_bus/PARENT/mdev_supported_types/PARENT-TYPE/create`. Here, the parent is a
//! device without hardware that exists for this purpose only.
//!
//! C header: [`include/linux/mdev.h`](srctree/include/linux/mdev.h)

pub use crate::emulated::{
    Attribute,
    Driver,
    Type, //
};

use crate::{
    bindings,
    device::wait_for_tasks,
    emulated::{
        self,
        Files, //
    }, //
};
use core::marker::PhantomData;
use kernel::{
    device::{
        self,
        Bound, //
    },
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    module::this_module,
    prelude::*,
    types::{
        ForeignOwnable,
        Opaque, //
    },
};

/// The C representation of a type.
#[repr(transparent)]
struct RawType(Opaque<bindings::mdev_type>);

// SAFETY: The core synchronises the access to the content.
unsafe impl Send for RawType {}

// SAFETY: As above.
unsafe impl Sync for RawType {}

/// A driver of mediated devices, and the parent device on which they are created, both named
/// [`emulated::Operations::NAME`].
///
/// Dropping it removes the devices and waits until their users have released them.
///
/// # Examples
///
/// A module that registers a driver and logs a message. Without the message, use
/// [`module_mdev_driver!`](crate::module_mdev_driver).
///
/// ```
/// # type Driver = Note;
/// #[pin_data]
/// struct Module {
///     #[pin]
///     _registration: mdev::Registration<Driver>,
/// }
///
/// impl kernel::InPlaceModule for Module {
///     fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
///         pr_info!("devices can be created\n");
///         try_pin_init!(Self {
///             _registration <- mdev::Registration::new(),
///         }? Error)
///     }
/// }
/// ```
#[pin_data(PinnedDrop)]
pub struct Registration<T: Driver> {
    class: Class,
    types: KVec<RawType>,
    type_pointers: KVec<*mut bindings::mdev_type>,
    files: Files<T>,
    #[pin]
    driver: Opaque<bindings::mdev_driver>,
    #[pin]
    parent: Opaque<bindings::mdev_parent>,
    _driver: PhantomData<T>,
}

// SAFETY: A shared reference allows no operations.
unsafe impl<T: Driver> Sync for Registration<T> {}

// SAFETY: All functions that drop() calls may be called from any thread.
unsafe impl<T: Driver> Send for Registration<T> {}

/// A device class with a single device, which has no hardware.
///
/// # Invariants
///
/// Both are registered, and owned.
struct Class {
    class: *mut bindings::class,
    device: *mut bindings::device,
}

impl Class {
    fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name is static.
        let class = from_err_ptr(unsafe { bindings::class_create(name.as_char_ptr()) })?;
        // SAFETY: `class` is registered. The format matches its argument.
        let device = unsafe {
            bindings::device_create(
                class,
                core::ptr::null_mut(),
                0,
                core::ptr::null_mut(),
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        };
        let device = from_err_ptr(device).inspect_err(|_| {
            // SAFETY: `class` is registered and has no device.
            unsafe { bindings::class_destroy(class) };
        })?;
        // INVARIANT: Both calls succeeded.
        Ok(Self { class, device })
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: By the type invariants both are registered. The device is removed first.
        unsafe {
            bindings::device_unregister(self.device);
            bindings::class_destroy(self.class);
        }
    }
}

impl<T: Driver> Registration<T> {
    /// Registers the driver and the parent device.
    ///
    /// Devices can be created before this returns. May sleep.
    ///
    /// Fails with `EINVAL` if there are no types, with `EEXIST` if a class or a driver of this name
    /// exists, and with the other errors of `class_create()`, `device_create()`,
    /// `mdev_register_driver()` and `mdev_register_parent()`.
    pub fn new() -> impl PinInit<Self, Error>
    where
        T: 'static,
    {
        try_pin_init!(Self {
            class: Class::new(T::NAME)?,
            types: Self::types()?,
            type_pointers: {
                let mut pointers = KVec::with_capacity(types.len(), GFP_KERNEL)?;
                for raw in types.iter() {
                    pointers.push(raw.0.get(), GFP_KERNEL)?;
                }
                pointers
            },
            files: Files::new()?,
            driver <- {
                let groups = files.groups.as_mut_ptr();
                Opaque::try_ffi_init(move |driver| {
                    // SAFETY: Both are pinned, and live until the driver is unregistered.
                    unsafe { Self::register_driver(driver, groups) }
                })
            },
            parent <- {
                let device = class.device;
                let pointers: *mut *mut bindings::mdev_type = type_pointers.as_mut_ptr();
                let count = type_pointers.len() as u32;
                let driver = driver.get();
                Opaque::try_ffi_init(move |parent| {
                    // SAFETY: All arguments are pinned and live until the parent is unregistered.
                    // `device` is registered.
                    to_result(unsafe {
                        bindings::mdev_register_parent(parent, device, driver, pointers, count)
                    })
                    .inspect_err(|_| {
                        // SAFETY: The driver was registered. Without a parent it has no devices.
                        unsafe { bindings::mdev_unregister_driver(driver) };
                    })
                })
            },
            _driver: PhantomData,
        }? Error)
    }

    /// Returns the C representation of the types.
    fn types() -> Result<KVec<RawType>> {
        if T::TYPES.is_empty() {
            return Err(EINVAL);
        }
        let mut types = KVec::with_capacity(T::TYPES.len(), GFP_KERNEL)?;
        for entry in T::TYPES {
            let raw = bindings::mdev_type {
                sysfs_name: entry.name.as_char_ptr(),
                pretty_name: entry.pretty_name.as_char_ptr(),
                ..pin_init::zeroed()
            };
            types.push(RawType(Opaque::new(raw)), GFP_KERNEL)?;
        }
        Ok(types)
    }

    /// Registers the driver in the memory that `driver` points to.
    ///
    /// # Safety
    ///
    /// `driver` must be valid for writes and pinned, and live until the driver is unregistered. So
    /// must `groups`, a list that ends with a null pointer.
    unsafe fn register_driver(
        driver: *mut bindings::mdev_driver,
        groups: *mut *const bindings::attribute_group,
    ) -> Result {
        let module = this_module::<T::OwnerModule>().as_ptr();
        // SAFETY: By the safety requirements.
        unsafe {
            driver.write(bindings::mdev_driver {
                device_api: c"vfio-pci".as_char_ptr(),
                max_instances: T::max_instances().min(T::MAX_INSTANCES),
                probe: Some(Self::probe),
                remove: Some(Self::remove),
                get_available: None,
                show_description: Some(Self::show_description),
                ..pin_init::zeroed()
            });
            (*driver).driver.dev_groups = groups;
            (*driver).driver.name = T::NAME.as_char_ptr();
            // Without an owner, the module could be unloaded while a device is open.
            (*driver).driver.owner = module;
            to_result(bindings::mdev_register_driver(driver))
        }
    }

    /// Returns the index of a type in [`Driver::TYPES`].
    ///
    /// # Safety
    ///
    /// `raw` must be a registered type of a driver of this type.
    unsafe fn type_index(raw: *mut bindings::mdev_type) -> Result<usize> {
        // SAFETY: A registered type has a parent with the list of its types.
        let (types, count) = unsafe {
            let parent = (*raw).parent;
            ((*parent).types, (*parent).nr_types as usize)
        };
        (0..count)
            // SAFETY: `types` has `count` elements.
            .find(|index| unsafe { *types.add(*index) } == raw)
            .ok_or(EINVAL)
    }

    /// # Safety
    ///
    /// Must be called by the core, as the probe() of a driver of this type.
    unsafe extern "C" fn probe(mdev: *mut bindings::mdev_device) -> c_int {
        from_result(|| {
            // SAFETY: The core passes a valid device of a registered type.
            let index = unsafe { Self::type_index((*mdev).type_) }?;
            // SAFETY: The device is valid and, from here to `remove()`, bound.
            let dev = unsafe { &raw mut (*mdev).dev };
            // SAFETY: As above.
            let bound = unsafe { device::Device::<Bound>::from_raw(dev) };
            // SAFETY: The driver has an owner, `remove()` drops the registration, and each device
            // has only one.
            let registration = unsafe {
                emulated::Registration::<T>::new(
                    bound,
                    T::probe(index),
                    |data| emulated::set_defaults(data, T::defaults()),
                    emulated::Path::Core,
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
    /// Must be called by the core, as the remove() of a driver of this type, after a successful
    /// probe().
    unsafe extern "C" fn remove(mdev: *mut bindings::mdev_device) {
        // SAFETY: `probe()` has set the driver data to the result of `into_foreign()`.
        drop(unsafe {
            let registration = bindings::dev_get_drvdata(&raw const (*mdev).dev);
            KBox::<emulated::Registration<T>>::from_foreign(registration.cast())
        });
    }

    /// # Safety
    ///
    /// Must be called by the core with a registered type of a driver of this type and a buffer of
    /// one page.
    unsafe extern "C" fn show_description(
        raw: *mut bindings::mdev_type,
        buf: *mut c_char,
    ) -> isize {
        // SAFETY: By the safety requirements.
        let description = unsafe { Self::type_index(raw) }
            .ok()
            .and_then(|index| T::TYPES.get(index))
            .map_or(c"", |entry| entry.description);
        // SAFETY: `buf` is a page, and the format matches its argument.
        unsafe {
            bindings::sysfs_emit(buf, c"%s\n".as_char_ptr(), description.as_char_ptr()) as isize
        }
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Both are registered. The class device is unregistered later.
        unsafe {
            bindings::mdev_unregister_parent(self.parent.get());
            bindings::mdev_unregister_driver(self.driver.get());
        }
        wait_for_tasks();
    }
}

/// Declares a kernel module with a driver of mediated devices.
///
/// Loading the module fails like [`Registration::new()`](crate::mdev::Registration::new).
///
/// # Examples
///
/// The driver is a type that implements [`mdev::Driver`](crate::mdev::Driver). All other fields are
/// passed to the kernel's `module!`.
///
/// ```
/// # type MyDriver = Note;
/// vfio::module_mdev_driver! {
///     type: MyDriver,
///     name: "my_driver",
///     authors: ["Author name"],
///     description: "What it is",
///     license: "GPL",
/// }
/// ```
#[macro_export]
macro_rules! module_mdev_driver {
    (type: $driver:ty, $($info:tt)*) => {
        #[::kernel::prelude::pin_data]
        struct DriverModule {
            #[pin]
            _registration: $crate::mdev::Registration<$driver>,
        }

        impl ::kernel::InPlaceModule for DriverModule {
            fn init(
                _module: &'static ::kernel::ThisModule,
            ) -> impl ::pin_init::PinInit<Self, ::kernel::error::Error> {
                ::kernel::try_pin_init!(Self {
                    _registration <- $crate::mdev::Registration::new(),
                })
            }
        }

        ::kernel::prelude::module! {
            type: DriverModule,
            $($info)*
        }
    };
}
