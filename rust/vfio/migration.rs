// SPDX-License-Identifier: GPL-2.0

//! Live migration.
//!
//! A driver implements [`Migratable`] for the data of an open device: methods that stop and start
//! parts of the device, a [`Saver`] that cuts the device's state into [`Chunk`]s, and a [`Loader`]
//! that consumes such a stream. The [`Engine`] implements the rest of the uAPI: the states and the
//! paths between them, the sessions and their data_fd, read(), poll() and the ioctls of that file,
//! waiting, reset and close.
//!
//! # What is called when
//!
//! The user sets a target state. The engine walks to it arc by arc, on the path that
//! `vfio_mig_get_next_state()` selects. On each arc it calls, in this order:
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
//! "Without P2P" means without `VFIO_MIGRATION_P2P` in the device's [`Flags`].
//!
//! [`begin_arc`] is called first on each arc, and [`end_arc`] last. Each call of [`pre_copy`] and
//! [`Saver::seal`] is followed by one of [`Saver::next`].
//!
//! If a method fails, the calls before it on the same arc are undone, and the state is the start of
//! the arc. Earlier arcs are not undone. If undoing fails too, or if the driver reports that the
//! device [is broken](Migratable::is_broken), the state is `ERROR`, which only [`reset`] leaves,
//! and [`halt`] is called. Reset and the last close can happen in any state. Both drop the saver or
//! loader first, and close calls no method.
//!
//! [`begin_arc`]: Migratable::begin_arc
//! [`end_arc`]: Migratable::end_arc
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
//! session has a lock of its own, under which the saver or loader runs. Neither is ever held while
//! user memory is accessed, so that an unserved page fault delays only the faulting task. Ioctls
//! wait killably for either lock: a killed task does not stay blocked by a task that waits for the
//! device. The end of a session is an exception: it waits uninterruptibly for the method of the
//! saver or loader under way. A driver must limit the time of these methods.
//!
//! vfio-pci calls `reset_done` of the PCI driver with its `memory_lock` held, and the methods of a
//! variant driver may take that lock in a state change. With it held, only these may be called:
//! [`Engine::state()`], [`Engine::fail()`] and [`Engine::reset_done()`]. They do not wait for
//! `Engine::current`: if it is held, the holder completes the operation before releasing it. They
//! may end a session and drop its saver or loader. The destructor, and methods of the saver or
//! loader that still run, must not need `memory_lock`.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

mod data_file;
mod engine;
pub mod fsm;
mod image;
mod ledger;
// Public for tests, which build the file as a crate of its own.
#[allow(unreachable_pub)]
mod verdict;

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
pub(crate) use self::{
    engine::{
        file_to_ptr,
        ResetBy, //
    },
    ledger::Ledger, //
};
pub use crate::notifier::{
    Notifier,
    Phase, //
};

use crate::{
    bindings,
    bindings::vfio_device_mig_state,
    memory::PageRun,
    user::GFP_MAYFAIL, //
};
use kernel::{
    iov::IovIterDest,
    prelude::*,
    sync::Arc, //
};

// `fsm` uses `core` alone.
static_assert!(State::Error.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_ERROR.0);
static_assert!(State::Stop.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_STOP.0);
static_assert!(State::Running.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_RUNNING.0);
static_assert!(State::StopCopy.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_STOP_COPY.0);
static_assert!(State::Resuming.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_RESUMING.0);
static_assert!(
    State::RunningP2p.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_RUNNING_P2P.0
);
static_assert!(State::PreCopy.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_PRE_COPY.0);
static_assert!(
    State::PreCopyP2p.as_raw() == vfio_device_mig_state::VFIO_DEVICE_STATE_PRE_COPY_P2P.0
);
static_assert!(Flags::STOP_COPY.as_raw() == bindings::VFIO_MIGRATION_STOP_COPY as u64);
static_assert!(
    Flags::STOP_COPY.with_p2p().as_raw()
        == (bindings::VFIO_MIGRATION_STOP_COPY | bindings::VFIO_MIGRATION_P2P) as u64
);
static_assert!(
    Flags::STOP_COPY.with_pre_copy().as_raw()
        == (bindings::VFIO_MIGRATION_STOP_COPY | bindings::VFIO_MIGRATION_PRE_COPY) as u64
);

