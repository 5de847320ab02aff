// SPDX-License-Identifier: GPL-2.0
/*
 * The mock migratable device vfio_mock: its registers, config space and migration
 * stream, and that the target receives the state of the source. Its interrupts are
 * tested in vfio_mock_irq_test.c.
 *
 *	./vfio_mock_test --small "SOURCE TARGET" --medium ... --16M ...
 *
 * with the sysfs paths of two mediated devices of each size. run_mock.sh creates
 * them and runs this.
 */
#include <signal.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "mock.h"
#include "mock_image.h"

/* ---- Migration between two devices of one size ---- */

FIXTURE(mock)
{
	struct mock src;
	struct mock dst;
};

FIXTURE_VARIANT(mock)
{
	enum mig_backend backend;
	const char *devices;
};

FIXTURE_VARIANT_ADD(mock, group_small) {
	.backend = MIG_GROUP, .devices = "small",
};

FIXTURE_VARIANT_ADD(mock, group_medium) {
	.backend = MIG_GROUP, .devices = "medium",
};

FIXTURE_VARIANT_ADD(mock, iommufd_small) {
	.backend = MIG_IOMMUFD, .devices = "small",
};

FIXTURE_VARIANT_ADD(mock, iommufd_medium) {
	.backend = MIG_IOMMUFD, .devices = "medium",
};

FIXTURE_VARIANT_ADD(mock, iommufd_16M) {
	.backend = MIG_IOMMUFD, .devices = "16M",
};

FIXTURE_SETUP(mock)
{
	MOCK_OPEN_OR_SKIP(&self->src, variant->devices, 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, variant->devices, 1, variant->backend);
	ASSERT_EQ(mock_type_size(&self->src), self->src.size)
		PROMISE("BAR2 is the state memory, whose size is in the name of the type");
	ASSERT_EQ(self->src.size, self->dst.size);
}

FIXTURE_TEARDOWN(mock)
{
	/* A host setting survives the close of the device. */
	mock_set(&self->src, "save_delay_us", "0");
	mock_close(&self->src);
	mock_close(&self->dst);
}

/*
 * Checks the accounting of a quiet device in PRE_COPY: initial_bytes + dirty_bytes is
 * the length of the STOP_COPY stream, except that both are 0 at the temporary end.
 */
static __u64 expect_exact_info(struct __test_metadata *_metadata,
			       const struct mock *m, int fd)
{
	struct vfio_precopy_info info;
	__u64 size;

	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	if (info.initial_bytes || info.dirty_bytes) {
		EXPECT_EQ(size, info.initial_bytes + info.dirty_bytes)
			PROMISE("initial_bytes (%llu) + dirty_bytes (%llu) matches the amount of data an immediate transition to STOP_COPY will require",
				info.initial_bytes, info.dirty_bytes);
		EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("the data_fd is readable and not writable");
	} else {
		EXPECT_EQ(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("at the temporary end the data_fd is not readable");
	}
	return info.initial_bytes + info.dirty_bytes;
}

static void migrate(struct __test_metadata *_metadata, struct mock *src,
		    struct mock *dst, int fd, struct mig_stream *image)
{
	struct mock_front front;

	read_front(_metadata, src, &front);
	stop_and_save(_metadata, src, &fd, image);
	close(fd);
	load_and_compare(_metadata, dst, image, 0, src->want, &front);
	memcpy(dst->want, src->want, dst->size);
}

/* The same without poll(), for a device that is not ready. */
static __u64 expect_unready_info(struct __test_metadata *_metadata,
				 const struct mock *m, int fd)
{
	struct vfio_precopy_info info;
	__u64 size;

	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(size, info.initial_bytes + info.dirty_bytes)
		PROMISE("initial_bytes + dirty_bytes matches the amount of data an immediate transition to STOP_COPY will require");
	return info.initial_bytes + info.dirty_bytes;
}

/* One whole migration, with changes in all phases. */
TEST_F_TIMEOUT(mock, life_of_a_migration, 120)
{
	struct mock *src = &self->src, *dst = &self->dst;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 size, left, before;
	int fd = -1, ret;

	populate(_metadata, src, 0x1234);
	if (src->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		fd = go(_metadata, &src->dev, MIG_PRE_COPY);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		ASSERT_EQ(0, mig_data_size(&src->dev, &size));
		EXPECT_EQ(size, info.initial_bytes)
			PROMISE("generally initial_bytes should start out as approximately the entire device state");
		EXPECT_LT(src->size, info.initial_bytes);
		EXPECT_EQ(0U, info.dirty_bytes)
			PROMISE("dirty_bytes starts at zero");

		/* Read half of it, then driver and device change the state. */
		while (image.len < size / 2)
			ASSERT_LT(0, mig_read(fd, &image, 10007));
		left = expect_exact_info(_metadata, src, fd);
		EXPECT_EQ(size - image.len, left)
			PROMISE("on a quiet device the bytes read are no longer pending");
		store_noise(_metadata, src, 0, 1, 77);
		fill(_metadata, src, PAGE + 5, PAGE, 78);
		expect_exact_info(_metadata, src, fd);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_LT(0U, info.dirty_bytes)
			PROMISE("dirty_bytes increases as the internal device state is modified");

		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
		EXPECT_EQ(0U, expect_exact_info(_metadata, src, fd));

		/* Rounds of writes and reads until the switchover. */
		fill(_metadata, src, 0, src->size / 4, 79);
		left = expect_exact_info(_metadata, src, fd);
		before = image.len;
		ret = mig_save(fd, &image, stream_limit(&src->dev));
		ASSERT_EQ(-ENOMSG, ret);
		EXPECT_LT(image.len - before, left)
			PROMISE("registers and trailer are only sent in STOP_COPY");
		store_noise(_metadata, src, src->size - PAGE - 1, 2, 80);
		if (src->dev.flags & VFIO_MIGRATION_P2P) {
			left = expect_exact_info(_metadata, src, fd);
			move_on(_metadata, &src->dev, MIG_PRE_COPY_P2P);
			EXPECT_EQ(left, expect_exact_info(_metadata, src, fd));
			store_noise(_metadata, src, 3 * PAGE, 9, 81);
			expect_exact_info(_metadata, src, fd);
		}
		set64(src, SCRATCH, 0xfeedfacecafebeefULL);
	}
	migrate(_metadata, src, dst, fd, &image);

	/* The target continues in place of the source. */
	before = reg64(dst, COMPLETIONS);
	fill(_metadata, dst, 2 * PAGE - 1, 2 * PAGE, 90);
	EXPECT_EQ(before + 1, reg64(dst, COMPLETIONS))
		PROMISE("the target continues the migrated count");
	command(_metadata, dst, VFIO_MOCK_CMD_CHECKSUM, 0, dst->size, 0);
	EXPECT_EQ(vfio_mock_checksum(dst->want, dst->size), reg64(dst, RESULT));
	expect_memory(_metadata, dst, dst->want, "after commands on the target");

	/* The source is unchanged and can be resumed. */
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	expect_memory(_metadata, src, src->want, "on the source, back in RUNNING");

	/* From the target back to the source. */
	image.len = 0;
	migrate(_metadata, dst, src, -1, &image);
}

TEST_F_TIMEOUT(mock, dirtying_is_accounted_exactly, 120)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct mock_image parsed;
	__u64 r, n = 0, at, len;
	unsigned int i;
	ssize_t ret;
	int fd;

	NEED_PRE_COPY(&src->dev);
	populate(_metadata, src, 5);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	for (i = 0; i < 300; i++) {
		r = vfio_mock_mix(++n);
		at = vfio_mock_mix(++n) % src->size;
		len = vfio_mock_mix(++n) % (3 * PAGE) + 1;
		if (len > src->size - at)
			len = src->size - at;
		switch (r % 5) {
		case 0:
			store_noise(_metadata, src, at, len, n);
			break;
		case 1:
			fill(_metadata, src, at, len, n);
			break;
		default:
			/* Long enough to reach the temporary end sometimes. */
			if (r % 5 == 2)
				len = r % (src->size / 2) + 1;
			ret = mig_read(fd, &image, len);
			if (ret < 0) {
				ASSERT_EQ(-ENOMSG, ret);
				EXPECT_EQ(0U, expect_exact_info(_metadata, src, fd))
					PROMISE("at ENOMSG both counters are zero");
			}
		}
		expect_exact_info(_metadata, src, fd);
	}
	migrate(_metadata, src, &self->dst, fd, &image);

	EXPECT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	EXPECT_EQ(0, memcmp(parsed.memory, src->want, src->size))
		PROMISE("the stream has the last content of each page");
}

