// SPDX-License-Identifier: GPL-2.0

//! Fuzz targets for the parts that need no kernel.
//!
//! Each target interprets the input as operations, executes them, and compares the results with a
//! model that was written from the documentation.

#![forbid(unsafe_code)]

mod config_space;
mod dirty_map;
mod dma_log;
mod dma_pieces;
mod queue;
mod stream;
mod table;

// Names that the sources of the crate use.
extern crate self as kernel;
mod kernel_containers;
#[doc(hidden)]
pub use kernel_containers::{
    alloc,
    page,
    prelude,
    rbtree, //
};
use vfio_host_tests::msix;

/// Registers of the PCI specification, named like in `pci_regs.h`.
mod bindings {
    pub(crate) const PCI_CFG_SPACE_SIZE: u32 = 256;
    pub(crate) const PCI_STD_HEADER_SIZEOF: u32 = 64;
    pub(crate) const PCI_STD_NUM_BARS: u32 = 6;
    pub(crate) const PCI_VENDOR_ID: u32 = 0x00;
    pub(crate) const PCI_COMMAND: u32 = 0x04;
    pub(crate) const PCI_COMMAND_MEMORY: u32 = 0x2;
    pub(crate) const PCI_COMMAND_MASTER: u32 = 0x4;
    pub(crate) const PCI_COMMAND_PARITY: u32 = 0x40;
    pub(crate) const PCI_COMMAND_SERR: u32 = 0x100;
    pub(crate) const PCI_COMMAND_INTX_DISABLE: u32 = 0x400;
    pub(crate) const PCI_STATUS_CAP_LIST: u32 = 0x10;
    pub(crate) const PCI_CLASS_REVISION: u32 = 0x08;
    pub(crate) const PCI_CACHE_LINE_SIZE: u32 = 0x0c;
    pub(crate) const PCI_BASE_ADDRESS_0: u32 = 0x10;
    pub(crate) const PCI_BASE_ADDRESS_MEM_TYPE_64: u32 = 0x04;
    pub(crate) const PCI_BASE_ADDRESS_MEM_PREFETCH: u32 = 0x08;
    pub(crate) const PCI_SUBSYSTEM_VENDOR_ID: u32 = 0x2c;
    pub(crate) const PCI_CAPABILITY_LIST: u32 = 0x34;
    pub(crate) const PCI_INTERRUPT_LINE: u32 = 0x3c;
    pub(crate) const PCI_CAP_ID_MSIX: u32 = 0x11;
    pub(crate) const PCI_MSIX_FLAGS: u32 = 2;
    pub(crate) const PCI_MSIX_FLAGS_QSIZE: u32 = 0x07ff;
    pub(crate) const PCI_MSIX_FLAGS_MASKALL: u32 = 0x4000;
    pub(crate) const PCI_MSIX_FLAGS_ENABLE: u32 = 0x8000;
    pub(crate) const PCI_MSIX_TABLE: u32 = 4;
    pub(crate) const PCI_MSIX_PBA: u32 = 8;
    pub(crate) const PCI_CFG_SPACE_EXP_SIZE: u32 = 4096;
    pub(crate) const PCI_CAP_ID_PM: u32 = 0x01;
    pub(crate) const PCI_CAP_ID_EXP: u32 = 0x10;
    pub(crate) const PCI_PM_CTRL: u32 = 4;
    pub(crate) const PCI_PM_CTRL_STATE_MASK: u32 = 0x0003;
    pub(crate) const PCI_PM_CTRL_NO_SOFT_RESET: u32 = 0x0008;
    pub(crate) const PCI_EXP_TYPE_RC_END: u32 = 0x9;
    pub(crate) const PCI_EXP_DEVCAP: u32 = 0x04;
    pub(crate) const PCI_EXP_DEVCAP_RBER: u32 = 0x8000;
    pub(crate) const PCI_EXP_DEVCTL: u32 = 0x08;
    pub(crate) const PCI_EXP_DEVCTL_CERE: u32 = 0x0001;
    pub(crate) const PCI_EXP_DEVCTL_NFERE: u32 = 0x0002;
    pub(crate) const PCI_EXP_DEVCTL_FERE: u32 = 0x0004;
    pub(crate) const PCI_EXP_DEVCTL_URRE: u32 = 0x0008;
    pub(crate) const PCI_EXP_DEVCTL_RELAX_EN: u32 = 0x0010;
    pub(crate) const PCI_EXP_DEVCTL_PAYLOAD: u32 = 0x00e0;
    pub(crate) const PCI_EXP_DEVCTL_NOSNOOP_EN: u32 = 0x0800;
    pub(crate) const PCI_EXP_DEVCTL_READRQ: u32 = 0x7000;
}

mod emulated {
    pub(crate) mod irq {
        pub(crate) use crate::msix;
    }
}

mod region {
    pub(crate) const CONFIG: u32 = 7;
    pub(crate) const MAX_SIZE: u64 = 1 << 40;
}

/// Function that tests an input. It panics on a failure.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("decoder", stream::any_bytes),
    ("stream", stream::damaged_streams),
    ("queue", queue::target),
    ("dirty_map", dirty_map::target),
    ("dma_log", dma_log::target),
    ("dma_pieces", dma_pieces::target),
    ("config_space", config_space::target),
    ("table", table::target),
];

/// Reader of an input, which continues with zeros after its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the next `count` bytes, or the remaining ones if there are fewer.
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));

        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn bool(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// Returns a 64-bit number; small ones and those near a power of two take fewer bytes.
    fn number(&mut self) -> u64 {
        match self.byte() {
            size @ 0..=7 => {
                let mut word = [0; 8];
                let bytes = self.bytes(usize::from(size) + 1);

                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word)
            }
            shift @ 8..=71 => (1 << (shift - 8)) + (u64::from(self.byte()) & 0xf),
            shift @ 72..=135 => (1_u64 << (shift - 72)).wrapping_sub(u64::from(self.byte())),
            small => u64::from(small - 136),
        }
    }

    /// Returns a number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        let number = match end {
            0..=0x100 => u64::from(self.byte()),
            0x101..=0x1_0000 => u64::from(self.byte()) | u64::from(self.byte()) << 8,
            _ => self.number(),
        };

        (number % end as u64) as usize
    }

    /// Returns one of these.
    fn one_of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
