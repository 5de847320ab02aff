// SPDX-License-Identifier: GPL-2.0
/*
 * Measures how the cost of vfio_mock grows with the size and the number of devices.
 *
 *	./vfio_mock_scale [-r RUNS]
 *
 * as root, with vfio_mock loaded and no devices of it: creates and removes mediated
 * devices. Prints curves as JSON to the standard output. A point is [x, median, first
 * quartile, third quartile]. The order of a curve is the expected exponent of x.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#include "kselftest.h"
#include "mock_bench.h"

#define MAX_RUNS	100
#define MAX_POINTS	8
#define MAX_DEVICES	64
#define ROUNDS		4
/* With less state, the rest is a few pages, and slabs that others have in common. */
#define LEAST_MEMORY	(1 << 20)
#define TYPES		"/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-"

struct curve {
	const char *name;
	const char *x;
	const char *unit;
	int order;		/* expected exponent of x */
	unsigned int nr;
	double points[MAX_POINTS][4];
};

enum {
	OPEN, BEGIN, ROUND, STOP, END, CLOSE, BEYOND_OPEN, BEYOND_SESSION, MIGRATION, CREATE,
	NR_CURVES,
};

#define CURVE(_name, _x, _unit, _order) \
	{ .name = _name, .x = _x, .unit = _unit, .order = _order }

static struct curve curves[NR_CURVES] = {
	[OPEN] = CURVE("open", "bytes of state", "us", 1),
	[BEGIN] = CURVE("RUNNING to PRE_COPY", "bytes of state", "us", 1),
	[ROUND] = CURVE("PRE_COPY round, 64 dirty pages", "bytes of state", "us", 0),
	[STOP] = CURVE("PRE_COPY to STOP_COPY, nothing dirty", "bytes of state", "us", 0),
	[END] = CURVE("STOP_COPY to RUNNING", "bytes of state", "us", 1),
	[CLOSE] = CURVE("close", "bytes of state", "us", 1),
	[BEYOND_OPEN] = CURVE("memory beyond the state, open", "bytes of state", "KiB", 1),
	[BEYOND_SESSION] = CURVE("memory beyond the state, PRE_COPY", "bytes of state", "KiB", 1),
	[MIGRATION] = CURVE("migration of 1 MiB out, for each device", "devices at once", "us", 0),
	[CREATE] = CURVE("create and remove, for each device", "devices in turn", "us", 0),
};

static unsigned int runs = 7;
static void *buffer;

static void add_point(unsigned int curve, double x, double *values, unsigned int nr,
		      double factor)
{
	struct curve *c = &curves[curve];
	double *point = c->points[c->nr++];
	unsigned int i;

	if (c->nr > MAX_POINTS)
		give_up("there are too many points");
	point[0] = x;
	point[1] = quartile(values, nr, 2) * factor;
	for (i = 0; i < 2; i++)
		point[2 + i] = quartile(values, nr, 1 + 2 * i) * factor;
	fprintf(stderr, "%s, %g %s: %.1f %s\n", c->name, x, c->x, point[1], c->unit);
}

static void print_json(void)
{
	struct utsname uts;
	const char *comma = "";
	unsigned int i, k;

	uname(&uts);
	printf("{\n\t\"kernel\": \"%s\",\n\t\"cpu\": \"%s\",\n\t\"cpus\": %ld,\n",
	       uts.release, cpu_model(), sysconf(_SC_NPROCESSORS_ONLN));
	printf("\t\"curves\": [");
	for (i = 0; i < NR_CURVES; i++) {
		const struct curve *c = &curves[i];

		if (!c->nr)
			continue;
		printf("%s\n\t\t{ \"name\": \"%s\", \"x\": \"%s\", \"unit\": \"%s\", \"order\": %d,",
		       comma, c->name, c->x, c->unit, c->order);
		printf("\n\t\t  \"points\": [");
		for (k = 0; k < c->nr; k++) {
			const double *p = c->points[k];

			printf("%s[%.10g, %.6g, %.6g, %.6g]", k ? ", " : "", p[0], p[1],
			       p[2], p[3]);
		}
		printf("] }");
		comma = ",";
	}
	printf("\n\t]\n}\n");
}

