// SPDX-License-Identifier: GPL-2.0

//! libFuzzer for the target in `VFIO_FUZZ`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use vfio_fuzz::{
    Target,
    TARGETS, //
};

static TARGET: OnceLock<Target> = OnceLock::new();

/// Looks up the target.
fn choose() {
    let name = std::env::var("VFIO_FUZZ").unwrap_or_default();
    let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) else {
        let names = TARGETS.map(|(known, _)| known).join(" ");

        eprintln!("VFIO_FUZZ={name}: unknown target, must be one of {names}");
        std::process::exit(2);
    };
    let _ = TARGET.set(*target);
}

fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        target(data);
    }
});
