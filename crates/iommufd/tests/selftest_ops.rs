//! The test multiplexer itself: reserved ranges, limits, unknown operations, and that a failure at any step leaves nothing behind.
#![cfg(feature = "test-ops")]

mod client;

use client::{APERTURE, Client, PAGE, errno};
use lockstep_iommufd::uapi::test::{self, ACCESS_NEEDS_PIN, ACCESS_WRITE, AddReserved, DEVICE_PASID, HwptData, MemoryLimit, TestCmd};
use lockstep_iommufd::uapi::{self, HWPT_DIRTY_TRACKING, HWPT_NEST_PARENT, HWPT_PASID, io};
use lockstep_iommufd::{Answer, Host, HostConfig, Local};
use rustix::io::Errno;
use sync::fail;

#[test]
fn reserved_ranges_keep_mappings_out() {
    let client = Client::new();
    let (ioas, va) = (client.ioas(), client.memory(1));
    let reserve = |ioas, start, length| client.op(1, ioas, AddReserved { start, length }).map(|_| ());
    assert_eq!(errno(reserve(ioas, 0, 0)), Errno::INVAL);
    assert_eq!(errno(reserve(ioas, u64::MAX, 2)), Errno::OVERFLOW);
    assert_eq!(errno(reserve(4711, 0, 1)), Errno::NOENT);
    reserve(ioas, APERTURE, 2 * PAGE).unwrap();
    reserve(ioas, APERTURE + PAGE, 2 * PAGE).unwrap();
    assert_eq!(errno(client.map(ioas, va, PAGE, APERTURE + 2 * PAGE)), Errno::INVAL);
    client.map(ioas, va, PAGE, APERTURE + 3 * PAGE).unwrap();
    assert_eq!(errno(reserve(ioas, APERTURE + 2 * PAGE, 2 * PAGE)), Errno::ADDRINUSE);
    reserve(ioas, u64::MAX, 1).unwrap();
}

#[test]
fn scratch_memory_has_a_least_size() {
    let client = Client::new();
    assert_eq!(errno(client.op(9, 0, MemoryLimit { limit: 11 })), Errno::INVAL);
    for limit in [12, 16, 65536] {
        client.op(9, 0, MemoryLimit { limit }).unwrap();
    }
}

#[test]
fn what_is_not_there() {
    let client = Client::new();
    for op in [0, 24, u32::MAX] {
        assert_eq!(errno(client.op(op, 0, MemoryLimit::default())), Errno::OPNOTSUPP);
    }
    let mut cmd = TestCmd { size: 67, op: 9, ..TestCmd::default() };
    assert_eq!(errno(client.local.ioctl(&*client.context, io(0xa0), &mut cmd)), Errno::INVAL, "the shortest is 68 bytes");
    // Without being asked for, there are no test operations.
    let plain = Host::new(HostConfig::default()).unwrap().open();
    let mut cmd = TestCmd { size: 72, op: 9, arg0: 16, ..TestCmd::default() };
    assert_eq!(errno(Local::new().ioctl(&*plain, io(0xa0), &mut cmd)), Errno::NOTTY);
}

/// Everything that the operations do, one after another. Each may fail.
fn sequence(client: &Client, va: u64) -> Answer {
    let ioas = client.call(0x81, uapi::IoasAlloc::default())?.out_ioas_id;
    client.map(ioas, va, 4 * PAGE, APERTURE)?;
    let mock = client.mock_with(12, ioas, DEVICE_PASID)?;
    client.check_map(mock.hwpt, APERTURE, 4 * PAGE, va)?;
    client.check_refs(va, 4 * PAGE, 1)?;
    let table = client.hwpt_alloc(mock.device, ioas, HWPT_PASID | HWPT_NEST_PARENT, None)?;
    client.op(10, mock.own, test::MockDomainReplace { pt_id: table })?;
    client.op(18, mock.own, test::PasidAttach { pasid: 5, pt_id: table })?;
    client.op(19, mock.own, test::PasidAttach { pasid: 5, pt_id: table })?;
    let nested = client.hwpt_alloc(mock.device, table, HWPT_PASID, Some(HwptData { iotlb: 3, pagetable_type: 0 }))?;
    client.op(14, nested, test::CheckIotlb { slot: 0, iotlb: 3 })?;
    let access = client.access(ioas, ACCESS_NEEDS_PIN)?;
    let item = client.access_pages(access, APERTURE, 2 * PAGE, va, ACCESS_WRITE)?;
    client.rw(access, APERTURE, 64, va + 2 * PAGE, ACCESS_WRITE)?;
    client.drop_pages(access, item)?;
    client.access_pages(access, APERTURE, PAGE, va, 0)?;
    let other = client.call(0x81, uapi::IoasAlloc::default())?.out_ioas_id;
    client.op(11, access, test::AccessReplaceIoas { ioas_id: other })?;
    let tracking = client.hwpt_alloc(mock.device, other, HWPT_DIRTY_TRACKING, None)?;
    client.call(0x8b, uapi::HwptSetDirtyTracking { flags: 1, hwpt_id: tracking, ..uapi::HwptSetDirtyTracking::default() })?;
    let fd = client.op_value(22, 0, test::DmabufGet { length: 8192, open_flags: 0 })?.0;
    client.map_file(other, fd as i32, 0, 2 * PAGE, APERTURE)?;
    client.op(23, 0, test::DmabufRevoke { dmabuf_fd: fd as i32, revoked: 1 })?;
    client.destroy(mock.own)
}

/// The 1st, 2nd, .. step fails, until none does; every time, closing leaves nothing pinned, nothing paid, no page table.
#[test]
fn any_step_may_fail() {
    let outside = Client::new();
    let va = outside.memory(4);
    let tables = || outside.host.iommu().arena().tables_in_use();
    let before = tables();
    let mut failed = std::collections::BTreeMap::new();
    let mut survived = std::collections::BTreeSet::new();
    for nth in 1.. {
        let client = outside.again();
        let plan = fail::nth(nth);
        let answer = sequence(&client, va);
        let fired = plan.fired();
        drop(plan);
        client.local.descriptors().into_iter().for_each(|fd| client.local.close(fd).unwrap());
        lockstep_iommufd::File::released(&*client.context);
        outside.check_refs(va, 4 * PAGE, 0).unwrap();
        let space = lockstep_iommufd::Caller::process(&client.local).unwrap().space;
        assert_eq!(outside.host.accounts().of_space(space), (0, 0), "step {nth}, {fired:?}");
        drop(client);
        assert_eq!(tables(), before, "step {nth}, {fired:?}");
        match fired {
            Some(step) => *failed.entry(step).or_insert(0) += 1,
            None => {
                answer.unwrap();
                break;
            }
        }
        match answer {
            Ok(()) => _ = survived.insert(fired.unwrap()),
            Err(refusal) => assert_eq!(refusal.errno, Errno::NOMEM, "step {nth}, {fired:?}: {refusal}"),
        }
    }
    // A detach that fails is tried again.
    assert_eq!(survived.into_iter().collect::<Vec<_>>(), ["iommu.attach"]);
    assert!(failed.len() >= 10, "only these can fail: {failed:?}");
}
