// SPDX-License-Identifier: GPL-2.0

//! Memory of a device in a BAR that is part of its state, and the tracking of its changes.

use crate::{
    bindings,
    memory::{
        state::Tracker,
        Pending, //
    },
    notifier::Notifier,
    pci::{
        function::Function,
        mapping::Mappings, //
    },
    region::Position,
    user::{
        cond_resched,
        lock_killable,
        GFP_MAYFAIL, //
    },
};
use core::ops::Range;
use kernel::{
    new_mutex, new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex,
        SpinLock, //
    },
};

/// Maximum number of pages of a run, which limits the size of a copy of its content.
const MAX_RUN: usize = 64;

#[pin_data]
struct Inner {
    function: Arc<Function>,
    region_index: u32,
    pages: usize,
    /// Outside of `tracker` and of the locks of `function`.
    #[pin]
    mappings: Mutex<Mappings>,
    #[pin]
    tracker: SpinLock<Tracker>,
}

/// Memory in a BAR that is part of the device's migrated state.
///
/// This is [`StateMemory`](crate::memory::StateMemory) in the device instead of in the host. While
/// it is [tracked](Self::track), pages that have changed since they were streamed are marked. Only
/// the user and the driver may change it: the tracker does not notice changes by the device itself
/// or by DMA of other devices.
///
/// Writes of the user, and stores to mappings of the BAR, are tracked if
/// [`Operations::region`](crate::pci::Operations::region) returns this memory. They are dropped
/// while the device is stopped. Through that mapping, a page with a dropped store has undefined
/// content until the device runs again.
///
/// Clones refer to the same memory. All accesses may sleep, and fail like those of [`Function`].
///
/// # Examples
///
/// ```
/// use vfio::pci::{
///     self,
///     BarMemory, //
/// };
///
/// /// The memory in BAR2 of a device, zeroed.
/// fn memory(function: &Arc<pci::Function>) -> Result<BarMemory> {
///     let memory = BarMemory::new(function.clone(), region::BAR2)?;
///     memory.clear()?;
///     Ok(memory)
/// }
/// ```
#[derive(Clone)]
pub struct BarMemory(Arc<Inner>);

