//! IOMMU_IOAS_MAP: rules 13 to 19 and 36 to 38, and what the kernel's own test program does not look at: limits exceeded, the edges of apertures,
//! neither reading nor writing, answers that cannot be given.

mod common;

use addr::{Iova, Span};
use common::{FIXED, MAP, MIB, PAGE, Program, READ, RW, Stop, WRITE, errno, leaves, nobody, pinned, shown};
use iommu::DomainConfig;
use lockstep_iommufd::{Caller, Touch, uapi};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const VA: u64 = 0x4000_0000;

/// One fault after the other is taken out of a call that has them all, so that each is seen to win over those behind it (rule 13).
#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(8 * PAGE);
    program.ioas(id).ioas().reserve(Span::from_len(Iova::new(0x8000), 0x1000).unwrap()).unwrap();
    program.map(id, FIXED | RW, va, PAGE, 0x9000).unwrap();
    let mut arg =
        uapi::IoasMap { flags: 8, ioas_id: 99, __reserved: 1, user_va: u64::MAX, length: u64::MAX, iova: u64::MAX, ..Default::default() };
    let refused = |arg| errno(program.call(MAP, arg));
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "an unknown flag");
    arg.flags = FIXED;
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the reserved field");
    arg.__reserved = 0;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the IOVA");
    assert_eq!(refused(uapi::IoasMap { flags: 0, ..arg }), Errno::OVERFLOW, "also when it does not count");
    arg.iova = 0x8001;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the length");
    arg.length = 0;
    assert_eq!(refused(arg), Errno::INVAL, "neither reading nor writing");
    arg.flags = FIXED | RW;
    assert_eq!(refused(arg), Errno::NOENT, "the IOAS");
    arg.ioas_id = id;
    arg.length = 2;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the memory wraps");
    arg.length = 0;
    assert_eq!(refused(arg), Errno::INVAL, "no length");
    arg.length = 0x1801;
    arg.user_va = va + 0x10;
    assert_eq!(refused(arg), Errno::INVAL, "a length that is not aligned");
    arg.length = 0x2000;
    assert_eq!(refused(arg), Errno::INVAL, "an IOVA that is not aligned");
    arg.iova = u64::MAX - 0xfff;
    assert_eq!(refused(arg), Errno::OVERFLOW, "an IOVA range that wraps");
    arg.iova = 0x8000;
    assert_eq!(refused(arg), Errno::INVAL, "reserved, and taken, and the memory is not aligned");
    arg.iova = 0x9000;
    assert_eq!(refused(arg), Errno::EXIST, "taken");
    arg.iova = 0xa000;
    assert_eq!(refused(arg), Errno::INVAL, "the memory is not aligned");
    arg.user_va = VA;
    assert_eq!(refused(arg), Errno::FAULT, "nothing is there to be pinned");
    arg.user_va = va;
    program.call(MAP, arg).unwrap();
    assert!(shown(&domain, 0xb000) && !shown(&domain, 0xc000));
    assert_eq!(program.areas(id), [(0x9000, 0x9fff), (0xa000, 0xbfff)]);
}

/// Pairs that the list above cannot show: each has two faults.
#[test]
fn pairs_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(4 * PAGE);
    let map = |flags, user_va, length, iova| program.map(id, flags, user_va, length, iova);
    for (flags, user_va, length, iova, wins, why) in [
        (FIXED | RW, 0, 0, 0, Errno::INVAL, "length 0 at any place"),
        (FIXED | RW, u64::MAX, 0, 0, Errno::INVAL, "nothing does not wrap"),
        (FIXED | RW, u64::MAX, 1, 0, Errno::OVERFLOW, "the end itself must fit"),
        (FIXED | RW, va, PAGE, u64::MAX - 1, Errno::OVERFLOW, "a range that wraps"),
        (RW, 0, u64::MAX / 2, 0, Errno::OVERFLOW, "too long to be placed"),
        (RW, 0, u64::MAX - PAGE, 0, Errno::OVERFLOW, "too long to be placed"),
        (RW, 0, u64::MAX - PAGE + 1, 0, Errno::INVAL, "longer than any memory"),
        (FIXED | RW, 0, 1 << 63, (1 << 63) + 1, Errno::OVERFLOW, "a range that wraps"),
        (FIXED | RW, 0, 1 << 63, 0, Errno::NOMEM, "nobody has that much"),
        (FIXED | RW, 0, 1 << 63, u64::MAX, Errno::OVERFLOW, "this IOVA is none"),
    ] {
        assert_eq!(errno(map(flags, user_va, length, iova)), wins, "{why}");
    }
    assert_eq!(program.areas(id), []);
    program.attach(id);
    assert_eq!(errno(map(RW, va + 8, PAGE, 0)), Errno::INVAL, "a place that keeps to the source would not keep to the alignment");
    assert_eq!(errno(map(FIXED | RW, 0, (1 << 63) + 1, 0)), Errno::INVAL, "not aligned, before anything is said of its length");
}

