// SPDX-License-Identifier: GPL-2.0
/*
 * The interrupts of vfio_mock: MSI-X by eventfds, masks and pending bits, interrupts
 * of a stopped device and their migration, every argument of SET_IRQS that vfio-pci
 * refuses, and the request to release the device.
 *
 *	./vfio_mock_irq_test --small "SOURCE TARGET"
 *
 * with the sysfs paths of two mediated devices. run_mock.sh creates them.
 */
#include <sys/eventfd.h>

#include "mock.h"

#define MSIX		VFIO_PCI_MSIX_IRQ_INDEX
#define REQ		VFIO_PCI_REQ_IRQ_INDEX
#define VECTORS		VFIO_MOCK_MSIX_VECTORS

#define DATA_NONE	VFIO_IRQ_SET_DATA_NONE
#define DATA_BOOL	VFIO_IRQ_SET_DATA_BOOL
#define DATA_EVENTFD	VFIO_IRQ_SET_DATA_EVENTFD
#define MASK		VFIO_IRQ_SET_ACTION_MASK
#define UNMASK		VFIO_IRQ_SET_ACTION_UNMASK
#define TRIGGER		VFIO_IRQ_SET_ACTION_TRIGGER

/* The last byte of the MSI-X capability's first dword. */
#define MSIX_CONTROL		(VFIO_MOCK_MSIX_CAP + 3)
#define MSIX_FUNCTION_MASK	0x40
/* The mask of a vector in the table. */
#define VECTOR_CONTROL(v)	(VFIO_MOCK_MSIX_TABLE + 16 * (v) + 12)

FIXTURE(irq)
{
	struct mock m;
	int fds[VECTORS];
};

MIG_EACH_BACKEND(irq);

FIXTURE_SETUP(irq)
{
	int i;

	MOCK_OPEN_OR_SKIP(&self->m, "small", 0, variant->backend);
	for (i = 0; i < VECTORS; i++) {
		self->fds[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		ASSERT_LE(0, self->fds[i]);
	}
}

FIXTURE_TEARDOWN(irq)
{
	mock_close(&self->m);
}

/* The number of signals of an eventfd since the last call. */
static __u64 signals(int fd)
{
	__u64 count;

	return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

/* SET_IRQS for MSI-X without data. */
static int set_none(const struct mock *m, __u32 action, __u32 start, __u32 count)
{
	return mig_set_irqs(&m->dev, MSIX, DATA_NONE | action, start, count, NULL, 0);
}

/* SET_IRQS for MSI-X with a bool for each vector. */
static int set_bools(const struct mock *m, __u32 action, const __u8 bools[VECTORS])
{
	return mig_set_irqs(&m->dev, MSIX, DATA_BOOL | action, 0, VECTORS, bools, VECTORS);
}

static int set_eventfds(const struct mock *m, __u32 start, __u32 count, const int *fds)
{
	return mig_set_irqs(&m->dev, MSIX, DATA_EVENTFD | TRIGGER, start, count, fds,
			    count * sizeof(*fds));
}

/* Lets the device raise a vector, as at the end of a command. */
static void raise_irq(struct __test_metadata *_metadata, const struct mock *m, __u32 vector)
{
	set32(m, IRQ_VECTOR, vector);
	command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 0, 8, 0);
}

static __u64 pending(struct __test_metadata *_metadata, const struct mock *m)
{
	return get(_metadata, m, BAR0, VFIO_MOCK_MSIX_PBA, 8);
}

/* The number of signals of each vector as a decimal digit, the first vector last. */
static unsigned int all_signals(const int fds[VECTORS])
{
	unsigned int all = 0;
	int i;

	for (i = VECTORS - 1; i >= 0; i--)
		all = all * 10 + signals(fds[i]);
	return all;
}

/* ---- Delivery ---- */

TEST_F(irq, info)
{
	static const struct {
		int ret;
		__u32 flags, count;
	} want[VFIO_PCI_NUM_IRQS] = {
		[VFIO_PCI_INTX_IRQ_INDEX] = {
			.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE |
				 VFIO_IRQ_INFO_AUTOMASKED,
		},
		[VFIO_PCI_MSI_IRQ_INDEX] = {
			.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
		},
		[MSIX] = {
			.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE,
			.count = VECTORS,
		},
		/* The device is not PCI Express. */
		[VFIO_PCI_ERR_IRQ_INDEX] = { .ret = -EINVAL },
		[REQ] = {
			.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
			.count = 1,
		},
	};
	struct vfio_irq_info info;
	struct mock *m = &self->m;
	__u32 i;

	for (i = 0; i < VFIO_PCI_NUM_IRQS; i++) {
		ASSERT_EQ(want[i].ret, mig_irq_info(&m->dev, i, &info))
			PROMISE("irq index %u has this result of GET_IRQ_INFO", i);
		if (want[i].ret)
			continue;
		EXPECT_EQ(want[i].count, info.count)
			PROMISE("irq index %u has this number of vectors", i);
		EXPECT_EQ(want[i].flags, info.flags)
			PROMISE("irq index %u has these flags", i);
	}
	EXPECT_EQ(-EINVAL, mig_irq_info(&m->dev, VFIO_PCI_NUM_IRQS, &info));
	EXPECT_EQ(-EINVAL, mig_irq_info(&m->dev, ~0U, &info));
	info = (struct vfio_irq_info){ .argsz = 8 };
	EXPECT_ERRNO(EINVAL, ioctl(m->dev.fd, VFIO_DEVICE_GET_IRQ_INFO, &info))
		PROMISE("argsz must cover the structure");
	EXPECT_ERRNO(EFAULT, ioctl(m->dev.fd, VFIO_DEVICE_GET_IRQ_INFO, NULL));
}

TEST_F(irq, completion_signals_its_vector)
{
	struct mock *m = &self->m;
	int i, j;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	fill(_metadata, m, 0, 8, 1);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("no interrupt is raised after reset");
	for (i = 0; i < VECTORS; i++) {
		set32(m, IRQ_VECTOR, i);
		fill(_metadata, m, 0, 8, i);
		command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 0, 8, i);
		for (j = 0; j < VECTORS; j++) {
			EXPECT_EQ(i == j ? 2U : 0U, signals(self->fds[j]))
				PROMISE("a completed command signals vector %d, and no other (%d)",
					i, j);
		}
	}
	/* A refused command ends with an interrupt, too. */
	command(_metadata, m, 77, 0, 8, 0);
	EXPECT_EQ(1U, signals(self->fds[VECTORS - 1]))
		PROMISE("the vector is signalled at the end of a command");
	/* A vector that does not exist raises no interrupt. */
	raise_irq(_metadata, m, VECTORS);
	raise_irq(_metadata, m, 0x7fffffff);
	EXPECT_EQ(0U, all_signals(self->fds));
	EXPECT_EQ(0U, pending(_metadata, m));
}

