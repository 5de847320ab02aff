// SPDX-License-Identifier: GPL-2.0
/*
 * Mappings of BAR2 of the mock migratable device vfio_mock: stores reach the device,
 * are tracked page by page, and dropped while it is stopped. A fault does not wait
 * for a migration, even if the stream is read into the mapping itself.
 *
 *	./vfio_mock_mmap_test --medium "SOURCE TARGET"
 *
 * with the sysfs paths of two mediated devices. run_mock.sh creates them and runs
 * this. --rounds N multiplies the number of random stores by N.
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
	__u8 *dirty;		/* a byte for each page: must the next round stream it? */
	__u64 random;
};

MIG_EACH_BACKEND(map);

FIXTURE_SETUP(map)
{
	MOCK_OPEN_OR_SKIP(&self->m, "medium", 0, variant->backend);
	MOCK_OPEN_OR_SKIP(&self->dst, "medium", 1, variant->backend);
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

/* Stores to the memory of the device at @at, by the mapping @map of this address. */
static void store_at(map_data *self, __u8 *map, __u64 at, __u64 len)
{
	vfio_mock_pattern(self->m.want + at, ++self->random, at, len);
	memcpy(map, self->m.want + at, len);
	mark(self->dirty, at, len);
}

/* Reads to the temporary end; no page is dirty then. */
static int start_tracking(struct __test_metadata *_metadata, map_data *self)
{
	struct mig_stream first = {};
	int fd = go(_metadata, &self->m.dev, MIG_PRE_COPY);

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

/* Checks that the mapping and read() return the expected content. */
static void expect_both(struct __test_metadata *_metadata, map_data *self,
			const char *when)
{
	char what[128];

	expect_memory(_metadata, &self->m, self->m.want, when);
	snprintf(what, sizeof(what), "%s: the mapping", when);
	expect_bytes(_metadata, self->m.want, self->map, self->m.size, what);
}

/* ---- Mappable regions ---- */

TEST_F(map, region_info_shows_mappable_regions)
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
		PROMISE("without memory space a load from a mapped page is SIGBUS");
	EXPECT_EQ(SIGBUS, mig_touch(self->map + PAGE, true))
		PROMISE("without memory space a store is SIGBUS");
	EXPECT_EQ(SIGBUS, mig_touch(self->map + 2 * PAGE, false))
		PROMISE("without memory space a page without a PTE is SIGBUS");
	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(before, self->map[PAGE])
		PROMISE("a store without memory space does not reach the device");
	EXPECT_EQ(0, mig_touch(self->map + 2 * PAGE, true));

	put(_metadata, m, CONFIG, 4, 4, 2);
	ASSERT_EQ(0, mig_reset(&m->dev));
	EXPECT_EQ(0, mig_touch(self->map, true))
		PROMISE("a reset enables memory space");
}

/* The errno of mmap(), or 0; a new mapping is removed again. */
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
		{ "a private mapping of all of it", bar2, size, MAP_PRIVATE },
		{ "a page more than the BAR", bar2, size + PAGE, MAP_SHARED },
		{ "a byte more than the BAR", bar2, size + 1, MAP_SHARED },
		{ "a page after the end", bar2 + size, PAGE, MAP_SHARED },
		{ "a range across the end", bar2 + size - PAGE, 2 * PAGE, MAP_SHARED },
		{ "a range across the beginning", bar2 - PAGE, 2 * PAGE, MAP_SHARED },
		{ "a page far after the end", bar2 + (1ULL << 38), PAGE, MAP_SHARED },
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

TEST_F(map, loads_and_stores_access_device_memory)
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
		expect_bytes(_metadata, m->want + at, self->map + at, len, "the mapping");
	}
	expect_both(_metadata, self, "after accesses of all kinds");
	command(_metadata, m, VFIO_MOCK_CMD_CHECKSUM, 0, m->size, 0);
	EXPECT_EQ(vfio_mock_checksum(m->want, m->size), reg64(m, RESULT))
		PROMISE("the device reads the stored data");
}

TEST_F(map, all_mappings_share_one_memory)
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
		/* Sometimes one of them is replaced. */
		if (n % 16 == 0) {
			i = pick(self, ARRAY_SIZE(maps));
			ASSERT_EQ(0, munmap(maps[i], len[i]));
			maps[i] = bar2_map(_metadata, m, at[i], len[i]);
		}
	}
	expect_both(_metadata, self, "after stores through many mappings");
}

