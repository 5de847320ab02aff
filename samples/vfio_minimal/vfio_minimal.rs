// SPDX-License-Identifier: GPL-2.0

//! The smallest honest migratable VFIO device: one register and 64 KiB of memory.
//!
//! For who writes a driver on the crate `vfio`, to copy. It supports all states, tracks what
//! changes while it is saved, really stops, and refuses a stream that is not complete.
//!
//! BAR0 has a register of 64 bits at 0, which keeps what is written to it. BAR2 is the memory. The
//! stream has a record for each page, and for each one that changed after it was sent, and one for
//! the rest of the device at the end. All records have the same size: a tag of 64 bits and a page.

use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    InPlaceModule, //
};
use vfio::{
    config_space::{
        self,
        ConfigSpace,
        Id, //
    },
    emulated,
    irq::{
        self,
        Irqs, //
    },
    mdev,
    memory::Memory,
    migration::{
        Chunk,
        Flags,
        Loader,
        Migratable,
        Next,
        Notifier,
        Phase,
        Remaining,
        Saver, //
    },
    region::{
        self,
        Position, //
    },
};

/// The size of the memory in pages, of which each has a bit in a [`PageSet`].
const PAGES: usize = 16;
type PageSet = u16;

/// The tag of page 0. Those of the other pages follow, and then [`TAG_END`].
const TAG: u64 = u64::from_be_bytes(*b"MINIMAL\0");
const TAG_END: u64 = TAG + PAGES as u64;
const TAG_SIZE: usize = size_of::<u64>();
const RECORD: usize = TAG_SIZE + PAGE_SIZE;

module! {
    type: MinimalModule,
    name: "vfio_minimal",
    authors: ["The vfio_mock authors"],
    description: "The smallest migratable VFIO device",
    license: "GPL",
}

#[pin_data]
struct MinimalModule {
    #[pin]
    _registration: mdev::Registration<Minimal>,
}

impl InPlaceModule for MinimalModule {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registration <- mdev::Registration::new(),
        })
    }
}

/// A device, from its creation to its removal. It has nothing to remember.
struct Minimal;

impl mdev::Driver for Minimal {
    const TYPES: &'static [mdev::Type] = &[mdev::Type {
        name: c"64K",
        pretty_name: c"Minimal device",
        description: c"The smallest migratable PCI device, 64 KiB of memory",
    }];
    const MAX_INSTANCES: u32 = 16;

    fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
        Ok(Self)
    }
}

/// What the device consists of, shared by the driver and the migration session.
#[pin_data]
struct Chip {
    memory: Arc<Memory>,
    #[pin]
    front: Mutex<Front>,
}

/// What is only touched by one at a time.
struct Front {
    running: bool,
    config: ConfigSpace,
    register: [u8; size_of::<u64>()],
    /// Pages that were never sent, and pages that changed since. Both empty if nobody saves.
    initial: PageSet,
    dirty: PageSet,
    notifier: Option<Arc<Notifier>>,
}

impl Front {
    fn power_on() -> Result<Self> {
        // The device id is from the range that QEMU keeps for experiments.
        let id = Id {
            vendor: 0x1af4,
            device: 0x10f1,
            class: 0xff_0000,
        };
        Ok(Self {
            running: true,
            config: ConfigSpace::new(id)
                .memory_bar(region::BAR0 as usize, PAGE_SIZE as u64, false)?
                .memory_bar(region::BAR2 as usize, (PAGES * PAGE_SIZE) as u64, true)?,
            register: [0; size_of::<u64>()],
            initial: 0,
            dirty: 0,
            notifier: None,
        })
    }
}

/// A device, from the first open to the last close.
#[pin_data]
struct OpenMinimal {
    #[pin]
    irqs: Irqs,
    chip: Arc<Chip>,
}

#[vtable]
impl emulated::Operations for Minimal {
    type OpenData = OpenMinimal;
    const NAME: &'static CStr = c"vfio_minimal";

    fn migration_flags(&self) -> Flags {
        Flags::new(true, true)
    }

