// SPDX-License-Identifier: GPL-2.0

//! Page table of the software IOMMU, compared with a map.

use crate::Input;
use std::collections::BTreeMap;
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

/// Pages near the ends of nodes.
const PLACES: [u64; 6] = [
    0,
    LEAF - 8,
    LEAF * LEAF - 8,
    LEAF * LEAF * LEAF - 8,
    5 * LEAF * LEAF * LEAF - 8,
    PAGES - 16,
];

/// Memory of the host.
struct Host;

impl Memory for Host {
    type Box<T> = Box<T>;
}

/// Mapping of a page in the model.
#[derive(Clone, Copy)]
struct Mapping {
    frame: u64,
    access: Access,
    dirty: bool,
}

/// Maps a part of the pages. Returns the number of mapped pages.
fn map(
    table: &mut Table<Host>,
    page: u64,
    frame: u64,
    count: u64,
    access: Access,
) -> Result<u64, MapError> {
    let mut spare = Spare::default();

    loop {
        match table.map(page, frame, count, access, &mut spare) {
            Err(MapError::Missing(Missing::Leaf)) => spare.leaf = Some(Box::new([0; FANOUT])),
            Err(MapError::Missing(Missing::Lower)) => {
                spare.lower = Some(Box::new(std::array::from_fn(|_| (None, 0, 0))));
            }
            Err(MapError::Missing(Missing::Middle)) => {
                spare.middle = Some(Box::new(std::array::from_fn(|_| (None, 0, 0))));
            }
            result => return result,
        }
    }
}

/// Returns a page, mostly near the end of a node.
fn page(input: &mut Input<'_>) -> u64 {
    let offset = input.below(18) as u64;

    match input.below(8) {
        0 => input.number(),
        place => PLACES[place % PLACES.len()] + offset,
    }
}

/// Returns a number of pages.
fn count(input: &mut Input<'_>) -> u64 {
    match input.below(8) {
        0 => input.number(),
        1 => LEAF,
        2 => input.below(3 * FANOUT) as u64,
        _ => input.below(20) as u64,
    }
}

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let root: Root<Host> = std::array::from_fn(|_| (None, 0, 0));
    let mut table = Table::<Host>::new(Box::new(root));
    let mut model = BTreeMap::<u64, Mapping>::new();

    while !input.is_empty() {
        match input.below(8) {
            0..=2 => {
                let (page, frame, count) = (page(&mut input), input.number(), count(&mut input));
                let access = Access {
                    read: input.bool(),
                    write: input.bool(),
                };
                let end = page.saturating_add(count);
                let fits = end <= PAGES
                    && page.checked_add(count).is_some()
                    && frame.checked_add(count).is_some_and(|end| end <= FRAMES);
                let leaf_end = end.min((page / LEAF).saturating_add(1).saturating_mul(LEAF));
                let expected = if !fits {
                    Err(MapError::Range)
                } else if model.range(page..leaf_end.max(page)).next().is_some() {
                    Err(MapError::Occupied)
                } else {
                    Ok(leaf_end - page)
                };

                assert_eq!(map(&mut table, page, frame, count, access), expected);
                for done in 0..expected.unwrap_or(0) {
                    let mapping = Mapping {
                        frame: frame + done,
                        access,
                        dirty: false,
                    };
                    model.insert(page + done, mapping);
                }
            }
            3 => {
                let (page, count) = (page(&mut input), count(&mut input));
                let leaf_end = (page / LEAF).saturating_add(1).saturating_mul(LEAF);
                let end = page.saturating_add(count).min(leaf_end);
                let expected = (page..end)
                    .take_while(|page| model.remove(page).is_some())
                    .count();

                assert_eq!(table.unmap(page, count), expected as u64);
            }
            4..=6 => {
                let (page, write) = (page(&mut input), input.bool());
                let mapping = model.get_mut(&page);
                let expected = match &mapping {
                    None => Err(Fault::Unmapped),
                    Some(mapping) => {
                        let allowed = if write {
                            mapping.access.write
                        } else {
                            mapping.access.read
                        };
                        allowed.then_some(mapping.frame).ok_or(Fault::Denied)
                    }
                };

                assert_eq!(
                    table.frame(page),
                    mapping.as_ref().map(|mapping| mapping.frame)
                );
                assert_eq!(table.translate(page, write), expected);
                if let (Some(mapping), true, Ok(_)) = (mapping, write, expected) {
                    table.mark(page);
                    mapping.dirty = true;
                }
            }
            _ => {
                let (first, end, clear) = (page(&mut input), page(&mut input), input.bool());
                let mut runs = [Run::default(); 3];
                let mut from = Some(first);
                let mut taken = Vec::new();

                while let Some(page) = from {
                    let (count, next) = table.take_dirty(page, end, clear, &mut runs);
                    for run in &runs[..count] {
                        taken.extend(run.first..run.first + run.count);
                    }
                    from = next;
                }
                let dirty = model
                    .range_mut(first..end.max(first))
                    .filter(|(_, mapping)| mapping.dirty);
                let expected = dirty.map(|(page, mapping)| {
                    mapping.dirty = !clear;
                    *page
                });
                assert_eq!(taken, expected.collect::<Vec<_>>());
            }
        }
    }
}
