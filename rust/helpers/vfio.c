// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros that bindgen cannot bind.
 */

#include <linux/cgroup.h>
#include <linux/cred.h>
#include <linux/device.h>
#include <linux/freezer.h>
#include <linux/iommu.h>
#include <linux/iova_bitmap.h>
#include <linux/lockdep.h>
#include <linux/memcontrol.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pm_runtime.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/signal.h>
#include <linux/uio.h>

#include "vfio.h"
#include "vfio_trace.h"

/*
 * Has a name of its own: generic code is compiled as a part of a driver, which would
 * have to import the namespace of iova_bitmap_set().
 */
__rust_helper void rust_helper_vfio_iova_bitmap_set(struct iova_bitmap *bitmap,
						    unsigned long iova,
						    size_t length)
{
	iova_bitmap_set(bitmap, iova, length);
}

__rust_helper void rust_helper_cond_resched_tasks_rcu_qs(void)
{
	cond_resched_tasks_rcu_qs();
}

__rust_helper void rust_helper_cond_resched(void)
{
	cond_resched();
}

__rust_helper int rust_helper_fatal_signal_pending(struct task_struct *task)
{
	return fatal_signal_pending(task);
}

__rust_helper int rust_helper_mutex_lock_killable(struct mutex *lock)
{
	return mutex_lock_killable(lock);
}

__rust_helper void rust_helper_allow_kernel_signal(int sig)
{
	allow_kernel_signal(sig);
}

__rust_helper void rust_helper_set_freezable(void)
{
	set_freezable();
}

__rust_helper bool rust_helper_try_to_freeze(void)
{
	return try_to_freeze();
}

__rust_helper int rust_helper_cgroup_attach_task_all(struct task_struct *from,
						     struct task_struct *task)
{
	return cgroup_attach_task_all(from, task);
}

__rust_helper int rust_helper_cgroup_detach_task_all(struct task_struct *task)
{
	int ret;

	/* Some controllers check whether the current task may move @task. */
	scoped_with_kernel_creds()
		ret = cgroup_attach_task_all(&init_task, task);
	return ret;
}

__rust_helper bool rust_helper_user_backed_iter(const struct iov_iter *iter)
{
	return user_backed_iter(iter);
}

__rust_helper struct mem_cgroup *rust_helper_get_mem_cgroup_from_mm(struct mm_struct *mm)
{
	return get_mem_cgroup_from_mm(mm);
}

__rust_helper void rust_helper_mem_cgroup_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

__rust_helper struct mem_cgroup *rust_helper_set_active_memcg(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

__rust_helper int rust_helper_pm_runtime_resume_and_get(struct device *dev)
{
	return pm_runtime_resume_and_get(dev);
}

__rust_helper void rust_helper_pm_runtime_put(struct device *dev)
{
	pm_runtime_put(dev);
}

/*
 * No driver can be bound to the device any more. A device that is still being added is
 * left as it is: if device_add() fails, it frees the data that kill_device() changes.
 * It cannot fail any more when it allows drivers to be bound.
 */
__rust_helper void rust_helper_vfio_kill_device(struct device *dev)
{
	device_lock(dev);
	if (dev_ready_to_probe(dev))
		kill_device(dev);
	device_unlock(dev);
}

__rust_helper void rust_helper_release_fault_lock(struct vm_fault *vmf)
{
	release_fault_lock(vmf);
}

__rust_helper unsigned long rust_helper_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

/*
 * Protection of a page in an area made by vfio_pci_core_mmap(): of a page of the BAR,
 * or of one of RAM instead of it.
 */
__rust_helper pgprot_t rust_helper_vfio_pci_page_prot(const struct vm_area_struct *vma,
						      bool writable, bool is_io)
{
	pgprot_t prot = vm_get_page_prot(writable ? vma->vm_flags :
						    vma->vm_flags & ~VM_WRITE);

	return is_io ? pgprot_decrypted(pgprot_noncached(prot)) : prot;
}

/*
 * The page of a frame that is memory, or NULL. The kernel must not read memory that is
 * known to be broken.
 */
__rust_helper struct page *rust_helper_vfio_frame_to_page(unsigned long frame)
{
	struct page *page = pfn_to_online_page(frame);

	return page && !PageReserved(page) && !PageHWPoison(page) ? page : NULL;
}

__rust_helper void rust_helper_vfio_iommu_dirty_bitmap_record(struct iommu_dirty_bitmap *dirty,
							      unsigned long iova,
							      unsigned long length)
{
	iommu_dirty_bitmap_record(dirty, iova, length);
}

/*
 * Sets the IOMMU of a device that is being added to a bus.
 *
 * A module cannot take iommu_probe_device_lock, which is not exported. It protects
 * dev->iommu, and iommu_fwspec_init() asserts that it is held, hence lockdep_off().
 * At this time, only the registration of an IOMMU accesses dev->iommu of this device.
 * For an IOMMU of this crate, pci_lock_rescan_remove() excludes that. It can happen
 * if the module of another IOMMU is loaded, such as virtio-iommu. In a kernel tree,
 * this function takes the lock, see helpers() in tools/series/sets.py.
 */
#ifdef CONFIG_IOMMU_API
__rust_helper int rust_helper_vfio_iommu_fwspec_init(struct device *dev,
						     struct fwnode_handle *fwnode)
{
	int ret;

	lockdep_off();
	ret = iommu_fwspec_init(dev, fwnode);
	lockdep_on();
	return ret;
}
#endif

/* The tracepoints of the module. */
__rust_helper void rust_helper_vfio_trace_arc(const char *device, const char *from,
					      const char *to, int result, u64 ns)
{
	trace_vfio_arc(device, from, to, result, ns);
}

__rust_helper void rust_helper_vfio_trace_reset(const char *device, const char *from,
						int result)
{
	trace_vfio_reset(device, from, result);
}

__rust_helper void rust_helper_vfio_trace_session_begin(const char *device, const char *state)
{
	trace_vfio_session_begin(device, state);
}

__rust_helper void rust_helper_vfio_trace_session_end(const char *device, const char *state)
{
	trace_vfio_session_end(device, state);
}

__rust_helper void rust_helper_vfio_trace_read(const char *device, s64 result)
{
	trace_vfio_read(device, result);
}

__rust_helper void rust_helper_vfio_trace_write(const char *device, s64 result)
{
	trace_vfio_write(device, result);
}

__rust_helper void rust_helper_vfio_trace_precopy_info(const char *device, u64 initial,
						       u64 dirty, u32 flags)
{
	trace_vfio_precopy_info(device, initial, dirty, flags);
}

__rust_helper void rust_helper_vfio_trace_log_start(const char *device, s64 result)
{
	trace_vfio_log_start(device, result);
}

__rust_helper void rust_helper_vfio_trace_log_report(const char *device, s64 result)
{
	trace_vfio_log_report(device, result);
}

__rust_helper void rust_helper_vfio_trace_log_stop(const char *device, s64 result)
{
	trace_vfio_log_stop(device, result);
}

/* sparse cannot evaluate the assertion in it. */
#ifndef __CHECKER__
MODULE_IMPORT_NS("IOMMUFD");
#endif
