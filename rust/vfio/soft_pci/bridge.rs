// SPDX-License-Identifier: GPL-2.0

//! A host bridge without hardware, and the slots on its bus.
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use crate::{
    bindings,
    emulated::config_space::{
        self,
        ConfigSpace, //
    },
};
use core::{
    mem::offset_of,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    fmt,
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc,
        Completion,
        Mutex, //
    },
    types::Opaque, //
};

/// Number of slots on the bus.
pub(super) const SLOTS: usize = 32;

/// Number of functions that a slot has room for.
const FUNCTIONS: u32 = 8;

/// The lowest number for the domain of a bus. Firmware counts its domains from zero.
const FIRST_DOMAIN: u32 = 0x1000;
/// The highest number. Many programs and IOMMU drivers expect 16 bits.
const LAST_DOMAIN: u32 = 0xffff;

/// Number of registers in a configuration space. The extended one has no capabilities.
const REGISTERS: usize = config_space::SIZE / config_space::REGISTER;

/// The memory window has 2 to the power of these numbers bytes: the largest that is free, for 32
/// functions with 2 GiB each or fewer.
const WINDOW_SHIFTS: core::ops::RangeInclusive<u32> = 30..=36;
/// The window is above the addresses of 32 bits, which are scarce.
const WINDOW_MIN: u64 = 1 << 32;
/// Number of addresses that are tried for each size of the window.
const WINDOW_TRIES: u32 = 64;

/// A register of a function, as the bus sees it.
struct Register {
    value: Atomic<u32>,
    writable: Atomic<u32>,
}

impl Register {
    /// Writes the bits of `value` in `mask`, as far as they are writable.
    fn write(&self, value: u32, mask: u32) {
        let mask = mask & self.writable.load(Relaxed);
        let mut old = self.value.load(Relaxed);
        while let Err(now) = self.value.cmpxchg(old, old & !mask | value & mask, Full) {
            old = now;
        }
    }
}

/// A slot of the bus. Config accesses take no locks: they can come from any context.
struct Slot {
    is_present: Atomic<bool>,
    /// The function, if there was one. Set while the slot is empty.
    kind: Pin<KBox<Mutex<Option<Kind>>>>,
    registers: KVec<Register>,
}

impl Slot {
    fn new() -> Result<Self> {
        let mut registers = KVec::with_capacity(REGISTERS, GFP_KERNEL)?;
        for _ in 0..REGISTERS {
            let register = Register {
                value: Atomic::new(0),
                writable: Atomic::new(0),
            };
            registers.push(register, GFP_KERNEL)?;
        }
        Ok(Self {
            is_present: Atomic::new(false),
            kind: KBox::pin_init(new_mutex!(None, "vfio::soft_pci::Slot::kind"), GFP_KERNEL)?,
            registers,
        })
    }

    /// Puts a function into the slot. The bus enables it.
    fn insert(&self, function: &Function) {
        *self.kind.lock() = Some(function.kind.clone());
        for (index, register) in self.registers.iter().enumerate() {
            let offset = index * config_space::REGISTER;
            let (mut value, writable) = function.config.register(offset);
            if offset == bindings::PCI_COMMAND as usize {
                value &= !writable;
            }
            register.value.store(value, Relaxed);
            register.writable.store(writable, Relaxed);
        }
        self.is_present.store(true, Release);
    }
}

/// The settings of a function that its driver needs.
#[derive(Clone)]
pub(super) struct Kind {
    /// The index of its type.
    pub(super) type_index: usize,
    /// Whether it has a DMA log of its own.
    pub(super) has_dma_log: bool,
    /// The values of attributes with which it begins.
    pub(super) defaults: Arc<CString>,
}

/// A function to plug into a slot.
pub(super) struct Function {
    pub(super) kind: Kind,
    /// The configuration space at power on.
    pub(super) config: ConfigSpace,
}

/// The part of a bridge that the bus accesses.
#[repr(C)]
struct Root {
    /// The data of the architecture. [`Root::of`] needs it to be the first field.
    sysdata: Opaque<bindings::pci_sysdata>,
    bus_numbers: Opaque<bindings::resource>,
    window: Opaque<bindings::resource>,
    slots: KVec<Slot>,
}

impl Root {
    /// The operations of the bus.
    const OPS: bindings::pci_ops = bindings::pci_ops {
        add_bus: None,
        remove_bus: None,
        map_bus: None,
        read: Some(Self::read),
        write: Some(Self::write),
    };

