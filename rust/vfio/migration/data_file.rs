// SPDX-License-Identifier: GPL-2.0

//! Sessions, and the data_fd by which the user takes part in one.
//!
//! A session is shared by the engine and the file. The file holds nothing else: it may outlive
//! the device, and when the session has ended, every call on it fails with `ENODEV`.

use super::{
    Chunk,
    Loader,
    Migratable,
    Next,
    Notifier,
    Phase,
    Remaining,
    Saver, //
};
use crate::{
    bindings,
    device::{
        Device,
        Open, //
    },
    user::{
        Block,
        UserBuf, //
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
    ioctl::_IO,
    module::this_module,
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        lock::mutex::MutexGuard,
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

/// `VFIO_MIG_GET_PRECOPY_INFO`.
const MIG_GET_PRECOPY_INFO: u32 = _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + 21);

/// The number that the ioctl had when it was proposed, with the same argument.
const DEVICE_MIG_PRECOPY: u32 = _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + 22);

/// What is in a saving session until it ends.
struct Saving<M: Migratable> {
    /// Held for the opt-in to v2 of the pre-copy info; gone before close_device() returns.
    device: ARef<Device>,
    saver: M::Saver,
    /// What the reader has begun; it is with the reader while that copies.
    chunk: Option<Chunk>,
    /// How much of `chunk` was read, out of how much, and what it counts as.
    pos: usize,
    len: usize,
    initial: bool,
    /// A reader is at work. Readers take turns, so that each gets bytes that follow each other.
    reading: bool,
    /// What `initial_bytes` was reported as last; it must not grow without `REINIT`.
    reported_initial: u64,
    /// How many re-initialisations were reported.
    reported_reinits: u32,
}

impl<M: Migratable> Saving<M> {
    /// Returns how much there is to read, including the rest of what the reader has begun.
    fn remaining(&self) -> Remaining {
        let mut remaining = self.saver.remaining();
        let begun = (self.len - self.pos) as u64;
        let part = if self.initial {
            &mut remaining.initial
        } else {
            &mut remaining.dirty
        };
        *part = part.saturating_add(begun);
        remaining
    }
}

/// A session of the saving group: `PRE_COPY`, `PRE_COPY_P2P` and `STOP_COPY`.
#[pin_data]
pub(super) struct SaveSession<M: Migratable> {
    notifier: Arc<Notifier>,
    /// [`None`] when the session has ended.
    #[pin]
    saving: Mutex<Option<Saving<M>>>,
}

