// SPDX-License-Identifier: GPL-2.0

//! `VFIO_MIGRATION_P2P` requires a method that ends peer-to-peer DMA, `VFIO_MIGRATION_PRE_COPY` one
//! that saves the device while it runs.

include!(env!("DRIVER"));

use core::marker::PhantomData;

trait Claim: 'static {
    const FLAGS: Flags;
}

struct P2p;

impl Claim for P2p {
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p();
}

struct PreCopy;

impl Claim for PreCopy {
    const FLAGS: Flags = Flags::STOP_COPY.with_pre_copy();
}

/// The device on the front page, which claims more.
struct Claiming<C: Claim>(Arc<Chip>, PhantomData<fn() -> C>);

#[vtable]
impl<C: Claim> Migratable for Claiming<C> {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = C::FLAGS;

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

    fn data_size(&self) -> Result<u64> {
        self.0.data_size()
    }

    fn reset(&self) -> Result {
        self.0.reset();
        Ok(())
    }
}

/// Makes the engine, as the registration of the device does.
fn engine<C: Claim>() -> Result {
    let engine = vfio::migration::Engine::<Claiming<C>>::new(C::FLAGS);
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_PRE_COPY needs pre_copy()
    KBox::pin_init(engine, GFP_KERNEL).map(drop)
}

#[used]
static ENGINES: [fn() -> Result; 2] = [engine::<P2p>, engine::<PreCopy>];
