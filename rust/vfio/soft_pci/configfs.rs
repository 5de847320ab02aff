// SPDX-License-Identifier: GPL-2.0

//! The directories in configfs: an administrator creates functions with them.
//!
//! C header: [`include/linux/configfs.h`](srctree/include/linux/configfs.h)

use super::{
    bridge::{
        Address,
        Kind, //
    },
    host::{
        Host,
        Plugged, //
    },
};
use crate::{
    bindings,
    emulated::Driver,
    user::lock_killable, //
};
use core::{
    marker::PhantomData,
    mem::offset_of, //
};
use kernel::{
    configfs::{
        Attribute,
        AttributeList,
        AttributeOperations,
        Group,
        HasGroup,
        ItemType, //
    },
    error::to_result,
    fmt,
    module::this_module,
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    str::{
        kstrtobool_bytes,
        CString, //
    },
    sync::{
        lock::mutex::MutexGuard,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    types::Opaque, //
};

/// Identifiers of the files in the directory of a function.
const TYPE: u64 = 0;
const DMA_LOG: u64 = 1;
const DEFAULTS: u64 = 2;
const BIND: u64 = 3;
const POWER: u64 = 4;
const ADDRESS: u64 = 5;

/// Largest number of bytes that configfs passes to a file. It passes the rest of a longer write()
/// by itself.
const MAX_WRITE: usize = 4095;

/// Number of the files, and of the null at the end of their list.
const FILES: usize = 7;

/// Whether a function is on the bus.
enum Power {
    Off,
    On(Plugged),
    /// A task waits until the user of the device has released it.
    Unplugging(Address),
}

/// Settings of a function. They are constant while it is on the bus.
struct Choice {
    kind: Kind,
    /// Whether it is bound to its driver when it is plugged.
    bind: bool,
    power: Power,
}

/// Data of the directory of a function. Dropping it unplugs the function.
#[pin_data]
pub(super) struct Settings<T> {
    host: Arc<Host>,
    #[pin]
    choice: Mutex<Choice>,
    _driver: PhantomData<T>,
}

// SAFETY: There is no `T` in it.
unsafe impl<T> Send for Settings<T> {}

// SAFETY: As above.
unsafe impl<T> Sync for Settings<T> {}

impl<T: Driver> Settings<T> {
    fn new(host: Arc<Host>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            host,
            choice <- new_mutex!(
                Choice {
                    kind: Kind {
                        type_index: 0,
                        has_dma_log: true,
                        defaults: Arc::new(CString::try_from(c"")?, GFP_KERNEL)?,
                    },
                    bind: true,
                    power: Power::Off,
                },
                "vfio::soft_pci::Settings::choice"
            ),
            _driver: PhantomData,
        }? Error)
    }

    /// Locks the settings. Another task may hold the lock while it plugs the function, which waits
    /// while a user delays the removal of a device. A task of that user may be the caller, and must
    /// be killable.
    ///
    /// Fails with `EINTR` if the task is killed while it waits.
    fn choice(&self) -> Result<MutexGuard<'_, Choice>> {
        lock_killable(&self.choice)
    }

    /// Changes a setting. Fails with `EBUSY` while the function is on the bus.
    fn change(&self, change: impl FnOnce(&mut Choice)) -> Result {
        let mut choice = self.choice()?;
        if !matches!(choice.power, Power::Off) {
            return Err(EBUSY);
        }
        change(&mut choice);
        Ok(())
    }

    /// Plugs the function. Fails with `EBUSY` while it is being unplugged.
    fn plug(&self) -> Result {
        let mut choice = self.choice()?;
        match choice.power {
            Power::On(_) => return Ok(()),
            Power::Unplugging(_) => return Err(EBUSY),
            Power::Off => {}
        }
        let plugged = Host::plug::<T>(&self.host, choice.kind.clone(), choice.bind)?;
        choice.power = Power::On(plugged);
        Ok(())
    }

    /// Unplugs the function. Fails with `EBUSY` while another task does.
    fn unplug(&self) -> Result {
        let mut choice = self.choice()?;
        let address = match &choice.power {
            Power::Off => return Ok(()),
            Power::Unplugging(_) => return Err(EBUSY),
            Power::On(plugged) => plugged.address(),
        };
        let plugged = core::mem::replace(&mut choice.power, Power::Unplugging(address));
        // Unplugging waits for the user of the device, and the files can be read meanwhile.
        drop(choice);
        drop(plugged);
        self.choice.lock().power = Power::Off;
        Ok(())
    }
}

/// Writes a line to a page, and returns its length.
fn line(page: &mut [u8; PAGE_SIZE], text: fmt::Arguments<'_>) -> Result<usize> {
    let text = CString::try_from_fmt(fmt!("{}\n", text))?;
    let bytes = text.to_bytes();
    page.get_mut(..bytes.len())
        .ok_or(EINVAL)?
        .copy_from_slice(bytes);
    Ok(bytes.len())
}

