// SPDX-License-Identifier: GPL-2.0

//! Mappings of device memory in address spaces of users.
//!
//! A page is mapped by a page fault. It is mapped writable only if stores need not be tracked: if
//! its mark is set already, or if tracking is off. Before a page is streamed, it is unmapped from
//! all address spaces, so that the next store faults again.
//!
//! The kernel can pin a page through a writable mapping, for example for `O_DIRECT`, and the pin
//! outlives the mapping. Therefore, the reference count of each page that was mapped writable is
//! checked until it shows that there is no pin.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/fs.h`](srctree/include/linux/fs.h)

use super::{
    dirty_map::{
        leaf_words,
        word_mask,
        PAGES_PER_WORD, //
    },
    state::Inner,
    Memory,
    StateMemory,
    GFP_MAYFAIL, //
};
use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    user::cond_resched_killable,
};
use core::ops::Range;
use kernel::{
    mm::virt::{
        flags,
        VmaNew, //
    },
    page::{
        Page,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    types::ForeignOwnable, //
};

/// The file and offset at which a memory is mapped.
struct FileRange {
    /// The device of the file. Held only while there are mappings, which keep the file open.
    device: ARef<Device>,
    /// Offset of the memory in the file, in pages.
    base: usize,
    /// Number of areas of address space.
    areas: usize,
}

impl FileRange {
    /// Unmaps pages from all address spaces. May sleep.
    fn unmap(&self, pages: Range<usize>) {
        let start = (self.base + pages.start) << PAGE_SHIFT;
        // SAFETY: Each device has an inode during its whole lifetime.
        unsafe {
            bindings::unmap_mapping_range(
                (*(*self.device.as_raw()).inode).i_mapping,
                start as bindings::loff_t,
                (pages.len() << PAGE_SHIFT) as bindings::loff_t,
                1,
            );
        }
    }
}

/// The mappings of a memory, and the handling of stores to them.
///
/// The lock that protects this is taken in page faults, so it must never be held during accesses to
/// user memory.
///
/// # Invariants
///
/// A page is mapped writable or pinned for writing only if its bit of `writable` is set. No bit is
/// set while `frozen` is.
pub(super) struct Mappings {
    file_range: Option<FileRange>,
    /// One bit for each page.
    writable: KVVec<u64>,
    /// Accesses raise `SIGBUS`, because memory space is off.
    disabled: bool,
    /// Accesses raise `SIGBUS`, because the device failed and its stores cannot be dropped.
    failed: bool,
    /// Stores are dropped.
    frozen: bool,
    /// Page that is mapped instead of pages with dropped stores.
    sink: Option<Page>,
    /// `sink` may be mapped.
    sink_used: bool,
    /// Number of pages with dropped stores.
    dropped: u64,
}

/// Returns the pages in `pages`, with one bit for each of 64 pages, that have other references.
/// Bit 0 is page `first` of `memory`. The pages must not be mapped.
fn pinned(memory: &Memory, first: usize, pages: u64) -> u64 {
    let mut pinned = 0;
    let mut left = pages;
    while left != 0 {
        let bit = left.trailing_zeros() as usize;
        left &= left - 1;
        // SAFETY: It is a page of the memory. The count is an atomic that may change concurrently.
        let count = unsafe {
            (&raw const (*memory.page_struct(first + bit))._refcount.counter).read_volatile()
        };
        // The memory itself owns one reference.
        pinned |= u64::from(count > 1) << bit;
    }
    pinned
}

impl Mappings {
    /// Creates an empty set of mappings of a memory of `pages` pages. May sleep. Fails with
    /// `ENOMEM`.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // INVARIANT: Nothing is mapped.
        Ok(Self {
            file_range: None,
            writable: KVVec::zeroed(leaf_words(pages), GFP_MAYFAIL)?,
            disabled: false,
            failed: false,
            frozen: false,
            sink: None,
            sink_used: false,
            dropped: 0,
        })
    }

    /// Returns the number of pages with dropped stores.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Enables accesses by mappings, or makes them raise `SIGBUS`. May sleep.
    pub(super) fn enable(&mut self, enabled: bool, pages: usize) {
        let was_blocked = self.is_blocked();
        self.disabled = !enabled;
        self.unmap_blocked(was_blocked, pages);
    }

    /// Makes accesses by mappings raise `SIGBUS` until the next reset, whether they are enabled or
    /// not. May sleep.
    pub(super) fn fail(&mut self, pages: usize) {
        let was_blocked = self.is_blocked();
        self.failed = true;
        self.unmap_blocked(was_blocked, pages);
    }

    /// Returns whether accesses raise `SIGBUS`.
    fn is_blocked(&self) -> bool {
        self.disabled || self.failed
    }

    /// Unmaps all pages if accesses raise `SIGBUS` from now on.
    fn unmap_blocked(&self, was_blocked: bool, pages: usize) {
        if let Some(file_range) = &self.file_range {
            if self.is_blocked() && !was_blocked {
                file_range.unmap(0..pages);
            }
        }
    }

    /// Ends the effects of [`freeze()`](Self::freeze) and [`fail()`](Self::fail), and clears the
    /// number of dropped stores.
    pub(super) fn reset(&mut self, pages: usize) {
        self.failed = false;
        self.thaw(pages);
        self.dropped = 0;
    }

    /// Write-protects pages of `memory`, so that stores to them fault. Returns the pages that are
    /// pinned, with bit 0 for the first page. These may still change without a fault. May sleep.
    ///
    /// `pages` must not cross a multiple of 64.
    pub(super) fn write_protect(&mut self, memory: &Memory, pages: Range<usize>) -> u64 {
        let shift = pages.start % PAGES_PER_WORD;
        let Some(word) = self.writable.get_mut(pages.start / PAGES_PER_WORD) else {
            return 0;
        };
        let mask = word_mask(shift, pages.len());
        if *word & mask == 0 {
            return 0;
        }
        if let Some(file_range) = &self.file_range {
            file_range.unmap(pages.clone());
        }
        let pinned = pinned(memory, pages.start - shift, *word & mask);
        // INVARIANT: Pages that are not pinned are not mapped.
        *word = *word & !mask | pinned;
        pinned >> shift
    }

    /// Drops all later stores by mappings, unless a page is pinned. Returns whether stores are
    /// dropped. May sleep.
    ///
    /// Fails with `EINTR` if the task was killed.
    pub(super) fn freeze(&mut self, memory: &Memory) -> Result<bool> {
        if self.writable.iter().any(|word| *word != 0) {
            if let Some(file_range) = &self.file_range {
                file_range.unmap(0..memory.size() / PAGE_SIZE);
            }
        }
        let mut any = 0;
        for (index, word) in self.writable.iter_mut().enumerate() {
            // INVARIANT: Nothing is mapped.
            *word = pinned(memory, index * PAGES_PER_WORD, *word);
            any |= *word;
            cond_resched_killable()?;
        }
        // INVARIANT: No bit is set. Page faults, which set bits, need the lock that protects this.
        self.frozen |= any == 0;
        Ok(self.frozen)
    }

    /// Enables stores by mappings. May sleep.
    pub(super) fn thaw(&mut self, pages: usize) {
        self.frozen = false;
        if core::mem::take(&mut self.sink_used) {
            if let Some(file_range) = &self.file_range {
                file_range.unmap(0..pages);
            }
        }
    }

    /// Unmaps a page to which a store is dropped, and returns the page to map instead.
    fn sink_page(&mut self, page: usize) -> Option<*mut bindings::page> {
        if self.sink.is_none() {
            self.sink = Some(Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO).ok()?);
        }
        if let Some(file_range) = &self.file_range {
            file_range.unmap(page..page + 1);
        }
        self.sink_used = true;
        self.sink.as_ref().map(Page::as_ptr)
    }
}

