// SPDX-License-Identifier: GPL-2.0

//! Device memory.

pub mod dirty_map;
pub(crate) mod mapping;
mod prefetch;
pub(crate) mod state;

pub use self::state::{
    PageDigests,
    PageRun,
    Pages,
    Pending,
    StateMemory,
    Tracking, //
};
pub use crate::user::GFP_MAYFAIL;

use self::prefetch::prefetch;
use crate::bindings;
use core::{
    cell::UnsafeCell,
    ops::Range,
    ptr, //
};
use kernel::{
    iov::IovIterDest,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Bytes in a word, the unit in which [`Memory`] is accessed where alignment allows.
const WORD: usize = size_of::<u64>();

/// Number of words between an access and the prefetch for a later one: 8 KiB. A processor does not
/// prefetch across the end of a page by itself.
const AHEAD: usize = (8 << 10) / WORD;

/// The whole words in a range, and the positions of the bytes before and after them.
type Parts<'a> = (Range<usize>, &'a [UnsafeCell<u64>], Range<usize>);

/// Memory of a device, which consists of whole pages and supports concurrent reads and writes.
///
/// It behaves like RAM with several bus masters: accesses do not exclude each other. A read that is
/// concurrent with a write returns old bytes, new bytes, or some of each. Within an aligned word
/// they are not mixed, if the word was written with a single access.
///
/// # Invariants
///
/// `words` spans whole pages. Its bytes are only accessed by volatile accesses or by copies in C,
/// such as user copies.
pub(crate) struct Memory {
    words: VVec<UnsafeCell<u64>>,
}

