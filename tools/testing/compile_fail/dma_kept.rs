// SPDX-License-Identifier: GPL-2.0

//! Access to the memory of the user is limited to the call, so that it ends before a close.

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
