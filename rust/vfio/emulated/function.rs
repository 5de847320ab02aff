// SPDX-License-Identifier: GPL-2.0

//! The PCI function of an emulated device: its configuration space and its interrupts.

use crate::{
    emulated::{
        config_space::{
            self,
            ConfigSpace,
            Content,
            SIZE, //
        },
        gate::Gate,
        irq::{
            msix,
            Irqs, //
        },
    },
    region::Position, //
};
use core::ops::Range;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};

/// Maximum number of bytes of the MSI-X table that are copied at once, with interrupts disabled.
const BLOCK: usize = 1 << 10;

/// The PCI function of an open device: its configuration space and its interrupts.
///
/// The front end serves the user's accesses. A driver signals interrupts, and saves and loads the
/// content. The configuration space works while the device is stopped: it belongs to the bus. The
/// user restores it on the target of a migration, like with `vfio-pci`. The copy in the stream is
/// only compared with it, and never replaces the values that the user has written.
///
/// # The command register
///
/// When the device is opened, and after a reset, memory space is enabled and bus mastering is
/// disabled. Without memory space, accesses to BARs fail with `EIO`, and accesses by mmap() raise
/// `SIGBUS`. Without bus mastering, [`Operations::work`](crate::emulated::Operations::work) is not
/// called, and interrupts are pending. When a write to the register disables one of them, all
/// operations that need it have ended when the write returns; transfers that take longer than 100
/// ms fail. The register has no effect after the last close.
///
/// # Interrupts
///
/// An interrupt is pending while the device is stopped (in `STOP`, `STOP_COPY` and `RESUMING`), bus
/// mastering is disabled, the vector is masked, or no eventfd is set for it. It is delivered as
/// soon as none of these applies. Several pending interrupts of a vector are delivered as one. The
/// user can read the pending bits in the device's BAR.
///
/// A vector is masked by `VFIO_DEVICE_SET_IRQS`, by its bit in the MSI-X table or by the function
/// mask in the configuration space. At power on, no vector is masked: users of VFIO switch MSI-X on
/// and off with `VFIO_DEVICE_SET_IRQS`, and many never write to the table of the device.
///
/// The table and the pending bits belong to the device and migrate. The eventfds, the masks of
/// `VFIO_DEVICE_SET_IRQS` and the function mask in the configuration space belong to the user,
/// which sets them again on the target before the device runs.
///
/// # Examples
///
/// A device that signals a vector each time it has counted to a thousand.
///
/// ```
/// use kernel::sync::atomic::{
///     Atomic,
///     Relaxed, //
/// };
///
/// struct Counter {
///     function: Arc<Function>,
///     count: Atomic<u32>,
/// }
///
/// impl Counter {
///     const VECTOR: u32 = 0;
///
///     fn step(&self) {
///         if self.count.fetch_add(1, Relaxed) % 1000 == 999 {
///             self.function.signal(Self::VECTOR);
///         }
///     }
/// }
/// ```
#[pin_data]
pub struct Function {
    space: ConfigSpace,
    place: config_space::Msix,
    #[pin]
    config: Mutex<Content>,
    #[pin]
    pub(crate) irqs: Irqs,
    pub(crate) gate: Arc<Gate>,
}

