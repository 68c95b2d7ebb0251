//! Backings made of real memfds: addresses, bytes, states, punches, and what goes wrong.

mod common;

use common::*;
use lockstep_backing::{Backing, Error, Frames, HostAddr, Kind, OA_BASE, PageState, Windows};
use std::os::fd::AsFd;
use std::sync::Arc;
use sync::fail;

#[test]
fn bytes_go_to_the_file_and_back() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    assert_eq!((backing.kind(), backing.len_bytes(), backing.pages()), (Kind::Memfd, M2, pages(0, 511)));
    let at = host(&backing);
    at.write(5000, b"lockstep").unwrap();
    let mut seen = [0; 8];
    rustix::io::pread(backing.file().unwrap(), &mut seen, 5000).unwrap();
    assert_eq!(&seen, b"lockstep");
    at.store_u64(16, 0x0123_4567_89ab_cdef).unwrap();
    assert_eq!(at.load_u64(16), Ok(0x0123_4567_89ab_cdef));
    assert!(at.load_u64(17).is_err() && at.store_u64(4, 0).is_err(), "a word across words is not atomic");
    assert_eq!(backing.linear_hva(), Some(at.hva()));
}

#[test]
fn output_addresses_lead_back() {
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 9 }] {
        let backing = Backing::memfd(3 * M2 + 5 * K4, frames).unwrap();
        let window = backing.window();
        assert!(window.start() >= OA_BASE && window.is_aligned(21) && window.len() == 4 * M2);
        for at in [0, 1, 700, 1536 + 4] {
            let oa = backing.oa(page(at));
            assert_eq!(backing.page_of(oa), Some(page(at)), "{frames:?}");
            let found = Windows::find(oa).unwrap();
            assert!(Arc::ptr_eq(&found, &backing));
            backing.host(oa, K4).unwrap().write(0, &(at as u32).to_le_bytes()).unwrap();
            let mut seen = [0; 4];
            rustix::io::pread(backing.file().unwrap(), &mut seen, at * K4).unwrap();
            assert_eq!(u32::from_le_bytes(seen), at as u32, "{frames:?}: the frame of page {at} is not page {at} of the file");
        }
        // Behind the last page, and across frames.
        let oa = |offset: u64| addr::Oa::new(window.start().get() + offset);
        assert_eq!(backing.page_of(oa(3 * M2 + 5 * K4)), None);
        assert!(backing.host(oa(3 * M2 + 5 * K4), 1).is_none());
        assert!(backing.host(oa(4 * M2), 1).is_none() && Windows::find(oa(4 * M2)).is_none());
        assert_eq!(backing.host(oa(0), 2 * K4).is_some(), frames == Frames::Contiguous);
        assert!(backing.host(oa(100), K4 - 100).is_some());
        assert_eq!(backing.host(oa(100), K4).is_some(), frames == Frames::Contiguous);
        assert!(backing.host(oa(0), 3 * M2 + 5 * K4 + 1).is_none());
    }
}

#[test]
fn extents_are_physical_runs() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    assert_eq!(backing.extents(pages(3, 70)).collect::<Vec<_>>(), [(pages(3, 70), backing.oa(page(3)))]);
    let backing = Backing::memfd(M2, Frames::Scattered { seed: 1 }).unwrap();
    let extents: Vec<_> = backing.extents(pages(3, 5)).collect();
    assert_eq!(extents, [3, 4, 5].map(|at| (pages(at, at), backing.oa(page(at)))));
}

#[test]
fn large_windows_begin_on_a_gigabyte() {
    let backing = Backing::memfd(1 << 30, Frames::Contiguous).unwrap();
    assert!(backing.window().is_aligned(30));
    assert_eq!(backing.linear_hva().unwrap().get() % (1 << 30), 0);
    let backing = Backing::simulated(1 << 40, Frames::Contiguous).unwrap();
    assert!(backing.window().is_aligned(30) && backing.host(backing.window().start(), 1).is_none() && backing.file().is_none());
}

#[test]
fn a_window_that_closed_leaves_nothing() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let (at, oa, id) = (host(&backing), backing.window().start(), backing.id());
    at.write(0, &[7]).unwrap();
    drop(backing);
    assert_eq!(at.read(0, &mut [0]).map_err(|fault| fault.done), Err(0), "the stale address still reaches memory");
    assert!(Windows::find(oa).is_none());
    let next = Backing::memfd(M2, Frames::Contiguous).unwrap();
    assert!(next.window().start() > oa && next.id() > id, "output addresses and ids are not used twice");
}

