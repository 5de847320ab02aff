// SPDX-License-Identifier: GPL-2.0

//! Saver and loader of a state that is small enough to be copied as a whole.

use super::{
    Chunk,
    Loader,
    Next,
    Phase,
    Remaining,
    Saver, //
};
use crate::user::GFP_MAYFAIL;
use kernel::prelude::*;

/// A [`Saver`] of a state that was copied when the session began.
///
/// Use it for [`Migratable::save`], where the device is stopped. It does not track changes, and
/// must not be used for [`Migratable::pre_copy`].
///
/// [`Migratable::save`]: super::Migratable::save
/// [`Migratable::pre_copy`]: super::Migratable::pre_copy
///
/// # Examples
///
/// ```
/// fn save(chip: &Chip) -> Result<ImageSaver> {
///     ImageSaver::new(&[b"version 1", &chip.registers.lock().bytes])
/// }
/// ```
pub struct ImageSaver(KVVec<u8>);

impl ImageSaver {
    /// Creates a saver with a stream that consists of `parts`, which must not be empty, in this
    /// order.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub fn new(parts: &[&[u8]]) -> Result<Self> {
        let mut image = KVVec::new();
        for part in parts {
            image.extend_from_slice(part, GFP_MAYFAIL)?;
        }
        Ok(Self(image))
    }
}

impl Saver for ImageSaver {
    fn next(&mut self, _phase: Phase) -> Result<Next> {
        if self.0.is_empty() {
            return Ok(Next::End);
        }
        let chunk = Chunk::new(&[])?.bytes(core::mem::take(&mut self.0));
        Ok(Next::Chunk(chunk.initial()))
    }

    fn remaining(&self) -> Result<Remaining> {
        Ok(Remaining {
            initial: self.0.len() as u64,
            ..Default::default()
        })
    }
}

/// A [`Loader`] that collects a stream of known size until it is put into effect.
///
/// # Examples
///
/// A driver puts the state into effect in [`Migratable::loaded`].
///
/// ```
/// fn loaded(chip: &Chip, loader: &ImageLoader) -> Result {
///     let bytes = loader.image()?.strip_prefix(b"version 1").ok_or(EINVAL)?;
///     chip.registers.lock().bytes = bytes.try_into().map_err(|_| EINVAL)?;
///     Ok(())
/// }
/// ```
///
/// [`Migratable::loaded`]: super::Migratable::loaded
pub struct ImageLoader {
    image: KVVec<u8>,
    size: usize,
}

impl ImageLoader {
    /// Creates a loader of a stream of `size` bytes. May sleep. Fails with `ENOMEM`.
    pub fn new(size: usize) -> Result<Self> {
        Ok(Self {
            image: KVVec::with_capacity(size, GFP_MAYFAIL)?,
            size,
        })
    }

    /// Returns the whole stream. Fails with `EINVAL` if a part of it is missing.
    pub fn image(&self) -> Result<&[u8]> {
        if self.image.len() < self.size {
            return Err(EINVAL);
        }
        Ok(&self.image)
    }
}

impl Loader for ImageLoader {
    /// Fails with `EINVAL` if there are more bytes than the size of the stream.
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if bytes.len() > self.size - self.image.len() {
            return Err(EINVAL);
        }
        self.image.extend_from_slice(bytes, GFP_MAYFAIL)?;
        Ok(bytes.len())
    }
}
