// SPDX-License-Identifier: GPL-2.0

//! Tests of the verdict: each rule, with a client that breaks it and with clients that do not.

use vfio_host_tests::{
    fsm::State::{
        self,
        *, //
    },
    verdict::{
        Read,
        Rule,
        Verdict,
        FRUITLESS,
        SHARE, //
    },
};

const MS: u64 = 1_000_000;

/// A device whose time advances by a millisecond with each event.
struct Rig {
    verdict: Verdict,
    now: u64,
    generation: u32,
}

impl Rig {
    /// A device that was just opened.
    fn new() -> Self {
        let mut rig = Self {
            verdict: Verdict::default(),
            now: 1000 * MS,
            generation: 0,
        };
        rig.verdict.open(rig.now);
        rig
    }

    fn tick(&mut self) -> u64 {
        self.now += MS;
        self.now
    }

    /// Walks along states. A session begins where the uAPI says.
    fn go(&mut self, states: &[State]) {
        for &to in states {
            let now = self.tick();
            let from = self.verdict_state();
            let saves = to.is_saving() && !from.is_saving();
            if saves || to == Resuming {
                self.generation = self.verdict.begin(now);
            }
            self.verdict.enter(now, to);
        }
    }

    /// The state, by the time that passes in it.
    fn verdict_state(&self) -> State {
        let mut later = self.verdict.clone();
        later.account(self.now + 1);
        *State::ALL
            .iter()
            .find(|&&state| {
                later.statistics().times[state as usize]
                    != self.verdict.statistics().times[state as usize]
            })
            .expect("the device is open")
    }

    /// The same, and reads all of the stream.
    fn go_and_read(&mut self, states: &[State]) {
        for &state in states {
            self.go(&[state]);
            if state == StopCopy {
                self.read(Read::End);
                self.close_fd();
            }
        }
    }

    fn read(&mut self, read: Read) {
        let now = self.tick();
        self.verdict.read(now, self.generation, now, read);
    }

    fn info(&mut self, initial: u64, missed: bool) {
        let now = self.tick();
        self.verdict
            .precopy_info(now, self.generation, initial, missed);
    }

    fn reset(&mut self, by_client: bool) {
        let now = self.tick();
        self.verdict.reset(now, by_client);
    }

    fn close_fd(&mut self) {
        self.verdict.closed(self.generation);
    }

    fn close(&mut self) {
        let now = self.tick();
        self.verdict.close(now);
        self.verdict.enter(now, Running);
    }

    /// Checks that only this rule is broken, once, or none.
    fn expect(&self, rule: Option<Rule>) {
        for other in Rule::ALL {
            let count = self.verdict.broken(other).count;
            assert_eq!(count, u64::from(Some(other) == rule), "{other:?}");
        }
        let text = self.verdict.to_string();
        let is_violation = rule.is_some_and(|rule| !rule.is_advice());
        assert_eq!(text.starts_with("clean\n"), !is_violation, "{text}");
        let rest = text.strip_prefix("clean\n").unwrap_or(&text);
        let Some(rule) = rule else {
            assert_eq!(rest, "");
            return;
        };
        assert_eq!(rest.lines().count(), 1, "{text}");
        let advice = if rule.is_advice() { "advice: " } else { "" };
        assert!(rest.starts_with(&format!("{advice}{}: count 1, first in ", rule.name())));
        assert!(rest.ends_with(&format!("\"{}\"\n", rule.text())), "{text}");
    }
}

#[test]
fn names_and_order_of_rules_agree() {
    for (index, rule) in Rule::ALL.into_iter().enumerate() {
        assert_eq!(rule as usize, index);
        assert!(rule
            .name()
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b == b'_'));
        assert!(rule.text().ends_with('.'));
    }
}

