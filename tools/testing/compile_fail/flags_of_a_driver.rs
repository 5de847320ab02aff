// SPDX-License-Identifier: GPL-2.0

//! The flags of an emulated device are checked when its driver is registered.

include!(env!("DRIVER"));

/// The device on the front page, whose open data claims more.
struct Claimer;

impl mdev::Driver for Claimer {
    const TYPES: &'static [mdev::Type] = Note::TYPES;
    const MAX_INSTANCES: u32 = 8;

    fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
        Ok(Claimer)
    }
}

#[vtable]
impl emulated::Operations for Claimer {
    type OpenData = Claiming;
    const NAME: &'static CStr = c"claimer";

    fn config_space(&self) -> Result<ConfigSpace> {
        Note.config_space()
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Claiming, Error> {
        Arc::pin_init(Note.open(function), GFP_KERNEL_ACCOUNT).map(Claiming)
    }

    fn read(claiming: &Claiming, pos: Position, to: &mut [u8]) -> Result {
        Note::read(&claiming.0, pos, to)
    }

    fn write(claiming: &Claiming, pos: Position, from: &[u8]) -> Result {
        Note::write(&claiming.0, pos, from)
    }
}

struct Claiming(Arc<Chip>);

#[vtable]
impl Migratable for Claiming {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    fn stop(&self) -> Result {
        self.0.stop()
    }

    fn start(&self) -> Result {
        self.0.start()
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageSaver> {
        Chip::save(&this.0, notifier)
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
#[used]
static REGISTRATION: fn() -> Result = || {
    let registration = mdev::Registration::<Claimer>::new();
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()
    KBox::pin_init(registration, GFP_KERNEL).map(drop)
};
