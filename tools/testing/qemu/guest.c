// SPDX-License-Identifier: GPL-2.0
/*
 * Program that a guest of the demo runs as its /init. It keeps its vfio_mock,
 * vfio_minimal or bochs-display devices busy, and has a model of their content in its
 * own memory.
 * The model migrates with the memory of the guest, the devices with their own
 * migration. If both agree on the target, the devices have migrated completely.
 * Two vfio_mock devices also do DMA, see peers.c. A display shows a picture, see
 * display.c.
 *
 * It reports on the second serial port, or the one in the variable "report". Each line
 * has a word with an @, followed by key=value pairs. It accepts commands there: "verify"
 * compares the whole devices with the model, "quit" powers the machine off.
 */
#include <cpuid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdlib.h>
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

#include "guest.h"

#define REPORT_PORT	"/dev/ttyS1"
#define REPORT_MS	250
#define MAX_DEVICES	2

#define HOT_PAGES	4
#define FILL_MAX	(64 * 1024)
#define CHECKSUM_MAX	(256 * 1024)
#define READBACK_PAGES	32
#define BAD_PAGES_SHOWN	8

/* Offset of the number of writes in a memory with a header. */
#define HEADER_WRITES	8

static const struct kind kinds[] = {
	{ .vendor = VFIO_MOCK_VENDOR_ID, .id = VFIO_MOCK_DEVICE_ID, .bar = 2,
	  .engine = true },
	/* vfio_minimal: the magic is "MINIMAL", starting at the top byte. */
	{ .vendor = VFIO_MOCK_VENDOR_ID, .id = 0x10f1, .bar = 0, .header = 16,
	  .magic = 0x4d494e494d414c00 },
	/* bochs-display */
	{ .vendor = 0x1234, .id = 0x1111, .bar = 0, .display = true },
	{}
};

FILE *report;
static int commands = -1;
static struct device devices[MAX_DEVICES];
static unsigned int device_count;

#define for_each_device(d) \
	for ((d) = devices; (d) < devices + device_count; (d)++)

void end_line(void)
{
	fputc('\n', report);
	fflush(report);
}

noreturn void halt(int error)
{
	say("\" error=\"%s\"", strerror(error));
	for (;;)
		pause();
}

static void say_counters(void)
{
	struct counters sum = {};
	struct device *d;

	for_each_device(d) {
		sum.written += d->count.written;
		sum.filled += d->count.filled;
		sum.doorbells += d->count.doorbells;
		sum.irqs += d->count.irqs;
		sum.transfers += d->count.transfers;
		sum.moved += d->count.moved;
		sum.dma_irqs += d->count.dma_irqs;
		sum.checks += d->count.checks;
		sum.mismatches += d->count.mismatches;
	}
	tell(" gen=%llu written=%llu filled=%llu doorbells=%llu irqs=%llu",
	     devices->generation, sum.written, sum.filled, sum.doorbells,
	     sum.irqs);
	tell(" transfers=%llu moved=%llu dma_irqs=%llu", sum.transfers,
	     sum.moved, sum.dma_irqs);
	say(" checks=%llu mismatches=%llu", sum.checks, sum.mismatches);
}

__u64 now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (__u64)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Returns a number below @limit that only depends on the generation and @salt. */
__u64 pick(const struct device *d, __u64 salt, __u64 limit)
{
	return vfio_mock_mix((d->generation << 16) + salt) % limit;
}

/*
 * Forces a VM exit. KVM on an AMD processor that is itself emulated by QEMU
 * mistakes an access to a device for the delivery of the last exception, and
 * fails, unless there was an exit in between.
 */
void leave_guest(void)
{
	unsigned int a, b, c, d;

	__cpuid(0, a, b, c, d);
}

/* One access of exactly @width bytes, which the atomics guarantee. */
__u64 mmio_read(const void *p, unsigned int width)
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

void mmio_write(void *p, unsigned int width, __u64 value)
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

void check(struct device *d, const char *where, __u64 offset, __u64 want,
	   __u64 got)
{
	d->count.checks++;
	if (want == got)
		return;
	d->count.mismatches++;
	say("@mismatch device=%s where=%s offset=0x%llx want=0x%llx got=0x%llx gen=%llu",
	    d->pci, where, offset, want, got, d->generation);
}

void check_reg(struct device *d, const char *name, unsigned int reg,
	       unsigned int width, __u64 want)
{
	check(d, name, reg, want, mmio_read(d->regs + reg, width));
}

static __u64 model_word(const struct device *d, __u64 offset,
			unsigned int width)
{
	__u64 word = 0;

	memcpy(&word, d->model + offset, width);
	return word;
}

