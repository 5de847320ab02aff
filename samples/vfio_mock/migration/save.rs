// SPDX-License-Identifier: GPL-2.0

//! Turns the device state into a stream.

use crate::{
    chip::{
        page_digest,
        Chip,
        SNAPSHOT_SIZE, //
    },
    knobs::{
        pace::{
            Timer,
            Waits, //
        },
        rules::Event, //
    },
    migration::stream::{
        registers_digest,
        registers_header,
        registers_record,
        run_header,
        run_records,
        Digests,
        Identity,
        Tally,
        Trailer,
        IDENTITY_RECORD,
        RUN_PAGES,
        TRAILER_RECORD, //
    },
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};
use vfio::{
    memory::{
        dirty_map::PAGES_PER_WORD,
        PageDigests,
        PageRun,
        Pages,
        Tracking,
        GFP_MAYFAIL, //
    },
    migration::{
        Chunk,
        Next,
        Notifier,
        Phase,
        Remaining,
        Saver, //
    },
};

// A run of pages from the crate fits into one record.
static_assert!(PAGES_PER_WORD as u64 == RUN_PAGES);

/// Size in bytes of the end of a stream.
const TAIL: u64 = registers_record(SNAPSHOT_SIZE) + TRAILER_RECORD;

/// Returns the size of a stream that has each of `pages` pages once.
pub(crate) fn image_size(pages: usize) -> Remaining {
    let runs = pages.div_ceil(PAGES_PER_WORD);
    Remaining {
        initial: IDENTITY_RECORD + run_records::<PAGE_SIZE>(runs as u64, pages as u64),
        tail: TAIL,
        ..Remaining::default()
    }
}

/// The next record.
enum Step {
    Identity,
    Pages,
    Registers,
    Trailer { registers_digest: u64 },
    End,
}

/// Saves a device as records of a stream.
///
/// The first record is the identity. All pages follow, and then the pages that have changed. The
/// registers and the trailer follow when the device is stopped.
pub(crate) struct MockSaver {
    chip: Arc<Chip>,
    /// Dirty tracking of the state memory.
    tracking: Tracking,
    notifier: Arc<Notifier>,
    waits: Waits,
    /// At the temporary end, expires when the load dirties the next page.
    next_page: Option<Timer>,
    identity: Identity<PAGE_SIZE>,
    step: Step,
    digests: Digests<KVVec<u64>>,
    /// Except while a run of pages has it.
    page_digests: Option<PageDigests>,
    tally: Tally,
}

impl MockSaver {
    /// Creates a saver and starts dirty tracking.
    pub(crate) fn new(chip: Arc<Chip>, notifier: Arc<Notifier>) -> Result<Self> {
        let digests = Digests::new(KVVec::zeroed(chip.memory.pages(), GFP_MAYFAIL)?);
        let identity = chip.identity();
        let tracking = chip.memory.track(notifier.clone())?;
        Ok(Self {
            waits: Waits::new(chip.knobs.saving.clone(), notifier.clone())?,
            next_page: None,
            notifier,
            chip,
            tracking,
            identity,
            step: Step::Identity,
            digests,
            page_digests: Some(PageDigests::new(page_digest)?),
            tally: Tally::default(),
        })
    }

    /// The same, of a device that goes on dirtying pages.
    pub(crate) fn pre_copy(chip: Arc<Chip>, notifier: Arc<Notifier>) -> Result<Self> {
        let this = Self::new(chip, notifier.clone())?;
        this.chip.knobs.load.begin(notifier);
        Ok(this)
    }

    /// Returns whether a record is pending.
    fn is_pending(&self, phase: Phase) -> bool {
        match self.step {
            Step::Pages if phase == Phase::PreCopy => {
                let pending = self.tracking.pending();
                pending.initial.pages + pending.dirty.pages > 0
            }
            Step::End => false,
            _ => true,
        }
    }

