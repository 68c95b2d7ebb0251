//! Mock devices and what is behind them: page tables to choose from, caches that can be looked into, PASIDs, virtual IOMMUs.
#![cfg(feature = "test-ops")]

mod client;

use client::{APERTURE, Client, Mock, PAGE, errno};
use lockstep_iommufd::uapi::test::{self, DEVICE_NO_DIRTY, DEVICE_PASID, HwptData, INVALIDATE_ALL};
use lockstep_iommufd::uapi::{self, HWPT_DIRTY_TRACKING, HWPT_NEST_PARENT, HWPT_PASID};
use lockstep_iommufd::{Answer, Mmap};
use rustix::io::Errno;

const KIND: fn(u32) -> Option<HwptData> = |pagetable_type| Some(HwptData { iotlb: 0, pagetable_type });

fn ranges(client: &Client, ioas_id: u32) -> Vec<(u64, u64)> {
    let allowed_iovas = client.local.put(&[0u8; 256]);
    let arg = uapi::IoasIovaRanges { ioas_id, num_iovas: 16, allowed_iovas, ..uapi::IoasIovaRanges::default() };
    let count = client.call(0x84, arg).unwrap().num_iovas as u64;
    (0..count).map(|index| client.local.get::<uapi::IovaRange>(allowed_iovas + index * 16)).map(|range| (range.start, range.last)).collect()
}

#[test]
fn ids_come_in_order_and_nothing_stays_of_a_failure() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    assert_eq!([mock.own, mock.device, mock.hwpt], [ioas + 1, ioas + 2, ioas + 3]);
    let second = client.mock(ioas).unwrap();
    assert_eq!(second.hwpt, mock.hwpt, "an IOAS has one automatic page table");
    assert_eq!(errno(client.destroy(mock.device)), Errno::BUSY);
    assert_eq!(errno(client.destroy(mock.hwpt)), Errno::BUSY);
    assert_eq!(errno(client.destroy(ioas)), Errno::BUSY);
    client.destroy(mock.own).unwrap();
    assert_eq!(errno(client.destroy(mock.device)), Errno::NOENT);
    client.destroy(second.own).unwrap();
    assert_eq!(errno(client.destroy(mock.hwpt)), Errno::NOENT, "it goes with the last device");
    for (refused, why) in [(client.mock(99), Errno::NOENT), (client.mock_with(12, ioas, 2), Errno::INVAL)] {
        assert_eq!(errno(refused), why);
        assert_eq!(client.mock(ioas).map(|mock| mock.own).unwrap(), ioas + 1, "every id was given back");
        client.destroy(ioas + 1).unwrap();
    }
    client.destroy(ioas).unwrap();
}

#[test]
fn page_tables_to_choose_from() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    assert_eq!(ranges(&client, ioas), [(APERTURE, (2 << 30) - 1)]);
    let other = client.ioas();
    let huge = client.hwpt_alloc(mock.device, other, 0, KIND(1)).unwrap();
    assert_eq!(ranges(&client, other), [(0, 0x3f_ffff_ffff)]);
    let va = client.memory(513);
    client.map(other, va, 513 * PAGE, 2 << 20).unwrap();
    let size = |iova| client.context.hwpt(huge).unwrap().domain().unwrap().table().walk(addr::Iova::new(iova)).unwrap().size.bytes();
    assert_eq!([size(2 << 20), size(4 << 20)], [1 << 20, PAGE]);
    let plain = client.ioas();
    client.hwpt_alloc(mock.device, plain, 0, KIND(2)).unwrap();
    assert_eq!(ranges(&client, plain), [(0, u64::MAX)]);
    assert_eq!(errno(client.hwpt_alloc(mock.device, plain, 0, KIND(3))), Errno::OPNOTSUPP);
    assert_eq!(errno(client.hwpt_alloc(mock.device, plain, 16, None)), Errno::OPNOTSUPP);
    let wrong = uapi::HwptAlloc { dev_id: mock.device, pt_id: plain, data_type: 1, data_len: 8, ..uapi::HwptAlloc::default() };
    assert_eq!(errno(client.call(0x89, wrong)), Errno::OPNOTSUPP);
}

