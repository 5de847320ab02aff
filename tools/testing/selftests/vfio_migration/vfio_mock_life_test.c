// SPDX-License-Identifier: GPL-2.0
/*
 * Lifetimes: every kind of file and mapping of a device, while the device is removed
 * and the module is unloaded; races of both with opening, creating and removing
 * devices; and calls that are stalled by a page fault while everything else is torn
 * down.
 *
 *	./vfio_mock_life_test --module /path/to/vfio_mock.ko
 *
 * with the module loaded and no devices: the tests create their own devices, unload
 * the module, which removes all of its devices, and load that file. Without
 * --module, tests that unload the module skip. run_mock.sh sets it.
 */
#include <dirent.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "mock_dma.h"

#define MODULE		"vfio_mock"
#define PARENT		"/sys/class/mdev_bus/" MODULE
#define TYPE		mock_type(SMALL_PAGES)
#define DEVICES		"/sys/bus/mdev/devices"
#define DRIVER		"/sys/bus/mdev/drivers/" MODULE

#define MSIX		VFIO_PCI_MSIX_IRQ_INDEX
#define REQ		VFIO_PCI_REQ_IRQ_INDEX
#define SET_EVENTFD	(VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER)

#define kept_data	FIXTURE_DATA(kept)
#define life_data	FIXTURE_DATA(life)

/* ---- The module ---- */

/* A number in a file, or -errno. */
static long read_number(const char *path)
{
	char text[32] = "";
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t ret;

	if (fd < 0)
		return -errno;
	ret = read(fd, text, sizeof(text) - 1);
	close(fd);
	return ret < 0 ? -EIO : atol(text);
}

/* The reference count of the module. */
static long references(void)
{
	return read_number("/sys/module/" MODULE "/refcnt");
}

static bool is_loaded(void)
{
	return !access("/sys/module/" MODULE, F_OK);
}

static int unload(void)
{
	return syscall(SYS_delete_module, MODULE, O_NONBLOCK) ? -errno : 0;
}

static int load_module(void)
{
	int fd = open(mig_option("module"), O_RDONLY | O_CLOEXEC), ret;

	if (fd < 0)
		return -errno;
	ret = syscall(SYS_finit_module, fd, "", 0) ? -errno : 0;
	close(fd);
	return ret;
}

/* Checks that the module has no references, and unloads and loads it. */
static void expect_module_is_free(struct __test_metadata *_metadata, const char *when)
{
	ASSERT_EQ(0, references())
		PROMISE("%s: the module has no references", when);
	if (!mig_option("module"))
		return;
	ASSERT_EQ(0, unload())
		PROMISE("%s: the module can be unloaded", when);
	ASSERT_EQ(0, load_module())
		PROMISE("%s: the module can be loaded again", when);
}

/* Checks that the module has references. Only then the attempt to unload it is safe. */
static void expect_module_is_kept(struct __test_metadata *_metadata, const char *by)
{
	ASSERT_LT(0, references())
		PROMISE("%s keeps the module", by);
	if (mig_option("module")) {
		ASSERT_EQ(-EWOULDBLOCK, unload())
			PROMISE("%s: the module cannot be unloaded", by);
	}
}

/* ---- The end of a device or of the module ---- */

/* A thread that removes a device, or unloads the module with all devices. */
struct ending {
	struct poller poller;	/* to find out whether it sleeps */
	const char *file;	/* in sysfs; NULL: unload the module */
	const char *word;	/* to be written to the file */
	atomic_bool let_go;	/* set before the last user closes */
	bool early;		/* it ended before that */
	int ret;
};

static void *ending_main(void *arg)
{
	struct ending *e = arg;

	atomic_store(&e->poller.tid, gettid());
	e->ret = e->file ? write_word(e->file, e->word) : unload();
	e->early = !atomic_load(&e->let_go);
	atomic_store(&e->poller.done, true);
	return NULL;
}

static void ending_start(struct __test_metadata *_metadata, struct ending *e,
			 const char *file, const char *word)
{
	*e = (struct ending){ .file = file, .word = word };
	ASSERT_EQ(0, pthread_create(&e->poller.thread, NULL, ending_main, e));
}

/* These return when the thread waits, or has ended. */
static void removal_start(struct __test_metadata *_metadata, struct ending *e,
			  const struct guest *g)
{
	ending_start(_metadata, e, g->remove, "1");
	wait_until_asleep(&e->poller);
}

static void unloading_start(struct __test_metadata *_metadata, struct ending *e)
{
	ending_start(_metadata, e, NULL, NULL);
	wait_until_asleep(&e->poller);
}

/* Joins the thread after the last user has closed. */
static void ending_join(struct __test_metadata *_metadata, struct ending *e, const char *whom)
{
	const char *what = e->file ? e->file : "unloading the module";

	ASSERT_TRUE(joined(e->poller.thread))
		PROMISE("%s ends after the end of %s", what, whom);
	EXPECT_FALSE(e->early)
		PROMISE("%s waits for %s", what, whom);
	EXPECT_EQ(0, e->ret)
		PROMISE("%s succeeds: %s", what, strerror(-e->ret));
}

