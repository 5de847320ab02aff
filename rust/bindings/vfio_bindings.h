/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input of bindgen: the headers that rust/bindings/bindings_helper.h of the
 * kernel does not include. Out-of-tree scaffolding: upstream they are three
 * lines of that file.
 */

#include <linux/anon_inodes.h>
#include <linux/mdev.h>
#include <linux/vfio.h>

#include "../helpers/vfio.h"
