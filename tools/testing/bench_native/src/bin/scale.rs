// SPDX-License-Identifier: GPL-2.0

//! Measures how the cost of the parts that need no kernel grows with the size of the state and with
//! the number of written pages.
//!
//! Prints curves as JSON, which `tools/testing/scale` compares with the expected order and draws. A
//! point is x, the median of the measurements, their first and their third quartile.

#![deny(unsafe_code)]

// Names that the source of the DMA log uses.
extern crate self as kernel;
#[allow(dead_code, unreachable_pub, unused_imports, unused_macros)]
#[path = "../../../fuzz/src/kernel_containers.rs"]
mod kernel_containers;
use kernel_containers::{
    alloc,
    prelude,
    rbtree, //
};
#[path = "../log.rs"]
mod log;

use self::log::Log;
use rustix::time::{
    clock_gettime,
    ClockId, //
};
use serde_json::{
    json,
    Value, //
};
use std::hint::black_box;
use vfio_host_tests::{
    dirty_map::{
        leaf_words,
        summary_words,
        DirtyMap, //
    },
    stream::pattern_word,
};

const PAGE: usize = log::PAGE as usize;

/// Number of measurements of a point.
const RUNS: usize = 15;

/// Sizes of the state.
const SIZES: [usize; 6] = [64 << 10, 1 << 20, 16 << 20, 1 << 30, 16 << 30, 64 << 30];

/// Number of pages of a round.
const ROUND: usize = 64;

/// Shortest time of a measurement in seconds, in which the work is repeated.
const SHORTEST: f64 = 1e-3;

/// Returns the CPU time of this thread in seconds. The load of the machine has no effect on it.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);

    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Returns a point in microseconds.
fn point(x: usize, mut work: impl FnMut()) -> [f64; 4] {
    let mut repeat = 1;
    let mut measure = |repeat: u32| {
        let start = cpu_time();

        (0..repeat).for_each(|_| work());
        cpu_time() - start
    };

    while measure(repeat) < SHORTEST {
        repeat *= 2;
    }
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| measure(repeat) / f64::from(repeat) * 1e6)
        .collect();
    times.sort_by(f64::total_cmp);
    [
        x as f64,
        times[RUNS / 2],
        times[RUNS / 4],
        times[RUNS * 3 / 4],
    ]
}

/// Returns a clean map in memory that was used before.
fn map(pages: usize) -> DirtyMap<Vec<u64>> {
    let [leaf, summary] = [leaf_words(pages), summary_words(pages)].map(|words| vec![1; words]);

    DirtyMap::new(pages, leaf, summary).expect("the lengths fit")
}

/// Marks all pages.
fn mark_all(size: usize) -> [f64; 4] {
    let mut map = map(size / PAGE);

    point(size, || {
        black_box(black_box(&mut map).mark_all());
    })
}

/// Marks all pages, and takes them.
fn stream(size: usize) -> [f64; 4] {
    let pages = size / PAGE;
    let mut map = map(pages);

    point(size, || {
        map.mark_all();
        assert_eq!(take(&mut map), pages);
    })
}

/// Takes all dirty pages, and returns their number.
fn take(map: &mut DirtyMap<Vec<u64>>) -> usize {
    let mut taken = 0;
    let mut from = 0;

    while let Some(run) = map.take_run(from) {
        taken += run.count;
        from = run.first + run.count;
    }
    taken
}

/// Marks some pages with equal distances, and takes them.
fn round(size: usize) -> [f64; 4] {
    let pages = size / PAGE;
    let count = ROUND.min(pages);
    let mut map = map(pages);

    point(size, || {
        for index in 0..count {
            black_box(map.mark_range(index * (pages / count), 1));
        }
        assert_eq!(take(&mut map), count);
    })
}

/// Marks pages of an address space of 48 bits, and takes them out of the log.
fn report(pages: usize) -> [f64; 4] {
    let mut log = Log::new((1 << 48) - 1);
    let addresses: Vec<u64> = (0..pages as u64)
        .map(|index| pattern_word(1, index) >> 16 & !(PAGE as u64 - 1))
        .collect();

    point(pages, || {
        for address in &addresses {
            log.mark(*address);
        }
        log.take_all();
    })
}

/// Returns a curve with the exponent of x that is expected.
fn curve(name: &str, x: &str, order: usize, points: Vec<[f64; 4]>) -> Value {
    json!({ "name": name, "x": x, "unit": "us", "order": order, "points": points })
}

fn main() {
    let state = "bytes of state";
    let curves = [
        curve(
            "dirty map: mark all pages",
            state,
            0,
            SIZES.map(mark_all).into(),
        ),
        curve(
            "dirty map: mark and take all pages",
            state,
            1,
            SIZES.map(stream).into(),
        ),
        curve(
            "dirty map: mark and take 64 pages",
            state,
            0,
            SIZES.map(round).into(),
        ),
        curve(
            "DMA log: mark and report",
            "pages written in 256 TiB",
            1,
            [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
                .map(report)
                .into(),
        ),
    ];

    println!("{:#}", json!({ "curves": curves }));
}
