//! IOMMU_IOAS_CHANGE_PROCESS: rule 39, and rule 36 for what stays as it was.

mod common;

use common::{CHANGE_PROCESS, FIXED, PAGE, Program, RW, errno, nobody};
use lockstep_iommufd::uapi::{self, io};
use lockstep_iommufd::{Answer, Caller, Local, Process};
use rustix::io::Errno;

fn change(program: &Program, caller: &Local) -> Answer<i64> {
    let mut arg = uapi::IoasChangeProcess { size: 8, ..Default::default() };
    caller.ioctl(&*program.context, io(CHANGE_PROCESS), &mut arg)
}

/// Another process with the same files.
fn other(program: &Program, rights: Process) -> Local {
    let child = program.local.fork();
    child.set_process(|process| *process = rights);
    child
}

#[test]
fn wrong_input_in_order() {
    let program = Program::with_rights(nobody(1, 1 << 20));
    let arg = uapi::IoasChangeProcess { __reserved: 1, ..Default::default() };
    assert_eq!(errno(program.call(CHANGE_PROCESS, arg)), Errno::OPNOTSUPP);
    change(&program, &program.local).unwrap();
    let (id, other) = (program.alloc(), program.alloc());
    let (fd, va) = (program.file(4 * PAGE), program.memory(4 * PAGE));
    program.map_file(id, FIXED | RW, fd, 0, PAGE, 0x10000).unwrap();
    change(&program, &program.local).unwrap();
    program.map(other, FIXED | RW, va, PAGE, 0x10000).unwrap();
    let refused = change(&program, &program.local).unwrap_err();
    assert_eq!(refused.errno, Errno::INVAL, "memory of a process, in any IOAS");
    assert!(refused.to_string().contains("0x10000"), "{refused}");
    program.unmap(other, 0, u64::MAX).unwrap();
    let buffer = program.local.install(lockstep_iommufd::DmaBuf::new(PAGE).unwrap()).unwrap();
    program.map_file(other, FIXED | RW, buffer, 0, PAGE, 0x10000).unwrap();
    assert_eq!(errno(change(&program, &program.local)), Errno::INVAL, "a device's buffer");
    program.copy(FIXED | RW, (id, 0x10000), PAGE, (other, 0x20000)).unwrap();
    program.unmap(other, 0x10000, PAGE).unwrap();
    change(&program, &program.local).unwrap();
    let gone = program.local.fork();
    gone.exit();
    assert_eq!(errno(change(&program, &gone)), Errno::SRCH);
}

#[test]
fn from_one_user_to_another() {
    let parent = nobody(1, 16 * PAGE);
    let program = Program::with_rights(parent);
    let (id, second) = (program.alloc(), program.alloc());
    program.attach(id);
    let domain = program.attach(second);
    let fd = program.file(16 * PAGE);
    program.map_file(id, FIXED | RW, fd, 0, 4 * PAGE, 0x10000).unwrap();
    program.copy(FIXED | RW, (id, 0x10000), 4 * PAGE, (second, 0x10000)).unwrap();
    program.copy(FIXED | RW, (id, 0x11000), PAGE, (second, 0x20000)).unwrap();
    program.map_file(second, FIXED | RW, fd, 0, 3 * PAGE, 0x30000).unwrap();
    let accounts = program.host.accounts();
    assert_eq!((accounts.of_user(1), accounts.of_space(parent.space)), (7, (7, 0)));
    // Too little for both: everything stays.
    let poor = nobody(2, 6 * PAGE);
    assert_eq!(errno(change(&program, &other(&program, poor))), Errno::NOMEM);
    assert_eq!((accounts.of_user(1), accounts.of_space(parent.space)), (7, (7, 0)));
    assert_eq!((accounts.of_user(2), accounts.of_space(poor.space)), (0, (0, 0)));
    let child = nobody(2, 7 * PAGE);
    let child_local = other(&program, child);
    change(&program, &child_local).unwrap();
    assert_eq!((accounts.of_user(1), accounts.of_space(parent.space)), (0, (0, 0)), "shared pages count once");
    assert_eq!((accounts.of_user(2), accounts.of_space(child.space)), (7, (7, 0)));
    // Twice is fine only if there is room for both at once: the new payer pays before the old one gets its own back.
    assert_eq!(errno(change(&program, &child_local)), Errno::NOMEM);
    child_local.set_process(|process| process.memlock_bytes = 14 * PAGE);
    change(&program, &child_local).unwrap();
    assert_eq!((accounts.of_user(2), accounts.of_space(child.space)), (7, (7, 0)));
    // What was pinned by the one is given back by the other; what is pinned later is paid by it.
    program.unmap(second, 0x30000, 3 * PAGE).unwrap();
    assert_eq!(accounts.of_user(2), 4);
    program.unmap(id, 0, u64::MAX).unwrap();
    program.ioas(second).ioas().detach(&domain).unwrap();
    assert_eq!(accounts.of_user(2), 0);
    program.ioas(second).ioas().attach(&domain).unwrap();
    assert_eq!((accounts.of_user(1), accounts.of_user(2), accounts.of_space(child.space)), (0, 4, (4, 0)));
    program.destroy(second).unwrap();
    assert_eq!((accounts.of_user(2), accounts.of_space(child.space)), (0, (0, 0)));
}

