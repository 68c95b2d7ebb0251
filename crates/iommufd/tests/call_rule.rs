//! The rule of every call: how a structure is read, which sizes are taken, what an unknown number answers, in which order.

mod common;

use common::{ALLOC, DESTROY, PAGE, Program, VFIO_IOAS, errno};
use lockstep_iommufd::table::Rule;
use lockstep_iommufd::uapi::{self, io};
use lockstep_iommufd::{Caller, TABLE, Touch};
use rustix::io::Errno;

/// Where the readable pages lie; nothing is behind them.
const AT: u64 = 0x4000_0000;
const END: u64 = AT + 4 * PAGE;
const NOWHERE: u64 = 0x7777_0000;

fn program() -> Program {
    let program = Program::new();
    program.memory_at(AT, 4 * PAGE, Touch::WhileShown);
    program
}

fn by_size() -> impl Iterator<Item = &'static lockstep_iommufd::table::Ioctl<lockstep_iommufd::Context>> {
    TABLE.iter().filter(|entry| entry.rule == Rule::Size && entry.nr != 0xa0)
}

impl Program {
    fn put_at(&self, at: u64, bytes: &[u8]) {
        self.local.write(at, bytes).unwrap();
    }

    fn at(&self, nr: u32, at: u64) -> lockstep_iommufd::Answer<i64> {
        self.local.call(&*self.context, io(nr), at)
    }
}

#[test]
fn too_small_is_einval_and_unreadable_is_efault() {
    let program = program();
    for entry in by_size() {
        assert_eq!(errno(program.at(entry.nr, NOWHERE)), Errno::FAULT, "{}", entry.name);
        assert_eq!(errno(program.at(entry.nr, u64::MAX - 1)), Errno::FAULT, "{}", entry.name);
        assert_eq!(errno(program.at(entry.nr, 0)), Errno::FAULT, "{}", entry.name);
        // Three of the four bytes of the size.
        assert_eq!(errno(program.at(entry.nr, END - 3)), Errno::FAULT, "{}", entry.name);
        for size in [0, 1, 4, entry.min as u32 - 1] {
            program.put_at(AT, &size.to_le_bytes());
            assert_eq!(errno(program.at(entry.nr, AT)), Errno::INVAL, "{} of {size}", entry.name);
            // The size is judged before the rest is looked for.
            program.put_at(END - 4, &size.to_le_bytes());
            assert_eq!(errno(program.at(entry.nr, END - 4)), Errno::INVAL, "{} of {size}", entry.name);
        }
        program.put_at(END - 4, &(entry.size as u32).to_le_bytes());
        assert_eq!(errno(program.at(entry.nr, END - 4)), Errno::FAULT, "{}: the body cannot be read", entry.name);
    }
}

#[test]
fn unknown_bytes_count_before_everything_but_the_size() {
    let program = program();
    for entry in by_size() {
        for extra in [1, 7, 300, 3 * PAGE as usize] {
            let size = entry.size + extra;
            let mut bytes = vec![0; size];
            bytes[..4].copy_from_slice(&(size as u32).to_le_bytes());
            bytes[size - 1] = 1;
            program.put_at(AT, &bytes);
            assert_eq!(errno(program.at(entry.nr, AT)), Errno::TOOBIG, "{} and {extra}", entry.name);
            // The last byte is the first behind the memory.
            bytes[size - 1] = 0;
            program.put_at(END + 1 - size as u64, &bytes[..size - 1]);
            assert_eq!(errno(program.at(entry.nr, END + 1 - size as u64)), Errno::FAULT, "{} and {extra}", entry.name);
        }
        // A byte that is set is met before memory that is not there.
        let mut bytes = vec![0; entry.size + 9];
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes[entry.size + 8] = 1;
        let at = END - bytes.len() as u64;
        program.put_at(at, &bytes);
        assert_eq!(errno(program.at(entry.nr, at)), Errno::TOOBIG, "{}", entry.name);
        bytes[entry.size + 8] = 0;
        program.put_at(at, &bytes);
        assert_eq!(errno(program.at(entry.nr, at)), Errno::FAULT, "{}: 4 GiB are not there", entry.name);
        program.put_at(AT, &[0; PAGE as usize]);
    }
    assert_eq!(program.alloc(), 1, "none of that made an object");
}

