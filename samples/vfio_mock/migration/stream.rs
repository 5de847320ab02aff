// SPDX-License-Identifier: GPL-2.0

//! The migration stream: its records, its digest, and the decoder.
//!
//! This file is pure: it uses `core` alone, so that the same file runs in the kernel, under KUnit
//! and in host tests. The caller provides the memory, the lock and the page size.
//!
//! # Format
//!
//! All numbers are little-endian. The stream is a sequence of records. A record is a header of
//! [`HEADER_LEN`] bytes and a payload. The header is a tag (u32), flags (u32) and the length of the
//! payload in bytes (u64).
//!
//! 1. [`TAG_IDENTITY`], first, once: [`Identity`].
//! 2. [`TAG_PAGES`], any number: the offset in the state memory (u64) and the content of 1 to
//!    [`RUN_PAGES`] pages. The pages of a record do not cross a multiple of [`RUN_PAGES`] pages. A
//!    page may be sent again, the last content wins. Each page is sent at least once.
//! 3. [`TAG_REGISTERS`], once: the device registers. No pages follow.
//! 4. [`TAG_TRAILER`], last, once: [`Trailer`]. Nothing follows.
//!
//! The records above have no flags set. A record with an unknown tag and the flags
//! [`FLAG_OPTIONAL`], of at most [`OPTIONAL_MAX`] bytes, may stand anywhere between the first and
//! the last record, and a reader skips it. All other records are refused.
//!
//! # Page size
//!
//! The page size is that of the kernel that runs the device: `PAGE` bytes, a constant of the types
//! and functions below. It is part of the identity. A [`Decoder`] refuses a stream with another
//! page size: [`Error::BadPageSize`].
//!
//! # Digest
//!
//! The digest in the trailer is the wrapping sum of the digests of all pages, of the registers and
//! of the identity. A sum can be updated while pages are sent again, and in any order. It detects
//! corruption and programming errors. It does not detect forgery.
//!
//! A page has [`LANES`] lanes, each with every fourth word. The digest of a page is the digest of
//! the digests of its lanes.

use core::ops::DerefMut;

/// Maximum number of pages of a record. The pages of a record do not cross a multiple of it.
pub const RUN_PAGES: u64 = 64;

/// The length of a record header.
pub const HEADER_LEN: usize = 16;

/// The length of the payload of the identity record.
pub const IDENTITY_LEN: usize = 32;

/// The length of the payload of the trailer record.
pub const TRAILER_LEN: usize = 32;

/// The length of the offset in front of the pages of a pages record.
pub const OFFSET_LEN: usize = 8;

/// The most bytes of device registers that a [`Decoder`] can take.
pub const MAX_REGISTERS: usize = 1536;

/// The most bytes of the payload of an optional record.
pub const OPTIONAL_MAX: u64 = 1 << 20;

/// The tag of the identity record.
pub const TAG_IDENTITY: u32 = 1;

/// The tag of a pages record.
pub const TAG_PAGES: u32 = 2;

/// The tag of the registers record.
pub const TAG_REGISTERS: u32 = 3;

/// The tag of the trailer record.
pub const TAG_TRAILER: u32 = 4;

/// The flag of a record that a reader skips if its tag is unknown.
pub const FLAG_OPTIONAL: u32 = 1 << 0;

/// The magic number of the identity, which reads as `VMOCKST1`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMOCKST1");

/// The version of the format.
pub const VERSION: u32 = 1;

/// The size of the identity record with its header.
pub const IDENTITY_RECORD: u64 = (HEADER_LEN + IDENTITY_LEN) as u64;

/// The size of the trailer record with its header.
pub const TRAILER_RECORD: u64 = (HEADER_LEN + TRAILER_LEN) as u64;

/// The length of header and offset of a pages record.
pub const RUN_OVERHEAD: u64 = (HEADER_LEN + OFFSET_LEN) as u64;

/// The length of the longest payload that is collected before it is parsed.
const BUFFER_LEN: usize = MAX_REGISTERS;

/// The odd multiplier of the digest and increment of the pattern: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The start value of the digest of the identity.
const DIGEST_IDENTITY: u64 = 1;

/// The start value of the digest of the registers.
const DIGEST_REGISTERS: u64 = 3;

/// The start value of the digest of page 0. That of each next page is one higher.
const DIGEST_PAGE: u64 = 0x100;

