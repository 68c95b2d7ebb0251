//! Every step that can fail, failed once: nothing may have changed afterwards (I-10).

mod common;

use addr::{Iova, Lg2};
use backing::{Backing, Frames, PageState};
use common::client::{Client, Purse, source};
use common::{MIB, Mirror, at, audit, dump, iommu, iova, pages};
use lockstep_ioas::{Edit, Error, Ioas, MapAll, Pages, Place};
use pt::Perm;
use std::collections::BTreeSet;
use std::sync::Arc;

/// An address space with two domains, and something in it that is cut, scattered, shared, private and absent.
fn rig() -> (Arc<Ioas>, Arc<Backing>, Arc<Backing>) {
    let iommu = iommu();
    let ioas = Ioas::new(&iommu, Arc::new(Mirror));
    let row = Backing::simulated(8 * MIB, Frames::Contiguous).unwrap();
    let scattered = Backing::simulated(4 * MIB, Frames::Scattered { seed: 2 }).unwrap();
    ioas.attach(&iommu.domain().unwrap()).unwrap();
    ioas.attach(&iommu.domain().unwrap()).unwrap();
    ioas.map_file(&row, 0, 8 * MIB, at(0x4000_0000), Perm::RW).unwrap();
    ioas.map_file(&scattered, 0, MIB, at(0x4000_0000 + 8 * MIB), Perm::RW).unwrap();
    let held = row.lock(row.pages());
    row.set_state(&held, pages(100, 50), PageState::Private).unwrap();
    row.set_state(&held, pages(1000, 50), PageState::Absent).unwrap();
    drop(held);
    // What was mapped before the states changed by hand is mapped anew.
    ioas.unmap(iova(0x4000_0000, 8 * MIB)).unwrap();
    ioas.map_file(&row, 0, 8 * MIB, at(0x4000_0000), Perm::RW).unwrap();
    (ioas, row, scattered)
}

/// Fails the first, second, ... step until the call passes; returns the names of all steps that failed.
fn sweep(ioas: &Ioas, call: impl FnMut() -> Result<(), Error>) -> BTreeSet<&'static str> {
    sweep_with(ioas, String::new, call)
}

/// As `sweep`, with more that must not have changed.
fn sweep_with(ioas: &Ioas, more: impl Fn() -> String, mut call: impl FnMut() -> Result<(), Error>) -> BTreeSet<&'static str> {
    let mut names = BTreeSet::new();
    let dump = |ioas: &Ioas| dump(ioas) + &more();
    for nth in 1.. {
        let before = dump(ioas);
        let plan = sync::fail::nth(nth);
        let result = call();
        let fired = plan.fired();
        drop(plan);
        match (result, fired) {
            (Ok(()), None) => break,
            (Ok(()), Some(name)) => panic!("step {nth}, {name}, failed and the call did not"),
            (Err(error), None) => panic!("without a failed step: {error}"),
            (Err(_), Some(name)) => {
                assert_eq!(dump(ioas), before, "after step {nth}, {name}");
                audit(ioas);
                names.insert(name);
            }
        }
    }
    audit(ioas);
    names
}

#[test]
fn map() {
    let (ioas, row, scattered) = rig();
    let names = sweep(&ioas, || ioas.map_file(&row, 0, 8 * MIB, Place::Auto, Perm::RW).map(drop));
    assert!(names.is_superset(&BTreeSet::from(["ioas.pages", "ioas.room", "ioas.edit", "ioas.register", "pt.table"])), "{names:?}");
    sweep(&ioas, || ioas.map_file(&scattered, 0x3000, 3 * MIB, at(0x20_0000_0000), Perm::READ).map(drop));
}

#[test]
fn map_in_one_domain() {
    let (ioas, row, scattered) = rig();
    ioas.detach(&ioas.domains()[1]).unwrap();
    sweep(&ioas, || ioas.map_file(&row, 0, 8 * MIB, at(0x10_0000_0000), Perm::RW).map(drop));
    sweep(&ioas, || ioas.map_file(&scattered, 0, 4 * MIB, at(0x20_0000_0000), Perm::READ).map(drop));
}

#[test]
fn copy() {
    let (ioas, ..) = rig();
    let names = sweep(&ioas, || ioas.copy(&ioas, iova(0x4000_1000, 8 * MIB), at(0x10_0000_1000), Perm::READ).map(drop));
    assert!(names.is_superset(&BTreeSet::from(["ioas.part", "ioas.room", "ioas.register", "pt.table"])), "{names:?}");
}

#[test]
fn attach() {
    let (ioas, ..) = rig();
    let domain = ioas.iommu().domain().unwrap();
    let names = sweep(&ioas, || ioas.attach(&domain));
    assert!(names.is_superset(&BTreeSet::from(["ioas.seats", "ioas.area", "ioas.edit", "pt.table"])), "{names:?}");
    ioas.detach(&domain).unwrap();
    let device = ioas.iommu().device("disk");
    sweep(&ioas, || ioas.attach_device(&device).map(drop));
}

/// What a client's pages and account say.
fn account<'a>(client: &'a Client, purse: &'a Purse) -> impl Fn() -> String + 'a {
    || format!("pins {} charged {}", client.pins(), purse.charged())
}

