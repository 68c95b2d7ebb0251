//! IOMMU_FAULT_QUEUE_ALLOC, and what is read from and written to its descriptor.

mod fakes;

use fakes::{Desk, Fake, errno};
use lockstep_iommufd::uapi::{FaultAlloc, HWPT_FAULT_ID_VALID, HWPT_NEST_PARENT, HWPT_PASID, HwptPageResponse, HwptPgfault};
use lockstep_iommufd::{DeviceObject, File, PageFault};
use rustix::io::Errno;
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, IntoBytes};

struct Queue {
    desk: Desk,
    device: Arc<DeviceObject>,
    log: Arc<Mutex<Vec<String>>>,
    file: Arc<dyn File>,
    fd: i32,
    id: u32,
    ioas: u32,
    hwpt: u32,
}

impl Queue {
    /// A device on a table with a fault queue.
    fn new() -> Self {
        let desk = Desk::new();
        let fake: Fake = desk.fake();
        let log = Arc::clone(&fake.log);
        let device = desk.bind(fake);
        let ioas = desk.ioas();
        let mut arg = FaultAlloc { size: 16, ..Default::default() };
        desk.call(0x8e, &mut arg).unwrap();
        let fd = arg.out_fault_fd.cast_signed();
        let file = desk.local.opened(fd).unwrap();
        let mut own = Self { desk, device, log, file, fd, id: arg.out_fault_id, ioas, hwpt: 0 };
        own.hwpt = own.table(HWPT_PASID);
        own.device.attach(None, own.hwpt).unwrap();
        own
    }

    fn table(&self, flags: u32) -> u32 {
        let mut arg = fakes::hwpt_alloc(self.device.id(), self.ioas);
        (arg.flags, arg.fault_id) = (flags | HWPT_FAULT_ID_VALID, self.id);
        self.desk.call(0x89, &mut arg).unwrap();
        arg.out_hwpt_id
    }

    fn report(&self, group: u32) {
        self.device.report_fault(fault(group)).unwrap();
    }

    fn read(&self, count: usize) -> Result<Vec<HwptPgfault>, Errno> {
        let bytes = errno(self.file.read(&self.desk.local, count, None))?;
        Ok(bytes.chunks(40).map(|record| HwptPgfault::read_from_bytes(record).unwrap()).collect())
    }

    fn answer(&self, responses: &[(u32, u32)]) -> Result<usize, Errno> {
        let bytes: Vec<u8> = responses.iter().flat_map(|&(cookie, code)| HwptPageResponse { cookie, code }.as_bytes().to_vec()).collect();
        errno(self.file.write(&self.desk.local, &bytes, None))
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap()).into_iter().filter(|line| line.starts_with("respond")).collect()
    }
}

fn fault(group: u32) -> PageFault {
    PageFault { pasid: None, group, perm: 2, addr: 0xdead_b000, last: true }
}

#[test]
fn a_request_is_read_and_answered() {
    let own = Queue::new();
    assert!(!own.file.ready().unwrap().get());
    assert_eq!(own.read(40), Ok(vec![]), "empty is not an error");
    own.report(7);
    own.device.report_fault(PageFault { pasid: None, ..fault(8) }).unwrap();
    assert!(own.file.ready().unwrap().get());
    let records = own.read(400).unwrap();
    let expected = HwptPgfault { flags: 2, dev_id: own.device.id(), grpid: 7, perm: 2, addr: 0xdead_b000, cookie: 1, ..Default::default() };
    assert_eq!(records, [expected, HwptPgfault { grpid: 8, cookie: 2, ..expected }]);
    assert!(!own.file.ready().unwrap().get());
    assert_eq!(own.answer(&[(2, 0)]), Ok(8));
    assert_eq!(own.answer(&[(2, 0)]), Err(Errno::INVAL), "answered");
    own.report(9);
    assert_eq!(own.read(40).unwrap()[0].cookie, 2, "the lowest free cookie");
    assert_eq!(own.answer(&[(1, 1), (2, 0)]), Ok(16));
    assert_eq!(own.log(), ["respond 8 true", "respond 7 false", "respond 9 true"]);
}

