// SPDX-License-Identifier: GPL-2.0

//! Only the worker has access to the memory of the user, while the device is open.

include!(env!("DRIVER"));

fn bus() {
    let _ = vfio::dma::Bus::new;
    //~ error[E0624]: associated function `new` is private
}
