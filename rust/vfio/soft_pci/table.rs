// SPDX-License-Identifier: GPL-2.0

//! Page table of the software IOMMU.
//!
//! This file uses `core` alone, so that the same source runs in the kernel, under KUnit and in host
//! tests. The caller provides the memory and the lock.
//!
//! A table maps pages of an address space to page frames. It is a radix tree of four levels, like
//! the tables of hardware: three levels of *branches* and the *leaves*, each with [`FANOUT`] slots.
//! A slot of a branch counts the mapped and the dirty pages below it. Therefore, a node is freed
//! together with its last mapping, and a search for dirty pages skips clean nodes.
//!
//! All numbers are page numbers, so the table does not depend on the page size.

use core::ops::DerefMut;

/// Number of slots in a node.
pub const FANOUT: usize = 1 << BITS;

/// Number of pages in the address space: 2^48 bytes for pages of 4 KiB.
pub const PAGES: u64 = 1 << (4 * BITS);

/// Number of page frames that an entry can refer to.
pub const FRAMES: u64 = 1 << (u64::BITS - FRAME_SHIFT);

/// Number of bits of a page number that select a slot in a node.
const BITS: u32 = 9;

/// Number of leaves that [`Table::take_dirty()`] scans at once.
const LEAVES_AT_ONCE: usize = 16;

// An entry of a leaf. An entry of an unmapped page is 0.
const PRESENT: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const DIRTY: u64 = 1 << 3;
const FRAME_SHIFT: u32 = 4;

/// Memory of the nodes.
pub trait Memory {
    /// A pointer that owns a node.
    type Box<T>: DerefMut<Target = T>;
}

/// A slot of a branch: the node below it, and the numbers of mapped and of dirty pages in it.
pub type Slot<B> = (Option<B>, u32, u32);

/// A node of the lowest level, with one entry for each page.
pub type Leaf = [u64; FANOUT];

/// A branch above the leaves.
pub type Lower<M> = [Slot<<M as Memory>::Box<Leaf>>; FANOUT];

/// A branch in the middle.
pub type Middle<M> = [Slot<<M as Memory>::Box<Lower<M>>>; FANOUT];

/// The branch at the top.
pub type Root<M> = [Slot<<M as Memory>::Box<Middle<M>>>; FANOUT];

/// Nodes for the next mapping, zeroed.
///
/// Allocations may sleep, but the lock of a table may be a spinlock. Therefore, the caller
/// allocates a node after [`Table::map()`] has reported that it is missing.
pub struct Spare<M: Memory> {
    /// A leaf.
    pub leaf: Option<M::Box<Leaf>>,
    /// A branch above the leaves.
    pub lower: Option<M::Box<Lower<M>>>,
    /// A branch in the middle.
    pub middle: Option<M::Box<Middle<M>>>,
}

impl<M: Memory> Default for Spare<M> {
    /// Creates a set without nodes.
    fn default() -> Self {
        Self {
            leaf: None,
            lower: None,
            middle: None,
        }
    }
}

/// A node that [`Spare`] has to contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// [`Spare::leaf`].
    Leaf,
    /// [`Spare::lower`].
    Lower,
    /// [`Spare::middle`].
    Middle,
}

/// Reason why pages were not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// A node has to be provided first.
    Missing(Missing),
    /// One of the pages is mapped already.
    Occupied,
    /// A page or a frame is beyond [`PAGES`] or [`FRAMES`].
    Range,
}

/// The accesses that a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

/// Reason why an access of the device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is not mapped.
    Unmapped,
    /// The mapping does not allow the access.
    Denied,
}

/// A sequence of dirty pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: u64,
    /// The number of pages, not 0.
    pub count: u64,
}

/// A page table.
///
/// # Invariants
///
/// - The counters of a slot are the numbers of entries below it that are present and dirty.
/// - A slot has a node if and only if pages below it are mapped.
/// - A dirty entry is present.
pub struct Table<M: Memory> {
    root: M::Box<Root<M>>,
}

/// Returns the slot of `page` in a node at `level`. Level 0 is the leaf.
const fn slot(page: u64, level: u32) -> usize {
    (page >> (level * BITS)) as usize % FANOUT
}

/// Returns the first page after the node below the slot of `page` in a branch at `level`.
const fn after(page: u64, level: u32) -> u64 {
    ((page >> (level * BITS)) + 1) << (level * BITS)
}

/// Returns the node in `slot`, and puts `spare` there first if there is none. Returns [`None`] if
/// `spare` is empty as well.
fn enter<'a, B>(slot: &'a mut Option<B>, spare: &mut Option<B>) -> Option<&'a mut B> {
    if slot.is_none() {
        *slot = spare.take();
    }
    slot.as_mut()
}

