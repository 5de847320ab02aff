// SPDX-License-Identifier: GPL-2.0

//! There is no way to the user's memory but the one that the device's thread gets while the device
//! is open.

include!(env!("DRIVER"));

fn bus() {
    let _ = vfio::dma::Bus::new;
    //~ error[E0624]: associated function `new` is private
}
