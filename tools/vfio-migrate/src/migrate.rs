// SPDX-License-Identifier: GPL-2.0

//! Steps of a migration: states, rounds, the pipe, and recovery from failures.
//!
//! Devices and streams are traits here, so that the tests need no device.

use std::fs::File;
use std::io::{self, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::pipe::{pipe_with, PipeFlags};

use crate::error::Error;
use crate::pace::Pace;
use crate::record::{ms, Round, Sample, Side, State, StateChange};
use crate::uapi::{PrecopyInfo, MIGRATION_P2P, MIGRATION_PRE_COPY};

/// Time to wait for a device before checking whether the user wants to stop.
const PATIENCE: Duration = Duration::from_millis(100);
/// Time between two samples.
const SAMPLING: Duration = Duration::from_millis(50);

/// A device that can migrate.
pub(crate) trait Device: Sync {
    /// Returns the `VFIO_MIGRATION_*` flags.
    fn flags(&self) -> u64;
    /// Returns the current state.
    fn state(&self) -> io::Result<State>;
    /// Changes the state and returns the new data_fd, if any.
    fn set_state(&self, state: State) -> io::Result<Option<Box<dyn Stream>>>;
    /// Returns the number of bytes that `STOP_COPY` would stream, if known.
    fn data_size(&self) -> Option<u64>;
    /// Resets the device: it is in `RUNNING` and has no content.
    fn reset(&self) -> io::Result<()>;
}

/// A data_fd.
pub(crate) trait Stream: Send {
    /// Calls read(), which fails with `EAGAIN` if no data is ready.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Calls write() until all data is written; returns the number of bytes even on failure.
    fn write(&mut self, data: &[u8]) -> (usize, io::Result<()>);
    /// Returns the pre-copy info.
    fn info(&self) -> io::Result<PrecopyInfo>;
    /// Waits until read() would not block, at most for `timeout`.
    fn wait(&self, timeout: Duration) -> io::Result<()>;
}

/// Parameters of a migration.
pub(crate) struct Plan {
    /// Bytes per second through the pipe.
    pub(crate) bandwidth: Option<u64>,
    /// Stop the source when the remaining data takes no longer than this.
    pub(crate) downtime_limit: Duration,
    /// Stop the source after at most this many rounds.
    pub(crate) max_rounds: u32,
    /// Stay in pre-copy for at least this time.
    pub(crate) precopy_time: Duration,
    /// Cancel at the end of this round.
    pub(crate) cancel_at_round: Option<u32>,
}

/// Callbacks of a migration.
pub(crate) trait Observer {
    /// Called when the state of a device has changed.
    fn state(&mut self, change: StateChange);
    /// Called many times a second while data is sent.
    fn sample(&mut self, sample: Sample);
    /// Called at the end of each round.
    fn round(&mut self, round: Round);
    /// Returns whether the user wants to stop.
    fn interrupted(&self) -> bool;
    /// Called before the source is stopped: stops all writes to it.
    fn quiesce(&mut self) -> Result<(), Error>;
    /// Called when both devices are stopped: compares them.
    fn compare(&mut self) -> Result<(), Error>;
}

/// Outcome of a migration that did not fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// The target runs.
    Completed {
        /// Time in which neither device ran.
        downtime: Duration,
    },
    /// The source continues to run, as planned.
    Cancelled,
}

/// Measurements, also of a migration that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Measured {
    /// Bytes sent through the pipe.
    pub(crate) bytes: u64,
    /// Duration without the comparison.
    pub(crate) time: Duration,
}

/// Migrates `source` to `target`.
///
/// After a failure, the source continues to run and the target is reset.
pub(crate) fn migrate(
    source: &dyn Device,
    target: &dyn Device,
    plan: &Plan,
    observer: &mut dyn Observer,
) -> (Result<End, Error>, Measured) {
    let now = Instant::now();
    let mut walk = Walk {
        source,
        target,
        plan,
        observer,
        start: now,
        apart: Duration::ZERO,
        sent: 0,
        busy: Duration::ZERO,
        last: Last::default(),
        pace: Pace::new(plan.bandwidth, now),
    };
    let mut result = walk.run();
    let measured = Measured {
        bytes: walk.sent,
        time: walk.start.elapsed() - walk.apart,
    };
    // Devices that differ stay stopped, so that the user can look at them.
    if !matches!(result, Ok(End::Completed { .. }) | Err(Error::Differ(_))) {
        let recovery = walk.recover();
        result = match (result, recovery) {
            (Err(Error::Migration(what)), Err(also)) => {
                Err(Error::Migration(format!("{what}; then {also}")))
            }
            (Ok(_), Err(error)) => Err(error),
            (result, _) => result,
        };
    }
    (result, measured)
}

