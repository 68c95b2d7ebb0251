//! LOCKSTEP_IOAS_CUT: cut while devices work.

mod common;
mod guest;

use addr::{Iova, Span};
use common::{FIXED, MIB, PAGE, Program, READ, RW, Stop, errno, leaves, nobody};
use lockstep_iommufd::uapi::ours::{IoasCut, NR_CUT};
use lockstep_iommufd::{Answer, Caller, Touch};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn cut(program: &Program, ioas_id: u32, iova: u64) -> Answer {
    program.call(NR_CUT, IoasCut { ioas_id, iova, ..Default::default() }).map(|_| ())
}

#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    let mut arg = IoasCut { flags: 1, ioas_id: id + 1, __reserved: 1, iova: 0x10800, ..Default::default() };
    let refused = |arg| errno(program.call(NR_CUT, arg));
    assert_eq!(refused(arg), Errno::OPNOTSUPP);
    arg.flags = 0;
    assert_eq!(refused(arg), Errno::OPNOTSUPP);
    arg.__reserved = 0;
    assert_eq!(refused(arg), Errno::NOENT, "the IOAS");
    arg.ioas_id = id;
    assert_eq!(refused(arg), Errno::NOENT, "nothing is there");
    let va = program.memory(4 * PAGE);
    program.map(id, FIXED | RW, va, 4 * PAGE, 0x10000).unwrap();
    assert_eq!(refused(IoasCut { iova: 0x14000, ..arg }), Errno::NOENT, "the first byte behind the area");
    let ioas = std::sync::Arc::clone(program.ioas(id).ioas());
    let accessor = ioas.accessor(true, std::sync::Arc::new(|_| {})).unwrap();
    let pin = accessor.pin(Span::from_len(Iova::new(0x12000), PAGE).unwrap(), false).unwrap();
    let locks = ioas.lock_areas(Span::one(Iova::new(0x10000))).unwrap();
    assert_eq!(refused(arg), Errno::BUSY, "locked, and pinned, and not aligned");
    drop(locks);
    assert_eq!(refused(arg), Errno::INVAL, "not aligned");
    arg.iova = 0x11000;
    assert_eq!(refused(arg), Errno::INVAL, "pinned");
    accessor.unpin(pin);
    program.call(NR_CUT, arg).unwrap();
    let buffer = program.local.install(lockstep_iommufd::DmaBuf::new(4 * PAGE).unwrap()).unwrap();
    program.map_file(id, FIXED | RW, buffer, 0, 4 * PAGE, 0x20000).unwrap();
    assert_eq!(errno(cut(&program, id, 0x20801)), Errno::OPNOTSUPP, "a device's buffer, before the alignment");
    cut(&program, id, 0x20000).unwrap();
}

#[test]
fn both_parts_are_areas_of_their_own() {
    let program = Program::with_rights(nobody(8, 1 << 30));
    let (id, other) = (program.alloc(), program.alloc());
    let (domain, theirs) = (program.attach(id), program.attach(other));
    let va = program.memory(4 * MIB);
    program.map(id, FIXED | RW, va, 4 * MIB, 4 * MIB).unwrap();
    program.copy(FIXED | READ, (id, 4 * MIB), 4 * MIB, (other, 8 * MIB)).unwrap();
    let user = || program.host.accounts().of_user(8);
    assert_eq!(user(), 1024);
    for _ in 0..2 {
        cut(&program, id, 5 * MIB + PAGE).unwrap();
        cut(&program, id, 4 * MIB).unwrap();
    }
    assert_eq!(program.areas(id), [(4 * MIB, 5 * MIB + PAGE - 1), (5 * MIB + PAGE, 8 * MIB - 1)]);
    assert_eq!(program.areas(other).len(), 1, "a copy is cut on its own");
    assert_eq!(leaves(&domain, 4 * MIB, 4 * MIB).iter().sum::<u64>(), 4 * MIB);
    assert_eq!(*leaves(&domain, 4 * MIB, 4 * MIB).last().unwrap(), 2 * MIB, "only the leaf around the cut is made smaller");
    assert_eq!(leaves(&theirs, 8 * MIB, 4 * MIB), [4 * MIB]);
    assert_eq!(user(), 1024);
    assert_eq!(program.unmap(id, 4 * MIB, MIB + PAGE).unwrap(), MIB + PAGE);
    assert_eq!(user(), 1024, "the copy still shows it");
    program.unmap(other, 0, u64::MAX).unwrap();
    assert_eq!(user(), 1024 - (MIB + PAGE) / PAGE);
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 3 * MIB - PAGE);
    assert_eq!(user(), 0);
}