#[test]
fn whole_migration_is_clean() {
    let mut rig = Rig::new();
    rig.go(&[PreCopy]);
    rig.info(100, false);
    rig.read(Read::Bytes(100));
    rig.read(Read::TemporaryEnd);
    rig.go(&[PreCopyP2p, StopCopy]);
    rig.read(Read::Bytes(7));
    rig.read(Read::End);
    rig.go(&[Stop]);
    rig.close_fd();
    rig.close();
    rig.expect(None);

    let statistics = rig.verdict.statistics();
    assert_eq!(statistics.sessions, 1);
    assert_eq!((statistics.reads, statistics.read_bytes), (3, 107));
    assert_eq!((statistics.largest_read, statistics.enomsg), (100, 1));
    assert_eq!(statistics.precopy_infos, 1);
    // Running, PreCopy with three events, PreCopyP2p, StopCopy with two, Stop.
    assert_eq!(statistics.times[Running as usize], MS);
    assert_eq!(statistics.times[PreCopy as usize], 4 * MS);
    assert_eq!(statistics.times[PreCopyP2p as usize], MS);
    assert_eq!(statistics.times[StopCopy as usize], 3 * MS);
    assert_eq!(statistics.times[Stop as usize], MS);
    let text = statistics.to_string();
    assert!(text.contains("\nread_bytes 107\n"), "{text}");
    assert!(text.contains("\nSTOP_COPY_us 3000\n"), "{text}");
}

#[test]
fn loading_is_clean() {
    let mut rig = Rig::new();
    rig.go(&[RunningP2p, Stop, Resuming]);
    rig.verdict.write(rig.generation, 10);
    rig.verdict.write(rig.generation, 5);
    rig.go(&[Stop, RunningP2p, Running]);
    rig.close_fd();
    rig.close();
    rig.expect(None);
    assert_eq!(rig.verdict.statistics().writes, 2);
    assert_eq!(rig.verdict.statistics().written_bytes, 15);
}

#[test]
fn unread_stream_is_reported() {
    // Closed in STOP_COPY, closed in STOP, or loaded afterwards.
    for states in [
        &[StopCopy][..],
        &[StopCopy, Stop],
        &[StopCopy, Stop, Resuming],
    ] {
        let mut rig = Rig::new();
        rig.go(&[RunningP2p, Stop]);
        for &state in states {
            rig.go(&[state]);
            rig.read(Read::Bytes(1));
            if state == StopCopy {
                rig.close_fd();
            }
        }
        rig.close_fd();
        rig.close();
        rig.expect(Some(Rule::StreamAbandoned));
    }
    // Cancelled, or reset in STOP.
    let mut rig = Rig::new();
    rig.go(&[RunningP2p, Stop, StopCopy]);
    rig.close_fd();
    rig.go(&[Stop, RunningP2p, Running]);
    rig.close();
    rig.expect(None);
    // The second session counts, wherever the device is closed.
    for last in [&[][..], &[Stop], &[Error]] {
        let mut rig = Rig::new();
        rig.go(&[RunningP2p, Stop, StopCopy]);
        rig.close_fd();
        rig.go(&[Stop, StopCopy]);
        rig.read(Read::End);
        rig.close_fd();
        rig.go(last);
        rig.close();
        rig.expect(None);
    }
}

#[test]
fn stream_is_read_in_each_session() {
    for reads in [false, true] {
        let mut rig = Rig::new();
        rig.go(&[RunningP2p, Stop, StopCopy]);
        rig.read(Read::End);
        rig.close_fd();
        rig.go(&[Stop, StopCopy]);
        if reads {
            rig.read(Read::End);
        }
        rig.close_fd();
        rig.close();
        rig.expect((!reads).then_some(Rule::StreamAbandoned));
    }
}

#[test]
fn loading_does_not_excuse_an_abandoned_stream() {
    let mut rig = Rig::new();
    rig.go(&[RunningP2p, Stop, StopCopy]);
    rig.close_fd();
    rig.go(&[Stop, Resuming]);
    rig.close_fd();
    rig.go(&[Stop, RunningP2p, Running]);
    rig.close();
    rig.expect(Some(Rule::StreamAbandoned));
}

#[test]
fn first_violation_is_reported() {
    let mut rig = Rig::new();
    for state in [Stop, Resuming] {
        rig.go(&[state]);
        rig.close_fd();
        let now = rig.tick();
        rig.verdict.dropped_write(now);
    }
    let broken = rig.verdict.broken(Rule::StoppedDeviceWritten);
    assert_eq!((broken.count, broken.state), (2, Some(Stop)));
    assert_eq!(broken.time, 2 * MS);
}

#[test]
fn failed_device_is_not_an_abandoned_stream() {
    let mut rig = Rig::new();
    rig.go(&[RunningP2p, Stop, StopCopy]);
    rig.close_fd();
    rig.go(&[Error]);
    rig.close();
    rig.expect(None);
}

