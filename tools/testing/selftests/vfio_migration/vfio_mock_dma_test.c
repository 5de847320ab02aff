// SPDX-License-Identifier: GPL-2.0
/*
 * DMA of the mock migratable device vfio_mock: transfers and their errors, states
 * without DMA, and migration of the engine.
 *
 *	./vfio_mock_dma_test --medium "SOURCE TARGET"
 *
 * with the sysfs paths of two mediated devices. run_mock.sh creates them and runs
 * this. --rounds N multiplies the number of random transfers by N.
 */
#include <signal.h>
#include <sys/wait.h>

#include "mock_dma.h"

#define dma_data	FIXTURE_DATA(dma)
#define peers_data	FIXTURE_DATA(peers)

#define IOVA	0x40000000ULL

/* Time to watch for changes that must not occur; any length is correct. */
#define LOOK_US	20000

FIXTURE(dma)
{
	struct mock m;
	struct mock dst;
	struct ram ram;
	__u64 random;
};

MIG_EACH_BACKEND(dma);

FIXTURE_SETUP(dma)
{
	MOCK_OPEN_OR_SKIP(&self->m, "medium", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "medium", 1, variant->backend);
	ram_make(_metadata, &self->ram, IOVA, 2 * self->m.size);
	ram_map(_metadata, &self->ram, &self->m);
}

FIXTURE_TEARDOWN(dma)
{
	mock_close(&self->m);
	mock_close(&self->dst);
}

static __u64 pick(dma_data *self, __u64 limit)
{
	return vfio_mock_mix(++self->random) % limit;
}

/* A random transfer inside windows of this size. */
static struct dma_desc pick_transfer(dma_data *self, __u64 window)
{
	struct dma_desc d = {
		.op = READ + pick(self, 4),
		.seed = vfio_mock_mix(++self->random),
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	switch (pick(self, 8)) {
	case 0:
		d.len = 1;
		break;
	case 1 ... 3:
		d.len = 1 + pick(self, 64);
		break;
	case 4 ... 5:
		d.len = 1 + pick(self, 3 * PAGE);
		break;
	case 6:
		d.len = (1 + pick(self, 3)) * PAGE;
		break;
	default:
		d.len = 1 + pick(self, window);
	}
	d.addr = pick(self, window - d.len + 1);
	d.iova = pick(self, window - d.len + 1);
	if (pick(self, 3) == 0) {
		d.addr -= d.addr % PAGE;
		d.iova -= d.iova % PAGE;
	}
	d.iova += self->ram.iova;
	return d;
}

static void apply(dma_data *self, struct mock *m, const struct dma_desc *d,
		  __u64 bytes)
{
	dma_apply(d, m->want, ram_want(&self->ram, d->iova), bytes);
}

static void apply_rounds(dma_data *self, struct mock *m,
			 const struct dma_desc *d)
{
	dma_apply_rounds(d, m->want, ram_want(&self->ram, d->iova));
}

static void expect_all(struct __test_metadata *_metadata, dma_data *self,
		       struct mock *m, const char *when)
{
	expect_ram(_metadata, &self->ram, when);
	expect_memory(_metadata, m, m->want, when);
}

/* Fills both memories with distinct contents. */
static void scatter(struct __test_metadata *_metadata, dma_data *self)
{
	fill(_metadata, &self->m, 0, self->m.size, 0xd1ce);
	vfio_mock_pattern(self->ram.mem, 0x4a11, 0, self->ram.size);
	memcpy(self->ram.want, self->ram.mem, self->ram.size);
}

/* ---- Transfers ---- */

TEST_F_TIMEOUT(dma, transfers_of_any_shape, 1800)
{
	unsigned int count = mig_times(500), i, n, vector, v;
	int fds[VFIO_MOCK_MSIX_VECTORS];
	__u64 bytes = 0, window = self->m.size;
	struct mock *m = &self->m;
	struct dma_desc d;

	scatter(_metadata, self);
	open_vectors(_metadata, m, fds);
	for (i = 0; i < count; i++) {
		n = pick(self, DESCS);
		d = pick_transfer(self, window);
		/* The whole memory, in each direction. */
		if (i < 4) {
			d.op = READ + i;
			d.len = window;
			d.addr = 0;
			d.iova = self->ram.iova + 1 + i;
		}
		vector = pick(self, VFIO_MOCK_MSIX_VECTORS + 1);
		if (vector < VFIO_MOCK_MSIX_VECTORS)
			d.irq_vector = vector;

		dma_set(_metadata, m, n, &d);
		dma_ring(_metadata, m, n);
		if (vector < VFIO_MOCK_MSIX_VECTORS) {
			EXPECT_EQ(POLLIN, mig_poll(fds[vector], POLLIN,
						   mig_hang_seconds() * 1000))
				PROMISE("the vector of a descriptor is signalled when it ends");
			d = dma_get(_metadata, m, n);
		} else {
			d = dma_wait(_metadata, m, n);
		}
		expect_complete(_metadata, &d, "a good transfer");
		for (v = 0; v < VFIO_MOCK_MSIX_VECTORS; v++) {
			EXPECT_EQ((__u64)(v == vector), taken(fds[v]))
				PROMISE("a transfer signals its vector (%u) once, and no other (%u)",
					vector, v);
		}
		bytes += d.len;
		EXPECT_EQ(i + 1, reg64(m, DMA_DONE))
			PROMISE("DMA_DONE is the number of ended descriptors");
		EXPECT_EQ(bytes, reg64(m, DMA_BYTES))
			PROMISE("DMA_BYTES is the number of bytes moved");

		apply(self, m, &d, d.len);
		expect_ram(_metadata, &self->ram, "after a transfer");
		if (d.op == READ || d.op == CHURN)
			expect_state_range(_metadata, m, d.addr, d.len, "after a transfer");
		if (i % 64 == 0)
			expect_memory(_metadata, m, m->want, "after transfers");
		if (_metadata->exit_code == KSFT_FAIL)
			TH_LOG("  transfer %u: op %u iova %#llx addr %#llx len %llu", i,
			       d.op, d.iova, d.addr, d.len);
		ASSERT_NE(KSFT_FAIL, _metadata->exit_code);
	}
	expect_all(_metadata, self, m, "after all transfers");
	EXPECT_EQ(0U, reg32(m, DMA_STATUS))
		PROMISE("all descriptors belong to software now");
}

/* The range for DMA starts in the middle of a huge page, and IOVAs are aligned otherwise. */
TEST_F_TIMEOUT(dma, huge_pages_hold_any_transfer, 600)
{
	unsigned int count = mig_times(100), i;
	struct ram *ram = &self->ram;
	struct mock *m = &self->m;
	struct dma_desc d;
	__u8 *huge;

	huge = huge_memory(_metadata, ram->size + HUGE_PAGE);
	if (!huge)
		SKIP(return, "the kernel has no huge pages of 2 MiB");
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, ram->iova, ram->size));
	ASSERT_EQ(0, munmap(ram->mem, ram->size));
	ram->mem = huge + HUGE_PAGE / 2;
	ram_map(_metadata, ram, m);
	scatter(_metadata, self);
	for (i = 0; i < count; i++) {
		d = pick_transfer(self, m->size);
		d.iova += pick(self, ram->size - m->size + 1);
		d = dma_run(_metadata, m, 0, &d);
		expect_complete(_metadata, &d, "a transfer in huge pages");
		apply(self, m, &d, d.len);
		expect_ram(_metadata, ram, "after a transfer in huge pages");
		ASSERT_NE(KSFT_FAIL, _metadata->exit_code);
	}
	expect_all(_metadata, self, m, "after transfers in huge pages");
	for (i = 0; i < HUGE_PAGE / 2; i++) {
		ASSERT_EQ(0, huge[i] | ram->mem[ram->size + i])
			PROMISE("nothing is written around the range for DMA");
	}
}

/* Queued descriptors; @order is the order of their doorbells. */
struct queue {
	struct dma_desc desc[DESCS];
	unsigned int order[DESCS];
	unsigned int nr;
};

/* Queues @nr random transfers that overlap, so that their order matters. */
static void queue_up(struct __test_metadata *_metadata, dma_data *self,
		     struct mock *m, struct queue *q, unsigned int nr)
{
	unsigned int i, j, swap;

	for (i = 0; i < DESCS; i++)
		q->order[i] = i;
	for (i = DESCS - 1; i; i--) {
		j = pick(self, i + 1);
		swap = q->order[i];
		q->order[i] = q->order[j];
		q->order[j] = swap;
	}
	q->nr = nr;
	for (i = 0; i < nr; i++) {
		q->desc[q->order[i]] = pick_transfer(self, 4 * PAGE);
		dma_set(_metadata, m, q->order[i], &q->desc[q->order[i]]);
	}
	for (i = 0; i < nr; i++)
		dma_ring(_metadata, m, q->order[i]);
}

/* Waits for them, and checks that they ran in order. */
static void expect_in_order(struct __test_metadata *_metadata, dma_data *self,
			    struct mock *m, const struct queue *q)
{
	struct dma_desc d;
	unsigned int i;

	for (i = 0; i < q->nr; i++) {
		d = dma_wait(_metadata, m, q->order[i]);
		expect_complete(_metadata, &d, "a queued transfer");
		apply(self, m, &d, d.len);
	}
	expect_all(_metadata, self, m,
		   "after transfers in the order of the doorbells");
}

TEST_F_TIMEOUT(dma, queue_runs_in_order, 600)
{
	unsigned int count = mig_times(20), i;
	struct mock *m = &self->m;
	struct queue q;

	scatter(_metadata, self);
	for (i = 0; i < count; i++) {
		queue_up(_metadata, self, m, &q, DESCS);
		expect_in_order(_metadata, self, m, &q);
		EXPECT_EQ((i + 1) * DESCS, reg64(m, DMA_DONE));
	}
}

/* A thread of a client that divides the descriptors among its threads. */
struct user {
	pthread_t thread;
	struct __test_metadata *md;
	dma_data *self;
	unsigned int n;
	bool good;
};

static void *user_main(void *arg)
{
	struct user *u = arg;
	struct __test_metadata *_metadata = u->md;
	struct mock *m = &u->self->m;
	__u64 window = m->size / DESCS;
	struct dma_desc d = {
		.irq_vector = VFIO_MOCK_IRQ_NONE,
		.addr = u->n * window, .iova = u->self->ram.iova + u->n * window,
	};
	unsigned int i;

	for (i = 0; i < 50; i++) {
		d.op = i % 2 ? READ : FILL;
		d.len = i % 2 ? d.len : 1 + vfio_mock_mix(u->n * 1000 + i) % window;
		d.seed = i;
		d = dma_run(_metadata, m, u->n, &d);
		if (d.status != VFIO_MOCK_DMA_COMPLETE || d.pos != d.len)
			return NULL;
		/* Each thread has a memory area of its own in both models. */
		dma_apply(&d, m->want, ram_want(&u->self->ram, d.iova), d.len);
	}
	u->good = true;
	return NULL;
}

