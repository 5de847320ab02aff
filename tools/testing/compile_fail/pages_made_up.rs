// SPDX-License-Identifier: GPL-2.0

//! A chunk is made of pages whose marks were cleared, so that a later change is streamed, too.

include!(env!("DRIVER"));

fn pages(_memory: &StateMemory) -> Result<Chunk> {
    Ok(Chunk::new(b"head")?.pages(0..1))
    //~ error[E0308]: mismatched types
    //~ expected `PageRun`, found `Range<{integer}>`
}
