//! IOMMU_HWPT_ALLOC, and what attaching does with page tables.

mod fakes;

use addr::{Iova, Span};
use fakes::{Desk, KIND, errno, hwpt_alloc};
use lockstep_iommufd::uapi::{HWPT_DIRTY_TRACKING, HWPT_FAULT_ID_VALID, HWPT_NEST_PARENT, HWPT_PASID, HwptAlloc};
use rustix::io::Errno;

type Edit = fn(&mut HwptAlloc);

/// Each line adds a mistake to those below it: which one is answered says what is looked at first.
#[test]
fn mistakes_are_found_in_order() {
    let desk = Desk::new();
    let device = desk.bind(desk.fake());
    let ioas = desk.ioas();
    let lines: [(Errno, Edit); 7] = [
        (Errno::NOENT, |arg| (arg.flags, arg.fault_id) = (HWPT_FAULT_ID_VALID, 99)),
        (Errno::FAULT, |arg| (arg.data_type, arg.data_len, arg.data_uptr) = (KIND, 8, 0)),
        (Errno::INVAL, |arg| arg.data_len = 3),
        (Errno::OPNOTSUPP, |arg| arg.flags |= 0x10),
        (Errno::INVAL, |arg| arg.pt_id = 99),
        (Errno::NOENT, |arg| arg.dev_id = 98),
        (Errno::INVAL, |arg| arg.data_len = 0),
    ];
    let mut arg = hwpt_alloc(device.id(), ioas);
    arg.__reserved2 = 1;
    for (expected, edit) in lines {
        edit(&mut arg);
        assert_eq!(desk.call(0x89, &mut arg), Err(expected), "{arg:?}");
    }
    arg.__reserved = 1;
    assert_eq!(desk.call(0x89, &mut arg), Err(Errno::OPNOTSUPP));
    // Nothing was left behind: the next id is the next one.
    assert_eq!(desk.hwpt(&device, ioas, 0), Ok(ioas + 1));
}

