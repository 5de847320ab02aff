// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA log of the mock migratable device vfio_mock: exactly the written pages.
 *
 *	./vfio_mock_log_test --medium "DEVICE"
 *
 * with the sysfs path of a mediated device. run_mock.sh creates it and runs this.
 * --rounds N multiplies the number of random transfers by N.
 */
#include "mock_dma.h"

#define log_data	FIXTURE_DATA(log)

/* The same memory at three IOVAs, one of them at the top of the address space. */
#define WINDOW_PAGES	512
#define WINDOW		(WINDOW_PAGES * PAGE)
#define READ_ONLY	3
#define WINDOWS		4

FIXTURE(log)
{
	struct mock m;
	__u8 *mem;
	__u64 random;
	__u64 windows[WINDOWS];
	/* The ranges of QEMU: below 4 GiB, above, and devices up to the top. */
	struct vfio_device_feature_dma_logging_range like_qemu[3];
	/* The ranges of Cloud Hypervisor: each memory region. */
	struct vfio_device_feature_dma_logging_range each_window[WINDOWS];
	__u8 truth[WINDOWS][WINDOW_PAGES];	/* written and not yet reported */
	__u8 logged[WINDOWS][WINDOW_PAGES];	/* in a range of START */
	__u64 granule;
};

MIG_EACH_BACKEND(log);

static void map_windows(struct __test_metadata *_metadata, log_data *self)
{
	unsigned int i;
	int ret;

	for (i = 0; i < WINDOWS; i++) {
		ret = mig_dma_map(&self->m.dev, self->windows[i], self->mem, WINDOW,
				  i == READ_ONLY ? MIG_DMA_READ : RW);
		ASSERT_EQ(0, ret)
			STEP("map memory at %#llx: %s", self->windows[i], strerror(-ret));
	}
}

FIXTURE_SETUP(log)
{
	__u64 windows[] = {
		0, (1ULL << 32) - WINDOW / 2, -2 * WINDOW, 0x7000000000ULL,
	};
	static const unsigned int in_no_order[] = { 2, 0, 1, 3 };
	const struct vfio_device_feature_dma_logging_range like_qemu[] = {
		{ .iova = 0, .length = 1ULL << 32 },
		{ .iova = 1ULL << 32, .length = (1ULL << 63) - (1ULL << 32) },
		{ .iova = 1ULL << 63, .length = (1ULL << 63) - WINDOW },
	};
	unsigned int i;

	NEED_IOMMUFD_FOR_LOG();
	MOCK_OPEN_OR_SKIP(&self->m, "medium", 0, variant->backend);
	/* An IOMMU has 48 bits of addresses. */
	if (mock_has_iommu(&self->m))
		windows[2] += 1ULL << 48;
	memcpy(self->windows, windows, sizeof(windows));
	memcpy(self->like_qemu, like_qemu, sizeof(like_qemu));
	for (i = 0; i < WINDOWS; i++) {
		self->each_window[i].iova = windows[in_no_order[i]];
		self->each_window[i].length = WINDOW;
	}
	self->mem = mmap(NULL, WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			 -1, 0);
	ASSERT_NE(MAP_FAILED, self->mem);
	map_windows(_metadata, self);
}

FIXTURE_TEARDOWN(log)
{
	mock_close(&self->m);
}

static __u64 log_pick(log_data *self, __u64 limit)
{
	return vfio_mock_mix(++self->random) % limit;
}

/* Notes a write of the device: logged pages must be reported. */
static void wrote(log_data *self, unsigned int window, __u64 at, __u64 len)
{
	const __u64 per = self->granule / PAGE;
	__u64 page;

	if (!len)
		return;
	for (page = at / PAGE / per * per; page <= (at + len - 1) / PAGE / per * per + per - 1;
	     page++)
		if (self->logged[window][page])
			self->truth[window][page] = 1;
}