TEST_F_TIMEOUT(dma, descriptors_work_independently, 120)
{
	struct user users[DESCS];
	unsigned int i;

	for (i = 0; i < DESCS; i++) {
		users[i] = (struct user){ .md = _metadata, .self = self, .n = i };
		ASSERT_EQ(0, pthread_create(&users[i].thread, NULL, user_main, &users[i]));
	}
	for (i = 0; i < DESCS; i++) {
		pthread_join(users[i].thread, NULL);
		EXPECT_TRUE(users[i].good)
			PROMISE("descriptor %u works independently of the others", i);
	}
	expect_all(_metadata, self, &self->m, "after the transfers of all threads");
	EXPECT_EQ(50U * DESCS, reg64(&self->m, DMA_DONE));
}

/* ---- Continuous transfers ---- */

TEST_F_TIMEOUT(dma, continuous_transfers_match_their_position, 120)
{
	const struct {
		__u64 len;
		__u32 step;
		__u32 period;
	} shapes[] = {
		{ 4 * PAGE, 512, 1 },
		{ 3 * PAGE + 5, 1000, 20 },	/* a step spans two rounds */
		{ 2 * PAGE, 0, 100 },		/* a step is a whole round */
		{ 7, 1, 1 },
		{ 40, 4000, 10 },		/* a step longer than the range */
	};
	struct mock *m = &self->m;
	struct dma_desc d;
	unsigned int i, op;
	__u64 step;

	scatter(_metadata, self);
	for (i = 0; i < ARRAY_SIZE(shapes); i++) {
		for (op = READ; op <= CHURN; op++) {
			d = (struct dma_desc){
				.op = op, .iova = IOVA + 77 + i, .addr = 99 + i,
				.len = shapes[i].len, .step = shapes[i].step,
				.period = shapes[i].period, .seed = 1000 * i + op,
				.irq_vector = VFIO_MOCK_IRQ_NONE,
			};
			dma_set(_metadata, m, op, &d);
			dma_ring(_metadata, m, op);
			dma_wait_moved(_metadata, m, op, 5 * d.len / 2);
			d = dma_abort(_metadata, m, op);
			expect_ended(_metadata, &d, VFIO_MOCK_DMA_ABORTED, 0, d.pos,
				     "a continuous transfer that is aborted");
			step = shapes[i].step ? shapes[i].step : d.len;
			EXPECT_TRUE(d.pos % step == 0 || d.pos % d.len == 0)
				PROMISE("a step moves STEP bytes unless aborted at the end of the range: %llu by %llu",
					d.pos, step);
			apply_rounds(self, m, &d);
			expect_all(_metadata, self, m, "after a continuous transfer");
		}
	}
}

TEST_F_TIMEOUT(dma, all_descriptors_can_be_continuous, 120)
{
	struct mock *m = &self->m;
	struct dma_desc d[DESCS];
	unsigned int i;

	scatter(_metadata, self);
	for (i = 0; i < DESCS; i++) {
		d[i] = (struct dma_desc){
			.op = i % 4 + 1, .len = 3 * PAGE - i, .step = 100 + 100 * i,
			.period = 1 + i, .iova = IOVA + (2 * i + 1) * 4 * PAGE + i,
			.addr = 2 * i * 4 * PAGE + 2 * i, .seed = (__u64)i << 32,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		dma_set(_metadata, m, i, &d[i]);
		dma_ring(_metadata, m, i);
	}
	for (i = 0; i < DESCS; i++)
		dma_wait_moved(_metadata, m, i, 2 * d[i].len);
	EXPECT_EQ(VFIO_MOCK_DMA_STATUS_BUSY, (int)reg32(m, DMA_STATUS));
	set32(m, DMA_ABORT, VFIO_MOCK_DMA_ALL);
	EXPECT_EQ(0U, reg32(m, DMA_ERROR));
	for (i = 0; i < DESCS; i++) {
		d[i] = dma_wait(_metadata, m, i);
		EXPECT_EQ(VFIO_MOCK_DMA_ABORTED, (int)d[i].status)
			PROMISE("an abort of all descriptors aborts descriptor %u", i);
		apply_rounds(self, m, &d[i]);
	}
	EXPECT_EQ(0U, reg32(m, DMA_STATUS));
	EXPECT_EQ((__u64)DESCS, reg64(m, DMA_DONE));
	expect_all(_metadata, self, m, "after continuous transfers");
}

TEST_F_TIMEOUT(dma, queued_transfers_run_between_steps, 60)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = PAGE, .step = 64,
		.period = 1, .seed = 1, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	struct queue q;

	scatter(_metadata, self);
	d.iova = IOVA + m->size;
	dma_set(_metadata, m, 15, &d);
	dma_ring(_metadata, m, 15);
	d.period = FOREVER;
	d.iova += PAGE;
	dma_set(_metadata, m, 14, &d);
	dma_ring(_metadata, m, 14);
	q.nr = 3;
	for (q.nr = 0; q.nr < 10; q.nr++) {
		q.order[q.nr] = q.nr;
		q.desc[q.nr] = pick_transfer(self, 4 * PAGE);
		dma_set(_metadata, m, q.nr, &q.desc[q.nr]);
		dma_ring(_metadata, m, q.nr);
	}
	while (q.nr--) {
		d = dma_wait(_metadata, m, q.nr);
		expect_complete(_metadata, &d, "a transfer among continuous ones");
	}
	for (q.nr = 0; q.nr < 10; q.nr++)
		apply(self, m, &q.desc[q.nr], q.desc[q.nr].len);
	dma_wait_moved(_metadata, m, 15, 3 * PAGE);
	dma_wait_moved(_metadata, m, 14, 64);
	d = dma_abort(_metadata, m, 15);
	apply_rounds(self, m, &d);
	d = dma_abort(_metadata, m, 14);
	EXPECT_EQ(64U, d.pos)
		PROMISE("one step runs in each period");
	apply_rounds(self, m, &d);
	expect_all(_metadata, self, m, "after a mix of transfers");
}

TEST_F_TIMEOUT(dma, continuous_transfer_signals_each_round, 60)
{
	int fds[VFIO_MOCK_MSIX_VECTORS];
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = 1000, .step = 300,
		.period = 1, .irq_vector = 2,
	};
	__u64 signals = 0, least;

	open_vectors(_metadata, m, fds);
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	dma_wait_moved(_metadata, m, 0, 10 * d.len);
	d = dma_abort(_metadata, m, 0);
	/* An abort at the end of a round is the same event. */
	least = d.pos / d.len + !!(d.pos % d.len);
	WAIT_FOR((signals += taken(fds[2])) >= least,
		 "a signal at the end of each round and of the descriptor: %llu times, not %llu",
		 signals, least);
	usleep(LOOK_US);
	signals += taken(fds[2]);
	EXPECT_GE(d.pos / d.len + 1, signals)
		PROMISE("no other signals than at the end of rounds and of the descriptor");
	EXPECT_EQ(0U, taken(fds[0]) + taken(fds[1]) + taken(fds[3]));
}

/* ---- Access to descriptors ---- */

/* Writes to a descriptor owned by the device must not change it. */
static void expect_immutable(struct __test_metadata *_metadata, dma_data *self,
			     unsigned int n, const char *what)
{
	const __u64 at = VFIO_MOCK_DMA_DESC(n);
	struct dma_desc before = dma_get(_metadata, &self->m, n), now;
	struct mock *m = &self->m;
	__u8 block[sizeof(now)];
	__u64 i, len;

	memset(block, 0x5a, sizeof(block));
	for (i = 0; i < sizeof(now); i++) {
		len = 1 + pick(self, 8);
		if (i + len > sizeof(now))
			len = sizeof(now) - i;
		put(_metadata, m, BAR0, at + i, vfio_mock_mix(i), len);
	}
	ASSERT_EQ((ssize_t)sizeof(block), mock_write(m, BAR0, at, block, sizeof(block)));
	now = dma_get(_metadata, m, n);
	EXPECT_EQ(0, memcmp(&before, &now, sizeof(now)))
		PROMISE("%s descriptor cannot be written", what);
}

TEST_F(dma, descriptor_of_the_device_cannot_be_written)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = PAGE, .step = 64,
		.period = FOREVER, .irq_vector = 3, .addr = 123, .seed = 99,
	}, now;
	__u8 all[DESCS * sizeof(d)];
	unsigned int n = 5;

	dma_set(_metadata, m, n, &d);
	now = dma_get(_metadata, m, n);
	EXPECT_EQ(0, memcmp(&d, &now, sizeof(d)))
		PROMISE("a descriptor reads back as written");
	dma_ring(_metadata, m, n);
	dma_wait_moved(_metadata, m, n, 64);
	expect_immutable(_metadata, self, n, "an active");

	/* A block write to all descriptors changes only the others. */
	memset(all, 0, sizeof(all));
	ASSERT_EQ((ssize_t)sizeof(all),
		  mock_write(m, BAR0, VFIO_MOCK_DMA_DESC(0), all, sizeof(all)));
	now = dma_get(_metadata, m, n);
	EXPECT_EQ(99U, now.seed);
	EXPECT_EQ(64U, now.pos);
	EXPECT_EQ(VFIO_MOCK_DMA_ACTIVE, (int)now.status);
	now = dma_get(_metadata, m, n + 1);
	EXPECT_EQ(0U, now.irq_vector)
		PROMISE("a descriptor owned by software can be written");

	dma_abort(_metadata, m, n);
	d.period = 0;
	d.len = 17;
	d = dma_run(_metadata, m, n, &d);
	expect_complete(_metadata, &d, "a descriptor that was aborted and is used again");

	if (!(m->dev.flags & VFIO_MIGRATION_P2P))
		return;
	move_on(_metadata, &m->dev, MIG_RUNNING_P2P);
	dma_ring(_metadata, m, n);
	now = dma_get(_metadata, m, n);
	EXPECT_EQ(VFIO_MOCK_DMA_QUEUED, (int)now.status);
	EXPECT_EQ(0U, now.pos)
		PROMISE("POS belongs to this run");
	expect_immutable(_metadata, self, n, "a queued");
}