/// Reason for the end of pre-copy.
enum Precopy {
    Enough,
    Cancelled,
}

/// Result of one read() of the stream.
enum Piece {
    Bytes(usize),
    /// Temporary end of the stream.
    Nothing,
    /// Permanent end of the stream.
    End,
    /// No data is ready yet.
    NotReady,
}

/// The previous sample.
#[derive(Default)]
struct Last {
    seconds: f64,
    sent: u64,
    left: Option<u64>,
}

struct Walk<'a> {
    source: &'a dyn Device,
    target: &'a dyn Device,
    plan: &'a Plan,
    observer: &'a mut dyn Observer,
    start: Instant,
    /// Duration of the comparison, which is not part of a migration.
    apart: Duration,
    sent: u64,
    /// Time spent on sending data.
    busy: Duration,
    last: Last,
    pace: Pace,
}

impl Walk<'_> {
    fn seconds(&self) -> f64 {
        (self.start.elapsed() - self.apart).as_secs_f64()
    }

    /// Changes the state of a device and tells the observer.
    fn set(&mut self, side: Side, state: State) -> Result<Option<Box<dyn Stream>>, Error> {
        let device = match side {
            Side::Source => self.source,
            Side::Target => self.target,
        };
        match device.set_state(state) {
            Ok(stream) => {
                let seconds = self.seconds();
                self.observer.state(StateChange {
                    seconds,
                    device: side,
                    state,
                });
                Ok(stream)
            }
            Err(error) => {
                let now = match device.state() {
                    Ok(state) => format!("; its state is {}", state.name()),
                    Err(_) => String::new(),
                };
                Err(Error::Migration(format!(
                    "{}: cannot change to {}: {error}{now}",
                    side.name(),
                    state.name()
                )))
            }
        }
    }

    /// Like [`Self::set`], for state changes that must return a data_fd.
    fn set_for_stream(&mut self, side: Side, state: State) -> Result<Box<dyn Stream>, Error> {
        self.set(side, state)?.ok_or_else(|| {
            Error::Migration(format!(
                "{}: no data_fd in state {}",
                side.name(),
                state.name()
            ))
        })
    }

    fn run(&mut self) -> Result<End, Error> {
        let precopy = self.source.flags() & MIGRATION_PRE_COPY != 0;
        let stream = if precopy {
            Some(self.set_for_stream(Side::Source, State::PreCopy)?)
        } else {
            None
        };
        let sink = self.set_for_stream(Side::Target, State::Resuming)?;
        let (output, input) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(|error| Error::Migration(format!("cannot create a pipe: {error}")))?;
        let (sent, received) = thread::scope(|scope| {
            let receiver = scope.spawn(|| receive(File::from(output), sink));
            let sent = self.send(stream, File::from(input));
            (sent, receiver.join().expect("the receiver does not panic"))
        });
        let stopped = match (sent, received) {
            (Err(Error::Unread), Err(error)) => return Err(error),
            (Err(error), _) | (Ok(_), Err(error)) => return Err(error),
            (Ok(None), Ok(())) => return Ok(End::Cancelled),
            (Ok(Some(stopped)), Ok(())) => stopped,
        };
        self.set(Side::Target, State::Stop)?;
        let compare = Instant::now();
        let compared = self.observer.compare();
        self.apart += compare.elapsed();
        compared?;
        if self.target.flags() & MIGRATION_P2P != 0 {
            self.set(Side::Target, State::RunningP2p)?;
        }
        self.set(Side::Target, State::Running)?;
        let downtime = stopped.elapsed() - self.apart;
        self.set(Side::Source, State::Stop)?;
        Ok(End::Completed { downtime })
    }

    /// Sends the stream of the source through the pipe.
    ///
    /// Returns the time at which the source was stopped, or `None` if cancelled.
    fn send(
        &mut self,
        stream: Option<Box<dyn Stream>>,
        mut pipe: File,
    ) -> Result<Option<Instant>, Error> {
        let mut stream = stream;
        if let Some(stream) = &mut stream {
            match self.precopy(stream.as_mut(), &mut pipe)? {
                Precopy::Cancelled => return Ok(None),
                Precopy::Enough => {}
            }
        }
        self.observer.quiesce()?;
        let stopped = Instant::now();
        if self.source.flags() & MIGRATION_P2P != 0 {
            let quiet = match stream {
                Some(_) => State::PreCopyP2p,
                None => State::RunningP2p,
            };
            self.set(Side::Source, quiet)?;
        }
        let mut stream = match (stream, self.set(Side::Source, State::StopCopy)?) {
            (Some(stream), None) | (None, Some(stream)) => stream,
            (Some(_), Some(_)) => {
                return Err(Error::Migration(
                    "source: a second data_fd from PRE_COPY to STOP_COPY".into(),
                ))
            }
            (None, None) => {
                return Err(Error::Migration(
                    "source: no data_fd in state STOP_COPY".into(),
                ))
            }
        };
        loop {
            match self.piece(stream.as_mut(), &mut pipe)? {
                Piece::Bytes(_) => self.sample(0, None),
                Piece::NotReady => self.wait(stream.as_ref())?,
                Piece::End => break,
                Piece::Nothing => {
                    return Err(Error::Migration(
                        "source: read() failed with ENOMSG in STOP_COPY".into(),
                    ))
                }
            }
        }
        Ok(Some(stopped))
    }

    fn precopy(&mut self, stream: &mut dyn Stream, pipe: &mut File) -> Result<Precopy, Error> {
        let mut number = 1;
        loop {
            let began = Instant::now();
            let before = info(stream)?;
            let mut bytes = 0;
            self.sample(number, Some(before));
            while bytes < before.left() {
                match self.piece(stream, pipe)? {
                    Piece::Bytes(n) => {
                        bytes += n as u64;
                        if self.seconds() - self.last.seconds >= SAMPLING.as_secs_f64() {
                            let now = info(stream)?;
                            self.sample(number, Some(now));
                        }
                    }
                    Piece::NotReady => self.wait(stream)?,
                    // The uAPI requires ENOMSG, but some drivers return 0.
                    Piece::Nothing | Piece::End => {
                        self.wait(stream)?;
                        break;
                    }
                }
            }
            if before.left() == 0 {
                self.wait(stream)?;
            }
            let after = info(stream)?;
            self.sample(number, Some(after));
            let time = began.elapsed().as_secs_f64();
            let dirtied = (after.left() + bytes).saturating_sub(before.left());
            let expected = self.expected_downtime(after.left());
            let seconds = self.seconds();
            self.observer.round(Round {
                round: number,
                seconds,
                bytes,
                left_bytes: after.left(),
                dirty_rate: dirtied as f64 / time,
                reinit: after.reinit,
                expected_downtime_ms: expected.map(ms),
            });
            if let Some(cancel) = self.plan.cancel_at_round {
                if number >= cancel {
                    return Ok(Precopy::Cancelled);
                }
            } else if self.start.elapsed() >= self.plan.precopy_time
                && (number >= self.plan.max_rounds
                    || near_enough(after, expected, self.plan.downtime_limit))
            {
                return Ok(Precopy::Enough);
            }
            number += 1;
        }
    }

    /// Sends the data of one read() through the pipe.
    fn piece(&mut self, stream: &mut dyn Stream, pipe: &mut File) -> Result<Piece, Error> {
        if self.observer.interrupted() {
            return Err(Error::Interrupted);
        }
        let began = Instant::now();
        let mut buffer = vec![0; self.pace.chunk()];
        let bytes = match stream.read(&mut buffer) {
            Ok(0) => return Ok(Piece::End),
            Ok(bytes) => bytes,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOMSG) => return Ok(Piece::Nothing),
                Some(Errno::AGAIN) => return Ok(Piece::NotReady),
                Some(Errno::INTR) => return Ok(Piece::NotReady),
                _ => {
                    return Err(Error::Migration(format!(
                        "source: read() of its stream failed after {} bytes: {error}",
                        self.sent
                    )))
                }
            },
        };
        pipe.write_all(&buffer[..bytes]).map_err(|error| {
            if error.kind() == io::ErrorKind::BrokenPipe {
                Error::Unread
            } else {
                Error::Migration(format!("cannot write to the pipe: {error}"))
            }
        })?;
        self.sent += bytes as u64;
        thread::sleep(self.pace.after(bytes, Instant::now()));
        self.busy += began.elapsed();
        Ok(Piece::Bytes(bytes))
    }

    fn wait(&mut self, stream: &dyn Stream) -> Result<(), Error> {
        if self.observer.interrupted() {
            return Err(Error::Interrupted);
        }
        stream
            .wait(PATIENCE)
            .map_err(|error| Error::Migration(format!("source: poll() failed: {error}")))
    }

    /// Returns how long `STOP_COPY` would take at the rate so far.
    fn expected_downtime(&self, left: u64) -> Option<Duration> {
        let bytes = self.source.data_size().unwrap_or(left);
        (self.sent > 0 && !self.busy.is_zero()).then(|| {
            let rate = self.sent as f64 / self.busy.as_secs_f64();
            Duration::from_secs_f64((bytes as f64 / rate).min(1e9))
        })
    }

    fn sample(&mut self, round: u32, info: Option<PrecopyInfo>) {
        let seconds = self.seconds();
        let time = (seconds - self.last.seconds).max(1e-6);
        let left = info.map(|info| info.left());
        let read = self.sent - self.last.sent;
        let dirtied = left
            .zip(self.last.left)
            .map(|(left, before)| (left + read).saturating_sub(before));
        let expected = left.and_then(|left| self.expected_downtime(left));
        self.observer.sample(Sample {
            seconds,
            round,
            initial_bytes: info.map(|info| info.initial),
            dirty_bytes: info.map(|info| info.dirty),
            sent_bytes: self.sent,
            send_rate: read as f64 / time,
            dirty_rate: dirtied.map(|bytes| bytes as f64 / time),
            expected_downtime_ms: expected.map(ms),
        });
        self.last = Last {
            seconds,
            sent: self.sent,
            left,
        };
    }

    /// Takes the source back to `RUNNING`, and resets the target.
    fn recover(&mut self) -> Result<(), Error> {
        let source = self.source.state();
        if !matches!(source, Ok(State::Running)) && self.set(Side::Source, State::Running).is_err()
        {
            self.source
                .reset()
                .map_err(|error| Error::Migration(format!("source: reset failed: {error}")))?;
            return Err(Error::Migration(
                "source: had to be reset to return to RUNNING, its state is lost".into(),
            ));
        }
        if !matches!(self.target.state(), Ok(State::Running)) {
            self.target
                .reset()
                .map_err(|error| Error::Migration(format!("target: reset failed: {error}")))?;
            let seconds = self.seconds();
            self.observer.state(StateChange {
                seconds,
                device: Side::Target,
                state: State::Running,
            });
        }
        Ok(())
    }
}

/// Returns whether the remaining data fits into the downtime limit.
fn near_enough(left: PrecopyInfo, expected: Option<Duration>, limit: Duration) -> bool {
    // The uAPI recommends to stay in pre-copy until all initial data is read.
    left.initial == 0 && (left.dirty == 0 || expected.is_some_and(|time| time <= limit))
}

fn info(stream: &dyn Stream) -> Result<PrecopyInfo, Error> {
    stream.info().map_err(|error| {
        Error::Migration(format!("source: VFIO_MIG_GET_PRECOPY_INFO failed: {error}"))
    })
}

/// Writes all data from the pipe to the stream of the target.
fn receive(mut pipe: File, mut sink: Box<dyn Stream>) -> Result<(), Error> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    loop {
        let bytes = pipe
            .read(&mut buffer)
            .map_err(|error| Error::Migration(format!("cannot read from the pipe: {error}")))?;
        if bytes == 0 {
            return Ok(());
        }
        let (written, result) = sink.write(&buffer[..bytes]);
        position += written;
        result.map_err(|error| {
            Error::Migration(format!(
                "target: write() of the stream failed after {position} bytes: {error}"
            ))
        })?;
    }
}

#[cfg(test)]
mod tests;
