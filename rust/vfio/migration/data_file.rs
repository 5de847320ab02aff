// SPDX-License-Identifier: GPL-2.0

//! Sessions and their data_fd.
//!
//! A session is shared by the engine and the file. The file owns nothing else: it may outlive the
//! device. After the end of the session, every call on it fails with `ENODEV`.

use super::{
    ledger::Ledger,
    Chunk,
    Loader,
    Migratable,
    Next,
    Notifier,
    Phase,
    Remaining,
    Saver,
    State, //
};
use crate::{
    bindings, compat,
    device::{
        Device,
        Open, //
    },
    user::{
        cond_resched_killable,
        lock_killable,
        Block, //
    },
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        from_result, //
    },
    fs::{
        file::flags,
        File, //
    },
    iov::{
        IovIterDest,
        IovIterSource, //
    },
    module::this_module,
    new_mutex, pr_info_once,
    prelude::*,
    sync::{
        aref::ARef,
        poll::PollTable,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    types::ForeignOwnable,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// Last answer of a saver that was not returned to a reader yet, with the number of notifications
/// before it. Another notification may change the answer.
enum Answer {
    /// The saver was not called, or a reader has got the answer.
    Nothing,
    NotReady(u32),
    End(u32),
    Failed(Error),
}

/// Content of a saving session until it ends.
struct Saving<M: Migratable> {
    /// Held for the opt-in to v2 of the pre-copy info; gone before close_device() returns.
    device: ARef<Device>,
    saver: M::Saver,
    /// The chunk to read next, perhaps read in part. [`None`] while a reader copies it.
    chunk: Option<Chunk>,
    answer: Answer,
    /// Number of notifications when [`Saver::remaining()`] last returned that nothing is left, if
    /// it did so since the saver's last chunk was requested.
    none_left: Option<u32>,
    /// Number of bytes of `chunk` that were read, its size, and whether it counts as initial.
    pos: usize,
    len: usize,
    initial: bool,
    /// A reader is active. Readers take turns, so that each gets contiguous bytes.
    reading: bool,
    /// Last reported `initial_bytes`, which must not grow without `REINIT`.
    reported_initial: u64,
    /// Number of re-initialisations reported.
    reported_reinits: u32,
    /// Number of re-initialisations when the user last asked, who had not opted in to see them.
    missed_reinits: u32,
}

impl<M: Migratable> Saving<M> {
    /// Returns the size of the rest of the saver's stream. May query firmware, so only an ioctl
    /// calls this.
    fn ask_remaining(&mut self, notifier: &Notifier) -> Result<Remaining> {
        let seen = notifier.events();
        let remaining = self.saver.remaining()?;
        let left = remaining.left(notifier.phase());
        if left > 0 && self.is_at_end(notifier.events()) {
            pr_info_once!("inexact sizes: {left} bytes are reported at the end of a stream\n");
        }
        self.none_left = (left == 0).then_some(seen);
        Ok(remaining)
    }

    /// Returns whether the saver has reported the end, and there was no notification since, with
    /// `events` notifications so far. Then nothing is left.
    fn is_at_end(&self, events: u32) -> bool {
        matches!(self.answer, Answer::End(seen) if seen == events)
    }

    /// Returns the size of the rest of the stream, including the rest of the current chunk.
    fn remaining(&mut self, notifier: &Notifier) -> Result<Remaining> {
        let mut remaining = self.ask_remaining(notifier)?;
        self.add_begun(&mut remaining);
        Ok(remaining)
    }

    /// Adds the rest of the current chunk.
    fn add_begun(&self, remaining: &mut Remaining) {
        let begun = (self.len - self.pos) as u64;
        let part = if self.initial {
            &mut remaining.initial
        } else {
            &mut remaining.dirty
        };
        *part = part.saturating_add(begun);
    }

    /// Gets the next part of the stream from the saver. The last chunk has been read.
    fn ask(&mut self, notifier: &Notifier) {
        // Read before the saver is called, so that a notification meanwhile is not missed.
        let seen = notifier.events();
        let phase = notifier.phase();
        let none_left = self.is_at_end(seen) || self.none_left == Some(seen);
        self.none_left = None;
        self.answer = match self.saver.next(phase) {
            // A chunk without bytes would never be read entirely.
            Ok(Next::Chunk(chunk)) if chunk.len() == 0 => Answer::Failed(EIO),
            Ok(Next::Chunk(mut chunk)) => {
                if none_left && seen == notifier.events() {
                    pr_info_once!("inexact sizes: a stream goes on after none were reported\n");
                }
                self.pos = 0;
                self.len = chunk.len();
                self.initial = chunk.initial;
                chunk.hand_out();
                self.chunk = Some(chunk);
                Answer::Nothing
            }
            Ok(Next::NotReady) => Answer::NotReady(seen),
            Ok(Next::End) => Answer::End(seen),
            Err(e) => Answer::Failed(e),
        };
    }

    /// Returns whether a read() would not wait.
    fn is_readable(&self, notifier: &Notifier) -> bool {
        if self.reading {
            return false;
        }
        match self.answer {
            Answer::NotReady(seen) => seen != notifier.events(),
            Answer::End(seen) => notifier.phase() == Phase::StopCopy || seen != notifier.events(),
            Answer::Nothing | Answer::Failed(_) => true,
        }
    }
}

/// A session of the saving group: `PRE_COPY`, `PRE_COPY_P2P` and `STOP_COPY`.
#[pin_data]
pub(super) struct SaveSession<M: Migratable> {
    notifier: Arc<Notifier>,
    ledger: Arc<Ledger>,
    generation: u32,
    /// [`None`] when the session has ended.
    #[pin]
    saving: Mutex<Option<Saving<M>>>,
}

impl<M: Migratable> SaveSession<M> {
    /// Begins a session in a state.
    pub(super) fn begin(
        driver: &Arc<M>,
        device: &Device<Open>,
        state: State,
        ledger: &Arc<Ledger>,
    ) -> Result<(Arc<Self>, ARef<File>)> {
        let phase = match state {
            State::StopCopy => Phase::StopCopy,
            _ => Phase::PreCopy,
        };
        let notifier = Notifier::new(phase)?;
        let mut saver = match phase {
            Phase::PreCopy => M::pre_copy(driver, notifier.clone()),
            Phase::StopCopy => M::save(driver, notifier.clone()),
        }?;
        if phase == Phase::StopCopy {
            saver.seal()?;
        }
        let device: &Device = device;
        let mut saving = Saving {
            device: device.into(),
            saver,
            chunk: None,
            answer: Answer::Nothing,
            none_left: None,
            pos: 0,
            len: 0,
            initial: false,
            reading: false,
            reported_initial: u64::MAX,
            reported_reinits: 0,
            missed_reinits: 0,
        };
        saving.ask(&notifier);
        let session = Arc::pin_init(
            pin_init!(Self {
                notifier,
                generation: ledger.begin(state),
                ledger: ledger.clone(),
                saving <- new_mutex!(Some(saving), "vfio::migration::SaveSession"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let file = new_file(
            c"vfio-migration-save",
            &SaveFile::<M>::FOPS,
            session.clone(),
            bindings::O_RDONLY,
        )
        .inspect_err(|_| {
            session.closed();
            session.end();
        })?;
        Ok((session, file))
    }

    /// Changes to `STOP_COPY`. The device is stopped.
    pub(super) fn seal(&self) -> Result {
        let mut guard = lock_killable(&self.saving)?;
        let saving = (*guard).as_mut().ok_or(ENODEV)?;
        saving.saver.seal()?;
        // Under the lock, so that a call of the saver sees one phase.
        self.notifier.set_phase(Phase::StopCopy);
        self.notifier.notify();
        if saving.pos == saving.len {
            saving.ask(&self.notifier);
        }
        Ok(())
    }

    /// Ends the session.
    pub(super) fn end(&self) {
        let saving = self.saving.lock().take();
        // Dropped outside of the lock: the saver's destructor is the driver's.
        drop(saving);
        self.notifier.notify();
        self.ledger.end(match self.notifier.phase() {
            Phase::PreCopy => State::PreCopy,
            Phase::StopCopy => State::StopCopy,
        });
    }

    /// Returns the number of bytes left to stream, or [`None`] if the session has ended.
    pub(super) fn data_size(&self) -> Result<Option<u64>> {
        let mut guard = lock_killable(&self.saving)?;
        let Some(saving) = (*guard).as_mut() else {
            return Ok(None);
        };
        let remaining = saving.remaining(&self.notifier)?;
        Ok(Some(remaining.left(Phase::StopCopy)))
    }

    /// Waits for the turn of this reader.
    fn claim(&self, nonblock: bool) -> Result {
        loop {
            // Read before the check, so that a wake-up after it is not missed.
            let seen = self.notifier.wakes();
            let mut guard = lock_killable(&self.saving)?;
            let saving = self.notifier.live(&mut *guard)?;
            if !saving.reading {
                saving.reading = true;
                return Ok(());
            }
            drop(guard);
            if nonblock {
                return Err(EAGAIN);
            }
            self.notifier.wait_after_wake(seen)?;
        }
    }

    /// Ends the turn of this reader. Calls the saver if needed, so that poll() agrees with the next
    /// read(), even if this one failed.
    fn unclaim(&self) {
        if let Some(saving) = &mut *self.saving.lock() {
            saving.reading = false;
            if saving.pos == saving.len && matches!(saving.answer, Answer::Nothing) {
                saving.ask(&self.notifier);
            }
        }
        self.notifier.wake();
    }

    /// Returns the next chunk and the number of its bytes that were read, or [`None`] at the end of
    /// stream.
    fn next(&self, nonblock: bool, first: bool) -> Result<Option<(Chunk, usize)>> {
        loop {
            let mut guard = lock_killable(&self.saving)?;
            let saving = self.notifier.live(&mut *guard)?;
            if saving.chunk.is_none() && !matches!(saving.answer, Answer::Failed(_)) {
                saving.ask(&self.notifier);
            }
            if let Some(chunk) = saving.chunk.take() {
                return Ok(Some((chunk, saving.pos)));
            }
            let seen = match saving.answer {
                _ if !first => return Ok(None),
                Answer::Failed(e) => {
                    saving.answer = Answer::Nothing;
                    return Err(e);
                }
                Answer::End(_) if self.notifier.phase() == Phase::PreCopy => return Err(ENOMSG),
                Answer::NotReady(_) if nonblock => return Err(EAGAIN),
                Answer::NotReady(seen) => seen,
                Answer::End(_) | Answer::Nothing => return Ok(None),
            };
            drop(guard);
            self.ledger.note(|verdict, _| verdict.wait(self.generation));
            self.notifier.wait_after(seen)?;
        }
    }

    /// Records the position in the chunk that [`next()`](Self::next) returned. The saver gets back
    /// the pages of a chunk that was read entirely.
    fn advance(&self, chunk: Chunk, pos: usize) -> Result {
        let mut guard = self.saving.lock();
        let saving = self.notifier.live(&mut *guard)?;
        saving.pos = pos;
        if pos < saving.len {
            saving.chunk = Some(chunk);
        } else if let Some(run) = chunk.into_pages() {
            saving.saver.read(run);
        }
        Ok(())
    }

    /// Serves read(): `ENOMSG` at a temporary end of stream, zero at the permanent one.
    fn read(&self, user: &mut IovIterDest<'_>, nonblock: bool) -> Result<usize> {
        let start = self.ledger.now();
        self.claim(nonblock)?;
        let is_empty = user.is_empty();
        let mut done = 0;
        let result = loop {
            if user.is_empty() {
                break Ok(());
            }
            let (mut chunk, pos) = match self.next(nonblock, done == 0) {
                Ok(Some(next)) => next,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            };
            let copied = chunk.copy_to(pos, user);
            if let Err(e) = self.advance(chunk, pos + copied) {
                break Err(e);
            }
            if copied == 0 {
                break Err(EFAULT);
            }
            done += copied;
            if cond_resched_killable().is_err() {
                break Ok(());
            }
        };
        self.unclaim();
        let result = match result {
            Err(e) if done == 0 => Err(e),
            _ => Ok(done),
        };
        if !is_empty {
            self.ledger.read(self.generation, start, result);
        }
        result
    }

    /// Serves poll(): readable if read() would not wait. Calls no method of the driver, but waits
    /// killably for one that another task calls.
    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.notifier.wait);
        self.ledger.note(|verdict, _| verdict.poll(self.generation));
        let Ok(mut guard) = lock_killable(&self.saving) else {
            return 0;
        };
        match self.notifier.live(&mut *guard) {
            Err(_) => bindings::POLLIN | bindings::POLLRDNORM | bindings::POLLRDHUP,
            Ok(saving) if saving.is_readable(&self.notifier) => {
                bindings::POLLIN | bindings::POLLRDNORM
            }
            Ok(_) => 0,
        }
    }

    /// Serves `VFIO_MIG_GET_PRECOPY_INFO`.
    ///
    /// `initial_bytes + dirty_bytes` is the size that `STOP_COPY` would stream if it began now. The
    /// tail, which pre-copy cannot stream, is excluded when nothing else is left: both must be zero
    /// at the temporary end of stream.
    fn precopy_info(&self, arg: UserPtr) -> Result {
        let (mut reader, mut writer) = UserSlice::new(arg, PRECOPY_INFO_SIZE).reader_writer();
        let argsz = reader.read::<u32>()?;
        let mut flags = reader.read::<u32>()?;
        if (argsz as usize) < PRECOPY_INFO_SIZE {
            return Err(EINVAL);
        }

        let mut guard = lock_killable(&self.saving)?;
        let saving = self.notifier.live(&mut *guard)?;
        if self.notifier.phase() != Phase::PreCopy {
            return Err(EINVAL);
        }
        let mut remaining = saving.ask_remaining(&self.notifier)?;
        let reinits = remaining.reinits;
        let v2 = saving.device.precopy_info_v2();
        let missed = !v2 && reinits != saving.missed_reinits;
        saving.missed_reinits = reinits;
        if v2 {
            // Without the opt-in the field stays as the user left it.
            flags = 0;
            if reinits != saving.reported_reinits {
                flags = bindings::VFIO_PRECOPY_INFO_REINIT;
                saving.reported_reinits = reinits;
                saving.reported_initial = u64::MAX;
                // `dirty_bytes` restarts at zero, even if a chunk was read in part.
                saving.initial = true;
            }
        }
        saving.add_begun(&mut remaining);
        let Remaining {
            mut initial,
            mut dirty,
            tail,
            ..
        } = remaining;
        if initial > 0 {
            initial = initial.saturating_add(tail);
        } else if dirty > 0 {
            dirty = dirty.saturating_add(tail);
        }
        // Bytes that were not announced as initial must not be reported as such.
        let shown = initial.min(saving.reported_initial);
        dirty = dirty.saturating_add(initial - shown);
        saving.reported_initial = shown;
        drop(guard);
        self.ledger
            .precopy_info(self.generation, shown, dirty, flags, missed);

        let written = writer
            .write(&argsz)
            .and_then(|()| writer.write(&flags))
            .and_then(|()| writer.write(&shown))
            .and_then(|()| writer.write(&dirty));
        if written.is_err() && flags & bindings::VFIO_PRECOPY_INFO_REINIT != 0 && v2 {
            // The user has not seen the flag: report it again.
            if let Some(saving) = &mut *self.saving.lock() {
                saving.reported_reinits = reinits.wrapping_sub(1);
            }
        }
        written
    }

    /// Serves ioctl().
    fn ioctl(&self, cmd: u32, arg: UserPtr) -> Result {
        let cmd = compat::mainline_ioctl(cmd);
        match cmd {
            bindings::VFIO_MIG_GET_PRECOPY_INFO => self.precopy_info(arg),
            _ => Err(ENOTTY),
        }
    }
}

/// The size of `struct vfio_precopy_info` in bytes.
const PRECOPY_INFO_SIZE: usize = size_of::<bindings::vfio_precopy_info>();

/// Content of a resuming session until it ends.
struct Loading<M: Migratable> {
    loader: M::Loader,
    /// Buffer for a write(). [`None`] while a writer uses it.
    block: Option<Block>,
    /// Number of notifications before the loader took none of the bytes, if it did so when it was
    /// called last.
    not_ready: Option<u32>,
    /// Error with which the stream was refused.
    failed: Option<Error>,
}

impl<M: Migratable> Loading<M> {
    /// Returns whether a write() would not wait: the loader is ready, or the stream was refused.
    fn is_ready(&self, notifier: &Notifier) -> bool {
        let is_waiting = self.not_ready.is_some_and(|seen| seen == notifier.events());
        self.failed.is_some() || (!is_waiting && self.loader.is_ready())
    }

    /// Hands bytes to the loader, unless the stream was refused before. Returns the number of bytes
    /// that it has taken.
    fn load(&mut self, bytes: &[u8], notifier: &Notifier) -> Result<usize> {
        if let Some(e) = self.failed {
            return Err(e);
        }
        // Read before the loader is called, so that a notification meanwhile is not missed.
        let seen = notifier.events();
        let taken = match self.loader.write(bytes) {
            Ok(taken) if taken > bytes.len() => Err(EIO),
            result => result,
        };
        let taken = taken.inspect_err(|e| self.failed = Some(*e))?;
        self.not_ready = (taken == 0).then_some(seen);
        Ok(taken)
    }
}

/// A session of `RESUMING`.
#[pin_data]
pub(super) struct LoadSession<M: Migratable> {
    notifier: Arc<Notifier>,
    ledger: Arc<Ledger>,
    generation: u32,
    /// [`None`] when the session has ended.
    #[pin]
    loading: Mutex<Option<Loading<M>>>,
}

impl<M: Migratable> LoadSession<M> {
    /// Begins a session.
    pub(super) fn begin(driver: &Arc<M>, ledger: &Arc<Ledger>) -> Result<(Arc<Self>, ARef<File>)> {
        let notifier = Notifier::new(Phase::StopCopy)?;
        let loading = Loading {
            block: Some(Block::default()),
            loader: M::load(driver, notifier.clone())?,
            not_ready: None,
            failed: None,
        };
        let session = Arc::pin_init(
            pin_init!(Self {
                notifier,
                generation: ledger.begin(State::Resuming),
                ledger: ledger.clone(),
                loading <- new_mutex!(Some(loading), "vfio::migration::LoadSession"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let file = new_file(
            c"vfio-migration-load",
            &LoadFile::<M>::FOPS,
            session.clone(),
            bindings::O_WRONLY,
        )
        .inspect_err(|_| {
            session.closed();
            session.end();
        })?;
        Ok((session, file))
    }

    /// Applies the loaded state.
    pub(super) fn finish(&self, driver: &Arc<M>) -> Result {
        let mut guard = lock_killable(&self.loading)?;
        let loading = (*guard).as_mut().ok_or(ENODEV)?;
        if let Some(e) = loading.failed {
            return Err(e);
        }
        driver.loaded(&mut loading.loader).inspect_err(|e| {
            // The rest of an image that is not complete may still come.
            loading.failed = Some(*e).filter(|e| *e != EINVAL);
            if loading.failed.is_none() {
                self.ledger.note(|verdict, now| verdict.incomplete(now));
            }
        })?;
        // Under the same lock, so that no write() reaches the loader afterwards.
        let loading = guard.take();
        drop(guard);
        drop(loading);
        Ok(())
    }

    /// Ends the session.
    pub(super) fn end(&self) {
        let loading = self.loading.lock().take();
        drop(loading);
        self.notifier.notify();
        self.ledger.end(State::Resuming);
    }

    /// Waits for the turn of this writer, and returns the buffer, which represents the turn.
    fn claim(&self, nonblock: bool) -> Result<Block> {
        loop {
            // Read before the check, so that a wake-up after it is not missed.
            let seen = self.notifier.wakes();
            let mut guard = lock_killable(&self.loading)?;
            let loading = self.notifier.live(&mut *guard)?;
            if let Some(block) = loading.block.take() {
                return Ok(block);
            }
            drop(guard);
            if nonblock {
                return Err(EAGAIN);
            }
            self.notifier.wait_after_wake(seen)?;
        }
    }

    /// Waits until the loader is ready. If this write() has already taken bytes, returns false
    /// instead of waiting.
    fn ready(&self, nonblock: bool, first: bool) -> Result<bool> {
        loop {
            // Read before the loader is called, so that a notification meanwhile is not missed.
            let seen = self.notifier.events();
            let mut guard = lock_killable(&self.loading)?;
            let loading = self.notifier.live(&mut *guard)?;
            if loading.is_ready(&self.notifier) {
                return Ok(true);
            }
            if !first {
                return Ok(false);
            }
            if nonblock {
                return Err(EAGAIN);
            }
            drop(guard);
            self.notifier.wait_after(seen)?;
        }
    }

    fn unclaim(&self, block: Block) {
        if let Some(loading) = &mut *self.loading.lock() {
            loading.block = Some(block);
        }
        self.notifier.wake();
    }

    /// Hands bytes to the loader, and returns the number of bytes that it has taken.
    fn load(&self, bytes: &[u8]) -> Result<usize> {
        let mut guard = lock_killable(&self.loading)?;
        let loading = self.notifier.live(&mut *guard)?;
        loading.load(bytes, &self.notifier)
    }

    /// Serves write(). Only bytes that the loader has taken count as written.
    fn write(&self, user: &mut IovIterSource<'_>, nonblock: bool) -> Result<usize> {
        let mut block = self.claim(nonblock)?;
        let mut done = 0;
        // Bytes of the user that the loader has not taken yet.
        let mut rest: &[u8] = &[];
        let result = loop {
            if rest.is_empty() && user.is_empty() {
                break Ok(());
            }
            match self.ready(nonblock, done == 0) {
                Ok(true) => (),
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
            if rest.is_empty() {
                rest = match block.read(user) {
                    Ok([]) => break Err(EFAULT),
                    Ok(bytes) => bytes,
                    Err(e) => break Err(e),
                };
            }
            match self.load(rest) {
                Ok(taken) => {
                    done += taken;
                    rest = &rest[taken..];
                }
                Err(e) => break Err(e),
            }
            if let Err(e) = cond_resched_killable() {
                break Err(e);
            }
        };
        self.unclaim(block);
        let result = match result {
            Err(e) if done == 0 => Err(e),
            _ => Ok(done),
        };
        self.ledger.write(self.generation, result);
        result
    }

    /// Serves poll(): writable if write() would not wait, and an error after the session has ended.
    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.notifier.wait);
        let events = bindings::POLLOUT | bindings::POLLWRNORM;
        let Ok(mut guard) = lock_killable(&self.loading) else {
            return 0;
        };
        match self.notifier.live(&mut *guard) {
            Ok(loading) if loading.block.is_some() && loading.is_ready(&self.notifier) => events,
            Ok(_) => 0,
            Err(_) => events | bindings::POLLERR,
        }
    }
}

/// A session that is notified when its file is closed.
trait Session: 'static {
    /// Records that the data_fd of this session was closed.
    fn closed(&self);
}

impl<M: Migratable> Session for SaveSession<M> {
    fn closed(&self) {
        self.ledger
            .note(|verdict, _| verdict.closed(self.generation));
    }
}

impl<M: Migratable> Session for LoadSession<M> {
    fn closed(&self) {
        self.ledger
            .note(|verdict, _| verdict.closed(self.generation));
    }
}

/// Creates the file of a session. The file owns `session` until it is released.
fn new_file<S: 'static>(
    name: &'static CStr,
    fops: &'static bindings::file_operations,
    session: Arc<S>,
    flags: u32,
) -> Result<ARef<File>> {
    let private = session.into_foreign();
    // SAFETY: `name` and `fops` live for ever, and `private` has the type that the callbacks in
    // `fops` expect.
    let file = unsafe {
        bindings::anon_inode_getfile(name.as_char_ptr(), fops, private.cast(), flags as c_int)
    };
    let file = from_err_ptr(file).inspect_err(|_| {
        // SAFETY: `private` comes from `into_foreign()` above, and no file has taken it.
        drop(unsafe { Arc::<S>::from_foreign(private) });
    })?;
    // SAFETY: The file is new and not shared.
    unsafe { bindings::stream_open((*file).f_inode, file) };
    // SAFETY: `anon_inode_getfile()` returned the only reference, and no `fdget_pos` call can be
    // under way on a file that has no descriptor.
    Ok(unsafe { ARef::from_raw(NonNull::new_unchecked(file.cast::<File>())) })
}

/// Returns the file and the session of a call on a data_fd.
///
/// # Safety
///
/// `file` must be a live file made by [`new_file()`] with an `Arc<S>`, which is not released
/// before `'a` ends.
unsafe fn borrow<'a, S: 'static>(file: *mut bindings::file) -> (&'a File, ArcBorrow<'a, S>) {
    // SAFETY: By the safety requirements `private_data` comes from `into_foreign()`, and
    // `from_foreign()` is only called on release.
    let session = unsafe { Arc::<S>::borrow((*file).private_data.cast()) };
    // SAFETY: The file is live, and the file is a stream, which is never locked by `fdget_pos`.
    (unsafe { File::from_raw_file(file) }, session)
}

/// Drops the session of a file.
///
/// # Safety
///
/// Must be called by the core as the release() of a file made by [`new_file()`] with an `Arc<S>`.
unsafe extern "C" fn release<S: Session>(
    _inode: *mut bindings::inode,
    file: *mut bindings::file,
) -> c_int {
    // SAFETY: `private_data` comes from `into_foreign()`, and the file is not used any more.
    let session = unsafe { Arc::<S>::from_foreign((*file).private_data.cast()) };
    session.closed();
    0
}

/// Returns whether a read() or write() must not wait.
///
/// # Safety
///
/// The core must have passed `iocb` and `iter` to a call on `file`, which has not returned.
unsafe fn nonblock(
    file: &File,
    iocb: *mut bindings::kiocb,
    iter: *const bindings::iov_iter,
) -> bool {
    // SAFETY: By the safety requirements.
    let iocb_flags = unsafe { (*iocb).ki_flags };
    // A splice() holds the lock of the pipe, for which other tasks wait uninterruptibly.
    //
    // SAFETY: By the safety requirements.
    let is_splice = unsafe { !bindings::user_backed_iter(iter) };
    file.flags() & flags::O_NONBLOCK != 0 || iocb_flags & bindings::IOCB_NOWAIT != 0 || is_splice
}

/// Converts a result to the return value of read() and write().
fn count(result: Result<usize>) -> isize {
    from_result(|| result.map(|count| count as isize))
}

/// The file operations of a [`SaveSession`].
struct SaveFile<M: Migratable>(PhantomData<M>);

impl<M: Migratable> SaveFile<M> {
    const FOPS: bindings::file_operations = bindings::file_operations {
        owner: this_module::<M::OwnerModule>().as_ptr(),
        read_iter: Some(Self::read_iter),
        splice_read: Some(bindings::copy_splice_read),
        poll: Some(Self::poll),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: bindings::compat_ptr_ioctl,
        release: Some(release::<SaveSession<M>>),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn read_iter(
        iocb: *mut bindings::kiocb,
        to: *mut bindings::iov_iter,
    ) -> isize {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<SaveSession<M>>((*iocb).ki_filp) };
        // SAFETY: The core passed `iocb` and `to` to this call.
        let nonblock = unsafe { nonblock(file, iocb, to) };
        // SAFETY: The core passes a valid destination, which this call alone uses meanwhile.
        let user = unsafe { IovIterDest::from_raw(to) };
        count(session.read(user, nonblock))
    }

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        wait: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<SaveSession<M>>(file) };
        // SAFETY: The core passes NULL or a table that is valid for the call.
        session.poll(file, &unsafe { PollTable::from_raw(wait) })
    }

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn ioctl(
        file: *mut bindings::file,
        cmd: c_uint,
        arg: c_ulong, //
    ) -> c_long {
        // SAFETY: The core keeps the file alive for the call.
        let (_, session) = unsafe { borrow::<SaveSession<M>>(file) };
        from_result(|| session.ioctl(cmd, UserPtr::from_addr(arg)).map(|()| 0))
    }
}

/// The file operations of a [`LoadSession`].
struct LoadFile<M: Migratable>(PhantomData<M>);

impl<M: Migratable> LoadFile<M> {
    const FOPS: bindings::file_operations = bindings::file_operations {
        owner: this_module::<M::OwnerModule>().as_ptr(),
        write_iter: Some(Self::write_iter),
        splice_write: Some(bindings::iter_file_splice_write),
        poll: Some(Self::poll),
        release: Some(release::<LoadSession<M>>),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn write_iter(
        iocb: *mut bindings::kiocb,
        from: *mut bindings::iov_iter,
    ) -> isize {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<LoadSession<M>>((*iocb).ki_filp) };
        // SAFETY: The core passed `iocb` and `from` to this call.
        let nonblock = unsafe { nonblock(file, iocb, from) };
        // SAFETY: The core passes a valid source, which this call alone uses meanwhile.
        let user = unsafe { IovIterSource::from_raw(from) };
        count(session.write(user, nonblock))
    }

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        wait: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<LoadSession<M>>(file) };
        // SAFETY: The core passes NULL or a table that is valid for the call.
        session.poll(file, &unsafe { PollTable::from_raw(wait) })
    }
}
