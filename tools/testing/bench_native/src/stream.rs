// SPDX-License-Identifier: GPL-2.0

//! The stream of the mock: its digest, read() and write().

use crate::{
    prefetch::prefetch,
    way,
    Figure,
    Way, //
};
use std::{
    cell::RefCell,
    hint::black_box,
    rc::Rc, //
};
use vfio_host_tests::stream::{
    groups,
    page_digest,
    registers_digest,
    registers_header,
    registers_record,
    run_header,
    words,
    Decoder,
    Digests,
    Error,
    Identity,
    Sink,
    Tally,
    Trailer,
    GROUP,
    IDENTITY_RECORD,
    RUN_PAGES, //
};

const PAGE: usize = 4096;

/// Number of times that work on a page in the cache is repeated between looks at the clock.
const HOT: usize = 64;

/// Distance of the prefetch in the crate.
const AHEAD: usize = 8 << 10;

/// Content of a pages record.
const RECORD: usize = RUN_PAGES as usize * PAGE;

/// Size of the buffer of a read().
const BUFFER: usize = 1 << 20;

/// State that no cache next to a core can contain.
const STATE: usize = 256 << 20;

/// State of the device that loads a stream.
const LOADED: usize = 16 << 20;

/// Buffer of the kernel for write().
const BLOCK: usize = 64 << 10;

const REGISTERS: [u8; 1456] = [0; 1456];

/// Returns the digest of page `page` with this content.
type PageSum = fn(u64, &[u8]) -> u64;

/// The digest of the stream, and others for the same purpose.
const SUMS: [(&str, PageSum); 5] = [
    ("digest of the stream", |page, content| {
        page_digest(page, groups(content))
    }),
    ("crc32c", |_, content| crc32c::crc32c(content).into()),
    ("crc-fast, CRC-32C", |_, content| {
        crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, content)
    }),
    ("crc-fast, CRC-64 NVME", |_, content| {
        crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, content)
    }),
    ("xxhash-rust, XXH3", |page, content| {
        xxhash_rust::xxh3::xxh3_64_with_seed(content, page)
    }),
];

/// Returns memory filled with a pattern.
fn memory(len: usize) -> Vec<u8> {
    crate::random(1)
        .take(len / 8)
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// A page that the first-level cache contains.
fn hot_page() -> Figure {
    let page: Rc<[u8]> = memory(PAGE).into();
    let (from, mut to) = (page.clone(), vec![0; PAGE]);
    let copy = way("copy", move || {
        for _ in 0..HOT {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
    });
    let sums = SUMS.map(|(name, sum)| {
        let page = page.clone();

        way(name, move || {
            for _ in 0..HOT {
                black_box(sum(1, black_box(&page)));
            }
        })
    });

    Figure {
        name: "digest of a page in the cache".into(),
        work: (HOT * PAGE) as f64 / 1024.0,
        unit: "KiB",
        ways: Iterator::chain([copy].into_iter(), sums).collect(),
    }
}

/// A state, and a buffer for its records.
///
/// The ways share it, so that none reads what another one has just brought into a cache.
struct Source {
    state: Vec<u8>,
    buffer: Vec<u8>,
    /// Bytes read so far.
    at: usize,
}

/// Copies the next record of the state each time, after `before` was called with each part of
/// `part` bytes.
fn read_record(
    name: &'static str,
    source: &Rc<RefCell<Source>>,
    part: usize,
    mut before: impl FnMut(&[u8]) + 'static,
) -> Way {
    let source = source.clone();

    way(name, move || {
        let Source { state, buffer, at } = &mut *source.borrow_mut();
        let from = &state[*at % STATE..][..RECORD];
        let to = &mut buffer[*at % BUFFER..][..RECORD];

        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            before(from);
            to.copy_from_slice(from);
        }
        black_box(to);
        *at += RECORD;
    })
}

/// Returns a function that computes the digests of pages.
fn sums(sum: PageSum) -> impl FnMut(&[u8]) {
    move |content| {
        for (page, content) in (0..).zip(content.chunks(PAGE)) {
            black_box(sum(page, content));
        }
    }
}

/// Returns the words of a page, and prefetches the next ones meanwhile.
fn ahead(content: &[u8]) -> impl Iterator<Item = [u64; GROUP]> + '_ {
    let lines = content.chunks_exact(8 * GROUP).map(<[u8]>::as_ptr);

    groups(content).zip(lines).map(|(words, line)| {
        prefetch(line.wrapping_add(AHEAD));
        words
    })
}

