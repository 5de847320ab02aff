// SPDX-License-Identifier: GPL-2.0

//! Dirty map, compared with a set of pages.

use crate::Input;
use std::collections::BTreeSet;
use vfio_host_tests::dirty_map::{
    leaf_words,
    summary_words,
    DirtyMap,
    Run,
    PAGES_PER_WORD, //
};

/// Numbers of pages to test, around the ends of words of both levels. Few of them are large,
/// because these take longer.
const PAGES: [usize; 16] = [
    0, 1, 2, 63, 64, 65, 66, 100, 127, 128, 129, 130, 192, 200, 300, 4170,
];

/// Set of dirty pages.
struct Model {
    pages: usize,
    dirty: BTreeSet<usize>,
}

impl Model {
    fn mark_range(&mut self, first: usize, count: usize) -> usize {
        let end = first.saturating_add(count).min(self.pages);

        (first..end).filter(|page| self.dirty.insert(*page)).count()
    }

    fn runs(&self) -> usize {
        let starts = |page: &&usize| {
            *page % PAGES_PER_WORD == 0 || !self.dirty.contains(&(*page).wrapping_sub(1))
        };

        self.dirty.iter().filter(starts).count()
    }

    fn next_run(&self, from: usize) -> Option<Run> {
        let first = *self.dirty.range(from..).next()?;
        let end = (first / PAGES_PER_WORD + 1) * PAGES_PER_WORD;
        let count = (first..end).take_while(|page| self.dirty.contains(page));

        Some(Run {
            first,
            count: count.count(),
        })
    }
}

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let pages = input.one_of(&PAGES);
    let rubbish = input.number();
    let leaf = vec![rubbish; leaf_words(pages)];
    let summary = vec![!rubbish; summary_words(pages)];
    let mut map = DirtyMap::new(pages, leaf, summary).expect("the lengths fit");
    let mut model = Model {
        pages,
        dirty: BTreeSet::new(),
    };

    while !input.is_empty() {
        match input.below(7) {
            0 | 1 => {
                let page = input.below(pages + 70);

                assert_eq!(map.mark_range(page, 1), model.mark_range(page, 1));
            }
            2 | 3 => {
                let (first, count) = (input.below(pages + 70), input.number() as usize);

                assert_eq!(map.mark_range(first, count), model.mark_range(first, count));
            }
            4 => {
                assert_eq!(map.mark_all(), model.mark_range(0, pages));
            }
            5 => {
                let from = input.number() as usize;
                let run = model.next_run(from);

                assert_eq!(map.next_run(from), run);
                assert_eq!(map.take_run(from), run);
                if let Some(run) = run {
                    (run.first..run.first + run.count).for_each(|page| {
                        model.dirty.remove(&page);
                    });
                }
            }
            _ => {
                // Compare everything.
                let mut from = 0;

                for page in 0..pages + 70 {
                    assert_eq!(map.is_dirty(page), model.dirty.contains(&page));
                }
                while let Some(run) = map.next_run(from) {
                    assert_eq!(model.next_run(from), Some(run));
                    from = run.first + run.count;
                }
                assert_eq!(model.next_run(from), None);
                assert_eq!(map.runs(), model.runs());
            }
        }
        assert_eq!(map.pages(), pages);
        assert_eq!(map.dirty(), model.dirty.len());
        // Counting runs is slow.
        if pages <= 300 {
            assert_eq!(map.runs(), model.runs());
        }
    }
}
