// SPDX-License-Identifier: GPL-2.0

//! The migration state of a device, and all code that changes it.

use super::{
    data_file::{
        LoadSession,
        SaveSession, //
    },
    ledger::Ledger,
    Flags,
    Migratable,
    State, //
};
use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    user::lock_killable, //
};
use core::mem;
use kernel::{
    fs::File,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        lock::mutex::MutexGuard,
        Arc,
        Mutex,
        SpinLock, //
    },
    time::Instant, //
};

/// The state of a device, with the session that belongs to it.
///
/// A saving state without a session, or a session in another state, cannot be represented.
enum Current<M: Migratable> {
    /// The hardware is gone. Only the state, `ERROR`, can be queried.
    Gone,
    Error,
    Stop,
    Running,
    RunningP2p,
    PreCopy(Arc<SaveSession<M>>),
    PreCopyP2p(Arc<SaveSession<M>>),
    StopCopy(Arc<SaveSession<M>>),
    Resuming(Arc<LoadSession<M>>),
}

impl<M: Migratable> Current<M> {
    fn state(&self) -> State {
        match self {
            Self::Gone | Self::Error => State::Error,
            Self::Stop => State::Stop,
            Self::Running => State::Running,
            Self::RunningP2p => State::RunningP2p,
            Self::PreCopy(_) => State::PreCopy,
            Self::PreCopyP2p(_) => State::PreCopyP2p,
            Self::StopCopy(_) => State::StopCopy,
            Self::Resuming(_) => State::Resuming,
        }
    }

    /// Changes the state, and ends the session of the old one.
    fn leave(&mut self, to: Self) {
        match mem::replace(self, to) {
            Self::PreCopy(session) | Self::PreCopyP2p(session) | Self::StopCopy(session) => {
                session.end();
            }
            Self::Resuming(session) => session.end(),
            Self::Gone | Self::Error | Self::Stop | Self::Running | Self::RunningP2p => (),
        }
    }

    /// Fails with `ENODEV` if the hardware is gone.
    fn present(&self) -> Result {
        match self {
            Self::Gone => Err(ENODEV),
            _ => Ok(()),
        }
    }

    /// Returns the session of the saving group.
    fn saving(&self) -> Result<&Arc<SaveSession<M>>> {
        match self {
            Self::PreCopy(session) | Self::PreCopyP2p(session) | Self::StopCopy(session) => {
                Ok(session)
            }
            _ => Err(EINVAL),
        }
    }
}

/// Converts the result of [`Engine::set_state()`] to that of a `migration_set_state()`, which
/// passes the reference on to its caller.
pub(crate) fn file_to_ptr(file: Result<Option<ARef<File>>>) -> *mut bindings::file {
    match file {
        Ok(Some(file)) => ARef::into_raw(file).as_ptr().cast(),
        Ok(None) => core::ptr::null_mut(),
        Err(e) => e.to_ptr(),
    }
}

/// An event of the device that the engine did not cause.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    /// The device has died.
    Failed,
    /// The device was reset, and runs.
    Reset,
}

impl Event {
    /// Returns the error with which the event ends a state change.
    fn error(self) -> Error {
        match self {
            Self::Failed => ENODEV,
            Self::Reset => ECANCELED,
        }
    }
}

/// The originator of a reset.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResetBy {
    /// The client of the device.
    Client,
    /// The host, such as an administrator.
    Host,
    /// The first open, which begins with the state at power on.
    Open,
}

/// The migration of one device.
///
/// Lives as long as the device. The driver's open data is passed to each call that needs it,
/// because it exists only while the device is open.
///
/// The crate creates it for devices of [`emulated`](crate::emulated). A driver with its own `struct
/// vfio_migration_ops` calls it from there, and when the device is opened, reset and closed.
///
/// # Examples
///
/// The part of a variant driver of a PCI device that uses the engine.
///
/// ```
/// use kernel::{
///     fs::File,
///     sync::aref::ARef, //
/// };
/// use vfio::{
///     migration::Engine,
///     Device,
///     Open, //
/// };
///
/// #[pin_data]
/// struct Variant {
///     #[pin]
///     engine: Engine<Chip>,
/// }
///
/// impl Variant {
///     /// Called by `open_device()`.
///     fn open(&self) -> Result {
///         self.engine.open()
///     }
///
///     fn set_state(
///         &self,
///         chip: &Arc<Chip>,
///         device: &Device<Open>,
///         target: u32,
///     ) -> Result<Option<ARef<File>>> {
///         self.engine.set_state(chip, device, target)
///     }
///
///     /// Called with `memory_lock` held.
///     fn reset_done(&self) {
///         self.engine.reset_done();
///     }
///
///     /// Called by the work of the interrupt that reports fatal errors.
///     fn fatal_error(&self) {
///         self.engine.fail();
///     }
/// }
/// ```
#[pin_data]
pub struct Engine<M: Migratable> {
    flags: Flags,
    /// Held while the driver's methods run, never across a user copy.
    #[pin]
    current: Mutex<Current<M>>,
    /// The last event while `current` was held, if any. Nested inside `current`, which is never
    /// waited for with this held.
    #[pin]
    event: SpinLock<Option<Event>>,
    /// A copy of the state in `current`, for readers that must not wait for it.
    state: Atomic<u32>,
    ledger: Arc<Ledger>,
}

