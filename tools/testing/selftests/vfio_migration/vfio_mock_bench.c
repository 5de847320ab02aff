// SPDX-License-Identifier: GPL-2.0
/*
 * Migration speed of vfio_mock, compared with a reference operation on the same
 * machine: each figure is the median of the ratios of alternating runs, so that it
 * does not depend on the speed and the load of the machine.
 *
 *	./vfio_mock_bench --64K PATH --16M PATH --256M PATH --1G PATH --mtty PATH \
 *		--function PATH [-r RUNS] [word...]
 *
 * with the sysfs paths of mediated devices and of a PCI function; figures without a
 * device are omitted. run_bench.sh creates them. Words select the figures whose names
 * contain one.
 * Prints JSON to the standard output, and a table to the standard error. A figure
 * that misses its aim is not a failure.
 */
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/utsname.h>

#include <linux/iommufd.h>

#include "kselftest.h"
#include "mock_bench.h"

/* The factor for the runs of short operations. */
#define MANY		8
#define MAX_RUNS	1000

enum aim { AT_LEAST, AT_MOST };

struct figure {
	char name[64];
	const char *unit;
	double ours;		/* the median, in the unit */
	double theirs;
	double ratio;		/* the median of the ratios of the pairs */
	double low, high;	/* of the middle half of the ratios */
	enum aim sense;
	double aim;
	unsigned int runs;
};

static struct figure figures[64];
static unsigned int nr_figures;
static unsigned int runs = 11;
static char **words;
static __u8 *buffer;

static bool wanted(const char *name)
{
	char **word;

	if (!*words)
		return true;
	for (word = words; *word; word++) {
		if (strstr(name, *word))
			return true;
	}
	return false;
}

/*
 * Adds a figure from the seconds of pairs of runs. A speed is the work of one run,
 * @work in the unit, divided by its seconds; otherwise the figure is the time of the
 * work.
 */
static void add(const char *name, const double *ours, const double *theirs,
		unsigned int nr, bool speed, const char *unit, double work,
		enum aim sense, double aim)
{
	static double a[MAX_RUNS], b[MAX_RUNS], ratio[MAX_RUNS];
	struct figure *f = &figures[nr_figures++];
	unsigned int i;

	if (nr_figures == ARRAY_SIZE(figures))
		give_up("there are too many figures");
	for (i = 0; i < nr; i++) {
		a[i] = speed ? work / ours[i] : ours[i] / work;
		b[i] = speed ? work / theirs[i] : theirs[i] / work;
		ratio[i] = a[i] / b[i];
	}
	*f = (struct figure){
		.unit = unit, .ours = quartile(a, nr, 2), .theirs = quartile(b, nr, 2),
		.ratio = quartile(ratio, nr, 2), .low = quartile(ratio, nr, 1),
		.high = quartile(ratio, nr, 3), .sense = sense, .aim = aim, .runs = nr,
	};
	snprintf(f->name, sizeof(f->name), "%s", name);
	fprintf(stderr, "%s: %.3f\n", f->name, f->ratio);
}

static bool met(const struct figure *f)
{
	return f->sense == AT_LEAST ? f->ratio >= f->aim : f->ratio <= f->aim;
}

static void print_json(void)
{
	struct utsname uts;
	unsigned int i;

	uname(&uts);
	printf("{\n\t\"kernel\": \"%s\",\n\t\"cpu\": \"%s\",\n\t\"cpus\": %ld,\n",
	       uts.release, cpu_model(), sysconf(_SC_NPROCESSORS_ONLN));
	printf("\t\"figures\": [");
	for (i = 0; i < nr_figures; i++) {
		const struct figure *f = &figures[i];

		printf("%s\n\t\t{ \"name\": \"%s\", \"unit\": \"%s\", \"ours\": %.6g, \"theirs\": %.6g,",
		       i ? "," : "", f->name, f->unit, f->ours, f->theirs);
		printf(" \"ratio\": %.4f, \"quartiles\": [%.4f, %.4f], \"runs\": %u,",
		       f->ratio, f->low, f->high, f->runs);
		printf(" \"aim\": \"%s %.2f\", \"met\": %s }",
		       f->sense == AT_LEAST ? ">=" : "<=", f->aim, met(f) ? "true" : "false");
	}
	printf("\n\t]\n}\n");
}

