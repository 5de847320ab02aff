// SPDX-License-Identifier: GPL-2.0
/* Ends of stream, accounting of pre-copy, and MIG_DATA_SIZE. */

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
		EXPECT_ERRNO(ENOMSG, read(fd, &byte, 1))
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
	EXPECT_ERRNO(ENODEV, read(fd, &byte, 1))
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
	unsigned int unannounced = 0;
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
		unannounced += !info.initial_bytes && !info.dirty_bytes;
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
	/* The device may change its own state in between, but hardly each time. */
	EXPECT_GT(3U, unannounced)
		PROMISE("when both initial_bytes and dirty_bytes are zero the end of stream is reached");
}

/*
 * Compares the bytes announced with those read to the temporary end and with the rest,
 * streamed in STOP_COPY, which the fields may include. Both are estimates for the
 * decision when to stop the device: half is allowed for.
 */
static void check_announced(struct __test_metadata *_metadata,
			    const struct vfio_precopy_info *info, __u64 read, __u64 rest)
{
	__u64 announced = info->initial_bytes + info->dirty_bytes;

	EXPECT_GE(announced + announced / 2, read)
		PROMISE("initial_bytes %llu and dirty_bytes %llu are an estimate of the %llu bytes read",
			info->initial_bytes, info->dirty_bytes, read);
	EXPECT_LE(announced, (read + rest) * 3 / 2)
		PROMISE("initial_bytes %llu and dirty_bytes %llu are an estimate of the %llu bytes read, and %llu left for STOP_COPY",
			info->initial_bytes, info->dirty_bytes, read, rest);
}

TEST_F_TIMEOUT(device, initial_bytes_announce_the_stream, 60)
{
	struct mig_stream image = {}, rest = {};
	struct vfio_precopy_info info;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &rest, stream_limit(&self->dev)));
	check_announced(_metadata, &info, image.len, rest.len);
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
	EXPECT_ERRNO(EINVAL, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info))
		PROMISE("argsz must cover struct vfio_precopy_info");
	info.argsz = 0;
	EXPECT_ERRNO(EINVAL, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info))
		PROMISE("argsz must cover struct vfio_precopy_info");

	large.info.argsz = sizeof(large);
	memset(large.tail, 0x5a, sizeof(large.tail));
	EXPECT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &large))
		PROMISE("a larger argsz is accepted");
	EXPECT_EQ(0x5a5a5a5a5a5a5a5aULL, large.tail[0])
		PROMISE("nothing is written past the structure");

	EXPECT_ERRNO(EFAULT, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, NULL));
	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - 16);
	hole->argsz = sizeof(info);
	EXPECT_ERRNO(EFAULT, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, hole));
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

/*
 * Of a device whose whole state is streamed. It is an estimate, and may be an upper
 * bound by the firmware; with a hundred times the size a VMM would never stop it.
 */
TEST_F(device, data_size_is_near_the_stream)
{
	static const __u32 states[] = { MIG_RUNNING, MIG_STOP, MIG_STOP_COPY };
	struct mig_stream image = {};
	unsigned int i;
	__u64 size;

	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		go(_metadata, &self->dev, states[i]);
		ASSERT_EQ(0, mig_data_size(&self->dev, &size));
		EXPECT_GE(100 * image.len + (1 << 20), size)
			PROMISE("MIG_DATA_SIZE in %s is the estimated length of the stream, which has %zu bytes",
				mig_state_name(states[i]), image.len);
	}
}
