// SPDX-License-Identifier: GPL-2.0

//! A driver has no access to the user's buffer, which may fault, change or be unmapped.

include!(env!("DRIVER"));

use vfio::user::UserBuf;
//~ error[E0603]: module `user` is private
