// SPDX-License-Identifier: GPL-2.0
/*
 * Two mock migratable devices that write to each other and to memory, and writers
 * that store to both by mappings and by write(), while both devices migrate back and
 * forth. After each migration every byte is compared with the source, with the
 * stream, and with the positions of the writers.
 *
 *	./vfio_mock_stress --medium "A A2 B B2"
 *
 * with the sysfs paths of four mediated devices. run_mock.sh creates them and runs
 * this: 10 rounds, and with --rounds N 20 * N rounds.
 */
#include "mock_dma.h"

#define stress_data	FIXTURE_DATA(stress)

#define NR_DEVICES	2
#define NR_MAPPINGS	2

/* The writers: one for each mapping of each device, and one with write(). */
#define PER_DEVICE	(NR_MAPPINGS + 1)
#define NR_WRITERS	(NR_DEVICES * PER_DEVICE)

#define RAM_IOVA	0x40000000ULL
#define BAR_IOVA(n)	(0x10000000ULL * ((n) + 1))

/* The state memory: pages for the writers, and an area for each descriptor. */
#define WRITTEN_PAGES	64ULL
#define PLACE_PAGES	16ULL
#define PLACE(n)	((WRITTEN_PAGES + PLACE_PAGES * (n)) * PAGE)

/* The memory: this number of areas for each device; the last one is only read. */
#define RAM_PLACES	3
#define RAM_PAGES	(NR_DEVICES * RAM_PLACES * PLACE_PAGES)
#define RAM_PLACE(dev, n)	(((dev) * RAM_PLACES + (n)) * PLACE_PAGES * PAGE)
#define RAM_SIZE	(RAM_PAGES * PAGE)

/* A host that the devices migrate to and from. */
struct host {
	struct mock dev[NR_DEVICES];
	__u8 *map[NR_DEVICES][NR_MAPPINGS];
};

struct writer {
	pthread_t thread;
	unsigned int n;
	struct host *hosts;
	atomic_uint *here;		/* the host with the devices */
	atomic_bool *stop;
	atomic_ullong begun;		/* number of stores */
	atomic_ullong done;
};

FIXTURE(stress)
{
	struct host hosts[2];
	struct ram ram;
	__u8 *copy;			/* of the memory, made by the DMA logs */
	atomic_uint here;
	struct writer writers[NR_WRITERS];
	atomic_bool stop;
};

MIG_EACH_BACKEND(stress);

FIXTURE_SETUP(stress)
{
	struct host *host;
	unsigned int h, n, i;

	for (h = 0; h < 2; h++) {
		host = &self->hosts[h];
		for (n = 0; n < NR_DEVICES; n++) {
			MOCK_OPEN_OR_SKIP(&host->dev[n], "medium", 2 * n + h,
					  variant->backend);
			for (i = 0; i < NR_MAPPINGS; i++)
				host->map[n][i] = bar2_map(_metadata, &host->dev[n], 0,
							   host->dev[n].size);
		}
	}
	ram_make(_metadata, &self->ram, RAM_IOVA, RAM_SIZE);
	self->copy = malloc(RAM_SIZE);
	ASSERT_NE(NULL, self->copy);
}

FIXTURE_TEARDOWN(stress)
{
	struct host *host;
	unsigned int n, i;

	for (host = self->hosts; host < self->hosts + 2; host++) {
		for (n = 0; n < NR_DEVICES; n++) {
			/* DMA holds a reference to our memory. */
			mig_reset(&host->dev[n].dev);
			for (i = 0; i < NR_MAPPINGS; i++)
				munmap(host->map[n][i], host->dev[n].size);
			mock_close(&host->dev[n]);
		}
	}
}

/* ---- Writers ---- */

/* Store number @i goes to the writer's own word in this page. */
static __u64 page_of(__u64 i)
{
	return i * 37 % WRITTEN_PAGES;
}

static __u64 word_of(const struct writer *w, __u64 i)
{
	return page_of(i) * PAGE + w->n % PER_DEVICE * 8 + 1000;
}

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	unsigned int dev = w->n / PER_DEVICE, how = w->n % PER_DEVICE;
	struct host *host;
	__u64 i;

	for (i = 1; !atomic_load(w->stop); i++) {
		host = &w->hosts[atomic_load(w->here)];
		atomic_store(&w->begun, i);
		if (how < NR_MAPPINGS)
			__atomic_store_n((__u64 *)(host->map[dev][how] + word_of(w, i)), i,
					 __ATOMIC_RELAXED);
		else if (mock_write(&host->dev[dev], BAR2, word_of(w, i), &i, 8) != 8)
			break;
		atomic_store(&w->done, i);
	}
	return NULL;
}

/* The number of stores of a writer before and after the stop. */
struct bounds {
	__u64 before;
	__u64 after;
};

