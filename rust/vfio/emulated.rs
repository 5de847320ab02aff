// SPDX-License-Identifier: GPL-2.0

//! Software devices.
//!
//! Such a device looks like a PCI device to its user, and accesses the user's memory through VFIO,
//! or through a software IOMMU. The user opens it through a group and a container, or
//! through a character device and an iommufd. The administrator creates it on the bus of a front
//! end: [`mdev`](crate::mdev) or [`soft_pci`](crate::soft_pci).
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

pub mod config_space;

mod device;
mod driver;
mod function;
mod gate;
mod ioctl;
mod irq;
mod registration;
mod vtable;
mod worker;

pub use crate::region;

pub(crate) use self::{
    driver::{
        set_defaults,
        Files, //
    },
    registration::{
        Path,
        Registration, //
    }, //
};
pub use self::{
    driver::{
        Attribute,
        Driver,
        Type, //
    },
    function::Function,
    gate::Work, //
};

use self::{
    config_space::ConfigSpace,
    gate::Reason, //
};
use crate::{
    dma::{
        self,
        Bus,
        LogRequest, //
    },
    memory::StateMemory,
    migration::{
        Flags,
        Migratable,
        Notifier,
        State, //
    },
    region::Position, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// A driver of an emulated, migratable PCI device.
///
/// The implementing type is the data of the device from its creation to its removal. Data of a user
/// belongs in [`OpenData`](Self::OpenData) instead, which is created by the first open and dropped
/// by the last close, so that the next user cannot see it.
///
/// Any number of threads may call [`read`](Self::read) and [`write`](Self::write) at the same time,
/// also while a method of [`Migratable`] runs.
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
    /// By default, all states that the open data supports. A driver may return fewer, but not more.
    fn migration_flags(&self) -> Flags {
        Self::OpenData::FLAGS
    }

    /// Returns whether the device has a DMA log, by default true. Called once, before it is
    /// registered. Does not sleep.
    fn has_dma_log(&self) -> bool {
        true
    }

    /// Returns the description of the PCI configuration space, which defines the BARs and
    /// interrupts of the device. Called once, before it is registered. May sleep.
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
    /// May sleep. The bytes are copied to the user after this has returned. A failure is returned
    /// from the read(), unless a part of it was served before.
    fn read(open: &Self::OpenData, pos: Position, to: &mut [u8]) -> Result;

    /// Writes to a BAR. The whole range is inside the BAR. The [`Function`] has handled writes to
    /// the MSI-X table, and the driver should ignore these bytes.
    ///
    /// Not called while the device is stopped: such writes are dropped and counted, see
    /// [`Function::dropped_writes()`]. Writes during a reset, or during a state change that stops
    /// the device, wait for its end. [`Migratable::stop`] and [`Migratable::reset`] are called
    /// after the writes under way have returned.
    ///
    /// May sleep. The bytes were copied from the user before the call. An access of 1 to 8 bytes is
    /// passed as a whole, like on a bus. A longer one is passed in blocks of at most 64 KiB. A
    /// failure is returned from the write(), unless a part of it was served before.
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

    /// Begins a request for the DMA log. If this fails, so does the request, and the log does not
    /// change. May sleep.
    ///
    /// For drivers that refuse requests, such as those for tests. The last close is no request.
    fn begin_log(_open: &Self::OpenData, _request: LogRequest) -> Result {
        Ok(())
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

/// Forwards the engine's calls to the driver, and quiesces the parts of the device that the crate
/// implements. While the device is stopped, interrupts are pending and stores to mappings are
/// dropped.
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

    fn begin_arc(&self, from: State, to: State) -> Result {
        self.data.begin_arc(from, to)
    }

    fn end_arc(&self) {
        self.function.gate.settle();
        self.data.end_arc();
    }

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
        gate.close(Reason::Stopping)?;
        self.mapped()
            .try_for_each(StateMemory::freeze)
            .and_then(|()| self.data.stop())
            .inspect_err(|_| {
                self.mapped().for_each(StateMemory::thaw);
                gate.open(Reason::Stopping);
            })?;
        // Writes wait for the end of the arc, which may still fail.
        self.function.run(false);
        Ok(())
    }

    fn start(&self) -> Result {
        self.data.start()?;
        self.mapped().for_each(StateMemory::thaw);
        self.function.run(true);
        self.function.gate.start();
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
                memory.fail();
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
