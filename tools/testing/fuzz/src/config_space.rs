// SPDX-License-Identifier: GPL-2.0

//! Configuration space: only writable bits change.

#[path = "../../../../rust/vfio/emulated/config_space.rs"]
#[allow(dead_code, unreachable_pub)]
mod sut;

use self::sut::{
    is_decoding,
    is_master,
    read,
    ConfigSpace,
    Content,
    Id,
    SIZE, //
};
use crate::Input;

/// Returns the content after a reset and a write to all of it.
fn written(space: &ConfigSpace, value: u8) -> Content {
    let mut content = [0xee; SIZE];

    space.reset(&mut content);
    space.write(&mut content, 0, &[value; SIZE]);
    content
}

/// Fuzz target.
pub(crate) fn target(data: &[u8]) {
    let mut input = Input(data);
    let id = Id {
        vendor: input.number() as u16,
        device: input.number() as u16,
        class: input.number() as u32 & 0xff_ffff,
    };
    let mut space = ConfigSpace::new(id);
    let mut sizes = [0; 6];

    for _ in 0..input.below(4) {
        let (index, size) = (input.below(7), input.number());
        let good = [0, 2, 4].contains(&index)
            && sizes[index] == 0
            && (16..=1 << 40).contains(&size)
            && size.is_power_of_two();
        let with = space.memory_bar(index, size, input.bool());

        assert_eq!(with.is_ok(), good);
        if let Ok(with) = with {
            space = with;
            sizes[index] = size;
        }
    }
    if input.bool() {
        let (vectors, bar) = (input.number() as u32, input.below(8) as u32);
        let (table, pending) = (input.number() as u32, input.number() as u32);
        let size = sizes.get(bar as usize).copied().unwrap_or(0);
        let (at, end) = (u64::from(table), u64::from(table) + u64::from(vectors) * 16);
        let (pending_at, pending_end) = (
            u64::from(pending),
            u64::from(pending) + u64::from(vectors.div_ceil(64)) * 8,
        );
        let good = (1..=2048).contains(&vectors)
            && table % 8 == 0
            && pending % 8 == 0
            && end.max(pending_end) <= size
            && (end <= pending_at || pending_end <= at);
        let with = space.msix(vectors, bar, table, pending);

        assert_eq!(with.is_ok(), good);
        if let Ok(with) = with {
            let place = with.msix_place();

            assert_eq!((place.vectors, place.bar), (vectors, bar));
            assert_eq!((place.table, place.pending), (table, pending));
            space = with;
        }
    }
    for (index, size) in (0..).zip(sizes) {
        assert_eq!(space.region_size(index), size);
    }
    assert_eq!(space.region_size(7), SIZE as u64);

    // The writable bits are those that differ after writing ones and zeros.
    let (ones, zeros) = (written(&space, 0xff), written(&space, 0));
    for (index, size) in (0..6).zip(sizes).filter(|(_, size)| *size > 0) {
        // Size a BAR as in the PCI specification.
        let at = 0x10 + 4 * index;
        let low = u32::from_le_bytes(*ones[at..].first_chunk().expect("inside"));
        let high = u32::from_le_bytes(*ones[at + 4..].first_chunk().expect("inside"));

        assert_eq!(low & 0xf & !8, 4);
        let mask = u64::from(high) << 32 | u64::from(low & !0xf);
        assert_eq!(mask.wrapping_neg(), size);
    }

    let mut content = [0xee; SIZE];
    space.reset(&mut content);
    let mut model = content;
    for (at, byte) in model.into_iter().enumerate() {
        assert_eq!(byte & !(ones[at] ^ zeros[at]), zeros[at]);
    }
    while !input.is_empty() {
        let op = input.below(4);
        let (offset, count) = (input.below(SIZE + 8), input.below(SIZE + 8));
        let from = input.bytes(count);

        match op {
            0 => {
                let mut to = vec![0xee; count];

                read(&content, offset, &mut to);
                for (at, byte) in (offset..).zip(to) {
                    assert_eq!(byte, model.get(at).copied().unwrap_or(0));
                }
            }
            1 | 2 => {
                space.write(&mut content, offset, from);
                for (at, byte) in (offset..SIZE).zip(from) {
                    let writable = ones[at] ^ zeros[at];

                    model[at] = model[at] & !writable | byte & writable;
                }
            }
            _ => {
                let mut image = content;

                for (at, byte) in (offset..SIZE).zip(from) {
                    image[at] = *byte;
                }
                let fits = |at: usize| image[at] & !(ones[at] ^ zeros[at]) == zeros[at];
                let good = (0..SIZE).all(fits);
                assert_eq!(space.accepts(&image), good);
            }
        }
        assert_eq!(content, model);
        let msix = space.msix_place().vectors > 0;
        let masked = msix && model[0x43] & 0x40 != 0;
        assert_eq!(space.is_function_masked(&content), masked);
        assert_eq!(is_decoding(&content), model[4] & 2 != 0);
        assert_eq!(is_master(&content), model[4] & 4 != 0);
    }
}
