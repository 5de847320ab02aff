// SPDX-License-Identifier: GPL-2.0

//! Tests of MSI-X against a naive model.

use proptest::prelude::*;
use std::{
    cell::Cell,
    rc::Rc, //
};
use vfio_host_tests::msix::{
    pending_size,
    table_size,
    Listener,
    Msix,
    Vector,
    ENTRY_SIZE, //
};

/// Counts its signals.
#[derive(Clone, Default)]
struct Counter(Rc<Cell<u32>>);

impl Listener for Counter {
    fn signal(&self) {
        self.0.set(self.0.get() + 1);
    }
}

type Device = Msix<Vec<Vector<Counter>>>;

fn device(vectors: usize) -> Device {
    Msix::new((0..vectors).map(|_| Vector::POWER_ON).collect())
}

/// Vector of the model.
#[derive(Clone, Default)]
struct Model {
    entry: [u8; ENTRY_SIZE],
    listens: bool,
    masked: bool,
    pending: bool,
    signals: u32,
}

/// Operation on the device.
#[derive(Clone, Debug)]
enum Step {
    Signal(usize),
    Listen(usize, bool),
    Mask(usize, bool),
    Trigger(usize),
    Configure(bool, bool),
    Run(bool),
    Write(usize, Vec<u8>),
    Reset,
    Load(Vec<u8>, Vec<u8>),
}

fn step(vectors: usize) -> impl Strategy<Value = Step> {
    let table = table_size(vectors);
    let any_vector = 0..vectors + 2;

    prop_oneof![
        8 => any_vector.clone().prop_map(Step::Signal),
        2 => any_vector.clone().prop_map(Step::Trigger),
        3 => (any_vector.clone(), any::<bool>()).prop_map(|(v, on)| Step::Listen(v, on)),
        3 => (any_vector, any::<bool>()).prop_map(|(v, on)| Step::Mask(v, on)),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(m, on)| Step::Configure(m, on)),
        2 => any::<bool>().prop_map(Step::Run),
        3 => (0..table + 8, prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Step::Write(at, bytes)),
        1 => Just(Step::Reset),
        1 => (
            prop::collection::vec(any::<u8>(), table),
            prop::collection::vec(any::<u8>(), pending_size(vectors)),
        )
            .prop_map(|(table, pending)| Step::Load(table, pending)),
    ]
}

/// The vectors, whether the device runs, its function mask, and whether it is a bus master.
struct Models {
    vectors: Vec<Model>,
    running: bool,
    function_masked: bool,
    master: bool,
}

impl Models {
    fn store(&mut self, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            if let Some(vector) = self.vectors.get_mut(at / ENTRY_SIZE) {
                vector.entry[at % ENTRY_SIZE] = *byte;
            }
        }
    }

    fn apply(&mut self, step: &Step) {
        let mut triggered = None;
        match step {
            Step::Signal(v) | Step::Trigger(v) => {
                triggered = matches!(step, Step::Trigger(_)).then_some(*v);
                if let Some(vector) = self.vectors.get_mut(*v) {
                    vector.pending = true;
                }
            }
            Step::Listen(v, on) => {
                if let Some(vector) = self.vectors.get_mut(*v) {
                    vector.listens = *on;
                }
            }
            Step::Mask(v, on) => {
                if let Some(vector) = self.vectors.get_mut(*v) {
                    vector.masked = *on;
                }
            }
            Step::Configure(masked, master) => {
                self.function_masked = *masked;
                self.master = *master;
            }
            Step::Run(on) => self.running = *on,
            Step::Write(at, bytes) if self.running => self.store(*at, bytes),
            Step::Write(..) => (),
            Step::Reset => {
                for vector in &mut self.vectors {
                    vector.entry = [0; ENTRY_SIZE];
                    vector.pending = false;
                }
                self.running = true;
                self.function_masked = false;
                self.master = false;
            }
            Step::Load(table, pending) => {
                self.store(0, table);
                for (index, vector) in self.vectors.iter_mut().enumerate() {
                    vector.pending = pending[index / 8] & 1 << (index % 8) != 0;
                }
            }
        }
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            let masked = vector.masked || vector.entry[12] & 1 != 0 || self.function_masked;
            let sends = self.master || triggered == Some(index);

            if vector.pending && vector.listens && !masked && self.running && sends {
                vector.pending = false;
                vector.signals += 1;
            }
        }
    }

    fn pending(&self) -> Vec<u8> {
        let mut bits = vec![0; pending_size(self.vectors.len())];

        for (index, vector) in self.vectors.iter().enumerate() {
            bits[index / 8] |= u8::from(vector.pending) << (index % 8);
        }
        bits
    }
}

