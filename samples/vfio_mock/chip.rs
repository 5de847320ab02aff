// SPDX-License-Identifier: GPL-2.0

//! The device: state memory, registers and commands.

use crate::{
    dma::DmaEngine,
    knobs::{
        rules::Event,
        Knobs, //
    },
    migration::stream::{
        self,
        groups,
        pattern_word,
        words,
        Digest,
        Identity,
        PageDigest, //
    },
    queue::{
        self,
        Queue, //
    },
    registers::{
        self,
        Command,
        Registers, //
    },
};
use core::{
    mem,
    ops::Range, //
};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            AtomicFlag,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
};
use vfio::{
    cond_resched_killable,
    dma::Bus,
    emulated::{
        config_space,
        Function,
        Work, //
    },
    memory::StateMemory, //
};

/// Size of a word in bytes.
const WORD: usize = size_of::<u64>();

/// Size in bytes of the buffer on the stack of a command.
const BLOCK: usize = 256;

/// Number of bytes after which a command checks for a fatal signal.
const STRIDE: usize = 1 << 20;

/// Size of the MSI-X table and the pending bits in bytes.
const MSIX_SIZE: usize = config_space::msix_size(registers::VECTORS);

/// Size of [`Snapshot`] in bytes.
pub(crate) const SNAPSHOT_SIZE: usize =
    config_space::SIZE + registers::SNAPSHOT_SIZE + MSIX_SIZE + queue::SNAPSHOT_SIZE;

/// Serialized device state without the state memory: the registers record of the stream.
pub(crate) type Snapshot = [u8; SNAPSHOT_SIZE];

/// Data of an open device. Each first open creates it, with the state of power-on.
#[pin_data]
pub(crate) struct Chip {
    function: Arc<Function>,
    pub(crate) memory: StateMemory,
    pub(crate) knobs: Arc<Knobs>,
    /// A fault has broken the device.
    broken: AtomicFlag,
    /// Held during an access to BAR0, with the command that it starts, and a write to BAR2. Never
    /// held across a user copy.
    #[pin]
    registers: Mutex<Registers>,
    #[pin]
    dma: DmaEngine,
}

