// SPDX-License-Identifier: GPL-2.0
/*
 * The verdict on the clients of vfio_mock in debugfs: for each rule, a client that
 * breaks it and a client that does not. Also the statistics and the tracepoints.
 *
 *	./vfio_mock_verdict_test --small "SOURCE TARGET"
 *
 * as root, with debugfs and CONFIG_VFIO_DEBUGFS.
 */
#include <sys/mount.h>

#include "mock_dma.h"

#define TRACING	"/sys/kernel/tracing/"
#define EVENTS	TRACING "events/vfio_mock/"

FIXTURE(verdict)
{
	struct mock src, dst;
	struct mig_stream image;
	char text[4096];
};

#define verdict_data	FIXTURE_DATA(verdict)

MIG_EACH_BACKEND(verdict);

/* Reads a file as a string; 0 or -errno. */
static int read_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t done = 0;
	ssize_t ret;

	if (fd < 0)
		return -errno;
	while ((ret = read(fd, text + done, size - 1 - done)) > 0)
		done += ret;
	text[done] = 0;
	close(fd);
	return ret < 0 ? -EIO : 0;
}

/* Reads a file of a device in debugfs. */
static int read_file(const struct mock *m, const char *name, char *text, size_t size)
{
	const char *device = strrchr(m->path, '/') + 1;
	char path[PATH_MAX + 64];

	snprintf(path, sizeof(path), "/sys/kernel/debug/vfio/%s/%s", device, name);
	return read_text(path, text, size);
}

FIXTURE_SETUP(verdict)
{
	self->src.dev.fd = -1;
	self->dst.dev.fd = -1;
	MOCK_OPEN_OR_SKIP(&self->src, "small", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "small", 1, variant->backend);
	if (read_file(&self->src, "verdict", self->text, sizeof(self->text)))
		SKIP(return, "no verdict: debugfs is not mounted, or no CONFIG_VFIO_DEBUGFS");
}

FIXTURE_TEARDOWN(verdict)
{
	mig_stream_free(&self->image);
	mock_close(&self->src);
	mock_close(&self->dst);
}

/* Expects that a client broke only this rule, in a state, or none. */
static void expect_verdict(struct __test_metadata *_metadata, verdict_data *self,
			   const struct mock *m, const char *rule, const char *state)
{
	char want[128] = "clean\n";

	ASSERT_EQ(0, read_file(m, "verdict", self->text, sizeof(self->text)));
	if (!rule) {
		EXPECT_STREQ(want, self->text);
		return;
	}
	snprintf(want, sizeof(want), "%s: count 1, first in %s after ", rule, state);
	EXPECT_EQ(0, strncmp(want, self->text, strlen(want)))
		TH_LOG("  \"%s\" instead of \"%s...\"", self->text, want);
	EXPECT_EQ(self->text + strlen(self->text) - 1, strchr(self->text, '\n'))
		TH_LOG("  more than one line: %s", self->text);
}

/* A number of the statistics. */
static __u64 number(struct __test_metadata *_metadata, verdict_data *self,
		    const struct mock *m, const char *name)
{
	char line[64], *at;

	ASSERT_EQ(0, read_file(m, "statistics", self->text + 1, sizeof(self->text) - 1));
	self->text[0] = '\n';
	snprintf(line, sizeof(line), "\n%s ", name);
	at = strstr(self->text, line);
	ASSERT_NE(NULL, at)
		STEP("find %s in the statistics", name);
	return strtoull(at + strlen(line), NULL, 10);
}

/* Reads to the temporary end of stream. */
static void drain(struct __test_metadata *_metadata, verdict_data *self, int fd)
{
	ASSERT_EQ(-ENOMSG, mig_save(fd, &self->image, stream_limit(&self->src.dev)));
}

/* Migrates like a good client. */
static void migrate(struct __test_metadata *_metadata, verdict_data *self)
{
	const struct mig_device *src = &self->src.dev, *dst = &self->dst.dev;
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	bool pre_copy = src->flags & VFIO_MIGRATION_PRE_COPY;
	int fd;

	fd = go(_metadata, src, pre_copy ? MIG_PRE_COPY : MIG_STOP_COPY);
	if (pre_copy) {
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_LT(0U, info.initial_bytes);
		drain(_metadata, self, fd);
		EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));
		move_on(_metadata, src, MIG_STOP_COPY);
	}
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(src)));
	move_on(_metadata, src, MIG_STOP);
	close(fd);
	load_and_run(_metadata, dst, &self->image, 0);
}