#[test]
fn stale_and_wild_offsets_fail() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let at = host(&backing);
    for off in [M2, 1 << 46, u64::MAX, u64::MAX - 7] {
        assert!(at.read(off, &mut [0]).is_err(), "{off:#x}");
        assert!(at.write(off, &[0]).is_err(), "{off:#x}");
        assert!(at.load_u64(off & !7).is_err(), "{off:#x}");
    }
    assert_eq!(HostAddr::copy(at, at, usize::MAX).map_err(|fault| fault.done), Err(0));
}

#[test]
fn punch_revokes_before_the_page_goes() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let (ear, at) = (Ear::of(&backing), host(&backing));
    at.write(0, &vec![0x55; M2 as usize]).unwrap();
    backing.punch(pages(3, 6)).unwrap();
    assert_eq!(ear.take(), [Heard::Revoke(pages(3, 6), PageState::Absent, Some(0x55))], "state first, then listeners, then the memory");
    assert_eq!(backing.holes(backing.pages()).unwrap(), [pages(3, 6)]);
    assert_eq!(
        backing.states(backing.pages()).collect::<Vec<_>>(),
        [(pages(0, 2), PageState::Shared), (pages(3, 6), PageState::Absent), (pages(7, 511), PageState::Shared)]
    );
    assert_eq!(byte(at, 7 * K4), 0x55);
    // And back, zeroed.
    backing.populate(pages(2, 5), PageState::Private).unwrap();
    assert_eq!(ear.take(), [Heard::Restore(pages(3, 5), PageState::Private)]);
    assert_eq!((byte(at, 2 * K4), byte(at, 3 * K4)), (0x55, 0));
    assert_eq!(
        backing.states(pages(2, 6)).map(|run| run.1).collect::<Vec<_>>(),
        [PageState::Shared, PageState::Private, PageState::Absent]
    );
    assert_eq!(backing.holes(backing.pages()).unwrap(), [pages(6, 6)]);
}

#[test]
fn close_takes_everything_from_everyone() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let (first, second) = (Ear::of(&backing), Ear::of(&backing));
    drop(first);
    let third = Ear::of(&backing);
    backing.set_state(&backing.lock(pages(7, 7)), pages(7, 7), PageState::Private).unwrap();
    backing.close();
    for ear in [second, third] {
        assert_eq!(ear.take(), [Heard::Revoke(backing.pages(), PageState::Absent, Some(0))]);
    }
    assert_eq!(backing.states(backing.pages()).collect::<Vec<_>>(), [(backing.pages(), PageState::Absent)]);
}

#[test]
fn bad_spans_are_errors_with_the_span() {
    for len in [0, 1, 4095, u64::MAX, !4095] {
        assert!(matches!(Backing::memfd(len, Frames::Contiguous), Err(Error::Length { len_bytes, .. }) if len_bytes == len), "{len:#x}");
        assert!(matches!(Backing::simulated(len, Frames::Contiguous), Err(Error::Length { .. })), "{len:#x}");
    }
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let beyond = pages(511, 512);
    let message = backing.punch(beyond).unwrap_err().to_string();
    assert!(message.contains("0x1ff..=0x200"), "{message}");
    assert!(matches!(backing.populate(beyond, PageState::Shared), Err(Error::NoSuchPages { .. })));
    assert!(matches!(backing.holes(beyond), Err(Error::NoSuchPages { .. })));
    assert!(matches!(backing.recheck(beyond), Err(Error::NoSuchPages { .. })));
    assert_eq!(backing.state(page(512)), PageState::Absent);
    assert!(matches!(backing.populate(pages(0, 0), PageState::Absent), Err(Error::Unsupported { .. })));
    assert_eq!(backing.pages_at(K4, 2 * K4).unwrap(), pages(1, 2));
    assert!(matches!(backing.pages_at(K4, M2), Err(Error::Outside { .. })));
    assert!(matches!(backing.pages_at(1, K4), Err(Error::Span(_))));
    assert!(matches!(backing.pages_at(0, 0), Err(Error::Span(_))));
    assert!(matches!(backing.pages_at(!4095, 2 * K4), Err(Error::Span(_))));
}

#[test]
fn states_change_only_under_their_own_guard() {
    let (backing, other) = (Backing::memfd(M2, Frames::Contiguous).unwrap(), Backing::memfd(M2, Frames::Contiguous).unwrap());
    let held = backing.lock(pages(0, 9));
    assert!(matches!(backing.set_state(&held, pages(9, 10), PageState::Private), Err(Error::NotHeld { .. })));
    assert!(matches!(other.set_state(&held, pages(0, 0), PageState::Private), Err(Error::NotHeld { .. })));
    assert!(matches!(other.punch_held(&held, pages(0, 0)), Err(Error::NotHeld { .. })));
    backing.set_state(&held, pages(9, 9), PageState::Private).unwrap();
    assert_eq!(backing.state(page(9)), PageState::Private);
    drop(held);
    let held = backing.lock_many(&[pages(0, 1), pages(4, 5)]);
    assert!(held.covers(pages(4, 5)) && !held.covers(pages(1, 4)));
}