/// The number of digests among which the words of a page are distributed in turn.
pub const LANES: usize = 4;

/// The number of words of a page that are added at once: 64 bytes, a line of most caches.
pub const GROUP: usize = 2 * LANES;

/// Returns the page size in bytes. The build fails if the format does not support it.
const fn page_size<const PAGE: usize>() -> u64 {
    const {
        assert!(PAGE.is_power_of_two());
        // A page consists of whole groups of words.
        assert!(PAGE % (8 * GROUP) == 0);
        // The identity has 32 bits for the page size.
        assert!(PAGE as u64 <= u32::MAX as u64);
    }
    PAGE as u64
}

/// Returns the size of a pages record of `pages` pages with its header.
pub const fn run_record<const PAGE: usize>(pages: u64) -> u64 {
    run_records::<PAGE>(1, pages)
}

/// Returns the size of `runs` pages records with their headers that have `pages` pages together.
pub const fn run_records<const PAGE: usize>(runs: u64, pages: u64) -> u64 {
    let overhead = runs.saturating_mul(RUN_OVERHEAD);

    overhead.saturating_add(pages.saturating_mul(page_size::<PAGE>()))
}

/// Returns the size of a registers record with its header.
pub const fn registers_record(len: usize) -> u64 {
    HEADER_LEN.saturating_add(len) as u64
}

/// The reason why a stream is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The identity is not that of a mock device.
    BadMagic,

    /// The version of the format is unknown.
    BadVersion,

    /// The pages have another size.
    BadPageSize,

    /// The state memory has another size.
    BadStateSize,

    /// The stream needs an unknown feature.
    BadFeatures,

    /// A record with a known tag has flags.
    BadFlags,

    /// The tag is unknown and the record is not optional.
    BadTag,

    /// The length of a record does not fit its tag.
    BadLength,

    /// The pages of a record are not aligned, not inside the memory or cross a boundary.
    BadOffset,

    /// A record is out of order.
    BadOrder,

    /// The device refuses the registers.
    BadRegisters,

    /// The digest differs from that of the trailer.
    BadDigest,

    /// The totals differ from those of the trailer.
    BadTotals,

    /// A page was never sent.
    MissingPages,

    /// Something follows the trailer.
    Trailing,

    /// The stream ends before the end of the trailer.
    Truncated,
}

impl Error {
    /// Returns the reason in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadMagic => "not a stream of a mock device",
            Self::BadVersion => "unknown version of the format",
            Self::BadPageSize => "wrong page size",
            Self::BadStateSize => "wrong state size",
            Self::BadFeatures => "unknown feature",
            Self::BadFlags => "flags on a record that has none",
            Self::BadTag => "unknown record that is not optional",
            Self::BadLength => "wrong length of a record",
            Self::BadOffset => "pages at a wrong offset",
            Self::BadOrder => "record out of order",
            Self::BadRegisters => "wrong device registers",
            Self::BadDigest => "wrong digest",
            Self::BadTotals => "wrong totals",
            Self::MissingPages => "pages missing",
            Self::Trailing => "data after the trailer",
            Self::Truncated => "stream not complete",
        }
    }
}

/// Returns the bytes of little-endian `words`, as far as they fit.
fn encode<const N: usize>(words: &[u64]) -> [u8; N] {
    let mut bytes = [0; N];

    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Returns the little-endian word that starts with `bytes`, padded with zeros.
#[inline]
fn word(bytes: &[u8]) -> u64 {
    if let Some(word) = bytes.first_chunk() {
        return u64::from_le_bytes(*word);
    }
    let mut word = [0; 8];

    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

/// Returns the little-endian words of `bytes`, the last one padded with zeros.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks(8).map(word)
}

/// Returns the little-endian words of `bytes`, for [`page_digest`]. Words that do not fill a group
/// are left out.
pub fn groups(bytes: &[u8]) -> impl Iterator<Item = [u64; GROUP]> + '_ {
    // Arrays, so that no bounds are checked in the loop.
    let groups = bytes
        .chunks_exact(8 * GROUP)
        .filter_map(<[u8]>::first_chunk);

    groups.map(|group: &[u8; 8 * GROUP]| {
        core::array::from_fn(|index| word(group.get(8 * index..).unwrap_or_default()))
    })
}

/// Returns two numbers of 32 bits as one word.
const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | ((high as u64) << 32)
}

