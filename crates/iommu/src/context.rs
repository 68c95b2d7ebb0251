//! What one context knows: its view of the device's domain, and how an address becomes a checked place in host memory.
//!
//! All of it but [`Context::probe`] runs inside a guard; [`crate::Dma`] opens and closes it.

use crate::device::Followed;
use crate::{Access, Device, Domain, Fault, FaultKind, SystemRmp};
use addr::{Address, Gpa, Iova, Lg2, Oa, Span};
use backing::{HostAddr, Owner, Windows};
use iotlb::{Hit, Identity, Iotlb, View};
use pt::{Leaf, Perm};
use secure::{Refusal, Requester};
use std::sync::Arc;
use std::time::Duration;
use sync::{Slot, fail};

/// Where a leaf leads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    /// Output address of the leaf's first byte.
    oa: Oa,
    /// Where the host has the whole leaf, when it has it in one piece.
    pub(crate) host: Option<HostAddr>,
}

/// A translated and checked address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// The leaf's IOVAs.
    pub(crate) leaf: Span<Iova>,
    pub(crate) perm: Perm,
    /// Output address of the IOVA that was asked for.
    pub(crate) oa: Oa,
    /// Host memory of that IOVA, when the host has the whole leaf in one piece.
    host: Option<HostAddr>,
    /// Bytes from that IOVA to the end of the leaf, less one.
    pub(crate) rest: u64,
}

impl Place {
    #[inline(always)]
    pub(crate) fn of(hit: &Hit<Target>, iova: Iova) -> Self {
        let into = iova.offset_from(hit.start);
        let leaf = Span::block(hit.start, hit.size.0);
        let host = hit.value.host.map(|host| host.plus(into));
        Self { leaf, perm: hit.perm, oa: hit.value.oa.plus(into), host, rest: leaf.last_offset() - into }
    }

    /// Where to touch `len` bytes, which the caller keeps inside the leaf.
    #[inline(always)]
    pub(crate) fn host(&self, len: u64) -> Option<HostAddr> {
        self.host.or_else(|| host_in_window(self.oa, len))
    }

    /// Who copies `len` bytes that this process sees nowhere, and where they begin in the owner's pages. The caller keeps them inside the leaf.
    #[cold]
    pub(crate) fn owner(&self, len: u64) -> Option<(Arc<dyn Owner>, u64)> {
        let backing = Windows::find(self.oa)?;
        Some((Arc::clone(backing.owner()?), backing.offset_of(self.oa, len)?))
    }
}

#[cold]
fn host_in_window(oa: Oa, len: u64) -> Option<HostAddr> {
    Windows::find(oa)?.host(oa, len)
}

/// Why an address has no place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    kind: FaultKind,
    oa: Option<Oa>,
    refusal: Option<Refusal>,
}

impl Refused {
    pub(crate) fn by(kind: FaultKind, oa: Option<Oa>) -> Self {
        Self { kind, oa, refusal: None }
    }

    fn is_size_mismatch(&self) -> bool {
        self.refusal.is_some_and(|refusal| refusal.size_mismatch)
    }
}

/// Larger leaves are cached and checked in pieces of this size, as hardware does it: for a piece the check reads one summary of the secure world's table, for the
/// whole leaf it would read one for each such piece in it.
const LARGEST: Lg2 = Lg2::G1;

/// How often a check is made again because a split came in between.
const RECHECKS: u32 = 64;

/// How a context fared, besides its IOTLB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) walks: u64,
    pub(crate) rechecks: u64,
    pub(crate) faults: u64,
}

pub(crate) struct Context {
    view: View<Followed, Target>,
    rmp: Arc<SystemRmp>,
    pub(crate) counters: Counters,
    /// A walk's result that the planted fault `iommu.late_fill` keeps for the next guard.
    late: Option<Leaf>,
}

impl Context {
    pub(crate) fn new(device: &Arc<Device>) -> Self {
        let iommu = device.iommu();
        let view = View::new(Followed(Arc::clone(device)), iommu.iotlb_entries(), iommu.walk_cache_entries());
        Self { view, rmp: Arc::clone(device.iommu().rmp()), counters: Counters::default(), late: None }
    }

