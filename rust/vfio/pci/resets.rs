// SPDX-License-Identifier: GPL-2.0

//! Record of the resets and failures of a device, and of those that were handled.

use crate::{
    bindings,
    notifier::Notifier,
    wait::{
        WaitQueue,
        FOREVER,
        KILLABLE, //
    },
};
use kernel::{
    current, new_spinlock,
    prelude::*,
    static_lock_class,
    sync::{
        Arc,
        SpinLock, //
    },
    task::Pid,
};

struct Inner {
    /// Number of resets that have begun, and of failures. Each first open counts as a reset.
    count: u64,
    /// The task that has begun or reported the last one.
    task: Pid,
    /// The last one is a failure.
    failed: bool,
    /// The last reset has not ended.
    in_reset: bool,
    /// The task that enables or disables the device, or 0.
    excluder: Pid,
    /// The value of `count` when the driver was last called to reset the device. Other accesses of
    /// the driver fail while the two differ.
    accepted: u64,
    /// The value of `count` for which that call has returned, or the state is `ERROR`.
    settled: u64,
    /// The notifier of the last session.
    session: Option<Arc<Notifier>>,
}

impl Inner {
    /// Counts a reset or a failure by the calling task, and ends the session.
    fn record(&mut self, failed: bool) {
        self.count = self.count.wrapping_add(1);
        self.task = current!().pid();
        self.failed = failed;
        if let Some(notifier) = &self.session {
            notifier.end();
        }
    }

    /// Returns whether the driver may access the device.
    fn is_accepted(&self) -> bool {
        self.accepted == self.count && !self.in_reset
    }
}

/// The resets and failures of a device, from its creation to its removal. A reset can begin and end
/// at any time in between, and a failure be reported, whether the device is open or not.
#[pin_data]
pub(crate) struct Resets {
    #[pin]
    inner: SpinLock<Inner>,
    /// Tasks that wait for the end of a reset, or until one may begin.
    #[pin]
    waiters: WaitQueue,
}

