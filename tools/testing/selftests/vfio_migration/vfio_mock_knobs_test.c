// SPDX-License-Identifier: GPL-2.0
/*
 * The knobs of vfio_mock: settings on the host with which it misbehaves.
 *
 *	./vfio_mock_knobs_test --small "SOURCE TARGET"
 */
#include <signal.h>
#include <sys/wait.h>

#include "mock_dma.h"

#define SECOND	1000000000ULL
/* Header and offset of a record of pages. */
#define RUN	24
/* Size of the last record. */
#define TRAILER	48

/* The knobs, with the values that they do not take. */
static const struct {
	const char *name;
	const char *off;
	const char *good;
	const char *bad[8];
} knobs[] = {
	{ "save_delay_us", "0", "7", { "-1", "x", "4294967296", "1 2" } },
	{ "save_rate", "0", "18446744073709551615", { "-1", "18446744073709551616", "1M" } },
	{ "load_delay_us", "0", "7", { "-1", "x", "4294967296", "1 2" } },
	{ "load_rate", "0", "5", { "-1", "18446744073709551616" } },
	{ "dirty_rate", "0", "17179869184", { "-1", "17179869185", "1M" } },
	{ "dirty_span", "0", "4096", { "-1", "65537", "all" } },
	{ "initial_bytes", "exact", "150%", { "-1", "exactly", "1M", "%", "4294967296%" } },
	{ "dirty_bytes", "exact", "18446744073709551615", { "18446744073709551616" } },
	{ "tail_bytes", "exact", "0", { "0x10" } },
	{ "faults", "off",
	  "arc STOP_COPY->STOP nth=2 times=-1 errno=ENOSPC; read after=7 errno=EIO",
	  { "on", "arc STOP_COPY", "arc STOP->GONE", "read delay_us=5", "read nth=0",
	    "read errno=5", "read; read; read; read; read" } },
	{ "stream_version", "1", "4294967295", { "-1", "4294967296", "v2" } },
	{ "stream_features", "0", "18446744073709551615", { "-1", "18446744073709551616" } },
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

	for (i = 0; self->dst.path[0] && i < ARRAY_SIZE(knobs); i++) {
		mock_set(&self->src, knobs[i].name, knobs[i].off);
		mock_set(&self->dst, knobs[i].name, knobs[i].off);
	}
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

/* ---- Numbers ---- */

TEST_F(knobs, told_sizes_replace_exact_ones)
{
	struct mock *src = &self->src;
	struct vfio_precopy_info info;
	__u64 tail, total, size;
	int fd;

	ASSERT_EQ(0, mig_data_size(&src->dev, &total));
	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mock_set(src, "initial_bytes", "9223372036854775808"));
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_LE(1ULL << 63, info.initial_bytes);
	EXPECT_GE((1ULL << 63) + total, info.initial_bytes);
	ASSERT_EQ(0, mock_set(src, "initial_bytes", "exact"));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(total, info.initial_bytes);
	close(fd);

	tail = begin(_metadata, self, &fd);
	ASSERT_EQ(0, mock_set(src, "dirty_bytes", "12345"));
	EXPECT_EQ(12345 + tail, dirty_bytes(_metadata, fd))
		PROMISE("the device never converges");
	EXPECT_EQ(-ENOMSG, mig_read(fd, &self->image, 1));
	ASSERT_EQ(0, mock_set(src, "dirty_bytes", "0"));
	store_noise(_metadata, src, 0, 1, 1);
	EXPECT_EQ(0U, dirty_bytes(_metadata, fd))
		PROMISE("the device denies a dirty page");
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0));
	ASSERT_EQ(0, mock_set(src, "dirty_bytes", "300%"));
	EXPECT_EQ(3 * (RUN + PAGE) + tail, dirty_bytes(_metadata, fd));
	self->image.len = 0;
	ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&src->dev)));
	EXPECT_EQ(RUN + PAGE, self->image.len)
		PROMISE("the stream is right whatever the device tells");
	ASSERT_EQ(0, mock_set(src, "tail_bytes", "200%"));
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	EXPECT_EQ(2 * tail, size);
	close(fd);

	/* Without a session. */
	go_home(_metadata, &src->dev);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	EXPECT_EQ(total + tail, size);
	ASSERT_EQ(0, mock_set(src, "initial_bytes", "10%"));
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	EXPECT_EQ((total - tail) / 10 + 2 * tail, size);
}

