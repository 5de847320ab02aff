// SPDX-License-Identifier: GPL-2.0

//! Tests of the numbers that the mock device tells its client.

use proptest::prelude::*;
use vfio_host_tests::told::Told;

proptest! {
    #[test]
    fn numbers_are_read_as_written(number: u64, percent: u32) {
        for (told, text) in [
            (Told::Exact, "exact".to_owned()),
            (Told::Fixed(number), number.to_string()),
            (Told::Percent(percent), format!("{percent}%")),
        ] {
            prop_assert_eq!(Told::parse(&text), Some(told));
            prop_assert_eq!(told.to_string(), text);
        }
    }

    #[test]
    fn percentage_is_rounded_down(exact: u64, percent: u32) {
        let want = u128::from(exact) * u128::from(percent) / 100;
        let told = Told::Percent(percent).apply(exact);
        prop_assert_eq!(told, u64::try_from(want).unwrap_or(u64::MAX));
        prop_assert_eq!(Told::Exact.apply(exact), exact);
        prop_assert_eq!(Told::Fixed(7).apply(exact), 7);
    }
}

#[test]
fn invalid_numbers_are_refused() {
    for text in [
        "",
        "%",
        "-1",
        "+1",
        "1 %",
        "5%%",
        "exactly",
        "1M",
        "18446744073709551616",
        "4294967296%",
    ] {
        assert_eq!(Told::parse(text), None, "{text}");
    }
}
