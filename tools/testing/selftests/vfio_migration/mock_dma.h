/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Helpers for the tests of the DMA engine of vfio_mock, memory as its target, and
 * a model of its operation.
 */
#ifndef MOCK_DMA_H
#define MOCK_DMA_H

#include <linux/mman.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "mock.h"
#include "mock_image.h"

#define DESCS		VFIO_MOCK_DMA_DESCS
#define READ		VFIO_MOCK_DMA_READ
#define WRITE		VFIO_MOCK_DMA_WRITE
#define FILL		VFIO_MOCK_DMA_FILL
#define CHURN		VFIO_MOCK_DMA_CHURN

#define RW		(MIG_DMA_READ | MIG_DMA_WRITE)

/* A period that does not pass during a test, in microseconds. */
#define FOREVER		0xffffffffU

/* A short name. */
#define dma_desc	vfio_mock_dma_desc

static inline struct dma_desc dma_get(struct __test_metadata *_metadata,
				      const struct mock *m, unsigned int n)
{
	struct dma_desc d = {};

	ASSERT_EQ((ssize_t)sizeof(d),
		  mock_read(m, BAR0, VFIO_MOCK_DMA_DESC(n), &d, sizeof(d)))
		STEP("read descriptor %u", n);
	return d;
}

/* Writes the fields of a descriptor that belong to software. */
static inline void dma_set(struct __test_metadata *_metadata, const struct mock *m,
			   unsigned int n, const struct dma_desc *d)
{
	const ssize_t len = offsetof(struct dma_desc, status);

	ASSERT_EQ(len, mock_write(m, BAR0, VFIO_MOCK_DMA_DESC(n), d, len))
		STEP("write descriptor %u", n);
}

static inline void dma_ring(struct __test_metadata *_metadata, const struct mock *m,
			    unsigned int n)
{
	set32(m, DMA_DOORBELL, n);
	ASSERT_EQ(0U, reg32(m, DMA_ERROR))
		PROMISE("descriptor %u is owned by software: it can be queued", n);
}

static inline bool dma_owned(const struct dma_desc *d)
{
	return d->status == VFIO_MOCK_DMA_QUEUED || d->status == VFIO_MOCK_DMA_ACTIVE;
}

/* Waits until software owns the descriptor again, and returns it. */
static inline struct dma_desc dma_wait(struct __test_metadata *_metadata,
				       const struct mock *m, unsigned int n)
{
	struct dma_desc d;

	WAIT_FOR((d = dma_get(_metadata, m, n), !dma_owned(&d)),
		 "queued descriptor %u ends", n);
	return d;
}

static inline struct dma_desc dma_run(struct __test_metadata *_metadata,
				      const struct mock *m, unsigned int n,
				      const struct dma_desc *d)
{
	dma_set(_metadata, m, n, d);
	dma_ring(_metadata, m, n);
	return dma_wait(_metadata, m, n);
}

/* Waits until a continuous descriptor has moved @bytes. */
static inline struct dma_desc dma_wait_moved(struct __test_metadata *_metadata,
					     const struct mock *m, unsigned int n, __u64 bytes)
{
	struct dma_desc d;

	WAIT_FOR((d = dma_get(_metadata, m, n), d.pos >= bytes || !dma_owned(&d)),
		 "continuous descriptor %u moves", n);
	EXPECT_EQ(VFIO_MOCK_DMA_ACTIVE, (int)d.status)
		PROMISE("a continuous descriptor stays active (error %u)", d.error);
	return d;
}

static inline struct dma_desc dma_abort(struct __test_metadata *_metadata,
					const struct mock *m, unsigned int n)
{
	set32(m, DMA_ABORT, n);
	ASSERT_EQ(0U, reg32(m, DMA_ERROR))
		PROMISE("descriptor %u can be aborted", n);
	return dma_wait(_metadata, m, n);
}

/* Checks the result of a descriptor. */
static inline void expect_ended(struct __test_metadata *_metadata, const struct dma_desc *d,
				__u32 status, __u32 error, __u64 pos, const char *what)
{
	EXPECT_EQ(status, d->status)
		PROMISE("%s: the descriptor has this status (error %u at %llu)", what,
			d->error, d->pos);
	EXPECT_EQ(error, d->error)
		PROMISE("%s: the descriptor reports the reason", what);
	EXPECT_EQ(pos, d->pos)
		PROMISE("%s: POS is the number of bytes moved", what);
}

static inline void expect_complete(struct __test_metadata *_metadata,
				   const struct dma_desc *d, const char *what)
{
	expect_ended(_metadata, d, VFIO_MOCK_DMA_COMPLETE, VFIO_MOCK_DMA_ERROR_NONE,
		     d->len, what);
}