#[vtable]
impl<T: Driver> AttributeOperations<TYPE> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        let index = this.choice()?.kind.type_index;
        let name = T::TYPES.get(index).ok_or(EINVAL)?.name;
        line(page, fmt!("{}", name.to_str()?))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        let name = page.trim_ascii();
        let type_index = T::TYPES
            .iter()
            .position(|entry| entry.name.to_bytes() == name)
            .ok_or(EINVAL)?;
        this.change(|choice| choice.kind.type_index = type_index)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<DMA_LOG> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        line(page, fmt!("{}", u8::from(this.choice()?.kind.has_dma_log)))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        let dma_log = kstrtobool_bytes(page)?;
        this.change(|choice| choice.kind.has_dma_log = dma_log)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<DEFAULTS> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        let defaults = this.choice()?.kind.defaults.clone();
        line(page, fmt!("{}", defaults.to_str()?))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        if page.len() >= MAX_WRITE {
            return Err(E2BIG);
        }
        let text = core::str::from_utf8(page.trim_ascii())?;
        let defaults = Arc::new(CString::try_from_fmt(fmt!("{text}"))?, GFP_KERNEL)?;
        let mut kind = this.choice()?.kind.clone();
        kind.defaults = defaults.clone();
        drop(Host::example::<T>(&kind)?);
        this.change(|choice| choice.kind.defaults = defaults)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<BIND> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        line(page, fmt!("{}", u8::from(this.choice()?.bind)))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        let bind = kstrtobool_bytes(page)?;
        this.change(|choice| choice.bind = bind)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<POWER> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        let is_on = !matches!(this.choice()?.power, Power::Off);
        line(page, fmt!("{}", u8::from(is_on)))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        if kstrtobool_bytes(page)? {
            this.plug()
        } else {
            this.unplug()
        }
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<ADDRESS> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        let address = match &this.choice()?.power {
            Power::Off => return Err(ENODEV),
            Power::On(plugged) => plugged.address(),
            Power::Unplugging(address) => *address,
        };
        line(page, fmt!("{address}"))
    }
}

/// The files in the directory of a function.
struct Files<T: Driver> {
    list: AttributeList<FILES, Settings<T>>,
    type_name: Attribute<TYPE, Settings<T>, Settings<T>>,
    dma_log: Attribute<DMA_LOG, Settings<T>, Settings<T>>,
    defaults: Attribute<DEFAULTS, Settings<T>, Settings<T>>,
    bind: Attribute<BIND, Settings<T>, Settings<T>>,
    power: Attribute<POWER, Settings<T>, Settings<T>>,
    address: Attribute<ADDRESS, Settings<T>, Settings<T>>,
}

impl<T: Driver> Files<T> {
    fn new() -> Result<KBox<Self>> {
        let files = Self {
            // SAFETY: The list is filled below, like by `configfs_attrs!`.
            list: unsafe { AttributeList::new() },
            type_name: Attribute::new(c"type"),
            dma_log: Attribute::new(c"dma_log"),
            defaults: Attribute::new(c"defaults"),
            bind: Attribute::new(c"bind"),
            power: Attribute::new(c"power"),
            address: Attribute::new(c"address"),
        };
        let files = KBox::new(files, GFP_KERNEL)?;
        // SAFETY: The list is not shared yet, and is dropped together with the files.
        unsafe {
            let this = extend(&files);
            this.list.add::<0, TYPE, _>(&this.type_name);
            this.list.add::<1, DMA_LOG, _>(&this.dma_log);
            this.list.add::<2, DEFAULTS, _>(&this.defaults);
            this.list.add::<3, BIND, _>(&this.bind);
            this.list.add::<4, POWER, _>(&this.power);
            this.list.add::<5, ADDRESS, _>(&this.address);
        }
        Ok(files)
    }
}

/// Extends a borrow.
///
/// # Safety
///
/// The value in the box must not be accessed by the result after the box is dropped.
unsafe fn extend<V>(value: &KBox<V>) -> &'static V {
    let value: *const V = &raw const **value;
    // SAFETY: The value does not move, and lives until the box is dropped.
    unsafe { &*value }
}

/// The type of the directories of functions.
type SettingsType<T> = ItemType<Group<Settings<T>>, Settings<T>>;

/// A `struct configfs_subsystem`, and the data of its directory.
///
/// `kernel::configfs::Subsystem` unregisters a subsystem that it could not register.
#[repr(C)]
struct Subsystem<T: Driver> {
    raw: bindings::configfs_subsystem,
    host: *const Host,
    settings: *const SettingsType<T>,
}