/* Without pre-copy the image is canonical: each page once, in maximal runs. */
TEST_F(mock, stop_copy_stream_follows_its_format)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct mock_image parsed;
	int fd = -1;

	populate(_metadata, src, 6);
	stop_and_save(_metadata, src, &fd, &image);
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	EXPECT_EQ(src->size, parsed.identity.state_size);
	EXPECT_EQ((size_t)MOCK_REGISTERS_LEN, parsed.registers_len);
	EXPECT_EQ(src->size / PAGE, parsed.trailer.pages)
		PROMISE("a stopped device sends each page once");
	EXPECT_EQ(0, memcmp(parsed.memory, src->want, src->size))
		PROMISE("the stream contains the state memory");
	/* IDENTITY, full runs, REGISTERS. */
	EXPECT_EQ(2 + (src->size / PAGE + MOCK_RUN_PAGES - 1) / MOCK_RUN_PAGES,
		  parsed.trailer.records)
		PROMISE("adjacent pages share a record");
}

TEST_F(mock, one_dirty_page_costs_one_page)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 tail;
	int fd, i;

	NEED_PRE_COPY(&src->dev);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	ASSERT_EQ(0, mig_data_size(&src->dev, &tail));
	EXPECT_LT(0U, tail)
		PROMISE("registers and trailer are still pending");

	/* However often the page is written, by driver or device. */
	for (i = 0; i < 3; i++) {
		store_noise(_metadata, src, 7 * PAGE + 100 * i, 50, i);
		fill(_metadata, src, 8 * PAGE - 1, 1, i);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_EQ(0U, info.initial_bytes)
			PROMISE("later changes are not initial data");
		EXPECT_EQ(24 + PAGE + tail, info.dirty_bytes)
			PROMISE("one dirty page is one record of one page");
	}
	image.len = 0;
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	EXPECT_EQ(24 + PAGE, image.len)
		PROMISE("only the dirty page is sent again");
	EXPECT_EQ(0, memcmp(image.data + 24, src->want + 7 * PAGE, PAGE))
		PROMISE("the page is sent with its last content");

	/* Reads do not dirty pages. */
	expect_memory(_metadata, src, src->want, "in PRE_COPY");
	command(_metadata, src, VFIO_MOCK_CMD_CHECKSUM, 0, src->size, 0);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("reads do not dirty the state");
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));
}

TEST_F_TIMEOUT(mock, poller_wakes_when_state_gets_dirty, 60)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct poller poller;
	int fd, i;

	NEED_PRE_COPY(&src->dev);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
		poller_start(_metadata, &poller, fd);
		EXPECT_FALSE(atomic_load(&poller.done))
			PROMISE("poll waits at the temporary end of stream");
		if (i)
			fill(_metadata, src, 0, 1, 1);
		else
			store_noise(_metadata, src, 0, 1, 1);
		EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
			PROMISE("userspace can wait for more data by using poll");
		EXPECT_LT(0, mig_read(fd, &image, 1))
			PROMISE("read() returns data after poll()");
	}
}

TEST_F(mock, reinit_announces_new_initial_data)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 size;
	int fd;

	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mig_opt_in_v2(&src->dev));
	populate(_metadata, src, 8);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.flags & VFIO_PRECOPY_INFO_REINIT)
		PROMISE("REINIT is only reported for later initial data");
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	store_noise(_metadata, src, 0, 1, 1);

	command(_metadata, src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	EXPECT_EQ(VFIO_MOCK_STATUS_DONE, (int)reg32(src, STATUS));
	vfio_mock_pattern(src->want, 4711, 0, src->size);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ((__u32)VFIO_PRECOPY_INFO_REINIT, info.flags)
		PROMISE("REINIT indicates that new initial data is present on the stream");
	EXPECT_LT(src->size, info.initial_bytes)
		PROMISE("initial_bytes may report a non-zero value irrespective of any previously reported values");
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("dirty_bytes is also reset to zero");
	EXPECT_EQ(size, info.initial_bytes);

	store_noise(_metadata, src, 3, 5, 2);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.flags)
		PROMISE("REINIT ends when the new initial data was read");
	migrate(_metadata, src, &self->dst, fd, &image);
}

/* The rest of a record that was read in part is streamed, and then the page again. */
TEST_F(mock, rest_of_a_change_is_initial_after_reinit)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 size, left;
	int fd;

	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mig_opt_in_v2(&src->dev));
	populate(_metadata, src, 10);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	store_noise(_metadata, src, 0, 1, 1);
	ASSERT_EQ(1, mig_read(fd, &image, 1));
	command(_metadata, src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	vfio_mock_pattern(src->want, 4711, 0, src->size);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ((__u32)VFIO_PRECOPY_INFO_REINIT, info.flags);
	EXPECT_EQ(0U, info.dirty_bytes)
		PROMISE("dirty_bytes is also reset to zero");
	EXPECT_EQ(size, info.initial_bytes);

	left = info.initial_bytes;
	ASSERT_EQ(1, mig_read(fd, &image, 1));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(left - 1, info.initial_bytes)
		PROMISE("initial_bytes decrease as migration data is read from the device");
	EXPECT_EQ(0U, info.dirty_bytes);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	migrate(_metadata, src, &self->dst, fd, &image);
}

/* An aborted session does not affect the next one. */
TEST_F(mock, new_session_streams_everything)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 whole;
	int fd;

	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mig_opt_in_v2(&src->dev));
	populate(_metadata, src, 9);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_data_size(&src->dev, &whole));
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	command(_metadata, src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	vfio_mock_pattern(src->want, 4711, 0, src->size);
	ASSERT_LT(0, mig_read(fd, &image, 10));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ((__u32)VFIO_PRECOPY_INFO_REINIT, info.flags);
	move_on(_metadata, &src->dev, MIG_RUNNING);
	close(fd);

	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.flags)
		PROMISE("REINIT is not reported for data that this session has not streamed yet");
	EXPECT_EQ(whole, info.initial_bytes)
		PROMISE("a new session begins with the whole device state");
	EXPECT_EQ(0U, info.dirty_bytes);
	image.len = 0;
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	migrate(_metadata, src, &self->dst, fd, &image);
}

TEST_F(mock, reinit_is_not_reported_without_opt_in)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info), .flags = 0x50 };
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int fd;

	NEED_PRE_COPY(&src->dev);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	command(_metadata, src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	vfio_mock_pattern(src->want, 4711, 0, src->size);
	ASSERT_EQ(0, ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, &info));
	EXPECT_EQ(0x50U, info.flags)
		PROMISE("REINIT can be reported only after userspace opts in");
	migrate(_metadata, src, &self->dst, fd, &image);
}

TEST_F(mock, cancelled_migration_does_not_change_source)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	__u64 first;
	int fd, i;

	NEED_PRE_COPY(&src->dev);
	populate(_metadata, src, 9);
	for (i = 0; i < 3; i++) {
		fd = go(_metadata, &src->dev, MIG_PRE_COPY);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		if (!i)
			first = info.initial_bytes;
		EXPECT_EQ(first, info.initial_bytes)
			PROMISE("each session sends the whole state");
		image.len = 0;
		ASSERT_LT(0, mig_read(fd, &image, src->size / 2));
		store_noise(_metadata, src, i * PAGE, 9, i);
		if (i == 2)
			break;
		move_on(_metadata, &src->dev, MIG_RUNNING);
		EXPECT_TRUE(mig_fd_is_dead(fd));
		close(fd);
		expect_memory(_metadata, src, src->want, "after a cancelled migration");
		fill(_metadata, src, 100, 200, i);
	}
	migrate(_metadata, src, &self->dst, fd, &image);
}

TEST_F_TIMEOUT(mock, content_survives_any_chunking, 120)
{
	const size_t chunks[] = { 1, 7, PAGE - 1, PAGE, 1 << 20, 0 };
	struct mock *src = &self->src, *dst = &self->dst;
	struct mig_stream image = {};
	struct mock_front front;
	unsigned int i;
	int fd = -1;

	populate(_metadata, src, 10);
	read_front(_metadata, src, &front);
	stop_and_save(_metadata, src, &fd, &image);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		/* For a large image a system call for each byte takes too long. */
		if (chunks[i] && image.len / chunks[i] > (1 << 18))
			continue;
		ASSERT_EQ(0, mig_reset(&dst->dev));
		load_and_compare(_metadata, dst, &image, chunks[i], src->want, &front);
	}
}

/* The same for reads: the stream does not depend on their size. */
TEST_F_TIMEOUT(mock, stream_is_independent_of_read_size, 120)
{
	const size_t chunks[] = { 1, 7, PAGE - 1, PAGE, 1 << 20 };
	struct mig_stream image = {}, again = {};
	struct mock *src = &self->src;
	unsigned int i;
	ssize_t ret;
	int fd = -1;

	populate(_metadata, src, 11);
	stop_and_save(_metadata, src, &fd, &image);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		if (image.len / chunks[i] > (1 << 18))
			continue;
		/* STOP_COPY -> STOP -> STOP_COPY starts a new session. */
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP, NULL));
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, &fd));
		again.len = 0;
		while ((ret = mig_read(fd, &again, chunks[i])) > 0)
			;
		ASSERT_EQ(0, ret);
		ASSERT_EQ(image.len, again.len);
		EXPECT_EQ(0, memcmp(image.data, again.data, image.len))
			PROMISE("reads of %zu bytes return the same stream", chunks[i]);
		close(fd);
	}
}

