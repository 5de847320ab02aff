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
        page_of_zeroes: 0x38e6d43f61059f84,
        page: 0x4d58a37e0563a24a,
        identity: 0x18a0449a3f59c0ac,
        trailer: 0x4f1f13b77ab250a2,
        image_len: 8348,
        image: 0x9f299da614b1db62,
    };

    include!("stream/pages.rs");
}

mod pages_of_16_kib {
    const PAGE_SIZE: usize = 16 << 10;
    const GOLDEN: Golden = Golden {
        page_of_zeroes: 0xeacf9ae7eb1dacd0,
        page: 0xc69ad22fbee3bcfb,
        identity: 0x60e339d48b9b0ba,
        trailer: 0xcb8e6cb87bcc1b2e,
        image_len: 32924,
        image: 0xa4d0d5992e190f34,
    };

    include!("stream/pages.rs");
}

mod pages_of_64_kib {
    const PAGE_SIZE: usize = 64 << 10;
    const GOLDEN: Golden = Golden {
        page_of_zeroes: 0x14a6659c85383819,
        page: 0x2816c3aa9b9a0f0f,
        identity: 0xe47dad1fd83e777d,
        trailer: 0x9306bc8eae459ffe,
        image_len: 131228,
        image: 0xc11cae5eec211b1f,
    };

    include!("stream/pages.rs");
}
