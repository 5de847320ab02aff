// SPDX-License-Identifier: GPL-2.0

//! The interrupts of a device belong to who has it open: a driver signals, and no more.

include!(env!("DRIVER"));

fn request(endpoint: &Endpoint) {
    endpoint.irqs.trigger(4, 0);
    //~ error[E0616]: field `irqs` of struct `vfio::endpoint::Endpoint` is private
}
