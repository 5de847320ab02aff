// SPDX-License-Identifier: GPL-2.0
/*
 * Conformance of any migratable VFIO device to the migration uAPI in
 * include/uapi/linux/vfio.h.
 *
 *	VFIO_DEVICE=/sys/bus/mdev/devices/UUID ./vfio_migration_test
 *	./vfio_migration_test /sys/bus/pci/devices/0000:01:00.1 [TARGET]
 *
 * The device must be bound to a VFIO driver and not be in use: the tests reset it
 * and load images into it, valid and invalid ones. For real hardware see
 * Documentation/vfio_migration_test.rst. A test for a feature that the device does
 * not claim, or that needs a variable that is not set, skips with this reason:
 *
 *	VFIO_DEVICE2		a compatible device as the target of migrations, also
 *				given by a second path; without it the same device is
 *				the target, after a reset
 *	VFIO_DEVICE_OTHER	a device with incompatible images
 *	VFIO_SCRATCH		REGION:OFFSET:LENGTH, memory of the device that the
 *				tests may write to and that is part of its state
 *	VFIO_READ_REGIONS	set: reading all regions has no side effects
 *	VFIO_MIGRATION_ROUNDS	factor for the number of repetitions
 *	VFIO_HANG_SECONDS	time limit for operations that do not wait
 *
 * "-V iommufd" excludes a backend, "-t NAME" selects a test, "-l" lists them.
 *
 * This file contains no knowledge of a specific device.
 */
#include <limits.h>
#include <sched.h>
#include <sys/uio.h>
#include <sys/wait.h>

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

FIXTURE(device)
{
	struct mig_device dev;
	struct mig_scratch scratch;
};

FIXTURE_VARIANT(device)
{
	enum mig_backend backend;
};

FIXTURE_VARIANT_ADD(device, group) { .backend = MIG_GROUP };
FIXTURE_VARIANT_ADD(device, iommufd) { .backend = MIG_IOMMUFD };

FIXTURE_SETUP(device)
{
	ASSERT_EQ(0, mig_scratch_parse(getenv("VFIO_SCRATCH"), &self->scratch))
		STEP("read VFIO_SCRATCH, which is REGION:OFFSET:LENGTH");
	OPEN_OR_SKIP(&self->dev, getenv("VFIO_DEVICE"), variant->backend);
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
		SKIP(return, "VFIO_SCRATCH names no memory of the device");	\
} while (0)

/* Factor for the number of rounds of the slow tests. */
static unsigned int rounds(void)
{
	const char *value = getenv("VFIO_MIGRATION_ROUNDS");
	int n = value ? atoi(value) : 1;

	return n > 0 ? n : 1;
}

/*
 * Returns the target of a migration: the second device, or the same one after a
 * reset, which then cannot be the source of more images.
 */
static struct mig_device *open_target(struct __test_metadata *_metadata,
				      struct mig_device *dev,
				      struct mig_device *second)
{
	const char *path = getenv("VFIO_DEVICE2");

	if (!path) {
		mig_reset(dev);
		return dev;
	}
	ASSERT_EQ(0, mig_open(second, path, dev->backend))
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

/* ---- VFIO_DEVICE_FEATURE ---- */

TEST_F(device, migration_flags)
{
	const __u64 known = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
			    VFIO_MIGRATION_PRE_COPY;

	EXPECT_EQ(0U, self->dev.flags & ~known)
		PROMISE("other combinations of flags have behavior to be defined in the future");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_GET | FEATURE_MIGRATION, NULL, 0))
		PROMISE("PROBE returns that GET of VFIO_DEVICE_FEATURE_MIGRATION is supported");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_MIGRATION,
				       NULL, 0))
		PROMISE("VFIO_DEVICE_FEATURE_MIGRATION supports only GET");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_GET | MIG_SET | FEATURE_STATE,
				 NULL, 0))
		PROMISE("PROBE returns that GET and SET of MIG_DEVICE_STATE are supported");
}

/* Checks common to all features with GET: valid and invalid arguments. */
static void check_get_arguments(struct __test_metadata *_metadata,
				const struct mig_device *dev, __u32 feature,
				size_t size)
{
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;
	__u8 data[256] = {};

	EXPECT_EQ(0, mig_feature(dev, MIG_GET | feature, data, size))
		PROMISE("GET of feature %u works", feature);
	EXPECT_EQ(0, mig_feature_argsz(dev, MIG_GET | feature, data, sizeof(data),
				       head + sizeof(data)))
		PROMISE("feature %u: a larger argsz is accepted", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size,
					     head + size - 1))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size, head))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size, head - 1))
		PROMISE("argsz must cover struct vfio_device_feature");
	EXPECT_EQ(-EINVAL, mig_feature(dev, MIG_GET | MIG_SET | feature, data, size))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(-EINVAL, mig_feature(dev, feature, data, size))
		PROMISE("without PROBE one of GET or SET must be requested");
	EXPECT_EQ(-EINVAL, mig_feature(dev, MIG_GET | feature | 1 << 19, data, size))
		PROMISE("unknown flags are refused");
	EXPECT_EQ(0, mig_feature_argsz(dev, MIG_PROBE | MIG_GET | feature, NULL, 0, head))
		PROMISE("PROBE needs no data");

	EXPECT_EQ(-1, ioctl(dev->fd, VFIO_DEVICE_FEATURE, NULL));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("an invalid pointer is EFAULT");
	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - head);
	hole->argsz = head + size;
	hole->flags = MIG_GET | feature;
	EXPECT_EQ(-1, ioctl(dev->fd, VFIO_DEVICE_FEATURE, hole));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("feature %u: a buffer that cannot be written is EFAULT", feature);
}

TEST_F(device, feature_arguments)
{
	check_get_arguments(_metadata, &self->dev, FEATURE_MIGRATION,
			    sizeof(struct vfio_device_feature_migration));
	check_get_arguments(_metadata, &self->dev, FEATURE_STATE,
			    sizeof(struct vfio_device_feature_mig_state));
	check_get_arguments(_metadata, &self->dev, FEATURE_SIZE,
			    sizeof(struct vfio_device_feature_mig_data_size));
	expect_state(_metadata, &self->dev, MIG_RUNNING, "after refused and probing calls");
}

TEST_F(device, set_state_arguments)
{
	struct vfio_device_feature_mig_state mig = { .device_state = MIG_STOP };
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;

	EXPECT_EQ(-EINVAL, mig_feature_argsz(&self->dev, MIG_SET | FEATURE_STATE, &mig,
					     sizeof(mig), head + sizeof(mig) - 1))
		PROMISE("argsz must cover struct vfio_device_feature_mig_state");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_SET | MIG_GET | FEATURE_STATE, &mig,
				       sizeof(mig)))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_STATE, &mig,
				 sizeof(mig)));
	expect_state(_metadata, &self->dev, MIG_RUNNING,
		     "after PROBE, which only returns whether SET is supported");

	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - head);
	hole->argsz = head + sizeof(mig);
	hole->flags = MIG_SET | FEATURE_STATE;
	EXPECT_EQ(-1, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, hole));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a buffer that cannot be read is EFAULT");
	expect_state(_metadata, &self->dev, MIG_RUNNING, "after EFAULT");
}

/* The state has changed by the time the descriptor cannot be returned. */
TEST_F(device, set_state_fails_if_fd_cannot_be_returned)
{
	size_t len = sizeof(struct vfio_device_feature) +
		     sizeof(struct vfio_device_feature_mig_state);
	struct vfio_device_feature_mig_state *mig;
	struct vfio_device_feature *feature;
	struct mig_stream image = {};

	NEED_RESET(&self->dev);
	feature = mmap(NULL, len, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, feature);
	feature->argsz = len;
	feature->flags = MIG_SET | FEATURE_STATE;
	mig = (void *)feature->data;
	mig->device_state = MIG_STOP_COPY;
	ASSERT_EQ(0, mprotect(feature, len, PROT_READ));
	EXPECT_EQ(-1, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, feature));
	EXPECT_EQ(EFAULT, errno);
	expect_state(_metadata, &self->dev, MIG_STOP_COPY, "after SET_STATE could not return its fd");
	EXPECT_EQ(0, mig_set_state(&self->dev, MIG_RUNNING, NULL))
		PROMISE("the user can attempt to return to some other state");
	take_image(_metadata, &self->dev, &image);
}

TEST_F(device, unknown_feature)
{
	static const __u32 ops[] = { MIG_GET, MIG_SET, MIG_PROBE | MIG_GET, MIG_PROBE | MIG_SET };
	__u64 data = 0;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		EXPECT_EQ(-ENOTTY, mig_feature(&self->dev, ops[i] | 0xffff, &data,
					       sizeof(data)))
			PROMISE("ENOTTY means that the device does not have the feature (flags %#x)",
				ops[i]);
	}
}

TEST_F(device, precopy_info_v2_arguments)
{
	int want = self->dev.flags & VFIO_MIGRATION_PRE_COPY ? 0 : -EINVAL;

	EXPECT_EQ(want, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 is available exactly if PRE_COPY is");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_PROBE | MIG_GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 supports only SET");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 supports only SET");
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev));
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev))
		PROMISE("a second opt-in changes nothing");
}

TEST_F(device, get_state_returns_no_fd)
{
	struct vfio_device_feature_mig_state mig;
	__u32 state;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		go(_metadata, &self->dev, state);
		mig = (struct vfio_device_feature_mig_state){
			.device_state = 0x55, .data_fd = 0x55,
		};
		ASSERT_EQ(0, mig_feature(&self->dev, MIG_GET | FEATURE_STATE, &mig,
					 sizeof(mig)));
		EXPECT_EQ(state, mig.device_state);
		EXPECT_EQ(-1, mig.data_fd)
			PROMISE("upon GET data_fd will be -1 (in %s)",
				mig_state_name(state));
	}
}

/* ---- The state machine ---- */

