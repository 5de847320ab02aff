// SPDX-License-Identifier: GPL-2.0

//! A device of a variant driver, and the calls of the core on it.
//!
//! C header: [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    migration::{
        Engine,
        Flags,
        Migratable,
        Notifier,
        ResetBy,
        State, //
    },
    pci::{
        function::{
            Function,
            BARS, //
        },
        memory::BarMemory,
        resets::{
            Exclusion,
            Resets, //
        },
        Operations,
        Region, //
    },
    region::{
        self,
        Position, //
    },
    user::{
        lock_killable,
        UserBuf, //
    },
};
use core::ptr::NonNull;
use kernel::{
    fs::File,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Completion,
        Mutex,
        SpinLock, //
    },
    types::Opaque, //
};

/// The handling of a BAR; see [`Region`].
enum Handling {
    Direct,
    Trapped,
    Tracked(BarMemory),
}

/// Data that exists from the first open to the last close.
pub(super) struct OpenDevice<T: Operations> {
    data: Arc<T::OpenData>,
    function: Arc<Function>,
    regions: [Handling; BARS],
}

impl<T: Operations> OpenDevice<T> {
    /// Returns the handling of a region.
    fn handling(&self, region_index: u32) -> &Handling {
        let handling = self.regions.get(region_index as usize);
        handling.unwrap_or(&Handling::Direct)
    }

    /// Returns whether the core serves accesses to a region.
    pub(super) fn is_direct(&self, region_index: u32) -> bool {
        matches!(self.handling(region_index), Handling::Direct)
    }

    /// Returns whether a region may be mapped, if the core supports it.
    pub(super) fn is_mappable(&self, region_index: u32) -> bool {
        !matches!(self.handling(region_index), Handling::Trapped)
    }

    /// Returns the tracked memory in the BARs.
    fn tracked(&self) -> impl Iterator<Item = &BarMemory> {
        self.regions.iter().filter_map(|handling| match handling {
            Handling::Tracked(memory) => Some(memory),
            _ => None,
        })
    }

    /// Passes writes and stores of the user again.
    fn pass(&self) {
        self.tracked().for_each(BarMemory::start);
        self.function.start();
    }

    /// Returns whether the core serves accesses to all regions.
    pub(super) fn is_all_direct(&self) -> bool {
        (0..BARS as u32).all(|index| self.is_direct(index))
    }

    fn read(&self, pos: Position, to: &mut [u8]) -> Result {
        match self.handling(pos.region_index) {
            Handling::Trapped if T::HAS_READ => {
                self.function.user_may_access()?;
                T::read(&self.data, pos, to)
            }
            _ => self.function.user_read(pos, to),
        }
    }

    fn write(&self, pos: Position, from: &[u8]) -> Result {
        self.function
            .pass(|| match self.handling(pos.region_index) {
                Handling::Tracked(memory) => memory.user_write(pos.region_offset as usize, from),
                Handling::Trapped if T::HAS_WRITE => {
                    self.function.user_may_access()?;
                    T::write(&self.data, pos, from)
                }
                _ => self.function.user_write(pos, from),
            })
    }
}

/// Forwards the engine's calls to the driver, and drops the user's writes while the device is
/// stopped.
#[vtable]
impl<T: Operations> Migratable for OpenDevice<T> {
    type OwnerModule = <T::OpenData as Migratable>::OwnerModule;
    type Saver = <T::OpenData as Migratable>::Saver;
    type Loader = <T::OpenData as Migratable>::Loader;
    const FLAGS: Flags = <T::OpenData as Migratable>::FLAGS;

    // A method is forwarded only if the driver has it.
    const HAS_QUIESCE_P2P: bool = <T::OpenData as Migratable>::HAS_QUIESCE_P2P;
    const HAS_RESUME_P2P: bool = <T::OpenData as Migratable>::HAS_RESUME_P2P;
    const HAS_PRE_COPY: bool = <T::OpenData as Migratable>::HAS_PRE_COPY;

    fn begin_arc(&self, from: State, to: State) -> Result {
        self.data.begin_arc(from, to)
    }

    fn end_arc(&self) {
        self.function.end_arc();
        self.data.end_arc();
    }

    // Each arc that calls the driver fails if the device is gone. Otherwise an arc that needs no
    // access, or writes that are posted, would succeed.

