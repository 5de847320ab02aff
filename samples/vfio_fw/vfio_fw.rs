// SPDX-License-Identifier: GPL-2.0

//! A migratable VFIO device with firmware, which saves and loads the state in bulk.
//!
//! A template for drivers of devices with firmware that is slow and may fail. The driver sends it
//! commands, like that of mlx5:
//!
//! * QUERY returns the size of the next image.
//! * SUSPEND and RESUME stop and start a part of the device.
//! * SAVE makes an image of the changes. The first one has the whole state.
//! * LOAD loads an image.
//!
//! The driver waits for SAVE and LOAD without holding up anything: their interrupt wakes the user
//! of the data_fd. It waits for the other commands in its methods, for a limited time. A command
//! that is refused changes nothing. If the result of a command is unknown, the device is broken
//! until it is reset.
//!
//! The stream has a record for each image, and a last record with the configuration space. A record
//! has a header, with a tag and the length of the rest, both of 64 bits.
//!
//! `firmware` simulates the device. On a host, these files of a device in sysfs make it slow or
//! fail: `delay_ms`, the time that each command takes; `timeout_ms`, the time after which the
//! driver's mailbox gives up on it; `refuse` and `hang`, the commands that fail and that never end.
//! A command has a bit in both: 1 for QUERY, 2 for SUSPEND, 4 for RESUME, 8 for SAVE, 16 for LOAD.

mod firmware;

use firmware::{
    Command,
    Content,
    Faults,
    Firmware,
    Unit,
    MAX_IMAGE,
    SIZE, //
};
use kernel::{
    io::poll::read_poll_timeout,
    prelude::*,
    sync::{
        atomic::{
            AtomicFlag,
            Relaxed, //
        },
        Arc, //
    },
    time::Delta, //
};
use vfio::{
    cond_resched_killable,
    prelude::*, //
};

/// The tags of the records: the first image, other images, and the configuration space at the end.
const FIRST: u64 = u64::from_be_bytes(*b"FW FIRST");
const NEXT: u64 = u64::from_be_bytes(*b"FW  NEXT");
const LAST: u64 = u64::from_be_bytes(*b"FW  LAST");

/// The size of the header of a record in bytes.
const HEADER: usize = 2 * size_of::<u64>();

/// The size of the last record in bytes.
const LAST_RECORD: usize = HEADER + config_space::SIZE;

/// Returns the header of a record.
fn header(tag: u64, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&tag.to_le_bytes());
    header[8..].copy_from_slice(&(length as u64).to_le_bytes());
    header
}

/// Returns the tag and the length in the header of a record.
fn parse(header: &[u8]) -> Result<(u64, usize)> {
    let (tag, length) = header.split_first_chunk().ok_or(EINVAL)?;
    let length = length.try_into().map_err(|_| EINVAL)?;
    Ok((
        u64::from_le_bytes(*tag),
        usize::try_from(u64::from_le_bytes(length))?,
    ))
}

/// Returns the length after a header that comes from another host.
fn checked_length(header: &[u8]) -> Result<usize> {
    match parse(header)? {
        (FIRST | NEXT, length @ 1..=MAX_IMAGE) => Ok(length),
        (LAST, config_space::SIZE) => Ok(config_space::SIZE),
        _ => Err(EINVAL),
    }
}

/// Returns the size of the record of an image, zero if there is none.
fn record_size(image: usize) -> u64 {
    match image {
        0 => 0,
        size => (HEADER + size) as u64,
    }
}

vfio::module_mdev_driver! {
    type: Fw,
    name: "vfio_fw",
    authors: ["The vfio_mock authors"],
    description: "A migratable VFIO device with firmware",
    license: "GPL",
}

/// A device, from its creation to its removal.
struct Fw {
    faults: Arc<Faults>,
}

impl mdev::Driver for Fw {
    const TYPES: &'static [mdev::Type] = &[mdev::Type {
        name: c"64K",
        pretty_name: c"Device with firmware",
        description: c"A device with 64 KiB of memory, which its firmware saves and loads",
    }];
    const ATTRIBUTES: &'static [mdev::Attribute<Self>] = &[
        mdev::Attribute::Number {
            name: c"delay_ms",
            show: |fw| fw.faults.delay_ms(),
            store: |fw, delay| fw.faults.set_delay_ms(delay),
        },
        mdev::Attribute::Number {
            name: c"timeout_ms",
            show: |fw| fw.faults.timeout_ms(),
            store: |fw, timeout| fw.faults.set_timeout_ms(timeout),
        },
        mdev::Attribute::Number {
            name: c"refuse",
            show: |fw| fw.faults.refused(),
            store: |fw, commands| fw.faults.set_refused(commands),
        },
        mdev::Attribute::Number {
            name: c"hang",
            show: |fw| fw.faults.hanging(),
            store: |fw, commands| fw.faults.set_hanging(commands),
        },
    ];
    const MAX_INSTANCES: u32 = 16;

    fn probe(_type_index: usize) -> impl PinInit<Self, Error> {
        Ok(Self {
            faults: Faults::new()?,
        })
    }
}