/// Adds a dirty page to `runs`, the first `count` of which are used. Returns the new `count`, or
/// [`None`] if there is no room.
fn add(runs: &mut [Run], count: usize, page: u64) -> Option<usize> {
    match count.checked_sub(1).and_then(|last| runs.get_mut(last)) {
        Some(run) if run.first + run.count == page => {
            run.count += 1;
            Some(count)
        }
        _ => {
            *runs.get_mut(count)? = Run {
                first: page,
                count: 1,
            };
            Some(count + 1)
        }
    }
}

impl<M: Memory> Table<M> {
    /// Creates a table without mappings. `root` must be zeroed.
    pub fn new(root: M::Box<Root<M>>) -> Self {
        // INVARIANT: Nothing is mapped, the counters are 0, and there are no nodes.
        Self { root }
    }

    /// Maps pages starting at `page` to frames starting at `frame`: up to `count`, but at most to
    /// the end of the leaf. Returns the number of mapped pages.
    ///
    /// Nothing is mapped in case of an error. After [`MapError::Missing`], the caller provides the
    /// node in `spare` and calls again. Nodes that are not needed stay in `spare`.
    pub fn map(
        &mut self,
        page: u64,
        frame: u64,
        count: u64,
        access: Access,
        spare: &mut Spare<M>,
    ) -> Result<u64, MapError> {
        let fits = |first: u64, end| first.checked_add(count).is_some_and(|last| last <= end);
        if !fits(page, PAGES) || !fits(frame, FRAMES) {
            return Err(MapError::Range);
        }
        if count == 0 {
            return Ok(0);
        }
        // A node that is put in place must not stay there without mappings.
        if let Some(missing) = self.missing(page, spare) {
            return Err(MapError::Missing(missing));
        }
        let first = slot(page, 0);
        let len = count.min((FANOUT - first) as u64) as usize;
        let (middle, mapped3, _) = &mut self.root[slot(page, 3)];
        let middle = enter(middle, &mut spare.middle).ok_or(MapError::Missing(Missing::Middle))?;
        let (lower, mapped2, _) = &mut middle[slot(page, 2)];
        let lower = enter(lower, &mut spare.lower).ok_or(MapError::Missing(Missing::Lower))?;
        let (leaf, mapped1, _) = &mut lower[slot(page, 1)];
        let leaf = enter(leaf, &mut spare.leaf).ok_or(MapError::Missing(Missing::Leaf))?;
        let entries = &mut leaf[first..first + len];
        if entries.iter().any(|entry| *entry != 0) {
            return Err(MapError::Occupied);
        }
        let mut bits = PRESENT | frame << FRAME_SHIFT;
        if access.read {
            bits |= READ;
        }
        if access.write {
            bits |= WRITE;
        }
        for entry in entries {
            *entry = bits;
            bits = bits.wrapping_add(1 << FRAME_SHIFT);
        }
        // INVARIANT: The entries were not present before.
        for mapped in [mapped1, mapped2, mapped3] {
            *mapped += len as u32;
        }
        Ok(len as u64)
    }

    /// Returns a node that mapping `page` needs and that is not in `spare`.
    fn missing(&self, page: u64, spare: &Spare<M>) -> Option<Missing> {
        let Some(middle) = &self.root[slot(page, 3)].0 else {
            return match spare {
                Spare { middle: None, .. } => Some(Missing::Middle),
                Spare { lower: None, .. } => Some(Missing::Lower),
                Spare { leaf: None, .. } => Some(Missing::Leaf),
                _ => None,
            };
        };
        let Some(lower) = &middle[slot(page, 2)].0 else {
            return match spare {
                Spare { lower: None, .. } => Some(Missing::Lower),
                Spare { leaf: None, .. } => Some(Missing::Leaf),
                _ => None,
            };
        };
        let leaf = &lower[slot(page, 1)].0;
        (leaf.is_none() && spare.leaf.is_none()).then_some(Missing::Leaf)
    }

    /// Unmaps pages starting at `page`: up to `count`, but at most to the end of the leaf or to the
    /// first page that is not mapped. Returns the number of unmapped pages.
    ///
    /// Their dirty state is lost. Frees nodes without mappings.
    pub fn unmap(&mut self, page: u64, count: u64) -> u64 {
        if page >= PAGES {
            return 0;
        }
        let first = slot(page, 0);
        let len = count.min((FANOUT - first) as u64) as usize;
        let (middle, mapped3, dirty3) = &mut self.root[slot(page, 3)];
        let Some(middle_node) = middle else {
            return 0;
        };
        let (lower, mapped2, dirty2) = &mut middle_node[slot(page, 2)];
        let Some(lower_node) = lower else {
            return 0;
        };
        let (leaf, mapped1, dirty1) = &mut lower_node[slot(page, 1)];
        let Some(entries) = leaf else {
            return 0;
        };
        let (mut mapped, mut dirty) = (0, 0);
        if len == FANOUT && *mapped1 as usize == FANOUT {
            // The leaf is freed below.
            (mapped, dirty) = (*mapped1, *dirty1);
        } else {
            for entry in &mut entries[first..first + len] {
                if *entry == 0 {
                    break;
                }
                mapped += 1;
                dirty += u32::from(*entry & DIRTY != 0);
                *entry = 0;
            }
        }
        // INVARIANT: The entries are not present any more, or their leaf is freed.
        for (counter, removed) in [
            (&mut *mapped1, mapped),
            (&mut *mapped2, mapped),
            (&mut *mapped3, mapped),
            (dirty1, dirty),
            (dirty2, dirty),
            (dirty3, dirty),
        ] {
            *counter -= removed;
        }
        // INVARIANT: A node goes with its last mapping.
        if *mapped1 == 0 {
            *leaf = None;
        }
        if *mapped2 == 0 {
            *lower = None;
        }
        if *mapped3 == 0 {
            *middle = None;
        }
        u64::from(mapped)
    }