/* All stores before the stop are in memory, and none after it. */
static void expect_stores(struct __test_metadata *_metadata, const struct writer *w,
			  const __u8 *memory, const struct bounds *b)
{
	__u64 value, i;

	for (i = b->before - WRITTEN_PAGES + 1; i <= b->before; i++) {
		memcpy(&value, memory + word_of(w, i), 8);
		EXPECT_LE(i, value)
			PROMISE("store %llu of writer %u was before the stop", i, w->n);
		EXPECT_GE(b->after, value)
			PROMISE("store %llu of writer %u was after the stop", value, w->n);
		EXPECT_EQ(page_of(i), page_of(value));
	}
}

/* Waits until each writer has stored to each page of a running device. */
static void let_them_store(struct __test_metadata *_metadata, stress_data *self)
{
	struct writer *w;
	__u64 until;

	for (w = self->writers; w < self->writers + NR_WRITERS; w++) {
		until = atomic_load(&w->done) + WRITTEN_PAGES + 2;
		WAIT_FOR(atomic_load(&w->done) >= until, "writer %u makes progress", w->n);
	}
}

/* ---- DMA of the devices ---- */

enum {
	FILL_PEER, WRITE_PEER, FILL_RAM, WRITE_RAM, READ_RAM, CHURN_OWN, NR_KINDS,
	STATIC = NR_KINDS,	/* an area that is never written */
};

/* The expected content at the IOVA of descriptor @n of a device. */
static __u8 *want_at_iova(stress_data *self, struct host *host, unsigned int dev,
			  unsigned int n, const struct dma_desc *d)
{
	if (n == FILL_PEER || n == WRITE_PEER)
		return host->dev[!dev].want + (d->iova - BAR_IOVA(!dev));
	return d->op == CHURN ? NULL : ram_want(&self->ram, d->iova);
}

static void start_dma(struct __test_metadata *_metadata, stress_data *self,
		      unsigned int dev)
{
	struct mock *m = &self->hosts[0].dev[dev];
	unsigned int n;

	fill(_metadata, m, PLACE(STATIC), PLACE_PAGES * PAGE, dev);
	for (n = 0; n < NR_KINDS; n++) {
		struct dma_desc d = {
			.len = PLACE_PAGES * PAGE - 200 * n - 1, .step = 700 + 1300 * n,
			.period = 50 + 100 * n, .seed = (__u64)(dev + 1) << (40 + n),
			.irq_vector = n % VFIO_MOCK_MSIX_VECTORS,
		};

		switch (n) {
		case FILL_PEER:
		case WRITE_PEER:
			/* Without P2P states one of them would write to a stopped device. */
			if (!(m->dev.flags & VFIO_MIGRATION_P2P))
				continue;
			d.op = n == FILL_PEER ? FILL : WRITE;
			d.iova = BAR_IOVA(!dev) + PLACE(n) + n;
			d.addr = PLACE(STATIC) + 9;
			break;
		case FILL_RAM:
		case WRITE_RAM:
			d.op = n == FILL_RAM ? FILL : WRITE;
			d.iova = RAM_IOVA + RAM_PLACE(dev, n - FILL_RAM) + n;
			d.addr = PLACE(STATIC) + 99;
			break;
		case READ_RAM:
			d.op = READ;
			d.iova = RAM_IOVA + RAM_PLACE(dev, n - FILL_RAM) + n;
			d.addr = PLACE(n) + 3;
			break;
		case CHURN_OWN:
			d.op = CHURN;
			d.addr = PLACE(n) + 5;
			break;
		}
		dma_set(_metadata, m, n, &d);
		dma_ring(_metadata, m, n);
	}
}

/* Brings the model up to the positions of the stopped devices. */
static void catch_up(struct __test_metadata *_metadata, stress_data *self,
		     struct host *host)
{
	unsigned int dev, n;
	struct dma_desc d;

	for (dev = 0; dev < NR_DEVICES; dev++) {
		for (n = 0; n < NR_KINDS; n++) {
			d = dma_get(_metadata, &host->dev[dev], n);
			if (d.status == VFIO_MOCK_DMA_IDLE)
				continue;
			EXPECT_EQ(VFIO_MOCK_DMA_ACTIVE, (int)d.status)
				PROMISE("descriptor %u of device %u stays active (error %u at %llu)",
					n, dev, d.error, d.pos);
			dma_apply_rounds(&d, host->dev[dev].want,
					 want_at_iova(self, host, dev, n, &d));
		}
	}
}

/* ---- Migration ---- */

/* Maps the memory and the other device for the devices of a host. */
static void map_all(struct __test_metadata *_metadata, stress_data *self,
		    struct host *host, bool map)
{
	unsigned int dev, n;

