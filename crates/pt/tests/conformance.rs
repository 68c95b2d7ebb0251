//! One suite over every format in every configuration that it lists. Whoever adds a format adds nothing here.
//!
//! What a format's bits are is told by the golden vectors in its own file; that it agrees with itself and with the algorithm is told here.
#![cfg(not(loom))]

mod common;

use addr::{Iova, Lg2, Oa, SizeSet, Span};
use common::model::{Stage, frames, histories};
use common::{Tree, arena, flushed};
use lockstep_pt::{
    AmdV1Coherent, Armv8S2, Config, Entry, Format, FormatKind, FormatVisitor, Gather, MapError, Perm, Toy, ToyBreaking, VtdSs,
};

/// A test for each check, over the formats that a program can choose from and those that it cannot.
macro_rules! over_all_formats {
    ($($check:ident),+ $(,)?) => {
        $(#[test]
        fn $check() {
            struct Visitor;
            impl FormatVisitor for Visitor {
                type Output = ();
                fn visit<F: Format>(self) {
                    check::$check::<F>();
                }
            }
            for kind in FormatKind::ALL {
                kind.visit(Visitor);
            }
            check::$check::<AmdV1Coherent>();
            check::$check::<Armv8S2<3, true>>();
            check::$check::<Toy>();
            check::$check::<ToyBreaking>();
        })+
    };
}

over_all_formats!(
    leaves_read_back,
    tables_read_back,
    nothing_is_read_into_noise,
    permissions_are_said_or_refused,
    the_aperture_has_borders,
    histories_in_units_of_the_granule,
    histories_in_larger_units,
    a_dirty_bit_in_any_slot_counts,
    dirt_survives_cut_and_merge,
    in_place_or_by_a_break,
    no_leaf_where_an_empty_table_was,
    every_retired_table_is_named,
    walks_from_any_table_agree,
);

fn levels<F: Format>() -> impl Iterator<Item = (Lg2, u8)> {
    (0..64).map(Lg2).filter(|size| F::SIZES.has(*size)).map(|size| (size, F::level_of(size)))
}

fn slots<F: Format>(size: Lg2) -> u64 {
    1 << (size.0 - F::item_lg2(F::level_of(size)))
}

fn random() -> fastrand::Rng {
    fastrand::Rng::with_seed(4)
}

mod check {
    use super::*;

    pub(super) fn leaves_read_back<F: Format>() {
        let mut random = random();
        for (size, level) in levels::<F>() {
            assert!(level <= F::MAX_LEVEL && F::item_lg2(level) <= size.0, "{}: {size}", F::NAME);
            for perm in F::PERMS.iter() {
                let highest = (1 << (F::OUTPUT_LG2 - size.0)) - 1;
                for number in [0, 1, highest, random.u64(..=highest), random.u64(..=highest)] {
                    let oa = Oa::new(number << size.0);
                    let clean = F::leaf(level, size, oa, perm);
                    let leaf = |dirty| Entry::Leaf { size, oa, perm, dirty };
                    let step = F::step(size);
                    if number < highest {
                        assert_eq!(clean + step, F::leaf(level, size, Oa::new((number + 1) << size.0), perm), "{}: {size}", F::NAME);
                    }
                    for slot in 0..slots::<F>(size) {
                        let value = clean + slot * F::slot_step(level);
                        assert_eq!(F::decode(value, level), leaf(false), "{}: slot {slot} of {size} is {value:#x}", F::NAME);
                        let dirtied = F::dirtied(value);
                        assert_eq!(F::decode(dirtied, level), leaf(dirtied != value), "{}: {dirtied:#x}", F::NAME);
                        assert_eq!(value & F::DIRTY, 0, "{}: a new leaf is clean", F::NAME);
                        assert_eq!(dirtied & !F::DIRTY, value, "{}: the dirty bit is all that changes", F::NAME);
                        assert!(F::DIRTY == 0 || dirtied != value || !perm.allows(Perm::WRITE), "{}: {perm:?}", F::NAME);
                        let hidden = dirtied & !F::VALID;
                        let unseen = F::decode(hidden, level) == Entry::Absent && hidden != 0;
                        assert!(unseen || F::HITLESS.is_allowed(), "{}: a device sees a hidden leaf, or nobody does", F::NAME);
                    }
                }
            }
        }
    }

