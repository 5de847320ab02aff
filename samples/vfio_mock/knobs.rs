// SPDX-License-Identifier: GPL-2.0

//! Settings of a device on its host, with which a tester makes it misbehave.
//!
//! [`Knobs::ATTRIBUTES`] is the table of them. By default they are off. They are kept when the
//! device is closed or reset, and do not migrate.

use crate::device::Mock;
use delay::SaveDelay;
use dirtier::{
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
    mdev::Attribute,
    memory::StateMemory,
    migration::Notifier, //
};

pub(crate) mod delay;
pub mod dirtier;

/// Number of pages that are dirtied before other tasks run.
const BATCH: u64 = 4096;

/// Maximum number of pages that are dirtied at once, as a multiple of those in the span. Then
/// nearly all of them are dirty.
const ROUNDS: u64 = 4;

/// The settings of a device.
#[pin_data]
pub(crate) struct Knobs {
    pub(crate) save_delay: Arc<SaveDelay>,
    #[pin]
    pub(crate) load: Load,
}

impl Knobs {
    /// The files in the directory [`FOLDER`](Self::FOLDER) of a device.
    pub(crate) const ATTRIBUTES: &'static [Attribute<Mock>] = &[
        // Time to prepare each record, in microseconds.
        Attribute::Number {
            name: c"save_delay_us",
            show: |mock| u64::from(mock.knobs.save_delay.get()),
            store: |mock, micros| {
                mock.knobs.save_delay.set(u32::try_from(micros)?);
                Ok(())
            },
        },
        // Bytes per second that are dirtied in pre-copy.
        Attribute::Number {
            name: c"dirty_rate",
            show: |mock| mock.knobs.load.settings.lock().dirtier.rate(),
            store: |mock, rate| mock.knobs.load.set_rate(rate),
        },
        // Size in bytes of the memory to dirty, from its start; 0 for all.
        Attribute::Number {
            name: c"dirty_span",
            show: |mock| mock.knobs.load.settings.lock().span,
            store: |mock, span| {
                if span > mock.state_size as u64 {
                    return Err(EINVAL);
                }
                mock.knobs.load.settings.lock().span = span;
                Ok(())
            },
        },
        // Order of the pages to dirty.
        Attribute::Text {
            name: c"dirty_pattern",
            show: |mock, line| {
                line.write_str(mock.knobs.load.settings.lock().dirtier.pattern.name())
            },
            store: |mock, name| {
                let pattern = Pattern::ALL.into_iter().find(|entry| entry.name() == name);
                mock.knobs.load.settings.lock().dirtier.pattern = pattern.ok_or(EINVAL)?;
                Ok(())
            },
        },
        // Bytes dirtied by these settings since the device was created.
        Attribute::Counter {
            name: c"dirtied",
            show: |mock| mock.knobs.load.settings.lock().dirtied,
        },
    ];

    /// The name of the directory.
    pub(crate) const FOLDER: &'static CStr = c"knobs";

    /// Creates settings that are off.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                save_delay: SaveDelay::new()?,
                load <- Load::new(),
            }? Error),
            GFP_KERNEL,
        )
    }
}

/// Pages that the device dirties in pre-copy, whatever its guest does.
///
/// They are marked, as if the device had written the same bytes again, so the guest's data is safe.
/// Marks have an effect only where a saver looks at them. Hence they are set when it is about to
/// look, for the time that has passed: the rate is exact, and without a session nothing is done.
#[pin_data]
pub(crate) struct Load {
    epoch: Instant<Monotonic>,
    #[pin]
    settings: Mutex<Settings>,
}

struct Settings {
    dirtier: Dirtier,
    span: u64,
    dirtied: u64,
    /// Present in pre-copy.
    notifier: Option<Arc<Notifier>>,
}

impl Load {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            epoch: Instant::now(),
            settings <- new_mutex!(
                Settings {
                    dirtier: Dirtier::new(PAGE_SIZE as u64),
                    span: 0,
                    dirtied: 0,
                    notifier: None,
                },
                "vfio_mock::Load::settings"
            ),
        })
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn set_rate(&self, rate: u64) -> Result {
        let settings = &mut *self.settings.lock();
        settings.dirtier.set_rate(rate, self.now()).ok_or(EINVAL)?;
        // A reader at the temporary end waits for the next page.
        if let Some(notifier) = settings.notifier.as_ref().filter(|_| rate > 0) {
            notifier.notify();
        }
        Ok(())
    }

    /// Starts to dirty pages.
    pub(crate) fn begin(&self, notifier: Arc<Notifier>) {
        let settings = &mut *self.settings.lock();
        settings.dirtier.restart(self.now());
        settings.notifier = Some(notifier);
    }

    /// Stops to dirty pages. May sleep.
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
