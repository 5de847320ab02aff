// SPDX-License-Identifier: GPL-2.0

//! Only the engine changes the state.

include!(env!("DRIVER"));

use vfio::migration::{
    Engine,
    State, //
};

fn run(engine: &Engine<Chip>) {
    engine
        .state
        .store(State::Running.as_raw(), kernel::sync::atomic::Relaxed);
    //~ error[E0616]: field `state` of struct `Engine` is private
}
