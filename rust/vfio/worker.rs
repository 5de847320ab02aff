// SPDX-License-Identifier: GPL-2.0

//! What a device does by itself, on a thread of its own.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::bindings;
use core::{
    ffi::c_void,
    ptr::NonNull, //
};
use kernel::{
    error::from_err_ptr,
    new_condvar, new_spinlock,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow,
        CondVar,
        SpinLock, //
    },
    task::Task,
    time::{
        msecs_to_jiffies,
        Delta, //
    },
};

/// What a device has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// There is more to do now.
    Again,
    /// There is something to do when this time has passed, or when the device is woken.
    After(Delta),
    /// There is nothing to do until the device is woken.
    Wait,
}

/// What the thread and those who wake it share.
///
/// # Invariants
///
/// `task` is a thread of which a [`Worker`] owns a reference.
struct Calls {
    /// How often the thread was woken.
    count: u32,
    stopping: bool,
    task: Option<NonNull<bindings::task_struct>>,
}

// SAFETY: A thread may be signalled from any other.
unsafe impl Send for Calls {}

/// By which a device's thread is woken.
#[pin_data]
pub(crate) struct Bell {
    #[pin]
    calls: SpinLock<Calls>,
    #[pin]
    rung: CondVar,
}

impl Bell {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let calls = Calls {
            count: 0,
            stopping: false,
            task: None,
        };
        Arc::pin_init(
            pin_init!(Self {
                calls <- new_spinlock!(calls, "vfio::worker::Bell::calls"),
                rung <- new_condvar!("vfio::worker::Bell::rung"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Wakes the thread, or keeps it from falling asleep. Does not sleep.
    pub(crate) fn ring(&self) {
        let mut calls = self.calls.lock();
        calls.count = calls.count.wrapping_add(1);
        drop(calls);
        self.rung.notify_all();
    }

    /// Lets the thread fail where it waits for the user to serve a page fault, now or before it
    /// asks the next time whether it shall stop. Does not sleep.
    pub(crate) fn interrupt(&self) {
        if let Some(task) = self.calls.lock().task {
            // SAFETY: By the type invariants of `Calls`. `main()` allows the kernel to do so.
            unsafe { bindings::send_sig(bindings::SIGKILL as c_int, task.as_ptr(), 1) };
        }
    }

    fn stop(&self) {
        self.calls.lock().stopping = true;
        self.rung.notify_all();
        self.interrupt();
    }

    /// Returns how often the thread was woken, unless it shall stop.
    fn count(&self) -> Option<u32> {
        let calls = self.calls.lock();
        (!calls.stopping).then_some(calls.count)
    }

    /// Sleeps until somebody rings after `seen` was counted, or until the time has passed.
    fn wait_after(&self, seen: u32, time: Option<Delta>) {
        let mut calls = self.calls.lock();
        match time {
            None => {
                // Interruptible so that it does not count as load.
                while calls.count == seen && !calls.stopping {
                    if self.rung.wait_interruptible(&mut calls) {
                        break;
                    }
                }
            }
            Some(time) => {
                if calls.count == seen && !calls.stopping {
                    let millis = time.as_millis_ceil().clamp(1, i64::from(u32::MAX / 2));
                    let jiffies = msecs_to_jiffies(millis as u32);
                    let _ = self.rung.wait_interruptible_timeout(&mut calls, jiffies);
                }
            }
        }
    }
}

/// What a thread calls again and again.
pub(crate) trait Job: Send + Sync + 'static {
    /// Does a piece of work. May sleep.
    fn work(&self) -> Work;
}

struct Shared<J> {
    bell: Arc<Bell>,
    job: J,
}

/// A thread of the kernel that does a [`Job`]. Dropping it stops the thread and waits until it is
/// gone, with all that it does.
///
/// # Invariants
///
/// `task` is a thread that runs [`main::<J>()`](Self::main) on what `shared` points to, of which
/// this owns a reference.
pub(crate) struct Worker<J: Job> {
    task: NonNull<bindings::task_struct>,
    shared: Arc<Shared<J>>,
}

// SAFETY: A thread may be stopped from any other.
unsafe impl<J: Job> Send for Worker<J> {}

impl<J: Job> Worker<J> {
    /// Starts a thread. May sleep.
    ///
    /// Fails with `ENOMEM`, and with `EINTR` if the caller is being killed.
    pub(crate) fn new(name: &CStr, bell: Arc<Bell>, job: J) -> Result<Self> {
        let shared = Arc::new(Shared { bell, job }, GFP_KERNEL_ACCOUNT)?;
        let data = Arc::as_ptr(&shared);
        // SAFETY: `shared` outlives the thread, which `drop()` waits for, and the format takes one
        // string.
        let task = unsafe {
            bindings::kthread_create_on_node(
                Some(Self::main),
                data.cast_mut().cast(),
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        };
        let task = from_err_ptr(task)?;
        // SAFETY: The thread was created and does not run yet, so it is valid. This reference is
        // given back by `kthread_stop_put()`, because `main()` may return before that is called.
        unsafe { bindings::get_task_struct(task) };
        // SAFETY: As above.
        unsafe { bindings::wake_up_process(task) };
        // SAFETY: A pointer that is not an error is not null.
        let task = unsafe { NonNull::new_unchecked(task) };
        // INVARIANT: The reference is given back after `drop()` has taken this away.
        shared.bell.calls.lock().task = Some(task);
        // INVARIANT: That is the thread.
        Ok(Self { task, shared })
    }

    /// # Safety
    ///
    /// `data` must come from [`Arc::as_ptr()`] of a `Shared<J>` that lives until this has returned.
    unsafe extern "C" fn main(data: *mut c_void) -> c_int {
        // SAFETY: By the safety requirements.
        let shared = unsafe { ArcBorrow::<Shared<J>>::from_raw(data.cast()) };
        // SAFETY: It changes the signal handling of the current task, which is a kthread.
        unsafe { bindings::allow_kernel_signal(bindings::SIGKILL as c_int) };
        loop {
            // A worker that always has work never sleeps, and a kthread never returns to user
            // space: without this no grace period of RCU Tasks would end.
            //
            // SAFETY: The thread may sleep here.
            unsafe { bindings::cond_resched_tasks_rcu_qs() };
            // Before it is asked whether to stop: who wants that says so first and signals then.
            if current!().signal_pending() {
                // SAFETY: It is the current thread.
                unsafe { bindings::flush_signals(Task::current_raw()) };
            }
            let Some(seen) = shared.bell.count() else {
                break;
            };
            match shared.job.work() {
                Work::Again => (),
                Work::After(time) => shared.bell.wait_after(seen, Some(time)),
                Work::Wait => shared.bell.wait_after(seen, None),
            }
        }
        0
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        self.shared.bell.stop();
        self.shared.bell.calls.lock().task = None;
        // SAFETY: By the type invariants it is a thread, of which `new()` took a reference.
        unsafe { bindings::kthread_stop_put(self.task.as_ptr()) };
    }
}
