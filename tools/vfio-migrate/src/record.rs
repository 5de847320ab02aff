// SPDX-License-Identifier: GPL-2.0

//! What is known of a migration afterwards: the JSON record.

use std::time::Duration;

use serde::Serialize;

/// Which of the two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// The device that is saved.
    Source,
    /// The device that is loaded.
    Target,
}

impl Side {
    /// The word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}

/// A migration state, `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum State {
    /// Only a reset helps.
    Error = 0,
    /// The device is stopped.
    Stop,
    /// The device works.
    Running,
    /// The device is stopped and saved.
    StopCopy,
    /// The device is stopped and loaded.
    Resuming,
    /// The device works, but starts no peer-to-peer DMA.
    #[serde(rename = "RUNNING_P2P")]
    RunningP2p,
    /// The device works and is saved.
    PreCopy,
    /// The device works, starts no peer-to-peer DMA, and is saved.
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

    /// The state that the uAPI gives this number.
    pub(crate) fn from_uapi(number: u32) -> Option<Self> {
        let known = Self::ALL.get(usize::try_from(number).ok()?)?;
        Some(known.0)
    }

    /// The name that it has in the uAPI.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// A device came into a state.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct StateChange {
    /// Seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// Whose state it is.
    pub(crate) device: Side,
    /// The new state.
    pub(crate) state: State,
}

/// How far things were at one moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Sample {
    /// Seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// The round it was in, from 1; 0 is the stream of `STOP_COPY`.
    pub(crate) round: u32,
    /// `initial_bytes` of the device, none outside of pre-copy.
    pub(crate) initial_bytes: Option<u64>,
    /// `dirty_bytes` of the device, none outside of pre-copy.
    pub(crate) dirty_bytes: Option<u64>,
    /// Bytes that went through the pipe.
    pub(crate) sent_bytes: u64,
    /// Bytes per second through the pipe since the last sample.
    pub(crate) send_rate: f64,
    /// Bytes per second that became dirty since the last sample.
    pub(crate) dirty_rate: Option<f64>,
    /// Milliseconds that `STOP_COPY` would take from here.
    pub(crate) expected_downtime_ms: Option<f64>,
}

/// One round: from the bytes that were left when it began until these were read.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Round {
    /// Its number, from 1.
    pub(crate) round: u32,
    /// When it ended, in seconds since the start of the migration.
    pub(crate) seconds: f64,
    /// Bytes read in it.
    pub(crate) bytes: u64,
    /// Bytes that were left at its end.
    pub(crate) left_bytes: u64,
    /// Bytes per second that became dirty in it.
    pub(crate) dirty_rate: f64,
    /// The device said that its initial data began anew.
    pub(crate) reinit: bool,
    /// Milliseconds that `STOP_COPY` would take after it.
    pub(crate) expected_downtime_ms: Option<f64>,
}

/// What a device is.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DeviceRecord {
    /// Its folder in sysfs.
    pub(crate) path: String,
    /// How it was attached.
    pub(crate) backend: &'static str,
    /// What it supports, by the names of `VFIO_MIGRATION_*`.
    pub(crate) flags: Vec<&'static str>,
}

/// What the user asked for.
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
    /// `--load`, the region written to.
    pub(crate) load: Option<String>,
    /// `--load-rate`, in bytes per second.
    pub(crate) load_rate: Option<u64>,
}

/// A region of both devices, after the migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Compared {
    /// Its name.
    pub(crate) region: String,
    /// Bytes compared.
    pub(crate) bytes: u64,
    /// Bytes that are different.
    pub(crate) different: u64,
    /// Where the first of them is.
    pub(crate) first_different: Option<u64>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// The target runs with the state of the source.
    Completed,
    /// The source runs on, as was asked for.
    Cancelled,
    /// Neither.
    Failed,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    /// The program and its version.
    pub(crate) tool: &'static str,
    /// The device that is saved.
    pub(crate) source: DeviceRecord,
    /// The device that is loaded.
    pub(crate) target: DeviceRecord,
    /// What the user asked for.
    pub(crate) asked: Asked,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// How long it took, without the comparison.
    pub(crate) seconds: f64,
    /// How long neither device ran, without the comparison.
    pub(crate) downtime_ms: Option<f64>,
    /// Bytes of the stream.
    pub(crate) bytes: u64,
    /// Bytes that the load wrote to the source.
    pub(crate) load_bytes: u64,
    /// The regions compared.
    pub(crate) compared: Vec<Compared>,
    /// The states, as they came.
    pub(crate) states: Vec<StateChange>,
    /// The rounds of pre-copy.
    pub(crate) rounds: Vec<Round>,
    /// How far things were, moment by moment.
    pub(crate) samples: Vec<Sample>,
}

/// A duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_numbers_and_names_of_the_uapi() {
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