TEST_F(mock, p2p_states_keep_the_device_working)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int fd;

	NEED_P2P(&src->dev);
	populate(_metadata, src, 12);
	move_on(_metadata, &src->dev, MIG_RUNNING_P2P);
	fill(_metadata, src, 9, 99, 13);
	store_noise(_metadata, src, PAGE - 1, 2, 14);
	expect_memory(_metadata, src, src->want, "in RUNNING_P2P");
	if (!(src->dev.flags & VFIO_MIGRATION_PRE_COPY))
		return;
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_PRE_COPY_P2P, &fd));
	ASSERT_LE(0, fd);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	fill(_metadata, src, 19, 99, 15);
	EXPECT_LT(0U, expect_exact_info(_metadata, src, fd))
		PROMISE("PRE_COPY_P2P continues all the behaviors of PRE_COPY");
	migrate(_metadata, src, &self->dst, fd, &image);
}

/* A write that is dropped and counted. */
static void expect_dropped(struct __test_metadata *_metadata, struct mock *m,
			   int region, __u64 at, __u64 value, size_t width,
			   const char *state)
{
	__u64 before = reg64(m, DROPPED);

	put(_metadata, m, region, at, value, width);
	EXPECT_EQ(before + 1, reg64(m, DROPPED))
		PROMISE("in %s a write to region %d at %#llx is dropped and counted",
			state, region, at);
}

TEST_F(mock, stopped_device_does_not_change)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mock *src = &self->src;
	struct mock_front before, now;
	struct mig_stream image = {};
	const __u64 len = 2 * PAGE;
	__u8 *pages = malloc(len);
	unsigned int i;
	__u64 dropped;
	int fd;

	ASSERT_NE(NULL, pages);
	memset(pages, 0xee, len);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		const char *name = mig_state_name(states[i]);

		go_home(_metadata, &src->dev);
		populate(_metadata, src, 20 + i);
		set64(src, ADDR, 0);
		set64(src, LEN, src->size);
		read_front(_metadata, src, &before);
		ASSERT_EQ(0, mig_set_state(&src->dev, states[i], &fd));
		if (states[i] == MIG_RESUMING)
			read_front(_metadata, src, &before);

		expect_dropped(_metadata, src, BAR0, VFIO_MOCK_REG_SCRATCH, ~0ULL, 8, name);
		expect_dropped(_metadata, src, BAR0, VFIO_MOCK_REG_SCRATCH + 3, 0x55, 1, name);
		expect_dropped(_metadata, src, BAR0, VFIO_MOCK_REG_DOORBELL,
			       VFIO_MOCK_CMD_FILL, 4, name);
		expect_dropped(_metadata, src, BAR0, VFIO_MOCK_REG_DOORBELL,
			       VFIO_MOCK_CMD_REINIT, 4, name);
		expect_dropped(_metadata, src, BAR2, 0, 0x0102030405060708ULL, 8, name);
		expect_dropped(_metadata, src, BAR2, 5 * PAGE + 1, 0xff, 1, name);
		expect_dropped(_metadata, src, BAR0, VFIO_MOCK_MSIX_TABLE + 16, ~0ULL, 8, name);
		dropped = reg64(src, DROPPED);
		EXPECT_EQ((ssize_t)len, mock_write(src, BAR2, 3 * PAGE, pages, len));
		EXPECT_LT(dropped, reg64(src, DROPPED))
			PROMISE("in %s a write of a block is dropped and counted", name);

		read_front(_metadata, src, &now);
		expect_same_front(_metadata, &before, &now, name);
		put(_metadata, src, CONFIG, 4, 2, 2);
		EXPECT_EQ(2U, get(_metadata, src, CONFIG, 4, 2))
			PROMISE("in %s the device must respond to PCI config space", name);
		put(_metadata, src, CONFIG, 4, before.config[4], 2);
		if (states[i] == MIG_RESUMING)
			continue;

		expect_memory(_metadata, src, src->want, name);
		if (states[i] == MIG_STOP_COPY) {
			image.len = 0;
			ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&src->dev)));
			load_and_compare(_metadata, &self->dst, &image, 0, src->want,
					 &before);
			EXPECT_EQ(0U, reg64(&self->dst, DROPPED))
				PROMISE("DROPPED does not migrate");
		}
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
		dropped = reg64(src, DROPPED);
		store_noise(_metadata, src, 0, 100, 30);
		fill(_metadata, src, 200, 100, 30);
		expect_memory(_metadata, src, src->want, "running again");
		EXPECT_EQ(dropped, reg64(src, DROPPED))
			PROMISE("a running device drops no write");
	}
}

TEST_F(mock, reset_wipes_the_device)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP,
		MIG_STOP_COPY, MIG_RESUMING,
	};
	struct mock *src = &self->src;
	struct mig_stream image = {};
	unsigned int i;
	int fd = -1;

	populate(_metadata, src, 40);
	stop_and_save(_metadata, src, &fd, &image);
	close(fd);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(src->dev.flags, states[i]))
			continue;
		go_home(_metadata, &src->dev);
		populate(_metadata, src, 41 + i);
		ASSERT_EQ(0, mig_set_state(&src->dev, states[i], &fd));
		if (states[i] == MIG_RESUMING)
			load_all(_metadata, fd, &image);
		ASSERT_EQ(0, mig_reset(&src->dev));
		expect_state(_metadata, &src->dev, MIG_RUNNING, "after RESET");
		expect_fresh(_metadata, src, "after RESET");
		if (fd >= 0)
			close(fd);
	}
}

TEST_F(mock, next_opener_gets_fresh_device)
{
	static const __u32 states[] = { MIG_RUNNING, MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mock *src = &self->src;
	struct mig_stream image = {};
	unsigned int i;
	int fd = -1;

	expect_fresh(_metadata, src, "on open");
	populate(_metadata, src, 50);
	stop_and_save(_metadata, src, &fd, &image);
	close(fd);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		go_home(_metadata, &src->dev);
		populate(_metadata, src, 51 + i);
		ASSERT_EQ(0, mig_set_state(&src->dev, states[i], &fd));
		if (states[i] == MIG_RESUMING)
			load_all(_metadata, fd, &image);
		if (fd >= 0)
			close(fd);
		mig_close_device(&src->dev);
		ASSERT_EQ(0, mig_reopen_device(&src->dev))
			STEP("reopen the device: %s", src->dev.why);
		expect_state(_metadata, &src->dev, MIG_RUNNING, "for the next opener");
		expect_fresh(_metadata, src, "for the next opener");
	}
}

/* ---- A device that is slow to prepare its state ---- */

#define NEVER	0xffffffffU	/* microseconds: longer than any test */

/*
 * Delays of all sizes, so that the device becomes ready before, while and after the
 * reader goes to sleep: a reader without the wake-up sleeps forever.
 */
TEST_F_TIMEOUT(mock, read_waits_for_slow_device, 60)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int fd = -1, delay;

	populate(_metadata, src, 70);
	for (delay = 1; delay < 400; delay += 1 + delay / 8) {
		go_home(_metadata, &src->dev);
		set_save_delay(_metadata, src, delay);
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, &fd));
		image.len = 0;
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&src->dev)));
		close(fd);
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	}

	image.len = 0;
	fd = -1;
	if (src->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		fd = go(_metadata, &src->dev, MIG_PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
		store_noise(_metadata, src, 0, 1, 71);
		EXPECT_LT(0U, expect_unready_info(_metadata, src, fd));
	}
	migrate(_metadata, src, &self->dst, fd, &image);
	set_save_delay(_metadata, src, 0);
}

/* A client in poll() is woken once for each record. */
TEST_F_TIMEOUT(mock, poller_wakes_once_for_each_record, 60)
{
	unsigned int records, wakeups = 0, vain = 0;
	struct mock *src = &self->src;
	struct vfio_precopy_info info;
	struct mig_stream image = {};
	ssize_t ret;
	int fd;

	NEED_PRE_COPY(&src->dev);
	populate(_metadata, src, 74);
	set_save_delay(_metadata, src, 5000);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	for (;;) {
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		if (!info.initial_bytes && !info.dirty_bytes)
			break;
		ASSERT_LT(0, mig_poll(fd, POLLIN, mig_hang_seconds() * 1000));
		wakeups++;
		ret = mig_read(fd, &image, 1 << 20);
		if (ret == -EAGAIN)
			vain++;
		else
			ASSERT_LT(0, ret);
	}
	/* Identity, and runs of 64 pages. */
	records = 1 + (src->size / PAGE + 63) / 64;
	EXPECT_EQ(0U, vain)
		PROMISE("read() returns data after poll()");
	EXPECT_GE(records, wakeups)
		PROMISE("a reader is woken once for each record");
	set_save_delay(_metadata, src, 0);
	close(fd);
	mig_stream_free(&image);
}