/* Runs a transfer and notes its writes; returns whether it failed. */
static bool log_transfer(struct __test_metadata *_metadata, log_data *self,
			 __u32 op, unsigned int window, __u64 at, __u64 len)
{
	struct dma_desc d = {
		.op = op, .iova = self->windows[window] + at, .len = len,
		.seed = ++self->random, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	d = dma_run(_metadata, &self->m, 0, &d);
	if (op == WRITE || op == FILL)
		wrote(self, window, at, d.pos);
	return d.status != VFIO_MOCK_DMA_COMPLETE;
}

/* Reports a part of a window, which must be exact, and clears it in the model. */
static void expect_report(struct __test_metadata *_metadata, log_data *self,
			  unsigned int window, __u64 at, __u64 len, __u64 page_size)
{
	__u64 *bitmap = bitmap_make(_metadata, len / page_size);

	ASSERT_EQ(0, mig_log_report(&self->m.dev, self->windows[window] + at, len, page_size,
				    bitmap));
	expect_bitmap(_metadata, bitmap, self->truth[window], at, len, page_size, true);
}

/* START of @nr ranges, with an empty model. */
static void log_start(struct __test_metadata *_metadata, log_data *self,
		      const struct vfio_device_feature_dma_logging_range *ranges,
		      __u32 nr, __u64 page_size)
{
	__u64 at, selected = page_size;
	unsigned int w, page;
	__u32 i;
	int ret;

	memset(self->truth, 0, sizeof(self->truth));
	memset(self->logged, 0, sizeof(self->logged));
	ret = mig_log_start(&self->m.dev, &selected, ranges, nr);
	ASSERT_EQ(0, ret)
		PROMISE("START of %u ranges by %#llx: %s", nr, page_size, strerror(-ret));
	EXPECT_EQ(page_size, selected)
		PROMISE("the device logs by the requested page size");
	self->granule = selected;
	for (w = 0; w < WINDOWS; w++) {
		for (page = 0; page < WINDOW_PAGES; page++) {
			at = self->windows[w] + page * PAGE;
			for (i = 0; i < nr; i++)
				if (at >= ranges[i].iova &&
				    at - ranges[i].iova < ranges[i].length)
					self->logged[w][page] = 1;
		}
	}
}

/* Random transfers and reports; failed transfers are in the log, too. */
static void log_random(struct __test_metadata *_metadata, log_data *self,
		       unsigned int count)
{
	unsigned int i, w, failed = 0;
	__u64 at, len, size;

	for (i = 0; i < count; i++) {
		w = log_pick(self, WINDOWS);
		len = 1 + log_pick(self, log_pick(self, 8) ? 3 * PAGE : 40 * PAGE);
		at = log_pick(self, WINDOW - (log_pick(self, 16) ? len : 0));
		failed += log_transfer(_metadata, self, READ + log_pick(self, 3), w, at, len);
		if (log_pick(self, 8))
			continue;
		w = log_pick(self, WINDOWS);
		size = self->granule << log_pick(self, 3);
		at = log_pick(self, WINDOW / size) * size;
		len = (1 + log_pick(self, (WINDOW - at) / size)) * size;
		expect_report(_metadata, self, w, at, len, size);
	}
	for (w = 0; w < WINDOWS; w++) {
		expect_report(_metadata, self, w, 0, WINDOW, self->granule);
		/* A report clears the log. */
		expect_report(_metadata, self, w, 0, WINDOW, self->granule);
	}
	EXPECT_LT(0U, failed)
		TH_LOG("no transfer failed: failed transfers were not tested");
}

TEST_F_TIMEOUT(log, equals_written_pages, 7200)
{
	struct vfio_device_feature_dma_logging_range many[256];
	unsigned int count = mig_times(1000), i;

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	log_random(_metadata, self, count * 2 / 10);
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));
	log_start(_metadata, self, self->each_window, ARRAY_SIZE(self->each_window), PAGE);
	log_random(_metadata, self, count * 2 / 10);
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));
	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), 16 * PAGE);
	log_random(_metadata, self, count * 2 / 10);
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));

	/* The maximum number of ranges: every other page, in random order. */
	for (i = 0; i < ARRAY_SIZE(many); i++) {
		many[i].iova = self->windows[i % 3] + (i * 89 % 256) * 2 * PAGE;
		many[i].length = PAGE;
	}
	log_start(_metadata, self, many, ARRAY_SIZE(many), PAGE);
	log_random(_metadata, self, count * 2 / 10);
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));

	/* Only a part of the written range, and in large pages. */
	many[0].iova = 256 * PAGE;
	many[0].length = 128 * PAGE;
	many[1].iova = self->windows[2];
	many[1].length = 384 * PAGE;
	log_start(_metadata, self, many, 2, 128 * PAGE);
	log_random(_metadata, self, count * 2 / 10);
}

