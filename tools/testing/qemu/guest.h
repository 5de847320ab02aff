/* SPDX-License-Identifier: GPL-2.0 */
/* Common declarations of the demo's guest program. */
#ifndef GUEST_H
#define GUEST_H

#include <errno.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdnoreturn.h>

#include "vfio_mock.h"

#define PCI_DEVICES	"/sys/bus/pci/devices"
#define IRQ_TIMEOUT_MS	20000

/* Features of a device. */
struct kind {
	__u16 vendor, id;	/* of the PCI device */
	unsigned int bar;	/* the one that is the memory */
	__u64 header;		/* read-only bytes at the memory's start */
	__u64 magic;		/* the first word of the header */
	bool engine;		/* has registers, commands and interrupts */
	bool display;		/* shows a part of its memory */
};

struct counters {
	__u64 written;		/* bytes written to the memory */
	__u64 filled;		/* bytes the device was told to write */
	__u64 doorbells;
	__u64 irqs;
	__u64 transfers;	/* that have ended as they must */
	__u64 moved;		/* bytes the device moved by DMA */
	__u64 dma_irqs;
	__u64 checks;		/* values compared with the model */
	__u64 mismatches;
};

/* Expected values of the registers. */
struct registers {
	__u64 scratch;
	__u64 addr;
	__u64 len;
	__u64 seed;
	__u64 result;
	__u64 completions;
	__u32 irq_vector;
};

struct peer;

struct device {
	const struct kind *kind;
	char pci[256];
	__u8 *regs;
	__u8 *mem;
	__u64 size;
	__u64 work;		/* what of it is not left to DMA or the picture */
	__u64 picture;		/* where that begins */
	__u64 page;		/* bytes: of the host's kernel, if a register tells */
	__u8 *model;
	struct registers want;
	int irq[VFIO_MOCK_MSIX_VECTORS];
	unsigned int vectors;	/* those of commands, from 0 on */
	__u64 generation;
	struct counters count;
	struct peer *peer;	/* its DMA, if it does any */
};

extern FILE *report;

/* Adds a part of a line. say() completes and sends the line. */
#define tell(...)	fprintf(report, __VA_ARGS__)

#define say(...)				\
	do {					\
		tell(__VA_ARGS__);		\
		end_line();			\
	} while (0)

/* Reports why the guest cannot work, and keeps the machine running for the reader. */
#define die(...)				\
	do {					\
		int __error = errno;		\
						\
		tell("@fatal what=\"");		\
		tell(__VA_ARGS__);		\
		halt(__error);			\
	} while (0)

void end_line(void);
noreturn void halt(int error);

void *map_bar(struct device *d, unsigned int bar, __u64 *size);
__u64 now_ms(void);
__u64 pick(const struct device *d, __u64 salt, __u64 limit);
void leave_guest(void);
__u64 mmio_read(const void *p, unsigned int width);
void mmio_write(void *p, unsigned int width, __u64 value);
void check(struct device *d, const char *where, __u64 offset, __u64 want,
	   __u64 got);
void mem_store(struct device *d, __u64 offset, unsigned int width, __u64 word);
void check_reg(struct device *d, const char *name, unsigned int reg,
	       unsigned int width, __u64 want);
__u64 take_irqs(struct device *d, unsigned int vector);
void await_irq(struct device *d, unsigned int vector);

/* The page size of the kernel of the guest. */
__u64 guest_page(void);

void display_open(struct device *d);
void display_draw(struct device *d);
void display_turn(struct device *d);
void display_verify(struct device *d);

bool peers_open(struct device *one, struct device *other);
void peers_start(struct device *d);
void peers_turn(struct device *d);
void peers_stop(struct device *d);

#endif /* GUEST_H */
