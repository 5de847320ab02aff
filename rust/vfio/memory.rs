// SPDX-License-Identifier: GPL-2.0

//! Device memory.

pub mod dirty_map;
pub(crate) mod mapping;
mod state;

pub use self::state::{
    PageRun,
    Pages,
    Pending,
    StateMemory,
    Tracking, //
};

use crate::bindings;
use core::{
    cell::UnsafeCell,
    ops::Range,
    ptr, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Bytes in a word, the unit in which [`Memory`] is accessed where alignment allows.
const WORD: usize = size_of::<u64>();

/// Memory of a device, made of whole pages, which many may read and write at the same time.
///
/// It is a RAM that several bus masters see: nobody excludes anybody. A reader that meets a
/// writer gets old bytes, new bytes, or some of each; within an aligned word never a mixture, as
/// long as the writer wrote the whole word at once.
///
/// # Invariants
///
/// `words` spans whole pages. Its bytes are only ever accessed by volatile means or by user copies.
pub(crate) struct Memory {
    words: VVec<UnsafeCell<u64>>,
}

// SAFETY: By the type invariants all accesses are volatile, which the kernel's memory model allows
// to be concurrent, or user copies, which race with user space anyway. Any bytes are valid words.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates `pages` pages of zeroes, charged to the caller's memory cgroup.
    ///
    /// May sleep. Fails with `ENOMEM`, and with `EINVAL` if `pages` is zero or too many to count
    /// their bytes.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let words = pages.checked_mul(PAGE_SIZE / WORD).ok_or(EINVAL)?;
        if words == 0 || words.checked_mul(WORD).is_none() {
            return Err(EINVAL);
        }
        let plain = VVec::<u64>::zeroed(words, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        let (ptr, len, capacity) = plain.into_raw_parts();
        // INVARIANT: A whole number of pages was asked for.
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

    /// Returns what the words in `range` hold, counted in words and cut to the size of the memory.
    #[inline]
    pub(crate) fn words(&self, range: Range<usize>) -> impl Iterator<Item = u64> + '_ {
        let end = range.end.min(self.words.len());
        let words = self.words.get(range.start..end).unwrap_or(&[]);
        // SAFETY: The word is inside the memory, and the access is volatile.
        words
            .iter()
            .map(|word| unsafe { word.get().read_volatile() })
    }

    /// Returns what the words of a page hold.
    #[inline]
    pub(crate) fn page(&self, page: usize) -> impl Iterator<Item = u64> + '_ {
        let start = page.saturating_mul(PAGE_SIZE / WORD);
        self.words(start..start.saturating_add(PAGE_SIZE / WORD))
    }

    /// Writes words from the word `start` on, as far as there are any and the memory reaches, and
    /// returns how many it wrote.
    #[inline]
    pub(crate) fn set_words(&self, start: usize, words: impl Iterator<Item = u64>) -> usize {
        let to = self.words.get(start..).unwrap_or(&[]);
        let mut count = 0;
        for (to, word) in to.iter().zip(words) {
            // SAFETY: The word is inside the memory, and the access is volatile.
            unsafe { to.get().write_volatile(word) };
            count += 1;
        }
        count
    }

    /// Returns the bytes in `range` (counted in bytes), cut to the size of the memory.
    ///
    /// The pointer is valid for its length as long as `self` is. Who dereferences it must do so
    /// by volatile means or by a user copy.
    pub(crate) fn bytes(&self, range: Range<usize>) -> *const [u8] {
        let start = range.start.min(self.size());
        let end = range.end.clamp(start, self.size());
        // `start` is at most the size, so the pointer stays inside the allocation or just past it.
        let base = self.words.as_ptr().cast::<u8>().wrapping_add(start);
        ptr::slice_from_raw_parts(base, end - start)
    }

    /// Returns what the kernel knows of a page, which must be one of this memory. Valid as long as
    /// `self` is.
    pub(crate) fn page_struct(&self, page: usize) -> *mut bindings::page {
        let start = page * PAGE_SIZE;
        let address = self.bytes(start..start + PAGE_SIZE).cast::<c_void>();
        // SAFETY: It is an address in memory that the allocator of `VVec` has mapped, page by page.
        unsafe { bindings::vmalloc_to_page(address) }
    }

    /// Copies out of the memory. Does not sleep.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing is copied then.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        let from = self.checked(offset, to.len())?;
        let mut done = 0;
        while done < to.len() {
            let at = from.wrapping_add(done);
            if at.addr() % WORD == 0 && to.len() - done >= WORD {
                // SAFETY: `checked()` established that the range is inside the allocation, which
                // lives as long as `self`, and `at` is aligned.
                let word = unsafe { at.cast::<u64>().read_volatile() };
                if let Some(part) = to.get_mut(done..done + WORD) {
                    part.copy_from_slice(&word.to_ne_bytes());
                }
                done += WORD;
            } else {
                // SAFETY: As above; a byte has no alignment.
                let byte = unsafe { at.read_volatile() };
                if let Some(part) = to.get_mut(done) {
                    *part = byte;
                }
                done += 1;
            }
        }
        Ok(())
    }

    /// Copies into the memory. Does not sleep.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing is copied then.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result {
        let to = self.checked(offset, from.len())?;
        let mut done = 0;
        while let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) {
            let at = to.wrapping_add(done);
            match rest.first_chunk::<WORD>() {
                Some(word) if at.addr() % WORD == 0 => {
                    // SAFETY: `checked()` established that the range is inside the allocation,
                    // which lives as long as `self`; `at` is aligned, and the words are cells.
                    unsafe { at.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
                    done += WORD;
                }
                _ => {
                    // SAFETY: As above; a byte has no alignment.
                    unsafe { at.write_volatile(rest[0]) };
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// Returns where `offset` is, if `len` bytes from there on are inside the memory.
    fn checked(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(EINVAL);
        }
        // The words are cells, hence writable through a shared reference.
        Ok(self
            .words
            .as_ptr()
            .cast_mut()
            .cast::<u8>()
            .wrapping_add(offset))
    }
}
