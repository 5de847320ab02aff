// SPDX-License-Identifier: GPL-2.0
/*
 * Replacement of vfio core for the KUnit tests of the migration engine: a
 * device that is not registered, and calls of a data_fd without a descriptor.
 * And a look at the kernel log.
 */

#include <kunit/test-bug.h>
#include <kunit/test.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kmsg_dump.h>
#include <linux/mman.h>
#include <linux/poll.h>
#include <linux/string.h>
#include <linux/uio.h>
#include <linux/vfio.h>

#include "vfio_kunit_device.h"

static const struct vfio_device_ops vfio_kunit_ops = {
	.name = "vfio_kunit",
};

/*
 * Returns a device below @parent with these migration flags and one reference,
 * or an error pointer.
 */
struct vfio_device *vfio_kunit_alloc_device(struct device *parent,
					    u32 migration_flags)
{
	struct vfio_device *vdev;

	vdev = _vfio_alloc_device(sizeof(*vdev), parent, &vfio_kunit_ops);
	if (!IS_ERR(vdev))
		vdev->migration_flags = migration_flags;
	return vdev;
}

unsigned int vfio_kunit_device_references(struct vfio_device *vdev)
{
	return kref_read(&vdev->device.kobj.kref);
}

/* Returns the address of zeroed user memory with the lifetime of the test, or 0. */
unsigned long vfio_kunit_user_memory(size_t size)
{
	unsigned long addr;

	addr = kunit_vm_mmap(kunit_get_current_test(), NULL, 0, size,
			     PROT_READ | PROT_WRITE,
			     MAP_ANONYMOUS | MAP_PRIVATE, 0);
	return IS_ERR_VALUE(addr) ? 0 : addr;
}

/* How many lines of the kernel log have @text in them. */
unsigned int vfio_kunit_logged(const char *text)
{
	struct kmsg_dump_iter iter;
	unsigned int count = 0;
	char line[256];
	size_t len;

	kmsg_dump_rewind(&iter);
	while (kmsg_dump_get_line(&iter, false, line, sizeof(line), &len))
		if (strnstr(line, text, len))
			count++;
	return count;
}

static void vfio_kunit_set_nonblock(struct file *file, bool nonblock)
{
	spin_lock(&file->f_lock);
	if (nonblock)
		file->f_flags |= O_NONBLOCK;
	else
		file->f_flags &= ~O_NONBLOCK;
	spin_unlock(&file->f_lock);
}

ssize_t vfio_kunit_read(struct file *file, unsigned long to, size_t size,
			bool nonblock)
{
	struct iov_iter iter;
	struct kiocb kiocb;

	vfio_kunit_set_nonblock(file, nonblock);
	init_sync_kiocb(&kiocb, file);
	iov_iter_ubuf(&iter, ITER_DEST, (char __user *)to, size);
	return file->f_op->read_iter(&kiocb, &iter);
}

ssize_t vfio_kunit_write(struct file *file, unsigned long from, size_t size,
			 bool nonblock)
{
	struct iov_iter iter;
	struct kiocb kiocb;

	vfio_kunit_set_nonblock(file, nonblock);
	init_sync_kiocb(&kiocb, file);
	iov_iter_ubuf(&iter, ITER_SOURCE, (char __user *)from, size);
	return file->f_op->write_iter(&kiocb, &iter);
}

__poll_t vfio_kunit_poll(struct file *file)
{
	return vfs_poll(file, NULL);
}

long vfio_kunit_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return file->f_op->unlocked_ioctl(file, cmd, arg);
}

/* Unlike fput(), the file is released before this returns. */
void vfio_kunit_close(struct file *file)
{
	__fput_sync(file);
}
