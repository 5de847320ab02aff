/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The migration stream of vfio_mock: a strict parser, and a writer of streams that
 * are wrong in a chosen place and consistent otherwise.
 */
#ifndef MOCK_IMAGE_H
#define MOCK_IMAGE_H

#include <stddef.h>

#include <linux/types.h>

#include "mig.h"

#define MOCK_TAG_IDENTITY	1
#define MOCK_TAG_PAGES		2
#define MOCK_TAG_REGISTERS	3
#define MOCK_TAG_TRAILER	4

#define MOCK_OPTIONAL		1	/* record flag */
#define MOCK_OPTIONAL_MAX	(1 << 20)

#define MOCK_STREAM_MAGIC	0x3154534b434f4d56ULL	/* "VMOCKST1" */
#define MOCK_STREAM_VERSION	1

/* The payload of REGISTERS: config space, registers, MSI-X table, pending bits. */
#define MOCK_REGISTERS_LEN	1456
#define MOCK_REGISTERS_RESERVED	316	/* a word that is zero */
#define MOCK_REGISTERS_PBA	384

#define MOCK_RUN_PAGES		64	/* a run stays inside one such group */

struct mock_record {
	__u32 tag;
	__u32 flags;
	__u64 length;
};

struct mock_identity {
	__u64 magic;
	__u32 version;
	__u32 page_size;
	__u64 state_size;
	__u64 features;
};

struct mock_trailer {
	__u64 digest;
	__u64 pages;
	__u64 records;
	__u64 bytes;
};

/* A parsed stream. */
struct mock_image {
	struct mock_identity identity;
	struct mock_trailer trailer;
	__u8 *memory;
	__u8 *registers;
	size_t registers_len;
	/* Bytes that are not page contents, in ascending order. */
	size_t *header_bytes;
	size_t nr_header_bytes;
	char why[128];		/* reason for the failure */
};

/* 0, or -EBADMSG for an invalid stream; image->why has the reason. */
int mock_image_parse(struct mock_image *image, const struct mig_stream *stream);
void mock_image_free(struct mock_image *image);

/*
 * Parses a round of pre-copy after the first one: the number of times that each
 * page was sent, and its last content.
 */
int mock_round_parse(const struct mig_stream *round, __u8 *sent, __u8 *content,
		     __u64 pages);

/* A stream being built. */
struct mock_writer {
	struct mig_stream out;
	__u64 digest;
	__u64 pages;
	__u64 records;
	__u64 *page_digests;	/* by page number; pages past the state do not count */
	__u64 nr_pages;
};

int mock_writer_init(struct mock_writer *w, const struct mock_image *image);
void mock_writer_free(struct mock_writer *w);

void mock_put_record(struct mock_writer *w, __u32 tag, __u32 flags,
		     const void *payload, __u64 len);
void mock_put_identity(struct mock_writer *w, const struct mock_identity *identity);
void mock_put_pages(struct mock_writer *w, __u64 offset, const void *pages, __u64 nr);
void mock_put_all_pages(struct mock_writer *w, const struct mock_image *image);
void mock_put_registers(struct mock_writer *w, const void *payload, size_t len);
/* The trailer that fits the records so far. */
struct mock_trailer mock_trailer_of(const struct mock_writer *w);
void mock_put_trailer(struct mock_writer *w);

#endif /* MOCK_IMAGE_H */