TEST_F(knobs, reinit_on_command)
{
	struct mock *src = &self->src;
	struct vfio_precopy_info info;
	struct mock_front front;
	struct poller poller;
	__u64 initial;
	int fd;

	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mig_opt_in_v2(&src->dev));
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	populate(_metadata, src, 1);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&src->dev)));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.flags & VFIO_PRECOPY_INFO_REINIT);
	poller_start(_metadata, &poller, fd);
	set_knob(_metadata, src, "reinit", 1);
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("the new initial data wakes a poller");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ((__u32)VFIO_PRECOPY_INFO_REINIT, info.flags);
	initial = info.initial_bytes;
	EXPECT_LT(src->size, initial);
	EXPECT_EQ(0U, info.dirty_bytes);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&src->dev)));

	/* At the last moment. */
	set_knob(_metadata, src, "reinit", 1);
	read_front(_metadata, src, &front);
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_data_size(&src->dev, &initial));
	EXPECT_LT(src->size, initial)
		PROMISE("all of the state is to be streamed again");
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	close(fd);
	load_and_compare(_metadata, &self->dst, &self->image, 0, src->want, &front);

	/* Without a session, nothing. */
	go_home(_metadata, &src->dev);
	set_knob(_metadata, src, "reinit", 1);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.flags & VFIO_PRECOPY_INFO_REINIT);
	close(fd);
}

/* The device begins again at a byte of the stream, and when the client stops it. */
TEST_F(knobs, reinit_at_a_chosen_moment)
{
	struct mock *src = &self->src;
	struct vfio_precopy_info info;
	struct mock_front front;
	__u64 reinits, size;
	int fd;

	NEED_PRE_COPY(&src->dev);
	ASSERT_EQ(0, mig_opt_in_v2(&src->dev));
	populate(_metadata, src, 1);
	reinits = number(_metadata, src, "reinit");
	ASSERT_EQ(0, mock_set(src, "faults", "read after=1 reinit=1; arc PRE_COPY->* reinit=1"));
	begin(_metadata, self, &fd);
	EXPECT_LT(2 * src->size, self->image.len)
		PROMISE("all of the memory is streamed again");
	EXPECT_EQ(reinits + 1, number(_metadata, src, "reinit"));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes);
	read_front(_metadata, src, &front);
	if (src->dev.flags & VFIO_MIGRATION_P2P) {
		move_on(_metadata, &src->dev, MIG_PRE_COPY_P2P);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_EQ((__u32)VFIO_PRECOPY_INFO_REINIT, info.flags);
		EXPECT_LT(src->size, info.initial_bytes);
	}
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_data_size(&src->dev, &size));
	EXPECT_LT(src->size, size)
		PROMISE("all of the state is to be streamed again");
	EXPECT_EQ(reinits + 2, number(_metadata, src, "reinit"));
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	close(fd);
	load_and_compare(_metadata, &self->dst, &self->image, 0, src->want, &front);
}

/* ---- Pace ---- */

/* A thread that reads or writes once. */
struct mover {
	struct poller poller;
	struct mig_stream image;
	bool write;
	ssize_t ret;
};

static void *mover_main(void *arg)
{
	struct mover *m = arg;

	atomic_store(&m->poller.tid, gettid());
	if (m->write)
		m->ret = write(m->poller.fd, m->image.data, m->image.len);
	else
		m->ret = mig_read(m->poller.fd, &m->image, 1);
	atomic_store(&m->poller.done, true);
	return NULL;
}

/*
 * A stream takes at least the time of its bytes, except for the last record and for
 * 10 ms that a late client can catch up with.
 */
