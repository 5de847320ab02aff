// SPDX-License-Identifier: GPL-2.0
/*
 * The software IOMMU of the PCI functions of vfio_mock: translation, faults, and dirty
 * tracking in its domains. Also injects each possible failure into calls to the IOMMU, and
 * into binding and unplugging a function (see vfio_mock_fail_test).
 *
 *	./vfio_mock_iommu_test --medium "FUNCTION FUNCTION"
 *
 * with the sysfs paths of PCI functions. A mediated device has no IOMMU and is skipped.
 * --rounds N multiplies the number of random transfers by N.
 */
#include <dirent.h>

#include <linux/iommufd.h>

#include "mock_dma.h"
#include "mock_fail.h"

#define iommu_data	FIXTURE_DATA(iommu)

/* The same memory at several IOVAs, the last of which is read-only. */
#define WINDOW_PAGES	512
#define WINDOW		(WINDOW_PAGES * PAGE)
#define WINDOWS		4
#define READ_ONLY	(WINDOWS - 1)

/* One byte after the last IOVA. */
#define APERTURE	(PAGE << 36)

/* Where the interrupt controller of a PC receives messages. */
#define MESSAGES	0xfee00000ULL
#define MESSAGES_LEN	0x100000ULL

FIXTURE(iommu)
{
	struct mock m;
	__u8 *mem;
	__u64 random;
	__u64 windows[WINDOWS];
	__u32 hwpt;
	bool tracking;
	__u8 truth[WINDOWS][WINDOW_PAGES];	/* written and not yet taken */
	bool fails;
	struct injector in;
	struct nth nth;
};

MIG_EACH_BACKEND(iommu);

static bool is_function(const struct mock *m)
{
	char path[PATH_MAX + 16], link[PATH_MAX] = "";

	snprintf(path, sizeof(path), "%s/subsystem", m->path);
	return readlink(path, link, sizeof(link) - 1) > 0 &&
		!strcmp(strrchr(link, '/') ?: "", "/pci");
}

static void map_windows(struct __test_metadata *_metadata, iommu_data *self,
			const struct mock *m)
{
	unsigned int i;
	int ret;

	for (i = 0; i < WINDOWS; i++) {
		ret = mig_dma_map(&m->dev, self->windows[i], self->mem, WINDOW,
				  i == READ_ONLY ? MIG_DMA_READ : RW);
		ASSERT_EQ(0, ret)
			STEP("map memory at %#llx: %s", self->windows[i], strerror(-ret));
	}
}

FIXTURE_SETUP(iommu)
{
	/* At both ends, and across the ends of tables of three levels. */
	const __u64 windows[] = {
		0, (PAGE << 27) - WINDOW / 2, APERTURE - WINDOW, (PAGE << 18) - WINDOW / 2,
	};

	memcpy(self->windows, windows, sizeof(windows));
	MOCK_OPEN_OR_SKIP(&self->m, "medium", 0, variant->backend);
	if (!is_function(&self->m))
		SKIP(return, "a mediated device has no IOMMU");
	self->mem = mmap(NULL, WINDOW, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			 -1, 0);
	ASSERT_NE(MAP_FAILED, self->mem);
}

FIXTURE_TEARDOWN(iommu)
{
	mock_close(&self->m);
	if (self->fails)
		injector_close(&self->in);
}

#define NEED_IOMMUFD() do {							\
	if (variant->backend != MIG_IOMMUFD)					\
		SKIP(return, "only iommufd has this interface");		\
} while (0)

#define NEED_CONTAINER() do {							\
	if (variant->backend != MIG_GROUP)					\
		SKIP(return, "only a container has this interface");		\
} while (0)

static __u64 pick(iommu_data *self, __u64 limit)
{
	return vfio_mock_mix(++self->random) % limit;
}

static int call(int fd, unsigned long cmd, void *arg)
{
	return ioctl(fd, cmd, arg) < 0 ? -errno : 0;
}

/* ---- Objects of iommufd ---- */

static int hwpt_alloc(const struct mock *m, __u32 flags, __u32 *hwpt)
{
	struct iommu_hwpt_alloc alloc = {
		.size = sizeof(alloc), .flags = flags, .dev_id = m->dev.id,
		.pt_id = m->dev.ioas,
	};
	int ret = call(m->dev.iommu, IOMMU_HWPT_ALLOC, &alloc);

	*hwpt = alloc.out_hwpt_id;
	return ret;
}

static int destroy(const struct mock *m, __u32 id)
{
	struct iommu_destroy object = { .size = sizeof(object), .id = id };

	return call(m->dev.iommu, IOMMU_DESTROY, &object);
}

static int attach(const struct mock *m, __u32 id)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach), .pt_id = id,
	};

	return call(m->dev.fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
}

static int track(const struct mock *m, __u32 hwpt, bool enable)
{
	struct iommu_hwpt_set_dirty_tracking set = {
		.size = sizeof(set), .hwpt_id = hwpt,
		.flags = enable ? IOMMU_HWPT_DIRTY_TRACKING_ENABLE : 0,
	};

	return call(m->dev.iommu, IOMMU_HWPT_SET_DIRTY_TRACKING, &set);
}

static int get_dirty(const struct mock *m, __u32 hwpt, __u32 flags, __u64 iova, __u64 len,
		     __u64 page_size, __u64 *bitmap)
{
	struct iommu_hwpt_get_dirty_bitmap get = {
		.size = sizeof(get), .hwpt_id = hwpt, .flags = flags, .iova = iova,
		.length = len, .page_size = page_size, .data = (uintptr_t)bitmap,
	};

	return call(m->dev.iommu, IOMMU_HWPT_GET_DIRTY_BITMAP, &get);
}

