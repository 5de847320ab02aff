// SPDX-License-Identifier: GPL-2.0
/* Interrupts: none while the device is stopped, and none is lost. */

#define VECTORS_MAX	8U

#define NEED_INTERRUPT() do {							\
	if (!ops || !ops->interrupt)						\
		SKIP(return, "no --device-ops that raises interrupts");		\
} while (0)

#define NEED_KEPT_INTERRUPTS() do {						\
	NEED_INTERRUPT();							\
	if (!ops->keeps_interrupts)						\
		SKIP(return, "the device drops interrupts without an eventfd");	\
} while (0)

/* The number of signals of an eventfd since the last call. */
static __u64 signals(int event)
{
	__u64 count;

	return read(event, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

/* @event is -1 for none. */
static void set_eventfd(struct __test_metadata *_metadata, const struct mig_device *dev,
			__u32 vector, int event)
{
	int ret = mig_set_irqs(dev, ops->irq_index, VFIO_IRQ_SET_DATA_EVENTFD |
			       VFIO_IRQ_SET_ACTION_TRIGGER, vector, 1, &event, sizeof(event));

	ASSERT_EQ(0, ret)
		STEP("set the eventfd of vector %u: %s", vector, strerror(-ret));
}

/* An eventfd for each vector. */
struct vectors {
	int events[VECTORS_MAX];
	unsigned int nr;
};

static struct vectors make_vectors(struct __test_metadata *_metadata,
				   const struct mig_device *dev)
{
	struct vfio_irq_info info;
	struct vectors v = {};

	ASSERT_EQ(0, mig_irq_info(dev, ops->irq_index, &info));
	while (v.nr < info.count && v.nr < VECTORS_MAX) {
		v.events[v.nr] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		ASSERT_LE(0, v.events[v.nr++]);
	}
	ASSERT_LT(0U, v.nr);
	return v;
}

static void set_vectors(struct __test_metadata *_metadata, const struct mig_device *dev,
			const struct vectors *v)
{
	int ret = mig_set_irqs(dev, ops->irq_index, VFIO_IRQ_SET_DATA_EVENTFD |
			       VFIO_IRQ_SET_ACTION_TRIGGER, 0, v->nr, v->events,
			       v->nr * sizeof(int));

	ASSERT_EQ(0, ret)
		STEP("set the eventfds of %u vectors: %s", v->nr, strerror(-ret));
}

static void raise_interrupt(struct __test_metadata *_metadata,
			    const struct mig_device *dev, unsigned int vector)
{
	int ret = ops->interrupt(dev, vector);

	ASSERT_EQ(0, ret)
		STEP("raise interrupt %u: %s", vector, strerror(-ret));
}

static void expect_interrupt(struct __test_metadata *_metadata, const struct vectors *v,
			     unsigned int vector, const char *when)
{
	unsigned int i;

	WAIT_FOR(signals(v->events[vector]), "interrupt %u is delivered %s", vector, when);
	for (i = 0; i < v->nr; i++) {
		EXPECT_TRUE(i == vector || !signals(v->events[i]))
			PROMISE("only interrupt %u is delivered %s, not %u", vector, when, i);
	}
}

static void expect_no_interrupt(struct __test_metadata *_metadata, const struct vectors *v,
				const char *when)
{
	unsigned int i;

	usleep(LOOK_US);
	for (i = 0; i < v->nr; i++) {
		EXPECT_EQ(0U, signals(v->events[i]))
			PROMISE("the device must not generate interrupts %s (%u)", when, i);
	}
}

TEST_F(device, interrupts_reach_their_eventfds)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_PRE_COPY, MIG_PRE_COPY_P2P,
	};
	struct vectors v;
	unsigned int i, vector;
	int fd;

	NEED_INTERRUPT();
	v = make_vectors(_metadata, &self->dev);
	set_vectors(_metadata, &self->dev, &v);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], &fd));
		for (vector = 0; vector < v.nr; vector++) {
			raise_interrupt(_metadata, &self->dev, vector);
			expect_interrupt(_metadata, &v, vector, in_state(states[i]));
		}
		if (fd >= 0)
			close(fd);
		move_on(_metadata, &self->dev, MIG_RUNNING);
	}
}

