// SPDX-License-Identifier: GPL-2.0

//! Device memory that is part of a device's state, and the tracking of its changes.

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
    notifier::{
        Notifier,
        Phase, //
    },
    user::cond_resched, //
};
use core::{
    mem::take,
    ops::Range, //
};
use kernel::{
    iov::IovIterDest,
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

/// Number of words that [`StateMemory::clear()`] writes before it lets other tasks run: 1 MiB.
const CLEAR_WORDS: usize = (1 << 20) / WORD;

/// Number of words of the map that are changed before the tracker's lock is released for a moment:
/// those of 16 MiB with pages of 4 KiB.
const LOCKED_WORDS: usize = 64;

/// A number of pages to stream, and the number of their runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Number of pages.
    pub pages: u64,
    /// Number of runs of adjacent pages. No run crosses a multiple of 64.
    pub runs: u64,
}

/// The pages that are still to be streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Pages that were never streamed.
    pub initial: Pages,
    /// Pages that were streamed and have changed since.
    pub dirty: Pages,
    /// Upper bound of the pages that were streamed and may have changed unnoticed. These are
    /// streamed again in [`Phase::StopCopy`]. Part of
    /// [`Remaining::tail`](crate::migration::Remaining::tail).
    pub held: Pages,
    /// Number of times that all pages became initial again.
    pub reinits: u32,
}

/// Tracking of the pages that are still to be streamed.
///
/// It lives as long as the memory, so that a migration does not begin with allocations. It is
/// active while there is a `notifier`.
///
/// The pages from `initial` on were never streamed. They are dirty in the map too, so that writes
/// to them need no action.
pub(crate) struct Tracker {
    map: DirtyMap<KVVec<u64>>,
    initial: usize,
    /// Start of the next search for changed pages, so that pages that always change do not starve
    /// the others. A multiple of 64, so that no run is cut.
    cursor: usize,
    /// Pages that the kernel could write to unnoticed when they were streamed: one bit for each
    /// page. None while it is not active.
    held: KVVec<u64>,
    /// Number of bits set in `held`.
    held_count: u64,
    reinits: u32,
    notifier: Option<Arc<Notifier>>,
}

impl Tracker {
    /// Creates a tracker of `pages` pages that is not active. May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(pages: usize) -> Result<Self> {
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

    /// Starts tracking, with all pages initial.
    ///
    /// Fails with `EBUSY` if it is active.
    pub(crate) fn begin(&mut self, notifier: Arc<Notifier>) -> Result {
        if self.is_active() {
            return Err(EBUSY);
        }
        self.notifier = Some(notifier);
        self.cursor = 0;
        self.reinits = 0;
        self.mark_all();
        Ok(())
    }

    /// Makes all pages initial again if it is active.
    fn reinit(&mut self) {
        if !self.is_active() {
            return;
        }
        self.reinits = self.reinits.wrapping_add(1);
        let fresh = self.mark_all();
        // Only a reader at the end of the stream waits.
        if let Some(notifier) = self.notifier.as_ref().filter(|_| fresh == self.map.dirty()) {
            notifier.notify();
        }
    }

    /// Makes all pages initial, and returns the number of pages that became dirty. It takes the
    /// same time for any number of pages.
    fn mark_all(&mut self) -> usize {
        self.initial = 0;
        self.map.mark_all()
    }

    /// Returns whether it is active.
    pub(crate) fn is_active(&self) -> bool {
        self.notifier.is_some()
    }

    /// Ends tracking. The result should be dropped without the tracker's lock: it may be the last
    /// reference.
    pub(crate) fn end(&mut self) -> Option<Arc<Notifier>> {
        self.notifier.take()
    }

    /// Marks the pages of a range, in bytes, which must not be empty.
    pub(crate) fn changed(&mut self, range: Range<usize>) {
        let first = range.start / PAGE_SIZE;
        let last = (range.end - 1) / PAGE_SIZE;
        if let Some(notifier) = &self.notifier {
            let fresh = self.map.mark_range(first, last - first + 1);
            // Only a reader at the end of the stream waits.
            if fresh > 0 && fresh == self.map.dirty() {
                notifier.notify();
            }
        }
    }

    /// Replaces the held pages in `run` by those whose bits are set in `pinned`. Bit 0 is the first
    /// page of `run`.
    fn hold(&mut self, run: &dirty_map::Run, pinned: u64) {
        if self.held_count == 0 && pinned == 0 {
            return;
        }
        // No run crosses a word.
        let shift = run.first % PAGES_PER_WORD;
        let mask = dirty_map::word_mask(shift, run.count);
        if let Some(word) = self.held.get_mut(run.first / PAGES_PER_WORD) {
            let new = (*word & !mask) | (pinned << shift & mask);
            self.held_count += u64::from(new.count_ones());
            self.held_count -= u64::from(word.count_ones());
            *word = new;
        }
    }

