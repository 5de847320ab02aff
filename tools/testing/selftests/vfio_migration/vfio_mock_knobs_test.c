// SPDX-License-Identifier: GPL-2.0
/*
 * The knobs of vfio_mock: settings on the host with which it misbehaves.
 *
 *	./vfio_mock_knobs_test --small "SOURCE TARGET"
 */
#include "mock.h"

#define SECOND	1000000000ULL
/* Header and offset of a record of pages. */
#define RUN	24

/* The knobs, with the values that they do not take. */
static const struct {
	const char *name;
	const char *off;
	const char *good;
	const char *bad[8];
} knobs[] = {
	{ "save_delay_us", "0", "7", { "-1", "x", "4294967296", "1 2" } },
	{ "dirty_rate", "0", "17179869184", { "-1", "17179869185", "1M" } },
	{ "dirty_span", "0", "4096", { "-1", "65537", "all" } },
	{ "dirty_pattern", "sequential", "hot", { "ho", "hott", "HOT", "0", "random hot" } },
};

FIXTURE(knobs)
{
	struct mock src, dst;
	struct mig_stream image;
};

#define knobs_data	FIXTURE_DATA(knobs)

MIG_EACH_BACKEND(knobs);

FIXTURE_SETUP(knobs)
{
	self->src.dev.fd = -1;
	self->dst.dev.fd = -1;
	MOCK_OPEN_OR_SKIP(&self->src, "small", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "small", 1, variant->backend);
}

FIXTURE_TEARDOWN(knobs)
{
	unsigned int i;

	for (i = 0; self->src.path[0] && i < ARRAY_SIZE(knobs); i++)
		mock_set(&self->src, knobs[i].name, knobs[i].off);
	mig_stream_free(&self->image);
	mock_close(&self->src);
	mock_close(&self->dst);
}

/* Reads a knob without its newline. */
static const char *knob(struct __test_metadata *_metadata, const struct mock *m,
			const char *name)
{
	static char value[4096];
	char path[PATH_MAX + 32];
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), "%s/knobs/%s", m->path, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd)
		STEP("open %s", path);
	ret = read(fd, value, sizeof(value) - 1);
	close(fd);
	ASSERT_LT(0, ret)
		STEP("read %s", path);
	ASSERT_EQ('\n', value[ret - 1]);
	value[ret - 1] = 0;
	return value;
}

static __u64 number(struct __test_metadata *_metadata, const struct mock *m,
		    const char *name)
{
	return strtoull(knob(_metadata, m, name), NULL, 10);
}

static __u64 now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

/* Enters PRE_COPY, and reads to the temporary end. Returns the size of the rest. */
static __u64 begin(struct __test_metadata *_metadata, knobs_data *self, int *fd)
{
	__u64 tail;

	*fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(*fd, &self->image, stream_limit(&self->src.dev)));
	ASSERT_EQ(0, mig_data_size(&self->src.dev, &tail));
	return tail;
}

static __u64 dirty_bytes(struct __test_metadata *_metadata, int fd)
{
	struct vfio_precopy_info info;

	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes);
	return info.dirty_bytes;
}

TEST_F(knobs, bad_values_change_nothing)
{
	unsigned int i, j;

	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		EXPECT_STREQ(knobs[i].off, knob(_metadata, &self->src, knobs[i].name))
			PROMISE("%s is off by default", knobs[i].name);
		ASSERT_EQ(0, mock_set(&self->src, knobs[i].name, knobs[i].good));
		for (j = 0; knobs[i].bad[j]; j++) {
			EXPECT_EQ(-EINVAL, mock_set(&self->src, knobs[i].name, knobs[i].bad[j]))
				PROMISE("%s refuses '%s'", knobs[i].name, knobs[i].bad[j]);
			EXPECT_STREQ(knobs[i].good, knob(_metadata, &self->src, knobs[i].name));
		}
	}
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	mig_close_device(&self->src.dev);
	ASSERT_EQ(0, mig_reopen_device(&self->src.dev));
	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		EXPECT_STREQ(knobs[i].good, knob(_metadata, &self->src, knobs[i].name))
			PROMISE("%s is kept when the device is reset and closed", knobs[i].name);
		EXPECT_STREQ(knobs[i].off, knob(_metadata, &self->dst, knobs[i].name))
			PROMISE("%s of another device is unchanged", knobs[i].name);
	}
}

/* The bytes dirtied until a time are rate * time, and at most a page more. */
TEST_F(knobs, load_has_its_rate)
{
	static const __u64 rates[] = { 1 << 20, 12345678, 17179869184 };
	__u64 before, after, from, to, start, dirtied;
	unsigned int i, looks;
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	begin(_metadata, self, &fd);
	for (i = 0; i < ARRAY_SIZE(rates); i++) {
		set_knob(_metadata, &self->src, "dirty_rate", 0);
		dirty_bytes(_metadata, fd);
		start = number(_metadata, &self->src, "dirtied");
		before = now();
		set_knob(_metadata, &self->src, "dirty_rate", rates[i]);
		after = now();
		for (looks = 0; looks < 10; looks++) {
			usleep(1000 << looks % 8);
			from = now();
			dirty_bytes(_metadata, fd);
			to = now();
			dirtied = number(_metadata, &self->src, "dirtied") - start;
			EXPECT_LE((double)rates[i] * (from - after) / SECOND, dirtied)
				PROMISE("after %llu ns, %llu bytes are too few",
					from - after, dirtied);
			EXPECT_GE((double)rates[i] * (to - before) / SECOND + PAGE, dirtied)
				PROMISE("after %llu ns, %llu bytes are too many",
					to - before, dirtied);
		}
	}
	close(fd);
}