impl<M: Migratable> Engine<M> {
    /// Checks that the driver has the methods that its flags need, and the flags that its methods
    /// need. Without P2P, the methods for it are called on the way to `STOP`.
    const COMPLETE: () = {
        assert!(
            !M::FLAGS.p2p() || (M::HAS_QUIESCE_P2P && M::HAS_RESUME_P2P),
            "VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()"
        );
        assert!(
            !M::FLAGS.pre_copy() || M::HAS_PRE_COPY,
            "VFIO_MIGRATION_PRE_COPY needs pre_copy()"
        );
        assert!(
            M::FLAGS.pre_copy() || !M::HAS_PRE_COPY,
            "pre_copy() needs VFIO_MIGRATION_PRE_COPY"
        );
    };

    /// Creates the engine of a device that supports `flags`. The device is in `RUNNING`.
    ///
    /// Fails with `EINVAL` if the flags are not within [`Migratable::FLAGS`], and with `ENOMEM`.
    pub fn new(flags: Flags) -> impl PinInit<Self, Error> {
        const { Self::COMPLETE };
        try_pin_init!(Self {
            flags: flags.is_within(M::FLAGS).then_some(flags).ok_or(EINVAL)?,
            current <- new_mutex!(Current::Running, "vfio::migration::Engine::current"),
            event <- new_spinlock!(None, "vfio::migration::Engine::event"),
            state: Atomic::new(State::Running.as_raw()),
            ledger: Ledger::new()?,
        }? Error)
    }

    /// Returns the flags that the device supports.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// Returns the tracepoints, statistics and verdict of the device.
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Returns the state, for `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE` and for debugfs.
    ///
    /// Does not wait for a state change under way, during which it returns a state of the path. May
    /// be called at any time, whether the device is open or not.
    pub fn state(&self) -> State {
        State::from_raw(self.state.load(Relaxed)).unwrap_or(State::Error)
    }

    /// Calls `change` with `current` locked.
    fn with_current(&self, change: impl FnOnce(&mut Current<M>)) {
        let mut current = self.current.lock();
        change(&mut current);
        self.release(current);
    }

    /// Calls `change` with `current` locked, on behalf of an ioctl.
    ///
    /// Fails with `EINTR`, without the call, if the task is killed while it waits for the lock.
    fn try_with_current<R>(&self, change: impl FnOnce(&mut Current<M>) -> Result<R>) -> Result<R> {
        let mut current = lock_killable(&self.current)?;
        let result = change(&mut current);
        self.release(current);
        result
    }

    /// Releases `current`, after handling the event that [`report()`](Self::report) left to its
    /// holder.
    fn release(&self, mut current: MutexGuard<'_, Current<M>>) {
        loop {
            let mut event = self.event.lock();
            let Some(happened) = event.take() else {
                // With `event` held: a report is either seen by this loop or gets `current`.
                return drop(current);
            };
            drop(event);
            self.handle_event(&mut current, happened);
        }
    }

    /// Handles an event of the device.
    fn handle_event(&self, current: &mut Current<M>, event: Event) {
        if current.present().is_ok() {
            current.leave(match event {
                Event::Failed => Current::Error,
                Event::Reset => Current::Running,
            });
        }
        self.publish(current);
    }

    /// Handles an event of the device, now or when `current` is released.
    fn report(&self, happened: Event) {
        let mut event = self.event.lock();
        *event = Some(happened);
        let current = self.current.try_lock();
        drop(event);
        if let Some(current) = current {
            self.release(current);
        }
    }

    /// Publishes the state for [`state()`](Self::state).
    fn publish(&self, current: &Current<M>) {
        let state = current.state();
        self.state.store(state.as_raw(), Relaxed);
        self.ledger.note(|verdict, now| verdict.enter(now, state));
    }

