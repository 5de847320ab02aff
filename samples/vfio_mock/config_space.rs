// SPDX-License-Identifier: GPL-2.0

//! The PCI configuration space.

use crate::{
    chip::VECTORS,
    registers, //
};

/// The size in bytes.
pub(crate) const SIZE: usize = 256;

/// From the range that QEMU keeps for experiments (`1af4:10f0` to `1af4:10ff`).
const VENDOR_ID: u16 = 0x1af4;
const DEVICE_ID: u16 = 0x10f0;

/// The class of a device that fits no other.
const CLASS: u32 = 0xff << 16;

/// A memory BAR of 64 bits, and what it is besides.
const BAR_64: u32 = 0x4;
const BAR_PREFETCHABLE: u32 = 0x8;

/// Where the MSI-X capability is, the only one.
const MSIX: usize = 0x40;

/// Offsets of what is written here.
const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const BAR1: usize = 0x14;
const BAR2: usize = 0x18;
const BAR3: usize = 0x1c;
const CACHE_LINE_SIZE: usize = 0x0c;
const INTERRUPT_LINE: usize = 0x3c;

/// The PCI configuration space of a mock device.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; SIZE],
    /// The bits that a write changes, dword by dword where there are any.
    writable: [(usize, u32); 8],
}

impl ConfigSpace {
    /// Makes the configuration space of a device with `state_size` bytes of memory, which must be
    /// a power of two, at power on.
    pub(crate) fn new(state_size: usize) -> Self {
        // The address bits of a BAR below its size are fixed, by which a user finds the size.
        let state_mask = !(state_size as u64 - 1);
        let mut this = Self {
            bytes: [0; SIZE],
            writable: [
                // Memory space, bus master, parity, SERR#, INTx disable.
                (COMMAND, 0x0546),
                (CACHE_LINE_SIZE, 0x00ff),
                (BAR0, !(registers::BAR_SIZE - 1)),
                (BAR1, u32::MAX),
                (BAR2, state_mask as u32 & !0xf),
                (BAR3, (state_mask >> 32) as u32),
                (INTERRUPT_LINE, 0x00ff),
                // MSI-X enable, function mask.
                (MSIX, 0xc000_0000),
            ],
        };
        // A capability list is what there is in the status register.
        this.put(COMMAND, 1 << 20);
        this.put(0x00, u32::from(DEVICE_ID) << 16 | u32::from(VENDOR_ID));
        this.put(0x08, CLASS << 8 | 1);
        this.put(BAR0, BAR_64);
        this.put(BAR2, BAR_64 | BAR_PREFETCHABLE);
        this.put(0x2c, u32::from(DEVICE_ID) << 16 | u32::from(VENDOR_ID));
        this.put(0x34, MSIX as u32);
        this.put(MSIX, (VECTORS - 1) << 16 | 0x11);
        this.put(MSIX + 4, registers::MSIX_TABLE);
        this.put(MSIX + 8, registers::MSIX_PBA);
        this
    }

    fn put(&mut self, offset: usize, value: u32) {
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// Returns the bits of the byte at `offset` that a write changes.
    fn mask(&self, offset: usize) -> u8 {
        self.writable
            .iter()
            .filter_map(|(start, mask)| {
                let index = offset.checked_sub(*start)?;
                mask.to_le_bytes().get(index).copied()
            })
            .fold(0, |all, mask| all | mask)
    }

    /// Reads bytes; what is behind the end reads as zero.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        for (at, byte) in (offset..).zip(to) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes bytes, of which only the writable bits count.
    pub(crate) fn write(&mut self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let mask = self.mask(at);
            if let Some(to) = self.bytes.get_mut(at) {
                *to = *to & !mask | byte & mask;
            }
        }
    }

    /// Returns the configuration space as it is in the stream.
    pub(crate) fn save(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// Returns the configuration space that is in the stream, unless it is another device's.
    pub(crate) fn load(state_size: usize, bytes: &[u8; SIZE]) -> Option<Self> {
        let mut this = Self::new(state_size);
        this.write(0, bytes);
        (this.bytes == *bytes).then_some(this)
    }
}
