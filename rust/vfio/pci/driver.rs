// SPDX-License-Identifier: GPL-2.0

//! Registration of a variant driver, and of its devices with the core.
//!
//! [`kernel::pci::Driver`] keeps its own data in the driver data of a device, which must be the
//! `struct vfio_pci_core_device`. So the crate registers a `struct pci_driver` of its own.
//!
//! C headers: [`include/linux/pci.h`](srctree/include/linux/pci.h),
//! [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use crate::{
    bindings, debugfs,
    device::{
        wait_for_tasks,
        Device, //
    },
    migration::Ledger,
    pci::{
        device::{
            Private,
            Variant, //
        },
        vtable::VTable,
        Driver, //
    },
};
use core::{
    marker::PhantomData,
    mem::{
        align_of,
        offset_of, //
    },
    ptr::NonNull, //
};
use kernel::{
    device::Bound,
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    module::this_module,
    page::PAGE_SIZE,
    pci,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Completion, //
    },
    types::Opaque, //
};

/// The registration of a variant driver.
///
/// Dropping it unbinds the driver from its devices: it asks their users to release them, and waits
/// for that.
///
/// # Examples
///
/// A module that registers a driver and logs a message. Without the message, use
/// [`module_vfio_pci_driver!`](crate::module_vfio_pci_driver).
///
/// ```
/// use vfio::pci;
///
/// #[pin_data]
/// struct Module<T: pci::Driver> {
///     #[pin]
///     registration: pci::Registration<T>,
/// }
///
/// fn register<T: pci::Driver>() -> impl PinInit<Module<T>, Error> {
///     pr_info!("devices can be bound\n");
///     try_pin_init!(Module {
///         registration <- pci::Registration::new(),
///     }? Error)
/// }
/// ```
#[pin_data(PinnedDrop)]
pub struct Registration<T: Driver> {
    #[pin]
    driver: Opaque<bindings::pci_driver>,
    _driver: PhantomData<T>,
}

// SAFETY: A shared reference allows no operations.
unsafe impl<T: Driver> Sync for Registration<T> {}

// SAFETY: The driver may be unregistered from any thread.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: The ledger is that of the device.
unsafe impl<T: Driver> debugfs::Watched for Variant<T> {
    unsafe fn ledger<'a>(vdev: *mut bindings::vfio_device) -> &'a Ledger {
        // SAFETY: By the safety requirements.
        unsafe { Self::from_raw(vdev) }.private.engine.ledger()
    }
}

impl<T: Driver> Registration<T> {
    const ERR_HANDLERS: bindings::pci_error_handlers = bindings::pci_error_handlers {
        error_detected: Some(Self::error_detected),
        slot_reset: Some(Self::slot_reset),
        reset_prepare: Some(Self::reset_prepare),
        reset_done: Some(Self::reset_done),
        ..pin_init::zeroed()
    };

