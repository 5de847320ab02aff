// SPDX-License-Identifier: GPL-2.0

//! Live migration.
//!
//! A driver implements [`Migratable`] for the data of an open device: one method for each *kind* of
//! thing the device must be able to do, a [`Saver`] that cuts the device's state into [`Chunk`]s,
//! and a [`Loader`] that takes such a stream in. The [`Engine`] does the rest of what the uAPI asks
//! for: the states and the paths between them, the sessions and their data_fd, what read(), poll()
//! and the ioctls of that file answer, who waits for whom, and what happens on reset and close.
//!
//! # What is called when
//!
//! The user asks for a state; the engine walks there along the arcs of [`fsm`], one by one, and on
//! each arc calls, in this order:
//!
//! | from | to | calls |
//! |---|---|---|
//! | `RUNNING` | `RUNNING_P2P` | [`quiesce_p2p`] |
//! | `RUNNING_P2P` | `RUNNING` | [`resume_p2p`] |
//! | `RUNNING_P2P` | `STOP` | [`stop`] |
//! | `STOP` | `RUNNING_P2P` | [`start`] |
//! | `RUNNING` | `STOP` | [`quiesce_p2p`], [`stop`]; without P2P |
//! | `STOP` | `RUNNING` | [`start`], [`resume_p2p`]; without P2P |
//! | `RUNNING` | `PRE_COPY` | [`pre_copy`] |
//! | `RUNNING_P2P` | `PRE_COPY_P2P` | [`pre_copy`] |
//! | `PRE_COPY` | `PRE_COPY_P2P` | [`quiesce_p2p`] |
//! | `PRE_COPY_P2P` | `PRE_COPY` | [`resume_p2p`] |
//! | `PRE_COPY_P2P` | `STOP_COPY` | [`stop`], [`Saver::seal`] |
//! | `PRE_COPY` | `STOP_COPY` | [`quiesce_p2p`], [`stop`], [`Saver::seal`]; without P2P |
//! | `STOP` | `STOP_COPY` | [`save`], [`Saver::seal`] |
//! | `PRE_COPY` | `RUNNING` | the saver is dropped |
//! | `PRE_COPY_P2P` | `RUNNING_P2P` | the saver is dropped |
//! | `STOP_COPY` | `STOP` | the saver is dropped |
//! | `STOP` | `RESUMING` | [`load`] |
//! | `RESUMING` | `STOP` | [`loaded`], the loader is dropped |
//!
//! Without P2P is without `VFIO_MIGRATION_P2P` in the device's [`Flags`].
//!
//! After the calls to [`pre_copy`] and to [`Saver::seal`] comes one of [`Saver::next`].
//!
//! If a method fails, what was called before on the same arc is undone, and the state is the one
//! from which the arc leads; the arcs before it stay done. If undoing fails too, or if the driver
//! says that the device [is broken](Migratable::is_broken), the state is `ERROR`, which only
//! [`reset`] leaves, and [`halt`] is called. Reset and the last close come in any state; both drop
//! the saver or loader first, and close calls nothing else.
//!
//! [`quiesce_p2p`]: Migratable::quiesce_p2p
//! [`resume_p2p`]: Migratable::resume_p2p
//! [`stop`]: Migratable::stop
//! [`start`]: Migratable::start
//! [`pre_copy`]: Migratable::pre_copy
//! [`save`]: Migratable::save
//! [`load`]: Migratable::load
//! [`loaded`]: Migratable::loaded
//! [`reset`]: Migratable::reset
//! [`halt`]: Migratable::halt
//!
//! # Locking
//!
//! `Engine::current` serialises state changes and is held while the driver's methods run. Each
//! session has a lock of its own, inside of which the saver or loader runs. Neither is ever held
//! while user memory is accessed, so that an unserved page fault delays only the faulting task.
//! What an ioctl asks for waits for either lock killably: a task that is killed does not stay
//! behind one that waits for the device.
//!
//! vfio-pci calls `reset_done` of the PCI driver with its `memory_lock` held, and the methods of a
//! variant driver may take that lock in a state change. With it held, only these may be called:
//! [`Engine::state()`], [`Engine::fail()`] and [`Engine::reset_done()`]. They do not wait for
//! `Engine::current`: if it is held, the holder does the rest before releasing it. They may end a
//! session and drop its saver or loader, whose destructor, and whose methods that were called
//! before, must not need `memory_lock`.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

