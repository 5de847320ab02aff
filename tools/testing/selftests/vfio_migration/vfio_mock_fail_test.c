// SPDX-License-Identifier: GPL-2.0
/*
 * Every failure that the kernel can inject into what a client does with
 * vfio_mock: the first allocation or user copy fails, then the second, and so on
 * until nothing is left to fail. After each of them the errno is one that says
 * what happened, the device is usable or can be reset, and nothing is lost.
 *
 *	VFIO_MOCK_64K="SOURCE TARGET" ./vfio_mock_fail_test
 *
 * as root, with CONFIG_FAULT_INJECTION, CONFIG_FAILSLAB and
 * CONFIG_FAULT_INJECTION_USERCOPY (and CONFIG_FAIL_PAGE_ALLOC, if it is there).
 * The model is tools/testing/selftests/iommu/iommufd_fail_nth.c.
 */
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include "mock.h"
#include "mock_image.h"

/* More than any operation here has to fail. */
#define MOST_FAILURES	5000U

/* Turns a knob of debugfs, if there is one. */
static int knob(const char *attribute, const char *name, const char *value)
{
	char path[128];
	int fd, ret;

	snprintf(path, sizeof(path), "/sys/kernel/debug/%s/%s", attribute, name);
	fd = open(path, O_WRONLY);
	if (fd < 0)
		return -errno;
	ret = write(fd, value, strlen(value)) < 0 ? -errno : 0;
	close(fd);
	return ret;
}

struct nth {
	struct __test_metadata *_metadata;
	const char *what;
	unsigned int n;
	int fd;
	int ret;
	bool injected;
	int also;		/* an errno that the operation may say, too */
};

static void nth_set(struct nth *nth, unsigned int n)
{
	struct __test_metadata *_metadata = nth->_metadata;
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", n);
	ssize_t ret = pwrite(nth->fd, text, len, 0);

	/* It may have been this write that failed. */
	if (ret < 0 && errno == EFAULT)
		ret = pwrite(nth->fd, text, len, 0);
	ASSERT_EQ(len, ret)
		STEP("write to fail-nth: %s", strerror(errno));
}

static void nth_start(struct nth *nth, struct __test_metadata *_metadata,
		      const char *what, int fd)
{
	*nth = (struct nth){ ._metadata = _metadata, .what = what, .fd = fd };
}

/* Begins the next round; false when the last one met no failure. */
static bool nth_next(struct nth *nth)
{
	struct __test_metadata *_metadata = nth->_metadata;

	if (nth->n && !nth->injected) {
		EXPECT_EQ(0, nth->ret)
			PROMISE("%s works when nothing fails: %s", nth->what,
				strerror(-nth->ret));
		EXPECT_LT(1U, nth->n)
			TH_LOG("  %s met no failure at all", nth->what);
		TH_LOG("  %s: %u failures", nth->what, nth->n - 1);
		return false;
	}
	ASSERT_GT(MOST_FAILURES, ++nth->n)
		TH_LOG("  %s fails for ever", nth->what);
	return true;
}

/* From here on the Nth thing that can fail in this thread fails. */
static void nth_begin(struct nth *nth)
{
	nth_set(nth, nth->n);
}

/* And from here on nothing. @ret is what the operation said. */
static void nth_end(struct nth *nth, int ret)
{
	struct __test_metadata *_metadata = nth->_metadata;
	char text[16] = {};

	/* The number is counted down to 0 by what fails, which may be this read. */
	if (pread(nth->fd, text, sizeof(text) - 1, 0) < 0) {
		ASSERT_EQ(EFAULT, errno);
		nth->injected = false;
	} else {
		nth->injected = atoi(text) == 0;
	}
	nth_set(nth, 0);
	nth->ret = ret;
	if (ret) {
		EXPECT_TRUE(ret == -ENOMEM || ret == -EFAULT || ret == nth->also)
			PROMISE("%s, failure %u: ENOMEM or EFAULT, not %s", nth->what,
				nth->n, strerror(-ret));
		EXPECT_TRUE(nth->injected)
			PROMISE("%s, failure %u: nothing failed, but it did", nth->what,
				nth->n);
	}
}

