// SPDX-License-Identifier: GPL-2.0

//! DMA queue, compared with a model that has a list of queued descriptors.

use crate::Input;
use std::collections::VecDeque;
use vfio_host_tests::queue::{
    Failure,
    Next,
    Op,
    Piece,
    Queue,
    ALL,
    DESCRIPTORS,
    DESCRIPTOR_SIZE,
    PIECE,
    REFUSED_BUSY,
    REFUSED_INDEX,
    SNAPSHOT_SIZE,
    TABLE_SIZE, //
};

/// Size of the state memory in bytes.
const MEMORY: u64 = 1 << 20;

/// Offset of the read-only fields in a descriptor.
const READ_ONLY: usize = 0x30;

// States of a descriptor.
const IDLE: u32 = 0;
const QUEUED: u32 = 1;
const ACTIVE: u32 = 2;
const DONE: u32 = 3;
const FAILED: u32 = 4;
const ABORTED: u32 = 5;

/// A descriptor: the values written by the user, and its progress.
#[derive(Clone, Copy)]
struct Descriptor {
    asked: [u8; READ_ONLY],
    status: u32,
    error: u32,
    pos: u64,
    due: u64,
}

impl Descriptor {
    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.asked[at..].first_chunk().expect("inside"))
    }

    fn half(&self, at: usize) -> u32 {
        u32::from_le_bytes(*self.asked[at..].first_chunk().expect("inside"))
    }

    fn len(&self) -> u64 {
        self.word(0x10)
    }

    fn period(&self) -> u64 {
        u64::from(self.half(0x28)) * 1000
    }

    fn turn(&self) -> u64 {
        match (self.half(0x28), self.half(0x2c)) {
            (0, _) | (_, 0) => self.len(),
            (_, step) => self.len().min(u64::from(step)),
        }
    }

    /// Returns the number of bytes left of the current turn, or `None` between two turns.
    fn left(&self) -> u64 {
        match self.turn() {
            0 => 0,
            turn => self.pos.next_multiple_of(turn) - self.pos,
        }
    }

    /// Returns the operation, or the error if it is invalid.
    fn check(&self) -> Result<Op, u32> {
        let op = match self.half(0x20) {
            1 => Op::Read,
            2 => Op::Write,
            3 => Op::Fill,
            4 => Op::Churn,
            _ => return Err(Failure::Op as u32),
        };
        let beyond =
            |at, size: u64| u128::from(self.word(at)) + u128::from(self.len()) > u128::from(size);

        if self.len() == 0
            || (op != Op::Fill && beyond(0x08, MEMORY))
            || (op != Op::Churn && beyond(0x00, u64::MAX))
        {
            return Err(Failure::Range as u32);
        }
        Ok(op)
    }
}

/// The current descriptor, whether a piece of it is being moved, and whether it is aborted.
type Serving = Option<(usize, bool, bool)>;

struct Model {
    descriptors: [Descriptor; DESCRIPTORS],
    queued: VecDeque<usize>,
    serving: Serving,
    periodic_last: bool,
    refused: u32,
    done: u64,
    bytes: u64,
    vectors: u32,
}

impl Model {
    /// Returns the queue that is in the stream.
    fn new(snapshot: &[u8; SNAPSHOT_SIZE]) -> Self {
        let half = |at: usize| u32::from_le_bytes(*snapshot[at..].first_chunk().expect("inside"));
        let word = |at: usize| u64::from_le_bytes(*snapshot[at..].first_chunk().expect("inside"));
        let order = &snapshot[TABLE_SIZE..TABLE_SIZE + DESCRIPTORS];
        let rest = TABLE_SIZE + DESCRIPTORS;

        let mut this = Self {
            descriptors: core::array::from_fn(|index| {
                let at = index * DESCRIPTOR_SIZE;

                Descriptor {
                    asked: *snapshot[at..].first_chunk().expect("inside"),
                    status: half(at + 0x30),
                    error: half(at + 0x34),
                    pos: word(at + 0x38),
                    due: 0,
                }
            }),
            queued: order[..half(rest) as usize]
                .iter()
                .map(|index| usize::from(*index))
                .collect(),
            serving: None,
            periodic_last: false,
            refused: half(rest + 4),
            done: word(rest + 8),
            bytes: word(rest + 16),
            vectors: 0,
        };
        this.serving = (0..DESCRIPTORS)
            .find(|index| {
                this.descriptors[*index].status == ACTIVE && this.descriptors[*index].left() > 0
            })
            .map(|index| (index, false, false));
        this
    }