/* Attaches a domain with dirty bits. */
static void attach_tracked(struct __test_metadata *_metadata, iommu_data *self)
{
	ASSERT_EQ(0, hwpt_alloc(&self->m, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, &self->hwpt))
		PROMISE("a domain can have dirty tracking");
	ASSERT_EQ(0, attach(&self->m, self->hwpt))
		PROMISE("an attached IOAS can be replaced by a domain");
}

static void start_tracking(struct __test_metadata *_metadata, iommu_data *self)
{
	ASSERT_EQ(0, track(&self->m, self->hwpt, true));
	self->tracking = true;
	memset(self->truth, 0, sizeof(self->truth));
}

/* ---- Dirty tracking ---- */

/* Runs a transfer and notes the written pages; returns its result. */
static struct dma_desc transfer(struct __test_metadata *_metadata, iommu_data *self,
				const struct mock *m, __u32 op, unsigned int window,
				__u64 at, __u64 len)
{
	struct dma_desc d = {
		.op = op, .iova = self->windows[window] + at, .len = len,
		.seed = ++self->random, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};
	__u64 page;

	d = dma_run(_metadata, m, 0, &d);
	if (self->tracking && d.pos && (op == WRITE || op == FILL))
		for (page = at / PAGE; page <= (at + d.pos - 1) / PAGE; page++)
			self->truth[window][page] = 1;
	return d;
}

/* Takes a part of a window, which must be exact, and clears it in the model. */
static void expect_dirty(struct __test_metadata *_metadata, iommu_data *self,
			 unsigned int window, __u64 at, __u64 len, __u64 page_size, bool clear)
{
	__u64 *bitmap = bitmap_make(_metadata, len / page_size);

	ASSERT_EQ(0, get_dirty(&self->m, self->hwpt,
			       clear ? 0 : IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
			       self->windows[window] + at, len, page_size, bitmap));
	expect_bitmap(_metadata, bitmap, self->truth[window], at, len, page_size, clear);
}

static void expect_all_dirty(struct __test_metadata *_metadata, iommu_data *self)
{
	unsigned int w;

	for (w = 0; w < WINDOWS; w++) {
		expect_dirty(_metadata, self, w, 0, WINDOW, PAGE, false);
		expect_dirty(_metadata, self, w, 0, WINDOW, PAGE, true);
		expect_dirty(_metadata, self, w, 0, WINDOW, PAGE, true);
	}
}

TEST_F_TIMEOUT(iommu, dirty_bitmap_equals_written_pages, 7200)
{
	unsigned int count = mig_times(10000), failed = 0, i, w;
	__u64 at, len, size;
	struct dma_desc d;

	NEED_IOMMUFD();
	map_windows(_metadata, self, &self->m);
	attach_tracked(_metadata, self);
	start_tracking(_metadata, self);
	for (i = 0; i < count; i++) {
		w = pick(self, WINDOWS);
		len = 1 + pick(self, pick(self, 8) ? 3 * PAGE : 40 * PAGE);
		at = pick(self, WINDOW - (pick(self, 16) ? len : 0));
		d = transfer(_metadata, self, &self->m, READ + pick(self, 3), w, at, len);
		failed += d.status != VFIO_MOCK_DMA_COMPLETE;
		if (!pick(self, 500)) {
			/* Writes without tracking are not dirty later. */
			self->tracking = pick(self, 2);
			ASSERT_EQ(0, track(&self->m, self->hwpt, self->tracking));
			memset(self->truth, 0, sizeof(self->truth));
		}
		if (!self->tracking || pick(self, 8))
			continue;
		w = pick(self, WINDOWS);
		size = PAGE << pick(self, 4);
		at = pick(self, WINDOW / size) * size;
		len = (1 + pick(self, (WINDOW - at) / size)) * size;
		expect_dirty(_metadata, self, w, at, len, size, pick(self, 2));
	}
	start_tracking(_metadata, self);
	transfer(_metadata, self, &self->m, FILL, 0, 0, WINDOW);
	transfer(_metadata, self, &self->m, FILL, 1, PAGE - 1, 2);
	expect_all_dirty(_metadata, self);
	EXPECT_LT(0U, failed)
		TH_LOG("no transfer failed: failed transfers were not tested");
}

TEST_F_TIMEOUT(iommu, dirty_bit_goes_with_the_mapping, 60)
{
	NEED_IOMMUFD();
	map_windows(_metadata, self, &self->m);
	attach_tracked(_metadata, self);
	start_tracking(_metadata, self);
	transfer(_metadata, self, &self->m, FILL, 1, 3 * PAGE, 100 * PAGE);
	ASSERT_EQ(0, mig_dma_unmap(&self->m.dev, self->windows[1], WINDOW));
	ASSERT_EQ(0, mig_dma_map(&self->m.dev, self->windows[1], self->mem, WINDOW, RW));
	memset(self->truth[1], 0, sizeof(self->truth[1]));
	transfer(_metadata, self, &self->m, FILL, 1, 7 * PAGE, 1);
	expect_all_dirty(_metadata, self);
}

/* A failed page is not dirty, but those before it are. */
TEST_F_TIMEOUT(iommu, failed_page_is_not_dirty, 60)
{
	struct dma_desc d;

	NEED_IOMMUFD();
	map_windows(_metadata, self, &self->m);
	ASSERT_EQ(0, mig_dma_unmap(&self->m.dev, self->windows[1], WINDOW));
	ASSERT_EQ(0, mig_dma_map(&self->m.dev, self->windows[1], self->mem, 20 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&self->m.dev, self->windows[1] + 20 * PAGE,
				 self->mem + 20 * PAGE, WINDOW - 20 * PAGE, MIG_DMA_READ));
	attach_tracked(_metadata, self);
	start_tracking(_metadata, self);
	d = transfer(_metadata, self, &self->m, FILL, 1, 10 * PAGE + 3, 15 * PAGE);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_DENIED,
		     10 * PAGE - 3, "a write across a read-only page");
	d = transfer(_metadata, self, &self->m, READ, 1, 10 * PAGE + 3, 15 * PAGE);
	expect_complete(_metadata, &d, "a read across a read-only page");
	expect_all_dirty(_metadata, self);
}

