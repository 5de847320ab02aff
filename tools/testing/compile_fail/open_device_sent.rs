// SPDX-License-Identifier: GPL-2.0

//! A reference to an open device cannot be sent to another thread.

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
