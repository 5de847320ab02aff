// SPDX-License-Identifier: GPL-2.0

//! `vfio-migrate`: migrates one VFIO device to another, shows the progress, and compares both.
//!
//! It takes the steps of a VMM in a live migration, without a VMM. The source goes through
//! pre-copy while a load keeps it busy. Its stream goes through a pipe of limited bandwidth into
//! the target. At switchover, both devices must have the same content.

mod chart;
mod device;
mod error;
mod knob;
mod migrate;
mod pace;
mod record;
mod region;
mod uapi;
mod units;
mod view;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use clap::Parser;

use device::{find, verdict, Backend, Device};
use error::Error;
use knob::{Knob, Turned};
use migrate::{migrate, End, Observer, Plan};
use record::{ms, Asked, Compared, Outcome, Record, Round, Sample, Side, StateChange};
use region::{compare, fill, Bytes, Ignored, Load, Pair, Setting};
use units::size;
use view::View;

const EXIT_CODES: &str = "\
Exit codes:
  0    the target runs with the content of the source; or the migration was
       cancelled by --cancel-at-round, and the source continues to run
  1    a device failed a step; the source continues to run if its driver allows it
  2    invalid arguments
  3    a device cannot be attached, or cannot migrate
  4    the devices have different content
  5    the record or the picture could not be written
  130  interrupted by a signal; the source continues to run

SOURCE and TARGET are a UUID, a PCI address or a folder in /sys. SIZE and RATE
are bytes and bytes per second, with K, M or G for binary units. REGION is bar0
to bar5, rom, config, vga, or regionN for region N.";

/// Migrate one VFIO device to another, show the progress and compare both.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Args {
    /// Device to save
    source: String,
    /// Device to load
    target: String,
    /// How to attach the devices
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// Limit the stream to this many bytes per second
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    bandwidth: Option<u64>,
    /// Stop the source when the remaining data takes no longer than this
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime_limit: u64,
    /// Stop the source after at most N rounds
    #[arg(long, value_name = "N", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// Stay in pre-copy for at least this time
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    precopy_time: u64,
    /// Cancel when round N ends
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cancel_at_round: Option<u32>,
    /// Set a 32-bit register of the source before the migration: REGION:OFFSET=VALUE
    #[arg(long, value_name = "REGISTER", value_parser = Setting::parse)]
    set: Vec<Setting>,
    /// Make a device misbehave, until the end: NAME=VALUE, or target:NAME=VALUE for the target
    #[arg(long, value_name = "KNOB", value_parser = Knob::parse)]
    knob: Vec<Knob>,
    /// Fill a region of the source with a pattern before the migration
    #[arg(long, value_name = "REGION", value_parser = region::parse)]
    fill: Option<u32>,
    /// Write to a region of the source until it is stopped
    #[arg(long, value_name = "REGION", value_parser = region::parse)]
    load: Option<u32>,
    /// Rate of the load in bytes per second
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate, default_value = "1M",
          requires = "load")]
    load_rate: u64,
    /// Exclude bytes from the comparison: REGION or REGION:OFFSET+LENGTH
    #[arg(long, value_name = "BYTES", value_parser = Ignored::parse)]
    ignore: Vec<Ignored>,
    /// Do not compare the devices, since the uAPI forbids access to a stopped device
    #[arg(long)]
    no_verify: bool,
    /// Write the record of the migration to this file, - for standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the migration to this file, - for standard output
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// Everything but the devices that takes part in a migration.
struct Session<'a, 'scope> {
    source: &'a Device,
    target: &'a Device,
    args: &'a Args,
    interrupted: &'a AtomicBool,
    view: View,
    load: &'scope Load,
    loader: Option<ScopedJoinHandle<'scope, std::io::Result<()>>>,
    states: Vec<StateChange>,
    rounds: Vec<Round>,
    samples: Vec<Sample>,
    compared: Vec<Compared>,
}

impl Observer for Session<'_, '_> {
    fn state(&mut self, change: StateChange) {
        self.states.push(change);
        self.view.state(change);
    }

