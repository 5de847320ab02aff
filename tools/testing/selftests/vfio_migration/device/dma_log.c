// SPDX-License-Identifier: GPL-2.0
/* DMA logging. */

/* A length of as many pages as the bits in a bitmap of 4 words. */
#define LOG_LEN		(256 * mig_page_size())

static int start_log_of(const struct mig_device *dev, __u64 iova, __u64 length,
			__u64 *page_size)
{
	struct vfio_device_feature_dma_logging_range range = {
		.iova = iova, .length = length,
	};

	return mig_log_start(dev, page_size, &range, 1);
}

/* Starts logging of [0, LOG_LEN), if possible in kernel pages. */
static int start_log(const struct mig_device *dev)
{
	__u64 page_size = mig_page_size();

	return start_log_of(dev, 0, LOG_LEN, &page_size);
}

/* Reports [0, LOG_LEN), one bit for each kernel page. */
static int report_log(const struct mig_device *dev, __u64 *bitmap)
{
	return mig_log_report(dev, 0, LOG_LEN, mig_page_size(), bitmap);
}

#define NEED_LOGGING(dev) do {							\
	if (mig_feature(dev, MIG_PROBE | MIG_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, \
			NULL, 0))						\
		SKIP(return, "the device does not have DMA logging");		\
} while (0)

TEST_F(device, dma_logging_starts_once)
{
	__u64 bitmap[4] = {}, page_size = mig_page_size();

	NEED_LOGGING(&self->dev);
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	ASSERT_EQ(0, start_log_of(&self->dev, 0, LOG_LEN, &page_size));
	EXPECT_NE(0U, page_size)
		PROMISE("on output the device will return the page size it selected");
	EXPECT_EQ(0U, page_size & (page_size - 1))
		PROMISE("the page size selected by the device is a power of two");
	EXPECT_NE(0, start_log(&self->dev))
		PROMISE("a single START can be issued; another START is refused until STOP");
	EXPECT_EQ(0, report_log(&self->dev, bitmap))
		PROMISE("a refused second START does not end logging");
	EXPECT_EQ(0, mig_log_stop(&self->dev));
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("if DMA logging is not enabled, an error will be returned by REPORT");
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("after STOP logging can start again");
}

TEST_F(device, dma_logging_page_sizes)
{
	const __u64 page = mig_page_size();
	const __u64 sizes[] = {
		0, 1, 3, page - 1, 3 * page, page, 16 * page, 256 * page,
	};
	unsigned int i;
	__u64 size;
	int ret;

	NEED_LOGGING(&self->dev);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		size = sizes[i];
		/* The core refuses 0 for all ranges but empty ones. */
		ret = start_log_of(&self->dev, 0, size ? LOG_LEN : 0, &size);
		if (ret) {
			EXPECT_TRUE(!sizes[i] || sizes[i] & (sizes[i] - 1))
				PROMISE("page_size %llu is a hint; the driver selects a supported one (%s)",
					sizes[i], strerror(-ret));
			continue;
		}
		EXPECT_TRUE(size && !(size & (size - 1)))
			PROMISE("for page_size %llu, the device selected the invalid size %llu",
				sizes[i], size);
		EXPECT_EQ(0, mig_log_stop(&self->dev));
	}
}

TEST_F(device, dma_logging_report)
{
	__u64 bitmap[4] = { 0x8000000000000001ULL, 0, 0, 1ULL << 63 };
	const __u64 page = mig_page_size();

	NEED_LOGGING(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));
	EXPECT_EQ(0, report_log(&self->dev, bitmap));
	EXPECT_EQ(0x8000000000000001ULL, bitmap[0] & 0x8000000000000001ULL)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_EQ(1ULL << 63, bitmap[3] & 1ULL << 63)
		PROMISE("LOGGING_REPORT will only set bits in the bitmap and never clear any");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, LOG_LEN, 0, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, 0, LOG_LEN, 3 * page, bitmap))
		PROMISE("the page_size of REPORT is a power of two");
	EXPECT_NE(0, mig_log_report(&self->dev, -page, LOG_LEN, page, bitmap))
		PROMISE("the range of REPORT does not wrap");
	EXPECT_EQ(0, mig_log_report(&self->dev, 0, LOG_LEN, 16 * page, bitmap))
		PROMISE("page_size does not have to match the value given to START");
}