#[test]
fn lengths_and_offsets() {
    let own = Queue::new();
    for (count, at, expected) in [
        (40, None, Ok(())),
        (40, Some(0), Ok(())),
        (40, Some(40), Err(Errno::SPIPE)),
        (39, None, Err(Errno::SPIPE)),
        (41, Some(0), Err(Errno::SPIPE)),
    ] {
        assert_eq!(errno(own.file.read(&own.desk.local, count, at)).map(|_| ()), expected, "{count} {at:?}");
    }
    own.report(1);
    let taken = own.read(40).unwrap()[0].cookie;
    let response = HwptPageResponse { cookie: taken, code: 0 };
    for (data, at, expected) in [
        (&response.as_bytes()[..7], None, Err(Errno::SPIPE)),
        (response.as_bytes(), Some(8), Err(Errno::SPIPE)),
        (&[][..], None, Ok(0)),
        (response.as_bytes(), Some(0), Ok(8)),
    ] {
        assert_eq!(errno(own.file.write(&own.desk.local, data, at)), expected, "{} {at:?}", data.len());
    }
    assert_eq!(errno(own.file.ioctl(&own.desk.local, 0x3b81, 0)).map(|_| ()), Err(Errno::NOTTY));
}

/// What was answered before the bad one counts.
#[test]
fn a_bad_answer_ends_a_write() {
    let own = Queue::new();
    (1..=3).for_each(|group| own.report(group));
    own.read(120).unwrap();
    assert_eq!(own.answer(&[(1, 2)]), Err(Errno::INVAL));
    assert_eq!(own.answer(&[(9, 0)]), Err(Errno::INVAL));
    assert_eq!(own.answer(&[(1, 0), (2, 7), (3, 0)]), Ok(8));
    assert_eq!(own.answer(&[(2, 0), (3, 0)]), Ok(16));
}

/// A request of several parts is one group: read as a whole or not at all.
#[test]
fn parts_stay_together() {
    let own = Queue::new();
    for (group, last) in [(1, false), (2, false), (1, false), (2, true), (1, true), (3, true)] {
        own.device.report_fault(PageFault { last, ..fault(group) }).unwrap();
    }
    assert_eq!(own.read(40), Err(Errno::INVAL), "the first has two parts");
    assert_eq!(own.read(0), Err(Errno::INVAL));
    let groups = |records: Vec<HwptPgfault>| records.iter().map(|record| (record.grpid, record.cookie, record.flags)).collect::<Vec<_>>();
    // Room for four records, and the second request has three: it waits.
    assert_eq!(groups(own.read(160).unwrap()), [(2, 1, 0), (2, 1, 2)]);
    assert_eq!(groups(own.read(160).unwrap()), [(1, 2, 0), (1, 2, 0), (1, 2, 2), (3, 3, 2)]);
    assert_eq!(own.answer(&[(1, 0), (2, 0), (3, 0)]), Ok(24));
}

#[test]
fn requests_end_with_their_attachment() {
    let own = Queue::new();
    let other = own.table(HWPT_PASID);
    own.report(1);
    own.report(2);
    assert_eq!(own.read(40).unwrap().len(), 1);
    own.device.replace(None, other).unwrap();
    assert!(!own.file.ready().unwrap().get());
    assert_eq!(own.answer(&[(1, 0)]), Err(Errno::INVAL), "gone");
    let mut refused = own.log();
    refused.sort();
    assert_eq!(refused, ["respond 1 false", "respond 2 false"]);
    // Those of another PASID stay.
    own.device.attach(Some(5), own.hwpt).unwrap();
    own.device.report_fault(PageFault { pasid: Some(5), ..fault(3) }).unwrap();
    own.report(4);
    own.device.detach(None);
    let left = own.read(400).unwrap();
    assert_eq!(left.iter().map(|record| (record.grpid, record.pasid, record.flags)).collect::<Vec<_>>(), [(3, 5, 3)]);
    own.device.unbind();
    assert_eq!(own.log(), ["respond 4 false", "respond 3 false"]);
}