/// The granule is half a page, so a mapping can begin in the middle of one.
#[test]
fn translations_are_compared_granule_by_granule() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(4));
    let mock = client.mock(ioas).unwrap();
    let half = PAGE / 2;
    client.map(ioas, va + half, 2 * PAGE, APERTURE + half).unwrap();
    client.check_map(mock.hwpt, APERTURE + half, 2 * PAGE, va + half).unwrap();
    client.check_refs(va, 3 * PAGE, 1).unwrap();
    client.check_refs(va + 3 * PAGE, PAGE, 0).unwrap();
    // The place in the page may be another one.
    client.map(ioas, va + half, PAGE, 2 * APERTURE).unwrap();
    client.check_map(mock.hwpt, 2 * APERTURE, PAGE, va + half).unwrap();
    assert_eq!(errno(client.check_map(mock.hwpt, 2 * APERTURE, PAGE, va)), Errno::INVAL);
    client.unmap(ioas, 2 * APERTURE, PAGE).unwrap();
    for (iova, length, uptr) in [
        (APERTURE + half, PAGE, va),
        (APERTURE + half, PAGE, va + half + PAGE),
        (APERTURE, PAGE, va),
        (APERTURE + PAGE, 2 * PAGE, va + PAGE),
        (APERTURE + 1, PAGE, va),
        (APERTURE + half, 1, va + half),
        (APERTURE + half, PAGE, va + 1),
    ] {
        assert_eq!(errno(client.check_map(mock.hwpt, iova, length, uptr)), Errno::INVAL, "{iova:#x} {length:#x} {uptr:#x}");
    }
    assert_eq!(errno(client.check_map(mock.hwpt, APERTURE + half, PAGE, 0x1000)), Errno::FAULT);
    assert_eq!(errno(client.check_map(ioas, APERTURE + half, PAGE, va)), Errno::NOENT);
    assert_eq!(errno(client.check_refs(va + 1, PAGE, 0)), Errno::INVAL);
    assert_eq!(errno(client.check_refs(va, 1, 0)), Errno::INVAL);
    assert_eq!(errno(client.check_refs(u64::MAX - PAGE + 1, PAGE, 0)), Errno::INVAL);
    assert_eq!(errno(client.check_refs(0x1000, PAGE, 0)), Errno::FAULT);
    client.destroy(mock.own).unwrap();
    client.check_refs(va, 4 * PAGE, 0).unwrap();
}

#[test]
fn dirty_marks_what_the_bits_say() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(64));
    client.map(ioas, va, 64 * PAGE, APERTURE).unwrap();
    let mock = client.mock(ioas).unwrap();
    let hwpt = client.hwpt_alloc(mock.device, ioas, HWPT_DIRTY_TRACKING, None).unwrap();
    let bits = [0b1000_0001u8, 0, 0, 1];
    let args = test::Dirty { iova: APERTURE, length: 32 * PAGE, page_size: PAGE, uptr: client.local.put(&bits), ..test::Dirty::default() };
    assert_eq!(errno(client.op(13, hwpt, args)), Errno::INVAL, "tracking is off");
    assert_eq!(errno(client.op(13, mock.hwpt, args)), Errno::INVAL, "tracking is impossible");
    let set = uapi::HwptSetDirtyTracking { flags: 1, hwpt_id: hwpt, ..uapi::HwptSetDirtyTracking::default() };
    client.call(0x8b, set).unwrap();
    assert_eq!(client.op(13, hwpt, args).unwrap().out_nr_dirty, 3);
    let gap = test::Dirty { iova: 8 * APERTURE, ..args };
    assert_eq!(client.op(13, hwpt, gap).unwrap().out_nr_dirty, 3, "bits count, not hits");
    for bad in [
        test::Dirty { page_size: 0, ..args },
        test::Dirty { length: 0, ..args },
        test::Dirty { uptr: 0, ..args },
        test::Dirty { iova: APERTURE + 1, ..args },
        test::Dirty { length: PAGE + 1, ..args },
    ] {
        assert_eq!(errno(client.op(13, hwpt, bad)), Errno::INVAL);
    }
    assert_eq!(errno(client.op(13, hwpt, test::Dirty { uptr: 0x10_0000, ..args })), Errno::FAULT);
}

