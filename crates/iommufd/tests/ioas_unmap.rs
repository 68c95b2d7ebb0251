//! IOMMU_IOAS_UNMAP: rules 24 to 28, and how far a refused call has come.

mod common;

use addr::{Iova, Span};
use common::{FIXED, PAGE, Program, RW, Stop, UNMAP, errno, leaves, nobody, shown};
use lockstep_iommufd::uapi;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    let refused = |ioas, iova, length| errno(program.unmap(ioas, iova, length));
    assert_eq!(refused(id + 1, u64::MAX, u64::MAX), Errno::NOENT, "the IOAS first");
    for (iova, length, wins) in [
        (u64::MAX, u64::MAX, Errno::OVERFLOW),
        (u64::MAX, 0, Errno::OVERFLOW),
        (1, u64::MAX, Errno::OVERFLOW),
        (u64::MAX - 1, 0, Errno::INVAL),
        (u64::MAX - 1, 3, Errno::OVERFLOW),
        (0, 0, Errno::INVAL),
        (u64::MAX - 1, 2, Errno::NOENT),
        (0, u64::MAX - 1, Errno::NOENT),
        (0x1000, PAGE, Errno::NOENT),
    ] {
        assert_eq!(refused(id, iova, length), wins, "{length:#x} from {iova:#x}");
    }
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 0, "everything, which is nothing");
}

#[test]
fn whole_areas_and_gaps() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(16 * PAGE);
    let map = |iova| program.map(id, FIXED | RW, va, 2 * PAGE, iova).unwrap();
    [0x10000, 0x20000, 0x22000, 0x40000].into_iter().for_each(|iova| _ = map(iova));
    assert_eq!(program.unmap(id, 0x1f000, 0x6000).unwrap(), 4 * PAGE, "what was there, not what was asked for");
    assert!(!shown(&domain, 0x20000) && !shown(&domain, 0x23fff) && shown(&domain, 0x10000) && shown(&domain, 0x41fff));
    assert_eq!(errno(program.unmap(id, 0x1f000, 0x6000)), Errno::NOENT);
    assert_eq!(program.unmap(id, 0, u64::MAX - 1).unwrap(), 4 * PAGE);
    program.map(id, FIXED | RW, va, PAGE, u64::MAX - PAGE + 1).unwrap();
    [0, 0x20000].into_iter().for_each(|iova| _ = map(iova));
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 5 * PAGE, "the last address, too");
    assert_eq!(program.areas(id), []);
}

