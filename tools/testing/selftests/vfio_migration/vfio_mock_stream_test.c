// SPDX-License-Identifier: GPL-2.0
/*
 * Migration streams that vfio_mock must refuse, and that must not affect the device
 * afterwards.
 *
 *	./vfio_mock_stream_test --small "SOURCE TARGET" --medium ...
 *
 * with the sysfs paths of mediated devices of each size. run_mock.sh creates them
 * and runs this. The exhaustive tests run every case on the iommufd backend and a
 * sample on the group backend, which differs only in how a device is opened.
 */
#include <signal.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "mock.h"
#include "mock_image.h"

/* A device, and a good image for it. */
struct subject {
	struct mock m;
	struct mig_stream stream;
	struct mock_image good;		/* the parsed stream */
	struct mock_front front;
};

FIXTURE(refuse)
{
	struct subject s;
};

FIXTURE_VARIANT(refuse)
{
	enum mig_backend backend;
	unsigned int stride;		/* of the exhaustive tests */
};

FIXTURE_VARIANT_ADD(refuse, group) { .backend = MIG_GROUP, .stride = 13 };
FIXTURE_VARIANT_ADD(refuse, iommufd) { .backend = MIG_IOMMUFD, .stride = 1 };

FIXTURE_SETUP(refuse)
{
	struct subject *s = &self->s;
	int fd = -1;

	MOCK_OPEN_OR_SKIP(&s->m, "small", 0, variant->backend);
	populate(_metadata, &s->m, 0x5eed);
	read_front(_metadata, &s->m, &s->front);
	stop_and_save(_metadata, &s->m, &fd, &s->stream);
	close(fd);
	ASSERT_EQ(0, mock_image_parse(&s->good, &s->stream))
		PROMISE("the stream follows its format: %s", s->good.why);
	ASSERT_EQ(0, mig_reset(&s->m.dev));
}

FIXTURE_TEARDOWN(refuse)
{
	mock_close(&self->s.m);
}

/*
 * Offers a bad stream: either write() fails with EINVAL, also when repeated, or
 * RESUMING -> STOP fails; in both cases the device does not run until RESET, which
 * removes all of the stream. Unless @thorough, only the refusal is checked.
 */
static void expect_refused(struct __test_metadata *_metadata, struct mock *m,
			   const void *data, size_t len, size_t chunk, bool thorough,
			   const char *what, size_t where)
{
	__u32 state;
	int fd, ret;

	fd = go(_metadata, &m->dev, MIG_RESUMING);
	ret = mig_load(fd, data, len, chunk, NULL);
	if (ret) {
		EXPECT_EQ(-EINVAL, ret)
			PROMISE("%s (%zu): write() refuses a bad record with EINVAL",
				what, where);
		EXPECT_EQ(-EINVAL, mig_load(fd, data, len < 64 ? len : 64, 0, NULL))
			PROMISE("%s (%zu): a refusal sticks", what, where);
	}
	EXPECT_EQ(-EINVAL, mig_set_state(&m->dev, MIG_STOP, NULL))
		PROMISE("%s (%zu): if the user provided data is found to be incomplete, inconsistent, or otherwise invalid, the migration driver must fail SET_STATE",
			what, where);
	if (thorough) {
		EXPECT_NE(0, mig_set_state(&m->dev, MIG_STOP, NULL))
			PROMISE("%s: a refusal sticks", what);
		EXPECT_NE(0, mig_set_state(&m->dev, MIG_RUNNING, NULL))
			PROMISE("%s: a device with refused data does not run", what);
		ASSERT_EQ(0, mig_get_state(&m->dev, &state));
		EXPECT_TRUE(state == MIG_RESUMING || state == MIG_ERROR)
			PROMISE("%s: the device is not RUNNING until reset, not in %s",
				what, mig_state_name(state));
	}
	ASSERT_EQ(0, mig_reset(&m->dev))
		PROMISE("RESET works in every state");
	if (thorough) {
		expect_state(_metadata, &m->dev, MIG_RUNNING, what);
		expect_fresh(_metadata, m, what);
		EXPECT_TRUE(mig_fd_is_dead(fd))
			PROMISE("%s: RESET ends the session", what);
	}
	close(fd);
}

/* Checks that refused streams had no effect on the device. */
static void expect_good_image_loads(struct __test_metadata *_metadata, struct subject *s)
{
	load_and_compare(_metadata, &s->m, &s->stream, 0, s->good.memory, &s->front);
}

