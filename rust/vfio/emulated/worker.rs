// SPDX-License-Identifier: GPL-2.0

//! Worker threads of devices.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::{
    bindings,
    emulated::gate::{
        Gate,
        Work, //
    },
};
use core::{
    ffi::c_void,
    ptr::{
        null_mut,
        NonNull, //
    },
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow,
        Completion, //
    },
    task::Task,
};

/// A function that a worker calls repeatedly.
pub(crate) trait Job: Send + Sync + 'static {
    /// Does a piece of work. May sleep.
    fn work(&self) -> Work;
}

/// The memory cgroup that is charged for allocations of a device.
///
/// # Invariants
///
/// The pointer is valid, and a reference is owned; or it is null, and nothing is charged.
struct Memcg(*mut bindings::mem_cgroup);

// SAFETY: A memory cgroup may be charged by any thread.
unsafe impl Send for Memcg {}

// SAFETY: Same as `Send`; the pointer does not change.
unsafe impl Sync for Memcg {}

impl Memcg {
    /// Returns the cgroup of the current task.
    fn current() -> Self {
        // INVARIANT: `get_mem_cgroup_from_mm()` takes a reference, or returns null.
        // SAFETY: Null stands for the memory of the current task.
        Self(unsafe { bindings::get_mem_cgroup_from_mm(null_mut()) })
    }

    /// Charges the cgroup for allocations by `allocate` with `__GFP_ACCOUNT`.
    fn charge<R>(&self, allocate: impl FnOnce() -> R) -> R {
        // SAFETY: By the type invariants, it is null or valid as long as `self`.
        let old = unsafe { bindings::set_active_memcg(self.0) };
        let result = allocate();
        // SAFETY: It was the active cgroup before, whose owner keeps it valid.
        unsafe { bindings::set_active_memcg(old) };
        result
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        // SAFETY: By the type invariants a reference is owned, or it is null.
        unsafe { bindings::mem_cgroup_put(self.0) };
    }
}

#[pin_data]
struct Shared<J> {
    gate: Arc<Gate>,
    job: J,
    /// The task that opened the device. Valid until `started` is completed.
    opener: NonNull<bindings::task_struct>,
    memcg: Memcg,
    /// 0, or a negative errno if the thread could not join the cgroups of `opener`.
    attached: Atomic<i32>,
    #[pin]
    started: Completion,
}

// SAFETY: `opener` is used only until `started` is completed, and the other fields may be sent.
unsafe impl<J: Send> Send for Shared<J> {}

// SAFETY: As above.
unsafe impl<J: Sync> Sync for Shared<J> {}

/// A kernel thread that runs a [`Job`] when its [`Gate`] is open. Dropping it interrupts the call
/// under way, and waits until the thread has exited.
///
/// The task that creates the worker pays for it: the thread is in the cgroups of that task, and its
/// allocations with `__GFP_ACCOUNT` are charged there. Its CPU time counts against the quota of
/// that cgroup, but the kernel does not throttle kthreads, only the other threads of the group.
///
/// It is not a thread of that process, unlike those of `vhost_task_create()`: these are killed with
/// the process and by its `execve()`, but a device file may be passed to another process.
///
/// The thread freezes with the system: no job runs while user space is frozen. It also freezes with
/// a cgroup of version 1, but not with one of version 2, which does not freeze kthreads: such a
/// cgroup does not report that it is frozen while the device is open.
///
/// # Invariants
///
/// `task` is a thread that runs [`main::<J>()`](Self::main) on the value of `shared`. A reference
/// to it is owned.
pub(crate) struct Worker<J: Job> {
    task: NonNull<bindings::task_struct>,
    shared: Arc<Shared<J>>,
}

// SAFETY: A thread may be stopped from any other.
unsafe impl<J: Job> Send for Worker<J> {}

impl<J: Job> Worker<J> {
    /// Starts a thread in the cgroups of the current task. May sleep.
    ///
    /// Fails with `ENOMEM`, with `EINTR` if the caller is being killed, and with the error of a
    /// cgroup that rejects the thread, such as `EAGAIN`.
    pub(crate) fn new(name: &CStr, gate: Arc<Gate>, job: J) -> Result<Self> {
        let shared = Arc::pin_init(
            pin_init!(Shared {
                gate,
                job,
                // SAFETY: The current task is not null.
                opener: unsafe { NonNull::new_unchecked(Task::current_raw()) },
                memcg: Memcg::current(),
                attached: Atomic::new(0),
                started <- Completion::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
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
        // INVARIANT: `task` is the thread.
        let this = Self { task, shared };
        // Always completed, because only `drop()` stops the thread.
        this.shared.started.wait_for_completion();
        to_result(this.shared.attached.load(Relaxed))?;
        Ok(this)
    }

    /// # Safety
    ///
    /// `data` must come from [`Arc::as_ptr()`] of a `Shared<J>` that lives until this has returned.
    unsafe extern "C" fn main(data: *mut c_void) -> c_int {
        // SAFETY: By the safety requirements.
        let shared = unsafe { ArcBorrow::<Shared<J>>::from_raw(data.cast()) };
        // SAFETY: It changes the signal handling of the current task, which is a kthread.
        unsafe { bindings::allow_kernel_signal(bindings::SIGKILL as c_int) };
        // By the thread itself: if its creator did this, the thread would replace the CPUs of the
        // cgroup by those of all kthreads when it starts.
        //
        // SAFETY: The opener waits for `started`, and the current task is valid.
        let attached = unsafe {
            bindings::cgroup_attach_task_all(shared.opener.as_ptr(), Task::current_raw())
        };
        shared.attached.store(attached, Relaxed);
        shared.started.complete_all();
        if attached != 0 {
            shared.gate.exit();
            return attached;
        }
        // SAFETY: The current task is a kthread, which holds no locks.
        unsafe { bindings::set_freezable() };
        let mut next = Work::Again;
        loop {
            // A worker that always has work never sleeps, and a kthread never returns to user
            // space: without this no grace period of RCU Tasks would end.
            //
            // SAFETY: The thread may sleep here.
            unsafe { bindings::cond_resched_tasks_rcu_qs() };
            // SAFETY: The thread may sleep here, and holds no locks.
            unsafe { bindings::try_to_freeze() };
            if !shared.gate.enter(next) {
                break;
            }
            next = shared.memcg.charge(|| shared.job.work());
            shared.gate.leave();
        }
        shared.gate.exit();
        0
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        self.shared.gate.end();
        if !self.shared.gate.wait_for_exit() {
            // The opener's cgroup may be frozen, and the thread with it. Nothing freezes the root
            // cgroups. If the move fails, the thread exits when the cgroup thaws.
            //
            // SAFETY: By the type invariants it is a thread, and this owns a reference. The caller
            // may sleep, and holds no lock that is taken inside of `cgroup_mutex`.
            unsafe { bindings::cgroup_detach_task_all(self.task.as_ptr()) };
        }
        // SAFETY: By the type invariants it is a thread, and `new()` took a reference.
        unsafe { bindings::kthread_stop_put(self.task.as_ptr()) };
    }
}