TEST_F(irq, user_trigger_equals_device_interrupt)
{
	static const __u8 some[VECTORS] = { 1, 0, 0, 255 };
	struct mock *m = &self->m;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	EXPECT_EQ(0, set_none(m, TRIGGER, 1, 2));
	EXPECT_EQ(110U, all_signals(self->fds))
		PROMISE("DATA_NONE with ACTION_TRIGGER signals each vector of the range");
	EXPECT_EQ(0, set_bools(m, TRIGGER, some));
	EXPECT_EQ(1001U, all_signals(self->fds))
		PROMISE("DATA_BOOL with ACTION_TRIGGER signals the true vectors");

	/* It simulates the device, so that masks apply. */
	ASSERT_EQ(0, set_none(m, MASK, 0, 1));
	EXPECT_EQ(0, set_none(m, TRIGGER, 0, 2));
	EXPECT_EQ(10U, all_signals(self->fds));
	EXPECT_EQ(1U, pending(_metadata, m));
}

TEST_F(irq, eventfds_come_and_go)
{
	int none[VECTORS] = { -1, -5, -1, -1 }, other;
	struct mock *m = &self->m;

	/* A few, then more, without disabling MSI-X in between. */
	ASSERT_EQ(0, set_eventfds(m, 1, 1, &self->fds[1]));
	ASSERT_EQ(0, set_eventfds(m, 2, 2, &self->fds[2]));
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 3);
	EXPECT_EQ(1010U, all_signals(self->fds));

	other = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	ASSERT_EQ(0, set_eventfds(m, 3, 1, &other));
	raise_irq(_metadata, m, 3);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("a new eventfd replaces the old one");
	EXPECT_EQ(1U, signals(other));

	ASSERT_EQ(0, set_eventfds(m, 0, 2, none));
	raise_irq(_metadata, m, 1);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("a negative eventfd de-assigns the vector");
	raise_irq(_metadata, m, 2);
	EXPECT_EQ(100U, all_signals(self->fds))
		PROMISE("the other vectors are unchanged");

	ASSERT_EQ(0, set_none(m, TRIGGER, 0, 0))
		PROMISE("count 0 with DATA_NONE and ACTION_TRIGGER disables the index");
	raise_irq(_metadata, m, 2);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("a disabled index signals nothing");

	/* The device keeps a reference when the user closes the eventfd. */
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	close(self->fds[3]);
	raise_irq(_metadata, m, 3);
}

/* ---- Pending interrupts ---- */

TEST_F(irq, waits_for_an_eventfd)
{
	struct mock *m = &self->m;

	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 3);
	EXPECT_EQ(0xaU, pending(_metadata, m))
		PROMISE("an interrupt without an eventfd is pending");
	ASSERT_EQ(0, set_eventfds(m, 0, 2, self->fds));
	EXPECT_EQ(10U, all_signals(self->fds))
		PROMISE("a pending interrupt is delivered once when an eventfd is set");
	EXPECT_EQ(8U, pending(_metadata, m));
	ASSERT_EQ(0, set_none(m, TRIGGER, 0, 0));
	EXPECT_EQ(8U, pending(_metadata, m))
		PROMISE("pending interrupts stay pending while MSI-X is off");
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	EXPECT_EQ(1000U, all_signals(self->fds));
	EXPECT_EQ(0U, pending(_metadata, m));
}