    pub(super) fn tables_read_back<F: Format>() {
        for level in 1..=F::MAX_LEVEL {
            for oa in [0u64, 0x1234_5000, (1 << F::OUTPUT_LG2.min(48)) - 0x1000] {
                let oa = Oa::new(oa);
                let value = F::table(level, oa);
                assert_eq!(F::decode(value, level), Entry::Table(oa), "{}: level {level}", F::NAME);
                assert_eq!(value & F::DIRTY, 0, "{}: a table is never dirty", F::NAME);
            }
        }
    }

    /// Any word is read as something that the algorithm can live with.
    pub(super) fn nothing_is_read_into_noise<F: Format>() {
        let mut random = random();
        assert_eq!((0..=F::MAX_LEVEL).map(|level| F::decode(0, level)).find(|entry| *entry != Entry::Absent), None, "{}", F::NAME);
        let seeds: Vec<u64> = levels::<F>().map(|(size, level)| F::leaf(level, size, Oa::new(size.bytes()), Perm::RW)).collect();
        for round in 0..20_000 {
            // Wholly random, or one bit away from a leaf.
            let word = if round % 2 == 0 { random.u64(..) } else { seeds[random.usize(..seeds.len())] ^ 1 << random.u32(..64) };
            for level in 0..=F::MAX_LEVEL {
                match F::decode(word, level) {
                    Entry::Absent => {}
                    Entry::Table(oa) => assert!(level > 0 && oa.get() >> 52.max(F::OUTPUT_LG2) == 0, "{}: {word:#x} at {level}", F::NAME),
                    Entry::Leaf { size, oa, perm, dirty } => {
                        assert_eq!(F::level_of(size), level, "{}: {word:#x}", F::NAME);
                        assert!(oa.get() % size.bytes() == 0 && oa.get() >> F::OUTPUT_LG2 == 0, "{}: {word:#x} at {level}", F::NAME);
                        assert!(F::PERMS.has(perm) && dirty == (word & F::DIRTY != 0), "{}: {word:#x} at {level}", F::NAME);
                    }
                }
            }
        }
    }

    pub(super) fn permissions_are_said_or_refused<F: Format>() {
        assert!(F::PERMS.has(Perm::RW) && F::PERMS.has(Perm::READ), "{}", F::NAME);
        let arena = arena::<F>(16);
        let mut tree = Tree::<F>::new(&arena);
        let span = Span::block(Iova::new(0), F::GRANULE_LG2);
        for perm in [Perm::NONE, Perm::READ, Perm::WRITE, Perm::RW] {
            let done = tree.map(span, Oa::new(0), perm, SizeSet::ALL);
            let found = tree.table.walk(Iova::new(0)).map(|leaf| leaf.perm);
            if F::PERMS.has(perm) {
                assert_eq!((done, found), (Ok(()), Some(perm)), "{}", F::NAME);
                tree.unmap(span);
            } else {
                let Err(MapError::Perm { nearest, .. }) = done else { panic!("{}: {perm:?} answers {done:?}", F::NAME) };
                assert!(nearest.allows(perm) && F::PERMS.has(nearest) && found.is_none(), "{}: {perm:?}", F::NAME);
            }
        }
    }

    pub(super) fn the_aperture_has_borders<F: Format>() {
        for config in F::CONFIGS {
            let arena = arena::<F>(64);
            let mut tree = Tree::<F>::with(&arena, *config);
            let last = F::aperture().last();
            let granule = 1u64 << F::GRANULE_LG2;
            let top = Span::block(last, F::GRANULE_LG2);
            let highest = Oa::new((1 << F::OUTPUT_LG2) - granule);
            let mut map = |span, oa| tree.map(span, oa, Perm::RW, SizeSet::ALL);
            assert_eq!(map(top, highest), Ok(()), "{} {}: the last page of both spaces", F::NAME, config.name);
            let beyond = |done| matches!(done, Err(MapError::OutOfRange { .. }));
            let first = Span::block(Iova::new(0), F::GRANULE_LG2);
            assert!(beyond(map(first, Oa::new(1 << F::OUTPUT_LG2))), "{}: a page beyond the output addresses", F::NAME);
            let two = Span::from_len(Iova::new(0), 2 * granule).unwrap();
            assert!(beyond(map(two, highest)), "{}: a page within and one beyond", F::NAME);
            if let Some(next) = last.get().checked_add(1) {
                let outside = Span::block(Iova::new(next), F::GRANULE_LG2);
                assert!(beyond(map(outside, Oa::new(0))), "{}: a page beyond the aperture", F::NAME);
                assert!(beyond(map(Span::of(Iova::new(next - granule), outside.last()), Oa::new(0))), "{}: half of it", F::NAME);
                assert_eq!(tree.table.walk(Iova::new(next)), None, "{}: no wrapping around", F::NAME);
                assert!(!tree.table.mark_dirty(Iova::new(next)) && tree.unmap(outside).is_none());
            }
            assert_eq!(tree.table.walk(last).map(|leaf| leaf.oa_of(last).get()), Some((1 << F::OUTPUT_LG2) - 1), "{}", F::NAME);
            assert_eq!(tree.table.walk(Iova::new(0)), None, "{}: refused maps left nothing", F::NAME);
            tree.unmap(F::aperture());
            assert_eq!(tree.table.walk(last), None);
        }
    }

