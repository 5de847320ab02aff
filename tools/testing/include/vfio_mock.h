/* SPDX-License-Identifier: GPL-2.0 */
/*
 * User interface of vfio_mock: identity, registers, and the functions for the
 * content of its memory, pattern and digest.
 *
 * For user space programs. All values are little-endian; functions that access
 * 64-bit words require a little-endian host.
 */
#ifndef VFIO_MOCK_H
#define VFIO_MOCK_H

#include <linux/types.h>
#include <string.h>

#define VFIO_MOCK_VENDOR_ID	0x1af4
#define VFIO_MOCK_DEVICE_ID	0x10f0
#define VFIO_MOCK_CLASS		0xff0000

#define VFIO_MOCK_MAGIC		0x4b4d4656	/* "VFMK" */
#define VFIO_MOCK_ABI_VERSION	1

#define VFIO_MOCK_BAR0_SIZE	0x4000
#define VFIO_MOCK_MSIX_CAP	0x40
#define VFIO_MOCK_MSIX_VECTORS	4
#define VFIO_MOCK_MSIX_TABLE	0x1000
#define VFIO_MOCK_MSIX_PBA	0x2000

/* Registers in BAR0 */
#define VFIO_MOCK_REG_MAGIC		0x00	/* u32, read-only */
#define VFIO_MOCK_REG_ABI_VERSION	0x04	/* u32, read-only */
#define VFIO_MOCK_REG_STATE_SIZE	0x08	/* u64, read-only: bytes of BAR2 */
#define VFIO_MOCK_REG_PAGE_SIZE		0x10	/* u32, read-only: of the host, in bytes */
#define VFIO_MOCK_REG_STATUS		0x14	/* u32, read-only */
#define VFIO_MOCK_REG_SCRATCH		0x18	/* u64 */
#define VFIO_MOCK_REG_ADDR		0x20	/* u64: byte offset in BAR2 */
#define VFIO_MOCK_REG_LEN		0x28	/* u64: bytes */
#define VFIO_MOCK_REG_SEED		0x30	/* u64 */
#define VFIO_MOCK_REG_DOORBELL		0x38	/* u32, write-only: a command */
#define VFIO_MOCK_REG_IRQ_VECTOR	0x3c	/* u32: signalled on completion */
#define VFIO_MOCK_REG_RESULT		0x40	/* u64, read-only */
#define VFIO_MOCK_REG_COMPLETIONS	0x48	/* u64, read-only */
#define VFIO_MOCK_REG_ERROR		0x50	/* u32, read-only */
#define VFIO_MOCK_REG_DROPPED		0x58	/* u64, read-only, not migrated */
#define VFIO_MOCK_REG_DMA_DOORBELL	0x60	/* u32, write-only: a descriptor */
#define VFIO_MOCK_REG_DMA_ABORT		0x64	/* u32, write-only */
#define VFIO_MOCK_REG_DMA_STATUS	0x68	/* u32, read-only */
#define VFIO_MOCK_REG_DMA_ERROR		0x6c	/* u32, read-only */
#define VFIO_MOCK_REG_DMA_DONE		0x70	/* u64, read-only */
#define VFIO_MOCK_REG_DMA_BYTES		0x78	/* u64, read-only */
#define VFIO_MOCK_REGS_END		0x80

/* DMA descriptors in BAR0 */
#define VFIO_MOCK_DMA_DESCS		16
#define VFIO_MOCK_DMA_DESC(n)		(0x400 + (n) * 0x40)
#define VFIO_MOCK_DMA_ALL		0xffffffffU	/* for DMA_ABORT */

struct vfio_mock_dma_desc {
	__u64 iova;
	__u64 addr;		/* byte offset in BAR2 */
	__u64 len;		/* bytes */
	__u64 seed;
	__u32 op;
	__u32 irq_vector;
	__u32 period;		/* microseconds, 0: once */
	__u32 step;		/* bytes each period, 0: all of them */
	__u32 status;		/* read-only */
	__u32 error;		/* read-only */
	__u64 pos;		/* read-only: bytes moved */
};

#define VFIO_MOCK_DMA_STATUS_BUSY	0x1
#define VFIO_MOCK_DMA_STATUS_PAUSED	0x2

#define VFIO_MOCK_DMA_READ		1	/* user memory to BAR2 */
#define VFIO_MOCK_DMA_WRITE		2	/* BAR2 to user memory */
#define VFIO_MOCK_DMA_FILL		3	/* the pattern to user memory */
#define VFIO_MOCK_DMA_CHURN		4	/* the pattern to BAR2 */

