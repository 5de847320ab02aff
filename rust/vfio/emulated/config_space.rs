// SPDX-License-Identifier: GPL-2.0

//! The PCI configuration space of an emulated device.
//!
//! C header: [`include/uapi/linux/pci_regs.h`](srctree/include/uapi/linux/pci_regs.h)

use crate::{
    bindings,
    emulated::irq::msix,
    region, //
};
use kernel::prelude::*;

/// The size in bytes of a conventional configuration space.
pub const SIZE: usize = bindings::PCI_CFG_SPACE_SIZE as usize;

/// The size in bytes of the configuration space of a function on a PCI Express bus.
const EXPRESS_SIZE: u64 = bindings::PCI_CFG_SPACE_EXP_SIZE as u64;

/// Offsets, named like `PCI_*`.
const VENDOR_ID: usize = bindings::PCI_VENDOR_ID as usize;
const COMMAND: usize = bindings::PCI_COMMAND as usize;
const CLASS_REVISION: usize = bindings::PCI_CLASS_REVISION as usize;
const CACHE_LINE_SIZE: usize = bindings::PCI_CACHE_LINE_SIZE as usize;
const BASE_ADDRESS_0: usize = bindings::PCI_BASE_ADDRESS_0 as usize;
const SUBSYSTEM_VENDOR_ID: usize = bindings::PCI_SUBSYSTEM_VENDOR_ID as usize;
const CAPABILITY_LIST: usize = bindings::PCI_CAPABILITY_LIST as usize;
const INTERRUPT_LINE: usize = bindings::PCI_INTERRUPT_LINE as usize;
/// Offset of the capability MSI-X, and of its registers.
const CAPABILITY: usize = bindings::PCI_STD_HEADER_SIZEOF as usize;
const MSIX_FLAGS: usize = CAPABILITY + bindings::PCI_MSIX_FLAGS as usize;
const MSIX_TABLE: usize = CAPABILITY + bindings::PCI_MSIX_TABLE as usize;
const MSIX_PBA: usize = CAPABILITY + bindings::PCI_MSIX_PBA as usize;
/// Offset of the capability for power management, and of its register.
const PM: usize = CAPABILITY + 0x10;
const PM_CTRL: usize = PM + bindings::PCI_PM_CTRL as usize;
/// Offset of the capability PCI Express, and of its registers.
const EXP: usize = PM + 0x10;
const EXP_DEVCAP: usize = EXP + bindings::PCI_EXP_DEVCAP as usize;
const EXP_DEVCTL: usize = EXP + bindings::PCI_EXP_DEVCTL as usize;

/// The size of a register in bytes.
pub(crate) const REGISTER: usize = size_of::<u32>();

/// The writable bits of the command register.
const COMMAND_WRITABLE: u32 = bindings::PCI_COMMAND_MEMORY
    | bindings::PCI_COMMAND_MASTER
    | bindings::PCI_COMMAND_PARITY
    | bindings::PCI_COMMAND_SERR
    | bindings::PCI_COMMAND_INTX_DISABLE;
/// The writable bits of the message control register of MSI-X.
const MSIX_WRITABLE: u32 = bindings::PCI_MSIX_FLAGS_ENABLE | bindings::PCI_MSIX_FLAGS_MASKALL;
/// The maximum number of vectors: the message control register has the number minus one.
const MAX_VECTORS: u32 = bindings::PCI_MSIX_FLAGS_QSIZE + 1;
/// Version 3 of power management, and the states D0 and D3hot, without wake-up events.
const PM_VERSION: u32 = 3;
/// The value and the writable bits of the control register of power management. The device keeps
/// its state when it returns from D3hot.
const PM_STATE: u32 = bindings::PCI_PM_CTRL_STATE_MASK;
const PM_KEEPS_STATE: u32 = bindings::PCI_PM_CTRL_NO_SOFT_RESET;
/// Version 2 of the capability PCI Express, of an endpoint in the root complex: there is no link.
const EXP_FLAGS: u32 = bindings::PCI_EXP_TYPE_RC_END << 4 | 2;
/// The writable bits of the device control register. The device has no function level reset, no
/// extended tags and no phantom functions.
const EXP_WRITABLE: u32 = bindings::PCI_EXP_DEVCTL_CERE
    | bindings::PCI_EXP_DEVCTL_NFERE
    | bindings::PCI_EXP_DEVCTL_FERE
    | bindings::PCI_EXP_DEVCTL_URRE
    | bindings::PCI_EXP_DEVCTL_RELAX_EN
    | bindings::PCI_EXP_DEVCTL_PAYLOAD
    | bindings::PCI_EXP_DEVCTL_NOSNOOP_EN
    | bindings::PCI_EXP_DEVCTL_READRQ;