	for (dev = 0; dev < NR_DEVICES; dev++) {
		struct mock *m = &host->dev[dev];

		if (!map) {
			ASSERT_EQ(0, mig_dma_unmap(&m->dev, RAM_IOVA, RAM_SIZE));
			for (n = 0; n < NR_DEVICES; n++) {
				ASSERT_EQ(0, mig_dma_unmap(&m->dev, BAR_IOVA(n),
							   host->dev[n].size));
			}
			continue;
		}
		ram_map(_metadata, &self->ram, m);
		for (n = 0; n < NR_DEVICES; n++) {
			ASSERT_EQ(0, mig_dma_map(&m->dev, BAR_IOVA(n), host->map[n][n],
						 host->dev[n].size, RW));
		}
	}
}

/* Copies the pages in the DMA logs, like a VMM that copies guest memory. */
static void follow_ram(struct __test_metadata *_metadata, stress_data *self,
		       struct host *host)
{
	__u64 bitmap[(RAM_PAGES + 63) / 64] = {}, page;
	unsigned int dev;

	for (dev = 0; dev < NR_DEVICES; dev++) {
		ASSERT_EQ(0, mig_log_report(&host->dev[dev].dev, RAM_IOVA, RAM_SIZE, PAGE,
					    bitmap));
	}
	for (page = 0; page < RAM_PAGES; page++)
		if (bitmap[page / 64] >> (page % 64) & 1)
			memcpy(self->copy + page * PAGE, self->ram.mem + page * PAGE, PAGE);
}

static void start_logs(struct __test_metadata *_metadata, stress_data *self,
		       struct host *host)
{
	/* All of the address space, independent of the mappings. */
	static const struct vfio_device_feature_dma_logging_range ranges[] = {
		{ .iova = 0, .length = 1ULL << 32 },
		{ .iova = 1ULL << 32, .length = 1ULL << 63 },
	};
	__u64 page_size = PAGE;
	unsigned int dev;

	for (dev = 0; dev < NR_DEVICES; dev++) {
		ASSERT_EQ(0, mig_log_start(&host->dev[dev].dev, &page_size, ranges, 2))
			STEP("start the DMA log");
	}
	memcpy(self->copy, self->ram.mem, RAM_SIZE);
}

static void set_all(struct __test_metadata *_metadata, struct host *host, __u32 state,
		    int fds[NR_DEVICES])
{
	unsigned int dev;
	int ret, fd;

	for (dev = 0; dev < NR_DEVICES; dev++) {
		ret = mig_set_state(&host->dev[dev].dev, state, &fd);
		ASSERT_EQ(0, ret)
			STEP("take device %u to %s: %s", dev, mig_state_name(state),
			     strerror(-ret));
		if (fd >= 0)
			fds[dev] = fd;
	}
}

/* Some rounds of pre-copy; these devices never become quiet. */
static void pre_copy(struct __test_metadata *_metadata, stress_data *self,
		     struct host *host, const int fds[NR_DEVICES],
		     struct mig_stream images[NR_DEVICES])
{
	unsigned int dev, i;
	int ret;

	for (i = 0; i < 60; i++) {
		for (dev = 0; dev < NR_DEVICES; dev++) {
			ret = mig_read(fds[dev], &images[dev], 1 << 15);
			ASSERT_TRUE(ret > 0 || ret == -ENOMSG)
				STEP("read in pre-copy: %s", strerror(-ret));
		}
		if (i % 20 == 0)
			follow_ram(_metadata, self, host);
	}
}

/* Streams the rest of a stopped device, which does not change meanwhile. */
static void drain(struct __test_metadata *_metadata, struct mock *m, int fd,
		  struct mig_stream *image)
{
	ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->want, m->size));
	ASSERT_EQ(0, mig_save(fd, image, stream_limit(&m->dev)));
	expect_memory(_metadata, m, m->want, "in STOP_COPY, during stores");
	expect_image(_metadata, m, image);
	close(fd);
}

static void load(struct __test_metadata *_metadata, const struct mock *from,
		 struct mock *to, const struct mig_stream *image)
{
	struct dma_desc d, want;
	unsigned int n;
	int fd;

	fd = go(_metadata, &to->dev, MIG_RESUMING);
	load_all(_metadata, fd, image);
	ASSERT_EQ(0, mig_set_state(&to->dev, MIG_STOP, NULL));
	close(fd);
	memcpy(to->want, from->want, to->size);
	for (n = 0; n < DESCS; n++) {
		want = dma_get(_metadata, from, n);
		d = dma_get(_metadata, to, n);
		EXPECT_EQ(0, memcmp(&want, &d, sizeof(d)))
			PROMISE("descriptor %u migrates", n);
	}
}

