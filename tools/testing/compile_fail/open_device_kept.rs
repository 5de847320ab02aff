// SPDX-License-Identifier: GPL-2.0

//! A device that is known to be open cannot be kept until it may be closed.

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