mod data_file;
mod engine;
pub mod fsm;
mod image;

pub use self::{
    engine::Engine,
    fsm::{
        Flags,
        State, //
    },
    image::{
        ImageLoader,
        ImageSaver, //
    },
};

use crate::memory::PageRun;
use kernel::{
    iov::IovIterDest,
    new_spinlock_irq,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{
            AtomicFlag,
            Relaxed, //
        },
        poll::PollCondVarBox,
        Arc,
        SpinLockIrq, //
    },
};

/// What a device must be able to do to be migrated.
///
/// Implemented by the data of an open device, which exists from the first open to the last close,
/// and which a [`Saver`] or [`Loader`] may share.
///
/// No two methods run at the same time on one device. The methods of its [`Saver`] or [`Loader`]
/// may run beside them. All may sleep, and none is called with a lock held that a user copy is made
/// under.
///
/// A method that fails leaves the device as it was, unless [`is_broken`](Self::is_broken) says
/// otherwise. What it fails with is what the user's ioctl fails with: `ENOMEM` for want of memory,
/// `EINVAL` for a stream that is not good, `EIO` for a device that does not answer, `ENODEV` for
/// one that is gone. A method that waits does so killably, and fails with `ERESTARTSYS` only if the
/// task is being killed. `EINTR` and `EAGAIN` are not errors of a state change.
///
/// # Examples
///
/// A device that does DMA to other devices. Its state is that of the example on the front page.
///
/// ```
/// #[pin_data]
/// struct Engines {
///     chip: Arc<Chip>,
///     #[pin]
///     allowed: Mutex<Allowed>,
/// }
///
/// struct Allowed {
///     work: bool,
///     peers: bool,
/// }
///
/// #[vtable]
/// impl Migratable for Engines {
///     type Saver = ImageSaver;
///     type Loader = ImageLoader;
///     const FLAGS: Flags = Flags::STOP_COPY.with_p2p();
///
///     fn quiesce_p2p(&self) -> Result {
///         // Held while a transfer is under way, so that this waits for it.
///         self.allowed.lock().peers = false;
///         Ok(())
///     }
///
///     fn resume_p2p(&self) -> Result {
///         self.allowed.lock().peers = true;
///         Ok(())
///     }
///
///     fn stop(&self) -> Result {
///         self.allowed.lock().work = false;
///         Ok(())
///     }
///
///     fn start(&self) -> Result {
///         self.allowed.lock().work = true;
///         Ok(())
///     }
///
///     fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageSaver> {
///         Chip::save(&this.chip, notifier)
///     }
///
///     fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<ImageLoader> {
///         Chip::load(&this.chip, notifier)
///     }
///
///     fn loaded(&self, loader: &mut ImageLoader) -> Result {
///         self.chip.loaded(loader)
///     }
///
///     fn data_size(&self) -> Result<u64> {
///         self.chip.data_size()
///     }
///
///     fn reset(&self) -> Result {
///         self.chip.reset()?;
///         *self.allowed.lock() = Allowed {
///             work: true,
///             peers: true,
///         };
///         Ok(())
///     }
/// }
/// ```
#[vtable]
pub trait Migratable: Send + Sync + 'static {
    /// Cuts the device's state into a stream.
    type Saver: Saver;

    /// Takes such a stream in.
    type Loader: Loader;

    /// Which states such a device supports.
    ///
    /// `VFIO_MIGRATION_P2P` needs [`quiesce_p2p`](Self::quiesce_p2p) and
    /// [`resume_p2p`](Self::resume_p2p), `VFIO_MIGRATION_PRE_COPY` needs
    /// [`pre_copy`](Self::pre_copy); without them the driver does not build.
    const FLAGS: Flags;

    /// Ends peer-to-peer DMA, for the arcs from `RUNNING` to `RUNNING_P2P` and from `PRE_COPY` to
    /// `PRE_COPY_P2P`.
    ///
    /// When it returns no transfer to another device is under way and none starts any more. With
    /// `VFIO_MIGRATION_P2P` a device that does no DMA has nothing to do, and says so.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    /// Allows peer-to-peer DMA again, for the arcs back, and to undo
    /// [`quiesce_p2p`](Self::quiesce_p2p) on an arc that fails.
    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    /// Stops the device: when it returns, there is no DMA and no interrupt any more, and nothing
    /// changes the device's state but a [`Loader`] and [`reset`](Self::reset). What an
    /// [`Endpoint`](crate::endpoint::Endpoint) is signalled afterwards waits until the device runs.
    ///
    /// Called after [`quiesce_p2p`](Self::quiesce_p2p), and to undo [`start`](Self::start) on an
    /// arc that fails.
    fn stop(&self) -> Result;

    /// Lets the device go on from where it was stopped, without peer-to-peer DMA. Also called to
    /// undo [`stop`](Self::stop) on an arc that fails.
    fn start(&self) -> Result;

    /// Begins to save the device while it runs, for the arcs to `PRE_COPY` and `PRE_COPY_P2P`.
    ///
    /// From here on changes of its state are tracked, until the saver is dropped. Otherwise as
    /// [`save`](Self::save). Not called without `VFIO_MIGRATION_PRE_COPY`.
    fn pre_copy(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<Self::Saver> {
        Err(EINVAL)
    }

    /// Begins to save the device, which is stopped, for the arc to `STOP_COPY`.
    ///
    /// When the session ends, for whatever reason, the saver is dropped. It keeps `notifier` if
    /// anything becomes readable by itself: if it returns [`Next::NotReady`], or [`Next::End`] in
    /// [`Phase::PreCopy`].
    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver>;

    /// Begins to load, for the arc from `STOP` to `RESUMING`.
    ///
    /// When the session ends the loader is dropped. It keeps `notifier` if it is not always
    /// [ready](Loader::is_ready).
    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Loader>;

    /// Puts into effect what was loaded, for the arc from `RESUMING` to `STOP`.
    ///
    /// Fails with `EINVAL` if the stream is not complete; the device then stays in `RESUMING`, and
    /// the user may write the rest or reset the device. Any other error is final for the session,
    /// like one of [`Loader::write`]. Not called after such an error.
    fn loaded(&self, loader: &mut Self::Loader) -> Result;

    /// Returns how many bytes `STOP_COPY` would stream if it began now, headers included.
    ///
    /// Called while no session is open, for `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`, which fails with
    /// the same error. May ask firmware: neither poll() nor [`Engine::state()`] waits for it. A
    /// state change and a reset do, killably, because no two methods run at the same time; hence a
    /// driver bounds the time that it gives its firmware.
    fn data_size(&self) -> Result<u64>;

    /// Tells whether the device is broken: no longer in the state that the engine has it in.
    ///
    /// Called after another method has failed. If it is broken, nothing is undone and the state is
    /// `ERROR`; if not, the device is as it was before the method was called.
    /// [`reset`](Self::reset) mends it. Does not sleep. A device without hardware does not break.
    fn is_broken(&self) -> bool {
        false
    }

    /// Keeps the device from running, as far as that is possible, because its state is `ERROR` now:
    /// what an arc has done could not be undone, or [`reset`](Self::reset) failed, or the device
    /// [is broken](Self::is_broken). May sleep.
    ///
    /// Called after the method that failed. [`reset`](Self::reset) lets the device run again. By
    /// default nothing is done. Not called for [`Engine::fail()`], which the driver calls itself.
    fn halt(&self) {}

    /// Brings the device into the state of power on, running. For `VFIO_DEVICE_RESET`.
    ///
    /// Called in any state, when the session has ended. If it fails the state is `ERROR`, and the
    /// ioctl fails with the same error. May sleep.
    ///
    /// Waits for nothing that depends on a user: state changes wait for it, and so does the close.
    /// A fatal signal need not end it, since it takes no longer than the device is large.
    fn reset(&self) -> Result;
}

