// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros that bindgen cannot bind.
 */

#include <linux/cgroup.h>
#include <linux/freezer.h>
#include <linux/iova_bitmap.h>
#include <linux/memcontrol.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/signal.h>

#include "vfio.h"

/* Without CONFIG_IOMMUFD_DRIVER it is an inline function that does nothing. */
void rust_helper_iova_bitmap_set(struct iova_bitmap *bitmap, unsigned long iova,
				 size_t length)
{
	iova_bitmap_set(bitmap, iova, length);
}

void rust_helper_cond_resched_tasks_rcu_qs(void)
{
	cond_resched_tasks_rcu_qs();
}

void rust_helper_cond_resched(void)
{
	cond_resched();
}

int rust_helper_fatal_signal_pending(struct task_struct *task)
{
	return fatal_signal_pending(task);
}

void rust_helper_allow_kernel_signal(int sig)
{
	allow_kernel_signal(sig);
}

bool rust_helper_set_freezable(void)
{
	return set_freezable();
}

bool rust_helper_try_to_freeze(void)
{
	return try_to_freeze();
}

int rust_helper_cgroup_attach_task_all(struct task_struct *from, struct task_struct *task)
{
	return cgroup_attach_task_all(from, task);
}

struct mem_cgroup *rust_helper_get_mem_cgroup_from_mm(struct mm_struct *mm)
{
	return get_mem_cgroup_from_mm(mm);
}

void rust_helper_mem_cgroup_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

struct mem_cgroup *rust_helper_set_active_memcg(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

MODULE_IMPORT_NS("IOMMUFD");
