/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Helpers for the tests of a vfio_mock device: registers, state memory, config
 * space and commands, and a copy of the expected content of the memory.
 */
#ifndef MOCK_H
#define MOCK_H

#include <limits.h>
#include <sys/stat.h>

#include "mig_test.h"
#include "vfio_mock.h"

#define BAR0	VFIO_PCI_BAR0_REGION_INDEX
#define BAR2	VFIO_PCI_BAR2_REGION_INDEX
#define CONFIG	VFIO_PCI_CONFIG_REGION_INDEX

#define PAGE	mig_page_size()

/* small and medium are the smallest types with this number of kernel pages. */
#define SMALL_PAGES	16

/* Options of the programs for vfio_mock. Each program accepts all of them. */
static struct mig_option mock_options[] = {
	{ .name = "small", .argument = "'PATH...'", .help = "devices in sysfs with 16 pages" },
	{ .name = "medium", .argument = "'PATH...'", .help = "devices with 256 pages" },
	{ .name = "16M", .argument = "'PATH...'", .help = "devices with 16 MiB" },
	{ .name = "1G", .argument = "PATH", .help = "a device with 1 GiB" },
	{ .name = "module", .argument = "FILE", .help = "vfio_mock.ko, to load it again" },
	{ .name = "calls", .argument = "N", .number = true,
	  .help = "number of calls to fuzz (20000)" },
	{ .name = "seed", .argument = "N", .number = true, .help = "seed of the calls (1)" },
	{}
};

/* All state visible to software, except for the state memory. */
struct mock_front {
	__u8 registers[VFIO_MOCK_REGS_END];
	__u8 msix_table[VFIO_MOCK_MSIX_VECTORS * 16];
	__u8 msix_pba[8];
	__u8 config[256];
};

struct mock {
	struct mig_device dev;
	char path[PATH_MAX];
	__u64 offset[VFIO_PCI_NUM_REGIONS];
	struct mock_front fresh;	/* the state after open */
	__u64 size;		/* of the state memory */
	__u8 *want;		/* the expected content of the state memory */
	__u8 *seen;
};

/* One access; the number of bytes or -errno. */
static inline ssize_t mock_read(const struct mock *m, int region, __u64 at,
				void *buf, size_t len)
{
	ssize_t ret = pread(m->dev.fd, buf, len, m->offset[region] + at);

	return ret < 0 ? -errno : ret;
}

static inline ssize_t mock_write(const struct mock *m, int region, __u64 at,
				 const void *buf, size_t len)
{
	ssize_t ret = pwrite(m->dev.fd, buf, len, m->offset[region] + at);

	return ret < 0 ? -errno : ret;
}

static inline int mock_read_front(const struct mock *m, struct mock_front *front)
{
	if (mock_read(m, BAR0, 0, front->registers, sizeof(front->registers)) !=
	    sizeof(front->registers) ||
	    mock_read(m, BAR0, VFIO_MOCK_MSIX_TABLE, front->msix_table,
		      sizeof(front->msix_table)) != sizeof(front->msix_table) ||
	    mock_read(m, BAR0, VFIO_MOCK_MSIX_PBA, front->msix_pba,
		      sizeof(front->msix_pba)) != sizeof(front->msix_pba) ||
	    mock_read(m, CONFIG, 0, front->config, sizeof(front->config)) !=
	    sizeof(front->config))
		return -EIO;
	return 0;
}

/* Reads the properties of a device that was just opened. */
static inline int mock_get_to_know(struct mock *m)
{
	struct vfio_region_info info;
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(m->offset); i++) {
		ret = mig_region_info(&m->dev, i, &info);
		if (ret)
			return ret;
		m->offset[i] = info.offset;
		if (i == BAR2)
			m->size = info.size;
	}
	m->want = calloc(1, m->size);
	m->seen = calloc(1, m->size);
	if (!m->want || !m->seen)
		return -ENOMEM;
	return mock_read_front(m, &m->fresh);
}