/// When a chunk is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// In `PRE_COPY` or `PRE_COPY_P2P`: the device goes on and may change what was saved.
    PreCopy,
    /// In `STOP_COPY`: the device is stopped and the stream must come to its end.
    StopCopy,
}

/// What comes next in the stream.
pub enum Next {
    /// These bytes. A chunk without any is a mistake: read() fails with `EIO`.
    Chunk(Chunk),
    /// Something that the device has not got ready yet. The reader waits, or fails with `EAGAIN`
    /// if it does not want to, until the [`Notifier`] tells.
    NotReady,
    /// Nothing: in [`Phase::PreCopy`] nothing for now, in [`Phase::StopCopy`] nothing ever.
    End,
}

/// How much a saver has not handed out yet, in bytes of the stream, headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// What was never handed out.
    pub initial: u64,
    /// What was handed out and has changed since.
    pub dirty: u64,
    /// What only [`Phase::StopCopy`] can hand out.
    pub tail: u64,
    /// How often the device has re-initialised itself since the session began, which makes all
    /// of its state initial again.
    pub reinits: u32,
}

impl Remaining {
    /// Returns how many bytes are left in a phase.
    fn left(&self, phase: Phase) -> u64 {
        let left = self.initial.saturating_add(self.dirty);
        match phase {
            Phase::PreCopy => left,
            Phase::StopCopy => left.saturating_add(self.tail),
        }
    }
}

