// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros that bindgen cannot bind.
 */

#include <linux/iova_bitmap.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
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

MODULE_IMPORT_NS("IOMMUFD");
