//! Requests of any size: one page, odd spans across large leaves, gigabytes, a terabyte. The memory is simulated, so only tables take memory.

mod common;

use addr::Page;
use backing::PageState;
use common::{Guest, MIB, change, iova};
use convert::Auditor;
use iommu::Access;
use lockstep_iommu::Owner;

const GIB: u64 = 1024 * MIB;

/// What the device may translate, at the borders of a span and in its middle.
fn probe(guest: &Guest, start: u64, len: u64, private: bool) {
    let mut dma = guest.context(&guest.untrusted);
    for at in [start, start + len / 2, start + len - 1] {
        assert_eq!(dma.translate(iova(at), Access::Read).is_err(), private, "{at:#x}");
        let state = if private { PageState::Private } else { PageState::Shared };
        assert_eq!(guest.backing.state(Page::new(at >> 12)), state, "{at:#x}");
    }
}

#[test]
fn any_mix_of_sizes() {
    let guest = Guest::simulated(8 * GIB);
    let spans = [(0x3000, 0x1000), (MIB, 3 * MIB + 0x5000), (GIB - 0x1000, GIB + 0x2000), (3 * GIB, GIB), (5 * GIB + 2 * MIB, 2 * MIB)];
    let to = |owner| spans.map(|(start, len)| change(start, len, owner)).to_vec();
    let pages: u64 = spans.iter().map(|(_, len)| len >> 12).sum();
    for round in 0..3 {
        assert_eq!(guest.dma.convert(&to(Owner::Private)).unwrap().pages, pages);
        spans.iter().for_each(|&(start, len)| probe(&guest, start, len, true));
        for (start, len) in [(0, 0x3000), (0x4000, 0x1000), (4 * GIB, GIB), (GIB - 0x2000, 0x1000), (2 * GIB + 0x1000, 0x1000)] {
            probe(&guest, start, len, false);
        }
        guest.clean();
        // Whole and back, over what was private already.
        let all = |owner| guest.dma.convert(&[change(0, 8 * GIB, owner)]).unwrap().pages;
        assert_eq!(all(Owner::Private), ((8 * GIB) >> 12) - pages, "round {round}");
        guest.clean();
        assert_eq!(all(Owner::Shared), (8 * GIB) >> 12);
        probe(&guest, 0, 8 * GIB, false);
        guest.clean();
    }
}

#[test]
fn a_terabyte_in_one_request() {
    const TIB: u64 = 1024 * GIB;
    // The RMP alone takes 16 bytes a page.
    let needs = 5 * GIB;
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    if available.is_none_or(|kib| kib << 10 < needs) {
        return eprintln!("not run: a terabyte's RMP needs 5 GiB of memory, and {} KiB are available", available.unwrap_or(0));
    }
    let guest = Guest::simulated(TIB);
    assert_eq!(guest.convert(0, TIB, Owner::Private), TIB >> 12);
    probe(&guest, 0, TIB, true);
    // One page of it comes back, and then the rest.
    assert_eq!(guest.convert(TIB / 2 + 0x7000, 0x1000, Owner::Shared), 1);
    probe(&guest, TIB / 2 + 0x7000, 0x1000, false);
    probe(&guest, TIB / 2 + 0x6000, 0x1000, true);
    assert_eq!(guest.convert(0, TIB, Owner::Shared), (TIB >> 12) - 1);
    probe(&guest, 0, TIB, false);
    let part = common::span(TIB / 2, GIB);
    let pages = addr::Span::of(Page::new(part.start().get() >> 12), Page::new(part.last().get() >> 12));
    let report = Auditor::new(guest.dma.space()).audit_part(&guest.backing, pages);
    assert!(report.is_clean() && report.entries > 0, "{report:?}");
}
