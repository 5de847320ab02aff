// SPDX-License-Identifier: GPL-2.0

//! The host side of functions: the bridge, the IOMMU, and the plugged functions.

use super::{
    bridge::{
        Address,
        Bridge,
        Function,
        Kind, //
    },
    iommu::SoftIommu, //
};
use crate::{
    bindings,
    emulated::{
        self,
        Driver, //
    },
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
    /// Fails with `ENOSPC` if there are [`Driver::max_instances()`] functions or no slot is
    /// free, and with the error of the
    /// driver if it cannot describe the function.
    pub(super) fn plug<T: Driver>(this: &Arc<Self>, kind: Kind, bind: bool) -> Result<Plugged> {
        let function = Function {
            config: Self::example::<T>(&kind)?.config_space()?.express(),
            kind,
        };
        let slot = this.bridge.plug(
            &function,
            bind.then_some(T::NAME),
            T::max_instances().min(T::MAX_INSTANCES) as usize,
        )?;
        Ok(Plugged {
            host: this.clone(),
            slot,
        })
    }

    /// Creates the data of such a device. May sleep. Fails if a default is invalid.
    pub(super) fn example<T: Driver>(kind: &Kind) -> Result<Pin<KBox<T>>> {
        let device = KBox::pin_init(T::probe(kind.type_index), GFP_KERNEL)?;
        Self::set_defaults(&*device, kind)?;
        Ok(device)
    }

    /// Sets the defaults of all devices, and then those of this one.
    pub(super) fn set_defaults<T: Driver>(data: &T, kind: &Kind) -> Result {
        emulated::set_defaults(data, T::defaults())?;
        emulated::set_defaults(data, &kind.defaults)
    }

    /// Returns the settings of a function.
    ///
    /// Fails with `ENODEV` if the device is not on the bus.
    ///
    /// # Safety
    ///
    /// `pdev` must be a device that is being bound to a driver.
    pub(super) unsafe fn function(&self, pdev: *mut bindings::pci_dev) -> Result<Kind> {
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