impl<M: Migratable> SaveSession<M> {
    /// Begins a session.
    pub(super) fn begin(
        driver: &Arc<M>,
        device: &Device<Open>,
        phase: Phase,
    ) -> Result<(Arc<Self>, ARef<File>)> {
        let notifier = Notifier::new(phase)?;
        let mut saver = match phase {
            Phase::PreCopy => M::pre_copy(driver, notifier.clone()),
            Phase::StopCopy => M::save(driver, notifier.clone()),
        }?;
        if phase == Phase::StopCopy {
            saver.seal()?;
        }
        let device: &Device = device;
        let saving = Saving {
            device: device.into(),
            saver,
            chunk: None,
            pos: 0,
            len: 0,
            initial: false,
            reading: false,
            reported_initial: u64::MAX,
            reported_reinits: 0,
        };
        let session = Arc::pin_init(
            pin_init!(Self {
                notifier,
                saving <- new_mutex!(Some(saving), "vfio::migration::SaveSession"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let file = new_file(
            c"vfio-migration-save",
            &SaveFile::<M>::FOPS,
            session.clone(),
            bindings::O_RDONLY,
        )?;
        Ok((session, file))
    }

    /// Turns to `STOP_COPY`. The device is stopped.
    pub(super) fn seal(&self) -> Result {
        let mut guard = self.saving.lock();
        let saving = (*guard).as_mut().ok_or(ENODEV)?;
        saving.saver.seal()?;
        // Under the lock, so that the saver is asked in one phase or the other.
        self.notifier.set_phase(Phase::StopCopy);
        drop(guard);
        self.notifier.notify();
        Ok(())
    }

    /// Ends the session.
    pub(super) fn end(&self) {
        let saving = self.saving.lock().take();
        // Dropped outside of the lock: the saver's destructor is the driver's.
        drop(saving);
        self.notifier.notify();
    }

    /// Returns how many bytes are left to stream.
    pub(super) fn data_size(&self) -> u64 {
        self.saving.lock().as_ref().map_or(0, |saving| {
            let Remaining {
                initial,
                dirty,
                tail,
                ..
            } = saving.remaining();
            initial.saturating_add(dirty).saturating_add(tail)
        })
    }

    /// Waits until somebody notifies, unless the reader does not want to wait.
    fn wait(&self, guard: &mut MutexGuard<'_, Option<Saving<M>>>, nonblock: bool) -> Result {
        if nonblock {
            return Err(EAGAIN);
        }
        if self.notifier.wait.wait_interruptible(guard) {
            return Err(ERESTARTSYS);
        }
        Ok(())
    }

    /// Takes turns with other readers.
    fn claim(&self, nonblock: bool) -> Result {
        let mut guard = self.saving.lock();
        loop {
            let saving = (*guard).as_mut().ok_or(ENODEV)?;
            if !saving.reading {
                saving.reading = true;
                return Ok(());
            }
            self.wait(&mut guard, nonblock)?;
        }
    }

    fn unclaim(&self) {
        if let Some(saving) = &mut *self.saving.lock() {
            saving.reading = false;
        }
        self.notifier.notify();
    }

    /// Returns what is to be read next and how much of it was, or nothing at the end of stream.
    fn next(&self, nonblock: bool, first: bool) -> Result<Option<(Chunk, usize)>> {
        loop {
            // Read before the saver is asked, so that what it tells meanwhile is not missed.
            let seen = self.notifier.events();
            let mut guard = self.saving.lock();
            let saving = (*guard).as_mut().ok_or(ENODEV)?;
            if let Some(chunk) = saving.chunk.take() {
                return Ok(Some((chunk, saving.pos)));
            }
            let phase = self.notifier.phase();
            match saving.saver.next(phase)? {
                Next::Chunk(mut chunk) => {
                    // A chunk without bytes would never be read entirely.
                    let len = Some(chunk.len()).filter(|len| *len > 0).ok_or(EIO)?;
                    saving.pos = 0;
                    saving.len = len;
                    saving.initial = chunk.initial;
                    chunk.hand_out();
                    return Ok(Some((chunk, 0)));
                }
                Next::End if phase == Phase::PreCopy && first => return Err(ENOMSG),
                Next::End => return Ok(None),
                Next::NotReady if !first => return Ok(None),
                Next::NotReady if nonblock => return Err(EAGAIN),
                Next::NotReady => {
                    drop(guard);
                    self.notifier.wait_after(seen)?;
                }
            }
        }
    }

    /// Takes note of how much was read of what [`next()`](Self::next) returned.
    fn advance(&self, chunk: Chunk, pos: usize) -> Result {
        let mut guard = self.saving.lock();
        let saving = (*guard).as_mut().ok_or(ENODEV)?;
        saving.pos = pos;
        if pos < saving.len {
            saving.chunk = Some(chunk);
        }
        Ok(())
    }

    /// Serves read(): `ENOMSG` at a temporary end of stream, zero at the permanent one.
    fn read(&self, user: &mut UserBuf, nonblock: bool) -> Result<usize> {
        self.claim(nonblock)?;
        let mut done = 0;
        let result = loop {
            if user.len() == 0 {
                break Ok(());
            }
            let (chunk, pos) = match self.next(nonblock, done == 0) {
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
        };
        self.unclaim();
        if done > 0 {
            return Ok(done);
        }
        result.map(|()| 0)
    }

    /// Serves poll(): readable if read() would return bytes or the permanent end of stream.
    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.notifier.wait);
        match self.saving.lock().as_ref() {
            None => bindings::POLLIN | bindings::POLLRDNORM | POLLRDHUP,
            Some(saving) => {
                let Remaining { initial, dirty, .. } = saving.remaining();
                let begun = saving.pos < saving.len;
                let readable = (initial > 0 || dirty > 0) && (begun || saving.saver.is_ready());
                if self.notifier.phase() == Phase::StopCopy || readable {
                    bindings::POLLIN | bindings::POLLRDNORM
                } else {
                    0
                }
            }
        }
    }

    /// Serves `VFIO_MIG_GET_PRECOPY_INFO`.
    ///
    /// `initial_bytes + dirty_bytes` is what `STOP_COPY` would stream if it began now. Its tail,
    /// which pre-copy cannot stream, is left out when nothing else is left: both must be zero at
    /// the temporary end of stream.
    fn precopy_info(&self, arg: UserPtr) -> Result {
        let (mut reader, mut writer) = UserSlice::new(arg, PRECOPY_INFO_SIZE).reader_writer();
        let argsz = reader.read::<u32>()?;
        let mut flags = reader.read::<u32>()?;
        if (argsz as usize) < PRECOPY_INFO_SIZE {
            return Err(EINVAL);
        }

        let mut guard = self.saving.lock();
        let saving = (*guard).as_mut().ok_or(ENODEV)?;
        if self.notifier.phase() != Phase::PreCopy {
            return Err(EINVAL);
        }
        let Remaining {
            mut initial,
            mut dirty,
            tail,
            reinits,
        } = saving.remaining();
        let v2 = saving.device.precopy_info_v2();
        if v2 {
            // Without the opt-in the field stays as the user left it.
            flags = 0;
            if reinits != saving.reported_reinits {
                flags = bindings::VFIO_PRECOPY_INFO_REINIT;
                saving.reported_reinits = reinits;
                saving.reported_initial = u64::MAX;
            }
        }
        if initial > 0 {
            initial = initial.saturating_add(tail);
        } else if dirty > 0 {
            dirty = dirty.saturating_add(tail);
        }
        // What was not announced as initial must not be reported as such.
        let shown = initial.min(saving.reported_initial);
        dirty = dirty.saturating_add(initial - shown);
        saving.reported_initial = shown;
        drop(guard);

        let written = writer
            .write(&argsz)
            .and_then(|()| writer.write(&flags))
            .and_then(|()| writer.write(&shown))
            .and_then(|()| writer.write(&dirty));
        if written.is_err() && flags & bindings::VFIO_PRECOPY_INFO_REINIT != 0 && v2 {
            // The user has not seen it: the next one shall.
            if let Some(saving) = &mut *self.saving.lock() {
                saving.reported_reinits = reinits.wrapping_sub(1);
            }
        }
        written
    }

    /// Serves ioctl().
    fn ioctl(&self, cmd: u32, arg: UserPtr) -> Result {
        match cmd {
            MIG_GET_PRECOPY_INFO | DEVICE_MIG_PRECOPY => self.precopy_info(arg),
            _ => Err(ENOTTY),
        }
    }
}

/// The size of `struct vfio_precopy_info` in bytes.
const PRECOPY_INFO_SIZE: usize = size_of::<bindings::vfio_precopy_info>();

/// The poll event that `bindings` has only as an `EPOLL` macro.
const POLLRDHUP: u32 = 0x2000;

/// What is in a resuming session until it ends.
struct Loading<M: Migratable> {
    loader: M::Loader,
    /// Where a write() is taken from the user to; it is with the writer while that copies.
    block: Option<Block>,
    /// Why the stream was refused.
    failed: Option<Error>,
}

impl<M: Migratable> Loading<M> {
    /// Tells whether a write() need not wait, because there is somebody to take the bytes, or an
    /// error.
    fn is_ready(&self) -> bool {
        self.failed.is_some() || self.loader.is_ready()
    }
}

/// A session of `RESUMING`.
#[pin_data]
pub(super) struct LoadSession<M: Migratable> {
    notifier: Arc<Notifier>,
    /// [`None`] when the session has ended.
    #[pin]
    loading: Mutex<Option<Loading<M>>>,
}

impl<M: Migratable> LoadSession<M> {
    /// Begins a session.
    pub(super) fn begin(driver: &Arc<M>) -> Result<(Arc<Self>, ARef<File>)> {
        let notifier = Notifier::new(Phase::StopCopy)?;
        let loading = Loading {
            block: Some(Block::default()),
            loader: M::load(driver, notifier.clone())?,
            failed: None,
        };
        let session = Arc::pin_init(
            pin_init!(Self {
                notifier,
                loading <- new_mutex!(Some(loading), "vfio::migration::LoadSession"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let file = new_file(
            c"vfio-migration-load",
            &LoadFile::<M>::FOPS,
            session.clone(),
            bindings::O_WRONLY,
        )?;
        Ok((session, file))
    }

    /// Puts into effect what was loaded.
    pub(super) fn finish(&self, driver: &Arc<M>) -> Result {
        let mut guard = self.loading.lock();
        let loading = (*guard).as_mut().ok_or(ENODEV)?;
        match loading.failed {
            Some(e) => Err(e),
            None => driver.loaded(&mut loading.loader),
        }
    }

    /// Ends the session.
    pub(super) fn end(&self) {
        let loading = self.loading.lock().take();
        drop(loading);
        self.notifier.notify();
    }

    /// Takes turns with other writers, and what the turn consists in.
    fn claim(&self, nonblock: bool) -> Result<Block> {
        let mut guard = self.loading.lock();
        loop {
            let loading = (*guard).as_mut().ok_or(ENODEV)?;
            if let Some(block) = loading.block.take() {
                return Ok(block);
            }
            if nonblock {
                return Err(EAGAIN);
            }
            if self.notifier.wait.wait_interruptible(&mut guard) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// Waits until the loader can take bytes; tells that it cannot if some were taken before.
    fn ready(&self, nonblock: bool, first: bool) -> Result<bool> {
        loop {
            // Read before the loader is asked, so that what it tells meanwhile is not missed.
            let seen = self.notifier.events();
            let guard = self.loading.lock();
            if guard.as_ref().ok_or(ENODEV)?.is_ready() {
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
        self.notifier.notify();
    }

    /// Hands bytes to the loader, unless the stream was refused before.
    fn load(&self, bytes: &[u8]) -> Result {
        let mut guard = self.loading.lock();
        let loading = (*guard).as_mut().ok_or(ENODEV)?;
        if let Some(e) = loading.failed {
            return Err(e);
        }
        loading
            .loader
            .write(bytes)
            .inspect_err(|e| loading.failed = Some(*e))
    }

    /// Serves write().
    fn write(&self, user: &mut UserBuf, nonblock: bool) -> Result<usize> {
        let mut block = self.claim(nonblock)?;
        let mut done = 0;
        let result = loop {
            if user.len() == 0 {
                break Ok(());
            }
            match self.ready(nonblock, done == 0) {
                Ok(true) => (),
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
            let bytes = match block.read(user) {
                Ok([]) => break Err(EFAULT),
                Ok(bytes) => bytes,
                Err(e) => break Err(e),
            };
            if let Err(e) = self.load(bytes) {
                break Err(e);
            }
            done += bytes.len();
        };
        self.unclaim(block);
        if done > 0 {
            return Ok(done);
        }
        result.map(|()| 0)
    }

    /// Serves poll(): writable if write() would not wait, and an error once the session has ended.
    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.notifier.wait);
        let events = bindings::POLLOUT | bindings::POLLWRNORM;
        match self.loading.lock().as_ref() {
            Some(loading) if loading.is_ready() => events,
            Some(_) => 0,
            None => events | bindings::POLLERR,
        }
    }
}

/// Makes the file of a session. The file owns `session` until it is released.
fn new_file<S: 'static>(
    name: &'static CStr,
    fops: &'static bindings::file_operations,
    session: Arc<S>,
    flags: u32,
) -> Result<ARef<File>> {
    let private = session.into_foreign();
    // SAFETY: `name` and `fops` live for ever, and `private` is what the callbacks in `fops`
    // expect.
    let file = unsafe {
        bindings::anon_inode_getfile(name.as_char_ptr(), fops, private.cast(), flags as c_int)
    };
    let file = from_err_ptr(file).inspect_err(|_| {
        // SAFETY: `private` comes from `into_foreign()` above, and no file has taken it.
        drop(unsafe { Arc::<S>::from_foreign(private) });
    })?;
    // SAFETY: The file is new, and nobody else knows it.
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
    // SAFETY: By the safety requirements `private_data` is what `into_foreign()` returned, and
    // `from_foreign()` is only called on release.
    let session = unsafe { Arc::<S>::borrow((*file).private_data.cast()) };
    // SAFETY: The file is live, and the file is a stream, which is never locked by `fdget_pos`.
    (unsafe { File::from_raw_file(file) }, session)
}

/// Drops what the file owns.
///
/// # Safety
///
/// Must be called by the core as the release() of a file made by [`new_file()`] with an `Arc<S>`.
unsafe extern "C" fn release<S: 'static>(
    _inode: *mut bindings::inode,
    file: *mut bindings::file,
) -> c_int {
    // SAFETY: `private_data` comes from `into_foreign()`, and nobody uses the file any more.
    drop(unsafe { Arc::<S>::from_foreign((*file).private_data.cast()) });
    0
}

fn nonblock(file: &File) -> bool {
    file.flags() & flags::O_NONBLOCK != 0
}

/// Turns a count of bytes into what read() and write() return.
fn count(result: Result<usize>) -> isize {
    from_result(|| result.map(|count| count as isize))
}

/// The file operations of a [`SaveSession`].
struct SaveFile<M: Migratable>(PhantomData<M>);

impl<M: Migratable> SaveFile<M> {
    const FOPS: bindings::file_operations = bindings::file_operations {
        owner: this_module::<M::OwnerModule>().as_ptr(),
        read: Some(Self::read),
        poll: Some(Self::poll),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: bindings::compat_ptr_ioctl,
        release: Some(release::<SaveSession<M>>),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        _pos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<SaveSession<M>>(file) };
        let mut user = UserBuf::new(UserPtr::from_ptr(buf.cast()), len);
        count(session.read(&mut user, nonblock(file)))
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
        write: Some(Self::write),
        poll: Some(Self::poll),
        release: Some(release::<LoadSession<M>>),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Must be called by the core on a file with these file operations.
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        buf: *const c_char,
        len: usize,
        _pos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The core keeps the file alive for the call.
        let (file, session) = unsafe { borrow::<LoadSession<M>>(file) };
        let mut user = UserBuf::new(UserPtr::from_ptr(buf.cast_mut().cast()), len);
        count(session.write(&mut user, nonblock(file)))
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