TEST_F_TIMEOUT(refuse, every_truncation, 120)
{
	struct subject *s = &self->s;
	size_t at, next = 0, n = 0;
	int fd, ret;

	for (at = 0; at < s->stream.len; at++) {
		/* All lengths near headers, and some inside of pages. */
		if (next < s->good.nr_header_bytes && s->good.header_bytes[next] == at)
			next++;
		else if (at % 1009 && at % PAGE)
			continue;
		if (n++ % variant->stride)
			continue;
		fd = go(_metadata, &s->m.dev, MIG_RESUMING);
		ret = mig_load(fd, s->stream.data, at, 0, NULL);
		EXPECT_EQ(0, ret)
			PROMISE("the beginning of a good image is accepted (%zu bytes)", at);
		EXPECT_EQ(-EINVAL, mig_set_state(&s->m.dev, MIG_STOP, NULL))
			PROMISE("an image that ends after %zu of %zu bytes is incomplete",
				at, s->stream.len);
		close(fd);
		ASSERT_EQ(0, mig_reset(&s->m.dev));
	}
	expect_refused(_metadata, &s->m, s->stream.data, s->stream.len - 1, 0, true,
		       "a missing last byte", s->stream.len - 1);
	expect_good_image_loads(_metadata, s);
}

TEST_F_TIMEOUT(refuse, every_flipped_header_byte, 120)
{
	struct subject *s = &self->s;
	__u8 *data = s->stream.data;
	size_t i, at;

	for (i = 0; i < s->good.nr_header_bytes; i += variant->stride) {
		at = s->good.header_bytes[i];
		data[at] ^= 1 << (i & 7);
		expect_refused(_metadata, &s->m, data, s->stream.len, 0, i % 16 == 0,
			       "a flipped bit in a header", at);
		data[at] ^= 1 << (i & 7);
	}
	expect_good_image_loads(_metadata, s);
}

TEST_F_TIMEOUT(refuse, flipped_page_bytes, 120)
{
	struct subject *s = &self->s;
	__u8 *data = s->stream.data;
	size_t at;

	for (at = 80; at < s->stream.len; at += 331 * variant->stride) {
		data[at] ^= 1 << (at & 7);
		expect_refused(_metadata, &s->m, data, s->stream.len, 0, at % 8 == 0,
			       "a flipped bit in a page", at);
		data[at] ^= 1 << (at & 7);
	}
	expect_good_image_loads(_metadata, s);
}

/*
 * Streams that are wrong in one place and correct otherwise, including trailer and
 * digest.
 */
enum malformation {
	GOOD_REBUILT,
	GOOD_PAGE_BY_PAGE,
	GOOD_BACKWARDS,
	GOOD_PAGES_RESENT,
	GOOD_OPTIONAL_RECORDS,
	BAD_MAGIC,
	BAD_VERSION_0,
	BAD_VERSION_2,
	BAD_PAGE_SIZE,
	BAD_STATE_SIZE_SMALLER,
	BAD_STATE_SIZE_LARGER,
	BAD_STATE_SIZE_HUGE,
	BAD_FEATURES,
	BAD_IDENTITY_SHORT,
	BAD_IDENTITY_LONG,
	BAD_IDENTITY_EMPTY,
	BAD_IDENTITY_OPTIONAL,
	BAD_IDENTITY_TWICE,
	BAD_IDENTITY_LATE,
	BAD_IDENTITY_MISSING,
	BAD_OPTIONAL_FIRST,
	BAD_OFFSET_UNALIGNED,
	BAD_OFFSET_END,
	BAD_OFFSET_WRAPS,
	BAD_RUN_CROSSES_END,
	BAD_RUN_EMPTY,
	BAD_RUN_WITHOUT_OFFSET,
	BAD_RUN_TOO_LONG,
	BAD_RUN_PART_OF_A_PAGE,
	BAD_RUN_HUGE,
	BAD_PAGES_OPTIONAL,
	BAD_PAGES_FLAG_2,
	BAD_PAGES_AFTER_REGISTERS,
	BAD_PAGE_NEVER_SENT,
	BAD_NO_PAGES,
	BAD_REGISTERS_SHORT,
	BAD_REGISTERS_LONG,
	BAD_REGISTERS_EMPTY,
	BAD_REGISTERS_TWICE,
	BAD_REGISTERS_OPTIONAL,
	BAD_REGISTERS_MISSING,
	BAD_REGISTERS_CONTENT,
	BAD_REGISTERS_VENDOR,
	BAD_REGISTERS_RESERVED,
	BAD_REGISTERS_PENDING,
	BAD_TRAILER_MISSING,
	BAD_TRAILER_SHORT,
	BAD_TRAILER_LONG,
	BAD_TRAILER_OPTIONAL,
	BAD_TRAILER_DIGEST,
	BAD_TRAILER_PAGES,
	BAD_TRAILER_RECORDS,
	BAD_TRAILER_BYTES,
	BAD_TRAILER_TWICE,
	BAD_TRAILER_EARLY,
	BAD_UNKNOWN_TAG,
	BAD_UNKNOWN_TAG_0,
	BAD_UNKNOWN_FLAGS,
	BAD_OPTIONAL_TOO_LONG,
	BAD_OPTIONAL_HUGE,
	BAD_TRAILING_BYTE,
	BAD_TRAILING_OPTIONAL,
	BAD_IMAGE_TWICE,
};