    fn is_devices(&self, index: usize) -> bool {
        matches!(self.descriptors[index].status, QUEUED | ACTIVE)
    }

    fn signal(&mut self, index: usize) {
        let vector = self.descriptors[index].half(0x24);

        if vector < 32 {
            self.vectors |= 1 << vector;
        }
    }

    fn end(&mut self, index: usize, status: u32, error: u32) {
        self.descriptors[index].status = status;
        self.descriptors[index].error = error;
        self.done = self.done.wrapping_add(1);
        self.signal(index);
    }

    fn doorbell(&mut self, index: u32) {
        let index = index as usize;

        self.refused = if index >= DESCRIPTORS {
            REFUSED_INDEX
        } else if self.is_devices(index) {
            REFUSED_BUSY
        } else {
            let descriptor = &mut self.descriptors[index];

            (descriptor.status, descriptor.error, descriptor.pos) = (QUEUED, 0, 0);
            self.queued.push_back(index);
            0
        };
    }

    fn abort(&mut self, which: u32) {
        self.refused = if which == ALL || (which as usize) < DESCRIPTORS {
            0
        } else {
            REFUSED_INDEX
        };
        for index in 0..DESCRIPTORS {
            if which != ALL && which as usize != index {
                continue;
            }
            match &mut self.serving {
                Some((serving, true, aborted)) if *serving == index => *aborted = true,
                serving => {
                    serving.take_if(|(serving, ..)| *serving == index);
                    self.queued.retain(|queued| *queued != index);
                    if self.is_devices(index) {
                        self.end(index, ABORTED, 0);
                    }
                }
            }
        }
    }

    /// Returns the next action of the device, or `None` if it moves a piece of the current
    /// descriptor.
    fn next(&mut self, now: u64) -> Option<Next> {
        loop {
            if self.serving.is_none() {
                let waiting = (0..DESCRIPTORS)
                    .filter(|index| self.descriptors[*index].status == ACTIVE)
                    .map(|index| (self.descriptors[index].due, index))
                    .min();
                let due = waiting.filter(|(due, _)| *due <= now);
                let index = if due.is_some() && (self.queued.is_empty() || !self.periodic_last) {
                    self.periodic_last = true;
                    due.map(|(_, index)| index)
                } else {
                    self.queued.pop_front().inspect(|index| {
                        self.periodic_last = false;
                        self.descriptors[*index].status = ACTIVE;
                        self.descriptors[*index].due = now;
                    })
                };
                let Some(index) = index else {
                    return Some(waiting.map_or(Next::Nothing, |(due, _)| Next::At(due)));
                };
                self.serving = Some((index, false, false));
            }
            let (index, moving, _) = self.serving.as_mut().expect("just chosen");
            match self.descriptors[*index].check() {
                Ok(_) => {
                    *moving = true;
                    return None;
                }
                Err(error) => {
                    let index = *index;

                    self.end(index, FAILED, error);
                }
            }
            self.serving = None;
        }
    }

