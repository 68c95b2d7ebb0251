//! Attach and detach: a domain comes to show every area, or none. By extent: an area of a contiguous window costs one map call.
//!
//! Both exclude map, unmap and copy, and nothing else: pages are punched and converted meanwhile, area by area under the span lock.

use crate::area::{Seat, Seats};
use crate::edit::Edit;
use crate::ioas::Domains;
use crate::pages::fill_part;
use crate::placement::{Reservation, Space};
use crate::{Error, Ioas};
use addr::{Iova, OutOfMemory, PAGE_BYTES, PAGE_LG2, Span};
use iommu::{Device, Domain};
use std::sync::Arc;
use sync::fail;

impl Ioas {
    /// Shows every area in `domain`, which nobody else maps in. The alignment rises to its smallest page, and IOVAs that it cannot
    /// translate become reserved.
    ///
    /// # Errors
    /// `Attached`; `Foreign`; `InUse` when areas or allowed ranges do not fit; `DomainPages`; `Pin`; `Leaf` when tables ran out; no memory. Then
    /// the domain is empty, and no more tables are in use than before, except that the tree may have stayed taller.
    pub fn attach(&self, domain: &Arc<Domain>) -> Result<(), Error> {
        self.attach_held(&mut self.write_domains(), domain)
    }

    fn attach_held(&self, domains: &mut Domains, domain: &Arc<Domain>) -> Result<(), Error> {
        if domains.seats.iter().any(|seat| Arc::ptr_eq(&seat.domain, domain)) {
            return Err(Error::Attached { what: "domain", id: domain.id() });
        }
        if !Arc::ptr_eq(domain.table().arena(), self.iommu.arena()) {
            return Err(Error::Foreign { domain: domain.id() });
        }
        let smallest = domain.smallest();
        if smallest.0 > PAGE_LG2 {
            return Err(Error::DomainPages { smallest });
        }
        if domain.held_by_caller() {
            return Err(Error::HeldByCaller { domain: domain.id() });
        }
        fail::step("ioas.seats")?;
        let mut room = Vec::new();
        room.try_reserve_exact(domains.seats.len() + 1).map_err(|_| OutOfMemory)?;
        room.extend(domains.seats.iter().cloned());

        let mut space = self.space_mut();
        let align = space.align();
        space.set_align(align.max(smallest.bytes()))?;
        let outside = match reserve_outside(&mut space, domain) {
            Ok(outside) => outside,
            Err(error) => {
                space.set_align(align)?;
                return Err(error);
            }
        };
        drop(space);
        let seat = Arc::new(Seat { domain: Arc::clone(domain), leaving: false, outside });
        room.push(Arc::clone(&seat));

        let before = std::mem::replace(&mut domains.seats, room.into());
        let mut held = 0;
        let Err(error) = self.hold_areas(domains, &mut held).and_then(|()| self.install_seat(domains, &seat)) else { return Ok(()) };
        domains.seats = before;
        self.remove_seat(domains, &seat);
        self.release_areas(held);
        self.relax(domains, &seat);
        Err(error)
    }

    /// Gives back what a domain that has left kept from mappings.
    fn relax(&self, domains: &Domains, gone: &Seat) {
        let mut space = self.space_mut();
        gone.outside.iter().for_each(|reservation| space.release(*reservation));
        drop(space);
        self.realign(domains);
    }

    /// Lowers the alignment after something has left that it was raised for.
    pub(crate) fn realign(&self, domains: &Domains) {
        let lowered = self.space_mut().set_align(self.align_for(domains, self.large_leaves()));
        debug_assert!(lowered.is_ok(), "{lowered:?}, but every area fits a lower alignment");
    }

    /// Pins what the areas need, if this is their first domain. Counts the areas it has done.
    fn hold_areas(&self, domains: &Domains, held: &mut usize) -> Result<(), Error> {
        if domains.seats.len() > 1 {
            return Ok(());
        }
        self.space().areas.iter().try_for_each(|(_, area)| area.hold().map(|()| *held += 1))
    }

    /// Undoes [`Ioas::hold_areas`] for the first `count` areas. Nobody has mapped or unmapped meanwhile.
    fn release_areas(&self, count: usize) {
        self.space().areas.iter().take(count).for_each(|(_, area)| area.release());
    }

    /// Installs every area in a new domain. Nobody maps or unmaps meanwhile.
    fn install_seat(&self, domains: &Domains, seat: &Arc<Seat>) -> Result<(), Error> {
        let mut edit = Edit::new();
        let slot = edit.prepare(&seat.domain)?;
        for (_, area) in self.space().areas.iter() {
            fail::step("ioas.area")?;
            let pages = area.page_span();
            let _held = area.backing().lock(pages);
            area.set_seats(Arc::clone(&domains.seats));
            fill_part(area, pages, slot).map_err(|failure| failure.error)?;
        }
        edit.flush();
        Ok(())
    }

