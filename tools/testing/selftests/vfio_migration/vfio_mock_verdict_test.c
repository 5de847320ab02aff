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
#include "mock_fail.h"

#define TRACING	"/sys/kernel/tracing/"
#define EVENTS	TRACING "events/vfio_mock/"
/* Bytes of the trace that a test reads. */
#define TRACE_SIZE	(1 << 20)

FIXTURE(verdict)
{
	struct mock src, dst;
	struct mig_stream image;
	char text[4096];
	char *trace;
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
	if (self->trace)
		write_word(EVENTS "enable", "0");
	free(self->trace);
	mig_stream_free(&self->image);
	mock_close(&self->src);
	mock_close(&self->dst);
}

/*
 * Expects that a client broke only this rule, in a state, or none. A rule that begins with
 * "advice: " is no violation.
 */
static void expect_verdict(struct __test_metadata *_metadata, verdict_data *self,
			   const struct mock *m, const char *rule, const char *state)
{
	const char *clean = "clean\n", *rest = self->text;
	char want[128];

	ASSERT_EQ(0, read_file(m, "verdict", self->text, sizeof(self->text)));
	if (!rule) {
		EXPECT_STREQ(clean, self->text);
		return;
	}
	if (!strncmp(rule, "advice: ", 8)) {
		EXPECT_EQ(0, strncmp(clean, self->text, strlen(clean)))
			TH_LOG("  not clean: %s", self->text);
		rest += strlen(clean);
	}
	snprintf(want, sizeof(want), "%s: count 1, first in %s after ", rule, state);
	EXPECT_EQ(0, strncmp(want, rest, strlen(want)))
		TH_LOG("  \"%s\" instead of \"%s...\"", self->text, want);
	EXPECT_EQ(self->text + strlen(self->text) - 1, strchr(rest, '\n'))
		TH_LOG("  another line: %s", self->text);
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

/* Reads the whole stream, and leaves the device in STOP_COPY. */
static void save(struct __test_metadata *_metadata, verdict_data *self)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&self->src.dev)));
	close(fd);
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
	EXPECT_LT(0U, number(_metadata, self, src, "largest_read"));
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

TEST_F(verdict, second_stream_makes_up_for_the_first)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	close(fd);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	/* Not by RUNNING, which would cancel the migration. */
	ASSERT_EQ(0, mig_set_state(&self->src.dev, MIG_STOP_COPY, &fd));
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&self->src.dev)));
	close(fd);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
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
	expect_verdict(_metadata, self, &self->src, "advice: initial_bytes_ignored",
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
	/* Another task may run between two reads, but not always. */
	for (i = 0; i < 100000; i++) {
		ASSERT_EQ(-ENOMSG, mig_read(fd, &self->image, 1));
		if (i % 256)
			continue;
		ASSERT_EQ(0, read_file(&self->src, "verdict", self->text, sizeof(self->text)));
		if (strcmp(self->text, "clean\n"))
			break;
	}
	EXPECT_EQ(0, strncmp(self->text, "clean\nadvice: busy_polling: ", 28))
		TH_LOG("  %s", self->text);
	close(fd);
}

TEST_F(verdict, look_at_the_info_between_reads_is_not_busy)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	unsigned int i;
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	drain(_metadata, self, fd);
	for (i = 0; i < 1000; i++) {
		ASSERT_EQ(-ENOMSG, mig_read(fd, &self->image, 1));
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
	}
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
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

TEST_F(verdict, old_data_fd_is_not_counted_to_the_next_session)
{
	int old = go(_metadata, &self->src.dev, MIG_STOP_COPY);
	int fd;

	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);
	EXPECT_LT(0, mig_poll(old, POLLIN, 0));
	EXPECT_EQ(0U, number(_metadata, self, &self->src, "polls"));
	EXPECT_LT(0, mig_poll(fd, POLLIN, 0));
	EXPECT_EQ(1U, number(_metadata, self, &self->src, "polls"));
	close(old);
	close(fd);
}

/* Lets the device begin again in pre-copy, and asks for it twice. */
static int reinit(struct __test_metadata *_metadata, verdict_data *self)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	int fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);

	drain(_metadata, self, fd);
	command(_metadata, &self->src, VFIO_MOCK_CMD_REINIT, 0, 0, 4711);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	return fd;
}