    /// Reports that the device has died. Its state becomes `ERROR`, its session ends with `ENODEV`,
    /// and readers, writers and pollers are woken. A reset leaves `ERROR`.
    ///
    /// Does not wait for a state change under way. That ends after the current method, and fails
    /// with `ENODEV` if the method succeeds. A report while the device is closed, or during the
    /// last close, has no effect after the next [`open()`](Self::open). May sleep. May be called at
    /// any time, including by a method of [`Migratable`] and with `memory_lock` held, but not by a
    /// method of a [`Saver`](super::Saver) or [`Loader`](super::Loader): those run under the lock
    /// of the session that ends.
    pub fn fail(&self) {
        self.report(Event::Failed);
    }

    /// The same on behalf of a call of the user, after a report that was recorded. Calls
    /// [`Migratable::halt()`]. Waits killably for a state change under way. Fails with `EINTR`,
    /// without an effect, if the task is killed while it waits.
    pub(crate) fn fail_killable(&self, driver: &Arc<M>) -> Result {
        self.try_with_current(|current| {
            self.handle_event(current, Event::Failed);
            driver.halt();
            Ok(())
        })
    }

    /// Reports that the device was reset by other means than [`reset()`](Self::reset) and is
    /// running, for `reset_done` of a PCI driver. The session ends and the state becomes `RUNNING`.
    /// Calls no method of the [`Migratable`].
    ///
    /// Does not wait for a state change under way. The state change stops after the current arc,
    /// and fails with `ECANCELED` if arcs are left. The reset then takes effect. May sleep. May be
    /// called where [`fail()`](Self::fail) may.
    pub fn reset_done(&self) {
        self.report(Event::Reset);
    }

    /// Ends all use of the device because its hardware goes away, such as when the driver of a PF
    /// is unbound. The session ends with `ENODEV`, the state remains `ERROR`, and every later call
    /// that needs the driver fails with `ENODEV`, including a reset.
    ///
    /// When this returns, no method of the driver is under way. Hence it waits for a state change,
    /// and must not be called with locks held that methods need, such as `memory_lock`. May sleep.
    pub fn fence(&self) {
        self.with_current(|current| {
            current.leave(Current::Gone);
            self.publish(current);
        });
    }

    /// Brings the device into the state `target`, for `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
    ///
    /// Returns the data_fd's file if the last arc opened a session. `target` is the user's value.
    /// `driver` must be the same from open to close. The `migration_flags` of `device` should be
    /// [`flags()`](Self::flags): with them, `vfio_mig_get_next_state()` selects the path. A path
    /// with a state that the engine's flags exclude ends before that state, with `EINVAL`. Waits
    /// killably for another state change under way. May sleep.
    ///
    /// Fails with `EINVAL`, and changes nothing, if there is no path to the target: if the state
    /// does not exist, the device does not support it, it is `ERROR`, or the device is in `ERROR`.
    /// Fails with `ENOMEM` or the error of the [`Migratable`] if an arc fails; the device then
    /// stays in a state of the path, which [`state()`](Self::state) returns. Fails with `ENODEV` if
    /// the device has [died](Self::fail) meanwhile or is [gone](Self::fence). Fails with
    /// `ECANCELED` if the device was [reset](Self::reset_done) meanwhile and arcs are left; the
    /// state is then `RUNNING`. Fails with `EINTR`, and changes nothing, if the task is killed
    /// while it waits.
    pub fn set_state(
        &self,
        driver: &Arc<M>,
        device: &Device<Open>,
        target: u32,
    ) -> Result<Option<ARef<File>>> {
        self.set_state_if(driver, device, target, || Ok(()))
    }

    /// The same, but calls `may` first, and fails like it. `may` is not called if there is no path
    /// to the target.
    pub(crate) fn set_state_if(
        &self,
        driver: &Arc<M>,
        device: &Device<Open>,
        target: u32,
        may: impl FnOnce() -> Result,
    ) -> Result<Option<ARef<File>>> {
        let target = State::from_raw(target).ok_or(EINVAL)?;
        self.ledger.set_name(device.parent_name());
        self.try_with_current(|current| {
            current.present()?;
            self.next(device, current.state(), target)?;
            may()?;
            self.walk(driver, device, current, target)
        })
    }

    /// Returns the next state on the path to `target`.
    ///
    /// Fails with `EINVAL` if the engine's flags exclude it: the driver may lack the methods for
    /// it, whatever the flags of `device` are.
    fn next(&self, device: &Device<Open>, state: State, target: State) -> Result<State> {
        if state == State::Error {
            // vfio core would warn.
            return Err(EINVAL);
        }
        State::from_raw(device.next_state(state.as_raw(), target.as_raw())?)
            .filter(|&next| self.flags.has(next))
            .ok_or(EINVAL)
    }