static void print_table(void)
{
	unsigned int i;

	fprintf(stderr, "\n%-44s %10s %10s %-6s %7s  %-15s %s\n", "", "vfio_mock",
		"beside it", "", "ratio", "middle half", "aim");
	for (i = 0; i < nr_figures; i++) {
		const struct figure *f = &figures[i];

		fprintf(stderr, "%-44s %10.5g %10.5g %-6s %7.3f  %6.3f - %-6.3f %s %.2f%s\n",
			f->name, f->ours, f->theirs, f->unit, f->ratio, f->low, f->high,
			f->sense == AT_LEAST ? ">=" : "<=", f->aim,
			met(f) ? "" : "  falls short");
	}
}

/* ---- Devices ---- */

/* Opens the device in an option. */
static bool open_mock(struct mock *m, const char *name)
{
	const char *path = mig_option(name);

	if (!path) {
		fprintf(stderr, "vfio_mock_bench: no --%s\n", name);
		return false;
	}
	open_mock_at(m, path);
	return true;
}

/* Gives each page a content of its own. */
static void fill_all(const struct mock *m)
{
	const struct {
		__u64 addr, len, seed;
		__u32 doorbell;
	} command = { 0, m->size, 1, VFIO_MOCK_CMD_FILL };
	__u32 status = 0;

	write_device(m, m->bar0 + VFIO_MOCK_REG_ADDR, &command,
		     offsetof(typeof(command), doorbell) + 4);
	if (pread(m->dev.fd, &status, 4, m->bar0 + VFIO_MOCK_REG_STATUS) != 4 ||
	    status != VFIO_MOCK_STATUS_DONE)
		give_up("could not fill the memory");
}

/* A memfd of @size bytes. */
static int new_memfd(size_t size)
{
	int fd = memfd_create("bench", MFD_CLOEXEC);
	size_t done;

	must(fd < 0 ? -errno : 0, "make a memfd");
	for (done = 0; done < size; done += PIECE) {
		vfio_mock_pattern(buffer, 1, done, PIECE);
		if (write(fd, buffer, PIECE) != PIECE)
			give_up("could not write the memfd: %s", strerror(errno));
	}
	return fd;
}

/* ---- The whole image ---- */

/*
 * Reads the stream in pieces, each followed by a piece of @memfd, so that the load of
 * the machine affects both. Sets the seconds for a byte.
 */
static void read_both(int fd, int memfd, double *ours, double *theirs)
{
	double times[3], spent[2] = {};
	size_t done[2] = {};
	ssize_t ret[2];
	int i;

	do {
		times[0] = now();
		ret[0] = read(fd, buffer, PIECE);
		times[1] = now();
		ret[1] = read(memfd, buffer, PIECE);
		times[2] = now();
		for (i = 0; i < 2; i++) {
			if (ret[i] < 0)
				give_up("could not read: %s", strerror(errno));
			spent[i] += times[i + 1] - times[i];
			done[i] += ret[i];
		}
	} while (ret[0]);
	*ours = spent[0] / done[0];
	*theirs = spent[1] / done[1];
}

/* Writes the image in the same way. */
static void write_both(int fd, int memfd, const struct mig_stream *image,
		       double *ours, double *theirs)
{
	double times[3], spent[2] = {};
	size_t at, len;

	for (at = 0; at < image->len; at += len) {
		len = image->len - at < PIECE ? image->len - at : PIECE;
		times[0] = now();
		if (write(fd, image->data + at, len) != (ssize_t)len)
			give_up("could not load the image: %s", strerror(errno));
		times[1] = now();
		if (pwrite(memfd, image->data + at, len, at) != (ssize_t)len)
			give_up("could not write the memfd: %s", strerror(errno));
		times[2] = now();
		spent[0] += times[1] - times[0];
		spent[1] += times[2] - times[1];
	}
	*ours = spent[0] / image->len;
	*theirs = spent[1] / image->len;
}

