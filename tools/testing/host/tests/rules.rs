// SPDX-License-Identifier: GPL-2.0

//! Tests of the rules for faults of the mock device.

use proptest::prelude::*;
use vfio_host_tests::{
    fsm::State,
    rules::{
        Effect,
        Event,
        Rules, //
    }, //
};

const EIO: Option<i32> = Some(5);

fn state() -> impl Strategy<Value = String> {
    prop::sample::select(&State::ALL[..])
        .prop_map(|state| state.name().to_str().unwrap().to_owned())
        .boxed()
        .prop_union(Just("*".to_owned()).boxed())
}

/// A rule as it is read back: each option once, in order, and none that is the default.
fn rule() -> impl Strategy<Value = String> {
    let errno = prop::sample::select(&["EIO", "ENOSPC", "ETIMEDOUT"][..]);
    let place = prop_oneof![
        (state(), state()).prop_map(|(from, to)| format!("arc {from}->{to}")),
        (1u64..).prop_map(|after| format!("read after={after}")),
        (1u64..).prop_map(|after| format!("write after={after}")),
        prop::sample::select(
            &[
                "read",
                "write",
                "seal",
                "loaded",
                "reset",
                "size",
                "log_start",
                "log_report",
                "log_stop",
                "dma"
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    let nth = prop::option::of((2u32..).prop_map(|nth| format!(" nth={nth}")));
    let times = prop::option::of(prop_oneof![
        Just(" times=-1".to_owned()),
        (2u32..).prop_map(|times| format!(" times={times}")),
    ]);
    (place, nth, times, errno).prop_map(|(place, nth, times, errno)| {
        format!(
            "{place}{}{} errno={errno}",
            nth.unwrap_or_default(),
            times.unwrap_or_default()
        )
    })
}

proptest! {
    #[test]
    fn rules_are_read_as_written(rules in prop::collection::vec(rule(), 1..=4)) {
        let text = rules.join("; ");
        prop_assert_eq!(Rules::parse(&text).expect(&text).to_string(), text);
    }

    #[test]
    fn any_text_is_refused_or_stays_the_same(
        words in prop::collection::vec(
            prop_oneof![
                prop::sample::select(&["arc", "STOP->*", "read", "seal", "nth=2", "times=-1",
                    "write", "errno=EIO", "state=ERROR", "delay_us=7", "after=4096", "xor=9",
                    "reinit=1", ";", "off"][..])
                    .prop_map(str::to_owned),
                "[a-zA-Z0-9=;>* -]{0,9}",
            ],
            0..8,
        ),
    ) {
        let text = words.join(" ");
        if let Some(rules) = Rules::parse(&text) {
            let again = rules.to_string();
            prop_assert_eq!(Rules::parse(&again), Some(rules), "{} is {}", text, again);
        }
    }

    #[test]
    fn nth_and_times_select_the_events(nth in 1u32..9, times in prop::option::of(1u32..9)) {
        let limit = times.map_or(-1, i64::from);
        let mut rules = Rules::parse(&format!("seal nth={nth} times={limit}")).unwrap();
        for number in 1..30 {
            let due = number >= nth && times.is_none_or(|times| number < nth + times);
            prop_assert_eq!(rules.hit(Event::Reset), None);
            prop_assert_eq!(rules.hit(Event::Seal).is_some(), due);
        }
    }

    #[test]
    fn after_selects_the_bytes(after: u64, bytes: u64) {
        let mut rules = Rules::parse(&format!("write after={after}")).unwrap();
        prop_assert_eq!(rules.room(bytes), if bytes < after { after - bytes } else { u64::MAX });
        prop_assert_eq!(rules.hit(Event::Read(bytes)), None);
        prop_assert_eq!(rules.hit(Event::Write(bytes)).is_some(), bytes >= after);
    }
}

#[test]
fn invalid_rules_are_refused() {
    for text in [
        "",
        ";",
        "read;",
        "; read",
        "off; read",
        "arc",
        "arc STOP",
        "arc STOP->",
        "arc STOP -> RUNNING",
        "arc STOP->GONE",
        "arc stop->RUNNING",
        "write nth=0",
        "write nth=+1",
        "write nth=4294967296",
        "write times=0",
        "write times=-2",
        "write after=-1",
        "write after=",
        "write errno=EWHAT",
        "write errno=5",
        "write delay_us=5",
        "write state=ERROR",
        "write xor=0",
        "write xor=256",
        "read xor=1",
        "read reinit=0",
        "write reinit=1",
        "seal after=5",
        "seal state=STOP",
        "seal when=5",
        "seal errno",
        "arc *->* delay_us=4294967296",
        "seal; seal; seal; seal; seal",
    ] {
        assert_eq!(Rules::parse(text), None, "{text}");
    }
}

#[test]
fn effects_are_those_of_the_rule() {
    let effect = |text, event| Rules::parse(text).unwrap().hit(event);
    let stop = Event::Arc(State::Running, State::Stop);
    let fails = Effect {
        errno: EIO,
        ..Effect::default()
    };
    assert_eq!(effect("read", Event::Read(0)), Some(fails));
    assert_eq!(effect("arc RUNNING->STOP", stop), Some(fails));
    assert_eq!(effect("arc *->STOP", stop), Some(fails));
    assert_eq!(effect("arc RUNNING->*", stop), Some(fails));
    assert_eq!(effect("arc STOP->*", stop), None);
    assert_eq!(effect("arc *->RUNNING", stop), None);
    assert_eq!(effect("off", stop), None);
    let delayed = Effect {
        delay_us: 7,
        ..Effect::default()
    };
    assert_eq!(effect("arc *->* delay_us=7", stop), Some(delayed));
    assert_eq!(effect("seal delay_us=7", Event::Seal), Some(delayed));
    let broken = Effect {
        delay_us: 7,
        errno: Some(19),
        breaks: true,
        xor: 0,
        reinit: false,
    };
    let text = "arc *->* state=ERROR delay_us=7 errno=ENODEV";
    assert_eq!(effect(text, stop), Some(broken));
    assert_eq!(
        effect("arc *->* state=ERROR", stop).map(|effect| effect.errno),
        Some(EIO)
    );
    let changed = Effect {
        xor: 255,
        ..Effect::default()
    };
    assert_eq!(effect("write xor=255", Event::Write(0)), Some(changed));
    assert_eq!(
        effect("write xor=1 errno=EIO", Event::Write(0)).map(|effect| effect.errno),
        Some(EIO)
    );
    let begins_again = Effect {
        reinit: true,
        ..Effect::default()
    };
    assert_eq!(effect("arc *->STOP reinit=1", stop), Some(begins_again));
    assert_eq!(
        effect("read after=7 reinit=1", Event::Read(7)),
        Some(begins_again)
    );
    for (text, event) in [
        ("seal", Event::Seal),
        ("loaded", Event::Loaded),
        ("reset", Event::Reset),
        ("size", Event::Size),
        ("log_start", Event::LogStart),
        ("log_report", Event::LogReport),
        ("log_stop", Event::LogStop),
        ("dma", Event::Dma),
    ] {
        assert_eq!(effect(text, event), Some(fails), "{text}");
        assert_eq!(effect(text, Event::Read(0)), None, "{text}");
    }
    // The first of two rules for the same event has an effect, and both count it.
    let mut rules = Rules::parse("size errno=EPERM; size times=2 errno=EIO").unwrap();
    assert_eq!(rules.hit(Event::Size).unwrap().errno, Some(1));
    assert_eq!(rules.hit(Event::Size).unwrap().errno, EIO);
    assert_eq!(rules.hit(Event::Size), None);
}
