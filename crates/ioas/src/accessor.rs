//! Accessors: software that uses an address space as a device does, and that must let go of pages before they are unmapped.
//!
//! A pin keeps an area's pages in place; an unmap that meets one closes the area to new pins, asks every accessor to drop what it has there,
//! and tries again. So that the answer can be an unpin, nothing is locked while they are asked.

use crate::area::{Area, AreaState};
use crate::{Error, Ioas, Source};
use addr::{Iova, OutOfMemory, PAGE_BYTES, Page, Span};
use backing::Backing;
use pt::Perm;
use std::fmt;
use std::sync::{Arc, PoisonError, Weak};
use sync::fail;
use sync::prim::Mutex;

/// Told which span is about to be unmapped: drop every pin that meets it before returning.
pub type Unmapped = Arc<dyn Fn(Span<Iova>) + Send + Sync>;

/// A software user of an address space. It keeps the address space; dropping it leaves.
pub struct Accessor {
    me: Weak<Accessor>,
    /// `None` while it moves and after it left.
    home: Mutex<Option<Arc<Ioas>>>,
    pinning: bool,
    unmapped: Unmapped,
}

/// Pages that stay where they are until this is dropped. It keeps its address space, and remembers exactly what was pinned.
#[must_use = "dropping it unpins the pages"]
pub struct Pin {
    span: Span<Iova>,
    parts: Vec<(Arc<Area>, Span<Page>)>,
    /// Last, because the areas go with it.
    ioas: Arc<Ioas>,
}

/// Areas that cannot be unmapped until this is dropped.
#[must_use = "dropping it unlocks the areas"]
pub struct AreaLocks {
    areas: Vec<Arc<Area>>,
    _ioas: Arc<Ioas>,
}

impl Ioas {
    /// A new accessor. One that pins needs whole pages: the alignment rises to a page. `unmapped` is called by unmaps that meet pins,
    /// with no lock held, possibly for spans in which this accessor has none.
    ///
    /// # Errors
    /// `InUse` when it pins and an area does not keep to whole pages; no memory.
    pub fn accessor(self: &Arc<Self>, pinning: bool, unmapped: Unmapped) -> Result<Arc<Accessor>, Error> {
        let accessor = Arc::new_cyclic(|me| Accessor { me: Weak::clone(me), home: Mutex::new(None), pinning, unmapped });
        self.join(&accessor)?;
        accessor.set_home(Some(Arc::clone(self)));
        Ok(accessor)
    }

    fn join(&self, accessor: &Accessor) -> Result<(), Error> {
        fail::step("ioas.accessor")?;
        let mut domains = self.write_domains();
        domains.accessors.try_reserve(1).map_err(|_| OutOfMemory)?;
        if accessor.pinning {
            let mut space = self.space_mut();
            let align = space.align();
            space.set_align(align.max(PAGE_BYTES))?;
            domains.pinners += 1;
        }
        domains.accessors.push(Weak::clone(&accessor.me));
        Ok(())
    }

    fn leave(&self, accessor: &Accessor) {
        let mut domains = self.write_domains();
        domains.accessors.retain(|own| !Weak::ptr_eq(own, &accessor.me));
        if accessor.pinning {
            domains.pinners -= 1;
            self.realign(&domains);
        }
    }

    /// Calls every accessor; nothing is locked meanwhile.
    pub(crate) fn notify(&self, area: Span<Iova>) {
        let mut index = 0;
        loop {
            // One by one: an accessor may come or go while another one is called.
            let next = self.read_domains().accessors.get(index).map(Weak::upgrade);
            let Some(next) = next else { return };
            if let Some(accessor) = next {
                (accessor.unmapped)(area);
            }
            index += 1;
        }
    }

    fn pin(self: &Arc<Self>, span: Span<Iova>, write: bool) -> Result<Pin, Error> {
        fail::step("ioas.pin_parts")?;
        let wanted = if write { Perm::WRITE } else { Perm::READ };
        // Dropped half-filled, it gives back what it has. Behind the lock's guard, so that it is dropped after it.
        let mut pin = Pin { span, parts: Vec::new(), ioas: Arc::clone(self) };
        let space = self.space();
        for (piece, area) in space.areas.runs(span) {
            let Some(area) = area.filter(|area| area.state() == AreaState::Live) else { return Err(Error::NotMapped { at: piece }) };
            let (first, last) = (area.byte_of(piece.start()), area.byte_of(piece.last()));
            let ends_well = piece.last() == span.last() || last % PAGE_BYTES == PAGE_BYTES - 1;
            if area.is_shut() {
                return Err(Error::Shut { area: area.span() });
            }
            if !first.is_multiple_of(PAGE_BYTES) || !ends_well {
                return Err(Error::NotWholePages { at: piece });
            }
            if !area.perm().allows(wanted) {
                return Err(Error::Denied { area: area.span() });
            }
            if area.is_device() {
                return Err(Error::DeviceMemory { area: area.span() });
            }
            let pages = Span::of(Page::new(first), Page::new(last)).index(addr::PAGE_LG2);
            pin.parts.try_reserve(1).map_err(|_| OutOfMemory)?;
            area.claim_pin().map_err(|_| Error::Shut { area: area.span() })?;
            if let Err(error) = area.source().map_or(Ok(()), |source| source.hold(pages)) {
                area.drop_pin();
                return Err(error);
            }
            pin.parts.push((Arc::clone(area), pages));
        }
        Ok(pin)
    }

