// SPDX-License-Identifier: GPL-2.0

//! The DMA queue of the mock device.

use proptest::prelude::*;
use vfio_host_tests::queue::{
    Failure,
    Next,
    Op,
    Piece,
    Queue,
    Status,
    ALL,
    DESCRIPTORS,
    DESCRIPTOR_SIZE,
    PIECE,
    REFUSED_BUSY,
    REFUSED_INDEX,
    SNAPSHOT_SIZE,
    TABLE_SIZE, //
};

/// The size of the state memory in bytes.
const MEMORY: u64 = 1 << 20;

const NO_VECTOR: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Descriptor {
    iova: u64,
    addr: u64,
    len: u64,
    seed: u64,
    op: u32,
    vector: u32,
    period: u32,
    step: u32,
}

const WRITE: Descriptor = Descriptor {
    iova: 0x10_0000,
    addr: 0,
    len: 4096,
    seed: 0,
    op: 2,
    vector: NO_VECTOR,
    period: 0,
    step: 0,
};

impl Descriptor {
    fn bytes(&self) -> Vec<u8> {
        let words = [self.iova, self.addr, self.len, self.seed];
        let halves = [self.op, self.vector, self.period, self.step];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        words
            .chain(halves.iter().flat_map(|half| half.to_le_bytes()))
            .collect()
    }

    fn put(&self, queue: &mut Queue, index: usize) {
        queue.write(index * DESCRIPTOR_SIZE, &self.bytes());
    }

