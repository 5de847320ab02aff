// SPDX-License-Identifier: GPL-2.0
/*
 * BAR2 of the mock migratable device vfio_mock in address spaces: stores are seen
 * and tracked page by page, dropped when the device stands still, and no fault
 * waits for the migration whose stream goes into the mapping itself.
 *
 *	VFIO_MOCK_MEDIUM="SOURCE TARGET" ./vfio_mock_mmap_test
 *
 * with the sysfs paths of two mediated devices. run_mock.sh makes them and runs
 * this. VFIO_MIGRATION_ROUNDS=N repeats what is random N times as often.
 */
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <linux/io_uring.h>

#include "mock_dma.h"

#define map_data	FIXTURE_DATA(map)

FIXTURE(map)
{
	struct mock m;
	struct mock dst;
	__u8 *map;		/* all of BAR2 of the first device */
	__u8 *dirty;		/* by page, what the next round must stream */
	__u64 random;
};

FIXTURE_VARIANT(map)
{
	enum mig_backend backend;
};

FIXTURE_VARIANT_ADD(map, group) { .backend = MIG_GROUP };
FIXTURE_VARIANT_ADD(map, iommufd) { .backend = MIG_IOMMUFD };

FIXTURE_SETUP(map)
{
	MOCK_OPEN_OR_SKIP(&self->m, "VFIO_MOCK_MEDIUM", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "VFIO_MOCK_MEDIUM", 1, variant->backend);
	self->map = bar2_map(_metadata, &self->m, 0, self->m.size);
	self->dirty = calloc(1, self->m.size / PAGE);
	ASSERT_NE(NULL, self->dirty);
	mig_touch_begin();
}

FIXTURE_TEARDOWN(map)
{
	mock_close(&self->m);
	mock_close(&self->dst);
}

static __u64 pick(map_data *self, __u64 limit)
{
	return vfio_mock_mix(++self->random) % limit;
}

/* Stores to the memory of the device at @at, which is mapped at @map. */
static void store_at(map_data *self, __u8 *map, __u64 at, __u64 len)
{
	vfio_mock_pattern(self->m.want + at, ++self->random, at, len);
	memcpy(map, self->m.want + at, len);
	mark(self->dirty, at, len);
}

/* To the temporary end; nothing is dirty then. */
static int start_tracking(struct __test_metadata *_metadata, map_data *self)
{
	struct mig_stream first = {};
	int fd = go(_metadata, &self->m.dev, PRE_COPY);

	ASSERT_EQ(-ENOMSG, mig_save(fd, &first, stream_limit(&self->m.dev)));
	mig_stream_free(&first);
	memset(self->dirty, 0, self->m.size / PAGE);
	return fd;
}

static void expect_dirty_round(struct __test_metadata *_metadata,
			       map_data *self, int fd, const char *what)
{
	expect_round(_metadata, &self->m, fd, self->dirty, what);
	memset(self->dirty, 0, self->m.size / PAGE);
}

/* The mapping and read() agree with what the memory must hold. */
static void expect_both(struct __test_metadata *_metadata, map_data *self,
			const char *when)
{
	char what[128];

	expect_memory(_metadata, &self->m, self->m.want, when);
	snprintf(what, sizeof(what), "%s: what is mapped", when);
	expect_bytes(_metadata, self->m.want, self->map, self->m.size, what);
}

/* ---- What can be mapped ---- */

TEST_F(map, region_info_tells_what_can_be_mapped)
{
	struct vfio_region_info info;
	__u32 i;

	for (i = 0; i < VFIO_PCI_NUM_REGIONS; i++) {
		ASSERT_EQ(0, mig_region_info(&self->m.dev, i, &info));
		EXPECT_EQ(i == BAR2 ? VFIO_REGION_INFO_FLAG_MMAP : 0,
			  (int)(info.flags & VFIO_REGION_INFO_FLAG_MMAP))
			PROMISE("BAR2 can be mapped, region %u cannot", i);
	}
}

TEST_F(map, mappings_need_memory_space)
{
	struct mock *m = &self->m;
	__u8 before = self->map[PAGE];

	mig_touch_begin();
	EXPECT_EQ(0, mig_touch(self->map, false));
	EXPECT_EQ(0, mig_touch(self->map + PAGE, false));
	put(_metadata, m, CONFIG, 4, 4, 2);
	EXPECT_EQ(SIGBUS, mig_touch(self->map, false))
		PROMISE("without memory space a load from a page that was mapped is SIGBUS");
	EXPECT_EQ(SIGBUS, mig_touch(self->map + PAGE, true))
		PROMISE("without memory space a store is SIGBUS");
	EXPECT_EQ(SIGBUS, mig_touch(self->map + 2 * PAGE, false))
		PROMISE("without memory space a page that was not mapped is SIGBUS");
	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(before, self->map[PAGE])
		PROMISE("a store without memory space does not reach the device");
	EXPECT_EQ(0, mig_touch(self->map + 2 * PAGE, true));

	put(_metadata, m, CONFIG, 4, 4, 2);
	ASSERT_EQ(0, mig_reset(&m->dev));
	EXPECT_EQ(0, mig_touch(self->map, true))
		PROMISE("a reset switches memory space on");
}

/* The errno of mmap(), 0 if it works; what was mapped goes again. */
static int map_errno(struct mock *m, __u64 offset, size_t len, int prot, int flags)
{
	void *map = mmap(NULL, len, prot, flags, m->dev.fd, offset);

	if (map == MAP_FAILED)
		return errno;
	munmap(map, len);
	return 0;
}

