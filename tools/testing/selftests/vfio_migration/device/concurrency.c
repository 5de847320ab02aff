// SPDX-License-Identifier: GPL-2.0
/* Calls at the same time, and calls behind one that is stalled. */

TEST_F_TIMEOUT(device, hammered_by_eight_threads, 300)
{
	struct mig_stream image = {};
	unsigned int r;
	char why[128];

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (r = 0; r < mig_times(1); r++) {
		ASSERT_EQ(0, mig_hammer(&self->dev, &image, &self->scratch, 400, r,
					why, sizeof(why)));
		EXPECT_STREQ("", why)
			PROMISE("a concurrent call succeeds or fails with a valid error");
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		expect_state(_metadata, &self->dev, MIG_RUNNING, "after close and open");
		ASSERT_EQ(0, mig_reset(&self->dev));
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

/* A read() or write() that is stalled by a page fault of its buffer. */
struct stalled {
	struct mig_stall stall;
	pthread_t thread;
	int fd;
	bool writes;
	size_t len;
	ssize_t ret;
};

static void *stalled_main(void *arg)
{
	struct stalled *s = arg;

	s->ret = s->writes ? write(s->fd, s->stall.page, s->len) :
			     read(s->fd, s->stall.page, s->len);
	if (s->ret < 0)
		s->ret = -errno;
	return NULL;
}

enum how { BY_SET_STATE, BY_RESET, BY_CLOSE, BY_REMOVAL, HOW_NR };

static const char *const how_name[] = { "SET_STATE", "RESET", "close", "removal" };

/* A call that must not wait for the stalled one. */
struct ender {
	pthread_t thread;
	struct guest *guest;
	enum how how;
	int ret;
};

static void *ender_main(void *arg)
{
	struct ender *e = arg;

	switch (e->how) {
	case BY_SET_STATE:
		mig_set_state(&e->guest->dev, MIG_RUNNING, NULL);
		break;
	case BY_RESET:
		e->ret = mig_reset(&e->guest->dev);
		break;
	case BY_CLOSE:
		mig_close_device(&e->guest->dev);
		break;
	default:
		mig_close(&e->guest->dev);
		e->ret = write_word(e->guest->remove, "1");
		break;
	}
	return NULL;
}

/* While one reader is stalled, another reads up to the end. */
TEST_F_TIMEOUT(device, reader_behind_stalled_reader_gets_next_bytes, 60)
{
	struct mig_pieces first = {};
	struct sharer behind = {};
	size_t len[2];
	struct stalled ahead = {};
	struct mig_stream image = {};
	__u8 *content;
	int ret;

	if (!save_steady(_metadata, &self->dev, &image))
		SKIP(return, "two images of the stopped device differ");
	ret = mig_stall_start(&ahead.stall);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "no userfaultfd that stalls the kernel is available");
	ASSERT_EQ(0, ret);
	content = calloc(1, ahead.stall.len);
	ASSERT_NE(NULL, content);

	/* In the middle of the stream, inside of a block if the device uses blocks. */
	ahead.fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	while (first.data.len < image.len / 2)
		ASSERT_LT(0, mig_read(ahead.fd, &first.data, image.len / 2 - first.data.len));
	len[0] = first.data.len;
	ahead.len = image.len / 3;
	if (ahead.len > ahead.stall.len)
		ahead.len = ahead.stall.len;
	ASSERT_EQ(0, pthread_create(&ahead.thread, NULL, stalled_main, &ahead));
	ASSERT_EQ(0, mig_stall_wait(&ahead.stall));
	behind.fd = ahead.fd;
	behind.chunk = image.len / 10 + 1;
	ASSERT_EQ(0, pthread_create(&behind.thread, NULL, reader_main, &behind));
	/* It waits for the stalled reader, or has reached the end. */
	wait_until_asleep(&behind.poller);
	ASSERT_EQ(0, mig_stall_end(&ahead.stall, content));
	ASSERT_TRUE(joined(ahead.thread));
	ASSERT_TRUE(joined(behind.thread));
	ASSERT_LT(0, ahead.ret)
		STEP("read with a fault: %s", strerror(-ahead.ret));
	EXPECT_EQ(0, behind.err)
		PROMISE("the second reader reaches the permanent end: %s",
			strerror(-behind.err));

	ASSERT_EQ(0, mig_stream_add(&first.data, ahead.stall.page, ahead.ret));
	len[1] = ahead.ret;
	first.len = len;
	first.nr = 2;
	EXPECT_EQ(1, mig_pieces_make_up(&image, &first, &behind.got))
		PROMISE("each of the parallel readers gets its bytes in order (%zd and %zu of %zu)",
			ahead.ret, behind.got.data.len, image.len);
}

static void check_stalled(struct __test_metadata *_metadata, struct guest *g,
			  __u32 from, enum how how, const struct mig_stream *image)
{
	struct ender ender = { .guest = g, .how = how };
	struct stalled s = { .writes = from == MIG_RESUMING };
	bool waited_for;
	__u8 *content;
	int ret;

	ret = mig_stall_start(&s.stall);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "no userfaultfd that stalls the kernel is available");
	ASSERT_EQ(0, ret)
		STEP("create a page that stalls: %s", strerror(-ret));
	content = calloc(1, s.stall.len);
	ASSERT_NE(NULL, content);
	s.len = image->len < s.stall.len ? image->len : s.stall.len;
	memcpy(content, image->data, s.len);

	s.fd = go(_metadata, &g->dev, from);
	ASSERT_EQ(0, pthread_create(&s.thread, NULL, stalled_main, &s));
	ASSERT_EQ(0, mig_stall_wait(&s.stall))
		STEP("stall a %s in %s", s.writes ? "writer" : "reader", mig_state_name(from));

	ASSERT_EQ(0, pthread_create(&ender.thread, NULL, ender_main, &ender));
	waited_for = !joined(ender.thread);
	EXPECT_FALSE(waited_for)
		PROMISE("a %s that is stalled in %s does not block %s",
			s.writes ? "writer" : "reader", mig_state_name(from), how_name[how]);
	EXPECT_EQ(0, ender.ret)
		PROMISE("%s succeeds during a stalled %s", how_name[how],
			s.writes ? "writer" : "reader");

	ASSERT_EQ(0, mig_stall_end(&s.stall, content));
	ASSERT_TRUE(joined(s.thread))
		PROMISE("a stalled call ends with its fault");
	if (waited_for)
		pthread_join(ender.thread, NULL);
	EXPECT_TRUE(s.ret == -ENODEV || s.ret == -EFAULT || s.ret > 0)
		PROMISE("a call whose session has ended returns ENODEV or its bytes so far (%zd)",
			s.ret);
	close(s.fd);
	free(content);
	mig_stall_free(&s.stall);
	/* The next call to end it would wait as well. */
	ASSERT_FALSE(waited_for);
}

