// SPDX-License-Identifier: GPL-2.0

//! KUnit tests of the migration engine with a device that is not a mediated device.
//!
//! The expected calls of each arc are listed here again, so that the engine is compared with a
//! table and not with itself. The calls of a data_fd are only tested as far as they depend on the
//! engine; the kselftests test the rest.

use crate::{
    fake::{
        logged,
        wait_until,
        Call,
        DataFd,
        Job,
        Rig,
        UserMemory,
        DATA_SIZE,
        FAILURE, //
    },
    paths, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};
use vfio::{
    memory::StateMemory,
    migration::{
        Chunk,
        Flags,
        Phase,
        State, //
    },
};

/// Ends a failing test with a message. Unlike with `assert!`, destructors run.
macro_rules! ensure_eq {
    ($is:expr, $wanted:expr, $($what:tt)+) => {{
        let (is, wanted) = (&$is, &$wanted);
        if is != wanted {
            pr_err!("{}: {:?} instead of {:?}\n", fmt!($($what)+), is, wanted);
            return Err(EINVAL);
        }
    }};
}

/// Events of poll().
const POLLIN: u32 = 0x1 | 0x40;
const POLLOUT: u32 = 0x4 | 0x100;
const POLLERR: u32 = 0x8;
const POLLRDHUP: u32 = 0x2000;

/// `VFIO_MIG_GET_PRECOPY_INFO`.
const MIG_GET_PRECOPY_INFO: u32 = kernel::ioctl::_IO(b';' as u32, 100 + 21);

/// Returns the calls of the engine on an arc without failures.
fn calls_of(from: State, to: State) -> &'static [Call] {
    use State::*;

    match (from, to) {
        (Running, RunningP2p) | (PreCopy, PreCopyP2p) => &[Call::QuiesceP2p],
        (RunningP2p, Running) | (PreCopyP2p, PreCopy) => &[Call::ResumeP2p],
        (RunningP2p, Stop) => &[Call::Stop],
        (Stop, RunningP2p) => &[Call::Start],
        (Running, Stop) => &[Call::QuiesceP2p, Call::Stop],
        (Stop, Running) => &[Call::Start, Call::ResumeP2p],
        (Running, PreCopy) | (RunningP2p, PreCopyP2p) => &[Call::PreCopy],
        (PreCopyP2p, StopCopy) => &[Call::Stop, Call::Seal],
        (PreCopy, StopCopy) => &[Call::QuiesceP2p, Call::Stop, Call::Seal],
        (Stop, StopCopy) => &[Call::Save, Call::Seal],
        (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => &[Call::SaverDropped],
        (Stop, Resuming) => &[Call::Load],
        (Resuming, Stop) => &[Call::Loaded, Call::LoaderDropped],
        _ => &[],
    }
}

/// Returns the calls of the engine that undo an arc after `failed` has failed.
fn undo_of(from: State, to: State, failed: Call) -> &'static [Call] {
    use State::*;

    match (from, to, failed) {
        (Running, Stop, Call::Stop) => &[Call::ResumeP2p],
        (Stop, Running, Call::ResumeP2p) => &[Call::Stop],
        (PreCopyP2p, StopCopy, Call::Seal) => &[Call::Start],
        (PreCopy, StopCopy, Call::Stop) => &[Call::ResumeP2p],
        (PreCopy, StopCopy, Call::Seal) => &[Call::Start, Call::ResumeP2p],
        (Stop, StopCopy, Call::Seal) => &[Call::SaverDropped],
        _ => &[],
    }
}

/// Returns whether a call can fail.
fn can_fail(call: Call) -> bool {
    !matches!(
        call,
        Call::SaverDropped | Call::LoaderDropped | Call::DataSize | Call::Halt | Call::Reset
    )
}

/// Returns the call that ends the session of a state, if it has one.
fn session_of(state: State) -> Option<Call> {
    match state {
        State::PreCopy | State::PreCopyP2p | State::StopCopy => Some(Call::SaverDropped),
        State::Resuming => Some(Call::LoaderDropped),
        _ => None,
    }
}

/// Returns the arcs of the path from one state to another, none if there is no path.
fn path(flags: Flags, from: State, to: State) -> Result<Option<KVec<(State, State)>>> {
    let mut arcs = KVec::new();
    let mut state = from;

    loop {
        match paths::next(flags, state, to) {
            None => return Ok(None),
            Some(next) if next == state => return Ok(Some(arcs)),
            Some(next) => {
                arcs.push((state, next), GFP_KERNEL)?;
                state = next;
            }
        }
    }
}

/// Returns the states that a device of this shape can be in.
fn states(flags: Flags) -> impl Iterator<Item = State> {
    // `ERROR` needs an arc with a step to undo.
    let breaks = !flags.p2p() || flags.pre_copy();

    State::ALL
        .into_iter()
        .filter(move |&state| flags.has(state) || (breaks && state == State::Error))
}

#[kunit_tests(vfio_migration_engine)]
mod tests {
    use super::*;

