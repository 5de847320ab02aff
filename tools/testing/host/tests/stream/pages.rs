// SPDX-License-Identifier: GPL-2.0

// The tests for pages of `PAGE_SIZE` bytes, included by tests/stream.rs.

use super::Golden;
use proptest::prelude::*;
use vfio_host_tests::{
    dirty_map::{
        leaf_words,
        summary_words,
        DirtyMap, //
    },
    stream::{
        self,
        *, //
    },
};

/// Page size in bytes, for numbers of the stream.
const PAGE: u64 = PAGE_SIZE as u64;

/// How many times larger pages are than the smallest ones.
///
/// The tests that try everything try as many bytes as with the smallest ones, each this often, if
/// they step by its square. It is odd to vary the position in a word.
const STEP: usize = (PAGE_SIZE / 4096).pow(2) | 1;

/// Length of the registers in most tests; intentionally not a multiple of 8.
const REGISTERS: usize = 20;

/// A decoder that owns its table.
type OwnDecoder = Decoder<Vec<u64>, PAGE_SIZE>;

/// The identity of a device with such pages.
type Identity = stream::Identity<PAGE_SIZE>;

/// Returns memory filled with the pattern of `seed`.
fn memory(pages: usize, seed: u64) -> Vec<u8> {
    (0..(pages * PAGE_SIZE / 8) as u64)
        .flat_map(|index| pattern_word(seed, index).to_le_bytes())
        .collect()
}

/// Returns registers of `len` bytes.
fn registers(len: usize) -> Vec<u8> {
    (0..len).map(|byte| byte as u8).collect()
}

/// Returns a record from its parts.
fn record(tag: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut record = Vec::new();

    record.extend_from_slice(&tag.to_le_bytes());
    record.extend_from_slice(&flags.to_le_bytes());
    record.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    record.extend_from_slice(payload);
    record
}

/// Returns a pages record from its parts.
fn pages_record(offset: u64, content: &[u8]) -> Vec<u8> {
    record(TAG_PAGES, 0, &[&offset.to_le_bytes(), content].concat())
}

/// A saver of a memory.
struct Saver {
    identity: Identity,
    registers: Vec<u8>,
    digests: Digests<Vec<u64>>,
    tally: Tally,
    out: Vec<u8>,
}

impl Saver {
    /// Begins a stream with the identity.
    fn new(pages: usize, registers: Vec<u8>) -> Self {
        let identity = Identity::new((pages * PAGE_SIZE) as u64);
        let mut saver = Self {
            identity,
            registers,
            digests: Digests::new(vec![0; pages]),
            tally: Tally::default(),
            out: Vec::new(),
        };

        saver.tally.record(IDENTITY_RECORD);
        saver.out.extend_from_slice(&identity.record());
        saver
    }

    /// Streams `count` pages of `memory` from page `first` on.
    fn run(&mut self, memory: &[u8], first: usize, count: usize) -> &mut Self {
        let offset = first * PAGE_SIZE;
        let content = &memory[offset..offset + count * PAGE_SIZE];

        self.tally.run::<PAGE_SIZE>(count as u64);
        self.out
            .extend_from_slice(&run_header::<PAGE_SIZE>(offset as u64, count as u64));
        self.out.extend_from_slice(content);
        for (page, content) in (first as u64..).zip(content.chunks(PAGE_SIZE)) {
            self.digests.set(page, page_digest(page, groups(content)));
        }
        self
    }

    /// Streams a record that readers skip.
    fn optional(&mut self, tag: u32, payload: &[u8]) -> &mut Self {
        let record = record(tag, FLAG_OPTIONAL, payload);

        self.tally.record(record.len() as u64);
        self.out.extend_from_slice(&record);
        self
    }

    /// Streams the registers.
    fn registers(&mut self) -> &mut Self {
        self.tally.record(registers_record(self.registers.len()));
        self.out
            .extend_from_slice(&registers_header(self.registers.len()));
        self.out.extend_from_slice(&self.registers);
        self
    }

    /// Streams the trailer and returns the stream.
    fn trailer(&mut self) -> Vec<u8> {
        let trailer = Trailer {
            digest: self
                .digests
                .image(&self.identity, registers_digest(&self.registers)),
            tally: self.tally,
        };

        assert_eq!(self.tally.bytes, self.out.len() as u64);
        self.out.extend_from_slice(&trailer.record());
        core::mem::take(&mut self.out)
    }
}

/// Returns the stream of `memory` in runs of at most 64 pages, without anything special.
fn save(memory: &[u8], registers: Vec<u8>) -> Vec<u8> {
    let pages = memory.len() / PAGE_SIZE;
    let mut saver = Saver::new(pages, registers);

    for first in (0..pages).step_by(RUN_PAGES as usize) {
        saver.run(memory, first, (pages - first).min(RUN_PAGES as usize));
    }
    saver.registers().trailer()
}

/// A memory that a stream is loaded into.
struct Loader {
    memory: Vec<u8>,
    registers: Option<Vec<u8>>,
    refuse: bool,
}

impl Loader {
    fn new(pages: usize) -> Self {
        Self {
            memory: vec![0xee; pages * PAGE_SIZE],
            registers: None,
            refuse: false,
        }
    }
}

impl Sink for Loader {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset as usize;