TEST_F(device, dma_logging_ranges)
{
	__u64 page = mig_page_size(), page_size = page;
	struct vfio_device_feature_dma_logging_range two[2] = {
		{ .iova = 0, .length = 2 * page }, { .iova = page, .length = 2 * page },
	};

	NEED_LOGGING(&self->dev);
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 0))
		PROMISE("START needs a range");
	EXPECT_EQ(-EINVAL, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("ranges do not overlap");
	EXPECT_NE(0, start_log_of(&self->dev, -page, 2 * page, &page_size))
		PROMISE("a range does not wrap");
	EXPECT_EQ(-EFAULT, mig_log_start(&self->dev, &page_size, (void *)8, 1));
	two[1].iova = 16 * page;
	EXPECT_EQ(0, mig_log_start(&self->dev, &page_size, two, 2))
		PROMISE("refused STARTs leave logging stopped");
}

TEST_F(device, dma_logging_stop_without_start_is_harmless)
{
	__u64 bitmap[4] = {};
	__u32 state;

	NEED_LOGGING(&self->dev);
	mig_log_stop(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));
	ASSERT_EQ(0, mig_log_stop(&self->dev));
	mig_log_stop(&self->dev);
	ASSERT_EQ(0, start_log(&self->dev));

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state) || state == MIG_RESUMING)
			continue;
		if (mig_set_state(&self->dev, state, NULL))
			continue;
		EXPECT_EQ(0, report_log(&self->dev, bitmap))
			PROMISE("this API is not connected to MIG_DEVICE_STATE (in %s)",
				mig_state_name(state));
	}

	/* Logging belongs to this opening of the device. */
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev));
	EXPECT_NE(0, report_log(&self->dev, bitmap))
		PROMISE("logging does not continue for the next opener");
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("the logging of an opener does not prevent that of the next one");
}

/* The core accepts this, but no device can log it: the device may refuse it. */
TEST_F(device, dma_logging_empty_range)
{
	const __u64 page = mig_page_size();
	const __u64 iovas[] = { 0, 16 * page, -16 * page };
	__u64 bitmap[4] = {}, page_size;
	unsigned int i;

	NEED_LOGGING(&self->dev);
	for (i = 0; i < ARRAY_SIZE(iovas); i++) {
		page_size = page;
		if (!start_log_of(&self->dev, iovas[i], 0, &page_size)) {
			report_log(&self->dev, bitmap);
			EXPECT_EQ(0, mig_log_stop(&self->dev));
		}
	}
	EXPECT_EQ(0, start_log(&self->dev))
		PROMISE("a START of an empty range leaves logging usable");
	mig_log_report(&self->dev, 0, 0, page, bitmap);
	EXPECT_EQ(0, report_log(&self->dev, bitmap))
		PROMISE("a REPORT of an empty range leaves logging usable");
}

TEST_F(device, dma_logging_bad_bitmap)
{
	__u64 bitmap[4] = {};
	char *hole = page_before_a_hole();
	unsigned int i;
	int ret;

	NEED_LOGGING(&self->dev);
	ASSERT_NE(NULL, hole);
	hole += mig_page_size();
	ASSERT_EQ(0, start_log(&self->dev));
	for (i = 0; i < 3; i++) {
		static const char *const what[] = {
			"NULL", "an unmapped address", "a kernel address"
		};
		__u64 *const where[] = { NULL, (__u64 *)hole, (__u64 *)-mig_page_size() };

		ret = report_log(&self->dev, where[i]);
		/* Without a page to report nothing is stored. */
		EXPECT_TRUE(!ret || ret == -EFAULT)
			PROMISE("a bitmap at %s is EFAULT, or not accessed: %s", what[i],
				strerror(-ret));
	}
	ret = report_log(&self->dev, bitmap);
	EXPECT_EQ(0, ret)
		PROMISE("a REPORT works after one that failed: %s", strerror(-ret));
	EXPECT_EQ(0, mig_log_stop(&self->dev));
}

