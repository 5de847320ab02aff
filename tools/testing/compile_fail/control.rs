// SPDX-License-Identifier: GPL-2.0

//! The driver on the front page of the crate, which all tests share, compiles.

include!(env!("DRIVER"));
