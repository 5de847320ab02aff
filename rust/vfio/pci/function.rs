// SPDX-License-Identifier: GPL-2.0

//! Accesses to the BARs and the configuration space of an open device.
//!
//! C header: [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use crate::{
    bindings,
    pci::resets::Resets,
    region::Position,
    user::lock_killable,
    wait::{
        WaitQueue,
        FOREVER,
        KILLABLE, //
    },
};
use core::ptr::NonNull;
use kernel::{
    device,
    error::from_err_ptr,
    new_mutex,
    page::PAGE_SHIFT,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{
            Atomic,
            AtomicFlag,
            Relaxed, //
        },
        barrier,
        lock::mutex::MutexGuard,
        Arc,
        Mutex, //
    },
};

/// Number of BARs.
pub(crate) const BARS: usize = bindings::PCI_STD_NUM_BARS as usize;

/// Offset of the command register in the configuration space.
const COMMAND: c_int = bindings::PCI_COMMAND as c_int;
/// The bit of the command register that enables the memory BARs.
const COMMAND_MEMORY: u16 = bindings::PCI_COMMAND_MEMORY as u16;

/// `PCI_D0` and `PCI_D3hot`, which are macros with a cast.
const D0: c_int = 0;
const D3HOT: c_int = 3;

/// Smallest access that is copied by `memcpy_fromio()` or `memcpy_toio()`, in bytes. Shorter ones
/// are made of naturally aligned reads or writes, as registers need.
const BULK: usize = 64;

/// The originator of an access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// The driver, which can access memory that the user has disabled.
    Driver,
    /// The user.
    User,
}

/// A device enabled by `vfio_pci_core_enable()`.
///
/// # Invariants
///
/// `core` and its `pdev` are valid, and `vfio_pci_core_disable()` is not called, during the
/// lifetime of this value.
struct Enabled {
    core: NonNull<bindings::vfio_pci_core_device>,
}

// SAFETY: The device may be used on any thread.
unsafe impl Send for Enabled {}

/// A reference for runtime PM: the device is not suspended. Dropping it does not sleep.
struct Awake<'a>(&'a Enabled);

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants of `Enabled`. `resume()` has taken the reference.
        unsafe { bindings::pm_runtime_put(&raw mut (*self.0.pdev()).dev) };
    }
}

/// The `memory_lock` of the core, held for reading.
struct ReadLock<'a>(&'a Enabled);

impl Drop for ReadLock<'_> {
    fn drop(&mut self) {
        // SAFETY: `lock_read()` has locked it.
        unsafe { bindings::up_read(self.0.memory_lock()) };
    }
}

/// The `memory_lock` of the core, held for writing.
struct WriteLock<'a>(&'a Enabled);

impl Drop for WriteLock<'_> {
    fn drop(&mut self) {
        // SAFETY: `lock_write()` has locked it.
        unsafe { bindings::up_write(self.0.memory_lock()) };
    }
}

/// Returns the width in bytes of the next access, up to a word, which is naturally aligned.
fn width(address: usize, len: usize) -> usize {
    let aligned = 1 << (address | size_of::<u64>()).trailing_zeros();
    let mut width = aligned;
    while width > len {
        width /= 2;
    }
    width
}

impl Enabled {
    /// Returns the `struct pci_dev`.
    fn pdev(&self) -> *mut bindings::pci_dev {
        // SAFETY: By the type invariants.
        unsafe { (*self.core.as_ptr()).pdev }
    }