/// The driver's directory in configfs, named like the driver.
///
/// Each directory in it keeps the module of the driver loaded.
///
/// # Invariants
///
/// `subsystem` is registered. It points to the other fields.
#[pin_data(PinnedDrop)]
pub(super) struct Directory<T: Driver> {
    #[pin]
    subsystem: Opaque<Subsystem<T>>,
    _item_type: KBox<Opaque<bindings::config_item_type>>,
    _settings: KBox<SettingsType<T>>,
    _files: KBox<Files<T>>,
    _host: Arc<Host>,
}

// SAFETY: A shared reference allows no operations.
unsafe impl<T: Driver> Sync for Directory<T> {}

// SAFETY: The subsystem may be unregistered from any thread.
unsafe impl<T: Driver> Send for Directory<T> {}

impl<T: Driver> Directory<T> {
    const GROUP_OPS: bindings::configfs_group_operations = bindings::configfs_group_operations {
        make_group: Some(Self::make_group),
        ..pin_init::zeroed()
    };

    /// Creates the directory. May sleep. Functions can be created before this returns.
    pub(super) fn new(host: Arc<Host>) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let owner = this_module::<T::OwnerModule>();
            let files = Files::<T>::new()?;
            // SAFETY: The type is dropped before the files. A directory keeps the module loaded,
            // and thus both, until it is removed.
            let list = unsafe { &extend(&files).list };
            let settings = KBox::new(SettingsType::<T>::new(owner, list), GFP_KERNEL)?;
            let item_type = bindings::config_item_type {
                ct_owner: owner.as_ptr(),
                ct_group_ops: &Self::GROUP_OPS,
                ..pin_init::zeroed()
            };
            let item_type = KBox::new(Opaque::new(item_type), GFP_KERNEL)?;
            let raw_type = item_type.get();
            let subsystem = Subsystem::<T> {
                raw: pin_init::zeroed(),
                host: &raw const *host,
                settings: &raw const *settings,
            };
            // INVARIANT: The initialiser of `subsystem` registers it. Moving the fields does not
            // move what they point to.
            Ok(try_pin_init!(Self {
                _files: files,
                _settings: settings,
                _item_type: item_type,
                _host: host,
                subsystem <- Opaque::try_ffi_init(move |this: *mut Subsystem<T>| {
                    // SAFETY: `this` is valid for writes, and pinned until it is unregistered. The
                    // item type is dropped later.
                    unsafe {
                        this.write(subsystem);
                        Self::register(&raw mut (*this).raw, raw_type)
                    }
                }),
            }? Error))
        })
    }

    /// Registers a subsystem that is zeroed.
    ///
    /// # Safety
    ///
    /// `subsystem` must be pinned, and `item_type` must live, until it is unregistered.
    unsafe fn register(
        subsystem: *mut bindings::configfs_subsystem,
        item_type: *const bindings::config_item_type,
    ) -> Result {
        // SAFETY: By the safety requirements.
        unsafe {
            bindings::config_group_init_type_name(
                &raw mut (*subsystem).su_group,
                T::NAME.as_char_ptr(),
                item_type,
            );
            bindings::__mutex_init(
                &raw mut (*subsystem).su_mutex,
                c"vfio::soft_pci::Directory".as_char_ptr(),
                kernel::static_lock_class!().as_ptr(),
            );
            to_result(bindings::configfs_register_subsystem(subsystem))
        }
    }

    /// Creates the directory of a function.
    ///
    /// # Safety
    ///
    /// Must be called by the core with the group of such a subsystem, and with a string.
    unsafe extern "C" fn make_group(
        group: *mut bindings::config_group,
        name: *const c_char,
    ) -> *mut bindings::config_group {
        const {
            assert!(offset_of!(bindings::configfs_subsystem, su_group) == 0);
            assert!(offset_of!(Subsystem<T>, raw) == 0);
        };
        let make = || {
            // SAFETY: The group is at the start of a registered subsystem, whose pointers are
            // valid. The host is in an `Arc`.
            let (host, settings, name) = unsafe {
                let subsystem = &*group.cast::<Subsystem<T>>();
                (
                    ArcBorrow::from_raw(subsystem.host),
                    &*subsystem.settings,
                    CStr::from_char_ptr(name),
                )
            };
            let data = Settings::<T>::new(host.into());
            Arc::pin_init(Group::new(name.try_into()?, settings, data), GFP_KERNEL)
        };
        match make() {
            // SAFETY: The pointer is valid. The release of the group takes back the reference.
            Ok(made) => unsafe { Group::group(Arc::into_raw(made)) }.cast_mut(),
            Err(error) => error.to_ptr(),
        }
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Directory<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants, the subsystem is registered. It is the first field, and
        // has no directories, as they keep the module loaded.
        unsafe { bindings::configfs_unregister_subsystem(self.subsystem.get().cast()) };
    }
}
