// SPDX-License-Identifier: GPL-2.0
/* VFIO_DEVICE_FEATURE: the features of migration and their arguments. */

TEST_F(device, migration_flags)
{
	const __u64 known = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
			    VFIO_MIGRATION_PRE_COPY;

	EXPECT_EQ(0U, self->dev.flags & ~known)
		PROMISE("other combinations of flags have behavior to be defined in the future");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_GET | FEATURE_MIGRATION, NULL, 0))
		PROMISE("PROBE returns that GET of VFIO_DEVICE_FEATURE_MIGRATION is supported");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_MIGRATION,
				       NULL, 0))
		PROMISE("VFIO_DEVICE_FEATURE_MIGRATION supports only GET");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_GET | MIG_SET | FEATURE_STATE,
				 NULL, 0))
		PROMISE("PROBE returns that GET and SET of MIG_DEVICE_STATE are supported");
}

/* Checks common to all features with GET: valid and invalid arguments. */
static void check_get_arguments(struct __test_metadata *_metadata,
				const struct mig_device *dev, __u32 feature,
				size_t size)
{
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;
	__u8 data[256] = {};

	EXPECT_EQ(0, mig_feature(dev, MIG_GET | feature, data, size))
		PROMISE("GET of feature %u works", feature);
	EXPECT_EQ(0, mig_feature_argsz(dev, MIG_GET | feature, data, sizeof(data),
				       head + sizeof(data)))
		PROMISE("feature %u: a larger argsz is accepted", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size,
					     head + size - 1))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size, head))
		PROMISE("feature %u: argsz must cover the structure", feature);
	EXPECT_EQ(-EINVAL, mig_feature_argsz(dev, MIG_GET | feature, data, size, head - 1))
		PROMISE("argsz must cover struct vfio_device_feature");
	EXPECT_EQ(-EINVAL, mig_feature(dev, MIG_GET | MIG_SET | feature, data, size))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(-EINVAL, mig_feature(dev, feature, data, size))
		PROMISE("without PROBE one of GET or SET must be requested");
	EXPECT_EQ(-EINVAL, mig_feature(dev, MIG_GET | feature | 1 << 19, data, size))
		PROMISE("unknown flags are refused");
	EXPECT_EQ(0, mig_feature_argsz(dev, MIG_PROBE | MIG_GET | feature, NULL, 0, head))
		PROMISE("PROBE needs no data");

	EXPECT_ERRNO(EFAULT, ioctl(dev->fd, VFIO_DEVICE_FEATURE, NULL))
		PROMISE("an invalid pointer is EFAULT");
	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - head);
	hole->argsz = head + size;
	hole->flags = MIG_GET | feature;
	EXPECT_ERRNO(EFAULT, ioctl(dev->fd, VFIO_DEVICE_FEATURE, hole))
		PROMISE("feature %u: a buffer that cannot be written is EFAULT", feature);
}

TEST_F(device, feature_arguments)
{
	check_get_arguments(_metadata, &self->dev, FEATURE_MIGRATION,
			    sizeof(struct vfio_device_feature_migration));
	check_get_arguments(_metadata, &self->dev, FEATURE_STATE,
			    sizeof(struct vfio_device_feature_mig_state));
	check_get_arguments(_metadata, &self->dev, FEATURE_SIZE,
			    sizeof(struct vfio_device_feature_mig_data_size));
	expect_state(_metadata, &self->dev, MIG_RUNNING, "after refused and probing calls");
}

TEST_F(device, set_state_arguments)
{
	struct vfio_device_feature_mig_state mig = { .device_state = MIG_STOP };
	const __u32 head = sizeof(struct vfio_device_feature);
	struct vfio_device_feature *hole;

	EXPECT_EQ(-EINVAL, mig_feature_argsz(&self->dev, MIG_SET | FEATURE_STATE, &mig,
					     sizeof(mig), head + sizeof(mig) - 1))
		PROMISE("argsz must cover struct vfio_device_feature_mig_state");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_SET | MIG_GET | FEATURE_STATE, &mig,
				       sizeof(mig)))
		PROMISE("GET and SET are mutually exclusive, except when using PROBE");
	EXPECT_EQ(0, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_STATE, &mig,
				 sizeof(mig)));
	expect_state(_metadata, &self->dev, MIG_RUNNING,
		     "after PROBE, which only returns whether SET is supported");

	hole = page_before_a_hole();
	ASSERT_NE(NULL, hole);
	hole = (void *)((char *)hole + mig_page_size() - head);
	hole->argsz = head + sizeof(mig);
	hole->flags = MIG_SET | FEATURE_STATE;
	EXPECT_ERRNO(EFAULT, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, hole))
		PROMISE("a buffer that cannot be read is EFAULT");
	expect_state(_metadata, &self->dev, MIG_RUNNING, "after EFAULT");
}

/* The state has changed by the time the descriptor cannot be returned. */
TEST_F(device, set_state_fails_if_fd_cannot_be_returned)
{
	size_t len = sizeof(struct vfio_device_feature) +
		     sizeof(struct vfio_device_feature_mig_state);
	struct vfio_device_feature_mig_state *mig;
	struct vfio_device_feature *feature;
	struct mig_stream image = {};

	NEED_RESET(&self->dev);
	feature = mmap(NULL, len, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, feature);
	feature->argsz = len;
	feature->flags = MIG_SET | FEATURE_STATE;
	mig = (void *)feature->data;
	mig->device_state = MIG_STOP_COPY;
	ASSERT_EQ(0, mprotect(feature, len, PROT_READ));
	EXPECT_ERRNO(EFAULT, ioctl(self->dev.fd, VFIO_DEVICE_FEATURE, feature));
	expect_state(_metadata, &self->dev, MIG_STOP_COPY, "after SET_STATE could not return its fd");
	EXPECT_EQ(0, mig_set_state(&self->dev, MIG_RUNNING, NULL))
		PROMISE("the user can attempt to return to some other state");
	take_image(_metadata, &self->dev, &image);
}

