// SPDX-License-Identifier: GPL-2.0
/* DMA: the device ends it where it must, and continues afterwards and on the target. */

#define COPY_IOVA	0x10000000ULL
#define PEER_IOVA	0x20000000ULL

/* The time in which DMA or an interrupt that must not happen would be seen. */
#define LOOK_US		20000

#define NEED_COPY(dev) do {							\
	if (!ops || !ops->copy)							\
		SKIP(return, "no --device-ops that can copy");			\
	NEED_RESET(dev);							\
} while (0)

/* Memory of this process, which the device copies. */
struct copied {
	__u8 *from;
	__u8 *to;		/* followed by a page that the device must not write */
	__u64 to_iova;
	__u64 len;
	__u8 value;		/* in @from */
};

static __u64 copied_size(const struct copied *c)
{
	return 2 * c->len + mig_page_size();
}

static void map_copied(struct __test_metadata *_metadata, const struct mig_device *dev,
		       const struct copied *c)
{
	int ret = mig_dma_map(dev, COPY_IOVA, c->from, copied_size(c),
			      MIG_DMA_READ | MIG_DMA_WRITE);

	ASSERT_EQ(0, ret)
		STEP("map memory for DMA: %s", strerror(-ret));
}

static struct copied make_copied(struct __test_metadata *_metadata,
				 const struct mig_device *dev)
{
	__u64 page = mig_page_size();
	struct copied c = { .len = (ops->max_len + page - 1) / page * page };

	c.from = mmap(NULL, copied_size(&c), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, c.from);
	c.to = c.from + c.len;
	c.to_iova = COPY_IOVA + c.len;
	map_copied(_metadata, dev, &c);
	return c;
}

/* Puts new content where the device copies from. */
static void renew(struct copied *c)
{
	memset(c->from, ++c->value, c->len);
}

static void start_copy(struct __test_metadata *_metadata, const struct mig_device *dev,
		       struct copied *c, bool repeat, int vector)
{
	struct mig_copy copy = {
		.from = COPY_IOVA, .to = c->to_iova, .repeat = repeat, .vector = vector,
		.len = c->len < ops->max_len ? c->len : ops->max_len,
	};
	int ret;

	renew(c);
	ret = ops->copy(dev, &copy);
	ASSERT_EQ(0, ret)
		STEP("start a copy: %s", strerror(-ret));
}

static bool is_copied(const struct copied *c)
{
	return !memcmp(c->from, c->to, c->len < ops->max_len ? c->len : ops->max_len);
}

/* Waits for the end of a copy, which must be complete. */
static void wait_for_copy(struct __test_metadata *_metadata, const struct mig_device *dev,
			  const struct copied *c, const char *when)
{
	int status;

	WAIT_FOR((status = ops->copy_status(dev)) != 1, "a copy ends %s", when);
	ASSERT_EQ(0, status)
		PROMISE("a copy succeeds %s: %s", when, strerror(-status));
	EXPECT_TRUE(is_copied(c))
		PROMISE("all bytes are copied %s", when);
}

/* A repeated copy copies new content. */
static void expect_copying(struct __test_metadata *_metadata, struct copied *c,
			   const char *when)
{
	renew(c);
	WAIT_FOR(is_copied(c), "the device does DMA %s", when);
}

/* No content is copied, although a copy is in progress. */
static void expect_no_dma(struct __test_metadata *_metadata, struct copied *c,
			  const char *when)
{
	__u8 *seen = malloc(c->len);
	size_t i;

	ASSERT_NE(NULL, seen);
	memcpy(seen, c->to, c->len);
	renew(c);
	usleep(LOOK_US);
	for (i = 0; i < c->len && seen[i] == c->to[i]; i++)
		;
	EXPECT_EQ(c->len, i)
		PROMISE("the device must not do DMA %s: byte %zu changes", when, i);
	free(seen);
}

static void start_repeated_copy(struct __test_metadata *_metadata,
				const struct mig_device *dev, struct copied *c)
{
	start_copy(_metadata, dev, c, true, -1);
	expect_copying(_metadata, c, "in RUNNING");
}

/* For the messages. */
static const char *in_state(__u32 state)
{
	static char text[64];

	snprintf(text, sizeof(text), "in %s", mig_state_name(state));
	return text;
}

TEST_F(device, copies_memory_by_dma)
{
	struct copied c;
	size_t i;

	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	start_copy(_metadata, &self->dev, &c, false, -1);
	wait_for_copy(_metadata, &self->dev, &c, "in RUNNING");
	expect_no_dma(_metadata, &c, "after the only copy");
	start_repeated_copy(_metadata, &self->dev, &c);
	for (i = ops->max_len; i < c.len + mig_page_size() && !c.to[i]; i++)
		;
	EXPECT_EQ(c.len + mig_page_size(), i)
		PROMISE("the device writes only to the memory of the copy: byte %zu changes", i);
}

