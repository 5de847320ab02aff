// SPDX-License-Identifier: GPL-2.0
/*
 * The device vfio_fw, whose firmware is slow and fails: each failure has the errno
 * and leads to the state that the uAPI promises, and nothing but the user of the
 * data_fd waits for the firmware.
 *
 *	./vfio_fw_test --module /path/to/vfio_mock.ko
 *
 * vfio_fw.ko is in the directory of that module. run_mock.sh runs this.
 */
#include <limits.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "mock.h"

#define fw_data		FIXTURE_DATA(fw)

/* Commands of the firmware, as in the files refuse and hang. */
#define QUERY		1
#define SUSPEND		2
#define RESUME		4
#define SAVE		8
#define LOAD		16

/* No time limit of a test is that long: the firmware does not answer. */
#define FOR_EVER	"3000000"

/* In bytes: all of BAR0, and the header of a record with its length at offset 8. */
#define MEMORY		(64 << 10)
#define HEADER		16

FIXTURE(fw)
{
	struct guest src, dst;
	bool loaded;
};

MIG_EACH_BACKEND(fw);

/* Writes a setting of a device on its host. */
static void set(struct __test_metadata *_metadata, const struct guest *g,
		const char *name, const char *value)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/%s", g->path, name);
	ASSERT_EQ(0, write_word(path, value))
		STEP("write %s to %s", value, path);
}

static void set_commands(struct __test_metadata *_metadata, const struct guest *g,
			 const char *name, unsigned int commands)
{
	char text[16];

	snprintf(text, sizeof(text), "%u", commands);
	set(_metadata, g, name, text);
}

/* The next commands of these kinds are refused. */
#define REFUSE(g, commands)	set_commands(_metadata, g, "refuse", commands)

/* They never end; the driver gives up after @timeout ms. */
#define HANG(g, commands, timeout) do {						\
	set(_metadata, g, "timeout_ms", timeout);				\
	set_commands(_metadata, g, "hang", commands);				\
} while (0)

static void create_and_open(struct __test_metadata *_metadata, struct guest *g,
			    enum mig_backend backend)
{
	ASSERT_EQ(0, mock_create(g, "/sys/class/mdev_bus/vfio_fw/mdev_supported_types/vfio_fw-64K"))
		STEP("create a device of vfio_fw");
	ASSERT_EQ(0, mig_open(&g->dev, g->path, backend))
		STEP("open the device: %s", g->dev.why);
}

FIXTURE_SETUP(fw)
{
	const char *module = mig_option("module");
	char path[PATH_MAX];
	int fd;

	self->src.dev.fd = -1;
	self->dst.dev.fd = -1;
	if (variant->backend == MIG_IOMMUFD && access("/dev/iommu", F_OK))
		SKIP(return, "no iommufd");
	if (!module)
		SKIP(return, "no --module");
	if (access("/sys/module/vfio_fw", F_OK)) {
		snprintf(path, sizeof(path), "%.*s/vfio_fw.ko",
			 (int)(strrchr(module, '/') - module), module);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			SKIP(return, "vfio_fw.ko is not built");
		ASSERT_EQ(0, syscall(SYS_finit_module, fd, "", 0))
			STEP("load %s: %s", path, strerror(errno));
		close(fd);
		self->loaded = true;
	}
	create_and_open(_metadata, &self->src, variant->backend);
	create_and_open(_metadata, &self->dst, variant->backend);
}

FIXTURE_TEARDOWN(fw)
{
	struct guest *guests[] = { &self->src, &self->dst };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(guests); i++) {
		if (guests[i]->dev.fd < 0)
			continue;
		mig_close(&guests[i]->dev);
		EXPECT_EQ(0, write_word(guests[i]->remove, "1"));
	}
	if (self->loaded)
		EXPECT_EQ(0, syscall(SYS_delete_module, "vfio_fw", 0))
			STEP("unload vfio_fw: %s", strerror(errno));
}

#define EXPECT_STATE(g, want, when)	expect_state(_metadata, &(g)->dev, want, when)

static void fill_all(struct __test_metadata *_metadata, const struct guest *g, __u8 value)
{
	static __u8 bytes[MEMORY];

	memset(bytes, value, sizeof(bytes));
	ASSERT_EQ(MEMORY, mig_region_write(&g->dev, BAR0, 0, bytes, sizeof(bytes)));
}

