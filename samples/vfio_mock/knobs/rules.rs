// SPDX-License-Identifier: GPL-2.0

//! Faults that a tester orders: which events fail or take time, and how.
//!
//! This file uses `core` alone, so that the same source runs in the kernel and in host tests.
//!
//! A rule is a place, followed by options. Rules are separated by semicolons:
//!
//! ```text
//! arc PRE_COPY_P2P->STOP_COPY errno=ENOSPC; write after=65536 xor=1
//! ```

use super::fsm::State;
use core::{
    fmt,
    str::FromStr, //
};

/// Maximum number of rules.
pub const RULES: usize = 4;

/// Names and numbers of the errors, those of `asm-generic`.
const ERRORS: [(&str, i32); 15] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("EIO", 5),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EFAULT", 14),
    ("EBUSY", 16),
    ("ENODEV", 19),
    ("EINVAL", 22),
    ("ENOTTY", 25),
    ("ENOSPC", 28),
    ("ENOMSG", 42),
    ("EOPNOTSUPP", 95),
    ("ETIMEDOUT", 110),
    ("ECANCELED", 125),
];

const EIO: i32 = 5;

/// Something that the device is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An arc of the state machine.
    Arc(State, State),
    /// To hand out a record, after this number of bytes of the session.
    Read(u64),
    /// To take bytes, after this number of bytes of the session.
    Write(u64),
    /// To seal the saver.
    Seal,
    /// To apply the loaded state.
    Loaded,
    /// To reset itself.
    Reset,
    /// To tell the size of its state.
    Size,
    /// To start the DMA log.
    LogStart,
    /// To report pages of the log.
    LogReport,
    /// To stop the log.
    LogStop,
    /// To do a piece of DMA.
    Dma,
}

/// The events that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// An arc; [`None`] is any state.
    Arc(Option<State>, Option<State>),
    Read,
    Write,
    Seal,
    Loaded,
    Reset,
    Size,
    LogStart,
    LogReport,
    LogStop,
    Dma,
}

impl Place {
    /// The places that are a single word.
    const WORDS: [(&'static str, Self); 10] = [
        ("read", Self::Read),
        ("write", Self::Write),
        ("seal", Self::Seal),
        ("loaded", Self::Loaded),
        ("reset", Self::Reset),
        ("size", Self::Size),
        ("log_start", Self::LogStart),
        ("log_report", Self::LogReport),
        ("log_stop", Self::LogStop),
        ("dma", Self::Dma),
    ];

    fn includes(self, event: Event, after: u64) -> bool {
        match (self, event) {
            (Self::Arc(from, to), Event::Arc(begin, end)) => {
                from.is_none_or(|from| from == begin) && to.is_none_or(|to| to == end)
            }
            (Self::Read, Event::Read(bytes)) | (Self::Write, Event::Write(bytes)) => bytes >= after,
            (Self::Seal, Event::Seal)
            | (Self::Loaded, Event::Loaded)
            | (Self::Reset, Event::Reset)
            | (Self::Size, Event::Size)
            | (Self::LogStart, Event::LogStart)
            | (Self::LogReport, Event::LogReport)
            | (Self::LogStop, Event::LogStop)
            | (Self::Dma, Event::Dma) => true,
            _ => false,
        }
    }
}

/// The effects of a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Time to wait before anything else, in microseconds.
    pub delay_us: u32,
    /// The error to fail with, as a positive number, if any.
    pub errno: Option<i32>,
    /// Whether the device is broken then: its state becomes `ERROR`.
    pub breaks: bool,
    /// Bits to change in the next byte of the stream.
    pub xor: u8,
    /// Whether the device re-initialises itself.
    pub reinit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    place: Place,
    /// Number of bytes of the session before the first event that counts.
    after: u64,
    /// The first event that has the effect, from 1.
    nth: u32,
    /// Number of events that have it, from then on; [`None`] is no limit.
    times: Option<u32>,
    effect: Effect,
    /// Number of events so far.
    seen: u32,
}

/// Parses a number without sign.
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then_some(())?;
    text.parse().ok()
}

/// Parses the name of a state, or an asterisk.
fn state(name: &str) -> Option<Option<State>> {
    if name == "*" {
        return Some(None);
    }
    let state = State::ALL
        .into_iter()
        .find(|state| state.name().to_bytes() == name.as_bytes())?;
    Some(Some(state))
}

