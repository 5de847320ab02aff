// SPDX-License-Identifier: GPL-2.0

//! The user's side of a read() or write(): a buffer that may fault at any byte.

use kernel::{
    bindings,
    prelude::*,
    uaccess::UserPtr, //
};

use crate::memory::Memory;
use core::ops::Range;

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
