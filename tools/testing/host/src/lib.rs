// SPDX-License-Identifier: GPL-2.0

//! The parts of the project that use `core` alone, built for the host.
//!
//! Except for the model `paths`, these are the very files that the kernel modules are built from.
//! The tests of this package check them without a kernel, in seconds: `cargo test`.

#![no_std]

#[path = "../../../../samples/vfio_mock/knobs/dirtier.rs"]
pub mod dirtier;
#[path = "../../../../rust/vfio/memory/dirty_map.rs"]
pub mod dirty_map;
#[path = "../../../../rust/vfio/migration/fsm.rs"]
pub mod fsm;
#[path = "../../../../rust/vfio/emulated/irq/msix.rs"]
pub mod msix;
pub mod paths;
#[path = "../../../../samples/vfio_mock/queue.rs"]
pub mod queue;
#[path = "../../../../samples/vfio_mock/knobs/rules.rs"]
pub mod rules;
#[path = "../../../../samples/vfio_mock/migration/stream.rs"]
pub mod stream;
#[path = "../../../../rust/vfio/soft_pci/table.rs"]
pub mod table;
#[path = "../../../../samples/vfio_mock/knobs/told.rs"]
pub mod told;
#[path = "../../../../rust/vfio/migration/verdict.rs"]
pub mod verdict;