        assert!(!bytes.is_empty());
        self.memory[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn page_digest(&self, page: u64) -> u64 {
        let offset = page as usize * PAGE_SIZE;

        page_digest(page, groups(&self.memory[offset..offset + PAGE_SIZE]))
    }

    fn registers(&mut self, bytes: &[u8]) -> Result<(), Error> {
        assert!(self.registers.is_none(), "registers twice");
        if self.refuse {
            return Err(Error::BadRegisters);
        }
        self.registers = Some(bytes.to_vec());
        Ok(())
    }
}

/// Returns a decoder for `pages` pages.
fn decoder(pages: usize, registers_len: usize) -> OwnDecoder {
    let identity = Identity::new((pages * PAGE_SIZE) as u64);

    Decoder::new(identity, registers_len, vec![0; pages]).unwrap()
}

/// Loads a whole stream in one piece and returns the result of the first call that fails.
fn load(pages: usize, stream: &[u8]) -> (Loader, Result<(), Error>) {
    let mut loader = Loader::new(pages);
    let mut decoder = decoder(pages, REGISTERS);
    let fed = decoder.feed(stream, &mut loader);

    if fed.is_err() {
        // The error is permanent.
        assert_eq!(decoder.feed(&[], &mut loader), fed);
        assert_eq!(decoder.feed(stream, &mut loader), fed);
        assert_eq!(decoder.finish(), fed);
        assert!(!decoder.is_done());
    }
    assert_eq!(decoder.is_done(), decoder.finish().is_ok());
    (loader, decoder.finish())
}

/// Asserts that the stream is refused, and why.
#[track_caller]
fn refused(pages: usize, stream: &[u8], why: Error) {
    assert_eq!(load(pages, stream).1, Err(why));
}

// The golden values fix the format. They come from this program, which shares no code with the Rust
// side:
//
//     import struct
//     M, G = (1 << 64) - 1, 0x9E3779B97F4A7C15
//     def pattern(seed, i):
//         z = (seed + (i + 1) * G) & M
//         z ^= z >> 30; z = z * 0xBF58476D1CE4E5B9 & M
//         z ^= z >> 27; z = z * 0x94D049BB133111EB & M
//         return z ^ z >> 31
//     def digest(h, data):
//         data += bytes(-len(data) % 8)
//         for i in range(0, len(data), 8):
//             w = int.from_bytes(data[i:i + 8], "little")
//             h = (w - (h << 5 & M | h >> 59)) * G & M
//         return h
//     def fill(seed, n): return b"".join(pattern(seed, i).to_bytes(8, "little") for i in range(n))
//     def header(tag, n): return struct.pack("<IIQ", tag, 0, n)
//     def page(n, data):
//         lanes = [b"".join(data[i:i + 8] for i in range(8 * j, len(data), 32)) for j in range(4)]
//         return digest(256 + n, b"".join(digest(256 + n, lane).to_bytes(8, "little")
//                                         for lane in lanes))
//     for size in 4 << 10, 16 << 10, 64 << 10:
//         mem, regs = fill(9, size // 4), bytes(range(20))
//         ident = struct.pack("<8sIIQQ", b"VMOCKST1", 1, size, 2 * size, 0)
//         image = header(1, 32) + ident + header(2, 8 + 2 * size) + bytes(8) + mem
//         image += header(3, 20) + regs
//         total = page(0, mem[:size]) + page(1, mem[size:]) + digest(1, ident) + digest(3, regs)
//         image += header(4, 32) + struct.pack("<QQQQ", total & M, 2, 3, len(image))
//         print(hex(page(0, bytes(size))), hex(page(3, fill(7, size // 8))), hex(digest(1, ident)),
//               hex(total & M), len(image), hex(digest(0, image)))

/// The pattern of the doorbell is fixed.
#[test]
fn golden_pattern() {
    assert_eq!(pattern_word(0, 0), 0xe220a8397b1dcdaf);
    assert_eq!(pattern_word(0, 1), 0x6e789e6aa1b965f4);
    assert_eq!(pattern_word(0, 2), 0x06c45d188009454f);
    assert_eq!(pattern_word(u64::MAX, 0), 0xe4d971771b652c20);
    assert_eq!(pattern_word(0x1234, u64::MAX), 0xbbab031d6fc0f336);
    assert_eq!(pattern_word(42, 1 << 40), 0x83d38e0edbd43334);
}

/// The digest is fixed.
#[test]
fn golden_digest() {
    let bytes: Vec<u8> = (0..16).collect();

    assert_eq!(digest(0, words(b"")), 0);
    assert_eq!(digest(5, words(b"vfio!")), 0xe9467057cad5028e);
    assert_eq!(digest(16, words(&bytes)), 0xf99e2e35a7e92386);
    assert_eq!(digest(1, words(&[0; 12])), 0xbd303726a65d7f6d);
    assert_eq!(
        page_digest(0, groups(&[0; PAGE_SIZE])),
        GOLDEN.page_of_zeroes
    );
    assert_eq!(page_digest(3, groups(&memory(1, 7))), GOLDEN.page);
    assert_eq!(registers_digest(&registers(20)), 0xe267fe3a9b372b48);
    let state_size = 2 * PAGE;
    assert_eq!(Identity::new(state_size).digest(), GOLDEN.identity);

    let mut progress = Digest::new(16);
    words(&bytes).for_each(|word| progress.add(word));
    assert_eq!(progress.value(), 0xf99e2e35a7e92386);
}

/// A whole image of two pages is fixed, byte for byte.
#[test]
fn golden_image() {
    let image = save(&memory(2, 9), registers(20));

    assert_eq!(image.len(), GOLDEN.image_len);
    assert_eq!(digest(0, words(&image)), GOLDEN.image);
    assert_eq!(&image[16..24], b"VMOCKST1");
    assert_eq!(&image[28..32], &(PAGE_SIZE as u32).to_le_bytes());
    let digest = image.len() - TRAILER_LEN;
    assert_eq!(&image[digest..][..8], &GOLDEN.trailer.to_le_bytes());
}

/// The sizes that the device announces are those of the records.
#[test]
fn sizes_are_those_of_the_records() {
    assert_eq!(IDENTITY_RECORD, 48);
    assert_eq!(TRAILER_RECORD, 48);
    assert_eq!(MAGIC, 0x3154534b434f4d56);
    assert_eq!(registers_record(20), 36);
    assert_eq!(
        registers_header(20),
        *record(TAG_REGISTERS, 0, &[0; 20]).first_chunk().unwrap()
    );
    for pages in 1..=RUN_PAGES {
        let record = pages_record(0x40000, &vec![0; pages as usize * PAGE_SIZE]);

        assert_eq!(run_record::<PAGE_SIZE>(pages), 24 + pages * PAGE);
        assert_eq!(run_record::<PAGE_SIZE>(pages), record.len() as u64);
        assert_eq!(
            run_header::<PAGE_SIZE>(0x40000, pages),
            *record.first_chunk().unwrap()
        );
    }
    let sum = [64, 5, 1].map(run_record::<PAGE_SIZE>).iter().sum();
    assert_eq!(run_records::<PAGE_SIZE>(3, 70), sum);
    assert_eq!(run_records::<PAGE_SIZE>(0, 0), 0);
    // No device has that many pages, but nothing panics.
    assert_eq!(run_record::<PAGE_SIZE>(u64::MAX), u64::MAX);
    assert!(registers_record(usize::MAX) > 0);
}

/// A change of one word changes the digest, and one of the highest bits of two words does too.
#[test]
fn changes_change_the_digest() {
    let mut page = memory(1, 3);
    let good = page_digest(0, groups(&page));

    for at in (0..PAGE_SIZE).step_by(STEP) {
        for bit in 0..8 {
            page[at] ^= 1 << bit;
            assert_ne!(page_digest(0, groups(&page)), good, "bit {bit} of {at}");
            page[at] ^= 1 << bit;
        }
    }

    let mut lane: Vec<u64> = words(&page).step_by(LANES).collect();
    let good = digest(0, lane.iter().copied());
    for first in (0..lane.len()).step_by(STEP) {
        lane[first] ^= 1 << 63;
        for second in first + 1..lane.len() {
            lane[second] ^= 1 << 63;
            assert_ne!(digest(0, lane.iter().copied()), good, "{first} {second}");
            lane[second] ^= 1 << 63;
        }
        lane[first] ^= 1 << 63;
    }
}

/// Swapped parts of a page change the digest, also parts that a sum of rotated words and a sum of
/// sums do not distinguish: sectors of one byte value, and words that differ in the highest byte.
#[test]
fn swapped_parts_change_the_digest() {
    let sectors: Vec<u8> = (0..PAGE_SIZE).map(|at| (at / 512 * 17 + 3) as u8).collect();
    let counters: Vec<u8> = (0..PAGE / 8).flat_map(u64::to_be_bytes).collect();

    for (mut page, len) in [(sectors, 512), (counters, 8)] {
        let good = page_digest(0, groups(&page));
        let step = len.max(128);

        for second in (step..PAGE_SIZE).step_by(step) {
            let swap = |page: &mut [u8]| {
                let (head, tail) = page.split_at_mut(second);

                head[..len].swap_with_slice(&mut tail[..len]);
            };
            let differ = page[..len] != page[second..][..len];

            swap(&mut page);
            assert_eq!(page_digest(0, groups(&page)) != good, differ, "{second}");
            swap(&mut page);
        }
    }
}

/// A page digest of 0 would count as a page that was never sent.
#[test]
fn page_digest_is_never_zero() {
    let start = 5_u64 + 0x100;
    let mut memory = memory(6, 1);
    let page = &mut memory[5 * PAGE_SIZE..];
    page.fill(0);
    // Compute the digest of the last lane for a total of 0, and then the last word of that lane.
    // The inverse of the factor undoes a step.
    let lane = |words: usize| digest(start, core::iter::repeat_n(0, words));
    let words = PAGE_SIZE / 8 / LANES;
    let wanted = digest(start, core::iter::repeat_n(lane(words), 3)).rotate_left(5);
    let factor = 0x9e37_79b9_7f4a_7c15_u64;
    let inverse = (0..6).fold(factor, |inverse, _| {
        inverse.wrapping_mul(2_u64.wrapping_sub(factor.wrapping_mul(inverse)))
    });
    let last = wanted
        .wrapping_mul(inverse)
        .wrapping_add(lane(words - 1).rotate_left(5));
    page[PAGE_SIZE - 8..].copy_from_slice(&last.to_le_bytes());
    assert_eq!(page_digest(5, groups(page)), 1);

    let (loader, result) = load(6, &save(&memory, registers(REGISTERS)));
    assert_eq!(result, Ok(()));
    assert!(loader.memory == memory);
}

/// The sum of the digests follows the table.
#[test]
fn digests_follow_the_table() {
    let mut digests = Digests::new(vec![0; 3]);

    assert_eq!((digests.total(), digests.complete()), (0, false));
    digests.set(0, u64::MAX);
    digests.set(2, 5);
    digests.set(2, 7);
    assert_eq!((digests.total(), digests.complete()), (6, false));
    digests.set(3, 100);
    digests.set(u64::MAX, 100);
    assert_eq!((digests.total(), digests.complete()), (6, false));
    digests.set(1, 1);
    assert_eq!((digests.total(), digests.complete()), (7, true));
    digests.set(0, 0);
    assert_eq!((digests.total(), digests.complete()), (8, false));
    assert!(Digests::new(vec![]).complete());
}

/// A decoder can be created for valid sizes only.
#[test]
fn decoder_checks_its_sizes() {
    let fits = |state_size, registers_len, pages| {
        let identity = Identity::new(state_size);

        OwnDecoder::new(identity, registers_len, vec![0; pages]).is_some()
    };

    assert!(fits(2 * PAGE, MAX_REGISTERS, 2));
    assert!(fits(2 * PAGE, 0, 2));
    assert!(!fits(2 * PAGE, MAX_REGISTERS + 1, 2));
    assert!(!fits(2 * PAGE, 8, 1));
    assert!(!fits(2 * PAGE, 8, 3));
    assert!(!fits(2 * PAGE - 1, 8, 2));
    assert!(!fits(u64::MAX, 8, 2));
}

/// A stream arrives as it was sent, for memory sizes around the run and word boundaries.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn round_trip() {
    for pages in [1, 2, 63, 64, 65, 128, 130] {
        let memory = memory(pages, pages as u64);
        let (loader, result) = load(pages, &save(&memory, registers(REGISTERS)));

        assert_eq!(result, Ok(()));
        assert!(loader.memory == memory, "{pages} pages");
        assert_eq!(loader.registers, Some(registers(REGISTERS)));
    }
}

