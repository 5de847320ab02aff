// SPDX-License-Identifier: GPL-2.0

//! Tests of the state machine against the text of the uAPI.

use vfio_host_tests::{
    fsm::{
        Flags,
        State,
        State::*, //
    },
    paths::{
        arcs,
        ends_session,
        next,
        opens_session, //
    },
};

/// Returns the whole path that [`next`] walks, both ends included.
fn walk(flags: Flags, from: State, to: State) -> Option<Vec<State>> {
    let mut path = vec![from];

    while *path.last().unwrap() != to {
        assert!(
            path.len() <= State::ALL.len(),
            "{from:?} -> {to:?} turns in circles"
        );
        path.push(next(flags, *path.last().unwrap(), to)?);
    }
    Some(path)
}

/// Returns whether the path rule of the uAPI permits `path`.
fn permitted(path: &[State]) -> bool {
    let [from, interior @ .., to] = path else {
        return false;
    };

    if from.is_saving() && to.is_saving() {
        // The session continues, so the path stays in the group that shares it.
        interior.iter().all(|state| state.is_saving())
    } else {
        interior.iter().all(|state| !state.is_saving())
    }
}

/// Returns all shortest paths from `from` to `to` along `arcs` that are permitted.
fn search(flags: Flags, from: State, to: State) -> Vec<Vec<State>> {
    let mut paths = vec![vec![from]];

    for _ in State::ALL {
        let mut longer = Vec::new();

        for path in paths {
            for (_, end) in arcs(flags).filter(|(start, _)| path.last() == Some(start)) {
                if !path.contains(&end) {
                    longer.push([path.as_slice(), &[end]].concat());
                }
            }
        }

        let found: Vec<_> = longer
            .iter()
            .filter(|path| path.last() == Some(&to) && permitted(path))
            .cloned()
            .collect();
        if !found.is_empty() {
            return found;
        }
        paths = longer;
    }
    Vec::new()
}

/// The table equals the result of a search along the arcs, for all pairs and shapes.
#[test]
fn table_matches_the_path_rule() {
    for flags in Flags::ALL {
        for from in State::ALL {
            for to in State::ALL {
                let pair = format!("{flags:?} {from:?} -> {to:?}");

                if !flags.has(from) || !flags.has(to) {
                    assert_eq!(next(flags, from, to), None, "{pair}");
                    continue;
                }
                if from == to {
                    assert_eq!(next(flags, from, to), Some(to), "{pair}");
                    continue;
                }
                match search(flags, from, to).as_slice() {
                    [] => assert_eq!(next(flags, from, to), None, "{pair}"),
                    [path] => assert_eq!(walk(flags, from, to).as_ref(), Some(path), "{pair}"),
                    paths => panic!("{pair}: the rule leaves a choice: {paths:?}"),
                }
            }
        }
    }
}

/// Asserts that both lists have the same arcs, each of them once.
fn assert_same_arcs(flags: Flags, mut expected: Vec<(State, State)>) {
    let key = |(from, to): &(State, State)| (from.as_raw(), to.as_raw());
    let mut got: Vec<_> = arcs(flags).collect();

    got.sort_by_key(key);
    expected.sort_by_key(key);
    assert_eq!(got, expected, "{flags:?}");
}

/// The arcs are those that the comment in `vfio_mig_get_next_state` requires of a driver.
#[test]
fn arcs_match_the_uapi() {
    // "The coding in this table requires the driver to implement the following FSM arcs".
    let always = vec![
        (Resuming, Stop),
        (Stop, Resuming),
        (Stop, StopCopy),
        (StopCopy, Stop),
    ];
    // "If P2P is supported then the driver must also implement these FSM arcs".
    let p2p = vec![
        (Running, RunningP2p),
        (RunningP2p, Running),
        (RunningP2p, Stop),
        (Stop, RunningP2p),
    ];
    // "If precopy is supported then the driver must support these additional FSM arcs".
    let pre_copy = vec![(Running, PreCopy), (PreCopy, Running), (PreCopy, StopCopy)];
    // "However, if precopy and P2P are supported together then the driver must support these
    // additional arcs beyond the P2P arcs above".
    let both = vec![
        (PreCopy, Running),
        (PreCopy, PreCopyP2p),
        (PreCopyP2p, PreCopy),
        (PreCopyP2p, RunningP2p),
        (PreCopyP2p, StopCopy),
        (Running, PreCopy),
        (RunningP2p, PreCopyP2p),
    ];
    // "Without P2P and precopy the driver must implement". Without P2P alone it is the same, since
    // the table skips RUNNING_P2P in any case.
    let without_p2p = vec![(Running, Stop), (Stop, Running)];

    assert_same_arcs(
        Flags::STOP_COPY,
        [always.clone(), without_p2p.clone()].concat(),
    );
    assert_same_arcs(
        Flags::STOP_COPY.with_p2p(),
        [always.clone(), p2p.clone()].concat(),
    );
    assert_same_arcs(
        Flags::STOP_COPY.with_pre_copy(),
        [always.clone(), without_p2p, pre_copy].concat(),
    );
    assert_same_arcs(
        Flags::STOP_COPY.with_p2p().with_pre_copy(),
        [always, p2p, both].concat(),
    );
    assert_eq!(
        arcs(Flags::STOP_COPY.with_p2p().with_pre_copy()).count(),
        15
    );
}