/* Functions in a domain share its dirty bits, until one leaves it. */
TEST_F_TIMEOUT(iommu, functions_share_a_domain, 60)
{
	struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind) };
	struct dma_desc d;
	struct mock other;

	NEED_IOMMUFD();
	map_windows(_metadata, self, &self->m);
	attach_tracked(_metadata, self);
	MOCK_OPEN_OR_SKIP(&other, "medium", 1, variant->backend);
	/* Once more, in the iommufd of the first one. */
	mig_close_device(&other.dev);
	ASSERT_EQ(0, mig_open_unbound(&other.dev, other.path));
	bind.iommufd = self->m.dev.iommu;
	ASSERT_EQ(0, call(other.dev.fd, VFIO_DEVICE_BIND_IOMMUFD, &bind));
	ASSERT_EQ(0, mig_enable(&other.dev));
	ASSERT_EQ(0, attach(&other, self->hwpt))
		PROMISE("two functions can have the same domain");
	start_tracking(_metadata, self);
	transfer(_metadata, self, &other, FILL, 1, 17 * PAGE + 3, 5 * PAGE);
	transfer(_metadata, self, &self->m, FILL, 1, 21 * PAGE + 3, 5 * PAGE);
	expect_all_dirty(_metadata, self);
	ASSERT_EQ(0, mig_dma_detach(&other.dev));
	d = transfer(_metadata, self, &other, FILL, 1, 30 * PAGE, 1);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_UNMAPPED, 0,
		     "a write of a function that has left the domain");
	d = transfer(_metadata, self, &self->m, FILL, 1, 31 * PAGE, 1);
	expect_complete(_metadata, &d, "a write of the function that has stayed");
	expect_all_dirty(_metadata, self);
	mock_close(&other);
}

/* The container does not read dirty bits: it reports all that a device can write to. */
TEST_F_TIMEOUT(iommu, container_reports_all_pages, 60)
{
	struct {
		struct vfio_iommu_type1_dirty_bitmap head;
		struct vfio_iommu_type1_dirty_bitmap_get get;
	} bitmap = {
		.head = { .argsz = sizeof(bitmap) },
		.get = {
			.iova = self->windows[1], .size = WINDOW,
			.bitmap = { .pgsize = PAGE, .size = WINDOW_PAGES / 8 },
		},
	};
	__u64 bits[WINDOW_PAGES / 64] = {};
	unsigned int i, round;

	NEED_CONTAINER();
	map_windows(_metadata, self, &self->m);
	bitmap.get.bitmap.data = bits;
	bitmap.head.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_START;
	ASSERT_EQ(0, call(self->m.dev.iommu, VFIO_IOMMU_DIRTY_PAGES, &bitmap));
	transfer(_metadata, self, &self->m, FILL, 1, 3 * PAGE, 1);
	bitmap.head.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
	for (round = 0; round < 2; round++) {
		memset(bits, 0, sizeof(bits));
		ASSERT_EQ(0, call(self->m.dev.iommu, VFIO_IOMMU_DIRTY_PAGES, &bitmap));
		for (i = 0; i < ARRAY_SIZE(bits); i++)
			EXPECT_EQ(~0ULL, bits[i]);
	}
	bitmap.head.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP;
	ASSERT_EQ(0, call(self->m.dev.iommu, VFIO_IOMMU_DIRTY_PAGES, &bitmap));
}

/* ---- Translation ---- */

/* Each page at another IOVA, in random order, with holes and all permissions. */
TEST_F_TIMEOUT(iommu, device_reaches_what_is_mapped_only, 300)
{
	enum { SLOTS = 128, NONE = 0 };
	struct mock *m = &self->m;
	unsigned int prot[SLOTS] = {}, page_of[SLOTS] = {}, slot, i, count = mig_times(2000);
	const __u64 base = (PAGE << 18) - SLOTS / 2 * PAGE;
	__u8 *want = calloc(1, WINDOW), *data = calloc(1, PAGE);
	__u32 error;
	int ret;

	ASSERT_NE(NULL, want);
	ASSERT_NE(NULL, data);
	for (i = 0; i < count; i++) {
		struct dma_desc d = {
			.op = READ + pick(self, 3), .len = 1 + pick(self, PAGE),
			.seed = i, .irq_vector = VFIO_MOCK_IRQ_NONE,
		};
		__u64 at = pick(self, PAGE + 1 - d.len);
		bool writes = d.op != READ;

		slot = pick(self, SLOTS);
		if (!pick(self, 3)) {
			if (prot[slot] != NONE) {
				ASSERT_EQ(0, mig_dma_unmap(&m->dev, base + slot * PAGE, PAGE));
				prot[slot] = NONE;
				continue;
			}
			prot[slot] = 1 + pick(self, 3);
			page_of[slot] = pick(self, WINDOW_PAGES);
			ret = mig_dma_map(&m->dev, base + slot * PAGE,
					  self->mem + page_of[slot] * PAGE, PAGE, prot[slot]);
			ASSERT_EQ(0, ret)
				STEP("map a page: %s", strerror(-ret));
			continue;
		}
		d.iova = base + slot * PAGE + at;
		d = dma_run(_metadata, m, 0, &d);
		if (prot[slot] == NONE)
			error = VFIO_MOCK_DMA_ERROR_UNMAPPED;
		else if (!(prot[slot] & (writes ? MIG_DMA_WRITE : MIG_DMA_READ)))
			error = VFIO_MOCK_DMA_ERROR_DENIED;
		else
			error = VFIO_MOCK_DMA_ERROR_NONE;
		expect_ended(_metadata, &d,
			     error ? VFIO_MOCK_DMA_FAILED : VFIO_MOCK_DMA_COMPLETE, error,
			     error ? 0 : d.len, "a transfer in a page");
		if (error)
			continue;
		/* The memory of the device is at offset 0. */
		dma_apply(&d, m->want, want + page_of[slot] * PAGE + at, d.len);
	}
	expect_bytes(_metadata, want, self->mem, WINDOW, "the user's memory");
	expect_state_range(_metadata, m, 0, PAGE, "after the transfers");
	free(want);
	free(data);
}