/* Opens the device at @path. */
static inline int mock_open_path(struct mock *m, const char *path, enum mig_backend backend)
{
	int ret;

	*m = (struct mock){ .dev.fd = -1 };
	snprintf(m->path, sizeof(m->path), "%s", path);
	ret = mig_open(&m->dev, m->path, backend);
	return ret ? ret : mock_get_to_know(m);
}

/*
 * Opens a path in the option @name: the first one if @which is 0, and so on. -ENODEV:
 * the option has no such path.
 */
static inline int mock_open(struct mock *m, const char *name, int which,
			    enum mig_backend backend)
{
	const char *value = mig_option(name);
	char path[PATH_MAX];
	int n = 0;

	*m = (struct mock){ .dev.fd = -1 };
	if (!value)
		return -ENODEV;
	do {
		value += n;
		if (sscanf(value, "%4095s%n", path, &n) != 1)
			return -ENODEV;
	} while (which--);
	return mock_open_path(m, path, backend);
}

/*
 * The size of the state memory by the name of the type, such as "vfio_mock-64K", or by
 * BAR2 of a PCI function; or 0.
 */
static inline __u64 mock_type_size(const struct mock *m)
{
	char path[PATH_MAX + 16], type[PATH_MAX] = "", unit = 0;
	unsigned long long size = 0;
	const char *name;
	struct stat bar;

	snprintf(path, sizeof(path), "%s/resource2", m->path);
	if (!stat(path, &bar))
		return bar.st_size;
	snprintf(path, sizeof(path), "%s/mdev_type", m->path);
	if (readlink(path, type, sizeof(type) - 1) < 0)
		return 0;
	name = strrchr(type, '-');
	if (!name || sscanf(name, "-%llu%c", &size, &unit) != 2)
		return 0;
	switch (unit) {
	case 'K':
		return size << 10;
	case 'M':
		return size << 20;
	case 'G':
		return size << 30;
	default:
		return 0;
	}
}

#define MOCK_TYPE	"/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-"

/* The directory in sysfs of the smallest type with at least @pages kernel pages. */
static inline const char *mock_type(__u64 pages)
{
	static const struct {
		const char *path;
		__u64 size;
	} types[] = {
		{ MOCK_TYPE "64K", 64 << 10 }, { MOCK_TYPE "1M", 1 << 20 },
		{ MOCK_TYPE "16M", 16 << 20 }, { MOCK_TYPE "256M", 256 << 20 },
		{ MOCK_TYPE "1G", 1 << 30 },
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(types) - 1 && types[i].size < pages * PAGE; i++)
		;
	return types[i].path;
}

/* The core takes the bitmaps of a DMA log from iommufd: without it there is no log. */
static inline bool mock_has_log(void)
{
	return !access("/dev/iommu", F_OK);
}

/* Whether the device is behind an IOMMU, which maps pinned memory. */
static inline bool mock_has_iommu(const struct mock *m)
{
	char path[PATH_MAX + 16];

	snprintf(path, sizeof(path), "%s/iommu", m->path);
	return !access(path, F_OK);
}

#define NEED_FAULTS(m) do {							\
	if (mock_has_iommu(m))							\
		SKIP(return, "memory that is mapped for the device is pinned");	\
} while (0)

#define NEED_IOMMUFD_FOR_LOG() do {						\
	if (!mock_has_log())							\
		SKIP(return, "a kernel without iommufd has no DMA log");	\
} while (0)

#define MOCK_OPEN_OR_SKIP(m, name, which, backend) do {				\
	int __ret = mock_open(m, name, which, backend);				\
										\
	if (__ret == -ENODEV)							\
		SKIP(return, "no --%s", name);		\
	if (__ret == -EOPNOTSUPP)						\
		SKIP(return, "backend not available: %s", (m)->dev.why);	\
	ASSERT_EQ(0, __ret)							\
		STEP("open the device: %s", (m)->dev.why);			\
} while (0)

static inline void mock_close(struct mock *m)
{
	mig_close(&m->dev);
	free(m->want);
	free(m->seen);
	m->want = NULL;
	m->seen = NULL;
}