/* Writes the first @width bytes of @word at @offset. */
void mem_store(struct device *d, __u64 offset, unsigned int width, __u64 word)
{
	__u64 writes;

	mmio_write(d->mem + offset, width, word);
	d->count.written += width;
	if (offset >= d->kind->header)
		memcpy(d->model + offset, &word, width);
	if (d->kind->header) {
		writes = model_word(d, HEADER_WRITES, 8) + 1;
		memcpy(d->model + HEADER_WRITES, &writes, 8);
	}
}

/* Writes @width bytes of the pattern of this generation at @offset. */
static void mem_write(struct device *d, __u64 offset, unsigned int width)
{
	__u64 word = 0;

	vfio_mock_pattern(&word, d->generation, offset, width);
	mem_store(d, offset, width, word);
}

static void mem_check(struct device *d, __u64 offset, unsigned int width)
{
	check(d, "memory", offset, model_word(d, offset, width),
	      mmio_read(d->mem + offset, width));
}

/* Returns the number of interrupts of @vector since the last call. */
__u64 take_irqs(struct device *d, unsigned int vector)
{
	__u64 n;

	return read(d->irq[vector], &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* Waits for an interrupt of @vector. */
void await_irq(struct device *d, unsigned int vector)
{
	struct pollfd pfd = { .fd = d->irq[vector], .events = POLLIN };

	if (poll(&pfd, 1, IRQ_TIMEOUT_MS) != 1)
		check(d, "lost-irq", vector, 1, 0);
}

/* Waits for the interrupt of @vector, and does not consume others. */
static void wait_irq(struct device *d, unsigned int vector)
{
	unsigned int i;
	__u64 n;

	await_irq(d, vector);
	for (i = 0; i < d->vectors; i++) {
		n = take_irqs(d, i);
		d->count.irqs += n;
		check(d, "irq", i, i == vector, n);
	}
}

static void command(struct device *d, __u32 cmd, __u64 addr, __u64 len)
{
	__u32 vector = d->count.doorbells % d->vectors;

	d->want.addr = addr;
	d->want.len = len;
	d->want.irq_vector = vector;
	mmio_write(d->regs + VFIO_MOCK_REG_ADDR, 8, addr);
	mmio_write(d->regs + VFIO_MOCK_REG_LEN, 8, len);
	mmio_write(d->regs + VFIO_MOCK_REG_IRQ_VECTOR, 4, vector);
	mmio_write(d->regs + VFIO_MOCK_REG_DOORBELL, 4, cmd);
	d->count.doorbells++;
	d->want.completions++;
	wait_irq(d, vector);
	check_reg(d, "status", VFIO_MOCK_REG_STATUS, 4, VFIO_MOCK_STATUS_DONE);
	check_reg(d, "completions", VFIO_MOCK_REG_COMPLETIONS, 8,
		  d->want.completions);
}

static void fill(struct device *d, __u64 addr, __u64 len)
{
	__u64 seed = vfio_mock_mix(d->generation);

	d->want.seed = seed;
	mmio_write(d->regs + VFIO_MOCK_REG_SEED, 8, seed);
	vfio_mock_pattern(d->model + addr, seed, addr, len);
	command(d, VFIO_MOCK_CMD_FILL, addr, len);
	d->count.filled += len;
}

/* Compares the device's checksum of a range with the model; returns true if equal. */
static bool checksum(struct device *d, __u64 addr, __u64 len)
{
	command(d, VFIO_MOCK_CMD_CHECKSUM, addr, len);
	d->want.result = mmio_read(d->regs + VFIO_MOCK_REG_RESULT, 8);
	return d->want.result == vfio_mock_checksum(d->model + addr, len);
}

static __u64 hot_page(const struct device *d, unsigned int i)
{
	return d->work / d->page * i / HOT_PAGES * d->page;
}

/* Returns another page each time, until all were written. */
static __u64 cold_page(const struct device *d, __u64 generation)
{
	return generation * 1597 % (d->work / d->page) * d->page;
}

static void write_pages(struct device *d)
{
	__u64 page = cold_page(d, d->generation);
	unsigned int i;

	for (i = 0; i < HOT_PAGES; i++)
		mem_write(d, hot_page(d, i) + pick(d, i, d->page / 8) * 8, 8);
	for (i = 0; i < 16; i++)
		mem_write(d, page + pick(d, 16 + i, d->page / 8) * 8, 8);
	for (i = 1; i < 8; i *= 2)
		mem_write(d, page + pick(d, 32 + i, d->page / i) * i, i);
}

static void read_back(struct device *d)
{
	__u64 page = cold_page(d, d->generation);
	unsigned int width, i;

	for (i = 0; i < HOT_PAGES; i++)
		mem_check(d, hot_page(d, i) + pick(d, i, d->page / 8) * 8, 8);
	for (i = 0; i < 8; i++) {
		width = 1 << (i & 3);
		mem_check(d, page + pick(d, 64 + i, d->page / width) * width,
			  width);
		mem_check(d, pick(d, 80 + i, d->work / width) * width, width);
	}
}

static void use_engine(struct device *d)
{
	__u64 addr, len;

	d->want.scratch = d->generation;
	mmio_write(d->regs + VFIO_MOCK_REG_SCRATCH, 8, d->generation);
	if (d->generation % 4 == 0) {
		len = 1 + pick(d, 100, FILL_MAX);
		addr = pick(d, 101, d->work - len + 1);
		fill(d, addr, len);
	}
	if (d->generation % 8 == 0) {
		len = 1 + pick(d, 102, CHECKSUM_MAX);
		addr = pick(d, 103, d->work - len + 1);
		check(d, "checksum", addr, true, checksum(d, addr, len));
	}
	check_reg(d, "scratch", VFIO_MOCK_REG_SCRATCH, 8, d->generation);
}

static void generation(struct device *d)
{
	d->generation++;
	write_pages(d);
	if (d->kind->engine)
		use_engine(d);
	if (d->kind->display)
		display_turn(d);
	read_back(d);
}

/* Writes the whole memory once, so that no page is empty. */
static void first_generation(struct device *d)
{
	__u64 offset;

	if (d->kind->engine) {
		fill(d, 0, d->size);
		return;
	}
	for (offset = 0; offset < d->size; offset += 8)
		mem_write(d, offset, 8);
	if (d->kind->display)
		display_draw(d);
}

static void check_registers(struct device *d)
{
	check_reg(d, "magic", VFIO_MOCK_REG_MAGIC, 4, VFIO_MOCK_MAGIC);
	check_reg(d, "abi-version", VFIO_MOCK_REG_ABI_VERSION, 4,
		  VFIO_MOCK_ABI_VERSION);
	check_reg(d, "state-size", VFIO_MOCK_REG_STATE_SIZE, 8, d->size);
	check_reg(d, "page-size", VFIO_MOCK_REG_PAGE_SIZE, 4, d->page);
	check_reg(d, "status", VFIO_MOCK_REG_STATUS, 4,
		  d->want.completions ? VFIO_MOCK_STATUS_DONE : 0);
	check_reg(d, "scratch", VFIO_MOCK_REG_SCRATCH, 8, d->want.scratch);
	check_reg(d, "addr", VFIO_MOCK_REG_ADDR, 8, d->want.addr);
	check_reg(d, "len", VFIO_MOCK_REG_LEN, 8, d->want.len);
	check_reg(d, "seed", VFIO_MOCK_REG_SEED, 8, d->want.seed);
	check_reg(d, "irq-vector", VFIO_MOCK_REG_IRQ_VECTOR, 4,
		  d->want.irq_vector);
	check_reg(d, "result", VFIO_MOCK_REG_RESULT, 8, d->want.result);
	check_reg(d, "completions", VFIO_MOCK_REG_COMPLETIONS, 8,
		  d->want.completions);
	check_reg(d, "error", VFIO_MOCK_REG_ERROR, 4, VFIO_MOCK_ERROR_NONE);
}

/* Reports pages with a checksum that differs from the model. */
static __u64 bad_pages(struct device *d)
{
	__u64 page, bad = 0;

	for (page = 0; page < d->size; page += d->page) {
		if (checksum(d, page, d->page))
			continue;
		if (bad++ < BAD_PAGES_SHOWN)
			check(d, "page", page,
			      vfio_mock_checksum(d->model + page, d->page),
			      d->want.result);
	}
	return bad;
}

/*
 * Reads whole pages: all pages of a device that is small or has no checksums; of other
 * devices the hot pages, the last written ones, and some more.
 */
static __u64 read_back_pages(struct device *d)
{
	__u64 pages = d->size / d->page, page, offset;
	bool all = pages <= READBACK_PAGES || !d->kind->engine;
	unsigned int i;

	for (i = 0; i < (all ? pages : READBACK_PAGES); i++) {
		if (all)
			page = i * d->page;
		else if (i < HOT_PAGES)
			page = hot_page(d, i);
		else if (i < READBACK_PAGES / 2 && d->generation > i)
			page = cold_page(d, d->generation - i);
		else
			page = pick(d, 1000 + i, pages) * d->page;
		for (offset = page; offset < page + d->page; offset += 8)
			mem_check(d, offset, 8);
	}
	return i * d->page;
}

/* Compares registers, checksums and interrupts; returns the number of bad pages. */
static __u64 verify_engine(struct device *d)
{
	__u64 bad = 0;
	bool sum;

	check_registers(d);
	sum = checksum(d, 0, d->size);
	check(d, "checksum", 0, true, sum);
	if (!sum)
		bad = bad_pages(d);
	check(d, "irqs", 0, d->count.doorbells, d->count.irqs);
	check_registers(d);
	return bad;
}

/* Compares the whole devices with the model. */
static void verify(void)
{
	__u64 start = now_ms(), bytes = 0, summed = 0, bad = 0, mismatches = 0;
	struct device *d;

	for_each_device(d)
		peers_stop(d);
	for_each_device(d) {
		bytes += read_back_pages(d);
		if (d->kind->engine) {
			summed += d->size;
			bad += verify_engine(d);
		}
		if (d->kind->display)
			display_verify(d);
		mismatches += d->count.mismatches;
	}
	for_each_device(d)
		peers_start(d);
	tell("@verdict result=%s checksummed=%llu readback=%llu bad_pages=%llu ms=%llu",
	     mismatches ? "bad" : "ok", summed, bytes, bad, now_ms() - start);
	say_counters();
}

static void read_commands(void)
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
			verify();
		} else if (!strcmp(line, "quit")) {
			say("@quit");
			tcdrain(commands);
			reboot(RB_POWER_OFF);
		} else {
			say("@unknown command=\"%s\"", line);
		}
	}
}