TEST_F_TIMEOUT(iommu, transfer_stops_at_the_first_bad_page, 60)
{
	struct mock *m = &self->m;
	struct dma_desc d;
	__u64 base = self->windows[1];

	ASSERT_EQ(0, mig_dma_map(&m->dev, base, self->mem, 3 * PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, base + 3 * PAGE, self->mem + 3 * PAGE, PAGE,
				 MIG_DMA_WRITE));
	d = transfer(_metadata, self, m, READ, 1, 5, 4 * PAGE - 5);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_DENIED,
		     3 * PAGE - 5, "a read of a page that can only be written");
	d = transfer(_metadata, self, m, FILL, 1, 5, 4 * PAGE);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_UNMAPPED,
		     4 * PAGE - 5, "a write across the end of a mapping");
	/* An address beyond the aperture must not become one of these. */
	ASSERT_EQ(0, mig_dma_map(&m->dev, 0, self->mem, PAGE, RW));
	ASSERT_EQ(0, mig_dma_map(&m->dev, APERTURE - PAGE, self->mem, PAGE, RW));
	d = transfer(_metadata, self, m, FILL, 2, WINDOW, 1);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_UNMAPPED, 0,
		     "a write after the aperture");
	d = transfer(_metadata, self, m, FILL, 1, -base - PAGE, 1);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_UNMAPPED, 0,
		     "a write to the last page of all addresses");
}

/* ---- Races with transfers ---- */

/* Starts to fill a part of a window again and again. */
static void start_filling(struct __test_metadata *_metadata, iommu_data *self, __u64 len)
{
	struct dma_desc d = {
		.op = FILL, .iova = self->windows[1], .len = len, .period = 1,
		.seed = ++self->random, .irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	dma_set(_metadata, &self->m, 0, &d);
	dma_ring(_metadata, &self->m, 0);
}

TEST_F_TIMEOUT(iommu, memory_is_unchanged_after_unmap, 600)
{
	const __u64 len = 8 * PAGE;
	unsigned int i, rounds = mig_times(200);
	__u8 *seen = malloc(len);
	struct dma_desc d;

	ASSERT_NE(NULL, seen);
	for (i = 0; i < rounds; i++) {
		ASSERT_EQ(0, mig_dma_map(&self->m.dev, self->windows[1], self->mem, len, RW));
		start_filling(_metadata, self, len);
		dma_wait_moved(_metadata, &self->m, 0, len + pick(self, len));
		ASSERT_EQ(0, mig_dma_unmap(&self->m.dev, self->windows[1], len));
		memcpy(seen, self->mem, len);
		d = dma_wait(_metadata, &self->m, 0);
		EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error)
			PROMISE("a transfer fails when its memory is unmapped");
		ASSERT_EQ(0, memcmp(seen, self->mem, len))
			PROMISE("the device does not write to memory after the unmap");
	}
	free(seen);
}

/* The IOAS of the function changes under a transfer, to other memory at the same IOVA. */
TEST_F_TIMEOUT(iommu, replaced_domain_is_not_used, 600)
{
	const __u64 len = 8 * PAGE;
	unsigned int i, rounds = mig_times(100);
	__u8 *memory[2] = { self->mem, self->mem + WINDOW / 2 }, *seen = malloc(len);
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	struct mock *m = &self->m;
	__u32 ioas[2];
	struct dma_desc d;

	NEED_IOMMUFD();
	ASSERT_NE(NULL, seen);
	ASSERT_EQ(0, call(m->dev.iommu, IOMMU_IOAS_ALLOC, &alloc));
	ioas[0] = m->dev.ioas;
	ioas[1] = alloc.out_ioas_id;
	for (i = 0; i < 2; i++) {
		m->dev.ioas = ioas[i];
		ASSERT_EQ(0, mig_dma_map(&m->dev, self->windows[1], memory[i], len, RW));
	}
	start_filling(_metadata, self, len);
	for (i = 1; i < rounds; i++) {
		ASSERT_EQ(0, attach(m, ioas[i % 2]))
			PROMISE("the IOAS can be replaced while the device writes");
		memcpy(seen, memory[(i + 1) % 2], len);
		memset(memory[i % 2], 0, len);
		d = dma_get(_metadata, m, 0);
		dma_wait_moved(_metadata, m, 0, d.pos + 2 * len);
		ASSERT_EQ(0, memcmp(seen, memory[(i + 1) % 2], len))
			PROMISE("the device does not use the old IOAS after the replacement");
		memset(seen, 0, len);
		ASSERT_NE(0, memcmp(seen, memory[i % 2], len))
			PROMISE("the device uses the new IOAS");
	}
	ASSERT_EQ(0, mig_dma_detach(&m->dev));
	memcpy(seen, self->mem, len);
	d = dma_wait(_metadata, m, 0);
	EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error)
		PROMISE("a transfer fails when the function has no IOAS");
	ASSERT_EQ(0, memcmp(seen, self->mem, len))
		PROMISE("the device does not use an IOAS that is detached");
	m->dev.ioas = ioas[0];
	ASSERT_EQ(0, mig_dma_attach(&m->dev));
	d = transfer(_metadata, self, m, FILL, 1, 0, len);
	expect_complete(_metadata, &d, "a transfer after the IOAS was attached again");
	free(seen);
}

