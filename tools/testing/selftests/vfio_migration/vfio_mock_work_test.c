// SPDX-License-Identifier: GPL-2.0
/*
 * The worker of the mock migratable device vfio_mock: states in which it stops, its
 * interrupts, accounting of its resources, and effects on the rest of the kernel.
 *
 *	./vfio_mock_work_test --medium "DEVICE" --module /path/to/vfio_mock.ko
 *
 * with the sysfs path of a mediated device; vfio_minimal.ko is in the directory of the
 * module. run_mock.sh creates it and runs this. --rounds N multiplies the rounds of
 * races by N.
 */
#include <dirent.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "mock_dma.h"

#define IOVA	0x40000000ULL

/* Upper bound for the distance of two IOVAs in the same zone of the log. */
#define ZONE_PAGES	4096U
#define ZONE	(ZONE_PAGES * PAGE)
#define ZONES	4096U

/* Always due: the worker is always busy. */
static const struct dma_desc busy = {
	.op = CHURN, .len = 64 << 10, .period = 1, .irq_vector = VFIO_MOCK_IRQ_NONE,
};

FIXTURE(work)
{
	struct mock m;
	struct ram ram;
};

MIG_EACH_BACKEND(work);

FIXTURE_SETUP(work)
{
	MOCK_OPEN_OR_SKIP(&self->m, "medium", 0, variant->backend);
	ram_make(_metadata, &self->ram, IOVA, self->m.size);
	ram_map(_metadata, &self->ram, &self->m);
}

FIXTURE_TEARDOWN(work)
{
	mock_close(&self->m);
}

/* Reads a file in procfs or sysfs as a string. */
static bool slurp(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t len;

	if (fd < 0)
		return false;
	len = read(fd, text, size - 1);
	close(fd);
	text[len > 0 ? len : 0] = 0;
	return len >= 0;
}

/* The worker of the open device, or 0. */
static pid_t worker(void)
{
	char path[300], comm[32];
	struct dirent *entry;
	pid_t pid = 0;
	DIR *dir = opendir("/proc");

	while (dir && (entry = readdir(dir))) {
		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		if (atoi(entry->d_name) && slurp(path, comm, sizeof(comm)) &&
		    !strcmp(comm, "vfio_mock\n"))
			pid = atoi(entry->d_name);
	}
	if (dir)
		closedir(dir);
	return pid;
}

/* Starts a descriptor. */
static void start(struct __test_metadata *_metadata, const struct mock *m, unsigned int n,
		  const struct dma_desc *d)
{
	dma_set(_metadata, m, n, d);
	dma_ring(_metadata, m, n);
}

static void expect_moving(struct __test_metadata *_metadata, const struct mock *m,
			  unsigned int n)
{
	__u64 pos = dma_get(_metadata, m, n).pos;

	dma_wait_moved(_metadata, m, n, pos + (1 << 20));
}

/* ---- Interrupts and states ---- */

/* Lets the worker run only on this CPU, and only while this thread sleeps. */
static void share_cpu(struct __test_metadata *_metadata, pid_t pid)
{
	const struct sched_param fifo = { .sched_priority = 1 };
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(0, &one);
	ASSERT_EQ(0, sched_setaffinity(0, sizeof(one), &one));
	ASSERT_EQ(0, sched_setaffinity(pid, sizeof(one), &one))
		STEP("keep the worker (%d) on the CPU of the test: %s", pid, strerror(errno));
	ASSERT_EQ(0, sched_setscheduler(0, SCHED_FIFO, &fifo))
		STEP("become a realtime thread: %s", strerror(errno));
}

/*
 * A descriptor that has ended in the image has raised its interrupt, which was
 * delivered, or is pending in the image.
 */
