// SPDX-License-Identifier: GPL-2.0

//! Regions, which users read, write and map.
//!
//! C header: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

use crate::{
    bindings,
    user::{
        cond_resched_killable,
        UserBuf,
        GFP_MAYFAIL, //
    },
};
use core::ops::Range;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// Base address register 0.
pub const BAR0: u32 = bindings::VFIO_PCI_BAR0_REGION_INDEX;
/// Base address register 1.
pub const BAR1: u32 = bindings::VFIO_PCI_BAR1_REGION_INDEX;
/// Base address register 2.
pub const BAR2: u32 = bindings::VFIO_PCI_BAR2_REGION_INDEX;
/// Base address register 4.
pub const BAR4: u32 = bindings::VFIO_PCI_BAR4_REGION_INDEX;
/// The PCI configuration space.
pub const CONFIG: u32 = bindings::VFIO_PCI_CONFIG_REGION_INDEX;
/// Number of region indexes of a PCI device.
pub const COUNT: u32 = bindings::VFIO_PCI_NUM_REGIONS;

/// Number of bits of the offset in a file position. The bits above are the region index.
pub(crate) const INDEX_SHIFT: u32 = 40;

// For mmap(), each region must begin at a page boundary of the file.
static_assert!(INDEX_SHIFT as usize >= PAGE_SHIFT);

/// The largest size of a region in bytes. Positions beyond it belong to the next region.
pub const MAX_SIZE: u64 = 1 << INDEX_SHIFT;

/// Maximum number of bytes passed to a driver at once.
const BLOCK: usize = 64 << 10;

/// Maximum number of bytes of an access that needs no allocation: one bus access.
const ACCESS: usize = size_of::<u64>();

/// A position in a device file: a region and an offset in it.
///
/// # Examples
///
/// The read of a device with registers in BAR0, and another BAR that reads as ones.
///
/// ```
/// fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
///     match pos.region_index {
///         region::BAR0 => pos.read(&chip.registers.lock().bytes, to),
///         _ => {
///             to.fill(0xff);
///             Ok(())
///         }
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The index of the region, one of the `VFIO_PCI_*_REGION_INDEX`.
    pub region_index: u32,
    /// The offset in the region, in bytes.
    pub region_offset: u64,
}

impl Position {
    /// Creates a position.
    pub const fn new(region_index: u32, region_offset: u64) -> Self {
        Self {
            region_index,
            region_offset,
        }
    }

    /// Decodes a position in the device file.
    ///
    /// Fails with `EINVAL` if there is no such region index.
    pub(crate) fn from_file(pos: i64) -> Result<Self> {
        let pos = u64::try_from(pos).map_err(|_| EINVAL)?;
        let region_index = u32::try_from(pos >> INDEX_SHIFT).map_err(|_| EINVAL)?;
        if region_index >= COUNT {
            return Err(EINVAL);
        }
        Ok(Self {
            region_index,
            region_offset: pos & (MAX_SIZE - 1),
        })
    }

    /// Reads from a region with the content `region`. For
    /// [`Operations::read`](crate::emulated::Operations::read).
    ///
    /// Fails with `EINVAL` if the range is not inside `region`.
    pub fn read(self, region: &[u8], to: &mut [u8]) -> Result {
        let from = self.range(to.len()).and_then(|range| region.get(range));
        to.copy_from_slice(from.ok_or(EINVAL)?);
        Ok(())
    }

    /// Writes to a region with the content `region`; see [`read`](Self::read).
    pub fn write(self, region: &mut [u8], from: &[u8]) -> Result {
        let to = self
            .range(from.len())
            .and_then(|range| region.get_mut(range));
        to.ok_or(EINVAL)?.copy_from_slice(from);
        Ok(())
    }

    /// Returns the range of `len` bytes that begins here.
    fn range(self, len: usize) -> Option<Range<usize>> {
        let start = usize::try_from(self.region_offset).ok()?;
        Some(start..start.checked_add(len)?)
    }

    /// Returns the position of the start of a region in the device file.
    pub(crate) const fn start_of(region_index: u32) -> u64 {
        region_index as u64 * MAX_SIZE
    }
}

/// Returns the part of an access that is inside its region. Like in `vfio-pci`, an access that
/// starts outside fails with `EINVAL`, and one that ends outside is cut.
fn inside(pos: i64, count: usize, size_of: impl Fn(u32) -> u64) -> Result<(Position, usize)> {
    let pos = Position::from_file(pos)?;
    let left = size_of(pos.region_index)
        .checked_sub(pos.region_offset)
        .filter(|left| *left > 0)
        .ok_or(EINVAL)?;
    Ok((pos, count.min(usize::try_from(left).unwrap_or(usize::MAX))))
}

/// Buffer for one block of an access, on the stack for a single bus access. A large one does not
/// need contiguous memory.
enum Block {
    Access([u8; ACCESS]),
    Large(KVVec<u8>),
}

impl Block {
    fn new(count: usize) -> Result<Self> {
        Ok(if count <= ACCESS {
            Self::Access([0; ACCESS])
        } else {
            Self::Large(KVVec::zeroed(count.min(BLOCK), GFP_MAYFAIL)?)
        })
    }

    fn get(&mut self, count: usize) -> &mut [u8] {
        let whole = match self {
            Self::Access(bytes) => bytes.as_mut_slice(),
            Self::Large(bytes) => bytes.as_mut_slice(),
        };
        let count = count.min(whole.len());
        &mut whole[..count]
    }
}

/// Returns the number of bytes served, or the error if none were.
fn served(done: usize, error: Error) -> Result<usize> {
    if done > 0 {
        Ok(done)
    } else {
        Err(error)
    }
}

/// Serves a read() of a device file.
///
/// `size_of` returns the size of a region, and `read` reads its content. No lock is held and no
/// driver code runs while the user's memory is written. A killed task stops after the current
/// block.
pub(crate) fn read(
    user: &mut UserBuf,
    file_pos: i64,
    size_of: impl Fn(u32) -> u64,
    mut read: impl FnMut(Position, &mut [u8]) -> Result,
) -> Result<usize> {
    let (mut pos, count) = inside(file_pos, user.len(), size_of)?;
    let mut block = Block::new(count)?;
    let mut done = 0;
    while done < count {
        let bytes = block.get(count - done);
        if let Err(e) = cond_resched_killable().and_then(|()| read(pos, bytes)) {
            return served(done, e);
        }
        let copied = user.write(bytes);
        done += copied;
        pos.region_offset += copied as u64;
        if copied < bytes.len() {
            return served(done, EFAULT);
        }
    }
    Ok(done)
}

/// Serves a write() to a device file; see [`read()`].
pub(crate) fn write(
    user: &mut UserBuf,
    file_pos: i64,
    size_of: impl Fn(u32) -> u64,
    mut write: impl FnMut(Position, &[u8]) -> Result,
) -> Result<usize> {
    let (mut pos, count) = inside(file_pos, user.len(), size_of)?;
    let mut block = Block::new(count)?;
    let mut done = 0;
    while done < count {
        if let Err(e) = cond_resched_killable() {
            return served(done, e);
        }
        let bytes = block.get(count - done);
        let wanted = bytes.len();
        let copied = user.read(bytes);
        // A single bus access is never cut. Other blocks end at the fault.
        if copied == 0 || (copied < wanted && count <= ACCESS) {
            return served(done, EFAULT);
        }
        if let Err(e) = write(pos, &bytes[..copied]) {
            return served(done, e);
        }
        done += copied;
        pos.region_offset += copied as u64;
        if copied < wanted {
            break;
        }
    }
    Ok(done)
}
