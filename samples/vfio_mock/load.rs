// SPDX-License-Identifier: GPL-2.0

//! The device's state from a stream.

use crate::{
    chip::{
        Chip,
        Snapshot,
        SNAPSHOT_SIZE, //
    },
    stream::{
        Decoder,
        Error as StreamError,
        Sink, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use vfio::migration::Loader;

/// Where the decoder puts what it reads: pages into the memory, and registers aside until all is
/// known to be good.
struct Target {
    chip: Arc<Chip>,
    registers: Option<Snapshot>,
}

impl Sink for Target {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        // The decoder has checked the range; what it missed, the digest would not.
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
        if !self.chip.accepts(&snapshot) {
            return Err(StreamError::BadRegisters);
        }
        self.registers = Some(snapshot);
        Ok(())
    }
}

/// Takes a stream in.
///
/// Pages go to where they belong at once, as there is no room for them elsewhere. So the device
/// must not run until the trailer has shown the stream to be complete.
pub(crate) struct MockLoader {
    decoder: KBox<Decoder<KVVec<u64>>>,
    target: Target,
}

impl MockLoader {
    /// Begins to load into a stopped device.
    pub(crate) fn new(chip: Arc<Chip>) -> Result<Self> {
        let table = KVVec::zeroed(chip.memory.pages(), GFP_KERNEL_ACCOUNT)?;
        let decoder =
            Decoder::new(chip.memory.size() as u64, SNAPSHOT_SIZE, table).ok_or(EINVAL)?;
        Ok(Self {
            decoder: KBox::new(decoder, GFP_KERNEL_ACCOUNT)?,
            target: Target {
                chip,
                registers: None,
            },
        })
    }

    /// Puts the registers into effect, if the stream is complete.
    pub(crate) fn finish(&mut self) -> Result {
        self.decoder.finish().map_err(refused)?;
        let registers = self.target.registers.as_ref().ok_or(EINVAL)?;
        self.target.chip.restore(registers)
    }
}

/// Says why a stream is refused, which `EINVAL` cannot.
fn refused(error: StreamError) -> Error {
    pr_debug!("stream refused: {}\n", error.as_str());
    EINVAL
}

impl Loader for MockLoader {
    fn write(&mut self, bytes: &[u8]) -> Result {
        self.decoder.feed(bytes, &mut self.target).map_err(refused)
    }
}