static noreturn void run(useconds_t pace)
{
	struct device *d;
	__u64 next = 0;

	for (;;) {
		for_each_device(d) {
			generation(d);
			peers_turn(d);
		}
		if (now_ms() >= next) {
			tell("@work");
			say_counters();
			next = now_ms() + REPORT_MS;
		}
		read_commands();
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

static const struct kind *find_kind(const char *dir)
{
	const struct kind *kind;

	for (kind = kinds; kind->id; kind++) {
		if (read_number(dir, "vendor") == kind->vendor &&
		    read_number(dir, "device") == kind->id)
			return kind;
	}
	return NULL;
}

static void find_devices(void)
{
	char dir[sizeof(PCI_DEVICES) + sizeof(devices->pci)];
	const struct kind *kind;
	struct dirent **list;
	struct device *d;
	int n, i;

	n = scandir(PCI_DEVICES, &list, NULL, alphasort);
	if (n < 0)
		die("open %s", PCI_DEVICES);
	for (i = 0; i < n && device_count < MAX_DEVICES; i++) {
		if (list[i]->d_name[0] == '.')
			continue;
		snprintf(dir, sizeof(dir), PCI_DEVICES "/%s", list[i]->d_name);
		kind = find_kind(dir);
		if (!kind)
			continue;
		d = &devices[device_count++];
		d->kind = kind;
		snprintf(d->pci, sizeof(d->pci), "%s", list[i]->d_name);
	}
	errno = ENODEV;
	if (!device_count)
		die("no PCI device that is known here");
}

/* The devices are plugged in before the next line. The guest has no hotplug driver. */
static void await_devices(void)
{
	struct pollfd p = { .fd = commands, .events = POLLIN };
	char byte = 0;

	while (byte != '\n') {
		if (poll(&p, 1, -1) < 0)
			die("poll for a command");
		if (read(commands, &byte, 1) != 1)
			byte = 0;
	}
	write_file("/sys/bus/pci/rescan", "1");
}

void *map_bar(struct device *d, unsigned int bar, __u64 *size)
{
	struct stat st;
	char path[512];
	void *p;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/resource%u", d->pci, bar);
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

__u64 guest_page(void)
{
	return sysconf(_SC_PAGESIZE);
}

/* Group of a device without IOMMU; vfio chooses its number. */
static int open_group(const struct device *d)
{
	char path[512], link[256];
	ssize_t len;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/iommu_group", d->pci);
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

static int open_vfio(const struct device *d)
{
	int container = open("/dev/vfio/vfio", O_RDWR);
	int group = open_group(d);
	int device;

	if (container < 0)
		die("open /dev/vfio/vfio");
	if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container))
		die("VFIO_GROUP_SET_CONTAINER");
	if (ioctl(container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU))
		die("VFIO_SET_IOMMU");
	device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, d->pci);
	if (device < 0)
		die("VFIO_GROUP_GET_DEVICE_FD");
	return device;
}

/* Enables memory space, and bus mastering, which MSI-X messages need. */
static void enable_device(const struct device *d)
{
	char path[512];
	__u16 cmd;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/config", d->pci);
	fd = open(path, O_RDWR);
	if (fd < 0 || pread(fd, &cmd, sizeof(cmd), PCI_COMMAND) != sizeof(cmd))
		die("read %s", path);
	cmd |= PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
	if (pwrite(fd, &cmd, sizeof(cmd), PCI_COMMAND) != sizeof(cmd))
		die("write %s", path);
	close(fd);
}

static void enable_irqs(struct device *d, int device)
{
	union {
		struct vfio_irq_set set;
		char room[sizeof(struct vfio_irq_set) + sizeof(d->irq)];
	} u = { .set = {
		.argsz = sizeof(u),
		.flags = VFIO_IRQ_SET_DATA_EVENTFD |
			 VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = VFIO_PCI_MSIX_IRQ_INDEX,
		.count = VFIO_MOCK_MSIX_VECTORS,
	} };
	unsigned int i;

	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS; i++) {
		d->irq[i] = eventfd(0, EFD_NONBLOCK);
		if (d->irq[i] < 0)
			die("eventfd");
	}
	memcpy(u.set.data, d->irq, sizeof(d->irq));
	if (ioctl(device, VFIO_DEVICE_SET_IRQS, &u.set))
		die("VFIO_DEVICE_SET_IRQS of MSI-X");
}

