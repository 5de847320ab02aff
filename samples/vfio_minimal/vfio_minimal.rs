// SPDX-License-Identifier: GPL-2.0

//! A minimal migratable VFIO device with 64 KiB of memory. The first words are registers.
//!
//! This is a template for driver authors, based on the crate `vfio`. The driver supports all
//! states, tracks changes while the device is saved, stops the device, and refuses an incomplete
//! stream.
//!
//! The register at 0 of BAR0 identifies the device and is read-only. The register at 8 counts the
//! writes. Everything else is memory. The stream has a record for each page, another one whenever a
//! page changes after it was sent, and a last record. All records have the same size: a tag of 64
//! bits and a page.

use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};
use vfio::prelude::*;

/// The size of the memory in bytes.
const SIZE: usize = 64 << 10;

/// The size of the memory in pages, with the page size of the kernel.
const PAGES: usize = SIZE / PAGE_SIZE;

static_assert!(SIZE % PAGE_SIZE == 0);
// There is a bit for each page in `MinimalLoader::loaded`.
static_assert!(PAGES < u32::BITS as usize);

/// Value of the register at 0.
const MAGIC: u64 = u64::from_be_bytes(*b"MINIMAL\0");
const MAGIC_REGISTER: usize = 0;
const WRITES_REGISTER: usize = 8;
const MEMORY: usize = 16;

/// The tag of page 0. The tags of other pages follow, and then that of the last record. They depend
/// on the page size: the stream of a host with other pages is refused.
const TAG: u64 = MAGIC + PAGE_SIZE as u64;

/// The size of a record in bytes.
const RECORD: usize = size_of::<u64>() + PAGE_SIZE;

/// The identity on the PCI bus. The device id is from the range that QEMU keeps for experiments.
const ID: config_space::Id = config_space::Id {
    vendor: 0x1af4,
    device: 0x10f1,
    class: 0xff_0000,
};

vfio::module_emulated_driver! {
    type: Minimal,
    id: ID,
    name: "vfio_minimal",
    authors: ["The vfio_mock authors"],
    description: "The smallest migratable VFIO device",
    license: "GPL",
}

/// A device, from its creation to its removal. It has no data.
struct Minimal;

impl emulated::Driver for Minimal {
    const TYPES: &'static [emulated::Type] = &[emulated::Type {
        name: c"64K",
        pretty_name: c"Minimal device",
        description: c"The smallest migratable PCI device, 64 KiB of memory",
    }];
    const MAX_INSTANCES: u32 = 16;

    fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
        Ok(Self)
    }
}

/// A device, from the first open to the last close.
#[pin_data]
struct Chip {
    function: Arc<Function>,
    memory: StateMemory,
    /// Held while the registers change.
    #[pin]
    registers: Mutex<()>,
}

impl Chip {
    /// Reads a register.
    fn register(&self, offset: usize) -> Result<u64> {
        let mut bytes = [0; size_of::<u64>()];
        self.memory.read(offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

#[vtable]
impl emulated::Operations for Minimal {
    type OpenData = Chip;
    const NAME: &'static CStr = c"vfio_minimal";

    fn config_space(&self) -> Result<ConfigSpace> {
        ConfigSpace::new(ID).memory_bar(region::BAR0 as usize, SIZE as u64, false)
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
        try_pin_init!(Chip {
            function,
            memory: {
                let memory = StateMemory::new(PAGES)?;
                memory.write(MAGIC_REGISTER, &MAGIC.to_le_bytes())?;
                memory
            },
            registers <- new_mutex!((), "vfio_minimal::Chip::registers"),
        }? Error)
    }

    fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
        chip.memory.read(pos.region_offset as usize, to)
    }

    fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
        let offset = pos.region_offset as usize;
        let writable = from.get(MEMORY.saturating_sub(offset)..).unwrap_or(&[]);
        chip.memory.write(offset.max(MEMORY), writable)?;
        let _registers = chip.registers.lock();
        let writes = chip.register(WRITES_REGISTER)?.wrapping_add(1);
        chip.memory.write(WRITES_REGISTER, &writes.to_le_bytes())
    }
}

#[vtable]
impl Migratable for Chip {
    type Saver = MinimalSaver;
    type Loader = MinimalLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    // There is no DMA.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    // Nothing but a write changes the device, and the crate drops writes to a stopped device.
    fn stop(&self) -> Result {
        Ok(())
    }

