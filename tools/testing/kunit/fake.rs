// SPDX-License-Identifier: GPL-2.0

//! A migratable device for the tests of the migration engine.
//!
//! It is not a mediated or emulated device, and is not on a bus. It only has what the engine needs,
//! like a variant driver of a PCI device: a `struct vfio_device` and [`Migratable`]. It records the
//! calls of the engine, and fails or hangs on request.

use core::ptr::NonNull;
use kernel::{
    device,
    error::from_err_ptr,
    faux,
    fs::File,
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
    workqueue, //
};
use vfio::{
    migration::{
        Chunk,
        Engine,
        Flags,
        Loader,
        Migratable,
        Next,
        Notifier,
        Phase,
        Remaining,
        Saver,
        State, //
    },
    Device,
    Open, //
};

/// Implemented in `vfio_kunit_device.c`.
mod core_side {
    use kernel::prelude::*;

    unsafe extern "C" {
        pub(super) fn vfio_kunit_alloc_device(
            parent: *mut c_void,
            migration_flags: u32,
        ) -> *mut c_void;
        pub(super) fn vfio_kunit_device_references(vdev: *mut c_void) -> c_uint;
        pub(super) safe fn vfio_kunit_user_memory(size: usize) -> c_ulong;
        pub(super) fn vfio_kunit_logged(text: *const c_char) -> c_uint;
        pub(super) fn vfio_kunit_read(
            file: *mut c_void,
            to: c_ulong,
            size: usize,
            nonblock: bool,
        ) -> isize;
        pub(super) fn vfio_kunit_write(
            file: *mut c_void,
            from: c_ulong,
            size: usize,
            nonblock: bool,
        ) -> isize;
        pub(super) fn vfio_kunit_poll(file: *mut c_void) -> c_uint;
        pub(super) fn vfio_kunit_ioctl(file: *mut c_void, cmd: c_uint, arg: c_ulong) -> c_long;
        pub(super) fn vfio_kunit_close(file: *mut c_void);
    }
}

/// A call of the engine, or a drop of a saver or loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    QuiesceP2p,
    ResumeP2p,
    Stop,
    Start,
    PreCopy,
    Save,
    Seal,
    Next(Phase),
    SaverDropped,
    Load,
    LoaderReady,
    Write,
    Loaded,
    LoaderDropped,
    DataSize,
    Remaining,
    Halt,
    Reset,
}

/// Error of failing methods. The engine itself does not use it.
pub(crate) const FAILURE: Error = EDOM;

/// Size that the device returns for `STOP_COPY` while there is no session.
pub(crate) const DATA_SIZE: u64 = 12_345;

/// Time limit in milliseconds for operations that must not wait forever.
const PATIENCE: usize = 5_000;