/* ---- Devices ---- */

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	must(fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0, path);
	close(fd);
}

struct mdev {
	char uuid[40];
	char path[96];
};

static void create_mdev(struct mdev *mdev, const char *type)
{
	FILE *file = fopen("/proc/sys/kernel/random/uuid", "r");
	char path[128];

	if (!file || fscanf(file, "%39s", mdev->uuid) != 1)
		give_up("there is no UUID");
	fclose(file);
	snprintf(path, sizeof(path), TYPES "%s/create", type);
	write_text(path, mdev->uuid);
	snprintf(mdev->path, sizeof(mdev->path), "/sys/bus/mdev/devices/%s", mdev->uuid);
}

static void remove_mdev(const struct mdev *mdev)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/remove", mdev->path);
	write_text(path, "1");
}

/* ---- Memory ---- */

static char cgroups[64], group[96];

/* Moves this process to a cgroup of its own, in which opened devices are charged. */
static void join_cgroup(void)
{
	char path[160];

	snprintf(cgroups, sizeof(cgroups), "/tmp/vfio_mock_scale.XXXXXX");
	if (!mkdtemp(cgroups))
		give_up("could not make a directory: %s", strerror(errno));
	must(mount("cgroup2", cgroups, "cgroup2", 0, NULL) ? -errno : 0, "mount cgroup2");
	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", cgroups);
	write_text(path, "+memory");
	snprintf(group, sizeof(group), "%s/scale", cgroups);
	must(mkdir(group, 0755) ? -errno : 0, "make a cgroup");
	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	write_text(path, "0");
}

static void leave_cgroup(void)
{
	char path[160];

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroups);
	write_text(path, "0");
	rmdir(group);
	umount2(cgroups, MNT_DETACH);
	rmdir(cgroups);
}

/*
 * The bytes of kernel memory that are charged to the cgroup. The kernel adds small changes
 * up every two seconds.
 */
static double charged_bytes(void)
{
	char path[160], line[128];
	double bytes = -1;
	FILE *file;

	sleep(3);
	snprintf(path, sizeof(path), "%s/memory.stat", group);
	file = fopen(path, "r");
	while (file && fgets(line, sizeof(line), file)) {
		if (sscanf(line, "kernel %lf", &bytes) == 1)
			break;
	}
	if (bytes < 0)
		give_up("the charged memory is unknown");
	fclose(file);
	return bytes;
}

/* ---- Sizes ---- */

static double timed_state(const struct mig_device *dev, __u32 state, int *fd)
{
	double start = now();
	int new_fd = to_state(dev, state);

	start = now() - start;
	if (fd)
		*fd = new_fd;
	return start;
}

static void measure_memory(struct mock *m)
{
	double closed, beyond;
	int fd;

	mig_close_device(&m->dev);
	closed = charged_bytes();
	must(mig_reopen_device(&m->dev), "open the device");
	beyond = charged_bytes() - closed - m->size;
	add_point(BEYOND_OPEN, m->size, &beyond, 1, 1.0 / 1024);
	fd = to_state(&m->dev, MIG_PRE_COPY);
	beyond = charged_bytes() - closed - m->size;
	add_point(BEYOND_SESSION, m->size, &beyond, 1, 1.0 / 1024);
	to_state(&m->dev, MIG_RUNNING);
	close(fd);
}

static void measure_size(const char *type)
{
	double values[NR_CURVES][MAX_RUNS * ROUNDS], start;
	unsigned int i, k, nr_rounds = 0;
	struct mdev mdev;
	struct mock m;
	int fd;

	create_mdev(&mdev, type);
	open_mock_at(&m, mdev.path);
	for (i = 0; i < runs; i++) {
		start = now();
		mig_close_device(&m.dev);
		values[CLOSE][i] = now() - start;
		start = now();
		must(mig_reopen_device(&m.dev), "open the device");
		values[OPEN][i] = now() - start;
		values[BEGIN][i] = timed_state(&m.dev, MIG_PRE_COPY, &fd);
		drain(fd, buffer);
		for (k = 0; k < ROUNDS && m.size >= ROUND_PAGES * PAGE; k++)
			values[ROUND][nr_rounds++] = precopy_round(&m, fd, buffer);
		values[STOP][i] = timed_state(&m.dev, MIG_STOP_COPY, NULL);
		drain(fd, buffer);
		values[END][i] = timed_state(&m.dev, MIG_RUNNING, NULL);
		close(fd);
	}
	for (i = OPEN; i <= CLOSE; i++) {
		k = i == ROUND ? nr_rounds : runs;
		if (k)
			add_point(i, m.size, values[i], k, 1e6);
	}
	if (m.size >= LEAST_MEMORY)
		measure_memory(&m);
	mig_close(&m.dev);
	remove_mdev(&mdev);
}

