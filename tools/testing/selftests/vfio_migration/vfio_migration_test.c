// SPDX-License-Identifier: GPL-2.0
/*
 * Conformance of any migratable VFIO device to the migration uAPI in
 * include/uapi/linux/vfio.h.
 *
 *	VFIO_DEVICE=/sys/bus/mdev/devices/UUID ./vfio_migration_test
 *	./vfio_migration_test /sys/bus/pci/devices/0000:01:00.1 [TARGET]
 *
 * The device is bound to a VFIO driver and used by nobody else: the tests reset
 * it and load images into it. VFIO_DEVICE2, or a second path, is a compatible
 * device that images migrate to; without it the same device is the target after
 * a reset. "-v group" and "-v iommufd" choose one backend, "-l" lists the
 * tests. A test skips, with its reason, what the device does not claim.
 *
 * Nothing in this file knows what device it tests.
 */
#include "mig_test.h"

#define FEATURE_MIGRATION	VFIO_DEVICE_FEATURE_MIGRATION
#define FEATURE_STATE		VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
#define FEATURE_SIZE		VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
#define FEATURE_V2		VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#define GET			VFIO_DEVICE_FEATURE_GET
#define SET			VFIO_DEVICE_FEATURE_SET
#define PROBE			VFIO_DEVICE_FEATURE_PROBE

/* An ioctl number that no data_fd has. */
#define NO_SUCH_IOCTL		_IO(VFIO_TYPE, VFIO_BASE + 99)

static const __u32 set_state_values[] = {
	0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xffffffff,
};

FIXTURE(device)
{
	struct mig_device dev;
};

FIXTURE_VARIANT(device)
{
	enum mig_backend backend;
};

FIXTURE_VARIANT_ADD(device, group) { .backend = MIG_GROUP };
FIXTURE_VARIANT_ADD(device, iommufd) { .backend = MIG_IOMMUFD };

FIXTURE_SETUP(device)
{
	OPEN_OR_SKIP(&self->dev, getenv("VFIO_DEVICE"), variant->backend);
	go_home(_metadata, &self->dev);
}

FIXTURE_TEARDOWN(device)
{
	mig_close(&self->dev);
}

/* Can the device be reset? Tests that break a session on purpose need it. */
#define NEED_RESET(dev) do {							\
	if (mig_reset(dev))							\
		SKIP(return, "VFIO_DEVICE_RESET does not work on the device");	\
} while (0)

/*
 * The device that images migrate to: the second one, or the same one after a
 * reset, which then must not be asked for more images.
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

#define TEMPORARY_END \
	"when read() is done on this temporary end of stream the kernel driver should return ENOMSG"

/*
 * Reads to the temporary end. A device that never becomes quiet, because it
 * dirties its own state all the time, skips the test.
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

/* A page, followed by one that faults. */
static void *page_before_a_hole(void)
{
	size_t page = sysconf(_SC_PAGESIZE);
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
	EXPECT_EQ(0, mig_feature(&self->dev, PROBE | GET | FEATURE_MIGRATION, NULL, 0))
		PROMISE("PROBE tells that GET of VFIO_DEVICE_FEATURE_MIGRATION is supported");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, PROBE | SET | FEATURE_MIGRATION, NULL, 0))
		PROMISE("VFIO_DEVICE_FEATURE_MIGRATION is for GET alone");
	EXPECT_EQ(0, mig_feature(&self->dev, PROBE | GET | SET | FEATURE_STATE, NULL, 0))
		PROMISE("PROBE tells that GET and SET of MIG_DEVICE_STATE are supported");
}