#[test]
fn flags_have_their_rules() {
    let desk = Desk::new();
    let mut plain = desk.fake();
    plain.capabilities = 0;
    let (device, plain) = (desk.bind(desk.fake()), desk.bind(plain));
    let ioas = desk.ioas();
    assert_eq!(desk.hwpt(&plain, ioas, HWPT_DIRTY_TRACKING), Err(Errno::OPNOTSUPP));
    assert_eq!(desk.hwpt(&device, ioas, HWPT_FAULT_ID_VALID | HWPT_NEST_PARENT), Err(Errno::OPNOTSUPP));
    let parent = desk.hwpt(&device, ioas, HWPT_NEST_PARENT).unwrap();
    let tracked = desk.hwpt(&device, ioas, HWPT_DIRTY_TRACKING).unwrap();
    assert_eq!(errno(plain.attach(None, tracked)), Err(Errno::INVAL));
    assert_eq!(errno(device.attach(None, tracked)), Ok(tracked));

    assert_eq!(desk.nested_with(&device, parent, HWPT_DIRTY_TRACKING, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(desk.hwpt(&device, parent, 0), Err(Errno::OPNOTSUPP), "without data");
    assert_eq!(desk.nested(&device, tracked), Err(Errno::INVAL), "not a parent");
    let nested = desk.nested(&device, parent).unwrap();
    assert_eq!(desk.nested(&device, nested), Err(Errno::INVAL), "no nesting on nesting");
    assert_eq!(desk.nested(&device, device.id()), Err(Errno::INVAL));
    let mut other = desk.fake();
    other.unit = 8;
    let other = desk.bind(other);
    assert_eq!(desk.nested(&other, parent), Err(Errno::INVAL));
    assert_eq!(errno(other.attach(None, parent)), Err(Errno::INVAL));

    assert_eq!(desk.destroy(parent), Err(Errno::BUSY));
    assert_eq!(desk.destroy(ioas), Err(Errno::BUSY));
    assert_eq!(desk.destroy(nested), Ok(0));
    assert_eq!(desk.destroy(parent), Ok(0));
    device.detach(None);
    assert_eq!(desk.destroy(tracked), Ok(0), "made by the ioctl, so it stays until now");
    assert_eq!(desk.destroy(ioas), Ok(0));
    assert_eq!(desk.destroy(device.id()), Err(Errno::BUSY));
}

#[test]
fn tables_that_attaching_makes_are_shared_and_go_with_the_last() {
    let desk = Desk::new();
    let (one, two) = (desk.bind(desk.fake()), desk.bind(desk.fake()));
    let ioas = desk.ioas();
    let manual = desk.hwpt(&one, ioas, 0).unwrap();
    let auto = one.attach(None, ioas).unwrap();
    assert_eq!(auto, manual + 1, "tables of the ioctl are not picked");
    assert_eq!(errno(two.attach(None, ioas)), Ok(auto));
    assert_eq!(errno(two.attach(None, auto)), Err(Errno::BUSY));
    assert_eq!(desk.destroy(auto), Err(Errno::BUSY));
    assert!(one.device().domain().is_some());
    one.detach(None);
    one.detach(None);
    assert!(one.device().domain().is_none() && one.hwpt(None).is_none());
    assert_eq!(desk.destroy(auto), Err(Errno::BUSY));
    two.detach(None);
    assert_eq!(desk.destroy(auto), Err(Errno::NOENT));
    assert_eq!(desk.context.ioas(ioas).unwrap().ioas().domains().len(), 1);
}

/// A device that does not go with the first table is put on the next.
#[test]
fn einval_means_the_next_table() {
    let desk = Desk::new();
    let mut other = desk.fake();
    other.unit = 8;
    let third = desk.fake();
    third.refuses.lock().unwrap().extend([Errno::INVAL, Errno::INVAL]);
    let fourth = desk.fake();
    fourth.refuses.lock().unwrap().push(Errno::IO);
    let (one, other, third, fourth) = (desk.bind(desk.fake()), desk.bind(other), desk.bind(third), desk.bind(fourth));
    let ioas = desk.ioas();
    let first = one.attach(None, ioas).unwrap();
    let second = other.attach(None, ioas).unwrap();
    assert_ne!(first, second);
    // Refused by the first, of another IOMMU is the second, refused by a new one of its own.
    assert_eq!(errno(third.attach(None, ioas)), Err(Errno::INVAL));
    assert_eq!(errno(third.attach(None, ioas)), Ok(first));
    assert_eq!(errno(fourth.attach(None, ioas)), Err(Errno::IO), "any other error is the answer");
    assert_eq!(desk.ioas(), second + 1, "failed tables leave no id behind");
}

#[test]
fn replacing_makes_the_new_before_the_old_goes() {
    let desk = Desk::new();
    let device = desk.bind(desk.fake());
    let (one, two) = (desk.ioas(), desk.ioas());
    assert_eq!(errno(device.replace(None, one)), Err(Errno::INVAL));
    let before = device.attach(None, one).unwrap();
    assert_eq!(errno(device.replace(None, one)), Ok(before), "the same is no change");
    let after = device.replace(None, two).unwrap();
    assert_eq!(after, before + 1);
    assert_eq!(desk.destroy(before), Err(Errno::NOENT));
    assert_eq!(desk.destroy(one), Ok(0));
    assert_eq!(errno(device.replace(None, 99)), Err(Errno::NOENT));
    assert_eq!(errno(device.replace(None, device.id())), Err(Errno::INVAL));
    assert_eq!(errno(device.attach(None, two)), Err(Errno::BUSY));
}

#[test]
fn what_a_device_reserves_is_reserved_while_it_is_attached() {
    let desk = Desk::new();
    let span = |start, last| Span::of(Iova::new(start), Iova::new(last));
    let mut fake = desk.fake();
    fake.reserved = vec![span(0x1000, 0x1fff), span(0x8000, 0x8fff)];
    let device = desk.bind(fake);
    let (one, two) = (desk.ioas(), desk.ioas());
    let ranges = |id: u32| desk.context.ioas(id).unwrap().ioas().ranges();
    let whole = ranges(one);
    device.attach(None, one).unwrap();
    assert!(ranges(one).contains(&span(0x2000, 0x7fff)));
    // In the other one something is in the way of the second range: the first is given back, and the device stays.
    let blocked = desk.context.ioas(two).unwrap();
    blocked.ioas().allow(&[span(0x8800, 0x9000)]).unwrap();
    assert_eq!(errno(device.replace(None, two)), Err(Errno::ADDRINUSE));
    assert_eq!(ranges(two), whole);
    assert!(ranges(one).contains(&span(0x2000, 0x7fff)) && device.hwpt(None).is_some());
    blocked.ioas().allow(&[]).unwrap();
    device.replace(None, two).unwrap();
    assert_eq!(ranges(one), whole);
    assert!(ranges(two).contains(&span(0x2000, 0x7fff)));
    // A PASID reserves nothing.
    device.detach(None);
    assert_eq!(ranges(two), whole);
    let table = desk.hwpt(&device, two, HWPT_PASID).unwrap();
    let with_domain = ranges(two);
    device.attach(Some(5), table).unwrap();
    assert_eq!(ranges(two), with_domain);
    device.unbind();
    assert_eq!(desk.destroy(table), Ok(0));
    assert_eq!(ranges(two), whole);
}

#[test]
fn pasids_go_with_tables_that_were_made_for_them() {
    let desk = Desk::new();
    let mut fake = desk.fake();
    fake.bits = 4;
    let device = desk.bind(fake);
    let ioas = desk.ioas();
    let plain = desk.hwpt(&device, ioas, 0).unwrap();
    let [one, two] = [(); 2].map(|()| desk.hwpt(&device, ioas, HWPT_PASID).unwrap());
    assert_eq!(errno(device.attach(Some(3), plain)), Err(Errno::INVAL));
    assert_eq!(errno(device.attach(Some(3), ioas)), Err(Errno::INVAL));
    assert_eq!(errno(device.attach(Some(16), one)), Err(Errno::INVAL), "4 bits");
    device.attach(None, plain).unwrap();
    assert_eq!(errno(device.attach(Some(3), one)), Err(Errno::INVAL), "the device's own table is for none");
    device.replace(None, one).unwrap();
    assert_eq!(errno(device.attach(Some(15), one)), Ok(one));
    assert_eq!(errno(device.attach(Some(15), one)), Err(Errno::BUSY));
    assert_eq!(errno(device.replace(None, plain)), Err(Errno::INVAL), "a PASID is attached");
    assert_eq!(errno(device.replace(Some(15), two)), Ok(two));
    assert_eq!(errno(device.replace(Some(3), two)), Err(Errno::INVAL));
    assert_eq!(device.hwpt(Some(15)).map(|table| table.id()), Some(two));
    assert_eq!(errno(device.attach(Some(0), one)), Err(Errno::BUSY), "PASID 0 is the device itself");
    device.detach(None);
    assert_eq!(errno(device.attach(None, plain)), Err(Errno::INVAL));
    device.detach(Some(15));
    device.detach(Some(15));
    assert_eq!(errno(device.attach(None, plain)), Ok(plain));
    for table in [one, two] {
        assert_eq!(desk.destroy(table), Ok(0));
    }
}

/// What the driver refuses leaves everything as it was.
#[test]
fn a_refused_attach_changes_nothing() {
    let desk = Desk::new();
    let fake = desk.fake();
    let log = std::sync::Arc::clone(&fake.log);
    let device = desk.bind(fake);
    let (one, two) = (desk.ioas(), desk.ioas());
    let table = device.attach(None, one).unwrap();
    let domain = device.device().domain().unwrap();
    // The second step of the DMA side fails: the driver goes back to where it was.
    let plan = sync::fail::nth(u64::MAX);
    let before = plan.steps();
    drop(plan);
    assert_eq!(before, 0);
    for step in 1.. {
        let plan = sync::fail::nth(step);
        let answer = errno(device.replace(None, two));
        let fired = plan.fired();
        drop(plan);
        if answer.is_ok() {
            assert_eq!(fired, None);
            break;
        }
        assert_eq!(answer, Err(Errno::NOMEM), "{fired:?}");
        assert!(device.device().domain().is_some_and(|own| std::sync::Arc::ptr_eq(&own, &domain)), "{fired:?}");
        assert_eq!(device.hwpt(None).map(|table| table.id()), Some(table));
        assert_eq!(desk.context.ioas(two).unwrap().ioas().domains().len(), 0, "{fired:?}");
        assert!(log.lock().unwrap().last().unwrap().ends_with(&table.to_string()), "{fired:?}");
    }
    assert_eq!(desk.destroy(one), Ok(0));
}

#[test]
fn a_group_moves_as_one() {
    let desk = Desk::new();
    let [one, two] = desk.bind_pair(desk.fake(), desk.fake());
    let ioas = desk.ioas();
    let [a, b] = [(); 2].map(|()| desk.hwpt(&one, ioas, 0).unwrap());
    one.attach(None, a).unwrap();
    assert_eq!(errno(two.attach(None, b)), Err(Errno::INVAL), "all of a group share a table");
    assert_eq!(errno(two.replace(None, b)), Err(Errno::INVAL), "not attached");
    two.attach(None, a).unwrap();
    one.replace(None, b).unwrap();
    assert_eq!(two.hwpt(None).map(|table| table.id()), Some(b));
    assert!(std::sync::Arc::ptr_eq(&two.device().domain().unwrap(), &one.device().domain().unwrap()));
    assert_eq!(desk.destroy(a), Ok(0));
    one.unbind();
    assert_eq!(desk.destroy(b), Err(Errno::BUSY));
    two.unbind();
    assert_eq!(desk.destroy(b), Ok(0));
}