TEST_F(dma, status_of_a_descriptor_is_read_only)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = 100,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	}, now;
	unsigned int i;

	for (i = offsetof(struct dma_desc, status); i < sizeof(d); i++)
		put(_metadata, m, BAR0, VFIO_MOCK_DMA_DESC(0) + i, 0xff, 1);
	now = dma_get(_metadata, m, 0);
	expect_ended(_metadata, &now, VFIO_MOCK_DMA_IDLE, 0, 0, "an unused descriptor");
	d = dma_run(_metadata, m, 0, &d);
	for (i = offsetof(struct dma_desc, status); i < sizeof(d); i++)
		put(_metadata, m, BAR0, VFIO_MOCK_DMA_DESC(0) + i, 0xff, 1);
	now = dma_get(_metadata, m, 0);
	EXPECT_EQ(0, memcmp(&d, &now, sizeof(d)))
		PROMISE("STATUS, ERROR and POS are read-only");
}

TEST_F(dma, descriptors_take_any_access)
{
	__u8 model[DESCS * sizeof(struct dma_desc)] = {}, seen[sizeof(model)];
	const unsigned int writable = offsetof(struct dma_desc, status);
	unsigned int i, j, at, len;
	struct mock *m = &self->m;
	__u64 value;

	for (i = 0; i < DESCS; i++)
		memset(model + i * sizeof(struct dma_desc) +
		       offsetof(struct dma_desc, irq_vector), 0xff, 4);
	ASSERT_EQ((ssize_t)sizeof(seen),
		  mock_read(m, BAR0, VFIO_MOCK_DMA_DESC(0), seen, sizeof(seen)));
	EXPECT_EQ(0, memcmp(model, seen, sizeof(seen)))
		PROMISE("descriptors are zero at power on, except for the vector");
	for (i = 0; i < 1000; i++) {
		at = pick(self, sizeof(model));
		len = 1 + pick(self, 8);
		if (at + len > sizeof(model))
			len = sizeof(model) - at;
		value = vfio_mock_mix(++self->random);
		put(_metadata, m, BAR0, VFIO_MOCK_DMA_DESC(0) + at, value, len);
		for (j = 0; j < len; j++)
			if ((at + j) % sizeof(struct dma_desc) < writable)
				model[at + j] = value >> (8 * j);
		value = get(_metadata, m, BAR0, VFIO_MOCK_DMA_DESC(0) + at, len);
		EXPECT_EQ(0, memcmp(&value, model + at, len))
			PROMISE("a write of %u bytes at %u of the descriptors changes only these bytes",
				len, at);
	}
	ASSERT_EQ((ssize_t)sizeof(seen),
		  mock_read(m, BAR0, VFIO_MOCK_DMA_DESC(0), seen, sizeof(seen)));
	EXPECT_EQ(0, memcmp(model, seen, sizeof(seen)))
		PROMISE("a block read of the descriptors works");
	EXPECT_EQ(0U, reg64(m, DMA_DONE))
		PROMISE("writes to descriptors start nothing");
}

TEST_F(dma, doorbell_and_abort_refuse_bad_descriptors)
{
	static const __u32 none[] = { DESCS, DESCS + 1, 0x100, 0x80000000, ~0U - 1 };
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = PAGE, .step = 64,
		.period = FOREVER, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	unsigned int i;

	dma_set(_metadata, m, 0, &d);
	for (i = 0; i < ARRAY_SIZE(none); i++) {
		dma_ring(_metadata, m, 0);
		set32(m, DMA_DOORBELL, none[i]);
		EXPECT_EQ(VFIO_MOCK_DMA_REFUSED_INDEX, (int)reg32(m, DMA_ERROR))
			PROMISE("there is no descriptor %u to queue", none[i]);
		dma_abort(_metadata, m, 0);
		set32(m, DMA_ABORT, none[i]);
		EXPECT_EQ(VFIO_MOCK_DMA_REFUSED_INDEX, (int)reg32(m, DMA_ERROR))
			PROMISE("there is no descriptor %u to abort", none[i]);
	}
	set32(m, DMA_DOORBELL, VFIO_MOCK_DMA_ALL);
	EXPECT_EQ(VFIO_MOCK_DMA_REFUSED_INDEX, (int)reg32(m, DMA_ERROR))
		PROMISE("only an abort is possible for all descriptors");

	dma_ring(_metadata, m, 0);
	set32(m, DMA_DOORBELL, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_REFUSED_BUSY, (int)reg32(m, DMA_ERROR))
		PROMISE("a descriptor owned by the device cannot be queued again");
	dma_wait_moved(_metadata, m, 0, 64);
	set32(m, DMA_DOORBELL, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_REFUSED_BUSY, (int)reg32(m, DMA_ERROR));
	d = dma_abort(_metadata, m, 0);
	EXPECT_EQ(64U, d.pos)
		PROMISE("a refused doorbell starts nothing");

	/* An abort of a descriptor owned by software has no effect. */
	d.period = 0;
	d = dma_run(_metadata, m, 0, &d);
	expect_complete(_metadata, &d, "a good transfer");
	set32(m, DMA_ABORT, 0);
	set32(m, DMA_ABORT, VFIO_MOCK_DMA_ALL);
	d = dma_get(_metadata, m, 0);
	expect_complete(_metadata, &d, "a transfer that was aborted after its end");
	d = dma_get(_metadata, m, 1);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_IDLE, 0, 0, "an abort of an unused descriptor");
}

TEST_F(dma, doorbell_and_abort_need_whole_writes)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = 100, .step = 64,
		.period = FOREVER, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	const __u64 bell = VFIO_MOCK_REG_DMA_DOORBELL, abort = VFIO_MOCK_REG_DMA_ABORT;
	struct {
		__u32 bell;
		__u32 abort;
	} both = { 1, 0 };

	dma_set(_metadata, m, 0, &d);
	dma_set(_metadata, m, 1, &d);
	put(_metadata, m, BAR0, bell, 0, 1);
	put(_metadata, m, BAR0, bell, 0, 2);
	put(_metadata, m, BAR0, bell, 0, 3);
	put(_metadata, m, BAR0, bell + 1, 0, 3);
	put(_metadata, m, BAR0, bell - 2, 0, 4);
	d = dma_get(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_IDLE, (int)d.status)
		PROMISE("DMA_DOORBELL acts only if one access writes all of its 4 bytes");
	dma_ring(_metadata, m, 0);
	put(_metadata, m, BAR0, abort, 0, 1);
	put(_metadata, m, BAR0, abort, ~0U, 2);
	put(_metadata, m, BAR0, abort + 2, ~0U, 2);
	put(_metadata, m, BAR0, abort + 2, ~0U, 4);
	d = dma_wait_moved(_metadata, m, 0, 64);

	/* One access to both registers does both. */
	ASSERT_EQ((ssize_t)sizeof(both), mock_write(m, BAR0, bell, &both, sizeof(both)));
	d = dma_wait(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_ABORTED, (int)d.status);
	dma_wait_moved(_metadata, m, 1, 64);
}

TEST_F_TIMEOUT(dma, abort_reports_exact_position, 120)
{
	unsigned int count = mig_times(40), i, aborted = 0;
	struct mock *m = &self->m;
	struct dma_desc d, next;

	scatter(_metadata, self);
	for (i = 0; i < count; i++) {
		d = (struct dma_desc){
			.op = i % 4 + 1, .len = m->size - 3 - i, .addr = i % 3,
			.iova = IOVA + i % 5, .seed = i, .irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		next = (struct dma_desc){
			.op = FILL, .iova = IOVA + m->size + i, .len = 9,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		dma_set(_metadata, m, 7, &d);
		dma_set(_metadata, m, 8, &next);
		dma_ring(_metadata, m, 7);
		dma_ring(_metadata, m, 8);
		if (i % 8)
			usleep(20 << (i % 8));
		d = dma_abort(_metadata, m, 7);
		if (d.status == VFIO_MOCK_DMA_ABORTED) {
			aborted++;
			EXPECT_GT(d.len, d.pos);
			EXPECT_EQ(0U, d.error);
		} else {
			expect_complete(_metadata, &d, "a transfer that ended before the abort");
		}
		apply(self, m, &d, d.pos);
		d = dma_wait(_metadata, m, 8);
		expect_complete(_metadata, &d, "the transfer after an aborted one");
		apply(self, m, &d, d.len);
		expect_all(_metadata, self, m, "after an aborted transfer");
		EXPECT_EQ(2 * i + 2, reg64(m, DMA_DONE))
			PROMISE("DMA_DONE includes aborted descriptors");
	}
	TH_LOG("%u of %u transfers were aborted while running", aborted, i);
}

/* ---- Errors of transfers ---- */

TEST_F(dma, bad_descriptors_fail)
{
	const __u64 size = self->m.size;
	const struct {
		const char *what;
		__u32 op;
		__u64 iova, addr, len;
		__u32 error;
	} bad[] = {
		{ "op 0", 0, IOVA, 0, 8, VFIO_MOCK_DMA_ERROR_OP },
		{ "op 5", 5, IOVA, 0, 8, VFIO_MOCK_DMA_ERROR_OP },
		{ "op -1", ~0U, IOVA, 0, 8, VFIO_MOCK_DMA_ERROR_OP },
		{ "op 0x101", 0x101, IOVA, 0, 8, VFIO_MOCK_DMA_ERROR_OP },
		{ "empty READ", 1, IOVA, 0, 0, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "empty WRITE", 2, IOVA, 0, 0, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "empty FILL", 3, IOVA, 0, 0, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "empty CHURN", 4, IOVA, 0, 0, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "READ past the end", 1, IOVA, size - 7, 8, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "WRITE past the end", 2, IOVA, size - 7, 8, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "CHURN past the end", 4, IOVA, size - 7, 8, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "READ at the end", 1, IOVA, size, 1, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "WRITE larger than the memory", 2, IOVA, 0, size + 1, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "WRITE far away", 2, IOVA, 1ULL << 63, 8, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "READ whose ADDR wraps", 1, IOVA, ~0ULL, 2, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "CHURN whose LEN wraps", 4, IOVA, 8, ~0ULL - 3, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "READ whose IOVA wraps", 1, ~0ULL - 7, 0, 9, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "WRITE whose IOVA wraps", 2, ~0ULL, 0, 2, VFIO_MOCK_DMA_ERROR_RANGE },
		{ "FILL whose IOVA wraps", 3, IOVA, 0, ~0ULL, VFIO_MOCK_DMA_ERROR_RANGE },
	};
	int fds[VFIO_MOCK_MSIX_VECTORS];
	struct mock *m = &self->m;
	struct dma_desc d;
	unsigned int i, continuous, n = 0;

	scatter(_metadata, self);
	open_vectors(_metadata, m, fds);
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		for (continuous = 0; continuous < 2; continuous++) {
			d = (struct dma_desc){
				.op = bad[i].op, .iova = bad[i].iova,
				.addr = bad[i].addr, .len = bad[i].len,
				.period = continuous, .irq_vector = 1,
			};
			d = dma_run(_metadata, m, i % DESCS, &d);
			expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, bad[i].error,
				     0, bad[i].what);
			EXPECT_EQ(++n, reg64(m, DMA_DONE))
				PROMISE("DMA_DONE includes failed descriptors");
			EXPECT_EQ(POLLIN, mig_poll(fds[1], POLLIN, mig_hang_seconds() * 1000))
				PROMISE("the vector is signalled when a descriptor fails");
			EXPECT_EQ(1U, taken(fds[1]));
		}
	}
	EXPECT_EQ(0U, reg64(m, DMA_BYTES));
	expect_all(_metadata, self, m, "after bad descriptors");

	/* Fields that an operation does not use may have any value. */
	d = (struct dma_desc){
		.op = FILL, .iova = IOVA, .addr = ~0ULL, .len = 8,
		.irq_vector = VFIO_MOCK_MSIX_VECTORS,
	};
	d = dma_run(_metadata, m, 0, &d);
	expect_complete(_metadata, &d, "FILL, which does not use ADDR");
	apply(self, m, &(struct dma_desc){ .op = d.op, .iova = d.iova }, 8);
	d = (struct dma_desc){
		.op = CHURN, .iova = ~0ULL, .addr = 5, .len = 8,
		.irq_vector = 0x7fffffff,
	};
	d = dma_run(_metadata, m, 0, &d);
	expect_complete(_metadata, &d, "CHURN, which does not use IOVA");
	vfio_mock_pattern(m->want + 5, 0, 0, 8);
	expect_all(_metadata, self, m, "after transfers with unused fields set");
	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS; i++) {
		EXPECT_EQ(0U, taken(fds[i]))
			PROMISE("a vector that does not exist raises no interrupt");
	}
}