/// The migration support of a device.
///
/// Implemented by the data of an open device, which exists from the first open to the last close,
/// and which a [`Saver`] or [`Loader`] may share.
///
/// No two methods run at the same time on one device. Methods of its [`Saver`] or [`Loader`] may
/// run concurrently. All may sleep. None is called with a lock held that is also held during a
/// user copy.
///
/// A method that fails leaves the device unchanged, unless [`is_broken`](Self::is_broken) returns
/// true. The user's ioctl fails with the same error: `ENOMEM` if there is no memory, `EINVAL` for
/// an invalid stream, `EIO` for a device that does not respond, `ENODEV` for one that is gone. A
/// method that waits must be killable, and fails with `ERESTARTSYS` only if the task is being
/// killed. State changes must not fail with `EINTR` or `EAGAIN`.
///
/// # Examples
///
/// A device that does DMA to other devices. It has the state of the example on the front page.
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

    /// Loads such a stream.
    type Loader: Loader;

    /// The states that such a device supports.
    ///
    /// `VFIO_MIGRATION_P2P` needs [`quiesce_p2p`](Self::quiesce_p2p) and
    /// [`resume_p2p`](Self::resume_p2p), `VFIO_MIGRATION_PRE_COPY` needs
    /// [`pre_copy`](Self::pre_copy). Without these methods, or with `pre_copy` and without its
    /// flag, the driver does not build.
    const FLAGS: Flags;

    /// Begins an arc, before its other methods are called. If this fails, none of them is, and the
    /// state does not change.
    ///
    /// For drivers that refuse or delay state changes, such as those for tests. Not called for a
    /// reset or the last close.
    fn begin_arc(&self, _from: State, _to: State) -> Result {
        Ok(())
    }

    /// Ends an arc that has succeeded, has failed or was undone. Not called if the state is `ERROR`
    /// now, see [`halt`](Self::halt). Must not fail.
    ///
    /// For drivers that must know whether [`stop`](Self::stop) is final: an arc may fail after it.
    fn end_arc(&self) {}

    /// Ends peer-to-peer DMA, for the arcs from `RUNNING` to `RUNNING_P2P` and from `PRE_COPY` to
    /// `PRE_COPY_P2P`.
    ///
    /// When this returns, no transfer to another device is under way, and none starts. A device
    /// with `VFIO_MIGRATION_P2P` that does no DMA implements this as a no-op.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    /// Allows peer-to-peer DMA again, for the opposite arcs, and to undo
    /// [`quiesce_p2p`](Self::quiesce_p2p) on an arc that fails.
    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    /// Stops the device. When this returns, there is no DMA and no interrupt, and only a [`Loader`]
    /// and [`reset`](Self::reset) change the device's state. Interrupts signalled to a
    /// [`Function`](crate::emulated::Function) afterwards are pending until the device runs.
    ///
    /// Called after [`quiesce_p2p`](Self::quiesce_p2p), and to undo [`start`](Self::start) on an
    /// arc that fails.
    fn stop(&self) -> Result;

    /// Resumes the device where it was stopped, without peer-to-peer DMA. Also called to undo
    /// [`stop`](Self::stop) on an arc that fails.
    fn start(&self) -> Result;

    /// Begins to save the device while it runs, for the arcs to `PRE_COPY` and `PRE_COPY_P2P`.
    ///
    /// Changes of its state are tracked from now on, until the saver is dropped. Otherwise the same
    /// as [`save`](Self::save). Not called without `VFIO_MIGRATION_PRE_COPY`.
    fn pre_copy(_this: &Arc<Self>, _notifier: Arc<Notifier>) -> Result<Self::Saver> {
        Err(EINVAL)
    }

    /// Begins to save the device, which is stopped, for the arc to `STOP_COPY`.
    ///
    /// The saver is dropped when the session ends, for any reason. A saver that returns
    /// [`Next::NotReady`], or [`Next::End`] in [`Phase::PreCopy`], keeps `notifier`, and notifies
    /// when there is more to read.
    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver>;

    /// Begins to load, for the arc from `STOP` to `RESUMING`.
    ///
    /// The loader is dropped when the session ends. A loader that does not always take bytes keeps
    /// `notifier`, and notifies when it does again.
    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Loader>;

    /// Applies the loaded state, for the arc from `RESUMING` to `STOP`.
    ///
    /// Fails with `EINVAL` if the stream is not complete; the device then stays in `RESUMING`, and
    /// the user may write the rest or reset the device. Any other error is final for the session,
    /// like an error of [`Loader::write`]. Not called after such an error.
    fn loaded(&self, loader: &mut Self::Loader) -> Result;

    /// Returns the number of bytes that `STOP_COPY` would stream if it began now, including
    /// headers.
    ///
    /// Called while no session is open, for `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`, which fails with
    /// the same error. May query firmware: neither poll() nor [`Engine::state()`] waits for it.
    /// State changes and resets wait, killably, because no two methods run at the same time. Hence
    /// a driver must bound the time that its firmware may take.
    fn data_size(&self) -> Result<u64>;

    /// Returns whether the device is broken: no longer in the state that the engine assumes.
    ///
    /// Called after another method has failed. If it is broken, nothing is undone and the state is
    /// `ERROR`. If not, the device must be in the same state as before that method.
    /// [`reset`](Self::reset) repairs it. Does not sleep. A device without hardware does not break.
    fn is_broken(&self) -> bool {
        false
    }

    /// Keeps the device from running, as far as possible, because its state is `ERROR` now: an arc
    /// could not be undone, [`reset`](Self::reset) failed, or the device [is
    /// broken](Self::is_broken). May sleep.
    ///
    /// Called after the failed method. [`reset`](Self::reset) enables the device to run again. By
    /// default this does nothing. Not called for [`Engine::fail()`], which the driver calls itself.
    fn halt(&self) {}

    /// Resets the device to its state at power on, running. For `VFIO_DEVICE_RESET`.
    ///
    /// Called in any state, after the session has ended. If it fails, the state is `ERROR`, and the
    /// ioctl fails with the same error. May sleep.
    ///
    /// Must not wait for anything that depends on a user: state changes and the close wait for it.
    /// It need not be killable, because its duration is bounded by the size of the device.
    fn reset(&self) -> Result;
}

