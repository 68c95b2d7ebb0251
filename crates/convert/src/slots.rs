//! The memslots of a guest's physical space, by guest address and by page, each way in O(log n).

use addr::{Gpa, OutOfMemory, PAGE_LG2, Page, Span, SpanMap};
use backing::BackingId;
use ioas::Pages;
use std::collections::HashMap;
use std::sync::Arc;

/// The memslots, by either side.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub(crate) by_gpa: SpanMap<Gpa, Slot>,
    /// The same the other way round: per backing, what to add to a page to get its frame.
    pub(crate) by_page: HashMap<BackingId, SpanMap<Page, Frames>>,
}

/// Memory of one memslot. Says the same wherever the slot is cut.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) pages: Arc<Pages>,
    pub(crate) frames: Frames,
}

impl PartialEq for Slot {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pages, &other.pages) && self.frames == other.frames
    }
}

/// From pages of a backing to frames of the guest: what is added, modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frames(u64);

impl Frames {
    pub(crate) fn new(gpa: Gpa, page: Page) -> Self {
        Self((gpa.get() >> PAGE_LG2).wrapping_sub(page.get()))
    }

    pub(crate) fn gpa(self, page: Page) -> Gpa {
        Gpa::new(page.get().wrapping_add(self.0) << PAGE_LG2)
    }

    pub(crate) fn gpas(self, pages: Span<Page>) -> Span<Gpa> {
        pages.unindex::<Page>(PAGE_LG2).onto(self.gpa(pages.start()))
    }

    pub(crate) fn pages(self, part: Span<Gpa>) -> Span<Page> {
        let page = |gpa: Gpa| Page::new((gpa.get() >> PAGE_LG2).wrapping_sub(self.0));
        Span::of(page(part.start()), page(part.last()))
    }
}

impl Slots {
    /// These pages are shown no more.
    ///
    /// # Errors
    /// No memory, when that makes two entries of one.
    pub(crate) fn forget(&mut self, backing: BackingId, pages: Span<Page>) -> Result<(), OutOfMemory> {
        let Some(by_page) = self.by_page.get_mut(&backing) else { return Ok(()) };
        by_page.clear(pages)?;
        if by_page.is_empty() {
            self.by_page.remove(&backing);
        }
        Ok(())
    }
}