/// Cuts the state of a device into a stream.
///
/// The methods run one at a time, under the session's lock. They may sleep but must not wait for
/// the user, nor for anything that waits for a state change.
///
/// When the session ends the saver is dropped, in the context of whoever ends it, which may sleep.
///
/// # Examples
///
/// A saver that goes through tracked memory, page by page, and again through what has changed.
///
/// ```
/// use kernel::page::PAGE_SIZE;
///
/// struct PageSaver {
///     tracking: Tracking,
/// }
///
/// impl Saver for PageSaver {
///     fn next(&mut self, _phase: Phase) -> Result<Next> {
///         let Some(page) = self.tracking.take(1) else {
///             return Ok(Next::End);
///         };
///         let number = page.pages().start as u64;
///         Ok(Next::Chunk(Chunk::new(&number.to_le_bytes())?.pages(page)))
///     }
///
///     fn remaining(&self) -> Result<Remaining> {
///         let pending = self.tracking.pending();
///         let record = (size_of::<u64>() + PAGE_SIZE) as u64;
///         Ok(Remaining {
///             initial: pending.initial.pages * record,
///             dirty: pending.dirty.pages * record,
///             reinits: pending.reinits,
///             ..Default::default()
///         })
///     }
/// }
/// ```
pub trait Saver: Send + Unpin + 'static {
    /// Returns what comes next in the stream.
    ///
    /// Called by a read(), and when a session or [`Phase::StopCopy`] begins, but not before what
    /// was returned last has been read entirely. The engine keeps the answer for poll(), which
    /// calls no method of a driver. A failure is returned by one read(), which asks again before it
    /// returns.
    ///
    /// The driver calls [`Notifier::notify()`] when [`Next::NotReady`] is right no longer, and in
    /// [`Phase::PreCopy`] when something is left after [`Next::End`] or after
    /// [`remaining`](Self::remaining) said that nothing is.
    fn next(&mut self, phase: Phase) -> Result<Next>;

    /// Returns how much there is to come, without what [`next`](Self::next) has returned.
    ///
    /// For `VFIO_MIG_GET_PRECOPY_INFO` and `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`, which fail with the
    /// same error. It should be exact: users decide by it when to stop the device. The kernel log
    /// tells, once, about a saver that has bytes left at its end, and about one that has a chunk
    /// although nothing was left and nothing was notified since. May ask firmware: poll() does not
    /// call it.
    fn remaining(&self) -> Result<Remaining>;

    /// Makes ready for `STOP_COPY`. The device is stopped. Fails if the state cannot be saved;
    /// the state change then fails with the same error, the device goes on and the session with it.
    ///
    /// Called on each arc to `STOP_COPY`, before [`next`](Self::next) is asked in that phase. Not
    /// called again after it succeeded. If it failed, it is called again when the user tries again:
    /// the device may have run meanwhile.
    fn seal(&mut self) -> Result {
        Ok(())
    }
}