    /// From zero, at the end of the aperture, and where a first top table ends.
    fn stages<F: Format>(config: Config, unit_lg2: u8, most: u64) -> Vec<Stage> {
        let last = F::aperture().last().get();
        let output = ((1u64 << F::OUTPUT_LG2) - frames(unit_lg2).min(1 << F::OUTPUT_LG2)) >> unit_lg2;
        let units = most.min((last >> unit_lg2) + 1).min(output / 2);
        let bytes = units << unit_lg2;
        let border = F::reach(config.start_level).get();
        let mut bases = vec![0, last - (bytes - 1)];
        if config.start_level < F::MAX_LEVEL {
            bases.push((border + 1).saturating_sub((bytes / 2) >> unit_lg2 << unit_lg2));
        }
        bases.dedup();
        let stage = |base| Stage { config, unit_lg2, units, base };
        if units < 4 { Vec::new() } else { bases.into_iter().map(stage).collect() }
    }

    pub(super) fn histories_in_units_of_the_granule<F: Format>() {
        for config in F::CONFIGS {
            for stage in stages::<F>(*config, F::GRANULE_LG2, 2048) {
                histories::<F>(stage, 32, 24);
            }
        }
    }

    pub(super) fn histories_in_larger_units<F: Format>() {
        // Where changes break first, a large leaf cannot take the place of an empty table, which the plain model does not know: growing the tree leaves
        // such tables behind. The histories in units of the granule cover these formats.
        if matches!(F::HITLESS, lockstep_pt::Hitless::BreakFirst(_)) {
            return;
        }
        for config in F::CONFIGS {
            let sizes = config.sizes.and(F::SIZES);
            for level in 1..=F::MAX_LEVEL {
                let item = F::item_lg2(level);
                if item < 64 && sizes.has(Lg2(item)) {
                    for stage in stages::<F>(*config, item, 1024) {
                        histories::<F>(stage, 24, 24);
                    }
                }
            }
        }
    }

