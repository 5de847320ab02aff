// SPDX-License-Identifier: GPL-2.0

//! Model of the state machine: arcs, sessions and the path rule of the uAPI.
//!
//! The engine gets the next state from vfio core. The tests compare it, and vfio core, with this
//! model. Host tests compare the model with the text of the uAPI, and make the drawing from it.
//!
//! A device has the arcs that [`arcs`] lists. User space may request any target. If no arc leads to
//! it directly, the request is a combination of arcs, selected by these rules of the uAPI:
//!
//! - Select the shortest path.
//! - The path cannot have saving group states as interior states, only as starting or end states.
//!
//! The saving group (`PRE_COPY`, `PRE_COPY_P2P`, `STOP_COPY`) shares one data transfer session,
//! which continues while the device moves inside the group. The second rule therefore applies to
//! paths that enter or leave the group: they must not start a session only to end it. A path from
//! one member of the group to another stays inside the group: `PRE_COPY -> PRE_COPY_P2P ->
//! STOP_COPY`. No arc inside the group leaves `STOP_COPY`, so `STOP_COPY -> PRE_COPY` and
//! `STOP_COPY -> PRE_COPY_P2P` are not permitted.
//!
//! [`next`] implements these rules.
//!
//! C header: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

use super::fsm::{
    Flags,
    State, //
};

/// The arcs of the shape that has all states.
const ARCS: [(State, State); 15] = [
    (State::Resuming, State::Stop),
    (State::Stop, State::Resuming),
    (State::Stop, State::StopCopy),
    (State::StopCopy, State::Stop),
    (State::Running, State::RunningP2p),
    (State::RunningP2p, State::Running),
    (State::RunningP2p, State::Stop),
    (State::Stop, State::RunningP2p),
    (State::Running, State::PreCopy),
    (State::PreCopy, State::Running),
    (State::PreCopy, State::PreCopyP2p),
    (State::PreCopyP2p, State::PreCopy),
    (State::PreCopyP2p, State::RunningP2p),
    (State::PreCopyP2p, State::StopCopy),
    (State::RunningP2p, State::PreCopyP2p),
];

/// The arcs that replace those through a P2P state if these states do not exist.
const ARCS_WITHOUT_P2P: [(State, State); 3] = [
    (State::Running, State::Stop),
    (State::Stop, State::Running),
    (State::PreCopy, State::StopCopy),
];

/// Returns the arcs that a driver of this shape implements, as pairs of origin and end.
pub fn arcs(flags: Flags) -> impl Iterator<Item = (State, State)> {
    let without_p2p = ARCS_WITHOUT_P2P.into_iter().filter(move |_| !flags.p2p());

    ARCS.into_iter()
        .chain(without_p2p)
        .filter(move |&(from, to)| flags.has(from) && flags.has(to))
}

/// Returns the next state on the path from `cur` to `target` if all states exist.
///
/// Returns [`None`] if no path is permitted.
fn step(cur: State, target: State) -> Option<State> {
    use State::*;

    let next = match cur {
        Error => return None,
        Stop => match target {
            Error => return None,
            Stop => Stop,
            StopCopy => StopCopy,
            Resuming => Resuming,
            Running | RunningP2p | PreCopy | PreCopyP2p => RunningP2p,
        },
        Running => match target {
            Error => return None,
            Running => Running,
            PreCopy => PreCopy,
            Stop | StopCopy | Resuming | RunningP2p | PreCopyP2p => RunningP2p,
        },
        StopCopy => match target {
            Error | PreCopy | PreCopyP2p => return None,
            StopCopy => StopCopy,
            Stop | Running | Resuming | RunningP2p => Stop,
        },
        Resuming => match target {
            Error => return None,
            Resuming => Resuming,
            Stop | Running | StopCopy | RunningP2p | PreCopy | PreCopyP2p => Stop,
        },
        RunningP2p => match target {
            Error => return None,
            RunningP2p => RunningP2p,
            Running | PreCopy => Running,
            PreCopyP2p => PreCopyP2p,
            Stop | StopCopy | Resuming => Stop,
        },
        PreCopy => match target {
            Error => return None,
            PreCopy => PreCopy,
            PreCopyP2p | StopCopy => PreCopyP2p,
            Stop | Running | Resuming | RunningP2p => Running,
        },
        PreCopyP2p => match target {
            Error => return None,
            PreCopyP2p => PreCopyP2p,
            PreCopy => PreCopy,
            StopCopy => StopCopy,
            Stop | Running | Resuming | RunningP2p => RunningP2p,
        },
    };

    Some(next)
}

/// Returns the next state on the path from `cur` to `target`, `cur` itself when they are equal.
///
/// The step from `cur` to the returned state is one of [`arcs`]. Repeated calls from there lead to
/// `target`.
///
/// Returns [`None`] if the uAPI refuses the request: either state is `ERROR` or not supported by
/// this shape, or a saving group state cannot be reached from `STOP_COPY` in the same session.
///
/// Corresponds to the C `vfio_mig_get_next_state`, which warns if `cur` is `ERROR`.
pub fn next(flags: Flags, cur: State, target: State) -> Option<State> {
    if !flags.has(cur) || !flags.has(target) {
        return None;
    }

    // States that this shape does not have are skipped: the driver gets an arc to the next state
    // after them.
    let mut next = step(cur, target)?;
    while !flags.has(next) {
        next = step(next, target)?;
    }
    Some(next)
}

/// Returns whether the arc starts a data transfer session, that is, returns a new `data_fd`.
pub fn opens_session(from: State, to: State) -> bool {
    matches!(
        (from, to),
        (State::Running, State::PreCopy)
            | (State::RunningP2p, State::PreCopyP2p)
            | (State::Stop, State::StopCopy)
            | (State::Stop, State::Resuming)
    )
}

/// Returns whether the arc terminates the data transfer session.
pub fn ends_session(from: State, to: State) -> bool {
    matches!(
        (from, to),
        (State::PreCopy, State::Running)
            | (State::PreCopyP2p, State::RunningP2p)
            | (State::StopCopy, State::Stop)
            | (State::Resuming, State::Stop)
    )
}