    /// Creates the root of a bus in domain 0.
    fn new(name: &'static CStr) -> Result<KBox<Self>> {
        const { assert!(offset_of!(Self, sysdata) == 0) };
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for _ in 0..SLOTS {
            slots.push(Slot::new()?, GFP_KERNEL)?;
        }
        let root = Self {
            sysdata: Opaque::new(bindings::pci_sysdata {
                node: bindings::NUMA_NO_NODE,
                ..pin_init::zeroed()
            }),
            bus_numbers: Opaque::new(bindings::resource {
                name: name.as_char_ptr(),
                flags: bindings::IORESOURCE_BUS as c_ulong,
                ..pin_init::zeroed()
            }),
            // Busy and exclusive: there is nothing at these addresses. So no driver can claim them,
            // and with `CONFIG_STRICT_DEVMEM` user space cannot map them.
            window: Opaque::new(bindings::resource {
                name: name.as_char_ptr(),
                flags: (bindings::IORESOURCE_MEM
                    | bindings::IORESOURCE_BUSY
                    | bindings::IORESOURCE_EXCLUSIVE) as c_ulong,
                ..pin_init::zeroed()
            }),
            slots,
        };
        let root = KBox::new(root, GFP_KERNEL)?;
        root.claim_window();
        Ok(root)
    }

    /// Claims addresses for the BARs, from the end of the address space downwards. The rest of the
    /// kernel allocates upwards, and memory is added there.
    fn claim_window(self: &KBox<Self>) {
        let parent = &raw mut bindings::iomem_resource;
        // SAFETY: The resource exists always, and its end does not change after the boot.
        let last = unsafe { (*parent).end };
        for size in WINDOW_SHIFTS.rev().map(|shift| 1u64 << shift) {
            let mut start = (last - (size - 1)) & !(size - 1);
            for _ in 0..WINDOW_TRIES {
                if start < WINDOW_MIN {
                    break;
                }
                // SAFETY: Both resources are valid. The new one does not move in its box, and
                // `drop()` releases it.
                let done = unsafe {
                    bindings::allocate_resource(
                        parent,
                        self.window.get(),
                        size,
                        start,
                        start + (size - 1),
                        size,
                        None,
                        core::ptr::null_mut(),
                    )
                };
                if done == 0 {
                    return;
                }
                start -= size;
            }
        }
        pr_warn!("no addresses are free for BARs\n");
    }

    /// Returns whether there are addresses for BARs.
    fn has_window(&self) -> bool {
        // SAFETY: The resource is valid. It has a parent if it was claimed.
        unsafe { !(*self.window.get()).parent.is_null() }
    }

    /// Returns the slot of a function on the bus, if there is such a function.
    fn slot(&self, devfn: u32) -> Option<&Slot> {
        let slot = self.slots.get((devfn / FUNCTIONS) as usize)?;
        (devfn % FUNCTIONS == 0 && slot.is_present.load(Acquire)).then_some(slot)
    }

    /// Returns the position in a register, and the mask of an access of `size` bytes in it.
    fn part(offset: c_int, size: c_int) -> (usize, u32, u32) {
        let shift = (offset % 4 * 8) as u32;
        let mask = match size {
            1 => 0xff,
            2 => 0xffff,
            _ => u32::MAX,
        };
        (offset as usize / config_space::REGISTER, shift, mask)
    }

    /// # Safety
    ///
    /// `bus` must be that of a bridge, and alive until `'a` ends.
    unsafe fn of<'a>(bus: *mut bindings::pci_bus) -> &'a Self {
        // SAFETY: By the safety requirements. `sysdata` is at the start of `Root`.
        unsafe { &*(*bus).sysdata.cast() }
    }

    /// # Safety
    ///
    /// Must be called by the core on a bus with these operations. `value` must be valid.
    unsafe extern "C" fn read(
        bus: *mut bindings::pci_bus,
        devfn: c_uint,
        offset: c_int,
        size: c_int,
        value: *mut u32,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        let (this, value) = unsafe { (Self::of(bus), &mut *value) };
        let (index, shift, mask) = Self::part(offset, size);
        let Some(slot) = this.slot(devfn) else {
            *value = mask;
            return bindings::PCIBIOS_DEVICE_NOT_FOUND as c_int;
        };
        let register = slot.registers.get(index);
        let content = register.map_or(0, |register| register.value.load(Relaxed));
        *value = content >> shift & mask;
        bindings::PCIBIOS_SUCCESSFUL as c_int
    }

