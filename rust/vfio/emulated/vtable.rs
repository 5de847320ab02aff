// SPDX-License-Identifier: GPL-2.0

//! The operations of a device for the core.
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use super::Operations;
use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    dma::LogRequest,
    emulated::device::Emulated,
    migration::file_to_ptr,
    region::{
        self,
        Position, //
    },
    user::UserBuf, //
};
use core::{
    marker::PhantomData,
    mem::offset_of, //
};
use kernel::{
    device,
    error::from_result,
    prelude::*,
    uaccess::UserPtr, //
};

/// The operations of driver `T` for the core.
pub(super) struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    /// The operations while [`Emulated::private`] is not initialised.
    pub(super) const UNINIT_OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        release: None,
        ..Self::OPS
    };

    /// The operations of a device behind an IOMMU that is initialised.
    pub(super) const IOMMU_OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_physical_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_physical_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_physical_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_physical_detach_ioas),
        ..Self::OPS
    };

    /// The operations of a device without an IOMMU that is initialised.
    pub(super) const OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        name: core::ptr::from_ref(T::NAME).cast::<c_char>().cast_mut(),
        release: Some(Self::release),
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_emulated_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_emulated_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_emulated_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_emulated_detach_ioas),
        open_device: Some(Self::open_device),
        close_device: Some(Self::close_device),
        read: Some(Self::read),
        write: Some(Self::write),
        ioctl: Some(Self::ioctl),
        mmap: Some(Self::mmap),
        get_region_info_caps: Some(Self::get_region_info_caps),
        request: Some(Self::request),
        ..pin_init::zeroed()
    };

    /// The operations of the migration, which the engine implements.
    pub(super) const MIG_OPS: bindings::vfio_migration_ops = bindings::vfio_migration_ops {
        migration_set_state: Some(Self::migration_set_state),
        migration_get_state: Some(Self::migration_get_state),
        migration_get_data_size: Some(Self::migration_get_data_size),
    };

    /// The operations of the DMA log.
    pub(super) const LOG_OPS: bindings::vfio_log_ops = bindings::vfio_log_ops {
        log_start: Some(Self::log_start),
        log_stop: Some(Self::log_stop),
        log_read_and_clear: Some(Self::log_read_and_clear),
    };

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, when its last reference is
    /// gone.
    unsafe extern "C" fn release(vdev: *mut bindings::vfio_device) {
        // SAFETY: The device is valid, and by the type invariants its private part is initialised.
        let private = unsafe { &raw mut (*vdev.cast::<Emulated<T>>()).private };
        // SAFETY: As above.
        let released = unsafe { (*private).released.clone() };
        // SAFETY: The private part is not used any more. The core frees the memory.
        unsafe { core::ptr::drop_in_place(private) };
        released.complete_all();
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn open_device(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| this.open().map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn close_device(vdev: *mut bindings::vfio_device) {
        // SAFETY: The core holds a reference for the call.
        unsafe { Emulated::<T>::from_raw(vdev) }.close();
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ppos` must be valid.
    unsafe extern "C" fn read(
        vdev: *mut bindings::vfio_device,
        buf: *mut c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *ppos) };
        let to = UserPtr::from_ptr(buf.cast());
        from_result(|| UserBuf::serve(to, count, ppos, |user, pos| this.read(user, pos)))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ppos` must be valid.
    unsafe extern "C" fn write(
        vdev: *mut bindings::vfio_device,
        buf: *const c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *ppos) };
        let from = UserPtr::from_ptr(buf.cast_mut().cast());
        from_result(|| UserBuf::serve(from, count, ppos, |user, pos| this.write(user, pos)))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn ioctl(
        vdev: *mut bindings::vfio_device,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| this.ioctl(cmd, arg).map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations, in an mmap() of its
    /// file that sets up `vma`.
    unsafe extern "C" fn mmap(
        vdev: *mut bindings::vfio_device,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and keeps the device open.
        let (this, device) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                Device::<Open>::from_raw(vdev),
            )
        };
        // SAFETY: By the safety requirements.
        from_result(|| unsafe { this.mmap(device, vma) }.map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `info` must be valid.
    unsafe extern "C" fn get_region_info_caps(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        _caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and `info` is valid.
        let (this, info) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *info) };
        if info.index >= region::COUNT {
            return EINVAL.to_errno();
        }
        info.size = this.region_size(info.index);
        info.offset = Position::start_of(info.index);
        info.flags = if info.size == 0 {
            0
        } else {
            bindings::VFIO_REGION_INFO_FLAG_READ | bindings::VFIO_REGION_INFO_FLAG_WRITE
        };
        let opened = this.opened();
        if opened.is_ok_and(|opened| opened.mappable(info.index).is_some()) {
            info.flags |= bindings::VFIO_REGION_INFO_FLAG_MMAP;
        }
        0
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn request(vdev: *mut bindings::vfio_device, count: c_uint) {
        // SAFETY: The core holds a reference for the call, and the parent is bound to its driver
        // until the registration is dropped, which waits for this.
        let (this, parent) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                device::Device::from_raw((*vdev).dev),
            )
        };
        if let Ok(opened) = this.opened() {
            // A transfer may keep the memory of a dead process, and with it the device, alive.
            opened.function.gate.interrupt();
            opened.function.irqs.request(parent, count);
        }
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations.
    unsafe extern "C" fn migration_set_state(
        vdev: *mut bindings::vfio_device,
        new_state: bindings::vfio_device_mig_state,
    ) -> *mut bindings::file {
        // SAFETY: The core holds a reference for the call, and keeps the device open.
        let (this, device) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                Device::<Open>::from_raw(vdev),
            )
        };
        let engine = &this.private.engine;
        let file = this.opened().and_then(|opened| {
            this.note_dropped_stores(&opened);
            engine.set_state(&opened, device, new_state.0)
        });
        file_to_ptr(file)
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
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        // SAFETY: `state` is valid.
        unsafe { (*state).0 = this.private.engine.state().as_raw() };
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
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            let opened = this.opened()?;
            let size = this.private.engine.data_size(&opened)?;
            // SAFETY: `length` is valid.
            unsafe { *length = size as c_ulong };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ranges` must be a tree of
    /// `nnodes` nodes, and `page_size` must be valid.
    unsafe extern "C" fn log_start(
        vdev: *mut bindings::vfio_device,
        ranges: *mut bindings::rb_root_cached,
        nnodes: u32,
        page_size: *mut u64,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and `page_size` is valid.
        let (this, page_size) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *page_size) };
        from_result(|| {
            let opened = this.opened()?;
            let mut list = KVVec::with_capacity(nnodes as usize, GFP_KERNEL_ACCOUNT)?;
            // SAFETY: The tree is valid.
            let mut node = unsafe { (*ranges).rb_leftmost };
            while !node.is_null() {
                const { assert!(offset_of!(bindings::interval_tree_node, rb) == 0) };
                // SAFETY: The node is the first field of one in an interval tree.
                let range = unsafe { &*node.cast::<bindings::interval_tree_node>() };
                // The core accepts empty ranges, whose last byte is before the first.
                if range.last.wrapping_add(1) == range.start {
                    return Err(EINVAL);
                }
                list.push((range.start as u64, range.last as u64), GFP_KERNEL_ACCOUNT)?;
                // SAFETY: The node is valid.
                node = unsafe { bindings::rb_next(node) };
            }
            let started = T::begin_log(&opened.data, LogRequest::Start)
                .and_then(|()| opened.log.start(list, *page_size));
            let ledger = this.private.engine.ledger();
            ledger.log_start(started.map(|_| ()));
            *page_size = started?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn log_stop(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            let opened = this.opened()?;
            let begun = T::begin_log(&opened.data, LogRequest::Stop);
            let ledger = this.private.engine.ledger();
            ledger.log_stop(begun, opened.log.has_pages());
            begun?;
            opened.log.stop();
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `dirty` must be valid.
    unsafe extern "C" fn log_read_and_clear(
        vdev: *mut bindings::vfio_device,
        iova: c_ulong,
        length: c_ulong,
        dirty: *mut bindings::iova_bitmap,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            let last = length
                .checked_sub(1)
                .and_then(|more| iova.checked_add(more))
                .ok_or(EINVAL)?;
            let opened = this.opened()?;
            let report = |first, len| {
                // SAFETY: The bitmap is valid, and no lock is held.
                unsafe { bindings::vfio_iova_bitmap_set(dirty, first as c_ulong, len as usize) };
            };
            let done = T::begin_log(&opened.data, LogRequest::Report)
                .and_then(|()| opened.log.report(iova as u64, last as u64, report));
            this.private.engine.ledger().log_report(done);
            done.map(|()| 0)
        })
    }
}