#[test]
fn fixed_places() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(16 * PAGE);
    // Any byte will do without a page table, and the first and the last.
    program.map(id, FIXED | READ, va + 3, 1, 0).unwrap();
    program.map(id, FIXED | WRITE, va + 5, 7, 1).unwrap();
    program.map(id, FIXED | RW, va, PAGE, u64::MAX - PAGE + 1).unwrap();
    assert_eq!(program.areas(id), [(0, 0), (1, 7), (u64::MAX - PAGE + 1, u64::MAX)]);
    for (iova, length) in [(0, 1), (7, 1), (6, 100), (u64::MAX - 1, 1)] {
        assert_eq!(errno(program.map(id, FIXED | RW, va, length, iova)), Errno::EXIST, "{iova:#x}");
    }
    program.map(id, FIXED | RW, va, 1, 8).unwrap();
    program.allow(id, &[(1 << 40, 1 << 41)]).unwrap();
    program.map(id, FIXED | RW, va, PAGE, 0x10000).unwrap();
    // Reserved counts before taken.
    program.ioas(id).ioas().reserve(Span::from_len(Iova::new(0x11000), 0x1000).unwrap()).unwrap();
    assert_eq!(errno(program.map(id, FIXED | RW, va, 2 * PAGE, 0x10000)), Errno::INVAL);
    assert_eq!(errno(program.map(id, FIXED | RW, va, PAGE, 0x10000)), Errno::EXIST);
}

#[test]
fn places_at_the_edges_of_an_aperture() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach_mock(id);
    let va = program.memory(4 * PAGE);
    let (first, last) = (16 * MIB, (2u64 << 30) - 1);
    for (iova, length) in
        [(first - PAGE, PAGE), (first - 2048, 2048), (first - 2048, PAGE), (last + 1, PAGE), (last - 2047, PAGE), (1 << 63, PAGE)]
    {
        assert_eq!(errno(program.map(id, FIXED | RW, va, length, iova)), Errno::INVAL, "{iova:#x}");
    }
    program.map(id, FIXED | RW, va, PAGE, first).unwrap();
    program.map(id, FIXED | RW, va + PAGE, PAGE, last + 1 - PAGE).unwrap();
    program.map(id, FIXED | RW, va + 2048, 2048, first + 2 * PAGE).unwrap();
    assert!(shown(&domain, first) && shown(&domain, last) && shown(&domain, first + 2 * PAGE) && !shown(&domain, first + 2 * PAGE + 2048));
    assert_eq!(program.map(id, RW, va, PAGE, 0).unwrap(), first + PAGE, "the lowest");
    assert_eq!(program.map(id, RW, va + 2048, 2048, 0).unwrap(), first + 2 * PAGE + 2048, "with the source's place in its page");
}

#[test]
fn automatic_places() {
    let program = Program::new();
    let id = program.alloc();
    // Without memory behind it: nobody looks (rule 16).
    let auto = |va: u64, length: u64| program.map(id, RW, va, length, 0);
    assert_eq!(auto(0, PAGE).unwrap(), PAGE, "0 is never chosen");
    assert_eq!(auto(0x10_0000, 2 * MIB).unwrap(), 0x10_0000, "as far as the address is aligned");
    assert_eq!(auto(0x80_0000, 8 * MIB).unwrap(), 4 * MIB, "but to 2 MiB at most");
    assert_eq!(auto(0x1234, 4).unwrap(), 0x2234, "the place in its page is kept");
    assert_eq!(auto(0x3000, 3 * PAGE).unwrap(), 3 * PAGE);
    assert_eq!(program.map(id, RW, 0, PAGE, 0x5555).unwrap(), 6 * PAGE, "the field is no hint");
}