    fn open(&self) -> impl PinInit<OpenMinimal, Error> {
        let mut counts = irq::Counts::default();
        counts[irq::REQ as usize] = 1;
        try_pin_init!(OpenMinimal {
            irqs <- Irqs::new(counts),
            chip: Arc::pin_init(
                try_pin_init!(Chip {
                    memory: Arc::new(Memory::new(PAGES)?, GFP_KERNEL_ACCOUNT)?,
                    front <- new_mutex!(Front::power_on()?, "vfio_minimal::Chip::front"),
                }? Error),
                GFP_KERNEL_ACCOUNT,
            )?,
        }? Error)
    }

    fn region_size(&self, region_index: u32) -> u64 {
        match region_index {
            region::BAR0 => PAGE_SIZE as u64,
            region::BAR2 => (PAGES * PAGE_SIZE) as u64,
            region::CONFIG => config_space::SIZE as u64,
            _ => 0,
        }
    }

    fn irqs(open: &OpenMinimal) -> &Irqs {
        &open.irqs
    }

    fn read(&self, open: &OpenMinimal, pos: Position, to: &mut [u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        match pos.region_index {
            region::BAR2 => return open.chip.memory.read(offset, to),
            region::CONFIG => open.chip.front.lock().config.read(offset, to),
            _ => {
                let front = open.chip.front.lock();
                for (at, byte) in (offset..).zip(to) {
                    *byte = front.register.get(at).copied().unwrap_or(0);
                }
            }
        }
        Ok(())
    }

    fn write(&self, open: &OpenMinimal, pos: Position, from: &[u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        let front = &mut *open.chip.front.lock();
        match pos.region_index {
            region::CONFIG => front.config.write(offset, from),
            // A stopped device does not change.
            _ if !front.running => (),
            region::BAR2 => {
                // First the write and then the mark: a saver clears the mark and reads then.
                open.chip.memory.write(offset, from)?;
                let idle = front.initial | front.dirty == 0;
                if let (Some(notifier), false) = (&front.notifier, from.is_empty()) {
                    for page in offset / PAGE_SIZE..=(offset + from.len() - 1) / PAGE_SIZE {
                        front.dirty |= (1 << page) & !front.initial;
                    }
                    if idle {
                        notifier.notify();
                    }
                }
            }
            _ => {
                for (to, from) in front.register.iter_mut().skip(offset).zip(from) {
                    *to = *from;
                }
            }
        }
        Ok(())
    }
}

#[vtable]
impl Migratable for OpenMinimal {
    type Saver = MinimalSaver;
    type Loader = MinimalLoader;

    fn stop(&self) -> Result {
        self.chip.front.lock().running = false;
        Ok(())
    }

    fn start(&self) -> Result {
        self.chip.front.lock().running = true;
        Ok(())
    }

    fn save(&self, notifier: Arc<Notifier>) -> Result<MinimalSaver> {
        let mut front = self.chip.front.lock();
        front.initial = PageSet::MAX;
        front.notifier = Some(notifier);
        Ok(MinimalSaver {
            chip: self.chip.clone(),
            ended: false,
        })
    }

    fn load(&self) -> Result<MinimalLoader> {
        Ok(MinimalLoader {
            chip: self.chip.clone(),
            record: KVec::with_capacity(RECORD, GFP_KERNEL_ACCOUNT)?,
            loaded: 0,
            ended: false,
        })
    }

    fn loaded(&self, loader: &mut MinimalLoader) -> Result {
        loader.apply()
    }

    fn data_size(&self) -> u64 {
        ((PAGES + 1) * RECORD) as u64
    }

    fn reset(&self) {
        let mut front = self.chip.front.lock();
        if let Ok(power_on) = Front::power_on() {
            *front = power_on;
        }
        self.chip.memory.clear();
    }
}

/// Cuts the device's state into records.
struct MinimalSaver {
    chip: Arc<Chip>,
    /// The last record was made.
    ended: bool,
}

impl Saver for MinimalSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        let front = &mut *self.chip.front.lock();
        let initial = front.initial != 0;
        let pages = if initial {
            &mut front.initial
        } else {
            &mut front.dirty
        };
        if *pages != 0 {
            let page = pages.trailing_zeros() as usize;
            *pages &= *pages - 1;
            let start = page * PAGE_SIZE;
            let chunk = Chunk::new(&(TAG + page as u64).to_le_bytes())?
                .memory(self.chip.memory.clone(), start..start + PAGE_SIZE);
            return Ok(Next::Chunk(if initial { chunk.initial() } else { chunk }));
        }
        if phase == Phase::PreCopy || self.ended {
            return Ok(Next::End);
        }
        let mut rest = KVVec::with_capacity(PAGE_SIZE, GFP_KERNEL_ACCOUNT)?;
        rest.extend_from_slice(front.config.save(), GFP_KERNEL_ACCOUNT)?;
        rest.extend_from_slice(&front.register, GFP_KERNEL_ACCOUNT)?;
        rest.resize(PAGE_SIZE, 0, GFP_KERNEL_ACCOUNT)?;
        self.ended = true;
        Ok(Next::Chunk(Chunk::new(&TAG_END.to_le_bytes())?.bytes(rest)))
    }

