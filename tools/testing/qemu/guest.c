// SPDX-License-Identifier: GPL-2.0
/*
 * The program that a guest of the demo runs as its /init: it keeps a vfio_mock
 * device busy and keeps in its own memory a model of all that the device must
 * hold. The model travels with the memory of the guest, the device by its own
 * migration: when both agree on the target, the device has migrated whole.
 *
 * It reports on the second serial port, one line each, first a word with an @,
 * then key=value pairs, and takes commands there: "verify" compares the whole
 * device with the model, "quit" turns the machine off.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <stdnoreturn.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "vfio_mock.h"

#define PCI_DEVICES	"/sys/bus/pci/devices"
#define REPORT_PORT	"/dev/ttyS1"
#define REPORT_MS	250
#define IRQ_TIMEOUT_MS	20000

#define PAGE		((__u64)VFIO_MOCK_PAGE_SIZE)
#define HOT_PAGES	4
#define FILL_MAX	(64 * 1024)
#define CHECKSUM_MAX	(256 * 1024)
#define READBACK_PAGES	32
#define BAD_PAGES_SHOWN	8

struct counters {
	__u64 written;		/* bytes written through BAR2 */
	__u64 filled;		/* bytes the device was told to write */
	__u64 doorbells;
	__u64 irqs;
	__u64 checks;		/* values compared with the model */
	__u64 mismatches;
};

/* What the registers must read as. */
struct registers {
	__u64 scratch;
	__u64 addr;
	__u64 len;
	__u64 seed;
	__u64 result;
	__u64 completions;
	__u32 irq_vector;
};

struct mock {
	char pci[256];
	__u8 *regs;
	__u8 *mem;
	__u64 size;
	__u8 *model;
	struct registers want;
	int irq[VFIO_MOCK_MSIX_VECTORS];
	__u64 generation;
	struct counters count;
};

static FILE *report;
static int commands = -1;

/* A part of a line; the line ends, and leaves, with say(). */
#define tell(...)	fprintf(report, __VA_ARGS__)

#define say(...)				\
	do {					\
		tell(__VA_ARGS__);		\
		end_line();			\
	} while (0)

/* Says why the guest cannot work, and leaves the machine up for its reader. */
#define die(...)				\
	do {					\
		int __error = errno;		\
						\
		tell("@fatal what=\"");		\
		tell(__VA_ARGS__);		\
		halt(__error);			\
	} while (0)

static void end_line(void)
{
	fputc('\n', report);
	fflush(report);
}

static noreturn void halt(int error)
{
	say("\" error=\"%s\"", strerror(error));
	for (;;)
		pause();
}

static void say_counters(const struct mock *m)
{
	tell(" gen=%llu written=%llu filled=%llu doorbells=%llu irqs=%llu",
	     m->generation, m->count.written, m->count.filled,
	     m->count.doorbells, m->count.irqs);
	say(" checks=%llu mismatches=%llu", m->count.checks,
	    m->count.mismatches);
}

static __u64 now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (__u64)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* A number below @limit that depends on the generation and @salt alone. */
static __u64 pick(const struct mock *m, __u64 salt, __u64 limit)
{
	return vfio_mock_mix((m->generation << 16) + salt) % limit;
}

/*
 * Leaves the guest for a moment. KVM on an AMD processor that is itself
 * emulated by QEMU takes an access to a device for the delivery of the last
 * exception, and gives up, unless the guest was left in between.
 */
static void leave_guest(void)
{
	unsigned int a, b, c, d;

	__cpuid(0, a, b, c, d);
}

/* One access of exactly @width bytes, which the atomics guarantee. */
static __u64 mmio_read(const void *p, unsigned int width)
{
	leave_guest();
	switch (width) {
	case 1:
		return __atomic_load_n((const __u8 *)p, __ATOMIC_RELAXED);
	case 2:
		return __atomic_load_n((const __u16 *)p, __ATOMIC_RELAXED);
	case 4:
		return __atomic_load_n((const __u32 *)p, __ATOMIC_RELAXED);
	default:
		return __atomic_load_n((const __u64 *)p, __ATOMIC_RELAXED);
	}
}