/* A register or configuration field of @width bytes. */
static inline __u64 get(struct __test_metadata *_metadata, const struct mock *m,
			int region, __u64 at, size_t width)
{
	__u64 value = 0;
	ssize_t ret = mock_read(m, region, at, &value, width);

	ASSERT_EQ((ssize_t)width, ret)
		STEP("read %zu bytes at %#llx of region %d", width, at, region);
	return value;
}

static inline void put(struct __test_metadata *_metadata, const struct mock *m,
		       int region, __u64 at, __u64 value, size_t width)
{
	ssize_t ret = mock_write(m, region, at, &value, width);

	ASSERT_EQ((ssize_t)width, ret)
		STEP("write %zu bytes at %#llx of region %d", width, at, region);
}

#define reg32(m, name)		get(_metadata, m, BAR0, VFIO_MOCK_REG_##name, 4)
#define reg64(m, name)		get(_metadata, m, BAR0, VFIO_MOCK_REG_##name, 8)
#define set32(m, name, value)	put(_metadata, m, BAR0, VFIO_MOCK_REG_##name, value, 4)
#define set64(m, name, value)	put(_metadata, m, BAR0, VFIO_MOCK_REG_##name, value, 8)

/* Rings the doorbell; the caller checks whether the command is accepted. */
static inline void command(struct __test_metadata *_metadata, const struct mock *m,
			   __u32 cmd, __u64 at, __u64 len, __u64 seed)
{
	set64(m, ADDR, at);
	set64(m, LEN, len);
	set64(m, SEED, seed);
	set32(m, DOORBELL, cmd);
}

/* Lets the device fill a range. */
static inline void fill(struct __test_metadata *_metadata, struct mock *m,
			__u64 at, __u64 len, __u64 seed)
{
	command(_metadata, m, VFIO_MOCK_CMD_FILL, at, len, seed);
	ASSERT_EQ(VFIO_MOCK_STATUS_DONE, (int)reg32(m, STATUS))
		PROMISE("FILL of [%#llx, +%#llx) is done when the doorbell write returns",
			at, len);
	vfio_mock_pattern(m->want + at, seed, at, len);
}

/* Writes to a range, like the guest's driver. */
static inline void store(struct __test_metadata *_metadata, struct mock *m,
			 __u64 at, const void *data, size_t len)
{
	size_t done = 0;
	ssize_t ret;

	while (done < len) {
		ret = mock_write(m, BAR2, at + done, (const __u8 *)data + done, len - done);
		ASSERT_LT(0, ret)
			STEP("write %zu bytes at %#llx of the state memory", len, at);
		done += ret;
	}
	memcpy(m->want + at, data, len);
}

/* A byte pattern that differs from what FILL writes. */
static inline void store_noise(struct __test_metadata *_metadata, struct mock *m,
			       __u64 at, size_t len, __u64 seed)
{
	__u8 *data = malloc(len);

	ASSERT_NE(NULL, data);
	vfio_mock_pattern(data, ~seed, at + 1, len);
	store(_metadata, m, at, data, len);
	free(data);
}

/* Compares the whole state memory of @m with @want. */
static inline void expect_memory(struct __test_metadata *_metadata, struct mock *m,
				 const __u8 *want, const char *when)
{
	size_t done = 0, i;
	ssize_t ret;

	while (done < m->size) {
		ret = mock_read(m, BAR2, done, m->seen + done, m->size - done);
		ASSERT_LT(0, ret)
			STEP("read the state memory %s", when);
		done += ret;
	}
	if (!memcmp(m->seen, want, m->size))
		return;
	for (i = 0; m->seen[i] == want[i]; i++)
		;
	EXPECT_EQ(want[i], m->seen[i])
		PROMISE("%s: the state memory differs from byte %#zx (page %zu)",
			when, i, (size_t)(i / PAGE));
}

static inline void expect_zero_memory(struct __test_metadata *_metadata,
				      struct mock *m, const char *when)
{
	__u8 *zero = calloc(1, m->size);

	ASSERT_NE(NULL, zero);
	expect_memory(_metadata, m, zero, when);
	free(zero);
}

static inline void read_front(struct __test_metadata *_metadata,
			      const struct mock *m, struct mock_front *front)
{
	ASSERT_EQ(0, mock_read_front(m, front))
		PROMISE("block accesses read all registers and the config space");
}

