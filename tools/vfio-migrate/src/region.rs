// SPDX-License-Identifier: GPL-2.0

//! Regions of a device: their names, the load, and the comparison.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use rustix::param::page_size;

use crate::error::Error;
use crate::pace::Pace;
use crate::record::Compared;
use crate::uapi::{RegionInfo, REGION_CONFIG, REGION_ROM, REGION_VGA};
use crate::units::parse_size;

/// Size of reads and writes other than those of the load.
const PIECE: u64 = 1 << 20;

/// Access to the bytes of a region.
pub(crate) trait Bytes: Sync {
    /// Fills `buffer` from `offset`.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// Returns the name of a region of a PCI device.
pub(crate) fn name(index: u32) -> String {
    match index {
        REGION_CONFIG => "config".into(),
        REGION_ROM => "rom".into(),
        REGION_VGA => "vga".into(),
        0..=5 => format!("bar{index}"),
        _ => format!("region{index}"),
    }
}

/// Returns the index of the region with this name.
pub(crate) fn parse(text: &str) -> Result<u32, String> {
    let index = match text {
        "config" => Some(REGION_CONFIG),
        "rom" => Some(REGION_ROM),
        "vga" => Some(REGION_VGA),
        _ => match (text.strip_prefix("bar"), text.strip_prefix("region")) {
            (Some(bar), _) => bar.parse().ok().filter(|bar| *bar < 6),
            (_, Some(region)) => region.parse().ok(),
            _ => None,
        },
    };
    index.ok_or_else(|| format!("`{text}` is not bar0 to bar5, rom, config, vga or regionN"))
}

/// Bytes of a region that are excluded from the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ignored {
    index: u32,
    start: u64,
    end: u64,
}

impl Ignored {
    /// Parses `REGION` or `REGION:OFFSET+LENGTH`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some((region, range)) = text.split_once(':') else {
            return Ok(Self {
                index: parse(text)?,
                start: 0,
                end: u64::MAX,
            });
        };
        let (offset, length) = range
            .split_once('+')
            .ok_or_else(|| format!("`{text}` is not REGION or REGION:OFFSET+LENGTH"))?;
        let start = parse_size(offset)?;
        Ok(Self {
            index: parse(region)?,
            start,
            end: start.saturating_add(parse_size(length)?),
        })
    }
}

/// Register and its new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Index of the region.
    pub(crate) index: u32,
    /// Offset in the region.
    pub(crate) offset: u64,
    /// New value, written in little-endian order.
    pub(crate) value: u32,
}

impl Setting {
    /// Parses `REGION:OFFSET=VALUE`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not REGION:OFFSET=VALUE with a 32-bit value");
        let (region, rest) = text.split_once(':').ok_or_else(wrong)?;
        let (offset, value) = rest.split_once('=').ok_or_else(wrong)?;
        Ok(Self {
            index: parse(region)?,
            offset: parse_size(offset)?,
            value: parse_size(value)?.try_into().map_err(|_| wrong())?,
        })
    }
}

/// Returns the 8 bytes at `offset` of the pattern `seed`.
fn word(seed: u64, offset: u64) -> [u8; 8] {
    // The finaliser of splitmix64.
    let mut z = seed ^ offset.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()
}

/// Fills `buffer` with the pattern `seed` from `offset`.
fn pattern(seed: u64, offset: u64, buffer: &mut [u8]) {
    for (at, part) in (offset..).step_by(8).zip(buffer.chunks_mut(8)) {
        part.copy_from_slice(&word(seed, at)[..part.len()]);
    }
}

/// Fills a region with a pattern.
pub(crate) fn fill(bytes: &dyn Bytes, size: u64, seed: u64) -> io::Result<()> {
    let mut buffer = vec![0; size.min(PIECE) as usize];
    for offset in (0..size).step_by(PIECE as usize) {
        let buffer = &mut buffer[..(size - offset).min(PIECE) as usize];
        pattern(seed, offset, buffer);
        bytes.write(offset, buffer)?;
    }
    Ok(())
}

/// Load that keeps the source busy.
pub(crate) struct Load {
    stop: AtomicBool,
    written: AtomicU64,
}

impl Load {
    /// Creates a load that has not started.
    pub(crate) fn new() -> Self {
        Self {
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
        }
    }

    /// Writes pages of the host with different content at random offsets until [`Self::stop`] is
    /// called.
    pub(crate) fn run(&self, bytes: &dyn Bytes, size: u64, rate: u64) -> io::Result<()> {
        let mut pace = Pace::new(Some(rate), Instant::now());
        let mut page = vec![0; size.min(page_size() as u64) as usize];
        let pages = size / page.len() as u64;
        let mut count = 0;
        while !self.stop.load(Ordering::Acquire) {
            count += 1;
            let place = u64::from_le_bytes(word(1, count)) % pages * page.len() as u64;
            pattern(count, place, &mut page);
            bytes.write(place, &page)?;
            let done = page.len();
            self.written.fetch_add(done as u64, Ordering::Relaxed);
            thread::sleep(pace.after(done, Instant::now()));
        }
        Ok(())
    }