/* Mappings come and go at addresses around those that the device uses all the time. */
TEST_F_TIMEOUT(iommu, other_mappings_do_not_disturb, 600)
{
	unsigned int i, rounds = mig_times(500), page, count;
	struct dma_desc d;
	__u64 base = self->windows[1];

	ASSERT_EQ(0, mig_dma_map(&self->m.dev, base, self->mem, PAGE, RW));
	start_filling(_metadata, self, PAGE);
	for (i = 0; i < rounds; i++) {
		page = 1 + pick(self, WINDOW_PAGES - 1);
		count = 1 + pick(self, WINDOW_PAGES - page);
		ASSERT_EQ(0, mig_dma_map(&self->m.dev, base + page * PAGE,
					 self->mem + page * PAGE, count * PAGE, RW));
		ASSERT_EQ(0, mig_dma_unmap(&self->m.dev, base + page * PAGE, count * PAGE));
	}
	d = dma_get(_metadata, &self->m, 0);
	dma_wait_moved(_metadata, &self->m, 0, d.pos + PAGE);
	dma_abort(_metadata, &self->m, 0);
}

/* ---- What the IOMMU is ---- */

TEST_F(iommu, hardware_info_has_dirty_tracking)
{
	struct iommu_hw_info info = { .size = sizeof(info), .dev_id = self->m.dev.id };

	NEED_IOMMUFD();
	ASSERT_EQ(0, call(self->m.dev.iommu, IOMMU_GET_HW_INFO, &info))
		PROMISE("GET_HW_INFO answers");
	EXPECT_EQ((__u32)IOMMU_HW_INFO_TYPE_NONE, info.out_data_type);
	EXPECT_EQ((__u64)IOMMU_HW_CAP_DIRTY_TRACKING | IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
		  info.out_capabilities);
	EXPECT_EQ(0, info.out_max_pasid_log2);
}

TEST_F(iommu, other_kinds_of_domains_are_refused)
{
	static const __u32 flags[] = {
		IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID,
		IOMMU_HWPT_ALLOC_PASID | IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
	};
	struct vfio_device_attach_iommufd_pt pasid = {
		.argsz = sizeof(pasid), .flags = VFIO_DEVICE_ATTACH_PASID,
		.pt_id = self->m.dev.ioas, .pasid = 1,
	};
	__u64 bitmap = 0;
	unsigned int i;
	__u32 hwpt;

	NEED_IOMMUFD();
	for (i = 0; i < ARRAY_SIZE(flags); i++)
		EXPECT_EQ(-EOPNOTSUPP, hwpt_alloc(&self->m, flags[i], &hwpt))
			PROMISE("a domain with flags %#x is refused", flags[i]);
	EXPECT_EQ(-EOPNOTSUPP, call(self->m.dev.fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &pasid))
		PROMISE("a PASID is refused");

	/* A domain without dirty bits cannot track. */
	ASSERT_EQ(0, hwpt_alloc(&self->m, 0, &hwpt));
	EXPECT_EQ(-EOPNOTSUPP, track(&self->m, hwpt, true));
	EXPECT_EQ(-EOPNOTSUPP, get_dirty(&self->m, hwpt, 0, 0, PAGE, PAGE, &bitmap));
	EXPECT_EQ(0, destroy(&self->m, hwpt));
}

/* The ranges of IOVAs that both backends report. */
static unsigned int get_ranges(struct __test_metadata *_metadata, const struct mock *m,
			       struct iommu_iova_range *ranges, unsigned int max)
{
	struct iommu_ioas_iova_ranges ioas = {
		.size = sizeof(ioas), .ioas_id = m->dev.ioas, .num_iovas = max,
		.allowed_iovas = (uintptr_t)ranges,
	};
	const struct vfio_iommu_type1_info_cap_iova_range *cap;
	char buffer[4096] = {};
	struct vfio_iommu_type1_info *info = (void *)buffer;
	__u32 at, i;

	if (m->dev.backend == MIG_IOMMUFD) {
		ASSERT_EQ(0, call(m->dev.iommu, IOMMU_IOAS_IOVA_RANGES, &ioas));
		EXPECT_EQ(PAGE, ioas.out_iova_alignment);
		return ioas.num_iovas;
	}
	info->argsz = sizeof(buffer);
	ASSERT_EQ(0, call(m->dev.iommu, VFIO_IOMMU_GET_INFO, info));
	EXPECT_EQ(PAGE, info->iova_pgsizes);
	for (at = info->cap_offset; at; at = cap->header.next) {
		cap = (const void *)(buffer + at);
		if (cap->header.id != VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
			continue;
		for (i = 0; i < cap->nr_iovas && i < max; i++) {
			ranges[i].start = cap->iova_ranges[i].start;
			ranges[i].last = cap->iova_ranges[i].end;
		}
		return cap->nr_iovas;
	}
	return 0;
}

TEST_F(iommu, addresses_of_messages_are_reserved)
{
	struct iommu_iova_range ranges[8] = {};
	struct mock *m = &self->m;
	struct dma_desc d;

	ASSERT_EQ(2U, get_ranges(_metadata, m, ranges, ARRAY_SIZE(ranges)));
	EXPECT_EQ(0ULL, ranges[0].start);
	EXPECT_EQ(MESSAGES - 1, ranges[0].last);
	EXPECT_EQ(MESSAGES + MESSAGES_LEN, ranges[1].start);
	EXPECT_EQ(APERTURE - 1, ranges[1].last);
	EXPECT_NE(0, mig_dma_map(&m->dev, MESSAGES, self->mem, PAGE, RW))
		PROMISE("memory cannot be mapped over the addresses of messages");
	EXPECT_NE(0, mig_dma_map(&m->dev, APERTURE, self->mem, PAGE, RW))
		PROMISE("memory cannot be mapped behind the aperture");
	self->windows[0] = MESSAGES;
	d = transfer(_metadata, self, m, FILL, 0, 0, 4);
	expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED, VFIO_MOCK_DMA_ERROR_UNMAPPED, 0,
		     "a write of a message");
}

