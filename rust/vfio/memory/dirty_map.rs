// SPDX-License-Identifier: GPL-2.0

//! Dirty map: the pages of the state memory that still have to be streamed.
//!
//! This file uses `core` alone, so that the same source runs in the kernel, under KUnit and in host
//! tests. The caller provides the memory and the lock.
//!
//! The map has two levels. A *leaf* word has one bit for each of 64 pages. A *summary* word has one
//! bit for each of 64 leaf words, set if the leaf word is not zero. A search for the next dirty
//! page skips 4096 clean pages for each summary word. The cost of a round over the map therefore
//! depends on the number of dirty pages.
//!
//! Two counters are updated with every change: the number of dirty pages and the number of *runs*.
//! A run is a maximal sequence of dirty pages inside one leaf word. One run becomes one record of
//! the stream, so both counters together give the exact size of the pending stream without a scan
//! of the map.
//!
//! Marking all pages does not write to the bitmaps. It sets `valid` to 0: words at or beyond
//! `valid` are stale, and stand for dirty pages. Taking a page writes the words up to that page. So
//! the start of a stream takes no time in a large device, and a stream in the order of the pages
//! writes each word once.
//!
//! `kernel::bitmap` has one level, no counters and no access to whole words, and its memory comes
//! from kmalloc(), which is too little for a large device.

use core::ops::DerefMut;

/// Number of pages in a leaf word. No run crosses its boundary.
pub const PAGES_PER_WORD: usize = u64::BITS as usize;

/// Returns the length of the leaf level for `pages` pages.
pub const fn leaf_words(pages: usize) -> usize {
    pages.div_ceil(PAGES_PER_WORD)
}

/// Returns the length of the summary level for `pages` pages.
pub const fn summary_words(pages: usize) -> usize {
    leaf_words(pages).div_ceil(PAGES_PER_WORD)
}

/// A sequence of dirty pages inside one leaf word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: usize,

    /// The number of pages, from 1 to [`PAGES_PER_WORD`].
    pub count: usize,
}

/// A two-level bit map of dirty pages with counters.
///
/// # Invariants
///
/// - `leaf` has [`leaf_words`] and `summary` has [`summary_words`] of `pages` words.
/// - `valid` is at most the length of `leaf`. All pages of the words of `leaf` from there on are
///   dirty, and the content of these words has no meaning.
/// - In the valid words of `leaf`, no bit at or after `pages` is set.
/// - The bit of `summary` for a valid word of `leaf` is set if and only if that word is not zero.
///   The other bits of a word of `summary` that has such a bit are clear.
/// - `dirty` is the number of dirty pages, `runs` is the number of runs that they form.
pub struct DirtyMap<S: DerefMut<Target = [u64]>> {
    /// One bit for each page.
    leaf: S,

    /// One bit for each word of `leaf`.
    summary: S,

    /// Number of words of `leaf` that are valid.
    valid: usize,

    /// Number of pages that the map covers.
    pages: usize,

    /// Number of dirty pages.
    dirty: usize,

    /// Number of runs that the dirty pages form.
    runs: usize,
}

/// Returns a word with `count` bits set, starting at bit `first`. Bits that do not fit are ignored.
pub const fn word_mask(first: usize, count: usize) -> u64 {
    let low = if count >= PAGES_PER_WORD {
        u64::MAX
    } else {
        (1 << count) - 1
    };

    if first >= PAGES_PER_WORD {
        0
    } else {
        low << first
    }
}

/// Returns the number of bits set in `word`.
const fn word_dirty(word: u64) -> usize {
    word.count_ones() as usize
}

/// Returns the number of runs in `word`: set bits with a clear bit below them.
const fn word_runs(word: u64) -> usize {
    (word & !(word << 1)).count_ones() as usize
}

impl<S: DerefMut<Target = [u64]>> DirtyMap<S> {
    /// Creates a clean map of `pages` pages from two slices with any content.
    ///
    /// Returns [`None`] unless the slices have exactly [`leaf_words`] and [`summary_words`] words.
    pub fn new(pages: usize, mut leaf: S, mut summary: S) -> Option<Self> {
        if leaf.len() != leaf_words(pages) || summary.len() != summary_words(pages) {
            return None;
        }
        leaf.fill(0);
        summary.fill(0);

        // INVARIANT: The lengths are checked, all words are valid, and no bit is set on either
        // level.
        Some(Self {
            valid: leaf.len(),
            leaf,
            summary,
            pages,
            dirty: 0,
            runs: 0,
        })
    }

    /// Returns the number of pages that the map covers.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Returns the number of dirty pages.
    pub fn dirty(&self) -> usize {
        self.dirty
    }

    /// Returns the number of runs that the dirty pages form.
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Returns whether `page` is dirty. A page outside of the map is never dirty.
    pub fn is_dirty(&self, page: usize) -> bool {
        self.word(page / PAGES_PER_WORD) & word_mask(page % PAGES_PER_WORD, 1) != 0
    }