TEST_F(map, bad_arguments)
{
	struct mock *m = &self->m;
	const __u64 bar2 = m->offset[BAR2], size = m->size;
	const struct {
		const char *what;
		__u64 offset;
		size_t len;
		int flags;
	} bad[] = {
		{ "a private mapping", bar2, PAGE, MAP_PRIVATE },
		{ "a private mapping of it all", bar2, size, MAP_PRIVATE },
		{ "more than there is", bar2, size + PAGE, MAP_SHARED },
		{ "one byte more than there is", bar2, size + 1, MAP_SHARED },
		{ "what is behind the end", bar2 + size, PAGE, MAP_SHARED },
		{ "what crosses the end", bar2 + size - PAGE, 2 * PAGE, MAP_SHARED },
		{ "what crosses the beginning", bar2 - PAGE, 2 * PAGE, MAP_SHARED },
		{ "what is far behind", bar2 + (1ULL << 38), PAGE, MAP_SHARED },
		{ "no region", (__u64)VFIO_PCI_NUM_REGIONS << 40, PAGE, MAP_SHARED },
		{ "the end of the file", (1ULL << 63) - PAGE, PAGE, MAP_SHARED },
		{ "an offset inside of a page", bar2 + 1, PAGE, MAP_SHARED },
		{ "an offset inside of a page", bar2 + PAGE / 2, PAGE, MAP_SHARED },
		{ "nothing", bar2, 0, MAP_SHARED },
	};
	static const int prots[] = {
		PROT_NONE, PROT_READ, PROT_WRITE, PROT_READ | PROT_WRITE,
	};
	unsigned int i, p;

	for (p = 0; p < ARRAY_SIZE(prots); p++) {
		for (i = 0; i < ARRAY_SIZE(bad); i++) {
			EXPECT_EQ(EINVAL, map_errno(m, bad[i].offset, bad[i].len, prots[p],
						    bad[i].flags))
				PROMISE("%s cannot be mapped (prot %d)", bad[i].what, prots[p]);
		}
		for (i = 0; i < VFIO_PCI_NUM_REGIONS; i++) {
			EXPECT_EQ(i == BAR2 ? 0 : EINVAL,
				  map_errno(m, m->offset[i], PAGE, prots[p], MAP_SHARED))
				PROMISE("BAR2 can be mapped, region %u cannot", i);
		}
		EXPECT_EQ(0, map_errno(m, bar2, size, prots[p], MAP_SHARED));
		EXPECT_EQ(0, map_errno(m, bar2 + size - PAGE, 1, prots[p], MAP_SHARED));
		EXPECT_EQ(0, map_errno(m, bar2 + PAGE, size - PAGE, prots[p],
				       MAP_SHARED_VALIDATE));
	}
}

TEST_F(map, loads_and_stores_are_accesses_to_the_device)
{
	unsigned int count = mig_times(300), i;
	struct mock *m = &self->m;
	__u64 at, len;

	for (i = 0; i < count; i++) {
		at = pick(self, m->size);
		len = 1 + pick(self, i % 4 ? 9 : 3 * PAGE);
		if (len > m->size - at)
			len = m->size - at;
		switch (i % 3) {
		case 0:
			store_at(self, self->map + at, at, len);
			break;
		case 1:
			store_noise(_metadata, m, at, len, i);
			break;
		default:
			fill(_metadata, m, at, len, i);
		}
		expect_state_range(_metadata, m, at, len, "after an access");
		expect_bytes(_metadata, m->want + at, self->map + at, len, "what is mapped");
	}
	expect_both(_metadata, self, "after accesses by all ways");
	command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 0, m->size, 0);
	EXPECT_EQ(vfio_mock_checksum(m->want, m->size), reg64(m, RESULT))
		PROMISE("the device itself sees what was stored");
}

TEST_F(map, one_memory_in_many_places)
{
	struct mock *m = &self->m;
	__u64 pages = m->size / PAGE, at[32], len[32], where;
	unsigned int i, j, n;
	__u8 *maps[32];

	for (i = 0; i < ARRAY_SIZE(maps); i++) {
		at[i] = pick(self, pages) * PAGE;
		len[i] = (1 + pick(self, pages - at[i] / PAGE)) * PAGE;
		maps[i] = bar2_map(_metadata, m, at[i], len[i]);
	}
	for (n = 0; n < 400; n++) {
		i = pick(self, ARRAY_SIZE(maps));
		where = pick(self, len[i] - 8);
		store_at(self, maps[i] + where, at[i] + where, 8);
		where += at[i];
		for (j = 0; j < ARRAY_SIZE(maps); j++) {
			if (where < at[j] || where + 8 > at[j] + len[j])
				continue;
			EXPECT_EQ(0, memcmp(m->want + where, maps[j] + (where - at[j]), 8))
				PROMISE("all mappings show the same memory");
		}
		/* Now and then one goes, another comes in its place. */
		if (n % 16 == 0) {
			i = pick(self, ARRAY_SIZE(maps));
			ASSERT_EQ(0, munmap(maps[i], len[i]));
			maps[i] = bar2_map(_metadata, m, at[i], len[i]);
		}
	}
	expect_both(_metadata, self, "after stores through many mappings");
}

/* ---- What is done to a mapping ---- */

TEST_F(map, processes_share_the_memory)
{
	struct mock *m = &self->m;
	int status, fd = -1;
	__u8 *again;
	pid_t pid;

	fill(_metadata, m, 0, m->size, 5);
	if (m->dev.flags & VFIO_MIGRATION_PRE_COPY)
		fd = start_tracking(_metadata, self);
	store_at(self, self->map + 10, 10, 3);
	/* What the child will store, through the mapping it inherits and its own. */
	vfio_mock_pattern(m->want + 7 * PAGE - 5, 77, 0, 10);
	vfio_mock_pattern(m->want + 20 * PAGE, 78, 0, 100);
	mark(self->dirty, 7 * PAGE - 5, 10);
	mark(self->dirty, 20 * PAGE, 100);

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		if (memcmp(self->map + 10, m->want + 10, 3))
			_exit(1);
		memcpy(self->map + 7 * PAGE - 5, m->want + 7 * PAGE - 5, 10);
		again = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->dev.fd,
			     m->offset[BAR2] + 20 * PAGE);
		if (again == MAP_FAILED)
			_exit(2);
		memcpy(again, m->want + 20 * PAGE, 100);
		/* Half of it goes, the rest with the process. */
		_exit(munmap(self->map, m->size / 2) ? 3 : 0);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status)
		PROMISE("a child has the mapping and can make its own");
	expect_both(_metadata, self, "after stores of a child");
	if (fd >= 0)
		expect_dirty_round(_metadata, self, fd, "stores of two processes");
	store_at(self, self->map + 11 * PAGE, 11 * PAGE, 8);
	expect_both(_metadata, self, "when the child is gone");
	if (fd >= 0)
		expect_dirty_round(_metadata, self, fd, "a store when the child is gone");
}

