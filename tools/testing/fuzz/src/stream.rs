// SPDX-License-Identifier: GPL-2.0

//! Decoder of the stream, compared with a reader of whole streams that was written from the format
//! and shares no code with it.

use crate::Input;
use vfio_host_tests::stream::*;

/// Sizes of the memory in pages: none, few, and more than a record may have.
const PAGES: [usize; 4] = [0, 1, 2, 66];

/// The same for large pages, where so many would take too long.
const LARGE_PAGES: [usize; 4] = [0, 1, 2, 3];

/// Size of the registers in bytes.
const REGISTERS: [usize; 5] = [0, 1, 20, 32, MAX_REGISTERS];

/// Content of a stream.
enum Record<'a> {
    Identity,
    Pages(u64, &'a [u8]),
    Registers(&'a [u8]),
    Optional(u32, &'a [u8]),
    Trailer,
}

/// A device.
#[derive(Clone, PartialEq, Eq)]
struct Device<const PAGE: usize> {
    memory: Vec<u8>,
    registers: Vec<u8>,
    /// The device refuses registers that begin with this byte.
    refused: Option<u8>,
}

/// Returns the digest of bytes that starts at `digest`, as defined by the format.
fn digest_of(digest: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];

        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });

    digest_of_words(digest, words)
}

