// SPDX-License-Identifier: GPL-2.0

//! The types of devices that an administrator can create, and their settings.
//!
//! They are the same for all front ends.
//!
//! C headers: [`include/linux/device.h`](srctree/include/linux/device.h),
//! [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h)

use super::{
    Operations,
    Registration, //
};
use crate::bindings;
use kernel::{
    error::from_result,
    fmt::{
        self,
        Write, //
    },
    page::PAGE_SIZE,
    prelude::*,
    str::{
        BStr,
        CString,
        Formatter, //
    },
    types::ForeignOwnable, //
};

/// A type of device.
pub struct Type {
    /// The name, with which the administrator selects the type.
    pub name: &'static CStr,
    /// A name to display.
    pub pretty_name: &'static CStr,
    /// A description to display.
    pub description: &'static CStr,
}

/// A setting of a device on its host: a file in sysfs, in the directory of the device or in one
/// [below](Driver::FOLDER) it.
///
/// The administrator and `mdevctl` can read and write it from before the first open to the removal
/// of the device, or of its driver. The guest cannot access it. All functions may sleep.
pub enum Attribute<T> {
    /// A number. Writing anything other than a 64-bit number fails with `EINVAL` and does not call
    /// the driver.
    Number {
        /// The name of the file.
        name: &'static CStr,
        /// Returns the number.
        show: fn(&T) -> u64,
        /// Sets a new number. An error is returned from write(); then the setting must not have
        /// changed.
        store: fn(&T, u64) -> Result,
    },
    /// A line of text.
    Text {
        /// The name of the file.
        name: &'static CStr,
        /// Writes the line, without a newline at its end. It must fit into a page.
        show: fn(&T, &mut dyn fmt::Write) -> fmt::Result,
        /// Sets a new text, from which white space at both ends was removed. An error is returned
        /// from write(); then the setting must not have changed.
        store: fn(&T, &str) -> Result,
    },
    /// A number that can only be read.
    Counter {
        /// The name of the file.
        name: &'static CStr,
        /// Returns the number.
        show: fn(&T) -> u64,
    },
    /// A number that is fixed when the device is created, by its [defaults](Driver::defaults), and
    /// can then only be read.
    Fixed {
        /// The name of the file.
        name: &'static CStr,
        /// Returns the number.
        show: fn(&T) -> u64,
        /// Sets the number. Called before all other methods of the driver, except for
        /// [`probe()`](Driver::probe).
        store: fn(&T, u64) -> Result,
    },
}

impl<T> Attribute<T> {
    fn name(&self) -> &'static CStr {
        match self {
            Self::Number { name, .. }
            | Self::Text { name, .. }
            | Self::Counter { name, .. }
            | Self::Fixed { name, .. } => name,
        }
    }

    fn is_writable(&self) -> bool {
        matches!(self, Self::Number { .. } | Self::Text { .. })
    }

    fn mode(&self) -> bindings::umode_t {
        if self.is_writable() {
            0o644
        } else {
            0o444
        }
    }

    /// Sets the value from a text.
    fn set(&self, data: &T, text: &CStr) -> Result {
        match self {
            Self::Number { store, .. } | Self::Fixed { store, .. } => {
                let mut value = 0;
                // SAFETY: It is a string.
                if unsafe { bindings::kstrtoull(text.as_char_ptr(), 0, &mut value) } != 0 {
                    return Err(EINVAL);
                }
                store(data, value)
            }
            Self::Text { store, .. } => store(data, text.to_str()?.trim_ascii()),
            Self::Counter { .. } => Err(EPERM),
        }
    }
}

