//! What a guest may write into a request: everything. Good requests do what they say, bad ones change nothing, and none brings the
//! host down.

mod common;

use addr::Gpa;
use backing::{Frames, PageState};
use common::{Guest, MIB, span};
use convert::psc::{Entry, Header, MAX_ENTRIES};
use lockstep_iommu::{ConvertError, NO_UPDATE, Owner, Policy};

const BUFFER: u64 = 0x1_0000;
const BAD_HEADER: u64 = 0x1_0000_0001;
const BAD_ENTRY: u64 = 0x1_0000_0002;
const FAILED: u64 = 0x100_0000_0000;
const PVALIDATE_FAULT: u64 = 0x100_0000_0000;
const SIZE_MISMATCH: u64 = 6;

fn guest() -> Guest {
    Guest::new(16 * MIB, Frames::Contiguous, Policy::Mirror)
}

fn put(guest: &Guest, at: u64, cur: u16, end: u16, entries: &[u64]) {
    let mut bytes = vec![0; 8 + 8 * MAX_ENTRIES];
    bytes[0..2].copy_from_slice(&cur.to_le_bytes());
    bytes[2..4].copy_from_slice(&end.to_le_bytes());
    for (place, entry) in bytes[8..].chunks_mut(8).zip(entries) {
        place.copy_from_slice(&entry.to_le_bytes());
    }
    guest.dma.write(Gpa::new(at), &bytes).unwrap();
}

fn header(guest: &Guest) -> Header {
    let mut bytes = [0; 8];
    guest.dma.read(Gpa::new(BUFFER), &mut bytes).unwrap();
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    Header { cur_entry: word(0), end_entry: word(2), reserved: 0 }
}

fn private(gpa: u64) -> u64 {
    Entry::new(Gpa::new(gpa), Owner::Private, false).0
}

fn shared(gpa: u64) -> u64 {
    Entry::new(Gpa::new(gpa), Owner::Shared, false).0
}

fn ask(guest: &Guest, cur: u16, end: u16, entries: &[u64]) -> u64 {
    put(guest, BUFFER, cur, end, entries);
    guest.dma.page_state_change(Gpa::new(BUFFER))
}

fn is_private(guest: &Guest, gpa: u64) -> bool {
    guest.backing.state(addr::Page::new(gpa >> 12)) == PageState::Private
}

#[test]
fn good_ones() {
    let guest = guest();
    let huge = Entry::new(Gpa::new(4 * MIB), Owner::Private, true).0;
    assert_eq!(ask(&guest, 0, 3, &[private(0x3000), private(0x4000), huge, 7 << 52 | 0x9000]), 0);
    assert_eq!(header(&guest).cur_entry, 4);
    assert!(is_private(&guest, 0x3000) && is_private(&guest, 0x4000) && is_private(&guest, 5 * MIB) && !is_private(&guest, 0x9000));
    guest.clean();
    // Entries before the current one are done, those behind the end are not asked for.
    assert_eq!(ask(&guest, 1, 1, &[shared(0x3000), shared(0x4000), private(0x9000)]), 0);
    assert!(is_private(&guest, 0x3000) && !is_private(&guest, 0x4000) && !is_private(&guest, 0x9000));
    // All 253, from a buffer that crosses a page border.
    let all: Vec<u64> = (0..253).map(|page| private(8 * MIB + page * 0x1000)).collect();
    put(&guest, 0x1_0c00, 0, 252, &all);
    assert_eq!(guest.dma.page_state_change(Gpa::new(0x1_0c00)), 0);
    assert!((0..253).all(|page| is_private(&guest, 8 * MIB + page * 0x1000)));
    // A block of which 510 pages are done already.
    let rest = Entry::new(Gpa::new(6 * MIB), Owner::Private, true).with_cur_page(510).0;
    assert_eq!(ask(&guest, 0, 0, &[rest]), 0);
    assert!(!is_private(&guest, 6 * MIB + 509 * 0x1000) && is_private(&guest, 6 * MIB + 510 * 0x1000));
    guest.clean();
}