TEST_F(map, mapping_can_be_cut_and_moved)
{
	struct mock *m = &self->m;
	__u8 *map = self->map, *moved;
	int fd = -1;

	fill(_metadata, m, 0, m->size, 6);
	if (m->dev.flags & VFIO_MIGRATION_PRE_COPY)
		fd = start_tracking(_metadata, self);

	/* A hole in the middle. */
	ASSERT_EQ(0, munmap(map + 4 * PAGE, 3 * PAGE));
	EXPECT_EQ(SIGSEGV, mig_touch(map + 5 * PAGE, false));
	store_at(self, map + 3 * PAGE + 1, 3 * PAGE + 1, PAGE - 1);
	store_at(self, map + 7 * PAGE, 7 * PAGE, 9);

	/* To another address, with pages in it and a page made from then on. */
	store_at(self, map + 30 * PAGE, 30 * PAGE, 5);
	moved = mremap(map + 30 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		       map + 5 * PAGE);
	ASSERT_EQ(map + 5 * PAGE, moved);
	EXPECT_EQ(0, memcmp(m->want + 30 * PAGE, moved, 2 * PAGE))
		PROMISE("a mapping that is moved shows the same memory");
	store_at(self, moved + PAGE + 7, 31 * PAGE + 7, 5);
	EXPECT_EQ(SIGSEGV, mig_touch(map + 30 * PAGE, true));

	/* It shrinks, and does not grow. */
	moved = mremap(map + 40 * PAGE, 4 * PAGE, 2 * PAGE, 0);
	EXPECT_EQ(map + 40 * PAGE, moved);
	EXPECT_EQ(SIGSEGV, mig_touch(map + 42 * PAGE, true));
	EXPECT_EQ(MAP_FAILED, mremap(map + 41 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE))
		PROMISE("a mapping of a device does not grow");
	store_at(self, map + 41 * PAGE, 41 * PAGE, 1);
	expect_memory(_metadata, m, m->want, "after stores through what is left");
	if (fd >= 0) {
		expect_dirty_round(_metadata, self, fd, "stores through mappings in pieces");
		store_at(self, map + 5 * PAGE, 30 * PAGE, 5);
		store_at(self, map + 8 * PAGE, 8 * PAGE, 5);
		expect_dirty_round(_metadata, self, fd, "stores through mappings in pieces");
	}
}

TEST_F(map, protection_can_change)
{
	struct mock *m = &self->m;
	__u8 *map = self->map, *ro;
	int fd = -1, i;

	fill(_metadata, m, 0, m->size, 7);
	for (i = 0; i < 2; i++) {
		store_at(self, map + PAGE, PAGE, 100);
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_READ));
		EXPECT_EQ(SIGSEGV, mig_touch(map + PAGE, true))
			PROMISE("what may only be read cannot be written");
		EXPECT_EQ(0, mig_touch(map, false));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "a page that was written and then protected");
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_READ | PROT_WRITE));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "pages that may be written again");
		store_at(self, map + PAGE + 5, PAGE + 5, 100);
		store_at(self, map + 2 * PAGE, 2 * PAGE, 1);
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_NONE));
		EXPECT_EQ(SIGSEGV, mig_touch(map, false));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "stores after a change of protection");
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_READ | PROT_WRITE));

		/* A mapping that may only be read, and then more. */
		ro = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, m->dev.fd,
			  m->offset[BAR2] + 9 * PAGE);
		ASSERT_NE(MAP_FAILED, ro);
		EXPECT_EQ(0, memcmp(ro, m->want + 9 * PAGE, PAGE));
		EXPECT_EQ(SIGSEGV, mig_touch(ro, true));
		ASSERT_EQ(0, mprotect(ro, PAGE, PROT_READ | PROT_WRITE));
		store_at(self, ro, 9 * PAGE, 10);
		expect_both(_metadata, self, "after changes of protection");
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "a store by a mapping made to be read");
		ASSERT_EQ(0, munmap(ro, PAGE));
		if (m->dev.flags & VFIO_MIGRATION_PRE_COPY && !i)
			fd = start_tracking(_metadata, self);
	}
}

TEST_F(map, advice_and_locks_do_no_harm)
{
	struct mock *m = &self->m;
	__u8 *map = self->map;
	int fd = -1;

	fill(_metadata, m, 0, m->size, 8);
	if (m->dev.flags & VFIO_MIGRATION_PRE_COPY)
		fd = start_tracking(_metadata, self);
	store_at(self, map, 0, 3 * PAGE);
	EXPECT_EQ(0, madvise(map, m->size, MADV_DONTNEED));
	expect_both(_metadata, self, "after MADV_DONTNEED");
	if (fd >= 0)
		expect_dirty_round(_metadata, self, fd, "stores before MADV_DONTNEED");
	madvise(map, m->size, MADV_COLD);
	madvise(map, m->size, MADV_PAGEOUT);
	madvise(map, m->size, MADV_FREE);
	madvise(map, m->size, MADV_REMOVE);
	madvise(map, m->size, MADV_MERGEABLE);
	madvise(map, m->size, MADV_HUGEPAGE);
	msync(map, m->size, MS_SYNC | MS_INVALIDATE);
	mlock(map, m->size);
	expect_both(_metadata, self, "after advice that a device has no use for");
	if (fd >= 0) {
		expect_dirty_round(_metadata, self, fd, "advice");
		store_at(self, map + 5 * PAGE, 5 * PAGE, 3 * PAGE);
		munlock(map, m->size);
		expect_dirty_round(_metadata, self, fd, "stores to a locked mapping");
		/* To make it writable is to write, as far as anybody can tell. */
		madvise(map + 9 * PAGE, PAGE, MADV_POPULATE_READ);
		expect_dirty_round(_metadata, self, fd, "MADV_POPULATE_READ");
		if (!madvise(map + 9 * PAGE, PAGE, MADV_POPULATE_WRITE))
			mark(self->dirty, 9 * PAGE, PAGE);
		expect_dirty_round(_metadata, self, fd, "MADV_POPULATE_WRITE");
	}
}

/* A mapping holds the file open, and the file the device. */
TEST_F(map, mapping_keeps_the_device)
{
	struct mock *m = &self->m;

	store_at(self, self->map, 0, m->size);
	mig_close_device(&m->dev);
	EXPECT_EQ(0, memcmp(self->map, m->want, m->size))
		PROMISE("a mapping outlives the file descriptor");
	store_at(self, self->map + 3 * PAGE, 3 * PAGE, PAGE);
	EXPECT_EQ(0, memcmp(self->map, m->want, m->size));
	ASSERT_EQ(0, munmap(self->map, m->size));
	ASSERT_EQ(0, mig_reopen_device(&m->dev))
		STEP("open the device again: %s", m->dev.why);
	expect_fresh(_metadata, m, "when the last mapping is gone");
	self->map = bar2_map(_metadata, m, 0, m->size);
	memset(m->want, 0, m->size);
	store_at(self, self->map + 3 * PAGE, 3 * PAGE, PAGE);
	expect_both(_metadata, self, "in the next mapping");
}

TEST_F(map, reset_is_seen)
{
	static const __u32 states[] = {
		RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, STOP, STOP_COPY, RESUMING,
	};
	struct mock *m = &self->m;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		store_at(self, self->map, 0, m->size);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		self->map[0] = 1;
		self->map[5 * PAGE] = 1;
		ASSERT_EQ(0, mig_reset(&m->dev));
		memset(m->want, 0, m->size);
		expect_both(_metadata, self, "after RESET");
		expect_fresh(_metadata, m, "after RESET");
		store_at(self, self->map + 100, 100, PAGE);
		expect_both(_metadata, self, "stored after RESET");
	}
}

