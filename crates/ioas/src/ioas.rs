//! One IO address space: its locks, and what they protect.

use crate::area::{Area, Policy, Seats};
use crate::placement::Space;
use crate::{Accessor, Error, LeafRule};
use addr::{Iova, Span};
use crossbeam_utils::sync::ShardedLock;
use iommu::{Device, Domain, Iommu};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, PoisonError, Weak};
use sync::prim::{
    RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use sync::rank::{self, Rank, RankGuard};

/// An IO address space: areas, and the domains that show them to devices.
///
/// ```
/// use addr::{Iova, Span};
/// use lockstep_ioas::{Ioas, MapAll, Place};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let rmp = std::sync::Arc::new(secure::Rmp::new());
/// # let config = iommu::Config { table_bytes: 1 << 24, ..Default::default() };
/// let iommu = iommu::Iommu::new(&config, rmp)?;
/// let ioas = Ioas::new(&iommu, std::sync::Arc::new(MapAll));
/// let memory = backing::Backing::memfd(4 << 20, backing::Frames::Contiguous)?;
/// let at = ioas.map_file(&memory, 0, 4 << 20, Place::Fixed(Iova::new(0x40_0000)), pt::Perm::RW)?;
/// let device = iommu.device("disk");
/// ioas.attach_device(&device)?;
/// assert_eq!(device.domain().and_then(|domain| domain.table().walk(at)).map(|leaf| leaf.size.bytes()), Some(4 << 20));
/// assert_eq!(ioas.unmap(Span::from_len(at, 4 << 20)?)?, 4 << 20);
/// # Ok(())
/// # }
/// ```
pub struct Ioas {
    pub(crate) iommu: Arc<Iommu>,
    pub(crate) policy: Arc<Policy>,
    /// Rank [`Rank::Domains`]: read by whatever installs or removes areas, so by many threads at once, written by attach, detach and options.
    domains: ShardedLock<Domains>,
    /// Rank [`Rank::AreaTree`], taken after the domains.
    space: RwLock<Space>,
    tickets: AtomicU64,
    /// What an area has before it is installed.
    pub(crate) no_seats: Seats,
}

/// Who shows the areas.
#[derive(Debug)]
pub(crate) struct Domains {
    pub(crate) seats: Seats,
    /// The domain that [`Ioas::attach_device`] made, with the devices on it.
    pub(crate) auto: Option<(Arc<Domain>, Vec<Arc<Device>>)>,
    /// Software users.
    pub(crate) accessors: Vec<Weak<Accessor>>,
    /// How many of them need whole pages.
    pub(crate) pinners: u32,
}

impl Domains {
    fn new(none: &Seats) -> Self {
        Self { seats: Arc::clone(none), auto: None, accessors: Vec::new(), pinners: 0 }
    }

    /// Whether areas are shown somewhere, so that their pages are pinned. Constant while the lock is held.
    pub(crate) fn show(&self) -> bool {
        !self.seats.is_empty()
    }
}

/// A lock's guard, and the note that it is held.
pub(crate) struct Ranked<G> {
    guard: G,
    _rank: RankGuard,
}

impl<G: Deref> Deref for Ranked<G> {
    type Target = G::Target;
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Ranked<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

impl Ioas {
    /// An empty address space whose domains belong to `iommu` and whose leaves follow `rule`.
    pub fn new(iommu: &Arc<Iommu>, rule: Arc<dyn LeafRule>) -> Arc<Self> {
        let no_seats: Seats = Arc::from([]);
        Arc::new(Self {
            iommu: Arc::clone(iommu),
            policy: Arc::new(Policy { rule, small_only: AtomicBool::new(false) }),
            domains: ShardedLock::new(Domains::new(&no_seats)),
            space: RwLock::new(Space::new()),
            // 0 and 1 are area states.
            tickets: AtomicU64::new(2),
            no_seats,
        })
    }

    /// The IOMMU that its domains belong to.
    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }

    /// What decides which pages have leaves.
    pub fn rule(&self) -> &Arc<dyn LeafRule> {
        &self.policy.rule
    }

    /// Its areas in ascending order, those in the making or going among them.
    pub fn areas(&self) -> Vec<Arc<Area>> {
        self.space().areas.iter().map(|(_, area)| Arc::clone(area)).collect()
    }

    /// The area that holds `iova`.
    pub fn area_at(&self, iova: Iova) -> Option<Arc<Area>> {
        self.space().areas.get(iova).map(|(_, area)| Arc::clone(area))
    }

    /// Its domains, in the order in which they came.
    pub fn domains(&self) -> Vec<Arc<Domain>> {
        self.read_domains().seats.iter().map(|seat| Arc::clone(&seat.domain)).collect()
    }

    pub(crate) fn read_domains(&self) -> Ranked<impl Deref<Target = Domains>> {
        let rank = rank::enter(Rank::Domains);
        Ranked { guard: self.domains.read().unwrap_or_else(PoisonError::into_inner), _rank: rank }
    }

    pub(crate) fn write_domains(&self) -> Ranked<impl DerefMut<Target = Domains>> {
        let rank = rank::enter(Rank::Domains);
        Ranked { guard: self.domains.write().unwrap_or_else(PoisonError::into_inner), _rank: rank }
    }

    pub(crate) fn space(&self) -> Ranked<impl Deref<Target = Space>> {
        let rank = rank::enter(Rank::AreaTree);
        Ranked { guard: self.space.read().unwrap_or_else(PoisonError::into_inner), _rank: rank }
    }

    pub(crate) fn space_mut(&self) -> Ranked<impl DerefMut<Target = Space>> {
        let rank = rank::enter(Rank::AreaTree);
        Ranked { guard: self.space.write().unwrap_or_else(PoisonError::into_inner), _rank: rank }
    }

    /// A number by which an unmap knows the areas that it closes.
    pub(crate) fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// # Errors
    /// `HeldByCaller`: a flush of these domains would wait for a slice that this thread holds (D-2).
    pub(crate) fn check_slices(domains: &Domains) -> Result<(), Error> {
        match domains.seats.iter().find(|seat| seat.domain.held_by_caller()) {
            Some(seat) => Err(Error::HeldByCaller { domain: seat.domain.id() }),
            None => Ok(()),
        }
    }
}

impl Drop for Ioas {
    /// Areas never keep an address space alive (rule 6 of the kernel's): they go with it.
    fn drop(&mut self) {
        let domains = std::mem::replace(&mut *self.write_domains(), Domains::new(&self.no_seats));
        for device in domains.auto.iter().flat_map(|(_, devices)| devices) {
            // A device whose slice this very thread holds stays on a domain that shows nothing any more.
            let _ = device.detach();
        }
        self.close(&domains, Span::whole());
    }
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let areas = self.space().areas.len();
        f.debug_struct("Ioas").field("areas", &areas).field("domains", &self.domains()).finish_non_exhaustive()
    }
}