#[test]
fn map_and_copy_a_source() {
    let (ioas, ..) = rig();
    let (client, purse, source) = source(64, 64);
    // Some pages are pinned already, so that what is left comes in two runs.
    let accessor = ioas.accessor(true, Arc::new(|_| {})).unwrap();
    sweep_with(&ioas, account(&client, &purse), || ioas.map_source(&source, at(0x1000_0000), Perm::RW).map(drop));
    let pin = accessor.pin(iova(0x1000_8000, 0x3000), true).unwrap();
    let other = Ioas::new(ioas.iommu(), Arc::new(MapAll));
    other.copy(&ioas, iova(0x1000_0000, 64 * common::PAGE), at(0), Perm::RW).unwrap();
    for domain in ioas.domains() {
        ioas.detach(&domain).unwrap();
    }
    assert_eq!((client.pins(), purse.charged()), ("00000000111".into(), 3));
    let domain = ioas.iommu().domain().unwrap();
    let names = sweep_with(&other, account(&client, &purse), || other.attach(&domain));
    assert!(names.is_superset(&BTreeSet::from(["ioas.pin", "ioas.pin_next", "ioas.charge", "ioas.area"])), "{names:?}");
    other.unmap_all().unwrap();
    let names = sweep_with(&other, account(&client, &purse), || {
        other.copy(&ioas, iova(0x1000_0000, 64 * common::PAGE), at(0), Perm::READ).map(drop)
    });
    assert!(names.is_superset(&BTreeSet::from(["ioas.pin", "ioas.pin_next", "ioas.charge", "ioas.register"])), "{names:?}");
    drop(pin);
}

#[test]
fn pin() {
    let ioas = Ioas::new(&iommu(), Arc::new(MapAll));
    let (client, purse, source) = source(64, 128);
    ioas.map_source(&source, at(0x1000_0000), Perm::RW).unwrap();
    ioas.map_source(&source, at(0x1004_0000), Perm::RW).unwrap();
    let mut made = None;
    let names = sweep(&ioas, || ioas.accessor(true, Arc::new(|_| {})).map(|accessor| made = Some(accessor)));
    assert!(names.contains("ioas.accessor"), "{names:?}");
    let accessor = made.unwrap();
    let _middle = accessor.pin(iova(0x1001_0000, 0x2000), false).unwrap();
    let mut pin = None;
    let names =
        sweep_with(&ioas, account(&client, &purse), || accessor.pin(iova(0x1000_f000, 0x4_0000), true).map(|made| pin = Some(made)));
    assert!(names.is_superset(&BTreeSet::from(["ioas.pin", "ioas.pin_next", "ioas.charge"])), "{names:?}");
    assert_eq!(purse.charged(), 64);
}

#[test]
fn split() {
    let (ioas, ..) = rig();
    let (client, purse, source) = source(1024, 1024);
    ioas.map_source(&source, at(0x1000_0000), Perm::RW).unwrap();
    let names = sweep_with(&ioas, account(&client, &purse), || ioas.split(Iova::new(0x1010_3000)));
    let wanted = ["ioas.split", "ioas.split_hold", "ioas.register", "ioas.edit", "pt.table"];
    assert!(names.is_superset(&BTreeSet::from(wanted)), "{names:?}");
    // In what is shared, private and absent.
    sweep(&ioas, || ioas.split(Iova::new(0x4000_0000 + 120 * common::PAGE)));
    sweep(&ioas, || ioas.split(Iova::new(0x4000_0000 + 1010 * common::PAGE)));
    sweep(&ioas, || ioas.split(Iova::new(0x4000_0000 + 9 * MIB - 5 * common::PAGE)));
}

#[test]
fn restore() {
    let (ioas, row, _) = rig();
    // The state of the pages changes all the same; that is what the backing's error says.
    for nth in 1.. {
        row.punch(pages(1000, 50)).unwrap();
        let before = dump(&ioas);
        let plan = sync::fail::nth(nth);
        let result = row.populate(pages(1000, 50), PageState::Shared);
        let fired = plan.fired();
        drop(plan);
        if fired.is_none() {
            result.unwrap();
            break;
        }
        if let Err(backing::Error::Restore { .. }) = result {
            assert_eq!(dump(&ioas), before);
        }
    }
    audit(&ioas);
}

#[test]
fn a_reserve_that_fails_has_changed_nothing() {
    let (ioas, row, _) = rig();
    let all = Pages::of(&row);
    let names = sweep(&ioas, || {
        let _held = row.lock(row.pages());
        let mut edit = Edit::new();
        all.reserve(pages(90, 600), Lg2::K4, &mut edit)
    });
    assert!(names.contains("pt.table"), "{names:?}");
}

#[test]
fn revoke_cannot_fail() {
    for nth in 1.. {
        let (ioas, row, _) = rig();
        let plan = sync::fail::nth(nth);
        let held = row.lock(pages(700, 3));
        let mut edit = Edit::new();
        Pages::of(&row).clear(pages(700, 3), &mut edit);
        edit.flush();
        drop(held);
        let fired = plan.fired();
        drop(plan);
        for domain in ioas.domains() {
            assert!((700..703).all(|page| common::walk(&domain, 0x4000_0000 + page * common::PAGE).is_none()));
        }
        if fired.is_none() {
            break;
        }
        // The other pages of a leaf that went whole are lost until they are mapped anew; nothing wrong is left, and unmap takes the rest.
        ioas.unmap(iova(0x4000_0000, 8 * MIB)).unwrap();
        audit(&ioas);
    }
}