TEST_F(irq, waits_while_masked_by_set_irqs)
{
	static const __u8 some[VECTORS] = { 0, 1, 0, 1 };
	struct mock *m = &self->m;
	int i;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	ASSERT_EQ(0, set_none(m, MASK, 1, 2));
	for (i = 0; i < 3 * VECTORS; i++)
		raise_irq(_metadata, m, i % VECTORS);
	EXPECT_EQ(3003U, all_signals(self->fds))
		PROMISE("ACTION_MASK masks the vectors of the range, and no others");
	EXPECT_EQ(6U, pending(_metadata, m))
		PROMISE("the pending bits show the masked interrupts");

	ASSERT_EQ(0, set_bools(m, UNMASK, some));
	EXPECT_EQ(10U, all_signals(self->fds))
		PROMISE("ACTION_UNMASK delivers a pending interrupt once");
	EXPECT_EQ(4U, pending(_metadata, m))
		PROMISE("DATA_BOOL unmasks only the true vectors");
	ASSERT_EQ(0, set_none(m, UNMASK, 0, VECTORS));
	EXPECT_EQ(100U, all_signals(self->fds));
	ASSERT_EQ(0, set_none(m, UNMASK, 0, VECTORS));
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("unmasking an unmasked vector delivers nothing");

	ASSERT_EQ(0, set_bools(m, MASK, some));
	for (i = 0; i < VECTORS; i++)
		raise_irq(_metadata, m, i);
	EXPECT_EQ(101U, all_signals(self->fds))
		PROMISE("DATA_BOOL masks only the true vectors");
	ASSERT_EQ(0, set_none(m, MASK, 0, 0));
	ASSERT_EQ(0, set_none(m, UNMASK, 0, 0));
	EXPECT_EQ(10U, pending(_metadata, m))
		PROMISE("an empty range has no effect");

	/* Disabling MSI-X clears the masks, like those of INTx in vfio-pci. */
	ASSERT_EQ(0, set_none(m, TRIGGER, 0, 0));
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	EXPECT_EQ(1010U, all_signals(self->fds));
}

TEST_F(irq, waits_while_masked_by_the_device)
{
	struct mock *m = &self->m;
	int i;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	put(_metadata, m, BAR0, VECTOR_CONTROL(2), 1, 4);
	for (i = 0; i < VECTORS; i++)
		raise_irq(_metadata, m, i);
	EXPECT_EQ(1011U, all_signals(self->fds))
		PROMISE("the mask in the MSI-X table masks its vector");
	EXPECT_EQ(4U, pending(_metadata, m));
	/* The other bits of that dword are reserved. */
	put(_metadata, m, BAR0, VECTOR_CONTROL(2), 0xfffffffe, 4);
	EXPECT_EQ(100U, all_signals(self->fds))
		PROMISE("clearing the mask in the table delivers the pending interrupt");

	put(_metadata, m, CONFIG, MSIX_CONTROL, MSIX_FUNCTION_MASK, 1);
	for (i = 1; i < VECTORS; i++)
		raise_irq(_metadata, m, i);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("the function mask masks all vectors");
	EXPECT_EQ(0xeU, pending(_metadata, m));
	put(_metadata, m, CONFIG, VFIO_MOCK_MSIX_CAP, 0x80000000, 4);
	EXPECT_EQ(1110U, all_signals(self->fds))
		PROMISE("clearing the function mask delivers the pending interrupts");
	EXPECT_EQ(0U, pending(_metadata, m));
}

TEST_F(irq, waits_for_all_conditions)
{
	struct mock *m = &self->m;
	int none = -1;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	ASSERT_EQ(0, set_none(m, MASK, 1, 1));
	ASSERT_EQ(0, set_eventfds(m, 1, 1, &none));
	put(_metadata, m, BAR0, VECTOR_CONTROL(1), 1, 4);
	put(_metadata, m, CONFIG, MSIX_CONTROL, MSIX_FUNCTION_MASK, 1);
	raise_irq(_metadata, m, 1);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));

	/* The table cannot be written while the device is stopped. */
	ASSERT_EQ(0, set_none(m, UNMASK, 1, 1));
	EXPECT_EQ(2U, pending(_metadata, m));
	ASSERT_EQ(0, set_eventfds(m, 1, 1, &self->fds[1]));
	EXPECT_EQ(2U, pending(_metadata, m));
	put(_metadata, m, CONFIG, MSIX_CONTROL, 0, 1);
	EXPECT_EQ(2U, pending(_metadata, m));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
	EXPECT_EQ(2U, pending(_metadata, m));
	EXPECT_EQ(0U, all_signals(self->fds));
	put(_metadata, m, BAR0, VECTOR_CONTROL(1), 0, 4);
	EXPECT_EQ(10U, all_signals(self->fds))
		PROMISE("an interrupt held back by five causes is delivered after the last");
	EXPECT_EQ(0U, pending(_metadata, m));
}

TEST_F(irq, waits_while_stopped)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mock *m = &self->m;
	struct mig_stream image = {};
	unsigned int i;
	int fd;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	take_image(_metadata, &m->dev, &image);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		fd = go(_metadata, &m->dev, states[i]);
		raise_irq(_metadata, m, 0);
		EXPECT_EQ(0U, pending(_metadata, m))
			PROMISE("a device in %s executes no command",
				mig_state_name(states[i]));
		ASSERT_EQ(0, set_none(m, TRIGGER, 2, 1));
		ASSERT_EQ(0, set_none(m, TRIGGER, 2, 1));
		EXPECT_EQ(0U, all_signals(self->fds))
			PROMISE("in %s the device must not generate interrupts",
				mig_state_name(states[i]));
		EXPECT_EQ(4U, pending(_metadata, m));
		if (states[i] == MIG_RESUMING) {
			/* The image replaces the pending interrupts. */
			load_all(_metadata, fd, &image);
		}
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
		EXPECT_EQ(0U, all_signals(self->fds));
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		EXPECT_EQ(states[i] == MIG_RESUMING ? 0U : 100U, all_signals(self->fds))
			PROMISE("interrupts pending in %s are delivered in RUNNING, unless replaced",
				mig_state_name(states[i]));
		EXPECT_EQ(0U, pending(_metadata, m));
		close(fd);
	}
	mig_stream_free(&image);
}