    fn quiesce_p2p(&self) -> Result {
        self.function.check()?;
        self.data.quiesce_p2p()
    }

    fn resume_p2p(&self) -> Result {
        self.function.check()?;
        self.data.resume_p2p()
    }

    fn stop(&self) -> Result {
        self.function.check()?;
        self.function.stop()?;
        self.tracked()
            .try_for_each(BarMemory::stop)
            .and_then(|()| self.data.stop())
            .inspect_err(|_| self.pass())
    }

    fn start(&self) -> Result {
        self.function.check()?;
        self.data.start()?;
        self.pass();
        Ok(())
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver> {
        this.function.check()?;
        this.function.resets().begin_session(notifier.clone());
        T::OpenData::pre_copy(&this.data, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver> {
        this.function.check()?;
        this.function.resets().begin_session(notifier.clone());
        T::OpenData::save(&this.data, notifier)
    }

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Loader> {
        this.function.check()?;
        this.function.resets().begin_session(notifier.clone());
        T::OpenData::load(&this.data, notifier)
    }

    fn loaded(&self, loader: &mut Self::Loader) -> Result {
        self.function.check()?;
        self.data.loaded(loader)
    }

    fn data_size(&self) -> Result<u64> {
        self.data.data_size()
    }

    fn is_broken(&self) -> bool {
        self.function.is_broken() || self.data.is_broken()
    }

    fn halt(&self) {
        self.function.halt();
        self.tracked().for_each(BarMemory::halt);
        self.data.halt();
    }

    fn reset(&self) -> Result {
        self.function.accept();
        self.data.reset()?;
        self.function.check()?;
        self.tracked().for_each(BarMemory::start);
        self.function.reset_gate();
        Ok(())
    }
}

/// Returns whether a page fault is by the kernel, such as by KVM for a guest, and the caller looks
/// for the page again after `VM_FAULT_RETRY`.
///
/// Otherwise such a caller fails with `EFAULT` if the page is unmapped, by a reset or to be
/// streamed, before it finds it. An access of the user faults again.
fn looks_again(flags: bindings::fault_flag) -> bool {
    const NOT: bindings::fault_flag = bindings::fault_flag_FAULT_FLAG_USER
        | bindings::fault_flag_FAULT_FLAG_MKWRITE
        | bindings::fault_flag_FAULT_FLAG_TRIED
        | bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT;
    const RETRY: bindings::fault_flag = bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY;

    flags & (RETRY | NOT) == RETRY
}

/// Private data of a device.
#[pin_data]
pub(super) struct Private<T: Operations> {
    #[pin]
    data: T,
    #[pin]
    pub(super) engine: Engine<OpenDevice<T>>,
    /// The resets, which may begin and end at any time.
    resets: Arc<Resets>,
    /// Held while a reset is completed, and during a state change. Outside of the engine's locks.
    ///
    /// The number of the last reset, or failure, that has discarded the state of a stopped device,
    /// if the user was not told of it and has not requested a later reset.
    #[pin]
    settling: Mutex<Option<u64>>,
    /// Present while the device is open.
    #[pin]
    opened: SpinLock<Option<Arc<OpenDevice<T>>>>,
    /// Completed when the core has released the device.
    pub(super) released: Arc<Completion>,
}

impl<T: Operations> Private<T> {
    /// Creates the private data of a device that is not open.
    pub(super) fn new(
        data: impl PinInit<T, Error>,
        released: Arc<Completion>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data <- data,
            engine <- Engine::new(data.migration_flags()),
            resets: Resets::new()?,
            settling <- new_mutex!(None, "vfio::pci::Private::settling"),
            opened <- new_spinlock!(None, "vfio::pci::Private::opened"),
            released,
        }? Error)
    }
}

/// A device of driver `T`, allocated by the core.
///
/// # Invariants
///
/// - `core` is initialised by `vfio_pci_core_init_dev()`.
/// - `private` is initialised once `core.vdev.ops` is [`VTable::OPS`](super::vtable::VTable::OPS).
#[repr(C)]
pub(super) struct Variant<T: Operations> {
    pub(super) core: Opaque<bindings::vfio_pci_core_device>,
    pub(super) private: Private<T>,
}

impl<T: Operations> Variant<T> {
    /// Returns the device of a callback.
    ///
    /// # Safety
    ///
    /// `vdev` must point to a device that a driver of type `T` has allocated and finished in
    /// `probe()`, and its reference count must not be zero before `'a` ends.
    pub(super) unsafe fn from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a Self {
        // SAFETY: By the safety requirements, because `core` is at offset 0, and has the `struct
        // vfio_device` at offset 0.
        unsafe { &*vdev.cast() }
    }