/// Returns the first word of the header of a record without flags.
const fn tag_word(tag: u32) -> u64 {
    pair(tag, 0)
}

/// Returns the word of the pattern of `seed` at `index`, that is, at byte offset `8 * index`.
///
/// The device fills its memory with these words, little-endian.
pub const fn pattern_word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN));

    z ^= z >> 30;
    z = z.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 27;
    z = z.wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A digest in progress.
///
/// Each step is a bijection of the previous value, so a change of one word always changes the
/// digest. A multiplication leaves the highest bit in place, so the rotation moves it down. Without
/// it, two words with that bit changed would cancel each other. The digest detects corruption, it
/// is not a cryptographic one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Starts a digest at `start`, which differs for each kind of content.
    pub const fn new(start: u64) -> Self {
        Self(start)
    }

    /// Adds the next word.
    ///
    /// The word is the first operand, so that compilers load the words of all lanes before they
    /// compute. An emulated CPU sets its flags at a memory access, and is much faster that way.
    #[inline]
    pub const fn add(&mut self, word: u64) {
        self.0 = word
            .wrapping_sub(self.0.rotate_left(5))
            .wrapping_mul(GOLDEN);
    }

    /// Returns the digest of the words added so far.
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// Returns the digest of `words` that starts at `start`.
#[inline]
pub fn digest(start: u64, words: impl Iterator<Item = u64>) -> u64 {
    let mut digest = Digest::new(start);

    words.for_each(|word| digest.add(word));
    digest.value()
}

/// The digest of a page in progress.
///
/// Each lane is a digest of its own, so that the steps of different lanes can overlap.
#[derive(Clone, Copy, Debug)]
pub struct PageDigest {
    /// The start value.
    start: u64,

    /// The digests of the lanes.
    lanes: [Digest; LANES],
}

impl PageDigest {
    /// Starts the digest of page `page`.
    #[inline]
    pub const fn new(page: u64) -> Self {
        let start = page.wrapping_add(DIGEST_PAGE);

        Self {
            start,
            lanes: [Digest::new(start); LANES],
        }
    }

    /// Adds the next words.
    #[inline]
    pub fn add(&mut self, words: [u64; GROUP]) {
        for words in words.chunks_exact(LANES) {
            for (lane, word) in self.lanes.iter_mut().zip(words) {
                lane.add(*word);
            }
        }
    }

    /// Returns the digest of the words added so far.
    ///
    /// It is never 0, which means that a page was not sent. 1 is returned in that case.
    pub fn value(self) -> u64 {
        digest(self.start, self.lanes.into_iter().map(Digest::value)).max(1)
    }
}

/// Returns the digest of page `page` with the content `words`.
#[inline]
pub fn page_digest(page: u64, words: impl Iterator<Item = [u64; GROUP]>) -> u64 {
    let mut digest = PageDigest::new(page);

    words.for_each(|words| digest.add(words));
    digest.value()
}

/// Returns the digest of the device registers.
pub fn registers_digest(registers: &[u8]) -> u64 {
    digest(DIGEST_REGISTERS, words(registers))
}

/// The digests of all pages and their sum.
///
/// # Invariants
///
/// - `total` is the wrapping sum of `table`.
/// - `loaded` is the number of words in `table` that are not 0.
pub struct Digests<S: DerefMut<Target = [u64]>> {
    /// The digest of the last content of each page that was sent, 0 for a page not sent yet.
    table: S,

    /// The sum of the digests.
    total: u64,

    /// The number of pages that were sent.
    loaded: usize,
}

impl<S: DerefMut<Target = [u64]>> Digests<S> {
    /// Creates the digests of as many pages as `table` has words, none of them sent yet. The words
    /// must be 0.
    pub fn new(table: S) -> Self {
        // INVARIANT: All words of the table are 0.
        Self {
            table,
            total: 0,
            loaded: 0,
        }
    }

    /// Sets the digest of `page`. A page outside of the table is ignored.
    pub fn set(&mut self, page: u64, digest: u64) {
        let Some(entry) = usize::try_from(page)
            .ok()
            .and_then(|page| self.table.get_mut(page))
        else {
            return;
        };
        let old = core::mem::replace(entry, digest);

        // INVARIANT: The old digest is replaced by the new one in the sum and in the count. The
        // count includes the old digest, so it does not wrap.
        self.total = self.total.wrapping_sub(old).wrapping_add(digest);
        self.loaded = self
            .loaded
            .wrapping_sub(usize::from(old != 0))
            .wrapping_add(usize::from(digest != 0));
    }

