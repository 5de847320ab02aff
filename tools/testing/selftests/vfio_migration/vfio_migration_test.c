// SPDX-License-Identifier: GPL-2.0
/*
 * Conformance of any migratable VFIO device to the migration uAPI in
 * include/uapi/linux/vfio.h.
 *
 *	./vfio_migration_test [option...] /sys/bus/pci/devices/0000:01:00.1 [TARGET]
 *
 * The device must be bound to a VFIO driver and not be in use: the tests reset it
 * and load images into it, valid and invalid ones. For real hardware see
 * Documentation/vfio_migration_test.rst, which also has the options. A test for a
 * feature that the device does not claim, or that needs an option that is not given,
 * skips with this reason. TARGET is a compatible device as the target of migrations;
 * without it the same device is the target, after a reset.
 *
 * "-V iommufd" excludes a backend, "-t NAME" selects a test, "-l" lists them.
 *
 * The tests are in the files in device/, by subject: the harness has one list of tests
 * for each file that is compiled. They contain no knowledge of a specific device: how to
 * make one do DMA and raise interrupts is in ops/, for --device-ops.
 */
#include <limits.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <linux/pci_regs.h>

#include "mig_ops.h"
#include "mig_test.h"

#define FEATURE_MIGRATION	VFIO_DEVICE_FEATURE_MIGRATION
#define FEATURE_STATE		VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
#define FEATURE_SIZE		VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
#define FEATURE_V2		VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#define MIG_GET			VFIO_DEVICE_FEATURE_GET
#define MIG_SET			VFIO_DEVICE_FEATURE_SET
#define MIG_PROBE		VFIO_DEVICE_FEATURE_PROBE

/* An ioctl number that no data_fd supports. */
#define NO_SUCH_IOCTL		_IO(VFIO_TYPE, VFIO_BASE + 99)

static const __u32 set_state_values[] = {
	0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xffffffff,
};

/* The device, and the target if there is one. */
static const char *paths[2];

/* Those of --device-ops, or NULL. */
static const struct mig_ops *ops;

/* Is this a device of these operations? */
static bool has_ids_of_ops(const struct mig_device *dev)
{
	__u16 ids[2];

	return mig_region_read(dev, VFIO_PCI_CONFIG_REGION_INDEX, PCI_VENDOR_ID, ids,
			       sizeof(ids)) == sizeof(ids) &&
	       ids[0] == ops->vendor && ids[1] == ops->device;
}

FIXTURE(device)
{
	struct mig_device dev;
	struct mig_scratch scratch;
};

MIG_EACH_BACKEND(device);

FIXTURE_SETUP(device)
{
	ASSERT_EQ(0, mig_scratch_parse(mig_option("scratch"), &self->scratch))
		STEP("read --scratch, which is REGION:OFFSET:LENGTH");
	OPEN_OR_SKIP(&self->dev, paths[0], variant->backend);
	if (ops)
		ASSERT_TRUE(has_ids_of_ops(&self->dev))
			STEP("use --device-ops %s: the device has other IDs", ops->name);
	go_home(_metadata, &self->dev);
}

FIXTURE_TEARDOWN(device)
{
	mig_close(&self->dev);
}

/* Tests that break a session on purpose need a device with a working reset. */
#define NEED_RESET(dev) do {							\
	if (mig_reset(dev))							\
		SKIP(return, "VFIO_DEVICE_RESET does not work on the device");	\
} while (0)

/* Skips the test unless the device has memory that the tests may write to. */
#define NEED_SCRATCH(self) do {							\
	if (!(self)->scratch.len)						\
		SKIP(return, "no --scratch");	\
} while (0)

/*
 * Returns the target of a migration: the second device, or the same one after a
 * reset, which then cannot be the source of more images.
 */
static struct mig_device *open_target(struct __test_metadata *_metadata,
				      struct mig_device *dev,
				      struct mig_device *second)
{
	if (!paths[1]) {
		mig_reset(dev);
		return dev;
	}
	ASSERT_EQ(0, mig_open(second, paths[1], dev->backend))
		STEP("open the target: %s", second->why);
	go_home(_metadata, second);
	return second;
}

/*
 * Saves an image of the device, which continues to run afterwards. Returns whether a
 * second image was identical, which is not guaranteed.
 */
