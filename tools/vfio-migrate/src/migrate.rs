// SPDX-License-Identifier: GPL-2.0

//! The way of a migration: states, rounds, the pipe, and the way back when something fails.
//!
//! It knows devices and streams as traits only, so that its tests need no device.

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

/// How long to wait for a device before asking whether the user wants to stop.
const PATIENCE: Duration = Duration::from_millis(100);
/// How often to look at the device while bytes flow.
const SAMPLING: Duration = Duration::from_millis(50);

/// A device that can migrate.
pub(crate) trait Device: Sync {
    /// `VFIO_MIGRATION_*`.
    fn flags(&self) -> u64;
    /// The state it is in.
    fn state(&self) -> io::Result<State>;
    /// Takes it to a state; there may be a new data_fd.
    fn set_state(&self, state: State) -> io::Result<Option<Box<dyn Stream>>>;
    /// How many bytes `STOP_COPY` would stream, if it knows.
    fn data_size(&self) -> Option<u64>;
    /// Takes it to `RUNNING`, with nothing in its memory.
    fn reset(&self) -> io::Result<()>;
}

/// A data_fd.
pub(crate) trait Stream: Send {
    /// read(), which fails with `EAGAIN` when nothing is ready.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// write(), until all is written; tells how much was in any case.
    fn write(&mut self, data: &[u8]) -> (usize, io::Result<()>);
    /// What is left in pre-copy.
    fn info(&self) -> io::Result<PrecopyInfo>;
    /// Waits until read() has something to say, or for so long.
    fn wait(&self, timeout: Duration) -> io::Result<()>;
}

/// How to migrate.
pub(crate) struct Plan {
    /// Bytes per second through the pipe.
    pub(crate) bandwidth: Option<u64>,
    /// Stop the source when the rest takes no longer.
    pub(crate) downtime_limit: Duration,
    /// Stop the source after so many rounds in any case.
    pub(crate) max_rounds: u32,
    /// Stay in pre-copy for so long at least.
    pub(crate) precopy_time: Duration,
    /// Cancel at the end of this round.
    pub(crate) cancel_at_round: Option<u32>,
}

/// Who takes part in a migration besides the devices.
pub(crate) trait Observer {
    /// A device came into a state.
    fn state(&mut self, change: StateChange);
    /// Bytes flow.
    fn sample(&mut self, sample: Sample);
    /// A round ended.
    fn round(&mut self, round: Round);
    /// Whether to stop.
    fn interrupted(&self) -> bool;
    /// The source stops next: nothing may write to it any more.
    fn quiesce(&mut self) -> Result<(), Error>;
    /// Both devices are stopped and hold the same, or should.
    fn compare(&mut self) -> Result<(), Error>;
}

/// How a migration ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// The target runs.
    Completed {
        /// How long neither device ran.
        downtime: Duration,
    },
    /// The source runs on, as the plan said.
    Cancelled,
}

/// What was measured, also of a migration that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Measured {
    /// Bytes through the pipe.
    pub(crate) bytes: u64,
    /// How long it took, without the comparison.
    pub(crate) time: Duration,
}

/// Migrates `source` to `target`. After a failure the source runs on and the target is reset.
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
    // What is stopped and what differs can still be looked at.
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

/// How pre-copy ended.
enum Precopy {
    Enough,
    Cancelled,
}

/// What came of one look at the stream.
enum Piece {
    Bytes(usize),
    /// The temporary end of the stream.
    Nothing,
    /// The permanent end.
    End,
    /// The device needs time.
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
    /// Time of the comparison, which is not a part of a migration.
    apart: Duration,
    sent: u64,
    /// Time in which bytes were on their way.
    busy: Duration,
    last: Last,
    pace: Pace,
}

impl Walk<'_> {
    fn seconds(&self) -> f64 {
        (self.start.elapsed() - self.apart).as_secs_f64()
    }

    /// Takes a device to a state, and says so.
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
                    Ok(state) => format!(", it is in {} now", state.name()),
                    Err(_) => String::new(),
                };
                Err(Error::Migration(format!(
                    "{}: it does not go to {}: {error}{now}",
                    side.name(),
                    state.name()
                )))
            }
        }
    }

    /// As [`Self::set`], for the ways on which a data_fd is due.
    fn set_for_stream(&mut self, side: Side, state: State) -> Result<Box<dyn Stream>, Error> {
        self.set(side, state)?.ok_or_else(|| {
            Error::Migration(format!(
                "{}: it went to {} without a data_fd",
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
            .map_err(|error| Error::Migration(format!("there is no pipe: {error}")))?;
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

    /// Reads the source's stream into the pipe. Tells when the source stopped; none when cancelled.
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
                    "source: it went to STOP_COPY without a data_fd".into(),
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
                        "source: read() fails with ENOMSG in STOP_COPY".into(),
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
                    // The uAPI wants ENOMSG, some drivers say 0.
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

    /// Moves what one read() gives into the pipe.
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
                        "source: read() of its stream fails after {} bytes: {error}",
                        self.sent
                    )))
                }
            },
        };
        pipe.write_all(&buffer[..bytes]).map_err(|error| {
            if error.kind() == io::ErrorKind::BrokenPipe {
                Error::Unread
            } else {
                Error::Migration(format!("the pipe fails: {error}"))
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
            .map_err(|error| Error::Migration(format!("source: poll() fails: {error}")))
    }

    /// How long `STOP_COPY` would take, as fast as bytes flowed so far.
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

    /// Makes the source run on, and the target forget what it was loaded with.
    fn recover(&mut self) -> Result<(), Error> {
        let source = self.source.state();
        if !matches!(source, Ok(State::Running)) && self.set(Side::Source, State::Running).is_err()
        {
            self.source.reset().map_err(|error| {
                Error::Migration(format!("source: it cannot be reset: {error}"))
            })?;
            return Err(Error::Migration(
                "source: only a reset brought it back to RUNNING, its state is lost".into(),
            ));
        }
        if !matches!(self.target.state(), Ok(State::Running)) {
            self.target.reset().map_err(|error| {
                Error::Migration(format!("target: it cannot be reset: {error}"))
            })?;
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

/// Whether the rest fits into the downtime limit.
fn near_enough(left: PrecopyInfo, expected: Option<Duration>, limit: Duration) -> bool {
    // The uAPI recommends to stay until all initial data has come.
    left.initial == 0 && (left.dirty == 0 || expected.is_some_and(|time| time <= limit))
}

fn info(stream: &dyn Stream) -> Result<PrecopyInfo, Error> {
    stream.info().map_err(|error| {
        Error::Migration(format!("source: VFIO_MIG_GET_PRECOPY_INFO fails: {error}"))
    })
}

/// Writes what comes through the pipe to the target's stream.
fn receive(mut pipe: File, mut sink: Box<dyn Stream>) -> Result<(), Error> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    loop {
        let bytes = pipe
            .read(&mut buffer)
            .map_err(|error| Error::Migration(format!("the pipe fails: {error}")))?;
        if bytes == 0 {
            return Ok(());
        }
        let (written, result) = sink.write(&buffer[..bytes]);
        position += written;
        result.map_err(|error| {
            Error::Migration(format!(
                "target: write() of the stream fails after {position} bytes: {error}"
            ))
        })?;
    }
}

#[cfg(test)]
mod tests;