/* Removes a device without users. */
static void remove_now(struct __test_metadata *_metadata, const struct guest *g)
{
	struct ending e;

	removal_start(_metadata, &e, g);
	ASSERT_TRUE(joined(e.poller.thread))
		PROMISE("the removal does not wait");
	EXPECT_EQ(0, e.ret);
	EXPECT_EQ(-1, access(g->path, F_OK))
		PROMISE("a removed device has no directory in sysfs");
}

/* Is this a valid errno of an open that comes too late, or second? */
static bool may_refuse(int ret)
{
	switch (-ret) {
	case ENOENT:
	case ENODEV:
	case ENXIO:
	case EBUSY:
	case EINVAL:		/* BIND_IOMMUFD of a device that is open */
	case EOPNOTSUPP:	/* mig_open() with a missing link */
		return true;
	}
	return false;
}

/* ---- References to a device ---- */

enum kind {
	GROUP, CONTAINER, DEVICE, UNBOUND, DATA_FD, MAPPING, EVENTFD, SYSFS, DEBUGFS,
};

FIXTURE(kept)
{
	struct guest g;
	struct mig_device dev;
	int fd;			/* the reference, if it is a file */
	void *map;		/* or a mapping */
	size_t len;
};

FIXTURE_VARIANT(kept)
{
	enum kind kind;
	enum mig_backend backend;
	__u32 state;
	bool keeps_device;	/* the removal waits for its end */
	bool keeps_module;	/* unloading fails, instead of waiting for the devices */
};

FIXTURE_VARIANT_ADD(kept, group) { .kind = GROUP };
FIXTURE_VARIANT_ADD(kept, group_in_container) { .kind = CONTAINER };

FIXTURE_VARIANT_ADD(kept, group_device) {
	.kind = DEVICE, .keeps_device = true, .keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, group_mapping) {
	.kind = MAPPING, .keeps_device = true, .keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, group_eventfd) { .kind = EVENTFD };

FIXTURE_VARIANT_ADD(kept, group_pre_copy) {
	.kind = DATA_FD, .state = MIG_PRE_COPY, .keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, group_stop_copy) {
	.kind = DATA_FD, .state = MIG_STOP_COPY, .keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, group_resuming) {
	.kind = DATA_FD, .state = MIG_RESUMING, .keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, cdev_unbound) {
	.kind = UNBOUND, .backend = MIG_IOMMUFD, .keeps_device = true,
};

FIXTURE_VARIANT_ADD(kept, cdev) {
	.kind = DEVICE, .backend = MIG_IOMMUFD, .keeps_device = true,
	.keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, cdev_mapping) {
	.kind = MAPPING, .backend = MIG_IOMMUFD, .keeps_device = true,
	.keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, cdev_eventfd) { .kind = EVENTFD, .backend = MIG_IOMMUFD };

FIXTURE_VARIANT_ADD(kept, cdev_stop_copy) {
	.kind = DATA_FD, .backend = MIG_IOMMUFD, .state = MIG_STOP_COPY,
	.keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, cdev_resuming) {
	.kind = DATA_FD, .backend = MIG_IOMMUFD, .state = MIG_RESUMING,
	.keeps_module = true,
};

FIXTURE_VARIANT_ADD(kept, sysfs) { .kind = SYSFS };
FIXTURE_VARIANT_ADD(kept, debugfs) { .kind = DEBUGFS };

static bool can_create(void)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/create", TYPE);
	return !access(path, W_OK);
}

/* The number of devices that can still be created. */
static long available(void)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/available_instances", TYPE);
	return read_number(path);
}

/* Creates a device for a fixture, after loading the module if necessary. */
#define CREATE_OR_SKIP(g) do {							\
	if (!is_loaded() && mig_option("module"))				\
		ASSERT_EQ(0, load_module());					\
	if (!can_create())							\
		SKIP(return, "no device can be created: is " MODULE " loaded?"); \
	ASSERT_EQ(0, mock_create(g, TYPE))					\
		STEP("create a device");					\
} while (0)

/* Removes the device of a test; all of its files are closed by now. */
static void remove_rest(const struct guest *g)
{
	if (g->path[0] && !access(g->path, F_OK))
		write_word(g->remove, "1");
}

static int open_debugfs(const struct guest *g)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "/sys/kernel/debug/vfio/%s/migration/state",
		 basename(g->path));
	return open(path, O_RDONLY | O_CLOEXEC);
}

