/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Replacement of helpers.c in the kernel, and prototypes of the helpers for bindgen.
 * Out-of-tree scaffolding: upstream, the bindings come from the definitions.
 */

#ifndef RUST_HELPERS_VFIO_H
#define RUST_HELPERS_VFIO_H

#define __rust_helper

struct device;
struct fwnode_handle;
struct iommu_dirty_bitmap;
struct iova_bitmap;
struct mem_cgroup;
struct mm_struct;
struct mutex;
struct page;
struct task_struct;
struct vm_area_struct;
struct vm_fault;

void rust_helper_vfio_iova_bitmap_set(struct iova_bitmap *bitmap, unsigned long iova,
				      size_t length);
void rust_helper_cond_resched_tasks_rcu_qs(void);
void rust_helper_cond_resched(void);
int rust_helper_fatal_signal_pending(struct task_struct *task);
int rust_helper_mutex_lock_killable(struct mutex *lock);
void rust_helper_allow_kernel_signal(int sig);
void rust_helper_set_freezable(void);
bool rust_helper_try_to_freeze(void);
int rust_helper_cgroup_attach_task_all(struct task_struct *from, struct task_struct *task);
int rust_helper_cgroup_detach_task_all(struct task_struct *task);
bool rust_helper_user_backed_iter(const struct iov_iter *iter);
struct mem_cgroup *rust_helper_get_mem_cgroup_from_mm(struct mm_struct *mm);
void rust_helper_mem_cgroup_put(struct mem_cgroup *memcg);
struct mem_cgroup *rust_helper_set_active_memcg(struct mem_cgroup *memcg);
int rust_helper_pm_runtime_resume_and_get(struct device *dev);
void rust_helper_pm_runtime_put(struct device *dev);
void rust_helper_vfio_kill_device(struct device *dev);
void rust_helper_release_fault_lock(struct vm_fault *vmf);
unsigned long rust_helper_page_to_pfn(struct page *page);
pgprot_t rust_helper_vfio_pci_page_prot(const struct vm_area_struct *vma, bool writable,
					bool is_io);
struct page *rust_helper_vfio_frame_to_page(unsigned long frame);
void rust_helper_vfio_iommu_dirty_bitmap_record(struct iommu_dirty_bitmap *dirty,
						unsigned long iova, unsigned long length);
int rust_helper_vfio_iommu_fwspec_init(struct device *dev, struct fwnode_handle *fwnode);
void rust_helper_vfio_trace_arc(const char *device, const char *from, const char *to,
				int result, u64 ns);
void rust_helper_vfio_trace_reset(const char *device, const char *from, int result);
void rust_helper_vfio_trace_session_begin(const char *device, const char *state);
void rust_helper_vfio_trace_session_end(const char *device, const char *state);
void rust_helper_vfio_trace_read(const char *device, s64 result);
void rust_helper_vfio_trace_write(const char *device, s64 result);
void rust_helper_vfio_trace_precopy_info(const char *device, u64 initial, u64 dirty,
					 u32 flags);
void rust_helper_vfio_trace_log_start(const char *device, s64 result);
void rust_helper_vfio_trace_log_report(const char *device, s64 result);
void rust_helper_vfio_trace_log_stop(const char *device, s64 result);

#endif