    /// Resumes the device, and keeps it resumed until the result is dropped. Must not be called
    /// with a lock held that a runtime resume needs. May sleep. Returns [`None`] if it cannot be
    /// resumed.
    fn resume(&self) -> Option<Awake<'_>> {
        // SAFETY: By the type invariants.
        match unsafe { bindings::pm_runtime_resume_and_get(&raw mut (*self.pdev()).dev) } {
            0 => Some(Awake(self)),
            _ => None,
        }
    }

    /// Returns `memory_lock`.
    fn memory_lock(&self) -> *mut bindings::rw_semaphore {
        // SAFETY: By the type invariants.
        unsafe { &raw mut (*self.core.as_ptr()).memory_lock }
    }

    /// Locks `memory_lock` for reading. May sleep.
    fn lock_read(&self) -> ReadLock<'_> {
        // SAFETY: By the type invariants, the lock is valid.
        unsafe { bindings::down_read(self.memory_lock()) };
        ReadLock(self)
    }

    /// Locks `memory_lock` for writing. May sleep.
    fn lock_write(&self) -> WriteLock<'_> {
        // SAFETY: By the type invariants, the lock is valid.
        unsafe { bindings::down_write(self.memory_lock()) };
        WriteLock(self)
    }

    /// Returns whether the user has enabled the memory BARs, and the device has power, like
    /// `__vfio_pci_memory_enabled()`. `memory_lock` must be held.
    fn is_memory_enabled(&self) -> bool {
        // SAFETY: By the type invariants the device has a virtual configuration space, of at least
        // 256 bytes.
        unsafe {
            let command = (*self.core.as_ptr()).vconfig.add(COMMAND as usize);
            let command = u16::from_le_bytes(command.cast::<[u8; 2]>().read_volatile());
            self.is_always_enabled() || command & COMMAND_MEMORY != 0
        }
    }

    /// Returns whether the device is in a power state in which it can be accessed. `memory_lock`
    /// must be held.
    fn has_power(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { (*self.pdev()).current_state < D3HOT }
    }

    /// Returns whether the device was removed or reported an error. Its registers may read as all
    /// ones then.
    fn is_offline(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { (*self.pdev()).error_state != bindings::pci_channel_io_normal }
    }

    /// Returns whether the device has no bit to enable its memory BARs, like VFs.
    fn is_always_enabled(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { (*self.pdev()).no_command_memory() != 0 }
    }

    /// Returns the command register. Returns [`None`] if the device is offline or does not respond,
    /// even if that was not reported yet: all registers read as all ones then.
    fn command(&self) -> Option<u16> {
        let mut command = u16::MAX;
        // SAFETY: By the type invariants `pdev` is valid.
        let failed = unsafe { bindings::pci_read_config_word(self.pdev(), COMMAND, &mut command) };
        // `failed` is a code of PCI, not an errno.
        (failed == 0 && command != u16::MAX && !self.is_offline()).then_some(command)
    }

    /// Writes the command register.
    fn set_command(&self, command: u16) {
        // SAFETY: By the type invariants `pdev` is valid.
        unsafe { bindings::pci_write_config_word(self.pdev(), COMMAND, command) };
    }

    /// Returns whether the device responds to accesses to its memory BARs.
    ///
    /// It does not after a reset that the PCI core has not announced, such as one that recovers
    /// from an error of another device, even if the user has enabled them.
    fn decodes(&self) -> bool {
        let command = self.command();
        command.is_some_and(|command| self.is_always_enabled() || command & COMMAND_MEMORY != 0)
    }

    /// Returns whether the BARs have their addresses, which such a reset clears, like
    /// `vfio_need_bar_restore()`.
    fn has_addresses(&self) -> bool {
        // SAFETY: By the type invariants. The core has set the values when it enabled the device.
        let bars = unsafe { (*self.core.as_ptr()).rbar };
        let offsets = (bindings::PCI_BASE_ADDRESS_0 as c_int..).step_by(size_of::<u32>());
        let mut bars = offsets.zip(bars).take(BARS);
        bars.all(|(offset, address)| {
            let mut found = address;
            // SAFETY: By the type invariants `pdev` is valid.
            let failed = unsafe {
                match address {
                    // There is none.
                    0 => 0,
                    _ => bindings::pci_read_config_dword(self.pdev(), offset, &mut found),
                }
            };
            failed == 0 && found == address
        })
    }

    /// Restores the configuration space if a reset that was not announced has cleared it, so that
    /// the driver can reset the device. Otherwise, the PCI core would save the lost configuration
    /// before a reset by the user, and restore it afterwards. May sleep.
    fn restore(&self) {
        let Some(_awake) = self.resume() else {
            return;
        };
        let _lock = self.lock_write();
        // A reset of the PCI core, which uses the saved state, excludes other accesses to the
        // configuration space, and so does this.
        // SAFETY: By the type invariants `pdev` is valid.
        if self.has_power() && unsafe { bindings::pci_cfg_access_trylock(self.pdev()) } {
            self.restore_locked();
            // SAFETY: It was locked above.
            unsafe { bindings::pci_cfg_access_unlock(self.pdev()) };
        }
    }

    /// The part of [`restore()`](Self::restore) with the locks held.
    fn restore_locked(&self) {
        let (core, pdev) = (self.core.as_ptr(), self.pdev());
        if self.command().is_none() {
            return;
        }
        // SAFETY: By the type invariants both are valid. The core has saved the state when it
        // enabled the device, and keeps it until it disables the device.
        unsafe {
            let saved = (*core).pci_saved_state;
            if !self.has_addresses()
                && !saved.is_null()
                && bindings::pci_load_saved_state(pdev, saved) == 0
            {
                dev_info!(
                    device::Device::<device::Normal>::from_raw(&raw mut (*pdev).dev),
                    "the configuration space is restored after a reset\n"
                );
                bindings::pci_restore_state(pdev);
                if (*core).nointx() {
                    bindings::pci_intx(pdev, 0);
                }
            }
        }
        // Without addresses, other devices would respond, or none.
        if self.is_always_enabled() || !self.has_addresses() {
            return;
        }
        // As the user has set it.
        if let Some(command) = self.command() {
            if (command & COMMAND_MEMORY != 0) != self.is_memory_enabled() {
                self.set_command(command ^ COMMAND_MEMORY);
            }
        }
    }

    /// Brings the device to D0, like `vfio_pci_core_disable()` does later, and keeps it there until
    /// [`power_put()`](Self::power_put). May sleep. Returns false, without a need for that call, if
    /// it cannot be resumed.
    fn power_on(&self) -> bool {
        let (core, pdev) = (self.core.as_ptr(), self.pdev());
        let Some(awake) = self.resume() else {
            return false;
        };
        let _lock = self.lock_write();
        let slept = !self.has_power();
        // SAFETY: By the type invariants both are valid. `pm_save` is protected by `memory_lock`.
        unsafe {
            let failed = bindings::pci_set_power_state(pdev, D0) != 0;
            if slept && !failed && (*core).needs_pm_restore() {
                bindings::pci_load_and_free_saved_state(pdev, &raw mut (*core).pm_save);
                bindings::pci_restore_state(pdev);
            }
        }
        // `power_put()` gives the reference back.
        core::mem::forget(awake);
        true
    }

    /// Allows the device to be suspended again, after `power_on()` has returned true.
    fn power_put(&self) {
        drop(Awake(self));
    }

    /// Resumes the device, and returns whether it responds, and was not reset by surprise. Returns
    /// `false` if the resume fails. May sleep.
    fn responds(&self) -> bool {
        let Some(_awake) = self.resume() else {
            return false;
        };
        // With the lock held, no reset by the user is under way.
        let _lock = self.lock_read();
        let responds = match self.is_memory_enabled() {
            true => self.decodes(),
            false => self.command().is_some(),
        };
        responds && self.has_addresses()
    }

    /// Calls `access` while the device has power and `memory_lock` is held, unless `may` fails with
    /// that lock held. Enables the memory BARs meanwhile, on behalf of the driver. May sleep.
    ///
    /// Fails with `EIO` if the device cannot be accessed, and like `may` if that fails before or
    /// after the access.
    fn with_memory(
        &self,
        by: By,
        may: impl Fn() -> Result,
        access: impl FnOnce() -> Result,
    ) -> Result {
        let _awake = self.resume().ok_or(EIO)?;
        let lock = self.lock_read();
        may()?;
        if self.has_power() && self.is_memory_enabled() {
            return self.online(may, access);
        }
        drop(lock);
        match by {
            By::User => Err(EIO),
            By::Driver => self.with_memory_enabled(may, access),
        }
    }

    /// Calls `access`. Fails like `may` if that fails afterwards, and with `EIO` if the device was
    /// offline before or after it, so that all ones are not taken for its content.
    ///
    /// A reset by the host does not wait for `memory_lock`, so it may begin during the access.
    fn online(&self, may: impl Fn() -> Result, access: impl FnOnce() -> Result) -> Result {
        if self.is_offline() {
            return Err(EIO);
        }
        let done = access();
        // What was read comes from before the check.
        barrier::mb(barrier::Read);
        may()?;
        if self.is_offline() {
            return Err(EIO);
        }
        done
    }

    /// Calls `access` with the memory BARs enabled. The user cannot access them meanwhile, because
    /// `memory_lock` is held for writing.
    fn with_memory_enabled(
        &self,
        may: impl Fn() -> Result,
        access: impl FnOnce() -> Result,
    ) -> Result {
        let _lock = self.lock_write();
        may()?;
        let command = self.command().filter(|_| self.has_power()).ok_or(EIO)?;
        // Without addresses, other devices would respond, or none.
        if !self.has_addresses() {
            return Err(EIO);
        }
        if command & COMMAND_MEMORY != 0 {
            return self.online(may, access);
        }
        self.set_command(command | COMMAND_MEMORY);
        let result = self.online(&may, access);
        // Other bits may have changed. A reset by the host saves and restores the register.
        if let Some(command) = self.command().filter(|_| may().is_ok()) {
            self.set_command(command & !COMMAND_MEMORY);
        }
        result
    }

    /// Returns the address of `len` bytes in a memory BAR.
    ///
    /// Fails with `EINVAL` if they are not inside a memory BAR, and with the error of the core if
    /// it could not map the BAR.
    fn address(&self, pos: Position, len: usize) -> Result<*mut c_void> {
        let size = self.memory_size(pos.region_index as usize);
        let end = pos.region_offset.checked_add(len as u64).ok_or(EINVAL)?;
        if end > size {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariants the map of BARs is set up. The index is that of a BAR,
        // because its size is not zero; for an access without bytes it may be any.
        let base = unsafe { &(*self.core.as_ptr()).barmap };
        let base = from_err_ptr(*base.get(pos.region_index as usize).ok_or(EINVAL)?)?;
        if base.is_null() {
            return Err(ENODEV);
        }
        Ok(base.wrapping_byte_add(pos.region_offset as usize))
    }

    /// Maps a page into the area of a page fault: that of a memory BAR at a position, or a page of
    /// RAM instead of it. `writable` has no effect in a read-only area. A page that is mapped
    /// already stays. May sleep.
    ///
    /// The access raises `SIGBUS` without power or memory space, like with
    /// `vfio_pci_vmf_insert_pfn()`.
    ///
    /// # Safety
    ///
    /// Must be called in a page fault, which `vmf` describes, on an area made by
    /// `vfio_pci_core_mmap()` for this BAR. The page of RAM must stay allocated until it is
    /// unmapped.
    unsafe fn insert(
        &self,
        vmf: *mut bindings::vm_fault,
        pos: Position,
        ram: Option<*mut bindings::page>,
        writable: bool,
    ) -> bindings::vm_fault_t {
        let (core, bar) = (self.core.as_ptr(), pos.region_index as c_int);
        // SAFETY: By the type invariants and the safety requirements. `memory_lock` keeps the
        // device accessible until its page is mapped; the core unmaps it with this lock held.
        unsafe {
            let pfn = match ram {
                Some(page) => bindings::page_to_pfn(page),
                None => {
                    let start = bindings::pci_resource_start(self.pdev(), bar);
                    ((start + pos.region_offset) >> PAGE_SHIFT) as c_ulong
                }
            };
            let (vma, address) = ((*vmf).__bindgen_anon_1.vma, (*vmf).__bindgen_anon_1.address);
            let prot = bindings::vfio_pci_page_prot(vma, writable, ram.is_none());
            let _lock = self.lock_read();
            let accessible =
                !(*core).pm_runtime_engaged && self.has_power() && self.is_memory_enabled();
            if accessible {
                bindings::vmf_insert_pfn_prot(vma, address, pfn, prot)
            } else {
                bindings::vm_fault_reason_VM_FAULT_SIGBUS
            }
        }
    }

    /// Unmaps bytes of a BAR from all address spaces. May sleep.
    fn unmap(&self, pos: Position, len: usize) {
        let start = Position::start_of(pos.region_index) + pos.region_offset;
        // SAFETY: By the type invariants. Each device has an inode during its whole lifetime.
        unsafe {
            bindings::unmap_mapping_range(
                (*(*self.core.as_ptr()).vdev.inode).i_mapping,
                start as bindings::loff_t,
                len as bindings::loff_t,
                1,
            );
        }
    }

    /// Returns whether there is a BAR of this index, of the kind `flag`.
    fn is(&self, index: usize, flag: u32) -> bool {
        // SAFETY: By the type invariants `pdev` is valid, and it has resources for all BARs.
        let resources = unsafe { &(*self.pdev()).resource };
        let resource = resources.get(index).filter(|_| index < BARS);
        resource.is_some_and(|resource| resource.flags & flag as c_ulong != 0)
    }

    /// Returns the size in bytes of a memory BAR, or zero if there is none of this index.
    fn memory_size(&self, index: usize) -> u64 {
        if !self.is(index, bindings::IORESOURCE_MEM) {
            return 0;
        }
        // SAFETY: By the type invariants `pdev` is valid, and it has a resource of this index.
        unsafe { bindings::pci_resource_len(self.pdev(), index as c_int) }
    }

    /// Copies from a BAR. `memory_lock` must be held.
    ///
    /// Fails with `EIO` if the BAR does not respond. On most machines it reads as all ones then. A
    /// large access is so slow that its check does not matter.
    fn read(&self, pos: Position, to: &mut [u8]) -> Result {
        let io = self.address(pos, to.len())?;
        let mut at = 0;
        while at < to.len() {
            let from = io.wrapping_byte_add(at).cast_const();
            let (_, to) = to.split_at_mut(at);
            let mut width = width(from as usize, to.len());
            // SAFETY: `address()` checked the range; the memory is mapped and enabled.
            unsafe {
                match width {
                    8 if to.len() >= BULK => {
                        width = to.len() & !7;
                        bindings::memcpy_fromio(to.as_mut_ptr().cast(), from, width);
                    }
                    8 => to[..8].copy_from_slice(&bindings::readq(from).to_le_bytes()),
                    4 => to[..4].copy_from_slice(&bindings::readl(from).to_le_bytes()),
                    2 => to[..2].copy_from_slice(&bindings::readw(from).to_le_bytes()),
                    _ => to[0] = bindings::readb(from),
                }
            }
            at += width;
        }
        let is_suspect = to.len() >= BULK || to.iter().all(|byte| *byte == 0xff);
        if is_suspect && !to.is_empty() && !self.decodes() {
            return Err(EIO);
        }
        Ok(())
    }

    /// Copies to a BAR. `memory_lock` must be held.
    ///
    /// Fails with `EIO` if the BAR does not respond to a large access. After smaller ones, the next
    /// state change finds that.
    fn write(&self, pos: Position, from: &[u8]) -> Result {
        let io = self.address(pos, from.len())?;
        let mut at = 0;
        while let Some(from) = from.get(at..).filter(|from| !from.is_empty()) {
            let to = io.wrapping_byte_add(at);
            let mut width = width(to as usize, from.len());
            let mut bytes = [0; 8];
            bytes[..width].copy_from_slice(&from[..width]);
            let word = u64::from_le_bytes(bytes);
            // SAFETY: `address()` checked the range; the memory is mapped and enabled.
            unsafe {
                match width {
                    8 if from.len() >= BULK => {
                        width = from.len() & !7;
                        bindings::memcpy_toio(to, from.as_ptr().cast(), width);
                    }
                    8 => bindings::writeq(word, to),
                    4 => bindings::writel(word as u32, to),
                    2 => bindings::writew(word as u16, to),
                    _ => bindings::writeb(word as u8, to),
                }
            }
            at += width;
        }
        if from.len() >= BULK && !self.decodes() {
            return Err(EIO);
        }
        Ok(())
    }

    /// Copies from the configuration space.
    fn read_config(&self, offset: usize, to: &mut [u8]) -> Result {
        let pdev = self.pdev();
        let mut at = 0;
        while at < to.len() {
            let here = c_int::try_from(offset + at)?;
            let width = width(offset + at, to.len() - at).min(4);
            let mut bytes = [0; 4];
            // SAFETY: By the type invariants `pdev` is valid.
            let failed = unsafe {
                match width {
                    4 => {
                        let mut word = 0;
                        let done = bindings::pci_read_config_dword(pdev, here, &mut word);
                        bytes = word.to_le_bytes();
                        done
                    }
                    2 => {
                        let mut word = 0;
                        let done = bindings::pci_read_config_word(pdev, here, &mut word);
                        bytes[..2].copy_from_slice(&word.to_le_bytes());
                        done
                    }
                    _ => bindings::pci_read_config_byte(pdev, here, &mut bytes[0]),
                }
            };
            // A code of PCI, not an errno.
            if failed != 0 {
                return Err(EIO);
            }
            to[at..at + width].copy_from_slice(&bytes[..width]);
            at += width;
        }
        Ok(())
    }
}

