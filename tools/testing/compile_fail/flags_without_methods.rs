// SPDX-License-Identifier: GPL-2.0

//! The flags of a device are checked when its driver is registered: `VFIO_MIGRATION_P2P` requires
//! methods that end peer-to-peer DMA, `VFIO_MIGRATION_PRE_COPY` one that saves the device while it
//! runs.

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

/// The device on the front page, whose open data claims more.
struct Claimer<C: Claim>(PhantomData<fn() -> C>);

impl<C: Claim> mdev::Driver for Claimer<C> {
    const TYPES: &'static [mdev::Type] = Note::TYPES;
    const MAX_INSTANCES: u32 = 8;

    fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
        Ok(Claimer(PhantomData))
    }
}

#[vtable]
impl<C: Claim> emulated::Operations for Claimer<C> {
    type OpenData = Claiming<C>;
    const NAME: &'static CStr = c"claimer";

    fn config_space(&self) -> Result<ConfigSpace> {
        Note.config_space()
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Claiming<C>, Error> {
        Arc::pin_init(Note.open(function), GFP_KERNEL_ACCOUNT)
            .map(|chip| Claiming(chip, PhantomData))
    }

    fn read(claiming: &Claiming<C>, pos: Position, to: &mut [u8]) -> Result {
        Note::read(&claiming.0, pos, to)
    }

    fn write(claiming: &Claiming<C>, pos: Position, from: &[u8]) -> Result {
        Note::write(&claiming.0, pos, from)
    }
}

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

/// Registers the driver, as its module does.
fn register<C: Claim>() -> Result {
    let registration = mdev::Registration::<Claimer<C>>::new();
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_PRE_COPY needs pre_copy()
    KBox::pin_init(registration, GFP_KERNEL).map(drop)
}

#[used]
static REGISTRATIONS: [fn() -> Result; 2] = [register::<P2p>, register::<PreCopy>];
