//! Attach and detach: a domain comes to show every area, or none. By extent: an area of a contiguous window costs one map call.
//!
//! Both exclude map, unmap and copy, and nothing else: pages are punched and converted meanwhile, area by area under the span lock.

use crate::area::{Seat, Seats};
use crate::edit::Edit;
use crate::ioas::Domains;
use crate::pages::fill_part;
use crate::placement::{Reservation, Space};
use crate::{Error, Ioas};
use addr::{Iova, Lg2, OutOfMemory, PAGE_BYTES, PAGE_LG2, Span};
use iommu::{Device, Domain, IoTable};
use pt::{AmdV1, Format};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use sync::fail;

impl Ioas {
    /// Shows every area in `domain`, which nobody else maps in. The alignment rises to its smallest page, and IOVAs that it cannot
    /// translate become reserved.
    ///
    /// # Errors
    /// `Attached`; `Foreign`; `InUse` when areas or allowed ranges do not fit; `DomainPages`; `Leaf` when tables ran out; no memory. Then
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
        let smallest = AmdV1::SIZES.smallest().unwrap_or(Lg2::K4);
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
        let outside = match reserve_outside(&mut space) {
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
        let Err(error) = self.install_seat(domains, &seat) else { return Ok(()) };
        domains.seats = before;
        self.remove_seat(domains, &seat);
        self.relax(domains, &seat);
        Err(error)
    }

    /// Gives back what a domain that has left kept from mappings.
    fn relax(&self, domains: &Domains, gone: &Seat) {
        let mut space = self.space_mut();
        gone.outside.iter().for_each(|reservation| space.release(*reservation));
        if domains.seats.is_empty() {
            let align = self.base_align();
            let lowered = space.set_align(align);
            debug_assert!(lowered.is_ok(), "{lowered:?}, but every area fits a lower alignment");
        }
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
        self.relax(domains, &seat);
        Ok(())
    }

    /// The alignment without a domain.
    pub(crate) fn base_align(&self) -> u64 {
        if self.policy.small_only.load(Ordering::Relaxed) { PAGE_BYTES } else { 1 }
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

/// Reserves what the format cannot translate.
fn reserve_outside(space: &mut Space) -> Result<Vec<Reservation>, Error> {
    let mut reserved = Vec::new();
    for outside in Span::<Iova>::whole().without(IoTable::aperture()).into_iter().flatten() {
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
