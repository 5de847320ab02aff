// SPDX-License-Identifier: GPL-2.0

//! The registers in BAR0, little-endian.

use crate::queue::Queue;
use core::ops::Range;
use kernel::page::PAGE_SIZE;

/// Number of MSI-X vectors.
pub(crate) const VECTORS: u32 = 4;

/// Size of BAR0 in bytes.
pub(crate) const BAR_SIZE: u32 = 16 << 10;
/// Offset of the MSI-X table in BAR0.
pub(crate) const MSIX_TABLE: u32 = 0x1000;
/// Offset of the MSI-X pending bit array in BAR0.
pub(crate) const MSIX_PBA: u32 = 0x2000;

/// Offset of the registers of the DMA engine in BAR0.
pub(crate) const DMA: usize = 0x60;
/// Offset of the descriptors of the DMA engine in BAR0.
pub(crate) const DMA_TABLE: usize = 0x400;

/// Offsets of the registers of the DMA engine, relative to [`DMA`].
mod dma_offset {
    /// Doorbell: gives a descriptor to the device, 32 bits, write-only. Like [`ABORT`], it has an
    /// effect only if one access writes all of it.
    pub(super) const DOORBELL: usize = 0x00;
    /// Takes back one descriptor or all, 32 bits, write-only.
    pub(super) const ABORT: usize = 0x04;
    /// State of the engine, 32 bits, read-only.
    pub(super) const STATUS: usize = 0x08;
    /// Error of the last write to `DOORBELL` or `ABORT`, 32 bits, read-only.
    pub(super) const ERROR: usize = 0x0c;
    /// Number of descriptors that have ended since the last reset, 64 bits, read-only.
    pub(super) const DONE: usize = 0x10;
    /// Number of bytes moved since the last reset, 64 bits, read-only.
    pub(super) const BYTES: usize = 0x18;
    /// End of the registers.
    pub(super) const END: usize = 0x20;
}

/// Value of [`offset::MAGIC`]: `VFMK`.
const MAGIC: u32 = u32::from_le_bytes(*b"VFMK");
/// Value of [`offset::ABI_VERSION`].
const ABI_VERSION: u32 = 1;

/// Offsets of the registers in BAR0.
mod offset {
    /// Identity, 32 bits, read-only.
    pub(super) const MAGIC: usize = 0x00;
    /// Version of this layout, 32 bits, read-only.
    pub(super) const ABI_VERSION: usize = 0x04;
    /// Size of the state memory in bytes, 64 bits, read-only.
    pub(super) const STATE_SIZE: usize = 0x08;
    /// Size in bytes of a page, the unit of dirty tracking, 32 bits, read-only.
    pub(super) const PAGE_SIZE: usize = 0x10;
    /// Status of the last command, 32 bits, read-only.
    pub(super) const STATUS: usize = 0x14;
    /// Scratch register, 64 bits.
    pub(super) const SCRATCH: usize = 0x18;
    /// Offset of the range of a command in the state memory, in bytes, 64 bits.
    pub(super) const ADDR: usize = 0x20;
    /// Length of the range of a command in bytes, 64 bits.
    pub(super) const LEN: usize = 0x28;
    /// Seed of the pattern, 64 bits.
    pub(super) const SEED: usize = 0x30;
    /// Doorbell: executes a command, 32 bits, write-only. It has an effect only if one access
    /// writes all of it.
    pub(super) const DOORBELL: usize = 0x38;
    /// MSI-X vector to signal at the end of a command, 32 bits.
    pub(super) const IRQ_VECTOR: usize = 0x3c;
    /// Result of the last checksum, 64 bits, read-only.
    pub(super) const RESULT: usize = 0x40;
    /// Number of commands executed since the last reset, 64 bits, read-only.
    pub(super) const COMPLETIONS: usize = 0x48;
    /// Error of the last command, 32 bits, read-only.
    pub(super) const ERROR: usize = 0x50;
    /// Number of writes dropped because the device was stopped, 64 bits, read-only.
    pub(super) const DROPPED: usize = 0x58;
    /// End of the registers.
    pub(super) const END: usize = 0x60;
}

/// `STATUS`: the last command was executed.
const STATUS_DONE: u32 = 1 << 1;
/// `STATUS`: the last command failed.
const STATUS_ERROR: u32 = 1 << 2;