#[test]
fn a_device_without_dirty_bits_stays_away_from_tracking() {
    let client = Client::new();
    let ioas = client.ioas();
    let (able, unable) = (client.mock(ioas).unwrap(), client.mock_with(12, ioas, DEVICE_NO_DIRTY).unwrap());
    let tracking = client.hwpt_alloc(able.device, ioas, HWPT_DIRTY_TRACKING, None).unwrap();
    assert_eq!(errno(client.hwpt_alloc(unable.device, ioas, HWPT_DIRTY_TRACKING, None)), Errno::OPNOTSUPP);
    assert_eq!(errno(client.mock_with(12, tracking, DEVICE_NO_DIRTY)), Errno::INVAL);
    assert_eq!(errno(client.op(10, unable.own, test::MockDomainReplace { pt_id: tracking })), Errno::INVAL);
    assert_eq!(client.op(10, able.own, test::MockDomainReplace { pt_id: tracking }).unwrap().pt_id, tracking);
}

#[test]
fn hw_info_is_cut_and_padded() {
    let client = Client::new();
    let ioas = client.ioas();
    let (mock, pasid) = (client.mock(ioas).unwrap(), client.mock_with(12, ioas, DEVICE_PASID).unwrap());
    let data_uptr = client.local.put(&[0xffu8; 16]);
    let ask = |dev_id, data_len| client.call(0x8a, uapi::HwInfo { dev_id, data_len, data_uptr, ..uapi::HwInfo::default() });
    let info = ask(mock.device, 4).unwrap();
    assert_eq!((info.data_len, info.out_data_type, info.out_max_pasid_log2), (8, test::HW_INFO, 0));
    assert_eq!(client.local.get::<[u32; 2]>(data_uptr), [0, u32::MAX]);
    let info = ask(pasid.device, 12).unwrap();
    assert_eq!((info.data_len, info.out_max_pasid_log2), (8, 20));
    assert_eq!(client.local.get::<[u32; 4]>(data_uptr), [0, test::HW_INFO_WORD, 0, u32::MAX]);
}

/// A nested page table whose four slots begin with `iotlb`.
fn nested(client: &Client, mock: Mock, parent: u32, iotlb: u32) -> Answer<u32> {
    client.hwpt_alloc(mock.device, parent, 0, Some(HwptData { iotlb, pagetable_type: 0 }))
}

fn slot(client: &Client, hwpt: u32, slot: u32, iotlb: u32) -> Answer {
    client.op(14, hwpt, test::CheckIotlb { slot, iotlb }).map(|_| ())
}

/// Answers the errno, if any, and how many entries were done. `entries` are words.
fn invalidate(client: &Client, hwpt_id: u32, entry_len: u32, entries: &[u32]) -> (Option<Errno>, u32) {
    let entry_num = entries.len() as u32 * 4 / entry_len;
    let data_uptr = client.local.put(entries);
    let size = size_of::<uapi::HwptInvalidate>() as u32;
    let mut arg =
        uapi::HwptInvalidate { size, hwpt_id, data_uptr, data_type: test::NESTED_INVALIDATE, entry_len, entry_num, __reserved: 0 };
    let answer = client.local.ioctl(&*client.context, uapi::io(0x8d), &mut arg);
    (answer.err().map(|refusal| refusal.errno), arg.entry_num)
}

#[test]
fn nested_tables_have_four_slots() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    let parent = client.hwpt_alloc(mock.device, ioas, HWPT_NEST_PARENT, None).unwrap();
    let table = nested(&client, mock, parent, 77).unwrap();
    (0..4).for_each(|index| slot(&client, table, index, 77).unwrap());
    assert_eq!(errno(slot(&client, table, 4, 77)), Errno::INVAL);
    assert_eq!(errno(slot(&client, table, 0, 78)), Errno::INVAL);
    assert_eq!(errno(slot(&client, parent, 0, 77)), Errno::NOENT);
    assert_eq!(invalidate(&client, table, 8, &[0, 1, 0, 2, 0, 4, 0, 3]), (Some(Errno::INVAL), 2), "those before a bad entry are done");
    for (index, value) in [(0, 77), (1, 0), (2, 0), (3, 77)] {
        slot(&client, table, index, value).unwrap();
    }
    assert_eq!(invalidate(&client, table, 8, &[2, 0]), (Some(Errno::OPNOTSUPP), 0));
    assert_eq!(invalidate(&client, table, 12, &[0, 0, 0]), (Some(Errno::INVAL), 0), "every other length is refused");
    assert_eq!(invalidate(&client, table, 8, &[INVALIDATE_ALL, 0]), (None, 1));
    (0..4).for_each(|index| slot(&client, table, index, 0).unwrap());
    assert_eq!(errno(nested(&client, mock, table, 0)), Errno::INVAL, "nothing is nested on a nested table");
    assert_eq!(errno(client.hwpt_alloc(mock.device, parent, 0, None)), Errno::OPNOTSUPP, "its data is mandatory");
}

