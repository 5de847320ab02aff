// SPDX-License-Identifier: GPL-2.0

//! A driver cannot create a notifier: waiters for the data of a session use the session's own.

include!(env!("DRIVER"));

fn notifier() -> Result<Arc<Notifier>> {
    Notifier::new(Phase::PreCopy)
    //~ error[E0624]: associated function `new` is private
}
