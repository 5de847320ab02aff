// SPDX-License-Identifier: GPL-2.0
/* A copy of vfio_mock is a transfer to its memory, and one back. */
#include <errno.h>

#include "mig_ops.h"
#include "vfio_mock.h"

#define BAR0	VFIO_PCI_BAR0_REGION_INDEX

static int set(const struct mig_device *dev, __u64 at, const void *value, size_t len)
{
	ssize_t ret = mig_region_write(dev, BAR0, at, value, len);

	return ret < 0 ? ret : 0;
}

static int set32(const struct mig_device *dev, __u64 at, __u32 value)
{
	return set(dev, at, &value, sizeof(value));
}

static int transfer(const struct mig_device *dev, __u32 number, __u32 op, __u64 iova,
		    const struct mig_copy *copy)
{
	struct vfio_mock_dma_desc desc = {
		.iova = iova, .len = copy->len, .op = op, .period = copy->repeat,
		.irq_vector = op == VFIO_MOCK_DMA_WRITE && copy->vector >= 0 ?
			      (__u32)copy->vector : VFIO_MOCK_IRQ_NONE,
	};
	int ret;

	ret = set(dev, VFIO_MOCK_DMA_DESC(number), &desc, offsetof(typeof(desc), status));
	return ret ? ret : set32(dev, VFIO_MOCK_REG_DMA_DOORBELL, number);
}

static int copy(const struct mig_device *dev, const struct mig_copy *copy)
{
	int ret = transfer(dev, 0, VFIO_MOCK_DMA_READ, copy->from, copy);

	return ret ? ret : transfer(dev, 1, VFIO_MOCK_DMA_WRITE, copy->to, copy);
}

static int copy_status(const struct mig_device *dev)
{
	struct vfio_mock_dma_desc desc;
	unsigned int i;
	ssize_t ret;

	/* The second one ends last. */
	for (i = 2; i--;) {
		ret = mig_region_read(dev, BAR0, VFIO_MOCK_DMA_DESC(i), &desc, sizeof(desc));
		if (ret < 0)
			return ret;
		if (desc.status == VFIO_MOCK_DMA_QUEUED || desc.status == VFIO_MOCK_DMA_ACTIVE)
			return 1;
		if (desc.status != VFIO_MOCK_DMA_COMPLETE)
			return -EIO;
	}
	return 0;
}

static int interrupt(const struct mig_device *dev, unsigned int vector)
{
	const __u64 len = 8;
	int ret;

	/* At the end of a command that changes no memory. */
	ret = set(dev, VFIO_MOCK_REG_LEN, &len, sizeof(len));
	ret = ret ? ret : set32(dev, VFIO_MOCK_REG_IRQ_VECTOR, vector);
	return ret ? ret : set32(dev, VFIO_MOCK_REG_DOORBELL, VFIO_MOCK_CMD_CHECKSUM);
}

static struct mig_ops vfio_mock = {
	.name = "vfio_mock",
	.vendor = VFIO_MOCK_VENDOR_ID,
	.device = VFIO_MOCK_DEVICE_ID,
	.copy = copy,
	.copy_status = copy_status,
	.max_len = 64 << 10,
	.interrupt = interrupt,
	.irq_index = VFIO_PCI_MSIX_IRQ_INDEX,
	.keeps_interrupts = true,
};

MIG_OPS(vfio_mock);
