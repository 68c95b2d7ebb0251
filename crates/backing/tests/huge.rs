//! Backings of huge pages, where the host has some or lets root make some; the error where it has none.

mod common;

use common::*;
use lockstep_backing::{Backing, Error, Frames, Kind, PageState};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Puts the pool back as it was.
struct Pool(String);

impl Pool {
    fn size(pages: u64) -> Option<Self> {
        let before = std::fs::read_to_string(POOL).ok()?;
        std::fs::write(POOL, pages.to_string()).ok()?;
        let pool = Self(before);
        let now: u64 = std::fs::read_to_string(POOL).ok()?.trim().parse().ok()?;
        (now >= pages).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.0.trim());
    }
}

// One test, because the pool belongs to the whole host.
#[test]
fn huge_pages() {
    assert!(matches!(Backing::huge_memfd(K4, Frames::Contiguous), Err(Error::Length { granule_bytes: M2, .. })));
    // More than any host has: the message must say what is missing.
    match Backing::huge_memfd(1 << 42, Frames::Contiguous) {
        Err(error @ Error::NoHugePages { needed: 0x20_0000, .. }) => {
            assert!(error.to_string().contains("/proc/sys/vm/nr_hugepages"), "{error}");
        }
        other => println!("huge_pages: this host does not do huge memfds: {other:?}"),
    }
    let Some(_pool) = Pool::size(8) else {
        println!("huge_pages: skipped, {POOL} cannot be raised to 8");
        return;
    };
    let backing = Backing::huge_memfd(4 * M2, Frames::Contiguous).unwrap();
    assert_eq!((backing.kind(), backing.linear_hva().unwrap().get() % M2), (Kind::HugeMemfd, 0));
    let at = host(&backing);
    at.write(M2 + 5, b"huge").unwrap();
    let ear = Ear::of(&backing);
    assert!(matches!(backing.punch(pages(512, 600)), Err(Error::Span(_))), "half a huge page cannot be given back");
    assert!(ear.take().is_empty());
    backing.punch(pages(512, 1023)).unwrap();
    assert_eq!((ear.take().len(), byte(at, M2 + 5)), (1, 0));
    backing.populate(backing.pages(), PageState::Shared).unwrap();
    assert!(matches!(backing.holes(backing.pages()), Err(Error::Unsupported { .. })));
    // All but four pages are taken, so five cannot be had.
    assert!(matches!(Backing::huge_memfd(5 * M2, Frames::Contiguous), Err(Error::NoHugePages { needed: 5, free: 4, total: 8 })));
}