/* Guests often have memory in huge pages. A window has the size of some of them. */
TEST_F_TIMEOUT(log, huge_page_is_logged_by_small_pages, 600)
{
	unsigned int i;
	__u8 *huge;

	huge = huge_memory(_metadata, WINDOW);
	if (!huge)
		SKIP(return, "the kernel has no huge pages of 2 MiB");
	for (i = 0; i < WINDOWS; i++)
		ASSERT_EQ(0, mig_dma_unmap(&self->m.dev, self->windows[i], WINDOW));
	ASSERT_EQ(0, munmap(self->mem, WINDOW));
	self->mem = huge;
	map_windows(_metadata, self);
	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	log_random(_metadata, self, mig_times(100));
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));
	log_start(_metadata, self, self->each_window, ARRAY_SIZE(self->each_window),
		  16 * PAGE);
	log_random(_metadata, self, mig_times(100));
}

TEST_F(log, pages_larger_than_memory)
{
	static const struct vfio_device_feature_dma_logging_range all = {
		.iova = 0, .length = 0xfffffffff0000000ULL,
	}, huge = { .iova = 0, .length = 1ULL << 41 };
	__u64 bitmap[1 << 18] = {}, page_size = PAGE, i;

	/* The whole address space, reported in pages of 1 TiB and logged in smaller ones. */
	ASSERT_EQ(0, mig_log_start(&self->m.dev, &page_size, &all, 1));
	self->granule = page_size;
	log_transfer(_metadata, self, FILL, 0, 5, 10);
	log_transfer(_metadata, self, FILL, 1, 5, WINDOW - 5);
	ASSERT_EQ(0, mig_log_report(&self->m.dev, 0, 1ULL << 63, 1ULL << 40, bitmap));
	EXPECT_EQ(1U, bitmap[0]);
	for (i = 1; i < ARRAY_SIZE(bitmap); i++) {
		ASSERT_EQ(0U, bitmap[i])
			PROMISE("REPORT by TiB has exactly the written pages");
	}
	bitmap[0] = 0;
	ASSERT_EQ(0, mig_log_report(&self->m.dev, 0, 1ULL << 63, 1ULL << 40, bitmap));
	EXPECT_EQ(0U, bitmap[0]);
	ASSERT_EQ(0, mig_log_stop(&self->m.dev));

	/* The largest page size, and one that is too large. */
	for (i = 30; i <= 40; i += 10) {
		page_size = 1ULL << i;
		ASSERT_EQ(0, mig_log_start(&self->m.dev, &page_size, &huge, 1));
		EXPECT_EQ(1ULL << 30, page_size)
			PROMISE("the device logs by pages of up to a GiB");
		log_transfer(_metadata, self, FILL, READ_ONLY, 0, 8);
		ASSERT_EQ(0, mig_log_report(&self->m.dev, 0, 1ULL << 41, 1ULL << 30, bitmap));
		EXPECT_EQ(0U, bitmap[0])
			PROMISE("a failed transfer is not in the log");
		/* Across the boundary of two pages. */
		log_transfer(_metadata, self, FILL, 1, WINDOW / 2 - 4, 8);
		ASSERT_EQ(0, mig_log_report(&self->m.dev, 0, 1ULL << 41, 1ULL << 30, bitmap));
		EXPECT_EQ(3ULL << 3, bitmap[0]);
		bitmap[0] = 0;
		ASSERT_EQ(0, mig_log_stop(&self->m.dev));
	}
}

/* A report may cover less than a page of the log. */
TEST_F(log, partial_report_loses_no_page)
{
	unsigned int i;

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), 16 * PAGE);
	log_transfer(_metadata, self, FILL, 1, 35 * PAGE + 7, 10);
	for (i = 30; i < 50; i += 2)
		expect_report(_metadata, self, 1, i * PAGE, 2 * PAGE, PAGE);
	log_transfer(_metadata, self, FILL, 1, 35 * PAGE + 7, 10);
	for (i = 50; i; i -= 2)
		expect_report(_metadata, self, 1, i * PAGE, 2 * PAGE, 2 * PAGE);
}

