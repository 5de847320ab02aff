// SPDX-License-Identifier: GPL-2.0

//! The JSON record of a migration.

use std::time::Duration;

use serde::Serialize;

/// One of the two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// The device to save.
    Source,
    /// The device to load.
    Target,
}

impl Side {
    /// Returns its name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}

/// Migration state, `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum State {
    /// Failed; only a reset leaves this state.
    Error = 0,
    /// Stopped.
    Stop,
    /// Running.
    Running,
    /// Stopped, its state is saved.
    StopCopy,
    /// Stopped, its state is loaded.
    Resuming,
    /// Running without peer-to-peer DMA.
    #[serde(rename = "RUNNING_P2P")]
    RunningP2p,
    /// Running, its state is saved.
    PreCopy,
    /// Running without peer-to-peer DMA, its state is saved.
    #[serde(rename = "PRE_COPY_P2P")]
    PreCopyP2p,
}

impl State {
    const ALL: [(State, &'static str); 8] = [
        (State::Error, "ERROR"),
        (State::Stop, "STOP"),
        (State::Running, "RUNNING"),
        (State::StopCopy, "STOP_COPY"),
        (State::Resuming, "RESUMING"),
        (State::RunningP2p, "RUNNING_P2P"),
        (State::PreCopy, "PRE_COPY"),
        (State::PreCopyP2p, "PRE_COPY_P2P"),
    ];

    /// Returns the state with this number in the uAPI.
    pub(crate) fn from_uapi(number: u32) -> Option<Self> {
        let known = Self::ALL.get(usize::try_from(number).ok()?)?;
        Some(known.0)
    }

    /// Returns its name in the uAPI.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// Change of the state of a device.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct StateChange {
    /// Seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// The device.
    pub(crate) device: Side,
    /// The new state.
    pub(crate) state: State,
}

/// Progress at one point in time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Sample {
    /// Seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// Current round, from 1; 0 in `STOP_COPY`.
    pub(crate) round: u32,
    /// `initial_bytes` of the device, `None` outside of pre-copy.
    pub(crate) initial_bytes: Option<u64>,
    /// `dirty_bytes` of the device, `None` outside of pre-copy.
    pub(crate) dirty_bytes: Option<u64>,
    /// Bytes sent through the pipe so far.
    pub(crate) sent_bytes: u64,
    /// Bytes per second sent since the last sample.
    pub(crate) send_rate: f64,
    /// Bytes per second that became dirty since the last sample.
    pub(crate) dirty_rate: Option<f64>,
    /// Expected duration of `STOP_COPY` at this point, in milliseconds.
    pub(crate) expected_downtime_ms: Option<f64>,
}

/// One round of pre-copy. It ends when the bytes that were left at its start have been read.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Round {
    /// Number of the round, from 1.
    pub(crate) round: u32,
    /// End of the round, in seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// Bytes read in this round.
    pub(crate) bytes: u64,
    /// Bytes left at the end of the round.
    pub(crate) left_bytes: u64,
    /// Bytes per second that became dirty in this round.
    pub(crate) dirty_rate: f64,
    /// The device reported new initial data.
    pub(crate) reinit: bool,
    /// Expected duration of `STOP_COPY` after this round, in milliseconds.
    pub(crate) expected_downtime_ms: Option<f64>,
}

/// Description of a device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DeviceRecord {
    /// Folder in sysfs.
    pub(crate) path: String,
    /// How it was attached.
    pub(crate) backend: &'static str,
    /// Supported `VFIO_MIGRATION_*` flags.
    pub(crate) flags: Vec<&'static str>,
    /// Verdict of the driver on this client, after the device was closed; `None` if there is none.
    pub(crate) verdict: Option<String>,
}

/// Options of the migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Asked {
    /// `--bandwidth`, in bytes per second.
    pub(crate) bandwidth: Option<u64>,
    /// `--downtime-limit`, in milliseconds.
    pub(crate) downtime_limit_ms: f64,
    /// `--max-rounds`.
    pub(crate) max_rounds: u32,
    /// `--precopy-time`, in seconds.
    pub(crate) precopy_seconds: f64,
    /// `--cancel-at-round`.
    pub(crate) cancel_at_round: Option<u32>,
    /// `--load`, the region that the load writes to.
    pub(crate) load: Option<String>,
    /// `--load-rate`, in bytes per second.
    pub(crate) load_rate: Option<u64>,
}

/// Result of the comparison of one region.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Compared {
    /// Name of the region.
    pub(crate) region: String,
    /// Number of compared bytes.
    pub(crate) bytes: u64,
    /// Number of different bytes.
    pub(crate) different: u64,
    /// Offset of the first different byte.
    pub(crate) first_different: Option<u64>,
}

/// Outcome of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// The target runs with the state of the source.
    Completed,
    /// The source continues to run, as requested.
    Cancelled,
    /// The migration failed.
    Failed,
}

/// Record of a migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    /// The program and its version.
    pub(crate) tool: &'static str,
    /// The device to save.
    pub(crate) source: DeviceRecord,
    /// The device to load.
    pub(crate) target: DeviceRecord,
    /// Options of the migration.
    pub(crate) asked: Asked,
    /// Outcome.
    pub(crate) outcome: Outcome,
    /// Reason of a failure.
    pub(crate) error: Option<String>,
    /// Duration without the comparison, in seconds.
    pub(crate) seconds: f64,
    /// Time in which neither device ran, without the comparison, in milliseconds.
    pub(crate) downtime_ms: Option<f64>,
    /// Size of the stream in bytes.
    pub(crate) bytes: u64,
    /// Bytes that the load wrote to the source.
    pub(crate) load_bytes: u64,
    /// Compared regions.
    pub(crate) compared: Vec<Compared>,
    /// State changes in the order in which they happened.
    pub(crate) states: Vec<StateChange>,
    /// Rounds of pre-copy.
    pub(crate) rounds: Vec<Round>,
    /// Progress over time.
    pub(crate) samples: Vec<Sample>,
}

/// Converts a duration to milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_numbers_and_names_match_the_uapi() {
        for (number, (state, name)) in State::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, number);
            assert_eq!(State::from_uapi(number as u32), Some(state));
            assert_eq!(state.name(), name);
            assert_eq!(
                serde_json::to_value(state).expect("a state is a string"),
                name
            );
        }
        assert_eq!(State::from_uapi(8), None);
        assert_eq!(State::from_uapi(u32::MAX), None);
    }
}
