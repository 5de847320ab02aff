// SPDX-License-Identifier: GPL-2.0
/*
 * Devices of the driver vfio_odd, for properties of the crate vfio that no device of
 * vfio_mock can show.
 *
 *	./vfio_odd_test --module /path/to/vfio_mock.ko
 *
 * vfio_odd.ko is in the directory of that module. run_mock.sh runs this.
 */
#include <limits.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "mock.h"

#define odd_data	FIXTURE_DATA(odd)

#define LARGEST		(1ULL << 40)

FIXTURE(odd)
{
	struct guest guest;
	bool loaded;
	bool created;
};

MIG_EACH_BACKEND(odd);

FIXTURE_SETUP(odd)
{
	const char *module = mig_option("module");
	char path[PATH_MAX];
	int fd;

	self->guest.dev.fd = -1;
	if (variant->backend == MIG_IOMMUFD && access("/dev/iommu", F_OK))
		SKIP(return, "no iommufd");
	if (!module)
		SKIP(return, "no --module");
	snprintf(path, sizeof(path), "%.*s/vfio_odd.ko", (int)(strrchr(module, '/') - module),
		 module);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "vfio_odd.ko is not built");
	ASSERT_EQ(0, syscall(SYS_finit_module, fd, "", 0))
		STEP("load %s: %s", path, strerror(errno));
	close(fd);
	self->loaded = true;
}

FIXTURE_TEARDOWN(odd)
{
	if (self->guest.dev.fd >= 0)
		mig_close(&self->guest.dev);
	if (self->created)
		EXPECT_EQ(0, write_word(self->guest.remove, "1"));
	if (self->loaded)
		EXPECT_EQ(0, syscall(SYS_delete_module, "vfio_odd", 0))
			STEP("unload vfio_odd: %s", strerror(errno));
}

/* Creates a device of a type without opening it; 0 or -errno. */
static int create(odd_data *self, const char *type)
{
	char path[128];
	int ret;

	snprintf(path, sizeof(path),
		 "/sys/class/mdev_bus/vfio_odd/mdev_supported_types/vfio_odd-%s", type);
	ret = mock_create(&self->guest, path);
	self->created = !ret;
	return ret;
}

/* A number in a file of the device. */
static __u64 attribute(struct __test_metadata *_metadata, odd_data *self, const char *name)
{
	char path[128], text[32];
	ssize_t len;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", self->guest.path, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd)
		STEP("open %s", path);
	len = read(fd, text, sizeof(text) - 1);
	close(fd);
	ASSERT_LT(0, len);
	text[len] = 0;
	return strtoull(text, NULL, 10);
}

/* ---- Reads and writes ---- */

/* A thread that makes one call to the device. */
struct user {
	struct poller poller;
	struct mig_device *dev;
	int ret;
};