/* The unreclaimable slab memory of the kernel in bytes. */
static __u64 slab_memory(struct __test_metadata *_metadata)
{
	FILE *file = fopen("/proc/meminfo", "r");
	unsigned long long kilobytes = 0;
	char line[128];

	ASSERT_NE(NULL, file);
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "SUnreclaim: %llu", &kilobytes) == 1)
			break;
	fclose(file);
	ASSERT_NE(0ULL, kilobytes);
	return kilobytes << 10;
}

/* The page tables are freed with the mappings, and not only with the domain. */
TEST_F_TIMEOUT(iommu, sparse_mappings_are_freed, 600)
{
	enum { COUNT = 1000, ROUNDS = 8 };
	struct mock *m = &self->m;
	unsigned int i, round;
	struct dma_desc d;
	__u64 iova, before = 0, after;
	__s64 growth, least = LLONG_MAX;

	for (round = 0; round < ROUNDS; round++) {
		/* At other addresses in each round. */
		for (i = 1; i < COUNT; i++) {
			iova = i * (APERTURE / COUNT / PAGE * PAGE) + (round * PAGE << 18);
			ASSERT_EQ(0, mig_dma_map(&m->dev, iova, self->mem, PAGE, RW));
		}
		for (i = 1; i < COUNT; i++) {
			iova = i * (APERTURE / COUNT / PAGE * PAGE) + (round * PAGE << 18);
			ASSERT_EQ(0, mig_dma_unmap(&m->dev, iova, PAGE));
		}
		/* The first round fills caches, and others may allocate memory in any round. */
		after = slab_memory(_metadata);
		growth = after - before;
		if (round && growth < least)
			least = growth;
		before = after;
	}
	/* Each mapping needs a table of one page and a branch of two. */
	EXPECT_GT((__s64)(COUNT * PAGE / 2), least)
		PROMISE("page tables without mappings are freed");
	self->windows[0] = APERTURE / COUNT / PAGE * PAGE;
	d = transfer(_metadata, self, m, FILL, 0, 0, 1);
	EXPECT_EQ(VFIO_MOCK_DMA_ERROR_UNMAPPED, (int)d.error);
}

/* No user can take the function away from its IOMMU. */
TEST_F(iommu, group_has_one_function_and_an_identity_domain)
{
	char path[PATH_MAX + 64], type[32] = "", link[PATH_MAX] = "";
	struct dirent *entry;
	unsigned int count = 0;
	FILE *file;
	DIR *dir;

	snprintf(path, sizeof(path), "%s/iommu_group/devices", self->m.path);
	dir = opendir(path);
	ASSERT_NE(NULL, dir);
	while ((entry = readdir(dir)))
		count += entry->d_name[0] != '.';
	closedir(dir);
	EXPECT_EQ(1U, count)
		PROMISE("each function has a group of its own");
	snprintf(path, sizeof(path), "%s/iommu_group/type", self->m.path);
	file = fopen(path, "r");
	ASSERT_NE(NULL, file);
	ASSERT_EQ(1, fscanf(file, "%31s", type));
	fclose(file);
	EXPECT_STREQ("identity", type);
	EXPECT_NE(0, write_word(path, "DMA"))
		PROMISE("the default domain cannot be changed");
	snprintf(path, sizeof(path), "%s/iommu", self->m.path);
	ASSERT_LT(0, readlink(path, link, sizeof(link) - 1));
	EXPECT_NE(NULL, strstr(link, "/soft-iommu.vfio_mock"))
		PROMISE("the function is behind a software IOMMU: %s", link);
}

/* ---- Failures ---- */

#define DRIVER	"/sys/bus/pci/drivers/vfio_mock"

/* Prepares to inject failures, but none in callees of @spared. */
#define FAIL_OR_SKIP(spared) do {						\
	const char *__why = NULL, *__spared = (spared);				\
										\
	if (fail_open(&self->in, &__why))					\
		SKIP(return, "%s", __why);					\
	self->fails = true;							\
	if (__spared)								\
		__why = fail_limit("failslab", "reject", __spared);		\
	if (__why)								\
		SKIP(return, "%s", __why);					\
} while (0)

/* The number of references to the module, which include one for each domain. */
static int references(struct __test_metadata *_metadata)
{
	FILE *file = fopen("/sys/module/vfio_mock/refcnt", "r");
	int count = -1;

	ASSERT_NE(NULL, file);
	ASSERT_EQ(1, fscanf(file, "%d", &count));
	fclose(file);
	return count;
}

/* A mapping in window 1 that needs page tables of its own on both sides of the middle. */
#define FAILING_AT	(WINDOW / 2 - 8 * PAGE)
#define FAILING_LEN	(16 * PAGE)

/* Expects that the device can reach all of the mapping, or none of it. */
static void expect_mapped(struct __test_metadata *_metadata, iommu_data *self, bool mapped,
			  const char *when)
{
	struct dma_desc d;
	__u64 at;

	if (mapped) {
		d = transfer(_metadata, self, &self->m, FILL, 1, FAILING_AT, FAILING_LEN);
		expect_complete(_metadata, &d, when);
		return;
	}
	for (at = FAILING_AT; at < FAILING_AT + FAILING_LEN; at += PAGE) {
		d = transfer(_metadata, self, &self->m, FILL, 1, at, 1);
		expect_ended(_metadata, &d, VFIO_MOCK_DMA_FAILED,
			     VFIO_MOCK_DMA_ERROR_UNMAPPED, 0, when);
	}
}

