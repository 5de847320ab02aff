// SPDX-License-Identifier: GPL-2.0

//! Migrations between two fake devices.

use std::sync::{Arc, Mutex};

use super::*;
use crate::uapi::MIGRATION_STOP_COPY;

/// Results of the reads of a fake device's stream.
#[derive(Clone)]
enum Say {
    Bytes(usize),
    /// Temporary end.
    Enomsg,
    /// No data is ready yet.
    Eagain,
    Fail(Errno),
}

#[derive(Default)]
struct Inner {
    state: Option<State>,
    /// Requested states.
    asked: Vec<State>,
    /// State that it refuses with an errno.
    refuses: Option<(State, Errno)>,
    says: Vec<Say>,
    /// Pre-copy infos, each valid once this many bytes have been read.
    infos: Vec<(usize, PrecopyInfo)>,
    read: usize,
    /// Bytes after which write() fails.
    takes: Option<usize>,
    received: Vec<u8>,
    resets: u32,
    reset_fails: bool,
    next: u8,
}

struct Fake {
    flags: u64,
    inner: Arc<Mutex<Inner>>,
}

struct FakeStream(Arc<Mutex<Inner>>);

const ALL: u64 = MIGRATION_STOP_COPY | MIGRATION_P2P | MIGRATION_PRE_COPY;

impl Fake {
    fn new(flags: u64, says: &[Say], infos: &[(usize, PrecopyInfo)]) -> Self {
        Self {
            flags,
            inner: Arc::new(Mutex::new(Inner {
                state: Some(State::Running),
                says: says.iter().rev().cloned().collect(),
                infos: infos.to_vec(),
                ..Default::default()
            })),
        }
    }

    fn get(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics with it")
    }
}

impl Device for Fake {
    fn flags(&self) -> u64 {
        self.flags
    }

    fn state(&self) -> io::Result<State> {
        Ok(self.get().state.expect("it is in a state"))
    }

    fn set_state(&self, state: State) -> io::Result<Option<Box<dyn Stream>>> {
        let mut inner = self.get();
        inner.asked.push(state);
        if let Some((_, errno)) = inner.refuses.filter(|(refused, _)| *refused == state) {
            return Err(errno.into());
        }
        let before = inner.state.replace(state);
        let fresh = match state {
            State::PreCopy | State::Resuming => true,
            State::StopCopy => !matches!(before, Some(State::PreCopy | State::PreCopyP2p)),
            _ => false,
        };
        Ok(fresh.then(|| Box::new(FakeStream(self.inner.clone())) as Box<dyn Stream>))
    }

    fn data_size(&self) -> Option<u64> {
        None
    }

    fn reset(&self) -> io::Result<()> {
        let mut inner = self.get();
        inner.resets += 1;
        if inner.reset_fails {
            return Err(Errno::IO.into());
        }
        inner.state = Some(State::Running);
        Ok(())
    }
}