#define NAMED(what)	{ what, #what }
static const struct {
	enum malformation what;
	const char *name;
} malformations[] = {
	NAMED(GOOD_REBUILT), NAMED(GOOD_PAGE_BY_PAGE), NAMED(GOOD_BACKWARDS),
	NAMED(GOOD_PAGES_RESENT), NAMED(GOOD_OPTIONAL_RECORDS), NAMED(BAD_MAGIC),
	NAMED(BAD_VERSION_0), NAMED(BAD_VERSION_2), NAMED(BAD_PAGE_SIZE),
	NAMED(BAD_STATE_SIZE_SMALLER), NAMED(BAD_STATE_SIZE_LARGER),
	NAMED(BAD_STATE_SIZE_HUGE), NAMED(BAD_FEATURES), NAMED(BAD_IDENTITY_SHORT),
	NAMED(BAD_IDENTITY_LONG), NAMED(BAD_IDENTITY_EMPTY), NAMED(BAD_IDENTITY_OPTIONAL),
	NAMED(BAD_IDENTITY_TWICE), NAMED(BAD_IDENTITY_LATE), NAMED(BAD_IDENTITY_MISSING),
	NAMED(BAD_OPTIONAL_FIRST), NAMED(BAD_OFFSET_UNALIGNED), NAMED(BAD_OFFSET_END),
	NAMED(BAD_OFFSET_WRAPS), NAMED(BAD_RUN_CROSSES_END), NAMED(BAD_RUN_EMPTY),
	NAMED(BAD_RUN_WITHOUT_OFFSET), NAMED(BAD_RUN_TOO_LONG),
	NAMED(BAD_RUN_PART_OF_A_PAGE), NAMED(BAD_RUN_HUGE), NAMED(BAD_PAGES_OPTIONAL),
	NAMED(BAD_PAGES_FLAG_2), NAMED(BAD_PAGES_AFTER_REGISTERS),
	NAMED(BAD_PAGE_NEVER_SENT), NAMED(BAD_NO_PAGES), NAMED(BAD_REGISTERS_SHORT),
	NAMED(BAD_REGISTERS_LONG), NAMED(BAD_REGISTERS_EMPTY), NAMED(BAD_REGISTERS_TWICE),
	NAMED(BAD_REGISTERS_OPTIONAL), NAMED(BAD_REGISTERS_MISSING),
	NAMED(BAD_REGISTERS_CONTENT), NAMED(BAD_REGISTERS_VENDOR),
	NAMED(BAD_REGISTERS_RESERVED), NAMED(BAD_REGISTERS_PENDING),
	NAMED(BAD_TRAILER_MISSING),
	NAMED(BAD_TRAILER_SHORT), NAMED(BAD_TRAILER_LONG), NAMED(BAD_TRAILER_OPTIONAL),
	NAMED(BAD_TRAILER_DIGEST), NAMED(BAD_TRAILER_PAGES), NAMED(BAD_TRAILER_RECORDS),
	NAMED(BAD_TRAILER_BYTES), NAMED(BAD_TRAILER_TWICE), NAMED(BAD_TRAILER_EARLY),
	NAMED(BAD_UNKNOWN_TAG), NAMED(BAD_UNKNOWN_TAG_0), NAMED(BAD_UNKNOWN_FLAGS),
	NAMED(BAD_OPTIONAL_TOO_LONG), NAMED(BAD_OPTIONAL_HUGE), NAMED(BAD_TRAILING_BYTE),
	NAMED(BAD_TRAILING_OPTIONAL), NAMED(BAD_IMAGE_TWICE),
};

#define OTHER_TAG	0x4f54ULL	/* an unused tag */

static void put_raw(struct mock_writer *w, __u32 tag, __u32 flags, __u64 length,
		    const void *payload, size_t len)
{
	struct mock_record rec = { .tag = tag, .flags = flags, .length = length };

	mig_stream_add(&w->out, &rec, sizeof(rec));
	mig_stream_add(&w->out, payload, len);
	w->records++;
}

static void build_identity(struct mock_writer *w, const struct mock_image *good,
			   enum malformation what)
{
	struct mock_identity id[2] = { good->identity, {} };

