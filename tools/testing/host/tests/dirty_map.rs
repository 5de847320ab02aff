// SPDX-License-Identifier: GPL-2.0

//! Tests of the dirty map against a naive model.

use proptest::prelude::*;
use vfio_host_tests::dirty_map::{
    leaf_words,
    summary_words,
    DirtyMap,
    Run,
    PAGES_PER_WORD, //
};

/// Creates a map in memory that is not zeroed.
fn new_map(pages: usize) -> DirtyMap<Vec<u64>> {
    let leaf = vec![0x5555_aaaa_ffff_0001; leaf_words(pages)];
    let summary = vec![u64::MAX; summary_words(pages)];

    DirtyMap::new(pages, leaf, summary).unwrap()
}

/// The naive model: one `bool` for each page, everything else is counted.
struct Model(Vec<bool>);

impl Model {
    fn mark_range(&mut self, first: usize, count: usize) -> usize {
        let mut marked = 0;

        for page in self.0.iter_mut().skip(first).take(count) {
            marked += usize::from(!*page);
            *page = true;
        }
        marked
    }

    fn dirty(&self) -> usize {
        self.0.iter().filter(|page| **page).count()
    }

    fn runs(&self) -> usize {
        (0..self.0.len())
            .filter(|&page| self.0[page] && (page % PAGES_PER_WORD == 0 || !self.0[page - 1]))
            .count()
    }

    fn next_run(&self, from: usize) -> Option<Run> {
        let first = (from..self.0.len()).find(|&page| self.0[page])?;
        let boundary = (first / PAGES_PER_WORD + 1) * PAGES_PER_WORD;
        let end = boundary.min(self.0.len());
        let count = (first..end).take_while(|&page| self.0[page]).count();

        Some(Run { first, count })
    }

    fn take_run(&mut self, from: usize) -> Option<Run> {
        let run = self.next_run(from)?;

        self.0[run.first..run.first + run.count].fill(false);
        Some(run)
    }
}

/// Operation on a map.
#[derive(Clone, Debug)]
enum Step {
    MarkRange(usize, usize),
    MarkWord(usize, u64),
    MarkAll,
    TakeRun(usize),
    Drain(usize),
}

/// A number of pages that also reaches the second summary word.
fn pages() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 0..400usize,
        1 => Just(64 * 64),
        1 => 64 * 64..64 * 64 * 3usize,
    ]
}

/// Steps that also reach behind the end of a map of `pages` pages.
fn step(pages: usize) -> impl Strategy<Value = Step> {
    let page = 0..pages + 70;

    prop_oneof![
        6 => page.clone().prop_map(|page| Step::MarkRange(page, 1)),
        6 => (page.clone(), 0..200usize).prop_map(|(first, count)| Step::MarkRange(first, count)),
        1 => page.clone().prop_map(|first| Step::MarkRange(first, usize::MAX)),
        3 => (page.clone(), any::<u64>())
            .prop_map(|(page, bits)| Step::MarkWord(page / PAGES_PER_WORD, bits)),
        1 => Just(Step::MarkAll),
        6 => page.clone().prop_map(Step::TakeRun),
        2 => page.prop_map(Step::Drain),
    ]
}

/// Pages and steps for them.
fn story() -> impl Strategy<Value = (usize, Vec<Step>)> {
    pages().prop_flat_map(|pages| (Just(pages), prop::collection::vec(step(pages), 1..40)))
}