fn viommu(client: &Client, mock: Mock, parent: u32) -> (u32, test::ViommuData) {
    let data = client.local.put(&test::ViommuData { in_data: 0x1234, ..test::ViommuData::default() });
    let arg = uapi::ViommuAlloc {
        r#type: test::VIOMMU,
        dev_id: mock.device,
        hwpt_id: parent,
        data_len: 24,
        data_uptr: data,
        ..uapi::ViommuAlloc::default()
    };
    let id = client.call(0x90, arg).unwrap().out_viommu_id;
    (id, client.local.get(data))
}

#[test]
fn a_virtual_iommu_shares_two_pages() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    let parent = client.hwpt_alloc(mock.device, ioas, HWPT_NEST_PARENT, None).unwrap();
    let (id, data) = viommu(&client, mock, parent);
    assert_eq!((data.out_data, data.out_mmap_length), (0x1234, 2 * PAGE));
    let at = client.local.mmap(&*client.context, &Mmap { len: 2 * PAGE, prot: 3, flags: 1, offset: data.out_mmap_offset }).unwrap();
    assert_eq!(client.local.get::<u32>(at), 0x1234);
    assert_eq!(errno(client.destroy(id)), Errno::BUSY);
    client.local.munmap(at).unwrap();
    client.destroy(id).unwrap();
    let gone = Mmap { len: 2 * PAGE, prot: 3, flags: 1, offset: data.out_mmap_offset };
    assert_eq!(errno(client.local.mmap(&*client.context, &gone)), Errno::NXIO);
}

#[test]
fn devices_behind_a_virtual_iommu() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock(ioas).unwrap();
    let parent = client.hwpt_alloc(mock.device, ioas, HWPT_NEST_PARENT, None).unwrap();
    let (id, _) = viommu(&client, mock, parent);
    let cache = |index, value| client.op(16, mock.device, test::CheckCache { slot: index, cache: value }).map(|_| ());
    (0..4).for_each(|index| cache(index, test::CACHE_START).unwrap());
    assert_eq!(errno(cache(4, test::CACHE_START)), Errno::INVAL);
    let table = nested(&client, mock, id, 5).unwrap();
    let onto = || client.op(10, mock.own, test::MockDomainReplace { pt_id: table });
    assert_eq!(errno(onto()), Errno::NOENT, "it has no number yet");
    assert_eq!(errno(client.op(17, 0, test::TriggerVevent { dev_id: mock.device })), Errno::NOENT);
    let vdevice = uapi::VdeviceAlloc { viommu_id: id, dev_id: mock.device, virt_id: 0x99, ..uapi::VdeviceAlloc::default() };
    client.call(0x91, vdevice).unwrap();
    assert_eq!(onto().unwrap().pt_id, table);
    assert_eq!(errno(client.op(17, 0, test::TriggerVevent { dev_id: mock.device })), Errno::OPNOTSUPP, "no queue");
    let queue = uapi::VeventqAlloc { viommu_id: id, r#type: test::VEVENTQ, veventq_depth: 2, ..uapi::VeventqAlloc::default() };
    let queue = client.call(0x93, queue).unwrap();
    client.op(17, 0, test::TriggerVevent { dev_id: mock.device }).unwrap();
    let file = client.local.opened(queue.out_veventq_fd.cast_signed()).unwrap();
    assert_eq!(file.read(&client.local, 64, None).unwrap(), [[0u8; 4], [0; 4], [0x99, 0, 0, 0]].concat());
    // Flags, number, slot; all are read before the first is done.
    assert_eq!(invalidate(&client, id, 12, &[0, 0x99, 1, 0, 0x98, 2]), (Some(Errno::INVAL), 1), "no such number");
    cache(1, 0).unwrap();
    assert_eq!(invalidate(&client, id, 12, &[INVALIDATE_ALL, 0x99, 0]), (None, 1));
    (0..4).for_each(|index| cache(index, 0).unwrap());
}

