// SPDX-License-Identifier: GPL-2.0

//! MSI-X: which interrupts reach the user, and which ones wait.
//!
//! An interrupt that cannot be delivered at once waits in the vector's pending bit, whatever the
//! reason is, and is delivered as soon as no reason is left. Several that wait are delivered as
//! one, as the PCI specification says.
//!
//! This file uses `core` alone and allocates nothing.

use core::ops::{
    DerefMut,
    Range, //
};

/// The size of an entry of the table in bytes.
pub const ENTRY_SIZE: usize = 16;

/// Where in an entry the vector's mask is, and which bit of that byte.
const CONTROL: usize = 12;
const CONTROL_MASKED: u8 = 1;

/// How many vectors the pending bit array has in a word, which it is made of.
const VECTORS_PER_WORD: usize = u64::BITS as usize;

/// Returns the size in bytes of the table of `vectors` vectors.
pub const fn table_size(vectors: usize) -> usize {
    vectors * ENTRY_SIZE
}

/// Returns the size in bytes of the pending bit array of `vectors` vectors.
pub const fn pending_size(vectors: usize) -> usize {
    vectors.div_ceil(VECTORS_PER_WORD) * size_of::<u64>()
}

/// Who is told of an interrupt.
pub trait Listener {
    /// Tells of one.
    fn signal(&self);
}

/// A vector.
pub struct Vector<L> {
    /// The entry of the table. But for the mask in it, nothing depends on what the user wrote.
    entry: [u8; ENTRY_SIZE],
    listener: Option<L>,
    /// Masked by `VFIO_DEVICE_SET_IRQS`.
    masked: bool,
    pending: bool,
}

impl<L> Vector<L> {
    /// A vector at power on: nobody listens, nothing is masked and nothing waits.
    pub const POWER_ON: Self = Self {
        entry: [0; ENTRY_SIZE],
        listener: None,
        masked: false,
        pending: false,
    };

    /// Tells whether the vector is masked, either way.
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
    /// Bus mastering is on, so that the device may send messages.
    master: bool,
}

impl<L, V> Msix<V>
where
    L: Listener,
    V: DerefMut<Target = [Vector<L>]>,
{
    /// Makes the MSI-X side of a running device that is no bus master.
    pub fn new(vectors: V) -> Self {
        Self {
            vectors,
            running: true,
            function_masked: false,
            master: false,
        }
    }

    /// Delivers what waits in these vectors and can be delivered.
    fn settle(&mut self, vectors: Range<usize>) {
        if self.master {
            self.deliver(vectors);
        }
    }

    /// As [`settle()`](Self::settle), whether the device is a bus master or not.
    fn deliver(&mut self, vectors: Range<usize>) {
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

    /// Raises an interrupt. Nothing happens if there is no such vector.
    pub fn signal(&mut self, vector: usize) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.pending = true;
        }
        self.settle(vector..vector.saturating_add(1));
    }

    /// Raises an interrupt for the user, as `VFIO_DEVICE_SET_IRQS` does. No message is sent for it,
    /// so that it does not matter whether the device is a bus master.
    pub fn trigger(&mut self, vector: usize) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.pending = true;
        }
        self.deliver(vector..vector.saturating_add(1));
    }

    /// Sets who listens to a vector, and returns who did before.
    pub fn listen(&mut self, vector: usize, listener: Option<L>) -> Option<L> {
        let old = match self.vectors.get_mut(vector) {
            Some(vector) => core::mem::replace(&mut vector.listener, listener),
            None => None,
        };
        self.settle(vector..vector.saturating_add(1));
        old
    }

    /// Masks or unmasks a vector, as `VFIO_DEVICE_SET_IRQS` does.
    pub fn mask(&mut self, vector: usize, masked: bool) {
        if let Some(vector) = self.vectors.get_mut(vector) {
            vector.masked = masked;
        }
        self.settle(vector..vector.saturating_add(1));
    }

    /// Follows the configuration space: masks or unmasks all vectors, and lets the device send
    /// messages or not. Interrupts that it cannot send wait.
    pub fn configure(&mut self, masked: bool, master: bool) {
        self.function_masked = masked;
        self.master = master;
        self.settle(0..self.vectors.len());
    }

    /// Says whether the device runs. While it does not, everything waits.
    pub fn run(&mut self, running: bool) {
        self.running = running;
        self.settle(0..self.vectors.len());
    }

    /// Brings the device into the state of power on. Who listens, and what is masked by
    /// `VFIO_DEVICE_SET_IRQS`, is the user's and stays.
    pub fn reset(&mut self) {
        for vector in self.vectors.iter_mut() {
            vector.entry = [0; ENTRY_SIZE];
            vector.pending = false;
        }
        self.function_masked = false;
        self.master = false;
        self.running = true;
    }

    /// Copies from the table what is at `offset`. What is behind the end is left as it is.
    pub fn read_table(&self, offset: usize, to: &mut [u8]) {
        let vectors = self.vectors.iter().skip(offset / ENTRY_SIZE);
        let table = vectors.flat_map(|vector| &vector.entry);
        for (to, from) in to.iter_mut().zip(table.skip(offset % ENTRY_SIZE)) {
            *to = *from;
        }
    }

    /// Copies to the table, unless the device is stopped. What is behind the end has no effect.
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
        self.settle(first..end.min(self.vectors.len()));
    }

    /// Copies from the pending bit array what is at `offset`. What is behind the end is left as it
    /// is.
    pub fn read_pending(&self, offset: usize, to: &mut [u8]) {
        let end = pending_size(self.vectors.len());
        for (byte, to) in (offset..end).zip(to) {
            let vectors = self.vectors.iter().skip(byte * 8).take(8);
            *to = vectors.enumerate().fold(0, |bits, (bit, vector)| {
                bits | u8::from(vector.pending) << bit
            });
        }
    }

    /// Tells whether a pending bit array in a stream is of such a device: whether it is as long,
    /// and has bits of these vectors alone.
    pub fn accepts_pending(&self, bytes: &[u8]) -> bool {
        let vectors = self.vectors.len();
        let mut bits = bytes
            .iter()
            .enumerate()
            .flat_map(|(byte, bits)| (0..8).map(move |bit| (byte * 8 + bit, bits >> bit & 1 != 0)));
        bytes.len() == pending_size(vectors) && bits.all(|(bit, set)| !set || bit < vectors)
    }

    /// Replaces table and pending bits by what is in a stream, of which
    /// [`accepts_pending`](Self::accepts_pending) says that it is of such a device.
    pub fn load(&mut self, table: &[u8], pending: &[u8]) {
        let entries = table.chunks_exact(ENTRY_SIZE);
        for (index, (vector, entry)) in self.vectors.iter_mut().zip(entries).enumerate() {
            vector.entry.copy_from_slice(entry);
            let bits = pending.get(index / 8).copied().unwrap_or(0);
            vector.pending = bits >> (index % 8) & 1 != 0;
        }
        self.settle(0..self.vectors.len());
    }
}
