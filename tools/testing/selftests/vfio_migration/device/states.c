// SPDX-License-Identifier: GPL-2.0
/* The state machine. */

static void check_move(struct __test_metadata *_metadata,
		       const struct mig_device *dev, const struct mig_stream *image,
		       __u32 from, __u32 to)
{
	bool allowed, wants_fd, lives;
	int old, fd, ret, mode;
	__u32 state;

	old = go(_metadata, dev, from);
	if (from == MIG_RESUMING)
		load_all(_metadata, old, image);

	allowed = mig_fsm_move(dev->flags, from, to, &wants_fd, NULL);
	ret = mig_set_state(dev, to, &fd);
	ASSERT_EQ(0, mig_get_state(dev, &state));

	EXPECT_EQ(allowed ? 0 : -EINVAL, ret)
		PROMISE("%s -> %s (%d) %s", mig_state_name(from), mig_state_name(to),
			to, allowed ? "is a legal transition" :
			"is not permitted and returns an error");
	EXPECT_EQ(allowed ? to : from, state)
		PROMISE("%s -> %s (%d): the device is in %s afterwards",
			mig_state_name(from), mig_state_name(to), to,
			allowed ? "the new state" : "the old state");
	EXPECT_EQ(wants_fd, fd >= 0)
		PROMISE("%s -> %s (%d): a new data_fd is returned %s", mig_state_name(from),
			mig_state_name(to), to, wants_fd ? "back" :
			"only for a new data transfer session");
	if (wants_fd && fd >= 0) {
		mode = fcntl(fd, F_GETFL) & O_ACCMODE;
		EXPECT_EQ(to == MIG_RESUMING ? O_WRONLY : O_RDONLY, mode)
			PROMISE("the data_fd of %s has one direction", mig_state_name(to));
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("%s -> %s: the data_fd of the new session works",
				mig_state_name(from), mig_state_name(to));
	}
	if (old >= 0) {
		lives = !allowed || from == to ||
			(mig_fsm_saving(from) && mig_fsm_saving(to));
		EXPECT_EQ(!lives, mig_fd_is_dead(old))
			PROMISE("%s -> %s (%d) %s the data transfer session",
				mig_state_name(from), mig_state_name(to), to,
				lives ? "does not terminate" : "terminates");
		close(old);
	}
	if (fd >= 0)
		close(fd);
}

TEST_F_TIMEOUT(device, every_transition, 120)
{
	struct mig_stream image = {};
	unsigned int i;
	__u32 from;

	take_image(_metadata, &self->dev, &image);
	for (from = 0; from < MIG_STATE_NR; from++) {
		if (!mig_fsm_exists(self->dev.flags, from))
			continue;
		for (i = 0; i < ARRAY_SIZE(set_state_values); i++)
			check_move(_metadata, &self->dev, &image, from,
				   set_state_values[i]);
	}
}

/* A stream begun in PRE_COPY continues on the same descriptor to its end. */
TEST_F(device, saving_group_shares_one_session)
{
	struct mig_stream image = {};
	struct mig_device second = { .fd = -1 }, *to;
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	EXPECT_LT(0, mig_read(fd, &image, 64))
		PROMISE("in PRE_COPY initial data is available");
	if (self->dev.flags & VFIO_MIGRATION_P2P) {
		move_on(_metadata, &self->dev, MIG_PRE_COPY_P2P);
		move_on(_metadata, &self->dev, MIG_PRE_COPY);
		move_on(_metadata, &self->dev, MIG_PRE_COPY_P2P);
	}
	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}