    /// Takes every area out of a domain: leaves first, then one flush, then the seats, which now are `domains.seats`. Until then, whoever
    /// changes pages flushes this domain as well.
    fn remove_seat(&self, domains: &Domains, seat: &Arc<Seat>) {
        let mut edit = Edit::new();
        let gone = Arc::new(Seat { domain: Arc::clone(&seat.domain), leaving: true, outside: Vec::new() });
        let leaving: Seats = domains.seats.iter().cloned().chain([gone]).collect();
        let space = self.space();
        for (_, area) in space.areas.iter() {
            let _held = area.backing().lock(area.page_span());
            area.pages.clear_part(area, area.page_span(), edit.slot(&seat.domain));
            // Area by area: until its turn comes, whoever changes pages takes their leaves out of this domain, too.
            area.set_seats(Arc::clone(&leaving));
        }
        // Nobody else maps in this domain, and nobody of us any more: now the tables go, too.
        let slot = edit.slot(&seat.domain);
        let _none_is_left = seat.domain.table().unmap(Span::whole(), &mut slot.gather);
        edit.flush();
        for (_, area) in space.areas.iter() {
            let _held = area.backing().lock(area.page_span());
            area.set_seats(Arc::clone(&domains.seats));
        }
    }

    /// Takes every area out of `domain`. When this returns, no device reaches anything through it. Devices stay on it, and find nothing.
    ///
    /// # Errors
    /// `NotAttached`, `HeldByCaller`. Otherwise it cannot fail.
    pub fn detach(&self, domain: &Domain) -> Result<(), Error> {
        self.detach_held(&mut self.write_domains(), domain)
    }

    fn detach_held(&self, domains: &mut Domains, domain: &Domain) -> Result<(), Error> {
        let Some(seat) = domains.seats.iter().find(|seat| std::ptr::eq(Arc::as_ptr(&seat.domain), domain)).cloned() else {
            return Err(Error::NotAttached { what: "domain", id: domain.id() });
        };
        if domain.held_by_caller() {
            return Err(Error::HeldByCaller { domain: domain.id() });
        }
        domains.seats = domains.seats.iter().filter(|own| !Arc::ptr_eq(own, &seat)).cloned().collect();
        self.remove_seat(domains, &seat);
        if !domains.show() {
            self.release_areas(usize::MAX);
        }
        self.relax(domains, &seat);
        Ok(())
    }

    /// What IOVA, length and source offset must be multiples of (rule 32).
    pub(crate) fn align_for(&self, domains: &Domains, large_leaves: bool) -> u64 {
        let whole_pages = domains.pinners > 0 || !large_leaves;
        smallest_of(domains).max(if whole_pages { PAGE_BYTES } else { 1 })
    }

    /// Puts a device on this address space: on the domain that devices share here, made for the first of them.
    ///
    /// # Errors
    /// `Attached` when the device is on a domain already; as [`Ioas::attach`] and [`Device::attach`].
    pub fn attach_device(&self, device: &Arc<Device>) -> Result<Arc<Domain>, Error> {
        let mut domains = self.write_domains();
        if device.domain().is_some() {
            return Err(Error::Attached { what: "device", id: device.id() });
        }
        let mut devices = match &mut domains.auto {
            Some((_, devices)) => std::mem::take(devices),
            None => Vec::new(),
        };
        let shared = self.put_device(&mut domains, &mut devices, device);
        if let Some((_, kept)) = &mut domains.auto {
            *kept = devices;
        }
        shared
    }

    fn put_device(&self, domains: &mut Domains, devices: &mut Vec<Arc<Device>>, device: &Arc<Device>) -> Result<Arc<Domain>, Error> {
        devices.try_reserve(1).map_err(|_| OutOfMemory)?;
        let shared = domains.auto.as_ref().map(|(domain, _)| Arc::clone(domain));
        let domain = match shared {
            Some(domain) => domain,
            None => {
                let domain = self.iommu.domain()?;
                self.attach_held(domains, &domain)?;
                domains.auto = Some((Arc::clone(&domain), Vec::new()));
                domain
            }
        };
        match device.attach(&domain) {
            Ok(()) => {
                devices.push(Arc::clone(device));
                Ok(domain)
            }
            Err(error) => {
                if devices.is_empty() {
                    domains.auto = None;
                    self.detach_held(domains, &domain)?;
                }
                Err(error.into())
            }
        }
    }

    /// Takes a device off. The domain goes with the last of them.
    ///
    /// # Errors
    /// `NotAttached`; what [`Device::detach`] answers.
    pub fn detach_device(&self, device: &Arc<Device>) -> Result<(), Error> {
        let mut domains = self.write_domains();
        let missing = Error::NotAttached { what: "device", id: device.id() };
        let Some((domain, devices)) = &mut domains.auto else { return Err(missing) };
        let Some(at) = devices.iter().position(|own| Arc::ptr_eq(own, device)) else { return Err(missing) };
        device.detach()?;
        devices.swap_remove(at);
        if devices.is_empty() {
            let domain = Arc::clone(domain);
            domains.auto = None;
            self.detach_held(&mut domains, &domain)?;
        }
        Ok(())
    }
}

/// The alignment that the domains ask for: the smallest page of each (rule 32); 1 without any.
fn smallest_of(domains: &Domains) -> u64 {
    domains.seats.iter().map(|seat| seat.domain.smallest().bytes()).max().unwrap_or(1)
}

/// Reserves what the domain cannot translate.
fn reserve_outside(space: &mut Space, domain: &Domain) -> Result<Vec<Reservation>, Error> {
    let mut reserved = Vec::new();
    for outside in Span::<Iova>::whole().without(domain.aperture()).into_iter().flatten() {
        match space.reserve(outside) {
            Ok(reservation) => reserved.push(reservation),
            Err(error) => {
                reserved.into_iter().for_each(|reservation| space.release(reservation));
                return Err(error);
            }
        }
    }
    Ok(reserved)
}