impl Chip {
    /// Creates a device with `pages` pages of state memory, in the state of power-on.
    pub(crate) fn new(
        function: Arc<Function>,
        pages: usize,
        knobs: Arc<Knobs>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            function,
            memory: StateMemory::new(pages)?,
            knobs,
            broken: AtomicFlag::new(false),
            registers <- new_mutex!(Registers::default(), "vfio_mock::Chip::registers"),
            dma <- DmaEngine::new(),
        }? Error)
    }

    /// Serves the DMA queue. Called by the worker, may sleep.
    pub(crate) fn work(&self, bus: &Bus<'_>) -> Work {
        let begin = || self.fault(Event::Dma).map(|_| ());
        self.dma.work(&self.memory, &self.function, bus, begin)
    }

    /// Resets the device to the state of power-on.
    pub(crate) fn power_on(&self) {
        let mut registers = self.registers.lock();
        *registers = Registers::default();
        self.dma.power_on();
        self.memory.clear();
        self.broken.store(false, Relaxed);
    }

    /// Fails if the host has ordered a fault for this event; otherwise returns the bits to change
    /// in the next byte of the stream. An arc may sleep here, killably.
    pub(crate) fn fault(&self, event: Event) -> Result<u8> {
        let effect = self.knobs.faults.hit(event)?;
        if effect.breaks {
            self.broken.store(true, Relaxed);
        }
        if effect.reinit {
            self.knobs.load.order_reinit();
        }
        match effect.errno {
            Some(errno) => Err(Error::from_errno(-errno)),
            None => Ok(effect.xor),
        }
    }

    /// Returns whether a fault has broken the device.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Relaxed)
    }

    /// Reads from BAR0.
    pub(crate) fn read_registers(&self, offset: usize, to: &mut [u8]) {
        to.fill(0);
        let registers = self.registers.lock();
        let dropped = self.function.dropped_writes() + self.memory.dropped();
        let image = registers.image(self.memory.size(), dropped);
        copy_overlap(offset, to, 0, &image);
        let paused = !self.function.may_work();
        self.dma.with_queue(|queue| {
            let image = registers::dma_image(queue, paused);
            copy_overlap(offset, to, registers::DMA, &image);
            let skip = registers::DMA_TABLE.saturating_sub(offset);
            if let Some(to) = to.get_mut(skip..) {
                queue.read(offset + skip - registers::DMA_TABLE, to);
            }
        });
    }

    /// Writes to BAR0, and executes the command if the write reaches the doorbell. May sleep.
    pub(crate) fn write_registers(&self, offset: usize, from: &[u8]) {
        let registers = &mut *self.registers.lock();
        if self.dma.update_queue(&self.function, |queue| {
            registers::write_dma(queue, offset, from)
        }) {
            self.function.wake();
        }
        let Some(command) = registers.write(offset, from) else {
            return;
        };
        let range = registers.range(self.memory.size());
        let result = match (command, range) {
            (Command::Reinit, _) => {
                let seed = registers.seed;
                fill(&self.memory, seed, 0..self.memory.size()).map(|()| self.memory.reinit())
            }
            (Command::Unknown, _) => Err(registers::ERROR_COMMAND),
            (_, None) => Err(registers::ERROR_RANGE),
            (Command::Fill, Some(range)) => fill(&self.memory, registers.seed, range),
            (Command::Checksum, Some(range)) => {
                checksum(&self.memory, range).map(|sum| registers.result = sum)
            }
        };
        registers.complete(result);
        if let Some(vector) = registers.vector() {
            self.function.signal(vector);
        }
    }

    /// Writes to BAR2, not during a command.
    pub(crate) fn write_memory(&self, offset: usize, from: &[u8]) -> Result {
        let _registers = self.registers.lock();
        self.memory.write(offset, from)
    }

    /// Returns the identity of its streams, and of those that it can load.
    pub(crate) fn identity(&self) -> Identity<PAGE_SIZE> {
        Identity {
            version: self.knobs.version.load(Relaxed),
            features: self.knobs.features.load(Relaxed),
            ..Identity::new(self.memory.size() as u64)
        }
    }

    /// Returns the digest of a page of the state memory.
    pub(crate) fn page_digest(&self, page: usize) -> u64 {
        page_digest(&self.memory, page)
    }

    /// Writes a whole page of the state memory and returns its digest, in a single pass.
    pub(crate) fn write_page(&self, page: usize, bytes: &[u8]) -> u64 {
        let mut digest = PageDigest::new(page as u64);
        let words = groups(bytes).map(|words| words.map(u64::to_le));
        let start = page * (PAGE_SIZE / WORD);
        self.memory
            .set_words(start, words, |words| digest.add(words.map(u64::from_le)));
        digest.value()
    }

    /// Serializes the device state without the state memory.
    pub(crate) fn snapshot(&self) -> Result<KVVec<u8>> {
        let mut snapshot = KVVec::zeroed(SNAPSHOT_SIZE, GFP_KERNEL_ACCOUNT)?;
        let (config, rest) = snapshot.split_at_mut(config_space::SIZE);
        let (front, rest) = rest.split_at_mut(registers::SNAPSHOT_SIZE);
        let (msix, queue) = rest.split_at_mut(MSIX_SIZE);
        let registers = self.registers.lock();
        config.copy_from_slice(&self.function.save_config());
        front.copy_from_slice(&registers.save());
        self.function.save_msix(msix);
        self.dma.with_queue(|from| from.save(queue));
        Ok(snapshot)
    }

    /// Decodes `snapshot` into `state`. The device does not change.
    ///
    /// Returns [`None`] if the snapshot is invalid. Then the content of `state` is undefined.
    pub(crate) fn parse(&self, snapshot: &Snapshot, state: &mut DeviceState) -> Option<()> {
        let (config, rest) = snapshot.split_first_chunk()?;
        let (registers, rest) = rest.split_first_chunk()?;
        let (msix, queue) = rest.split_first_chunk()?;
        if !self.function.accepts_config(config) || !self.function.accepts_msix(msix) {
            return None;
        }
        state.registers = Registers::load(registers)?;
        state.msix = *msix;
        state.queue.load(queue.first_chunk()?)
    }

    /// Applies `state` to the device. Its content is undefined afterwards.
    pub(crate) fn restore(&self, state: &mut DeviceState) -> Result {
        let mut registers = self.registers.lock();
        *registers = state.registers.clone();
        self.function.load_msix(&state.msix)?;
        self.dma
            .update_queue(&self.function, |queue| mem::swap(queue, &mut state.queue));
        Ok(())
    }
}