    fn start(&self, queue: &mut Queue, index: usize) {
        self.put(queue, index);
        queue.doorbell(index as u32);
        assert_eq!(queue.refused(), 0);
    }
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

/// Loads into a queue that was used before. Its old state must not affect the result.
fn load(snapshot: &[u8; SNAPSHOT_SIZE]) -> Option<Queue> {
    let mut queue = Queue::POWER_ON;
    let long = Descriptor {
        len: 4 * PIECE,
        ..WRITE
    };
    long.start(&mut queue, 2);
    long.start(&mut queue, 11);
    serve_one(&mut queue, 0);
    queue.load(snapshot).map(|()| queue)
}

fn half(queue: &Queue, index: usize, field: usize) -> u32 {
    let at = index * DESCRIPTOR_SIZE + field;
    u32::from_le_bytes(table(queue)[at..at + 4].try_into().unwrap())
}

fn status(queue: &Queue, index: usize) -> u32 {
    half(queue, index, 0x30)
}

fn error(queue: &Queue, index: usize) -> u32 {
    half(queue, index, 0x34)
}

fn pos(queue: &Queue, index: usize) -> u64 {
    let at = index * DESCRIPTOR_SIZE + 0x38;
    u64::from_le_bytes(table(queue)[at..at + 8].try_into().unwrap())
}

/// Serves the queue until it is idle at `now`, and returns the moved pieces.
fn serve(queue: &mut Queue, now: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    while let Next::Piece(piece) = queue.next(now, MEMORY) {
        queue.moved(&piece, piece.len, None, now);
        pieces.push(piece);
        assert!(pieces.len() < 10_000, "the queue never rests");
    }
    pieces
}

#[test]
fn transfer_is_moved_in_pieces_in_order() {
    let mut queue = Queue::POWER_ON;
    let len = 3 * PIECE + 5;
    Descriptor {
        iova: 0x1001,
        addr: 7,
        len,
        vector: 3,
        ..WRITE
    }
    .start(&mut queue, 0);
    assert_eq!(status(&queue, 0), Status::Queued as u32);

    let mut at = 0;
    for piece in serve(&mut queue, 0) {
        assert_eq!(piece.op, Op::Write);
        assert_eq!((piece.iova, piece.addr), (0x1001 + at, 7 + at));
        assert!(piece.len > 0 && piece.len <= PIECE);
        at += piece.len;
    }
    assert_eq!(at, len);
    assert_eq!(status(&queue, 0), Status::Done as u32);
    assert_eq!(pos(&queue, 0), len);
    assert_eq!((queue.done(), queue.bytes()), (1, len));
    assert_eq!(queue.take_vectors(), 1 << 3);
    assert_eq!(queue.take_vectors(), 0, "an interrupt comes once");
    assert_eq!(queue.next(0, MEMORY), Next::Nothing);
}

#[test]
fn all_descriptors_are_served_in_order() {
    let mut queue = Queue::POWER_ON;
    let order = [3, 1, 15, 0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];
    for index in order {
        Descriptor {
            iova: (index as u64) << 20,
            ..WRITE
        }
        .start(&mut queue, index);
    }
    let served: Vec<_> = serve(&mut queue, 0)
        .iter()
        .map(|piece| (piece.iova >> 20) as usize)
        .collect();
    assert_eq!(served, order);
}

#[test]
fn doorbells_are_refused() {
    let mut queue = Queue::POWER_ON;
    queue.doorbell(DESCRIPTORS as u32);
    assert_eq!(queue.refused(), REFUSED_INDEX);
    WRITE.start(&mut queue, 2);
    queue.doorbell(2);
    assert_eq!(queue.refused(), REFUSED_BUSY);
    queue.abort(DESCRIPTORS as u32);
    assert_eq!(queue.refused(), REFUSED_INDEX);
    assert_eq!(serve(&mut queue, 0).len(), 1, "it was queued once");
}

#[test]
fn busy_descriptor_cannot_be_written() {
    let mut queue = Queue::POWER_ON;
    WRITE.start(&mut queue, 1);
    let before = table(&queue);
    queue.write(0, &[0xff; DESCRIPTORS * DESCRIPTOR_SIZE]);
    let after = table(&queue);
    let range = DESCRIPTOR_SIZE..2 * DESCRIPTOR_SIZE;
    assert_eq!(before[range.clone()], after[range]);
    assert_eq!(
        status(&queue, 0),
        Status::Idle as u32,
        "it cannot be written"
    );
    assert_eq!(half(&queue, 0, 0x20), u32::MAX);
}

#[test]
fn bad_descriptors_fail_and_the_next_is_served() {
    let bad = [
        (Descriptor { op: 0, ..WRITE }, Failure::Op),
        (Descriptor { op: 5, ..WRITE }, Failure::Op),
        (Descriptor { len: 0, ..WRITE }, Failure::Range),
        (
            Descriptor {
                addr: MEMORY - 4095,
                ..WRITE
            },
            Failure::Range,
        ),
        (
            Descriptor {
                addr: u64::MAX,
                ..WRITE
            },
            Failure::Range,
        ),
        (
            Descriptor {
                iova: u64::MAX - 4094,
                ..WRITE
            },
            Failure::Range,
        ),
    ];
    let mut queue = Queue::POWER_ON;
    for (index, (descriptor, _)) in bad.iter().enumerate() {
        descriptor.start(&mut queue, index);
    }
    WRITE.start(&mut queue, 9);
    assert_eq!(serve(&mut queue, 0).len(), 1);
    for (index, (_, failure)) in bad.iter().enumerate() {
        assert_eq!(status(&queue, index), Status::Failed as u32, "{index}");
        assert_eq!(error(&queue, index), *failure as u32, "{index}");
        assert_eq!(pos(&queue, index), 0);
    }
    assert_eq!(status(&queue, 9), Status::Done as u32);

    // Operations ignore the address of a side that they do not use.
    for descriptor in [
        Descriptor {
            op: 3,
            addr: u64::MAX,
            ..WRITE
        },
        Descriptor {
            op: 4,
            iova: u64::MAX,
            ..WRITE
        },
    ] {
        descriptor.start(&mut queue, 0);
        assert_eq!(serve(&mut queue, 0).len(), 1);
        assert_eq!(status(&queue, 0), Status::Done as u32);
    }
}

#[test]
fn failure_ends_a_descriptor_at_its_position() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        len: 3 * PIECE,
        vector: 1,
        ..WRITE
    }
    .start(&mut queue, 0);
    let Next::Piece(piece) = queue.next(0, MEMORY) else {
        panic!("nothing to move");
    };
    queue.moved(&piece, piece.len, None, 0);
    let Next::Piece(piece) = queue.next(0, MEMORY) else {
        panic!("nothing to move");
    };
    queue.moved(&piece, 100, Some(Failure::Denied), 0);
    assert_eq!(status(&queue, 0), Status::Failed as u32);
    assert_eq!(error(&queue, 0), Failure::Denied as u32);
    assert_eq!(pos(&queue, 0), PIECE + 100);
    assert_eq!(queue.take_vectors(), 1 << 1);
    assert_eq!(queue.next(0, MEMORY), Next::Nothing);
}

