// SPDX-License-Identifier: GPL-2.0
/*
 * Two vfio_mock devices that continuously do DMA into each other and into the
 * memory of the guest. A transfer under way when the guest migrates must complete
 * on the target, once, and bytes that were written before must be there.
 *
 * Each device has a chain of transfers in its queue, where each transfer uses the
 * results of the previous ones, and three endless transfers. When the chain has
 * ended, the next one starts immediately, with other data in other places. Then
 * the guest verifies the results of the last one.
 *
 * If an IOMMU does not let them access each other, memory of the guest takes the
 * place of the peer's memory.
 */
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

/* Destination of one transfer of a chain, or of an endless transfer. */
#define SLOT		(32 * 1024ULL)
/* Largest offset of a destination in its slot. */
#define SHIFT_MAX	(SLOT / 8)

/* Size in bytes of a transfer that others have to wait for. */
#define LONG_LEN	(32 * SLOT)

/* Chains alternate between slots: one is under way, one is being verified. */
#define SETS		2

/* Slots at the end of the memory of a device. */
enum {
	SLOT_OWN,					/* three in a set */
	SLOT_INBOX = SLOT_OWN + 3 * SETS,		/* two; the peer writes */
	SLOT_CHURN = SLOT_INBOX + 2 * SETS,		/* without end */
	SLOT_INBOX_CHURN,				/* likewise, the peer */
	SLOTS,
};

/* Slots in guest memory for each device, followed by its archive. */
enum {
	RAM_SOURCE,
	RAM_COPY,
	RAM_PATTERN,
	RAM_SET,
	RAM_CHURN = RAM_SET * SETS,
	RAM_INBOX,
	RAM_LONG = RAM_INBOX + SLOTS - SLOT_INBOX,
	RAM_SLOTS = RAM_LONG + LONG_LEN / SLOT,
};

/*
 * Each chain also adds an entry here, so that the guest can detect on the target
 * which results of the last seconds on the source are missing.
 */
#define ARCHIVE_ENTRIES	128
#define ARCHIVE_ENTRY	3000ULL
#define RAM_SIZE	(RAM_SLOTS * SLOT + ARCHIVE_ENTRIES * ARCHIVE_ENTRY)

/* Descriptors: those of the chain, starting at 0, and the endless ones. */
#define CHAIN		9
#define ENDLESS		3
#define ENDLESS_FIRST	(VFIO_MOCK_DMA_DESCS - ENDLESS)
#define ENDLESS_LEN	20021ULL
#define ENDLESS_STEP	3001
#define ENDLESS_PERIOD	10000
/* Transfers to the peer are shorter, but nearly always one is about to start. */
#define ENDLESS_PEER_STEP	601
#define ENDLESS_PEER_PERIOD	2000

/* Vectors of a chain; commands use the lower ones. */
#define MIDDLE		2
#define MIDDLE_VECTOR	2
#define END_VECTOR	3

/* Range of bytes that a transfer writes to or reads from. */
struct place {
	struct device *owner;	/* whose memory they are in; NULL: the guest's */
	__u8 *bytes;
	__u8 *model;		/* what the owner's model has there */
	__u64 bus;		/* address for others than the owner */
	__u64 addr;		/* address for the owner */
};

struct chain {
	__u64 number;
	__u64 seed;
	__u64 len;		/* of what is handed on */
	__u64 pattern_len;	/* of what is written as a pattern */
	struct place source;
	struct place own[3];
	struct place inbox[2];
	struct place copy;
	struct place pattern;
	struct place archive;
};

struct peer {
	struct device *other;
	__u64 bus;		/* of BAR2 */
	__u8 *ram;
	__u64 ram_bus;
	struct chain chain;	/* under way */
	__u64 chains;		/* that have ended */
	__u64 posted;		/* when, in milliseconds */
	__u64 ended;		/* descriptors of all kinds */
	__u64 seed;		/* of the transfers that go on */
};

static struct peer peers[2];

/* Whether the devices can access each other. */
static bool p2p;

static struct place device_place(struct device *d, unsigned int slot,
				 __u64 shift)
{
	__u64 addr = d->work + slot * SLOT + shift;

	return (struct place) {
		.owner = d,
		.bytes = d->mem + addr,
		.model = d->model + addr,
		.bus = d->peer->bus + addr,
		.addr = addr,
	};
}

static struct place ram_place(const struct device *d, __u64 offset)
{
	return (struct place) {
		.bytes = d->peer->ram + offset,
		.bus = d->peer->ram_bus + offset,
	};
}