/// With nobody to use them, pages are not touched: what is wrong with them is found later.
#[test]
fn bad_memory_is_found_by_who_needs_it() {
    let program = Program::new();
    let id = program.alloc();
    program.map(id, FIXED | RW, VA, 4 * PAGE, 0x10000).unwrap();
    assert!(program.attach_with(id, &DomainConfig::default()).is_err());
    program.memory_at(VA, 3 * PAGE, Touch::WhileShown);
    let ioas = program.ioas(id);
    let domain = program.host.iommu().domain().unwrap();
    assert!(ioas.ioas().attach(&domain).is_err(), "the last page is still missing");
    assert_eq!(pinned(ioas.ioas()), 0);
    program.memory_at(VA + 3 * PAGE, PAGE, Touch::ReadOnly);
    assert!(ioas.ioas().attach(&domain).is_err(), "and now it cannot be written");
    program.unmap(id, 0x10000, 4 * PAGE).unwrap();
    program.map(id, FIXED | READ, VA, 4 * PAGE, 0x10000).unwrap();
    ioas.ioas().attach(&domain).unwrap();
    assert_eq!(pinned(ioas.ioas()), 4);
    // With a page table everything or nothing is pinned, and the place is free again.
    for length in [PAGE, 5 * PAGE] {
        assert_eq!(errno(program.map(id, FIXED | READ, VA + 4 * PAGE - (length - PAGE), length, 0x20000)), Errno::FAULT);
    }
    let mut arg = uapi::IoasMap { flags: RW, ioas_id: id, user_va: VA + 2 * PAGE, length: 2 * PAGE, iova: 77, ..Default::default() };
    assert_eq!(errno(program.call_in(MAP, &mut arg)), Errno::FAULT, "writing to read-only memory");
    assert_eq!(arg.iova, 77, "a refused call leaves the structure");
    assert_eq!((program.areas(id).len(), pinned(ioas.ioas())), (1, 4));
    assert_eq!(leaves(&domain, 0x10000, 0x20000).iter().sum::<u64>(), 4 * PAGE);
}

/// What is pinned stays when the program lets go of it.
#[test]
fn pinned_memory_outlives_its_address() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    program.memory_at(VA, 4 * PAGE, Touch::Always);
    program.local.write(VA + 3 * PAGE, b"still here").unwrap();
    program.map(id, FIXED | RW, VA, 4 * PAGE, 0x10000).unwrap();
    program.local.hide(VA, 4 * PAGE).unwrap();
    assert_eq!(errno(program.map(id, FIXED | RW, VA, 4 * PAGE, 0x20000)), Errno::FAULT);
    let (_, mut dma) = program.device(&domain);
    let mut seen = [0; 10];
    dma.read(Iova::new(0x13000), &mut seen).unwrap();
    assert_eq!(&seen, b"still here");
}

/// What the device reads is what the program wrote, on both sides of a page's border and at odd places.
#[test]
fn a_device_sees_the_memory() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach_mock(id);
    let va = program.memory(4 * PAGE);
    program.map(id, FIXED | RW, va + 2048, 2 * PAGE, 32 * MIB + 2048).unwrap();
    program.map(id, FIXED | READ, va, PAGE, 64 * MIB).unwrap();
    program.local.write(va + PAGE - 3, b"across").unwrap();
    let (_, mut dma) = program.device(&domain);
    let mut seen = [0; 6];
    dma.read(Iova::new(32 * MIB + PAGE - 3), &mut seen).unwrap();
    assert_eq!(&seen, b"across");
    dma.write(Iova::new(32 * MIB + 2048), b"device").unwrap();
    program.local.read(va + 2048, &mut seen).unwrap();
    assert_eq!(&seen, b"device");
    dma.read(Iova::new(64 * MIB), &mut seen).unwrap();
    dma.write(Iova::new(64 * MIB), &seen).unwrap_err();
    dma.read(Iova::new(32 * MIB + 2044), &mut seen).unwrap_err();
}