#[test]
fn alignment() {
    let program = Program::new();
    let (id, va) = (program.alloc(), program.memory(4 * PAGE));
    program.map(id, FIXED | RW, va, 4 * PAGE, 0x10000).unwrap();
    cut(&program, id, 0x10001).unwrap();
    cut(&program, id, 0x10003).unwrap();
    assert_eq!(program.areas(id), [(0x10000, 0x10000), (0x10001, 0x10002), (0x10003, 0x13fff)]);
    program.unmap(id, 0, u64::MAX).unwrap();
    let mock = program.attach_mock(id);
    program.map(id, FIXED | RW, va, 4 * PAGE, 32 * MIB).unwrap();
    assert_eq!(errno(cut(&program, id, 32 * MIB + 1024)), Errno::INVAL);
    cut(&program, id, 32 * MIB + 2048).unwrap();
    assert_eq!(leaves(&mock, 32 * MIB, 4 * PAGE).iter().sum::<u64>(), 4 * PAGE);
    program.attach(program.alloc());
}

/// A structure in read-only memory is fine: nothing is written back. What fails half way has not happened.
#[test]
fn every_failing_step() {
    let program = Program::with_rights(nobody(8, 1 << 30));
    let id = program.alloc();
    let domains = [program.attach(id), program.attach(id)];
    program.memory_at(0x4000_0000, 4 * MIB, Touch::WhileShown);
    program.map(id, FIXED | RW, 0x4000_0000, 4 * MIB, 4 * MIB).unwrap();
    for step in 1.. {
        assert!(step < 200, "it never succeeds");
        let nth = sync::fail::nth(step);
        let answer = cut(&program, id, 5 * MIB);
        let fired = nth.fired();
        drop(nth);
        let Some(name) = fired else {
            answer.unwrap();
            assert!(step > 2, "there are steps that can fail");
            break;
        };
        assert_eq!(errno(answer), Errno::NOMEM, "{name}");
        assert_eq!((program.areas(id).len(), program.host.accounts().of_user(8)), (1, 1024), "{name}");
        domains.iter().for_each(|domain| assert_eq!(leaves(domain, 4 * MIB, 4 * MIB).iter().sum::<u64>(), 4 * MIB, "{name}"));
    }
    program.call_read_only(NR_CUT, IoasCut { ioas_id: id, iova: 6 * MIB, ..Default::default() }).unwrap();
    assert_eq!(program.areas(id).len(), 3);
}

/// A cut inside of a large private entry splits that as well.
#[test]
fn private_pages() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    program.guest_memory(id, 16 * MIB, 8 * MIB);
    program.convert(id, guest::PRIVATE, 18 * MIB, 4 * MIB);
    program.convert(id, guest::PRIVATE, 22 * MIB, MIB);
    assert_eq!(leaves(&domain, 18 * MIB, 4 * MIB), [2 * MIB, 2 * MIB]);
    for at in [18 * MIB, 20 * MIB, 17 * MIB, 22 * MIB + PAGE, 23 * MIB] {
        cut(&program, id, at).unwrap();
    }
    assert_eq!(leaves(&domain, 18 * MIB, 4 * MIB), [2 * MIB, 2 * MIB], "where entries meet nothing is split");
    program.clean(id);
    cut(&program, id, 19 * MIB).unwrap();
    assert_eq!(program.areas(id).len(), 7);
    assert!(leaves(&domain, 18 * MIB, 2 * MIB).iter().all(|size| *size == PAGE));
    assert_eq!(leaves(&domain, 20 * MIB, 2 * MIB), [2 * MIB]);
    program.clean(id);
    program.convert(id, guest::SHARED, 16 * MIB, 8 * MIB);
    program.clean(id);
}

/// Devices copy all the while, and not one access faults or sees a wrong byte.
#[test]
fn under_dma() {
    let program = Program::new();
    let id = program.alloc();
    let (domain, second) = (program.attach(id), program.attach(id));
    let (fd, len) = (program.file(64 * MIB), 64 * MIB);
    let check = program.memory(PAGE);
    program.map_file(id, FIXED | RW, fd, 0, len, len).unwrap();
    program.map(id, FIXED | RW, check, PAGE, 0x10000).unwrap();
    let (over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (thread, domain) in [&domain, &second, &domain].into_iter().enumerate() {
            let (program, over, done) = (&program, &over, &done);
            scope.spawn(move || {
                let (_, mut dma) = program.device(domain);
                let base = len + thread as u64 * 20 * MIB;
                let mut count = 0u64;
                while !over.load(Ordering::Acquire) {
                    let at = Iova::new(base + count * 0x1_3579 % (20 * MIB - 64));
                    let (word, mut back) = (count.to_le_bytes(), [0; 8]);
                    dma.write(at, &word).unwrap_or_else(|fault| panic!("{fault:?}"));
                    dma.read(at, &mut back).unwrap_or_else(|fault| panic!("{fault:?}"));
                    assert_eq!(word, back);
                    count += 1;
                }
                done.fetch_add(count, Ordering::Relaxed);
            });
        }
        let _stop = Stop(&over);
        let mut random = 12345u64;
        for _ in 0..1500 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            cut(&program, id, len + (random >> 20) % (len / PAGE) * PAGE).unwrap();
        }
    });
    assert!(done.into_inner() > 1000 && program.areas(id).len() > 1000);
    assert_eq!(program.host.iommu().faults().counters().total(), 0);
    assert_eq!(program.unmap(id, len, len).unwrap(), len);
}
