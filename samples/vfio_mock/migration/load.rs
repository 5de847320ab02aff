// SPDX-License-Identifier: GPL-2.0

//! Restores the device state from a stream.

use crate::{
    chip::{
        Chip,
        DeviceState,
        SNAPSHOT_SIZE, //
    },
    knobs::{
        pace::Waits,
        rules::Event, //
    },
    migration::stream::{
        Decoder,
        Error as StreamError,
        Sink, //
    },
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};
use vfio::{
    memory::GFP_MAYFAIL,
    migration::{
        Loader,
        Notifier, //
    },
};

/// Destination of the decoder.
///
/// Pages are written to the state memory at once. The registers are kept here until the trailer has
/// confirmed the stream.
struct Target {
    chip: Arc<Chip>,
    state: DeviceState,
}

impl Sink for Target {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        // The decoder has checked the range. If the write failed, the digest would differ.
        let _ = self.chip.memory.write(offset as usize, bytes);
    }

    fn page_digest(&self, page: u64) -> u64 {
        self.chip.page_digest(page as usize)
    }

    fn write_page(&mut self, page: u64, bytes: &[u8]) -> u64 {
        self.chip.write_page(page as usize, bytes)
    }

    fn registers(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let snapshot = bytes.try_into().map_err(|_| StreamError::BadRegisters)?;
        let parsed = self.chip.parse(snapshot, &mut self.state);
        parsed.ok_or(StreamError::BadRegisters)
    }
}

/// Content of a [`MockLoader`], boxed because of its size.
struct Inner {
    decoder: Decoder<KVVec<u64>, PAGE_SIZE>,
    target: Target,
    /// Number of bytes taken.
    bytes: u64,
    waits: Waits,
}

/// Restores a device from a stream.
///
/// Pages are written to the state memory when they arrive, without a copy of the memory. So the
/// device must not run before the trailer has confirmed the stream.
pub(crate) struct MockLoader(KBox<Inner>);

impl MockLoader {
    /// Creates a loader for a stopped device.
    pub(crate) fn new(chip: Arc<Chip>, notifier: Arc<Notifier>) -> Result<Self> {
        let table = KVVec::zeroed(chip.memory.pages(), GFP_MAYFAIL)?;
        let identity = chip.identity();
        let waits = Waits::new(chip.knobs.loading.clone(), notifier)?;
        Ok(Self(KBox::init(
            try_init!(Inner {
                decoder: Decoder::new(identity, SNAPSHOT_SIZE, table).ok_or(EINVAL)?,
                target <- init!(Target {
                    chip,
                    state <- DeviceState::new(),
                }),
                bytes: 0,
                waits,
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?))
    }

    /// Applies the registers. Fails with `EINVAL` if the stream is incomplete or invalid.
    pub(crate) fn finish(&mut self) -> Result {
        self.0.decoder.finish().map_err(refused)?;
        let Target { chip, state } = &mut self.0.target;
        chip.restore(state)
    }
}

/// Logs the reason of a refusal, because `EINVAL` does not tell it.
fn refused(error: StreamError) -> Error {
    pr_debug!("stream refused: {}\n", error.as_str());
    EINVAL
}

impl Loader for MockLoader {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let Inner {
            decoder,
            target,
            bytes: done,
            waits,
        } = &mut *self.0;
        let xor = target.chip.fault(Event::Write(*done))?;
        let room = target.chip.knobs.faults.room(*done);
        let bytes = bytes.get(..room).unwrap_or(bytes);
        waits.prepare()?;
        let mut rest = bytes;
        if let Some((first, after)) = bytes.split_first().filter(|_| xor > 0) {
            decoder.feed(&[first ^ xor], target).map_err(refused)?;
            rest = after;
        }
        decoder.feed(rest, target).map_err(refused)?;
        waits.begin(bytes.len() as u64);
        *done += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn is_ready(&self) -> bool {
        self.0.waits.is_over()
    }
}