impl BarMemory {
    /// Creates the tracked memory of a whole memory BAR. The BAR is not accessed. May sleep.
    ///
    /// Fails with `EINVAL` if there is no such memory BAR or its size is not a number of whole
    /// pages, and with `ENOMEM`.
    pub fn new(function: Arc<Function>, region_index: u32) -> Result<Self> {
        let size = usize::try_from(function.size(region_index))?;
        if size == 0 || size % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        let pages = size / PAGE_SIZE;
        let mappings = Mappings::new(pages)?;
        let tracker = Tracker::new(pages)?;
        Ok(Self(Arc::pin_init(
            pin_init!(Inner {
                function,
                region_index,
                pages,
                mappings <- new_mutex!(mappings, "vfio::pci::BarMemory::mappings"),
                tracker <- new_spinlock!(tracker, "vfio::pci::BarMemory"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?))
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.0.pages * PAGE_SIZE
    }

    /// Returns the size in pages of the kernel.
    pub fn pages(&self) -> usize {
        self.0.pages
    }

    /// Returns whether this is the memory in a BAR of `function`.
    pub(crate) fn is_of(&self, function: &Arc<Function>, region_index: u32) -> bool {
        self.0.region_index == region_index && Arc::ptr_eq(&self.0.function, function)
    }

    fn position(&self, offset: usize) -> Position {
        Position::new(self.0.region_index, offset as u64)
    }

    /// Reads bytes. Fails with `EINVAL` if the range is not inside the memory.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        self.0.function.read(self.position(offset), to)
    }

    /// Writes bytes and marks their pages. Fails with `EINVAL` if the range is not inside the
    /// memory. The pages are marked even if it fails: some of the bytes may have been written.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result {
        let done = self.0.function.write(self.position(offset), from);
        self.changed(offset, from.len());
        done
    }

    /// Writes bytes on behalf of the user, and marks their pages, like [`write()`](Self::write).
    pub(crate) fn user_write(&self, offset: usize, from: &[u8]) -> Result {
        let done = self.0.function.user_write(self.position(offset), from);
        self.changed(offset, from.len());
        done
    }

    /// Marks the pages of a range, as far as it is inside the memory.
    fn changed(&self, offset: usize, len: usize) {
        if len > 0 {
            let range = offset..offset.saturating_add(len);
            self.0.tracker.lock().changed(range);
        }
    }

    /// Sets every byte to zero and marks all pages. Reschedules if needed.
    pub fn clear(&self) -> Result {
        static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

        for page in 0..self.0.pages {
            self.write(page * PAGE_SIZE, &ZEROES)?;
            cond_resched();
        }
        Ok(())
    }

    /// Drops stores by mappings from now on. Fails with `EINTR`, without an effect, if the task is
    /// killed while it waits for a page fault. May sleep.
    pub(crate) fn stop(&self) -> Result {
        let mut mappings = lock_killable(&self.0.mappings)?;
        mappings.freeze(&self.0.function, self.position(0));
        Ok(())
    }

    /// The same for a device that failed.
    pub(crate) fn halt(&self) {
        let mut mappings = self.0.mappings.lock();
        mappings.freeze(&self.0.function, self.position(0));
    }

    /// Enables stores by mappings. May sleep.
    pub(crate) fn start(&self) {
        let mut mappings = self.0.mappings.lock();
        mappings.thaw(&self.0.function, self.position(0));
    }

    /// Unmaps a page from all address spaces. May sleep.
    pub(crate) fn unmap(&self, page: usize) {
        let pos = self.position(page * PAGE_SIZE);
        self.0.function.unmap(pos, PAGE_SIZE);
    }

    /// Handles a page fault at a page.
    ///
    /// # Safety
    ///
    /// Must be called in that page fault, which `vmf` describes, on an area made by
    /// `vfio_pci_core_mmap()` for this BAR.
    pub(crate) unsafe fn fault(
        &self,
        vmf: *mut bindings::vm_fault,
        page: usize,
    ) -> bindings::vm_fault_t {
        let inner = &*self.0;
        if page >= inner.pages {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        }
        // Held until the page is mapped, so that it is either both marked and writable, or neither.
        let mut mappings = inner.mappings.lock();
        // SAFETY: By the safety requirements.
        unsafe {
            mappings.fault(
                vmf,
                &inner.function,
                self.position(0),
                page,
                || inner.tracker.lock().is_active(),
                || self.changed(page * PAGE_SIZE, PAGE_SIZE),
            )
        }
    }

    /// Tracks the memory until the result is dropped, with all pages still to be streamed.
    ///
    /// Notifies `notifier` when a page is to be streamed and there was none before. Fails with
    /// `EBUSY` if the memory is tracked already. Does not sleep.
    pub fn track(&self, notifier: Arc<Notifier>) -> Result<BarTracking> {
        self.0.tracker.lock().begin(notifier)?;
        Ok(BarTracking(self.clone()))
    }
}

/// Adjacent pages of a [`BarMemory`] to stream, and their content.
pub struct BarRun {
    pages: Range<usize>,
    initial: bool,
    bytes: KVVec<u8>,
}

impl BarRun {
    /// Returns the page numbers.
    pub fn pages(&self) -> Range<usize> {
        self.pages.clone()
    }

    /// Returns whether the pages were never streamed before.
    pub fn is_initial(&self) -> bool {
        self.initial
    }

    /// Returns the content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the content, for [`Chunk::bytes`](crate::migration::Chunk::bytes).
    pub fn into_bytes(self) -> KVVec<u8> {
        self.bytes
    }
}

/// The tracking of a [`BarMemory`]. Dropping it ends the tracking and may sleep.
///
/// # Examples
///
/// ```
/// use vfio::pci::BarTracking;
///
/// /// The part of a saver that streams memory: a record for each page that has changed.
/// fn next(tracking: &BarTracking) -> Result<Next> {
///     let Some(run) = tracking.take(1)? else {
///         return Ok(Next::End);
///     };
///     let head = (run.pages().start as u64).to_le_bytes();
///     Ok(Next::Chunk(Chunk::new(&head)?.bytes(run.into_bytes())))
/// }
/// ```
pub struct BarTracking(BarMemory);

impl BarTracking {
    /// Takes the next run to stream, of at most `max` pages and at most 64. Pages that were never
    /// streamed come first. Returns [`None`] if no page is to be streamed. May sleep.
    ///
    /// Clears the marks of the pages, write-protects their mappings, and then reads them. They
    /// count as streamed, so the saver must return the content. If it fails, the pages are marked
    /// again. Fails with `ENOMEM`, or like [`Function::read`].
    pub fn take(&self, max: usize) -> Result<Option<BarRun>> {
        let memory = &self.0;
        // A reader must notice a reset even if nothing is left.
        memory.0.function.resets().not_reset()?;
        let max = max.clamp(1, MAX_RUN);
        // Held until the pages are write-protected, so that a store sets the mark of its page after
        // the mark was cleared.
        let mut mappings = memory.0.mappings.lock();
        let Some((run, initial)) = memory.0.tracker.lock().take(max) else {
            return Ok(None);
        };
        let pages = run.first..run.first + run.count;
        mappings.write_protect(&memory.0.function, memory.position(0), pages.clone());
        drop(mappings);
        let content = KVVec::zeroed(run.count * PAGE_SIZE, GFP_MAYFAIL)
            .map_err(Error::from)
            .and_then(|mut bytes| {
                // Page by page, because each access excludes others.
                for (page, bytes) in pages.clone().zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                    memory.read(page * PAGE_SIZE, bytes)?;
                }
                Ok(bytes)
            })
            .inspect_err(|_| {
                memory.0.tracker.lock().put_back(pages.clone(), initial);
            })?;
        Ok(Some(BarRun {
            pages,
            initial,
            bytes: content,
        }))
    }

    /// Returns the pages still to be streamed. The number of runs is exact as long as whole runs
    /// are taken. Does not sleep.
    pub fn pending(&self) -> Pending {
        self.0 .0.tracker.lock().pending()
    }
}

impl Drop for BarTracking {
    fn drop(&mut self) {
        let notifier = self.0 .0.tracker.lock().end();
        // Outside of the lock: this may be the last reference.
        drop(notifier);
    }
}