/// Decoded [`Snapshot`].
pub(crate) struct DeviceState {
    registers: Registers,
    msix: [u8; MSIX_SIZE],
    queue: Queue,
}

impl DeviceState {
    /// Creates the state of power-on, in place.
    pub(crate) fn new() -> impl Init<Self> {
        init!(Self {
            registers: Registers::default(),
            msix: [0; MSIX_SIZE],
            queue: Queue::POWER_ON,
        })
    }
}

/// Returns the digest of a page of a state memory.
pub(crate) fn page_digest(memory: &StateMemory, page: usize) -> u64 {
    let words = memory.page(page);
    stream::page_digest(page as u64, words.map(|words| words.map(u64::from_le)))
}

/// Copies the overlapping part of a register image for a read.
///
/// The read has `to.len()` bytes at `offset`, and the image `from` begins at offset `base`.
fn copy_overlap(offset: usize, to: &mut [u8], base: usize, from: &[u8]) {
    let skip = base.saturating_sub(offset);
    let from = from.iter().skip(offset.saturating_sub(base));
    for (to, from) in to.iter_mut().skip(skip).zip(from) {
        *to = *from;
    }
}

/// Writes the pattern of `seed` to a range.
///
/// Fails on a fatal signal. Then a part of the range is written.
fn fill(memory: &StateMemory, seed: u64, range: Range<usize>) -> Result<(), u32> {
    for start in range.clone().step_by(STRIDE) {
        cond_resched_killable().map_err(|_| registers::ERROR_KILLED)?;
        write_pattern(memory, seed, start..range.end.min(start + STRIDE));
    }
    Ok(())
}

/// Writes the pattern of `seed` to a range of any alignment.
fn write_pattern(memory: &StateMemory, seed: u64, range: Range<usize>) {
    let whole = range.start.div_ceil(WORD)..range.end / WORD;
    let edges = [
        range.start..range.end.min(whole.start * WORD),
        range.start.max(whole.end * WORD)..range.end,
    ];
    let start = whole.start;
    let words = whole.map(|index| [pattern_word(seed, index as u64).to_le()]);
    memory.set_words(start, words, |_| ());
    for at in edges.into_iter().flatten() {
        let bytes = pattern_word(seed, (at / WORD) as u64).to_le_bytes();
        if let Some(byte) = bytes.get(at % WORD..=at % WORD) {
            // The caller has checked that the range is inside the memory.
            let _ = memory.write(at, byte);
        }
    }
}

/// Returns the checksum of a range. Fails on a fatal signal.
fn checksum(memory: &StateMemory, range: Range<usize>) -> Result<u64, u32> {
    let mut digest = Digest::new(range.len() as u64);
    let mut block = [0; BLOCK];
    for start in range.clone().step_by(BLOCK) {
        if (start - range.start) % STRIDE == 0 {
            cond_resched_killable().map_err(|_| registers::ERROR_KILLED)?;
        }
        let len = BLOCK.min(range.end - start);
        let Some(part) = block.get_mut(..len) else {
            break;
        };
        if memory.read(start, part).is_err() {
            break;
        }
        words(part).for_each(|word| digest.add(word));
    }
    Ok(digest.value())
}
