// SPDX-License-Identifier: GPL-2.0

//! Drawing of the record: data left, rates and downtime.

use std::ops::Range;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::record::{Record, Sample, State};

const WIDTH: u32 = 900;
const PANEL: u32 = 260;

type Plot<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

/// Draws the record as SVG.
pub(crate) fn svg(record: &Record) -> Result<String, String> {
    let mut text = String::new();
    draw(record, &mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

/// Returns the range of the time axis.
fn times(record: &Record) -> Range<f64> {
    0.0..(record.seconds * 1.02).max(1e-3)
}

/// Returns the time in which neither device ran.
fn down(record: &Record) -> Option<Range<f64>> {
    let length = record.downtime_ms? / 1e3;
    let end = record.states.iter().rev().find(|change| {
        change.device == crate::record::Side::Target && change.state == State::Running
    })?;
    Some(end.seconds - length..end.seconds)
}

fn points<'a>(
    record: &'a Record,
    value: impl Fn(&Sample) -> Option<f64> + 'a,
) -> impl Iterator<Item = (f64, f64)> + 'a {
    let point = move |sample: &Sample| Some((sample.seconds, value(sample)?));
    record.samples.iter().filter_map(point)
}

/// Returns a unit for the axis, and its name.
fn unit(highest: f64) -> (f64, &'static str) {
    match highest {
        1073741824.0.. => (1073741824.0, "GiB"),
        1048576.0.. => (1048576.0, "MiB"),
        1024.0.. => (1024.0, "KiB"),
        _ => (1.0, "B"),
    }
}

fn highest(points: impl Iterator<Item = (f64, f64)>) -> f64 {
    points.fold(0.0, |highest: f64, (_, y)| highest.max(y))
}

fn initial(sample: &Sample) -> Option<f64> {
    sample.initial_bytes.map(|bytes| bytes as f64)
}

fn left(sample: &Sample) -> Option<f64> {
    Some(initial(sample)? + sample.dirty_bytes? as f64)
}

fn panel<'a, 'b>(
    area: &'a DrawingArea<SVGBackend<'b>, plotters::coord::Shift>,
    title: &str,
    record: &Record,
    highest: f64,
) -> Drawn<Plot<'a, 'b>> {
    let top = if highest > 0.0 { highest * 1.1 } else { 1.0 };
    let mut plot = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(24)
        .y_label_area_size(60)
        .build_cartesian_2d(times(record), 0.0..top)?;
    plot.configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| format!("{x:.2} s"))
        .y_label_formatter(&|y| format!("{y}"))
        .y_labels(6)
        .draw()?;
    if let Some(down) = down(record) {
        let bar = Rectangle::new([(down.start, 0.0), (down.end, top)], RED.mix(0.2).filled());
        plot.draw_series(std::iter::once(bar))?;
    }
    for round in &record.rounds {
        let line = vec![(round.seconds, 0.0), (round.seconds, top)];
        plot.draw_series(std::iter::once(PathElement::new(line, BLACK.mix(0.25))))?;
    }
    Ok(plot)
}

fn legend<'a, 'b: 'a>(plot: &mut Plot<'a, 'b>) -> Drawn<()> {
    plot.configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    Ok(())
}

