//! Questions about what is mapped and what is pinned: translations against the caller's own pages, pins counted over everything that is open.

use super::{Arg, SELFTEST, ops};
use crate::ioas_ops::IoasObject;
use crate::table::Reply;
use crate::uapi::test::{self, TestCmd};
use crate::{Answer, Caller, Host, Refusal};
use addr::{Iova, PAGE_BYTES};
use backing::{PageName, Windows};
use iommu::Domain;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::LazyLock;
use sync::{Slot, fail};

/// The most pages that one operation looks at, in the caller or in what is pinned: a client that has terabytes keeps no others waiting.
const MOST_PAGES: u64 = 1 << 22;

fn check_most(pages: u64) -> Answer {
    if pages > MOST_PAGES {
        return Err(Refusal::new(Errno::NOMEM, format!("{pages} pages are more than the {MOST_PAGES} that one operation looks at")));
    }
    Ok(())
}

/// Compares, granule by granule, where a domain leads with the page that the caller has there.
pub(super) fn map(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let test::CheckMap { iova, length, uptr } = cmd.args();
    let domain = ops::domain_of(call.target, cmd.id)?;
    let granule = domain.smallest().bytes();
    if [iova, length, uptr].iter().any(|value| !value.is_multiple_of(granule)) || uptr.checked_add(length).is_none() {
        return Err(Refusal::new(Errno::INVAL, format!("IOVA, length and address must be multiples of the domain's {granule:#x}")));
    }
    check_most(length / PAGE_BYTES)?;
    let mut slot = call.target.host().iommu().readers().slot();
    let mut own = None;
    for offset in (0..length).step_by(granule as usize) {
        let va = uptr + offset;
        let page = va / PAGE_BYTES;
        if own.is_none_or(|(known, _)| known != page) {
            own = Some((page, call.caller.page_name(page * PAGE_BYTES)?));
        }
        let at = iova.wrapping_add(offset);
        let found = translate(&mut slot, &domain, Iova::new(at));
        if found != own.map(|(_, name)| (name, va % PAGE_BYTES)) {
            return Err(Refusal::new(Errno::INVAL, format!("IOVA {at:#x} leads to {found:x?}; the caller has {own:x?} at {va:#x}")));
        }
    }
    Ok(Reply::Done)
}

/// Where an IOVA leads: the page, and the byte in it.
fn translate(slot: &mut Slot, domain: &Domain, iova: Iova) -> Option<(PageName, u64)> {
    let oa = {
        let _inside = slot.guard(domain.id());
        domain.table().walk(iova)?.oa_of(iova)
    };
    let backing = Windows::find(oa)?;
    Some((backing.page_name(backing.page_of(oa)?), oa.get() % PAGE_BYTES))
}

/// Compares how often each page of the caller is pinned, by all contexts of the host together.
pub(super) fn refs(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let test::CheckRefs { length, uptr, refs, .. } = cmd.args();
    let end = uptr.checked_add(length).filter(|_| length.is_multiple_of(PAGE_BYTES) && uptr.is_multiple_of(PAGE_BYTES));
    let end = end.ok_or(Refusal::of(Errno::INVAL, "address and length must be whole pages, and not wrap"))?;
    check_most(length / PAGE_BYTES)?;
    let pins = count_pins(call.target.host())?;
    if pins.is_empty() && refs == 0 {
        return touch(call.caller, uptr, end);
    }
    for va in (uptr..end).step_by(PAGE_BYTES as usize) {
        let name = call.caller.page_name(va)?;
        let count = pins.get(&name).copied().unwrap_or(0);
        if count != refs && !is_compound(&name) {
            return Err(Refusal::new(Errno::IO, format!("the page at {va:#x} is pinned {count} times, not {refs}")));
        }
    }
    Ok(Reply::Done)
}

/// # Errors
/// `EFAULT` when there is no page somewhere.
fn touch(caller: &dyn Caller, uptr: u64, end: u64) -> Answer<Reply> {
    for va in (uptr..end).step_by(PAGE_BYTES as usize) {
        caller.read(va, &mut [0])?;
    }
    Ok(Reply::Done)
}

/// How often each page is pinned: once for each pages object that has it pinned.
fn count_pins(host: &Host) -> Answer<HashMap<PageName, u32>> {
    let ioases = host.contexts().into_iter().flat_map(|context| context.all::<IoasObject>());
    let mut sources: Vec<_> = ioases.flat_map(|object| object.ioas().sources()).collect();
    // Copies in another address space share theirs.
    sources.sort_unstable_by_key(|source| std::sync::Arc::as_ptr(source).addr());
    sources.dedup_by(|a, b| std::sync::Arc::ptr_eq(a, b));
    check_most(sources.iter().map(|source| source.pinned_pages()).sum())?;
    let mut pins = HashMap::new();
    for source in sources {
        for page in source.pinned().into_iter().flat_map(|span| span.blocks(0)) {
            *pins.entry(source.backing().page_name(page.start())).or_insert(0) += 1;
        }
    }
    Ok(pins)
}

/// Whether it is part of a huge page, whose pins are counted for the whole.
fn is_compound(name: &PageName) -> bool {
    /// The file systems that huge pages of memfds come from, one for each size.
    static HUGE: LazyLock<Vec<u64>> = LazyLock::new(|| {
        let sizes = [MemfdFlags::HUGETLB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB];
        let files = sizes.into_iter().filter_map(|size| rustix::fs::memfd_create(c"huge", size | MemfdFlags::CLOEXEC).ok());
        files.filter_map(|file| rustix::fs::fstat(file).ok()).map(|stat| stat.st_dev).collect()
    });
    matches!(name, PageName::File { device, .. } if HUGE.contains(device))
}

/// Marks what the bits at `uptr` say as a device would have by writing.
pub(super) fn dirty(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let mut args: test::Dirty = cmd.args();
    let test::Dirty { iova, length, page_size, uptr, .. } = args;
    let whole = page_size != 0 && iova.is_multiple_of(page_size) && length.is_multiple_of(page_size);
    if !whole || length == 0 || uptr == 0 {
        return Err(Refusal::of(Errno::INVAL, "IOVA and length must be multiples of page_size, and not empty; a bitmap must be given"));
    }
    let domain = ops::domain_of(call.target, cmd.id)?;
    if !domain.tracks_dirty() {
        return Err(Refusal::of(Errno::INVAL, "the page table does not track dirty pages; SET_DIRTY_TRACKING starts that"));
    }
    let count = length / page_size;
    check_most(count)?;
    fail::step(SELFTEST)?;
    let mut slot = call.target.host().iommu().readers().slot();
    let mut bytes = [0; 4096];
    args.out_nr_dirty = 0;
    for first in (0..count).step_by(bytes.len() * 8) {
        let bits = (count - first).min(bytes.len() as u64 * 8);
        let part = &mut bytes[..bits.div_ceil(8) as usize];
        call.caller.read(uptr.wrapping_add(first / 8), part)?;
        let _inside = slot.guard(domain.id());
        for bit in (0..bits).filter(|bit| part[(bit / 8) as usize] >> (bit % 8) & 1 != 0) {
            let at = iova.wrapping_add((first + bit) * page_size);
            domain.table().mark_dirty(Iova::new(at));
            args.out_nr_dirty += 1;
        }
    }
    cmd.set_args(&args);
    Ok(Reply::Back)
}
