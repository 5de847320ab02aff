// SPDX-License-Identifier: GPL-2.0

//! User buffers of read() and write(), which may fault at any byte.

use kernel::{
    alloc::Flags,
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

/// Allocation flags for memory with a size that the user controls.
///
/// The memory is charged to the memory cgroup of the caller, like with `GFP_KERNEL_ACCOUNT`. If the
/// cgroup or the machine has not enough memory, the allocation fails without invoking the OOM
/// killer: `__GFP_RETRY_MAYFAIL`.
pub const GFP_MAYFAIL: Flags = {
    let bits =
        bindings::GFP_KERNEL_ACCOUNT | bindings::__GFP_NOWARN | bindings::__GFP_RETRY_MAYFAIL;
    // SAFETY: `Flags` is a newtype of `gfp_t` without invariants. It has no constant for each flag.
    unsafe { core::mem::transmute::<u32, Flags>(bits) }
};

/// Number of bytes that a [`Block`] copies from the user at once.
const BLOCK: usize = 64 << 10;

/// Reschedules if needed. May sleep.
pub(crate) fn cond_resched() {
    // SAFETY: The caller may sleep.
    unsafe { bindings::cond_resched() };
}

/// Reschedules if needed, and checks whether the calling task is being killed.
///
/// Call it in each round of a loop with a length that the user controls, in methods that run in
/// system calls of the user, so that a client can be killed before the end of the loop. Fails with
/// `EINTR` if the task has a fatal signal. May sleep.
pub fn cond_resched_killable() -> Result {
    cond_resched();
    // SAFETY: The task is the current one.
    match unsafe { bindings::fatal_signal_pending(Task::current_raw()) } {
        0 => Ok(()),
        _ => Err(EINTR),
    }
}

/// Acquires a mutex on behalf of a system call. The wait is killable.
///
/// Fails with `EINTR` if the task is killed while it waits. May sleep.
pub(crate) fn lock_killable<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    let lock = ptr::from_ref(mutex).cast_mut().cast::<bindings::mutex>();
    // SAFETY: `Lock` is `repr(C)`, and its first field is the `struct mutex` in an `Opaque`, which
    // a reference to the `Mutex` proves to be initialised.
    to_result(unsafe { bindings::mutex_lock_killable(lock) })?;
    // SAFETY: The mutex was just acquired.
    Ok(unsafe { MutexGuard::new(mutex, ()) })
}

/// The remaining part of a user's buffer.
///
/// Unlike with the kernel crate's reader and writer, the bytes copied before a fault are counted,
/// so that a read() or write() can return their number.
pub(crate) struct UserBuf {
    ptr: UserPtr,
    len: usize,
}

impl UserBuf {
    /// Serves a read() or write() at `pos` in a file by `serve`, which returns the number of bytes
    /// served, and advances `pos`.
    pub(crate) fn serve(
        ptr: UserPtr,
        len: usize,
        pos: &mut i64,
        serve: impl FnOnce(&mut Self, i64) -> Result<usize>,
    ) -> Result<isize> {
        let done = serve(&mut Self { ptr, len }, *pos)?;
        *pos += done as i64;
        Ok(done as isize)
    }

    /// Returns the number of remaining bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn advance(&mut self, by: usize) -> usize {
        self.ptr = self.ptr.wrapping_byte_add(by);
        self.len -= by;
        by
    }

    /// Copies bytes to the user. Returns the number of bytes copied, which is lower than the size
    /// of `from` at a fault or at the end of the buffer.
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

    /// Copies bytes from the user. Returns the number of bytes copied, which is lower than the size
    /// of `to` at a fault or at the end of the buffer.
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

/// Kernel buffer for bytes from a user, which is allocated by the first copy.
#[derive(Default)]
pub(crate) struct Block(KVVec<u8>);

impl Block {
    /// Copies bytes from the user and returns them. These are fewer than 64 KiB at a fault or at
    /// the end of the user's buffers.
    ///
    /// May sleep and may fault. Fails with `ENOMEM` if the buffer cannot be allocated.
    pub(crate) fn read(&mut self, user: &mut IovIterSource<'_>) -> Result<&[u8]> {
        if self.0.is_empty() {
            self.0 = KVVec::zeroed(BLOCK, GFP_MAYFAIL)?;
        }
        let copied = user.copy_from_iter(&mut self.0);
        Ok(&self.0[..copied])
    }
}
