// SPDX-License-Identifier: GPL-2.0

//! A saver that is not ready at once, as with firmware that needs time.

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

/// A time that passes once.
#[pin_data]
struct Alarm {
    #[pin]
    timer: HrTimer<Self>,
    over: AtomicFlag,
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
        this.ring();
        HrTimerRestart::NoRestart
    }
}

impl Alarm {
    /// Ends the time.
    fn ring(&self) {
        self.over.store(true, Release);
        self.notifier.notify();
    }
}

/// How long a device takes to get each record of its state ready, as its host says.
#[pin_data]
pub(crate) struct SaveDelay {
    micros: Atomic<u32>,
    /// The wait under way.
    #[pin]
    alarm: Mutex<Option<Arc<Alarm>>>,
}

impl SaveDelay {
    /// Makes one of no time.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                micros: Atomic::new(0),
                alarm <- new_mutex!(None, "vfio_mock::delay::SaveDelay::alarm"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns it in microseconds.
    pub(crate) fn get(&self) -> u32 {
        self.micros.load(Relaxed)
    }

    /// Sets it. A wait under way ends at once if it becomes shorter.
    pub(crate) fn set(&self, micros: u32) {
        let alarm = self.alarm.lock();
        let old = self.get();
        self.micros.store(micros, Relaxed);
        if let Some(alarm) = alarm.as_ref().filter(|_| micros < old) {
            alarm.ring();
        }
    }
}

/// The time that a saver takes to get a record ready.
///
/// It begins when the record before it was taken, so that each record is announced once, and a
/// poll() that finds the saver ready is followed by a read() that does not wait.
pub(crate) struct Delay {
    setting: Arc<SaveDelay>,
    notifier: Arc<Notifier>,
    /// What is waited for, and by which it is ended.
    alarm: Option<(Arc<Alarm>, ArcHrTimerHandle<Alarm>)>,
}

impl Delay {
    /// Begins to get the first record ready, and tells `notifier` when it is.
    pub(crate) fn new(setting: Arc<SaveDelay>, notifier: Arc<Notifier>) -> Result<Self> {
        let mut this = Self {
            setting,
            notifier,
            alarm: None,
        };
        this.begin()?;
        Ok(this)
    }

    /// Tells whether the next record is ready.
    pub(crate) fn is_over(&self) -> bool {
        match &self.alarm {
            Some((alarm, _)) => alarm.over.load(Acquire),
            None => true,
        }
    }

    /// Begins to get the next record ready.
    pub(crate) fn begin(&mut self) -> Result {
        self.alarm = None;
        let mut current = self.setting.alarm.lock();
        *current = None;
        let micros = self.setting.get();
        if micros == 0 {
            return Ok(());
        }
        let notifier = self.notifier.clone();
        let alarm = Arc::pin_init(
            pin_init!(Alarm {
                timer <- HrTimer::new(),
                over: AtomicFlag::new(false),
                notifier,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        *current = Some(alarm.clone());
        let handle = alarm.clone().start(Delta::from_micros(i64::from(micros)));
        self.alarm = Some((alarm, handle));
        Ok(())
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        let Some((alarm, _)) = &self.alarm else {
            return;
        };
        // Another saver may have begun.
        let mut current = self.setting.alarm.lock();
        current.take_if(|current| Arc::ptr_eq(current, alarm));
    }
}
