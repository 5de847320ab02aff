// SPDX-License-Identifier: GPL-2.0

//! What can go wrong, as a sentence and an exit code.

use std::fmt;

/// Why there is no migrated device.
#[derive(Debug)]
pub(crate) enum Error {
    /// The arguments make no sense.
    Usage(String),
    /// A device cannot be attached, or cannot migrate.
    Attach(String),
    /// A device refused a step of the migration.
    Migration(String),
    /// The stream was read by nobody: the target's error says why.
    Unread,
    /// The devices hold different bytes after the migration.
    Differ(String),
    /// The record or the picture could not be written.
    Output(String),
    /// The user asked to stop, by a signal.
    Interrupted,
}

impl Error {
    /// The exit code of the program, as `--help` tells them.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Error::Migration(_) | Error::Unread => 1,
            Error::Usage(_) => 2,
            Error::Attach(_) => 3,
            Error::Differ(_) => 4,
            Error::Output(_) => 5,
            Error::Interrupted => 130,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(what)
            | Error::Attach(what)
            | Error::Migration(what)
            | Error::Differ(what)
            | Error::Output(what) => f.write_str(what),
            Error::Unread => f.write_str("target: it stopped reading the stream"),
            Error::Interrupted => f.write_str("interrupted, the source runs on"),
        }
    }
}