/* A slow device delays no record while nothing is left to stream. */
TEST_F(mock, change_at_temporary_end_is_ready_at_once)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int fd, i;

	NEED_PRE_COPY(&src->dev);
	populate(_metadata, src, 75);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&src->dev)));
	set_save_delay(_metadata, src, NEVER);
	for (i = 0; i < 3; i++) {
		store_noise(_metadata, src, 0, 1, 76 + i);
		EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0));
		EXPECT_LT(0, mig_read(fd, &image, 1 << 20))
			PROMISE("what poll announces can be read");
		EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
			PROMISE("at the temporary end there is nothing to read");
		EXPECT_EQ(-ENOMSG, mig_read(fd, &image, 1));
	}
	/* This would end a wait under way. */
	set_save_delay(_metadata, src, 0);
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
		PROMISE("poll does not announce what read() does not have");
	migrate(_metadata, src, &self->dst, fd, &image);
}

TEST_F(mock, nonblocking_read_of_slow_device_is_eagain)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	__u64 size;
	int fd = -1;

	NEED_PRE_COPY(&src->dev);
	populate(_metadata, src, 72);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	set_save_delay(_metadata, src, NEVER);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	EXPECT_EQ(-EAGAIN, mig_read(fd, &image, 4096))
		PROMISE("with O_NONBLOCK a read() returns EAGAIN if no data is ready");
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
		PROMISE("poll does not report data that is not ready");
	EXPECT_EQ(size, expect_unready_info(_metadata, src, fd))
		PROMISE("data that is not ready is still pending");
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	EXPECT_TRUE(mig_fd_is_dead(fd));
	close(fd);

	set_save_delay(_metadata, src, 0);
	migrate(_metadata, src, &self->dst, -1, &image);
}

TEST_F(mock, stop_copy_poll_waits_for_slow_saver)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int fd, unready = 0;
	ssize_t got;

	populate(_metadata, src, 74);
	set_save_delay(_metadata, src, NEVER);
	fd = go(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0))
		PROMISE("also in STOP_COPY poll() waits for data that is not ready");
	EXPECT_EQ(-EAGAIN, mig_read(fd, &image, 4096));
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	close(fd);

	set_save_delay(_metadata, src, 1000);
	fd = go(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	do {
		ASSERT_EQ(POLLIN, mig_poll(fd, POLLIN, -1));
		got = mig_read(fd, &image, 1 << 20);
		unready += got == -EAGAIN;
	} while (got > 0 || got == -EAGAIN);
	EXPECT_EQ(0, got);
	EXPECT_EQ(0, unready)
		PROMISE("read() returns data after poll(): a client does not spin");
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	close(fd);

	set_save_delay(_metadata, src, 0);
	image.len = 0;
	migrate(_metadata, src, &self->dst, -1, &image);
}

/* A device that becomes slow during a read(): ready data is returned at once. */
TEST_F(mock, read_returns_what_is_ready)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	__u64 size;
	int fd;

	populate(_metadata, src, 73);
	fd = go(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	ASSERT_EQ(3, mig_read(fd, &image, 3));
	set_save_delay(_metadata, src, NEVER);
	ASSERT_LT(0, mig_read(fd, &image, size))
		PROMISE("the rest of a partly read record is ready");
	EXPECT_GT(size, image.len)
		PROMISE("read() returns the ready data and does not wait for more");
	/* The device is not ready any more: use a new session. */
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	close(fd);
	set_save_delay(_metadata, src, 0);
	image.len = 0;
	migrate(_metadata, src, &self->dst, -1, &image);
}

/* A thread that waits in read() for data that never becomes ready. */
struct reader {
	struct poller poller;
	int fd;
	ssize_t ret;
};

static void *reader_main(void *arg)
{
	struct reader *r = arg;
	char byte;

	atomic_store(&r->poller.tid, gettid());
	r->ret = read(r->fd, &byte, 1);
	if (r->ret < 0)
		r->ret = -errno;
	atomic_store(&r->poller.done, true);
	return NULL;
}

/* A thread that reads into two buffers. */
struct vector_reader {
	pthread_t thread;
	struct iovec iov[2];
	int fd;
	ssize_t ret;
};

static void *vector_reader_main(void *arg)
{
	struct vector_reader *r = arg;

	r->ret = readv(r->fd, r->iov, ARRAY_SIZE(r->iov));
	if (r->ret < 0)
		r->ret = -errno;
	return NULL;
}

/* A readv() is one read(): it does not wait after a full buffer. */
TEST_F(mock, readv_returns_what_is_ready)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct vector_reader r = {};
	ssize_t ready = 0;
	int pipes[2], i;
	__u64 size;
	__u8 byte;

	populate(_metadata, src, 79);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	for (i = 0; i < 2; i++) {
		set_save_delay(_metadata, src, 0);
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, &r.fd));
		ASSERT_EQ(3, mig_read(r.fd, &image, 3));
		set_save_delay(_metadata, src, NEVER);
		if (!i) {
			/* These bytes are ready. */
			ready = mig_read(r.fd, &image, size);
			ASSERT_LT(0, ready);
			ASSERT_GT((ssize_t)size, ready);
			ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
			close(r.fd);
		}
	}
	r.iov[0] = (struct iovec){ image.data, ready };
	r.iov[1] = (struct iovec){ &byte, 1 };
	ASSERT_EQ(0, pthread_create(&r.thread, NULL, vector_reader_main, &r));
	EXPECT_TRUE(joined(r.thread))
		PROMISE("readv() returns the ready data and does not wait for more");
	EXPECT_EQ(ready, r.ret);

	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	EXPECT_ERRNO(EAGAIN, splice(r.fd, NULL, pipes[1], NULL, 4096, 0))
		PROMISE("splice() does not wait with the pipe locked");
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	EXPECT_ERRNO(ENODEV, splice(r.fd, NULL, pipes[1], NULL, 4096, 0))
		PROMISE("after the session every call fails with ENODEV");
	close(r.fd);
	close(pipes[0]);
	close(pipes[1]);
	set_save_delay(_metadata, src, 0);
	image.len = 0;
	migrate(_metadata, src, &self->dst, -1, &image);
}

/* The host can end the delay of a slow device. */
TEST_F(mock, shorter_delay_ends_the_wait)
{
	static const char *const shorter[] = { "0", "1", "0x10" };
	static const char *const bad[] = { "x", "-1", "4294967296", "1 2" };
	struct mock *src = &self->src;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(shorter); i++) {
		struct reader r = {};

		set_save_delay(_metadata, src, NEVER);
		r.fd = go(_metadata, &src->dev, MIG_STOP_COPY);
		ASSERT_EQ(0, pthread_create(&r.poller.thread, NULL, reader_main, &r));
		wait_until_asleep(&r.poller);
		if (!i) {
			unsigned int j;

			for (j = 0; j < ARRAY_SIZE(bad); j++) {
				EXPECT_GT(0, mock_set(src, "save_delay_us", bad[j]))
					PROMISE("'%s' is refused", bad[j]);
			}
			EXPECT_FALSE(atomic_load(&r.poller.done))
				PROMISE("a refused value changes nothing");
		}
		ASSERT_EQ(0, mock_set(src, "save_delay_us", shorter[i]));
		ASSERT_TRUE(joined(r.poller.thread))
			PROMISE("a shorter delay ends the current wait");
		EXPECT_EQ(1, r.ret);
		go_home(_metadata, &src->dev);
		close(r.fd);
	}
	set_save_delay(_metadata, src, 0);
}

/* The end of a session does not wait for its reader, and wakes it. */
static void check_reader_wakes(struct __test_metadata *_metadata, struct mock *m,
			       __u32 from, const char *how)
{
	struct reader r = {};
	int ret = 0;

	set_save_delay(_metadata, m, NEVER);
	r.fd = go(_metadata, &m->dev, from);
	ASSERT_EQ(0, pthread_create(&r.poller.thread, NULL, reader_main, &r));
	wait_until_asleep(&r.poller);
	EXPECT_FALSE(atomic_load(&r.poller.done))
		PROMISE("read() waits for a device that is not ready");

	if (!strcmp(how, "RESET"))
		ret = mig_reset(&m->dev);
	else if (!strcmp(how, "close"))
		mig_close_device(&m->dev);
	else
		ret = mig_set_state(&m->dev, MIG_RUNNING, NULL);
	EXPECT_EQ(0, ret);
	ASSERT_TRUE(joined(r.poller.thread))
		PROMISE("a reader that waits in %s wakes at the end of the session by %s",
			mig_state_name(from), how);
	EXPECT_EQ(-ENODEV, r.ret)
		PROMISE("a reader that waits in %s gets ENODEV after the end of the session by %s",
			mig_state_name(from), how);
	close(r.fd);
	if (m->dev.fd < 0)
		ret = mig_reopen_device(&m->dev);
	ASSERT_EQ(0, ret);
	set_save_delay(_metadata, m, 0);
}

