//! What a device remembers of translations. Entries never overlap, so that an invalidation finds each with one look.

use addr::{Address, Iova, Oa, Span};
use std::collections::BTreeMap;

/// Entries that a device keeps.
const ENTRIES: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Entry {
    last: Iova,
    oa: Oa,
    /// It was asked for in order to write.
    write: bool,
}

/// A device's translation cache.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: BTreeMap<Iova, Entry>,
    /// How much of the port's queue was applied.
    pub(crate) seen: u64,
}

impl Cache {
    /// The output address of `iova`, and the bytes from there to the end of its entry, less one.
    pub(crate) fn lookup(&self, iova: Iova, write: bool) -> Option<(Oa, u64)> {
        let (start, entry) = self.entries.range(..=iova).next_back()?;
        let fits = iova <= entry.last && (entry.write || !write);
        fits.then(|| (entry.oa.plus(iova.offset_from(*start)), entry.last.offset_from(iova)))
    }

    /// A translation of all of `span`, which begins at `oa`.
    pub(crate) fn fill(&mut self, span: Span<Iova>, oa: Oa, write: bool) {
        self.invalidate(span);
        if self.entries.len() == ENTRIES {
            self.entries.pop_first();
        }
        self.entries.insert(span.start(), Entry { last: span.last(), oa, write });
    }

    /// Drops every translation of any address in `span`.
    pub(crate) fn invalidate(&mut self, span: Span<Iova>) {
        while let Some(found) = self.overlapping(span) {
            self.entries.remove(&found.start());
        }
    }

    /// The last entry that has an address in `span`.
    pub(crate) fn overlapping(&self, span: Span<Iova>) -> Option<Span<Iova>> {
        let (start, entry) = self.entries.range(..=span.last()).next_back()?;
        (entry.last >= span.start()).then(|| Span::of(*start, entry.last))
    }

    /// Shows what is translated of `span`, entry by entry, and where each part begins.
    pub(crate) fn each(&self, span: Span<Iova>, mut show: impl FnMut(Span<Iova>, Oa)) {
        for (start, entry) in self.entries.range(..=span.last()).rev() {
            let Some(part) = Span::of(*start, entry.last).intersect(span) else { break };
            show(part, entry.oa.plus(part.start().offset_from(*start)));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, last: u64) -> Span<Iova> {
        Span::of(Iova::new(start), Iova::new(last))
    }

    #[test]
    fn entries_never_overlap_and_go_with_any_byte() {
        let mut cache = Cache::default();
        cache.fill(span(0x20_0000, 0x3f_ffff), Oa::new(0x4000_0000), false);
        assert_eq!(cache.lookup(Iova::new(0x20_1008), false), Some((Oa::new(0x4000_1008), 0x1f_eff7)));
        assert_eq!(cache.lookup(Iova::new(0x20_1008), true), None, "asked for reading");
        assert_eq!(cache.lookup(Iova::new(0x40_0000), false), None);
        cache.fill(span(0x20_1000, 0x20_1fff), Oa::new(0x4000_1000), true);
        assert_eq!((cache.len(), cache.lookup(Iova::new(0x20_0000), false)), (1, None));
        cache.fill(span(0x20_2000, 0x20_2fff), Oa::new(0x4000_2000), true);
        cache.invalidate(span(0x20_1fff, 0x20_1fff));
        assert_eq!((cache.len(), cache.overlapping(Span::whole())), (1, Some(span(0x20_2000, 0x20_2fff))));
        for page in 0..2 * ENTRIES as u64 {
            cache.fill(Span::block(Iova::new(page << 12), 12), Oa::new(page << 12), true);
        }
        assert_eq!(cache.len(), ENTRIES);
        cache.invalidate(Span::whole());
        assert_eq!(cache.len(), 0);
    }
}