/* ---- Tracking ---- */

TEST_F_TIMEOUT(map, stores_are_tracked_exactly, 300)
{
	unsigned int count = mig_times(60), i, j;
	struct mock *m = &self->m;
	__u64 pages = m->size / PAGE, at, len;
	__u8 *maps[3];
	int fd;

	NEED_PRE_COPY(&m->dev);
	maps[0] = self->map;
	maps[1] = bar2_map(_metadata, m, 0, m->size);
	maps[2] = bar2_map(_metadata, m, 0, m->size);
	/* Pages that were writable before anybody asked. */
	store_at(self, maps[0], 0, m->size);
	memcpy(maps[1] + m->size / 2, m->want + m->size / 2, m->size / 2);
	fd = start_tracking(_metadata, self);
	expect_dirty_round(_metadata, self, fd, "nothing");
	for (i = 0; i < count; i++) {
		move_on(_metadata, &m->dev, i % 2 || !(m->dev.flags & VFIO_MIGRATION_P2P) ?
			PRE_COPY : PRE_COPY_P2P);
		for (j = pick(self, 12); j; j--) {
			len = 1 + pick(self, pick(self, 3) ? 8 : 5 * PAGE);
			at = pick(self, m->size - len + 1);
			store_at(self, maps[pick(self, 3)] + at, at, len);
		}
		/* Whole words of pages, and pages of which one is left out. */
		if (i % 8 == 0) {
			for (j = 0; j < pages; j += 1 + i % 3)
				store_at(self, maps[j % 3] + j * PAGE, j * PAGE, 1);
		}
		/* Loads through the other mappings make nothing dirty. */
		EXPECT_EQ(0, memcmp(maps[i % 3], m->want, m->size));
		expect_dirty_round(_metadata, self, fd, "stores through mappings");
	}
}

TEST_F(map, accounting_counts_stored_pages)
{
	struct vfio_precopy_info info;
	struct mock *m = &self->m;
	__u64 tail, i;
	int fd;

	NEED_PRE_COPY(&m->dev);
	fd = start_tracking(_metadata, self);
	ASSERT_EQ(0, mig_data_size(&m->dev, &tail));
	for (i = 0; i < 20; i++) {
		store_at(self, self->map + i * 2 * PAGE + i, i * 2 * PAGE + i, 8);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_EQ((i + 1) * (24 + PAGE) + tail, info.dirty_bytes)
			PROMISE("each page that is stored to is one dirty page");
		EXPECT_EQ(0U, info.initial_bytes);
		/* And stays so, whatever is stored to it. */
		store_at(self, self->map + i * 2 * PAGE, i * 2 * PAGE, PAGE);
		ASSERT_EQ(0, mig_precopy_info(fd, &info));
		EXPECT_EQ((i + 1) * (24 + PAGE) + tail, info.dirty_bytes);
	}
}

TEST_F_TIMEOUT(map, store_wakes_the_poller, 60)
{
	struct mock *m = &self->m;
	struct poller poller;
	int fd;

	NEED_PRE_COPY(&m->dev);
	fd = start_tracking(_metadata, self);
	poller_start(_metadata, &poller, fd);
	EXPECT_FALSE(atomic_load(&poller.done));
	store_at(self, self->map + PAGE, PAGE, 1);
	EXPECT_EQ(POLLIN, poller_join(&poller) & POLLIN)
		PROMISE("a store through a mapping ends the temporary end of stream");
	expect_dirty_round(_metadata, self, fd, "the store that woke somebody");
}

/* Stores at the time when tracking starts and stops. */
TEST_F_TIMEOUT(map, tracking_comes_and_goes, 60)
{
	struct mock *m = &self->m;
	struct mig_stream image = {};
	struct mock_image parsed;
	int fd, i;

	NEED_PRE_COPY(&m->dev);
	for (i = 0; i < 3; i++) {
		store_at(self, self->map, 0, m->size);
		fd = go(_metadata, &m->dev, PRE_COPY);
		image.len = 0;
		store_at(self, self->map + 5, 5, 3 * PAGE);
		ASSERT_LT(0, mig_read(fd, &image, m->size / 2));
		/* Behind what was streamed, and before it. */
		store_at(self, self->map + m->size - PAGE, m->size - PAGE, 7);
		store_at(self, self->map + 2 * PAGE, 2 * PAGE, 7);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
		store_at(self, self->map + 9 * PAGE, 9 * PAGE, 7);
		stop_and_save(_metadata, m, &fd, &image);
		ASSERT_EQ(0, mock_image_parse(&parsed, &image))
			PROMISE("the stream follows its format: %s", parsed.why);
		expect_bytes(_metadata, m->want, parsed.memory, m->size, "the streamed image");
		mock_image_free(&parsed);
		close(fd);
		ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
		store_at(self, self->map, 0, m->size);
		expect_both(_metadata, self, "running again");
	}
}

/* ---- A device that stands still ---- */

/* The page that takes dropped stores is new: nothing of what it was before is seen. */
TEST_F(map, page_of_dropped_stores_is_empty)
{
	struct mock *m = &self->m;
	const __u64 size = 512 * PAGE;
	unsigned int i;
	__u8 *used;

	/* Pages for the kernel to take from, which are not empty. */
	used = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, used);
	memset(used, 0xa5, size);
	store_at(self, self->map, 0, m->size);
	ASSERT_EQ(0, mig_set_state(&m->dev, STOP, NULL));
	ASSERT_EQ(0, munmap(used, size));
	ASSERT_EQ(0, mig_touch(self->map + 100, true));
	for (i = 0; i < PAGE; i++) {
		if (self->map[i] && i != 100)
			break;
	}
	EXPECT_EQ(PAGE, i)
		PROMISE("a page to which a store was dropped shows nothing that is not the device's");
}