TEST_F_TIMEOUT(mock, waiting_reader_blocks_no_call, 60)
{
	static const char *const ends[] = { "SET_STATE", "RESET", "close" };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(ends); i++) {
		if (self->src.dev.flags & VFIO_MIGRATION_PRE_COPY)
			check_reader_wakes(_metadata, &self->src, MIG_PRE_COPY, ends[i]);
		check_reader_wakes(_metadata, &self->src, MIG_STOP_COPY, ends[i]);
	}
}

/* Two readers share a stream: each byte goes to one of them, in order. */
struct sharer {
	pthread_t thread;
	int fd;
	struct mig_stream got;
	int err;
};

static void *sharer_main(void *arg)
{
	struct sharer *s = arg;
	ssize_t ret;

	while ((ret = mig_read(s->fd, &s->got, 4096)) > 0)
		;
	s->err = ret;
	return NULL;
}

TEST_F_TIMEOUT(mock, parallel_readers_get_each_byte_once, 60)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	struct sharer sharers[2] = {};
	__u64 seen = 0, sum = 0;
	size_t total = 0, j;
	unsigned int i;
	int fd = -1;

	/* The sum of all bytes does not depend on the reader. */
	populate(_metadata, src, 73);
	stop_and_save(_metadata, src, &fd, &image);
	for (j = 0; j < image.len; j++)
		sum += image.data[j];
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, &fd));
	for (i = 0; i < ARRAY_SIZE(sharers); i++) {
		sharers[i].fd = fd;
		ASSERT_EQ(0, pthread_create(&sharers[i].thread, NULL, sharer_main,
					    &sharers[i]));
	}
	for (i = 0; i < ARRAY_SIZE(sharers); i++) {
		pthread_join(sharers[i].thread, NULL);
		EXPECT_EQ(0, sharers[i].err)
			PROMISE("each reader reaches the permanent end");
		total += sharers[i].got.len;
		for (j = 0; j < sharers[i].got.len; j++)
			seen += sharers[i].got.data[j];
	}
	EXPECT_EQ(image.len, total)
		PROMISE("each byte goes to exactly one of the parallel readers");
	EXPECT_EQ(sum, seen)
		PROMISE("each byte goes to exactly one of the parallel readers");
}

TEST_F(mock, data_fd_outlives_its_device)
{
	struct mock *src = &self->src;
	struct mig_stream image = {};
	int save, load;

	populate(_metadata, src, 60);
	save = go(_metadata, &src->dev, MIG_STOP_COPY);
	load = go(_metadata, &self->dst.dev, MIG_RESUMING);
	ASSERT_LT(0, mig_read(save, &image, 4096));
	ASSERT_EQ(0, mig_load(load, image.data, image.len, 0, NULL));
	mig_close(&src->dev);
	mig_close(&self->dst.dev);
	EXPECT_EQ(-ENODEV, mig_read(save, &image, 4096))
		PROMISE("after close every call on the data_fd returns ENODEV");
	EXPECT_EQ(-ENODEV, mig_load(load, image.data, image.len, 0, NULL))
		PROMISE("after close every call on the data_fd returns ENODEV");
	EXPECT_NE(0, mig_poll(save, POLLIN, 0))
		PROMISE("poll does not wait for a closed device");
}

/* ---- Killed clients ---- */

enum killed_call { KILLED_READ, KILLED_WRITE, KILLED_FILL };

FIXTURE(killed)
{
	struct mock m;
	__u8 *bar;
	__u8 *mem;		/* shared with the child */
	atomic_bool *returned;
};

FIXTURE_VARIANT(killed)
{
	enum killed_call call;
	__u64 chunk;		/* is completed after the client is killed */
};

FIXTURE_VARIANT_ADD(killed, read) { .call = KILLED_READ, .chunk = 64 << 10 };
FIXTURE_VARIANT_ADD(killed, write) { .call = KILLED_WRITE, .chunk = 64 << 10 };
FIXTURE_VARIANT_ADD(killed, command) { .call = KILLED_FILL, .chunk = 1 << 20 };

FIXTURE_SETUP(killed)
{
	void *map = NULL;

	MOCK_OPEN_OR_SKIP(&self->m, "16M", 0, MIG_GROUP);
	ASSERT_EQ(0, mig_region_map(&self->m.dev, BAR2, 0, self->m.size, &map));
	self->bar = map;
	self->mem = mmap(NULL, self->m.size + PAGE, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->mem);
	self->returned = (atomic_bool *)(self->mem + self->m.size);
}

FIXTURE_TEARDOWN(killed)
{
	munmap(self->bar, self->m.size);
	mock_close(&self->m);
}

/* The number of bytes written to zeroed memory, by the first words of chunks. */
static __u64 written_up_to(const __u8 *mem, __u64 size, __u64 chunk)
{
	__u64 at;

	for (at = 0; at < size; at += chunk)
		if (!__atomic_load_n((const __u64 *)(mem + at), __ATOMIC_ACQUIRE))
			break;
	return at;
}

TEST_F_TIMEOUT(killed, client_stops_within_a_chunk, 120)
{
	const __u64 chunk = variant->chunk, size = self->m.size;
	const bool reads = variant->call == KILLED_READ;
	const __u8 *to = reads ? self->mem : self->bar;
	atomic_bool *returned = self->returned;
	unsigned int tries, stopped = 0;
	struct mock *m = &self->m;
	__u64 killed, ended;
	int status;
	pid_t pid;

	set64(m, LEN, size);
	set64(m, SEED, 1);
	if (reads)
		set32(m, DOORBELL, VFIO_MOCK_CMD_FILL);
	/* A client that ended before it was killed proves nothing. */
	for (tries = 0; tries < 50 && stopped < 3; tries++) {
		*returned = false;
		if (reads) {
			memset(self->mem, 0, size);
		} else {
			memset(self->mem, 0x5a, size);
			memset(self->bar, 0, size);
		}
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid) {
			if (reads)
				mock_read(m, BAR2, 0, self->mem, size);
			else if (variant->call == KILLED_WRITE)
				mock_write(m, BAR2, 0, self->mem, size);
			else
				set32(m, DOORBELL, VFIO_MOCK_CMD_FILL);
			*returned = true;
			_exit(0);
		}
		while (!written_up_to(to, size, chunk) && !*returned)
			;
		ASSERT_EQ(0, kill(pid, SIGKILL));
		killed = written_up_to(to, size, chunk);
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ended = written_up_to(to, size, chunk);
		EXPECT_LE(ended, killed + chunk)
			PROMISE("a killed client stops within %llu bytes: killed after %llu, ended after %llu of %llu",
				chunk, killed, ended, size);
		if (*returned || ended == size)
			continue;
		stopped++;
		if (variant->call == KILLED_FILL) {
			EXPECT_EQ(VFIO_MOCK_STATUS_ERROR, (int)reg32(m, STATUS));
			EXPECT_EQ(VFIO_MOCK_ERROR_KILLED, (int)reg32(m, ERROR))
				PROMISE("a command of a killed client ends with this error");
		}
	}
	EXPECT_LT(0U, stopped)
		PROMISE("a killed client stops: all of %u tries continued to the end",
			tries);
}

/* ---- The PCI device ---- */

FIXTURE(pci)
{
	struct mock m;
};

MIG_EACH_BACKEND(pci);

FIXTURE_SETUP(pci)
{
	MOCK_OPEN_OR_SKIP(&self->m, "small", 0, variant->backend);
}

FIXTURE_TEARDOWN(pci)
{
	mock_close(&self->m);
}

TEST_F(pci, device_info)
{
	struct vfio_device_info info = { .argsz = sizeof(info) };
	struct mock *m = &self->m;

	EXPECT_EQ((__u32)(VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET),
		  m->dev.info.flags & ~VFIO_DEVICE_FLAGS_CAPS);
	EXPECT_EQ((__u32)VFIO_PCI_NUM_REGIONS, m->dev.info.num_regions);
	EXPECT_EQ((__u32)VFIO_PCI_NUM_IRQS, m->dev.info.num_irqs);
	memset(&info, 0xff, sizeof(info));
	info.argsz = sizeof(info);
	ASSERT_EQ(0, ioctl(m->dev.fd, VFIO_DEVICE_GET_INFO, &info));
	EXPECT_EQ(0U, info.cap_offset)
		PROMISE("cap_offset is written if argsz covers it");
	memset(&info, 0xff, sizeof(info));
	info.argsz = 16;
	ASSERT_EQ(0, ioctl(m->dev.fd, VFIO_DEVICE_GET_INFO, &info));
	EXPECT_EQ(~0U, info.cap_offset)
		PROMISE("nothing is written after argsz");
	info.argsz = 8;
	EXPECT_ERRNO(EINVAL, ioctl(m->dev.fd, VFIO_DEVICE_GET_INFO, &info))
		PROMISE("argsz must cover the structure");
	EXPECT_ERRNO(EFAULT, ioctl(m->dev.fd, VFIO_DEVICE_GET_INFO, NULL));
	EXPECT_ERRNO(ENOTTY, ioctl(m->dev.fd, _IO(VFIO_TYPE, VFIO_BASE + 98), &info))
		PROMISE("an unknown ioctl is ENOTTY");
}