static void check_all_stalls(struct __test_metadata *_metadata, struct mig_device *dev,
			     __u32 from)
{
	struct mig_stream image = {};
	struct guest self = { .dev = *dev }, guest;
	enum how how;
	int ret;

	take_image(_metadata, dev, &image);
	for (how = 0; how < HOW_NR; how++) {
		if (how == BY_RESET && mig_reset(dev))
			continue;
		if (how == BY_REMOVAL) {
			ret = create_guest(dev, &guest);
			/* Only mediated devices can be created and removed. */
			if (ret == -EOPNOTSUPP)
				break;
			ASSERT_EQ(0, ret)
				STEP("create and open another device: %s", guest.dev.why);
			check_stalled(_metadata, &guest, from, how, &image);
			break;
		}
		check_stalled(_metadata, &self, from, how, &image);
		*dev = self.dev;
		if (how == BY_CLOSE) {
			ASSERT_EQ(0, mig_reopen_device(dev))
				STEP("reopen the device: %s", dev->why);
		}
		go_home(_metadata, dev);
		self.dev = *dev;
	}
	mig_stream_free(&image);
}

TEST_F_TIMEOUT(device, stalled_reader_blocks_no_call_in_pre_copy, 120)
{
	NEED_PRE_COPY(&self->dev);
	check_all_stalls(_metadata, &self->dev, MIG_PRE_COPY);
}

TEST_F_TIMEOUT(device, stalled_reader_blocks_no_call_in_stop_copy, 120)
{
	check_all_stalls(_metadata, &self->dev, MIG_STOP_COPY);
}

TEST_F_TIMEOUT(device, stalled_writer_blocks_no_call, 120)
{
	NEED_RESET(&self->dev);
	check_all_stalls(_metadata, &self->dev, MIG_RESUMING);
}
