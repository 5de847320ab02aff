// SPDX-License-Identifier: GPL-2.0

//! A device that claims `VFIO_MIGRATION_P2P` says how it ends peer-to-peer DMA.

include!(env!("DRIVER"));

/// The device on the front page, which claims more.
struct Claiming(Arc<Chip>);

#[vtable]
impl Migratable for Claiming {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p();

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
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()
    KBox::pin_init(engine, GFP_KERNEL).map(drop)
};
