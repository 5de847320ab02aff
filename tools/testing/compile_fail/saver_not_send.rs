// SPDX-License-Identifier: GPL-2.0

//! A saver must be `Send`, because any thread may read the data_fd.

include!(env!("DRIVER"));

struct OfOneThread(kernel::types::NotThreadSafe);

impl Saver for OfOneThread {
    //~ error[E0277]: `*mut ()` cannot be sent between threads safely
    //~ required by a bound in `vfio::migration::Saver`
    fn next(&mut self, _phase: Phase) -> Result<Next> {
        Ok(Next::End)
    }

    fn remaining(&self) -> Result<Remaining> {
        Ok(Remaining::default())
    }
}
