// SPDX-License-Identifier: GPL-2.0

//! MSI-X: delivery of interrupts and pending bits.
//!
//! If an interrupt cannot be delivered for any reason, the vector's pending bit is set. The
//! interrupt is delivered as soon as no reason is left. Several pending interrupts of a vector are
//! delivered as one, as the PCI specification requires.
//!
//! This file uses `core` alone and allocates nothing.

use core::ops::{
    DerefMut,
    Range, //
};

/// The size of an entry of the table in bytes.
pub const ENTRY_SIZE: usize = 16;

/// Offset of the byte with the vector's mask in an entry.
pub const CONTROL: usize = 12;
/// Set if the vector is masked.
pub const CONTROL_MASKED: u8 = 1;

/// Number of vectors in a word of the pending bit array.
const VECTORS_PER_WORD: usize = u64::BITS as usize;

/// Returns the size in bytes of the table of `vectors` vectors.
pub const fn table_size(vectors: usize) -> usize {
    vectors * ENTRY_SIZE
}

/// Returns the size in bytes of the pending bit array of `vectors` vectors.
pub const fn pending_size(vectors: usize) -> usize {
    vectors.div_ceil(VECTORS_PER_WORD) * size_of::<u64>()
}

/// Receiver of the interrupts of a vector.
pub trait Listener {
    /// Delivers an interrupt.
    fn signal(&self);
}

/// A vector.
pub struct Vector<L> {
    /// The entry of the table. Only the mask in it has an effect.
    entry: [u8; ENTRY_SIZE],
    listener: Option<L>,
    /// Masked by `VFIO_DEVICE_SET_IRQS`.
    masked: bool,
    pending: bool,
}

impl<L> Vector<L> {
    /// A vector at power on: without listener, unmasked, and without pending interrupt.
    pub const POWER_ON: Self = Self {
        entry: [0; ENTRY_SIZE],
        listener: None,
        masked: false,
        pending: false,
    };

    /// Returns whether the vector is masked, in the table or by `VFIO_DEVICE_SET_IRQS`.
    fn is_masked(&self) -> bool {
        self.masked || self.entry[CONTROL] & CONTROL_MASKED != 0
    }
}

/// The MSI-X side of a device.
///
/// `V` holds a [`Vector`] for each vector.
pub struct Msix<V> {
    vectors: V,
    /// The device is not stopped.
    running: bool,
    /// The function mask of the configuration space.
    function_masked: bool,
    /// Bus mastering is enabled, so that the device may send messages.
    master: bool,
}