TEST_F(verdict, whole_migration_is_clean)
{
	migrate(_metadata, self);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	expect_verdict(_metadata, self, &self->dst, NULL, NULL);
	mig_close_device(&self->src.dev);
	mig_close_device(&self->dst.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	expect_verdict(_metadata, self, &self->dst, NULL, NULL);
}

TEST_F(verdict, statistics_match_the_migration)
{
	const struct mock *src = &self->src, *dst = &self->dst;
	__u64 stopped;

	migrate(_metadata, self);
	EXPECT_EQ(self->image.len, number(_metadata, self, src, "read_bytes"));
	EXPECT_EQ(self->image.len, number(_metadata, self, dst, "written_bytes"));
	EXPECT_EQ(1U, number(_metadata, self, src, "sessions"));
	EXPECT_EQ(1U, number(_metadata, self, dst, "sessions"));
	EXPECT_LE(number(_metadata, self, src, "largest_read"), self->image.len);
	if (src->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		EXPECT_EQ(1U, number(_metadata, self, src, "enomsg"));
		EXPECT_EQ(1U, number(_metadata, self, src, "polls"));
		EXPECT_EQ(1U, number(_metadata, self, src, "precopy_infos"));
	}
	stopped = number(_metadata, self, src, "STOP_us");
	usleep(2000);
	EXPECT_LE(stopped + 2000, number(_metadata, self, src, "STOP_us"));
	EXPECT_EQ(0U, number(_metadata, self, src, "RESUMING_us"));
	ASSERT_EQ(0, mig_reset(&src->dev));
	EXPECT_EQ(1U, number(_metadata, self, src, "resets"));
}

TEST_F(verdict, next_open_clears_the_verdict)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	close(fd);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "stream_abandoned", "STOP_COPY");
	ASSERT_EQ(0, mig_reopen_device(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	EXPECT_EQ(0U, number(_metadata, self, &self->src, "sessions"));
}

TEST_F(verdict, unread_stream_is_reported)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	ASSERT_EQ(1, mig_read(fd, &self->image, 1));
	close(fd);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "stream_abandoned", "STOP");
}

TEST_F(verdict, cancelled_migration_is_clean)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	ASSERT_EQ(1, mig_read(fd, &self->image, 1));
	close(fd);
	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

TEST_F(verdict, incomplete_image_is_reported)
{
	int fd;

	take_image(_metadata, &self->src.dev, &self->image);
	fd = go(_metadata, &self->dst.dev, MIG_RESUMING);
	ASSERT_EQ(0, mig_load(fd, self->image.data, self->image.len / 2, 0, NULL));
	expect_verdict(_metadata, self, &self->dst, NULL, NULL);
	EXPECT_EQ(-EINVAL, mig_set_state(&self->dst.dev, MIG_RUNNING, NULL));
	expect_verdict(_metadata, self, &self->dst, "image_incomplete", "RESUMING");
	close(fd);
}

TEST_F(verdict, loading_may_be_aborted_by_a_reset)
{
	int fd;

	take_image(_metadata, &self->src.dev, &self->image);
	fd = go(_metadata, &self->dst.dev, MIG_RESUMING);
	ASSERT_EQ(0, mig_load(fd, self->image.data, self->image.len / 2, 0, NULL));
	ASSERT_EQ(0, mig_reset(&self->dst.dev));
	close(fd);
	expect_verdict(_metadata, self, &self->dst, NULL, NULL);
}

TEST_F(verdict, ignored_initial_bytes_are_reported)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	move_on(_metadata, &self->src.dev, MIG_STOP_COPY);
	/* Without P2P, this is a single arc. */
	expect_verdict(_metadata, self, &self->src, "initial_bytes_ignored",
		       self->src.dev.flags & VFIO_MIGRATION_P2P ? "PRE_COPY_P2P" : "PRE_COPY");
	close(fd);
}

