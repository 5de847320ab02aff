// SPDX-License-Identifier: GPL-2.0

//! Errors, each with a message and an exit code.

use std::fmt;

/// Reason why a migration did not complete.
#[derive(Debug)]
pub(crate) enum Error {
    /// Invalid arguments.
    Usage(String),
    /// A device cannot be attached, or cannot migrate.
    Attach(String),
    /// A device failed a step of the migration.
    Migration(String),
    /// The target stopped reading the stream; its own error has the reason.
    Unread,
    /// The devices have different content after the migration.
    Differ(String),
    /// The record or the picture could not be written.
    Output(String),
    /// The user interrupted the program by a signal.
    Interrupted,
}

impl Error {
    /// Returns the exit code of the program; `--help` lists them.
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
            Error::Interrupted => f.write_str("interrupted, the source continues to run"),
        }
    }
}
