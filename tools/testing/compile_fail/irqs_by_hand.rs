// SPDX-License-Identifier: GPL-2.0

//! A driver can signal interrupts, but not configure them; the user of the device does that.

include!(env!("DRIVER"));

fn request(function: &Function) {
    function.irqs.trigger(4, 0);
    //~ error[E0616]: field `irqs` of struct `vfio::emulated::Function` is private
}