static void check_move(struct __test_metadata *_metadata,
		       const struct mig_device *dev, const struct mig_stream *image,
		       __u32 from, __u32 to)
{
	bool allowed, wants_fd, lives;
	int old, fd, ret, mode;
	__u32 state;

	old = go(_metadata, dev, from);
	if (from == MIG_RESUMING)
		load_all(_metadata, old, image);

	allowed = mig_fsm_move(dev->flags, from, to, &wants_fd, NULL);
	ret = mig_set_state(dev, to, &fd);
	ASSERT_EQ(0, mig_get_state(dev, &state));

	EXPECT_EQ(allowed ? 0 : -EINVAL, ret)
		PROMISE("%s -> %s (%d) %s", mig_state_name(from), mig_state_name(to),
			to, allowed ? "is a legal transition" :
			"is not permitted and returns an error");
	EXPECT_EQ(allowed ? to : from, state)
		PROMISE("%s -> %s (%d): the device is in %s afterwards",
			mig_state_name(from), mig_state_name(to), to,
			allowed ? "the new state" : "the old state");
	EXPECT_EQ(wants_fd, fd >= 0)
		PROMISE("%s -> %s (%d): a new data_fd is returned %s", mig_state_name(from),
			mig_state_name(to), to, wants_fd ? "back" :
			"only for a new data transfer session");
	if (wants_fd && fd >= 0) {
		mode = fcntl(fd, F_GETFL) & O_ACCMODE;
		EXPECT_EQ(to == MIG_RESUMING ? O_WRONLY : O_RDONLY, mode)
			PROMISE("the data_fd of %s has one direction", mig_state_name(to));
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("%s -> %s: the data_fd of the new session works",
				mig_state_name(from), mig_state_name(to));
	}
	if (old >= 0) {
		lives = !allowed || from == to ||
			(mig_fsm_saving(from) && mig_fsm_saving(to));
		EXPECT_EQ(!lives, mig_fd_is_dead(old))
			PROMISE("%s -> %s (%d) %s the data transfer session",
				mig_state_name(from), mig_state_name(to), to,
				lives ? "does not terminate" : "terminates");
		close(old);
	}
	if (fd >= 0)
		close(fd);
}

TEST_F_TIMEOUT(device, every_transition, 120)
{
	struct mig_stream image = {};
	unsigned int i;
	__u32 from;

	take_image(_metadata, &self->dev, &image);
	for (from = 0; from < MIG_STATE_NR; from++) {
		if (!mig_fsm_exists(self->dev.flags, from))
			continue;
		for (i = 0; i < ARRAY_SIZE(set_state_values); i++)
			check_move(_metadata, &self->dev, &image, from,
				   set_state_values[i]);
	}
}

/* A stream begun in PRE_COPY continues on the same descriptor to its end. */
TEST_F(device, saving_group_shares_one_session)
{
	struct mig_stream image = {};
	struct mig_device second = { .fd = -1 }, *to;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	EXPECT_LT(0, mig_read(fd, &image, 64))
		PROMISE("in PRE_COPY initial data is available");
	if (self->dev.flags & VFIO_MIGRATION_P2P) {
		move_on(_metadata, &self->dev, MIG_PRE_COPY_P2P);
		move_on(_metadata, &self->dev, MIG_PRE_COPY);
		move_on(_metadata, &self->dev, MIG_PRE_COPY_P2P);
	}
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* ---- The data_fd ---- */

TEST_F(device, data_fd_is_unidirectional_stream)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	char byte = 0;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	unsigned int i;
	int fd, flags;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		flags = fcntl(fd, F_GETFD);
		EXPECT_EQ(FD_CLOEXEC, flags & FD_CLOEXEC)
			PROMISE("a data_fd is close-on-exec");
		if (states[i] == MIG_RESUMING) {
			EXPECT_EQ(-1, read(fd, &byte, 1));
			EXPECT_EQ(EBADF, errno)
				PROMISE("the data_fd of RESUMING cannot be read");
		} else {
			EXPECT_EQ(-1, write(fd, &byte, 1));
			EXPECT_EQ(EBADF, errno)
				PROMISE("the data_fd of %s cannot be written",
					mig_state_name(states[i]));
		}
		EXPECT_EQ(-1, lseek(fd, 0, SEEK_SET));
		EXPECT_EQ(ESPIPE, errno)
			PROMISE("migration data is a stream: no lseek (%s)",
				mig_state_name(states[i]));
		EXPECT_EQ(-1, pread(fd, &byte, 1, 0));
		EXPECT_EQ(ESPIPE, errno)
			PROMISE("migration data is a stream: no pread (%s)",
				mig_state_name(states[i]));
		EXPECT_EQ(-1, pwrite(fd, &byte, 1, 0));
		EXPECT_EQ(ESPIPE, errno)
			PROMISE("migration data is a stream: no pwrite (%s)",
				mig_state_name(states[i]));
		EXPECT_EQ(-1, preadv(fd, &iov, 1, 0));
		EXPECT_EQ(ESPIPE, errno)
			PROMISE("migration data is a stream: no preadv (%s)",
				mig_state_name(states[i]));
		EXPECT_EQ(-1, pwritev(fd, &iov, 1, 0));
		EXPECT_EQ(ESPIPE, errno)
			PROMISE("migration data is a stream: no pwritev (%s)",
				mig_state_name(states[i]));
		EXPECT_EQ(-1, ioctl(fd, NO_SUCH_IOCTL, &byte));
		EXPECT_EQ(ENOTTY, errno)
			PROMISE("an ioctl that the data_fd does not support is ENOTTY (%s)",
				mig_state_name(states[i]));
		close(fd);
	}
}

/* Nothing is consumed: the image is still complete afterwards. */
TEST_F(device, empty_and_faulting_reads_consume_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(0, read(fd, &byte, 0))
		PROMISE("a read of zero bytes returns 0");
	EXPECT_LT(0, mig_read(fd, &image, 7));
	EXPECT_EQ(0, read(fd, &byte, 0));
	EXPECT_EQ(-1, read(fd, edge, 64));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a read into an invalid buffer is EFAULT");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 0));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* A read across an unmapped page returns a part; the next read returns the rest. */
TEST_F(device, read_across_fault_loses_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	ssize_t ret;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		ret = read(fd, edge - 13, 64);
		/* Either the part that fits was delivered, or nothing was consumed. */
		if (ret < 0) {
			EXPECT_EQ(EFAULT, errno);
			ret = read(fd, edge - 13, 13);
		}
		EXPECT_GE(13, ret)
			PROMISE("only the bytes copied are counted");
		ASSERT_EQ(0, mig_stream_add(&image, edge - 13, ret > 0 ? ret : 0));
	} while (ret > 0 && image.len < SMALL_IMAGE);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 1));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* The bytes of a readv(), in the order of its buffers: their number or -errno. */
static ssize_t read_vector(int fd, struct mig_stream *s, const struct iovec *iov,
			   unsigned int nr)
{
	ssize_t ret = readv(fd, iov, nr), left = ret;
	size_t part;
	unsigned int i;

	if (ret < 0)
		return -errno;
	for (i = 0; i < nr && left; i++, left -= part) {
		part = iov[i].iov_len < (size_t)left ? iov[i].iov_len : (size_t)left;
		if (mig_stream_add(s, iov[i].iov_base, part))
			return -ENOMEM;
	}
	return left ? -EOVERFLOW : ret;
}

/* Buffers of several sizes are filled in order, up to one that faults. */
TEST_F_TIMEOUT(device, readv_and_writev_keep_the_order, 120)
{
	static __u8 first[1], second[4095], third[7], fourth[65536];
	struct mig_device other = { .fd = -1 }, *to;
	struct iovec iov[] = {
		{ first, sizeof(first) }, { second, sizeof(second) },
		{ third, sizeof(third) }, { fourth, sizeof(fourth) },
	};
	struct mig_stream image = {};
	size_t at = 0, part;
	struct iovec hole[2];
	ssize_t ret;
	char *edge;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += sysconf(_SC_PAGESIZE);
	hole[0] = (struct iovec){ edge - 13, 13 };
	hole[1] = (struct iovec){ edge, 64 };

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	ret = read_vector(fd, &image, hole, 2);
	ASSERT_LT(0, ret)
		PROMISE("a readv() returns the bytes copied before a fault (%s)",
			strerror(-ret));
	ASSERT_GE(13, ret)
		PROMISE("only the bytes copied are counted");
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
		ASSERT_LE(0, ret)
			PROMISE("readv() reads like read() (%s)", strerror(-ret));
		ASSERT_LT(image.len, stream_limit(&self->dev));
	} while (ret > 0);
	EXPECT_EQ(0, read_vector(fd, &image, iov, ARRAY_SIZE(iov)))
		PROMISE("permanent end of stream: readv() always returns 0");
	close(fd);

	to = open_target(_metadata, &self->dev, &other);
	fd = go(_metadata, to, MIG_RESUMING);
	memcpy(edge - 13, image.data, 13);
	ret = writev(fd, hole, 2);
	ASSERT_LT(0, ret)
		PROMISE("a writev() returns the bytes taken before a fault (%s)",
			strerror(errno));
	ASSERT_GE(13, ret)
		PROMISE("only the bytes taken are counted");
	for (at = ret; at < image.len; at += ret) {
		part = image.len - at;
		iov[0] = (struct iovec){ image.data + at, part ? 1 : 0 };
		iov[1] = (struct iovec){ image.data + at + 1, part > 4096 ? 4095 : 0 };
		iov[2] = (struct iovec){ image.data + at + 4096, part > 4103 ? 7 : 0 };
		iov[3] = (struct iovec){ image.data + at + 4103,
					 part > 8192 ? 4089 : 0 };
		ret = writev(fd, iov, ARRAY_SIZE(iov));
		ASSERT_LT(0, ret)
			PROMISE("writev() writes like write() (%s)", strerror(errno));
	}
	ASSERT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("readv() and writev() neither lose nor repeat bytes");
	move_on(_metadata, to, MIG_RUNNING);
	close(fd);
}

/* The call after the last byte returns ENOMSG, not the call with the last bytes. */
TEST_F_TIMEOUT(device, readv_stops_before_temporary_end, 60)
{
	static __u8 first[100], second[8192];
	struct mig_device other = { .fd = -1 }, *to;
	struct iovec iov[] = {
		{ first, sizeof(first) }, { second, sizeof(second) },
	};
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	ssize_t ret;
	int fd, i;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
		if (image.len > stream_limit(&self->dev))
			SKIP(return, "the device does not become quiet in PRE_COPY");
	} while (ret > 0);
	ASSERT_EQ(-ENOMSG, ret)
		PROMISE(TEMPORARY_END " (%zd after %zu bytes)", ret, image.len);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(-ENOMSG, read_vector(fd, &image, iov, ARRAY_SIZE(iov)))
			PROMISE(TEMPORARY_END);
	}
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes + info.dirty_bytes)
		PROMISE("temporary end: both initial_bytes and dirty_bytes are zero");

	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
	} while (ret > 0);
	ASSERT_EQ(0, ret)
		PROMISE("in STOP_COPY the end is permanent; ENOMSG may not be returned");
	to = open_target(_metadata, &self->dev, &other);
	load_and_run(_metadata, to, &image, 0);
}