/// Registers of each length arrive, the shortest and the longest too.
#[test]
fn round_trip_of_registers() {
    for len in [0, 1, 7, 8, 9, 511, MAX_REGISTERS] {
        let memory = memory(1, 3);
        let stream = save(&memory, registers(len));
        let mut loader = Loader::new(1);
        let mut decoder = decoder(1, len);

        assert_eq!(decoder.feed(&stream, &mut loader), Ok(()));
        assert_eq!(decoder.finish(), Ok(()));
        assert_eq!(loader.registers, Some(registers(len)));
    }
}

/// Pages that are sent again replace the previous content, like in pre-copy with a dirty map.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn round_trip_with_rounds() {
    const PAGES: usize = 150;

    let mut memory = memory(PAGES, 1);
    let mut saver = Saver::new(PAGES, registers(REGISTERS));
    let mut map = DirtyMap::new(
        PAGES,
        vec![0; leaf_words(PAGES)],
        vec![0; summary_words(PAGES)],
    )
    .unwrap();

    map.mark_all();
    for round in 0..5_usize {
        let announced = run_records::<PAGE_SIZE>(map.runs() as u64, map.dirty() as u64);
        let before = saver.out.len() as u64;

        saver.optional(0x8000, &[round as u8; 3]);
        let skipped = saver.out.len() as u64 - before;
        while let Some(run) = map.take_run(0) {
            saver.run(&memory, run.first, run.count);
        }
        assert_eq!(saver.out.len() as u64 - before - skipped, announced);
        if round == 4 {
            break;
        }
        for page in (round..PAGES).step_by(3 + round) {
            memory[page * PAGE_SIZE + 8 * round] ^= 0x5a;
            map.mark_range(page, 1);
        }
    }

    let stream = saver.registers().trailer();
    let (loader, result) = load(PAGES, &stream);
    assert_eq!(result, Ok(()));
    assert!(loader.memory == memory);
}