/*
 * Applies the first @bytes of one run of @d to a model of the state memory and of
 * the user memory. @user is the model's memory at the IOVA of the descriptor.
 */
static inline void dma_apply(const struct dma_desc *d, __u8 *state, __u8 *user, __u64 bytes)
{
	switch (d->op) {
	case READ:
		memcpy(state + d->addr, user, bytes);
		break;
	case WRITE:
		memcpy(user, state + d->addr, bytes);
		break;
	case FILL:
		vfio_mock_pattern(user, d->seed, 0, bytes);
		break;
	case CHURN:
		vfio_mock_pattern(state + d->addr, d->seed, 0, bytes);
		break;
	}
}

/* The same for a continuous descriptor that has moved d->pos bytes. */
static inline void dma_apply_rounds(const struct dma_desc *d, __u8 *state, __u8 *user)
{
	struct dma_desc round = *d;

	if (d->pos >= d->len) {
		round.seed = d->seed + d->pos / d->len - 1;
		dma_apply(&round, state, user, d->len);
	}
	round.seed = d->seed + d->pos / d->len;
	dma_apply(&round, state, user, d->pos % d->len);
}

/* Memory of this process as a target for DMA. */
struct ram {
	__u8 *mem;
	__u8 *want;		/* the expected content */
	__u64 iova;
	__u64 size;
};

static inline void ram_make(struct __test_metadata *_metadata, struct ram *ram,
			    __u64 iova, __u64 size)
{
	ram->iova = iova;
	ram->size = size;
	ram->mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			-1, 0);
	ASSERT_NE(MAP_FAILED, ram->mem);
	ram->want = calloc(1, size);
	ASSERT_NE(NULL, ram->want);
}

#define HUGE_PAGE	(2ULL << 20)

/*
 * Shared memory in huge pages, like that of a guest, or NULL if the kernel has no such
 * pages. @size is a multiple of HUGE_PAGE. No pages need to be set aside before.
 */
static inline __u8 *huge_memory(struct __test_metadata *_metadata, __u64 size)
{
	FILE *file = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages",
			   "r+");
	unsigned long long before;
	__u8 *mem;

	if (!file)
		return NULL;
	ASSERT_EQ(1, fscanf(file, "%llu", &before));
	rewind(file);
	ASSERT_LT(0, fprintf(file, "%llu", before + size / HUGE_PAGE));
	ASSERT_EQ(0, fflush(file))
		STEP("allow more huge pages: %s", strerror(errno));
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB, -1, 0);
	ASSERT_NE(MAP_FAILED, mem)
		STEP("get %llu bytes in huge pages: %s", size, strerror(errno));
	/* The mapping has reserved its pages. */
	rewind(file);
	fprintf(file, "%llu", before);
	fclose(file);
	return mem;
}

/* Maps all of it for a device. */
static inline void ram_map(struct __test_metadata *_metadata, const struct ram *ram,
			   const struct mock *m)
{
	int ret = mig_dma_map(&m->dev, ram->iova, ram->mem, ram->size, RW);

	ASSERT_EQ(0, ret)
		STEP("map memory for DMA: %s", strerror(-ret));
}

/* The expected content at an IOVA of this memory. */
static inline __u8 *ram_want(const struct ram *ram, __u64 iova)
{
	return ram->want + (iova - ram->iova);
}

static inline void expect_bytes(struct __test_metadata *_metadata, const __u8 *want,
				const __u8 *seen, __u64 len, const char *what)
{
	__u64 i;

	if (!memcmp(want, seen, len))
		return;
	for (i = 0; want[i] == seen[i]; i++)
		;
	EXPECT_EQ(want[i], seen[i])
		PROMISE("%s differs from byte %#llx (page %llu)", what, i, i / PAGE);
}

/* Expects a whole image of @m to have the content of its state memory. */
static inline void expect_image(struct __test_metadata *_metadata, const struct mock *m,
				const struct mig_stream *image)
{
	struct mock_image parsed;

	ASSERT_EQ(0, mock_image_parse(&parsed, image))
		PROMISE("the stream follows its format: %s", parsed.why);
	expect_bytes(_metadata, m->want, parsed.memory, m->size, "the stream");
	mock_image_free(&parsed);
}

static inline void expect_ram(struct __test_metadata *_metadata, const struct ram *ram,
			      const char *when)
{
	char what[128];

	snprintf(what, sizeof(what), "%s: the user's memory", when);
	expect_bytes(_metadata, ram->want, ram->mem, ram->size, what);
}