#define for_each_failure(nth, text) \
	for (nth_start(nth, _metadata, text, self->fail_nth); nth_next(nth);)

FIXTURE(fail)
{
	struct mock src, dst;
	int fail_nth;
	struct nth nth;
};

FIXTURE_VARIANT(fail)
{
	enum mig_backend backend;
};

FIXTURE_VARIANT_ADD(fail, group) { .backend = MIG_GROUP };
FIXTURE_VARIANT_ADD(fail, iommufd) { .backend = MIG_IOMMUFD };

FIXTURE_SETUP(fail)
{
	static const char *const attributes[] = {
		"failslab", "fail_page_alloc", "fail_usercopy",
	};
	unsigned int i;

	self->src.dev.fd = -1;
	self->dst.dev.fd = -1;
	self->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR);
	if (self->fail_nth < 0)
		SKIP(return, "the kernel has no CONFIG_FAULT_INJECTION, or this is not root");
	if (knob("failslab", "ignore-gfp-wait", "N"))
		SKIP(return, "the kernel has no CONFIG_FAILSLAB, or debugfs is not mounted");
	knob("fail_page_alloc", "ignore-gfp-wait", "N");
	knob("fail_page_alloc", "min-order", "0");
	for (i = 0; i < ARRAY_SIZE(attributes); i++)
		knob(attributes[i], "verbose", "0");
	MOCK_OPEN_OR_SKIP(&self->src, "VFIO_MOCK_64K", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "VFIO_MOCK_64K", 1, variant->backend);
}

FIXTURE_TEARDOWN(fail)
{
	mock_close(&self->src);
	mock_close(&self->dst);
	close(self->fail_nth);
}

TEST_F_TIMEOUT(fail, open_and_close, 120)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	int ret;

	set64(&self->src, SCRATCH, 1);
	mig_close_device(dev);
	for_each_failure(nth, "open") {
		/* What mig_open() makes of files of VFIO that cannot be opened. */
		nth->also = -EOPNOTSUPP;
		nth_begin(nth);
		ret = mig_reopen_device(dev);
		nth_end(nth, ret);
		if (!ret) {
			EXPECT_EQ(0ULL, reg64(&self->src, SCRATCH))
				PROMISE("the next opener finds the state of power on");
			set64(&self->src, SCRATCH, nth->n);
		}
		mig_close_device(dev);
	}
	for_each_failure(nth, "close") {
		ASSERT_EQ(0, mig_reopen_device(dev));
		/* Close has nothing to say; what opens next has. */
		nth_begin(nth);
		mig_close_device(dev);
		nth_end(nth, 0);
		if (nth->n == 1 && !nth->injected)
			break;
	}
	ASSERT_EQ(0, mig_reopen_device(dev));
	expect_fresh(_metadata, &self->src, "after all failures of open and close");
}

TEST_F_TIMEOUT(fail, container_and_device, 120)
{
	struct mig_device dev;
	struct nth *nth = &self->nth;
	int ret;

	mig_close(&self->src.dev);
	for_each_failure(nth, "open with container or iommufd") {
		nth->also = -EOPNOTSUPP;
		nth_begin(nth);
		ret = mig_open(&dev, self->src.path, variant->backend);
		nth_end(nth, ret);
		if (!ret)
			mig_close(&dev);
	}
	ASSERT_EQ(0, mig_open(&self->src.dev, self->src.path, variant->backend));
}

