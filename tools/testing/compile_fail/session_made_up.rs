// SPDX-License-Identifier: GPL-2.0

//! There is no session outside of the engine, hence none without a state.

include!(env!("DRIVER"));

use vfio::migration::data_file::SaveSession;
//~ error[E0603]: module `data_file` is private