#define VFIO_MOCK_DMA_IDLE		0
#define VFIO_MOCK_DMA_QUEUED		1
#define VFIO_MOCK_DMA_ACTIVE		2
#define VFIO_MOCK_DMA_COMPLETE		3
#define VFIO_MOCK_DMA_FAILED		4
#define VFIO_MOCK_DMA_ABORTED		5

#define VFIO_MOCK_DMA_ERROR_NONE	0
#define VFIO_MOCK_DMA_ERROR_OP		1
#define VFIO_MOCK_DMA_ERROR_RANGE	2
#define VFIO_MOCK_DMA_ERROR_UNMAPPED	3
#define VFIO_MOCK_DMA_ERROR_DENIED	4
#define VFIO_MOCK_DMA_ERROR_FAULT	5
#define VFIO_MOCK_DMA_ERROR_NO_MEMORY	6
#define VFIO_MOCK_DMA_ERROR_OTHER	7

/* In DMA_ERROR */
#define VFIO_MOCK_DMA_REFUSED_INDEX	1	/* no such descriptor */
#define VFIO_MOCK_DMA_REFUSED_BUSY	2	/* in use by the device */

#define VFIO_MOCK_STATUS_DONE		0x2
#define VFIO_MOCK_STATUS_ERROR		0x4

#define VFIO_MOCK_CMD_FILL		1
#define VFIO_MOCK_CMD_CHECKSUM		2
#define VFIO_MOCK_CMD_REINIT		3

#define VFIO_MOCK_ERROR_NONE		0
#define VFIO_MOCK_ERROR_COMMAND		1
#define VFIO_MOCK_ERROR_RANGE		2
#define VFIO_MOCK_ERROR_KILLED		3

#define VFIO_MOCK_IRQ_NONE		0xffffffffU

#define VFIO_MOCK_GOLDEN		0x9E3779B97F4A7C15ULL

/* The finaliser of splitmix64. */
static inline __u64 vfio_mock_mix(__u64 z)
{
	z ^= z >> 30;
	z *= 0xBF58476D1CE4E5B9ULL;
	z ^= z >> 27;
	z *= 0x94D049BB133111EBULL;
	z ^= z >> 31;
	return z;
}

/* Returns the 8 bytes of the pattern of @seed at device offset 8 * @index. */
static inline __u64 vfio_mock_pattern_word(__u64 seed, __u64 index)
{
	return vfio_mock_mix(seed + (index + 1) * VFIO_MOCK_GOLDEN);
}

/* Returns the byte of the pattern of @seed at device offset @offset. */
static inline __u8 vfio_mock_pattern_byte(__u64 seed, __u64 offset)
{
	return vfio_mock_pattern_word(seed, offset >> 3) >> (8 * (offset & 7));
}

/* Fills @buf like FILL with @seed fills [@offset, @offset + @len). */
static inline void vfio_mock_pattern(void *buf, __u64 seed, __u64 offset,
				     __u64 len)
{
	__u8 *p = buf;
	__u64 word;

	while (len && (offset & 7)) {
		*p++ = vfio_mock_pattern_byte(seed, offset++);
		len--;
	}
	for (; len >= 8; len -= 8, offset += 8, p += 8) {
		word = vfio_mock_pattern_word(seed, offset >> 3);
		memcpy(p, &word, 8);
	}
	while (len--)
		*p++ = vfio_mock_pattern_byte(seed, offset++);
}

/* Returns the digest @h extended by @word. */
static inline __u64 vfio_mock_digest_word(__u64 h, __u64 word)
{
	return (word - ((h << 5) | (h >> 59))) * VFIO_MOCK_GOLDEN;
}

/* Returns @h extended by @len bytes; a last short word is padded with zeroes. */
static inline __u64 vfio_mock_digest(__u64 h, const void *buf, __u64 len)
{
	const __u8 *p = buf;
	__u64 word;

	for (; len >= 8; len -= 8, p += 8) {
		memcpy(&word, p, 8);
		h = vfio_mock_digest_word(h, word);
	}
	if (len) {
		word = 0;
		memcpy(&word, p, len);
		h = vfio_mock_digest_word(h, word);
	}
	return h;
}

/* Returns the RESULT of the command CHECKSUM for a range with the content @buf. */
static inline __u64 vfio_mock_checksum(const void *buf, __u64 len)
{
	return vfio_mock_digest(len, buf, len);
}

#endif /* VFIO_MOCK_H */
