// SPDX-License-Identifier: GPL-2.0
/*
 * Injects every possible failure into the calls of a client of vfio_mock: the first
 * allocation or user copy fails, then the second, and so on until all succeed; and
 * the same again with all following allocations. After each failure the errno is
 * correct, the device is usable or can be reset, and no data is lost.
 *
 *	./vfio_mock_fail_test --small "SOURCE TARGET"
 *
 * as root, with CONFIG_FAULT_INJECTION, CONFIG_FAILSLAB,
 * CONFIG_FAULT_INJECTION_USERCOPY and CONFIG_FAIL_PAGE_ALLOC.
 * The model is tools/testing/selftests/iommu/iommufd_fail_nth.c.
 */
#include <glob.h>

#include "mock_dma.h"
#include "mock_fail.h"

FIXTURE(fail)
{
	struct mock src, dst;
	struct injector in;
	struct nth nth;
};

MIG_EACH_BACKEND(fail);

FIXTURE_SETUP(fail)
{
	const char *why = NULL;

	self->src.dev.fd = -1;
	self->dst.dev.fd = -1;
	if (fail_open(&self->in, &why))
		SKIP(return, "%s", why);
	MOCK_OPEN_OR_SKIP(&self->src, "small", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "small", 1, variant->backend);
}

FIXTURE_TEARDOWN(fail)
{
	mock_close(&self->src);
	mock_close(&self->dst);
	injector_close(&self->in);
}

TEST_F_TIMEOUT(fail, open_and_close, 120)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	int ret;

	set64(&self->src, SCRATCH, 1);
	mig_close_device(dev);
	for_each_failure(nth, "open") {
		/* mig_open() translates errors of opening the files of VFIO. */
		nth->also = -EOPNOTSUPP;
		nth_begin(nth);
		ret = mig_reopen_device(dev);
		nth_end(nth, ret);
		if (!ret) {
			EXPECT_EQ(0ULL, reg64(&self->src, SCRATCH))
				PROMISE("the next opener gets the power-on state");
			set64(&self->src, SCRATCH, nth->n);
		}
		mig_close_device(dev);
	}
	for_each_failure(nth, "close") {
		ASSERT_EQ(0, mig_reopen_device(dev));
		/* Close returns no error; the next open shows whether it worked. */
		nth_begin(nth);
		mig_close_device(dev);
		nth_end(nth, 0);
		if (nth->n == 1 && !nth->injected)
			break;
	}
	ASSERT_EQ(0, mig_reopen_device(dev));
	expect_fresh(_metadata, &self->src, "after all failures of open and close");
}

TEST_F_TIMEOUT(fail, container_and_device, 120)
{
	struct mig_device dev;
	struct nth *nth = &self->nth;
	int ret;

	mig_close(&self->src.dev);
	for_each_failure(nth, "open with container or iommufd") {
		nth->also = -EOPNOTSUPP;
		nth_begin(nth);
		ret = mig_open(&dev, self->src.path, variant->backend);
		nth_end(nth, ret);
		if (!ret)
			mig_close(&dev);
	}
	ASSERT_EQ(0, mig_open(&self->src.dev, self->src.path, variant->backend));
}

