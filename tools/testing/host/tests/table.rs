// SPDX-License-Identifier: GPL-2.0

//! Tests of the page table of the software IOMMU against a map.

use proptest::prelude::*;
use std::{
    cell::Cell,
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    ops::{
        Deref,
        DerefMut, //
    },
};
use vfio_host_tests::table::{
    Access,
    Fault,
    MapError,
    Memory,
    Missing,
    Root,
    Run,
    Spare,
    Table,
    FANOUT,
    FRAMES,
    PAGES, //
};

const LEAF: u64 = FANOUT as u64;
const LOWER: u64 = LEAF * LEAF;
const MIDDLE: u64 = LOWER * LEAF;

const READ_WRITE: Access = Access {
    read: true,
    write: true,
};
const READ_ONLY: Access = Access {
    read: true,
    write: false,
};

thread_local! {
    /// Number of nodes of this thread's tables.
    static NODES: Cell<usize> = const { Cell::new(0) };
}

/// Node that is counted.
struct Node<T>(Box<T>);

impl<T> Node<T> {
    fn new(value: T) -> Self {
        NODES.set(NODES.get() + 1);
        Self(Box::new(value))
    }
}

impl<T> Drop for Node<T> {
    fn drop(&mut self) {
        NODES.set(NODES.get() - 1);
    }
}

impl<T> Deref for Node<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Node<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// Memory of the host.
struct Host;

impl Memory for Host {
    type Box<T> = Node<T>;
}

fn new_table() -> Table<Host> {
    let root: Root<Host> = std::array::from_fn(|_| (None, 0, 0));

    Table::new(Node::new(root))
}

/// Provides a node.
fn provide(missing: Missing, spare: &mut Spare<Host>) {
    match missing {
        Missing::Leaf => {
            let old = spare.leaf.replace(Node::new([0; FANOUT]));
            assert!(old.is_none());
        }
        Missing::Lower => {
            let new = std::array::from_fn(|_| (None, 0, 0));
            assert!(spare.lower.replace(Node::new(new)).is_none());
        }
        Missing::Middle => {
            let new = std::array::from_fn(|_| (None, 0, 0));
            assert!(spare.middle.replace(Node::new(new)).is_none());
        }
    }
}

/// Maps all pages, with at most `allocations` new nodes. Returns the number of mapped pages and the
/// reason for a failure.
fn map(
    table: &mut Table<Host>,
    page: u64,
    frame: u64,
    count: u64,
    access: Access,
    mut allocations: usize,
) -> (u64, Option<MapError>) {
    let mut spare = Spare::default();
    let mut done = 0;

    while done < count {
        match table.map(page + done, frame + done, count - done, access, &mut spare) {
            Ok(mapped) => {
                assert!(mapped > 0);
                assert_eq!(
                    done + mapped,
                    count.min((page + done) / LEAF * LEAF + LEAF - page)
                );
                done += mapped;
            }
            Err(MapError::Missing(missing)) if allocations > 0 => {
                allocations -= 1;
                provide(missing, &mut spare);
            }
            Err(error) => return (done, Some(error)),
        }
    }
    (done, None)
}

/// Unmaps like the core of the kernel: until a page is not mapped.
fn unmap(table: &mut Table<Host>, page: u64, count: u64) -> u64 {
    let mut done = 0;

    while done < count {
        match table.unmap(page + done, count - done) {
            0 => break,
            unmapped => done += unmapped,
        }
    }
    done
}

/// Takes all dirty pages, with room for `room` runs in each call.
fn take(table: &mut Table<Host>, first: u64, end: u64, clear: bool, room: usize) -> Vec<u64> {
    let mut runs = vec![Run::default(); room];
    let mut pages = Vec::new();
    let mut from = Some(first);

    while let Some(page) = from {
        let (count, next) = table.take_dirty(page, end, clear, &mut runs);
        for run in &runs[..count] {
            assert!(run.count > 0);
            pages.extend(run.first..run.first + run.count);
        }
        assert!(next.is_none_or(|next| next > page || count > 0));
        from = next;
    }
    pages
}

/// Mapping of a page.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mapping {
    frame: u64,
    access: Access,
    dirty: bool,
}

/// The naive model: a map of pages.
#[derive(Default)]
struct Model(BTreeMap<u64, Mapping>);

impl Model {
    /// Returns the number of nodes that the mappings need, with the root.
    fn nodes(&self) -> usize {
        let distinct = |size: u64| {
            self.0
                .keys()
                .map(|page| page / size)
                .collect::<BTreeSet<_>>()
                .len()
        };

        1 + distinct(LEAF) + distinct(LOWER) + distinct(MIDDLE)
    }

    /// Returns the new nodes that mapping some pages needs.
    fn new_nodes(&self, page: u64, count: u64) -> usize {
        let mut later = Self(self.0.clone());
        let mapping = Mapping {
            frame: 0,
            access: READ_WRITE,
            dirty: false,
        };

        later
            .0
            .extend((page..page + count).map(|page| (page, mapping)));
        later.nodes() - self.nodes()
    }

