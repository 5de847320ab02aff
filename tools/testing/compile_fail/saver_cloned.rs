// SPDX-License-Identifier: GPL-2.0

//! A saver cannot be cloned, because a clone would keep tracking enabled after the session.

include!(env!("DRIVER"));

#[derive(Clone)]
struct Cloned {
    tracking: Tracking,
    //~ error[E0277]: the trait bound `vfio::memory::Tracking: Clone` is not satisfied
}

impl Saver for Cloned {
    fn next(&mut self, _phase: Phase) -> Result<Next> {
        Ok(Next::End)
    }

    fn remaining(&self) -> Result<Remaining> {
        let pending = self.tracking.pending();
        Ok(Remaining {
            initial: pending.initial.pages,
            ..Default::default()
        })
    }
}
