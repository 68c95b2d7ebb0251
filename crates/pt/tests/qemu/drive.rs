//! What is done with a tree while the model walks it: leaves of every size and permission, each cut, unmapped in part, mapped again, merged
//! and unmapped; then a random history in which leaves of all sizes lie side by side.

use crate::device::{LEN, MAILBOX, MAILBOX_BYTES};
use crate::probe::Place;
use crate::rig::Rig;
use crate::walker::{Invalidates, Walker};
use addr::{Address, Iova, Lg2, Oa, SizeSet, Span};
use lockstep_pt::{Config, Format, Perm};

const HISTORY: usize = 60;
const BYTES: u64 = LEN as u64;
/// More leaf sizes than this are too many to try each in every configuration.
const MANY: usize = 12;
/// A history plays in this much, or in the half of a smaller tree.
const STAGE_LG2: u8 = 30;
/// The longest span of a history: half of a window of memory.
const LONGEST_PAGES: u64 = 2048;

/// All of it, in one configuration of the format.
pub(crate) fn run<F: Format, W: Walker>(walker: W, what: &str, config: Config) {
    let name = format!("{what}, {}", config.name);
    let mut rig = Rig::<F, W>::new(walker, &name, config.start_level, config.sizes);
    rig.stale();
    let sizes = (0..64).map(Lg2).filter(|size| rig.sizes.has(*size) && F::level_of(*size) <= config.start_level);
    let sizes = sizes.collect::<Vec<_>>();
    // Of many sizes, half of those over several slots: the others in the trees that are one level higher or lower.
    let many = sizes.len() > MANY;
    let wanted = |size: &Lg2| !many || size.0 == F::item_lg2(F::level_of(*size)) || size.0 % 2 == config.start_level % 2;
    for (index, size) in sizes.into_iter().filter(wanted).enumerate() {
        for (other, perm) in F::PERMS.iter().enumerate() {
            if !many || perm == Perm::RW || index % 3 == other {
                rig.one_leaf(size, perm);
            }
        }
        rig.cut_and_merge(size);
    }
    rig.history();
    rig.check_tables();
    assert_eq!(rig.table.breaks() == 0, F::HITLESS.is_allowed(), "{}: {} leaves were broken", rig.name, rig.table.breaks());
    println!("{}: {}", rig.name, rig.tally);
}

/// A tree that begins as low as it can and grows to its full height, each time with a new top.
pub(crate) fn grow<F: Format, W: Walker>(walker: W, what: &str) {
    let mut rig = Rig::<F, W>::new(walker, what, 0, SizeSet::ALL);
    let mut mapped = Vec::new();
    for level in 0..=F::MAX_LEVEL {
        let span = Span::block(Iova::new(F::reach(level).get() / 2 + 1), 12);
        let oa = rig.oa_for(Lg2(12));
        rig.map(span, oa, Perm::RW, SizeSet::ALL);
        assert_eq!(rig.table.root().1, level, "{}: {span} takes a top of that level", rig.name);
        mapped.extend([span.start(), Iova::new(span.last().get() - (BYTES - 1)), Iova::new(span.start().get() - BYTES)]);
        rig.probe(&places(&mapped));
    }
    rig.check_tables();
    println!("{}, grown from level 0 to {}: {}", rig.name, F::MAX_LEVEL, rig.tally);
}

impl<F: Format, W: Walker> Rig<F, W> {
    /// The model caches translations, as far as its description says: or no test here could tell whether we invalidate enough.
    fn stale(&mut self) {
        let [page, other] = [12, 12].map(|lg2| self.place(Lg2(lg2)));
        let oa = self.oa_for(Lg2(12));
        self.map(page, oa, Perm::RW, SizeSet::ALL);
        self.dirty([page.start()].into_iter());
        self.probe(&places(&[page.start()]));
        self.unmap_and_leave_cached(page);
        let bytes = std::array::from_fn::<u8, LEN, _>(|at| at as u8);
        self.device.qtest.write(oa.get(), &bytes);
        let stale = |rig: &mut Self| rig.device.read(&[page.start()])[0].0 == bytes;
        assert!(stale(self), "{}: the model does not cache translations", self.name);
        if other != page {
            self.device.forget(other);
            let exact = stale(self);
            assert_eq!(exact, W::INVALIDATES == Invalidates::TheSpan, "{}: how far does an invalidation reach?", self.name);
        }
        self.device.forget(page);
        self.probe(&[Place { iova: page.start(), was: Some(oa) }]);
    }