TEST_F(log, failed_page_is_not_logged)
{
	struct mock *m = &self->m;
	unsigned int i;

	ASSERT_EQ(0, mig_dma_unmap(&m->dev, self->windows[1], WINDOW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, self->windows[1], self->mem, 20 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, self->windows[1] + 21 * PAGE, self->mem,
				 WINDOW - 21 * PAGE, RW));
	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	EXPECT_TRUE(log_transfer(_metadata, self, FILL, 1, 10 * PAGE + 3, 15 * PAGE));
	EXPECT_TRUE(log_transfer(_metadata, self, FILL, 1, 20 * PAGE + 3, 15 * PAGE));
	EXPECT_TRUE(log_transfer(_metadata, self, FILL, READ_ONLY, 0, 15 * PAGE));
	/* READ and CHURN do not write to user memory. */
	log_transfer(_metadata, self, READ, 0, 0, 8 * PAGE);
	log_transfer(_metadata, self, CHURN, 0, 0, 8 * PAGE);
	for (i = 0; i < 10; i++) {
		EXPECT_EQ(0, self->truth[1][i] | self->truth[1][i + 20])
			STEP("have unlogged pages to compare with");
	}
	for (i = 0; i < WINDOWS; i++)
		expect_report(_metadata, self, i, 0, WINDOW, PAGE);
}

/* A copy that faults may have written part of the page. */
TEST_F(log, faulting_page_is_logged)
{
	NEED_FAULTS(&self->m);
	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	ASSERT_EQ(0, mprotect(self->mem + 12 * PAGE, PAGE, PROT_NONE));
	EXPECT_TRUE(log_transfer(_metadata, self, FILL, 1, 10 * PAGE + 3, 5 * PAGE));
	EXPECT_TRUE(self->truth[1][11])
		STEP("write the page before it");
	wrote(self, 1, 12 * PAGE, PAGE);
	expect_report(_metadata, self, 1, 0, WINDOW, PAGE);
}

/* ---- Memory of the log ---- */

#define AREA_PAGES	4096U		/* one allocation of the log covers this many */
#define AREA		(AREA_PAGES * PAGE)
#define AREAS		8192ULL		/* the maximum number of allocations */
/* Upper bound in bytes. With KASAN there are red zones, and freed memory is kept. */
#define AREA_COST	(mig_patience() > 1 ? 4 * 640 : 640)
#define FAR_APART	(1ULL << 40)	/* outside of the windows */
#define WRITES		20000U

static __u64 kernel_memory(struct __test_metadata *_metadata)
{
	unsigned long long kib = 0;
	char line[128];
	FILE *file = fopen("/proc/meminfo", "r");

	ASSERT_NE(NULL, file);
	while (fgets(line, sizeof(line), file) &&
	       sscanf(line, "SUnreclaim: %llu kB", &kib) != 1)
		;
	fclose(file);
	ASSERT_NE(0ULL, kib);
	return kib << 10;
}

/* The number of bits in a REPORT of these areas; counts the first of each in @firsts. */
static __u64 report_areas(struct __test_metadata *_metadata, log_data *self,
			  __u64 first, __u64 nr, __u64 *firsts)
{
	static __u64 bitmap[DESCS * AREA_PAGES / 64];
	__u64 i, bits = 0;

	memset(bitmap, 0, sizeof(bitmap));
	ASSERT_EQ(0, mig_log_report(&self->m.dev, FAR_APART + first * AREA, nr * AREA, PAGE,
				    bitmap));
	for (i = 0; i < ARRAY_SIZE(bitmap); i++)
		bits += __builtin_popcountll(bitmap[i]);
	for (i = 0; i < nr; i++)
		*firsts += bitmap[i * AREA_PAGES / 64] & 1;
	return bits;
}

/*
 * The device writes a byte to each of @nr areas. The client has one page for all of
 * them, and maps it at one address after the other. Returns the number of reported
 * areas.
 */
