// SPDX-License-Identifier: GPL-2.0

//! The kernel's bindings, and additional ones for `vfio.h`, `mdev.h` and `anon_inodes.h`.
//!
//! Out-of-tree scaffolding: upstream all of this is `kernel::bindings`.

#[cfg_attr(not(CONFIG_RUSTC_HAS_UNNECESSARY_TRANSMUTES), allow(unknown_lints))]
#[allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unnecessary_transmutes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]
mod generated {
    use kernel::{
        bindings::*,
        ffi, //
    };
    use pin_init::{
        MaybeZeroable,
        Zeroable, //
    };

    // Not derived by `bindgen`, see <https://github.com/rust-lang/rust-bindgen/issues/3196>.
    //
    // SAFETY: `__BindgenBitfieldUnit<Storage>` is a newtype around `Storage`.
    unsafe impl<Storage: Zeroable> Zeroable for __BindgenBitfieldUnit<Storage> {}

    include!(env!("VFIO_BINDINGS"));
}

pub(crate) use generated::{
    rust_helper_allow_kernel_signal as allow_kernel_signal,
    rust_helper_cgroup_attach_task_all as cgroup_attach_task_all,
    rust_helper_cgroup_detach_task_all as cgroup_detach_task_all,
    rust_helper_cond_resched as cond_resched,
    rust_helper_cond_resched_tasks_rcu_qs as cond_resched_tasks_rcu_qs,
    rust_helper_fatal_signal_pending as fatal_signal_pending,
    rust_helper_get_mem_cgroup_from_mm as get_mem_cgroup_from_mm,
    rust_helper_mem_cgroup_put as mem_cgroup_put,
    rust_helper_mutex_lock_killable as mutex_lock_killable,
    rust_helper_page_to_pfn as page_to_pfn,
    rust_helper_pm_runtime_put as pm_runtime_put,
    rust_helper_pm_runtime_resume_and_get as pm_runtime_resume_and_get,
    rust_helper_release_fault_lock as release_fault_lock,
    rust_helper_set_active_memcg as set_active_memcg,
    rust_helper_set_freezable as set_freezable,
    rust_helper_try_to_freeze as try_to_freeze,
    rust_helper_user_backed_iter as user_backed_iter,
    rust_helper_vfio_iova_bitmap_set as vfio_iova_bitmap_set,
    rust_helper_vfio_pci_page_prot as vfio_pci_page_prot,
    rust_helper_vfio_trace_arc as vfio_trace_arc,
    rust_helper_vfio_trace_log_report as vfio_trace_log_report,
    rust_helper_vfio_trace_log_start as vfio_trace_log_start,
    rust_helper_vfio_trace_log_stop as vfio_trace_log_stop,
    rust_helper_vfio_trace_precopy_info as vfio_trace_precopy_info,
    rust_helper_vfio_trace_read as vfio_trace_read,
    rust_helper_vfio_trace_reset as vfio_trace_reset,
    rust_helper_vfio_trace_session_begin as vfio_trace_session_begin,
    rust_helper_vfio_trace_session_end as vfio_trace_session_end,
    rust_helper_vfio_trace_write as vfio_trace_write,
    *, //
};
// Only `soft_pci` uses these, and not every system supports it.
#[allow(unused_imports)]
pub(crate) use generated::{
    rust_helper_vfio_frame_to_page as vfio_frame_to_page,
    rust_helper_vfio_iommu_dirty_bitmap_record as vfio_iommu_dirty_bitmap_record,
    rust_helper_vfio_iommu_fwspec_init as vfio_iommu_fwspec_init,
    rust_helper_vfio_kill_device as vfio_kill_device, //
};
pub(crate) use kernel::bindings::*;
