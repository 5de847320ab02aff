// SPDX-License-Identifier: GPL-2.0

//! The device's state from a stream.

use crate::{
    chip::{
        Chip,
        State,
        SNAPSHOT_SIZE, //
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
    migration::Loader, //
};

/// Where the decoder puts what it reads: pages into the memory, and registers aside until all is
/// known to be good.
struct Target {
    chip: Arc<Chip>,
    registers: State,
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
        let parsed = self.chip.parse(snapshot, &mut self.registers);
        parsed.ok_or(StreamError::BadRegisters)
    }
}

/// What takes a stream in, large enough to be worth a place of its own.
struct Inner {
    decoder: Decoder<VVec<u64>, PAGE_SIZE>,
    target: Target,
}

/// Takes a stream in.
///
/// Pages go to where they belong at once, as there is no room for them elsewhere. So the device
/// must not run until the trailer has shown the stream to be complete.
pub(crate) struct MockLoader(KBox<Inner>);

impl MockLoader {
    /// Begins to load into a stopped device.
    pub(crate) fn new(chip: Arc<Chip>) -> Result<Self> {
        let table = VVec::zeroed(chip.memory.pages(), GFP_MAYFAIL)?;
        let size = chip.memory.size() as u64;
        Ok(Self(KBox::init(
            try_init!(Inner {
                decoder: Decoder::new(size, SNAPSHOT_SIZE, table).ok_or(EINVAL)?,
                target <- init!(Target {
                    chip,
                    registers <- State::new(),
                }),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?))
    }

    /// Puts the registers into effect, if the stream is complete.
    pub(crate) fn finish(&mut self) -> Result {
        self.0.decoder.finish().map_err(refused)?;
        let Target { chip, registers } = &mut self.0.target;
        chip.restore(registers)
    }
}

/// Says why a stream is refused, which `EINVAL` cannot.
fn refused(error: StreamError) -> Error {
    pr_debug!("stream refused: {}\n", error.as_str());
    EINVAL
}

impl Loader for MockLoader {
    fn write(&mut self, bytes: &[u8]) -> Result {
        let Inner { decoder, target } = &mut *self.0;
        decoder.feed(bytes, target).map_err(refused)
    }
}
