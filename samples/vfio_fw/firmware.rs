// SPDX-License-Identifier: GPL-2.0

//! A simulated device with firmware. It depends on VFIO only for the handler of its interrupt, and
//! for the flags of allocations.
//!
//! The device has [`SIZE`] bytes of memory. Only the firmware can save and load its state, in
//! images with a format of its own. A command takes time and ends with an interrupt, may be
//! refused, and may never end. The host selects these faults, see [`Faults`].

use kernel::{
    impl_has_hr_timer, new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            AtomicFlag,
            Relaxed,
            Release, //
        },
        Arc,
        ArcBorrow,
        Mutex, //
    },
    time::{
        hrtimer::{
            ArcHrTimerHandle,
            HrTimer,
            HrTimerCallback,
            HrTimerCallbackContext,
            HrTimerPointer,
            HrTimerRestart,
            RelativeMode, //
        },
        Delta,
        Monotonic, //
    },
};
use vfio::{
    memory::GFP_MAYFAIL,
    migration::Notifier, //
};

/// The size of the device's memory in bytes.
pub(crate) const SIZE: usize = BLOCKS * BLOCK;

/// The firmware records changes in units of such a block.
const BLOCK: usize = 1 << 10;
const BLOCKS: usize = u64::BITS as usize;

/// An image has a magic number, the changed blocks after their numbers, and a checksum.
const MAGIC: u64 = u64::from_be_bytes(*b"FIRMWARE");
const NUMBERED_BLOCK: usize = size_of::<u64>() + BLOCK;

/// The size of the largest image in bytes.
pub(crate) const MAX_IMAGE: usize = image_size(u64::MAX);

/// Returns the size of an image of the blocks that are set in `changed`, zero if there are none.
const fn image_size(changed: u64) -> usize {
    match changed.count_ones() as usize {
        0 => 0,
        count => 2 * size_of::<u64>() + count * NUMBERED_BLOCK,
    }
}

/// Returns the checksum of an image.
fn checksum(image: &[u8]) -> u64 {
    image.iter().fold(MAGIC, |sum, byte| {
        sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte)
    })
}

/// Maximum of a time that the host sets, in milliseconds.
const MAX_MS: u64 = 3_600_000;

/// Delays and failures of the firmware, which the host selects.
pub(crate) struct Faults {
    delay_ms: Atomic<u64>,
    timeout_ms: Atomic<u64>,
    refused: Atomic<u64>,
    hanging: Atomic<u64>,
}

impl Faults {
    /// All commands, one bit each.
    const ALL: u64 = Kind::Query as u64
        | Kind::Suspend as u64
        | Kind::Resume as u64
        | Kind::Save as u64
        | Kind::Load as u64;

    /// Returns the settings at the creation of a device: no delay and no failures.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                delay_ms: Atomic::new(0),
                timeout_ms: Atomic::new(2_000),
                refused: Atomic::new(0),
                hanging: Atomic::new(0),
            },
            GFP_KERNEL,
        )?)
    }

    /// Returns the time in milliseconds that each command takes.
    pub(crate) fn delay_ms(&self) -> u64 {
        self.delay_ms.load(Relaxed)
    }

    /// Sets the delay. Fails with `EINVAL` if it is more than an hour.
    pub(crate) fn set_delay_ms(&self, delay: u64) -> Result {
        Self::set(&self.delay_ms, delay, delay <= MAX_MS)
    }

    /// Returns the time in milliseconds after which the mailbox gives up on a command.
    pub(crate) fn timeout_ms(&self) -> u64 {
        self.timeout_ms.load(Relaxed)
    }

    /// Sets this time. Fails with `EINVAL` if it is more than an hour.
    pub(crate) fn set_timeout_ms(&self, timeout: u64) -> Result {
        Self::set(&self.timeout_ms, timeout, timeout <= MAX_MS)
    }

    /// Returns the commands that the firmware refuses, one bit each.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Sets the commands to refuse. Fails with `EINVAL` if a command does not exist.
    pub(crate) fn set_refused(&self, commands: u64) -> Result {
        Self::set(&self.refused, commands, commands & !Self::ALL == 0)
    }

    /// Returns the commands that never end, one bit each.
    pub(crate) fn hanging(&self) -> u64 {
        self.hanging.load(Relaxed)
    }

    /// Sets the commands that never end. Fails with `EINVAL` if there is no such command.
    pub(crate) fn set_hanging(&self, commands: u64) -> Result {
        Self::set(&self.hanging, commands, commands & !Self::ALL == 0)
    }

    fn set(to: &Atomic<u64>, value: u64, is_valid: bool) -> Result {
        if !is_valid {
            return Err(EINVAL);
        }
        to.store(value, Relaxed);
        Ok(())
    }
}

/// The commands, with their bits in [`Faults`].
#[derive(Clone, Copy)]
enum Kind {
    Query = 1,
    Suspend = 2,
    Resume = 4,
    Save = 8,
    Load = 16,
}

/// A part of the device that can be suspended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// The part that accesses other devices. It is suspended first and resumed last.
    Initiator,
    /// The rest. While it is suspended, writes to the device are lost.
    Responder,
}