	switch (what) {
	case BAD_MAGIC:
		id->magic ^= 1;
		break;
	case BAD_VERSION_0:
		id->version = 0;
		break;
	case BAD_VERSION_2:
		id->version = 2;
		break;
	case BAD_PAGE_SIZE:
		id->page_size *= 2;
		break;
	case BAD_STATE_SIZE_SMALLER:
		id->state_size -= PAGE;
		break;
	case BAD_STATE_SIZE_LARGER:
		id->state_size += PAGE;
		break;
	case BAD_STATE_SIZE_HUGE:
		id->state_size = 1ULL << 63;
		break;
	case BAD_FEATURES:
		id->features = 1;
		break;
	case BAD_IDENTITY_SHORT:
		mock_put_record(w, MOCK_TAG_IDENTITY, 0, id, sizeof(*id) - 8);
		w->digest += vfio_mock_digest(1, id, sizeof(*id) - 8);
		return;
	case BAD_IDENTITY_LONG:
		mock_put_record(w, MOCK_TAG_IDENTITY, 0, id, sizeof(*id) + 8);
		w->digest += vfio_mock_digest(1, id, sizeof(*id) + 8);
		return;
	case BAD_IDENTITY_EMPTY:
		mock_put_record(w, MOCK_TAG_IDENTITY, 0, NULL, 0);
		w->digest += vfio_mock_digest(1, NULL, 0);
		return;
	case BAD_IDENTITY_OPTIONAL:
		mock_put_record(w, MOCK_TAG_IDENTITY, MOCK_OPTIONAL, id, sizeof(*id));
		w->digest += vfio_mock_digest(1, id, sizeof(*id));
		return;
	case BAD_IDENTITY_LATE:
	case BAD_IDENTITY_MISSING:
		return;
	case BAD_OPTIONAL_FIRST:
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL, id, 8);
		break;
	case BAD_IDENTITY_TWICE:
		mock_put_identity(w, id);
		break;
	default:
		break;
	}
	mock_put_identity(w, id);
}

static void build_pages(struct mock_writer *w, const struct mock_image *good,
			enum malformation what)
{
	const __u64 size = good->identity.state_size, nr = size / PAGE;
	__u8 *junk = calloc(1, 2 * MOCK_RUN_PAGES * PAGE);
	__u64 i;

	switch (what) {
	case GOOD_PAGE_BY_PAGE:
		for (i = 0; i < nr; i++)
			mock_put_pages(w, i * PAGE, good->memory + i * PAGE, 1);
		goto out;
	case GOOD_BACKWARDS:
		for (i = nr; i-- > 0;)
			mock_put_pages(w, i * PAGE, good->memory + i * PAGE, 1);
		goto out;
	case GOOD_PAGES_RESENT:
		memset(junk, 0xdd, 2 * PAGE);
		mock_put_pages(w, 3 * PAGE, junk, 2);
		mock_put_all_pages(w, good);
		mock_put_pages(w, PAGE, junk, 1);
		mock_put_pages(w, 0, good->memory, 3);
		goto out;
	case BAD_NO_PAGES:
		goto out;
	case BAD_PAGE_NEVER_SENT:
		mock_put_pages(w, 0, good->memory, 4);
		mock_put_pages(w, 5 * PAGE, good->memory + 5 * PAGE, nr - 5);
		goto out;
	default:
		break;
	}
	mock_put_all_pages(w, good);

	/* An additional invalid record. */
	switch (what) {
	case BAD_OFFSET_UNALIGNED:
		/* With unchanged memory, so that the digest does not detect it. */
		memcpy(junk, &(__u64){ 8 }, 8);
		memcpy(junk + 8, good->memory + 8, PAGE);
		mock_put_record(w, MOCK_TAG_PAGES, 0, junk, 8 + PAGE);
		w->pages++;
		break;
	case BAD_OFFSET_END:
		mock_put_pages(w, size, junk, 1);
		break;
	case BAD_OFFSET_WRAPS:
		mock_put_pages(w, -PAGE, junk, 2);
		break;
	case BAD_RUN_CROSSES_END:
		memcpy(junk, good->memory + size - PAGE, PAGE);
		mock_put_pages(w, size - PAGE, junk, 2);
		break;
	case BAD_RUN_EMPTY:
		mock_put_pages(w, 0, junk, 0);
		break;
	case BAD_RUN_WITHOUT_OFFSET:
		mock_put_record(w, MOCK_TAG_PAGES, 0, NULL, 0);
		break;
	case BAD_RUN_TOO_LONG:
		mock_put_pages(w, 0, junk, MOCK_RUN_PAGES + 1);
		break;
	case BAD_RUN_PART_OF_A_PAGE:
		mock_put_record(w, MOCK_TAG_PAGES, 0, junk, 8 + PAGE + 16);
		w->pages++;
		break;
	case BAD_RUN_HUGE:
		put_raw(w, MOCK_TAG_PAGES, 0, 8 + (1ULL << 62), junk, 8 + PAGE);
		break;
	case BAD_PAGES_OPTIONAL:
	case BAD_PAGES_FLAG_2:
		mock_put_pages(w, 0, good->memory, 1);
		i = w->out.len - (sizeof(struct mock_record) + 8 + PAGE);
		w->out.data[i + 4] = what == BAD_PAGES_OPTIONAL ? MOCK_OPTIONAL : 2;
		break;
	case BAD_IDENTITY_LATE:
		mock_put_identity(w, &good->identity);
		break;
	case BAD_UNKNOWN_TAG:
		mock_put_record(w, OTHER_TAG, 0, junk, 8);
		break;
	case BAD_UNKNOWN_TAG_0:
		mock_put_record(w, 0, 0, junk, 8);
		break;
	case BAD_UNKNOWN_FLAGS:
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL | 2, junk, 8);
		break;
	case BAD_OPTIONAL_TOO_LONG:
		free(junk);
		junk = calloc(1, MOCK_OPTIONAL_MAX + 1);
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL, junk, MOCK_OPTIONAL_MAX + 1);
		break;
	case BAD_OPTIONAL_HUGE:
		put_raw(w, OTHER_TAG, MOCK_OPTIONAL, ~0ULL, junk, 8);
		break;
	case BAD_TRAILER_EARLY:
		mock_put_trailer(w);
		break;
	case GOOD_OPTIONAL_RECORDS:
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL, NULL, 0);
		mock_put_record(w, OTHER_TAG + 1, MOCK_OPTIONAL, junk, 1);
		free(junk);
		junk = calloc(1, MOCK_OPTIONAL_MAX);
		mock_put_record(w, ~0U, MOCK_OPTIONAL, junk, MOCK_OPTIONAL_MAX);
		break;
	default:
		break;
	}