static __u64 write_areas(struct __test_metadata *_metadata, log_data *self, __u64 nr,
			 bool report)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .len = 1, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u64 at, iova, reported = 0;
	unsigned int n;

	for (at = 0; at < nr; at += DESCS) {
		for (n = 0; n < DESCS; n++) {
			iova = FAR_APART + (at + n) * AREA;
			ASSERT_EQ(0, mig_dma_map(&m->dev, iova, self->mem, PAGE, RW));
			d.iova = iova;
			dma_set(_metadata, m, n, &d);
			set32(m, DMA_DOORBELL, n);
		}
		for (n = 0; n < DESCS; n++) {
			d = dma_wait(_metadata, m, n);
			ASSERT_EQ(VFIO_MOCK_DMA_COMPLETE, (int)d.status);
			iova = FAR_APART + (at + n) * AREA;
			ASSERT_EQ(0, mig_dma_unmap(&m->dev, iova, PAGE));
		}
		if (report)
			report_areas(_metadata, self, at, DESCS, &reported);
	}
	return reported;
}

TEST_F_TIMEOUT(log, reported_writes_free_memory, 600)
{
	__u64 before, after;

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	write_areas(_metadata, self, DESCS, true);
	before = kernel_memory(_metadata);
	EXPECT_EQ((__u64)WRITES, write_areas(_metadata, self, WRITES, true));
	after = kernel_memory(_metadata);
	EXPECT_GT(before + WRITES * AREA_COST / 8, after)
		PROMISE("%u reported writes use no kernel memory: %lld bytes",
			WRITES, (long long)(after - before));
}

TEST_F_TIMEOUT(log, unreported_writes_are_bounded, 600)
{
	__u64 before, after, at, firsts = 0, again = 0, bits = 0;

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	write_areas(_metadata, self, DESCS, true);
	before = kernel_memory(_metadata);
	write_areas(_metadata, self, WRITES, false);
	after = kernel_memory(_metadata);
	EXPECT_GT(before + (AREAS + WRITES / 8) * AREA_COST, after)
		PROMISE("%u writes use at most the memory for %llu areas: %lld bytes",
			WRITES, AREAS, (long long)(after - before));
	for (at = 0; at < WRITES; at += DESCS)
		bits += report_areas(_metadata, self, at, DESCS, &firsts);
	EXPECT_EQ((__u64)WRITES, firsts)
		PROMISE("all of %u writes are in the log", WRITES);
	EXPECT_LE((__u64)WRITES, bits);
	bits = 0;
	for (at = 0; at < WRITES; at += DESCS)
		bits += report_areas(_metadata, self, at, DESCS, &again);
	EXPECT_EQ(0ULL, bits)
		PROMISE("a log without room converges: nothing is reported twice");
}

TEST_F(log, ends_with_close)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_PRE_COPY, MIG_STOP, MIG_STOP_COPY,
		MIG_RESUMING,
	};
	struct mock *m = &self->m;
	unsigned int i;

	log_start(_metadata, self, self->each_window, ARRAY_SIZE(self->each_window), PAGE);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		log_transfer(_metadata, self, FILL, i % 3, 5 * PAGE, 2 * PAGE);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		expect_report(_metadata, self, i % 3, 0, WINDOW, PAGE);
		if (states[i] == MIG_RESUMING) {
			ASSERT_EQ(0, mig_reset(&m->dev))
				STEP("reset the device");
		} else {
			move_on(_metadata, &m->dev, MIG_RUNNING);
		}
		log_transfer(_metadata, self, FILL, i % 3, 15 * PAGE + 1, 2 * PAGE);
		ASSERT_EQ(0, mig_reset(&m->dev));
		expect_report(_metadata, self, i % 3, 0, WINDOW, PAGE);
	}
	log_transfer(_metadata, self, FILL, 0, 0, PAGE);
	ASSERT_EQ(0, mig_log_stop(&m->dev));
	log_transfer(_metadata, self, FILL, 0, PAGE, PAGE);
	log_start(_metadata, self, self->each_window, ARRAY_SIZE(self->each_window), PAGE);
	expect_report(_metadata, self, 0, 0, WINDOW, PAGE);

	log_transfer(_metadata, self, FILL, 0, 0, PAGE);
	mig_close_device(&m->dev);
	ASSERT_EQ(0, mig_reopen_device(&m->dev));
	if (variant->backend == MIG_IOMMUFD) {
		ASSERT_EQ(0, mig_dma_map(&m->dev, 0, self->mem, WINDOW, RW))
			STEP("map memory again");
	}
	EXPECT_EQ(-EINVAL, mig_log_report(&m->dev, 0, WINDOW, PAGE, (__u64 *)self->mem))
		PROMISE("close stops the log");
	log_start(_metadata, self, self->each_window, ARRAY_SIZE(self->each_window), PAGE);
	expect_report(_metadata, self, 0, 0, WINDOW, PAGE);
	log_transfer(_metadata, self, FILL, 0, 7 * PAGE, PAGE);
	expect_report(_metadata, self, 0, 0, WINDOW, PAGE);
}

