// SPDX-License-Identifier: GPL-2.0

//! Memory that is part of the device state cannot be changed without tracking.

include!(env!("DRIVER"));

fn clear(memory: &StateMemory) {
    core::ops::Deref::deref(memory).clear();
    //~ error[E0277]: the trait bound `vfio::memory::StateMemory: Deref` is not satisfied
}
