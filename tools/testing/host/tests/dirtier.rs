// SPDX-License-Identifier: GPL-2.0

//! Tests of the selection of pages that the mock device dirties by itself.

use proptest::prelude::*;
use vfio_host_tests::dirtier::{
    Dirtier,
    Pattern,
    MAX_RATE, //
};

const PAGE: u64 = 4096;
const SECOND: u64 = 1_000_000_000;

/// The number of pages of a rate after a time.
fn pages(rate: u64, time: u64) -> u64 {
    match rate {
        0 => 0,
        _ => (u128::from(rate) * u128::from(time) / u128::from(SECOND * PAGE)) as u64 + 1,
    }
}

fn rates() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..=MAX_RATE, 1..100 * PAGE]
}

proptest! {
    /// Whatever the times of the looks and of changes, no page is lost or added.
    #[test]
    fn pages_follow_the_rate(
        steps in prop::collection::vec(
            (rates(), prop::collection::vec(0..5 * SECOND, 0..20)),
            1..5,
        ),
        start: u32,
    ) {
        let mut dirtier = Dirtier::new(PAGE);
        let (mut now, mut due, mut want) = (u64::from(start), 0, 0);
        for (rate, looks) in steps {
            dirtier.set_rate(rate, now).unwrap();
            let since = now;
            for time in looks {
                now += time;
                if time % 3 > 0 {
                    due += dirtier.due(now);
                    prop_assert_eq!(due, want + pages(rate, now - since));
                }
            }
            want += pages(rate, now - since);
        }
        due += dirtier.due(now);
        prop_assert_eq!(due, want);
        prop_assert_eq!(dirtier.due(now), 0);
    }

    #[test]
    fn wait_ends_when_a_page_is_due(
        rate in 1..=MAX_RATE,
        looks in prop::collection::vec(0..SECOND, 1..9),
    ) {
        let mut dirtier = Dirtier::new(PAGE);
        let mut now = 7;
        dirtier.set_rate(rate, now).unwrap();
        for time in looks {
            now += time;
            dirtier.due(now);
            let wait = dirtier.wait(now).unwrap();
            prop_assert!(wait > 0);
            prop_assert_eq!(dirtier.clone().due(now + wait - 1), 0);
            prop_assert!(dirtier.clone().due(now + wait) > 0);
        }
    }

    #[test]
    fn pages_are_inside_the_span(
        pages in 1..=1u64 << 40,
        pattern in prop::sample::select(&Pattern::ALL[..]),
    ) {
        let mut dirtier = Dirtier::new(PAGE);
        dirtier.pattern = pattern;
        for _ in 0..100 {
            prop_assert!(dirtier.pick(pages) < pages);
        }
    }

    #[test]
    fn no_time_overflows(rate in 1..=MAX_RATE, now: u64) {
        let mut dirtier = Dirtier::new(PAGE);
        dirtier.set_rate(rate, 0).unwrap();
        // A hundred years.
        let now = now % (100 * 366 * 86_400 * SECOND);
        dirtier.due(now);
        dirtier.wait(now).unwrap();
    }
}

#[test]
fn rate_above_the_maximum_changes_nothing() {
    let mut dirtier = Dirtier::new(PAGE);
    dirtier.set_rate(5, 0).unwrap();
    assert_eq!(dirtier.due(0), 1);
    assert_eq!(dirtier.set_rate(MAX_RATE + 1, 1), None);
    assert_eq!(dirtier.rate(), 5);
    assert_eq!(dirtier.due(1), 0);
}

#[test]
fn restart_drops_what_is_due() {
    let mut dirtier = Dirtier::new(PAGE);
    dirtier.set_rate(PAGE, 0).unwrap();
    dirtier.set_rate(1, 9 * SECOND).unwrap();
    assert_eq!([dirtier.pick(8), dirtier.pick(8)], [0, 1]);
    dirtier.restart(10 * SECOND);
    assert_eq!(dirtier.due(10 * SECOND), 1);
    assert_eq!(dirtier.pick(8), 0);
}

#[test]
fn patterns_differ_in_their_order() {
    const PAGES: usize = 1000;
    for pattern in Pattern::ALL {
        let mut dirtier = Dirtier::new(PAGE);
        dirtier.pattern = pattern;
        let mut count = [0; PAGES];
        let picked: Vec<u64> = (0..100 * PAGES)
            .map(|_| dirtier.pick(PAGES as u64))
            .collect();
        for page in &picked {
            count[*page as usize] += 1;
        }
        let first: usize = count[..PAGES / 10].iter().sum();
        let share = first * 100 / picked.len();
        let in_order = picked
            .windows(2)
            .all(|two| two[1] == (two[0] + 1) % PAGES as u64);
        match pattern {
            Pattern::Sequential => assert!(in_order && count == [100; PAGES]),
            Pattern::Random => assert!(!in_order && (9..=11).contains(&share), "{share}"),
            Pattern::Hot => assert!((90..=92).contains(&share), "{share}"),
        }
        assert!(count.iter().all(|count| *count > 0), "{}", pattern.name());
    }
}