static void mmio_write(void *p, unsigned int width, __u64 value)
{
	leave_guest();
	switch (width) {
	case 1:
		__atomic_store_n((__u8 *)p, value, __ATOMIC_RELAXED);
		break;
	case 2:
		__atomic_store_n((__u16 *)p, value, __ATOMIC_RELAXED);
		break;
	case 4:
		__atomic_store_n((__u32 *)p, value, __ATOMIC_RELAXED);
		break;
	default:
		__atomic_store_n((__u64 *)p, value, __ATOMIC_RELAXED);
		break;
	}
}

static void check(struct mock *m, const char *where, __u64 offset, __u64 want,
		  __u64 got)
{
	m->count.checks++;
	if (want == got)
		return;
	m->count.mismatches++;
	say("@mismatch where=%s offset=0x%llx want=0x%llx got=0x%llx gen=%llu",
	    where, offset, want, got, m->generation);
}

static void check_reg(struct mock *m, const char *name, unsigned int reg,
		      unsigned int width, __u64 want)
{
	check(m, name, reg, want, mmio_read(m->regs + reg, width));
}

static __u64 model_word(const struct mock *m, __u64 offset, unsigned int width)
{
	__u64 word = 0;

	memcpy(&word, m->model + offset, width);
	return word;
}

/* Writes @width bytes of the pattern of this generation at @offset. */
static void mem_write(struct mock *m, __u64 offset, unsigned int width)
{
	vfio_mock_pattern(m->model + offset, m->generation, offset, width);
	mmio_write(m->mem + offset, width, model_word(m, offset, width));
	m->count.written += width;
}

static void mem_check(struct mock *m, __u64 offset, unsigned int width)
{
	check(m, "memory", offset, model_word(m, offset, width),
	      mmio_read(m->mem + offset, width));
}

/* Waits for the interrupt of @vector, and takes none of the others. */
static void wait_irq(struct mock *m, unsigned int vector)
{
	struct pollfd pfd = { .fd = m->irq[vector], .events = POLLIN };
	unsigned int i;
	__u64 n;

	if (poll(&pfd, 1, IRQ_TIMEOUT_MS) != 1)
		check(m, "lost-irq", vector, 1, 0);
	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS; i++) {
		n = 0;
		if (read(m->irq[i], &n, sizeof(n)) == sizeof(n))
			m->count.irqs += n;
		check(m, "irq", i, i == vector, n);
	}
}

static void command(struct mock *m, __u32 cmd, __u64 addr, __u64 len)
{
	__u32 vector = m->count.doorbells % VFIO_MOCK_MSIX_VECTORS;

	m->want.addr = addr;
	m->want.len = len;
	m->want.irq_vector = vector;
	mmio_write(m->regs + VFIO_MOCK_REG_ADDR, 8, addr);
	mmio_write(m->regs + VFIO_MOCK_REG_LEN, 8, len);
	mmio_write(m->regs + VFIO_MOCK_REG_IRQ_VECTOR, 4, vector);
	mmio_write(m->regs + VFIO_MOCK_REG_DOORBELL, 4, cmd);
	m->count.doorbells++;
	m->want.completions++;
	wait_irq(m, vector);
	check_reg(m, "status", VFIO_MOCK_REG_STATUS, 4, VFIO_MOCK_STATUS_DONE);
	check_reg(m, "completions", VFIO_MOCK_REG_COMPLETIONS, 8,
		  m->want.completions);
}

static void fill(struct mock *m, __u64 addr, __u64 len)
{
	__u64 seed = vfio_mock_mix(m->generation);

	m->want.seed = seed;
	mmio_write(m->regs + VFIO_MOCK_REG_SEED, 8, seed);
	vfio_mock_pattern(m->model + addr, seed, addr, len);
	command(m, VFIO_MOCK_CMD_FILL, addr, len);
	m->count.filled += len;
}

/* Has the device sum up a range, and compares; true when the sums agree. */
static bool checksum(struct mock *m, __u64 addr, __u64 len)
{
	command(m, VFIO_MOCK_CMD_CHECKSUM, addr, len);
	m->want.result = mmio_read(m->regs + VFIO_MOCK_REG_RESULT, 8);
	return m->want.result == vfio_mock_checksum(m->model + addr, len);
}

static __u64 hot_page(const struct mock *m, unsigned int i)
{
	return m->size / HOT_PAGES * i;
}

/* Another page each time, until all were written. */
static __u64 cold_page(const struct mock *m, __u64 generation)
{
	return generation * 1597 * PAGE % m->size;
}