/// The writable bits of registers of one byte that the device ignores.
const BYTE_WRITABLE: u32 = u8::MAX as u32;

/// Returns the size in bytes of the data of
/// [`Function::save_msix`](crate::emulated::Function::save_msix) for a device with `vectors`
/// vectors.
pub const fn msix_size(vectors: u32) -> usize {
    msix::table_size(vectors as usize) + msix::pending_size(vectors as usize)
}

/// The location of the MSI-X table and pending bits of a device.
#[derive(Clone, Copy, Default)]
pub(crate) struct Msix {
    pub(crate) vectors: u32,
    pub(crate) bar: u32,
    pub(crate) table: u32,
    pub(crate) pending: u32,
}

/// The identity of a device.
#[derive(Clone, Copy)]
pub struct Id {
    /// Vendor ID, also of the subsystem.
    pub vendor: u16,
    /// Device ID, also of the subsystem.
    pub device: u16,
    /// Class, subclass and programming interface, in 24 bits.
    pub class: u32,
}

/// The content of a configuration space.
pub(crate) type Content = [u8; SIZE];

/// A 64-bit memory BAR. The size is zero if the device does not have it.
#[derive(Clone, Copy, Default)]
struct Bar {
    size: u64,
    prefetchable: bool,
}

/// Returns a 16-bit register.
fn word(content: &Content, offset: usize) -> u32 {
    let bytes = content.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from(u16::from_le_bytes(*bytes)))
}

/// Returns whether memory space is enabled: accesses to BARs reach the device.
pub(crate) fn is_decoding(content: &Content) -> bool {
    word(content, COMMAND) & bindings::PCI_COMMAND_MEMORY != 0 && !is_asleep(content)
}

/// Returns whether bus mastering is enabled: the device may do DMA and send messages.
pub(crate) fn is_master(content: &Content) -> bool {
    word(content, COMMAND) & bindings::PCI_COMMAND_MASTER != 0 && !is_asleep(content)
}

/// Returns whether the device has the capability for power management, and is not in D0.
fn is_asleep(content: &Content) -> bool {
    // Without the capability, the register does not exist and is zero.
    word(content, PM_CTRL) & PM_STATE != 0
}

/// Reads bytes. Bytes after the end read as zero.
pub(crate) fn read(content: &Content, offset: usize, to: &mut [u8]) {
    for (at, byte) in (offset..).zip(to) {
        *byte = content.get(at).copied().unwrap_or(0);
    }
}

/// Description of the configuration space of a PCI device without INTx.
///
/// The registers have their values at power on when the device is opened and after a reset: in the
/// command register, the bit for memory space is set and the bit for bus mastering is clear, like
/// in a device that `vfio-pci` has just opened.
///
/// Users get the size of a BAR by writing ones to it, and the features of the device from the list
/// of capabilities.
///
/// # Examples
///
/// ```
/// fn power_on() -> Result<ConfigSpace> {
///     let id = config_space::Id {
///         vendor: 0x1af4,
///         device: 0x10f2,
///         class: 0xff_0000,
///     };
///     ConfigSpace::new(id)
///         .memory_bar(region::BAR0 as usize, 0x4000, false)?
///         .memory_bar(region::BAR2 as usize, 1 << 20, true)?
///         .msix(4, region::BAR0, 0x1000, 0x2000)
/// }
/// ```
#[derive(Clone, Copy)]
pub struct ConfigSpace {
    id: Id,
    /// The BARs 0, 2 and 4.
    bars: [Bar; bindings::PCI_STD_NUM_BARS as usize / 2],
    msix: Msix,
    /// Whether it is that of a function on a PCI Express bus.
    express: bool,
}

impl ConfigSpace {
    /// Creates the description of a device without BARs and capabilities.
    pub fn new(id: Id) -> Self {
        Self {
            id,
            bars: Default::default(),
            msix: Msix::default(),
            express: false,
        }
    }