    fn start(&self) -> Result {
        Ok(())
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MinimalSaver> {
        Self::save(this, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MinimalSaver> {
        Ok(MinimalSaver {
            tracking: this.memory.track(notifier)?,
            chip: this.clone(),
            ended: false,
        })
    }

    fn load(this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<MinimalLoader> {
        Ok(MinimalLoader {
            chip: this.clone(),
            records: Records::new(RECORD)?,
            loaded: 0,
            ended: false,
        })
    }

    fn loaded(&self, loader: &mut MinimalLoader) -> Result {
        loader.ended.then_some(()).ok_or(EINVAL)
    }

    fn data_size(&self) -> Result<u64> {
        Ok(((PAGES + 1) * RECORD) as u64)
    }

    fn reset(&self) -> Result {
        self.memory.clear();
        self.memory.write(MAGIC_REGISTER, &MAGIC.to_le_bytes())
    }
}

/// Saver that cuts the device's state into records.
struct MinimalSaver {
    chip: Arc<Chip>,
    tracking: Tracking,
    /// The last record was returned.
    ended: bool,
}

impl Saver for MinimalSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        if let Some(page) = self.tracking.take(1) {
            let chunk = Chunk::new(&(TAG + page.pages().start as u64).to_le_bytes())?;
            return Ok(Next::Chunk(chunk.pages(page)));
        }
        if phase == Phase::PreCopy || self.ended {
            return Ok(Next::End);
        }
        // The last record has the configuration space.
        let mut rest = KVVec::zeroed(PAGE_SIZE, GFP_KERNEL_ACCOUNT)?;
        rest[..config_space::SIZE].copy_from_slice(&self.chip.function.save_config());
        self.ended = true;
        let chunk = Chunk::new(&(TAG + PAGES as u64).to_le_bytes())?;
        Ok(Next::Chunk(chunk.bytes(rest)))
    }

    fn remaining(&self) -> Result<Remaining> {
        let pending = self.tracking.pending();
        Ok(Remaining {
            initial: pending.initial.pages * RECORD as u64,
            dirty: pending.dirty.pages * RECORD as u64,
            tail: if self.ended { 0 } else { RECORD as u64 },
            reinits: pending.reinits,
        })
    }
}

/// Loader of records.
struct MinimalLoader {
    chip: Arc<Chip>,
    records: Records,
    /// A bit for each loaded page.
    loaded: u32,
    /// The last record was loaded.
    ended: bool,
}

impl Loader for MinimalLoader {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let chip = &self.chip;
        let taken = self.records.feed(bytes, |record| {
            let (tag, page) = record.split_first_chunk().ok_or(EINVAL)?;
            let index = u64::from_le_bytes(*tag).wrapping_sub(TAG) as usize;
            // Nothing may follow the last record.
            if self.ended || index > PAGES {
                return Err(EINVAL);
            }
            if index < PAGES {
                self.loaded |= 1 << index;
                return chip.memory.write(index * PAGE_SIZE, page);
            }
            // No page may be missing before it, and the memory must be that of such a device.
            if self.loaded != (1 << PAGES) - 1 || chip.register(MAGIC_REGISTER)? != MAGIC {
                return Err(EINVAL);
            }
            self.ended = true;
            let config = page.first_chunk().ok_or(EINVAL)?;
            let accepted = chip.function.accepts_config(config);
            accepted.then_some(()).ok_or(EINVAL)
        })?;
        // Nor may half a record.
        if self.ended && self.records.is_partial() {
            return Err(EINVAL);
        }
        Ok(taken)
    }
}
