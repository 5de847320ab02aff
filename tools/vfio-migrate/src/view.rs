// SPDX-License-Identifier: GPL-2.0

//! Progress as a table on a terminal, or as lines of a log.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::record::{Round, Sample, Side, State, StateChange};
use crate::units::size;

/// Time between two lines of a log.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Shows the progress of a migration on standard error.
pub(crate) struct View {
    quiet: bool,
    terminal: bool,
    shown: Option<Instant>,
    source: State,
    target: State,
    last: Sample,
}

impl View {
    /// Creates a view; with `quiet` it never shows anything.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: io::stderr().is_terminal(),
            shown: None,
            source: State::Running,
            target: State::Running,
            last: Sample::default(),
        }
    }

    /// Shows a new state.
    pub(crate) fn state(&mut self, change: StateChange) {
        match change.device {
            Side::Source => self.source = change.state,
            Side::Target => self.target = change.state,
        }
        self.last.seconds = change.seconds;
        if !matches!(self.source, State::PreCopy | State::PreCopyP2p) {
            self.last.initial_bytes = None;
            self.last.dirty_bytes = None;
            self.last.dirty_rate = None;
        }
        self.line(true);
    }

    /// Shows the progress within a round.
    pub(crate) fn sample(&mut self, sample: Sample) {
        self.last = sample;
        let due = match self.shown {
            Some(shown) => shown.elapsed() >= LOG_EVERY,
            None => true,
        };
        if self.terminal || due {
            self.line(false);
        }
    }

    /// Shows the end of a round.
    pub(crate) fn round(&mut self, round: Round) {
        self.last.seconds = round.seconds;
        self.last.dirty_rate = Some(round.dirty_rate);
        // An idle device in pre-copy has ten rounds a second.
        if round.bytes > 0 {
            self.line(true);
        }
    }

    fn line(&mut self, keep: bool) {
        if self.quiet {
            return;
        }
        let mut text = String::new();
        if self.shown.is_none() {
            text += HEAD;
            text += "\n";
        }
        if self.terminal {
            text += "\r\x1b[K";
        }
        text += &row(self.source, self.target, &self.last);
        if keep || !self.terminal {
            text += "\n";
        }
        self.shown = Some(Instant::now());
        // An error means that the terminal is gone.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

const HEAD: &str =
    "   time source       target          initial      dirty       sent  sent in s dirty in s \
     round";

fn row(source: State, target: State, sample: &Sample) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or("-".into(), size);
    let round = match sample.round {
        0 => "-".to_string(),
        round => round.to_string(),
    };
    format!(
        "{:6.2}s {:12} {:12} {:>10} {:>10} {:>10} {:>10} {:>10} {round:>5}",
        sample.seconds,
        source.name(),
        target.name(),
        bytes(sample.initial_bytes),
        bytes(sample.dirty_bytes),
        size(sample.sent_bytes),
        size(sample.send_rate as u64),
        bytes(sample.dirty_rate.map(|rate| rate as u64)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_aligned_with_the_head() {
        let full = Sample {
            seconds: 12.34,
            round: 3,
            initial_bytes: Some(15 << 20),
            dirty_bytes: Some(999),
            sent_bytes: 1000 << 20,
            send_rate: 1e6,
            dirty_rate: Some(2e6),
            expected_downtime_ms: None,
        };
        for sample in [full, Sample::default()] {
            let row = row(State::PreCopyP2p, State::Resuming, &sample);
            assert_eq!(row.len(), HEAD.len(), "{row}");
        }
    }
}
