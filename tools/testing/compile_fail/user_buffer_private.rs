// SPDX-License-Identifier: GPL-2.0

//! A driver never sees the user's buffer, which may fault, change or be gone.

include!(env!("DRIVER"));

use vfio::user::UserBuf;
//~ error[E0603]: module `user` is private