TEST_F_TIMEOUT(fail, region_accesses, 120)
{
	static const struct {
		int region;
		__u64 at;
		size_t len;
	} accesses[] = {
		{ BAR0, 0, 4 }, { BAR0, 0, VFIO_MOCK_MSIX_TABLE },
		{ BAR0, VFIO_MOCK_MSIX_TABLE, 72 },
		{ BAR2, 0, 8 }, { BAR2, 5, 40000 }, { CONFIG, 0, 256 }, { CONFIG, 4, 2 },
	};
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	static __u8 data[40000];
	struct vfio_device_info device_info;
	struct vfio_region_info info;
	struct vfio_irq_info irq;
	unsigned int i;
	ssize_t ret = 0;

	for (i = 0; i < ARRAY_SIZE(accesses); i++) {
		for_each_failure(nth, "read() of a region") {
			nth_begin(nth);
			ret = mock_read(m, accesses[i].region, accesses[i].at, data,
					accesses[i].len);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		EXPECT_EQ((ssize_t)accesses[i].len, ret);
		for_each_failure(nth, "write() of a region") {
			nth_begin(nth);
			ret = mock_write(m, accesses[i].region, accesses[i].at, data,
					 accesses[i].len);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		EXPECT_EQ((ssize_t)accesses[i].len, ret);
	}
	for_each_failure(nth, "GET_REGION_INFO") {
		nth_begin(nth);
		ret = mig_region_info(&m->dev, BAR2, &info);
		nth_end(nth, ret);
	}
	for_each_failure(nth, "GET_INFO") {
		device_info.argsz = sizeof(device_info);
		nth_begin(nth);
		ret = ioctl(m->dev.fd, VFIO_DEVICE_GET_INFO, &device_info) ? -errno : 0;
		nth_end(nth, ret);
	}
	for_each_failure(nth, "GET_IRQ_INFO") {
		nth_begin(nth);
		ret = mig_irq_info(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, &irq);
		nth_end(nth, ret);
	}
}

/* Only single pages are free, as on a host with fragmented memory. */
TEST_F_TIMEOUT(fail, large_accesses_need_no_contiguous_memory, 60)
{
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	__u8 *data = malloc(m->size);
	ssize_t got, put;

	ASSERT_NE(NULL, data);
	store_noise(_metadata, m, 0, m->size, 5);
	nth_start(nth, _metadata, "an access", &self->in, false);
	knob("failslab", "probability", "0");
	knob("fail_page_alloc", "min-order", "1");
	nth_write(nth, self->in.all, 1);
	got = mock_read(m, BAR2, 0, data, m->size);
	put = mock_write(m, BAR2, 0, data, m->size);
	nth_write(nth, self->in.all, 0);
	EXPECT_EQ((ssize_t)m->size, got)
		PROMISE("a large read() of a BAR needs no contiguous memory");
	EXPECT_EQ((ssize_t)m->size, put)
		PROMISE("a large write() of a BAR needs no contiguous memory");
	expect_memory(_metadata, m, m->want, "without contiguous memory");
	free(data);
}

TEST_F_TIMEOUT(fail, interrupts, 120)
{
	const __u32 set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
	const __u32 raise = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
	int fds[VFIO_MOCK_MSIX_VECTORS];
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	unsigned int i;
	__u64 count;
	int ret;

	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		fds[i] = eventfd(0, EFD_NONBLOCK);
		ASSERT_LE(0, fds[i]);
	}
	for_each_failure(nth, "SET_IRQS") {
		nth_begin(nth);
		ret = mig_set_irqs(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, set, 0,
				   ARRAY_SIZE(fds), fds, sizeof(fds));
		nth_end(nth, ret);
	}
	for_each_failure(nth, "SET_IRQS that raises") {
		nth_begin(nth);
		ret = mig_set_irqs(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX, raise, 0,
				   ARRAY_SIZE(fds), NULL, 0);
		nth_end(nth, ret);
	}
	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		EXPECT_EQ((ssize_t)sizeof(count), read(fds[i], &count, sizeof(count)))
			PROMISE("vector %u reaches its eventfd", i);
		close(fds[i]);
	}
}

