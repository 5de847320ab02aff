// SPDX-License-Identifier: GPL-2.0
/*
 * Injects every possible failure into loading and unloading the module vfio_mock, and
 * into creating a device, like vfio_mock_fail_test; but the module must not be in
 * use. Also traces all modules of this repository at the same time:
 *
 *	./vfio_mock_module_test --module /path/to/vfio_mock.ko
 */
#include <dirent.h>
#include <libgen.h>
#include <sys/mount.h>
#include <sys/syscall.h>

#include "mock.h"
#include "mock_fail.h"

/* The core accepts a failure to create the link in /sys/class/mdev_bus. */
#define TYPES	"/sys/class/vfio_mock/vfio_mock/mdev_supported_types/"
#define TYPE	TYPES "vfio_mock-64K/"
#define OTHER	TYPES "vfio_mock-1M/"
#define UUID	"5eed0000-fa11-4000-8000-000000000002"
#define DEVICE	"/sys/bus/mdev/devices/" UUID

FIXTURE(module)
{
	int file;
	struct injector in;
	struct nth nth;
	bool was_loaded;
};

static int load_with(int file, const char *parameters)
{
	return syscall(SYS_finit_module, file, parameters, 0) ? -errno : 0;
}

static int load(int file)
{
	return load_with(file, "");
}

static int unload_module(const char *name)
{
	return syscall(SYS_delete_module, name, O_NONBLOCK) ? -errno : 0;
}

static int unload(void)
{
	return unload_module("vfio_mock");
}

FIXTURE_SETUP(module)
{
	const char *path = mig_option("module");
	const char *why = NULL;

	self->file = -1;
	if (!path)
		SKIP(return, "no --module");
	if (fail_open(&self->in, &why))
		SKIP(return, "%s", why);
	self->was_loaded = !access("/sys/module/vfio_mock", F_OK);
	if (self->was_loaded && unload())
		SKIP(return, "the module is in use");
	self->file = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, self->file)
		STEP("open %s: %s", path, strerror(errno));
}

FIXTURE_TEARDOWN(module)
{
	if (self->file < 0)
		return;
	unload();
	if (self->was_loaded)
		load(self->file);
	close(self->file);
	injector_close(&self->in);
}

static void expect_gone(struct __test_metadata *_metadata)
{
	static const char *const places[] = {
		"/sys/module/vfio_mock", "/sys/class/vfio_mock",
		"/sys/class/mdev_bus/vfio_mock", "/sys/bus/mdev/drivers/vfio_mock",
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(places); i++) {
		EXPECT_NE(0, access(places[i], F_OK))
			PROMISE("a module that is not loaded has nothing at %s", places[i]);
	}
}

/*
 * A module that failed to load leaves nothing behind, and can be loaded. The PCI core (7.3)
 * puts a reference to a host bridge twice if the device of its bus cannot be added, and
 * does not check an allocation for the numbers of buses. No allocation fails
 * there. Before the module's init function, event_define_fields() warns if it cannot
 * describe a tracepoint, so failures begin at do_init_module().
 */
TEST_F_TIMEOUT(module, load, 1200)
{
	struct nth *nth = &self->nth;
	const char *why;
	int ret;

	why = fail_limit("failslab", "reject", "pci_scan_root_bus_bridge");
	if (!why)
		why = fail_limit("failslab", "require", "do_init_module");
	if (why)
		SKIP(return, "%s", why);
	for_each_failure(nth, "loading the module") {
		/* There are hundreds, and a slow machine takes seconds for each. */
		nth->stride = mig_patience() * mig_patience();
		/* From the driver core without a directory for the module's drivers. */
		nth->also = -EINVAL;
		nth_begin(nth);
		ret = load(self->file);
		nth_end(nth, ret);
		if (!ret) {
			EXPECT_EQ(0, access(TYPE "create", F_OK))
				PROMISE("devices can be created when the module is loaded");
			ASSERT_EQ(0, unload());
		}
		expect_gone(_metadata);
	}
}

TEST_F_TIMEOUT(module, unload, 600)
{
	struct nth *nth = &self->nth;
	int ret;

	for_each_failure(nth, "unloading the module") {
		ASSERT_EQ(0, load(self->file));
		nth_begin(nth);
		ret = unload();
		nth_end(nth, ret);
		if (ret) {
			ASSERT_EQ(0, unload())
				PROMISE("a module that failed to unload can be unloaded: %s",
					strerror(errno));
		}
		expect_gone(_metadata);
	}
}