out:
	free(junk);
}

static void build_registers(struct mock_writer *w, const struct mock_image *good,
			    enum malformation what)
{
	__u8 *regs = calloc(1, good->registers_len + 8);
	size_t len = good->registers_len;

	memcpy(regs, good->registers, len);
	switch (what) {
	case BAD_REGISTERS_SHORT:
		mock_put_registers(w, regs, len - 8);
		break;
	case BAD_REGISTERS_LONG:
		mock_put_registers(w, regs, len + 8);
		break;
	case BAD_REGISTERS_EMPTY:
		mock_put_registers(w, regs, 0);
		break;
	case BAD_REGISTERS_TWICE:
		mock_put_registers(w, regs, len);
		mock_put_registers(w, regs, len);
		/* The digest of one record: whether the second is included does not matter. */
		w->digest -= vfio_mock_digest(3, regs, len);
		break;
	case BAD_REGISTERS_OPTIONAL:
		mock_put_record(w, MOCK_TAG_REGISTERS, MOCK_OPTIONAL, regs, len);
		w->digest += vfio_mock_digest(3, regs, len);
		break;
	case BAD_REGISTERS_MISSING:
		break;
	case BAD_REGISTERS_CONTENT:
		/* The state of no device, for example of another vendor. */
		memset(regs, 0xff, len);
		mock_put_registers(w, regs, len);
		break;
	case BAD_REGISTERS_VENDOR:
		regs[0] ^= 1;
		mock_put_registers(w, regs, len);
		break;
	case BAD_REGISTERS_RESERVED:
		regs[MOCK_REGISTERS_RESERVED] = 1;
		mock_put_registers(w, regs, len);
		break;
	case BAD_REGISTERS_PENDING:
		regs[MOCK_REGISTERS_PBA] = 1 << VFIO_MOCK_MSIX_VECTORS;
		mock_put_registers(w, regs, len);
		break;
	case BAD_PAGES_AFTER_REGISTERS:
		mock_put_registers(w, regs, len);
		mock_put_pages(w, 0, good->memory, 1);
		break;
	case GOOD_OPTIONAL_RECORDS:
		mock_put_registers(w, regs, len);
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL, regs, 5);
		break;
	default:
		mock_put_registers(w, regs, len);
	}
	free(regs);
}

static void build_trailer(struct mock_writer *w, const struct mock_image *good,
			  enum malformation what)
{
	struct mock_trailer trailer[2] = { mock_trailer_of(w), {} };
	struct mig_stream once = {};

	switch (what) {
	case BAD_TRAILER_MISSING:
		return;
	case BAD_TRAILER_SHORT:
		mock_put_record(w, MOCK_TAG_TRAILER, 0, trailer, sizeof(*trailer) - 8);
		return;
	case BAD_TRAILER_LONG:
		mock_put_record(w, MOCK_TAG_TRAILER, 0, trailer, sizeof(*trailer) + 8);
		return;
	case BAD_TRAILER_OPTIONAL:
		mock_put_record(w, MOCK_TAG_TRAILER, MOCK_OPTIONAL, trailer, sizeof(*trailer));
		return;
	case BAD_TRAILER_DIGEST:
		trailer->digest++;
		break;
	case BAD_TRAILER_PAGES:
		trailer->pages++;
		break;
	case BAD_TRAILER_RECORDS:
		trailer->records++;
		break;
	case BAD_TRAILER_BYTES:
		trailer->bytes++;
		break;
	default:
		break;
	}
	mock_put_record(w, MOCK_TAG_TRAILER, 0, trailer, sizeof(*trailer));

	switch (what) {
	case BAD_TRAILER_TWICE:
		mock_put_trailer(w);
		break;
	case BAD_TRAILING_BYTE:
		mig_stream_add(&w->out, "", 1);
		break;
	case BAD_TRAILING_OPTIONAL:
		mock_put_record(w, OTHER_TAG, MOCK_OPTIONAL, good->memory, 8);
		break;
	case BAD_IMAGE_TWICE:
		mig_stream_copy(&once, &w->out);
		mig_stream_add(&w->out, once.data, once.len);
		mig_stream_free(&once);
		break;
	default:
		break;
	}
}