/* What is the same for each feature that reads: every way to ask wrongly. */
static void check_get_arguments(struct __test_metadata *_metadata,
				const struct mig_device *dev, __u32 feature,
				size_t size)
{
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;
	__u8 data[256] = {};

	EXPECT_EQ(0, mig_feature(dev, GET | feature, data, size))
		PROMISE("GET of feature %u works", feature);
	EXPECT_EQ(0, mig_feature_argsz(dev, GET | feature, data, sizeof(data),
				       head + sizeof(data)))
		PROMISE("feature %u: a larger argsz is accepted", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, GET | feature, data, size,
					     head + size - 1))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, GET | feature, data, size, head))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, GET | feature, data, size, head - 1))
		PROMISE("argsz must cover struct vfio_device_feature");
	EXPECT_EQ(-EINVAL, mig_feature(dev, GET | SET | feature, data, size))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(-EINVAL, mig_feature(dev, feature, data, size))
		PROMISE("without PROBE one of GET or SET must be requested");
	EXPECT_EQ(-EINVAL, mig_feature(dev, GET | feature | 1 << 19, data, size))
		PROMISE("unknown flags are refused");
	EXPECT_EQ(0, mig_feature_argsz(dev, PROBE | GET | feature, NULL, 0, head))
		PROMISE("PROBE needs no data");

	EXPECT_EQ(-1, ioctl(dev->fd, VFIO_DEVICE_FEATURE, NULL));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a pointer to nothing is EFAULT");
	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + sysconf(_SC_PAGESIZE) - head);
	hole->argsz = head + size;
	hole->flags = GET | feature;
	EXPECT_EQ(-1, ioctl(dev->fd, VFIO_DEVICE_FEATURE, hole));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("feature %u: data that cannot be written is EFAULT", feature);
}

TEST_F(device, feature_arguments)
{
	check_get_arguments(_metadata, &self->dev, FEATURE_MIGRATION,
			    sizeof(struct vfio_device_feature_migration));
	check_get_arguments(_metadata, &self->dev, FEATURE_STATE,
			    sizeof(struct vfio_device_feature_mig_state));
	check_get_arguments(_metadata, &self->dev, FEATURE_SIZE,
			    sizeof(struct vfio_device_feature_mig_data_size));
	expect_state(_metadata, &self->dev, RUNNING, "after refused and probing calls");
}

TEST_F(device, set_state_arguments)
{
	struct vfio_device_feature_mig_state mig = { .device_state = STOP };
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;

	EXPECT_EQ(-EINVAL, mig_feature_argsz(&self->dev, SET | FEATURE_STATE, &mig,
					     sizeof(mig), head + sizeof(mig) - 1))
		PROMISE("argsz must cover struct vfio_device_feature_mig_state");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, SET | GET | FEATURE_STATE, &mig,
				       sizeof(mig)))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(0, mig_feature(&self->dev, PROBE | SET | FEATURE_STATE, &mig,
				 sizeof(mig)));
	expect_state(_metadata, &self->dev, RUNNING,
		     "after PROBE, which only tells whether SET is supported");

	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + sysconf(_SC_PAGESIZE) - head);
	hole->argsz = head + sizeof(mig);
	hole->flags = SET | FEATURE_STATE;
	EXPECT_EQ(-1, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, hole));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a state that cannot be read is EFAULT");
	expect_state(_metadata, &self->dev, RUNNING, "after EFAULT");
}

/* The descriptor cannot be handed over, and the state has changed by then. */
TEST_F(device, set_state_that_cannot_return_its_fd)
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
	feature->flags = SET | FEATURE_STATE;
	mig = (void *)feature->data;
	mig->device_state = STOP_COPY;
	ASSERT_EQ(0, mprotect(feature, len, PROT_READ));
	EXPECT_EQ(-1, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, feature));
	EXPECT_EQ(EFAULT, errno);
	expect_state(_metadata, &self->dev, STOP_COPY, "after SET_STATE could not return its fd");
	EXPECT_EQ(0, mig_set_state(&self->dev, RUNNING, NULL))
		PROMISE("the user can attempt to return to some other state");
	take_image(_metadata, &self->dev, &image);
}

TEST_F(device, unknown_feature)
{
	static const __u32 ops[] = { GET, SET, PROBE | GET, PROBE | SET };
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

	EXPECT_EQ(want, mig_feature(&self->dev, PROBE | SET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 is there exactly when PRE_COPY is");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, PROBE | GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 is for SET alone");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 is for SET alone");
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev));
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev))
		PROMISE("opting in again changes nothing");
}