static void bench_image(void)
{
	double ours[MAX_RUNS], theirs[MAX_RUNS];
	struct mig_stream image = {};
	unsigned int i;
	struct mock m;
	int memfd, fd;

	if (!wanted("read(data_fd), 256 MiB image") &&
	    !wanted("write(data_fd), 256 MiB image"))
		return;
	if (!open_mock(&m, "256M"))
		return;
	fill_all(&m);
	memfd = new_memfd(m.size);
	for (i = 0; i < runs; i++) {
		fd = to_state(&m.dev, MIG_STOP_COPY);
		lseek(memfd, 0, SEEK_SET);
		read_both(fd, memfd, &ours[i], &theirs[i]);
		close(fd);
		to_state(&m.dev, MIG_RUNNING);
	}
	add("read(data_fd), 256 MiB image", ours, theirs, runs, true, "MB/s", 1 / 1e6,
	    AT_LEAST, 0.95);

	fd = to_state(&m.dev, MIG_STOP_COPY);
	must(mig_save(fd, &image, 2 * m.size), "save an image");
	close(fd);
	for (i = 0; i < runs; i++) {
		fd = to_state(&m.dev, MIG_RESUMING);
		write_both(fd, memfd, &image, &ours[i], &theirs[i]);
		to_state(&m.dev, MIG_STOP);
		close(fd);
	}
	add("write(data_fd), 256 MiB image", ours, theirs, runs, true, "MB/s", 1 / 1e6,
	    AT_LEAST, 0.90);
	mig_stream_free(&image);
	close(memfd);
	mig_close(&m.dev);
}

/* ---- A read into several buffers ---- */

#define VECTORS		16

/* Reads the stream in pieces, alternately with readv() and read(). */
static void read_in_two_ways(int fd, double *vectors, double *plain)
{
	struct iovec iov[VECTORS];
	double times[3], spent[2] = {};
	size_t done[2] = {};
	ssize_t ret[2];
	int i;

	for (i = 0; i < VECTORS; i++) {
		iov[i].iov_len = PIECE / VECTORS;
		iov[i].iov_base = buffer + i * iov[i].iov_len;
	}
	do {
		times[0] = now();
		ret[0] = readv(fd, iov, VECTORS);
		times[1] = now();
		ret[1] = read(fd, buffer, PIECE);
		times[2] = now();
		for (i = 0; i < 2; i++) {
			if (ret[i] < 0)
				give_up("could not read the stream: %s", strerror(errno));
			spent[i] += times[i + 1] - times[i];
			done[i] += ret[i];
		}
	} while (ret[1]);
	*vectors = spent[0] / done[0];
	*plain = spent[1] / done[1];
}

static void bench_readv(void)
{
	const char *name = "readv(data_fd), 16 vectors : read(data_fd)";
	double vectors[MAX_RUNS], plain[MAX_RUNS];
	unsigned int i;
	struct mock m;
	int fd;

	if (!wanted(name) || !open_mock(&m, "256M"))
		return;
	fill_all(&m);
	for (i = 0; i < runs; i++) {
		fd = to_state(&m.dev, MIG_STOP_COPY);
		read_in_two_ways(fd, &vectors[i], &plain[i]);
		close(fd);
		to_state(&m.dev, MIG_RUNNING);
	}
	add(name, vectors, plain, runs, true, "MB/s", 1 / 1e6, AT_LEAST, 0.90);
	mig_close(&m.dev);
}

/* ---- A round of pre-copy ---- */

