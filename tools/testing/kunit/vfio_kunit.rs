// SPDX-License-Identifier: GPL-2.0

//! KUnit tests of the migration engine, and of the parts that use `core` alone.
//!
//! The engine is tested with a device that is not on a bus. The main tests of the other parts run
//! on the host (`tools/testing/host`). The tests here check that the model of the state machine
//! agrees with vfio core, and that the other parts work with the build flags of the kernel.

use kernel::prelude::*;
use vfio::migration::fsm;

#[path = "../../../rust/vfio/memory/dirty_map.rs"]
pub mod dirty_map;
#[path = "../../../rust/vfio/emulated/irq/msix.rs"]
pub mod msix;
#[path = "../host/src/paths.rs"]
pub mod paths;
#[path = "../../../samples/vfio_mock/migration/stream.rs"]
pub mod stream;
#[path = "../../../rust/vfio/soft_pci/table.rs"]
pub mod table;

mod engine;
mod fake;

module! {
    type: VfioKunit,
    name: "vfio_kunit",
    description: "KUnit tests of VFIO migration: engine and files that use core alone",
    license: "GPL",
}

/// The module does nothing: KUnit runs the suites when it is loaded.
struct VfioKunit;

impl kernel::Module for VfioKunit {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self)
    }
}

#[kunit_tests(vfio_migration_fsm)]
mod fsm_tests {
    use super::{
        fsm::{
            Flags,
            State, //
        },
        paths::{
            arcs,
            ends_session,
            next,
            opens_session, //
        },
    };
    use kernel::ffi::c_int;

    unsafe extern "C" {
        /// Returns the answer of vfio core, see `vfio_kunit_core.c`.
        fn vfio_kunit_core_next_state(flags: u32, cur: u32, new: u32) -> c_int;
    }

    /// Returns the next state according to vfio core.
    fn core_next(flags: Flags, cur: State, target: u32) -> Option<State> {
        // SAFETY: The function accepts any numbers and stores no pointers.
        let next =
            unsafe { vfio_kunit_core_next_state(flags.as_raw() as u32, cur.as_raw(), target) };

        u32::try_from(next).ok().and_then(State::from_raw)
    }

