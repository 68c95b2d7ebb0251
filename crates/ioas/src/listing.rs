//! The areas over the pages of one backing. A backing that came with one map call has one area, as long as nobody copies it.

use crate::Area;
use addr::{IntervalTree, OutOfMemory, Page, Span};
use std::sync::Arc;

/// Either `only` or `tree` is in use.
#[derive(Default)]
pub(crate) struct Listing {
    only: Option<(Span<Page>, Arc<Area>)>,
    tree: IntervalTree<Page, Arc<Area>>,
}

impl Listing {
    pub(crate) fn len(&self) -> usize {
        usize::from(self.only.is_some()) + self.tree.len()
    }

    /// Makes the next `extra` inserts infallible.
    pub(crate) fn reserve(&mut self, extra: usize) -> Result<(), OutOfMemory> {
        self.tree.reserve(extra + 1)
    }

    /// Adds an area that was in no list before.
    pub(crate) fn insert(&mut self, area: &Arc<Area>) -> Result<(), OutOfMemory> {
        let entry = (area.page_span(), Arc::clone(area));
        if self.len() == 0 {
            self.only = Some(entry);
            return Ok(());
        }
        self.reserve(1)?;
        for (pages, area) in self.only.take().into_iter().chain([entry]) {
            let handle = self.tree.insert(pages, Arc::clone(&area))?;
            area.set_listed(handle);
        }
        Ok(())
    }

    pub(crate) fn remove(&mut self, area: &Area) -> Option<Arc<Area>> {
        if let Some((_, only)) = self.only.take_if(|(_, only)| std::ptr::eq(Arc::as_ptr(only), area)) {
            return Some(only);
        }
        // By its handle, since there may be any number of others over the same pages.
        self.tree.remove(area.listed()?)
    }

    /// Those that meet `pages`, by ascending first page.
    pub(crate) fn overlapping(&self, pages: Span<Page>) -> impl Iterator<Item = (Span<Page>, &Arc<Area>)> {
        let only = self.only.iter().filter(move |(own, _)| own.overlaps(pages)).map(|(own, area)| (*own, area));
        only.chain(self.tree.overlapping(pages))
    }
}