    /// Walks to a state, arc by arc.
    fn walk(
        &self,
        driver: &Arc<M>,
        device: &Device<Open>,
        current: &mut Current<M>,
        target: State,
    ) -> Result<Option<ARef<File>>> {
        let mut file = None;
        loop {
            let state = current.state();
            let next = self.next(device, state, target)?;
            if next == state {
                return Ok(file);
            }
            // The device is not in `state` any more.
            if let Some(happened) = *self.event.lock() {
                return Err(happened.error());
            }
            let start = Instant::now();
            let done = driver
                .begin_arc(state, next)
                .and_then(|()| self.arc(driver, device, current, next));
            self.ledger.arc(
                state,
                next,
                start,
                done.as_ref().map(|_| ()).map_err(|e| *e),
            );
            if done.is_err() && driver.is_broken() {
                current.leave(Current::Error);
            }
            // First, so that the verdict sees the new state when waiting writes are dropped.
            self.publish(current);
            if current.state() != State::Error {
                driver.end_arc();
            } else if *self.event.lock() != Some(Event::Reset) {
                // A device that was reset meanwhile is running, and release() changes the state.
                driver.halt();
            }
            file = done?;
            if *self.event.lock() == Some(Event::Failed) {
                return Err(Event::Failed.error());
            }
        }
    }

    /// Walks one arc.
    ///
    /// If it fails, the state is unchanged, unless undoing fails too or the device is broken. Then
    /// the state is `ERROR`.
    fn arc(
        &self,
        driver: &Arc<M>,
        device: &Device<Open>,
        current: &mut Current<M>,
        to: State,
    ) -> Result<Option<ARef<File>>> {
        match (current.state(), to) {
            (State::Running, State::RunningP2p) => {
                driver.quiesce_p2p()?;
                current.leave(Current::RunningP2p);
            }
            (State::RunningP2p, State::Running) => {
                driver.resume_p2p()?;
                current.leave(Current::Running);
            }
            (State::RunningP2p, State::Stop) => {
                driver.stop()?;
                current.leave(Current::Stop);
            }
            (State::Stop, State::RunningP2p) => {
                driver.start()?;
                current.leave(Current::RunningP2p);
            }
            (State::Running, State::Stop) => {
                driver.quiesce_p2p()?;
                Self::or_undo(driver, current, driver.stop(), || driver.resume_p2p())?;
                current.leave(Current::Stop);
            }
            (State::Stop, State::Running) => {
                driver.start()?;
                Self::or_undo(driver, current, driver.resume_p2p(), || driver.stop())?;
                current.leave(Current::Running);
            }
            (State::Running, State::PreCopy) => {
                let (session, file) = SaveSession::begin(driver, device, to, &self.ledger)?;
                current.leave(Current::PreCopy(session));
                return Ok(Some(file));
            }
            (State::RunningP2p, State::PreCopyP2p) => {
                let (session, file) = SaveSession::begin(driver, device, to, &self.ledger)?;
                current.leave(Current::PreCopyP2p(session));
                return Ok(Some(file));
            }
            (State::PreCopy, State::Running) => current.leave(Current::Running),
            (State::PreCopyP2p, State::RunningP2p) => current.leave(Current::RunningP2p),
            (State::PreCopy, State::PreCopyP2p) => {
                let session = current.saving()?.clone();
                driver.quiesce_p2p()?;
                *current = Current::PreCopyP2p(session);
            }
            (State::PreCopyP2p, State::PreCopy) => {
                let session = current.saving()?.clone();
                driver.resume_p2p()?;
                *current = Current::PreCopy(session);
            }
            (State::PreCopyP2p, State::StopCopy) => {
                let session = current.saving()?.clone();
                driver.stop()?;
                Self::or_undo(driver, current, session.seal(), || driver.start())?;
                *current = Current::StopCopy(session);
            }
            (State::PreCopy, State::StopCopy) => {
                let session = current.saving()?.clone();
                driver.quiesce_p2p()?;
                Self::or_undo(driver, current, driver.stop(), || driver.resume_p2p())?;
                Self::or_undo(driver, current, session.seal(), || {
                    driver.start()?;
                    driver.resume_p2p()
                })?;
                *current = Current::StopCopy(session);
            }
            (State::Stop, State::StopCopy) => {
                let (session, file) = SaveSession::begin(driver, device, to, &self.ledger)?;
                current.leave(Current::StopCopy(session));
                return Ok(Some(file));
            }
            (State::StopCopy, State::Stop) => current.leave(Current::Stop),
            (State::Stop, State::Resuming) => {
                let (session, file) = LoadSession::begin(driver, &self.ledger)?;
                current.leave(Current::Resuming(session));
                return Ok(Some(file));
            }
            (State::Resuming, State::Stop) => {
                if let Current::Resuming(session) = current {
                    session.finish(driver)?;
                }
                current.leave(Current::Stop);
            }
            _ => return Err(EINVAL),
        }
        Ok(None)
    }

