// SPDX-License-Identifier: GPL-2.0

//! Delay of a saver, like that of firmware which prepares each record, and timers for readers.

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
use vfio::migration::Notifier;

/// A timer that wakes the readers of a data_fd once. Dropping it cancels it.
pub(crate) struct Timer {
    alarm: Arc<Alarm>,
    _handle: ArcHrTimerHandle<Alarm>,
}

impl Timer {
    /// Starts a timer that notifies `notifier` after `time`.
    pub(crate) fn new(notifier: Arc<Notifier>, time: Delta) -> Result<Self> {
        let alarm = Arc::pin_init(
            pin_init!(Alarm {
                timer <- HrTimer::new(),
                expired: AtomicFlag::new(false),
                notifier,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        Ok(Self {
            _handle: alarm.clone().start(time),
            alarm,
        })
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
    /// Ends the delay. Called by the timer, in interrupt context, and for a shorter delay.
    fn expire(&self) {
        self.expired.store(true, Release);
        self.notifier.notify();
    }
}

/// Sysfs setting `save_delay_us` of a device: the delay of each record.
#[pin_data]
pub(crate) struct SaveDelay {
    micros: Atomic<u32>,
    /// Timer of the current delay.
    #[pin]
    alarm: Mutex<Option<Arc<Alarm>>>,
}

impl SaveDelay {
    /// Creates the setting, with no delay.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                micros: Atomic::new(0),
                alarm <- new_mutex!(None, "vfio_mock::SaveDelay::alarm"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the delay in microseconds.
    pub(crate) fn get(&self) -> u32 {
        self.micros.load(Relaxed)
    }

    /// Sets the delay in microseconds. A shorter one ends the current delay at once.
    pub(crate) fn set(&self, micros: u32) {
        let alarm = self.alarm.lock();
        let old = self.get();
        self.micros.store(micros, Relaxed);
        if let Some(alarm) = alarm.as_ref().filter(|_| micros < old) {
            alarm.expire();
        }
    }
}

/// Delay of a saver before each record.
///
/// It starts when the previous record is taken. So each record is announced once, and after poll()
/// has reported a record read() does not wait.
pub(crate) struct Delay {
    setting: Arc<SaveDelay>,
    notifier: Arc<Notifier>,
    timer: Option<Timer>,
}

impl Delay {
    /// Starts the delay of the first record. `notifier` is notified at its end.
    pub(crate) fn new(setting: Arc<SaveDelay>, notifier: Arc<Notifier>) -> Result<Self> {
        let mut this = Self {
            setting,
            notifier,
            timer: None,
        };
        this.begin()?;
        Ok(this)
    }

    /// Returns whether the next record is ready.
    pub(crate) fn is_over(&self) -> bool {
        match &self.timer {
            Some(timer) => timer.alarm.expired.load(Acquire),
            None => true,
        }
    }

    /// Cancels the delay, because there is no record to delay. The next record is ready as soon as
    /// it exists. May sleep until the timer's callback has returned.
    pub(crate) fn skip(&mut self) {
        let Some(timer) = self.timer.take() else {
            return;
        };
        // Keep the timer of a later saver.
        let mut current = self.setting.alarm.lock();
        current.take_if(|current| Arc::ptr_eq(current, &timer.alarm));
        drop(current);
        drop(timer);
    }

    /// Starts the delay of the next record.
    pub(crate) fn begin(&mut self) -> Result {
        self.skip();
        let mut current = self.setting.alarm.lock();
        let micros = self.setting.get();
        if micros == 0 {
            return Ok(());
        }
        let timer = Timer::new(self.notifier.clone(), Delta::from_micros(i64::from(micros)))?;
        *current = Some(timer.alarm.clone());
        self.timer = Some(timer);
        Ok(())
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.skip();
    }
}