impl Inner {
    /// Handles a page fault on a page of this memory.
    ///
    /// # Safety
    ///
    /// Must be called in a page fault, which `vmf` describes, on an area made by [`map()`].
    unsafe fn fault(&self, vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By the safety requirements.
        let (pgoff, flags) = unsafe { ((*vmf).__bindgen_anon_1.pgoff, (*vmf).flags) };
        let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
        // Held until the page is mapped, so that it is either both marked and writable, or neither.
        let mappings = &mut *self.mappings.lock();
        let page = mappings
            .file_range
            .as_ref()
            .and_then(|file_range| pgoff.checked_sub(file_range.base))
            .filter(|page| *page < self.memory.size() / PAGE_SIZE);
        let Some(page) = page.filter(|_| !mappings.is_blocked()) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };

        let mut to_map = self.memory.page_struct(page);
        let mut writable = write;
        if mappings.frozen {
            if write {
                let Some(sink) = mappings.sink_page(page) else {
                    return bindings::vm_fault_reason_VM_FAULT_OOM;
                };
                to_map = sink;
            }
        } else if !self.is_tracked() {
            writable = true;
        } else if write {
            self.changed(page * PAGE_SIZE..(page + 1) * PAGE_SIZE);
        }
        if writable && !mappings.frozen {
            if let Some(word) = mappings.writable.get_mut(page / PAGES_PER_WORD) {
                *word |= word_mask(page % PAGES_PER_WORD, 1);
            }
        }
        // SAFETY: This is a page fault on an area that may have such pages, and the page is valid.
        let result = unsafe { bindings::vmf_insert_page_mkwrite(vmf, to_map, writable) };
        // If there was no memory for a page table, the same store faults again.
        if mappings.frozen && write && result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            mappings.dropped += 1;
        }
        result
    }
}