/*
 * A mapping that failed maps nothing, and one that was removed is gone. The memory is
 * contiguous, if possible, so that a single request to the IOMMU fails half-way.
 */
TEST_F_TIMEOUT(iommu, failed_map_and_unmap_can_be_repeated, 300)
{
	struct mig_device *dev = &self->m.dev;
	struct nth *nth = &self->nth;
	__u64 iova = self->windows[1] + FAILING_AT, len = FAILING_LEN;
	__u8 *mem = huge_memory(_metadata, HUGE_PAGE) ?: self->mem;
	int ret;

	FAIL_OR_SKIP(NULL);
	for_each_failure(nth, "mapping memory") {
		nth_begin(nth);
		ret = mig_dma_map(dev, iova, mem, len, RW);
		nth_end(nth, ret);
		/* iommufd maps the memory before it copies its address to the user. */
		if (ret == -EFAULT)
			mig_dma_unmap(dev, iova, len);
		if (ret) {
			expect_mapped(_metadata, self, false, "after a failure");
			ASSERT_EQ(0, mig_dma_map(dev, iova, mem, len, RW))
				PROMISE("mapping can be repeated after a failure");
		}
		expect_mapped(_metadata, self, true, "after a mapping");
		ASSERT_EQ(0, mig_dma_unmap(dev, iova, len));
	}
	for_each_failure(nth, "unmapping memory") {
		ASSERT_EQ(0, mig_dma_map(dev, iova, mem, len, RW));
		nth_begin(nth);
		ret = mig_dma_unmap(dev, iova, len);
		nth_end(nth, ret);
		if (ret) {
			ret = mig_dma_unmap(dev, iova, len);
			/* The number of unmapped bytes is copied to the user at the end. */
			ASSERT_TRUE(!ret || (nth->ret == -EFAULT && ret == -ENOENT))
				PROMISE("unmapping can be repeated after a failure");
		}
		expect_mapped(_metadata, self, false, "after unmapping");
		/* Some kernels need no memory for it. */
		if (nth->n == 1 && !nth->injected)
			break;
	}
}

/* Returns whether the device writes to @mem at the IOVA of the failing mapping. */
static bool writes_to(struct __test_metadata *_metadata, iommu_data *self, const __u8 *mem)
{
	struct dma_desc d = transfer(_metadata, self, &self->m, FILL, 1, FAILING_AT,
				     FAILING_LEN);
	__u8 *want = malloc(FAILING_LEN);
	bool same;

	ASSERT_NE(NULL, want);
	vfio_mock_pattern(want, d.seed, 0, FAILING_LEN);
	same = !memcmp(want, mem, FAILING_LEN);
	free(want);
	return same;
}

/* After a failure, the function has the domain that it had before. */
TEST_F_TIMEOUT(iommu, failed_attach_keeps_the_domain, 300)
{
	struct mock *m = &self->m;
	struct nth *nth = &self->nth;
	const __u64 iova = self->windows[1] + FAILING_AT, len = FAILING_LEN;
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	const __u32 ioas = m->dev.ioas;
	__u8 *other = self->mem + WINDOW / 2;
	__u64 bits[1];
	int before, ret;

	FAIL_OR_SKIP(NULL);
	if (variant->backend == MIG_GROUP) {
		mig_close(&m->dev);
		before = references(_metadata);
		for_each_failure(nth, "opening the function in a container") {
			nth->also = -EOPNOTSUPP;
			nth_begin(nth);
			ret = mig_open(&m->dev, m->path, MIG_GROUP);
			nth_end(nth, ret);
			if (!ret)
				mig_close(&m->dev);
		}
		EXPECT_EQ(before, references(_metadata))
			PROMISE("each domain was freed");
		ASSERT_EQ(0, mig_open(&m->dev, m->path, MIG_GROUP));
		ASSERT_EQ(0, mig_dma_map(&m->dev, iova, self->mem, len, RW));
		expect_mapped(_metadata, self, true, "in a container");
		return;
	}
	ASSERT_EQ(0, mig_dma_map(&m->dev, iova, self->mem, len, RW));
	/* The domain is that of another IOAS, with other memory at this IOVA. */
	ASSERT_EQ(0, call(m->dev.iommu, IOMMU_IOAS_ALLOC, &alloc));
	m->dev.ioas = alloc.out_ioas_id;
	ASSERT_EQ(0, mig_dma_map(&m->dev, iova, other, len, RW));
	before = references(_metadata);
	for_each_failure(nth, "allocating a domain") {
		nth_begin(nth);
		ret = hwpt_alloc(m, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, &self->hwpt);
		nth_end(nth, ret);
		if (!ret)
			ASSERT_EQ(0, destroy(m, self->hwpt));
	}
	EXPECT_EQ(before, references(_metadata))
		PROMISE("each domain was freed");
	ASSERT_EQ(0, hwpt_alloc(m, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, &self->hwpt));
	for_each_failure(nth, "attaching a domain") {
		nth_begin(nth);
		ret = attach(m, self->hwpt);
		nth_end(nth, ret);
		EXPECT_EQ(!ret, writes_to(_metadata, self, other))
			PROMISE("the function has the domain if attaching has succeeded");
		/* VFIO detaches the function if it cannot copy the ID to the user. */
		if (ret && ret != -EFAULT) {
			EXPECT_TRUE(writes_to(_metadata, self, self->mem))
				PROMISE("a function keeps its domain if attaching fails");
		}
		ASSERT_EQ(0, attach(m, ioas));
		EXPECT_TRUE(writes_to(_metadata, self, self->mem));
	}
	for_each_failure(nth, "attaching a domain after detaching") {
		ASSERT_EQ(0, mig_dma_detach(&m->dev));
		expect_mapped(_metadata, self, false, "without a domain");
		nth_begin(nth);
		ret = attach(m, self->hwpt);
		nth_end(nth, ret);
		expect_mapped(_metadata, self, !ret, "after attaching");
		ASSERT_EQ(0, attach(m, self->hwpt));
	}
	for_each_failure(nth, "reading dirty bits") {
		ASSERT_EQ(0, track(m, self->hwpt, true));
		expect_mapped(_metadata, self, true, "while it is tracked");
		bits[0] = 0;
		nth_begin(nth);
		ret = get_dirty(m, self->hwpt, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
				iova, len, PAGE, bits);
		nth_end(nth, ret);
		if (ret)
			ASSERT_EQ(0, get_dirty(m, self->hwpt, 0, iova, len, PAGE, bits));
		EXPECT_EQ(0xffffULL, bits[0])
			PROMISE("no dirty bit is lost by a failure");
	}
	ASSERT_EQ(0, attach(m, ioas));
	m->dev.ioas = ioas;
	ASSERT_EQ(0, destroy(m, self->hwpt));
	EXPECT_EQ(before, references(_metadata))
		PROMISE("each domain was freed");
	EXPECT_TRUE(writes_to(_metadata, self, self->mem))
		PROMISE("the function has its domain after all failures");
}