    fn remaining(&self) -> Remaining {
        let front = self.chip.front.lock();
        Remaining {
            initial: u64::from(front.initial.count_ones()) * RECORD as u64,
            dirty: u64::from(front.dirty.count_ones()) * RECORD as u64,
            tail: if self.ended { 0 } else { RECORD as u64 },
            reinits: 0,
        }
    }
}

impl Drop for MinimalSaver {
    fn drop(&mut self) {
        let mut front = self.chip.front.lock();
        (front.initial, front.dirty) = (0, 0);
        let notifier = front.notifier.take();
        // Whoever drops the last reference must be able to sleep, and need not hold the lock.
        drop(front);
        drop(notifier);
    }
}

/// Puts records together again.
struct MinimalLoader {
    chip: Arc<Chip>,
    /// The record that is arriving; at the end, the last one.
    record: KVec<u8>,
    loaded: PageSet,
    ended: bool,
}

impl MinimalLoader {
    /// Takes in the record that has arrived.
    fn take(&mut self) -> Result {
        let (tag, page) = self.record.split_first_chunk().ok_or(EINVAL)?;
        match u64::from_le_bytes(*tag).wrapping_sub(TAG) as usize {
            PAGES if self.loaded == PageSet::MAX => {
                // The configuration space is checked now, for the writer to hear of it.
                let config = page.first_chunk().ok_or(EINVAL)?;
                self.chip.front.lock().config.clone().load(config)?;
                self.ended = true;
            }
            index if index < PAGES => {
                self.chip.memory.write(index * PAGE_SIZE, page)?;
                self.loaded |= 1 << index;
                self.record.clear();
            }
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    /// Puts the last record into effect.
    fn apply(&self) -> Result {
        let (_, rest) = self.record.split_first_chunk::<TAG_SIZE>().ok_or(EINVAL)?;
        let (config, rest) = rest.split_first_chunk().ok_or(EINVAL)?;
        if !self.ended {
            return Err(EINVAL);
        }
        let mut front = self.chip.front.lock();
        front.config.load(config)?;
        front.register = *rest.first_chunk().ok_or(EINVAL)?;
        Ok(())
    }
}

impl Loader for MinimalLoader {
    fn write(&mut self, mut bytes: &[u8]) -> Result {
        while !bytes.is_empty() {
            // Nothing may follow the last record.
            if self.ended {
                return Err(EINVAL);
            }
            let (now, later) = bytes.split_at(bytes.len().min(RECORD - self.record.len()));
            self.record.extend_from_slice(now, GFP_KERNEL_ACCOUNT)?;
            bytes = later;
            if self.record.len() == RECORD {
                self.take()?;
            }
        }
        Ok(())
    }
}
