// SPDX-License-Identifier: GPL-2.0

//! The phase of a migration session, and the notifier of its waiters.
//!
//! The engine owns both. Tracked memory uses them, too: it notifies when a page becomes dirty.
//!
//! C header: [`include/linux/poll.h`](srctree/include/linux/poll.h)

use kernel::{
    new_spinlock_irq,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{
            AtomicFlag,
            Relaxed, //
        },
        poll::PollCondVarBox,
        Arc,
        SpinLockIrq, //
    },
};

/// The phase of a session in which a chunk is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// In `PRE_COPY` or `PRE_COPY_P2P`: the device continues and may change state that was saved.
    PreCopy,
    /// In `STOP_COPY`: the device is stopped and the stream must end.
    StopCopy,
}

/// Wakes readers, writers and pollers of a session's data_fd.
///
/// There is one for each session. It is passed to [`Migratable::pre_copy`], [`Migratable::save`] or
/// [`Migratable::load`].
///
/// [`Migratable::pre_copy`]: crate::migration::Migratable::pre_copy
/// [`Migratable::save`]: crate::migration::Migratable::save
/// [`Migratable::load`]: crate::migration::Migratable::load
///
/// # Examples
///
/// A saver that is not ready until the device's firmware raises an interrupt.
///
/// ```
/// use kernel::sync::atomic::{
///     Acquire,
///     Atomic,
///     Release, //
/// };
///
/// struct Firmware {
///     ready: Atomic<bool>,
///     notifier: Arc<Notifier>,
/// }
///
/// impl Firmware {
///     /// May be called in any context.
///     fn interrupt(&self) {
///         self.ready.store(true, Release);
///         self.notifier.notify();
///     }
/// }
///
/// struct SlowSaver {
///     firmware: Arc<Firmware>,
///     image: ImageSaver,
/// }
///
/// impl Saver for SlowSaver {
///     fn next(&mut self, phase: Phase) -> Result<Next> {
///         if !self.firmware.ready.load(Acquire) {
///             return Ok(Next::NotReady);
///         }
///         self.image.next(phase)
///     }
///
///     fn remaining(&self) -> Result<Remaining> {
///         self.image.remaining()
///     }
/// }
/// ```
#[pin_data]
pub struct Notifier {
    /// Boxed, so that it is dropped without waiting: dropping a plain `PollCondVar` would delay
    /// close() and state changes by an RCU grace period.
    pub(crate) wait: PollCondVarBox,
    /// Waiters compare these under the lock, so that a wake-up before they sleep is not lost.
    #[pin]
    events: SpinLockIrq<Events>,
    /// The device of the session is stopped. Set under the session's lock.
    stopped: AtomicFlag,
    /// The session has ended, although its content remains.
    ended: AtomicFlag,
}

/// What a [`Notifier`] has done so far.
#[derive(Clone, Copy, Default)]
struct Events {
    /// Number of notifications.
    notifications: u32,
    /// Number of wake-ups, including notifications.
    wakes: u32,
}

impl Notifier {
    /// Creates the notifier of a session that begins in a phase.
    pub(crate) fn new(phase: Phase) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                stopped: AtomicFlag::new(phase == Phase::StopCopy),
                ended: AtomicFlag::new(false),
                wait: PollCondVarBox::new(c"vfio::migration::Notifier", static_lock_class!())?,
                events <- new_spinlock_irq!(Events::default(), "vfio::migration::Notifier::events"),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Wakes the waiters, because something may have become readable or the loader ready. poll()
    /// reports a saving session as readable, and read() calls the saver again. Does not sleep.
    ///
    /// May be called in any context except a non-maskable interrupt, including hard interrupts, and
    /// with locks held: it takes spinlocks with interrupts disabled. With `PREEMPT_RT` these locks
    /// sleep. Then it must be called from a thread, which most handlers of interrupts and timers
    /// are.
    ///
    /// Dropping the last reference may sleep.
    pub fn notify(&self) {
        let mut events = self.events.lock();
        events.notifications = events.notifications.wrapping_add(1);
        events.wakes = events.wakes.wrapping_add(1);
        drop(events);
        self.wait.notify_all();
    }

    /// Makes all later calls on the data_fd fail with `ENODEV`, and wakes the waiters. Takes no
    /// lock of the session, which the caller must end later. Does not sleep.
    pub(crate) fn end(&self) {
        self.ended.store(true, Relaxed);
        self.notify();
    }

    /// Returns the content of the session. Fails with `ENODEV` if the session has ended.
    pub(crate) fn live<'a, T>(&self, content: &'a mut Option<T>) -> Result<&'a mut T> {
        let ended = self.ended.load(Relaxed);
        content.as_mut().filter(|_| !ended).ok_or(ENODEV)
    }

    /// Returns the phase of the session.
    pub(crate) fn phase(&self) -> Phase {
        match self.stopped.load(Relaxed) {
            true => Phase::StopCopy,
            false => Phase::PreCopy,
        }
    }

    /// Sets the phase of the session, whose lock is held.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.stopped.store(phase == Phase::StopCopy, Relaxed);
    }

    /// Wakes readers or writers that wait for their turn. The last answer of the saver stays valid.
    pub(crate) fn wake(&self) {
        let mut events = self.events.lock();
        events.wakes = events.wakes.wrapping_add(1);
        drop(events);
        self.wait.notify_all();
    }

    /// Returns the number of notifications.
    pub(crate) fn events(&self) -> u32 {
        self.events.lock().notifications
    }

    /// Returns the number of wake-ups, including notifications.
    pub(crate) fn wakes(&self) -> u32 {
        self.events.lock().wakes
    }

    /// Waits for a notification after `seen` was returned by [`events()`](Self::events).
    ///
    /// Fails with `ERESTARTSYS` at a signal.
    pub(crate) fn wait_after(&self, seen: u32) -> Result {
        self.wait_until(|events| events.notifications != seen)
    }

    /// Waits for a wake-up after `seen` was returned by [`wakes()`](Self::wakes).
    ///
    /// Fails with `ERESTARTSYS` at a signal.
    pub(crate) fn wait_after_wake(&self, seen: u32) -> Result {
        self.wait_until(|events| events.wakes != seen)
    }

    fn wait_until(&self, done: impl Fn(&Events) -> bool) -> Result {
        let mut events = self.events.lock();
        while !done(&events) {
            if self.wait.wait_interruptible(&mut events) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(())
    }
}
