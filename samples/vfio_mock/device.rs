// SPDX-License-Identifier: GPL-2.0

//! The driver: what VFIO asks of the mock device.

use crate::{
    chip::{
        Chip,
        VECTORS, //
    },
    load::MockLoader,
    migration_flags, registers,
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
    config_space, emulated,
    irq::{
        self,
        Irqs, //
    },
    mdev,
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

/// A mock device, from its creation to its removal.
pub(crate) struct Mock {
    flags: Flags,
    /// The size of the state memory in bytes.
    state_size: usize,
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

    const MAX_INSTANCES: u32 = 64;

    fn probe(type_index: usize) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let flags = migration_flags().ok_or(EINVAL)?;
            let state_size = *SIZES.get(type_index).ok_or(EINVAL)?;
            Ok(try_init!(Self { flags, state_size }? Error))
        })
    }
}

/// A mock device, from the first open to the last close.
///
/// The chip with all of its state is made anew for each user.
#[pin_data]
pub(crate) struct OpenMock {
    #[pin]
    irqs: Irqs,
    chip: Arc<Chip>,
}

#[vtable]
impl emulated::Operations for Mock {
    type OpenData = OpenMock;

    const NAME: &'static CStr = c"vfio_mock";

    fn migration_flags(&self) -> Flags {
        self.flags
    }

    fn open(&self) -> impl PinInit<OpenMock, Error> {
        let mut counts = irq::Counts::default();
        counts[irq::MSIX as usize] = VECTORS;
        counts[irq::REQ as usize] = 1;
        try_pin_init!(OpenMock {
            irqs <- Irqs::new(counts),
            chip: Chip::new(self.state_size / PAGE_SIZE)?,
        }? Error)
    }

    fn region_size(&self, region_index: u32) -> u64 {
        match region_index {
            region::BAR0 => u64::from(registers::BAR_SIZE),
            region::BAR2 => self.state_size as u64,
            region::CONFIG => config_space::SIZE as u64,
            _ => 0,
        }
    }

    fn irqs(open: &OpenMock) -> &Irqs {
        &open.irqs
    }

    fn read(&self, open: &OpenMock, pos: Position, to: &mut [u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        match pos.region_index {
            region::BAR0 => open.chip.read_registers(offset, to),
            region::BAR2 => open.chip.memory.read(offset, to)?,
            region::CONFIG => open.chip.read_config(offset, to),
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    fn write(&self, open: &OpenMock, pos: Position, from: &[u8]) -> Result {
        let offset = usize::try_from(pos.region_offset)?;
        match pos.region_index {
            region::BAR0 => {
                if let Some(vector) = open.chip.write_registers(offset, from) {
                    open.irqs.trigger(irq::MSIX, vector);
                }
            }
            region::BAR2 => open.chip.write_memory(offset, from)?,
            region::CONFIG => open.chip.write_config(offset, from),
            _ => return Err(EINVAL),
        }
        Ok(())
    }
}

/// The device does no DMA, so that there is nothing to do for peer-to-peer.
#[vtable]
impl Migratable for OpenMock {
    type Saver = MockSaver;
    type Loader = MockLoader;

    fn stop(&self) -> Result {
        self.chip.run(false);
        Ok(())
    }

    fn start(&self) -> Result {
        self.chip.run(true);
        Ok(())
    }

    fn save(&self, notifier: Arc<Notifier>) -> Result<MockSaver> {
        MockSaver::new(self.chip.clone(), notifier)
    }

    fn load(&self) -> Result<MockLoader> {
        MockLoader::new(self.chip.clone())
    }

    fn loaded(&self, loader: &mut MockLoader) -> Result {
        loader.finish()
    }

    fn data_size(&self) -> u64 {
        save::image_size(self.chip.memory.pages())
    }

    fn reset(&self) {
        self.chip.reset();
    }
}