    /// Marks the held pages in the next [`LOCKED_WORDS`] words from `from` on, and returns the
    /// start of the others, if any.
    fn release(&mut self, from: usize) -> Option<usize> {
        if self.held_count == 0 {
            return None;
        }
        let words = self.held.iter_mut().enumerate();
        for (index, word) in words.skip(from).take(LOCKED_WORDS) {
            if *word != 0 {
                self.held_count -= u64::from(word.count_ones());
                self.map.mark_word(index, take(word));
            }
        }
        let next = from + LOCKED_WORDS;
        (next < self.held.len()).then_some(next)
    }

    /// Takes the next run of at most `max` pages to stream, and returns whether it was never
    /// streamed. Pages that were never streamed come first.
    pub(crate) fn take(&mut self, max: usize) -> Option<(dirty_map::Run, bool)> {
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
    pub(crate) fn put_back(&mut self, pages: Range<usize>, initial: bool) {
        let Some(notifier) = &self.notifier else {
            return;
        };
        self.map.mark_range(pages.start, pages.len());
        // Pages below `initial` count as changed.
        if initial && self.initial == pages.end {
            self.initial = pages.start;
        }
        notifier.notify();
    }

    /// Returns the pages still to be streamed.
    pub(crate) fn pending(&self) -> Pending {
        let words = self.map.pages().div_ceil(PAGES_PER_WORD);
        let initial = Pages {
            pages: (self.map.pages() - self.initial) as u64,
            runs: words.saturating_sub(self.initial / PAGES_PER_WORD) as u64,
        };
        // A run across `initial` is one run in the map, but two to stream.
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
    /// Returns whether the memory is tracked.
    pub(super) fn is_tracked(&self) -> bool {
        self.tracker.lock().is_active()
    }

    /// Marks the pages of a range, in bytes.
    pub(super) fn changed(&self, range: Range<usize>) {
        const STEP: usize = LOCKED_WORDS * PAGES_PER_WORD * PAGE_SIZE;

        for start in range.clone().step_by(STEP) {
            let end = range.end.min(start.saturating_add(STEP));
            self.tracker.lock().changed(start..end);
        }
    }
}

/// Memory of a device that is part of its migrated state.
///
/// While it is [tracked](StateMemory::track), pages that have changed since they were streamed are
/// marked. Writers change the memory first, and mark the pages then. The saver clears the mark
/// first, and reads the page then. So a page without a mark is unchanged since it was streamed.
///
/// Clones refer to the same memory. Keep all of them in the data of one open device: kept longer,
/// the memory would show its content to the next user, and two devices cannot both map or stop it.
/// A driver must not write to it while the device is stopped, except to load or to reset. This is
/// not checked.
///
/// Users may map it, see [`Operations::mmap`](crate::emulated::Operations::mmap). Their stores are
/// tracked too, and dropped while the device is stopped.
///
/// # Context
///
/// Methods that do not sleep may be called with locks held, but not in interrupts, soft or hard,
/// and not with a lock held that an interrupt takes: they take a spinlock without disabling
/// interrupts. With `PREEMPT_RT` that lock sleeps. A timer must leave changes of the memory to
/// [`Operations::work`](crate::emulated::Operations::work). [`read()`](Self::read) and
/// [`page()`](Self::page) take no lock.
///
/// # Examples
///
/// ```
/// use kernel::page::PAGE_SIZE;
///
/// /// Fills a page, and tracks changes from then on.
/// fn begin(memory: &StateMemory, notifier: Arc<Notifier>) -> Result<Tracking> {
///     memory.write(PAGE_SIZE, &[0xff; PAGE_SIZE])?;
///     memory.track(notifier)
/// }
///
/// /// Returns the size in bytes of the pages still to be streamed.
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
    /// Fails with `EINVAL`, and reads nothing, if the range is not inside the memory.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        self.0.memory.read(offset, to)
    }