/// The combination transitions are those that the comment in `vfio_mig_get_next_state` lists.
#[test]
fn combinations_match_the_uapi() {
    let flags = Flags::STOP_COPY.with_p2p().with_pre_copy();
    let combinations: &[&[State]] = &[
        &[PreCopy, PreCopyP2p, StopCopy],
        &[PreCopy, Running, RunningP2p],
        &[PreCopy, Running, RunningP2p, Stop],
        &[PreCopy, Running, RunningP2p, Stop, Resuming],
        &[PreCopyP2p, RunningP2p, Running],
        &[PreCopyP2p, RunningP2p, Stop],
        &[PreCopyP2p, RunningP2p, Stop, Resuming],
        &[Resuming, Stop, RunningP2p],
        &[Resuming, Stop, RunningP2p, PreCopyP2p],
        &[Resuming, Stop, RunningP2p, Running],
        &[Resuming, Stop, RunningP2p, Running, PreCopy],
        &[Resuming, Stop, StopCopy],
        &[Running, RunningP2p, PreCopyP2p],
        &[Running, RunningP2p, Stop],
        &[Running, RunningP2p, Stop, Resuming],
        &[Running, RunningP2p, Stop, StopCopy],
        &[RunningP2p, Running, PreCopy],
        &[RunningP2p, Stop, Resuming],
        &[RunningP2p, Stop, StopCopy],
        &[Stop, RunningP2p, PreCopyP2p],
        &[Stop, RunningP2p, Running],
        &[Stop, RunningP2p, Running, PreCopy],
        &[StopCopy, Stop, Resuming],
        &[StopCopy, Stop, RunningP2p],
        &[StopCopy, Stop, RunningP2p, Running],
    ];
    let blocked = [(StopCopy, PreCopy), (StopCopy, PreCopyP2p)];
    let mut left: Vec<_> = State::ALL
        .into_iter()
        .flat_map(|from| State::ALL.map(|to| (from, to)))
        .filter(|&(from, to)| flags.has(from) && flags.has(to) && from != to)
        .collect();

    for path in combinations {
        let (from, to) = (path[0], *path.last().unwrap());

        assert_eq!(walk(flags, from, to).as_deref(), Some(*path));
        left.retain(|pair| *pair != (from, to));
    }
    for (from, to) in blocked {
        assert_eq!(next(flags, from, to), None);
        left.retain(|pair| *pair != (from, to));
    }
    // A transition that the text does not list as a combination is an arc.
    for &(from, to) in &left {
        assert_eq!(next(flags, from, to), Some(to));
    }
    assert_same_arcs(flags, left);
}

/// The first steps of a shape without P2P follow from skipping its states.
#[test]
fn shapes_without_p2p_skip_states() {
    for flags in [Flags::STOP_COPY, Flags::STOP_COPY.with_pre_copy()] {
        assert_eq!(next(flags, Running, StopCopy), Some(Stop));
        assert_eq!(next(flags, Stop, Running), Some(Running));
        assert_eq!(next(flags, Running, RunningP2p), None);
        assert_eq!(next(flags, RunningP2p, Running), None);
    }
    let flags = Flags::STOP_COPY.with_pre_copy();

    assert_eq!(next(flags, PreCopy, StopCopy), Some(StopCopy));
    assert_eq!(next(flags, Stop, PreCopy), Some(Running));
    assert_eq!(next(flags, StopCopy, PreCopy), None);
}

