// SPDX-License-Identifier: GPL-2.0

//! A variant driver of PCI devices whose whole state is in their BARs.
//!
//! Every QEMU has such devices: `bochs-display` and `ivshmem-plain`. They do no DMA and have no
//! hidden state, and no reset clears them. The driver adds live migration, and clears them.
//!
//! The stream has records of one size: a tag of 64 bits and a page. The first record identifies the
//! device. One follows for each page of the memory, and another each time a page changes after it
//! was sent. The last record has a checksum of all others, and the registers.

use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};
use vfio::{
    memory::GFP_MAYFAIL,
    prelude::*, //
};

const VERSION: u64 = 1;
/// Tags of the first and the last record. The tag of another record is the number of its page.
const FIRST: u64 = u64::from_le_bytes(*b"MEMBAR\0\0");
const LAST: u64 = FIRST + 1;
/// The size of a record and of its tag in bytes.
const RECORD: usize = TAG + PAGE_SIZE;
const TAG: usize = size_of::<u64>();

vfio::module_vfio_pci_driver! {
    type: Driver,
    name: "vfio_membar",
    authors: ["The vfio_mock authors"],
    description: "Live migration of PCI devices with memory in a BAR",
    license: "GPL",
}

vfio::vfio_pci_device_table!(TABLE, [BOCHS.id, IVSHMEM.id]);

/// A kind of device.
struct Model {
    id: pci::DeviceId,
    /// The BAR that is memory, and that with the registers.
    bars: (u32, u32),
    /// Registers of the state, in groups: offset, number, size in bytes, and value at power on.
    saved: &'static [(u64, u64, usize, u32)],
}

const BOCHS: Model = Model {
    // Not the VGA devices of QEMU, which have the same ids and more registers.
    id: pci::DeviceId::from_id(0x1234, 0x1111).with_class(0x03_8000),
    bars: (region::BAR0, region::BAR2),
    // From the horizontal resolution to the vertical offset, and the byte order.
    saved: &[(0x502, 9, 2, 0), (0x604, 1, 4, 0x1e1e_1e1e)],
};

const IVSHMEM: Model = Model {
    id: pci::DeviceId::from_id(0x1af4, 0x1110),
    bars: (region::BAR2, region::BAR0),
    // The interrupt mask and status.
    saved: &[(0, 2, 4, 0)],
};

/// A device while it is bound to this driver.
struct Driver(&'static Model);

#[vtable]
impl pci::Operations for Driver {
    type OpenData = Chip;
    const NAME: &'static CStr = c"vfio_membar";

    fn open(&self, function: Arc<pci::Function>) -> impl PinInit<Chip, Error> {
        try_init!(Chip {
            model: self.0,
            memory: match function.size(region::BAR1) {
                0 => pci::BarMemory::new(function.clone(), self.0.bars.0),
                // Only ivshmem-doorbell has BAR1. Other machines write to its memory.
                _ => Err(ENODEV),
            }?,
            function,
        }? Error)
    }

    fn region(chip: &Chip, region_index: u32) -> pci::Region<'_> {
        match region_index {
            index if index == chip.model.bars.0 => pci::Region::Tracked(&chip.memory),
            index if index == chip.model.bars.1 => pci::Region::Trapped,
            _ => pci::Region::Direct,
        }
    }
}

impl pci::Driver for Driver {
    const ID_TABLE: pci::IdTable = &TABLE;

    fn probe(device: &kernel::pci::Device<kernel::device::Bound>) -> impl PinInit<Self, Error> {
        let mut models = [&BOCHS, &IVSHMEM].into_iter();
        let model = models.find(|model| model.id.matches(device));
        model.map(Self).ok_or(ENODEV)
    }
}

/// A device, from the first open to the last close.
struct Chip {
    model: &'static Model,
    memory: pci::BarMemory,
    function: Arc<pci::Function>,
}

impl Chip {
    /// Returns the content of the first record.
    fn header(&self) -> Result<KVVec<u8>> {
        let id = self.model.id.as_raw().into();
        page_of([VERSION, id, PAGE_SIZE as u64, self.memory.size() as u64])
    }

    /// Returns the position, the place in the last record, and the initial value of each register.
    fn registers(&self) -> impl Iterator<Item = (Position, Range<usize>, u32)> {
        let bar = self.model.bars.1;
        let saved = self.model.saved.iter();
        let all = saved.flat_map(move |&(offset, count, size, value)| {
            (0..count).map(move |number| (offset + number * size as u64, size, value))
        });
        all.zip((TAG..).step_by(TAG))
            .map(move |((offset, size, value), at)| {
                (Position::new(bar, offset), at..at + size, value)
            })
    }
}

