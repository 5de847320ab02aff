// SPDX-License-Identifier: GPL-2.0

//! What the mock device looks like on a PCI bus.

use crate::{
    chip::VECTORS,
    registers, //
};
use kernel::prelude::*;
use vfio::{
    config_space::{
        ConfigSpace,
        Id, //
    },
    region, //
};

/// From the range that QEMU keeps for experiments (`1af4:10f0` to `1af4:10ff`), and of the class of
/// devices that fit no other.
const ID: Id = Id {
    vendor: 0x1af4,
    device: 0x10f0,
    class: 0xff_0000,
};

/// Makes the configuration space of a device with `state_size` bytes of memory, at power on.
pub(crate) fn power_on(state_size: usize) -> Result<ConfigSpace> {
    ConfigSpace::new(ID)
        .memory_bar(region::BAR0 as usize, u64::from(registers::BAR_SIZE), false)?
        .memory_bar(region::BAR2 as usize, state_size as u64, true)?
        .msix(
            VECTORS,
            region::BAR0,
            registers::MSIX_TABLE,
            registers::MSIX_PBA,
        )
}
