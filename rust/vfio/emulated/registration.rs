// SPDX-License-Identifier: GPL-2.0

//! Registration of a device with the core.
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use super::Operations;
use crate::{
    bindings,
    compat::AsRaw,
    debugfs,
    device::Device,
    emulated::{
        device::{
            Emulated,
            Private,
            SharedMemory, //
        },
        vtable::VTable, //
    },
    migration::Ledger, //
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
    device::{
        self,
        Bound, //
    },
    error::{
        from_err_ptr,
        to_result, //
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Completion, //
    },
};

/// Access path from a device to the memory of its user.
pub(crate) enum Path {
    /// The core accesses the memory on behalf of the device, which has an IOMMU group of its own
    /// that stands for no hardware.
    Core,
    /// The device is in the IOMMU group of its parent. Only `soft_pci` has such devices, and not
    /// every system supports it.
    #[allow(dead_code)]
    Iommu {
        /// The memory that the IOMMU maps for the device.
        memory: Arc<SharedMemory>,
        /// Whether the device has a DMA log of its own.
        dma_log: bool,
    },
}

/// The registration of an emulated device.
///
/// Dropping it removes the device: it asks the user to release the device, and waits for that.
pub(crate) struct Registration<T: Operations> {
    /// Present until the registration is dropped.
    dev: Option<ARef<Device>>,
    released: Arc<Completion>,
    _driver: PhantomData<T>,
}

// SAFETY: The ledger is that of the device.
unsafe impl<T: Operations> debugfs::Watched for Emulated<T> {
    unsafe fn ledger<'a>(vdev: *mut bindings::vfio_device) -> &'a Ledger {
        // SAFETY: By the safety requirements.
        let this = unsafe { Self::from_raw(vdev) };
        if let Ok(opened) = this.opened() {
            this.note_dropped_stores(&opened);
        }
        this.private.engine.ledger()
    }
}

impl<T: Operations> Registration<T> {
    /// Allocates the device. Its parent must have a driver, which must have a module.
    fn allocate(
        parent: &device::Device<Bound>,
        data: impl PinInit<T, Error>,
        defaults: impl FnOnce(&T) -> Result,
        path: Path,
    ) -> Result<(ARef<Device>, Arc<Completion>)> {
        const {
            assert!(offset_of!(Emulated<T>, dev) == 0);
            // The core allocates with kvzalloc().
            assert!(align_of::<Emulated<T>>() <= PAGE_SIZE);
        }

        let (ops, memory, dma_log) = match path {
            Path::Core => (&VTable::<T>::OPS, None, true),
            Path::Iommu { memory, dma_log } => (&VTable::<T>::IOMMU_OPS, Some(memory), dma_log),
        };
        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;

        // SAFETY: `parent` is valid, the operations live for ever, and they have neither `init`
        // nor `release`, which would need `private` to be initialised.
        let raw = unsafe {
            bindings::_vfio_alloc_device(
                core::alloc::Layout::new::<Emulated<T>>()
                    .pad_to_align()
                    .size(),
                parent.as_raw(),
                &VTable::<T>::UNINIT_OPS,
            )
        };
        let raw = from_err_ptr(raw)?;
        // SAFETY: `_vfio_alloc_device()` returned the only reference, and `Device` is a transparent
        // wrapper. If anything fails below, dropping it frees the memory.
        let dev = unsafe { ARef::from_raw(NonNull::new_unchecked(raw.cast::<Device>())) };

        // SAFETY: `raw` points to memory of the size of `Emulated<T>`, in which `private` is not
        // initialised yet; the memory does not move.
        unsafe {
            pin_init::raw_try_init(
                &raw mut (*raw.cast::<Emulated<T>>()).private,
                Private::new(data, defaults, memory, released.clone()),
            )?
        };
        // SAFETY: `private` has just been initialised.
        let has_dma_log = unsafe { (*raw.cast::<Emulated<T>>()).private.data.has_dma_log() };
        // INVARIANT: `private` has just been initialised.
        // SAFETY: `raw` is valid and not shared.
        unsafe {
            (*raw).ops = ops;
            (*raw).mig_ops = &VTable::<T>::MIG_OPS;
            // The core can report the log only with the bitmaps of iommufd.
            if dma_log && has_dma_log && cfg!(CONFIG_IOMMUFD_DRIVER) {
                (*raw).log_ops = &VTable::<T>::LOG_OPS;
            }
        }
        Ok((dev, released))
    }

    /// Returns the driver's data of the device.
    pub(crate) fn data(&self) -> Option<&T> {
        let dev = self.dev.as_ref()?;
        // SAFETY: `new()` got it from `allocate()`, and `dev` is a reference.
        let this = unsafe { Emulated::<T>::from_raw(dev.as_raw()) };
        Some(&this.private.data)
    }

    /// Creates a device below `parent` and registers it. `defaults` is called first, with the data
    /// of the driver.
    ///
    /// May sleep. The device is live before this returns.
    ///
    /// # Safety
    ///
    /// The driver bound to `parent` must have set `driver.owner` to `T::OwnerModule`, and must
    /// drop the registration before `parent` is unbound from it. There must be no other
    /// registration of a VFIO device below `parent`.
    pub(crate) unsafe fn new(
        parent: &device::Device<Bound>,
        data: impl PinInit<T, Error>,
        defaults: impl FnOnce(&T) -> Result,
        path: Path,
    ) -> Result<Self> {
        let register = match path {
            Path::Core => bindings::vfio_register_emulated_iommu_dev,
            Path::Iommu { .. } => bindings::vfio_register_group_dev,
        };
        let (dev, released) = Self::allocate(parent, data, defaults, path)?;
        let raw = dev.as_raw();
        // SAFETY: `allocate()` allocated and finished it, and `dev` is a reference.
        let this = unsafe { Emulated::<T>::from_raw(raw) };
        this.private.engine.ledger().set_name(parent.name());
        // SAFETY: `raw` is valid and the device is not registered yet.
        unsafe { (*raw).migration_flags = this.private.engine.flags().as_raw() as u32 };
        // SAFETY: `raw` is valid, the parent's driver has an owner, and the operations are
        // complete.
        to_result(unsafe { register(raw) })?;
        // SAFETY: The device is registered, and only the drop of the result unregisters it.
        unsafe { debugfs::create::<Emulated<T>>(raw) };
        Ok(Self {
            dev: Some(dev),
            released,
            _driver: PhantomData,
        })
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        let Some(dev) = self.dev.take() else {
            return;
        };
        // SAFETY: The device is registered, and no lock that its callbacks need is held.
        unsafe { bindings::vfio_unregister_group_dev(dev.as_raw()) };
        drop(dev);
        // A file that is being closed releases the registration first and the device later. Only
        // this wait keeps the module loaded until `release` has been called.
        self.released.wait_for_completion();
    }
}