TEST_F(pci, every_region_can_be_accessed)
{
	static const __u32 rw = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	const __u64 sizes[VFIO_PCI_NUM_REGIONS] = {
		[BAR0] = VFIO_MOCK_BAR0_SIZE, [BAR2] = self->m.size,
		[CONFIG] = mock_has_iommu(&self->m) ? 4096 : 256,
	};
	struct vfio_region_info info;
	struct mock *m = &self->m;
	__u8 buf[16] = {};
	ssize_t ret;
	__u32 i;

	for (i = 0; i < VFIO_PCI_NUM_REGIONS; i++) {
		ASSERT_EQ(0, mig_region_info(&m->dev, i, &info))
			PROMISE("region %u supports GET_REGION_INFO", i);
		EXPECT_EQ(sizes[i], info.size)
			PROMISE("region %u has this size", i);
		EXPECT_EQ(sizes[i] ? rw : 0, info.flags & rw)
			PROMISE("region %u can be read and written if it exists", i);
		if (!sizes[i]) {
			EXPECT_EQ(-EINVAL, mock_read(m, i, 0, buf, 4))
				PROMISE("region %u does not exist", i);
			EXPECT_EQ(-EINVAL, mock_write(m, i, 0, buf, 4));
			continue;
		}
		/* Past the end, across the end, and at the largest offset. */
		EXPECT_GE(0, mock_read(m, i, sizes[i], buf, 4))
			PROMISE("region %u ends at its size", i);
		EXPECT_GE(0, mock_write(m, i, sizes[i], buf, 4));
		EXPECT_GE(0, mock_read(m, i, (1ULL << 40) - 8, buf, 4))
			PROMISE("region %u ends at its size", i);
		ret = mock_read(m, i, sizes[i] - 4, buf, 8);
		EXPECT_TRUE(ret == -EINVAL || ret == 4)
			PROMISE("a read across the end of region %u is short or refused: %zd",
				i, ret);
		ret = mock_write(m, i, sizes[i] - 4, buf, 8);
		EXPECT_TRUE(ret == -EINVAL || ret == 4)
			PROMISE("a write across the end of region %u is short or refused: %zd",
				i, ret);
	}
	EXPECT_EQ(-EINVAL, mig_region_info(&m->dev, VFIO_PCI_NUM_REGIONS, &info))
		PROMISE("no region exists after the last one");
	EXPECT_EQ(-EINVAL, mig_region_info(&m->dev, ~0U, &info));
	EXPECT_GE(0, pread(m->dev.fd, buf, 4, 0x7ffffffffffff000ULL));

	info = (struct vfio_region_info){ .argsz = 16, .index = BAR0 };
	EXPECT_ERRNO(EINVAL, ioctl(m->dev.fd, VFIO_DEVICE_GET_REGION_INFO, &info))
		PROMISE("argsz must cover the structure");
}

TEST_F(pci, registers_identify_the_device)
{
	struct mock *m = &self->m;
	unsigned int i;

	expect_fresh(_metadata, m, "on open");
	EXPECT_EQ(m->size, reg64(m, STATE_SIZE));
	EXPECT_EQ(mock_type_size(m), reg64(m, STATE_SIZE));

	/* Read-only registers. */
	put(_metadata, m, BAR0, VFIO_MOCK_REG_STATE_SIZE, ~0ULL, 8);
	for (i = 0; i < ARRAY_SIZE(reset_values); i++) {
		switch (reset_values[i].at) {
		case VFIO_MOCK_REG_SCRATCH:
		case VFIO_MOCK_REG_ADDR:
		case VFIO_MOCK_REG_LEN:
		case VFIO_MOCK_REG_SEED:
		case VFIO_MOCK_REG_IRQ_VECTOR:
			continue;
		}
		put(_metadata, m, BAR0, reset_values[i].at, 0x5555555555555555ULL,
		    reset_values[i].len);
	}
	EXPECT_EQ(m->size, reg64(m, STATE_SIZE))
		PROMISE("STATE_SIZE is read-only");
	expect_fresh(_metadata, m, "after writes to read-only registers");
}

TEST_F(pci, registers_take_any_access)
{
	struct mock *m = &self->m;
	__u64 model[4], value, n = 0;
	__u8 *bytes = (__u8 *)model, block[32];
	unsigned int i, at, len, j;

	/* SCRATCH, ADDR, LEN and SEED are 32 bytes that keep written values. */
	memset(model, 0, sizeof(model));
	for (i = 0; i < 400; i++) {
		at = vfio_mock_mix(++n) % 32;
		len = vfio_mock_mix(++n) % 8 + 1;
		value = vfio_mock_mix(++n);
		if (at + len > 32)
			len = 32 - at;
		put(_metadata, m, BAR0, VFIO_MOCK_REG_SCRATCH + at, value, len);
		memcpy(bytes + at, &value, len);
		ASSERT_EQ(32, mock_read(m, BAR0, VFIO_MOCK_REG_SCRATCH, block, 32))
			PROMISE("a block access works");
		ASSERT_EQ(0, memcmp(block, bytes, 32))
			PROMISE("a write of %u bytes at %u changes only these bytes",
				len, at);
		for (j = 0; j + len <= 32; j += 5) {
			value = get(_metadata, m, BAR0, VFIO_MOCK_REG_SCRATCH + j, len);
			EXPECT_EQ(0, memcmp(&value, bytes + j, len))
				PROMISE("a read of %u bytes at %u equals a part of the whole",
					len, j);
		}
	}
	for (i = 0; i < 32; i++)
		block[i] = 0xa0 + i;
	ASSERT_EQ(32, mock_write(m, BAR0, VFIO_MOCK_REG_SCRATCH, block, 32));
	EXPECT_EQ(0xa7a6a5a4a3a2a1a0ULL, reg64(m, SCRATCH));
	EXPECT_EQ(0xbfbebdbcbbbab9b8ULL, reg64(m, SEED));
	EXPECT_EQ(0, mock_read(m, BAR0, 0, block, 0))
		PROMISE("a read of no bytes returns 0");
	EXPECT_EQ(VFIO_MOCK_REGS_END, (int)mock_read(m, BAR0, 0, m->seen, VFIO_MOCK_REGS_END));
	EXPECT_EQ(VFIO_MOCK_BAR0_SIZE, (int)mock_read(m, BAR0, 0, m->seen, VFIO_MOCK_BAR0_SIZE))
		PROMISE("all of BAR0 can be read");
}

TEST_F(pci, state_memory_takes_any_access)
{
	struct mock *m = &self->m;
	__u64 n = 0, at, len;
	unsigned int i;

	for (i = 0; i < 300; i++) {
		at = vfio_mock_mix(++n) % m->size;
		len = vfio_mock_mix(++n) % (i % 3 ? 8 : 3 * PAGE) + 1;
		if (len > m->size - at)
			len = m->size - at;
		store_noise(_metadata, m, at, len, n);
		ASSERT_EQ((ssize_t)len, mock_read(m, BAR2, at, m->seen, len));
		EXPECT_EQ(0, memcmp(m->seen, m->want + at, len))
			PROMISE("written data is read back (%llu bytes at %#llx)", len, at);
	}
	expect_memory(_metadata, m, m->want, "after writes of any size");
}

/* A buffer ends at an unmapped page: an access fails, a block is written up to there. */
TEST_F(pci, write_from_partial_buffer)
{
	struct mock *m = &self->m;
	__u8 *room, *end;
	__u64 len, had;

	room = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, room);
	end = room + PAGE;
	ASSERT_EQ(0, munmap(end, PAGE));
	memset(room, 0x33, PAGE);
	store_noise(_metadata, m, 0, m->size, 1);
	for (len = 2; len <= 8; len++) {
		for (had = 0; had < len; had++) {
			EXPECT_EQ(-EFAULT, mock_write(m, BAR2, 40, end - had, len))
				PROMISE("an access of %llu bytes fails if only %llu are mapped",
					len, had);
		}
	}
	expect_memory(_metadata, m, m->want, "after failed accesses");
	EXPECT_EQ(100, mock_write(m, BAR2, 5000, end - 100, 300))
		PROMISE("a block is written up to the unmapped page");
	memset(m->want + 5000, 0x33, 100);
	expect_memory(_metadata, m, m->want, "after a partial write of a block");
	EXPECT_EQ(-EFAULT, mock_write(m, BAR2, 5000, end, 300));
	expect_memory(_metadata, m, m->want, "after a failed write of a block");
}