    /// Returns the words of a page, `N` at a time. An incomplete group at the end of the page is
    /// omitted. Prefetches the next pages, for callers that read one after the other.
    pub fn page<const N: usize>(&self, page: usize) -> impl Iterator<Item = [u64; N]> + '_ {
        self.0.memory.page(page)
    }

    /// Writes bytes and marks their pages.
    ///
    /// Fails with `EINVAL`, and changes nothing, if the range is not inside the memory. Does not
    /// sleep.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result {
        self.0.memory.write(offset, from)?;
        self.changed(offset..offset + from.len());
        Ok(())
    }

    /// Writes words from the word `start` on, `N` at a time, until `words` ends or fewer than `N`
    /// words fit. Calls `written` with each `N`, and marks their pages. Does not sleep, unless
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
    /// Reschedules if needed. A fatal signal does not end it: it is for a reset, and a partly
    /// cleared device would be in an undefined state.
    pub fn clear(&self) {
        let words = self.size() / WORD;
        for start in (0..words).step_by(CLEAR_WORDS) {
            let groups = (words - start).min(CLEAR_WORDS) / 8;
            self.set_words(start, core::iter::repeat_n([0; 8], groups), |_| ());
            cond_resched();
        }
    }

    /// Marks pages as changed although they are not, like a device that writes the same bytes
    /// again. Pages outside of the memory are ignored. Does not sleep.
    pub fn mark(&self, pages: Range<usize>) {
        let end = pages.end.min(self.pages());
        if pages.start < end {
            self.changed(pages.start * PAGE_SIZE..end * PAGE_SIZE);
        }
    }

    /// Marks all pages as never streamed, because the device has re-initialised itself.
    ///
    /// Reported to the user by `VFIO_PRECOPY_INFO_REINIT`. Does not sleep.
    pub fn reinit(&self) {
        self.0.tracker.lock().reinit();
    }

    /// Drops stores of users through mappings from now on. May sleep.
    ///
    /// Through that mapping, a page with a dropped store has undefined content until
    /// [`thaw()`](Self::thaw). Writes of the driver are not affected.
    ///
    /// Waits about 0.1 s while the kernel has references to pages that were mapped writable: it may
    /// write to them on behalf of a user. References for reading count too, because the reference
    /// count does not distinguish them. Fails with `EBUSY` if a reference is left after that, and
    /// with `EINTR` if the task was killed; no store was dropped then.
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

    /// Sets whether users may access mappings. If not, accesses raise `SIGBUS`. May sleep.
    pub(crate) fn enable(&self, enabled: bool) {
        self.0.mappings.lock().enable(enabled, self.pages());
    }

    /// Makes accesses of users raise `SIGBUS` until the next reset, because the device failed. May
    /// sleep.
    pub(crate) fn fail(&self) {
        self.0.mappings.lock().fail(self.pages());
    }

    /// Enables stores of users again. May sleep.
    pub(crate) fn thaw(&self) {
        self.0.mappings.lock().thaw(self.pages());
    }

    /// Ends the effects of [`freeze()`](Self::freeze) and [`fail()`](Self::fail) after a reset, and
    /// clears the count of dropped stores. May sleep.
    pub(crate) fn reset(&self) {
        self.0.mappings.lock().reset(self.pages());
    }

    /// Returns the number of pages with stores by mappings dropped since the last reset, because
    /// the device was stopped. May sleep.
    ///
    /// A page counts once for each time that the device stops. With several mappings, it counts
    /// again each time that the stores come by a different mapping than before.
    pub fn dropped(&self) -> u64 {
        self.0.mappings.lock().dropped()
    }

    /// Returns the bytes in a range. The caller must mark the pages after writing to them.
    pub(crate) fn bytes(&self, range: Range<usize>) -> *const [u8] {
        self.0.memory.bytes(range)
    }

    /// Marks the pages of a range, in bytes. Does not sleep.
    pub(crate) fn changed(&self, range: Range<usize>) {
        self.0.changed(range);
    }

    /// Tracks the memory until the result is dropped, with all pages still to be streamed.
    ///
    /// Notifies `notifier` when a page is to be streamed and there was none before. Fails with
    /// `EBUSY` if the memory is tracked already. Does not sleep.
    pub fn track(&self, notifier: Arc<Notifier>) -> Result<Tracking> {
        self.0.tracker.lock().begin(notifier)?;
        Ok(Tracking(self.clone()))
    }
}

/// Room for the digests of the pages of a [`PageRun`].
///
/// A saver allocates it once, because a read() that fails for lack of memory would have to be
/// repeated.
pub struct PageDigests {
    of: fn(&StateMemory, usize) -> u64,
    /// The first `count` are known.
    values: KBox<[u64; PAGES_PER_WORD]>,
    count: usize,
}

impl PageDigests {
    /// Allocates room for digests that `digest` computes from a page. It must not sleep.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub fn new(digest: fn(&StateMemory, usize) -> u64) -> Result<Self> {
        Ok(Self {
            of: digest,
            values: KBox::new([0; PAGES_PER_WORD], GFP_KERNEL_ACCOUNT)?,
            count: 0,
        })
    }
}

/// Adjacent pages of a [`StateMemory`] to stream, whose marks have been cleared.
///
/// Becomes part of a [`Chunk`](crate::migration::Chunk), which reads the memory when the user reads
/// the stream. A change before that marks the page again. If the run, or its chunk, is dropped
/// before [`Saver::next`](crate::migration::Saver::next) has returned it, the pages are marked
/// again, too.
pub struct PageRun {
    memory: StateMemory,
    pages: Range<usize>,
    initial: bool,
    /// A reader gets the pages, so they count as streamed.
    handed_out: bool,
    digests: Option<PageDigests>,
}

