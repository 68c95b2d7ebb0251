//! The process's own memory as a source of pages: what IOMMUFD calls a map of a user address.

use crate::raw::Mapping;
use crate::window::align_lg2;
use crate::{Error, backing};
use addr::Hva;

/// A stretch of this process's memory, new or adopted, that a [`crate::Backing`] can be made of.
#[derive(Debug)]
pub struct UserRegion {
    mapping: Mapping,
}

impl UserRegion {
    /// New zeroed memory, shared with children, allocated when touched.
    ///
    /// # Errors
    /// A length that is no multiple of 4 KiB; what mmap answers.
    pub fn new(len_bytes: u64) -> Result<Self, Error> {
        let len = backing::check_len(len_bytes)?;
        sync::fail::step("backing.mmap")?;
        let mapping = Mapping::anonymous(len, align_lg2(len_bytes)).map_err(Error::os("mmap", 0, len_bytes))?;
        Ok(Self { mapping })
    }

    pub(crate) fn of(mapping: Mapping) -> Self {
        Self { mapping }
    }

    pub(crate) fn into_mapping(self) -> Mapping {
        self.mapping
    }

    /// Where it begins.
    pub fn hva(&self) -> Hva {
        self.mapping.start()
    }

    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len_bytes()
    }
}