    #[test]
    fn each_arc_calls_its_methods() -> Result {
        let mut arcs = 0;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for (from, to) in paths::arcs(flags) {
                let session = rig.enter(from)?;
                let fd = rig.set(to)?;

                ensure_eq!(
                    rig.fake.calls()[..],
                    *calls_of(from, to),
                    "{from:?} -> {to:?}"
                );
                ensure_eq!(rig.engine.state(), to, "{from:?} -> {to:?}");
                ensure_eq!(
                    fd.is_some(),
                    paths::opens_session(from, to),
                    "a data_fd on {from:?} -> {to:?}"
                );
                drop(session);
                arcs += 1;
            }
        }
        ensure_eq!(arcs, 6 + 8 + 9 + 15, "arcs of all shapes");
        Ok(())
    }

    #[test]
    fn each_path_consists_of_arcs() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                for to in State::ALL {
                    let session = rig.enter(from)?;
                    let mut expected = KVec::new();
                    let path = path(flags, from, to)?;

                    for &(from, to) in path.iter().flatten() {
                        expected.extend_from_slice(calls_of(from, to), GFP_KERNEL)?;
                    }
                    let last = path.as_ref().and_then(|arcs| arcs.last().copied());
                    let opens = last.is_some_and(|(from, to)| paths::opens_session(from, to));
                    let done = rig.set(to);

                    ensure_eq!(rig.fake.calls()[..], expected[..], "{from:?} to {to:?}");
                    match (path, done) {
                        (Some(_), Ok(fd)) => {
                            ensure_eq!(rig.engine.state(), to, "{from:?} to {to:?}");
                            ensure_eq!(fd.is_some(), opens, "a data_fd from {from:?} to {to:?}");
                        }
                        (None, Err(e)) => {
                            ensure_eq!(e, EINVAL, "{from:?} to {to:?}");
                            ensure_eq!(rig.engine.state(), from, "{from:?} to {to:?}");
                        }
                        (path, done) => {
                            ensure_eq!(done.is_ok(), path.is_some(), "{from:?} to {to:?}");
                        }
                    }
                    drop(session);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unknown_targets_change_nothing() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                let session = rig.enter(from)?;

                for raw in [0, 8, 9, 0x8000_0002, u32::MAX] {
                    ensure_eq!(rig.request(raw).err(), Some(EINVAL), "{from:?} to {raw}");
                    ensure_eq!(rig.engine.state(), from, "{from:?} to {raw}");
                }
                ensure_eq!(rig.fake.calls()[..], [], "{from:?}");
                drop(session);
            }
        }
        Ok(())
    }

    #[test]
    fn failed_arc_leaves_a_state_of_the_path() -> Result {
        let mut failures = 0;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                for to in State::ALL {
                    let mut before = KVec::new();

                    for (arc_from, arc_to) in path(flags, from, to)?.into_iter().flatten() {
                        for &failing in calls_of(arc_from, arc_to) {
                            before.push(failing, GFP_KERNEL)?;
                            if !can_fail(failing) {
                                continue;
                            }
                            let session = rig.enter(from)?;
                            let earlier =
                                before.iter().filter(|call| **call == failing).count() - 1;
                            rig.fake.fail(failing, earlier)?;
                            let done = rig.set(to).err();
                            rig.fake.clear_failures();

                            let what = fmt!("{from:?} to {to:?} without {failing:?}");
                            ensure_eq!(done, Some(FAILURE), "{what}");
                            ensure_eq!(rig.engine.state(), arc_from, "{what}");
                            ensure_eq!(rig.fake.open_arcs(), 0, "{what}");
                            let calls = rig.fake.calls();
                            let undo = undo_of(arc_from, arc_to, failing);
                            ensure_eq!(calls.get(..before.len()), Some(&before[..]), "{what}");
                            ensure_eq!(calls.get(before.len()..), Some(undo), "undo {what}");

                            if failing == Call::Loaded {
                                let again = rig.set(arc_to).err();
                                ensure_eq!(again, Some(FAILURE), "again {what}");
                                ensure_eq!(rig.fake.calls()[..], [], "again {what}");
                                failures += 1;
                                continue;
                            }

                            // The device has not changed: the failed call succeeds now.
                            let fd = rig.set(arc_to)?;
                            let again = rig.fake.calls();
                            ensure_eq!(again[..], *calls_of(arc_from, arc_to), "again {what}");
                            ensure_eq!(rig.engine.state(), arc_to, "again {what}");
                            drop((session, fd));
                            failures += 1;
                        }
                    }
                }
            }
        }
        ensure_eq!(failures > 100, true, "failures tried");
        Ok(())
    }

    #[test]
    fn failed_undo_leads_to_error() -> Result {
        let mut errors = 0;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for (from, to) in paths::arcs(flags) {
                for &failing in calls_of(from, to) {
                    let undo = undo_of(from, to, failing);

                    for (done, &undoing) in undo.iter().enumerate() {
                        if !can_fail(undoing) {
                            continue;
                        }
                        let session = rig.enter(from)?;
                        // The call that undoes an arc may be its first one.
                        let forward = calls_of(from, to)
                            .iter()
                            .take_while(|call| **call != failing);
                        let earlier = forward.filter(|call| **call == undoing).count();
                        rig.fake.fail(failing, 0)?;
                        rig.fake.fail(undoing, earlier)?;
                        let result = rig.set(to).err();
                        rig.fake.clear_failures();

                        let what = fmt!("{from:?} to {to:?} without {failing:?}, {undoing:?}");
                        ensure_eq!(result, Some(FAILURE), "{what}");
                        ensure_eq!(rig.engine.state(), State::Error, "{what}");
                        // halt() ends the arc.
                        ensure_eq!(rig.fake.open_arcs(), 1, "{what}");
                        let mut expected = KVec::new();
                        for &call in calls_of(from, to) {
                            expected.push(call, GFP_KERNEL)?;
                            if call == failing {
                                break;
                            }
                        }
                        expected.extend_from_slice(undo.get(..=done).ok_or(EINVAL)?, GFP_KERNEL)?;
                        if let Some(ended) = session_of(from) {
                            expected.push(ended, GFP_KERNEL)?;
                        }
                        expected.push(Call::Halt, GFP_KERNEL)?;
                        ensure_eq!(rig.fake.calls()[..], expected[..], "{what}");

                        if let Some(fd) = &session {
                            ensure_eq!(fd.read(0, 1), Err(ENODEV), "{what}");
                        }
                        errors += 1;
                    }
                }
            }
        }
        // Two in the shapes without P2P, three more for its `PRE_COPY`, one with P2P.
        ensure_eq!(errors, 2 + 5 + 1, "errors tried");
        Ok(())
    }

    #[test]
    fn device_reset_during_a_failed_arc_is_not_halted() -> Result {
        let rig = Rig::new(Flags::STOP_COPY)?;

        rig.fake.hold(Some(Call::Stop));
        rig.fake.fail(Call::Stop, 0)?;
        rig.fake.fail(Call::ResumeP2p, 0)?;
        let other = rig.clone();
        let change = Job::begin(move || other.set(State::Stop))?;
        let held = wait_until(|| rig.fake.is_held());
        rig.engine.reset_done();
        rig.fake.hold(None);
        let done = change.wait()?;
        rig.fake.clear_failures();

        ensure_eq!(held, Ok(()), "stop() is called");
        ensure_eq!(done.err(), Some(FAILURE), "the arc fails");
        ensure_eq!(
            rig.engine.state(),
            State::Running,
            "the state after the reset"
        );
        let expected = [Call::QuiesceP2p, Call::Stop, Call::ResumeP2p];
        ensure_eq!(rig.fake.calls()[..], expected, "no halt() after the reset");
        Ok(())
    }

    #[test]
    fn engine_enters_no_state_that_its_flags_exclude() -> Result {
        for claimed in Flags::ALL {
            let rig = Rig::with_device(Flags::STOP_COPY, claimed)?;

            for target in State::ALL {
                let _ = rig.set(target);
                let state = rig.engine.state();
                ensure_eq!(
                    Flags::STOP_COPY.has(state),
                    true,
                    "{state:?} of {claimed:?}"
                );
                rig.engine.reset(&rig.fake)?;
            }
        }
        Ok(())
    }

    #[test]
    fn only_reset_leaves_error() -> Result {
        let mut shapes = 0;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            if states(flags).all(|state| state != State::Error) {
                continue;
            }
            drop(rig.enter(State::Error)?);
            ensure_eq!(rig.engine.state(), State::Error, "{flags:?}");
            for to in State::ALL {
                ensure_eq!(rig.set(to).err(), Some(EINVAL), "ERROR to {to:?}");
            }
            ensure_eq!(rig.engine.state(), State::Error, "{flags:?}");
            ensure_eq!(rig.fake.calls()[..], [], "{flags:?}");

            rig.engine.reset(&rig.fake)?;
            ensure_eq!(rig.engine.state(), State::Running, "{flags:?}");
            ensure_eq!(rig.fake.calls()[..], [Call::Reset], "{flags:?}");
            drop(rig.set(State::StopCopy)?);
            ensure_eq!(rig.engine.state(), State::StopCopy, "{flags:?}");
            shapes += 1;
        }
        ensure_eq!(shapes, 3, "shapes with ERROR");
        Ok(())
    }

    #[test]
    fn reset_and_close_work_in_every_state() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                for reset in [true, false] {
                    let session = rig.enter(from)?;
                    let mut expected = KVec::new();

                    if reset {
                        rig.engine.reset(&rig.fake)?;
                    } else {
                        rig.engine.close();
                    }
                    // The session ends first, so that it cannot change the device after the reset.
                    if let Some(ended) = session_of(from) {
                        expected.push(ended, GFP_KERNEL)?;
                    }
                    if reset {
                        expected.push(Call::Reset, GFP_KERNEL)?;
                    }
                    ensure_eq!(rig.fake.calls()[..], expected[..], "{from:?}, {reset}");
                    ensure_eq!(rig.engine.state(), State::Running, "{from:?}, {reset}");
                    ensure_eq!(rig.device_references(), 1, "{from:?}, {reset}");
                    drop(session);

                    // The device works like after open.
                    drop(rig.set(State::Resuming)?);
                    ensure_eq!(rig.engine.state(), State::Resuming, "{from:?}, {reset}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn data_size_is_known_in_every_state() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                let session = rig.enter(from)?;
                rig.fake.provide(b"0123456789", true)?;
                rig.fake.provide(b"abcde", false)?;
                rig.fake.provide_tail(b"end");
                let size = rig.engine.data_size(&rig.fake);

                if from.is_saving() {
                    ensure_eq!(size, Ok(10 + 5 + 3), "{from:?}");
                    ensure_eq!(rig.fake.calls()[..], [], "{from:?}");
                } else {
                    ensure_eq!(size, Ok(DATA_SIZE), "{from:?}");
                    ensure_eq!(rig.fake.calls()[..], [Call::DataSize], "{from:?}");
                }
                ensure_eq!(rig.engine.state(), from, "{from:?}");
                drop(session);
            }
        }
        Ok(())
    }

    #[test]
    fn session_continues_within_the_saving_group() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;

        ensure_eq!(rig.device_references(), 2, "references");
        for to in [State::PreCopyP2p, State::PreCopy, State::PreCopyP2p] {
            ensure_eq!(rig.set(to)?.is_some(), false, "a data_fd in {to:?}");
            ensure_eq!(fd.read(0, 1), Err(ENOMSG), "read in {to:?}");
            ensure_eq!(fd.poll(), 0, "poll in {to:?}");
        }
        drop(rig.set(State::StopCopy)?);
        ensure_eq!(fd.read(0, 1), Ok(0), "read in STOP_COPY");
        ensure_eq!(fd.poll(), POLLIN, "poll in STOP_COPY");
        let dropped = rig.fake.calls().contains(&Call::SaverDropped);
        ensure_eq!(dropped, false, "the saver was dropped");
        Ok(())
    }

    #[test]
    fn sessions_end_on_every_exit() -> Result {
        let user = UserMemory::new(32)?;
        let mut ways = 0;

        user.put(&24_u32.to_le_bytes())?;
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for (from, to) in paths::arcs(flags) {
                if !paths::ends_session(from, to) {
                    continue;
                }
                let fd = rig.enter(from)?.ok_or(EINVAL)?;

                drop(rig.set(to)?);
                let ended = session_of(from).ok_or(EINVAL)?;
                let drops = rig
                    .fake
                    .calls()
                    .iter()
                    .filter(|call| **call == ended)
                    .count();
                ensure_eq!(drops, 1, "{ended:?} in {from:?}");
                ensure_eq!(rig.device_references(), 1, "references after {from:?}");

                // The old file has no access to a later session.
                let next = rig.enter(from)?.ok_or(EINVAL)?;
                if from == State::Resuming {
                    ensure_eq!(fd.write(user.addr, 16), Err(ENODEV), "write after {from:?}");
                    ensure_eq!(fd.poll(), POLLOUT | POLLERR, "poll after {from:?}");
                    ensure_eq!(next.write(user.addr, 16), Ok(16), "write to the next");
                    ensure_eq!(rig.fake.loaded_bytes().len(), 16, "bytes loaded");
                } else {
                    ensure_eq!(fd.read(user.addr, 16), Err(ENODEV), "read after {from:?}");
                    ensure_eq!(fd.poll(), POLLIN | POLLRDHUP, "poll after {from:?}");
                    ensure_eq!(
                        fd.ioctl(MIG_GET_PRECOPY_INFO, user.addr),
                        Err(ENODEV),
                        "ioctl after {from:?}"
                    );
                    ensure_eq!(
                        next.read(user.addr, 16).is_ok_and(|len| len > 0),
                        false,
                        "next"
                    );
                }
                drop(fd);
                ensure_eq!(rig.engine.state(), from, "closing the old file");
                drop(next);
                ensure_eq!(rig.engine.state(), from, "closing the file");
                let dropped = rig.fake.calls().contains(&ended);
                ensure_eq!(dropped, false, "the session ended with its file");
                ways += 1;
            }
        }
        ensure_eq!(ways, 2 + 2 + 3 + 4, "ways out");
        Ok(())
    }

    #[test]
    fn data_fd_outlives_the_device() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let saving = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let loading = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        drop(rig);
        ensure_eq!(saving.read(user.addr, 16), Err(ENODEV), "read");
        ensure_eq!(saving.poll(), POLLIN | POLLRDHUP, "poll");
        ensure_eq!(loading.write(user.addr, 16), Err(ENODEV), "write");
        Ok(())
    }

    #[test]
    fn state_does_not_wait_for_methods() -> Result {
        use State::*;
        let methods = [
            (Running, RunningP2p, Call::QuiesceP2p),
            (RunningP2p, Running, Call::ResumeP2p),
            (RunningP2p, Stop, Call::Stop),
            (Stop, RunningP2p, Call::Start),
            (Running, PreCopy, Call::PreCopy),
            (PreCopyP2p, StopCopy, Call::Seal),
            (StopCopy, Stop, Call::SaverDropped),
            (Stop, Resuming, Call::Load),
            (Resuming, Stop, Call::Loaded),
            (Resuming, Stop, Call::LoaderDropped),
        ];
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;

        for (from, to, call) in methods {
            let session = rig.enter(from)?;

            rig.fake.hold(Some(call));
            let other = rig.clone();
            let change = Job::begin(move || other.set(to))?;
            let held = wait_until(|| rig.fake.is_held());
            let other = rig.clone();
            let asked = Job::begin(move || other.engine.state())?;
            let state = asked.wait();
            let done = change.is_done();
            rig.fake.hold(None);
            let fd = change.wait()?;

            ensure_eq!(held, Ok(()), "{call:?} is called");
            ensure_eq!(state, Ok(from), "state() during {call:?}");
            ensure_eq!(done, false, "{call:?} has ended");
            ensure_eq!(fd.is_ok(), true, "{call:?}");
            ensure_eq!(rig.engine.state(), to, "state() after {call:?}");
            drop(session);
        }
        Ok(())
    }

    #[test]
    fn state_does_not_wait_for_sizes() -> Result {
        let rig = Rig::new(Flags::STOP_COPY)?;

        for (from, call) in [
            (State::Stop, Call::DataSize),
            (State::StopCopy, Call::Remaining),
        ] {
            let session = rig.enter(from)?;

            rig.fake.hold(Some(call));
            let other = rig.clone();
            let size = Job::begin(move || other.engine.data_size(&other.fake))?;
            let held = wait_until(|| rig.fake.is_held());
            let other = rig.clone();
            let state = Job::begin(move || other.engine.state())?.wait();
            let done = size.is_done();
            rig.fake.hold(None);
            let size = size.wait()?;

            ensure_eq!(held, Ok(()), "{call:?} is called");
            ensure_eq!(state, Ok(from), "state() during {call:?}");
            ensure_eq!(done, false, "{call:?} has ended");
            ensure_eq!(size.is_ok(), true, "{call:?}");
            drop(session);
        }
        Ok(())
    }

    #[test]
    fn path_is_visible_state_by_state() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_p2p())?;

        rig.restart();
        rig.fake.hold(Some(Call::Save));
        let other = rig.clone();
        let change = Job::begin(move || other.set(State::StopCopy))?;
        let held = wait_until(|| rig.fake.is_held());
        let other = rig.clone();
        let state = Job::begin(move || other.engine.state())?.wait();
        rig.fake.hold(None);
        let fd = change.wait()?;

        ensure_eq!(held, Ok(()), "save() is called");
        ensure_eq!(state, Ok(State::Stop), "state() on the way");
        ensure_eq!(fd?.is_some(), true, "a data_fd");
        Ok(())
    }

    #[test]
    fn reset_waits_for_a_method() -> Result {
        let rig = Rig::new(Flags::STOP_COPY)?;

        rig.restart();
        rig.fake.hold(Some(Call::Stop));
        let other = rig.clone();
        let change = Job::begin(move || other.set(State::Stop))?;
        let held = wait_until(|| rig.fake.is_held());
        let other = rig.clone();
        let reset = Job::begin(move || other.engine.reset(&other.fake))?;
        kernel::time::delay::fsleep(kernel::time::Delta::from_millis(20));
        let early = reset.is_done();
        rig.fake.hold(None);
        let changed = change.wait()?;
        reset.wait()??;

        ensure_eq!(held, Ok(()), "stop() is called");
        ensure_eq!(early, false, "reset() beside stop()");
        ensure_eq!(changed.is_ok(), true, "the change of state");
        ensure_eq!(rig.engine.state(), State::Running, "state()");
        let calls = rig.fake.calls();
        ensure_eq!(
            calls[..],
            [Call::QuiesceP2p, Call::Stop, Call::Reset],
            "calls"
        );
        Ok(())
    }

    #[test]
    fn waiting_reader_delays_no_state_change() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;

        rig.fake.provide(b"0123456789", true)?;
        rig.fake.set_ready(false);
        ensure_eq!(fd.read_nonblock(0, 1), Err(EAGAIN), "O_NONBLOCK");
        ensure_eq!(fd.poll(), 0, "poll");
        drop(rig.fake.asked());

        let reader = Job::begin(move || fd.read(0, 1))?;
        let waiting = wait_until(|| rig.fake.asked().contains(&Call::Next(Phase::PreCopy)));
        let other = rig.clone();
        let walk = Job::begin(move || {
            for to in [State::PreCopyP2p, State::PreCopy, State::PreCopyP2p] {
                other.set(to)?;
            }
            let size = other.engine.data_size(&other.fake);
            let waits = !reader.is_done();
            other.set(State::StopCopy)?;
            let sealed = !reader.is_done();
            other.set(State::Stop)?;
            Ok::<_, Error>((size, waits, sealed, reader.wait()?))
        })?
        .wait()?;

        ensure_eq!(waiting, Ok(()), "next() is called");
        ensure_eq!(walk, Ok((Ok(10), true, true, Err(ENODEV))), "the walk");
        Ok(())
    }

    #[test]
    fn waiting_reader_is_woken() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;

        rig.fake.provide(b"0123456789", true)?;
        rig.fake.set_ready(false);
        let other = rig.clone();
        let reader = Job::begin(move || {
            // The worker has no user memory: the read bytes cannot be copied.
            let result = fd.read(0, 16);
            other.fake.set_ready(true);
            (fd, result)
        })?;
        wait_until(|| rig.fake.asked().contains(&Call::Next(Phase::PreCopy)))?;
        let waits = !reader.is_done();
        rig.fake.set_ready(true);
        let (fd, result) = reader.wait()?;

        ensure_eq!(waits, true, "the reader waits");
        ensure_eq!(result, Err(EFAULT), "the reader is woken");
        ensure_eq!(fd.poll(), POLLIN, "poll");
        ensure_eq!(fd.read_nonblock(user.addr, 16), Ok(10), "nothing is lost");
        ensure_eq!(user.get::<10>()?, *b"0123456789", "what is read");
        Ok(())
    }

    #[test]
    fn notification_is_not_lost() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;

        rig.fake.provide(b"0123456789", true)?;
        rig.fake.be_late();
        let reader = Job::begin(move || fd.read(0, 16))?;
        // The worker has no user memory: the read bytes cannot be copied.
        let result = reader.wait();
        rig.fake.set_ready(true);

        ensure_eq!(result, Ok(Err(EFAULT)), "the reader is woken");
        Ok(())
    }

    #[test]
    fn waiting_writer_delays_no_state_change() -> Result {
        for to in [None, Some(State::Stop)] {
            let rig = Rig::new(Flags::STOP_COPY)?;
            let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

            rig.fake.set_ready(false);
            ensure_eq!(fd.poll(), 0, "poll");
            ensure_eq!(fd.write_nonblock(0, 1), Err(EAGAIN), "O_NONBLOCK");
            drop(rig.fake.calls());

            let writer = Job::begin(move || fd.write(0, 1))?;
            let waiting = wait_until(|| rig.fake.calls().contains(&Call::LoaderReady));
            let waits = !writer.is_done();
            let other = rig.clone();
            let done = Job::begin(move || match to {
                Some(state) => other.set(state).map(drop),
                None => other.engine.reset(&other.fake),
            })?
            .wait()?;

            ensure_eq!(waiting, Ok(()), "is_ready() is called");
            ensure_eq!(waits, true, "the writer waits");
            ensure_eq!(done, Ok(()), "on the way to {to:?}");
            ensure_eq!(writer.wait()?, Err(ENODEV), "the session has ended");
        }
        Ok(())
    }

    #[test]
    fn waiting_writer_is_woken() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        rig.fake.be_late();
        let writer = Job::begin(move || {
            // This thread has no user memory: write() cannot copy.
            let result = fd.write(0, 16);
            (fd, result)
        })?;
        let written = writer.wait();
        rig.fake.set_ready(true);
        let (fd, result) = written?;

        ensure_eq!(result, Err(EFAULT), "the writer is woken");
        ensure_eq!(fd.poll(), POLLOUT, "poll");
        user.put(b"0123456789")?;
        ensure_eq!(fd.write_nonblock(user.addr, 10), Ok(10), "write");
        ensure_eq!(
            rig.fake.loaded_bytes()[..],
            *b"0123456789",
            "what is loaded"
        );
        Ok(())
    }

    #[test]
    fn loader_may_take_a_part() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;
        let written = || rig.fake.calls().contains(&Call::Write);

        user.put(b"0123456789")?;
        rig.fake.set_room(Some(4));
        ensure_eq!(fd.write(user.addr, 10), Ok(4), "a part");
        ensure_eq!(fd.poll(), 0, "poll after a part");
        drop(rig.fake.calls());
        let again = fd.write_nonblock(user.addr + 4, 6);
        ensure_eq!(again, Err(EAGAIN), "O_NONBLOCK");
        ensure_eq!(written(), false, "a call without a notification");
        rig.fake.set_room(Some(0));
        ensure_eq!(fd.poll(), POLLOUT, "poll after a notification");
        let again = fd.write_nonblock(user.addr + 4, 6);
        ensure_eq!(again, Err(EAGAIN), "O_NONBLOCK after a notification");
        ensure_eq!(written(), true, "a call after a notification");
        ensure_eq!(fd.poll(), 0, "poll while there is no room");
        rig.fake.set_room(Some(3));
        let again = fd.write_nonblock(user.addr + 4, 6);
        ensure_eq!(again, Ok(3), "another part");
        rig.fake.set_room(None);
        ensure_eq!(fd.write(user.addr + 7, 3), Ok(3), "the rest");
        ensure_eq!(fd.poll(), POLLOUT, "poll after the rest");
        ensure_eq!(rig.fake.loaded_bytes()[..], *b"0123456789", "all");
        Ok(())
    }

    #[test]
    fn loader_that_takes_more_than_all_is_refused() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        rig.fake.set_excess(1);
        ensure_eq!(fd.write(user.addr, 10), Err(EIO), "one byte more");
        rig.fake.set_excess(0);
        ensure_eq!(fd.write(user.addr, 10), Err(EIO), "afterwards");
        ensure_eq!(rig.set(State::Stop).err(), Some(EIO), "the arc to STOP");
        Ok(())
    }

    #[test]
    fn writer_keeps_bytes_that_the_loader_does_not_take() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        user.put(b"0123456789")?;
        rig.fake.set_room(Some(0));
        drop(rig.fake.calls());
        let other = rig.clone();
        let job = Job::begin(move || {
            let waiting = wait_until(|| other.fake.calls().contains(&Call::Write));
            other.fake.set_room(None);
            waiting
        })?;
        ensure_eq!(fd.write(user.addr, 10), Ok(10), "the writer is woken");
        ensure_eq!(job.wait()?, Ok(()), "write() is called");
        let loaded = rig.fake.loaded_bytes();
        ensure_eq!(loaded[..], *b"0123456789", "what is loaded");
        Ok(())
    }

    #[test]
    fn notification_during_a_call_of_the_loader_is_not_lost() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        rig.fake.make_room_late();
        let other = rig.clone();
        let job = Job::begin(move || {
            let loaded = wait_until(|| other.fake.loaded_bytes().len() == 10);
            if loaded.is_err() {
                // Ends the wait.
                other.engine.close();
            }
            loaded
        })?;
        ensure_eq!(fd.write(user.addr, 10), Ok(10), "the writer is woken");
        ensure_eq!(job.wait()?, Ok(()), "all is loaded");
        Ok(())
    }

    #[test]
    fn writer_with_bytes_delays_no_state_change() -> Result {
        for to in [None, Some(State::Stop)] {
            let user = UserMemory::new(16)?;
            let rig = Rig::new(Flags::STOP_COPY)?;
            let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

            rig.fake.set_room(Some(0));
            drop(rig.fake.calls());
            let other = rig.clone();
            let job = Job::begin(move || {
                let waiting = wait_until(|| other.fake.calls().contains(&Call::Write));
                let rig = other.clone();
                let change = Job::begin(move || match to {
                    Some(state) => rig.set(state).map(drop),
                    None => rig.engine.reset(&rig.fake),
                })?;
                let changed = change.wait();
                // Ends the wait of a writer that holds a lock.
                other.fake.set_room(None);
                Ok::<_, Error>((waiting, changed))
            })?;
            let written = fd.write(user.addr, 10);
            let changed = job.wait()?;

            ensure_eq!(changed, Ok((Ok(()), Ok(Ok(())))), "on the way to {to:?}");
            ensure_eq!(written, Err(ENODEV), "the session has ended");
        }
        Ok(())
    }

    #[test]
    fn stream_is_read_in_order() -> Result {
        let user = UserMemory::new(64)?;
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let size = || rig.engine.data_size(&rig.fake);

        rig.fake.provide(b"0123456789", true)?;
        rig.fake.provide(b"abcdef", false)?;
        rig.fake.provide_tail(b"tail");
        ensure_eq!(size(), Ok(20), "size at first");
        ensure_eq!(fd.read(user.addr, 3), Ok(3), "a part of the head");
        ensure_eq!(fd.read(user.addr + 3, 4), Ok(4), "across the head");
        ensure_eq!(size(), Ok(13), "size with a chunk begun");
        drop(rig.set(State::PreCopyP2p)?);
        ensure_eq!(fd.read(user.addr + 7, 64), Ok(9), "the rest");
        ensure_eq!(user.get::<16>()?, *b"0123456789abcdef", "what is read");
        ensure_eq!(fd.read(user.addr, 64), Err(ENOMSG), "the temporary end");
        ensure_eq!(size(), Ok(4), "size at the temporary end");

        rig.fake.fail(Call::Next(Phase::PreCopy), 0)?;
        ensure_eq!(
            fd.read(user.addr, 64),
            Err(FAILURE),
            "a failure of the saver"
        );
        rig.fake.provide(b"more", false)?;
        drop(rig.set(State::StopCopy)?);
        ensure_eq!(size(), Ok(8), "size in STOP_COPY");
        ensure_eq!(fd.read(user.addr, 64), Ok(8), "STOP_COPY");
        ensure_eq!(user.get::<8>()?, *b"moretail", "what is read last");
        ensure_eq!(fd.read(user.addr, 64), Ok(0), "the permanent end");
        ensure_eq!(size(), Ok(0), "size at the permanent end");
        Ok(())
    }

    #[test]
    fn unread_pages_are_marked_again() -> Result {
        const RECORD: usize = 4 + PAGE_SIZE;

        let user = UserMemory::new(64 * RECORD)?;
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let memory = StateMemory::new(130)?;
        let tracking = memory.track(rig.fake.notifier()?)?;
        let take = |max| tracking.take(max).ok_or(EINVAL);
        let chunk = |max| -> Result<Chunk> { Ok(Chunk::new(b"head")?.pages(take(max)?)) };
        let pages = || {
            let pending = tracking.pending();
            (pending.initial.pages, pending.dirty.pages)
        };

        drop(take(64)?);
        ensure_eq!(pages(), (130, 0), "pages that were dropped");
        drop(chunk(3)?);
        ensure_eq!(pages(), (130, 0), "a chunk that was dropped");
        drop(chunk(3)?.bytes(KVVec::new()));
        ensure_eq!(pages(), (130, 0), "pages that were replaced");
        let all = tracking.pending();

        for page in 0..130 {
            rig.fake.provide_chunk(chunk(1)?, RECORD as u64);
            ensure_eq!(fd.read(user.addr, RECORD), Ok(RECORD), "page {page}");
        }
        ensure_eq!(pages(), (0, 0), "pages that were read");

        memory.write(7 * PAGE_SIZE, &[1])?;
        memory.write(129 * PAGE_SIZE, &[1])?;
        drop(take(64)?);
        drop(take(64)?);
        ensure_eq!(pages(), (0, 2), "changes that were dropped");
        drop(rig.set(State::StopCopy)?);
        drop(take(64)?);
        ensure_eq!(pages(), (0, 2), "a change that was dropped in STOP_COPY");

        // After pages that another chunk holds, they can only be returned again as changed.
        memory.reinit();
        ensure_eq!(tracking.pending().initial, all.initial, "after a reinit");
        let first = take(64)?;
        let second = take(64)?;
        drop(first);
        ensure_eq!(pages(), (2, 64), "the first of two that were dropped");
        drop(second);
        ensure_eq!(pages(), (66, 64), "both");
        Ok(())
    }

    #[test]
    fn reinit_notifies_only_a_reader_at_the_end() -> Result {
        const SIZE: usize = 4 + 64 * PAGE_SIZE;

        let user = UserMemory::new(SIZE)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let memory = StateMemory::new(2 * 64)?;
        let tracking = memory.track(rig.fake.notifier()?)?;

        ensure_eq!(fd.poll(), 0, "a session that begins");
        memory.reinit();
        ensure_eq!(fd.poll(), 0, "pages are left");
        for _ in 0..2 {
            let run = tracking.take(64).ok_or(EINVAL)?;
            rig.fake
                .provide_chunk(Chunk::new(b"head")?.pages(run), SIZE as u64);
            ensure_eq!(fd.read(user.addr, SIZE), Ok(SIZE), "all pages are read");
        }
        ensure_eq!(fd.read(user.addr, SIZE), Err(ENOMSG), "the temporary end");
        ensure_eq!(fd.poll(), 0, "the temporary end");
        memory.reinit();
        ensure_eq!(fd.poll(), POLLIN, "a reinit at the end");
        ensure_eq!(tracking.pending().initial.pages, 128, "a reinit");
        ensure_eq!(tracking.pending().dirty.pages, 0, "a reinit");
        ensure_eq!(tracking.pending().reinits, 2, "both");
        Ok(())
    }

    #[test]
    fn precopy_info_matches_stop_copy() -> Result {
        let user = UserMemory::new(32)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let info = || -> Result<(u64, u64)> {
            user.put(&24_u32.to_le_bytes())?;
            fd.ioctl(MIG_GET_PRECOPY_INFO, user.addr)?;
            let [_, initial, dirty]: [u64; 3] = zerocopy::transmute!(user.get::<24>()?);
            Ok((initial, dirty))
        };

        rig.fake.provide(b"0123456789", true)?;
        rig.fake.provide_tail(b"tail");
        ensure_eq!(info(), Ok((14, 0)), "at first");
        rig.fake.provide(b"abcdef", false)?;
        ensure_eq!(info(), Ok((14, 6)), "with changes");
        ensure_eq!(fd.read(user.addr, 32), Ok(16), "all that is there");
        ensure_eq!(info(), Ok((0, 0)), "at the temporary end");
        rig.fake.provide(b"more", false)?;
        ensure_eq!(info(), Ok((0, 8)), "with more changes");
        drop(rig.set(State::StopCopy)?);
        ensure_eq!(info(), Err(EINVAL), "in STOP_COPY");
        Ok(())
    }

    #[test]
    fn poll_agrees_with_read_and_calls_no_saver() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let polled = |fd: &DataFd| {
            drop(rig.fake.asked());
            let events = fd.poll();
            (events, rig.fake.asked().len())
        };

        for state in [State::PreCopy, State::StopCopy] {
            let fd = rig.enter(state)?.ok_or(EINVAL)?;
            let end = if state == State::PreCopy { 0 } else { POLLIN };

            ensure_eq!(polled(&fd), (end, 0), "nothing in {state:?}");
            rig.fake.provide(b"0123456789", true)?;
            rig.fake.provide(b"abcde", true)?;
            ensure_eq!(polled(&fd), (POLLIN, 0), "a chunk in {state:?}");
            rig.fake.set_ready(false);
            ensure_eq!(fd.read_nonblock(user.addr, 16), Err(EAGAIN), "{state:?}");
            ensure_eq!(polled(&fd), (0, 0), "not ready in {state:?}");
            rig.fake.set_ready(true);
            ensure_eq!(polled(&fd), (POLLIN, 0), "ready in {state:?}");
            ensure_eq!(fd.read_nonblock(user.addr, 4), Ok(4), "{state:?}");
            rig.fake.set_ready(false);
            ensure_eq!(polled(&fd), (POLLIN, 0), "the rest of a chunk in {state:?}");
            // The buffer is full exactly when the chunk ends.
            ensure_eq!(fd.read_nonblock(user.addr, 6), Ok(6), "{state:?}");
            ensure_eq!(polled(&fd), (0, 0), "the next chunk in {state:?}");
            rig.fake.set_ready(true);
            ensure_eq!(fd.read_nonblock(user.addr, 16), Ok(5), "{state:?}");
            ensure_eq!(polled(&fd), (end, 0), "the end in {state:?}");
        }

        // In a new phase, poll() knows the next chunk before the first read().
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        rig.fake.set_ready(false);
        drop(rig.set(State::StopCopy)?);
        ensure_eq!(polled(&fd), (0, 0), "not ready at first");
        rig.fake.set_ready(true);
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        rig.fake.fail(Call::Next(Phase::StopCopy), 0)?;
        drop(rig.set(State::StopCopy)?);
        rig.fake.clear_failures();
        ensure_eq!(polled(&fd), (POLLIN, 0), "a failure");
        ensure_eq!(fd.read(user.addr, 16), Err(FAILURE), "a failure");
        ensure_eq!(fd.read(user.addr, 16), Ok(0), "after the failure");
        Ok(())
    }

    /// The sizes may come from firmware. The position in the stream is known without them.
    #[test]
    fn read_queries_no_size() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;

        for state in [State::PreCopy, State::StopCopy] {
            let queries = || {
                let asked = rig.fake.asked();
                asked
                    .iter()
                    .filter(|call| **call == Call::Remaining)
                    .count()
            };
            let end = if state == State::PreCopy {
                Err(ENOMSG)
            } else {
                Ok(0)
            };
            let fd = rig.enter(state)?.ok_or(EINVAL)?;

            rig.fake.provide(b"0123456789", true)?;
            ensure_eq!(fd.read(user.addr, 4), Ok(4), "a part in {state:?}");
            ensure_eq!(fd.read(user.addr, 16), Ok(6), "the rest in {state:?}");
            ensure_eq!(fd.read(user.addr, 16), end, "the end in {state:?}");
            rig.fake.set_ready(false);
            ensure_eq!(fd.read_nonblock(user.addr, 16), Err(EAGAIN), "{state:?}");
            rig.fake.set_ready(true);
            ensure_eq!(queries(), 0, "queries in {state:?}");
        }
        Ok(())
    }

    #[test]
    fn poll_agrees_with_read_after_a_failed_read() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;

        for (state, phase) in [
            (State::PreCopy, Phase::PreCopy),
            (State::StopCopy, Phase::StopCopy),
        ] {
            let pre_copy = phase == Phase::PreCopy;
            // The first chunk is asked for when the session begins.
            let begin_failing = || -> Result<DataFd> {
                rig.restart();
                rig.fake.fail(Call::Next(phase), 0)?;
                let fd = rig.set(state)?.ok_or(EINVAL)?;
                rig.fake.clear_failures();
                ensure_eq!(fd.poll(), POLLIN, "a failure in {state:?}");
                Ok(fd)
            };

            let fd = begin_failing()?;
            rig.fake.set_ready(false);
            ensure_eq!(fd.read(user.addr, 16), Err(FAILURE), "{state:?}");
            ensure_eq!(fd.poll(), 0, "not ready after a failure in {state:?}");
            ensure_eq!(fd.read_nonblock(user.addr, 16), Err(EAGAIN), "{state:?}");
            rig.fake.set_ready(true);

            let fd = begin_failing()?;
            ensure_eq!(fd.read(user.addr, 16), Err(FAILURE), "{state:?}");
            let end = if pre_copy { 0 } else { POLLIN };
            ensure_eq!(fd.poll(), end, "the end after a failure in {state:?}");
            let end = if pre_copy { Err(ENOMSG) } else { Ok(0) };
            ensure_eq!(fd.read(user.addr, 16), end, "{state:?}");

            let fd = begin_failing()?;
            rig.fake.provide(b"0123456789", true)?;
            ensure_eq!(fd.read(user.addr, 16), Err(FAILURE), "{state:?}");
            rig.fake.set_ready(false);
            ensure_eq!(fd.poll(), POLLIN, "a chunk after a failure in {state:?}");
            ensure_eq!(fd.read_nonblock(0, 16), Err(EFAULT), "{state:?}");
            ensure_eq!(fd.poll(), POLLIN, "a chunk after a fault in {state:?}");
            ensure_eq!(fd.read_nonblock(user.addr, 16), Ok(10), "{state:?}");
            ensure_eq!(fd.poll(), 0, "not ready after a fault in {state:?}");
            rig.fake.set_ready(true);

            // A failure behind a chunk is for the next read().
            let fd = rig.enter(state)?.ok_or(EINVAL)?;
            rig.fake.provide(b"0123456789", true)?;
            rig.fake.fail(Call::Next(phase), 1)?;
            ensure_eq!(fd.read(user.addr, 16), Ok(10), "{state:?}");
            rig.fake.clear_failures();
            rig.fake.set_ready(false);
            ensure_eq!(fd.poll(), POLLIN, "a failure behind a chunk");
            ensure_eq!(fd.read_nonblock(user.addr, 16), Err(FAILURE), "{state:?}");
            ensure_eq!(fd.poll(), 0, "not ready behind a failure");
            rig.fake.set_ready(true);
        }
        Ok(())
    }

    #[test]
    fn miscounting_saver_is_reported_once() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;
        let fd = rig.enter(State::PreCopy)?.ok_or(EINVAL)?;
        let size = || rig.engine.data_size(&rig.fake);
        let reports = || {
            (
                logged(c"inexact sizes: a stream goes on after none were reported"),
                logged(c"inexact sizes: 5 bytes are reported at the end of a stream"),
            )
        };
        let (chunks, ends) = reports();

        // A notification in between is no mistake.
        ensure_eq!(size(), Ok(0), "size of nothing");
        rig.fake.provide(b"0123456789", true)?;
        ensure_eq!(fd.read(user.addr, 16), Ok(10), "what is there now");
        ensure_eq!(fd.read(user.addr, 16), Err(ENOMSG), "the end");
        rig.fake.set_missing(5);
        rig.fake.notifier()?.notify();
        ensure_eq!(size(), Ok(5), "size after the notification");
        rig.fake.set_missing(0);
        ensure_eq!(fd.read(user.addr, 16), Err(ENOMSG), "what has gone");
        ensure_eq!(reports(), (chunks, ends), "reports without a mistake");

        for round in 0..2 {
            ensure_eq!(size(), Ok(0), "size in round {round}");
            rig.fake.provide_chunk(Chunk::new(b"0123456789")?, 0);
            ensure_eq!(fd.read(user.addr, 16), Ok(10), "a chunk in round {round}");
            ensure_eq!(reports(), (chunks + 1, ends), "reports in round {round}");
        }
        for round in 0..2 {
            ensure_eq!(
                fd.read(user.addr, 16),
                Err(ENOMSG),
                "the end in round {round}"
            );
            rig.fake.set_missing(5);
            ensure_eq!(size(), Ok(5), "size in round {round}");
            rig.fake.set_missing(0);
            ensure_eq!(
                reports(),
                (chunks + 1, ends + 1),
                "reports in round {round}"
            );
        }
        Ok(())
    }

    #[test]
    fn sizes_fail_with_the_error_of_the_driver() -> Result {
        let user = UserMemory::new(32)?;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in states(flags) {
                let session = rig.enter(from)?;

                rig.fake.fail(Call::DataSize, 0)?;
                rig.fake.fail(Call::Remaining, 0)?;
                let size = rig.engine.data_size(&rig.fake);
                ensure_eq!(size, Err(FAILURE), "the size in {from:?}");
                if matches!(from, State::PreCopy | State::PreCopyP2p) {
                    let fd = session.as_ref().ok_or(EINVAL)?;
                    user.put(&24_u32.to_le_bytes())?;
                    let info = fd.ioctl(MIG_GET_PRECOPY_INFO, user.addr);
                    ensure_eq!(info, Err(FAILURE), "the info in {from:?}");
                }
                rig.fake.clear_failures();
                ensure_eq!(rig.engine.state(), from, "{from:?}");
                ensure_eq!(rig.engine.data_size(&rig.fake).is_ok(), true, "{from:?}");
                drop(session);
            }
        }
        Ok(())
    }

    #[test]
    fn failure_that_breaks_the_device_leads_to_error() -> Result {
        let mut errors = 0;

        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for (from, to) in paths::arcs(flags) {
                let mut expected = KVec::new();

                for &failing in calls_of(from, to) {
                    expected.push(failing, GFP_KERNEL)?;
                    if !can_fail(failing) {
                        continue;
                    }
                    let what = fmt!("{from:?} to {to:?} without {failing:?}");
                    let session = rig.enter(from)?;
                    rig.fake.set_breaks(true);
                    rig.fake.fail(failing, 0)?;
                    let done = rig.set(to).err();
                    rig.fake.clear_failures();
                    rig.fake.set_breaks(false);

                    ensure_eq!(done, Some(FAILURE), "{what}");
                    ensure_eq!(rig.engine.state(), State::Error, "{what}");
                    let calls = rig.fake.calls();
                    let all = calls.get(..expected.len());
                    ensure_eq!(all, Some(&expected[..]), "{what}");
                    let undone = calls
                        .iter()
                        .skip(expected.len())
                        .any(|&call| can_fail(call));
                    ensure_eq!(undone, false, "undo {what}");
                    ensure_eq!(calls.last(), Some(&Call::Halt), "{what}");
                    rig.engine.reset(&rig.fake)?;
                    ensure_eq!(rig.engine.state(), State::Running, "{what}");
                    drop(session);
                    errors += 1;
                }
            }
        }
        ensure_eq!(errors > 30, true, "errors tried");
        Ok(())
    }

    #[test]
    fn dead_device_is_in_error_until_reset() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in State::ALL.into_iter().filter(|&from| flags.has(from)) {
                let session = rig.enter(from)?;

                rig.engine.fail();
                ensure_eq!(rig.engine.state(), State::Error, "{from:?}");
                ensure_eq!(rig.device_references(), 1, "{from:?}");
                if let Some(fd) = &session {
                    let loads = from == State::Resuming;
                    let dead = if loads { fd.write(0, 1) } else { fd.read(0, 1) };
                    let events = if loads {
                        POLLOUT | POLLERR
                    } else {
                        POLLIN | POLLRDHUP
                    };
                    ensure_eq!(dead, Err(ENODEV), "{from:?}");
                    ensure_eq!(fd.poll(), events, "{from:?}");
                }
                ensure_eq!(rig.set(State::Running).err(), Some(EINVAL), "{from:?}");
                rig.engine.reset(&rig.fake)?;
                ensure_eq!(rig.engine.state(), State::Running, "{from:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn report_around_close_does_not_affect_the_next_user() -> Result {
        for flags in Flags::ALL {
            let rig = Rig::new(flags)?;

            for from in State::ALL.into_iter().filter(|&from| flags.has(from)) {
                for (before, after) in [(true, false), (false, true), (true, true)] {
                    let what = fmt!("{from:?}, {before}, {after}");
                    let session = rig.enter(from)?;

                    if before {
                        rig.engine.fail();
                    }
                    rig.engine.close();
                    ensure_eq!(rig.engine.state(), State::Running, "closed in {what}");
                    if after {
                        rig.engine.fail();
                        ensure_eq!(rig.engine.state(), State::Error, "failed in {what}");
                    }
                    ensure_eq!(rig.engine.open(), Ok(()), "{what}");
                    ensure_eq!(rig.engine.state(), State::Running, "open in {what}");
                    ensure_eq!(rig.device_references(), 1, "{what}");
                    let next = rig.set(State::StopCopy)?;
                    ensure_eq!(rig.engine.state(), State::StopCopy, "{what}");
                    drop((session, next));
                }
            }
        }
        Ok(())
    }

    #[test]
    fn report_during_close_does_not_affect_the_next_user() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;

        for (state, ended) in [
            (State::PreCopy, Call::SaverDropped),
            (State::StopCopy, Call::SaverDropped),
            (State::Resuming, Call::LoaderDropped),
        ] {
            for reset in [false, true] {
                let what = fmt!("{state:?}, {reset}");
                let session = rig.enter(state)?.ok_or(EINVAL)?;

                rig.fake.hold(Some(ended));
                let other = rig.clone();
                let close = Job::begin(move || other.engine.close())?;
                let held = wait_until(|| rig.fake.is_held());
                let other = rig.clone();
                let report = Job::begin(move || match reset {
                    true => other.engine.reset_done(),
                    false => other.engine.fail(),
                })?
                .wait();
                let waits = !close.is_done();
                rig.fake.hold(None);
                close.wait()?;

                ensure_eq!(held, Ok(()), "{ended:?} in {what}");
                ensure_eq!(report, Ok(()), "the report in {what}");
                ensure_eq!(waits, true, "close() has ended in {what}");
                ensure_eq!(rig.fake.calls()[..], [ended], "{what}");
                ensure_eq!(rig.engine.open(), Ok(()), "{what}");
                ensure_eq!(rig.engine.state(), State::Running, "open in {what}");
                ensure_eq!(rig.device_references(), 1, "{what}");
                let dead = match state {
                    State::Resuming => session.write(0, 1),
                    _ => session.read(0, 1),
                };
                ensure_eq!(dead, Err(ENODEV), "{what}");
            }
        }
        Ok(())
    }

    #[test]
    fn failed_reset_leads_to_error() -> Result {
        let rig = Rig::new(Flags::STOP_COPY)?;
        let session = rig.enter(State::StopCopy)?;

        rig.fake.fail(Call::Reset, 0)?;
        ensure_eq!(rig.engine.reset(&rig.fake), Err(FAILURE), "reset");
        ensure_eq!(rig.engine.state(), State::Error, "state");
        let calls = rig.fake.calls();
        let expected = [Call::SaverDropped, Call::Reset, Call::Halt];
        ensure_eq!(calls[..], expected, "calls");
        rig.fake.clear_failures();
        ensure_eq!(rig.engine.reset(&rig.fake), Ok(()), "another reset");
        ensure_eq!(rig.engine.state(), State::Running, "state after another");
        drop(session);
        Ok(())
    }

    #[test]
    fn reports_under_memory_lock_do_not_wait_for_state_changes() -> Result {
        let methods = [
            (State::Running, State::Stop, Call::Stop),
            (State::Running, State::PreCopy, Call::PreCopy),
            (State::PreCopy, State::StopCopy, Call::Seal),
            (State::StopCopy, State::Stop, Call::SaverDropped),
            (State::Stop, State::Resuming, Call::Load),
            (State::Resuming, State::Stop, Call::Loaded),
        ];
        let rig = Rig::new(Flags::STOP_COPY.with_pre_copy())?;

        for (from, to, call) in methods {
            for reset in [false, true] {
                let what = fmt!("{call:?}, {reset}");
                let session = rig.enter(from)?;

                rig.fake.hold(Some(call));
                let other = rig.clone();
                let change = Job::begin(move || other.set(to))?;
                let held = wait_until(|| rig.fake.is_held());
                let other = rig.clone();
                let report = Job::begin(move || {
                    let _memory = other.fake.memory_lock.lock();
                    match reset {
                        true => other.engine.reset_done(),
                        false => other.engine.fail(),
                    }
                })?;
                let reported = report.wait();
                let waits = !change.is_done();
                rig.fake.hold(None);
                let fd = change.wait()?;

                ensure_eq!(held, Ok(()), "{what} is called");
                ensure_eq!(reported, Ok(()), "the report during {what}");
                ensure_eq!(waits, true, "{what} has ended");
                match (&fd, reset) {
                    (Ok(_), true) => (),
                    (done, true) => ensure_eq!(done.is_ok(), true, "{what}"),
                    (Err(e), false) => ensure_eq!(*e, ENODEV, "{what}"),
                    (Ok(_), false) => ensure_eq!(fd.is_err(), true, "{what}"),
                }
                let state = if reset { State::Running } else { State::Error };
                ensure_eq!(rig.engine.state(), state, "state after {what}");
                ensure_eq!(rig.device_references(), 1, "references after {what}");
                drop((session, fd));
            }
        }
        Ok(())
    }

    #[test]
    fn report_between_two_arcs_ends_the_walk() -> Result {
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let walks = [
            (State::Running, State::StopCopy, Call::QuiesceP2p),
            (State::RunningP2p, State::Resuming, Call::Stop),
            (State::PreCopy, State::StopCopy, Call::QuiesceP2p),
            (State::PreCopyP2p, State::Stop, Call::SaverDropped),
            (State::Resuming, State::Running, Call::Loaded),
        ];

        for (from, to, first) in walks {
            for reset in [false, true] {
                let what = fmt!("{from:?} to {to:?}, {reset}");
                let session = rig.enter(from)?;

                rig.fake.hold(Some(first));
                let other = rig.clone();
                let change = Job::begin(move || other.set(to))?;
                let held = wait_until(|| rig.fake.is_held());
                match reset {
                    true => rig.engine.reset_done(),
                    false => rig.engine.fail(),
                }
                rig.fake.hold(None);
                let done = change.wait()?;

                ensure_eq!(held, Ok(()), "{first:?} is called in {what}");
                let (error, state) = match reset {
                    true => (ECANCELED, State::Running),
                    false => (ENODEV, State::Error),
                };
                ensure_eq!(done.err(), Some(error), "{what}");
                ensure_eq!(rig.engine.state(), state, "the state after {what}");
                ensure_eq!(rig.device_references(), 1, "references after {what}");
                let mut expected = KVec::new();
                expected.push(first, GFP_KERNEL)?;
                if let Some(ended) = session_of(from).filter(|&ended| ended != first) {
                    expected.push(ended, GFP_KERNEL)?;
                }
                ensure_eq!(rig.fake.calls()[..], expected[..], "{what}");
                drop(session);
            }
        }
        Ok(())
    }

    #[test]
    fn fenced_device_gets_no_calls() -> Result {
        for flags in Flags::ALL {
            for from in State::ALL.into_iter().filter(|&from| flags.has(from)) {
                let rig = Rig::new(flags)?;
                let session = rig.enter(from)?;

                rig.engine.fence();
                drop(rig.fake.calls());
                for again in [false, true] {
                    let what = fmt!("{from:?}, {again}");
                    ensure_eq!(rig.engine.state(), State::Error, "{what}");
                    ensure_eq!(rig.set(State::Stop).err(), Some(ENODEV), "{what}");
                    let size = rig.engine.data_size(&rig.fake);
                    ensure_eq!(size, Err(ENODEV), "{what}");
                    ensure_eq!(rig.engine.reset(&rig.fake), Err(ENODEV), "{what}");
                    rig.engine.reset_done();
                    rig.engine.close();
                    ensure_eq!(rig.engine.open(), Err(ENODEV), "{what}");
                }
                ensure_eq!(rig.fake.calls()[..], [], "{from:?}");
                if let Some(fd) = session.filter(|_| from != State::Resuming) {
                    ensure_eq!(fd.read(0, 1), Err(ENODEV), "{from:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn only_an_incomplete_image_can_be_completed() -> Result {
        let user = UserMemory::new(16)?;
        let rig = Rig::new(Flags::STOP_COPY)?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        rig.fake.set_invalid(true);
        rig.fake.fail(Call::Loaded, 0)?;
        ensure_eq!(rig.set(State::Stop).err(), Some(EINVAL), "incomplete");
        ensure_eq!(fd.write(user.addr, 8), Ok(8), "the rest");
        rig.fake.set_invalid(false);
        ensure_eq!(rig.set(State::Stop).err(), Some(FAILURE), "a failure");
        rig.fake.clear_failures();
        ensure_eq!(fd.write(user.addr, 8), Err(FAILURE), "after the failure");
        ensure_eq!(
            rig.set(State::Stop).err(),
            Some(FAILURE),
            "after the failure"
        );
        Ok(())
    }

    #[test]
    fn refused_stream_stays_refused() -> Result {
        let user = UserMemory::new(64)?;
        let rig = Rig::new(Flags::STOP_COPY.with_p2p().with_pre_copy())?;
        let fd = rig.enter(State::Resuming)?.ok_or(EINVAL)?;

        user.put(b"good bad")?;
        ensure_eq!(fd.poll(), POLLOUT, "poll");
        ensure_eq!(fd.write(user.addr, 5), Ok(5), "what is good");
        ensure_eq!(rig.fake.loaded_bytes()[..], *b"good ", "what was loaded");
        rig.fake.fail(Call::Write, 0)?;
        ensure_eq!(fd.write(user.addr + 5, 3), Err(FAILURE), "what is bad");
        rig.fake.clear_failures();
        drop(rig.fake.calls());

        ensure_eq!(fd.write(user.addr, 5), Err(FAILURE), "what comes after it");
        ensure_eq!(
            rig.set(State::Running).err(),
            Some(FAILURE),
            "the arc to STOP"
        );
        ensure_eq!(rig.engine.state(), State::Resuming, "state");
        ensure_eq!(rig.fake.calls()[..], [], "calls");

        rig.engine.reset(&rig.fake)?;
        let calls = rig.fake.calls();
        ensure_eq!(calls[..], [Call::LoaderDropped, Call::Reset], "reset");
        let fd = rig.set(State::Resuming)?.ok_or(EINVAL)?;
        ensure_eq!(fd.write(user.addr, 5), Ok(5), "another stream");
        drop(rig.set(State::Running)?);
        ensure_eq!(rig.engine.state(), State::Running, "the end");
        Ok(())
    }
}
