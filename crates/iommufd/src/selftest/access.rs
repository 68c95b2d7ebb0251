//! The software accessor that the test operations make: pins pages, compares what they are, copies (rules 28, 40 to 45).
//!
//! Its descriptor keeps the context alive; closing it drops its pins and ends it.

use super::{Arg, SELFTEST, respond};
use crate::ioas_ops::{IoasObject, check_clear, unsupported};
use crate::object::{Head, Held, Object};
use crate::table::Reply;
use crate::uapi::test::{self, TestCmd};
use crate::{Answer, Caller, Context, File, Open, Opened, Refusal};
use addr::{Iova, PAGE_BYTES, Span};
use ioas::{Accessor, Pin};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use sync::fail;

/// The most that one operation takes.
const MOST_BYTES: u64 = 16 << 20;

/// An access with an id. Its maker is a user of it, so that nobody else can destroy it.
#[derive(Debug, Default)]
struct AccessObject(Head);

impl Object for AccessObject {
    fn head(&self) -> &Head {
        &self.0
    }

    fn kind(&self) -> &'static str {
        "access"
    }

    fn destroy(&self, _: &Context) {}
}

/// What is pinned, by item.
#[derive(Debug, Default)]
struct Pins {
    next: u32,
    items: BTreeMap<u32, Pin>,
}

impl Pins {
    fn take(&mut self, span: Span<Iova>) -> Vec<Pin> {
        let gone: Vec<u32> = self.items.iter().filter(|(_, pin)| pin.span().overlaps(span)).map(|(id, _)| *id).collect();
        gone.iter().filter_map(|id| self.items.remove(id)).collect()
    }
}

/// Everything that ends with the descriptor. Fields are dropped in this order.
#[derive(Debug)]
struct Access {
    accessor: Arc<Accessor>,
    pins: Arc<Mutex<Pins>>,
    /// `None` while it moves only.
    ioas: Mutex<Held<IoasObject>>,
    held: Option<Held<AccessObject>>,
    open: Open,
}

impl Drop for Access {
    fn drop(&mut self) {
        self.accessor.leave();
        let id = self.held.take().map(|held| held.head().id());
        // Only this held it.
        id.into_iter().for_each(|id| _ = self.open.context().destroy(id));
    }
}

/// The descriptor of an access.
#[derive(Debug)]
pub(crate) struct AccessFile(Mutex<Option<Arc<Access>>>);

impl File for AccessFile {
    fn kind(&self) -> &'static str {
        "access"
    }

    fn released(&self) {
        let access = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(access);
    }
}

fn lock(pins: &Mutex<Pins>) -> MutexGuard<'_, Pins> {
    pins.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The access behind a descriptor of the caller.
fn find(caller: &dyn Caller, fd: u32) -> Answer<Arc<Access>> {
    let file = match caller.file(fd.cast_signed()) {
        Ok(Opened::Ours(file)) => Some(file),
        _ => None,
    };
    let found = file.as_deref().and_then(|file| file.downcast::<AccessFile>());
    let access = found.and_then(|own| own.0.lock().unwrap_or_else(PoisonError::into_inner).clone());
    access.ok_or_else(|| Refusal::new(Errno::BADFD, format!("descriptor {fd} is no access; CREATE_ACCESS makes one")))
}

pub(super) fn create(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let mut args: test::CreateAccess = cmd.args();
    check_clear(u64::from(args.flags & !test::ACCESS_NEEDS_PIN), "an access either pins or does not")?;
    fail::step(SELFTEST)?;
    let context = call.target;
    let object = Arc::new(AccessObject::default());
    let held = Held::new(&object)?;
    context.add(Arc::clone(&object) as _)?;
    let abandon = |refusal: Refusal| {
        context.abandon(&*object);
        refusal
    };
    let ioas = context.ioas(cmd.id).and_then(|ioas| Held::new(&ioas)).map_err(abandon)?;
    let pins: Arc<Mutex<Pins>> = Arc::default();
    let told = Arc::clone(&pins);
    let unmapped = move |span: Span<Iova>| {
        let gone = lock(&told).take(span);
        drop(gone);
    };
    let pinning = args.flags & test::ACCESS_NEEDS_PIN != 0;
    let accessor = ioas.ioas().accessor(pinning, Arc::new(unmapped)).map_err(|error| abandon(error.into()))?;
    let access = Access { accessor, pins, ioas: Mutex::new(ioas), held: Some(held), open: context.hold() };
    let file = AccessFile(Mutex::new(Some(Arc::new(access))));
    args.out_access_fd = call.caller.install(Arc::new(file))?.cast_unsigned();
    cmd.set_args(&args);
    Ok(Reply::Back)
}