/*
 * The core does not pass errors of the bitmap on to the driver, so that the content
 * of the log is lost; but logging continues. The core (7.3) does not pass them on to the
 * client either; with the option fixed, it does.
 */
TEST_F(log, bad_bitmap_leaves_log_usable)
{
	__u8 *gone = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct mock *m = &self->m;
	unsigned int i;
	int ret;
	__u64 *bad[] = { NULL, (void *)8, (void *)-PAGE, (void *)gone };

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		log_transfer(_metadata, self, FILL, 0, 0, WINDOW);
		ret = mig_log_report(&m->dev, 0, WINDOW, PAGE, bad[i]);
		if (mig_option("fixed")) {
			EXPECT_EQ(-EFAULT, ret)
				PROMISE("a report whose bitmap cannot be written fails");
		}
		memset(self->truth, 0, sizeof(self->truth));
	}
	/* Empties the log; from here on nothing is lost. */
	mig_log_report(&m->dev, 0, WINDOW, PAGE, (__u64 *)self->mem);
	log_random(_metadata, self, 50);
}

/* The minimum page size of a REPORT, independent of the kernel's. */
#define REPORT_MIN	4096

/* Invalid reports. */
TEST_F(log, report_arguments)
{
	struct mock *m = &self->m;
	__u64 bitmap[64] = {}, i;

	log_start(_metadata, self, self->like_qemu, ARRAY_SIZE(self->like_qemu), PAGE);
	log_transfer(_metadata, self, FILL, 0, 0, 3 * PAGE);
	EXPECT_EQ(-EINVAL, mig_log_report(&m->dev, 0, WINDOW, REPORT_MIN / 2, bitmap));
	EXPECT_EQ(-EINVAL, mig_log_report(&m->dev, 0, WINDOW, 0, bitmap));
	EXPECT_EQ(-EINVAL, mig_log_report(&m->dev, 0, WINDOW, 3 * PAGE, bitmap));
	EXPECT_EQ(-EOVERFLOW, mig_log_report(&m->dev, ~0ULL - PAGE + 1, PAGE, PAGE, bitmap));
	for (i = 0; i < ARRAY_SIZE(bitmap); i++) {
		EXPECT_EQ(0U, bitmap[i])
			PROMISE("a refused REPORT reports nothing");
	}
	expect_report(_metadata, self, 0, 0, WINDOW, PAGE);

	/* No page of this range is logged, or the range is outside of the log. */
	expect_report(_metadata, self, 2, 0, WINDOW, PAGE);
	ASSERT_EQ(0, mig_log_stop(&m->dev));
	log_start(_metadata, self, self->each_window, 1, PAGE);
	log_transfer(_metadata, self, FILL, 0, 0, WINDOW);
	expect_report(_metadata, self, 0, 0, WINDOW, PAGE);
	EXPECT_EQ(0, mig_log_report(&m->dev, 1ULL << 62, WINDOW, PAGE, bitmap));
	for (i = 0; i < ARRAY_SIZE(bitmap); i++) {
		EXPECT_EQ(0U, bitmap[i])
			PROMISE("no page outside of the logged range is reported");
	}
}

MIG_HARNESS_MAIN(mock_options)