/// Takes a stream in.
///
/// A loader may change the device before the image is complete: only [`Migratable::loaded`],
/// [`Migratable::reset`] or the last close lead out of `RESUMING`, so that a device with half of an
/// image never runs.
///
/// The methods run one at a time, under the session's lock. They may sleep but must not wait for
/// the user, nor for anything that waits for a state change.
///
/// When the session ends the loader is dropped, in the context of whoever ends it, which may sleep.
///
/// # Examples
///
/// A loader of the stream in the example of [`Saver`].
///
/// ```
/// use kernel::page::PAGE_SIZE;
///
/// struct PageLoader {
///     memory: StateMemory,
///     /// Of `size_of::<u64>() + PAGE_SIZE` bytes each.
///     records: Records,
/// }
///
/// impl Loader for PageLoader {
///     fn write(&mut self, bytes: &[u8]) -> Result {
///         let memory = &self.memory;
///         self.records.feed(bytes, |record| {
///             let (number, page) = record.split_first_chunk().ok_or(EINVAL)?;
///             let number = usize::try_from(u64::from_le_bytes(*number))?;
///             memory.write(number.checked_mul(PAGE_SIZE).ok_or(EINVAL)?, page)
///         })
///     }
/// }
/// ```
pub trait Loader: Send + Unpin + 'static {
    /// Takes the next bytes of the stream, however the user cut it.
    ///
    /// A failure is final for the session: every later write() and the arc to `STOP` fail with
    /// the same error. `EINVAL` is the one for a stream that is not good.
    fn write(&mut self, bytes: &[u8]) -> Result;

    /// Tells whether [`write`](Self::write) can take bytes at once. If not, the device has not got
    /// ready for them yet: the writer waits, or fails with `EAGAIN` if it does not want to, until
    /// the [`Notifier`] tells.
    ///
    /// Also for poll(): it reads what the driver knows, does not ask firmware, and does not sleep.
    /// Once it is ready it stays so until it gets bytes.
    fn is_ready(&self) -> bool {
        true
    }
}

/// Most bytes at the head of a [`Chunk`].
const HEAD: usize = 64;

/// What follows the head of a [`Chunk`].
enum Body {
    /// Bytes that were made for the purpose.
    Bytes(KVVec<u8>),
    /// Pages of the device's memory.
    Pages(PageRun),
}

/// A piece of the stream: a few bytes of header, and a body that is not copied on its way.
///
/// # Examples
///
/// A record of up to 16 pages that changed, with the number of the first in front, and how many.
///
/// ```
/// fn record(tracking: &Tracking) -> Result<Option<Chunk>> {
///     let Some(run) = tracking.take(16) else {
///         return Ok(None);
///     };
///     let mut head = [0; 16];
///     head[..8].copy_from_slice(&(run.pages().start as u64).to_le_bytes());
///     head[8..].copy_from_slice(&(run.pages().len() as u64).to_le_bytes());
///     Ok(Some(Chunk::new(&head)?.pages(run)))
/// }
/// ```
pub struct Chunk {
    head: [u8; HEAD],
    head_len: usize,
    body: Body,
    initial: bool,
}