/* Returns a place that the peer of @d writes to. */
static struct place inbox_place(struct device *d, unsigned int slot, __u64 shift)
{
	if (p2p)
		return device_place(d, slot, shift);
	return ram_place(d, (RAM_INBOX + slot - SLOT_INBOX) * SLOT + shift);
}

/* Returns a number below @limit that only depends on the chain and @salt. */
static __u64 choose(const struct chain *c, __u64 salt, __u64 limit)
{
	return vfio_mock_mix(c->seed + salt) % limit;
}

static __u64 chain_seed(const struct device *d, __u64 number)
{
	return vfio_mock_mix(d->peer->bus + number);
}

static struct place archive_entry(const struct device *d, __u64 number)
{
	return ram_place(d, RAM_SLOTS * SLOT +
			 number % ARCHIVE_ENTRIES * ARCHIVE_ENTRY);
}

static struct place long_place(const struct device *d)
{
	return ram_place(d, RAM_LONG * SLOT);
}

/* Chooses the transfers of the next chain. */
static void plan_chain(struct device *d)
{
	struct peer *p = d->peer;
	struct chain *c = &p->chain;
	unsigned int set = p->chains % SETS, i;

	c->number = p->chains;
	c->seed = chain_seed(d, c->number);
	c->len = 1 + choose(c, 1, SLOT - SHIFT_MAX);
	c->pattern_len = 1 + choose(c, 2, SLOT - SHIFT_MAX);
	for (i = 0; i < 3; i++)
		c->own[i] = device_place(d, SLOT_OWN + set * 3 + i,
					 choose(c, 10 + i, SHIFT_MAX));
	for (i = 0; i < 2; i++)
		c->inbox[i] = inbox_place(p->other, SLOT_INBOX + set * 2 + i,
					  choose(c, 20 + i, SHIFT_MAX));
	c->source = ram_place(d, (set * RAM_SET + RAM_SOURCE) * SLOT +
			      choose(c, 30, SHIFT_MAX));
	c->copy = ram_place(d, (set * RAM_SET + RAM_COPY) * SLOT +
			    choose(c, 31, SHIFT_MAX));
	c->pattern = ram_place(d, (set * RAM_SET + RAM_PATTERN) * SLOT +
			       choose(c, 32, SHIFT_MAX));
	c->archive = archive_entry(d, c->number);
}

static __u8 *desc_field(struct device *d, unsigned int index, size_t field)
{
	return d->regs + VFIO_MOCK_DMA_DESC(index) + field;
}

static void write_desc(struct device *d, unsigned int index,
		       const struct vfio_mock_dma_desc *desc)
{
	__u64 words[offsetof(struct vfio_mock_dma_desc, status) / 8];
	size_t i;

	memcpy(words, desc, sizeof(words));
	for (i = 0; i < sizeof(words) / sizeof(*words); i++)
		mmio_write(desc_field(d, index, i * 8), 8, words[i]);
}

static void doorbell(struct device *d, unsigned int index)
{
	mmio_write(d->regs + VFIO_MOCK_REG_DMA_DOORBELL, 4, index);
}