/// Recorded calls of the device, and its future behaviour.
#[derive(Default)]
struct Script {
    calls: KVec<Call>,
    /// Arcs that have begun and not ended.
    arcs: i32,
    /// Calls of the saver.
    asked: KVec<Call>,
    /// Failures break the device until it is reset.
    breaks: bool,
    broken: bool,
    /// Failures return `EINVAL`.
    invalid: bool,
    /// Calls that fail, each with the number of equal calls that succeed before.
    failures: KVec<(Call, usize)>,
    /// Call that hangs until this is changed.
    hold: Option<Call>,
    /// The call in `hold` was made.
    held: bool,
    /// Chunks of the saver, each with whether it is initial.
    chunks: KVec<(&'static [u8], bool)>,
    /// Chunk of the saver before those, with the size that [`Saver::remaining()`] counts for it.
    ready: Option<(Chunk, u64)>,
    /// Bytes that [`Saver::remaining()`] counts and that do not exist.
    missing: u64,
    /// Last chunk of the saver when the device is stopped.
    tail: Option<&'static [u8]>,
    not_ready: bool,
    /// The saver or loader becomes ready while it returns that it is not.
    late: bool,
    notifier: Option<Arc<Notifier>>,
    /// Bytes that the loader has taken.
    loaded: KVec<u8>,
    /// Number of bytes that the loader takes, if it is limited.
    room: Option<usize>,
    /// The limit ends when the loader takes none.
    room_is_late: bool,
    /// Number of bytes that the loader returns in addition to those that it takes.
    excess: usize,
}

/// The device.
#[pin_data]
pub(crate) struct Fake {
    #[pin]
    script: Mutex<Script>,
    /// Lock that vfio-pci holds when it reports a reset.
    #[pin]
    pub(crate) memory_lock: Mutex<()>,
}

impl Fake {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                script <- new_mutex!(Script::default(), "vfio_kunit::Fake"),
                memory_lock <- new_mutex!((), "vfio_kunit::Fake::memory_lock"),
            }),
            GFP_KERNEL,
        )
    }

    /// Records a call, and hangs or fails as scripted.
    fn called(&self, call: Call) -> Result {
        // A variant driver takes it in a state change.
        drop(self.memory_lock.lock());
        let mut script = self.script.lock();
        match call {
            Call::Next(_) | Call::Remaining => script.asked.push(call, GFP_KERNEL)?,
            _ => script.calls.push(call, GFP_KERNEL)?,
        }
        if script.hold == Some(call) {
            script.held = true;
            while script.hold == Some(call) {
                drop(script);
                fsleep(Delta::from_millis(1));
                script = self.script.lock();
            }
        }
        let mut fails = false;
        for (failing, before) in &mut script.failures {
            if *failing == call {
                match before.checked_sub(1) {
                    Some(left) => *before = left,
                    None => fails = true,
                }
            }
        }
        if !fails {
            return Ok(());
        }
        script.broken |= script.breaks;
        Err(if script.invalid { EINVAL } else { FAILURE })
    }

    /// Makes failures break the device.
    pub(crate) fn set_breaks(&self, breaks: bool) {
        self.script.lock().breaks = breaks;
    }

    /// Makes failures return `EINVAL`.
    pub(crate) fn set_invalid(&self, invalid: bool) {
        self.script.lock().invalid = invalid;
    }

    /// Returns the calls of the saver since the last call of this method.
    pub(crate) fn asked(&self) -> KVec<Call> {
        core::mem::take(&mut self.script.lock().asked)
    }

    /// Returns the calls since the last call of this method.
    pub(crate) fn calls(&self) -> KVec<Call> {
        core::mem::take(&mut self.script.lock().calls)
    }

    /// Returns the number of arcs that have begun and not ended since the last call of this method.
    pub(crate) fn open_arcs(&self) -> i32 {
        core::mem::take(&mut self.script.lock().arcs)
    }

    /// Makes a call and all later equal calls fail.
    pub(crate) fn fail(&self, call: Call, before: usize) -> Result {
        Ok(self
            .script
            .lock()
            .failures
            .push((call, before), GFP_KERNEL)?)
    }

    /// Makes all calls succeed again.
    pub(crate) fn clear_failures(&self) {
        self.script.lock().failures.clear();
    }

    /// Sets the call that hangs, if any.
    pub(crate) fn hold(&self, call: Option<Call>) {
        let mut script = self.script.lock();
        script.hold = call;
        script.held = false;
    }

    /// Returns whether the call in `hold` was made and hangs.
    pub(crate) fn is_held(&self) -> bool {
        self.script.lock().held
    }

    /// Adds a chunk to the saver.
    pub(crate) fn provide(&self, chunk: &'static [u8], initial: bool) -> Result {
        let mut script = self.script.lock();
        script.chunks.push((chunk, initial), GFP_KERNEL)?;
        let notifier = script.notifier.clone();
        drop(script);
        if let Some(notifier) = notifier {
            notifier.notify();
        }
        Ok(())
    }

    /// Removes all chunks of the saver.
    fn provide_nothing(&self) {
        let mut script = self.script.lock();
        script.missing = 0;
        script.chunks.clear();
        script.tail = None;
        script.room = None;
        script.room_is_late = false;
        script.excess = 0;
    }

    /// Sets the first chunk of the saver, which counts as `size` bytes. A chunk that does not count
    /// is not announced either.
    pub(crate) fn provide_chunk(&self, chunk: Chunk, size: u64) {
        let mut script = self.script.lock();
        script.ready = Some((chunk, size));
        let notifier = script.notifier.clone();
        drop(script);
        if let Some(notifier) = notifier.filter(|_| size > 0) {
            notifier.notify();
        }
    }

    /// Sets how many bytes the saver counts that do not exist.
    pub(crate) fn set_missing(&self, size: u64) {
        self.script.lock().missing = size;
    }

    /// Returns the notifier of the session.
    pub(crate) fn notifier(&self) -> Result<Arc<Notifier>> {
        self.script.lock().notifier.clone().ok_or(EINVAL)
    }

    /// Sets the last chunk of the saver, for when the device is stopped.
    pub(crate) fn provide_tail(&self, chunk: &'static [u8]) {
        self.script.lock().tail = Some(chunk);
    }

    /// Sets whether saver and loader are ready, and wakes the waiters.
    pub(crate) fn set_ready(&self, ready: bool) {
        let mut script = self.script.lock();
        script.not_ready = !ready;
        let notifier = script.notifier.clone();
        drop(script);
        if let Some(notifier) = notifier.filter(|_| ready) {
            notifier.notify();
        }
    }

    /// Makes the saver or loader ready after its check and before the engine waits.
    pub(crate) fn be_late(&self) {
        let mut script = self.script.lock();
        script.not_ready = true;
        script.late = true;
    }

    /// Returns whether saver and loader are ready.
    fn is_ready(&self) -> bool {
        let mut script = self.script.lock();
        let ready = !script.not_ready;
        let late = core::mem::take(&mut script.late);
        drop(script);
        if late {
            self.set_ready(true);
        }
        ready
    }

    /// Sets the number of bytes that the loader takes, and wakes the waiters.
    pub(crate) fn set_room(&self, room: Option<usize>) {
        let mut script = self.script.lock();
        script.room = room;
        let notifier = script.notifier.clone();
        drop(script);
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }

    /// Makes the loader take all bytes after it has taken none and before the engine waits.
    pub(crate) fn make_room_late(&self) {
        let mut script = self.script.lock();
        script.room = Some(0);
        script.room_is_late = true;
    }

    /// Sets the number of bytes that the loader returns in addition to those that it takes.
    pub(crate) fn set_excess(&self, excess: usize) {
        self.script.lock().excess = excess;
    }

    /// Returns the bytes that the loader has taken since the last call of this method.
    pub(crate) fn loaded_bytes(&self) -> KVec<u8> {
        core::mem::take(&mut self.script.lock().loaded)
    }
}