/* Every SET_STATE from every state to every other. */
TEST_F_TIMEOUT(fail, every_transition, 300)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	struct mig_stream image = {};
	__u32 from, to, state;
	char what[64];
	bool new_fd;
	int ret, fd, first;

	populate(_metadata, &self->dst, 2);
	take_image(_metadata, &self->dst.dev, &image);
	for (from = MIG_STOP; from < MIG_STATE_NR; from++) {
		for (to = MIG_STOP; to < MIG_STATE_NR; to++) {
			if (from == to || !mig_fsm_exists(dev->flags, from) ||
			    !mig_fsm_exists(dev->flags, to) ||
			    !mig_fsm_move(dev->flags, from, to, &new_fd, NULL))
				continue;
			snprintf(what, sizeof(what), "%s -> %s", mig_state_name(from),
				 mig_state_name(to));
			for_each_failure(nth, what) {
				ASSERT_EQ(0, mig_reset(dev));
				first = -1;
				if (from != MIG_RUNNING)
					ASSERT_EQ(0, mig_set_state(dev, from, &first));
				if (from == MIG_RESUMING)
					load_all(_metadata, first, &image);
				fd = -1;
				nth_begin(nth);
				ret = mig_set_state(dev, to, &fd);
				nth_end(nth, ret);
				ASSERT_EQ(0, mig_get_state(dev, &state));
				if (ret) {
					EXPECT_NE(MIG_ERROR, state)
						PROMISE("%s: a failure leaves a state of the path",
							what);
				} else {
					EXPECT_EQ(to, state);
				}
				/* On a RESUMING session the check would add to the stream. */
				if (ret && mig_fsm_saving(from) && state == from) {
					EXPECT_FALSE(mig_fd_is_dead(first))
						PROMISE("%s: the session continues", what);
				}
				if (ret) {
					EXPECT_EQ(0, mig_set_state(dev, to, NULL))
						PROMISE("%s: it can be repeated from there",
							what);
				}
				if (from == MIG_RESUMING) {
					expect_memory(_metadata, &self->src, self->dst.want,
						      what);
				}
				close(first);
				if (fd >= 0)
					close(fd);
			}
		}
	}
	/* With some migration_flags the last of them ends in RESUMING. */
	ASSERT_EQ(0, mig_reset(dev));
	for_each_failure(nth, "RESET") {
		ASSERT_EQ(0, mig_set_state(dev, MIG_STOP_COPY, &fd));
		nth_begin(nth);
		ret = ioctl(dev->fd, VFIO_DEVICE_RESET) ? -errno : 0;
		nth_end(nth, 0);
		EXPECT_EQ(0, ret)
			PROMISE("RESET never fails");
		expect_state(_metadata, dev, MIG_RUNNING, "after RESET");
		close(fd);
		if (nth->n == 1 && !nth->injected)
			break;
	}
	/* Also enables the device. */
	ASSERT_EQ(0, mig_reset(dev));
	expect_fresh(_metadata, &self->src, "after RESET");
	mig_stream_free(&image);
}

/* The data before and after a failure is the whole image. */
TEST_F_TIMEOUT(fail, save, 300)
{
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	struct mock_front front;
	__u8 byte = 0x77;
	__u32 state;
	__u64 size;
	int fd, ret;

	for_each_failure(nth, "read() of the data_fd") {
		image.len = 0;
		ASSERT_EQ(0, mig_reset(dev));
		populate(_metadata, &self->src, nth->n);
		fd = -1;
		if (dev->flags & VFIO_MIGRATION_PRE_COPY) {
			ASSERT_EQ(0, mig_set_state(dev, MIG_PRE_COPY, &fd));
			nth_begin(nth);
			ret = mig_save(fd, &image, stream_limit(dev));
			nth_end(nth, ret == -ENOMSG ? 0 : ret);
			EXPECT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(dev)))
				PROMISE("after a failure read() continues at its position");
			store(_metadata, &self->src, 12345, &byte, 1);
		} else {
			ASSERT_EQ(0, mig_set_state(dev, MIG_STOP_COPY, &fd));
			nth_begin(nth);
			ret = mig_save(fd, &image, stream_limit(dev));
			nth_end(nth, ret);
		}
		ASSERT_EQ(0, mig_set_state(dev, MIG_STOP_COPY, NULL));
		EXPECT_EQ(0, mig_save(fd, &image, stream_limit(dev)));
		close(fd);
		read_front(_metadata, &self->src, &front);
		load_and_compare(_metadata, &self->dst, &image, 0, self->src.want, &front);
	}
	if (dev->flags & VFIO_MIGRATION_PRE_COPY) {
		ASSERT_EQ(0, mig_reset(dev));
		ASSERT_EQ(0, mig_set_state(dev, MIG_PRE_COPY, &fd));
		for_each_failure(nth, "PRECOPY_INFO") {
			info = (struct vfio_precopy_info){ .argsz = sizeof(info) };
			nth_begin(nth);
			ret = mig_precopy_info(fd, &info);
			nth_end(nth, ret);
		}
		for_each_failure(nth, "poll() of the data_fd") {
			nth_begin(nth);
			ret = mig_poll(fd, POLLIN, 0);
			nth_end(nth, ret < 0 ? ret : 0);
		}
		close(fd);
	}
	for_each_failure(nth, "GET of the state") {
		nth_begin(nth);
		ret = mig_get_state(dev, &state);
		nth_end(nth, ret);
	}
	for_each_failure(nth, "MIG_DATA_SIZE") {
		nth_begin(nth);
		ret = mig_data_size(dev, &size);
		nth_end(nth, ret);
	}
	mig_stream_free(&image);
}

