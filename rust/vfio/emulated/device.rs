// SPDX-License-Identifier: GPL-2.0

//! A device of a driver, from its creation to its removal, and the calls of the core on it.
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use super::{
    OpenDevice,
    Operations, //
};
use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    dma::{
        self,
        Bus,
        Memory, //
    },
    emulated::{
        config_space::ConfigSpace,
        function::Function,
        gate::Work,
        ioctl,
        worker::{
            self,
            Worker, //
        },
    },
    memory::{
        mapping,
        StateMemory, //
    },
    migration::Engine,
    region::{
        self,
        Position, //
    },
    user::UserBuf, //
};
use core::ptr::NonNull;
use kernel::{
    new_mutex, new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        Arc,
        Completion,
        Mutex,
        SpinLock, //
    },
};

/// User memory behind an IOMMU.
pub(super) type SharedMemory = dyn Memory + Send + Sync;

/// The work of a device, for its worker.
///
/// # Invariants
///
/// `device` is open during the lifetime of this value.
struct DeviceWork<T: Operations> {
    device: NonNull<bindings::vfio_device>,
    memory: Option<Arc<SharedMemory>>,
    opened: Arc<OpenDevice<T>>,
}

// SAFETY: The device may be used on any thread, see `Device`.
unsafe impl<T: Operations> Send for DeviceWork<T> where Arc<OpenDevice<T>>: Send {}

// SAFETY: As above.
unsafe impl<T: Operations> Sync for DeviceWork<T> where Arc<OpenDevice<T>>: Sync {}

impl<T: Operations> worker::Job for DeviceWork<T> {
    fn work(&self) -> Work {
        // SAFETY: By the type invariants.
        let device = unsafe { Device::<Open>::from_raw(self.device.as_ptr()) };
        let memory: &dyn Memory = match &self.memory {
            Some(memory) => &**memory,
            None => device,
        };
        let OpenDevice {
            data,
            function,
            log,
            ..
        } = &*self.opened;
        // SAFETY: By the type invariants, the device is open.
        let this = unsafe { Emulated::<T>::from_raw(self.device.as_ptr()) };
        let unlogged = || this.note_unlogged_write(device);
        T::work(data, &Bus::new(memory, log, &unlogged, &*function.gate))
    }
}

/// Private data of a device.
#[pin_data]
pub(super) struct Private<T: Operations> {
    #[pin]
    pub(super) data: T,
    config: ConfigSpace,
    /// Present if the device is behind an IOMMU.
    memory: Option<Arc<SharedMemory>>,
    #[pin]
    pub(super) engine: Engine<OpenDevice<T>>,
    /// Present while the device is open. Callbacks take a reference, because `request` may be
    /// called at any time.
    #[pin]
    opened: SpinLock<Option<Arc<OpenDevice<T>>>>,
    /// Present while the device is open, if the driver has [`Operations::work`].
    #[pin]
    worker: Mutex<Option<Worker<DeviceWork<T>>>>,
    /// Completed when the core has released the device.
    pub(super) released: Arc<Completion>,
}

impl<T: Operations> Private<T> {
    /// Creates the private data of a device that is not open. Calls `defaults` with the data of the
    /// driver, before all methods of the driver.
    pub(super) fn new(
        data: impl PinInit<T, Error>,
        defaults: impl FnOnce(&T) -> Result,
        memory: Option<Arc<SharedMemory>>,
        released: Arc<Completion>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data <- data,
            config: {
                defaults(&data)?;
                let config = data.config_space()?;
                // Only a function on a PCI bus is behind an IOMMU.
                if memory.is_some() {
                    config.express()
                } else {
                    config
                }
            },
            memory,
            engine <- Engine::new(data.migration_flags()),
            opened <- new_spinlock!(None, "vfio::emulated::Private::opened"),
            worker <- new_mutex!(None, "vfio::emulated::Private::worker"),
            released,
        }? Error)
    }
}

