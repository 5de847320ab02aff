// SPDX-License-Identifier: GPL-2.0

//! Statistics of the client of a device, and the rules that it broke.
//!
//! This file uses `core` alone, so that the same source runs in the kernel and in host tests.
//!
//! A [`Verdict`] is about one client, from the first open of a device to the next first open. All
//! times are in nanoseconds and come from the caller. It judges only events that the driver sees,
//! and in doubt it is in favour of the client.
//!
//! C header: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

use super::fsm::State;
use core::fmt;

/// A rule or recommendation for a client, with the closest sentence of the uAPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `STOP_COPY` was left before read() returned 0, and the device did not run again before it
    /// was closed or began to load.
    StreamAbandoned,
    /// The client tried to leave `RESUMING` with an incomplete image.
    ImageIncomplete,
    /// A data_fd was open when the next session began, or when the device was closed.
    DataFdLeaked,
    /// A BAR was written while the device was stopped, by write() or by mmap(). Such writes are
    /// dropped.
    StoppedDeviceWritten,
    /// write() to a BAR in a P2P state.
    QuiescedDeviceWritten,
    /// The DMA log ended with pages that were never reported, after `STOP_COPY`.
    LogNotReported,
    /// The DMA log was on when the device was closed.
    LogNotStopped,
    /// `STOP_COPY` began although the last pre-copy info said that initial bytes were left.
    InitialBytesIgnored,
    /// The client spent a considerable part of its time in calls of read() that failed with
    /// `ENOMSG` or `EAGAIN`, without poll() and without a look at the pre-copy info.
    BusyPolling,
    /// The client read the pre-copy info after the device had begun again, without v2 of the info,
    /// which would show that.
    ReinitNotSeen,
    /// The client reset the device in `STOP_COPY` before read() returned 0, and not because a state
    /// change had failed.
    ResetInSession,
    /// The device wrote to memory of the user in pre-copy while the log was off, and nothing else
    /// tracks these writes.
    LogNotStarted,
}

impl Rule {
    /// All rules.
    pub const ALL: [Self; 12] = [
        Self::StreamAbandoned,
        Self::ImageIncomplete,
        Self::DataFdLeaked,
        Self::StoppedDeviceWritten,
        Self::QuiescedDeviceWritten,
        Self::LogNotReported,
        Self::LogNotStopped,
        Self::InitialBytesIgnored,
        Self::BusyPolling,
        Self::ReinitNotSeen,
        Self::ResetInSession,
        Self::LogNotStarted,
    ];

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StreamAbandoned => "stream_abandoned",
            Self::ImageIncomplete => "image_incomplete",
            Self::DataFdLeaked => "data_fd_leaked",
            Self::StoppedDeviceWritten => "stopped_device_written",
            Self::QuiescedDeviceWritten => "quiesced_device_written",
            Self::LogNotReported => "log_not_reported",
            Self::LogNotStopped => "log_not_stopped",
            Self::InitialBytesIgnored => "initial_bytes_ignored",
            Self::BusyPolling => "busy_polling",
            Self::ReinitNotSeen => "reinit_not_seen",
            Self::ResetInSession => "reset_in_session",
            Self::LogNotStarted => "log_not_started",
        }
    }

    /// Returns whether the rule is a recommendation. A client that does not follow it does not
    /// violate the uAPI.
    pub const fn is_advice(self) -> bool {
        matches!(
            self,
            Self::InitialBytesIgnored
                | Self::BusyPolling
                | Self::ReinitNotSeen
                | Self::ResetInSession
                | Self::LogNotStarted
        )
    }

    /// Returns the sentence of the uAPI that is closest to the rule.
    pub const fn text(self) -> &'static str {
        match self {
            Self::StreamAbandoned => {
                "End of stream on the FD indicates the entire device state has been transferred."
            }
            Self::ImageIncomplete => "To abort a RESUMING session the device must be reset.",
            Self::InitialBytesIgnored => {
                "It is recommended to leave PRE_COPY for STOP_COPY only after this field reaches \
                 zero."
            }
            Self::BusyPolling => {
                "Userspace can wait for more data (which may never come) by using poll."
            }
            Self::ReinitNotSeen => {
                "VFIO_PRECOPY_INFO_REINIT can be reported only after userspace opts in to \
                 VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2."
            }
            Self::ResetInSession => "The STOP_COPY arc will terminate a data transfer session.",
            Self::DataFdLeaked => "The user is responsible to close this FD when it is finished.",
            Self::StoppedDeviceWritten => {
                "The user should take steps to restrict access to vfio device regions while the \
                 device is in STOP_COPY or risk corruption of the device migration data stream."
            }
            Self::QuiescedDeviceWritten => {
                "Like while in STOP or STOP_COPY the user must not touch the device, otherwise the \
                 state can be exited."
            }
            Self::LogNotStarted => {
                "It is part of the VFIO migration infrastructure that allows implementing dirty \
                 page tracking during the pre copy phase of live migration."
            }
            Self::LogNotReported => {
                "DMA logging allows a device to internally record what DMAs the device is \
                 initiating and report them back to userspace."
            }
            Self::LogNotStopped => {
                "A single call to start device DMA logging can be issued and a matching stop \
                 should follow at the end."
            }
        }
    }
}