static bool save_steady(struct __test_metadata *_metadata,
			const struct mig_device *dev, struct mig_stream *image)
{
	struct mig_stream again = {};
	bool same;
	int fd;

	image->len = 0;
	fd = go(_metadata, dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, image, stream_limit(dev)));
	close(fd);
	move_on(_metadata, dev, MIG_STOP);
	ASSERT_EQ(0, mig_set_state(dev, MIG_STOP_COPY, &fd));
	ASSERT_EQ(0, mig_save(fd, &again, stream_limit(dev)));
	close(fd);
	move_on(_metadata, dev, MIG_RUNNING);
	same = image->len == again.len && !memcmp(image->data, again.data, again.len);
	mig_stream_free(&again);
	return same;
}

#define TEMPORARY_END \
	"when read() is done on this temporary end of stream the kernel driver should return ENOMSG"

/*
 * Reads to the temporary end. Skips the test if the device never becomes quiet
 * because it always dirties its own state.
 */
#define DRAIN_OR_SKIP(dev, fd, stream) do {					\
	int __ret = mig_save(fd, stream, stream_limit(dev));			\
										\
	if (__ret == -EFBIG)							\
		SKIP(return, "the device does not become quiet in PRE_COPY");	\
	ASSERT_EQ(-ENOMSG, __ret)						\
		PROMISE(TEMPORARY_END " (%s after %zu bytes)",			\
			__ret ? strerror(-__ret) : "0", (stream)->len);		\
} while (0)

/* Up to this size each byte of an image is tested, above it a sample. */
#define SMALL_IMAGE	4096

/* A page followed by an unmapped one. */
static void *page_before_a_hole(void)
{
	size_t page = mig_page_size();
	void *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (map == MAP_FAILED || mprotect((char *)map + page, page, PROT_NONE))
		return NULL;
	return map;
}

#include "device/features.c"
#include "device/states.c"
#include "device/data_fd.c"
#include "device/pre_copy.c"
#include "device/resuming.c"
#include "device/sessions.c"
#include "device/concurrency.c"
#include "device/content.c"
#include "device/config.c"
#include "device/dma.c"
#include "device/irq.c"
#include "device/dma_log.c"
#include "draft/device.c"

static struct mig_option options[] = {
	{ .name = "other", .argument = "PATH", .help = "device with incompatible images" },
	{ .name = "scratch", .argument = "REGION:OFFSET:LENGTH",
	  .help = "memory of the device that the tests may write to" },
	{ .name = "drops-writes",
	  .help = "the device drops writes to this memory while it is stopped" },
	{ .name = "read-regions", .help = "reading all regions has no side effects" },
	{ .name = "device-ops", .argument = "NAME",
	  .help = "how the device does DMA and raises interrupts: vfio_mock, or a file" },
	{}
};

/* What a device that passes may still do wrong, and the arguments that would show some of it. */
static void print_untested(void)
{
	const char *scratch = mig_option("scratch");

	if (!ksft_test_num())
		return;
	ksft_print_msg("Not tested: the effect of registers%s%s%s%s%s%s%s\n",
		       ops && ops->copy ? "" : ", DMA (--device-ops)",
		       ops && ops->interrupt ? "" : ", interrupts (--device-ops)",
		       scratch ? "" : ", content (--scratch)",
		       scratch && mig_option("drops-writes") ? "" :
		       ", writes while it is stopped (--scratch, --drops-writes)",
		       mig_option("read-regions") ? "" : ", regions (--read-regions)",
		       mig_option("other") ? "" : ", images of other devices (--other)",
		       paths[1] ? "" : ", another device as the target (TARGET)");
}

int main(int argc, char **argv)
{
	int i, n = 1, nr = 0;

	argc = mig_take_options(argc, argv, options);
	if (mig_option("device-ops")) {
		ops = mig_ops_find(mig_option("device-ops"));
		if (!ops)
			return 1;
	}
	for (i = 1; i < argc; i++) {
		if (argv[i][0] == '/')
			paths[nr++ ? 1 : 0] = argv[i];
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;
	MIG_BE_PATIENT();
	/* The harness does not return. */
	atexit(print_untested);
	return test_harness_run(n, argv);
}
