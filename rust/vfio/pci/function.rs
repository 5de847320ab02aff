// SPDX-License-Identifier: GPL-2.0

//! Accesses to the BARs and the configuration space of an open device.
//!
//! C header: [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use crate::{
    bindings,
    notifier::Notifier,
    region::Position,
    user::lock_killable, //
};
use core::ptr::NonNull;
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    new_mutex, new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
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

    /// Returns whether the user has enabled the memory BARs, and the device has power, like
    /// `__vfio_pci_memory_enabled()`. `memory_lock` must be held.
    fn is_memory_enabled(&self) -> bool {
        let pdev = self.pdev();
        // SAFETY: By the type invariants both are valid, and the device has a virtual configuration
        // space, of at least 256 bytes.
        unsafe {
            let command = (*self.core.as_ptr()).vconfig.add(COMMAND as usize);
            let command = u16::from_le_bytes(command.cast::<[u8; 2]>().read_volatile());
            (*pdev).no_command_memory() != 0 || command & COMMAND_MEMORY != 0
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

    /// Brings the device to D0, like `vfio_pci_core_disable()` does later. May sleep.
    fn power_on(&self) {
        let (core, pdev) = (self.core.as_ptr(), self.pdev());
        // SAFETY: By the type invariants both are valid. `pm_save` is protected by `memory_lock`.
        // No lock is held that a runtime resume needs.
        unsafe {
            let device = &raw mut (*pdev).dev;
            if bindings::pm_runtime_resume_and_get(device) != 0 {
                return;
            }
            bindings::down_write(&raw mut (*core).memory_lock);
            let slept = !self.has_power();
            let failed = bindings::pci_set_power_state(pdev, D0) != 0;
            if slept && !failed && (*core).needs_pm_restore() {
                bindings::pci_load_and_free_saved_state(pdev, &raw mut (*core).pm_save);
                bindings::pci_restore_state(pdev);
            }
            bindings::up_write(&raw mut (*core).memory_lock);
            bindings::pm_runtime_put(device);
        }
    }

    /// Calls `access` while the device has power and `memory_lock` is held, unless `may` fails with
    /// that lock held. Enables the memory BARs meanwhile, on behalf of the driver. May sleep.
    ///
    /// Fails with `EIO` if the device cannot be accessed.
    fn with_memory(
        &self,
        by: By,
        may: impl Fn() -> Result,
        access: impl FnOnce() -> Result,
    ) -> Result {
        // SAFETY: By the type invariants.
        let device = unsafe { &raw mut (*self.pdev()).dev };
        // SAFETY: As above. No lock is held that a runtime resume needs.
        to_result(unsafe { bindings::pm_runtime_resume_and_get(device) }).map_err(|_| EIO)?;
        let result = self.with_lock(by, may, access);
        // SAFETY: The reference was taken above.
        unsafe { bindings::pm_runtime_put(device) };
        result
    }

    /// The part of [`with_memory()`](Self::with_memory) with a reference for runtime PM.
    fn with_lock(
        &self,
        by: By,
        may: impl Fn() -> Result,
        access: impl FnOnce() -> Result,
    ) -> Result {
        // SAFETY: By the type invariants.
        let lock = unsafe { &raw mut (*self.core.as_ptr()).memory_lock };
        // SAFETY: The lock is valid.
        unsafe { bindings::down_read(lock) };
        let allowed = may();
        if allowed.is_ok() && self.has_power() && self.is_memory_enabled() {
            let result = self.online(access);
            // SAFETY: The lock was taken above.
            unsafe { bindings::up_read(lock) };
            return result;
        }
        // SAFETY: As above.
        unsafe { bindings::up_read(lock) };
        allowed?;
        match by {
            By::User => Err(EIO),
            By::Driver => self.with_memory_enabled(lock, may, access),
        }
    }

    /// Calls `access`. Fails with `EIO` if the device was offline before or after it, so that all
    /// ones are not taken for its content.
    fn online(&self, access: impl FnOnce() -> Result) -> Result {
        if self.is_offline() {
            return Err(EIO);
        }
        access()?;
        if self.is_offline() {
            return Err(EIO);
        }
        Ok(())
    }

    /// Calls `access` with the memory BARs enabled. The user cannot access them meanwhile, because
    /// `memory_lock` is held for writing.
    fn with_memory_enabled(
        &self,
        lock: *mut bindings::rw_semaphore,
        may: impl Fn() -> Result,
        access: impl FnOnce() -> Result,
    ) -> Result {
        let pdev = self.pdev();
        // SAFETY: The lock is valid.
        unsafe { bindings::down_write(lock) };
        let result = may().and_then(|()| {
            if !self.has_power() {
                return Err(EIO);
            }
            let mut command = 0;
            // SAFETY: By the type invariants `pdev` is valid.
            let failed = unsafe { bindings::pci_read_config_word(pdev, COMMAND, &mut command) };
            // A code of PCI, not an errno.
            if failed != 0 {
                return Err(EIO);
            }
            if command & COMMAND_MEMORY != 0 {
                return self.online(access);
            }
            // SAFETY: As above. Other bits may change meanwhile.
            unsafe {
                bindings::pci_write_config_word(pdev, COMMAND, command | COMMAND_MEMORY);
                let result = self.online(access);
                if bindings::pci_read_config_word(pdev, COMMAND, &mut command) == 0 {
                    bindings::pci_write_config_word(pdev, COMMAND, command & !COMMAND_MEMORY);
                }
                result
            }
        });
        // SAFETY: The lock was taken above.
        unsafe { bindings::up_write(lock) };
        result
    }

    /// Returns the address of `len` bytes in a memory BAR.
    ///
    /// Fails with `EINVAL` if they are not inside a memory BAR, and with the error of the core if
    /// it could not map the BAR.
    fn address(&self, pos: Position, len: usize) -> Result<*mut c_void> {
        let size = self.memory_size(pos.region_index);
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

    /// Returns the size in bytes of a memory BAR, or zero if there is none of this index.
    fn memory_size(&self, region_index: u32) -> u64 {
        let pdev = self.pdev();
        if region_index as usize >= BARS {
            return 0;
        }
        // SAFETY: By the type invariants `pdev` is valid, and it has resources for all BARs.
        unsafe {
            let resources = &(*pdev).resource;
            match resources.get(region_index as usize) {
                Some(resource) if resource.flags & bindings::IORESOURCE_MEM as c_ulong != 0 => {
                    bindings::pci_resource_len(pdev, region_index as c_int)
                }
                _ => 0,
            }
        }
    }

    /// Copies from a BAR. `memory_lock` must be held.
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
        Ok(())
    }

    /// Copies to a BAR. `memory_lock` must be held.
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

/// The PCI function of an open device: the driver's access to its BARs and its configuration
/// space.
///
/// An access has the device in power (runtime PM), and excludes a reset by the user and changes of
/// the command register, because it holds `memory_lock`. It works even if the user has disabled the
/// memory BARs: then it enables them meanwhile. It fails with
///
/// * `EIO` if the user has put the device into D3hot by the configuration space, or the device was
///   removed or reported an error,
/// * `ENODEV` if the device was reset and [`Migratable::reset`] has not been called since: the
///   caller belongs to a session that the reset ends. Also after the last close, because the
///   function may live longer than the open device.
///
/// All methods may sleep. They must not be called with `memory_lock` held, or with a lock that the
/// holder of `memory_lock` waits for; no lock of the crate is one. Accesses of the driver to one
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
    /// Whether the device is stopped: writes of the user to BARs are dropped. Held during such a
    /// write. Outside of `enabled`.
    #[pin]
    stopped: Mutex<bool>,
    /// Number of writes dropped since the last reset.
    dropped: Atomic<u64>,
    /// The notifier of the last session.
    #[pin]
    session: SpinLock<Option<Arc<Notifier>>>,
    /// Number of resets that have happened, including that before the first open.
    resets: Atomic<u32>,
    /// The value of `resets` when the driver was last called to reset the device. Other accesses
    /// fail while the two differ.
    accepted: Atomic<u32>,
    /// The value of `resets` for which that call has returned.
    settled: Atomic<u32>,
    sizes: [u64; BARS],
}

impl Function {
    /// Creates the function of a device that is being opened. It is to be reset.
    ///
    /// # Safety
    ///
    /// `vfio_pci_core_enable()` must have succeeded. [`close()`](Self::close) must be called before
    /// `vfio_pci_core_disable()`.
    pub(crate) unsafe fn new(core: NonNull<bindings::vfio_pci_core_device>) -> Result<Arc<Self>> {
        // INVARIANT: By the safety requirements; `close()` drops it.
        let enabled = Enabled { core };
        let sizes = core::array::from_fn(|index| enabled.memory_size(index as u32));
        Arc::pin_init(
            pin_init!(Self {
                enabled <- new_mutex!(Some(enabled), "vfio::pci::Function::enabled"),
                stopped <- new_mutex!(false, "vfio::pci::Function::stopped"),
                dropped: Atomic::new(0),
                session <- new_spinlock!(None, "vfio::pci::Function::session"),
                resets: Atomic::new(1),
                accepted: Atomic::new(0),
                settled: Atomic::new(0),
                sizes,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Brings the device to D0, so that it can be accessed whatever the user has done. May sleep.
    pub(crate) fn power_on(&self) {
        if let Some(enabled) = &*self.enabled.lock() {
            enabled.power_on();
        }
    }

    /// Ends all access. May sleep.
    pub(crate) fn close(&self) {
        *self.enabled.lock() = None;
    }

    /// Records the notifier of a session, whose users are woken by a reset. May sleep.
    pub(crate) fn begin_session(&self, notifier: Arc<Notifier>) {
        let last = self.session.lock().replace(notifier);
        // Outside of the lock: this may be the last reference.
        drop(last);
    }

    /// Returns the size in bytes of a memory BAR, or zero if `region_index` is not that of one.
    pub fn size(&self, region_index: u32) -> u64 {
        self.sizes.get(region_index as usize).copied().unwrap_or(0)
    }

    /// Fails with `ENODEV` between a reset and the call of the driver.
    pub(crate) fn not_reset(&self) -> Result {
        if self.accepted.load(Relaxed) == self.resets.load(Relaxed) {
            Ok(())
        } else {
            Err(ENODEV)
        }
    }

    /// Calls `access` when it is allowed.
    fn with(&self, by: By, access: impl FnOnce(&Enabled) -> Result) -> Result {
        let guard = match by {
            By::Driver => self.enabled.lock(),
            By::User => lock_killable(&self.enabled)?,
        };
        let enabled = guard.as_ref().ok_or(ENODEV)?;
        enabled.with_memory(by, || self.not_reset(), || access(enabled))
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

    /// Calls `write`, which writes on behalf of the user. Counts the write instead if the device is
    /// stopped.
    pub(crate) fn pass(&self, write: impl FnOnce() -> Result) -> Result {
        let stopped = lock_killable(&self.stopped)?;
        if *stopped {
            self.dropped.fetch_add(1, Relaxed);
            return Ok(());
        }
        write()
    }

    /// Drops writes of the user from now on. No write is under way when this returns. Fails with
    /// `EINTR`, without an effect, if the task is killed while it waits for one.
    pub(crate) fn stop(&self) -> Result {
        *lock_killable(&self.stopped)? = true;
        Ok(())
    }

    /// The same for a device that failed.
    pub(crate) fn halt(&self) {
        *self.stopped.lock() = true;
    }

    /// Passes writes of the user again.
    pub(crate) fn start(&self) {
        *self.stopped.lock() = false;
    }

    /// Returns the number of writes to BARs that were dropped since the last reset, because the
    /// device was stopped.
    pub fn dropped_writes(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Passes writes of the user again after a reset, and clears the count of dropped ones.
    pub(crate) fn reset_gate(&self) {
        *self.stopped.lock() = false;
        self.dropped.store(0, Relaxed);
    }

    /// Records a reset. Accesses fail until [`accept()`](Self::accept). Wakes readers, writers and
    /// pollers of the session, which must notice it. Does not sleep.
    pub(crate) fn was_reset(&self) {
        self.resets.fetch_add(1, Relaxed);
        if let Some(notifier) = &*self.session.lock() {
            notifier.notify();
        }
    }

    /// Returns the number of resets.
    pub(crate) fn resets(&self) -> u32 {
        self.resets.load(Relaxed)
    }

    /// Returns whether the driver must still be called after a reset. Does not sleep.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.settled.load(Relaxed) != self.resets.load(Relaxed)
    }

    /// Allows accesses after all resets so far, for the driver to reset the device.
    pub(crate) fn accept(&self) {
        self.accepted.store(self.resets.load(Relaxed), Relaxed);
    }

    /// Records that the driver was called after the first `resets` resets.
    pub(crate) fn settle(&self, resets: u32) {
        self.settled.store(resets, Relaxed);
    }
}