/* Sets up transfer @index of the chain. */
static void prepare(struct device *d, unsigned int index, __u32 op,
		    const struct place *user, const struct place *own,
		    __u64 len)
{
	struct vfio_mock_dma_desc desc = {
		.iova = user ? user->bus : 0,
		.addr = own ? own->addr : 0,
		.len = len,
		.seed = d->peer->chain.seed + index,
		.op = op,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	if (index == MIDDLE)
		desc.irq_vector = MIDDLE_VECTOR;
	else if (index == CHAIN - 1)
		desc.irq_vector = END_VECTOR;
	write_desc(d, index, &desc);
}

static void post_chain(struct device *d)
{
	struct peer *p = d->peer;
	struct chain *c = &p->chain;
	struct place far = long_place(d);
	unsigned int i;

	plan_chain(d);
	vfio_mock_pattern(c->source.bytes, c->seed, 0, c->len);
	prepare(d, 0, VFIO_MOCK_DMA_FILL, &far, NULL, LONG_LEN);
	/* From guest memory to the device, its peer, back, and out again. */
	prepare(d, 1, VFIO_MOCK_DMA_READ, &c->source, &c->own[0], c->len);
	prepare(d, 2, VFIO_MOCK_DMA_WRITE, &c->inbox[0], &c->own[0], c->len);
	prepare(d, 3, VFIO_MOCK_DMA_READ, &c->inbox[0], &c->own[1], c->len);
	prepare(d, 4, VFIO_MOCK_DMA_WRITE, &c->copy, &c->own[1], c->len);
	prepare(d, 5, VFIO_MOCK_DMA_FILL, &c->pattern, NULL, c->pattern_len);
	prepare(d, 6, VFIO_MOCK_DMA_FILL, &c->inbox[1], NULL, c->pattern_len);
	prepare(d, 7, VFIO_MOCK_DMA_CHURN, NULL, &c->own[2], c->pattern_len);
	prepare(d, 8, VFIO_MOCK_DMA_FILL, &c->archive, NULL, ARCHIVE_ENTRY);
	/* Start all at once, so that they have to wait for each other. */
	for (i = 0; i < CHAIN; i++)
		doorbell(d, i);
	p->posted = now_ms();
}

/* Returns the length of transfer @index of the chain. */
static __u64 transfer_len(const struct chain *c, unsigned int index)
{
	switch (index) {
	case 0:
		return LONG_LEN;
	case CHAIN - 1:
		return ARCHIVE_ENTRY;
	default:
		return index < 5 ? c->len : c->pattern_len;
	}
}

/* Checks the result of a descriptor; the error is in the upper half of @want. */
static void check_ended(struct device *d, unsigned int index, __u64 want)
{
	check(d, "dma-status", index, want,
	      mmio_read(desc_field(d, index,
				   offsetof(struct vfio_mock_dma_desc, status)),
			8));
	d->peer->ended++;
}

static __u64 desc_pos(struct device *d, unsigned int index)
{
	return mmio_read(desc_field(d, index,
				    offsetof(struct vfio_mock_dma_desc, pos)),
			 8);
}

/* Compares a range with the expected content, and updates the model. */
static void compare(struct device *d, const char *what,
		    const struct place *place, const __u8 *want, __u64 len)
{
	const __u8 *got = place->bytes;
	__u64 i, end, page = guest_page();

	if (place->model)
		memcpy(place->model, want, len);
	for (i = 0; i < len; i = end) {
		end = i + page - (uintptr_t)(got + i) % page;
		if (end > len)
			end = len;
		leave_guest();
		if (!memcmp(want + i, got + i, end - i))
			continue;
		while (want[i] == got[i] && i < end - 1)
			i++;
		check(d, what, place->bus + i, want[i], got[i]);
		return;
	}
	d->count.checks++;
}

static void compare_pattern(struct device *d, const char *what,
			    const struct place *place, __u64 seed, __u64 len)
{
	static __u8 want[LONG_LEN];

	vfio_mock_pattern(want, seed, 0, len);
	compare(d, what, place, want, len);
}

/* Verifies the results of a completed chain, except its long transfer. */
static void compare_chain(struct device *d, const struct chain *c)
{
	__u64 len = c->len, pattern_len = c->pattern_len;

	compare_pattern(d, "dma-read", &c->own[0], c->seed, len);
	compare_pattern(d, "p2p-write", &c->inbox[0], c->seed, len);
	compare_pattern(d, "p2p-read", &c->own[1], c->seed, len);
	compare_pattern(d, "dma-write", &c->copy, c->seed, len);
	compare_pattern(d, "dma-fill", &c->pattern, c->seed + 5, pattern_len);
	compare_pattern(d, "p2p-fill", &c->inbox[1], c->seed + 6, pattern_len);
	compare_pattern(d, "dma-churn", &c->own[2], c->seed + 7, pattern_len);
	compare_pattern(d, "dma-fill", &c->archive, c->seed + 8, ARCHIVE_ENTRY);
}

/* Consumes the interrupts of a chain. Each one is signalled once. */
static void take_vector(struct device *d, unsigned int vector)
{
	__u64 n;

	await_irq(d, vector);
	n = take_irqs(d, vector);
	check(d, "dma-irqs", vector, 1, n);
	d->count.dma_irqs += n;
}

/* Checks the completion of the chain. */
static void end_chain(struct device *d)
{
	struct peer *p = d->peer;
	unsigned int i;
	__u64 len;

	for (i = 0; i < CHAIN; i++) {
		len = transfer_len(&p->chain, i);
		check_ended(d, i, VFIO_MOCK_DMA_COMPLETE);
		check(d, "dma-pos", i, len, desc_pos(d, i));
		d->count.transfers++;
		d->count.moved += len;
	}
	check_reg(d, "dma-done", VFIO_MOCK_REG_DMA_DONE, 8, p->ended);
	take_vector(d, MIDDLE_VECTOR);
	take_vector(d, END_VECTOR);
	p->chains++;
}

/* Returns whether the interrupt at the end of the chain has arrived or is overdue. */
static bool chain_ended(const struct device *d)
{
	struct pollfd pfd = { .fd = d->irq[END_VECTOR], .events = POLLIN };

	return poll(&pfd, 1, 0) == 1 ||
	       now_ms() - d->peer->posted > IRQ_TIMEOUT_MS;
}

/* Starts the next chain when one has ended, and verifies the results of that one. */
void peers_turn(struct device *d)
{
	struct chain done;

	if (!d->peer || !chain_ended(d))
		return;
	end_chain(d);
	done = d->peer->chain;
	post_chain(d);
	compare_chain(d, &done);
}

/* Returns the destination of an endless transfer. */
static struct place endless_place(struct device *d, unsigned int i)
{
	switch (i) {
	case 0:
		return ram_place(d, RAM_CHURN * SLOT + 77);
	case 1:
		return inbox_place(d->peer->other, SLOT_INBOX_CHURN, 7777);
	default:
		return device_place(d, SLOT_CHURN, 777);
	}
}

static void post_endless(struct device *d, unsigned int i)
{
	struct place place = endless_place(d, i);
	bool inbox = i == 1;
	struct vfio_mock_dma_desc desc = {
		.iova = place.bus,
		.addr = place.addr,
		.len = ENDLESS_LEN,
		.seed = d->peer->seed + i * SLOT,
		.op = place.owner == d ? VFIO_MOCK_DMA_CHURN :
					 VFIO_MOCK_DMA_FILL,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
		.period = inbox ? ENDLESS_PEER_PERIOD : ENDLESS_PERIOD,
		.step = inbox ? ENDLESS_PEER_STEP : ENDLESS_STEP,
	};

	write_desc(d, ENDLESS_FIRST + i, &desc);
	doorbell(d, ENDLESS_FIRST + i);
}

/* Waits while a transfer has this status. */
static void await_status(struct device *d, unsigned int index, __u32 status)
{
	const size_t field = offsetof(struct vfio_mock_dma_desc, status);
	__u64 limit = now_ms() + IRQ_TIMEOUT_MS;

	while (mmio_read(desc_field(d, index, field), 4) == status &&
	       now_ms() < limit)
		;
}

/* Ends a transfer after a complete round through its range. */
static void abort_endless(struct device *d, unsigned int index)
{
	__u64 limit = now_ms() + IRQ_TIMEOUT_MS;

	while (desc_pos(d, index) < ENDLESS_LEN && now_ms() < limit)
		;
	mmio_write(d->regs + VFIO_MOCK_REG_DMA_ABORT, 4, index);
	/* A piece that is being moved is completed first. */
	await_status(d, index, VFIO_MOCK_DMA_ACTIVE);
}

/* Ends an endless transfer, and compares its results with its position. */
static void end_endless(struct device *d, unsigned int i)
{
	static __u8 want[ENDLESS_LEN];
	unsigned int index = ENDLESS_FIRST + i;
	struct place place = endless_place(d, i);
	__u64 seed = d->peer->seed + i * SLOT, pos, round, part;

	abort_endless(d, index);
	check_ended(d, index, VFIO_MOCK_DMA_ABORTED);
	pos = desc_pos(d, index);
	d->count.moved += pos;
	round = pos / ENDLESS_LEN;
	part = pos % ENDLESS_LEN;
	check(d, "dma-rounds", index, true, round > 0);
	vfio_mock_pattern(want, seed + round, 0, part);
	vfio_mock_pattern(want + part, seed + round - 1, part,
			  ENDLESS_LEN - part);
	compare(d, "dma-endless", &place, want, ENDLESS_LEN);
}

/* Verifies the entries of the last chains in the archive. */
static void compare_archive(struct device *d)
{
	__u64 number = d->peer->chains, entries = ARCHIVE_ENTRIES;
	struct place entry;

	for (; number && entries; entries--) {
		entry = archive_entry(d, --number);
		compare_pattern(d, "dma-archive", &entry,
				chain_seed(d, number) + 8, ARCHIVE_ENTRY);
	}
}

/* Starts the transfers of the device. */
void peers_start(struct device *d)
{
	unsigned int i;

	if (!d->peer)
		return;
	d->peer->seed = vfio_mock_mix(d->peer->seed + d->peer->bus);
	for (i = 0; i < ENDLESS; i++)
		post_endless(d, i);
	post_chain(d);
}

/* Waits for all transfers of the device to end, and verifies their results. */
void peers_stop(struct device *d)
{
	struct place far;
	unsigned int i;

	if (!d->peer)
		return;
	await_irq(d, END_VECTOR);
	end_chain(d);
	compare_chain(d, &d->peer->chain);
	far = long_place(d);
	compare_pattern(d, "dma-long", &far, d->peer->chain.seed, LONG_LEN);
	for (i = 0; i < ENDLESS; i++)
		end_endless(d, i);
	compare_archive(d);
	check_reg(d, "dma-status", VFIO_MOCK_REG_DMA_STATUS, 4, 0);
	check_reg(d, "dma-done", VFIO_MOCK_REG_DMA_DONE, 8, d->peer->ended);
	check_reg(d, "dma-bytes", VFIO_MOCK_REG_DMA_BYTES, 8, d->count.moved);
}

/* Returns the bus address of a BAR, which other devices use to access it. */
static __u64 bar_address(const struct device *d, unsigned int bar)
{
	unsigned long long start = 0;
	char path[512];
	FILE *f;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/resource", d->pci);
	f = fopen(path, "r");
	if (!f)
		die("open %s", path);
	do {
		if (fscanf(f, "%llx %*x %*x", &start) != 1)
			die("read %s", path);
	} while (bar--);
	fclose(f);
	return start;
}

/* In an entry of /proc/PID/pagemap, the number of the page frame. */
#define PAGEMAP_FRAME	((1ULL << 55) - 1)

/* Returns the bus address of a page, or 0 if the page is not present. */
static __u64 page_address(int pagemap, const __u8 *page)
{
	__u64 entry;

	if (pread(pagemap, &entry, sizeof(entry),
		  (uintptr_t)page / guest_page() * sizeof(entry)) != sizeof(entry))
		die("read pagemap");
	return entry >> 63 ? (entry & PAGEMAP_FRAME) * guest_page() : 0;
}

/*
 * Allocates memory that is contiguous on the bus, by a search in a large range.
 * A kernel without compaction does not move locked pages.
 */
static __u8 *bus_alloc(__u64 size, __u64 *bus)
{
	__u64 page = guest_page(), pool = 8 * size / page * page, offset;
	__u64 start = 0, next = 0, at;
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	__u8 *p = mmap(NULL, pool, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (pagemap < 0 || p == MAP_FAILED)
		die("no memory for DMA");
	for (offset = 0; offset < pool; offset += page) {
		at = page_address(pagemap, p + offset);
		if (!at || at != next) {
			start = offset;
			*bus = at;
		}
		next = at + page;
		if (offset + page - start >= size) {
			close(pagemap);
			munmap(p + offset + page, pool - offset - page);
			return p + start;
		}
	}
	errno = ENOMEM;
	die("no contiguous memory for DMA");
}

static void open_peer(struct device *d, struct device *other, struct peer *p)
{
	if (d->size < 2 * SLOTS * SLOT) {
		errno = EINVAL;
		die("the memory of %s is too small for DMA", d->pci);
	}
	p->other = other;
	p->bus = bar_address(d, d->kind->bar);
	p->ram = bus_alloc(RAM_SIZE, &p->ram_bus);
	d->peer = p;
	d->work = d->size - SLOTS * SLOT;
	d->vectors = MIDDLE_VECTOR;
}

/* Returns whether a device can read the memory of its peer; both are still zero. */
static bool reads_peer(struct device *d)
{
	const struct device *other = d->peer->other;
	struct vfio_mock_dma_desc desc = {
		.iova = other->peer->bus + other->work,
		.addr = d->work,
		.len = 8,
		.op = VFIO_MOCK_DMA_READ,
		.irq_vector = VFIO_MOCK_IRQ_NONE,
	};

	write_desc(d, 0, &desc);
	doorbell(d, 0);
	await_status(d, 0, VFIO_MOCK_DMA_QUEUED);
	await_status(d, 0, VFIO_MOCK_DMA_ACTIVE);
	d->peer->ended++;
	d->count.moved += desc_pos(d, 0);
	return desc_pos(d, 0) == desc.len;
}

/*
 * Makes two devices peers, before they are first used. Returns whether they can
 * access each other.
 */
bool peers_open(struct device *one, struct device *other)
{
	bool reads;

	open_peer(one, other, &peers[0]);
	open_peer(other, one, &peers[1]);
	reads = reads_peer(one);
	p2p = reads_peer(other) && reads;
	/* Make their content differ. */
	other->generation = 1ULL << 32;
	return p2p;
}