    /// Returns the data of the open device. Fails with `ENODEV` if it is not open.
    pub(super) fn opened(&self) -> Result<Arc<OpenDevice<T>>> {
        self.private.opened.lock().clone().ok_or(ENODEV)
    }

    /// Returns the data of the open device, after a reset or a failure is completed. May sleep.
    ///
    /// Fails with `ENODEV` if it is not open, and with `EINTR` if the task is killed while it
    /// waits. If the driver fails to reset the device, the state is `ERROR`, but the call of the
    /// user may be the reset that repairs it.
    pub(super) fn settled(&self) -> Result<Arc<OpenDevice<T>>> {
        let opened = self.opened()?;
        self.settle_host(&opened)?;
        Ok(opened)
    }

    /// Completes a reset by the host or a failure, if there was one. Fails only with `EINTR`.
    fn settle_host(&self, opened: &Arc<OpenDevice<T>>) -> Result {
        match self.settle(opened, ResetBy::Host) {
            Err(EINTR) => Err(EINTR),
            _ => Ok(()),
        }
    }

    /// Completes a reset by its originator, or a failure, if there was one. Waits for the end of a
    /// reset under way. Fails with the error of the driver's reset, and with `EINTR`.
    fn settle(&self, opened: &Arc<OpenDevice<T>>, by: ResetBy) -> Result {
        if !self.private.resets.is_unsettled() {
            return Ok(());
        }
        self.complete(opened, by, &mut *lock_killable(&self.private.settling)?)
    }

    /// The part of [`settle()`](Self::settle) with the lock held, which protects `lost`.
    fn complete(&self, opened: &Arc<OpenDevice<T>>, by: ResetBy, lost: &mut Option<u64>) -> Result {
        let resets = &self.private.resets;
        while resets.is_unsettled() {
            let count = resets.wait_killable()?;
            let engine = &self.private.engine;
            // The state does not change meanwhile: state changes hold `lost`, too. A reset that
            // fails also discards the state, and the next one begins in `ERROR`.
            let state = engine.state();
            if matches!(state, State::Stop | State::StopCopy | State::Resuming) {
                *lost = Some(count);
            }
            let done = match resets.has_failed() {
                true => engine.fail_killable(opened),
                false => engine.reset_from(opened, by),
            };
            if done == Err(EINTR) {
                return done;
            }
            if resets.settle(count) {
                // If it failed, the state is `ERROR`, until the next reset.
                return done;
            }
        }
        Ok(())
    }

    /// Completes a reset, and changes the migration state; see [`Engine::set_state()`]. May sleep.
    ///
    /// Fails with `ECANCELED`, once, if a reset that the user did not request has discarded the
    /// state of a stopped device: a state change would run a device that is cleared.
    pub(super) fn set_state(
        &self,
        device: &Device<Open>,
        target: u32,
    ) -> Result<Option<ARef<File>>> {
        let opened = self.opened()?;
        // Held until the state has changed, so that another call cannot complete a reset between
        // the check and the change.
        let mut lost = lock_killable(&self.private.settling)?;
        self.complete(&opened, ResetBy::Host, &mut lost)
            .inspect_err(|e| *lost = lost.filter(|_| *e == EINTR))?;
        let engine = &self.private.engine;
        if engine.state() == State::Error {
            // The error of this call tells the user.
            *lost = None;
        }
        engine.set_state_if(&opened, device, target, || match lost.take() {
            Some(_) => Err(ECANCELED),
            None => Ok(()),
        })
    }