/* Compares only a part of the state memory. */
static inline void expect_state_range(struct __test_metadata *_metadata,
				      const struct mock *m, __u64 at, __u64 len,
				      const char *when)
{
	char what[128];
	__u64 done = 0;
	ssize_t ret;

	while (done < len) {
		ret = mock_read(m, BAR2, at + done, m->seen + at + done, len - done);
		ASSERT_LT(0, ret)
			STEP("read the state memory %s", when);
		done += ret;
	}
	snprintf(what, sizeof(what), "%s: the state memory from %#llx", when, at);
	expect_bytes(_metadata, m->want + at, m->seen + at, len, what);
}

/* Eventfds for all vectors of a device. */
static inline void open_vectors(struct __test_metadata *_metadata,
				const struct mock *m, int fds[VFIO_MOCK_MSIX_VECTORS])
{
	int i;

	for (i = 0; i < VFIO_MOCK_MSIX_VECTORS; i++) {
		fds[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		ASSERT_LE(0, fds[i]);
	}
	ASSERT_EQ(0, mig_set_irqs(&m->dev, VFIO_PCI_MSIX_IRQ_INDEX,
				  VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
				  0, VFIO_MOCK_MSIX_VECTORS, fds,
				  VFIO_MOCK_MSIX_VECTORS * sizeof(int)))
		STEP("set an eventfd for each vector");
}

/* The number of signals of an eventfd since the last call. */
static inline __u64 taken(int fd)
{
	__u64 count;

	return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

/* Maps a part of BAR2 into this process. */
static inline __u8 *bar2_map(struct __test_metadata *_metadata, const struct mock *m,
			     __u64 at, __u64 len)
{
	void *map = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, m->dev.fd,
			 m->offset[BAR2] + at);

	ASSERT_NE(MAP_FAILED, map)
		STEP("map %llu bytes at %#llx of BAR2: %s", len, at, strerror(errno));
	return map;
}

/*
 * Reads a round of pre-copy to its end. It must contain the pages marked in @dirty
 * (one byte for each page), with the content of the model.
 */
static inline void expect_round(struct __test_metadata *_metadata,
				const struct mock *m, int fd, const __u8 *dirty,
				const char *what)
{
	__u64 pages = m->size / PAGE, page;
	struct mig_stream round = {};
	__u8 *sent = calloc(1, pages);
	__u8 *content = calloc(1, m->size);

	ASSERT_NE(NULL, sent);
	ASSERT_NE(NULL, content);
	ASSERT_EQ(-ENOMSG, mig_save(fd, &round, 2 * m->size + (1 << 20)));
	ASSERT_EQ(0, mock_round_parse(&round, sent, content, pages))
		PROMISE("%s: a round consists of pages", what);
	for (page = 0; page < pages; page++) {
		EXPECT_EQ(!!dirty[page], sent[page])
			PROMISE("%s: page %llu is streamed once if it was written, otherwise never",
				what, page);
		if (sent[page] && dirty[page])
			expect_bytes(_metadata, m->want + page * PAGE,
				     content + page * PAGE, PAGE, what);
	}
	mig_stream_free(&round);
	free(sent);
	free(content);
}

/* Marks the pages of a range. */
static inline void mark(__u8 *dirty, __u64 at, __u64 len)
{
	__u64 page;

	for (page = at / PAGE; len && page <= (at + len - 1) / PAGE; page++)
		dirty[page] = 1;
}

#define GUARD	0x5555555555555555ULL

/* An empty bitmap between two guards. */
static inline __u64 *bitmap_make(struct __test_metadata *_metadata, __u64 bits)
{
	size_t words = (bits + 63) / 64;
	__u64 *bitmap = calloc(words + 2, sizeof(*bitmap));

	ASSERT_NE(NULL, bitmap);
	bitmap[0] = GUARD;
	bitmap[words + 1] = GUARD;
	return bitmap + 1;
}

/*
 * Expects a bitmap to have exactly the pages of [@at, @at + @len) marked in @pages, and
 * frees it. If @clear, also clears the marks.
 */
static inline void expect_bitmap(struct __test_metadata *_metadata, __u64 *bitmap,
				 __u8 *pages, __u64 at, __u64 len, __u64 page_size, bool clear)
{
	__u64 bits = len / page_size, words = (bits + 63) / 64, i, page;
	bool want, got;

	EXPECT_TRUE(bitmap[-1] == GUARD && bitmap[words] == GUARD)
		PROMISE("only the bitmap is written to");
	for (i = 0; i < words * 64; i++) {
		want = false;
		for (page = (at + i * page_size) / PAGE;
		     i < bits && page < (at + (i + 1) * page_size) / PAGE; page++) {
			want |= pages[page];
			if (clear)
				pages[page] = 0;
		}
		got = bitmap[i / 64] >> (i % 64) & 1;
		EXPECT_EQ(want, got)
			PROMISE("exactly the written pages are reported: bit %llu from %#llx by %#llx",
				i, at, page_size);
	}
	free(bitmap - 1);
}

#endif /* MOCK_DMA_H */
