// SPDX-License-Identifier: GPL-2.0
/*
 * A hostile client: threads that call the uAPI with random and invalid arguments on
 * one device: regions at any offset, every ioctl with wrong sizes and pointers,
 * partial mappings, interrupts, states, damaged streams, DMA to any address. Meanwhile
 * the host turns the knobs of the device. The kernel has to survive, and the device has
 * to be in its power-on state when it is opened again.
 *
 *	./vfio_mock_fuzz_test --small "SOURCE TARGET"
 *
 * "--calls N" is the total number of calls, "--seed N" determines the calls of each
 * thread, but not their interleaving.
 */
#include <sys/eventfd.h>

#include "mock.h"
#include "mock_image.h"

#define THREADS		4
#define BUFFER		(64 * PAGE)

/* The IOVA of the memory for DMA. */
#define DMA_IOVA	0x10000000ULL

struct fuzz {
	struct mock *m;
	const struct mig_stream *image;
	__u8 *map;			/* memory for DMA of the device */
	unsigned long calls;
	atomic_int data_fd;
};

struct hand {
	pthread_t thread;
	struct fuzz *f;
	__u64 state;
	__u8 *buffer;
	void *room;			/* reserved address space for a mapping of BAR2 */
	void *bar;			/* the mapping, or NULL */
	size_t bar_len;
	int eventfd;
};

static __u64 any(struct hand *h)
{
	h->state += VFIO_MOCK_GOLDEN;
	return vfio_mock_mix(h->state);
}

static __u64 below(struct hand *h, __u64 n)
{
	return any(h) % n;
}

/* Small numbers, powers of two and their neighbours, and random numbers. */
static __u64 number(struct hand *h)
{
	__u64 bit = 1ULL << below(h, 64);

	switch (below(h, 6)) {
	case 0:
		return below(h, 16);
	case 1:
		return bit;
	case 2:
		return bit - 1;
	case 3:
		return -bit;
	case 4:
		return below(h, BUFFER);
	default:
		return any(h);
	}
}

/* Mostly valid memory; else NULL, a kernel address, read-only, or the device's own. */
static void *pointer(struct hand *h)
{
	switch (below(h, 10)) {
	case 0:
		return (void *)number(h);
	case 1:
		return NULL;
	case 2:
		return (void *)(uintptr_t)"read-only";
	case 3:
		return h->bar ? h->bar : h->buffer;
	case 4:
		/* Its end is unmapped. */
		return h->buffer + BUFFER - below(h, 64);
	default:
		return h->buffer + below(h, BUFFER / 2);
	}
}

static void call_region(struct hand *h)
{
	const struct mock *m = h->f->m;
	__u64 region = below(h, 12), at = number(h);
	size_t len = below(h, 4) ? below(h, 64) : below(h, BUFFER);

	if (below(h, 2))
		at %= 0x5000;
	if (below(h, 2))
		pread(m->dev.fd, pointer(h), len, (region << 40) + at);
	else
		pwrite(m->dev.fd, pointer(h), len, (region << 40) + at);
}

static void call_dma(struct hand *h)
{
	const __u64 iovas[] = { DMA_IOVA, DMA_IOVA + PAGE - 1, 0, ~0ULL - PAGE };
	const struct mock *m = h->f->m;
	struct vfio_mock_dma_desc desc = {
		.iova = below(h, 4) ? iovas[below(h, 4)] + below(h, BUFFER) : number(h),
		.addr = below(h, 4) ? below(h, m->size) : number(h),
		.len = below(h, 4) ? below(h, m->size) : number(h),
		.seed = any(h),
		.op = below(h, 6),
		.irq_vector = below(h, 6),
		.period = below(h, 3) ? 0 : below(h, 1000),
		.step = below(h, 2) ? 0 : number(h),
	};
	__u32 n = below(h, 18);

	mock_write(m, BAR0, VFIO_MOCK_DMA_DESC(n), &desc, 0x30);
	mock_write(m, BAR0, VFIO_MOCK_REG_DMA_DOORBELL, &n, sizeof(n));
	n = below(h, 4) ? below(h, 20) : VFIO_MOCK_DMA_ALL;
	if (!below(h, 3))
		mock_write(m, BAR0, VFIO_MOCK_REG_DMA_ABORT, &n, sizeof(n));
}

