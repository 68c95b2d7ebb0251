//! IOMMU_IOAS_ALLOW_IOVAS: rules 15 and 30.

mod common;

use addr::{Iova, Span};
use common::{ALLOW, FIXED, MIB, PAGE, Program, RW, errno};
use lockstep_iommufd::{Caller, Touch, uapi};
use rustix::io::Errno;

const NOWHERE: u64 = 0x7777_0000;

#[test]
fn wrong_input_in_order() {
    let program = Program::new();
    let id = program.alloc();
    let call = |ioas_id, reserved, num_iovas, allowed_iovas| {
        errno(program.call(ALLOW, uapi::IoasAllowIovas { ioas_id, num_iovas, __reserved: reserved, allowed_iovas, ..Default::default() }))
    };
    assert_eq!(call(id + 1, 1, 1, NOWHERE), Errno::OPNOTSUPP, "the reserved field first");
    assert_eq!(call(id + 1, 0, 1, NOWHERE), Errno::NOENT, "then the IOAS");
    assert_eq!(call(id, 0, 1, NOWHERE), Errno::FAULT);
    assert_eq!(call(id, 0, u32::MAX, NOWHERE), Errno::FAULT);
    for (start, last) in [(5, 5), (6, 5), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
        assert_eq!(errno(program.allow(id, &[(start, last)])), Errno::INVAL, "{start:#x}..={last:#x}");
    }
    // The entries are judged one after the other: which is wrong first counts.
    let page = 0x4000_0000;
    program.memory_at(page, PAGE, Touch::WhileShown);
    let at = page + PAGE - 32;
    let put = |ranges: [[u64; 2]; 2]| {
        let bytes: Vec<u8> = ranges.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        program.local.write(at, &bytes).unwrap();
    };
    put([[0x1000, 0x2000], [0x3000, 0x3000]]);
    assert_eq!(call(id, 0, 3, at), Errno::INVAL, "the second is empty, the third unreadable");
    put([[0x1000, 0x2000], [0x2000, 0x3000]]);
    assert_eq!(call(id, 0, 3, at), Errno::INVAL, "the second meets the first, the third is unreadable");
    put([[0x1000, 0x2000], [0x3000, 0x4000]]);
    assert_eq!(call(id, 0, 3, at), Errno::FAULT);
    program.ioas(id).ioas().reserve(Span::of(Iova::new(0x8000), Iova::new(0x8fff))).unwrap();
    assert_eq!(errno(program.allow(id, &[(0x8800, 0x9000), (0x8c00, 0x9800)])), Errno::INVAL, "overlap before reserved");
    assert_eq!(errno(program.allow(id, &[(0x1000, 0x1fff), (0x8fff, 0x9000)])), Errno::ADDRINUSE);
    program.allow(id, &[(0x7000, 0x7fff), (0x9000, 0x9fff)]).unwrap();
}

#[test]
fn the_list_is_replaced_whole_or_not_at_all() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(4 * PAGE);
    let auto = || program.map(id, RW, va, PAGE, 0);
    program.allow(id, &[(16 * MIB, 16 * MIB + PAGE - 1), (32 * MIB, 32 * MIB + PAGE - 1)]).unwrap();
    assert_eq!(auto().unwrap(), 16 * MIB);
    for bad in [&[(64 * MIB, 65 * MIB), (64 * MIB, 66 * MIB)][..], &[(64 * MIB, 65 * MIB), (1, 1)]] {
        assert_eq!(errno(program.allow(id, bad)), Errno::INVAL);
    }
    assert_eq!(auto().unwrap(), 32 * MIB, "the old list is still there");
    assert_eq!(errno(auto()), Errno::NOSPC);
    program.map(id, FIXED | RW, va, PAGE, 0x1000).unwrap();
    program.allow(id, &[(48 * MIB, 49 * MIB)]).unwrap();
    assert_eq!(auto().unwrap(), 48 * MIB, "areas outside of the list do not matter");
    program.allow(id, &[]).unwrap();
    assert_eq!(auto().unwrap(), 0x2000, "an empty list lifts the limit; 0 is never chosen");
    assert_eq!(
        errno(
            program
                .call(ALLOW, uapi::IoasAllowIovas { ioas_id: id, num_iovas: 0, allowed_iovas: NOWHERE, ..Default::default() })
                .and_then(|_| program.allow(id, &[(3, 2)]))
        ),
        Errno::INVAL
    );
}

/// The list is one more thing that a new reserved range may not meet.
#[test]
fn a_page_table_whose_aperture_cuts_the_list() {
    let program = Program::new();
    let id = program.alloc();
    program.allow(id, &[(0x1000, 0x1fff)]).unwrap();
    let config = iommu::DomainConfig { aperture: Some(Span::of(Iova::new(16 * MIB), Iova::new(2 << 30))), ..Default::default() };
    assert!(program.attach_with(id, &config).is_err());
    program.allow(id, &[(16 * MIB, 17 * MIB)]).unwrap();
    program.attach_with(id, &config).unwrap();
    assert_eq!(errno(program.allow(id, &[(0x1000, 0x1fff)])), Errno::ADDRINUSE);
    let va = program.memory(PAGE);
    assert_eq!(program.map(id, RW, va, PAGE, 0).unwrap(), 16 * MIB);
}

#[test]
fn a_long_list() {
    let program = Program::new();
    let id = program.alloc();
    let ranges: Vec<_> = (1..=3000u64).map(|index| (index * 0x10000, index * 0x10000 + PAGE - 1)).rev().collect();
    program.allow(id, &ranges).unwrap();
    let va = program.memory(PAGE);
    for index in 1..=4 {
        assert_eq!(program.map(id, RW, va, PAGE, 0).unwrap(), index * 0x10000);
    }
}