/// Without a queue of its own, a PASID's request goes to a user's table, which has the PASIDs; else nobody takes it.
#[test]
fn where_requests_go() {
    let own = Queue::new();
    let of_pasid = PageFault { pasid: Some(9), ..fault(1) };
    assert_eq!(errno(own.device.report_fault(of_pasid)), Err(Errno::INVAL), "the device's own table has no PASIDs");
    assert_eq!(own.log(), ["respond 1 false"]);
    let parent = own.desk.hwpt(&own.device, own.ioas, HWPT_NEST_PARENT).unwrap();
    let nested = own.desk.nested_with(&own.device, parent, HWPT_FAULT_ID_VALID, own.id).unwrap();
    own.device.replace(None, nested).unwrap();
    own.device.report_fault(of_pasid).unwrap();
    assert_eq!(own.read(40).unwrap()[0].pasid, 9);
    let silent = own.desk.nested(&own.device, parent).unwrap();
    own.device.replace(None, silent).unwrap();
    assert_eq!(errno(own.device.report_fault(fault(2))), Err(Errno::INVAL));
    own.device.detach(None);
    assert_eq!(errno(own.device.report_fault(fault(3))), Err(Errno::INVAL));
}

/// A queue that nobody reads does not grow for ever: what comes then is refused at once.
#[test]
fn a_full_queue_refuses() {
    let own = Queue::new();
    let mut taken = 0u32;
    while own.device.report_fault(fault(taken)).is_ok() {
        taken += 1;
        assert!(taken <= 1 << 20);
    }
    assert_eq!(own.log(), [format!("respond {taken} false")]);
    assert_eq!(own.read(40 * taken as usize).unwrap().len(), taken as usize);
    // Unanswered ones count.
    assert!(own.device.report_fault(fault(0)).is_err());
    assert_eq!(own.answer(&[(1, 0)]), Ok(8));
    own.report(0);
}

#[test]
fn who_needs_the_queue() {
    let own = Queue::new();
    assert_eq!(own.desk.destroy(own.id), Err(Errno::BUSY), "its descriptor and a page table");
    own.device.detach(None);
    assert_eq!(own.desk.destroy(own.hwpt), Ok(0));
    assert_eq!(own.desk.destroy(own.id), Err(Errno::BUSY), "its descriptor");
    own.desk.local.close(own.fd).unwrap();
    assert_eq!(own.desk.destroy(own.id), Ok(0));
}

/// The descriptor keeps the context open.
#[test]
fn the_descriptor_keeps_the_context() {
    let own = Queue::new();
    own.device.detach(None);
    own.context_closes();
    assert!(own.desk.context.find(own.id).is_some());
    own.desk.local.close(own.fd).unwrap();
    assert!(own.desk.context.find(own.id).is_none() && own.desk.context.find(own.ioas).is_none());
}

impl Queue {
    fn context_closes(&self) {
        self.desk.context.released();
    }
}

/// An answer that cannot be given leaves neither an object nor a descriptor.
#[test]
fn nothing_is_left_of_a_queue_that_nobody_heard_of() {
    let own = Queue::new();
    let before = own.desk.local.descriptors();
    own.desk.local.set_most_files(before.len());
    let mut arg = FaultAlloc { size: 16, ..Default::default() };
    assert_eq!(own.desk.call(0x8e, &mut arg), Err(Errno::MFILE));
    own.desk.local.set_most_files(64);
    arg.flags = 1;
    assert_eq!(own.desk.call(0x8e, &mut arg), Err(Errno::OPNOTSUPP));
    let memory = backing::Backing::user(backing::UserRegion::new(4096).unwrap(), backing::Frames::Contiguous).unwrap();
    own.desk.local.add_at(&memory, 0x10_0000, lockstep_iommufd::Touch::Always).unwrap();
    lockstep_iommufd::Caller::write(&own.desk.local, 0x10_0000, FaultAlloc { size: 16, ..Default::default() }.as_bytes()).unwrap();
    own.desk.local.hide(0x10_0000, 4096).unwrap();
    own.desk.local.add_at(&memory, 0x10_0000, lockstep_iommufd::Touch::ReadOnly).unwrap();
    let answer = own.desk.local.call(&*own.desk.context, lockstep_iommufd::uapi::io(0x8e), 0x10_0000);
    assert_eq!(errno(answer), Err(Errno::FAULT));
    assert_eq!(own.desk.local.descriptors(), before);
    let free = own.desk.ioas();
    arg = FaultAlloc { size: 16, ..Default::default() };
    own.desk.call(0x8e, &mut arg).unwrap();
    assert_eq!(arg.out_fault_id, free + 1, "no id was lost");
}