/* ---- Changes of a mapping ---- */

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
	/* The child stores by the inherited mapping and by its own. */
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
		/* Half is unmapped here, the rest by the exit. */
		_exit(munmap(self->map, m->size / 2) ? 3 : 0);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status)
		PROMISE("a child inherits the mapping and can create its own");
	expect_both(_metadata, self, "after stores of a child");
	if (fd >= 0)
		expect_dirty_round(_metadata, self, fd, "stores of two processes");
	store_at(self, self->map + 11 * PAGE, 11 * PAGE, 8);
	expect_both(_metadata, self, "after the exit of the child");
	if (fd >= 0)
		expect_dirty_round(_metadata, self, fd, "a store after the exit of the child");
}

TEST_F(map, mapping_can_be_split_and_moved)
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

	/* To another address, with existing and with new PTEs. */
	store_at(self, map + 30 * PAGE, 30 * PAGE, 5);
	moved = mremap(map + 30 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		       map + 5 * PAGE);
	ASSERT_EQ(map + 5 * PAGE, moved);
	EXPECT_EQ(0, memcmp(m->want + 30 * PAGE, moved, 2 * PAGE))
		PROMISE("a mapping shows the same memory after mremap()");
	store_at(self, moved + PAGE + 7, 31 * PAGE + 7, 5);
	EXPECT_EQ(SIGSEGV, mig_touch(map + 30 * PAGE, true));

	/* It can shrink, but not grow. */
	moved = mremap(map + 40 * PAGE, 4 * PAGE, 2 * PAGE, 0);
	EXPECT_EQ(map + 40 * PAGE, moved);
	EXPECT_EQ(SIGSEGV, mig_touch(map + 42 * PAGE, true));
	EXPECT_EQ(MAP_FAILED, mremap(map + 41 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE))
		PROMISE("a mapping of a device cannot grow");
	store_at(self, map + 41 * PAGE, 41 * PAGE, 1);
	expect_memory(_metadata, m, m->want, "after stores through the rest of the mapping");
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
			PROMISE("a read-only mapping cannot be written");
		EXPECT_EQ(0, mig_touch(map, false));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "a page protected after a write");
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_READ | PROT_WRITE));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "pages that are writable again");
		store_at(self, map + PAGE + 5, PAGE + 5, 100);
		store_at(self, map + 2 * PAGE, 2 * PAGE, 1);
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_NONE));
		EXPECT_EQ(SIGSEGV, mig_touch(map, false));
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "stores after mprotect()");
		ASSERT_EQ(0, mprotect(map, 3 * PAGE, PROT_READ | PROT_WRITE));

		/* A mapping that is created read-only and becomes writable. */
		ro = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, m->dev.fd,
			  m->offset[BAR2] + 9 * PAGE);
		ASSERT_NE(MAP_FAILED, ro);
		EXPECT_EQ(0, memcmp(ro, m->want + 9 * PAGE, PAGE));
		EXPECT_EQ(SIGSEGV, mig_touch(ro, true));
		ASSERT_EQ(0, mprotect(ro, PAGE, PROT_READ | PROT_WRITE));
		store_at(self, ro, 9 * PAGE, 10);
		expect_both(_metadata, self, "after changes of the protection");
		if (i && fd >= 0)
			expect_dirty_round(_metadata, self, fd, "a store to a mapping created read-only");
		ASSERT_EQ(0, munmap(ro, PAGE));
		if (m->dev.flags & VFIO_MIGRATION_PRE_COPY && !i)
			fd = start_tracking(_metadata, self);
	}
}

TEST_F(map, madvise_and_mlock_do_no_harm)
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
	expect_both(_metadata, self, "after advice without meaning for a device");
	if (fd >= 0) {
		expect_dirty_round(_metadata, self, fd, "advice");
		store_at(self, map + 5 * PAGE, 5 * PAGE, 3 * PAGE);
		munlock(map, m->size);
		expect_dirty_round(_metadata, self, fd, "stores to a locked mapping");
		/* MADV_POPULATE_WRITE is a write fault, which counts as a write. */
		madvise(map + 9 * PAGE, PAGE, MADV_POPULATE_READ);
		expect_dirty_round(_metadata, self, fd, "MADV_POPULATE_READ");
		if (!madvise(map + 9 * PAGE, PAGE, MADV_POPULATE_WRITE))
			mark(self->dirty, 9 * PAGE, PAGE);
		expect_dirty_round(_metadata, self, fd, "MADV_POPULATE_WRITE");
	}
}