TEST_F_TIMEOUT(work, image_has_the_interrupt_of_an_ended_descriptor, 600)
{
	unsigned int count = mig_times(1000), i, lost = 0, ended[3] = {};
	struct mock *m = &self->m;
	int fds[VFIO_MOCK_MSIX_VECTORS], fd;
	struct dma_desc d;
	bool p2p = m->dev.flags & VFIO_MIGRATION_P2P;

	open_vectors(_metadata, m, fds);
	ASSERT_NE(0, worker());
	share_cpu(_metadata, worker());
	for (i = 0; i < count; i++) {
		d = (struct dma_desc){
			.op = CHURN, .len = 1 + 48 * (i % 1000), .irq_vector = 0,
		};
		if (i % 2 && p2p) {
			/* Abort it while the worker cannot run. */
			ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING_P2P, NULL));
			start(_metadata, m, 0, &d);
			set32(m, DMA_ABORT, 0);
		} else {
			/* Stop at a random time. */
			start(_metadata, m, 0, &d);
			usleep(i % 97);
		}
		fd = -1;
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP_COPY, &fd));
		d = dma_get(_metadata, m, 0);
		if (!dma_owned(&d)) {
			ended[d.status == VFIO_MOCK_DMA_ABORTED]++;
			lost += !taken(fds[0]) &&
				!(get(_metadata, m, BAR0, VFIO_MOCK_MSIX_PBA, 8) & 1);
		} else {
			ended[2]++;
			EXPECT_EQ(0U, taken(fds[0]))
				PROMISE("a descriptor that has not ended raises no interrupt");
		}
		close(fd);
		ASSERT_EQ(0, mig_reset(&m->dev));
		/* Clears pending interrupts. */
		taken(fds[0]);
	}
	EXPECT_EQ(0U, lost)
		PROMISE("a descriptor that has ended has raised its interrupt (%u of %u)", lost,
			count);
	TH_LOG("%u complete, %u aborted, %u not ended", ended[0], ended[1], ended[2]);
}

static void on_signal(int sig)
{
	(void)sig;
}

/* A thread that changes the state back and forth, and receives signals. */
struct changer {
	pthread_t thread;
	struct mig_device *dev;
	unsigned int count;
	int ret;
	atomic_bool done;
};

static void *changer_main(void *arg)
{
	struct changer *c = arg;
	unsigned int i;

	for (i = 0; i < c->count && !c->ret; i++)
		c->ret = mig_set_state(c->dev, i % 2 ? MIG_RUNNING : MIG_RUNNING_P2P, NULL);
	atomic_store(&c->done, true);
	return NULL;
}

/* A non-fatal signal does not affect a state change, nor the DMA after it. */
TEST_F_TIMEOUT(work, signals_do_not_fail_state_changes, 120)
{
	struct mock *m = &self->m;
	struct changer c = { .dev = &m->dev, .count = 2 * mig_times(2000) };
	struct sigaction action = { .sa_handler = on_signal };
	struct dma_desc d = busy;
	unsigned int n;

	NEED_P2P(&m->dev);
	ASSERT_EQ(0, sigaction(SIGUSR1, &action, NULL));
	for (n = 0; n < 4; n++) {
		d.addr = n * d.len;
		start(_metadata, m, n, &d);
	}
	ASSERT_EQ(0, pthread_create(&c.thread, NULL, changer_main, &c));
	while (!atomic_load(&c.done)) {
		pthread_kill(c.thread, SIGUSR1);
		usleep(20);
	}
	ASSERT_TRUE(joined(c.thread));
	EXPECT_EQ(0, c.ret)
		PROMISE("SET_STATE fails with an errno of the uAPI, not %d", c.ret);
	for (n = 0; n < 4; n++)
		expect_moving(_metadata, m, n);
}

/* A thread that stops the device, which waits for its DMA. */
static void *stop_main(void *arg)
{
	struct changer *c = arg;

	c->ret = mig_set_state(c->dev, MIG_STOP, NULL);
	return NULL;
}

static void *reset_main(void *arg)
{
	struct changer *c = arg;

	c->ret = mig_reset(c->dev);
	return NULL;
}

/*
 * RESET ends a transfer that waits for a page fault, even in a piece that begins after
 * the RESET, while a state change waits for the transfer.
 */