/// The content of an image.
#[derive(Clone, Copy)]
pub(crate) enum Content {
    /// The whole state.
    All,
    /// The changes since the last image, or since [`Firmware::track()`].
    Changes,
}

/// The parts of the device that run.
#[derive(PartialEq, Eq)]
enum Power {
    Running,
    InitiatorSuspended,
    Suspended,
}

/// The state of the device.
struct State {
    memory: KVVec<u8>,
    /// A bit for each block that has changed since the last image.
    changed: u64,
    power: Power,
    /// The handler of the interrupt for changes.
    on_change: Option<Arc<Notifier>>,
}

impl State {
    /// Makes an image of the changes.
    fn save(&mut self) -> Result<KVVec<u8>> {
        let mut image = KVVec::with_capacity(image_size(self.changed), GFP_MAYFAIL)?;
        image.extend_from_slice(&MAGIC.to_le_bytes(), GFP_MAYFAIL)?;
        for (number, block) in self.memory.chunks_exact(BLOCK).enumerate() {
            if self.changed >> number & 1 != 0 {
                image.extend_from_slice(&(number as u64).to_le_bytes(), GFP_MAYFAIL)?;
                image.extend_from_slice(block, GFP_MAYFAIL)?;
            }
        }
        let sum = checksum(&image);
        image.extend_from_slice(&sum.to_le_bytes(), GFP_MAYFAIL)?;
        self.changed = 0;
        Ok(image)
    }

    /// Loads an image. Fails with `EINVAL` if it is damaged.
    fn load(&mut self, image: &[u8]) -> Result {
        let (image, sum) = image.split_last_chunk().ok_or(EINVAL)?;
        let (magic, blocks) = image.split_first_chunk().ok_or(EINVAL)?;
        if u64::from_le_bytes(*sum) != checksum(image)
            || u64::from_le_bytes(*magic) != MAGIC
            || blocks.len() % NUMBERED_BLOCK != 0
        {
            return Err(EINVAL);
        }
        for block in blocks.chunks_exact(NUMBERED_BLOCK) {
            let (number, block) = block.split_first_chunk().ok_or(EINVAL)?;
            let number = usize::try_from(u64::from_le_bytes(*number))?;
            let to = self.memory.chunks_exact_mut(BLOCK).nth(number);
            to.ok_or(EINVAL)?.copy_from_slice(block);
        }
        Ok(())
    }
}

/// The device: its memory, and the mailbox of its firmware.
///
/// The answers to commands that end at the same time are independent.
#[pin_data]
pub(crate) struct Firmware {
    faults: Arc<Faults>,
    #[pin]
    state: Mutex<State>,
}

