// SPDX-License-Identifier: GPL-2.0
/*
 * The configuration space of a PCI device, and the regions that it describes. It
 * belongs to the VMM, which restores its writable part on the target.
 */

#define CONFIG	VFIO_PCI_CONFIG_REGION_INDEX

#define NEED_PCI(dev) do {							\
	if (!((dev)->info.flags & VFIO_DEVICE_FLAGS_PCI))			\
		SKIP(return, "the device is not a PCI device");			\
} while (0)

static __u32 get_config(struct __test_metadata *_metadata,
			const struct mig_device *dev, unsigned int at, size_t size)
{
	__u8 bytes[4] = {};

	ASSERT_EQ((ssize_t)size, mig_region_read(dev, CONFIG, at, bytes, size))
		STEP("read %zu bytes at %#x of the configuration space", size, at);
	return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (__u32)bytes[3] << 24;
}

static void put_config(struct __test_metadata *_metadata, const struct mig_device *dev,
		       unsigned int at, size_t size, __u32 value)
{
	__u8 bytes[4] = { value, value >> 8, value >> 16, value >> 24 };

	ASSERT_EQ((ssize_t)size, mig_region_write(dev, CONFIG, at, bytes, size))
		STEP("write %zu bytes at %#x of the configuration space", size, at);
}

/* The size of a region; 0 if the device does not have it. */
static __u64 region_size(const struct mig_device *dev, __u32 index)
{
	struct vfio_region_info info;

	return mig_region_info(dev, index, &info) ? 0 : info.size;
}

/* Registers that a VMM restores. */
struct restored {
	__u16 command;
	__u8 line;
};

static struct restored get_restored(struct __test_metadata *_metadata,
				    const struct mig_device *dev)
{
	return (struct restored){
		.command = get_config(_metadata, dev, PCI_COMMAND, 2),
		.line = get_config(_metadata, dev, PCI_INTERRUPT_LINE, 1),
	};
}

/* Returns what the registers read afterwards: not all bits need be writable. */
static struct restored restore(struct __test_metadata *_metadata,
			       const struct mig_device *dev, __u16 command, __u8 line)
{
	put_config(_metadata, dev, PCI_COMMAND, 2, command);
	put_config(_metadata, dev, PCI_INTERRUPT_LINE, 1, line);
	return get_restored(_metadata, dev);
}

static void expect_restored(struct __test_metadata *_metadata,
			    const struct mig_device *dev, struct restored want,
			    const char *when)
{
	struct restored now = get_restored(_metadata, dev);

	EXPECT_EQ(want.command, now.command)
		PROMISE("the command register belongs to the user (%s)", when);
	EXPECT_EQ(want.line, now.line)
		PROMISE("the interrupt line belongs to the user (%s)", when);
}

TEST_F(device, config_space_works_in_every_state)
{
	static const __u16 commands[] = {
		0, PCI_COMMAND_MEMORY, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER,
	};
	struct restored want[ARRAY_SIZE(commands)], now;
	unsigned int i;
	__u32 state;
	int fd;

	NEED_PCI(&self->dev);
	for (i = 0; i < ARRAY_SIZE(commands); i++)
		want[i] = restore(_metadata, &self->dev, commands[i], 0x20 + i);
	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		fd = go(_metadata, &self->dev, state);
		for (i = 0; i < ARRAY_SIZE(commands); i++) {
			now = restore(_metadata, &self->dev, commands[i], 0x20 + i);
			EXPECT_EQ(want[i].command, now.command)
				PROMISE("the device must respond to PCI config space: the command register in %s",
					mig_state_name(state));
			EXPECT_EQ(want[i].line, now.line)
				PROMISE("the device must respond to PCI config space: the interrupt line in %s",
					mig_state_name(state));
		}
		if (fd >= 0)
			close(fd);
	}
}

/* Like QEMU and Cloud Hypervisor, which restore it after the data. */
TEST_F(device, restored_config_space_stays)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct restored want;
	int fd;

	NEED_PCI(&self->dev);
	restore(_metadata, &self->dev, PCI_COMMAND_MEMORY, 0x11);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	restore(_metadata, to, PCI_COMMAND_MEMORY, 0x22);
	fd = go(_metadata, to, MIG_RESUMING);
	load_all(_metadata, fd, &image);
	want = restore(_metadata, to, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 0x33);
	move_on(_metadata, to, MIG_STOP);
	expect_restored(_metadata, to, want, "restored in RESUMING, read in STOP");
	move_on(_metadata, to, MIG_RUNNING);
	expect_restored(_metadata, to, want, "restored in RESUMING, read in RUNNING");
}

