// SPDX-License-Identifier: GPL-2.0

//! Devices without an IOMMU of their own.
//!
//! Such a device is emulated in software. It looks like a PCI device to its user, and accesses the
//! user's memory through VFIO. The user opens it through a group and a container, or through a
//! character device and an iommufd.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

pub mod config_space;
mod function;
mod gate;
mod irq;
pub mod region;
mod worker;

pub use self::{
    function::Function,
    gate::Work, //
};

use self::{
    config_space::ConfigSpace,
    gate::Reason,
    irq::Irqs,
    region::Position,
    worker::Worker, //
};
use crate::{
    bindings,
    compat::AsRaw,
    device::{
        Device,
        Open, //
    },
    dma::{
        self,
        Bus, //
    },
    memory::{
        mapping,
        StateMemory, //
    },
    migration::{
        Engine,
        Flags,
        Migratable,
        Notifier, //
    },
    user::UserBuf, //
};

use core::{
    marker::PhantomData,
    mem::{
        align_of,
        offset_of, //
    },
    ptr::NonNull, //
};
use kernel::{
    device::{
        self,
        Bound, //
    },
    error::{
        from_result,
        to_result, //
    },
    ioctl::_IO,
    new_mutex, new_spinlock,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Completion,
        Mutex,
        SpinLock, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// A driver of an emulated, migratable PCI device.
///
/// The implementing type is the data of the device from its creation to its removal. Data of a user
/// belongs in [`OpenData`](Self::OpenData) instead, which is created by the first open and dropped
/// by the last close, so that the next user cannot see it.
///
/// [`read`](Self::read) and [`write`](Self::write) may be called by any number of threads at the
/// same time, and beside the methods of [`Migratable`].
///
/// # Examples
///
/// A device with a BAR and two vectors of MSI-X. It has the open data of the example on the front
/// page.
///
/// ```
/// struct Signalling;
///
/// #[vtable]
/// impl emulated::Operations for Signalling {
///     type OpenData = Chip;
///     const NAME: &'static CStr = c"signalling";
///
///     fn config_space(&self) -> Result<ConfigSpace> {
///         let id = config_space::Id {
///             vendor: 0x1af4,
///             device: 0x10f2,
///             class: 0xff_0000,
///         };
///         ConfigSpace::new(id)
///             .memory_bar(region::BAR0 as usize, 0x4000, false)?
///             .msix(2, region::BAR0, 0x1000, 0x2000)
///     }
///
///     fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
///         try_pin_init!(Chip {
///             function,
///             registers <- new_mutex!(Registers::default(), "Chip::registers"),
///         }? Error)
///     }
///
///     fn read(_chip: &Chip, _pos: Position, to: &mut [u8]) -> Result {
///         to.fill(0);
///         Ok(())
///     }
///
///     fn write(chip: &Chip, pos: Position, _from: &[u8]) -> Result {
///         if pos.region_offset == 0 {
///             chip.function.signal(1);
///         }
///         Ok(())
///     }
/// }
/// ```
#[vtable]
pub trait Operations: Sized + Send + Sync + 'static {
    /// The data of an open device.
    type OpenData: Migratable;

    /// The name of the driver.
    const NAME: &'static CStr;

    /// Returns the migration states that the device supports. Called once, before it is registered.
    /// May sleep.
    ///
    /// By default, all states that the open data supports. It must not be more.
    fn migration_flags(&self) -> Flags {
        Self::OpenData::FLAGS
    }

    /// Returns the PCI configuration space at power on, which defines the BARs and interrupts of
    /// the device. Called once, before it is registered. May sleep.
    ///
    /// If it fails, the creation of the device fails with the same error.
    fn config_space(&self) -> Result<ConfigSpace>;

    /// Creates the data of an open device, in the state of power on.
    ///
    /// Called on the first open. May sleep. If it fails, the open fails with the same error.
    /// `function` is created for this open, too.
    fn open(&self, function: Arc<Function>) -> impl PinInit<Self::OpenData, Error>;

    /// Reads from a BAR. The whole range is inside the BAR. The [`Function`] replaces the bytes of
    /// the MSI-X table and pending bits in `to` afterwards.
    ///
    /// Called in any migration state, so a read must not change migrated state. No call is under
    /// way during a reset, or after a write to the command register that disables memory space:
    /// both wait for the calls under way, like in `vfio-pci`. So neither this nor
    /// [`write`](Self::write) may wait for [`work`](Self::work).
    ///
    /// May sleep. Called without access to user memory: the bytes are copied afterwards. A failure
    /// is returned from the read(), unless a part of it was served before.
    fn read(open: &Self::OpenData, pos: Position, to: &mut [u8]) -> Result;

    /// Writes to a BAR. The whole range is inside the BAR. The [`Function`] has handled writes to
    /// the MSI-X table, and the driver should ignore these bytes.
    ///
    /// Not called while the device is stopped or being reset: such writes are dropped and counted,
    /// see [`Function::dropped_writes()`]. [`Migratable::stop`] and [`Migratable::reset`] are
    /// called after the writes under way have returned.
    ///
    /// May sleep. Called without access to user memory: the bytes were copied before. An access of
    /// 1 to 8 bytes is passed as a whole, like on a bus. A longer one is passed in blocks of at
    /// most 64 KiB. A failure is returned from the write(), unless a part of it was served before.
    fn write(open: &Self::OpenData, pos: Position, from: &[u8]) -> Result;

    /// Returns the memory that is the content of a BAR and may be mapped by mmap(), if any.
    ///
    /// Stores to a mapping are tracked like writes, see [`StateMemory`]. The driver is not notified
    /// of them. They are dropped while the device is stopped.
    ///
    /// Called once for each region when the device is opened. The open fails with `EINVAL`, and the
    /// log has the reason, if the size of the memory differs from that of the BAR, or if the BAR
    /// has the MSI-X table or the pending bits, which a mapping would bypass. May sleep. By default
    /// [`None`].
    fn mmap(_open: &Self::OpenData, _region_index: u32) -> Option<&StateMemory> {
        None
    }

    /// Whether [`work`](Self::work) may access other devices: peer-to-peer DMA. If `false`, the
    /// work goes on in `RUNNING_P2P` and `PRE_COPY_P2P`. A driver cannot know whether an IOVA
    /// refers to another device, hence the default.
    const PEER_TO_PEER: bool = true;

    /// Does a piece of the device's own work, such as DMA, and returns when to be called next.
    ///
    /// Called repeatedly by a worker that exists from the first open to the last close, if the
    /// driver has this method. [`Function::wake()`] causes another call. Called without locks held.
    /// May sleep.
    ///
    /// The crate quiesces the work. When [`Migratable::quiesce_p2p`], [`Migratable::stop`] or
    /// [`Migratable::reset`] is called, no call is under way, and none begins before
    /// [`Migratable::resume_p2p`], [`Migratable::start`] or the reset has returned; then the worker
    /// is woken. Unfinished work waits, regardless of the return value, and the driver keeps it in
    /// the device's state. Hence:
    ///
    /// * Raise the interrupts of a piece before returning: later ones are not in the image.
    /// * Keep a piece short. State changes wait for the call under way. A reset and the last close
    ///   wait, too, but they make transfers of the [`Bus`] fail.
    /// * Allocate with [`GFP_MAYFAIL`](crate::memory::GFP_MAYFAIL), and handle failures.
    ///   Allocations are charged to the memory cgroup of the task that opened the device. With
    ///   other flags, the OOM killer may kill an unrelated process of that cgroup.
    fn work(_open: &Self::OpenData, _bus: &Bus<'_>) -> Work {
        Work::Wait
    }
}