    /// Keeps the areas that `span` touches from being unmapped, as a hardware queue does that lives in them: an unmap is answered `Busy`.
    ///
    /// # Errors
    /// `NotMapped` for a gap, `Shut` for an area that is about to be unmapped; no memory. Nothing is locked then.
    pub fn lock_areas(self: &Arc<Self>, span: Span<Iova>) -> Result<AreaLocks, Error> {
        let mut locks = AreaLocks { areas: Vec::new(), _ioas: Arc::clone(self) };
        let space = self.space();
        for (piece, area) in space.areas.runs(span) {
            let Some(area) = area.filter(|area| area.state() == AreaState::Live) else { return Err(Error::NotMapped { at: piece }) };
            locks.areas.try_reserve(1).map_err(|_| OutOfMemory)?;
            area.claim_lock().map_err(|_| Error::Shut { area: area.span() })?;
            locks.areas.push(Arc::clone(area));
        }
        Ok(locks)
    }

    /// Every source that an area here belongs to, each once.
    pub fn sources(&self) -> Vec<Arc<Source>> {
        let mut sources: Vec<Arc<Source>> = self.space().areas.iter().filter_map(|(_, area)| area.source().map(Arc::clone)).collect();
        sources.sort_unstable_by_key(|source| Arc::as_ptr(source).addr());
        sources.dedup_by(|a, b| Arc::ptr_eq(a, b));
        sources
    }
}

impl Accessor {
    /// The address space that it uses; `None` while it moves and after it left.
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        self.home.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it was made to pin.
    pub fn is_pinning(&self) -> bool {
        self.pinning
    }

    /// Pins every page of `span`, which begins at the first byte of one, for writing too with `write`. Equal pins may be made any number of times.
    ///
    /// # Errors
    /// `Homeless`; by ascending address `NotMapped` for a gap, `Shut`, `NotWholePages` when an area's piece does not begin or end with a
    /// page, `Denied`, `DeviceMemory`; `Pin`. Nothing is pinned then.
    pub fn pin(&self, span: Span<Iova>, write: bool) -> Result<Pin, Error> {
        self.at_home()?.pin(span, write)
    }

    /// Gives pages back, as dropping the pin does.
    pub fn unpin(&self, pin: Pin) {
        drop(pin);
    }

    /// Reads from `at` on, as [`Ioas::read`] does.
    ///
    /// # Errors
    /// `Homeless`; as [`Ioas::read`].
    pub fn read(&self, at: Iova, into: &mut [u8]) -> Result<(), Error> {
        self.at_home()?.read(at, into)
    }

    /// Writes from `at` on, as [`Ioas::write`] does.
    ///
    /// # Errors
    /// `Homeless`; as [`Ioas::write`].
    pub fn write(&self, at: Iova, from: &[u8]) -> Result<(), Error> {
        self.at_home()?.write(at, from)
    }

    /// Goes over to another address space: joins that, then is told that everything in the old one is unmapped, then leaves the old one. Two
    /// threads must not move one accessor at once.
    ///
    /// # Errors
    /// As [`Ioas::accessor`]; it stays where it is then.
    pub fn move_to(&self, ioas: &Arc<Ioas>) -> Result<(), Error> {
        if self.ioas().is_some_and(|home| Arc::ptr_eq(&home, ioas)) {
            return Ok(());
        }
        ioas.join(self)?;
        self.leave();
        self.set_home(Some(Arc::clone(ioas)));
        Ok(())
    }

    /// Is told that everything is unmapped, and uses no address space any more, until [`Accessor::move_to`].
    pub fn leave(&self) {
        if let Some(old) = self.set_home(None) {
            (self.unmapped)(Span::whole());
            old.leave(self);
        }
    }

    fn at_home(&self) -> Result<Arc<Ioas>, Error> {
        self.ioas().ok_or(Error::Homeless)
    }

    fn set_home(&self, home: Option<Arc<Ioas>>) -> Option<Arc<Ioas>> {
        std::mem::replace(&mut *self.home.lock().unwrap_or_else(PoisonError::into_inner), home)
    }
}

impl Drop for Accessor {
    fn drop(&mut self) {
        if let Some(home) = self.set_home(None) {
            home.leave(self);
        }
    }
}

impl Pin {
    /// What was pinned.
    pub fn span(&self) -> Span<Iova> {
        self.span
    }

    /// Where.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// The pages, by ascending IOVA.
    pub fn pages(&self) -> impl Iterator<Item = (Arc<Backing>, Span<Page>)> + '_ {
        self.parts.iter().map(|(area, pages)| (Arc::clone(area.backing()), *pages))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        for (area, pages) in &self.parts {
            if let Some(source) = area.source() {
                source.release(*pages);
            }
            area.drop_pin();
        }
    }
}

impl Drop for AreaLocks {
    fn drop(&mut self) {
        self.areas.iter().for_each(|area| area.drop_lock());
    }
}

impl fmt::Debug for Accessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accessor").field("pinning", &self.pinning).field("ioas", &self.ioas()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("span", &self.span).field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl fmt::Debug for AreaLocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AreaLocks").field(&self.areas).finish()
    }
}