    /// # Safety
    ///
    /// Must be called by the core on a bus with these operations.
    unsafe extern "C" fn write(
        bus: *mut bindings::pci_bus,
        devfn: c_uint,
        offset: c_int,
        size: c_int,
        value: u32,
    ) -> c_int {
        // SAFETY: By the safety requirements.
        let this = unsafe { Self::of(bus) };
        let (index, shift, mask) = Self::part(offset, size);
        let Some(slot) = this.slot(devfn) else {
            return bindings::PCIBIOS_DEVICE_NOT_FOUND as c_int;
        };
        if let Some(register) = slot.registers.get(index) {
            register.write(value << shift, mask << shift);
        }
        bindings::PCIBIOS_SUCCESSFUL as c_int
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if self.has_window() {
            // SAFETY: The resource is claimed, and no BAR uses it any more: there is no bus.
            unsafe { bindings::release_resource(self.window.get()) };
        }
    }
}

/// The domain of the interrupts of functions. It has none: a function signals eventfds only.
///
/// The functions belong to it so that VFIO knows that they cannot raise interrupts of other
/// devices. The domain of the machine would need interrupt remapping.
struct MsiDomain {
    fwnode: *mut bindings::fwnode_handle,
    domain: *mut bindings::irq_domain,
}

impl MsiDomain {
    const OPS: bindings::irq_domain_ops = pin_init::zeroed();

    fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name is a string, which is copied.
        let fwnode = unsafe {
            bindings::__irq_domain_alloc_fwnode(
                bindings::IRQCHIP_FWNODE_NAMED,
                0,
                name.as_char_ptr(),
                core::ptr::null_mut(),
                core::ptr::null_mut(),
            )
        };
        if fwnode.is_null() {
            return Err(ENOMEM);
        }
        let info = bindings::irq_domain_info {
            fwnode,
            domain_flags: bindings::IRQ_DOMAIN_FLAG_ISOLATED_MSI,
            bus_token: bindings::irq_domain_bus_token_DOMAIN_BUS_PCI_MSI,
            ops: &Self::OPS,
            ..pin_init::zeroed()
        };
        // SAFETY: The operations live for ever, and everything else is copied or counted.
        let domain = from_err_ptr(unsafe { bindings::irq_domain_instantiate(&info) });
        let domain = domain.inspect_err(|_| {
            // SAFETY: There is no domain of it.
            unsafe { bindings::irq_domain_free_fwnode(fwnode) };
        })?;
        Ok(Self { fwnode, domain })
    }
}

impl Drop for MsiDomain {
    fn drop(&mut self) {
        // SAFETY: Both exist, and no device is left that uses them.
        unsafe {
            bindings::irq_domain_remove(self.domain);
            bindings::irq_domain_free_fwnode(self.fwnode);
        }
    }
}

/// The lock of the PCI core under which devices are added and removed.
pub(super) struct RescanRemove(());

impl RescanRemove {
    /// Locks it. May sleep, while a user delays the removal of a device.
    pub(super) fn lock() -> Self {
        // SAFETY: An FFI call with no additional requirements.
        unsafe { bindings::pci_lock_rescan_remove() };
        Self(())
    }
}

impl Drop for RescanRemove {
    fn drop(&mut self) {
        // SAFETY: `lock()` has locked it.
        unsafe { bindings::pci_unlock_rescan_remove() };
    }
}

/// Removes a file of a device from sysfs. Waits for writers of the file. May sleep.
///
/// # Safety
///
/// `dev` must be a device that is in sysfs until this returns.
unsafe fn remove_file(dev: *mut bindings::device, name: &'static CStr) {
    let attribute = bindings::attribute {
        name: name.as_char_ptr(),
        ..pin_init::zeroed()
    };
    // SAFETY: The device is in sysfs by the safety requirements, and only the name is used.
    unsafe {
        bindings::sysfs_remove_file_ns(&raw mut (*dev).kobj, &attribute, core::ptr::null());
    }
}

/// The address of a function.
#[derive(Clone, Copy)]
pub(super) struct Address {
    domain: i32,
    slot: usize,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_fmt(fmt!("{:04x}:00:{:02x}.0", self.domain, self.slot))
    }
}

/// A reference to a `struct pci_host_bridge`. Dropping it waits for the release of the bridge.
///
/// # Invariants
///
/// `raw` is a reference to a bridge. `released` is completed when the bridge is released.
struct HostBridge {
    raw: NonNull<bindings::pci_host_bridge>,
    released: Arc<Completion>,
}