#[test]
fn a_users_limit() {
    let program = Program::with_rights(nobody(500, 10 * PAGE));
    let id = program.alloc();
    let va = program.memory(64 * PAGE);
    let (accounts, space) = (program.host.accounts(), program.local.process().unwrap().space);
    program.map(id, FIXED | RW, va, 64 * PAGE, 0x10_0000).unwrap();
    assert_eq!(accounts.of_user(500), 0, "nothing is charged before it is pinned");
    assert!(matches!(program.attach_with(id, &DomainConfig::default()), Err(ioas::Error::Pin(_))));
    program.unmap(id, 0, u64::MAX).unwrap();
    let domain = program.attach(id);
    program.map(id, FIXED | RW, va, 6 * PAGE, 0x10_0000).unwrap();
    assert_eq!(errno(program.map(id, FIXED | RW, va, 5 * PAGE, 0x20_0000)), Errno::NOMEM, "the same pages count twice (rule 38)");
    assert_eq!((accounts.of_user(500), accounts.of_space(space)), (6, (6, 0)));
    assert!(!shown(&domain, 0x20_0000) && program.areas(id).len() == 1);
    program.map(id, FIXED | RW, va, 4 * PAGE, 0x20_0000).unwrap();
    assert_eq!(errno(program.map(id, FIXED | RW, va, 1, 0x30_0000)), Errno::INVAL);
    assert_eq!(errno(program.map(id, FIXED | RW, va, PAGE, 0x30_0000)), Errno::NOMEM);
    // All the user's processes share the limit, but another user has one of its own.
    let other = Program::on(&program.host, lockstep_iommufd::Local::with_rights(nobody(500, 10 * PAGE)));
    let theirs = other.alloc();
    other.attach(theirs);
    let their_va = other.memory(4 * PAGE);
    assert_eq!(errno(other.map(theirs, FIXED | RW, their_va, PAGE, 0)), Errno::NOMEM);
    other.local.set_process(|process| process.uid = 501);
    other.map(theirs, FIXED | RW, their_va, PAGE, 0).unwrap();
    assert_eq!(accounts.of_user(501), 1);
    // What a copy shows is not paid for again, and is paid for until the last area goes.
    program.copy(FIXED | RW, (id, 0x10_0000), 6 * PAGE, (id, 0x40_0000)).unwrap();
    assert_eq!(accounts.of_user(500), 10);
    program.unmap(id, 0x10_0000, 6 * PAGE).unwrap();
    assert_eq!(accounts.of_user(500), 10);
    program.unmap(id, 0x40_0000, 6 * PAGE).unwrap();
    assert_eq!((accounts.of_user(500), accounts.of_space(space)), (4, (4, 0)));
    // With the right to lock memory there is no limit, and the process's counter is all that counts.
    program.local.set_process(|process| process.ipc_lock = true);
    program.map(id, FIXED | RW, va, 64 * PAGE, 0x50_0000).unwrap();
    assert_eq!((accounts.of_user(500), accounts.of_space(space)), (4, (68, 0)));
    program.close();
}

#[test]
fn an_address_spaces_limit() {
    let mut rights = nobody(500, 10 * PAGE);
    rights.sys_resource = true;
    let program = Program::with_rights(rights);
    program.option(uapi::OPTION_RLIMIT_MODE, uapi::OPTION_SET, 0, 1).unwrap();
    let id = program.alloc();
    let va = program.memory(64 * PAGE);
    program.attach(id);
    program.map(id, FIXED | RW, va, 10 * PAGE, 0x10_0000).unwrap();
    assert_eq!(errno(program.map(id, FIXED | RW, va, PAGE, 0x20_0000)), Errno::NOMEM);
    let accounts = program.host.accounts();
    assert_eq!((accounts.of_user(500), accounts.of_space(rights.space)), (0, (10, 10)));
    // A child is an address space of its own.
    let child = program.local.fork();
    let arg =
        uapi::IoasMap { size: 40, flags: FIXED | RW, ioas_id: id, user_va: va, length: 8 * PAGE, iova: 0x20_0000, ..Default::default() };
    child.ioctl(&*program.context, uapi::io(MAP), &mut arg.clone()).unwrap();
    assert_eq!(accounts.of_space(child.process().unwrap().space), (8, 8));
    // The half pages at both ends count whole.
    program.unmap(id, 0, u64::MAX).unwrap();
    let granules = program.alloc();
    program.attach_mock(granules);
    program.map(granules, FIXED | RW, va + 2048, 2 * PAGE, 32 * MIB + 2048).unwrap();
    assert_eq!(accounts.of_space(rights.space), (3, 3));
    program.destroy(granules).unwrap_or_else(|refusal| panic!("{refusal}"));
    assert_eq!((accounts.of_space(rights.space), accounts.of_space(child.process().unwrap().space)), ((0, 0), (0, 0)));
}