#[vtable]
impl Migratable for Fake {
    type Saver = FakeSaver;
    type Loader = FakeLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    fn begin_arc(&self, _from: State, _to: State) -> Result {
        self.script.lock().arcs += 1;
        Ok(())
    }

    fn end_arc(&self) {
        self.script.lock().arcs -= 1;
    }

    fn quiesce_p2p(&self) -> Result {
        self.called(Call::QuiesceP2p)
    }

    fn resume_p2p(&self) -> Result {
        self.called(Call::ResumeP2p)
    }

    fn stop(&self) -> Result {
        self.called(Call::Stop)
    }

    fn start(&self) -> Result {
        self.called(Call::Start)
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FakeSaver> {
        this.called(Call::PreCopy)?;
        this.script.lock().notifier = Some(notifier);
        Ok(FakeSaver(this.clone()))
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FakeSaver> {
        this.called(Call::Save)?;
        this.script.lock().notifier = Some(notifier);
        Ok(FakeSaver(this.clone()))
    }

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FakeLoader> {
        this.called(Call::Load)?;
        this.script.lock().notifier = Some(notifier);
        Ok(FakeLoader(this.clone()))
    }

    fn loaded(&self, _loader: &mut FakeLoader) -> Result {
        self.called(Call::Loaded)
    }

    fn data_size(&self) -> Result<u64> {
        self.called(Call::DataSize)?;
        Ok(DATA_SIZE)
    }

    fn is_broken(&self) -> bool {
        self.script.lock().broken
    }

    fn halt(&self) {
        let _ = self.called(Call::Halt);
    }

    fn reset(&self) -> Result {
        self.called(Call::Reset)?;
        self.script.lock().broken = false;
        Ok(())
    }
}

/// Saver that returns the chunks of the script.
pub(crate) struct FakeSaver(Arc<Fake>);

impl Saver for FakeSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        self.0.called(Call::Next(phase))?;
        if !self.0.is_ready() {
            return Ok(Next::NotReady);
        }
        let mut script = self.0.script.lock();
        if let Some((chunk, _)) = script.ready.take() {
            return Ok(Next::Chunk(chunk));
        }
        let (bytes, initial) = if !script.chunks.is_empty() {
            script.chunks.remove(0)?
        } else if phase == Phase::PreCopy {
            return Ok(Next::End);
        } else if let Some(tail) = script.tail.take() {
            (tail, false)
        } else {
            return Ok(Next::End);
        };
        drop(script);
        // A head and a body, so that both are read.
        let (head, body) = bytes.split_at(bytes.len() / 2);
        let mut rest = KVVec::new();
        rest.extend_from_slice(body, GFP_KERNEL)?;
        let chunk = Chunk::new(head)?.bytes(rest);
        Ok(Next::Chunk(if initial { chunk.initial() } else { chunk }))
    }

