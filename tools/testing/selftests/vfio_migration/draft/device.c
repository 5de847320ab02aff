// SPDX-License-Identifier: GPL-2.0
/* The draft's number of VFIO_MIG_GET_PRECOPY_INFO. Not for the kernel tree. */

#include "number.h"

TEST_F(device, precopy_info_accepts_draft_number)
{
	struct vfio_precopy_info info, draft = { .argsz = sizeof(draft) };
	int fd;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	if (ioctl(fd, MIG_DRAFT_PRECOPY_INFO, &draft) && errno == ENOTTY)
		SKIP(return, "the device supports only mainline's number of the ioctl");
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(info.initial_bytes, draft.initial_bytes);
	EXPECT_EQ(info.dirty_bytes, draft.dirty_bytes)
		PROMISE("both ioctl numbers return the same values");
}