    fn one_leaf(&mut self, size: Lg2, perm: Perm) {
        let (span, oa) = (self.place(size), self.oa_for(size));
        self.map(span, oa, perm, SizeSet::only(size));
        let leaf = self.table.walk(span.start());
        assert_eq!(leaf.map(|leaf| (leaf.span(), leaf.oa, leaf.perm)), Some((span, oa, perm)), "{}", self.name);
        let points = self.points(span, oa);
        assert!(!points.is_empty(), "{}: no byte of {span} leads to memory", self.name);
        self.probe_all(&points, oa, span);
        if self.dirty(points.iter().copied()) {
            self.probe_all(&points, oa, span);
        }
        self.beside(span);
        self.unmap(span);
        self.probe_all(&points, oa, span);
        self.clear();
    }

    /// A leaf loses a piece, gets another in its place, then the old one again, and becomes whole.
    fn cut_and_merge(&mut self, size: Lg2) {
        let Some(largest) = self.sizes.up_to(Lg2(size.0 - 1)).largest() else { return };
        let (span, oa) = (self.place(size), self.oa_for(size));
        self.map(span, oa, Perm::RW, SizeSet::only(size));
        let points = self.points(span, oa);
        self.dirty(points.iter().copied());
        self.probe_all(&points, oa, span);

        let smaller = (0..=largest.0).filter(|lg2| self.sizes.has(Lg2(*lg2))).collect::<Vec<_>>();
        let inside = points[self.random.usize(..points.len())];
        let piece_lg2 = smaller[self.random.usize(..smaller.len())];
        let piece = Span::block(inside, piece_lg2);
        let was = oa.plus(piece.start().offset_from(span.start()));

        self.cut(piece);
        self.probe_all(&points, oa, span);
        self.device.forget(span);
        self.probe_all(&points, oa, span);
        self.around(piece);

        self.unmap(piece);
        self.probe_all(&points, oa, span);
        self.around(piece);

        let other = self.oa_for(Lg2(piece_lg2));
        self.map(piece, other, F::PERMS.covering(Perm::READ).unwrap(), SizeSet::ALL);
        self.probe_all(&points, oa, span);
        self.around(piece);

        self.unmap(piece);
        self.map(piece, was, Perm::RW, SizeSet::ALL);
        self.dirty([piece.start(), inside].into_iter());
        self.merge(span);
        // Where the pieces are in tables whose whole span is of a size that no leaf has, they stay apart.
        if (F::level_of(Lg2(piece_lg2)) + 1..=F::level_of(size)).all(|level| self.sizes.has(Lg2(F::item_lg2(level)))) {
            let leaf = self.table.walk(inside);
            assert_eq!(leaf.map(|leaf| (leaf.span(), leaf.oa)), Some((span, oa)), "{}: {span} is whole again", self.name);
        }
        self.probe_all(&points, oa, span);
        self.device.forget(span);
        self.probe_all(&points, oa, span);

        self.unmap(span);
        self.probe_all(&points, oa, span);
        self.clear();
    }

    /// Maps, unmaps, cuts and merges at random, with a look at the borders of what was edited and at what is elsewhere.
    fn history(&mut self) {
        let lg2 = STAGE_LG2.min(self.last().get().ilog2() as u8);
        let stage = self.place(Lg2(lg2));
        let mut edited = Vec::<Span<Iova>>::new();
        for _ in 0..HISTORY {
            let pages = stage.len() >> 12;
            let longest = LONGEST_PAGES.min(pages / 4);
            // Aligned and odd spans alike, near each other: most edits meet earlier ones.
            let most_lg2 = self.random.u32(1..=longest.ilog2());
            let len = 1 + self.random.u64(..1 << most_lg2);
            let first = match edited.len() {
                0 => self.random.u64(..pages - len),
                some => {
                    let near = edited[self.random.usize(..some)].start().offset_from(stage.start()) >> 12;
                    near.saturating_sub(self.random.u64(..2 * len)).min(pages - len)
                }
            };
            let round = self.random.u32(..10).saturating_sub(3);
            let start = stage.start().plus((first >> round << round) << 12);
            let span = Span::from_len(start, len << 12).unwrap();
            match self.random.u32(..8) {
                0..4 => {
                    self.cut(span);
                    self.unmap(span);
                    self.map_somewhere(span);
                }
                4 => {
                    self.cut(span);
                    self.unmap(span);
                }
                5 => self.cut(span),
                _ => self.merge(span.widen(21.min(lg2 - 1)).intersect(stage).unwrap_or(span)),
            }
            edited.push(span);
            self.around(span);
            let elsewhere = std::array::from_fn::<_, 3, _>(|_| {
                let span = edited[self.random.usize(..edited.len())];
                span.start().plus(self.random.u64(..span.len() - BYTES))
            });
            self.dirty(elsewhere.into_iter());
            self.probe(&places(&elsewhere));
        }
        self.cut(stage);
        self.unmap(stage);
        for span in edited.into_iter().step_by(8) {
            self.around(span);
        }
    }