pub(super) fn replace_ioas(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let access = find(call.caller, cmd.id)?;
    let args: test::AccessReplaceIoas = cmd.args();
    let ioas = access.open.context().ioas(args.ioas_id)?;
    let mut home = access.ioas.lock().unwrap_or_else(PoisonError::into_inner);
    let held = Held::new(&ioas)?;
    access.accessor.move_to(ioas.ioas())?;
    let old = std::mem::replace(&mut *home, held);
    drop(old);
    Ok(Reply::Done)
}

/// The span of an operation, whose address may be an area's number and an offset in it.
fn span_of(access: &Access, flags: u32, iova: u64, length: u64) -> Answer<Span<Iova>> {
    let at = if flags & test::ACCESS_BY_AREA == 0 {
        Iova::new(iova)
    } else {
        let (nth, offset) = (iova & 0xffff_ffff, iova >> 32);
        let area = access.accessor.ioas().and_then(|ioas| ioas.areas().into_iter().nth(nth as usize));
        area.map_or(Iova::new(0), |area| Iova::new(area.span().start().get().wrapping_add(offset)))
    };
    Ok(Span::from_len(at, length).map_err(ioas::Error::from)?)
}

fn check_most(length: u64) -> Answer {
    if length > MOST_BYTES {
        return Err(Refusal::new(Errno::NOMEM, format!("{length:#x} bytes are more than the {MOST_BYTES:#x} that one operation takes")));
    }
    Ok(())
}

pub(super) fn pages(call: &Arg<'_>, cmd: &mut TestCmd) -> Answer<Reply> {
    let mut args: test::AccessPages = cmd.args();
    check_clear(u64::from(args.flags & !(test::ACCESS_WRITE | test::ACCESS_BY_AREA)), "a flag is set that this operation does not know")?;
    check_most(args.length)?;
    let access = find(call.caller, cmd.id)?;
    if !access.accessor.is_pinning() {
        return Err(unsupported("the access was made without the right to pin"));
    }
    let span = span_of(&access, args.flags, args.iova, args.length)?;
    fail::step(SELFTEST)?;
    // Whoever unmaps waits here until the pin is on the list and can be dropped.
    let mut pins = lock(&access.pins);
    let pin = access.accessor.pin(span, args.flags & test::ACCESS_WRITE != 0)?;
    if args.uptr != 0 {
        check_names(call.caller, &pin, args.uptr.wrapping_sub(span.start().get() % PAGE_BYTES))?;
    }
    args.out_access_pages_id = pins.next;
    cmd.set_args(&args);
    respond(call, cmd)?;
    pins.items.insert(args.out_access_pages_id, pin);
    pins.next += 1;
    Ok(Reply::Done)
}

/// # Errors
/// `EBADE` when a pinned page is another one than the caller's, `EOVERFLOW` when its addresses end before, `EFAULT`.
fn check_names(caller: &dyn Caller, pin: &Pin, uptr: u64) -> Answer {
    let mut va = Some(uptr);
    for (backing, pages) in pin.pages() {
        for page in pages.blocks(0) {
            let at = va.ok_or(Refusal::of(Errno::OVERFLOW, "the addresses end before the pages do"))?;
            va = at.checked_add(PAGE_BYTES);
            if va.is_none() {
                return Err(Refusal::of(Errno::OVERFLOW, "there is no page at the very end of the address space"));
            }
            if caller.page_name(at)? != backing.page_name(page.start()) {
                return Err(Refusal::new(
                    Errno::BADE,
                    format!("{} of the access is another page than the caller's at {at:#x}", page.start()),
                ));
            }
        }
    }
    Ok(())
}

pub(super) fn destroy_pages(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let access = find(call.caller, cmd.id)?;
    let item = cmd.args::<test::DestroyAccessPages>().access_pages_id;
    let pin = lock(&access.pins).items.remove(&item);
    access.accessor.unpin(pin.ok_or_else(|| Refusal::new(Errno::NOENT, format!("this access has pinned nothing as item {item}")))?);
    Ok(Reply::Done)
}

pub(super) fn rw(call: &Arg<'_>, cmd: &TestCmd) -> Answer<Reply> {
    let args: test::AccessRw = cmd.args();
    check_most(args.length)?;
    let access = find(call.caller, cmd.id)?;
    let span = span_of(&access, args.flags, args.iova, args.length)?;
    fail::step(SELFTEST)?;
    let mut bytes = vec![0; args.length as usize];
    if args.flags & test::ACCESS_WRITE != 0 {
        call.caller.read(args.uptr, &mut bytes)?;
        access.accessor.write(span.start(), &bytes)?;
    } else {
        access.accessor.read(span.start(), &mut bytes)?;
        call.caller.write(args.uptr, &bytes)?;
    }
    Ok(Reply::Done)
}