    /// Ends [`Self::run`] after the current write.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Returns the number of bytes written.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

/// The same region of both devices.
pub(crate) struct Pair<'a> {
    /// Region of the source.
    pub(crate) source: (RegionInfo, &'a dyn Bytes),
    /// Region of the target.
    pub(crate) target: (RegionInfo, &'a dyn Bytes),
}

/// Compares a region of both devices; an error names the device that cannot be read.
pub(crate) fn compare(pair: &Pair<'_>, ignored: &[Ignored]) -> Result<Compared, Error> {
    let (info, source) = pair.source;
    let (_, target) = pair.target;
    let mut result = Compared {
        region: name(info.index),
        bytes: 0,
        different: 0,
        first_different: None,
    };
    let skip: Vec<_> = ignored.iter().filter(|i| i.index == info.index).collect();
    if skip.iter().any(|i| i.start == 0 && i.end >= info.size) {
        return Ok(result);
    }
    let mut ours = vec![0; info.size.min(PIECE) as usize];
    let mut theirs = ours.clone();
    for offset in (0..info.size).step_by(PIECE as usize) {
        let length = (info.size - offset).min(PIECE) as usize;
        let (ours, theirs) = (&mut ours[..length], &mut theirs[..length]);
        let read = |side: &str, bytes: &dyn Bytes, buffer: &mut [u8]| {
            bytes.read(offset, buffer).map_err(|error| {
                Error::Migration(format!(
                    "{side}: {} cannot be read at {offset:#x}: {error}",
                    result.region
                ))
            })
        };
        read("source", source, ours)?;
        read("target", target, theirs)?;
        for (at, (a, b)) in (offset..).zip(ours.iter().zip(theirs.iter())) {
            if skip.iter().any(|i| (i.start..i.end).contains(&at)) {
                continue;
            }
            result.bytes += 1;
            if a != b {
                result.different += 1;
                result.first_different.get_or_insert(at);
            }
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Memory(Mutex<Vec<u8>>);

    impl Memory {
        fn new(size: usize) -> Self {
            Self(Mutex::new(vec![0; size]))
        }
    }

    impl Bytes for Memory {
        fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let memory = self.0.lock().expect("no test panics with it");
            buffer.copy_from_slice(&memory[offset as usize..][..buffer.len()]);
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let mut memory = self.0.lock().expect("no test panics with it");
            memory[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    fn info(index: u32, size: u64) -> RegionInfo {
        RegionInfo {
            index,
            size,
            offset: 0,
            readable: true,
            writable: true,
        }
    }

    fn compared(a: &Memory, b: &Memory, ignored: &[&str]) -> Compared {
        let ignored: Vec<_> = ignored
            .iter()
            .map(|text| Ignored::parse(text).expect(text))
            .collect();
        let size = a.0.lock().expect("no test panics with it").len() as u64;
        let pair = Pair {
            source: (info(2, size), a),
            target: (info(2, size), b),
        };
        compare(&pair, &ignored).expect("memory can be read")
    }

    #[test]
    fn region_names_are_parsed() {
        for index in 0..12 {
            assert_eq!(parse(&name(index)), Ok(index));
        }
        for text in ["bar6", "bar", "BAR0", "7", "region", "region-1", ""] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ignored_bytes_are_parsed() {
        let all = Ignored {
            index: 7,
            start: 0,
            end: u64::MAX,
        };
        assert_eq!(Ignored::parse("config"), Ok(all));
        let some = Ignored {
            index: 0,
            start: 0x54,
            end: 0x58,
        };
        assert_eq!(Ignored::parse("bar0:0x54+4"), Ok(some));
        for text in ["bar0:", "bar0:4", "bar9:0+4", "bar0:x+4", "bar0:0+", ""] {
            assert!(Ignored::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn settings_are_parsed() {
        let setting = Setting {
            index: 0,
            offset: 0x54,
            value: 1000,
        };
        assert_eq!(Setting::parse("bar0:0x54=1000"), Ok(setting));
        for text in ["bar0", "bar0:4", "bar9:0=1", "bar0:0=4G", "bar0:x=1", ""] {
            assert!(Setting::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pattern_does_not_depend_on_pieces() {
        let memory = Memory::new(3 * PIECE as usize / 2 + 3);
        let size = memory.0.lock().expect("no test panics with it").len();
        fill(&memory, size as u64, 9).expect("memory takes all");
        let mut whole = vec![0; size];
        pattern(9, 0, &mut whole);
        assert_eq!(*memory.0.lock().expect("no test panics with it"), whole);
        assert!(whole.windows(8).all(|w| w != [0; 8]));
    }

    #[test]
    fn differences_are_counted() {
        let size = 2 * PIECE as usize + 100;
        let (a, b) = (Memory::new(size), Memory::new(size));
        let equal = compared(&a, &b, &[]);
        assert_eq!((equal.bytes, equal.different), (size as u64, 0));
        let far = 2 * PIECE + 7;
        a.write(far, &[1]).expect("memory takes all");
        b.write(3, &[1, 1]).expect("memory takes all");
        let other = compared(&a, &b, &[]);
        assert_eq!((other.different, other.first_different), (3, Some(3)));
        let other = compared(&a, &b, &["bar2:3+2"]);
        assert_eq!((other.different, other.first_different), (1, Some(far)));
        assert_eq!(other.bytes, size as u64 - 2);
        let other = compared(&a, &b, &["bar2"]);
        assert_eq!((other.bytes, other.different), (0, 0));
        let other = compared(&a, &b, &["bar1"]);
        assert_eq!(other.different, 3);
    }

    #[test]
    fn load_writes_until_it_is_stopped() {
        // Smaller than a page, so that each write covers all of it.
        let memory = Memory::new(100);
        let load = Load::new();
        thread::scope(|scope| {
            let run = scope.spawn(|| load.run(&memory, 100, 1 << 30));
            while load.written() < 200 {
                thread::yield_now();
            }
            load.stop();
            run.join()
                .expect("it does not panic")
                .expect("memory takes all");
        });
        assert_eq!(load.written() % 100, 0);
        let mut last = vec![0; 100];
        pattern(load.written() / 100, 0, &mut last);
        assert_eq!(*memory.0.lock().expect("no test panics with it"), last);
    }
}