    /// Checks that a piece is the next one to move.
    fn check_piece(&self, piece: &Piece) {
        let (index, ..) = self.serving.expect("a piece is of what is served");
        let descriptor = &self.descriptors[index];
        let left = match descriptor.left() {
            0 => descriptor.turn(),
            left => left,
        };
        let (len, pos) = (descriptor.len(), descriptor.pos % descriptor.len());

        assert_eq!(Ok(piece.op), descriptor.check());
        assert_eq!(piece.pos, pos);
        assert_eq!(piece.len, left.min(len - pos).min(PIECE));
        assert!(piece.len > 0);
        let seed = descriptor.word(0x18).wrapping_add(descriptor.pos / len);
        assert_eq!(piece.seed, seed);
        if piece.op != Op::Churn {
            assert_eq!(piece.iova, descriptor.word(0) + pos);
        }
        if piece.op != Op::Fill {
            let addr = descriptor.word(0x08) + pos;

            assert_eq!(piece.memory(), addr as usize..(addr + piece.len) as usize);
            assert!(addr + piece.len <= MEMORY, "outside of the memory");
        }
    }

    fn moved(&mut self, len: u64, failure: Option<Failure>, now: u64) {
        let (index, _, aborted) = self.serving.take().expect("a piece was moved");
        let descriptor = &mut self.descriptors[index];

        descriptor.pos = descriptor.pos.wrapping_add(len);
        self.bytes = self.bytes.wrapping_add(len);
        let round = descriptor.pos % descriptor.len() == 0;
        let left = descriptor.left();
        if let Some(failure) = failure {
            self.end(index, FAILED, failure as u32);
        } else if descriptor.period() == 0 && left == 0 {
            self.end(index, DONE, 0);
        } else if aborted {
            self.end(index, ABORTED, 0);
        } else {
            if left == 0 {
                let late = 16 * descriptor.period();

                descriptor.due =
                    (descriptor.due + descriptor.period()).max(now.saturating_sub(late));
            } else {
                self.serving = Some((index, false, false));
            }
            if round && self.descriptors[index].period() > 0 {
                self.signal(index);
            }
        }
    }

    fn table(&self) -> Vec<u8> {
        let mut table = Vec::new();

        for descriptor in &self.descriptors {
            table.extend(descriptor.asked);
            table.extend(descriptor.status.to_le_bytes());
            table.extend(descriptor.error.to_le_bytes());
            table.extend(descriptor.pos.to_le_bytes());
        }
        table
    }

    /// Checks the invariants of a queue.
    fn check(&self) {
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            let times = self.queued.iter().filter(|n| **n == index).count();
            let serving = self.serving.is_some_and(|(serving, ..)| serving == index);

            assert_eq!(times, usize::from(descriptor.status == QUEUED));
            assert!(descriptor.status != QUEUED || descriptor.pos == 0);
            assert!(!serving || descriptor.status == ACTIVE);
            if descriptor.status == ACTIVE && !serving {
                assert!(descriptor.period() > 0, "it would not be served again");
            }
            assert!((IDLE..=ABORTED).contains(&descriptor.status));
            assert_eq!(descriptor.error != 0, descriptor.status == FAILED);
        }
    }
}

/// Returns a descriptor that is likely to be valid.
fn descriptor(input: &mut Input<'_>) -> Vec<u8> {
    let words = [0x10_0000, input.number(), input.number(), input.number()];
    let op = u32::from(input.byte() % 6);
    let halves = [
        op,
        u32::from(input.byte() % 40),
        input.number() as u32,
        input.number() as u32,
    ];
    let words = words.iter().flat_map(|word| word.to_le_bytes());

    words
        .chain(halves.iter().flat_map(|half| half.to_le_bytes()))
        .collect()
}

fn table(queue: &Queue) -> [u8; TABLE_SIZE] {
    let mut table = [0; TABLE_SIZE];
    queue.read(0, &mut table);
    table
}

fn save(queue: &Queue) -> [u8; SNAPSHOT_SIZE] {
    let mut snapshot = [0; SNAPSHOT_SIZE];
    queue.save(&mut snapshot);
    snapshot
}