    /// Returns the sum of the digests of all pages.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns whether each page was sent at least once.
    pub fn complete(&self) -> bool {
        self.loaded == self.table.len()
    }

    /// Returns the digest of the whole image for the trailer. `registers_digest` is the return
    /// value of [`registers_digest`].
    pub fn image<const PAGE: usize>(
        &self,
        identity: &Identity<PAGE>,
        registers_digest: u64,
    ) -> u64 {
        self.total
            .wrapping_add(identity.digest())
            .wrapping_add(registers_digest)
    }
}

/// Totals of the records that were sent or have arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The number of records.
    pub records: u64,

    /// The size in bytes of the records with their headers.
    pub bytes: u64,

    /// The number of pages. A page that is sent again counts again.
    pub pages: u64,
}

impl Tally {
    /// Counts a record of `bytes` bytes with its header.
    pub const fn record(&mut self, bytes: u64) {
        self.records = self.records.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(bytes);
    }

    /// Counts a record of `pages` pages.
    pub const fn run<const PAGE: usize>(&mut self, pages: u64) {
        self.record(run_record::<PAGE>(pages));
        self.pages = self.pages.wrapping_add(pages);
    }
}

/// The identity of a stream: the kind of device that wrote it, with pages of `PAGE` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<const PAGE: usize> {
    /// The version of the format.
    pub version: u32,

    /// The size of the state memory in bytes.
    pub state_size: u64,

    /// A bit for each feature that a reader needs; or, of a reader, for each one that it has.
    pub features: u64,
}

impl<const PAGE: usize> Identity<PAGE> {
    /// Returns the identity of a device with `state_size` bytes of memory and without features.
    pub const fn new(state_size: u64) -> Self {
        Self {
            version: VERSION,
            state_size,
            features: 0,
        }
    }

    /// Returns the words of the payload: magic, version and page size, state size, features.
    const fn payload(&self) -> [u64; 4] {
        let page = page_size::<PAGE>() as u32;

        [
            MAGIC,
            pair(self.version, page),
            self.state_size,
            self.features,
        ]
    }

    /// Returns the record with its header.
    pub fn record(&self) -> [u8; IDENTITY_RECORD as usize] {
        let [magic, version, state_size, features] = self.payload();

        encode(&[
            tag_word(TAG_IDENTITY),
            IDENTITY_LEN as u64,
            magic,
            version,
            state_size,
            features,
        ])
    }

    /// Returns the digest of the payload.
    pub fn digest(&self) -> u64 {
        digest(DIGEST_IDENTITY, self.payload().into_iter())
    }

    /// Checks that a device with this identity can read a stream with the identity in `payload`.
    /// Returns that of the stream.
    fn check(&self, payload: &[u8]) -> Result<Self, Error> {
        let [magic, version, state_size, features] = read(payload);

        if magic != MAGIC {
            return Err(Error::BadMagic);
        }
        if version as u32 != self.version {
            return Err(Error::BadVersion);
        }
        if version >> 32 != page_size::<PAGE>() {
            return Err(Error::BadPageSize);
        }
        if state_size != self.state_size {
            return Err(Error::BadStateSize);
        }
        if features & !self.features != 0 {
            return Err(Error::BadFeatures);
        }
        Ok(Self { features, ..*self })
    }
}

/// The trailer of a stream: it marks the image complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The digest of the whole image, see [`Digests::image`].
    pub digest: u64,

    /// The totals of all records before the trailer.
    pub tally: Tally,
}

impl Trailer {
    /// Returns the record with its header.
    pub fn record(&self) -> [u8; TRAILER_RECORD as usize] {
        encode(&[
            tag_word(TAG_TRAILER),
            TRAILER_LEN as u64,
            self.digest,
            self.tally.pages,
            self.tally.records,
            self.tally.bytes,
        ])
    }

    /// Reads the payload of the record.
    fn read(payload: &[u8]) -> Self {
        let [digest, pages, records, bytes] = read(payload);

        Self {
            digest,
            tally: Tally {
                records,
                bytes,
                pages,
            },
        }
    }
}