TEST_F_TIMEOUT(device, stopped_device_does_no_dma, 60)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {};
	struct copied c;
	unsigned int i;
	int fd;

	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		start_repeated_copy(_metadata, &self->dev, &c);
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], &fd));
		expect_no_dma(_metadata, &c, in_state(states[i]));
		/* The image has the copy in progress. */
		if (states[i] == MIG_STOP_COPY)
			ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
		if (states[i] == MIG_RESUMING) {
			load_all(_metadata, fd, &image);
			expect_no_dma(_metadata, &c, "while it is loaded");
			move_on(_metadata, &self->dev, MIG_STOP);
			expect_no_dma(_metadata, &c, "after it was loaded");
		}
		move_on(_metadata, &self->dev, MIG_RUNNING);
		expect_copying(_metadata, &c, "when it runs again");
		if (fd >= 0)
			close(fd);
		ASSERT_EQ(0, mig_reset(&self->dev));
	}
}

/* In these states, a device that cannot tell peers from memory does no DMA at all. */
TEST_F_TIMEOUT(device, p2p_states_end_dma_to_peers, 60)
{
	static const __u32 states[] = { MIG_RUNNING_P2P, MIG_PRE_COPY_P2P };
	struct mig_scratch *s = &self->scratch;
	struct mig_device second = { .fd = -1 };
	struct copied c;
	unsigned int i;
	void *map;
	int ret;

	NEED_P2P(&self->dev);
	NEED_COPY(&self->dev);
	NEED_SCRATCH(self);
	if (!paths[1])
		SKIP(return, "no TARGET");
	open_target(_metadata, &self->dev, &second);
	MAP_OR_SKIP(&second, s, &map);
	c = make_copied(_metadata, &self->dev);
	c.len = (s->len < c.len ? s->len : c.len) / mig_page_size() * mig_page_size();
	c.to = map;
	c.to_iova = PEER_IOVA;
	ret = mig_dma_map(&self->dev, PEER_IOVA, map, c.len, MIG_DMA_READ | MIG_DMA_WRITE);
	if (ret)
		SKIP(return, "the memory of TARGET cannot be mapped for DMA: %s", strerror(-ret));
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		start_repeated_copy(_metadata, &self->dev, &c);
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], NULL));
		expect_no_dma(_metadata, &c, in_state(states[i]));
		move_on(_metadata, &self->dev, MIG_RUNNING);
		expect_copying(_metadata, &c, "when it may access peers again");
		ASSERT_EQ(0, mig_reset(&self->dev));
	}
	mig_close(&second);
}

TEST_F_TIMEOUT(device, reset_and_close_end_dma, 60)
{
	struct copied c;
	__u32 state;
	int fd;

	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		start_repeated_copy(_metadata, &self->dev, &c);
		ASSERT_EQ(0, mig_set_state(&self->dev, state, &fd));
		ASSERT_EQ(0, mig_reset(&self->dev));
		if (fd >= 0)
			close(fd);
		expect_no_dma(_metadata, &c, "after RESET");

		start_repeated_copy(_metadata, &self->dev, &c);
		ASSERT_EQ(0, mig_set_state(&self->dev, state, &fd));
		mig_close_device(&self->dev);
		if (fd >= 0)
			close(fd);
		expect_no_dma(_metadata, &c, "after close");
		mig_close(&self->dev);
		ASSERT_EQ(0, mig_open(&self->dev, paths[0], variant->backend))
			STEP("open the device again: %s", self->dev.why);
		map_copied(_metadata, &self->dev, &c);
		expect_no_dma(_metadata, &c, "for the next opener");
	}
}

TEST_F_TIMEOUT(device, repeated_copy_goes_on_on_the_target, 60)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct copied c;
	int fd = -1;

	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	to = open_target(_metadata, &self->dev, &second);
	if (to != &self->dev)
		map_copied(_metadata, to, &c);
	start_repeated_copy(_metadata, &self->dev, &c);
	if (self->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		ASSERT_EQ(0, mig_set_state(&self->dev, MIG_PRE_COPY, &fd));
		/* The copy may dirty the state all the time. */
		ASSERT_LT(0, mig_read(fd, &image, 100));
		expect_copying(_metadata, &c, "in PRE_COPY");
	}
	ASSERT_EQ(0, mig_set_state(&self->dev, MIG_STOP_COPY, fd < 0 ? &fd : NULL));
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	close(fd);
	ASSERT_EQ(0, mig_reset(&self->dev));
	expect_no_dma(_metadata, &c, "after RESET of the source");
	load_and_run(_metadata, to, &image, 0);
	expect_copying(_metadata, &c, "on the target");
}
