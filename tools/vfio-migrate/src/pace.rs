// SPDX-License-Identifier: GPL-2.0

//! Rate limit.

use std::time::{Duration, Instant};

/// Rate limiter, which computes how long to wait between transfers.
///
/// Unused bandwidth is lost: a pause is not followed by a burst.
pub(crate) struct Pace {
    rate: Option<u64>,
    due: Instant,
}

impl Pace {
    /// Creates a limiter for `rate` bytes per second; `None` means no limit.
    pub(crate) fn new(rate: Option<u64>, now: Instant) -> Self {
        Self { rate, due: now }
    }

    /// Returns how long to wait after `bytes` were sent at `now` before sending more.
    pub(crate) fn after(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        self.due = self.due.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        self.due - now
    }

    /// Returns how many bytes to send at a time, so that each wait is about 50 ms.
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
    fn no_rate_means_no_wait() {
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
    fn pause_is_not_followed_by_a_burst() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1000), start);
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.after(500, later), Duration::from_millis(500));
    }

    #[test]
    fn chunk_size_follows_the_rate() {
        let now = Instant::now();
        assert_eq!(Pace::new(Some(1), now).chunk(), 512);
        assert_eq!(Pace::new(Some(1 << 20), now).chunk(), (1 << 20) / 20);
        assert_eq!(Pace::new(Some(1 << 40), now).chunk(), 1 << 20);
    }
}
