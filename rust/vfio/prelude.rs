// SPDX-License-Identifier: GPL-2.0

//! Items that nearly every driver uses.
//!
//! # Examples
//!
//! ```
//! use vfio::prelude::*;
//!
//! fn everything() -> Flags {
//!     Flags::STOP_COPY.with_p2p().with_pre_copy()
//! }
//! ```

pub use crate::{
    emulated::{
        self,
        config_space::{
            self,
            ConfigSpace, //
        },
        Function, //
    },
    mdev,
    memory::{
        StateMemory,
        Tracking, //
    },
    migration::{
        Chunk,
        Flags,
        ImageLoader,
        ImageSaver,
        Loader,
        Migratable,
        Next,
        Notifier,
        Phase,
        Records,
        Remaining,
        Saver, //
    },
    region::{
        self,
        Position, //
    },
};
#[cfg(CONFIG_PCI)]
pub use crate::{
    pci,
    soft_pci, //
};
