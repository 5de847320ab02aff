/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Operations that make a device do DMA and raise interrupts: what the tests of any
 * device cannot know. Each file in ops/ has those of one device, which --device-ops NAME
 * selects. Those of other devices are in shared objects, "cc -shared -fPIC", which
 * --device-ops FILE loads. They can call the functions of mig.h.
 *
 * The functions are called in any state of the device, also after a reset and on the
 * target of a migration, and keep no data of their own. They return 0 or a negative
 * errno, and do not wait for the device.
 */
#ifndef MIG_OPS_H
#define MIG_OPS_H

#include "mig.h"

/* A copy from memory to memory by the device. */
struct mig_copy {
	__u64 from;		/* IOVA */
	__u64 to;		/* IOVA */
	__u64 len;		/* bytes, up to max_len */
	/* Begin again at each end until the device is reset, and read @from each time. */
	bool repeat;
	int vector;		/* raised at each end, or -1 */
};

struct mig_ops {
	const char *name;
	/* The IDs in the configuration space of the devices. */
	__u16 vendor;
	__u16 device;

	/* Starts a copy; at most one is in progress. NULL for a device without DMA. */
	int (*copy)(const struct mig_device *dev, const struct mig_copy *copy);
	/* 1 while the last copy is in progress, 0 when it is complete. */
	int (*copy_status)(const struct mig_device *dev);
	__u64 max_len;

	/* Raises an interrupt, at once. NULL for a device without interrupts. */
	int (*interrupt)(const struct mig_device *dev, unsigned int vector);
	__u32 irq_index;	/* such as VFIO_PCI_MSIX_IRQ_INDEX */
	/* Interrupts without an eventfd are pending, and migrate. */
	bool keeps_interrupts;

	struct mig_ops *next;
};

void mig_ops_add(struct mig_ops *ops);
/* The operations with this name, or those in a file if it has a slash. NULL: none. */
const struct mig_ops *mig_ops_find(const char *name);

/* Adds operations before main() runs. */
#define MIG_OPS(ops)								\
	static void __attribute__((constructor)) mig_ops_add_##ops(void)	\
	{									\
		mig_ops_add(&(ops));						\
	}

#endif /* MIG_OPS_H */