fn line(
    plot: &mut Plot<'_, '_>,
    name: &str,
    colour: RGBColor,
    points: impl Iterator<Item = (f64, f64)>,
) -> Drawn<()> {
    plot.draw_series(LineSeries::new(points, colour.stroke_width(2)))?
        .label(name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    Ok(())
}

fn draw(record: &Record, text: &mut String) -> Drawn<()> {
    let area = SVGBackend::with_string(text, (WIDTH, 3 * PANEL)).into_drawing_area();
    area.fill(&WHITE)?;
    let panels = area.split_evenly((3, 1));
    let scaled = |unit: f64| move |(x, y): (f64, f64)| (x, y / unit);

    let top = highest(points(record, left));
    let (unit_left, name) = unit(top);
    let title = format!("{name} left in pre-copy");
    let mut plot = panel(&panels[0], &title, record, top / unit_left)?;
    let all = points(record, left).map(scaled(unit_left));
    line(&mut plot, "initial + dirty", BLUE, all)?;
    let initial = points(record, initial).map(scaled(unit_left));
    line(&mut plot, "initial", GREEN, initial)?;
    legend(&mut plot)?;

    let sent = |sample: &Sample| Some(sample.send_rate);
    let dirtied = |sample: &Sample| sample.dirty_rate;
    let top = highest(points(record, sent)).max(highest(points(record, dirtied)));
    let (unit_rate, name) = unit(top);
    let title = format!("{name} per second");
    let mut plot = panel(&panels[1], &title, record, top / unit_rate)?;
    let sent = points(record, sent).map(scaled(unit_rate));
    line(&mut plot, "sent", BLUE, sent)?;
    let dirtied = points(record, dirtied).map(scaled(unit_rate));
    line(&mut plot, "dirtied", MAGENTA, dirtied)?;
    legend(&mut plot)?;

    let expected = |sample: &Sample| sample.expected_downtime_ms;
    let limit = record.asked.downtime_limit_ms;
    let real = record.downtime_ms.unwrap_or(0.0);
    let top = highest(points(record, expected)).max(real);
    let title = match record.downtime_ms {
        Some(real) => format!("Downtime in ms: {real:.1}"),
        None => "Downtime in ms: none".into(),
    };
    let mut plot = panel(&panels[2], &title, record, top)?;
    line(&mut plot, "expected", BLUE, points(record, expected))?;
    if limit <= top {
        let ends = [(0.0, limit), (times(record).end, limit)];
        line(&mut plot, "limit", BLACK, ends.into_iter())?;
    }
    if let Some(down) = down(record) {
        let end = [(down.start, real), (down.end, real)];
        line(&mut plot, "real", RED, end.into_iter())?;
    }
    legend(&mut plot)?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Asked, DeviceRecord, Outcome, Round, Side, StateChange};

    fn record(samples: usize) -> Record {
        let device = DeviceRecord {
            path: "/sys/bus/mdev/devices/0".into(),
            backend: "group",
            flags: vec!["STOP_COPY"],
            verdict: None,
        };
        Record {
            tool: "test",
            source: device.clone(),
            target: device,
            asked: Asked {
                bandwidth: None,
                downtime_limit_ms: 300.0,
                max_rounds: 1,
                precopy_seconds: 0.0,
                cancel_at_round: None,
                load: None,
                load_rate: None,
            },
            outcome: Outcome::Completed,
            error: None,
            seconds: 2.0,
            downtime_ms: Some(250.0),
            bytes: 1 << 20,
            load_bytes: 0,
            compared: Vec::new(),
            states: vec![StateChange {
                seconds: 1.9,
                device: Side::Target,
                state: State::Running,
            }],
            rounds: vec![Round {
                round: 1,
                seconds: 1.0,
                bytes: 1 << 20,
                left_bytes: 0,
                dirty_rate: 1e6,
                reinit: false,
                expected_downtime_ms: None,
            }],
            samples: (0..samples)
                .map(|i| Sample {
                    seconds: i as f64 * 0.1,
                    round: 1,
                    initial_bytes: Some(1 << 20),
                    dirty_bytes: Some(4096 * i as u64),
                    sent_bytes: 0,
                    send_rate: 1e6,
                    dirty_rate: Some(1e5),
                    expected_downtime_ms: Some(400.0),
                })
                .collect(),
        }
    }

    #[test]
    fn picture_has_all_lines() {
        let text = svg(&record(10)).expect("it can be drawn");
        for word in [
            "initial + dirty",
            "dirtied",
            "expected",
            "limit",
            "real",
            "Downtime in ms: 250.0",
            "KiB per second",
        ] {
            assert!(text.contains(word), "{word}");
        }
        assert!(text.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn empty_record_can_be_drawn() {
        let empty = Record {
            outcome: Outcome::Failed,
            seconds: 0.0,
            downtime_ms: None,
            states: Vec::new(),
            rounds: Vec::new(),
            ..record(0)
        };
        let text = svg(&empty).expect("it can be drawn");
        assert!(text.contains("Downtime in ms: none"));
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn downtime_ends_when_the_target_runs() {
        let down = down(&record(0)).expect("it completed");
        assert!((down.start - 1.65).abs() < 1e-9);
        assert!((down.end - 1.9).abs() < 1e-9);
    }
}