static void bench_round(void)
{
	const char *name = "PRE_COPY round, 64 pages, 1 GiB : 16 MiB";
	double ours[MAX_RUNS], theirs[MAX_RUNS];
	struct mock large, small;
	int large_fd, small_fd;
	unsigned int i;

	if (!wanted(name) || !open_mock(&large, "1G"))
		return;
	if (!open_mock(&small, "16M"))
		return;
	large_fd = to_state(&large.dev, MIG_PRE_COPY);
	small_fd = to_state(&small.dev, MIG_PRE_COPY);
	drain(large_fd, buffer);
	drain(small_fd, buffer);
	for (i = 0; i < runs * MANY; i++) {
		ours[i] = precopy_round(&large, large_fd, buffer);
		theirs[i] = precopy_round(&small, small_fd, buffer);
	}
	add(name, ours, theirs, i, false, "us", 1 / 1e6, AT_MOST, 1.2);
	close(large_fd);
	close(small_fd);
	mig_close(&large.dev);
	mig_close(&small.dev);
}

/* ---- Overhead of tracking ---- */

/* Writes each page once, in an order that defeats caches. */
static double write_pages(const struct mock *m)
{
	__u64 page = 0, pages = m->size / PAGE, i;
	double start = now();

	for (i = 0; i < pages; i++) {
		page = (page + 1237) % pages;
		write_device(m, m->bar2 + page * PAGE, buffer, PAGE);
	}
	return (now() - start) / pages;
}

static void bench_write(void)
{
	const char *name = "write of a page to BAR2, tracking on : off";
	double on[MAX_RUNS], off[MAX_RUNS];
	struct mock m;
	unsigned int i;
	int fd;

	if (!wanted(name) || !open_mock(&m, "16M"))
		return;
	write_pages(&m);
	for (i = 0; i < runs * 2; i++) {
		off[i] = write_pages(&m);
		fd = to_state(&m.dev, MIG_PRE_COPY);
		drain(fd, buffer);
		on[i] = write_pages(&m);
		close(fd);
		to_state(&m.dev, MIG_RUNNING);
	}
	add(name, on, off, i, false, "us", 1 / 1e6, AT_MOST, 1.05);
	mig_close(&m.dev);
}

#define PASSES	4

static double store_all(void *to, size_t size)
{
	double start = now();
	unsigned int pass;

	for (pass = 0; pass < PASSES; pass++)
		memset(to, pass, size);
	return (now() - start) / (PASSES * size);
}

static void bench_store(void)
{
	const char *name = "stores by mmap, tracking off : plain memory";
	double ours[MAX_RUNS], theirs[MAX_RUNS];
	void *mapped, *plain;
	unsigned int i;
	struct mock m;

	if (!wanted(name) || !open_mock(&m, "16M"))
		return;
	mapped = mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_SHARED, m.dev.fd,
		      m.bar2);
	if (mapped == MAP_FAILED)
		give_up("could not map BAR2: %s", strerror(errno));
	/* In small pages, like the device's memory. */
	plain = mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (plain == MAP_FAILED)
		give_up("could not map memory: %s", strerror(errno));
	store_all(mapped, m.size);
	store_all(plain, m.size);
	for (i = 0; i < runs * 2; i++) {
		ours[i] = store_all(mapped, m.size);
		theirs[i] = store_all(plain, m.size);
	}
	add(name, ours, theirs, i, true, "MB/s", 1 / 1e6, AT_LEAST, 1.0);
	munmap(mapped, m.size);
	munmap(plain, m.size);
	mig_close(&m.dev);
}

/* ---- State changes ---- */

#define STEPS	17

/* Each arc at least once, and back to RUNNING. */
static const __u32 way[STEPS + 1] = {
	MIG_RUNNING, MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_PRE_COPY, MIG_RUNNING,
	MIG_RUNNING_P2P, MIG_PRE_COPY_P2P, MIG_RUNNING_P2P, MIG_PRE_COPY_P2P, MIG_STOP_COPY,
	MIG_STOP, MIG_STOP_COPY, MIG_STOP, MIG_RESUMING, MIG_STOP, MIG_RUNNING_P2P,
	MIG_STOP, MIG_RUNNING_P2P,
};