static void build(struct mock_writer *w, const struct mock_image *good,
		  enum malformation what)
{
	build_identity(w, good, what);
	build_pages(w, good, what);
	build_registers(w, good, what);
	build_trailer(w, good, what);
}

static void expect_loads(struct __test_metadata *_metadata, struct subject *s,
			 const struct mig_stream *image, size_t chunk, const char *what)
{
	int fd, ret;

	fd = go(_metadata, &s->m.dev, MIG_RESUMING);
	ret = mig_load(fd, image->data, image->len, chunk, NULL);
	EXPECT_EQ(0, ret)
		PROMISE("%s: write() takes a good image", what);
	EXPECT_EQ(0, mig_set_state(&s->m.dev, MIG_STOP, NULL))
		PROMISE("%s: a good image is accepted at RESUMING -> STOP", what);
	expect_memory(_metadata, &s->m, s->good.memory, what);
	close(fd);
	ASSERT_EQ(0, mig_reset(&s->m.dev));
}

static void offer_each_malformation(struct __test_metadata *_metadata,
				    struct subject *s, size_t chunk)
{
	struct mock_writer w;
	const char *name;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(malformations); i++) {
		name = malformations[i].name;
		ASSERT_EQ(0, mock_writer_init(&w, &s->good));
		build(&w, &s->good, malformations[i].what);
		if (malformations[i].what < BAD_MAGIC) {
			/* The control: a stream without an error is accepted. */
			expect_loads(_metadata, s, &w.out, chunk, name);
		} else {
			expect_refused(_metadata, &s->m, w.out.data, w.out.len,
				       chunk, true, name, w.out.len);
		}
		mock_writer_free(&w);
	}
	expect_good_image_loads(_metadata, s);
}

TEST_F_TIMEOUT(refuse, every_malformation, 120)
{
	offer_each_malformation(_metadata, &self->s, 0);
}

TEST_F_TIMEOUT(refuse, every_malformation_in_small_chunks, 120)
{
	offer_each_malformation(_metadata, &self->s, 61);
}

TEST_F(refuse, empty_stream)
{
	expect_refused(_metadata, &self->s.m, NULL, 0, 0, true, "an empty stream", 0);
	expect_good_image_loads(_metadata, &self->s);
}

/* An incomplete image can be completed. */
TEST_F(refuse, incomplete_image_can_be_completed)
{
	struct subject *s = &self->s;
	size_t half = s->stream.len / 2;
	int fd;

	fd = go(_metadata, &s->m.dev, MIG_RESUMING);
	EXPECT_EQ(0, mig_load(fd, s->stream.data, half, 0, NULL));
	EXPECT_EQ(-EINVAL, mig_set_state(&s->m.dev, MIG_STOP, NULL))
		PROMISE("an incomplete image is refused");
	expect_state(_metadata, &s->m.dev, MIG_RESUMING, "after an incomplete image");
	EXPECT_EQ(0, mig_load(fd, s->stream.data + half, s->stream.len - half, 0, NULL))
		PROMISE("the rest may still be written");
	EXPECT_EQ(0, mig_set_state(&s->m.dev, MIG_STOP, NULL))
		PROMISE("the image is complete now");
	expect_memory(_metadata, &s->m, s->good.memory, "in STOP on the target");
}

/* After a refusal only RESET helps, not even a good image. */
TEST_F(refuse, good_image_after_an_error)
{
	struct mig_stream *s = &self->s.stream;
	int fd;

	fd = go(_metadata, &self->s.m.dev, MIG_RESUMING);
	s->data[0] ^= 1;
	EXPECT_EQ(-EINVAL, mig_load(fd, s->data, s->len, 0, NULL));
	s->data[0] ^= 1;
	EXPECT_EQ(-EINVAL, mig_load(fd, s->data, s->len, 0, NULL))
		PROMISE("a refusal sticks: later writes fail, too");
	EXPECT_EQ(-EINVAL, mig_set_state(&self->s.m.dev, MIG_STOP, NULL))
		PROMISE("a refusal sticks: RESUMING -> STOP fails");
	ASSERT_EQ(0, mig_reset(&self->s.m.dev));
	expect_good_image_loads(_metadata, &self->s);
}

