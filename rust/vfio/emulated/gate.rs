// SPDX-License-Identifier: GPL-2.0

//! Gate for a device's work and for accesses to its BARs.

use crate::{
    bindings, dma,
    wait::{
        WaitQueue,
        FOREVER,
        KILLABLE, //
    },
};
use core::ptr::NonNull;
use kernel::{
    new_spinlock,
    prelude::*,
    static_lock_class,
    sync::{
        Arc,
        SpinLock, //
    },
    time::{
        msecs_to_jiffies,
        Delta, //
    },
};

/// Sleeps like an idle worker: does not count as load, and the system may suspend meanwhile.
const IDLE: c_uint =
    bindings::TASK_UNINTERRUPTIBLE | bindings::TASK_NOLOAD | bindings::TASK_FREEZABLE;

/// Time in milliseconds that a write to the command register waits for the work under way before it
/// makes the transfers of that work fail.
const COMMAND_WAIT: u32 = 100;

/// Time in milliseconds that the last close waits for the worker before it moves the worker out of
/// the cgroups of the opener.
const EXIT_WAIT: u32 = 100;

/// The next work of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// There is more work now.
    Again,
    /// There is work when this time has passed, or when the device is woken.
    After(Delta),
    /// There is no work until the device is woken.
    Wait,
}

/// A reason for which a gate is closed for work. Several reasons may hold at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The device is in a P2P state, or on its way to a stopped one.
    P2p = 1,
    /// The device is stopped. Writes are dropped.
    Stopped = 2,
    /// Bus mastering is off in the command register.
    NotMaster = 4,
    /// The device is about to stop, or has stopped in an arc that may still fail. Writes wait.
    Stopping = 8,
}

/// State of a gate, protected by its lock.
///
/// # Invariants
///
/// `worker` is a task that is not released before [`Gate::end()`] has returned.
struct Inner {
    /// The reasons that hold, one bit each.
    reasons: u32,
    /// Number of resets under way.
    halts: u32,
    /// A call of `work()` is under way.
    working: bool,
    /// Memory space is on in the command register.
    decodes: bool,
    /// Number of writes to BARs under way.
    writes: u32,
    /// Number of reads of BARs under way.
    reads: u32,
    /// Number of writes dropped since the last reset.
    dropped: u64,
    /// The worker was kicked since the last call of `work()` began.
    kicked: bool,
    /// The worker must exit.
    ended: bool,
    /// The worker does not call `work()` or sleep any more.
    exited: bool,
    worker: Option<NonNull<bindings::task_struct>>,
}

// SAFETY: A task may be signalled from any other.
unsafe impl Send for Inner {}

impl Inner {
    fn holds(&self, reason: Reason) -> bool {
        self.reasons & reason as u32 != 0
    }

    fn admits_work(&self) -> bool {
        self.reasons == 0 && self.halts == 0
    }

    /// Returns whether writes may begin. The others wait, unless the device is stopped.
    fn admits_writes(&self) -> bool {
        !self.holds(Reason::Stopped) && !self.holds(Reason::Stopping) && self.halts == 0
    }

    /// Makes the call of `work()` under way fail where it waits for a page fault.
    ///
    /// The signal stays pending until the call has returned, and [`Gate::leave()`] clears it under
    /// the same lock. It ends all waits of this call and none of the next one.
    fn interrupt(&self) {
        if let Some(worker) = self.worker.filter(|_| self.working) {
            // SAFETY: By the type invariants. The worker allows the kernel to send it this signal.
            unsafe { bindings::send_sig(bindings::SIGKILL as c_int, worker.as_ptr(), 1) };
        }
    }
}

/// A gate for calls of [`Operations::work`](crate::emulated::Operations::work) and accesses to
/// BARs.
///
/// Closing it waits until the calls under way have returned. They raise their interrupts before
/// they return. No lock is held during the wait. A stopped device can be read: for reads, the gate
/// is closed only without memory space and during a reset. Accesses wait for the end of a reset,
/// and writes for the end of the change to a stopped state, because a reset can be killed and a
/// state change can fail. Only writes to a stopped device are dropped.
#[pin_data]
pub(crate) struct Gate {
    #[pin]
    inner: SpinLock<Inner>,
    /// The worker waits here for its work, so that no change of a closed gate wakes it.
    #[pin]
    worker: WaitQueue,
    /// All others wait here.
    #[pin]
    waiters: WaitQueue,
}

