//! LOCKSTEP_IOAS_CONVERT on a large scale, under DMA, and by guests that want the same pages.

mod common;
mod guest;

use addr::Iova;
use backing::PageState;
use common::{MIB, PAGE, Program, Stop, leaves};
use guest::{ASID, PRIVATE, SHARED, count};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// 1 GiB in one call takes a few large steps, not a quarter of a million small ones.
#[test]
fn a_gigabyte() {
    const GIB: u64 = 1 << 30;
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let (_, backing) = program.guest_memory(id, 4 * GIB, 2 * GIB);
    let began = Instant::now();
    program.convert(id, PRIVATE, 4 * GIB, 2 * GIB);
    program.convert(id, PRIVATE, 4 * GIB, 2 * GIB);
    program.convert(id, SHARED, 4 * GIB, 2 * GIB);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!((program.assigned(&backing), leaves(&domain, 4 * GIB, 2 * GIB).iter().sum::<u64>()), (0, 2 * GIB));
    // Page by page, in no order: neighbours become one.
    let began = Instant::now();
    let pages: Vec<u64> = (0..8192u64).map(|index| index * 4999 % 8192).collect();
    for page in &pages {
        program.convert(id, PRIVATE, 4 * GIB + page * PAGE, PAGE);
    }
    assert_eq!(program.context.guest_space(ASID).unwrap().slots().len(), 1);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    program.clean(id);
}

/// Neighbours never miss a translation while pages come and go.
#[test]
fn under_dma() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    program.guest_memory(id, 16 * MIB, 16 * MIB);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (program, domain, over) = (&program, &domain, &over);
            scope.spawn(move || {
                let (_, mut dma) = program.device(domain);
                let mut count = 0u64;
                while !over.load(Ordering::Acquire) {
                    // Every second page is one that is never converted.
                    let at = Iova::new(16 * MIB + (count * 37 % 2048 * 2 + 1) * PAGE + thread * 8);
                    dma.write(at, &count.to_le_bytes()).unwrap_or_else(|fault| panic!("{fault:?}"));
                    count += 1;
                }
            });
        }
        for thread in 0..2u64 {
            let (program, over) = (&program, &over);
            scope.spawn(move || {
                let _stop = Stop(over);
                for round in 0..600u64 {
                    let at = 16 * MIB + (thread * 1024 + round * 61 % 1024) * 2 * PAGE;
                    program.convert(id, PRIVATE, at, PAGE);
                    program.convert(id, SHARED, at, PAGE);
                }
            });
        }
    });
    program.clean(id);
}

/// Two guests want the same pages; each has them whole or not at all.
#[test]
fn guests_against_each_other() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    std::thread::scope(|scope| {
        for asid in [1, 2, 3] {
            let program = &program;
            scope.spawn(move || {
                for round in 0..400u64 {
                    let (at, len) = (16 * MIB + round % 8 * 16 * PAGE, 64 * PAGE);
                    match program.convert_as(asid, id, PRIVATE, at, len, at + u64::from(asid) * 4096 * MIB) {
                        (Ok(()), done) => {
                            assert_eq!(done, len);
                            let gpa = at + u64::from(asid) * 4096 * MIB;
                            assert_eq!(program.convert_as(asid, id, SHARED, at, len, gpa), (Ok(()), len), "nobody can take them away");
                        }
                        (Err(errno), done) => assert_eq!((errno, done), (Errno::EXIST, 0)),
                    }
                }
            });
        }
    });
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Shared)), (0, 1024));
    assert!([1, 2, 3].iter().all(|asid| program.context.guest_space(*asid).is_none_or(|space| space.slots().is_empty())));
    program.clean(id);
}
