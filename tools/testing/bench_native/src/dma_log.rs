// SPDX-License-Identifier: GPL-2.0

//! The DMA log, compared with compressed bit maps.
//!
//! It uses containers of the kernel. The tree is one of the standard library here.

use crate::{
    log::{
        Log,
        PAGE, //
    },
    random,
    way,
    Figure, //
};
use roaring::RoaringTreemap;
use std::{
    collections::BTreeSet,
    hint::black_box,
    rc::Rc, //
};

/// Marks pages of the address space, and reports them.
fn round(name: String, pages: Vec<u64>) -> Figure {
    let pages: Rc<[u64]> = pages.into();
    let dirty = pages.clone();
    let mut set = BTreeSet::new();
    let set = way("BTreeSet", move || {
        set.extend(dirty.iter().copied());
        set.iter().for_each(|page| {
            black_box(page);
        });
        set.clear();
    });
    let dirty = pages.clone();
    let mut log = Log::new(u64::MAX);
    let ours = way("DMA log", move || {
        for page in &dirty[..] {
            log.mark(page * PAGE);
        }
        assert_eq!(log.take_all(), 0);
    });
    let dirty = pages.clone();
    let mut map = RoaringTreemap::new();
    let roaring = way("roaring", move || {
        for page in &dirty[..] {
            map.insert(*page);
        }
        map.iter().for_each(|page| {
            black_box(page);
        });
        map.clear();
    });

    Figure {
        name,
        work: pages.len() as f64,
        unit: "page",
        ways: vec![set, ours, roaring],
    }
}

pub(crate) fn figures() -> Vec<Figure> {
    vec![
        round(
            "DMA log, 1000 pages in 256 TiB".into(),
            random(3).map(|page| page >> 28).take(1000).collect(),
        ),
        round(
            "DMA log, 100000 pages in 4 GiB".into(),
            random(4).map(|page| page >> 44).take(100_000).collect(),
        ),
    ]
}