FIXTURE_SETUP(kept)
{
	struct mig_device *dev = &self->dev;
	int ret, eventfds[2];

	self->fd = -1;
	CREATE_OR_SKIP(&self->g);
	switch (variant->kind) {
	case GROUP:
		ret = mig_open_group(dev, self->g.path);
		break;
	case UNBOUND:
		ret = mig_open_unbound(dev, self->g.path);
		break;
	default:
		ret = mig_open(dev, self->g.path, variant->backend);
	}
	if (ret == -EOPNOTSUPP)
		SKIP(return, "backend not available: %s", dev->why);
	ASSERT_EQ(0, ret)
		STEP("open the device: %s", dev->why);

	switch (variant->kind) {
	case GROUP:
	case UNBOUND:
	case DEVICE:
		return;
	case CONTAINER:
		mig_close_device(dev);
		return;
	case DATA_FD:
		if (!mig_fsm_exists(dev->flags, variant->state))
			SKIP(return, "the device does not have this state");
		self->fd = go(_metadata, dev, variant->state);
		break;
	case MAPPING:
		self->len = 16 * PAGE;
		ASSERT_EQ(0, mig_region_map(dev, BAR2, 0, self->len, &self->map));
		memset(self->map, 0x5a, self->len);
		break;
	case EVENTFD:
		self->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		eventfds[0] = self->fd;
		eventfds[1] = self->fd;
		ASSERT_EQ(0, mig_set_irqs(dev, MSIX, SET_EVENTFD, 0, 2, eventfds,
					  sizeof(eventfds)));
		ASSERT_EQ(0, mig_set_irqs(dev, REQ, SET_EVENTFD, 0, 1, eventfds,
					  sizeof(*eventfds)));
		break;
	case SYSFS:
		self->fd = open(self->g.remove, O_WRONLY | O_CLOEXEC);
		ASSERT_LE(0, self->fd);
		break;
	case DEBUGFS:
		self->fd = open_debugfs(&self->g);
		if (self->fd < 0)
			SKIP(return, "the kernel has no CONFIG_VFIO_DEBUGFS");
		break;
	}
	mig_close(dev);
}

FIXTURE_TEARDOWN_PARENT(kept)
{
	remove_rest(&self->g);
}

/* Calls on files of a removed device return, and have no effect. */
static void expect_dead(struct __test_metadata *_metadata, kept_data *self,
			enum kind kind)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	struct vfio_precopy_info info;
	char byte;

	switch (kind) {
	case GROUP:
	case CONTAINER:
		EXPECT_ERRNO(ENODEV, ioctl(self->dev.group, VFIO_GROUP_GET_STATUS, &status))
			PROMISE("the group of a removed device returns ENODEV");
		break;
	case DATA_FD:
		EXPECT_TRUE(mig_fd_is_dead(self->fd))
			PROMISE("the data_fd of a removed device returns ENODEV");
		EXPECT_GT(0, mig_precopy_info(self->fd, &info));
		EXPECT_NE(0, mig_poll(self->fd, POLLIN | POLLOUT, 0));
		break;
	case EVENTFD:
		EXPECT_ERRNO(EAGAIN, read(self->fd, &info, 8))
			PROMISE("a removed device sends no signal");
		break;
	case SYSFS:
		EXPECT_ERRNO(ENODEV, write(self->fd, "1", 1));
		break;
	case DEBUGFS:
		EXPECT_EQ(-1, read(self->fd, &byte, 1));
		break;
	default:
		break;
	}
}

static void let_go(kept_data *self)
{
	if (self->map)
		munmap(self->map, self->len);
	mig_close(&self->dev);
	if (self->fd >= 0)
		close(self->fd);
}

TEST_F_TIMEOUT(kept, device_is_removed, 30)
{
	struct ending e;

	if (!variant->keeps_device) {
		remove_now(_metadata, &self->g);
		expect_dead(_metadata, self, variant->kind);
		if (variant->keeps_module)
			expect_module_is_kept(_metadata, "an open file");
		else
			EXPECT_EQ(0, references());
		let_go(self);
	} else {
		removal_start(_metadata, &e, &self->g);
		if (self->map)
			memset(self->map, 0xa5, self->len);
		atomic_store(&e.let_go, true);
		let_go(self);
		ending_join(_metadata, &e, "the last user");
		EXPECT_EQ(-1, access(self->g.path, F_OK));
	}
	expect_module_is_free(_metadata, "after everything is closed");
}

TEST_F_TIMEOUT(kept, module_is_unloaded, 30)
{
	struct ending e;

	NEED_OPTION("module");
	if (variant->keeps_module) {
		expect_module_is_kept(_metadata, "an open file");
		EXPECT_EQ(0, access(self->g.path, F_OK))
			PROMISE("a module with references keeps its devices");
		if (self->map)
			memset(self->map, 0xa5, self->len);
		let_go(self);
	} else if (variant->keeps_device) {
		ASSERT_EQ(0, references());
		unloading_start(_metadata, &e);
		atomic_store(&e.let_go, true);
		let_go(self);
		ending_join(_metadata, &e, "the last user");
		ASSERT_EQ(0, load_module());
	} else {
		ASSERT_EQ(0, references())
			PROMISE("this file does not keep the module");
		ASSERT_EQ(0, unload());
		EXPECT_EQ(-1, access(self->g.path, F_OK))
			PROMISE("unloading the module removes its devices");
		expect_dead(_metadata, self, variant->kind);
		/* The new module does not revive them. */
		ASSERT_EQ(0, load_module());
		expect_dead(_metadata, self, variant->kind);
		let_go(self);
	}
	expect_module_is_free(_metadata, "after everything is closed");
}

/* ---- Slow and late users ---- */

FIXTURE(life)
{
	struct guest g;
	struct mock m;		/* the same, opened */
};

MIG_EACH_BACKEND(life);

FIXTURE_SETUP(life)
{
	int ret;

	CREATE_OR_SKIP(&self->g);
	ret = mock_open_path(&self->m, self->g.path, variant->backend);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "backend not available: %s", self->m.dev.why);
	ASSERT_EQ(0, ret)
		STEP("open the device: %s", self->m.dev.why);
}

FIXTURE_TEARDOWN_PARENT(life)
{
	remove_rest(&self->g);
}

