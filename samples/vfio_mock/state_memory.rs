// SPDX-License-Identifier: GPL-2.0

//! The state memory, and the tracking of what changes in it.

use crate::{
    dirty_map::{
        self,
        DirtyMap,
        Run,
        PAGES_PER_WORD, //
    },
    stream::{
        page_digest,
        pattern_word,
        run_records,
        words,
        Digest,
        PAGE_SIZE, //
    },
};
use core::ops::Range;
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc,
        SpinLock, //
    },
};
use vfio::{
    memory::Memory,
    migration::{
        Notifier,
        Remaining, //
    },
};

/// Bytes in a word.
const WORD: usize = size_of::<u64>();

/// Bytes on the stack that a command works with at once.
const BLOCK: usize = 256;

/// What there is to stream.
///
/// All pages from `initial` on were never streamed. They count as dirty in the map too, so that
/// nothing needs to be done when they are written to.
struct Tracker {
    map: DirtyMap<KVVec<u64>>,
    /// The first page that was never streamed. A multiple of 64, or the number of pages.
    initial: usize,
    /// How often the device has re-initialised itself.
    reinits: u32,
    notifier: Arc<Notifier>,
}

impl Tracker {
    /// Takes the next run to stream, and tells whether it was never streamed.
    fn take(&mut self) -> Option<(Run, bool)> {
        if self.initial < self.map.pages() {
            let run = self.map.take_run(self.initial)?;
            self.initial = run.first + run.count;
            return Some((run, true));
        }
        Some((self.map.take_run(0)?, false))
    }

    /// Returns how much there is to stream.
    fn remaining(&self) -> Remaining {
        let pages = self.map.pages() - self.initial;
        let runs = pages.div_ceil(PAGES_PER_WORD);
        Remaining {
            initial: run_records(runs as u64, pages as u64),
            dirty: run_records(
                (self.map.runs() - runs) as u64,
                (self.map.dirty() - pages) as u64,
            ),
            tail: 0,
            reinits: self.reinits,
        }
    }
}

/// The state memory of a mock device.
///
/// While a saver exists it is tracked by page what has changed since it was streamed. Whoever
/// changes the memory does so first and marks the page then; the saver clears the mark first and
/// reads the page then. So a page that is not marked is what was streamed.
#[pin_data]
pub(crate) struct StateMemory {
    memory: Arc<Memory>,
    #[pin]
    tracker: SpinLock<Option<Tracker>>,
}

impl StateMemory {
    /// Makes a memory of `pages` pages of zeroes.
    pub(crate) fn new(pages: usize) -> Result<impl PinInit<Self>> {
        let memory = Arc::new(Memory::new(pages)?, GFP_KERNEL_ACCOUNT)?;
        Ok(pin_init!(Self {
            memory,
            tracker <- new_spinlock!(None, "vfio_mock::StateMemory::tracker"),
        }))
    }