impl Chunk {
    /// Makes a chunk of at most 64 bytes.
    ///
    /// Fails with `EINVAL` if there are more.
    pub fn new(bytes: &[u8]) -> Result<Self> {
        let mut head = [0; HEAD];
        head.get_mut(..bytes.len())
            .ok_or(EINVAL)?
            .copy_from_slice(bytes);
        Ok(Self {
            head,
            head_len: bytes.len(),
            body: Body::Bytes(KVVec::new()),
            initial: false,
        })
    }

    /// Lets bytes follow, in place of what was to follow before.
    pub fn bytes(self, bytes: KVVec<u8>) -> Self {
        Self {
            body: Body::Bytes(bytes),
            ..self
        }
    }

    /// Lets pages of tracked memory follow, in place of what was to follow before.
    ///
    /// The chunk counts as initial or not, as the pages do.
    pub fn pages(self, run: PageRun) -> Self {
        Self {
            initial: run.is_initial(),
            body: Body::Pages(run),
            ..self
        }
    }

    /// Says that what is in it was never handed out before.
    pub fn initial(self) -> Self {
        Self {
            initial: true,
            ..self
        }
    }

    /// Notes that a reader gets the chunk, so that its pages count as streamed.
    fn hand_out(&mut self) {
        if let Body::Pages(run) = &mut self.body {
            run.hand_out();
        }
    }

    /// Returns the size in bytes.
    fn len(&self) -> usize {
        self.head_len
            + match &self.body {
                Body::Bytes(bytes) => bytes.len(),
                Body::Pages(run) => run.bytes().len(),
            }
    }

    /// Copies what is behind `pos` to the user and returns how much was taken.
    fn copy_to(&self, pos: usize, user: &mut IovIterDest<'_>) -> usize {
        let head = self.head.get(pos..self.head_len).unwrap_or(&[]);
        let copied = user.copy_to_iter(head);
        if copied < head.len() {
            return copied;
        }
        let pos = (pos + copied).saturating_sub(self.head_len);
        copied
            + match &self.body {
                Body::Bytes(bytes) => user.copy_to_iter(bytes.get(pos..).unwrap_or(&[])),
                Body::Pages(run) => {
                    let range = run.bytes();
                    let rest = range.start.saturating_add(pos)..range.end;
                    run.memory().copy_to_iter(rest, user)
                }
            }
    }
}

/// Puts records of one size together again, however the user cut the stream. For a [`Loader`].
///
/// # Examples
///
/// ```
/// struct Sum {
///     records: Records,
///     sum: u64,
/// }
///
/// impl Sum {
///     fn new() -> Result<Self> {
///         Ok(Self {
///             records: Records::new(size_of::<u64>())?,
///             sum: 0,
///         })
///     }
/// }
///
/// impl Loader for Sum {
///     fn write(&mut self, bytes: &[u8]) -> Result {
///         let sum = &mut self.sum;
///         self.records.feed(bytes, |record| {
///             let word = record.try_into().map_err(|_| EINVAL)?;
///             *sum = sum.wrapping_add(u64::from_le_bytes(word));
///             Ok(())
///         })
///     }
/// }
/// ```
pub struct Records {
    /// The record that is arriving.
    record: KVec<u8>,
    size: usize,
}

impl Records {
    /// Makes room for a record of `size` bytes. May sleep.
    ///
    /// Fails with `EINVAL` if `size` is zero, and with `ENOMEM`.
    pub fn new(size: usize) -> Result<Self> {
        if size == 0 {
            return Err(EINVAL);
        }
        Ok(Self {
            record: KVec::with_capacity(size, GFP_KERNEL_ACCOUNT)?,
            size,
        })
    }

