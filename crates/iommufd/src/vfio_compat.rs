//! The VFIO type 1 container on top of one IOAS, so that programs older than iommufd work (rules 68 to 70).

use crate::ioas_ops::{IoasObject, RESERVED, check_clear, unsupported};
use crate::object::Object as _;
use crate::our_ops::split;
use crate::table::{Call, Reply};
use crate::uapi::vfio::{self, CapDmaAvail, CapHeader, CapIovaRange, DmaMap, DmaUnmap, Type1Info};
use crate::uapi::{self, VFIO_IOAS_CLEAR, VFIO_IOAS_GET, VFIO_IOAS_SET};
use crate::{Answer, Caller, Context, Host, Refusal};
use addr::{Address, Iova, PAGE_BYTES, Span};
use ioas::{Error, Ioas, Place};
use pt::Perm;
use rustix::io::Errno;
use std::sync::{Arc, PoisonError, Weak};
use zerocopy::IntoBytes;

type Arg<'a> = Call<'a, Context>;

impl Context {
    fn compat(&self) -> Answer<Arc<IoasObject>> {
        let chosen = self.vfio_ioas.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        chosen
            .filter(|ioas| !ioas.head().is_gone())
            .ok_or(Refusal::of(Errno::NODEV, "no IOAS has been chosen for VFIO calls; IOMMU_VFIO_IOAS does that"))
    }
}

pub(crate) fn vfio_ioas(call: &Arg<'_>, arg: &mut uapi::VfioIoas) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    let context = call.target;
    let choose = |ioas| *context.vfio_ioas.lock().unwrap_or_else(PoisonError::into_inner) = ioas;
    match arg.op {
        VFIO_IOAS_GET => {
            arg.ioas_id = context.compat()?.id();
            return Ok(Reply::Back);
        }
        VFIO_IOAS_SET => choose(Arc::downgrade(&context.ioas(arg.ioas_id)?)),
        VFIO_IOAS_CLEAR => choose(Weak::new()),
        _ => return Err(unsupported("the IOAS of VFIO calls is got, set or cleared")),
    }
    Ok(Reply::Done)
}

#[expect(clippy::unnecessary_wraps, reason = "the shape of every handler")]
pub(crate) fn api_version(_: &Arc<Context>, _: &dyn Caller, _: u64) -> Answer<Reply> {
    Ok(Reply::Value(0))
}

pub(crate) fn check_extension(context: &Arc<Context>, _: &dyn Caller, extension: u64) -> Answer<Reply> {
    let has = match extension {
        vfio::TYPE1_IOMMU | vfio::TYPE1V2_IOMMU | vfio::UNMAP_ALL => true,
        // A software IOMMU is always coherent with the processor.
        vfio::DMA_CC_IOMMU => context.compat().map(|_| true)?,
        _ => false,
    };
    Ok(Reply::Value(has.into()))
}

pub(crate) fn set_iommu(context: &Arc<Context>, _: &dyn Caller, kind: u64) -> Answer<Reply> {
    if ![vfio::TYPE1_IOMMU, vfio::TYPE1V2_IOMMU].contains(&kind) {
        return Err(Refusal::new(Errno::INVAL, format!("container type {kind} is not there; use TYPE1v2 (3) or TYPE1 (1)")));
    }
    let ioas = context.compat()?;
    if kind == vfio::TYPE1_IOMMU {
        // What was mapped page by page can be cut anywhere.
        ioas.ioas().set_large_leaves(false)?;
    }
    Ok(Reply::Done)
}

/// Leaf sizes that every domain has. What is smaller than a page cannot be used through this interface (rule 69).
///
/// The numbers are sets of bits: the larger one of two has the larger size.
fn page_sizes(ioas: &Ioas) -> u64 {
    let all = ioas.domains().iter().fold(u64::MAX, |sizes, domain| sizes & domain.sizes().0);
    let sizes = if all & (PAGE_BYTES - 1) == 0 { all } else { all & !(PAGE_BYTES - 1) | PAGE_BYTES };
    sizes.max(ioas.alignment())
}

