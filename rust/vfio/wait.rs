// SPDX-License-Identifier: GPL-2.0

//! Wait queues.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

use crate::bindings;
use kernel::{
    prelude::*,
    sync::LockClassKey,
    time::{
        msecs_to_jiffies,
        Delta, //
    },
    types::Opaque, //
};

/// Sleeps until a fatal signal arrives.
pub(crate) const KILLABLE: c_uint = bindings::TASK_UNINTERRUPTIBLE | bindings::TASK_WAKEKILL;

/// A timeout that does not expire.
pub(crate) const FOREVER: c_long = c_long::MAX;

/// A queue of tasks that wait for a condition.
///
/// Unlike with the kernel crate's `CondVar`, a wait can be killable.
#[pin_data]
pub struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head_t>,
}

// SAFETY: A `struct wait_queue_head` may be used on any thread.
unsafe impl Send for WaitQueue {}

// SAFETY: As above; it has a lock of its own.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Creates an empty queue.
    pub fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `head` is valid, and name and key live for ever.
            head <- Opaque::ffi_init(|head| unsafe {
                bindings::__init_waitqueue_head(head, name.as_char_ptr(), key.as_ptr())
            }),
        })
    }

    /// Sleeps until `done` returns true or `time` has passed. `done` must not sleep.
    ///
    /// Fails with `ERESTARTSYS` if the task is killed before that.
    pub fn wait_killable(&self, time: Delta, mut done: impl FnMut() -> bool) -> Result {
        let millis = time.as_millis_ceil().clamp(0, i64::from(u32::MAX / 2));
        let timeout = msecs_to_jiffies(millis as u32) as c_long;
        self.wait(KILLABLE, timeout, |due| due || done())
    }

    /// Sleeps in a task state until `done` returns true. Passes it whether the timeout has expired.
    /// `done` must not sleep.
    ///
    /// Fails with `ERESTARTSYS` if a signal that the state allows arrives before that.
    pub(crate) fn wait(
        &self,
        state: c_uint,
        mut timeout: c_long,
        mut done: impl FnMut(bool) -> bool,
    ) -> Result {
        let entry = Opaque::uninit();
        let mut due = false;
        // SAFETY: `entry` is valid memory.
        unsafe { bindings::init_wait_entry(entry.get(), 0) };
        let result = loop {
            // SAFETY: Both are valid. `entry` stays here until `finish_wait()`.
            let signalled = unsafe {
                bindings::prepare_to_wait_event(self.head.get(), entry.get(), state as c_int)
            };
            // Checked before the signal: a condition that is true wins.
            due |= timeout == 0;
            if done(due) {
                break Ok(());
            }
            if signalled != 0 {
                break Err(ERESTARTSYS);
            }
            let left = if due { FOREVER } else { timeout };
            // SAFETY: The task may sleep. Any timeout is valid.
            timeout = unsafe { bindings::schedule_timeout(left) };
        };
        // SAFETY: Both are valid.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
        result
    }

    /// Wakes all tasks in the queue, which check their conditions again. Does not sleep.
    pub fn wake(&self) {
        // SAFETY: The wait queue is valid.
        unsafe {
            bindings::__wake_up(
                self.head.get(),
                bindings::TASK_NORMAL,
                0,
                core::ptr::null_mut(),
            )
        };
    }
}
