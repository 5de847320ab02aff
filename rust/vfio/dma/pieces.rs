// SPDX-License-Identifier: GPL-2.0

//! What of a transfer is done at once.

use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Cuts `len` bytes from `iova` on where pages end. Returns where in them the pieces are.
///
/// Fails with `EINVAL` if they reach beyond the address space.
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