pub(crate) fn get_info(call: &Arg<'_>, arg: &mut Type1Info) -> Answer<Reply> {
    let ioas = call.target.compat()?;
    let ranges = ioas.ioas().ranges();
    let (first, avail) = (size_of::<Type1Info>(), size_of::<CapDmaAvail>().next_multiple_of(8));
    let mut capabilities = vec![0; avail];
    let header = CapDmaAvail { id: vfio::CAP_DMA_AVAIL, version: 1, next: (first + avail) as u32, avail: u32::MAX };
    capabilities[..size_of::<CapDmaAvail>()].copy_from_slice(header.as_bytes());
    let header = CapHeader { id: vfio::CAP_IOVA_RANGE, version: 1, next: 0 };
    let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let list = CapIovaRange { id: header.id, version: header.version, next: header.next, nr_iovas: count, reserved: 0 };
    capabilities.extend_from_slice(list.as_bytes());
    for span in &ranges {
        capabilities.extend_from_slice([span.start().get(), span.last().get()].as_bytes());
    }
    let (room, needed) = (arg.argsz as usize, first + capabilities.len());
    (arg.cap_offset, arg.pad) = (0, 0);
    if room >= needed {
        call.caller.write(call.at.wrapping_add(first as u64), &capabilities)?;
        arg.cap_offset = first as u32;
    }
    arg.argsz = u32::try_from(needed).unwrap_or(u32::MAX);
    arg.flags = vfio::INFO_PGSIZES | vfio::INFO_CAPS;
    arg.iova_pgsizes = page_sizes(ioas.ioas());
    Ok(Reply::Back)
}

pub(crate) fn map_dma(call: &Arg<'_>, arg: &mut DmaMap) -> Answer<Reply> {
    if arg.flags & !(vfio::DMA_MAP_READ | vfio::DMA_MAP_WRITE) != 0 {
        return Err(Refusal::of(Errno::INVAL, "only READ and WRITE are known"));
    }
    let ioas = call.target.compat()?;
    let perm = Perm::of(arg.flags & vfio::DMA_MAP_READ != 0, arg.flags & vfio::DMA_MAP_WRITE != 0);
    if perm == Perm::NONE {
        return Err(Refusal::of(Errno::INVAL, "a mapping is readable, writeable, or both"));
    }
    call.target.map_user(call.caller, ioas.ioas(), arg.vaddr, arg.size, Place::Fixed(Iova::new(arg.iova)), perm)?;
    Ok(Reply::Done)
}

pub(crate) fn unmap_dma(call: &Arg<'_>, arg: &mut DmaUnmap) -> Answer<Reply> {
    if arg.flags & !vfio::DMA_UNMAP_ALL != 0 {
        return Err(Refusal::of(Errno::INVAL, "only ALL is known"));
    }
    let object = call.target.compat()?;
    let ioas = object.ioas();
    if arg.flags & vfio::DMA_UNMAP_ALL != 0 {
        if arg.iova != 0 || arg.size != 0 {
            return Err(Refusal::of(Errno::INVAL, "with ALL the range is given as 0 and 0"));
        }
        arg.size = ioas.unmap_all()?;
        return Ok(Reply::Back);
    }
    let span = Span::from_len(Iova::new(arg.iova), arg.size).map_err(Error::from)?;
    if !ioas.large_leaves() {
        // Type 1 may cut areas (rule 70).
        let end = span.last().checked_add(1);
        end.into_iter().chain([span.start()]).try_for_each(|at| split_where_mapped(call.target.host(), ioas, at))?;
    }
    arg.size = match ioas.unmap(span) {
        Err(Error::NotMapped { .. }) => 0,
        unmapped => unmapped?,
    };
    Ok(Reply::Back)
}

/// Cuts the area around `at`, if there is one.
fn split_where_mapped(host: &Host, ioas: &Ioas, at: Iova) -> Answer {
    if ioas.area_at(at).is_none() {
        return Ok(());
    }
    split(host, ioas, at).or_else(|refusal| if refusal.errno == Errno::NOENT { Ok(()) } else { Err(refusal) })
}