impl HostBridge {
    /// Allocates a bridge that is not registered.
    fn new() -> Result<Self> {
        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        // SAFETY: An FFI call with no additional requirements.
        let raw = unsafe { bindings::pci_alloc_host_bridge(0) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        let data = Arc::into_raw(released.clone());
        // SAFETY: The bridge is valid, and `release()` takes over `data`.
        unsafe {
            bindings::pci_set_host_bridge_release(
                raw.as_ptr(),
                Some(Self::release),
                data.cast_mut().cast(),
            )
        };
        // INVARIANT: This is the only reference, and `release()` completes `released`.
        Ok(Self { raw, released })
    }

    /// # Safety
    ///
    /// Must be called by the core when the bridge of this function is released.
    unsafe extern "C" fn release(raw: *mut bindings::pci_host_bridge) {
        // SAFETY: `new()` has set the pointer to the result of `into_raw()`.
        let released = unsafe { Arc::<Completion>::from_raw((*raw).release_data.cast()) };
        released.complete_all();
    }
}

impl Drop for HostBridge {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, it is a reference.
        unsafe { bindings::pci_free_host_bridge(self.raw.as_ptr()) };
        // A bus that is being removed still refers to the bridge, and the bridge to this module.
        self.released.wait_for_completion();
    }
}

/// A host bridge, its bus and the slots.
///
/// # Invariants
///
/// `bus` is the bus of `_host`, which is registered, and has the data `root`.
pub(super) struct Bridge {
    bus: NonNull<bindings::pci_bus>,
    // Released in this order.
    _host: HostBridge,
    root: KBox<Root>,
    _msi: MsiDomain,
}

// SAFETY: The PCI core synchronises all operations.
unsafe impl Send for Bridge {}

// SAFETY: As above.
unsafe impl Sync for Bridge {}

impl Bridge {
    /// Creates a bridge with an empty bus in a domain of its own. May sleep.
    ///
    /// Fails with `ENOMEM`, with `ENOSPC` if there is no domain left, and with the errors of
    /// `pci_scan_root_bus_bridge()`.
    pub(super) fn new(name: &'static CStr) -> Result<Self> {
        let msi = MsiDomain::new(name)?;
        let root = Root::new(name)?;
        let host = HostBridge::new()?;
        let raw = host.raw.as_ptr();
        // SAFETY: An FFI call with no additional requirements.
        let domain = unsafe {
            bindings::pci_bus_find_emul_domain_nr(FIRST_DOMAIN, FIRST_DOMAIN, LAST_DOMAIN)
        };
        to_result(domain)?;
        // SAFETY: The bridge and the root are valid and not shared. The operations live for ever,
        // and everything else until the bridge is released. The release gives the domain back.
        unsafe {
            (*root.sysdata.get()).domain = domain;
            (*raw).domain_nr = domain;
            (*raw).ops = core::ptr::from_ref(&Root::OPS).cast_mut();
            (*raw).sysdata = root.sysdata.get().cast();
            (*raw).dev.msi.domain = msi.domain;
            bindings::pci_add_resource(&raw mut (*raw).windows, root.bus_numbers.get());
            if root.has_window() {
                bindings::pci_add_resource(&raw mut (*raw).windows, root.window.get());
            }
        }
        let _lock = RescanRemove::lock();
        // SAFETY: The bridge is complete and not registered.
        to_result(unsafe { bindings::pci_scan_root_bus_bridge(raw) })?;
        // SAFETY: The bridge is registered.
        let bus = unsafe { (*raw).bus };
        // INVARIANT: As above.
        Ok(Self {
            bus: NonNull::new(bus).ok_or(ENODEV)?,
            _host: host,
            root,
            _msi: msi,
        })
    }

    /// Returns the bus.
    pub(super) fn bus(&self) -> *mut bindings::pci_bus {
        self.bus.as_ptr()
    }

    /// Plugs a function into an empty slot, and returns the number of the slot. At most `limit`
    /// slots are used. May sleep.
    ///
    /// If `driver` is the name of a driver, the function is bound to it. If that fails, the
    /// function has no driver.
    ///
    /// Fails with `ENOSPC` if no slot is empty, and with `ENOMEM`.
    pub(super) fn plug(
        &self,
        function: &Function,
        driver: Option<&CStr>,
        limit: usize,
    ) -> Result<usize> {
        let _lock = RescanRemove::lock();
        let mut slots = self.root.slots.iter().take(limit);
        let is_empty = |slot: &Slot| !slot.is_present.load(Relaxed);
        let number = slots.position(is_empty).ok_or(ENOSPC)?;
        let slot = self.root.slots.get(number).ok_or(ENOSPC)?;
        slot.insert(function);
        let done = self.add(number, driver);
        if done.is_err() {
            slot.is_present.store(false, Release);
        }
        done.map(|()| number)
    }