impl<L, V> Msix<V>
where
    L: Listener,
    V: DerefMut<Target = [Vector<L>]>,
{
    /// Creates the MSI-X side of a running device without bus mastering.
    pub fn new(vectors: V) -> Self {
        Self {
            vectors,
            running: true,
            function_masked: false,
            master: false,
        }
    }

    /// Delivers the pending interrupts of these vectors that can be delivered.
    fn deliver(&mut self, vectors: Range<usize>) {
        if self.master {
            self.deliver_without_master(vectors);
        }
    }

    /// Does the same as [`deliver()`](Self::deliver), but ignores bus mastering.
    fn deliver_without_master(&mut self, vectors: Range<usize>) {
        if !self.running || self.function_masked {
            return;
        }
        for vector in self.vectors.get_mut(vectors).unwrap_or(&mut []) {
            if !vector.pending || vector.is_masked() {
                continue;
            }
            if let Some(listener) = &vector.listener {
                vector.pending = false;
                listener.signal();
            }
        }
    }

    /// Raises an interrupt. Does nothing if the vector does not exist.
    pub fn signal(&mut self, vector: usize) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.pending = true;
        }
        self.deliver(vector..vector.saturating_add(1));
    }

    /// Raises an interrupt on behalf of the user, for `VFIO_DEVICE_SET_IRQS`. The device sends no
    /// message for it, so that bus mastering does not matter.
    pub fn trigger(&mut self, vector: usize) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.pending = true;
        }
        self.deliver_without_master(vector..vector.saturating_add(1));
    }

    /// Sets the listener of a vector, and returns the previous one.
    pub fn listen(&mut self, vector: usize, listener: Option<L>) -> Option<L> {
        let old = match self.vectors.get_mut(vector) {
            Some(vector) => core::mem::replace(&mut vector.listener, listener),
            None => None,
        };
        self.deliver(vector..vector.saturating_add(1));
        old
    }

    /// Masks or unmasks a vector, for `VFIO_DEVICE_SET_IRQS`.
    pub fn mask(&mut self, vector: usize, masked: bool) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.masked = masked;
        }
        self.deliver(vector..vector.saturating_add(1));
    }

    /// Applies a change of the configuration space: masks or unmasks all vectors, and enables or
    /// disables messages. Interrupts that cannot be sent are pending.
    pub fn configure(&mut self, masked: bool, master: bool) {
        self.function_masked = masked;
        self.master = master;
        self.deliver(0..self.vectors.len());
    }

    /// Sets whether the device runs. While it does not, all interrupts are pending.
    pub fn run(&mut self, running: bool) {
        self.running = running;
        self.deliver(0..self.vectors.len());
    }

    /// Resets the device to the state at power on. Listeners and the masks of
    /// `VFIO_DEVICE_SET_IRQS` belong to the user and do not change.
    pub fn reset(&mut self) {
        for vector in self.vectors.iter_mut() {
            vector.entry = [0; ENTRY_SIZE];
            vector.pending = false;
        }
        self.function_masked = false;
        self.master = false;
        self.running = true;
    }

    /// Copies from the table at `offset`. Bytes of `to` after the end of the table are unchanged.
    pub fn read_table(&self, offset: usize, to: &mut [u8]) {
        let vectors = self.vectors.iter().skip(offset / ENTRY_SIZE);
        let table = vectors.flat_map(|vector| &vector.entry);
        for (to, from) in to.iter_mut().zip(table.skip(offset % ENTRY_SIZE)) {
            *to = *from;
        }
    }

    /// Copies to the table, unless the device is stopped. Bytes after its end are ignored.
    pub fn write_table(&mut self, offset: usize, from: &[u8]) {
        if !self.running {
            return;
        }
        let first = offset / ENTRY_SIZE;
        let vectors = self.vectors.iter_mut().skip(first);
        let table = vectors.flat_map(|vector| &mut vector.entry);
        for (to, from) in table.skip(offset % ENTRY_SIZE).zip(from) {
            *to = *from;
        }
        let end = (offset + from.len()).div_ceil(ENTRY_SIZE);
        self.deliver(first..end.min(self.vectors.len()));
    }

    /// Copies from the pending bit array at `offset`. Bytes of `to` after its end are unchanged.
    pub fn read_pending(&self, offset: usize, to: &mut [u8]) {
        let end = pending_size(self.vectors.len());
        for (byte, to) in (offset..end).zip(to) {
            let vectors = self.vectors.iter().skip(byte * 8).take(8);
            *to = vectors.enumerate().fold(0, |bits, (bit, vector)| {
                bits | u8::from(vector.pending) << bit
            });
        }
    }

    /// Returns whether a pending bit array in a stream belongs to such a device: whether it has the
    /// same length, and only bits of these vectors.
    pub fn accepts_pending(&self, bytes: &[u8]) -> bool {
        let vectors = self.vectors.len();
        let mut bits = bytes
            .iter()
            .enumerate()
            .flat_map(|(byte, bits)| (0..8).map(move |bit| (byte * 8 + bit, bits >> bit & 1 != 0)));
        bytes.len() == pending_size(vectors) && bits.all(|(bit, set)| !set || bit < vectors)
    }

    /// Replaces table and pending bits by those in a stream, for which
    /// [`accepts_pending`](Self::accepts_pending) has returned true.
    pub fn load(&mut self, table: &[u8], pending: &[u8]) {
        let entries = table.chunks_exact(ENTRY_SIZE);
        for (index, (vector, entry)) in self.vectors.iter_mut().zip(entries).enumerate() {
            vector.entry.copy_from_slice(entry);
            let bits = pending.get(index / 8).copied().unwrap_or(0);
            vector.pending = bits >> (index % 8) & 1 != 0;
        }
        self.deliver(0..self.vectors.len());
    }
}
