// SPDX-License-Identifier: GPL-2.0

//! Functions that need an open device cannot be called for one that may be closed.

include!(env!("DRIVER"));

use vfio::{
    migration::Engine,
    Device, //
};

fn pause(engine: &Engine<Chip>, chip: &Arc<Chip>, device: &Device) -> Result {
    engine.set_state(chip, device, 1)?;
    //~ error[E0308]: mismatched types
    //~ expected `&Device<Open>`, found `&Device`
    Ok(())
}
