// SPDX-License-Identifier: GPL-2.0

//! A driver with `pre_copy()` must claim `VFIO_MIGRATION_PRE_COPY`: the method would not be called.

include!(env!("DRIVER"));

/// The device on the front page, with a method that its flags exclude.
struct Silent(Arc<Chip>);

#[vtable]
impl Migratable for Silent {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY;

    fn stop(&self) -> Result {
        self.0.stop()
    }

    fn start(&self) -> Result {
        self.0.start()
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageSaver> {
        Self::save(this, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageSaver> {
        Chip::save(&this.0, notifier)
    }

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageLoader> {
        Chip::load(&this.0, notifier)
    }

    fn loaded(&self, loader: &mut ImageLoader) -> Result {
        self.0.loaded(loader)
    }

    fn data_size(&self) -> Result<u64> {
        self.0.data_size()
    }

    fn reset(&self) -> Result {
        self.0.reset()
    }
}

fn engine() -> Result {
    let engine = vfio::migration::Engine::<Silent>::new(Flags::STOP_COPY);
    //~ error[E0080]: evaluation panicked: pre_copy() needs VFIO_MIGRATION_PRE_COPY
    KBox::pin_init(engine, GFP_KERNEL).map(drop)
}

#[used]
static ENGINE: fn() -> Result = engine;
