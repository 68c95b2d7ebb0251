//! IOMMU_IOAS_IOVA_RANGES: rules 29 and 32.

mod common;

use addr::{Iova, Span};
use common::{FIXED, MIB, PAGE, Program, RANGES, RW, errno};
use lockstep_iommufd::uapi;
use rustix::io::Errno;

const NOWHERE: u64 = 0x7777_0000;

#[test]
fn wrong_input_in_order() {
    let program = Program::new();
    let id = program.alloc();
    let call = |ioas_id, reserved, num_iovas| {
        let arg = uapi::IoasIovaRanges { ioas_id, num_iovas, __reserved: reserved, allowed_iovas: NOWHERE, ..Default::default() };
        program.call(RANGES, arg)
    };
    assert_eq!(errno(call(id + 1, 1, 1)), Errno::OPNOTSUPP);
    assert_eq!(errno(call(id + 1, 0, 1)), Errno::NOENT);
    assert_eq!(errno(call(id, 0, 1)), Errno::FAULT, "an array that cannot be written");
    assert_eq!(errno(call(id, 0, 0)), Errno::MSGSIZE, "nothing of it is needed");
}

#[test]
fn what_is_not_reserved() {
    let program = Program::new();
    let id = program.alloc();
    assert_eq!(program.ranges(id), (vec![(0, u64::MAX)], 1));
    let va = program.memory(PAGE);
    program.map(id, FIXED | RW, va, PAGE, 0x10000).unwrap();
    program.allow(id, &[(0x2_0000, 0x2_ffff)]).unwrap();
    assert_eq!(program.ranges(id).0, [(0, u64::MAX)], "neither areas nor allowed ranges matter");
    let ioas = program.ioas(id);
    let reserve = |start, last| ioas.ioas().reserve(Span::of(Iova::new(start), Iova::new(last))).unwrap();
    let reserved: Vec<_> =
        [(0, 0xfff), (0x5000, 0x6fff), (0x6000, 0x7fff), (u64::MAX, u64::MAX)].map(|(start, last)| reserve(start, last)).into();
    assert_eq!(program.ranges(id).0, [(0x1000, 0x4fff), (0x8000, u64::MAX - 1)]);
    reserved.into_iter().for_each(|reserved| ioas.ioas().release(reserved));
    assert_eq!(program.ranges(id).0, [(0, u64::MAX)]);
}

#[test]
fn too_little_room_still_answers() {
    let program = Program::new();
    let id = program.alloc();
    let ioas = program.ioas(id);
    for index in 1..=3 {
        ioas.ioas().reserve(Span::from_len(Iova::new(index * 0x10000), 0x1000).unwrap()).unwrap();
    }
    for room in 0..6u32 {
        let allowed_iovas = program.local.put(&[0xeeu8; 16 * 6]);
        let mut arg = uapi::IoasIovaRanges { ioas_id: id, num_iovas: room, allowed_iovas, ..Default::default() };
        let answer = program.call_in(RANGES, &mut arg);
        assert_eq!(arg.num_iovas, 4, "the total, whatever the room");
        assert_eq!(arg.out_iova_alignment, 1);
        let shown: [[u64; 2]; 6] = program.local.get(allowed_iovas);
        let all = [[0, 0xffff], [0x11000, 0x1ffff], [0x21000, 0x2ffff], [0x31000, u64::MAX]];
        for (index, entry) in shown.iter().enumerate() {
            let filled = index < room as usize && index < 4;
            assert_eq!(*entry, if filled { all[index] } else { [0xeeee_eeee_eeee_eeee; 2] }, "entry {index} with room for {room}");
        }
        if room < 4 { assert_eq!(errno(answer), Errno::MSGSIZE) } else { assert_eq!(answer.unwrap(), 0) }
    }
    let arg = uapi::IoasIovaRanges { ioas_id: id, ..Default::default() };
    assert_eq!(errno(program.call_read_only(RANGES, arg)), Errno::FAULT);
}

#[test]
fn page_tables_bring_apertures_and_granules() {
    let program = Program::new();
    let id = program.alloc();
    let ioas = program.ioas(id);
    let mock = program.attach_mock(id);
    assert_eq!(program.ranges(id), (vec![(16 * MIB, (2 << 30) - 1)], 2048));
    let plain = program.attach(id);
    assert_eq!(program.ranges(id).1, 4096);
    ioas.ioas().detach(&mock).unwrap();
    assert_eq!(program.ranges(id).1, 4096);
    ioas.ioas().detach(&plain).unwrap();
    assert_eq!(program.ranges(id), (vec![(0, u64::MAX)], 1), "it shrinks again");
    program.option(uapi::OPTION_HUGE_PAGES, uapi::OPTION_SET, id, 0).unwrap();
    assert_eq!(program.ranges(id).1, 4096);
}