/* A command that is refused with @error and changes nothing. */
static void expect_refused_command(struct __test_metadata *_metadata, struct mock *m,
				   __u32 cmd, __u64 at, __u64 len, int error)
{
	__u64 done = reg64(m, COMPLETIONS);

	command(_metadata, m, cmd, at, len, 1);
	EXPECT_EQ(error, (int)reg32(m, ERROR))
		PROMISE("command %u of [%#llx, +%#llx) is refused with this error",
			cmd, at, len);
	EXPECT_EQ(VFIO_MOCK_STATUS_ERROR, (int)reg32(m, STATUS))
		PROMISE("STATUS reports the refusal of the last command");
	EXPECT_EQ(done, reg64(m, COMPLETIONS))
		PROMISE("a refused command is not completed");
}

TEST_F(pci, doorbell_commands)
{
	struct mock *m = &self->m;
	__u64 n = 0, at, len, done = 0;
	unsigned int i;

	for (i = 0; i < 100; i++) {
		at = vfio_mock_mix(++n) % m->size;
		len = vfio_mock_mix(++n) % (i % 2 ? 20 : m->size - at) + 1;
		if (len > m->size - at)
			len = m->size - at;
		fill(_metadata, m, at, len, n);
		EXPECT_EQ(++done, reg64(m, COMPLETIONS))
			PROMISE("COMPLETIONS is the number of commands");
		EXPECT_EQ(VFIO_MOCK_ERROR_NONE, (int)reg32(m, ERROR));
		command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, at, len, 0);
		EXPECT_EQ(vfio_mock_checksum(m->want + at, len), reg64(m, RESULT))
			PROMISE("RESULT is the checksum of [%#llx, +%#llx)", at, len);
		EXPECT_EQ(++done, reg64(m, COMPLETIONS));
	}
	expect_memory(_metadata, m, m->want, "after FILLs");

	command(_metadata, m, VFIO_MOCK_CMD_REINIT, 0, 0, 99);
	EXPECT_EQ(VFIO_MOCK_STATUS_DONE, (int)reg32(m, STATUS));
	EXPECT_EQ(++done, reg64(m, COMPLETIONS));
	vfio_mock_pattern(m->want, 99, 0, m->size);
	expect_memory(_metadata, m, m->want, "after REINIT");
}

TEST_F(pci, doorbell_refuses_bad_commands)
{
	static const __u32 unknown[] = { 0, 4, 5, 0x100, 0x80000001, ~0U };
	struct mock *m = &self->m;
	unsigned int i;
	__u64 result;

	fill(_metadata, m, 0, m->size, 1);
	command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 0, 8, 0);
	result = reg64(m, RESULT);
	for (i = 0; i < ARRAY_SIZE(unknown); i++)
		expect_refused_command(_metadata, m, unknown[i], 0, 8,
				       VFIO_MOCK_ERROR_COMMAND);
	for (i = VFIO_MOCK_CMD_FILL; i <= VFIO_MOCK_CMD_CHECKSUM; i++) {
		expect_refused_command(_metadata, m, i, 0, 0, VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, 0, m->size + 1,
				       VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, m->size, 1,
				       VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, m->size - 1, 2,
				       VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, ~0ULL, 1,
				       VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, ~0ULL, 2,
				       VFIO_MOCK_ERROR_RANGE);
		expect_refused_command(_metadata, m, i, 1, ~0ULL,
				       VFIO_MOCK_ERROR_RANGE);
	}
	EXPECT_EQ(result, reg64(m, RESULT))
		PROMISE("a refused CHECKSUM does not change RESULT");
	expect_memory(_metadata, m, m->want, "after refused commands");
	fill(_metadata, m, m->size - 1, 1, 2);
	EXPECT_EQ(VFIO_MOCK_ERROR_NONE, (int)reg32(m, ERROR))
		PROMISE("a good command clears the error");
}

TEST_F(pci, doorbell_needs_whole_writes)
{
	struct mock *m = &self->m;
	struct {
		__u64 addr;
		__u64 len;
		__u64 seed;
		__u32 doorbell;
		__u32 vector;
	} block = { 100, 300, 5, VFIO_MOCK_CMD_FILL, 1 };

	set64(m, ADDR, 0);
	set64(m, LEN, 8);
	set64(m, SEED, 3);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL, VFIO_MOCK_CMD_FILL, 1);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL, VFIO_MOCK_CMD_FILL, 2);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL + 2, 0, 2);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL, VFIO_MOCK_CMD_FILL, 3);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL + 1, 0, 4);
	put(_metadata, m, BAR0, VFIO_MOCK_REG_DOORBELL - 2, 0, 4);
	EXPECT_EQ(0U, reg64(m, COMPLETIONS))
		PROMISE("DOORBELL acts only if one access writes all of its 4 bytes");
	EXPECT_EQ(0U, reg32(m, STATUS));
	expect_memory(_metadata, m, m->want, "after partial doorbell writes");

	/* One access that also covers the arguments. */
	ASSERT_EQ((ssize_t)sizeof(block),
		  mock_write(m, BAR0, VFIO_MOCK_REG_ADDR, &block, sizeof(block)));
	vfio_mock_pattern(m->want + 100, 5, 100, 300);
	EXPECT_EQ(1U, reg64(m, COMPLETIONS))
		PROMISE("a block access that covers DOORBELL rings it");
	EXPECT_EQ(1U, reg32(m, IRQ_VECTOR));
	expect_memory(_metadata, m, m->want, "after a block write of a command");
}

/* ---- Config space ---- */

TEST_F(pci, config_space_identifies_the_device)
{
	struct mock *m = &self->m;
	__u64 cap;

	EXPECT_EQ((__u64)VFIO_MOCK_VENDOR_ID, get(_metadata, m, CONFIG, 0x00, 2));
	EXPECT_EQ((__u64)VFIO_MOCK_DEVICE_ID, get(_metadata, m, CONFIG, 0x02, 2));
	EXPECT_EQ((__u64)VFIO_MOCK_CLASS, get(_metadata, m, CONFIG, 0x09, 3));
	EXPECT_EQ(0U, get(_metadata, m, CONFIG, 0x0e, 1) & 0x7f)
		PROMISE("a type 0 header");
	EXPECT_EQ((__u64)VFIO_MOCK_VENDOR_ID, get(_metadata, m, CONFIG, 0x2c, 2));
	EXPECT_EQ((__u64)VFIO_MOCK_DEVICE_ID, get(_metadata, m, CONFIG, 0x2e, 2));
	EXPECT_EQ(0U, get(_metadata, m, CONFIG, 0x3d, 1))
		PROMISE("no INTx: interrupt pin 0");

	EXPECT_EQ(0x10U, get(_metadata, m, CONFIG, 0x06, 2) & 0x10)
		PROMISE("status announces the capability list");
	cap = get(_metadata, m, CONFIG, 0x34, 1);
	EXPECT_EQ((__u64)VFIO_MOCK_MSIX_CAP, cap);
	EXPECT_EQ(0x11U, get(_metadata, m, CONFIG, cap, 1))
		PROMISE("the capability is MSI-X");
	EXPECT_EQ(mock_has_iommu(m) ? 0x50U : 0U, get(_metadata, m, CONFIG, cap + 1, 1))
		PROMISE("the list ends, or continues with those of a PCI function");
	EXPECT_EQ(VFIO_MOCK_MSIX_VECTORS - 1U, get(_metadata, m, CONFIG, cap + 2, 2) & 0x7ff);
	EXPECT_EQ((__u64)VFIO_MOCK_MSIX_TABLE, get(_metadata, m, CONFIG, cap + 4, 4));
	EXPECT_EQ((__u64)VFIO_MOCK_MSIX_PBA, get(_metadata, m, CONFIG, cap + 8, 4));
}

TEST_F(pci, config_space_sizes_its_bars)
{
	/* Size of the BAR at each register, and its type bits. */
	const struct {
		__u64 size;
		__u32 bits;
	} bars[6] = {
		{ VFIO_MOCK_BAR0_SIZE, 0x4 }, {}, { self->m.size, 0xc }, {}, {}, {},
	};
	struct mock *m = &self->m;
	__u64 sizing;
	int i;

	for (i = 0; i < 6; i++) {
		if (!bars[i].size) {
			/* The upper half of the last 64-bit BAR, or no BAR. */
			if (i && bars[i - 1].size)
				continue;
			put(_metadata, m, CONFIG, 0x10 + 4 * i, ~0U, 4);
			EXPECT_EQ(0U, get(_metadata, m, CONFIG, 0x10 + 4 * i, 4))
				PROMISE("BAR%d does not exist", i);
			continue;
		}
		EXPECT_EQ(bars[i].bits, get(_metadata, m, CONFIG, 0x10 + 4 * i, 4) & 0xf)
			PROMISE("BAR%d is a 64-bit memory BAR", i);
		put(_metadata, m, CONFIG, 0x10 + 4 * i, ~0U, 4);
		put(_metadata, m, CONFIG, 0x14 + 4 * i, ~0U, 4);
		sizing = get(_metadata, m, CONFIG, 0x10 + 4 * i, 4) |
			 get(_metadata, m, CONFIG, 0x14 + 4 * i, 4) << 32;
		EXPECT_EQ(~(bars[i].size - 1) | bars[i].bits, sizing)
			PROMISE("BAR%d returns its size after a write of all ones", i);
		put(_metadata, m, CONFIG, 0x10 + 4 * i, 0xabcdef00ff000000ULL, 8);
		EXPECT_EQ((0xabcdef00ff000000ULL & ~(bars[i].size - 1)) | bars[i].bits,
			  get(_metadata, m, CONFIG, 0x10 + 4 * i, 8))
			PROMISE("BAR%d keeps its address", i);
	}
	put(_metadata, m, CONFIG, 0x30, ~0U, 4);
	EXPECT_EQ(0U, get(_metadata, m, CONFIG, 0x30, 4))
		PROMISE("no expansion ROM exists");
}

