// SPDX-License-Identifier: GPL-2.0

//! Settings of a device in sysfs with which a tester makes it misbehave.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::record::Side;

/// A setting as requested by the user: `[target:]NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Knob {
    side: Side,
    name: String,
    value: String,
}

impl Knob {
    /// Parses an argument.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
        let (side, name) = match name.split_once(':') {
            None => (Side::Source, name),
            Some(("source", name)) => (Side::Source, name),
            Some(("target", name)) => (Side::Target, name),
            Some((side, _)) => return Err(format!("{side} is neither source nor target")),
        };
        if name.is_empty() || name.contains('/') {
            return Err(format!("{name:?} is not the name of a file"));
        }
        Ok(Self {
            side,
            name: name.into(),
            value: value.into(),
        })
    }
}

/// Settings that were changed. Dropping it restores their previous values, the last one first.
pub(crate) struct Turned(Vec<(PathBuf, String)>);

impl Turned {
    /// Changes settings of the devices at these paths in sysfs.
    pub(crate) fn new(knobs: &[Knob], source: &Path, target: &Path) -> Result<Self, Error> {
        let mut turned = Self(Vec::new());
        for knob in knobs {
            let device = match knob.side {
                Side::Source => source,
                Side::Target => target,
            };
            let path = device.join("knobs").join(&knob.name);
            let set = fs::read_to_string(&path).and_then(|old| {
                fs::write(&path, format!("{}\n", knob.value))?;
                Ok(old)
            });
            match set {
                Ok(old) => turned.0.push((path, old)),
                Err(error) => {
                    let message = format!("{}={}: {error}", path.display(), knob.value);
                    return Err(Error::Usage(message));
                }
            }
        }
        Ok(turned)
    }
}

impl Drop for Turned {
    fn drop(&mut self) {
        for (path, old) in self.0.drain(..).rev() {
            if let Err(error) = fs::write(&path, old) {
                eprintln!("vfio-migrate: cannot restore {}: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knob(side: Side, name: &str, value: &str) -> Result<Knob, String> {
        Ok(Knob {
            side,
            name: name.into(),
            value: value.into(),
        })
    }

    #[test]
    fn arguments_name_a_device_and_a_file() {
        assert_eq!(Knob::parse("a=1"), knob(Side::Source, "a", "1"));
        assert_eq!(Knob::parse("source:a=1"), knob(Side::Source, "a", "1"));
        let rule = "arc *->STOP nth=2";
        let text = format!("target:faults={rule}");
        assert_eq!(Knob::parse(&text), knob(Side::Target, "faults", rule));
        for bad in ["a", "=1", "b:a=1", "target:=1", "../a=1"] {
            assert!(Knob::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn previous_values_are_restored() {
        let folder = std::env::temp_dir().join(format!("vfio-migrate-knob-{}", std::process::id()));
        let file = folder.join("knobs/rate");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "5\n").unwrap();
        let knobs = ["rate=7", "rate=8"].map(|text| Knob::parse(text).unwrap());
        let turned = Turned::new(&knobs, &folder, Path::new("/nowhere")).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "8\n");
        drop(turned);
        assert_eq!(fs::read_to_string(&file).unwrap(), "5\n");
        let knobs = ["rate=7", "none=8"].map(|text| Knob::parse(text).unwrap());
        assert!(Turned::new(&knobs, &folder, Path::new("/nowhere")).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "5\n");
        fs::remove_dir_all(folder).unwrap();
    }
}
