// SPDX-License-Identifier: GPL-2.0

//! Software IOMMU of the functions.
//!
//! Each function is in an IOMMU group of its own, and its DMA goes through the page table of the
//! domain that the core of the IOMMU subsystem attaches to it. The users of that core are the
//! container (`vfio_iommu_type1`) and iommufd. They map pinned memory of the user, so an access
//! neither sleeps nor faults.
//!
//! * A domain has a page table with pages of the kernel's size, and with dirty bits if it was
//!   allocated with `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
//! * A spinlock protects the table, and an access holds it while it copies. Therefore, an unmap
//!   waits for the accesses under way, and the memory may be unpinned when it returns. A copy has
//!   at most one page, and no user copy is made under the lock.
//! * The same holds for the lock of the attachment: no access through the old domain is under way
//!   when an attach or a detach returns.
//! * Without a domain with a page table, no access succeeds. The default domain is the identity
//!   domain, because the DMA API is never used with a function: it does DMA only while a user has
//!   it open.
//! * Only memory with a `struct page` that is online, not reserved and not known to be broken can
//!   be accessed. BARs of other devices can be mapped, but an access to them fails.
//!
//! C header: [`include/linux/iommu.h`](srctree/include/linux/iommu.h)

use super::{
    bridge::RescanRemove,
    table::{
        self,
        Access,
        Fault,
        MapError,
        Missing,
        Run,
        Spare,
        Table, //
    }, //
};
use crate::{
    bindings,
    compat::AsRaw,
    dma::Memory,
    memory::GFP_MAYFAIL,
    user::cond_resched, //
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
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        ArcBorrow,
        SpinLock, //
    },
    types::Opaque,
    ThisModule, //
};

/// Number of runs of dirty pages that are taken from a table at once.
const BATCH: usize = 32;

/// The addresses at which the interrupt controller of a PC receives messages. Hardware does not
/// translate them, so a user must not map memory there. Here, accesses to them fail.
const MESSAGES: (bindings::phys_addr_t, usize) = (0xfee0_0000, 0x10_0000);

/// An `enum iommu_cap`. Its name is part of the type of a callback that CONFIG_CFI checks.
#[cfi_encoding = "9iommu_cap"]
#[repr(transparent)]
struct Capability(bindings::iommu_cap);

/// Returns the argument as an `ERR_PTR()`.
fn err_ptr<T>(error: Error) -> *mut T {
    // SAFETY: An FFI call with no additional requirements.
    unsafe { bindings::ERR_PTR(error.to_errno() as c_long) }.cast()
}

/// Memory of page tables: slab, charged to the caller's memory cgroup.
struct Slab;

impl table::Memory for Slab {
    type Box<T> = KBox<T>;
}

/// Provides a node for a mapping.
fn provide(missing: Missing, spare: &mut Spare<Slab>, gfp: bindings::gfp_t) -> Result {
    let flags = if gfp & (1 << bindings::___GFP_DIRECT_RECLAIM_BIT) != 0 {
        GFP_MAYFAIL
    } else {
        GFP_NOWAIT
    };
    match missing {
        Missing::Leaf => spare.leaf = Some(KBox::zeroed(flags)?),
        Missing::Lower => spare.lower = Some(KBox::zeroed(flags)?),
        Missing::Middle => spare.middle = Some(KBox::zeroed(flags)?),
    }
    Ok(())
}

/// The part of a [`Domain`] that changes.
struct State {
    table: Table<Slab>,
    /// Whether writes of devices make pages dirty.
    tracking: bool,
}

/// A domain with a page table.
#[pin_data]
struct Domain {
    raw: Opaque<bindings::iommu_domain>,
    module: &'static ThisModule,
    #[pin]
    state: SpinLock<State>,
}

// SAFETY: The core of the subsystem owns `raw` and serialises its use. The other fields are `Send`.
unsafe impl Send for Domain {}

// SAFETY: As above, and the other fields are `Sync`.
unsafe impl Sync for Domain {}