TEST_F_TIMEOUT(fail, region_accesses, 120)
{
	static const struct {
		int region;
		__u64 at;
		size_t len;
	} accesses[] = {
		{ BAR0, 0, 4 }, { BAR0, 0, 4096 }, { BAR0, VFIO_MOCK_MSIX_TABLE, 72 },
		{ BAR2, 0, 8 }, { BAR2, 5, 40000 }, { CONFIG, 0, 256 }, { CONFIG, 4, 2 },
	};
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	static __u8 data[40000];
	struct vfio_region_info info;
	struct vfio_irq_info irq;
	unsigned int i;
	ssize_t ret = 0;

	for (i = 0; i < ARRAY_SIZE(accesses); i++) {
		for_each_failure(nth, "read() of a region") {
			nth_begin(nth);
			ret = mock_read(m, accesses[i].region, accesses[i].at, data,
					accesses[i].len);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		EXPECT_EQ((ssize_t)accesses[i].len, ret);
		for_each_failure(nth, "write() of a region") {
			nth_begin(nth);
			ret = mock_write(m, accesses[i].region, accesses[i].at, data,
					 accesses[i].len);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		EXPECT_EQ((ssize_t)accesses[i].len, ret);
	}
	for_each_failure(nth, "GET_REGION_INFO") {
		nth_begin(nth);
		ret = mig_region_info(&m->dev, BAR2, &info);
		nth_end(nth, ret);
	}
	for_each_failure(nth, "GET_IRQ_INFO") {
		nth_begin(nth);
		ret = mig_irq_info(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, &irq);
		nth_end(nth, ret);
	}
}

TEST_F_TIMEOUT(fail, interrupts, 120)
{
	const __u32 set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
	const __u32 raise = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
	int fds[VFIO_MOCK_MSIX_VECTORS];
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	unsigned int i;
	__u64 count;
	int ret;

	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		fds[i] = eventfd(0, EFD_NONBLOCK);
		ASSERT_LE(0, fds[i]);
	}
	for_each_failure(nth, "SET_IRQS") {
		nth_begin(nth);
		ret = mig_set_irqs(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, set, 0,
				   ARRAY_SIZE(fds), fds, sizeof(fds));
		nth_end(nth, ret);
	}
	for_each_failure(nth, "SET_IRQS that raises") {
		nth_begin(nth);
		ret = mig_set_irqs(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, raise, 0,
				   ARRAY_SIZE(fds), NULL, 0);
		nth_end(nth, ret);
	}
	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		EXPECT_EQ((ssize_t)sizeof(count), read(fds[i], &count, sizeof(count)))
			PROMISE("vector %u reaches its eventfd", i);
		close(fds[i]);
	}
}

/* Every SET_STATE from every state to every other. */
TEST_F_TIMEOUT(fail, every_transition, 300)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	__u32 from, to, state;
	char what[64];
	bool new_fd;
	int ret, fd, first;

	populate(_metadata, &self->src, 1);
	for (from = STOP; from < MIG_STATE_NR; from++) {
		for (to = STOP; to < MIG_STATE_NR; to++) {
			if (from == to || !mig_fsm_exists(dev->flags, from) ||
			    !mig_fsm_exists(dev->flags, to) ||
			    !mig_fsm_move(dev->flags, from, to, &new_fd, NULL))
				continue;
			snprintf(what, sizeof(what), "%s -> %s", mig_state_name(from),
				 mig_state_name(to));
			/* A session that nothing was loaded into has no way out but RESET. */
			if (from == RESUMING)
				continue;
			for_each_failure(nth, what) {
				ASSERT_EQ(0, mig_reset(dev));
				first = -1;
				if (from != RUNNING)
					ASSERT_EQ(0, mig_set_state(dev, from, &first));
				fd = -1;
				nth_begin(nth);
				ret = mig_set_state(dev, to, &fd);
				nth_end(nth, ret);
				ASSERT_EQ(0, mig_get_state(dev, &state));
				if (ret) {
					EXPECT_NE(ERROR, state)
						PROMISE("%s: a failure leaves a state of the path",
							what);
				} else {
					EXPECT_EQ(to, state);
				}
				if (ret && first >= 0 && state == from) {
					EXPECT_FALSE(mig_fd_is_dead(first))
						PROMISE("%s: the session goes on", what);
				}
				close(first);
				if (fd >= 0)
					close(fd);
			}
		}
	}
	/* With some shapes the last of them ends in RESUMING. */
	ASSERT_EQ(0, mig_reset(dev));
	for_each_failure(nth, "RESET") {
		ASSERT_EQ(0, mig_set_state(dev, STOP_COPY, &fd));
		nth_begin(nth);
		ret = mig_reset(dev);
		nth_end(nth, 0);
		EXPECT_EQ(0, ret)
			PROMISE("RESET is never refused");
		expect_state(_metadata, dev, RUNNING, "after RESET");
		close(fd);
		if (nth->n == 1 && !nth->injected)
			break;
	}
	expect_fresh(_metadata, &self->src, "after RESET");
}