/// The violations of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broken {
    /// Number of violations.
    pub count: u64,
    /// State of the device at the first violation.
    pub state: Option<State>,
    /// Time of the first violation, since the device was opened.
    pub time: u64,
}

/// Number of fruitless reads in a row after which they are judged.
pub const FRUITLESS: u32 = 64;

/// They are busy polling if they took at least this part of the time in which they were made.
///
/// The limit is relative because a client may have other work between two reads, such as the
/// guest's memory and other devices. This work takes longer than many reads, on a machine of any
/// speed.
pub const SHARE: u64 = 16;

/// Numbers of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Number of sessions.
    pub sessions: u64,
    /// Number of resets.
    pub resets: u64,
    /// Number of successful calls of read(), including those that returned 0.
    pub reads: u64,
    /// Number of bytes read.
    pub read_bytes: u64,
    /// Number of bytes of the largest read().
    pub largest_read: u64,
    /// Number of calls of read() that failed with `ENOMSG`.
    pub enomsg: u64,
    /// Number of calls of read() that failed with `EAGAIN`.
    pub eagain: u64,
    /// Number of successful calls of write().
    pub writes: u64,
    /// Number of bytes written.
    pub written_bytes: u64,
    /// Number of calls of poll() on a data_fd for reading, and of wake-ups in them.
    pub polls: u64,
    /// Number of successful calls of `VFIO_MIG_GET_PRECOPY_INFO`.
    pub precopy_infos: u64,
    /// Number of writes to BARs that were dropped because the device was stopped.
    pub dropped_writes: u64,
    /// Number of pages with stores by mappings that were dropped for the same reason.
    pub dropped_stores: u64,
    /// Number of successful reports of the DMA log.
    pub log_reports: u64,
    /// Time in each state.
    pub times: [u64; State::ALL.len()],
}

/// Result of a call of read().
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// A number of bytes.
    Bytes(u64),
    /// 0: the permanent end of stream.
    End,
    /// `ENOMSG`.
    TemporaryEnd,
    /// `EAGAIN`.
    NotReady,
}