#[vtable]
impl Migratable for Chip {
    type Saver = BarSaver;
    type Loader = BarLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    // Nothing but a write changes the device, and the crate drops writes to a stopped device.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    fn stop(&self) -> Result {
        Ok(())
    }

    fn start(&self) -> Result {
        Ok(())
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<BarSaver> {
        Self::save(this, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<BarSaver> {
        Ok(BarSaver {
            tracking: this.memory.track(notifier)?,
            chip: this.clone(),
            ended: false,
            sum: None,
        })
    }

    fn load(this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<BarLoader> {
        Ok(BarLoader {
            chip: this.clone(),
            records: Records::new(RECORD)?,
            loaded: KVVec::zeroed(this.memory.pages(), GFP_MAYFAIL)?,
            ended: false,
            sum: None,
        })
    }

    fn loaded(&self, loader: &mut BarLoader) -> Result {
        loader.ended.then_some(()).ok_or(EINVAL)
    }

    fn data_size(&self) -> Result<u64> {
        Ok(((self.memory.pages() + 2) * RECORD) as u64)
    }

    fn reset(&self) -> Result {
        self.memory.clear()?;
        self.registers().try_for_each(|(pos, at, value)| {
            self.function.write(pos, &value.to_le_bytes()[..at.len()])
        })
    }
}

/// Returns a page that begins with `words`.
fn page_of<const N: usize>(words: [u64; N]) -> Result<KVVec<u8>> {
    let mut page = KVVec::zeroed(PAGE_SIZE, GFP_KERNEL_ACCOUNT)?;
    page[..N * TAG].copy_from_slice(words.map(u64::to_le_bytes).as_flattened());
    Ok(page)
}

/// Adds a record to a checksum.
fn add(sum: Option<u64>, tag: u64, page: &[u8]) -> u64 {
    page.chunks_exact(TAG)
        .fold(sum.unwrap_or(0) ^ tag, |sum, word| {
            let word = word.try_into().map_or(0, u64::from_le_bytes);
            (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95)
        })
}

/// Saver that cuts the device's state into records.
struct BarSaver {
    chip: Arc<Chip>,
    tracking: pci::BarTracking,
    /// The checksum of the records so far, and whether they include the last one.
    sum: Option<u64>,
    ended: bool,
}

impl Saver for BarSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        let (tag, initial, page) = if self.sum.is_none() {
            (FIRST, true, self.chip.header()?)
        } else if let Some(run) = self.tracking.take(1)? {
            (run.pages().start as u64, run.is_initial(), run.into_bytes())
        } else if phase == Phase::PreCopy || self.ended {
            return Ok(Next::End);
        } else {
            let mut page = page_of([self.sum.unwrap_or(0)])?;
            for (pos, at, _) in self.chip.registers() {
                self.chip.function.read(pos, &mut page[at.clone()])?;
                // The interrupt status of ivshmem is cleared by a read.
                self.chip.function.write(pos, &page[at])?;
            }
            self.ended = true;
            (LAST, false, page)
        };
        self.sum = Some(add(self.sum, tag, &page));
        let chunk = Chunk::new(&tag.to_le_bytes())?.bytes(page);
        Ok(Next::Chunk(if initial { chunk.initial() } else { chunk }))
    }

    fn remaining(&self) -> Result<Remaining> {
        let pending = self.tracking.pending();
        let size = |records| records * RECORD as u64;
        Ok(Remaining {
            initial: size(pending.initial.pages + u64::from(self.sum.is_none())),
            dirty: size(pending.dirty.pages),
            tail: size(u64::from(!self.ended)),
            ..Default::default()
        })
    }
}

/// Loader of records.
struct BarLoader {
    chip: Arc<Chip>,
    records: Records,
    /// Whether each page was loaded.
    loaded: KVVec<bool>,
    /// The checksum of the records so far, and whether they include the last one.
    sum: Option<u64>,
    ended: bool,
}

impl Loader for BarLoader {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let chip = &self.chip;
        let taken = self.records.feed(bytes, |record| {
            let (tag, page) = record.split_first_chunk().ok_or(EINVAL)?;
            let tag = u64::from_le_bytes(*tag);
            // Nothing may precede the first record or follow the last one, nor half a record.
            if self.ended || self.sum.is_some() == (tag == FIRST) {
                return Err(EINVAL);
            }
            match tag {
                FIRST if chip.header()?[..] != *page => return Err(EINVAL),
                FIRST => (),
                LAST => {
                    let mut expected = page_of([self.sum.unwrap_or(0)])?;
                    for (_, at, _) in chip.registers() {
                        expected[at.clone()].copy_from_slice(&page[at]);
                    }
                    // No page may be missing before it, and all other bytes are known.
                    if expected[..] != *page || self.loaded.contains(&false) {
                        return Err(EINVAL);
                    }
                    chip.registers()
                        .try_for_each(|(pos, at, _)| chip.function.write(pos, &page[at]))?;
                    self.ended = true;
                }
                _ => {
                    let number = usize::try_from(tag)?;
                    *self.loaded.get_mut(number).ok_or(EINVAL)? = true;
                    chip.memory.write(number * PAGE_SIZE, page)?;
                }
            }
            self.sum = Some(add(self.sum, tag, page));
            Ok(())
        })?;
        let is_whole = !self.ended || !self.records.is_partial();
        is_whole.then_some(taken).ok_or(EINVAL)
    }
}