/* The time of each step; the device resumes from @image. */
static void walk(const struct mig_device *dev, const struct mig_stream *image,
		 double seconds[STEPS])
{
	int fd = -1, new_fd;
	unsigned int i;
	double start;

	for (i = 0; i < STEPS; i++) {
		if (way[i] == MIG_RESUMING)
			must(mig_load(fd, image->data, image->len, 0, NULL), "load an image");
		start = now();
		new_fd = to_state(dev, way[i + 1]);
		seconds[i] = now() - start;
		if (new_fd >= 0)
			fd = new_fd;
		if (fd >= 0 && !mig_fsm_saving(way[i + 1]) && way[i + 1] != MIG_RESUMING) {
			close(fd);
			fd = -1;
		}
	}
	to_state(dev, MIG_RUNNING);
}

static void save_image(const struct mig_device *dev, struct mig_stream *image)
{
	int fd = to_state(dev, MIG_STOP_COPY);

	must(mig_save(fd, image, 1 << 20), "save an image");
	close(fd);
	to_state(dev, MIG_RUNNING);
}

static void bench_arcs(void)
{
	static double ours[STEPS][MAX_RUNS], theirs[STEPS][MAX_RUNS];
	struct mig_stream our_image = {}, their_image = {};
	const char *path = mig_option("mtty");
	unsigned int i, step, before;
	struct mig_device mtty;
	double seconds[STEPS];
	char name[64];
	struct mock m;

	if (!wanted("arc"))
		return;
	if (!path) {
		fprintf(stderr, "vfio_mock_bench: no --mtty\n");
		return;
	}
	if (!open_mock(&m, "64K"))
		return;
	open_device(&mtty, path);
	if (mtty.flags != m.dev.flags)
		give_up("mtty and vfio_mock have different states");
	save_image(&m.dev, &our_image);
	save_image(&mtty, &their_image);
	for (i = 0; i < runs * MANY; i++) {
		walk(&m.dev, &our_image, seconds);
		for (step = 0; step < STEPS; step++)
			ours[step][i] = seconds[step];
		walk(&mtty, &their_image, seconds);
		for (step = 0; step < STEPS; step++)
			theirs[step][i] = seconds[step];
	}
	for (step = 0; step < STEPS; step++) {
		/* Some arcs occur more than once. */
		for (before = 0; before < step; before++) {
			if (way[before] == way[step] && way[before + 1] == way[step + 1])
				break;
		}
		if (before < step)
			continue;
		snprintf(name, sizeof(name), "arc %s -> %s", mig_state_name(way[step]),
			 mig_state_name(way[step + 1]));
		add(name, ours[step], theirs[step], i, false, "us", 1 / 1e6, AT_MOST, 1.0);
	}
	mig_stream_free(&our_image);
	mig_stream_free(&their_image);
	mig_close(&mtty);
	mig_close(&m.dev);
}

/* ---- Mappings in an IOMMU ---- */

#define MAPPED		(1ULL << 30)

/* From drivers/iommu/iommufd/iommufd_test.h, for kernels with CONFIG_IOMMUFD_TEST. */
#define IOMMU_TEST_CMD	_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32)
#define IOMMU_TEST_OP_MOCK_DOMAIN	2

struct iommu_test_mock_domain {
	__u32 size, op, id, reserved;
	__u32 out_stdev_id, out_hwpt_id, out_idev_id;
	/* Not less than the kernel's union of all operations. */
	__u32 more[25];
};

/* Makes an IOAS map each page by itself, like memory in pages that are not contiguous. */
static void map_single_pages(int iommu, __u32 ioas)
{
	struct iommu_option option = {
		.size = sizeof(option), .option_id = IOMMU_OPTION_HUGE_PAGES,
		.op = IOMMU_OPTION_OP_SET, .object_id = ioas,
	};

	must(ioctl(iommu, IOMMU_OPTION, &option) ? -errno : 0, "set an option");
}

