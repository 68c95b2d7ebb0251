//! The spans for which a source's pages stay pinned. They may overlap and repeat; their union is what is pinned.
//!
//! Most sources have one area in an address space with a domain, so the first span needs no memory of its own.

use addr::{IntervalTree, OutOfMemory, Page, Span};

pub(crate) struct Holds {
    first: Option<Span<Page>>,
    more: IntervalTree<Page, ()>,
}

impl Holds {
    pub(crate) fn new() -> Self {
        Self { first: None, more: IntervalTree::new() }
    }

    /// Makes the next [`Holds::add`] infallible.
    pub(crate) fn reserve(&mut self) -> Result<(), OutOfMemory> {
        if self.first.is_none() { Ok(()) } else { self.more.reserve(1) }
    }

    /// Makes the next two infallible, whatever is removed before.
    pub(crate) fn reserve_two(&mut self) -> Result<(), OutOfMemory> {
        self.more.reserve(2)
    }

    pub(crate) fn add(&mut self, span: Span<Page>) {
        if self.first.is_none() {
            self.first = Some(span);
            return;
        }
        let added = self.more.insert(span, ());
        debug_assert!(added.is_ok(), "{span} was not reserved for");
    }

    /// Takes one such span out; whether there was one.
    pub(crate) fn remove(&mut self, span: Span<Page>) -> bool {
        if self.first == Some(span) {
            self.first = None;
            return true;
        }
        self.more.remove_exact(span).is_some()
    }

    /// Shows what of `span` no hold covers, ascending, until `show` has had enough.
    pub(crate) fn each_gap<E>(&self, span: Span<Page>, mut show: impl FnMut(Span<Page>) -> Result<(), E>) -> Result<(), E> {
        let mut without_first = |gap: Span<Page>| match self.first {
            Some(first) if first.overlaps(gap) => gap.without(first).into_iter().flatten().try_for_each(&mut show),
            _ => show(gap),
        };
        if self.more.is_empty() {
            return without_first(span);
        }
        self.more.gaps(span).try_for_each(without_first)
    }

    /// Shows what is held, by ascending start; spans may overlap.
    pub(crate) fn each_covered(&self, mut show: impl FnMut(Span<Page>)) {
        let mut first = self.first;
        for (span, ()) in self.more.iter() {
            if let Some(before) = first.take_if(|first| first.start() <= span.start()) {
                show(before);
            }
            show(span);
        }
        first.into_iter().for_each(show);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, last: u64) -> Span<Page> {
        Span::of(Page::new(start), Page::new(last))
    }

    fn gaps(holds: &Holds, of: Span<Page>) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let _all = holds.each_gap(of, |gap| {
            gaps.push((gap.start().get(), gap.last().get()));
            Ok::<_, ()>(())
        });
        gaps
    }

    #[test]
    fn gaps_between_overlapping_holds() {
        let mut holds = Holds::new();
        assert_eq!(gaps(&holds, span(0, 9)), [(0, 9)]);
        for (start, last) in [(50, 59), (10, 19), (15, 17), (15, 29), (70, u64::MAX)] {
            holds.reserve().unwrap();
            holds.add(span(start, last));
        }
        assert_eq!(gaps(&holds, span(0, 99)), [(0, 9), (30, 49), (60, 69)]);
        assert_eq!(gaps(&holds, span(12, 16)), []);
        assert_eq!(gaps(&holds, span(55, 64)), [(60, 64)]);
        let mut covered = Vec::new();
        holds.each_covered(|span| covered.push(span.start().get()));
        assert_eq!(covered, [10, 15, 15, 50, 70]);
        assert!(holds.remove(span(50, 59)) && !holds.remove(span(50, 59)) && holds.remove(span(15, 29)));
        assert_eq!(gaps(&holds, span(0, 99)), [(0, 9), (20, 69)]);
    }

    /// Against one counter per page.
    #[test]
    fn any_order_is_right() {
        let mut random = fastrand::Rng::with_seed(7);
        let (mut holds, mut counts, mut held) = (Holds::new(), [0u32; 64], Vec::new());
        for _ in 0..4000 {
            if held.is_empty() || random.u8(..) < 130 && held.len() < 12 {
                let start = random.u64(..64);
                held.push(span(start, random.u64(start..64)));
                holds.reserve().unwrap();
                holds.add(held[held.len() - 1]);
            } else {
                let gone = held.swap_remove(random.usize(..held.len()));
                assert!(holds.remove(gone));
            }
            counts.fill(0);
            held.iter().for_each(|span| (span.start().get()..=span.last().get()).for_each(|page| counts[page as usize] += 1));
            let mut open = [false; 64];
            let start = random.u64(..64);
            let of = span(start, random.u64(start..64));
            gaps(&holds, of).iter().for_each(|&(start, last)| open[start as usize..=last as usize].fill(true));
            assert!((0..64).all(|page| open[page as usize] == (of.contains(Page::new(page)) && counts[page as usize] == 0)));
        }
    }
}