static void expect_filled(struct __test_metadata *_metadata, const struct guest *g,
			  __u8 value, const char *when)
{
	static __u8 bytes[MEMORY];
	int i;

	ASSERT_EQ(MEMORY, mig_region_read(&g->dev, BAR0, 0, bytes, sizeof(bytes)));
	for (i = 0; i < MEMORY && bytes[i] == value; i++)
		;
	EXPECT_EQ(MEMORY, i)
		TH_LOG("  %s: byte %d of the memory is %#x instead of %#x", when, i, bytes[i],
		       value);
}

/* Reads to the end of the stream, and waits for the firmware. */
static void save_all(struct __test_metadata *_metadata, int fd, struct mig_stream *stream,
		     int end)
{
	ASSERT_EQ(end, mig_save(fd, stream, 1 << 20));
}

/* The device works: it can be written, and its content migrates. */
static void expect_works(struct __test_metadata *_metadata, fw_data *self, const char *when)
{
	struct mig_stream image = {};

	EXPECT_STATE(&self->src, MIG_RUNNING, when);
	fill_all(_metadata, &self->src, 0x5a);
	expect_filled(_metadata, &self->src, 0x5a, when);
	take_image(_metadata, &self->src.dev, &image);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_filled(_metadata, &self->dst, 0x5a, when);
	mig_stream_free(&image);
}

/* Only a reset leaves ERROR, and after it the device works. */
static void expect_broken(struct __test_metadata *_metadata, fw_data *self,
			  struct guest *g, const char *when)
{
	EXPECT_STATE(g, MIG_ERROR, when);
	EXPECT_EQ(-EINVAL, mig_set_state(&g->dev, MIG_RUNNING, NULL))
		PROMISE("%s: only a reset leaves ERROR", when);
	set_commands(_metadata, g, "refuse", 0);
	set_commands(_metadata, g, "hang", 0);
	ASSERT_EQ(0, mig_reset(&g->dev))
		PROMISE("%s: a reset leaves ERROR", when);
	expect_works(_metadata, self, when);
}

/* ---- Commands that a state change waits for ---- */

TEST_F(fw, refused_suspend_changes_nothing)
{
	struct guest *g = &self->src;

	REFUSE(g, SUSPEND);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_RUNNING_P2P, NULL));
	EXPECT_STATE(g, MIG_RUNNING, "after a refused SUSPEND");
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP, NULL));
	EXPECT_STATE(g, MIG_RUNNING, "after a refused SUSPEND on the way to STOP");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING_P2P, NULL));
	REFUSE(g, SUSPEND);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP, NULL));
	EXPECT_STATE(g, MIG_RUNNING_P2P, "after the second SUSPEND was refused");
	fill_all(_metadata, g, 1);
	expect_filled(_metadata, g, 1, "in RUNNING_P2P");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	expect_works(_metadata, self, "after refused commands");
}

TEST_F(fw, suspend_that_times_out_leads_to_error)
{
	struct guest *g = &self->src;

	HANG(g, SUSPEND, "10");
	EXPECT_EQ(-ETIMEDOUT, mig_set_state(&g->dev, MIG_RUNNING_P2P, NULL));
	expect_broken(_metadata, self, g, "after SUSPEND of the initiator");
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY_P2P, NULL));
	HANG(g, SUSPEND, "10");
	EXPECT_EQ(-ETIMEDOUT, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	expect_broken(_metadata, self, g, "after SUSPEND of the responder");
}

TEST_F(fw, refused_resume_changes_nothing)
{
	struct guest *g = &self->src;

	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP, NULL));
	REFUSE(g, RESUME);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	EXPECT_STATE(g, MIG_STOP, "after a refused RESUME");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING_P2P, NULL));
	REFUSE(g, RESUME);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	EXPECT_STATE(g, MIG_RUNNING_P2P, "after the second RESUME was refused");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	expect_works(_metadata, self, "after refused commands");
}

TEST_F(fw, resume_that_times_out_leads_to_error)
{
	struct guest *g = &self->src;

	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP, NULL));
	HANG(g, RESUME, "10");
	EXPECT_EQ(-ETIMEDOUT, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	expect_broken(_metadata, self, g, "after RESUME of the responder");
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING_P2P, NULL));
	HANG(g, RESUME, "10");
	EXPECT_EQ(-ETIMEDOUT, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	expect_broken(_metadata, self, g, "after RESUME of the initiator");
}

/* A state change by another process. */
static pid_t change_state(struct __test_metadata *_metadata, const struct guest *g,
			  __u32 state)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid)
		_exit(-mig_set_state(&g->dev, state, NULL));
	return pid;
}