/* Maps memory in the aperture of both IOMMUs, and unmaps it. */
static double map_memory(int iommu, __u32 ioas, void *memory)
{
	struct iommu_ioas_map map = {
		.size = sizeof(map), .ioas_id = ioas, .user_va = (uintptr_t)memory,
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
			 IOMMU_IOAS_MAP_WRITEABLE,
		.length = MAPPED, .iova = MAPPED,
	};
	struct iommu_ioas_unmap unmap = {
		.size = sizeof(unmap), .ioas_id = ioas, .iova = MAPPED, .length = MAPPED,
	};
	double start = now();

	must(ioctl(iommu, IOMMU_IOAS_MAP, &map) ? -errno : 0, "map memory");
	start = now() - start;
	must(ioctl(iommu, IOMMU_IOAS_UNMAP, &unmap) ? -errno : 0, "unmap memory");
	return start;
}

static void bench_map(void)
{
	const char *name = "map of 1 GiB in pages : domain of iommufd's test";
	struct iommu_ioas_alloc ioas = { .size = sizeof(ioas) };
	struct iommu_test_mock_domain mock = {
		.size = sizeof(mock), .op = IOMMU_TEST_OP_MOCK_DOMAIN,
	};
	double ours[MAX_RUNS], theirs[MAX_RUNS];
	const char *path = mig_option("function");
	struct mig_device dev;
	unsigned int i;
	void *memory;
	int iommu;

	if (!wanted(name) || !path)
		return;
	must(mig_open(&dev, path, MIG_IOMMUFD), "open the function");
	iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	must(iommu < 0 ? -errno : 0, "open /dev/iommu");
	must(ioctl(iommu, IOMMU_IOAS_ALLOC, &ioas) ? -errno : 0, "allocate an IOAS");
	mock.id = ioas.out_ioas_id;
	if (ioctl(iommu, IOMMU_TEST_CMD, &mock)) {
		must(errno == ENOTTY ? 0 : -errno, "create a domain of iommufd's test");
		fprintf(stderr, "vfio_mock_bench: no CONFIG_IOMMUFD_TEST\n");
		close(iommu);
		mig_close(&dev);
		return;
	}
	map_single_pages(dev.iommu, dev.ioas);
	map_single_pages(iommu, ioas.out_ioas_id);
	memory = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		give_up("could not map memory: %s", strerror(errno));
	for (i = 0; i < runs; i++) {
		ours[i] = map_memory(dev.iommu, dev.ioas, memory);
		theirs[i] = map_memory(iommu, ioas.out_ioas_id, memory);
	}
	add(name, ours, theirs, runs, false, "ms", 1 / 1e3, AT_MOST, 2.0);
	munmap(memory, MAPPED);
	close(iommu);
	mig_close(&dev);
}

static struct mig_option options[] = {
	{ .name = "64K", .argument = "PATH", .help = "a device of this size" },
	{ .name = "16M", .argument = "PATH", .help = "the same" },
	{ .name = "256M", .argument = "PATH", .help = "the same" },
	{ .name = "1G", .argument = "PATH", .help = "the same" },
	{ .name = "mtty", .argument = "PATH", .help = "a device of the sample mtty" },
	{ .name = "function", .argument = "PATH", .help = "a PCI function" },
	{}
};

int main(int argc, char **argv)
{
	int opt;

	argc = mig_take_options(argc, argv, options);
	while ((opt = getopt(argc, argv, "r:")) != -1) {
		if (opt == 'r')
			runs = strtoul(optarg, NULL, 10);
		if (opt != 'r' || !runs || runs > MAX_RUNS / MANY) {
			fprintf(stderr, "Usage: %s [-r RUNS] [word...], at most %u runs\n",
				argv[0], MAX_RUNS / MANY);
			return 2;
		}
	}
	words = argv + optind;
	buffer = mmap(NULL, PIECE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (buffer == MAP_FAILED)
		give_up("no memory is available");
	memset(buffer, 0x5a, PIECE);
	bench_image();
	bench_readv();
	bench_round();
	bench_write();
	bench_store();
	bench_arcs();
	bench_map();
	if (!nr_figures)
		give_up("there is nothing to measure");
	print_table();
	print_json();
	return 0;
}
