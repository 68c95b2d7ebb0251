//! IOMMU_IOAS_*: address spaces and what is mapped in them. Checks stand in the kernel's order, since callers see which comes first.

use crate::account::{Bill, Origin};
use crate::object::{Head, Object};
use crate::table::{Call, Reply};
use crate::uapi::{self, MAP_FIXED_IOVA, MAP_READABLE, MAP_WRITEABLE};
use crate::{Answer, Context, Memory, Opened, Refusal, dmabuf, guests};
use addr::{Address, Iova, OverlapError, PAGE_BYTES, Span, SpanMap};
use ioas::{Area, AreaState, Charge, Ioas, Place, Source};
use pt::Perm;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use zerocopy::IntoBytes;

/// An IOAS with an id.
pub struct IoasObject {
    head: Head,
    ioas: Arc<Ioas>,
}

impl IoasObject {
    /// Its id.
    pub fn id(&self) -> u32 {
        self.head.id()
    }

    /// The address space.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }
}

impl Object for IoasObject {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "IOAS"
    }

    /// Areas never keep an address space (rule 6).
    fn destroy(&self, _: &Context) {
        // Nobody is a user any more, so no domain is attached and no accessor is left.
        let _ = self.ioas.unmap_all();
    }
}

impl Context {
    /// The IOAS `id`.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn ioas(&self, id: u32) -> Answer<Arc<IoasObject>> {
        self.get(id, "IOAS")
    }

    /// A new IOAS.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC`.
    pub fn new_ioas(&self) -> Answer<Arc<IoasObject>> {
        let ioas = Ioas::new(self.host().iommu(), Arc::clone(self.host().rule()) as _);
        let object = Arc::new(IoasObject { head: Head::default(), ioas });
        self.add(Arc::clone(&object) as _)?;
        Ok(object)
    }
}

type Arg<'a> = Call<'a, Context>;

pub(crate) fn unsupported(what: &'static str) -> Refusal {
    Refusal::of(Errno::OPNOTSUPP, what)
}

/// A reserved field that is set, or a flag that nobody knows.
pub(crate) fn check_clear(bits: u64, what: &'static str) -> Answer {
    if bits == 0 { Ok(()) } else { Err(Refusal::new(Errno::OPNOTSUPP, format!("{what}: {bits:#x}"))) }
}

pub(crate) const RESERVED: &str = "a reserved field is not zero";
pub(crate) const FLAGS: &str = "a flag is set that this version does not know";

pub(crate) fn destroy(call: &Arg<'_>, arg: &mut uapi::Destroy) -> Answer<Reply> {
    call.target.check_unmapped(call.caller, arg.id)?;
    call.target.destroy(arg.id)?;
    Ok(Reply::Done)
}

pub(crate) fn alloc(call: &Arg<'_>, arg: &mut uapi::IoasAlloc) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    arg.out_ioas_id = call.target.new_ioas()?.head.id();
    Ok(Reply::New(arg.out_ioas_id))
}

pub(crate) fn iova_ranges(call: &Arg<'_>, arg: &mut uapi::IoasIovaRanges) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    let ioas = call.target.ioas(arg.ioas_id)?;
    let room = arg.num_iovas;
    let ranges = ioas.ioas.ranges();
    arg.num_iovas = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    arg.out_iova_alignment = ioas.ioas.alignment();
    let shown: Vec<_> =
        ranges.iter().take(room as usize).map(|span| uapi::IovaRange { start: span.start().get(), last: span.last().get() }).collect();
    call.caller.write(arg.allowed_iovas, shown.as_bytes()).or_else(|fault| if shown.is_empty() { Ok(()) } else { Err(fault) })?;
    if room < arg.num_iovas {
        let text = format!("there are {} ranges, and the array has room for {room}", arg.num_iovas);
        return Err(Refusal::new(Errno::MSGSIZE, text).and_write_back());
    }
    Ok(Reply::Back)
}

/// The most ranges that are taken from a caller at once.
const MOST_RANGES: usize = 1 << 20;

