//! Failures on request: `NAME:N=ERRNO` makes the Nth call of that name fail without an effect, so that a program's error paths can be tested.

use super::errno;
use rustix::io::Errno;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// One call that fails. Written `NAME:N=ERRNO`: the ioctl's name in any case, with or without what its family begins with, the number of the
/// call counted from 1, and the error by name or number.
#[derive(Debug)]
pub struct FailRule {
    name: String,
    nth: u64,
    errno: Errno,
    calls: AtomicU64,
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    /// A part is missing.
    #[error("'{text}' is not NAME:N=ERRNO, for example IOMMU_IOAS_MAP:3=ENOMEM")]
    Shape {
        /// As it was given.
        text: String,
    },
    /// Not a number of a call.
    #[error("'{nth}' is no number of a call: they count from 1")]
    Nth {
        /// As it was given.
        nth: String,
    },
    /// No such error.
    #[error("'{errno}' is neither the name nor the number of an error, as ENOMEM and 12 are")]
    Errno {
        /// As it was given.
        errno: String,
    },
    /// No such ioctl.
    #[error("no ioctl is called '{name}'; did you mean {nearest}?")]
    Name {
        /// As it was given.
        name: String,
        /// One that there is.
        nearest: String,
    },
}

/// What may be left out of a name. Longer ones first.
const FAMILIES: [&str; 7] = ["VFIO_IOMMU_", "VFIO_DEVICE_", "VFIO_", "IOMMU_IOAS_", "IOMMU_", "LOCKSTEP_IOAS_", "LOCKSTEP_"];

impl FailRule {
    /// Counts a call; the error, if it is the one.
    pub(super) fn hit(&self, name: &str) -> Option<Errno> {
        if !self.is_for(name) {
            return None;
        }
        (self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.nth).then_some(self.errno)
    }

    fn is_for(&self, name: &str) -> bool {
        let short = |family: &str| name.strip_prefix(family).is_some_and(|rest| rest.eq_ignore_ascii_case(&self.name));
        name.eq_ignore_ascii_case(&self.name) || FAMILIES.iter().any(|family| short(family))
    }

    pub(super) fn check_name<'a>(&self, names: impl IntoIterator<Item = &'a str> + Clone) -> Result<(), RuleError> {
        if names.clone().into_iter().any(|name| self.is_for(name)) {
            return Ok(());
        }
        let wanted = self.name.to_ascii_uppercase();
        let distance =
            |name: &&str| FAMILIES.iter().map(|family| name.strip_prefix(family).unwrap_or(name)).map(|name| edits(name, &wanted)).min();
        let nearest = names.into_iter().min_by_key(distance).unwrap_or_default();
        Err(RuleError::Name { name: self.name.clone(), nearest: nearest.to_owned() })
    }
}

impl FromStr for FailRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let parts =
            text.split_once('=').and_then(|(call, errno)| call.rsplit_once(':').map(|(name, nth)| (name.trim(), nth.trim(), errno.trim())));
        let (name, nth, errno) = parts.filter(|(name, ..)| !name.is_empty()).ok_or_else(|| RuleError::Shape { text: text.to_owned() })?;
        let number = nth.parse().ok().filter(|number| *number > 0).ok_or_else(|| RuleError::Nth { nth: nth.to_owned() })?;
        let errno = errno::parse(errno).ok_or_else(|| RuleError::Errno { errno: errno.to_owned() })?;
        Ok(Self { name: name.to_owned(), nth: number, errno, calls: AtomicU64::new(0) })
    }
}

/// How many letters one must change, add or drop to get from one word to the other.
fn edits(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, letter) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, its) in other.bytes().enumerate() {
            let changed = diagonal + usize::from(letter != its);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> impl Iterator<Item = &'static str> + Clone {
        crate::TABLE.iter().map(|entry| entry.name)
    }

    #[test]
    fn rules_say_what_is_wrong_with_them() {
        let error = |text: &str| text.parse::<FailRule>().unwrap_err().to_string();
        assert_eq!(error("MAP=ENOMEM"), "'MAP=ENOMEM' is not NAME:N=ERRNO, for example IOMMU_IOAS_MAP:3=ENOMEM");
        assert_eq!(error(":1=ENOMEM"), "':1=ENOMEM' is not NAME:N=ERRNO, for example IOMMU_IOAS_MAP:3=ENOMEM");
        assert_eq!(error("MAP:0=ENOMEM"), "'0' is no number of a call: they count from 1");
        assert_eq!(error("MAP:-1=ENOMEM"), "'-1' is no number of a call: they count from 1");
        assert_eq!(error("MAP:1=ENOPE"), "'ENOPE' is neither the name nor the number of an error, as ENOMEM and 12 are");
        let rule: FailRule = "ioas_mapp:1=EIO".parse().unwrap();
        assert_eq!(rule.check_name(names()).unwrap_err().to_string(), "no ioctl is called 'ioas_mapp'; did you mean IOMMU_IOAS_MAP?");
    }

    #[test]
    fn the_nth_call_of_the_name_fails_and_no_other() {
        for text in ["IOMMU_IOAS_MAP:2=ENOMEM", "ioas_map:2=12", "Ioas_Map:2=enomem", "map:2=ENOMEM"] {
            let rule: FailRule = text.parse().unwrap();
            rule.check_name(names()).unwrap();
            assert_eq!(rule.hit("IOMMU_IOAS_MAP"), None);
            assert_eq!(rule.hit("IOMMU_IOAS_MAP_FILE"), None);
            assert_eq!(rule.hit("IOMMU_IOAS_MAP"), Some(Errno::NOMEM));
            assert_eq!(rule.hit("IOMMU_IOAS_MAP"), None);
        }
        let rule: FailRule = "map_dma:1=EIO".parse().unwrap();
        assert_eq!(rule.hit("VFIO_IOMMU_MAP_DMA"), Some(Errno::IO));
    }
}