TEST_F(knobs, saving_has_a_bandwidth)
{
	const struct mock *src = &self->src;
	const __u64 rate = 1 << 20;
	struct mover m = {};
	__u64 start, time, total;
	int fd;

	set_knob(_metadata, src, "save_rate", rate);
	fd = go(_metadata, &src->dev, MIG_STOP_COPY);
	start = now();
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	time = now() - start + 10000000;
	close(fd);
	EXPECT_LE(src->size * SECOND / rate, time)
		PROMISE("%zu bytes took only %llu ns", self->image.len, time);

	/* The trailer, after the registers, would take a long time. */
	set_knob(_metadata, src, "save_rate", 0);
	m.poller.fd = go(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_data_size(&src->dev, &total));
	self->image.len = 0;
	ASSERT_EQ(100, mig_read(m.poller.fd, &self->image, 100));
	set_knob(_metadata, src, "save_rate", 1);
	while (self->image.len < total - TRAILER)
		ASSERT_LT(0, mig_read(m.poller.fd, &self->image,
				      total - TRAILER - self->image.len));
	ASSERT_EQ(0, pthread_create(&m.poller.thread, NULL, mover_main, &m));
	wait_until_asleep(&m.poller);
	EXPECT_FALSE(atomic_load(&m.poller.done))
		PROMISE("the record is not ready");
	EXPECT_EQ(0, mig_poll(m.poller.fd, POLLIN, 0));
	set_knob(_metadata, src, "save_rate", 0);
	ASSERT_TRUE(joined(m.poller.thread))
		PROMISE("a higher rate ends the wait");
	EXPECT_EQ(1, m.ret);
	close(m.poller.fd);
	mig_stream_free(&m.image);
}

TEST_F(knobs, loading_has_a_bandwidth)
{
	const struct mock *dst = &self->dst;
	const __u64 rate = 1 << 20;
	size_t len, done;
	__u64 start, time;
	int fd;

	take_image(_metadata, &self->src.dev, &self->image);
	len = self->image.len - PAGE;
	set_knob(_metadata, dst, "load_rate", rate);
	fd = go(_metadata, &dst->dev, MIG_RESUMING);
	start = now();
	ASSERT_EQ(0, mig_load(fd, self->image.data, self->image.len, PAGE, &done));
	time = now() - start + 10000000;
	close(fd);
	EXPECT_LE(len * SECOND / rate, time)
		PROMISE("%zu bytes took only %llu ns", self->image.len, time);
	EXPECT_EQ(0, mig_set_state(&dst->dev, MIG_RUNNING, NULL));
}

TEST_F(knobs, slow_loader_goes_on_on_command)
{
	static const char *const slow[][2] = {
		{ "load_rate", "1" }, { "load_delay_us", "4294967295" },
	};
	const struct mock *dst = &self->dst;
	unsigned int i;

	take_image(_metadata, &self->src.dev, &self->image);
	for (i = 0; i < ARRAY_SIZE(slow); i++) {
		struct mover m = { .write = true };
		size_t taken;

		m.poller.fd = go(_metadata, &dst->dev, MIG_RESUMING);
		ASSERT_EQ(0, mock_set(dst, slow[i][0], slow[i][1]));
		ASSERT_EQ(0, mig_stream_copy(&m.image, &self->image));
		/* Ready once, and then not for more than an hour. */
		EXPECT_EQ(POLLOUT, mig_poll(m.poller.fd, POLLOUT, 0));
		taken = write(m.poller.fd, m.image.data, PAGE);
		EXPECT_EQ(PAGE, taken);
		memmove(m.image.data, m.image.data + taken, m.image.len - taken);
		m.image.len -= taken;
		EXPECT_EQ(0, mig_poll(m.poller.fd, POLLOUT, 0))
			PROMISE("with %s, the data_fd is not writable", slow[i][0]);
		ASSERT_EQ(0, pthread_create(&m.poller.thread, NULL, mover_main, &m));
		wait_until_asleep(&m.poller);
		EXPECT_FALSE(atomic_load(&m.poller.done))
			PROMISE("with %s, write() waits", slow[i][0]);
		ASSERT_EQ(0, mock_set(dst, slow[i][0], "0"));
		ASSERT_TRUE(joined(m.poller.thread))
			PROMISE("%s 0 ends the wait", slow[i][0]);
		EXPECT_LT(0, m.ret);
		ASSERT_EQ(0, mig_load(m.poller.fd, m.image.data + m.ret, m.image.len - m.ret,
				      0, NULL));
		move_on(_metadata, &dst->dev, MIG_RUNNING);
		close(m.poller.fd);
		mig_stream_free(&m.image);
	}
}

/* ---- Faults ---- */

static void set_faults(struct __test_metadata *_metadata, const struct mock *m,
		       const char *rules)
{
	ASSERT_EQ(0, mock_set(m, "faults", rules))
		STEP("set faults of %s to %s", m->path, rules);
}

/* Expects that SET_STATE fails with @errno and leaves the device in @from. */
static void expect_failure(struct __test_metadata *_metadata, const struct mock *m,
			   __u32 from, __u32 to, int errnum)
{
	int fd;

	EXPECT_EQ(-errnum, mig_set_state(&m->dev, to, &fd))
		PROMISE("SET_STATE from %s to %s fails with the errno of the rule",
			mig_state_name(from), mig_state_name(to));
	EXPECT_EQ(-1, fd);
	expect_state(_metadata, &m->dev, from, "after the failure");
}