TEST_F_TIMEOUT(fw, state_change_that_waits_for_the_firmware_can_be_killed, 60)
{
	struct guest *g = &self->src;
	pid_t pid;

	HANG(g, SUSPEND, FOR_EVER);
	pid = change_state(_metadata, g, MIG_RUNNING_P2P);
	WAIT_FOR(sleeps_uninterruptibly(pid), "SET_STATE waits for SUSPEND");
	EXPECT_STATE(g, MIG_RUNNING, "during SUSPEND");
	ASSERT_EQ(0, kill(pid, SIGKILL));
	WAIT_FOR(waitpid(pid, NULL, WNOHANG) == pid,
		 "a state change that waits for the firmware can be killed");
	set(_metadata, g, "timeout_ms", "2000");
	expect_broken(_metadata, self, g, "after a killed SUSPEND");
}

/* ---- QUERY ---- */

TEST_F(fw, refused_query_begins_no_session)
{
	struct guest *g = &self->src;
	int fd;

	REFUSE(g, QUERY);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	EXPECT_EQ(-1, fd);
	EXPECT_STATE(g, MIG_RUNNING, "without PRE_COPY");
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP_COPY, &fd));
	EXPECT_EQ(-1, fd);
	EXPECT_STATE(g, MIG_STOP, "without STOP_COPY");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING, NULL));
	expect_works(_metadata, self, "after refused commands");
}

TEST_F(fw, refused_query_fails_the_sizes)
{
	struct vfio_precopy_info info;
	struct guest *g = &self->src;
	__u64 size;
	int fd;

	REFUSE(g, QUERY);
	EXPECT_EQ(-EIO, mig_data_size(&g->dev, &size))
		PROMISE("a size that the firmware does not tell is not invented");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	REFUSE(g, QUERY);
	EXPECT_EQ(-EIO, mig_precopy_info(fd, &info))
		PROMISE("the user is not told that nothing is left");
	EXPECT_EQ(-EIO, mig_data_size(&g->dev, &size));
	EXPECT_STATE(g, MIG_PRE_COPY, "after a failed PRECOPY_INFO");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_LT((__u64)MEMORY, info.initial_bytes);
	EXPECT_EQ(0, mig_data_size(&g->dev, &size));
	close(fd);
}

TEST_F(fw, refused_query_keeps_pre_copy)
{
	struct mig_stream image = {};
	struct guest *g = &self->src;
	int fd;

	fill_all(_metadata, g, 1);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY_P2P, &fd));
	save_all(_metadata, fd, &image, -ENOMSG);
	fill_all(_metadata, g, 2);
	REFUSE(g, QUERY);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	EXPECT_STATE(g, MIG_PRE_COPY_P2P, "after a refused QUERY");
	fill_all(_metadata, g, 3);
	expect_filled(_metadata, g, 3, "after SUSPEND was undone");
	REFUSE(g, 0);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	save_all(_metadata, fd, &image, 0);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_filled(_metadata, &self->dst, 3, "on the target");
	close(fd);
	mig_stream_free(&image);
}

TEST_F(fw, failure_to_undo_leads_to_error)
{
	struct guest *g = &self->src;
	__u8 byte;
	int fd;

	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY_P2P, &fd));
	REFUSE(g, QUERY | RESUME);
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	EXPECT_ERRNO(ENODEV, read(fd, &byte, 1));
	expect_broken(_metadata, self, g, "after a refused QUERY and RESUME");
	close(fd);
}

TEST_F(fw, query_that_times_out_leads_to_error)
{
	struct guest *g = &self->src;
	__u64 size;

	HANG(g, QUERY, "10");
	EXPECT_EQ(-ETIMEDOUT, mig_data_size(&g->dev, &size));
	EXPECT_STATE(g, MIG_RUNNING, "after a size");
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP_COPY, NULL))
		PROMISE("firmware that has not answered is not waited for again");
	expect_broken(_metadata, self, g, "after QUERY");
}

/* ---- SAVE ---- */

TEST_F(fw, refused_save_fails_one_read)
{
	struct mig_stream image = {};
	struct guest *g = &self->src;
	int fd;

	fill_all(_metadata, g, 1);
	REFUSE(g, SAVE);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0))
		PROMISE("poll() announces the failure");
	EXPECT_EQ(-EIO, mig_read(fd, &image, 4096));
	EXPECT_EQ(POLLIN, mig_poll(fd, POLLIN, 0));
	EXPECT_STATE(g, MIG_PRE_COPY, "after a failed read()");
	REFUSE(g, 0);
	/* The last read() has asked the firmware again. */
	EXPECT_EQ(-EIO, mig_read(fd, &image, 4096));
	save_all(_metadata, fd, &image, -ENOMSG);
	fill_all(_metadata, g, 2);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	save_all(_metadata, fd, &image, 0);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_filled(_metadata, &self->dst, 2, "after a session with failures");
	close(fd);
	mig_stream_free(&image);
}