/// Data that exists from the first open to the last close.
#[pin_data]
struct OpenDevice<T: Operations> {
    data: Arc<T::OpenData>,
    function: Arc<Function>,
    /// For each region, the memory that the user may map.
    mappable: [Option<StateMemory>; region::COUNT as usize],
    #[pin]
    log: dma::Log,
}

/// The device as the engine sees it: calls the driver, and does the front end's part. While the
/// device is stopped, interrupts are pending and stores to mappings are dropped.
#[vtable]
impl<T: Operations> Migratable for OpenDevice<T> {
    type OwnerModule = <T::OpenData as Migratable>::OwnerModule;
    type Saver = <T::OpenData as Migratable>::Saver;
    type Loader = <T::OpenData as Migratable>::Loader;
    const FLAGS: Flags = <T::OpenData as Migratable>::FLAGS;

    // A method is forwarded only if the driver has it.
    const HAS_QUIESCE_P2P: bool = <T::OpenData as Migratable>::HAS_QUIESCE_P2P;
    const HAS_RESUME_P2P: bool = <T::OpenData as Migratable>::HAS_RESUME_P2P;
    const HAS_PRE_COPY: bool = <T::OpenData as Migratable>::HAS_PRE_COPY;

    fn quiesce_p2p(&self) -> Result {
        let gate = &self.function.gate;
        if T::PEER_TO_PEER {
            gate.close(Reason::P2p)?;
        }
        self.data
            .quiesce_p2p()
            .inspect_err(|_| gate.open(Reason::P2p))
    }