#[test]
fn bad_ones_change_nothing() {
    let guest = guest();
    guest.convert(0x5000, 0x1000, Owner::Private);
    let good = private(0x3000);
    let huge = |raw: u64| raw | 1 << 56;
    let cases: Vec<(u16, u16, Vec<u64>, u64)> = vec![
        (0, 253, vec![good], BAD_HEADER),
        (0, u16::MAX, vec![good], BAD_HEADER),
        (1, 0, vec![good], BAD_HEADER),
        (u16::MAX, u16::MAX, vec![good], BAD_HEADER),
        (253, 252, vec![good], BAD_HEADER),
        (0, 1, vec![good, private(0x4000) | 1 << 57], BAD_ENTRY),
        (0, 1, vec![good, private(0x4000) | 1 << 63], BAD_ENTRY),
        (0, 1, vec![good, private(0x4000) | 2], BAD_ENTRY),
        (0, 1, vec![good, huge(private(0x4000))], BAD_ENTRY),
        (0, 1, vec![good, huge(private(4 * MIB)) | 513], BAD_ENTRY),
        (0, 1, vec![good, private(16 * MIB)], FAILED),
        (0, 1, vec![good, private(0x000f_ffff_ffff_f000)], FAILED),
        (0, 0, vec![huge(private(0x000f_ffff_ffe0_0000))], FAILED),
    ];
    for (cur, end, entries, code) in cases {
        let before = guest.dump();
        assert_eq!(ask(&guest, cur, end, &entries), code, "{cur} {end} {entries:x?}");
        assert_eq!(guest.dump(), before, "{cur} {end} {entries:x?}");
        if code == FAILED {
            assert_eq!(header(&guest).cur_entry, cur);
        }
    }
    guest.clean();
}

#[test]
fn buffers_where_none_may_be() {
    let guest = guest();
    put(&guest, 0x4_0000, 0, 0, &[private(0x3000)]);
    put(&guest, 0x5_0800, 0, 0, &[private(0x3000)]);
    put(&guest, 0x6_0000, 0, 0, &[private(0x3000)]);
    guest.convert(0x4_0000, 0x1000, Owner::Private);
    guest.convert(0x5_1000, 0x1000, Owner::Private);
    guest.dma.punch(span(0x6_0000, 0x1000)).unwrap();
    let before = guest.dump();
    // Private; its second page private; absent; misaligned; partly and wholly outside memory; wrapping.
    for at in [0x4_0000, 0x5_0c00, 0x6_0000, 0x1_0001, 0x1_0004, 16 * MIB - 8, 16 * MIB, 1 << 51, u64::MAX - 7] {
        assert_eq!(guest.dma.page_state_change(Gpa::new(at)), BAD_HEADER, "{at:#x}");
        assert_eq!(guest.dma.pvalidate_list(Gpa::new(at)), BAD_HEADER, "{at:#x}");
    }
    assert_eq!(guest.dump(), before);
}

#[test]
fn a_request_that_takes_its_own_buffer_away() {
    let guest = guest();
    assert_eq!(ask(&guest, 0, 0, &[private(BUFFER)]), BAD_HEADER, "its progress cannot be told");
    assert!(is_private(&guest, BUFFER));
    assert_eq!(header(&guest).cur_entry, 0, "the host has not written to a private page");
    guest.clean();
    // The same where order counts.
    let guest = self::guest();
    assert_eq!(ask(&guest, 0, 2, &[private(0x3000), shared(0x3000), private(BUFFER)]), BAD_HEADER);
    assert_eq!(header(&guest).cur_entry, 0);
    guest.clean();
}