#[vtable]
impl emulated::Operations for Fw {
    type OpenData = Chip;
    const NAME: &'static CStr = c"vfio_fw";

    fn config_space(&self) -> Result<ConfigSpace> {
        // The device id is from the range that QEMU keeps for experiments.
        ConfigSpace::new(config_space::Id {
            vendor: 0x1af4,
            device: 0x10f4,
            class: 0xff_0000,
        })
        .memory_bar(region::BAR0 as usize, SIZE as u64, false)
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
        try_pin_init!(Chip {
            function,
            firmware: Firmware::new(self.faults.clone())?,
            is_lost: AtomicFlag::new(false),
        }? Error)
    }

    fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
        chip.firmware.read(pos.region_offset as usize, to)
    }

    fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
        chip.firmware.write(pos.region_offset as usize, from)
    }
}

/// A device, from the first open to the last close.
#[pin_data]
struct Chip {
    function: Arc<Function>,
    firmware: Arc<Firmware>,
    /// The driver does not know what the firmware has done.
    is_lost: AtomicFlag,
}

impl Chip {
    /// Returns the firmware.
    ///
    /// Fails with `EIO`, without another timeout, if it is lost.
    fn firmware(&self) -> Result<&Firmware> {
        match self.is_lost.load(Relaxed) {
            true => Err(EIO),
            false => Ok(&self.firmware),
        }
    }

    /// Returns the answer to a command that has ended.
    fn answer<T>(&self, command: Command<T>) -> Result<T> {
        let answer = command.answer();
        if matches!(answer, Err(ETIMEDOUT)) {
            self.is_lost.store(true, Relaxed);
        }
        answer
    }

    /// Posts a command and waits for its answer. The task can be killed meanwhile.
    fn execute<T>(&self, post: impl FnOnce(&Firmware) -> Result<Command<T>>) -> Result<T> {
        let command = post(self.firmware()?)?;
        read_poll_timeout(
            || cond_resched_killable().map(|()| command.has_ended()),
            |has_ended| *has_ended,
            Delta::from_millis(1),
            self.firmware.longest(),
        )
        .inspect_err(|_| self.is_lost.store(true, Relaxed))?;
        self.answer(command)
    }
}

#[vtable]
impl Migratable for Chip {
    type Saver = FwSaver;
    type Loader = FwLoader;
    const FLAGS: Flags = Flags::STOP_COPY.with_p2p().with_pre_copy();

    fn quiesce_p2p(&self) -> Result {
        self.execute(|firmware| firmware.suspend(Unit::Initiator))
    }

    fn resume_p2p(&self) -> Result {
        self.execute(|firmware| firmware.resume(Unit::Initiator))
    }

    fn stop(&self) -> Result {
        self.execute(|firmware| firmware.suspend(Unit::Responder))
    }

    fn start(&self) -> Result {
        self.execute(|firmware| firmware.resume(Unit::Responder))
    }