static void write_pages(struct mock *m)
{
	__u64 page = cold_page(m, m->generation);
	unsigned int i;

	for (i = 0; i < HOT_PAGES; i++)
		mem_write(m, hot_page(m, i) + pick(m, i, PAGE / 8) * 8, 8);
	for (i = 0; i < 16; i++)
		mem_write(m, page + pick(m, 16 + i, PAGE / 8) * 8, 8);
	for (i = 1; i < 8; i *= 2)
		mem_write(m, page + pick(m, 32 + i, PAGE / i) * i, i);
}

static void read_back(struct mock *m)
{
	__u64 page = cold_page(m, m->generation);
	unsigned int width, i;

	for (i = 0; i < HOT_PAGES; i++)
		mem_check(m, hot_page(m, i) + pick(m, i, PAGE / 8) * 8, 8);
	for (i = 0; i < 8; i++) {
		width = 1 << (i & 3);
		mem_check(m, page + pick(m, 64 + i, PAGE / width) * width,
			  width);
		mem_check(m, pick(m, 80 + i, m->size / width) * width, width);
	}
}

static void generation(struct mock *m)
{
	__u64 addr, len;

	m->generation++;
	m->want.scratch = m->generation;
	mmio_write(m->regs + VFIO_MOCK_REG_SCRATCH, 8, m->generation);
	write_pages(m);
	if (m->generation % 4 == 0) {
		len = 1 + pick(m, 100, FILL_MAX);
		addr = pick(m, 101, m->size - len + 1);
		fill(m, addr, len);
	}
	if (m->generation % 8 == 0) {
		len = 1 + pick(m, 102, CHECKSUM_MAX);
		addr = pick(m, 103, m->size - len + 1);
		check(m, "checksum", addr, true, checksum(m, addr, len));
	}
	read_back(m);
	check_reg(m, "scratch", VFIO_MOCK_REG_SCRATCH, 8, m->generation);
}

static void check_registers(struct mock *m)
{
	check_reg(m, "magic", VFIO_MOCK_REG_MAGIC, 4, VFIO_MOCK_MAGIC);
	check_reg(m, "abi-version", VFIO_MOCK_REG_ABI_VERSION, 4,
		  VFIO_MOCK_ABI_VERSION);
	check_reg(m, "state-size", VFIO_MOCK_REG_STATE_SIZE, 8, m->size);
	check_reg(m, "page-size", VFIO_MOCK_REG_PAGE_SIZE, 4, PAGE);
	check_reg(m, "status", VFIO_MOCK_REG_STATUS, 4,
		  m->want.completions ? VFIO_MOCK_STATUS_DONE : 0);
	check_reg(m, "scratch", VFIO_MOCK_REG_SCRATCH, 8, m->want.scratch);
	check_reg(m, "addr", VFIO_MOCK_REG_ADDR, 8, m->want.addr);
	check_reg(m, "len", VFIO_MOCK_REG_LEN, 8, m->want.len);
	check_reg(m, "seed", VFIO_MOCK_REG_SEED, 8, m->want.seed);
	check_reg(m, "irq-vector", VFIO_MOCK_REG_IRQ_VECTOR, 4,
		  m->want.irq_vector);
	check_reg(m, "result", VFIO_MOCK_REG_RESULT, 8, m->want.result);
	check_reg(m, "completions", VFIO_MOCK_REG_COMPLETIONS, 8,
		  m->want.completions);
	check_reg(m, "error", VFIO_MOCK_REG_ERROR, 4, VFIO_MOCK_ERROR_NONE);
}

/* Tells which pages are not as the model has them, by the sum of each. */
static __u64 bad_pages(struct mock *m)
{
	__u64 page, bad = 0;

	for (page = 0; page < m->size; page += PAGE) {
		if (checksum(m, page, PAGE))
			continue;
		if (bad++ < BAD_PAGES_SHOWN)
			check(m, "page", page,
			      vfio_mock_checksum(m->model + page, PAGE),
			      m->want.result);
	}
	return bad;
}

/* Reads whole pages: the hot ones, the last written ones, and some others. */
static __u64 read_back_pages(struct mock *m)
{
	__u64 page, offset;
	unsigned int i;

	for (i = 0; i < READBACK_PAGES; i++) {
		if (i < HOT_PAGES)
			page = hot_page(m, i);
		else if (i < READBACK_PAGES / 2 && m->generation > i)
			page = cold_page(m, m->generation - i);
		else
			page = pick(m, 1000 + i, m->size / PAGE) * PAGE;
		for (offset = page; offset < page + PAGE; offset += 8)
			mem_check(m, offset, 8);
	}
	return i * PAGE;
}

