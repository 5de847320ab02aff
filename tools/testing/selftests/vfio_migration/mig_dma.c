// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of this process for DMA of a device, with either backend.
 */
#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include <linux/iommufd.h>

#include "mig.h"

static int do_ioctl(int fd, unsigned long cmd, void *arg)
{
	return ioctl(fd, cmd, arg) < 0 ? -errno : 0;
}

static int map_ioas(const struct mig_device *dev, __u64 iova, void *at, __u64 len,
		    unsigned int prot)
{
	struct iommu_ioas_map map = {
		.size = sizeof(map), .flags = IOMMU_IOAS_MAP_FIXED_IOVA,
		.ioas_id = dev->ioas, .user_va = (uintptr_t)at, .length = len,
		.iova = iova,
	};

	if (prot & MIG_DMA_READ)
		map.flags |= IOMMU_IOAS_MAP_READABLE;
	if (prot & MIG_DMA_WRITE)
		map.flags |= IOMMU_IOAS_MAP_WRITEABLE;
	return do_ioctl(dev->iommu, IOMMU_IOAS_MAP, &map);
}

static int map_container(const struct mig_device *dev, __u64 iova, void *at,
			 __u64 len, unsigned int prot)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .vaddr = (uintptr_t)at, .iova = iova,
		.size = len,
	};

	if (prot & MIG_DMA_READ)
		map.flags |= VFIO_DMA_MAP_FLAG_READ;
	if (prot & MIG_DMA_WRITE)
		map.flags |= VFIO_DMA_MAP_FLAG_WRITE;
	return do_ioctl(dev->iommu, VFIO_IOMMU_MAP_DMA, &map);
}

int mig_dma_map(const struct mig_device *dev, __u64 iova, void *at, __u64 len,
		unsigned int prot)
{
	if (dev->backend == MIG_GROUP)
		return map_container(dev, iova, at, len, prot);
	return map_ioas(dev, iova, at, len, prot);
}

int mig_dma_unmap(const struct mig_device *dev, __u64 iova, __u64 len)
{
	struct vfio_iommu_type1_dma_unmap container = {
		.argsz = sizeof(container), .iova = iova, .size = len,
	};
	struct iommu_ioas_unmap ioas = {
		.size = sizeof(ioas), .ioas_id = dev->ioas, .iova = iova, .length = len,
	};

	if (dev->backend == MIG_GROUP)
		return do_ioctl(dev->iommu, VFIO_IOMMU_UNMAP_DMA, &container);
	return do_ioctl(dev->iommu, IOMMU_IOAS_UNMAP, &ioas);
}

int mig_dma_attach(const struct mig_device *dev)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach), .pt_id = dev->ioas,
	};

	return do_ioctl(dev->fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
}

int mig_dma_detach(const struct mig_device *dev)
{
	struct vfio_device_detach_iommufd_pt detach = { .argsz = sizeof(detach) };

	return do_ioctl(dev->fd, VFIO_DEVICE_DETACH_IOMMUFD_PT, &detach);
}