/// read() of a large state.
fn read() -> Figure {
    let source = Rc::new(RefCell::new(Source {
        state: memory(STATE),
        buffer: vec![0; BUFFER],
        at: 0,
    }));
    let mut ways = vec![
        read_record("copy", &source, RECORD, |_| ()),
        read_record(
            "digests of the record, copy",
            &source,
            RECORD,
            sums(SUMS[0].1),
        ),
    ];

    for ((_, sum), name) in SUMS.into_iter().zip([
        "page by page, digest of the stream, copy",
        "page by page, crc32c, copy",
        "page by page, crc-fast CRC-32C, copy",
        "page by page, crc-fast CRC-64 NVME, copy",
        "page by page, xxhash-rust XXH3, copy",
    ]) {
        ways.push(read_record(name, &source, PAGE, sums(sum)));
    }
    let digest: PageSum = |page, content| page_digest(page, ahead(content));
    let name = "page by page, digest with prefetch, copy";
    ways.push(read_record(name, &source, PAGE, sums(digest)));
    // The least that a digest can do.
    let touch: PageSum = |_, content| ahead(content).fold(0, |sum, words| sum ^ words[0]);
    let name = "page by page, a word of each line, copy";
    ways.push(read_record(name, &source, PAGE, sums(touch)));
    Figure {
        name: "read of 256 MiB".into(),
        work: RECORD as f64 / 1024.0,
        unit: "KiB",
        ways,
    }
}

/// A memory that a stream is loaded into.
struct Memory(Vec<u8>);

impl Sink for Memory {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn page_digest(&self, page: u64) -> u64 {
        page_digest(page, groups(&self.0[page as usize * PAGE..][..PAGE]))
    }

    /// In a single pass, like the device.
    fn write_page(&mut self, page: u64, bytes: &[u8]) -> u64 {
        let to = &mut self.0[page as usize * PAGE..][..PAGE];

        to.copy_from_slice(bytes);
        page_digest(page, groups(to))
    }

    fn registers(&mut self, _bytes: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

/// Returns the stream of `state` in records of at most `pages` pages.
fn save(state: &[u8], pages: usize) -> Vec<u8> {
    let identity = Identity::<PAGE>::new(state.len() as u64);
    let mut digests = Digests::new(vec![0; state.len() / PAGE]);
    let mut tally = Tally::default();
    let mut out = identity.record().to_vec();

    tally.record(IDENTITY_RECORD);
    for (run, content) in (0..).zip(state.chunks(pages * PAGE)) {
        let first = run * pages as u64;

        tally.run::<PAGE>((content.len() / PAGE) as u64);
        out.extend(run_header::<PAGE>(first * PAGE as u64, pages as u64));
        out.extend(content);
        for (page, content) in (first..).zip(content.chunks(PAGE)) {
            digests.set(page, page_digest(page, groups(content)));
        }
    }
    tally.record(registers_record(REGISTERS.len()));
    out.extend(registers_header(REGISTERS.len()));
    out.extend(REGISTERS);
    let digest = digests.image(&identity, registers_digest(&REGISTERS));
    out.extend(Trailer { digest, tally }.record());
    out
}

/// write() of a whole stream, in blocks.
fn write(name: &str, pages: usize) -> Figure {
    let stream: Rc<[u8]> = save(&memory(LOADED), pages).into();
    let (from, mut to) = (stream.clone(), vec![0; stream.len()]);
    let copy = way("copy", move || {
        for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
            to.copy_from_slice(from);
        }
    });
    let (from, mut block, mut to) = (stream.clone(), vec![0; BLOCK], vec![0; stream.len()]);
    let twice = way("copy by a block", move || {
        for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
            let block = &mut block[..from.len()];

            block.copy_from_slice(from);
            to.copy_from_slice(black_box(block));
        }
    });
    let (from, mut block) = (stream.clone(), vec![0; BLOCK]);
    let mut memory = Memory(vec![0; LOADED]);
    let decoder = way("copy to a block, decoder", move || {
        let table = vec![0; LOADED / PAGE];
        let identity = Identity::new(LOADED as u64);
        let mut decoder =
            Decoder::<_, PAGE>::new(identity, REGISTERS.len(), table).expect("it fits");

        for from in from.chunks(BLOCK) {
            let block = &mut block[..from.len()];

            block.copy_from_slice(from);
            decoder.feed(block, &mut memory).expect("it is valid");
        }
        decoder.finish().expect("it is complete");
    });

    Figure {
        name: name.into(),
        work: stream.len() as f64 / 1024.0,
        unit: "KiB",
        ways: vec![copy, twice, decoder],
    }
}

/// Records of other tags, which have no content to copy.
fn words_of_registers() -> Figure {
    let (from, mut to) = (REGISTERS.to_vec(), REGISTERS.to_vec());
    let copy = way("copy", move || {
        for _ in 0..HOT {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
    });
    let digest = way("digest of the stream", move || {
        for _ in 0..HOT {
            black_box(registers_digest(black_box(&REGISTERS)));
        }
    });
    let words = way("read", move || {
        for _ in 0..HOT {
            black_box(words(black_box(&REGISTERS)).fold(0, u64::wrapping_add));
        }
    });

    Figure {
        name: "digest of the registers".into(),
        work: (HOT * REGISTERS.len()) as f64 / 1024.0,
        unit: "KiB",
        ways: vec![copy, words, digest],
    }
}

pub(crate) fn figures() -> Vec<Figure> {
    vec![
        hot_page(),
        words_of_registers(),
        read(),
        write("write of 16 MiB, records of 64 pages", 64),
        write("write of 16 MiB, records of 1 page", 1),
    ]
}