#[test]
fn periodic_transfer_continues_until_aborted() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        op: 4,
        len: 10_000,
        seed: 100,
        period: 50,
        step: 4096,
        vector: 0,
        ..WRITE
    }
    .start(&mut queue, 0);
    let mut now = 0;
    let mut at = 0;
    let mut turns = 0;
    while turns < 40 {
        match queue.next(now, MEMORY) {
            Next::Piece(piece) => {
                assert_eq!(piece.pos, at % 10_000);
                assert_eq!(piece.addr, at % 10_000);
                assert!(piece.pos + piece.len <= 10_000, "beyond the range");
                assert_eq!(piece.seed, 100 + at / 10_000);
                at += piece.len;
                queue.moved(&piece, piece.len, None, now);
                assert_eq!(queue.take_vectors() != 0, at % 10_000 == 0);
            }
            Next::At(time) => {
                turns += 1;
                assert_eq!(at, turns * 4096, "a turn moves a step");
                assert_eq!(time, now + 50_000);
                now = time;
            }
            Next::Nothing => panic!("it has ended"),
        }
    }
    assert_eq!(status(&queue, 0), Status::Active as u32);
    queue.abort(0);
    assert_eq!(status(&queue, 0), Status::Aborted as u32);
    assert_eq!(pos(&queue, 0), at);
    assert_eq!(queue.next(u64::MAX, MEMORY), Next::Nothing);
}

#[test]
fn step_is_limited_to_the_range() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        op: 4,
        len: 100,
        period: 1,
        step: u32::MAX,
        ..WRITE
    }
    .start(&mut queue, 0);
    serve_one(&mut queue, 0);
    assert_eq!(pos(&queue, 0), 100);
    assert_eq!(queue.next(0, MEMORY), Next::At(1000), "the turn is over");
}

#[test]
fn late_descriptor_does_not_delay_others() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        op: 4,
        period: 1,
        step: 1,
        ..WRITE
    }
    .start(&mut queue, 0);
    serve_one(&mut queue, 0);
    WRITE.start(&mut queue, 1);
    // A second later it has missed a million turns.
    let now = 1_000_000_000;
    let mut served = 0;
    while status(&queue, 1) != Status::Done as u32 {
        serve_one(&mut queue, now);
        served += 1;
        assert!(served < 4, "the other one has no turn");
    }
}

fn serve_one(queue: &mut Queue, now: u64) {
    if let Next::Piece(piece) = queue.next(now, MEMORY) {
        queue.moved(&piece, piece.len, None, now);
    }
}

#[test]
fn abort_waits_for_the_current_piece() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        len: 4 * PIECE,
        ..WRITE
    }
    .start(&mut queue, 0);
    WRITE.start(&mut queue, 1);
    WRITE.start(&mut queue, 2);
    let Next::Piece(piece) = queue.next(0, MEMORY) else {
        panic!("nothing to move");
    };
    queue.abort(ALL);
    assert_eq!(status(&queue, 0), Status::Active as u32);
    assert_eq!(status(&queue, 1), Status::Aborted as u32);
    queue.moved(&piece, piece.len, None, 0);
    assert_eq!(status(&queue, 0), Status::Aborted as u32);
    assert_eq!(pos(&queue, 0), PIECE);
    assert_eq!(queue.done(), 3);
    assert_eq!(queue.next(0, MEMORY), Next::Nothing);
    queue.abort(1);
    assert_eq!(queue.done(), 3, "what is not the device's is not aborted");
}