    fn resume_p2p(&self) -> Result {
        self.data.resume_p2p()?;
        self.function.gate.open(Reason::P2p);
        Ok(())
    }

    fn stop(&self) -> Result {
        let gate = &self.function.gate;
        gate.close(Reason::Stopped)?;
        self.mapped()
            .try_for_each(StateMemory::freeze)
            .and_then(|()| self.data.stop())
            .inspect_err(|_| {
                self.mapped().for_each(StateMemory::thaw);
                gate.open(Reason::Stopped);
            })?;
        self.function.run(false);
        Ok(())
    }

    fn start(&self) -> Result {
        self.data.start()?;
        self.mapped().for_each(StateMemory::thaw);
        self.function.run(true);
        self.function.gate.open(Reason::Stopped);
        Ok(())
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver> {
        T::OpenData::pre_copy(&this.data, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver> {
        T::OpenData::save(&this.data, notifier)
    }

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Loader> {
        T::OpenData::load(&this.data, notifier)
    }

    fn loaded(&self, loader: &mut Self::Loader) -> Result {
        self.data.loaded(loader)
    }

    fn data_size(&self) -> Result<u64> {
        self.data.data_size()
    }

    fn is_broken(&self) -> bool {
        self.data.is_broken()
    }

    fn halt(&self) {
        self.function.gate.shut();
        self.function.run(false);
        for memory in self.mapped() {
            // A page is pinned, or the task was killed: no store by a mapping may pass.
            if memory.freeze().is_err() {
                memory.enable(false);
            }
        }
        self.data.halt();
    }

    fn reset(&self) -> Result {
        self.data.reset()?;
        self.mapped().for_each(StateMemory::reset);
        self.function.reset(|on| self.enable(on));
        self.function.gate.reset();
        Ok(())
    }
}

impl<T: Operations> OpenDevice<T> {
    /// Returns the memory that the user may map.
    fn mapped(&self) -> impl Iterator<Item = &StateMemory> {
        self.mappable.iter().flatten()
    }

    /// Sets whether the user may access mappings.
    fn enable(&self, enabled: bool) {
        self.mapped().for_each(|memory| memory.enable(enabled));
    }

    /// Returns the memory of a region, if the user may map it.
    fn mappable(&self, region_index: u32) -> Option<&StateMemory> {
        self.mappable.get(region_index as usize)?.as_ref()
    }
}

/// The work of a device, for its worker.
///
/// # Invariants
///
/// `device` is open during the lifetime of this value.
struct DeviceWork<T: Operations> {
    device: NonNull<bindings::vfio_device>,
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
        let OpenDevice {
            data,
            function,
            log,
            ..
        } = &*self.opened;
        T::work(data, &Bus::new(device, log, &*function.gate))
    }
}

/// Private data of a device.
#[pin_data]
struct Private<T: Operations> {
    #[pin]
    data: T,
    /// The configuration space at power on.
    config: ConfigSpace,
    #[pin]
    engine: Engine<OpenDevice<T>>,
    /// Present while the device is open. Callbacks take a reference, because `request` may be
    /// called at any time.
    #[pin]
    opened: SpinLock<Option<Arc<OpenDevice<T>>>>,
    /// Present while the device is open, if the driver has [`Operations::work`].
    #[pin]
    worker: Mutex<Option<Worker<DeviceWork<T>>>>,
    /// Completed when the core has released the device.
    released: Arc<Completion>,
}

/// A device of driver `T`, allocated by the core.
///
/// # Invariants
///
/// `private` is initialised once `dev.ops` is [`VTable::OPS`].
#[repr(C)]
struct Emulated<T: Operations> {
    dev: Device,
    private: Private<T>,
}

impl<T: Operations> Emulated<T> {
    /// Allocates the device. Its parent must have a driver, which must have a module.
    fn allocate(
        parent: &device::Device<Bound>,
        data: impl PinInit<T, Error>,
    ) -> Result<(ARef<Device>, Arc<Completion>)> {
        const {
            assert!(offset_of!(Self, dev) == 0);
            // The core allocates with kvzalloc().
            assert!(align_of::<Self>() <= PAGE_SIZE);
        }

        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;

        // SAFETY: `parent` is valid, the operations live for ever, and they have neither `init`
        // nor `release`, which would need `private` to be initialised.
        let raw = unsafe {
            bindings::_vfio_alloc_device(
                core::alloc::Layout::new::<Self>().pad_to_align().size(),
                parent.as_raw(),
                &VTable::<T>::UNINIT_OPS,
            )
        };
        let raw = kernel::error::from_err_ptr(raw)?;
        // SAFETY: `_vfio_alloc_device()` returned the only reference, and `Device` is a transparent
        // wrapper. If anything fails below, dropping it frees the memory.
        let dev = unsafe { ARef::from_raw(NonNull::new_unchecked(raw.cast::<Device>())) };

        let private_released = released.clone();
        // SAFETY: `raw` points to memory of the size of `Self`, in which `private` is not
        // initialised yet; the memory does not move.
        unsafe {
            pin_init::raw_try_init(
                &raw mut (*raw.cast::<Self>()).private,
                try_pin_init!(Private {
                    data <- data,
                    config: data.config_space()?,
                    engine <- Engine::new(data.migration_flags()),
                    opened <- new_spinlock!(None, "vfio::emulated::Private::opened"),
                    worker <- new_mutex!(None, "vfio::emulated::Private::worker"),
                    released: private_released,
                }? Error),
            )?
        };
        // INVARIANT: `private` has just been initialised.
        // SAFETY: `raw` is valid and not shared.
        unsafe {
            (*raw).ops = &VTable::<T>::OPS;
            (*raw).mig_ops = &VTable::<T>::MIG_OPS;
            // The core can report the log only with the bitmaps of iommufd.
            if cfg!(CONFIG_IOMMUFD_DRIVER) {
                (*raw).log_ops = &VTable::<T>::LOG_OPS;
            }
        }
        Ok((dev, released))
    }

    /// Returns the device of a callback.
    ///
    /// # Safety
    ///
    /// `vdev` must point to a device that [`Self::allocate()`] has returned, and its reference
    /// count must not be zero before `'a` ends.
    unsafe fn from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a Self {
        // SAFETY: By the safety requirements and because `dev` is at offset 0.
        unsafe { &*vdev.cast() }
    }

    /// Returns the data of the open device. Fails with `ENODEV` if it is not open.
    fn opened(&self) -> Result<Arc<OpenDevice<T>>> {
        self.private.opened.lock().clone().ok_or(ENODEV)
    }

    fn open(&self) -> Result {
        self.private.engine.open()?;
        let function = Function::new(self.private.config.clone())?;
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

    fn close(&self) {
        let worker = self.private.worker.lock().take();
        // Waits for the work under way.
        drop(worker);
        self.private.engine.close();
        let opened = self.private.opened.lock().take();
        // A driver may have kept the PCI function, but the eventfds belong to the user.
        if let Some(opened) = &opened {
            opened.function.irqs.silence();
        }
        // Dropped outside of the lock, because the driver's destructors may sleep.
        drop(opened);
    }

    /// Maps a region, for mmap().
    ///
    /// # Safety
    ///
    /// `vma` must be undergoing its setup in an mmap() of the file of `device`, which must be this
    /// device.
    unsafe fn mmap(
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

    fn region_size(&self, region_index: u32) -> u64 {
        self.private.config.region_size(region_index)
    }

    fn read(&self, user: &mut UserBuf, pos: i64) -> Result<usize> {
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

    fn write(&self, user: &mut UserBuf, pos: i64) -> Result<usize> {
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
                _ => opened.function.gate.write(|| {
                    opened.function.write_msix(pos, from);
                    T::write(&opened.data, pos, from)
                }),
            },
        )
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result {
        let opened = self.opened()?;
        match cmd {
            GET_INFO => Self::get_info(arg),
            GET_IRQ_INFO => Self::get_irq_info(&opened.function.irqs, arg),
            SET_IRQS => Self::set_irqs(&opened.function.irqs, arg),
            RESET => {
                // Must be first: a state change under way may wait for the work.
                let _halt = opened.function.gate.halt()?;
                self.private.engine.reset(&opened)
            }
            _ => Err(ENOTTY),
        }
    }

    /// Serves `VFIO_DEVICE_GET_INFO`.
    fn get_info(arg: usize) -> Result {
        let size = size_of::<bindings::vfio_device_info>();
        let (mut reader, mut writer) =
            UserSlice::new(UserPtr::from_addr(arg), size).reader_writer();
        let argsz = reader.read::<u32>()?;
        if (argsz as usize) < 4 * size_of::<u32>() {
            return Err(EINVAL);
        }
        let flags = bindings::VFIO_DEVICE_FLAGS_PCI | bindings::VFIO_DEVICE_FLAGS_RESET;
        // There are no capabilities: `cap_offset` and the padding are zero.
        let info = [argsz, flags, region::COUNT, irq::COUNT, 0, 0].map(u32::to_ne_bytes);
        let info = info.as_flattened();
        writer.write_slice(&info[..info.len().min(argsz as usize)])
    }

    /// Serves `VFIO_DEVICE_GET_IRQ_INFO`.
    fn get_irq_info(irqs: &Irqs, arg: usize) -> Result {
        let (mut reader, mut writer) =
            UserSlice::new(UserPtr::from_addr(arg), 4 * size_of::<u32>()).reader_writer();
        let argsz = reader.read::<u32>()?;
        let _flags = reader.read::<u32>()?;
        let index = reader.read::<u32>()?;
        if (argsz as usize) < 4 * size_of::<u32>() {
            return Err(EINVAL);
        }
        let (flags, count) = irqs.info(index)?;
        writer.write(&argsz)?;
        writer.write(&flags)?;
        writer.write(&index)?;
        writer.write(&count)
    }

    /// Serves `VFIO_DEVICE_SET_IRQS`.
    fn set_irqs(irqs: &Irqs, arg: usize) -> Result {
        // The header has the size of the data that follows it.
        let mut reader = UserSlice::new(UserPtr::from_addr(arg), usize::MAX).reader();
        let request = irq::Request {
            argsz: reader.read()?,
            flags: reader.read()?,
            index: reader.read()?,
            start: reader.read()?,
            count: reader.read()?,
        };
        irqs.set(request, &mut reader)
    }
}

const fn vfio_io(nr: u32) -> u32 {
    _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + nr)
}

/// `VFIO_DEVICE_GET_INFO`.
const GET_INFO: u32 = vfio_io(7);
/// `VFIO_DEVICE_GET_IRQ_INFO`.
const GET_IRQ_INFO: u32 = vfio_io(9);
/// `VFIO_DEVICE_SET_IRQS`.
const SET_IRQS: u32 = vfio_io(10);
/// `VFIO_DEVICE_RESET`.
const RESET: u32 = vfio_io(11);

/// The registration of an emulated device.
///
/// Dropping it removes the device: it asks the user to release the device, and waits until that has
/// happened.
pub(crate) struct Registration<T: Operations> {
    /// Present until the registration is dropped.
    dev: Option<ARef<Device>>,
    released: Arc<Completion>,
    _driver: PhantomData<T>,
}

impl<T: Operations> Registration<T> {
    /// Returns the driver's data of the device.
    pub(crate) fn data(&self) -> Option<&T> {
        let dev = self.dev.as_ref()?;
        // SAFETY: `new()` got it from `Emulated::allocate()`, and `dev` is a reference.
        let this = unsafe { Emulated::<T>::from_raw(dev.as_raw()) };
        Some(&this.private.data)
    }

    /// Creates a device below `parent` and registers it.
    ///
    /// May sleep. The device is live before this returns.
    ///
    /// # Safety
    ///
    /// The driver bound to `parent` must have set `driver.owner` to `T::OwnerModule`, and must
    /// drop the registration before `parent` is unbound from it. There must be no other
    /// registration of a VFIO device below `parent`.
    pub(crate) unsafe fn new(
        parent: &device::Device<Bound>,
        data: impl PinInit<T, Error>,
    ) -> Result<Self> {
        let (dev, released) = Emulated::<T>::allocate(parent, data)?;
        let raw = dev.as_raw();
        // SAFETY: `Emulated::allocate()` allocated and finished it, and `dev` is a reference.
        let this = unsafe { Emulated::<T>::from_raw(raw) };
        // SAFETY: `raw` is valid and the device is not registered yet.
        unsafe { (*raw).migration_flags = this.private.engine.flags().as_raw() as u32 };
        // SAFETY: `raw` is valid, the parent's driver has an owner, and the operations are
        // complete.
        to_result(unsafe { bindings::vfio_register_emulated_iommu_dev(raw) })?;
        Ok(Self {
            dev: Some(dev),
            released,
            _driver: PhantomData,
        })
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        let Some(dev) = self.dev.take() else {
            return;
        };
        // SAFETY: The device is registered, and no lock that its callbacks need is held.
        unsafe { bindings::vfio_unregister_group_dev(dev.as_raw()) };
        drop(dev);
        // A file that is being closed releases the registration first and the device later. Only
        // this wait keeps the module loaded until `release` has been called.
        self.released.wait_for_completion();
    }
}

/// The operations of driver `T` for the core.
struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    /// The operations while [`Emulated::private`] is not initialised.
    const UNINIT_OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        release: None,
        ..Self::OPS
    };

    const OPS: bindings::vfio_device_ops = bindings::vfio_device_ops {
        name: core::ptr::from_ref(T::NAME).cast::<c_char>().cast_mut(),
        release: Some(Self::release),
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_emulated_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_emulated_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_emulated_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_emulated_detach_ioas),
        open_device: Some(Self::open_device),
        close_device: Some(Self::close_device),
        read: Some(Self::read),
        write: Some(Self::write),
        ioctl: Some(Self::ioctl),
        mmap: Some(Self::mmap),
        get_region_info_caps: Some(Self::get_region_info_caps),
        request: Some(Self::request),
        ..pin_init::zeroed()
    };

