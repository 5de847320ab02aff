// SPDX-License-Identifier: GPL-2.0

//! The PCI configuration space of an emulated device.
//!
//! C header: [`include/uapi/linux/pci_regs.h`](srctree/include/uapi/linux/pci_regs.h)

use crate::emulated::{
    irq::msix,
    region, //
};
use kernel::prelude::*;

/// The size in bytes of a conventional configuration space.
pub const SIZE: usize = 256;

/// Offsets, named like `PCI_*`.
const VENDOR_ID: usize = 0x00;
const COMMAND: usize = 0x04;
const CLASS_REVISION: usize = 0x08;
const CACHE_LINE_SIZE: usize = 0x0c;
const BASE_ADDRESS_0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const CAPABILITY_LIST: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Offset of the only capability.
const CAPABILITY: usize = 0x40;

/// In the command register: memory space, bus master, parity, SERR#, INTx disable.
const COMMAND_WRITABLE: u32 = 0x0546;
/// In the command register: BARs are decoded; the device may do DMA and send messages.
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
/// In the status register, which shares a dword with the command register.
const STATUS_CAP_LIST: u32 = 1 << 20;
/// In a base address register: memory anywhere in 64 bits.
const BASE_ADDRESS_64: u32 = 1 << 2;
const BASE_ADDRESS_PREFETCH: u32 = 1 << 3;
/// The capability MSI-X, and the writable bits of its first dword: enable, function mask.
const CAP_ID_MSIX: u32 = 0x11;
const MSIX_WRITABLE: u32 = 0xc000_0000;
/// In the last byte of that dword: the function mask.
const MSIX_CONTROL: usize = CAPABILITY + 3;
const MSIX_FUNCTION_MASK: u8 = 1 << 6;

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
pub struct Id {
    /// Vendor ID, also of the subsystem.
    pub vendor: u16,
    /// Device ID, also of the subsystem.
    pub device: u16,
    /// Class, subclass and programming interface, in 24 bits.
    pub class: u32,
}

/// Returns the words of a configuration space or of its mask.
fn words(bytes: &[u8; SIZE]) -> impl Iterator<Item = u64> + '_ {
    let words = bytes.chunks_exact(size_of::<u64>());
    words.filter_map(|word| Some(u64::from_ne_bytes(*word.first_chunk()?)))
}

/// The configuration space of a PCI device without INTx.
///
/// It has its content at power on when the device is opened and after a reset: in the command
/// register, the bit for memory space is set and the bit for bus mastering is clear, like in a
/// device that `vfio-pci` has just opened.
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
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// The writable bits.
    writable: [u8; SIZE],
    /// The size of each BAR in bytes.
    bars: [u64; 6],
    msix: Msix,
}

impl ConfigSpace {
    /// Creates the configuration space of a device without BARs and capabilities, at power on.
    pub fn new(id: Id) -> Self {
        let mut this = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [0; 6],
            msix: Msix::default(),
        };
        let ids = u32::from(id.device) << 16 | u32::from(id.vendor);
        this.put(VENDOR_ID, ids, 0);
        this.put(COMMAND, u32::from(COMMAND_MEMORY), COMMAND_WRITABLE);
        this.put(CLASS_REVISION, id.class << 8 | 1, 0);
        this.put(CACHE_LINE_SIZE, 0, 0xff);
        this.put(SUBSYSTEM_VENDOR_ID, ids, 0);
        this.put(INTERRUPT_LINE, 0, 0xff);
        this
    }

    /// Adds a 64-bit memory BAR, which consists of two registers from `index` on.
    ///
    /// Fails with `EINVAL`, and logs the reason, if `index` is not 0, 2 or 4, if the device has
    /// this BAR already, or if `size` in bytes is not a power of two from 16 to
    /// [`region::MAX_SIZE`].
    pub fn memory_bar(mut self, index: usize, size: u64, prefetchable: bool) -> Result<Self> {
        let why = match self.bars.get(index) {
            None => "there is no such BAR",
            Some(_) if index % 2 != 0 => "the register is the upper half of another BAR",
            Some(bar) if *bar != 0 => "the device has this BAR already",
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
        // The address bits below the size are read-only, so that users can get the size.
        let mask = !(size - 1);
        let flags = BASE_ADDRESS_64
            | if prefetchable {
                BASE_ADDRESS_PREFETCH
            } else {
                0
            };
        let low = BASE_ADDRESS_0 + index * 4;
        self.put(low, flags, mask as u32);
        self.put(low + 4, 0, (mask >> 32) as u32);
        if let Some(bar) = self.bars.get_mut(index) {
            *bar = size;
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
        let size = self.bars.get(bar as usize).copied().unwrap_or(0);
        let count = vectors as usize;
        let (at, table_end) = (
            u64::from(table),
            u64::from(table) + msix::table_size(count) as u64,
        );
        let (pba_at, end) = (
            u64::from(pba),
            u64::from(pba) + msix::pending_size(count) as u64,
        );
        let why = if vectors == 0 || vectors > 2048 {
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
        let command = STATUS_CAP_LIST | u32::from(COMMAND_MEMORY);
        self.put(COMMAND, command, COMMAND_WRITABLE);
        self.put(CAPABILITY_LIST, CAPABILITY as u32, 0);
        self.put(CAPABILITY, (vectors - 1) << 16 | CAP_ID_MSIX, MSIX_WRITABLE);
        self.put(CAPABILITY + 4, table | bar, 0);
        self.put(CAPABILITY + 8, pba | bar, 0);
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
            region::CONFIG => SIZE as u64,
            index => self.bars.get(index as usize).copied().unwrap_or(0),
        }
    }

    /// Returns the location of the MSI-X table and pending bits.
    pub(crate) fn msix_place(&self) -> Msix {
        self.msix
    }

    /// Returns whether all MSI-X vectors are masked.
    pub(crate) fn is_function_masked(&self) -> bool {
        self.bytes[MSIX_CONTROL] & self.writable[MSIX_CONTROL] & MSIX_FUNCTION_MASK != 0
    }

    /// Returns whether memory space is enabled: accesses to BARs reach the device.
    pub(crate) fn is_decoding(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// Returns whether bus mastering is enabled: the device may do DMA and send messages.
    pub(crate) fn is_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MASTER != 0
    }

    fn put(&mut self, offset: usize, value: u32, writable: u32) {
        let range = offset..offset + size_of::<u32>();
        if let Some(bytes) = self.bytes.get_mut(range.clone()) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        if let Some(bytes) = self.writable.get_mut(range) {
            bytes.copy_from_slice(&writable.to_le_bytes());
        }
    }

    /// Reads bytes. Bytes after the end read as zero.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        for (at, byte) in (offset..).zip(to) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes bytes. Only writable bits change.
    pub(crate) fn write(&mut self, offset: usize, from: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), from) in bytes.zip(from) {
            *byte = *byte & !mask | from & mask;
        }
    }

    /// Returns the whole content, for the stream.
    pub(crate) fn save(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// Returns whether a configuration space in a stream belongs to such a device: whether all
    /// read-only bits are equal.
    pub(crate) fn accepts(&self, bytes: &[u8; SIZE]) -> bool {
        let old = words(&self.bytes).zip(words(&self.writable));
        old.zip(words(bytes))
            .all(|((old, mask), new)| (old ^ new) & !mask == 0)
    }
}