TEST_F(verdict, busy_polling_is_reported)
{
	unsigned int i;
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	drain(_metadata, self, fd);
	/* A read() may take longer than a pause on a busy machine, but not each of them. */
	for (i = 0; i < 100000; i++) {
		ASSERT_EQ(-ENOMSG, mig_read(fd, &self->image, 1));
		if (i % 256)
			continue;
		ASSERT_EQ(0, read_file(&self->src, "verdict", self->text, sizeof(self->text)));
		if (strcmp(self->text, "clean\n"))
			break;
	}
	EXPECT_EQ(0, strncmp(self->text, "busy_polling: ", 14))
		TH_LOG("  %s", self->text);
	close(fd);
}

TEST_F(verdict, poll_between_reads_is_not_busy)
{
	unsigned int i;
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	drain(_metadata, self, fd);
	for (i = 0; i < 200; i++) {
		ASSERT_EQ(-ENOMSG, mig_read(fd, &self->image, 1));
		ASSERT_EQ(0, mig_poll(fd, POLLIN, 0));
	}
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	close(fd);
}

/* Lets the device begin again in pre-copy, and asks for it. */
static int reinit(struct __test_metadata *_metadata, verdict_data *self)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	int fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);

	drain(_metadata, self, fd);
	command(_metadata, &self->src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	return fd;
}

TEST_F(verdict, reinit_without_opt_in_is_reported)
{
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = reinit(_metadata, self);
	expect_verdict(_metadata, self, &self->src, "reinit_not_seen", "PRE_COPY");
	close(fd);
}

TEST_F(verdict, reinit_is_seen_with_opt_in)
{
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	ASSERT_EQ(0, mig_opt_in_v2(&self->src.dev));
	fd = reinit(_metadata, self);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	close(fd);
}

TEST_F(verdict, reset_of_a_saving_session_is_reported)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	ASSERT_EQ(0, mig_reset(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, "reset_in_session", "STOP_COPY");
	close(fd);
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, "reset_in_session", "STOP_COPY");
}

TEST_F(verdict, data_fd_left_at_close_is_reported)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "data_fd_leaked", "RUNNING");
	close(fd);
}

TEST_F(verdict, data_fd_left_at_next_session_is_reported)
{
	int old = go(_metadata, &self->src.dev, MIG_STOP_COPY);
	int fd;

	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);
	expect_verdict(_metadata, self, &self->src, "data_fd_leaked", "STOP");
	close(old);
	close(fd);
	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "data_fd_leaked", "STOP");
}

TEST_F(verdict, write_to_a_stopped_device_is_reported)
{
	move_on(_metadata, &self->src.dev, MIG_STOP);
	put(_metadata, &self->src, CONFIG, 0x0c, 1, 1);
	reg64(&self->src, SCRATCH);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	set64(&self->src, SCRATCH, 1);
	expect_verdict(_metadata, self, &self->src, "stopped_device_written", "STOP");
	EXPECT_EQ(1U, number(_metadata, self, &self->src, "dropped_writes"));
}

