/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the test programs on top of kselftest_harness.h: failure messages that
 * quote the promise, and the steps that every test takes.
 */
#ifndef MIG_TEST_H
#define MIG_TEST_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kselftest_harness.h"
#include "mig.h"

/* Follows an EXPECT or ASSERT: the promise that the failure breaks. */
#define PROMISE(fmt, ...) TH_LOG("  promise broken: " fmt, ##__VA_ARGS__)
/* The same for a step that is not the subject of the test. */
#define STEP(fmt, ...) TH_LOG("  could not " fmt, ##__VA_ARGS__)

/* Expects a system call to fail with @want. */
#define EXPECT_ERRNO(want, call)	EXPECT_EQ(want, (call) == -1 ? errno : 0)

/* Writes one word to a file in sysfs, procfs or debugfs; 0 or -errno. */
static inline int write_word(const char *path, const char *word)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), ret;

	if (fd < 0)
		return -errno;
	ret = write(fd, word, strlen(word)) < 0 ? -errno : 0;
	close(fd);
	return ret;
}

/* Discards the content of a file; 0 or -errno. */
static inline int clear_file(const char *path)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC | O_TRUNC);

	return fd < 0 ? -errno : close(fd);
}

/* The number of repetitions: @usual, multiplied by the option rounds. */
static inline unsigned int mig_times(unsigned int usual)
{
	return mig_number("rounds", 1) * usual;
}

/* For slow machines: the option patience multiplies the timeout of each test. */
#define MIG_BE_PATIENT() do {							\
	struct __fixture_metadata *__f;						\
	struct __test_metadata *__t;						\
										\
	for (__f = __fixture_list; __f; __f = __f->next)			\
		for (__t = __f->tests; __t; __t = __t->next)			\
			__t->timeout *= mig_patience();				\
} while (0)

/* main() of a test program with these options. */
#define MIG_HARNESS_MAIN(options)						\
	int main(int argc, char **argv)						\
	{									\
		argc = mig_take_options(argc, argv, options);			\
		MIG_BE_PATIENT();						\
		return test_harness_run(argc, argv);				\
	}

/* Opens a device for a fixture; a device without migration skips the test. */
#define OPEN_OR_SKIP(dev, path, backend) do {					\
	int __ret;								\
										\
	if (!(path))								\
		SKIP(return, "no device given");	\
	__ret = mig_open(dev, path, backend);					\
	if (__ret == -EOPNOTSUPP)						\
		SKIP(return, "backend not available: %s", (dev)->why);		\
	ASSERT_EQ(0, __ret)							\
		STEP("open the device: %s", (dev)->why);			\
	if (!((dev)->flags & VFIO_MIGRATION_STOP_COPY))				\
		SKIP(return, "the device does not claim VFIO_MIGRATION_STOP_COPY"); \
} while (0)

/* The variants of a fixture: a device of each backend. */
#define MIG_EACH_BACKEND(fixture)						\
	FIXTURE_VARIANT(fixture) { enum mig_backend backend; };			\
	FIXTURE_VARIANT_ADD(fixture, group) { .backend = MIG_GROUP };		\
	FIXTURE_VARIANT_ADD(fixture, iommufd) { .backend = MIG_IOMMUFD }

#define NEED_OPTION(name) do {							\
	if (!mig_option(name))							\
		SKIP(return, "no --%s", name);					\
} while (0)

#define NEED(dev, flag, name) do {						\
	if (((dev)->flags & (flag)) != (flag))					\
		SKIP(return, "the device does not claim " name);		\
} while (0)
#define NEED_PRE_COPY(dev) NEED(dev, VFIO_MIGRATION_PRE_COPY, "VFIO_MIGRATION_PRE_COPY")
#define NEED_P2P(dev) NEED(dev, VFIO_MIGRATION_P2P, "VFIO_MIGRATION_P2P")

/* Expects the device to be in @want. */
static inline void expect_state(struct __test_metadata *_metadata,
				const struct mig_device *dev, __u32 want,
				const char *when)
{
	__u32 state;

	ASSERT_EQ(0, mig_get_state(dev, &state))
		STEP("get the state %s", when);
	EXPECT_EQ(want, state)
		TH_LOG("  %s: the state is %s instead of %s", when,
		       mig_state_name(state), mig_state_name(want));
}

/* Returns to RUNNING without a session, by a reset if possible. */
static inline void go_home(struct __test_metadata *_metadata,
			   const struct mig_device *dev)
{
	__u32 state;

	ASSERT_EQ(0, mig_get_state(dev, &state))
		STEP("get the state");
	if (state == MIG_RUNNING)
		return;
	if (mig_reset(dev)) {
		ASSERT_EQ(0, mig_set_state(dev, MIG_RUNNING, NULL))
			STEP("return from %s to RUNNING", mig_state_name(state));
	}
	expect_state(_metadata, dev, MIG_RUNNING, "after the return to RUNNING");
}

/* Goes from RUNNING to @state; returns the descriptor of the session or -1. */
static inline int go(struct __test_metadata *_metadata,
		     const struct mig_device *dev, __u32 state)
{
	int fd;

	go_home(_metadata, dev);
	ASSERT_EQ(0, mig_set_state(dev, state, &fd))
		STEP("go from RUNNING to %s", mig_state_name(state));
	if (mig_fsm_saving(state) || state == MIG_RESUMING) {
		ASSERT_LE(0, fd)
			PROMISE("the arc into %s will return a new data_fd",
				mig_state_name(state));
	}
	return fd;
}

