//! IOMMU_OPTION: rules 34 and 35.

mod common;

use common::{FIXED, MIB, OPTION, PAGE, Program, RW, errno, leaves, nobody};
use lockstep_iommufd::uapi::{self, OPTION_GET as GET, OPTION_HUGE_PAGES as HUGE, OPTION_RLIMIT_MODE as RLIMIT, OPTION_SET as SET};
use lockstep_iommufd::{Caller, Touch};
use rustix::io::Errno;

#[test]
fn the_order_of_errors() {
    let program = Program::with_rights(nobody(1, 0));
    let mut arg = uapi::Option { option_id: 9, op: 7, __reserved: 1, object_id: 5, val64: 7, ..Default::default() };
    let refused = |arg| errno(program.call(OPTION, arg));
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the reserved field");
    arg.__reserved = 0;
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the option");
    arg.option_id = RLIMIT;
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the object");
    arg.object_id = 0;
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the operation");
    arg.op = SET;
    let id = program.alloc();
    assert_eq!(refused(arg), Errno::PERM, "the right");
    program.local.set_process(|process| process.sys_resource = true);
    assert_eq!(refused(arg), Errno::BUSY, "objects, before the value");
    program.destroy(id).unwrap();
    assert_eq!(refused(arg), Errno::INVAL, "the value");
    arg.val64 = 1;
    program.call(OPTION, arg).unwrap();
    // Per IOAS.
    let mut arg = uapi::Option { option_id: HUGE, op: 7, object_id: 5, val64: 7, ..Default::default() };
    assert_eq!(refused(arg), Errno::NOENT, "the IOAS");
    arg.object_id = program.alloc();
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "the operation");
    arg.op = SET;
    assert_eq!(refused(arg), Errno::INVAL, "the value");
}

#[test]
fn who_is_limited() {
    let program = Program::new();
    let get = || program.option(RLIMIT, GET, 0, 99).unwrap();
    assert_eq!(get(), 0);
    for mode in [1, 1, 0, 1] {
        assert_eq!(program.option(RLIMIT, SET, 0, mode).unwrap(), mode);
        assert_eq!(get(), mode);
    }
    let id = program.alloc();
    assert_eq!(errno(program.option(RLIMIT, SET, 0, 1)), Errno::BUSY, "also to what it is");
    assert_eq!(get(), 1);
    assert_eq!(program.again().option(RLIMIT, GET, 0, 0).unwrap(), 0, "each context chooses");
    program.destroy(id).unwrap();
    program.option(RLIMIT, SET, 0, 0).unwrap();
    // Anybody may look.
    program.local.set_process(|process| process.sys_resource = false);
    assert_eq!(get(), 0);
    assert_eq!(errno(program.option(RLIMIT, SET, 0, 0)), Errno::PERM);
}

#[test]
fn large_leaves() {
    let program = Program::new();
    let (id, other) = (program.alloc(), program.alloc());
    let va = program.memory(4 * MIB);
    let get = |id| program.option(HUGE, GET, id, 99).unwrap();
    assert_eq!((get(id), get(other)), (1, 1));
    program.option(HUGE, SET, id, 0).unwrap();
    assert_eq!((get(id), get(other)), (0, 1));
    program.map(id, FIXED | RW, va, 4 * MIB, 4 * MIB).unwrap();
    let domain = program.attach(id);
    let sizes = leaves(&domain, 4 * MIB, 4 * MIB);
    assert!(sizes.len() == 1024 && sizes.iter().all(|size| *size == PAGE), "every leaf is one page");
    assert_eq!(errno(program.map(id, FIXED | RW, va, PAGE + 1, 0)), Errno::INVAL);
    program.option(HUGE, SET, id, 0).unwrap();
    program.option(HUGE, SET, id, 1).unwrap();
    assert_eq!(get(id), 1);
    assert_eq!(errno(program.option(HUGE, SET, id, 0)), Errno::INVAL, "areas and a page table");
    program.map(id, FIXED | RW, va, 2 * MIB, 16 * MIB).unwrap();
    assert_eq!(leaves(&domain, 16 * MIB, 2 * MIB), [2 * MIB]);
    program.unmap(id, 0, u64::MAX).unwrap();
    program.option(HUGE, SET, id, 0).unwrap();
    // Areas alone: they must keep to whole pages.
    program.map(other, FIXED | RW, va, PAGE, 0x10000).unwrap();
    program.option(HUGE, SET, other, 0).unwrap();
    program.option(HUGE, SET, other, 1).unwrap();
    for (va, length, iova) in [(va, PAGE, 0x20001), (va, 1, 0x20000), (va + 1, PAGE, 0x20000)] {
        program.map(other, FIXED | RW, va, length, iova).unwrap();
        assert_eq!(errno(program.option(HUGE, SET, other, 0)), Errno::ADDRINUSE);
        assert_eq!(get(other), 1);
        program.unmap(other, iova, length).unwrap();
    }
    program.option(HUGE, SET, other, 0).unwrap();
}

/// Only the value is written back, so nothing else need be writable; where it is not, the option is set all the same, as in the kernel.
#[test]
fn what_goes_back() {
    let program = Program::new();
    assert_eq!(
        errno(program.call_read_only(OPTION, uapi::Option { option_id: RLIMIT, op: SET, val64: 1, ..Default::default() })),
        Errno::FAULT
    );
    assert_eq!(program.option(RLIMIT, GET, 0, 0).unwrap(), 1);
    // The first 16 bytes lie in memory that can be read only.
    let at = 0x4000_0000u64;
    let (low, high) = (backing::Backing::memfd(PAGE, backing::Frames::Contiguous).unwrap(), 0x4000_1000);
    program.local.add_at(&low, at, Touch::Always).unwrap();
    program.memory_at(high, PAGE, Touch::WhileShown);
    let arg = uapi::Option { size: 24, option_id: RLIMIT, op: GET, val64: 77, ..Default::default() };
    program.local.write(high - 16, zerocopy::IntoBytes::as_bytes(&arg)).unwrap();
    program.local.hide(at, PAGE).unwrap();
    program.local.add_at(&low, at, Touch::ReadOnly).unwrap();
    program.local.call(&*program.context, uapi::io(OPTION), high - 16).unwrap();
    assert_eq!(program.local.get::<u64>(high), 1);
}
