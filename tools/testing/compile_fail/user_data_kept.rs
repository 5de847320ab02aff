// SPDX-License-Identifier: GPL-2.0

//! The data of a write cannot be stored beyond the callback.

include!(env!("DRIVER"));

#[pin_data]
struct Lazy {
    #[pin]
    later: Mutex<Option<&'static [u8]>>,
}

impl Lazy {
    fn write(&self, _pos: Position, from: &[u8]) -> Result {
        *self.later.lock() = Some(from);
        //~ error[E0521]: borrowed data escapes outside of method
        Ok(())
    }
}