/* splice() moves the stream through a pipe, or fails with EINVAL without effect. */
TEST_F_TIMEOUT(device, splice_moves_the_stream_or_is_refused, 60)
{
	struct mig_device other = { .fd = -1 }, *to;
	struct mig_stream image = {};
	ssize_t in, out, ret;
	int fd, pipes[2];
	char byte;

	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		in = splice(fd, NULL, pipes[1], NULL, 1 << 16, 0);
		if (in < 0)
			break;
		for (out = 0; out < in; out += ret) {
			ret = mig_read(pipes[0], &image, in - out);
			ASSERT_LT(0, ret);
		}
		ASSERT_LT(image.len, stream_limit(&self->dev));
	} while (in > 0);
	if (in < 0) {
		ASSERT_EQ(EINVAL, errno)
			PROMISE("a data_fd without splice() returns EINVAL");
		ASSERT_EQ(0U, image.len)
			PROMISE("a data_fd without splice() returns EINVAL from the start");
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	}
	EXPECT_EQ(0, read(fd, &byte, 1))
		PROMISE("permanent end of stream: read() always returns 0");
	close(fd);

	to = open_target(_metadata, &self->dev, &other);
	fd = go(_metadata, to, MIG_RESUMING);
	for (out = 0; out < (ssize_t)image.len; out += in) {
		in = image.len - out < 4096 ? image.len - out : 4096;
		ASSERT_EQ(in, write(pipes[1], image.data + out, in));
		ret = splice(pipes[0], NULL, fd, NULL, in, 0);
		if (ret < 0)
			break;
		ASSERT_EQ(in, ret)
			PROMISE("a data_fd takes all data of a splice()");
	}
	if (out < (ssize_t)image.len) {
		ASSERT_EQ(EINVAL, errno)
			PROMISE("a data_fd without splice() returns EINVAL");
		ASSERT_EQ(0, out)
			PROMISE("a data_fd without splice() returns EINVAL from the start");
		ASSERT_EQ(0, mig_load(fd, image.data, image.len, 0, NULL));
	}
	ASSERT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("splice() neither loses nor repeats bytes");
	move_on(_metadata, to, MIG_RUNNING);
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

TEST_F(device, poll_in_every_state)
{
	static const __u32 states[] = {
		MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP_COPY, MIG_RESUMING,
	};
	int fd, events, want;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		want = states[i] == MIG_RESUMING ? POLLOUT : POLLIN;
		events = mig_poll(fd, POLLIN | POLLOUT, 0);
		EXPECT_EQ(want, events & want)
			PROMISE("the data_fd of a new %s session is %s", mig_state_name(states[i]),
				want == POLLIN ? "readable" : "writable");
		EXPECT_EQ(0, events & (POLLERR | POLLHUP | POLLNVAL))
			PROMISE("a new %s session has no error (%#x)",
				mig_state_name(states[i]), events);
		if (mig_reset(&self->dev))
			mig_set_state(&self->dev, MIG_RUNNING, NULL);
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a %s session that has ended",
				mig_state_name(states[i]));
		close(fd);
	}
}

/* A write that faults takes the readable part or nothing; the rest can follow. */
TEST_F(device, empty_and_faulting_writes_consume_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t at = 0, part;
	ssize_t ret;
	char *edge;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	EXPECT_EQ(0, write(fd, image.data, 0))
		PROMISE("a write of zero bytes returns 0");
	EXPECT_EQ(-1, write(fd, edge, 16));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a write from an invalid buffer is EFAULT");
	while (at < image.len) {
		part = image.len - at < 1000 ? image.len - at : 1000;
		memcpy(edge - part, image.data + at, part);
		ret = -1;
		/* The image ends before the unmapped page. */
		if (part < image.len - at)
			ret = write(fd, edge - part, part + 16);
		if (ret < 0)
			ret = write(fd, edge - part, part);
		ASSERT_LT(0, ret)
			PROMISE("readable bytes are taken: %s", strerror(errno));
		ASSERT_GE((ssize_t)part, ret)
			PROMISE("only the bytes taken are counted");
		at += ret;
	}
	EXPECT_EQ(0, write(fd, image.data, 0));
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("faults neither lose nor repeat bytes: the image is complete");
}

/* A thread that reads or writes a part of a shared stream. */
struct sharer {
	pthread_t thread;
	int fd;
	size_t chunk;
	struct mig_pieces got;		/* of a reader */
	const __u8 *from;		/* of a writer */
	size_t len;
	struct sharer *after;		/* starts after that one, or NULL */
	atomic_bool begun;
	struct poller poller;		/* of a reader, to find out whether it sleeps */
	int err;
};

static void *reader_main(void *arg)
{
	struct sharer *s = arg;
	ssize_t ret;

	atomic_store(&s->poller.tid, gettid());
	while ((ret = mig_pieces_read(s->fd, &s->got, s->chunk)) > 0)
		;
	s->err = ret;
	atomic_store(&s->poller.done, true);
	return NULL;
}

static void *writer_main(void *arg)
{
	struct sharer *s = arg;
	size_t first = s->chunk < s->len ? s->chunk : s->len;

	while (s->after && !atomic_load(&s->after->begun))
		sched_yield();
	s->err = mig_load(s->fd, s->from, first, 0, NULL);
	atomic_store(&s->begun, true);
	if (!s->err)
		s->err = mig_load(s->fd, s->from + first, s->len - first, s->chunk, NULL);
	return NULL;
}

TEST_F_TIMEOUT(device, parallel_readers_get_disjoint_ordered_bytes, 120)
{
	struct mig_stream image = {};
	struct sharer sharers[2];
	unsigned int i, r;
	int fd;

	if (!save_steady(_metadata, &self->dev, &image))
		SKIP(return, "two images of the stopped device differ");
	for (r = 0; r < 2 * rounds(); r++) {
		fd = go(_metadata, &self->dev, MIG_STOP_COPY);
		memset(sharers, 0, sizeof(sharers));
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			sharers[i].fd = fd;
			sharers[i].chunk = image.len / 100 + 13 + i;
			ASSERT_EQ(0, pthread_create(&sharers[i].thread, NULL, reader_main,
						    &sharers[i]));
		}
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			pthread_join(sharers[i].thread, NULL);
			EXPECT_EQ(0, sharers[i].err)
				PROMISE("each reader reaches the permanent end: %s",
					strerror(-sharers[i].err));
		}
		EXPECT_EQ(image.len, sharers[0].got.data.len + sharers[1].got.data.len)
			PROMISE("each byte goes to exactly one of the parallel readers");
		EXPECT_EQ(1, mig_pieces_make_up(&image, &sharers[0].got, &sharers[1].got))
			PROMISE("each of the parallel readers gets its bytes in order");
		close(fd);
		move_on(_metadata, &self->dev, MIG_RUNNING);
	}
}

TEST_F_TIMEOUT(device, parallel_writers_load_valid_image_or_fail, 120)
{
	struct mig_stream image = {}, whole = {}, now = {};
	unsigned int i, r, refused = 0;
	struct sharer sharers[2];
	bool steady;
	int fd, ret;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	load_and_run(_metadata, &self->dev, &image, 0);
	steady = save_steady(_metadata, &self->dev, &whole);

	for (r = 0; r < 4 * rounds(); r++) {
		ASSERT_EQ(0, mig_reset(&self->dev));
		fd = go(_metadata, &self->dev, MIG_RESUMING);
		memset(sharers, 0, sizeof(sharers));
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			sharers[i].fd = fd;
			sharers[i].chunk = image.len / 32 + 1;
			sharers[i].from = image.data + i * (image.len / 2);
			sharers[i].len = i ? image.len - image.len / 2 : image.len / 2;
		}
		/* In every second round the order is certainly wrong. */
		if (r % 2)
			sharers[0].after = &sharers[1];
		for (i = 0; i < ARRAY_SIZE(sharers); i++)
			ASSERT_EQ(0, pthread_create(&sharers[i].thread, NULL, writer_main,
						    &sharers[i]));
		for (i = 0; i < ARRAY_SIZE(sharers); i++)
			pthread_join(sharers[i].thread, NULL);
		ret = mig_set_state(&self->dev, MIG_STOP, NULL);
		if (sharers[0].err || sharers[1].err) {
			EXPECT_NE(0, ret)
				PROMISE("data that write() refused (%s) is not incorporated into the device state",
					strerror(-(sharers[0].err ?: sharers[1].err)));
		}
		close(fd);
		refused += ret != 0;
		if (ret)
			continue;
		move_on(_metadata, &self->dev, MIG_RUNNING);
		if (!save_steady(_metadata, &self->dev, &now) || !steady)
			continue;
		EXPECT_TRUE(now.len == whole.len && !memcmp(now.data, whole.data, now.len))
			PROMISE("parallel writers load a valid image or cause an error");
	}
	EXPECT_NE(0U, refused)
		PROMISE("inconsistent data (second half first) is refused");
	ASSERT_EQ(0, mig_reset(&self->dev));
	load_and_run(_metadata, &self->dev, &image, 0);
}

/* One read() or write() by a child process with an inherited descriptor. */
static ssize_t in_child(int fd, __u8 *shared, size_t len, bool write_it)
{
	ssize_t *ret = (ssize_t *)shared;
	pid_t child;

	*ret = -ECHILD;
	child = fork();
	if (!child) {
		*ret = write_it ? write(fd, ret + 1, len) : read(fd, ret + 1, len);
		_exit(0);
	}
	if (child < 0 || waitpid(child, NULL, 0) != child)
		return -ECHILD;
	return *ret;
}

TEST_F(device, duplicates_share_one_stream)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t page = mig_page_size(), at = 0;
	int fd, copy, i;
	__u8 *shared;
	ssize_t ret;

	shared = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	ASSERT_NE(MAP_FAILED, shared);
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	copy = dup(fd);
	ASSERT_LE(0, copy);
	for (i = 0; i < 3; i++) {
		EXPECT_LT(0, mig_read(fd, &image, 5))
			PROMISE("a descriptor and its duplicates read one stream");
		EXPECT_LT(0, mig_read(copy, &image, 3))
			PROMISE("a descriptor and its duplicates read one stream");
		ret = in_child(fd, shared, 4, false);
		ASSERT_LT(0, ret)
			PROMISE("a forked process continues reading the same stream");
		ASSERT_EQ(0, mig_stream_add(&image, shared + sizeof(ssize_t), ret));
	}
	close(fd);
	ASSERT_EQ(0, mig_save(copy, &image, stream_limit(&self->dev)))
		PROMISE("a duplicate stays valid after the original is closed");
	close(copy);

	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	copy = dup(fd);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(0, mig_load(fd, image.data + at, 5, 0, NULL));
		EXPECT_EQ(0, mig_load(copy, image.data + at + 5, 3, 0, NULL));
		memcpy(shared + sizeof(ssize_t), image.data + at + 8, 4);
		EXPECT_EQ(4, in_child(fd, shared, 4, true))
			PROMISE("a forked process continues writing the same stream");
		at += 12;
	}
	close(fd);
	EXPECT_EQ(0, mig_load(copy, image.data + at, image.len - at, 0, NULL));
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("a descriptor, its duplicates and those of a child write one stream");
}