/// An answer that nobody got: the mapping is gone again, and nothing is paid for.
#[test]
fn read_only_structure() {
    let program = Program::with_rights(nobody(7, 1 << 20));
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(4 * PAGE);
    for flags in [RW, FIXED | RW] {
        let arg = uapi::IoasMap { flags, ioas_id: id, user_va: va, length: 4 * PAGE, iova: PAGE, ..Default::default() };
        assert_eq!(errno(program.call_read_only(MAP, arg)), Errno::FAULT);
        assert_eq!((program.areas(id), program.host.accounts().of_user(7)), (vec![], 0));
        assert!(!shown(&domain, PAGE));
    }
}

/// Whatever fails, everything is as before.
#[test]
fn every_failing_step() {
    let program = Program::with_rights(nobody(7, 1 << 30));
    let id = program.alloc();
    program.memory_at(VA, 3 * MIB, Touch::WhileShown);
    let (one, two) = (program.attach(id), program.attach_mock(id));
    for step in 1.. {
        assert!(step < 2000, "it never succeeds");
        let nth = sync::fail::nth(step);
        let answer = program.map(id, FIXED | RW, VA, 3 * MIB, 33 * MIB);
        let fired = nth.fired();
        drop(nth);
        let Some(name) = fired else {
            answer.unwrap();
            assert!(step > 5, "there are steps that can fail");
            break;
        };
        assert_eq!(errno(answer), Errno::NOMEM, "{name}");
        assert_eq!((program.areas(id), program.host.accounts().of_user(7)), (vec![], 0), "{name}");
        for domain in [&one, &two] {
            assert_eq!(leaves(domain, 0, 2 << 30), [0u64; 0], "{name}");
        }
    }
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 3 * MIB);
}

/// Threads map and unmap at the same places; each place is one's or nobody's, and at the end nothing is left.
#[test]
fn races_over_places() {
    let program = Program::with_rights(nobody(7, 1 << 30));
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(64 * PAGE);
    let (mapped, refused, busy) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (program, mapped, refused, busy) = (&program, &mapped, &refused, &busy);
            scope.spawn(move || {
                for round in 0..2000u64 {
                    let at = 0x10_0000 + (round * 7 + thread) % 8 * 4 * PAGE;
                    match program.map(id, FIXED | RW, va + thread * 16 * PAGE, 4 * PAGE, at) {
                        Ok(iova) => {
                            assert_eq!(iova, at);
                            mapped.fetch_add(1, Ordering::Relaxed);
                            assert_eq!(program.unmap(id, at, 4 * PAGE).unwrap(), 4 * PAGE, "nobody else unmaps it");
                        }
                        Err(refusal) => {
                            assert_eq!(refusal.errno, Errno::EXIST);
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    // A gap, an area of somebody else in the making or going.
                    if let Err(refusal) = program.unmap(id, at + PAGE, PAGE) {
                        assert!([Errno::NOENT, Errno::BUSY].contains(&refusal.errno), "{refusal}");
                        busy.fetch_add(u64::from(refusal.errno == Errno::BUSY), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(mapped.into_inner() > 1000);
    assert_eq!((program.areas(id), leaves(&domain, 0, 1 << 30), program.host.accounts().of_user(7)), (vec![], vec![], 0));
}

/// No map is half there while page tables come and go.
#[test]
fn maps_while_page_tables_come_and_go() {
    let program = Program::new();
    let id = program.alloc();
    let ioas = program.ioas(id);
    let va = program.memory(32 * PAGE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _stop = Stop(&over);
            for _ in 0..300 {
                let domain = program.attach(id);
                for area in ioas.ioas().areas().iter().filter(|area| area.state() == ioas::AreaState::Live) {
                    // It may be gone by now, but not half gone.
                    let found = leaves(&domain, area.span().start().get(), area.span().len()).iter().sum::<u64>();
                    assert!(found == 0 || found == area.span().len() || area.state() != ioas::AreaState::Live, "{found:#x} of {area:?}");
                }
                ioas.ioas().detach(&domain).unwrap();
                assert_eq!(leaves(&domain, 0, 1 << 32), [0u64; 0]);
            }
        });
        for thread in 0..2u64 {
            let (program, over) = (&program, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let iova = program.map(id, RW, va + thread * 16 * PAGE, 16 * PAGE, 0).unwrap();
                    assert_eq!(program.unmap(id, iova, 16 * PAGE).unwrap(), 16 * PAGE);
                }
            });
        }
    });
    assert_eq!(pinned(ioas.ioas()), 0);
}
