// SPDX-License-Identifier: GPL-2.0

//! Load of a device that its guest does not cause: it dirties pages, and re-initialises itself.

use super::dirtier::{
    Dirtier,
    Pattern, //
};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    },
};
use vfio::{
    cond_resched_killable,
    memory::StateMemory,
    migration::Notifier, //
};

/// Number of pages that are dirtied before other tasks run.
const BATCH: u64 = 4096;

/// Maximum number of pages that are dirtied at once, as a multiple of those in the span. Then
/// nearly all of them are dirty.
const ROUNDS: u64 = 4;

/// Pages that the device dirties in pre-copy, whatever its guest does.
///
/// They are marked, as if the device had written the same bytes again, so the guest's data is safe.
/// Marks have an effect only where a saver looks at them. Hence they are set when it is about to
/// look, for the time that has passed: the rate is exact, and without a session nothing is done.
#[pin_data]
pub(crate) struct Load {
    epoch: Instant<Monotonic>,
    #[pin]
    pub(super) settings: Mutex<Settings>,
}

pub(super) struct Settings {
    pub(super) dirtier: Dirtier,
    /// Size in bytes of the memory to dirty; 0 for all.
    pub(super) span: u64,
    /// Number of bytes dirtied since the device was created.
    pub(super) dirtied: u64,
    /// Number of re-initialisations that were ordered.
    pub(super) reinits: u64,
    /// A re-initialisation was ordered, and is to be done.
    reinit: bool,
    /// Present in pre-copy.
    notifier: Option<Arc<Notifier>>,
}

impl Load {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            epoch: Instant::now(),
            settings <- new_mutex!(
                Settings {
                    dirtier: Dirtier::new(PAGE_SIZE as u64),
                    span: 0,
                    dirtied: 0,
                    reinits: 0,
                    reinit: false,
                    notifier: None,
                },
                "vfio_mock::Load::settings"
            ),
        })
    }

    /// Returns the time in nanoseconds.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// Sets the rate. Fails with `EINVAL`, and changes nothing, if it is too high.
    pub(super) fn set_rate(&self, rate: u64) -> Result {
        let settings = &mut *self.settings.lock();
        settings.dirtier.set_rate(rate, self.now()).ok_or(EINVAL)?;
        // A reader at the temporary end waits for the next page.
        if let Some(notifier) = settings.notifier.as_ref().filter(|_| rate > 0) {
            notifier.notify();
        }
        Ok(())
    }

    /// Sets the order of the pages by its name. Fails with `EINVAL`, and changes nothing, if there
    /// is no such order.
    pub(super) fn set_pattern(&self, name: &str) -> Result {
        let pattern = Pattern::ALL.into_iter().find(|entry| entry.name() == name);
        self.settings.lock().dirtier.pattern = pattern.ok_or(EINVAL)?;
        Ok(())
    }

    /// Re-initialises the device, if it is in pre-copy: all of its state is initial again.
    pub(crate) fn order_reinit(&self) {
        let settings = &mut *self.settings.lock();
        settings.reinits = settings.reinits.wrapping_add(1);
        if let Some(notifier) = &settings.notifier {
            settings.reinit = true;
            notifier.notify();
        }
    }

    /// Starts to dirty pages.
    pub(crate) fn begin(&self, notifier: Arc<Notifier>) {
        let settings = &mut *self.settings.lock();
        settings.dirtier.restart(self.now());
        settings.reinit = false;
        settings.notifier = Some(notifier);
    }

    /// Stops dirtying pages. May sleep.
    pub(crate) fn end(&self) {
        let notifier = self.settings.lock().notifier.take();
        // Outside of the lock: this may be the last reference.
        drop(notifier);
    }

    /// Marks the pages that were dirtied until now. May sleep.
    pub(crate) fn dirty(&self, memory: &StateMemory) {
        let settings = &mut *self.settings.lock();
        if settings.notifier.is_none() {
            return;
        }
        if core::mem::take(&mut settings.reinit) {
            memory.reinit();
        }
        let pages = match settings.span.div_ceil(PAGE_SIZE as u64) {
            0 => memory.pages() as u64,
            pages => pages,
        };
        let due = settings.dirtier.due(self.now());
        settings.dirtied = settings
            .dirtied
            .wrapping_add(due.wrapping_mul(PAGE_SIZE as u64));
        for count in 1..=due.min(pages.saturating_mul(ROUNDS)) {
            let page = settings.dirtier.pick(pages) as usize;
            memory.mark(page..page + 1);
            if count % BATCH == 0 && cond_resched_killable().is_err() {
                break;
            }
        }
    }

    /// Returns the time until the next page becomes dirty, if any does.
    pub(crate) fn wait(&self) -> Option<Delta> {
        let wait = self.settings.lock().dirtier.wait(self.now())?;
        Some(Delta::from_nanos(i64::try_from(wait).unwrap_or(i64::MAX)))
    }
}