    /// Any device may have set it anywhere: whoever asks learns of the whole leaf, and whoever clears it clears all slots.
    pub(super) fn a_dirty_bit_in_any_slot_counts<F: Format>() {
        for (size, level) in levels::<F>().filter(|(size, _)| size.0 < 40) {
            let arena = arena::<F>(64);
            let mut tree = Tree::<F>::new(&arena);
            let leaf = Span::block(Iova::new(0), size.0);
            tree.map(leaf, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
            for slot in 0..slots::<F>(size) {
                let at = Iova::new((slot << F::item_lg2(level)) + 9);
                assert!(tree.table.mark_dirty(at), "{}: {size}", F::NAME);
                assert_eq!(tree.table.walk(at).map(|leaf| (leaf.dirty, leaf.perm, leaf.oa)), Some((true, Perm::RW, Oa::new(0))));
                assert_eq!(tree.read_dirty(Span::one(leaf.last()), false), [leaf], "{}: slot {slot} of {size}", F::NAME);
                assert_eq!(tree.read_dirty(leaf, true), [leaf]);
                assert_eq!(tree.read_dirty(leaf, true), [], "{}: slot {slot} of {size} is clean again", F::NAME);
                assert_eq!(tree.table.walk(at).map(|leaf| (leaf.dirty, leaf.perm)), Some((false, Perm::RW)));
            }
        }
    }

    pub(super) fn dirt_survives_cut_and_merge<F: Format>() {
        for (size, level) in levels::<F>().filter(|(size, _)| size.0 > F::GRANULE_LG2 && size.0 < 40) {
            let arena = arena::<F>(256);
            let mut tree = Tree::<F>::new(&arena);
            let whole = Span::block(Iova::new(0), size.0);
            tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
            let last_slot = Iova::new(size.bytes() - (1 << F::item_lg2(level)));
            assert!(tree.table.mark_dirty(last_slot));
            tree.cut(Span::block(Iova::new(0), F::GRANULE_LG2), SizeSet::ALL);
            let bytes = |spans: Vec<Span<Iova>>| spans.iter().map(|span| span.len()).sum::<u64>();
            assert_eq!(bytes(tree.read_dirty(whole, false)), size.bytes(), "{}: every piece of {size} inherits", F::NAME);
            // All of it is cleaned and one granule written to: after the merge it speaks for the whole.
            tree.read_dirty(whole, true);
            assert!(tree.table.mark_dirty(whole.last()));
            assert_eq!(tree.table.walk(whole.last()).map(|leaf| leaf.dirty), Some(true));
            tree.merge(whole);
            assert_eq!(tree.table.walk(Iova::new(0)).map(|leaf| leaf.span()), Some(whole), "{}: {size}", F::NAME);
            assert_eq!(tree.read_dirty(whole, true), [whole], "{}: {size}", F::NAME);
            assert_eq!(tree.read_dirty(whole, false), [], "{}: {size}", F::NAME);
        }
    }

    /// Either no flush is asked for, or one for the very leaf, during which no device reaches it, everybody who edits sees it, and a write that
    /// was under way is noted.
    pub(super) fn in_place_or_by_a_break<F: Format>() {
        for (size, _) in levels::<F>().filter(|(size, _)| size.0 > F::GRANULE_LG2 && size.0 < 40) {
            let arena = arena::<F>(256);
            let mut tree = Tree::<F>::new(&arena);
            let whole = Span::block(Iova::new(0), size.0);
            tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
            let (table, mut flushes) = (std::rc::Rc::clone(&tree.table), 0u64);
            let mut during = |broken: Span<Iova>| {
                flushed::<F>(broken);
                assert!(broken.contains(Iova::new(0)) && whole.covers(broken), "{}: {broken} of {whole}", F::NAME);
                for at in [broken.start(), broken.last()] {
                    assert_eq!(table.walk(at), None, "{}: a device reaches {at}", F::NAME);
                    let leaf = table.leaf_at(at).map(|leaf| (leaf.oa_of(at).get(), leaf.perm));
                    assert_eq!(leaf, Some((at.get(), Perm::RW)), "{}", F::NAME);
                }
                assert!(table.mark_dirty(broken.last()), "{}: a late mark", F::NAME);
                flushes += 1;
            };
            let first = Span::block(Iova::new(0), F::GRANULE_LG2);
            let cuts = tree.table.cut(first, SizeSet::ALL, &mut tree.stock, &mut during).unwrap();
            let mut gather = Gather::new();
            let merges = tree.table.merge(whole, SizeSet::ALL, &mut gather, &mut during);
            gather.finish(&arena, |_| {});
            assert_eq!(tree.table.walk(whole.last()).map(|leaf| leaf.span()), Some(whole), "{}", F::NAME);
            let wanted = if F::HITLESS.is_allowed() { 0 } else { u64::from(cuts + merges) };
            assert_eq!((flushes, tree.table.breaks()), (wanted, wanted), "{}: {size}, {cuts} cuts, {merges} merges", F::NAME);
            assert_eq!(!tree.read_dirty(whole, false).is_empty(), flushes > 0, "{}: late marks are kept", F::NAME);
        }
    }

    /// A table may be left without leaves; the next map goes where it can at once.
    pub(super) fn no_leaf_where_an_empty_table_was<F: Format>() {
        let Some((size, level)) = levels::<F>().find(|(_, level)| *level == 1) else { return };
        let arena = arena::<F>(64);
        let config = Config { name: "two levels at least", start_level: F::START_LEVEL.max(1), sizes: SizeSet::ALL };
        let mut tree = Tree::<F>::with(&arena, config);
        let whole = Span::block(Iova::new(0), size.0);
        let first = Span::block(Iova::new(0), F::GRANULE_LG2);
        tree.map(first, Oa::new(0), Perm::RW, SizeSet::ALL).unwrap();
        tree.unmap(first);
        assert!(tree.table.bytes_in_tables() > arena.table_bytes(), "{}: the table of a part stays", F::NAME);
        tree.map(whole, Oa::new(0), Perm::RW, SizeSet::ALL).unwrap();
        let leaf = tree.table.walk(Iova::new(0)).unwrap();
        assert_eq!(F::level_of(leaf.size), if F::HITLESS.is_allowed() { level } else { 0 }, "{}: {leaf:?}", F::NAME);
        assert_eq!(tree.table.walk(whole.last()).map(|leaf| leaf.oa_of(whole.last()).get()), Some(whole.last().get()));
        assert_eq!(tree.table.breaks(), 0, "{}: a map never breaks", F::NAME);
        // Where nothing smaller is offered, the table has to go first.
        tree.unmap(whole);
        tree.map(first, Oa::new(0), Perm::RW, SizeSet::ALL).unwrap();
        tree.unmap(first);
        let done = tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(size));
        assert_eq!(done.is_ok(), F::HITLESS.is_allowed(), "{}: {done:?}", F::NAME);
        tree.unmap(whole);
        tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
    }