pub(crate) fn allow_iovas(call: &Arg<'_>, arg: &mut uapi::IoasAllowIovas) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    let ioas = call.target.ioas(arg.ioas_id)?;
    let mut list = SpanMap::new();
    for_each_range(call, arg.allowed_iovas, arg.num_iovas, |range| {
        if range.start >= range.last {
            return Err(Refusal::new(Errno::INVAL, format!("the range {:#x}..={:#x} is empty or backwards", range.start, range.last)));
        }
        if list.len() >= MOST_RANGES {
            return Err(Refusal::new(Errno::NOMEM, format!("more than {MOST_RANGES} ranges are not taken")));
        }
        let span = Span::of(Iova::new(range.start), Iova::new(range.last));
        list.insert(span, ()).map_err(|error| match error {
            OverlapError::Overlaps { met, .. } => Refusal::new(Errno::INVAL, format!("the ranges {span} and {met} overlap")),
            OverlapError::OutOfMemory(error) => error.into(),
        })
    })?;
    let list: Vec<_> = list.iter().map(|(span, ())| span).collect();
    ioas.ioas.allow(&list)?;
    Ok(Reply::Done)
}

/// Shows the ranges of an array one by one, so that the first that is wrong is the one that counts, whether it can be read or not.
fn for_each_range(call: &Arg<'_>, at: u64, count: u32, mut show: impl FnMut(uapi::IovaRange) -> Answer) -> Answer {
    const RANGE: u64 = size_of::<uapi::IovaRange>() as u64;
    let mut buffer = [uapi::IovaRange::default(); 64];
    let mut done = 0;
    while done < count {
        let at = at.wrapping_add(u64::from(done) * RANGE);
        let mut some = &mut buffer[..(count - done).min(64) as usize];
        if call.caller.read(at, some.as_mut_bytes()).is_err() {
            some = &mut some[..1];
            call.caller.read(at, some.as_mut_bytes())?;
        }
        some.iter().try_for_each(|range| show(*range))?;
        done += some.len() as u32;
    }
    Ok(())
}

/// Flags and IOVA of a map call, checked (rule 13).
fn check_map(flags: u32, reserved: u32, iova: u64, length: u64) -> Answer<(Place, Perm)> {
    check_clear(u64::from(flags & !(MAP_FIXED_IOVA | MAP_READABLE | MAP_WRITEABLE)), FLAGS)?;
    check_clear(reserved.into(), RESERVED)?;
    check_max(iova, "IOVA")?;
    check_max(length, "length")?;
    let perm = Perm::of(flags & MAP_READABLE != 0, flags & MAP_WRITEABLE != 0);
    if perm == Perm::NONE {
        return Err(Refusal::of(Errno::INVAL, "a mapping is readable, writeable, or both"));
    }
    Ok((place(flags, iova), perm))
}

fn place(flags: u32, iova: u64) -> Place {
    if flags & MAP_FIXED_IOVA != 0 { Place::Fixed(Iova::new(iova)) } else { Place::Auto }
}

fn check_max(value: u64, what: &str) -> Answer {
    if value == u64::MAX { Err(Refusal::new(Errno::OVERFLOW, format!("the {what} is the end of the address space"))) } else { Ok(()) }
}

impl Context {
    /// Maps the caller's memory, as IOAS_MAP and VFIO_IOMMU_MAP_DMA do.
    pub(crate) fn map_user(&self, caller: &dyn crate::Caller, ioas: &Ioas, va: u64, len: u64, place: Place, perm: Perm) -> Answer<Iova> {
        if va.checked_add(len).is_none() {
            return Err(Refusal::new(Errno::OVERFLOW, format!("{len:#x} bytes from {va:#x} wrap around the address space")));
        }
        check_length(len)?;
        check_huge(ioas, len, va, place)?;
        let process = caller.process()?;
        let _paying = self.payers.read().unwrap_or_else(PoisonError::into_inner);
        let Memory { backing, offset } = caller.memory(va, len)?;
        guests::smash_bytes(self.host(), &backing, offset, len)?;
        let bill = Bill::new(self.host().accounts(), Origin::User, &process, self.by_space.load(Ordering::Relaxed));
        let source = Source::new(&backing, offset, len, va, perm.allows(Perm::WRITE), Some(bill));
        Ok(ioas.map_source(&source, place, perm)?)
    }
}