/* A mapping keeps the file open, and the file keeps the device open. */
TEST_F(map, mapping_keeps_device_open)
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
		STEP("reopen the device: %s", m->dev.why);
	expect_fresh(_metadata, m, "after the end of the last mapping");
	self->map = bar2_map(_metadata, m, 0, m->size);
	memset(m->want, 0, m->size);
	store_at(self, self->map + 3 * PAGE, 3 * PAGE, PAGE);
	expect_both(_metadata, self, "in the next mapping");
}

TEST_F(map, mapping_shows_reset)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_RUNNING_P2P, MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP,
		MIG_STOP_COPY, MIG_RESUMING,
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
		expect_both(_metadata, self, "after stores that follow RESET");
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
	/* Pages that are writable before tracking starts. */
	store_at(self, maps[0], 0, m->size);
	memcpy(maps[1] + m->size / 2, m->want + m->size / 2, m->size / 2);
	fd = start_tracking(_metadata, self);
	expect_dirty_round(_metadata, self, fd, "nothing");
	for (i = 0; i < count; i++) {
		move_on(_metadata, &m->dev, i % 2 || !(m->dev.flags & VFIO_MIGRATION_P2P) ?
			MIG_PRE_COPY : MIG_PRE_COPY_P2P);
		for (j = pick(self, 12); j; j--) {
			len = 1 + pick(self, pick(self, 3) ? 8 : 5 * PAGE);
			at = pick(self, m->size - len + 1);
			store_at(self, maps[pick(self, 3)] + at, at, len);
		}
		/* All pages, every second, or every third one. */
		if (i % 8 == 0) {
			for (j = 0; j < pages; j += 1 + i % 3)
				store_at(self, maps[j % 3] + j * PAGE, j * PAGE, 1);
		}
		/* Loads through the other mappings dirty no page. */
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
			PROMISE("each written page is one dirty page");
		EXPECT_EQ(0U, info.initial_bytes);
		/* More stores to it change nothing. */
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
	expect_dirty_round(_metadata, self, fd, "the store that woke the poller");
}

/* Stores while tracking starts and stops. */
TEST_F_TIMEOUT(map, stores_while_tracking_starts_and_stops, 60)
{
	struct mock *m = &self->m;
	struct mig_stream image = {};
	int fd, i;

	NEED_PRE_COPY(&m->dev);
	for (i = 0; i < 3; i++) {
		store_at(self, self->map, 0, m->size);
		fd = go(_metadata, &m->dev, MIG_PRE_COPY);
		image.len = 0;
		store_at(self, self->map + 5, 5, 3 * PAGE);
		ASSERT_LT(0, mig_read(fd, &image, m->size / 2));
		/* After the position of the stream, and before it. */
		store_at(self, self->map + m->size - PAGE, m->size - PAGE, 7);
		store_at(self, self->map + 2 * PAGE, 2 * PAGE, 7);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
		store_at(self, self->map + 9 * PAGE, 9 * PAGE, 7);
		stop_and_save(_metadata, m, &fd, &image);
		expect_image(_metadata, m, &image);
		close(fd);
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		store_at(self, self->map, 0, m->size);
		expect_both(_metadata, self, "running again");
	}
}

/* ---- Stopped devices ---- */

/* The page that receives dropped stores must not show its earlier content. */
TEST_F(map, page_of_dropped_stores_is_empty)
{
	struct mock *m = &self->m;
	const __u64 size = 512 * PAGE;
	unsigned int i;
	__u8 *used;

	/* Pages that the kernel may reuse, with other content. */
	used = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, used);
	memset(used, 0xa5, size);
	store_at(self, self->map, 0, m->size);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, munmap(used, size));
	ASSERT_EQ(0, mig_touch(self->map + 100, true));
	for (i = 0; i < PAGE; i++) {
		if (self->map[i] && i != 100)
			break;
	}
	EXPECT_EQ(PAGE, i)
		PROMISE("a page with a dropped store shows only content of the device");
}