/* What was read before a failure, and is read after it, is the whole image. */
TEST_F_TIMEOUT(fail, save, 300)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	struct mock_front front;
	__u8 byte = 0x77;
	int fd, ret;
	__u64 size;

	for_each_failure(nth, "read() of the data_fd") {
		image.len = 0;
		ASSERT_EQ(0, mig_reset(dev));
		populate(_metadata, &self->src, nth->n);
		fd = -1;
		if (dev->flags & VFIO_MIGRATION_PRE_COPY) {
			ASSERT_EQ(0, mig_set_state(dev, PRE_COPY, &fd));
			nth_begin(nth);
			ret = mig_save(fd, &image, stream_limit(dev));
			nth_end(nth, ret == -ENOMSG ? 0 : ret);
			EXPECT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(dev)))
				PROMISE("after a failure read() goes on where it was");
			store(_metadata, &self->src, 12345, &byte, 1);
		} else {
			ASSERT_EQ(0, mig_set_state(dev, STOP_COPY, &fd));
			nth_begin(nth);
			ret = mig_save(fd, &image, stream_limit(dev));
			nth_end(nth, ret);
		}
		ASSERT_EQ(0, mig_set_state(dev, STOP_COPY, NULL));
		EXPECT_EQ(0, mig_save(fd, &image, stream_limit(dev)));
		close(fd);
		read_front(_metadata, &self->src, &front);
		load_and_compare(_metadata, &self->dst, &image, 0, self->src.want, &front);
	}
	if (dev->flags & VFIO_MIGRATION_PRE_COPY) {
		ASSERT_EQ(0, mig_reset(dev));
		ASSERT_EQ(0, mig_set_state(dev, PRE_COPY, &fd));
		for_each_failure(nth, "PRECOPY_INFO") {
			info = (struct vfio_precopy_info){ .argsz = sizeof(info) };
			nth_begin(nth);
			ret = mig_precopy_info(fd, &info);
			nth_end(nth, ret);
		}
		for_each_failure(nth, "poll() of the data_fd") {
			nth_begin(nth);
			ret = mig_poll(fd, POLLIN, 0);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		close(fd);
	}
	for_each_failure(nth, "MIG_DATA_SIZE") {
		nth_begin(nth);
		ret = mig_data_size(dev, &size);
		nth_end(nth, ret);
	}
	mig_stream_free(&image);
}

/* After a failure the rest can be written, or the image is refused and RESET helps. */
TEST_F_TIMEOUT(fail, resume, 300)
{
	struct mig_device *dev = &self->dst.dev;
	struct nth *nth = &self->nth;
	struct mig_stream image = {};
	struct mock_front front;
	size_t done, more;
	int fd = -1, ret;

	populate(_metadata, &self->src, 3);
	stop_and_save(_metadata, &self->src, &fd, &image);
	read_front(_metadata, &self->src, &front);
	close(fd);
	for_each_failure(nth, "write() of the data_fd") {
		ASSERT_EQ(0, mig_reset(dev));
		ASSERT_EQ(0, mig_set_state(dev, RESUMING, &fd));
		done = 0;
		nth_begin(nth);
		ret = mig_load(fd, image.data, image.len, 5000, &done);
		nth_end(nth, ret);
		ret = mig_load(fd, image.data + done, image.len - done, 0, &more);
		if (!ret) {
			ret = mig_set_state(dev, STOP, NULL);
			EXPECT_EQ(0, ret)
				PROMISE("an image whose rest was taken after a failure is good: %s",
					strerror(-ret));
			expect_memory(_metadata, &self->dst, self->src.want, "resumed");
		} else {
			EXPECT_EQ(-ENOMEM, ret)
				PROMISE("what the device had no memory for stays refused: %s",
					strerror(-ret));
			EXPECT_NE(0, mig_set_state(dev, STOP, NULL));
		}
		close(fd);
	}
	load_and_compare(_metadata, &self->dst, &image, 0, self->src.want, &front);
	mig_stream_free(&image);
}