/// Record of the client of a device.
#[derive(Clone, Debug)]
pub struct Verdict {
    broken: [Broken; Rule::ALL.len()],
    statistics: Statistics,
    open: bool,
    opened: u64,
    state: State,
    /// When the state began, or was last added to the statistics.
    since: u64,
    /// Number of sessions so far, of all clients.
    generation: u32,
    /// The data_fd of this generation is open.
    file: bool,
    /// read() has returned the permanent end of stream in this session.
    ended: bool,
    /// `STOP_COPY` was left before the end of stream, and the device has not run since.
    abandoned: bool,
    /// The last arc has failed.
    failed: bool,
    /// The DMA log is on.
    log: bool,
    /// `STOP_COPY` was entered since the DMA log was turned on, and the device has not run since.
    saved: bool,
    /// The DMA log was turned off with pages that were not reported, and the device has not run
    /// since.
    unreported: bool,
    /// The device wrote to memory in this session, in pre-copy, and no log has it.
    unlogged: bool,
    /// Number of pages with dropped stores since the device was reset.
    stores: u64,
    /// Initial bytes that are left according to the last pre-copy info of the session.
    initial: u64,
    /// Number of fruitless reads in a row, the time when they began, and the time in them.
    fruitless: u32,
    fruitless_since: u64,
    fruitless_for: u64,
}

impl Default for Verdict {
    /// Creates the verdict on a device that was never opened.
    fn default() -> Self {
        Self {
            broken: Default::default(),
            statistics: Default::default(),
            open: false,
            opened: 0,
            state: State::Running,
            since: 0,
            generation: 0,
            file: false,
            ended: false,
            abandoned: false,
            failed: false,
            log: false,
            saved: false,
            unreported: false,
            unlogged: false,
            stores: 0,
            initial: 0,
            fruitless: 0,
            fruitless_since: 0,
            fruitless_for: 0,
        }
    }
}

impl Verdict {
    /// Returns the violations of a rule.
    pub fn broken(&self, rule: Rule) -> Broken {
        self.broken[rule as usize]
    }