    fn translate(&self, page: u64, write: bool) -> Result<u64, Fault> {
        let mapping = self.0.get(&page).ok_or(Fault::Unmapped)?;
        let allowed = if write {
            mapping.access.write
        } else {
            mapping.access.read
        };

        allowed.then_some(mapping.frame).ok_or(Fault::Denied)
    }

    fn take(&mut self, first: u64, end: u64, clear: bool) -> Vec<u64> {
        let mut pages = Vec::new();

        for (page, mapping) in self.0.range_mut(first..end.max(first)) {
            if mapping.dirty {
                pages.push(*page);
                mapping.dirty = !clear;
            }
        }
        pages
    }
}

/// Operation on a table.
#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, u64, Access),
    MapWithout(u64, u64, usize),
    Unmap(u64, u64),
    Write(u64),
    Mark(u64),
    Take(u64, u64, bool, usize),
}

/// A page near the ends of nodes of all levels.
fn page() -> impl Strategy<Value = u64> {
    let near = prop_oneof![
        4 => Just(LEAF),
        2 => Just(LOWER),
        1 => Just(5 * LOWER),
        2 => Just(MIDDLE),
        1 => Just(PAGES - LEAF),
    ];

    prop_oneof![
        2 => 0..20u64,
        6 => (near, 0..40u64).prop_map(|(at, offset)| at - 20 + offset),
        1 => PAGES - 20..PAGES,
        1 => 0..PAGES,
    ]
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..30u64, 2 => Just(LEAF), 1 => 0..4 * LEAF]
}

fn access() -> impl Strategy<Value = Access> {
    (any::<bool>(), any::<bool>()).prop_map(|(read, write)| Access { read, write })
}

fn step() -> impl Strategy<Value = Step> {
    let frame = prop_oneof![0..100u64, 0..FRAMES];
    let room = prop_oneof![1..4usize, Just(64)];

    prop_oneof![
        6 => (page(), frame, count(), access())
            .prop_map(|(page, frame, count, access)| Step::Map(page, frame, count, access)),
        1 => (page(), count(), 0..4usize)
            .prop_map(|(page, count, allocations)| Step::MapWithout(page, count, allocations)),
        4 => (page(), count()).prop_map(|(page, count)| Step::Unmap(page, count)),
        8 => page().prop_map(Step::Write),
        1 => page().prop_map(Step::Mark),
        3 => (page(), page(), any::<bool>(), room.clone())
            .prop_map(|(first, end, clear, room)| Step::Take(first, end, clear, room)),
        2 => (any::<bool>(), room).prop_map(|(clear, room)| Step::Take(0, u64::MAX, clear, room)),
    ]
}

/// Executes a step with both, and compares the results.
fn execute(table: &mut Table<Host>, model: &mut Model, step: Step) {
    match step {
        Step::Map(page, frame, count, access) => {
            // The table checks only the rest of a leaf before it maps.
            let count = count.min(PAGES - page).min(FRAMES - frame);
            let free = (page..page + count)
                .take_while(|page| !model.0.contains_key(page))
                .count() as u64;
            let (mapped, error) = map(table, page, frame, count, access, usize::MAX);

            if free == count {
                assert_eq!((mapped, error), (count, None));
            } else {
                assert_eq!(error, Some(MapError::Occupied));
                assert!(mapped <= free && (page + free) / LEAF == (page + mapped) / LEAF);
            }
            for done in 0..mapped {
                let mapping = Mapping {
                    frame: frame + done,
                    access,
                    dirty: false,
                };
                model.0.insert(page + done, mapping);
            }
        }
        Step::MapWithout(page, count, allocations) => {
            let count = count.min(PAGES - page);
            if (page..page + count).any(|page| model.0.contains_key(&page)) {
                return;
            }
            let (mapped, error) = map(table, page, 7, count, READ_WRITE, allocations);

            if model.new_nodes(page, count) <= allocations {
                assert_eq!((mapped, error), (count, None));
            } else {
                assert!(matches!(error, Some(MapError::Missing(_))), "{error:?}");
                assert!(model.new_nodes(page, mapped) <= allocations);
            }
            for done in 0..mapped {
                let mapping = Mapping {
                    frame: 7 + done,
                    access: READ_WRITE,
                    dirty: false,
                };
                model.0.insert(page + done, mapping);
            }
        }
        Step::Unmap(page, count) => {
            let expected = (page..page + count)
                .take_while(|page| model.0.remove(page).is_some())
                .count() as u64;

            assert_eq!(unmap(table, page, count), expected);
        }
        Step::Write(page) => {
            let frame = table.translate(page, true);

            assert_eq!(frame, model.translate(page, true));
            if frame.is_ok() {
                table.mark(page);
                model
                    .0
                    .entry(page)
                    .and_modify(|mapping| mapping.dirty = true);
            }
        }
        Step::Mark(page) => {
            table.mark(page);
            model
                .0
                .entry(page)
                .and_modify(|mapping| mapping.dirty = true);
        }
        Step::Take(first, end, clear, room) => {
            assert_eq!(
                take(table, first, end, clear, room),
                model.take(first, end, clear)
            );
        }
    }
}