static void call_ioctl(struct hand *h)
{
	static const unsigned int nrs[] = { 7, 8, 9, 10, 11, 12, 17, 21, 22 };
	unsigned int cmd = _IO(VFIO_TYPE, VFIO_BASE + nrs[below(h, ARRAY_SIZE(nrs))]);
	__u32 *arg = pointer(h);
	unsigned int i;

	/* Other functions call RESET often enough. */
	if (cmd == VFIO_DEVICE_RESET && below(h, 8))
		cmd = any(h);
	if ((__u8 *)arg >= h->buffer && (__u8 *)arg < h->buffer + BUFFER / 2) {
		for (i = 0; i < 16; i++)
			arg[i] = number(h);
		arg[0] = below(h, 3) ? 16 + below(h, 64) : number(h);
	}
	ioctl(h->f->m->dev.fd, cmd, arg);
}

static void call_irqs(struct hand *h)
{
	struct {
		struct vfio_irq_set set;
		__s32 fds[8];
	} irqs;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(irqs.fds); i++)
		irqs.fds[i] = below(h, 3) ? h->eventfd : (__s32)number(h);
	irqs.set = (struct vfio_irq_set){
		.argsz = below(h, 4) ? sizeof(irqs) : number(h),
		.flags = below(h, 3) ? 1U << below(h, 3) | 8U << below(h, 3) : below(h, 64),
		.index = below(h, 3) ? VFIO_PCI_MSIX_IRQ_INDEX : below(h, 8),
		.start = below(h, 3) ? below(h, 5) : number(h),
		.count = below(h, 3) ? below(h, 5) : number(h),
	};
	ioctl(h->f->m->dev.fd, VFIO_DEVICE_SET_IRQS, &irqs);
}

static void call_feature(struct hand *h)
{
	struct {
		struct vfio_device_feature feature;
		__u64 data[8];
	} f;
	unsigned int i;

	f.feature.argsz = below(h, 3) ? sizeof(f) : number(h);
	f.feature.flags = below(h, 16) | 1U << (16 + below(h, 3));
	if (!below(h, 4))
		f.feature.flags |= number(h);
	for (i = 0; i < ARRAY_SIZE(f.data); i++)
		f.data[i] = below(h, 3) ? number(h) : (__u64)(uintptr_t)pointer(h);
	ioctl(h->f->m->dev.fd, VFIO_DEVICE_FEATURE, &f);
}

static void call_log(struct hand *h)
{
	struct vfio_device_feature_dma_logging_range ranges[3];
	__u64 page_size = below(h, 3) ? PAGE : number(h);
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(ranges); i++) {
		ranges[i].iova = number(h) & (below(h, 4) ? -PAGE : -1ULL);
		ranges[i].length = number(h) & (below(h, 4) ? -PAGE : -1ULL);
	}
	switch (below(h, 3)) {
	case 0:
		mig_log_start(&h->f->m->dev, &page_size, ranges, 1 + below(h, 3));
		break;
	case 1:
		mig_log_stop(&h->f->m->dev);
		break;
	default:
		/* A bitmap for the whole range would be larger than the buffer. */
		mig_log_report(&h->f->m->dev, number(h), below(h, 1ULL << 30), page_size,
			       pointer(h));
	}
}

static void call_state(struct hand *h)
{
	__u32 state = below(h, 10) < 9 ? below(h, 8) : number(h);
	int fd = -1, old;

	if (!below(h, 20)) {
		mig_reset(&h->f->m->dev);
		return;
	}
	if (!mig_set_state(&h->f->m->dev, state, &fd) && fd >= 0) {
		fcntl(fd, F_SETFL, O_NONBLOCK);
		old = atomic_exchange(&h->f->data_fd, fd);
		if (old >= 0)
			close(old);
	}
}