/* Compares the whole device with the model. */
static void verify(struct mock *m)
{
	__u64 start = now_ms(), bad = 0, bytes;
	bool sum;

	check_registers(m);
	sum = checksum(m, 0, m->size);
	check(m, "checksum", 0, true, sum);
	if (!sum)
		bad = bad_pages(m);
	bytes = read_back_pages(m);
	check(m, "irqs", 0, m->count.doorbells, m->count.irqs);
	check_registers(m);
	tell("@verdict result=%s checksummed=%llu readback=%llu bad_pages=%llu ms=%llu",
	     m->count.mismatches ? "bad" : "ok", m->size, bytes, bad,
	     now_ms() - start);
	say_counters(m);
}

static void read_commands(struct mock *m)
{
	static char line[64];
	static size_t used;
	char c;

	while (read(commands, &c, 1) == 1) {
		if (c != '\n') {
			if (used < sizeof(line) - 1)
				line[used++] = c;
			continue;
		}
		line[used] = 0;
		used = 0;
		if (!strcmp(line, "verify")) {
			verify(m);
		} else if (!strcmp(line, "quit")) {
			say("@quit");
			tcdrain(commands);
			reboot(RB_POWER_OFF);
		} else {
			say("@unknown command=\"%s\"", line);
		}
	}
}

static void run(struct mock *m, useconds_t pace)
{
	__u64 next = 0;

	for (;;) {
		generation(m);
		if (now_ms() >= next) {
			tell("@work");
			say_counters(m);
			next = now_ms() + REPORT_MS;
		}
		read_commands(m);
		usleep(pace);
	}
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		die("write %s to %s", text, path);
	close(fd);
}

static unsigned long read_number(const char *dir, const char *name)
{
	char path[512], text[32] = "";
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		die("read %s", path);
	close(fd);
	return strtoul(text, NULL, 0);
}

static void find_device(struct mock *m)
{
	char dir[sizeof(PCI_DEVICES) + sizeof(m->pci)];
	struct dirent *entry;
	DIR *devices = opendir(PCI_DEVICES);

	if (!devices)
		die("open %s", PCI_DEVICES);
	while ((entry = readdir(devices))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(dir, sizeof(dir), PCI_DEVICES "/%s", entry->d_name);
		if (read_number(dir, "vendor") == VFIO_MOCK_VENDOR_ID &&
		    read_number(dir, "device") == VFIO_MOCK_DEVICE_ID) {
			snprintf(m->pci, sizeof(m->pci), "%s", entry->d_name);
			closedir(devices);
			return;
		}
	}
	errno = ENODEV;
	die("no PCI device %04x:%04x", VFIO_MOCK_VENDOR_ID,
	    VFIO_MOCK_DEVICE_ID);
}

static void *map_bar(struct mock *m, unsigned int bar, __u64 *size)
{
	struct stat st;
	char path[512];
	void *p;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/resource%u", m->pci, bar);
	fd = open(path, O_RDWR | O_SYNC);
	if (fd < 0 || fstat(fd, &st))
		die("open %s", path);
	p = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		die("mmap %s", path);
	close(fd);
	*size = st.st_size;
	return p;
}

/* The group of a device without IOMMU, whose number vfio chooses. */
static int open_group(const struct mock *m)
{
	char path[512], link[256];
	ssize_t len;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/iommu_group", m->pci);
	len = readlink(path, link, sizeof(link) - 1);
	if (len < 0)
		die("read link %s", path);
	link[len] = 0;
	snprintf(path, sizeof(path), "/dev/vfio/noiommu-%s",
		 strrchr(link, '/') + 1);
	fd = open(path, O_RDWR);
	if (fd < 0)
		die("open %s", path);
	return fd;
}

static int open_device(const struct mock *m)
{
	int container = open("/dev/vfio/vfio", O_RDWR);
	int group = open_group(m);
	int device;

	if (container < 0)
		die("open /dev/vfio/vfio");
	if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container))
		die("VFIO_GROUP_SET_CONTAINER");
	if (ioctl(container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU))
		die("VFIO_SET_IOMMU");
	device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, m->pci);
	if (device < 0)
		die("VFIO_GROUP_GET_DEVICE_FD");
	return device;
}