// SAFETY: By the type invariants all accesses are volatile or copies in C. The memory model of the
// kernel allows concurrent volatile accesses. Copies in C race with user space anyway. Any bytes
// are valid words.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates `pages` pages of zeroes, charged to the caller's memory cgroup.
    ///
    /// May sleep. Fails with `ENOMEM`, without the OOM killer, and with `EINVAL` if `pages` is zero
    /// or too many to count their bytes.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let words = pages.checked_mul(PAGE_SIZE / WORD).ok_or(EINVAL)?;
        if words == 0 || words.checked_mul(WORD).is_none() {
            return Err(EINVAL);
        }
        // SAFETY: It may be called at any time.
        let available = unsafe { bindings::si_mem_available() };
        // This is an estimate, like for the buffers of tracing. Without it, other tasks might be
        // killed by the OOM killer before the allocation has failed.
        if pages > usize::try_from(available).unwrap_or(0) {
            return Err(ENOMEM);
        }
        let plain = VVec::<u64>::zeroed(words, GFP_MAYFAIL)?;
        let (ptr, len, capacity) = plain.into_raw_parts();
        // INVARIANT: The size is a whole number of pages.
        // SAFETY: `UnsafeCell<u64>` has the layout of `u64`, and the parts come from a vector with
        // the same allocator.
        let words = unsafe { VVec::from_raw_parts(ptr.cast::<UnsafeCell<u64>>(), len, capacity) };
        Ok(Self { words })
    }

    /// Returns the size in bytes.
    #[inline]
    pub(crate) fn size(&self) -> usize {
        self.words.len() * WORD
    }

    /// Returns the words of a page, `N` at a time. A remainder of less than `N` words is left out.
    ///
    /// Prefetches the next pages meanwhile.
    #[inline]
    pub(crate) fn page<const N: usize>(&self, page: usize) -> impl Iterator<Item = [u64; N]> + '_ {
        let start = page.saturating_mul(PAGE_SIZE / WORD);
        let end = start.saturating_add(PAGE_SIZE / WORD);
        let words = self.words.get(start..end).unwrap_or(&[]);
        words.chunks_exact(N).map(|words| {
            prefetch(words.as_ptr().wrapping_add(AHEAD));
            core::array::from_fn(|index| {
                // SAFETY: The word is inside the memory, and the access is volatile.
                words
                    .get(index)
                    .map_or(0, |word| unsafe { word.get().read_volatile() })
            })
        })
    }

    /// Writes words at the word `start`, `N` at a time, until there are no more words or no room
    /// for `N`. Calls `written` with each `N` words, and returns the number of words written.
    ///
    /// Prefetches the next pages meanwhile if `N` is not 1.
    #[inline]
    pub(crate) fn set_words<const N: usize>(
        &self,
        start: usize,
        words: impl Iterator<Item = [u64; N]>,
        mut written: impl FnMut([u64; N]),
    ) -> usize {
        let to = self.words.get(start..).unwrap_or(&[]);
        let mut count = 0;
        for (to, words) in to.chunks_exact(N).zip(words) {
            if N > 1 {
                prefetch(to.as_ptr().wrapping_add(AHEAD));
            }
            for (to, word) in to.iter().zip(words) {
                // SAFETY: The word is inside the memory, and the access is volatile.
                unsafe { to.get().write_volatile(word) };
            }
            written(words);
            count += N;
        }
        count
    }

    /// Returns the bytes in `range` (counted in bytes), cut to the size of the memory.
    ///
    /// The pointer is valid for its length as long as `self` is. It must only be dereferenced by
    /// volatile accesses or by a copy in C.
    pub(crate) fn bytes(&self, range: Range<usize>) -> *const [u8] {
        let start = range.start.min(self.size());
        let end = range.end.clamp(start, self.size());
        // `start` is at most the size, so the pointer stays inside the allocation or just past it.
        let base = self.words.as_ptr().cast::<u8>().wrapping_add(start);
        ptr::slice_from_raw_parts(base, end - start)
    }

    /// Copies the bytes in `range` (counted in bytes, cut to the size of the memory) to the buffers
    /// of a read(). Returns the number of bytes copied, which is lower at a fault or at the end of
    /// the buffers.
    ///
    /// May sleep and may fault.
    pub(crate) fn copy_to_iter(&self, range: Range<usize>, to: &mut IovIterDest<'_>) -> usize {
        let from = self.bytes(range);
        // SAFETY: `from` is memory that stays allocated as long as `self` does, and `to` is a valid
        // destination. A concurrent write to the memory only affects the content of the copy, which
        // C code makes.
        unsafe { bindings::_copy_to_iter(from.cast::<c_void>(), from.len(), to.as_raw()) }
    }

    /// Returns the `struct page` of a page, which must be inside this memory. Valid as long as
    /// `self` is.
    // The iterator of `AsPageIter` starts at the first page and borrows the memory mutably.
    pub(crate) fn page_struct(&self, page: usize) -> *mut bindings::page {
        let start = page * PAGE_SIZE;
        let address = self.bytes(start..start + PAGE_SIZE).cast::<c_void>();
        // SAFETY: The address is in memory that the allocator of `VVec` has mapped, page by page.
        unsafe { bindings::vmalloc_to_page(address) }
    }

    /// Copies out of the memory. Does not sleep.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing is copied then.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        let (head, words, tail) = self.parts(offset, to.len())?;
        let (to_head, to) = to.split_at_mut(head.len());
        let mut to = to.chunks_exact_mut(WORD);
        for (from, to) in words.iter().zip(&mut to) {
            // SAFETY: The word is inside the memory, and the access is volatile.
            let word = unsafe { from.get().read_volatile() };
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let to_tail = to.into_remainder();
        for (at, to) in Iterator::chain(head.zip(to_head), tail.zip(to_tail)) {
            // SAFETY: `parts()` established that the byte is inside the memory, which lives as long
            // as `self`; the access is volatile.
            *to = unsafe { self.byte(at).read_volatile() };
        }
        Ok(())
    }

    /// Copies into the memory. Does not sleep.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing is copied then.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result {
        let (head, words, tail) = self.parts(offset, from.len())?;
        let (from_head, from) = from.split_at(head.len());
        let mut from = from.chunks_exact(WORD);
        for (to, from) in words.iter().zip(&mut from) {
            let word = u64::from_ne_bytes(from.try_into().map_err(|_| EINVAL)?);
            // SAFETY: The word is inside the memory, and the access is volatile.
            unsafe { to.get().write_volatile(word) };
        }
        let from_tail = from.remainder();
        for (at, from) in Iterator::chain(head.zip(from_head), tail.zip(from_tail)) {
            // SAFETY: `parts()` established that the byte is inside the memory, which lives as long
            // as `self`; the access is volatile, and the words are cells.
            unsafe { self.byte(at).write_volatile(*from) };
        }
        Ok(())
    }

    /// Divides a range into the bytes before the whole words, the words, and the bytes after them.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory.
    fn parts(&self, offset: usize, len: usize) -> Result<Parts<'_>> {
        let end = offset.checked_add(len).ok_or(EINVAL)?;
        if end > self.size() {
            return Err(EINVAL);
        }
        let first = offset.div_ceil(WORD);
        let last = (end / WORD).max(first);
        let words = self.words.get(first..last).unwrap_or(&[]);
        Ok((
            offset..end.min(first * WORD),
            words,
            end.min(last * WORD)..end,
        ))
    }

    /// Returns the address of a byte, which must be inside the memory.
    fn byte(&self, at: usize) -> *mut u8 {
        // The words are cells, hence writable through a shared reference.
        self.words.as_ptr().cast_mut().cast::<u8>().wrapping_add(at)
    }
}