TEST_F_TIMEOUT(map, stores_to_a_stopped_device_are_dropped, 120)
{
	static const __u32 states[] = { MIG_STOP, MIG_STOP_COPY, MIG_RESUMING };
	struct mock *m = &self->m;
	struct mig_stream image = {};
	unsigned int i, j;
	__u64 dropped;
	__u8 *other;
	int fd;

	other = bar2_map(_metadata, m, PAGE, 9 * PAGE);
	for (i = 0; i < 2 * ARRAY_SIZE(states); i++) {
		const __u32 state = states[i / 2];
		const char *name = mig_state_name(state);

		go_home(_metadata, &m->dev);
		/* Pages that are mapped writable, read-only, or not at all. */
		store_at(self, self->map, 0, m->size);
		if (i % 2)
			madvise(self->map, m->size, MADV_DONTNEED);
		ASSERT_EQ(0, mig_set_state(&m->dev, state, &fd));
		if (state == MIG_RESUMING) {
			ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->want, m->size))
				STEP("read the state memory");
		}
		dropped = reg64(m, DROPPED);
		EXPECT_EQ(0, memcmp(m->want + 8 * PAGE, self->map + 8 * PAGE, 40 * PAGE))
			PROMISE("in %s loads return the memory", name);
		for (j = 0; j < 20; j++) {
			EXPECT_EQ(0, mig_touch(self->map + 3 * j * PAGE + j, true))
				PROMISE("in %s a store is dropped without a signal", name);
			EXPECT_EQ(dropped + j + 1, reg64(m, DROPPED))
				PROMISE("in %s a store to a page is counted", name);
		}
		EXPECT_EQ(0, mig_touch(other, true));
		EXPECT_EQ(0, mig_touch(other + 5 * PAGE, true));
		expect_memory(_metadata, m, m->want, name);
		EXPECT_EQ(0, memcmp(m->want + 61 * PAGE, self->map + 61 * PAGE, 30 * PAGE))
			PROMISE("in %s other pages still show the memory", name);
		if (state == MIG_STOP_COPY) {
			image.len = 0;
			ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
			ASSERT_EQ(0, mig_touch(self->map + 99 * PAGE, true));
			expect_image(_metadata, m, &image);
		}
		if (state == MIG_RESUMING) {
			ASSERT_EQ(0, mig_reset(&m->dev));
			memset(m->want, 0, m->size);
			EXPECT_EQ(0U, reg64(m, DROPPED))
				PROMISE("DROPPED is 0 after RESET");
		} else {
			ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		}
		expect_both(_metadata, self, "running again");
		EXPECT_EQ(0, memcmp(m->want + PAGE, other, 9 * PAGE))
			PROMISE("each mapping shows the memory again");
		dropped = reg64(m, DROPPED);
		store_at(self, self->map, 0, m->size);
		store_at(self, other + 5 * PAGE, 6 * PAGE, PAGE);
		expect_both(_metadata, self, "after stores to the running device");
		EXPECT_EQ(dropped, reg64(m, DROPPED))
			PROMISE("a running device drops no store");
	}
}

/* After STOP pages with dropped stores are tracked like all others. */
TEST_F(map, tracking_works_after_a_stop)
{
	struct mock *m = &self->m;
	int fd;

	NEED_PRE_COPY(&m->dev);
	store_at(self, self->map, 0, m->size);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	mig_touch(self->map, true);
	mig_touch(self->map + 8 * PAGE, true);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
	fd = start_tracking(_metadata, self);
	store_at(self, self->map + 8 * PAGE, 8 * PAGE, 4);
	store_at(self, self->map + 10 * PAGE, 10 * PAGE, 4);
	expect_dirty_round(_metadata, self, fd, "stores after a stop");
	expect_both(_metadata, self, "after a stop");
}

/* A target loads while its memory is mapped and written. */
TEST_F(map, target_can_be_mapped_during_load)
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
	fd = go(_metadata, &dst->dev, MIG_RESUMING);
	for (at = 0; at < image.len; at += 100000) {
		ASSERT_EQ(0, mig_touch(map + at % dst->size, at % 3 == 0));
		ASSERT_EQ(0, mig_load(fd, image.data + at,
				      image.len - at < 100000 ? image.len - at : 100000,
				      0, NULL));
	}
	ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_STOP, NULL));
	expect_memory(_metadata, dst, m->want, "in STOP on the target");
	mig_touch(map, true);
	move_on(_metadata, &dst->dev, MIG_RUNNING);
	expect_memory(_metadata, dst, m->want, "running on the target");
	expect_bytes(_metadata, m->want, map, dst->size, "the mapping on the target");
}

/* ---- The mapping as the buffer of its own stream ---- */

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
			/* The read() has changed the memory. */
			ASSERT_EQ(got, mock_read(m, BAR2, at, m->want + at, got));
		}
		expect_both(_metadata, self, "after reads of the stream into itself");
		/* This stream contains the bytes of the stream read before. */
		stop_and_save(_metadata, m, &fd, &image);
		close(fd);
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		expect_both(_metadata, self, "running again");
	}

	fd = go(_metadata, &m->dev, MIG_STOP_COPY);
	for (i = 0; i < 5; i++) {
		got = read(fd, self->map + at + i * 3 * PAGE, 9000);
		ASSERT_LT(0, got)
			PROMISE("read() of the stream into the device itself works in STOP_COPY: %s",
				strerror(errno));
	}
	expect_memory(_metadata, m, m->want, "in STOP_COPY");
	close(fd);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP_COPY, &fd));
	image.len = 0;
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mock_image_parse(&parsed, &image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "the stream");
	close(fd);
	ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
	expect_both(_metadata, self, "running again");
}