impl Rule {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        let place = match words.next()? {
            "arc" => {
                let (from, to) = words.next()?.split_once("->")?;
                Place::Arc(state(from)?, state(to)?)
            }
            word => Place::WORDS.into_iter().find(|(name, _)| *name == word)?.1,
        };
        let mut rule = Self {
            place,
            after: 0,
            nth: 1,
            times: Some(1),
            effect: Effect::default(),
            seen: 0,
        };
        for word in words {
            rule.option(word.split_once('=')?)?;
        }
        let Effect {
            delay_us,
            errno,
            breaks,
            xor,
            reinit,
        } = rule.effect;
        if errno.is_none() && (breaks || delay_us == 0 && xor == 0 && !reinit) {
            rule.effect.errno = Some(EIO);
        }
        Some(rule)
    }

    fn option(&mut self, (name, value): (&str, &str)) -> Option<()> {
        match (name, self.place) {
            ("after", Place::Read | Place::Write) => self.after = number(value)?,
            ("nth", _) => self.nth = number(value).filter(|nth| *nth > 0)?,
            ("times", _) if value == "-1" => self.times = None,
            ("times", _) => self.times = Some(number(value).filter(|times| *times > 0)?),
            ("errno", _) => {
                let error = ERRORS.iter().find(|(name, _)| *name == value)?;
                self.effect.errno = Some(error.1);
            }
            ("xor", Place::Write) => {
                self.effect.xor = number(value).filter(|bits| *bits > 0)?;
            }
            ("reinit", Place::Arc(..) | Place::Read) if value == "1" => {
                self.effect.reinit = true;
            }
            // Only these may wait, and are followed by the question whether the device is broken.
            ("delay_us", Place::Arc(..) | Place::Seal) => self.effect.delay_us = number(value)?,
            ("state", Place::Arc(..) | Place::Seal | Place::Loaded) if value == "ERROR" => {
                self.effect.breaks = true;
            }
            _ => return None,
        }
        Some(())
    }

    /// Returns whether an event that is next would have the effect.
    fn is_due(&self) -> bool {
        let next = self.seen.saturating_add(1);
        next >= self.nth && self.times.is_none_or(|times| next - self.nth < times)
    }

    /// Counts an event. Returns whether it has the effect.
    fn hit(&mut self, event: Event) -> bool {
        if !self.place.includes(event, self.after) {
            return false;
        }
        let due = self.is_due();
        self.seen = self.seen.saturating_add(1);
        due
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            |state: Option<State>| state.map_or("*", |state| state.name().to_str().unwrap_or("*"));
        match self.place {
            Place::Arc(from, to) => write!(f, "arc {}->{}", name(from), name(to))?,
            place => {
                let mut words = Place::WORDS.into_iter();
                f.write_str(
                    words
                        .find(|entry| entry.1 == place)
                        .map_or("", |entry| entry.0),
                )?;
            }
        }
        if self.after > 0 {
            write!(f, " after={}", self.after)?;
        }
        if self.nth > 1 {
            write!(f, " nth={}", self.nth)?;
        }
        match self.times {
            None => f.write_str(" times=-1")?,
            Some(1) => {}
            Some(times) => write!(f, " times={times}")?,
        }
        if self.effect.delay_us > 0 {
            write!(f, " delay_us={}", self.effect.delay_us)?;
        }
        if let Some(error) = ERRORS
            .iter()
            .find(|entry| Some(entry.1) == self.effect.errno)
        {
            write!(f, " errno={}", error.0)?;
        }
        if self.effect.breaks {
            f.write_str(" state=ERROR")?;
        }
        if self.effect.xor > 0 {
            write!(f, " xor={}", self.effect.xor)?;
        }
        if self.effect.reinit {
            f.write_str(" reinit=1")?;
        }
        Ok(())
    }
}

/// The rules of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules([Option<Rule>; RULES]);

impl Rules {
    /// No rules.
    pub const OFF: Self = Self([None; RULES]);

    /// Parses rules. "off" means none. Returns [`None`] if the text is invalid.
    pub fn parse(text: &str) -> Option<Self> {
        let mut rules = Self::OFF;
        if text == "off" {
            return Some(rules);
        }
        let mut places = rules.0.iter_mut();
        for rule in text.split(';') {
            *places.next()? = Some(Rule::parse(rule)?);
        }
        Some(rules)
    }

    /// Counts an event for all rules. Returns the effect of the first one that has one.
    pub fn hit(&mut self, event: Event) -> Option<Effect> {
        let mut effect = None;
        for rule in self.0.iter_mut().flatten() {
            if rule.hit(event) {
                effect = effect.or(Some(rule.effect));
            }
        }
        effect
    }

    /// Returns the number of bytes that the device may take after `bytes` bytes of the session,
    /// until a rule could apply.
    pub fn room(&self, bytes: u64) -> u64 {
        let rules = self.0.iter().flatten();
        rules
            .filter(|rule| rule.place == Place::Write && rule.after > bytes)
            .map(|rule| rule.after - bytes)
            .min()
            .unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rules = self.0.iter().flatten();
        match rules.next() {
            None => f.write_str("off")?,
            Some(rule) => rule.fmt(f)?,
        }
        rules.try_for_each(|rule| write!(f, "; {rule}"))
    }
}