TEST_F(device, get_state_brings_no_fd)
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
		ASSERT_EQ(0, mig_feature(&self->dev, GET | FEATURE_STATE, &mig,
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
	if (from == RESUMING)
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
			allowed ? "the new state" : "the state it was in");
	EXPECT_EQ(wants_fd, fd >= 0)
		PROMISE("%s -> %s (%d): a new data_fd comes %s", mig_state_name(from),
			mig_state_name(to), to, wants_fd ? "back" :
			"only with a new data transfer session");
	if (wants_fd && fd >= 0) {
		mode = fcntl(fd, F_GETFL) & O_ACCMODE;
		EXPECT_EQ(to == RESUMING ? O_WRONLY : O_RDONLY, mode)
			PROMISE("the data_fd of %s goes one way", mig_state_name(to));
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

/* A stream begun in PRE_COPY goes on, on the same descriptor, to its end. */
TEST_F(device, saving_group_shares_one_session)
{
	struct mig_stream image = {};
	struct mig_device second = { .fd = -1 }, *to;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	EXPECT_LT(0, mig_read(fd, &image, 64))
		PROMISE("in PRE_COPY initial data is available");
	if (self->dev.flags & VFIO_MIGRATION_P2P) {
		move_on(_metadata, &self->dev, PRE_COPY_P2P);
		move_on(_metadata, &self->dev, PRE_COPY);
		move_on(_metadata, &self->dev, PRE_COPY_P2P);
	}
	move_on(_metadata, &self->dev, STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* ---- The data_fd ---- */

TEST_F(device, data_fd_is_a_stream_with_one_direction)
{
	static const __u32 states[] = { PRE_COPY, STOP_COPY, RESUMING };
	char byte = 0;
	unsigned int i;
	int fd, flags;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		flags = fcntl(fd, F_GETFD);
		EXPECT_EQ(FD_CLOEXEC, flags & FD_CLOEXEC)
			PROMISE("a data_fd is close-on-exec");
		if (states[i] == RESUMING) {
			EXPECT_EQ(-1, read(fd, &byte, 1));
			EXPECT_EQ(EBADF, errno)
				PROMISE("the data_fd of RESUMING is not for reading");
		} else {
			EXPECT_EQ(-1, write(fd, &byte, 1));
			EXPECT_EQ(EBADF, errno)
				PROMISE("the data_fd of %s is not for writing",
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
		EXPECT_EQ(-1, ioctl(fd, NO_SUCH_IOCTL, &byte));
		EXPECT_EQ(ENOTTY, errno)
			PROMISE("an ioctl that a data_fd does not have is ENOTTY (%s)",
				mig_state_name(states[i]));
		close(fd);
	}
}

/* Nothing asked, nothing consumed: the image is still whole. */
TEST_F(device, reads_of_nothing_consume_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += sysconf(_SC_PAGESIZE);
	fd = go(_metadata, &self->dev, STOP_COPY);
	EXPECT_EQ(0, read(fd, &byte, 0))
		PROMISE("a read of zero bytes returns 0");
	EXPECT_LT(0, mig_read(fd, &image, 7));
	EXPECT_EQ(0, read(fd, &byte, 0));
	EXPECT_EQ(-1, read(fd, edge, 64));
	EXPECT_EQ(EFAULT, errno)
		PROMISE("a read to nowhere is EFAULT");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 0));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* A buffer that ends at a hole takes a part; the rest comes with the next read. */
TEST_F(device, short_read_at_a_hole_loses_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	ssize_t ret;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += sysconf(_SC_PAGESIZE);

	fd = go(_metadata, &self->dev, STOP_COPY);
	do {
		ret = read(fd, edge - 13, 64);
		/* Either what fitted was delivered, or nothing was taken. */
		if (ret < 0) {
			EXPECT_EQ(EFAULT, errno);
			ret = read(fd, edge - 13, 13);
		}
		EXPECT_GE(13, ret)
			PROMISE("only what was stored is counted");
		ASSERT_EQ(0, mig_stream_add(&image, edge - 13, ret > 0 ? ret : 0));
	} while (ret > 0 && image.len < 4096);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 1));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
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
	fd = go(_metadata, &self->dev, PRE_COPY);
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
		PROMISE("in PRE_COPY initial data is available to be read");
	DRAIN_OR_SKIP(&self->dev, fd, &image);

	for (i = 0; i < 3; i++) {
		EXPECT_EQ(-1, read(fd, &byte, 1));
		EXPECT_EQ(ENOMSG, errno)
			PROMISE(TEMPORARY_END);
		EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
			PROMISE("userspace can wait for more data by using poll: not readable at the temporary end");
	}
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes)
		PROMISE("the temporary end is reached when both initial_bytes and dirty_bytes are zero");
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("the temporary end is reached when both initial_bytes and dirty_bytes are zero");

	move_on(_metadata, &self->dev, STOP_COPY);
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0) & POLLIN)
		PROMISE("once in STOP_COPY poll always returns readable");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)))
		PROMISE("once in STOP_COPY the end of stream is permanent; ENOMSG may not be returned");
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

	fd = go(_metadata, &self->dev, STOP_COPY);
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
	fd = go(_metadata, &self->dev, PRE_COPY);
	move_on(_metadata, &self->dev, STOP_COPY);
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
	fd = go(_metadata, &self->dev, PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	poller_start(_metadata, &poller, fd);
	EXPECT_FALSE(atomic_load(&poller.done))
		PROMISE("poll waits at the temporary end of stream");
	move_on(_metadata, &self->dev, STOP_COPY);
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("a poller that waits in PRE_COPY wakes when the device enters STOP_COPY");
}