/// The next part of the stream.
pub enum Next {
    /// These bytes. A chunk without bytes is an error: read() fails with `EIO`.
    Chunk(Chunk),
    /// Data that the device has not prepared yet. The reader waits until the [`Notifier`] is
    /// notified, or fails with `EAGAIN` if it is nonblocking.
    NotReady,
    /// Nothing: the temporary end in [`Phase::PreCopy`], the permanent end in [`Phase::StopCopy`].
    End,
}

/// The size of the rest of a saver's stream, in bytes, including headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// State that was never handed out.
    pub initial: u64,
    /// State that was handed out and has changed since.
    pub dirty: u64,
    /// State that only [`Phase::StopCopy`] can hand out.
    pub tail: u64,
    /// The number of times that the device has re-initialised itself since the session began. Each
    /// makes all of its state initial again.
    pub reinits: u32,
}

impl Remaining {
    /// Returns the number of bytes left in a phase.
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
/// The saver is dropped when the session ends, in the context that ends it, which may sleep.
///
/// # Examples
///
/// A saver that streams tracked memory page by page, and changed pages again.
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
    /// Returns the next part of the stream.
    ///
    /// Called by a read(), and when a session or [`Phase::StopCopy`] begins, but only after the
    /// last returned chunk has been read entirely. The engine keeps the result for poll(), which
    /// calls no method of a driver. A failure is returned by one read(), which calls this again
    /// before it returns.
    ///
    /// The driver calls [`Notifier::notify()`] when [`Next::NotReady`] is no longer true, and in
    /// [`Phase::PreCopy`] when there is data again after [`Next::End`] or after
    /// [`remaining`](Self::remaining) has returned zero.
    fn next(&mut self, phase: Phase) -> Result<Next>;