/* STOP -> RUNNING_P2P: interrupts do not wait for RUNNING. */
TEST_F(irq, pending_interrupts_are_delivered_in_running_p2p)
{
	struct mock *m = &self->m;

	NEED_P2P(&m->dev);
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, set_none(m, TRIGGER, 3, 1));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING_P2P, NULL));
	EXPECT_EQ(1000U, all_signals(self->fds))
		PROMISE("pending interrupts are delivered as soon as the device runs");
}

TEST_F(irq, reset_clears_only_device_state)
{
	struct mock *m = &self->m;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	ASSERT_EQ(0, set_none(m, MASK, 0, 1));
	put(_metadata, m, BAR0, VECTOR_CONTROL(1), 1, 4);
	put(_metadata, m, CONFIG, MSIX_CONTROL, MSIX_FUNCTION_MASK, 1);
	raise_irq(_metadata, m, 0);
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 2);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, mig_reset(&m->dev));
	EXPECT_EQ(0U, pending(_metadata, m))
		PROMISE("reset clears pending interrupts");
	EXPECT_EQ(0U, get(_metadata, m, BAR0, VECTOR_CONTROL(1), 4));
	EXPECT_EQ(0U, all_signals(self->fds));
	raise_irq(_metadata, m, 1);
	EXPECT_EQ(10U, all_signals(self->fds))
		PROMISE("reset clears table mask and function mask, and keeps the eventfds");
	raise_irq(_metadata, m, 0);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("reset keeps the masks of SET_IRQS, which belong to the user");
	ASSERT_EQ(0, set_none(m, UNMASK, 0, 1));
	EXPECT_EQ(1U, all_signals(self->fds));
}

/* ---- Table and pending bits in BAR0 ---- */

TEST_F(irq, table_takes_any_access)
{
	__u8 model[VECTORS * 16 + 64], seen[sizeof(model)];
	const __u64 base = VFIO_MOCK_MSIX_TABLE - 32;
	struct mock *m = &self->m;
	unsigned int i, at, len;
	__u64 n = 0, dropped;

	memset(model, 0, sizeof(model));
	for (i = 0; i < 300; i++) {
		/* Also around the table, where nothing exists. */
		at = vfio_mock_mix(++n) % sizeof(model);
		len = vfio_mock_mix(++n) % (i % 4 ? 8 : 100) + 1;
		if (len > sizeof(model) - at)
			len = sizeof(model) - at;
		vfio_mock_pattern(seen, ++n, at, len);
		ASSERT_EQ((ssize_t)len, mock_write(m, BAR0, base + at, seen, len));
		memcpy(model + at, seen, len);
		memset(model, 0, 32);
		memset(model + 32 + VECTORS * 16, 0, 32);
		at = vfio_mock_mix(++n) % sizeof(model);
		len = vfio_mock_mix(++n) % (sizeof(model) - at) + 1;
		ASSERT_EQ((ssize_t)len, mock_read(m, BAR0, base + at, seen, len));
		ASSERT_EQ(0, memcmp(seen, model + at, len))
			PROMISE("the table keeps written values, and nothing exists around it");
	}

	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	dropped = reg64(m, DROPPED);
	put(_metadata, m, BAR0, VFIO_MOCK_MSIX_TABLE, ~0ULL, 8);
	ASSERT_EQ(VECTORS * 16, mock_read(m, BAR0, VFIO_MOCK_MSIX_TABLE, seen, VECTORS * 16));
	EXPECT_EQ(0, memcmp(seen, model + 32, VECTORS * 16))
		PROMISE("a write to the table is dropped while the device is stopped");
	EXPECT_EQ(dropped + 1, reg64(m, DROPPED))
		PROMISE("a dropped write is counted");
}

TEST_F(irq, pending_bits_are_read_only)
{
	struct mock *m = &self->m;
	__u8 seen[16], zero[16] = {};
	unsigned int i;

	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 2);
	put(_metadata, m, BAR0, VFIO_MOCK_MSIX_PBA, 0xff, 8);
	EXPECT_EQ(6U, pending(_metadata, m))
		PROMISE("pending bits cannot be set");
	put(_metadata, m, BAR0, VFIO_MOCK_MSIX_PBA, 0, 1);
	EXPECT_EQ(6U, pending(_metadata, m))
		PROMISE("pending bits cannot be cleared");
	for (i = 1; i <= 8; i++) {
		EXPECT_EQ(6U, get(_metadata, m, BAR0, VFIO_MOCK_MSIX_PBA, i))
			PROMISE("an access of %u bytes works", i);
	}
	ASSERT_EQ(16, mock_read(m, BAR0, VFIO_MOCK_MSIX_PBA - 4, seen, 16));
	EXPECT_EQ(6U, seen[4]);
	seen[4] = 0;
	EXPECT_EQ(0, memcmp(seen, zero, 16))
		PROMISE("no other pending bits exist, and nothing around them");
}

/* ---- Migration ---- */