    /// By each edit that retires tables, in two places that are not neighbours. What [`Tree`] checks in every test is here sure to have something
    /// to look at, and to be exact where there is room.
    pub(super) fn every_retired_table_is_named<F: Format>() {
        let Some((size, _)) = levels::<F>().find(|(size, level)| *level == 1 && size.0 == F::item_lg2(1)) else { return };
        let arena = arena::<F>(64);
        let config = Config { name: "two levels at least", start_level: F::START_LEVEL.max(1), sizes: SizeSet::ALL };
        let mut tree = Tree::<F>::with(&arena, config);
        let all = Span::of(Iova::new(0), Iova::new(3 * size.bytes() - 1));
        let places = [0, 2].map(|number| Span::block(Iova::new(number * size.bytes()), size.0));
        let granule = SizeSet::only(Lg2(F::GRANULE_LG2));
        let named = |gather: &Gather| gather.tables().collect::<Vec<_>>();
        let in_pieces = |tree: &mut Tree<F>| {
            places.iter().for_each(|place| tree.map(*place, Oa::new(place.start().get()), Perm::RW, granule).unwrap());
        };

        in_pieces(&mut tree);
        let (before, mut gather) = (tree.tables(), Gather::new());
        tree.table.merge(all, SizeSet::ALL, &mut gather, flushed::<F>);
        assert_eq!((named(&gather), gather.spans().count()), (places.to_vec(), 0), "{}: a merge changes no translation", F::NAME);
        assert_eq!(tree.finish(gather, &before, all), 2, "{}", F::NAME);
        tree.unmap(all);

        // Without room the two are named as one; with room, one by one.
        for room in [0, 4] {
            in_pieces(&mut tree);
            let (before, mut gather) = (tree.tables(), Gather::new());
            gather.reserve(room);
            places.iter().for_each(|place| assert_eq!(tree.table.unmap(*place, &mut gather), None));
            assert_eq!(named(&gather), if room == 0 { vec![all] } else { places.to_vec() }, "{}", F::NAME);
            assert_eq!(tree.finish(gather, &before, all), 2, "{}", F::NAME);
        }

        // Tables without leaves make room for larger ones, where hardware can take that.
        in_pieces(&mut tree);
        let empty = |place: &Span<Iova>| [place.start(), place.last()].map(|at| Span::block(at, size.0 - 1));
        places.iter().flat_map(empty).for_each(|half| assert_eq!(tree.unmap(half), None));
        for place in places {
            let (before, mut gather) = (tree.tables(), Gather::new());
            tree.table.map(place, Oa::new(0), Perm::RW, SizeSet::ALL, &mut tree.stock, &mut gather).unwrap();
            let wanted = if F::HITLESS.is_allowed() { vec![place] } else { Vec::new() };
            assert_eq!(named(&gather), wanted, "{}", F::NAME);
            assert_eq!(tree.finish(gather, &before, place), wanted.len(), "{}", F::NAME);
        }
    }

