// SPDX-License-Identifier: GPL-2.0
/* RESUMING: complete, incomplete and damaged images. */

TEST_F_TIMEOUT(device, image_loads_in_any_chunks, 120)
{
	const size_t page = mig_page_size(), chunks[] = { 0, 7, page - 1, page, 1 << 20, 1 };
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, again = {};
	unsigned int i;

	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < ARRAY_SIZE(chunks); i++) {
		/* For a large image a system call for each byte takes too long. */
		if (chunks[i] && image.len / chunks[i] > (1 << 18))
			continue;
		load_and_run(_metadata, to, &image, chunks[i]);
	}
	/* The target must be a valid source. */
	take_image(_metadata, to, &again);
	load_and_run(_metadata, &self->dev, &again, 0);
}

/* A reset device is a device, too. */
TEST_F(device, image_of_reset_device_loads)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/*
 * Writes @len bytes of an invalid image and requests STOP. Returns whether this
 * failed, and checks that a failure keeps the state.
 */
static bool offer(struct __test_metadata *_metadata, const struct mig_device *dev,
		  const void *data, size_t len)
{
	int fd, written, ret;
	__u32 state;

	fd = go(_metadata, dev, MIG_RESUMING);
	written = mig_load(fd, data, len, 0, NULL);
	ret = mig_set_state(dev, MIG_STOP, NULL);
	ASSERT_EQ(0, mig_get_state(dev, &state));
	if (written) {
		EXPECT_NE(0, ret)
			PROMISE("data after a failed write() (%s) is not part of the device state",
				strerror(-written));
	}
	if (ret) {
		EXPECT_TRUE(state == MIG_RESUMING || state == MIG_ERROR)
			PROMISE("after a failed RESUMING -> STOP the state is RESUMING or ERROR, not %s",
				mig_state_name(state));
		EXPECT_NE(0, mig_set_state(dev, MIG_RUNNING, NULL))
			PROMISE("a device with refused data does not run");
		ASSERT_EQ(0, mig_reset(dev))
			PROMISE("to abort a RESUMING session the device must be reset");
		expect_state(_metadata, dev, MIG_RUNNING, "after a reset that ends a refused load");
	}
	close(fd);
	return ret != 0;
}

/* After each refusal a good image loads; large images are loaded only once. */
static void load_after_refusal(struct __test_metadata *_metadata,
			       const struct mig_device *dev, const struct mig_stream *image)
{
	if (image->len <= 1 << 20)
		load_and_run(_metadata, dev, image, 0);
}

TEST_F_TIMEOUT(device, incomplete_image_is_refused, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t all, i, at;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);

	/* Each length of a small image; for a large one the shortest and a sample. */
	all = image.len <= SMALL_IMAGE ? image.len : mig_times(64);
	if (all > image.len)
		all = image.len;
	for (i = 0; i < all + mig_times(16) + 1; i++) {
		at = i;
		if (i >= all)
			at = (image.len - 1) / (mig_times(16)) * (i - all);
		if (i == all + mig_times(16))
			at = image.len - 1;
		EXPECT_TRUE(offer(_metadata, to, image.data, at))
			PROMISE("incomplete user data must fail SET_STATE (%zu of %zu bytes)",
				at, image.len);
		go_home(_metadata, to);
		load_after_refusal(_metadata, to, &image);
	}
	load_and_run(_metadata, to, &image, 0);
}

/* Whether a change is an error depends on the device, which must survive it. */
TEST_F_TIMEOUT(device, survives_damaged_image, 120)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {}, bad = {};
	unsigned int refused = 0;
	size_t i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_stream_copy(&bad, &image));
	to = open_target(_metadata, &self->dev, &second);
	for (i = 0; i < mig_times(64) && i < image.len; i++) {
		bad.data[i] ^= 0xff;
		refused += offer(_metadata, to, bad.data, bad.len);
		bad.data[i] = image.data[i];
		ASSERT_EQ(0, mig_reset(to));
		expect_state(_metadata, to, MIG_RUNNING, "after RESET of a damaged image");
		load_after_refusal(_metadata, to, &image);
	}
	EXPECT_NE(0U, refused)
		PROMISE("invalid user data must fail SET_STATE (%zu damaged bytes went unnoticed)",
			i);
	load_and_run(_metadata, to, &image, 0);
}

TEST_F(device, more_data_does_not_repair_refused_image)
{
	struct mig_stream image = {};
	int fd;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	fd = go(_metadata, &self->dev, MIG_RESUMING);
	EXPECT_EQ(0, mig_load(fd, image.data, image.len / 2, 0, NULL));
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_STOP, NULL));
	/* The session may have ended or not; the device must not run on half an image. */
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_RUNNING, NULL))
		PROMISE("a device with refused data does not run");
	ASSERT_EQ(0, mig_reset(&self->dev));
	EXPECT_TRUE(mig_fd_is_dead(fd))
		PROMISE("RESET ends the RESUMING session");
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, bytes_after_the_end_are_refused)
{
	struct mig_stream image = {};
	size_t extra[3];
	int fd, written, ret;
	unsigned int i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	extra[0] = 1;
	extra[1] = 8;
	extra[2] = image.len;	/* the whole image twice */
	for (i = 0; i < ARRAY_SIZE(extra); i++) {
		fd = go(_metadata, &self->dev, MIG_RESUMING);
		load_all(_metadata, fd, &image);
		written = mig_load(fd, image.data, extra[i], 0, NULL);
		ret = mig_set_state(&self->dev, MIG_STOP, NULL);
		EXPECT_TRUE(written || ret)
			PROMISE("an image followed by %zu bytes is invalid: write() or SET_STATE must fail",
				extra[i]);
		ASSERT_EQ(0, mig_reset(&self->dev));
		close(fd);
	}
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, good_image_after_an_error_is_refused)
{
	struct mig_stream image = {}, bad = {};
	int fd, written;
	size_t i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_stream_copy(&bad, &image));
	for (i = 0; i < 64 && i < bad.len; i++)
		bad.data[i] ^= 0xff;
	fd = go(_metadata, &self->dev, MIG_RESUMING);
	written = mig_load(fd, bad.data, bad.len, 0, NULL);
	mig_load(fd, image.data, image.len, 0, NULL);
	EXPECT_NE(0, mig_set_state(&self->dev, MIG_STOP, NULL))
		PROMISE("a good image does not repair a session with invalid data (write(): %s)",
			written ? strerror(-written) : "nothing");
	ASSERT_EQ(0, mig_reset(&self->dev));
	close(fd);
	load_and_run(_metadata, &self->dev, &image, 0);
}

TEST_F(device, image_of_incompatible_device_is_refused)
{
	const char *path = mig_option("other");
	struct mig_device other = { .fd = -1 };
	struct mig_stream image = {}, foreign = {};

	NEED_RESET(&self->dev);
	if (!path)
		SKIP(return, "no --other");
	ASSERT_EQ(0, mig_open(&other, path, self->dev.backend))
		STEP("open the other device: %s", other.why);
	take_image(_metadata, &self->dev, &image);
	take_image(_metadata, &other, &foreign);
	EXPECT_TRUE(offer(_metadata, &self->dev, foreign.data, foreign.len))
		PROMISE("the image of an incompatible device is invalid: SET_STATE must fail");
	go_home(_metadata, &self->dev);
	load_and_run(_metadata, &self->dev, &image, 0);
	EXPECT_TRUE(offer(_metadata, &other, image.data, image.len))
		PROMISE("the image of an incompatible device is invalid: SET_STATE must fail");
	go_home(_metadata, &other);
	load_and_run(_metadata, &other, &foreign, 0);
}