/* The device works between the request to release it and its release. */
TEST_F_TIMEOUT(life, device_migrates_while_its_removal_waits, 30)
{
	int req = eventfd(0, EFD_CLOEXEC), fd = -1, late;
	struct mock *m = &self->m;
	struct mig_stream image = {};
	struct mock_front front;
	struct ending e;
	void *map;

	ASSERT_LE(0, req);
	ASSERT_EQ(0, mig_set_irqs(&m->dev, REQ, SET_EVENTFD, 0, 1, &req, sizeof(req)));
	removal_start(_metadata, &e, &self->g);
	ASSERT_EQ(POLLIN, mig_poll(req, POLLIN, mig_hang_seconds() * 1000))
		PROMISE("the removal of an open device signals the request interrupt");
	populate(_metadata, m, 1);
	stop_and_save(_metadata, m, &fd, &image);
	read_front(_metadata, m, &front);
	close(fd);
	ASSERT_EQ(0, mig_reset(&m->dev));
	load_and_compare(_metadata, m, &image, 0, m->want, &front);
	/* A session that starts now may end after the device, or with it. */
	map = bar2_map(_metadata, m, 0, m->size);
	store_noise(_metadata, m, 0, m->size, 2);
	late = go(_metadata, &m->dev, MIG_STOP_COPY);
	mock_close(m);
	EXPECT_FALSE(mig_fd_is_dead(late))
		PROMISE("a mapping keeps the session as well as the device");
	atomic_store(&e.let_go, true);
	ASSERT_EQ(0, munmap(map, m->size));
	ending_join(_metadata, &e, "the last user");
	EXPECT_TRUE(mig_fd_is_dead(late));
	expect_module_is_kept(_metadata, "a data_fd");
	close(late);
	close(req);
	mig_stream_free(&image);
	expect_module_is_free(_metadata, "after everything is closed");
}

/* Binds a device file whose device is about to be removed. */
TEST_F_TIMEOUT(life, bind_during_removal, 30)
{
	struct mig_device dev;
	struct ending e;
	__u32 state;
	int ret;

	if (variant->backend == MIG_GROUP)
		SKIP(return, "devices of a group are not bound");
	mock_close(&self->m);
	ASSERT_EQ(0, mig_open_unbound(&dev, self->g.path));
	removal_start(_metadata, &e, &self->g);
	ret = mig_bind(&dev);
	ASSERT_EQ(0, ret)
		STEP("bind a device whose removal waits: %s: %s", dev.why, strerror(-ret));
	ASSERT_EQ(0, mig_set_state(&dev, MIG_STOP, NULL));
	expect_state(_metadata, &dev, MIG_STOP, "before the removal");
	expect_module_is_kept(_metadata, "a device");
	atomic_store(&e.let_go, true);
	mig_close(&dev);
	ending_join(_metadata, &e, "the last user");
	expect_module_is_free(_metadata, "after everything is closed");

	NEED_OPTION("module");
	ASSERT_EQ(0, mock_create(&self->g, TYPE));
	ASSERT_EQ(0, mig_open_unbound(&dev, self->g.path));
	unloading_start(_metadata, &e);
	EXPECT_EQ(-ENODEV, mig_bind(&dev))
		PROMISE("no device can be opened while the module is unloaded");
	EXPECT_GT(0, mig_get_state(&dev, &state));
	atomic_store(&e.let_go, true);
	mig_close(&dev);
	ending_join(_metadata, &e, "the last user");
	ASSERT_EQ(0, load_module());
	expect_module_is_free(_metadata, "after everything is closed");
}

/* A process with all kinds of references is killed. */
static void hold_everything(struct __test_metadata *_metadata, life_data *self,
			    int ready)
{
	struct vfio_device_feature_dma_logging_range range = { .length = 1 << 30 };
	struct dma_desc d = {
		.op = CHURN, .len = PAGE, .period = 1, .irq_vector = 0,
	};
	struct mock *m = &self->m;
	struct poller poller;
	struct ram ram;
	int fds[VFIO_MOCK_MSIX_VECTORS], fd;
	__u64 page_size = PAGE;

	ram_make(_metadata, &ram, 0, 16 * PAGE);
	ram_map(_metadata, &ram, m);
	open_vectors(_metadata, m, fds);
	if (mock_has_log())
		ASSERT_EQ(0, mig_log_start(&m->dev, &page_size, &range, 1));
	bar2_map(_metadata, m, 0, m->size);
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	d = (struct dma_desc){
		.op = FILL, .len = 16 * PAGE, .period = 1, .irq_vector = 1,
	};
	dma_set(_metadata, m, 1, &d);
	dma_ring(_metadata, m, 1);
	fd = go(_metadata, &m->dev, m->dev.flags & VFIO_MIGRATION_PRE_COPY ? MIG_PRE_COPY :
									     MIG_RESUMING);
	poller_start(_metadata, &poller, fd);
	ASSERT_EQ(1, write(ready, "", 1));
	for (;;)
		pause();
}

TEST_F_TIMEOUT(life, process_exit_releases_everything, 30)
{
	int ready[2], status;
	char byte;
	pid_t pid;

	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		hold_everything(_metadata, self, ready[1]);
	close(ready[1]);
	ASSERT_EQ(1, read(ready[0], &byte, 1))
		STEP("use all of a device in another process");
	mock_close(&self->m);
	ASSERT_EQ(0, kill(pid, SIGKILL));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	remove_now(_metadata, &self->g);
	expect_module_is_free(_metadata, "after a process was killed");
}