TEST_F(knobs, each_arc_fails_once)
{
	const struct mock *src = &self->src;
	__u32 from, to, path[MIG_STATE_NR];
	__u64 faulted = number(_metadata, src, "faulted");
	unsigned int arcs = 0;
	char rule[80];
	bool new_fd;
	int fd;

	for (from = 0; from < MIG_STATE_NR; from++) {
		for (to = 0; to < MIG_STATE_NR; to++) {
			if (from == to ||
			    !mig_fsm_exists(src->dev.flags, from) ||
			    !mig_fsm_exists(src->dev.flags, to) ||
			    from == MIG_ERROR || to == MIG_ERROR ||
			    !mig_fsm_move(src->dev.flags, from, to, &new_fd, path) ||
			    path[0] != to)
				continue;
			/* An empty image is refused. */
			if (from == MIG_RESUMING)
				continue;
			fd = go(_metadata, &src->dev, from);
			snprintf(rule, sizeof(rule), "arc %s->%s errno=ETIMEDOUT",
				 mig_state_name(from), mig_state_name(to));
			set_faults(_metadata, src, rule);
			expect_failure(_metadata, src, from, to, ETIMEDOUT);
			EXPECT_EQ(0, mig_set_state(&src->dev, to, NULL))
				PROMISE("%s -> %s works again", mig_state_name(from),
					mig_state_name(to));
			arcs++;
			if (fd >= 0)
				close(fd);
		}
	}
	EXPECT_EQ(faulted + arcs, number(_metadata, src, "faulted"));
	EXPECT_LT(4U, arcs);
}

TEST_F(knobs, nth_arc_fails_some_times)
{
	const struct mock *src = &self->src;
	int i;

	set_faults(_metadata, src, "arc *->RUNNING nth=2 times=3 errno=ENOMEM");
	set_faults(_metadata, &self->dst, "off");
	for (i = 1; i < 7; i++) {
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP, NULL));
		EXPECT_EQ(i >= 2 && i < 5 ? -ENOMEM : 0,
			  mig_set_state(&src->dev, MIG_RUNNING, NULL))
			PROMISE("attempt %d", i);
		ASSERT_EQ(0, mig_set_state(&self->dst.dev, MIG_STOP, NULL));
		EXPECT_EQ(0, mig_set_state(&self->dst.dev, MIG_RUNNING, NULL));
	}
}

TEST_F(knobs, arc_breaks_device)
{
	static const char *const rules[] = {
		"arc *->STOP state=ERROR errno=ENODEV", "seal state=ERROR errno=ENODEV",
	};
	const struct mock *src = &self->src;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(rules); i++) {
		set_faults(_metadata, src, rules[i]);
		EXPECT_EQ(-ENODEV, mig_set_state(&src->dev, MIG_STOP_COPY, NULL));
		expect_state(_metadata, &src->dev, MIG_ERROR, "after the fault");
		EXPECT_EQ(-EINVAL, mig_set_state(&src->dev, MIG_RUNNING, NULL));
		set_faults(_metadata, src, "reset errno=EBUSY");
		EXPECT_EQ(-EBUSY, mig_reset(&src->dev));
		expect_state(_metadata, &src->dev, MIG_ERROR, "after a reset that failed");
		ASSERT_EQ(0, mig_reset(&src->dev));
		expect_state(_metadata, &src->dev, MIG_RUNNING, "after a reset");
		/* A broken device would be in ERROR after an arc that fails. */
		set_faults(_metadata, src, "arc *->STOP");
		EXPECT_EQ(-EIO, mig_set_state(&src->dev, MIG_STOP, NULL));
		if (!(src->dev.flags & VFIO_MIGRATION_P2P))
			expect_state(_metadata, &src->dev, MIG_RUNNING, "after the failure");
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP, NULL));
		ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	}
}

