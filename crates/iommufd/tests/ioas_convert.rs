//! LOCKSTEP_IOAS_CONVERT: pages change their owner in every table at once.

mod common;
mod guest;

use addr::{Gpa, Iova, Page, Span};
use backing::PageState;
use common::{FIXED, MIB, PAGE, Program, READ, RW, errno, leaves, shown};
use guest::{ASID, PRIVATE, SHARED, count, oa};
use iommu::{Dma, FaultKind, RefusedBy, Tdisp, Trust};
use lockstep_iommufd::uapi::ours::{IoasConvert, NR_CONVERT};
use lockstep_iommufd::{Local, Touch};
use rustix::io::Errno;
use secure::{RmpSize, Vmpl};
use std::sync::Arc;

#[test]
fn the_order_of_errors() {
    let program = Program::new();
    let id = program.alloc();
    let mut arg =
        IoasConvert { flags: 1, ioas_id: 99, to: 0, iova: 1, length: 0, gpa: 1, asid: 0, __reserved: 1, out_done: 7, ..Default::default() };
    let refused = |arg: &IoasConvert| {
        let mut arg = *arg;
        let errno = errno(program.call_in(NR_CONVERT, &mut arg));
        assert!(arg.out_done == 7 || arg.out_done == 0);
        errno
    };
    assert_eq!(refused(&arg), Errno::OPNOTSUPP, "a flag");
    arg.flags = 0;
    assert_eq!(refused(&arg), Errno::OPNOTSUPP, "the reserved field");
    arg.__reserved = 0;
    for to in [0, 3, u32::MAX] {
        assert_eq!(refused(&IoasConvert { to, ..arg }), Errno::INVAL);
    }
    arg.to = PRIVATE;
    assert_eq!(refused(&arg), Errno::INVAL, "the host's ASID");
    arg.asid = ASID;
    assert_eq!(refused(&arg), Errno::NOENT, "the IOAS");
    arg.ioas_id = id;
    assert_eq!(refused(&arg), Errno::INVAL, "no length");
    assert_eq!(refused(&IoasConvert { iova: 2, length: u64::MAX, ..arg }), Errno::OVERFLOW, "it wraps");
    arg.length = 2 * PAGE;
    assert_eq!(refused(&arg), Errno::INVAL, "no whole pages");
    arg.iova = 0x11000;
    assert_eq!(refused(&arg), Errno::INVAL, "nor as the guest counts them");
    arg.gpa = u64::MAX - 0xfff;
    assert_eq!(refused(&arg), Errno::OVERFLOW, "the guest's addresses wrap");
    arg.gpa = 0;
    assert_eq!(refused(&arg), Errno::NOENT, "nothing is mapped there");
    let va = program.memory(4 * PAGE);
    program.map(id, FIXED | RW, va, PAGE, 0x11000).unwrap();
    assert_eq!(refused(&arg), Errno::NOENT, "not all of it is mapped");
    program.unmap(id, 0, u64::MAX).unwrap();
    program.memory_at(0x4000_0000, 2 * PAGE, Touch::WhileShown);
    program.map(id, FIXED | RW, 0x4000_0000, 2 * PAGE, 0x11000).unwrap();
    assert_eq!(refused(&arg), Errno::INVAL, "memory that is looked for is no file");
    program.unmap(id, 0, u64::MAX).unwrap();
    program.map(id, FIXED | RW, va + 2048, 3 * PAGE, 0x10800).unwrap();
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 0x11000, 2 * PAGE, 0).0, Ok(()), "pages of a file, wherever the area begins");
    program.unmap(id, 0, u64::MAX).unwrap();
    program.map(id, FIXED | RW, va, 3 * PAGE, 0x10800).unwrap();
    assert_eq!(refused(&arg), Errno::INVAL, "half pages of a file");
    program.unmap(id, 0, u64::MAX).unwrap();
    program.guest_memory(id, 0x11000, 2 * PAGE);
    for asid in [0x3ff, 0x400, 0x10005, u32::MAX] {
        assert_eq!(refused(&IoasConvert { asid, ..arg }), Errno::INVAL, "no ASID that a table could hold");
    }
    assert_eq!(refused(&IoasConvert { gpa: 1 << 52, ..arg }), Errno::INVAL, "no guest has that much");
    assert_eq!(program.convert_as(0x3fe, id, PRIVATE, 0x11000, 2 * PAGE, 0), (Ok(()), 2 * PAGE));
    program.clean(id);
}