TEST_F_TIMEOUT(work, reset_during_state_change_ends, 240)
{
	unsigned int count = mig_times(100), i;
	struct mock *m = &self->m;
	const __u64 before = 16 * PAGE;
	struct changer stop, reset;
	struct mig_stall stall;
	struct dma_desc d = {
		.op = FILL, .iova = 0, .len = before + PAGE, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	if (mig_stall_start(&stall))
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, mig_dma_map(&m->dev, 0, self->ram.mem, before, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, before, stall.page, PAGE, RW));
	for (i = 0; i < count; i++) {
		stop = (struct changer){ .dev = &m->dev };
		reset = (struct changer){ .dev = &m->dev };
		start(_metadata, m, 0, &d);
		usleep(7 * (i % 16));
		ASSERT_EQ(0, pthread_create(&stop.thread, NULL, stop_main, &stop));
		usleep(3 * (i % 32));
		ASSERT_EQ(0, pthread_create(&reset.thread, NULL, reset_main, &reset));
		ASSERT_TRUE(joined(reset.thread))
			PROMISE("RESET does not wait for an unresolved page fault");
		ASSERT_TRUE(joined(stop.thread))
			PROMISE("a state change ends with the RESET of its transfer");
		EXPECT_EQ(0, reset.ret)
			PROMISE("RESET works in every state");
		EXPECT_EQ(0, stop.ret);
		ASSERT_EQ(0, mig_reset(&m->dev));
		/* The RESET interrupted this transfer, not the next one. */
		d.len = before;
		d = dma_run(_metadata, m, 0, &d);
		expect_complete(_metadata, &d, "a transfer after RESET");
		d.len = before + PAGE;
	}
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, before, PAGE));
	mig_stall_free(&stall);
}

/* ---- The rest of the kernel ---- */

/* A worker that is always busy does not delay grace periods of RCU Tasks. */
TEST_F_TIMEOUT(work, busy_worker_does_not_delay_grace_periods, 120)
{
	static const char *const dirs[] = { "/sys/kernel/tracing", "/sys/kernel/debug/tracing" };
	const char *module = mig_option("module");
	char path[PATH_MAX], events[100], enable[100];
	unsigned int i;
	int fd;

	if (mount("tracefs", dirs[0], "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "no tracefs: %s", strerror(errno));
	snprintf(events, sizeof(events), "%s/kprobe_events", dirs[0]);
	if (!module || access(events, W_OK))
		SKIP(return, "no kprobes, or no --module");
	snprintf(path, sizeof(path), "%.*s/vfio_minimal.ko",
		 (int)(strrchr(module, '/') - module), module);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd)
		STEP("open %s: %s", path, strerror(errno));
	start(_metadata, &self->m, 0, &busy);
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(0, write_word(events, "p:vfio_work_test/probe vfs_fsync_range"));
		snprintf(enable, sizeof(enable), "%s/events/vfio_work_test/probe/enable", dirs[0]);
		ASSERT_EQ(0, write_word(enable, "1"));
		expect_moving(_metadata, &self->m, 0);
		ASSERT_EQ(0, write_word(enable, "0"));
		ASSERT_EQ(0, write_word(events, "-:vfio_work_test/probe"))
			STEP("unregister a kprobe");
		if (syscall(SYS_finit_module, fd, "", 0) && errno == EEXIST)
			break;
		ASSERT_EQ(0, syscall(SYS_delete_module, "vfio_minimal", 0))
			PROMISE("a module can be unloaded while the worker is busy: %s",
				strerror(errno));
	}
	close(fd);
	expect_moving(_metadata, &self->m, 0);
}

/* The runtime of a task in nanoseconds. */
static __u64 run_time(pid_t pid)
{
	char path[64], text[128];

	snprintf(path, sizeof(path), "/proc/%d/schedstat", pid);
	return slurp(path, text, sizeof(text)) ? strtoull(text, NULL, 10) : 0;
}

static __u64 now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

/* The worker stops while the system is frozen, and continues afterwards. */
TEST_F_TIMEOUT(work, worker_freezes_with_the_system, 120)
{
	__u64 ran, elapsed;
	pid_t pid;

	if (access("/sys/power/pm_test", W_OK))
		SKIP(return, "no CONFIG_PM_DEBUG");
	start(_metadata, &self->m, 0, &busy);
	expect_moving(_metadata, &self->m, 0);
	pid = worker();
	ran = run_time(pid);
	if (!ran)
		SKIP(return, "no CONFIG_SCHED_INFO");
	ASSERT_EQ(0, write_word("/sys/power/pm_test", "freezer"));
	elapsed = now();
	/* Freeze for some seconds, and thaw. */
	EXPECT_EQ(0, write_word("/sys/power/state", "mem"))
		PROMISE("a busy worker freezes");
	elapsed = now() - elapsed;
	ran = run_time(pid) - ran;
	ASSERT_EQ(0, write_word("/sys/power/pm_test", "none"));
	EXPECT_LT(2 * ran, elapsed)
		PROMISE("no work runs while the system is frozen (%llu of %llu ns)", ran, elapsed);
	expect_moving(_metadata, &self->m, 0);
}

