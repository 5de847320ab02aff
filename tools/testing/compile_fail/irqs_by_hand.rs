// SPDX-License-Identifier: GPL-2.0

//! A driver can signal interrupts, but not configure them; the user of the device does that.

include!(env!("DRIVER"));

fn request(endpoint: &Endpoint) {
    endpoint.irqs.trigger(4, 0);
    //~ error[E0616]: field `irqs` of struct `vfio::emulated::Endpoint` is private
}