    /// Calls `core`, which passes a call of the user to the core, and completes a reset. A reset
    /// that `core` has begun was requested by the user. May sleep.
    pub(super) fn call(
        &self,
        opened: &Arc<OpenDevice<T>>,
        core: impl FnOnce() -> isize,
    ) -> Result<isize> {
        let resets = &self.private.resets;
        let seen = resets.count();
        let done = core();
        let own = resets.own_after(seen);
        let by = own.map_or(ResetBy::Host, |_| ResetBy::Client);
        let settled = self.settle(opened, by);
        // The error of the core is more important.
        if done < 0 {
            return Ok(done);
        }
        if let Some(own) = own {
            settled?;
            let mut lost = lock_killable(&self.private.settling)?;
            // A later reset stays to be reported.
            *lost = lost.filter(|&lost| lost > own);
        }
        Ok(done)
    }

    /// Records the start of a reset, and unmaps all BARs from all address spaces, like
    /// `vfio_pci_zap_bars()`. May be called with `memory_lock` held. May sleep.
    pub(super) fn reset_prepare(&self) {
        self.private.resets.begin();
        let end = Position::start_of(BARS as u32) as bindings::loff_t;
        // SAFETY: The device is valid, and has an inode during its whole lifetime.
        unsafe {
            let inode = (*self.core.get()).vdev.inode;
            bindings::unmap_mapping_range((*inode).i_mapping, 0, end, 1);
        }
    }

    /// Lets no reset by another task begin while the core enables or disables the device: each
    /// saves and restores the configuration space, in the same place. May sleep.
    ///
    /// A reset that waits for this has the lock of the device, which the core only tries to take
    /// then, and no lock of the core, because a reset by a user excludes opens and closes.
    pub(super) fn exclude_resets(&self) -> Exclusion<'_> {
        self.private.resets.exclude()
    }