/* After a failure the rest can be written, or the image is refused until RESET. */
TEST_F_TIMEOUT(fail, resume, 300)
{
	struct mig_device *dev = &self->dst.dev;
	struct nth *nth = &self->nth;
	struct mig_stream image = {};
	struct mock_front front;
	size_t done, more;
	int fd = -1, ret;

	populate(_metadata, &self->src, 3);
	stop_and_save(_metadata, &self->src, &fd, &image);
	read_front(_metadata, &self->src, &front);
	close(fd);
	fd = go(_metadata, dev, MIG_RESUMING);
	for_each_failure(nth, "poll() of the data_fd") {
		nth_begin(nth);
		ret = mig_poll(fd, POLLOUT, 0);
		nth_end(nth, ret < 0 ? ret : 0);
	}
	close(fd);
	for_each_failure(nth, "write() of the data_fd") {
		ASSERT_EQ(0, mig_reset(dev));
		ASSERT_EQ(0, mig_set_state(dev, MIG_RESUMING, &fd));
		done = 0;
		nth_begin(nth);
		ret = mig_load(fd, image.data, image.len, 5000, &done);
		nth_end(nth, ret);
		ret = mig_load(fd, image.data + done, image.len - done, 0, &more);
		if (!ret) {
			ret = mig_set_state(dev, MIG_STOP, NULL);
			EXPECT_EQ(0, ret)
				PROMISE("an image completed after a failure is good: %s",
					strerror(-ret));
			expect_memory(_metadata, &self->dst, self->src.want, "resumed");
		} else {
			EXPECT_EQ(-ENOMEM, ret)
				PROMISE("an image stays refused after a lack of memory: %s",
					strerror(-ret));
			EXPECT_NE(0, mig_set_state(dev, MIG_STOP, NULL));
		}
		close(fd);
	}
	load_and_compare(_metadata, &self->dst, &image, 0, self->src.want, &front);
	mig_stream_free(&image);
}

TEST_F_TIMEOUT(fail, mappings, 120)
{
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	void *map;
	int ret;

	for_each_failure(nth, "mmap()") {
		map = NULL;
		nth_begin(nth);
		ret = mig_region_map(&m->dev, BAR2, 0, m->size, &map);
		nth_end(nth, ret);
		if (ret)
			continue;
		ASSERT_EQ(0, munmap(map, m->size));
	}
}

/* Far from other mappings, so that it has page tables of its own. */
#define LONELY	((void *)(1UL << 40))

/*
 * A page fault without memory is repeated, which the kernel does by itself: a signal
 * would kill the process.
 */
