// SPDX-License-Identifier: GPL-2.0

//! The user's side of a read() or write(): a buffer that may fault at any byte.

use kernel::{
    error::to_result,
    iov::IovIterSource,
    prelude::*,
    sync::{
        lock::mutex::MutexGuard,
        Mutex, //
    },
    task::Task,
    uaccess::UserPtr, //
};

use crate::bindings;
use core::ptr;

/// How much a [`Block`] takes from the user at once.
const BLOCK: usize = 64 << 10;

/// Lets other tasks run, and tells whether the calling task is being killed.
///
/// For each round of a loop whose length is up to the user, in a method that a system call of the
/// user leads to: a client that is killed must not be kept until the end of the loop. Returns
/// `EINTR` if the task has a fatal signal. May sleep.
pub fn cond_resched_killable() -> Result {
    // SAFETY: The caller may sleep.
    unsafe { bindings::cond_resched() };
    // SAFETY: It is the current task.
    match unsafe { bindings::fatal_signal_pending(Task::current_raw()) } {
        0 => Ok(()),
        _ => Err(EINTR),
    }
}

/// Acquires a mutex on behalf of a system call, however long the holder keeps it.
///
/// Fails with `EINTR` if the task is being killed meanwhile. May sleep.
pub(crate) fn lock_killable<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    let lock = ptr::from_ref(mutex).cast_mut().cast::<bindings::mutex>();
    // SAFETY: `Lock` is `repr(C)`, and its first field is the `struct mutex` in an `Opaque`, which
    // a reference to the `Mutex` proves to be initialised.
    to_result(unsafe { bindings::mutex_lock_killable(lock) })?;
    // SAFETY: The mutex was just acquired.
    Ok(unsafe { MutexGuard::new(mutex, ()) })
}

/// The part of a user's buffer that a call has not reached yet.
///
/// Unlike the kernel crate's reader and writer, a fault in the middle is not the end: what was
/// copied before it counts, so that a read() or write() can report it.
pub(crate) struct UserBuf {
    ptr: UserPtr,
    len: usize,
}

impl UserBuf {
    /// Describes a buffer by what the system call was given.
    pub(crate) fn new(ptr: UserPtr, len: usize) -> Self {
        Self { ptr, len }
    }

    /// Returns how many bytes are left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn advance(&mut self, by: usize) -> usize {
        self.ptr = self.ptr.wrapping_byte_add(by);
        self.len -= by;
        by
    }

    /// Copies bytes to the user and returns how many were taken; fewer than offered at a fault or
    /// at the end of the buffer.
    ///
    /// May sleep and may fault.
    pub(crate) fn write(&mut self, from: &[u8]) -> usize {
        let len = from.len().min(self.len);
        // SAFETY: `from` is valid for reads of `len` bytes.
        let left = unsafe {
            bindings::copy_to_user(self.ptr.as_mut_ptr(), from.as_ptr().cast::<c_void>(), len)
        };
        self.advance(len - left as usize)
    }

    /// Copies bytes from the user and returns how many came; fewer than `to` holds at a fault or
    /// at the end of the buffer.
    ///
    /// May sleep and may fault.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.len);
        // SAFETY: `to` is valid for writes of `len` bytes.
        let left = unsafe {
            bindings::copy_from_user(
                to.as_mut_ptr().cast::<c_void>(),
                self.ptr.as_const_ptr(),
                len,
            )
        };
        self.advance(len - left as usize)
    }
}

/// Room for what comes from a user, there from the first byte on.
#[derive(Default)]
pub(crate) struct Block(KVVec<u8>);

impl Block {
    /// Copies bytes from the user and returns those that came; fewer than there is room for at a
    /// fault or at the end of the user's buffers.
    ///
    /// May sleep and may fault. Fails with `ENOMEM` if there is no memory for the room.
    pub(crate) fn read(&mut self, user: &mut IovIterSource<'_>) -> Result<&[u8]> {
        self.0.clear();
        // Allocates the first time only.
        self.0.reserve(BLOCK, GFP_KERNEL_ACCOUNT)?;
        let copied = user.copy_from_iter_raw(self.0.spare_capacity_mut()).len();
        // SAFETY: So many bytes of the spare capacity have been written.
        unsafe { self.0.inc_len(copied) };
        Ok(&self.0)
    }
}
