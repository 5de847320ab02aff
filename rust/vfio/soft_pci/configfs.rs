// SPDX-License-Identifier: GPL-2.0

//! The directories in configfs: an administrator creates functions with them.
//!
//! C header: [`include/linux/configfs.h`](srctree/include/linux/configfs.h)

use super::host::{
    Host,
    Plugged, //
};
use crate::emulated::Driver;
use core::marker::PhantomData;
use kernel::{
    configfs::{
        Attribute,
        AttributeList,
        AttributeOperations,
        Group,
        GroupOperations,
        ItemType,
        Subsystem, //
    },
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
        Arc,
        Mutex, //
    },
};

/// Identifiers of the files in the directory of a function.
const TYPE: u64 = 0;
const DMA_LOG: u64 = 1;
const BIND: u64 = 2;
const POWER: u64 = 3;
const ADDRESS: u64 = 4;

/// Number of the files, and of the null at the end of their list.
const FILES: usize = 6;

/// Data of the driver's directory, in which mkdir() creates a function.
pub(super) struct Functions<T: Driver> {
    host: Arc<Host>,
    item_type: &'static ItemType<Group<Settings<T>>, Settings<T>>,
}

#[vtable]
impl<T: Driver> GroupOperations for Functions<T> {
    type OwnerModule = T::OwnerModule;
    type Child = Settings<T>;

    fn make_group(&self, name: &CStr) -> Result<impl PinInit<Group<Settings<T>>, Error>> {
        let settings = Settings::new(self.host.clone());
        Ok(Group::new(name.try_into()?, self.item_type, settings))
    }
}

/// Settings of a function. They are constant while it is plugged.
struct Choice {
    type_index: usize,
    /// Whether it has a DMA log of its own.
    dma_log: bool,
    /// Whether it is bound to its driver when it is plugged.
    bind: bool,
    /// Present while the function is plugged.
    plugged: Option<Plugged>,
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
                    type_index: 0,
                    dma_log: true,
                    bind: true,
                    plugged: None,
                },
                "vfio::soft_pci::Settings::choice"
            ),
            _driver: PhantomData,
        }? Error)
    }

    /// Changes a setting. Fails with `EBUSY` while the function is plugged.
    fn change(&self, change: impl FnOnce(&mut Choice)) -> Result {
        let mut choice = self.choice.lock();
        if choice.plugged.is_some() {
            return Err(EBUSY);
        }
        change(&mut choice);
        Ok(())
    }

    /// Plugs or unplugs the function.
    fn power(&self, on: bool) -> Result {
        let mut choice = self.choice.lock();
        if !on {
            let plugged = choice.plugged.take();
            // Unplugging waits for the user of the device.
            drop(choice);
            drop(plugged);
            return Ok(());
        }
        if choice.plugged.is_none() {
            let plugged = Host::plug::<T>(
                &self.host,
                choice.type_index,
                choice.dma_log,
                choice.bind, //
            )?;
            choice.plugged = Some(plugged);
        }
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
        let index = this.choice.lock().type_index;
        let name = T::TYPES.get(index).ok_or(EINVAL)?.name;
        line(page, fmt!("{}", name.to_str()?))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        let name = page.trim_ascii();
        let type_index = T::TYPES
            .iter()
            .position(|entry| entry.name.to_bytes() == name)
            .ok_or(EINVAL)?;
        this.change(|choice| choice.type_index = type_index)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<DMA_LOG> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        line(page, fmt!("{}", u8::from(this.choice.lock().dma_log)))
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        let dma_log = kstrtobool_bytes(page)?;
        this.change(|choice| choice.dma_log = dma_log)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<BIND> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        line(page, fmt!("{}", u8::from(this.choice.lock().bind)))
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
        line(
            page,
            fmt!("{}", u8::from(this.choice.lock().plugged.is_some())),
        )
    }

    fn store(this: &Self, page: &[u8]) -> Result {
        this.power(kstrtobool_bytes(page)?)
    }
}