TEST_F(irq, pending_interrupts_follow_the_device)
{
	struct mig_stream image = {};
	struct mock *m = &self->m, dst;
	struct mock_front front, now;
	int fd;

	MOCK_OPEN_OR_SKIP(&dst, "small", 1, variant->backend);
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	/* Vector 0 was delivered, 1 is masked by the user, 2 by the device. */
	ASSERT_EQ(0, set_none(m, MASK, 1, 1));
	put(_metadata, m, BAR0, VECTOR_CONTROL(2), 1, 4);
	raise_irq(_metadata, m, 0);
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 2);
	EXPECT_EQ(1U, all_signals(self->fds));
	/* Vector 3 is raised while the device is stopped. */
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, set_none(m, TRIGGER, 3, 1));
	read_front(_metadata, m, &front);
	EXPECT_EQ(0xeU, front.msix_pba[0]);
	fd = -1;
	stop_and_save(_metadata, m, &fd, &image);
	close(fd);
	EXPECT_EQ(0U, all_signals(self->fds));

	/* A target with eventfds set before the state is loaded. */
	ASSERT_EQ(0, set_eventfds(&dst, 0, VECTORS, self->fds));
	fd = go(_metadata, &dst.dev, MIG_RESUMING);
	load_all(_metadata, fd, &image);
	ASSERT_EQ(0, mig_set_state(&dst.dev, MIG_STOP, NULL));
	close(fd);
	restore_config(_metadata, &dst, &front);
	read_front(_metadata, &dst, &now);
	expect_same_front(_metadata, &front, &now, "in STOP on the target");
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("nothing is delivered before the target runs");
	move_on(_metadata, &dst.dev, MIG_RUNNING);
	EXPECT_EQ(1010U, all_signals(self->fds))
		PROMISE("pending interrupts are delivered on the target, except if masked in the table");
	EXPECT_EQ(4U, pending(_metadata, &dst));
	put(_metadata, &dst, BAR0, VECTOR_CONTROL(2), 0, 4);
	EXPECT_EQ(100U, all_signals(self->fds))
		PROMISE("the mask in the table migrates, the masks of SET_IRQS do not");

	/* A target whose eventfds are set while it runs. */
	ASSERT_EQ(0, mig_reset(&dst.dev));
	ASSERT_EQ(0, set_none(&dst, TRIGGER, 0, 0));
	load_and_run(_metadata, &dst.dev, &image, 1);
	EXPECT_EQ(0xeU, pending(_metadata, &dst));
	ASSERT_EQ(0, set_eventfds(&dst, 0, VECTORS, self->fds));
	EXPECT_EQ(1010U, all_signals(self->fds))
		PROMISE("loaded interrupts stay pending until eventfds are set");

	/* An image of the target contains the interrupts that are still pending. */
	image.len = 0;
	take_image(_metadata, &dst.dev, &image);
	load_and_run(_metadata, &dst.dev, &image, 0);
	EXPECT_EQ(0U, all_signals(self->fds));
	EXPECT_EQ(4U, pending(_metadata, &dst));
	mig_stream_free(&image);
	mock_close(&dst);
}

TEST_F(irq, restored_function_mask_applies_to_loaded_interrupts)
{
	struct mig_stream image = {};
	struct mock *m = &self->m;
	int fd;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	put(_metadata, m, CONFIG, MSIX_CONTROL, MSIX_FUNCTION_MASK, 1);
	raise_irq(_metadata, m, 3);
	take_image(_metadata, &m->dev, &image);
	ASSERT_EQ(0, mig_reset(&m->dev));
	fd = go(_metadata, &m->dev, MIG_RESUMING);
	put(_metadata, m, CONFIG, MSIX_CONTROL, MSIX_FUNCTION_MASK, 1);
	load_all(_metadata, fd, &image);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	move_on(_metadata, &m->dev, MIG_RUNNING);
	close(fd);
	EXPECT_EQ(8U, pending(_metadata, m));
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("a restored function mask masks interrupts loaded from the stream");
	put(_metadata, m, CONFIG, MSIX_CONTROL, 0, 1);
	EXPECT_EQ(1000U, all_signals(self->fds));
	mig_stream_free(&image);
}

/* An MSI-X message is a write of the device to memory. */
TEST_F(irq, waits_without_bus_mastering)
{
	struct mock *m = &self->m;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	put(_metadata, m, CONFIG, 4, 2, 2);
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 1);
	raise_irq(_metadata, m, 3);
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("without bus mastering the device delivers no interrupt");
	EXPECT_EQ(10U, pending(_metadata, m))
		PROMISE("interrupts that cannot be sent are pending");
	ASSERT_EQ(0, set_none(m, TRIGGER, 0, 1));
	EXPECT_EQ(1U, all_signals(self->fds))
		PROMISE("a trigger by the user needs no message, like in vfio-pci");
	EXPECT_EQ(10U, pending(_metadata, m));
	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(1010U, all_signals(self->fds))
		PROMISE("pending interrupts are delivered once when bus mastering is enabled");
	EXPECT_EQ(0U, pending(_metadata, m));
}

/* ---- Arguments of SET_IRQS ---- */

struct call {
	const char *what;
	__u32 index, flags, start, count;
	size_t size;
	int want;
};

static void expect_calls(struct __test_metadata *_metadata, const struct mock *m,
			 const struct call *calls, unsigned int nr, const void *data)
{
	unsigned int i;

	for (i = 0; i < nr; i++) {
		EXPECT_EQ(calls[i].want,
			  mig_set_irqs(&m->dev, calls[i].index, calls[i].flags,
				       calls[i].start, calls[i].count, data, calls[i].size))
			PROMISE("SET_IRQS has the expected result for %s", calls[i].what);
	}
}

