// SPDX-License-Identifier: GPL-2.0

//! Bytes at a limited rate.

use std::time::{Duration, Instant};

/// Tells how long to wait so that bytes go out at a rate, on average.
///
/// What was not used in time is lost: a pause is not followed by a burst.
pub(crate) struct Pace {
    rate: Option<u64>,
    due: Instant,
}

impl Pace {
    /// `rate` is in bytes per second; none is no limit.
    pub(crate) fn new(rate: Option<u64>, now: Instant) -> Self {
        Self { rate, due: now }
    }

    /// How long to wait after `bytes` went out at `now` before the next may follow.
    pub(crate) fn after(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        self.due = self.due.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        self.due - now
    }

    /// How many bytes to move at a time, so that a wait is short enough for a person.
    pub(crate) fn chunk(&self) -> usize {
        match self.rate {
            Some(rate) => (rate / 20).clamp(512, 1 << 20) as usize,
            None => 1 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rate_no_wait() {
        let now = Instant::now();
        let mut pace = Pace::new(None, now);
        assert_eq!(pace.after(usize::MAX, now), Duration::ZERO);
    }

    #[test]
    fn waits_add_up_to_the_rate() {
        let start = Instant::now();
        let mut now = start;
        let mut pace = Pace::new(Some(1000), now);
        for _ in 0..10 {
            now += pace.after(500, now);
        }
        assert_eq!(now - start, Duration::from_secs(5));
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1000), start);
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.after(500, later), Duration::from_millis(500));
    }

    #[test]
    fn chunks_are_short_in_time() {
        let now = Instant::now();
        assert_eq!(Pace::new(Some(1), now).chunk(), 512);
        assert_eq!(Pace::new(Some(1 << 20), now).chunk(), (1 << 20) / 20);
        assert_eq!(Pace::new(Some(1 << 40), now).chunk(), 1 << 20);
    }
}