/*
 * The image is at an offset other than that of the pages loaded from it, so that
 * loading does not overwrite the image.
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

	fd = go(_metadata, &dst->dev, MIG_RESUMING);
	/* Stores in RESUMING are dropped, but this mapping shows them. */
	memcpy(map + at, image.data, PAGE);
	ASSERT_LT(0, write(fd, image.data, 48));
	close(fd);

	/* Written before RESUMING, if that keeps the memory. */
	ASSERT_EQ(0, mig_reset(&dst->dev));
	memcpy(map + at, image.data, part);
	ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_RESUMING, &fd));
	if (memcmp(map + at, image.data, part)) {
		TH_LOG("RESUMING begins with an empty memory");
		EXPECT_NE(0, write(fd, map + at, part))
			PROMISE("write() of the stream from the device itself ends");
		return;
	}
	ASSERT_EQ(0, mig_load(fd, map + at, part, 0, NULL))
		PROMISE("write() of the stream from the device itself works");
	ASSERT_EQ(0, mig_load(fd, image.data + part, image.len - part, 0, NULL));
	ASSERT_EQ(0, mig_set_state(&dst->dev, MIG_STOP, NULL));
	expect_memory(_metadata, dst, m->want, "in STOP on the target");
	move_on(_metadata, &dst->dev, MIG_RUNNING);
	expect_bytes(_metadata, m->want, map, dst->size, "the mapping on the target");
}

/* read() and write() of the device itself, with a mapping of it as the buffer. */
TEST_F(map, mapping_as_buffer_of_region_access)
{
	static const __u32 states[] = {
		MIG_RUNNING, MIG_PRE_COPY, MIG_STOP, MIG_STOP_COPY, MIG_RESUMING,
	};
	struct mock *m = &self->m;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(m->dev.flags, states[i]))
			continue;
		go_home(_metadata, &m->dev);
		store_at(self, self->map, 0, m->size);
		ASSERT_EQ(0, mig_set_state(&m->dev, states[i], NULL));
		EXPECT_EQ(5000, mock_read(m, BAR2, 10 * PAGE, self->map + 100, 5000))
			PROMISE("in %s a region can be read into itself",
				mig_state_name(states[i]));
		EXPECT_EQ(5000, mock_write(m, BAR2, 20 * PAGE, self->map + 30 * PAGE, 5000))
			PROMISE("in %s a region can be written from itself",
				mig_state_name(states[i]));
		EXPECT_EQ(64, mock_read(m, BAR0, 0, self->map + 5 * PAGE, 64))
			PROMISE("in %s registers are read into the mapping",
				mig_state_name(states[i]));
		if (states[i] == MIG_RUNNING || states[i] == MIG_PRE_COPY) {
			memcpy(m->want + 100, m->want + 10 * PAGE, 5000);
			memcpy(m->want + 20 * PAGE, m->want + 30 * PAGE, 5000);
			ASSERT_EQ(64, mock_read(m, BAR0, 0, m->want + 5 * PAGE, 64));
			/* The registers have not changed since. */
			expect_both(_metadata, self, mig_state_name(states[i]));
		} else if (states[i] != MIG_RESUMING) {
			expect_memory(_metadata, m, m->want, mig_state_name(states[i]));
		}
	}
}

/* ---- Stores by the kernel ---- */

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

	/* Like a debugger. */
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

	/* Pages passed to a pipe are only read. */
	iov = (struct iovec){ .iov_base = self->map + 50 * PAGE, .iov_len = 2 * PAGE };
	ret = vmsplice(pipes[1], &iov, 1, 0);
	if (ret > 0) {
		ASSERT_EQ(ret, read(pipes[0], data, ret));
		EXPECT_EQ(0, memcmp(data, m->want + 50 * PAGE, ret));
	}
	expect_dirty_round(_metadata, self, fd, "vmsplice()");
	expect_both(_metadata, self, "after stores by the kernel");
	free(data);
}

/*
 * Stores by a device with a long-term pin would not be noticed, so the kernel refuses
 * such pins.
 */
TEST_F(map, long_term_pins_are_refused)
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
	expect_both(_metadata, self, "after an attempt of a long-term pin");
}