fn vectors_and_steps() -> impl Strategy<Value = (usize, Vec<Step>)> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(4),
        Just(63),
        Just(64),
        Just(65),
        Just(130)
    ]
    .prop_flat_map(|vectors| (Just(vectors), prop::collection::vec(step(vectors), 1..60)))
}

proptest! {
    #[test]
    fn behaves_like_the_model((vectors, steps) in vectors_and_steps()) {
        let mut device = device(vectors);
        let counters: Vec<_> = (0..vectors).map(|_| Counter::default()).collect();
        let mut models = Models {
            vectors: vec![Model::default(); vectors],
            running: true,
            function_masked: false,
            master: false,
        };

        for step in &steps {
            match step {
                Step::Signal(v) => device.signal(*v),
                Step::Listen(v, on) => {
                    let listens = models.vectors.get(*v).is_some_and(|vector| vector.listens);
                    let counter = on.then(|| counters.get(*v).cloned().unwrap_or_default());

                    prop_assert_eq!(device.listen(*v, counter).is_some(), listens);
                }
                Step::Mask(v, on) => device.mask(*v, *on),
                Step::Trigger(v) => device.trigger(*v),
                Step::Configure(masked, master) => device.configure(*masked, *master),
                Step::Run(on) => device.run(*on),
                Step::Write(at, bytes) => device.write_table(*at, bytes),
                Step::Reset => device.reset(),
                Step::Load(table, pending) => device.load(table, pending),
            }
            models.apply(step);

            // Read all of both, and one more byte each, which must not change.
            let mut table = vec![0x5a; table_size(vectors) + 1];
            let mut pending = vec![0x5a; pending_size(vectors) + 1];
            let mut want: Vec<u8> = models.vectors.iter().flat_map(|v| v.entry).collect();

            device.read_table(0, &mut table);
            device.read_pending(0, &mut pending);
            want.push(0x5a);
            prop_assert_eq!(table, want);
            prop_assert_eq!(pending.pop(), Some(0x5a));
            prop_assert!(device.accepts_pending(&pending));
            prop_assert_eq!(pending, models.pending());
            for (vector, counter) in models.vectors.iter().zip(&counters) {
                prop_assert_eq!(counter.0.get(), vector.signals);
            }
        }
    }

    #[test]
    fn partial_reads_match_the_whole_table(
        content in prop::collection::vec(any::<u8>(), table_size(70)),
        bits in prop::collection::vec(any::<u8>(), 8),
        at in 0..table_size(70) + 4,
        len in 0..50usize,
    ) {
        let mut device = device(70);
        let mut pending = [bits.as_slice(), [0x2a, 0, 0, 0, 0, 0, 0, 0].as_slice()].concat();
        let (mut table, mut part) = (content.clone(), vec![0; len]);

        prop_assert!(device.accepts_pending(&pending));
        device.load(&content, &pending);
        table.resize(at + len, 0);
        device.read_table(at, &mut part);
        prop_assert_eq!(&part, &table[at..at + len]);

        let at = at % 20;
        pending.resize(at + len + 16, 0);
        part.fill(0);
        device.read_pending(at, &mut part);
        prop_assert_eq!(&part, &pending[at..at + len]);
    }
}

#[test]
fn sizes_match_the_specification() {
    assert_eq!((table_size(1), pending_size(1)), (16, 8));
    assert_eq!((table_size(64), pending_size(64)), (1024, 8));
    assert_eq!((table_size(65), pending_size(65)), (1040, 16));
    assert_eq!((table_size(2048), pending_size(2048)), (32768, 256));
}

#[test]
fn pending_bits_of_other_devices_are_refused() {
    let device = device(4);

    assert!(device.accepts_pending(&[0xf, 0, 0, 0, 0, 0, 0, 0]));
    assert!(!device.accepts_pending(&[0x10, 0, 0, 0, 0, 0, 0, 0]));
    assert!(!device.accepts_pending(&[0, 0, 0, 0, 0, 0, 0, 0x80]));
    assert!(!device.accepts_pending(&[0; 7]));
    assert!(!device.accepts_pending(&[0; 9]));
    assert!(!device.accepts_pending(&[]));
}