/*
 * Runs @op over [iova, +len), where only the first @good bytes can be moved, and then a
 * valid transfer, which must succeed. @user is the model of the user memory at @iova,
 * or NULL if it is not compared.
 */
static void expect_partial(struct __test_metadata *_metadata, dma_data *self,
			   __u32 op, __u64 iova, __u64 len, __u64 good, __u32 error,
			   __u8 *user, const char *what)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = op, .iova = iova, .addr = 3, .len = len, .seed = iova,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u64 bytes = reg64(m, DMA_BYTES);

	d = dma_run(_metadata, m, 3, &d);
	if (error)
		expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, error, good, what);
	else
		expect_complete(_metadata, &d, what);
	EXPECT_EQ(bytes + good, reg64(m, DMA_BYTES))
		PROMISE("%s: DMA_BYTES is the number of bytes moved", what);
	if (good && user)
		dma_apply(&d, m->want, user, good);
	expect_memory(_metadata, m, m->want, what);

	d = (struct dma_desc){
		.op = FILL, .iova = IOVA + m->size, .len = 5000,
		.seed = ++self->random, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	d = dma_run(_metadata, m, 4, &d);
	expect_complete(_metadata, &d, "the transfer after a failed one");
	apply(self, m, &d, d.len);
	expect_ram(_metadata, &self->ram, what);
}

TEST_F_TIMEOUT(dma, unmapped_memory_fails_the_transfer, 60)
{
	struct ram *ram = &self->ram;
	struct mock *m = &self->m;
	__u64 end = ram->iova + ram->size;
	__u32 op;

	scatter(_metadata, self);
	for (op = READ; op <= FILL; op++) {
		expect_partial(_metadata, self, op, 0, 8, 0,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, NULL, "IOVA 0");
		expect_partial(_metadata, self, op, IOVA - 1, 1, 0,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, NULL, "before the mapping");
		expect_partial(_metadata, self, op, end, 1, 0,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, NULL, "after the mapping");
		expect_partial(_metadata, self, op, ~0ULL - PAGE, PAGE, 0,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, NULL,
			       "the end of the address space");
		expect_partial(_metadata, self, op, end - 5000, 5001, 5000,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, ram_want(ram, end - 5000),
			       "a mapping that ends");
		expect_partial(_metadata, self, op, end - 150 * PAGE, 175 * PAGE, 150 * PAGE,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED,
			       ram_want(ram, end - 150 * PAGE), "a mapping that ends late");
	}

	/* A hole of one page in the middle. */
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, ram->iova, ram->size));
	ASSERT_EQ(0, mig_dma_map(&m->dev, IOVA, ram->mem, 40 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, IOVA + 41 * PAGE, ram->mem + 41 * PAGE,
				 ram->size - 41 * PAGE, RW));
	for (op = READ; op <= FILL; op++) {
		expect_partial(_metadata, self, op, IOVA + 100, 50 * PAGE, 40 * PAGE - 100,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, ram_want(ram, IOVA + 100),
			       "a hole");
		expect_partial(_metadata, self, op, IOVA + 40 * PAGE, 10, 0,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED, NULL, "into the hole");
		expect_partial(_metadata, self, op, IOVA + 40 * PAGE - 1, 2, 1,
			       VFIO_MOCK_DMA_ERROR_UNMAPPED,
			       ram_want(ram, IOVA + 40 * PAGE - 1), "one byte too many");
		expect_partial(_metadata, self, op, IOVA + 41 * PAGE, 100000, 100000, 0,
			       ram_want(ram, IOVA + 41 * PAGE), "after the hole");
	}
	/* Adjacent mappings are one range. */
	ASSERT_EQ(0, mig_dma_map(&m->dev, IOVA + 40 * PAGE, ram->mem + 40 * PAGE, PAGE, RW));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, IOVA + 1, 50 * PAGE, 50 * PAGE, 0,
			       ram_want(ram, IOVA + 1), "three mappings");
}

TEST_F_TIMEOUT(dma, protected_memory_fails_the_transfer, 60)
{
	enum { RO = IOVA + 0x10000000, WO = IOVA + 0x20000000 };
	struct ram *ram = &self->ram;
	struct mock *m = &self->m;
	bool group = variant->backend == MIG_GROUP && !mock_has_iommu(m);
	__u8 *half = ram->mem + 32 * PAGE;

	scatter(_metadata, self);
	/* 16 pages with any access, 16 that the device may only read, or only write. */
	ASSERT_EQ(0, mig_dma_map(&m->dev, RO, half - 16 * PAGE, 16 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, RO + 16 * PAGE, half, 16 * PAGE, MIG_DMA_READ));
	ASSERT_EQ(0, mig_dma_map(&m->dev, WO, half - 16 * PAGE, 16 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, WO + 16 * PAGE, half, 16 * PAGE, MIG_DMA_WRITE));

#define WANT_AT(at) (ram->want + (half - ram->mem) + (at))
	expect_partial(_metadata, self, READ, RO + 7 * PAGE, 20 * PAGE - 9, 20 * PAGE - 9, 0,
		       WANT_AT(-9 * (ssize_t)PAGE), "READ from read-only memory");
	expect_partial(_metadata, self, WRITE, RO + 16 * PAGE, 1, 0,
		       VFIO_MOCK_DMA_ERROR_DENIED, NULL, "WRITE to read-only memory");
	expect_partial(_metadata, self, FILL, RO + 20 * PAGE + 3, 9999, 0,
		       VFIO_MOCK_DMA_ERROR_DENIED, NULL, "FILL of read-only memory");
	expect_partial(_metadata, self, WRITE, RO + PAGE + 3, 20 * PAGE, 15 * PAGE - 3,
		       VFIO_MOCK_DMA_ERROR_DENIED, WANT_AT(-15 * (ssize_t)PAGE + 3),
		       "WRITE up to read-only memory");
	expect_partial(_metadata, self, FILL, RO + PAGE + 3, 20 * PAGE, 15 * PAGE - 3,
		       VFIO_MOCK_DMA_ERROR_DENIED, WANT_AT(-15 * (ssize_t)PAGE + 3),
		       "FILL up to read-only memory");
	expect_partial(_metadata, self, READ, WO + 16 * PAGE, 1, 0,
		       VFIO_MOCK_DMA_ERROR_DENIED, NULL, "READ from write-only memory");
	expect_partial(_metadata, self, READ, WO + 10 * PAGE, 17 * PAGE + 9, 6 * PAGE,
		       VFIO_MOCK_DMA_ERROR_DENIED, WANT_AT(-6 * (ssize_t)PAGE),
		       "READ up to write-only memory");
	/* The type1 IOMMU has no write-only mappings for devices without an IOMMU. */
	expect_partial(_metadata, self, FILL, WO + 12 * PAGE + 9, 7 * PAGE + 9,
		       group ? 4 * PAGE - 9 : 7 * PAGE + 9,
		       group ? VFIO_MOCK_DMA_ERROR_DENIED : 0,
		       WANT_AT(-4 * (ssize_t)PAGE + 9), "FILL of write-only memory");
}