TEST_F(irq, arguments_invalid_for_all_indexes)
{
	static const struct call calls[] = {
		{ "an index that does not exist",
		  VFIO_PCI_NUM_IRQS, DATA_EVENTFD | TRIGGER, 0, 1, 4, -EINVAL },
		{ "a start past the end", MSIX, DATA_EVENTFD | TRIGGER, 4, 1, 4, -EINVAL },
		{ "a start past the end and no vectors",
		  MSIX, DATA_NONE | TRIGGER, 4, 0, 0, -EINVAL },
		{ "a range past the end", MSIX, DATA_EVENTFD | TRIGGER, 1, 4, 16, -EINVAL },
		{ "a count that wraps", MSIX, DATA_EVENTFD | TRIGGER, 1, ~0U, 4, -EINVAL },
		{ "too few eventfds",
		  MSIX, DATA_EVENTFD | TRIGGER, 0, 2, 4, -EINVAL },
		{ "too few bools", MSIX, DATA_BOOL | MASK, 0, 4, 3, -EINVAL },
		{ "no data type", MSIX, TRIGGER, 0, 1, 4, -EINVAL },
		{ "two data types",
		  MSIX, DATA_EVENTFD | DATA_BOOL | TRIGGER, 0, 1, 4, -EINVAL },
		{ "an unknown flag", MSIX, DATA_NONE | TRIGGER | 1 << 12, 0, 1, 0, -EINVAL },
		{ "INTx, which does not exist",
		  VFIO_PCI_INTX_IRQ_INDEX, DATA_EVENTFD | TRIGGER, 0, 1, 4, -EINVAL },
		{ "disabling INTx",
		  VFIO_PCI_INTX_IRQ_INDEX, DATA_NONE | TRIGGER, 0, 0, 0, -EINVAL },
		{ "MSI, which does not exist",
		  VFIO_PCI_MSI_IRQ_INDEX, DATA_EVENTFD | TRIGGER, 0, 1, 4, -EINVAL },
		{ "ERR, which does not exist",
		  VFIO_PCI_ERR_IRQ_INDEX, DATA_EVENTFD | TRIGGER, 0, 1, 4, -EINVAL },
		{ "no action", MSIX, DATA_NONE, 0, 1, 0, -ENOTTY },
		{ "two actions", MSIX, DATA_NONE | TRIGGER | MASK, 0, 1, 0, -ENOTTY },
		{ "both masks", MSIX, DATA_NONE | MASK | UNMASK, 0, 1, 0, -ENOTTY },
		{ "masking REQ", REQ, DATA_NONE | MASK, 0, 1, 0, -ENOTTY },
		{ "unmasking REQ", REQ, DATA_BOOL | UNMASK, 0, 1, 1, -ENOTTY },
		{ "a second REQ vector", REQ, DATA_EVENTFD | TRIGGER, 0, 2, 8, -EINVAL },
	};
	struct mock *m = &self->m;
	struct {
		struct vfio_irq_set set;
		int fd;
	} raw;

	/* The same whether MSI-X is on or off. */
	expect_calls(_metadata, m, calls, ARRAY_SIZE(calls), self->fds);
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	expect_calls(_metadata, m, calls, ARRAY_SIZE(calls), self->fds);

	raw.set = (struct vfio_irq_set){
		.argsz = sizeof(raw.set) - 1, .flags = DATA_NONE | TRIGGER,
		.index = MSIX, .count = 1,
	};
	EXPECT_ERRNO(EINVAL, ioctl(m->dev.fd, VFIO_DEVICE_SET_IRQS, &raw))
		PROMISE("argsz must cover the structure");
	EXPECT_ERRNO(EFAULT, ioctl(m->dev.fd, VFIO_DEVICE_SET_IRQS, NULL));
	EXPECT_EQ(0U, all_signals(self->fds))
		PROMISE("a refused SET_IRQS has no effect");
}

TEST_F(irq, msix_arguments)
{
	static const struct call off[] = {
		{ "triggering disabled MSI-X",
		  MSIX, DATA_NONE | TRIGGER, 0, 1, 0, -EINVAL },
		{ "bools for disabled MSI-X", MSIX, DATA_BOOL | TRIGGER, 0, 1, 1, -EINVAL },
		{ "disabling disabled MSI-X",
		  MSIX, DATA_NONE | TRIGGER, 0, 0, 0, -EINVAL },
		{ "masking disabled MSI-X", MSIX, DATA_NONE | MASK, 0, 1, 0, -EINVAL },
		{ "unmasking disabled MSI-X",
		  MSIX, DATA_BOOL | UNMASK, 0, 1, 1, -EINVAL },
		{ "enabling MSI-X without vectors",
		  MSIX, DATA_EVENTFD | TRIGGER, 0, 0, 0, -ERANGE },
	};
	static const struct call on[] = {
		{ "no eventfds", MSIX, DATA_EVENTFD | TRIGGER, 0, 0, 0, 0 },
		{ "no bools", MSIX, DATA_BOOL | TRIGGER, 0, 0, 0, 0 },
		{ "more data than needed", MSIX, DATA_EVENTFD | TRIGGER, 3, 1, 16, 0 },
		{ "an eventfd for MASK", MSIX, DATA_EVENTFD | MASK, 0, 1, 4, -ENOTTY },
		{ "an eventfd for UNMASK",
		  MSIX, DATA_EVENTFD | UNMASK, 0, 1, 4, -ENOTTY },
	};
	struct mock *m = &self->m;
	int bad[2] = { self->fds[1], 999 };

	expect_calls(_metadata, m, off, ARRAY_SIZE(off), self->fds);
	EXPECT_EQ(-EBADF, set_eventfds(m, 1, 1, &bad[1]));
	expect_calls(_metadata, m, off, ARRAY_SIZE(off), self->fds);

	/* A negative eventfd enables MSI-X, too. */
	bad[1] = -1;
	ASSERT_EQ(0, set_eventfds(m, 0, 1, &bad[1]));
	EXPECT_EQ(0, set_none(m, TRIGGER, 0, 0));
	expect_calls(_metadata, m, off, ARRAY_SIZE(off), self->fds);

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	expect_calls(_metadata, m, on, ARRAY_SIZE(on), self->fds);
	/* That set the eventfd of vector 0 for vector 3. */
	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));

	bad[1] = 999;
	EXPECT_EQ(-EBADF, set_eventfds(m, 0, 2, bad))
		PROMISE("a closed descriptor is refused");
	bad[1] = m->dev.fd;
	EXPECT_EQ(-EINVAL, set_eventfds(m, 0, 2, bad))
		PROMISE("a descriptor that is not an eventfd is refused");
	raise_irq(_metadata, m, 0);
	raise_irq(_metadata, m, 1);
	EXPECT_EQ(11U, all_signals(self->fds))
		PROMISE("a refused SET_IRQS changes nothing");
}