/*
 * Creates and removes a device, and returns its number in vfio core, which is the
 * first free one: a leaked device changes it.
 */
static int next_number(struct __test_metadata *_metadata)
{
	struct dirent *entry;
	int number = -1;
	DIR *dir;

	ASSERT_EQ(0, write_word(TYPE "create", UUID))
		STEP("create a device");
	dir = opendir(DEVICE "/vfio-dev");
	ASSERT_NE(NULL, dir);
	while (number < 0 && (entry = readdir(dir)))
		sscanf(entry->d_name, "vfio%d", &number);
	closedir(dir);
	ASSERT_LE(0, number)
		STEP("find the name of the device in its vfio-dev");
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	return number;
}

/*
 * vfio core (7.3) warns in vfio_group_release() about its own failures in
 * vfio_create_group(). So no allocation fails there, but all do elsewhere. With the
 * option fixed, the kernel has no such fault.
 */
TEST_F_TIMEOUT(module, create, 1200)
{
	struct nth *nth = &self->nth;
	const char *why = NULL;
	int ret, number;

	ASSERT_EQ(0, load(self->file));
	number = next_number(_metadata);
	if (!mig_option("fixed"))
		why = fail_limit("failslab", "reject", "vfio_create_group");
	if (why)
		SKIP(return, "%s", why);
	for_each_failure(nth, "the creation of a device") {
		nth_begin(nth);
		ret = write_word(TYPE "create", UUID);
		nth_end(nth, ret);
		if (ret) {
			EXPECT_NE(0, access(DEVICE, F_OK))
				PROMISE("a device that was not created does not exist");
			continue;
		}
		EXPECT_EQ(0, access(DEVICE, F_OK));
		ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	}
	EXPECT_EQ(number, next_number(_metadata))
		PROMISE("the core has no reference to devices that were not created");
}

/* Reads a knob of the device. */
static const char *read_knob(struct __test_metadata *_metadata, const char *name)
{
	static char value[256];
	char path[128];
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), DEVICE "/knobs/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd)
		STEP("open %s", path);
	ret = read(fd, value, sizeof(value) - 1);
	close(fd);
	ASSERT_LT(0, ret);
	value[ret] = 0;
	return value;
}

TEST_F(module, defaults)
{
	static const char *const bad[] = {
		"defaults=save_rate", "defaults=save_rate=x", "defaults=rate=7",
		"defaults=save_rate=7,dirtied=7", "defaults=migration_flags=6",
		"defaults==", "defaults==7", "defaults=save_rate=7,\xff", "defaults=faults=\xff",
		"defaults=\"save_rate =7\"", "defaults=\"save_rate= 7\"",
		"defaults=save_rate=18446744073709551616", "defaults=save_rate=-1",
	};
	static const char good[] =
		"defaults=\"save_rate=0x10, faults=size; read nth=2,migration_flags=1,dma_log=0\"";
	static const char *const fixed[] = {
		DEVICE "/knobs/migration_flags", DEVICE "/knobs/dma_log", DEVICE "/knobs/dirtied",
	};
	unsigned int i;

	ASSERT_EQ(0, load_with(self->file, good));
	ASSERT_EQ(0, write_word(TYPE "create", UUID));
	EXPECT_STREQ("16\n", read_knob(_metadata, "save_rate"));
	EXPECT_STREQ("size errno=EIO; read nth=2 errno=EIO\n", read_knob(_metadata, "faults"));
	EXPECT_STREQ("1\n", read_knob(_metadata, "migration_flags"));
	EXPECT_STREQ("0\n", read_knob(_metadata, "dma_log"));
	EXPECT_STREQ("0\n", read_knob(_metadata, "load_rate"));
	EXPECT_NE(0, access("/sys/module/vfio_mock/parameters/defaults", F_OK))
		PROMISE("the parameter cannot be written while it is read");
	for (i = 0; i < ARRAY_SIZE(fixed); i++) {
		ASSERT_EQ(0, chmod(fixed[i], 0666));
		EXPECT_GT(0, write_word(fixed[i], "0"))
			PROMISE("%s cannot be written whatever its mode is", fixed[i]);
	}
	EXPECT_STREQ("1\n", read_knob(_metadata, "migration_flags"));
	ASSERT_EQ(0, write_word(DEVICE "/knobs/save_rate", "7"));
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	ASSERT_EQ(0, write_word(TYPE "create", UUID));
	EXPECT_STREQ("16\n", read_knob(_metadata, "save_rate"))
		PROMISE("each new device begins with the defaults");
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	ASSERT_EQ(0, unload());

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		ASSERT_EQ(0, load_with(self->file, bad[i]));
		EXPECT_EQ(-EINVAL, write_word(TYPE "create", UUID))
			PROMISE("no device is created with %s", bad[i]);
		EXPECT_NE(0, access(DEVICE, F_OK));
		ASSERT_EQ(0, unload());
	}
}