TEST_F(device, data_fd_in_another_process)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct mig_helper helper;
	__u8 buffer[4096];
	size_t at = 0, part;
	ssize_t ret;
	int fd;

	ASSERT_EQ(0, mig_helper_start(&helper));
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		EXPECT_LE(0, mig_read(fd, &image, 9));
		ret = mig_helper_read(&helper, fd, buffer, sizeof(buffer));
		ASSERT_LE(0, ret)
			PROMISE("a process that received the data_fd can read from it: %s",
				strerror(-ret));
		ASSERT_EQ(0, mig_stream_add(&image, buffer, ret));
	} while (ret > 0);
	close(fd);

	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	while (at < image.len) {
		part = image.len - at < sizeof(buffer) ? image.len - at : sizeof(buffer);
		ret = mig_helper_write(&helper, fd, image.data + at, part);
		ASSERT_LT(0, ret)
			PROMISE("a process that received the data_fd can write to it: %s",
				strerror(-ret));
		at += ret;
		part = image.len - at < 9 ? image.len - at : 9;
		EXPECT_EQ(0, mig_load(fd, image.data + at, part, 0, NULL));
		at += part;
	}
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("two processes in turns transfer a whole image");
	mig_helper_stop(&helper);
}

/* ---- Ends of stream ---- */

TEST_F_TIMEOUT(device, temporary_end, 60)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	char byte;
	int fd, i;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
		PROMISE("in PRE_COPY initial data is available to be read");
	DRAIN_OR_SKIP(&self->dev, fd, &image);

	for (i = 0; i < 3; i++) {
		EXPECT_EQ(-1, read(fd, &byte, 1));
		EXPECT_EQ(ENOMSG, errno)
			PROMISE(TEMPORARY_END);
		EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
			PROMISE("poll waits for more data: not readable at the temporary end");
	}
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes)
		PROMISE("temporary end: both initial_bytes and dirty_bytes are zero");
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("temporary end: both initial_bytes and dirty_bytes are zero");

	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
		PROMISE("once in STOP_COPY poll always returns readable");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)))
		PROMISE("in STOP_COPY the end is permanent; ENOMSG may not be returned");
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

static void check_permanent_end(struct __test_metadata *_metadata, int fd)
{
	char byte;
	int i;

	for (i = 0; i < 3; i++) {
		EXPECT_EQ(0, read(fd, &byte, 1))
			PROMISE("permanent end of stream: read() always returns 0 (%s)",
				strerror(errno));
		EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
			PROMISE("permanent end of stream: poll always returns readable");
	}
}

TEST_F(device, permanent_end)
{
	struct mig_stream image = {};
	int fd;

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
		PROMISE("once in STOP_COPY poll always returns readable");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)))
		PROMISE("permanent end of stream: read() returns 0");
	check_permanent_end(_metadata, fd);
}

TEST_F(device, permanent_end_after_pre_copy)
{
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)))
		PROMISE("permanent end of stream: read() returns 0");
	check_permanent_end(_metadata, fd);
}

TEST_F_TIMEOUT(device, poller_wakes_on_stop_copy, 60)
{
	struct mig_stream image = {};
	struct poller poller;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	poller_start(_metadata, &poller, fd);
	EXPECT_FALSE(atomic_load(&poller.done))
		PROMISE("poll waits at the temporary end of stream");
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("a poller that waits in PRE_COPY wakes when the device enters STOP_COPY");
}

/* Leaves the saving group by @state, which must wake the poller. */
static void check_wake_by(struct __test_metadata *_metadata,
			  const struct mig_device *dev, int fd, __u32 state)
{
	struct poller poller;
	char byte;
	int ret;

	poller_start(_metadata, &poller, fd);
	ret = state == MIG_ERROR ? mig_reset(dev) : mig_set_state(dev, state, NULL);
	ASSERT_EQ(0, ret);
	EXPECT_NE(0, poller_join(&poller))
		PROMISE("a poller wakes when the data transfer session ends by %s",
			state == MIG_ERROR ? "RESET" : mig_state_name(state));
	EXPECT_EQ(-1, read(fd, &byte, 1));
	EXPECT_EQ(ENODEV, errno)
		PROMISE("the session has ended: read() fails with ENODEV");
}

TEST_F_TIMEOUT(device, poller_wakes_on_running, 60)
{
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_wake_by(_metadata, &self->dev, fd, MIG_RUNNING);
}

TEST_F_TIMEOUT(device, poller_wakes_on_reset, 60)
{
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	NEED_RESET(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_wake_by(_metadata, &self->dev, fd, MIG_ERROR);
}

TEST_F_TIMEOUT(device, poller_wakes_on_close, 60)
{
	struct mig_stream image = {};
	struct poller poller;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	poller_start(_metadata, &poller, fd);
	mig_close_device(&self->dev);
	EXPECT_NE(0, poller_join(&poller))
		PROMISE("a poller wakes when the device is closed");
}

/* ---- Pre-copy accounting ---- */

/* The minimum number of bytes of a read() from a large stream. */
#define READ_MIN	4096

TEST_F_TIMEOUT(device, initial_bytes_fall_to_zero, 60)
{
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	size_t step, limit;
	__u64 first, last;
	ssize_t ret;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info))
		PROMISE("support for VFIO_MIG_GET_PRECOPY_INFO is mandatory");
	EXPECT_NE(0U, info.initial_bytes)
		PROMISE("initial_bytes should have a non-zero initial value");
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("dirty_bytes starts at zero");

	first = info.initial_bytes;
	last = first;
	step = first / 16 > READ_MIN ? first / 16 : READ_MIN;
	if (step > first)
		step = first / 3 + 1;
	limit = stream_limit(&self->dev);
	while ((ret = mig_read(fd, &image, step)) > 0) {
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_GE(last, info.initial_bytes)
			PROMISE("initial_bytes decreases as migration data is read");
		last = info.initial_bytes;
		if (image.len > limit)
			SKIP(return, "the device does not become quiet in PRE_COPY");
	}
	EXPECT_EQ(-ENOMSG, ret)
		PROMISE(TEMPORARY_END);
	EXPECT_EQ(0U, last)
		PROMISE("initial_bytes progresses towards zero as precopy data is read");
}

TEST_F(device, precopy_info_arguments)
{
	struct vfio_precopy_info info, *hole;
	struct {
		struct vfio_precopy_info info;
		__u64 tail[8];
	} large = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);

	info = (struct vfio_precopy_info){ .argsz = sizeof(info) - 1 };
	EXPECT_EQ(-1, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(EINVAL, errno)
		PROMISE("argsz must cover struct vfio_precopy_info");
	info.argsz = 0;
	EXPECT_EQ(-1, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(EINVAL, errno)
		PROMISE("argsz must cover struct vfio_precopy_info");

	large.info.argsz = sizeof(large);
	memset(large.tail, 0x5a, sizeof(large.tail));
	EXPECT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &large))
		PROMISE("a larger argsz is accepted");
	EXPECT_EQ(0x5a5a5a5a5a5a5a5aULL, large.tail[0])
		PROMISE("nothing is written past the structure");

	EXPECT_EQ(-1, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, NULL));
	EXPECT_EQ(EFAULT, errno);
	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - 16);
	hole->argsz = sizeof(info);
	EXPECT_EQ(-1, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, hole));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(0, mig_precopy_info(fd, &info));
}

TEST_F(device, precopy_info_only_in_pre_copy)
{
	static const __u32 states[] = {
		MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP_COPY, MIG_STOP, MIG_RUNNING,
	};
	struct vfio_precopy_info info;
	unsigned int i;
	int fd, ret;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], NULL));
		ret = mig_precopy_info(fd, &info);
		if (states[i] == MIG_PRE_COPY || states[i] == MIG_PRE_COPY_P2P) {
			EXPECT_EQ(0, ret)
				PROMISE("this ioctl is valid in %s", mig_state_name(states[i]));
		} else if (states[i] == MIG_STOP_COPY) {
			EXPECT_EQ(-EINVAL, ret)
				PROMISE("this ioctl is valid only in PRE_COPY states and the kernel driver should return EINVAL from STOP_COPY");
		} else {
			/* The session has ended as well: both errors are valid. */
			EXPECT_TRUE(ret == -EINVAL || ret == -ENODEV)
				PROMISE("this ioctl is valid only in PRE_COPY states (%d in %s)",
					ret, mig_state_name(states[i]));
		}
	}
	close(fd);

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(-EINVAL, mig_precopy_info(fd, &info))
		PROMISE("a session that starts in STOP_COPY has no pre-copy information");
	close(fd);
	fd = go(_metadata, &self->dev, MIG_RESUMING);
	ret = mig_precopy_info(fd, &info);
	EXPECT_TRUE(ret == -EINVAL || ret == -ENOTTY)
		PROMISE("a session of RESUMING has no pre-copy information (%d)", ret);
	close(fd);
}

TEST_F(device, precopy_info_flags)
{
	struct vfio_precopy_info info = {
		.argsz = sizeof(info), .flags = 0xdeadbeef,
	};
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0xdeadbeef, info.flags)
		PROMISE("without the opt-in to PRECOPY_INFOv2 the flags field is unchanged");
	ASSERT_EQ(0, mig_opt_in_v2(&self->dev));
	info.flags = 0xdeadbeef;
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0U, info.flags)
		PROMISE("with PRECOPY_INFOv2 flags is an output field: no re-initialization");
	close(fd);

	/* The opt-in ends with this opening of the device. */
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev));
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	info.flags = 0xdeadbeef;
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0xdeadbeef, info.flags)
		PROMISE("the next opener has not opted in");
}

TEST_F(device, precopy_info_accepts_draft_number)
{
	struct vfio_precopy_info info, draft = { .argsz = sizeof(draft) };
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	if (ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft) && errno == ENOTTY)
		SKIP(return, "the device supports only mainline's number of the ioctl");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(info.initial_bytes, draft.initial_bytes);
	EXPECT_EQ(info.dirty_bytes, draft.dirty_bytes)
		PROMISE("both ioctl numbers return the same values");
}

/* ---- MIG_DATA_SIZE ---- */

TEST_F(device, data_size_in_every_state)
{
	__u32 state;
	__u64 size;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		go(_metadata, &self->dev, state);
		EXPECT_EQ(0, mig_data_size(&self->dev, &size))
			PROMISE("MIG_DATA_SIZE can be called on each device state (%s)",
				mig_state_name(state));
	}
}