static void open_engine(struct device *d)
{
	char path[512];
	__u64 size;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/driver_override", d->pci);
	write_file(path, "vfio-pci");
	write_file("/sys/bus/pci/drivers_probe", d->pci);
	enable_irqs(d, open_vfio(d));
	d->want.irq_vector = VFIO_MOCK_IRQ_NONE;

	d->regs = map_bar(d, 0, &size);
	if (size != VFIO_MOCK_BAR0_SIZE)
		die("BAR0 has %llu bytes", size);
}

static void open_device(struct device *d)
{
	if (d->kind->engine)
		open_engine(d);
	enable_device(d);

	d->mem = map_bar(d, d->kind->bar, &d->size);
	d->work = d->size;
	/*
	 * The unit in which the device tracks writes is the page of the host, which the
	 * guest cannot tell but by a register. Without one any size spreads the writes.
	 */
	d->page = guest_page();
	if (d->kind->engine)
		d->page = mmio_read(d->regs + VFIO_MOCK_REG_PAGE_SIZE, 4);
	if (!d->page || d->page & (d->page - 1) || d->size % d->page) {
		errno = EINVAL;
		die("%s has pages of %llu bytes", d->pci, d->page);
	}
	d->vectors = VFIO_MOCK_MSIX_VECTORS;
	d->model = calloc(1, d->size);
	if (!d->model)
		die("no memory for a model of %llu bytes", d->size);
	memcpy(d->model, &d->kind->magic, sizeof(d->kind->magic));
	if (d->kind->engine)
		check_registers(d);
	if (d->kind->display)
		display_open(d);
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

static void open_report(const char *port)
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

	fd = open(port, O_RDWR | O_NOCTTY);
	if (fd < 0 || tcgetattr(fd, &tio))
		die("open %s", port);
	cfmakeraw(&tio);
	tio.c_cflag |= CLOCAL;
	cfsetspeed(&tio, B115200);
	if (tcsetattr(fd, TCSANOW, &tio))
		die("set up %s", port);
	commands = open(port, O_RDWR | O_NOCTTY | O_NONBLOCK);
	report = fdopen(fd, "w");
	if (commands < 0 || !report)
		exit(1);
}

int main(void)
{
	const char *pace = getenv("pace"), *port = getenv("report");
	struct device *d;
	bool p2p = false;
	__u64 size = 0;

	open_report(port ? port : REPORT_PORT);
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		die("mlockall");
	load_modules();
	say("@boot");
	if (getenv("hotplug"))
		await_devices();
	find_devices();
	for_each_device(d)
		open_device(d);
	if (device_count == 2 && devices[0].kind->engine &&
	    devices[1].kind->engine)
		p2p = peers_open(&devices[0], &devices[1]);
	for_each_device(d) {
		first_generation(d);
		size += d->size;
	}
	for_each_device(d)
		peers_start(d);

	tell("@ready pci=");
	for_each_device(d)
		tell("%s%s", d == devices ? "" : ",", d->pci);
	say(" state_size=%llu irq=%s p2p=%d", size,
	    devices->kind->engine ? "msix" : "none", p2p);
	run(pace ? strtoul(pace, NULL, 0) : 1000);
}