/// The device as its guest trusts it.
fn trusted(program: &Program, domain: &Arc<iommu::Domain>, asid: u32) -> Dma {
    let (device, dma) = program.device(domain);
    device.set_trust(Trust::Trusted { asid, vmpl: Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }).unwrap();
    dma
}

#[test]
fn what_devices_see_of_it() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 8 * MIB);
    let (_, mut untrusted) = program.device(&domain);
    let (mut mine, mut strange) = (trusted(&program, &domain, ASID), trusted(&program, &domain, ASID + 1));
    assert_eq!(leaves(&domain, 16 * MIB, 8 * MIB), [8 * MIB]);
    program.convert(id, PRIVATE, 18 * MIB, 2 * MIB);
    program.convert(id, PRIVATE, 22 * MIB + PAGE, 2 * PAGE);
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Private)), (514, 514));
    assert_eq!(program.host.iommu().rmp().size_at(oa(&backing, 512)), RmpSize::M2);
    assert_eq!(leaves(&domain, 18 * MIB, 2 * MIB), [2 * MIB]);
    for at in [18 * MIB, 20 * MIB - 8, 22 * MIB + PAGE, 22 * MIB + 3 * PAGE - 8] {
        let fault = untrusted.write(Iova::new(at), &[1; 8]).unwrap_err();
        assert_eq!((fault.table, fault.reason), (RefusedBy::SecureWorld, FaultKind::Secure), "{at:#x}");
        assert!(mine.write(Iova::new(at), &[1; 8]).is_err(), "the guest has not validated it");
    }
    let space = program.context.guest_space(ASID).unwrap();
    space.pvalidate(Gpa::new(18 * MIB), RmpSize::M2, true).unwrap();
    space.pvalidate(Gpa::new(22 * MIB + PAGE), RmpSize::K4, true).unwrap();
    for at in [18 * MIB, 20 * MIB - 8, 22 * MIB + PAGE] {
        mine.write(Iova::new(at), &[2; 8]).unwrap();
        strange.write(Iova::new(at), &[3; 8]).unwrap_err();
        untrusted.read(Iova::new(at), &mut [0; 8]).unwrap_err();
    }
    // Up to the border and from the border on everything is as it was.
    for at in [16 * MIB, 18 * MIB - 8, 20 * MIB, 22 * MIB, 22 * MIB + PAGE - 8, 22 * MIB + 3 * PAGE, 24 * MIB - 8] {
        untrusted.write(Iova::new(at), &[4; 8]).unwrap();
    }
    program.clean(id);
    program.convert(id, SHARED, 18 * MIB, 2 * MIB);
    program.convert(id, SHARED, 22 * MIB, MIB);
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Private)), (0, 0));
    for at in [18 * MIB, 20 * MIB - 8, 22 * MIB + PAGE] {
        untrusted.write(Iova::new(at), &[5; 8]).unwrap();
    }
    program.clean(id);
}

/// A guest's pages may be mapped for nobody, too.
#[test]
fn a_policy_that_shows_no_private_pages() {
    let program = Program::with_policy(convert::Policy::SharedOnly);
    let id = program.alloc();
    let domain = program.attach(id);
    let (_, _backing) = program.guest_memory(id, 16 * MIB, 8 * MIB);
    program.convert(id, PRIVATE, 18 * MIB, MIB);
    assert!(!shown(&domain, 18 * MIB) && !shown(&domain, 19 * MIB - 1) && shown(&domain, 18 * MIB - 1) && shown(&domain, 19 * MIB));
    program.clean(id);
    program.convert(id, SHARED, 18 * MIB, MIB);
    assert!(shown(&domain, 18 * MIB));
    program.clean(id);
}

