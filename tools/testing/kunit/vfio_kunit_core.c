// SPDX-License-Identifier: GPL-2.0
/*
 * What the KUnit tests compare the state machine with: vfio core's own.
 */

#include <linux/vfio.h>

int vfio_kunit_core_next_state(u32 flags, u32 cur, u32 new);

/*
 * The answer of vfio core for a device with these migration flags: the next
 * state, or a negative error. @cur has to be a state that @flags support, other
 * ones make vfio core warn.
 */
int vfio_kunit_core_next_state(u32 flags, u32 cur, u32 new)
{
	struct vfio_device device = { .migration_flags = flags };
	enum vfio_device_mig_state next;
	int ret;

	ret = vfio_mig_get_next_state(&device, cur, new, &next);
	return ret ? ret : next;
}
