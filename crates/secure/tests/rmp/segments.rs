//! Segments come and go, share a GiB, and leave no trace.

use crate::common::*;
use addr::{Gpa, Oa, Span};
use lockstep_secure::*;

fn at(gib: u64, blocks: u64) -> Oa {
    Oa::new((gib << 30) + blocks * M2)
}

fn add(rmp: &Table, start: Oa, blocks: u64) -> Result<(), SegmentError> {
    let span = span(start, blocks * M2);
    rmp.add_segment(span, words(span))
}

fn private() -> RmpState {
    RmpState::private(Gpa::new(0x1000), RmpSize::K4, ASID)
}

#[test]
fn many_in_one_gib_keep_apart() {
    let rmp = Table::new();
    let spans = [(4, 0, 1), (4, 1, 3), (4, 6, 500), (4, 508, 1028), (7, 0, 2), (7, 510, 4)];
    for (gib, block, blocks) in spans {
        add(&rmp, at(gib, block), blocks).unwrap();
    }
    assert_eq!(rmp.segments().len(), spans.len());
    let mut expected = 0;
    for (gib, block, blocks) in spans {
        let whole = span(at(gib, block), blocks * M2);
        let last = Oa::new(whole.last().get() & !0xfff);
        for page in [whole.start(), last] {
            assert!(rmp.covers(page), "{page}");
            rmp.rmpupdate(page, private()).unwrap();
            expected += 1;
            assert_eq!((rmp.assigned_in(whole), rmp.assigned_pages()), (1 + u64::from(page == last), expected));
        }
    }
    for hole in [at(4, 4), at(4, 506), at(3, 511), at(6, 514), at(7, 2), at(8, 2), Oa::new(0), Oa::new(u64::MAX)] {
        assert!(!rmp.covers(hole), "{hole}");
        assert_eq!((rmp.state(hole), rmp.rmpupdate(hole.min(Oa::new(!0 << 12)), private())), (PageState::Default, Err(Code::FailInput)));
    }
    assert_summaries(&rmp);
    // A 1 GiB leaf over several segments.
    let refusal = rmp.check_device(Requester::Untrusted, Span::block(at(4, 5), 30), Gpa::new(0), Access::Read).unwrap_err();
    assert_eq!(refusal.at, at(4, 0));
    rmp.rmpupdate(at(4, 0), RmpState::shared(RmpSize::K4)).unwrap();
    let span = Span::of(at(4, 4), Oa::new(at(4, 7).get() - 1));
    assert_eq!(rmp.check_device(Requester::Untrusted, span, Gpa::new(0), Access::Read).unwrap_err().at, at(4, 6));
}

#[test]
fn refused_with_a_reason() {
    let rmp = Table::new();
    add(&rmp, at(100, 4), 4).unwrap();
    let with = span(at(100, 4), 4 * M2);
    for (block, blocks) in [(4, 4), (0, 5), (7, 1), (5, 1), (0, 600)] {
        let result = add(&rmp, at(100, block), blocks);
        assert!(matches!(result, Err(SegmentError::Overlaps { with: there, .. }) if there == with), "{result:?}");
    }
    let odd = span(Oa::new(0x1000), M2);
    assert!(matches!(rmp.add_segment(odd, words(odd)), Err(SegmentError::Misaligned(_))));
    let small = span(at(1, 0), M2);
    assert!(matches!(rmp.add_segment(small, Box::new([])), Err(SegmentError::TooFewWords { need: 1026, got: 0, .. })));
    assert!(matches!(add(&rmp, at(100 << 10, 0), 1), Err(SegmentError::OutOfRange { .. })));
    assert!(matches!(rmp.remove_segment(small), Err(SegmentError::NotFound { .. })));
    assert_eq!(rmp.segments(), [with]);

    rmp.rmpupdate(at(100, 5), private()).unwrap();
    assert_eq!(rmp.remove_segment(with), Err(SegmentError::StillAssigned { span: with, pages: 1 }));
    rmp.rmpupdate(at(100, 5), RmpState::shared(RmpSize::K4)).unwrap();
    rmp.leak(at(100, 6));
    rmp.leak(Oa::new(at(100, 6).get() + 5));
    rmp.leak(at(100, 5));
    assert_eq!((rmp.leaked_pages(), rmp.leaked()), (2, vec![at(100, 5), at(100, 6)]));
    assert_eq!(rmp.remove_segment(with), Err(SegmentError::Leaked { span: with, at: at(100, 5) }));
}