TEST_F(irq, req_arguments)
{
	static const struct call off[] = {
		{ "triggering REQ without an eventfd",
		  REQ, DATA_NONE | TRIGGER, 0, 1, 0, -EINVAL },
		{ "disabling REQ without an eventfd",
		  REQ, DATA_NONE | TRIGGER, 0, 0, 0, -EINVAL },
		{ "a bool for REQ without an eventfd",
		  REQ, DATA_BOOL | TRIGGER, 0, 1, 1, 0 },
		{ "no bool for REQ", REQ, DATA_BOOL | TRIGGER, 0, 0, 0, -EINVAL },
		{ "no eventfd for REQ", REQ, DATA_EVENTFD | TRIGGER, 0, 0, 0, -EINVAL },
	};
	struct mock *m = &self->m;
	int fd = self->fds[0], bad;
	__u8 flag = 0;

	expect_calls(_metadata, m, off, ARRAY_SIZE(off), &fd);
	bad = 999;
	EXPECT_EQ(-EBADF, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &bad, 4));
	bad = m->dev.fd;
	EXPECT_EQ(-EINVAL, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &bad, 4));

	ASSERT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &fd, 4));
	bad = -2;
	EXPECT_EQ(-EINVAL, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &bad, 4))
		PROMISE("only -1 removes the eventfd of REQ");
	EXPECT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_NONE | TRIGGER, 0, 1, NULL, 0));
	EXPECT_EQ(1U, signals(fd))
		PROMISE("the user can trigger the request interrupt");
	EXPECT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_BOOL | TRIGGER, 0, 1, &flag, 1));
	EXPECT_EQ(0U, signals(fd));
	flag = 2;
	EXPECT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_BOOL | TRIGGER, 0, 1, &flag, 1));
	EXPECT_EQ(1U, signals(fd));
	/* REQ belongs to the host, not to the device. */
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	EXPECT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_NONE | TRIGGER, 0, 1, NULL, 0));
	EXPECT_EQ(1U, signals(fd))
		PROMISE("the request interrupt is delivered while the device is stopped");
	ASSERT_EQ(0, mig_reset(&m->dev));
	EXPECT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_NONE | TRIGGER, 0, 1, NULL, 0));
	EXPECT_EQ(1U, signals(fd))
		PROMISE("the request interrupt survives a reset");

	bad = -1;
	ASSERT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &bad, 4));
	expect_calls(_metadata, m, off, ARRAY_SIZE(off), &fd);
	ASSERT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &fd, 4));
	ASSERT_EQ(0, mig_set_irqs(&m->dev, REQ, DATA_NONE | TRIGGER, 0, 0, NULL, 0));
	expect_calls(_metadata, m, off, ARRAY_SIZE(off), &fd);
	EXPECT_EQ(0U, signals(fd));
}

TEST_F(irq, unreadable_data_is_efault)
{
	size_t page = PAGE;
	struct vfio_irq_set *set;
	struct mock *m = &self->m;
	__u8 *map;

	map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, map);
	ASSERT_EQ(0, munmap(map + page, page));
	set = (void *)(map + page - sizeof(*set));
	*set = (struct vfio_irq_set){
		.argsz = sizeof(*set) + 4, .flags = DATA_EVENTFD | TRIGGER,
		.index = MSIX, .count = 1,
	};
	EXPECT_ERRNO(EFAULT, ioctl(m->dev.fd, VFIO_DEVICE_SET_IRQS, set));
	/* Like vfio-pci, which reads the data before it checks the action. */
	set->flags = DATA_EVENTFD | MASK | UNMASK;
	EXPECT_ERRNO(EFAULT, ioctl(m->dev.fd, VFIO_DEVICE_SET_IRQS, set));
	set->flags = DATA_NONE | TRIGGER;
	EXPECT_ERRNO(EINVAL, ioctl(m->dev.fd, VFIO_DEVICE_SET_IRQS, set))
		PROMISE("data that is not needed is not read");
	munmap(map, page);
}

/* ---- No lost interrupts ---- */

struct disturber {
	pthread_t thread;
	const struct mock *m;
	const int *fds;
	atomic_bool end;
	int failed;
};

