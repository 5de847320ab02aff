// SPDX-License-Identifier: GPL-2.0

//! The device behind its bus.

use crate::{
    dma::Engine,
    queue::{
        self,
        Queue, //
    },
    registers::{
        self,
        Command,
        Registers, //
    },
    stream::{
        lanes,
        page_digest,
        pattern_word,
        words,
        Digest,
        PageDigest,
        PAGE_SIZE, //
    },
};
use core::{
    mem,
    ops::Range, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};
use vfio::{
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

/// How many MSI-X vectors the device has.
pub(crate) const VECTORS: u32 = 4;

/// The size of MSI-X table and pending bits in bytes.
const MSIX_SIZE: usize = config_space::msix_size(VECTORS);

/// The size of [`Snapshot`] in bytes.
pub(crate) const SNAPSHOT_SIZE: usize =
    config_space::SIZE + registers::SNAPSHOT_SIZE + MSIX_SIZE + queue::SNAPSHOT_SIZE;

/// All of the device's state but its memory, as it is in the stream.
pub(crate) type Snapshot = [u8; SNAPSHOT_SIZE];

/// What a bus access needs to have for itself.
struct Front {
    /// The device is not stopped. While it is, its state changes by loading and reset alone.
    running: bool,
    registers: Registers,
    /// How many writes were dropped because the device was stopped. Says something about this
    /// host's user, so it does not migrate.
    dropped: u64,
}

impl Front {
    fn power_on() -> Self {
        Self {
            running: true,
            registers: Registers::default(),
            dropped: 0,
        }
    }
}

/// The device behind its bus, made anew for each user who opens it.
#[pin_data]
pub(crate) struct Chip {
    endpoint: Arc<Endpoint>,
    pub(crate) memory: StateMemory,
    /// Held across a whole bus access, commands included, so that who stops the device waits for
    /// the access under way. Never held across a user copy.
    #[pin]
    front: Mutex<Front>,
    #[pin]
    dma: Engine,
}

impl Chip {
    /// Makes a device in the state of power on, with `pages` pages of state memory.
    pub(crate) fn new(endpoint: Arc<Endpoint>, pages: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            endpoint,
            memory: StateMemory::new(pages)?,
            front <- new_mutex!(Front::power_on(), "vfio_mock::Chip::front"),
            dma <- Engine::new(),
        }? Error)
    }

    /// Lets the device run or stops it. What is under way is finished when this returns.
    pub(crate) fn run(&self, running: bool) {
        self.front.lock().running = running;
    }

    /// Does a piece of what the device does by itself.
    pub(crate) fn work(&self, bus: &Bus<'_>) -> Work {
        self.dma.work(&self.memory, &self.endpoint, bus)
    }

    /// Lets no DMA start any more, and waits for what is under way.
    pub(crate) fn pause_dma(&self) -> Result {
        self.dma.pause()
    }

    /// Lets DMA go on.
    pub(crate) fn resume_dma(&self) {
        if self.dma.resume() {
            self.endpoint.wake();
        }
    }

    /// Brings the device into the state of power on.
    pub(crate) fn power_on(&self) {
        self.dma.power_on(&self.endpoint);
        let mut front = self.front.lock();
        *front = Front::power_on();
        self.memory.clear();
    }

    /// Reads from BAR0.
    pub(crate) fn read_registers(&self, offset: usize, to: &mut [u8]) {
        to.fill(0);
        let front = self.front.lock();
        let dropped = front.dropped + self.memory.dropped();
        let image = front.registers.image(self.memory.size(), dropped);
        overlay(offset, to, 0, &image);
        self.dma.with(|queue| {
            overlay(offset, to, registers::DMA, &registers::dma_image(queue));
            overlay(offset, to, registers::DMA_TABLE, &queue.table());
        });
    }

    /// Writes to BAR0, and executes the command if the write was one.
    pub(crate) fn write_registers(&self, offset: usize, from: &[u8]) {
        let front = &mut *self.front.lock();
        if !front.running {
            front.dropped += 1;
            return;
        }
        if self
            .dma
            .with(|queue| registers::write_dma(queue, offset, from))
        {
            self.endpoint.wake();
        }
        let Some(command) = front.registers.write(offset, from) else {
            return;
        };
        let range = front.registers.range(self.memory.size());
        let result = match (command, range) {
            (Command::Reinit, _) => {
                let seed = front.registers.seed;
                write_pattern(&self.memory, seed, 0..self.memory.size());
                self.memory.reinit();
                Ok(())
            }
            (Command::Unknown, _) => Err(registers::ERROR_COMMAND),
            (_, None) => Err(registers::ERROR_RANGE),
            (Command::Fill, Some(range)) => {
                write_pattern(&self.memory, front.registers.seed, range);
                Ok(())
            }
            (Command::Checksum, Some(range)) => {
                front.registers.result = checksum(&self.memory, range);
                Ok(())
            }
        };
        front.registers.complete(result);
        if let Some(vector) = front.registers.vector() {
            self.endpoint.signal(vector);
        }
    }

    /// Writes to BAR2.
    pub(crate) fn write_memory(&self, offset: usize, from: &[u8]) -> Result {
        let mut front = self.front.lock();
        if !front.running {
            front.dropped += 1;
            return Ok(());
        }
        self.memory.write(offset, from)
    }

    /// Returns how many microseconds the device takes to get a record of its state ready.
    pub(crate) fn save_delay(&self) -> u32 {
        self.front.lock().registers.save_delay
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
    pub(crate) fn snapshot(&self) -> Snapshot {
        let front = self.front.lock();
        let mut snapshot = [0; SNAPSHOT_SIZE];
        let config = self.endpoint.save_config();
        let registers = front.registers.save();
        let mut msix = [0; MSIX_SIZE];
        self.endpoint.save_msix(&mut msix);
        let queue = self.dma.with(|queue| queue.save());
        let parts: [&[u8]; 4] = [&config, &registers, &msix, &queue];
        for (to, from) in snapshot.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        snapshot
    }

    /// Reads what is in a stream, unless a device like this cannot be in such a state.
    pub(crate) fn parse(&self, snapshot: &Snapshot) -> Option<State> {
        let (config, rest) = snapshot.split_first_chunk()?;
        let (registers, rest) = rest.split_first_chunk()?;
        let (msix, queue) = rest.split_first_chunk()?;
        if !self.endpoint.accepts_config(config) || !self.endpoint.accepts_msix(msix) {
            return None;
        }
        Some(State {
            config: *config,
            registers: Registers::load(registers)?,
            msix: *msix,
            queue: Queue::load(queue.first_chunk()?)?,
        })
    }

    /// Brings the device into a state. What `state` holds then means nothing.
    pub(crate) fn restore(&self, state: &mut State) -> Result {
        let mut front = self.front.lock();
        self.endpoint.load_config(&state.config)?;
        let save_delay = front.registers.save_delay;
        front.registers = state.registers.clone();
        front.registers.save_delay = save_delay;
        self.endpoint.load_msix(&state.msix)?;
        self.dma.with(|queue| mem::swap(queue, &mut state.queue));
        Ok(())
    }
}

/// All of the device's state but its memory, as a device can have it.
pub(crate) struct State {
    config: [u8; config_space::SIZE],
    registers: Registers,
    msix: [u8; MSIX_SIZE],
    queue: Queue,
}

/// Copies to `to`, which is what is read at `offset`, where it meets what is at `base`.
fn overlay(offset: usize, to: &mut [u8], base: usize, from: &[u8]) {
    let skip = base.saturating_sub(offset);
    let from = from.iter().skip(offset.saturating_sub(base));
    for (to, from) in to.iter_mut().skip(skip).zip(from) {
        *to = *from;
    }
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

/// Returns the checksum of a range.
fn checksum(memory: &StateMemory, range: Range<usize>) -> u64 {
    let mut digest = Digest::new(range.len() as u64);
    let mut block = [0; BLOCK];
    for start in range.clone().step_by(BLOCK) {
        let len = BLOCK.min(range.end - start);
        let Some(part) = block.get_mut(..len) else {
            break;
        };
        if memory.read(start, part).is_err() {
            break;
        }
        words(part).for_each(|word| digest.add(word));
    }
    digest.value()
}
