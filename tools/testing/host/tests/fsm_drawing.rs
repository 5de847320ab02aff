// SPDX-License-Identifier: GPL-2.0

//! Drawing of the state machine, made from the table of the model.
//!
//! `Documentation/vfio_fsm.svg` must be that drawing. If it differs, the test writes a new one.

use std::fmt::Write;

use vfio_host_tests::{
    fsm::{
        Flags,
        State, //
    },
    paths::{
        arcs,
        ends_session,
        next,
        opens_session, //
    },
};

const FILE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../../Documentation/vfio_fsm.svg"
);
const BOX: (i32, i32) = (150, 44);

/// Returns the center of the box of a state, or `None` for a state without arcs.
fn place(state: State) -> Option<(i32, i32)> {
    match state {
        State::Error => None,
        State::Running => Some((120, 60)),
        State::PreCopy => Some((450, 60)),
        State::RunningP2p => Some((120, 200)),
        State::PreCopyP2p => Some((450, 200)),
        State::Stop => Some((120, 340)),
        State::StopCopy => Some((450, 340)),
        State::Resuming => Some((120, 480)),
    }
}

/// Returns the ends of an arc between two boxes, next to the arc in the other direction.
fn ends(from: (i32, i32), to: (i32, i32)) -> ((i32, i32), (i32, i32)) {
    let (dx, dy) = ((to.0 - from.0).signum(), (to.1 - from.1).signum());
    let edge = |at: (i32, i32), side: i32| {
        // On the right side, so that both directions are visible.
        if dx != 0 && dy == 0 {
            (at.0 + side * dx * BOX.0 / 2, at.1 + 9 * dx)
        } else {
            (at.0 - 14 * dy, at.1 + side * dy * BOX.1 / 2)
        }
    };
    (edge(from, 1), edge(to, -1))
}

/// Draws the arcs of a shape. Arcs of `whole` that the shape replaces are pale.
fn draw(flags: Flags) -> String {
    let mut svg = String::new();
    let mut put = |line: String| writeln!(svg, "{line}").expect("a string takes all");

    put(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 720 590' \
         font-family='sans-serif' font-size='14'>"
            .into(),
    );
    put(concat!("<!-- SPDX", "-License-Identifier: GPL-2.0 -->").into());
    put("<!-- Made by tools/testing/host/tests/fsm_drawing.rs, do not edit. -->".into());
    put("<rect width='720' height='590' fill='white'/>".into());
    for (id, colour) in [("plain", "#333"), ("opens", "#080"), ("ends", "#c00")] {
        put(format!(
            "<marker id='{id}' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='9' \
             markerHeight='9' orient='auto'><path d='M0 0 8 4 0 8z' fill='{colour}'/></marker>"
        ));
    }
    put("<rect x='355' y='20' width='340' height='360' rx='12' fill='#eef4ff'/>".into());
    put("<text x='545' y='120' fill='#468'>saving group:</text>".into());
    put("<text x='545' y='140' fill='#468'>one session,</text>".into());
    put("<text x='545' y='160' fill='#468'>one data_fd</text>".into());
    for (from, to) in arcs(flags) {
        let places = place(from).zip(place(to)).expect("no arc touches ERROR");
        let (start, end) = ends(places.0, places.1);
        let kind = match (opens_session(from, to), ends_session(from, to)) {
            (true, _) => ("opens", "#080"),
            (_, true) => ("ends", "#c00"),
            _ => ("plain", "#333"),
        };
        put(format!(
            "<path d='M{} {} {} {}' stroke='{}' stroke-width='2' marker-end='url(#{})'>\
             <title>{} to {}</title></path>",
            start.0, start.1, end.0, end.1, kind.1, kind.0, from, to
        ));
    }
    for state in State::ALL {
        let Some((x, y)) = place(state) else { continue };
        let fill = if state.runs() { "#dfd" } else { "#fdd" };
        put(format!(
            "<rect x='{}' y='{}' width='{}' height='{}' rx='6' fill='{fill}' stroke='#333'/>",
            x - BOX.0 / 2,
            y - BOX.1 / 2,
            BOX.0,
            BOX.1
        ));
        put(format!(
            "<text x='{x}' y='{}' text-anchor='middle'>{}</text>",
            y + 5,
            state
        ));
    }
    for (line, (colour, text)) in [
        ("#080", "opens a session: SET_STATE returns a new data_fd"),
        (
            "#c00",
            "ends it: every later call on that data_fd fails with ENODEV",
        ),
        ("#333", "neither"),
    ]
    .into_iter()
    .enumerate()
    {
        let y = 490 + 22 * line;
        put(format!(
            "<path d='M240 {y} 270 {y}' stroke='{colour}' stroke-width='2'/>\
             <text x='280' y='{}'>{text}</text>",
            y + 5
        ));
    }
    put("<text x='240' y='561'>green: the device runs; red: it is stopped</text>".into());
    put("</svg>".into());
    svg
}

#[test]
fn drawing_matches_the_table() {
    let drawn = draw(Flags::STOP_COPY.with_p2p().with_pre_copy());
    let there = std::fs::read_to_string(FILE).expect("the drawing is there");
    if there != drawn {
        let new = concat!(env!("CARGO_TARGET_TMPDIR"), "/vfio_fsm.svg");
        std::fs::write(new, &drawn).expect("the drawing can be written");
        panic!("the drawing differs from the table: cp {new} {FILE}");
    }
}

#[test]
fn paths_match_the_document() {
    // Table in Documentation/vfio_migration_engine.rst: `A` to `B`, and the path.
    let text = include_str!("../../../../Documentation/vfio_migration_engine.rst");
    let flags = Flags::STOP_COPY.with_p2p().with_pre_copy();
    let state = |word: &str| {
        let found = State::ALL
            .into_iter()
            .find(|state| state.to_string() == word);
        found.unwrap_or_else(|| panic!("{word} is no state"))
    };
    let mut count = 0;
    for line in text.lines().filter(|line| line.contains(" -> ")) {
        let words: Vec<_> = line.split("``").collect();
        let (from, to, way) = (state(words[1]), state(words[3]), words[5]);
        let mut walked = vec![from];
        while walked.last() != Some(&to) {
            let at = *walked.last().expect("it has a start");
            walked.push(next(flags, at, to).expect(line));
        }
        let walked: Vec<_> = walked.into_iter().map(|state| state.to_string()).collect();
        assert_eq!(walked.join(" -> "), way, "{line}");
        count += 1;
    }
    assert!(count > 0, "the document has no paths");
}