/* Continues to @state; SET_STATE must succeed and return no descriptor. */
static inline void move_on(struct __test_metadata *_metadata,
			   const struct mig_device *dev, __u32 state)
{
	int fd, ret;

	ret = mig_set_state(dev, state, &fd);
	ASSERT_EQ(0, ret)
		STEP("continue to %s: %s", mig_state_name(state), strerror(-ret));
	EXPECT_EQ(-1, fd)
		PROMISE("no new session starts on this arc to %s",
			mig_state_name(state));
}

/* Loads a whole image into a descriptor of RESUMING. */
static inline void load_all(struct __test_metadata *_metadata, int fd,
			    const struct mig_stream *image)
{
	int ret = mig_load(fd, image->data, image->len, 0, NULL);

	ASSERT_EQ(0, ret)
		STEP("load a good image: %s", strerror(-ret));
}

/* An upper bound for any valid stream of this device. */
static inline size_t stream_limit(const struct mig_device *dev)
{
	__u64 size = 0;

	mig_data_size(dev, &size);
	return 2 * size + (64 << 20);
}

/* Takes a whole image of the stopped device, and returns it to RUNNING. */
static inline void take_image(struct __test_metadata *_metadata,
			      const struct mig_device *dev, struct mig_stream *image)
{
	int fd = go(_metadata, dev, MIG_STOP_COPY);
	int ret;

	image->len = 0;
	ret = mig_save(fd, image, stream_limit(dev));
	ASSERT_EQ(0, ret)
		STEP("save an image: %s after %zu bytes", strerror(-ret), image->len);
	ASSERT_LT(0U, image->len)
		PROMISE("End of stream on the FD indicates the entire device state has been transferred");
	close(fd);
	go_home(_metadata, dev);
}

/* Loads a good image and runs the device. */
static inline void load_and_run(struct __test_metadata *_metadata,
				const struct mig_device *dev,
				const struct mig_stream *image, size_t chunk)
{
	size_t done;
	int fd, ret;

	fd = go(_metadata, dev, MIG_RESUMING);
	ret = mig_load(fd, image->data, image->len, chunk, &done);
	ASSERT_EQ(0, ret)
		PROMISE("a good image loads in pieces of %zu bytes; write() said %s after %zu of %zu bytes",
			chunk, strerror(-ret), done, image->len);
	ret = mig_set_state(dev, MIG_STOP, NULL);
	ASSERT_EQ(0, ret)
		PROMISE("a good image loaded in pieces of %zu bytes is accepted at RESUMING -> STOP: %s",
			chunk, strerror(-ret));
	move_on(_metadata, dev, MIG_RUNNING);
	close(fd);
}

/* A thread that sleeps in poll() until it is woken. */
struct poller {
	pthread_t thread;
	int fd;
	atomic_int tid;
	atomic_bool done;
	int revents;
};

static inline void *poller_main(void *arg)
{
	struct poller *p = arg;

	atomic_store(&p->tid, gettid());
	p->revents = mig_poll(p->fd, POLLIN, -1);
	atomic_store(&p->done, true);
	return NULL;
}

/* Returns when the thread sleeps, or has ended. */
static inline void wait_until_asleep(struct poller *p)
{
	char path[64], line[256], *paren;
	FILE *file;
	size_t len;

	while (!atomic_load(&p->done)) {
		usleep(1000);
		if (!atomic_load(&p->tid))
			continue;
		snprintf(path, sizeof(path), "/proc/self/task/%d/stat",
			 atomic_load(&p->tid));
		file = fopen(path, "r");
		if (!file)
			continue;
		len = fread(line, 1, sizeof(line) - 1, file);
		fclose(file);
		line[len] = 0;
		paren = strrchr(line, ')');
		/* D: a killable wait. */
		if (paren && (!strncmp(paren, ") S", 3) || !strncmp(paren, ") D", 3)))
			break;
	}
}

static inline void poller_start(struct __test_metadata *_metadata,
				struct poller *p, int fd)
{
	*p = (struct poller){ .fd = fd };
	ASSERT_EQ(0, pthread_create(&p->thread, NULL, poller_main, p));
	wait_until_asleep(p);
}

/* Waits for the end of a thread; false if it does not end. */
static inline bool joined(pthread_t thread)
{
	struct timespec deadline;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += mig_hang_seconds();
	return !pthread_timedjoin_np(thread, NULL, &deadline);
}

/*
 * The events that woke the poller; 0 if it was not woken. A poll() with a timeout
 * would be no test: it checks the events again when the time is over.
 */
static inline int poller_join(struct poller *p)
{
	return joined(p->thread) ? p->revents : 0;
}

static inline bool hang_is_over(const struct timespec *start)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > start->tv_sec + mig_hang_seconds();
}

/* Waits until @condition holds, and fails the test if it never does. */
#define WAIT_FOR(condition, fmt, ...) do {					\
	struct timespec __start;						\
	bool __met;								\
										\
	clock_gettime(CLOCK_MONOTONIC, &__start);				\
	while (!(__met = (condition)) && !hang_is_over(&__start))		\
		usleep(100);							\
	ASSERT_TRUE(__met)							\
		PROMISE(fmt, ##__VA_ARGS__);					\
} while (0)

/* Is the process in a wait that only its end or SIGKILL interrupts? */
static inline bool sleeps_uninterruptibly(pid_t pid)
{
	char path[64], line[256] = {}, *paren;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "r");
	if (!file)
		return false;
	paren = fgets(line, sizeof(line), file) ? strrchr(line, ')') : NULL;
	fclose(file);
	return paren && !strncmp(paren, ") D", 3);
}

#endif /* MIG_TEST_H */
