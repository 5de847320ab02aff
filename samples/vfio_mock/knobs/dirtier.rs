// SPDX-License-Identifier: GPL-2.0

//! Selects the pages that a device dirties by itself: how many until a time, and which.
//!
//! This file uses `core` alone, so that the same source runs in the kernel and in host tests.
//!
//! All times are in nanoseconds. A new rate takes effect with a page at once. From then on, a page
//! is due whenever its size, at that rate, has passed. How often [`Dirtier::due`] is called has no
//! influence, so the rate is exact.

/// Maximum rate in bytes per second. Its product with a second in nanoseconds has 64 bits.
pub const MAX_RATE: u64 = 1 << 34;

const SECOND: u64 = 1_000_000_000;

/// Order in which pages become dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// All with the same probability.
    Random,
    /// Nine of ten pages from the first tenth of the pages, the others like [`Self::Random`].
    Hot,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Self; 3] = [Self::Sequential, Self::Random, Self::Hot];

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Hot => "hot",
        }
    }
}

/// Selects pages to dirty.
#[derive(Clone, Debug)]
pub struct Dirtier {
    /// Order of the pages.
    pub pattern: Pattern,
    /// Size of a page in bytes.
    page: u64,
    /// Rate in bytes per second.
    rate: u64,
    /// Start of the rate.
    since: u64,
    /// Number of pages of this rate that are done.
    done: u64,
    /// Number of pages of earlier rates to do.
    owed: u64,
    /// Next page of [`Pattern::Sequential`].
    next: u64,
    /// State of the random numbers: xorshift64.
    random: u64,
}

impl Dirtier {
    /// Creates a dirtier with the rate 0, for pages of `page` bytes.
    pub const fn new(page: u64) -> Self {
        Self {
            pattern: Pattern::Sequential,
            page,
            rate: 0,
            since: 0,
            done: 0,
            owed: 0,
            next: 0,
            random: 1,
        }
    }

    /// Returns the rate in bytes per second.
    pub const fn rate(&self) -> u64 {
        self.rate
    }

    /// Sets the rate. Returns [`None`], and changes nothing, if it is above [`MAX_RATE`].
    pub fn set_rate(&mut self, rate: u64, now: u64) -> Option<()> {
        if rate > MAX_RATE {
            return None;
        }
        self.owed = self.owed.saturating_add(self.passed(now));
        self.rate = rate;
        self.since = now;
        self.done = 0;
        Some(())
    }

    /// Starts again with the first page. No page is due from before.
    pub fn restart(&mut self, now: u64) {
        self.since = now;
        self.done = 0;
        self.owed = 0;
        self.next = 0;
    }

    /// Returns the number of pages of this rate until now, without those that are done.
    fn passed(&self, now: u64) -> u64 {
        if self.rate == 0 {
            return 0;
        }
        let time = now.saturating_sub(self.since);
        let bytes = (time / SECOND)
            .saturating_mul(self.rate)
            .saturating_add(time % SECOND * self.rate / SECOND);
        (bytes / self.page + 1).saturating_sub(self.done)
    }

    /// Returns the number of pages to dirty now. They count as done.
    pub fn due(&mut self, now: u64) -> u64 {
        let passed = self.passed(now);
        self.done += passed;
        passed.saturating_add(core::mem::take(&mut self.owed))
    }

    /// Returns the time until the next page is due, or [`None`] if the rate is 0.
    pub fn wait(&self, now: u64) -> Option<u64> {
        if self.rate == 0 {
            return None;
        }
        let bytes = self.done.saturating_mul(self.page);
        let time = (bytes / self.rate)
            .saturating_mul(SECOND)
            .saturating_add((bytes % self.rate * SECOND).div_ceil(self.rate));
        Some(self.since.saturating_add(time).saturating_sub(now))
    }

    /// Selects a page to dirty, of the first `pages` pages, which must not be zero.
    pub fn pick(&mut self, pages: u64) -> u64 {
        if self.pattern == Pattern::Sequential {
            let page = self.next % pages;
            self.next = page + 1;
            return page;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let hot = self.pattern == Pattern::Hot && self.random % 10 != 0;
        let pages = if hot { pages.div_ceil(10) } else { pages };
        self.random / 10 % pages
    }
}
