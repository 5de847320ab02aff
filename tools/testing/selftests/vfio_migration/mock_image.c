// SPDX-License-Identifier: GPL-2.0
/*
 * The migration stream of vfio_mock, written from its documentation,
 * independently of the driver.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mock_image.h"
#include "vfio_mock.h"

#define PAGE	mig_page_size()

/* Never 0, which marks a page that was not sent. */
static __u64 page_digest(__u64 page, const void *content)
{
	__u64 lanes[4], start = page + 0x100, digest, word;
	unsigned int i;

	for (i = 0; i < 4; i++)
		lanes[i] = start;
	for (i = 0; i < PAGE / 8; i++) {
		memcpy(&word, (const __u8 *)content + 8 * i, 8);
		lanes[i % 4] = vfio_mock_digest_word(lanes[i % 4], word);
	}
	digest = vfio_mock_digest(start, lanes, sizeof(lanes));
	return digest ? digest : 1;
}

static int __attribute__((format(printf, 2, 3)))
bad(struct mock_image *image, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(image->why, sizeof(image->why), fmt, ap);
	va_end(ap);
	return -EBADMSG;
}

static void note_header(struct mock_image *image, size_t at, size_t len)
{
	while (len--)
		image->header_bytes[image->nr_header_bytes++] = at++;
}

static int parse_identity(struct mock_image *image, const struct mock_record *rec,
			  const __u8 *payload, __u64 *digest)
{
	struct mock_identity *id = &image->identity;

	if (rec->length != sizeof(*id))
		return bad(image, "IDENTITY of %llu bytes", rec->length);
	memcpy(id, payload, sizeof(*id));
	if (id->magic != MOCK_STREAM_MAGIC || id->version != MOCK_STREAM_VERSION ||
	    id->page_size != PAGE || id->features)
		return bad(image, "IDENTITY is magic %#llx version %u page size %u features %#llx",
			   id->magic, id->version, id->page_size, id->features);
	*digest += vfio_mock_digest(1, payload, rec->length);
	image->memory = calloc(1, id->state_size);
	return image->memory ? 0 : -ENOMEM;
}

static int parse_pages(struct mock_image *image, const struct mock_record *rec,
		       const __u8 *payload, __u64 *digests, __u64 *digest)
{
	__u64 offset, nr = (rec->length - 8) / PAGE, i, page, now;

	memcpy(&offset, payload, sizeof(offset));
	if (rec->length < 8 + PAGE || (rec->length - 8) % PAGE)
		return bad(image, "PAGES of %llu bytes", rec->length);
	if (nr > MOCK_RUN_PAGES || offset % PAGE ||
	    offset / PAGE / MOCK_RUN_PAGES !=
	    (offset / PAGE + nr - 1) / MOCK_RUN_PAGES ||
	    offset + nr * PAGE > image->identity.state_size)
		return bad(image, "PAGES of %llu pages at %#llx", nr, offset);
	memcpy(image->memory + offset, payload + 8, nr * PAGE);
	for (i = 0; i < nr; i++) {
		page = offset / PAGE + i;
		now = page_digest(page, payload + 8 + i * PAGE);
		*digest += now - digests[page];
		digests[page] = now;
	}
	return 0;
}

static int parse(struct mock_image *image, const struct mig_stream *s,
		 __u64 **digests)
{
	__u64 digest = 0, pages = 0, records = 0, page;
	struct mock_record rec = {};
	const __u8 *payload;
	size_t at = 0;
	int ret = 0;

	for (; rec.tag != MOCK_TAG_TRAILER; at += rec.length) {
		if (s->len - at < sizeof(rec))
			return bad(image, "the stream ends inside a record header at %zu", at);
		memcpy(&rec, s->data + at, sizeof(rec));
		note_header(image, at, sizeof(rec));
		at += sizeof(rec);
		if (rec.length > s->len - at)
			return bad(image, "record %llu (tag %u) at %zu is %llu bytes long, %zu are left",
				   records, rec.tag, at - sizeof(rec), rec.length, s->len - at);
		payload = s->data + at;
		if (rec.flags)
			return bad(image, "record %llu has flags %#x", records, rec.flags);
		if (rec.tag == MOCK_TAG_IDENTITY ? records : !records)
			return bad(image, "record %llu is of tag %u", records, rec.tag);
		if (image->registers && rec.tag != MOCK_TAG_TRAILER)
			return bad(image, "tag %u follows REGISTERS", rec.tag);

		switch (rec.tag) {
		case MOCK_TAG_IDENTITY:
			ret = parse_identity(image, &rec, payload, &digest);
			if (ret)
				return ret;
			*digests = calloc(image->identity.state_size / PAGE, sizeof(__u64));
			if (!*digests)
				return -ENOMEM;
			note_header(image, at, rec.length);
			break;
		case MOCK_TAG_PAGES:
			ret = parse_pages(image, &rec, payload, *digests, &digest);
			if (ret)
				return ret;
			note_header(image, at, 8);
			pages += (rec.length - 8) / PAGE;
			break;
		case MOCK_TAG_REGISTERS:
			image->registers = malloc(rec.length + 1);
			if (!image->registers)
				return -ENOMEM;
			memcpy(image->registers, payload, rec.length);
			image->registers_len = rec.length;
			digest += vfio_mock_digest(3, payload, rec.length);
			note_header(image, at, rec.length);
			break;
		case MOCK_TAG_TRAILER:
			if (rec.length != sizeof(image->trailer))
				return bad(image, "TRAILER of %llu bytes", rec.length);
			memcpy(&image->trailer, payload, sizeof(image->trailer));
			note_header(image, at, rec.length);
			continue;
		default:
			return bad(image, "record %llu has unknown tag %u", records, rec.tag);
		}
		records++;
	}

	if (at != s->len)
		return bad(image, "%zu bytes follow TRAILER", s->len - at);
	if (!image->registers)
		return bad(image, "REGISTERS is missing");
	for (page = 0; page < image->identity.state_size / PAGE; page++)
		if (!(*digests)[page])
			return bad(image, "page %llu was never sent", page);
	if (image->trailer.digest != digest || image->trailer.pages != pages ||
	    image->trailer.records != records ||
	    image->trailer.bytes != s->len - sizeof(rec) - sizeof(image->trailer))
		return bad(image, "TRAILER says digest %#llx pages %llu records %llu bytes %llu, counted %#llx %llu %llu",
			   image->trailer.digest, image->trailer.pages,
			   image->trailer.records, image->trailer.bytes, digest, pages, records);
	return 0;
}