/* Queries the size in @from, stops and streams: the size must not be too small. */
static void check_data_size(struct __test_metadata *_metadata,
			    const struct mig_device *dev, __u32 from, int fd)
{
	struct mig_stream image = {};
	__u64 before, stopped;
	int new_fd;

	ASSERT_EQ(0, mig_data_size(dev, &before));
	ASSERT_EQ(0, mig_set_state(dev, MIG_STOP_COPY, &new_fd));
	if (fd < 0)
		fd = new_fd;
	ASSERT_EQ(0, mig_data_size(dev, &stopped));
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(dev)));
	EXPECT_GE(before, image.len)
		PROMISE("MIG_DATA_SIZE in %s is what will be required to complete stop copy",
			mig_state_name(from));
	EXPECT_GE(stopped, image.len)
		PROMISE("MIG_DATA_SIZE in STOP_COPY is what will be required to complete it");
	mig_stream_free(&image);
	close(fd);
}

TEST_F_TIMEOUT(device, data_size_bounds_the_stream, 60)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_STOP, MIG_PRE_COPY, MIG_PRE_COPY_P2P,
	};
	struct mig_stream image = {};
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		check_data_size(_metadata, &self->dev, states[i], fd);
	}
	if (!(self->dev.flags & VFIO_MIGRATION_PRE_COPY))
		return;
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	ASSERT_LT(0, mig_read(fd, &image, 100));
	check_data_size(_metadata, &self->dev, MIG_PRE_COPY, fd);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_data_size(_metadata, &self->dev, MIG_PRE_COPY, fd);
}

/* ---- RESUMING ---- */

TEST_F_TIMEOUT(device, image_loads_in_any_chunks, 120)
{
	const size_t page = mig_page_size(), chunks[] = { 0, 7, page - 1, page, 1 << 20, 1 };
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, again = {};
	unsigned int i;

	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		/* For a large image a system call for each byte takes too long. */
		if (chunks[i] && image.len / chunks[i] > (1 << 18))
			continue;
		load_and_run(_metadata, to, &image, chunks[i]);
	}
	/* The target must be a valid source. */
	take_image(_metadata, to, &again);
	load_and_run(_metadata, &self->dev, &again, 0);
}

/*
 * Writes @len bytes of an invalid image and requests STOP. Returns whether this
 * failed, and checks that a failure keeps the state.
 */
static bool offer(struct __test_metadata *_metadata, const struct mig_device *dev,
		  const void *data, size_t len)
{
	int fd, written, ret;
	__u32 state;

	fd = go(_metadata, dev, MIG_RESUMING);
	written = mig_load(fd, data, len, 0, NULL);
	ret = mig_set_state(dev, MIG_STOP, NULL);
	ASSERT_EQ(0, mig_get_state(dev, &state));
	if (written) {
		EXPECT_NE(0, ret)
			PROMISE("data after a failed write() (%s) is not part of the device state",
				strerror(-written));
	}
	if (ret) {
		EXPECT_TRUE(state == MIG_RESUMING || state == MIG_ERROR)
			PROMISE("after a failed RESUMING -> STOP the state is RESUMING or ERROR, not %s",
				mig_state_name(state));
		EXPECT_NE(0, mig_set_state(dev, MIG_RUNNING, NULL))
			PROMISE("a device with refused data does not run");
		ASSERT_EQ(0, mig_reset(dev))
			PROMISE("to abort a RESUMING session the device must be reset");
		expect_state(_metadata, dev, MIG_RUNNING, "after a reset that ends a refused load");
	}
	close(fd);
	return ret != 0;
}

/* After each refusal a good image loads; large images are loaded only once. */
static void load_after_refusal(struct __test_metadata *_metadata,
			       const struct mig_device *dev, const struct mig_stream *image)
{
	if (image->len <= 1 << 20)
		load_and_run(_metadata, dev, image, 0);
}

TEST_F_TIMEOUT(device, incomplete_image_is_refused, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t all, i, at;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);

	/* Each length of a small image; for a large one the shortest and a sample. */
	all = image.len <= SMALL_IMAGE ? image.len : 64 * rounds();
	if (all > image.len)
		all = image.len;
	for (i = 0; i < all + 16 * rounds() + 1; i++) {
		at = i;
		if (i >= all)
			at = (image.len - 1) / (16 * rounds()) * (i - all);
		if (i == all + 16 * rounds())
			at = image.len - 1;
		EXPECT_TRUE(offer(_metadata, to, image.data, at))
			PROMISE("incomplete user data must fail SET_STATE (%zu of %zu bytes)",
				at, image.len);
		go_home(_metadata, to);
		load_after_refusal(_metadata, to, &image);
	}
	load_and_run(_metadata, to, &image, 0);
}

/* Whether a change is an error depends on the device, which must survive it. */
TEST_F_TIMEOUT(device, survives_damaged_image, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, bad = {};
	unsigned int refused = 0;
	size_t i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_stream_copy(&bad, &image));
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < 64 * rounds() && i < image.len; i++) {
		bad.data[i] ^= 0xff;
		refused += offer(_metadata, to, bad.data, bad.len);
		bad.data[i] = image.data[i];
		ASSERT_EQ(0, mig_reset(to));
		expect_state(_metadata, to, MIG_RUNNING, "after RESET of a damaged image");
		load_after_refusal(_metadata, to, &image);
	}
	EXPECT_NE(0U, refused)
		PROMISE("invalid user data must fail SET_STATE (%zu damaged bytes went unnoticed)",
			i);
	load_and_run(_metadata, to, &image, 0);
}

TEST_F(device, more_data_does_not_repair_refused_image)
{
	struct mig_stream image = {};
	int fd;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	fd = go(_metadata, &self->dev, MIG_RESUMING);
	EXPECT_EQ(0, mig_load(fd, image.data, image.len / 2, 0, NULL));
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_STOP, NULL));
	/* The session may have ended or not; the device must not run on half an image. */
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_RUNNING, NULL))
		PROMISE("a device with refused data does not run");
	ASSERT_EQ(0, mig_reset(&self->dev));
	EXPECT_TRUE(mig_fd_is_dead(fd))
		PROMISE("RESET ends the RESUMING session");
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, bytes_after_the_end_are_refused)
{
	struct mig_stream image = {};
	size_t extra[3];
	int fd, written, ret;
	unsigned int i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	extra[0] = 1;
	extra[1] = 8;
	extra[2] = image.len;	/* the whole image twice */
	for (i = 0; i < ARRAY_SIZE(extra); i++) {
		fd = go(_metadata, &self->dev, MIG_RESUMING);
		load_all(_metadata, fd, &image);
		written = mig_load(fd, image.data, extra[i], 0, NULL);
		ret = mig_set_state(&self->dev, MIG_STOP, NULL);
		EXPECT_TRUE(written || ret)
			PROMISE("an image followed by %zu bytes is invalid: write() or SET_STATE must fail",
				extra[i]);
		ASSERT_EQ(0, mig_reset(&self->dev));
		close(fd);
	}
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, good_image_after_an_error_is_refused)
{
	struct mig_stream image = {}, bad = {};
	int fd, written;
	size_t i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_stream_copy(&bad, &image));
	for (i = 0; i < 64 && i < bad.len; i++)
		bad.data[i] ^= 0xff;
	fd = go(_metadata, &self->dev, MIG_RESUMING);
	written = mig_load(fd, bad.data, bad.len, 0, NULL);
	mig_load(fd, image.data, image.len, 0, NULL);
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_STOP, NULL))
		PROMISE("a good image does not repair a session with invalid data (write(): %s)",
			written ? strerror(-written) : "nothing");
	ASSERT_EQ(0, mig_reset(&self->dev));
	close(fd);
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, image_of_incompatible_device_is_refused)
{
	const char *path = getenv("VFIO_DEVICE_OTHER");
	struct mig_device other = { .fd = -1 };
	struct mig_stream image = {}, foreign = {};

	NEED_RESET(&self->dev);
	if (!path)
		SKIP(return, "VFIO_DEVICE_OTHER names no device with incompatible images");
	ASSERT_EQ(0, mig_open(&other, path, self->dev.backend))
		STEP("open the other device: %s", other.why);
	take_image(_metadata, &self->dev, &image);
	take_image(_metadata, &other, &foreign);
	EXPECT_TRUE(offer(_metadata, &self->dev, foreign.data, foreign.len))
		PROMISE("the image of an incompatible device is invalid: SET_STATE must fail");
	go_home(_metadata, &self->dev);
	load_and_run(_metadata, &self->dev, &image, 0);
	EXPECT_TRUE(offer(_metadata, &other, image.data, image.len))
		PROMISE("the image of an incompatible device is invalid: SET_STATE must fail");
	go_home(_metadata, &other);
	load_and_run(_metadata, &other, &foreign, 0);
}

/* ---- Sessions ---- */

TEST_F(device, old_fd_never_sees_a_new_session)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	unsigned int i;
	int old, fd;

	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		old = go(_metadata, &self->dev, states[i]);
		if (states[i] == MIG_RESUMING)
			load_all(_metadata, old, &image);
		ASSERT_EQ(0, mig_set_state(&self->dev, MIG_RUNNING, NULL));
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("leaving %s terminates the data transfer session: ENODEV",
				mig_state_name(states[i]));
		fd = go(_metadata, &self->dev, states[i]);
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("the fd of an ended %s session does not see the new one: ENODEV",
				mig_state_name(states[i]));
		if (states[i] == MIG_PRE_COPY) {
			EXPECT_EQ(-ENODEV, mig_precopy_info(old, &info))
				PROMISE("the fd of an ended session has no data of the new one: ENODEV");
		}
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("the new %s session works", mig_state_name(states[i]));
		close(old);
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("closing an old fd does not end the new session");
		close(fd);
	}
}

TEST_F(device, fd_after_close_of_the_device)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct vfio_precopy_info info;
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		mig_close_device(&self->dev);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("the data_fd of %s fails with ENODEV after the device is closed",
				mig_state_name(states[i]));
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a closed device");
		EXPECT_GT(0, mig_precopy_info(fd, &info));
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("an old data_fd stays dead for the next opener");
		close(fd);
		expect_state(_metadata, &self->dev, MIG_RUNNING, "after close and open");
	}
}

TEST_F(device, closed_data_fd_does_not_block_transitions)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {};
	unsigned int i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		close(go(_metadata, &self->dev, states[i]));
		expect_state(_metadata, &self->dev, states[i], "after close of the data_fd");
		if (states[i] != MIG_RESUMING) {
			EXPECT_EQ(0, mig_set_state(&self->dev, MIG_STOP, NULL))
				PROMISE("a closed data_fd does not keep the device in %s",
					mig_state_name(states[i]));
		}
		go_home(_metadata, &self->dev);
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

TEST_F(device, reset_is_advertised)
{
	EXPECT_NE(0U, self->dev.info.flags & VFIO_DEVICE_FLAGS_RESET)
		PROMISE("to recover from ERROR VFIO_DEVICE_RESET must be used: it is supported");
}

