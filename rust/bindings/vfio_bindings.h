/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input of bindgen: the headers and constants that rust/bindings/bindings_helper.h
 * of the kernel does not have. Out-of-tree scaffolding: upstream they are lines of
 * that file.
 */

#include <linux/anon_inodes.h>
#include <linux/mdev.h>
#include <linux/vfio.h>
#include <linux/vfio_pci_core.h>

#include "../helpers/vfio.h"

/* `bindgen` does not evaluate macros with parameters or casts. */
const unsigned int RUST_CONST_HELPER_VFIO_DEVICE_GET_INFO = VFIO_DEVICE_GET_INFO;
const unsigned int RUST_CONST_HELPER_VFIO_DEVICE_GET_IRQ_INFO = VFIO_DEVICE_GET_IRQ_INFO;
const unsigned int RUST_CONST_HELPER_VFIO_DEVICE_SET_IRQS = VFIO_DEVICE_SET_IRQS;
const unsigned int RUST_CONST_HELPER_VFIO_DEVICE_RESET = VFIO_DEVICE_RESET;
const unsigned int RUST_CONST_HELPER_VFIO_MIG_GET_PRECOPY_INFO = VFIO_MIG_GET_PRECOPY_INFO;
const gfp_t RUST_CONST_HELPER___GFP_RETRY_MAYFAIL = __GFP_RETRY_MAYFAIL;
const int RUST_CONST_HELPER_IOCB_NOWAIT = IOCB_NOWAIT;