    /// Adds the capabilities of a function on a PCI Express bus, and the extended configuration
    /// space, which has no capabilities.
    pub(crate) fn express(self) -> Self {
        Self {
            express: true,
            ..self
        }
    }

    /// Returns the size in bytes of a BAR, zero if the device does not have it.
    fn bar_size(&self, index: usize) -> u64 {
        let bar = self.bars.get(index / 2).filter(|_| index % 2 == 0);
        bar.map_or(0, |bar| bar.size)
    }

    /// Adds a 64-bit memory BAR, which consists of two registers from `index` on.
    ///
    /// Fails with `EINVAL`, and logs the reason, if `index` is not 0, 2 or 4, if the device has
    /// this BAR already, or if `size` in bytes is not a power of two from 16 to
    /// [`region::MAX_SIZE`].
    pub fn memory_bar(mut self, index: usize, size: u64, prefetchable: bool) -> Result<Self> {
        let why = match self.bars.get(index / 2) {
            None => "there is no such BAR",
            Some(_) if index % 2 != 0 => "the register is the upper half of another BAR",
            Some(bar) if bar.size != 0 => "the device has this BAR already",
            _ if size < 16 || !size.is_power_of_two() => {
                "the size is not a power of two of at least 16"
            }
            _ if size > region::MAX_SIZE => "the size is more than that of a region",
            _ => "",
        };
        if !why.is_empty() {
            pr_err!("BAR{} of {:#x} bytes: {}\n", index, size, why);
            return Err(EINVAL);
        }
        if let Some(bar) = self.bars.get_mut(index / 2) {
            *bar = Bar { size, prefetchable };
        }
        Ok(self)
    }

    /// Adds the capability MSI-X with `vectors` vectors, whose table and pending bits are in the
    /// BAR `bar`, at these offsets. The [`Function`](crate::emulated::Function) serves accesses to
    /// them, so users must not be able to [map](crate::emulated::Operations::mmap) the BAR:
    /// otherwise the device cannot be opened.
    ///
    /// Fails with `EINVAL`, and logs the reason, if there are not 1 to 2048 vectors, if the device
    /// has MSI-X already or does not have that BAR yet, if an offset is not a multiple of 8, or if
    /// table and pending bits overlap or are not inside the BAR.
    pub fn msix(mut self, vectors: u32, bar: u32, table: u32, pba: u32) -> Result<Self> {
        let size = self.bar_size(bar as usize);
        let count = vectors as usize;
        let (at, table_end) = (
            u64::from(table),
            u64::from(table) + msix::table_size(count) as u64,
        );
        let (pba_at, end) = (
            u64::from(pba),
            u64::from(pba) + msix::pending_size(count) as u64,
        );
        let why = if vectors == 0 || vectors > MAX_VECTORS {
            "there are not 1 to 2048 vectors"
        } else if self.msix.vectors != 0 {
            "the device has MSI-X already"
        } else if size == 0 {
            "the device does not have this BAR"
        } else if (table | pba) % 8 != 0 {
            "an offset is not a multiple of 8"
        } else if table_end > size || end > size {
            "the table or the pending bits are not inside of the BAR"
        } else if at < end && pba_at < table_end {
            "the table and the pending bits overlap"
        } else {
            ""
        };
        if !why.is_empty() {
            pr_err!(
                "MSI-X with {} vectors in BAR{}, table at {:#x}, pending bits at {:#x}: {}\n",
                vectors,
                bar,
                table,
                pba,
                why
            );
            return Err(EINVAL);
        }
        self.msix = Msix {
            vectors,
            bar,
            table,
            pending: pba,
        };
        Ok(self)
    }

    /// Returns the size in bytes of a region of the device; zero if it has no such region.
    pub(crate) fn region_size(&self, region_index: u32) -> u64 {
        match region_index {
            region::CONFIG if self.express => EXPRESS_SIZE,
            region::CONFIG => SIZE as u64,
            index => self.bar_size(index as usize),
        }
    }

    /// Returns the location of the MSI-X table and pending bits.
    pub(crate) fn msix_place(&self) -> Msix {
        self.msix
    }