    /// Returns the numbers so far.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    fn breaks(&mut self, now: u64, rule: Rule) {
        let broken = &mut self.broken[rule as usize];
        if broken.count == 0 {
            broken.state = Some(self.state);
            broken.time = now.saturating_sub(self.opened);
        }
        broken.count += 1;
    }

    /// Adds the time in the current state to the statistics.
    pub fn account(&mut self, now: u64) {
        if self.open {
            self.statistics.times[self.state as usize] += now.saturating_sub(self.since);
        }
        self.since = now;
    }

    /// Clears the record for a new client. Called by the first open.
    pub fn open(&mut self, now: u64) {
        *self = Self {
            open: true,
            opened: now,
            since: now,
            generation: self.generation,
            ..Self::default()
        };
    }

    /// Completes the record of a client. Called by the last close, before the session ends.
    pub fn close(&mut self, now: u64) {
        if self.unreported {
            self.breaks(now, Rule::LogNotReported);
        }
        if self.log {
            self.breaks(now, Rule::LogNotStopped);
        }
        if self.abandoned || (self.state == State::StopCopy && !self.ended) {
            self.breaks(now, Rule::StreamAbandoned);
        }
        self.abandoned = false;
        self.check_file(now);
        self.account(now);
        self.open = false;
    }

    /// Notes that the device is being reset, and whether the client has requested it. Called before
    /// the session ends.
    pub fn reset(&mut self, now: u64, by_client: bool) {
        self.statistics.resets += 1;
        // Before `STOP_COPY`, the guest may have requested the reset.
        if by_client && self.state == State::StopCopy && !self.ended && !self.failed {
            self.breaks(now, Rule::ResetInSession);
        }
        self.failed = false;
    }

    /// Notes the result of an arc.
    pub fn arc(&mut self, is_done: bool) {
        self.failed = !is_done;
    }

    /// Notes the state, which may be unchanged.
    pub fn enter(&mut self, now: u64, to: State) {
        match (self.state, to) {
            (State::PreCopy | State::PreCopyP2p, State::StopCopy) if self.initial > 0 => {
                self.breaks(now, Rule::InitialBytesIgnored);
            }
            (State::StopCopy, State::Stop) => self.abandoned = !self.ended,
            // The state is streamed again.
            (State::Stop, State::StopCopy) => self.abandoned = false,
            // The migration was cancelled.
            (_, to) if to.runs() => {
                self.abandoned = false;
                self.saved = false;
                self.unreported = false;
            }
            (State::Stop, State::Resuming) if self.abandoned => {
                self.breaks(now, Rule::StreamAbandoned);
                self.abandoned = false;
            }
            _ => (),
        }
        if self.state.is_pre_copy() && to == State::StopCopy && self.unlogged {
            self.breaks(now, Rule::LogNotStarted);
            self.unlogged = false;
        }
        self.saved |= self.log && to == State::StopCopy;
        self.account(now);
        self.state = to;
    }

    /// Looks for a data_fd that is still open.
    fn check_file(&mut self, now: u64) {
        if self.file {
            self.breaks(now, Rule::DataFdLeaked);
        }
        self.file = false;
        self.generation = self.generation.wrapping_add(1);
    }

    /// Begins a session. Returns its generation.
    pub fn begin(&mut self, now: u64) -> u32 {
        self.check_file(now);
        self.file = true;
        self.statistics.sessions += 1;
        self.ended = false;
        self.initial = 0;
        self.fruitless = 0;
        self.unlogged = false;
        self.generation
    }

    /// Notes that the data_fd of a session was closed.
    pub fn closed(&mut self, generation: u32) {
        if generation == self.generation {
            self.file = false;
        }
    }

    /// Notes a call of read() on the data_fd of a session, which began at `start`. A call of a
    /// session before the last one is ignored.
    pub fn read(&mut self, now: u64, generation: u32, start: u64, read: Read) {
        if generation != self.generation {
            return;
        }
        let statistics = &mut self.statistics;
        match read {
            Read::Bytes(bytes) => {
                statistics.reads += 1;
                statistics.read_bytes += bytes;
                statistics.largest_read = statistics.largest_read.max(bytes);
                self.initial = self.initial.saturating_sub(bytes);
            }
            Read::End => {
                statistics.reads += 1;
                self.ended = true;
            }
            Read::TemporaryEnd => {
                statistics.enomsg += 1;
                // "reached when both initial_bytes and dirty_byte are zero"
                self.initial = 0;
            }
            Read::NotReady => statistics.eagain += 1,
        }
        match read {
            Read::Bytes(_) | Read::End => self.fruitless = 0,
            Read::TemporaryEnd | Read::NotReady => self.fruitless_read(now, start),
        }
    }

    /// Notes a read() without data.
    fn fruitless_read(&mut self, now: u64, start: u64) {
        if self.fruitless == 0 {
            self.fruitless_since = start;
            self.fruitless_for = 0;
        }
        self.fruitless += 1;
        self.fruitless_for += now.saturating_sub(start);
        if self.fruitless == FRUITLESS {
            let time = now.saturating_sub(self.fruitless_since);
            if self.fruitless_for.saturating_mul(SHARE) >= time {
                self.breaks(now, Rule::BusyPolling);
            }
            self.fruitless = 0;
        }
    }

    /// Notes that a read() on the data_fd of a session waits for data.
    pub fn wait(&mut self, generation: u32) {
        if generation == self.generation {
            self.fruitless = 0;
        }
    }

    /// Notes a call of write() on the data_fd of a session that has taken bytes.
    pub fn write(&mut self, generation: u32, bytes: u64) {
        if generation == self.generation {
            self.statistics.writes += 1;
            self.statistics.written_bytes += bytes;
        }
    }

    /// Notes a call of poll() on the data_fd of a session.
    pub fn poll(&mut self, generation: u32) {
        if generation == self.generation {
            self.statistics.polls += 1;
            self.fruitless = 0;
        }
    }

    /// Notes a pre-copy info of a session with this number of initial bytes, and whether the client
    /// has missed that the device began again.
    pub fn precopy_info(&mut self, now: u64, generation: u32, initial: u64, missed: bool) {
        if generation != self.generation {
            return;
        }
        self.statistics.precopy_infos += 1;
        self.fruitless = 0;
        self.initial = initial;
        if missed {
            self.breaks(now, Rule::ReinitNotSeen);
        }
    }

    /// Notes a write to a BAR that was dropped, because the device is stopped.
    pub fn dropped_write(&mut self, now: u64) {
        if let State::Stop | State::StopCopy | State::Resuming = self.state {
            self.statistics.dropped_writes += 1;
            self.breaks(now, Rule::StoppedDeviceWritten);
        }
    }

    /// Notes how many pages with stores were dropped since the last open or reset, because the
    /// device was stopped.
    pub fn dropped_stores(&mut self, now: u64, pages: u64) {
        let more = pages.saturating_sub(self.stores);
        self.stores = pages;
        self.statistics.dropped_stores += more;
        if more > 0 {
            self.breaks(now, Rule::StoppedDeviceWritten);
        }
    }

    /// Notes a write to a BAR that began in a P2P state.
    pub fn quiesced_write(&mut self, now: u64) {
        if self.state.is_p2p() {
            self.breaks(now, Rule::QuiescedDeviceWritten);
        }
    }

    /// Notes that the device wrote to memory of the user, and nothing tracks that.
    pub fn unlogged_write(&mut self) {
        self.unlogged |= self.state.is_pre_copy();
    }

    /// Notes that the DMA log was turned on.
    pub fn log_start(&mut self) {
        self.log = true;
        self.saved = false;
    }

    /// Notes a report of the DMA log.
    pub fn log_report(&mut self) {
        self.statistics.log_reports += 1;
    }

    /// Notes that the DMA log is turned off by the client, or by a close that follows; and whether
    /// it has pages that were not reported.
    pub fn log_end(&mut self, client: bool, unreported: bool) {
        self.unreported |= unreported && self.saved;
        self.log &= !client;
    }

    /// Notes that `RESUMING` could not be left because the image is not complete.
    pub fn incomplete(&mut self, now: u64) {
        self.breaks(now, Rule::ImageIncomplete);
    }
}