#[test]
fn a_page_named_twice() {
    let guest = guest();
    assert_eq!(ask(&guest, 0, 3, &[private(0x3000), shared(0x3000), private(0x4000), private(0x3000)]), 0);
    assert_eq!(header(&guest).cur_entry, 4);
    assert!(is_private(&guest, 0x3000) && is_private(&guest, 0x4000));
    let huge = Entry::new(Gpa::new(2 * MIB), Owner::Private, true).0;
    assert_eq!(ask(&guest, 0, 1, &[huge, shared(2 * MIB + 0x7000)]), 0);
    assert!(is_private(&guest, 2 * MIB) && !is_private(&guest, 2 * MIB + 0x7000));
    // With one that cannot be done, whatever its place, nothing is.
    assert_eq!(ask(&guest, 0, 3, &[private(0x8000), shared(0x8000), private(32 * MIB), private(0x9000)]), FAILED);
    assert_eq!(header(&guest).cur_entry, 0);
    assert!(!is_private(&guest, 0x8000) && !is_private(&guest, 0x9000));
    guest.clean();
}

/// Whatever step fails, the progress is true: every entry before it is done, and the request goes on from there.
#[test]
fn partial_progress_is_told_and_can_be_gone_on_from() {
    let huge = Entry::new(Gpa::new(4 * MIB), Owner::Private, true).0;
    let twice = [private(0x3000), shared(0x3000), private(0x3000)];
    let once = [private(0x3000), private(0x9000), huge, private(0x5000), private(0x6000)];
    let mut partial = 0;
    for entries in [&once[..], &twice[..]] {
        let last = entries.len() as u16 - 1;
        for nth in 1.. {
            let guest = guest();
            put(&guest, BUFFER, 0, last, entries);
            let plan = sync::fail::nth(nth);
            let answer = guest.dma.page_state_change(Gpa::new(BUFFER));
            let fired = plan.fired();
            drop(plan);
            let cur = header(&guest).cur_entry;
            if fired.is_none() {
                assert_eq!((answer, cur), (0, last + 1));
                break;
            }
            // A leak is the one thing that no retry heals.
            if guest.dma.counters().leaked > 0 {
                assert_eq!(answer, FAILED);
                guest.clean();
                continue;
            }
            if answer != 0 {
                assert_eq!(answer, FAILED);
                assert!(cur <= last);
                partial += u32::from(cur > 0);
                if entries.len() == once.len() {
                    for entry in &entries[..usize::from(cur)] {
                        assert!(is_private(&guest, Entry(*entry).gpa().get()), "step {nth}: entry {entry:#x} counts as done");
                    }
                }
                assert_eq!(guest.dma.page_state_change(Gpa::new(BUFFER)), 0, "step {nth}");
                assert_eq!(header(&guest).cur_entry, last + 1);
            }
            for entry in entries {
                assert!(is_private(&guest, Entry(*entry).gpa().get()), "step {nth}, {fired:?}: {:#x}", entry);
            }
            guest.clean();
        }
    }
    assert!(partial > 0);
    println!("{partial} requests stopped half way");
}

#[test]
fn random_buffers() {
    let guest = guest();
    let mut random = fastrand::Rng::with_seed(7);
    let mut codes = std::collections::BTreeMap::<u64, u32>::new();
    for round in 0..10_000 {
        let mut bytes = vec![0u8; 8 + 8 * MAX_ENTRIES];
        random.fill(&mut bytes);
        // From pure noise to requests that are nearly right.
        let kind = random.u8(..4);
        if kind > 0 {
            let (cur, len) = (random.u16(..250), random.u16(..4));
            bytes[0..2].copy_from_slice(&cur.to_le_bytes());
            bytes[2..4].copy_from_slice(&(cur + len).to_le_bytes());
        }
        if kind > 1 {
            for entry in bytes[8..].chunks_mut(8) {
                let huge = random.u8(..8) == 0;
                let at = random.u64(..18 * MIB) & if huge { !0x1f_ffff } else { !0xfff };
                // Never the buffer's own pages.
                let at = if at < 2 * MIB { at + 2 * MIB } else { at };
                let op = if kind == 2 { random.u64(..16) } else { random.u64(1..3) };
                let done = if random.u8(..8) == 0 { random.u64(..600) } else { 0 };
                entry.copy_from_slice(&(at | done & 0xfff | op << 52 | u64::from(huge) << 56).to_le_bytes());
            }
        }
        guest.dma.write(Gpa::new(BUFFER), &bytes).unwrap();
        let at = if random.u8(..16) == 0 { random.u64(..) } else { BUFFER };
        let code = if random.bool() { guest.dma.page_state_change(Gpa::new(at)) } else { guest.dma.pvalidate_list(Gpa::new(at)) };
        *codes.entry(code).or_default() += 1;
        if round % 20 == 0 {
            guest.clean();
        }
    }
    guest.clean();
    println!("10000 buffers answered {codes:x?}");
    assert!([0, BAD_HEADER, BAD_ENTRY, FAILED].iter().all(|code| codes.contains_key(code)));
}