/* Starts the log, and lets the device write a page; returns its IOVA. */
static __u64 write_logged_page(struct __test_metadata *_metadata, struct mock *m)
{
	struct vfio_device_feature_dma_logging_range range = { .length = 16 * PAGE };
	struct dma_desc d = {
		.op = FILL, .iova = PAGE, .len = PAGE, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u64 page_size = PAGE;
	void *mem = mmap(NULL, range.length, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_EQ(0, mig_dma_map(&m->dev, 0, mem, range.length, RW));
	ASSERT_EQ(0, mig_log_start(&m->dev, &page_size, &range, 1));
	d = dma_run(_metadata, m, 0, &d);
	ASSERT_EQ((__u32)VFIO_MOCK_DMA_COMPLETE, d.status);
	return d.iova;
}

TEST_F(verdict, unreported_pages_are_reported)
{
	NEED_IOMMUFD_FOR_LOG();
	write_logged_page(_metadata, &self->src);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	ASSERT_EQ(0, mig_log_stop(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "log_not_reported", "STOP");
}

TEST_F(verdict, log_of_a_cancelled_migration_need_not_be_reported)
{
	NEED_IOMMUFD_FOR_LOG();
	write_logged_page(_metadata, &self->src);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	ASSERT_EQ(0, mig_log_stop(&self->src.dev));
	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

TEST_F(verdict, running_log_is_reported_at_close)
{
	__u64 iova, bitmap = 0;

	NEED_IOMMUFD_FOR_LOG();
	iova = write_logged_page(_metadata, &self->src);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	ASSERT_EQ(0, mig_log_report(&self->src.dev, iova, PAGE, PAGE, &bitmap));
	EXPECT_EQ(1U, bitmap);
	EXPECT_EQ(1U, number(_metadata, self, &self->src, "log_reports"));
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "log_not_stopped", "STOP");
}

TEST_F(verdict, log_that_is_reported_and_stopped_is_clean)
{
	__u64 iova, bitmap = 0;

	NEED_IOMMUFD_FOR_LOG();
	iova = write_logged_page(_metadata, &self->src);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	ASSERT_EQ(0, mig_log_report(&self->src.dev, iova, PAGE, PAGE, &bitmap));
	ASSERT_EQ(0, mig_log_stop(&self->src.dev));
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

/* Finds a line of the trace with both words. */
static bool traced(const char *trace, const char *event, const char *words)
{
	const char *at, *end;

	for (at = strstr(trace, event); at; at = strstr(at + 1, event)) {
		end = strchrnul(at, '\n');
		if (memmem(at, end - at, words, strlen(words)))
			return true;
	}
	return false;
}

TEST_F(verdict, each_event_is_traced)
{
	const char *device = strrchr(self->src.path, '/') + 1;
	bool pre_copy = self->src.dev.flags & VFIO_MIGRATION_PRE_COPY;
	const size_t size = 1 << 20;
	char *trace, words[64];
	__u64 bitmap = 0;

	if (mount("tracefs", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "no tracefs: %s", strerror(errno));
	if (write_word(EVENTS "enable", "1"))
		SKIP(return, "no events: no CONFIG_EVENT_TRACING");
	ASSERT_EQ(0, write_word(TRACING "trace", ""));
	migrate(_metadata, self);
	if (mock_has_log()) {
		write_logged_page(_metadata, &self->dst);
		ASSERT_EQ(0, mig_log_report(&self->dst.dev, 0, 16 * PAGE, PAGE, &bitmap));
		ASSERT_EQ(0, mig_log_stop(&self->dst.dev));
	}
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	ASSERT_EQ(0, write_word(EVENTS "enable", "0"));
	trace = malloc(size);
	ASSERT_NE(NULL, trace);
	ASSERT_EQ(0, read_text(TRACING "trace", trace, size));

	snprintf(words, sizeof(words), "device=%s ", device);
	EXPECT_TRUE(traced(trace, "vfio_arc: ", words));
	EXPECT_TRUE(traced(trace, "vfio_arc: ", " from=STOP_COPY to=STOP result=0 ns="));
	EXPECT_TRUE(traced(trace, "vfio_session_end: ", " state=STOP_COPY"));
	EXPECT_TRUE(traced(trace, "vfio_session_begin: ", " state=RESUMING"));
	EXPECT_TRUE(traced(trace, "vfio_session_end: ", " state=RESUMING"));
	EXPECT_TRUE(traced(trace, "vfio_read: ", " result=0"));
	EXPECT_TRUE(traced(trace, "vfio_reset: ", " from=STOP result=0"));
	snprintf(words, sizeof(words), " result=%zu", self->image.len);
	EXPECT_TRUE(traced(trace, "vfio_write: ", words));
	if (mock_has_log()) {
		EXPECT_TRUE(traced(trace, "vfio_log_start: ", " result=0"));
		EXPECT_TRUE(traced(trace, "vfio_log_report: ", " result=0"));
		EXPECT_TRUE(traced(trace, "vfio_log_stop: ", " result=0"));
	}
	if (pre_copy) {
		EXPECT_TRUE(traced(trace, "vfio_session_begin: ", " state=PRE_COPY"));
		snprintf(words, sizeof(words), " result=%d", -ENOMSG);
		EXPECT_TRUE(traced(trace, "vfio_read: ", words));
		EXPECT_TRUE(traced(trace, "vfio_precopy_info: ", " dirty_bytes=0 flags="));
	}
	free(trace);
}

MIG_HARNESS_MAIN(mock_options)
