// SPDX-License-Identifier: GPL-2.0

//! The DMA engine: serves the queue on the device's worker.

use crate::{
    migration::stream::pattern_word,
    queue::{
        Failure,
        Next,
        Op,
        Piece,
        Queue, //
    },
};
use kernel::{
    alloc::AllocError,
    new_mutex,
    prelude::*,
    sync::Mutex,
    time::{
        Delta,
        Instant,
        Monotonic, //
    },
};
use pin_init::init_scope;
use vfio::{
    dma::{
        Bus,
        Cause,
        Fault, //
    },
    emulated::{
        Function,
        Work, //
    },
    memory::{
        StateMemory,
        GFP_MAYFAIL, //
    },
};

/// Size of a word of the pattern in bytes.
const WORD: u64 = size_of::<u64>() as u64;

/// The DMA engine of a device.
#[pin_data]
pub(crate) struct DmaEngine {
    /// Never held while user memory is accessed.
    #[pin]
    queue: Mutex<Queue>,
    /// Start of the queue's time base.
    epoch: Instant<Monotonic>,
}

impl DmaEngine {
    /// Creates an engine in the state of power-on.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            queue <- new_mutex!(
                init_scope(|| Ok(Queue::POWER_ON)),
                "vfio_mock::DmaEngine::queue"
            ),
            epoch: Instant::now(),
        })
    }

    /// Calls `inspect` with the queue.
    pub(crate) fn with_queue<R>(&self, inspect: impl FnOnce(&Queue) -> R) -> R {
        inspect(&self.queue.lock())
    }

    /// Calls `update` with the queue, and raises the interrupts of the descriptors that it ends.
    ///
    /// The lock is held until the interrupts are raised, so a saved queue has none left to raise.
    pub(crate) fn update_queue<R>(
        &self,
        function: &Function,
        update: impl FnOnce(&mut Queue) -> R, //
    ) -> R {
        let queue = &mut *self.queue.lock();
        let result = update(queue);
        let vectors = queue.take_vectors();
        (0..u32::BITS)
            .filter(|vector| vectors & 1 << vector != 0)
            .for_each(|vector| function.signal(vector));
        result
    }

    /// Returns the time in nanoseconds.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// Moves the next piece, unless `begin` fails. Called by the worker, sleeps.
    pub(crate) fn work(
        &self,
        memory: &StateMemory,
        function: &Function,
        bus: &Bus<'_>,
        begin: impl FnOnce() -> Result,
    ) -> Work {
        let next = self.update_queue(function, |queue| {
            queue.next(self.now(), memory.size() as u64)
        });
        match next {
            Next::Piece(piece) => {
                let moved = begin().map_err(Fault::from);
                let (done, failure) = match moved.and_then(|()| execute(&piece, memory, bus)) {
                    Ok(()) => (piece.len, None),
                    Err(Fault { done, cause }) => (done as u64, Some(failure(cause))),
                };
                self.update_queue(function, |queue| {
                    queue.moved(&piece, done, failure, self.now())
                });
                Work::Again
            }
            Next::At(time) => {
                let left = time.saturating_sub(self.now());
                Work::After(Delta::from_nanos(left as i64))
            }
            Next::Nothing => Work::Wait,
        }
    }

    /// Resets the engine to the state of power-on. The worker must be stopped.
    pub(crate) fn power_on(&self) {
        *self.queue.lock() = Queue::POWER_ON;
    }
}

/// Moves the bytes of a piece. Sleeps in page faults of user memory.
fn execute(piece: &Piece, memory: &StateMemory, bus: &Bus<'_>) -> Result<(), Fault> {
    match piece.op {
        Op::Read => bus.read(piece.iova, memory, piece.memory()),
        Op::Write => bus.write(piece.iova, memory, piece.memory()),
        Op::Fill => bus.write_bytes(piece.iova, &pattern(piece)?),
        Op::Churn => Ok(memory.write(piece.addr as usize, &pattern(piece)?)?),
    }
}

/// Returns the part of the pattern that a piece writes.
fn pattern(piece: &Piece) -> Result<KVVec<u8>, AllocError> {
    let mut bytes = KVVec::with_capacity(piece.len as usize, GFP_MAYFAIL)?;
    let end = piece.pos + piece.len;
    let mut pos = piece.pos;
    while pos < end {
        let word = pattern_word(piece.seed, pos / WORD).to_le_bytes();
        let next = end.min((pos / WORD + 1) * WORD);
        let (from, to) = (pos % WORD, pos % WORD + (next - pos));
        let part = word.get(from as usize..to as usize).unwrap_or(&[]);
        bytes.extend_from_slice(part, GFP_MAYFAIL)?;
        pos = next;
    }
    Ok(bytes)
}

/// Returns the error code of a descriptor for a DMA fault.
fn failure(cause: Cause) -> Failure {
    match cause {
        Cause::Range => Failure::Range,
        Cause::Unmapped => Failure::Unmapped,
        Cause::Denied => Failure::Denied,
        Cause::Fault => Failure::Fault,
        Cause::NoMemory => Failure::NoMemory,
        Cause::Interrupted | Cause::Other(_) => Failure::Other,
    }
}