/// `ERROR`: unknown command.
pub(crate) const ERROR_COMMAND: u32 = 1;
/// `ERROR`: the range is empty or not inside the state memory.
pub(crate) const ERROR_RANGE: u32 = 2;
/// `ERROR`: the client was killed. The command was executed in part.
pub(crate) const ERROR_KILLED: u32 = 3;

/// `IRQ_VECTOR`: no vector.
const NO_VECTOR: u32 = u32::MAX;

/// Command that was written to `DOORBELL`.
#[derive(Clone, Copy)]
pub(crate) enum Command {
    /// Fill the range with the pattern of the seed.
    Fill,
    /// Compute the checksum of the range.
    Checksum,
    /// Reinitialise the device: fill all of the memory with the pattern of the seed.
    Reinit,
    /// Unknown command.
    Unknown,
}

/// Size of [`Registers`] in the stream in bytes.
pub(crate) const SNAPSHOT_SIZE: usize = 64;

/// Registers with state of their own.
#[derive(Clone)]
pub(crate) struct Registers {
    scratch: u64,
    addr: u64,
    len: u64,
    pub(crate) seed: u64,
    pub(crate) result: u64,
    completions: u64,
    irq_vector: u32,
    status: u32,
    error: u32,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            scratch: 0,
            addr: 0,
            len: 0,
            seed: 0,
            result: 0,
            completions: 0,
            irq_vector: NO_VECTOR,
            status: 0,
            error: 0,
        }
    }
}

/// Copies `value` to `offset` of `image`, as far as it fits.
fn put(image: &mut [u8], offset: usize, value: &[u8]) {
    for (to, from) in image.iter_mut().skip(offset).zip(value) {
        *to = *from;
    }
}

/// Returns the value of a register after a write of `from` at `offset`.
///
/// The register is at `register` and has `value` before the write, which may overlap it in part.
fn merge<const N: usize>(value: [u8; N], register: usize, offset: usize, from: &[u8]) -> [u8; N] {
    let mut value = value;
    for (at, byte) in (offset..).zip(from) {
        if let Some(to) = at
            .checked_sub(register)
            .and_then(|index| value.get_mut(index))
        {
            *to = *byte;
        }
    }
    value
}