#[test]
fn incomplete_image_is_reported() {
    let mut rig = Rig::new();
    rig.go(&[RunningP2p, Stop, Resuming]);
    let now = rig.tick();
    rig.verdict.incomplete(now);
    rig.expect(Some(Rule::ImageIncomplete));
    assert_eq!(
        rig.verdict.to_string(),
        "image_incomplete: count 1, first in RESUMING after 4 ms: \"To abort a RESUMING \
         session the device must be reset.\"\n"
    );
}

#[test]
fn ignored_initial_bytes_are_reported() {
    // Bytes that are left, after the events.
    let cases: [(&[Read], bool); 6] = [
        (&[], true),
        (&[Read::Bytes(99)], true),
        (&[Read::NotReady], true),
        (&[Read::Bytes(100)], false),
        (&[Read::Bytes(60), Read::Bytes(60)], false),
        (&[Read::Bytes(60), Read::TemporaryEnd], false),
    ];
    for path in [&[StopCopy][..], &[PreCopyP2p, StopCopy]] {
        for (reads, broken) in cases {
            let mut rig = Rig::new();
            rig.go(&[PreCopy]);
            rig.info(100, false);
            for &read in reads {
                rig.read(read);
            }
            rig.go(path);
            rig.expect(broken.then_some(Rule::InitialBytesIgnored));
        }
    }
    // Cancelled; then a session without a question.
    let mut rig = Rig::new();
    rig.go(&[PreCopy]);
    rig.info(100, false);
    rig.go(&[Running]);
    rig.close_fd();
    rig.go(&[PreCopy, StopCopy]);
    rig.expect(None);
}

/// Makes fruitless reads, each of which takes 10 ns, with this time and this event between two.
fn poll_busily(read: Read, pause: u64, event: impl Fn(&mut Rig)) -> Rig {
    let mut rig = Rig::new();
    rig.go(&[PreCopy]);
    for _ in 0..FRUITLESS {
        rig.expect(None);
        rig.now += pause;
        event(&mut rig);
        let start = rig.now;
        rig.now += 10;
        rig.verdict.read(rig.now, rig.generation, start, read);
    }
    rig
}

#[test]
fn busy_polling_is_reported() {
    for read in [Read::TemporaryEnd, Read::NotReady] {
        // At the limit there is one pause less than reads.
        let limit = 10 * (SHARE - 1) * u64::from(FRUITLESS) / u64::from(FRUITLESS - 1);
        for (pause, broken) in [(0, true), (limit, true), (limit + 1, false), (MS, false)] {
            let rig = poll_busily(read, pause, |_| ());
            rig.expect(broken.then_some(Rule::BusyPolling));
        }
        for event in [
            |rig: &mut Rig| rig.verdict.poll(rig.generation),
            |rig: &mut Rig| rig.verdict.wait(rig.generation),
            |rig: &mut Rig| rig.verdict.precopy_info(rig.now, rig.generation, 0, false),
            |rig: &mut Rig| {
                rig.verdict
                    .read(rig.now, rig.generation, rig.now, Read::Bytes(1))
            },
        ] {
            poll_busily(read, 0, event).expect(None);
        }
        // The next one in a row is judged anew.
        let mut rig = poll_busily(read, 0, |_| ());
        rig.verdict.read(rig.now, rig.generation, rig.now, read);
        rig.expect(Some(Rule::BusyPolling));
    }
}

#[test]
fn busy_polling_is_judged_anew_after_a_pause() {
    let mut rig = poll_busily(Read::TemporaryEnd, MS, |_| ());
    for _ in 0..FRUITLESS {
        rig.expect(None);
        let start = rig.now;
        rig.now += 10;
        rig.verdict
            .read(rig.now, rig.generation, start, Read::TemporaryEnd);
    }
    rig.expect(Some(Rule::BusyPolling));
}

