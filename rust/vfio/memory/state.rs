// SPDX-License-Identifier: GPL-2.0

//! Device memory that is part of a device's state, and the tracking of what changes in it.

use super::{
    dirty_map::{
        self,
        DirtyMap,
        PAGES_PER_WORD, //
    },
    mapping::Mappings,
    Memory,
    GFP_MAYFAIL,
    WORD, //
};
use crate::{
    migration::{
        Notifier,
        Phase, //
    },
    user::cond_resched, //
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
    time::{
        delay::fsleep,
        Delta, //
    },
};

/// How many words [`StateMemory::clear()`] writes before it lets other tasks run: 1 MiB.
const CLEAR_WORDS: usize = (1 << 20) / WORD;

/// How many pages there are to stream, and in how many runs of neighbours within 64 pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Pages.
    pub pages: u64,
    /// Runs, each of at most 64 pages, none across a multiple of 64.
    pub runs: u64,
}

/// What there is to stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// What was never streamed.
    pub initial: Pages,
    /// What was streamed and has changed since.
    pub dirty: Pages,
    /// At most what was streamed and may have changed unnoticed, which is streamed again in
    /// [`Phase::StopCopy`]. Belongs to [`Remaining::tail`](crate::migration::Remaining::tail).
    pub held: Pages,
    /// How often all became initial again.
    pub reinits: u32,
}

/// What there is to stream, page by page.
///
/// It lives as long as the memory, so that a migration does not begin with allocations, and is of
/// interest while there is a `notifier`.
///
/// All pages from `initial` on were never streamed. They count as dirty in the map too, so that
/// nothing needs to be done when they are written to.
struct Tracker {
    map: DirtyMap<KVVec<u64>>,
    initial: usize,
    /// Where to look for changed pages next, so that a page that always changes does not keep
    /// others from being streamed. A multiple of 64, so that no run is cut.
    cursor: usize,
    /// What somebody could write to unnoticed when it was streamed: one bit for each page.
    held: KVVec<u64>,
    /// How many bits of `held` are set.
    held_count: u64,
    reinits: u32,
    notifier: Option<Arc<Notifier>>,
}

impl Tracker {
    fn new(pages: usize) -> Result<Self> {
        let leaf = KVVec::zeroed(dirty_map::leaf_words(pages), GFP_MAYFAIL)?;
        let summary = KVVec::zeroed(dirty_map::summary_words(pages), GFP_MAYFAIL)?;
        Ok(Self {
            map: DirtyMap::new(pages, leaf, summary).ok_or(EINVAL)?,
            initial: 0,
            cursor: 0,
            held: KVVec::zeroed(dirty_map::leaf_words(pages), GFP_MAYFAIL)?,
            held_count: 0,
            reinits: 0,
            notifier: None,
        })
    }

    /// Begins to track, with all pages initial.
    fn begin(&mut self, notifier: Arc<Notifier>) {
        self.release();
        self.map.mark_all();
        self.initial = 0;
        self.cursor = 0;
        self.reinits = 0;
        self.notifier = Some(notifier);
    }

    /// Holds those pages of `run` whose bits are set, and the others no more. Bit 0 is the first.
    fn hold(&mut self, run: &dirty_map::Run, pinned: u64) {
        if self.held_count == 0 && pinned == 0 {
            return;
        }
        // No run crosses a word.
        let shift = run.first % PAGES_PER_WORD;
        let mask = (u64::MAX >> (PAGES_PER_WORD - run.count)) << shift;
        if let Some(word) = self.held.get_mut(run.first / PAGES_PER_WORD) {
            let new = (*word & !mask) | (pinned << shift & mask);
            self.held_count += u64::from(new.count_ones());
            self.held_count -= u64::from(word.count_ones());
            *word = new;
        }
    }

    /// Marks what is held.
    fn release(&mut self) {
        if self.held_count == 0 {
            return;
        }
        for (index, word) in self.held.iter_mut().enumerate() {
            self.map.mark_word(index, core::mem::take(word));
        }
        self.held_count = 0;
    }

    fn take(&mut self, max: usize) -> Option<(dirty_map::Run, bool)> {
        let initial = self.initial < self.map.pages();
        let from = if initial { self.initial } else { self.cursor };
        let mut run = match self.map.take_run(from) {
            Some(run) => run,
            None => self.map.take_run(0)?,
        };
        if run.count > max {
            self.map.mark_range(run.first + max, run.count - max);
            run.count = max;
        }
        if initial {
            self.initial = run.first + run.count;
        } else {
            self.cursor = (run.first / PAGES_PER_WORD + 1) * PAGES_PER_WORD;
        }
        Some((run, initial))
    }