/* ---- Dead users ---- */

/* A process that only keeps a userfaultfd of its parent. */
static pid_t keep_file(int keep)
{
	pid_t pid = fork();
	int fd;

	if (pid)
		return pid;
	for (fd = 0; fd < 1024; fd++)
		if (fd != keep)
			close(fd);
	for (;;)
		pause();
}

/*
 * A process is killed while its DMA waits for a page fault that another process does
 * not resolve. The transfer keeps the memory of the process, and with it a mapping of
 * the device, which stays open without a process. The removal of the device ends this.
 */
TEST_F_TIMEOUT(work, removal_ends_transfer_of_dead_process, 120)
{
	struct dma_desc d = { .op = FILL, .len = PAGE, .irq_vector = VFIO_MOCK_IRQ_NONE };
	char type[PATH_MAX + 16], c;
	struct mig_stall stall;
	struct guest guest;
	struct mock m;
	int pipes[2], status;
	pid_t pid, keeper;
	void *map;

	snprintf(type, sizeof(type), "%s/mdev_type", self->m.path);
	ASSERT_EQ(0, mock_create(&guest, type))
		STEP("create a device");
	ASSERT_EQ(0, pipe(pipes));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		mig_close(&self->m.dev);
		if (mig_stall_start(&stall))
			_exit(1);
		keeper = keep_file(stall.uffd);
		if (keeper < 0 || mock_open_path(&m, guest.path, variant->backend) ||
		    mig_region_map(&m.dev, BAR2, 0, PAGE, &map) ||
		    mig_dma_map(&m.dev, 0, stall.page, PAGE, RW))
			_exit(2);
		start(_metadata, &m, 0, &d);
		if (mig_stall_wait(&stall) ||
		    write(pipes[1], &keeper, sizeof(keeper)) != sizeof(keeper))
			_exit(3);
		for (;;)
			pause();
	}
	close(pipes[1]);
	if (read(pipes[0], &keeper, sizeof(keeper)) != sizeof(keeper)) {
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		write_word(guest.remove, "1");
		if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
			SKIP(return, "no userfaultfd");
		ASSERT_EQ(0, status)
			STEP("start a transfer that waits");
	}
	ASSERT_EQ(0, kill(pid, SIGKILL));
	ASSERT_EQ(pid, waitpid(pid, NULL, 0));
	/* The end of its files: the end of the pipe is one of them. */
	ASSERT_EQ(0, read(pipes[0], &c, 1));
	ASSERT_EQ(0, pthread_create(&guest.remover, NULL, remover_main, &guest));
	EXPECT_TRUE(joined(guest.remover))
		PROMISE("the removal of a device ends the transfer that keeps it in use");
	EXPECT_EQ(0, guest.ret);
	/* End the fault in any case. */
	kill(keeper, SIGKILL);
}

/* ---- Accounting ---- */

FIXTURE(payer)
{
	char top[64];
	char group[96];
	bool mounted;
};