/* ---- Devices at once ---- */

static pthread_barrier_t barrier;

static void *migrate_out(void *arg)
{
	const struct mock *m = arg;
	void *own = malloc(PIECE);
	unsigned int i;
	int fd;

	if (!own)
		give_up("no memory is available");
	memset(own, 0, PIECE);
	pthread_barrier_wait(&barrier);
	fd = to_state(&m->dev, MIG_PRE_COPY);
	drain(fd, own);
	for (i = 0; i < ROUNDS; i++)
		precopy_round(m, fd, own);
	to_state(&m->dev, MIG_STOP_COPY);
	drain(fd, own);
	to_state(&m->dev, MIG_RUNNING);
	close(fd);
	pthread_barrier_wait(&barrier);
	free(own);
	return NULL;
}

static void measure_devices(unsigned int nr)
{
	static struct mdev mdevs[MAX_DEVICES];
	static struct mock mocks[MAX_DEVICES];
	pthread_t threads[MAX_DEVICES];
	double values[MAX_RUNS];
	unsigned int i, k;

	for (i = 0; i < nr; i++) {
		create_mdev(&mdevs[i], "1M");
		open_mock_at(&mocks[i], mdevs[i].path);
	}
	for (k = 0; k < runs; k++) {
		pthread_barrier_init(&barrier, NULL, nr + 1);
		for (i = 0; i < nr; i++)
			must(-pthread_create(&threads[i], NULL, migrate_out, &mocks[i]),
			     "start a thread");
		pthread_barrier_wait(&barrier);
		values[k] = now();
		pthread_barrier_wait(&barrier);
		values[k] = (now() - values[k]) / nr;
		for (i = 0; i < nr; i++)
			pthread_join(threads[i], NULL);
		pthread_barrier_destroy(&barrier);
	}
	for (i = 0; i < nr; i++) {
		mig_close(&mocks[i].dev);
		remove_mdev(&mdevs[i]);
	}
	add_point(MIGRATION, nr, values, runs, 1e6);
}

static void measure_creation(unsigned int nr)
{
	double values[MAX_RUNS], start;
	unsigned int i, k, few = nr < 100 ? runs : 1;
	struct mdev mdev;

	for (k = 0; k < few; k++) {
		start = now();
		for (i = 0; i < nr; i++) {
			create_mdev(&mdev, "64K");
			remove_mdev(&mdev);
		}
		values[k] = (now() - start) / nr;
	}
	add_point(CREATE, nr, values, few, 1e6);
}

static struct mig_option options[] = { {} };

int main(int argc, char **argv)
{
	static const char * const types[] = { "64K", "1M", "16M", "256M", "1G" };
	unsigned int i;
	int opt;

	argc = mig_take_options(argc, argv, options);
	while ((opt = getopt(argc, argv, "r:")) != -1) {
		if (opt == 'r')
			runs = strtoul(optarg, NULL, 10);
		if (opt != 'r' || !runs || runs > MAX_RUNS) {
			fprintf(stderr, "Usage: %s [-r RUNS], at most %u runs\n",
				argv[0], MAX_RUNS);
			return 2;
		}
	}
	buffer = mmap(NULL, PIECE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (buffer == MAP_FAILED)
		give_up("no memory is available");
	join_cgroup();
	for (i = 0; i < ARRAY_SIZE(types); i++)
		measure_size(types[i]);
	leave_cgroup();
	for (i = 1; i <= MAX_DEVICES; i *= 8)
		measure_devices(i);
	for (i = 1; i <= 1000; i *= 10)
		measure_creation(i);
	print_json();
	return 0;
}
