// SPDX-License-Identifier: GPL-2.0

//! Open data must be `Sync`, because threads access an open device in parallel.

include!(env!("DRIVER"));

struct Alone {
    word: core::cell::Cell<u64>,
}

#[vtable]
//~ error[E0277]: `Cell<u64>` cannot be shared between threads safely
impl Migratable for Alone {
    type Saver = ImageSaver;
    type Loader = ImageLoader;
    const FLAGS: Flags = Flags::STOP_COPY;

    fn stop(&self) -> Result {
        Ok(())
    }

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
        self.word.set(0);
        Ok(())
    }
}