/// Returns header and offset of a record of `pages` pages that start at byte `offset`.
pub fn run_header<const PAGE: usize>(offset: u64, pages: u64) -> [u8; RUN_OVERHEAD as usize] {
    let length = run_record::<PAGE>(pages) - HEADER_LEN as u64;

    encode(&[tag_word(TAG_PAGES), length, offset])
}

/// Returns the header of a record of `len` bytes of device registers.
pub fn registers_header(len: usize) -> [u8; HEADER_LEN] {
    encode(&[tag_word(TAG_REGISTERS), len as u64])
}

/// Returns the first words of `bytes`, padded with 0.
fn read<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut out = [0; N];

    for (out, word) in out.iter_mut().zip(words(bytes)) {
        *out = word;
    }
    out
}

/// Destination of a [`Decoder`].
pub trait Sink {
    /// Writes `bytes` to byte `offset` of the state memory.
    ///
    /// The range is inside the memory, not empty, and inside one page.
    fn write(&mut self, offset: u64, bytes: &[u8]);

    /// Returns the [`page_digest`] of the current content of a page.
    fn page_digest(&self, page: u64) -> u64;

    /// Writes a whole page and returns its [`page_digest`].
    fn write_page(&mut self, page: u64, bytes: &[u8]) -> u64 {
        self.write(page * bytes.len() as u64, bytes);
        self.page_digest(page)
    }

    /// Checks the device registers and keeps them.
    ///
    /// # Errors
    ///
    /// The decoder returns the error from then on, like its own errors.
    fn registers(&mut self, bytes: &[u8]) -> Result<(), Error>;
}

/// The part of the stream that a [`Decoder`] expects next.
#[derive(Clone, Copy)]
enum Expect {
    /// The header of a record.
    Header,

    /// The payload of the identity record.
    Identity,

    /// The offset of a pages record with this many bytes of pages.
    Offset(u64),

    /// Bytes of pages: offset and number.
    Pages(u64, u64),

    /// The payload of the registers record.
    Registers,

    /// This many bytes of an optional record.
    Skip(u64),

    /// The payload of the trailer record.
    Trailer,

    /// Nothing: the stream is complete.
    End,
}

/// The records that may come next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The identity only.
    Identity,

    /// Pages and registers.
    Pages,

    /// The trailer only.
    Trailer,
}

/// Reads a stream of a device with pages of `PAGE` bytes, in pieces of any length.
///
/// Each length is checked before it is used, and nothing is allocated. After the first error, each
/// call fails with it.
pub struct Decoder<S: DerefMut<Target = [u64]>, const PAGE: usize> {
    /// The identity of the device, and once it has arrived, that of the stream.
    identity: Identity<PAGE>,

    /// The length that the registers must have.
    registers_len: usize,

    /// The digests of the pages that have arrived.
    digests: Digests<S>,

    /// The digest of the registers that have arrived.
    registers_digest: u64,

    /// The records that have arrived, the current one included.
    tally: Tally,

    /// The records that may come next.
    phase: Phase,

    /// The part of the stream that comes next.
    expect: Expect,

    /// A header or payload that has arrived in part.
    buffer: [u8; BUFFER_LEN],

    /// The number of bytes in `buffer`.
    filled: usize,

    /// The first error.
    error: Option<Error>,
}

impl<S: DerefMut<Target = [u64]>, const PAGE: usize> Decoder<S, PAGE> {
    /// The page size in bytes.
    const PAGE_SIZE: u64 = page_size::<PAGE>();

    /// The size in bytes of [`RUN_PAGES`] pages.
    const RUN_SIZE: u64 = RUN_PAGES * Self::PAGE_SIZE;

    /// Creates a decoder for a device with this identity and `registers_len` bytes of registers.
    /// The words of `table` must be 0.
    ///
    /// Returns [`None`] if the state memory is not as many pages as `table` has words, or if
    /// `registers_len` is more than [`MAX_REGISTERS`].
    pub fn new(identity: Identity<PAGE>, registers_len: usize, table: S) -> Option<Self> {
        let pages = u64::try_from(table.len()).ok()?;

        if pages.checked_mul(Self::PAGE_SIZE)? != identity.state_size
            || registers_len > MAX_REGISTERS
        {
            return None;
        }
        Some(Self {
            identity,
            registers_len,
            digests: Digests::new(table),
            registers_digest: 0,
            tally: Tally::default(),
            phase: Phase::Identity,
            expect: Expect::Header,
            buffer: [0; BUFFER_LEN],
            filled: 0,
            error: None,
        })
    }

