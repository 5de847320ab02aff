// SPDX-License-Identifier: GPL-2.0

//! Stands in for software functions on systems that do not support them.

use super::Driver;
use core::marker::PhantomData;
use kernel::prelude::*;

/// A driver of functions, which cannot be created on this system.
#[pin_data]
pub struct Registration<T: Driver> {
    _driver: PhantomData<T>,
}

// SAFETY: There is nothing in it.
unsafe impl<T: Driver> Sync for Registration<T> {}

// SAFETY: As above.
unsafe impl<T: Driver> Send for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Does nothing.
    pub fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _driver: PhantomData,
        }? Error)
    }
}