/* Memory that is mapped for the device, and inaccessible afterwards. */
TEST_F_TIMEOUT(dma, inaccessible_memory_fails_the_transfer, 60)
{
	const __u64 at = IOVA + 0x10000000, size = 64 * PAGE;
	struct mock *m = &self->m;
	int fd = memfd_create("gone", MFD_CLOEXEC);
	__u8 *mem, *want = calloc(1, size);
	__u32 op;

	NEED_FAULTS(m);
	scatter(_metadata, self);
	ASSERT_NE(NULL, want);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_EQ(0, mig_dma_map(&m->dev, at, mem, size, RW));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, at + 5, size - 5, size - 5, 0,
			       want + 5, "accessible memory");

	ASSERT_EQ(0, mprotect(mem + 32 * PAGE, 8 * PAGE, PROT_READ));
	expect_partial(_metadata, self, READ, at, size, size, 0, want,
		       "READ from memory that its owner may read");
	for (op = WRITE; op <= FILL; op++)
		expect_partial(_metadata, self, op, at + 9, size - 9, 32 * PAGE - 9,
			       VFIO_MOCK_DMA_ERROR_FAULT, want + 9,
			       "memory that its owner may only read");
	ASSERT_EQ(0, mprotect(mem + 32 * PAGE, 8 * PAGE, PROT_NONE));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, at + 30 * PAGE + 1, 5 * PAGE, 2 * PAGE - 1,
			       VFIO_MOCK_DMA_ERROR_FAULT, want + 30 * PAGE + 1,
			       "memory that its owner may not access");
	ASSERT_EQ(0, munmap(mem + 17 * PAGE, PAGE));
	for (op = READ; op <= FILL; op++) {
		expect_partial(_metadata, self, op, at + 1, size - 1, 17 * PAGE - 1,
			       VFIO_MOCK_DMA_ERROR_FAULT, want + 1, "up to an unmapped page");
		expect_partial(_metadata, self, op, at + 17 * PAGE + 100, 1, 0,
			       VFIO_MOCK_DMA_ERROR_FAULT, NULL, "an unmapped page");
	}
	EXPECT_EQ(0, memcmp(want, mem, 17 * PAGE));

	/* A file that is shorter than its mapping. */
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ftruncate(fd, size));
	ASSERT_EQ(mem, mmap(mem, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0));
	memset(want, 0, size);
	expect_partial(_metadata, self, FILL, at, size, size, 0, want,
		       "other memory at the same address");
	ASSERT_EQ(0, ftruncate(fd, 3 * PAGE));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, at + 2, size - 2, 3 * PAGE - 2,
			       VFIO_MOCK_DMA_ERROR_FAULT, want + 2, "a truncated file");
	EXPECT_EQ(0, memcmp(want, mem, 3 * PAGE));
	ASSERT_EQ(0, munmap(mem, size));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, at, size, 0, VFIO_MOCK_DMA_ERROR_FAULT,
			       NULL, "memory unmapped by its owner");
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, at, size));
	for (op = READ; op <= FILL; op++)
		expect_partial(_metadata, self, op, at, size, 0, VFIO_MOCK_DMA_ERROR_UNMAPPED,
			       NULL, "memory unmapped by its owner and for the device");
}

TEST_F_TIMEOUT(dma, device_without_ioas_fails_transfers, 60)
{
	struct mock *m = &self->m;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = 2 * PAGE, .step = 256, .period = 1,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u32 op;

	if (variant->backend == MIG_GROUP)
		SKIP(return, "an open device of a group always has its container");
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	dma_wait_moved(_metadata, m, 0, 3 * PAGE);
	ASSERT_EQ(0, mig_dma_detach(&m->dev));
	d = dma_wait(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_FAILED, (int)d.status);
	EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error)
		PROMISE("a continuous transfer fails when the IOAS is detached");
	apply_rounds(self, m, &d);
	expect_ram(_metadata, &self->ram, "after the IOAS is detached");
	for (op = READ; op <= FILL; op++) {
		d = (struct dma_desc){
			.op = op, .iova = IOVA, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		d = dma_run(_metadata, m, op, &d);
		expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED,
			     VFIO_MOCK_DMA_ERROR_UNMAPPED, 0, "a device without an IOAS");
	}
	d = (struct dma_desc){
		.op = CHURN, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	d = dma_run(_metadata, m, op, &d);
	expect_complete(_metadata, &d, "an operation without user memory");
	vfio_mock_pattern(m->want, 0, 0, 100);
	ASSERT_EQ(0, mig_dma_attach(&m->dev));
	expect_partial(_metadata, self, FILL, IOVA, 10000, 10000, 0, self->ram.want,
		       "a device with its IOAS attached again");
}

TEST_F_TIMEOUT(dma, continuous_transfer_fails_when_unmapped, 60)
{
	int fds[VFIO_MOCK_MSIX_VECTORS];
	struct mock *m = &self->m;
	struct ram *ram = &self->ram;
	struct dma_desc d = {
		.op = FILL, .iova = IOVA, .len = PAGE, .step = 256, .period = 1,
		.irq_vector = 3,
	};
	__u64 signals = 0;

	open_vectors(_metadata, m, fds);
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	d.op = CHURN;
	d.irq_vector = VFIO_MOCK_IRQ_NONE;
	dma_set(_metadata, m, 1, &d);
	dma_ring(_metadata, m, 1);
	dma_wait_moved(_metadata, m, 0, 3 * PAGE);
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, ram->iova, ram->size));
	d = dma_wait(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_FAILED, (int)d.status);
	EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error);
	apply_rounds(self, m, &d);
	WAIT_FOR((signals += taken(fds[3])) >= d.pos / d.len + !!(d.pos % d.len),
		 "the vector is signalled when a continuous descriptor fails");
	expect_ram(_metadata, ram, "after the unmapping");

	d = dma_get(_metadata, m, 1);
	dma_wait_moved(_metadata, m, 1, d.pos + 3 * PAGE);
	ram_map(_metadata, ram, m);
	expect_ram(_metadata, ram, "after the new mapping");
	d = dma_abort(_metadata, m, 1);
	apply_rounds(self, m, &d);
	expect_partial(_metadata, self, FILL, IOVA, 10000, 10000, 0, ram->want,
		       "memory that is mapped again");
}

/* ---- States without DMA ---- */

/* One continuous descriptor of each kind, and a queued one if possible. */
static void start_all_kinds(struct __test_metadata *_metadata, dma_data *self)
{
	struct mock *m = &self->m;
	unsigned int op;

	for (op = READ; op <= CHURN; op++) {
		struct dma_desc d = {
			.op = op, .iova = IOVA + op * 8 * PAGE + 5,
			.addr = (op + 8) * 8 * PAGE + 7, .len = 2 * PAGE + op,
			.step = 333, .period = 1, .seed = op << 16,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};

		dma_set(_metadata, m, op, &d);
		dma_ring(_metadata, m, op);
	}
	for (op = READ; op <= CHURN; op++)
		dma_wait_moved(_metadata, m, op, 3 * PAGE);
}

/* The visible state of the engine. */
struct engine {
	__u8 regs[0x18];	/* DMA_STATUS to DMA_BYTES */
	struct dma_desc desc[DESCS];
};

static struct engine see_engine(struct __test_metadata *_metadata, const struct mock *m)
{
	struct engine e;

	ASSERT_EQ((ssize_t)sizeof(e.regs),
		  mock_read(m, BAR0, VFIO_MOCK_REG_DMA_STATUS, e.regs, sizeof(e.regs)));
	ASSERT_EQ((ssize_t)sizeof(e.desc),
		  mock_read(m, BAR0, VFIO_MOCK_DMA_DESC(0), e.desc, sizeof(e.desc)));
	return e;
}

/*
 * Checks that nothing moves any more, and that the positions of the descriptors are
 * exact: no transfer is in progress.
 */
static void expect_still(struct __test_metadata *_metadata, dma_data *self,
			 struct mock *m, const char *when)
{
	struct engine before = see_engine(_metadata, m), now;
	unsigned int i;

	for (i = 0; i < DESCS; i++) {
		if (before.desc[i].period)
			apply_rounds(self, m, &before.desc[i]);
	}
	expect_all(_metadata, self, m, when);
	usleep(LOOK_US);
	now = see_engine(_metadata, m);
	EXPECT_EQ(0, memcmp(&before, &now, sizeof(now)))
		PROMISE("%s: no descriptor changes", when);
	expect_all(_metadata, self, m, when);
}

/* Checks that the descriptors of start_all_kinds() are still active, and ends them. */
static void expect_on_the_move(struct __test_metadata *_metadata, dma_data *self,
			       struct mock *m)
{
	struct dma_desc d;
	unsigned int op;

	EXPECT_EQ(VFIO_MOCK_DMA_STATUS_BUSY, (int)reg32(m, DMA_STATUS));
	for (op = READ; op <= CHURN; op++) {
		d = dma_get(_metadata, m, op);
		dma_wait_moved(_metadata, m, op, d.pos + 3 * PAGE);
	}
	set32(m, DMA_ABORT, VFIO_MOCK_DMA_ALL);
	for (op = READ; op <= CHURN; op++) {
		d = dma_wait(_metadata, m, op);
		apply_rounds(self, m, &d);
	}
	expect_all(_metadata, self, m, "after continuous transfers that were paused");
}

TEST_F_TIMEOUT(dma, p2p_states_start_nothing, 120)
{
	static const __u32 states[] = { MIG_RUNNING_P2P, MIG_PRE_COPY_P2P };
	struct mock *m = &self->m;
	struct dma_desc d;
	struct queue q;
	unsigned int i, j;
	__u64 done;

	NEED_P2P(&m->dev);
	scatter(_metadata, self);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		const char *name = mig_state_name(states[i]);

		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		start_all_kinds(_metadata, self);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		expect_still(_metadata, self, m, name);
		EXPECT_EQ(VFIO_MOCK_DMA_STATUS_BUSY | VFIO_MOCK_DMA_STATUS_PAUSED,
			  (int)reg32(m, DMA_STATUS))
			PROMISE("%s: DMA_STATUS shows that peer-to-peer DMA is not allowed", name);
		for (j = READ; j <= CHURN; j++) {
			d = dma_get(_metadata, m, j);
			EXPECT_EQ(VFIO_MOCK_DMA_ACTIVE, (int)d.status)
				PROMISE("%s: a continuous descriptor waits", name);
		}

		/* The doorbell still queues. */
		done = reg64(m, DMA_DONE);
		q.nr = 0;
		for (j = 8; j < DESCS; j++) {
			q.desc[j] = pick_transfer(self, 4 * PAGE);
			dma_set(_metadata, m, j, &q.desc[j]);
			dma_ring(_metadata, m, j);
			q.order[q.nr++] = j;
		}
		expect_still(_metadata, self, m, name);
		for (j = 8; j < DESCS; j++) {
			d = dma_get(_metadata, m, j);
			expect_ended(_metadata, &d, VFIO_MOCK_DMA_QUEUED, 0, 0, name);
		}
		EXPECT_EQ(done, reg64(m, DMA_DONE));

		/* The abort still works, for queued and for paused descriptors. */
		d = dma_abort(_metadata, m, 15);
		expect_ended(_metadata, &d, VFIO_MOCK_DMA_ABORTED, 0, 0,
			     "a queued descriptor that is aborted");
		d = dma_abort(_metadata, m, 8);
		expect_ended(_metadata, &d, VFIO_MOCK_DMA_ABORTED, 0, 0,
			     "a queued descriptor that is aborted");
		EXPECT_EQ(done + 2, reg64(m, DMA_DONE));
		for (j = 0; j < q.nr - 2; j++)
			q.order[j] = q.order[j + 1];
		q.nr -= 2;

		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		for (j = 0; j < q.nr; j++) {
			d = dma_wait(_metadata, m, q.order[j]);
			expect_complete(_metadata, &d, "a transfer that waited");
			apply(self, m, &d, d.len);
		}
		expect_on_the_move(_metadata, self, m);
	}
}

