// SPDX-License-Identifier: GPL-2.0

//! The device behind its bus.

use crate::{
    dma::Engine,
    migration::{
        delay::SaveDelay,
        stream::{
            lanes,
            page_digest,
            pattern_word,
            words,
            Digest,
            PageDigest, //
        },
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
        Arc,
        Mutex, //
    },
};
use vfio::{
    cond_resched_killable,
    config_space,
    dma::Bus,
    emulated::Work,
    endpoint::Endpoint,
    memory::StateMemory, //
};

/// Bytes in a word.
const WORD: usize = size_of::<u64>();

/// Bytes on the stack that a command works with at once.
const BLOCK: usize = 256;

/// Bytes after which a command looks whether its client is being killed.
const STRIDE: usize = 1 << 20;

/// How many MSI-X vectors the device has.
pub(crate) const VECTORS: u32 = 4;

/// The size of MSI-X table and pending bits in bytes.
const MSIX_SIZE: usize = config_space::msix_size(VECTORS);

/// The size of [`Snapshot`] in bytes.
pub(crate) const SNAPSHOT_SIZE: usize =
    config_space::SIZE + registers::SNAPSHOT_SIZE + MSIX_SIZE + queue::SNAPSHOT_SIZE;

/// All of the device's state but its memory, as it is in the stream.
pub(crate) type Snapshot = [u8; SNAPSHOT_SIZE];

/// The device behind its bus, made anew for each user who opens it.
#[pin_data]
pub(crate) struct Chip {
    endpoint: Arc<Endpoint>,
    pub(crate) memory: StateMemory,
    pub(crate) save_delay: Arc<SaveDelay>,
    /// Held across a whole bus access, commands included. Never held across a user copy.
    #[pin]
    front: Mutex<Registers>,
    #[pin]
    dma: Engine,
}