impl Gate {
    /// Creates the gate of a device with memory space and bus mastering disabled.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let inner = Inner {
            reasons: Reason::NotMaster as u32,
            halts: 0,
            working: false,
            decodes: false,
            writes: 0,
            reads: 0,
            dropped: 0,
            kicked: false,
            ended: false,
            exited: false,
            worker: None,
        };
        Arc::pin_init(
            pin_init!(Self {
                inner <- new_spinlock!(inner, "vfio::emulated::Gate::inner"),
                worker <- WaitQueue::new(c"vfio::emulated::Gate::worker", static_lock_class!()),
                waiters <- WaitQueue::new(c"vfio::emulated::Gate::waiters", static_lock_class!()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Sleeps in a task state until `done` returns true. Passes it whether the timeout has expired.
    ///
    /// Fails with `ERESTARTSYS` if a signal that the state allows arrives before that.
    fn wait(
        &self,
        state: c_uint,
        timeout: c_long,
        mut done: impl FnMut(&mut Inner, bool) -> bool,
    ) -> Result {
        self.waiters
            .wait(state, timeout, |due| done(&mut self.inner.lock(), due))
    }

    /// Changes the state, and wakes all waiters; the worker only if it may work or must exit.
    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.inner.lock();
        change(&mut inner);
        let works = inner.admits_work() || inner.ended;
        drop(inner);
        if works {
            self.worker.wake();
        }
        self.waiters.wake();
    }

    /// Closes the gate for a reason: no call of `work()` begins, and none is under way when this
    /// returns. For [`Reason::Stopping`], the same applies to writes. May sleep.
    ///
    /// Fails with `ERESTARTSYS` if the task is killed while it waits. Then the gate is not closed,
    /// and the work goes on.
    pub(crate) fn close(&self, reason: Reason) -> Result {
        self.inner.lock().reasons |= reason as u32;
        self.wait(KILLABLE, FOREVER, |inner, _| {
            !inner.working && (reason != Reason::Stopping || inner.writes == 0)
        })
        .inspect_err(|_| self.open(reason))
    }

    /// Completes a stop: turns [`Reason::Stopping`] into [`Reason::Stopped`], and drops the writes
    /// that wait. Has no effect without a stop under way. Does not sleep.
    pub(crate) fn settle(&self) {
        let mut inner = self.inner.lock();
        let stops = inner.holds(Reason::Stopping);
        if stops {
            inner.reasons &= !(Reason::Stopping as u32);
            inner.reasons |= Reason::Stopped as u32;
        }
        drop(inner);
        if stops {
            self.waiters.wake();
        }
    }

    /// Opens the gate for writes, and for work as far as the state is the reason for which it is
    /// closed. Does not sleep.
    pub(crate) fn start(&self) {
        self.change(|inner| {
            inner.reasons &= !(Reason::Stopping as u32 | Reason::Stopped as u32);
            inner.kicked = true;
        });
    }

    /// Stops a device that failed: closes the gate for [`Reason::Stopped`] and interrupts the call
    /// of `work()` in progress. May sleep.
    ///
    /// The gate stays closed if the task is killed while it waits for the calls in progress.
    pub(crate) fn shut(&self) {
        self.change(|inner| {
            inner.reasons |= Reason::Stopped as u32;
            inner.interrupt();
        });
        // Only a fatal signal ends the wait early.
        let _ = self.wait(KILLABLE, FOREVER, |inner, _| {
            !inner.working && inner.writes == 0
        });
    }

    /// Removes a reason for which the gate is closed, and kicks the worker. Does not sleep.
    pub(crate) fn open(&self, reason: Reason) {
        self.change(|inner| {
            inner.reasons &= !(reason as u32);
            inner.kicked = true;
        });
    }

    /// Applies the command register: accesses fail unless memory space is enabled, and the gate is
    /// closed for work unless bus mastering is enabled. Does not sleep.
    ///
    /// Calls under way continue; [`drain()`](Self::drain) waits for them.
    pub(crate) fn command(&self, memory: bool, master: bool) {
        self.change(|inner| {
            inner.decodes = memory;
            if master {
                inner.kicked |= inner.holds(Reason::NotMaster);
                inner.reasons &= !(Reason::NotMaster as u32);
            } else {
                inner.reasons |= Reason::NotMaster as u32;
            }
        });
    }

    /// Waits for calls under way that the command register does not allow. May sleep.
    ///
    /// Work that does not return within [`COMMAND_WAIT`] is interrupted, so that the wait does not
    /// depend on page faults of user memory being served. Returns early if the task is killed.
    pub(crate) fn drain(&self) {
        let timeout = msecs_to_jiffies(COMMAND_WAIT) as c_long;
        let _ = self.wait(KILLABLE, timeout, |inner, due| {
            let works = inner.working && inner.holds(Reason::NotMaster);
            if works && due {
                inner.interrupt();
            }
            !works && (inner.decodes || inner.writes + inner.reads == 0)
        });
    }

    /// Closes the gate for work and accesses until the result is dropped, and interrupts the work
    /// under way. Nothing is under way when this returns. For a reset. May sleep.
    ///
    /// Fails with `ERESTARTSYS` if the task is killed while it waits.
    pub(crate) fn halt(&self) -> Result<Halt<'_>> {
        let mut inner = self.inner.lock();
        inner.halts += 1;
        inner.interrupt();
        drop(inner);
        let halt = Halt(self);
        self.wait(KILLABLE, FOREVER, |inner, _| {
            !inner.working && inner.writes + inner.reads == 0
        })?;
        Ok(halt)
    }

    /// Ends the reasons of the migration states and clears the count of dropped writes: the device
    /// is in the state of power on.
    pub(crate) fn reset(&self) {
        self.change(|inner| {
            const STATES: u32 =
                Reason::P2p as u32 | Reason::Stopping as u32 | Reason::Stopped as u32;

            inner.reasons &= !STATES;
            inner.dropped = 0;
            inner.kicked = true;
        });
    }

    /// Returns whether work may begin. Does not sleep.
    pub(crate) fn admits_work(&self) -> bool {
        self.inner.lock().admits_work()
    }

    /// Returns the number of writes dropped since the last reset. Does not sleep.
    pub(crate) fn dropped(&self) -> u64 {
        self.inner.lock().dropped
    }

    /// Makes the work under way fail where it waits for a page fault. Does not sleep.
    pub(crate) fn interrupt(&self) {
        self.inner.lock().interrupt();
    }

    /// Makes the worker call `work()` again, as soon as the gate is open. Does not sleep.
    pub(crate) fn kick(&self) {
        self.change(|inner| inner.kicked = true);
    }

    /// Waits until `admit` returns a result for an access, and returns it. May sleep.
    ///
    /// Fails with `ERESTARTSYS` if the task is killed while it waits.
    fn pass<R>(&self, mut admit: impl FnMut(&mut Inner) -> Option<Result<R>>) -> Result<R> {
        let mut passed = admit(&mut self.inner.lock());
        if passed.is_none() {
            self.wait(KILLABLE, FOREVER, |inner, _| {
                passed = admit(inner);
                passed.is_some()
            })?;
        }
        passed.unwrap_or(Err(EIO))
    }

    /// Calls `write` to write to a BAR. If the device is stopped, drops and counts the write
    /// instead, and returns `false`. Waits for the end of a reset, and of a change to a stopped
    /// state. May sleep.
    ///
    /// Fails with `EIO` if memory space is off, and with `ERESTARTSYS` if the task is killed while
    /// it waits.
    pub(crate) fn write(&self, write: impl FnOnce() -> Result) -> Result<bool> {
        let admitted = self.pass(|inner| {
            if !inner.decodes {
                return Some(Err(EIO));
            }
            if inner.holds(Reason::Stopped) {
                inner.dropped += 1;
                return Some(Ok(false));
            }
            let admitted = inner.admits_writes();
            inner.writes += u32::from(admitted);
            admitted.then_some(Ok(true))
        })?;
        if !admitted {
            return Ok(false);
        }
        let result = write();
        let mut inner = self.inner.lock();
        inner.writes -= 1;
        // Otherwise there is no waiter.
        let last = inner.writes == 0 && !(inner.decodes && inner.admits_writes());
        drop(inner);
        if last {
            self.waiters.wake();
        }
        result.map(|()| true)
    }

    /// Calls `read` to read from a BAR. Waits for the end of a reset, like for `memory_lock` in
    /// `vfio-pci`. May sleep.
    ///
    /// Fails with `EIO` if memory space is off, and with `ERESTARTSYS` if the task is killed while
    /// it waits.
    pub(crate) fn read(&self, read: impl FnOnce() -> Result) -> Result {
        self.pass(|inner| {
            if !inner.decodes {
                return Some(Err(EIO));
            }
            let admitted = inner.halts == 0;
            inner.reads += u32::from(admitted);
            admitted.then_some(Ok(()))
        })?;
        let result = read();
        let mut inner = self.inner.lock();
        inner.reads -= 1;
        // Otherwise there is no waiter.
        let last = inner.reads == 0 && !(inner.decodes && inner.halts == 0);
        drop(inner);
        if last {
            self.waiters.wake();
        }
        result
    }

    /// Sets the task that calls `work()`.
    ///
    /// # Safety
    ///
    /// The task must be valid until [`Self::end()`] has returned.
    pub(crate) unsafe fn begin(&self, worker: NonNull<bindings::task_struct>) {
        // INVARIANT: By the safety requirements.
        self.inner.lock().worker = Some(worker);
    }

    /// Makes the worker exit, and interrupts the work under way. Does not sleep.
    pub(crate) fn end(&self) {
        self.change(|inner| {
            inner.ended = true;
            inner.interrupt();
            inner.worker = None;
        });
    }

    /// Reports that the worker is about to exit. Called by the worker.
    pub(crate) fn exit(&self) {
        self.change(|inner| inner.exited = true);
    }

    /// Waits for [`exit()`](Self::exit), for at most [`EXIT_WAIT`]. Returns whether it was called.
    /// May sleep.
    pub(crate) fn wait_for_exit(&self) -> bool {
        let timeout = msecs_to_jiffies(EXIT_WAIT) as c_long;
        let mut exited = false;
        // No signal ends this wait.
        let _ = self.wait(bindings::TASK_UNINTERRUPTIBLE, timeout, |inner, due| {
            exited = inner.exited;
            exited || due
        });
        exited
    }

    /// Waits until `next` is due and the gate is open, and passes the gate. Called by the worker,
    /// which calls [`leave()`](Self::leave) afterwards.
    ///
    /// Returns false, and does not pass, if the worker must exit.
    pub(crate) fn enter(&self, next: Work) -> bool {
        let timeout = match next {
            Work::Again => 0,
            Work::After(time) => {
                let millis = time.as_millis_ceil().clamp(1, i64::from(u32::MAX / 2));
                msecs_to_jiffies(millis as u32) as c_long
            }
            Work::Wait => FOREVER,
        };
        let mut entered = false;
        // No signal ends this wait, see `IDLE`.
        let _ = self.worker.wait(IDLE, timeout, |due| {
            let mut inner = self.inner.lock();
            entered = !inner.ended && inner.admits_work() && (due || inner.kicked);
            if entered {
                inner.working = true;
                inner.kicked = false;
            }
            entered || inner.ended
        });
        entered
    }

    /// Reports that the call of `work()` has returned, and clears its interrupt. Called by the
    /// worker.
    pub(crate) fn leave(&self) {
        let mut inner = self.inner.lock();
        inner.working = false;
        if kernel::current!().signal_pending() {
            // SAFETY: It is the current task.
            unsafe { bindings::flush_signals(kernel::task::Task::current_raw()) };
        }
        // Otherwise there is no waiter.
        let closed = !inner.admits_work();
        drop(inner);
        if closed {
            self.waiters.wake();
        }
    }
}

impl dma::Interrupter for Gate {
    fn is_halted(&self) -> bool {
        self.inner.lock().halts != 0 || kernel::current!().signal_pending()
    }
}

/// Keeps a gate closed while the device is reset.
pub(crate) struct Halt<'a>(&'a Gate);

impl Drop for Halt<'_> {
    fn drop(&mut self) {
        self.0.change(|inner| {
            inner.halts -= 1;
            inner.kicked = true;
        });
    }
}