/// A device of driver `T`, allocated by the core.
///
/// # Invariants
///
/// `private` is initialised once `dev.ops` has `release`.
#[repr(C)]
pub(super) struct Emulated<T: Operations> {
    pub(super) dev: Device,
    pub(super) private: Private<T>,
}

impl<T: Operations> Emulated<T> {
    /// Returns the device of a callback.
    ///
    /// # Safety
    ///
    /// `vdev` must point to a device that [`Registration`](super::Registration) has allocated and
    /// finished, and its reference count must not be zero before `'a` ends.
    pub(super) unsafe fn from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a Self {
        // SAFETY: By the safety requirements and because `dev` is at offset 0.
        unsafe { &*vdev.cast() }
    }

    /// Returns the data of the open device. Fails with `ENODEV` if it is not open.
    pub(super) fn opened(&self) -> Result<Arc<OpenDevice<T>>> {
        self.private.opened.lock().clone().ok_or(ENODEV)
    }

    /// Creates the data of an open device, for the first open. May sleep.
    pub(super) fn open(&self) -> Result {
        self.private.engine.open()?;
        let function = Function::new(self.private.config)?;
        let data = self.private.data.open(function.clone());
        let data = Arc::pin_init(data, GFP_KERNEL_ACCOUNT)?;
        let mappable = self.mappable(&data)?;
        let opened = Arc::pin_init(
            try_pin_init!(OpenDevice {
                data,
                function,
                mappable,
                log <- dma::Log::new(),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        if T::HAS_WORK {
            // INVARIANT: `close()` drops the worker, and the core calls it before the device is
            // closed.
            let job = DeviceWork {
                device: NonNull::from(&self.dev).cast(),
                memory: self.private.memory.clone(),
                opened: opened.clone(),
            };
            let gate = opened.function.gate.clone();
            *self.private.worker.lock() = Some(Worker::new(T::NAME, gate, job)?);
        }
        *self.private.opened.lock() = Some(opened);
        Ok(())
    }

    /// Returns the memory that the user may map, for each region.
    ///
    /// Fails with `EINVAL`, and logs the reason, if it does not match the configuration space.
    fn mappable(
        &self,
        data: &T::OpenData,
    ) -> Result<[Option<StateMemory>; region::COUNT as usize]> {
        let config = &self.private.config;
        let mut mappable = [const { None }; region::COUNT as usize];
        for (index, to_map) in (0..).zip(&mut mappable) {
            let Some(memory) = T::mmap(data, index) else {
                continue;
            };
            if index == region::CONFIG || config.region_size(index) != memory.size() as u64 {
                pr_err!(
                    "{}: memory of {:#x} bytes is not the content of region {}\n",
                    T::NAME,
                    memory.size(),
                    index
                );
                return Err(EINVAL);
            }
            let msix = config.msix_place();
            if msix.vectors > 0 && msix.bar == index {
                pr_err!("{}: BAR{} has MSI-X and cannot be mapped\n", T::NAME, index);
                return Err(EINVAL);
            }
            *to_map = Some(memory.clone());
        }
        Ok(mappable)
    }

    /// Drops the data of an open device, for the last close. May sleep.
    pub(super) fn close(&self) {
        let worker = self.private.worker.lock().take();
        // Waits for the work under way.
        drop(worker);
        if let Ok(opened) = self.opened() {
            self.note_dropped_stores(&opened);
            let unreported = opened.log.has_pages();
            let ledger = self.private.engine.ledger();
            ledger.note(|verdict, _| verdict.log_end(false, unreported));
        }
        self.private.engine.close();
        let opened = self.private.opened.lock().take();
        // A driver may still hold the `Function`, but the eventfds belong to the user.
        if let Some(opened) = &opened {
            opened.function.irqs.silence();
        }
        // Dropped outside of the lock, because the driver's destructors may sleep.
        drop(opened);
    }

    /// Tells the verdict that the device has written to memory while the log was off.
    fn note_unlogged_write(&self, device: &Device<Open>) {
        let engine = &self.private.engine;
        if engine.state().is_pre_copy() && device.is_untracked() {
            engine.ledger().note(|verdict, _| verdict.unlogged_write());
        }
    }

    /// Tells the verdict about stores by mappings that were dropped. May sleep.
    pub(super) fn note_dropped_stores(&self, opened: &OpenDevice<T>) {
        let memories = opened.mappable.iter().flatten();
        let pages = memories.map(StateMemory::dropped).sum();
        let ledger = self.private.engine.ledger();
        ledger.note(|verdict, now| verdict.dropped_stores(now, pages));
    }

    /// Maps a region, for mmap().
    ///
    /// # Safety
    ///
    /// `vma` must be undergoing its setup in an mmap() of the file of `device`, which must be this
    /// device.
    pub(super) unsafe fn mmap(
        &self,
        device: &Device<Open>,
        vma: *mut bindings::vm_area_struct, //
    ) -> Result {
        let opened = self.opened()?;
        // SAFETY: `vma` is valid.
        let pos = i64::try_from(unsafe { (*vma).vm_pgoff } << PAGE_SHIFT)?;
        let pos = Position::from_file(pos)?;
        let memory = opened.mappable(pos.region_index).ok_or(EINVAL)?;
        let base = (Position::start_of(pos.region_index) >> PAGE_SHIFT) as usize;
        // SAFETY: By the safety requirements.
        unsafe { mapping::map(memory, device, base, vma) }
    }

    /// Returns the size in bytes of a region; zero if there is no such region.
    pub(super) fn region_size(&self, region_index: u32) -> u64 {
        self.private.config.region_size(region_index)
    }

    /// Serves a read() at a position in the device file. May sleep.
    pub(super) fn read(&self, user: &mut UserBuf, pos: i64) -> Result<usize> {
        let opened = self.opened()?;
        region::read(
            user,
            pos,
            |index| self.region_size(index),
            |pos, to| match pos.region_index {
                region::CONFIG => {
                    opened.function.read_config(pos.region_offset as usize, to);
                    Ok(())
                }
                _ => opened.function.gate.read(|| {
                    T::read(&opened.data, pos, to)?;
                    opened.function.read_msix(pos, to);
                    Ok(())
                }),
            },
        )
    }

    /// Serves a write() at a position in the device file. May sleep.
    pub(super) fn write(&self, user: &mut UserBuf, pos: i64) -> Result<usize> {
        let opened = self.opened()?;
        region::write(
            user,
            pos,
            |index| self.region_size(index),
            |pos, from| match pos.region_index {
                region::CONFIG => {
                    let offset = pos.region_offset as usize;
                    let enable = |on| opened.enable(on);
                    opened.function.write_config(offset, from, enable);
                    Ok(())
                }
                _ => {
                    let engine = &self.private.engine;
                    let mut is_quiesced = false;
                    let written = opened.function.gate.write(|| {
                        // Before the write, during which the state may begin.
                        is_quiesced = engine.state().is_p2p();
                        opened.function.write_msix(pos, from);
                        T::write(&opened.data, pos, from)
                    })?;
                    if is_quiesced || !written {
                        engine.ledger().note(|verdict, now| match written {
                            true => verdict.quiesced_write(now),
                            false => verdict.dropped_write(now),
                        });
                    }
                    Ok(())
                }
            },
        )
    }

    /// Serves an ioctl of the device file. May sleep.
    pub(super) fn ioctl(&self, cmd: u32, arg: usize) -> Result {
        let opened = self.opened()?;
        ioctl::serve(cmd, arg, &opened.function.irqs, || {
            // Must be first: a state change under way may wait for the work.
            let _halt = opened.function.gate.halt()?;
            self.note_dropped_stores(&opened);
            let result = self.private.engine.reset(&opened);
            self.note_dropped_stores(&opened);
            result
        })
    }
}
