//! Guests, as LOCKSTEP_IOAS_CONVERT knows them: by ASID, each in the hands of one open /dev/iommu, and what the secure world must know of the files
//! that their pages are in.
//!
//! Where a guest has its memory is learnt from its conversions and forgotten when pages are shared again: a page has a private address only while
//! it is private.

use crate::{Answer, Context, Host, Refusal};
use addr::{Address, Gpa, Oa, PAGE_LG2, Page, Span};
use backing::{Backing, BackingId, Kind, Listener, PageState, RestoreError, SpanGuard, Words};
use convert::{AuditReport, Auditor, Change, ConvertError, Owner, RecordedStage2, SmashError, Space, SpaceError};
use iommu::SystemRmp;
use rustix::io::Errno;
use secure::{Code, RmpSize, RmpState};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use sync::SpanLock;

/// A guest. Its stage 2 belongs to whoever runs it, so here it is on record only.
#[derive(Debug)]
pub(crate) struct Guest {
    space: Arc<Space>,
    /// Conversions of the same addresses take turns, so that what one enrolls no other dismisses.
    turns: SpanLock<Gpa>,
}

/// The guests of a host.
#[derive(Debug)]
pub(crate) struct Guests {
    rmp: Arc<SystemRmp>,
    by_asid: Mutex<BTreeMap<u32, Weak<Guest>>>,
    covered: Mutex<HashMap<BackingId, Covered>>,
    /// Memory with pages that the secure world keeps: it is never anybody's again, nor are its output addresses.
    kept: Mutex<Vec<Arc<Backing>>>,
}

/// A file that the secure world's table has entries for.
#[derive(Debug)]
struct Covered {
    backing: Weak<Backing>,
    window: Span<Oa>,
    /// Told when pages go.
    _ward: Arc<Ward>,
}

/// Private pages that the file's owner takes away are the host's again.
#[derive(Debug)]
struct Ward {
    guests: Weak<Guests>,
    backing: Weak<Backing>,
}

/// How far a conversion came.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Bytes from its start on.
    pub(crate) done: u64,
    pub(crate) why: Refusal,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub(crate) fn new(rmp: &Arc<SystemRmp>) -> Arc<Self> {
        Arc::new(Self { rmp: Arc::clone(rmp), by_asid: Mutex::default(), covered: Mutex::default(), kept: Mutex::default() })
    }

    /// A guest that no other open /dev/iommu has.
    fn claim(&self, asid: u32) -> Answer<Arc<Guest>> {
        if asid == 0 || asid >= MOST_ASIDS {
            return Err(Refusal::new(Errno::INVAL, format!("ASID {asid} is no guest's; those are 1 to {}", MOST_ASIDS - 1)));
        }
        let mut by_asid = lock(&self.by_asid);
        if by_asid.get(&asid).is_some_and(|guest| guest.strong_count() > 0) {
            return Err(Refusal::new(Errno::BUSY, format!("the guest with ASID {asid} belongs to another open /dev/iommu")));
        }
        let space = Space::new(&self.rmp, Arc::new(RecordedStage2::new()), asid);
        let guest = Arc::new(Guest { space, turns: SpanLock::new() });
        by_asid.insert(asid, Arc::downgrade(&guest));
        Ok(guest)
    }

    /// Gives a file's output addresses entries in the secure world's table, all the host's at first.
    fn cover(self: &Arc<Self>, backing: &Arc<Backing>) -> Answer {
        let mut covered = lock(&self.covered);
        // A window whose backing is gone has no leaves and no users, and may have become another's.
        covered.retain(|_, old| old.backing.strong_count() > 0 || self.rmp.remove_segment(old.window).is_err());
        if covered.contains_key(&backing.id()) {
            return Ok(());
        }
        let window = backing.window().widen(RmpSize::M2.lg2());
        let none = |why: &dyn std::fmt::Display| Refusal::new(Errno::NOMEM, format!("no entries of the secure world for {window}: {why}"));
        sync::fail::step("iommufd.rmp")?;
        let words = Words::new(SystemRmp::words_for(window)).map_err(|error| none(&error))?;
        self.rmp.add_segment(window, words).map_err(|error| none(&error))?;
        let ward = Arc::new(Ward { guests: Arc::downgrade(self), backing: Arc::downgrade(backing) });
        backing.add_listener(Arc::downgrade(&ward) as Weak<dyn Listener>);
        covered.insert(backing.id(), Covered { backing: Arc::downgrade(backing), window, _ward: ward });
        Ok(())
    }

    fn living(&self) -> Vec<Arc<Guest>> {
        lock(&self.by_asid).values().filter_map(Weak::upgrade).collect()
    }
}