#[test]
fn calls_of_an_old_session_are_ignored() {
    let mut rig = Rig::new();
    rig.go(&[PreCopy, Running]);
    let old = rig.generation;
    rig.close_fd();
    rig.go(&[PreCopy]);
    rig.info(100, false);
    let before = (rig.verdict.statistics().to_string(), rig.now);
    rig.verdict.read(rig.now, old, rig.now, Read::Bytes(100));
    rig.verdict.read(rig.now, old, rig.now, Read::TemporaryEnd);
    rig.verdict.precopy_info(rig.now, old, 0, true);
    rig.verdict.write(old, 1);
    rig.verdict.poll(old);
    assert_eq!((rig.verdict.statistics().to_string(), rig.now), before);
    rig.expect(None);
    rig.go(&[StopCopy]);
    rig.expect(Some(Rule::InitialBytesIgnored));
    rig.verdict.read(rig.now, old, rig.now, Read::End);
    rig.close_fd();
    rig.close();
    assert_eq!(rig.verdict.broken(Rule::StreamAbandoned).count, 1);
}

#[test]
fn reinit_without_opt_in_is_reported() {
    let mut rig = Rig::new();
    rig.go(&[PreCopy]);
    rig.info(0, false);
    rig.expect(None);
    rig.info(0, true);
    rig.expect(Some(Rule::ReinitNotSeen));
}

#[test]
fn reset_before_the_end_of_stream_is_reported() {
    for state in State::ALL {
        for (by_client, ended, failed) in [
            (true, false, false),
            (false, false, false),
            (true, true, false),
            (true, false, true),
        ] {
            let mut rig = Rig::new();
            match state {
                Error => continue,
                Running => (),
                Resuming | StopCopy => rig.go(&[Stop, state]),
                _ => rig.go(&[state]),
            }
            rig.verdict.arc(false);
            rig.verdict.arc(!failed);
            if ended && state == StopCopy {
                rig.read(Read::End);
            }
            rig.close_fd();
            rig.reset(by_client);
            rig.go(&[Running]);
            rig.close();
            let broken = state == StopCopy && by_client && !ended && !failed;
            rig.expect(broken.then_some(Rule::ResetInSession));
            assert_eq!(rig.verdict.statistics().resets, 1);
        }
    }
}

#[test]
fn leaked_data_fd_is_reported() {
    // At close, and once even if it is closed later.
    let mut rig = Rig::new();
    rig.go(&[PreCopy, Running]);
    rig.expect(None);
    rig.close();
    rig.close_fd();
    rig.expect(Some(Rule::DataFdLeaked));
    // At the next session.
    let mut rig = Rig::new();
    rig.go(&[PreCopy, Running]);
    let old = rig.generation;
    rig.go(&[PreCopy]);
    rig.expect(Some(Rule::DataFdLeaked));
    // The old one is not mistaken for the new one.
    rig.verdict.closed(old);
    rig.go(&[Running]);
    rig.close();
    assert_eq!(rig.verdict.broken(Rule::DataFdLeaked).count, 2);
}

#[test]
fn write_to_a_stopped_device_is_reported() {
    for state in State::ALL {
        let mut rig = Rig::new();
        rig.verdict.enter(rig.now, state);
        let now = rig.tick();
        rig.verdict.dropped_write(now);
        let stopped = matches!(state, Stop | StopCopy | Resuming);
        rig.expect(stopped.then_some(Rule::StoppedDeviceWritten));
        let dropped = rig.verdict.statistics().dropped_writes;
        assert_eq!(dropped, u64::from(stopped));
    }
}

#[test]
fn stores_to_a_stopped_device_are_reported_once() {
    let mut rig = Rig::new();
    rig.verdict.enter(rig.now, Stop);
    for (pages, all) in [(0, 0), (3, 3), (3, 3), (5, 5), (0, 5), (2, 7)] {
        let now = rig.tick();
        rig.verdict.dropped_stores(now, pages);
        assert_eq!(rig.verdict.statistics().dropped_stores, all);
    }
    assert_eq!(rig.verdict.broken(Rule::StoppedDeviceWritten).count, 3);
}

#[test]
fn write_to_a_quiesced_device_is_reported() {
    for state in State::ALL {
        let mut rig = Rig::new();
        rig.verdict.enter(rig.now, state);
        let now = rig.tick();
        rig.verdict.quiesced_write(now);
        let quiesced = matches!(state, RunningP2p | PreCopyP2p);
        rig.expect(quiesced.then_some(Rule::QuiescedDeviceWritten));
    }
}

