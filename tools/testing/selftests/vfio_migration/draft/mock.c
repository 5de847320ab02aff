// SPDX-License-Identifier: GPL-2.0
/* The draft's number of VFIO_MIG_GET_PRECOPY_INFO. Not for the kernel tree. */

#include "number.h"

/* The draft's ioctl number is equal to mainline's on each kind of data_fd. */
TEST_F(mock, precopy_info_answers_both_numbers)
{
	struct vfio_precopy_info draft = { .argsz = sizeof(draft) }, info;
	struct mock *src = &self->src;
	int fd;

	NEED_PRE_COPY(&src->dev);
	fd = go(_metadata, &src->dev, MIG_PRE_COPY);
	ASSERT_LT(0, mig_read(fd, &(struct mig_stream){}, 99));
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0, ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft))
		PROMISE("the data_fd supports both numbers");
	EXPECT_EQ(info.initial_bytes, draft.initial_bytes);
	EXPECT_EQ(info.dirty_bytes, draft.dirty_bytes);
	draft.argsz = 8;
	EXPECT_ERRNO(EINVAL, ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft));

	move_on(_metadata, &src->dev, MIG_STOP_COPY);
	draft.argsz = sizeof(draft);
	EXPECT_ERRNO(EINVAL, ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft));
	ASSERT_EQ(0, mig_set_state(&src->dev, MIG_RUNNING, NULL));
	EXPECT_EQ(-ENODEV, mig_precopy_info(fd, &info))
		PROMISE("every call on the fd of an ended session returns ENODEV");
	EXPECT_ERRNO(ENODEV, ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft))
		PROMISE("every call on the fd of an ended session returns ENODEV");
}