/// Returns the value that a write of `from` at `offset` stores in the doorbell at `register`.
///
/// Returns [`None`] unless the write has all four bytes of the doorbell.
fn doorbell_value(register: usize, offset: usize, from: &[u8]) -> Option<u32> {
    let start = register.checked_sub(offset)?;
    let bytes = from.get(start..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

/// Returns the content of the registers of the DMA engine.
pub(crate) fn dma_image(queue: &Queue, paused: bool) -> [u8; dma_offset::END] {
    let mut image = [0; dma_offset::END];
    put(
        &mut image,
        dma_offset::STATUS,
        &queue.status(paused).to_le_bytes(),
    );
    put(
        &mut image,
        dma_offset::ERROR,
        &queue.refused().to_le_bytes(),
    );
    put(&mut image, dma_offset::DONE, &queue.done().to_le_bytes());
    put(&mut image, dma_offset::BYTES, &queue.bytes().to_le_bytes());
    image
}

/// Applies the part of a write to BAR0 that belongs to the DMA engine.
///
/// `offset` and length are arbitrary. Descriptors are written before the doorbells take effect.
/// Returns whether the worker must be woken.
pub(crate) fn write_dma(queue: &mut Queue, offset: usize, from: &[u8]) -> bool {
    let skip = DMA_TABLE.saturating_sub(offset);
    if let Some(part) = from.get(skip..).filter(|part| !part.is_empty()) {
        queue.write(offset + skip - DMA_TABLE, part);
    }
    let doorbell = doorbell_value(DMA + dma_offset::DOORBELL, offset, from);
    let abort = doorbell_value(DMA + dma_offset::ABORT, offset, from);
    doorbell.into_iter().for_each(|index| queue.doorbell(index));
    abort.into_iter().for_each(|index| queue.abort(index));
    doorbell.or(abort).is_some()
}

impl Registers {
    /// Returns the content of all registers.
    pub(crate) fn image(&self, state_size: usize, dropped: u64) -> [u8; offset::END] {
        let mut image = [0; offset::END];
        put(&mut image, offset::MAGIC, &MAGIC.to_le_bytes());
        put(&mut image, offset::ABI_VERSION, &ABI_VERSION.to_le_bytes());
        put(
            &mut image,
            offset::STATE_SIZE,
            &(state_size as u64).to_le_bytes(),
        );
        put(
            &mut image,
            offset::PAGE_SIZE,
            &(PAGE_SIZE as u32).to_le_bytes(),
        );
        put(&mut image, offset::STATUS, &self.status.to_le_bytes());
        put(&mut image, offset::SCRATCH, &self.scratch.to_le_bytes());
        put(&mut image, offset::ADDR, &self.addr.to_le_bytes());
        put(&mut image, offset::LEN, &self.len.to_le_bytes());
        put(&mut image, offset::SEED, &self.seed.to_le_bytes());
        put(
            &mut image,
            offset::IRQ_VECTOR,
            &self.irq_vector.to_le_bytes(),
        );
        put(&mut image, offset::RESULT, &self.result.to_le_bytes());
        put(
            &mut image,
            offset::COMPLETIONS,
            &self.completions.to_le_bytes(),
        );
        put(&mut image, offset::ERROR, &self.error.to_le_bytes());
        put(&mut image, offset::DROPPED, &dropped.to_le_bytes());
        image
    }

    /// Applies a write to BAR0 at an arbitrary offset. Returns the command that it starts.
    ///
    /// Registers in the same access are written before the command is executed.
    pub(crate) fn write(&mut self, offset: usize, from: &[u8]) -> Option<Command> {
        for (register, value) in [
            (offset::SCRATCH, &mut self.scratch),
            (offset::ADDR, &mut self.addr),
            (offset::LEN, &mut self.len),
            (offset::SEED, &mut self.seed),
        ] {
            *value = u64::from_le_bytes(merge(value.to_le_bytes(), register, offset, from));
        }
        let vector = self.irq_vector.to_le_bytes();
        self.irq_vector = u32::from_le_bytes(merge(vector, offset::IRQ_VECTOR, offset, from));

        Some(match doorbell_value(offset::DOORBELL, offset, from)? {
            1 => Command::Fill,
            2 => Command::Checksum,
            3 => Command::Reinit,
            _ => Command::Unknown,
        })
    }

    /// Returns the range of a command in bytes, or [`None`] if it is empty or not inside the
    /// memory.
    pub(crate) fn range(&self, state_size: usize) -> Option<Range<usize>> {
        let start = usize::try_from(self.addr).ok()?;
        let end = start.checked_add(usize::try_from(self.len).ok()?)?;
        (start < end && end <= state_size).then_some(start..end)
    }

    /// Records the result of a command.
    pub(crate) fn complete(&mut self, result: Result<(), u32>) {
        (self.status, self.error) = match result {
            Ok(()) => (STATUS_DONE, 0),
            Err(error) => (STATUS_ERROR, error),
        };
        if result.is_ok() {
            self.completions = self.completions.wrapping_add(1);
        }
    }

    /// Returns the vector to signal at the end of a command, if any.
    pub(crate) fn vector(&self) -> Option<u32> {
        (self.irq_vector < VECTORS).then_some(self.irq_vector)
    }

    /// Serializes the registers.
    pub(crate) fn save(&self) -> [u8; SNAPSHOT_SIZE] {
        let mut snapshot = [0; SNAPSHOT_SIZE];
        let words = [
            self.scratch,
            self.addr,
            self.len,
            self.seed,
            self.result,
            self.completions,
        ];
        let halves = [self.irq_vector, self.status, self.error, 0];
        for (index, word) in words.into_iter().enumerate() {
            put(&mut snapshot, index * 8, &word.to_le_bytes());
        }
        for (index, half) in halves.into_iter().enumerate() {
            put(&mut snapshot, 48 + index * 4, &half.to_le_bytes());
        }
        snapshot
    }

    /// Decodes serialized registers. Returns [`None`] if they are invalid.
    pub(crate) fn load(snapshot: &[u8; SNAPSHOT_SIZE]) -> Option<Self> {
        let word = |index: usize| {
            let bytes = snapshot.get(index * 8..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        let half = |index: usize| {
            let bytes = snapshot.get(48 + index * 4..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let registers = Self {
            scratch: word(0)?,
            addr: word(1)?,
            len: word(2)?,
            seed: word(3)?,
            result: word(4)?,
            completions: word(5)?,
            irq_vector: half(0)?,
            status: half(1)?,
            error: half(2)?,
        };
        let ended = match registers.status {
            0 | STATUS_DONE => registers.error == 0,
            STATUS_ERROR => matches!(registers.error, ERROR_COMMAND..=ERROR_KILLED),
            _ => false,
        };
        (ended && half(3)? == 0).then_some(registers)
    }
}