static void call_data_fd(struct hand *h)
{
	const struct mig_stream *image = h->f->image;
	size_t at = below(h, image->len), len = below(h, image->len - at) + 1;
	int fd = dup(atomic_load(&h->f->data_fd));

	if (fd < 0)
		return;
	switch (below(h, 6)) {
	case 0:
		read(fd, pointer(h), below(h, BUFFER));
		break;
	case 1:
		/* From the beginning, so that it may be valid. */
		if (below(h, 2))
			at = 0;
		len = at + len > image->len ? image->len - at : len;
		if (len > BUFFER / 2)
			len = BUFFER / 2;
		memcpy(h->buffer, image->data + at, len);
		if (below(h, 2))
			h->buffer[below(h, len)] ^= 1U << below(h, 8);
		write(fd, h->buffer, len);
		break;
	case 2:
		write(fd, pointer(h), below(h, BUFFER));
		break;
	case 3:
		ioctl(fd, _IO(VFIO_TYPE, VFIO_BASE + 20 + below(h, 4)), pointer(h));
		break;
	case 4:
		mig_poll(fd, any(h), 0);
		break;
	default:
		lseek(fd, number(h), below(h, 4));
		pread(fd, pointer(h), 64, number(h));
	}
	close(fd);
}

/* Reserves the range at @at, or a new one, and returns NULL. */
static void *make_room(void *at)
{
	return mmap(at, 2 * BUFFER, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		    0) == MAP_FAILED ? at : NULL;
}

static void call_mapping(struct hand *h)
{
	const int fd = h->f->m->dev.fd;
	size_t at;

	if (!h->bar) {
		h->bar_len = (1 + below(h, 16)) * PAGE;
		h->bar = mmap(h->room, h->bar_len, PROT_READ | PROT_WRITE,
			      (below(h, 8) ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED, fd,
			      below(h, 8) ? (2ULL << 40) + below(h, 16) * PAGE :
					    (off_t)(number(h) & ~(PAGE - 1) & LLONG_MAX));
		if (h->bar == MAP_FAILED)
			h->bar = NULL;
		return;
	}
	at = below(h, h->bar_len / PAGE) * PAGE;
	switch (below(h, 6)) {
	case 0:
		h->bar = make_room(h->room);
		break;
	case 1:
		madvise((__u8 *)h->bar + at, PAGE, below(h, 26));
		break;
	case 2:
		/* Remove and restore write access, so that it stays accessible. */
		mprotect((__u8 *)h->bar + at, PAGE, PROT_READ);
		mprotect((__u8 *)h->bar + at, PAGE, PROT_READ | PROT_WRITE);
		break;
	default:
		/* An access by the kernel, which survives an unmapped page. */
		if (!mincore((__u8 *)h->bar + at, PAGE, h->buffer))
			pread(fd, (__u8 *)h->bar + at, below(h, PAGE),
			      (2ULL << 40) + below(h, PAGE));
	}
}

/* The knobs, with the values that turn them off. */
static const char *const knobs[][2] = {
	{ "save_delay_us", "0" }, { "save_rate", "0" },
	{ "load_delay_us", "0" }, { "load_rate", "0" },
	{ "dirty_rate", "0" }, { "dirty_span", "0" }, { "dirty_pattern", "sequential" },
	{ "initial_bytes", "exact" }, { "dirty_bytes", "exact" }, { "tail_bytes", "exact" },
	{ "stream_version", "1" }, { "stream_features", "0" },
	{ "faults", "off" },
};

static void turn_off(const struct mock *m)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(knobs); i++)
		mock_set(m, knobs[i][0], knobs[i][1]);
}

static void call_knob(struct hand *h)
{
	/* No delay that only another thread could end. */
	static const char *const rules[] = {
		"arc *->* nth=3 times=2 errno=EAGAIN", "arc *->* delay_us=100 times=-1",
		"arc *->STOP_COPY state=ERROR", "arc PRE_COPY->* reinit=1",
		"read after=1 times=9 errno=ENOMSG", "read nth=2 times=-1 reinit=1",
		"write after=4097 xor=255", "write nth=2; loaded nth=2 state=ERROR",
		"seal errno=EAGAIN; size times=5; reset nth=2",
		"log_start; log_report; log_stop", "dma times=-1 errno=ENOMEM",
	};
	unsigned int i = below(h, ARRAY_SIZE(knobs));
	const char *name = knobs[i][0], *value = knobs[i][1];
	char text[32];

	snprintf(text, sizeof(text), "%llu%s", (unsigned long long)number(h),
		 below(h, 4) ? "" : "%");
	if (!below(h, 8))
		name = "reinit";
	else if (!strcmp(name, "faults") && below(h, 4))
		value = rules[below(h, ARRAY_SIZE(rules))];
	else if (!strcmp(name, "dirty_pattern") && below(h, 2))
		value = below(h, 2) ? "hot" : "random";
	else if (below(h, 2))
		value = text;
	mock_set(h->f->m, name, value);
}