impl Function {
    /// Creates the PCI function of a running device at power on, without eventfds.
    pub(crate) fn new(space: ConfigSpace) -> Result<Arc<Self>> {
        let place = space.msix_place();
        let this = Arc::pin_init(
            try_pin_init!(Self {
                space,
                place,
                config <- new_mutex!(pin_init::init_zeroed(), "vfio::emulated::Function::config"),
                irqs <- Irqs::new(place.vectors),
                gate: Gate::new()?,
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        let mut config = this.config.lock();
        this.space.reset(&mut config);
        this.follow(&config);
        drop(config);
        Ok(this)
    }

    /// Raises the interrupt of an MSI-X vector. Does nothing if the vector does not exist.
    ///
    /// Does not sleep. May be called in any context except a non-maskable interrupt, including hard
    /// interrupts, and with locks held: it takes a spinlock with interrupts disabled, and under it
    /// the locks of the eventfd's waiters. With `PREEMPT_RT` these locks sleep. Then it must be
    /// called from a thread, which most handlers of interrupts and timers are.
    pub fn signal(&self, vector: u32) {
        self.irqs.signal(vector);
    }

    /// Sets whether the device runs. While it does not, interrupts are pending.
    pub(crate) fn run(&self, running: bool) {
        self.irqs.msix(|msix| msix.run(running));
    }

    /// Kicks the worker, so that [`Operations::work`](crate::emulated::Operations::work) is called
    /// again as soon as the device may work. Does not sleep.
    ///
    /// May be called with locks held, but not in interrupts, soft or hard, and not with a lock held
    /// that an interrupt takes: it takes a spinlock without disabling interrupts. With `PREEMPT_RT`
    /// that lock sleeps.
    ///
    /// Not needed when the device runs again after it was stopped, quiesced or reset, or when bus
    /// mastering is enabled: the crate does it.
    pub fn wake(&self) {
        self.gate.kick();
    }

    /// Returns whether [`Operations::work`](crate::emulated::Operations::work) may be called now.
    ///
    /// It must not be called in the P2P states, unless the driver declares that
    /// [it does no peer-to-peer DMA](crate::emulated::Operations::PEER_TO_PEER), in `STOP`,
    /// `STOP_COPY` and `RESUMING`, during a reset, or while bus mastering is disabled. Does not
    /// sleep. May be called where [`wake()`](Self::wake) may.
    pub fn may_work(&self) -> bool {
        self.gate.admits_work()
    }

    /// Returns the number of writes to BARs that were dropped since the last reset, because the
    /// device was stopped. Does not sleep. May be called where [`wake()`](Self::wake) may.
    pub fn dropped_writes(&self) -> u64 {
        self.gate.dropped()
    }

    /// Reads from the configuration space.
    pub(crate) fn read_config(&self, offset: usize, to: &mut [u8]) {
        config_space::read(&self.config.lock(), offset, to);
    }

    /// Writes to the configuration space, and calls `enable` with whether BARs are decoded now. May
    /// sleep.
    ///
    /// When this returns, no DMA or access to a BAR is under way that the write has disabled.
    pub(crate) fn write_config(&self, offset: usize, from: &[u8], enable: impl FnOnce(bool)) {
        let mut config = self.config.lock();
        self.space.write(&mut config, offset, from);
        self.follow(&config);
        enable(config_space::is_decoding(&config));
        drop(config);
        self.gate.drain();
    }

    /// Puts the configuration space into effect. Called with `config` locked.
    fn follow(&self, config: &Content) {
        let masked = self.space.is_function_masked(config);
        let master = config_space::is_master(config);
        self.irqs.msix(|msix| msix.configure(masked, master));
        self.gate.command(config_space::is_decoding(config), master);
    }

    /// Returns the part of an access of `len` bytes that overlaps the `size` bytes at `base` in the
    /// BAR of MSI-X, and the offset in these bytes at which it starts.
    fn overlap(&self, pos: Position, len: usize, base: u32, size: usize) -> (Range<usize>, usize) {
        let (base, at) = (u64::from(base), pos.region_offset);
        let start = at.max(base);
        let end = (at + len as u64).min(base + size as u64);
        if pos.region_index != self.place.bar || start >= end {
            return (0..0, 0);
        }
        let bytes = (start - at) as usize..(end - at) as usize;
        (bytes, (start - base) as usize)
    }

    /// Reads the part of an access that overlaps the MSI-X table and pending bits. The rest of `to`
    /// is unchanged.
    pub(crate) fn read_msix(&self, pos: Position, to: &mut [u8]) {
        let vectors = self.place.vectors as usize;
        let (bytes, offset) =
            self.overlap(pos, to.len(), self.place.table, msix::table_size(vectors));
        let blocks = to.get_mut(bytes).unwrap_or(&mut []).chunks_mut(BLOCK);
        for (offset, to) in (offset..).step_by(BLOCK).zip(blocks) {
            self.irqs.msix(|msix| msix.read_table(offset, to));
        }
        let (bytes, offset) = self.overlap(
            pos,
            to.len(),
            self.place.pending,
            msix::pending_size(vectors),
        );
        if let Some(to) = to.get_mut(bytes).filter(|to| !to.is_empty()) {
            self.irqs.msix(|msix| msix.read_pending(offset, to));
        }
    }

    /// Writes the part of an access that overlaps the MSI-X table, unless the device is stopped.
    /// The pending bits cannot be written.
    pub(crate) fn write_msix(&self, pos: Position, from: &[u8]) {
        let size = msix::table_size(self.place.vectors as usize);
        let (bytes, offset) = self.overlap(pos, from.len(), self.place.table, size);
        let blocks = from.get(bytes).unwrap_or(&[]).chunks(BLOCK);
        for (offset, from) in (offset..).step_by(BLOCK).zip(blocks) {
            self.irqs.msix(|msix| msix.write_table(offset, from));
        }
    }

    /// Resets configuration space, MSI-X table and pending bits to the state at power on, and tells
    /// `enable` that BARs are decoded. The setup by `VFIO_DEVICE_SET_IRQS` is unchanged.
    pub(crate) fn reset(&self, enable: impl FnOnce(bool)) {
        let mut config = self.config.lock();
        self.space.reset(&mut config);
        self.irqs.msix(|msix| msix.reset());
        self.follow(&config);
        enable(config_space::is_decoding(&config));
    }

    /// Returns the content of the configuration space, for the stream. May sleep.
    pub fn save_config(&self) -> [u8; SIZE] {
        *self.config.lock()
    }

    /// Returns whether a configuration space in a stream belongs to such a device: whether all
    /// read-only parts are equal. Does not sleep.
    ///
    /// Called by a driver that loads. The driver does not restore the configuration space: the
    /// writable part belongs to the bus, and the user restores it.
    pub fn accepts_config(&self, bytes: &[u8; SIZE]) -> bool {
        self.space.accepts(bytes)
    }

    /// Copies the MSI-X table, followed by the pending bits, for the stream. Does not sleep.
    ///
    /// `to` must have [`msix_size`](config_space::msix_size) bytes. If it is shorter, the copy is
    /// truncated; if it is longer, the rest is unchanged.
    pub fn save_msix(&self, to: &mut [u8]) {
        let table = msix::table_size(self.place.vectors as usize);
        self.irqs.msix(|msix| {
            msix.read_table(0, to);
            msix.read_pending(0, to.get_mut(table..).unwrap_or(&mut []));
        });
    }

    /// Returns whether MSI-X table and pending bits in a stream belong to such a device:
    /// [`load_msix`] would succeed. Does not sleep.
    ///
    /// [`load_msix`]: Self::load_msix
    pub fn accepts_msix(&self, bytes: &[u8]) -> bool {
        let table = msix::table_size(self.place.vectors as usize);
        bytes
            .get(table..)
            .is_some_and(|pending| self.irqs.msix(|msix| msix.accepts_pending(pending)))
    }

    /// Replaces MSI-X table and pending bits by those in a stream. Interrupts that were pending on
    /// the source are delivered when the device runs.
    ///
    /// Fails with `EINVAL`, and changes nothing, if these do not belong to such a device: if the
    /// length differs, or if the pending bit of a missing vector is set. Does not sleep.
    pub fn load_msix(&self, bytes: &[u8]) -> Result {
        let table = msix::table_size(self.place.vectors as usize);
        let (table, pending) = bytes.split_at_checked(table).ok_or(EINVAL)?;
        self.irqs.msix(|msix| {
            if !msix.accepts_pending(pending) {
                return Err(EINVAL);
            }
            msix.load(table, pending);
            Ok(())
        })
    }
}