/* The rest of a transfer that is incomplete when the ioctl returns moves in RUNNING. */
TEST_F_TIMEOUT(dma, p2p_states_wait_for_transfer_in_progress, 120)
{
	unsigned int count = mig_times(30), i, n, first, finished = 0, begun = 0, waiting = 0;
	struct mock *m = &self->m;
	struct dma_desc d;
	__u32 state;

	NEED_P2P(&m->dev);
	scatter(_metadata, self);
	for (i = 0; i < count; i++) {
		for (n = 0; n < 3; n++) {
			d = (struct dma_desc){
				.op = (i + n) % 4 + 1, .len = m->size - n, .seed = i,
				.iova = IOVA + n, .irq_vector = VFIO_MOCK_IRQ_NONE,
			};
			dma_set(_metadata, m, n, &d);
			dma_ring(_metadata, m, n);
		}
		if (i % 8)
			usleep(20 << (i % 8));
		state = i % 2 && mig_fsm_exists(m->dev.flags, MIG_PRE_COPY_P2P) ? MIG_PRE_COPY_P2P
									    : MIG_RUNNING_P2P;
		ASSERT_EQ(0, mig_set_state(&m->dev, state, NULL));
		first = 3;
		for (n = 0; n < 3; n++) {
			d = dma_get(_metadata, m, n);
			if (d.status == VFIO_MOCK_DMA_COMPLETE) {
				finished++;
				expect_complete(_metadata, &d, "a transfer that was in progress");
				apply(self, m, &d, d.len);
				continue;
			}
			if (d.status == VFIO_MOCK_DMA_ACTIVE) {
				begun++;
				EXPECT_EQ(3U, first)
					PROMISE("only one transfer is in progress at a time");
				EXPECT_TRUE(d.pos > 0 && d.pos < d.len)
					PROMISE("POS is the number of bytes moved");
				apply(self, m, &d, d.pos);
			} else {
				waiting++;
				expect_ended(_metadata, &d, VFIO_MOCK_DMA_QUEUED, 0, 0,
					     "a transfer that had not begun");
			}
			if (first == 3)
				first = n;
		}
		expect_still(_metadata, self, m, mig_state_name(state));
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		for (n = first; n < 3; n++) {
			d = dma_wait(_metadata, m, n);
			expect_complete(_metadata, &d, "a transfer after the return to RUNNING");
			apply(self, m, &d, d.len);
		}
	}
	TH_LOG("%u transfers were complete, %u partial, %u waited", finished, begun,
	       waiting);
}

TEST_F_TIMEOUT(dma, stopped_device_does_no_dma, 120)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY };
	struct mock *m = &self->m;
	struct engine before, now;
	unsigned int i;
	__u64 dropped;

	scatter(_metadata, self);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		const char *name = mig_state_name(states[i]);

		start_all_kinds(_metadata, self);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		expect_still(_metadata, self, m, name);
		before = see_engine(_metadata, m);
		dropped = reg64(m, DROPPED);
		set32(m, DMA_DOORBELL, 0);
		set32(m, DMA_DOORBELL, 999);
		set32(m, DMA_ABORT, READ);
		set32(m, DMA_ABORT, VFIO_MOCK_DMA_ALL);
		dma_set(_metadata, m, 0, &before.desc[READ]);
		EXPECT_EQ(dropped + 5, reg64(m, DROPPED))
			PROMISE("in %s doorbells, aborts and descriptors are dropped and counted",
				name);
		now = see_engine(_metadata, m);
		EXPECT_EQ(0, memcmp(&before, &now, sizeof(now)))
			PROMISE("in %s a doorbell or an abort has no effect", name);
		expect_still(_metadata, self, m, name);
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		expect_on_the_move(_metadata, self, m);
		EXPECT_EQ(dropped + 5, reg64(m, DROPPED));
	}
}

TEST_F_TIMEOUT(dma, reset_ends_all_transfers, 120)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP,
		MIG_STOP_COPY, MIG_RESUMING,
	};
	struct mock *m = &self->m;
	struct engine power_on = see_engine(_metadata, m), now;
	struct dma_desc d;
	unsigned int i;

	EXPECT_EQ(VFIO_MOCK_IRQ_NONE, power_on.desc[7].irq_vector);
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		scatter(_metadata, self);
		start_all_kinds(_metadata, self);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		if (i % 2) {
			/* And a large one. */
			d = (struct dma_desc){
				.op = FILL, .len = m->size, .iova = IOVA + m->size,
				.irq_vector = VFIO_MOCK_IRQ_NONE,
			};
			dma_set(_metadata, m, 9, &d);
			set32(m, DMA_DOORBELL, 9);
		}
		ASSERT_EQ(0, mig_reset(&m->dev));
		memcpy(self->ram.want, self->ram.mem, self->ram.size);
		memset(m->want, 0, m->size);
		now = see_engine(_metadata, m);
		EXPECT_EQ(0, memcmp(&power_on, &now, sizeof(now)))
			PROMISE("RESET in %s restores the power-on state of the engine",
				mig_state_name(states[i]));
		expect_still(_metadata, self, m, "after RESET");
		d = (struct dma_desc){
			.op = FILL, .len = 100, .iova = IOVA, .irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		d = dma_run(_metadata, m, 0, &d);
		expect_complete(_metadata, &d, "a transfer after RESET");
		EXPECT_EQ(1U, reg64(m, DMA_DONE));
	}
}

/* ---- Stalled page faults ---- */

/* Resolves the fault if nothing else ends the wait for it. */
struct rescue {
	pthread_t thread;
	struct mig_stall *stall;
	int done[2];		/* closed when it is not needed any more */
	bool came;
};

static void *rescue_main(void *arg)
{
	struct rescue *r = arg;

	r->came = !mig_poll(r->done[0], POLLIN, mig_hang_seconds() * 250);
	mig_stall_end_zero(r->stall);
	return NULL;
}