#[test]
fn abort_between_pieces_takes_effect_immediately() {
    let mut queue = Queue::POWER_ON;
    Descriptor {
        len: 4 * PIECE,
        vector: 2,
        ..WRITE
    }
    .start(&mut queue, 0);
    WRITE.start(&mut queue, 1);
    serve_one(&mut queue, 0);
    queue.abort(0);
    assert_eq!(status(&queue, 0), Status::Aborted as u32);
    assert_eq!(pos(&queue, 0), PIECE);
    assert_eq!(queue.take_vectors(), 1 << 2);
    assert_eq!(serve(&mut queue, 0).len(), 1, "the next one is served");
    assert_eq!(queue.status(false), 0);
}

#[test]
fn status_reports_busy_and_paused() {
    let mut queue = Queue::POWER_ON;
    assert_eq!((queue.status(false), queue.status(true)), (0, 2));
    WRITE.start(&mut queue, 1);
    assert_eq!((queue.status(false), queue.status(true)), (1, 3));
}

#[test]
fn transfer_continues_after_migration() {
    for (period, step) in [(0, 0), (7, 0), (7, 3 * PIECE as u32)] {
        let mut queue = Queue::POWER_ON;
        Descriptor {
            len: 4 * PIECE,
            period,
            step,
            ..WRITE
        }
        .start(&mut queue, 3);
        WRITE.start(&mut queue, 1);
        serve_one(&mut queue, 0);

        let mut target = load(&save(&queue)).expect("a good queue");
        assert_eq!(save(&target), save(&queue));
        assert_eq!(status(&target, 3), Status::Active as u32);
        let pieces = if step == 0 { 3 } else { 2 };
        for at in 1..=pieces {
            let Next::Piece(piece) = target.next(0, MEMORY) else {
                panic!("its turn is not over");
            };
            assert_eq!(piece.pos, at * PIECE);
            target.moved(&piece, piece.len, None, 0);
        }
        let expected = if period == 0 {
            Status::Done
        } else {
            Status::Active
        };
        assert_eq!(status(&target, 3), expected as u32);
        serve_one(&mut target, 0);
        assert_eq!(
            status(&target, 1),
            Status::Done as u32,
            "it is the next one"
        );
    }
}

#[test]
fn queue_migrates() {
    let mut queue = Queue::POWER_ON;
    WRITE.start(&mut queue, 0);
    serve(&mut queue, 0);
    Descriptor {
        op: 3,
        len: 10_000,
        period: 10,
        step: 3000,
        ..WRITE
    }
    .start(&mut queue, 4);
    serve_one(&mut queue, 0);
    for index in [7, 2, 9] {
        WRITE.start(&mut queue, index);
    }

    let mut target = load(&save(&queue)).expect("a good queue");
    assert_eq!(save(&target), save(&queue));
    let first = serve(&mut target, 0);
    assert_eq!(
        first.iter().filter(|piece| piece.op == Op::Write).count(),
        3
    );
    let fill = first.iter().find(|piece| piece.op == Op::Fill);
    assert_eq!(fill.map(|piece| piece.pos), Some(3000), "it continues");
    assert_eq!(target.done(), 4);
}

