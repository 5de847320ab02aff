// SPDX-License-Identifier: GPL-2.0

//! The states of device migration, and the shapes of the state machine.
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
//! User space may request any target. `vfio_mig_get_next_state()` of vfio core selects the path:
//! the shortest one, without saving group states (`PRE_COPY`, `PRE_COPY_P2P`, `STOP_COPY`) as
//! interior states of paths that enter or leave this group.
//!
//! C header: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

use core::{
    ffi::CStr,
    fmt, //
};

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

    /// Returns the name, like that in the uAPI without its prefix.
    pub const fn name(self) -> &'static CStr {
        match self {
            Self::Error => c"ERROR",
            Self::Stop => c"STOP",
            Self::Running => c"RUNNING",
            Self::StopCopy => c"STOP_COPY",
            Self::Resuming => c"RESUMING",
            Self::RunningP2p => c"RUNNING_P2P",
            Self::PreCopy => c"PRE_COPY",
            Self::PreCopyP2p => c"PRE_COPY_P2P",
        }
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

    /// Returns whether the device runs without peer-to-peer DMA.
    pub const fn is_p2p(self) -> bool {
        matches!(self, Self::RunningP2p | Self::PreCopyP2p)
    }

    /// Returns whether the device may advance its internal state.
    pub const fn runs(self) -> bool {
        matches!(
            self,
            Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name().to_str().unwrap_or_default())
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