/// A driver whose devices an administrator creates, on the bus of a front end.
///
/// # Examples
///
/// A driver with two types of devices. Its [`Operations`] implement the accesses.
///
/// ```
/// struct TwoSizes {
///     pages: usize,
/// }
///
/// impl mdev::Driver for TwoSizes {
///     const TYPES: &'static [mdev::Type] = &[
///         mdev::Type {
///             name: c"64K",
///             pretty_name: c"Small",
///             description: c"A device with 64 KiB of memory",
///         },
///         mdev::Type {
///             name: c"1M",
///             pretty_name: c"Large",
///             description: c"A device with 1 MiB of memory",
///         },
///     ];
///     const MAX_INSTANCES: u32 = 16;
///
///     fn probe(type_index: usize) -> impl PinInit<Self, Error> {
///         let pages = [16, 256].get(type_index).copied().ok_or(EINVAL)?;
///         Ok(TwoSizes { pages })
///     }
/// }
/// #
/// # #[vtable]
/// # impl emulated::Operations for TwoSizes {
/// #     type OpenData = Chip;
/// #     const NAME: &'static CStr = c"two_sizes";
/// #
/// #     fn config_space(&self) -> Result<ConfigSpace> {
/// #         Note.config_space()
/// #     }
/// #
/// #     fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
/// #         Note.open(function)
/// #     }
/// #
/// #     fn read(chip: &Chip, pos: Position, to: &mut [u8]) -> Result {
/// #         Note::read(chip, pos, to)
/// #     }
/// #
/// #     fn write(chip: &Chip, pos: Position, from: &[u8]) -> Result {
/// #         Note::write(chip, pos, from)
/// #     }
/// # }
/// ```
pub trait Driver: Operations {
    /// The types of devices that can be created.
    const TYPES: &'static [Type];

    /// The settings of each device.
    const ATTRIBUTES: &'static [Attribute<Self>] = &[];

    /// The directory of the settings in that of the device. By default they are in the latter.
    const FOLDER: Option<&'static CStr> = None;

    /// Returns the values of attributes with which each device begins: `NAME=VALUE`, separated by
    /// commas, such as a [parameter of the module](crate::module_param). If one is invalid, no
    /// device can be created.
    fn defaults() -> &'static CStr {
        c""
    }

    /// Maximum number of devices of all types at the same time, on the bus of each front end.
    const MAX_INSTANCES: u32;

    /// Returns a lower maximum, such as a [parameter of the module](crate::module_param). Numbers
    /// above [`MAX_INSTANCES`](Self::MAX_INSTANCES) have no effect.
    fn max_instances() -> u32 {
        Self::MAX_INSTANCES
    }

    /// Returns an initializer for the data of a new device of the type `TYPES[type_index]`.
    ///
    /// Called when an administrator creates the device. An error is returned to the administrator.
    /// A function of [`soft_pci`](crate::soft_pci) exists without its driver: the crate calls this
    /// once for the configuration space, and again whenever the driver is bound to the function.
    /// May sleep.
    fn probe(type_index: usize) -> impl PinInit<Self, Error>;
}

/// The C representation of a file in sysfs.
#[repr(C)]
struct File<T: 'static> {
    raw: bindings::device_attribute,
    attribute: &'static Attribute<T>,
}

/// The C representation of the files of a driver's devices.
pub(crate) struct Files<T: 'static> {
    /// The files that the other fields point to.
    _files: KVec<File<T>>,
    /// Ends with a null.
    _attributes: KVec<*mut bindings::attribute>,
    _group: KBox<bindings::attribute_group>,
    /// Ends with a null.
    pub(crate) groups: KVec<*const bindings::attribute_group>,
}

impl<T: Driver> Files<T> {
    /// Creates the files of [`Driver::ATTRIBUTES`]. The driver data of a device with these files
    /// must be a `KBox<Registration<T>>`.
    pub(crate) fn new() -> Result<Self> {
        let mut files = KVec::with_capacity(T::ATTRIBUTES.len(), GFP_KERNEL)?;
        for attribute in T::ATTRIBUTES {
            let mut raw: bindings::device_attribute = pin_init::zeroed();
            raw.attr.name = attribute.name().as_char_ptr();
            raw.attr.mode = attribute.mode();
            #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
            {
                raw.attr.key = kernel::static_lock_class!().as_ptr();
            }
            raw.__bindgen_anon_1.show = Some(Self::show);
            // The mode of a file in sysfs can be changed.
            if attribute.is_writable() {
                raw.__bindgen_anon_2.store = Some(Self::store);
            }
            files.push(File { raw, attribute }, GFP_KERNEL)?;
        }
        let mut attributes = KVec::with_capacity(files.len() + 1, GFP_KERNEL)?;
        for file in files.iter_mut() {
            attributes.push(&raw mut file.raw.attr, GFP_KERNEL)?;
        }
        attributes.push(core::ptr::null_mut(), GFP_KERNEL)?;
        let mut group: bindings::attribute_group = pin_init::zeroed();
        group.name = T::FOLDER.map_or(core::ptr::null(), |name| name.as_char_ptr());
        group.__bindgen_anon_2.attrs = attributes.as_mut_ptr();
        let group = KBox::new(group, GFP_KERNEL)?;
        let mut groups = KVec::with_capacity(2, GFP_KERNEL)?;
        groups.push(&raw const *group, GFP_KERNEL)?;
        groups.push(core::ptr::null(), GFP_KERNEL)?;
        Ok(Self {
            _files: files,
            _attributes: attributes,
            _group: group,
            groups,
        })
    }