/// What happens to writes of the user to BARs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// They reach the device.
    Pass,
    /// They wait: the device stops, but the state change may still fail.
    Wait,
    /// They are dropped: the device is stopped.
    Drop,
}

/// The PCI function of an open device: the driver's access to its BARs and its configuration
/// space.
///
/// An access keeps the device powered (runtime PM), and excludes a reset by the user and changes of
/// the command register, because it holds `memory_lock`. If the user has disabled the memory BARs,
/// it enables them temporarily. It fails with
///
/// * `EIO` if the user has put the device into D3hot by the configuration space, or the device was
///   removed, reported an error, was reset without a notice to its driver or does not respond,
/// * `ENODEV` if a reset has begun and [`Migratable::reset`] has not been called since: the caller
///   belongs to a session that the reset ends. The same error is returned if the reset begins
///   during the access, and after the last close, because the function may outlive the open device.
///
/// All methods may sleep. They must not be called with `memory_lock` held, or with a lock that the
/// holder of `memory_lock` waits for; the crate has no such lock. Accesses of the driver to one
/// device exclude each other.
///
/// [`Migratable::reset`]: crate::migration::Migratable::reset
///
/// # Examples
///
/// A device with a doorbell in BAR0.
///
/// ```
/// use vfio::pci;
///
/// fn ring(function: &pci::Function) -> Result {
///     function.write(Position::new(region::BAR0, 0x10), &1u32.to_le_bytes())
/// }
/// ```
#[pin_data]
pub struct Function {
    /// Present while the device is open. Outside of `memory_lock`.
    #[pin]
    enabled: Mutex<Option<Enabled>>,
    /// What happens to writes of the user to BARs. Held during such a write. Outside of `enabled`.
    #[pin]
    writes: Mutex<Writes>,
    /// Whether `writes` is [`Writes::Wait`], for the condition of the waiters. Changes with
    /// `writes` held.
    waiting: AtomicFlag,
    /// Writes that wait.
    #[pin]
    writers: WaitQueue,
    /// Number of writes dropped since the last reset.
    dropped: Atomic<u64>,
    /// An access since the last reset found that the device is gone.
    broken: AtomicFlag,
    resets: Arc<Resets>,
    sizes: [u64; BARS],
    /// Whether each BAR is a range of I/O ports.
    ports: [bool; BARS],
}

