// SPDX-License-Identifier: GPL-2.0

//! A saver that is not ready at once, as with firmware that needs time.

use kernel::{
    impl_has_hr_timer,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            AtomicFlag,
            Release, //
        },
        Arc,
        ArcBorrow, //
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
        this.over.store(true, Release);
        this.notifier.notify();
        HrTimerRestart::NoRestart
    }
}

/// The time that the device takes to get a record ready.
pub(crate) struct Delay {
    notifier: Arc<Notifier>,
    /// What is waited for, and by which it is ended.
    alarm: Option<(Arc<Alarm>, ArcHrTimerHandle<Alarm>)>,
}

impl Delay {
    /// Makes a delay that tells `notifier` when it is over.
    pub(crate) fn new(notifier: Arc<Notifier>) -> Self {
        Self {
            notifier,
            alarm: None,
        }
    }

    /// Tells whether nothing is waited for.
    pub(crate) fn is_over(&self) -> bool {
        match &self.alarm {
            Some((alarm, _)) => alarm.over.load(Acquire),
            None => true,
        }
    }

    /// Tells whether `micros` microseconds have passed since this was first asked for a record, and
    /// begins anew after that.
    pub(crate) fn pass(&mut self, micros: u32) -> Result<bool> {
        if self.alarm.is_none() && micros > 0 {
            let notifier = self.notifier.clone();
            let alarm = Arc::pin_init(
                pin_init!(Alarm {
                    timer <- HrTimer::new(),
                    over: AtomicFlag::new(false),
                    notifier,
                }),
                GFP_KERNEL_ACCOUNT,
            )?;
            let handle = alarm.clone().start(Delta::from_micros(i64::from(micros)));
            self.alarm = Some((alarm, handle));
        }
        let over = self.is_over();
        if over {
            self.alarm = None;
        }
        Ok(over)
    }
}