impl Verdict {
    /// Prints a line for each broken rule of one kind. Returns whether there is none.
    fn print(&self, f: &mut fmt::Formatter<'_>, is_advice: bool) -> Result<bool, fmt::Error> {
        let mut none = true;
        for rule in Rule::ALL {
            let broken = self.broken(rule);
            let Some(state) = broken.state.filter(|_| rule.is_advice() == is_advice) else {
                continue;
            };
            none = false;
            writeln!(
                f,
                "{}{}: count {}, first in {state} after {} ms: \"{}\"",
                if is_advice { "advice: " } else { "" },
                rule.name(),
                broken.count,
                broken.time / 1_000_000,
                rule.text(),
            )?;
        }
        Ok(none)
    }
}

/// "clean", or a line for each violation; then a line for each advice.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.print(f, false)? {
            writeln!(f, "clean")?;
        }
        self.print(f, true).map(|_| ())
    }
}

/// A line for each number. Times are in microseconds.
impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, number) in [
            ("sessions", self.sessions),
            ("resets", self.resets),
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("largest_read", self.largest_read),
            ("enomsg", self.enomsg),
            ("eagain", self.eagain),
            ("writes", self.writes),
            ("written_bytes", self.written_bytes),
            ("polls", self.polls),
            ("precopy_infos", self.precopy_infos),
            ("dropped_writes", self.dropped_writes),
            ("dropped_stores", self.dropped_stores),
            ("log_reports", self.log_reports),
        ] {
            writeln!(f, "{name} {number}")?;
        }
        for state in State::ALL {
            let time = self.times[state as usize] / 1000;
            writeln!(f, "{state}_us {time}")?;
        }
        Ok(())
    }
}
