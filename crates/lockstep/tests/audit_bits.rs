//! The audit finds every single bit: words of IO page tables, RMP entries, stage 2's record. Whatever is flipped is found at its place, and gone
//! when it is flipped back.

mod common;

use addr::{Address, Gpa, Iova, Oa, PAGE_LG2, Page, Span};
use backing::Frames;
use common::{Guest, MIB, span};
use lockstep_iommu::{AuditReport, Owner, Policy};
use secure::RmpSize;
use std::collections::BTreeMap;

const BYTES: u64 = 16 * MIB;
/// Every bit position, in every table, at least twice.
const FLIPS: u64 = 1500;

fn guest(policy: Policy, frames: Frames) -> Guest {
    let guest = Guest::new(BYTES, frames, policy);
    guest.convert(4 * MIB, 4 * MIB, Owner::Private);
    guest.convert(8 * MIB + 0x3000, 0x9000, Owner::Private);
    guest.pvalidate(8 * MIB + 0x3000, 0x4000, true);
    if policy == Policy::Mirror && frames == Frames::Contiguous {
        guest.dma.space().pvalidate(Gpa::new(4 * MIB), RmpSize::M2, true).unwrap();
    }
    guest.dma.punch(span(0x7000, 0x2000)).unwrap();
    // Page by page, so that tables stay behind that have nothing in them under `shared-only`.
    for page in 0..512 {
        guest.convert(10 * MIB + page * 0x1000, 0x1000, Owner::Private);
    }
    guest.clean();
    guest
}

/// A table, found by following pointers as the specification says.
struct Table {
    at: Oa,
    /// Levels of the tree from here on, the lowest table being 1.
    mode: u8,
    first: u64,
}

fn tables(guest: &Guest) -> Vec<Table> {
    let mut all = Vec::new();
    for domain in guest.dma.ioas().domains() {
        let (root, level) = domain.table().root();
        collect(guest, Table { at: root, mode: level + 1, first: 0 }, &mut all);
    }
    all
}

fn collect(guest: &Guest, table: Table, all: &mut Vec<Table>) {
    let arena = guest.dma.iommu().arena();
    for slot in 0..entries(table.mode) {
        let value = arena.peek(table.at.plus(8 * slot)).unwrap();
        let next = value >> 9 & 7;
        if value & 1 == 1 && next != 0 && next != 7 {
            let first = table.first + (slot << item_lg2(table.mode));
            collect(guest, Table { at: Oa::new(value & 0x000f_ffff_ffff_f000), mode: table.mode - 1, first }, all);
        }
    }
    all.push(table);
}

fn entries(mode: u8) -> u64 {
    if mode == 6 { 128 } else { 512 }
}

fn item_lg2(mode: u8) -> u32 {
    12 + 9 * (u32::from(mode) - 1)
}

/// Found, at a place that meets `at`.
fn found(report: &AuditReport, at: Span<Iova>) -> bool {
    report.count > 0 && report.differences.iter().any(|difference| difference.iova.overlaps(at))
}

fn check_tables(guest: &Guest, seed: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let arena = guest.dma.iommu().arena();
    let all = tables(guest);
    assert!(all.len() >= 4, "{} tables", all.len());
    let (mut flips, mut positions) = (0, 0u64);
    let mut missed = BTreeMap::new();
    while flips < FLIPS {
        let table = &all[flips as usize % all.len()];
        let slot = match random.u8(..3) {
            // Present entries are few in upper tables.
            0 => random.u64(..entries(table.mode)),
            _ => random.u64(..entries(table.mode).min(32)),
        };
        let at = table.at.plus(8 * slot);
        let value = arena.peek(at).unwrap();
        let bit = flips / all.len() as u64 % 64;
        let next = value >> 9 & 7;
        let leaf = value & 1 == 1 && (next == 0 || next == 7);
        if leaf && (bit == 5 || bit == 6) {
            flips += 1;
            continue;
        }
        assert!(arena.poke(at, value ^ 1 << bit));
        let report = guest.dma.audit();
        assert!(arena.poke(at, value));
        let start = table.first + (slot << item_lg2(table.mode));
        if !found(&report, Span::block(Iova::new(start), item_lg2(table.mode) as u8)) {
            let what = if leaf {
                "leaf"
            } else if value == 0 {
                "absent"
            } else {
                "table"
            };
            missed.entry((table.mode, what, bit, report.count > 0)).or_insert((slot, value));
        }
        positions |= 1 << bit;
        flips += 1;
        if flips % 16 == 0 {
            guest.clean();
        }
    }
    guest.clean();
    assert_eq!(positions, u64::MAX);
    assert!(missed.is_empty(), "{missed:x?}");
    flips
}