/// Everyone who maps the file sees it: several areas, several IOASes, another open /dev/iommu.
#[test]
fn everybody_over_the_file() {
    let program = Program::new();
    let (one, two) = (program.alloc(), program.alloc());
    let (first, second) = (program.attach(one), program.attach(two));
    let (fd, backing) = program.guest_memory(one, 16 * MIB, 8 * MIB);
    program.map_file(two, FIXED | RW, fd, 2 * MIB, 4 * MIB, 1 << 40).unwrap();
    program.map_file(two, FIXED | READ, fd, 0, 4 * MIB, 2 << 40).unwrap();
    let other = program.again();
    let theirs = other.alloc();
    let third = other.attach(theirs);
    other.map_file(theirs, FIXED | RW, fd, 0, 8 * MIB, 0).unwrap();
    assert!(Arc::ptr_eq(&other.backing(theirs, 0), &backing), "one file, one backing");
    let mut contexts =
        [(&program, &first, 16 * MIB), (&program, &second, (1 << 40) - 2 * MIB), (&program, &second, 2 << 40), (&other, &third, 0)]
            .map(|(program, domain, base)| (program.device(domain).1, base));
    program.convert(one, PRIVATE, 19 * MIB, MIB);
    for (dma, base) in &mut contexts {
        assert_eq!(dma.read(Iova::new(*base + 3 * MIB), &mut [0; 8]).unwrap_err().table, RefusedBy::SecureWorld);
        dma.read(Iova::new(*base + 3 * MIB - 8), &mut [0; 8]).unwrap();
    }
    [(&program, one), (&program, two), (&other, theirs)].into_iter().for_each(|(program, id)| program.clean(id));
    // Through any of the areas it comes back.
    assert_eq!(program.convert_as(ASID, two, SHARED, (1 << 40) + MIB, MIB, 19 * MIB), (Ok(()), MIB));
    for (dma, base) in &mut contexts {
        dma.read(Iova::new(*base + 3 * MIB), &mut [0; 8]).unwrap();
    }
    [(&program, one), (&program, two), (&other, theirs)].into_iter().for_each(|(program, id)| program.clean(id));
}

#[test]
fn several_areas_in_one_call() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (fd, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    let (_, other) = program.guest_memory(id, 20 * MIB, 4 * MIB);
    program.map_file(id, FIXED | RW, program.file(MIB), 0, MIB, 24 * MIB).unwrap();
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 19 * MIB, 7 * MIB, 1 << 30), (Err(Errno::NOENT), 0), "the last of it is not mapped");
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 19 * MIB, 5 * MIB + (512 << 10), 1 << 30), (Ok(()), 5 * MIB + (512 << 10)));
    assert_eq!((count(&backing, PageState::Private), count(&other, PageState::Private)), (256, 1024));
    let space = program.context.guest_space(ASID).unwrap();
    assert_eq!(space.gpa_of(&other, Page::new(0)), Some(Gpa::new((1 << 30) + MIB)), "one run of guest addresses over all of them");
    program.clean(id);
    // A page twice in one call: the second time it would need another address.
    program.map_file(id, FIXED | RW, fd, 0, PAGE, 32 * MIB).unwrap();
    program.map_file(id, FIXED | RW, fd, 0, PAGE, 32 * MIB + PAGE).unwrap();
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 32 * MIB, 2 * PAGE, 2 << 30), (Err(Errno::EXIST), PAGE));
    program.clean(id);
}

#[test]
fn a_page_has_one_private_address() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 8 * MIB);
    program.convert(id, PRIVATE, 18 * MIB, MIB);
    let at = |to, iova, len, gpa| program.convert_as(ASID, id, to, iova, len, gpa);
    assert_eq!(at(PRIVATE, 18 * MIB, PAGE, 30 * MIB), (Err(Errno::EXIST), 0));
    assert_eq!(at(SHARED, 18 * MIB, PAGE, 30 * MIB), (Err(Errno::EXIST), 0), "nor back from where it is not");
    assert_eq!(at(PRIVATE, 17 * MIB, 2 * MIB, 41 * MIB), (Err(Errno::EXIST), 0), "a part of it is elsewhere: nothing happens");
    assert_eq!(at(PRIVATE, 20 * MIB, PAGE, 18 * MIB), (Err(Errno::EXIST), 0), "another page has that address");
    assert_eq!(count(&backing, PageState::Private), 256);
    // Done twice, and around what is done already.
    program.convert(id, PRIVATE, 18 * MIB, MIB);
    program.convert(id, PRIVATE, 17 * MIB, 3 * MIB);
    assert_eq!(program.context.guest_space(ASID).unwrap().slots().len(), 1);
    program.clean(id);
    // Shared pages have no address, so next time they may be private at another one.
    program.convert(id, SHARED, 18 * MIB, MIB);
    assert_eq!(program.context.guest_space(ASID).unwrap().slots().len(), 2);
    assert_eq!(at(PRIVATE, 18 * MIB, MIB, 30 * MIB), (Ok(()), MIB));
    assert_eq!(at(PRIVATE, 22 * MIB, MIB, 18 * MIB), (Ok(()), MIB));
    program.clean(id);
    program.convert(id, SHARED, 17 * MIB, MIB);
    program.convert(id, SHARED, 17 * MIB, MIB);
    program.clean(id);
}

