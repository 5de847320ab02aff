// SPDX-License-Identifier: GPL-2.0

//! Division of a transfer into pieces of at most one page.

use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Divides `len` bytes at `iova` at page boundaries. Returns the range of each piece.
///
/// Fails with `EINVAL` if the bytes reach beyond the address space.
pub(super) fn pieces(iova: u64, len: usize) -> Result<impl Iterator<Item = Range<usize>>> {
    let page = PAGE_SIZE as u64;
    let mut start = 0;
    iova.checked_add(len as u64).ok_or(EINVAL)?;
    Ok(core::iter::from_fn(move || {
        let left = (page - iova.wrapping_add(start as u64) % page) as usize;
        let piece = start..len.min(start + left);
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    }))
}
