// SPDX-License-Identifier: GPL-2.0

//! A driver creates the data of its device, but cannot register the device itself.

include!(env!("DRIVER"));

fn register() {
    let _ = emulated::Registration::<Note>::new;
    //~ error[E0603]: struct `Registration` is private
    //~ error[E0624]: associated function `new` is private
}