    /// Returns the attribute and the driver's data for a call.
    ///
    /// # Safety
    ///
    /// `dev` must be bound to a driver of this type until `'a` ends, and `attr` must be one of its
    /// files.
    unsafe fn target<'a>(
        dev: *mut bindings::device,
        attr: *mut bindings::device_attribute,
    ) -> Result<(&'static Attribute<T>, &'a T)> {
        // SAFETY: `probe()` has set the driver data to the result of `into_foreign()`, before the
        // core created the files. `raw` is at the start of a `File`.
        let (registration, attribute) = unsafe {
            let registration = bindings::dev_get_drvdata(dev);
            (
                KBox::<Registration<T>>::borrow(registration.cast()),
                (*attr.cast::<File<T>>()).attribute,
            )
        };
        Ok((attribute, registration.data().ok_or(ENODEV)?))
    }

    /// # Safety
    ///
    /// Must be called by the core for a file of a bound device, which it removes before it unbinds
    /// the device. `buf` must be a page.
    unsafe extern "C" fn show(
        dev: *mut bindings::device,
        attr: *mut bindings::device_attribute,
        buf: *mut c_char,
    ) -> isize {
        from_result(|| {
            // SAFETY: By the safety requirements.
            let (attribute, data) = unsafe { Self::target(dev, attr) }?;
            // SAFETY: `buf` is a zeroed page, which no other task uses during the call.
            let page = unsafe { core::slice::from_raw_parts_mut(buf.cast::<u8>(), PAGE_SIZE) };
            let mut line = Formatter::new(page);
            match attribute {
                Attribute::Number { show, .. }
                | Attribute::Counter { show, .. }
                | Attribute::Fixed { show, .. } => write!(line, "{}", show(data)),
                Attribute::Text { show, .. } => show(data, &mut line),
            }
            .and_then(|()| line.write_str("\n"))
            .map_err(|_| EIO)?;
            Ok(line.bytes_written() as isize)
        })
    }

    /// # Safety
    ///
    /// The same as for [`show`](Self::show). `buf` must be a string of `count` bytes.
    unsafe extern "C" fn store(
        dev: *mut bindings::device,
        attr: *mut bindings::device_attribute,
        buf: *const c_char,
        count: usize,
    ) -> isize {
        from_result(|| {
            // SAFETY: By the safety requirements.
            let (attribute, data) = unsafe { Self::target(dev, attr) }?;
            // SAFETY: `buf` is a string, which kernfs has terminated with a null.
            attribute.set(data, unsafe { CStr::from_char_ptr(buf) })?;
            Ok(count as isize)
        })
    }
}

/// Sets attributes of a device that is not registered yet: `NAME=VALUE`, separated by commas. May
/// sleep.
///
/// Fails with `EINVAL`, and logs the reason, if there is no such attribute or it refuses the value.
pub(crate) fn set_defaults<T: Driver>(data: &T, text: &CStr) -> Result {
    let set = |part: &[u8]| {
        let (name, value) = core::str::from_utf8(part)?.split_once('=').ok_or(EINVAL)?;
        let mut attributes = T::ATTRIBUTES.iter();
        let attribute = attributes.find(|entry| entry.name().to_bytes() == name.as_bytes());
        let value = CString::try_from_fmt(fmt!("{value}"))?;
        attribute.ok_or(EINVAL)?.set(data, &value)
    };
    let parts = text.to_bytes().split(|byte| *byte == b',');
    for part in parts.map(<[u8]>::trim_ascii) {
        if part.is_empty() {
            continue;
        }
        if let Err(error) = set(part) {
            // Prints no control characters.
            let part = BStr::from_bytes(part);
            pr_err!("{}: invalid default \"{}\"\n", T::NAME, part);
            return Err(if error == ENOMEM { ENOMEM } else { EINVAL });
        }
    }
    Ok(())
}
