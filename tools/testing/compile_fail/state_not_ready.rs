// SPDX-License-Identifier: GPL-2.0

//! All fields of open data must be initialized.

include!(env!("DRIVER"));

#[pin_data]
struct Two {
    #[pin]
    first: Mutex<u64>,
    second: StateMemory,
}

fn open() -> impl PinInit<Two, Error> {
    try_pin_init!(Two {
        //~ error[E0063]: missing field `second` in initializer of `Two`
        first <- new_mutex!(0),
    }? Error)
}