    #[inline]
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.view.source().0
    }

    #[inline]
    fn domain(&self) -> Option<&Arc<Domain>> {
        self.view.identity().domain()
    }

    /// Opens a guard of the device's domain, with everything applied that was logged before.
    #[inline]
    pub(crate) fn enter(&mut self, slot: &mut Slot) -> Result<(), Refused> {
        if !self.view.enter(slot) {
            return Err(Refused::by(FaultKind::NotAttached, None));
        }
        if let Some(leaf) = self.late.take() {
            self.fill(leaf);
        }
        Ok(())
    }

    /// Opens a guard if nothing changed since the last one, so that what was probed before holds in it. False, and no guard, otherwise.
    #[inline(always)]
    pub(crate) fn enter_unchanged(&mut self, slot: &mut Slot) -> bool {
        self.late.is_none() && self.view.enter_unchanged(slot)
    }

    pub(crate) fn iotlb(&self) -> &Iotlb<Target> {
        self.view.iotlb()
    }

    pub(crate) fn walk_hits(&self) -> u64 {
        self.view.walks().hits()
    }

    /// What most accesses find: a cached leaf that the page table lets be used so. It holds in the guard that is open, and in the one that
    /// [`Context::enter_unchanged`] opens next; what [`Context::confirm`] says of it inside that guard is still to be asked.
    #[inline(always)]
    pub(crate) fn probe(&self, iova: Iova, access: Access) -> Option<Hit<Target>> {
        self.view.iotlb().probe(iova).filter(|hit| hit.perm.allows(wanted(access)))
    }

    /// Whether the secure world lets the whole leaf be used, too, and no dirty bit has to be set. Counts the hit if so.
    #[inline(always)]
    pub(crate) fn confirm(&mut self, hit: &Hit<Target>, access: Access) -> bool {
        let good = self.allows_as_it_is(hit, access);
        if good {
            self.count_hit();
        }
        good
    }

    #[inline(always)]
    pub(crate) fn count_hit(&mut self) {
        self.view.iotlb_mut().count_hit();
    }

    #[inline(always)]
    fn allows_as_it_is(&self, hit: &Hit<Target>, access: Access) -> bool {
        self.secure_allows(hit, access) && (access == Access::Read || hit.dirty || !self.tracks_dirty())
    }

    /// Translates `iova` and has the whole leaf checked, on a hit as on a miss.
    #[inline(always)]
    pub(crate) fn resolve(&mut self, iova: Iova, access: Access) -> Result<Place, Refused> {
        let hit = self.view.iotlb_mut().lookup(iova);
        if let Some(hit) = &hit
            && hit.perm.allows(wanted(access))
            && self.allows_as_it_is(hit, access)
        {
            return Ok(Place::of(hit, iova));
        }
        self.resolve_in_full(hit, iova, access)
    }

    /// What [`Context::resolve`] does when there is no hit, when something is wrong, or when a dirty bit has to be set.
    #[inline(never)]
    fn resolve_in_full(&mut self, hit: Option<Hit<Target>>, iova: Iova, access: Access) -> Result<Place, Refused> {
        let hit = match hit {
            Some(hit) => hit,
            None => self.miss(iova)?,
        };
        let hit = match self.check(&hit, iova, access) {
            Ok(()) => hit,
            Err(refused) if refused.is_size_mismatch() => self.check_again(iova, access)?,
            Err(refused) => return Err(refused),
        };
        if access == Access::Write && !hit.dirty {
            self.mark_dirty(iova, &hit);
        }
        Ok(Place::of(&hit, iova))
    }

    #[cold]
    fn miss(&mut self, iova: Iova) -> Result<Hit<Target>, Refused> {
        let leaf = self.walk(iova)?;
        if fail::planted("iommu.late_fill") {
            self.late = Some(leaf);
            // An unmap that comes now is over, but for this guard, when the fill is made.
            std::thread::sleep(Duration::from_micros(100));
            return Ok(Hit::uncached(leaf.iova, leaf.size, leaf.perm, target(&leaf)));
        }
        Ok(self.fill(leaf))
    }

    /// The leaf that answers for `iova`, or of a leaf above [`LARGEST`] that much around it.
    fn walk(&mut self, iova: Iova) -> Result<Leaf, Refused> {
        self.counters.walks += 1;
        let domain = self.domain().ok_or(Refused::by(FaultKind::NotAttached, None))?;
        let leaf = if self.view.walks().is_on() { self.walk_low(iova) } else { domain.table().walk(iova) };
        let leaf = leaf.ok_or(Refused::by(FaultKind::NotMapped, None))?;
        if self.rmp.checks_pages() {
            return Ok(page_of(leaf, iova));
        }
        if leaf.size <= LARGEST {
            return Ok(leaf);
        }
        let start = iova.align_down(LARGEST.0);
        Ok(Leaf { iova: start, oa: leaf.oa_of(start), size: LARGEST, ..leaf })
    }

    /// The walk, from the lowest table that is cached. Apart, so that who caches no tables has a walk of its own.
    #[inline(never)]
    fn walk_low(&mut self, iova: Iova) -> Option<Leaf> {
        let from = self.view.walks_mut().lookup(iova);
        let mut table = None;
        let leaf = self.domain()?.table().walk_from(from, iova, |lowest| table = Some(lowest));
        if let Some(table) = table {
            self.view.walks_mut().fill(iova, table);
        }
        leaf
    }

    fn fill(&mut self, leaf: Leaf) -> Hit<Target> {
        // What the device may not do at all is not cached as allowed, so a hit need not ask again.
        let perm = leaf.perm.and(self.view.identity().rights);
        self.view.iotlb_mut().fill(leaf.iova, leaf.size, perm, target(&leaf))
    }

    /// The page table's permissions, and the secure world's answer for the whole leaf: hardware checks what the walk returned, not the
    /// bytes that are accessed.
    fn check(&self, hit: &Hit<Target>, iova: Iova, access: Access) -> Result<(), Refused> {
        let oa = Some(hit.value.oa.plus(iova.offset_from(hit.start)));
        if !hit.perm.allows(wanted(access)) {
            let kind = if self.view.identity().rights.allows(wanted(access)) { FaultKind::NoPermission } else { FaultKind::NoRight };
            return Err(Refused::by(kind, oa));
        }
        let who = self.view.identity().requester.map_err(|kind| Refused::by(kind, oa))?;
        let answer = self.ask(who, hit, access);
        answer.map_err(|refusal| Refused { kind: FaultKind::Secure, oa, refusal: Some(refusal) })
    }

    #[inline(always)]
    fn secure_allows(&self, hit: &Hit<Target>, access: Access) -> bool {
        match self.view.identity().requester {
            Ok(who) => self.ask(who, hit, access).is_ok(),
            Err(_) => false,
        }
    }

    #[inline(always)]
    fn ask(&self, who: Requester, hit: &Hit<Target>, access: Access) -> Result<(), Refusal> {
        let leaf = Span::block(hit.value.oa, hit.size.0);
        let address = Gpa::new(hit.start.get().wrapping_add(self.view.identity().gpa_offset));
        self.rmp.check_device(who, leaf, address, access.into())
    }

    #[inline(always)]
    fn tracks_dirty(&self) -> bool {
        self.domain().is_some_and(|domain| domain.tracks_dirty())
    }

    /// A size mismatch may mean that a 2 MiB entry and its leaf are being split right now. It counts only when a fresh walk finds it again and the
    /// smash sequence did not move meanwhile (D-6); the table itself lets it pass while a split is under way and nothing else is wrong.
    #[cold]
    fn check_again(&mut self, iova: Iova, access: Access) -> Result<Hit<Target>, Refused> {
        let mut oa = self.walk(iova)?.oa;
        let mut attempt = 0;
        loop {
            self.counters.rechecks += 1;
            attempt += 1;
            let before = self.rmp.smash_seq(oa);
            let leaf = self.walk(iova)?;
            self.view.iotlb_mut().invalidate(leaf.span());
            let hit = self.fill(leaf);
            match self.check(&hit, iova, access) {
                Err(refused) if refused.is_size_mismatch() => {
                    // A reader does not wait: when splits follow each other that closely, it is refused in the end (I-15).
                    if self.rmp.smash_seq(oa) == before || attempt == RECHECKS {
                        return Err(refused);
                    }
                    oa = leaf.oa;
                }
                answer => return answer.map(|()| hit),
            }
        }
    }

    /// Once per cached entry: whoever clears the bit in the table has the entry invalidated.
    fn mark_dirty(&mut self, iova: Iova, hit: &Hit<Target>) {
        if let Some(domain) = self.domain().filter(|domain| domain.tracks_dirty()) {
            domain.table().mark_dirty(iova);
            self.view.iotlb_mut().set_dirty(hit);
        }
    }

    /// Writes the fault down, and answers it.
    #[cold]
    pub(crate) fn fault(&mut self, iova: Iova, access: Access, done: u64, refused: Refused) -> Fault {
        self.counters.faults += 1;
        let Refused { kind, oa, refusal } = refused;
        let domain = self.domain().map(|domain| domain.id());
        let fault = Fault { device: self.device().id(), domain, iova, access, table: kind.refused_by(), reason: kind, oa, done, refusal };
        self.device().record(fault);
        fault
    }
}

/// That page of a larger leaf, where the secure world judges pages and not leaves.
fn page_of(leaf: Leaf, iova: Iova) -> Leaf {
    if leaf.size <= Lg2::K4 {
        return leaf;
    }
    let page = iova.align_down(Lg2::K4.0);
    Leaf { iova: page, oa: leaf.oa.plus(page.offset_from(leaf.iova)), size: Lg2::K4, ..leaf }
}

#[inline(always)]
fn wanted(access: Access) -> Perm {
    if access == Access::Read { Perm::READ } else { Perm::WRITE }
}

fn target(leaf: &Leaf) -> Target {
    Target { oa: leaf.oa, host: Windows::find(leaf.oa).and_then(|backing| backing.host(leaf.oa, leaf.size.bytes())) }
}