FIXTURE_SETUP(payer)
{
	char path[128];

	snprintf(self->top, sizeof(self->top), "/tmp/vfio_work_test.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->top));
	if (mount("cgroup2", self->top, "cgroup2", 0, NULL))
		SKIP(return, "no cgroup2: %s", strerror(errno));
	self->mounted = true;
	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", self->top);
	if (write_word(path, "+cpu +memory"))
		SKIP(return, "no controllers for CPU and memory");
	snprintf(self->group, sizeof(self->group), "%s/opener", self->top);
	ASSERT_EQ(0, mkdir(self->group, 0755));
}

FIXTURE_TEARDOWN(payer)
{
	if (self->group[0] && rmdir(self->group))
		EXPECT_EQ(0, errno)
			PROMISE("the cgroup of the opener is empty after the close");
	if (self->mounted)
		umount2(self->top, MNT_DETACH);
	rmdir(self->top);
}

/* A value in a file of the cgroup. */
static __u64 value(struct __test_metadata *_metadata, const char *group, const char *file,
		   const char *key)
{
	char path[128], text[8192], *at;

	snprintf(path, sizeof(path), "%s/%s", group, file);
	ASSERT_TRUE(slurp(path, text, sizeof(text)))
		STEP("read %s", path);
	at = strstr(text, key);
	ASSERT_NE(NULL, at)
		STEP("find %s in %s", key, path);
	return strtoull(at + strlen(key), NULL, 10);
}

/* Moves this process to the cgroup before it opens a device. */
static void join(struct __test_metadata *_metadata, const char *group)
{
	char path[160], self[16];

	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	snprintf(self, sizeof(self), "%d", getpid());
	ASSERT_EQ(0, write_word(path, self))
		STEP("move the process to a cgroup");
}

/* A process in the cgroup that has a device whose worker is busy, and is idle itself. */
static pid_t idle_opener(struct __test_metadata *_metadata, const char *group)
{
	struct mock m;
	int pipes[2];
	pid_t pid;
	char c;

	ASSERT_EQ(0, pipe(pipes));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		join(_metadata, group);
		if (mock_open(&m, "medium", 0, MIG_GROUP))
			_exit(1);
		start(_metadata, &m, 0, &busy);
		write(pipes[1], "", 1);
		for (;;)
			pause();
	}
	close(pipes[1]);
	ASSERT_EQ(1, read(pipes[0], &c, 1))
		STEP("open a device in a cgroup");
	close(pipes[0]);
	return pid;
}

/* The worker uses CPU time of the opener's cgroup, which has no other running task. */
TEST_F_TIMEOUT(payer, opener_pays_for_cpu_time, 120)
{
	int status;
	__u64 used;
	pid_t pid;

	NEED_OPTION("medium");
	pid = idle_opener(_metadata, self->group);
	used = value(_metadata, self->group, "cpu.stat", "usage_usec ");
	WAIT_FOR(value(_metadata, self->group, "cpu.stat", "usage_usec ") > used + 100000,
		 "CPU time of the worker is used by the cgroup of the opener");
	kill(pid, SIGKILL);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
}

/* Writes a setting of the cgroup. */
static void set(struct __test_metadata *_metadata, const char *group, const char *file,
		const char *word)
{
	char path[160];

	snprintf(path, sizeof(path), "%s/%s", group, file);
	ASSERT_EQ(0, write_word(path, word))
		STEP("write %s to %s", word, path);
}

/* An idle process in the cgroup. */
static pid_t bystander(struct __test_metadata *_metadata, const char *group)
{
	int pipes[2];
	pid_t pid;
	char c;

	ASSERT_EQ(0, pipe(pipes));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		join(_metadata, group);
		write(pipes[1], "", 1);
		for (;;)
			pause();
	}
	close(pipes[1]);
	ASSERT_EQ(1, read(pipes[0], &c, 1));
	close(pipes[0]);
	return pid;
}

/* Opens a device whose worker is in the cgroup, and leaves the cgroup. */
static void open_in(struct __test_metadata *_metadata, const char *top, const char *group,
		    struct mock *m)
{
	join(_metadata, group);
	ASSERT_EQ(0, mock_open(m, "medium", 0, MIG_GROUP))
		STEP("open a device in a cgroup: %s", m->dev.why);
	join(_metadata, top);
}

/*
 * The runtime of the worker counts against the quota of the cgroup. The kernel does not
 * throttle kthreads, so the worker continues, and state changes are not delayed.
 */
TEST_F_TIMEOUT(payer, worker_uses_the_quota_of_the_opener, 120)
{
	struct mock m;

	NEED_OPTION("medium");
	open_in(_metadata, self->top, self->group, &m);
	set(_metadata, self->group, "cpu.max", "2000 100000");
	start(_metadata, &m, 0, &busy);
	WAIT_FOR(value(_metadata, self->group, "cpu.stat", "nr_throttled ") > 2,
		 "CPU time of the worker counts against cpu.max of the opener");
	expect_moving(_metadata, &m, 0);
	EXPECT_EQ(0, mig_set_state(&m.dev, MIG_STOP, NULL));
	mock_close(&m);
}

