// SPDX-License-Identifier: GPL-2.0

//! The state of a device's migration, and the only one who changes it.

use super::{
    data_file::{
        LoadSession,
        SaveSession, //
    },
    fsm, Flags, Migratable, Phase, State,
};
use crate::device::{
    Device,
    Open, //
};
use core::mem;
use kernel::{
    fs::File,
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, Mutex,
    },
};

/// Where a device is, with the session that this state has.
///
/// A saving state without a session cannot be written down, nor a session in another state.
enum Current<M: Migratable> {
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
            Self::Error => State::Error,
            Self::Stop => State::Stop,
            Self::Running => State::Running,
            Self::RunningP2p => State::RunningP2p,
            Self::PreCopy(_) => State::PreCopy,
            Self::PreCopyP2p(_) => State::PreCopyP2p,
            Self::StopCopy(_) => State::StopCopy,
            Self::Resuming(_) => State::Resuming,
        }
    }

    /// Leaves the state for one without a session, and ends the one there was.
    fn leave(&mut self, to: Self) {
        match mem::replace(self, to) {
            Self::PreCopy(session) | Self::PreCopyP2p(session) | Self::StopCopy(session) => {
                session.end();
            }
            Self::Resuming(session) => session.end(),
            Self::Error | Self::Stop | Self::Running | Self::RunningP2p => (),
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

/// The migration of one device.
///
/// Lives as long as the device. The driver's open data is handed in with each call that needs it,
/// because it comes and goes with open and close.
///
/// A device of [`emulated`](crate::emulated) has one already. A driver that has its own
/// `struct vfio_migration_ops` calls it from there, and from its reset and close.
///
/// # Examples
///
/// What a variant driver of a PCI device has for `migration_set_state`, and when the device was
/// reset.
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
///     fn set_state(
///         &self,
///         chip: &Arc<Chip>,
///         device: &Device<Open>,
///         target: u32,
///     ) -> Result<Option<ARef<File>>> {
///         self.engine.set_state(chip, device, target)
///     }
///
///     fn reset_done(&self, chip: &Arc<Chip>) {
///         self.engine.reset(chip);
///     }
/// }
/// ```
#[pin_data]
pub struct Engine<M: Migratable> {
    flags: Flags,
    /// Held while the driver's methods run, never across a user copy.
    #[pin]
    current: Mutex<Current<M>>,
    /// A copy of the state in `current` for those who must not wait for it.
    state: Atomic<u32>,
}

impl<M: Migratable> Engine<M> {
    /// What the flags need is there.
    const COMPLETE: () = {
        assert!(
            !M::FLAGS.p2p() || (M::HAS_QUIESCE_P2P && M::HAS_RESUME_P2P),
            "VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()"
        );
        assert!(
            !M::FLAGS.pre_copy() || M::HAS_PRE_COPY,
            "VFIO_MIGRATION_PRE_COPY needs pre_copy()"
        );
    };

    /// Makes the engine of a device that supports `flags`. The device is in `RUNNING`.
    ///
    /// Fails with `EINVAL` if the flags are not within [`Migratable::FLAGS`].
    pub fn new(flags: Flags) -> impl PinInit<Self, Error> {
        const { Self::COMPLETE };
        try_pin_init!(Self {
            flags: flags.is_within(M::FLAGS).then_some(flags).ok_or(EINVAL)?,
            current <- new_mutex!(Current::Running, "vfio::migration::Engine::current"),
            state: Atomic::new(State::Running.as_raw()),
        }? Error)
    }

    /// Returns what the device supports.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// Returns the state, for `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE` and for debugfs.
    ///
    /// Does not wait for a state change that is under way; then it returns a state of the path.
    /// May be called at any time, whether the device is open or not.
    pub fn state(&self) -> State {
        State::from_raw(self.state.load(Relaxed)).unwrap_or(State::Error)
    }

    /// Brings the device into the state `target`, for `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
    ///
    /// Returns the data_fd's file if the last arc opened a session. `target` is what the user
    /// wrote. Waits for another state change that is under way. May sleep.
    ///
    /// Fails with `EINVAL` if there is no way to the target: if there is no such state, if the
    /// device does not support it, if it is `ERROR`, or if the device is in `ERROR`; nothing has
    /// changed then. Fails with the error of the [`Migratable`], and with `ENOMEM`, if something
    /// fails on the way; the device stays in a state of the path then, which
    /// [`state()`](Self::state) tells.
    pub fn set_state(
        &self,
        driver: &Arc<M>,
        device: &Device<Open>,
        target: u32,
    ) -> Result<Option<ARef<File>>> {
        let target = State::from_raw(target).ok_or(EINVAL)?;
        let mut current = self.current.lock();
        let mut file = None;
        loop {
            let state = current.state();
            let next = fsm::next(self.flags, state, target).ok_or(EINVAL)?;
            if next == state {
                return Ok(file);
            }
            let done = Self::arc(driver, device, &mut current, next);
            self.state.store(current.state().as_raw(), Relaxed);
            file = done?;
        }
    }

    /// Walks one arc.
    ///
    /// Fails without a change of state, unless undoing what was done fails too; then the device is
    /// in `ERROR`.
    fn arc(
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
                Self::or_undo(current, driver.stop(), || driver.resume_p2p())?;
                current.leave(Current::Stop);
            }
            (State::Stop, State::Running) => {
                driver.start()?;
                Self::or_undo(current, driver.resume_p2p(), || driver.stop())?;
                current.leave(Current::Running);
            }
            (State::Running, State::PreCopy) => {
                let (session, file) = SaveSession::begin(driver, device, Phase::PreCopy)?;
                current.leave(Current::PreCopy(session));
                return Ok(Some(file));
            }
            (State::RunningP2p, State::PreCopyP2p) => {
                let (session, file) = SaveSession::begin(driver, device, Phase::PreCopy)?;
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
                Self::or_undo(current, session.seal(), || driver.start())?;
                *current = Current::StopCopy(session);
            }
            (State::PreCopy, State::StopCopy) => {
                let session = current.saving()?.clone();
                driver.quiesce_p2p()?;
                Self::or_undo(current, driver.stop(), || driver.resume_p2p())?;
                Self::or_undo(current, session.seal(), || {
                    driver.start()?;
                    driver.resume_p2p()
                })?;
                *current = Current::StopCopy(session);
            }
            (State::Stop, State::StopCopy) => {
                let (session, file) = SaveSession::begin(driver, device, Phase::StopCopy)?;
                current.leave(Current::StopCopy(session));
                return Ok(Some(file));
            }
            (State::StopCopy, State::Stop) => current.leave(Current::Stop),
            (State::Stop, State::Resuming) => {
                let (session, file) = LoadSession::begin(driver)?;
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

    /// Undoes the first half of an arc if its second half failed.
    fn or_undo(
        current: &mut Current<M>,
        done: Result,
        undo: impl FnOnce() -> Result, //
    ) -> Result {
        if done.is_err() && undo().is_err() {
            current.leave(Current::Error);
        }
        done
    }

    /// Returns how many bytes `STOP_COPY` would stream from now on, for
    /// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`. Answered in every state. Waits for a state change that
    /// is under way. May sleep.
    pub fn data_size(&self, driver: &Arc<M>) -> u64 {
        let current = self.current.lock();
        match current.saving() {
            Ok(session) => session.data_size(),
            Err(_) => driver.data_size(),
        }
    }

    /// Resets the device and returns it to `RUNNING`, from every state, for `VFIO_DEVICE_RESET`.
    ///
    /// Waits for a state change that is under way. May sleep.
    pub fn reset(&self, driver: &Arc<M>) {
        let mut current = self.current.lock();
        // The session ends first, so that nothing of it reaches the device after the reset.
        current.leave(Current::Error);
        driver.reset();
        current.leave(Current::Running);
        self.state.store(State::Running.as_raw(), Relaxed);
    }

    /// Ends what the user began, when the device is closed for the last time. May sleep.
    pub fn close(&self) {
        let mut current = self.current.lock();
        current.leave(Current::Running);
        self.state.store(State::Running.as_raw(), Relaxed);
    }
}
