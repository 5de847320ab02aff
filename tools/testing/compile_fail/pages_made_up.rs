// SPDX-License-Identifier: GPL-2.0

//! A chunk takes only pages whose dirty bits were cleared, so that changes are streamed again.

include!(env!("DRIVER"));

fn pages(_memory: &StateMemory) -> Result<Chunk> {
    Ok(Chunk::new(b"head")?.pages(0..1))
    //~ error[E0308]: mismatched types
    //~ expected `PageRun`, found `Range<{integer}>`
}
