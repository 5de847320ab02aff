// SPDX-License-Identifier: GPL-2.0

//! The finite state machine of device migration: states, shapes, arcs and the path rule.
//!
//! This file uses `core` alone, so that the same source runs in the kernel, under KUnit and in host
//! tests.
//!
//! # States
//!
//! A device that supports `VFIO_MIGRATION_STOP_COPY` has these states:
//!
//! - [`State::Running`]: the device is running normally.
//! - [`State::Stop`]: the device does not change the internal or external state.
//! - [`State::StopCopy`]: the device internal state can be read out.
//! - [`State::Resuming`]: the device is stopped and is loading a new internal state.
//! - [`State::Error`]: the device has failed and must be reset.
//!
//! `VFIO_MIGRATION_P2P` adds [`State::RunningP2p`], which is `RUNNING` except that the device
//! cannot do peer to peer DMA. `VFIO_MIGRATION_PRE_COPY` adds [`State::PreCopy`], in which the
//! device runs normally but tracks internal state changes. Both together add [`State::PreCopyP2p`].
//!
//! # Arcs and paths
//!
//! A driver implements the arcs that [`arcs`] lists. User space may request any target. If no arc
//! leads to it directly, the request is a combination of arcs, selected by these rules of the uAPI:
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

/// A state of the migration state machine.
///
/// Corresponds to the C `enum vfio_device_mig_state`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The device has failed and must be reset.
    Error = 0,

    /// The device does not change the internal or external state.
    Stop = 1,

    /// The device is running normally.
    Running = 2,

    /// The device is stopped and its internal state can be read out.
    StopCopy = 3,

    /// The device is stopped and is loading a new internal state.
    Resuming = 4,

    /// `RUNNING`, except that the device cannot do peer to peer DMA.
    RunningP2p = 5,

    /// The device is running normally but tracking internal state changes.
    PreCopy = 6,

    /// `PRE_COPY`, except that the device cannot do peer to peer DMA.
    PreCopyP2p = 7,
}

impl State {
    /// All states, in the order of their uAPI values.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// Returns the state that has the uAPI value `raw`, or [`None`] if there is none.
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Error),
            1 => Some(Self::Stop),
            2 => Some(Self::Running),
            3 => Some(Self::StopCopy),
            4 => Some(Self::Resuming),
            5 => Some(Self::RunningP2p),
            6 => Some(Self::PreCopy),
            7 => Some(Self::PreCopyP2p),
            _ => None,
        }
    }

    /// Returns the uAPI value of the state.
    pub const fn as_raw(self) -> u32 {
        self as u32
    }

    /// Returns whether the state belongs to the saving group.
    ///
    /// The states of the saving group share one data transfer session.
    pub const fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }

    /// Returns whether the device is saved while it runs.
    pub const fn is_pre_copy(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p)
    }

    /// Returns whether the device may advance its internal state.
    pub const fn runs(self) -> bool {
        matches!(
            self,
            Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p
        )
    }
}

/// The shape of a state machine: the optional states that exist.
///
/// Corresponds to the flags of the C `struct vfio_device_feature_migration`. The uAPI defines four
/// of the eight combinations of its bits, and only these four can be expressed.
///
/// # Examples
///
/// ```
/// /// The features of a device, with and without peer-to-peer DMA.
/// const ALL: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();
/// const ALONE: Flags = Flags::STOP_COPY.with_pre_copy();
/// const _: () = assert!(ALONE.is_within(ALL) && !ALL.is_within(ALONE));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// The P2P states exist.
    p2p: bool,

    /// The pre-copy states exist.
    pre_copy: bool,
}

impl Flags {
    /// `VFIO_MIGRATION_STOP_COPY`.
    const RAW_STOP_COPY: u64 = 1 << 0;
    /// `VFIO_MIGRATION_P2P`.
    const RAW_P2P: u64 = 1 << 1;
    /// `VFIO_MIGRATION_PRE_COPY`.
    const RAW_PRE_COPY: u64 = 1 << 2;

    /// `VFIO_MIGRATION_STOP_COPY`: `STOP`, `STOP_COPY` and `RESUMING` are supported.
    pub const STOP_COPY: Self = Self {
        p2p: false,
        pre_copy: false,
    };

    /// All shapes, in the order of their uAPI values.
    pub const ALL: [Self; 4] = [
        Self::STOP_COPY,
        Self::STOP_COPY.with_p2p(),
        Self::STOP_COPY.with_pre_copy(),
        Self::STOP_COPY.with_p2p().with_pre_copy(),
    ];

    /// Adds `VFIO_MIGRATION_P2P`: `RUNNING_P2P` is supported in addition.
    pub const fn with_p2p(self) -> Self {
        Self { p2p: true, ..self }
    }

    /// Adds `VFIO_MIGRATION_PRE_COPY`: `PRE_COPY`, and with P2P also `PRE_COPY_P2P`, are supported
    /// in addition.
    pub const fn with_pre_copy(self) -> Self {
        Self {
            pre_copy: true,
            ..self
        }
    }

    /// Returns the shape that has the uAPI value `raw`.
    ///
    /// Returns [`None`] if the uAPI leaves the combination undefined: `STOP_COPY` is missing or an
    /// unknown bit is set.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        let options = Self::RAW_P2P | Self::RAW_PRE_COPY;

        if raw & !options != Self::RAW_STOP_COPY {
            return None;
        }
        Some(Self {
            p2p: raw & Self::RAW_P2P != 0,
            pre_copy: raw & Self::RAW_PRE_COPY != 0,
        })
    }

    /// Returns the uAPI value of the shape.
    pub const fn as_raw(self) -> u64 {
        let mut raw = Self::RAW_STOP_COPY;

        if self.p2p {
            raw |= Self::RAW_P2P;
        }
        if self.pre_copy {
            raw |= Self::RAW_PRE_COPY;
        }
        raw
    }

    /// Returns whether the P2P states exist.
    pub const fn p2p(self) -> bool {
        self.p2p
    }

    /// Returns whether the pre-copy states exist.
    pub const fn pre_copy(self) -> bool {
        self.pre_copy
    }

    /// Returns whether `other` has every option of this shape.
    pub const fn is_within(self, other: Self) -> bool {
        (!self.p2p || other.p2p) && (!self.pre_copy || other.pre_copy)
    }

    /// Returns whether user space can request `state` of a device of this shape.
    ///
    /// A device of any shape may be in [`State::Error`], but this is not a valid target.
    pub const fn has(self, state: State) -> bool {
        match state {
            State::Error => false,
            State::Stop | State::Running | State::StopCopy | State::Resuming => true,
            State::RunningP2p => self.p2p,
            State::PreCopy => self.pre_copy,
            State::PreCopyP2p => self.p2p && self.pre_copy,
        }
    }
}

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