#[test]
fn several_guests() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (fd, backing) = program.guest_memory(id, 16 * MIB, 8 * MIB);
    let convert = |asid, to, iova, gpa| program.convert_as(asid, id, to, iova, MIB, gpa);
    assert_eq!(convert(1, PRIVATE, 16 * MIB, 0), (Ok(()), MIB));
    assert_eq!(convert(2, PRIVATE, 17 * MIB, 0), (Ok(()), MIB), "each guest has addresses of its own");
    assert_eq!(convert(3, PRIVATE, 18 * MIB, 2 * MIB), (Ok(()), MIB));
    program.clean(id);
    for to in [PRIVATE, SHARED] {
        assert_eq!(convert(2, to, 16 * MIB, 0), (Err(Errno::EXIST), 0), "at an address that it uses");
        assert_eq!(convert(3, to, 16 * MIB, 0), (Err(Errno::EXIST), 0), "the same address as its owner's");
        assert_eq!(convert(3, to, 16 * MIB, 8 * MIB), (Err(Errno::EXIST), 0));
        // The last of the pages is another's: nothing of the call happens.
        assert_eq!(program.convert_as(3, id, to, 17 * MIB, 2 * MIB, MIB), (Err(Errno::EXIST), 0));
    }
    program.clean(id);
    assert_eq!(count(&backing, PageState::Private), 768);
    assert_eq!([1, 2, 3].map(|asid| program.context.guest_space(asid).unwrap().slots().len()), [1; 3]);
    // From one guest to the next by way of the host.
    assert_eq!(convert(1, SHARED, 16 * MIB, 0), (Ok(()), MIB));
    assert_eq!(convert(3, PRIVATE, 16 * MIB, 8 * MIB), (Ok(()), MIB));
    assert_eq!(program.host.iommu().rmp().entry(oa(&backing, 5)).asid(), 3);
    program.clean(id);
    // Another open /dev/iommu has guests of its own, and none of these.
    let other = program.again();
    let theirs = other.alloc();
    other.map_file(theirs, FIXED | RW, fd, 0, 8 * MIB, 0).unwrap();
    assert_eq!(other.convert_as(2, theirs, SHARED, MIB, MIB, 0), (Err(Errno::BUSY), 0));
    assert_eq!(other.convert_as(4, theirs, SHARED, MIB, MIB, 0), (Err(Errno::EXIST), 0));
    assert_eq!(other.convert_as(4, theirs, PRIVATE, 5 * MIB, MIB, 0), (Ok(()), MIB));
    other.clean(theirs);
    program.clean(id);
    other.close();
    assert_eq!(count(&backing, PageState::Private), 768, "only what was its own is given back");
    assert_eq!(convert(4, PRIVATE, 21 * MIB, MIB), (Ok(()), MIB), "the number is free again");
    program.clean(id);
}

#[test]
fn holes_in_the_file() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    backing.punch(Span::of(Page::new(300), Page::new(309))).unwrap();
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 16 * MIB, 4 * MIB, 0), (Err(Errno::INVAL), 0));
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 16 * MIB, 300 * PAGE, 0), (Ok(()), 300 * PAGE));
    program.clean(id);
    // Private pages that the file's owner takes away are the guest's no more, large entries and small ones.
    assert_eq!(program.host.iommu().rmp().size_at(oa(&backing, 0)), RmpSize::K4);
    program.convert(id, PRIVATE, 18 * MIB, 2 * MIB);
    assert_eq!(program.host.iommu().rmp().size_at(oa(&backing, 512)), RmpSize::M2);
    for (first, last) in [(10, 19), (600, 600), (1000, 1023)] {
        backing.punch(Span::of(Page::new(first), Page::new(last))).unwrap();
    }
    assert_eq!((program.assigned(&backing), count(&backing, PageState::Absent)), (812 - 35, 45));
    program.clean(id);
    backing.populate(backing.pages(), PageState::Shared).unwrap();
    program.clean(id);
    assert_eq!(program.convert_as(ASID, id, PRIVATE, 16 * MIB + 12 * PAGE, PAGE, 1 << 30), (Ok(()), PAGE), "at an address of today");
    program.clean(id);
    backing.close();
    assert_eq!(program.assigned(&backing), 0);
    program.clean(id);
}