/// Unknown optional records are skipped wherever they may stand, whatever their length.
#[test]
fn optional_records_are_skipped() {
    let memory = memory(2, 5);
    let mut saver = Saver::new(2, registers(REGISTERS));
    let long = vec![0xa5; OPTIONAL_MAX as usize];
    let stream = saver
        .optional(0, b"")
        .optional(5, b"x")
        .run(&memory, 1, 1)
        .optional(u32::MAX, &long)
        .run(&memory, 0, 1)
        .registers()
        .optional(77, &registers(40))
        .optional(77, b"")
        .trailer();
    let (loader, result) = load(2, &stream);

    assert_eq!(result, Ok(()));
    assert!(loader.memory == memory);
}

/// The stream may be cut into pieces of any length.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn any_chunk_size() {
    let memory = memory(3, 2);
    let mut saver = Saver::new(3, registers(REGISTERS));
    let stream = saver
        .run(&memory, 0, 2)
        .optional(9, b"skip me")
        .run(&memory, 1, 2)
        .registers()
        .trailer();

    let near_page = PAGE_SIZE - 1..=PAGE_SIZE + 1;
    let large = [2 * PAGE_SIZE - 1, 2 * PAGE_SIZE + 108, 3 * PAGE_SIZE];
    let sizes = (1..=64).chain(511..=513).chain(near_page).chain(large);

    for size in sizes {
        let mut loader = Loader::new(3);
        let mut decoder = decoder(3, REGISTERS);

        for chunk in stream.chunks(size) {
            assert!(!decoder.is_done());
            assert_eq!(decoder.finish(), Err(Error::Truncated));
            assert_eq!(decoder.feed(chunk, &mut loader), Ok(()), "chunks of {size}");
            assert_eq!(decoder.feed(&[], &mut loader), Ok(()));
        }
        assert_eq!(decoder.finish(), Ok(()), "chunks of {size}");
        assert!(decoder.is_done());
        assert!(loader.memory == memory, "chunks of {size}");
        assert_eq!(loader.registers, Some(registers(REGISTERS)));
    }
}