int mock_image_parse(struct mock_image *image, const struct mig_stream *stream)
{
	__u64 *digests = NULL;
	int ret;

	*image = (struct mock_image){};
	image->header_bytes = calloc(stream->len, sizeof(*image->header_bytes));
	if (!image->header_bytes)
		return -ENOMEM;
	ret = parse(image, stream, &digests);
	free(digests);
	return ret;
}

void mock_image_free(struct mock_image *image)
{
	free(image->memory);
	free(image->registers);
	free(image->header_bytes);
	*image = (struct mock_image){};
}

int mock_round_parse(const struct mig_stream *round, __u8 *sent, __u8 *content,
		     __u64 pages)
{
	struct mock_record rec;
	__u64 offset, nr;
	size_t at = 0;

	while (at < round->len) {
		if (round->len - at < sizeof(rec) + sizeof(offset))
			return -EBADMSG;
		memcpy(&rec, round->data + at, sizeof(rec));
		memcpy(&offset, round->data + at + sizeof(rec), sizeof(offset));
		at += sizeof(rec);
		nr = (rec.length - sizeof(offset)) / PAGE;
		if (rec.tag != MOCK_TAG_PAGES || rec.length > round->len - at ||
		    !nr || (rec.length - sizeof(offset)) % PAGE || offset % PAGE ||
		    offset / PAGE >= pages || nr > pages - offset / PAGE)
			return -EBADMSG;
		memcpy(content + offset, round->data + at + sizeof(offset), nr * PAGE);
		at += rec.length;
		for (offset /= PAGE; nr; nr--, offset++)
			sent[offset]++;
	}
	return 0;
}

int mock_writer_init(struct mock_writer *w, const struct mock_image *image)
{
	*w = (struct mock_writer){
		.nr_pages = image->identity.state_size / PAGE,
	};
	w->page_digests = calloc(w->nr_pages, sizeof(__u64));
	return w->page_digests ? 0 : -ENOMEM;
}

void mock_writer_free(struct mock_writer *w)
{
	mig_stream_free(&w->out);
	free(w->page_digests);
	*w = (struct mock_writer){};
}

static void put(struct mock_writer *w, const void *data, __u64 len)
{
	if (mig_stream_add(&w->out, data, len))
		abort();
}

void mock_put_record(struct mock_writer *w, __u32 tag, __u32 flags,
		     const void *payload, __u64 len)
{
	struct mock_record rec = { .tag = tag, .flags = flags, .length = len };

	put(w, &rec, sizeof(rec));
	put(w, payload, len);
	w->records++;
}

void mock_put_identity(struct mock_writer *w, const struct mock_identity *identity)
{
	mock_put_record(w, MOCK_TAG_IDENTITY, 0, identity, sizeof(*identity));
	w->digest += vfio_mock_digest(1, identity, sizeof(*identity));
}

void mock_put_pages(struct mock_writer *w, __u64 offset, const void *pages, __u64 nr)
{
	struct mock_record rec = {
		.tag = MOCK_TAG_PAGES, .length = 8 + nr * PAGE,
	};
	__u64 i, page, now;

	put(w, &rec, sizeof(rec));
	put(w, &offset, sizeof(offset));
	put(w, pages, nr * PAGE);
	w->records++;
	w->pages += nr;
	for (i = 0; i < nr; i++) {
		page = offset / PAGE + i;
		if (page >= w->nr_pages)
			continue;
		now = page_digest(page, (const __u8 *)pages + i * PAGE);
		w->digest += now - w->page_digests[page];
		w->page_digests[page] = now;
	}
}

void mock_put_all_pages(struct mock_writer *w, const struct mock_image *image)
{
	__u64 at, step = MOCK_RUN_PAGES * PAGE, left;

	for (at = 0; at < image->identity.state_size; at += step) {
		left = image->identity.state_size - at;
		mock_put_pages(w, at, image->memory + at,
			       (left < step ? left : step) / PAGE);
	}
}

void mock_put_registers(struct mock_writer *w, const void *payload, size_t len)
{
	mock_put_record(w, MOCK_TAG_REGISTERS, 0, payload, len);
	w->digest += vfio_mock_digest(3, payload, len);
}

struct mock_trailer mock_trailer_of(const struct mock_writer *w)
{
	return (struct mock_trailer){
		.digest = w->digest, .pages = w->pages, .records = w->records,
		.bytes = w->out.len,
	};
}

void mock_put_trailer(struct mock_writer *w)
{
	struct mock_trailer trailer = mock_trailer_of(w);

	mock_put_record(w, MOCK_TAG_TRAILER, 0, &trailer, sizeof(trailer));
}
