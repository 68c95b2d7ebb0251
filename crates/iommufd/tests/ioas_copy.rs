//! IOMMU_IOAS_COPY: rules 20 and 21, over one area and over several.

mod common;

use addr::{Iova, Span};
use common::{COPY, FIXED, MIB, PAGE, Program, READ, RW, WRITE, errno, leaves, nobody, shown};
use lockstep_iommufd::{Touch, uapi};
use rustix::io::Errno;

#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let (src, dst) = (program.alloc(), program.alloc());
    program.attach(dst);
    let va = program.memory(8 * PAGE);
    program.map(src, FIXED | READ, va, 4 * PAGE, 0x10000).unwrap();
    program.map(dst, FIXED | RW, va, PAGE, 0x9000).unwrap();
    program.ioas(dst).ioas().reserve(Span::from_len(Iova::new(0x8000), 0x1000).unwrap()).unwrap();
    let mut arg = uapi::IoasCopy {
        flags: 8,
        dst_ioas_id: 98,
        src_ioas_id: 99,
        length: u64::MAX,
        dst_iova: u64::MAX,
        src_iova: u64::MAX,
        ..Default::default()
    };
    let refused = |arg| errno(program.call(COPY, arg));
    assert_eq!(refused(arg), Errno::OPNOTSUPP, "an unknown flag");
    arg.flags = FIXED;
    assert_eq!(refused(uapi::IoasCopy { src_iova: 0, dst_iova: 0, ..arg }), Errno::OVERFLOW, "the length");
    assert_eq!(refused(uapi::IoasCopy { length: 0, dst_iova: 0, ..arg }), Errno::OVERFLOW, "the source");
    assert_eq!(refused(uapi::IoasCopy { length: 0, src_iova: 0, ..arg }), Errno::OVERFLOW, "the destination");
    (arg.length, arg.src_iova, arg.dst_iova) = (0, u64::MAX - 1, 0x8001);
    assert_eq!(refused(arg), Errno::INVAL, "neither reading nor writing");
    arg.flags = FIXED | RW;
    assert_eq!(refused(arg), Errno::NOENT, "the source's IOAS");
    arg.src_ioas_id = src;
    assert_eq!(refused(arg), Errno::INVAL, "no length");
    arg.length = 3;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the source wraps");
    arg.length = 0x1801;
    arg.src_iova = 0x13001;
    assert_eq!(refused(arg), Errno::NOENT, "the source has a hole");
    arg.src_iova = 0x10001;
    assert_eq!(refused(arg), Errno::NOENT, "the destination's IOAS");
    arg.dst_ioas_id = dst;
    assert_eq!(refused(arg), Errno::INVAL, "a length that is not aligned");
    arg.length = 0x2000;
    assert_eq!(refused(arg), Errno::INVAL, "an IOVA that is not aligned");
    arg.dst_iova = u64::MAX - 0xfff;
    assert_eq!(refused(arg), Errno::OVERFLOW, "the destination wraps");
    arg.dst_iova = 0x8000;
    assert_eq!(refused(arg), Errno::INVAL, "reserved");
    arg.dst_iova = 0x9000;
    assert_eq!(refused(arg), Errno::EXIST, "taken");
    arg.dst_iova = 0xa000;
    assert_eq!(refused(arg), Errno::PERM, "writing to what was mapped for reading");
    arg.flags = FIXED | READ;
    assert_eq!(refused(arg), Errno::INVAL, "the source is not aligned as the destination must be");
    arg.src_iova = 0x11000;
    program.call(COPY, arg).unwrap();
    assert_eq!(program.areas(dst), [(0x9000, 0x9fff), (0xa000, 0xbfff)]);
}

