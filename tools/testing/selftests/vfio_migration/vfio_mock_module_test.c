// SPDX-License-Identifier: GPL-2.0
/*
 * Injects every possible failure into loading and unloading the module vfio_mock, and
 * into creating a device, like vfio_mock_fail_test; but the module must not be in
 * use:
 *
 *	./vfio_mock_module_test --module /path/to/vfio_mock.ko
 */
#include <dirent.h>
#include <sys/syscall.h>

#include "mock.h"
#include "mock_fail.h"

/* The core accepts a failure to create the link in /sys/class/mdev_bus. */
#define TYPE	"/sys/class/vfio_mock/vfio_mock/mdev_supported_types/vfio_mock-64K/"
#define UUID	"5eed0000-fa11-4000-8000-000000000002"
#define DEVICE	"/sys/bus/mdev/devices/" UUID

FIXTURE(module)
{
	int file;
	struct injector in;
	struct nth nth;
	bool was_loaded;
};

static int load(int file)
{
	return syscall(SYS_finit_module, file, "", 0) ? -errno : 0;
}

static int unload(void)
{
	return syscall(SYS_delete_module, "vfio_mock", O_NONBLOCK) ? -errno : 0;
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
	knob("failslab", "reject-start", "0");
	knob("failslab", "reject-end", "0");
	knob("failslab", "require-start", "0");
	knob("failslab", "require-end", "18446744073709551615");
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
 * vfio_create_group(). So no allocation fails there, but all do elsewhere.
 */
TEST_F_TIMEOUT(module, create, 1200)
{
	struct nth *nth = &self->nth;
	const char *why;
	int ret, number;

	ASSERT_EQ(0, load(self->file));
	number = next_number(_metadata);
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

MIG_HARNESS_MAIN(mock_options)