TEST_F_TIMEOUT(map, stores_to_a_stopped_device_are_dropped, 120)
{
	static const __u32 states[] = { STOP, STOP_COPY, RESUMING };
	struct mock *m = &self->m;
	struct mig_stream image = {};
	struct mock_image parsed;
	unsigned int i, j;
	__u64 dropped;
	__u8 *other;
	int fd;

	other = bar2_map(_metadata, m, PAGE, 9 * PAGE);
	for (i = 0; i < 2 * ARRAY_SIZE(states); i++) {
		const __u32 state = states[i / 2];
		const char *name = mig_state_name(state);

		go_home(_metadata, &m->dev);
		/* Pages that are mapped, writable, to be read only, or not at all. */
		store_at(self, self->map, 0, m->size);
		if (i % 2)
			madvise(self->map, m->size, MADV_DONTNEED);
		ASSERT_EQ(0, mig_set_state(&m->dev, state, &fd));
		if (state == RESUMING) {
			ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->want, m->size))
				STEP("read the state memory");
		}
		dropped = reg64(m, DROPPED);
		EXPECT_EQ(0, memcmp(m->want + 8 * PAGE, self->map + 8 * PAGE, 40 * PAGE))
			PROMISE("in %s loads see the memory", name);
		for (j = 0; j < 20; j++) {
			EXPECT_EQ(0, mig_touch(self->map + 3 * j * PAGE + j, true))
				PROMISE("in %s a store is dropped and no fault", name);
			EXPECT_EQ(dropped + j + 1, reg64(m, DROPPED))
				PROMISE("in %s a store to a page is counted", name);
		}
		EXPECT_EQ(0, mig_touch(other, true));
		EXPECT_EQ(0, mig_touch(other + 5 * PAGE, true));
		expect_memory(_metadata, m, m->want, name);
		EXPECT_EQ(0, memcmp(m->want + 61 * PAGE, self->map + 61 * PAGE, 30 * PAGE))
			PROMISE("in %s pages that were not stored to are shown", name);
		if (state == STOP_COPY) {
			image.len = 0;
			ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
			ASSERT_EQ(0, mig_touch(self->map + 99 * PAGE, true));
			ASSERT_EQ(0, mock_image_parse(&parsed, &image))
				PROMISE("the stream follows its format: %s", parsed.why);
			expect_bytes(_metadata, m->want, parsed.memory, m->size,
				     "what is streamed");
			mock_image_free(&parsed);
		}
		if (state == RESUMING) {
			ASSERT_EQ(0, mig_reset(&m->dev));
			memset(m->want, 0, m->size);
			EXPECT_EQ(0U, reg64(m, DROPPED))
				PROMISE("DROPPED is 0 after RESET");
		} else {
			ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
		}
		expect_both(_metadata, self, "running again");
		EXPECT_EQ(0, memcmp(m->want + PAGE, other, 9 * PAGE))
			PROMISE("each mapping shows the memory again");
		dropped = reg64(m, DROPPED);
		store_at(self, self->map, 0, m->size);
		store_at(self, other + 5 * PAGE, 6 * PAGE, PAGE);
		expect_both(_metadata, self, "stored by a running device's user");
		EXPECT_EQ(dropped, reg64(m, DROPPED))
			PROMISE("a running device drops nothing");
	}
}

/* After STOP the same pages are tracked as any others. */
TEST_F(map, tracking_works_after_a_stop)
{
	struct mock *m = &self->m;
	int fd;

	NEED_PRE_COPY(&m->dev);
	store_at(self, self->map, 0, m->size);
	ASSERT_EQ(0, mig_set_state(&m->dev, STOP, NULL));
	mig_touch(self->map, true);
	mig_touch(self->map + 8 * PAGE, true);
	ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
	fd = start_tracking(_metadata, self);
	store_at(self, self->map + 8 * PAGE, 8 * PAGE, 4);
	store_at(self, self->map + 10 * PAGE, 10 * PAGE, 4);
	expect_dirty_round(_metadata, self, fd, "stores after a stop");
	expect_both(_metadata, self, "after a stop");
}

/* A target loads under the eyes, and against the stores, of its user. */
TEST_F(map, target_is_mapped_while_it_loads)
{
	struct mock *m = &self->m, *dst = &self->dst;
	struct mig_stream image = {};
	struct mock_front front;
	__u8 *map = bar2_map(_metadata, dst, 0, dst->size);
	int fd = -1;
	size_t at;

	fill(_metadata, dst, 0, dst->size, 3);
	store_at(self, self->map, 0, m->size);
	read_front(_metadata, m, &front);
	stop_and_save(_metadata, m, &fd, &image);
	close(fd);
	fd = go(_metadata, &dst->dev, RESUMING);
	for (at = 0; at < image.len; at += 100000) {
		ASSERT_EQ(0, mig_touch(map + at % dst->size, at % 3 == 0));
		ASSERT_EQ(0, mig_load(fd, image.data + at,
				      image.len - at < 100000 ? image.len - at : 100000,
				      0, NULL));
	}
	ASSERT_EQ(0, mig_set_state(&dst->dev, STOP, NULL));
	expect_memory(_metadata, dst, m->want, "in STOP on the target");
	mig_touch(map, true);
	move_on(_metadata, &dst->dev, RUNNING);
	expect_memory(_metadata, dst, m->want, "running on the target");
	expect_bytes(_metadata, m->want, map, dst->size, "what is mapped on the target");
}

/* ---- The stream and the mapping are one's own ---- */

TEST_F_TIMEOUT(map, stream_is_read_into_the_mapping, 60)
{
	struct mock *m = &self->m;
	struct mig_stream image = {};
	struct mock_image parsed;
	__u64 at = 3 * PAGE + 100, i;
	ssize_t got;
	int fd;

	store_at(self, self->map, 0, m->size);
	if (m->dev.flags & VFIO_MIGRATION_PRE_COPY) {
		fd = start_tracking(_metadata, self);
		store_at(self, self->map + 50 * PAGE, 50 * PAGE, 4 * PAGE);
		for (i = 0; i < 20; i++) {
			got = read(fd, self->map + at, 5000);
			ASSERT_LT(0, got)
				PROMISE("read() of the stream into the device itself works in PRE_COPY: %s",
					strerror(errno));
			/* Which changes it. */
			ASSERT_EQ(got, mock_read(m, BAR2, at, m->want + at, got));
		}
		expect_both(_metadata, self, "after reads of the stream into itself");
		/* However long it takes, it is the page's own stream that is read. */
		stop_and_save(_metadata, m, &fd, &image);
		close(fd);
		ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
		expect_both(_metadata, self, "running again");
	}

	fd = go(_metadata, &m->dev, STOP_COPY);
	for (i = 0; i < 5; i++) {
		got = read(fd, self->map + at + i * 3 * PAGE, 9000);
		ASSERT_LT(0, got)
			PROMISE("read() of the stream into the device itself works in STOP_COPY: %s",
				strerror(errno));
	}
	expect_memory(_metadata, m, m->want, "in STOP_COPY");
	close(fd);
	ASSERT_EQ(0, mig_set_state(&m->dev, STOP, NULL));
	ASSERT_EQ(0, mig_set_state(&m->dev, STOP_COPY, &fd));
	image.len = 0;
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "what is streamed");
	close(fd);
	ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
	expect_both(_metadata, self, "running again");
}

/*
 * The image begins with pages that do not lie where its own bytes lie, so that
 * what it loads does not overwrite what it is loaded from.
 */