/* Memory on, and bus mastering, without which no MSI-X message leaves. */
static void enable_device(const struct mock *m)
{
	char path[512];
	__u16 cmd;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/config", m->pci);
	fd = open(path, O_RDWR);
	if (fd < 0 || pread(fd, &cmd, sizeof(cmd), PCI_COMMAND) != sizeof(cmd))
		die("read %s", path);
	cmd |= PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
	if (pwrite(fd, &cmd, sizeof(cmd), PCI_COMMAND) != sizeof(cmd))
		die("write %s", path);
	close(fd);
}

static void enable_irqs(struct mock *m, int device)
{
	union {
		struct vfio_irq_set set;
		char room[sizeof(struct vfio_irq_set) + sizeof(m->irq)];
	} u = { .set = {
		.argsz = sizeof(u),
		.flags = VFIO_IRQ_SET_DATA_EVENTFD |
			 VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = VFIO_PCI_MSIX_IRQ_INDEX,
		.count = VFIO_MOCK_MSIX_VECTORS,
	} };
	unsigned int i;

	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS; i++) {
		m->irq[i] = eventfd(0, EFD_NONBLOCK);
		if (m->irq[i] < 0)
			die("eventfd");
	}
	memcpy(u.set.data, m->irq, sizeof(m->irq));
	if (ioctl(device, VFIO_DEVICE_SET_IRQS, &u.set))
		die("VFIO_DEVICE_SET_IRQS of MSI-X");
}

static void open_mock(struct mock *m)
{
	char path[512];
	__u64 size;

	find_device(m);
	snprintf(path, sizeof(path), PCI_DEVICES "/%s/driver_override", m->pci);
	write_file(path, "vfio-pci");
	write_file("/sys/bus/pci/drivers_probe", m->pci);
	enable_irqs(m, open_device(m));
	enable_device(m);

	m->regs = map_bar(m, 0, &size);
	if (size != VFIO_MOCK_BAR0_SIZE)
		die("BAR0 has %llu bytes", size);
	m->mem = map_bar(m, 2, &m->size);
	m->model = calloc(1, m->size);
	if (!m->model)
		die("no memory for a model of %llu bytes", m->size);
	m->want.irq_vector = VFIO_MOCK_IRQ_NONE;
	check_registers(m);
}

/* The build step numbers the modules in order of dependency. */
static void load_modules(void)
{
	struct dirent **list;
	char path[512];
	int n, i, fd;

	n = scandir("/modules", &list, NULL, alphasort);
	if (n < 0)
		die("open /modules");
	for (i = 0; i < n; i++) {
		if (list[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/modules/%s", list[i]->d_name);
		fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			die("load %s", path);
		close(fd);
	}
	write_file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
		   "1");
}

static void open_report(void)
{
	struct termios tio;
	int fd;

	report = stdout;
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) ||
	    mount("sysfs", "/sys", "sysfs", 0, NULL) ||
	    mount("proc", "/proc", "proc", 0, NULL))
		die("mount");

	fd = open(REPORT_PORT, O_RDWR | O_NOCTTY);
	if (fd < 0 || tcgetattr(fd, &tio))
		die("open %s", REPORT_PORT);
	cfmakeraw(&tio);
	tio.c_cflag |= CLOCAL;
	cfsetspeed(&tio, B115200);
	if (tcsetattr(fd, TCSANOW, &tio))
		die("set up %s", REPORT_PORT);
	commands = open(REPORT_PORT, O_RDWR | O_NOCTTY | O_NONBLOCK);
	report = fdopen(fd, "w");
	if (commands < 0 || !report)
		exit(1);
}

int main(void)
{
	const char *pace = getenv("pace");
	struct mock m = { .generation = 0 };

	open_report();
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		die("mlockall");
	say("@boot");
	load_modules();
	open_mock(&m);
	/* The whole memory first, so that no page is empty. */
	fill(&m, 0, m.size);
	say("@ready pci=%s state_size=%llu irq=msix vectors=%u", m.pci, m.size,
	    VFIO_MOCK_MSIX_VECTORS);
	run(&m, pace ? strtoul(pace, NULL, 0) : 1000);
	return 0;
}