/* One migration of both devices, followed by a comparison of everything. */
static void move(struct __test_metadata *_metadata, stress_data *self,
		 struct host *from, struct host *to)
{
	__u64 flags = from->dev[0].dev.flags;
	struct mig_stream images[NR_DEVICES] = {};
	struct bounds bounds[NR_WRITERS];
	int fds[NR_DEVICES] = { -1, -1 };
	unsigned int dev, n;

	start_logs(_metadata, self, from);
	if (flags & VFIO_MIGRATION_PRE_COPY) {
		set_all(_metadata, from, MIG_PRE_COPY, fds);
		pre_copy(_metadata, self, from, fds, images);
	}
	for (n = 0; n < NR_WRITERS; n++)
		bounds[n].before = atomic_load(&self->writers[n].done);
	/* Both devices are in a P2P state before the first one stops. */
	if (flags & VFIO_MIGRATION_P2P)
		set_all(_metadata, from, flags & VFIO_MIGRATION_PRE_COPY ?
			MIG_PRE_COPY_P2P : MIG_RUNNING_P2P, fds);
	set_all(_metadata, from, MIG_STOP_COPY, fds);
	for (n = 0; n < NR_WRITERS; n++)
		bounds[n].after = atomic_load(&self->writers[n].begun);

	for (dev = 0; dev < NR_DEVICES; dev++) {
		drain(_metadata, &from->dev[dev], fds[dev], &images[dev]);
		for (n = 0; n < PER_DEVICE; n++)
			expect_stores(_metadata, &self->writers[dev * PER_DEVICE + n],
				      from->dev[dev].want, &bounds[dev * PER_DEVICE + n]);
	}
	/* The model of the rest does not depend on the memory. */
	catch_up(_metadata, self, from);
	for (dev = 0; dev < NR_DEVICES; dev++)
		expect_memory(_metadata, &from->dev[dev], from->dev[dev].want,
			      "the transfers on the source");
	expect_ram(_metadata, &self->ram, "on the source");
	follow_ram(_metadata, self, from);
	expect_bytes(_metadata, self->ram.mem, self->copy, RAM_SIZE, "the copy of the memory");

	for (dev = 0; dev < NR_DEVICES; dev++) {
		load(_metadata, &from->dev[dev], &to->dev[dev], &images[dev]);
		mig_stream_free(&images[dev]);
	}
	atomic_store(&self->here, to - self->hosts);
	for (dev = 0; dev < NR_DEVICES; dev++)
		expect_memory(_metadata, &to->dev[dev], to->dev[dev].want, "on the target");
	expect_ram(_metadata, &self->ram, "on the target");
	for (dev = 0; dev < NR_DEVICES; dev++) {
		ASSERT_EQ(0, mig_log_stop(&from->dev[dev].dev));
		ASSERT_EQ(0, mig_reset(&from->dev[dev].dev));
	}
	map_all(_metadata, self, from, false);
	map_all(_metadata, self, to, true);
	set_all(_metadata, to, flags & VFIO_MIGRATION_P2P ? MIG_RUNNING_P2P : MIG_RUNNING, fds);
	set_all(_metadata, to, MIG_RUNNING, fds);
}

TEST_F_TIMEOUT(stress, everything_at_once, 7200)
{
	unsigned int rounds = mig_times(1) == 1 ? 10 : mig_times(20), i, n;
	struct host *here = &self->hosts[0], *there = &self->hosts[1], *swap;
	__u64 bytes;

	NEED_IOMMUFD_FOR_LOG();
	vfio_mock_pattern(self->ram.mem, 1, 0, RAM_SIZE);
	memcpy(self->ram.want, self->ram.mem, RAM_SIZE);
	map_all(_metadata, self, here, true);
	for (n = 0; n < NR_DEVICES; n++)
		start_dma(_metadata, self, n);
	for (n = 0; n < NR_WRITERS; n++) {
		struct writer *w = &self->writers[n];

		w->n = n;
		w->hosts = self->hosts;
		w->here = &self->here;
		w->stop = &self->stop;
		ASSERT_EQ(0, pthread_create(&w->thread, NULL, writer_main, w));
	}
	for (i = 0; i < rounds; i++) {
		let_them_store(_metadata, self);
		move(_metadata, self, here, there);
		ASSERT_NE(KSFT_FAIL, _metadata->exit_code)
			TH_LOG("  in round %u", i);
		swap = here;
		here = there;
		there = swap;
	}
	bytes = reg64(&here->dev[0], DMA_BYTES) + reg64(&here->dev[1], DMA_BYTES);
	atomic_store(&self->stop, true);
	for (n = 0; n < NR_WRITERS; n++) {
		ASSERT_TRUE(joined(self->writers[n].thread))
			STEP("end writer %u", n);
	}
	TH_LOG("%u rounds, %llu MiB moved by DMA", rounds, bytes >> 20);
}

MIG_HARNESS_MAIN(mock_options)