impl Domain {
    const OPS: bindings::iommu_domain_ops = bindings::iommu_domain_ops {
        attach_dev: Some(Self::attach_dev),
        map_pages: Some(Self::map_pages),
        unmap_pages: Some(Self::unmap_pages),
        iova_to_phys: Some(Self::iova_to_phys),
        enforce_cache_coherency: Some(Self::enforce_cache_coherency),
        free: Some(Self::free),
        ..pin_init::zeroed()
    };

    const DIRTY_OPS: bindings::iommu_dirty_ops = bindings::iommu_dirty_ops {
        set_dirty_tracking: Some(Self::set_dirty_tracking),
        read_and_clear_dirty: Some(Self::read_and_clear_dirty),
    };

    /// Allocates a domain without mappings. May sleep.
    fn new(module: &'static ThisModule, has_dirty_bits: bool) -> Result<Arc<Self>> {
        let raw = bindings::iommu_domain {
            type_: bindings::IOMMU_DOMAIN_UNMANAGED,
            ops: &Self::OPS,
            dirty_ops: if has_dirty_bits {
                &Self::DIRTY_OPS
            } else {
                core::ptr::null()
            },
            pgsize_bitmap: PAGE_SIZE,
            geometry: bindings::iommu_domain_geometry {
                aperture_start: 0,
                aperture_end: table::PAGES * PAGE_SIZE as u64 - 1,
                force_aperture: true,
            },
            ..pin_init::zeroed()
        };
        let state = State {
            table: Table::new(KBox::zeroed(GFP_MAYFAIL)?),
            tracking: false,
        };
        Arc::pin_init(
            pin_init!(Self {
                raw: Opaque::new(raw),
                module,
                state <- new_spinlock!(state, "vfio::soft_pci::Domain"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Passes the domain to the core, until [`free()`](Self::free).
    fn into_raw(self: Arc<Self>) -> *mut bindings::iommu_domain {
        // A domain may outlive the devices that it was attached to.
        // SAFETY: The module is live: the caller is a part of it.
        unsafe { bindings::__module_get(self.module.as_ptr()) };
        // SAFETY: The pointer is valid.
        unsafe { Opaque::cast_into(&raw const (*Arc::into_raw(self)).raw) }
    }

    /// Returns the domain from the pointer in the core.
    ///
    /// # Safety
    ///
    /// `raw` must come from [`into_raw()`](Self::into_raw), and must not be freed for `'a`.
    unsafe fn from_raw<'a>(raw: *mut bindings::iommu_domain) -> ArcBorrow<'a, Self> {
        // SAFETY: `raw` is a field of a `Domain` in an `Arc`, by the safety requirements.
        unsafe { ArcBorrow::from_raw(kernel::container_of!(Opaque::cast_from(raw), Self, raw)) }
    }

    /// Copies bytes between kernel and a page of the user, see [`Endpoint`].
    ///
    /// # Safety
    ///
    /// `bytes` must be valid for a copy by C code, from it if `write` is true, else to it.
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result {
        let (page, offset) = (iova / PAGE_SIZE as u64, iova as usize % PAGE_SIZE);
        if bytes.is_empty() || bytes.len() > PAGE_SIZE - offset {
            return Err(EINVAL);
        }
        let mut state = self.state.lock();
        let frame = state
            .table
            .translate(page, write)
            .map_err(|fault| match fault {
                Fault::Unmapped => EINVAL,
                Fault::Denied => EPERM,
            })?;
        // SAFETY: It accepts any number.
        let memory = unsafe { bindings::vfio_frame_to_page(frame as c_ulong) };
        if memory.is_null() {
            return Err(EFAULT);
        }
        // SAFETY: The user of a domain keeps a mapped page until it is unmapped, which waits for
        // the lock.
        let mapping = unsafe { bindings::kmap_local_page(memory) };
        let (user, kernel) = (mapping.wrapping_byte_add(offset), bytes.cast::<c_void>());
        let (to, from) = if write {
            (user, kernel)
        } else {
            (kernel, user)
        };
        // SAFETY: The bytes are inside of the page, and `bytes` is valid by the safety
        // requirements. They do not overlap in a way that matters: the copy is made by C code, and
        // others may access the user's page at the same time.
        unsafe { bindings::memcpy(to, from, bytes.len()) };
        // SAFETY: This is the last mapping that this task has made.
        unsafe { bindings::kunmap_local(mapping) };
        // Mark after the copy: a user that takes the mark and then reads the page must see the
        // bytes.
        if write && state.tracking {
            state.table.mark(page);
        }
        Ok(())
    }

    /// Maps pages. Returns the number of mapped pages, and the reason if they are fewer.
    fn map(
        &self,
        page: u64,
        frame: u64,
        count: u64,
        access: Access,
        gfp: bindings::gfp_t,
    ) -> (u64, Result) {
        let mut spare = Spare::default();
        let mut done = 0;
        while done < count {
            // The lock is taken for each leaf, so that accesses do not wait for long.
            let mapped = self.state.lock().table.map(
                page + done,
                frame + done,
                count - done,
                access,
                &mut spare,
            );
            match mapped {
                Ok(mapped) => done += mapped,
                Err(MapError::Missing(missing)) => {
                    if let Err(error) = provide(missing, &mut spare, gfp) {
                        return (done, Err(error));
                    }
                }
                Err(MapError::Occupied) => return (done, Err(EEXIST)),
                Err(MapError::Range) => return (done, Err(EINVAL)),
            }
        }
        (done, Ok(()))
    }

    /// # Safety
    ///
    /// Must be called by the core with a domain and a device of the same software IOMMU.
    unsafe extern "C" fn attach_dev(
        domain: *mut bindings::iommu_domain,
        dev: *mut bindings::device,
        _old: *mut bindings::iommu_domain,
    ) -> c_int {
        // SAFETY: The core keeps both for the call.
        let (domain, endpoint) = unsafe { (Self::from_raw(domain), Endpoint::from_raw(dev)) };
        // SAFETY: `Device` is a transparent wrapper of a `struct device`, which is valid.
        let device = unsafe { &*dev.cast::<device::Device>() };
        endpoint.attach(Some(Attachment {
            domain: domain.into(),
            device: device.into(),
        }));
        0
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain. `mapped` must be valid.
    unsafe extern "C" fn map_pages(
        domain: *mut bindings::iommu_domain,
        iova: c_ulong,
        paddr: bindings::phys_addr_t,
        pgsize: usize,
        pgcount: usize,
        prot: c_int,
        gfp: bindings::gfp_t,
        mapped: *mut usize,
    ) -> c_int {
        // SAFETY: The core keeps the domain for the call.
        let this = unsafe { Self::from_raw(domain) };
        let size = PAGE_SIZE as u64;
        let access = Access {
            read: prot & bindings::IOMMU_READ as c_int != 0,
            write: prot & bindings::IOMMU_WRITE as c_int != 0,
        };
        // The domain has one page size, and the core aligns all addresses to it.
        let count = (pgsize / PAGE_SIZE * pgcount) as u64;
        let (done, result) = this.map(iova as u64 / size, paddr / size, count, access, gfp);
        // SAFETY: `mapped` is valid.
        unsafe { *mapped = done as usize * PAGE_SIZE };
        from_result(|| result.map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain.
    unsafe extern "C" fn unmap_pages(
        domain: *mut bindings::iommu_domain,
        iova: c_ulong,
        pgsize: usize,
        pgcount: usize,
        _gather: *mut bindings::iommu_iotlb_gather,
    ) -> usize {
        // SAFETY: The core keeps the domain for the call.
        let this = unsafe { Self::from_raw(domain) };
        let page = (iova / PAGE_SIZE) as u64;
        let count = (pgsize / PAGE_SIZE * pgcount) as u64;
        let mut done = 0;
        while done < count {
            // There is nothing to flush later: the lock waits for the accesses under way.
            match this.state.lock().table.unmap(page + done, count - done) {
                0 => break,
                unmapped => done += unmapped,
            }
        }
        done as usize * PAGE_SIZE
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain.
    unsafe extern "C" fn iova_to_phys(
        domain: *mut bindings::iommu_domain,
        iova: bindings::dma_addr_t,
    ) -> bindings::phys_addr_t {
        let size = PAGE_SIZE as u64;
        // SAFETY: The core keeps the domain for the call.
        let this = unsafe { Self::from_raw(domain) };
        let frame = this.state.lock().table.frame(iova / size);
        frame.map_or(0, |frame| frame * size + iova % size)
    }

    /// The accesses of a function are always coherent.
    extern "C" fn enforce_cache_coherency(_domain: *mut bindings::iommu_domain) -> bool {
        true
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain, which is not attached and is not used later.
    unsafe extern "C" fn free(domain: *mut bindings::iommu_domain) {
        // SAFETY: The core gives up its reference.
        let this =
            unsafe { Arc::from_raw(kernel::container_of!(Opaque::cast_from(domain), Self, raw)) };
        let module = this.module;
        drop(this);
        // SAFETY: The core held the reference since `into_raw()`.
        unsafe { bindings::module_put(module.as_ptr()) };
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain.
    unsafe extern "C" fn set_dirty_tracking(
        domain: *mut bindings::iommu_domain,
        enabled: bool,
    ) -> c_int {
        // SAFETY: The core keeps the domain for the call.
        unsafe { Self::from_raw(domain) }.state.lock().tracking = enabled;
        0
    }

    /// # Safety
    ///
    /// Must be called by the core with such a domain. `dirty` must be valid.
    unsafe extern "C" fn read_and_clear_dirty(
        domain: *mut bindings::iommu_domain,
        iova: c_ulong,
        size: usize,
        flags: c_ulong,
        dirty: *mut bindings::iommu_dirty_bitmap,
    ) -> c_int {
        // SAFETY: The core keeps the domain for the call.
        let this = unsafe { Self::from_raw(domain) };
        // SAFETY: `dirty` is valid.
        let is_read = unsafe { !(*dirty).bitmap.is_null() };
        if is_read && !this.state.lock().tracking {
            return EINVAL.to_errno();
        }
        let clear = flags & bindings::IOMMU_DIRTY_NO_CLEAR as c_ulong == 0;
        let end = ((iova + size) / PAGE_SIZE) as u64;
        let mut from = Some((iova / PAGE_SIZE) as u64);
        let mut runs = [Run::default(); BATCH];
        while let Some(first) = from {
            let (count, next) = this
                .state
                .lock()
                .table
                .take_dirty(first, end, clear, &mut runs);
            // The bitmap is memory of the user, so no lock is held.
            for run in runs.iter().take(count) {
                let (first, len) = (run.first as usize, run.count as usize);
                // SAFETY: `dirty` is valid, and the bytes are between `iova` and its end.
                unsafe {
                    bindings::vfio_iommu_dirty_bitmap_record(
                        dirty,
                        first * PAGE_SIZE,
                        len * PAGE_SIZE,
                    )
                };
            }
            cond_resched();
            from = next;
        }
        0
    }
}

/// A domain with a page table that is attached to a function.
struct Attachment {
    domain: Arc<Domain>,
    device: ARef<device::Device>,
}

/// The part of the software IOMMU that belongs to one function.
#[pin_data]
pub(super) struct Endpoint {
    /// [`None`] while the function is blocked or has the identity domain. Outside of the lock of
    /// the domain.
    #[pin]
    attachment: SpinLock<Option<Attachment>>,
}

impl Endpoint {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                attachment <- new_spinlock!(None, "vfio::soft_pci::Endpoint"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the endpoint of a function.
    ///
    /// Fails with `ENODEV` if the device is not a function behind this IOMMU.
    pub(super) fn of(device: &device::Device<Bound>) -> Result<Arc<Self>> {
        let dev = device.as_raw();
        // SAFETY: The device is bound to a driver. The core of the subsystem sets these fields when
        // the device is added, and clears them when it is removed, which unbinds it first.
        let endpoint = unsafe {
            let iommu = (*dev).iommu;
            if iommu.is_null() || (*iommu).iommu_dev.is_null() || (*iommu).fwspec.is_null() {
                return Err(ENODEV);
            }
            let ops = (*(*(*iommu).fwspec).iommu_fwnode).ops;
            if !core::ptr::eq(ops, &FWNODE_OPS) {
                return Err(ENODEV);
            }
            Self::from_raw(dev)
        };
        Ok(endpoint.into())
    }

    /// Returns the endpoint of a function.
    ///
    /// # Safety
    ///
    /// `dev` must be probed by this IOMMU, and must not be released for `'a`.
    unsafe fn from_raw<'a>(dev: *mut bindings::device) -> ArcBorrow<'a, Self> {
        // SAFETY: `probe_device()` has set this field.
        unsafe { ArcBorrow::from_raw((*(*dev).iommu).priv_.cast::<Self>()) }
    }

    /// Replaces the attached domain. When this returns, no access through the old one is under way.
    fn attach(&self, attachment: Option<Attachment>) {
        let old = core::mem::replace(&mut *self.attachment.lock(), attachment);
        // Not under the lock.
        drop(old);
    }
}

impl Memory for Endpoint {
    /// Copies bytes like [`Memory::copy()`]. Does not sleep.
    ///
    /// Fails with `EINVAL` if nothing is mapped, with `EPERM` if the mapping does not allow the
    /// access, and with `EFAULT` if something other than memory is mapped. Then nothing is copied.
    /// The fault is traced as `iommu:io_page_fault` if a domain with a page table is attached.
    unsafe fn copy(&self, iova: u64, bytes: *mut [u8], write: bool) -> Result {
        let attachment = self.attachment.lock();
        let attachment = (*attachment).as_ref().ok_or(EINVAL)?;
        // SAFETY: By the safety requirements.
        let result = unsafe { attachment.domain.copy(iova, bytes, write) };
        if result.is_err() {
            let flags = if write {
                bindings::IOMMU_FAULT_WRITE
            } else {
                bindings::IOMMU_FAULT_READ
            };
            // SAFETY: Domain and device are valid, because the attachment refers to them.
            unsafe {
                bindings::report_iommu_fault(
                    attachment.domain.raw.get(),
                    attachment.device.as_raw(),
                    iova as c_ulong,
                    flags as c_int,
                )
            };
        }
        result
    }
}

/// The operations of firmware nodes. They are empty, but their address distinguishes the nodes of
/// this IOMMU from others.
static FWNODE_OPS: bindings::fwnode_operations = pin_init::zeroed();

/// A software IOMMU for the functions on one bus.
///
/// It has a firmware node of its own, so that the core of the subsystem lets it probe these
/// functions only, whether or not the machine has other IOMMUs.
#[pin_data(PinnedDrop)]
pub(super) struct SoftIommu {
    #[pin]
    ops: Opaque<bindings::iommu_ops>,
    #[pin]
    identity: Opaque<bindings::iommu_domain>,
    #[pin]
    blocked: Opaque<bindings::iommu_domain>,
    #[pin]
    fwnode: Opaque<bindings::fwnode_handle>,
    #[pin]
    device: Opaque<bindings::iommu_device>,
    bus: *mut bindings::pci_bus,
    module: &'static ThisModule,
    /// Registered last.
    #[pin]
    notifier: Opaque<bindings::notifier_block>,
}

// SAFETY: Other threads can only drop it. The core of the subsystem serialises everything else.
unsafe impl Send for SoftIommu {}

// SAFETY: A shared reference allows no operations.
unsafe impl Sync for SoftIommu {}

impl SoftIommu {
    /// The operations of domains without a page table.
    const STATIC_OPS: bindings::iommu_domain_ops = bindings::iommu_domain_ops {
        attach_dev: Some(Self::block),
        ..pin_init::zeroed()
    };

    /// Registers an IOMMU for the functions that are added to `bus` from now on. May sleep.
    ///
    /// Each function and each domain keeps a reference to the module. Fails with the errors of
    /// `iommu_device_register()`.
    ///
    /// # Safety
    ///
    /// `bus` must be valid until the result is dropped. It must have no devices then, and none now.
    pub(super) unsafe fn new(
        bus: *mut bindings::pci_bus,
        module: &'static ThisModule,
    ) -> impl PinInit<Self, Error> {
        let static_domain = |type_| {
            Opaque::new(bindings::iommu_domain {
                type_,
                ops: &Self::STATIC_OPS,
                ..pin_init::zeroed()
            })
        };
        try_pin_init!(&this in Self {
            identity: static_domain(bindings::IOMMU_DOMAIN_IDENTITY),
            blocked: static_domain(bindings::IOMMU_DOMAIN_BLOCKED),
            ops: Opaque::new(bindings::iommu_ops {
                // SAFETY: `Capability` is a transparent wrapper of the argument's type.
                capable: Some(unsafe {
                    core::mem::transmute::<
                        extern "C" fn(*mut bindings::device, Capability) -> bool,
                        unsafe extern "C" fn(*mut bindings::device, bindings::iommu_cap) -> bool,
                    >(Self::capable)
                }),
                domain_alloc_paging_flags: Some(Self::domain_alloc_paging_flags),
                probe_device: Some(Self::probe_device),
                release_device: Some(Self::release_device),
                device_group: Some(bindings::generic_device_group),
                get_resv_regions: Some(Self::get_resv_regions),
                def_domain_type: Some(Self::def_domain_type),
                default_domain_ops: &Domain::OPS,
                owner: module.as_ptr(),
                // SAFETY: The fields are in the memory that is being initialised.
                identity_domain: unsafe { Opaque::cast_into(&raw const (*this.as_ptr()).identity) },
                // SAFETY: As above.
                blocked_domain: unsafe { Opaque::cast_into(&raw const (*this.as_ptr()).blocked) },
                // SAFETY: As above.
                release_domain: unsafe { Opaque::cast_into(&raw const (*this.as_ptr()).blocked) },
                ..pin_init::zeroed()
            }),
            fwnode <- Opaque::ffi_init(|fwnode: *mut bindings::fwnode_handle| {
                // SAFETY: `fwnode` is valid for writes, and pinned.
                unsafe {
                    fwnode.write(bindings::fwnode_handle {
                        ops: &FWNODE_OPS,
                        ..pin_init::zeroed()
                    });
                    bindings::INIT_LIST_HEAD(&raw mut (*fwnode).suppliers);
                    bindings::INIT_LIST_HEAD(&raw mut (*fwnode).consumers);
                }
            }),
            device: Opaque::new(bindings::iommu_device {
                // SAFETY: The field is in the memory that is being initialised.
                fwnode: unsafe { Opaque::cast_into(&raw const (*this.as_ptr()).fwnode) },
                ..pin_init::zeroed()
            }),
            bus,
            module,
            notifier <- Opaque::try_ffi_init(|notifier: *mut bindings::notifier_block| {
                // SAFETY: `notifier` is valid for writes. All other fields are initialised, and
                // pinned until they are unregistered.
                unsafe {
                    notifier.write(bindings::notifier_block {
                        notifier_call: Some(Self::notify),
                        // Before that of the core, which probes the device.
                        priority: 1,
                        ..pin_init::zeroed()
                    });
                    Self::register(&*this.as_ptr(), notifier)
                }
            }),
        }? Error)
    }

    /// Registers the IOMMU and the notifier, or nothing.
    ///
    /// The core probes the devices of all buses: it allocates `dev->iommu` of a device without an
    /// IOMMU, and frees it. A function that is being added to the bus of another driver is such a
    /// device until [`notify()`](Self::notify), which cannot lock `dev->iommu` in a module.
    /// Therefore, no function is added meanwhile.
    ///
    /// # Safety
    ///
    /// `self` must be pinned, and `notifier` valid, until they are unregistered.
    unsafe fn register(&self, notifier: *mut bindings::notifier_block) -> Result {
        let device = self.device.get();
        // SAFETY: The name of a module is a string.
        let name = unsafe { &raw const (*self.module.as_ptr()).name };
        // SAFETY: `device` is valid, and the format has one argument, a string.
        to_result(unsafe {
            bindings::iommu_device_sysfs_add(
                device,
                core::ptr::null_mut(),
                core::ptr::null_mut(),
                c"soft-iommu.%s".as_char_ptr(),
                name,
            )
        })?;
        let lock = RescanRemove::lock();
        // SAFETY: `device` and the operations are valid until they are unregistered.
        let registered = to_result(unsafe {
            bindings::iommu_device_register(device, self.ops.get(), core::ptr::null_mut())
        });
        drop(lock);
        if registered.is_err() {
            // SAFETY: It was added above.
            unsafe { bindings::iommu_device_sysfs_remove(device) };
            return registered;
        }
        // SAFETY: `notifier` is valid until it is unregistered. It fails only for an unknown bus.
        to_result(unsafe {
            bindings::bus_register_notifier(&raw const bindings::pci_bus_type, notifier)
        })
        .inspect_err(|_| self.unregister())
    }

    /// Unregisters the IOMMU.
    fn unregister(&self) {
        let device = self.device.get();
        // The core looks at `dev->iommu` of all devices without a lock.
        let lock = RescanRemove::lock();
        // SAFETY: It was registered by `register()`.
        unsafe { bindings::iommu_device_unregister(device) };
        drop(lock);
        // SAFETY: It was added by `register()`.
        unsafe { bindings::iommu_device_sysfs_remove(device) };
    }

    /// Assigns devices on the bus to this IOMMU, whether they are plugged or found by a scan.
    ///
    /// # Safety
    ///
    /// Must be called by the core as notifier of the bus type of PCI.
    unsafe extern "C" fn notify(
        notifier: *mut bindings::notifier_block,
        action: c_ulong,
        data: *mut c_void,
    ) -> c_int {
        if action != bindings::bus_notifier_event_BUS_NOTIFY_ADD_DEVICE as c_ulong {
            return bindings::NOTIFY_DONE as c_int;
        }
        let dev = data.cast::<bindings::device>();
        // SAFETY: The notifier is in a `SoftIommu`, and the device in a `struct pci_dev`.
        let (this, pdev) = unsafe {
            let this = kernel::container_of!(Opaque::cast_from(notifier), Self, notifier);
            (&*this, kernel::container_of!(dev, bindings::pci_dev, dev))
        };
        // SAFETY: The device is being added, so that no driver is bound to it yet.
        let bus = unsafe { (*pdev).bus };
        if bus == this.bus {
            // Nothing answers at the addresses in BARs, so they must not be mapped.
            // SAFETY: As above.
            unsafe { bindings::pci_dev::set_non_mappable_bars_raw(pdev, 1) };
            // SAFETY: The device is being added, and the node is that of a registered IOMMU.
            let error = unsafe { bindings::vfio_iommu_fwspec_init(dev, this.fwnode.get()) };
            if error != 0 {
                // SAFETY: `Device` is a transparent wrapper of a `struct device`.
                let device = unsafe { &*dev.cast::<device::Device>() };
                dev_err!(device, "no IOMMU: {error}\n");
            }
        }
        bindings::NOTIFY_DONE as c_int
    }

    /// Returns whether the IOMMU has a capability.
    extern "C" fn capable(_dev: *mut bindings::device, capability: Capability) -> bool {
        matches!(
            capability.0,
            bindings::iommu_cap_IOMMU_CAP_CACHE_COHERENCY
                | bindings::iommu_cap_IOMMU_CAP_ENFORCE_CACHE_COHERENCY
                | bindings::iommu_cap_IOMMU_CAP_DIRTY_TRACKING
        )
    }

    /// Allocates a domain with a page table. It cannot have PASIDs or nested domains.
    ///
    /// # Safety
    ///
    /// Must be called by the core with a device that this IOMMU has probed.
    unsafe extern "C" fn domain_alloc_paging_flags(
        dev: *mut bindings::device,
        flags: u32,
        user_data: *const bindings::iommu_user_data,
    ) -> *mut bindings::iommu_domain {
        const DIRTY_TRACKING: u32 =
            bindings::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING;
        if flags & !DIRTY_TRACKING != 0 || !user_data.is_null() {
            return err_ptr(EOPNOTSUPP);
        }
        // SAFETY: The core set this field to the result of `probe_device()`, a field of `Self`.
        let this = unsafe {
            let device = (*(*dev).iommu).iommu_dev;
            &*kernel::container_of!(Opaque::cast_from(device), Self, device)
        };
        Domain::new(this.module, flags & DIRTY_TRACKING != 0).map_or_else(err_ptr, Domain::into_raw)
    }

    /// Creates the endpoint of a function.
    ///
    /// # Safety
    ///
    /// Must be called by the core with a device whose firmware node is that of this IOMMU.
    unsafe extern "C" fn probe_device(dev: *mut bindings::device) -> *mut bindings::iommu_device {
        // SAFETY: The firmware node is a field of `Self`.
        let this = unsafe {
            let fwnode = (*(*(*dev).iommu).fwspec).iommu_fwnode;
            &*kernel::container_of!(Opaque::cast_from(fwnode), Self, fwnode)
        };
        match Endpoint::new() {
            Ok(endpoint) => {
                let endpoint = Arc::into_raw(endpoint).cast_mut().cast::<c_void>();
                // SAFETY: The core holds the lock that this needs. `release_device()` takes the
                // reference back.
                unsafe { bindings::dev_iommu_priv_set(dev, endpoint) };
                this.device.get()
            }
            Err(error) => err_ptr(error),
        }
    }

    /// Drops the endpoint of a function.
    ///
    /// # Safety
    ///
    /// Must be called by the core with a device that this IOMMU has probed, after its last domain.
    unsafe extern "C" fn release_device(dev: *mut bindings::device) {
        // SAFETY: `probe_device()` has set this field to a reference.
        drop(unsafe { Arc::from_raw((*(*dev).iommu).priv_.cast::<Endpoint>()) });
    }

    /// Attaches a domain without page table.
    ///
    /// # Safety
    ///
    /// Must be called by the core with a device that this IOMMU has probed.
    unsafe extern "C" fn block(
        _domain: *mut bindings::iommu_domain,
        dev: *mut bindings::device,
        _old: *mut bindings::iommu_domain,
    ) -> c_int {
        // SAFETY: The core keeps the device for the call.
        unsafe { Endpoint::from_raw(dev) }.attach(None);
        0
    }

    /// Chooses the identity domain as default domain.
    extern "C" fn def_domain_type(_dev: *mut bindings::device) -> c_int {
        bindings::IOMMU_DOMAIN_IDENTITY as c_int
    }

    /// # Safety
    ///
    /// Must be called by the core. `list` must be a valid list.
    unsafe extern "C" fn get_resv_regions(
        _dev: *mut bindings::device,
        list: *mut bindings::list_head,
    ) {
        let (start, len) = MESSAGES;
        // SAFETY: An FFI call with no additional requirements.
        let region = unsafe {
            bindings::iommu_alloc_resv_region(
                start,
                len,
                0,
                bindings::iommu_resv_type_IOMMU_RESV_MSI,
                bindings::GFP_KERNEL,
            )
        };
        if !region.is_null() {
            // SAFETY: Both are valid. The caller frees the region.
            unsafe { bindings::list_add_tail(&raw mut (*region).list, list) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for SoftIommu {
    fn drop(self: Pin<&mut Self>) {
        let notifier = self.notifier.get();
        // SAFETY: The notifier is registered.
        unsafe { bindings::bus_unregister_notifier(&raw const bindings::pci_bus_type, notifier) };
        self.unregister();
    }
}
