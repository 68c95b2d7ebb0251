//! The ioctls of a device file, one table. The order of checks is the kernel's.

use crate::binding::Binding;
use crate::device::{Cdev, Hardware, unbound};
use crate::interrupts::{Data, KINDS, Kind};
use crate::regions::{COUNT, Region};
use crate::uapi::{
    self, AttachPt, BIND_TOKEN, BindIommufd, DEVICE_PCI, DEVICE_RESET, DetachPt, DeviceInfo, FEATURE_GET, FEATURE_MASK, FEATURE_PROBE,
    FEATURE_SET, Feature, HotReset, HotResetInfo, IrqInfo, IrqSet, PT_PASID, RegionInfo,
};
use iommufd::table::{Call, Ioctl, Reply};
use iommufd::uapi::{Struct, io};
use iommufd::{Answer, Caller, Refusal, ioctl};
use rustix::io::Errno;
use std::mem::offset_of;
use std::sync::Arc;

/// Every ioctl of a device file: names for whoever watches or fails them, structures for the coverage table.
pub static TABLE: &[Ioctl<Cdev>] = &[
    ioctl!(uapi::GET_INFO, "VFIO_DEVICE_GET_INFO", DeviceInfo, min 16, Argsz, get_info),
    ioctl!(uapi::GET_REGION_INFO, "VFIO_DEVICE_GET_REGION_INFO", RegionInfo, min 32, Argsz, get_region_info),
    ioctl!(uapi::GET_IRQ_INFO, "VFIO_DEVICE_GET_IRQ_INFO", IrqInfo, min 16, Argsz, get_irq_info),
    ioctl!(uapi::SET_IRQS, "VFIO_DEVICE_SET_IRQS", IrqSet, min 20, Argsz, set_irqs),
    ioctl!(uapi::RESET, "VFIO_DEVICE_RESET", reset),
    ioctl!(uapi::GET_PCI_HOT_RESET_INFO, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", HotResetInfo, min 12, Argsz, no_hot_reset_info),
    ioctl!(uapi::PCI_HOT_RESET, "VFIO_DEVICE_PCI_HOT_RESET", HotReset, min 12, Argsz, no_hot_reset),
    ioctl!(uapi::FEATURE, "VFIO_DEVICE_FEATURE", Feature, min 8, Argsz, feature),
    ioctl!(uapi::BIND_IOMMUFD, "VFIO_DEVICE_BIND_IOMMUFD", BindIommufd, min 16, Argsz, bind),
    ioctl!(uapi::ATTACH_IOMMUFD_PT, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", AttachPt, min 12, Argsz, attach),
    ioctl!(uapi::DETACH_IOMMUFD_PT, "VFIO_DEVICE_DETACH_IOMMUFD_PT", DetachPt, min 8, Argsz, detach),
];

/// The entry of a command.
pub(crate) fn find(command: u32) -> Option<&'static Ioctl<Cdev>> {
    TABLE.iter().find(|entry| io(entry.nr) == command)
}

fn invalid(why: String) -> Refusal {
    Refusal::new(Errno::INVAL, why)
}

fn get_info(call: &Call<'_, Cdev>, info: &mut DeviceInfo) -> Answer<Reply> {
    call.target.with(|_| Ok(()))?;
    (info.flags, info.num_regions, info.num_irqs) = (DEVICE_RESET | DEVICE_PCI, COUNT, KINDS);
    (info.cap_offset, info.pad) = (0, 0);
    Ok(Reply::Back)
}

fn get_region_info(call: &Call<'_, Cdev>, info: &mut RegionInfo) -> Answer<Reply> {
    call.target.with(|hardware| {
        let region = Region::new(info.index).ok_or_else(|| invalid(format!("the device has no region {}", info.index)))?;
        (info.flags, info.cap_offset) = (region.flags(hardware.buffer.is_mappable()), 0);
        (info.size, info.offset) = (region.size(), region.offset());
        Ok(Reply::Back)
    })
}

fn get_irq_info(call: &Call<'_, Cdev>, info: &mut IrqInfo) -> Answer<Reply> {
    call.target.with(|_| Ok(()))?;
    let kind = Kind::new(info.index).ok_or_else(|| invalid(format!("a PCI device has no interrupts of kind {}", info.index)))?;
    (info.flags, info.count) = (kind.flags(), kind.count());
    Ok(Reply::Back)
}

fn set_irqs(call: &Call<'_, Cdev>, request: &mut IrqSet) -> Answer<Reply> {
    call.target.with(|hardware| {
        let mut bytes = vec![0; Data::bytes_of(request)?];
        if !bytes.is_empty() {
            call.caller.read(call.at.wrapping_add(IrqSet::SIZE as u64), &mut bytes)?;
        }
        let done = hardware.interrupts.set(request, &Data::new(request, bytes), &|fd| call.caller.descriptor(fd));
        // What was asserted before a line was there is signalled now.
        hardware.settle();
        done.map(|()| Reply::Done)
    })
}

fn reset(target: &Arc<Cdev>, _: &dyn Caller, _: u64) -> Answer<Reply> {
    target.with(|hardware| hardware.reset(&target.place))?;
    Ok(Reply::Done)
}

fn no_hot_reset_info(call: &Call<'_, Cdev>, _: &mut HotResetInfo) -> Answer<Reply> {
    no_bus_reset(call)
}

fn no_hot_reset(call: &Call<'_, Cdev>, _: &mut HotReset) -> Answer<Reply> {
    no_bus_reset(call)
}

fn no_bus_reset(call: &Call<'_, Cdev>) -> Answer<Reply> {
    call.target
        .with(|_| Err(Refusal::of(Errno::NODEV, "the device's slot and bus cannot be reset; VFIO_DEVICE_RESET resets the device alone")))
}

fn feature(call: &Call<'_, Cdev>, feature: &mut Feature) -> Answer<Reply> {
    call.target.with(|_| Ok(()))?;
    let (known, both) = (FEATURE_MASK | FEATURE_GET | FEATURE_SET | FEATURE_PROBE, FEATURE_GET | FEATURE_SET);
    if feature.flags & !known != 0 || feature.flags & both == both && feature.flags & FEATURE_PROBE == 0 {
        return Err(invalid(format!("the flags {:#x} of the feature make no sense", feature.flags)));
    }
    let text = format!("the device has no feature {}: no migration, no dirty logging of its own", feature.flags & FEATURE_MASK);
    Err(Refusal::new(Errno::NOTTY, text))
}

fn bind(call: &Call<'_, Cdev>, args: &mut BindIommufd) -> Answer<Reply> {
    if args.flags & !BIND_TOKEN != 0 || args.iommufd < 0 {
        return Err(invalid(format!("flags {:#x} and descriptor {}: unknown flags, or no descriptor", args.flags, args.iommufd)));
    }
    let cdev = call.target;
    let mut binding = cdev.lock_binding();
    if binding.is_some() {
        return Err(invalid("the device is bound already; each open is bound once".into()));
    }
    let context = Binding::context(call.caller, args.iommufd, &cdev.place)?;
    if args.flags & BIND_TOKEN != 0 {
        let mut token = [0; 16];
        call.caller.read(args.token_uuid_ptr, &mut token)?;
        return Err(invalid("a token is for virtual functions, and the device is none".into()));
    }
    cdev.place.take()?;
    let bound = Hardware::new(&cdev.place, call.caller).and_then(|hardware| Ok((hardware, Binding::new(context, &cdev.place)?)));
    let (hardware, new) = bound.inspect_err(|_| cdev.place.give_back())?;
    args.out_devid = new.id();
    *cdev.lock_hardware() = Some(hardware);
    *binding = Some(new);
    Ok(Reply::New(args.out_devid))
}

/// The PASID of an attach or detach, if it is for one.
fn pasid(flags: u32, argsz: u32, size: usize, pasid: u32) -> Answer<Option<u32>> {
    match flags {
        0 => Ok(None),
        PT_PASID if argsz as usize >= size => Ok(Some(pasid)),
        PT_PASID => Err(invalid(format!("argsz {argsz} has no room for a PASID"))),
        _ => Err(invalid(format!("unknown flags {flags:#x}"))),
    }
}

fn attach(call: &Call<'_, Cdev>, args: &mut AttachPt) -> Answer<Reply> {
    call.target.with(|_| Ok(()))?;
    let pasid = pasid(args.flags, args.argsz, AttachPt::SIZE, args.pasid)?;
    let binding = call.target.lock_binding();
    let binding = binding.as_ref().ok_or_else(unbound)?;
    args.pt_id = binding.attach(pasid, args.pt_id)?;
    let answer = call.caller.write(call.at.wrapping_add(offset_of!(AttachPt, pt_id) as u64), &args.pt_id.to_le_bytes());
    answer.inspect_err(|_| binding.detach(pasid))?;
    Ok(Reply::Done)
}

fn detach(call: &Call<'_, Cdev>, args: &mut DetachPt) -> Answer<Reply> {
    call.target.with(|_| Ok(()))?;
    let pasid = pasid(args.flags, args.argsz, DetachPt::SIZE, args.pasid)?;
    call.target.lock_binding().as_ref().ok_or_else(unbound)?.detach(pasid);
    Ok(Reply::Done)
}