/* Leaving the saving group by @state: the waiting poller learns of it. */
static void check_wake_by(struct __test_metadata *_metadata,
			  const struct mig_device *dev, int fd, __u32 state)
{
	struct poller poller;
	char byte;
	int ret;

	poller_start(_metadata, &poller, fd);
	ret = state == ERROR ? mig_reset(dev) : mig_set_state(dev, state, NULL);
	ASSERT_EQ(0, ret);
	EXPECT_NE(0, poller_join(&poller))
		PROMISE("a poller wakes when the data transfer session ends by %s",
			state == ERROR ? "RESET" : mig_state_name(state));
	EXPECT_EQ(-1, read(fd, &byte, 1));
	EXPECT_EQ(ENODEV, errno)
		PROMISE("the session is over: read() fails with ENODEV");
}

TEST_F_TIMEOUT(device, poller_wakes_on_running, 60)
{
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_wake_by(_metadata, &self->dev, fd, RUNNING);
}

TEST_F_TIMEOUT(device, poller_wakes_on_reset, 60)
{
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&self->dev);
	NEED_RESET(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_wake_by(_metadata, &self->dev, fd, ERROR);
}

TEST_F_TIMEOUT(device, poller_wakes_on_close, 60)
{
	struct mig_stream image = {};
	struct poller poller;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	poller_start(_metadata, &poller, fd);
	mig_close_device(&self->dev);
	EXPECT_NE(0, poller_join(&poller))
		PROMISE("a poller wakes when the device is closed");
}

/* ---- Pre-copy accounting ---- */

TEST_F_TIMEOUT(device, initial_bytes_fall_to_zero, 60)
{
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	size_t step, limit;
	__u64 first, last;
	ssize_t ret;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info))
		PROMISE("support for VFIO_MIG_GET_PRECOPY_INFO is mandatory");
	EXPECT_NE(0U, info.initial_bytes)
		PROMISE("initial_bytes should have a non-zero initial value");
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("dirty_bytes starts at zero");

	first = info.initial_bytes;
	last = first;
	step = first / 16 > 4096 ? first / 16 : 4096;
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
	fd = go(_metadata, &self->dev, PRE_COPY);

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
	hole = (void *)((char *)hole + sysconf(_SC_PAGESIZE) - 16);
	hole->argsz = sizeof(info);
	EXPECT_EQ(-1, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, hole));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(0, mig_precopy_info(fd, &info));
}