TEST_F_TIMEOUT(map, stream_is_written_from_the_mapping, 60)
{
	struct mock *m = &self->m, *dst = &self->dst;
	const __u64 part = dst->size / 4, at = dst->size / 2;
	__u8 *map = bar2_map(_metadata, dst, 0, dst->size);
	struct mig_stream image = {};
	struct mock_front front;
	int fd = -1;

	store_at(self, self->map, 0, m->size);
	read_front(_metadata, m, &front);
	stop_and_save(_metadata, m, &fd, &image);
	close(fd);

	fd = go(_metadata, &dst->dev, RESUMING);
	/* Stores in RESUMING are dropped, but by this mapping they can be seen. */
	memcpy(map + at, image.data, PAGE);
	ASSERT_LT(0, write(fd, image.data, 48));
	close(fd);

	/* What was there before, if it still is there. */
	ASSERT_EQ(0, mig_reset(&dst->dev));
	memcpy(map + at, image.data, part);
	ASSERT_EQ(0, mig_set_state(&dst->dev, RESUMING, &fd));
	if (memcmp(map + at, image.data, part)) {
		TH_LOG("RESUMING begins with an empty memory");
		EXPECT_NE(0, write(fd, map + at, part))
			PROMISE("write() of the stream from the device itself comes to an end");
		return;
	}
	ASSERT_EQ(0, mig_load(fd, map + at, part, 0, NULL))
		PROMISE("write() of the stream from the device itself works");
	ASSERT_EQ(0, mig_load(fd, image.data + part, image.len - part, 0, NULL));
	ASSERT_EQ(0, mig_set_state(&dst->dev, STOP, NULL));
	expect_memory(_metadata, dst, m->want, "in STOP on the target");
	move_on(_metadata, &dst->dev, RUNNING);
	expect_bytes(_metadata, m->want, map, dst->size, "what is mapped on the target");
}

/* read() and write() of the device itself, with a mapping of it as the buffer. */
TEST_F(map, region_is_read_and_written_by_way_of_the_mapping)
{
	static const __u32 states[] = { RUNNING, PRE_COPY, STOP, STOP_COPY, RESUMING };
	struct mock *m = &self->m;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		go_home(_metadata, &m->dev);
		store_at(self, self->map, 0, m->size);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		EXPECT_EQ(5000, mock_read(m, BAR2, 10 * PAGE, self->map + 100, 5000))
			PROMISE("in %s a region is read into itself", mig_state_name(states[i]));
		EXPECT_EQ(5000, mock_write(m, BAR2, 20 * PAGE, self->map + 30 * PAGE, 5000))
			PROMISE("in %s a region is written from itself", mig_state_name(states[i]));
		EXPECT_EQ(64, mock_read(m, BAR0, 0, self->map + 5 * PAGE, 64))
			PROMISE("in %s registers are read into the mapping",
				mig_state_name(states[i]));
		if (states[i] == RUNNING || states[i] == PRE_COPY) {
			memcpy(m->want + 100, m->want + 10 * PAGE, 5000);
			memcpy(m->want + 20 * PAGE, m->want + 30 * PAGE, 5000);
			ASSERT_EQ(64, mock_read(m, BAR0, 0, m->want + 5 * PAGE, 64));
			/* LEN and the like are no different now; SAVE_DELAY neither. */
			expect_both(_metadata, self, mig_state_name(states[i]));
		} else if (states[i] != RESUMING) {
			expect_memory(_metadata, m, m->want, mig_state_name(states[i]));
		}
	}
}

/* ---- The kernel as the one who stores ---- */

TEST_F(map, stores_of_the_kernel_are_tracked)
{
	struct mock *m = &self->m;
	int fd, mem, pipes[2];
	struct iovec iov;
	const size_t size = 2 * PAGE;
	__u8 *data = malloc(size);
	ssize_t ret;

	ASSERT_NE(NULL, data);
	NEED_PRE_COPY(&m->dev);
	ASSERT_EQ(0, pipe(pipes));
	mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, mem);
	store_at(self, self->map, 0, m->size);
	fd = start_tracking(_metadata, self);
	vfio_mock_pattern(data, 17, 0, size);

	/* As the buffer of a read(). */
	ASSERT_EQ((ssize_t)size, write(pipes[1], data, size));
	ASSERT_EQ((ssize_t)size, read(pipes[0], self->map + 3 * PAGE + 9, size));
	memcpy(m->want + 3 * PAGE + 9, data, size);
	mark(self->dirty, 3 * PAGE + 9, size);
	expect_dirty_round(_metadata, self, fd, "read() into the mapping");

	/* As a debugger does. */
	ret = pwrite(mem, data, 100, (off_t)(uintptr_t)self->map + 30 * PAGE - 50);
	ASSERT_EQ(100, ret)
		PROMISE("a debugger can store: %s", strerror(errno));
	memcpy(m->want + 30 * PAGE - 50, data, 100);
	mark(self->dirty, 30 * PAGE - 50, 100);
	expect_dirty_round(_metadata, self, fd, "a write to /proc/self/mem");

	iov = (struct iovec){ .iov_base = self->map + 40 * PAGE, .iov_len = 100 };
	ret = process_vm_writev(getpid(), &(struct iovec){ .iov_base = data, .iov_len = 100 }, 1,
				&iov, 1, 0);
	if (ret == 100) {
		memcpy(m->want + 40 * PAGE, data, 100);
		mark(self->dirty, 40 * PAGE, 100);
	} else {
		ASSERT_NE(EFAULT, errno);
	}
	expect_dirty_round(_metadata, self, fd, "process_vm_writev()");

	/* Pages that are lent to a pipe are only read. */
	iov = (struct iovec){ .iov_base = self->map + 50 * PAGE, .iov_len = 2 * PAGE };
	ret = vmsplice(pipes[1], &iov, 1, 0);
	if (ret > 0) {
		ASSERT_EQ(ret, read(pipes[0], data, ret));
		EXPECT_EQ(0, memcmp(data, m->want + 50 * PAGE, ret));
	}
	expect_dirty_round(_metadata, self, fd, "vmsplice()");
	expect_both(_metadata, self, "after stores of the kernel");
	free(data);
}

/*
 * Nobody would notice what a device that had such a buffer for long stored to it,
 * so the kernel does not let anybody have one.
 */
TEST_F(map, buffers_for_long_are_refused)
{
	struct io_uring_params params = {};
	struct iovec iov = { .iov_base = self->map, .iov_len = 4 * PAGE };
	int ring, ret;

	ring = syscall(SYS_io_uring_setup, 4, &params);
	if (ring < 0)
		SKIP(return, "no io_uring: %s", strerror(errno));
	store_at(self, self->map, 0, 4 * PAGE);
	ret = syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1);
	EXPECT_EQ(-1, ret)
		PROMISE("BAR2 cannot be a registered buffer");
	EXPECT_EQ(EFAULT, errno);
	close(ring);
	expect_both(_metadata, self, "after an attempt to pin it");
}