fn load(snapshot: &[u8; SNAPSHOT_SIZE]) -> Option<Queue> {
    let mut queue = Queue::POWER_ON;
    queue.load(snapshot).map(|()| queue)
}

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let mut queue = Queue::POWER_ON;
    let mut model = Model::new(&save(&queue));
    let mut now = 0;
    let mut piece = None;

    while !input.is_empty() {
        match input.below(10) {
            0 => {
                let (offset, count) = (input.below(TABLE_SIZE + 8), input.below(200));
                let from = input.bytes(count);

                queue.write(offset, from);
                for (at, byte) in (offset..).zip(from) {
                    let (index, field) = (at / DESCRIPTOR_SIZE, at % DESCRIPTOR_SIZE);

                    if index < DESCRIPTORS && field < READ_ONLY && !model.is_devices(index) {
                        model.descriptors[index].asked[field] = *byte;
                    }
                }
            }
            1 | 2 => {
                let index = input.below(DESCRIPTORS);
                let bytes = descriptor(&mut input);

                queue.write(index * DESCRIPTOR_SIZE, &bytes);
                if !model.is_devices(index) {
                    model.descriptors[index].asked.copy_from_slice(&bytes);
                }
                queue.doorbell(index as u32);
                model.doorbell(index as u32);
            }
            3 => {
                let index = input.number() as u32;

                queue.doorbell(index);
                model.doorbell(index);
            }
            4 => {
                let index = if input.bool() {
                    ALL
                } else {
                    input.number() as u32
                };

                queue.abort(index);
                model.abort(index);
            }
            5 | 6 => {
                let mut snapshot = save(&queue);

                // A queue is only saved while no piece is being moved.
                if piece.is_some() {
                    continue;
                }
                for _ in 0..input.below(5) {
                    let descriptor = input.below(DESCRIPTORS) * DESCRIPTOR_SIZE;
                    if input.below(4) == 3 {
                        // Add one to the queue, which may contain it already.
                        let order = &mut snapshot[TABLE_SIZE..];
                        let last = usize::from(order[DESCRIPTORS]) % DESCRIPTORS;

                        order[last] = order[input.below(DESCRIPTORS)];
                        order[DESCRIPTORS] = last as u8 + 1;
                        continue;
                    }
                    let at = match input.below(3) {
                        0 => input.below(SNAPSHOT_SIZE),
                        1 => descriptor + READ_ONLY + input.below(DESCRIPTOR_SIZE - READ_ONLY),
                        _ => TABLE_SIZE + input.below(DESCRIPTORS + 8),
                    };

                    snapshot[at] = input.byte();
                }
                if let Some(loaded) = load(&snapshot) {
                    assert!(save(&loaded) == snapshot, "a different queue was loaded");
                    queue = loaded;
                    model = Model::new(&snapshot);
                } else {
                    assert!(snapshot != save(&queue), "a valid queue is refused");
                }
            }
            7 | 8 if piece.is_none() => {
                now += input.number() % (1 << 40);
                let next = queue.next(now, MEMORY);
                let expected = model.next(now);

                match next {
                    Next::Piece(next) => {
                        assert_eq!(expected, None);
                        model.check_piece(&next);
                        piece = Some(next);
                    }
                    next => assert_eq!(Some(next), expected),
                }
            }
            _ => {
                if let Some(piece) = piece.take() {
                    let failure = (input.below(4) == 1).then_some(Failure::Fault);
                    let len = match failure {
                        Some(_) => input.below(piece.len as usize) as u64,
                        None => piece.len,
                    };

                    queue.moved(&piece, len, failure, now);
                    model.moved(len, failure, now);
                }
            }
        }
        model.check();
        assert!(table(&queue)[..] == model.table(), "different descriptors");
        let busy = (0..DESCRIPTORS).any(|index| model.is_devices(index));
        assert_eq!(queue.is_busy(), busy);
        assert_eq!(queue.status(false), u32::from(busy));
        assert_eq!(queue.refused(), model.refused);
        assert_eq!((queue.done(), queue.bytes()), (model.done, model.bytes));
        assert_eq!(queue.take_vectors(), core::mem::take(&mut model.vectors));
    }
}