#[test]
fn invalid_queues_are_refused() {
    let mut queue = Queue::POWER_ON;
    WRITE.start(&mut queue, 1);
    WRITE.start(&mut queue, 5);
    for index in [8, 9] {
        Descriptor {
            len: 2,
            period: 1,
            ..WRITE
        }
        .start(&mut queue, index);
        queue.abort(index as u32);
    }
    let good = save(&queue);
    assert!(load(&good).is_some());
    let order = DESCRIPTORS * DESCRIPTOR_SIZE;
    let refused: [(usize, u8, &str); 8] = [
        (DESCRIPTOR_SIZE + 0x30, 6, "no such status"),
        (DESCRIPTOR_SIZE + 0x30, 0, "idle but in the queue"),
        (DESCRIPTOR_SIZE + 0x30, 2, "active without a period"),
        (DESCRIPTOR_SIZE + 0x34, 1, "an error that has not happened"),
        (2 * DESCRIPTOR_SIZE + 0x30, 1, "queued but not in the queue"),
        (order + 1, 1, "twice in the queue"),
        (order + 2, 1, "behind the queue"),
        (order + DESCRIPTORS, 17, "too many"),
    ];
    for (at, byte, what) in refused {
        let mut bad = good;
        bad[at] = byte;
        assert!(load(&bad).is_none(), "{what}");
    }

    let active = |index: usize, pos: u64, queue: &[u8; SNAPSHOT_SIZE]| {
        let mut queue = *queue;
        let at = index * DESCRIPTOR_SIZE;
        queue[at + 0x30] = Status::Active as u8;
        queue[at + 0x38..at + 0x40].copy_from_slice(&pos.to_le_bytes());
        queue
    };
    assert!(load(&active(8, 1, &active(9, 2, &good))).is_some());
    let refused = [
        (active(8, 1, &active(9, 1, &good)), "two in their turns"),
        (active(8, u64::MAX / 2 + 1, &good), "moved for centuries"),
        (active(0, 0, &good), "without a period and not begun"),
    ];
    for (bad, what) in refused {
        assert!(load(&bad).is_none(), "{what}");
    }
}

proptest! {
    /// Any bytes are refused, or make a valid queue that saves the same bytes.
    #[test]
    fn any_bytes_are_refused_or_valid(
        bytes in proptest::collection::vec(any::<u8>(), SNAPSHOT_SIZE),
        statuses in proptest::collection::vec(0u8..7, DESCRIPTORS),
        queued in 0u8..18,
    ) {
        let mut snapshot = [0; SNAPSHOT_SIZE];
        snapshot.copy_from_slice(&bytes);
        for (index, status) in statuses.iter().enumerate() {
            let at = index * DESCRIPTOR_SIZE;
            snapshot[at + 0x30..at + 0x38].fill(0);
            snapshot[at + 0x30] = *status;
        }
        let order = DESCRIPTORS * DESCRIPTOR_SIZE;
        snapshot[order + DESCRIPTORS..order + DESCRIPTORS + 8].fill(0);
        snapshot[order + DESCRIPTORS] = queued;
        if let Some(mut queue) = load(&snapshot) {
            prop_assert_eq!(save(&queue), snapshot);
            for now in 0..64 {
                serve_one(&mut queue, now);
            }
        }
    }

    /// Each byte of each transfer is moved once, wherever the queue migrates.
    #[test]
    fn each_byte_is_moved_once(
        transfers in proptest::collection::vec((0u64..1000, 1u64..200_000), 1..DESCRIPTORS),
        migrations in proptest::collection::vec(any::<bool>(), 0..64),
    ) {
        let mut queue = Queue::POWER_ON;
        for (index, (addr, len)) in transfers.iter().enumerate() {
            Descriptor {
                iova: (index as u64) << 32,
                addr: *addr,
                len: *len,
                ..WRITE
            }
            .start(&mut queue, index);
        }
        let mut moved = vec![0; transfers.len()];
        let mut migrations = migrations.into_iter();
        while queue.is_busy() {
            if migrations.next().unwrap_or(false) {
                queue = load(&save(&queue)).expect("a good queue");
            }
            if let Next::Piece(piece) = queue.next(0, MEMORY) {
                let index = (piece.iova >> 32) as usize;
                prop_assert_eq!(piece.iova & 0xffff_ffff, moved[index]);
                prop_assert_eq!(piece.addr, transfers[index].0 + moved[index]);
                moved[index] += piece.len;
                queue.moved(&piece, piece.len, None, 0);
            }
        }
        for (index, (_, len)) in transfers.iter().enumerate() {
            prop_assert_eq!(moved[index], *len);
        }
    }
}
