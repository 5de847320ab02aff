// SPDX-License-Identifier: GPL-2.0

//! Only the engine creates sessions, so that each session has a state.

include!(env!("DRIVER"));

use vfio::migration::data_file::SaveSession;
//~ error[E0603]: module `data_file` is private
