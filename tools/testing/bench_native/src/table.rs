// SPDX-License-Identifier: GPL-2.0

//! The page table of the software IOMMU, compared with an array and with maps of the standard
//! library.

use crate::{
    random,
    way,
    Figure, //
};
use std::{
    collections::{
        BTreeMap,
        HashMap, //
    },
    hint::black_box,
    rc::Rc,
};
use vfio_host_tests::table::{
    Access,
    MapError,
    Memory,
    Missing,
    Spare,
    Table,
    FANOUT, //
};

/// Number of mapped pages: 1 GiB.
const PAGES: u64 = 1 << 18;

/// Number of pages in a call of the user: 2 MiB.
const PIECE: u64 = 512;

const FRAME: u64 = 1 << 20;

struct Host;

impl Memory for Host {
    type Box<T> = Box<T>;
}

/// Returns an empty node of the table.
fn node<T>() -> Box<[(Option<T>, u32, u32); FANOUT]> {
    Box::new(core::array::from_fn(|_| (None, 0, 0)))
}

/// Maps pages, with new nodes if needed.
fn map(table: &mut Table<Host>, page: u64, count: u64) {
    let access = Access {
        read: true,
        write: true,
    };
    let mut spare = Spare::default();
    let mut done = 0;

    while done < count {
        match table.map(
            page + done,
            FRAME + page + done,
            count - done,
            access,
            &mut spare,
        ) {
            Ok(mapped) => done += mapped,
            Err(MapError::Missing(Missing::Leaf)) => spare.leaf = Some(Box::new([0; FANOUT])),
            Err(MapError::Missing(Missing::Lower)) => spare.lower = Some(node()),
            Err(MapError::Missing(Missing::Middle)) => spare.middle = Some(node()),
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn translate(name: &str, pages: Vec<u64>) -> Figure {
    let pages: Rc<[u64]> = pages.into();
    let work = pages.len() as f64;
    let order = pages.clone();
    let array: Vec<u64> = (0..PAGES).map(|page| FRAME + page).collect();
    let array = way("array", move || {
        for page in &order[..] {
            black_box(array.get(*page as usize).copied());
        }
    });
    let order = pages.clone();
    let mut table = Table::new(node());
    map(&mut table, 0, PAGES);
    let table = way("Table", move || {
        for page in &order[..] {
            let _ = black_box(table.translate(*page, true));
        }
    });
    let order = pages.clone();
    let hash: HashMap<u64, u64> = (0..PAGES).map(|page| (page, FRAME + page)).collect();
    let hash = way("HashMap", move || {
        for page in &order[..] {
            black_box(hash.get(page).copied());
        }
    });
    let tree: BTreeMap<u64, u64> = (0..PAGES).map(|page| (page, FRAME + page)).collect();
    let tree = way("BTreeMap", move || {
        for page in &pages[..] {
            black_box(tree.get(page).copied());
        }
    });

    Figure {
        name: name.into(),
        work,
        unit: "page",
        ways: vec![array, table, hash, tree],
    }
}

/// Translates random pages of 64 GiB, which are mapped in pieces of 64 KiB with gaps of 1 MiB.
fn sparse() -> Figure {
    const PIECE: u64 = 16;
    const STRIDE: u64 = PIECE + 256;
    const PAGES: u64 = 1 << 24;

    let order: Rc<[u64]> = random(6).map(|page| page % PAGES).take(1 << 18).collect();
    let work = order.len() as f64;
    let pages = order.clone();
    let array: Vec<u64> = (0..PAGES).map(|page| FRAME + page).collect();
    let array = way("array", move || {
        for page in &pages[..] {
            black_box(array.get(*page as usize).copied());
        }
    });
    let mut table = Table::new(node());
    for piece in 0..PAGES / PIECE {
        map(&mut table, piece * STRIDE, PIECE);
    }
    let table = way("Table", move || {
        for page in &order[..] {
            let at = page / PIECE * STRIDE + page % PIECE;
            assert!(black_box(table.translate(at, true)).is_ok());
        }
    });

    Figure {
        name: "translate 64 GiB in pieces of 64 KiB".into(),
        work,
        unit: "page",
        ways: vec![array, table],
    }
}

/// Maps and unmaps 2 MiB in an address space with 1 GiB.
fn change() -> Figure {
    let mut array = vec![0_u64; 2 * PAGES as usize];
    let array = way("array", move || {
        let piece = &mut array[PAGES as usize..][..PIECE as usize];

        for (entry, frame) in black_box(&mut *piece).iter_mut().zip(FRAME..) {
            *entry = frame;
        }
        black_box(piece).fill(0);
    });
    let mut table = Table::new(node());
    map(&mut table, 0, PAGES);
    let table = way("Table", move || {
        map(&mut table, PAGES, PIECE);
        assert_eq!(table.unmap(PAGES, PIECE), PIECE);
    });
    let mut hash: HashMap<u64, u64> = (0..PAGES).map(|page| (page, FRAME + page)).collect();
    let hash = way("HashMap", move || {
        hash.extend((PAGES..PAGES + PIECE).map(|page| (page, FRAME + page)));
        for page in PAGES..PAGES + PIECE {
            hash.remove(&page);
        }
    });
    let mut tree: BTreeMap<u64, u64> = (0..PAGES).map(|page| (page, FRAME + page)).collect();
    let tree = way("BTreeMap", move || {
        tree.extend((PAGES..PAGES + PIECE).map(|page| (page, FRAME + page)));
        for page in PAGES..PAGES + PIECE {
            tree.remove(&page);
        }
    });

    Figure {
        name: "map and unmap 2 MiB".into(),
        work: PIECE as f64,
        unit: "page",
        ways: vec![array, table, hash, tree],
    }
}

pub(crate) fn figures() -> Vec<Figure> {
    vec![
        translate("translate 1 GiB in order", (0..PAGES).collect()),
        translate(
            "translate 1 GiB in no order",
            random(5)
                .map(|page| page % PAGES)
                .take(PAGES as usize)
                .collect(),
        ),
        sparse(),
        change(),
    ]
}
