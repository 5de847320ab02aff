/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the programs that measure vfio_mock. Functions exit on an error.
 */
#ifndef MOCK_BENCH_H
#define MOCK_BENCH_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mig.h"
#include "vfio_mock.h"

#define PAGE		mig_page_size()
/* The length of one read() or write(). */
#define PIECE		(1 << 20)
/* The pages of a round of pre-copy. */
#define ROUND_PAGES	64

static inline void __attribute__((noreturn, format(printf, 1, 2)))
give_up(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fprintf(stderr, "%s: ", program_invocation_short_name);
	vfprintf(stderr, fmt, args);
	fputc('\n', stderr);
	va_end(args);
	exit(1);
}

/* Exits on a negative errno. */
static inline ssize_t must(ssize_t ret, const char *what)
{
	if (ret < 0)
		give_up("could not %s: %s", what, strerror(-ret));
	return ret;
}

static inline double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static inline int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* The value with this many quarters of the values below it; sorts them. */
static inline double quartile(double *values, unsigned int nr, unsigned int quarters)
{
	qsort(values, nr, sizeof(*values), by_value);
	return values[(nr - 1) * quarters / 4];
}

/* The model name of the CPU. */
static inline const char *cpu_model(void)
{
	FILE *file = fopen("/proc/cpuinfo", "r");
	static char model[128];
	char line[256];

	while (file && fgets(line, sizeof(line), file)) {
		if (sscanf(line, "model name : %127[^\n\"]", model) == 1)
			break;
	}
	if (file)
		fclose(file);
	return model;
}

struct mock {
	struct mig_device dev;
	__u64 bar0, bar2;	/* offsets in the file */
	__u64 size;		/* of the state memory */
};

/* Opens a device by either backend. */
static inline void open_device(struct mig_device *dev, const char *path)
{
	int ret = mig_open(dev, path, MIG_IOMMUFD);

	if (ret == -EOPNOTSUPP)
		ret = mig_open(dev, path, MIG_GROUP);
	if (ret)
		give_up("could not open %s: %s", path, dev->why);
}

static inline void open_mock_at(struct mock *m, const char *path)
{
	struct vfio_region_info info;

	open_device(&m->dev, path);
	must(mig_region_info(&m->dev, VFIO_PCI_BAR0_REGION_INDEX, &info), "find BAR0");
	m->bar0 = info.offset;
	must(mig_region_info(&m->dev, VFIO_PCI_BAR2_REGION_INDEX, &info), "find BAR2");
	m->bar2 = info.offset;
	m->size = info.size;
}

static inline void write_device(const struct mock *m, __u64 at, const void *data, size_t len)
{
	if (pwrite(m->dev.fd, data, len, at) != (ssize_t)len)
		give_up("could not write to the device: %s", strerror(errno));
}

static inline int to_state(const struct mig_device *dev, __u32 state)
{
	int fd;

	must(mig_set_state(dev, state, &fd), mig_state_name(state));
	return fd;
}

/* Reads to the end of the stream by @buffer of PIECE bytes, and returns its length. */
static inline size_t drain(int fd, void *buffer)
{
	size_t done = 0;
	ssize_t ret;

	while ((ret = read(fd, buffer, PIECE)) > 0)
		done += ret;
	if (ret < 0 && errno != ENOMSG)
		give_up("could not read the stream: %s", strerror(errno));
	return done;
}

/* Returns the seconds of a round of pre-copy, after pages were written. */
static inline double precopy_round(const struct mock *m, int fd, void *buffer)
{
	struct vfio_precopy_info info;
	__u64 page, step = m->size / PAGE / ROUND_PAGES;
	double start;
	size_t len;

	for (page = 0; page < ROUND_PAGES; page++)
		write_device(m, m->bar2 + page * step * PAGE, &page, 8);
	start = now();
	must(mig_precopy_info(fd, &info), "get the pre-copy info");
	len = drain(fd, buffer);
	must(mig_precopy_info(fd, &info), "get the pre-copy info");
	start = now() - start;
	if (info.dirty_bytes || len < ROUND_PAGES * PAGE || len > 2 * ROUND_PAGES * PAGE)
		give_up("a round of %u pages has %zu bytes", ROUND_PAGES, len);
	return start;
}

#endif /* MOCK_BENCH_H */