    /// Returns the value of a register at power on, and its writable bits. `offset` is a multiple
    /// of [`REGISTER`].
    pub(crate) fn register(&self, offset: usize) -> (u32, u32) {
        let Self {
            id, msix, express, ..
        } = *self;
        let has_msix = msix.vectors > 0;
        // The list of capabilities.
        let after_msix = if express { PM as u32 } else { 0 };
        let first = if has_msix {
            CAPABILITY as u32
        } else {
            after_msix
        };
        match offset {
            VENDOR_ID | SUBSYSTEM_VENDOR_ID => {
                (u32::from(id.device) << 16 | u32::from(id.vendor), 0)
            }
            COMMAND => {
                let status = if first != 0 {
                    bindings::PCI_STATUS_CAP_LIST
                } else {
                    0
                };
                (
                    status << 16 | bindings::PCI_COMMAND_MEMORY,
                    COMMAND_WRITABLE,
                )
            }
            CLASS_REVISION => (id.class << 8 | 1, 0),
            CACHE_LINE_SIZE | INTERRUPT_LINE => (0, BYTE_WRITABLE),
            CAPABILITY_LIST => (first, 0),
            CAPABILITY if has_msix => (
                (msix.vectors - 1) << 16 | after_msix << 8 | bindings::PCI_CAP_ID_MSIX,
                MSIX_WRITABLE << 16,
            ),
            MSIX_TABLE if has_msix => (msix.table | msix.bar, 0),
            MSIX_PBA if has_msix => (msix.pending | msix.bar, 0),
            PM if express => (
                PM_VERSION << 16 | (EXP as u32) << 8 | bindings::PCI_CAP_ID_PM,
                0,
            ),
            PM_CTRL if express => (PM_KEEPS_STATE, PM_STATE),
            EXP if express => (EXP_FLAGS << 16 | bindings::PCI_CAP_ID_EXP, 0),
            EXP_DEVCAP if express => (bindings::PCI_EXP_DEVCAP_RBER, 0),
            EXP_DEVCTL if express => (0, EXP_WRITABLE),
            _ => self.base_address(offset),
        }
    }

    /// Does the same as [`register()`](Self::register) for the base address registers.
    fn base_address(&self, offset: usize) -> (u32, u32) {
        let index = offset.wrapping_sub(BASE_ADDRESS_0) / REGISTER;
        let Some(bar) = self.bars.get(index / 2).filter(|bar| bar.size > 0) else {
            return (0, 0);
        };
        // The address bits below the size are read-only, so that users can get the size.
        let mask = !(bar.size - 1);
        if index % 2 != 0 {
            return (0, (mask >> 32) as u32);
        }
        let prefetch = if bar.prefetchable {
            bindings::PCI_BASE_ADDRESS_MEM_PREFETCH
        } else {
            0
        };
        (
            bindings::PCI_BASE_ADDRESS_MEM_TYPE_64 | prefetch,
            mask as u32,
        )
    }

    /// Resets `content` to the values at power on.
    pub(crate) fn reset(&self, content: &mut Content) {
        for (offset, bytes) in content.chunks_exact_mut(REGISTER).enumerate() {
            let (value, _) = self.register(offset * REGISTER);
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes bytes to `content`. Only writable bits change.
    pub(crate) fn write(&self, content: &mut Content, offset: usize, from: &[u8]) {
        let bytes = content.iter_mut().enumerate().skip(offset);
        for ((at, byte), from) in bytes.zip(from) {
            let (_, writable) = self.register(at / REGISTER * REGISTER);
            let mask = writable.to_le_bytes()[at % REGISTER];
            *byte = *byte & !mask | from & mask;
        }
    }

    /// Returns whether all MSI-X vectors are masked.
    pub(crate) fn is_function_masked(&self, content: &Content) -> bool {
        self.msix.vectors > 0 && word(content, MSIX_FLAGS) & bindings::PCI_MSIX_FLAGS_MASKALL != 0
    }

    /// Returns whether a configuration space in a stream belongs to such a device: whether all
    /// read-only bits are equal.
    pub(crate) fn accepts(&self, content: &Content) -> bool {
        content
            .chunks_exact(REGISTER)
            .enumerate()
            .all(|(offset, bytes)| {
                let (value, writable) = self.register(offset * REGISTER);
                let mut register = [0; REGISTER];
                register.copy_from_slice(bytes);
                (u32::from_le_bytes(register) ^ value) & !writable == 0
            })
    }
}