/// Compares all mappings, and pages next to them.
fn compare(table: &Table<Host>, model: &Model) {
    assert_eq!(NODES.get(), model.nodes());
    for page in model.0.keys() {
        for page in page.saturating_sub(1)..=page + 1 {
            let frame = model.0.get(&page).map(|mapping| mapping.frame);

            assert_eq!(table.frame(page), frame);
            assert_eq!(table.translate(page, false), model.translate(page, false));
            assert_eq!(table.translate(page, true), model.translate(page, true));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The table behaves like the model after any operations, and has no more nodes than it needs.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn table_behaves_like_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut table = new_table();
        let mut model = Model::default();

        for step in steps {
            execute(&mut table, &mut model, step);
            compare(&table, &model);
        }
        assert_eq!(take(&mut table, 0, PAGES, true, 8), model.take(0, PAGES, true));
        assert_eq!(take(&mut table, 0, PAGES, true, 8), []);
        drop(table);
        assert_eq!(NODES.get(), 0);
    }
}

/// A mapping beyond the address space or beyond the largest frame is refused.
#[test]
fn range_is_checked() {
    let mut table = new_table();
    let mut spare = Spare::default();

    for (page, frame, count) in [
        (PAGES, 0, 1),
        (PAGES - 1, 0, 2),
        (u64::MAX, 0, 1),
        (0, FRAMES, 1),
        (0, FRAMES - 1, 2),
        (0, u64::MAX, 1),
        (0, 0, u64::MAX),
    ] {
        let result = table.map(page, frame, count, READ_WRITE, &mut spare);
        assert_eq!(result, Err(MapError::Range));
    }
    assert_eq!(
        map(&mut table, PAGES - 1, FRAMES - 1, 1, READ_WRITE, 3),
        (1, None)
    );
    assert_eq!(table.frame(PAGES - 1), Some(FRAMES - 1));
    assert_eq!(table.translate(PAGES, false), Err(Fault::Unmapped));
    assert_eq!((table.frame(u64::MAX), table.unmap(u64::MAX, 1)), (None, 0));
    table.mark(u64::MAX);
    assert_eq!(take(&mut table, u64::MAX, u64::MAX, true, 1), []);
}

/// A mapping without permissions exists, but allows no access.
#[test]
fn mapping_without_permissions_is_occupied() {
    let mut table = new_table();
    let none = Access {
        read: false,
        write: false,
    };

    assert_eq!(map(&mut table, 3, 0, 1, none, 3), (1, None));
    assert_eq!(table.frame(3), Some(0));
    assert_eq!(table.translate(3, false), Err(Fault::Denied));
    assert_eq!(table.translate(3, true), Err(Fault::Denied));
    assert_eq!(
        map(&mut table, 3, 0, 1, none, 3),
        (0, Some(MapError::Occupied))
    );
}

/// A page that is mapped again is clean.
#[test]
fn dirty_state_goes_with_the_mapping() {
    let mut table = new_table();

    map(&mut table, 0, 0, LEAF, READ_WRITE, 3);
    table.mark(5);
    table.mark(6);
    // A part of the leaf, then all of it.
    assert_eq!(table.unmap(5, 1), 1);
    assert_eq!(take(&mut table, 0, PAGES, false, 8), [6]);
    map(&mut table, 5, 5, 1, READ_WRITE, 0);
    assert_eq!(take(&mut table, 0, PAGES, false, 8), [6]);
    assert_eq!(table.unmap(0, LEAF), LEAF);
    map(&mut table, 0, 0, LEAF, READ_WRITE, 3);
    assert_eq!(take(&mut table, 0, PAGES, false, 8), []);
}

/// The largest node counts as many pages as it has.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn counters_hold_a_full_table_of_64_gib() {
    let mut table = new_table();
    let pages = (64 << 30) / 4096;

    assert_eq!(
        map(&mut table, 0, 0, pages, READ_ONLY, usize::MAX),
        (pages, None)
    );
    assert_eq!(NODES.get() as u64, 1 + 1 + pages / LOWER + pages / LEAF);
    (0..pages).for_each(|page| table.mark(page));
    let mut runs = [Run::default(); 2];
    let (mut next, mut dirty) = (Some(0), 0);
    while let Some(page) = next {
        let (count, rest) = table.take_dirty(page, PAGES, true, &mut runs);
        // A call scans a part only.
        assert_eq!((count, runs[0].count), (1, LEAF * 16));
        dirty += runs[0].count;
        next = rest;
    }
    assert_eq!(dirty, pages);
    assert_eq!(table.take_dirty(0, PAGES, true, &mut runs), (0, None));
    assert_eq!(unmap(&mut table, 0, pages), pages);
    assert_eq!(NODES.get(), 1);
}