impl Firmware {
    /// Returns a device in its state at power on.
    pub(crate) fn new(faults: Arc<Faults>) -> Result<Arc<Self>> {
        let memory = KVVec::zeroed(SIZE, GFP_MAYFAIL)?;
        Arc::pin_init(
            pin_init!(Self {
                faults,
                state <- new_mutex!(State {
                    memory,
                    changed: u64::MAX,
                    power: Power::Running,
                    on_change: None,
                }, "vfio_fw::Firmware::state"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Reads from the memory. The range is inside of it.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        let state = self.state.lock();
        let from = state.memory.get(offset..offset + to.len());
        to.copy_from_slice(from.ok_or(EINVAL)?);
        Ok(())
    }

    /// Writes to the memory. The range is inside of it. A suspended device ignores this.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result {
        let mut state = self.state.lock();
        if state.power == Power::Suspended {
            return Ok(());
        }
        let to = state.memory.get_mut(offset..offset + from.len());
        to.ok_or(EINVAL)?.copy_from_slice(from);
        let was_unchanged = state.changed == 0;
        for block in offset / BLOCK..(offset + from.len()).div_ceil(BLOCK) {
            state.changed |= 1 << block;
        }
        let handler = state.on_change.clone().filter(|_| was_unchanged);
        drop(state);
        if let Some(handler) = handler {
            handler.notify();
        }
        Ok(())
    }

    /// Makes the next image complete, and sets the handler of the interrupt for the first change
    /// after each image.
    pub(crate) fn track(&self, on_change: Arc<Notifier>) {
        let mut state = self.state.lock();
        state.changed = u64::MAX;
        let old = state.on_change.replace(on_change);
        drop(state);
        drop(old);
    }

    /// Ends the interrupts for changes.
    pub(crate) fn untrack(&self) {
        let old = self.state.lock().on_change.take();
        drop(old);
    }

    /// Returns a time in which every command ends, because the mailbox gives up.
    pub(crate) fn longest(&self) -> Delta {
        Delta::from_millis(self.faults.timeout_ms() as i64) + Delta::from_secs(1)
    }

    /// Returns whether anything has changed since the last image. A register of the device.
    pub(crate) fn has_changed(&self) -> bool {
        self.state.lock().changed != 0
    }

    /// Resets the device to its state at power on.
    pub(crate) fn reset(&self) {
        let mut state = self.state.lock();
        state.memory.fill(0);
        state.changed = u64::MAX;
        state.power = Power::Running;
    }

    /// Posts QUERY, which returns the size of an image.
    pub(crate) fn query(&self, content: Content) -> Result<Command<usize>> {
        self.post(Kind::Query, None, |state| {
            Ok(image_size(match content {
                Content::All => u64::MAX,
                Content::Changes => state.changed,
            }))
        })
    }

    /// Posts SUSPEND, which is refused if the other unit is not in the right state.
    pub(crate) fn suspend(&self, unit: Unit) -> Result<Command<()>> {
        self.post(Kind::Suspend, None, |state| {
            state.power = match (&state.power, unit) {
                (Power::Running, Unit::Initiator) => Power::InitiatorSuspended,
                (Power::InitiatorSuspended, Unit::Responder) => Power::Suspended,
                _ => return Err(EIO),
            };
            Ok(())
        })
    }

    /// Posts RESUME; see [`suspend()`](Self::suspend).
    pub(crate) fn resume(&self, unit: Unit) -> Result<Command<()>> {
        self.post(Kind::Resume, None, |state| {
            state.power = match (&state.power, unit) {
                (Power::Suspended, Unit::Responder) => Power::InitiatorSuspended,
                (Power::InitiatorSuspended, Unit::Initiator) => Power::Running,
                _ => return Err(EIO),
            };
            Ok(())
        })
    }

    /// Posts SAVE, which makes an image of the changes. The last image of a device is refused
    /// unless the device is suspended. `on_end` handles the interrupt at the end of the command.
    pub(crate) fn save(
        &self,
        is_last: bool,
        on_end: Option<Arc<Notifier>>,
    ) -> Result<Command<KVVec<u8>>> {
        self.post(Kind::Save, on_end, |state| {
            if is_last && state.power != Power::Suspended {
                return Err(EIO);
            }
            state.save()
        })
    }

    /// Posts LOAD, which fails with `EINVAL` if the image is damaged, and is refused unless the
    /// device is suspended.
    pub(crate) fn load(&self, image: &[u8], on_end: Option<Arc<Notifier>>) -> Result<Command<()>> {
        self.post(Kind::Load, on_end, |state| {
            if state.power != Power::Suspended {
                return Err(EIO);
            }
            state.load(image)
        })
    }

    /// Posts a command. Executes it here, but reports its end only when the timer expires.
    fn post<T>(
        &self,
        kind: Kind,
        on_end: Option<Arc<Notifier>>,
        execute: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<Command<T>> {
        let delay = self.faults.delay_ms();
        let timeout = self.faults.timeout_ms();
        let times_out = delay > timeout || self.faults.hanging() & kind as u64 != 0;
        let time = if times_out { timeout } else { delay };
        let alarm = Arc::pin_init(
            pin_init!(Alarm {
                timer <- HrTimer::new(),
                has_ended: AtomicFlag::new(time == 0),
                on_end,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        // Nothing fails after this: the answer to SAVE has the only record of the changes.
        let answer = if self.faults.refused() & kind as u64 != 0 {
            Err(EIO)
        } else {
            execute(&mut self.state.lock())
        };
        let timer = (time > 0).then(|| alarm.clone().start(Delta::from_millis(time as i64)));
        Ok(Command {
            alarm,
            _timer: timer,
            times_out,
            answer,
        })
    }
}

/// A command that was posted. Its answer is lost if this is dropped.
pub(crate) struct Command<T> {
    alarm: Arc<Alarm>,
    /// Cancels the timer when dropped.
    _timer: Option<ArcHrTimerHandle<Alarm>>,
    /// The mailbox gives up on it.
    times_out: bool,
    answer: Result<T>,
}

impl<T> Command<T> {
    /// Returns whether the command has ended. Does not sleep.
    pub(crate) fn has_ended(&self) -> bool {
        self.alarm.has_ended.load(Acquire)
    }

    /// Returns the answer to a command that has ended. It is `EIO` if the firmware has refused the
    /// command, and `ETIMEDOUT` if the mailbox has given up.
    pub(crate) fn answer(self) -> Result<T> {
        match self.times_out {
            true => Err(ETIMEDOUT),
            false => self.answer,
        }
    }
}

impl Command<KVVec<u8>> {
    /// Returns the size of the image, which the firmware announces at the start.
    pub(crate) fn image_size(&self) -> usize {
        self.answer.as_ref().map_or(0, KVVec::len)
    }
}

/// Ends a command after its time.
#[pin_data]
struct Alarm {
    #[pin]
    timer: HrTimer<Self>,
    has_ended: AtomicFlag,
    /// The handler of the interrupt.
    on_end: Option<Arc<Notifier>>,
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Alarm {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}

impl HrTimerCallback for Alarm {
    type Pointer<'a> = Arc<Self>;

    /// Raises the interrupt. This is hard interrupt context.
    fn run(this: ArcBorrow<'_, Self>, _: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        this.has_ended.store(true, Release);
        if let Some(on_end) = &this.on_end {
            on_end.notify();
        }
        HrTimerRestart::NoRestart
    }
}