/// `ERROR` is neither a target nor a state to start from.
#[test]
fn error_is_refused() {
    for flags in Flags::ALL {
        for state in State::ALL {
            assert_eq!(next(flags, Error, state), None);
            assert_eq!(next(flags, state, Error), None);
        }
        assert!(arcs(flags).all(|(from, to)| from != Error && to != Error));
    }
}

/// Sessions begin and end where a state with a session is entered and left.
#[test]
fn sessions_belong_to_groups() {
    let group = |state: State| match state {
        PreCopy | PreCopyP2p | StopCopy => Some("saving"),
        Resuming => Some("resuming"),
        _ => None,
    };

    for flags in Flags::ALL {
        for (from, to) in arcs(flags) {
            let opens = group(to).is_some() && group(from) != group(to);
            let ends = group(from).is_some() && group(from) != group(to);

            assert_eq!(opens_session(from, to), opens, "{from:?} -> {to:?}");
            assert_eq!(ends_session(from, to), ends, "{from:?} -> {to:?}");
            assert!(!(opens && ends), "{from:?} -> {to:?} replaces a session");
        }
    }
    for state in State::ALL {
        assert!(!opens_session(state, state));
        assert!(!ends_session(state, state));
    }
    let opening: Vec<_> = arcs(Flags::STOP_COPY.with_p2p().with_pre_copy())
        .filter(|&(from, to)| opens_session(from, to))
        .collect();
    assert_eq!(opening.len(), 4);
}

/// The values are those of `enum vfio_device_mig_state`.
#[test]
fn state_values_match_the_header() {
    let values = [
        (0, Error),
        (1, Stop),
        (2, Running),
        (3, StopCopy),
        (4, Resuming),
        (5, RunningP2p),
        (6, PreCopy),
        (7, PreCopyP2p),
    ];

    for ((raw, state), listed) in values.into_iter().zip(State::ALL) {
        assert_eq!(state.as_raw(), raw);
        assert_eq!(State::from_raw(raw), Some(state));
        assert_eq!(state, listed);
    }
    for raw in [8, 9, 0x100, 0x8000_0002, u32::MAX] {
        assert_eq!(State::from_raw(raw), None);
    }
}

/// The groups of states are those of the text.
#[test]
fn states_know_their_groups() {
    for state in State::ALL {
        let saving = [PreCopy, PreCopyP2p, StopCopy].contains(&state);
        let pre_copy = [PreCopy, PreCopyP2p].contains(&state);
        let runs = [Running, RunningP2p, PreCopy, PreCopyP2p].contains(&state);

        assert_eq!(state.is_saving(), saving, "{state:?}");
        assert_eq!(state.is_pre_copy(), pre_copy, "{state:?}");
        assert_eq!(state.runs(), runs, "{state:?}");
    }
}

/// Exactly the four combinations of flags that the uAPI defines are shapes.
#[test]
fn flags_are_the_four_shapes() {
    for raw in 0..64 {
        let legal = [1, 3, 5, 7].contains(&raw);

        assert_eq!(
            Flags::from_raw(raw).map(Flags::as_raw),
            legal.then_some(raw)
        );
    }
    for raw in [u64::MAX, 1 << 32 | 1, 1 << 63 | 7] {
        assert_eq!(Flags::from_raw(raw), None);
    }
    assert_eq!(Flags::ALL.map(Flags::as_raw), [1, 3, 5, 7]);
    assert_eq!(Flags::from_raw(1), Some(Flags::STOP_COPY));
    assert_eq!(Flags::from_raw(3), Some(Flags::STOP_COPY.with_p2p()));
    assert_eq!(Flags::from_raw(5), Some(Flags::STOP_COPY.with_pre_copy()));
    for flags in Flags::ALL {
        assert_eq!(flags.has(RunningP2p), flags.p2p());
        assert_eq!(flags.has(PreCopy), flags.pre_copy());
        assert_eq!(flags.has(PreCopyP2p), flags.p2p() && flags.pre_copy());
        assert!([Stop, Running, StopCopy, Resuming]
            .into_iter()
            .all(|state| flags.has(state)));
    }
}

/// A shape is within another one if the other one supports all its states.
#[test]
fn shapes_are_within_larger_ones() {
    for flags in Flags::ALL {
        for other in Flags::ALL {
            let within = State::ALL
                .into_iter()
                .all(|state| !flags.has(state) || other.has(state));

            assert_eq!(flags.is_within(other), within, "{flags:?} {other:?}");
        }
    }
}