impl Chip {
    /// Makes a device in the state of power on, with `pages` pages of state memory.
    pub(crate) fn new(
        endpoint: Arc<Endpoint>,
        pages: usize,
        save_delay: Arc<SaveDelay>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            endpoint,
            memory: StateMemory::new(pages)?,
            save_delay,
            front <- new_mutex!(Registers::default(), "vfio_mock::Chip::front"),
            dma <- Engine::new(),
        }? Error)
    }

    /// Does a piece of what the device does by itself.
    pub(crate) fn work(&self, bus: &Bus<'_>) -> Work {
        self.dma.work(&self.memory, &self.endpoint, bus)
    }

    /// Brings the device into the state of power on.
    pub(crate) fn power_on(&self) {
        let mut registers = self.front.lock();
        *registers = Registers::default();
        self.dma.power_on();
        self.memory.clear();
    }

    /// Reads from BAR0.
    pub(crate) fn read_registers(&self, offset: usize, to: &mut [u8]) {
        to.fill(0);
        let registers = self.front.lock();
        let dropped = self.endpoint.dropped_writes() + self.memory.dropped();
        let image = registers.image(self.memory.size(), dropped);
        overlay(offset, to, 0, &image);
        let paused = !self.endpoint.may_work();
        self.dma.with(|queue| {
            let image = registers::dma_image(queue, paused);
            overlay(offset, to, registers::DMA, &image);
            let skip = registers::DMA_TABLE.saturating_sub(offset);
            if let Some(to) = to.get_mut(skip..) {
                queue.read(offset + skip - registers::DMA_TABLE, to);
            }
        });
    }

    /// Writes to BAR0, and executes the command if the write was one.
    pub(crate) fn write_registers(&self, offset: usize, from: &[u8]) {
        let registers = &mut *self.front.lock();
        if self.dma.change(&self.endpoint, |queue| {
            registers::write_dma(queue, offset, from)
        }) {
            self.endpoint.wake();
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
            self.endpoint.signal(vector);
        }
    }

    /// Writes to BAR2.
    pub(crate) fn write_memory(&self, offset: usize, from: &[u8]) -> Result {
        let _front = self.front.lock();
        self.memory.write(offset, from)
    }

    /// Returns the digest of a page, as it is in the stream.
    pub(crate) fn page_digest(&self, page: usize) -> u64 {
        let words = self.memory.page(page);
        page_digest(page as u64, words.map(|words| words.map(u64::from_le)))
    }

    /// Writes all bytes of a page that comes by the stream, and returns its digest.
    pub(crate) fn write_page(&self, page: usize, bytes: &[u8]) -> u64 {
        let mut digest = PageDigest::new(page as u64);
        let words = lanes(bytes).map(|words| words.map(u64::to_le));
        let start = page * (PAGE_SIZE / WORD);
        self.memory
            .set_words(start, words, |words| digest.add(words.map(u64::from_le)));
        digest.value()
    }

    /// Returns all of the device's state but its memory.
    pub(crate) fn snapshot(&self) -> Result<KVVec<u8>> {
        let mut snapshot = KVVec::zeroed(SNAPSHOT_SIZE, GFP_KERNEL_ACCOUNT)?;
        let (config, rest) = snapshot.split_at_mut(config_space::SIZE);
        let (registers, rest) = rest.split_at_mut(registers::SNAPSHOT_SIZE);
        let (msix, queue) = rest.split_at_mut(MSIX_SIZE);
        let front = self.front.lock();
        config.copy_from_slice(&self.endpoint.save_config());
        registers.copy_from_slice(&front.save());
        self.endpoint.save_msix(msix);
        self.dma.with(|from| from.save(queue));
        Ok(snapshot)
    }

    /// Reads what is in a stream.
    ///
    /// Returns [`None`] if a device like this cannot be in such a state. What `state` holds then
    /// means nothing.
    pub(crate) fn parse(&self, snapshot: &Snapshot, state: &mut State) -> Option<()> {
        let (config, rest) = snapshot.split_first_chunk()?;
        let (registers, rest) = rest.split_first_chunk()?;
        let (msix, queue) = rest.split_first_chunk()?;
        if !self.endpoint.accepts_config(config) || !self.endpoint.accepts_msix(msix) {
            return None;
        }
        state.registers = Registers::load(registers)?;
        state.msix = *msix;
        state.queue.load(queue.first_chunk()?)
    }

    /// Brings the device into a state. What `state` holds then means nothing.
    pub(crate) fn restore(&self, state: &mut State) -> Result {
        let mut registers = self.front.lock();
        *registers = state.registers.clone();
        self.endpoint.load_msix(&state.msix)?;
        self.dma
            .change(&self.endpoint, |queue| mem::swap(queue, &mut state.queue));
        Ok(())
    }
}

/// All of the device's state but its memory, as a device can have it.
pub(crate) struct State {
    registers: Registers,
    msix: [u8; MSIX_SIZE],
    queue: Queue,
}

impl State {
    /// Makes the state of power on, in place.
    pub(crate) fn new() -> impl Init<Self> {
        init!(Self {
            registers: Registers::default(),
            msix: [0; MSIX_SIZE],
            queue: Queue::POWER_ON,
        })
    }
}

/// Copies to `to`, which is what is read at `offset`, where it meets what is at `base`.
fn overlay(offset: usize, to: &mut [u8], base: usize, from: &[u8]) {
    let skip = base.saturating_sub(offset);
    let from = from.iter().skip(offset.saturating_sub(base));
    for (to, from) in to.iter_mut().skip(skip).zip(from) {
        *to = *from;
    }
}

/// Writes the pattern of `seed` to a range.
///
/// Fails if the client is being killed: then a part of the range is written.
fn fill(memory: &StateMemory, seed: u64, range: Range<usize>) -> Result<(), u32> {
    for start in range.clone().step_by(STRIDE) {
        cond_resched_killable().map_err(|_| registers::ERROR_KILLED)?;
        write_pattern(memory, seed, start..range.end.min(start + STRIDE));
    }
    Ok(())
}

/// Writes the pattern of `seed` to a range, which need not begin or end with a word.
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
            // The range is inside the memory, as its caller has checked.
            let _ = memory.write(at, byte);
        }
    }
}

/// Returns the checksum of a range. Fails if the client is being killed.
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