/// What no memory has.
fn check_length(len: u64) -> Answer {
    match len {
        0 => Err(Refusal::of(Errno::INVAL, "the length is 0")),
        _ if len > u64::MAX - PAGE_BYTES => Err(Refusal::new(Errno::INVAL, format!("{len:#x} bytes are more than any memory"))),
        _ => Ok(()),
    }
}

/// No process and no file has that much, so nothing else can be said of its pages.
const HUGE: u64 = 1 << 47;

/// What is too long to have pages has a place, or has none, as anything else.
fn check_huge(ioas: &Ioas, len: u64, source: u64, place: Place) -> Answer {
    if len < HUGE {
        return Ok(());
    }
    ioas.room(place, len, source)?;
    Err(Refusal::new(Errno::NOMEM, format!("{len:#x} bytes are more than any memory")))
}

pub(crate) fn map(call: &Arg<'_>, arg: &mut uapi::IoasMap) -> Answer<Reply> {
    let (place, perm) = check_map(arg.flags, arg.__reserved, arg.iova, arg.length)?;
    let ioas = call.target.ioas(arg.ioas_id)?;
    let at = call.target.map_user(call.caller, &ioas.ioas, arg.user_va, arg.length, place, perm)?;
    arg.iova = at.get();
    Ok(Reply::Mapped { ioas: arg.ioas_id, iova: arg.iova, len: arg.length })
}

pub(crate) fn map_file(call: &Arg<'_>, arg: &mut uapi::IoasMapFile) -> Answer<Reply> {
    let (place, perm) = check_map(arg.flags, 0, arg.iova, arg.length)?;
    let context = call.target;
    let ioas = context.ioas(arg.ioas_id)?;
    if arg.length == 0 {
        return check_length(0).map(|()| Reply::Done);
    }
    if arg.start.checked_add(arg.length).is_none() {
        return Err(Refusal::new(Errno::OVERFLOW, format!("{:#x} bytes from {:#x} wrap around the file", arg.length, arg.start)));
    }
    let opened = call.caller.file(arg.fd)?;
    let process = call.caller.process()?;
    let by_space = context.by_space.load(Ordering::Relaxed);
    let _paying = context.payers.read().unwrap_or_else(PoisonError::into_inner);
    let writable = perm.allows(Perm::WRITE);
    let source = match opened {
        // What a dma-buf holds is not pinned, so nobody pays for it (rule 23).
        Opened::Ours(file) => {
            let Memory { backing, offset } = dmabuf::memory(&*file, arg.start, arg.length)?;
            Source::device(&backing, offset, arg.length, arg.start, writable)
        }
        Opened::Other => {
            check_length(arg.length)?;
            check_huge(&ioas.ioas, arg.length, arg.start, place)?;
            let Memory { backing, offset } = call.caller.file_memory(arg.fd, arg.start, arg.length)?;
            guests::smash_bytes(context.host(), &backing, offset, arg.length)?;
            let bill = Bill::new(context.host().accounts(), Origin::File, &process, by_space);
            Source::new(&backing, offset, arg.length, arg.start, writable, Some(bill))
        }
    };
    arg.iova = ioas.ioas.map_source(&source, place, perm)?.get();
    Ok(Reply::Mapped { ioas: arg.ioas_id, iova: arg.iova, len: arg.length })
}

