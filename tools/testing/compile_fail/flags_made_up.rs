// SPDX-License-Identifier: GPL-2.0

//! Only the combinations of flags that the uAPI defines are valid.

include!(env!("DRIVER"));

fn flags() -> Flags {
    // `VFIO_MIGRATION_PRE_COPY` without `VFIO_MIGRATION_STOP_COPY`.
    1 << 2
    //~ error[E0308]: mismatched types
    //~ expected `Flags`, found integer
}
