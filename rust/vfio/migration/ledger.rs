// SPDX-License-Identifier: GPL-2.0

//! Tracepoints, statistics and verdict of a device.
//!
//! C header: `rust/helpers/vfio_trace.h`

use super::{
    verdict::{
        Read,
        Verdict, //
    },
    State, //
};
use crate::bindings;
use kernel::{
    new_spinlock,
    prelude::*,
    seq_file::SeqFile,
    sync::{
        Arc,
        SetOnce,
        SpinLock, //
    },
    time::{
        Instant,
        Monotonic, //
    },
};

/// Maximum length of a device name in a trace, with the terminating NUL. A UUID needs 37 bytes.
const NAME: usize = 40;

/// Calls a tracepoint with the name of the device.
macro_rules! trace {
    ($ledger:expr, $event:ident $(, $argument:expr)*) => {
        // SAFETY: All pointers are strings that live as long as the ledger, or for ever.
        unsafe { bindings::$event($ledger.name() $(, $argument)*) }
    };
}

/// Returns the value of a result in a trace.
fn errno(result: Result) -> c_int {
    result.map_or_else(Error::to_errno, |()| 0)
}

/// Returns the return value of read() or write() in a trace.
fn count(result: Result<usize>) -> i64 {
    result.map_or_else(|error| error.to_errno().into(), |count| count as i64)
}

/// The tracepoints, statistics and verdict of a device. Lives as long as the device or a data_fd.
#[pin_data]
pub(crate) struct Ledger {
    created: Instant<Monotonic>,
    /// Name of the parent.
    name: SetOnce<[u8; NAME]>,
    /// Nested inside all other locks.
    #[pin]
    verdict: SpinLock<Verdict>,
}

impl Ledger {
    pub(super) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                created: Instant::now(),
                name: SetOnce::new(),
                verdict <- new_spinlock!(Verdict::default(), "vfio::migration::Ledger::verdict"),
            }),
            GFP_KERNEL,
        )
    }

    /// Sets the name, unless it is set: before a device of the crate is registered; by the first
    /// state change for a driver with its own `struct vfio_migration_ops`.
    pub(crate) fn set_name(&self, parent: &CStr) {
        if self.name.as_ref().is_none() {
            let mut name = [0; NAME];
            for (to, from) in name[..NAME - 1].iter_mut().zip(parent.to_bytes()) {
                *to = *from;
            }
            self.name.populate(name);
        }
    }

    /// Returns the name as a C string.
    fn name(&self) -> *const c_char {
        self.name
            .as_ref()
            .map_or(c"".as_char_ptr(), |name| name.as_ptr().cast())
    }

    /// Returns the time.
    pub(super) fn now(&self) -> u64 {
        self.created.elapsed().as_nanos() as u64
    }

    /// Calls `note` with the verdict and the time. Does not sleep.
    pub(crate) fn note<R>(&self, note: impl FnOnce(&mut Verdict, u64) -> R) -> R {
        let now = self.now();
        note(&mut self.verdict.lock(), now)
    }

    /// Notes an arc that began at `start`.
    pub(super) fn arc(&self, from: State, to: State, start: Instant<Monotonic>, result: Result) {
        let ns = start.elapsed().as_nanos() as u64;
        let (from, to) = (from.name().as_char_ptr(), to.name().as_char_ptr());
        trace!(self, vfio_trace_arc, from, to, errno(result), ns);
        self.note(|verdict, _| verdict.arc(result.is_ok()));
    }

    /// Notes the end of a reset.
    pub(super) fn reset(&self, from: State, result: Result) {
        let from = from.name().as_char_ptr();
        trace!(self, vfio_trace_reset, from, errno(result));
    }

    /// Notes the start of a session. Returns its generation.
    pub(super) fn begin(&self, state: State) -> u32 {
        trace!(self, vfio_trace_session_begin, state.name().as_char_ptr());
        self.note(|verdict, now| verdict.begin(now))
    }

    /// Notes the end of a session.
    pub(super) fn end(&self, state: State) {
        trace!(self, vfio_trace_session_end, state.name().as_char_ptr());
    }

    /// Notes a read() of a data_fd into a buffer that is not empty, which began at `start`.
    pub(super) fn read(&self, generation: u32, start: u64, result: Result<usize>) {
        trace!(self, vfio_trace_read, count(result));
        let read = match result {
            Ok(0) => Read::End,
            Ok(bytes) => Read::Bytes(bytes as u64),
            Err(ENOMSG) => Read::TemporaryEnd,
            Err(EAGAIN) => Read::NotReady,
            Err(_) => return,
        };
        self.note(|verdict, now| verdict.read(now, generation, start, read));
    }

    /// Notes a write() to a data_fd.
    pub(super) fn write(&self, generation: u32, result: Result<usize>) {
        trace!(self, vfio_trace_write, count(result));
        if let Ok(bytes) = result {
            self.note(|verdict, _| verdict.write(generation, bytes as u64));
        }
    }

    /// Notes a pre-copy info, and whether the client has missed that the device began again.
    pub(super) fn precopy_info(
        &self,
        generation: u32,
        initial: u64,
        dirty: u64,
        flags: u32,
        missed: bool,
    ) {
        trace!(self, vfio_trace_precopy_info, initial, dirty, flags);
        self.note(|verdict, now| verdict.precopy_info(now, generation, initial, missed));
    }

    /// Notes `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`.
    pub(crate) fn log_start(&self, result: Result) {
        trace!(self, vfio_trace_log_start, errno(result).into());
        if result.is_ok() {
            self.note(|verdict, _| verdict.log_start());
        }
    }

    /// Notes `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
    pub(crate) fn log_report(&self, result: Result) {
        trace!(self, vfio_trace_log_report, errno(result).into());
        if result.is_ok() {
            self.note(|verdict, _| verdict.log_report());
        }
    }

    /// Notes `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`, and whether there are pages to report. If the
    /// driver has failed, the client has done its part.
    pub(crate) fn log_stop(&self, result: Result, unreported: bool) {
        trace!(self, vfio_trace_log_stop, errno(result).into());
        self.note(|verdict, _| verdict.log_end(true, unreported));
    }

    /// Returns a copy of the verdict, with all times up to now.
    fn snapshot(&self) -> Verdict {
        self.note(|verdict, now| {
            verdict.account(now);
            verdict.clone()
        })
    }

    /// Prints the verdict.
    pub(crate) fn show_verdict(&self, file: &SeqFile) {
        file.call_printf(format_args!("{}", self.snapshot()));
    }

    /// Prints the statistics.
    pub(crate) fn show_statistics(&self, file: &SeqFile) {
        file.call_printf(format_args!("{}", self.snapshot().statistics()));
    }
}