/* Compares the migrated state, except for the memory, before and after. */
static inline void expect_same_front(struct __test_metadata *_metadata,
				     const struct mock_front *before,
				     const struct mock_front *now, const char *when)
{
	static const struct {
		const char *name;
		__u32 at;
		__u32 len;
	} regs[] = {
		{ "MAGIC", VFIO_MOCK_REG_MAGIC, 4 },
		{ "ABI_VERSION", VFIO_MOCK_REG_ABI_VERSION, 4 },
		{ "STATE_SIZE", VFIO_MOCK_REG_STATE_SIZE, 8 },
		{ "PAGE_SIZE", VFIO_MOCK_REG_PAGE_SIZE, 4 },
		{ "STATUS", VFIO_MOCK_REG_STATUS, 4 },
		{ "SCRATCH", VFIO_MOCK_REG_SCRATCH, 8 },
		{ "ADDR", VFIO_MOCK_REG_ADDR, 8 },
		{ "LEN", VFIO_MOCK_REG_LEN, 8 },
		{ "SEED", VFIO_MOCK_REG_SEED, 8 },
		{ "IRQ_VECTOR", VFIO_MOCK_REG_IRQ_VECTOR, 4 },
		{ "RESULT", VFIO_MOCK_REG_RESULT, 8 },
		{ "COMPLETIONS", VFIO_MOCK_REG_COMPLETIONS, 8 },
		{ "ERROR", VFIO_MOCK_REG_ERROR, 4 },
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(regs); i++) {
		EXPECT_EQ(0, memcmp(before->registers + regs[i].at,
				    now->registers + regs[i].at, regs[i].len))
			PROMISE("%s: register %s is unchanged", when, regs[i].name);
	}
	EXPECT_EQ(0, memcmp(before->msix_table, now->msix_table, sizeof(now->msix_table)))
		PROMISE("%s: the MSI-X table is unchanged", when);
	EXPECT_EQ(0, memcmp(before->msix_pba, now->msix_pba, sizeof(now->msix_pba)))
		PROMISE("%s: the pending interrupts are unchanged", when);
	for (i = 0; i < sizeof(now->config); i++) {
		EXPECT_EQ(before->config[i], now->config[i])
			PROMISE("%s: config space is unchanged at %#x", when, i);
	}
}

static const struct {
	const char *name;
	__u32 at;
	__u32 len;
	__u64 value;
} reset_values[] = {
	{ "MAGIC", VFIO_MOCK_REG_MAGIC, 4, VFIO_MOCK_MAGIC },
	{ "ABI_VERSION", VFIO_MOCK_REG_ABI_VERSION, 4, VFIO_MOCK_ABI_VERSION },
	{ "STATUS", VFIO_MOCK_REG_STATUS, 4, 0 },
	{ "SCRATCH", VFIO_MOCK_REG_SCRATCH, 8, 0 },
	{ "ADDR", VFIO_MOCK_REG_ADDR, 8, 0 },
	{ "LEN", VFIO_MOCK_REG_LEN, 8, 0 },
	{ "SEED", VFIO_MOCK_REG_SEED, 8, 0 },
	{ "IRQ_VECTOR", VFIO_MOCK_REG_IRQ_VECTOR, 4, VFIO_MOCK_IRQ_NONE },
	{ "RESULT", VFIO_MOCK_REG_RESULT, 8, 0 },
	{ "COMPLETIONS", VFIO_MOCK_REG_COMPLETIONS, 8, 0 },
	{ "ERROR", VFIO_MOCK_REG_ERROR, 4, 0 },
	{ "DROPPED", VFIO_MOCK_REG_DROPPED, 8, 0 },
};

static inline void expect_fresh(struct __test_metadata *_metadata, struct mock *m,
				const char *when)
{
	struct mock_front now;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(reset_values); i++) {
		EXPECT_EQ(reset_values[i].value,
			  get(_metadata, m, BAR0, reset_values[i].at, reset_values[i].len))
			PROMISE("%s: register %s has its reset value", when,
				reset_values[i].name);
	}
	EXPECT_EQ(PAGE, reg32(m, PAGE_SIZE))
		PROMISE("%s: PAGE_SIZE is the page size of the kernel", when);
	read_front(_metadata, m, &now);
	expect_same_front(_metadata, &m->fresh, &now, when);
	expect_zero_memory(_metadata, m, when);
}