TEST_F_TIMEOUT(fail, page_faults, 120)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_PRE_COPY, MIG_STOP, MIG_STOP_COPY, MIG_RESUMING,
	};
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	__u8 *map, *dirty;
	struct mig_stream first = {};
	bool stopped, write;
	unsigned int i, j;
	char what[64];
	int fd, sig;

	dirty = calloc(1, m->size / PAGE);
	ASSERT_NE(NULL, dirty);
	dirty[1] = 1;
	mig_touch_begin();
	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		stopped = states[i] != MIG_RUNNING && states[i] != MIG_PRE_COPY;
		for (j = 0; j < 2; j++) {
			write = j;
			snprintf(what, sizeof(what), "a page fault of a %s in %s",
				 write ? "store" : "load", mig_state_name(states[i]));
			for_each_single_failure(nth, what) {
				/* A fault allocates only once for each open. */
				mig_close_device(&m->dev);
				ASSERT_EQ(0, mig_reopen_device(&m->dev));
				memset(m->want, 0, m->size);
				map = mmap(LONELY, m->size, PROT_READ | PROT_WRITE,
					   MAP_SHARED | MAP_FIXED_NOREPLACE, m->dev.fd,
					   m->offset[BAR2]);
				ASSERT_EQ(LONELY, map);
				fd = -1;
				if (states[i] == MIG_PRE_COPY) {
					fd = go(_metadata, &m->dev, MIG_PRE_COPY);
					first.len = 0;
					ASSERT_EQ(-ENOMSG, mig_save(fd, &first,
								    stream_limit(&m->dev)));
				} else if (states[i] != MIG_RUNNING) {
					ASSERT_EQ(0, mig_set_state(&m->dev, states[i], &fd));
				}
				nth_begin(nth);
				sig = mig_touch(map + PAGE, write);
				nth_end(nth, 0);
				EXPECT_EQ(0, sig)
					PROMISE("%s, failure %u: no signal, the fault is repeated",
						what, nth->n);
				if (write && !stopped)
					m->want[PAGE] = 0x5a;
				expect_memory(_metadata, m, m->want, what);
				EXPECT_EQ(write && stopped ? 1ULL : 0ULL, reg64(m, DROPPED))
					PROMISE("%s, failure %u: a store is dropped once",
						what, nth->n);
				if (states[i] == MIG_PRE_COPY && write)
					expect_round(_metadata, m, fd, dirty, what);
				if (fd >= 0)
					close(fd);
				ASSERT_EQ(0, munmap(map, m->size));
			}
		}
	}
	mig_stream_free(&first);
	free(dirty);
}

/* The number of worker threads; @in is the injector of the last one. */
static int worker_injector(struct injector *in)
{
	char name[16], path[64];
	glob_t found = {};
	FILE *file;
	int n = 0;
	size_t i;

	glob("/proc/[0-9]*", 0, NULL, &found);
	for (i = 0; i < found.gl_pathc; i++) {
		snprintf(path, sizeof(path), "%s/comm", found.gl_pathv[i]);
		file = fopen(path, "r");
		/* The thread may have ended. */
		if (!file)
			continue;
		if (fgets(name, sizeof(name), file) && !strcmp(name, "vfio_mock\n") &&
		    !injector_open(in, found.gl_pathv[i]))
			n++;
		fclose(file);
	}
	globfree(&found);
	return n;
}

/* The result of an ended descriptor as an errno. */
static int dma_result(const struct dma_desc *d)
{
	if (d->status == VFIO_MOCK_DMA_COMPLETE)
		return 0;
	if (d->status != VFIO_MOCK_DMA_FAILED)
		return -EIO;
	switch (d->error) {
	case VFIO_MOCK_DMA_ERROR_FAULT:
		return -EFAULT;
	case VFIO_MOCK_DMA_ERROR_NO_MEMORY:
		return -ENOMEM;
	default:
		return -EIO;
	}
}