    /// Returns the record of a run of pages. Their dirty marks are cleared already.
    fn pages(&mut self, run: PageRun) -> Result<Chunk> {
        let run = match self.page_digests.take() {
            Some(digests) => run.with_digests(digests),
            None => run.with_digests(PageDigests::new(page_digest)?),
        };
        let pages = run.pages();
        let (start, count) = ((pages.start * PAGE_SIZE) as u64, pages.len() as u64);
        let chunk = Chunk::new(&run_header::<PAGE_SIZE>(start, count))?.pages(run);
        self.tally.run::<PAGE_SIZE>(count);
        Ok(chunk)
    }

    /// Returns the next record.
    fn record(&mut self, phase: Phase) -> Result<Next> {
        let chunk = match self.step {
            Step::Identity => {
                let chunk = Chunk::new(&self.identity.record())?.initial();
                self.tally.record(IDENTITY_RECORD);
                self.step = Step::Pages;
                chunk
            }
            Step::Pages => match self.tracking.take(PAGES_PER_WORD) {
                Some(run) => self.pages(run)?,
                None if phase == Phase::PreCopy => return Ok(Next::End),
                None => {
                    self.step = Step::Registers;
                    return self.record(phase);
                }
            },
            Step::Registers => {
                let registers = self.chip.snapshot()?;
                let registers_digest = registers_digest(&registers);
                let chunk = Chunk::new(&registers_header(SNAPSHOT_SIZE))?.bytes(registers);
                self.tally.record(registers_record(SNAPSHOT_SIZE));
                self.step = Step::Trailer { registers_digest };
                chunk
            }
            Step::Trailer { registers_digest } => {
                let trailer = Trailer {
                    digest: self.digests.image(&self.identity, registers_digest),
                    tally: self.tally,
                };
                let chunk = Chunk::new(&trailer.record())?;
                self.step = Step::End;
                chunk
            }
            Step::End => return Ok(Next::End),
        };
        Ok(Next::Chunk(chunk))
    }
}

impl Saver for MockSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        let load = &self.chip.knobs.load;
        load.dirty(&self.chip.memory);
        self.next_page = None;
        if self.is_pending(phase) {
            if !self.waits.is_over() {
                return Ok(Next::NotReady);
            }
            self.chip.fault(Event::Read(self.tally.bytes))?;
            self.waits.prepare()?;
            let start = self.tally.bytes;
            let record = self.record(phase)?;
            self.waits.begin(self.tally.bytes - start);
            return Ok(record);
        }
        // A wait that goes on would hold up the next change, which poll() announces at once.
        self.waits.skip();
        if phase == Phase::PreCopy {
            let timer = load
                .wait()
                .map(|time| Timer::new(self.notifier.clone(), time));
            self.next_page = timer.transpose()?;
        }
        self.record(phase)
    }

    fn seal(&mut self) -> Result {
        let load = &self.chip.knobs.load;
        load.dirty(&self.chip.memory);
        self.chip.fault(Event::Seal)?;
        load.end();
        Ok(())
    }

    /// A change after the digest of a page has marked the page again. So each page without a mark
    /// has the digest of the content that was streamed last.
    fn read(&mut self, mut run: PageRun) {
        for (page, digest) in run.digests() {
            self.digests.set(page as u64, digest);
        }
        self.page_digests = run.take_digests();
    }

    fn remaining(&self) -> Result<Remaining> {
        self.chip.fault(Event::Size)?;
        self.chip.knobs.load.dirty(&self.chip.memory);
        let pending = self.tracking.pending();
        let size = |Pages { pages, runs }| run_records::<PAGE_SIZE>(runs, pages);
        let (identity, tail) = match self.step {
            Step::Identity => (IDENTITY_RECORD, TAIL),
            Step::Pages | Step::Registers => (0, TAIL),
            Step::Trailer { .. } => (0, TRAILER_RECORD),
            Step::End => (0, 0),
        };
        Ok(self.chip.knobs.tell(Remaining {
            initial: identity + size(pending.initial),
            dirty: size(pending.dirty),
            tail: tail + size(pending.held),
            reinits: pending.reinits,
        }))
    }
}

impl Drop for MockSaver {
    fn drop(&mut self) {
        self.chip.knobs.load.end();
    }
}
