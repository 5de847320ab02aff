// SPDX-License-Identifier: GPL-2.0
/*
 * The picture of a bochs-display device. It is at the end of the memory, and the rest
 * of the memory is used like that of other devices. Each generation draws one row again,
 * in other colours.
 */
#include "guest.h"

#define WIDTH	640
#define HEIGHT	480
/* The bytes of a row. */
#define STRIDE	(WIDTH * 4)

/* The VBE registers in BAR2, and their indexes. */
#define VBE		0x500
#define VBE_XRES	1
#define VBE_YRES	2
#define VBE_BPP		3
#define VBE_ENABLE	4
#define VBE_VIRT_WIDTH	6
#define VBE_Y_OFFSET	9

/* The first row of the picture. */
static unsigned int first_row(const struct device *d)
{
	return d->size / STRIDE - HEIGHT;
}

/* A pixel of waves that move away from two points in the picture. */
static __u32 pixel(unsigned int x, unsigned int y, unsigned int phase)
{
	int x1 = x - WIDTH / 4, x2 = x - WIDTH * 3 / 4, y1 = y - HEIGHT / 2;
	__u32 one = (x1 * x1 + y1 * y1) / 128 - phase;
	__u32 two = (x2 * x2 + y1 * y1) / 128 - phase;
	__u32 wave = (one & 0x80 ? ~one : one) & 0x7f;
	__u32 other = (two & 0x80 ? ~two : two) & 0x7f;

	return (wave + other) << 16 | (y * 255 / HEIGHT) << 8 | (x * 255 / WIDTH);
}

static void draw_row(struct device *d, unsigned int y, unsigned int phase)
{
	__u64 at = d->picture + y * STRIDE;
	unsigned int x;

	for (x = 0; x < WIDTH; x += 2)
		mem_store(d, at + x * 4, 8,
			  pixel(x, y, phase) | (__u64)pixel(x + 1, y, phase) << 32);
}

typedef void (*register_fn)(struct device *d, unsigned int reg, unsigned int value);

/* Calls @fn for each register that has a value other than that at power on. */
static void each_register(struct device *d, register_fn fn)
{
	fn(d, VBE_XRES, WIDTH);
	fn(d, VBE_YRES, HEIGHT);
	fn(d, VBE_BPP, 32);
	fn(d, VBE_ENABLE, 0x41);
	fn(d, VBE_VIRT_WIDTH, WIDTH);
	fn(d, VBE_Y_OFFSET, first_row(d));
}

static void set(struct device *d, unsigned int reg, unsigned int value)
{
	mmio_write(d->regs + VBE + reg * 2, 2, value);
}

static void verify(struct device *d, unsigned int reg, unsigned int value)
{
	check_reg(d, "vbe", VBE + reg * 2, 2, value);
}

void display_open(struct device *d)
{
	__u64 size;

	d->regs = map_bar(d, 2, &size);
	if (d->size < HEIGHT * STRIDE) {
		errno = EINVAL;
		die("%s has %llu bytes of memory", d->pci, d->size);
	}
	d->picture = (__u64)first_row(d) * STRIDE;
	d->work = d->picture / d->page * d->page;
}

void display_draw(struct device *d)
{
	unsigned int y;

	for (y = 0; y < HEIGHT; y++)
		draw_row(d, y, 0);
	each_register(d, set);
}

void display_turn(struct device *d)
{
	draw_row(d, d->generation % HEIGHT, d->generation / HEIGHT * 16);
}

void display_verify(struct device *d)
{
	each_register(d, verify);
}