    /// Adds the function in a slot to the bus. Called with `RescanRemove` locked.
    fn add(&self, number: usize, driver: Option<&CStr>) -> Result {
        let bus = self.bus.as_ptr();
        let devfn = number as c_int * FUNCTIONS as c_int;
        // SAFETY: By the type invariants, the bus is valid.
        let pdev = unsafe { bindings::pci_scan_single_device(bus, devfn) };
        if pdev.is_null() {
            return Err(ENOMEM);
        }
        // SAFETY: The device is on the bus, and is not removed before the lock is released.
        unsafe {
            bindings::pci_bus_assign_resources(bus);
            if let Some(name) = driver {
                let len = name.count_bytes();
                let dev = &raw mut (*pdev).dev;
                let done = bindings::__device_set_driver_override(dev, name.as_char_ptr(), len);
                if let Err(error) = to_result(done) {
                    bindings::pci_stop_and_remove_bus_device(pdev);
                    return Err(error);
                }
            }
            bindings::pci_bus_add_device(pdev);
        }
        Ok(())
    }

    /// Unplugs the function in a slot. Waits until its driver has released it. May sleep.
    pub(super) fn unplug(&self, number: usize) {
        let Some(slot) = self.root.slots.get(number) else {
            return;
        };
        let find = || {
            let devfn = number as c_uint * FUNCTIONS;
            // SAFETY: By the type invariants, the bus is valid. The result is a reference, or null.
            NonNull::new(unsafe { bindings::pci_get_slot(self.bus.as_ptr(), devfn) })
        };
        // Without the lock, because the user of a device may delay this: other functions can be
        // plugged meanwhile.
        if let Some(pdev) = find() {
            // SAFETY: `pdev` is a reference to a device that was in the list of the bus, and that
            // another task may be adding or removing now. Such a device is initialised, which is
            // all that both functions need: they take its lock, and `vfio_kill_device()` checks
            // under that lock that `device_add()` cannot fail any more.
            unsafe {
                let dev = &raw mut (*pdev.as_ptr()).dev;
                // If a driver was bound before the lock is taken, a new user would delay everything
                // that waits for the lock.
                bindings::vfio_kill_device(dev);
                bindings::device_release_driver(dev);
                bindings::pci_dev_put(pdev.as_ptr());
            }
        }
        let _lock = RescanRemove::lock();
        // The administrator may have removed it, or added it again.
        if let Some(pdev) = find() {
            // SAFETY: `pdev` is a reference. The lock is held under which devices are added to the
            // bus and removed from it, so that the device is on the bus, and nothing else adds or
            // removes it.
            unsafe {
                bindings::pci_stop_and_remove_bus_device(pdev.as_ptr());
                bindings::pci_dev_put(pdev.as_ptr());
            }
        }
        slot.is_present.store(false, Release);
    }

    /// Returns the settings of a function.
    ///
    /// Fails with `ENODEV` if the device is not on the bus.
    ///
    /// # Safety
    ///
    /// `pdev` must be a device that is being bound to a driver.
    pub(super) unsafe fn function(&self, pdev: *mut bindings::pci_dev) -> Result<Kind> {
        // SAFETY: By the safety requirements. Both fields are constant.
        let (bus, devfn) = unsafe { ((*pdev).bus, (*pdev).devfn) };
        if bus != self.bus.as_ptr() {
            return Err(ENODEV);
        }
        // `unplug()` empties the slot after the device was removed.
        let slot = self.root.slot(devfn).ok_or(ENODEV)?;
        let kind = slot.kind.lock().clone();
        kind.ok_or(ENODEV)
    }

    /// Returns the address of a function.
    pub(super) fn address(&self, slot: usize) -> Address {
        // SAFETY: The field is constant after `new()`.
        let domain = unsafe { (*self.root.sysdata.get()).domain };
        Address { domain, slot }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // A writer of this file waits for the lock, under which the core would wait for the writer.
        // SAFETY: By the type invariants, the bus is registered.
        unsafe { remove_file(&raw mut (*self.bus.as_ptr()).dev, c"rescan") };
        let _lock = RescanRemove::lock();
        // SAFETY: By the type invariants, the bus is registered. It is empty: each function has a
        // reference to the bridge.
        unsafe {
            bindings::pci_stop_root_bus(self.bus.as_ptr());
            bindings::pci_remove_root_bus(self.bus.as_ptr());
        }
    }
}