/// Every beginning of an image is refused in the end.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn every_truncation_is_refused() {
    let stream = save(&memory(2, 9), registers(REGISTERS));
    let mut loader = Loader::new(2);
    let mut decoder = decoder(2, REGISTERS);

    for byte in &stream {
        assert_eq!(decoder.finish(), Err(Error::Truncated));
        assert!(!decoder.is_done());
        assert_eq!(
            decoder.feed(core::slice::from_ref(byte), &mut loader),
            Ok(())
        );
    }
    assert_eq!(decoder.finish(), Ok(()));

    // In one piece each: the headers, the registers and the trailer, and some bytes of pages.
    let end = 2 * PAGE_SIZE - 192;
    for len in (0..120)
        .chain((120..end).step_by(61 * STEP))
        .chain(end..stream.len())
    {
        refused(2, &stream[..len], Error::Truncated);
    }
}

/// A change of any byte of an image is detected. Of large pages, some bytes
/// are tried.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn every_corrupted_byte_is_refused() {
    let mut stream = save(&memory(2, 9), registers(REGISTERS));
    let pages = (IDENTITY_RECORD + RUN_OVERHEAD) as usize;
    let behind = pages + 2 * PAGE_SIZE;
    let inside = (pages..behind).step_by(STEP);

    for at in (0..pages).chain(inside).chain(behind..stream.len()) {
        let good = stream[at];

        for bad in (0..8)
            .map(|bit| good ^ 1 << bit)
            .chain([!good, good.wrapping_add(1)])
        {
            stream[at] = bad;
            let (_, result) = load(2, &stream);
            assert!(
                result.is_err(),
                "byte {at} is {bad:#x} in place of {good:#x}"
            );
        }
        stream[at] = good;
    }
    assert_eq!(load(2, &stream).1, Ok(()));
}

/// Each field of the identity has its own reason.
#[test]
fn bad_identity() {
    let stream = save(&memory(1, 0), registers(REGISTERS));

    for (at, why) in [
        (16, Error::BadMagic),
        (23, Error::BadMagic),
        (24, Error::BadVersion),
        (27, Error::BadVersion),
        (28, Error::BadPageSize),
        (31, Error::BadPageSize),
        (32, Error::BadStateSize),
        (39, Error::BadStateSize),
        (40, Error::BadFeatures),
        (47, Error::BadFeatures),
    ] {
        let mut bad = stream.clone();

        bad[at] ^= 0x10;
        refused(1, &bad, why);
        // It is noticed with the last byte of the identity.
        refused(1, &bad[..48], why);
        refused(1, &bad[..47], Error::Truncated);
    }
    // The image of a device of another size.
    refused(2, &stream, Error::BadStateSize);
}

/// A reader has the same version as the writer, and at least its features.
#[test]
fn versions_and_features() {
    let memory = memory(1, 0);
    let write = |version, features| {
        let mut saver = Saver::new(1, registers(REGISTERS));

        saver.identity = Identity {
            version,
            features,
            ..saver.identity
        };
        saver.out = saver.identity.record().to_vec();
        saver.run(&memory, 0, 1).registers().trailer()
    };
    let read = |version, features, stream: &[u8]| {
        let identity = Identity {
            version,
            features,
            ..Identity::new(PAGE)
        };
        let mut decoder = OwnDecoder::new(identity, REGISTERS, vec![0; 1]).unwrap();

        decoder
            .feed(stream, &mut Loader::new(1))
            .and_then(|()| decoder.finish())
    };

    assert_eq!(read(2, 0, &write(2, 0)), Ok(()));
    assert_eq!(read(2, 0, &write(1, 0)), Err(Error::BadVersion));
    assert_eq!(read(1, 0, &write(2, 0)), Err(Error::BadVersion));
    for (has, needs) in [(0, 0), (1, 0), (u64::MAX, 1 << 63), (5, 5), (5, 4)] {
        assert_eq!(read(1, has, &write(1, needs)), Ok(()), "{has} {needs}");
    }
    for (has, needs) in [(0, 1), (4, 5), (u64::MAX - 1, 1), (1, 1 << 32)] {
        let result = read(1, has, &write(1, needs));

        assert_eq!(result, Err(Error::BadFeatures), "{has} {needs}");
    }
}