/* A thread that reads a file into two buffers with O_DIRECT. */
struct direct_read {
	pthread_t thread;
	int fd;
	struct iovec iov[2];
	ssize_t ret;
	__u8 *file;		/* two pages, the content of the file */
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
 * A read() with O_DIRECT has pinned the first buffer, page 7 of BAR2, and waits for
 * a page fault of the second one. It stores to the first buffer later, without a
 * fault.
 */
static void take_page_in_hand(struct __test_metadata *_metadata, map_data *self,
			      struct direct_read *direct, struct mig_stall *stall)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	/* Before the read(), which locks the inode. */
	direct->file = malloc(2 * PAGE);
	ASSERT_NE(NULL, direct->file);
	ASSERT_EQ((ssize_t)(2 * PAGE), read(fd, direct->file, 2 * PAGE));
	close(fd);
	direct->iov[0] = (struct iovec){ .iov_base = self->map + 7 * PAGE, .iov_len = PAGE };
	direct->iov[1] = (struct iovec){ .iov_base = stall->page, .iov_len = PAGE };
	ASSERT_EQ(0, pthread_create(&direct->thread, NULL, direct_read_main, direct));
	ASSERT_EQ(0, mig_stall_wait(stall))
		STEP("stall a read() that has pinned a page of BAR2");
}

/* Ends the read() of take_page_in_hand(), and applies its result to @page. */
static void let_page_go(struct __test_metadata *_metadata, struct direct_read *direct,
			struct mig_stall *stall, __u8 *page)
{
	ASSERT_EQ(0, mig_stall_end(stall, direct->file));
	ASSERT_TRUE(joined(direct->thread));
	ASSERT_EQ((ssize_t)(2 * PAGE), direct->ret)
		STEP("read a file with O_DIRECT: %s", strerror(-direct->ret));
	if (page)
		memcpy(page, direct->file, PAGE);
	mig_stall_free(stall);
	free(direct->file);
	close(direct->fd);
}

/* Opens the file for take_page_in_hand(), and prepares its stall. */
#define DIRECT_OR_SKIP(direct, stall) do { \
	(direct)->fd = open("/proc/self/exe", O_RDONLY | O_DIRECT | O_CLOEXEC); \
	if ((direct)->fd < 0) \
		SKIP(return, "no O_DIRECT in the directory of this program: %s", strerror(errno)); \
	if (mig_stall_start(stall)) \
		SKIP(return, "no userfaultfd"); \
} while (0)

TEST_F_TIMEOUT(map, pinned_page_is_streamed_again, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	struct mig_stall stall;
	__u64 size, quiet;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	fd = go(_metadata, &m->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &quiet));
	take_page_in_hand(_metadata, self, &direct, &stall);

	/* The pin counts as a write; the page is streamed with its current content. */
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(24 + PAGE + quiet, info.dirty_bytes)
		PROMISE("a pin for writing dirties a page");
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(24 + PAGE + quiet, size)
		PROMISE("MIG_DATA_SIZE counts a page that will be streamed again");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes + info.dirty_bytes)
		PROMISE("a pinned page does not prevent the end of pre-copy");
	EXPECT_EQ(0, mig_poll(fd, POLLIN, 0));

	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	expect_both(_metadata, self, "after the read()");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.dirty_bytes)
		TH_LOG("  the store of the read() was noticed: this is not tested");

	stop_and_save(_metadata, m, &fd, &image);
	expect_image(_metadata, m, &image);
}

/* A session that begins after the end of the pin does not treat the page specially. */
TEST_F_TIMEOUT(map, new_session_ignores_ended_pins, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	__u64 whole, quiet, size;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	fd = go(_metadata, &m->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_data_size(&m->dev, &whole));
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &quiet));
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_LT(quiet, size);
	let_page_go(_metadata, &direct, &stall, NULL);
	move_on(_metadata, &m->dev, MIG_RUNNING);
	close(fd);

	fd = go(_metadata, &m->dev, MIG_PRE_COPY);
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(whole, size)
		PROMISE("a new session streams each page once");
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	ASSERT_EQ(0, mig_data_size(&m->dev, &size));
	EXPECT_EQ(quiet, size)
		PROMISE("a page pinned in the last session is not streamed again");
	close(fd);
	mig_stream_free(&image);
}

/* A pin outlives the mapping. */
TEST_F_TIMEOUT(map, unmapped_pinned_page_is_streamed_again, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	int fd;

	NEED_PRE_COPY(&m->dev);
	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, munmap(self->map, m->size));
	fd = go(_metadata, &m->dev, MIG_PRE_COPY);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	expect_memory(_metadata, m, m->want, "after the read()");
	stop_and_save(_metadata, m, &fd, &image);
	expect_image(_metadata, m, &image);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_memory(_metadata, &self->dst, m->want, "on the target");
	close(fd);
	mig_stream_free(&image);
}