TEST_F_TIMEOUT(device, stopped_device_raises_no_interrupt, 60)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct copied c = {};
	struct vectors v;
	unsigned int i;
	int fd;

	NEED_INTERRUPT();
	NEED_RESET(&self->dev);
	v = make_vectors(_metadata, &self->dev);
	set_vectors(_metadata, &self->dev, &v);
	if (ops->copy)
		c = make_copied(_metadata, &self->dev);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		/* Each end of the copy raises an interrupt. */
		if (ops->copy) {
			start_copy(_metadata, &self->dev, &c, true, 0);
			expect_interrupt(_metadata, &v, 0, "at the end of a copy");
		}
		ASSERT_EQ(0, mig_set_state(&self->dev, states[i], &fd));
		/* Those before. */
		signals(v.events[0]);
		expect_no_interrupt(_metadata, &v, in_state(states[i]));
		/* May fail as well. */
		ops->interrupt(&self->dev, v.nr - 1);
		expect_no_interrupt(_metadata, &v, in_state(states[i]));
		if (states[i] != MIG_RESUMING && ops->copy) {
			move_on(_metadata, &self->dev, MIG_RUNNING);
			WAIT_FOR(signals(v.events[0]), "interrupts go on after %s",
				 mig_state_name(states[i]));
		}
		if (fd >= 0)
			close(fd);
		ASSERT_EQ(0, mig_reset(&self->dev));
		for (fd = 0; fd < (int)v.nr; fd++)
			signals(v.events[fd]);
	}
}

TEST_F(device, pending_interrupt_is_delivered_on_the_target)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	unsigned int vector;
	struct vectors v;
	int fd;

	NEED_KEPT_INTERRUPTS();
	NEED_RESET(&self->dev);
	v = make_vectors(_metadata, &self->dev);
	vector = v.nr - 1;
	to = open_target(_metadata, &self->dev, &second);
	set_vectors(_metadata, &self->dev, &v);
	set_eventfd(_metadata, &self->dev, vector, -1);
	raise_interrupt(_metadata, &self->dev, vector);
	take_image(_metadata, &self->dev, &image);
	ASSERT_EQ(0, mig_reset(&self->dev));
	set_vectors(_metadata, to, &v);
	expect_no_interrupt(_metadata, &v, "before it is loaded");
	fd = go(_metadata, to, MIG_RESUMING);
	load_all(_metadata, fd, &image);
	move_on(_metadata, to, MIG_STOP);
	expect_no_interrupt(_metadata, &v, "before the target runs");
	move_on(_metadata, to, MIG_RUNNING);
	expect_interrupt(_metadata, &v, vector, "on the target");
	close(fd);
}

TEST_F(device, reset_and_close_clear_interrupts)
{
	struct vectors v;

	NEED_KEPT_INTERRUPTS();
	NEED_RESET(&self->dev);
	v = make_vectors(_metadata, &self->dev);
	set_vectors(_metadata, &self->dev, &v);
	set_eventfd(_metadata, &self->dev, 0, -1);
	raise_interrupt(_metadata, &self->dev, 0);
	ASSERT_EQ(0, mig_reset(&self->dev));
	set_vectors(_metadata, &self->dev, &v);
	expect_no_interrupt(_metadata, &v, "after RESET");

	set_eventfd(_metadata, &self->dev, 0, -1);
	raise_interrupt(_metadata, &self->dev, 0);
	mig_close_device(&self->dev);
	ASSERT_EQ(0, mig_reopen_device(&self->dev))
		STEP("reopen the device: %s", self->dev.why);
	set_vectors(_metadata, &self->dev, &v);
	expect_no_interrupt(_metadata, &v, "for the next opener");
	raise_interrupt(_metadata, &self->dev, 0);
	expect_interrupt(_metadata, &v, 0, "for the next opener");
}

/*
 * A device is stopped at any time of a copy. If a part of it is left, the target does
 * that; and the interrupt at the end comes on one of them.
 */
TEST_F_TIMEOUT(device, copy_in_progress_migrates, 120)
{
	unsigned int count = mig_times(24), i, moved = 0;
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct copied c;
	int fd, event = -1;

	NEED_COPY(&self->dev);
	c = make_copied(_metadata, &self->dev);
	to = open_target(_metadata, &self->dev, &second);
	if (to != &self->dev)
		map_copied(_metadata, to, &c);
	if (ops->interrupt) {
		event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		ASSERT_LE(0, event);
		set_eventfd(_metadata, &self->dev, 0, event);
		set_eventfd(_metadata, to, 0, event);
	}
	for (i = 0; i < count; i++) {
		start_copy(_metadata, &self->dev, &c, false, ops->interrupt ? 0 : -1);
		if (i % 8)
			usleep(10 << i % 8);
		ASSERT_EQ(0, mig_set_state(&self->dev, MIG_STOP_COPY, &fd));
		moved += !is_copied(&c);
		image.len = 0;
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
		close(fd);
		ASSERT_EQ(0, mig_reset(&self->dev));
		load_and_run(_metadata, to, &image, 0);
		wait_for_copy(_metadata, to, &c, "on the target");
		if (ops->interrupt)
			WAIT_FOR(signals(event), "the interrupt at the end of a copy is not lost");
		ASSERT_EQ(0, mig_reset(to));
		signals(event);
	}
	TH_LOG("%u of %u copies ended on the target", moved, count);
}
