// SPDX-License-Identifier: GPL-2.0
/* The content of the device, which a migration preserves and a reset clears. */

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
		STEP("write to the scratch memory: %s", strerror(-ret));
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
		STEP("read the scratch memory: %s", strerror(-ret));
	for (i = 0; i < s->len && seen[i] == want[i]; i++)
		;
	EXPECT_EQ(s->len, i)
		TH_LOG("  %s: byte %zu of the scratch memory is %#x instead of %#x", when, i,
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

/* The second session has all of the state, not only what changed since the first one. */
TEST_F(device, content_survives_migration_after_a_cancelled_one)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	__u8 *want;
	int fd;

	NEED_SCRATCH(self);
	to = open_target(_metadata, &self->dev, &second);
	want = scribble(_metadata, &self->dev, &self->scratch, 55);
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	close(fd);
	move_on(_metadata, &self->dev, MIG_RUNNING);
	image.len = 0;
	finish_migration(_metadata, &self->dev, to, -1, &image);
	expect_scratch(_metadata, to, &self->scratch, want, "after the second session");
}

TEST_F(device, memory_works_on_the_target)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	__u8 *want;

	NEED_SCRATCH(self);
	to = open_target(_metadata, &self->dev, &second);
	scribble(_metadata, &self->dev, &self->scratch, 50);
	finish_migration(_metadata, &self->dev, to, -1, &image);
	want = scribble(_metadata, to, &self->scratch, 51);
	expect_scratch(_metadata, to, &self->scratch, want, "written on the target");
}

/* The source continues after a cancelled migration, with its content. */
TEST_F(device, memory_works_after_every_state)
{
	struct mig_stream image = {};
	char when[64];
	__u32 state;
	__u8 *want;
	int fd;

	NEED_SCRATCH(self);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		want = scribble(_metadata, &self->dev, &self->scratch, 60 + state);
		if (state == MIG_RESUMING)
			take_image(_metadata, &self->dev, &image);
		fd = go(_metadata, &self->dev, state);
		if (state == MIG_RESUMING)
			load_all(_metadata, fd, &image);
		else if (mig_fsm_saving(state))
			mig_save(fd, &image, stream_limit(&self->dev));
		move_on(_metadata, &self->dev, MIG_RUNNING);
		if (fd >= 0)
			close(fd);
		snprintf(when, sizeof(when), "written before %s", mig_state_name(state));
		expect_scratch(_metadata, &self->dev, &self->scratch, want, when);
		want = scribble(_metadata, &self->dev, &self->scratch, 70 + state);
		snprintf(when, sizeof(when), "written after %s", mig_state_name(state));
		expect_scratch(_metadata, &self->dev, &self->scratch, want, when);
	}
}

TEST_F(device, memory_works_after_every_reset)
{
	char when[64];
	__u32 state;
	__u8 *want;
	int fd;

	NEED_RESET(&self->dev);
	NEED_SCRATCH(self);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		ASSERT_EQ(0, mig_reset(&self->dev));
		if (fd >= 0)
			close(fd);
		want = scribble(_metadata, &self->dev, &self->scratch, 80 + state);
		snprintf(when, sizeof(when), "written after RESET in %s",
			 mig_state_name(state));
		expect_scratch(_metadata, &self->dev, &self->scratch, want, when);
	}
}

/*
 * The uAPI allows either: the user should not access a stopped device. A device that
 * drops writes claims that the guest cannot damage its image.
 */
TEST_F(device, writes_to_stopped_device_change_nothing)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {}, saved = {};
	struct mig_scratch *s = &self->scratch;
	__u8 *want, *other;
	unsigned int i;
	int fd;

	NEED_OPTION("drops-writes");
	NEED_SCRATCH(self);
	other = pattern(_metadata, s->len, 91);
	want = scribble(_metadata, &self->dev, s, 90);
	take_image(_metadata, &self->dev, &image);
	/* That has reset the device. */
	scribble(_metadata, &self->dev, s, 90);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		fd = go(_metadata, &self->dev, states[i]);
		if (states[i] == MIG_RESUMING)
			load_all(_metadata, fd, &image);
		/* May fail as well. */
		mig_scratch_write(&self->dev, s, other);
		expect_scratch(_metadata, &self->dev, s, want, mig_state_name(states[i]));
		if (states[i] == MIG_STOP_COPY)
			ASSERT_EQ(0, mig_save(fd, &saved, stream_limit(&self->dev)));
		move_on(_metadata, &self->dev, MIG_RUNNING);
		expect_scratch(_metadata, &self->dev, s, want, "when it runs again");
		if (fd >= 0)
			close(fd);
	}
	load_and_run(_metadata, &self->dev, &saved, 0);
	expect_scratch(_metadata, &self->dev, s, want, "in the image");
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
		ASSERT_EQ(-ENOMSG, mig_read(fd, &image, 100))
			PROMISE("without initial_bytes and dirty_bytes read() fails with ENOMSG");
		mig_set_state(&self->dev, MIG_RUNNING, NULL);
		poller_join(&poller);
		SKIP(return, "the device does not stream changes in PRE_COPY again");
	}
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("poll waits for more data: it wakes when state gets dirty");
}

/* The device was quiet, so that only the change is announced and read. */
TEST_F_TIMEOUT(device, dirty_bytes_announce_the_change, 60)
{
	struct mig_stream image = {}, changed = {}, rest = {};
	struct vfio_precopy_info info;
	int fd;

	NEED_PRE_COPY(&self->dev);
	NEED_SCRATCH(self);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	DRAIN_OR_SKIP(&self->dev, fd, &image);
	scribble(_metadata, &self->dev, &self->scratch, 6);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	DRAIN_OR_SKIP(&self->dev, fd, &changed);
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &rest, stream_limit(&self->dev)));
	check_announced(_metadata, &info, changed.len, rest.len);
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

TEST_F_TIMEOUT(device, regions_can_be_read_to_their_end, 120)
{
	struct mig_stream content = {};
	struct vfio_region_info info;
	__u64 want;
	__u32 i;

	NEED_OPTION("read-regions");
	for (i = 0; i < self->dev.info.num_regions; i++) {
		if (mig_region_info(&self->dev, i, &info) ||
		    !(info.flags & VFIO_REGION_INFO_FLAG_READ))
			continue;
		want = info.size < REGION_MAX ? info.size : REGION_MAX;
		read_region(_metadata, &self->dev, i, &content);
		EXPECT_EQ(want, content.len)
			PROMISE("region %u of %llu bytes can be read, which ends after %zu",
				i, info.size, content.len);
	}
}

/* Without the configuration space, which the VMM restores. */
TEST_F_TIMEOUT(device, regions_survive_migration, 120)
{
	struct mig_stream regions[32] = {}, now = {}, image = {};
	struct mig_device second = { .fd = -1 }, *to;
	unsigned int i, compared = 0;
	bool steady[32] = {};
	size_t at;
	int fd;

	NEED_OPTION("read-regions");
	to = open_target(_metadata, &self->dev, &second);
	if (self->scratch.len)
		scribble(_metadata, &self->dev, &self->scratch, 30);
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	for (i = 0; i < self->dev.info.num_regions && i < ARRAY_SIZE(regions); i++) {
		if (self->dev.info.flags & VFIO_DEVICE_FLAGS_PCI &&
		    i == VFIO_PCI_CONFIG_REGION_INDEX)
			continue;
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
		SKIP(return, "the memory of --scratch cannot be mapped");	\
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
