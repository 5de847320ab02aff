// SPDX-License-Identifier: GPL-2.0

//! Live migration.
//!
//! A driver implements [`Migratable`] for the data of an open device: one method for each *kind* of
//! thing the device must be able to do, a [`Saver`] that cuts the device's state into [`Chunk`]s,
//! and a [`Loader`] that takes such a stream in. The [`Engine`] does the rest of what the uAPI asks
//! for: the states and the paths between them, the sessions and their data_fd, what read(), poll()
//! and the ioctls of that file answer, who waits for whom, and what happens on reset and close.
//!
//! # Locking
//!
//! `Engine::current` serialises state changes and is held while the driver's methods run. Each
//! session has a lock of its own, inside of which the saver or loader runs. Neither is ever held
//! while user memory is accessed, so that a user whose page fault is not served delays nobody but
//! himself.
//!
//! C headers: [`include/linux/vfio.h`](srctree/include/linux/vfio.h),
//! [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

mod data_file;
mod engine;
pub mod fsm;

pub use self::{
    engine::Engine,
    fsm::{
        Flags,
        State, //
    },
};

use crate::{
    memory::Memory,
    user::UserBuf, //
};
use core::ops::Range;
use kernel::{
    new_poll_condvar,
    prelude::*,
    sync::{
        poll::PollCondVar,
        Arc, //
    },
};

/// What a device must be able to do to be migrated.
///
/// Implemented by the data of an open device, which exists from the first open to the last close,
/// and which a [`Saver`] or [`Loader`] may share.
///
/// No two methods run at the same time on one device, except [`data_size`](Self::data_size), which
/// may run beside any other while no session exists. All may sleep, and none is called with a lock
/// held that a user copy is made under. A method that fails leaves the device as it was.
#[vtable]
pub trait Migratable: Send + Sync + 'static {
    /// Cuts the device's state into a stream.
    type Saver: Saver;

    /// Takes such a stream in.
    type Loader: Loader;

    /// Ends peer-to-peer DMA, for the arcs from `RUNNING` to `RUNNING_P2P` and from `PRE_COPY` to
    /// `PRE_COPY_P2P`.
    ///
    /// When it returns no transfer to another device is under way and none starts any more. The
    /// default suits a device that does no DMA.
    fn quiesce_p2p(&self) -> Result {
        Ok(())
    }

    /// Allows peer-to-peer DMA again, for the arcs back.
    fn resume_p2p(&self) -> Result {
        Ok(())
    }

    /// Stops the device: when it returns, there is no DMA and no interrupt any more, and nothing
    /// changes the device's state but a [`Loader`] and [`reset`](Self::reset).
    ///
    /// Called after [`quiesce_p2p`](Self::quiesce_p2p).
    fn stop(&self) -> Result;

    /// Lets the device go on from where it was stopped, without peer-to-peer DMA.
    fn start(&self) -> Result;

    /// Begins to save: from here on changes of the device's state are tracked.
    ///
    /// Called running, for the arcs to `PRE_COPY` and `PRE_COPY_P2P`, or stopped, for the arc to
    /// `STOP_COPY`. When the session ends, for whatever reason, the saver is dropped, and with it
    /// goes the tracking. The saver keeps `notifier` if anything becomes readable by itself.
    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<Self::Saver>;

    /// Begins to load, for the arc from `STOP` to `RESUMING`.
    ///
    /// When the session ends the loader is dropped.
    fn load(this: &Arc<Self>) -> Result<Self::Loader>;

    /// Puts into effect what was loaded, for the arc from `RESUMING` to `STOP`.
    ///
    /// Fails if the stream is not complete; the device then stays in `RESUMING`, and the user may
    /// write the rest or reset the device.
    fn loaded(&self, loader: &mut Self::Loader) -> Result;

    /// Returns how many bytes `STOP_COPY` would stream if it began now, headers included.
    ///
    /// Called while no session is open, for `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`.
    fn data_size(&self) -> u64;

    /// Brings the device into the state of power on, running. For `VFIO_DEVICE_RESET`.
    fn reset(&self);
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
    /// These bytes.
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