    /// Returns the size of the rest of the stream, without the chunks that [`next`](Self::next) has
    /// returned.
    ///
    /// For `VFIO_MIG_GET_PRECOPY_INFO` and `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`, which fail with the
    /// same error. It should be exact: users decide from it when to stop the device. The engine
    /// notes once in the kernel log that a saver had bytes left at its end, and that one returned a
    /// chunk although nothing was left and it had not notified since. May query firmware: read(),
    /// poll() and state changes do not call it.
    fn remaining(&self) -> Result<Remaining>;

    /// Takes back the pages of a chunk that a user has read entirely, with
    /// [their digests](PageRun::digests), before [`next`](Self::next) is called again.
    fn read(&mut self, _run: PageRun) {}

    /// Prepares for `STOP_COPY`. The device is stopped. Fails if the state cannot be saved. The
    /// state change then fails with the same error, and the device and the session continue.
    ///
    /// Called on each arc to `STOP_COPY`, before [`next`](Self::next) is called in that phase. Not
    /// called again after it succeeded. If it failed, it is called again on the user's next
    /// attempt: the device may have run meanwhile.
    fn seal(&mut self) -> Result {
        Ok(())
    }
}

/// Loads the state of a device from a stream.
///
/// A loader may change the device before the image is complete: only [`Migratable::loaded`],
/// [`Migratable::reset`] or the last close leave `RESUMING`, so a device with a partial image never
/// runs.
///
/// The methods run one at a time, under the session's lock. They may sleep but must not wait for
/// the user, nor for anything that waits for a state change.
///
/// The loader is dropped when the session ends, in the context that ends it, which may sleep.
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
///     fn write(&mut self, bytes: &[u8]) -> Result<usize> {
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
    /// Takes bytes of the stream, which the user may cut anywhere, and returns their number.
    ///
    /// `bytes` is not empty. If the loader takes only a part, it is called again with the rest. If
    /// it takes none, the device is not ready for them, for example because its firmware loads the
    /// previous ones. Then the user's write() returns the number of bytes taken so far. If there
    /// are none, it keeps the bytes and waits until the [`Notifier`] is notified, or fails with
    /// `EAGAIN` if it is nonblocking. No lock is held meanwhile: neither a reset nor a state change
    /// waits for the firmware. A signal ends the wait.
    ///
    /// A failure is final for the session: every later write() and the arc to `STOP` fail with the
    /// same error. It is `EINVAL` for an invalid stream.
    fn write(&mut self, bytes: &[u8]) -> Result<usize>;

    /// Returns whether [`write`](Self::write) would take bytes now.
    ///
    /// Called for poll(), and by write() before each call of [`write`](Self::write), which is not
    /// called if this returns false. Without this method, poll() reports the data_fd as writable
    /// until `write` has taken none. It must answer from the driver's data, without querying
    /// firmware, and must not sleep. When it becomes true, the loader calls [`Notifier::notify()`],
    /// and stays ready until it gets bytes.
    fn is_ready(&self) -> bool {
        true
    }
}

/// Maximum number of bytes at the head of a [`Chunk`].
const HEAD: usize = 64;

/// The part of a [`Chunk`] after its head.
enum Body {
    /// Bytes allocated for the chunk.
    Bytes(KVVec<u8>),
    /// Pages of the device's memory.
    Pages(PageRun),
}

/// A piece of the stream: a few bytes of header, and a body that is copied only to the user.
///
/// # Examples
///
/// A record of up to 16 changed pages, after the number of the first page and the number of pages.
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
    /// Creates a chunk of at most 64 bytes.
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

    /// Sets the body to bytes. Replaces a previous body.
    pub fn bytes(self, bytes: KVVec<u8>) -> Self {
        Self {
            body: Body::Bytes(bytes),
            ..self
        }
    }

    /// Sets the body to pages of tracked memory. Replaces a previous body.
    ///
    /// The chunk counts as initial if the pages do.
    pub fn pages(self, run: PageRun) -> Self {
        Self {
            initial: run.is_initial(),
            body: Body::Pages(run),
            ..self
        }
    }

    /// Marks the content as never handed out before.
    pub fn initial(self) -> Self {
        Self {
            initial: true,
            ..self
        }
    }

    /// Records that a reader gets the chunk, so its pages count as streamed.
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
                Body::Pages(run) => run.size(),
            }
    }

    /// Copies the bytes from `pos` on to the user, and returns the number of bytes copied.
    fn copy_to(&mut self, pos: usize, user: &mut IovIterDest<'_>) -> usize {
        let head = self.head.get(pos..self.head_len).unwrap_or(&[]);
        let copied = user.copy_to_iter(head);
        if copied < head.len() {
            return copied;
        }
        let pos = (pos + copied).saturating_sub(self.head_len);
        copied
            + match &mut self.body {
                Body::Bytes(bytes) => user.copy_to_iter(bytes.get(pos..).unwrap_or(&[])),
                Body::Pages(run) => run.copy_to(pos, user),
            }
    }

    /// Returns the pages, if it has some.
    fn into_pages(self) -> Option<PageRun> {
        match self.body {
            Body::Bytes(_) => None,
            Body::Pages(run) => Some(run),
        }
    }
}