TEST_F(verdict, reinit_without_opt_in_is_reported)
{
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = reinit(_metadata, self);
	expect_verdict(_metadata, self, &self->src, "advice: reinit_not_seen", "PRE_COPY");
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

TEST_F(verdict, reset_before_the_end_of_stream_is_reported)
{
	int fd = go(_metadata, &self->src.dev, MIG_STOP_COPY);

	ASSERT_EQ(0, mig_reset(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, "advice: reset_in_session", "STOP_COPY");
	close(fd);
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, "advice: reset_in_session", "STOP_COPY");
}

TEST_F(verdict, reset_after_the_end_of_stream_is_clean)
{
	save(_metadata, self);
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

TEST_F(verdict, reset_in_pre_copy_is_clean)
{
	int fd;

	NEED_PRE_COPY(&self->src.dev);
	fd = go(_metadata, &self->src.dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_reset(&self->src.dev));
	close(fd);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	EXPECT_EQ(1U, number(_metadata, self, &self->src, "resets"));
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

static void store_byte(__u8 *to, __u8 value)
{
	__atomic_store_n(to, value, __ATOMIC_RELAXED);
}

TEST_F(verdict, store_to_a_stopped_device_is_reported)
{
	struct mock *src = &self->src;
	__u8 *bar = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, src->dev.fd,
			 src->offset[BAR2]);

	ASSERT_NE(MAP_FAILED, bar);
	store_byte(bar, 1);
	move_on(_metadata, &src->dev, MIG_STOP);
	EXPECT_EQ(1, __atomic_load_n(bar, __ATOMIC_RELAXED));
	EXPECT_EQ(0, __atomic_load_n(bar + PAGE, __ATOMIC_RELAXED));
	expect_verdict(_metadata, self, src, NULL, NULL);
	store_byte(bar + PAGE, 1);
	expect_verdict(_metadata, self, src, "stopped_device_written", "STOP");
	store_byte(bar + PAGE, 2);
	EXPECT_EQ(1U, number(_metadata, self, src, "dropped_stores"));
	move_on(_metadata, &src->dev, MIG_RUNNING);
	store_byte(bar + PAGE, 3);
	expect_verdict(_metadata, self, src, "stopped_device_written", "STOP");

	/* Noticed before a reset clears the count. */
	munmap(bar, 2 * PAGE);
	mig_close_device(&src->dev);
	ASSERT_EQ(0, mig_reopen_device(&src->dev));
	bar = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, src->dev.fd,
		   src->offset[BAR2]);
	ASSERT_NE(MAP_FAILED, bar);
	move_on(_metadata, &src->dev, MIG_STOP);
	store_byte(bar + PAGE, 1);
	ASSERT_EQ(0, mig_reset(&src->dev));
	expect_verdict(_metadata, self, src, "stopped_device_written", "STOP");
	munmap(bar, 2 * PAGE);
}

TEST_F(verdict, write_to_a_quiesced_device_is_reported)
{
	NEED_P2P(&self->src.dev);
	move_on(_metadata, &self->src.dev, MIG_RUNNING_P2P);
	put(_metadata, &self->src, CONFIG, 0x0c, 1, 1);
	reg64(&self->src, SCRATCH);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	set64(&self->src, SCRATCH, 1);
	EXPECT_EQ(1U, reg64(&self->src, SCRATCH));
	expect_verdict(_metadata, self, &self->src, "quiesced_device_written", "RUNNING_P2P");
}

TEST_F(verdict, write_before_and_after_p2p_is_clean)
{
	NEED_P2P(&self->src.dev);
	set64(&self->src, SCRATCH, 1);
	move_on(_metadata, &self->src.dev, MIG_RUNNING_P2P);
	move_on(_metadata, &self->src.dev, MIG_RUNNING);
	set64(&self->src, SCRATCH, 2);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

/* Lets the device write a page of memory that is mapped for it; returns its IOVA. */
static __u64 write_page(struct __test_metadata *_metadata, struct mock *m, bool log)
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
	if (log)
		ASSERT_EQ(0, mig_log_start(&m->dev, &page_size, &range, 1));
	d = dma_run(_metadata, m, 0, &d);
	ASSERT_EQ((__u32)VFIO_MOCK_DMA_COMPLETE, d.status);
	return d.iova;
}

/* The same, with the log. */
static __u64 write_logged_page(struct __test_metadata *_metadata, struct mock *m)
{
	return write_page(_metadata, m, true);
}

/* Only a device without an IOMMU in an iommufd has no other tracking than its log. */
TEST_F(verdict, missing_log_is_reported)
{
	struct mock *src = &self->src;
	bool untracked = variant->backend == MIG_IOMMUFD && !mock_has_iommu(src);
	int fd;

	NEED_PRE_COPY(&src->dev);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	write_page(_metadata, src, false);
	drain(_metadata, self, fd);
	expect_verdict(_metadata, self, src, NULL, NULL);
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	expect_verdict(_metadata, self, src, untracked ? "advice: log_not_started" : NULL,
		       src->dev.flags & VFIO_MIGRATION_P2P ? "PRE_COPY_P2P" : "PRE_COPY");
	close(fd);
}

TEST_F(verdict, log_in_pre_copy_is_clean)
{
	struct mock *src = &self->src;
	__u64 bitmap = 0;
	int fd;

	NEED_PRE_COPY(&src->dev);
	NEED_IOMMUFD_FOR_LOG();
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	write_logged_page(_metadata, src);
	drain(_metadata, self, fd);
	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_log_report(&src->dev, 0, 16 * PAGE, PAGE, &bitmap));
	ASSERT_EQ(0, mig_log_stop(&src->dev));
	ASSERT_EQ(0, mig_save(fd, &self->image, stream_limit(&src->dev)));
	close(fd);
	mig_close_device(&src->dev);
	expect_verdict(_metadata, self, src, NULL, NULL);
}