#[test]
fn missing_log_is_reported() {
    // The states before and after the device writes to memory.
    for (before, after, rule) in [
        (&[PreCopy][..], &[StopCopy][..], Some(Rule::LogNotStarted)),
        (
            &[PreCopy],
            &[PreCopyP2p, StopCopy],
            Some(Rule::LogNotStarted),
        ),
        // The guest's memory is copied later, or the migration is cancelled.
        (&[], &[Stop, StopCopy], None),
        (&[], &[PreCopy, StopCopy], None),
        (&[PreCopy], &[Running], None),
        (&[PreCopy], &[Running, Stop, StopCopy], None),
        (&[PreCopy], &[Running, PreCopy, StopCopy], None),
    ] {
        let mut rig = Rig::new();
        rig.go(before);
        rig.verdict.unlogged_write();
        rig.verdict.unlogged_write();
        for &state in after {
            rig.go(&[state]);
            if state == Running {
                rig.close_fd();
            }
        }
        rig.read(Read::End);
        rig.close_fd();
        rig.go(&[Stop]);
        rig.close();
        rig.expect(rule);
    }
}

#[test]
fn running_log_is_reported_at_close() {
    let mut rig = Rig::new();
    rig.verdict.log_start();
    rig.verdict.log_report();
    rig.verdict.log_end(true, false);
    rig.close();
    rig.expect(None);
    assert_eq!(rig.verdict.statistics().log_reports, 1);

    let mut rig = Rig::new();
    rig.verdict.log_start();
    rig.verdict.log_end(false, false);
    rig.close();
    rig.expect(Some(Rule::LogNotStopped));
}

#[test]
fn unreported_pages_are_reported() {
    use Rule::LogNotReported as Broken;
    // The states with the log on, whether it has pages, the states afterwards.
    for (states, pages, after, rule) in [
        (&[PreCopy, StopCopy][..], true, &[][..], Some(Broken)),
        (&[Stop, StopCopy], true, &[Stop], Some(Broken)),
        (&[Stop, StopCopy, Stop], true, &[], Some(Broken)),
        (&[PreCopy, StopCopy], false, &[], None),
        // No migration.
        (&[], true, &[], None),
        (&[Stop], true, &[], None),
        (&[PreCopy], true, &[StopCopy], None),
        // A migration that is cancelled.
        (&[Stop, StopCopy], true, &[Stop, Running], None),
        (&[Stop, StopCopy, Stop, Running, Stop], true, &[], None),
    ] {
        let mut rig = Rig::new();
        rig.verdict.log_start();
        rig.go_and_read(states);
        rig.verdict.log_end(true, pages);
        rig.go_and_read(after);
        rig.close_fd();
        // Another log changes nothing.
        rig.verdict.log_start();
        rig.verdict.log_end(true, false);
        rig.close();
        rig.expect(rule);
    }
    // The log of an earlier migration does not count.
    let mut rig = Rig::new();
    rig.verdict.log_start();
    rig.go_and_read(&[Stop, StopCopy, Stop]);
    rig.verdict.log_end(true, false);
    rig.verdict.log_start();
    rig.verdict.log_end(true, true);
    rig.close();
    rig.expect(None);
}

#[test]
fn verdict_begins_anew_with_the_next_client() {
    let mut rig = Rig::new();
    rig.go(&[PreCopy, StopCopy]);
    rig.close();
    assert_ne!(rig.verdict.to_string(), "clean\n");
    let closed = rig.verdict.statistics().to_string();
    rig.now += 1000 * MS;
    rig.verdict.account(rig.now);
    assert_eq!(rig.verdict.statistics().to_string(), closed);

    let old = rig.generation;
    rig.verdict.open(rig.now);
    rig.expect(None);
    assert_eq!(rig.verdict.statistics().sessions, 0);
    rig.verdict.closed(old);
    rig.close();
    rig.expect(None);
}

#[test]
fn data_fd_of_the_former_client_is_not_that_of_the_next() {
    let mut rig = Rig::new();
    rig.go(&[PreCopy, Running]);
    let old = rig.generation;
    rig.close();
    rig.verdict.open(rig.now);
    rig.go(&[PreCopy, Running]);
    rig.verdict.closed(old);
    rig.close();
    rig.expect(Some(Rule::DataFdLeaked));
}