#[test]
fn storage_serves_the_next_segment_clean() {
    let rmp = Table::new();
    let mut rng = fastrand::Rng::with_seed(7);
    let mut there: Vec<Span<Oa>> = Vec::new();
    for round in 0..5000 {
        if there.len() < 6 && rng.bool() {
            let new = span(at(50, rng.u64(..1500)), rng.u64(1..600) * M2);
            match rmp.add_segment(new, words(new)) {
                Ok(()) => {
                    assert!(there.iter().all(|other| !other.overlaps(new)));
                    // Whatever was there before has left nothing.
                    assert_eq!(rmp.assigned_in(new), 0);
                    assert!(
                        new.blocks(21).all(|block| rmp.state(block.start()) == PageState::Hypervisor && rmp.summary_2m(block.start()) == 0)
                    );
                    there.push(new);
                }
                Err(SegmentError::Overlaps { with, .. }) => assert!(there.contains(&with)),
                Err(error) => panic!("{error}"),
            }
        } else if !there.is_empty() {
            let old = there.swap_remove(rng.usize(..there.len()));
            let page = Oa::new(old.start().get() + (rng.u64(..old.len() >> 12) << 12));
            rmp.rmpupdate(page, private()).unwrap();
            assert!(rmp.remove_segment(old).is_err());
            rmp.rmpupdate(page, RmpState::shared(RmpSize::K4)).unwrap();
            // Immutable hypervisor pages do not hold a segment; they go with it.
            rmp.firmware(page, RmpSize::K4, Command::SetHvFixed).unwrap();
            rmp.remove_segment(old).unwrap();
        }
        if round % 50 == 0 {
            for block in 0..2600 {
                let probe = at(50, block);
                assert_eq!(rmp.covers(probe), there.iter().any(|span| span.contains(probe)), "round {round}, block {block}");
            }
        }
    }
    assert_summaries(&rmp);
}

#[test]
fn slots_run_out_and_come_back() {
    let rmp = Table::new();
    let starts: Vec<_> = (0..MAX_SEGMENTS as u64).map(|k| at(k / 200, k % 200 * 2)).collect();
    for &start in &starts {
        add(&rmp, start, 1).unwrap();
    }
    let one_more = at(40, 0);
    assert!(matches!(add(&rmp, one_more, 1), Err(SegmentError::Full { .. })));
    assert!(!rmp.covers(one_more));
    // What is known of a GiB with several segments is given back with them.
    rmp.remove_segment(span(starts[0], M2)).unwrap();
    rmp.remove_segment(span(starts[1], M2)).unwrap();
    for gib in 100..2600 {
        add(&rmp, at(gib, 0), 1).unwrap();
        add(&rmp, at(gib, 1), 1).unwrap();
        rmp.remove_segment(span(at(gib, 0), M2)).unwrap();
        rmp.remove_segment(span(at(gib, 1), M2)).unwrap();
    }
    add(&rmp, starts[0], 1).unwrap();
    add(&rmp, starts[1], 1).unwrap();
    rmp.remove_segment(span(starts[77], M2)).unwrap();
    add(&rmp, one_more, 1).unwrap();
    assert!(rmp.covers(one_more) && !rmp.covers(starts[77]) && rmp.covers(starts[78]));
}

#[test]
fn damage_is_found() {
    let rmp = table(3);
    assign(&rmp, 3, RmpSize::K4);
    assert_summaries(&rmp);
    let [q1, q2] = rmp.raw(oa(3));
    let wrong = |rmp: &Table| {
        let mut spans = Vec::new();
        rmp.recount(|error| spans.push((error.span, error.says, error.counted)));
        spans
    };
    // An assigned bit falls, another appears where nobody ever wrote.
    rmp.poke(oa(3), [q1 & !1, q2]);
    assert_eq!(wrong(&rmp), [(leaf(3, 21), 1, 0), (leaf(0, 12), 1, 0), (span(START, M2), 1, 0)]);
    rmp.poke(oa(3), [q1, q2]);
    assert_summaries(&rmp);
    assert!(rmp.poke(oa(600), [1, 0]));
    assert_eq!(wrong(&rmp).len(), 3);
    assert_eq!((rmp.assigned_in(span(START, 2 * M2)), rmp.assigned_pages()), (2, 1));
    assert!(!rmp.poke(Oa::new(0), [1, 0]));
    // Putting such a page right takes nothing from the counts of pages that were counted.
    assign(&rmp, 1030, RmpSize::K4);
    rmp.rmpupdate(oa(600), RmpState::shared(RmpSize::K4)).unwrap();
    assert_eq!((rmp.summary_2m(oa(600)), rmp.summary_1g(oa(600))), (0, 1));
    assert_summaries(&rmp);
    assert_eq!(rmp.bytes(), 3 * 512 * 16 + 3 * 8 + 2 * 8);
}