/* A failed transfer has moved POS bytes, and nothing after that page. */
TEST_F_TIMEOUT(fail, dma, 120)
{
	static const __u32 ops[] = { READ, WRITE, FILL, CHURN };
	static const char *const names[] = { "READ", "WRITE", "FILL", "CHURN" };
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	struct dma_desc d, ended;
	struct ram ram;
	unsigned int i;
	__u64 torn;
	int ret;

	mock_close(&self->dst);
	injector_close(&self->in);
	WAIT_FOR(worker_injector(&self->in) == 1, "a closed device has no worker thread");
	ram_make(_metadata, &ram, 1ULL << 32, 16 * PAGE);
	ram_map(_metadata, &ram, m);
	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		/* A WRITE to pinned memory allocates nothing. */
		if (ops[i] == WRITE && mock_has_iommu(m))
			continue;
		for_each_failure(nth, names[i]) {
			d = (struct dma_desc){
				.op = ops[i], .iova = ram.iova + 1000, .addr = 2 * PAGE + 7,
				.len = 3 * PAGE, .seed = nth->n,
				.irq_vector = VFIO_MOCK_IRQ_NONE,
			};
			fill(_metadata, m, 0, m->size, 2 * nth->n);
			vfio_mock_pattern(ram.want, 2 * nth->n + 1, 0, ram.size);
			memcpy(ram.mem, ram.want, ram.size);
			dma_set(_metadata, m, 0, &d);
			nth_begin(nth);
			dma_ring(_metadata, m, 0);
			ended = dma_wait(_metadata, m, 0);
			ret = dma_result(&ended);
			nth_end(nth, ret);
			ASSERT_LE(ended.pos, d.len);
			dma_apply(&d, m->want, ram_want(&ram, d.iova), ended.pos);
			expect_memory(_metadata, m, m->want, names[i]);
			if (ret && (ops[i] == WRITE || ops[i] == FILL)) {
				torn = d.iova - ram.iova + ended.pos;
				memcpy(ram.want + torn, ram.mem + torn, PAGE - torn % PAGE);
			}
			expect_ram(_metadata, &ram, names[i]);
			if (!ret)
				continue;
			ended = dma_run(_metadata, m, 0, &d);
			expect_complete(_metadata, &ended, "after a failure");
			dma_apply(&d, m->want, ram_want(&ram, d.iova), d.len);
			expect_memory(_metadata, m, m->want, "after a failure");
			expect_ram(_metadata, &ram, "after a failure");
		}
	}
}