    /// Leaves of every size, found from the table that they are in, from those above it, and from the top; before and after the tree has grown.
    pub(super) fn walks_from_any_table_agree<F: Format>() {
        for config in F::CONFIGS {
            for (size, level) in levels::<F>().filter(|(size, _)| config.sizes.has(*size)) {
                let arena = arena::<F>(64);
                let mut tree = Tree::<F>::with(&arena, *config);
                let last = F::aperture().last();
                let leaf = Span::block(Iova::new(0), size.0);
                tree.map(leaf, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
                let slots = slots::<F>(size);
                let some = [0, 1, slots / 2, slots - 1].map(|slot| Iova::new((slot.min(slots - 1) << F::item_lg2(level)) + 7));
                let see = |tree: &Tree<F>| {
                    for at in some {
                        assert_eq!(tree.walk(at).map(|found| (found.span(), found.oa_of(at).get())), Some((leaf, at.get())), "{}", F::NAME);
                    }
                };
                see(&tree);
                let top = tree.table.root().1;
                let mut entry = None;
                tree.table.walk_from(None, leaf.start(), |kept| entry = Some(kept)).unwrap();
                assert_eq!(entry.map(|entry| entry.level()), (level < top).then_some(level), "{}: {size}", F::NAME);
                if leaf.contains(last) {
                    continue;
                }
                // Next to it nothing, from wherever one looks; and the tree grows to where the aperture ends, if it can.
                let next = Iova::new(leaf.last().get() + 1);
                assert_eq!(tree.walk(next), None, "{}: {next}", F::NAME);
                tree.map(Span::block(last, F::GRANULE_LG2), Oa::new(0), Perm::RW, SizeSet::ALL).unwrap();
                assert_eq!(tree.table.root().1, F::MAX_LEVEL.max(top), "{}", F::NAME);
                see(&tree);
                if entry.is_some() {
                    let kept = |entry| panic!("{}: {entry:?} is no lower", F::NAME);
                    assert_eq!(tree.table.walk_from(entry, some[3], kept).map(|found| found.span()), Some(leaf), "{}", F::NAME);
                }
                see(&tree);
            }
        }
    }
}

/// Two who hold different parts of one leaf cut it at the same time. The second arrives while the leaf is hidden, and unmaps its part: that
/// must not come back when the first goes on.
#[test]
fn a_part_unmapped_while_the_leaf_is_hidden_stays_unmapped() {
    type F = Armv8S2<4, false>;
    for size in [Lg2(16), Lg2::M2, Lg2(25), Lg2::G1] {
        let arena = arena::<F>(64);
        let mut tree = Tree::<F>::new(&arena);
        let whole = Span::block(Iova::new(0), size.0);
        tree.map(whole, Oa::new(0), Perm::RW, SizeSet::only(size)).unwrap();
        let (first, last) = (Span::block(whole.start(), 12), Span::block(whole.last(), 12));
        let table = std::rc::Rc::clone(&tree.table);
        let mut theirs = lockstep_pt::Stock::new(&arena);
        let mut nested = false;
        let cuts = table.cut(first, SizeSet::ALL, &mut tree.stock, |_| {
            if !std::mem::replace(&mut nested, true) {
                table.cut(last, SizeSet::ALL, &mut theirs, flushed::<F>).unwrap();
                assert_eq!(tree.table.walk(last.start()).map(|leaf| leaf.span()), Some(last));
                let mut gather = Gather::new();
                assert_eq!(table.unmap(last, &mut gather), None);
                gather.finish(&arena, |_| {});
            }
        });
        assert!(cuts.is_ok() && nested);
        assert_eq!(table.walk(last.start()), None, "{size}: the part came back");
        assert_eq!(table.walk(first.start()).map(|leaf| leaf.span()), Some(first), "{size}");
        let mut bytes = 0;
        table.leaves(Span::whole(), |leaf| {
            assert_eq!(table.walk(leaf.iova), Some(leaf), "{size}: {leaf:?} stayed hidden");
            bytes += leaf.size.bytes();
        });
        assert_eq!(bytes, size.bytes() - 4096);
        drop((table, tree, theirs));
        assert_eq!(arena.tables_in_use(), 0);
    }
}

#[test]
fn permissions_of_each_family() {
    let says = |kind: FormatKind| kind.perms().iter().collect::<Vec<_>>();
    assert_eq!(says(FormatKind::AmdV1), [Perm::NONE, Perm::READ, Perm::WRITE, Perm::RW]);
    assert_eq!(says(FormatKind::VtdSs4), [Perm::READ, Perm::WRITE, Perm::RW]);
    assert_eq!(says(FormatKind::X86Levels5), [Perm::READ, Perm::RW]);
    assert_eq!(says(FormatKind::Sv48), [Perm::READ, Perm::RW]);
    assert_eq!(says(FormatKind::Armv8S2), [Perm::NONE, Perm::READ, Perm::WRITE, Perm::RW]);
    let arena = arena::<VtdSs<3>>(4);
    let refused = Tree::<VtdSs<3>>::new(&arena).map(Span::block(Iova::new(0), 12), Oa::new(0), Perm::NONE, SizeSet::ALL);
    assert_eq!(refused.unwrap_err().to_string(), "vtd-ss-3 has no leaf with permission 'none'; the nearest that allows as much is 'r'");
}