/// What is limited was decided when the pages were mapped, for each of them.
#[test]
fn modes_stay() {
    let mut parent = nobody(1, 1 << 20);
    parent.ipc_lock = true;
    parent.sys_resource = true;
    let program = Program::with_rights(parent);
    program.option(uapi::OPTION_RLIMIT_MODE, uapi::OPTION_SET, 0, 1).unwrap();
    let id = program.alloc();
    program.attach(id);
    let fd = program.file(16 * PAGE);
    program.map_file(id, FIXED | RW, fd, 0, 8 * PAGE, 0x10000).unwrap();
    program.local.set_process(|process| process.ipc_lock = false);
    program.map_file(id, FIXED | RW, fd, 0, 2 * PAGE, 0x20000).unwrap();
    let accounts = program.host.accounts();
    assert_eq!((accounts.of_user(1), accounts.of_space(parent.space)), (0, (10, 2)));
    let child = nobody(2, 2 * PAGE);
    change(&program, &other(&program, child)).unwrap();
    assert_eq!((accounts.of_user(1), accounts.of_space(parent.space)), (0, (0, 0)));
    assert_eq!((accounts.of_user(2), accounts.of_space(child.space)), (0, (10, 2)), "eight of them without a limit");
    let poor = nobody(3, PAGE);
    assert_eq!(errno(change(&program, &other(&program, poor))), Errno::NOMEM);
    assert_eq!((accounts.of_space(poor.space), accounts.of_space(child.space)), ((0, 0), (10, 2)));
    program.unmap(id, 0, u64::MAX).unwrap();
    assert_eq!(accounts.of_space(child.space), (0, 0));
}

/// It has every map stand still, and ends up with one payer for all.
#[test]
fn against_maps() {
    let parent = nobody(1, 1 << 30);
    let program = Program::with_rights(parent);
    let id = program.alloc();
    program.attach(id);
    let fd = program.file(64 * PAGE);
    let child = nobody(2, 1 << 30);
    let child_local = other(&program, child);
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let program = &program;
            scope.spawn(move || {
                for round in 0..1000 {
                    let at = 0x10_0000 * (1 + thread) + round % 4 * 4 * PAGE;
                    program.map_file(id, FIXED | RW, fd, 0, 4 * PAGE, at).unwrap();
                    program.unmap(id, at, 4 * PAGE).unwrap();
                }
            });
        }
        scope.spawn(|| {
            for round in 0..500 {
                if let Err(refusal) = change(&program, if round % 2 == 0 { &child_local } else { &program.local }) {
                    assert_eq!(refusal.errno, Errno::BUSY, "{refusal}");
                }
            }
        });
    });
    let accounts = program.host.accounts();
    assert_eq!((accounts.of_user(1), accounts.of_user(2)), (0, 0));
    assert_eq!((accounts.of_space(parent.space), accounts.of_space(child.space)), ((0, 0), (0, 0)));
}
