// SPDX-License-Identifier: GPL-2.0

//! Measures translations of the software IOMMU: of random pages of 64 GiB, which are mapped in
//! pieces of 64 KiB with gaps of 1 MiB.

use std::{
    hint::black_box,
    time::Instant, //
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

const PIECE: u64 = 16;
const PIECES: u64 = (64 << 30) / 4096 / PIECE;
const STRIDE: u64 = PIECE + 256;
const COUNT: u64 = 20_000_000;

/// Memory of the host.
struct Host;

impl Memory for Host {
    type Box<T> = Box<T>;
}

fn map(table: &mut Table<Host>, page: u64, frame: u64, count: u64) {
    let access = Access {
        read: true,
        write: true,
    };
    let mut spare = Spare::default();
    let mut done = 0;

    while done < count {
        match table.map(page + done, frame + done, count - done, access, &mut spare) {
            Ok(mapped) => done += mapped,
            Err(MapError::Missing(Missing::Leaf)) => spare.leaf = Some(Box::new([0; FANOUT])),
            Err(MapError::Missing(Missing::Lower)) => {
                spare.lower = Some(Box::new(std::array::from_fn(|_| (None, 0, 0))));
            }
            Err(MapError::Missing(Missing::Middle)) => {
                spare.middle = Some(Box::new(std::array::from_fn(|_| (None, 0, 0))));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn main() {
    let mut table = Table::new(Box::new(std::array::from_fn(|_| (None, 0, 0))));
    let mut random = 1_u64;

    for piece in 0..PIECES {
        map(&mut table, piece * STRIDE, piece * PIECE, PIECE);
    }
    let start = Instant::now();
    for _ in 0..COUNT {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = random % (PIECES * PIECE);
        let frame = table.translate(page / PIECE * STRIDE + page % PIECE, true);
        assert_eq!(black_box(frame), Ok(page));
    }
    let each = start.elapsed().as_secs_f64() * 1e9 / COUNT as f64;
    println!("{each:.0} ns for each translation");
}