#[test]
fn a_file_of_the_caller_from_an_offset() {
    let whole = Backing::memfd(M2, Frames::Contiguous).unwrap();
    host(&whole).write(16 * K4, b"here").unwrap();
    let part = Backing::from_file(other_fd(&whole), 16 * K4, 8 * K4, Frames::Contiguous.starting(PageState::Private)).unwrap();
    assert_eq!((part.file_offset(), part.state(page(0))), (16 * K4, PageState::Private));
    assert_eq!(byte(host(&part), 0), b'h');
    part.punch(pages(0, 0)).unwrap();
    assert_eq!(byte(host(&whole), 16 * K4), 0, "the punch went to another place of the file");
    assert!(matches!(Backing::from_file(other_fd(&whole), 1, K4, Frames::Contiguous), Err(Error::Span(_))));
    let beyond = Backing::from_file(other_fd(&whole), M2, K4, Frames::Contiguous);
    assert!(matches!(beyond, Err(Error::Outside { offset: M2, size: M2, .. })));
    let proc_file = std::fs::File::open("/proc/self/status").unwrap().into();
    assert!(matches!(Backing::from_file(proc_file, 0, K4, Frames::Contiguous), Err(Error::NotMemory { .. })));
}

#[test]
fn a_punch_by_somebody_else_is_found() {
    let backing = Backing::memfd(64 << 20, Frames::Contiguous).unwrap();
    let ear = Ear::of(&backing);
    let file = other_fd(&backing);
    let punch = |start: u64, pages: u64| {
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, mode, start * K4, pages * K4).unwrap();
    };
    // Never touched is no loss.
    assert!(backing.recheck(backing.pages()).unwrap().lost.is_empty());
    backing.populate(pages(0, 9999), PageState::Shared).unwrap();
    host(&backing).write(12_000 * K4, &[1]).unwrap();
    assert!(backing.recheck(backing.pages()).unwrap().lost.is_empty());
    let held = backing.lock(pages(20, 20));
    backing.set_state(&held, pages(20, 20), PageState::Absent).unwrap();
    drop(held);
    // Around a boundary of what one system call looks at; an absent page; one that recheck has seen; one that nobody has.
    for (start, count) in [(4090, 10), (20, 1), (12_000, 1), (13_000, 1)] {
        punch(start, count);
    }
    let before = std::time::SystemTime::now();
    let found = backing.recheck(backing.pages()).unwrap();
    assert_eq!(found.lost, [pages(4090, 4099), pages(12_000, 12_000)]);
    assert!(found.at >= before && found.truncated_to.is_none() && found.holes_seen);
    let revoked: Vec<_> = ear.take().into_iter().map(|heard| if let Heard::Revoke(span, ..) = heard { span } else { panic!() }).collect();
    assert_eq!(revoked, [pages(4090, 4095), pages(4096, 4099), pages(12_000, 12_000)]);
    assert_eq!((backing.state(page(4095)), backing.state(page(4100))), (PageState::Absent, PageState::Shared));
    assert!(backing.recheck(backing.pages()).unwrap().lost.is_empty(), "found once is enough");
}

#[test]
fn a_truncation_by_somebody_else_is_found() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let ear = Ear::of(&backing);
    rustix::fs::ftruncate(other_fd(&backing), 100 * K4 + 1).unwrap();
    let found = backing.recheck(backing.pages()).unwrap();
    assert_eq!((found.lost, found.truncated_to), (vec![pages(100, 511)], Some(100 * K4 + 1)));
    assert!(matches!(ear.take()[..], [Heard::Revoke(span, PageState::Absent, _)] if span == pages(100, 511)));
    let gone = backing.populate(pages(100, 100), PageState::Shared);
    assert!(matches!(gone, Err(Error::Outside { .. })), "{gone:?}");
    rustix::fs::ftruncate(other_fd(&backing), M2).unwrap();
    backing.populate(pages(100, 100), PageState::Shared).unwrap();
}