TEST_F_TIMEOUT(device, reset_in_every_state, 60)
{
	struct mig_stream image = {};
	__u32 state, now;
	int fd;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		EXPECT_EQ(0, mig_reset(&self->dev))
			PROMISE("RESET works in %s", mig_state_name(state));
		ASSERT_EQ(0, mig_get_state(&self->dev, &now));
		EXPECT_EQ(MIG_RUNNING, now)
			PROMISE("VFIO_DEVICE_RESET returns the device from %s to RUNNING",
				mig_state_name(state));
		if (fd >= 0) {
			EXPECT_TRUE(mig_fd_is_dead(fd))
				PROMISE("RESET ends the session of %s", mig_state_name(state));
			close(fd);
		}
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

TEST_F_TIMEOUT(device, close_in_every_state, 60)
{
	__u32 state, now;
	int fd;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		if (fd >= 0)
			close(fd);
		mig_close_device(&self->dev);
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		ASSERT_EQ(0, mig_get_state(&self->dev, &now));
		/* After this failure the device may be in any state. */
		ASSERT_EQ(MIG_RUNNING, now)
			PROMISE("a device that was closed in %s is RUNNING for the next opener",
				mig_state_name(state));
		fd = go(_metadata, &self->dev, MIG_STOP_COPY);
		close(fd);
	}
}

/* The next opener relies on RUNNING without a GET of the state. */
TEST_F_TIMEOUT(device, next_opener_can_reach_every_state, 60)
{
	static const __u32 targets[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	__u32 state, now;
	unsigned int i;
	int fd, ret;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		for (i = 0; i < ARRAY_SIZE(targets); i++) {
			fd = go(_metadata, &self->dev, state);
			if (fd >= 0)
				close(fd);
			mig_close_device(&self->dev);
			ASSERT_EQ(0, mig_reopen_device(&self->dev))
				STEP("reopen the device: %s", self->dev.why);
			ret = mig_set_state(&self->dev, targets[i], &fd);
			EXPECT_EQ(0, ret)
				PROMISE("a device closed in %s is RUNNING for the next opener, which can go to %s: %s",
					mig_state_name(state), mig_state_name(targets[i]),
					strerror(-ret));
			ASSERT_EQ(0, mig_get_state(&self->dev, &now));
			EXPECT_EQ(targets[i], now);
			EXPECT_EQ(targets[i] != MIG_STOP, fd >= 0)
				PROMISE("a session after a close in %s has a new data_fd",
					mig_state_name(state));
			if (fd >= 0)
				close(fd);
		}
	}
}

/* A device created for one test, of the type of the device under test. */
struct guest {
	struct mig_device dev;
	char path[PATH_MAX];
	char remove[PATH_MAX + 16];
};

/* -EOPNOTSUPP: not a mediated device, or no more devices can be created. */
static int create_guest(const struct mig_device *like, struct guest *g)
{
	char uuid[37] = "", create[PATH_MAX];
	int fd, ret;

	snprintf(create, sizeof(create), "%s/mdev_type/create", like->sysfs);
	if (access(create, W_OK))
		return -EOPNOTSUPP;
	fd = open("/proc/sys/kernel/random/uuid", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, uuid, 36) != 36)
		return -EIO;
	close(fd);
	ret = write_word(create, uuid);
	if (ret)
		return ret == -ENOSPC ? -EOPNOTSUPP : ret;
	snprintf(g->path, sizeof(g->path), "/sys/bus/mdev/devices/%s", uuid);
	snprintf(g->remove, sizeof(g->remove), "%s/remove", g->path);
	return mig_open(&g->dev, g->path, like->backend);
}

#define GUEST_OR_SKIP(like, g) do {						\
	int __ret = create_guest(like, g);					\
										\
	if (__ret == -EOPNOTSUPP)						\
		SKIP(return, "no mediated device can be created and removed");	\
	ASSERT_EQ(0, __ret)							\
		STEP("create and open another device: %s", (g)->dev.why);	\
} while (0)

TEST_F(device, fd_after_removal_of_the_device)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct vfio_precopy_info info;
	struct guest guest;
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		GUEST_OR_SKIP(&self->dev, &guest);
		fd = go(_metadata, &guest.dev, states[i]);
		mig_close(&guest.dev);
		ASSERT_EQ(0, write_word(guest.remove, "1"));
		EXPECT_EQ(-1, access(guest.path, F_OK))
			PROMISE("a data_fd does not keep its device");
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("the data_fd of %s outlives the device: ENODEV",
				mig_state_name(states[i]));
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a removed device");
		EXPECT_GT(0, mig_precopy_info(fd, &info));
		close(fd);
	}
}

/* ---- Concurrency ---- */

TEST_F_TIMEOUT(device, hammered_by_eight_threads, 300)
{
	struct mig_stream image = {};
	unsigned int r;
	char why[128];

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (r = 0; r < rounds(); r++) {
		ASSERT_EQ(0, mig_hammer(&self->dev, &image, &self->scratch, 400, r,
					why, sizeof(why)));
		EXPECT_STREQ("", why)
			PROMISE("a concurrent call succeeds or fails with a valid error");
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		expect_state(_metadata, &self->dev, MIG_RUNNING, "after close and open");
		ASSERT_EQ(0, mig_reset(&self->dev));
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

/* A read() or write() that is stalled by a page fault of its buffer. */
struct stalled {
	struct mig_stall stall;
	pthread_t thread;
	int fd;
	bool writes;
	size_t len;
	ssize_t ret;
};

static void *stalled_main(void *arg)
{
	struct stalled *s = arg;

	s->ret = s->writes ? write(s->fd, s->stall.page, s->len) :
			     read(s->fd, s->stall.page, s->len);
	if (s->ret < 0)
		s->ret = -errno;
	return NULL;
}

enum how { BY_SET_STATE, BY_RESET, BY_CLOSE, BY_REMOVAL, HOW_NR };

static const char *const how_name[] = { "SET_STATE", "RESET", "close", "removal" };

/* A call that must not wait for the stalled one. */
struct ender {
	pthread_t thread;
	struct guest *guest;
	enum how how;
	int ret;
};

static void *ender_main(void *arg)
{
	struct ender *e = arg;

	switch (e->how) {
	case BY_SET_STATE:
		mig_set_state(&e->guest->dev, MIG_RUNNING, NULL);
		break;
	case BY_RESET:
		e->ret = mig_reset(&e->guest->dev);
		break;
	case BY_CLOSE:
		mig_close_device(&e->guest->dev);
		break;
	default:
		mig_close(&e->guest->dev);
		e->ret = write_word(e->guest->remove, "1");
		break;
	}
	return NULL;
}

/* While one reader is stalled, another reads up to the end. */
TEST_F_TIMEOUT(device, reader_behind_stalled_reader_gets_next_bytes, 60)
{
	struct mig_pieces first = {};
	struct sharer behind = {};
	size_t len[2];
	struct stalled ahead = {};
	struct mig_stream image = {};
	__u8 *content;
	int ret;

	if (!save_steady(_metadata, &self->dev, &image))
		SKIP(return, "two images of the stopped device differ");
	ret = mig_stall_start(&ahead.stall);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "no userfaultfd that stalls the kernel is available");
	ASSERT_EQ(0, ret);
	content = calloc(1, ahead.stall.len);
	ASSERT_NE(NULL, content);

	/* In the middle of the stream, inside of a block if the device uses blocks. */
	ahead.fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	while (first.data.len < image.len / 2)
		ASSERT_LT(0, mig_read(ahead.fd, &first.data, image.len / 2 - first.data.len));
	len[0] = first.data.len;
	ahead.len = image.len / 3;
	if (ahead.len > ahead.stall.len)
		ahead.len = ahead.stall.len;
	ASSERT_EQ(0, pthread_create(&ahead.thread, NULL, stalled_main, &ahead));
	ASSERT_EQ(0, mig_stall_wait(&ahead.stall));
	behind.fd = ahead.fd;
	behind.chunk = image.len / 10 + 1;
	ASSERT_EQ(0, pthread_create(&behind.thread, NULL, reader_main, &behind));
	/* It waits for the stalled reader, or has reached the end. */
	wait_until_asleep(&behind.poller);
	ASSERT_EQ(0, mig_stall_end(&ahead.stall, content));
	ASSERT_TRUE(joined(ahead.thread));
	ASSERT_TRUE(joined(behind.thread));
	ASSERT_LT(0, ahead.ret)
		STEP("read with a fault: %s", strerror(-ahead.ret));
	EXPECT_EQ(0, behind.err)
		PROMISE("the second reader reaches the permanent end: %s",
			strerror(-behind.err));

	ASSERT_EQ(0, mig_stream_add(&first.data, ahead.stall.page, ahead.ret));
	len[1] = ahead.ret;
	first.len = len;
	first.nr = 2;
	EXPECT_EQ(1, mig_pieces_make_up(&image, &first, &behind.got))
		PROMISE("each of the parallel readers gets its bytes in order (%zd and %zu of %zu)",
			ahead.ret, behind.got.data.len, image.len);
}

static void check_stalled(struct __test_metadata *_metadata, struct guest *g,
			  __u32 from, enum how how, const struct mig_stream *image)
{
	struct ender ender = { .guest = g, .how = how };
	struct stalled s = { .writes = from == MIG_RESUMING };
	bool waited_for;
	__u8 *content;
	int ret;

	ret = mig_stall_start(&s.stall);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "no userfaultfd that stalls the kernel is available");
	ASSERT_EQ(0, ret)
		STEP("create a page that stalls: %s", strerror(-ret));
	content = calloc(1, s.stall.len);
	ASSERT_NE(NULL, content);
	s.len = image->len < s.stall.len ? image->len : s.stall.len;
	memcpy(content, image->data, s.len);

	s.fd = go(_metadata, &g->dev, from);
	ASSERT_EQ(0, pthread_create(&s.thread, NULL, stalled_main, &s));
	ASSERT_EQ(0, mig_stall_wait(&s.stall))
		STEP("stall a %s in %s", s.writes ? "writer" : "reader", mig_state_name(from));

	ASSERT_EQ(0, pthread_create(&ender.thread, NULL, ender_main, &ender));
	waited_for = !joined(ender.thread);
	EXPECT_FALSE(waited_for)
		PROMISE("a %s that is stalled in %s does not block %s",
			s.writes ? "writer" : "reader", mig_state_name(from), how_name[how]);
	EXPECT_EQ(0, ender.ret)
		PROMISE("%s succeeds during a stalled %s", how_name[how],
			s.writes ? "writer" : "reader");

	ASSERT_EQ(0, mig_stall_end(&s.stall, content));
	ASSERT_TRUE(joined(s.thread))
		PROMISE("a stalled call ends with its fault");
	if (waited_for)
		pthread_join(ender.thread, NULL);
	EXPECT_TRUE(s.ret == -ENODEV || s.ret == -EFAULT || s.ret > 0)
		PROMISE("a call whose session has ended returns ENODEV or its bytes so far (%zd)",
			s.ret);
	close(s.fd);
	free(content);
	mig_stall_free(&s.stall);
	/* The next call to end it would wait as well. */
	ASSERT_FALSE(waited_for);
}

