//! IOMMU_VIOMMU_ALLOC, IOMMU_VDEVICE_ALLOC, IOMMU_HW_QUEUE_ALLOC, IOMMU_HWPT_INVALIDATE, and mappings of the iommufd.

mod fakes;

use addr::{Iova, Span};
use backing::{Backing, Frames};
use fakes::{Desk, Fake, KIND, errno};
use ioas::Place;
use lockstep_iommufd::uapi::{
    HWPT_NEST_PARENT, HwQueueAlloc, HwptInvalidate, VEVENTQ_LOST_EVENTS, VdeviceAlloc, VeventHeader, VeventqAlloc, ViommuAlloc,
};
use lockstep_iommufd::{DeviceObject, File, Mmap};
use pt::Perm;
use rustix::io::Errno;
use std::sync::{Arc, Mutex};
use zerocopy::FromBytes;

struct Guest {
    desk: Desk,
    device: Arc<DeviceObject>,
    log: Arc<Mutex<Vec<String>>>,
    ioas: u32,
    parent: u32,
    viommu: u32,
}

impl Guest {
    fn new() -> Self {
        let desk = Desk::new();
        let fake: Fake = desk.fake();
        let log = Arc::clone(&fake.log);
        let device = desk.bind(fake);
        let ioas = desk.ioas();
        let parent = desk.hwpt(&device, ioas, HWPT_NEST_PARENT).unwrap();
        let mut own = Self { desk, device, log, ioas, parent, viommu: 0 };
        own.viommu = own.viommu(|_| ()).unwrap();
        own
    }