#[vtable]
impl<T: Driver> AttributeOperations<ADDRESS> for Settings<T> {
    type OwnerModule = T::OwnerModule;
    type Data = Self;

    fn show(this: &Self, page: &mut [u8; PAGE_SIZE]) -> Result<usize> {
        let choice = this.choice.lock();
        let plugged = choice.plugged.as_ref().ok_or(ENODEV)?;
        line(page, fmt!("{}", plugged.address()))
    }
}

/// The files in the directories.
struct Files<T: Driver> {
    /// The driver's directory has none.
    none: AttributeList<1, Functions<T>>,
    all: AttributeList<FILES, Settings<T>>,
    type_name: Attribute<TYPE, Settings<T>, Settings<T>>,
    dma_log: Attribute<DMA_LOG, Settings<T>, Settings<T>>,
    bind: Attribute<BIND, Settings<T>, Settings<T>>,
    power: Attribute<POWER, Settings<T>, Settings<T>>,
    address: Attribute<ADDRESS, Settings<T>, Settings<T>>,
}

/// The kinds of directories. They cannot be statics, which must not depend on `T`.
struct ItemTypes<T: Driver> {
    functions: ItemType<Subsystem<Functions<T>>, Functions<T>>,
    settings: ItemType<Group<Settings<T>>, Settings<T>>,
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

/// The driver's directory in configfs, named like the driver.
///
/// Each directory in it keeps the module of the driver loaded.
#[pin_data]
pub(super) struct Directory<T: Driver> {
    #[pin]
    _subsystem: Subsystem<Functions<T>>,
    // configfs refers to these until the subsystem is unregistered.
    _item_types: KBox<ItemTypes<T>>,
    _files: KBox<Files<T>>,
}

impl<T: Driver> Directory<T> {
    /// Creates the directory. May sleep. Functions can be created before this returns.
    pub(super) fn new(host: Arc<Host>) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let files = Self::files()?;
            // SAFETY: The subsystem is dropped before the files and the item types. A directory in
            // it keeps the module loaded, and thus this value, until it is removed.
            let lists = unsafe { extend(&files) };
            let owner = this_module::<T::OwnerModule>();
            let item_types = KBox::new(
                ItemTypes::<T> {
                    functions: ItemType::<Subsystem<Functions<T>>, _>::new_with_child_ctor::<1, _>(
                        owner,
                        &lists.none,
                    ),
                    settings: ItemType::<Group<Settings<T>>, _>::new(owner, &lists.all),
                },
                GFP_KERNEL,
            )?;
            // SAFETY: As above.
            let types = unsafe { extend(&item_types) };
            let functions = Functions {
                host,
                item_type: &types.settings,
            };
            Ok(try_pin_init!(Self {
                _files: files,
                _item_types: item_types,
                _subsystem <- Subsystem::new(
                    T::NAME,
                    &types.functions,
                    Ok::<_, Error>(functions)
                ),
            }? Error))
        })
    }

    /// Creates the lists of files.
    fn files() -> Result<KBox<Files<T>>> {
        // SAFETY: The lists are filled below, like by `configfs_attrs!`. An empty one is complete.
        let (none, all) = unsafe { (AttributeList::new(), AttributeList::new()) };
        let files = Files {
            none,
            all,
            type_name: Attribute::new(c"type"),
            dma_log: Attribute::new(c"dma_log"),
            bind: Attribute::new(c"bind"),
            power: Attribute::new(c"power"),
            address: Attribute::new(c"address"),
        };
        let files = KBox::new(files, GFP_KERNEL)?;
        // SAFETY: The list is not shared yet, and it is dropped together with the files.
        unsafe {
            let this = extend(&files);
            this.all.add::<0, TYPE, _>(&this.type_name);
            this.all.add::<1, DMA_LOG, _>(&this.dma_log);
            this.all.add::<2, BIND, _>(&this.bind);
            this.all.add::<3, POWER, _>(&this.power);
            this.all.add::<4, ADDRESS, _>(&this.address);
        }
        Ok(files)
    }
}