/* Gives each byte and each register a value whose loss would be noticed. */
static inline void populate(struct __test_metadata *_metadata, struct mock *m, __u64 seed)
{
	unsigned int i;

	fill(_metadata, m, 0, m->size, seed);
	store_noise(_metadata, m, 1, 1, seed);
	store_noise(_metadata, m, PAGE - 3, 7, seed + 1);
	store_noise(_metadata, m, 5 * PAGE, 2 * PAGE, seed + 2);
	store_noise(_metadata, m, m->size - 1, 1, seed + 3);
	set64(m, SCRATCH, vfio_mock_mix(seed));
	set32(m, IRQ_VECTOR, 2);
	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS * 2; i++)
		put(_metadata, m, BAR0, VFIO_MOCK_MSIX_TABLE + 8 * i,
		    vfio_mock_mix(seed + i) & 0x1ffffffffULL, 8);
	put(_metadata, m, CONFIG, 0x04, 6, 2);
	put(_metadata, m, CONFIG, 0x10, 0xfe000000, 4);
	put(_metadata, m, CONFIG, 0x18, 0x1200000000ULL, 8);
	put(_metadata, m, CONFIG, VFIO_MOCK_MSIX_CAP + 3, 0x80, 1);
	command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 3, m->size - 5, seed);
	EXPECT_EQ(vfio_mock_checksum(m->want + 3, m->size - 5), reg64(m, RESULT))
		PROMISE("CHECKSUM covers the written data");
}

/* Stops @m and streams the rest; the length must be the announced one. */
static inline void stop_and_save(struct __test_metadata *_metadata,
				 const struct mock *m, int *fd,
				 struct mig_stream *image)
{
	size_t start = image->len;
	__u64 running, stopped;
	int new_fd;

	ASSERT_EQ(0, mig_data_size(&m->dev, &running));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP_COPY, &new_fd));
	if (new_fd >= 0)
		*fd = new_fd;
	ASSERT_EQ(0, mig_data_size(&m->dev, &stopped));
	ASSERT_EQ(0, mig_save(*fd, image, stream_limit(&m->dev)));
	EXPECT_EQ(running, image->len - start)
		PROMISE("MIG_DATA_SIZE before STOP_COPY is exact on a quiet device");
	EXPECT_EQ(stopped, image->len - start)
		PROMISE("MIG_DATA_SIZE in STOP_COPY is exact");
}

/* Writes the whole configuration space, like a VMM that restores it. */
static inline void restore_config(struct __test_metadata *_metadata,
				  const struct mock *m, const struct mock_front *front)
{
	ASSERT_EQ((ssize_t)sizeof(front->config),
		  mock_write(m, CONFIG, 0, front->config, sizeof(front->config)))
		STEP("write the configuration space of the source to the target");
}

/* Loads @image into @dst and compares it with the source, stopped and running. */
static inline void load_and_compare(struct __test_metadata *_metadata,
				    struct mock *dst, const struct mig_stream *image,
				    size_t chunk, const __u8 *want,
				    const struct mock_front *front)
{
	struct mock_front now;
	size_t done;
	int fd, ret;

	fd = go(_metadata, &dst->dev, MIG_RESUMING);
	ret = mig_load(fd, image->data, image->len, chunk, &done);
	ASSERT_EQ(0, ret)
		PROMISE("a good image loads in pieces of %zu bytes; write() said %s after %zu of %zu bytes",
			chunk, strerror(-ret), done, image->len);
	restore_config(_metadata, dst, front);
	ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_STOP, NULL))
		PROMISE("a good image is accepted at RESUMING -> STOP");
	close(fd);
	expect_memory(_metadata, dst, want, "in STOP on the target");
	read_front(_metadata, dst, &now);
	expect_same_front(_metadata, front, &now, "on the target");
	move_on(_metadata, &dst->dev, MIG_RUNNING);
	expect_memory(_metadata, dst, want, "running on the target");
}