TEST_F(device, precopy_info_only_in_pre_copy)
{
	static const __u32 states[] = {
		PRE_COPY, PRE_COPY_P2P, STOP_COPY, STOP, RUNNING,
	};
	struct vfio_precopy_info info;
	unsigned int i;
	int fd, ret;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], NULL));
		ret = mig_precopy_info(fd, &info);
		if (states[i] == PRE_COPY || states[i] == PRE_COPY_P2P) {
			EXPECT_EQ(0, ret)
				PROMISE("this ioctl is valid in %s", mig_state_name(states[i]));
		} else if (states[i] == STOP_COPY) {
			EXPECT_EQ(-EINVAL, ret)
				PROMISE("this ioctl is valid only in PRE_COPY states and the kernel driver should return EINVAL from STOP_COPY");
		} else {
			/* The session is over as well: both errors are true. */
			EXPECT_TRUE(ret == -EINVAL || ret == -ENODEV)
				PROMISE("this ioctl is valid only in PRE_COPY states (%d in %s)",
					ret, mig_state_name(states[i]));
		}
	}
	close(fd);

	fd = go(_metadata, &self->dev, STOP_COPY);
	EXPECT_EQ(-EINVAL, mig_precopy_info(fd, &info))
		PROMISE("a session begun in STOP_COPY has no pre-copy information");
	close(fd);
	fd = go(_metadata, &self->dev, RESUMING);
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
	fd = go(_metadata, &self->dev, PRE_COPY);
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0xdeadbeef, info.flags)
		PROMISE("without the opt-in to PRECOPY_INFOv2 the flags field is left alone");
	ASSERT_EQ(0, mig_opt_in_v2(&self->dev));
	info.flags = 0xdeadbeef;
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0U, info.flags)
		PROMISE("with PRECOPY_INFOv2 flags is a valid output field: nothing was re-initialised");
	close(fd);

	/* The opt-in belongs to this opening of the device. */
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev));
	fd = go(_metadata, &self->dev, PRE_COPY);
	info.flags = 0xdeadbeef;
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0xdeadbeef, info.flags)
		PROMISE("the next opener has not opted in");
}

TEST_F(device, precopy_info_under_the_draft_number)
{
	struct vfio_precopy_info info, draft = { .argsz = sizeof(draft) };
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, PRE_COPY);
	if (ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft) && errno == ENOTTY)
		SKIP(return, "the device has the ioctl under the number of mainline only");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(info.initial_bytes, draft.initial_bytes);
	EXPECT_EQ(info.dirty_bytes, draft.dirty_bytes)
		PROMISE("both ioctl numbers tell the same");
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

/* Asks in @from, stops, and streams: the answer was not too small. */
static void check_data_size(struct __test_metadata *_metadata,
			    const struct mig_device *dev, __u32 from, int fd)
{
	struct mig_stream image = {};
	__u64 before, stopped;
	int new_fd;

	ASSERT_EQ(0, mig_data_size(dev, &before));
	ASSERT_EQ(0, mig_set_state(dev, STOP_COPY, &new_fd));
	if (fd < 0)
		fd = new_fd;
	ASSERT_EQ(0, mig_data_size(dev, &stopped));
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(dev)));
	EXPECT_GE(before, image.len)
		PROMISE("MIG_DATA_SIZE, asked in %s, is what will be required to complete stop copy",
			mig_state_name(from));
	EXPECT_GE(stopped, image.len)
		PROMISE("MIG_DATA_SIZE, asked in STOP_COPY, is what will be required to complete stop copy");
	mig_stream_free(&image);
	close(fd);
}

