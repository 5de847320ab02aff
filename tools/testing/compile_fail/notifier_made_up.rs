// SPDX-License-Identifier: GPL-2.0

//! Who waits for a session's data waits at the session's own notifier.

include!(env!("DRIVER"));

fn notifier() -> Result<Arc<Notifier>> {
    Notifier::new(Phase::PreCopy)
    //~ error[E0624]: associated function `new` is private
}