/* The state of the device after it failed to stop on the way from @state. */
static __u32 state_before_stop(const struct mock *m, __u32 state)
{
	if (!(m->dev.flags & VFIO_MIGRATION_P2P))
		return state;
	return state == MIG_PRE_COPY ? MIG_PRE_COPY_P2P : MIG_RUNNING_P2P;
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
		STEP("return to %s", mig_state_name(from));
}

TEST_F_TIMEOUT(map, device_stops_when_no_page_is_pinned, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stream image = {};
	struct mig_stall stall;
	bool pre_copy = m->dev.flags & VFIO_MIGRATION_PRE_COPY;
	int fd = -1;

	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	if (pre_copy) {
		fd = go(_metadata, &m->dev, MIG_PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	}
	take_page_in_hand(_metadata, self, &direct, &stall);
	if (pre_copy) {
		expect_pin_refused(_metadata, self, MIG_PRE_COPY, MIG_STOP_COPY);
		/* The session continues. */
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
		expect_pin_refused(_metadata, self, MIG_PRE_COPY, MIG_STOP_COPY);
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		close(fd);
	}
	expect_pin_refused(_metadata, self, MIG_RUNNING, MIG_STOP);
	expect_pin_refused(_metadata, self, MIG_RUNNING, MIG_STOP_COPY);
	expect_pin_refused(_metadata, self, MIG_RUNNING, MIG_RESUMING);
	store_at(self, self->map, 0, 5 * PAGE);
	EXPECT_EQ(0U, reg64(m, DROPPED))
		PROMISE("a device that does not stop drops no store");
	expect_both(_metadata, self, "after the device did not stop");

	image.len = 0;
	if (pre_copy) {
		fd = go(_metadata, &m->dev, MIG_PRE_COPY);
		ASSERT_EQ(-ENOMSG, mig_save(fd, &image, stream_limit(&m->dev)));
	}
	let_page_go(_metadata, &direct, &stall, m->want + 7 * PAGE);
	stop_and_save(_metadata, m, &fd, &image);
	expect_image(_metadata, m, &image);
	load_and_run(_metadata, &self->dst.dev, &image, 0);
	expect_memory(_metadata, &self->dst, m->want, "on the target");
	close(fd);
	mig_stream_free(&image);
}

/* A thread that writes to the scratch register until it is to end. */
struct scratcher {
	pthread_t thread;
	const struct mock *m;
	atomic_ulong count;
	atomic_bool end;
	bool lost;
};

static void *scratcher_main(void *arg)
{
	struct scratcher *s = arg;
	__u64 value, found;

	do {
		value = atomic_load(&s->count) + 1;
		if (mock_write(s->m, BAR0, VFIO_MOCK_REG_SCRATCH, &value, 8) != 8 ||
		    mock_read(s->m, BAR0, VFIO_MOCK_REG_SCRATCH, &found, 8) != 8 ||
		    found != value)
			s->lost = true;
		atomic_store(&s->count, value);
	} while (!atomic_load(&s->end));
	return NULL;
}

TEST_F_TIMEOUT(map, stop_that_fails_drops_no_write, 60)
{
	struct mock *m = &self->m;
	struct scratcher writer = { .m = m };
	struct direct_read direct = {};
	struct mig_stall stall;

	DIRECT_OR_SKIP(&direct, &stall);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, pthread_create(&writer.thread, NULL, scratcher_main, &writer));
	WAIT_FOR(atomic_load(&writer.count), "the thread has written");
	expect_pin_refused(_metadata, self, MIG_RUNNING, MIG_STOP);
	atomic_store(&writer.end, true);
	ASSERT_TRUE(joined(writer.thread));
	EXPECT_FALSE(writer.lost)
		PROMISE("a write during a state change that fails has an effect");
	EXPECT_EQ(0U, reg64(m, DROPPED))
		PROMISE("a device that does not stop drops no write");
	let_page_go(_metadata, &direct, &stall, NULL);
}