TEST_F(knobs, load_dirties_only_its_span)
{
	static const char *const patterns[] = { "sequential", "random", "hot" };
	const __u64 pages = 5;
	struct mock_front front;
	struct mock *src = &self->src;
	__u64 tail, start, dirtied;
	unsigned int i;
	int fd, other;

	NEED_PRE_COPY(&src->dev);
	tail = begin(_metadata, self, &fd);
	other = go(_metadata, &self->dst.dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(other, &self->image, stream_limit(&src->dev)));
	self->image.len = 0;
	for (i = 0; i < ARRAY_SIZE(patterns); i++) {
		ASSERT_EQ(0, mock_set(src, "dirty_pattern", patterns[i]));
		set_knob(_metadata, src, "dirty_span", pages * PAGE);
		start = number(_metadata, src, "dirtied");
		/* The second page is due after more than an hour. */
		set_knob(_metadata, src, "dirty_rate", 1);
		EXPECT_EQ(RUN + PAGE + tail, dirty_bytes(_metadata, fd))
			PROMISE("a new rate dirties a page at once");
		EXPECT_EQ(PAGE, number(_metadata, src, "dirtied") - start);
		set_knob(_metadata, src, "dirty_rate", 1 << 20);
		do
			dirty_bytes(_metadata, fd);
		while (number(_metadata, src, "dirtied") - start < 3 * pages * PAGE);
		set_knob(_metadata, src, "dirty_rate", 0);
		dirtied = (dirty_bytes(_metadata, fd) - tail) / PAGE;
		EXPECT_GE(pages, dirtied)
			PROMISE("%s: %llu pages are dirty in a span of %llu", patterns[i],
				dirtied, pages);
		if (!i)
			EXPECT_EQ(pages, dirtied);
		EXPECT_EQ(0U, dirty_bytes(_metadata, other))
			PROMISE("the load of a device does not touch another");
		self->image.len = 0;
		ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&src->dev)));
	}
	close(other);
	close(fd);

	/* The guest's data arrives, whatever the load does. */
	set_knob(_metadata, src, "dirty_rate", 1 << 30);
	self->image.len = 0;
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	populate(_metadata, src, 1);
	for (i = 0; i < 100; i++)
		ASSERT_LT(0, mig_read(fd, &self->image, PAGE));
	read_front(_metadata, src, &front);
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	close(fd);
	load_and_compare(_metadata, &self->dst, &self->image, 0, src->want, &front);
}

/* Without bus mastering too, as before the guest has a driver. */
TEST_F(knobs, load_wakes_poller)
{
	struct mock *src = &self->src;
	struct poller poller;
	int fd, i;

	NEED_PRE_COPY(&src->dev);
	put(_metadata, src, CONFIG, 0x04, 0, 2);
	begin(_metadata, self, &fd);
	poller_start(_metadata, &poller, fd);
	EXPECT_FALSE(atomic_load(&poller.done));
	/* 20 pages per second. */
	set_knob(_metadata, src, "dirty_rate", 20 * PAGE);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
			PROMISE("a page of the load wakes a poller");
		EXPECT_LT(0, mig_read(fd, &self->image, PAGE))
			PROMISE("read() returns data after poll()");
		ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&src->dev)));
		poller_start(_metadata, &poller, fd);
	}
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN);
	close(fd);
}

TEST_F(knobs, load_ends_with_pre_copy)
{
	struct mock *src = &self->src;
	__u64 size, later, dirtied;
	int fd;

	NEED_PRE_COPY(&src->dev);
	begin(_metadata, self, &fd);
	set_knob(_metadata, src, "dirty_rate", 1 << 20);
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	dirtied = number(_metadata, src, "dirtied");
	EXPECT_LT(0U, dirtied)
		PROMISE("pages until the device stops are dirty");
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	usleep(20000);
	ASSERT_EQ(0, mig_data_size(&src->dev, &later));
	EXPECT_EQ(size, later);
	EXPECT_EQ(dirtied, number(_metadata, src, "dirtied"))
		PROMISE("a stopped device dirties nothing");
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	close(fd);

	/* The time between sessions does not count. */
	go_home(_metadata, &src->dev);
	set_knob(_metadata, src, "dirty_rate", 1);
	usleep(20000);
	dirtied = number(_metadata, src, "dirtied");
	begin(_metadata, self, &fd);
	EXPECT_EQ(PAGE, number(_metadata, src, "dirtied") - dirtied);
	close(fd);
}

MIG_HARNESS_MAIN(mock_options)
