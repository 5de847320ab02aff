// SPDX-License-Identifier: GPL-2.0

//! Pace of a saver or loader, like that of firmware with a delay and a bandwidth, and timers for
//! the client.

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
        Instant,
        Monotonic, //
    },
};
use vfio::migration::Notifier;

const SECOND: u64 = 1_000_000_000;

/// Time in nanoseconds that a late client can catch up with. A bandwidth is exact if timers and the
/// client are not later than this.
const CATCH_UP: u64 = 10_000_000;

/// A timer that wakes the tasks that wait for a data_fd once. Dropping it cancels it.
pub(crate) struct Timer {
    alarm: Arc<Alarm>,
    _handle: ArcHrTimerHandle<Alarm>,
}

impl Timer {
    /// Starts a timer that notifies `notifier` after `time`.
    pub(crate) fn new(notifier: Arc<Notifier>, time: Delta) -> Result<Self> {
        Ok(Self::start(Alarm::new(notifier)?, time))
    }

    fn start(alarm: Arc<Alarm>, time: Delta) -> Self {
        Self {
            _handle: alarm.clone().start(time),
            alarm,
        }
    }
}

/// Content of a [`Timer`].
#[pin_data]
struct Alarm {
    #[pin]
    timer: HrTimer<Self>,
    expired: AtomicFlag,
    notifier: Arc<Notifier>,
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Alarm {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}

impl HrTimerCallback for Alarm {
    type Pointer<'a> = Arc<Self>;

    fn run(this: ArcBorrow<'_, Self>, _: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        this.expire();
        HrTimerRestart::NoRestart
    }
}

impl Alarm {
    fn new(notifier: Arc<Notifier>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                timer <- HrTimer::new(),
                expired: AtomicFlag::new(false),
                notifier,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Ends the delay. Called by the timer, in interrupt context, and for a shorter delay.
    fn expire(&self) {
        self.expired.store(true, Release);
        self.notifier.notify();
    }
}

/// Settings of the pace of a device in one direction.
#[pin_data]
pub(crate) struct Pace {
    /// Delay of each part of the stream, in microseconds.
    micros: Atomic<u32>,
    /// Bandwidth in bytes per second; 0 is no limit.
    rate: Atomic<u64>,
    /// Timer of the current wait.
    #[pin]
    alarm: Mutex<Option<Arc<Alarm>>>,
}

impl Pace {
    /// Creates settings that are off.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                micros: Atomic::new(0),
                rate: Atomic::new(0),
                alarm <- new_mutex!(None, "vfio_mock::Pace::alarm"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the delay in microseconds.
    pub(crate) fn delay(&self) -> u32 {
        self.micros.load(Relaxed)
    }

    /// Returns the bandwidth.
    pub(crate) fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// Returns the time in nanoseconds that a number of bytes takes.
    fn time(&self, bytes: u64) -> u64 {
        bytes
            .saturating_mul(SECOND)
            .checked_div(self.rate())
            .unwrap_or(0)
    }

    /// Sets the delay in microseconds. A shorter one ends the current wait at once.
    pub(crate) fn set_delay(&self, micros: u32) {
        let alarm = self.alarm.lock();
        let old = self.delay();
        self.micros.store(micros, Relaxed);
        if let Some(alarm) = alarm.as_ref().filter(|_| micros < old) {
            alarm.expire();
        }
    }

    /// Sets the bandwidth. A higher one ends the current wait at once.
    pub(crate) fn set_rate(&self, rate: u64) {
        let alarm = self.alarm.lock();
        let old = self.rate();
        self.rate.store(rate, Relaxed);
        // 0 is no limit.
        let is_higher = old != 0 && (rate == 0 || rate > old);
        if let Some(alarm) = alarm.as_ref().filter(|_| is_higher) {
            alarm.expire();
        }
    }
}

/// Waits of a saver before each record, or of a loader before each write.
///
/// They start when the previous part is taken. So each part is announced once, and after poll() has
/// reported it read() or write() does not wait.
pub(crate) struct Waits {
    pace: Arc<Pace>,
    notifier: Arc<Notifier>,
    epoch: Instant<Monotonic>,
    /// Time in nanoseconds at which a link of this bandwidth has transferred the bytes so
    /// far.
    through: u64,
    timer: Option<Timer>,
    /// For the next timer.
    spare: Option<Arc<Alarm>>,
}

impl Waits {
    /// Starts the delay of the first part. `notifier` is notified at its end.
    pub(crate) fn new(pace: Arc<Pace>, notifier: Arc<Notifier>) -> Result<Self> {
        let mut this = Self {
            pace,
            notifier,
            epoch: Instant::now(),
            through: 0,
            timer: None,
            spare: None,
        };
        this.prepare()?;
        this.begin(0);
        Ok(this)
    }

    /// Returns whether the next part is ready.
    pub(crate) fn is_over(&self) -> bool {
        match &self.timer {
            Some(timer) => timer.alarm.expired.load(Acquire),
            None => true,
        }
    }

    /// Cancels the wait, because there is nothing to wait for. The next part is ready as soon as it
    /// exists. May sleep until the timer's callback has returned.
    pub(crate) fn skip(&mut self) {
        let Some(timer) = self.timer.take() else {
            return;
        };
        // Keep the timer of a later session.
        let mut current = self.pace.alarm.lock();
        current.take_if(|current| Arc::ptr_eq(current, &timer.alarm));
        drop(current);
        drop(timer);
    }

    /// Allocates what [`begin()`](Self::begin) needs, which cannot fail then. May sleep.
    pub(crate) fn prepare(&mut self) -> Result {
        if self.spare.is_none() && (self.pace.delay() > 0 || self.pace.rate() > 0) {
            self.spare = Some(Alarm::new(self.notifier.clone())?);
        }
        Ok(())
    }

    /// Starts the wait for the next part, after one of `bytes` bytes. May sleep.
    pub(crate) fn begin(&mut self, bytes: u64) {
        self.skip();
        let mut current = self.pace.alarm.lock();
        let now = self.epoch.elapsed().as_nanos() as u64;
        // It is not in the future, unless a wait was ended before its time.
        let start = self.through.clamp(now.saturating_sub(CATCH_UP), now);
        self.through = start.saturating_add(self.pace.time(bytes));
        let wait = (u64::from(self.pace.delay()) * 1000).max(self.through.saturating_sub(now));
        // Without a spare timer, the pace was off a moment ago.
        let Some(alarm) = self.spare.take_if(|_| wait > 0) else {
            return;
        };
        *current = Some(alarm.clone());
        let time = Delta::from_nanos(i64::try_from(wait).unwrap_or(i64::MAX));
        self.timer = Some(Timer::start(alarm, time));
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.skip();
    }
}
