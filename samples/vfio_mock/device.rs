// SPDX-License-Identifier: GPL-2.0

//! The driver: what VFIO asks of the mock device.

use crate::{
    chip::Chip,
    config_space,
    delay::SaveDelay,
    load::MockLoader,
    migration_flags,
    save::{
        self,
        MockSaver, //
    },
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};
use vfio::{
    config_space::ConfigSpace,
    dma::Bus,
    emulated::{
        self,
        Work, //
    },
    endpoint::Endpoint,
    mdev,
    memory::StateMemory,
    migration::{
        Flags,
        Migratable,
        Notifier, //
    },
    region::{
        self,
        Position, //
    },
};

/// The sizes of state memory of [`mdev::Driver::TYPES`], in bytes.
const SIZES: [usize; 5] = [64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30];

// All of them are powers of two, so the others have whole pages if the smallest one has.
static_assert!(SIZES[0] % PAGE_SIZE == 0);

/// A mock device, from its creation to its removal.
pub(crate) struct Mock {
    flags: Flags,
    /// The size of the state memory in bytes.
    state_size: usize,
    save_delay: Arc<SaveDelay>,
}

impl mdev::Driver for Mock {
    const TYPES: &'static [mdev::Type] = &[
        mdev::Type {
            name: c"64K",
            pretty_name: c"Mock device, 64 KiB",
            description: c"Migratable PCI device without hardware, 64 KiB of state memory",
        },
        mdev::Type {
            name: c"1M",
            pretty_name: c"Mock device, 1 MiB",
            description: c"Migratable PCI device without hardware, 1 MiB of state memory",
        },
        mdev::Type {
            name: c"16M",
            pretty_name: c"Mock device, 16 MiB",
            description: c"Migratable PCI device without hardware, 16 MiB of state memory",
        },
        mdev::Type {
            name: c"256M",
            pretty_name: c"Mock device, 256 MiB",
            description: c"Migratable PCI device without hardware, 256 MiB of state memory",
        },
        mdev::Type {
            name: c"1G",
            pretty_name: c"Mock device, 1 GiB",
            description: c"Migratable PCI device without hardware, 1 GiB of state memory",
        },
    ];

    const ATTRIBUTES: &'static [mdev::Attribute<Self>] = &[mdev::Attribute {
        name: c"save_delay_us",
        show: |mock| u64::from(mock.save_delay.get()),
        store: |mock, micros| {
            mock.save_delay.set(u32::try_from(micros)?);
            Ok(())
        },
    }];

    const MAX_INSTANCES: u32 = 64;

    fn probe(type_index: usize) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let flags = migration_flags().ok_or(EINVAL)?;
            let state_size = *SIZES.get(type_index).ok_or(EINVAL)?;
            let save_delay = SaveDelay::new()?;
            Ok(try_init!(Self {
                flags,
                state_size,
                save_delay,
            }? Error))
        })
    }
}

#[vtable]
impl emulated::Operations for Mock {
    type OpenData = Chip;

    const NAME: &'static CStr = c"vfio_mock";

    fn migration_flags(&self) -> Flags {
        self.flags
    }

    fn config_space(&self) -> Result<ConfigSpace> {
        config_space::power_on(self.state_size)
    }

    fn open(&self, endpoint: Arc<Endpoint>) -> impl PinInit<Chip, Error> {
        Chip::new(
            endpoint,
            self.state_size / PAGE_SIZE,
            self.save_delay.clone(),
        )
    }

    fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        match pos.region_index {
            region::BAR2 => return chip.memory.read(offset, to),
            _ => chip.read_registers(offset, to),
        }
        Ok(())
    }

    fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        match pos.region_index {
            region::BAR2 => return chip.write_memory(offset, from),
            _ => chip.write_registers(offset, from),
        }
        Ok(())
    }

    fn mmap(chip: &Chip, region_index: u32) -> Option<&StateMemory> {
        (region_index == region::BAR2).then_some(&chip.memory)
    }

    fn work(chip: &Chip, bus: &Bus<'_>) -> Work {
        chip.work(bus)
    }
}

#[vtable]
impl Migratable for Chip {
    type Saver = MockSaver;
    type Loader = MockLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    // The crate lets no work and no write begin, and waits for those under way.
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

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MockSaver> {
        Self::save(this, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MockSaver> {
        MockSaver::new(this.clone(), notifier)
    }

    fn load(this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<MockLoader> {
        MockLoader::new(this.clone())
    }

    fn loaded(&self, loader: &mut MockLoader) -> Result {
        loader.finish()
    }

    fn data_size(&self) -> Result<u64> {
        Ok(save::image_size(self.memory.pages()))
    }

    fn reset(&self) -> Result {
        self.power_on();
        Ok(())
    }
}
