// SPDX-License-Identifier: GPL-2.0

//! The DMA queue: descriptors, and the order in which the device serves them.
//!
//! This file is pure: it uses `core` alone, so that the same file runs in the kernel and in host
//! tests. The caller provides the lock and the clock, and moves the bytes.
//!
//! A write of its number to the doorbell gives a descriptor to the device, which owns it until it
//! has ended. The device serves descriptors one after the other, in pieces. Descriptors with a
//! period never end by themselves, and take turns with the others.

use core::{
    num::NonZero,
    ops::Range, //
};

/// Number of descriptors.
pub const DESCRIPTORS: usize = 16;

/// Size of a descriptor in bytes.
pub const DESCRIPTOR_SIZE: usize = 64;

/// Size of all descriptors in bytes.
pub const TABLE_SIZE: usize = DESCRIPTORS * DESCRIPTOR_SIZE;

/// Size of the queue in the stream in bytes.
pub const SNAPSHOT_SIZE: usize = TABLE_SIZE + DESCRIPTORS + 24;

/// Index that means all descriptors.
pub const ALL: u32 = u32::MAX;

/// Maximum size of a piece in bytes. Between two pieces the worker can be stopped.
pub const PIECE: u64 = 64 << 10;

/// Doorbell error: no such descriptor.
pub const REFUSED_INDEX: u32 = 1;

/// Doorbell error: the device owns the descriptor.
pub const REFUSED_BUSY: u32 = 2;

/// Vector of a descriptor without an interrupt.
const NO_VECTOR: u32 = u32::MAX;

/// [`Queue::status()`]: the device owns a descriptor.
const STATUS_BUSY: u32 = 1;

/// [`Queue::status()`]: no piece may be moved now.
const STATUS_PAUSED: u32 = 2;

/// Maximum position of a periodic descriptor in the stream. A device needs centuries to reach it.
const POS_MAX: u64 = u64::MAX / 2;

/// Nanoseconds in a microsecond.
const NANOS: u64 = 1000;

/// Operation of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Copy user memory to the state memory.
    Read,
    /// Copy state memory to user memory.
    Write,
    /// Write the pattern to user memory.
    Fill,
    /// Write the pattern to the state memory.
    Churn,
}

impl Op {
    fn new(raw: u32) -> Option<Self> {
        Some(match raw {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::Fill,
            4 => Self::Churn,
            _ => return None,
        })
    }
}

/// Owner and result of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Owned by the user, never used.
    Idle = 0,
    /// Owned by the device, not started.
    Queued = 1,
    /// Owned by the device, started.
    Active = 2,
    /// Owned by the user, executed.
    Done = 3,
    /// Owned by the user, failed.
    Failed = 4,
    /// Owned by the user, aborted.
    Aborted = 5,
}

impl Status {
    fn new(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Idle,
            1 => Self::Queued,
            2 => Self::Active,
            3 => Self::Done,
            4 => Self::Failed,
            5 => Self::Aborted,
            _ => return None,
        })
    }

    fn is_busy(self) -> bool {
        matches!(self, Self::Queued | Self::Active)
    }
}

/// Error of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Unknown operation.
    Op = 1,
    /// The range is empty, or not inside the state memory or the IOVA space.
    Range = 2,
    /// No user memory is mapped at the IOVA.
    Unmapped = 3,
    /// The mapping does not permit the access.
    Denied = 4,
    /// The memory behind the mapping cannot be accessed.
    Fault = 5,
    /// Out of memory.
    NoMemory = 6,
    /// Other error.
    Other = 7,
}

/// Descriptor, with the fields in the order of BAR0 and of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    iova: u64,
    addr: u64,
    len: u64,
    seed: u64,
    op: u32,
    vector: u32,
    period: u32,
    step: u32,
    status: Status,
    error: u32,
    pos: u64,
}

/// Offset of the first field of a descriptor that the user cannot write.
const READ_ONLY: usize = 0x30;

impl Descriptor {
    const POWER_ON: Self = Self {
        iova: 0,
        addr: 0,
        len: 0,
        seed: 0,
        op: 0,
        vector: NO_VECTOR,
        period: 0,
        step: 0,
        status: Status::Idle,
        error: 0,
        pos: 0,
    };

    fn bytes(&self) -> [u8; DESCRIPTOR_SIZE] {
        let mut bytes = [0; DESCRIPTOR_SIZE];
        let words = [self.iova, self.addr, self.len, self.seed];
        let halves = [
            self.op,
            self.vector,
            self.period,
            self.step,
            self.status as u32,
            self.error,
        ];
        let all = words
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .chain(halves.into_iter().flat_map(u32::to_le_bytes))
            .chain(self.pos.to_le_bytes());
        all.zip(&mut bytes).for_each(|(from, to)| *to = from);
        bytes
    }

