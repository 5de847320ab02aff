// SPDX-License-Identifier: GPL-2.0

//! A saver cannot borrow from the device, because the data_fd may outlive it.

include!(env!("DRIVER"));

struct Borrowing<'a> {
    registers: &'a Mutex<Registers>,
}

impl<'a> Saver for Borrowing<'a> {
    //~ error[E0478]: lifetime bound not satisfied
    //~ but lifetime parameter must outlive the static lifetime
    //~ error[E0803]: cannot infer an appropriate lifetime for lifetime parameter `'a`
    fn next(&mut self, _phase: Phase) -> Result<Next> {
        Ok(Next::Chunk(Chunk::new(&self.registers.lock().bytes)?))
    }

    fn remaining(&self) -> Result<Remaining> {
        Ok(Remaining::default())
    }
}