TEST_F(refuse, page_run_across_a_group)
{
	struct mig_stream stream = {};
	struct mock_image image;
	struct mock_writer w;
	struct mock m;
	__u64 at;

	/* Only a device with more than one group of pages detects this. */
	MOCK_OPEN_OR_SKIP(&m, "medium", 0, variant->backend);
	take_image(_metadata, &m.dev, &stream);
	ASSERT_EQ(0, mock_image_parse(&image, &stream));
	ASSERT_EQ(0, mock_writer_init(&w, &image));
	mock_put_identity(&w, &image.identity);
	mock_put_all_pages(&w, &image);
	at = (MOCK_RUN_PAGES - 1) * PAGE;
	mock_put_pages(&w, at, image.memory + at, 2);
	mock_put_registers(&w, image.registers, image.registers_len);
	mock_put_trailer(&w);
	expect_refused(_metadata, &m, w.out.data, w.out.len, 0, true,
		       "a run that crosses a boundary of 64 pages", at);
	load_and_run(_metadata, &m.dev, &stream, 0);
	mock_close(&m);
}

TEST_F(refuse, image_of_another_size)
{
	struct mig_stream stream = {};
	struct mock m;

	MOCK_OPEN_OR_SKIP(&m, "medium", 0, variant->backend);
	take_image(_metadata, &m.dev, &stream);
	expect_refused(_metadata, &self->s.m, stream.data, stream.len, 0, true,
		       "an image of a larger device", 0);
	expect_good_image_loads(_metadata, &self->s);
	expect_refused(_metadata, &m, self->s.stream.data, self->s.stream.len, 0, true,
		       "an image of a smaller device", 0);
	load_and_run(_metadata, &m.dev, &stream, 0);
	mock_close(&m);
}

/* A write whose buffer faults takes the readable part; the rest can follow. */
TEST_F(refuse, write_across_fault_loses_nothing)
{
	size_t page = PAGE, at = 0, part;
	struct mig_stream *s = &self->s.stream;
	ssize_t ret;
	int fd;
	__u8 *map;

	map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, map);
	ASSERT_EQ(0, mprotect(map + page, page, PROT_NONE));

	fd = go(_metadata, &self->s.m.dev, MIG_RESUMING);
	EXPECT_ERRNO(EFAULT, write(fd, map + page, 16))
		PROMISE("EFAULT only when nothing was taken");
	EXPECT_EQ(0, write(fd, map, 0))
		PROMISE("a write of no bytes returns 0");
	while (at < s->len) {
		part = s->len - at < 1000 ? s->len - at : 1000;
		memcpy(map + page - part, s->data + at, part);
		ret = write(fd, map + page - part, 2 * part);
		if (ret < 0) {
			ASSERT_EQ(EFAULT, errno);
			ret = write(fd, map + page - part, part);
		}
		ASSERT_LT(0, ret);
		ASSERT_GE((ssize_t)part, ret)
			PROMISE("only the bytes taken are counted");
		at += ret;
	}
	EXPECT_EQ(0, mig_set_state(&self->s.m.dev, MIG_STOP, NULL))
		PROMISE("no byte is lost or taken twice");
	expect_memory(_metadata, &self->s.m, self->s.good.memory, "in STOP on the target");
}

#define BEGUN	64	/* bytes of a transfer before the page of the kill */

/* A readv() or writev() by a thread. */
struct transfer {
	int fd;
	bool reads;
	struct iovec iov[2];
};

static void *transfer_main(void *arg)
{
	struct transfer *t = arg;

	if (t->reads)
		readv(t->fd, t->iov, 2);
	else
		writev(t->fd, t->iov, 2);
	return NULL;
}

/*
 * A process that is killed in the middle of a readv() or writev() of the whole
 * stream, in a page fault that is resolved afterwards.
 */
static void kill_in_transfer(int fd, const struct mig_stream *stream, bool reads)
{
	struct transfer t = { .fd = fd, .reads = reads };
	struct mig_stall stall;
	pthread_t thread;
	__u8 *rest;
	size_t head;

	if (mig_stall_start(&stall))
		_exit(1);
	head = BEGUN + stall.len;
	rest = malloc(stream->len);
	if (!rest || stream->len <= head)
		_exit(2);
	memcpy((char *)stall.page - BEGUN, stream->data, BEGUN);
	memcpy(rest, stream->data + head, stream->len - head);
	t.iov[0] = (struct iovec){ (char *)stall.page - BEGUN, head };
	t.iov[1] = (struct iovec){ rest, stream->len - head };
	if (pthread_create(&thread, NULL, transfer_main, &t) || mig_stall_wait(&stall))
		_exit(3);
	if (mig_stall_fill(&stall, stream->data + BEGUN))
		_exit(4);
	kill(getpid(), SIGKILL);
	_exit(5);
}

/* Runs and waits for such a process. Returns whether userfaultfd is available. */
static bool killed_in_transfer(struct __test_metadata *_metadata, int fd,
			       const struct mig_stream *stream, bool reads)
{
	pid_t pid = fork();
	int status;

	ASSERT_LE(0, pid);
	if (!pid)
		kill_in_transfer(fd, stream, reads);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
		return false;
	ASSERT_TRUE(WIFSIGNALED(status))
		STEP("kill a process in a system call: exit status %d",
		     WEXITSTATUS(status));
	return true;
}