/* Is there a new message in the kernel log that has this text? */
static bool is_logged(int kmsg, const char *text)
{
	char record[4096];
	bool found = false;
	ssize_t len;

	while ((len = read(kmsg, record, sizeof(record) - 1)) > 0 || errno == EPIPE) {
		record[len > 0 ? len : 0] = 0;
		found = found || strstr(record, text);
	}
	return found;
}

TEST_F(module, invalid_default_is_logged)
{
	/* In /dev/kmsg, \x5c is a backslash and \x0a a newline. */
	static const char *const cases[][2] = {
		{ "defaults=rate=7", "invalid default \"rate=7\"" },
		{ "defaults=\"rate=7\nvfio_mock: fake\"",
		  "invalid default \"rate=7\\x5cnvfio_mock: fake\"" },
		{ "defaults=save_rate=7,\xff", "invalid default \"\\x5cxff\"" },
	};
	unsigned int i;
	int kmsg;

	kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	ASSERT_LE(0, kmsg);
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		ASSERT_EQ(0, load_with(self->file, cases[i][0]));
		ASSERT_LE(0, lseek(kmsg, 0, SEEK_END));
		EXPECT_EQ(-EINVAL, write_word(TYPE "create", UUID));
		EXPECT_TRUE(is_logged(kmsg, cases[i][1]))
			PROMISE("the log has: %s", cases[i][1]);
		ASSERT_EQ(0, unload());
	}
	close(kmsg);
}

TEST_F(module, defaults_have_a_length)
{
	/* The kernel accepts 1024 bytes. */
	static char text[9 + 1024 + 2];
	char *end = stpcpy(text, "defaults=");

	memset(end, ',', 1024);
	memcpy(end + 1024 - strlen("save_rate=7"), "save_rate=7", strlen("save_rate=7"));
	ASSERT_EQ(0, load_with(self->file, text));
	ASSERT_EQ(0, write_word(TYPE "create", UUID));
	EXPECT_STREQ("7\n", read_knob(_metadata, "save_rate"));
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	ASSERT_EQ(0, unload());
	end[1024] = '7';
	EXPECT_EQ(-ENOSPC, load_with(self->file, text));
}