/// What fails half way says how far it came: so much is converted and nothing else, and repeating the call does the rest.
#[test]
fn how_far_a_refused_call_has_come() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    program.guest_memory(id, 20 * MIB, 4 * MIB);
    let private = |id, iova| program.backing(id, iova).state(Page::new((iova & (4 * MIB - 1)) >> 12)) == PageState::Private;
    let (mut partial, mut names) = (0, Vec::new());
    for step in 1.. {
        assert!(step < 3000, "it never succeeds");
        let nth = sync::fail::nth(step);
        let (answer, done) = program.convert_as(ASID, id, PRIVATE, 18 * MIB + PAGE, 4 * MIB, 18 * MIB + PAGE);
        let fired = nth.fired();
        drop(nth);
        let Some(name) = fired else {
            assert_eq!((answer, done), (Ok(()), 4 * MIB));
            break;
        };
        // One refusal by the secure world is tried again by itself.
        if answer.is_ok() {
            assert_eq!(done, 4 * MIB, "{name}");
        } else {
            names.push(name);
            assert!(done < 4 * MIB && done.is_multiple_of(PAGE), "{name}");
            partial += u64::from(done > 0);
        }
        let told = name != "convert.stage2";
        for page in 0..4 * MIB / PAGE {
            let iova = 18 * MIB + PAGE + page * PAGE;
            assert!(!told || private(id, iova) == (page * PAGE < done), "{name}: page {page} with {done:#x} done");
        }
        assert_eq!(leaves(&domain, 16 * MIB, 8 * MIB).iter().sum::<u64>() == 8 * MIB, told || answer.is_ok(), "{name}");
        if told {
            program.clean(id);
        }
        let rest = 4 * MIB - done;
        assert_eq!(program.convert_as(ASID, id, PRIVATE, 18 * MIB + PAGE + done, rest, 18 * MIB + PAGE + done), (Ok(()), rest), "{name}");
        program.clean(id);
        program.convert(id, SHARED, 18 * MIB + PAGE, 4 * MIB);
        program.clean(id);
    }
    assert!(partial > 0 && names.len() > 5, "{partial} of {names:?}");
    assert_eq!(count(&backing, PageState::Private), 511);
}

/// When the last descriptor goes, so do the guests: everything is the host's again.
#[test]
fn close_gives_everything_back() {
    let program = Program::new();
    let (id, second) = (program.alloc(), program.alloc());
    program.attach(id);
    let (fd, backing) = program.guest_memory(id, 16 * MIB, 8 * MIB);
    let (other_fd, other) = program.guest_memory(second, 16 * MIB, 2 * MIB);
    program.convert(id, PRIVATE, 16 * MIB, 4 * MIB);
    program.convert(id, PRIVATE, 22 * MIB + PAGE, PAGE);
    assert_eq!(program.convert_as(7, second, PRIVATE, 16 * MIB, 2 * MIB, 0).0, Ok(()));
    // Unmapped, and even the IOAS is gone: still the guest's.
    program.unmap(id, 0, u64::MAX).unwrap();
    program.destroy(second).unwrap();
    assert_eq!((program.assigned(&backing), program.assigned(&other)), (1025, 512));
    let hold = program.context.hold();
    let (host, local) = program.close();
    assert_eq!(host.iommu().rmp().assigned_in(backing.window()), 1025, "another descriptor keeps the context");
    drop(hold);
    assert_eq!(
        [&backing, &other].map(|backing| (host.iommu().rmp().assigned_in(backing.window()), count(backing, PageState::Shared))),
        [(0, 2048), (0, 512)]
    );
    assert_eq!(host.iommu().rmp().assigned_pages(), 0);
    let weak = [Arc::downgrade(&backing), Arc::downgrade(&other)];
    drop((backing, other));
    [fd, other_fd].into_iter().for_each(|fd| local.close(fd).unwrap());
    assert!(weak.iter().all(|backing| backing.upgrade().is_none()), "nobody keeps the memory");
    // The next one may use addresses and numbers again.
    let program = Program::on(&host, Local::new());
    let id = program.alloc();
    program.attach(id);
    program.guest_memory(id, 16 * MIB, 8 * MIB);
    assert_eq!(program.convert_as(7, id, PRIVATE, 16 * MIB, 8 * MIB, 0).0, Ok(()));
    program.clean(id);
}