TEST_F(pci, config_space_takes_any_access)
{
	struct mock *m = &self->m;
	__u8 before[256], now[256], part[8], ones[256];
	unsigned int at, len;

	ASSERT_EQ(256, mock_read(m, CONFIG, 0, before, 256))
		PROMISE("one access reads the whole config space");
	for (len = 1; len <= 8; len++) {
		for (at = 0; at + len <= 256; at++) {
			ASSERT_EQ((ssize_t)len, mock_read(m, CONFIG, at, part, len));
			EXPECT_EQ(0, memcmp(part, before + at, len))
				PROMISE("%u bytes at %#x equal a part of the whole", len, at);
		}
	}

	/* Fields that are read-only in any PCI function. */
	memset(ones, 0xff, sizeof(ones));
	ASSERT_EQ(256, mock_write(m, CONFIG, 0, ones, 256));
	ASSERT_EQ(256, mock_read(m, CONFIG, 0, now, 256));
	EXPECT_EQ(0, memcmp(before, now, 4))
		PROMISE("vendor and device id are read-only");
	EXPECT_EQ(0, memcmp(before + 6, now + 6, 6))
		PROMISE("status, revision and class are read-only");
	EXPECT_EQ(before[0x0e], now[0x0e])
		PROMISE("the header type is read-only");
	EXPECT_EQ(0, memcmp(before + 0x2c, now + 0x2c, 4))
		PROMISE("subsystem ids are read-only");
	EXPECT_EQ(before[0x34], now[0x34])
		PROMISE("the capability pointer is read-only");
	EXPECT_EQ(before[0x3d], now[0x3d])
		PROMISE("the interrupt pin is read-only");
	EXPECT_EQ(0, memcmp(before + 0x40, now + 0x40, 3))
		PROMISE("id, next and table size of the MSI-X capability are read-only");
	EXPECT_EQ(0, memcmp(before + 0x44, now + 0x44, 8))
		PROMISE("the offsets of MSI-X table and PBA are read-only");

	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(6U, get(_metadata, m, CONFIG, 4, 2) & 7)
		PROMISE("memory space and bus master can be enabled");
	put(_metadata, m, CONFIG, 4, 0, 1);
	EXPECT_EQ(0U, get(_metadata, m, CONFIG, 4, 2) & 7)
		PROMISE("a byte access to the command register works");
}

/* ---- The command register ---- */

/* BARs without memory space behave like in vfio-pci. */
TEST_F(pci, bars_need_memory_space)
{
	struct mock *m = &self->m;
	__u64 value = 1;

	ASSERT_EQ(0, ioctl(m->dev.fd, VFIO_DEVICE_RESET));
	EXPECT_EQ(2U, get(_metadata, m, CONFIG, 4, 2))
		PROMISE("a reset enables memory space and disables bus mastering");
	set64(m, SCRATCH, 0x1234);
	put(_metadata, m, CONFIG, 4, 0, 2);
	EXPECT_EQ(-EIO, mock_read(m, BAR0, 0, &value, 8))
		PROMISE("without memory space a read of BAR0 fails");
	EXPECT_EQ(-EIO, mock_read(m, BAR2, 0, m->seen, m->size));
	EXPECT_EQ(-EIO, mock_write(m, BAR0, VFIO_MOCK_REG_SCRATCH, &value, 8))
		PROMISE("without memory space a write to BAR0 fails");
	EXPECT_EQ(-EIO, mock_write(m, BAR0, VFIO_MOCK_MSIX_TABLE, &value, 8));
	EXPECT_EQ(-EIO, mock_write(m, BAR2, 0, &value, 8));
	/* The same in any migration state. */
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	EXPECT_EQ(-EIO, mock_write(m, BAR2, 0, &value, 8));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
	EXPECT_EQ(0U, get(_metadata, m, CONFIG, 4, 2))
		PROMISE("states do not change the command register");
	put(_metadata, m, CONFIG, 4, 2, 1);
	EXPECT_EQ(0x1234U, reg64(m, SCRATCH))
		PROMISE("a write without memory space does not reach the device");
	EXPECT_EQ(0U, get(_metadata, m, BAR0, VFIO_MOCK_MSIX_TABLE, 8));
	expect_zero_memory(_metadata, m, "after writes without memory space");
	EXPECT_EQ(0U, reg64(m, DROPPED));

	/* A reset clears the device state even without memory space. */
	put(_metadata, m, CONFIG, 4, 0, 2);
	ASSERT_EQ(0, ioctl(m->dev.fd, VFIO_DEVICE_RESET));
	EXPECT_EQ(0U, reg64(m, SCRATCH))
		PROMISE("a reset enables memory space");
}

/* Writes at the time of QEMU and Cloud Hypervisor, and at other times. */
TEST_F(mock, only_vmm_restores_config_space)
{
	struct mock *src = &self->src, *dst = &self->dst;
	struct mig_stream image = {};
	unsigned int when;
	int fd;

	populate(_metadata, src, 90);
	put(_metadata, src, CONFIG, 4, 0x400, 2);
	take_image(_metadata, &src->dev, &image);
	for (when = 0; when < 4; when++) {
		ASSERT_EQ(0, mig_reset(&dst->dev));
		if (when == 0)
			put(_metadata, dst, CONFIG, 4, 0x106, 2);
		fd = go(_metadata, &dst->dev, MIG_RESUMING);
		if (when == 1)
			put(_metadata, dst, CONFIG, 4, 0x106, 2);
		load_all(_metadata, fd, &image);
		/* The time of QEMU and Cloud Hypervisor. */
		if (when == 2)
			put(_metadata, dst, CONFIG, 4, 0x106, 2);
		ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_STOP, NULL));
		if (when == 3)
			put(_metadata, dst, CONFIG, 4, 0x106, 2);
		move_on(_metadata, &dst->dev, MIG_RUNNING);
		close(fd);
		EXPECT_EQ(0x106U, get(_metadata, dst, CONFIG, 4, 2))
			PROMISE("the command register written by the VMM (case %u) stays", when);
		EXPECT_EQ(0U, get(_metadata, dst, CONFIG, 0x10, 8) >> 4)
			PROMISE("config space that the VMM does not restore is not in the stream");
	}
	mig_stream_free(&image);
}

/* ---- DMA logging, stricter than required by the uAPI ---- */

TEST_F(pci, dma_logging_refuses_bad_page_sizes)
{
	const struct vfio_device_feature_dma_logging_range nothing = {},
		range = { .length = 256 * PAGE };
	const __u64 sizes[] = { 1, 3, PAGE - 1, 3 * PAGE };
	__u64 size = 0, bitmap[4] = {};
	struct mock *m = &self->m;
	unsigned int i;

	NEED_IOMMUFD_FOR_LOG();
	EXPECT_EQ(-EINVAL, mig_log_start(&m->dev, &size, &nothing, 1))
		PROMISE("page_size 0 is refused");
	for (i = 1; i < ARRAY_SIZE(sizes); i++) {
		size = sizes[i];
		EXPECT_EQ(-EINVAL, mig_log_start(&m->dev, &size, &range, 1))
			PROMISE("page_size %llu is refused", sizes[i]);
	}
	EXPECT_EQ(-EINVAL, mig_log_report(&m->dev, 0, range.length, PAGE, bitmap))
		PROMISE("logging was not started");
	size = PAGE;
	ASSERT_EQ(0, mig_log_start(&m->dev, &size, &range, 1));
	EXPECT_EQ(-EINVAL, mig_log_start(&m->dev, &size, &range, 1))
		PROMISE("another START is refused until STOP");
	fill(_metadata, m, 0, m->size, 1);
	ASSERT_EQ(0, mig_log_report(&m->dev, 0, range.length, PAGE, bitmap));
	EXPECT_EQ(0U, bitmap[0] | bitmap[1] | bitmap[2] | bitmap[3])
		PROMISE("a device that does no DMA reports no dirty pages");
	EXPECT_EQ(0, mig_log_stop(&m->dev));
}

#include "draft/mock.c"

MIG_HARNESS_MAIN(mock_options)