TEST_F(fw, refused_last_save_fails_one_read)
{
	struct mig_stream image = {};
	struct guest *g = &self->src;
	int fd;

	fill_all(_metadata, g, 1);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	save_all(_metadata, fd, &image, -ENOMSG);
	fill_all(_metadata, g, 2);
	REFUSE(g, SAVE);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	EXPECT_EQ(-EIO, mig_read(fd, &image, 4096));
	REFUSE(g, 0);
	EXPECT_EQ(-EIO, mig_read(fd, &image, 4096));
	EXPECT_STATE(g, MIG_STOP_COPY, "after a failed read()");
	save_all(_metadata, fd, &image, 0);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_filled(_metadata, &self->dst, 2, "after a session with failures");
	close(fd);
	mig_stream_free(&image);
}

TEST_F(fw, save_that_times_out_leads_to_error)
{
	struct mig_stream image = {};
	struct guest *g = &self->src;
	int fd;

	HANG(g, SAVE, "10");
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	EXPECT_EQ(-ETIMEDOUT, mig_read(fd, &image, 4096));
	EXPECT_EQ(-EIO, mig_read(fd, &image, 4096))
		PROMISE("firmware that has not answered is not waited for again");
	EXPECT_STATE(g, MIG_PRE_COPY, "after failed reads");
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_PRE_COPY_P2P, NULL));
	EXPECT_EQ(-ENODEV, mig_read(fd, &image, 4096));
	expect_broken(_metadata, self, g, "after SAVE");
	close(fd);
	mig_stream_free(&image);
}

/* A thread that makes one call to a data_fd. */
struct user {
	struct poller poller;
	const struct mig_stream *stream;
	size_t from;
	int ret;
};

static void *read_main(void *arg)
{
	struct user *u = arg;
	__u8 byte;

	atomic_store(&u->poller.tid, gettid());
	u->ret = read(u->poller.fd, &byte, 1) < 0 ? -errno : 0;
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void *write_main(void *arg)
{
	struct user *u = arg;

	atomic_store(&u->poller.tid, gettid());
	u->ret = write(u->poller.fd, u->stream->data + u->from, u->stream->len - u->from);
	if (u->ret < 0)
		u->ret = -errno;
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void begin(struct __test_metadata *_metadata, struct user *u, int fd,
		  void *(*what)(void *))
{
	u->poller = (struct poller){ .fd = fd };
	ASSERT_EQ(0, pthread_create(&u->poller.thread, NULL, what, u));
	wait_until_asleep(&u->poller);
}

TEST_F_TIMEOUT(fw, nothing_waits_for_save, 60)
{
	struct vfio_precopy_info info;
	struct guest *g = &self->src;
	struct user reader = {};
	__u8 byte;
	int fd;

	HANG(g, SAVE, FOR_EVER);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	EXPECT_ERRNO(EAGAIN, read(fd, &byte, 1));
	ASSERT_EQ(0, fcntl(fd, F_SETFL, 0));
	begin(_metadata, &reader, fd, read_main);
	EXPECT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_LT((__u64)MEMORY, info.initial_bytes)
		PROMISE("an image that the firmware has not finished is announced");
	EXPECT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY_P2P, NULL));
	EXPECT_EQ(0, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	EXPECT_FALSE(atomic_load(&reader.poller.done));
	ASSERT_EQ(0, mig_reset(&g->dev))
		PROMISE("a reset does not wait for the firmware");
	ASSERT_TRUE(joined(reader.poller.thread))
		PROMISE("a reset wakes the reader");
	EXPECT_EQ(-ENODEV, reader.ret);
	close(fd);
	set_commands(_metadata, g, "hang", 0);
	expect_works(_metadata, self, "after a reset during SAVE");
}

/* ---- LOAD ---- */

/* Prepares a stream of two images; the source was filled with 2. */
static void save_two_images(struct __test_metadata *_metadata, fw_data *self,
			    struct mig_stream *stream, size_t *first)
{
	struct guest *g = &self->src;
	__u64 length;
	int fd;

	fill_all(_metadata, g, 1);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_PRE_COPY, &fd));
	save_all(_metadata, fd, stream, -ENOMSG);
	*first = stream->len;
	memcpy(&length, stream->data + 8, sizeof(length));
	ASSERT_EQ(HEADER + length, stream->len);
	fill_all(_metadata, g, 2);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_STOP_COPY, NULL));
	save_all(_metadata, fd, stream, 0);
	close(fd);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RUNNING, NULL));
}