    fn pre_copy(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FwSaver> {
        Self::save(this, notifier)
    }

    fn save(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FwSaver> {
        // The state change fails if the firmware cannot save.
        this.execute(|firmware| firmware.query(Content::All))?;
        this.firmware.track(notifier.clone());
        Ok(FwSaver {
            chip: this.clone(),
            notifier,
            saving: None,
            has_first: false,
            has_ended: false,
        })
    }

    fn load(this: &Arc<Self>, notifier: Arc<Notifier>) -> Result<FwLoader> {
        Ok(FwLoader {
            chip: this.clone(),
            notifier,
            records: Records::with_header(HEADER, checked_length)?,
            loading: None,
            has_first: false,
            has_ended: false,
        })
    }

    // The last record is taken only after LOAD of the last image has ended.
    fn loaded(&self, loader: &mut FwLoader) -> Result {
        loader.has_ended.then_some(()).ok_or(EINVAL)
    }

    fn data_size(&self) -> Result<u64> {
        let image = self.execute(|firmware| firmware.query(Content::All))?;
        Ok(record_size(image) + LAST_RECORD as u64)
    }

    fn is_broken(&self) -> bool {
        self.is_lost.load(Relaxed)
    }

    fn reset(&self) -> Result {
        self.firmware.reset();
        self.is_lost.store(false, Relaxed);
        Ok(())
    }
}

/// Saver that streams images of the firmware.
struct FwSaver {
    chip: Arc<Chip>,
    /// Notified when SAVE ends, and when the device changes.
    notifier: Arc<Notifier>,
    /// SAVE under way.
    saving: Option<Command<KVVec<u8>>>,
    /// The first image was returned.
    has_first: bool,
    /// The last record was returned.
    has_ended: bool,
}

impl Saver for FwSaver {
    fn next(&mut self, phase: Phase) -> Result<Next> {
        let is_last = phase == Phase::StopCopy;
        let firmware = self.chip.firmware()?;
        if self.saving.is_none() && firmware.has_changed() {
            self.saving = Some(firmware.save(is_last, Some(self.notifier.clone()))?);
        }
        if let Some(saving) = self.saving.take_if(|saving| saving.has_ended()) {
            // After a failure, the next read() tries again: the firmware still has the changes.
            let image = self.chip.answer(saving)?;
            let is_first = !core::mem::replace(&mut self.has_first, true);
            let tag = if is_first { FIRST } else { NEXT };
            let chunk = Chunk::new(&header(tag, image.len()))?.bytes(image);
            return Ok(Next::Chunk(if is_first { chunk.initial() } else { chunk }));
        }
        if self.saving.is_some() {
            return Ok(Next::NotReady);
        }
        if !is_last || self.has_ended {
            return Ok(Next::End);
        }
        let mut config = KVVec::new();
        config.extend_from_slice(&self.chip.function.save_config(), GFP_KERNEL_ACCOUNT)?;
        self.has_ended = true;
        let chunk = Chunk::new(&header(LAST, config.len()))?;
        Ok(Next::Chunk(chunk.bytes(config)))
    }

    fn remaining(&self) -> Result<Remaining> {
        let begun = self.saving.as_ref().map_or(0, Command::image_size);
        let changes = self
            .chip
            .execute(|firmware| firmware.query(Content::Changes))?;
        let images = record_size(begun) + record_size(changes);
        Ok(Remaining {
            initial: if self.has_first { 0 } else { images },
            dirty: if self.has_first { images } else { 0 },
            tail: if self.has_ended {
                0
            } else {
                LAST_RECORD as u64
            },
            reinits: 0,
        })
    }

    fn seal(&mut self) -> Result {
        // The state change fails if the firmware cannot save the rest.
        self.chip
            .execute(|firmware| firmware.query(Content::Changes))?;
        Ok(())
    }
}

impl Drop for FwSaver {
    fn drop(&mut self) {
        self.chip.firmware.untrack();
    }
}

/// Loader that loads images into the firmware, one after the other.
struct FwLoader {
    chip: Arc<Chip>,
    /// Notified when LOAD ends.
    notifier: Arc<Notifier>,
    records: Records,
    /// LOAD under way.
    loading: Option<Command<()>>,
    /// The first image was loaded.
    has_first: bool,
    /// The last record was loaded.
    has_ended: bool,
}

impl Loader for FwLoader {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if !self.is_ready() {
            // The engine waits for the interrupt, without a lock.
            return Ok(0);
        }
        if let Some(loading) = self.loading.take() {
            self.chip.answer(loading)?;
        }
        // Nothing may follow the last record.
        if self.has_ended {
            return Err(EINVAL);
        }
        let chip = &self.chip;
        self.records.feed(bytes, |record| {
            let (header, body) = record.split_at_checked(HEADER).ok_or(EINVAL)?;
            match (parse(header)?.0, self.has_first) {
                (FIRST, false) | (NEXT, true) => {
                    let firmware = chip.firmware()?;
                    self.loading = Some(firmware.load(body, Some(self.notifier.clone()))?);
                    self.has_first = true;
                }
                (LAST, true) => {
                    let config = body.first_chunk().ok_or(EINVAL)?;
                    if !chip.function.accepts_config(config) {
                        return Err(EINVAL);
                    }
                    self.has_ended = true;
                }
                _ => return Err(EINVAL),
            }
            Ok(())
        })
    }

    fn is_ready(&self) -> bool {
        let mut loading = self.loading.iter();
        loading.all(|loading| loading.has_ended())
    }
}