impl PageRun {
    /// Returns the page numbers.
    pub fn pages(&self) -> Range<usize> {
        self.pages.clone()
    }

    /// Returns whether the pages were never streamed before.
    pub fn is_initial(&self) -> bool {
        self.initial
    }

    /// Lets a read() compute the digest of each page right before it copies the page.
    ///
    /// The copy then finds the page in the first-level cache. The digest of a page may differ from
    /// that of the copied bytes, if the page changes meanwhile. Then the page is marked again.
    /// [`Saver::read`](crate::migration::Saver::read) gets the digests.
    pub fn with_digests(mut self, digests: PageDigests) -> Self {
        self.digests = Some(PageDigests {
            count: 0,
            ..digests
        });
        self
    }

    /// Takes the room for digests back.
    pub fn take_digests(&mut self) -> Option<PageDigests> {
        self.digests.take()
    }

    /// Returns the numbers and the digests of the pages that were read.
    pub fn digests(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let digests = self.digests.as_ref();
        let known = digests.and_then(|digests| digests.values.get(..digests.count));
        self.pages().zip(known.unwrap_or(&[]).iter().copied())
    }

    /// Returns the size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.pages.len() * PAGE_SIZE
    }

    /// Records that a reader gets the pages.
    pub(crate) fn hand_out(&mut self) {
        self.handed_out = true;
    }

    /// Copies the bytes from `pos` on to the user, and returns the number of bytes copied.
    ///
    /// May sleep and may fault.
    pub(crate) fn copy_to(&mut self, pos: usize, user: &mut IovIterDest<'_>) -> usize {
        let memory = &self.memory.0.memory;
        let end = self.pages.end * PAGE_SIZE;
        let mut at = self
            .pages
            .start
            .saturating_mul(PAGE_SIZE)
            .saturating_add(pos);
        let Some(digests) = &mut self.digests else {
            return memory.copy_to_iter(at..end, user);
        };
        let start = at;
        while at < end && !user.is_empty() {
            let page = at / PAGE_SIZE;
            // Once for each page: a read() may have copied a part of it.
            if page - self.pages.start == digests.count {
                if let Some(value) = digests.values.get_mut(digests.count) {
                    *value = (digests.of)(&self.memory, page);
                }
                digests.count += 1;
            }
            let next = (page + 1) * PAGE_SIZE;
            at += memory.copy_to_iter(at..next, user);
            if at < next {
                break;
            }
        }
        at - start
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        if !self.handed_out {
            let mut tracker = self.memory.0.tracker.lock();
            tracker.put_back(self.pages(), self.initial);
        }
    }
}

/// The tracking of a [`StateMemory`]. Dropping it ends the tracking and may sleep.
pub struct Tracking(StateMemory);

impl Tracking {
    /// Takes the next run to stream, of at most `max` pages. Pages that were never streamed come
    /// first.
    ///
    /// Clears the marks of the pages: they count as streamed, unless the result is dropped before a
    /// reader got it. A page that the kernel may be writing to unnoticed on behalf of a user is
    /// streamed again in [`Phase::StopCopy`]. Returns [`None`] if no page is to be streamed. May
    /// sleep.
    pub fn take(&self, max: usize) -> Option<PageRun> {
        let inner = &self.0 .0;
        // Held until the pages are write-protected, so that a store sets the mark of its page after
        // the mark was cleared.
        let mut mappings = inner.mappings.lock();
        let mut tracker = inner.tracker.lock();
        let phase = tracker.notifier.as_ref()?.phase();
        if phase == Phase::StopCopy {
            // The mutex is held, so no page becomes held meanwhile.
            let mut next = tracker.release(0);
            while let Some(from) = next {
                drop(tracker);
                cond_resched();
                tracker = inner.tracker.lock();
                next = tracker.release(from);
            }
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
            memory: self.0.clone(),
            pages,
            initial,
            handed_out: false,
            digests: None,
        })
    }

    /// Returns the pages still to be streamed. The number of runs is exact as long as whole runs
    /// are taken. Does not sleep.
    pub fn pending(&self) -> Pending {
        self.0 .0.tracker.lock().pending()
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        let tracker = &self.0 .0.tracker;
        // The next session begins without held pages.
        let mut next = Some(0);
        while let Some(from) = next {
            next = tracker.lock().release(from);
            cond_resched();
        }
        let notifier = tracker.lock().end();
        // Outside of the lock: this may be the last reference.
        drop(notifier);
    }
}
