// SPDX-License-Identifier: GPL-2.0

//! Memory that is part of a device's state is only changed by ways that are tracked.

include!(env!("DRIVER"));

fn clear(memory: &StateMemory) {
    core::ops::Deref::deref(memory).clear();
    //~ error[E0277]: the trait bound `vfio::memory::StateMemory: Deref` is not satisfied
}