/// One destination area for each that the source touches; the source may begin and end inside of one.
#[test]
fn several_areas() {
    let program = Program::with_rights(nobody(4, 1 << 30));
    let (src, dst) = (program.alloc(), program.alloc());
    let domain = program.attach(dst);
    let va = program.memory(16 * PAGE);
    for (index, (first, pages)) in [(0, 3), (8, 2), (4, 3)].into_iter().enumerate() {
        let iova = 0x10000 + [0, 3, 5][index] * PAGE;
        program.map(src, FIXED | RW, va + first * PAGE, pages * PAGE, iova).unwrap();
    }
    for page in 0..16u64 {
        lockstep_iommufd::Caller::write(&program.local, va + page * PAGE, &[page as u8]).unwrap();
    }
    program.copy(FIXED | READ, (src, 0x11000), 5 * PAGE, (dst, 0x40000)).unwrap();
    assert_eq!(program.areas(dst), [(0x40000, 0x41fff), (0x42000, 0x43fff), (0x44000, 0x44fff)]);
    let (_, mut dma) = program.device(&domain);
    let mut seen = |iova| {
        let mut byte = [0xff];
        dma.read(Iova::new(iova), &mut byte).unwrap();
        dma.write(Iova::new(iova), &byte).unwrap_err();
        byte[0]
    };
    assert_eq!([0x40000, 0x41000, 0x42000, 0x43000, 0x44000].map(&mut seen), [1, 2, 8, 9, 4]);
    assert_eq!(program.host.accounts().of_user(4), 5, "what is shown, and no more");
    // A hole behind the first areas: nothing is copied.
    for (from, length) in [(0x10000, 9 * PAGE), (0xf000, 2 * PAGE), (0x18000, 1)] {
        assert_eq!(errno(program.copy(RW, (src, from), length, (dst, 0))), Errno::NOENT);
    }
    // One of them in the way of the destination: nothing either.
    assert_eq!(errno(program.copy(FIXED | RW, (src, 0x10000), 8 * PAGE, (dst, 0x3a000))), Errno::EXIST);
    assert_eq!(program.areas(dst).len(), 3);
    // The destination's areas are unmapped one by one as any.
    assert_eq!(errno(program.unmap(dst, 0x40000, 3 * PAGE)), Errno::NOENT);
    assert_eq!(program.areas(dst).len(), 2);
    assert_eq!(program.unmap(dst, 0x42000, 3 * PAGE).unwrap(), 3 * PAGE);
    assert_eq!(program.host.accounts().of_user(4), 0);
}

#[test]
fn one_bad_part_of_several() {
    let program = Program::new();
    let (src, dst) = (program.alloc(), program.alloc());
    let domain = program.attach(dst);
    program.memory_at(0x4000_0000, PAGE, Touch::WhileShown);
    let va = program.memory(PAGE);
    program.map(src, FIXED | RW, 0x4000_0000, PAGE, 0x10000).unwrap();
    program.map(src, FIXED | READ, va, PAGE, 0x11000).unwrap();
    program.map(src, FIXED | READ, 0x5000_0000, PAGE, 0x12000).unwrap();
    assert_eq!(errno(program.copy(FIXED | WRITE, (src, 0x10000), 2 * PAGE, (dst, 0x20000))), Errno::PERM, "the second may not be written");
    assert_eq!(errno(program.copy(FIXED | READ, (src, 0x10000), 3 * PAGE, (dst, 0x20000))), Errno::FAULT, "the third is not there");
    assert_eq!((program.areas(dst), leaves(&domain, 0, 1 << 30)), (vec![], vec![]));
    program.copy(FIXED | READ, (src, 0x10000), 2 * PAGE, (dst, 0x20000)).unwrap();
}

/// The pages stay when the source goes, also when the program has let go of them.
#[test]
fn copies_live_longer() {
    let program = Program::with_rights(nobody(4, 1 << 30));
    let (src, dst) = (program.alloc(), program.alloc());
    let (one, two) = (program.attach(src), program.attach(dst));
    program.memory_at(0x4000_0000, 4 * PAGE, Touch::Always);
    lockstep_iommufd::Caller::write(&program.local, 0x4000_0000, b"still here").unwrap();
    program.map(src, FIXED | RW, 0x4000_0000, 4 * PAGE, 0x10000).unwrap();
    let copied = program.copy(RW, (src, 0x10000), 2 * PAGE, (dst, 0)).unwrap();
    program.copy(FIXED | RW, (dst, copied), 2 * PAGE, (dst, 0x90000)).unwrap();
    assert_eq!(program.host.accounts().of_user(4), 4, "paid for once");
    program.destroy(src).unwrap();
    assert!(!shown(&one, 0x10000) && shown(&two, copied));
    assert_eq!(program.host.accounts().of_user(4), 2, "what only the source showed is given back");
    program.local.hide(0x4000_0000, 4 * PAGE).unwrap();
    let (_, mut dma) = program.device(&two);
    let mut seen = [0; 10];
    dma.read(Iova::new(0x90000), &mut seen).unwrap();
    assert_eq!(&seen, b"still here");
    assert_eq!(program.unmap(dst, 0, u64::MAX).unwrap(), 4 * PAGE);
    assert_eq!(program.host.accounts().of_user(4), 0);
}