    fn sample(&mut self, sample: Sample) {
        self.samples.push(sample);
        self.view.sample(sample);
    }

    fn round(&mut self, round: Round) {
        self.rounds.push(round);
        self.view.round(round);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn quiesce(&mut self) -> Result<(), Error> {
        self.load.stop();
        match self.loader.take().map(ScopedJoinHandle::join) {
            None => Ok(()),
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(Error::Migration(format!(
                "source: the load failed to write: {error}"
            ))),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }

    fn compare(&mut self) -> Result<(), Error> {
        if self.args.no_verify {
            return Ok(());
        }
        let mut wrong = Vec::new();
        for info in self.source.regions().iter().filter(|info| info.readable) {
            let name = region::name(info.index);
            let ours = self.source.region(info.index).expect("it was just listed");
            let theirs = match self.target.region(info.index) {
                Some(theirs) if theirs.info.size == info.size => theirs,
                Some(theirs) => {
                    wrong.push(format!(
                        "{name} has {} bytes on the source and {} on the target",
                        info.size, theirs.info.size
                    ));
                    continue;
                }
                None => {
                    wrong.push(format!("the target has no {name}"));
                    continue;
                }
            };
            let pair = Pair {
                source: (ours.info, &ours),
                target: (theirs.info, &theirs),
            };
            let result = compare(&pair, &self.args.ignore)?;
            if let Some(first) = result.first_different {
                wrong.push(format!(
                    "{name} has {} different bytes, the first at {first:#x}",
                    result.different
                ));
            }
            self.compared.push(result);
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(Error::Differ(format!(
                "the devices differ: {}",
                wrong.join("; ")
            )))
        }
    }
}

/// Returns the message for a migration that did not fail.
fn summary(end: End, record: &Record) -> String {
    let rounds = record.rounds.len();
    let stream = format!(
        "{} in {rounds} rounds and {:.2} s",
        size(record.bytes),
        record.seconds
    );
    match end {
        End::Cancelled => format!("cancelled after {stream}, the source continues to run"),
        End::Completed { downtime } => {
            let bytes: u64 = record.compared.iter().map(|region| region.bytes).sum();
            let compared = match bytes {
                0 => "not compared".into(),
                _ => format!("{} equal on both", size(bytes)),
            };
            format!(
                "migrated {stream}, downtime {:.1} ms, {compared}",
                ms(downtime)
            )
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(path, text)
        .map_err(|error| Error::Output(format!("cannot write {}: {error}", path.display())))
}

/// Fills and sets up the source as requested by the arguments.
fn prepare(args: &Args, source: &Device) -> Result<(), Error> {
    let fail = |index, what: &str, error| {
        Error::Migration(format!(
            "source: {} cannot be {what}: {error}",
            region::name(index)
        ))
    };
    if let Some(index) = args.fill {
        let region = source.writable_region(index)?;
        fill(&region, region.info.size, 1).map_err(|error| fail(index, "filled", error))?;
    }
    for setting in &args.set {
        let region = source.writable_region(setting.index)?;
        let data = setting.value.to_le_bytes();
        if region.info.size.saturating_sub(setting.offset) < data.len() as u64 {
            return Err(Error::Usage(format!(
                "{} has no register at {:#x}",
                region::name(setting.index),
                setting.offset
            )));
        }
        region
            .write(setting.offset, &data)
            .map_err(|error| fail(setting.index, "set", error))?;
    }
    Ok(())
}

/// Migrates, and writes the record and the picture, even after a failure.
fn run(args: &Args) -> Result<String, Error> {
    let (from, to) = (find(&args.source)?, find(&args.target)?);
    if from == to {
        return Err(Error::Usage("SOURCE and TARGET are the same device".into()));
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())
            .map_err(|error| Error::Migration(format!("cannot handle signals: {error}")))?;
    }
    let source = Device::open(&from, args.backend)?;
    let target = Device::open(&to, args.backend)?;
    let plan = Plan {
        bandwidth: args.bandwidth,
        downtime_limit: Duration::from_millis(args.downtime_limit),
        max_rounds: args.max_rounds,
        precopy_time: Duration::from_secs(args.precopy_time),
        cancel_at_round: args.cancel_at_round,
    };
    prepare(args, &source)?;
    let turned = Turned::new(&args.knob, &from, &to)?;
    let loaded = args
        .load
        .map(|index| source.writable_region(index))
        .transpose()?;
    let load = Load::new();
    let (result, mut record) = thread::scope(|scope| {
        let loader = loaded.as_ref().map(|region| {
            scope.spawn(|| load.run(region as &dyn Bytes, region.info.size, args.load_rate))
        });
        let mut session = Session {
            source: &source,
            target: &target,
            args,
            interrupted: &interrupted,
            view: View::new(args.quiet),
            load: &load,
            loader,
            states: Vec::new(),
            rounds: Vec::new(),
            samples: Vec::new(),
            compared: Vec::new(),
        };
        let (result, measured) = migrate(&source, &target, &plan, &mut session);
        let quiet = session.quiesce();
        // The first failure matters more than a load that fails on a stopped device.
        let result = result.and_then(|end| quiet.map(|()| end));
        let record = Record {
            tool: concat!("vfio-migrate ", env!("CARGO_PKG_VERSION")),
            source: source.record(),
            target: target.record(),
            asked: Asked {
                bandwidth: args.bandwidth,
                downtime_limit_ms: args.downtime_limit as f64,
                max_rounds: args.max_rounds,
                precopy_seconds: args.precopy_time as f64,
                cancel_at_round: args.cancel_at_round,
                load: args.load.map(region::name),
                load_rate: args.load.map(|_| args.load_rate),
            },
            outcome: match result {
                Ok(End::Completed { .. }) => Outcome::Completed,
                Ok(End::Cancelled) => Outcome::Cancelled,
                Err(_) => Outcome::Failed,
            },
            error: result.as_ref().err().map(ToString::to_string),
            seconds: measured.time.as_secs_f64(),
            downtime_ms: match result {
                Ok(End::Completed { downtime }) => Some(ms(downtime)),
                _ => None,
            },
            bytes: measured.bytes,
            load_bytes: load.written(),
            compared: session.compared,
            states: session.states,
            rounds: session.rounds,
            samples: session.samples,
        };
        (result, record)
    });
    drop(turned);
    // The verdicts are complete when the devices are closed.
    drop((source, target));
    record.source.verdict = verdict(&from);
    record.target.verdict = verdict(&to);
    for (side, device) in [
        (Side::Source, &record.source),
        (Side::Target, &record.target),
    ] {
        for line in device.verdict.iter().flat_map(|text| text.lines()) {
            eprintln!("vfio-migrate: verdict on the {}: {line}", side.name());
        }
    }
    let mut written = Ok(());
    if let Some(path) = &args.json {
        let mut text = serde_json::to_string_pretty(&record).expect("a record is plain data");
        text.push('\n');
        written = write(path, &text);
    }
    if let Some(path) = &args.svg {
        let drawn = chart::svg(&record)
            .map_err(|error| Error::Output(format!("cannot draw the picture: {error}")))
            .and_then(|text| write(path, &text));
        written = written.and(drawn);
    }
    let end = result?;
    written?;
    Ok(summary(end, &record))
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(summary) => {
            // Standard output may be used for the record.
            eprintln!("vfio-migrate: {summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vfio-migrate: {error}");
            ExitCode::from(error.code())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn options_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn invalid_arguments_are_refused() {
        for bad in [
            "a",
            "a b --bandwidth 0",
            "a b --max-rounds 0",
            "a b --cancel-at-round 0",
            "a b --load bar9",
            "a b --load-rate 1M",
            "a b --ignore bar0:7",
            "a b --backend vfio",
            "a b --knob save_rate",
            "a b c",
        ] {
            let words = ["vfio-migrate"].into_iter().chain(bad.split(' '));
            let error = Args::try_parse_from(words).expect_err(bad);
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }
}