/* A device that exists during one test. */
struct guest {
	struct mig_device dev;
	char path[64];
	char remove[80];
	/* Of a PCI function, in configfs. */
	char directory[80];
	pthread_t remover;
	int ret;
};

/* Creates a device of the type at @type without opening it; 0 or -errno. */
static inline int mock_create(struct guest *g, const char *type)
{
	char uuid[37] = "", create[PATH_MAX + 32];
	int fd;

	*g = (struct guest){ .dev.fd = -1 };
	fd = open("/proc/sys/kernel/random/uuid", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, uuid, 36) != 36)
		return -EIO;
	close(fd);
	snprintf(g->path, sizeof(g->path), "/sys/bus/mdev/devices/%s", uuid);
	snprintf(g->remove, sizeof(g->remove), "%s/remove", g->path);
	snprintf(create, sizeof(create), "%s/create", type);
	return write_word(create, uuid);
}

/* Creates a PCI function with the memory size @size; 0 or -errno. */
static inline int mock_create_function(struct guest *g, __u64 size)
{
	static const char units[] = "KMG";
	char path[128], type[16], address[32] = "";
	int fd, ret, unit = 0;

	*g = (struct guest){ .dev.fd = -1 };
	for (size >>= 10; size >= 1024 && units[unit + 1]; size >>= 10)
		unit++;
	snprintf(type, sizeof(type), "%llu%c", (unsigned long long)size, units[unit]);
	snprintf(g->directory, sizeof(g->directory), "/sys/kernel/config/vfio_mock/test-%d",
		 getpid());
	if (mkdir(g->directory, 0755))
		return -errno;
	snprintf(path, sizeof(path), "%s/type", g->directory);
	ret = write_word(path, type);
	snprintf(path, sizeof(path), "%s/power", g->directory);
	ret = ret ?: write_word(path, "1");
	snprintf(path, sizeof(path), "%s/address", g->directory);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (ret || fd < 0 || read(fd, address, sizeof(address) - 1) < 0)
		ret = ret ?: -errno;
	if (fd >= 0)
		close(fd);
	if (ret)
		rmdir(g->directory);
	address[strcspn(address, "\n")] = 0;
	snprintf(g->path, sizeof(g->path), "/sys/bus/pci/devices/%s", address);
	return ret;
}

static inline void create_guest(struct __test_metadata *_metadata,
				struct guest *g, const struct mock *like)
{
	char type[PATH_MAX + 16];

	snprintf(type, sizeof(type), "%s/mdev_type", like->path);
	if (access(type, F_OK)) {
		ASSERT_EQ(0, mock_create_function(g, mock_type_size(like)))
			STEP("create a function like %s", like->path);
	} else {
		ASSERT_EQ(0, mock_create(g, type))
			STEP("create a device like %s", like->path);
	}
	ASSERT_EQ(0, mig_open(&g->dev, g->path, like->dev.backend))
		STEP("open the new device: %s", g->dev.why);
}

/* Writes a knob of the device; 0 or -errno. */
static inline int mock_set(const struct mock *m, const char *name, const char *value)
{
	char path[PATH_MAX + 32];

	snprintf(path, sizeof(path), "%s/knobs/%s", m->path, name);
	return write_word(path, value);
}

static inline void set_knob(struct __test_metadata *_metadata, const struct mock *m,
			    const char *name, __u64 number)
{
	char value[24];

	snprintf(value, sizeof(value), "%llu", (unsigned long long)number);
	ASSERT_EQ(0, mock_set(m, name, value))
		STEP("set %s of %s to %s", name, m->path, value);
}

static inline void set_save_delay(struct __test_metadata *_metadata,
				  const struct mock *m, __u32 micros)
{
	set_knob(_metadata, m, "save_delay_us", micros);
}

static inline void *remover_main(void *arg)
{
	struct guest *g = arg;

	if (g->directory[0])
		g->ret = rmdir(g->directory) ? -errno : 0;
	else
		g->ret = write_word(g->remove, "1");
	return NULL;
}

#endif /* MOCK_H */