/* The source runs on after a failure at the switchover. */
TEST_F(knobs, seal_fails)
{
	const struct mock *src = &self->src;
	__u32 from = src->dev.flags & VFIO_MIGRATION_P2P ? MIG_PRE_COPY_P2P : MIG_PRE_COPY;
	struct vfio_precopy_info info;
	__u64 size;
	int fd;

	set_faults(_metadata, src,
		   "seal times=2 errno=ENOSPC; arc *->STOP_COPY nth=3 delay_us=20000");
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP, NULL));
	expect_failure(_metadata, src, MIG_STOP, MIG_STOP_COPY, ENOSPC);
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	NEED_PRE_COPY(&src->dev);
	begin(_metadata, self, &fd);
	EXPECT_EQ(-ENOSPC, mig_set_state(&src->dev, MIG_STOP_COPY, NULL));
	expect_state(_metadata, &src->dev, from, "after the failure");
	set64(src, SCRATCH, 7);
	EXPECT_EQ(7U, reg64(src, SCRATCH))
		PROMISE("the device runs");
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	close(fd);

	go_home(_metadata, &src->dev);
	set_faults(_metadata, src, "size errno=EBUSY");
	EXPECT_EQ(-EBUSY, mig_data_size(&src->dev, &size));
	EXPECT_EQ(0, mig_data_size(&src->dev, &size));
	self->image.len = 0;
	begin(_metadata, self, &fd);
	set_faults(_metadata, src, "size errno=EBUSY");
	EXPECT_EQ(-EBUSY, mig_precopy_info(fd, &info));
	EXPECT_EQ(0, mig_precopy_info(fd, &info));
	close(fd);
}

/* A failed read() loses nothing; the image loads. */
TEST_F(knobs, read_fails_after_bytes)
{
	struct mig_stream *image = &self->image;
	struct mock *src = &self->src;
	struct mock_front front;
	unsigned int failed = 0;
	size_t first = 0;
	ssize_t ret;
	int fd;

	populate(_metadata, src, 1);
	ASSERT_EQ(0, mock_set(src, "faults", "read after=100 times=3 errno=EIO"));
	read_front(_metadata, src, &front);
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, &fd));
	while ((ret = mig_read(fd, image, PAGE))) {
		if (ret > 0)
			continue;
		ASSERT_EQ(-EIO, ret);
		if (!failed++)
			first = image->len;
	}
	close(fd);
	EXPECT_EQ(3U, failed);
	EXPECT_LE(100U, first)
		PROMISE("the first read() fails after 100 bytes");
	EXPECT_GT(image->len, first);
	load_and_compare(_metadata, &self->dst, image, 0, src->want, &front);
}

TEST_F(knobs, write_fails_after_bytes)
{
	static const size_t after[] = { 0, 1, 4097 };
	const struct mig_device *dst = &self->dst.dev;
	unsigned int i;
	char rule[64];
	size_t done;
	int fd;

	take_image(_metadata, dst, &self->image);
	for (i = 0; i < ARRAY_SIZE(after); i++) {
		fd = go(_metadata, dst, MIG_RESUMING);
		snprintf(rule, sizeof(rule), "write after=%zu errno=ENOSPC", after[i]);
		set_faults(_metadata, &self->dst, rule);
		EXPECT_EQ(-ENOSPC, mig_load(fd, self->image.data, self->image.len, 0, &done));
		EXPECT_EQ(after[i], done)
			PROMISE("exactly this number of bytes is taken");
		EXPECT_EQ(-ENOSPC, mig_set_state(dst, MIG_STOP, NULL))
			PROMISE("a stream that failed does not become a device");
		close(fd);
	}
	set_faults(_metadata, &self->dst, "loaded errno=EIO");
	fd = go(_metadata, dst, MIG_RESUMING);
	load_all(_metadata, fd, &self->image);
	expect_failure(_metadata, &self->dst, MIG_RESUMING, MIG_STOP, EIO);
	close(fd);
	load_and_run(_metadata, dst, &self->image, 0);
}