TEST_F_TIMEOUT(fail, mappings, 120)
{
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	void *map;
	int ret;

	for_each_failure(nth, "mmap()") {
		map = NULL;
		nth_begin(nth);
		ret = mig_region_map(&m->dev, BAR2, 0, m->size, &map);
		nth_end(nth, ret);
		if (ret)
			continue;
		ASSERT_EQ(0, munmap(map, m->size));
	}
	for_each_failure(nth, "a page fault") {
		ASSERT_EQ(0, mig_region_map(&m->dev, BAR2, 0, m->size, &map));
		nth_begin(nth);
		/* The kernel tries again by itself. */
		__atomic_store_n((__u8 *)map, nth->n, __ATOMIC_SEQ_CST);
		nth_end(nth, 0);
		EXPECT_EQ((__u8)nth->n, get(_metadata, m, BAR2, 0, 1))
			PROMISE("what is stored is in the device");
		ASSERT_EQ(0, munmap(map, m->size));
		if (nth->n == 1 && !nth->injected)
			break;
	}
	ASSERT_EQ(0, mig_set_state(&m->dev, STOP, NULL));
	for_each_failure(nth, "a page fault of a stopped device") {
		ASSERT_EQ(0, mig_region_map(&m->dev, BAR2, 0, m->size, &map));
		nth_begin(nth);
		__atomic_store_n((__u8 *)map, 0x55, __ATOMIC_SEQ_CST);
		nth_end(nth, 0);
		EXPECT_NE(0x55U, get(_metadata, m, BAR2, 0, 1))
			PROMISE("what is stored is dropped");
		ASSERT_EQ(0, munmap(map, m->size));
		if (nth->n == 1 && !nth->injected)
			break;
	}
}

TEST_F_TIMEOUT(fail, dma_logging, 120)
{
	struct vfio_device_feature_dma_logging_range ranges[3] = {
		{ 0, 1 << 20 }, { 1ULL << 32, 1ULL << 40 }, { ~0ULL << 40, 1ULL << 39 },
	};
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	__u64 page_size, bitmap[4];
	int ret;

	for_each_failure(nth, "LOGGING_START") {
		page_size = 4096;
		nth_begin(nth);
		ret = mig_log_start(dev, &page_size, ranges, ARRAY_SIZE(ranges));
		nth_end(nth, ret);
		ret = mig_log_stop(dev);
		EXPECT_EQ(0, ret);
	}
	page_size = 4096;
	ASSERT_EQ(0, mig_log_start(dev, &page_size, ranges, ARRAY_SIZE(ranges)));
	for_each_failure(nth, "LOGGING_REPORT") {
		nth_begin(nth);
		ret = mig_log_report(dev, 0, 1 << 20, 4096, bitmap);
		nth_end(nth, ret);
	}
	for_each_failure(nth, "LOGGING_STOP") {
		nth_begin(nth);
		ret = mig_log_stop(dev);
		nth_end(nth, ret);
		if (nth->n == 1 && !nth->injected)
			break;
	}
}

static int write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	int ret;

	if (fd < 0)
		return -errno;
	ret = write(fd, text, strlen(text)) < 0 ? -errno : 0;
	close(fd);
	return ret;
}

/*
 * Its creation is not among the tests: vfio core (7.3) warns of itself, in
 * vfio_group_release(), when it has no memory for a new group.
 */
TEST_F_TIMEOUT(fail, removal, 300)
{
	static const char uuid[] = "5eed0000-fa11-4000-8000-000000000001";
	static const char create[] =
		"/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-64K/create";
	static const char remove[] =
		"/sys/bus/mdev/devices/5eed0000-fa11-4000-8000-000000000001/remove";
	struct nth *nth = &self->nth;
	int ret;

	for_each_failure(nth, "the removal of a device") {
		ASSERT_EQ(0, write_text(create, uuid));
		nth_begin(nth);
		ret = write_text(remove, "1");
		nth_end(nth, ret);
		if (ret) {
			ASSERT_EQ(0, write_text(remove, "1"))
				PROMISE("a removal that failed can be done again");
		}
		EXPECT_NE(0, access(remove, F_OK));
	}
}

MIG_HARNESS_MAIN
