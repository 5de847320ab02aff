// SPDX-License-Identifier: GPL-2.0

//! Numbers that a device tells its client instead of the exact ones.
//!
//! This file uses `core` alone, so that the same source runs in the kernel and in host tests.

use core::fmt;

/// A number to tell: `exact`, a number, or a percentage of the exact one, such as `150%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Told {
    /// The exact number.
    #[default]
    Exact,
    /// This number.
    Fixed(u64),
    /// A percentage of the exact number.
    Percent(u32),
}

impl Told {
    /// Parses the name or number. Returns [`None`] if it is invalid.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_suffix('%').unwrap_or(text);
        match text {
            "exact" => Some(Self::Exact),
            _ if !digits.bytes().all(|byte| byte.is_ascii_digit()) => None,
            _ if digits.len() < text.len() => digits.parse().ok().map(Self::Percent),
            _ => digits.parse().ok().map(Self::Fixed),
        }
    }

    /// Returns the number to tell instead of `exact`.
    pub fn apply(self, exact: u64) -> u64 {
        match self {
            Self::Exact => exact,
            Self::Fixed(number) => number,
            Self::Percent(percent) => {
                let percent = u64::from(percent);
                (exact / 100)
                    .saturating_mul(percent)
                    .saturating_add(exact % 100 * percent / 100)
            }
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => f.write_str("exact"),
            Self::Fixed(number) => write!(f, "{number}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}