    /// Registers the driver. May sleep. Devices can be bound before this returns.
    ///
    /// Fails with the errors of `__pci_register_driver()`.
    pub fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            driver <- Opaque::try_ffi_init(|driver: *mut bindings::pci_driver| {
                let name = T::NAME.as_char_ptr();
                let module = this_module::<T::OwnerModule>().as_ptr();
                // SAFETY: `driver` is valid for writes, and pinned until it is unregistered. The
                // table ends with an empty entry.
                unsafe {
                    driver.write(bindings::pci_driver {
                        name,
                        id_table: T::ID_TABLE.as_ptr(),
                        probe: Some(Self::probe),
                        remove: Some(Self::remove),
                        err_handler: &Self::ERR_HANDLERS,
                        driver_managed_dma: true,
                        ..pin_init::zeroed()
                    });
                    to_result(bindings::__pci_register_driver(driver, module, name))
                }
            }),
            _driver: PhantomData,
        }? Error)
    }

    /// Allocates the device of a `struct pci_dev`.
    fn allocate(
        device: &pci::Device<Bound>,
        parent: *mut bindings::device,
    ) -> Result<ARef<Device>> {
        const {
            assert!(offset_of!(Variant<T>, core) == 0);
            assert!(offset_of!(bindings::vfio_pci_core_device, vdev) == 0);
            // The core allocates with kvzalloc().
            assert!(align_of::<Variant<T>>() <= PAGE_SIZE);
        }
        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        // SAFETY: `parent` is valid, and the operations live for ever. They initialise and release
        // `core`, but not `private`.
        let raw = unsafe {
            bindings::_vfio_alloc_device(
                core::alloc::Layout::new::<Variant<T>>()
                    .pad_to_align()
                    .size(),
                parent,
                &VTable::<T>::UNINIT_OPS,
            )
        };
        let raw = from_err_ptr(raw)?;
        // SAFETY: `_vfio_alloc_device()` returned the only reference, and `Device` is a transparent
        // wrapper. If anything fails below, dropping it frees the memory.
        let owned = unsafe { ARef::from_raw(NonNull::new_unchecked(raw.cast::<Device>())) };
        // SAFETY: `raw` points to memory of the size of `Variant<T>`, in which `private` is not
        // initialised yet; the memory does not move.
        unsafe {
            pin_init::raw_try_init(
                &raw mut (*raw.cast::<Variant<T>>()).private,
                Private::new(T::probe(device), released),
            )?
        };
        // INVARIANT: `private` has just been initialised.
        // SAFETY: `raw` is valid and not shared.
        unsafe {
            (*raw).ops = &VTable::<T>::OPS;
            // The legacy ranges of VGA are another way to the memory in BARs.
            (*raw.cast::<bindings::vfio_pci_core_device>()).set_disable_vga(true);
            (*raw).mig_ops = &VTable::<T>::MIG_OPS;
            let flags = Variant::<T>::from_raw(raw).private.engine.flags();
            (*raw).migration_flags = flags.as_raw() as u32;
            let ledger = Variant::<T>::from_raw(raw).private.engine.ledger();
            ledger.set_name(device.as_ref().name());
        }
        Ok(owned)
    }

    /// Drops the reference to a device that is not registered, and waits for its release.
    fn release(owned: ARef<Device>) {
        // SAFETY: It comes from `allocate()`, and is a reference.
        let this = unsafe { Variant::<T>::from_raw(owned.as_raw()) };
        let released = this.private.released.clone();
        drop(owned);
        // A file that is being closed ends its use first and drops its reference later. Only this
        // wait keeps the module loaded until then.
        released.wait_for_completion();
    }

    /// # Safety
    ///
    /// Must be called by the core with a device to bind to such a driver.
    unsafe extern "C" fn probe(
        pdev: *mut bindings::pci_dev,
        _id: *const bindings::pci_device_id,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The device is bound to the driver during this call.
            let (device, parent) =
                unsafe { (&*pdev.cast::<pci::Device<Bound>>(), &raw mut (*pdev).dev) };
            let owned = Self::allocate(device, parent)?;
            let core = owned.as_raw().cast::<bindings::vfio_pci_core_device>();
            // SAFETY: Both are valid. The core wants this value while the device is registered.
            unsafe { bindings::dev_set_drvdata(parent, core.cast()) };
            // SAFETY: The device is complete and not registered.
            let done = to_result(unsafe { bindings::vfio_pci_core_register_device(core) });
            if let Err(error) = done {
                // SAFETY: As above.
                unsafe { bindings::dev_set_drvdata(parent, core::ptr::null_mut()) };
                Self::release(owned);
                return Err(error);
            }
            // SAFETY: The device is registered, and `remove()` is not called before this returns.
            unsafe { debugfs::create::<Variant<T>>(owned.as_raw()) };
            // `remove()` takes it back.
            let _ = ARef::into_raw(owned);
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core with a device that [`probe()`](Self::probe) has bound.
    unsafe extern "C" fn remove(pdev: *mut bindings::pci_dev) {
        // SAFETY: `probe()` has set the driver data to a registered device, and left its reference
        // to this function. No lock that callbacks need is held.
        let owned = unsafe {
            let core = bindings::dev_get_drvdata(&raw const (*pdev).dev);
            bindings::vfio_pci_core_unregister_device(core.cast());
            ARef::from_raw(NonNull::new_unchecked(core.cast::<Device>()))
        };
        Self::release(owned);
    }

    /// Returns the device of a callback.
    ///
    /// # Safety
    ///
    /// [`probe()`](Self::probe) must have bound `pdev`, which must not be unbound before `'a` ends.
    unsafe fn variant<'a>(pdev: *mut bindings::pci_dev) -> &'a Variant<T> {
        // SAFETY: By the safety requirements, the driver data is a registered device.
        unsafe {
            let core = bindings::dev_get_drvdata(&raw const (*pdev).dev);
            Variant::<T>::from_raw(core.cast())
        }
    }

    /// # Safety
    ///
    /// Must be called by the core with a device that [`probe()`](Self::probe) has bound. Its lock
    /// must be held, so that it is not unbound meanwhile.
    unsafe extern "C" fn error_detected(
        pdev: *mut bindings::pci_dev,
        state: bindings::pci_channel_state_t,
    ) -> bindings::pci_ers_result_t {
        if state != bindings::pci_channel_io_normal {
            // SAFETY: By the safety requirements.
            unsafe { Self::variant(pdev) }.fail();
        }
        // SAFETY: These are the arguments of the core.
        unsafe { bindings::vfio_pci_core_aer_err_detected(pdev, state) }
    }

    /// Called after a reset of the bus that recovers from an error, maybe one of another device.
    /// There was no `reset_prepare`, and the configuration space is lost.
    ///
    /// # Safety
    ///
    /// As [`error_detected()`](Self::error_detected).
    unsafe extern "C" fn slot_reset(pdev: *mut bindings::pci_dev) -> bindings::pci_ers_result_t {
        // SAFETY: By the safety requirements.
        unsafe { Self::variant(pdev) }.fail();
        bindings::pci_ers_result_PCI_ERS_RESULT_RECOVERED
    }

    /// # Safety
    ///
    /// As [`error_detected()`](Self::error_detected).
    unsafe extern "C" fn reset_prepare(pdev: *mut bindings::pci_dev) {
        // SAFETY: By the safety requirements.
        unsafe { Self::variant(pdev) }.reset_prepare();
    }

    /// # Safety
    ///
    /// As [`error_detected()`](Self::error_detected).
    unsafe extern "C" fn reset_done(pdev: *mut bindings::pci_dev) {
        // SAFETY: By the safety requirements.
        unsafe { Self::variant(pdev) }.reset_done();
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The driver is registered.
        unsafe { bindings::pci_unregister_driver(self.driver.get()) };
        wait_for_tasks();
    }
}