TEST_F(device, unknown_feature)
{
	static const __u32 ops[] = { MIG_GET, MIG_SET, MIG_PROBE | MIG_GET, MIG_PROBE | MIG_SET };
	__u64 data = 0;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		EXPECT_EQ(-ENOTTY, mig_feature(&self->dev, ops[i] | 0xffff, &data,
					       sizeof(data)))
			PROMISE("ENOTTY means that the device does not have the feature (flags %#x)",
				ops[i]);
	}
}

TEST_F(device, precopy_info_v2_arguments)
{
	int want = self->dev.flags & VFIO_MIGRATION_PRE_COPY ? 0 : -EINVAL;

	EXPECT_EQ(want, mig_feature(&self->dev, MIG_PROBE | MIG_SET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 is available exactly if PRE_COPY is");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_PROBE | MIG_GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 supports only SET");
	EXPECT_EQ(-EINVAL, mig_feature(&self->dev, MIG_GET | FEATURE_V2, NULL, 0))
		PROMISE("PRECOPY_INFOv2 supports only SET");
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev));
	EXPECT_EQ(want, mig_opt_in_v2(&self->dev))
		PROMISE("a second opt-in changes nothing");
}

TEST_F(device, get_state_returns_no_fd)
{
	struct vfio_device_feature_mig_state mig;
	__u32 state;

	for (state = 0; state < MIG_STATE_NR; state++) {
		if (!mig_fsm_exists(self->dev.flags, state))
			continue;
		go(_metadata, &self->dev, state);
		mig = (struct vfio_device_feature_mig_state){
			.device_state = 0x55, .data_fd = 0x55,
		};
		ASSERT_EQ(0, mig_feature(&self->dev, MIG_GET | FEATURE_STATE, &mig,
					 sizeof(mig)));
		EXPECT_EQ(state, mig.device_state);
		EXPECT_EQ(-1, mig.data_fd)
			PROMISE("upon GET data_fd will be -1 (in %s)",
				mig_state_name(state));
	}
}

#ifdef __x86_64__
/* ioctl() of a 32-bit task. @arg must have an address of 32 bits. */
static int ioctl32(int fd, unsigned int cmd, void *arg)
{
	long ret;

	asm volatile("int $0x80" : "=a" (ret)
		     : "a" (54), "b" (fd), "c" (cmd), "d" (arg)
		     : "memory", "cc", "r8", "r9", "r10", "r11");
	return (int)ret;
}

/* Without CONFIG_IA32_EMULATION, the system call is a fault. */
static bool has_ioctl32(void)
{
	int status;
	pid_t child = fork();

	if (!child) {
		signal(SIGSEGV, SIG_DFL);
		_exit(ioctl32(-1, 0, NULL) != -EBADF);
	}
	return child > 0 && waitpid(child, &status, 0) == child && !status;
}

TEST_F(device, ioctls_of_32_bit_tasks)
{
	struct {
		struct vfio_device_feature feature;
		union {
			struct vfio_device_feature_migration migration;
			struct vfio_device_feature_mig_state state;
		};
	} *arg;
	struct vfio_precopy_info *info, native;
	__u32 state;
	int fd;

	if (!has_ioctl32())
		SKIP(return, "the kernel has no system calls of 32-bit tasks");
	arg = mmap(NULL, mig_page_size(), PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)arg);
	info = (void *)(arg + 1);

	arg->feature.argsz = sizeof(arg->feature) + sizeof(arg->migration);
	arg->feature.flags = MIG_GET | FEATURE_MIGRATION;
	EXPECT_EQ(0, ioctl32(self->dev.fd, VFIO_DEVICE_FEATURE, arg));
	EXPECT_EQ(self->dev.flags, arg->migration.flags)
		PROMISE("a 32-bit task gets the same migration flags");

	state = mig_fsm_exists(self->dev.flags, MIG_PRE_COPY) ? MIG_PRE_COPY : MIG_STOP;
	arg->feature.argsz = sizeof(arg->feature) + sizeof(arg->state);
	arg->feature.flags = MIG_SET | FEATURE_STATE;
	arg->state.device_state = state;
	ASSERT_EQ(0, ioctl32(self->dev.fd, VFIO_DEVICE_FEATURE, arg))
		PROMISE("a 32-bit task can change the state to %s", mig_state_name(state));
	fd = arg->state.data_fd;
	expect_state(_metadata, &self->dev, state, "after SET_STATE by a 32-bit task");

	NEED_PRE_COPY(&self->dev);
	*info = (struct vfio_precopy_info){ .argsz = sizeof(*info) };
	ASSERT_EQ(0, ioctl32(fd, VFIO_MIG_GET_PRECOPY_INFO, info))
		PROMISE("a 32-bit task gets the pre-copy information");
	ASSERT_EQ(0, mig_precopy_info(fd, &native));
	EXPECT_EQ(native.initial_bytes, info->initial_bytes)
		PROMISE("a 32-bit task gets the same initial_bytes");
	EXPECT_ERRNO(ENOTTY, ioctl(fd, NO_SUCH_IOCTL, info));
	EXPECT_EQ(-ENOTTY, ioctl32(fd, NO_SUCH_IOCTL, info))
		PROMISE("an ioctl that the data_fd does not support is ENOTTY");
	close(fd);
}
#endif
