// SPDX-License-Identifier: GPL-2.0

//! The operations of a variant driver's device for the core.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    migration::file_to_ptr,
    pci::{
        device::Variant,
        Operations, //
    },
    region::INDEX_SHIFT,
    user::UserBuf, //
};
use core::marker::PhantomData;
use kernel::{
    error::{
        from_result,
        to_result, //
    },
    ioctl::_IO,
    page::PAGE_SHIFT,
    prelude::*,
    uaccess::UserPtr, //
};

/// `VFIO_DEVICE_IOEVENTFD`.
const IOEVENTFD: u32 = _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + 16);

/// Returns the index of the region at a position in the device file.
fn index_at(pos: i64) -> u32 {
    u32::try_from(pos >> INDEX_SHIFT).unwrap_or(u32::MAX)
}

/// Returns the index of the region at a page of the device file, and the page in it.
fn place(pgoff: c_ulong) -> (u32, usize) {
    let shift = INDEX_SHIFT - PAGE_SHIFT as u32;
    let index = u32::try_from(pgoff >> shift).unwrap_or(u32::MAX);
    (index, pgoff & ((1 << shift) - 1))
}

/// The operations of driver `T` for the core.
pub(super) struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    /// The operations while [`Variant::private`] is not initialised.
    pub(super) const UNINIT_OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        release: Some(bindings::vfio_pci_core_release_dev),
        ..Self::OPS
    };

    /// The operations of a device that is initialised.
    pub(super) const OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        name: core::ptr::from_ref(T::NAME).cast::<c_char>().cast_mut(),
        init: Some(bindings::vfio_pci_core_init_dev),
        release: Some(Self::release),
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_physical_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_physical_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_physical_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_physical_detach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        pasid_attach_ioas: Some(bindings::vfio_iommufd_physical_pasid_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        pasid_detach_ioas: Some(bindings::vfio_iommufd_physical_pasid_detach_ioas),
        open_device: Some(Self::open_device),
        close_device: Some(Self::close_device),
        ioctl: Some(Self::ioctl),
        get_region_info_caps: Some(Self::get_region_info_caps),
        device_feature: Some(bindings::vfio_pci_core_ioctl_feature),
        read: Some(Self::read),
        write: Some(Self::write),
        mmap: Some(Self::mmap),
        request: Some(bindings::vfio_pci_core_request),
        match_: Some(bindings::vfio_pci_core_match),
        match_token_uuid: Some(bindings::vfio_pci_core_match_token_uuid),
        ..pin_init::zeroed()
    };

    /// The operations of the migration, which the engine implements.
    pub(super) const MIG_OPS: bindings::vfio_migration_ops = bindings::vfio_migration_ops {
        migration_set_state: Some(Self::migration_set_state),
        migration_get_state: Some(Self::migration_get_state),
        migration_get_data_size: Some(Self::migration_get_data_size),
    };

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, when its last reference is
    /// gone.
    unsafe extern "C" fn release(vdev: *mut bindings::vfio_device) {
        // SAFETY: The device is valid, and by the type invariants its private part is initialised.
        let private = unsafe { &raw mut (*vdev.cast::<Variant<T>>()).private };
        // SAFETY: As above.
        let released = unsafe { (*private).released.clone() };
        // SAFETY: The private part is not used any more, and neither is that of the core, which
        // frees the memory.
        unsafe {
            core::ptr::drop_in_place(private);
            bindings::vfio_pci_core_release_dev(vdev);
        }
        released.complete_all();
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn open_device(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Variant::<T>::from_raw(vdev) };
        let core = this.core.get();
        from_result(|| {
            let exclusion = this.exclude_resets_killable()?;
            // SAFETY: The device is being opened.
            to_result(unsafe { bindings::vfio_pci_core_enable(core) })?;
            drop(exclusion);
            // SAFETY: The device is enabled. Either this fails, or `close_device()` follows.
            unsafe { this.open() }.inspect_err(|_| {
                let _exclusion = this.exclude_resets();
                // SAFETY: The device is enabled and not in use.
                unsafe { bindings::vfio_pci_core_disable(core) };
            })?;
            // SAFETY: The device is enabled.
            unsafe { bindings::vfio_pci_core_finish_enable(core) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, which is open.
    unsafe extern "C" fn close_device(vdev: *mut bindings::vfio_device) {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Variant::<T>::from_raw(vdev) };
        this.close();
        let _exclusion = this.exclude_resets();
        // SAFETY: The device is open, and there is no other call of its file.
        unsafe { bindings::vfio_pci_core_close_device(vdev) };
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations. `ppos` must be valid.
    unsafe extern "C" fn read(
        vdev: *mut bindings::vfio_device,
        buf: *mut c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Variant::<T>::from_raw(vdev), &mut *ppos) };
        from_result(|| {
            let opened = this.settled()?;
            if opened.is_direct(index_at(*ppos)) {
                // SAFETY: These are the arguments of the core.
                return Ok(unsafe { bindings::vfio_pci_core_read(vdev, buf, count, ppos) });
            }
            UserBuf::serve(
                UserPtr::from_ptr(buf.cast()),
                count,
                ppos,
                |user, pos| this.read(&opened, user, pos), //
            )
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations. `ppos` must be valid.
    unsafe extern "C" fn write(
        vdev: *mut bindings::vfio_device,
        buf: *const c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Variant::<T>::from_raw(vdev), &mut *ppos) };
        from_result(|| {
            let opened = this.settled()?;
            if opened.is_direct(index_at(*ppos)) {
                return this.call(&opened, || {
                    // SAFETY: These are the arguments of the core.
                    unsafe { bindings::vfio_pci_core_write(vdev, buf, count, ppos) }
                });
            }
            UserBuf::serve(
                UserPtr::from_ptr(buf.cast_mut().cast()),
                count,
                ppos,
                |user, pos| this.write(&opened, user, pos), //
            )
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations.
    unsafe extern "C" fn ioctl(
        vdev: *mut bindings::vfio_device,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Variant::<T>::from_raw(vdev) };
        from_result(|| {
            let opened = this.settled()?;
            // It would write without the crate's knowledge.
            if cmd == IOEVENTFD && !opened.is_all_direct() {
                return Err(ENOTTY);
            }
            this.call(&opened, || {
                // SAFETY: These are the arguments of the core.
                unsafe { bindings::vfio_pci_core_ioctl(vdev, cmd, arg) }
            })
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `info` and `caps` must be
    /// valid.
    unsafe extern "C" fn get_region_info_caps(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: These are the arguments of the core.
        let done = unsafe { bindings::vfio_pci_ioctl_get_region_info(vdev, info, caps) };
        // SAFETY: The core holds a reference for the call, and `info` is valid.
        let (this, info) = unsafe { (Variant::<T>::from_raw(vdev), &mut *info) };
        if let Ok(opened) = this.opened() {
            if !opened.is_mappable(info.index) {
                info.flags &= !bindings::VFIO_REGION_INFO_FLAG_MMAP;
            }
        }
        done
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations, in an mmap() of its
    /// file that sets up `vma`.
    unsafe extern "C" fn mmap(
        vdev: *mut bindings::vfio_device,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and `vma` is valid.
        let (this, pgoff) = unsafe { (Variant::<T>::from_raw(vdev), (*vma).vm_pgoff) };
        from_result(|| {
            let opened = this.opened()?;
            let (index, _) = place(pgoff);
            if !opened.is_mappable(index) {
                return Err(EINVAL);
            }
            // SAFETY: These are the arguments of the core.
            to_result(unsafe { bindings::vfio_pci_core_mmap(vdev, vma) })?;
            if !opened.is_direct(index) {
                // SAFETY: The area is undergoing its setup. `index` is that of a BAR, for which the
                // core has stored the device in `vm_private_data`, as `fault()` needs.
                unsafe { (*vma).vm_ops = &Self::VM_OPS };
            }
            Ok(0)
        })
    }

    /// The operations of areas of tracked regions.
    ///
    /// With `pfn_mkwrite`, the kernel calls the fault handler before a page becomes writable.
    /// Without `map_pages`, it calls both with `mmap_lock` held, and not only with the lock of the
    /// area; see `vmf_can_call_fault()`.
    const VM_OPS: bindings::vm_operations_struct = bindings::vm_operations_struct {
        fault: Some(Self::fault),
        pfn_mkwrite: Some(Self::fault),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Must be called by the core in a page fault on an area with these operations.
    unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The core holds a lock of the area, so that the area is not removed before the
        // lock is released. The area has a reference to the file of the device, and the device is
        // open, with a reference count that is not zero, until the file is released.
        // `vfio_pci_core_mmap()` has stored the `struct vfio_pci_core_device` in `vm_private_data`,
        // which nothing changes. It begins with the `struct vfio_device`.
        let (this, pgoff) = unsafe {
            let vma = (*vmf).__bindgen_anon_1.vma;
            let vdev = (*vma).vm_private_data.cast();
            (Variant::<T>::from_raw(vdev), (*vmf).__bindgen_anon_1.pgoff)
        };
        let (index, page) = place(pgoff);
        // SAFETY: By the safety requirements. `mmap()` has given these operations only to areas
        // made by `vfio_pci_core_mmap()`, of one region, to which all pages of the area belong.
        unsafe { this.fault(vmf, index, page) }
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations.
    unsafe extern "C" fn migration_set_state(
        vdev: *mut bindings::vfio_device,
        new_state: bindings::vfio_device_mig_state,
    ) -> *mut bindings::file {
        // SAFETY: The core holds a reference for the call, and keeps the device open.
        let (this, device) =
            unsafe { (Variant::<T>::from_raw(vdev), Device::<Open>::from_raw(vdev)) };
        file_to_ptr(this.set_state(device, new_state.0))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, open or not. `state` must be
    /// valid.
    unsafe extern "C" fn migration_get_state(
        vdev: *mut bindings::vfio_device,
        state: *mut bindings::vfio_device_mig_state,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Variant::<T>::from_raw(vdev) };
        // SAFETY: `state` is valid.
        unsafe { (*state).0 = this.state().as_raw() };
        0
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `length` must be valid.
    unsafe extern "C" fn migration_get_data_size(
        vdev: *mut bindings::vfio_device,
        length: *mut c_ulong,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Variant::<T>::from_raw(vdev) };
        from_result(|| {
            let opened = this.settled()?;
            let size = this.private.engine.data_size(&opened)?;
            // SAFETY: `length` is valid.
            unsafe { *length = size as c_ulong };
            Ok(0)
        })
    }
}