    fn viommu(&self, edit: impl FnOnce(&mut ViommuAlloc)) -> Result<u32, Errno> {
        let mut arg = ViommuAlloc { size: 40, r#type: KIND, dev_id: self.device.id(), hwpt_id: self.parent, ..Default::default() };
        edit(&mut arg);
        self.desk.call(0x90, &mut arg).map(|_| arg.out_viommu_id)
    }

    fn vdevice(&self, viommu_id: u32, dev_id: u32, virt_id: u64) -> Result<u32, Errno> {
        let mut arg = VdeviceAlloc { size: 24, viommu_id, dev_id, virt_id, ..Default::default() };
        self.desk.call(0x91, &mut arg).map(|_| arg.out_vdevice_id)
    }

    fn events(&self, kind: u32, depth: u32) -> Result<(u32, Arc<dyn File>), Errno> {
        let mut arg = VeventqAlloc { size: 32, viommu_id: self.viommu, r#type: kind, veventq_depth: depth, ..Default::default() };
        self.desk.call(0x93, &mut arg)?;
        Ok((arg.out_veventq_id, self.desk.local.opened(arg.out_veventq_fd.cast_signed()).unwrap()))
    }

    fn read(&self, file: &dyn File, count: usize) -> Result<Vec<u8>, Errno> {
        errno(file.read(&self.desk.local, count, None))
    }

    fn queue(&self, edit: impl FnOnce(&mut HwQueueAlloc)) -> Result<u32, Errno> {
        let mut arg = HwQueueAlloc {
            size: 40,
            viommu_id: self.viommu,
            r#type: KIND,
            nesting_parent_iova: 0x10_0000,
            length: 4096,
            ..Default::default()
        };
        edit(&mut arg);
        self.desk.call(0x94, &mut arg).map(|_| arg.out_hw_queue_id)
    }

    fn invalidate(&self, edit: impl FnOnce(&mut HwptInvalidate)) -> (Result<i64, Errno>, u32) {
        let mut arg = HwptInvalidate { size: 32, hwpt_id: self.viommu, data_type: KIND, entry_len: 8, ..Default::default() };
        edit(&mut arg);
        let answer = self.desk.call(0x8d, &mut arg);
        (answer, arg.entry_num)
    }
}

/// Each line adds a mistake that is found before those above it (rule 66).
#[test]
fn mistakes_of_viommus_are_found_in_order() {
    let own = Guest::new();
    let plain = own.desk.hwpt(&own.device, own.ioas, 0).unwrap();
    type Edit = fn(&mut ViommuAlloc);
    let lines: [(Errno, Edit); 5] = [
        (Errno::FAULT, |arg| (arg.data_len, arg.data_uptr) = (8, 0)),
        (Errno::INVAL, |arg| arg.hwpt_id += 1000),
        (Errno::NOENT, |arg| arg.hwpt_id = 99),
        (Errno::OPNOTSUPP, |arg| arg.r#type = 5),
        (Errno::NOENT, |arg| arg.dev_id = 98),
    ];
    for last in 0..lines.len() {
        let answer = own.viommu(|arg| {
            lines[..=last].iter().for_each(|(_, edit)| edit(arg));
            if arg.hwpt_id > 1000 {
                arg.hwpt_id = plain;
            }
        });
        assert_eq!(answer, Err(lines[last].0), "{last}");
    }
    assert_eq!(own.viommu(|arg| (arg.dev_id, arg.r#type) = (98, 0)), Err(Errno::OPNOTSUPP));
    assert_eq!(own.viommu(|arg| (arg.dev_id, arg.flags) = (98, 1)), Err(Errno::OPNOTSUPP));
    assert_eq!(own.desk.destroy(own.parent), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(own.viommu), Ok(0));
    assert_eq!(own.desk.destroy(own.parent), Ok(0));
}

#[test]
fn numbers_of_devices() {
    let own = Guest::new();
    let mut foreign = own.desk.fake();
    foreign.unit = 8;
    let (foreign, second) = (own.desk.bind(foreign), own.desk.bind(own.desk.fake()));
    assert_eq!(own.vdevice(99, 98, 1), Err(Errno::NOENT));
    assert_eq!(own.vdevice(own.viommu, 98, 1), Err(Errno::NOENT));
    assert_eq!(own.vdevice(own.viommu, foreign.id(), 1), Err(Errno::INVAL));
    let number = own.vdevice(own.viommu, own.device.id(), 0x99).unwrap();
    assert_eq!(own.vdevice(own.viommu, own.device.id(), 0x98), Err(Errno::EXIST), "the device has one");
    assert_eq!(own.vdevice(own.viommu, second.id(), 0x99), Err(Errno::EXIST), "the number is taken");
    assert_eq!(own.vdevice(own.viommu, second.id(), 666), Err(Errno::IO), "the driver's word");
    assert_eq!(own.desk.destroy(own.viommu), Err(Errno::BUSY));
    let viommu = own.desk.context.viommu(own.viommu).unwrap();
    assert_eq!((viommu.number_of(&own.device), viommu.number_of(&second)), (Some(0x99), None));
    assert_eq!(own.desk.destroy(number), Ok(0));
    assert_eq!(own.vdevice(own.viommu, second.id(), 0x99), Ok(number), "number and id are free again");
    assert_eq!(own.desk.destroy(number), Ok(0));
    assert_eq!(own.desk.destroy(own.viommu), Ok(0));
}

/// The device goes, its number goes with it, and the id of the number is nobody's any more (rule 10).
#[test]
fn a_number_without_its_device_is_a_tombstone() {
    let own = Guest::new();
    let number = own.vdevice(own.viommu, own.device.id(), 5).unwrap();
    let dev_id = own.device.id();
    own.device.unbind();
    assert_eq!(*own.log.lock().unwrap(), [format!("remove 5 of {dev_id}")]);
    assert_eq!(own.desk.destroy(number), Err(Errno::NOENT));
    assert_eq!(own.desk.destroy(dev_id), Err(Errno::NOENT));
    let taken: Vec<u32> = (0..5).map(|_| own.desk.ioas()).collect();
    assert!(taken.contains(&dev_id) && !taken.contains(&number), "{taken:?}");
    assert_eq!(own.desk.destroy(own.viommu), Ok(0), "it keeps nothing");
}

/// A table on a virtual IOMMU is for devices that have a number there (rule 52).
#[test]
fn tables_on_a_viommu() {
    let own = Guest::new();
    let table = own.desk.nested(&own.device, own.viommu).unwrap();
    assert_eq!(errno(own.device.attach(None, table)), Err(Errno::NOENT));
    let number = own.vdevice(own.viommu, own.device.id(), 5).unwrap();
    assert_eq!(errno(own.device.attach(None, table)), Ok(table));
    assert_eq!(own.desk.destroy(own.viommu), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(number), Ok(0));
    own.device.detach(None);
    assert_eq!(own.desk.destroy(table), Ok(0));
    let mut foreign = own.desk.fake();
    foreign.unit = 8;
    let foreign = own.desk.bind(foreign);
    assert_eq!(own.desk.nested(&foreign, own.viommu), Err(Errno::INVAL));
    assert_eq!(own.desk.hwpt(&own.device, own.viommu, 0), Err(Errno::OPNOTSUPP), "without data");
    assert_eq!(own.desk.destroy(own.viommu), Ok(0));
}

#[test]
fn the_shared_page() {
    let own = Guest::new();
    let data = own.desk.local.put(&[0x4567u64, 0]);
    let viommu = own.viommu(|arg| (arg.data_len, arg.data_uptr) = (16, data)).unwrap();
    assert_eq!(own.desk.local.get::<[u64; 2]>(data), [0x4568, 4096], "offsets begin with one page");
    let wanted = Mmap { len: 4096, prot: 3, flags: 1, offset: 4096 };
    for (wrong, expected) in [
        (Mmap { flags: 2, ..wanted }, Errno::INVAL),
        (Mmap { prot: 7, ..wanted }, Errno::PERM),
        (Mmap { len: 8192, ..wanted }, Errno::NXIO),
        (Mmap { offset: 0, ..wanted }, Errno::NXIO),
    ] {
        assert_eq!(errno(own.desk.local.mmap(&*own.desk.context, &wrong)), Err(expected), "{wrong:?}");
    }
    let at = own.desk.local.mmap(&*own.desk.context, &wanted).unwrap();
    assert_eq!(own.desk.local.get::<u64>(at), 0x4567);
    assert_eq!(own.desk.destroy(viommu), Err(Errno::BUSY), "mapped");
    own.desk.local.munmap(at).unwrap();
    // A bad answer takes its page back.
    assert_eq!(own.viommu(|arg| (arg.data_len, arg.data_uptr) = (7, data)), Err(Errno::INVAL));
    let second = own.viommu(|arg| (arg.data_len, arg.data_uptr) = (16, data)).unwrap();
    assert_eq!(own.desk.local.get::<[u64; 2]>(data)[1], 8192);
    assert_eq!(own.desk.destroy(viommu), Ok(0));
    assert_eq!(errno(own.desk.local.mmap(&*own.desk.context, &wanted)), Err(Errno::NXIO));
    assert_eq!(own.desk.destroy(second), Ok(0));
}

#[test]
fn invalidating() {
    let own = Guest::new();
    let table = own.desk.nested(&own.device, own.parent).unwrap();
    let entries = own.desk.local.put(&[1u64, 2, u64::MAX, 4]);
    let nested = |edit: fn(&mut HwptInvalidate), count| {
        own.invalidate(|arg| {
            (arg.hwpt_id, arg.data_uptr, arg.entry_num) = (table, entries, count);
            edit(arg);
        })
    };
    assert_eq!(nested(|_| (), 2), (Ok(0), 2));
    assert_eq!(nested(|_| (), 4), (Err(Errno::OPNOTSUPP), 2), "those before are done");
    assert_eq!(nested(|arg| arg.data_type = 1, 0), (Err(Errno::INVAL), 0), "no entry: the type is judged");
    assert_eq!(nested(|arg| (arg.data_uptr, arg.entry_len) = (0, 0), 0), (Ok(0), 0));
    for wrong in [
        (|arg| arg.data_uptr = 0) as fn(&mut HwptInvalidate),
        |arg| arg.entry_len = 0,
        |arg| arg.entry_len = 4097,
        |arg| arg.entry_num = (1 << 19) + 1,
        |arg| (arg.hwpt_id, arg.entry_len) = (99, 0),
    ] {
        assert_eq!(nested(wrong, 2), (Err(Errno::INVAL), 0));
    }
    assert_eq!(nested(|arg| (arg.__reserved, arg.entry_len) = (1, 0), 2), (Err(Errno::OPNOTSUPP), 0));
    assert_eq!(nested(|arg| arg.hwpt_id = 99, 2), (Err(Errno::NOENT), 0));
    for other in [own.parent, own.ioas, own.device.id()] {
        assert_eq!(own.invalidate(|arg| (arg.hwpt_id, arg.data_uptr) = (other, entries)), (Err(Errno::INVAL), 0));
    }
    // Longer entries are fine as long as nothing is in what is not known.
    let wide = own.desk.local.put(&[5u64, 0, 6, 1]);
    assert_eq!(
        own.invalidate(|arg| (arg.hwpt_id, arg.data_uptr, arg.entry_len, arg.entry_num) = (table, wide, 16, 2)),
        (Err(Errno::TOOBIG), 1)
    );
    assert_eq!(nested(|arg| arg.data_uptr = 0x10, 1), (Err(Errno::FAULT), 0));

    own.vdevice(own.viommu, own.device.id(), 2).unwrap();
    assert_eq!(own.invalidate(|arg| (arg.data_uptr, arg.entry_num) = (entries + 8, 1)), (Ok(0), 1));
    assert_eq!(*own.log.lock().unwrap(), [format!("invalidate {}", own.device.id())]);
    assert_eq!(own.invalidate(|arg| (arg.data_uptr, arg.entry_num) = (entries + 8, 2)), (Err(Errno::INVAL), 1));
}

fn header(bytes: &[u8]) -> (u32, u32) {
    let header = VeventHeader::read_from_bytes(&bytes[..8]).unwrap();
    (header.flags, header.sequence)
}

#[test]
fn mistakes_of_event_queues_are_found_in_order() {
    let own = Guest::new();
    let call = |edit: fn(&mut VeventqAlloc)| {
        let mut arg = VeventqAlloc { size: 32, viommu_id: 99, r#type: KIND, veventq_depth: 0, ..Default::default() };
        edit(&mut arg);
        own.desk.call(0x93, &mut arg).unwrap_err()
    };
    assert_eq!(call(|arg| arg.flags = 1), Errno::OPNOTSUPP);
    assert_eq!(call(|arg| arg.__reserved = 1), Errno::OPNOTSUPP);
    assert_eq!(call(|arg| arg.r#type = 0), Errno::OPNOTSUPP);
    assert_eq!(call(|_| ()), Errno::INVAL);
    assert_eq!(call(|arg| arg.veventq_depth = (1 << 19) + 1), Errno::INVAL);
    assert_eq!(call(|arg| arg.veventq_depth = 1 << 19), Errno::NOENT);
    let (id, _) = own.events(KIND, 1).unwrap();
    assert_eq!(own.events(KIND, 1).map(|_| ()), Err(Errno::EXIST));
    own.events(KIND + 1, 1).unwrap();
    assert_eq!(own.desk.destroy(id), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(own.viommu), Err(Errno::BUSY));
    own.desk.local.descriptors().into_iter().for_each(|fd| own.desk.local.close(fd).unwrap());
    assert_eq!(own.desk.destroy(id), Ok(0));
    assert!(own.events(KIND, 1).is_ok(), "the type is free again");
}

#[test]
fn events_come_in_order() {
    let own = Guest::new();
    assert_eq!(errno(own.device.report_vevent(KIND, |_| vec![1])), Err(Errno::NOENT), "not attached");
    let table = own.desk.nested(&own.device, own.viommu).unwrap();
    own.vdevice(own.viommu, own.device.id(), 0x77).unwrap();
    own.device.attach(None, table).unwrap();
    assert_eq!(errno(own.device.report_vevent(KIND, |_| vec![1])), Err(Errno::OPNOTSUPP), "no queue");
    let (_, file) = own.events(KIND, 4).unwrap();
    let ready = file.ready().unwrap();
    assert_eq!(own.read(&*file, 7), Err(Errno::INVAL), "shorter than a header, empty or not");
    assert_eq!((own.read(&*file, 8), ready.get()), (Ok(vec![]), false));
    own.device.report_vevent(KIND, |virt_id| (virt_id as u32).to_le_bytes().to_vec()).unwrap();
    own.device.report_vevent(KIND, |_| vec![9; 8]).unwrap();
    assert!(ready.get());
    assert_eq!(own.read(&*file, 11), Err(Errno::INVAL), "the first does not fit");
    assert_eq!(errno(file.read(&own.desk.local, 100, Some(1))), Err(Errno::SPIPE));
    let first = own.read(&*file, 12 + 15).unwrap();
    assert_eq!((header(&first), &first[8..]), ((0, 0), &[0x77, 0, 0, 0][..]));
    assert!(ready.get());
    let second = own.read(&*file, 100).unwrap();
    assert_eq!((header(&second), &second[8..]), ((0, 1), &[9; 8][..]));
    assert!(!ready.get());
    assert_eq!(errno(file.write(&own.desk.local, &[0; 8], None)), Err(Errno::INVAL));
}

/// What finds no room is noted behind the rest, with the number of the last one that was lost. The note goes as soon as an event is queued
/// again: the gap in the numbers says as much.
#[test]
fn lost_events() {
    let own = Guest::new();
    let (_, file) = own.events(KIND, 2).unwrap();
    let viommu = own.desk.context.viommu(own.viommu).unwrap();
    let report = |count| (0..count).for_each(|_| viommu.report(KIND, &[1; 4]).unwrap());
    report(5);
    let bytes = own.read(&*file, 1000).unwrap();
    let headers: Vec<_> = [0, 12, 24].map(|at| header(&bytes[at..])).into();
    assert_eq!((bytes.len(), headers), (32, vec![(0, 0), (0, 1), (VEVENTQ_LOST_EVENTS, 4)]));
    assert!(!file.ready().unwrap().get());
    report(3);
    // Room for one event, not for the note.
    assert_eq!(header(&own.read(&*file, 12).unwrap()), (0, 5));
    report(1);
    let bytes = own.read(&*file, 1000).unwrap();
    assert_eq!((bytes.len(), header(&bytes), header(&bytes[12..])), (24, (0, 6), (0, 8)), "the note on 7 is gone");
    // A note alone is read as a header.
    report(3);
    own.read(&*file, 24).unwrap();
    assert!(file.ready().unwrap().get());
    let note = own.read(&*file, 8).unwrap();
    assert_eq!((note.len(), header(&note)), (8, (VEVENTQ_LOST_EVENTS, 11)));
}

#[test]
fn hardware_queues_pin_and_lock_their_memory() {
    let own = Guest::new();
    let ioas = own.desk.context.ioas(own.ioas).unwrap();
    assert_eq!(own.queue(|_| ()), Err(Errno::NOENT), "nothing is mapped");
    let memory = Backing::memfd(4 << 12, Frames::Contiguous).unwrap();
    ioas.ioas().map_file(&memory, 0, 4 << 12, Place::Fixed(Iova::new(0x10_0000)), Perm::RW).unwrap();
    for (edit, expected) in [
        ((|arg| arg.index = 2) as fn(&mut HwQueueAlloc), Errno::INVAL),
        (|arg| arg.index = 1, Errno::IO),
        (|arg| arg.length = 5 << 12, Errno::NOENT),
        (|arg| (arg.length, arg.r#type) = (5 << 12, 1), Errno::OPNOTSUPP),
        (|arg| (arg.viommu_id, arg.r#type) = (99, 1), Errno::NOENT),
        (|arg| (arg.viommu_id, arg.length) = (99, u64::MAX), Errno::OVERFLOW),
        (|arg| (arg.viommu_id, arg.length) = (99, 0), Errno::INVAL),
        (|arg| (arg.r#type, arg.length) = (0, 0), Errno::OPNOTSUPP),
        (|arg| (arg.flags, arg.length) = (1, 0), Errno::OPNOTSUPP),
    ] {
        assert_eq!(own.queue(edit), Err(expected));
    }
    let span = Span::from_len(Iova::new(0x10_0000), 4 << 12).unwrap();
    let unmap = || errno(ioas.ioas().unmap(span).map_err(Into::into));
    let align = ioas.ioas().alignment();
    let first = own.queue(|arg| arg.length = 64).unwrap();
    assert_eq!(own.queue(|_| ()), Err(Errno::EXIST));
    let second = own.queue(|arg| (arg.index, arg.nesting_parent_iova, arg.length) = (1, 0x10_1800, 4096)).unwrap();
    assert_eq!(unmap(), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(own.viommu), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(first), Err(Errno::BUSY), "the second came after it");
    assert_eq!(own.desk.destroy(second), Ok(0));
    assert_eq!(unmap(), Err(Errno::BUSY));
    assert_eq!(own.desk.destroy(first), Ok(0));
    assert_eq!(unmap(), Ok(4 << 12));
    assert_eq!(ioas.ioas().alignment(), align);
    // Pages that lie here and there are no queue, one of them is.
    let scattered = Backing::memfd(64 << 12, Frames::Scattered { seed: 1 }).unwrap();
    ioas.ioas().map_file(&scattered, 0, 64 << 12, Place::Fixed(Iova::new(0x10_0000)), Perm::READ).unwrap();
    assert_eq!(own.queue(|arg| arg.length = 64 << 12), Err(Errno::FAULT));
    assert!(own.queue(|_| ()).is_ok());
}