    /// Takes bytes in, and calls `take` for each record that becomes complete.
    ///
    /// Fails with what `take` fails with. After that it is of no use, as the [`Loader`] is.
    pub fn feed(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8]) -> Result) -> Result {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let missing = self.size - self.record.len();
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.record.extend_from_slice(now, GFP_KERNEL_ACCOUNT)?;
            if self.record.len() == self.size {
                take(&self.record)?;
                self.record.clear();
            }
            bytes = later;
        }
        Ok(())
    }

    /// Tells whether a record has arrived in part.
    pub fn is_partial(&self) -> bool {
        !self.record.is_empty()
    }
}

/// By which a device tells whoever waits for a session's data.
///
/// There is one for each session, which [`Migratable::save`] or [`Migratable::load`] gets.
///
/// # Examples
///
/// A saver that is not ready until the device's firmware is, which tells by an interrupt.
///
/// ```
/// use kernel::sync::atomic::{
///     Acquire,
///     Atomic,
///     Release, //
/// };
///
/// struct Firmware {
///     ready: Atomic<bool>,
///     notifier: Arc<Notifier>,
/// }
///
/// impl Firmware {
///     /// May be called in any context.
///     fn interrupt(&self) {
///         self.ready.store(true, Release);
///         self.notifier.notify();
///     }
/// }
///
/// struct SlowSaver {
///     firmware: Arc<Firmware>,
///     image: ImageSaver,
/// }
///
/// impl Saver for SlowSaver {
///     fn next(&mut self, phase: Phase) -> Result<Next> {
///         if !self.firmware.ready.load(Acquire) {
///             return Ok(Next::NotReady);
///         }
///         self.image.next(phase)
///     }
///
///     fn remaining(&self) -> Result<Remaining> {
///         self.image.remaining()
///     }
/// }
/// ```
#[pin_data]
pub struct Notifier {
    /// In a box of its own, for which nobody has to wait when it goes: a `PollCondVar` by itself
    /// holds up close() and state changes for a grace period of RCU.
    wait: PollCondVarBox,
    /// How often somebody was told. Who waits for the device compares it under the lock, so that
    /// being told before falling asleep counts too.
    #[pin]
    events: SpinLockIrq<u32>,
    /// The device of the session is stopped. Set under the session's lock.
    stopped: AtomicFlag,
}

impl Notifier {
    fn new(phase: Phase) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                stopped: AtomicFlag::new(phase == Phase::StopCopy),
                wait: PollCondVarBox::new(c"vfio::migration::Notifier", static_lock_class!())?,
                events <- new_spinlock_irq!(0, "vfio::migration::Notifier::events"),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Wakes readers and pollers, because something may have become readable: poll() says so, and
    /// read() asks the saver again. Does not sleep.
    ///
    /// May be called in any context but a non-maskable interrupt, in hard interrupts too, and with
    /// locks held: it takes spinlocks with interrupts disabled. With `PREEMPT_RT` these locks
    /// sleep, so that it must be called from a thread, as which most handlers of interrupts and
    /// timers run there.
    ///
    /// Dropping the last reference may sleep.
    pub fn notify(&self) {
        let mut events = self.events.lock();
        *events = events.wrapping_add(1);
        drop(events);
        self.wait.notify_all();
    }

    /// Returns the phase of the session.
    pub(crate) fn phase(&self) -> Phase {
        match self.stopped.load(Relaxed) {
            true => Phase::StopCopy,
            false => Phase::PreCopy,
        }
    }

    /// Sets the phase of the session, whose lock is held.
    fn set_phase(&self, phase: Phase) {
        self.stopped.store(phase == Phase::StopCopy, Relaxed);
    }

    /// Wakes those who wait for their turn. What the saver said last still holds.
    fn wake(&self) {
        self.wait.notify_all();
    }

    /// Returns how often somebody was told.
    fn events(&self) -> u32 {
        *self.events.lock()
    }

    /// Waits until somebody is told after `seen` was returned by [`events()`](Self::events).
    ///
    /// Fails with `ERESTARTSYS` at a signal.
    fn wait_after(&self, seen: u32) -> Result {
        let mut events = self.events.lock();
        while *events == seen {
            if self.wait.wait_interruptible(&mut events) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(())
    }
}