static void on_signal(int number)
{
	(void)number;
}

TEST_F_TIMEOUT(fw, nothing_waits_for_load, 60)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct mig_stream stream = {};
	struct guest *g = &self->dst;
	struct user writer = { .stream = &stream };
	size_t first;
	int fd;

	save_two_images(_metadata, self, &stream, &first);
	HANG(g, LOAD, FOR_EVER);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RESUMING, &fd));
	EXPECT_EQ(POLLOUT, mig_poll(fd, POLLOUT, 0));
	EXPECT_EQ((ssize_t)first, write(fd, stream.data, stream.len))
		PROMISE("write() returns what the device has taken");
	EXPECT_EQ(0, mig_poll(fd, POLLOUT, 0))
		PROMISE("poll() agrees with write()");
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	EXPECT_ERRNO(EAGAIN, write(fd, stream.data + first, stream.len - first));
	ASSERT_EQ(0, fcntl(fd, F_SETFL, 0));

	writer.from = first;
	begin(_metadata, &writer, fd, write_main);
	EXPECT_FALSE(atomic_load(&writer.poller.done));
	ASSERT_EQ(0, sigaction(SIGUSR1, &action, NULL));
	ASSERT_EQ(0, pthread_kill(writer.poller.thread, SIGUSR1));
	ASSERT_TRUE(joined(writer.poller.thread))
		PROMISE("a signal ends the wait of a write()");
	EXPECT_EQ(-EINTR, writer.ret);

	begin(_metadata, &writer, fd, write_main);
	EXPECT_EQ(-EINVAL, mig_set_state(&g->dev, MIG_STOP, NULL))
		PROMISE("an incomplete image is refused without waiting for the firmware");
	EXPECT_STATE(g, MIG_RESUMING, "after an incomplete image");
	EXPECT_FALSE(atomic_load(&writer.poller.done));
	ASSERT_EQ(0, mig_reset(&g->dev))
		PROMISE("a reset does not wait for the firmware");
	ASSERT_TRUE(joined(writer.poller.thread))
		PROMISE("a reset wakes the writer");
	EXPECT_EQ(-ENODEV, writer.ret);
	close(fd);

	set_commands(_metadata, g, "hang", 0);
	load_and_run(_metadata, &g->dev, &stream, 0);
	expect_filled(_metadata, g, 2, "after a reset during LOAD");
	mig_stream_free(&stream);
}

/* The next image is taken when LOAD of the previous one has ended. */
TEST_F_TIMEOUT(fw, slow_firmware_migrates, 60)
{
	static const size_t chunks[] = { 0, 1000, 70000 };
	struct mig_stream stream = {};
	size_t first;
	unsigned int i;

	set(_metadata, &self->src, "delay_ms", "20");
	set(_metadata, &self->dst, "delay_ms", "20");
	save_two_images(_metadata, self, &stream, &first);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		load_and_run(_metadata, &self->dst.dev, &stream, chunks[i]);
		expect_filled(_metadata, &self->dst, 2, "on the target");
		ASSERT_EQ(0, mig_reset(&self->dst.dev));
	}
	mig_stream_free(&stream);
}

TEST_F(fw, refused_load_is_final)
{
	struct mig_stream stream = {};
	struct guest *g = &self->dst;
	size_t first;
	int fd;

	save_two_images(_metadata, self, &stream, &first);
	REFUSE(g, LOAD);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RESUMING, &fd));
	EXPECT_EQ(-EIO, mig_load(fd, stream.data, stream.len, first, NULL));
	REFUSE(g, 0);
	EXPECT_EQ(POLLOUT, mig_poll(fd, POLLOUT, 0));
	EXPECT_ERRNO(EIO, write(fd, stream.data, stream.len));
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP, NULL))
		PROMISE("a device with half a state does not run");
	EXPECT_STATE(g, MIG_RESUMING, "after a refused LOAD");
	ASSERT_EQ(0, mig_reset(&g->dev));
	expect_filled(_metadata, g, 0, "after a reset");
	load_and_run(_metadata, &g->dev, &stream, 0);
	expect_filled(_metadata, g, 2, "after another load");
	close(fd);
	mig_stream_free(&stream);
}

