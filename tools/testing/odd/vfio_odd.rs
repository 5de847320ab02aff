// SPDX-License-Identifier: GPL-2.0

//! Devices for tests of the crate `vfio`: one whose reads wait, one whose reset fails, and several
//! that are refused.
//!
//! Used by `vfio_odd_test.c`, which has the expected behaviour of each type.

use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Completion, //
    },
};
use vfio::prelude::*;

vfio::module_mdev_driver! {
    type: Odd,
    name: "vfio_odd",
    authors: ["The vfio_mock authors"],
    description: "Devices for tests of the crate vfio",
    license: "GPL",
}

/// Types of devices, in the order of [`Odd::TYPES`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Reads of BAR0 wait.
    SlowRead,
    /// BAR0 is as large as a region can be.
    LargestBar,
    /// BAR0 is larger than a region can be.
    TooLargeBar,
    /// The memory to be mapped is smaller than its BAR.
    MmapSmall,
    /// The memory to be mapped has the MSI-X table.
    MmapMsix,
    /// The memory to be mapped claims to be the configuration space.
    MmapConfig,
    /// The first reset after the first open fails. BAR0 has memory.
    FailingReset,
}

const KINDS: [Kind; 7] = [
    Kind::SlowRead,
    Kind::LargestBar,
    Kind::TooLargeBar,
    Kind::MmapSmall,
    Kind::MmapMsix,
    Kind::MmapConfig,
    Kind::FailingReset,
];

/// The size of the BARs of most types: larger than the memory of [`Kind::MmapSmall`].
const BAR_SIZE: usize = 2 * PAGE_SIZE;

/// Blocks the reads of a [`Kind::SlowRead`] until it is opened.
#[pin_data]
struct Valve {
    /// Number of reads that have begun.
    begun: Atomic<u64>,
    /// Number of reads that have ended.
    ended: Atomic<u64>,
    #[pin]
    open: Completion,
}

/// Data of a device, from its creation to its removal.
struct Odd {
    kind: Kind,
    valve: Arc<Valve>,
}

impl mdev::Driver for Odd {
    const TYPES: &'static [mdev::Type] = &[
        mdev::Type {
            name: c"slow_read",
            pretty_name: c"Slow read",
            description: c"Reads of BAR0 wait until the attribute open is written",
        },
        mdev::Type {
            name: c"largest_bar",
            pretty_name: c"Largest BAR",
            description: c"BAR0 is as large as a region can be",
        },
        mdev::Type {
            name: c"too_large_bar",
            pretty_name: c"Too large BAR",
            description: c"BAR0 is larger than a region can be",
        },
        mdev::Type {
            name: c"mmap_small",
            pretty_name: c"Small memory",
            description: c"The memory to be mapped is smaller than its BAR",
        },
        mdev::Type {
            name: c"mmap_msix",
            pretty_name: c"Memory with MSI-X",
            description: c"The memory to be mapped has the MSI-X table",
        },
        mdev::Type {
            name: c"mmap_config",
            pretty_name: c"Memory as configuration space",
            description: c"The memory to be mapped claims to be the configuration space",
        },
        mdev::Type {
            name: c"failing_reset",
            pretty_name: c"Failing reset",
            description: c"The first reset fails",
        },
    ];
    const ATTRIBUTES: &'static [mdev::Attribute<Self>] = &[
        mdev::Attribute::Number {
            name: c"begun",
            show: |odd| odd.valve.begun.load(Relaxed),
            store: |_, _| Err(EPERM),
        },
        mdev::Attribute::Number {
            name: c"ended",
            show: |odd| odd.valve.ended.load(Relaxed),
            store: |_, _| Err(EPERM),
        },
        mdev::Attribute::Number {
            name: c"open",
            show: |_| 0,
            store: |odd, _| {
                odd.valve.open.complete_all();
                Ok(())
            },
        },
    ];
    const MAX_INSTANCES: u32 = 8;

    fn probe(type_index: usize) -> impl PinInit<Self, Error> {
        let kind = KINDS.get(type_index).copied().ok_or(EINVAL)?;
        let valve = Arc::pin_init(
            pin_init!(Valve {
                begun: Atomic::new(0),
                ended: Atomic::new(0),
                open <- Completion::new(),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self { kind, valve })
    }
}

#[vtable]
impl emulated::Operations for Odd {
    type OpenData = Chip;
    const NAME: &'static CStr = c"vfio_odd";

    fn config_space(&self) -> Result<ConfigSpace> {
        let space = ConfigSpace::new(config_space::Id {
            vendor: 0x1af4,
            device: 0x10f3,
            class: 0xff_0000,
        });
        let bar0 = region::BAR0 as usize;
        match self.kind {
            Kind::LargestBar => space.memory_bar(bar0, region::MAX_SIZE, false),
            Kind::TooLargeBar => space.memory_bar(bar0, 2 * region::MAX_SIZE, false),
            Kind::MmapMsix => {
                space
                    .memory_bar(bar0, BAR_SIZE as u64, false)?
                    .msix(1, region::BAR0, 0, 0x800)
            }
            _ => space.memory_bar(bar0, BAR_SIZE as u64, false),
        }
    }

    fn open(&self, _function: Arc<Function>) -> impl PinInit<Chip, Error> {
        let pages = match self.kind {
            Kind::MmapSmall => 1,
            _ => BAR_SIZE / PAGE_SIZE,
        };
        Ok(Chip {
            kind: self.kind,
            valve: self.valve.clone(),
            memory: StateMemory::new(pages)?,
            was_reset: Atomic::new(false),
        })
    }

    fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
        to.fill(0);
        match chip.kind {
            Kind::SlowRead => {
                chip.valve.begun.fetch_add(1, Relaxed);
                chip.valve.open.wait_for_completion();
                chip.valve.ended.fetch_add(1, Relaxed);
                Ok(())
            }
            Kind::FailingReset => chip.memory.read(pos.region_offset as usize, to),
            _ => Ok(()),
        }
    }

    fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
        match chip.kind {
            Kind::FailingReset => chip.memory.write(pos.region_offset as usize, from),
            _ => Ok(()),
        }
    }

    fn mmap(chip: &Chip, region_index: u32) -> Option<&StateMemory> {
        let mapped = match chip.kind {
            Kind::MmapSmall | Kind::MmapMsix | Kind::FailingReset => region::BAR0,
            Kind::MmapConfig => region::CONFIG,
            _ => return None,
        };
        (region_index == mapped).then_some(&chip.memory)
    }
}

/// Data of a device, from the first open to the last close.
struct Chip {
    kind: Kind,
    valve: Arc<Valve>,
    memory: StateMemory,
    /// A reset was requested.
    was_reset: Atomic<bool>,
}

/// The device has no state.
#[vtable]
impl Migratable for Chip {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY;

    fn stop(&self) -> Result {
        Ok(())
    }

    fn start(&self) -> Result {
        Ok(())
    }

    fn save(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageSaver> {
        ImageSaver::new(&[&[0]])
    }

    fn load(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageLoader> {
        ImageLoader::new(1)
    }

    fn loaded(&self, loader: &mut ImageLoader) -> Result {
        loader.image().map(|_| ())
    }

    fn data_size(&self) -> Result<u64> {
        Ok(1)
    }

    fn reset(&self) -> Result {
        if self.kind == Kind::FailingReset && !self.was_reset.xchg(true, Relaxed) {
            return Err(EIO);
        }
        self.memory.clear();
        Ok(())
    }
}