/// The image of a device with as much memory in pages of another size.
#[test]
fn pages_of_another_size_are_refused() {
    fn identity<const OTHER: usize>(pages: usize) -> Vec<u8> {
        let state_size = (pages * PAGE_SIZE) as u64;

        stream::Identity::<OTHER>::new(state_size).record().to_vec()
    }

    for (page_size, image) in [
        (4 << 10, identity::<{ 4 << 10 }>(16)),
        (16 << 10, identity::<{ 16 << 10 }>(16)),
        (64 << 10, identity::<{ 64 << 10 }>(16)),
    ] {
        if page_size == PAGE_SIZE {
            refused(16, &image, Error::Truncated);
        } else {
            refused(16, &image, Error::BadPageSize);
        }
    }
}

/// Records in a wrong order, twice, or too early.
#[test]
fn bad_order() {
    let memory = memory(1, 0);
    let identity = Identity::new(PAGE).record().to_vec();
    let pages = pages_record(0, &memory);
    let registers = record(TAG_REGISTERS, 0, &registers(REGISTERS));
    let trailer = record(TAG_TRAILER, 0, &[0; TRAILER_LEN]);
    let optional = record(99, FLAG_OPTIONAL, b"data");

    for records in [
        vec![&pages],
        vec![&registers],
        vec![&trailer],
        vec![&optional],
        vec![&identity, &identity],
        vec![&identity, &pages, &identity],
        vec![&identity, &trailer],
        vec![&identity, &pages, &trailer],
        vec![&identity, &pages, &registers, &registers],
        vec![&identity, &pages, &registers, &pages],
        vec![&identity, &pages, &registers, &identity],
        vec![&identity, &pages, &registers, &optional, &pages],
    ] {
        let stream: Vec<u8> = records.into_iter().flatten().copied().collect();

        refused(1, &stream, Error::BadOrder);
    }
}

/// Tags and flags that are not defined.
#[test]
fn bad_tags_and_flags() {
    let identity = Identity::new(PAGE).record().to_vec();
    let behind = |record: Vec<u8>| [identity.clone(), record].concat();

    for tag in [0, 5, 6, 0x1_0001, u32::MAX] {
        for flags in [0, 2, 3, 1 << 31, u32::MAX] {
            refused(1, &record(tag, flags, b""), Error::BadTag);
            refused(1, &behind(record(tag, flags, b"")), Error::BadTag);
        }
    }
    for tag in [TAG_IDENTITY, TAG_PAGES, TAG_REGISTERS, TAG_TRAILER] {
        for flags in [FLAG_OPTIONAL, 2, 1 << 31, u32::MAX] {
            refused(1, &record(tag, flags, b""), Error::BadFlags);
            refused(1, &behind(record(tag, flags, b"")), Error::BadFlags);
        }
    }
}

/// Returns a header that declares `length` bytes.
fn header(tag: u32, flags: u32, length: u64) -> Vec<u8> {
    let mut header = record(tag, flags, b"");

    header[8..].copy_from_slice(&length.to_le_bytes());
    header
}

/// Lengths are refused with the header, before a byte of the payload arrives.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn bad_lengths() {
    let start = Identity::new(PAGE).record().to_vec();
    let loaded = {
        let mut saver = Saver::new(1, registers(REGISTERS));

        saver.run(&memory(1, 0), 0, 1).registers();
        saver.out
    };
    let lengths = |good: &[u64]| -> Vec<u64> {
        let one_off = |length: u64| [length, length.wrapping_sub(1), length.wrapping_add(1)];
        let some = [
            0,
            8,
            16,
            20,
            32,
            40,
            PAGE,
            8 + PAGE,
            8 + 2 * PAGE,
            8 + 64 * PAGE,
            8 + 65 * PAGE,
        ];
        let high = (0..64).map(|bit| 1 << bit);

        some.into_iter()
            .chain(high)
            .chain(u64::MAX - 9..=u64::MAX)
            .flat_map(one_off)
            .filter(|length| !good.contains(length))
            .collect()
    };
    let runs: Vec<u64> = (1..=64).map(|pages| 8 + pages * PAGE).collect();

    for length in lengths(&[32]) {
        refused(1, &header(TAG_IDENTITY, 0, length), Error::BadLength);
        refused(
            1,
            &[loaded.clone(), header(TAG_TRAILER, 0, length)].concat(),
            Error::BadLength,
        );
    }
    for length in lengths(&[REGISTERS as u64]) {
        refused(
            1,
            &[start.clone(), header(TAG_REGISTERS, 0, length)].concat(),
            Error::BadLength,
        );
    }
    for length in lengths(&runs) {
        refused(
            1,
            &[start.clone(), header(TAG_PAGES, 0, length)].concat(),
            Error::BadLength,
        );
    }
    for length in lengths(&[]) {
        let why = if length > OPTIONAL_MAX {
            Error::BadLength
        } else {
            Error::Truncated
        };
        refused(
            1,
            &[start.clone(), header(50, FLAG_OPTIONAL, length)].concat(),
            if length == 0 { Error::Truncated } else { why },
        );
    }
}