    /// Reads the next bytes of the stream, all of them.
    ///
    /// # Errors
    ///
    /// Fails if the stream is invalid, and from then on always with the same error.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<(), Error> {
        if let Some(error) = self.error {
            return Err(error);
        }

        let mut rest = bytes;
        while !rest.is_empty() {
            match self.advance(rest, sink) {
                Ok(after) => rest = after,
                Err(error) => {
                    self.error = Some(error);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Checks that the stream is complete and valid.
    ///
    /// # Errors
    ///
    /// Fails with the first error, or if the end of the trailer has not arrived.
    pub fn finish(&self) -> Result<(), Error> {
        match self.error {
            Some(error) => Err(error),
            None if self.is_done() => Ok(()),
            None => Err(Error::Truncated),
        }
    }

    /// Returns whether a valid trailer has arrived, and no data after it.
    pub fn is_done(&self) -> bool {
        self.error.is_none() && matches!(self.expect, Expect::End)
    }

    /// Reads the expected part of the stream from `bytes`, and returns the rest.
    ///
    /// An empty payload is read with the first byte after it. The trailer guarantees that byte.
    fn advance<'a>(&mut self, bytes: &'a [u8], sink: &mut impl Sink) -> Result<&'a [u8], Error> {
        match self.expect {
            Expect::Header => self.collect(HEADER_LEN, bytes, Self::header),
            Expect::Identity => self.collect(IDENTITY_LEN, bytes, Self::identity),
            Expect::Offset(left) => self.collect(OFFSET_LEN, bytes, |this| this.offset(left)),
            Expect::Pages(offset, left) => Ok(self.pages(offset, left, bytes, sink)),
            Expect::Registers => {
                self.collect(self.registers_len, bytes, |this| this.registers(sink))
            }
            Expect::Skip(left) => {
                let (_, after, left) = take(bytes, left);

                self.expect = match left {
                    0 => Expect::Header,
                    left => Expect::Skip(left),
                };
                Ok(after)
            }
            Expect::Trailer => self.collect(TRAILER_LEN, bytes, Self::trailer),
            Expect::End => Err(Error::Trailing),
        }
    }

    /// Collects `len` bytes in the buffer and returns the rest of `bytes`. Calls `complete` when
    /// all have arrived.
    fn collect<'a>(
        &mut self,
        len: usize,
        bytes: &'a [u8],
        complete: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<&'a [u8], Error> {
        let room = self.buffer.get_mut(self.filled..len).unwrap_or_default();
        let (bytes, after) = bytes.split_at_checked(room.len()).unwrap_or((bytes, &[]));

        for (to, from) in room.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.filled += bytes.len();
        if self.filled == len {
            self.filled = 0;
            complete(self)?;
        }
        Ok(after)
    }

    /// Returns the first `len` bytes of the buffer.
    fn collected(&self, len: usize) -> &[u8] {
        self.buffer.get(..len).unwrap_or(&self.buffer)
    }

    /// Reads a header.
    fn header(&mut self) -> Result<(), Error> {
        let [kind, length] = read(self.collected(HEADER_LEN));
        let (tag, flags) = (kind as u32, (kind >> 32) as u32);
        let known = matches!(tag, TAG_IDENTITY | TAG_PAGES | TAG_REGISTERS | TAG_TRAILER);

        if known && flags != 0 {
            return Err(Error::BadFlags);
        }
        if !known && flags != FLAG_OPTIONAL {
            return Err(Error::BadTag);
        }

        let in_order = match tag {
            TAG_IDENTITY => self.phase == Phase::Identity,
            TAG_PAGES | TAG_REGISTERS => self.phase == Phase::Pages,
            TAG_TRAILER => self.phase == Phase::Trailer,
            _ => self.phase != Phase::Identity,
        };
        if !in_order {
            return Err(Error::BadOrder);
        }

        let good_length = match tag {
            TAG_IDENTITY => length == IDENTITY_LEN as u64,
            TAG_PAGES => {
                let pages = length.wrapping_sub(OFFSET_LEN as u64) / Self::PAGE_SIZE;
                let payload = run_record::<PAGE>(pages) - HEADER_LEN as u64;

                (1..=RUN_PAGES).contains(&pages) && payload == length
            }
            TAG_REGISTERS => length == self.registers_len as u64,
            TAG_TRAILER => length == TRAILER_LEN as u64,
            _ => length <= OPTIONAL_MAX,
        };
        if !good_length {
            return Err(Error::BadLength);
        }

        // The trailer counts the records before it, not itself.
        if tag != TAG_TRAILER {
            self.tally.record(HEADER_LEN as u64 + length);
        }
        self.expect = match tag {
            TAG_IDENTITY => Expect::Identity,
            TAG_PAGES => Expect::Offset(length - OFFSET_LEN as u64),
            TAG_REGISTERS => Expect::Registers,
            TAG_TRAILER => Expect::Trailer,
            _ => Expect::Skip(length),
        };
        Ok(())
    }

