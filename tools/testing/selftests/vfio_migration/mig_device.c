// SPDX-License-Identifier: GPL-2.0
/*
 * VFIO devices of either backend, and the ioctls of the migration uAPI.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/iommufd.h>

#include <linux/pci_regs.h>

#include "mig.h"

__u64 mig_page_size(void)
{
	return sysconf(_SC_PAGESIZE);
}

int mig_patience(void)
{
	return mig_number("patience", 1);
}

int mig_hang_seconds(void)
{
	return mig_number("hang", 20 * mig_patience());
}

static int do_ioctl(int fd, unsigned long cmd, void *arg)
{
	int ret = ioctl(fd, cmd, arg);

	return ret < 0 ? -errno : ret;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static int __attribute__((format(printf, 3, 4)))
complain(struct mig_device *dev, int ret, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(dev->why, sizeof(dev->why), fmt, ap);
	va_end(ap);
	return ret;
}

static int open_group(struct mig_device *dev)
{
	char path[PATH_MAX + 16], link[PATH_MAX];
	const char *number;
	ssize_t len;

	snprintf(path, sizeof(path), "%s/iommu_group", dev->sysfs);
	len = readlink(path, link, sizeof(link) - 1);
	if (len < 0)
		return complain(dev, -EOPNOTSUPP, "%s: no such link", path);
	link[len] = 0;
	number = strrchr(link, '/');
	number = number ? number + 1 : link;

	snprintf(path, sizeof(path), "/dev/vfio/%s", number);
	dev->group = open(path, O_RDWR | O_CLOEXEC);
	if (dev->group < 0)
		return complain(dev, errno == ENOENT ? -EOPNOTSUPP : -errno,
				"%s: %s", path, strerror(errno));
	return 0;
}

static int ask_group(struct mig_device *dev)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int ret;

	dev->iommu = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
	if (dev->iommu < 0)
		return complain(dev, errno == ENOENT ? -EOPNOTSUPP : -errno,
				"/dev/vfio/vfio: %s", strerror(errno));
	ret = open_group(dev);
	if (ret)
		return ret;
	ret = do_ioctl(dev->group, VFIO_GROUP_GET_STATUS, &status);
	if (ret)
		return complain(dev, ret, "GROUP_GET_STATUS: %s", strerror(-ret));
	if (!(status.flags & VFIO_GROUP_FLAGS_VIABLE))
		return complain(dev, -EBUSY, "the group of %s is not viable", dev->sysfs);
	ret = do_ioctl(dev->group, VFIO_GROUP_SET_CONTAINER, &dev->iommu);
	if (ret)
		return complain(dev, ret, "SET_CONTAINER: %s", strerror(-ret));
	ret = do_ioctl(dev->iommu, VFIO_SET_IOMMU, (void *)(uintptr_t)VFIO_TYPE1v2_IOMMU);
	if (ret)
		return complain(dev, ret, "SET_IOMMU: %s", strerror(-ret));
	return 0;
}

static int open_in_group(struct mig_device *dev)
{
	char name[NAME_MAX + 1];
	const char *base;
	int ret;

	base = strrchr(dev->sysfs, '/');
	snprintf(name, sizeof(name), "%s", base ? base + 1 : dev->sysfs);
	ret = do_ioctl(dev->group, VFIO_GROUP_GET_DEVICE_FD, name);
	if (ret < 0)
		return complain(dev, ret, "GROUP_GET_DEVICE_FD(%s): %s", name,
				strerror(-ret));
	dev->fd = ret;
	return 0;
}

static int ask_iommufd(struct mig_device *dev)
{
	dev->iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	if (dev->iommu < 0)
		return complain(dev, errno == ENOENT ? -EOPNOTSUPP : -errno,
				"/dev/iommu: %s", strerror(errno));
	return 0;
}

static int open_node(struct mig_device *dev)
{
	char path[PATH_MAX], node[NAME_MAX + 1] = "";
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "%s/vfio-dev", dev->sysfs);
	dir = opendir(path);
	if (!dir)
		return complain(dev, -EOPNOTSUPP, "%s: %s", path, strerror(errno));
	while ((entry = readdir(dir)))
		if (!strncmp(entry->d_name, "vfio", 4))
			snprintf(node, sizeof(node), "%s", entry->d_name);
	closedir(dir);
	if (!node[0])
		return complain(dev, -EOPNOTSUPP, "%s is empty", path);

	snprintf(path, sizeof(path), "/dev/vfio/devices/%s", node);
	dev->fd = open(path, O_RDWR | O_CLOEXEC);
	if (dev->fd < 0)
		return complain(dev, errno == ENOENT ? -EOPNOTSUPP : -errno,
				"%s: %s", path, strerror(errno));
	return 0;
}

static int bind_node(struct mig_device *dev)
{
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind), .iommufd = dev->iommu,
	};
	struct iommu_ioas_alloc ioas = { .size = sizeof(ioas) };
	int ret;

	ret = do_ioctl(dev->fd, VFIO_DEVICE_BIND_IOMMUFD, &bind);
	if (ret)
		return complain(dev, ret, "BIND_IOMMUFD: %s", strerror(-ret));
	dev->id = bind.out_devid;
	ret = do_ioctl(dev->iommu, IOMMU_IOAS_ALLOC, &ioas);
	if (ret)
		return complain(dev, ret, "IOAS_ALLOC: %s", strerror(-ret));
	dev->ioas = ioas.out_ioas_id;
	ret = mig_dma_attach(dev);
	if (ret)
		return complain(dev, ret, "ATTACH_IOMMUFD_PT: %s", strerror(-ret));
	return 0;
}

static int ask_device(struct mig_device *dev)
{
	struct vfio_device_feature_migration migration = {};
	int ret;

	dev->info = (struct vfio_device_info){ .argsz = sizeof(dev->info) };
	ret = do_ioctl(dev->fd, VFIO_DEVICE_GET_INFO, &dev->info);
	if (ret)
		return complain(dev, ret, "DEVICE_GET_INFO: %s", strerror(-ret));
	ret = mig_feature(dev, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION,
			  &migration, sizeof(migration));
	dev->flags = ret ? 0 : migration.flags;
	return 0;
}

int mig_enable(const struct mig_device *dev)
{
	const __u16 on = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
	ssize_t ret = mig_region_write(dev, VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND,
				       &on, sizeof(on));

	return ret < 0 ? ret : 0;
}

int mig_reopen_device(struct mig_device *dev)
{
	int ret;

	if (dev->backend == MIG_GROUP) {
		ret = open_in_group(dev);
	} else {
		ret = open_node(dev);
		if (!ret)
			ret = bind_node(dev);
	}
	if (!ret)
		ret = ask_device(dev);
	if (!ret && dev->info.flags & VFIO_DEVICE_FLAGS_PCI)
		ret = mig_enable(dev);
	return ret;
}

static int begin(struct mig_device *dev, const char *sysfs, enum mig_backend backend)
{
	*dev = (struct mig_device){
		.sysfs = sysfs, .backend = backend,
		.fd = -1, .group = -1, .iommu = -1,
	};
	if (access(sysfs, F_OK))
		return complain(dev, -errno, "%s: %s", sysfs, strerror(errno));
	return 0;
}

int mig_open_group(struct mig_device *dev, const char *sysfs)
{
	int ret = begin(dev, sysfs, MIG_GROUP);

	return ret ? ret : open_group(dev);
}

int mig_open_unbound(struct mig_device *dev, const char *sysfs)
{
	int ret = begin(dev, sysfs, MIG_IOMMUFD);

	return ret ? ret : open_node(dev);
}

int mig_bind(struct mig_device *dev)
{
	int ret = ask_iommufd(dev);

	if (!ret)
		ret = bind_node(dev);
	return ret ? ret : ask_device(dev);
}

int mig_open(struct mig_device *dev, const char *sysfs, enum mig_backend backend)
{
	int ret = begin(dev, sysfs, backend);

	if (ret)
		return ret;
	ret = backend == MIG_GROUP ? ask_group(dev) : ask_iommufd(dev);
	if (!ret)
		ret = mig_reopen_device(dev);
	if (ret)
		mig_close(dev);
	return ret;
}

void mig_close_device(struct mig_device *dev)
{
	close_fd(&dev->fd);
}

void mig_close(struct mig_device *dev)
{
	mig_close_device(dev);
	close_fd(&dev->group);
	close_fd(&dev->iommu);
}

int mig_feature_argsz(const struct mig_device *dev, __u32 flags, void *data,
		      size_t size, __u32 argsz)
{
	size_t len = sizeof(struct vfio_device_feature) + size;
	struct vfio_device_feature *feature;
	int ret;

	feature = calloc(1, len > argsz ? len : argsz);
	if (!feature)
		return -ENOMEM;
	feature->argsz = argsz;
	feature->flags = flags;
	if (size)
		memcpy(feature->data, data, size);
	ret = do_ioctl(dev->fd, VFIO_DEVICE_FEATURE, feature);
	if (size)
		memcpy(data, feature->data, size);
	free(feature);
	return ret;
}

int mig_feature(const struct mig_device *dev, __u32 flags, void *data, size_t size)
{
	return mig_feature_argsz(dev, flags, data, size,
				 sizeof(struct vfio_device_feature) + size);
}

int mig_get_state(const struct mig_device *dev, __u32 *state)
{
	struct vfio_device_feature_mig_state mig = {
		.device_state = ~0U, .data_fd = -2,
	};
	int ret;

	ret = mig_feature(dev, VFIO_DEVICE_FEATURE_GET |
			  VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &mig, sizeof(mig));
	*state = mig.device_state;
	return ret;
}

int mig_set_state(const struct mig_device *dev, __u32 state, int *data_fd)
{
	struct vfio_device_feature_mig_state mig = {
		.device_state = state, .data_fd = -1,
	};
	int ret;

	ret = mig_feature(dev, VFIO_DEVICE_FEATURE_SET |
			  VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, &mig, sizeof(mig));
	if (data_fd)
		*data_fd = mig.data_fd;
	else
		close_fd(&mig.data_fd);
	return ret;
}

int mig_data_size(const struct mig_device *dev, __u64 *size)
{
	struct vfio_device_feature_mig_data_size data = {};
	int ret;

	ret = mig_feature(dev, VFIO_DEVICE_FEATURE_GET |
			  VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, &data, sizeof(data));
	*size = data.stop_copy_length;
	return ret;
}

int mig_opt_in_v2(const struct mig_device *dev)
{
	return mig_feature(dev, VFIO_DEVICE_FEATURE_SET |
			   VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, NULL, 0);
}

int mig_reset(const struct mig_device *dev)
{
	int ret = do_ioctl(dev->fd, VFIO_DEVICE_RESET, NULL);

	if (!ret && dev->info.flags & VFIO_DEVICE_FLAGS_PCI)
		ret = mig_enable(dev);
	return ret;
}

int mig_precopy_info(int data_fd, struct vfio_precopy_info *info)
{
	*info = (struct vfio_precopy_info){ .argsz = sizeof(*info) };
	return do_ioctl(data_fd, VFIO_MIG_GET_PRECOPY_INFO, info);
}

int mig_log_start(const struct mig_device *dev, __u64 *page_size,
		  const struct vfio_device_feature_dma_logging_range *ranges,
		  __u32 nr)
{
	struct vfio_device_feature_dma_logging_control control = {
		.page_size = *page_size, .num_ranges = nr,
		.ranges = (uintptr_t)ranges,
	};
	int ret;

	ret = mig_feature(dev, VFIO_DEVICE_FEATURE_SET |
			  VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
			  &control, sizeof(control));
	*page_size = control.page_size;
	return ret;
}

int mig_log_stop(const struct mig_device *dev)
{
	return mig_feature(dev, VFIO_DEVICE_FEATURE_SET |
			   VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, NULL, 0);
}

int mig_log_report(const struct mig_device *dev, __u64 iova, __u64 length,
		   __u64 page_size, __u64 *bitmap)
{
	struct vfio_device_feature_dma_logging_report report = {
		.iova = iova, .length = length, .page_size = page_size,
		.bitmap = (uintptr_t)bitmap,
	};

	return mig_feature(dev, VFIO_DEVICE_FEATURE_GET |
			   VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
			   &report, sizeof(report));
}

int mig_region_info(const struct mig_device *dev, __u32 index,
		    struct vfio_region_info *info)
{
	*info = (struct vfio_region_info){
		.argsz = sizeof(*info), .index = index,
	};
	return do_ioctl(dev->fd, VFIO_DEVICE_GET_REGION_INFO, info);
}

ssize_t mig_region_read(const struct mig_device *dev, __u32 index, __u64 at,
			void *data, size_t len)
{
	struct vfio_region_info info;
	ssize_t ret;

	ret = mig_region_info(dev, index, &info);
	if (ret)
		return ret;
	ret = pread(dev->fd, data, len, info.offset + at);
	return ret < 0 ? -errno : ret;
}

ssize_t mig_region_write(const struct mig_device *dev, __u32 index, __u64 at,
			 const void *data, size_t len)
{
	struct vfio_region_info info;
	ssize_t ret;

	ret = mig_region_info(dev, index, &info);
	if (ret)
		return ret;
	ret = pwrite(dev->fd, data, len, info.offset + at);
	return ret < 0 ? -errno : ret;
}

/* Does the region restrict mappings to areas that do not contain this part? */
static bool is_left_out(const struct vfio_region_info *info, __u64 at, size_t len)
{
	const struct vfio_region_info_cap_sparse_mmap *sparse;
	const struct vfio_info_cap_header *cap;
	__u32 i, next = info->flags & VFIO_REGION_INFO_FLAG_CAPS ? info->cap_offset : 0;

	for (; next; next = cap->next) {
		cap = (const void *)((const char *)info + next);
		if (cap->id != VFIO_REGION_INFO_CAP_SPARSE_MMAP)
			continue;
		sparse = (const void *)cap;
		for (i = 0; i < sparse->nr_areas; i++)
			if (at >= sparse->areas[i].offset &&
			    at + len <= sparse->areas[i].offset + sparse->areas[i].size)
				return false;
		return true;
	}
	return false;
}