/// Pages that are not aligned, outside of the memory, or cross a boundary are refused with the
/// offset.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn bad_offsets() {
    let start = Identity::new(100 * PAGE).record().to_vec();
    let try_run = |offset: u64, pages: u64| {
        let stream = [start.as_slice(), &run_header::<PAGE_SIZE>(offset, pages)].concat();
        let (loader, result) = load(100, &stream);

        assert!(loader.memory.iter().all(|byte| *byte == 0xee));
        result.unwrap_err()
    };

    for (offset, pages) in [
        (1, 1),
        (8, 1),
        (PAGE - 1, 1),
        (PAGE / 2, 1),
        (100 * PAGE, 1),
        (99 * PAGE, 2),
        (64 * PAGE, 37),
        (63 * PAGE, 2),
        (PAGE, 64),
        (1 << 63, 1),
        (u64::MAX, 1),
        (u64::MAX - PAGE + 1, 1),
        (u64::MAX - PAGE + 1, 64),
        (u64::MAX - 64 * PAGE + 1, 64),
        (u64::MAX - 63 * PAGE + 1, 64),
    ] {
        assert_eq!(try_run(offset, pages), Error::BadOffset, "{offset} {pages}");
    }
    for (offset, pages) in [
        (0, 64),
        (0, 1),
        (PAGE, 63),
        (63 * PAGE, 1),
        (64 * PAGE, 36),
        (99 * PAGE, 1),
    ] {
        assert_eq!(try_run(offset, pages), Error::Truncated, "{offset} {pages}");
    }
}

/// The device can refuse its registers, and the error is permanent.
#[test]
fn bad_registers() {
    let stream = save(&memory(1, 0), registers(REGISTERS));
    let mut loader = Loader::new(1);
    let mut decoder = decoder(1, REGISTERS);

    loader.refuse = true;
    assert_eq!(decoder.feed(&stream, &mut loader), Err(Error::BadRegisters));
    loader.refuse = false;
    assert_eq!(decoder.feed(&stream, &mut loader), Err(Error::BadRegisters));
    assert_eq!(decoder.finish(), Err(Error::BadRegisters));
    assert_eq!(loader.registers, None);
}

/// The trailer must match the received data.
#[test]
fn bad_trailer() {
    let stream = save(&memory(2, 9), registers(REGISTERS));
    let end = stream.len();

    for (at, why) in [
        (end - 32, Error::BadDigest),
        (end - 25, Error::BadDigest),
        (end - 24, Error::BadTotals),
        (end - 17, Error::BadTotals),
        (end - 16, Error::BadTotals),
        (end - 9, Error::BadTotals),
        (end - 8, Error::BadTotals),
        (end - 1, Error::BadTotals),
        (end - 40, Error::BadLength),
        // A byte of a page and one of the registers.
        (PAGE_SIZE + 900, Error::BadDigest),
        (end - 50, Error::BadDigest),
    ] {
        let mut bad = stream.clone();

        bad[at] ^= 1;
        refused(2, &bad, why);
    }
}

/// Each page must arrive, and each one counts.
#[test]
fn missing_pages() {
    let memory = memory(3, 9);

    for (runs, result) in [
        (vec![], Err(Error::MissingPages)),
        (vec![(0, 2)], Err(Error::MissingPages)),
        (vec![(0, 1), (2, 1)], Err(Error::MissingPages)),
        (vec![(0, 2), (0, 2), (1, 1)], Err(Error::MissingPages)),
        (vec![(2, 1), (0, 2)], Ok(())),
        (vec![(2, 1), (0, 2), (1, 2)], Ok(())),
    ] {
        let mut saver = Saver::new(3, registers(REGISTERS));

        for (first, count) in runs {
            saver.run(&memory, first, count);
        }
        assert_eq!(load(3, &saver.registers().trailer()).1, result);
    }
}

/// Nothing may follow the trailer, in the same piece or later.
#[test]
fn trailing_bytes() {
    let stream = save(&memory(1, 9), registers(REGISTERS));

    for tail in [&[0][..], &[0; 16], &stream, &stream[..48]] {
        let mut loader = Loader::new(1);
        let mut decoder = decoder(1, REGISTERS);

        refused(1, &[&stream, tail].concat(), Error::Trailing);

        assert_eq!(decoder.feed(&stream, &mut loader), Ok(()));
        assert_eq!(decoder.finish(), Ok(()));
        assert_eq!(decoder.feed(&[], &mut loader), Ok(()));
        assert!(decoder.is_done());
        assert_eq!(decoder.feed(tail, &mut loader), Err(Error::Trailing));
        assert!(!decoder.is_done());
        assert_eq!(decoder.finish(), Err(Error::Trailing));
        assert_eq!(decoder.feed(&[], &mut loader), Err(Error::Trailing));
    }
}

/// Swapping two pages changes the digest, although the sum of their content is the same.
#[test]
fn swapped_pages() {
    let memory = memory(2, 9);
    let mut saver = Saver::new(2, registers(REGISTERS));
    let mut stream = saver
        .run(&memory, 0, 1)
        .run(&memory, 1, 1)
        .registers()
        .trailer();

    // Swap the offsets of both records.
    for byte in 48 + 16..48 + 24 {
        stream.swap(byte, byte + 24 + PAGE_SIZE);
    }
    refused(2, &stream, Error::BadDigest);
}

/// All errors have different messages.
#[test]
fn errors_have_words() {
    let errors = [
        Error::BadMagic,
        Error::BadVersion,
        Error::BadPageSize,
        Error::BadStateSize,
        Error::BadFeatures,
        Error::BadFlags,
        Error::BadTag,
        Error::BadLength,
        Error::BadOffset,
        Error::BadOrder,
        Error::BadRegisters,
        Error::BadDigest,
        Error::BadTotals,
        Error::MissingPages,
        Error::Trailing,
        Error::Truncated,
    ];
    let mut words: Vec<_> = errors.map(Error::as_str).to_vec();

    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), errors.len());
    assert!(words.iter().all(|words| !words.is_empty()));
}