/* The answer to the last LOAD comes before the end of the stream is taken. */
TEST_F(fw, refused_last_load_is_final)
{
	struct mig_stream stream = {};
	struct guest *g = &self->dst;
	size_t first, second;
	__u64 length;
	int fd;

	save_two_images(_metadata, self, &stream, &first);
	memcpy(&length, stream.data + first + 8, sizeof(length));
	second = first + HEADER + length;
	ASSERT_LT(second, stream.len);
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RESUMING, &fd));
	ASSERT_EQ(0, mig_load(fd, stream.data, second - 1, 0, NULL));
	REFUSE(g, LOAD);
	EXPECT_EQ(1, write(fd, stream.data + second - 1, 1));
	REFUSE(g, 0);
	EXPECT_EQ(-EINVAL, mig_set_state(&g->dev, MIG_STOP, NULL));
	EXPECT_ERRNO(EIO, write(fd, stream.data + second, stream.len - second));
	EXPECT_EQ(-EIO, mig_set_state(&g->dev, MIG_STOP, NULL))
		PROMISE("a device with half a state does not run");
	EXPECT_STATE(g, MIG_RESUMING, "after a refused LOAD");
	ASSERT_EQ(0, mig_reset(&g->dev));
	close(fd);
	mig_stream_free(&stream);
	expect_works(_metadata, self, "after a refused LOAD");
}

TEST_F(fw, load_that_times_out_leads_to_error)
{
	struct mig_stream stream = {};
	struct guest *g = &self->dst;
	size_t first;
	int fd;

	save_two_images(_metadata, self, &stream, &first);
	HANG(g, LOAD, "10");
	ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RESUMING, &fd));
	EXPECT_EQ((ssize_t)first, write(fd, stream.data, stream.len));
	EXPECT_ERRNO(ETIMEDOUT, write(fd, stream.data + first, stream.len - first));
	EXPECT_STATE(g, MIG_RESUMING, "after a failed write()");
	EXPECT_EQ(-ETIMEDOUT, mig_set_state(&g->dev, MIG_STOP, NULL));
	EXPECT_ERRNO(ENODEV, write(fd, stream.data, 1));
	expect_broken(_metadata, self, g, "after LOAD");
	close(fd);
	mig_stream_free(&stream);
}

/* The firmware checks its images. */
TEST_F(fw, damaged_image_is_refused)
{
	struct mig_stream stream = {}, bad = {};
	struct guest *g = &self->dst;
	size_t first, at;
	int fd;

	save_two_images(_metadata, self, &stream, &first);
	for (at = HEADER; at < first; at += 4099) {
		ASSERT_EQ(0, mig_stream_copy(&bad, &stream));
		bad.data[at] ^= 1;
		ASSERT_EQ(0, mig_set_state(&g->dev, MIG_RESUMING, &fd));
		EXPECT_EQ(-EINVAL, mig_load(fd, bad.data, bad.len, 0, NULL))
			TH_LOG("  with a damaged byte at %zu", at);
		EXPECT_EQ(-EINVAL, mig_set_state(&g->dev, MIG_STOP, NULL));
		EXPECT_STATE(g, MIG_RESUMING, "after a damaged image");
		ASSERT_EQ(0, mig_reset(&g->dev));
		close(fd);
	}
	mig_stream_free(&bad);
	mig_stream_free(&stream);
}

/* ---- Settings ---- */

TEST_F(fw, invalid_settings_are_refused)
{
	static const struct {
		const char *name, *value, *bad;
	} settings[] = {
		{ "delay_ms", "3600000", "3600001" }, { "timeout_ms", "3600000", "3600001" },
		{ "refuse", "31", "32" }, { "hang", "31", "32" },
	};
	char path[128], text[32] = "";
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(settings); i++) {
		snprintf(path, sizeof(path), "%s/%s", self->src.path, settings[i].name);
		EXPECT_EQ(0, write_word(path, settings[i].value));
		EXPECT_EQ(-EINVAL, write_word(path, settings[i].bad))
			TH_LOG("  %s to %s", settings[i].bad, settings[i].name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		ASSERT_LE(0, fd);
		EXPECT_LT(0, read(fd, text, sizeof(text) - 1));
		close(fd);
		EXPECT_EQ(atoi(settings[i].value), atoi(text));
	}
}

MIG_HARNESS_MAIN(mock_options)