/* The number of capabilities that fit in a configuration space. */
#define CAPS_MAX	48U

/*
 * Walks the list of capabilities: returns the offset of the one with this ID, or 0.
 * Stops at an offset in the header, and after CAPS_MAX.
 */
static unsigned int find_cap(struct __test_metadata *_metadata,
			     const struct mig_device *dev, unsigned int id)
{
	unsigned int at, i;

	if (!(get_config(_metadata, dev, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST))
		return 0;
	at = get_config(_metadata, dev, PCI_CAPABILITY_LIST, 1) & ~3;
	for (i = 0; i < CAPS_MAX && at >= PCI_STD_HEADER_SIZEOF; i++) {
		if (get_config(_metadata, dev, at + PCI_CAP_LIST_ID, 1) == id)
			return at;
		at = get_config(_metadata, dev, at + PCI_CAP_LIST_NEXT, 1) & ~3;
	}
	return 0;
}

TEST_F(device, capability_list_ends)
{
	unsigned int at, nr = 0;

	NEED_PCI(&self->dev);
	if (!(get_config(_metadata, &self->dev, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST))
		SKIP(return, "the device has no list of capabilities");
	at = get_config(_metadata, &self->dev, PCI_CAPABILITY_LIST, 1) & ~3;
	while (at) {
		ASSERT_LE((unsigned int)PCI_STD_HEADER_SIZEOF, at)
			PROMISE("a capability is behind the header");
		ASSERT_GT(CAPS_MAX, nr)
			PROMISE("the list of capabilities ends");
		at = get_config(_metadata, &self->dev, at + PCI_CAP_LIST_NEXT, 1) & ~3;
		nr++;
	}
}

/* A part of a BAR. */
struct part {
	__u32 bar;
	__u64 start;
	__u64 end;
};

static struct part get_part(struct __test_metadata *_metadata,
			    const struct mig_device *dev, unsigned int at, __u64 len)
{
	__u32 value = get_config(_metadata, dev, at, 4);
	struct part part = {
		.bar = value & PCI_MSIX_TABLE_BIR,
		.start = value & PCI_MSIX_TABLE_OFFSET,
	};

	part.end = part.start + len;
	EXPECT_GE((__u32)VFIO_PCI_BAR5_REGION_INDEX, part.bar)
		PROMISE("the MSI-X table and pending bits are in a BAR");
	EXPECT_GE(region_size(dev, part.bar), part.end)
		PROMISE("the MSI-X table and pending bits are inside of BAR%u: they end at %#llx",
			part.bar, part.end);
	return part;
}

TEST_F(device, msix_table_and_pending_bits_are_in_bars)
{
	struct part table, pending;
	struct vfio_irq_info irq;
	unsigned int at, vectors;

	NEED_PCI(&self->dev);
	at = find_cap(_metadata, &self->dev, PCI_CAP_ID_MSIX);
	if (!at)
		SKIP(return, "the device has no MSI-X");
	vectors = get_config(_metadata, &self->dev, at + PCI_MSIX_FLAGS, 2);
	vectors = (vectors & PCI_MSIX_FLAGS_QSIZE) + 1;
	table = get_part(_metadata, &self->dev, at + PCI_MSIX_TABLE,
			 vectors * PCI_MSIX_ENTRY_SIZE);
	pending = get_part(_metadata, &self->dev, at + PCI_MSIX_PBA,
			   (vectors + 63) / 64 * 8);
	EXPECT_TRUE(table.bar != pending.bar || table.end <= pending.start ||
		    pending.end <= table.start)
		PROMISE("the MSI-X table and the pending bits do not overlap");
	ASSERT_EQ(0, mig_irq_info(&self->dev, VFIO_PCI_MSIX_IRQ_INDEX, &irq));
	EXPECT_EQ(vectors, irq.count)
		PROMISE("VFIO_DEVICE_GET_IRQ_INFO and the capability report the same number of vectors");
}

/* The size of a BAR in bytes, found like by a guest; 0 without such a BAR. */
static __u64 bar_size(struct __test_metadata *_metadata, const struct mig_device *dev,
		      unsigned int bar, bool *is_64)
{
	unsigned int at = PCI_BASE_ADDRESS_0 + bar * 4;
	__u32 old[2] = {}, ones[2] = { 0, ~0U };
	unsigned int i, nr;

	old[0] = get_config(_metadata, dev, at, 4);
	*is_64 = !(old[0] & PCI_BASE_ADDRESS_SPACE_IO) &&
		 (old[0] & PCI_BASE_ADDRESS_MEM_TYPE_MASK) == PCI_BASE_ADDRESS_MEM_TYPE_64;
	nr = *is_64 ? 2 : 1;
	for (i = 0; i < nr; i++) {
		old[i] = get_config(_metadata, dev, at + i * 4, 4);
		put_config(_metadata, dev, at + i * 4, 4, ~0U);
		ones[i] = get_config(_metadata, dev, at + i * 4, 4);
		put_config(_metadata, dev, at + i * 4, 4, old[i]);
	}
	if (old[0] & PCI_BASE_ADDRESS_SPACE_IO) {
		ones[0] &= PCI_BASE_ADDRESS_IO_MASK;
		/* The upper half may be read-only. */
		if (ones[0])
			ones[0] |= 0xffff0000;
	} else {
		ones[0] &= PCI_BASE_ADDRESS_MEM_MASK;
	}
	if (!*is_64)
		return -ones[0];
	return -((__u64)ones[1] << 32 | ones[0]);
}

TEST_F(device, bar_sizes_are_those_of_the_regions)
{
	unsigned int bar;
	bool is_64;
	__u64 size;

	NEED_PCI(&self->dev);
	if (get_config(_metadata, &self->dev, PCI_HEADER_TYPE, 1) & PCI_HEADER_TYPE_MASK)
		SKIP(return, "the device has no normal header");
	/* Without decoding, like a guest. */
	put_config(_metadata, &self->dev, PCI_COMMAND, 2, 0);
	for (bar = 0; bar < 6; bar++) {
		size = bar_size(_metadata, &self->dev, bar, &is_64);
		EXPECT_EQ(size, region_size(&self->dev, bar))
			PROMISE("BAR%u has the size of its region", bar);
		if (!is_64)
			continue;
		bar++;
		EXPECT_EQ(0U, region_size(&self->dev, bar))
			PROMISE("the upper half of a 64-bit BAR is no region (%u)", bar);
	}
}

/* What a VMM compares before it takes a device as the target. */
struct identity {
	__u32 fields[6];
	__u8 caps[CAPS_MAX][2];
	__u64 sizes[6];
};

static const struct {
	const char *name;
	unsigned int at;
	size_t size;
} identity_fields[] = {
	{ "vendor and device ID", PCI_VENDOR_ID, 4 },
	{ "class and revision", PCI_CLASS_REVISION, 4 },
	{ "header type", PCI_HEADER_TYPE, 1 },
	{ "subsystem", PCI_SUBSYSTEM_VENDOR_ID, 4 },
	{ "first capability", PCI_CAPABILITY_LIST, 1 },
	{ "interrupt pin", PCI_INTERRUPT_PIN, 1 },
};

static void identify(struct __test_metadata *_metadata, const struct mig_device *dev,
		     struct identity *id)
{
	unsigned int i, at;

	memset(id, 0, sizeof(*id));
	for (i = 0; i < ARRAY_SIZE(identity_fields); i++)
		id->fields[i] = get_config(_metadata, dev, identity_fields[i].at,
					   identity_fields[i].size);
	for (i = 0; i < ARRAY_SIZE(id->sizes); i++)
		id->sizes[i] = region_size(dev, i);
	if (!(get_config(_metadata, dev, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST))
		return;
	at = get_config(_metadata, dev, PCI_CAPABILITY_LIST, 1) & ~3;
	for (i = 0; i < CAPS_MAX && at >= PCI_STD_HEADER_SIZEOF; i++) {
		id->caps[i][0] = get_config(_metadata, dev, at + PCI_CAP_LIST_ID, 1);
		id->caps[i][1] = at;
		at = get_config(_metadata, dev, at + PCI_CAP_LIST_NEXT, 1) & ~3;
	}
}

TEST_F(device, target_has_the_same_identity)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct identity want, now;
	unsigned int i;

	NEED_PCI(&self->dev);
	identify(_metadata, &self->dev, &want);
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
	identify(_metadata, to, &now);
	for (i = 0; i < ARRAY_SIZE(identity_fields); i++) {
		EXPECT_EQ(want.fields[i], now.fields[i])
			PROMISE("the guest sees the same device on the target: %s",
				identity_fields[i].name);
	}
	EXPECT_EQ(0, memcmp(want.caps, now.caps, sizeof(want.caps)))
		PROMISE("the guest sees the same capabilities on the target");
	for (i = 0; i < ARRAY_SIZE(want.sizes); i++) {
		EXPECT_EQ(want.sizes[i], now.sizes[i])
			PROMISE("region %u has the same size on the target", i);
	}
}