/// A way to damage a stream.
#[derive(Clone, Debug)]
enum Damage {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Repeat(usize, usize),
    Swap(usize, usize),
}

impl Damage {
    /// Damages `stream`. Positions beyond the end start again at the beginning.
    fn apply(self, stream: &mut Vec<u8>) {
        let len = stream.len().max(1);
        let range = |at: usize, count: usize| at % len..(at % len + count).min(len);

        if stream.is_empty() {
            return;
        }
        match self {
            Self::Set(at, value) => stream[at % len] = value,
            Self::Insert(at, bytes) => {
                stream.splice(at % len..at % len, bytes);
            }
            Self::Remove(at, count) => {
                stream.drain(range(at, count));
            }
            Self::Repeat(at, count) => {
                let bytes = stream[range(at, count)].to_vec();

                stream.splice(at % len..at % len, bytes);
            }
            Self::Swap(one, other) => stream.swap(one % len, other % len),
        }
    }
}

/// Damages that prefer the places where records begin, and lengths of records.
fn damage() -> impl Strategy<Value = Damage> {
    let end = 2 * PAGE_SIZE;
    let at = prop_oneof![
        any::<usize>(),
        0..80usize,
        prop::sample::select(vec![
            0,
            16,
            48,
            64,
            72,
            end + 72,
            end + 88,
            end + 108,
            end + 124
        ]),
    ];
    let count = prop_oneof![
        0..40usize,
        prop::sample::select(vec![PAGE_SIZE, 24 + PAGE_SIZE, 24 + 2 * PAGE_SIZE, 36, 48])
    ];

    prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(at, value)| Damage::Set(at, value)),
        (at.clone(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (at.clone(), count.clone()).prop_map(|(at, count)| Damage::Remove(at, count)),
        (at.clone(), count).prop_map(|(at, count)| Damage::Repeat(at, count)),
        (at.clone(), at).prop_map(|(one, other)| Damage::Swap(one, other)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512 / (PAGE_SIZE / 4096) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Any pieces, any order of runs, pages again and optional records: the last content arrives.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn any_stream_in_any_pieces(
        pages in 1..140usize,
        rounds in prop::collection::vec((any::<usize>(), 1..64usize, any::<u8>()), 0..12),
        cuts in prop::collection::vec(1..2 * PAGE_SIZE + 808, 1..20),
    ) {
        let mut memory = memory(pages, 77);
        let mut saver = Saver::new(pages, registers(REGISTERS));

        for first in (0..pages).rev() {
            saver.run(&memory, first, 1);
        }
        for (first, count, value) in rounds {
            let first = first % pages;
            let word_end = (first / 64 + 1) * 64;
            let count = count.min(pages.min(word_end) - first);

            for page in first..first + count {
                memory[page * PAGE_SIZE + usize::from(value)] ^= value;
            }
            saver.run(&memory, first, count);
            saver.optional(1000 + u32::from(value), &vec![value; usize::from(value)]);
        }
        let stream = saver.registers().trailer();

        let mut loader = Loader::new(pages);
        let mut decoder = decoder(pages, REGISTERS);
        let mut rest = stream.as_slice();
        for cut in cuts.into_iter().cycle() {
            let (piece, behind) = rest.split_at(cut.min(rest.len()));

            prop_assert_eq!(decoder.feed(piece, &mut loader), Ok(()));
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(decoder.finish(), Ok(()));
        prop_assert!(loader.memory == memory);
        prop_assert_eq!(loader.registers, Some(registers(REGISTERS)));
    }

    /// A damaged stream is refused, unless the damage does not change the state.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn damage_is_noticed(
        damages in prop::collection::vec(damage(), 1..4),
        cut in 1..2 * PAGE_SIZE + 808,
    ) {
        let memory = memory(2, 9);
        let mut stream = save(&memory, registers(REGISTERS));
        let mut loader = Loader::new(2);
        let mut decoder = decoder(2, REGISTERS);

        for damage in damages {
            damage.apply(&mut stream);
        }

        let fed = stream.chunks(cut).try_for_each(|piece| decoder.feed(piece, &mut loader));
        prop_assert_eq!(fed.and(decoder.finish()), decoder.finish());
        if decoder.finish().is_ok() {
            prop_assert!(loader.memory == memory);
            prop_assert_eq!(loader.registers, Some(registers(REGISTERS)));
        }
    }

    /// The sizes of the pieces do not change the result, not even the reason of a refusal.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn pieces_do_not_change_the_reason(
        damages in prop::collection::vec(damage(), 0..3),
        cut in 1..600usize,
    ) {
        let mut stream = save(&memory(2, 9), registers(REGISTERS));

        for damage in damages {
            damage.apply(&mut stream);
        }

        let mut loader = Loader::new(2);
        let mut decoder = decoder(2, REGISTERS);
        for piece in stream.chunks(cut) {
            if decoder.feed(piece, &mut loader).is_err() {
                break;
            }
        }
        let (whole, result) = load(2, &stream);
        prop_assert_eq!(decoder.finish(), result);
        prop_assert!(loader.memory == whole.memory);
    }

    /// Noise is refused.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert!(load(1, &noise).1.is_err());
    }
}
