//! The audit's reader against the writer, format by format: it finds the leaves that the writer put there, and every flipped bit that changes
//! what a device would find.

use addr::{Iova, Oa, SizeSet, Span};
use lockstep_convert::{RawTree, read_tree};
use pt::{AnyTable, Arena, AtomicU64, FormatKind, Gather, Perm, Stock};

type Words = Box<[AtomicU64]>;
type Table = AnyTable<Words>;

fn table(format: FormatKind) -> Table {
    let words = (0..513 * 512).map(|_| AtomicU64::new(0)).collect();
    AnyTable::new(format, Arena::new(words, Oa::new(1 << 30), 9)).unwrap()
}

fn read(table: &Table) -> RawTree {
    let (root, level) = table.root();
    read_tree(table.format(), &|at| table.arena().peek(at), root, level + 1, Span::whole())
}

/// Address, target, size and rights of every leaf, once as the audit reads them and once as the writer knows them.
fn compare(table: &Table) {
    let tree = read(table);
    assert_eq!(tree.oddities, []);
    assert_eq!(tree.tables * 4096, table.bytes_in_tables());
    let mut known = Vec::new();
    table.leaves(Span::whole(), |leaf| known.push((leaf.span(), leaf.oa, leaf.perm, leaf.dirty)));
    let found: Vec<_> = tree.leaves.iter().map(|leaf| (leaf.span, leaf.oa, Perm::of(leaf.read, leaf.write), leaf.dirty)).collect();
    assert_eq!(found, known);
}

/// Random spans, some round, at both ends of the space and across the border of a top table.
fn fill(table: &Table, random: &mut fastrand::Rng) -> usize {
    let granule = table.format().granule().0;
    let top = table.format().item_lg2(3);
    let (mut stock, mut gather) = (Stock::new(table.arena()), Gather::new());
    let last = table.aperture().last().get();
    let bases = [0, (1 << top) - (1 << 22), (1 << 60) + (1 << 40), last - ((1 << 26) - 1)];
    let mut mapped = 0;
    for base in bases.into_iter().filter(|base| *base < last) {
        for _ in 0..20 {
            let round = random.u8(0..11);
            let at = base + (random.u64(..1 << 22) >> granule >> round << round << granule);
            let len = random.u64(1..9) << round << granule;
            let oa = Oa::new((random.u64(..1 << 40) >> granule >> round << round << granule) + (1 << 41));
            let perm = if random.bool() { Perm::RW } else { Perm::READ };
            // Where something is already, nothing changes.
            let done = table.map(Span::from_len(Iova::new(at), len).unwrap(), oa, perm, SizeSet::ALL, &mut stock, &mut gather);
            mapped += usize::from(done.is_ok());
            table.mark_dirty(Iova::new(at));
        }
    }
    gather.finish(table.arena(), |_| {});
    mapped
}

#[test]
fn reads_what_the_writer_wrote_in_every_format() {
    for format in FormatKind::ALL {
        let mut random = fastrand::Rng::with_seed(3);
        let mut mapped = 0;
        for _ in 0..20 {
            let table = table(*format);
            mapped += fill(&table, &mut random);
            compare(&table);
        }
        assert!(mapped > 80, "{format}: {mapped} spans are too few to tell anything");
    }
}

/// The bit that hardware alone may set at any time, and that says nothing. Elsewhere it is set beforehand, and clear it is odd.
fn silent(format: FormatKind) -> Option<u32> {
    match format {
        FormatKind::AmdV1 | FormatKind::AmdV1K2 => Some(5),
        FormatKind::VtdSs3 | FormatKind::VtdSs4 | FormatKind::VtdSs5 => Some(8),
        _ => None,
    }
}

/// A flipped bit of a leaf is either an oddity or another leaf; only an accessed bit that is not set beforehand says nothing.
#[test]
fn no_flipped_bit_goes_unseen() {
    for format in FormatKind::ALL {
        let table = table(*format);
        fill(&table, &mut fastrand::Rng::with_seed(9));
        let before = read(&table);
        for (place, _) in &before.places {
            for slot in (0..512).filter(|slot| table.arena().peek(Oa::new(place.get() + 8 * slot)).is_some_and(|value| value != 0)).take(4)
            {
                let at = Oa::new(place.get() + 8 * slot);
                let value = table.arena().peek(at).unwrap();
                for bit in (0..64).filter(|bit| Some(*bit) != silent(*format)) {
                    assert!(table.arena().poke(at, value ^ 1 << bit));
                    let after = read(&table);
                    let same = after.oddities == before.oddities && after.leaves == before.leaves;
                    // One dirty slot of a large leaf that is dirty already, or the reverse, changes nothing.
                    assert!(!same || 1 << bit == format.dirty_bit(), "{format}: bit {bit} of {value:#x} at {at}");
                }
                assert!(table.arena().poke(at, value));
            }
        }
    }
}

#[test]
fn formats_are_not_mixed_up() {
    let table = table(FormatKind::AmdV1K2);
    fill(&table, &mut fastrand::Rng::with_seed(1));
    let (root, level) = table.root();
    let wrong = read_tree(FormatKind::AmdV1, &|at| table.arena().peek(at), root, level + 1, Span::whole());
    assert!(!wrong.oddities.is_empty());
    let too_low = read_tree(FormatKind::VtdSs4, &|at| table.arena().peek(at), root, 3, Span::whole());
    assert_eq!(too_low.oddities.len(), 1, "a tree of another height is not even looked at");
}

/// Whatever one format writes, no other takes for its own.
#[test]
fn no_format_is_taken_for_another() {
    // Those that differ in the hardware's promises alone, or in height alone, are one format to whoever reads.
    let family = |kind: FormatKind| kind.name().trim_end_matches("-bbml2").trim_end_matches("-39").to_owned();
    for format in FormatKind::ALL {
        let table = table(*format);
        fill(&table, &mut fastrand::Rng::with_seed(5));
        let (root, level) = table.root();
        for other in FormatKind::ALL.iter().filter(|other| family(**other) != family(*format)) {
            let wrong = read_tree(*other, &|at| table.arena().peek(at), root, level + 1, Span::whole());
            assert!(!wrong.oddities.is_empty(), "{format} passes for {other}");
        }
    }
}