static void check_all_stalls(struct __test_metadata *_metadata, struct mig_device *dev,
			     __u32 from)
{
	struct mig_stream image = {};
	struct guest self = { .dev = *dev }, guest;
	enum how how;
	int ret;

	take_image(_metadata, dev, &image);
	for (how = 0; how < HOW_NR; how++) {
		if (how == BY_RESET && mig_reset(dev))
			continue;
		if (how == BY_REMOVAL) {
			ret = create_guest(dev, &guest);
			/* Only mediated devices can be created and removed. */
			if (ret == -EOPNOTSUPP)
				break;
			ASSERT_EQ(0, ret)
				STEP("create and open another device: %s", guest.dev.why);
			check_stalled(_metadata, &guest, from, how, &image);
			break;
		}
		check_stalled(_metadata, &self, from, how, &image);
		*dev = self.dev;
		if (how == BY_CLOSE) {
			ASSERT_EQ(0, mig_reopen_device(dev))
				STEP("reopen the device: %s", dev->why);
		}
		go_home(_metadata, dev);
		self.dev = *dev;
	}
	mig_stream_free(&image);
}

TEST_F_TIMEOUT(device, stalled_reader_blocks_no_call_in_pre_copy, 120)
{
	NEED_PRE_COPY(&self->dev);
	check_all_stalls(_metadata, &self->dev, MIG_PRE_COPY);
}

TEST_F_TIMEOUT(device, stalled_reader_blocks_no_call_in_stop_copy, 120)
{
	check_all_stalls(_metadata, &self->dev, MIG_STOP_COPY);
}

TEST_F_TIMEOUT(device, stalled_writer_blocks_no_call, 120)
{
	NEED_RESET(&self->dev);
	check_all_stalls(_metadata, &self->dev, MIG_RESUMING);
}

/* ---- Content of the device ---- */

static __u8 *pattern(struct __test_metadata *_metadata, size_t len, __u8 number)
{
	__u8 *data = malloc(len);
	__u32 seed = number;
	size_t i;

	ASSERT_NE(NULL, data);
	for (i = 0; i < len; i++) {
		seed = seed * 1664525 + 1013904223;
		data[i] = seed >> 24;
	}
	/* Differs from the pattern of any other seed. */
	data[0] = number;
	return data;
}

/* Writes a pattern to the scratch memory, and returns it. */
static __u8 *scribble(struct __test_metadata *_metadata, const struct mig_device *dev,
		      const struct mig_scratch *s, __u8 number)
{
	__u8 *data = pattern(_metadata, s->len, number);
	int ret = mig_scratch_write(dev, s, data);

	ASSERT_EQ(0, ret)
		STEP("write to the memory of VFIO_SCRATCH: %s", strerror(-ret));
	return data;
}

static void expect_scratch(struct __test_metadata *_metadata,
			   const struct mig_device *dev, const struct mig_scratch *s,
			   const __u8 *want, const char *when)
{
	__u8 *seen = malloc(s->len);
	size_t i;
	int ret;

	ASSERT_NE(NULL, seen);
	ret = mig_scratch_read(dev, s, seen);
	ASSERT_EQ(0, ret)
		STEP("read the memory of VFIO_SCRATCH: %s", strerror(-ret));
	for (i = 0; i < s->len && seen[i] == want[i]; i++)
		;
	EXPECT_EQ(s->len, i)
		TH_LOG("  %s: byte %zu of VFIO_SCRATCH is %#x instead of %#x", when, i,
		       i < s->len ? seen[i] : 0, i < s->len ? want[i] : 0);
	free(seen);
}

/* Moves the rest of the session @fd to the target; both devices run afterwards. */
static void finish_migration(struct __test_metadata *_metadata,
			     const struct mig_device *from, const struct mig_device *to,
			     int fd, struct mig_stream *image)
{
	int new_fd;

	ASSERT_EQ(0, mig_set_state(from, MIG_STOP_COPY, &new_fd));
	if (fd < 0)
		fd = new_fd;
	ASSERT_EQ(0, mig_save(fd, image, stream_limit(from)));
	close(fd);
	ASSERT_EQ(0, mig_set_state(from, MIG_RUNNING, NULL));
	if (from->fd == to->fd)
		mig_reset(to);
	load_and_run(_metadata, to, image, 0);
}

TEST_F(device, content_survives_migration)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	__u8 *want;

	NEED_SCRATCH(self);
	to = open_target(_metadata, &self->dev, &second);
	want = scribble(_metadata, &self->dev, &self->scratch, 1);
	finish_migration(_metadata, &self->dev, to, -1, &image);
	expect_scratch(_metadata, to, &self->scratch, want,
		       "after a migration by STOP_COPY");
}

/* Writes between reads of the data_fd reach the target. */
TEST_F(device, content_written_in_pre_copy_survives_migration)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u8 *want;
	int fd;

	NEED_PRE_COPY(&self->dev);
	NEED_SCRATCH(self);
	to = open_target(_metadata, &self->dev, &second);
	scribble(_metadata, &self->dev, &self->scratch, 2);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	want = scribble(_metadata, &self->dev, &self->scratch, 3);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes)
		PROMISE("streamed state that changes again is dirty, not initial");
	if (info.dirty_bytes) {
		EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
			PROMISE("poll reports dirty_bytes that can be read");
		ASSERT_LT(0, mig_read(fd, &image, 100))
			PROMISE("dirty_bytes can be read");
		want = scribble(_metadata, &self->dev, &self->scratch, 4);
	} else {
		EXPECT_EQ(-ENOMSG, mig_read(fd, &image, 100))
			PROMISE("without initial_bytes and dirty_bytes read() fails with ENOMSG");
	}
	finish_migration(_metadata, &self->dev, to, fd, &image);
	expect_scratch(_metadata, to, &self->scratch, want,
		       "after a migration by PRE_COPY");
}

TEST_F_TIMEOUT(device, poller_wakes_when_content_changes, 60)
{
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	struct poller poller;
	int fd;

	NEED_PRE_COPY(&self->dev);
	NEED_SCRATCH(self);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	poller_start(_metadata, &poller, fd);
	scribble(_metadata, &self->dev, &self->scratch, 5);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	if (!info.dirty_bytes) {
		mig_set_state(&self->dev, MIG_RUNNING, NULL);
		poller_join(&poller);
		SKIP(return, "the device does not stream changes in PRE_COPY again");
	}
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("poll waits for more data: it wakes when state gets dirty");
}

TEST_F(device, reset_and_close_clear_content)
{
	__u8 *fresh = malloc(self->scratch.len);
	__u32 state;
	int fd;

	NEED_RESET(&self->dev);
	NEED_SCRATCH(self);
	ASSERT_NE(NULL, fresh);
	ASSERT_EQ(0, mig_scratch_read(&self->dev, &self->scratch, fresh));
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		go_home(_metadata, &self->dev);
		scribble(_metadata, &self->dev, &self->scratch, 100 + state);
		ASSERT_EQ(0, mig_reset(&self->dev));
		expect_scratch(_metadata, &self->dev, &self->scratch, fresh, "after RESET");

		scribble(_metadata, &self->dev, &self->scratch, 120 + state);
		ASSERT_EQ(0, mig_set_state(&self->dev, state, &fd));
		mig_close_device(&self->dev);
		if (fd >= 0)
			close(fd);
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		expect_scratch(_metadata, &self->dev, &self->scratch, fresh,
			       "for the next opener");
	}
}

#define REGION_MAX	(16UL << 20)

/* The readable content of a region, empty if it cannot be read. */
static void read_region(struct __test_metadata *_metadata, const struct mig_device *dev,
			__u32 index, struct mig_stream *content)
{
	struct vfio_region_info info;
	__u8 block[4096];
	ssize_t ret;

	content->len = 0;
	if (mig_region_info(dev, index, &info) ||
	    !(info.flags & VFIO_REGION_INFO_FLAG_READ))
		return;
	while (content->len < info.size && content->len < REGION_MAX) {
		ret = info.size - content->len;
		if (ret > (ssize_t)sizeof(block))
			ret = sizeof(block);
		ret = mig_region_read(dev, index, content->len, block, ret);
		if (ret <= 0)
			break;
		ASSERT_EQ(0, mig_stream_add(content, block, ret));
	}
}

TEST_F_TIMEOUT(device, regions_survive_migration, 120)
{
	struct mig_stream regions[32] = {}, now = {}, image = {};
	struct mig_device second = { .fd = -1 }, *to;
	unsigned int i, compared = 0;
	bool steady[32];
	size_t at;
	int fd;

	if (!getenv("VFIO_READ_REGIONS"))
		SKIP(return, "VFIO_READ_REGIONS, which allows reads of all regions, is not set");
	to = open_target(_metadata, &self->dev, &second);
	if (self->scratch.len)
		scribble(_metadata, &self->dev, &self->scratch, 30);
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	for (i = 0; i < self->dev.info.num_regions && i < ARRAY_SIZE(regions); i++) {
		read_region(_metadata, &self->dev, i, &regions[i]);
		read_region(_metadata, &self->dev, i, &now);
		steady[i] = now.len == regions[i].len &&
			    !memcmp(now.data, regions[i].data, now.len);
	}
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	go_home(_metadata, &self->dev);

	fd = go(_metadata, to, MIG_RESUMING);
	load_all(_metadata, fd, &image);
	move_on(_metadata, to, MIG_STOP);
	for (i = 0; i < self->dev.info.num_regions && i < ARRAY_SIZE(regions); i++) {
		if (!steady[i] || !regions[i].len)
			continue;
		read_region(_metadata, to, i, &now);
		ASSERT_EQ(regions[i].len, now.len);
		for (at = 0; at < now.len && now.data[at] == regions[i].data[at]; at++)
			;
		EXPECT_EQ(now.len, at)
			PROMISE("region %u of the target equals that of the source: byte %#zx is %#x, not %#x",
				i, at, at < now.len ? now.data[at] : 0,
				at < now.len ? regions[i].data[at] : 0);
		compared++;
	}
	if (!compared)
		SKIP(return, "no region of the stopped device reads the same twice");
}