    /// Undoes [`take()`](Self::take).
    fn put_back(&mut self, pages: Range<usize>, initial: bool) {
        let Some(notifier) = &self.notifier else {
            return;
        };
        self.map.mark_range(pages.start, pages.len());
        // There is one boundary of what was never streamed. What is below it counts as changed.
        if initial && self.initial == pages.end {
            self.initial = pages.start;
        }
        notifier.notify();
    }

    fn pending(&self) -> Pending {
        let words = self.map.pages().div_ceil(PAGES_PER_WORD);
        let initial = Pages {
            pages: (self.map.pages() - self.initial) as u64,
            runs: words.saturating_sub(self.initial / PAGES_PER_WORD) as u64,
        };
        // A run that reaches across `initial` is one in the map and two to stream.
        let across = self.initial < self.map.pages()
            && self.initial % PAGES_PER_WORD != 0
            && self.map.is_dirty(self.initial - 1);
        let initial = if initial.pages == 0 {
            Pages::default()
        } else {
            initial
        };
        Pending {
            initial,
            dirty: Pages {
                pages: self.map.dirty() as u64 - initial.pages,
                runs: self.map.runs() as u64 + u64::from(across) - initial.runs,
            },
            held: Pages {
                pages: self.held_count,
                runs: self.held_count,
            },
            reinits: self.reinits,
        }
    }
}

#[pin_data]
pub(super) struct Inner {
    pub(super) memory: Arc<Memory>,
    /// Outside of `tracker`.
    #[pin]
    pub(super) mappings: Mutex<Mappings>,
    #[pin]
    tracker: SpinLock<Tracker>,
}

impl Inner {
    /// Tells whether it is of interest which pages change.
    pub(super) fn is_tracked(&self) -> bool {
        self.tracker.lock().notifier.is_some()
    }

    /// Marks the pages of a range, in bytes.
    pub(super) fn changed(&self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let first = range.start / PAGE_SIZE;
        let last = (range.end - 1) / PAGE_SIZE;
        let tracker = &mut *self.tracker.lock();
        if let Some(notifier) = &tracker.notifier {
            let fresh = tracker.map.mark_range(first, last - first + 1);
            // Only who waits at an empty stream needs to be told.
            if fresh > 0 && fresh == tracker.map.dirty() {
                notifier.notify();
            }
        }
    }
}

/// The memory of a device, as far as it is to be migrated.
///
/// While it is [tracked](StateMemory::track), each page is known to be as it was streamed or not.
/// Whoever changes the memory does so first and marks the pages then; who streams them clears the
/// mark first and reads then. So a page that is not marked is as it was streamed.
///
/// Clones stand for the same memory. All of them belong in the data of one open device, and of
/// those who work for it: kept longer, the memory would show its bytes to the next user, and two
/// devices cannot both map it or stop it. A driver must not write to it while the device is
/// stopped, except to load or to reset; the memory cannot tell, and does not check.
///
/// Users may map it, see [`Operations::mmap`](crate::emulated::Operations::mmap): their stores are
/// noticed as far as that is of interest, and dropped while the device is stopped.
///
/// # Context
///
/// Methods that do not sleep may be called with locks held, but not in interrupts, soft or hard, and
/// not with a lock held that an interrupt takes: they take a spinlock without disabling interrupts.
/// With `PREEMPT_RT` that lock sleeps. A timer that changes the memory does so in
/// [`Operations::work`](crate::emulated::Operations::work). [`read()`](Self::read) and
/// [`page()`](Self::page) take no lock.
///
/// # Examples
///
/// ```
/// use kernel::page::PAGE_SIZE;
///
/// /// Fills a page, and begins to track what is changed from then on.
/// fn begin(memory: &StateMemory, notifier: Arc<Notifier>) -> Result<Tracking> {
///     memory.write(PAGE_SIZE, &[0xff; PAGE_SIZE])?;
///     memory.track(notifier)
/// }
///
/// /// Tells how many bytes of pages are still to be streamed.
/// fn left(tracking: &Tracking) -> u64 {
///     let pending = tracking.pending();
///     (pending.initial.pages + pending.dirty.pages) * PAGE_SIZE as u64
/// }
/// ```
#[derive(Clone)]
pub struct StateMemory(pub(super) Arc<Inner>);