/* ---- Races ---- */

/* A thread that opens a device, or any existing one, again and again. */
struct opener {
	pthread_t thread;
	const char *path;	/* NULL: any */
	enum mig_backend backend;
	atomic_bool *stop;
	atomic_uint opened;
	char why[300];		/* reason for the failure */
};

static void open_once(struct opener *o, const char *path)
{
	struct mig_device dev;
	__u32 value = 0, state;
	int ret = mig_open(&dev, path, o->backend), fd;

	if (ret) {
		if (!may_refuse(ret) && !o->why[0])
			snprintf(o->why, sizeof(o->why), "open: %s: %s", strerror(-ret), dev.why);
		return;
	}
	ret = mig_region_read(&dev, BAR0, VFIO_MOCK_REG_MAGIC, &value, 4);
	if (ret != 4 || value != VFIO_MOCK_MAGIC || mig_get_state(&dev, &state) ||
	    state != MIG_RUNNING)
		snprintf(o->why, sizeof(o->why), "an open device works (%d, %#x)", ret,
			 value);
	if (!mig_set_state(&dev, MIG_STOP_COPY, &fd))
		close(fd);
	else
		snprintf(o->why, sizeof(o->why), "an open device changes to STOP_COPY");
	mig_close(&dev);
	atomic_fetch_add(&o->opened, 1);
}

static void *opener_main(void *arg)
{
	char path[PATH_MAX];
	struct opener *o = arg;
	struct dirent *entry;
	DIR *dir;

	while (!atomic_load(o->stop)) {
		if (o->path) {
			open_once(o, o->path);
			continue;
		}
		dir = opendir(DEVICES);
		if (!dir)
			break;
		while ((entry = readdir(dir)) && !atomic_load(o->stop)) {
			if (entry->d_name[0] == '.')
				continue;
			snprintf(path, sizeof(path), DEVICES "/%s", entry->d_name);
			open_once(o, path);
		}
		closedir(dir);
	}
	return NULL;
}

static void openers_start(struct __test_metadata *_metadata, struct opener *o,
			  unsigned int nr, const char *path, enum mig_backend backend,
			  atomic_bool *stop)
{
	unsigned int i;

	for (i = 0; i < nr; i++) {
		o[i] = (struct opener){ .path = path, .backend = backend, .stop = stop };
		ASSERT_EQ(0, pthread_create(&o[i].thread, NULL, opener_main, &o[i]));
	}
}

static void openers_stop(struct __test_metadata *_metadata, struct opener *o,
			 unsigned int nr, atomic_bool *stop)
{
	unsigned int i;

	atomic_store(stop, true);
	for (i = 0; i < nr; i++) {
		ASSERT_TRUE(joined(o[i].thread));
		EXPECT_STREQ("", o[i].why)
			PROMISE("open succeeds or returns that the device is gone or in use");
	}
}

static unsigned int opened(const struct opener *o, unsigned int nr)
{
	unsigned int i, sum = 0;

	for (i = 0; i < nr; i++)
		sum += atomic_load(&o[i].opened);
	return sum;
}

TEST_F_TIMEOUT(life, removal_races_open, 120)
{
	unsigned int count = mig_times(10), i;
	struct opener openers[2];
	struct guest g = self->g;
	atomic_bool stop;

	mock_close(&self->m);
	for (i = 0; i < count; i++) {
		atomic_store(&stop, false);
		openers_start(_metadata, openers, 2, g.path, variant->backend, &stop);
		WAIT_FOR(opened(openers, 2) > i % 4, "an existing device can be opened");
		remove_now(_metadata, &g);
		openers_stop(_metadata, openers, 2, &stop);
		ASSERT_EQ(0, mock_create(&g, TYPE));
	}
	remove_now(_metadata, &g);
	expect_module_is_free(_metadata, "after all removals");
}

/* Unbinds the driver without a removal; mdev cannot bind it again. */
TEST_F_TIMEOUT(life, unbind_races_open, 120)
{
	unsigned int count = mig_times(10), i;
	struct opener openers[2];
	struct guest g = self->g;
	char node[PATH_MAX];
	atomic_bool stop;
	int ret;

	mock_close(&self->m);
	for (i = 0; i < count; i++) {
		atomic_store(&stop, false);
		openers_start(_metadata, openers, 2, g.path, variant->backend, &stop);
		WAIT_FOR(opened(openers, 2) > i % 4, "an existing device can be opened");
		ret = write_word(DRIVER "/unbind", basename(g.path));
		EXPECT_EQ(0, ret)
			PROMISE("a device can be unbound while it is opened: %s", strerror(-ret));
		snprintf(node, sizeof(node), "%s/vfio-dev", g.path);
		EXPECT_EQ(-1, access(node, F_OK))
			PROMISE("an unbound device is not a VFIO device");
		ret = write_word(DRIVER "/bind", basename(g.path));
		EXPECT_TRUE(!ret || ret == -ENODEV)
			PROMISE("a device is bound again if the bus supports it: %s",
				strerror(-ret));
		openers_stop(_metadata, openers, 2, &stop);
		remove_now(_metadata, &g);
		ASSERT_EQ(0, mock_create(&g, TYPE));
	}
	remove_now(_metadata, &g);
	expect_module_is_free(_metadata, "after all removals");
}

