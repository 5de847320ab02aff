// SPDX-License-Identifier: GPL-2.0

//! The flags of a device fit its methods: `VFIO_MIGRATION_P2P` requires methods that end
//! peer-to-peer DMA, `VFIO_MIGRATION_PRE_COPY` one that saves the device while it runs, and this
//! method requires its flag, because it would not be called.

include!(env!("DRIVER"));

/// Defines the device on the front page with other flags and a further method, and an engine for
/// it.
macro_rules! claimer {
    ($name:ident, $flags:expr, $($method:item)?) => {
        struct $name(Arc<Chip>);

        #[vtable]
        impl Migratable for $name {
            type Saver = ImageSaver;
            type Loader = ImageLoader;
            const FLAGS: Flags = $flags;

            fn stop(&self) -> Result {
                self.0.stop()
            }

            fn start(&self) -> Result {
                self.0.start()
            }

            $($method)?

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
    };
}

claimer!(P2p, Flags::STOP_COPY.with_p2p(),);
claimer!(PreCopy, Flags::STOP_COPY.with_pre_copy(),);
claimer!(
    Silent,
    Flags::STOP_COPY,
    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageSaver> {
        Self::save(this, notifier)
    }
);

fn engine<M: Migratable>() -> Result {
    let engine = vfio::migration::Engine::<M>::new(Flags::STOP_COPY);
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_P2P needs quiesce_p2p() and resume_p2p()
    //~ error[E0080]: evaluation panicked: VFIO_MIGRATION_PRE_COPY needs pre_copy()
    //~ error[E0080]: evaluation panicked: pre_copy() needs VFIO_MIGRATION_PRE_COPY
    KBox::pin_init(engine, GFP_KERNEL).map(drop)
}

#[used]
static ENGINES: [fn() -> Result; 3] = [engine::<P2p>, engine::<PreCopy>, engine::<Silent>];