/* The number of a device in vfio core, which is the first free one; -1: there is none. */
static int vfio_number(const char *device)
{
	char path[PATH_MAX + 16];
	struct dirent *entry;
	int number = -1;
	DIR *dir;

	snprintf(path, sizeof(path), "%s/vfio-dev", device);
	dir = opendir(path);
	while (dir && number < 0 && (entry = readdir(dir)))
		sscanf(entry->d_name, "vfio%d", &number);
	if (dir)
		closedir(dir);
	return number;
}

/* vfio core (7.3) warns about its own failures, see vfio_mock_module_test. */
TEST_F_TIMEOUT(iommu, failed_bind_and_unbind_can_be_repeated, 600)
{
	struct mock *m = &self->m;
	struct nth *nth = &self->nth;
	const char *address = strrchr(m->path, '/') + 1;
	int before, number, ret;

	FAIL_OR_SKIP(mig_option("fixed") ? NULL : "vfio_create_group");
	mig_close(&m->dev);
	before = references(_metadata);
	ASSERT_EQ(0, write_word(DRIVER "/unbind", address));
	ASSERT_EQ(0, write_word(DRIVER "/bind", address));
	number = vfio_number(m->path);
	for_each_failure(nth, "binding the driver") {
		ASSERT_EQ(0, write_word(DRIVER "/unbind", address));
		nth_begin(nth);
		ret = write_word(DRIVER "/bind", address);
		nth_end(nth, ret);
		if (ret) {
			EXPECT_EQ(-1, vfio_number(m->path))
				PROMISE("a function that was not bound is no device of VFIO");
			ASSERT_EQ(0, write_word(DRIVER "/bind", address))
				PROMISE("binding can be repeated after a failure");
		}
		EXPECT_EQ(number, vfio_number(m->path))
			PROMISE("the core has no reference to functions that were not bound");
	}
	for_each_failure(nth, "unbinding the driver") {
		nth_begin(nth);
		ret = write_word(DRIVER "/unbind", address);
		nth_end(nth, ret);
		if (ret)
			ASSERT_EQ(0, write_word(DRIVER "/unbind", address));
		EXPECT_EQ(-1, vfio_number(m->path));
		ASSERT_EQ(0, write_word(DRIVER "/bind", address));
	}
	EXPECT_EQ(before, references(_metadata))
		PROMISE("the module has no other references than before");
	ASSERT_EQ(0, mig_open(&m->dev, m->path, variant->backend));
	expect_fresh(_metadata, m, "after failures of bind and unbind");
}

/*
 * Plugging is not tested: without memory, the PCI core (7.3) panics in
 * pdev_sort_resources() when it assigns addresses to BARs.
 */
TEST_F_TIMEOUT(iommu, failed_unplug_can_be_repeated, 600)
{
	struct nth *nth = &self->nth;
	struct guest g;
	char power[96];
	int before, ret;

	FAIL_OR_SKIP(NULL);
	before = references(_metadata);
	ASSERT_EQ(0, mock_create_function(&g, mock_type_size(&self->m)));
	snprintf(power, sizeof(power), "%s/power", g.directory);
	for_each_failure(nth, "unplugging a function") {
		ASSERT_EQ(0, write_word(power, "1"));
		EXPECT_EQ(0, access(g.path, F_OK));
		nth_begin(nth);
		ret = write_word(power, "0");
		nth_end(nth, ret);
		if (ret)
			ASSERT_EQ(0, write_word(power, "0"));
		EXPECT_NE(0, access(g.path, F_OK))
			PROMISE("a function that was unplugged is not on the bus");
	}
	for_each_failure(nth, "removing the directory of a function") {
		ASSERT_EQ(0, write_word(power, "1"));
		nth_begin(nth);
		ret = rmdir(g.directory) ? -errno : 0;
		nth_end(nth, ret);
		if (ret)
			ASSERT_EQ(0, rmdir(g.directory));
		EXPECT_NE(0, access(g.path, F_OK));
		ASSERT_EQ(0, mkdir(g.directory, 0755));
	}
	ASSERT_EQ(0, rmdir(g.directory));
	for_each_failure(nth, "creating the directory of a function") {
		nth_begin(nth);
		ret = mkdir(g.directory, 0755) ? -errno : 0;
		nth_end(nth, ret);
		if (!ret)
			ASSERT_EQ(0, rmdir(g.directory));
	}
	EXPECT_EQ(before, references(_metadata))
		PROMISE("the module has no other references than before");
}

MIG_HARNESS_MAIN(mock_options)
