//! IOMMU_VFIO_IOAS: rule 68.

mod common;

use common::{Program, VFIO_IOAS, errno};
use lockstep_iommufd::Answer;
use lockstep_iommufd::uapi::{self, VFIO_IOAS_CLEAR as CLEAR, VFIO_IOAS_GET as GET, VFIO_IOAS_SET as SET};
use rustix::io::Errno;

fn call(program: &Program, op: u16, ioas_id: u32) -> Answer<u32> {
    program.call(VFIO_IOAS, uapi::VfioIoas { op, ioas_id, ..Default::default() }).map(|arg| arg.ioas_id)
}

#[test]
fn wrong_input_in_order() {
    let program = Program::new();
    for op in [GET, SET, CLEAR, 3, u16::MAX] {
        let arg = uapi::VfioIoas { op, __reserved: 1, ..Default::default() };
        assert_eq!(errno(program.call(VFIO_IOAS, arg)), Errno::OPNOTSUPP);
    }
    assert_eq!(errno(call(&program, 3, 99)), Errno::OPNOTSUPP);
    assert_eq!(errno(call(&program, GET, 99)), Errno::NODEV);
    assert_eq!(errno(call(&program, SET, 99)), Errno::NOENT);
    call(&program, CLEAR, 99).unwrap();
}

#[test]
fn it_is_no_user_of_the_ioas() {
    let program = Program::new();
    let (one, two) = (program.alloc(), program.alloc());
    call(&program, SET, one).unwrap();
    assert_eq!(call(&program, GET, 0).unwrap(), one);
    call(&program, SET, two).unwrap();
    assert_eq!(call(&program, GET, 77).unwrap(), two);
    program.destroy(one).unwrap();
    assert_eq!(call(&program, GET, 0).unwrap(), two);
    // A call in flight may still have it in hand.
    let ioas = program.ioas(two);
    program.destroy(two).unwrap();
    assert_eq!(errno(call(&program, GET, 0)), Errno::NODEV);
    drop(ioas);
    assert_eq!((program.alloc(), program.alloc()), (one, two));
    assert_eq!(errno(call(&program, GET, 0)), Errno::NODEV, "another IOAS under the same number is another one");
    call(&program, SET, one).unwrap();
    call(&program, CLEAR, 0).unwrap();
    assert_eq!(errno(call(&program, GET, 0)), Errno::NODEV);
    let other = program.again();
    call(&program, SET, one).unwrap();
    assert_eq!(errno(call(&other, GET, 0)), Errno::NODEV, "each context has its own");
    assert_eq!(errno(program.call_read_only(VFIO_IOAS, uapi::VfioIoas { op: GET, ..Default::default() })), Errno::FAULT);
    program.call_read_only(VFIO_IOAS, uapi::VfioIoas { op: SET, ioas_id: two, ..Default::default() }).unwrap();
    assert_eq!(call(&program, GET, 0).unwrap(), two, "nothing is written back to set it");
}

/// Whoever is chosen while it is destroyed is not found afterwards, nor is its successor.
#[test]
fn chosen_and_destroyed_at_once() {
    let program = Program::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2000 {
                let id = program.alloc();
                let _ = call(&program, SET, id);
                program.destroy(id).unwrap();
            }
        });
        scope.spawn(|| {
            for _ in 0..2000 {
                if let Err(refusal) = call(&program, SET, 1) {
                    assert_eq!(refusal.errno, Errno::NOENT);
                }
                if let Err(refusal) = call(&program, GET, 0) {
                    assert_eq!(refusal.errno, Errno::NODEV);
                }
            }
        });
    });
    assert_eq!(errno(call(&program, GET, 0)), Errno::NODEV);
    let id = program.alloc();
    assert_eq!(errno(call(&program, GET, 0)), Errno::NODEV);
    call(&program, SET, id).unwrap();
    assert_eq!(call(&program, GET, 0).unwrap(), id);
}