#define MAP_OR_SKIP(dev, s, map) do {						\
	int __ret = mig_region_map(dev, (s)->region, (s)->offset, (s)->len, map); \
										\
	if (__ret == -EOPNOTSUPP)						\
		SKIP(return, "the memory of VFIO_SCRATCH cannot be mapped");	\
	ASSERT_EQ(0, __ret)							\
		PROMISE("a region with VFIO_REGION_INFO_FLAG_MMAP supports mmap: %s", \
			strerror(-__ret));					\
} while (0)

TEST_F(device, mapped_memory_is_the_region)
{
	struct mig_scratch *s = &self->scratch;
	__u8 *want;
	void *map;

	NEED_SCRATCH(self);
	MAP_OR_SKIP(&self->dev, s, &map);
	want = scribble(_metadata, &self->dev, s, 40);
	EXPECT_EQ(0, memcmp(map, want, s->len))
		PROMISE("a write to a region is visible in its mapping");
	want = pattern(_metadata, s->len, 41);
	memcpy(map, want, s->len);
	expect_scratch(_metadata, &self->dev, s, want, "after a write to the mapping");
}

TEST_F(device, mapped_writes_survive_migration)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_scratch *s = &self->scratch;
	struct mig_stream image = {};
	int fd = -1;
	__u8 *want;
	void *map;

	NEED_SCRATCH(self);
	MAP_OR_SKIP(&self->dev, s, &map);
	to = open_target(_metadata, &self->dev, &second);
	want = pattern(_metadata, s->len, 42);
	memcpy(map, want, s->len);
	if (self->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		fd = go(_metadata, &self->dev, MIG_PRE_COPY);
		DRAIN_OR_SKIP(&self->dev, fd, &image);
		want = pattern(_metadata, s->len, 43);
		memcpy(map, want, s->len);
		ASSERT_LE(0, mig_read(fd, &image, 100))
			PROMISE("a write to the mapping in PRE_COPY dirties state");
		want = pattern(_metadata, s->len, 44);
		memcpy(map, want, s->len);
	}
	finish_migration(_metadata, &self->dev, to, fd, &image);
	expect_scratch(_metadata, to, s, want, "after a migration of writes to the mapping");
}

/* A data_fd is read into or written from mapped memory of the same device. */
TEST_F_TIMEOUT(device, data_fd_and_mapped_memory_do_not_deadlock, 120)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_scratch *s = &self->scratch;
	struct stalled io;
	unsigned int i;
	void *map;

	NEED_RESET(&self->dev);
	NEED_SCRATCH(self);
	MAP_OR_SKIP(&self->dev, s, &map);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		io = (struct stalled){
			.stall.page = map, .len = s->len, .writes = states[i] == MIG_RESUMING,
		};
		io.fd = go(_metadata, &self->dev, states[i]);
		ASSERT_EQ(0, pthread_create(&io.thread, NULL, stalled_main, &io));
		ASSERT_TRUE(joined(io.thread))
			PROMISE("%s() with a buffer in the device's own mapped memory returns (in %s)",
				io.writes ? "write" : "read", mig_state_name(states[i]));
		EXPECT_EQ(0, mig_reset(&self->dev));
		close(io.fd);
	}
}

/* ---- DMA logging ---- */

/* A length of as many pages as the bits in a bitmap of 4 words. */
#define LOG_LEN		(256 * mig_page_size())

static int start_log_of(const struct mig_device *dev, __u64 iova, __u64 length,
			__u64 *page_size)
{
	struct vfio_device_feature_dma_logging_range range = {
		.iova = iova, .length = length,
	};

	return mig_log_start(dev, page_size, &range, 1);
}

/* Starts logging of [0, LOG_LEN), if possible in kernel pages. */
static int start_log(const struct mig_device *dev)
{
	__u64 page_size = mig_page_size();

	return start_log_of(dev, 0, LOG_LEN, &page_size);
}

/* Reports [0, LOG_LEN), one bit for each kernel page. */
static int report_log(const struct mig_device *dev, __u64 *bitmap)
{
	return mig_log_report(dev, 0, LOG_LEN, mig_page_size(), bitmap);
}

#define NEED_LOGGING(dev) do {							\
	if (mig_feature(dev, MIG_PROBE | MIG_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, \
			NULL, 0))						\
		SKIP(return, "the device does not have DMA logging");		\
} while (0)

TEST_F(device, dma_logging_starts_once)
{
	__u64 bitmap[4] = {}, page_size = mig_page_size();

	NEED_LOGGING(&self->dev);
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	ASSERT_EQ(0, start_log_of(&self->dev, 0, LOG_LEN, &page_size));
	EXPECT_NE(0U, page_size)
		PROMISE("on output the device will return the page size it selected");
	EXPECT_EQ(0U, page_size & (page_size - 1))
		PROMISE("the page size selected by the device is a power of two");
	EXPECT_NE(0, start_log(&self->dev))
		PROMISE("a single START can be issued; another START is refused until STOP");
	EXPECT_EQ(0, report_log(&self->dev, bitmap))
		PROMISE("a refused second START does not end logging");
	EXPECT_EQ(0, mig_log_stop(&self->dev));
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("after STOP logging can start again");
}

TEST_F(device, dma_logging_page_sizes)
{
	const __u64 page = mig_page_size();
	const __u64 sizes[] = {
		0, 1, 3, page - 1, 3 * page, page, 16 * page, 256 * page,
	};
	unsigned int i;
	__u64 size;
	int ret;

	NEED_LOGGING(&self->dev);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		size = sizes[i];
		/* The core refuses 0 for all ranges but empty ones. */
		ret = start_log_of(&self->dev, 0, size ? LOG_LEN : 0, &size);
		if (ret) {
			EXPECT_TRUE(!sizes[i] || sizes[i] & (sizes[i] - 1))
				PROMISE("page_size %llu is a hint; the driver selects a supported one (%s)",
					sizes[i], strerror(-ret));
			continue;
		}
		EXPECT_TRUE(size && !(size & (size - 1)))
			PROMISE("for page_size %llu, the device selected the invalid size %llu",
				sizes[i], size);
		EXPECT_EQ(0, mig_log_stop(&self->dev));
	}
}

TEST_F(device, dma_logging_report)
{
	__u64 bitmap[4] = { 0x8000000000000001ULL, 0, 0, 1ULL << 63 };
	const __u64 page = mig_page_size();

	NEED_LOGGING(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));
	EXPECT_EQ(0, report_log(&self->dev, bitmap));
	EXPECT_EQ(0x8000000000000001ULL, bitmap[0] & 0x8000000000000001ULL)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_EQ(1ULL << 63, bitmap[3] & 1ULL << 63)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, LOG_LEN, 0, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, LOG_LEN, 3 * page, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, -page, LOG_LEN, page, bitmap))
		PROMISE("the range of REPORT does not wrap");
	EXPECT_EQ(0, mig_log_report(&self->dev, 0, LOG_LEN, 16 * page, bitmap))
		PROMISE("page_size does not have to match the value given to START");
}

TEST_F(device, dma_logging_ranges)
{
	__u64 page = mig_page_size(), page_size = page;
	struct vfio_device_feature_dma_logging_range two[2] = {
		{ .iova = 0, .length = 2 * page }, { .iova = page, .length = 2 * page },
	};

	NEED_LOGGING(&self->dev);
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 0))
		PROMISE("START needs a range");
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("ranges do not overlap");
	EXPECT_NE(0, start_log_of(&self->dev, -page, 2 * page, &page_size))
		PROMISE("a range does not wrap");
	EXPECT_EQ(-EFAULT, mig_log_start(&self->dev, &page_size, (void *)8, 1));
	two[1].iova = 16 * page;
	EXPECT_EQ(0, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("refused STARTs leave logging stopped");
}

TEST_F(device, dma_logging_stop_without_start_is_harmless)
{
	__u64 bitmap[4] = {};
	__u32 state;

	NEED_LOGGING(&self->dev);
	mig_log_stop(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));
	ASSERT_EQ(0, mig_log_stop(&self->dev));
	mig_log_stop(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state) || state == MIG_RESUMING)
			continue;
		if (mig_set_state(&self->dev, state, NULL))
			continue;
		EXPECT_EQ(0, report_log(&self->dev, bitmap))
			PROMISE("this API is not connected to MIG_DEVICE_STATE (in %s)",
				mig_state_name(state));
	}

	/* Logging belongs to this opening of the device. */
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev));
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("logging does not continue for the next opener");
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("the logging of an opener does not prevent that of the next one");
}

/* The core accepts this, but no device can log it: the device may refuse it. */
TEST_F(device, dma_logging_empty_range)
{
	const __u64 page = mig_page_size();
	const __u64 iovas[] = { 0, 16 * page, -16 * page };
	__u64 bitmap[4] = {}, page_size;
	unsigned int i;

	NEED_LOGGING(&self->dev);
	for (i = 0; i < ARRAY_SIZE(iovas); i++) {
		page_size = page;
		if (!start_log_of(&self->dev, iovas[i], 0, &page_size)) {
			report_log(&self->dev, bitmap);
			EXPECT_EQ(0, mig_log_stop(&self->dev));
		}
	}
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("a START of an empty range leaves logging usable");
	mig_log_report(&self->dev, 0, 0, page, bitmap);
	EXPECT_EQ(0, report_log(&self->dev, bitmap))
		PROMISE("a REPORT of an empty range leaves logging usable");
}

TEST_F(device, dma_logging_bad_bitmap)
{
	__u64 bitmap[4] = {};
	char *hole = page_before_a_hole();
	unsigned int i;
	int ret;

	NEED_LOGGING(&self->dev);
	ASSERT_NE(NULL, hole);
	hole += mig_page_size();
	ASSERT_EQ(0, start_log(&self->dev));
	for (i = 0; i < 3; i++) {
		static const char *const what[] = {
			"NULL", "an unmapped address", "a kernel address"
		};
		__u64 *const where[] = { NULL, (__u64 *)hole, (__u64 *)-mig_page_size() };

		ret = report_log(&self->dev, where[i]);
		/* Without a page to report nothing is stored. */
		EXPECT_TRUE(!ret || ret == -EFAULT)
			PROMISE("a bitmap at %s is EFAULT, or not accessed: %s", what[i],
				strerror(-ret));
	}
	ret = report_log(&self->dev, bitmap);
	EXPECT_EQ(0, ret)
		PROMISE("a REPORT works after one that failed: %s", strerror(-ret));
	EXPECT_EQ(0, mig_log_stop(&self->dev));
}

int main(int argc, char **argv)
{
	int i, n = 1, paths = 0;

	/* Paths replace VFIO_DEVICE and VFIO_DEVICE2. */
	for (i = 1; i < argc; i++) {
		if (argv[i][0] == '/')
			setenv(paths++ ? "VFIO_DEVICE2" : "VFIO_DEVICE", argv[i], 1);
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;
	MIG_BE_PATIENT();
	return test_harness_run(n, argv);
}