    /// Decodes a descriptor. Returns [`None`] if it is invalid.
    fn new(bytes: &[u8; DESCRIPTOR_SIZE]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let half = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let this = Self {
            iova: word(0x00)?,
            addr: word(0x08)?,
            len: word(0x10)?,
            seed: word(0x18)?,
            op: half(0x20)?,
            vector: half(0x24)?,
            period: half(0x28)?,
            step: half(0x2c)?,
            status: Status::new(half(READ_ONLY)?)?,
            error: half(0x34)?,
            pos: word(0x38)?,
        };
        let error_fits = match this.status {
            Status::Failed => (1..=Failure::Other as u32).contains(&this.error),
            _ => this.error == 0,
        };
        error_fits.then_some(this)
    }

    /// Returns the operation, or the error if the descriptor is invalid.
    fn check(&self, memory_size: u64) -> Result<Op, Failure> {
        let op = Op::new(self.op).ok_or(Failure::Op)?;
        let inside = |start: u64, size: u64| {
            let end = start.checked_add(self.len);
            self.len > 0 && end.is_some_and(|end| end <= size)
        };
        let memory = op == Op::Fill || inside(self.addr, memory_size);
        let iova = op == Op::Churn || inside(self.iova, u64::MAX);
        (memory && iova).then_some(op).ok_or(Failure::Range)
    }

    /// Returns the number of bytes of a turn.
    fn turn_len(&self) -> u64 {
        if self.period == 0 || self.step == 0 {
            self.len
        } else {
            u64::from(self.step).min(self.len)
        }
    }

    /// Returns the number of bytes that the current turn has moved.
    ///
    /// All earlier turns had the same length.
    fn moved_in_turn(&self) -> u64 {
        self.pos.checked_rem(self.turn_len()).unwrap_or(0)
    }

    /// Returns the number of complete rounds over the range, and the position in the current one.
    fn rounds(&self) -> (u64, u64) {
        // The length of a descriptor that is served is not zero, see `check()`.
        NonZero::new(self.len).map_or((0, 0), |len| (self.pos / len, self.pos % len))
    }
}

/// Next action of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Move a piece.
    Piece(Piece),
    /// Wait until this time in nanoseconds.
    At(u64),
    /// Wait for a write to the doorbell.
    Nothing,
}

/// Part of a transfer that is moved at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the descriptor.
    index: usize,
    /// Operation.
    pub op: Op,
    /// IOVA of the user memory.
    pub iova: u64,
    /// Offset in the state memory in bytes.
    pub addr: u64,
    /// Number of bytes.
    pub len: u64,
    /// Seed of the pattern.
    pub seed: u64,
    /// Offset in the pattern in bytes.
    pub pos: u64,
}

impl Piece {
    /// Returns the range in the state memory in bytes.
    pub fn memory(&self) -> Range<usize> {
        self.addr as usize..(self.addr + self.len) as usize
    }
}

/// The descriptor that is being served.
#[derive(Clone, Copy, Debug)]
struct Current {
    index: usize,
    /// A piece is being moved.
    moving: bool,
    aborted: bool,
}

/// The DMA queue.
pub struct Queue {
    descriptors: [Descriptor; DESCRIPTORS],
    /// Indexes of the queued descriptors in order.
    order: [u8; DESCRIPTORS],
    queued: usize,
    /// Error of the last doorbell write.
    refused: u32,
    done: u64,
    bytes: u64,
    current: Option<Current>,
    /// Start of the next turn of each periodic descriptor in nanoseconds.
    due: [u64; DESCRIPTORS],
    /// The last turn was that of a periodic descriptor.
    periodic_last: bool,
    /// Vectors to signal, one bit each.
    vectors: u32,
}

impl Queue {
    /// Queue at power-on. A constant is not built on the stack.
    pub const POWER_ON: Self = Self {
        descriptors: [Descriptor::POWER_ON; DESCRIPTORS],
        order: [0; DESCRIPTORS],
        queued: 0,
        refused: 0,
        done: 0,
        bytes: 0,
        current: None,
        due: [0; DESCRIPTORS],
        periodic_last: false,
        vectors: 0,
    };