/// Compares all properties.
fn compare(map: &DirtyMap<Vec<u64>>, model: &Model) {
    let pages = model.0.len();

    assert_eq!(map.pages(), pages);
    assert_eq!(map.dirty(), model.dirty());
    assert_eq!(map.runs(), model.runs());

    // In large maps the places where words and summary words meet are enough.
    let near = |page: usize| pages < 400 || (page + 2) % PAGES_PER_WORD < 4;
    for page in (0..pages + 70).filter(|page| near(*page)) {
        assert_eq!(
            map.is_dirty(page),
            model.0.get(page) == Some(&true),
            "{page}"
        );
    }
    let sparse = |page: usize| pages < 400 || (page + 1) % (16 * PAGES_PER_WORD) < 2;
    for from in (0..pages + 70).filter(|page| sparse(*page)) {
        assert_eq!(map.next_run(from), model.next_run(from), "from {from}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The map behaves like the model after any operations.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn map_behaves_like_the_model((pages, steps) in story()) {
        let mut map = new_map(pages);
        let mut model = Model(vec![false; pages]);

        compare(&map, &model);
        for step in steps {
            match step {
                Step::MarkRange(first, count) => {
                    assert_eq!(map.mark_range(first, count), model.mark_range(first, count));
                }
                Step::MarkWord(index, bits) => {
                    let pages = (0..PAGES_PER_WORD).filter(|bit| bits >> bit & 1 != 0);
                    let marked = pages.map(|bit| model.mark_range(index * PAGES_PER_WORD + bit, 1));
                    assert_eq!(map.mark_word(index, bits), marked.sum());
                }
                Step::MarkAll => assert_eq!(map.mark_all(), model.mark_range(0, pages)),
                Step::TakeRun(from) => assert_eq!(map.take_run(from), model.take_run(from)),
                Step::Drain(from) => {
                    while let Some(run) = model.take_run(from) {
                        assert_eq!(map.take_run(from), Some(run));
                    }
                    assert_eq!(map.take_run(from), None);
                }
            }
            compare(&map, &model);
        }
    }

    /// Taking all runs takes each dirty page once, and as many runs as the counter says.
    #[test]
    fn round_takes_all_counted_pages(
        marks in prop::collection::vec((0..9000usize, 1..150usize), 0..60),
    ) {
        let mut map = new_map(9000);

        for (first, count) in marks {
            map.mark_range(first, count);
        }

        let (dirty, runs) = (map.dirty(), map.runs());
        let (mut taken_pages, mut taken_runs, mut from) = (0, 0, 0);
        while let Some(run) = map.take_run(from) {
            assert!(run.first >= from && run.count >= 1);
            assert_eq!(run.first / PAGES_PER_WORD, (run.first + run.count - 1) / PAGES_PER_WORD);
            taken_pages += run.count;
            taken_runs += 1;
            from = run.first + run.count;
            assert_eq!((map.dirty(), map.runs()), (dirty - taken_pages, runs - taken_runs));
        }
        assert_eq!((taken_pages, taken_runs), (dirty, runs));
        assert_eq!((map.dirty(), map.runs()), (0, 0));
    }
}

/// The slices must have exactly the lengths that the pages need.
#[test]
fn lengths_are_checked() {
    for (pages, leaf, summary) in [
        (0, 0, 0),
        (1, 1, 1),
        (64, 1, 1),
        (65, 2, 1),
        (4096, 64, 1),
        (4097, 65, 2),
        (262144, 4096, 64),
    ] {
        assert_eq!((leaf_words(pages), summary_words(pages)), (leaf, summary));
        assert!(DirtyMap::new(pages, vec![0; leaf], vec![0; summary]).is_some());
        assert!(DirtyMap::new(pages, vec![0; leaf + 1], vec![0; summary]).is_none());
        assert!(DirtyMap::new(pages, vec![0; leaf], vec![0; summary + 1]).is_none());
        if pages != 0 {
            assert!(DirtyMap::new(pages, vec![0; leaf - 1], vec![0; summary]).is_none());
            assert!(DirtyMap::new(pages, vec![0; leaf], vec![0; summary - 1]).is_none());
        }
    }
    assert!(leaf_words(usize::MAX) > 0 && summary_words(usize::MAX) > 0);
}

/// A map without pages has nothing to mark.
#[test]
fn no_pages() {
    let mut map = new_map(0);

    assert_eq!((map.mark_range(0, 1), map.mark_all()), (0, 0));
    assert_eq!((map.next_run(0), map.take_run(usize::MAX)), (None, None));
}

/// The largest numbers are outside of the map, not a panic.
#[test]
fn largest_numbers() {
    let mut map = new_map(130);

    assert_eq!(map.mark_range(usize::MAX, 1), 0);
    assert_eq!(map.mark_range(usize::MAX, usize::MAX), 0);
    assert_eq!(map.mark_word(usize::MAX, u64::MAX), 0);
    assert_eq!(map.mark_range(129, usize::MAX), 1);
    assert_eq!(map.mark_word(2, u64::MAX), 1);
    assert!(!map.is_dirty(usize::MAX));
    assert_eq!(map.next_run(usize::MAX), None);
    assert_eq!(map.next_run(130), None);
    assert_eq!(
        map.take_run(0),
        Some(Run {
            first: 128,
            count: 2
        })
    );
}

/// A run ends with its word, and one that is entered in the middle starts there.
#[test]
fn runs_end_with_their_word() {
    let mut map = new_map(200);

    assert_eq!(map.mark_range(60, 70), 70);
    assert_eq!((map.dirty(), map.runs()), (70, 3));
    assert_eq!(
        map.next_run(0),
        Some(Run {
            first: 60,
            count: 4
        })
    );
    assert_eq!(
        map.next_run(64),
        Some(Run {
            first: 64,
            count: 64
        })
    );
    assert_eq!(
        map.next_run(128),
        Some(Run {
            first: 128,
            count: 2
        })
    );
    assert_eq!(map.next_run(130), None);

    // The middle of a run goes, so two runs are left of it.
    assert_eq!(map.mark_range(140, 1), 1);
    assert_eq!(
        map.take_run(70),
        Some(Run {
            first: 70,
            count: 58
        })
    );
    assert_eq!((map.dirty(), map.runs()), (13, 4));
    assert_eq!(map.mark_range(66, 1), 0);
    assert_eq!(map.mark_all(), 187);
    assert_eq!((map.dirty(), map.runs()), (200, 4));
}

/// To mark all pages writes nothing. Taking a page writes its word, and those before it.
#[test]
fn all_pages_are_marked_without_a_write() {
    let (mut leaf, mut summary) = ([0; 130], [0; 3]);
    let mut map = DirtyMap::new(129 * 64 + 10, &mut leaf[..], &mut summary[..]).unwrap();

    assert_eq!(map.mark_all(), 129 * 64 + 10);
    assert_eq!(map.mark_all(), 0);
    assert_eq!(map.mark_range(0, usize::MAX), 0);
    assert_eq!(map.mark_word(129, u64::MAX), 0);
    assert_eq!(leaf, [0; 130]);
    assert_eq!(summary, [0; 3]);

    let mut map = DirtyMap::new(129 * 64 + 10, &mut leaf[..], &mut summary[..]).unwrap();
    map.mark_all();
    assert_eq!(
        map.take_run(65 * 64 + 1),
        Some(Run {
            first: 65 * 64 + 1,
            count: 63
        })
    );
    assert_eq!((map.dirty(), map.runs()), (129 * 64 + 10 - 63, 130));
    assert_eq!((leaf[64], leaf[65], leaf[66]), (u64::MAX, 1, 0));
    assert_eq!(summary, [u64::MAX, 3, 0]);
}

/// A map that was dirty in part is dirty from end to end, whatever its words are.
#[test]
fn old_words_do_not_count() {
    let mut map = new_map(70 * 64);

    for round in 1..4 {
        assert_eq!(map.mark_all(), if round == 1 { 70 * 64 } else { 66 * 64 });
        // The last round leaves the words 0, 2, 4 and 69.
        for index in (0..69).filter(|index| *index > 4 || index % 2 == 1) {
            assert_eq!(
                map.take_run(index * 64),
                Some(Run {
                    first: index * 64,
                    count: 64
                })
            );
        }
        assert_eq!((map.dirty(), map.runs()), (4 * 64, 4));
        let left = [0, 2, 4, 69].map(|index| index * 64);
        let mut from = 0;
        for first in left {
            assert_eq!(map.next_run(from), Some(Run { first, count: 64 }));
            assert!(map.is_dirty(first));
            from = first + 64;
        }
        assert_eq!(map.next_run(from), None);
    }
}

/// The map works on borrowed memory too.
#[test]
fn borrowed_memory() {
    let (mut leaf, mut summary) = ([0; 2], [0; 1]);
    let mut map = DirtyMap::new(100, &mut leaf[..], &mut summary[..]).unwrap();

    assert_eq!((map.mark_range(1, 1), map.mark_range(99, 1)), (1, 1));
    assert_eq!(leaf, [2, 1 << 35]);
    assert_eq!(summary, [3]);
}
