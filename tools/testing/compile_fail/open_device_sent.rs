// SPDX-License-Identifier: GPL-2.0

//! A device that is known to be open in one thread may be closed in another.

include!(env!("DRIVER"));

use vfio::{
    Device,
    Open, //
};

fn other_thread(_work: impl FnOnce() + Send) {}

fn send(device: &Device<Open>) {
    other_thread(move || drop(device));
    //~ error[E0277]: `vfio::Device<Open>` cannot be shared between threads safely
}