int mig_region_map(const struct mig_device *dev, __u32 index, __u64 at, size_t len,
		   void **map)
{
	struct vfio_region_info head, *info;
	int ret;

	ret = mig_region_info(dev, index, &head);
	if (ret)
		return ret;
	info = calloc(1, head.argsz);
	if (!info)
		return -ENOMEM;
	info->argsz = head.argsz;
	info->index = index;
	ret = do_ioctl(dev->fd, VFIO_DEVICE_GET_REGION_INFO, info);
	if (!ret && (!(info->flags & VFIO_REGION_INFO_FLAG_MMAP) ||
		     is_left_out(info, at, len)))
		ret = -EOPNOTSUPP;
	if (!ret) {
		*map = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, dev->fd,
			    info->offset + at);
		if (*map == MAP_FAILED)
			ret = -errno;
	}
	free(info);
	return ret;
}

int mig_scratch_parse(const char *text, struct mig_scratch *scratch)
{
	unsigned long long values[3];
	unsigned int i;
	char *end;

	*scratch = (struct mig_scratch){};
	if (!text || !*text)
		return 0;
	for (i = 0; i < 3; i++) {
		errno = 0;
		values[i] = strtoull(text, &end, 0);
		if (errno || end == text || *end != (i < 2 ? ':' : 0))
			return -EINVAL;
		text = end + 1;
	}
	if (!values[2])
		return -EINVAL;
	*scratch = (struct mig_scratch){
		.region = values[0], .offset = values[1], .len = values[2],
	};
	return 0;
}