/// From low to high: what lies below the area that is cut is gone, and the structure does not say so.
#[test]
fn how_far_a_refused_call_has_come() {
    let program = Program::with_rights(nobody(3, 1 << 30));
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(64 * PAGE);
    let map_all = || (1..=6).for_each(|index| _ = program.map(id, FIXED | RW, va, 2 * PAGE, index * 0x10000));
    let left = || program.areas(id).iter().map(|(start, _)| start >> 16).collect::<Vec<_>>();
    let refused = |iova, length| {
        let mut arg = uapi::IoasUnmap { ioas_id: id, iova, length, ..Default::default() };
        let errno = errno(program.call_in(UNMAP, &mut arg));
        assert_eq!((arg.iova, arg.length), (iova, length));
        errno
    };
    map_all();
    assert_eq!(refused(0x10000, 0x31000), Errno::NOENT, "the fourth is cut behind its first page");
    assert_eq!(left(), [4, 5, 6]);
    for gone in 1..=3 {
        assert_eq!(leaves(&domain, gone << 16, 0x10000), [0u64; 0], "and so are its leaves");
    }
    assert_eq!(program.host.accounts().of_user(3), 6, "and what was paid for it");
    map_all();
    assert_eq!(refused(0x11000, 0x50000), Errno::NOENT, "the first is cut: nothing happens");
    assert_eq!(left(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(refused(0x10800, 0x100), Errno::NOENT, "a part in the middle");
    assert_eq!(refused(0x10000, 1), Errno::NOENT);
    assert_eq!(refused(0, 0x11fff), Errno::NOENT, "one byte short");
    assert_eq!(left(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(program.unmap(id, 0, 0x12000).unwrap(), 2 * PAGE);
}

#[test]
fn locked_and_pinned_areas() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(16 * PAGE);
    for index in 1..=3 {
        program.map(id, FIXED | RW, va, 2 * PAGE, index * 0x10000).unwrap();
    }
    let ioas = Arc::clone(program.ioas(id).ioas());
    let locks = ioas.lock_areas(Span::one(Iova::new(0x20000))).unwrap();
    assert_eq!(errno(program.unmap(id, 0, u64::MAX)), Errno::BUSY);
    assert_eq!(program.areas(id), [(0x20000, 0x21fff), (0x30000, 0x31fff)], "the one below is gone");
    assert_eq!(errno(program.unmap(id, 0x20000, 0x2000)), Errno::BUSY);
    assert_eq!(errno(program.unmap(id, 0x20000, 0x1000)), Errno::BUSY, "before it is asked whether it is cut");
    drop(locks);
    // Whoever has pins is asked to let go of them, a hundred times.
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    let accessor = ioas.accessor(true, Arc::new(move |_| _ = count.fetch_add(1, Ordering::Relaxed))).unwrap();
    let pin = accessor.pin(Span::from_len(Iova::new(0x31000), PAGE).unwrap(), true).unwrap();
    assert_eq!(errno(program.unmap(id, 0, u64::MAX)), Errno::DEADLK);
    assert_eq!((program.areas(id), asked.load(Ordering::Relaxed)), (vec![(0x30000, 0x31fff)], 100));
    let again = accessor.pin(Span::from_len(Iova::new(0x30000), PAGE).unwrap(), true);
    assert!(matches!(again, Err(ioas::Error::Shut { .. })), "it takes no new ones");
    assert_eq!(errno(program.unmap(id, 0x31000, PAGE)), Errno::NOENT, "a cut is found first");
    accessor.unpin(pin);
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 2 * PAGE);
}

/// A pin is dropped when the unmap asks for it.
#[test]
fn pins_that_are_let_go() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(16 * PAGE);
    for index in 1..=3 {
        program.map(id, FIXED | RW, va, 2 * PAGE, index * 0x10000).unwrap();
    }
    let ioas = Arc::clone(program.ioas(id).ioas());
    let pins = Arc::new(Mutex::new(Vec::new()));
    let mine = Arc::clone(&pins);
    let unmapped = move |_| drop(std::mem::take(&mut *mine.lock().unwrap()));
    let accessor = ioas.accessor(true, Arc::new(unmapped)).unwrap();
    pins.lock().unwrap().push(accessor.pin(Span::from_len(Iova::new(0x21000), PAGE).unwrap(), false).unwrap());
    assert_eq!(program.unmap(id, 0, u64::MAX).unwrap(), 6 * PAGE);
    assert!(pins.lock().unwrap().is_empty() && program.areas(id).is_empty());
}

/// The structure is in read-only memory: what is gone stays gone.
#[test]
fn read_only_structure() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(PAGE);
    program.map(id, FIXED | RW, va, PAGE, 0x10000).unwrap();
    assert_eq!(
        errno(program.call_read_only(UNMAP, uapi::IoasUnmap { ioas_id: id, iova: 0x10000, length: PAGE, ..Default::default() })),
        Errno::FAULT
    );
    assert_eq!(program.areas(id), []);
}

/// It needs no memory: nothing that could fail is on its way.
#[test]
fn it_cannot_fail() {
    let program = Program::new();
    let id = program.alloc();
    let domains = [program.attach(id), program.attach_mock(id)];
    let va = program.memory(64 * PAGE);
    for index in 0..20 {
        program.map(id, FIXED | RW, va + index * PAGE, PAGE, (32 << 20) + index * 2 * PAGE).unwrap();
    }
    let ioas = program.ioas(id);
    let nth = sync::fail::nth(0);
    let unmapped = ioas.ioas().unmap_all();
    assert_eq!(nth.fired(), None);
    drop(nth);
    assert_eq!(unmapped.unwrap(), 20 * PAGE);
    domains.iter().for_each(|domain| assert_eq!(leaves(domain, 0, 1 << 31), [0u64; 0]));
}

/// When a call has returned, no device reaches the pages.
#[test]
fn devices_are_off_the_pages() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let va = program.memory(PAGE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (_, mut dma) = program.device(&domain);
                while !over.load(Ordering::Acquire) {
                    let _ = dma.write(Iova::new(0x10000), &[0xdd; 64]);
                }
            });
        }
        let _stop = Stop(&over);
        for round in 0..2000u64 {
            program.map(id, FIXED | RW, va, PAGE, 0x10000).unwrap();
            if round % 16 == 0 {
                std::thread::yield_now();
            }
            program.unmap(id, 0x10000, PAGE).unwrap();
            let word = round.to_le_bytes();
            lockstep_iommufd::Caller::write(&program.local, va, &word).unwrap();
            std::hint::spin_loop();
            assert_eq!(program.local.get::<[u8; 8]>(va), word, "a device was still there");
        }
    });
}

#[test]
fn unmap_all_against_maps() {
    let program = Program::with_rights(nobody(3, 1 << 30));
    let id = program.alloc();
    program.attach(id);
    let va = program.memory(16 * PAGE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _stop = Stop(&over);
            for _ in 0..2000 {
                match program.unmap(id, 0, u64::MAX) {
                    Ok(_) => {}
                    Err(refusal) => assert_eq!(refusal.errno, Errno::BUSY, "{refusal}"),
                }
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                program.map(id, RW, va, 4 * PAGE, 0).unwrap();
            }
        });
    });
    program.unmap(id, 0, u64::MAX).unwrap();
    assert_eq!((program.areas(id), program.host.accounts().of_user(3)), (vec![], 0));
}