/* The rest of the stream remains for other readers. */
TEST_F(refuse, killed_reader_ends_within_a_chunk)
{
	struct subject *s = &self->s;
	__u64 before, after;
	int fd;

	populate(_metadata, &s->m, 0x5eed);
	fd = go(_metadata, &s->m.dev, MIG_STOP_COPY);
	ASSERT_EQ(0, mig_data_size(&s->m.dev, &before));
	if (!killed_in_transfer(_metadata, fd, &s->stream, true))
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, mig_data_size(&s->m.dev, &after));
	EXPECT_LT(after, before)
		STEP("kill a reader that has begun");
	EXPECT_GE((__u64)BEGUN, before - after)
		PROMISE("a killed reader reads no further chunk (%llu of %llu bytes are left)",
			after, before);
	close(fd);
}

/* The rest of the stream can be written by others. */
TEST_F(refuse, killed_writer_ends_within_a_block)
{
	struct subject *s = &self->s;
	struct mig_stream rest = {};
	int fd;

	fd = go(_metadata, &s->m.dev, MIG_RESUMING);
	if (!killed_in_transfer(_metadata, fd, &s->stream, false))
		SKIP(return, "no userfaultfd");
	EXPECT_EQ(-EINVAL, mig_set_state(&s->m.dev, MIG_STOP, NULL))
		PROMISE("a killed writer writes no further block");
	EXPECT_EQ(0, mig_stream_add(&rest, s->stream.data + BEGUN,
				    s->stream.len - BEGUN));
	EXPECT_EQ(0, mig_load(fd, rest.data, rest.len, 0, NULL))
		PROMISE("the data of a killed writer is loaded once");
	EXPECT_EQ(0, mig_set_state(&s->m.dev, MIG_STOP, NULL))
		PROMISE("the data of a killed writer is loaded once");
	close(fd);
}

/* A whole migration without a copy to user memory. */
TEST_F(refuse, splice_moves_a_stream_from_device_to_device)
{
	struct subject *s = &self->s;
	int fd, to, pipes[2];
	struct mock dst;
	ssize_t in, out;

	MOCK_OPEN_OR_SKIP(&dst, "small", 1, variant->backend);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	populate(_metadata, &s->m, 0x5eed);
	fd = go(_metadata, &s->m.dev, MIG_STOP_COPY);
	to = go(_metadata, &dst.dev, MIG_RESUMING);
	EXPECT_ERRNO(EINVAL, sendfile(to, fd, NULL, 4096))
		PROMISE("sendfile() is for files with a position");
	while ((in = splice(fd, NULL, pipes[1], NULL, 1 << 20, 0)) > 0) {
		while (in) {
			out = splice(pipes[0], NULL, to, NULL, in, 0);
			ASSERT_LT(0, out)
				PROMISE("splice() to a data_fd (%s)", strerror(errno));
			in -= out;
		}
	}
	EXPECT_EQ(0, in)
		PROMISE("permanent end of stream: splice() returns 0 (%s)",
			strerror(errno));
	EXPECT_EQ(0, mig_set_state(&dst.dev, MIG_STOP, NULL))
		PROMISE("splice() neither loses nor repeats bytes");
	expect_memory(_metadata, &dst, s->good.memory, "in STOP on the target");
	ASSERT_EQ(0, mig_reset(&dst.dev));
	close(to);

	/* A refusal of bad bytes persists. */
	to = go(_metadata, &dst.dev, MIG_RESUMING);
	ASSERT_EQ(3, write(pipes[1], "bad", 3));
	ASSERT_EQ(4096, write(pipes[1], s->good.memory, 4096));
	EXPECT_ERRNO(EINVAL, splice(pipes[0], NULL, to, NULL, 4099, 0))
		PROMISE("splice() to a data_fd refuses a bad record with EINVAL");
	EXPECT_EQ(-EINVAL, mig_load(to, s->stream.data, 64, 0, NULL))
		PROMISE("a refusal sticks");
	close(to);
	close(pipes[0]);
	close(pipes[1]);
	mock_close(&dst);
}

TEST_F(refuse, splice_returns_enomsg_at_temporary_end)
{
	struct subject *s = &self->s;
	struct mig_stream rest = {};
	int fd, pipes[2];
	ssize_t in;

	NEED_PRE_COPY(&s->m.dev);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	populate(_metadata, &s->m, 0x5eed);
	fd = go(_metadata, &s->m.dev, MIG_PRE_COPY);
	while ((in = splice(fd, NULL, pipes[1], NULL, 1 << 20, 0)) > 0)
		ASSERT_EQ(in, mig_read(pipes[0], &rest, in));
	EXPECT_ERRNO(ENOMSG, in)
		PROMISE("splice() returns ENOMSG at the temporary end");
	EXPECT_LT(0x10000U, rest.len)
		PROMISE("all of the memory precedes the temporary end");
	EXPECT_EQ(0, mig_poll(pipes[0], POLLIN, 0))
		PROMISE("the pipe is empty at the temporary end");
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

MIG_HARNESS_MAIN(mock_options)