/// Cuts the state of a device into a stream.
///
/// The methods run one at a time, under the session's lock. They may sleep but must not wait for
/// the user, nor for anything that waits for a state change.
pub trait Saver: Send + Unpin + 'static {
    /// Returns what comes next in the stream.
    ///
    /// Called when what was returned before has been read entirely. A failure is returned from the
    /// read() and the next one asks again.
    fn next(&mut self, phase: Phase) -> Result<Next>;

    /// Returns how much there is to come.
    fn remaining(&self) -> Remaining;

    /// Tells whether [`next`](Self::next) would not return [`Next::NotReady`], for poll().
    fn is_ready(&self) -> bool {
        true
    }

    /// Makes ready for `STOP_COPY`. The device is stopped. Fails if the state cannot be saved;
    /// the device then goes on and the session with it.
    fn seal(&mut self) -> Result {
        Ok(())
    }
}

/// Takes a stream in.
///
/// The methods run one at a time, under the session's lock. They may sleep but must not wait for
/// the user, nor for anything that waits for a state change.
pub trait Loader: Send + Unpin + 'static {
    /// Takes the next bytes of the stream, however the user cut it.
    ///
    /// A failure is final for the session: every later write() and the arc to `STOP` fail with
    /// the same error. `EINVAL` is the one for a stream that is not good.
    fn write(&mut self, bytes: &[u8]) -> Result;
}

/// Most bytes at the head of a [`Chunk`].
const HEAD: usize = 64;

/// What follows the head of a [`Chunk`].
enum Body {
    /// Bytes that were made for the purpose.
    Bytes(KVVec<u8>),
    /// A range of the device's memory, in bytes.
    Memory(Arc<Memory>, Range<usize>),
}

/// A piece of the stream: a few bytes of header, and a body that is not copied on its way.
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

    /// Lets bytes follow.
    pub fn bytes(self, bytes: KVVec<u8>) -> Self {
        Self {
            body: Body::Bytes(bytes),
            ..self
        }
    }

    /// Lets a range of device memory follow.
    ///
    /// The bytes are taken from the memory when the user reads them. In [`Phase::PreCopy`] what
    /// changes before that must count as changed since it was handed out.
    pub fn memory(self, memory: Arc<Memory>, range: Range<usize>) -> Self {
        Self {
            body: Body::Memory(memory, range),
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

    /// Returns the size in bytes.
    fn len(&self) -> usize {
        self.head_len
            + match &self.body {
                Body::Bytes(bytes) => bytes.len(),
                Body::Memory(memory, range) => memory.bytes(range.clone()).len(),
            }
    }

    /// Copies what is behind `pos` to the user and returns how much was taken.
    fn copy_to(&self, pos: usize, user: &mut UserBuf) -> usize {
        let head = self.head.get(pos..self.head_len).unwrap_or(&[]);
        let copied = user.write(head);
        if copied < head.len() {
            return copied;
        }
        let pos = (pos + copied).saturating_sub(self.head_len);
        copied
            + match &self.body {
                Body::Bytes(bytes) => user.write(bytes.get(pos..).unwrap_or(&[])),
                Body::Memory(memory, range) => {
                    let start = range.start.saturating_add(pos);
                    user.write_memory(memory, start..range.end)
                }
            }
    }
}

/// Puts records of one size together again, however the user cut the stream. For a [`Loader`].
pub struct Records {
    /// The record that is arriving.
    record: KVec<u8>,
    size: usize,
}

impl Records {
    /// Makes room for a record of `size` bytes. Fails with `EINVAL` if there are none.
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
#[pin_data]
pub struct Notifier {
    #[pin]
    wait: PollCondVar,
}

impl Notifier {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                wait <- new_poll_condvar!("vfio::migration::Notifier"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Wakes readers and pollers, because something may have become readable. Does not sleep.
    ///
    /// Whoever drops the last reference must be able to sleep.
    pub fn notify(&self) {
        self.wait.notify_all();
    }
}
