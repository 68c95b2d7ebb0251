//! What a device gets: translation over any mix of leaves, faults that name their table, and nothing after an unmap.

mod common;

use addr::{Address, Iova, Lg2, SizeSet, Span};
use backing::{Backing, Frames, Kind};
use common::{BASE, Machine, map_in, span};
use lockstep_iommu_device::{Access, CHUNK_BYTES, Dma, Error, FaultKind, RefusedBy, SliceError};
use pt::{Gather, Perm};

const MIB: u64 = 1 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn translates_over_leaves_of_all_sizes() {
    let machine = Machine::new(8 * MIB, Frames::Contiguous);
    // 2 MiB, then 4 KiB leaves, then a contiguous group, with output addresses in another order.
    machine.map(BASE, 4 * MIB, 2 * MIB, Perm::RW, SizeSet::ALL);
    machine.map_small(BASE.plus(2 * MIB), MIB, 256 << 10);
    machine.map(BASE.plus(2 * MIB + (256 << 10)), 0, 512 << 10, Perm::RW, SizeSet::ALL);
    let mut dma = machine.dma();
    let bytes = pattern(900 << 10);
    let at = BASE.plus(2 * MIB - (200 << 10) + 5);
    dma.write(at, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    dma.read(at, &mut back).unwrap();
    assert_eq!(back, bytes);
    // The same bytes seen past the IOMMU: first 200 KiB less 5 at the end of the 2 MiB leaf, and so on.
    let first = (200 << 10) - 5;
    assert_eq!(machine.peek(6 * MIB - first as u64, first), bytes[..first]);
    assert_eq!(machine.peek(MIB, 256 << 10), bytes[first..first + (256 << 10)]);
    assert_eq!(machine.peek(0, 444 << 10), bytes[first + (256 << 10)..][..444 << 10]);
    let seen = dma.translate(BASE.plus(0x12_3456), Access::Write).unwrap();
    assert_eq!((seen.oa, seen.leaf, seen.perm), (machine.oa(4 * MIB + 0x12_3456), span(BASE, 2 * MIB), Perm::RW));
}

#[test]
fn scattered_frames_come_out_in_order() {
    let machine = Machine::new(MIB, Frames::Scattered { seed: 5 });
    for (pages, oa) in machine.memory.extents(machine.memory.pages()) {
        let iova = pages.unindex::<Iova>(12);
        map_in(&machine.domain, iova.start(), oa, iova.len(), Perm::RW, SizeSet::ALL);
    }
    let bytes = pattern(MIB as usize - 100);
    let mut dma = machine.dma();
    dma.write(Iova::new(50), &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    let file = machine.memory.file().unwrap().try_clone_to_owned().unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(file), &mut back, 50).unwrap();
    assert_eq!(back, bytes);
}

#[test]
fn faults_name_their_table_and_the_progress() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x3000);
    machine.map(BASE.plus(0x3000), 0x3000, 0x1000, Perm::READ, SizeSet::ALL);
    let mut dma = machine.dma();

    let fault = dma.read(Iova::new(0x10), &mut [0; 4]).unwrap_err();
    assert_eq!((fault.table, fault.reason, fault.oa, fault.done), (RefusedBy::IoPageTable, FaultKind::NotMapped, None, 0));
    let fault = dma.read(BASE.plus(0xf00), &mut [0; 0x4000]).unwrap_err();
    assert_eq!((fault.reason, fault.iova, fault.done), (FaultKind::NotMapped, BASE.plus(0x4000), 0x3100));
    let fault = dma.write(BASE.plus(0x2ff0), &[9; 32]).unwrap_err();
    assert_eq!((fault.reason, fault.iova, fault.done, fault.access), (FaultKind::NoPermission, BASE.plus(0x3000), 16, Access::Write));
    assert_eq!(fault.oa, Some(machine.oa(0x3000)));
    assert_eq!(machine.peek(0x2ff0, 32), [[9; 16], [0; 16]].concat());
    let fault = dma.read(Iova::new(u64::MAX - 3), &mut [0; 8]).unwrap_err();
    assert_eq!((fault.table, fault.reason), (RefusedBy::Device, FaultKind::Wraps));
    dma.read(Iova::new(u64::MAX - 3), &mut []).unwrap();

    let log = machine.iommu.faults();
    assert_eq!(log.counters().of(FaultKind::NotMapped), 2);
    assert_eq!(machine.device.faults().total(), 4);
    assert_eq!(dma.stats().faults, 4);
    assert_eq!(log.drain().last().map(|fault| fault.reason), Some(FaultKind::Wraps));
}

