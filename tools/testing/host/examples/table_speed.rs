// SPDX-License-Identifier: GPL-2.0

//! Measures the page table of the software IOMMU, with pages of 4 KiB:
//! `cargo run --release --example table_speed`.

use std::{
    hint::black_box,
    time::Instant, //
};
use vfio_host_tests::table::{
    Access,
    MapError,
    Memory,
    Missing,
    Root,
    Run,
    Spare,
    Table,
    FANOUT, //
};

const GIB: u64 = (1 << 30) / 4096;
const ACCESS: Access = Access {
    read: true,
    write: true,
};

/// Memory of the host.
struct Host;

impl Memory for Host {
    type Box<T> = Box<T>;
}

fn new_table() -> Table<Host> {
    let root: Root<Host> = std::array::from_fn(|_| (None, 0, 0));

    Table::new(Box::new(root))
}

/// Maps like the software IOMMU.
fn map(table: &mut Table<Host>, page: u64, frame: u64, count: u64) {
    let mut spare = Spare::default();
    let mut done = 0;

    while done < count {
        match table.map(page + done, frame + done, count - done, ACCESS, &mut spare) {
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

fn unmap(table: &mut Table<Host>, page: u64, count: u64) {
    let mut done = 0;

    while done < count {
        done += table.unmap(page + done, count - done);
    }
}

/// Prints the time of `work`, which does something `count` times.
fn measure(name: &str, count: u64, work: impl FnOnce()) {
    let start = Instant::now();

    work();
    let time = start.elapsed();
    println!(
        "{name}: {:.1} ms, {:.1} ns each",
        time.as_secs_f64() * 1e3,
        time.as_secs_f64() * 1e9 / count as f64
    );
}

/// Returns the next pseudo-random number.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn main() {
    let mut table = new_table();
    let pages = 16 * GIB;

    measure("map 16 GiB of contiguous frames", pages, || {
        map(&mut table, 0, 0, pages)
    });
    measure("unmap them at once", pages, || unmap(&mut table, 0, pages));
    measure("map 16 GiB page by page", pages, || {
        (0..pages).for_each(|page| map(&mut table, page, pages - page, 1));
    });
    measure("unmap them page by page", pages, || {
        (0..pages).for_each(|page| unmap(&mut table, page, 1));
    });

    // 64 GiB in mappings of 64 KiB with gaps of 1 MiB.
    let (chunks, stride) = (64 * GIB / 16, 256 + 16);
    measure("map 64 GiB in 1 Mi pieces", chunks * 16, || {
        (0..chunks).for_each(|chunk| map(&mut table, chunk * stride, chunk * 16, 16));
    });
    let (mut state, count) = (1, 20_000_000);
    let mut page = || {
        let number = random(&mut state) % (chunks * 16);
        number / 16 * stride + number % 16
    };
    measure("translate random pages of them", count, || {
        for _ in 0..count {
            black_box(table.translate(page(), true)).expect("is mapped");
        }
    });
    measure("mark random pages of them", count, || {
        (0..count).for_each(|_| table.mark(page()));
    });
    let mut runs = [Run::default(); 32];
    let mut take = |name| {
        measure(name, 1, || {
            let mut from = Some(0);
            while let Some(page) = from {
                (_, from) = table.take_dirty(page, u64::MAX, true, &mut runs);
            }
        });
    };
    take("take most of 64 GiB as dirty");
    take("take none");
}
