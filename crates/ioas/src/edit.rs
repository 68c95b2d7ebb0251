//! What a change to leaves carries along, per domain: tables it may need, and what it must flush before anyone reuses the pages.

use crate::Error;
use addr::OutOfMemory;
use backing::Words;
use iommu::Domain;
use pt::{Gather, Stock};
use std::sync::Arc;

/// Domains of an edit that need no memory: more than any guest's devices usually have.
const INLINE: usize = 4;

/// The running account of one change, over any number of areas, pages and domains. One flush serves the whole batch.
///
/// Dropping it flushes what is left, so a forgotten flush costs time and never safety; but only an explicit [`Edit::flush`] says *when* the
/// promise holds.
#[derive(Debug, Default)]
pub struct Edit {
    /// In use from the front.
    inline: [Option<Slot>; INLINE],
    used: usize,
    more: Vec<Slot>,
}

#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) domain: Arc<Domain>,
    pub(crate) stock: Stock<Words>,
    pub(crate) gather: Gather,
    spans: usize,
}

impl Slot {
    fn new(domain: &Arc<Domain>) -> Self {
        Self { domain: Arc::clone(domain), stock: Stock::new(domain.table().arena()), gather: Gather::new(), spans: 0 }
    }

    fn flush(&mut self) {
        if !self.gather.is_empty() {
            self.domain.flush(std::mem::take(&mut self.gather));
        }
        self.spans = 0;
    }

    fn is_flushed(&self) -> bool {
        self.gather.is_empty()
    }

    /// Adds `tables` to the stock, and room for one more span to invalidate.
    pub(crate) fn reserve(&mut self, tables: u32) -> Result<(), Error> {
        self.spans += 1;
        self.gather.reserve(self.spans);
        Ok(self.stock.reserve(self.stock.tables().saturating_add(tables))?)
    }
}

impl Edit {
    /// Nothing reserved, nothing to flush.
    pub fn new() -> Self {
        Self::default()
    }

    /// Invalidates everything that was cleared, and waits until no device can be on it: afterwards the pages may change hands (I-4). Costs one
    /// flush for each domain in which something changed. What was reserved stays.
    ///
    /// # Panics
    /// When the calling thread holds a zero-copy slice of such a domain: it would wait for itself.
    pub fn flush(&mut self) {
        if self.is_flushed() {
            return;
        }
        // Log in all domains before the first wait, so that their grace periods overlap.
        for slot in self.slots().filter(|slot| !slot.is_flushed()) {
            slot.domain.invalidate(&slot.gather);
        }
        for slot in self.slots().filter(|slot| !slot.is_flushed()) {
            slot.domain.wait();
            std::mem::take(&mut slot.gather).finish(slot.domain.table().arena(), |_| {});
            slot.spans = 0;
        }
    }

    /// Whether a flush would have something to do.
    pub fn is_flushed(&self) -> bool {
        self.inline[..self.used].iter().flatten().chain(&self.more).all(Slot::is_flushed)
    }

    fn slots(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.inline[..self.used].iter_mut().flatten().chain(&mut self.more)
    }

    /// Makes sure that the domain has a slot, so that [`Edit::slot`] loses nothing.
    pub(crate) fn prepare(&mut self, domain: &Arc<Domain>) -> Result<&mut Slot, Error> {
        sync::fail::step("ioas.edit")?;
        let known = self.slots().any(|slot| Arc::ptr_eq(&slot.domain, domain));
        if !known && self.used == INLINE {
            self.more.try_reserve(1).map_err(|_| OutOfMemory)?;
        }
        Ok(self.slot(domain))
    }

    /// The domain's slot. Cannot fail: without memory for another slot the first is flushed and given away, its reserve lost.
    pub(crate) fn slot(&mut self, domain: &Arc<Domain>) -> &mut Slot {
        let same = |slot: &Slot| Arc::ptr_eq(&slot.domain, domain);
        if let Some(at) = self.inline.iter().position(|slot| slot.as_ref().is_none_or(same)) {
            self.used = self.used.max(at + 1);
            return self.inline[at].get_or_insert_with(|| Slot::new(domain));
        }
        if let Some(at) = self.more.iter().position(same) {
            return &mut self.more[at];
        }
        if self.more.try_reserve(1).is_ok() {
            self.more.push(Slot::new(domain));
            let last = self.more.len() - 1;
            return &mut self.more[last];
        }
        if let Some(first) = &mut self.inline[0] {
            first.flush();
        }
        self.inline[0].insert(Slot::new(domain))
    }
}

impl Drop for Edit {
    fn drop(&mut self) {
        self.flush();
    }
}