/* Pages written by the device are in the log even if it had no memory for them. */
TEST_F_TIMEOUT(fail, dma_that_is_logged, 120)
{
	struct vfio_device_feature_dma_logging_range range;
	const __u64 cut = 2 * PAGE, base = 1ULL << 32;
	struct mock *m = &self->src;
	struct nth *nth = &self->nth;
	__u64 page_size, low, high, page;
	struct dma_desc d, ended;
	struct ram ram;

	NEED_IOMMUFD_FOR_LOG();
	mock_close(&self->dst);
	injector_close(&self->in);
	WAIT_FOR(worker_injector(&self->in) == 1, "a closed device has no worker thread");
	ram_make(_metadata, &ram, base, 16 * PAGE);
	ram_map(_metadata, &ram, m);
	range.iova = base;
	range.length = ram.size;
	for_each_failure(nth, "FILL that is logged") {
		page_size = PAGE;
		ASSERT_EQ(0, mig_log_start(&m->dev, &page_size, &range, 1));
		d = (struct dma_desc){
			.op = FILL, .iova = base + 1000, .len = 3 * PAGE,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		dma_set(_metadata, m, 0, &d);
		nth_begin(nth);
		dma_ring(_metadata, m, 0);
		ended = dma_wait(_metadata, m, 0);
		nth_end(nth, dma_result(&ended));
		/* Two reports: pages outside of the first stay for the second. */
		low = 0;
		high = 0;
		ASSERT_EQ(0, mig_log_report(&m->dev, base, cut, PAGE, &low));
		ASSERT_EQ(0, mig_log_report(&m->dev, base + cut, ram.size - cut, PAGE, &high));
		low |= high << (cut / PAGE);
		for (page = 0; page * PAGE < 1000 + ended.pos && ended.pos; page++) {
			EXPECT_EQ(1ULL, low >> page & 1)
				PROMISE("failure %u: page %llu was written and is in the log",
					nth->n, page);
		}
		ASSERT_EQ(0, mig_log_stop(&m->dev));
	}
}

/* A client reports its memory section by section, with any distance between them. */
TEST_F_TIMEOUT(fail, log_without_memory_converges, 60)
{
	const __u64 bases[] = { 1ULL << 32, 1ULL << 33, 1ULL << 40 };
	struct vfio_device_feature_dma_logging_range range = { 0, 1ULL << 41 };
	struct nth *nth = &self->nth;
	struct mock *m = &self->src;
	__u64 page_size = PAGE, bitmap;
	struct dma_desc d;
	struct ram ram;
	unsigned int i;

	mock_close(&self->dst);
	injector_close(&self->in);
	WAIT_FOR(worker_injector(&self->in) == 1, "a closed device has no worker thread");
	nth_start(nth, _metadata, "WRITE", &self->in, false);
	ram_make(_metadata, &ram, bases[0], 16 * PAGE);
	memset(ram.mem, 1, ram.size);
	for (i = 0; i < ARRAY_SIZE(bases); i++)
		ASSERT_EQ(0, mig_dma_map(&m->dev, bases[i], ram.mem, ram.size, RW));
	ASSERT_EQ(0, mig_log_start(&m->dev, &page_size, &range, 1));
	/* A WRITE needs memory only for the log. */
	nth_write(nth, self->in.all, 1);
	for (i = 0; i < ARRAY_SIZE(bases); i += 2) {
		d = (struct dma_desc){
			.op = WRITE, .iova = bases[i] + 5 * PAGE, .len = PAGE,
			.irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		d = dma_run(_metadata, m, 0, &d);
		expect_complete(_metadata, &d, "a WRITE whose log has no memory");
	}
	nth_write(nth, self->in.all, 0);
	for (i = 0; i < ARRAY_SIZE(bases); i++) {
		ASSERT_EQ(0, mig_log_report(&m->dev, bases[i], ram.size, PAGE, &bitmap));
		if (i != 1)
			EXPECT_EQ(1ULL << 5, bitmap & 1ULL << 5)
				PROMISE("a page without memory for the log is reported");
	}
	for (i = 0; i < ARRAY_SIZE(bases); i++) {
		bitmap = 0;
		ASSERT_EQ(0, mig_log_report(&m->dev, bases[i], ram.size, PAGE, &bitmap));
		EXPECT_EQ(0ULL, bitmap)
			PROMISE("section %u is reported only once", i);
	}
}

TEST_F_TIMEOUT(fail, dma_logging, 120)
{
	struct vfio_device_feature_dma_logging_range ranges[3] = {
		{ 0, 256 * PAGE }, { 1ULL << 32, 1ULL << 40 }, { ~0ULL << 40, 1ULL << 39 },
	};
	struct mig_device *dev = &self->src.dev;
	struct nth *nth = &self->nth;
	__u64 page_size, bitmap[4];
	int ret;

	NEED_IOMMUFD_FOR_LOG();
	for_each_failure(nth, "LOGGING_START") {
		page_size = PAGE;
		nth_begin(nth);
		ret = mig_log_start(dev, &page_size, ranges, ARRAY_SIZE(ranges));
		nth_end(nth, ret);
		ret = mig_log_stop(dev);
		EXPECT_EQ(0, ret);
	}
	page_size = PAGE;
	ASSERT_EQ(0, mig_log_start(dev, &page_size, ranges, ARRAY_SIZE(ranges)));
	for_each_failure(nth, "LOGGING_REPORT") {
		nth_begin(nth);
		ret = mig_log_report(dev, 0, 256 * PAGE, PAGE, bitmap);
		nth_end(nth, ret);
	}
	for_each_failure(nth, "LOGGING_STOP") {
		nth_begin(nth);
		ret = mig_log_stop(dev);
		nth_end(nth, ret);
		if (nth->n == 1 && !nth->injected)
			break;
	}
}

TEST_F_TIMEOUT(fail, removal, 300)
{
	static const char uuid[] = "5eed0000-fa11-4000-8000-000000000001";
	static const char create[] =
		"/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-64K/create";
	static const char remove[] =
		"/sys/bus/mdev/devices/5eed0000-fa11-4000-8000-000000000001/remove";
	struct nth *nth = &self->nth;
	int ret;

	for_each_failure(nth, "the removal of a device") {
		ASSERT_EQ(0, write_word(create, uuid));
		nth_begin(nth);
		ret = write_word(remove, "1");
		nth_end(nth, ret);
		if (ret) {
			ASSERT_EQ(0, write_word(remove, "1"))
				PROMISE("a failed removal can be repeated");
		}
		EXPECT_NE(0, access(remove, F_OK));
	}
}

MIG_HARNESS_MAIN(mock_options)