impl StateMemory {
    /// Allocates `pages` pages of zeroes, charged to the caller's memory cgroup.
    ///
    /// May sleep. Fails with `ENOMEM`, and with `EINVAL` if `pages` is zero or too many to count
    /// their bytes.
    pub fn new(pages: usize) -> Result<Self> {
        let memory = Arc::new(Memory::new(pages)?, GFP_KERNEL_ACCOUNT)?;
        let mappings = Mappings::new(pages)?;
        let tracker = Tracker::new(pages)?;
        Ok(Self(Arc::pin_init(
            pin_init!(Inner {
                memory,
                mappings <- new_mutex!(mappings, "vfio::memory::StateMemory::mappings"),
                tracker <- new_spinlock!(tracker, "vfio::memory::StateMemory"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?))
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.0.memory.size()
    }

    /// Returns the size in pages.
    pub fn pages(&self) -> usize {
        self.size() / PAGE_SIZE
    }

    /// Reads bytes. Does not sleep.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing is read then.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        self.0.memory.read(offset, to)
    }

    /// Returns what the words of a page hold, `N` at a time. What does not fill `N` at the end of
    /// the page is left out.
    pub fn page<const N: usize>(&self, page: usize) -> impl Iterator<Item = [u64; N]> + '_ {
        self.0.memory.page(page)
    }

    /// Writes bytes and marks their pages.
    ///
    /// Fails with `EINVAL` if the range is not inside the memory; nothing has changed then. Does
    /// not sleep.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result {
        self.0.memory.write(offset, from)?;
        self.changed(offset..offset + from.len());
        Ok(())
    }

    /// Writes words from the word `start` on, `N` at a time, as far as there are any and there is
    /// room for `N`, calls `written` with each `N`, and marks their pages. Does not sleep, unless
    /// `words` or `written` does.
    pub fn set_words<const N: usize>(
        &self,
        start: usize,
        words: impl Iterator<Item = [u64; N]>,
        written: impl FnMut([u64; N]),
    ) {
        let count = self.0.memory.set_words(start, words, written);
        if count > 0 {
            self.changed(start * WORD..(start + count) * WORD);
        }
    }

    /// Sets every byte to zero and marks all pages. May sleep.
    ///
    /// Other tasks run in between. A fatal signal does not end it: it is for a reset, and a device
    /// that is cleared in part is in no state that has a name.
    pub fn clear(&self) {
        let words = self.size() / WORD;
        for start in (0..words).step_by(CLEAR_WORDS) {
            let groups = (words - start).min(CLEAR_WORDS) / 8;
            self.set_words(start, core::iter::repeat_n([0; 8], groups), |_| ());
            cond_resched();
        }
    }

    /// Lets all pages count as never streamed, because the device has initialised itself anew.
    ///
    /// The user learns of it by `VFIO_PRECOPY_INFO_REINIT`. Does not sleep.
    pub fn reinit(&self) {
        let tracker = &mut *self.0.tracker.lock();
        if let Some(notifier) = &tracker.notifier {
            let empty = tracker.map.dirty() == 0;
            tracker.map.mark_all();
            tracker.initial = 0;
            tracker.reinits = tracker.reinits.wrapping_add(1);
            // Only a reader that waits at an empty stream needs to know.
            if empty {
                notifier.notify();
            }
        }
    }

    /// Drops what users store to the memory by mappings, from here on. May sleep.
    ///
    /// A page to which a store was dropped reads as anything by that mapping until
    /// [`thaw()`](Self::thaw). What the driver itself writes is not affected.
    ///
    /// Waits about 0.1 s while the kernel has references to pages that were mapped writable: it
    /// may write to them on behalf of a user. A reference that it took to read counts as well,
    /// because the reference count does not tell them apart. Fails with `EBUSY` if there is one
    /// after that, and with `EINTR` if the task was killed; no store was dropped then.
    pub(crate) fn freeze(&self) -> Result {
        let mut waits = 100;
        while !self.0.mappings.lock().freeze(&self.0.memory)? {
            if waits == 0 {
                return Err(EBUSY);
            }
            waits -= 1;
            fsleep(Delta::from_millis(1));
        }
        Ok(())
    }

    /// Lets accesses of users by mappings through, or lets them fail with `SIGBUS`. May sleep.
    pub(crate) fn enable(&self, enabled: bool) {
        self.0.mappings.lock().enable(enabled, self.pages());
    }

    /// Lets the stores of users through again. May sleep.
    pub(crate) fn thaw(&self) {
        self.0.mappings.lock().thaw(self.pages());
    }

    /// Lets the stores of users through again, because the device was reset. May sleep.
    pub(crate) fn reset(&self) {
        self.0.mappings.lock().reset(self.pages());
    }

    /// Returns to how many pages stores by mappings were dropped since the last reset, because the
    /// device was stopped. May sleep.
    ///
    /// A page counts once each time that the device stops. If stores to it come by several
    /// mappings, it counts whenever they come by another one than before.
    pub fn dropped(&self) -> u64 {
        self.0.mappings.lock().dropped()
    }

    /// Returns the bytes in a range. Who writes to them marks their pages afterwards.
    pub(crate) fn bytes(&self, range: Range<usize>) -> *const [u8] {
        self.0.memory.bytes(range)
    }

    /// Marks the pages of a range, in bytes. Does not sleep.
    pub(crate) fn changed(&self, range: Range<usize>) {
        self.0.changed(range);
    }

    /// Begins to track, with all pages still to be streamed, until the result is dropped.
    ///
    /// `notifier` is told when there is something to stream again after there was nothing. Fails
    /// with `EBUSY` if the memory is tracked already. Does not sleep.
    pub fn track(&self, notifier: Arc<Notifier>) -> Result<Tracking> {
        let mut tracker = self.0.tracker.lock();
        if tracker.notifier.is_some() {
            return Err(EBUSY);
        }
        tracker.begin(notifier);
        Ok(Tracking(self.clone()))
    }
}

/// Pages to stream: neighbours in a [`StateMemory`], whose marks have been cleared.
///
/// Goes into a [`Chunk`](crate::migration::Chunk), which takes the bytes from the memory when the
/// user reads them. A change of the memory before that marks it again. If the run, or its chunk, is
/// dropped before [`Saver::next`](crate::migration::Saver::next) has returned it, the pages are
/// marked again as well.
pub struct PageRun {
    inner: Arc<Inner>,
    pages: Range<usize>,
    initial: bool,
    /// A reader gets the pages, so that they count as streamed.
    handed_out: bool,
}

impl PageRun {
    /// Returns which pages these are.
    pub fn pages(&self) -> Range<usize> {
        self.pages.clone()
    }