fn digest_of_words(digest: u64, words: impl Iterator<Item = u64>) -> u64 {
    words.fold(digest, |digest, word| {
        word.wrapping_sub(digest.rotate_left(5))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

/// Returns the digest of a page, as defined by the format.
fn digest_of_page(page: u64, bytes: &[u8]) -> u64 {
    let lanes = (0..4).map(|lane| {
        let words = (lane * 8..bytes.len()).step_by(32);

        digest_of_words(0x100 + page, words.map(|at| number(bytes, at)))
    });

    digest_of_words(0x100 + page, lanes).max(1)
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside"))
}

/// Correct trailer of the stream, if nothing else is wrong.
type Fixed = Option<Vec<u8>>;

/// Reads a whole stream into a device.
fn read<'a, const PAGE: usize>(
    stream: &'a [u8],
    device: &mut Device<PAGE>,
) -> Result<Vec<Record<'a>>, (Error, Fixed)> {
    let page_size = PAGE as u64;
    let mut records = Vec::new();
    let mut sent: Vec<Option<u64>> = vec![None; device.memory.len() / PAGE];
    let (mut rest, mut pages, mut digest) = (stream, 0, 0_u64);
    let stop = |error| Err((error, None));

    loop {
        let in_front = (stream.len() - rest.len()) as u64;
        let Some((header, behind)) = rest.split_at_checked(16) else {
            return stop(Error::Truncated);
        };
        let (tag, flags) = (number(header, 0) as u32, number(header, 0) >> 32);
        let length = number(header, 8);
        if (1..=4).contains(&tag) {
            if flags != 0 {
                return stop(Error::BadFlags);
            }
        } else if flags != 1 {
            return stop(Error::BadTag);
        }
        let registers = records.iter().any(|r| matches!(r, Record::Registers(_)));
        let in_order = match tag {
            1 => records.is_empty(),
            2 | 3 => !records.is_empty() && !registers,
            4 => registers,
            _ => !records.is_empty(),
        };
        if !in_order {
            return stop(Error::BadOrder);
        }
        let page_bytes = length.wrapping_sub(8);
        let good_length = match tag {
            1 | 4 => length == 32,
            2 => page_bytes % page_size == 0 && (1..=64).contains(&(page_bytes / page_size)),
            3 => length == device.registers.len() as u64,
            _ => length <= 1 << 20,
        };
        if !good_length {
            return stop(Error::BadLength);
        }
        let arrived = behind.len().min(length as usize);
        let whole = arrived as u64 == length;
        let payload = &behind[..arrived];
        rest = &behind[arrived..];

        match tag {
            1 | 3 | 4 if !whole => return stop(Error::Truncated),
            1 => {
                let why = [
                    (payload[..8] != *b"VMOCKST1", Error::BadMagic),
                    (number(payload, 8) as u32 != 1, Error::BadVersion),
                    (number(payload, 8) >> 32 != page_size, Error::BadPageSize),
                    (
                        number(payload, 16) != device.memory.len() as u64,
                        Error::BadStateSize,
                    ),
                    (number(payload, 24) != 0, Error::BadFeatures),
                ];
                if let Some((_, why)) = why.into_iter().find(|(bad, _)| *bad) {
                    return stop(why);
                }
                digest = digest.wrapping_add(digest_of(1, payload));
                records.push(Record::Identity);
            }
            2 => {
                if payload.len() < 8 {
                    return stop(Error::Truncated);
                }
                let (offset, content) = (number(payload, 0), &payload[8..]);
                let end = u128::from(offset) + u128::from(page_bytes);
                let group = 64 * u128::from(page_size);
                if offset % page_size != 0
                    || end > device.memory.len() as u128
                    || (end - 1) / group != u128::from(offset) / group
                {
                    return stop(Error::BadOffset);
                }
                // The part that has arrived is written.
                device.memory[offset as usize..][..content.len()].copy_from_slice(content);
                if !whole {
                    return stop(Error::Truncated);
                }
                for (page, content) in (offset / page_size..).zip(content.chunks(PAGE)) {
                    sent[page as usize] = Some(digest_of_page(page, content));
                }
                pages += page_bytes / page_size;
                records.push(Record::Pages(offset, content));
            }
            3 => {
                // An empty payload is complete with the next bytes.
                if payload.is_empty() && rest.is_empty() {
                    return stop(Error::Truncated);
                }
                if device.refused.is_some() && payload.first().copied() == device.refused {
                    return stop(Error::BadRegisters);
                }
                device.registers.copy_from_slice(payload);
                digest = digest.wrapping_add(digest_of(3, payload));
                records.push(Record::Registers(payload));
            }
            4 => {
                if sent.contains(&None) {
                    return stop(Error::MissingPages);
                }
                let digest = sent
                    .iter()
                    .flatten()
                    .fold(digest, |a, b| a.wrapping_add(*b));
                let should = [digest, pages, records.len() as u64, in_front];
                let should: Vec<u8> = should.into_iter().flat_map(u64::to_le_bytes).collect();
                let error = if payload[8..] != should[8..] {
                    Error::BadTotals
                } else if payload != should {
                    Error::BadDigest
                } else if !rest.is_empty() {
                    Error::Trailing
                } else {
                    records.push(Record::Trailer);
                    return Ok(records);
                };
                let trailer = stream.len() - rest.len() - 32;
                return Err((error, Some([&stream[..trailer], &should].concat())));
            }
            _ if !whole => return stop(Error::Truncated),
            tag => records.push(Record::Optional(tag, payload)),
        }
    }
}

/// Writes records like a device.
fn write<const PAGE: usize>(records: &[Record<'_>], device: &Device<PAGE>) -> Vec<u8> {
    let identity = Identity::<PAGE>::new(device.memory.len() as u64);
    let mut digests = Digests::new(vec![0; device.memory.len() / PAGE]);
    let mut tally = Tally::default();
    let mut out = Vec::new();

    for record in records {
        match record {
            Record::Identity => {
                out.extend(identity.record());
                tally.record(IDENTITY_RECORD);
            }
            Record::Pages(offset, content) => {
                let pages = (content.len() / PAGE) as u64;

                out.extend(run_header::<PAGE>(*offset, pages));
                out.extend(*content);
                tally.run::<PAGE>(pages);
                for (page, content) in (offset / PAGE as u64..).zip(content.chunks(PAGE)) {
                    digests.set(page, page_digest(page, groups(content)));
                }
            }
            Record::Registers(registers) => {
                out.extend(registers_header(registers.len()));
                out.extend(*registers);
                tally.record(registers_record(registers.len()));
            }
            Record::Optional(tag, payload) => {
                let record = optional(*tag, payload);

                out.extend(&record);
                tally.record(record.len() as u64);
            }
            Record::Trailer => {
                let digest = digests.image(&identity, registers_digest(&device.registers));

                out.extend(Trailer { digest, tally }.record());
            }
        }
    }
    out
}

fn optional(tag: u32, payload: &[u8]) -> Vec<u8> {
    let kind = u64::from(FLAG_OPTIONAL) << 32 | u64::from(tag);

    [
        &kind.to_le_bytes(),
        &(payload.len() as u64).to_le_bytes(),
        payload,
    ]
    .concat()
}

impl<const PAGE: usize> Sink for Device<PAGE> {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let first = offset as usize;

        assert!(!bytes.is_empty(), "an empty write");
        assert_eq!(
            first / PAGE,
            (first + bytes.len() - 1) / PAGE,
            "beyond a page"
        );
        self.memory[first..first + bytes.len()].copy_from_slice(bytes);
    }

    fn page_digest(&self, page: u64) -> u64 {
        let first = page as usize * PAGE;

        page_digest(page, groups(&self.memory[first..first + PAGE]))
    }

    fn registers(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.refused.is_some() && bytes.first().copied() == self.refused {
            return Err(Error::BadRegisters);
        }
        self.registers.copy_from_slice(bytes);
        Ok(())
    }
}

/// Feeds a stream in pieces of these lengths, repeatedly.
fn decode<const PAGE: usize>(
    stream: &[u8],
    device: &mut Device<PAGE>,
    cuts: &[usize],
) -> Result<(), Error> {
    let (pages, registers) = (device.memory.len() / PAGE, device.registers.len());
    let table = vec![0; pages];
    let identity = Identity::new((pages * PAGE) as u64);
    let decoder = Decoder::<_, PAGE>::new(identity, registers, table);
    let mut decoder = decoder.expect("it fits");
    let mut rest = stream;
    let mut cuts = cuts.iter().cycle();

    while !rest.is_empty() {
        let cut = cuts.next().map_or(rest.len(), |cut| rest.len().min(*cut));
        let (piece, behind) = rest.split_at(cut);

        rest = behind;
        if let Err(error) = decoder.feed(piece, device) {
            // The error is permanent.
            assert_eq!(decoder.feed(rest, device), Err(error));
            assert_eq!(decoder.feed(&[], device), Err(error));
            assert_eq!(decoder.finish(), Err(error));
            assert!(!decoder.is_done());
            return Err(error);
        }
    }
    assert_eq!(decoder.is_done(), decoder.finish().is_ok());
    decoder.finish()
}

/// Compares both on a stream in these pieces. If it is refused, returns the fix for its trailer.
fn compare<const PAGE: usize>(
    stream: &[u8],
    new: &Device<PAGE>,
    cuts: &[usize],
) -> Result<(), Fixed> {
    let (mut model, mut device) = (new.clone(), new.clone());
    let read = read(stream, &mut model);
    let decoded = decode(stream, &mut device, cuts);

    assert_eq!(decoded, read.as_ref().map(drop).map_err(|error| error.0));
    assert!(device.memory == model.memory, "different memory");
    assert!(device.registers == model.registers, "different registers");
    match read {
        Ok(records) => {
            assert!(
                write(&records, &device) == stream,
                "it is written otherwise"
            );
            Ok(())
        }
        Err((_, fixed)) => Err(fixed),
    }
}

/// Returns a device, and the lengths of the pieces of its stream.
fn device<const PAGE: usize>(input: &mut Input<'_>) -> (Device<PAGE>, Vec<usize>) {
    let pages = input.one_of(if PAGE == 4096 { &PAGES } else { &LARGE_PAGES });
    let registers = input.one_of(&REGISTERS);
    let cuts = (0..input.below(5)).map(|_| match input.byte() {
        small @ 0..=127 => usize::from(small) + 1,
        page @ 128..=191 => PAGE + usize::from(page) - 160,
        large => usize::from(large) * 61,
    });
    let cuts = cuts.collect();
    let device = Device {
        memory: vec![0xee; pages * PAGE],
        registers: vec![0xdd; registers],
        refused: input.bool().then_some(0x80),
    };

    (device, cuts)
}

/// Returns an offset at the beginning, at the end of a group, or at the end of all numbers.
fn near<const PAGE: usize>(input: &mut Input<'_>) -> u64 {
    let page = PAGE as u64;
    let near = input.one_of(&[0, 62 * page, 0_u64.wrapping_sub(4 * page)]);

    near.wrapping_add(input.below(6) as u64 * page)
}

/// Calls a test for pages of the size that the input begins with, mostly the smallest.
macro_rules! with_page_size {
    ($input:ident, $test:ident) => {
        match $input.below(16) {
            0 => $test::<{ 64 << 10 }>($input),
            1 => $test::<{ 16 << 10 }>($input),
            _ => $test::<{ 4 << 10 }>($input),
        }
    };
}

/// Tests any bytes, headers, numbers and pages after none, some or all of the beginning of a valid
/// stream. If only the trailer is wrong, or has data after it, the correct one is tested as well.
pub(crate) fn any_bytes(data: &[u8]) {
    let mut input = Input(data);

    with_page_size!(input, any_bytes_of)
}

fn any_bytes_of<const PAGE: usize>(mut input: Input<'_>) {
    let page = PAGE as u64;
    let (new, cuts) = device::<PAGE>(&mut input);
    let pages: Vec<Record<'_>> = (0..)
        .zip(new.memory.chunks(RUN_PAGES as usize * PAGE))
        .map(|(group, content)| Record::Pages(group * RUN_PAGES * page, content))
        .collect();
    let mut records = vec![Record::Identity];
    records.extend(pages);
    records.push(Record::Registers(&new.registers));
    records.truncate(input.below(records.len() + 1));
    let mut stream = write(&records, &new);

    while !input.is_empty() {
        match input.below(8) {
            0 => {
                let count = input.below(100);

                stream.extend(input.bytes(count));
            }
            1 => stream.extend(input.number().to_le_bytes()),
            2 => stream.extend(near::<PAGE>(&mut input).to_le_bytes()),
            3 => stream.resize(stream.len() + input.below(3) * PAGE, input.byte()),
            4 => stream.resize(stream.len() + input.below(2100), input.byte()),
            _ => {
                let tag = [2, 2, 2, 0, 1, 3, 4, 5][input.below(8)];
                let skipped = !(TAG_IDENTITY..=TAG_TRAILER).contains(&tag);
                let flags = match input.below(8) {
                    0 => input.below(4) as u32,
                    _ => u32::from(skipped),
                };
                let length = match input.below(8) {
                    0 => input.number(),
                    1 => OPTIONAL_MAX + 1,
                    2 => OFFSET_LEN as u64 + input.one_of(&[0, 1, 63, 64, 65]) * page,
                    3 => OPTIONAL_MAX,
                    _ => match tag {
                        TAG_PAGES => OFFSET_LEN as u64 + (1 + input.below(3) as u64) * page,
                        TAG_REGISTERS => new.registers.len() as u64,
                        _ if skipped => input.below(40) as u64,
                        _ => 32,
                    },
                };

                stream.extend(u32::to_le_bytes(tag));
                stream.extend(flags.to_le_bytes());
                stream.extend(length.to_le_bytes());
                if tag == TAG_PAGES && input.below(4) > 0 {
                    stream.extend(near::<PAGE>(&mut input).to_le_bytes());
                }
            }
        }
    }

    if let Err(Some(mut fixed)) = compare(&stream, &new, &cuts) {
        assert_eq!(compare(&fixed, &new, &cuts), Ok(()));
        fixed.push(0);
        assert!(compare(&fixed, &new, &cuts).is_err());
    }
}

/// Tests the stream of a device, with damages.
pub(crate) fn damaged_streams(data: &[u8]) {
    let mut input = Input(data);

    with_page_size!(input, damaged_streams_of)
}

fn damaged_streams_of<const PAGE: usize>(mut input: Input<'_>) {
    let (new, cuts) = device::<PAGE>(&mut input);
    let pages = new.memory.len() / PAGE;
    let registers: Vec<u8> = (0..new.registers.len()).map(|at| at as u8).collect();
    let mut memory = vec![0; pages * PAGE];
    // Each page once, so that the stream is complete, and some of them again.
    let mut runs: Vec<(usize, usize)> = (0..pages)
        .step_by(RUN_PAGES as usize)
        .map(|first| (first, (pages - first).min(RUN_PAGES as usize)))
        .collect();
    if pages > 0 {
        for _ in 0..input.below(4) {
            let first = input.below(pages);
            let group = (first / RUN_PAGES as usize + 1) * RUN_PAGES as usize;
            let count = input.below(group.min(pages) - first) + 1;

            runs.push((first, count));
        }
    }

    let mut contents = Vec::new();
    for (round, (first, count)) in runs.iter().enumerate() {
        let mut content = vec![0; count * PAGE];
        for (index, word) in (0..).zip(content.chunks_exact_mut(8)) {
            word.copy_from_slice(&pattern_word(round as u64, index).to_le_bytes());
        }

        memory[first * PAGE..][..content.len()].copy_from_slice(&content);
        contents.push(((first * PAGE) as u64, content));
    }
    let mut records = vec![Record::Identity];
    for (offset, content) in &contents {
        if input.below(8) == 1 {
            records.push(Record::Optional(100, input.bytes(3)));
        }
        records.push(Record::Pages(*offset, content));
    }
    records.extend([Record::Registers(&registers), Record::Trailer]);
    let mut sent = new.clone();
    sent.registers.clone_from(&registers);
    let mut stream = write(&records, &sent);

    let mut device = new.clone();
    assert_eq!(decode(&stream, &mut device, &cuts), Ok(()));
    assert!(device.memory == memory, "another memory has arrived");
    assert!(
        device.registers == registers,
        "other registers have arrived"
    );

    // Offsets of records, for damages of headers.
    let mut starts = vec![0, IDENTITY_RECORD as usize];
    for (_, content) in &contents {
        starts.push(starts[starts.len() - 1] + RUN_OVERHEAD as usize + content.len());
    }
    for _ in 0..input.below(4) {
        let at = (input.one_of(&starts) + input.below(100)).min(stream.len());
        let count = match input.byte() {
            small @ 0..=99 => usize::from(small),
            100..=199 => PAGE,
            _ => RUN_OVERHEAD as usize + PAGE,
        };
        let range = at..(at + count).min(stream.len());

        match input.below(5) {
            0 => {
                let bytes = input.bytes(range.len().min(16));

                stream[range.start..][..bytes.len()].copy_from_slice(bytes);
            }
            1 => drop(stream.splice(at..at, input.bytes(count).iter().copied())),
            2 => drop(stream.drain(range)),
            3 => {
                let bytes = stream[range].to_vec();

                drop(stream.splice(at..at, bytes));
            }
            _ => stream.truncate(at),
        }
    }
    if let Err(Some(fixed)) = compare(&stream, &new, &cuts) {
        assert_eq!(compare(&fixed, &new, &cuts), Ok(()));
    }
}