/* Holds interrupts back in all possible ways, and allows them again. */
static void *disturber_main(void *arg)
{
	struct disturber *d = arg;
	__u32 masked = 1, clear = 0;
	int none = -1;

	while (!atomic_load(&d->end)) {
		d->failed |= set_none(d->m, MASK, 0, VECTORS);
		d->failed |= set_none(d->m, UNMASK, 0, VECTORS);
		d->failed |= set_eventfds(d->m, 0, 1, &none);
		d->failed |= set_eventfds(d->m, 0, 1, d->fds);
		mock_write(d->m, BAR0, VECTOR_CONTROL(0), &masked, 4);
		mock_write(d->m, BAR0, VECTOR_CONTROL(0), &clear, 4);
		mock_write(d->m, CONFIG, MSIX_CONTROL, &(__u8){ MSIX_FUNCTION_MASK }, 1);
		mock_write(d->m, CONFIG, MSIX_CONTROL, &clear, 1);
		mock_write(d->m, CONFIG, 4, &(__u16){ 2 }, 2);
		mock_write(d->m, CONFIG, 4, &(__u16){ 6 }, 2);
		d->failed |= mig_set_state(&d->m->dev, MIG_STOP, NULL);
		d->failed |= mig_set_state(&d->m->dev, MIG_RUNNING, NULL);
	}
	return NULL;
}

TEST_F_TIMEOUT(irq, no_interrupt_is_lost, 120)
{
	struct disturber d = { .m = &self->m, .fds = self->fds };
	struct mock *m = &self->m;
	int i;

	ASSERT_EQ(0, set_eventfds(m, 0, VECTORS, self->fds));
	ASSERT_EQ(0, pthread_create(&d.thread, NULL, disturber_main, &d));
	for (i = 0; i < 1000; i++) {
		if (set_none(m, TRIGGER, 0, 1))
			break;
		if (mig_poll(self->fds[0], POLLIN, mig_hang_seconds() * 1000) != POLLIN)
			break;
		if (signals(self->fds[0]) != 1)
			break;
	}
	atomic_store(&d.end, true);
	ASSERT_TRUE(joined(d.thread));
	EXPECT_EQ(1000, i)
		PROMISE("each interrupt arrives once, however it was held back");
	EXPECT_EQ(0, d.failed);
	EXPECT_EQ(0U, all_signals(self->fds));
	EXPECT_EQ(0U, pending(_metadata, m));
}

/* ---- Removal of a device in use ---- */

/* Waits for a line of the kernel log that contains both words. */
static bool kernel_says(int kmsg, const char *who, const char *what)
{
	struct timespec now, end;
	char line[2048];
	ssize_t len;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += mig_hang_seconds();
	do {
		len = read(kmsg, line, sizeof(line) - 1);
		if (len > 0) {
			line[len] = 0;
			if (strstr(line, who) && strstr(line, what))
				return true;
		} else if (len < 0 && errno == EAGAIN) {
			mig_poll(kmsg, POLLIN, 1000);
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec < end.tv_sec);
	return false;
}

static int open_kernel_log(void)
{
	int kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (kmsg >= 0)
		lseek(kmsg, 0, SEEK_END);
	return kmsg;
}

TEST_F_TIMEOUT(irq, removal_signals_request, 60)
{
	int req = eventfd(0, EFD_CLOEXEC), kmsg = open_kernel_log();
	struct guest guest;

	ASSERT_LE(0, kmsg);
	create_guest(_metadata, &guest, &self->m);
	ASSERT_EQ(0, mig_set_irqs(&guest.dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &req,
				  sizeof(req)));
	ASSERT_EQ(0, mig_set_state(&guest.dev, MIG_STOP, NULL));
	ASSERT_EQ(0, pthread_create(&guest.remover, NULL, remover_main, &guest));
	EXPECT_EQ(POLLIN, mig_poll(req, POLLIN, mig_hang_seconds() * 1000))
		PROMISE("the removal of an open device signals the request interrupt");
	EXPECT_TRUE(kernel_says(kmsg, basename(guest.path),
				"Relaying device request to user (#0)"))
		PROMISE("the log names the reason for the wait of a removal");
	EXPECT_EQ(0, mig_reset(&guest.dev))
		PROMISE("the device works until it is closed");
	mig_close(&guest.dev);
	ASSERT_TRUE(joined(guest.remover))
		PROMISE("the removal continues when the device is closed");
	EXPECT_EQ(0, guest.ret);
	EXPECT_EQ(-1, access(guest.path, F_OK));
	close(kmsg);
}

TEST_F_TIMEOUT(irq, removal_repeats_request, 90)
{
	int req = eventfd(0, EFD_CLOEXEC), kmsg = open_kernel_log();
	struct guest guest;

	if (variant->backend != MIG_GROUP)
		SKIP(return, "takes 10 seconds and does not depend on the backend");
	ASSERT_LE(0, kmsg);
	create_guest(_metadata, &guest, &self->m);
	ASSERT_EQ(0, pthread_create(&guest.remover, NULL, remover_main, &guest));
	EXPECT_TRUE(kernel_says(kmsg, basename(guest.path),
				"No device request channel registered"))
		PROMISE("the log reports that the user cannot be asked");
	ASSERT_EQ(0, mig_set_irqs(&guest.dev, REQ, DATA_EVENTFD | TRIGGER, 0, 1, &req,
				  sizeof(req)));
	EXPECT_EQ(POLLIN, mig_poll(req, POLLIN, mig_hang_seconds() * 1000))
		PROMISE("a waiting removal repeats its request every 10 seconds");
	mig_close(&guest.dev);
	ASSERT_TRUE(joined(guest.remover));
	EXPECT_EQ(0, guest.ret);
	EXPECT_EQ(-1, access(guest.path, F_OK));
	close(kmsg);
}

MIG_HARNESS_MAIN(mock_options)