/* A device fails while a page is pinned, so that it cannot drop stores. */
TEST_F_TIMEOUT(map, failed_device_stays_blocked, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stall stall;
	__u32 state;

	DIRECT_OR_SKIP(&direct, &stall);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, mock_set(m, "faults", "arc *->STOP state=ERROR errno=ENODEV"));
	ASSERT_EQ(-ENODEV, mig_set_state(&m->dev, MIG_STOP, NULL));
	ASSERT_EQ(0, mig_get_state(&m->dev, &state));
	ASSERT_EQ(MIG_ERROR, state);
	EXPECT_EQ(SIGBUS, mig_touch(self->map + 3 * PAGE, true))
		PROMISE("in ERROR a store with an unknown effect is SIGBUS");
	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(SIGBUS, mig_touch(self->map + 3 * PAGE, true))
		PROMISE("the command register does not enable the mappings of a failed device");
	put(_metadata, m, CONFIG, 4, 4, 2);
	put(_metadata, m, CONFIG, 4, 6, 2);
	EXPECT_EQ(SIGBUS, mig_touch(self->map + 3 * PAGE, false))
		PROMISE("nor does it after memory space was off");
	ASSERT_EQ(0, mig_reset(&m->dev));
	EXPECT_EQ(0, mig_touch(self->map + 3 * PAGE, true))
		PROMISE("after a reset stores have an effect");
	let_page_go(_metadata, &direct, &stall, NULL);
}

/* A pin does not affect a reset or the next user. */
TEST_F_TIMEOUT(map, reset_and_close_ignore_pins, 60)
{
	struct mock *m = &self->m;
	struct direct_read direct = {};
	struct mig_stall stall;

	DIRECT_OR_SKIP(&direct, &stall);
	store_at(self, self->map, 0, m->size);
	take_page_in_hand(_metadata, self, &direct, &stall);
	ASSERT_EQ(0, mig_reset(&m->dev))
		PROMISE("a reset does not wait for pins");
	expect_fresh(_metadata, m, "after RESET");
	ASSERT_EQ(0, munmap(self->map, m->size));
	mig_close_device(&m->dev);
	ASSERT_EQ(0, mig_reopen_device(&m->dev))
		STEP("reopen the device: %s", m->dev.why);
	expect_fresh(_metadata, m, "when it is opened again");
	let_page_go(_metadata, &direct, &stall, NULL);
	expect_fresh(_metadata, m, "after the read() of the last user");
}

/* ---- Stores during migration ---- */

#define WRITERS	4

struct writer {
	pthread_t thread;
	__u8 *map;
	__u64 pages;
	unsigned int n;
	atomic_bool *stop;
	atomic_ullong begun;	/* number of stores */
	atomic_ullong done;
};

/* The word of this writer in the page of its store number @i. */
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

/* All stores before the stop are in memory, and none after it. */
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

TEST_F_TIMEOUT(map, migration_during_stores, 300)
{
	unsigned int count = mig_times(3), i, n;
	struct mock *m = &self->m, *dst = &self->dst;
	__u64 before[WRITERS], after[WRITERS];
	struct writer writers[WRITERS] = {};
	struct mig_stream image = {};
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
			ASSERT_EQ(0, mig_set_state(&m->dev, MIG_PRE_COPY, &fd));
			/* The writers never pause: read only some rounds. */
			for (rounds = 0; rounds < 300; rounds++) {
				ret = mig_read(fd, &image, 1 << 14);
				ASSERT_TRUE(ret > 0 || ret == -ENOMSG);
			}
			ASSERT_EQ(0, mig_set_state(&m->dev, MIG_PRE_COPY, NULL));
		}
		for (n = 0; n < WRITERS; n++)
			before[n] = atomic_load(&writers[n].done);
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_STOP_COPY, fd < 0 ? &fd : NULL));
		for (n = 0; n < WRITERS; n++)
			after[n] = atomic_load(&writers[n].begun);
		ASSERT_EQ(m->size, (__u64)mock_read(m, BAR2, 0, m->want, m->size));
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&m->dev)));
		expect_memory(_metadata, m, m->want, "in STOP_COPY, during stores");
		expect_image(_metadata, m, &image);
		close(fd);
		load_and_run(_metadata, &dst->dev, &image, 0);
		expect_memory(_metadata, dst, m->want, "on the target");
		for (n = 0; n < WRITERS; n++)
			expect_stores(_metadata, &writers[n], m->want, before[n], after[n],
				      "in the image");
		ASSERT_EQ(0, mig_reset(&dst->dev));
		ASSERT_EQ(0, mig_set_state(&m->dev, MIG_RUNNING, NULL));
		/* Until each writer has stored to each page again. */
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
			      "at the end");
	}
	memcpy(m->want, m->seen, m->size);
	expect_both(_metadata, self, "at the end");
}

MIG_HARNESS_MAIN(mock_options)
