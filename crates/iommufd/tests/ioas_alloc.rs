//! IOMMU_IOAS_ALLOC.

mod common;

use common::{ALLOC, OPTION, Program, errno};
use lockstep_iommufd::uapi;
use rustix::io::Errno;

#[test]
fn flags_are_refused() {
    let program = Program::new();
    for flag in 0..32 {
        let arg = uapi::IoasAlloc { flags: 1 << flag, ..Default::default() };
        assert_eq!(errno(program.call(ALLOC, arg)), Errno::OPNOTSUPP);
    }
    assert_eq!(program.alloc(), 1, "and no id is gone");
}

#[test]
fn the_lowest_free_id() {
    let program = Program::new();
    assert_eq!((0..5).map(|_| program.alloc()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for gone in [2, 4, 5] {
        program.destroy(gone).unwrap();
    }
    assert_eq!((0..4).map(|_| program.alloc()).collect::<Vec<_>>(), [2, 4, 5, 6]);
    assert_eq!(program.again().alloc(), 1, "each open has ids of its own");
    program.destroy(1).unwrap();
    assert_eq!(program.alloc(), 1);
}

/// An answer that nobody got: the object is gone again.
#[test]
fn read_only_structure() {
    let program = Program::new();
    assert_eq!(errno(program.call_read_only(ALLOC, uapi::IoasAlloc::default())), Errno::FAULT);
    // The context is as empty as at first.
    let set = uapi::Option { option_id: uapi::OPTION_RLIMIT_MODE, op: uapi::OPTION_SET, val64: 1, ..Default::default() };
    program.call(OPTION, set).unwrap();
    assert_eq!(program.alloc(), 1);
}

#[test]
fn every_failing_step() {
    let program = Program::new();
    for step in 1.. {
        assert!(step < 50, "it never succeeds");
        let nth = sync::fail::nth(step);
        let answer = program.call(ALLOC, uapi::IoasAlloc::default());
        let fired = nth.fired();
        drop(nth);
        match fired {
            Some(name) => assert_eq!(errno(answer), Errno::NOMEM, "{name}"),
            None => {
                assert_eq!(answer.unwrap().out_ioas_id, 1);
                break;
            }
        }
    }
}

#[test]
fn many_at_once() {
    let program = Program::new();
    let ids = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..100).map(|_| program.alloc()).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let mut sorted = ids;
    sorted.sort_unstable();
    assert_eq!(sorted, (1..=400).collect::<Vec<_>>());
}