#[test]
fn pasids_attach_one_by_one() {
    let client = Client::new();
    let ioas = client.ioas();
    let mock = client.mock_with(12, ioas, DEVICE_PASID).unwrap();
    let other = client.mock(ioas).unwrap();
    let tables: Vec<u32> = (0..2).map(|_| client.hwpt_alloc(mock.device, ioas, HWPT_PASID, None).unwrap()).collect();
    let attach = |op, own, pasid, pt_id| client.op(op, own, test::PasidAttach { pasid, pt_id }).map(|args| args.pt_id);
    let check = |pasid, hwpt_id| client.op(21, mock.own, test::PasidCheck { pasid, hwpt_id }).map(|_| ());
    assert_eq!(errno(attach(18, mock.own, 7, tables[0])), Errno::INVAL, "the device's own page table is not made for PASIDs");
    client.op(10, mock.own, test::MockDomainReplace { pt_id: tables[0] }).unwrap();
    assert_eq!(attach(18, mock.own, 7, tables[1]).unwrap(), tables[1]);
    assert_eq!(errno(attach(18, mock.own, 7, tables[1])), Errno::BUSY);
    assert_eq!(errno(attach(18, mock.own, 1 << 20, tables[1])), Errno::INVAL);
    assert_eq!(errno(attach(18, other.own, 7, tables[1])), Errno::INVAL, "a device without PASIDs");
    assert_eq!(errno(attach(19, mock.own, 8, tables[1])), Errno::INVAL);
    check(7, tables[1]).unwrap();
    check(8, 0).unwrap();
    assert_eq!(errno(check(7, 0)), Errno::INVAL);
    assert_eq!(errno(check(7, tables[0])), Errno::INVAL);
    assert_eq!(errno(check(7, 4711)), Errno::NOENT);
    assert_eq!(attach(19, mock.own, 7, tables[0]).unwrap(), tables[0]);
    check(7, tables[0]).unwrap();
    for _ in 0..2 {
        client.op(20, mock.own, test::PasidDetach { pasid: 7 }).unwrap();
        check(7, 0).unwrap();
    }
    // Every second time this one fails, and what was before stays.
    assert_eq!(attach(18, mock.own, 1024, tables[0]).unwrap(), tables[0]);
    assert_eq!(errno(attach(19, mock.own, 1024, tables[1])), Errno::NOMEM);
    check(1024, tables[0]).unwrap();
    assert_eq!(attach(19, mock.own, 1024, tables[1]).unwrap(), tables[1]);
    client.op(20, mock.own, test::PasidDetach { pasid: 1024 }).unwrap();
    assert_eq!(attach(18, mock.own, 1024, tables[0]).unwrap(), tables[0], "detaching forgets it");
    // Nothing is left over when the device goes.
    client.destroy(mock.own).unwrap();
    tables.iter().for_each(|table| client.destroy(*table).unwrap());
}

#[test]
fn hardware_queues_stand_on_each_other() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(2));
    let mock = client.mock(ioas).unwrap();
    client.map(ioas, va, 2 * PAGE, APERTURE).unwrap();
    let parent = client.hwpt_alloc(mock.device, ioas, HWPT_NEST_PARENT, None).unwrap();
    let (id, _) = viommu(&client, mock, parent);
    let queue = |index| {
        let arg = uapi::HwQueueAlloc {
            viommu_id: id,
            r#type: test::HW_QUEUE,
            index,
            nesting_parent_iova: APERTURE,
            length: PAGE,
            ..uapi::HwQueueAlloc::default()
        };
        client.call(0x94, arg).map(|arg| arg.out_hw_queue_id)
    };
    assert_eq!(errno(queue(2)), Errno::INVAL);
    assert_eq!(errno(queue(1)), Errno::IO, "the one before is missing");
    let first = queue(0).unwrap();
    assert_eq!(errno(queue(0)), Errno::EXIST);
    let second = queue(1).unwrap();
    assert_eq!(errno(client.unmap(ioas, APERTURE, 2 * PAGE)), Errno::BUSY);
    assert_eq!(errno(client.destroy(first)), Errno::BUSY);
    client.destroy(second).unwrap();
    client.destroy(first).unwrap();
    client.unmap(ioas, APERTURE, 2 * PAGE).unwrap();
}
