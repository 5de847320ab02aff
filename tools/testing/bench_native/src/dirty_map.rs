// SPDX-License-Identifier: GPL-2.0

//! The dirty map, compared with a bit map of one level and with compressed bit maps.

use crate::{
    random,
    timed,
    Figure,
    Way, //
};
use roaring::RoaringBitmap;
use std::{
    hint::black_box,
    rc::Rc,
    time::{
        Duration,
        Instant, //
    },
};
use vfio_host_tests::dirty_map::{
    leaf_words,
    summary_words,
    DirtyMap, //
};

/// Number of pages to mark, if there are more.
const MARKS: usize = 1 << 17;

/// A set of pages.
trait Map {
    fn new(pages: usize) -> Self;
    fn mark(&mut self, page: u32);
    /// Calls `page` with the first page of each run and with the number of its pages.
    fn scan(&self, run: impl FnMut(usize, usize));
    /// The same, and makes the pages clean.
    fn take(&mut self, run: impl FnMut(usize, usize));
}

impl Map for DirtyMap<Vec<u64>> {
    fn new(pages: usize) -> Self {
        let leaf = vec![0; leaf_words(pages)];
        let summary = vec![0; summary_words(pages)];

        Self::new(pages, leaf, summary).expect("the lengths fit")
    }

    fn mark(&mut self, page: u32) {
        self.mark_range(page as usize, 1);
    }

    fn scan(&self, mut call: impl FnMut(usize, usize)) {
        let mut from = 0;

        while let Some(run) = self.next_run(from) {
            call(run.first, run.count);
            from = run.first + run.count;
        }
    }

    fn take(&mut self, mut call: impl FnMut(usize, usize)) {
        let mut from = 0;

        while let Some(run) = self.take_run(from) {
            call(run.first, run.count);
            from = run.first + run.count;
        }
    }
}

/// A bit for each page.
struct Plain(Vec<u64>);

/// Calls `call` with the runs of a word.
fn runs(index: usize, mut word: u64, mut call: impl FnMut(usize, usize)) {
    while word != 0 {
        let first = word.trailing_zeros();
        let count = (word >> first).trailing_ones();

        call(index * 64 + first as usize, count as usize);
        word &= u64::MAX.checked_shl(first + count).unwrap_or(0);
    }
}

impl Map for Plain {
    fn new(pages: usize) -> Self {
        Self(vec![0; pages.div_ceil(64)])
    }

    fn mark(&mut self, page: u32) {
        self.0[page as usize / 64] |= 1 << (page % 64);
    }

    fn scan(&self, mut call: impl FnMut(usize, usize)) {
        for (index, word) in self.0.iter().enumerate() {
            runs(index, *word, &mut call);
        }
    }

    fn take(&mut self, mut call: impl FnMut(usize, usize)) {
        for (index, word) in self.0.iter_mut().enumerate() {
            runs(index, std::mem::take(word), &mut call);
        }
    }
}

impl Map for RoaringBitmap {
    fn new(_pages: usize) -> Self {
        Self::new()
    }

    fn mark(&mut self, page: u32) {
        self.insert(page);
    }

    // It has no access to runs.
    fn scan(&self, mut call: impl FnMut(usize, usize)) {
        for page in self {
            call(page as usize, 1);
        }
    }

    fn take(&mut self, call: impl FnMut(usize, usize)) {
        self.scan(call);
        self.clear();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Mark,
    Scan,
    Take,
}

/// Measures a method, not what has to be done before and after it.
fn measured<M: Map + 'static>(
    name: &'static str,
    call: Call,
    size: usize,
    dirty: &Rc<[u32]>,
) -> Way {
    let dirty = dirty.clone();
    let mut map = M::new(size);
    let mark = move |map: &mut M| {
        let start = Instant::now();

        dirty.iter().for_each(|page| map.mark(*page));
        start.elapsed()
    };
    let report = |first: usize, count: usize| {
        black_box((first, count));
    };

    if call == Call::Scan {
        mark(&mut map);
    }
    timed(name, move || {
        let marked = match call {
            Call::Scan => Duration::ZERO,
            Call::Mark | Call::Take => mark(&mut map),
        };
        let start = Instant::now();

        match call {
            Call::Scan => map.scan(report),
            Call::Mark | Call::Take => map.take(report),
        }
        match call {
            Call::Mark => marked,
            Call::Scan | Call::Take => start.elapsed(),
        }
    })
}

fn ways(call: Call, size: usize, dirty: &Rc<[u32]>) -> Vec<Way> {
    vec![
        measured::<Plain>("bit map", call, size, dirty),
        measured::<DirtyMap<Vec<u64>>>("DirtyMap", call, size, dirty),
        measured::<RoaringBitmap>("roaring", call, size, dirty),
    ]
}

pub(crate) fn figures() -> Vec<Figure> {
    let mut figures = Vec::new();

    for gib in [1, 64] {
        let size = gib << 18;

        for (share, name) in [(10_000, "0.01"), (100, "1"), (2, "50")] {
            // Each page once, in no order.
            let mut pages: Vec<(u64, u32)> = random(2).zip(0..size as u32).collect();
            pages.sort_unstable();
            let mut dirty: Vec<u32> = pages.iter().map(|(_, page)| *page).collect();
            dirty.truncate(size / share);
            let first: Rc<[u32]> = dirty.iter().copied().take(MARKS).collect();
            // It is faster to mark them in order.
            dirty.sort_unstable();
            let dirty: Rc<[u32]> = dirty.into();

            for (call, verb, dirty) in [
                (Call::Mark, "mark", &first),
                (Call::Scan, "scan", &dirty),
                (Call::Take, "take", &dirty),
            ] {
                figures.push(Figure {
                    name: format!("{verb} {name} % of {gib} GiB"),
                    work: dirty.len() as f64,
                    unit: "dirty page",
                    ways: ways(call, size, dirty),
                });
            }
        }
    }
    figures
}