/* The user does not resolve a page fault of the device, and calls to end it. */
TEST_F_TIMEOUT(dma, stalled_fault_is_interrupted, 240)
{
	static const __u32 ops[] = { READ, WRITE, FILL };
	struct mock *m = &self->m;
	struct mig_stall stall;
	struct rescue rescue;
	struct dma_desc d;
	unsigned int i;

	NEED_FAULTS(m);
	for (i = 0; i < 2 * ARRAY_SIZE(ops); i++) {
		if (mig_stall_start(&stall))
			SKIP(return, "no userfaultfd");
		ASSERT_EQ(0, mig_dma_map(&m->dev, 0, stall.page, PAGE, RW));
		rescue = (struct rescue){ .stall = &stall };
		ASSERT_EQ(0, pipe(rescue.done));
		d = (struct dma_desc){
			.op = ops[i / 2], .iova = 1, .len = 100,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		dma_set(_metadata, m, 0, &d);
		dma_ring(_metadata, m, 0);
		ASSERT_EQ(0, mig_stall_wait(&stall))
			STEP("stall the device in a page fault");
		d = dma_get(_metadata, m, 0);
		EXPECT_EQ(VFIO_MOCK_DMA_ACTIVE, (int)d.status)
			PROMISE("a device that is stalled in a page fault can be read");
		fill(_metadata, m, 0, 100, 1);

		ASSERT_EQ(0, pthread_create(&rescue.thread, NULL, rescue_main, &rescue));
		if (i % 2) {
			mig_close_device(&m->dev);
		} else {
			ASSERT_EQ(0, mig_reset(&m->dev))
				PROMISE("RESET works in every state");
		}
		close(rescue.done[1]);
		ASSERT_TRUE(joined(rescue.thread));
		EXPECT_FALSE(rescue.came)
			PROMISE("%s does not wait for an unresolved page fault",
				i % 2 ? "close" : "RESET");
		close(rescue.done[0]);
		if (i % 2) {
			ASSERT_EQ(0, mig_reopen_device(&m->dev))
				STEP("reopen the device: %s", m->dev.why);
		}
		if (!(i % 2) || variant->backend == MIG_GROUP) {
			ASSERT_EQ(0, mig_dma_unmap(&m->dev, 0, PAGE))
				STEP("unmap a page");
		}
		d = (struct dma_desc){
			.op = CHURN, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		d = dma_run(_metadata, m, 0, &d);
		expect_complete(_metadata, &d, "a transfer afterwards");
		mig_stall_free(&stall);
	}
}

/* Without bus mastering nothing moves; transfers that waited continue with it. */
TEST_F_TIMEOUT(dma, needs_bus_mastering, 120)
{
	struct mock *m = &self->m;
	struct dma_desc d, again;
	int i;

	ASSERT_EQ(0, ioctl(m->dev.fd, VFIO_DEVICE_RESET));
	d = (struct dma_desc){
		.op = FILL, .iova = IOVA, .len = 8 * PAGE, .step = PAGE, .period = 1,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	usleep(20000);
	d = dma_get(_metadata, m, 0);
	EXPECT_EQ(0U, d.pos)
		PROMISE("after a reset bus mastering is off");
	for (i = 0; i < 20; i++) {
		put(_metadata, m, CONFIG, 4, 6, 2);
		d = dma_wait_moved(_metadata, m, 0, d.pos + 1);
		put(_metadata, m, CONFIG, 4, 2, 2);
		d = dma_get(_metadata, m, 0);
		EXPECT_EQ(VFIO_MOCK_DMA_STATUS_PAUSED,
			  (int)reg32(m, DMA_STATUS) & VFIO_MOCK_DMA_STATUS_PAUSED);
		usleep(1000);
		again = dma_get(_metadata, m, 0);
		EXPECT_EQ(d.pos, again.pos)
			PROMISE("DMA has ended when the write that disables bus mastering returns");
	}
	/* Migration states do not depend on bus mastering, as in hardware. */
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
	again = dma_get(_metadata, m, 0);
	EXPECT_EQ(d.pos, again.pos)
		PROMISE("a device that runs again does not enable bus mastering");
	put(_metadata, m, CONFIG, 4, 6, 2);
	dma_wait_moved(_metadata, m, 0, d.pos + 1);
	ASSERT_EQ(0, mig_reset(&m->dev));
}

/* Disabling bus mastering does not wait for an unresolved page fault. */
TEST_F_TIMEOUT(dma, bus_mastering_off_ends_a_stalled_transfer, 120)
{
	struct dma_desc d = {
		.op = FILL, .iova = 1, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	struct mock *m = &self->m;
	struct mig_stall stall;
	struct rescue rescue;

	NEED_FAULTS(m);
	if (mig_stall_start(&stall))
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, mig_dma_map(&m->dev, 0, stall.page, PAGE, RW));
	rescue = (struct rescue){ .stall = &stall };
	ASSERT_EQ(0, pipe(rescue.done));
	dma_set(_metadata, m, 0, &d);
	dma_ring(_metadata, m, 0);
	ASSERT_EQ(0, mig_stall_wait(&stall))
		STEP("stall the device in a page fault");
	ASSERT_EQ(0, pthread_create(&rescue.thread, NULL, rescue_main, &rescue));
	put(_metadata, m, CONFIG, 4, 2, 2);
	close(rescue.done[1]);
	ASSERT_TRUE(joined(rescue.thread));
	EXPECT_FALSE(rescue.came)
		PROMISE("the write does not wait for an unresolved page fault");
	close(rescue.done[0]);
	d = dma_get(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_FAILED, (int)d.status)
		PROMISE("a transfer that takes too long fails");
	put(_metadata, m, CONFIG, 4, 6, 2);
	ASSERT_EQ(0, mig_dma_unmap(&m->dev, 0, PAGE));
	d = (struct dma_desc){ .op = CHURN, .len = 100, .irq_vector = VFIO_MOCK_IRQ_NONE };
	d = dma_run(_metadata, m, 0, &d);
	expect_complete(_metadata, &d, "a transfer afterwards");
	mig_stall_free(&stall);
}

/* A thread that stops the device, which waits for its DMA. */
struct stopper {
	pthread_t thread;
	struct poller poller;
	struct mig_device *dev;
	int ret;
};

static void *stopper_main(void *arg)
{
	struct stopper *s = arg;

	atomic_store(&s->poller.tid, gettid());
	s->ret = mig_set_state(s->dev, MIG_STOP, NULL);
	atomic_store(&s->poller.done, true);
	return NULL;
}

/* Queues the maximum number of transfers to memory with a stalled page. */
static void stall_all(struct __test_metadata *_metadata, struct mock *m,
		      struct mig_stall *stall)
{
	struct dma_desc d = {
		.op = FILL, .len = PAGE, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	unsigned int n;

	ASSERT_EQ(0, mig_dma_map(&m->dev, 0, stall->page, PAGE, RW));
	for (n = 0; n < DESCS; n++) {
		dma_set(_metadata, m, n, &d);
		dma_ring(_metadata, m, n);
	}
	ASSERT_EQ(0, mig_stall_wait(stall))
		STEP("stall the device in a page fault");
}

/* RESET ends both the DMA and the wait for its end. */
TEST_F_TIMEOUT(dma, reset_ends_the_wait_for_dma, 60)
{
	struct engine power_on = see_engine(_metadata, &self->m), now;
	struct mock *m = &self->m;
	struct stopper stopper = { .dev = &m->dev };
	struct mig_stall stall;

	NEED_FAULTS(m);
	if (mig_stall_start(&stall))
		SKIP(return, "no userfaultfd");
	stall_all(_metadata, m, &stall);
	ASSERT_EQ(0, pthread_create(&stopper.thread, NULL, stopper_main, &stopper));
	wait_until_asleep(&stopper.poller);
	EXPECT_FALSE(atomic_load(&stopper.poller.done))
		PROMISE("a device does not stop while its DMA is in progress");
	ASSERT_EQ(0, mig_reset(&m->dev));
	ASSERT_TRUE(joined(stopper.thread))
		PROMISE("a wait for the end of DMA ends with the DMA");
	ASSERT_EQ(0, mig_reset(&m->dev));
	now = see_engine(_metadata, m);
	EXPECT_EQ(0, memcmp(&power_on, &now, sizeof(now)))
		PROMISE("RESET restores the power-on state of the engine");
	mig_stall_free(&stall);
}

/* A killed process does not wait for the state change of another one. */
TEST_F_TIMEOUT(dma, killed_ioctl_does_not_wait_for_a_state_change, 120)
{
	struct mock *m = &self->m;
	struct stopper stopper = { .dev = &m->dev };
	struct mig_stall stall;
	unsigned int i;
	__u64 size;
	pid_t pid;

	NEED_FAULTS(m);
	if (mig_stall_start(&stall))
		SKIP(return, "no userfaultfd");
	stall_all(_metadata, m, &stall);
	ASSERT_EQ(0, pthread_create(&stopper.thread, NULL, stopper_main, &stopper));
	wait_until_asleep(&stopper.poller);
	ASSERT_FALSE(atomic_load(&stopper.poller.done))
		STEP("let a state change wait");
	for (i = 0; i < 2; i++) {
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid)
			_exit(i ? mig_data_size(&m->dev, &size) :
				  mig_set_state(&m->dev, MIG_STOP, NULL));
		WAIT_FOR(sleeps_uninterruptibly(pid),
			 "%s waits for a state change",
			 i ? "MIG_DATA_SIZE" : "SET_STATE");
		ASSERT_EQ(0, kill(pid, SIGKILL));
		WAIT_FOR(waitpid(pid, NULL, WNOHANG) == pid,
			 "killed %s does not wait",
			 i ? "MIG_DATA_SIZE" : "SET_STATE");
	}
	EXPECT_FALSE(atomic_load(&stopper.poller.done))
		PROMISE("the state change of another process continues");
	ASSERT_EQ(0, mig_reset(&m->dev));
	ASSERT_TRUE(joined(stopper.thread));
	mig_stall_free(&stall);
}

/* Exit closes in any order, and must not wait for something that only exit ends. */
TEST_F_TIMEOUT(dma, process_with_stalled_dma_can_exit, 60)
{
	struct mig_stall stall;
	struct mock guest;
	unsigned int i;
	pid_t pid;

	NEED_FAULTS(&self->m);
	mock_close(&self->m);
	for (i = 0; i < 2; i++) {
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid) {
			/* With the file that would end the stall before or after the device. */
			if (i && mig_stall_start(&stall))
				_exit(0);
			if (mock_open(&guest, "medium", 0, variant->backend))
				_exit(1);
			if (!i && mig_stall_start(&stall))
				_exit(0);
			stall_all(_metadata, &guest, &stall);
			_exit(2);
		}
		WAIT_FOR(waitpid(pid, NULL, WNOHANG) == pid,
			 "a process with DMA in progress can exit");
	}
}

/* ---- Migration of the engine ---- */

/* Migrates @src to @dst, which maps the same memory at the same IOVAs. */
static void carry_over(struct __test_metadata *_metadata, dma_data *self,
		       int fd, struct mig_stream *image)
{
	struct mock *src = &self->m, *dst = &self->dst;
	struct engine before, after;

	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_STOP_COPY, fd < 0 ? &fd : NULL));
	ASSERT_LE(0, fd);
	before = see_engine(_metadata, src);
	expect_still(_metadata, self, src, "in STOP_COPY");
	ASSERT_EQ(0, mig_save(fd, image, stream_limit(&src->dev)));
	close(fd);

	fd = go(_metadata, &dst->dev, MIG_RESUMING);
	load_all(_metadata, fd, image);
	ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_STOP, NULL));
	close(fd);
	memcpy(dst->want, src->want, src->size);
	after = see_engine(_metadata, dst);
	EXPECT_EQ(0, memcmp(before.desc, after.desc, sizeof(after.desc)))
		PROMISE("all descriptors migrate");
	/* Except for DMA_STATUS: its bit PAUSED belongs to the migration state. */
	EXPECT_EQ(0, memcmp(before.regs + 4, after.regs + 4, sizeof(after.regs) - 4))
		PROMISE("DMA_ERROR, DMA_DONE and DMA_BYTES migrate");
	expect_still(_metadata, self, dst, "in STOP on the target");
	ram_map(_metadata, &self->ram, dst);
}

TEST_F_TIMEOUT(dma, queue_continues_after_migration, 300)
{
	unsigned int count = mig_times(5), i;
	struct mock *m = &self->m, *dst = &self->dst;
	struct mig_stream image = {};
	struct queue q;
	int fd;

	NEED_P2P(&m->dev);
	for (i = 0; i < count; i++) {
		scatter(_metadata, self);
		image.len = 0;
		fd = -1;
		ASSERT_EQ(0, mig_set_state(&m->dev, i % 2 &&
					   mig_fsm_exists(m->dev.flags, MIG_PRE_COPY_P2P) ?
					   MIG_PRE_COPY_P2P : MIG_RUNNING_P2P, &fd));
		queue_up(_metadata, self, m, &q, 1 + pick(self, DESCS));
		set32(m, DMA_DOORBELL, DESCS);	/* an error to migrate */
		carry_over(_metadata, self, fd, &image);
		if (i % 3) {
			move_on(_metadata, &dst->dev, MIG_RUNNING_P2P);
			expect_still(_metadata, self, dst, "in RUNNING_P2P on the target");
		}
		move_on(_metadata, &dst->dev, MIG_RUNNING);
		expect_in_order(_metadata, self, dst, &q);
		EXPECT_EQ(q.nr, reg64(dst, DMA_DONE));
		ASSERT_EQ(0, mig_dma_unmap(&dst->dev, IOVA, self->ram.size));
		ASSERT_EQ(0, mig_reset(&m->dev));
		ASSERT_EQ(0, mig_reset(&dst->dev));
	}
}

TEST_F_TIMEOUT(dma, continuous_transfers_continue_after_migration, 300)
{
	unsigned int count = mig_times(5), i, op;
	struct mock *m = &self->m, *dst = &self->dst;
	struct mig_stream image = {};
	__u64 pos[CHURN + 1];
	struct dma_desc d;
	int fd, ret;

	for (i = 0; i < count; i++) {
		scatter(_metadata, self);
		image.len = 0;
		fd = -1;
		start_all_kinds(_metadata, self);
		if (m->dev.flags & VFIO_MIGRATION_PRE_COPY) {
			/* The device never becomes quiet: a round need not have an end. */
			ASSERT_EQ(0, mig_set_state(&m->dev, MIG_PRE_COPY, &fd));
			while (image.len < 3 * m->size) {
				ret = mig_read(fd, &image, 1 << 16);
				ASSERT_TRUE(ret > 0 || ret == -ENOMSG);
				if (ret < 0)
					break;
			}
		}
		carry_over(_metadata, self, fd, &image);
		for (op = READ; op <= CHURN; op++) {
			d = dma_get(_metadata, dst, op);
			pos[op] = d.pos;
		}
		move_on(_metadata, &dst->dev, MIG_RUNNING);
		expect_on_the_move(_metadata, self, dst);
		for (op = READ; op <= CHURN; op++) {
			d = dma_get(_metadata, dst, op);
			EXPECT_LT(pos[op], d.pos)
				PROMISE("a continuous transfer continues at its position");
		}
		ASSERT_EQ(0, mig_dma_unmap(&dst->dev, IOVA, self->ram.size));
		ASSERT_EQ(0, mig_reset(&m->dev));
		ASSERT_EQ(0, mig_reset(&dst->dev));
	}
}

