// SPDX-License-Identifier: GPL-2.0

//! Sizes with units, parsed and formatted.

/// Parses a number of bytes with an optional binary unit: `4096`, `0x1000`, `64K`, `1.5M`, `2G`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = match digits.split_once('.') {
        None => number(digits).and_then(|n: u64| n.checked_mul(1 << shift)),
        Some(_) => digits
            .parse::<f64>()
            .ok()
            .map(|n| n * f64::from(1 << shift))
            .filter(|n| *n >= 0.0 && *n < 1e18 && shift > 0)
            .map(|n| n as u64),
    };
    bytes.ok_or_else(|| format!("`{text}` is not a number of bytes such as 65536, 64K, 1.5M or 1G"))
}

/// Like [`parse_size`], but refuses 0.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("the rate must not be 0".into()),
        rate => Ok(rate),
    }
}

/// Formats a number of bytes with a unit.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1023.95 || unit == "GiB" {
            let digits = usize::from(unit != "B");
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    unreachable!()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("0x58"), Ok(0x58));
        assert_eq!(parse_size("64K"), Ok(64 << 10));
        assert_eq!(parse_size("1.5m"), Ok(3 << 19));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for text in [
            "",
            "K",
            "-1",
            "1.5",
            "1T",
            "1 M",
            "0x",
            "99999999999G",
            "NaNG",
            "ü",
        ] {
            let error = parse_size(text).expect_err(text);
            assert!(error.contains(text), "{error}");
        }
        assert!(parse_rate("0").is_err());
        assert_eq!(parse_rate("1"), Ok(1));
    }

    #[test]
    fn sizes_are_formatted() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(size(3 << 19), "1.5 MiB");
        assert_eq!(size(u64::MAX), "17179869184.0 GiB");
    }
}