/* A device of another type counts, too. */
TEST_F(module, max_instances)
{
	char text[16] = {};
	int fd;

	ASSERT_EQ(0, load_with(self->file, "max_instances=1"));
	ASSERT_EQ(0, write_word(TYPE "create", UUID));
	fd = open(OTHER "available_instances", O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	ASSERT_LT(0, read(fd, text, sizeof(text) - 1));
	close(fd);
	EXPECT_STREQ("0\n", text);
	EXPECT_EQ(-EUSERS, write_word(OTHER "create", "5eed0000-fa11-4000-8000-000000000003"))
		PROMISE("no more devices than max_instances are created");
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
	ASSERT_EQ(0, write_word(TYPE "create", UUID));
	ASSERT_EQ(0, write_word(DEVICE "/remove", "1"));
}

#define TRACING	"/sys/kernel/tracing/"

/* The modules that have the tracepoints of the crate. */
static const char *const traced_modules[] = {
	"vfio_mock", "vfio_minimal", "vfio_fw", "vfio_note", "vfio_odd", "vfio_membar",
	"vfio_kunit",
};

#define MODULES	ARRAY_SIZE(traced_modules)

FIXTURE(events)
{
	/* Loaded now, and before the test. */
	bool loaded[MODULES], before[MODULES];
	char text[1 << 16];
};

#define events_data	FIXTURE_DATA(events)

FIXTURE_SETUP(events)
{
	const char *path = mig_option("module");
	char folder[PATH_MAX], file[PATH_MAX + 64];
	unsigned int i;
	int fd, ret;

	if (!path)
		SKIP(return, "no --module");
	if (mount("tracefs", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "no tracefs: %s", strerror(errno));
	/* For vfio_membar. */
	if (system("modprobe -q vfio-pci-core"))
		TH_LOG("  vfio-pci-core cannot be loaded");
	for (i = 0; i < MODULES; i++) {
		snprintf(folder, sizeof(folder), "%s", path);
		snprintf(file, sizeof(file), "%s/%s.ko", dirname(folder), traced_modules[i]);
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		ret = load(fd);
		self->before[i] = ret == -EEXIST;
		self->loaded[i] = !ret || self->before[i];
		close(fd);
	}
}

/* Unloads the modules that were not loaded before. */
static void unload_all(struct __test_metadata *_metadata, events_data *self)
{
	unsigned int i;

	for (i = 0; i < MODULES; i++) {
		if (self->loaded[i] && !self->before[i])
			EXPECT_EQ(0, unload_module(traced_modules[i]))
				STEP("unload %s", traced_modules[i]);
		self->loaded[i] = false;
	}
}

FIXTURE_TEARDOWN(events)
{
	char path[256];
	unsigned int i;

	for (i = 0; i < MODULES; i++) {
		snprintf(path, sizeof(path), TRACING "events/%s/enable", traced_modules[i]);
		write_word(path, "0");
	}
	unload_all(_metadata, self);
}

/* Reads the start of a file as a string. */
static void read_start(struct __test_metadata *_metadata, const char *path, char *text,
		       size_t size)
{
	FILE *file = fopen(path, "r");

	ASSERT_NE(NULL, file)
		STEP("open %s: %s", path, strerror(errno));
	text[fread(text, 1, size - 1, file)] = 0;
	fclose(file);
}

/* Creates a device of a module, stops and removes it; returns its traced arcs to STOP. */
static unsigned int arcs(struct __test_metadata *_metadata, events_data *self,
			 const char *name)
{
	struct mig_device dev;
	unsigned int count = 0;
	char path[256], *at, *end;
	int ret;

	snprintf(path, sizeof(path), "/sys/class/mdev_bus/%s/mdev_supported_types/%s-64K/create",
		 name, name);
	ASSERT_EQ(0, write_word(path, UUID))
		STEP("create a device of %s", name);
	ASSERT_EQ(0, clear_file(TRACING "trace"));
	ret = mig_open(&dev, DEVICE, access("/dev/iommu", F_OK) ? MIG_GROUP : MIG_IOMMUFD);
	EXPECT_EQ(0, ret);
	if (!ret) {
		EXPECT_EQ(0, mig_set_state(&dev, MIG_STOP, NULL));
		mig_close(&dev);
	}
	EXPECT_EQ(0, write_word(DEVICE "/remove", "1"));
	read_start(_metadata, TRACING "trace", self->text, sizeof(self->text));
	for (at = self->text; (at = strstr(at, "vfio_arc: device=" UUID)); at = end) {
		end = strchrnul(at, '\n');
		if (memmem(at, end - at, " to=STOP ", 9))
			count++;
	}
	return count;
}

TEST_F_TIMEOUT(events, of_all_modules_are_traced, 300)
{
	char path[256], ids[MODULES][16];
	unsigned int i, j, count = 0;

	for (i = 0; i < MODULES; i++) {
		if (!self->loaded[i]) {
			TH_LOG("  without %s", traced_modules[i]);
			continue;
		}
		snprintf(path, sizeof(path), TRACING "events/%s/enable", traced_modules[i]);
		EXPECT_EQ(0, write_word(path, "1"))
			STEP("enable the events of %s", traced_modules[i]);
		snprintf(path, sizeof(path), TRACING "events/%s/vfio_arc/id", traced_modules[i]);
		read_start(_metadata, path, ids[count], sizeof(ids[count]));
		for (j = 0; j < count; j++) {
			EXPECT_STRNE(ids[j], ids[count])
				PROMISE("the events of each module have numbers of their own");
		}
		count++;
	}
	/* Those that are always built. */
	for (i = 0; i < 2; i++) {
		ASSERT_TRUE(self->loaded[i]);
		EXPECT_EQ(1U, arcs(_metadata, self, traced_modules[i]))
			PROMISE("an event of %s is traced once", traced_modules[i]);
	}
	/* With enabled events. */
	unload_all(_metadata, self);
	for (i = 0; i < MODULES; i++) {
		snprintf(path, sizeof(path), TRACING "events/%s", traced_modules[i]);
		if (!self->before[i])
			EXPECT_NE(0, access(path, F_OK))
				PROMISE("a module that is not loaded has no events");
	}
}

MIG_HARNESS_MAIN(mock_options)
