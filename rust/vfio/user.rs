// SPDX-License-Identifier: GPL-2.0

//! The user's side of a read() or write(): a buffer that may fault at any byte.

use kernel::{
    prelude::*,
    task::Task,
    uaccess::UserPtr, //
};

use crate::{
    bindings,
    memory::Memory, //
};
use core::{
    mem::MaybeUninit,
    ops::Range,
    slice, //
};

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

    /// Copies device memory to the user, like [`UserBuf::write`], without a stop between.
    ///
    /// May sleep and may fault.
    pub(crate) fn write_memory(&mut self, memory: &Memory, range: Range<usize>) -> usize {
        let from = memory.bytes(range);
        let len = from.len().min(self.len);
        // SAFETY: `from` is memory that stays allocated as long as `memory` does. That somebody
        // may write to it meanwhile concerns only what the user gets to see.
        let left =
            unsafe { bindings::copy_to_user(self.ptr.as_mut_ptr(), from.cast::<c_void>(), len) };
        self.advance(len - left as usize)
    }

    /// Copies bytes from the user and returns how many came; fewer than `to` holds at a fault or
    /// at the end of the buffer.
    ///
    /// May sleep and may fault.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        // SAFETY: `to` is valid for writes of its length.
        unsafe { self.read_raw(to.as_mut_ptr(), to.len()) }
    }

    /// Copies at most `room` bytes from the user and returns how many came.
    ///
    /// # Safety
    ///
    /// `to` must be valid for writes of `room` bytes.
    unsafe fn read_raw(&mut self, to: *mut u8, room: usize) -> usize {
        let len = room.min(self.len);
        // SAFETY: By the safety requirements.
        let left =
            unsafe { bindings::copy_from_user(to.cast::<c_void>(), self.ptr.as_const_ptr(), len) };
        self.advance(len - left as usize)
    }
}

/// Room for what comes from a user, there from the first byte on.
#[derive(Default)]
pub(crate) struct Block(Option<KVBox<MaybeUninit<[u8; BLOCK]>>>);

impl Block {
    /// Copies bytes from the user and returns those that came; fewer than there is room for at a
    /// fault or at the end of the buffer.
    ///
    /// May sleep and may fault. Fails with `ENOMEM` if there is no memory for the room.
    pub(crate) fn read(&mut self, user: &mut UserBuf) -> Result<&[u8]> {
        let room = match self.0.take() {
            Some(room) => room,
            // Not worth to be zeroed, as it is written before it is read.
            None => KVBox::new_uninit(GFP_KERNEL_ACCOUNT)?,
        };
        let to = self.0.insert(room).as_mut_ptr().cast::<u8>();
        // SAFETY: `to` is valid for writes of `BLOCK` bytes.
        let copied = unsafe { user.read_raw(to, BLOCK) };
        // SAFETY: So many bytes have been written, and the reference to them borrows `self`.
        Ok(unsafe { slice::from_raw_parts(to, copied) })
    }
}
