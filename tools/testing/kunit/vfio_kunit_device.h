/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C functions for the KUnit tests in Rust.
 */

#ifndef VFIO_KUNIT_DEVICE_H
#define VFIO_KUNIT_DEVICE_H

#include <linux/poll.h>
#include <linux/types.h>

struct device;
struct file;
struct vfio_device;

struct vfio_device *vfio_kunit_alloc_device(struct device *parent,
					    u32 migration_flags);
unsigned int vfio_kunit_device_references(struct vfio_device *vdev);
unsigned long vfio_kunit_user_memory(size_t size);
unsigned int vfio_kunit_logged(const char *text);
ssize_t vfio_kunit_read(struct file *file, unsigned long to, size_t size,
			bool nonblock);
ssize_t vfio_kunit_write(struct file *file, unsigned long from, size_t size,
			 bool nonblock);
__poll_t vfio_kunit_poll(struct file *file);
long vfio_kunit_ioctl(struct file *file, unsigned int cmd, unsigned long arg);
void vfio_kunit_close(struct file *file);

#endif
