// SPDX-License-Identifier: GPL-2.0

//! Benchmark of the parts that need no kernel, on the CPU of this machine.
//!
//! A *figure* compares ways of doing the same work. The ways take short turns, so that the load of
//! the machine affects all of them. The table has the speed of each way relative to the first one:
//! the median of these ratios and their quartiles. Arguments are words that select figures.
//!
//! Compile it without automatic vectorization: kernel code must not use vector registers. The
//! libraries that are measured use them explicitly.

#![deny(unsafe_code)]

mod dirty_map;
mod dma_log;
mod log;
#[allow(unsafe_code)]
#[path = "../../../../rust/vfio/memory/prefetch.rs"]
mod prefetch;
mod stream;
mod table;

// Names that the source of the DMA log uses.
extern crate self as kernel;
#[allow(dead_code, unreachable_pub, unused_imports, unused_macros)]
#[path = "../../fuzz/src/kernel_containers.rs"]
mod kernel_containers;
use kernel_containers::{
    alloc,
    prelude,
    rbtree, //
};

use serde_json::json;
use std::{
    error::Error,
    fs,
    time::{
        Duration,
        Instant, //
    },
};

/// Number of turns of each way.
const TURNS: usize = 201;

/// Number of turns of each way if they take longer than [`LONGEST`].
const FEWEST: usize = 7;

/// Shortest time of a turn, in which the work is repeated.
const TURN: Duration = Duration::from_micros(400);

/// Time for a figure.
const LONGEST: Duration = Duration::from_secs(3);

/// The table as JSON.
const JSON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../bench_native.json");

/// A way of doing the work of a figure. Returns the time that it takes.
type Way = (&'static str, Box<dyn FnMut() -> Duration>);

/// Ways of doing the same work.
struct Figure {
    name: String,
    /// Amount of work in an iteration, and its unit.
    work: f64,
    unit: &'static str,
    ways: Vec<Way>,
}

/// Returns a way that takes the time of all of `work`.
fn way(name: &'static str, mut work: impl FnMut() + 'static) -> Way {
    timed(name, move || {
        let start = Instant::now();

        work();
        start.elapsed()
    })
}

/// Returns a way that measures its time.
fn timed(name: &'static str, work: impl FnMut() -> Duration + 'static) -> Way {
    (name, Box::new(work))
}

/// Returns pseudo-random numbers, the same ones each time.
fn random(seed: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |index| vfio_host_tests::stream::pattern_word(seed, index))
}

/// Returns the nanoseconds per unit of work of each way in each turn.
fn measure(figure: &mut Figure) -> Vec<Vec<f64>> {
    let begin = Instant::now();
    let turn = |way: &mut Way, repeat: u32| (0..repeat).map(|_| way.1()).sum::<Duration>();
    let repeat: Vec<u32> = figure
        .ways
        .iter_mut()
        .map(|way| {
            let mut repeat = 1;

            while turn(way, repeat) < TURN {
                repeat *= 2;
            }
            repeat
        })
        .collect();
    let mut turns = Vec::new();

    while turns.len() < TURNS && (turns.len() < FEWEST || begin.elapsed() < LONGEST) {
        let ways = figure.ways.iter_mut().zip(&repeat);

        turns.push(
            ways.map(|(way, repeat)| {
                let time = turn(way, *repeat).as_secs_f64() / f64::from(*repeat);

                time * 1e9 / figure.work
            })
            .collect(),
        );
    }
    turns
}

/// Returns the first quartile, the median and the third quartile of these.
fn quartiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();

    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarters| values[(values.len() - 1) * quarters / 4])
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let parts = [
        stream::figures,
        dirty_map::figures,
        dma_log::figures,
        table::figures,
    ];
    let mut rows = Vec::new();

    println!("{:46} {:>11} {:>6} (quartiles)", "", "ns", "ratio");
    for figures in parts {
        for mut figure in figures() {
            let selected = |word: &String| figure.name.contains(word);

            if !words.is_empty() && !words.iter().any(selected) {
                continue;
            }
            let turns = measure(&mut figure);

            println!("{}, for each {}", figure.name, figure.unit);
            for (index, (way, _)) in figure.ways.iter().enumerate() {
                let [_, time, _] = quartiles(turns.iter().map(|times| times[index]));
                let [lower, ratio, upper] =
                    quartiles(turns.iter().map(|times| times[0] / times[index]));

                println!("  {way:44} {time:11.3} {ratio:6.2} ({lower:.2} - {upper:.2})");
                rows.push(json!({
                    "figure": figure.name, "unit": figure.unit, "way": way, "ns": time,
                    "ratio": ratio, "lower": lower, "upper": upper,
                }));
            }
        }
    }
    fs::write(JSON, serde_json::to_vec_pretty(&rows)?)?;
    Ok(())
}
