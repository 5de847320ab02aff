// SPDX-License-Identifier: GPL-2.0

//! Tests of the stream: golden values, round trips, and everything that must be refused. They run
//! for each page size that kernels with Rust have.

/// Values that fix the format for a page size.
struct Golden {
    /// Digest of page 0 with zeroes.
    page_of_zeroes: u64,
    /// Digest of page 3 with a pattern.
    page: u64,
    /// Digest of the identity of a device with two pages.
    identity: u64,
    /// Digest in the trailer of an image of two pages.
    trailer: u64,
    /// Length of that image in bytes.
    image_len: usize,
    /// Digest of all bytes of that image.
    image: u64,
}

mod pages_of_4_kib {
    const PAGE_SIZE: usize = 4 << 10;
    const GOLDEN: Golden = Golden {
        page_of_zeroes: 0x9b2f8b0e8f798589,
        page: 0xc3c3a501eaf3f862,
        identity: 0x18a0449a3f59c0ac,
        trailer: 0x03acff922afdea88,
        image_len: 8348,
        image: 0xf1b19c735e3d44cd,
    };

    include!("stream/pages.rs");
}

mod pages_of_16_kib {
    const PAGE_SIZE: usize = 16 << 10;
    const GOLDEN: Golden = Golden {
        page_of_zeroes: 0xbac2d5e2cf79f00d,
        page: 0xd0715a673870a425,
        identity: 0x60e339d48b9b0ba,
        trailer: 0x804a21e4d7a5ccf3,
        image_len: 32924,
        image: 0x2c12b2ba0f3a6656,
    };

    include!("stream/pages.rs");
}

mod pages_of_64_kib {
    const PAGE_SIZE: usize = 64 << 10;
    const GOLDEN: Golden = Golden {
        page_of_zeroes: 0xd8ff1ce69f424bd6,
        page: 0x662c9e47ee2a1c5f,
        identity: 0xe47dad1fd83e777d,
        trailer: 0x7d0707125756220f,
        image_len: 131228,
        image: 0x7d4c860f14a63397,
    };

    include!("stream/pages.rs");
}
