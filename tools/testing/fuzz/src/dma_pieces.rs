// SPDX-License-Identifier: GPL-2.0

//! Pieces of a DMA transfer: each is in one page, and together they cover the transfer.

#[path = "../../../../rust/vfio/dma/pieces.rs"]
mod sut;

use crate::{
    page::PAGE_SIZE,
    Input, //
};

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let (iova, len) = (input.number(), input.number());
    let pieces = sut::pieces(iova, len as usize);

    assert_eq!(pieces.is_ok(), u128::from(iova) + u128::from(len) < 1 << 64);
    let mut done = 0;
    // Limited, because there may be too many to check all.
    for piece in pieces.into_iter().flatten().take(1000) {
        let (first, last) = (iova + piece.start as u64, iova + (piece.end - 1) as u64);
        let page = PAGE_SIZE as u64;

        assert_eq!(piece.start, done);
        assert_eq!(first / page, last / page);
        assert!((last + 1) % page == 0 || piece.end as u64 == len);
        done = piece.end;
    }
    assert!(done as u64 == len || iova.checked_add(len).is_none() || done >= 999 * PAGE_SIZE);
}
