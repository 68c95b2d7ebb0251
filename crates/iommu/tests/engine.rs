//! The engine as a guest sees it: documented registers, and no value that hurts.

mod common;

use addr::{Address, Iova};
use backing::Frames;
use common::{BASE, Machine};
use lockstep_iommu_device::engine::{ID, MAX_LEN, WINDOW_BYTES, cmd, reg, status};
use lockstep_iommu_device::{EngineDevice, FaultKind};

fn machine() -> (Machine, EngineDevice) {
    let machine = Machine::new(2 << 20, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x10_0000);
    let engine = EngineDevice::new(&machine.device).unwrap();
    (machine, engine)
}

fn command(engine: &mut EngineDevice, src: Iova, dst: Iova, len: u64, command: u64) -> u64 {
    for (register, value) in [(reg::SRC, src.get()), (reg::DST, dst.get()), (reg::LEN, len), (reg::CMD, command)] {
        engine.mmio_write(register, 8, value);
    }
    engine.mmio_read(reg::STATUS, 8)
}

#[test]
fn copies_and_fills() {
    let (machine, mut engine) = machine();
    assert_eq!(engine.mmio_read(reg::ID, 8), ID);
    machine.poke(0x100, b"from here to there");
    assert_eq!(command(&mut engine, BASE.plus(0x100), BASE.plus(0x2ff8), 18, cmd::COPY), status::IDLE);
    assert_eq!(machine.peek(0x2ff8, 18), b"from here to there");
    assert_eq!(engine.mmio_read(reg::DONE, 8), 18);
    engine.mmio_write(reg::VALUE, 8, 0x0807_0605_0403_0201);
    assert_eq!(command(&mut engine, Iova::new(0), BASE.plus(0x8003), 10_003, cmd::FILL), status::IDLE);
    let expected: Vec<u8> = (0..10_003).map(|at| (at % 8 + 1) as u8).collect();
    assert_eq!(machine.peek(0x8003, 10_003), expected);
    assert_eq!(command(&mut engine, BASE, BASE, 0, cmd::COPY), status::IDLE);
}

#[test]
fn a_fault_shows_in_the_registers() {
    let (_machine, mut engine) = machine();
    let end = BASE.plus(0x10_0000);
    assert_eq!(command(&mut engine, BASE, Iova::new(end.get() - 0x1800), 0x2000, cmd::COPY), status::FAULTED);
    let read = |engine: &mut EngineDevice| [reg::FAULT_IOVA, reg::FAULT_CODE, reg::DONE].map(|register| engine.mmio_read(register, 8));
    assert_eq!(read(&mut engine), [end.get(), FaultKind::NotMapped as u64, 0x1800]);
    assert_eq!(command(&mut engine, BASE, Iova::new(end.get() - 0x1800), 0x4000, cmd::FILL), status::FAULTED);
    assert_eq!(read(&mut engine), [end.get(), FaultKind::NotMapped as u64, 0x1800]);
    assert_eq!(command(&mut engine, BASE, BASE, MAX_LEN + 1, cmd::FILL), status::FAULTED);
    assert_eq!(read(&mut engine), [BASE.get(), FaultKind::BadLength as u64, 0]);
    assert_eq!(command(&mut engine, BASE, BASE, 8, 77), status::FAULTED);
    assert_eq!(read(&mut engine), [BASE.get(), FaultKind::BadCommand as u64, 0]);
    for engine_command in [cmd::COPY, cmd::FILL] {
        assert_eq!(command(&mut engine, BASE, Iova::new(u64::MAX - 7), 0x2000, engine_command), status::FAULTED);
    }
    assert_eq!(command(&mut engine, BASE, BASE.plus(0x1000), 8, cmd::COPY), status::IDLE);
    assert_eq!(read(&mut engine), [0, 0, 8]);
}

#[test]
fn halves_of_registers() {
    let (_machine, mut engine) = machine();
    engine.mmio_write(reg::SRC, 8, 0x1111_2222_3333_4444);
    engine.mmio_write(reg::SRC + 4, 4, 0xffff_ffff_5555_6666);
    assert_eq!(engine.mmio_read(reg::SRC, 8), 0x5555_6666_3333_4444);
    assert_eq!((engine.mmio_read(reg::SRC, 4), engine.mmio_read(reg::SRC + 4, 4)), (0x3333_4444, 0x5555_6666));
}

#[test]
fn nonsense_is_counted_and_has_no_effect() {
    let (machine, mut engine) = machine();
    machine.poke(0, &[7; 64]);
    let before = engine.mmio_read(reg::BAD, 8);
    let mut random = fastrand::Rng::with_seed(1);
    let nonsense =
        [(0, 1), (4, 8), (1, 4), (reg::BAD + 8, 8), (WINDOW_BYTES, 4), (u64::MAX, 8), (u64::MAX - 7, 8), (0, 0), (0, usize::MAX)];
    for (offset, len) in nonsense {
        assert_eq!(engine.mmio_read(offset, len), 0, "{offset:#x}, {len}");
        engine.mmio_write(offset, len, u64::MAX);
    }
    for register in [reg::STATUS, reg::FAULT_IOVA, reg::FAULT_CODE, reg::ID, reg::DONE, reg::BAD] {
        engine.mmio_write(register, 8, u64::MAX);
    }
    assert_eq!(engine.mmio_read(reg::BAD, 8) - before, 2 * nonsense.len() as u64 + 6);
    assert_eq!(machine.peek(0, 64), [7; 64]);
    // Whatever a guest writes where: no panic, and an answer.
    for _ in 0..20_000 {
        let offset = if random.bool() { random.u64(0..12) * 8 } else { random.u64(..) };
        let (len, value) = (*random.choice(&[1usize, 2, 4, 8, 16]).unwrap(), random.u64(..) >> random.u8(0..64));
        engine.mmio_write(offset, len, value);
        engine.mmio_read(offset, len);
    }
}