#[test]
fn permissions_are_its_own() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(PAGE);
    program.map(id, FIXED | WRITE, va, PAGE, 0x10000).unwrap();
    program.copy(FIXED | READ, (id, 0x10000), PAGE, (id, 0x20000)).unwrap();
    program.copy(FIXED | RW, (id, 0x20000), PAGE, (id, 0x30000)).unwrap();
    program.map(id, FIXED | READ, va, PAGE, 0x40000).unwrap();
    assert_eq!(errno(program.copy(FIXED | RW, (id, 0x40000), PAGE, (id, 0x50000))), Errno::PERM);
    let domain = program.attach(id);
    let perm = |iova| domain.table().walk(Iova::new(iova)).unwrap().perm;
    assert_eq!([0x10000, 0x20000, 0x30000, 0x40000].map(perm), [pt::Perm::WRITE, pt::Perm::READ, pt::Perm::RW, pt::Perm::READ]);
}

/// Odd borders fit where the destination has no granule to keep to.
#[test]
fn odd_borders() {
    let program = Program::new();
    let (src, dst) = (program.alloc(), program.alloc());
    let va = program.memory(4 * PAGE);
    program.map(src, FIXED | RW, va, 4 * PAGE, 0x10000).unwrap();
    program.copy(FIXED | RW, (src, 0x10003), 0x1005, (dst, 0x777)).unwrap();
    assert_eq!(program.areas(dst), [(0x777, 0x177b)]);
    assert!(program.attach_with(dst, &iommu::DomainConfig::default()).is_err(), "no page table can show that");
    program.unmap(dst, 0, u64::MAX).unwrap();
    program.attach_mock(dst);
    assert_eq!(errno(program.copy(FIXED | RW, (src, 0x10400), 2048, (dst, 32 * MIB))), Errno::INVAL);
    program.copy(FIXED | RW, (src, 0x10800), 2048, (dst, 32 * MIB)).unwrap();
    assert_eq!(program.copy(RW, (src, 0x11800), 2048, (dst, 0)).unwrap(), 16 * MIB + 2048, "the source's place in its page is kept");
}

#[test]
fn read_only_structure() {
    let program = Program::new();
    let (src, dst) = (program.alloc(), program.alloc());
    let va = program.memory(4 * PAGE);
    program.map(src, FIXED | RW, va, 2 * PAGE, 0x10000).unwrap();
    program.map(src, FIXED | RW, va, 2 * PAGE, 0x12000).unwrap();
    let arg = uapi::IoasCopy { flags: RW, dst_ioas_id: dst, src_ioas_id: src, length: 4 * PAGE, src_iova: 0x10000, ..Default::default() };
    assert_eq!(errno(program.call_read_only(COPY, arg)), Errno::FAULT);
    assert_eq!((program.areas(dst).len(), program.areas(src).len()), (0, 2));
}

#[test]
fn every_failing_step() {
    let program = Program::with_rights(nobody(4, 1 << 30));
    let (src, dst) = (program.alloc(), program.alloc());
    let domain = program.attach(dst);
    let va = program.memory(2 * MIB);
    program.map(src, FIXED | RW, va, MIB, 0x10_0000).unwrap();
    program.map(src, FIXED | RW, va + MIB, MIB, 0x20_0000).unwrap();
    for step in 1.. {
        assert!(step < 500, "it never succeeds");
        let nth = sync::fail::nth(step);
        let answer = program.copy(FIXED | RW, (src, 0x18_0000), MIB, (dst, 0x98_0000));
        let fired = nth.fired();
        drop(nth);
        let Some(name) = fired else {
            assert_eq!(answer.unwrap(), 0x98_0000);
            break;
        };
        assert_eq!(errno(answer), Errno::NOMEM, "{name}");
        assert_eq!((program.areas(dst), leaves(&domain, 0, 1 << 30), program.host.accounts().of_user(4)), (vec![], vec![], 0), "{name}");
    }
}