TEST_F(verdict, unreported_pages_are_reported)
{
	NEED_IOMMUFD_FOR_LOG();
	write_logged_page(_metadata, &self->src);
	save(_metadata, self);
	ASSERT_EQ(0, mig_log_stop(&self->src.dev));
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, "log_not_reported", "STOP_COPY");
}

TEST_F(verdict, log_without_a_migration_need_not_be_reported)
{
	NEED_IOMMUFD_FOR_LOG();
	write_logged_page(_metadata, &self->src);
	move_on(_metadata, &self->src.dev, MIG_STOP);
	ASSERT_EQ(0, mig_log_stop(&self->src.dev));
	mig_close_device(&self->src.dev);
	expect_verdict(_metadata, self, &self->src, NULL, NULL);
}

TEST_F(verdict, log_of_a_cancelled_migration_need_not_be_reported)
{
	NEED_IOMMUFD_FOR_LOG();
	write_logged_page(_metadata, &self->src);
	save(_metadata, self);
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

/* Enables the events of the module; returns the reason if there are none. */
static const char *trace_begin(struct __test_metadata *_metadata, verdict_data *self)
{
	if (mount("tracefs", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		return "no tracefs";
	if (access(EVENTS "enable", F_OK))
		return "no events: no CONFIG_EVENT_TRACING";
	self->trace = malloc(TRACE_SIZE);
	ASSERT_NE(NULL, self->trace);
	ASSERT_EQ(0, clear_file(TRACING "trace"));
	ASSERT_EQ(0, write_word(EVENTS "enable", "1"));
	return NULL;
}

/* Disables the events and reads the trace. */
static void trace_end(struct __test_metadata *_metadata, verdict_data *self)
{
	ASSERT_EQ(0, write_word(EVENTS "enable", "0"));
	ASSERT_EQ(0, read_text(TRACING "trace", self->trace, TRACE_SIZE));
}

/* Returns the number of lines of the trace with both words. */
static unsigned int traced(const char *trace, const char *event, const char *words)
{
	const char *at, *end;
	unsigned int count = 0;

	for (at = strstr(trace, event); at; at = strstr(at + 1, event)) {
		end = strchrnul(at, '\n');
		if (memmem(at, end - at, words, strlen(words)))
			count++;
	}
	return count;
}

/* Expects that an event of a device was traced, with these words. */
#define EXPECT_TRACED(m, event, ...) do { \
	char words[128]; \
	int len = snprintf(words, sizeof(words), "device=%s ", \
			   strrchr((m)->path, '/') + 1); \
	snprintf(words + len, sizeof(words) - len, __VA_ARGS__); \
	EXPECT_LT(0U, traced(self->trace, event ": ", words)) \
		TH_LOG("  no %s with %s", event, words); \
} while (0)

TEST_F(verdict, each_event_is_traced)
{
	const struct mock *src = &self->src, *dst = &self->dst;
	bool pre_copy = src->dev.flags & VFIO_MIGRATION_PRE_COPY;
	const char *why = trace_begin(_metadata, self);
	__u64 bitmap = 0;

	if (why)
		SKIP(return, "%s", why);
	/* Before the first state change. */
	ASSERT_EQ(0, mig_reset(&src->dev));
	migrate(_metadata, self);
	if (mock_has_log()) {
		write_logged_page(_metadata, &self->dst);
		ASSERT_EQ(0, mig_log_report(&dst->dev, 0, 16 * PAGE, PAGE, &bitmap));
		ASSERT_EQ(0, mig_log_stop(&dst->dev));
	}
	ASSERT_EQ(0, mig_reset(&src->dev));
	trace_end(_metadata, self);

	EXPECT_TRACED(src, "vfio_arc", "from=STOP_COPY to=STOP result=0 ns=");
	EXPECT_TRACED(src, "vfio_session_end", "state=STOP_COPY");
	EXPECT_TRACED(dst, "vfio_session_begin", "state=RESUMING");
	EXPECT_TRACED(dst, "vfio_session_end", "state=RESUMING");
	EXPECT_TRACED(src, "vfio_read", "result=0");
	EXPECT_TRACED(src, "vfio_reset", "from=RUNNING result=0");
	EXPECT_TRACED(src, "vfio_reset", "from=STOP result=0");
	EXPECT_TRACED(dst, "vfio_write", "result=%zu", self->image.len);
	if (mock_has_log()) {
		EXPECT_TRACED(dst, "vfio_log_start", "result=0");
		EXPECT_TRACED(dst, "vfio_log_report", "result=0");
		EXPECT_TRACED(dst, "vfio_log_stop", "result=0");
	}
	EXPECT_TRACED(src, "vfio_session_begin", "state=%s", pre_copy ? "PRE_COPY" : "STOP_COPY");
	if (pre_copy) {
		EXPECT_TRACED(src, "vfio_read", "result=%d", -ENOMSG);
		EXPECT_TRACED(src, "vfio_precopy_info", "initial_bytes=");
	}
	EXPECT_EQ(0U, traced(self->trace, "vfio_", "device= "));
}

TEST_F(verdict, each_session_that_begins_ends)
{
	const char *why = trace_begin(_metadata, self);
	const struct mig_device *dev = &self->src.dev;
	unsigned int begin, states, failures = 0;
	struct injector in = {};
	struct nth nth;
	int fd, ret;

	if (why)
		SKIP(return, "%s", why);
	if (fail_open(&in, &why))
		SKIP(return, "%s", why);
	for (states = 0; states < 2; states++) {
		move_on(_metadata, dev, MIG_STOP);
		for (nth_start(&nth, _metadata, "a session", &in, true); nth_next(&nth);) {
			nth_begin(&nth);
			ret = mig_set_state(dev, states ? MIG_RESUMING : MIG_STOP_COPY, &fd);
			nth_end(&nth, ret);
			failures += ret != 0;
			if (!ret)
				close(fd);
			ASSERT_EQ(0, mig_reset(dev));
			move_on(_metadata, dev, MIG_STOP);
		}
	}
	injector_close(&in);
	trace_end(_metadata, self);
	EXPECT_LT(0U, failures);
	begin = traced(self->trace, "vfio_session_begin: ", "");
	EXPECT_LT(2U, begin)
		TH_LOG("  no session began that failed");
	EXPECT_EQ(begin, traced(self->trace, "vfio_session_end: ", ""));
}

MIG_HARNESS_MAIN(mock_options)
