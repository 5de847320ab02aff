// SPDX-License-Identifier: GPL-2.0

//! The way to the user's memory is there for the call, and not until the device may be closed.

include!(env!("DRIVER"));

use vfio::dma::Bus;

struct Later {
    bus: KVec<&'static Bus<'static>>,
}

impl Later {
    fn work(&mut self, bus: &Bus<'_>) -> Result {
        self.bus.push(bus, GFP_KERNEL)?;
        //~ error[E0521]: borrowed data escapes outside of method
        Ok(())
    }
}
