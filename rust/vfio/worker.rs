// SPDX-License-Identifier: GPL-2.0

//! Workers: the threads of devices that do something by themselves.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::{
    bindings,
    emulated::Work,
    gate::Gate, //
};
use core::{
    ffi::c_void,
    ptr::NonNull, //
};
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    },
};

/// What a thread calls again and again.
pub(crate) trait Job: Send + Sync + 'static {
    /// Does a piece of work. May sleep.
    fn work(&self) -> Work;
}

struct Shared<J> {
    gate: Arc<Gate>,
    job: J,
}

/// A thread of the kernel that does a [`Job`] when its [`Gate`] is open. Dropping it interrupts the
/// call under way, and waits until the thread is gone.
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
    pub(crate) fn new(name: &CStr, gate: Arc<Gate>, job: J) -> Result<Self> {
        let shared = Arc::new(Shared { gate, job }, GFP_KERNEL_ACCOUNT)?;
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
        // SAFETY: A pointer that is not an error is not null.
        let task = unsafe { NonNull::new_unchecked(task) };
        // SAFETY: The reference is given back after `drop()` has called `end()`.
        unsafe { shared.gate.begin(task) };
        // SAFETY: As above, the task is valid.
        unsafe { bindings::wake_up_process(task.as_ptr()) };
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
        let mut next = Work::Again;
        loop {
            // A worker that always has work never sleeps, and a kthread never returns to user
            // space: without this no grace period of RCU Tasks would end.
            //
            // SAFETY: The thread may sleep here.
            unsafe { bindings::cond_resched_tasks_rcu_qs() };
            if !shared.gate.enter(next) {
                break;
            }
            next = shared.job.work();
            shared.gate.leave();
        }
        0
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        self.shared.gate.end();
        // SAFETY: By the type invariants it is a thread, of which `new()` took a reference.
        unsafe { bindings::kthread_stop_put(self.task.as_ptr()) };
    }
}
