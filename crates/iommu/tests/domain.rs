//! Domains of a chosen format, and DMA through leaves of half a page.

mod common;

use addr::{Address, Iova, Lg2, SizeSet, Span};
use backing::Frames;
use common::{BASE, Machine, map_in, span};
use lockstep_iommu_device::{Access, Dma, Domain, DomainConfig, Error, FaultKind};
use pt::{FormatKind, Gather, Perm};

const HALF: u64 = 2048;

fn config(format: FormatKind, sizes: u64) -> DomainConfig {
    DomainConfig { format, sizes: SizeSet(sizes), ..DomainConfig::default() }
}

#[test]
fn a_domain_is_what_its_format_and_its_limits_leave() {
    let machine = Machine::new(1 << 20, Frames::Contiguous);
    let plain = machine.iommu.domain().unwrap();
    assert_eq!((plain.format(), plain.sizes(), plain.smallest()), (FormatKind::AmdV1, FormatKind::AmdV1.sizes(), Lg2::K4));
    assert_eq!((plain.aperture(), plain.can_track_dirty()), (Span::whole(), true));

    let aperture = Some(Span::of(Iova::new(16 << 20), Iova::new((2 << 30) - 1)));
    let limits = DomainConfig { aperture, tracks_dirty: false, ..config(FormatKind::AmdV1K2, 1 << 20 | 1 << 12 | 1 << 5) };
    let domain = machine.iommu.domain_with(&limits).unwrap();
    assert_eq!((domain.format(), domain.sizes(), domain.smallest()), (FormatKind::AmdV1K2, SizeSet(1 << 20 | 1 << 12), Lg2::K4));
    assert_eq!((Some(domain.aperture()), domain.can_track_dirty()), (aperture, false));
    domain.track_dirty(true);
    assert!(!domain.tracks_dirty());

    let tables = machine.iommu.arena().tables_in_use();
    let none = machine.iommu.domain_with(&config(FormatKind::AmdV1, 1 << 11));
    assert!(matches!(none, Err(Error::NoSizes { .. })), "{none:?}");
    assert_eq!(machine.iommu.arena().tables_in_use(), tables);
}

#[test]
fn dma_over_halves_of_pages_in_no_order() {
    let machine = Machine::new(1 << 20, Frames::Contiguous);
    let domain = machine.iommu.domain_with(&config(FormatKind::AmdV1K2, u64::MAX)).unwrap();
    machine.device.attach(&domain).unwrap();
    // 64 halves, each 13 halves behind the last in memory, as far as the mapping goes.
    let place = |index: u64| index * 13 % 64 * HALF;
    for index in 0..64 {
        map_in(&domain, BASE.plus(index * HALF), machine.oa(place(index)), HALF, Perm::RW, SizeSet::ALL);
    }
    let bytes: Vec<u8> = (0..64 * HALF).map(|at| (at / 7 + at / HALF) as u8).collect();
    let mut dma = Dma::new(&machine.device).unwrap();
    for _ in 0..2 {
        dma.write(BASE.plus(3), &bytes[3..]).unwrap();
        let mut back = vec![0; bytes.len() - 3];
        dma.read(BASE.plus(3), &mut back).unwrap();
        assert_eq!(back, bytes[3..]);
    }
    for index in 1..64 {
        let range = (index * HALF) as usize..((index + 1) * HALF) as usize;
        assert_eq!(machine.peek(place(index), HALF as usize), bytes[range], "half {index}");
    }
    // One half goes; its cached translation goes with it, that of the other half of the page does not.
    unmap(&domain, span(BASE.plus(5 * HALF), HALF));
    let fault = dma.read(BASE.plus(5 * HALF - 8), &mut [0; 16]).unwrap_err();
    assert_eq!((fault.reason, fault.done), (FaultKind::NotMapped, 8));
    let seen = dma.translate(BASE.plus(4 * HALF + 9), Access::Read).unwrap();
    assert_eq!((seen.leaf, seen.oa), (span(BASE.plus(4 * HALF), HALF), machine.oa(place(4) + 9)));
}

fn unmap(domain: &Domain, span: Span<Iova>) {
    let mut gather = Gather::new();
    assert_eq!(domain.table().unmap(span, &mut gather), None);
    domain.flush(gather);
}
