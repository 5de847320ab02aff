// SPDX-License-Identifier: GPL-2.0

//! Migration of the device.
//!
//! Read this file first: it has all methods that the migration engine calls. `save` then turns the
//! state of the device into a stream and `load` restores it, both in the format of [`stream`].

use crate::chip::Chip;
use kernel::{
    prelude::*,
    sync::Arc, //
};
use load::MockLoader;
use save::MockSaver;
use vfio::migration::{
    Flags,
    Migratable,
    Notifier, //
};

mod load;
mod save;
pub mod stream;

#[vtable]
impl Migratable for Chip {
    type Saver = MockSaver;
    type Loader = MockLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    // Nothing to do in the next four: the crate stops the worker, and drops writes.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    fn stop(&self) -> Result {
        Ok(())
    }

    fn start(&self) -> Result {
        Ok(())
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MockSaver> {
        MockSaver::pre_copy(this.clone(), notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MockSaver> {
        MockSaver::new(this.clone(), notifier)
    }

    fn load(this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<MockLoader> {
        MockLoader::new(this.clone())
    }

    fn loaded(&self, loader: &mut MockLoader) -> Result {
        loader.finish()
    }

    fn data_size(&self) -> Result<u64> {
        Ok(save::image_size(self.memory.pages()))
    }

    fn reset(&self) -> Result {
        self.power_on();
        Ok(())
    }
}