    /// Marks `count` pages starting at `first` and returns the number of pages that became dirty.
    ///
    /// Pages outside of the map are ignored.
    pub fn mark_range(&mut self, first: usize, count: usize) -> usize {
        let before = self.dirty;
        // The others are dirty already.
        let end = first
            .saturating_add(count)
            .min(self.pages)
            .min(self.valid * PAGES_PER_WORD);
        let mut page = first;

        while page < end {
            let index = page / PAGES_PER_WORD;
            let bit = page % PAGES_PER_WORD;
            let count = (end - page).min(PAGES_PER_WORD - bit);

            self.replace(index, self.word(index) | word_mask(bit, count));
            page += count;
        }
        self.dirty - before
    }

    /// Marks the pages in `bits`, with bit 0 for page `64 * index`, and returns the number of pages
    /// that became dirty.
    ///
    /// Pages outside of the map are ignored.
    pub fn mark_word(&mut self, index: usize, bits: u64) -> usize {
        let before = self.dirty;
        let inside = self
            .pages
            .saturating_sub(index.saturating_mul(PAGES_PER_WORD));

        self.replace(index, self.word(index) | (bits & word_mask(0, inside)));
        self.dirty - before
    }

    /// Marks all pages and returns the number of pages that became dirty.
    pub fn mark_all(&mut self) -> usize {
        let fresh = self.pages - self.dirty;

        // INVARIANT: All pages are dirty. A run ends with its word.
        self.valid = 0;
        self.dirty = self.pages;
        self.runs = self.leaf.len();
        fresh
    }

    /// Finds the first run at or after page `from`.
    ///
    /// If `from` is inside of a run, the returned run starts at `from`.
    pub fn next_run(&self, from: usize) -> Option<Run> {
        let index = from / PAGES_PER_WORD;
        let word = self.word(index) & (u64::MAX << (from % PAGES_PER_WORD));
        let (index, word) = if word != 0 {
            (index, word)
        } else {
            let index = self.next_index(index.checked_add(1)?)?;

            (index, self.word(index))
        };

        let first = word.trailing_zeros() as usize;
        let count = (word >> (first % PAGES_PER_WORD)).trailing_ones() as usize;

        Some(Run {
            first: index * PAGES_PER_WORD + first,
            count,
        })
    }

    /// Finds the same run as [`Self::next_run`], and makes its pages clean.
    pub fn take_run(&mut self, from: usize) -> Option<Run> {
        let run = self.next_run(from)?;
        let index = run.first / PAGES_PER_WORD;
        let mask = word_mask(run.first % PAGES_PER_WORD, run.count);

        self.replace(index, self.word(index) & !mask);
        Some(run)
    }

    /// Returns a leaf word with all pages dirty, 0 outside of the map.
    fn full_word(&self, index: usize) -> u64 {
        let first = index.saturating_mul(PAGES_PER_WORD);

        word_mask(0, self.pages.saturating_sub(first))
    }

    /// Returns the leaf word at `index`, 0 outside of the map.
    fn word(&self, index: usize) -> u64 {
        if index < self.valid {
            self.leaf.get(index).copied().unwrap_or(0)
        } else {
            self.full_word(index)
        }
    }

    /// Finds the first leaf word at or after `from` that is not zero.
    fn next_index(&self, from: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % PAGES_PER_WORD);
        let valid = self.valid.div_ceil(PAGES_PER_WORD);
        let summary = self.summary.iter().take(valid).enumerate();

        for (index, summary) in summary.skip(from / PAGES_PER_WORD) {
            let word = summary & mask;

            if word != 0 {
                return Some(index * PAGES_PER_WORD + word.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        let next = from.max(self.valid);

        (next < self.leaf.len()).then_some(next)
    }

    /// Makes the leaf words before `end` valid.
    fn validate(&mut self, end: usize) {
        let end = end.min(self.leaf.len());

        while self.valid < end {
            let index = self.valid;
            let bit = word_mask(index % PAGES_PER_WORD, 1);
            let full = self.full_word(index);

            if let Some(word) = self.leaf.get_mut(index) {
                *word = full;
            }
            if let Some(word) = self.summary.get_mut(index / PAGES_PER_WORD) {
                // The first bit of a word clears the others.
                *word = if bit == 1 { bit } else { *word | bit };
            }
            // INVARIANT: The word has the value that it stood for.
            self.valid += 1;
        }
    }

    /// Replaces the leaf word at `index` and updates the summary and the counters.
    fn replace(&mut self, index: usize, new: u64) {
        let old = self.word(index);

        if new == old {
            return;
        }
        self.validate(index.saturating_add(1));
        let Some(word) = self.leaf.get_mut(index) else {
            return;
        };
        let Some(summary) = self.summary.get_mut(index / PAGES_PER_WORD) else {
            return;
        };
        let bit = word_mask(index % PAGES_PER_WORD, 1);

        *word = new;
        if new != 0 {
            *summary |= bit;
        } else {
            *summary &= !bit;
        }

        // INVARIANT: The old word is subtracted from the counters, and the new word is added. The
        // counters include the old word, so nothing wraps.
        self.dirty = self
            .dirty
            .wrapping_sub(word_dirty(old))
            .wrapping_add(word_dirty(new));
        self.runs = self
            .runs
            .wrapping_sub(word_runs(old))
            .wrapping_add(word_runs(new));
    }
}