/* The log of the memory that the device copies from and to. */
struct copied_log {
	__u64 bitmap[64];
	__u64 pages;
};

static bool is_logged(const struct copied_log *log, __u64 page)
{
	return log->bitmap[page / 64] >> page % 64 & 1;
}

static void start_copied_log(struct __test_metadata *_metadata,
			     const struct mig_device *dev, const struct copied *c,
			     struct copied_log *log)
{
	__u64 page_size = mig_page_size();

	log->pages = copied_size(c) / mig_page_size();
	ASSERT_GE(sizeof(log->bitmap) * 8, log->pages);
	ASSERT_EQ(0, start_log_of(dev, COPY_IOVA, copied_size(c), &page_size));
}

static void report_copied_log(struct __test_metadata *_metadata,
			      const struct mig_device *dev, const struct copied *c,
			      struct copied_log *log)
{
	memset(log->bitmap, 0, sizeof(log->bitmap));
	ASSERT_EQ(0, mig_log_report(dev, COPY_IOVA, copied_size(c), mig_page_size(),
				    log->bitmap));
}

/* More pages may be in it than the device has written. */
TEST_F(device, dma_logging_reports_written_pages)
{
	struct copied_log log;
	struct copied c;
	__u64 page, i;

	NEED_LOGGING(&self->dev);
	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	start_copied_log(_metadata, &self->dev, &c, &log);
	for (i = 0; i < 2; i++) {
		start_copy(_metadata, &self->dev, &c, false, -1);
		wait_for_copy(_metadata, &self->dev, &c, "during logging");
		report_copied_log(_metadata, &self->dev, &c, &log);
		for (page = c.len / mig_page_size(); page < log.pages - 1; page++) {
			EXPECT_TRUE(is_logged(&log, page))
				PROMISE("page %llu, which the device has written, is in the log",
					page);
		}
		report_copied_log(_metadata, &self->dev, &c, &log);
		for (page = 0; page < log.pages; page++) {
			EXPECT_FALSE(is_logged(&log, page))
				PROMISE("during querying the log is cleared for the IOVA range (page %llu)",
					page);
		}
	}
}

/* The purpose of the log: to copy what was written since the last report. */
TEST_F_TIMEOUT(device, copy_by_dma_log_is_complete, 60)
{
	unsigned int rounds = mig_times(40), i;
	struct copied_log log;
	struct copied c;
	__u64 page, at;
	__u8 *copy;

	NEED_LOGGING(&self->dev);
	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	copy = malloc(copied_size(&c));
	ASSERT_NE(NULL, copy);
	start_repeated_copy(_metadata, &self->dev, &c);
	start_copied_log(_metadata, &self->dev, &c, &log);
	memcpy(copy, c.from, copied_size(&c));
	for (i = 0; i <= rounds; i++) {
		renew(&c);
		if (i == rounds)
			ASSERT_EQ(0, mig_set_state(&self->dev, MIG_STOP, NULL));
		report_copied_log(_metadata, &self->dev, &c, &log);
		for (page = c.len / mig_page_size(); page < log.pages; page++) {
			at = page * mig_page_size();
			if (is_logged(&log, page))
				memcpy(copy + at, c.from + at, mig_page_size());
		}
	}
	EXPECT_EQ(0, memcmp(copy + c.len, c.to, c.len))
		PROMISE("a page that the device has written is in the next report");
	free(copy);
}