    /// Returns the size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.memory.size()
    }

    /// Returns the size in pages.
    pub(crate) fn pages(&self) -> usize {
        self.size() / PAGE_SIZE
    }

    /// Returns the memory for the stream to be read from.
    pub(crate) fn shared(&self) -> Arc<Memory> {
        self.memory.clone()
    }

    /// Reads bytes.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        self.memory.read(offset, to)
    }

    /// Writes bytes.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result {
        self.memory.write(offset, from)?;
        self.changed(offset..offset + from.len());
        Ok(())
    }

    /// Fills a range with the pattern of `seed`.
    pub(crate) fn fill(&self, seed: u64, range: Range<usize>) {
        self.write_pattern(seed, range.clone());
        self.changed(range);
    }

    /// Fills all of the memory with the pattern of `seed`, as a device does that begins anew.
    pub(crate) fn reinit(&self, seed: u64) {
        self.write_pattern(seed, 0..self.size());
        if let Some(tracker) = &mut *self.tracker.lock() {
            tracker.map.mark_all();
            tracker.initial = 0;
            tracker.reinits = tracker.reinits.wrapping_add(1);
            tracker.notifier.notify();
        }
    }

    /// Sets all of the memory to zero. Nobody saves at that time.
    pub(crate) fn clear(&self) {
        self.memory.clear();
    }

    /// Writes a pattern, of which a range need not begin or end with a word.
    fn write_pattern(&self, seed: u64, range: Range<usize>) {
        let whole = range.start.div_ceil(WORD)..range.end / WORD;
        let edges = [
            range.start..range.end.min(whole.start * WORD),
            range.start.max(whole.end * WORD)..range.end,
        ];
        for (index, word) in (whole.start as u64..).zip(self.memory.words(whole)) {
            word.store(pattern_word(seed, index).to_le(), Relaxed);
        }
        for at in edges.into_iter().flatten() {
            let bytes = pattern_word(seed, (at / WORD) as u64).to_le_bytes();
            if let Some(byte) = bytes.get(at % WORD..=at % WORD) {
                // The range is inside the memory, as its caller has checked.
                let _ = self.memory.write(at, byte);
            }
        }
    }

    /// Returns the checksum of a range.
    pub(crate) fn checksum(&self, range: Range<usize>) -> u64 {
        let mut digest = Digest::new(range.len() as u64);
        let mut block = [0; BLOCK];
        for start in range.clone().step_by(BLOCK) {
            let len = BLOCK.min(range.end - start);
            let Some(part) = block.get_mut(..len) else {
                break;
            };
            if self.memory.read(start, part).is_err() {
                break;
            }
            words(part).for_each(|word| digest.add(word));
        }
        digest.value()
    }

    /// Marks the pages of a range that was written to.
    fn changed(&self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let first = range.start / PAGE_SIZE;
        let last = (range.end - 1) / PAGE_SIZE;
        if let Some(tracker) = &mut *self.tracker.lock() {
            let fresh = tracker.map.mark_range(first, last - first + 1);
            // Only who waits at an empty stream needs to be told.
            if fresh > 0 && fresh == tracker.map.dirty() {
                tracker.notifier.notify();
            }
        }
    }

    /// Begins to track, with all pages still to be streamed.
    pub(crate) fn track(&self, notifier: Arc<Notifier>) -> Result {
        let pages = self.pages();
        let leaf = KVVec::zeroed(dirty_map::leaf_words(pages), GFP_KERNEL_ACCOUNT)?;
        let summary = KVVec::zeroed(dirty_map::summary_words(pages), GFP_KERNEL_ACCOUNT)?;
        let mut map = DirtyMap::new(pages, leaf, summary).ok_or(EINVAL)?;
        map.mark_all();
        *self.tracker.lock() = Some(Tracker {
            map,
            initial: 0,
            reinits: 0,
            notifier,
        });
        Ok(())
    }

    /// Ends tracking.
    pub(crate) fn untrack(&self) {
        let tracker = self.tracker.lock().take();
        // Outside of the lock, because the memory is given back.
        drop(tracker);
    }

    /// Takes the next run to stream, and tells whether it was never streamed.
    pub(crate) fn take(&self) -> Option<(Run, bool)> {
        (*self.tracker.lock()).as_mut().and_then(Tracker::take)
    }

    /// Returns how much there is to stream.
    pub(crate) fn remaining(&self) -> Remaining {
        self.tracker
            .lock()
            .as_ref()
            .map_or(Remaining::default(), Tracker::remaining)
    }

    /// Returns the digest of a page.
    pub(crate) fn page_digest(&self, page: usize) -> u64 {
        let words = self.memory.page(page).iter();
        page_digest(
            page as u64,
            words.map(|word| u64::from_le(word.load(Relaxed))),
        )
    }

    /// Writes bytes that are loaded. Nobody saves at that time.
    pub(crate) fn load(&self, offset: usize, from: &[u8]) -> Result {
        self.memory.write(offset, from)
    }
}