#[test]
fn a_punch_that_fails_puts_everything_back() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let ear = Ear::of(&backing);
    host(&backing).write(0, &[1]).unwrap();
    for (at, state) in [(3, PageState::Private), (5, PageState::Absent)] {
        backing.set_state(&backing.lock(pages(at, at)), pages(at, at), state).unwrap();
    }
    let states = || backing.states(backing.pages()).collect::<Vec<_>>();
    let before = states();
    // The file forbids it.
    rustix::fs::fcntl_add_seals(backing.file().unwrap().as_fd(), rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let error = backing.punch(pages(0, 9)).unwrap_err();
    assert!(matches!(error, Error::Os { offset: 0, .. }), "{error}");
    assert_eq!(states(), before);
    let restored: Vec<_> =
        ear.take().into_iter().filter_map(|heard| if let Heard::Restore(span, _) = heard { Some(span) } else { None }).collect();
    assert_eq!(restored, [pages(0, 2), pages(3, 3), pages(4, 4), pages(6, 9)]);
    // And says so when that, too, fails.
    *ear.refuse.lock().unwrap() = true;
    assert!(matches!(backing.punch(pages(0, 0)), Err(Error::Restore { .. })));
}

#[test]
fn every_step_may_fail() {
    type Step = fn(&Arc<Backing>) -> Result<(), Error>;
    let steps: [(&str, Step); 6] = [
        ("memfd", |_| Backing::memfd(M2, Frames::Contiguous).map(drop)),
        ("user", |_| Backing::user(lockstep_backing::UserRegion::new(M2)?, Frames::Contiguous).map(drop)),
        ("punch", |backing| backing.punch(pages(10, 19))),
        ("populate", |backing| backing.populate(pages(30, 39), PageState::Private)),
        ("recheck", |backing| backing.recheck(backing.pages()).map(drop)),
        ("set_state", |backing| backing.set_state(&backing.lock(pages(0, 3)), pages(0, 3), PageState::Private)),
    ];
    for (name, step) in steps {
        let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
        backing.populate(backing.pages(), PageState::Shared).unwrap();
        backing.set_state(&backing.lock(pages(30, 34)), pages(30, 34), PageState::Absent).unwrap();
        let before: Vec<_> = backing.states(backing.pages()).collect();
        let mut failed = 0;
        loop {
            let plan = fail::nth(failed + 1);
            let result = step(&backing);
            if plan.fired().is_none() {
                result.unwrap();
                break;
            }
            drop(plan);
            assert!(matches!(result, Err(Error::Injected(_))), "{name}: {result:?}");
            assert_eq!(backing.states(backing.pages()).collect::<Vec<_>>(), before, "{name}, step {failed}");
            assert!(!backing.lock(backing.pages()).covers(pages(512, 512)), "the pages are free again");
            failed += 1;
        }
        assert!(failed > 0, "{name} passed no step");
    }
}

#[test]
fn reserved_changes_pass_no_step() {
    let backing = Backing::memfd(M2, Frames::Contiguous).unwrap();
    let held = backing.lock(backing.pages());
    held.reserve(100).unwrap();
    let plan = fail::nth(1);
    for at in 0..100 {
        backing.set_state(&held, pages(at * 2, at * 2), PageState::Private).unwrap();
    }
    assert!(plan.fired().is_none());
    assert!(backing.set_state(&held, pages(300, 300), PageState::Private).is_err(), "the 101st is a step like any other");
    drop(plan);
    // A punch uses its own room, and leaves the caller's alone.
    held.reserve(1).unwrap();
    backing.punch_held(&held, pages(0, 50)).unwrap();
    let plan = fail::nth(1);
    backing.set_state(&held, pages(400, 400), PageState::Private).unwrap();
    assert!(plan.fired().is_none());
    assert!(backing.set_state(&held, pages(402, 402), PageState::Private).is_err(), "a punch left room behind");
}

#[test]
fn copies_of_every_length_and_offset() {
    let (from, to) = (Backing::memfd(M2, Frames::Contiguous).unwrap(), Backing::memfd(M2, Frames::Contiguous).unwrap());
    let mut random = fastrand::Rng::with_seed(1);
    let source: Vec<u8> = (0..M2).map(|_| random.u8(..)).collect();
    host(&from).write(0, &source).unwrap();
    let lengths = (0..300).chain([511, 1000, 2047, 2048, 4095, 4096, 4097, 5000, 8191, 8192, 65_536, 100_000]);
    for len in lengths {
        for _ in 0..20 {
            let (a, b) = (random.usize(..70), random.usize(1..70));
            let at = |backing: &Backing, offset: usize, len: usize| {
                backing.host(addr::Oa::new(backing.window().start().get() + offset as u64), len as u64).unwrap()
            };
            at(&to, 0, len + 140).write(0, &vec![0xaa; len + 140]).unwrap();
            HostAddr::copy(at(&from, a, len), at(&to, b, len), len).unwrap();
            let mut seen = vec![0; len + 140];
            host(&to).read(0, &mut seen).unwrap();
            assert!(seen[b..b + len] == source[a..a + len], "{len} bytes from {a} to {b}");
            assert!(seen[..b].iter().chain(&seen[b + len..]).all(|&byte| byte == 0xaa), "{len} bytes from {a} to {b}: too many");
        }
    }
}