/// ASIDs that an entry of the secure world's table can name, and 0, the host's.
const MOST_ASIDS: u32 = 0x3ff;

impl Listener for Ward {
    fn revoke(&self, pages: Span<Page>, _: &SpanGuard<'_>) {
        let (Some(guests), Some(backing)) = (self.guests.upgrade(), self.backing.upgrade()) else { return };
        let Some(pages) = pages.intersect(backing.pages()) else { return };
        for guest in guests.living() {
            for (_, gpas) in guest.space.gpas_of(&backing, pages) {
                // Without memory for the records an audit will say so; the pages are gone either way.
                let _ = guest.space.stage2().commit(gpas, false);
                let _ = guest.space.dismiss(gpas);
            }
        }
        if give_back(&guests.rmp, &backing, pages) {
            lock(&guests.kept).push(backing);
        }
    }

    fn restore(&self, _: Span<Page>, _: &SpanGuard<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Makes pages the host's in the secure world's table, without asking the guest. Answers whether some were kept there.
fn give_back(rmp: &SystemRmp, backing: &Backing, pages: Span<Page>) -> bool {
    let mut kept = false;
    for (run, oa) in backing.extents(pages) {
        let mut at = 0;
        while at < run.len() {
            let oa = oa.plus(at << PAGE_LG2);
            let entry = rmp.entry(oa);
            let large = entry.assigned() && entry.size() == RmpSize::M2;
            if large && !(oa.is_aligned(RmpSize::M2.lg2()) && run.len() - at >= RmpSize::M2.pages()) {
                let _ = rmp.psmash(oa.align_down(RmpSize::M2.lg2()));
            }
            let size = rmp.size_at(oa);
            if entry.assigned() && rmp.rmpupdate(oa, RmpState::shared(size)).is_err() {
                rmp.leak(oa);
                kept = true;
            }
            at += size.pages();
        }
    }
    kept
}

/// Makes pages of a file ready to be shown in small leaves, or at any IOVA: private pages come in the sizes of their entries.
///
/// # Errors
/// `ENOMEM`, `EBUSY`.
pub(crate) fn smash(host: &Host, backing: &Arc<Backing>, pages: Span<Page>) -> Answer {
    convert::smash(host.iommu().rmp(), backing, pages).map_err(|error| {
        let errno = if matches!(error, SmashError::Refused { .. }) { Errno::BUSY } else { Errno::NOMEM };
        Refusal::new(errno, error.to_string())
    })
}

/// As [`smash`], for `len` bytes from `offset` on, whether the file has them or not.
///
/// # Errors
/// As [`smash`].
pub(crate) fn smash_bytes(host: &Host, backing: &Arc<Backing>, offset: u64, len: u64) -> Answer {
    match Span::from_len(Page::new(offset), len) {
        Ok(bytes) if backing.kind() != Kind::Foreign => smash(host, backing, bytes.index(PAGE_LG2)),
        _ => Ok(()),
    }
}

impl Context {
    /// The guest that this context knows as `asid`.
    ///
    /// # Errors
    /// `EINVAL` for an ASID that cannot be, `EBUSY` when it is another context's.
    pub(crate) fn guest(&self, asid: u32) -> Answer<Arc<Guest>> {
        let mut guests = lock(&self.guests);
        if let Some(guest) = guests.get(&asid) {
            return Ok(Arc::clone(guest));
        }
        let guest = self.host().guests().claim(asid)?;
        guests.insert(asid, Arc::clone(&guest));
        Ok(guest)
    }

    /// The memory of a guest whose pages were converted here, for whoever runs it: it validates its pages there.
    pub fn guest_space(&self, asid: u32) -> Option<Arc<Space>> {
        lock(&self.guests).get(&asid).map(|guest| Arc::clone(&guest.space))
    }

    /// Compares the tables of one IOAS; with `populated`, holes in its memory count as well.
    pub(crate) fn audit(&self, ioas: &ioas::Ioas, populated: bool) -> AuditReport {
        let guests: Vec<_> = lock(&self.guests).values().map(|guest| Arc::clone(&guest.space)).collect();
        let auditor = Auditor::of_guests(self.host().iommu().rmp(), guests.iter().map(|guest| &**guest));
        let auditor = if populated { auditor.populated() } else { auditor };
        auditor.audit(ioas)
    }

    /// The guests end with their context: what was theirs is the host's again.
    pub(crate) fn end_guests(&self) {
        let guests = std::mem::take(&mut *lock(&self.guests));
        for guest in guests.into_values() {
            for (gpas, backing, first) in guest.space.slots() {
                let pages = Span::of(first, first.plus(gpas.last_offset() >> PAGE_LG2));
                let mut kept = false;
                for (run, _) in backing.states(pages).filter(|(_, state)| *state == PageState::Private).collect::<Vec<_>>() {
                    kept |= guest.release(gpas.project(pages.unindex(PAGE_LG2), run.unindex::<Page>(PAGE_LG2)));
                }
                let _ = guest.space.dismiss(gpas);
                if kept {
                    lock(&self.host().guests().kept).push(backing);
                }
            }
        }
    }
}

impl Guest {
    /// Changes the owner of `pages`, which are the guest's at `gpas`.
    ///
    /// # Errors
    /// Why it stopped, and where.
    pub(crate) fn convert(
        &self,
        guests: &Arc<Guests>,
        gpas: Span<Gpa>,
        backing: &Arc<Backing>,
        pages: Span<Page>,
        to: Owner,
    ) -> Result<(), Stopped> {
        let stopped = |why| Stopped { done: 0, why };
        guests.cover(backing).map_err(stopped)?;
        let _turn = self.turns.lock(gpas);
        self.space.enroll(gpas, backing, pages).map_err(|error| stopped(refusal_of_place(&error)))?;
        let mut result = self.space.convert(&[Change { span: gpas, to }]);
        if let Err(ConvertError::NotMapped { .. }) = result {
            result = self.space.restore(gpas).map(|()| convert::Done::default());
        }
        self.forget(gpas, backing, pages);
        result.map(|_| ()).map_err(|error| Stopped { done: done(&error, gpas), why: refusal(&error) })
    }

    /// Only pages that are private to the guest have an address with it.
    fn forget(&self, gpas: Span<Gpa>, backing: &Backing, pages: Span<Page>) {
        for (run, state) in backing.states(pages) {
            let ours = || self.space.rmp().entry(backing.oa(run.start())).asid() == self.space.asid();
            if state != PageState::Private || !ours() {
                // Kept without memory to forget it: the guest's close finds that it is shared.
                let _ = self.space.dismiss(gpas.project(pages.unindex(PAGE_LG2), run.unindex::<Page>(PAGE_LG2)));
            }
        }
    }

    /// Takes pages back. Answers whether the secure world kept some.
    fn release(&self, gpas: Span<Gpa>) -> bool {
        let mut kept = false;
        let mut next = Some(gpas);
        while let Some(rest) = next {
            next = match self.space.convert(&[Change { span: rest, to: Owner::Shared }]) {
                Ok(_) => None,
                Err(error) => {
                    kept = true;
                    // A page that is kept is leaked and counted; those behind it are not.
                    let bad = error.span().filter(|_| matches!(error, ConvertError::Leaks { .. } | ConvertError::Leaked { .. }));
                    bad.and_then(|bad| bad.last().checked_add(1)).and_then(|after| Span::new(after.max(rest.start()), gpas.last()))
                }
            };
        }
        kept
    }
}

/// How much of `gpas`, from its start on, was converted before this happened.
fn done(error: &ConvertError, gpas: Span<Gpa>) -> u64 {
    match error {
        ConvertError::Refused { step: convert::Step::Switch, span, .. } | ConvertError::Leaks { span, .. } => {
            span.start().offset_from(gpas.start())
        }
        _ => 0,
    }
}

fn refusal_of_place(error: &SpaceError) -> Refusal {
    let errno = if matches!(error, SpaceError::OutOfMemory(_)) { Errno::NOMEM } else { Errno::EXIST };
    Refusal::new(errno, error.to_string())
}

fn refusal(error: &ConvertError) -> Refusal {
    let errno = match error {
        ConvertError::Span(_) | ConvertError::Twice { .. } => Errno::INVAL,
        ConvertError::NoMemory { .. } => Errno::NOENT,
        ConvertError::Reserve { .. } | ConvertError::NotMapped { .. } => Errno::NOMEM,
        ConvertError::NotOurs { .. } => Errno::EXIST,
        ConvertError::Busy { .. } => Errno::AGAIN,
        ConvertError::Refused { code: Code::FailInUse | Code::FailOverlap, .. } => Errno::BUSY,
        ConvertError::Refused { code: Code::FailInput, .. } => Errno::INVAL,
        ConvertError::Refused { .. }
        | ConvertError::Leaked { .. }
        | ConvertError::Leaks { .. }
        | ConvertError::Stage2 { .. }
        | ConvertError::NotDiscarded { .. } => Errno::IO,
    };
    Refusal::new(errno, error.to_string())
}