    /// Maps to a random window, now in step with the IOVA, so that large leaves come out, now not.
    fn map_somewhere(&mut self, span: Span<Iova>) {
        let perms = F::PERMS.iter().collect::<Vec<_>>();
        // More often than not, what large leaves and merges need: one permission.
        let perm = if self.random.bool() { Perm::RW } else { perms[self.random.usize(..perms.len())] };
        let windows = W::BOARD.windows().collect::<Vec<_>>();
        let window = windows[self.random.usize(..windows.len())];
        let room = (window.len() - span.len()) >> 12;
        let in_step = span.start().get() & (window.len() / 2 - 1);
        let inside = if self.random.bool() && in_step + span.len() <= window.len() { in_step } else { self.random.u64(..=room) << 12 };
        let sizes = if self.random.u32(..3) == 0 { SizeSet::only(Lg2(12)) } else { SizeSet::ALL };
        self.map(span, window.start().plus(inside), perm, sizes);
    }

    /// Both sides of both borders, and across them.
    fn around(&mut self, span: Span<Iova>) {
        let (start, last) = (span.start().get(), span.last().get());
        let before = [BYTES / 2, BYTES].map(|back| start.checked_sub(back));
        let after = [Some(start), Some(last - (BYTES - 1)), Some(last - (BYTES / 2 - 1)), last.checked_add(1)];
        self.probe(&places(&before.into_iter().chain(after).flatten().map(Iova::new).collect::<Vec<_>>()));
    }

    /// Next to a leaf, where nothing is mapped, and above the tree.
    fn beside(&mut self, span: Span<Iova>) {
        self.around(span);
        let elsewhere = Iova::new(self.random.u64(..self.last().get() - BYTES));
        let above = self.last().checked_add(1 + (self.random.u64(..1 << 10) << 12));
        self.probe(&places(&[Some(elsewhere), above].into_iter().flatten().collect::<Vec<_>>()));
    }

    fn probe_all(&mut self, points: &[Iova], oa: Oa, span: Span<Iova>) {
        let place = |iova: &Iova| Place { iova: *iova, was: Some(oa.plus(iova.offset_from(span.start()))) };
        self.probe(&points.iter().map(place).collect::<Vec<_>>());
    }

    /// A free span of `size`, anywhere in the tree, as low and as high as it goes.
    fn place(&mut self, size: Lg2) -> Span<Iova> {
        let count = (self.last().get() >> size.0).saturating_add(1);
        let mailbox = Span::from_len(MAILBOX, MAILBOX_BYTES).unwrap();
        let aside = W::ASIDE.map(|(start, last)| Span::of(Iova::new(start), Iova::new(last)));
        for _ in 0..1000 {
            let index = match self.random.u32(..4) {
                0 => count - 1,
                1 => self.random.u64(..count.min(64)),
                _ => self.random.u64(..count),
            };
            let span = Span::block(Iova::new(index << size.0), size.0);
            if !span.overlaps(mailbox) && aside.is_none_or(|aside| !span.overlaps(aside)) && span.last() <= self.last() {
                return span;
            }
        }
        panic!("{}: no place for a leaf of {size}", self.name);
    }

    /// An output address for a leaf of `size` that has some of a window in it.
    fn oa_for(&mut self, size: Lg2) -> Oa {
        let windows = W::BOARD.windows().collect::<Vec<_>>();
        let window = windows[self.random.usize(..windows.len())];
        window.start().plus(self.random.u64(..window.len())).align_down(size.0)
    }

    /// Places in a leaf to be tried: the first, the last and a middle one of what leads to a window, of two windows at most.
    fn points(&mut self, span: Span<Iova>, oa: Oa) -> Vec<Iova> {
        let whole = Span::of(oa, oa.plus(span.last_offset()));
        let mut parts = W::BOARD.windows().filter_map(|window| window.intersect(whole)).collect::<Vec<_>>();
        self.random.shuffle(&mut parts);
        let mut points = Vec::new();
        for part in parts.into_iter().take(2) {
            let at = |inside: u64| span.start().plus(part.start().offset_from(oa) + inside);
            points.extend([at(0), at(part.len() - BYTES), at(self.random.u64(..=part.len() - BYTES))]);
        }
        points
    }
}

fn places(iovas: &[Iova]) -> Vec<Place> {
    iovas.iter().map(|iova| Place { iova: *iova, was: None }).collect()
}