int mig_scratch_read(const struct mig_device *dev, const struct mig_scratch *s,
		     __u8 *data)
{
	size_t done = 0;
	ssize_t ret;

	while (done < s->len) {
		ret = mig_region_read(dev, s->region, s->offset + done, data + done,
				      s->len - done);
		if (ret <= 0)
			return ret ? ret : -EIO;
		done += ret;
	}
	return 0;
}

int mig_scratch_write(const struct mig_device *dev, const struct mig_scratch *s,
		      const __u8 *data)
{
	size_t done = 0;
	ssize_t ret;

	while (done < s->len) {
		ret = mig_region_write(dev, s->region, s->offset + done, data + done,
				       s->len - done);
		if (ret <= 0)
			return ret ? ret : -EIO;
		done += ret;
	}
	return 0;
}

int mig_irq_info(const struct mig_device *dev, __u32 index,
		 struct vfio_irq_info *info)
{
	*info = (struct vfio_irq_info){
		.argsz = sizeof(*info), .index = index,
	};
	return do_ioctl(dev->fd, VFIO_DEVICE_GET_IRQ_INFO, info);
}

int mig_set_irqs(const struct mig_device *dev, __u32 index, __u32 flags,
		 __u32 start, __u32 count, const void *data, size_t size)
{
	struct vfio_irq_set *set = calloc(1, sizeof(*set) + size);
	int ret;

	if (!set)
		return -ENOMEM;
	set->argsz = sizeof(*set) + size;
	set->flags = flags;
	set->index = index;
	set->start = start;
	set->count = count;
	if (size)
		memcpy(set->data, data, size);
	ret = do_ioctl(dev->fd, VFIO_DEVICE_SET_IRQS, set);
	free(set);
	return ret;
}
