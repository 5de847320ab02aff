// SPDX-License-Identifier: GPL-2.0

//! The bytes of a stream cannot be stored beyond the call.

include!(env!("DRIVER"));

struct Lazy {
    records: Records,
    later: KVec<&'static [u8]>,
}

impl Loader for Lazy {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let later = &mut self.later;
        self.records.feed(bytes, |record| {
            later.push(record, GFP_KERNEL)?;
            //~ error[E0521]: borrowed data escapes outside of closure
            Ok(())
        })
    }
}