impl Resets {
    /// Creates the record of a device that is not open.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let inner = Inner {
            count: 0,
            task: 0,
            failed: false,
            in_reset: false,
            excluder: 0,
            accepted: 0,
            settled: 0,
            session: None,
        };
        Arc::pin_init(
            pin_init!(Self {
                inner <- new_spinlock!(inner, "vfio::pci::Resets::inner"),
                waiters <- WaitQueue::new(c"vfio::pci::Resets::waiters", static_lock_class!()),
            }),
            GFP_KERNEL,
        )
    }

    /// Records that the device is being opened, so that the driver has to reset it.
    pub(crate) fn open(&self) {
        let mut inner = self.inner.lock();
        inner.count = inner.count.wrapping_add(1);
        inner.failed = false;
    }

    /// Forgets the session. May sleep.
    pub(crate) fn close(&self) {
        let last = self.inner.lock().session.take();
        // Outside of the lock: this may be the last reference.
        drop(last);
    }

    /// Records the notifier of a session, which a reset or a failure ends. May sleep.
    pub(crate) fn begin_session(&self, notifier: Arc<Notifier>) {
        let mut inner = self.inner.lock();
        // Nothing else ends the session of a state change that the last one interrupts.
        if !inner.is_accepted() {
            notifier.end();
        }
        let last = inner.session.replace(notifier);
        drop(inner);
        // Outside of the lock: this may be the last reference.
        drop(last);
    }

    /// Records the start of a reset. Accesses fail until [`accept()`](Self::accept) after its end.
    /// All calls on the data_fd of the session fail from now on, too. Waits while another task has
    /// excluded resets. May sleep.
    pub(crate) fn begin(&self) {
        let task = current!().pid();
        // No signal ends this wait.
        let _ = self
            .waiters
            .wait(bindings::TASK_UNINTERRUPTIBLE, FOREVER, |_| {
                let mut inner = self.inner.lock();
                let may_begin = inner.excluder == 0 || inner.excluder == task;
                if may_begin {
                    inner.in_reset = true;
                    inner.record(false);
                }
                may_begin
            });
    }

    fn exclude_in(&self, state: c_uint) -> Result<Exclusion<'_>> {
        let task = current!().pid();
        self.waiters.wait(state, FOREVER, |_| {
            let mut inner = self.inner.lock();
            if !inner.in_reset {
                inner.excluder = task;
            }
            !inner.in_reset
        })?;
        Ok(Exclusion(self))
    }

    /// Lets no reset by another task begin until the result is dropped. Waits for the end of one
    /// that is under way. Called by one task at a time. May sleep.
    pub(crate) fn exclude(&self) -> Exclusion<'_> {
        // No signal ends this wait.
        self.exclude_in(bindings::TASK_UNINTERRUPTIBLE)
            .unwrap_or_else(|_| Exclusion(self))
    }

    /// The same on behalf of a system call. Fails with `EINTR` if the task is killed while it
    /// waits.
    pub(crate) fn exclude_killable(&self) -> Result<Exclusion<'_>> {
        self.exclude_in(KILLABLE).map_err(|_| EINTR)
    }

    /// Records that the device has failed. Accesses fail until [`accept()`](Self::accept) after the
    /// next reset. All calls on the data_fd of the session fail from now on, too. Does not sleep.
    pub(crate) fn fail(&self) {
        self.inner.lock().record(true);
    }

    /// Records the end of a reset. Does not sleep.
    pub(crate) fn end(&self) {
        self.inner.lock().in_reset = false;
        self.waiters.wake();
    }

    /// Fails between the start of a reset and the call of the driver with `ENODEV`, and after a
    /// failure with `EIO`. Does not sleep.
    pub(crate) fn not_reset(&self) -> Result {
        let inner = self.inner.lock();
        match inner.is_accepted() {
            true => Ok(()),
            false if inner.failed => Err(EIO),
            false => Err(ENODEV),
        }
    }

    /// Returns the number of resets and failures. Does not sleep.
    pub(crate) fn count(&self) -> u64 {
        self.inner.lock().count
    }

    /// Returns the number of resets and failures if there were more than `seen`, and the calling
    /// task has begun the last one. Does not sleep.
    pub(crate) fn own_after(&self, seen: u64) -> Option<u64> {
        let inner = self.inner.lock();
        let is_own = inner.count > seen && inner.task == current!().pid();
        is_own.then_some(inner.count)
    }

    /// Returns whether a reset or a failure must still be handled. Does not sleep.
    pub(crate) fn is_unsettled(&self) -> bool {
        let inner = self.inner.lock();
        inner.settled != inner.count
    }

    /// Returns whether the device has failed since the last reset began. Does not sleep.
    pub(crate) fn has_failed(&self) -> bool {
        self.inner.lock().failed
    }

    fn wait(&self, state: c_uint) -> Result<u64> {
        let mut count = 0;
        self.waiters.wait(state, FOREVER, |_| {
            let inner = self.inner.lock();
            count = inner.count;
            !inner.in_reset
        })?;
        Ok(count)
    }

    /// Waits for the end of a reset, if one is under way, and returns the number of resets and
    /// failures. May sleep.
    pub(crate) fn wait_for_end(&self) -> u64 {
        // No signal ends this wait.
        self.wait(bindings::TASK_UNINTERRUPTIBLE)
            .unwrap_or_else(|_| self.count())
    }

    /// The same on behalf of a system call. Fails with `EINTR` if the task is killed while it
    /// waits.
    pub(crate) fn wait_killable(&self) -> Result<u64> {
        self.wait(KILLABLE).map_err(|_| EINTR)
    }

    /// Allows accesses after all resets and failures so far, for the driver to reset the device.
    pub(crate) fn accept(&self) {
        let mut inner = self.inner.lock();
        inner.accepted = inner.count;
    }

    /// Records that the first `count` resets and failures were handled. Returns whether there was
    /// no other since.
    pub(crate) fn settle(&self, count: u64) -> bool {
        let mut inner = self.inner.lock();
        inner.settled = count;
        inner.count == count
    }
}

/// Lets no reset by another task begin.
pub(crate) struct Exclusion<'a>(&'a Resets);

impl Drop for Exclusion<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().excluder = 0;
        self.0.waiters.wake();
    }
}
