// SPDX-License-Identifier: GPL-2.0

//! Migration of the device.
//!
//! Read this file first: it has all methods that the migration engine calls. `save` then turns the
//! state of the device into a stream and `load` restores it, both in the format of [`stream`].

use crate::{
    chip::Chip,
    knobs::rules::Event, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use load::MockLoader;
use save::MockSaver;
use vfio::migration::{
    Flags,
    Migratable,
    Notifier,
    State, //
};

mod load;
mod save;
pub mod stream;

#[vtable]
impl Migratable for Chip {
    type Saver = MockSaver;
    type Loader = MockLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    fn begin_arc(&self, from: State, to: State) -> Result {
        self.fault(Event::Arc(from, to)).map(|_| ())
    }

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

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<MockLoader> {
        MockLoader::new(this.clone(), notifier)
    }

    fn loaded(&self, loader: &mut MockLoader) -> Result {
        self.fault(Event::Loaded)?;
        loader.finish()
    }

    fn data_size(&self) -> Result<u64> {
        self.fault(Event::Size)?;
        let told = self.knobs.tell(save::image_size(self.memory.pages()));
        Ok(told
            .initial
            .saturating_add(told.dirty)
            .saturating_add(told.tail))
    }

    fn is_broken(&self) -> bool {
        Chip::is_broken(self)
    }

    fn reset(&self) -> Result {
        self.fault(Event::Reset)?;
        self.power_on();
        Ok(())
    }
}