static void *hand_main(void *arg)
{
	static void (*const calls[])(struct hand *h) = {
		call_region, call_region, call_dma, call_ioctl, call_irqs, call_feature,
		call_log, call_state, call_data_fd, call_data_fd, call_mapping,
		call_knob,
	};
	struct hand *h = arg;
	unsigned long i;

	for (i = 0; i < h->f->calls; i++)
		calls[below(h, ARRAY_SIZE(calls))](h);
	return NULL;
}

FIXTURE(fuzz)
{
	struct mock m;
	struct mig_stream image;
};

MIG_EACH_BACKEND(fuzz);

FIXTURE_SETUP(fuzz)
{
	int fd = -1;

	MOCK_OPEN_OR_SKIP(&self->m, "small", 0, variant->backend);
	populate(_metadata, &self->m, 1);
	stop_and_save(_metadata, &self->m, &fd, &self->image);
	close(fd);
	ASSERT_EQ(0, mig_reset(&self->m.dev));
}

FIXTURE_TEARDOWN(fuzz)
{
	turn_off(&self->m);
	mig_stream_free(&self->image);
	mock_close(&self->m);
}

TEST_F_TIMEOUT(fuzz, hostile_client, 3600)
{
	unsigned long seed = mig_number("seed", 1);
	unsigned long calls = mig_number("calls", 20000);
	struct fuzz f = {
		.m = &self->m, .image = &self->image, .calls = calls / THREADS,
		.data_fd = -1,
	};
	struct mock *m = &self->m;
	struct hand hands[THREADS] = {};
	unsigned int i;
	int fd;

	TH_LOG("  %lu calls, seed %lu", f.calls * THREADS, seed);
	f.map = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)f.map);
	ASSERT_EQ(0, mig_dma_map(&m->dev, DMA_IOVA, f.map, BUFFER,
				 MIG_DMA_READ | MIG_DMA_WRITE));
	for (i = 0; i < THREADS; i++) {
		hands[i].f = &f;
		hands[i].state = vfio_mock_mix(seed * THREADS + i);
		hands[i].eventfd = eventfd(0, EFD_NONBLOCK);
		/* An unmapped page follows. */
		hands[i].buffer = mmap(NULL, BUFFER + PAGE, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		ASSERT_NE(MAP_FAILED, (void *)hands[i].buffer);
		ASSERT_EQ(0, mprotect(hands[i].buffer + BUFFER, PAGE, PROT_NONE));
		hands[i].room = mmap(NULL, 2 * BUFFER, PROT_NONE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		ASSERT_NE(MAP_FAILED, hands[i].room);
	}
	for (i = 0; i < THREADS; i++)
		ASSERT_EQ(0, pthread_create(&hands[i].thread, NULL, hand_main, &hands[i]));
	for (i = 0; i < THREADS; i++)
		pthread_join(hands[i].thread, NULL);

	turn_off(m);
	EXPECT_EQ(0, mig_reset(&m->dev))
		PROMISE("RESET succeeds after any calls");
	expect_state(_metadata, &m->dev, MIG_RUNNING, "after RESET");
	fd = atomic_load(&f.data_fd);
	EXPECT_TRUE(fd < 0 || mig_fd_is_dead(fd))
		PROMISE("RESET ends the session");
	close(fd);
	for (i = 0; i < THREADS; i++) {
		munmap(hands[i].room, 2 * BUFFER);
		close(hands[i].eventfd);
	}
	mig_close_device(&m->dev);
	ASSERT_EQ(0, mig_reopen_device(&m->dev));
	expect_fresh(_metadata, m, "for the next opener");
	load_and_run(_metadata, &m->dev, &self->image, 0);
	expect_memory(_metadata, m, m->want, "after a good image");
}

MIG_HARNESS_MAIN(mock_options)
