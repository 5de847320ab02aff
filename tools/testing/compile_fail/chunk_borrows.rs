// SPDX-License-Identifier: GPL-2.0

//! A chunk is read when its saver may be gone: it shares the memory and does not borrow it.

include!(env!("DRIVER"));

use vfio::memory::Memory;

fn chunk(memory: &Memory) -> Result<Chunk> {
    Ok(Chunk::new(b"head")?.memory(memory, 0..8))
    //~ error[E0308]: mismatched types
}