TEST_F_TIMEOUT(dma, target_without_mapping_fails_transfers, 60)
{
	struct mock *m = &self->m, *dst = &self->dst;
	struct mig_stream image = {};
	struct dma_desc d;
	unsigned int op;

	start_all_kinds(_metadata, self);
	take_image(_metadata, &m->dev, &image);
	load_and_run(_metadata, &dst->dev, &image, 0);
	for (op = READ; op <= FILL; op++) {
		d = dma_wait(_metadata, dst, op);
		EXPECT_EQ(VFIO_MOCK_DMA_FAILED, (int)d.status);
		EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error)
			PROMISE("a migrated transfer fails without its memory");
	}
	d = dma_get(_metadata, dst, CHURN);
	dma_wait_moved(_metadata, dst, CHURN, d.pos + PAGE);
}

/* Writes of the device to its own memory dirty it. */
TEST_F_TIMEOUT(dma, dma_into_the_device_is_tracked_exactly, 120)
{
	unsigned int count = mig_times(40), i, j;
	struct mock *m = &self->m;
	__u8 *dirty = calloc(1, m->size / PAGE);
	struct dma_desc d;
	int fd;

	NEED_PRE_COPY(&m->dev);
	ASSERT_NE(NULL, dirty);
	scatter(_metadata, self);
	fd = go(_metadata, &m->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &(struct mig_stream){}, stream_limit(&m->dev)));
	for (i = 0; i < count; i++) {
		memset(dirty, 0, m->size / PAGE);
		for (j = pick(self, 5); j; j--) {
			d = pick_transfer(self, pick(self, 4) ? m->size / 8 : m->size);
			d = dma_run(_metadata, m, 0, &d);
			expect_complete(_metadata, &d, "a transfer in PRE_COPY");
			apply(self, m, &d, d.len);
			if (d.op == READ || d.op == CHURN)
				mark(dirty, d.addr, d.len);
		}
		expect_round(_metadata, m, fd, dirty, "READ and CHURN in PRE_COPY");
	}
}

/* ---- Peers ---- */

FIXTURE(peers)
{
	struct mock a;
	struct mock b;
	__u8 *a_map;		/* of the BAR2s */
	__u8 *b_map;
	__u64 random;
};

MIG_EACH_BACKEND(peers);

/* Maps the memory of both devices for each. */
#define A_IOVA	0x10000000ULL
#define B_IOVA	0x20000000ULL

FIXTURE_SETUP(peers)
{
	struct mock *both[2] = { &self->a, &self->b };
	int i, ret;

	for (i = 0; i < 2; i++)
		MOCK_OPEN_OR_SKIP(both[i], "medium", i, variant->backend);
	if (mock_has_iommu(&self->a))
		SKIP(return, "an IOMMU maps no memory whose stores are tracked");
	self->a_map = bar2_map(_metadata, &self->a, 0, self->a.size);
	self->b_map = bar2_map(_metadata, &self->b, 0, self->b.size);
	for (i = 0; i < 2; i++) {
		ret = mig_dma_map(&both[i]->dev, A_IOVA, self->a_map, self->a.size, RW);
		ASSERT_EQ(0, ret)
			PROMISE("BAR2 can be mapped for DMA of a peer: %s", strerror(-ret));
		ret = mig_dma_map(&both[i]->dev, B_IOVA, self->b_map, self->b.size, RW);
		ASSERT_EQ(0, ret)
			PROMISE("BAR2 can be mapped for DMA of a peer: %s", strerror(-ret));
	}
	fill(_metadata, &self->a, 0, self->a.size, 0xaaaa);
	fill(_metadata, &self->b, 0, self->b.size, 0xbbbb);
}

FIXTURE_TEARDOWN(peers)
{
	munmap(self->a_map, self->a.size);
	munmap(self->b_map, self->b.size);
	mock_close(&self->a);
	mock_close(&self->b);
}

/* A transfer between the memory of one device and @iova. */
static struct dma_desc pick_peer_transfer(peers_data *self, __u64 iova,
					  __u64 limit)
{
	__u64 size = self->a.size;
	struct dma_desc d = {
		.op = READ + vfio_mock_mix(++self->random) % 3,
		.len = 1 + vfio_mock_mix(++self->random) % limit,
		.seed = ++self->random, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	d.addr = vfio_mock_mix(++self->random) % (size - d.len + 1);
	d.iova = iova + vfio_mock_mix(++self->random) % (size - d.len + 1);
	return d;
}

/* Executed by @who; the IOVA is in the memory of @peer. */
static struct dma_desc run_peer(struct __test_metadata *_metadata, struct mock *who,
				struct mock *peer, __u64 iova, const struct dma_desc *d)
{
	struct dma_desc r = dma_run(_metadata, who, 0, d);

	expect_complete(_metadata, &r, "a transfer between devices");
	dma_apply(&r, who->want, peer->want + (r.iova - iova), r.len);
	return r;
}

TEST_F_TIMEOUT(peers, move_data_both_ways, 120)
{
	unsigned int count = mig_times(60), i;
	struct mock *a = &self->a, *b = &self->b;
	struct dma_desc d;

	for (i = 0; i < count; i++) {
		d = pick_peer_transfer(self, i % 2 ? A_IOVA : B_IOVA,
				       i % 8 ? 5 * PAGE : a->size);
		if (i % 2)
			run_peer(_metadata, b, a, A_IOVA, &d);
		else
			run_peer(_metadata, a, b, B_IOVA, &d);
	}
	expect_memory(_metadata, a, a->want, "after transfers between devices");
	expect_memory(_metadata, b, b->want, "after transfers between devices");
	EXPECT_EQ(0, memcmp(a->want, self->a_map, a->size))
		PROMISE("a mapping shows writes of a peer");
	EXPECT_EQ(0, memcmp(b->want, self->b_map, b->size));
}

TEST_F_TIMEOUT(peers, dma_into_a_peer_is_tracked_exactly, 120)
{
	unsigned int count = mig_times(40), i, j;
	struct mock *a = &self->a, *b = &self->b;
	__u8 *dirty = calloc(1, a->size / PAGE);
	struct dma_desc d;
	int fd;

	NEED_PRE_COPY(&a->dev);
	ASSERT_NE(NULL, dirty);
	fd = go(_metadata, &a->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &(struct mig_stream){}, stream_limit(&a->dev)));
	for (i = 0; i < count; i++) {
		memset(dirty, 0, a->size / PAGE);
		for (j = vfio_mock_mix(i) % 5; j; j--) {
			/* A transfer of the peer into it, and one of its own to the peer. */
			d = pick_peer_transfer(self, A_IOVA, 6 * PAGE);
			d = run_peer(_metadata, b, a, A_IOVA, &d);
			if (d.op == WRITE || d.op == FILL)
				mark(dirty, d.iova - A_IOVA, d.len);
			d = pick_peer_transfer(self, B_IOVA, 6 * PAGE);
			d = run_peer(_metadata, a, b, B_IOVA, &d);
			if (d.op == READ)
				mark(dirty, d.addr, d.len);
		}
		expect_round(_metadata, a, fd, dirty, "transfers between devices in PRE_COPY");
	}
	expect_memory(_metadata, b, b->want, "after transfers between devices");
}

/* A device that is its own peer does not deadlock. */
TEST_F_TIMEOUT(peers, dma_into_itself, 120)
{
	unsigned int count = mig_times(30), i;
	struct mock *a = &self->a;
	struct dma_desc d;
	__u64 half = a->size / 2;
	int fd = -1;

	if (a->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		fd = go(_metadata, &a->dev, MIG_PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &(struct mig_stream){},
					    stream_limit(&a->dev)));
	}
	for (i = 0; i < count; i++) {
		d = pick_peer_transfer(self, A_IOVA, half - PAGE);
		/* Ranges that do not overlap have one possible result. */
		d.addr %= half - d.len;
		d.iova = A_IOVA + half + (d.iova - A_IOVA) % (half - d.len);
		run_peer(_metadata, a, a, A_IOVA, &d);
	}
	expect_memory(_metadata, a, a->want, "after transfers of a device into itself");

	/* With overlapping ranges the result is undefined, but the transfer ends. */
	for (d.op = READ; d.op <= WRITE; d.op++) {
		d.addr = 0;
		d.len = a->size - 100;
		d.iova = A_IOVA + 100;
		d.status = dma_run(_metadata, a, 0, &d).status;
		EXPECT_EQ(VFIO_MOCK_DMA_COMPLETE, (int)d.status);
	}
	if (fd >= 0) {
		EXPECT_LE(0, mig_read(fd, &(struct mig_stream){}, 4096))
			PROMISE("its stream can be read");
	}
}

/* A peer that writes to a stopped device: a bug of the client. */
TEST_F_TIMEOUT(peers, dma_into_a_stopped_peer_is_dropped, 120)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY };
	struct mock *a = &self->a, *b = &self->b;
	struct dma_desc d;
	unsigned int i;
	__u64 dropped;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		ASSERT_EQ(0, mig_set_state(&a->dev, states[i], NULL));
		dropped = reg64(a, DROPPED);
		for (d.op = WRITE; d.op <= FILL; d.op++) {
			d = (struct dma_desc){
				.op = d.op, .iova = A_IOVA + 3 * PAGE + 5, .len = 3 * PAGE,
				.seed = 99, .irq_vector = VFIO_MOCK_IRQ_NONE,
			};
			d = dma_run(_metadata, b, 0, &d);
			EXPECT_EQ(VFIO_MOCK_DMA_COMPLETE, (int)d.status);
		}
		EXPECT_LT(dropped, reg64(a, DROPPED))
			PROMISE("writes of a peer in %s are counted", mig_state_name(states[i]));
		expect_memory(_metadata, a, a->want, mig_state_name(states[i]));
		ASSERT_EQ(0, mig_set_state(&a->dev, MIG_RUNNING, NULL));
		expect_memory(_metadata, a, a->want, "running again");
		EXPECT_EQ(0, memcmp(a->want, self->a_map, a->size))
			PROMISE("the mapping shows the memory of a device that runs again");
		d = pick_peer_transfer(self, A_IOVA, 5 * PAGE);
		run_peer(_metadata, b, a, A_IOVA, &d);
		expect_memory(_metadata, a, a->want, "after a transfer of the peer");
	}
}

MIG_HARNESS_MAIN(mock_options)