    /// Reads the payload of the identity record.
    fn identity(&mut self) -> Result<(), Error> {
        self.identity = self.identity.check(self.collected(IDENTITY_LEN))?;
        self.phase = Phase::Pages;
        self.expect = Expect::Header;
        Ok(())
    }

    /// Reads the offset of `length` bytes of pages.
    fn offset(&mut self, length: u64) -> Result<(), Error> {
        let [offset] = read(self.collected(OFFSET_LEN));
        let inside = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.identity.state_size);
        let across = offset % Self::RUN_SIZE + length > Self::RUN_SIZE;

        if !inside || offset % Self::PAGE_SIZE != 0 || across {
            return Err(Error::BadOffset);
        }
        self.tally.pages = self.tally.pages.wrapping_add(length / Self::PAGE_SIZE);
        self.expect = Expect::Pages(offset, length);
        Ok(())
    }

    /// Writes up to `left` of `bytes` to `offset` of the memory, and returns the rest.
    fn pages<'a>(
        &mut self,
        offset: u64,
        left: u64,
        bytes: &'a [u8],
        sink: &mut impl Sink,
    ) -> &'a [u8] {
        let (bytes, after, left) = take(bytes, left);
        let end = offset + bytes.len() as u64;

        // The rest of a page, whole pages, and the beginning of another one.
        let inside = (offset % Self::PAGE_SIZE) as usize;
        let (head, rest) = match inside {
            0 => (&[] as &[u8], bytes),
            inside => bytes.split_at(bytes.len().min(PAGE - inside)),
        };
        if !head.is_empty() {
            sink.write(offset, head);
            if inside + head.len() == PAGE {
                let page = offset / Self::PAGE_SIZE;
                self.digests.set(page, sink.page_digest(page));
            }
        }
        let pages = (offset + head.len() as u64).div_ceil(Self::PAGE_SIZE);
        let mut whole = rest.chunks_exact(PAGE);
        for (page, bytes) in (pages..).zip(&mut whole) {
            self.digests.set(page, sink.write_page(page, bytes));
        }
        let tail = whole.remainder();
        if !tail.is_empty() {
            sink.write(end - tail.len() as u64, tail);
        }
        self.expect = match left {
            0 => Expect::Header,
            left => Expect::Pages(end, left),
        };
        after
    }

    /// Reads the payload of the registers record.
    fn registers(&mut self, sink: &mut impl Sink) -> Result<(), Error> {
        let registers = self.collected(self.registers_len);
        let digest = registers_digest(registers);

        sink.registers(registers)?;
        self.registers_digest = digest;
        self.phase = Phase::Trailer;
        self.expect = Expect::Header;
        Ok(())
    }

    /// Reads the payload of the trailer record and compares it with what has arrived.
    fn trailer(&mut self) -> Result<(), Error> {
        let trailer = Trailer::read(self.collected(TRAILER_LEN));
        let digest = self.digests.image(&self.identity, self.registers_digest);

        if !self.digests.complete() {
            return Err(Error::MissingPages);
        }
        if trailer.tally != self.tally {
            return Err(Error::BadTotals);
        }
        if trailer.digest != digest {
            return Err(Error::BadDigest);
        }
        self.expect = Expect::End;
        Ok(())
    }
}

/// Splits up to `left` bytes off `bytes`. Returns them, the rest of `bytes`, and the number of
/// bytes that have not arrived yet.
fn take(bytes: &[u8], left: u64) -> (&[u8], &[u8], u64) {
    let (bytes, after) = usize::try_from(left)
        .ok()
        .and_then(|left| bytes.split_at_checked(left))
        .unwrap_or((bytes, &[]));

    (bytes, after, left.saturating_sub(bytes.len() as u64))
}
