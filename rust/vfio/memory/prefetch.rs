// SPDX-License-Identifier: GPL-2.0

//! Prefetch of memory.
//!
//! This file uses `core` alone, so that the same source runs in the kernel and in the benchmark of
//! the host. `core` has no stable function for it, and the function of the kernel cannot be inlined
//! into Rust code: a call for each cache line takes longer than the digest of the line.

/// Starts to load the cache line of an address into the second-level cache.
///
/// The address may be any: an invalid one has no effect. Does nothing on processors other than x86.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: The instruction changes no registers and no memory, and it does not fault.
    unsafe {
        core::arch::asm!(
            "prefetcht1 [{}]",
            in(reg) at,
            options(readonly, nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
