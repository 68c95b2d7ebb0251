//! IOMMU_IOAS_NOIOMMU_GET_PA: where in physical memory an IOVA lies, for programs that drive a device without an IOMMU. Here that is an output
//! address of the software IOMMU, the same that its page tables hold.

use crate::ioas_ops::{FLAGS, RESERVED, check_clear};
use crate::table::{Call, Reply};
use crate::{Answer, Context, Refusal, uapi};
use addr::{Address, Iova, Oa, PAGE_BYTES, PAGE_LG2, Page, Span};
use ioas::{Area, AreaState, Error, Ioas};
use rustix::io::Errno;

pub(crate) fn get_pa(call: &Call<'_, Context>, arg: &mut uapi::IoasNoiommuGetPa) -> Answer<Reply> {
    if !call.caller.process()?.sys_rawio {
        return Err(Refusal::of(Errno::PERM, "physical addresses are shown with CAP_SYS_RAWIO only"));
    }
    check_clear(arg.flags.into(), FLAGS)?;
    check_clear(arg.__reserved.into(), RESERVED)?;
    if arg.length == 0 {
        return Err(Refusal::of(Errno::INVAL, "the length is 0"));
    }
    let span = Span::from_len(Iova::new(arg.iova), arg.length).map_err(Error::from)?;
    let ioas = call.target.ioas(arg.ioas_id)?;
    let (oa, len) = piece(ioas.ioas(), span).ok_or(Error::NotMapped { at: Span::one(span.start()) })?;
    (arg.out_phys, arg.length) = (oa.get(), len);
    Ok(Reply::Back)
}

/// The output address of the first byte, and how many bytes of `span` follow it in one piece. Only what a domain shows stays where it is.
fn piece(ioas: &Ioas, span: Span<Iova>) -> Option<(Oa, u64)> {
    let mut found: Option<(Oa, u64)> = None;
    let mut rest = Some(span);
    while let Some(todo) = rest {
        let area = ioas.area_at(todo.start()).filter(|area| area.state() == AreaState::Live && !area.domains().is_empty());
        let Some((oa, len)) = area.and_then(|area| run(&area, todo)) else { break };
        let known = found.map_or(0, |(_, known)| known);
        if found.is_some_and(|(start, known)| oa != start.plus(known)) {
            break;
        }
        found = Some((found.map_or(oa, |(start, _)| start), known + len));
        rest = todo.start().checked_add(len).filter(|_| len <= todo.last_offset()).and_then(|next| Span::new(next, todo.last()));
    }
    found
}

/// The same within one area and one run of its backing.
fn run(area: &Area, span: Span<Iova>) -> Option<(Oa, u64)> {
    let part = span.intersect(area.span())?;
    let first = area.offset_bytes() + part.start().offset_from(area.span().start());
    let pages = Span::of(Page::new(first >> PAGE_LG2), Page::new((first + part.last_offset()) >> PAGE_LG2));
    let (extent, oa) = area.backing().extents(pages).next()?;
    let len = (extent.len() << PAGE_LG2) - first % PAGE_BYTES;
    Some((oa.plus(first % PAGE_BYTES), len.min(part.last_offset() + 1)))
}