    const MIG_OPS: bindings::vfio_migration_ops = bindings::vfio_migration_ops {
        migration_set_state: Some(Self::migration_set_state),
        migration_get_state: Some(Self::migration_get_state),
        migration_get_data_size: Some(Self::migration_get_data_size),
    };

    const LOG_OPS: bindings::vfio_log_ops = bindings::vfio_log_ops {
        log_start: Some(Self::log_start),
        log_stop: Some(Self::log_stop),
        log_read_and_clear: Some(Self::log_read_and_clear),
    };

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, when its last reference is
    /// gone.
    unsafe extern "C" fn release(vdev: *mut bindings::vfio_device) {
        // SAFETY: The device is valid, and by the type invariants its private part is initialised.
        let private = unsafe { &raw mut (*vdev.cast::<Emulated<T>>()).private };
        // SAFETY: As above.
        let released = unsafe { (*private).released.clone() };
        // SAFETY: The private part is not used any more. The core frees the memory.
        unsafe { core::ptr::drop_in_place(private) };
        released.complete_all();
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn open_device(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| this.open().map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn close_device(vdev: *mut bindings::vfio_device) {
        // SAFETY: The core holds a reference for the call.
        unsafe { Emulated::<T>::from_raw(vdev) }.close();
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ppos` must be valid.
    unsafe extern "C" fn read(
        vdev: *mut bindings::vfio_device,
        buf: *mut c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *ppos) };
        let mut user = UserBuf::new(UserPtr::from_ptr(buf.cast()), count);
        from_result(|| {
            let done = this.read(&mut user, *ppos)?;
            *ppos += done as i64;
            Ok(done as isize)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ppos` must be valid.
    unsafe extern "C" fn write(
        vdev: *mut bindings::vfio_device,
        buf: *const c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core holds a reference for the call, and `ppos` is valid.
        let (this, ppos) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *ppos) };
        let mut user = UserBuf::new(UserPtr::from_ptr(buf.cast_mut().cast()), count);
        from_result(|| {
            let done = this.write(&mut user, *ppos)?;
            *ppos += done as i64;
            Ok(done as isize)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn ioctl(
        vdev: *mut bindings::vfio_device,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| this.ioctl(cmd, arg).map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations, in an mmap() of its
    /// file that sets up `vma`.
    unsafe extern "C" fn mmap(
        vdev: *mut bindings::vfio_device,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and keeps the device open.
        let (this, device) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                Device::<Open>::from_raw(vdev),
            )
        };
        // SAFETY: By the safety requirements.
        from_result(|| unsafe { this.mmap(device, vma) }.map(|()| 0))
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `info` must be valid.
    unsafe extern "C" fn get_region_info_caps(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        _caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and `info` is valid.
        let (this, info) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *info) };
        if info.index >= region::COUNT {
            return EINVAL.to_errno();
        }
        info.size = this.region_size(info.index);
        info.offset = Position::start_of(info.index);
        info.flags = if info.size == 0 {
            0
        } else {
            bindings::VFIO_REGION_INFO_FLAG_READ | bindings::VFIO_REGION_INFO_FLAG_WRITE
        };
        let opened = this.opened();
        if opened.is_ok_and(|opened| opened.mappable(info.index).is_some()) {
            info.flags |= bindings::VFIO_REGION_INFO_FLAG_MMAP;
        }
        0
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn request(vdev: *mut bindings::vfio_device, count: c_uint) {
        // SAFETY: The core holds a reference for the call, and the parent is bound to its driver
        // until the registration is dropped, which waits for this.
        let (this, parent) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                device::Device::from_raw((*vdev).dev),
            )
        };
        if let Ok(opened) = this.opened() {
            // A transfer may keep the memory of a dead process, and with it the device, alive.
            opened.function.gate.interrupt();
            opened.function.irqs.request(parent, count);
        }
    }

    /// # Safety
    ///
    /// Must be called by the core on an open device with these operations.
    unsafe extern "C" fn migration_set_state(
        vdev: *mut bindings::vfio_device,
        new_state: bindings::vfio_device_mig_state,
    ) -> *mut bindings::file {
        // SAFETY: The core holds a reference for the call, and keeps the device open.
        let (this, device) = unsafe {
            (
                Emulated::<T>::from_raw(vdev),
                Device::<Open>::from_raw(vdev),
            )
        };
        let file = this
            .opened()
            .and_then(|opened| this.private.engine.set_state(&opened, device, new_state.0));
        match file {
            // The core takes over the reference.
            Ok(Some(file)) => ARef::into_raw(file).as_ptr().cast(),
            Ok(None) => core::ptr::null_mut(),
            Err(e) => e.to_ptr(),
        }
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations, open or not. `state` must be
    /// valid.
    unsafe extern "C" fn migration_get_state(
        vdev: *mut bindings::vfio_device,
        state: *mut bindings::vfio_device_mig_state,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        // SAFETY: `state` is valid.
        unsafe { (*state).0 = this.private.engine.state().as_raw() };
        0
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `length` must be valid.
    unsafe extern "C" fn migration_get_data_size(
        vdev: *mut bindings::vfio_device,
        length: *mut c_ulong,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            let opened = this.opened()?;
            let size = this.private.engine.data_size(&opened)?;
            // SAFETY: `length` is valid.
            unsafe { *length = size as c_ulong };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `ranges` must be a tree of
    /// `nnodes` nodes, and `page_size` must be valid.
    unsafe extern "C" fn log_start(
        vdev: *mut bindings::vfio_device,
        ranges: *mut bindings::rb_root_cached,
        nnodes: u32,
        page_size: *mut u64,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call, and `page_size` is valid.
        let (this, page_size) = unsafe { (Emulated::<T>::from_raw(vdev), &mut *page_size) };
        from_result(|| {
            let opened = this.opened()?;
            let mut list = KVVec::with_capacity(nnodes as usize, GFP_KERNEL_ACCOUNT)?;
            // SAFETY: The tree is valid.
            let mut node = unsafe { (*ranges).rb_leftmost };
            while !node.is_null() {
                const { assert!(offset_of!(bindings::interval_tree_node, rb) == 0) };
                // SAFETY: The node is the first field of one in an interval tree.
                let range = unsafe { &*node.cast::<bindings::interval_tree_node>() };
                // The core does not reject empty ranges, which end before they begin.
                if range.last.wrapping_add(1) == range.start {
                    return Err(EINVAL);
                }
                list.push((range.start as u64, range.last as u64), GFP_KERNEL_ACCOUNT)?;
                // SAFETY: The node is valid.
                node = unsafe { bindings::rb_next(node) };
            }
            *page_size = opened.log.start(list, *page_size)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations.
    unsafe extern "C" fn log_stop(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            this.opened()?.log.stop();
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Must be called by the core on a device with these operations. `dirty` must be valid.
    unsafe extern "C" fn log_read_and_clear(
        vdev: *mut bindings::vfio_device,
        iova: c_ulong,
        length: c_ulong,
        dirty: *mut bindings::iova_bitmap,
    ) -> c_int {
        // SAFETY: The core holds a reference for the call.
        let this = unsafe { Emulated::<T>::from_raw(vdev) };
        from_result(|| {
            let last = length
                .checked_sub(1)
                .and_then(|more| iova.checked_add(more))
                .ok_or(EINVAL)?;
            let opened = this.opened()?;
            opened.log.report(iova as u64, last as u64, |first, len| {
                // SAFETY: The bitmap is valid, and no lock is held.
                unsafe { bindings::vfio_iova_bitmap_set(dirty, first as c_ulong, len as usize) };
            })?;
            Ok(0)
        })
    }
}