pub(crate) fn copy(call: &Arg<'_>, arg: &mut uapi::IoasCopy) -> Answer<Reply> {
    check_clear(u64::from(arg.flags & !(MAP_FIXED_IOVA | MAP_READABLE | MAP_WRITEABLE)), FLAGS)?;
    for (value, what) in [(arg.length, "length"), (arg.src_iova, "source IOVA"), (arg.dst_iova, "IOVA")] {
        check_max(value, what)?;
    }
    let perm = Perm::of(arg.flags & MAP_READABLE != 0, arg.flags & MAP_WRITEABLE != 0);
    if perm == Perm::NONE {
        return Err(Refusal::of(Errno::INVAL, "a mapping is readable, writeable, or both"));
    }
    // A source that is not there, a hole in it, and a destination that is not there are all ENOENT; only a range that is none comes between.
    let src = call.target.ioas(arg.src_ioas_id)?;
    let span = Span::from_len(Iova::new(arg.src_iova), arg.length).map_err(ioas::Error::from)?;
    let dst = call.target.ioas(arg.dst_ioas_id)?;
    each_area(&src.ioas, span, |area, part| {
        let offset = area.offset_bytes() + part.start().offset_from(area.span().start());
        guests::smash_bytes(call.target.host(), area.backing(), offset, part.len())
    })?;
    arg.dst_iova = dst.ioas.copy(&src.ioas, span, place(arg.flags, arg.dst_iova), perm)?.get();
    Ok(Reply::Mapped { ioas: arg.dst_ioas_id, iova: arg.dst_iova, len: arg.length })
}

/// Shows the areas in `span`, each with its part of it, up to the first gap.
///
/// # Errors
/// `ENOENT` for a gap, or an area in the making or going; what `show` answers.
pub(crate) fn each_area(ioas: &Ioas, span: Span<Iova>, mut show: impl FnMut(&Arc<Area>, Span<Iova>) -> Answer) -> Answer {
    let mut next = Some(span);
    while let Some(rest) = next {
        let area = ioas.area_at(rest.start()).filter(|area| area.state() == AreaState::Live);
        let area = area.ok_or(ioas::Error::NotMapped { at: rest })?;
        let part = rest.intersect(area.span()).unwrap_or(rest);
        next = part.last().checked_add(1).and_then(|after| Span::new(after, span.last()));
        show(&area, part)?;
    }
    Ok(())
}

pub(crate) fn unmap(call: &Arg<'_>, arg: &mut uapi::IoasUnmap) -> Answer<Reply> {
    let ioas = call.target.ioas(arg.ioas_id)?;
    arg.length = if arg.iova == 0 && arg.length == u64::MAX {
        ioas.ioas.unmap_all()?
    } else {
        check_max(arg.iova, "IOVA")?;
        check_max(arg.length, "length")?;
        ioas.ioas.unmap(Span::from_len(Iova::new(arg.iova), arg.length).map_err(ioas::Error::from)?)?
    };
    Ok(Reply::Back)
}

pub(crate) fn change_process(call: &Arg<'_>, arg: &mut uapi::IoasChangeProcess) -> Answer<Reply> {
    check_clear(arg.__reserved.into(), RESERVED)?;
    let context = call.target;
    let process = call.caller.process()?;
    // No map begins or ends meanwhile.
    let _paying = context.payers.write().unwrap_or_else(PoisonError::into_inner);
    let areas: Vec<Arc<Area>> = context.all::<IoasObject>().iter().flat_map(|object| object.ioas.areas()).collect();
    if let Some(area) = areas.iter().find(|area| area.state() != AreaState::Live) {
        return Err(Refusal::new(Errno::BUSY, format!("the area at {} is being built or removed", area.span())));
    }
    let mut charges: Vec<Arc<dyn Charge>> = Vec::new();
    for area in &areas {
        let charge = area.source().and_then(|source| source.charge_ref());
        let charge = charge.filter(|charge| bill(&**charge).is_some_and(|bill| bill.origin == Origin::File)).ok_or_else(|| {
            Refusal::new(Errno::INVAL, format!("the area at {} is not a file; only files can change their process", area.span()))
        })?;
        if !charges.iter().any(|known| Arc::ptr_eq(known, &charge)) {
            charges.push(charge);
        }
    }
    let bills: Vec<&Bill> = charges.iter().filter_map(|charge| bill(&**charge)).collect();
    Bill::move_all(&bills, context.host().accounts(), &process)?;
    Ok(Reply::Done)
}

fn bill(charge: &dyn Charge) -> Option<&Bill> {
    charge.as_any().downcast_ref()
}
