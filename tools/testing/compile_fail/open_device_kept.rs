// SPDX-License-Identifier: GPL-2.0

//! A reference to an open device cannot be stored.

include!(env!("DRIVER"));

use kernel::sync::aref::ARef;
use vfio::{
    Device,
    Open, //
};

struct Keeper {
    device: ARef<Device<Open>>,
    //~ error[E0277]: the trait bound `vfio::Device<Open>: AlwaysRefCounted` is not satisfied
}