    /// Undoes the first half of an arc if its second half failed, unless the device is broken.
    fn or_undo(
        driver: &Arc<M>,
        current: &mut Current<M>,
        done: Result,
        undo: impl FnOnce() -> Result, //
    ) -> Result {
        if done.is_err() && !driver.is_broken() && undo().is_err() {
            current.leave(Current::Error);
        }
        done
    }

    /// Returns the number of bytes that `STOP_COPY` would stream from now on, for
    /// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`. Works in every state. Waits killably for a state change
    /// under way, and state changes wait for [`Migratable::data_size()`]. May sleep. Fails with the
    /// error of the driver, with `ENODEV` if the device is [gone](Self::fence), and with `EINTR` if
    /// the task is killed while it waits.
    pub fn data_size(&self, driver: &Arc<M>) -> Result<u64> {
        loop {
            let size = self.try_with_current(|current| {
                current.present()?;
                match current.saving() {
                    Ok(session) => Ok(Err(session.clone())),
                    Err(_) => driver.data_size().map(Ok),
                }
            });
            let session = match size? {
                Ok(size) => return Ok(size),
                Err(session) => session,
            };
            // A saver that queries firmware does not delay state changes that need no session.
            if let Some(size) = session.data_size()? {
                return Ok(size);
            }
        }
    }

    /// Resets the device from any state to `RUNNING`, for `VFIO_DEVICE_RESET`.
    ///
    /// Waits killably for a state change under way, so it must not be called with `memory_lock`
    /// held; see [`reset_done()`](Self::reset_done). May sleep.
    ///
    /// Fails with the error of the driver; the state is then `ERROR`. Fails with `ENODEV` if the
    /// device is [gone](Self::fence), and with `EINTR`, without a reset, if the task is killed
    /// while it waits.
    pub fn reset(&self, driver: &Arc<M>) -> Result {
        self.reset_from(driver, ResetBy::Client)
    }

    /// The same for a reset by `by`.
    pub(crate) fn reset_from(&self, driver: &Arc<M>, by: ResetBy) -> Result {
        self.try_with_current(|current| {
            current.present()?;
            let state = current.state();
            if by != ResetBy::Open {
                let by_client = by == ResetBy::Client;
                self.ledger
                    .note(|verdict, now| verdict.reset(now, by_client));
            }
            // The session ends first, so that nothing of it reaches the device after the reset.
            current.leave(Current::Error);
            // If the device died before, it is reset now.
            *self.event.lock() = None;
            let done = driver.reset();
            if done.is_ok() {
                current.leave(Current::Running);
            } else {
                driver.halt();
            }
            self.publish(current);
            if by != ResetBy::Open {
                self.ledger.reset(state, done);
            }
            if *self.event.lock() == Some(Event::Failed) {
                return done.and(Err(ENODEV));
            }
            done
        })
    }

    /// Starts in `RUNNING`, on the first open. Events reported while the device was closed are
    /// discarded: the driver resets the device to its state at power on. May sleep.
    ///
    /// Without this call, a device that [died](Self::fail) while it was closed is in `ERROR` for
    /// its next user. Fails with `ENODEV` if the device is [gone](Self::fence), and with `EINTR` if
    /// the task is killed while it waits.
    pub fn open(&self) -> Result {
        self.try_with_current(|current| {
            current.present()?;
            *self.event.lock() = None;
            current.leave(Current::Running);
            self.ledger.note(|verdict, now| verdict.open(now));
            self.publish(current);
            Ok(())
        })
    }

    /// Ends the session and returns to `RUNNING`, on the last close. May sleep.
    ///
    /// Without this call, a remaining session holds a reference to the `struct vfio_device`, and
    /// the removal of the device waits for it.
    pub fn close(&self) {
        self.with_current(|current| {
            *self.event.lock() = None;
            self.ledger.note(|verdict, now| verdict.close(now));
            if current.present().is_ok() {
                current.leave(Current::Running);
            }
            self.publish(current);
        });
    }
}
