// SPDX-License-Identifier: GPL-2.0

//! Settings of a device on its host, with which a tester makes it misbehave.
//!
//! `Knobs::ATTRIBUTES` is the table of them. By default they are off. They are kept when the
//! device is closed or reset, and do not migrate.

use crate::{
    device::Mock,
    migration::stream::VERSION, //
};
use faults::Faults;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
};
use load::Load;
use pace::Pace;
use told::Told;
use vfio::{
    mdev::Attribute,
    migration::{
        fsm,
        Flags,
        Remaining, //
    },
};

pub mod dirtier;
pub(crate) mod faults;
mod load;
pub(crate) mod pace;
pub mod rules;
pub mod told;

/// The settings of a device.
#[pin_data]
pub(crate) struct Knobs {
    /// Pace at which the device hands out a stream.
    pub(crate) saving: Arc<Pace>,
    /// Pace at which it takes one.
    pub(crate) loading: Arc<Pace>,
    #[pin]
    pub(crate) load: Load,
    #[pin]
    pub(crate) faults: Faults,
    #[pin]
    sizes: Mutex<Sizes>,
    /// Version of the format of the stream, and its features.
    pub(crate) version: Atomic<u32>,
    pub(crate) features: Atomic<u64>,
}

/// What the device tells of the sizes in [`Remaining`].
#[derive(Clone, Copy, Default)]
struct Sizes {
    initial: Told,
    dirty: Told,
    tail: Told,
}

/// Declares the knob of a setting of a [`Pace`].
macro_rules! pace_knob {
    ($name:expr, $pace:ident, $get:ident, $set:ident) => {
        Attribute::Number {
            name: $name,
            show: |mock| mock.knobs.$pace.$get().into(),
            store: |mock, number| {
                mock.knobs.$pace.$set(number.try_into()?);
                Ok(())
            },
        }
    };
}

/// Declares the knob of a field of [`Sizes`].
macro_rules! size_knob {
    ($name:expr, $field:ident) => {
        Attribute::Text {
            name: $name,
            show: |mock, line| write!(line, "{}", mock.knobs.sizes.lock().$field),
            store: |mock, text| {
                mock.knobs.sizes.lock().$field = Told::parse(text).ok_or(EINVAL)?;
                Ok(())
            },
        }
    };
}

impl Knobs {
    /// The files in the directory [`FOLDER`](Self::FOLDER) of a device.
    pub(crate) const ATTRIBUTES: &'static [Attribute<Mock>] = &[
        // Supported migration features, like the parameter of the module.
        Attribute::Fixed {
            name: c"migration_flags",
            show: |mock| mock.flags.load(Relaxed),
            store: |mock, flags| {
                Flags::from_raw(flags).ok_or(EINVAL)?;
                mock.flags.store(flags, Relaxed);
                Ok(())
            },
        },
        // 1 if the device has a DMA log, else 0.
        Attribute::Fixed {
            name: c"dma_log",
            show: |mock| mock.dma_log.load(Relaxed).into(),
            store: |mock, number| {
                if number > 1 {
                    return Err(EINVAL);
                }
                mock.dma_log.store(number == 1, Relaxed);
                Ok(())
            },
        },
        // Time to prepare each record, in microseconds.
        pace_knob!(c"save_delay_us", saving, delay, set_delay),
        // Bytes per second of the stream; 0 is no limit.
        pace_knob!(c"save_rate", saving, rate, set_rate),
        // Time to take each part of a stream, of up to 64 KiB, in microseconds.
        pace_knob!(c"load_delay_us", loading, delay, set_delay),
        // Bytes per second of a stream to load; 0 is no limit.
        pace_knob!(c"load_rate", loading, rate, set_rate),
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
            store: |mock, name| mock.knobs.load.set_pattern(name),
        },
        // Bytes dirtied by these settings since the device was created.
        Attribute::Counter {
            name: c"dirtied",
            show: |mock| mock.knobs.load.settings.lock().dirtied,
        },
        // Number of re-initialisations that were ordered; a write orders one.
        Attribute::Number {
            name: c"reinit",
            show: |mock| mock.knobs.load.settings.lock().reinits,
            store: |mock, _| {
                mock.knobs.load.order_reinit();
                Ok(())
            },
        },
        // Sizes to tell the client.
        size_knob!(c"initial_bytes", initial),
        size_knob!(c"dirty_bytes", dirty),
        size_knob!(c"tail_bytes", tail),
        // Version of the format of the stream.
        Attribute::Number {
            name: c"stream_version",
            show: |mock| mock.knobs.version.load(Relaxed).into(),
            store: |mock, version| {
                mock.knobs.version.store(u32::try_from(version)?, Relaxed);
                Ok(())
            },
        },
        // Bits of the features that a reader of the stream needs, or that the device has to read.
        Attribute::Number {
            name: c"stream_features",
            show: |mock| mock.knobs.features.load(Relaxed),
            store: |mock, features| {
                mock.knobs.features.store(features, Relaxed);
                Ok(())
            },
        },
        // What fails or takes time, in the syntax of `rules`.
        Attribute::Text {
            name: c"faults",
            show: |mock, line| write!(line, "{}", *mock.knobs.faults.rules.lock()),
            store: |mock, text| mock.knobs.faults.set(text),
        },
        // Number of times that a fault had an effect since the device was created.
        Attribute::Counter {
            name: c"faulted",
            show: |mock| mock.knobs.faults.count.load(Relaxed),
        },
    ];

    /// The name of the directory.
    pub(crate) const FOLDER: &'static CStr = c"knobs";

    /// Creates settings that are off.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                saving: Pace::new()?,
                loading: Pace::new()?,
                load <- Load::new(),
                faults <- Faults::new(),
                sizes <- new_mutex!(Sizes::default(), "vfio_mock::Knobs::sizes"),
                version: Atomic::new(VERSION),
                features: Atomic::new(0),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the sizes to tell the client instead of the exact ones.
    pub(crate) fn tell(&self, exact: Remaining) -> Remaining {
        let sizes = *self.sizes.lock();
        Remaining {
            initial: sizes.initial.apply(exact.initial),
            dirty: sizes.dirty.apply(exact.dirty),
            tail: sizes.tail.apply(exact.tail),
            ..exact
        }
    }
}