TEST_F_TIMEOUT(device, data_size_bounds_the_stream, 60)
{
	static const __u32 states[] = {
		RUNNING, RUNNING_P2P, STOP, PRE_COPY, PRE_COPY_P2P,
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
	fd = go(_metadata, &self->dev, PRE_COPY);
	ASSERT_LT(0, mig_read(fd, &image, 100));
	check_data_size(_metadata, &self->dev, PRE_COPY, fd);
	fd = go(_metadata, &self->dev, PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	check_data_size(_metadata, &self->dev, PRE_COPY, fd);
}

/* ---- RESUMING ---- */

TEST_F_TIMEOUT(device, image_loads_in_any_chunks, 120)
{
	static const size_t chunks[] = { 0, 7, 4095, 4096, 1 << 20, 1 };
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, again = {};
	unsigned int i;

	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		/* A system call for each byte of a large image takes too long. */
		if (chunks[i] && image.len / chunks[i] > (1 << 18))
			continue;
		load_and_run(_metadata, to, &image, chunks[i]);
	}
	/* The target is as good a source as the source was. */
	take_image(_metadata, to, &again);
	load_and_run(_metadata, &self->dev, &again, 0);
}

/*
 * Writes @len bytes of a bad image and asks for STOP. Tells whether it was
 * refused, and checks that a refusal keeps the device where it is.
 */
static bool offer(struct __test_metadata *_metadata, const struct mig_device *dev,
		  const void *data, size_t len)
{
	int fd, written, ret;
	__u32 state;

	fd = go(_metadata, dev, RESUMING);
	written = mig_load(fd, data, len, 0, NULL);
	ret = mig_set_state(dev, STOP, NULL);
	ASSERT_EQ(0, mig_get_state(dev, &state));
	if (written) {
		EXPECT_NE(0, ret)
			PROMISE("data that write() refused (%s) is not incorporated into the device state",
				strerror(-written));
	}
	if (ret) {
		EXPECT_TRUE(state == RESUMING || state == ERROR)
			PROMISE("after a failed RESUMING -> STOP the device is in the original state or in ERROR, not in %s",
				mig_state_name(state));
		EXPECT_NE(0, mig_set_state(dev, RUNNING, NULL))
			PROMISE("a device whose data was refused does not run");
		ASSERT_EQ(0, mig_reset(dev))
			PROMISE("to abort a RESUMING session the device must be reset");
		expect_state(_metadata, dev, RUNNING, "after RESET of a refused load");
	}
	close(fd);
	return ret != 0;
}

TEST_F_TIMEOUT(device, incomplete_image_is_refused, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t points[16], n = 0, i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);

	points[n++] = 0;
	points[n++] = 1;
	points[n++] = 8;
	points[n++] = 16;
	points[n++] = 64;
	for (i = 1; i < 8; i++)
		points[n++] = image.len * i / 8;
	points[n++] = image.len - 8;
	points[n++] = image.len - 1;
	for (i = 0; i < n; i++) {
		if (points[i] >= image.len)
			continue;
		EXPECT_TRUE(offer(_metadata, to, image.data, points[i]))
			PROMISE("if the user provided data is found to be incomplete the migration driver must fail SET_STATE (%zu of %zu bytes)",
				points[i], image.len);
		go_home(_metadata, to);
	}
	load_and_run(_metadata, to, &image, 0);
}

/* Whether such a change matters, only the device knows; it must survive it. */
TEST_F_TIMEOUT(device, damaged_image_is_survived, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, bad = {};
	unsigned int refused = 0;
	size_t i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_stream_copy(&bad, &image));
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < 64 && i < image.len; i++) {
		bad.data[i] ^= 0xff;
		refused += offer(_metadata, to, bad.data, bad.len);
		bad.data[i] = image.data[i];
		ASSERT_EQ(0, mig_reset(to));
		expect_state(_metadata, to, RUNNING, "after RESET of a damaged image");
	}
	EXPECT_NE(0U, refused)
		PROMISE("if the user provided data is found to be invalid the migration driver must fail SET_STATE (%zu damaged bytes went unnoticed)",
			i);
	load_and_run(_metadata, to, &image, 0);
}

TEST_F(device, refused_image_is_not_resumed_by_more_data)
{
	struct mig_stream image = {};
	int fd;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	fd = go(_metadata, &self->dev, RESUMING);
	EXPECT_EQ(0, mig_load(fd, image.data, image.len / 2, 0, NULL));
	EXPECT_NE(0, mig_set_state(&self->dev, STOP, NULL));
	/* The session may be over or go on; the device must not run on half. */
	EXPECT_NE(0, mig_set_state(&self->dev, RUNNING, NULL))
		PROMISE("a device whose data was refused does not run");
	ASSERT_EQ(0, mig_reset(&self->dev));
	EXPECT_TRUE(mig_fd_is_dead(fd))
		PROMISE("RESET ends the RESUMING session");
	load_and_run(_metadata, &self->dev, &image, 0);
}