    fn remaining(&self) -> Result<Remaining> {
        self.0.called(Call::Remaining)?;
        let script = self.0.script.lock();
        let size = |which: bool| {
            let chunks = script
                .chunks
                .iter()
                .filter(|(_, initial)| *initial == which);
            chunks.map(|(bytes, _)| bytes.len() as u64).sum()
        };
        let ready = script.ready.as_ref().map_or(0, |(_, size)| *size);
        Ok(Remaining {
            initial: size(true) + ready + script.missing,
            dirty: size(false),
            tail: script.tail.map_or(0, |tail| tail.len() as u64),
            reinits: 0,
        })
    }

    fn seal(&mut self) -> Result {
        self.0.called(Call::Seal)
    }
}

impl Drop for FakeSaver {
    fn drop(&mut self) {
        let notifier = self.0.script.lock().notifier.take();
        drop(notifier);
        let _ = self.0.called(Call::SaverDropped);
    }
}

/// Loader that records its bytes.
pub(crate) struct FakeLoader(Arc<Fake>);

impl Loader for FakeLoader {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.called(Call::Write)?;
        let mut script = self.0.script.lock();
        let taken = script.room.unwrap_or(usize::MAX).min(bytes.len());
        script.room = script.room.map(|room| room - taken);
        script
            .loaded
            .extend_from_slice(&bytes[..taken], GFP_KERNEL)?;
        let is_late = taken == 0 && core::mem::take(&mut script.room_is_late);
        let returned = taken + script.excess;
        drop(script);
        if is_late {
            self.0.set_room(None);
        }
        Ok(returned)
    }

    fn is_ready(&self) -> bool {
        let _ = self.0.called(Call::LoaderReady);
        self.0.is_ready()
    }
}

impl Drop for FakeLoader {
    fn drop(&mut self) {
        let notifier = self.0.script.lock().notifier.take();
        drop(notifier);
        let _ = self.0.called(Call::LoaderDropped);
    }
}

/// Number of devices created so far.
static DEVICES: Atomic<u32> = Atomic::new(0);

/// The device with its engine, like in a driver.
#[pin_data(PinnedDrop)]
pub(crate) struct Rig {
    #[pin]
    pub(crate) engine: Engine<Fake>,
    pub(crate) fake: Arc<Fake>,
    device: ARef<Device>,
    /// Dropped after the fields below.
    _parent: faux::Registration,
}

impl Rig {
    /// Creates a device of this shape, in `RUNNING`.
    pub(crate) fn new(flags: Flags) -> Result<Arc<Self>> {
        Self::with_device(flags, flags)
    }