/* Unbinds and removes a device in either order while it is open. */
TEST_F_TIMEOUT(life, unbind_and_removal_in_either_order, 30)
{
	const char *name = basename(self->g.path);
	struct ending first, second;
	struct mock *m = &self->m;
	bool remove_first;
	int i;

	for (i = 0; i < 4; i++) {
		remove_first = i % 2;
		if (remove_first) {
			removal_start(_metadata, &first, &self->g);
			ending_start(_metadata, &second, DRIVER "/unbind", name);
		} else {
			ending_start(_metadata, &first, DRIVER "/unbind", name);
			wait_until_asleep(&first.poller);
			ending_start(_metadata, &second, self->g.remove, "1");
		}
		ASSERT_EQ(0, mig_reset(&m->dev))
			PROMISE("the device works until it is closed");
		atomic_store(&first.let_go, true);
		atomic_store(&second.let_go, true);
		mock_close(m);
		ending_join(_metadata, &first, "the last user");
		/* The device to unbind may be gone. */
		if (remove_first) {
			ASSERT_TRUE(joined(second.poller.thread));
			EXPECT_TRUE(!second.ret || second.ret == -ENODEV)
				PROMISE("unbind of a removed device may return ENODEV: %s",
					strerror(-second.ret));
		} else {
			ending_join(_metadata, &second, "the last user");
		}
		EXPECT_EQ(-1, access(self->g.path, F_OK));
		ASSERT_EQ(0, mock_create(&self->g, TYPE));
		ASSERT_EQ(0, mock_open_path(m, self->g.path, variant->backend));
	}
	mock_close(m);
	remove_now(_metadata, &self->g);
	expect_module_is_free(_metadata, "after all removals");
}

/* A thread that creates devices and removes them. */
struct maker {
	pthread_t thread;
	unsigned int count;	/* 0: until it is stopped */
	atomic_bool *stop;
	bool may_fail;
	atomic_uint made;
	char why[100];
};

static void *maker_main(void *arg)
{
	struct maker *w = arg;
	struct guest g;
	unsigned int i;
	int ret;

	for (i = 0; !atomic_load(w->stop) && (!w->count || i < w->count); i++) {
		ret = mock_create(&g, TYPE);
		if (ret && !(w->may_fail && (ret == -ENOENT || ret == -ENODEV))) {
			snprintf(w->why, sizeof(w->why), "create: %s", strerror(-ret));
			break;
		}
		if (ret)
			continue;
		atomic_fetch_add(&w->made, 1);
		ret = write_word(g.remove, "1");
		if (ret && !(w->may_fail && (ret == -ENOENT || ret == -ENODEV))) {
			snprintf(w->why, sizeof(w->why), "remove: %s", strerror(-ret));
			break;
		}
	}
	return NULL;
}

#define MAKERS	4

TEST_F_TIMEOUT(life, four_threads_create_and_remove, 120)
{
	struct maker makers[MAKERS] = {};
	struct opener openers[2];
	atomic_bool stop = false;
	long before, after;
	unsigned int i;

	mock_close(&self->m);
	remove_now(_metadata, &self->g);
	before = available();
	ASSERT_LT(0, before);
	openers_start(_metadata, openers, 2, NULL, variant->backend, &stop);
	for (i = 0; i < MAKERS; i++) {
		makers[i].count = mig_times(8);
		makers[i].stop = &stop;
		ASSERT_EQ(0, pthread_create(&makers[i].thread, NULL, maker_main, &makers[i]));
	}
	for (i = 0; i < MAKERS; i++) {
		ASSERT_TRUE(joined(makers[i].thread));
		EXPECT_STREQ("", makers[i].why)
			PROMISE("devices can be created and removed concurrently");
		EXPECT_EQ(makers[i].count, atomic_load(&makers[i].made));
	}
	openers_stop(_metadata, openers, 2, &stop);
	after = available();
	EXPECT_EQ(before, after)
		PROMISE("a removed device frees its instance");
	expect_module_is_free(_metadata, "after all removals");
}

TEST_F_TIMEOUT(life, unload_races_everything, 120)
{
	unsigned int count = mig_times(4), i, made = 0;
	struct maker makers[2] = {};
	struct opener opener;
	atomic_bool stop = false;
	int ret;

	NEED_OPTION("module");
	mock_close(&self->m);
	remove_now(_metadata, &self->g);
	openers_start(_metadata, &opener, 1, NULL, variant->backend, &stop);
	for (i = 0; i < 2; i++) {
		makers[i].stop = &stop;
		makers[i].may_fail = true;
		ASSERT_EQ(0, pthread_create(&makers[i].thread, NULL, maker_main, &makers[i]));
	}
	for (i = 0; i < count; i++) {
		made = atomic_load(&makers[0].made) + atomic_load(&makers[1].made);
		WAIT_FOR(atomic_load(&makers[0].made) + atomic_load(&makers[1].made) > made,
			 "devices can be created when the module is loaded");
		WAIT_FOR((ret = unload()) != -EWOULDBLOCK, "the module can be unloaded");
		ASSERT_EQ(0, ret);
		ASSERT_EQ(0, load_module());
	}
	atomic_store(&stop, true);
	for (i = 0; i < 2; i++) {
		ASSERT_TRUE(joined(makers[i].thread));
		EXPECT_STREQ("", makers[i].why)
			PROMISE("devices can be created and removed until the module is unloaded");
	}
	openers_stop(_metadata, &opener, 1, &stop);
	expect_module_is_free(_metadata, "at the end");
}