/// Maps `memory` into an area of address space, for mmap() of `device`. The memory starts at page
/// `base` of the device's file. May sleep.
///
/// Fails with `EINVAL` if the area is private or reaches beyond the memory, or if the memory is
/// mapped by another file or at another offset.
///
/// # Safety
///
/// `vma` must be undergoing its setup in an mmap() of the file of `device`.
pub(crate) unsafe fn map(
    memory: &StateMemory,
    device: &Device<Open>,
    base: usize,
    vma: *mut bindings::vm_area_struct,
) -> Result {
    let inner = &memory.0;
    // SAFETY: By the safety requirements.
    let (area, pgoff) = unsafe { (VmaNew::from_raw(vma), (*vma).vm_pgoff) };
    let first = pgoff.checked_sub(base).ok_or(EINVAL)?;
    let count = (area.end() - area.start()) >> PAGE_SHIFT;
    if first
        .checked_add(count)
        .is_none_or(|end| end > memory.pages())
    {
        return Err(EINVAL);
    }
    if area.flags() & flags::SHARED == 0 {
        return Err(EINVAL);
    }

    let mut mappings = inner.mappings.lock();
    match &mut mappings.file_range {
        None => {
            let device: &Device = device;
            mappings.file_range = Some(FileRange {
                device: device.into(),
                base,
                areas: 1,
            });
        }
        Some(file_range)
            if file_range.base == base && file_range.device.as_raw() == device.as_raw() =>
        {
            file_range.areas += 1;
        }
        Some(_) => return Err(EINVAL),
    }
    drop(mappings);

    area.set_mixedmap();
    area.set_dontexpand();
    area.set_dontdump();
    // SAFETY: The area is undergoing its setup. The operations expect an `Arc<Inner>`, which each
    // area owns until it is closed.
    unsafe {
        (*vma).vm_private_data = inner.clone().into_foreign();
        (*vma).vm_ops = &VM_OPS;
    }
    Ok(())
}

/// The operations of areas made by [`map()`].
///
/// With `page_mkwrite`, the kernel calls the fault handler before a page becomes writable, and
/// refuses long-term pins for writing, which would bypass it.
const VM_OPS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    open: Some(open),
    close: Some(close),
    fault: Some(fault),
    page_mkwrite: Some(fault),
    ..pin_init::zeroed()
};

/// # Safety
///
/// Must be called by the core on an area with these operations, which is a copy of another area.
unsafe extern "C" fn open(vma: *mut bindings::vm_area_struct) {
    // SAFETY: The original area owns the reference until it is closed.
    let inner = unsafe { Arc::<Inner>::borrow((*vma).vm_private_data) };
    if let Some(file_range) = &mut inner.mappings.lock().file_range {
        file_range.areas += 1;
    }
    // SAFETY: The new area owns a reference of its own.
    unsafe { (*vma).vm_private_data = Arc::<Inner>::from(inner).into_foreign() };
}

/// # Safety
///
/// Must be called by the core on an area with these operations, when it is removed.
unsafe extern "C" fn close(vma: *mut bindings::vm_area_struct) {
    // SAFETY: The area owns the reference, and does not use it after this.
    let inner = unsafe { Arc::<Inner>::from_foreign((*vma).vm_private_data) };
    let mut mappings = inner.mappings.lock();
    let last = mappings.file_range.take_if(|file_range| {
        file_range.areas -= 1;
        file_range.areas == 0
    });
    drop(mappings);
    // Dropped outside of the lock, because it releases the device.
    drop(last);
}

/// # Safety
///
/// Must be called by the core in a page fault on an area with these operations.
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The area owns the reference, and is not closed before the fault is handled.
    let inner = unsafe {
        let vma = (*vmf).__bindgen_anon_1.vma;
        Arc::<Inner>::borrow((*vma).vm_private_data)
    };
    // SAFETY: By the safety requirements.
    unsafe { inner.fault(vmf) }
}
