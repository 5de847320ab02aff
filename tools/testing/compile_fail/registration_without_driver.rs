// SPDX-License-Identifier: GPL-2.0

//! Only a type that implements `mdev::Driver` can be registered.

include!(env!("DRIVER"));

fn register() -> impl PinInit<mdev::Registration<Chip>, Error> {
    //~ error[E0277]: the trait bound `Chip: vfio::emulated::Driver` is not satisfied
    mdev::Registration::new()
}