/* ---- Stalled calls ---- */

/* A call with an argument on a page that stalls. */
struct stalled {
	struct mig_stall stall;
	struct mock *m;
	int fd;			/* the data_fd */
	pthread_t thread;
	long (*call)(struct stalled *s);
	long ret;
};

/* An argument with its first @len bytes before the page that stalls. */
static void *straddle(struct stalled *s, const void *head, size_t len)
{
	return memcpy((char *)s->stall.page - len, head, len);
}

static long say(long ret)
{
	return ret < 0 ? -errno : ret;
}

static long call_read(struct stalled *s)
{
	return say(read(s->fd, s->stall.page, 100));
}

static long call_write(struct stalled *s)
{
	return say(write(s->fd, s->stall.page, 100));
}

static long call_precopy_info_in(struct stalled *s)
{
	return say(ioctl(s->fd, VFIO_MIG_GET_PRECOPY_INFO, s->stall.page));
}

static long call_precopy_info_out(struct stalled *s)
{
	struct vfio_precopy_info info = { .argsz = sizeof(info) };

	return say(ioctl(s->fd, VFIO_MIG_GET_PRECOPY_INFO,
			 straddle(s, &info, offsetof(typeof(info), initial_bytes))));
}

static long call_region_read(struct stalled *s)
{
	return say(pread(s->m->dev.fd, s->stall.page, 100, s->m->offset[BAR2]));
}

static long call_region_write(struct stalled *s)
{
	return say(pwrite(s->m->dev.fd, s->stall.page, 100, s->m->offset[BAR0]));
}

static long call_irq_info(struct stalled *s)
{
	struct vfio_irq_info info = { .argsz = sizeof(info), .index = MSIX };

	return say(ioctl(s->m->dev.fd, VFIO_DEVICE_GET_IRQ_INFO,
			 straddle(s, &info, offsetof(typeof(info), count))));
}

static long call_set_irqs(struct stalled *s)
{
	struct vfio_irq_set set = {
		.argsz = sizeof(set) + 4, .flags = SET_EVENTFD, .index = MSIX, .count = 1,
	};

	return say(ioctl(s->m->dev.fd, VFIO_DEVICE_SET_IRQS,
			 straddle(s, &set, sizeof(set))));
}

static long call_log_start(struct stalled *s)
{
	__u64 page_size = PAGE;

	return mig_log_start(&s->m->dev, &page_size, s->stall.page, 1);
}

static int put_desc(const struct mock *m, const struct dma_desc *d)
{
	const ssize_t len = offsetof(struct dma_desc, status);
	__u32 zero = 0;

	return mock_write(m, BAR0, VFIO_MOCK_DMA_DESC(0), d, len) == len &&
	       mock_write(m, BAR0, VFIO_MOCK_REG_DMA_DOORBELL, &zero, 4) == 4 ? 0 : -EIO;
}

/* The device writes to a page first: a report without dirty pages does not stall. */
static long call_log_report(struct stalled *s)
{
	struct vfio_device_feature_dma_logging_range range = { .length = 1 << 30 };
	struct dma_desc d = { .op = FILL, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE };
	__u64 page_size = PAGE;
	int ret;

	ret = mig_dma_map(&s->m->dev, 0, (char *)s->stall.page - PAGE, PAGE, RW);
	if (!ret)
		ret = mig_log_start(&s->m->dev, &page_size, &range, 1);
	if (!ret)
		ret = put_desc(s->m, &d);
	while (!ret && mock_read(s->m, BAR0, VFIO_MOCK_DMA_DESC(0), &d, sizeof(d)) > 0 &&
	       dma_owned(&d))
		usleep(100);
	return ret ? ret : mig_log_report(&s->m->dev, 0, 1 << 24, PAGE, s->stall.page);
}

