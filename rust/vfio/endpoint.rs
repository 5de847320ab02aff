// SPDX-License-Identifier: GPL-2.0

//! What an emulated device is on its PCI bus.

use crate::{
    config_space::{
        self,
        ConfigSpace,
        SIZE, //
    },
    gate::Gate,
    irq::{
        msix,
        Irqs, //
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

/// Most bytes of the MSI-X table that are copied at once, with interrupts disabled.
const BLOCK: usize = 1 << 10;

/// The PCI side of an open device: its configuration space and its interrupts.
///
/// The front end serves the user's accesses to it; a driver signals interrupts, and saves and loads
/// what is in it. The configuration space works while the device is stopped: it belongs to the bus.
/// The user restores it on the target of a migration, as with `vfio-pci`: what comes by the stream
/// is compared with it, and never replaces what the user has written.
///
/// # The command register
///
/// When the device is opened, and after a reset, memory space is on and bus mastering off. Without
/// memory space accesses to BARs fail with `EIO`, and those by mmap() with `SIGBUS`. Without bus
/// mastering [`Operations::work`](crate::emulated::Operations::work) is not called, and interrupts
/// wait. What is under way when one of them is switched off has ended when the write to the
/// register returns; transfers that take longer than 100 ms fail. After the last close nothing of
/// it has an effect any more.
///
/// # Interrupts
///
/// An interrupt that cannot be delivered at once waits, and is delivered as soon as it can be: if
/// the device is stopped (in `STOP`, `STOP_COPY` and `RESUMING`), if bus mastering is off, if the
/// vector is masked, or if no eventfd is set for it yet. Several that wait in a vector are
/// delivered as one. The pending bits, which the user can read in the device's BAR, tell which
/// vectors have one that waits.
///
/// A vector is masked by `VFIO_DEVICE_SET_IRQS`, by its bit in the MSI-X table or by the function
/// mask in the configuration space. At power on none is: users of VFIO switch MSI-X on and off by
/// `VFIO_DEVICE_SET_IRQS`, and many never write the table of the device.
///
/// What migrates is what belongs to the device: table and pending bits. The eventfds, the masks of
/// `VFIO_DEVICE_SET_IRQS` and the function mask in the configuration space belong to the user, who
/// sets them again on the target before the device runs.
///
/// # Examples
///
/// A device that signals a vector when it has counted to a thousand, whatever it is doing.
///
/// ```
/// use kernel::sync::atomic::{
///     Atomic,
///     Relaxed, //
/// };
///
/// struct Counter {
///     endpoint: Arc<Endpoint>,
///     count: Atomic<u32>,
/// }
///
/// impl Counter {
///     const VECTOR: u32 = 0;
///
///     fn step(&self) {
///         if self.count.fetch_add(1, Relaxed) % 1000 == 999 {
///             self.endpoint.signal(Self::VECTOR);
///         }
///     }
/// }
/// ```
#[pin_data]
pub struct Endpoint {
    power_on: ConfigSpace,
    place: config_space::Msix,
    #[pin]
    config: Mutex<ConfigSpace>,
    #[pin]
    pub(crate) irqs: Irqs,
    pub(crate) gate: Arc<Gate>,
}

impl Endpoint {
    /// Makes the PCI side of a running device at power on, with its interrupts silent.
    pub(crate) fn new(power_on: ConfigSpace) -> Result<Arc<Self>> {
        let place = power_on.msix_place();
        let this = Arc::pin_init(
            try_pin_init!(Self {
                config <- new_mutex!(power_on.clone(), "vfio::endpoint::Endpoint::config"),
                power_on,
                place,
                irqs <- Irqs::new(place.vectors),
                gate: Gate::new()?,
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        this.follow(&this.power_on);
        Ok(this)
    }

    /// Raises the interrupt of an MSI-X vector. Nothing happens if there is no such vector.
    ///
    /// Does not sleep. May be called in any context but a non-maskable interrupt, in hard
    /// interrupts too, and with locks held: it takes a spinlock with interrupts disabled, and under
    /// it those of the eventfd's waiters. With `PREEMPT_RT` these locks sleep, so that it must be
    /// called from a thread, which handlers of interrupts are there.
    pub fn signal(&self, vector: u32) {
        self.irqs.signal(vector);
    }

    /// Says whether the device runs. While it does not, interrupts wait.
    pub(crate) fn run(&self, running: bool) {
        self.irqs.msix(|msix| msix.run(running));
    }

    /// Lets [`Operations::work`](crate::emulated::Operations::work) be called again, as soon as the
    /// device may work. Does not sleep. Must not be called in interrupts.
    ///
    /// Not needed when the device runs again after it was stopped, quiesced or reset, or when bus
    /// mastering is switched on: the crate does it.
    pub fn wake(&self) {
        self.gate.kick();
    }

    /// Returns whether [`Operations::work`](crate::emulated::Operations::work) may be called now.
    ///
    /// It may not in the P2P states, unless the driver says that
    /// [it does no peer-to-peer DMA](crate::emulated::Operations::PEER_TO_PEER), nor in `STOP`,
    /// `STOP_COPY` and `RESUMING`, nor during a reset, nor while bus mastering is off. Does not
    /// sleep. Not for interrupts.
    pub fn may_work(&self) -> bool {
        self.gate.admits_work()
    }

    /// Returns the number of writes to BARs that were dropped since the last reset, because the
    /// device was stopped. Does not sleep. Not for interrupts.
    pub fn dropped_writes(&self) -> u64 {
        self.gate.dropped()
    }

    /// Reads from the configuration space.
    pub(crate) fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.config.lock().read(offset, to);
    }

    /// Writes to the configuration space, and tells `enable` whether BARs are decoded now. May
    /// sleep.
    ///
    /// When this returns nothing is under way any more that the write forbids: no DMA, or no access
    /// to a BAR.
    pub(crate) fn write_config(&self, offset: usize, from: &[u8], enable: impl FnOnce(bool)) {
        let mut config = self.config.lock();
        config.write(offset, from);
        self.follow(&config);
        enable(config.is_decoding());
        drop(config);
        self.gate.settle();
    }

    /// Puts what the configuration space says into effect. Called with `config` locked.
    fn follow(&self, config: &ConfigSpace) {
        let (masked, master) = (config.is_function_masked(), config.is_master());
        self.irqs.msix(|msix| msix.configure(masked, master));
        self.gate.command(config.is_decoding(), master);
    }

    /// Returns which bytes of an access of `len` bytes meet the `size` bytes at `base` in the BAR
    /// of MSI-X, and where in these they begin.
    fn meet(&self, pos: Position, len: usize, base: u32, size: usize) -> (Range<usize>, usize) {
        let (base, at) = (u64::from(base), pos.region_offset);
        let start = at.max(base);
        let end = (at + len as u64).min(base + size as u64);
        if pos.region_index != self.place.bar || start >= end {
            return (0..0, 0);
        }
        let bytes = (start - at) as usize..(end - at) as usize;
        (bytes, (start - base) as usize)
    }

    /// Reads from the MSI-X table and pending bits, as far as an access meets them. The rest of
    /// `to` is left as it is.
    pub(crate) fn read_msix(&self, pos: Position, to: &mut [u8]) {
        let vectors = self.place.vectors as usize;
        let (bytes, offset) = self.meet(pos, to.len(), self.place.table, msix::table_size(vectors));
        let blocks = to.get_mut(bytes).unwrap_or(&mut []).chunks_mut(BLOCK);
        for (offset, to) in (offset..).step_by(BLOCK).zip(blocks) {
            self.irqs.msix(|msix| msix.read_table(offset, to));
        }
        let (bytes, offset) = self.meet(
            pos,
            to.len(),
            self.place.pending,
            msix::pending_size(vectors),
        );
        if let Some(to) = to.get_mut(bytes).filter(|to| !to.is_empty()) {
            self.irqs.msix(|msix| msix.read_pending(offset, to));
        }
    }

    /// Writes to the MSI-X table, as far as an access meets it, unless the device is stopped. The
    /// pending bits cannot be written.
    pub(crate) fn write_msix(&self, pos: Position, from: &[u8]) {
        let size = msix::table_size(self.place.vectors as usize);
        let (bytes, offset) = self.meet(pos, from.len(), self.place.table, size);
        let blocks = from.get(bytes).unwrap_or(&[]).chunks(BLOCK);
        for (offset, from) in (offset..).step_by(BLOCK).zip(blocks) {
            self.irqs.msix(|msix| msix.write_table(offset, from));
        }
    }

    /// Brings configuration space, MSI-X table and pending bits into the state of power on, and
    /// tells `enable` that BARs are decoded. What the user set up by `VFIO_DEVICE_SET_IRQS` stays.
    pub(crate) fn reset(&self, enable: impl FnOnce(bool)) {
        let mut config = self.config.lock();
        *config = self.power_on.clone();
        self.irqs.msix(|msix| msix.reset());
        self.follow(&config);
        enable(config.is_decoding());
    }

    /// Returns the content of the configuration space, for the stream. May sleep.
    pub fn save_config(&self) -> [u8; SIZE] {
        *self.config.lock().save()
    }

    /// Tells whether a configuration space in a stream is of such a device: whether it differs in
    /// nothing that cannot be written. May sleep.
    ///
    /// For a driver that loads. There is nothing more to do with it: what can be written belongs to
    /// the bus, and the user restores it.
    pub fn accepts_config(&self, bytes: &[u8; SIZE]) -> bool {
        self.config.lock().accepts(bytes)
    }

    /// Copies the MSI-X table, and behind it the pending bits, for the stream. Does not sleep.
    ///
    /// `to` has to have [`msix_size`](config_space::msix_size) bytes; what is missing is not
    /// copied, what is more is left as it is.
    pub fn save_msix(&self, to: &mut [u8]) {
        let table = msix::table_size(self.place.vectors as usize);
        self.irqs.msix(|msix| {
            msix.read_table(0, to);
            msix.read_pending(0, to.get_mut(table..).unwrap_or(&mut []));
        });
    }

    /// Tells whether MSI-X table and pending bits in a stream are of such a device: [`load_msix`]
    /// would succeed. Does not sleep.
    ///
    /// [`load_msix`]: Self::load_msix
    pub fn accepts_msix(&self, bytes: &[u8]) -> bool {
        let table = msix::table_size(self.place.vectors as usize);
        bytes
            .get(table..)
            .is_some_and(|pending| self.irqs.msix(|msix| msix.accepts_pending(pending)))
    }

    /// Replaces MSI-X table and pending bits by what is in a stream. What waited on the source is
    /// delivered when the device runs.
    ///
    /// Fails with `EINVAL`, and changes nothing, if that is not of such a device: if it is not as
    /// long, or has a pending bit of a vector that is not there. Does not sleep.
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
