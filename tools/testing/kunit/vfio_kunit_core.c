// SPDX-License-Identifier: GPL-2.0
/*
 * The state machine of vfio core, for KUnit tests that compare the engine with it.
 */

#include <linux/vfio.h>

int vfio_kunit_core_next_state(u32 flags, u32 cur, u32 new);

/*
 * Returns the next state according to vfio core for a device with these
 * migration flags, or a negative errno. @flags must support @cur; otherwise
 * vfio core warns.
 */
int vfio_kunit_core_next_state(u32 flags, u32 cur, u32 new)
{
	/* Too large for the stack with lockdep. The suites run one at a time. */
	static struct vfio_device device;
	enum vfio_device_mig_state next;
	int ret;

	device.migration_flags = flags;
	ret = vfio_mig_get_next_state(&device, cur, new, &next);
	return ret ? ret : next;
}
