// SPDX-License-Identifier: GPL-2.0

//! The device behind its bus.

use crate::{
    config_space::power_on,
    registers::{
        self,
        Command,
        Registers, //
    },
    state_memory::StateMemory,
    stream::PAGE_SIZE, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};
use vfio::config_space::{
    self,
    ConfigSpace, //
};

/// How many MSI-X vectors the device has.
pub(crate) const VECTORS: u32 = 4;

/// The size of the MSI-X table in bytes.
const TABLE_SIZE: usize = VECTORS as usize * 16;

/// The size of the MSI-X pending bit array in bytes.
const PBA_SIZE: usize = 8;

/// The size of [`Snapshot`] in bytes.
pub(crate) const SNAPSHOT_SIZE: usize =
    config_space::SIZE + registers::SNAPSHOT_SIZE + TABLE_SIZE + PBA_SIZE;

/// All of the device's state but its memory, as it is in the stream.
pub(crate) type Snapshot = [u8; SNAPSHOT_SIZE];

/// What a bus access needs to have for itself.
struct Front {
    /// The device is not stopped. While it is, its state changes by loading and reset alone.
    running: bool,
    config: ConfigSpace,
    registers: Registers,
    msix_table: [u8; TABLE_SIZE],
    /// How many writes were dropped because the device was stopped. Says something about this
    /// host's user, so it does not migrate.
    dropped: u64,
}

impl Front {
    fn power_on(config: ConfigSpace) -> Self {
        Self {
            running: true,
            config,
            registers: Registers::default(),
            msix_table: [0; TABLE_SIZE],
            dropped: 0,
        }
    }
}

/// The device behind its bus, shared by the driver and the migration session.
#[pin_data]
pub(crate) struct Chip {
    /// The configuration space at power on.
    config: ConfigSpace,
    #[pin]
    pub(crate) memory: StateMemory,
    /// Held across a whole bus access, commands included, so that who stops the device waits for
    /// the access under way. Never held across a user copy.
    #[pin]
    front: Mutex<Front>,
}

impl Chip {
    /// Makes a device in the state of power on, with `pages` pages of state memory.
    pub(crate) fn new(pages: usize) -> Result<Arc<Self>> {
        let memory = StateMemory::new(pages)?;
        let config = power_on(pages * PAGE_SIZE)?;
        let front = Front::power_on(config.clone());
        Arc::pin_init(
            pin_init!(Self {
                config,
                memory <- memory,
                front <- new_mutex!(front, "vfio_mock::Chip::front"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Lets the device run or stops it. What is under way is finished when this returns.
    pub(crate) fn run(&self, running: bool) {
        self.front.lock().running = running;
    }

    /// Brings the device into the state of power on.
    pub(crate) fn reset(&self) {
        let mut front = self.front.lock();
        *front = Front::power_on(self.config.clone());
        self.memory.clear();
    }

    /// Reads from BAR0.
    pub(crate) fn read_registers(&self, offset: usize, to: &mut [u8]) {
        let front = self.front.lock();
        let image = front.registers.image(self.memory.size(), front.dropped);
        to.fill(0);
        overlay(offset, to, 0, &image);
        overlay(
            offset,
            to,
            registers::MSIX_TABLE as usize,
            &front.msix_table,
        );
    }

    /// Writes to BAR0. Returns the vector to signal, if the write was a command that asked for
    /// one.
    pub(crate) fn write_registers(&self, offset: usize, from: &[u8]) -> Option<u32> {
        let mut guard = self.front.lock();
        let front = &mut *guard;
        if !front.running {
            front.dropped += 1;
            return None;
        }
        underlay(
            offset,
            from,
            registers::MSIX_TABLE as usize,
            &mut front.msix_table,
        );
        let command = front.registers.write(offset, from)?;
        let range = front.registers.range(self.memory.size());
        let result = match (command, range) {
            (Command::Reinit, _) => {
                self.memory.reinit(front.registers.seed);
                Ok(())
            }
            (Command::Unknown, _) => Err(registers::ERROR_COMMAND),
            (_, None) => Err(registers::ERROR_RANGE),
            (Command::Fill, Some(range)) => {
                self.memory.fill(front.registers.seed, range);
                Ok(())
            }
            (Command::Checksum, Some(range)) => {
                front.registers.result = self.memory.checksum(range);
                Ok(())
            }
        };
        front.registers.complete(result);
        front.registers.vector()
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

    /// Reads from the configuration space.
    pub(crate) fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.front.lock().config.read(offset, to);
    }

    /// Writes to the configuration space: it belongs to the bus and works while the device is
    /// stopped.
    pub(crate) fn write_config(&self, offset: usize, from: &[u8]) {
        self.front.lock().config.write(offset, from);
    }

    /// Returns all of the device's state but its memory.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let front = self.front.lock();
        let mut snapshot = [0; SNAPSHOT_SIZE];
        let registers = front.registers.save();
        let parts: [&[u8]; 3] = [front.config.save(), &registers, &front.msix_table];
        for (to, from) in snapshot.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        snapshot
    }

    /// Tells whether a device like this can be in such a state.
    pub(crate) fn accepts(&self, snapshot: &Snapshot) -> bool {
        Parts::of(snapshot).is_some_and(|parts| {
            self.config.clone().load(parts.config).is_ok()
                && Registers::load(parts.registers).is_some()
                && parts.pba.iter().all(|byte| *byte == 0)
        })
    }

    /// Brings the device into a state that it accepts.
    pub(crate) fn restore(&self, snapshot: &Snapshot) -> Result {
        let parts = Parts::of(snapshot).ok_or(EINVAL)?;
        let registers = Registers::load(parts.registers).ok_or(EINVAL)?;
        let mut front = self.front.lock();
        front.config.load(parts.config)?;
        front.registers = registers;
        front.msix_table = *parts.msix_table;
        Ok(())
    }
}

/// The parts of a [`Snapshot`].
struct Parts<'a> {
    config: &'a [u8; config_space::SIZE],
    registers: &'a [u8; registers::SNAPSHOT_SIZE],
    msix_table: &'a [u8; TABLE_SIZE],
    pba: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(snapshot: &'a Snapshot) -> Option<Self> {
        let (config, rest) = snapshot.split_first_chunk()?;
        let (registers, rest) = rest.split_first_chunk()?;
        let (msix_table, pba) = rest.split_first_chunk()?;
        Some(Self {
            config,
            registers,
            msix_table,
            pba,
        })
    }
}

/// Copies to `to`, which is what is read at `offset`, where it meets what is at `base`.
fn overlay(offset: usize, to: &mut [u8], base: usize, from: &[u8]) {
    for (at, byte) in (offset..).zip(to) {
        if let Some(from) = at.checked_sub(base).and_then(|index| from.get(index)) {
            *byte = *from;
        }
    }
}

/// Copies from `from`, which is written at `offset`, where it meets what is at `base`.
fn underlay(offset: usize, from: &[u8], base: usize, to: &mut [u8]) {
    for (at, byte) in (offset..).zip(from) {
        if let Some(to) = at.checked_sub(base).and_then(|index| to.get_mut(index)) {
            *to = *byte;
        }
    }
}
