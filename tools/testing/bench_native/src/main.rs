// SPDX-License-Identifier: GPL-2.0

//! Benchmark of the parts that need no kernel, on the CPU of this machine.
//!
//! A *figure* compares ways of doing the same work. criterion measures the ways of a figure one
//! after the other, several times, so that the load of the machine affects all of them. The table
//! has the speed of each way relative to the first one: the median of these ratios, the lowest and
//! the highest. Arguments are those of criterion; a word selects figures.
//!
//! Compile it without automatic vectorization: kernel code must not use vector registers. The
//! libraries that are measured use them explicitly.

#![deny(unsafe_code)]

mod dirty_map;
mod dma_log;
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

use criterion::{
    Bencher,
    Criterion,
    SamplingMode, //
};
use serde_json::{
    json,
    Value, //
};
use std::{
    error::Error,
    fmt::Write as _,
    fs,
    path::Path,
    time::Duration, //
};

/// Number of times that each figure is measured.
const ROUNDS: usize = 3;

/// The table as JSON.
const JSON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../bench_native.json");

/// A way of doing the work of a figure.
type Way = (&'static str, Box<dyn FnMut(&mut Bencher<'_>)>);

/// Ways of doing the same work.
struct Figure {
    name: String,
    /// Amount of work in an iteration, and its unit.
    work: f64,
    unit: &'static str,
    ways: Vec<Way>,
}

/// Boxes the function of a way.
fn way(name: &'static str, run: impl FnMut(&mut Bencher<'_>) + 'static) -> Way {
    (name, Box::new(run))
}

/// Returns pseudo-random numbers, the same ones each time.
fn random(seed: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |index| vfio_host_tests::stream::pattern_word(seed, index))
}

/// Measures a figure once. Returns the nanoseconds per unit of work for each way.
fn measure(
    criterion: &mut Criterion,
    out: &Path,
    figure: &mut Figure,
    round: usize,
) -> Option<Vec<f64>> {
    let id = |way: &str| format!("{way}, {round}");
    let mut group = criterion.benchmark_group(&figure.name);

    group.sampling_mode(SamplingMode::Flat);
    for (way, run) in &mut figure.ways {
        group.bench_function(id(way), |bencher| run(bencher));
    }
    group.finish();

    let times = figure.ways.iter().map(|(way, _)| {
        let path = out
            .join(&figure.name)
            .join(id(way))
            .join("new/estimates.json");
        let estimates: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let median = estimates["median"]["point_estimate"].as_f64()?;

        Some(median / figure.work)
    });
    // There are none if the arguments do not select the figure.
    times.collect()
}

/// Returns the lowest, the median and the highest of these.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();

    values.sort_by(f64::total_cmp);
    [
        values[0],
        values[values.len() / 2],
        values[values.len() - 1],
    ]
}

fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::temp_dir().join(format!("vfio-bench-native-{}", std::process::id()));
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(1001)
        .warm_up_time(Duration::from_millis(10))
        .measurement_time(Duration::from_millis(50))
        .output_directory(&out)
        .configure_from_args();
    let parts = [
        stream::figures,
        dirty_map::figures,
        dma_log::figures,
        table::figures,
    ];
    let mut rows = Vec::new();
    let mut text = format!("{:46} {:>11} {:>6} (lowest - highest)\n", "", "ns", "ratio");

    for figures in parts {
        for mut figure in figures() {
            let rounds: Option<Vec<_>> = (0..ROUNDS)
                .map(|round| measure(&mut criterion, &out, &mut figure, round))
                .collect();
            let _ = fs::remove_dir_all(&out);
            let Some(rounds) = rounds else {
                continue;
            };

            writeln!(text, "{}, for each {}", figure.name, figure.unit)?;
            for (index, (way, _)) in figure.ways.iter().enumerate() {
                let [_, time, _] = spread(rounds.iter().map(|times| times[index]));
                let [low, ratio, high] = spread(rounds.iter().map(|times| times[0] / times[index]));

                writeln!(
                    text,
                    "  {way:44} {time:11.3} {ratio:6.2} ({low:.2} - {high:.2})"
                )?;
                rows.push(json!({
                    "figure": figure.name, "unit": figure.unit, "way": way, "ns": time,
                    "ratio": ratio, "lowest": low, "highest": high,
                }));
            }
        }
    }
    print!("{text}");
    fs::write(JSON, serde_json::to_vec_pretty(&rows)?)?;
    Ok(())
}