/*
 * Allocations of the worker fail at the limit of the opener's cgroup, without killing
 * a process in it.
 */
TEST_F_TIMEOUT(payer, work_beyond_the_limit_fails_and_kills_no_process, 240)
{
	struct dma_desc d = { .op = WRITE, .len = 1, .irq_vector = VFIO_MOCK_IRQ_NONE };
	struct vfio_device_feature_dma_logging_range range = { .length = ZONES * ZONE };
	__u64 granule = PAGE, bitmap[ZONE_PAGES / 64], missing = 0;
	unsigned int failed = 0, i;
	struct mock m;
	char text[32];
	pid_t pid;
	void *mem;

	NEED_OPTION("medium");
	NEED_IOMMUFD_FOR_LOG();
	pid = bystander(_metadata, self->group);
	open_in(_metadata, self->top, self->group, &m);
	mem = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	ASSERT_NE(MAP_FAILED, mem);
	for (i = 0; i < ZONES; i++)
		ASSERT_EQ(0, mig_dma_map(&m.dev, i * ZONE, mem, 16 * PAGE, RW));
	ASSERT_EQ(0, mig_log_start(&m.dev, &granule, &range, 1));
	/* Less than needed for the log: at least a bit for each page of the zones. */
	snprintf(text, sizeof(text), "%llu",
		 value(_metadata, self->group, "memory.current", "") + (64 << 10));
	set(_metadata, self->group, "memory.max", text);
	for (i = 0; i < ZONES; i++) {
		d.iova = i * ZONE;
		d = dma_run(_metadata, &m, 0, &d);
		expect_complete(_metadata, &d, "a transfer without memory for the log");
	}
	EXPECT_LT(0U, value(_metadata, self->group, "memory.events", "max "))
		STEP("reach the limit");
	/* Now there is not enough memory for a piece of a transfer either. */
	d = (struct dma_desc){
		.op = FILL, .len = 64 << 10, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	for (i = 0; i < 8; i++) {
		d = dma_run(_metadata, &m, 0, &d);
		if (d.status == VFIO_MOCK_DMA_FAILED) {
			failed++;
			EXPECT_EQ(VFIO_MOCK_DMA_ERROR_NO_MEMORY, (int)d.error)
				PROMISE("a transfer without memory reports this");
		}
	}
	EXPECT_LT(0U, failed)
		PROMISE("a transfer beyond memory.max fails");
	EXPECT_EQ(0U, value(_metadata, self->group, "memory.events", "oom_kill "))
		PROMISE("work beyond memory.max kills no process");
	EXPECT_EQ(0, waitpid(pid, NULL, WNOHANG));
	set(_metadata, self->group, "memory.max", "max");
	d = dma_run(_metadata, &m, 0, &d);
	expect_complete(_metadata, &d, "a transfer with memory");
	for (i = 0; i < ZONES; i++) {
		memset(bitmap, 0, sizeof(bitmap));
		ASSERT_EQ(0, mig_log_report(&m.dev, i * ZONE, ZONE, PAGE, bitmap));
		missing += !(bitmap[0] & 1);
	}
	EXPECT_EQ(0U, missing)
		PROMISE("pages without memory for the log are reported");
	mock_close(&m);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

/* ---- Frozen cgroups ---- */

/* A thread that closes the device. */
static void *close_main(void *arg)
{
	struct mock *m = arg;

	mig_close_device(&m->dev);
	return NULL;
}

/* Another process closes the device while the cgroup of the opener is frozen. */
TEST_F_TIMEOUT(payer, device_closes_while_its_cgroup_is_frozen, 60)
{
	pthread_t closer;
	struct mock m;
	pid_t pid;

	NEED_OPTION("medium");
	pid = bystander(_metadata, self->group);
	open_in(_metadata, self->top, self->group, &m);
	start(_metadata, &m, 0, &busy);
	set(_metadata, self->group, "cgroup.freeze", "1");
	expect_moving(_metadata, &m, 0);
	EXPECT_EQ(0U, value(_metadata, self->group, "cgroup.events", "frozen "))
		PROMISE("a cgroup of version 2 with a kthread is not reported as frozen");
	ASSERT_EQ(0, pthread_create(&closer, NULL, close_main, &m));
	EXPECT_TRUE(joined(closer))
		PROMISE("a device can be closed while the cgroup of its opener is frozen");
	/* Freeze again: the state is not updated when a kthread leaves. */
	set(_metadata, self->group, "cgroup.freeze", "0");
	set(_metadata, self->group, "cgroup.freeze", "1");
	WAIT_FOR(value(_metadata, self->group, "cgroup.events", "frozen ") == 1,
		 "the cgroup is empty after the close");
	set(_metadata, self->group, "cgroup.freeze", "0");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	mock_close(&m);
}

/* The opener is killed while it is frozen. */
TEST_F_TIMEOUT(payer, frozen_opener_can_be_killed, 60)
{
	struct mock m;
	pid_t pid;

	NEED_OPTION("medium");
	pid = idle_opener(_metadata, self->group);
	set(_metadata, self->group, "cgroup.freeze", "1");
	kill(pid, SIGKILL);
	WAIT_FOR(waitpid(pid, NULL, WNOHANG) == pid,
		 "a frozen process with an open device can be killed");
	set(_metadata, self->group, "cgroup.freeze", "0");
	ASSERT_EQ(0, mock_open(&m, "medium", 0, MIG_GROUP))
		PROMISE("the device is closed: %s", m.dev.why);
	mock_close(&m);
}

FIXTURE(freezer)
{
	char top[64];
	char group[96];
	bool mounted;
};

FIXTURE_SETUP(freezer)
{
	snprintf(self->top, sizeof(self->top), "/tmp/vfio_work_test.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->top));
	if (mount("cgroup", self->top, "cgroup", 0, "freezer"))
		SKIP(return, "no freezer of version 1: %s", strerror(errno));
	self->mounted = true;
	snprintf(self->group, sizeof(self->group), "%s/opener", self->top);
	ASSERT_EQ(0, mkdir(self->group, 0755));
}

FIXTURE_TEARDOWN(freezer)
{
	if (self->group[0] && rmdir(self->group))
		EXPECT_EQ(0, errno)
			PROMISE("the cgroup of the opener is empty after the close");
	if (self->mounted)
		umount2(self->top, MNT_DETACH);
	rmdir(self->top);
}

/* The freezer of version 1 also freezes the worker. */
TEST_F_TIMEOUT(freezer, frozen_worker_does_not_delay_close, 60)
{
	char path[128], text[32];
	unsigned int i;
	pthread_t closer;
	struct mock m;

	NEED_OPTION("medium");
	for (i = 0; i < 2; i++) {
		open_in(_metadata, self->top, self->group, &m);
		/* First busy, then idle. */
		if (i)
			start(_metadata, &m, 0, &busy);
		set(_metadata, self->group, "freezer.state", "FROZEN");
		snprintf(path, sizeof(path), "%s/freezer.state", self->group);
		WAIT_FOR(slurp(path, text, sizeof(text)) && !strcmp(text, "FROZEN\n"),
			 "the worker freezes with the cgroup");
		EXPECT_EQ(0, mig_set_state(&m.dev, MIG_STOP, NULL))
			PROMISE("a frozen worker does not run");
		ASSERT_EQ(0, pthread_create(&closer, NULL, close_main, &m));
		EXPECT_TRUE(joined(closer))
			PROMISE("a close does not wait for a frozen cgroup of the opener");
		set(_metadata, self->group, "freezer.state", "THAWED");
		mock_close(&m);
	}
}

/* ---- Memory limits ---- */

/* Allocations of the worker are charged to the cgroup of the opener. */
TEST_F_TIMEOUT(payer, opener_pays_for_memory, 120)
{
	struct dma_desc d = {
		.op = FILL, .len = 1, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	struct vfio_device_feature_dma_logging_range range = {
		.length = ZONES * ZONE,
	};
	__u64 granule = PAGE, before;
	__s64 charged;
	char *mem, slab[] = "slab_unreclaimable ";
	unsigned int i;
	struct mock m;
	int status;
	pid_t pid;

	NEED_OPTION("medium");
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		join(_metadata, self->group);
		if (mock_open(&m, "medium", 0, MIG_GROUP))
			_exit(1);
		mem = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);
		for (i = 0; i < ZONES; i++)
			if (mem == MAP_FAILED || mig_dma_map(&m.dev, i * ZONE, mem, PAGE, RW))
				_exit(2);
		if (mig_log_start(&m.dev, &granule, &range, 1))
			_exit(3);
		before = value(_metadata, self->group, "memory.stat", slab);
		for (i = 0; i < ZONES; i++) {
			d.iova = i * ZONE;
			dma_run(_metadata, &m, 0, &d);
		}
		charged = value(_metadata, self->group, "memory.stat", slab) - before;
		/*
		 * At least a bit for each page of a zone. Half of it, because the statistics of
		 * a cgroup lag behind.
		 */
		EXPECT_LE((__s64)(ZONES * ZONE_PAGES / 8 / 2), charged)
			PROMISE("a log of %u zones charges the cgroup of the opener (%lld)",
				ZONES, charged);
		mock_close(&m);
		_exit(_metadata->exit_code == KSFT_PASS ? 0 : 4);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status)
		PROMISE("allocations of the worker are charged to the opener");
}

/* Opens a device in a new process, which is moved to @group if that is not NULL. */
static int open_elsewhere(struct __test_metadata *_metadata, const char *size,
			  const char *group)
{
	int status;
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		struct mig_device dev;
		char path[PATH_MAX];

		if (group)
			join(_metadata, group);
		if (sscanf(mig_option(size), "%4095s", path) != 1)
			_exit(255);
		_exit(-mig_open(&dev, path, MIG_GROUP));
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFEXITED(status))
		PROMISE("the opener of a device that does not fit is not killed");
	return WIFEXITED(status) ? -WEXITSTATUS(status) : -EINTR;
}

TEST_F_TIMEOUT(payer, device_exceeding_limit_does_not_open, 60)
{
	char path[128];

	NEED_OPTION("16M");
	EXPECT_EQ(0, open_elsewhere(_metadata, "16M", self->group));
	snprintf(path, sizeof(path), "%s/memory.max", self->group);
	ASSERT_EQ(0, write_word(path, "8M"));
	EXPECT_EQ(-ENOMEM, open_elsewhere(_metadata, "16M", self->group))
		PROMISE("a device that exceeds the limit of its opener does not open");
	EXPECT_EQ(0U, value(_metadata, self->group, "memory.events", "oom_kill "))
		PROMISE("it kills no process of the cgroup");
}

/* The value of @key in /proc/meminfo in KiB. */
static __u64 meminfo(struct __test_metadata *_metadata, const char *key)
{
	return value(_metadata, "/proc", "meminfo", key);
}

TEST_F_TIMEOUT(payer, device_exceeding_memory_kills_no_process, 120)
{
	__u64 available = meminfo(_metadata, "MemAvailable:"), want = 700 << 10;
	int pipes[2], status;
	pid_t pid;
	void *mem;
	char c;

	NEED_OPTION("1G");
	if (available < want + (64 << 10) || available > 8 << 20)
		SKIP(return, "this test cannot fill %llu KiB of memory", available);
	ASSERT_EQ(0, pipe(pipes));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		/* Leave less memory than the device needs. */
		mem = mmap(NULL, (available - want) << 10, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (mem == MAP_FAILED)
			_exit(1);
		write(pipes[1], "", 1);
		for (;;)
			pause();
	}
	close(pipes[1]);
	ASSERT_EQ(1, read(pipes[0], &c, 1))
		STEP("start a process that uses memory");
	EXPECT_EQ(-ENOMEM, open_elsewhere(_metadata, "1G", NULL))
		PROMISE("a device that does not fit into memory does not open");
	EXPECT_EQ(0, waitpid(pid, &status, WNOHANG))
		PROMISE("no process is killed for a device");
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
}

MIG_HARNESS_MAIN(mock_options)