    /// Returns the entry of `page`, 0 if it is not mapped.
    fn entry(&self, page: u64) -> u64 {
        if page >= PAGES {
            return 0;
        }
        let middle = self.root[slot(page, 3)].0.as_ref();
        let lower = middle.and_then(|middle| middle[slot(page, 2)].0.as_ref());
        let leaf = lower.and_then(|lower| lower[slot(page, 1)].0.as_ref());
        leaf.map_or(0, |leaf| leaf[slot(page, 0)])
    }

    /// Returns the frame that `page` is mapped to, for any access.
    pub fn frame(&self, page: u64) -> Option<u64> {
        let entry = self.entry(page);
        (entry != 0).then_some(entry >> FRAME_SHIFT)
    }

    /// Returns the frame for a write of the device to `page`, or for a read.
    pub fn translate(&self, page: u64, write: bool) -> Result<u64, Fault> {
        let entry = self.entry(page);
        let needed = if write { WRITE } else { READ };
        if entry == 0 {
            Err(Fault::Unmapped)
        } else if entry & needed == 0 {
            Err(Fault::Denied)
        } else {
            Ok(entry >> FRAME_SHIFT)
        }
    }

    /// Marks `page` as dirty. Does nothing if it is not mapped.
    pub fn mark(&mut self, page: u64) {
        if page >= PAGES {
            return;
        }
        let (Some(middle), _, dirty3) = &mut self.root[slot(page, 3)] else {
            return;
        };
        let (Some(lower), _, dirty2) = &mut middle[slot(page, 2)] else {
            return;
        };
        let (Some(leaf), _, dirty1) = &mut lower[slot(page, 1)] else {
            return;
        };
        let entry = &mut leaf[slot(page, 0)];
        if *entry & (PRESENT | DIRTY) == PRESENT {
            *entry |= DIRTY;
            // INVARIANT: The entry was not dirty before.
            for dirty in [dirty1, dirty2, dirty3] {
                *dirty += 1;
            }
        }
    }

    /// Copies runs of dirty pages in `first..end` to `runs`, until `runs` is full, and makes the
    /// pages clean if `clear` is true. Returns the number of runs, and the page at which to
    /// continue.
    ///
    /// Scans a limited number of leaves. Adjacent pages can be in two runs if they are returned by
    /// two calls.
    pub fn take_dirty(
        &mut self,
        first: u64,
        end: u64,
        clear: bool,
        runs: &mut [Run],
    ) -> (usize, Option<u64>) {
        let end = end.min(PAGES);
        let (mut page, mut count, mut leaves) = (first, 0, 0);
        while page < end {
            let (Some(middle), _, dirty3 @ 1..) = &mut self.root[slot(page, 3)] else {
                page = after(page, 3);
                continue;
            };
            let (Some(lower), _, dirty2 @ 1..) = &mut middle[slot(page, 2)] else {
                page = after(page, 2);
                continue;
            };
            let (Some(leaf), _, dirty1 @ 1..) = &mut lower[slot(page, 1)] else {
                page = after(page, 1);
                continue;
            };
            if leaves == LEAVES_AT_ONCE {
                return (count, Some(page));
            }
            leaves += 1;
            let last = end.min(after(page, 1));
            let entries = &mut leaf[slot(page, 0)..];
            let mut cleared = 0;
            let mut full = None;
            for (page, entry) in (page..last).zip(entries) {
                if *entry & DIRTY == 0 {
                    continue;
                }
                match add(runs, count, page) {
                    Some(new) => count = new,
                    None => {
                        full = Some(page);
                        break;
                    }
                }
                if clear {
                    *entry &= !DIRTY;
                    cleared += 1;
                }
            }
            // INVARIANT: This is the number of entries that are not dirty any more.
            for dirty in [dirty1, dirty2, dirty3] {
                *dirty -= cleared;
            }
            if full.is_some() {
                return (count, full);
            }
            page = last;
        }
        (count, None)
    }
}