    /// Creates an engine of one shape, whose device claims to have another one.
    pub(crate) fn with_device(flags: Flags, claimed: Flags) -> Result<Arc<Self>> {
        // A failed test may have left its device behind.
        let number = DEVICES.fetch_add(1, Relaxed);
        let name = CString::try_from_fmt(fmt!("vfio_kunit.{number}"))?;
        let parent = faux::Registration::new(&name, None)?;
        let parent_device: &device::Device<device::Bound> = parent.as_ref().as_ref();
        // SAFETY: `Device` is a transparent wrapper of a `struct device`, and the parent outlives
        // the device.
        let raw = unsafe {
            let parent = core::ptr::from_ref(parent_device).cast_mut();
            core_side::vfio_kunit_alloc_device(parent.cast(), claimed.as_raw() as u32)
        };
        let raw = NonNull::new(from_err_ptr(raw)?).ok_or(ENOMEM)?;
        // SAFETY: `vfio_kunit_alloc_device()` allocates by `_vfio_alloc_device()` and returns the
        // only reference.
        let device = unsafe { ARef::from_raw(raw.cast::<Device>()) };
        Arc::pin_init(
            try_pin_init!(Self {
                engine <- Engine::new(flags),
                fake: Fake::new()?,
                device,
                _parent: parent,
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the device as open. It is open as long as it has a [`Rig`].
    fn open(&self) -> &Device<Open> {
        let device: &Device = &self.device;
        // SAFETY: The device exists, and only the destructor of the rig closes it.
        unsafe { Device::from_raw(device.as_raw()) }
    }

    /// Returns the number of references to the `struct vfio_device`.
    pub(crate) fn device_references(&self) -> u32 {
        let device: &Device = &self.device;
        // SAFETY: The device exists.
        unsafe { core_side::vfio_kunit_device_references(device.as_raw().cast()) }
    }

    /// Requests a state by its uAPI value.
    pub(crate) fn request(&self, target: u32) -> Result<Option<DataFd>> {
        let file = self.engine.set_state(&self.fake, self.open(), target)?;
        Ok(file.map(|file| DataFd(Some(file))))
    }

    /// Requests a state.
    pub(crate) fn set(&self, target: State) -> Result<Option<DataFd>> {
        self.request(target.as_raw())
    }

    /// Changes the state from `RUNNING` to another one, and clears the recorded calls.
    pub(crate) fn enter(&self, state: State) -> Result<Option<DataFd>> {
        self.restart();
        let fd = if state == State::Error {
            self.break_down()?;
            None
        } else {
            self.set(state)?
        };
        drop(self.fake.calls());
        drop(self.fake.asked());
        Ok(fd)
    }

    /// Brings the device into `ERROR`.
    ///
    /// Fails with `ENOTSUPP` if this is impossible: no arc of the shape has a part to undo.
    fn break_down(&self) -> Result {
        let flags = self.engine.flags();
        let (from, to, failing, undo) = match (flags.p2p(), flags.pre_copy()) {
            (false, _) => (State::Running, State::Stop, Call::Stop, Call::ResumeP2p),
            (true, true) => (State::PreCopyP2p, State::StopCopy, Call::Seal, Call::Start),
            (true, false) => return Err(ENOTSUPP),
        };
        drop(self.set(from)?);
        self.fake.fail(failing, 0)?;
        self.fake.fail(undo, 0)?;
        let done = self.set(to);
        self.fake.clear_failures();
        match done {
            Err(_) => Ok(()),
            Ok(_) => Err(EINVAL),
        }
    }

    /// Starts again, like after a close and an open.
    pub(crate) fn restart(&self) {
        self.fake.clear_failures();
        self.fake.provide_nothing();
        self.engine.close();
        let _ = self.engine.open();
        drop(self.fake.calls());
        drop(self.fake.asked());
    }
}

#[pinned_drop]
impl PinnedDrop for Rig {
    fn drop(self: Pin<&mut Self>) {
        self.engine.close();
    }
}

/// A data_fd.
pub(crate) struct DataFd(Option<ARef<File>>);

impl DataFd {
    fn as_ptr(&self) -> *mut c_void {
        let file = self.0.as_ref();
        file.map_or(core::ptr::null_mut(), |file| file.as_ptr().cast())
    }

    /// Converts the return value of a system call.
    fn result(done: isize) -> Result<usize> {
        usize::try_from(done).map_err(|_| Error::from_errno(done as i32))
    }

    /// Reads to a user address.
    pub(crate) fn read(&self, to: usize, size: usize) -> Result<usize> {
        // SAFETY: The file is live and has the operations of a saving session. Any address is
        // valid.
        Self::result(unsafe { core_side::vfio_kunit_read(self.as_ptr(), to, size, false) })
    }

    /// Reads to a user address, but does not wait.
    pub(crate) fn read_nonblock(&self, to: usize, size: usize) -> Result<usize> {
        // SAFETY: As in `read()`.
        Self::result(unsafe { core_side::vfio_kunit_read(self.as_ptr(), to, size, true) })
    }

    /// Writes from a user address.
    pub(crate) fn write(&self, from: usize, size: usize) -> Result<usize> {
        // SAFETY: The file is live and has the operations of a resuming session. Any address is
        // valid.
        Self::result(unsafe { core_side::vfio_kunit_write(self.as_ptr(), from, size, false) })
    }

    /// Writes from a user address, but does not wait.
    pub(crate) fn write_nonblock(&self, from: usize, size: usize) -> Result<usize> {
        // SAFETY: As in `write()`.
        Self::result(unsafe { core_side::vfio_kunit_write(self.as_ptr(), from, size, true) })
    }

    /// Returns the events that poll() returns.
    pub(crate) fn poll(&self) -> u32 {
        // SAFETY: The file is live.
        unsafe { core_side::vfio_kunit_poll(self.as_ptr()) }
    }

    /// Calls an ioctl with an argument at a user address.
    pub(crate) fn ioctl(&self, cmd: u32, arg: usize) -> Result<usize> {
        // SAFETY: The file is live and has the operations of a saving session. Any address is
        // valid.
        Self::result(unsafe { core_side::vfio_kunit_ioctl(self.as_ptr(), cmd, arg) } as isize)
    }
}

impl Drop for DataFd {
    fn drop(&mut self) {
        if let Some(file) = self.0.take() {
            let file = ARef::into_raw(file);
            // SAFETY: The reference that was owned is given up.
            unsafe { core_side::vfio_kunit_close(file.as_ptr().cast()) };
        }
    }
}

/// User memory, which is unmapped when the test ends.
pub(crate) struct UserMemory {
    pub(crate) addr: usize,
    size: usize,
}

impl UserMemory {
    pub(crate) fn new(size: usize) -> Result<Self> {
        match core_side::vfio_kunit_user_memory(size) {
            0 => Err(ENOMEM),
            addr => Ok(Self { addr, size }),
        }
    }

    fn slice(&self) -> UserSlice {
        UserSlice::new(UserPtr::from_addr(self.addr), self.size)
    }

    /// Writes to the start of the user memory.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result {
        self.slice().writer().write_slice(bytes)
    }

    /// Reads from the start of the user memory.
    pub(crate) fn get<const SIZE: usize>(&self) -> Result<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        self.slice().reader().read_slice(&mut bytes)?;
        Ok(bytes)
    }
}

/// Returns the number of lines of the kernel log that contain a text.
pub(crate) fn logged(text: &CStr) -> u32 {
    // SAFETY: The text is a string.
    unsafe { core_side::vfio_kunit_logged(text.as_char_ptr()) }
}

/// Waits until a condition is true. Fails with `ETIMEDOUT` if that takes too long.
pub(crate) fn wait_until(is_so: impl Fn() -> bool) -> Result {
    for _ in 0..PATIENCE {
        if is_so() {
            return Ok(());
        }
        fsleep(Delta::from_millis(1));
    }
    Err(ETIMEDOUT)
}

/// A concurrent operation and its result.
#[pin_data]
pub(crate) struct Job<T: Send + Unpin + 'static> {
    #[pin]
    result: Mutex<Option<T>>,
}

impl<T: Send + Unpin + 'static> Job<T> {
    /// Starts the operation.
    pub(crate) fn begin(work: impl FnOnce() -> T + Send + 'static) -> Result<Arc<Self>> {
        let job = Arc::pin_init(
            pin_init!(Self {
                result <- new_mutex!(None, "vfio_kunit::Job"),
            }),
            GFP_KERNEL,
        )?;
        let other = job.clone();
        workqueue::system_long().try_spawn(GFP_KERNEL, move || {
            let result = work();
            *other.result.lock() = Some(result);
        })?;
        Ok(job)
    }

    /// Returns whether the operation has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.result.lock().is_some()
    }

    /// Waits for the result. Fails with `ETIMEDOUT` if that takes too long.
    pub(crate) fn wait(&self) -> Result<T> {
        wait_until(|| self.is_done())?;
        self.result.lock().take().ok_or(EINVAL)
    }
}
