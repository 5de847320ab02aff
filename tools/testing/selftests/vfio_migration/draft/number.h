/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MIG_DRAFT_NUMBER_H
#define MIG_DRAFT_NUMBER_H

/* The number of VFIO_MIG_GET_PRECOPY_INFO in the draft of the pre-copy series. */
#define MIG_DRAFT_PRECOPY_INFO	_IO(VFIO_TYPE, VFIO_BASE + 22)

#endif