/* ---- Sessions ---- */

TEST_F(device, old_fd_never_sees_a_new_session)
{
	static const __u32 states[] = { PRE_COPY, STOP_COPY, RESUMING };
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	unsigned int i;
	int old, fd;

	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		old = go(_metadata, &self->dev, states[i]);
		if (states[i] == RESUMING)
			load_all(_metadata, old, &image);
		ASSERT_EQ(0, mig_set_state(&self->dev, RUNNING, NULL));
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("leaving %s terminates the data transfer session: ENODEV",
				mig_state_name(states[i]));
		fd = go(_metadata, &self->dev, states[i]);
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("the fd of the last %s session does not see the new one: ENODEV",
				mig_state_name(states[i]));
		if (states[i] == PRE_COPY) {
			EXPECT_EQ(-ENODEV, mig_precopy_info(old, &info))
				PROMISE("the fd of the last session tells nothing of the new one: ENODEV");
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
	static const __u32 states[] = { PRE_COPY, STOP_COPY, RESUMING };
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
			PROMISE("nobody waits for a closed device in poll");
		EXPECT_GT(0, mig_precopy_info(fd, &info));
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("open the device again: %s", self->dev.why);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("an old data_fd stays dead for the next opener");
		close(fd);
		expect_state(_metadata, &self->dev, RUNNING, "after close and open");
	}
}

TEST_F(device, data_fd_closed_first)
{
	static const __u32 states[] = { PRE_COPY, STOP_COPY, RESUMING };
	struct mig_stream image = {};
	unsigned int i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		close(go(_metadata, &self->dev, states[i]));
		expect_state(_metadata, &self->dev, states[i], "after close of the data_fd");
		if (states[i] != RESUMING) {
			EXPECT_EQ(0, mig_set_state(&self->dev, STOP, NULL))
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
		PROMISE("to recover from ERROR VFIO_DEVICE_RESET must be used: the device has it");
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
		EXPECT_EQ(RUNNING, now)
			PROMISE("VFIO_DEVICE_RESET returns the device_state from %s back to RUNNING",
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
			STEP("open the device again: %s", self->dev.why);
		ASSERT_EQ(0, mig_get_state(&self->dev, &now));
		/* Nothing more can be asked of a device that failed this. */
		ASSERT_EQ(RUNNING, now)
			PROMISE("a device that was closed in %s is RUNNING for the next opener",
				mig_state_name(state));
		fd = go(_metadata, &self->dev, STOP_COPY);
		close(fd);
	}
}

/* ---- DMA logging ---- */

static const struct vfio_device_feature_dma_logging_range log_range = {
	.iova = 0, .length = 1 << 20,
};

#define NEED_LOGGING(dev) do {							\
	if (mig_feature(dev, PROBE | SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, \
			NULL, 0))						\
		SKIP(return, "the device does not have DMA logging");		\
} while (0)

TEST_F(device, dma_logging_starts_once)
{
	__u64 bitmap[4] = {}, page_size = 4096;

	NEED_LOGGING(&self->dev);
	EXPECT_NE(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	ASSERT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1));
	EXPECT_NE(0U, page_size)
		PROMISE("on output the device will return the page size it selected");
	EXPECT_EQ(0U, page_size & (page_size - 1))
		PROMISE("the page size the device selected is one");
	page_size = 4096;
	EXPECT_NE(0, mig_log_start(&self->dev, &page_size, &log_range, 1))
		PROMISE("a single START can be issued; another start is not allowed in the meantime");
	EXPECT_EQ(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap))
		PROMISE("a refused second START does not end the logging");
	EXPECT_EQ(0, mig_log_stop(&self->dev));
	EXPECT_NE(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	page_size = 4096;
	EXPECT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1))
		PROMISE("after STOP logging can start again");
}