#[test]
fn no_host_memory_is_the_backings_fault() {
    let machine = Machine::over(Backing::simulated(4 * MIB, Frames::Contiguous).unwrap());
    assert_eq!(machine.memory.kind(), Kind::Simulated);
    machine.map_small(BASE, 0, 0x1000);
    let fault = machine.dma().read(BASE, &mut [0; 4]).unwrap_err();
    assert_eq!((fault.table, fault.reason, fault.oa), (RefusedBy::Backing, FaultKind::NoHostMemory, Some(machine.oa(0))));
}

#[test]
fn a_truncated_file_is_a_fault_and_no_signal() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map(BASE, 0, 2 * MIB, Perm::RW, SizeSet::ALL);
    let mut dma = machine.dma();
    dma.write(BASE, &pattern(0x8000)).unwrap();
    let file = std::fs::File::from(machine.memory.file().unwrap().try_clone_to_owned().unwrap());
    file.set_len(0x4000).unwrap();
    for _ in 0..2 {
        let fault = dma.read(BASE.plus(0x3000), &mut [0; 0x3000]).unwrap_err();
        assert_eq!((fault.table, fault.reason, fault.access), (RefusedBy::Backing, FaultKind::HostMemoryGone, Access::Read));
        assert_eq!(fault.done, 0x1000, "the copy reached the end of the file");
    }
    let fault = dma.copy(BASE, BASE.plus(0x10_0000), 64).unwrap_err();
    assert_eq!((fault.access, fault.iova), (Access::Write, BASE.plus(0x10_0000)));
    let fault = dma.copy(BASE.plus(0x3fc0), BASE, 128).unwrap_err();
    assert_eq!((fault.access, fault.iova, fault.done), (Access::Read, BASE.plus(0x4000), 64));
    let slice = dma.slice(BASE.plus(0x3ff8), 16, Access::Write).unwrap();
    assert_eq!(slice.load_u64(8), Err(SliceError::Gone { done: 0 }));
    assert!(matches!(slice.write(0, &[1; 16]), Err(SliceError::Gone { done: ..=8 })));
}

#[test]
fn copies_between_iovas() {
    let machine = Machine::new(4 * MIB, Frames::Contiguous);
    machine.map(BASE, 0, 2 * MIB, Perm::RW, SizeSet::ALL);
    machine.map_small(BASE.plus(16 * MIB), 2 * MIB, 2 * MIB);
    let bytes = pattern(300 << 10);
    machine.poke(0x1003, &bytes);
    let mut dma = machine.dma();
    dma.copy(BASE.plus(0x1003), BASE.plus(16 * MIB + 0x777), bytes.len() as u64).unwrap();
    assert_eq!(machine.peek(2 * MIB + 0x777, bytes.len()), bytes);
    let fault = dma.copy(BASE.plus(2 * MIB - 8), BASE.plus(16 * MIB), 16).unwrap_err();
    assert_eq!((fault.access, fault.iova, fault.done), (Access::Read, BASE.plus(2 * MIB), 8));
}

/// A writer waits for one chunk and no more: an unmap gets in between the chunks of a long call, never inside one.
#[test]
fn a_long_copy_leaves_its_guard_every_64_kib() {
    const LEN: u64 = 16 * MIB;
    let machine = Machine::new(LEN, Frames::Contiguous);
    let bytes = vec![2; LEN as usize];
    let interrupted = (0..100).any(|_| {
        machine.map_small(BASE, 0, LEN);
        let mut dma = machine.dma();
        // With everything cached, nothing is refused before the unmap is in the log, which is read when a guard is entered.
        dma.write(BASE, &bytes).unwrap();
        let done = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                loop {
                    if let Err(fault) = dma.write(BASE, &bytes) {
                        return fault;
                    }
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(3));
            machine.unmap(span(BASE, LEN));
            let fault = writer.join().unwrap();
            assert_eq!(fault.reason, FaultKind::NotMapped);
            fault.done
        });
        assert_eq!(done % CHUNK_BYTES, 0);
        done > 0
    });
    assert!(interrupted, "every unmap waited for a whole call");
}