/* The device itself stalls, while the call returns. */
static long call_dma(struct stalled *s)
{
	struct dma_desc d = {
		.op = WRITE, .iova = 8, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	int ret = mig_dma_map(&s->m->dev, 0, s->stall.page, PAGE, RW);

	return ret ? ret : put_desc(s->m, &d);
}

static void *stalled_main(void *arg)
{
	struct stalled *s = arg;

	s->ret = s->call(s);
	return NULL;
}

/* Calls of another thread to the device. */
struct other {
	pthread_t thread;
	struct mock *m;
	const char *failed;
};

static void *other_main(void *arg)
{
	static const __u32 states[] = {
		MIG_STOP, MIG_RUNNING, MIG_STOP_COPY, MIG_STOP, MIG_RESUMING,
	};
	struct other *o = arg;
	struct mig_device *dev = &o->m->dev;
	__u32 value, state;
	unsigned int i;
	__u64 size;

	if (mock_read(o->m, BAR0, VFIO_MOCK_REG_MAGIC, &value, 4) != 4 ||
	    mock_write(o->m, BAR2, 0, &value, 4) != 4)
		o->failed = "accesses to regions";
	if (mig_get_state(dev, &state) || mig_data_size(dev, &size))
		o->failed = "GET";
	if (mock_has_log() && mig_log_stop(dev))
		o->failed = "LOGGING_STOP";
	if (mig_reset(dev))
		o->failed = "RESET";
	for (i = 0; i < ARRAY_SIZE(states); i++)
		if (mig_set_state(dev, states[i], NULL))
			o->failed = "SET_STATE";
	if (mig_reset(dev))
		o->failed = "RESET";
	mig_close(dev);
	return NULL;
}

FIXTURE(stalled)
{
	struct guest g;
	struct mock m;
	struct stalled s;
};

FIXTURE_VARIANT(stalled)
{
	long (*call)(struct stalled *s);
	enum mig_backend backend;
	__u32 state;		/* with a data_fd, or 0 */
	bool by_itself;		/* the worker thread stalls */
};

FIXTURE_VARIANT_ADD(stalled, read) {
	.call = call_read, .backend = MIG_IOMMUFD, .state = MIG_STOP_COPY,
};

FIXTURE_VARIANT_ADD(stalled, write) {
	.call = call_write, .backend = MIG_IOMMUFD, .state = MIG_RESUMING,
};

FIXTURE_VARIANT_ADD(stalled, precopy_info_in) {
	.call = call_precopy_info_in, .backend = MIG_IOMMUFD, .state = MIG_PRE_COPY,
};

FIXTURE_VARIANT_ADD(stalled, precopy_info_out) {
	.call = call_precopy_info_out, .backend = MIG_IOMMUFD, .state = MIG_PRE_COPY,
};

FIXTURE_VARIANT_ADD(stalled, region_read) {
	.call = call_region_read, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, region_write) {
	.call = call_region_write, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, irq_info) {
	.call = call_irq_info, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, set_irqs) {
	.call = call_set_irqs, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, log_start) {
	.call = call_log_start, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, log_report) {
	.call = call_log_report, .backend = MIG_IOMMUFD,
};

FIXTURE_VARIANT_ADD(stalled, dma) {
	.call = call_dma, .backend = MIG_IOMMUFD, .by_itself = true,
};

FIXTURE_VARIANT_ADD(stalled, dma_group) {
	.call = call_dma, .backend = MIG_GROUP, .by_itself = true,
};

FIXTURE_SETUP(stalled)
{
	int ret;

	CREATE_OR_SKIP(&self->g);
	ret = mock_open_path(&self->m, self->g.path, variant->backend);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "backend not available: %s", self->m.dev.why);
	ASSERT_EQ(0, ret)
		STEP("open the device: %s", self->m.dev.why);
	if (variant->state && !mig_fsm_exists(self->m.dev.flags, variant->state))
		SKIP(return, "the device does not have this state");
	self->s = (struct stalled){ .m = &self->m, .fd = -1, .call = variant->call };
	ret = mig_stall_start(&self->s.stall);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "no userfaultfd that stalls the kernel is available");
	ASSERT_EQ(0, ret);
}

FIXTURE_TEARDOWN_PARENT(stalled)
{
	remove_rest(&self->g);
}

/* Tears everything down: only the stalled call may wait for its fault. */
TEST_F_TIMEOUT(stalled, call_blocks_no_other_call, 60)
{
	struct stalled *s = &self->s;
	struct other other = { .m = &self->m, .failed = "" };
	bool keeps_device = !variant->state && !variant->by_itself;
	struct ending e;

	if (variant->state)
		s->fd = go(_metadata, &self->m.dev, variant->state);
	ASSERT_EQ(0, pthread_create(&s->thread, NULL, stalled_main, s));
	ASSERT_EQ(0, mig_stall_wait(&s->stall))
		STEP("stall a call");
	ASSERT_EQ(0, pthread_create(&other.thread, NULL, other_main, &other));
	ASSERT_TRUE(joined(other.thread))
		PROMISE("other calls do not wait for a stalled call");
	EXPECT_STREQ("", other.failed);

	if (!keeps_device) {
		remove_now(_metadata, &self->g);
		if (s->fd >= 0)
			expect_module_is_kept(_metadata, "a stalled call");
		else
			expect_module_is_free(_metadata, "with an unresolved page fault");
	} else {
		removal_start(_metadata, &e, &self->g);
		expect_module_is_kept(_metadata, "a stalled call");
		atomic_store(&e.let_go, true);
	}
	ASSERT_EQ(0, mig_stall_end_zero(&s->stall));
	ASSERT_TRUE(joined(s->thread))
		PROMISE("a stalled call ends with its fault");
	if (s->fd >= 0) {
		EXPECT_TRUE(s->ret >= 0 || s->ret == -ENODEV || s->ret == -EINVAL)
			PROMISE("a call whose session has ended returns an error or its bytes so far: %s",
				strerror(-s->ret));
		EXPECT_TRUE(mig_fd_is_dead(s->fd));
		close(s->fd);
	}
	if (keeps_device) {
		ending_join(_metadata, &e, "a stalled call");
		EXPECT_EQ(-1, access(self->g.path, F_OK));
	}
	mig_stall_free(&s->stall);
	expect_module_is_free(_metadata, "after everything is closed");
}

MIG_HARNESS_MAIN(mock_options)