#[test]
fn bits_of_io_page_tables() {
    for (policy, frames) in
        [(Policy::Mirror, Frames::Contiguous), (Policy::SharedOnly, Frames::Contiguous), (Policy::Mirror, Frames::Scattered { seed: 4 })]
    {
        let guest = guest(policy, frames);
        let flips = check_tables(&guest, 1);
        println!("{policy}, {frames:?}: {flips} bits of {} tables flipped and found", tables(&guest).len());
    }
}

/// Bits that the model's entries define: of the second quadword all but 48:33.
const DEFINED: [u64; 2] = [u64::MAX, !(0xffff << 33)];

#[test]
fn bits_of_rmp_entries() {
    let guest = guest(Policy::Mirror, Frames::Contiguous);
    let rmp = guest.dma.rmp();
    let mut flips = 0;
    let pages = [
        ("shared, first of its group", 2 * MIB),
        ("shared", 2 * MIB + 0x5000),
        ("shared beside private ones", 8 * MIB + 0x1000),
        ("private, validated", 8 * MIB + 0x4000),
        ("private, not validated", 8 * MIB + 0xa000),
        ("private, first of its group", 10 * MIB),
        ("shared, first of a group with private ones", 8 * MIB),
        ("2 MiB, validated", 4 * MIB),
        ("2 MiB, not validated", 6 * MIB),
        ("inside 2 MiB", 4 * MIB + 0x3000),
        ("last inside 2 MiB", 6 * MIB - 0x1000),
        ("absent", 0x8000),
    ];
    for (what, gpa) in pages {
        let oa = guest.backing.oa(Page::new(gpa >> PAGE_LG2));
        let right = rmp.raw(oa);
        for word in 0..2 {
            for bit in (0..64).filter(|bit| DEFINED[word] >> bit & 1 == 1) {
                let mut wrong = right;
                wrong[word] ^= 1 << bit;
                assert!(rmp.poke(oa, wrong));
                let report = guest.dma.audit();
                assert!(rmp.poke(oa, right));
                let page = Span::block(Iova::new(gpa), PAGE_LG2);
                assert!(
                    found(&report, page),
                    "{what}: bit {bit} of word {word}: {} differences: {:?}",
                    report.count,
                    report.differences.first()
                );
                flips += 1;
            }
            guest.clean();
        }
    }
    println!("{flips} bits of {} RMP entries flipped and found", pages.len());
}

#[test]
fn a_leaked_page_hides_nothing_beside_it() {
    let guest = Guest::new(4 * MIB, Frames::Contiguous, Policy::Mirror);
    guest.convert(0x3000, 0x2000, Owner::Private);
    let oa = guest.backing.oa(Page::new(3));
    guest.dma.rmp().set_in_use(oa, true);
    assert!(guest.dma.convert(&[common::change(0x3000, 0x1000, Owner::Shared)]).is_err());
    guest.dma.rmp().set_in_use(oa, false);
    assert_eq!(guest.dma.counters().leaked, 1);
    guest.clean();
    let oa = guest.backing.oa(Page::new(4));
    let right = guest.dma.rmp().raw(oa);
    guest.dma.rmp().poke(oa, [right[0] ^ 1 << 12, right[1]]);
    assert!(found(&guest.dma.audit(), Span::block(Iova::new(0x4000), PAGE_LG2)));
}

#[test]
fn a_wrong_record_of_stage_2() {
    let guest = guest(Policy::Mirror, Frames::Contiguous);
    let mut found_all = 0;
    for (gpa, len) in
        [(0, 0x1000), (0x3000, 0x1000), (4 * MIB, 0x1000), (4 * MIB + 0x5000, 0x3000), (6 * MIB, 2 * MIB), (8 * MIB + 0x4000, 0x1000)]
    {
        let private = guest.stage2.is_private(Gpa::new(gpa));
        guest.stage2.commit(span(gpa, len), !private).unwrap();
        let report = guest.dma.audit();
        let there = Span::from_len(Iova::new(gpa), len).unwrap();
        assert!(report.differences.iter().any(|difference| difference.invariant == "I-11" && difference.iova.covers(there)), "{report:?}");
        guest.stage2.commit(span(gpa, len), private).unwrap();
        guest.clean();
        found_all += 1;
    }
    println!("{found_all} wrong records found");
}
