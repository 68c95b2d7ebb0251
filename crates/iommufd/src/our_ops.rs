//! What the kernel lacks: cut, convert, audit. Documented beside their structures in [`crate::uapi::ours`].

use crate::ioas_ops::{FLAGS, RESERVED, check_clear, each_area};
use crate::table::{Call, Reply};
use crate::uapi::ours::{AUDIT_POPULATED, CONVERT_TO_PRIVATE, CONVERT_TO_SHARED, IoasAudit, IoasConvert, IoasCut};
use crate::{Answer, Context, Host, Refusal, guests};
use addr::{Address, Gpa, Iova, PAGE_LG2, Page, Span};
use backing::{Backing, Kind, PageState};
use convert::Owner;
use ioas::Area;
use rustix::io::Errno;
use std::fmt::Write;
use std::sync::Arc;

type Arg<'a> = Call<'a, Context>;

pub(crate) fn cut(call: &Arg<'_>, arg: &mut IoasCut) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    check_clear(arg.__reserved.into(), RESERVED)?;
    let object = call.target.ioas(arg.ioas_id)?;
    split(call.target.host(), object.ioas(), Iova::new(arg.iova))?;
    Ok(Reply::Done)
}

/// Cuts an area. Another device's memory comes in one piece and stays so.
pub(crate) fn split(host: &Host, ioas: &ioas::Ioas, at: Iova) -> Answer {
    if let Some(area) = ioas.area_at(at).filter(|area| area.span().start() != at) {
        let offset = area.offset_bytes() + at.offset_from(area.span().start());
        // Inside of a large private entry, that is split as well. Where a block of the file begins nothing crosses but shared leaves.
        if !offset.is_multiple_of(addr::Lg2::M2.bytes()) {
            guests::smash_bytes(host, area.backing(), offset, 1)?;
        }
    }
    ioas.split(at).map_err(|error| match error {
        ioas::Error::DeviceMemory { .. } => Refusal::new(Errno::OPNOTSUPP, error.to_string()),
        error => error.into(),
    })
}

/// The most that is converted under one hold of its pages: what comes after can be waited for, and told apart when something fails.
const BATCH_LG2: u8 = 30;

pub(crate) fn convert(call: &Arg<'_>, arg: &mut IoasConvert) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    check_clear(arg.__reserved.into(), RESERVED)?;
    arg.out_done = 0;
    // Whatever happens, the caller learns how far it came.
    convert_from(call, arg).map(|()| Reply::Back).map_err(Refusal::and_write_back)
}

fn convert_from(call: &Arg<'_>, arg: &mut IoasConvert) -> Answer {
    let to = match arg.to {
        CONVERT_TO_PRIVATE => Owner::Private,
        CONVERT_TO_SHARED => Owner::Shared,
        other => return Err(Refusal::new(Errno::INVAL, format!("pages turn private (1) or shared (2), not {other}"))),
    };
    if arg.asid == 0 {
        return Err(Refusal::of(Errno::INVAL, "ASID 0 is the host's; give the guest's"));
    }
    let object = call.target.ioas(arg.ioas_id)?;
    let span = Span::aligned(Iova::new(arg.iova), arg.length, PAGE_LG2).map_err(ioas::Error::from)?;
    let whole = Span::aligned(Gpa::new(arg.gpa), arg.length, PAGE_LG2).map_err(ioas::Error::from)?;
    let parts = parts(object.ioas(), span)?;
    let (guest, guests) = (call.target.guest(arg.asid)?, call.target.host().guests());
    for Part { iovas, pages, backing } in &parts {
        let gpas = whole.project(span, *iovas);
        for chunk in gpas.blocks(BATCH_LG2) {
            let pages = pages.unindex::<Page>(PAGE_LG2).project(gpas, chunk).index(PAGE_LG2);
            if let Err(stopped) = guest.convert(guests, chunk, backing, pages, to) {
                arg.out_done += stopped.done;
                return Err(stopped.why);
            }
            arg.out_done += chunk.len();
        }
    }
    Ok(())
}

/// What a part of one area stands for.
struct Part {
    iovas: Span<Iova>,
    pages: Span<Page>,
    backing: Arc<Backing>,
}

/// What stands behind `span`, area by area.
fn parts(ioas: &ioas::Ioas, span: Span<Iova>) -> Answer<Vec<Part>> {
    let mut parts = Vec::new();
    each_area(ioas, span, |area, iovas| {
        parts.push(Part { iovas, pages: check_area(area, iovas)?, backing: Arc::clone(area.backing()) });
        Ok(())
    })?;
    Ok(parts)
}

/// The pages behind a part of an area, which must be whole pages of a file.
fn check_area(area: &Area, part: Span<Iova>) -> Answer<Span<Page>> {
    let backing = area.backing();
    if !matches!(backing.kind(), Kind::Memfd | Kind::HugeMemfd | Kind::GuestMemfd) {
        return Err(Refusal::new(Errno::INVAL, format!("{part} is not in a file; only pages of files change their owner")));
    }
    let first = area.offset_bytes() + part.start().offset_from(area.span().start());
    let pages = backing.pages_at(first, part.len())?;
    match backing.states(pages).find(|(_, state)| *state == PageState::Absent) {
        Some((hole, _)) => Err(Refusal::new(Errno::INVAL, format!("pages {hole} of {part} are absent: the file has a hole there"))),
        None => Ok(pages),
    }
}

pub(crate) fn audit(call: &Arg<'_>, arg: &mut IoasAudit) -> Answer<Reply> {
    check_clear(u64::from(arg.flags & !AUDIT_POPULATED), FLAGS)?;
    let object = call.target.ioas(arg.ioas_id)?;
    let report = call.target.audit(object.ioas(), arg.flags & AUDIT_POPULATED != 0);
    (arg.out_areas, arg.out_leaves) = (object.ioas().areas().len() as u64, report.leaves);
    (arg.out_entries, arg.out_differences) = (report.entries, report.count);
    if arg.data_uptr != 0 {
        let mut text = String::new();
        for difference in &report.differences {
            let _ = writeln!(text, "{difference}");
        }
        let shown = text.len().min(arg.data_len as usize);
        call.caller.write(arg.data_uptr, &text.as_bytes()[..shown])?;
        arg.data_len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    }
    Ok(Reply::Back)
}
