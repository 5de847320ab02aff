// SPDX-License-Identifier: GPL-2.0

//! Mappings of a tracked BAR in address spaces of users.
//!
//! A page is mapped by a page fault. It is mapped writable only if stores need not be tracked: if
//! its mark is set already, or if tracking is off. Before a page is streamed, it is unmapped from
//! all address spaces, so that the next store faults again. The kernel cannot pin pages of a BAR,
//! so no store bypasses the page table.
//!
//! A page that is mapped read-only becomes writable only by being unmapped and mapped again, with
//! the lock of the mappings held. If the core made it writable after `pfn_mkwrite` has returned, it
//! could do so after the page was streamed and mapped read-only again.
//!
//! The core unmaps all BARs when the device loses power or memory space, and at the start of
//! `VFIO_DEVICE_RESET`. The crate does so at the start of any reset. A later page fault completes
//! the reset first, like any other access.

use crate::{
    bindings,
    memory::{
        dirty_map::{
            leaf_words,
            word_mask,
            PAGES_PER_WORD, //
        },
        GFP_MAYFAIL, //
    },
    pci::function::Function,
    region::Position,
};
use core::ops::Range;
use kernel::{
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// The mappings of the memory in a BAR, and the handling of stores to them.
///
/// The lock that protects this is taken in page faults, so it must never be held during accesses to
/// user memory. It is outside of `memory_lock`.
///
/// # Invariants
///
/// A page is mapped writable only if its bit of `writable` is set. No bit is set while `frozen` is.
pub(super) struct Mappings {
    /// One bit for each page.
    writable: KVVec<u64>,
    /// Stores are dropped.
    frozen: bool,
    /// Page that is mapped instead of pages with dropped stores.
    sink: Option<Page>,
    /// `sink` may be mapped.
    sink_used: bool,
}

impl Mappings {
    /// Creates an empty set of mappings of a memory of `pages` pages. May sleep. Fails with
    /// `ENOMEM`.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // INVARIANT: Nothing is mapped.
        Ok(Self {
            writable: KVVec::zeroed(leaf_words(pages), GFP_MAYFAIL)?,
            frozen: false,
            sink: None,
            sink_used: false,
        })
    }

    /// Write-protects pages of the BAR that begins at `bar`, so that stores to them fault. May
    /// sleep.
    ///
    /// `pages` must not cross a multiple of 64.
    pub(super) fn write_protect(
        &mut self,
        function: &Function,
        bar: Position,
        pages: Range<usize>,
    ) {
        let Some(word) = self.writable.get_mut(pages.start / PAGES_PER_WORD) else {
            return;
        };
        let mask = word_mask(pages.start % PAGES_PER_WORD, pages.len());
        if *word & mask == 0 {
            return;
        }
        function.unmap(at(bar, pages.start), pages.len() * PAGE_SIZE);
        // INVARIANT: The pages are not mapped. Page faults need the lock that protects this.
        *word &= !mask;
    }

    /// Drops all later stores. May sleep.
    pub(super) fn freeze(&mut self, function: &Function, bar: Position) {
        if self.writable.iter().any(|word| *word != 0) {
            let len = function.size(bar.region_index) as usize;
            function.unmap(bar, len);
            // INVARIANT: Nothing is mapped. Page faults need the lock that protects this.
            self.writable.fill(0);
        }
        self.frozen = true;
    }

    /// Enables stores. May sleep.
    pub(super) fn thaw(&mut self, function: &Function, bar: Position) {
        self.frozen = false;
        if core::mem::take(&mut self.sink_used) {
            function.unmap(bar, function.size(bar.region_index) as usize);
        }
    }

    /// Maps a page in a page fault. `is_tracked` returns whether stores are tracked, and `mark`
    /// marks the page.
    ///
    /// # Safety
    ///
    /// Must be called in a page fault, which `vmf` describes, on an area made by
    /// `vfio_pci_core_mmap()` for the BAR of `function` that begins at `bar`. `page` must be the
    /// page at which it happened.
    pub(super) unsafe fn fault(
        &mut self,
        vmf: *mut bindings::vm_fault,
        function: &Function,
        bar: Position,
        page: usize,
        is_tracked: impl FnOnce() -> bool,
        mark: impl FnOnce(),
    ) -> bindings::vm_fault_t {
        // SAFETY: By the safety requirements.
        let flags = unsafe { (*vmf).flags };
        let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
        let pos = at(bar, page);
        if flags & bindings::fault_flag_FAULT_FLAG_MKWRITE != 0 {
            // A page that is mapped read-only is not replaced.
            //
            // SAFETY: By the safety requirements, this is a call of `pfn_mkwrite`, for which
            // `vma` contains the page at `address`. `wp_pfn_shared()` has released the lock of the
            // page table. As the area has no `map_pages`, see `VTable::VM_OPS`, it makes this call
            // only with `mmap_lock` held, so that the area does not change meanwhile.
            unsafe {
                let fault = &(*vmf).__bindgen_anon_1;
                bindings::zap_special_vma_range(fault.vma, fault.address, PAGE_SIZE);
            }
        }
        if self.frozen && write {
            if self.sink.is_none() {
                self.sink = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO).ok();
            }
            let Some(sink) = &self.sink else {
                return bindings::vm_fault_reason_VM_FAULT_OOM;
            };
            self.sink_used = true;
            // SAFETY: By the safety requirements. There are no mappings after the last close, which
            // comes before `self` is dropped.
            let result = unsafe { function.insert(vmf, pos, Some(sink.as_ptr()), true) };
            // If there was no memory for a page table, the same store faults again.
            if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
                function.dropped();
            }
            return result;
        }
        let mut writable = write;
        if !self.frozen {
            if !is_tracked() {
                writable = true;
            } else if write {
                mark();
            }
        }
        if let Some(word) = self
            .writable
            .get_mut(page / PAGES_PER_WORD)
            .filter(|_| writable)
        {
            *word |= word_mask(page % PAGES_PER_WORD, 1);
        }
        // INVARIANT: The bit of a writable page is set, which no page is while `frozen` is.
        // SAFETY: By the safety requirements.
        unsafe { function.insert(vmf, pos, None, writable) }
    }
}

/// Returns the position of a page of the BAR that begins at `bar`.
fn at(bar: Position, page: usize) -> Position {
    Position::new(bar.region_index, (page * PAGE_SIZE) as u64)
}
