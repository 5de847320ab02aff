// SPDX-License-Identifier: GPL-2.0
/* The last device of Documentation/vfio_tutorial.rst. */
#include <errno.h>

#include "mig_ops.h"

#define BAR2	VFIO_PCI_BAR2_REGION_INDEX

/* Registers. */
#define FROM		0
#define CONTROL		24
#define RAISE		32

/* In CONTROL. */
#define COPY		1
#define REPEAT		2
#define INTERRUPT	4
#define FAILED		8

static int copy(const struct mig_device *dev, const struct mig_copy *copy)
{
	const __u64 values[] = {
		copy->from, copy->to, copy->len,
		COPY | (copy->repeat ? REPEAT : 0) | (copy->vector >= 0 ? INTERRUPT : 0),
	};
	ssize_t ret = mig_region_write(dev, BAR2, FROM, values, sizeof(values));

	return ret < 0 ? ret : 0;
}

static int copy_status(const struct mig_device *dev)
{
	__u64 control;
	ssize_t ret = mig_region_read(dev, BAR2, CONTROL, &control, sizeof(control));

	if (ret < 0)
		return ret;
	if (control & FAILED)
		return -EIO;
	return control & COPY;
}

static int interrupt(const struct mig_device *dev, unsigned int vector)
{
	const __u64 value = vector;
	ssize_t ret = mig_region_write(dev, BAR2, RAISE, &value, sizeof(value));

	return ret < 0 ? ret : 0;
}

static struct mig_ops note = {
	.name = "note",
	.vendor = 0x1af4,
	.device = 0x10f2,
	.copy = copy,
	.copy_status = copy_status,
	.max_len = 64 << 10,
	.interrupt = interrupt,
	.irq_index = VFIO_PCI_MSIX_IRQ_INDEX,
	.keeps_interrupts = true,
};

MIG_OPS(note);