    /// Reads from `offset` of the descriptors. Bytes of `to` after their end are not changed.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let descriptors = self.descriptors.iter().skip(offset / DESCRIPTOR_SIZE);
        let bytes = descriptors.flat_map(Descriptor::bytes);
        for (to, from) in to.iter_mut().zip(bytes.skip(offset % DESCRIPTOR_SIZE)) {
            *to = from;
        }
    }

    /// Writes to `offset` of the descriptors.
    ///
    /// Read-only fields and descriptors that the device owns do not change.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let Some(descriptor) = self.descriptors.get_mut(at / DESCRIPTOR_SIZE) else {
                break;
            };
            let field = at % DESCRIPTOR_SIZE;
            if descriptor.status.is_busy() || field >= READ_ONLY {
                continue;
            }
            let mut bytes = descriptor.bytes();
            if let Some(to) = bytes.get_mut(field) {
                *to = *byte;
            }
            if let Some(new) = Descriptor::new(&bytes) {
                *descriptor = new;
            }
        }
    }

    /// Returns the status register. `paused` tells that no piece may be moved now.
    pub fn status(&self, paused: bool) -> u32 {
        (if self.is_busy() { STATUS_BUSY } else { 0 }) | (if paused { STATUS_PAUSED } else { 0 })
    }

    /// Returns whether the device owns a descriptor.
    pub fn is_busy(&self) -> bool {
        self.descriptors.iter().any(|d| d.status.is_busy())
    }

    /// Returns the error of the last doorbell or abort, 0 if there was none.
    pub fn refused(&self) -> u32 {
        self.refused
    }

    /// Returns the number of descriptors that have ended.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Returns the number of bytes moved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives a descriptor to the device.
    pub fn doorbell(&mut self, index: u32) {
        let found = self.descriptors.get_mut(index as usize);
        self.refused = match found {
            None => REFUSED_INDEX,
            Some(descriptor) if descriptor.status.is_busy() => REFUSED_BUSY,
            Some(descriptor) => {
                descriptor.status = Status::Queued;
                descriptor.error = 0;
                descriptor.pos = 0;
                if let Some(slot) = self.order.get_mut(self.queued) {
                    *slot = index as u8;
                    self.queued += 1;
                }
                0
            }
        };
    }

    /// Takes back a descriptor from the device, or all of them for [`ALL`]. A piece that is being
    /// moved is finished first.
    pub fn abort(&mut self, index: u32) {
        self.refused = 0;
        if index == ALL {
            (0..DESCRIPTORS).for_each(|index| self.abort_one(index));
        } else if (index as usize) < DESCRIPTORS {
            self.abort_one(index as usize);
        } else {
            self.refused = REFUSED_INDEX;
        }
    }

    fn abort_one(&mut self, index: usize) {
        match &mut self.current {
            Some(current) if current.index == index && current.moving => current.aborted = true,
            current => {
                current.take_if(|current| current.index == index);
                let order = self.order;
                let mut kept = 0;
                for other in order.into_iter().take(self.queued) {
                    if usize::from(other) != index {
                        self.order[kept] = other;
                        kept += 1;
                    }
                }
                self.queued = kept;
                if self.descriptors[index].status.is_busy() {
                    self.end(index, Status::Aborted, 0);
                }
            }
        }
    }

    /// Ends a descriptor and raises its interrupt.
    fn end(&mut self, index: usize, status: Status, error: u32) {
        self.descriptors[index].status = status;
        self.descriptors[index].error = error;
        self.done = self.done.wrapping_add(1);
        self.signal(index);
    }

    /// Adds the vector of a descriptor to those to signal.
    fn signal(&mut self, index: usize) {
        self.vectors |= 1u32
            .checked_shl(self.descriptors[index].vector)
            .unwrap_or(0);
    }

    /// Returns and clears the vectors to signal, one bit each.
    pub fn take_vectors(&mut self) -> u32 {
        core::mem::take(&mut self.vectors)
    }

    /// Returns the next action. The caller must report a piece with [`moved()`](Self::moved).
    ///
    /// `now` is in nanoseconds, `memory_size` in bytes.
    pub fn next(&mut self, now: u64, memory_size: u64) -> Next {
        loop {
            let index = match self.current {
                Some(current) => current.index,
                None => match self.choose(now) {
                    Ok(index) => index,
                    Err(next) => return next,
                },
            };
            let descriptor = self.descriptors[index];
            match descriptor.check(memory_size) {
                Ok(op) => {
                    self.current = Some(Current {
                        index,
                        moving: true,
                        aborted: false,
                    });
                    let (round, pos) = descriptor.rounds();
                    let left = descriptor.turn_len() - descriptor.moved_in_turn();
                    let len = left.min(descriptor.len - pos).min(PIECE);
                    return Next::Piece(Piece {
                        index,
                        op,
                        iova: descriptor.iova.wrapping_add(pos),
                        addr: descriptor.addr.wrapping_add(pos),
                        len,
                        seed: descriptor.seed.wrapping_add(round),
                        pos,
                    });
                }
                Err(failure) => {
                    self.current = None;
                    self.end(index, Status::Failed, failure as u32);
                }
            }
        }
    }

    /// Chooses the next descriptor: queued and due periodic ones alternate.
    fn choose(&mut self, now: u64) -> Result<usize, Next> {
        let periodic = (0..DESCRIPTORS)
            .filter(|index| self.descriptors[*index].status == Status::Active)
            .min_by_key(|index| self.due[*index]);
        let due = periodic.filter(|index| self.due[*index] <= now);
        Ok(match due {
            Some(index) if self.queued == 0 || !self.periodic_last => {
                self.periodic_last = true;
                index
            }
            _ if self.queued > 0 => {
                self.periodic_last = false;
                let index = usize::from(self.order[0]);
                self.order.rotate_left(1);
                self.queued -= 1;
                self.descriptors[index].status = Status::Active;
                self.due[index] = now;
                index
            }
            _ => {
                return Err(match periodic {
                    Some(index) => Next::At(self.due[index]),
                    None => Next::Nothing,
                })
            }
        })
    }

    /// Records that `len` bytes of a piece were moved, and why the rest was not.
    pub fn moved(&mut self, piece: &Piece, len: u64, failure: Option<Failure>, now: u64) {
        let Some(current) = self.current.take() else {
            return;
        };
        let index = piece.index;
        let descriptor = &mut self.descriptors[index];
        descriptor.pos = descriptor.pos.wrapping_add(len);
        self.bytes = self.bytes.wrapping_add(len);
        let over = descriptor.moved_in_turn() == 0;
        let (status, error) = match failure {
            Some(failure) => (Status::Failed, failure as u32),
            None if over && descriptor.period == 0 => (Status::Done, 0),
            None if current.aborted => (Status::Aborted, 0),
            None => {
                let round = descriptor.rounds().1 == 0;
                let period = u64::from(descriptor.period) * NANOS;
                if period > 0 && round {
                    self.signal(index);
                }
                if over {
                    // A late device catches up, by at most 16 periods.
                    let due = &mut self.due[index];
                    *due = (*due + period).max(now.saturating_sub(16 * period));
                } else {
                    self.current = Some(Current {
                        moving: false,
                        ..current
                    });
                }
                return;
            }
        };
        self.end(index, status, error);
    }

    /// Serializes the queue to the [`SNAPSHOT_SIZE`] bytes of `to`. No piece may be moving.
    pub fn save(&self, to: &mut [u8]) {
        let order = self.order.into_iter().enumerate().map(|(index, number)| {
            // Entries after the end of the queue are unused. Streams have 0 there.
            if index < self.queued {
                number
            } else {
                0
            }
        });
        let rest = order
            .chain((self.queued as u32).to_le_bytes())
            .chain(self.refused.to_le_bytes())
            .chain(self.done.to_le_bytes())
            .chain(self.bytes.to_le_bytes());
        self.read(0, to);
        for (to, from) in to.iter_mut().skip(TABLE_SIZE).zip(rest) {
            *to = from;
        }
    }

    /// Replaces the queue by a serialized one.
    ///
    /// Returns [`None`] if it is invalid. Then the content of this queue is undefined.
    pub fn load(&mut self, snapshot: &[u8; SNAPSHOT_SIZE]) -> Option<()> {
        *self = Self::POWER_ON;
        let (table, rest) = snapshot.split_at_checked(TABLE_SIZE)?;
        for (to, from) in self
            .descriptors
            .iter_mut()
            .zip(table.chunks_exact(DESCRIPTOR_SIZE))
        {
            *to = Descriptor::new(from.try_into().ok()?)?;
        }
        let (order, rest) = rest.split_first_chunk::<DESCRIPTORS>()?;
        let (queued, rest) = rest.split_first_chunk()?;
        let (refused, rest) = rest.split_first_chunk()?;
        let (done, rest) = rest.split_first_chunk()?;
        self.order = *order;
        self.queued = u32::from_le_bytes(*queued) as usize;
        self.refused = u32::from_le_bytes(*refused);
        self.done = u64::from_le_bytes(*done);
        self.bytes = u64::from_le_bytes(*rest.first_chunk()?);

        let queue = self.order.get(..self.queued)?;
        let unused = self.order.get(self.queued..)?;
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            let times = queue.iter().filter(|n| usize::from(**n) == index).count();
            let moved = descriptor.moved_in_turn() > 0;
            // The device owns a descriptor without a period until its only turn is over.
            let good = match descriptor.status {
                Status::Queued => times == 1 && descriptor.pos == 0,
                Status::Active if descriptor.period == 0 => {
                    times == 0 && moved && descriptor.pos < descriptor.len
                }
                Status::Active => times == 0 && descriptor.pos <= POS_MAX,
                _ => times == 0,
            };
            if !good {
                return None;
            }
            if descriptor.status == Status::Active && moved {
                let current = Current {
                    index,
                    moving: false,
                    aborted: false,
                };
                // At most one descriptor is being served.
                if self.current.replace(current).is_some() {
                    return None;
                }
            }
        }
        let known = queue.iter().all(|n| usize::from(*n) < DESCRIPTORS);
        let blank = unused.iter().all(|n| *n == 0);
        (known && blank && self.refused <= REFUSED_BUSY).then_some(())
    }
}
