// SPDX-License-Identifier: GPL-2.0

//! The host side of functions: the bridge, the IOMMU, and the plugged functions.

use super::{
    bridge::{
        Address,
        Bridge,
        Function, //
    },
    iommu::SoftIommu, //
};
use crate::{
    bindings,
    emulated::Driver, //
};
use kernel::{
    module::this_module,
    prelude::*,
    sync::Arc, //
};

/// A host bridge and the IOMMU in front of it.
#[pin_data]
pub(super) struct Host {
    // The IOMMU refers to the bus.
    #[pin]
    _iommu: SoftIommu,
    bridge: Bridge,
}

impl Host {
    /// Creates the host of the functions of a driver. May sleep.
    pub(super) fn new<T: Driver>() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                bridge: Bridge::new(T::NAME)?,
                // SAFETY: The IOMMU is dropped before the bridge, which has the bus.
                _iommu <- unsafe {
                    SoftIommu::new(bridge.bus(), this_module::<T::OwnerModule>())
                },
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Plugs a function of a type. May sleep.
    ///
    /// Fails with `ENOSPC` if there are [`Driver::MAX_INSTANCES`], and with the error of the
    /// driver if it cannot describe the function.
    pub(super) fn plug<T: Driver>(
        this: &Arc<Self>,
        type_index: usize,
        has_dma_log: bool,
        bind: bool,
    ) -> Result<Plugged> {
        // The configuration space is that of any device of the type.
        let device = KBox::pin_init(T::probe(type_index), GFP_KERNEL)?;
        let function = Function {
            type_index: type_index as u32,
            has_dma_log,
            config: device.config_space()?.express(),
        };
        drop(device);
        let slot = this.bridge.plug(
            &function,
            bind.then_some(T::NAME),
            T::MAX_INSTANCES as usize,
        )?;
        Ok(Plugged {
            host: this.clone(),
            slot,
        })
    }

    /// Returns the index of the type of a function, and whether it has a DMA log.
    ///
    /// Fails with `ENODEV` if the device is not on the bus.
    ///
    /// # Safety
    ///
    /// `pdev` must be a device that is being bound to a driver.
    pub(super) unsafe fn function(&self, pdev: *mut bindings::pci_dev) -> Result<(usize, bool)> {
        // SAFETY: By the safety requirements.
        unsafe { self.bridge.function(pdev) }
    }
}

/// A function in its slot. Dropping it unplugs the function, and waits until its driver has
/// released it.
pub(super) struct Plugged {
    host: Arc<Host>,
    slot: usize,
}

impl Plugged {
    /// Returns the address of the function.
    pub(super) fn address(&self) -> Address {
        self.host.bridge.address(self.slot)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.host.bridge.unplug(self.slot);
    }
}