TEST_F(device, dma_logging_page_sizes)
{
	static const struct vfio_device_feature_dma_logging_range nothing = {};
	static const __u64 sizes[] = { 0, 1, 3, 4095, 12288, 4096, 65536, 1 << 20 };
	unsigned int i;
	__u64 size;
	int ret;

	NEED_LOGGING(&self->dev);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		size = sizes[i];
		/* The core's own check lets only the empty range pass with 0. */
		ret = mig_log_start(&self->dev, &size, size ? &log_range : &nothing, 1);
		if (ret) {
			EXPECT_TRUE(!sizes[i] || sizes[i] & (sizes[i] - 1))
				PROMISE("page_size %llu is a hint; the driver picks what it supports (%s)",
					sizes[i], strerror(-ret));
			continue;
		}
		EXPECT_TRUE(size && !(size & (size - 1)))
			PROMISE("asked for page_size %llu, the device selected %llu, which is none",
				sizes[i], size);
		EXPECT_EQ(0, mig_log_stop(&self->dev));
	}
}

TEST_F(device, dma_logging_report)
{
	__u64 bitmap[4] = { 0x8000000000000001ULL, 0, 0, 1ULL << 63 };
	__u64 page_size = 4096;

	NEED_LOGGING(&self->dev);
	ASSERT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1));
	EXPECT_EQ(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap));
	EXPECT_EQ(0x8000000000000001ULL, bitmap[0] & 0x8000000000000001ULL)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_EQ(1ULL << 63, bitmap[3] & 1ULL << 63)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, 1 << 20, 0, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, 1 << 20, 12288, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, ~0ULL << 12, 1 << 20, 4096, bitmap))
		PROMISE("the range of REPORT does not wrap");
	EXPECT_EQ(0, mig_log_report(&self->dev, 0, 1 << 20, 65536, bitmap))
		PROMISE("page_size does not have to match the value given to START");
}

TEST_F(device, dma_logging_ranges)
{
	struct vfio_device_feature_dma_logging_range two[2] = {
		{ .iova = 0, .length = 0x2000 }, { .iova = 0x1000, .length = 0x2000 },
	};
	struct vfio_device_feature_dma_logging_range wrap = {
		.iova = ~0ULL << 12, .length = 0x2000,
	};
	__u64 page_size = 4096;

	NEED_LOGGING(&self->dev);
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 0))
		PROMISE("START needs a range");
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("ranges do not overlap");
	EXPECT_NE(0, mig_log_start(&self->dev, &page_size, &wrap, 1))
		PROMISE("a range does not wrap");
	EXPECT_EQ(-EFAULT, mig_log_start(&self->dev, &page_size, (void *)8, 1));
	two[1].iova = 0x10000;
	EXPECT_EQ(0, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("refused STARTs leave logging stopped");
}

TEST_F(device, dma_logging_stop_without_start_is_harmless)
{
	__u64 bitmap[4] = {}, page_size = 4096;
	__u32 state;

	NEED_LOGGING(&self->dev);
	mig_log_stop(&self->dev);
	ASSERT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1));
	ASSERT_EQ(0, mig_log_stop(&self->dev));
	mig_log_stop(&self->dev);
	page_size = 4096;
	ASSERT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1));

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state) || state == RESUMING)
			continue;
		if (mig_set_state(&self->dev, state, NULL))
			continue;
		EXPECT_EQ(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap))
			PROMISE("this API is not connected to MIG_DEVICE_STATE (in %s)",
				mig_state_name(state));
	}

	/* Logging belongs to this opening of the device. */
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev));
	EXPECT_NE(0, mig_log_report(&self->dev, 0, 1 << 20, 4096, bitmap))
		PROMISE("logging of the last opener does not go on for the next");
	page_size = 4096;
	EXPECT_EQ(0, mig_log_start(&self->dev, &page_size, &log_range, 1))
		PROMISE("logging of the last opener is not in the way of the next");
}

int main(int argc, char **argv)
{
	int i, n = 1, paths = 0;

	/* Paths in place of VFIO_DEVICE and VFIO_DEVICE2. */
	for (i = 1; i < argc; i++) {
		if (argv[i][0] == '/')
			setenv(paths++ ? "VFIO_DEVICE2" : "VFIO_DEVICE", argv[i], 1);
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;
	return test_harness_run(n, argv);
}
