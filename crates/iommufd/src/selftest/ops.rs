//! Operations on mock devices: make one, move it about, look into its caches, have it report something.

use super::mock::{MockDriver, MockNested};
use super::{Arg, SELFTEST, respond};
use crate::device::{DeviceObject, NewDevice};
use crate::fault::PageFault;
use crate::object::{Head, Object, no_such};
use crate::table::Reply;
use crate::uapi::test::{self, TestCmd};
use crate::{Answer, Context, Refusal};
use iommu::Domain;
use rustix::io::Errno;
use std::sync::{Arc, OnceLock};
use sync::fail;

/// Operation 12: as 2, and the flags of the device count.
const MOCK_DOMAIN_FLAGS: u32 = 12;

/// A mock device. The device object that it is bound to goes with it.
#[derive(Default)]
struct MockObject {
    head: Head,
    /// Set before anybody finds the object.
    device: OnceLock<Arc<DeviceObject>>,
}

impl Object for MockObject {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "mock device"
    }

    fn destroy(&self, _: &Context) {
        self.device.get().into_iter().for_each(DeviceObject::unbind);
    }
}

impl Context {
    fn mock(&self, id: u32) -> Answer<Arc<DeviceObject>> {
        let object: Arc<MockObject> = self.get(id, "mock device")?;
        object.device.get().cloned().ok_or_else(|| no_such(id, "mock device"))
    }
}

/// The domain of a page table over an IOAS.
pub(super) fn domain_of(context: &Context, id: u32) -> Answer<Arc<Domain>> {
    Ok(context.paging(id)?.1)
}

pub(super) fn mock_domain(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let mut args: test::MockDomain = cmd.args();
    let flags = if cmd.op == MOCK_DOMAIN_FLAGS { args.dev_flags } else { 0 };
    let context = call.target;
    let object = Arc::new(MockObject::default());
    // Ids are taken in this order: this object, the device, its page table.
    context.enroll(&*object)?;
    let (device, hwpt) = bind(context, flags, cmd.id).inspect_err(|_| context.abandon(&*object))?;
    args.out_idev_id = device.id();
    args.out_hwpt_id = hwpt;
    let _first = object.device.set(device);
    args.out_stdev_id = object.head.id();
    context.publish(object);
    cmd.set_args(&args);
    Ok(Reply::New(args.out_stdev_id))
}

fn bind(context: &Arc<Context>, flags: u32, pt_id: u32) -> Answer<(Arc<DeviceObject>, u32)> {
    let driver = MockDriver::new(context.host(), flags)?;
    let device = context.bind_device(NewDevice { driver, device: context.host().iommu().device("mock"), group: None })?;
    let hwpt = device.attach(None, pt_id).inspect_err(|_| device.unbind())?;
    Ok((device, hwpt))
}

pub(super) fn replace(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let device = call.target.mock(cmd.id)?;
    let mut args: test::MockDomainReplace = cmd.args();
    args.pt_id = device.replace(None, args.pt_id)?;
    cmd.set_args(&args);
    Ok(Reply::Back)
}

pub(super) fn pasid_attach(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let device = call.target.mock(cmd.id)?;
    let mut args: test::PasidAttach = cmd.args();
    args.pt_id = device.attach(Some(args.pasid), args.pt_id)?;
    cmd.set_args(&args);
    respond(call, cmd).inspect_err(|_| device.detach(Some(args.pasid)))?;
    Ok(Reply::Done)
}

pub(super) fn pasid_replace(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let device = call.target.mock(cmd.id)?;
    let mut args: test::PasidAttach = cmd.args();
    args.pt_id = device.replace(Some(args.pasid), args.pt_id)?;
    cmd.set_args(&args);
    Ok(Reply::Back)
}

pub(super) fn pasid_detach(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    call.target.mock(cmd.id)?.detach(Some(cmd.args::<test::PasidDetach>().pasid));
    Ok(Reply::Done)
}

pub(super) fn pasid_check(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let device = call.target.mock(cmd.id)?;
    let test::PasidCheck { pasid, hwpt_id } = cmd.args();
    let wanted = if hwpt_id == 0 { None } else { Some(call.target.hwpt(hwpt_id)?) };
    let found = device.hwpt(Some(pasid));
    if found.as_ref().map(Arc::as_ptr) == wanted.as_ref().map(Arc::as_ptr) {
        return Ok(Reply::Done);
    }
    let text = format!("PASID {pasid} is attached to page table {}, not {hwpt_id} (0 is none)", found.map_or(0, |table| table.id()));
    Err(Refusal::new(Errno::INVAL, text))
}

pub(super) fn check_iotlb(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let test::CheckIotlb { slot, iotlb } = cmd.args();
    let table = call.target.hwpt(cmd.id)?;
    let nested = table.nested().ok_or_else(|| no_such(cmd.id, "nested page table"))?;
    expect(nested.downcast::<MockNested>().is_some_and(|own| own.iotlb_is(slot, iotlb)), slot, iotlb)
}

pub(super) fn check_cache(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let test::CheckCache { slot, cache } = cmd.args();
    let device = call.target.device(cmd.id)?;
    expect(mock_of(&device)?.cache_is(slot, cache), slot, cache)
}

pub(super) fn trigger_iopf(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let test::TriggerIopf { dev_id, pasid, grpid, perm, addr } = cmd.args();
    let device = call.target.device(dev_id)?;
    fail::step(SELFTEST)?;
    let fault = PageFault { pasid: (pasid != 0).then_some(pasid), group: grpid, perm, addr, last: true };
    // The device learns that nobody handles its requests; the program that had it make one does not.
    let _ = device.report_fault(fault);
    Ok(Reply::Done)
}

pub(super) fn trigger_vevent(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let device = call.target.device(cmd.args::<test::TriggerVevent>().dev_id)?;
    fail::step(SELFTEST)?;
    device.report_vevent(test::VEVENTQ, |virt_id| (virt_id as u32).to_le_bytes().to_vec())?;
    Ok(Reply::Done)
}

fn expect(is: bool, slot: u32, value: u32) -> Answer<Reply> {
    if is { Ok(Reply::Done) } else { Err(Refusal::new(Errno::INVAL, format!("slot {slot} is not there, or does not hold {value:#x}"))) }
}

fn mock_of(device: &DeviceObject) -> Answer<&MockDriver> {
    device.driver().downcast().ok_or(Refusal::of(Errno::INVAL, "the device is no mock"))
}