    /// The same for an open. Fails with `EINTR` if the task is killed while it waits for the end of
    /// a reset.
    pub(super) fn exclude_resets_killable(&self) -> Result<Exclusion<'_>> {
        self.private.resets.exclude_killable()
    }

    /// Records the end of a reset. May be called with `memory_lock` held. Does not sleep.
    pub(super) fn reset_done(&self) {
        self.private.resets.end();
    }

    /// Records that the device cannot be accessed, or has lost its state. The state is `ERROR`
    /// until a reset. Does not wait for the session, whose saver or loader may wait for locks that
    /// the caller holds. Does not sleep.
    pub(super) fn fail(&self) {
        self.private.resets.fail();
    }

    /// Returns the migration state.
    pub(super) fn state(&self) -> State {
        let resets = &self.private.resets;
        match self.opened() {
            Ok(_) if resets.is_unsettled() && resets.has_failed() => State::Error,
            Ok(_) if resets.is_unsettled() => State::Running,
            _ => self.private.engine.state(),
        }
    }

    /// Creates the data of an open device, for the first open. May sleep.
    ///
    /// # Safety
    ///
    /// `vfio_pci_core_enable()` must have succeeded. If this succeeds, [`close()`](Self::close)
    /// must be called before `vfio_pci_core_disable()`.
    pub(super) unsafe fn open(&self) -> Result {
        self.private.engine.open()?;
        *self.private.settling.lock() = None;
        // SAFETY: By the safety requirements. `close()` closes the function, and so does this if it
        // fails.
        let function = unsafe {
            let core = NonNull::from(&self.core).cast();
            Function::new(core, self.private.resets.clone())
        }?;
        let done = self.set_up(&function);
        if done.is_err() {
            let opened = self.private.opened.lock().take();
            drop(opened);
            function.close();
        }
        done
    }

    fn set_up(&self, function: &Arc<Function>) -> Result {
        let data = self.private.data.open(function.clone());
        let data = Arc::pin_init(data, GFP_KERNEL_ACCOUNT)?;
        let opened = OpenDevice {
            regions: self.regions(&data, function)?,
            data,
            function: function.clone(),
        };
        let opened = Arc::new(opened, GFP_KERNEL_ACCOUNT)?;
        *self.private.opened.lock() = Some(opened.clone());
        // The function begins with a reset.
        self.settle(&opened, ResetBy::Open)
    }

    /// Returns the handling of each BAR.
    ///
    /// Fails with `EINVAL`, and logs the reason, if it does not match the device.
    fn regions(&self, data: &T::OpenData, function: &Arc<Function>) -> Result<[Handling; BARS]> {
        let mut regions = [const { Handling::Direct }; BARS];
        for (index, handling) in (0..).zip(&mut regions) {
            *handling = match T::region(data, index) {
                Region::Direct => continue,
                Region::Trapped => Handling::Trapped,
                Region::Tracked(memory) if memory.is_of(function, index) => {
                    Handling::Tracked(memory.clone())
                }
                Region::Tracked(_) => {
                    pr_err!("{}: tracked memory is not that of BAR{}\n", T::NAME, index);
                    return Err(EINVAL);
                }
            };
            if function.is_ports(index) {
                pr_err!("{}: BAR{} is not memory\n", T::NAME, index);
                return Err(EINVAL);
            }
            // SAFETY: The device is enabled, so the field does not change.
            if u32::from(unsafe { (*self.core.get()).msix_bar }) == index {
                pr_err!("{}: BAR{} has the table of MSI-X\n", T::NAME, index);
                return Err(EINVAL);
            }
        }
        Ok(regions)
    }

    /// Clears the device and drops the data of an open device, for the last close. May sleep.
    pub(super) fn close(&self) {
        self.private.engine.close();
        let Ok(opened) = self.opened() else {
            return;
        };
        let resets = &self.private.resets;
        // The sessions have ended. Another reset meanwhile makes this one fail.
        let done = opened.function.with_power(|| loop {
            let count = resets.wait_for_end();
            let done = opened.reset();
            if resets.settle(count) {
                break done;
            }
        });
        if let Err(error) = done {
            pr_warn!("{}: a closed device is not reset: {:?}\n", T::NAME, error);
        }
        opened.function.close();
        let published = self.private.opened.lock().take();
        // Dropped outside of the lock, because the driver's destructors may sleep.
        drop((published, opened));
    }

    /// Calls `access` after a reset is completed, and again if there is another reset meanwhile.
    fn access(
        &self,
        opened: &Arc<OpenDevice<T>>,
        mut access: impl FnMut(&OpenDevice<T>) -> Result,
    ) -> Result {
        loop {
            let count = self.private.resets.count();
            self.settle_host(opened)?;
            let result = access(opened);
            if result != Err(ENODEV) || self.private.resets.count() == count {
                return result;
            }
        }
    }

    /// Handles a page fault at a page of a region, after a reset is completed. May sleep.
    ///
    /// # Safety
    ///
    /// Must be called in that page fault, which `vmf` describes, on an area made by
    /// `vfio_pci_core_mmap()` for this region.
    pub(super) unsafe fn fault(
        &self,
        vmf: *mut bindings::vm_fault,
        region_index: u32,
        page: usize,
    ) -> bindings::vm_fault_t {
        let Ok(opened) = self.settled() else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        let Handling::Tracked(memory) = opened.handling(region_index) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        // SAFETY: By the safety requirements.
        let result = unsafe { memory.fault(vmf, page) };
        if self.private.resets.is_unsettled() {
            // A reset that began meanwhile may have unmapped the page before it was mapped. The
            // same access faults again, unless the task is killed.
            memory.unmap(page);
        } else if result != bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            return result;
        }
        // SAFETY: By the safety requirements.
        if !looks_again(unsafe { (*vmf).flags }) {
            return bindings::vm_fault_reason_VM_FAULT_NOPAGE;
        }
        // The area, and the device with it, may be gone after the lock is released.
        drop(opened);
        // SAFETY: By the safety requirements. The result tells that the lock is released.
        unsafe { bindings::release_fault_lock(vmf) };
        bindings::vm_fault_reason_VM_FAULT_RETRY
    }

    /// Serves a read() of a region that is not direct. May sleep.
    pub(super) fn read(
        &self,
        opened: &Arc<OpenDevice<T>>,
        user: &mut UserBuf,
        pos: i64,
    ) -> Result<usize> {
        let size_of = |index| opened.function.size(index);
        region::read(user, pos, size_of, |pos, to| {
            self.access(opened, |opened| opened.read(pos, to))
        })
    }

    /// Serves a write() to a region that is not direct. May sleep.
    pub(super) fn write(
        &self,
        opened: &Arc<OpenDevice<T>>,
        user: &mut UserBuf,
        pos: i64,
    ) -> Result<usize> {
        let size_of = |index| opened.function.size(index);
        region::write(user, pos, size_of, |pos, from| {
            self.access(opened, |opened| opened.write(pos, from))
        })
    }
}