#[test]
fn pvalidate_lists() {
    let guest = guest();
    guest.convert(0x3000, 0x3000, Owner::Private);
    guest.convert(4 * MIB, 2 * MIB, Owner::Private);
    let list = |cur, end, entries: &[u64]| {
        put(&guest, BUFFER, cur, end, entries);
        (guest.dma.pvalidate_list(Gpa::new(BUFFER)), header(&guest).cur_entry)
    };
    let huge = Entry::new(Gpa::new(4 * MIB), Owner::Private, true).0;
    assert_eq!(list(0, 2, &[private(0x3000), private(0x4000), huge]), (0, 3));
    guest.clean();
    assert!(guest.context(&guest.trusted).write(common::iova(4 * MIB + 0x5000), b"x").is_ok());
    assert_eq!(list(0, 1, &[private(0x5000), private(0x3000)]), (NO_UPDATE, 1), "validated twice");
    assert_eq!(list(0, 1, &[shared(0x3000), shared(0x3000)]), (NO_UPDATE, 1), "rescinded twice");
    assert_eq!(list(0, 0, &[private(0x9000)]), (PVALIDATE_FAULT, 0), "the page is shared");
    assert_eq!(list(0, 0, &[private(32 * MIB)]), (PVALIDATE_FAULT, 0), "no memory there");
    assert_eq!(list(0, 253, &[]), (BAD_HEADER, 0));
    assert_eq!(list(0, 0, &[private(0x4000) | 1 << 60]).0, BAD_ENTRY);
    assert_eq!(list(0, 0, &[7 << 52 | 0x4000]), (0, 1), "an operation that is none leaves the page as it was");
    assert!(guest.context(&guest.trusted).write(common::iova(0x4000), b"x").is_ok());
    guest.convert(6 * MIB, 0x1000, Owner::Private);
    let small = Entry::new(Gpa::new(6 * MIB), Owner::Private, true).0;
    assert_eq!(list(0, 0, &[small]), (SIZE_MISMATCH, 0), "the page is 4 KiB");
    guest.clean();
}

#[test]
fn absurd_ranges() {
    let guest = guest();
    let before = guest.dump();
    let all = [0, 1, 2, 0xfff, 4096, 4097, 1 << 39, 1 << 40, 1 << 51, (1 << 52) - 1, 1 << 52, u64::MAX / 4096, u64::MAX - 1, u64::MAX];
    let mut refused = 0;
    for gpa in [0, 1, 0x800, 0x1000, 16 * MIB - 0x1000, 16 * MIB, 1 << 51, !0xfff, u64::MAX] {
        for pages in all {
            for private in [true, false] {
                if gpa & 0xfff == 0 && gpa < 16 * MIB && pages > 0 && pages <= (16 * MIB - gpa) >> 12 {
                    continue;
                }
                guest.dma.map_gpa_range(Gpa::new(gpa), pages, private).unwrap_err();
                refused += 1;
            }
        }
    }
    assert_eq!(guest.dump(), before);
    assert!(matches!(guest.dma.map_gpa_range(Gpa::new(0), 4097, true), Err(ConvertError::NoMemory { at, .. }) if at == Gpa::new(16 * MIB)));
    guest.dma.map_gpa_range(Gpa::new(0x3000), 3, true).unwrap();
    assert!(is_private(&guest, 0x5000));
    guest.dma.map_gpa_range(Gpa::new(0), 4096, false).unwrap();
    guest.clean();
    println!("{refused} ranges refused");
}