/* A request for the log that fails changes nothing. */
TEST_F(knobs, log_fails)
{
	struct vfio_device_feature_dma_logging_range range = { .length = 16 * PAGE };
	struct mock *src = &self->src;
	struct dma_desc d = {
		.op = FILL, .iova = PAGE, .len = PAGE, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u64 page_size = PAGE, bitmap = 0;
	void *mem = mmap(NULL, range.length, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	NEED_IOMMUFD_FOR_LOG();
	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_EQ(0, mig_dma_map(&src->dev, 0, mem, range.length, RW));
	set_faults(_metadata, src,
		   "log_start errno=ENOTTY; log_report errno=ENOMEM; log_stop errno=EBUSY");
	EXPECT_EQ(-ENOTTY, mig_log_start(&src->dev, &page_size, &range, 1));
	ASSERT_EQ(0, mig_log_start(&src->dev, &page_size, &range, 1));
	d = dma_run(_metadata, src, 0, &d);
	ASSERT_EQ((__u32)VFIO_MOCK_DMA_COMPLETE, d.status);
	EXPECT_EQ(-ENOMEM, mig_log_report(&src->dev, 0, range.length, PAGE, &bitmap));
	EXPECT_EQ(0U, bitmap);
	ASSERT_EQ(0, mig_log_report(&src->dev, 0, range.length, PAGE, &bitmap));
	EXPECT_EQ(2U, bitmap)
		PROMISE("a report that failed has lost no page");
	EXPECT_EQ(-EBUSY, mig_log_stop(&src->dev));
	EXPECT_EQ(-EINVAL, mig_log_start(&src->dev, &page_size, &range, 1))
		PROMISE("the log is still on");
	ASSERT_EQ(0, mig_log_stop(&src->dev));
}

TEST_F(knobs, dma_fails)
{
	static const struct {
		const char *rule;
		__u32 error;
	} cases[] = {
		{ "dma errno=ENOMEM", VFIO_MOCK_DMA_ERROR_NO_MEMORY },
		{ "dma", VFIO_MOCK_DMA_ERROR_OTHER },
	};
	struct mock *src = &self->src;
	void *mem = mmap(NULL, src->size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct dma_desc d, want = {
		.op = WRITE, .iova = 0, .len = src->size, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	unsigned int i;

	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_EQ(0, mig_dma_map(&src->dev, 0, mem, src->size, RW));
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		set_faults(_metadata, src, cases[i].rule);
		d = dma_run(_metadata, src, 0, &want);
		EXPECT_EQ((__u32)VFIO_MOCK_DMA_FAILED, d.status);
		EXPECT_EQ(cases[i].error, d.error);
		EXPECT_EQ(0U, d.pos);
		d = dma_run(_metadata, src, 0, &want);
		EXPECT_EQ((__u32)VFIO_MOCK_DMA_COMPLETE, d.status)
			PROMISE("the next transfer succeeds");
	}
}

/* A byte that changes on the way makes no device, wherever it is. */
TEST_F(knobs, changed_byte_is_noticed)
{
	const struct mig_device *dst = &self->dst.dev;
	unsigned int i;
	char rule[64];
	int fd, ret;

	take_image(_metadata, &self->src.dev, &self->image);
	for (i = 0; i < 4; i++) {
		const size_t at[] = { 0, 100, PAGE + 1, self->image.len - 1 };

		fd = go(_metadata, dst, MIG_RESUMING);
		snprintf(rule, sizeof(rule), "write after=%zu xor=64", at[i]);
		set_faults(_metadata, &self->dst, rule);
		ret = mig_load(fd, self->image.data, self->image.len, 0, NULL);
		EXPECT_EQ(-EINVAL, ret)
			PROMISE("byte %zu of the stream is another one", at[i]);
		EXPECT_EQ(-EINVAL, mig_set_state(dst, MIG_STOP, NULL));
		close(fd);
		ASSERT_EQ(0, mig_reset(dst));
	}
	load_and_run(_metadata, dst, &self->image, 0);
}

/* ---- Identity of the stream ---- */

/* A target with another version refuses the stream in pre-copy, and the source runs on. */
TEST_F(knobs, other_version_is_refused_in_pre_copy)
{
	static const struct {
		const char *knob, *src, *dst;
		int ret;
	} cases[] = {
		{ "stream_version", "1", "2", -EINVAL },
		{ "stream_version", "2", "1", -EINVAL },
		{ "stream_version", "2", "2", 0 },
		{ "stream_features", "5", "4", -EINVAL },
		{ "stream_features", "4", "5", 0 },
		{ "stream_features", "5", "5", 0 },
	};
	struct mock *src = &self->src;
	unsigned int i;
	int fd, to;

	NEED_PRE_COPY(&src->dev);
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		ASSERT_EQ(0, mock_set(src, "stream_version", "1"));
		ASSERT_EQ(0, mock_set(&self->dst, "stream_version", "1"));
		ASSERT_EQ(0, mock_set(src, cases[i].knob, cases[i].src));
		ASSERT_EQ(0, mock_set(&self->dst, cases[i].knob, cases[i].dst));
		self->image.len = 0;
		begin(_metadata, self, &fd);
		to = go(_metadata, &self->dst.dev, MIG_RESUMING);
		EXPECT_EQ(cases[i].ret,
			  mig_load(to, self->image.data, self->image.len, 0, NULL))
			PROMISE("%s: from %s to %s", cases[i].knob, cases[i].src, cases[i].dst);
		close(to);
		ASSERT_EQ(0, mig_reset(&self->dst.dev));
		if (cases[i].ret) {
			move_on(_metadata, &src->dev, MIG_RUNNING);
			close(fd);
			continue;
		}
		move_on(_metadata, &src->dev, MIG_STOP_COPY);
		ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
		close(fd);
		load_and_run(_metadata, &self->dst.dev, &self->image, 0);
		go_home(_metadata, &src->dev);
	}
}

/* A thread that stops a device. */
struct stopper {
	struct poller poller;
	const struct mig_device *dev;
	__u32 state;
	int ret;
};

static void *stopper_main(void *arg)
{
	struct stopper *s = arg;

	atomic_store(&s->poller.tid, gettid());
	s->ret = mig_set_state(s->dev, s->state, NULL);
	atomic_store(&s->poller.done, true);
	return NULL;
}

TEST_F_TIMEOUT(knobs, delayed_arc_ends_on_command, 60)
{
	const struct mock *src = &self->src;
	struct stopper s = { .dev = &src->dev, .state = MIG_STOP };
	pid_t child;
	int status;

	/* More than an hour. */
	set_faults(_metadata, src, "arc RUNNING->* delay_us=4294967295");
	ASSERT_EQ(0, pthread_create(&s.poller.thread, NULL, stopper_main, &s));
	wait_until_asleep(&s.poller);
	EXPECT_FALSE(atomic_load(&s.poller.done))
		PROMISE("the arc waits");
	expect_state(_metadata, &src->dev, MIG_RUNNING, "during the delay");
	set_faults(_metadata, src, "off");
	ASSERT_TRUE(joined(s.poller.thread))
		PROMISE("new rules end the delay");
	EXPECT_EQ(0, s.ret);
	move_on(_metadata, &src->dev, MIG_RUNNING);

	/* A process in the delay can be killed, and nothing has changed. */
	set_faults(_metadata, src, "arc RUNNING->* delay_us=20000000");
	child = fork();
	ASSERT_LE(0, child);
	if (!child)
		_exit(mig_set_state(&src->dev, MIG_STOP, NULL) ? 1 : 0);
	WAIT_FOR(sleeps_uninterruptibly(child), "the arc of the child waits");
	kill(child, SIGKILL);
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
	expect_state(_metadata, &src->dev, MIG_RUNNING, "after the child was killed");

	/* A short delay ends by itself. */
	set_faults(_metadata, src, "arc RUNNING->* delay_us=20000");
	move_on(_metadata, &src->dev, MIG_STOP);
	move_on(_metadata, &src->dev, MIG_RUNNING);
}

/* A thread that writes to the scratch register. */
struct scratcher {
	struct poller poller;
	const struct mock *m;
	__u64 value;
	ssize_t ret;
};

static void *scratcher_main(void *arg)
{
	struct scratcher *s = arg;

	atomic_store(&s->poller.tid, gettid());
	s->ret = mock_write(s->m, BAR0, VFIO_MOCK_REG_SCRATCH, &s->value, sizeof(s->value));
	atomic_store(&s->poller.done, true);
	return NULL;
}

/* A RESET that waits for a state change, and is killed meanwhile, has no effect. */
TEST_F_TIMEOUT(knobs, write_is_kept_if_the_reset_is_killed, 60)
{
	struct mock *src = &self->src;
	struct scratcher writer = { .m = src, .value = 0x0123456789abcdefULL };
	struct stopper s = { .dev = &src->dev, .state = MIG_STOP };
	__u64 dropped = reg64(src, DROPPED);
	pid_t child;

	set_faults(_metadata, src, "arc RUNNING->* delay_us=4294967295");
	ASSERT_EQ(0, pthread_create(&s.poller.thread, NULL, stopper_main, &s));
	wait_until_asleep(&s.poller);
	child = fork();
	ASSERT_LE(0, child);
	if (!child)
		_exit(mig_reset(&src->dev) ? 1 : 0);
	WAIT_FOR(sleeps_uninterruptibly(child), "a RESET waits for the state change");
	ASSERT_EQ(0, pthread_create(&writer.poller.thread, NULL, scratcher_main, &writer));
	wait_until_asleep(&writer.poller);
	EXPECT_FALSE(atomic_load(&writer.poller.done))
		PROMISE("a write waits for the end of the RESET");
	ASSERT_EQ(0, kill(child, SIGKILL));
	ASSERT_EQ(child, waitpid(child, NULL, 0));
	ASSERT_TRUE(joined(writer.poller.thread))
		PROMISE("a write continues when the RESET was killed");
	EXPECT_EQ((ssize_t)sizeof(writer.value), writer.ret);
	EXPECT_EQ(writer.value, reg64(src, SCRATCH))
		PROMISE("a write to a running device has an effect");
	EXPECT_EQ(dropped, reg64(src, DROPPED))
		PROMISE("a running device drops no write");
	expect_state(_metadata, &src->dev, MIG_RUNNING, "after the RESET was killed");
	set_faults(_metadata, src, "off");
	ASSERT_TRUE(joined(s.poller.thread));
	EXPECT_EQ(0, s.ret);
}

/* The device has stopped when its saver refuses, and goes on. */
TEST_F_TIMEOUT(knobs, write_is_kept_if_the_seal_fails, 60)
{
	static const char *const rules[] = {
		"seal errno=ENOSPC delay_us=4294967295", "seal delay_us=4294967295",
	};
	static const int rets[] = { -ENOSPC, 0 };
	struct mock *src = &self->src;
	__u64 dropped = reg64(src, DROPPED);
	__u64 faulted = number(_metadata, src, "faulted");
	unsigned int i;
	int fd;

	NEED_PRE_COPY(&src->dev);
	begin(_metadata, self, &fd);
	set64(src, SCRATCH, 0);
	for (i = 0; i < ARRAY_SIZE(rules); i++) {
		struct scratcher writer = { .m = src, .value = i + 1 };
		struct stopper s = { .dev = &src->dev, .state = MIG_STOP_COPY };

		set_faults(_metadata, src, rules[i]);
		ASSERT_EQ(0, pthread_create(&s.poller.thread, NULL, stopper_main, &s));
		WAIT_FOR(number(_metadata, src, "faulted") > faulted + i, "the saver waits");
		ASSERT_EQ(0, pthread_create(&writer.poller.thread, NULL, scratcher_main,
					    &writer));
		wait_until_asleep(&writer.poller);
		EXPECT_FALSE(atomic_load(&writer.poller.done))
			PROMISE("a write waits for the end of an arc that stops the device");
		set_faults(_metadata, src, "off");
		ASSERT_TRUE(joined(s.poller.thread));
		EXPECT_EQ(rets[i], s.ret);
		ASSERT_TRUE(joined(writer.poller.thread));
		EXPECT_EQ((ssize_t)sizeof(writer.value), writer.ret);
		EXPECT_EQ(1U, reg64(src, SCRATCH))
			PROMISE("a write has an effect only if the device goes on running");
		EXPECT_EQ(dropped + i, reg64(src, DROPPED))
			PROMISE("a write is dropped only if the device has stopped");
	}
	close(fd);
}

/* A driver may take long in the method that begins the end of the stream. */
TEST_F(knobs, poll_during_a_seal_is_killed)
{
	struct mock *src = &self->src;
	__u64 faulted = number(_metadata, src, "faulted");
	struct stopper s = { .dev = &src->dev, .state = MIG_STOP_COPY };
	struct pollfd p = { .events = POLLIN };
	pid_t child;
	int status;

	NEED_PRE_COPY(&src->dev);
	begin(_metadata, self, &p.fd);
	set_faults(_metadata, src, "seal delay_us=4294967295");
	ASSERT_EQ(0, pthread_create(&s.poller.thread, NULL, stopper_main, &s));
	WAIT_FOR(number(_metadata, src, "faulted") > faulted, "the saver waits");
	child = fork();
	ASSERT_LE(0, child);
	if (!child)
		_exit(poll(&p, 1, 0));
	WAIT_FOR(sleeps_uninterruptibly(child), "poll() of the child waits");
	kill(child, SIGKILL);
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
	set_faults(_metadata, src, "off");
	ASSERT_TRUE(joined(s.poller.thread));
	EXPECT_EQ(0, s.ret);
	close(p.fd);
}

MIG_HARNESS_MAIN(mock_options)