    #[test]
    fn next_state_matches_vfio_core() {
        let mut compared = 0;

        for flags in Flags::ALL {
            for cur in State::ALL {
                // vfio core warns about a device that is in such a state.
                if !flags.has(cur) {
                    continue;
                }
                for target in State::ALL {
                    assert_eq!(
                        next(flags, cur, target),
                        core_next(flags, cur, target.as_raw())
                    );
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, (4 + 5 + 5 + 7) * 8);
    }

    #[test]
    fn both_refuse_unknown_targets() {
        for flags in Flags::ALL {
            for raw in [8, 9, 0x8000_0001, u32::MAX] {
                assert!(State::from_raw(raw).is_none());
                assert!(core_next(flags, State::Running, raw).is_none());
            }
        }
    }

    #[test]
    fn unsupported_states_lead_nowhere() {
        for flags in Flags::ALL {
            for cur in State::ALL {
                for target in State::ALL {
                    if !flags.has(cur) || !flags.has(target) {
                        assert!(next(flags, cur, target).is_none());
                    }
                }
            }
        }
    }

    #[test]
    fn each_step_is_an_arc() {
        for flags in Flags::ALL {
            for cur in State::ALL {
                for target in State::ALL {
                    let Some(step) = next(flags, cur, target) else {
                        continue;
                    };
                    assert!(step == cur || arcs(flags).any(|arc| arc == (cur, step)));
                }
            }
        }
        assert_eq!(
            arcs(Flags::STOP_COPY.with_p2p().with_pre_copy()).count(),
            15
        );
    }

    #[test]
    fn sessions_are_opened_and_ended_in_pairs() {
        for flags in Flags::ALL {
            for (from, to) in arcs(flags) {
                let with = |state: State| state.is_saving() || state == State::Resuming;

                assert_eq!(opens_session(from, to), !with(from) && with(to));
                assert_eq!(ends_session(from, to), with(from) && !with(to));
            }
        }
    }
}

#[kunit_tests(vfio_dirty_map)]
mod dirty_map_tests {
    use super::dirty_map::{
        leaf_words,
        summary_words,
        DirtyMap,
        Run,
        PAGES_PER_WORD, //
    };
    use super::stream::pattern_word;
    use kernel::prelude::*;

    /// Returns a clean map of `pages` pages.
    fn new_map(pages: usize) -> Result<DirtyMap<KVVec<u64>>> {
        let leaf = KVVec::from_elem(u64::MAX, leaf_words(pages), GFP_KERNEL)?;
        let summary = KVVec::from_elem(u64::MAX, summary_words(pages), GFP_KERNEL)?;

        DirtyMap::new(pages, leaf, summary).ok_or(EINVAL)
    }

    #[test]
    fn lengths_must_match() {
        assert!(DirtyMap::new(65, [0; 2].as_mut_slice(), [0; 1].as_mut_slice()).is_some());
        assert!(DirtyMap::new(65, [0; 1].as_mut_slice(), [0; 1].as_mut_slice()).is_none());
        assert!(DirtyMap::new(65, [0; 3].as_mut_slice(), [0; 1].as_mut_slice()).is_none());
        assert!(DirtyMap::new(65, [0; 2].as_mut_slice(), [0; 2].as_mut_slice()).is_none());
    }

    #[test]
    fn runs_are_found_and_taken() -> Result {
        let mut map = new_map(200)?;

        assert_eq!((map.dirty(), map.runs()), (0, 0));
        assert_eq!(map.mark_range(60, 70), 70);
        assert_eq!(map.mark_range(61, 1), 0);
        assert_eq!(map.mark_range(199, 1), 1);
        assert_eq!(map.mark_range(200, usize::MAX), 0);
        assert_eq!((map.dirty(), map.runs()), (71, 4));
        assert_eq!(
            map.next_run(70),
            Some(Run {
                first: 70,
                count: 58
            })
        );
        assert_eq!(
            map.take_run(0),
            Some(Run {
                first: 60,
                count: 4
            })
        );
        assert_eq!(
            map.take_run(0),
            Some(Run {
                first: 64,
                count: 64
            })
        );
        assert_eq!(
            map.take_run(0),
            Some(Run {
                first: 128,
                count: 2
            })
        );
        assert_eq!(
            map.take_run(0),
            Some(Run {
                first: 199,
                count: 1
            })
        );
        assert_eq!(map.take_run(0), None);
        assert_eq!((map.dirty(), map.runs()), (0, 0));
        Ok(())
    }

    #[test]
    fn large_map_is_searched_by_its_summary() -> Result {
        // The number of pages of a device of 1 GiB.
        let mut map = new_map(1 << 18)?;

        assert_eq!(map.next_run(0), None);
        assert_eq!(map.mark_range((1 << 18) - 1, 1), 1);
        assert_eq!(
            map.next_run(0),
            Some(Run {
                first: (1 << 18) - 1,
                count: 1,
            })
        );
        Ok(())
    }

    #[test]
    fn marked_map_is_taken_in_order() -> Result {
        const PAGES: usize = (1 << 18) + 3;

        let mut map = new_map(PAGES)?;

        for round in 0..3 {
            // The first round ends in the middle of a word of the summary.
            let words = if round == 0 { 70 } else { leaf_words(PAGES) };

            map.mark_all();
            assert_eq!((map.dirty(), map.runs()), (PAGES, leaf_words(PAGES)));
            for index in 0..words {
                let first = index * PAGES_PER_WORD;
                let count = PAGES_PER_WORD.min(PAGES - first);

                assert_eq!(map.take_run(first), Some(Run { first, count }));
                assert!(!map.is_dirty(first));
            }
            let left = PAGES.saturating_sub(words * PAGES_PER_WORD);
            assert_eq!(map.dirty(), left);
            assert_eq!(map.next_run(0).is_some(), left > 0);
            assert_eq!(map.mark_range(0, 1), 1);
            assert_eq!(map.mark_range(PAGES - 1, 1), usize::from(left == 0));
        }
        Ok(())
    }

    #[test]
    fn map_behaves_like_single_flags() -> Result {
        const PAGES: usize = 200;

        let mut map = new_map(PAGES)?;
        let mut model = [false; PAGES];

        for step in 0..1000 {
            let random = pattern_word(1, step) as usize;
            let (first, count) = (random % PAGES, (random >> 16) % 90);

            if random >> 32 & 3 == 0 {
                let run = map.take_run(first);
                let dirty = model.iter().skip(first).position(|page| *page);

                assert_eq!(run.map(|run| run.first), dirty.map(|dirty| first + dirty));
                if let Some(run) = run {
                    for page in model.iter_mut().skip(run.first).take(run.count) {
                        assert!(*page);
                        *page = false;
                    }
                }
            } else {
                map.mark_range(first, count);
                for page in model.iter_mut().skip(first).take(count) {
                    *page = true;
                }
            }

            let mut runs = 0;
            let mut before = false;
            for (page, dirty) in model.iter().enumerate() {
                let begins = *dirty && (page % PAGES_PER_WORD == 0 || !before);

                assert_eq!(map.is_dirty(page), *dirty);
                runs += usize::from(begins);
                before = *dirty;
            }
            assert_eq!(map.dirty(), model.iter().filter(|page| **page).count());
            assert_eq!(map.runs(), runs);
        }
        Ok(())
    }
}

#[kunit_tests(vfio_msix)]
mod msix_tests {
    use super::msix::{
        Listener,
        Msix,
        Vector, //
    };
    use core::cell::Cell;
    use kernel::prelude::*;

    impl Listener for &Cell<u32> {
        fn signal(&self) {
            self.set(self.get() + 1);
        }
    }

    type Device<'a> = Msix<KVec<Vector<&'a Cell<u32>>>>;

    /// Returns a device with 70 vectors. `counter` is the listener of the last one.
    fn device(counter: &Cell<u32>) -> Result<Device<'_>> {
        let mut vectors = KVec::new();

        for _ in 0..70 {
            vectors.push(Vector::POWER_ON, GFP_KERNEL)?;
        }
        let mut device = Msix::new(vectors);
        device.configure(false, true);
        assert!(device.listen(69, Some(counter)).is_none());
        Ok(device)
    }

    #[test]
    fn interrupts_are_delivered_or_pending() -> Result {
        let counter = Cell::new(0);
        let mut device = device(&counter)?;
        let mut pending = [0; 16];

        device.signal(69);
        device.signal(70);
        device.signal(usize::MAX);
        assert_eq!(counter.get(), 1);
        device.signal(8);
        device.read_pending(0, &mut pending);
        assert_eq!(u128::from_le_bytes(pending), 1 << 8);
        assert!(device.listen(8, Some(&counter)).is_none());
        assert_eq!(counter.get(), 2);
        Ok(())
    }

    #[test]
    fn each_reason_keeps_interrupts_pending() -> Result {
        type Hold = fn(&mut Device<'_>, bool);

        let counter = Cell::new(0);
        let mut device = device(&counter)?;
        let mut pending = [0; 1];
        let reasons: [Hold; 5] = [
            |device, hold| device.run(!hold),
            |device, hold| device.mask(69, hold),
            |device, hold| device.configure(hold, true),
            |device, hold| device.configure(false, !hold),
            |device, hold| device.write_table(69 * 16 + 12, &[u8::from(hold)]),
        ];

        for (index, hold) in reasons.iter().enumerate() {
            hold(&mut device, true);
            device.signal(69);
            device.signal(69);
            assert_eq!(counter.get() as usize, index);
            device.read_pending(8, &mut pending);
            assert_eq!(pending, [1 << 5]);
            hold(&mut device, false);
            assert_eq!(counter.get() as usize, index + 1);
            device.read_pending(8, &mut pending);
            assert_eq!(pending, [0]);
        }
        Ok(())
    }

    #[test]
    fn pending_interrupts_are_loaded() -> Result {
        let counter = Cell::new(0);
        let mut device = device(&counter)?;
        let table = KVec::zeroed(70 * 16, GFP_KERNEL)?;
        let mut pending = [0; 16];

        device.run(false);
        pending[8] = 1 << 5;
        assert!(device.accepts_pending(&pending));
        device.load(&table, &pending);
        assert_eq!(counter.get(), 0);
        device.run(true);
        assert_eq!(counter.get(), 1);
        pending[8] = 1 << 6;
        assert!(!device.accepts_pending(&pending));
        assert!(!device.accepts_pending(pending.get(..8).ok_or(EINVAL)?));
        Ok(())
    }
}

#[kunit_tests(vfio_soft_pci_table)]
mod table_tests {
    use super::table::{
        Access,
        Fault,
        MapError,
        Memory,
        Missing,
        Run,
        Spare,
        Table,
        FANOUT,
        PAGES, //
    };
    use kernel::prelude::*;

    const LEAF: u64 = FANOUT as u64;
    const WRITE: Access = Access {
        read: false,
        write: true,
    };

    /// Memory of the tables, as in the software IOMMU.
    struct Slab;

    impl Memory for Slab {
        type Box<T> = KBox<T>;
    }

    /// Maps all pages to frames of the same number.
    fn map(table: &mut Table<Slab>, page: u64, count: u64) -> Result {
        let mut spare = Spare::default();
        let mut done = 0;

        while done < count {
            let page = page + done;
            match table.map(page, page, count - done, WRITE, &mut spare) {
                Ok(mapped) => done += mapped,
                Err(MapError::Missing(Missing::Leaf)) => {
                    spare.leaf = Some(KBox::zeroed(GFP_KERNEL)?);
                }
                Err(MapError::Missing(Missing::Lower)) => {
                    spare.lower = Some(KBox::zeroed(GFP_KERNEL)?);
                }
                Err(MapError::Missing(Missing::Middle)) => {
                    spare.middle = Some(KBox::zeroed(GFP_KERNEL)?);
                }
                Err(MapError::Occupied) => return Err(EEXIST),
                Err(MapError::Range) => return Err(EINVAL),
            }
        }
        Ok(())
    }

    #[test]
    fn pages_are_mapped_and_unmapped() -> Result {
        let mut table = Table::new(KBox::zeroed(GFP_KERNEL)?);

        for first in [0, LEAF * LEAF * LEAF - 2, PAGES - 3 * LEAF] {
            map(&mut table, first, 3 * LEAF)?;
            assert!(map(&mut table, first + 2 * LEAF, 1) == Err(EEXIST));
            for page in [first, first + LEAF, first + 3 * LEAF - 1] {
                assert_eq!(table.translate(page, true), Ok(page));
                assert_eq!(table.translate(page, false), Err(Fault::Denied));
                assert_eq!(table.frame(page), Some(page));
            }
        }
        assert!(map(&mut table, PAGES - 1, 2) == Err(EINVAL));
        assert_eq!(table.unmap(1, u64::MAX), LEAF - 1);
        assert_eq!(table.unmap(1, 1), 0);
        assert_eq!(table.translate(1, true), Err(Fault::Unmapped));
        assert_eq!(table.translate(0, true), Ok(0));
        map(&mut table, 1, 1)
    }

    #[test]
    fn dirty_pages_are_taken_once() -> Result {
        let mut table = Table::new(KBox::zeroed(GFP_KERNEL)?);
        let mut runs = [Run::default(); 2];
        let run = |first, count| Run { first, count };

        map(&mut table, 0, 2 * LEAF)?;
        for page in [3, 4, LEAF - 1, LEAF, LEAF + 9] {
            table.mark(page);
            table.mark(page);
        }
        table.mark(2 * LEAF);
        assert_eq!(
            table.take_dirty(0, PAGES, false, &mut runs),
            (2, Some(LEAF + 9))
        );
        assert_eq!(
            table.take_dirty(4, PAGES, true, &mut runs),
            (2, Some(LEAF + 9))
        );
        assert_eq!(runs, [run(4, 1), run(LEAF - 1, 2)]);
        assert_eq!(table.take_dirty(0, LEAF + 9, true, &mut runs), (1, None));
        assert_eq!(runs[0], run(3, 1));
        assert_eq!(table.unmap(LEAF, LEAF), LEAF);
        assert_eq!(table.take_dirty(0, PAGES, true, &mut runs), (0, None));
        Ok(())
    }
}

#[kunit_tests(vfio_records)]
mod records_tests {
    use kernel::prelude::*;
    use vfio::migration::Records;

    /// Records of at most 4 bytes, after their length.
    fn with_header() -> Result<Records> {
        Records::with_header(1, |header| match header {
            [length @ 0..=4] => Ok(usize::from(*length)),
            _ => Err(EINVAL),
        })
    }

    /// Feeds a stream in pieces of `size` bytes, and returns the records, each before a stop.
    fn feed(records: &mut Records, stream: &[u8], size: usize) -> Result<KVec<u8>> {
        let mut seen = KVec::new();

        for mut piece in stream.chunks(size) {
            while !piece.is_empty() {
                let taken = records.feed(piece, |record| {
                    seen.extend_from_slice(record, GFP_KERNEL)?;
                    Ok(seen.push(b'.', GFP_KERNEL)?)
                })?;
                assert!(taken > 0);
                piece = piece.get(taken..).ok_or(EINVAL)?;
            }
        }
        Ok(seen)
    }

    #[test]
    fn any_chunking_works() -> Result {
        for size in 1..12 {
            let mut fixed = Records::new(3)?;
            let mut records = with_header()?;

            assert_eq!(feed(&mut fixed, b"abcdefgh", size)?[..], *b"abc.def.");
            assert!(fixed.is_partial());
            assert_eq!(feed(&mut fixed, b"i", size)?[..], *b"ghi.");
            assert!(!fixed.is_partial());

            let stream = b"\x02ab\x00\x04cdef\x01";
            let expected = b"\x02ab.\x00.\x04cdef.";
            assert_eq!(feed(&mut records, stream, size)?[..], *expected);
            assert!(records.is_partial());
            assert_eq!(feed(&mut records, b"g", size)?[..], *b"\x01g.");
            assert!(!records.is_partial());
        }
        Ok(())
    }

    #[test]
    fn one_record_is_taken_at_a_time() -> Result {
        let mut fixed = Records::new(3)?;

        assert_eq!(fixed.feed(b"abcdefgh", |_| Ok(()))?, 3);
        assert_eq!(fixed.feed(b"de", |_| Err(EINVAL))?, 2);
        assert_eq!(fixed.feed(b"fgh", |_| Ok(()))?, 1);
        Ok(())
    }

    #[test]
    fn invalid_records_are_refused() -> Result {
        let mut records = with_header()?;

        assert!(Records::new(0).is_err());
        assert_eq!(
            feed(&mut records, b"\x04abcd\x05efghi", 3).err(),
            Some(EINVAL)
        );
        let mut records = Records::with_header(2, |_| Ok(usize::MAX))?;
        assert_eq!(feed(&mut records, b"abcdef", 3).err(), Some(EINVAL));
        Ok(())
    }
}

#[kunit_tests(vfio_mock_stream)]
mod stream_tests {
    use super::stream::{
        self,
        digest,
        groups,
        page_digest,
        pattern_word,
        registers_digest,
        registers_header,
        registers_record,
        run_header,
        words,
        Decoder,
        Digests,
        Identity,
        Sink,
        Tally,
        Trailer,
        IDENTITY_RECORD,
        RUN_OVERHEAD, //
    };
    use kernel::{
        page::PAGE_SIZE,
        prelude::*, //
    };

    /// The pages of the device.
    const PAGES: usize = 2;

    /// The registers of the device.
    const REGISTERS: [u8; 20] = [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
    ];

    /// Returns the memory of a device with pages of `PAGE` bytes.
    fn memory<const PAGE: usize>() -> Result<KVVec<u8>> {
        let mut memory = KVVec::new();

        for index in 0..(PAGES * PAGE / 8) as u64 {
            memory.extend_from_slice(&pattern_word(9, index).to_le_bytes(), GFP_KERNEL)?;
        }
        Ok(memory)
    }

    /// Returns the stream of [`memory()`] in one run.
    fn save<const PAGE: usize>() -> Result<KVVec<u8>> {
        let memory = memory::<PAGE>()?;
        let identity = Identity::<PAGE>::new(memory.len() as u64);
        let mut digests = Digests::new(KVVec::from_elem(0, PAGES, GFP_KERNEL)?);
        let mut tally = Tally::default();
        let mut out = KVVec::new();

        tally.record(IDENTITY_RECORD);
        out.extend_from_slice(&identity.record(), GFP_KERNEL)?;
        tally.run::<PAGE>(PAGES as u64);
        out.extend_from_slice(&run_header::<PAGE>(0, PAGES as u64), GFP_KERNEL)?;
        out.extend_from_slice(&memory, GFP_KERNEL)?;
        for (page, content) in (0..).zip(memory.chunks(PAGE)) {
            digests.set(page, page_digest(page, groups(content)));
        }
        tally.record(registers_record(REGISTERS.len()));
        out.extend_from_slice(&registers_header(REGISTERS.len()), GFP_KERNEL)?;
        out.extend_from_slice(&REGISTERS, GFP_KERNEL)?;

        let trailer = Trailer {
            digest: digests.image(&identity, registers_digest(&REGISTERS)),
            tally,
        };
        out.extend_from_slice(&trailer.record(), GFP_KERNEL)?;
        Ok(out)
    }

    /// A device that a stream is loaded into.
    struct Loader {
        memory: KVVec<u8>,
    }

    impl Loader {
        /// Creates a device with empty memory.
        fn new() -> Result<Self> {
            Ok(Self {
                memory: KVVec::from_elem(0, PAGES * PAGE_SIZE, GFP_KERNEL)?,
            })
        }
    }

    impl Sink for Loader {
        fn write(&mut self, offset: u64, bytes: &[u8]) {
            let to = self.memory.iter_mut().skip(offset as usize);

            to.zip(bytes).for_each(|(to, from)| *to = *from);
        }

        fn page_digest(&self, page: u64) -> u64 {
            let content = self.memory.chunks(PAGE_SIZE).nth(page as usize);

            page_digest(page, groups(content.unwrap_or_default()))
        }

        fn registers(&mut self, bytes: &[u8]) -> Result<(), stream::Error> {
            if bytes == REGISTERS {
                Ok(())
            } else {
                Err(stream::Error::BadRegisters)
            }
        }
    }

    /// Loads `stream` in pieces of `size` bytes into `loader` and returns the decoder's result.
    fn load(loader: &mut Loader, stream: &[u8], size: usize) -> Result<Result<(), stream::Error>> {
        let table = KVVec::from_elem(0, PAGES, GFP_KERNEL)?;
        let state_size = (PAGES * PAGE_SIZE) as u64;
        let identity = Identity::new(state_size);
        let decoder = Decoder::<_, PAGE_SIZE>::new(identity, REGISTERS.len(), table);
        let mut decoder = decoder.ok_or(EINVAL)?;

        for piece in stream.chunks(size) {
            if let Err(error) = decoder.feed(piece, loader) {
                return Ok(Err(error));
            }
        }
        Ok(decoder.finish())
    }

    /// Returns whether tests use byte `at` of the stream: all bytes outside of the pages, some
    /// inside.
    fn sample(at: &usize) -> bool {
        let pages = (IDENTITY_RECORD + RUN_OVERHEAD) as usize;

        !(pages..pages + PAGES * PAGE_SIZE).contains(at) || at % 509 == 0
    }

    #[test]
    fn format_is_fixed() -> Result {
        // The same numbers as in the tests of the host.
        assert_eq!(pattern_word(0, 0), 0xe220a8397b1dcdaf);
        for (image, len, sum) in [
            (save::<{ 4 << 10 }>()?, 8348, 0x9f299da614b1db62),
            (save::<{ 16 << 10 }>()?, 32924, 0xa4d0d5992e190f34),
            (save::<{ 64 << 10 }>()?, 131228, 0xc11cae5eec211b1f),
        ] {
            assert_eq!(image.len(), len);
            assert_eq!(digest(0, words(&image)), sum);
        }
        Ok(())
    }

    #[test]
    fn pages_of_another_size_are_refused() -> Result {
        let mut loader = Loader::new()?;

        for image in [save::<{ PAGE_SIZE / 2 }>()?, save::<{ PAGE_SIZE * 2 }>()?] {
            assert_eq!(
                load(&mut loader, &image, 4096)?,
                Err(stream::Error::BadPageSize)
            );
        }
        Ok(())
    }

    #[test]
    fn any_chunking_works() -> Result {
        let memory = memory::<PAGE_SIZE>()?;
        let image = save::<PAGE_SIZE>()?;

        const NEAR_PAGE: [usize; 4] =
            [PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 808];

        for size in [[1, 2, 3, 7], [16, 63, 64, 509], NEAR_PAGE]
            .into_iter()
            .flatten()
        {
            let mut loader = Loader::new()?;

            assert_eq!(load(&mut loader, &image, size)?, Ok(()));
            assert!(loader.memory[..] == memory[..]);
        }
        Ok(())
    }

    #[test]
    fn truncated_streams_are_refused() -> Result {
        let image = save::<PAGE_SIZE>()?;
        let mut loader = Loader::new()?;

        for len in (0..image.len()).filter(sample) {
            assert_eq!(
                load(&mut loader, image.get(..len).ok_or(EINVAL)?, 4096)?,
                Err(stream::Error::Truncated)
            );
        }
        Ok(())
    }

    #[test]
    fn corrupted_streams_are_refused() -> Result {
        let mut image = save::<PAGE_SIZE>()?;
        let mut loader = Loader::new()?;

        for at in (0..image.len()).filter(sample) {
            for bit in [0, 3, 7] {
                let byte = image.get_mut(at).ok_or(EINVAL)?;

                *byte ^= 1 << bit;
                assert!(load(&mut loader, &image, 4096)?.is_err());

                let byte = image.get_mut(at).ok_or(EINVAL)?;
                *byte ^= 1 << bit;
            }
        }
        assert_eq!(load(&mut loader, &image, 4096)?, Ok(()));
        Ok(())
    }

    #[test]
    fn trailing_bytes_are_refused() -> Result {
        let mut image = save::<PAGE_SIZE>()?;
        let mut loader = Loader::new()?;

        image.push(0, GFP_KERNEL)?;
        assert_eq!(
            load(&mut loader, &image, 9000)?,
            Err(stream::Error::Trailing)
        );
        assert_eq!(load(&mut loader, &image, 1)?, Err(stream::Error::Trailing));
        Ok(())
    }
}

#[kunit_tests(vfio_config_space)]
mod config_space_tests {
    use kernel::prelude::*;
    use vfio::emulated::{
        config_space::{
            ConfigSpace,
            Id, //
        },
        region::{
            BAR0,
            BAR2,
            BAR4, //
        },
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(Id {
            vendor: 0x1af4,
            device: 0x10f0,
            class: 0xff_0000,
        })
    }

    /// A device with a BAR of 16 KiB and one of 1 MiB.
    fn with_bars() -> Result<ConfigSpace> {
        space()
            .memory_bar(BAR0 as usize, 0x4000, false)?
            .memory_bar(BAR2 as usize, 0x10_0000, true)
    }

    #[test]
    fn invalid_bar_is_refused() -> Result {
        for index in [1, 3, 5, 6, usize::MAX] {
            assert!(space().memory_bar(index, 0x1000, false).is_err());
        }
        for size in [0, 8, 15, 17, 0x1800, u64::MAX] {
            assert!(space().memory_bar(0, size, false).is_err());
        }
        assert!(with_bars()?.memory_bar(0, 0x4000, false).is_err());
        assert!(with_bars()?.memory_bar(BAR4 as usize, 16, false).is_ok());
        Ok(())
    }

    #[test]
    fn invalid_msix_is_refused() -> Result {
        let msix = |vectors, bar, table, pba| with_bars()?.msix(vectors, bar, table, pba);

        // Table and pending bits are adjacent and end at the end of the BAR.
        assert!(msix(4, BAR0, 0x1000, 0x2000).is_ok());
        assert!(msix(4, BAR0, 0x3fb8, 0x3ff8).is_ok());
        assert!(msix(4, BAR0, 8, 0).is_ok());
        assert!(msix(2048, BAR2, 0xf_8000, 0).is_ok());
        for vectors in [0, 2049, u32::MAX] {
            assert!(msix(vectors, BAR2, 0, 0x8_0000).is_err());
        }
        // Upper halves, a BAR that the device does not have, and none.
        for bar in [1, 3, BAR4, 5, 6, u32::MAX] {
            assert!(msix(4, bar, 0x1000, 0x2000).is_err());
        }
        assert!(msix(4, BAR0, 0x1004, 0x2000).is_err());
        assert!(msix(4, BAR0, 0x1000, 0x2004).is_err());
        // Outside of the BAR.
        assert!(msix(4, BAR0, 0x3fc8, 0).is_err());
        assert!(msix(4, BAR0, 0, 0x4000).is_err());
        assert!(msix(65, BAR0, 0, 0x3ff8).is_err());
        assert!(msix(4, BAR0, u32::MAX - 7, 0).is_err());
        // Overlapping.
        assert!(msix(4, BAR0, 0x1000, 0x1000).is_err());
        assert!(msix(4, BAR0, 0x1000, 0x1038).is_err());
        assert!(msix(65, BAR0, 0x1000, 0xff8).is_err());
        assert!(msix(4, BAR0, 0, 0x2000)?.msix(4, BAR2, 0, 0x1000).is_err());
        Ok(())
    }
}
