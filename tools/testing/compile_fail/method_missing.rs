// SPDX-License-Identifier: GPL-2.0

//! A device that cannot be stopped is not migratable.

include!(env!("DRIVER"));

struct Unstoppable;

#[vtable]
//~ error[E0046]: not all trait items implemented, missing: `stop`
impl Migratable for Unstoppable {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY;

    fn start(&self) -> Result {
        Ok(())
    }

    fn save(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageSaver> {
        Err(ENOMEM)
    }

    fn load(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<ImageLoader> {
        Err(ENOMEM)
    }

    fn loaded(&self, _loader: &mut ImageLoader) -> Result {
        Ok(())
    }

    fn data_size(&self) -> Result<u64> {
        Ok(STREAM as u64)
    }

    fn reset(&self) -> Result {
        Ok(())
    }
}