#[test]
fn an_invalidation_takes_what_it_names() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 64 << 12);
    let mut dma = machine.dma();
    let touch = |dma: &mut Dma| (0..64).map(|page| dma.translate(BASE.plus(page << 12), Access::Read).is_ok()).collect::<Vec<_>>();
    touch(&mut dma);
    machine.unmap(span(BASE.plus(0x5000), 0x3000));
    let misses = dma.stats().iotlb.misses;
    let seen = touch(&mut dma);
    assert!(seen.iter().enumerate().all(|(page, ok)| *ok != (5..8).contains(&page)));
    assert_eq!(dma.stats().iotlb.misses - misses, 3, "neighbours stayed cached");
    // More than the log keeps: the context forgets everything and finds its way.
    machine.unmap(span(BASE.plus(0x8000), 0x1000));
    for _ in 0..2_000 {
        machine.map_small(BASE.plus(0x9_0000), 0x10_0000, 0x1000);
        machine.unmap(span(BASE.plus(0x9_0000), 0x1000));
    }
    let seen = touch(&mut dma);
    assert!(seen.iter().enumerate().all(|(page, ok)| *ok != (5..9).contains(&page)));
}

#[test]
fn detached_is_refused_and_reattached_forgets() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    machine.poke(0, b"one");
    machine.poke(0x1000, b"two");
    let mut dma = machine.dma();
    let mut bytes = [0; 3];
    dma.read(BASE, &mut bytes).unwrap();
    machine.device.detach().unwrap();
    let fault = dma.read(BASE, &mut bytes).unwrap_err();
    assert_eq!((fault.reason, fault.domain), (FaultKind::NotAttached, None));
    let other = machine.iommu.domain().unwrap();
    map_in(&other, BASE, machine.oa(0x1000), 0x1000, Perm::RW, SizeSet::ALL);
    machine.device.attach(&other).unwrap();
    dma.read(BASE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"two");
    machine.device.attach(&machine.domain).unwrap();
    dma.read(BASE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"one");
    let foreign = Machine::new(2 * MIB, Frames::Contiguous);
    assert!(matches!(machine.device.attach(&foreign.domain), Err(Error::ForeignDomain { .. })));
}

#[test]
fn a_detach_waits_for_what_is_in_flight() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    let mut dma = machine.dma();
    let slice = dma.slice(BASE, 8, Access::Write).unwrap();
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| machine.device.detach().unwrap());
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!detaching.is_finished());
        slice.store_u64(0, 5).unwrap();
        drop(slice);
        detaching.join().unwrap();
    });
    assert_eq!(machine.peek(0, 1), [5]);
}

#[test]
fn slices_read_write_and_refuse() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    // Three pages, the last of which lies elsewhere: two pieces.
    machine.map_small(BASE, 0, 0x2000);
    machine.map_small(BASE.plus(0x2000), 0x8000, 0x1000);
    let mut dma = machine.dma();
    let slice = dma.slice(BASE.plus(0xff8), 0x1ff8, Access::Write).unwrap();
    assert_eq!(slice.len(), 0x1ff8);
    let bytes = pattern(0x1ff8);
    slice.write(0, &bytes).unwrap();
    let mut back = vec![0; 0x1000];
    slice.read(0xff0, &mut back).unwrap();
    assert_eq!(back, bytes[0xff0..0x1ff0]);
    slice.store_u64(0x1008, 0x1122_3344).unwrap();
    assert_eq!((slice.load_u64(0x1008), slice.load_u64(0x1009)), (Ok(0x1122_3344), Err(SliceError::Misaligned { at: 0x1009 })));
    assert_eq!(slice.load_u64(0x1ff4), Err(SliceError::Outside { at: 0x1ff4, len: 8, slice_len: 0x1ff8 }));
    assert!(slice.read(u64::MAX, &mut [0]).is_err());
    drop(slice);
    // Offset 0x1008 is the first byte of the last page.
    assert_eq!(machine.peek(0x8000, 4), 0x1122_3344u32.to_le_bytes());
    let reading = dma.slice(BASE, 8, Access::Read).unwrap();
    assert_eq!(reading.write(0, &[1]), Err(SliceError::ReadOnly));
    assert_eq!(reading.store_u64(0, 1), Err(SliceError::ReadOnly));
    drop(reading);
    assert_eq!(dma.slice(BASE.plus(0x2000), 0x2000, Access::Read).unwrap_err().iova, BASE.plus(0x3000));
    assert_eq!(dma.slice(BASE, 0, Access::Read).unwrap_err().reason, FaultKind::Wraps);
    // Neither a refused nor a dropped slice keeps its guard.
    machine.unmap(span(BASE, 0x3000));
}