/// Reassembles records from a stream that the user may cut anywhere. For a [`Loader`].
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
///     fn write(&mut self, bytes: &[u8]) -> Result<usize> {
///         let sum = &mut self.sum;
///         self.records.feed(bytes, |record| {
///             let word = record.try_into().map_err(|_| EINVAL)?;
///             *sum = sum.wrapping_add(u64::from_le_bytes(word));
///             Ok(())
///         })
///     }
/// }
/// ```
///
/// Records of up to 1 MiB, each after its length in 8 bytes.
///
/// ```
/// fn images() -> Result<Records> {
///     Records::with_header(size_of::<u64>(), |header| {
///         let length = header.try_into().map_err(|_| EINVAL)?;
///         let length = usize::try_from(u64::from_le_bytes(length))?;
///         (length <= 1 << 20).then_some(length).ok_or(EINVAL)
///     })
/// }
/// ```
pub struct Records {
    /// The record that has arrived in part.
    record: KVVec<u8>,
    /// The size of the record as far as it is known: that of the header until it is complete.
    size: usize,
    /// The size of a header.
    header: usize,
    /// Returns the number of bytes that follow a header.
    rest: fn(&[u8]) -> Result<usize>,
}

impl Records {
    /// Allocates the buffer for records of `size` bytes. May sleep.
    ///
    /// Fails with `EINVAL` if `size` is zero, and with `ENOMEM`.
    pub fn new(size: usize) -> Result<Self> {
        Self::with_header(size, |_| Ok(0))
    }

    /// Prepares for records of any size, which begin with a header of `size` bytes. `rest` returns
    /// the number of bytes that follow a header. May sleep.
    ///
    /// Memory is allocated for bytes that have arrived, not for lengths that a header claims. A
    /// record can become as large as `rest` allows: it must fail if there are too many bytes.
    ///
    /// Fails with `EINVAL` if `size` is zero, and with `ENOMEM`.
    pub fn with_header(size: usize, rest: fn(&[u8]) -> Result<usize>) -> Result<Self> {
        if size == 0 {
            return Err(EINVAL);
        }
        Ok(Self {
            record: KVVec::with_capacity(size, GFP_MAYFAIL)?,
            size,
            header: size,
            rest,
        })
    }

    /// Takes bytes up to the end of a header or record, and calls `take` with a complete record,
    /// including its header. Returns the number of bytes, for [`Loader::write`].
    ///
    /// Fails with the error of `take` or of the function for the header, and with `ENOMEM` if there
    /// is no memory for a record of variable size. After that, neither this nor the [`Loader`] may
    /// be used.
    pub fn feed(&mut self, bytes: &[u8], take: impl FnOnce(&[u8]) -> Result) -> Result<usize> {
        let missing = self.size - self.record.len();
        let bytes = &bytes[..missing.min(bytes.len())];
        self.record.extend_from_slice(bytes, GFP_MAYFAIL)?;
        if self.record.len() == self.header {
            let rest = (self.rest)(&self.record)?;
            self.size = self.header.checked_add(rest).ok_or(EINVAL)?;
        }
        if self.record.len() == self.size {
            take(&self.record)?;
            self.record.clear();
            self.size = self.header;
        }
        Ok(bytes.len())
    }

    /// Returns whether a record has arrived in part.
    pub fn is_partial(&self) -> bool {
        !self.record.is_empty()
    }
}
