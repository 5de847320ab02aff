// SPDX-License-Identifier: GPL-2.0

//! What an emulated device is on its PCI bus.

use crate::{
    config_space::{
        ConfigSpace,
        SIZE, //
    },
    irq::{
        self,
        Irqs, //
    },
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};

/// The PCI side of an open device: its configuration space and its interrupts.
///
/// The front end serves the user's accesses to it; a driver signals interrupts, and saves and loads
/// the configuration space. All of it works while the device is stopped: it belongs to the bus.
#[pin_data]
pub struct Endpoint {
    #[pin]
    config: Mutex<ConfigSpace>,
    #[pin]
    pub(crate) irqs: Irqs,
}

impl Endpoint {
    /// Makes the PCI side of a device at power on, with its interrupts silent.
    pub(crate) fn new(power_on: ConfigSpace) -> Result<Arc<Self>> {
        let counts = power_on.irq_counts();
        Arc::pin_init(
            try_pin_init!(Self {
                config <- new_mutex!(power_on, "vfio::endpoint::Endpoint::config"),
                irqs <- Irqs::new(counts),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Signals an MSI-X vector, if its user asked for that and there is such a vector. Does not
    /// sleep.
    pub fn signal(&self, vector: u32) {
        self.irqs.trigger(irq::MSIX, vector);
    }

    /// Reads from the configuration space.
    pub(crate) fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.config.lock().read(offset, to);
    }

    /// Writes to the configuration space.
    pub(crate) fn write_config(&self, offset: usize, from: &[u8]) {
        self.config.lock().write(offset, from);
    }

    /// Brings the configuration space into the state of power on. Interrupts stay as the user set
    /// them up.
    pub(crate) fn reset(&self, power_on: ConfigSpace) {
        *self.config.lock() = power_on;
    }

    /// Returns the content of the configuration space, for the stream. May sleep.
    pub fn save_config(&self) -> [u8; SIZE] {
        *self.config.lock().save()
    }

    /// Tells whether a configuration space in a stream is of such a device: [`load_config`] would
    /// succeed. May sleep.
    ///
    /// [`load_config`]: Self::load_config
    pub fn accepts_config(&self, bytes: &[u8; SIZE]) -> bool {
        let mut config = self.config.lock().clone();
        config.load(bytes).is_ok()
    }

    /// Replaces the content of the configuration space by what is in a stream.
    ///
    /// Fails with `EINVAL`, and changes nothing, if that is not of such a device: if it differs in
    /// what cannot be written. May sleep.
    pub fn load_config(&self, bytes: &[u8; SIZE]) -> Result {
        self.config.lock().load(bytes)
    }
}