#[test]
fn what_the_same_thread_holds_is_an_error() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    let mut dma = machine.dma();
    assert!(!machine.domain.held_by_caller());
    let slice = dma.slice(BASE, 8, Access::Read).unwrap();
    assert!(machine.domain.held_by_caller());
    assert!(matches!(machine.device.detach(), Err(Error::HeldByCaller { .. })));
    std::thread::scope(|scope| assert!(!scope.spawn(|| machine.domain.held_by_caller()).join().unwrap()));
    drop(slice);
    machine.device.detach().unwrap();
}

#[test]
fn a_slice_held_too_long_is_reported() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x1000);
    machine.iommu.readers().on_stall(std::time::Duration::from_millis(5), |_| ());
    let mut dma = machine.dma();
    let slice = dma.slice(BASE, 8, Access::Read).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| machine.unmap(span(BASE, 0x1000)));
        while machine.iommu.readers().stalls() == 0 {
            std::thread::yield_now();
        }
        drop(slice);
    });
    assert_eq!(&*machine.iommu.readers().latest_stall().unwrap().slot, "nic");
}

#[test]
fn a_write_marks_its_leaf_once_per_cached_entry() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    machine.map_small(BASE, 0, 0x4000);
    let mut dma = machine.dma();
    let dirty = |clear: bool| {
        let (mut gather, mut spans) = (Gather::new(), Vec::new());
        machine.domain.table().read_dirty(span(BASE, 0x4000), clear, &mut gather, |span| spans.push(span));
        machine.domain.flush(gather);
        spans
    };
    let page = |index: u64| Span::block(BASE.plus(index << 12), 12);
    dma.write(BASE, &[1; 16]).unwrap();
    assert!(dirty(false).is_empty(), "nobody asked yet");
    machine.domain.track_dirty(true);
    dma.write(BASE.plus(0xff8), &[1; 16]).unwrap();
    dma.read(BASE.plus(0x2000), &mut [0; 16]).unwrap();
    assert_eq!(dirty(true), [page(0), page(1)]);
    assert!(dirty(false).is_empty());
    dma.write(BASE.plus(0x2000), &[1]).unwrap();
    dma.write(BASE, &[1]).unwrap();
    dma.write(BASE, &[1]).unwrap();
    assert_eq!(dirty(true), [page(0), page(2)]);
    // Between the clearing and its flush the cached entry still says that the bit is set: it is not set twice.
    dma.write(BASE, &[1]).unwrap();
    let mut gather = Gather::new();
    machine.domain.table().read_dirty(span(BASE, 0x4000), true, &mut gather, |_| ());
    dma.write(BASE, &[1]).unwrap();
    assert!(dirty(false).is_empty());
    machine.domain.flush(gather);
    dma.write(BASE, &[1]).unwrap();
    assert_eq!(dirty(true), [page(0)]);
    machine.domain.track_dirty(false);
    dma.write(BASE.plus(0x3000), &[1]).unwrap();
    assert!(dirty(false).is_empty());
}

#[test]
fn injected_failures_change_nothing() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    let other = machine.iommu.domain().unwrap();
    for step in 1..=2 {
        let plan = sync::fail::nth(step);
        assert!(matches!(machine.device.attach(&other), Err(Error::Injected(_))), "step {step}");
        drop(plan);
        assert_eq!(machine.device.domain().map(|domain| domain.id()), Some(machine.domain.id()));
    }
    let _plan = sync::fail::nth(1);
    assert!(matches!(Dma::new(&machine.device), Err(Error::Injected(_))));
}

#[test]
fn the_last_page_of_the_address_space() {
    let machine = Machine::new(2 * MIB, Frames::Contiguous);
    let last = Iova::new(u64::MAX - 0xfff);
    machine.map(last, 0, 0x1000, Perm::RW, SizeSet::only(Lg2::K4));
    let mut dma = machine.dma();
    dma.write(Iova::new(u64::MAX - 3), b"last").unwrap();
    assert_eq!(machine.peek(0xffc, 4), b"last");
    machine.unmap(Span::of(last, Iova::new(u64::MAX)));
    assert!(dma.read(last, &mut [0]).is_err());
}