/// A page that the secure world keeps is lost, and nothing else is.
#[test]
fn a_page_that_is_kept() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let (fd, backing) = program.guest_memory(id, 16 * MIB, 2 * MIB);
    program.convert(id, PRIVATE, 16 * MIB, MIB);
    let rmp = Arc::clone(program.host.iommu().rmp());
    rmp.set_in_use(oa(&backing, 100), true);
    assert_eq!(program.convert_as(ASID, id, SHARED, 16 * MIB, MIB, 16 * MIB), (Err(Errno::IO), 100 * PAGE));
    assert_eq!((rmp.leaked(), rmp.leaked_pages()), (vec![oa(&backing, 100)], 1));
    assert!(!shown(&domain, 16 * MIB + 100 * PAGE) && shown(&domain, 16 * MIB + 99 * PAGE));
    program.clean(id);
    let rest = MIB - 101 * PAGE;
    assert_eq!(program.convert_as(ASID, id, SHARED, 16 * MIB + 101 * PAGE, rest, 16 * MIB + 101 * PAGE), (Ok(()), rest));
    program.clean(id);
    program.convert(id, PRIVATE, 17 * MIB, MIB);
    rmp.set_in_use(oa(&backing, 300), true);
    let (weak, window) = (Arc::downgrade(&backing), backing.window());
    drop(backing);
    let (host, local) = program.close();
    local.close(fd).unwrap();
    assert_eq!((host.iommu().rmp().assigned_in(window), host.iommu().rmp().leaked_pages()), (2, 2));
    assert!(weak.upgrade().is_some(), "its addresses are never anybody's again");
}

/// Where somebody cannot show a large private entry whole, there is none: an IOAS of single pages, a page table without such leaves, an area of another
/// alignment, an area that ends inside.
#[test]
fn entries_fit_everybody() {
    use lockstep_iommufd::uapi::{OPTION_HUGE_PAGES, OPTION_SET};
    for awkward in 0..5 {
        let program = Program::new();
        let (id, other) = (program.alloc(), program.alloc());
        let domain = program.attach(id);
        let (fd, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
        let late = awkward == 4;
        if awkward == 0 {
            program.option(OPTION_HUGE_PAGES, OPTION_SET, other, 0).unwrap();
        }
        let sizes = if awkward == 1 { addr::SizeSet(MIB | PAGE) } else { addr::SizeSet::ALL };
        program.attach_with(other, &iommu::DomainConfig { sizes, ..Default::default() }).unwrap();
        let (start, len, at) = match awkward {
            2 => (0, 4 * MIB, 16 * MIB + PAGE),
            3 => (MIB, 3 * MIB, 17 * MIB),
            _ => (0, 4 * MIB, 16 * MIB),
        };
        if !late {
            program.map_file(other, FIXED | RW, fd, start, len, at).unwrap();
        }
        program.convert(id, PRIVATE, 16 * MIB, 4 * MIB);
        let large = |page| program.host.iommu().rmp().size_at(oa(&backing, page)) == RmpSize::M2;
        assert_eq!([large(0), large(512)], [late, late || awkward == 3], "{awkward}");
        if late {
            // Mapped and copied afterwards: split just there.
            program.map_file(other, FIXED | RW, fd, MIB, MIB, 1 << 40).unwrap();
            assert_eq!([large(0), large(512)], [false, true]);
            program.copy(FIXED | RW, (id, 19 * MIB), MIB, (other, PAGE)).unwrap();
            assert_eq!([large(0), large(512)], [false, false]);
        }
        assert_eq!(leaves(&domain, 16 * MIB, 4 * MIB).iter().sum::<u64>(), 4 * MIB);
        program.clean(id);
        program.clean(other);
        program.convert(id, SHARED, 16 * MIB, 4 * MIB);
        program.clean(id);
        program.clean(other);
    }
}