/* A thread that reads a file into two buffers, without the page cache. */
struct direct_read {
	pthread_t thread;
	int fd;
	struct iovec iov[2];
	ssize_t ret;
	__u8 *file;		/* what it reads: two pages */
};

static void *direct_read_main(void *arg)
{
	struct direct_read *r = arg;

	r->ret = preadv(r->fd, r->iov, 2, 0);
	if (r->ret < 0)
		r->ret = -errno;
	return NULL;
}

/*
 * A read() without page cache has the first buffer in hand, page 7 of BAR2, and
 * waits for the second, which is not there yet: it will store to the first without
 * asking.
 */
static void take_page_in_hand(struct __test_metadata *_metadata, map_data *self,
			      struct direct_read *direct, struct mig_stall *stall)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	/* Now, as the inode is locked while the other read() waits. */
	direct->file = malloc(2 * PAGE);
	ASSERT_NE(NULL, direct->file);
	ASSERT_EQ((ssize_t)(2 * PAGE), read(fd, direct->file, 2 * PAGE));
	close(fd);
	direct->iov[0] = (struct iovec){ .iov_base = self->map + 7 * PAGE, .iov_len = PAGE };
	direct->iov[1] = (struct iovec){ .iov_base = stall->page, .iov_len = PAGE };
	ASSERT_EQ(0, pthread_create(&direct->thread, NULL, direct_read_main, direct));
	ASSERT_EQ(0, mig_stall_wait(stall))
		STEP("make a read() wait that has a page of BAR2 in hand");
}

/* Ends what take_page_in_hand() began, and notes in @page what it did to the page. */
static void let_page_go(struct __test_metadata *_metadata, struct direct_read *direct,
			struct mig_stall *stall, __u8 *page)
{
	ASSERT_EQ(0, mig_stall_end(stall, direct->file));
	ASSERT_TRUE(joined(direct->thread));
	ASSERT_EQ((ssize_t)(2 * PAGE), direct->ret)
		STEP("read a file past the page cache: %s", strerror(-direct->ret));
	if (page)
		memcpy(page, direct->file, PAGE);
	mig_stall_free(stall);
	free(direct->file);
	close(direct->fd);
}

/* Opens what take_page_in_hand() reads past the page cache, and what stalls it. */
#define DIRECT_OR_SKIP(direct, stall) do { \
	(direct)->fd = open("/proc/self/exe", O_RDONLY | O_DIRECT | O_CLOEXEC); \
	if ((direct)->fd < 0) \
		SKIP(return, "no O_DIRECT where this program is: %s", strerror(errno)); \
	if (mig_stall_start(stall)) \
		SKIP(return, "no userfaultfd"); \
} while (0)

TEST_F_TIMEOUT(map, page_in_the_hand_of_the_kernel_is_streamed_again, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	struct mig_stall stall;
	struct mock_image parsed;
	__u64 size, quiet;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	fd = go(_metadata, &m->dev, PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &quiet));
	take_page_in_hand(_metadata, self, &direct, &stall);

	/* The page counts as written, and is streamed as it is. */
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(24 + PAGE + quiet, info.dirty_bytes)
		PROMISE("who gets a page to write to it makes it dirty");
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(24 + PAGE + quiet, size)
		PROMISE("MIG_DATA_SIZE counts a page that will be streamed again");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes + info.dirty_bytes)
		PROMISE("a page that is held back does not keep pre-copy from its end");
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));

	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	expect_both(_metadata, self, "after the read()");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.dirty_bytes)
		TH_LOG("  the read() was noticed: this test proves nothing");

	stop_and_save(_metadata, m, &fd, &image);
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "what is streamed");
	mock_image_free(&parsed);
}

/* That is nothing to a session that begins when the page is not in use any more. */
TEST_F_TIMEOUT(map, page_in_the_hand_of_the_kernel_is_forgotten, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	__u64 whole, quiet, size;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	fd = go(_metadata, &m->dev, PRE_COPY);
	ASSERT_EQ(0, mig_data_size(&m->dev, &whole));
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &quiet));
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_LT(quiet, size);
	let_page_go(_metadata, &direct, &stall, NULL);
	move_on(_metadata, &m->dev, RUNNING);
	close(fd);

	fd = go(_metadata, &m->dev, PRE_COPY);
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(whole, size)
		PROMISE("a new session streams each page once");
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(quiet, size)
		PROMISE("a page that a read() had in hand for the last session is no other");
	close(fd);
	mig_stream_free(&image);
}

/* What the kernel has in hand, it has whether or not the memory is still mapped. */
TEST_F_TIMEOUT(map, pinned_page_is_streamed_again_when_nothing_is_mapped, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	struct mock_image parsed;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, munmap(self->map, m->size));
	fd = go(_metadata, &m->dev, PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	expect_memory(_metadata, m, m->want, "after the read()");
	stop_and_save(_metadata, m, &fd, &image);
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "what is streamed");
	mock_image_free(&parsed);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_memory(_metadata, &self->dst, m->want, "on the target");
	close(fd);
	mig_stream_free(&image);
}

/* The state that the device stays in if it cannot stop on its way from @state. */
static __u32 state_before_stop(const struct mock *m, __u32 state)
{
	if (!(m->dev.flags & VFIO_MIGRATION_P2P))
		return state;
	return state == PRE_COPY ? PRE_COPY_P2P : RUNNING_P2P;
}

static void expect_pin_refused(struct __test_metadata *_metadata, map_data *self,
			       __u32 from, __u32 to)
{
	struct mock *m = &self->m;
	__u32 state;

	EXPECT_EQ(-EBUSY, mig_set_state(&m->dev, to, NULL))
		PROMISE("the device does not stop while the kernel may write to it");
	ASSERT_EQ(0, mig_get_state(&m->dev, &state));
	EXPECT_EQ(state_before_stop(m, from), state);
	ASSERT_EQ(0, mig_set_state(&m->dev, from, NULL))
		STEP("go on in %s", mig_state_name(from));
}

