// SPDX-License-Identifier: GPL-2.0
/* Sessions, reset, close and removal of the device. */

TEST_F(device, old_fd_never_sees_a_new_session)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	unsigned int i;
	int old, fd;

	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		old = go(_metadata, &self->dev, states[i]);
		if (states[i] == MIG_RESUMING)
			load_all(_metadata, old, &image);
		ASSERT_EQ(0, mig_set_state(&self->dev, MIG_RUNNING, NULL));
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("leaving %s terminates the data transfer session: ENODEV",
				mig_state_name(states[i]));
		fd = go(_metadata, &self->dev, states[i]);
		EXPECT_TRUE(mig_fd_is_dead(old))
			PROMISE("the fd of an ended %s session does not see the new one: ENODEV",
				mig_state_name(states[i]));
		if (states[i] == MIG_PRE_COPY) {
			EXPECT_EQ(-ENODEV, mig_precopy_info(old, &info))
				PROMISE("the fd of an ended session has no data of the new one: ENODEV");
		}
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("the new %s session works", mig_state_name(states[i]));
		close(old);
		EXPECT_FALSE(mig_fd_is_dead(fd))
			PROMISE("closing an old fd does not end the new session");
		close(fd);
	}
}

TEST_F(device, fd_after_close_of_the_device)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct vfio_precopy_info info;
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		mig_close_device(&self->dev);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("the data_fd of %s fails with ENODEV after the device is closed",
				mig_state_name(states[i]));
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a closed device");
		EXPECT_GT(0, mig_precopy_info(fd, &info));
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("an old data_fd stays dead for the next opener");
		close(fd);
		expect_state(_metadata, &self->dev, MIG_RUNNING, "after close and open");
	}
}

TEST_F(device, closed_data_fd_does_not_block_transitions)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct mig_stream image = {};
	unsigned int i;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		close(go(_metadata, &self->dev, states[i]));
		expect_state(_metadata, &self->dev, states[i], "after close of the data_fd");
		if (states[i] != MIG_RESUMING) {
			EXPECT_EQ(0, mig_set_state(&self->dev, MIG_STOP, NULL))
				PROMISE("a closed data_fd does not keep the device in %s",
					mig_state_name(states[i]));
		}
		go_home(_metadata, &self->dev);
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

TEST_F(device, reset_is_advertised)
{
	EXPECT_NE(0U, self->dev.info.flags & VFIO_DEVICE_FLAGS_RESET)
		PROMISE("to recover from ERROR VFIO_DEVICE_RESET must be used: it is supported");
}

TEST_F_TIMEOUT(device, reset_in_every_state, 60)
{
	struct mig_stream image = {};
	__u32 state, now;
	int fd;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		EXPECT_EQ(0, mig_reset(&self->dev))
			PROMISE("RESET works in %s", mig_state_name(state));
		ASSERT_EQ(0, mig_get_state(&self->dev, &now));
		EXPECT_EQ(MIG_RUNNING, now)
			PROMISE("VFIO_DEVICE_RESET returns the device from %s to RUNNING",
				mig_state_name(state));
		if (fd >= 0) {
			EXPECT_TRUE(mig_fd_is_dead(fd))
				PROMISE("RESET ends the session of %s", mig_state_name(state));
			close(fd);
		}
		load_and_run(_metadata, &self->dev, &image, 0);
	}
}

TEST_F_TIMEOUT(device, close_in_every_state, 60)
{
	__u32 state, now;
	int fd;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		if (fd >= 0)
			close(fd);
		mig_close_device(&self->dev);
		ASSERT_EQ(0, mig_reopen_device(&self->dev))
			STEP("reopen the device: %s", self->dev.why);
		ASSERT_EQ(0, mig_get_state(&self->dev, &now));
		/* After this failure the device may be in any state. */
		ASSERT_EQ(MIG_RUNNING, now)
			PROMISE("a device that was closed in %s is RUNNING for the next opener",
				mig_state_name(state));
		fd = go(_metadata, &self->dev, MIG_STOP_COPY);
		close(fd);
	}
}

/* The next opener relies on RUNNING without a GET of the state. */
TEST_F_TIMEOUT(device, next_opener_can_reach_every_state, 60)
{
	static const __u32 targets[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	__u32 state, now;
	unsigned int i;
	int fd, ret;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		for (i = 0; i < ARRAY_SIZE(targets); i++) {
			fd = go(_metadata, &self->dev, state);
			if (fd >= 0)
				close(fd);
			mig_close_device(&self->dev);
			ASSERT_EQ(0, mig_reopen_device(&self->dev))
				STEP("reopen the device: %s", self->dev.why);
			ret = mig_set_state(&self->dev, targets[i], &fd);
			EXPECT_EQ(0, ret)
				PROMISE("a device closed in %s is RUNNING for the next opener, which can go to %s: %s",
					mig_state_name(state), mig_state_name(targets[i]),
					strerror(-ret));
			ASSERT_EQ(0, mig_get_state(&self->dev, &now));
			EXPECT_EQ(targets[i], now);
			EXPECT_EQ(targets[i] != MIG_STOP, fd >= 0)
				PROMISE("a session after a close in %s has a new data_fd",
					mig_state_name(state));
			if (fd >= 0)
				close(fd);
		}
	}
}

/* A device created for one test, of the type of the device under test. */
struct guest {
	struct mig_device dev;
	char path[PATH_MAX];
	char remove[PATH_MAX + 16];
};

/* -EOPNOTSUPP: not a mediated device, or no more devices can be created. */
static int create_guest(const struct mig_device *like, struct guest *g)
{
	char uuid[37] = "", create[PATH_MAX];
	int fd, ret;

	snprintf(create, sizeof(create), "%s/mdev_type/create", like->sysfs);
	if (access(create, W_OK))
		return -EOPNOTSUPP;
	fd = open("/proc/sys/kernel/random/uuid", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, uuid, 36) != 36)
		return -EIO;
	close(fd);
	ret = write_word(create, uuid);
	if (ret)
		return ret == -ENOSPC ? -EOPNOTSUPP : ret;
	snprintf(g->path, sizeof(g->path), "/sys/bus/mdev/devices/%s", uuid);
	snprintf(g->remove, sizeof(g->remove), "%s/remove", g->path);
	return mig_open(&g->dev, g->path, like->backend);
}

#define GUEST_OR_SKIP(like, g) do {						\
	int __ret = create_guest(like, g);					\
										\
	if (__ret == -EOPNOTSUPP)						\
		SKIP(return, "no mediated device can be created and removed");	\
	ASSERT_EQ(0, __ret)							\
		STEP("create and open another device: %s", (g)->dev.why);	\
} while (0)

TEST_F(device, fd_after_removal_of_the_device)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	struct vfio_precopy_info info;
	struct guest guest;
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		GUEST_OR_SKIP(&self->dev, &guest);
		fd = go(_metadata, &guest.dev, states[i]);
		mig_close(&guest.dev);
		ASSERT_EQ(0, write_word(guest.remove, "1"));
		EXPECT_EQ(-1, access(guest.path, F_OK))
			PROMISE("a data_fd does not keep its device");
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("the data_fd of %s outlives the device: ENODEV",
				mig_state_name(states[i]));
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a removed device");
		EXPECT_GT(0, mig_precopy_info(fd, &info));
		close(fd);
	}
}
