// SPDX-License-Identifier: GPL-2.0

//! A device that claims `VFIO_MIGRATION_PRE_COPY` says how it is saved while it runs.

include!(env!("DRIVER"));

/// The device on the front page, which claims more.
struct Claiming(Arc<Chip>);

#[vtable]
impl Migratable for Claiming {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_pre_copy();

    fn stop(&self) -> Result {
        self.0.stop()
    }

    fn start(&self) -> Result {
        self.0.start()
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

    fn data_size(&self) -> u64 {
        self.0.data_size()
    }

    fn reset(&self) {
        self.0.reset();
    }
}

/// Makes the engine, as the registration of the device does.
#[used]
static ENGINE: fn() -> Result = || {
    let engine = vfio::migration::Engine::<Claiming>::new(Claiming::FLAGS);
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_PRE_COPY needs pre_copy()
    KBox::pin_init(engine, GFP_KERNEL).map(drop)
};
