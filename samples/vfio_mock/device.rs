// SPDX-License-Identifier: GPL-2.0

//! The driver: device types, configuration space and BARs.

use crate::{
    chip::Chip,
    defaults,
    knobs::{
        rules::Event,
        Knobs, //
    },
    max_instances,
    migration_flags,
    registers, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};
use vfio::{
    dma::{
        Bus,
        LogRequest, //
    },
    emulated::{
        self,
        config_space::{
            ConfigSpace,
            Id, //
        },
        region::{
            self,
            Position, //
        },
        Function,
        Work, //
    },
    mdev,
    memory::StateMemory,
    migration::Flags,
    pci,
    soft_pci, //
};

/// PCI ID from the range that QEMU reserves for experiments (`1af4:10f0` to `1af4:10ff`), and the
/// class code of devices that fit no class.
const ID: Id = Id {
    vendor: 0x1af4,
    device: 0x10f0,
    class: 0xff_0000,
};

/// Sizes of the state memory of [`mdev::Driver::TYPES`] in bytes.
const SIZES: [usize; 5] = [64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30];

// All sizes are powers of two: if the smallest one has whole pages, the others have.
static_assert!(SIZES[0] % PAGE_SIZE == 0);

/// A mock device, from its creation to its removal.
pub(crate) struct Mock {
    /// Raw [`Flags`].
    pub(crate) flags: Atomic<u64>,
    /// Whether it has a DMA log.
    pub(crate) dma_log: Atomic<bool>,
    /// Size of the state memory in bytes.
    pub(crate) state_size: usize,
    pub(crate) knobs: Arc<Knobs>,
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

    const ATTRIBUTES: &'static [mdev::Attribute<Self>] = Knobs::ATTRIBUTES;
    const FOLDER: Option<&'static CStr> = Some(Knobs::FOLDER);

    fn defaults() -> &'static CStr {
        defaults.value()
    }

    const MAX_INSTANCES: u32 = 64;

    fn max_instances() -> u32 {
        max_instances()
    }

    fn probe(type_index: usize) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let flags = migration_flags().ok_or(EINVAL)?;
            let state_size = *SIZES.get(type_index).ok_or(EINVAL)?;
            let knobs = Knobs::new()?;
            Ok(try_init!(Self {
                flags: Atomic::new(flags.as_raw()),
                dma_log: Atomic::new(true),
                state_size,
                knobs,
            }? Error))
        })
    }
}

vfio::vfio_pci_device_table!(FUNCTIONS, [pci::DeviceId::from_id(ID.vendor, ID.device)]);

impl soft_pci::Driver for Mock {
    const ID_TABLE: pci::IdTable = &FUNCTIONS;
}

#[vtable]
impl emulated::Operations for Mock {
    type OpenData = Chip;

    const NAME: &'static CStr = c"vfio_mock";

    fn migration_flags(&self) -> Flags {
        Flags::from_raw(self.flags.load(Relaxed)).unwrap_or(Flags::STOP_COPY)
    }

    fn has_dma_log(&self) -> bool {
        self.dma_log.load(Relaxed)
    }

    fn config_space(&self) -> Result<ConfigSpace> {
        ConfigSpace::new(ID)
            .memory_bar(region::BAR0 as usize, u64::from(registers::BAR_SIZE), false)?
            .memory_bar(region::BAR2 as usize, self.state_size as u64, true)?
            .msix(
                registers::VECTORS,
                region::BAR0,
                registers::MSIX_TABLE,
                registers::MSIX_PBA,
            )
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
        Chip::new(function, self.state_size / PAGE_SIZE, self.knobs.clone())
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

    fn begin_log(chip: &Chip, request: LogRequest) -> Result {
        let event = match request {
            LogRequest::Start => Event::LogStart,
            LogRequest::Report => Event::LogReport,
            LogRequest::Stop => Event::LogStop,
        };
        chip.fault(event).map(|_| ())
    }
}
