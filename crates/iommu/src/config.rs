//! What a domain's hardware can do: the format of its page table, and what a device makes of that format.

use crate::Error;
use addr::{Iova, SizeSet, Span};
use pt::FormatKind;

/// How a domain's page table is made. The default is AMDv1 with all that it offers.
///
/// ```
/// use addr::{Iova, Span};
/// use lockstep_iommu_device::DomainConfig;
/// use pt::FormatKind;
/// let half_pages = DomainConfig {
///     format: FormatKind::AmdV1K2,
///     aperture: Some(Span::of(Iova::new(16 << 20), Iova::new((2 << 30) - 1))),
///     ..DomainConfig::default()
/// };
/// assert_eq!(half_pages.limits()?.0.smallest(), Some(addr::Lg2(11)));
/// # Ok::<_, lockstep_iommu_device::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainConfig {
    /// The format of its page table.
    pub format: FormatKind,
    /// Leaves are of these sizes at most; sizes that the format lacks do not matter.
    pub sizes: SizeSet,
    /// IOVAs that it translates, where these are fewer than the format's.
    pub aperture: Option<Span<Iova>>,
    /// Whether writes may mark their leaves dirty. Without effect in a format that has no dirty bit.
    pub tracks_dirty: bool,
}

impl Default for DomainConfig {
    fn default() -> Self {
        Self { format: FormatKind::AmdV1, sizes: SizeSet::ALL, aperture: None, tracks_dirty: true }
    }
}

impl DomainConfig {
    /// Leaf sizes and IOVAs that remain of the format's.
    ///
    /// # Errors
    /// [`Error::NoSizes`], [`Error::NoAperture`] when nothing remains.
    pub fn limits(&self) -> Result<(SizeSet, Span<Iova>), Error> {
        let sizes = self.sizes.and(self.format.sizes());
        if sizes.smallest().is_none() {
            return Err(Error::NoSizes { format: self.format, sizes: self.sizes });
        }
        let whole = self.format.aperture();
        let aperture = self.aperture.unwrap_or(whole);
        match aperture.intersect(whole) {
            Some(aperture) => Ok((sizes, aperture)),
            None => Err(Error::NoAperture { format: self.format, aperture }),
        }
    }
}