#[test]
fn longer_structures_of_zeros_and_shorter_ones_are_taken() {
    let program = program();
    let mut bytes = vec![0; 2 * PAGE as usize];
    bytes[..4].copy_from_slice(&(2 * PAGE as u32).to_le_bytes());
    program.put_at(AT + 100, &bytes);
    program.at(ALLOC, AT + 100).unwrap();
    assert_eq!(program.local.get::<u32>(AT + 108), 1);
    // The exact structure, with nothing behind it, and one that is not aligned.
    for (at, id) in [(END - 12, 2u32), (END - 13, 3), (AT + PAGE - 5, 4)] {
        program.put_at(at, &[12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        program.at(ALLOC, at).unwrap();
        assert_eq!(program.local.get::<u32>(at + 8), id);
    }
    // What a short structure lacks reads as zero: HWPT_ALLOC of 24 bytes has no fault queue, and the IOAS is looked for.
    let mut bytes = [0xff; 48];
    // Otherwise this would be a type without a length.
    bytes[28..32].fill(0);
    bytes[..24].copy_from_slice(&[24, 0, 0, 0, 0, 0, 0, 0, 9, 9, 0, 0, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    program.put_at(AT, &bytes);
    assert_eq!(errno(program.at(0x89, AT)), Errno::NOENT);
}

/// Not a byte behind the caller's own size is written.
#[test]
fn answers_go_back_up_to_the_smaller_size() {
    let program = program();
    let id = program.alloc();
    let mut bytes = [0xee; 64];
    let arg = uapi::VfioIoas { size: 12, ioas_id: id, op: uapi::VFIO_IOAS_SET, ..Default::default() };
    program.call(VFIO_IOAS, arg).unwrap();
    bytes[..12].copy_from_slice(zerocopy::IntoBytes::as_bytes(&uapi::VfioIoas { op: uapi::VFIO_IOAS_GET, ioas_id: 77, ..arg }));
    program.put_at(AT, &bytes);
    program.at(VFIO_IOAS, AT).unwrap();
    let back: [u8; 64] = program.local.get(AT);
    assert_eq!((back[4], &back[12..]), (id as u8, &[0xee; 52][..]));
}

#[test]
fn numbers_that_are_none() {
    let program = program();
    program.put_at(AT, &[12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let call = |command, at| program.local.call(&*program.context, command, at);
    let direction = 0xc000_0000;
    for command in [
        io(0),
        io(0x63),
        io(0x67),
        io(0x75),
        io(0x96),
        io(0xa1),
        io(0xdf),
        io(0xe3),
        io(0xff),
        0x3c81,
        0x81,
        io(ALLOC) | 1 << 16,
        io(ALLOC) | direction,
    ] {
        assert_eq!(errno(call(command, AT)), Errno::NOTTY, "{command:#x}");
    }
    // Within the table's range the kernel reads the size first; elsewhere it does not.
    assert_eq!(errno(call(io(ALLOC) | direction, NOWHERE)), Errno::FAULT);
    for command in [io(0), io(0x75), io(0xb0), io(0xff)] {
        assert_eq!(errno(call(command, NOWHERE)), Errno::NOTTY, "{command:#x}");
    }
    assert_eq!(errno(program.at(0xa0, AT)), Errno::NOTTY, "nobody asked for the test operations");
    assert_eq!(program.alloc(), 1);
}

/// The older rule: the smallest structure is read whole, then its size is looked at, and bytes behind it are the caller's business.
#[test]
fn vfio_structures() {
    let program = program();
    for (nr, min, size) in [(0x70, 16u64, 24), (0x71, 32, 32), (0x72, 24, 24)] {
        let entry = TABLE.iter().find(|entry| entry.nr == nr).unwrap();
        assert_eq!((entry.min as u64, entry.size as u64), (min, size));
        assert_eq!(errno(program.at(nr, NOWHERE)), Errno::FAULT);
        program.put_at(AT, &(min as u32 - 1).to_le_bytes());
        assert_eq!(errno(program.at(nr, AT)), Errno::INVAL);
        program.put_at(END - min + 1, &(min as u32 - 1).to_le_bytes());
        assert_eq!(errno(program.at(nr, END - min + 1)), Errno::FAULT, "unreadable is found first");
        let mut bytes = vec![0; 256];
        bytes[..4].copy_from_slice(&256u32.to_le_bytes());
        bytes[200] = 1;
        program.put_at(AT, &bytes);
        assert_eq!(errno(program.at(nr, AT)), Errno::NODEV, "no IOAS; but not E2BIG");
        program.put_at(AT, &[0; 256]);
    }
}

#[test]
fn other_uses_of_the_descriptor() {
    use lockstep_iommufd::{File, Mmap};
    let program = program();
    assert_eq!(errno(program.context.read(&program.local, 8, None)), Errno::INVAL);
    assert_eq!(errno(program.context.write(&program.local, &[0; 8], None)), Errno::INVAL);
    let wanted = Mmap { len: PAGE, prot: 3, flags: 1, offset: PAGE };
    let refused = |wanted: Mmap| errno(program.context.mmap(&program.local, &wanted));
    assert_eq!(refused(wanted), Errno::NXIO, "nothing is there to be mapped");
    assert_eq!(refused(Mmap { flags: 2, ..wanted }), Errno::INVAL);
    assert_eq!(refused(Mmap { len: PAGE - 1, ..wanted }), Errno::INVAL);
    assert_eq!(refused(Mmap { len: 0, ..wanted }), Errno::INVAL);
    assert_eq!(refused(Mmap { prot: 7, ..wanted }), Errno::PERM);
    assert_eq!(refused(Mmap { prot: 7, flags: 2, ..wanted }), Errno::INVAL, "before that");
    program.destroy(1).unwrap_err();
    assert_eq!(program.call_read_only(DESTROY, uapi::Destroy::default()).unwrap_err().errno, Errno::NOENT, "nothing is written back");
}
