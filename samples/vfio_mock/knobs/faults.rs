// SPDX-License-Identifier: GPL-2.0

//! Faults that a tester orders.

use super::rules::{
    Effect,
    Event,
    Rules, //
};
use kernel::{
    new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Mutex, //
    },
    time::Delta, //
};
use vfio::WaitQueue;

/// The rules of a device, and the tasks that they delay.
#[pin_data]
pub(crate) struct Faults {
    #[pin]
    pub(super) rules: Mutex<Rules>,
    /// Number of events that had an effect.
    pub(super) count: Atomic<u64>,
    /// Number of times that the rules were set.
    changes: Atomic<u32>,
    #[pin]
    delayed: WaitQueue,
}

impl Faults {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            rules <- new_mutex!(Rules::OFF, "vfio_mock::Faults::rules"),
            count: Atomic::new(0),
            changes: Atomic::new(0),
            delayed <- WaitQueue::new(c"vfio_mock::Faults::delayed", static_lock_class!()),
        })
    }

    /// Replaces all rules. Ends the delays under way. Fails with `EINVAL`, and changes nothing, if
    /// the text is invalid.
    pub(super) fn set(&self, text: &str) -> Result {
        let new = Rules::parse(text).ok_or(EINVAL)?;
        let mut rules = self.rules.lock();
        *rules = new;
        self.changes.fetch_add(1, Relaxed);
        drop(rules);
        self.delayed.wake();
        Ok(())
    }

    /// Returns the number of bytes that can be taken before a rule could apply.
    pub(crate) fn room(&self, bytes: u64) -> usize {
        usize::try_from(self.rules.lock().room(bytes)).unwrap_or(usize::MAX)
    }

    /// Counts an event, and returns the effect that a rule gives it. Waits as long as a rule delays
    /// it; fails with `ERESTARTSYS` if the task is killed meanwhile.
    pub(crate) fn hit(&self, event: Event) -> Result<Effect> {
        let mut rules = self.rules.lock();
        let effect = rules.hit(event);
        let changes = self.changes.load(Relaxed);
        drop(rules);
        let effect = effect.unwrap_or_default();
        if effect != Effect::default() {
            self.count.fetch_add(1, Relaxed);
        }
        if effect.delay_us > 0 {
            let time = Delta::from_micros(i64::from(effect.delay_us));
            self.delayed
                .wait_killable(time, || self.changes.load(Relaxed) != changes)?;
        }
        Ok(effect)
    }
}