static void *read_main(void *arg)
{
	struct user *u = arg;
	__u32 value;

	atomic_store(&u->poller.tid, gettid());
	u->ret = mig_region_read(u->dev, BAR0, 0, &value, sizeof(value));
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void *write_main(void *arg)
{
	struct user *u = arg;
	__u32 value = 1;

	atomic_store(&u->poller.tid, gettid());
	u->ret = mig_region_write(u->dev, BAR0, 0, &value, sizeof(value));
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void *reset_main(void *arg)
{
	struct user *u = arg;

	atomic_store(&u->poller.tid, gettid());
	u->ret = ioctl(u->dev->fd, VFIO_DEVICE_RESET) ? -errno : 0;
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void *memory_off_main(void *arg)
{
	__u16 command = 0;
	struct user *u = arg;

	atomic_store(&u->poller.tid, gettid());
	u->ret = mig_region_write(u->dev, CONFIG, 4, &command, sizeof(command));
	atomic_store(&u->poller.done, true);
	return NULL;
}

static void begin(struct __test_metadata *_metadata, odd_data *self, struct user *u,
		  void *(*what)(void *))
{
	*u = (struct user){ .dev = &self->guest.dev };
	ASSERT_EQ(0, pthread_create(&u->poller.thread, NULL, what, u));
	wait_until_asleep(&u->poller);
}

/* Opens a device and begins a read that waits in the driver. */
static void begin_slow_read(struct __test_metadata *_metadata, odd_data *self,
			    enum mig_backend backend, struct user *reader)
{
	ASSERT_EQ(0, create(self, "slow_read"));
	ASSERT_EQ(0, mig_open(&self->guest.dev, self->guest.path, backend))
		STEP("open the device: %s", self->guest.dev.why);
	begin(_metadata, self, reader, read_main);
	while (!attribute(_metadata, self, "begun"))
		usleep(1000);
}

static void let_reads_end(struct __test_metadata *_metadata, odd_data *self)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/open", self->guest.path);
	ASSERT_EQ(0, write_word(path, "1"));
}

/* Like vfio-pci, whose reads hold memory_lock. */
TEST_F_TIMEOUT(odd, memory_space_off_waits_for_reads, 60)
{
	struct user reader, writer;

	begin_slow_read(_metadata, self, variant->backend, &reader);
	begin(_metadata, self, &writer, memory_off_main);
	EXPECT_FALSE(atomic_load(&writer.poller.done))
		PROMISE("no read is in progress when memory space has been disabled");
	EXPECT_EQ(0U, attribute(_metadata, self, "ended"));
	let_reads_end(_metadata, self);
	ASSERT_TRUE(joined(writer.poller.thread))
		PROMISE("the write to the command register ends when the reads have ended");
	EXPECT_EQ(2, writer.ret);
	ASSERT_TRUE(joined(reader.poller.thread));
	EXPECT_EQ(4, reader.ret)
		PROMISE("a read that was in progress succeeds");
	begin(_metadata, self, &reader, read_main);
	ASSERT_TRUE(joined(reader.poller.thread));
	EXPECT_EQ(-EIO, reader.ret);
}

TEST_F_TIMEOUT(odd, reset_and_accesses_wait_for_each_other, 60)
{
	struct user reader, second, writer, resetter;

	begin_slow_read(_metadata, self, variant->backend, &reader);
	begin(_metadata, self, &resetter, reset_main);
	EXPECT_FALSE(atomic_load(&resetter.poller.done))
		PROMISE("no read is in progress during a reset");
	begin(_metadata, self, &second, read_main);
	EXPECT_FALSE(atomic_load(&second.poller.done));
	EXPECT_EQ(1U, attribute(_metadata, self, "begun"))
		PROMISE("no read begins during a reset");
	begin(_metadata, self, &writer, write_main);
	EXPECT_FALSE(atomic_load(&writer.poller.done))
		PROMISE("no write begins during a reset");
	let_reads_end(_metadata, self);
	ASSERT_TRUE(joined(resetter.poller.thread));
	EXPECT_EQ(0, resetter.ret);
	ASSERT_TRUE(joined(second.poller.thread))
		PROMISE("a read continues after the reset");
	EXPECT_EQ(4, second.ret);
	ASSERT_TRUE(joined(writer.poller.thread))
		PROMISE("a write continues after the reset");
	EXPECT_EQ(4, writer.ret);
	ASSERT_TRUE(joined(reader.poller.thread));
	EXPECT_EQ(4, reader.ret);
}

/* A process that is killed while its access waits for a reset ends immediately. */
TEST_F_TIMEOUT(odd, access_that_waits_for_a_reset_can_be_killed, 60)
{
	void *(*const accesses[])(void *) = { read_main, write_main };
	struct user reader, resetter;
	unsigned int i;
	pid_t pid;

	begin_slow_read(_metadata, self, variant->backend, &reader);
	begin(_metadata, self, &resetter, reset_main);
	for (i = 0; i < ARRAY_SIZE(accesses); i++) {
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid) {
			struct user second = { .dev = &self->guest.dev };

			accesses[i](&second);
			_exit(0);
		}
		WAIT_FOR(sleeps_uninterruptibly(pid), "an access waits for a reset");
		ASSERT_EQ(0, kill(pid, SIGKILL));
		WAIT_FOR(waitpid(pid, NULL, WNOHANG) == pid,
			 "an access that waits for a reset can be killed");
		EXPECT_FALSE(atomic_load(&resetter.poller.done));
	}
	let_reads_end(_metadata, self);
	ASSERT_TRUE(joined(resetter.poller.thread));
	ASSERT_TRUE(joined(reader.poller.thread));
}

/* ---- Failures ---- */

static __u32 get_word(struct __test_metadata *_metadata, const struct mig_device *dev)
{
	__u32 value;

	ASSERT_EQ(4, mig_region_read(dev, BAR0, 0, &value, sizeof(value)));
	return value;
}

static __u32 get_state(struct __test_metadata *_metadata, const struct mig_device *dev)
{
	__u32 state;

	ASSERT_EQ(0, mig_get_state(dev, &state));
	return state;
}

TEST_F(odd, failed_reset_stops_the_device_until_the_next)
{
	struct mig_device *dev = &self->guest.dev;
	__u32 value = 1;
	__u32 *map;

	ASSERT_EQ(0, create(self, "failing_reset"));
	ASSERT_EQ(0, mig_open(dev, self->guest.path, variant->backend))
		STEP("open the device: %s", dev->why);
	ASSERT_EQ(0, mig_region_map(dev, BAR0, 0, mig_page_size(), (void **)&map));
	ASSERT_EQ(4, mig_region_write(dev, BAR0, 0, &value, sizeof(value)));
	map[0] += 1;
	ASSERT_EQ(2U, get_word(_metadata, dev));

	EXPECT_EQ(-EIO, mig_reset(dev))
		PROMISE("a reset fails with the error of the driver");
	EXPECT_EQ(MIG_ERROR, get_state(_metadata, dev))
		PROMISE("after a failed reset the state is ERROR");
	EXPECT_EQ(-EINVAL, mig_set_state(dev, MIG_RUNNING, NULL))
		PROMISE("only a reset leaves ERROR");
	value = 3;
	EXPECT_EQ(4, mig_region_write(dev, BAR0, 0, &value, sizeof(value)));
	EXPECT_EQ(2U, get_word(_metadata, dev))
		PROMISE("a device in ERROR is stopped: writes have no effect");
	map[0] = 4;
	EXPECT_EQ(2U, get_word(_metadata, dev))
		PROMISE("a device in ERROR is stopped: stores have no effect");

	ASSERT_EQ(0, mig_reset(dev))
		PROMISE("a reset leaves ERROR");
	EXPECT_EQ(MIG_RUNNING, get_state(_metadata, dev))
		PROMISE("after a reset the state is RUNNING");
	EXPECT_EQ(0U, get_word(_metadata, dev));
	value = 5;
	EXPECT_EQ(4, mig_region_write(dev, BAR0, 0, &value, sizeof(value)));
	EXPECT_EQ(5U, get_word(_metadata, dev))
		PROMISE("after a reset writes have an effect");
	map[0] += 1;
	EXPECT_EQ(6U, get_word(_metadata, dev))
		PROMISE("after a reset stores have an effect");
	munmap(map, mig_page_size());
}

/* ---- Sizes ---- */

TEST_F(odd, bar_is_not_larger_than_a_region)
{
	struct vfio_region_info info, next;
	__u8 byte;

	EXPECT_EQ(-EINVAL, create(self, "too_large_bar"))
		PROMISE("a BAR that reaches into the next region is refused");
	ASSERT_EQ(0, create(self, "largest_bar"));
	ASSERT_EQ(0, mig_open(&self->guest.dev, self->guest.path, variant->backend))
		STEP("open the device: %s", self->guest.dev.why);
	ASSERT_EQ(0, mig_region_info(&self->guest.dev, BAR0, &info));
	ASSERT_EQ(0, mig_region_info(&self->guest.dev, BAR0 + 1, &next));
	EXPECT_EQ(LARGEST, info.size);
	EXPECT_EQ(info.offset + info.size, next.offset)
		PROMISE("regions do not overlap");
	EXPECT_EQ(1, mig_region_read(&self->guest.dev, BAR0, LARGEST - 1, &byte, 1));
	EXPECT_EQ(-EINVAL, mig_region_read(&self->guest.dev, BAR0, LARGEST, &byte, 1));
}

/* ---- Mappable memory ---- */

TEST_F(odd, mappable_memory_is_the_content_of_a_bar)
{
	static const char *const types[] = { "mmap_small", "mmap_msix", "mmap_config" };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(types); i++) {
		ASSERT_EQ(0, create(self, types[i]));
		EXPECT_EQ(-EINVAL, mig_open(&self->guest.dev, self->guest.path, variant->backend))
			PROMISE("a device of type %s does not open", types[i]);
		mig_close(&self->guest.dev);
		ASSERT_EQ(0, write_word(self->guest.remove, "1"));
		self->created = false;
	}
}

MIG_HARNESS_MAIN(mock_options)