impl Stream for FakeStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().expect("no test panics with it");
        match inner.says.pop() {
            None => Ok(0),
            Some(Say::Bytes(bytes)) => {
                for byte in &mut buffer[..bytes] {
                    inner.next = inner.next.wrapping_mul(5).wrapping_add(1);
                    *byte = inner.next;
                }
                inner.read += bytes;
                Ok(bytes)
            }
            Some(Say::Enomsg) => Err(Errno::NOMSG.into()),
            Some(Say::Eagain) => Err(Errno::AGAIN.into()),
            Some(Say::Fail(errno)) => Err(errno.into()),
        }
    }

    fn write(&mut self, data: &[u8]) -> (usize, io::Result<()>) {
        let mut inner = self.0.lock().expect("no test panics with it");
        let room = inner.takes.map_or(usize::MAX, |n| n - inner.received.len());
        let bytes = data.len().min(room);
        inner.received.extend_from_slice(&data[..bytes]);
        match bytes < data.len() {
            true => (bytes, Err(Errno::INVAL.into())),
            false => (bytes, Ok(())),
        }
    }

    fn info(&self) -> io::Result<PrecopyInfo> {
        let inner = self.0.lock().expect("no test panics with it");
        let due = inner.infos.iter().rfind(|(read, _)| *read <= inner.read);
        due.map(|(_, info)| *info).ok_or(Errno::INVAL.into())
    }

    fn wait(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Notes {
    states: Vec<(Side, State)>,
    rounds: Vec<Round>,
    interrupt: bool,
    differ: bool,
    quiesced: bool,
    compared: bool,
}

impl Observer for Notes {
    fn state(&mut self, change: StateChange) {
        self.states.push((change.device, change.state));
    }

    fn sample(&mut self, _: Sample) {}

    fn round(&mut self, round: Round) {
        self.rounds.push(round);
    }

    fn interrupted(&self) -> bool {
        self.interrupt
    }

    fn quiesce(&mut self) -> Result<(), Error> {
        self.quiesced = true;
        Ok(())
    }

    fn compare(&mut self) -> Result<(), Error> {
        self.compared = true;
        match self.differ {
            true => Err(Error::Differ("bar2".into())),
            false => Ok(()),
        }
    }
}

fn plan() -> Plan {
    Plan {
        bandwidth: None,
        // Only rounds and empty streams end pre-copy, so that no test depends on the clock.
        downtime_limit: Duration::ZERO,
        max_rounds: 10,
        precopy_time: Duration::ZERO,
        cancel_at_round: None,
    }
}

fn left(initial: u64, dirty: u64) -> PrecopyInfo {
    PrecopyInfo {
        initial,
        dirty,
        reinit: false,
    }
}

fn message(result: Result<End, Error>) -> String {
    match result {
        Err(Error::Migration(what)) => what,
        other => panic!("{other:?}"),
    }
}

use Say::{Bytes, Eagain, Enomsg};
use Side::{Source, Target};

#[test]
fn migration_uses_all_states() {
    let source = Fake::new(
        ALL,
        &[Bytes(10), Eagain, Bytes(20), Bytes(5), Enomsg, Bytes(7)],
        &[(0, left(30, 0)), (30, left(0, 6)), (35, left(0, 0))],
    );
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes::default();
    let (result, measured) = migrate(&source, &target, &plan(), &mut notes);
    assert!(matches!(result, Ok(End::Completed { .. })), "{result:?}");
    assert_eq!(measured.bytes, 42);
    assert_eq!(
        notes.states,
        [
            (Source, State::PreCopy),
            (Target, State::Resuming),
            (Source, State::PreCopyP2p),
            (Source, State::StopCopy),
            (Target, State::Stop),
            (Target, State::RunningP2p),
            (Target, State::Running),
            (Source, State::Stop),
        ]
    );
    let rounds: Vec<_> = notes
        .rounds
        .iter()
        .map(|r| (r.round, r.bytes, r.left_bytes))
        .collect();
    assert_eq!(rounds, [(1, 30, 6), (2, 5, 0)]);
    assert!(notes.quiesced && notes.compared);
    // The target has received what the source has sent.
    let mut next = 0u8;
    let expected: Vec<u8> = std::iter::repeat_with(|| {
        next = next.wrapping_mul(5).wrapping_add(1);
        next
    })
    .take(42)
    .collect();
    assert_eq!(target.get().received, expected);
    assert_eq!(target.get().resets, 0);
}

#[test]
fn optional_states_are_left_out() {
    for (flags, asked) in [
        (MIGRATION_STOP_COPY, vec![State::StopCopy, State::Stop]),
        (
            MIGRATION_STOP_COPY | MIGRATION_P2P,
            vec![State::RunningP2p, State::StopCopy, State::Stop],
        ),
        (
            MIGRATION_STOP_COPY | MIGRATION_PRE_COPY,
            vec![State::PreCopy, State::StopCopy, State::Stop],
        ),
    ] {
        let source = Fake::new(flags, &[Bytes(9)], &[(0, left(0, 0))]);
        let target = Fake::new(flags, &[], &[]);
        let (result, measured) = migrate(&source, &target, &plan(), &mut Notes::default());
        assert!(matches!(result, Ok(End::Completed { .. })), "{result:?}");
        assert_eq!(measured.bytes, 9);
        assert_eq!(source.get().asked, asked);
    }
}

#[test]
fn idle_device_switches_over_after_one_round() {
    let source = Fake::new(
        ALL,
        &[Bytes(4), Bytes(1)],
        &[(0, left(4, 0)), (4, left(0, 0))],
    );
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes::default();
    let (result, _) = migrate(&source, &target, &plan(), &mut notes);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(notes.rounds.len(), 1);
}

#[test]
fn busy_device_is_stopped_after_the_last_round() {
    let source = Fake::new(ALL, &vec![Bytes(8); 10], &[(0, left(0, 8))]);
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes::default();
    let (result, _) = migrate(&source, &target, &plan(), &mut notes);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(notes.rounds.len(), 10);
    assert_eq!(notes.rounds[9].left_bytes, 8);
}

#[test]
fn cancelled_migration_leaves_the_source_running() {
    let source = Fake::new(ALL, &vec![Bytes(8); 10], &[(0, left(0, 8))]);
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes::default();
    let plan = Plan {
        cancel_at_round: Some(3),
        ..plan()
    };
    let (result, measured) = migrate(&source, &target, &plan, &mut notes);
    assert_eq!(result.expect("it is no failure"), End::Cancelled);
    assert_eq!((notes.rounds.len(), measured.bytes), (3, 24));
    assert_eq!(source.get().state, Some(State::Running));
    assert_eq!(source.get().resets, 0);
    assert_eq!(target.get().state, Some(State::Running));
    assert_eq!(target.get().resets, 1);
    assert!(!notes.compared && !notes.quiesced);
}

#[test]
fn signal_leaves_the_source_running() {
    let source = Fake::new(ALL, &[Bytes(8)], &[(0, left(8, 0))]);
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes {
        interrupt: true,
        ..Default::default()
    };
    let (result, _) = migrate(&source, &target, &plan(), &mut notes);
    assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
    assert_eq!(source.get().state, Some(State::Running));
    assert_eq!(source.get().resets, 0);
}

#[test]
fn error_names_the_target_that_refuses_the_stream() {
    let source = Fake::new(ALL, &vec![Bytes(1 << 19); 8], &[(0, left(1 << 22, 0))]);
    let target = Fake::new(ALL, &[], &[]);
    target.get().takes = Some(100);
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(what.starts_with("target: write()"), "{what}");
    assert!(what.contains("after 100 bytes: Invalid argument"), "{what}");
    assert_eq!(source.get().state, Some(State::Running));
    assert_eq!(target.get().resets, 1);
}

#[test]
fn error_names_the_refused_state() {
    let source = Fake::new(ALL, &[], &[(0, left(0, 0))]);
    source.get().refuses = Some((State::StopCopy, Errno::BUSY));
    let target = Fake::new(ALL, &[], &[]);
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(
        what.starts_with("source: cannot change to STOP_COPY: ")
            && what.ends_with("its state is PRE_COPY_P2P"),
        "{what}"
    );
    assert_eq!(source.get().state, Some(State::Running));
}

#[test]
fn error_names_the_source_that_fails_to_read() {
    let source = Fake::new(ALL, &[Bytes(3), Say::Fail(Errno::IO)], &[(0, left(8, 0))]);
    let target = Fake::new(ALL, &[], &[]);
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(what.starts_with("source: read()"), "{what}");
    assert!(what.contains("after 3 bytes"), "{what}");
}

#[test]
fn enomsg_in_stop_copy_is_an_error() {
    let source = Fake::new(MIGRATION_STOP_COPY, &[Bytes(3), Enomsg], &[]);
    let target = Fake::new(MIGRATION_STOP_COPY, &[], &[]);
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(what.contains("ENOMSG in STOP_COPY"), "{what}");
}

#[test]
fn failed_recovery_is_reported_as_well() {
    let source = Fake::new(MIGRATION_STOP_COPY, &[Say::Fail(Errno::IO)], &[]);
    let target = Fake::new(MIGRATION_STOP_COPY, &[], &[]);
    target.get().reset_fails = true;
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(what.contains("read()"), "{what}");
    assert!(what.contains("; then target: reset failed"), "{what}");
}

#[test]
fn source_that_refuses_running_is_reset() {
    let source = Fake::new(MIGRATION_STOP_COPY, &[Say::Fail(Errno::IO)], &[]);
    source.get().refuses = Some((State::Running, Errno::IO));
    let target = Fake::new(MIGRATION_STOP_COPY, &[], &[]);
    let (result, _) = migrate(&source, &target, &plan(), &mut Notes::default());
    let what = message(result);
    assert!(what.contains("its state is lost"), "{what}");
    assert_eq!(source.get().resets, 1);
}

#[test]
fn different_devices_stay_stopped() {
    let source = Fake::new(ALL, &[Bytes(1)], &[(0, left(0, 0))]);
    let target = Fake::new(ALL, &[], &[]);
    let mut notes = Notes {
        differ: true,
        ..Default::default()
    };
    let (result, _) = migrate(&source, &target, &plan(), &mut notes);
    assert!(matches!(result, Err(Error::Differ(_))), "{result:?}");
    assert_eq!(source.get().state, Some(State::StopCopy));
    assert_eq!(target.get().state, Some(State::Stop));
}

#[test]
fn source_is_stopped_within_the_downtime_limit() {
    let limit = Duration::from_millis(300);
    let at = |ms| Some(Duration::from_millis(ms));
    assert!(near_enough(left(0, 0), None, Duration::ZERO));
    assert!(near_enough(left(0, 1), at(300), limit));
    assert!(!near_enough(left(0, 1), at(301), limit));
    assert!(!near_enough(left(0, 1), None, limit));
    assert!(!near_enough(left(1, 0), at(1), limit));
}