impl Function {
    /// Creates the function of a device that is being opened, and that must be reset before use.
    ///
    /// # Safety
    ///
    /// `vfio_pci_core_enable()` must have succeeded. [`close()`](Self::close) must be called before
    /// `vfio_pci_core_disable()`.
    pub(crate) unsafe fn new(
        core: NonNull<bindings::vfio_pci_core_device>,
        resets: Arc<Resets>,
    ) -> Result<Arc<Self>> {
        // INVARIANT: By the safety requirements; `close()` drops it.
        let enabled = Enabled { core };
        let sizes = core::array::from_fn(|index| enabled.memory_size(index));
        let ports = core::array::from_fn(|index| enabled.is(index, bindings::IORESOURCE_IO));
        resets.open();
        Arc::pin_init(
            pin_init!(Self {
                enabled <- new_mutex!(Some(enabled), "vfio::pci::Function::enabled"),
                writes <- new_mutex!(Writes::Pass, "vfio::pci::Function::writes"),
                waiting: AtomicFlag::new(false),
                writers <- WaitQueue::new(c"vfio::pci::Function::writers", static_lock_class!()),
                dropped: Atomic::new(0),
                broken: AtomicFlag::new(false),
                resets,
                sizes,
                ports,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Calls `wipe` with the device in D0, so that it can be accessed whatever the user has done.
    /// May sleep.
    pub(crate) fn with_power<R>(&self, wipe: impl FnOnce() -> R) -> R {
        let powered = self.enabled.lock().as_ref().is_some_and(Enabled::power_on);
        // The reference for runtime PM is held meanwhile: otherwise the device could be suspended
        // and resumed for each access.
        let result = wipe();
        if let Some(enabled) = self.enabled.lock().as_ref().filter(|_| powered) {
            enabled.power_put();
        }
        result
    }

    /// Ends all access. May sleep.
    pub(crate) fn close(&self) {
        *self.enabled.lock() = None;
        self.resets.close();
    }

    /// Returns the resets of the device.
    pub(crate) fn resets(&self) -> &Resets {
        &self.resets
    }

    /// Returns whether a BAR is a range of I/O ports.
    pub(crate) fn is_ports(&self, region_index: u32) -> bool {
        self.ports.get(region_index as usize) == Some(&true)
    }

    /// Fails with `EIO` if the device is gone. May sleep.
    ///
    /// Does not fail during a reset, in which a device need not respond.
    pub(crate) fn check(&self) -> Result {
        let guard = self.enabled.lock();
        self.check_enabled(guard.as_ref().ok_or(ENODEV)?)
    }

    /// The part of [`check()`](Self::check) with the lock held.
    fn check_enabled(&self, enabled: &Enabled) -> Result {
        if enabled.responds() {
            return Ok(());
        }
        // Orders the read of the device before the check for a reset.
        barrier::mb(barrier::Read);
        if self.resets.not_reset().is_err() {
            return Ok(());
        }
        self.broken.store(true, Relaxed);
        Err(EIO)
    }

    /// Returns whether an access since the last reset found that the device is gone, or was reset
    /// without a notice. Does not sleep.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Relaxed)
    }

    /// Returns the size in bytes of a memory BAR, or zero if `region_index` is not that of one.
    pub fn size(&self, region_index: u32) -> u64 {
        self.sizes.get(region_index as usize).copied().unwrap_or(0)
    }

    /// Calls `access` when it is allowed.
    fn with(&self, by: By, access: impl FnOnce(&Enabled) -> Result) -> Result {
        let guard = match by {
            By::Driver => self.enabled.lock(),
            By::User => lock_killable(&self.enabled)?,
        };
        let enabled = guard.as_ref().ok_or(ENODEV)?;
        let done = enabled.with_memory(by, || self.resets.not_reset(), || access(enabled));
        if done == Err(EIO) {
            // The error is that of the access.
            let _ = self.check_enabled(enabled);
        }
        done
    }

    /// Reads from a memory BAR. An access of up to 8 bytes with natural alignment is one access on
    /// the bus.
    ///
    /// Fails with `EINVAL` if the range is not inside a memory BAR.
    pub fn read(&self, pos: Position, to: &mut [u8]) -> Result {
        self.with(By::Driver, |enabled| enabled.read(pos, to))
    }

    /// Writes to a memory BAR; see [`read()`](Self::read). Changes of tracked memory must be made
    /// by [`BarMemory`](crate::pci::BarMemory).
    pub fn write(&self, pos: Position, from: &[u8]) -> Result {
        self.with(By::Driver, |enabled| enabled.write(pos, from))
    }

    /// Reads from the configuration space of the device, not from what the user sees of it.
    pub fn read_config(&self, offset: usize, to: &mut [u8]) -> Result {
        self.with(By::Driver, |enabled| enabled.read_config(offset, to))
    }

    /// Reads from a memory BAR on behalf of the user. Fails with `EIO` if the user has disabled it.
    pub(crate) fn user_read(&self, pos: Position, to: &mut [u8]) -> Result {
        self.with(By::User, |enabled| enabled.read(pos, to))
    }

    /// Writes to a memory BAR on behalf of the user; see [`user_read()`](Self::user_read).
    pub(crate) fn user_write(&self, pos: Position, from: &[u8]) -> Result {
        self.with(By::User, |enabled| enabled.write(pos, from))
    }

    /// Fails with `EIO` if the user has disabled the memory BARs.
    pub(crate) fn user_may_access(&self) -> Result {
        self.with(By::User, |_| Ok(()))
    }

    /// Maps a page into the area of a page fault; see [`Enabled::insert()`].
    ///
    /// # Safety
    ///
    /// See [`Enabled::insert()`].
    pub(crate) unsafe fn insert(
        &self,
        vmf: *mut bindings::vm_fault,
        pos: Position,
        ram: Option<*mut bindings::page>,
        writable: bool,
    ) -> bindings::vm_fault_t {
        match &*self.enabled.lock() {
            // SAFETY: By the safety requirements.
            Some(enabled) => unsafe { enabled.insert(vmf, pos, ram, writable) },
            None => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }

    /// Unmaps bytes of a BAR from all address spaces. May sleep.
    pub(crate) fn unmap(&self, pos: Position, len: usize) {
        if let Some(enabled) = &*self.enabled.lock() {
            enabled.unmap(pos, len);
        }
    }

    /// Counts a write of the user that is dropped.
    pub(crate) fn dropped(&self) {
        self.dropped.fetch_add(1, Relaxed);
    }

    /// Calls `write`, which writes on behalf of the user. Counts the write instead if the device is
    /// stopped. Waits while it is being stopped, because that may fail.
    ///
    /// Fails with `EINTR` if the task is killed while it waits.
    pub(crate) fn pass(&self, write: impl FnOnce() -> Result) -> Result {
        loop {
            let writes = lock_killable(&self.writes)?;
            match *writes {
                Writes::Pass => return write(),
                Writes::Drop => {
                    self.dropped();
                    return Ok(());
                }
                Writes::Wait => (),
            }
            drop(writes);
            self.writers
                .wait(KILLABLE, FOREVER, |_| !self.waiting.load(Relaxed))
                .map_err(|_| EINTR)?;
        }
    }

    /// Decides about writes of the user from now on, with `writes` locked.
    fn decide(&self, mut writes: MutexGuard<'_, Writes>, to: Writes) {
        *writes = to;
        self.waiting.store(to == Writes::Wait, Relaxed);
        drop(writes);
        self.writers.wake();
    }

    /// Lets writes of the user wait from now on, until [`end_arc()`](Self::end_arc),
    /// [`halt()`](Self::halt) or [`start()`](Self::start). No write is under way when this returns.
    /// Fails with `EINTR`, without an effect, if the task is killed while it waits for one.
    pub(crate) fn stop(&self) -> Result {
        self.decide(lock_killable(&self.writes)?, Writes::Wait);
        Ok(())
    }

    /// Drops writes of the user from now on if they wait: the device is stopped.
    pub(crate) fn end_arc(&self) {
        // Only the caller's arc lets writes wait. On others, do not wait for a write under way.
        if self.waiting.load(Relaxed) {
            self.decide(self.writes.lock(), Writes::Drop);
        }
    }

    /// Drops writes of the user from now on, because the device failed.
    pub(crate) fn halt(&self) {
        self.decide(self.writes.lock(), Writes::Drop);
    }

    /// Passes writes of the user again.
    pub(crate) fn start(&self) {
        self.decide(self.writes.lock(), Writes::Pass);
    }

    /// Returns the number of writes to BARs that were dropped since the last reset, because the
    /// device was stopped. A mapped page with dropped stores counts once, or more often if it has
    /// several mappings.
    pub fn dropped_writes(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Passes writes of the user again after a reset, and clears the count of dropped ones.
    pub(crate) fn reset_gate(&self) {
        self.start();
        self.dropped.store(0, Relaxed);
    }

    /// Allows accesses after all resets so far, for the driver to reset the device. May sleep.
    pub(crate) fn accept(&self) {
        if let Some(enabled) = &*self.enabled.lock() {
            enabled.restore();
        }
        self.broken.store(false, Relaxed);
        self.resets.accept();
    }
}
