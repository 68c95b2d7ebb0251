//! IOMMU_DESTROY.

mod common;

use common::{DESTROY, FIXED, PAGE, Program, RW, errno, nobody};
use lockstep_iommufd::object::Held;
use lockstep_iommufd::uapi;
use rustix::io::Errno;
use std::sync::atomic::{AtomicU32, Ordering};

#[test]
fn ids_that_are_none() {
    let program = Program::new();
    let id = program.alloc();
    for none in [0, id + 1, i32::MAX as u32, u32::MAX] {
        assert_eq!(errno(program.destroy(none)), Errno::NOENT);
    }
    program.destroy(id).unwrap();
    assert_eq!(errno(program.destroy(id)), Errno::NOENT, "once");
    let other = program.again();
    let id = other.alloc();
    assert_eq!(errno(program.destroy(id)), Errno::NOENT, "another context's id");
    other.destroy(id).unwrap();
}

#[test]
fn whoever_is_needed_stays() {
    let program = Program::new();
    let id = program.alloc();
    let ioas = program.ioas(id);
    let (one, two) = (Held::new(&ioas).unwrap(), Held::new(&ioas).unwrap());
    let refused = program.destroy(id).unwrap_err();
    assert_eq!(refused.errno, Errno::BUSY);
    assert!(refused.to_string().contains("needed by 2"), "{refused}");
    drop(one);
    assert_eq!(errno(program.destroy(id)), Errno::BUSY);
    assert_eq!(program.areas(id), []);
    drop(two);
    // A call in flight is no user.
    program.destroy(id).unwrap();
    assert_eq!(errno(Held::new(&ioas).map(|_| ())), Errno::NOENT, "nobody becomes a user of what is gone");
    assert_eq!(errno(program.context.ioas(id).map(|_| ())), Errno::NOENT);
}

/// Areas never keep an address space, and go with it.
#[test]
fn areas_go_with_their_ioas() {
    let program = Program::with_rights(nobody(1000, 1 << 30));
    let id = program.alloc();
    let ioas = program.ioas(id);
    let domain = program.attach(id);
    let va = program.memory(16 * PAGE);
    for index in 0..4 {
        program.map(id, FIXED | RW, va + index * 4 * PAGE, 4 * PAGE, 0x10000 + index * 8 * PAGE).unwrap();
    }
    let space = lockstep_iommufd::Caller::process(&program.local).unwrap().space;
    assert_eq!((program.host.accounts().of_space(space), program.host.accounts().of_user(1000)), ((16, 0), 16));
    // Nobody has told the table of users about this domain.
    ioas.ioas().detach(&domain).unwrap();
    assert_eq!(program.host.accounts().of_space(space), (0, 0));
    ioas.ioas().attach(&domain).unwrap();
    program.destroy(id).unwrap();
    assert!(!common::shown(&domain, 0x10000) && ioas.ioas().areas().is_empty());
    assert_eq!((program.host.accounts().of_space(space), program.host.accounts().of_user(1000)), ((0, 0), 0));
}

/// Of many who destroy one object exactly one does.
#[test]
fn one_of_many() {
    let program = Program::new();
    for _ in 0..200 {
        let id = program.alloc();
        let (won, lost) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| match program.call(DESTROY, uapi::Destroy { id, ..Default::default() }) {
                    Ok(_) => won.fetch_add(1, Ordering::Relaxed),
                    Err(refusal) => {
                        assert_eq!(refusal.errno, Errno::NOENT);
                        lost.fetch_add(1, Ordering::Relaxed)
                    }
                });
            }
        });
        assert_eq!((won.into_inner(), lost.into_inner()), (1, 3));
    }
}