    /// Tells whether they were never streamed before.
    pub fn is_initial(&self) -> bool {
        self.initial
    }

    /// Returns the memory that the pages are part of.
    pub(crate) fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    /// Returns where in the memory the pages are, in bytes.
    pub(crate) fn bytes(&self) -> Range<usize> {
        self.pages.start * PAGE_SIZE..self.pages.end * PAGE_SIZE
    }

    /// Notes that a reader gets the pages.
    pub(crate) fn hand_out(&mut self) {
        self.handed_out = true;
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        if !self.handed_out {
            let mut tracker = self.inner.tracker.lock();
            tracker.put_back(self.pages(), self.initial);
        }
    }
}

/// That a [`StateMemory`] is tracked. Dropping it ends the tracking; may sleep.
pub struct Tracking(StateMemory);

impl Tracking {
    /// Takes the next run to stream, of at most `max` pages. What was never streamed comes first.
    ///
    /// The pages' marks are cleared: they count as streamed, unless the result is dropped before a
    /// reader got it. A page that somebody may write to unnoticed, because the kernel is just doing
    /// that on behalf of a user, comes again in [`Phase::StopCopy`]. Returns nothing if there is
    /// nothing to stream. May sleep.
    pub fn take(&self, max: usize) -> Option<PageRun> {
        let inner = &self.0 .0;
        // Held until the pages are out of all address spaces, so that a store sets its page's mark
        // after that mark was cleared.
        let mut mappings = inner.mappings.lock();
        let mut tracker = inner.tracker.lock();
        let phase = tracker.notifier.as_ref()?.phase();
        if phase == Phase::StopCopy {
            tracker.release();
        }
        let (run, initial) = tracker.take(max.clamp(1, PAGES_PER_WORD))?;
        drop(tracker);
        let pages = run.first..run.first + run.count;
        let pinned = mappings.write_protect(&inner.memory, pages.clone());
        if phase == Phase::PreCopy {
            inner.tracker.lock().hold(&run, pinned);
        }
        drop(mappings);
        Some(PageRun {
            inner: inner.clone(),
            pages,
            initial,
            handed_out: false,
        })
    }

    /// Returns what there is to stream. The number of runs is exact as long as whole runs are
    /// taken. Does not sleep.
    pub fn pending(&self) -> Pending {
        self.0 .0.tracker.lock().pending()
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        let notifier = self.0 .0.tracker.lock().notifier.take();
        // Outside of the lock, because the notifier may go.
        drop(notifier);
    }
}