TEST_F_TIMEOUT(map, device_stops_when_no_page_is_pinned, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	struct mock_image parsed;
	bool pre_copy = m->dev.flags & VFIO_MIGRATION_PRE_COPY;
	int fd = -1;

	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	if (pre_copy) {
		fd = go(_metadata, &m->dev, PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	}
	take_page_in_hand(_metadata, self, &direct, &stall);
	if (pre_copy) {
		expect_pin_refused(_metadata, self, PRE_COPY, STOP_COPY);
		/* The session goes on. */
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
		expect_pin_refused(_metadata, self, PRE_COPY, STOP_COPY);
		ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
		close(fd);
	}
	expect_pin_refused(_metadata, self, RUNNING, STOP);
	expect_pin_refused(_metadata, self, RUNNING, STOP_COPY);
	expect_pin_refused(_metadata, self, RUNNING, RESUMING);
	store_at(self, self->map, 0, 5 * PAGE);
	EXPECT_EQ(0U, reg64(m, DROPPED))
		PROMISE("a device that does not stop drops no store");
	expect_both(_metadata, self, "after the device did not stop");

	image.len = 0;
	if (pre_copy) {
		fd = go(_metadata, &m->dev, PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	}
	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	stop_and_save(_metadata, m, &fd, &image);
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "what is streamed");
	mock_image_free(&parsed);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_memory(_metadata, &self->dst, m->want, "on the target");
	close(fd);
	mig_stream_free(&image);
}

/* Nor does it matter to a reset, and to the next user. */
TEST_F_TIMEOUT(map, pinned_page_holds_up_no_reset_and_no_close, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stall stall;

	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, mig_reset(&m->dev))
		PROMISE("a reset needs no page unpinned");
	expect_fresh(_metadata, m, "after RESET");
	ASSERT_EQ(0, munmap(self->map, m->size));
	mig_close_device(&m->dev);
	ASSERT_EQ(0, mig_reopen_device(&m->dev))
		STEP("open the device again: %s", m->dev.why);
	expect_fresh(_metadata, m, "when it is opened again");
	let_page_go(_metadata, &direct, &stall, NULL);
	expect_fresh(_metadata, m, "after the read() of the last user");
}

/* ---- Storing while the device migrates ---- */

#define WRITERS	4

struct writer {
	pthread_t thread;
	__u8 *map;
	__u64 pages;
	unsigned int n;
	atomic_bool *stop;
	atomic_ullong begun;	/* counts stores */
	atomic_ullong done;
};

/* The word of this writer in the page that its store number @i goes to. */
static __u64 word_of(const struct writer *w, __u64 i)
{
	return (i * 37 % w->pages) * PAGE + w->n * 8;
}

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	__u64 i;

	for (i = 1; !atomic_load(w->stop); i++) {
		atomic_store(&w->begun, i);
		__atomic_store_n((__u64 *)(w->map + word_of(w, i)), i, __ATOMIC_RELAXED);
		atomic_store(&w->done, i);
	}
	return NULL;
}

/* Every store before the stop is there, and none from after it. */
static void expect_stores(struct __test_metadata *_metadata, const struct writer *w,
			  const __u8 *memory, __u64 before, __u64 after, const char *where)
{
	__u64 page, last, value, i;

	for (page = 0; page < w->pages; page++) {
		last = 0;
		for (i = before > w->pages ? before - w->pages + 1 : 1; i <= before; i++)
			if (i * 37 % w->pages == page)
				last = i;
		memcpy(&value, memory + page * PAGE + w->n * 8, 8);
		EXPECT_LE(last, value)
			PROMISE("%s: store %llu of writer %u to page %llu was before the stop",
				where, last, w->n, page);
		EXPECT_GE(after, value)
			PROMISE("%s: store %llu of writer %u to page %llu was after the stop",
				where, value, w->n, page);
	}
}

TEST_F_TIMEOUT(map, migration_under_stores, 300)
{
	unsigned int count = mig_times(3), i, n;
	struct mock *m = &self->m, *dst = &self->dst;
	__u64 before[WRITERS], after[WRITERS];
	struct writer writers[WRITERS] = {};
	struct mig_stream image = {};
	struct mock_image parsed;
	atomic_bool stop = false;
	int fd, ret, rounds;

	for (n = 0; n < WRITERS; n++) {
		writers[n].map = n % 2 ? self->map : bar2_map(_metadata, m, 0, m->size);
		writers[n].pages = m->size / PAGE;
		writers[n].n = n;
		writers[n].stop = &stop;
		ASSERT_EQ(0, pthread_create(&writers[n].thread, NULL, writer_main, &writers[n]));
	}
	for (i = 0; i < count; i++) {
		image.len = 0;
		fd = -1;
		if (m->dev.flags & VFIO_MIGRATION_PRE_COPY) {
			ASSERT_EQ(0, mig_set_state(&m->dev, PRE_COPY, &fd));
			/* They never rest: some of it is enough. */
			for (rounds = 0; rounds < 300; rounds++) {
				ret = mig_read(fd, &image, 1 << 14);
				ASSERT_TRUE(ret > 0 || ret == -ENOMSG);
			}
			ASSERT_EQ(0, mig_set_state(&m->dev, PRE_COPY, NULL));
		}
		for (n = 0; n < WRITERS; n++)
			before[n] = atomic_load(&writers[n].done);
		ASSERT_EQ(0, mig_set_state(&m->dev, STOP_COPY, fd < 0 ? &fd : NULL));
		for (n = 0; n < WRITERS; n++)
			after[n] = atomic_load(&writers[n].begun);
		ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->want, m->size));
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
		expect_memory(_metadata, m, m->want, "in STOP_COPY, under stores");
		ASSERT_EQ(0, mock_image_parse(&parsed, &image))
			PROMISE("the stream follows its format: %s", parsed.why);
		expect_bytes(_metadata, m->want, parsed.memory, m->size, "what is streamed");
		mock_image_free(&parsed);
		close(fd);
		load_and_run(_metadata, &dst->dev, &image, 0);
		expect_memory(_metadata, dst, m->want, "on the target");
		for (n = 0; n < WRITERS; n++)
			expect_stores(_metadata, &writers[n], m->want, before[n], after[n],
				      "in the image");
		ASSERT_EQ(0, mig_reset(&dst->dev));
		ASSERT_EQ(0, mig_set_state(&m->dev, RUNNING, NULL));
		/* Until each of them has stored to each page again. */
		for (n = 0; n < WRITERS; n++) {
			after[n] = atomic_load(&writers[n].done) + 2 * writers[n].pages;
			WAIT_FOR(atomic_load(&writers[n].done) >= after[n],
				 "stores work when the device runs again");
		}
	}
	atomic_store(&stop, true);
	for (n = 0; n < WRITERS; n++) {
		ASSERT_TRUE(joined(writers[n].thread));
		after[n] = atomic_load(&writers[n].done);
		ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->seen, m->size));
		expect_stores(_metadata, &writers[n], m->seen, after[n], after[n],
			      "in the end");
	}
	memcpy(m->want, m->seen, m->size);
	expect_both(_metadata, self, "in the end");
}

MIG_HARNESS_MAIN
