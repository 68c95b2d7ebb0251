//! Software users: they pin, and let go when an unmap asks them to (rules 28, 32, 40 to 45).

mod common;

use addr::{Iova, Span};
use backing::PinError;
use common::client::source;
use common::{MIB, PAGE, at, dump, ioas, iova, pages};
use lockstep_ioas::{Accessor, Error, Ioas, Pin, Source};
use pt::Perm;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Keeps its pins in a list and drops those that an unmap meets, as a driver does.
#[derive(Default)]
struct Driver {
    pins: Mutex<Vec<Pin>>,
    heard: Mutex<Vec<Span<Iova>>>,
}

impl Driver {
    fn on(ioas: &Arc<Ioas>) -> (Arc<Self>, Arc<Accessor>) {
        let driver = Arc::new(Self::default());
        let own = Arc::clone(&driver);
        let accessor = ioas.accessor(true, Arc::new(move |span| own.let_go(span))).unwrap();
        (driver, accessor)
    }

    fn let_go(&self, span: Span<Iova>) {
        self.heard.lock().unwrap().push(span);
        self.pins.lock().unwrap().retain(|pin| !pin.span().overlaps(span));
    }

    fn pin(&self, accessor: &Accessor, span: Span<Iova>) {
        self.pins.lock().unwrap().push(accessor.pin(span, false).unwrap());
    }
}

fn deaf(ioas: &Arc<Ioas>, pinning: bool) -> Result<(Arc<Accessor>, Arc<AtomicU64>), Error> {
    let calls = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&calls);
    let counting = Arc::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    Ok((ioas.accessor(pinning, counting)?, calls))
}

#[test]
fn pins_count_once_for_each_page() {
    let ioas = ioas();
    let (client, purse, source) = source(16, 16);
    ioas.map_source(&source, at(MIB), Perm::RW).unwrap();
    let (accessor, _) = deaf(&ioas, true).unwrap();
    let first = accessor.pin(iova(MIB + 2 * PAGE, 3 * PAGE), true).unwrap();
    let same = accessor.pin(iova(MIB + 2 * PAGE, 3 * PAGE), false).unwrap();
    let wider = accessor.pin(iova(MIB + 4 * PAGE, 2 * PAGE), false).unwrap();
    assert_eq!((client.pins(), purse.charged()), ("001111".into(), 4));
    assert_eq!(wider.pages().map(|(backing, span)| (backing.id(), span)).collect::<Vec<_>>(), [(source.backing().id(), pages(4, 2))]);
    let domain = ioas.iommu().domain().unwrap();
    ioas.attach(&domain).unwrap();
    assert_eq!(purse.charged(), 16);
    accessor.unpin(first);
    ioas.detach(&domain).unwrap();
    assert_eq!((client.pins(), purse.charged()), ("001111".into(), 4));
    drop(same);
    assert_eq!(client.pins(), "000011");
    drop(wider);
    assert_eq!((client.pins(), purse.charged()), (String::new(), 0));
}

#[test]
fn refusals() {
    let ioas = ioas();
    let (client, _, source) = source(16, 6);
    let short = Source::new(source.backing(), 0, 2 * PAGE, 0x7000_0000_0000, true, None);
    ioas.map_source(&short, at(MIB), Perm::READ).unwrap();
    let odd = Source::new(source.backing(), PAGE / 2, PAGE, 0x7000_0000_0800, true, None);
    ioas.map_source(&odd, at(MIB + 2 * PAGE), Perm::READ).unwrap();
    ioas.map_source(&source, at(4 * MIB), Perm::RW).unwrap();
    assert!(matches!(deaf(&ioas, true), Err(Error::InUse { .. })), "an area does not keep to whole pages");
    let (accessor, _) = deaf(&ioas, false).unwrap();
    let pin = |start, len, write| accessor.pin(iova(start, len), write).unwrap_err();
    let before = dump(&ioas);
    assert!(matches!(pin(MIB + 1, PAGE, false), Error::NotWholePages { .. }));
    assert!(matches!(pin(MIB, 3 * PAGE, false), Error::NotWholePages { at } if at == iova(MIB + 2 * PAGE, PAGE)));
    assert!(matches!(pin(MIB, PAGE, true), Error::Denied { .. }));
    assert!(matches!(pin(4 * MIB + 15 * PAGE, 2 * PAGE, false), Error::NotMapped { at } if at == iova(4 * MIB + 16 * PAGE, PAGE)));
    assert!(matches!(pin(0, PAGE, false), Error::NotMapped { .. }));
    assert!(matches!(pin(4 * MIB, 7 * PAGE, false), Error::Pin(PinError::Limit { .. })));
    *client.bad.lock().unwrap() = Some(3);
    assert!(matches!(pin(4 * MIB, 5 * PAGE, false), Error::Pin(PinError::Fault { .. })));
    assert_eq!((dump(&ioas), client.pins()), (before, String::new()));
    drop(accessor.pin(iova(MIB, PAGE + 7), false).unwrap());
    ioas.unmap(iova(MIB + 2 * PAGE, PAGE)).unwrap();
    let (pinning, _) = deaf(&ioas, true).unwrap();
    assert_eq!(ioas.alignment(), PAGE);
    drop(pinning);
    assert_eq!(ioas.alignment(), 1);
    ioas.set_large_leaves(false).unwrap();
    drop(deaf(&ioas, true).unwrap());
    assert_eq!(ioas.alignment(), PAGE, "there are other reasons for it");
}

#[test]
fn unmap_asks_and_then_goes_on() {
    let ioas = ioas();
    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
    let (client, _, source) = source(16, 100);
    for place in [0, MIB, 2 * MIB] {
        ioas.map_source(&source, at(place), Perm::RW).unwrap();
    }
    let (driver, accessor) = Driver::on(&ioas);
    let (_deaf, heard) = deaf(&ioas, false).unwrap();
    driver.pin(&accessor, iova(MIB, PAGE));
    driver.pin(&accessor, iova(MIB + PAGE, PAGE));
    driver.pin(&accessor, iova(2 * MIB, 16 * PAGE));
    assert_eq!(ioas.unmap(iova(0, 2 * MIB)).unwrap(), 32 * PAGE);
    assert_eq!(*driver.heard.lock().unwrap(), [iova(MIB, 16 * PAGE)], "once, for the area that had pins");
    assert_eq!((heard.load(Ordering::Relaxed), driver.pins.lock().unwrap().len()), (1, 1));
    assert_eq!(ioas.unmap_all().unwrap(), 16 * PAGE);
    assert_eq!(client.pins(), "");
}

#[test]
fn who_does_not_let_go_is_named_in_the_end() {
    let ioas = ioas();
    let (client, _, source) = source(4, 4);
    ioas.map_source(&source, at(0), Perm::RW).unwrap();
    ioas.map_source(&source, at(MIB), Perm::RW).unwrap();
    let (accessor, calls) = deaf(&ioas, true).unwrap();
    let pin = accessor.pin(iova(MIB, PAGE), false).unwrap();
    assert!(matches!(ioas.unmap(iova(0, 2 * MIB)), Err(Error::Deadlock { area }) if area == iova(MIB, 4 * PAGE)));
    assert_eq!((calls.load(Ordering::Relaxed), ioas.areas().len()), (100, 1), "the area below is gone");
    assert!(matches!(accessor.pin(iova(MIB + PAGE, PAGE), false), Err(Error::Shut { .. })), "it stays closed");
    assert!(matches!(accessor.read(Iova::new(MIB), &mut [0]), Err(Error::Shut { .. })));
    drop(pin);
    assert_eq!(ioas.unmap(iova(MIB, MIB)).unwrap(), 4 * PAGE);
    assert_eq!((calls.load(Ordering::Relaxed), client.pins()), (100, String::new()));
}

#[test]
fn locked_areas_stay() {
    let ioas = ioas();
    let (_client, _, source) = source(4, 4);
    ioas.map_source(&source, at(0), Perm::RW).unwrap();
    assert!(matches!(ioas.lock_areas(iova(0, MIB)), Err(Error::NotMapped { .. })));
    let (driver, accessor) = Driver::on(&ioas);
    driver.pin(&accessor, iova(0, PAGE));
    let locks = ioas.lock_areas(iova(PAGE, PAGE)).unwrap();
    let again = ioas.lock_areas(iova(0, 2 * PAGE)).unwrap();
    assert!(matches!(ioas.unmap(iova(0, PAGE)), Err(Error::Busy { .. })), "busy comes before the cut");
    assert!(matches!(ioas.split(Iova::new(PAGE)), Err(Error::Busy { .. })));
    drop(locks);
    assert!(matches!(ioas.unmap(iova(0, MIB)), Err(Error::Busy { .. })));
    drop(again);
    assert!(driver.heard.lock().unwrap().is_empty(), "a locked area asks nobody");
    assert_eq!(ioas.unmap(iova(0, MIB)).unwrap(), 4 * PAGE);
}

#[test]
fn moves_from_one_address_space_to_another() {
    let (old, new) = (ioas(), ioas());
    let (client, _, source) = source(4, 4);
    old.map_source(&source, at(0), Perm::RW).unwrap();
    new.map_source(&source, at(MIB), Perm::RW).unwrap();
    let (driver, accessor) = Driver::on(&old);
    driver.pin(&accessor, iova(0, PAGE));
    accessor.move_to(&new).unwrap();
    assert_eq!(
        (driver.heard.lock().unwrap().as_slice(), client.pins(), old.alignment(), new.alignment()),
        (&[Span::whole()][..], String::new(), 1, PAGE)
    );
    driver.pin(&accessor, iova(MIB, PAGE));
    accessor.write(Iova::new(MIB + 3), b"moved").unwrap();
    assert_eq!(client.peek(3, 5), b"moved");
    let odd = ioas();
    odd.map_source(&Source::new(source.backing(), 1, 5, 1, true, None), at(1), Perm::RW).unwrap();
    assert!(matches!(accessor.move_to(&odd), Err(Error::InUse { .. })));
    assert!(accessor.ioas().is_some_and(|home| Arc::ptr_eq(&home, &new)) && client.pins() == "1");
    accessor.leave();
    assert_eq!((client.pins(), new.alignment()), (String::new(), 1));
    assert!(matches!(accessor.pin(iova(MIB, PAGE), false), Err(Error::Homeless)));
    assert!(matches!(accessor.read(Iova::new(MIB), &mut [0]), Err(Error::Homeless)));
    accessor.move_to(&new).unwrap();
    assert_eq!(new.alignment(), PAGE);
    drop((driver, accessor));
    assert_eq!(new.alignment(), 1);
}

#[test]
fn bytes_of_a_client_go_through_its_owner() {
    let ioas = ioas();
    let (client, purse, source) = source(40, 0);
    ioas.map_source(&source, at(3 * MIB + 1), Perm::RW).unwrap();
    let part = Source::new(source.backing(), 100, 50, 100, false, None);
    ioas.map_source(&part, at(3 * MIB + 1 + 40 * PAGE), Perm::READ).unwrap();
    let (accessor, _) = deaf(&ioas, false).unwrap();
    let bytes: Vec<u8> = (0..30 * PAGE).map(|n| ((n * 11) >> 4) as u8).collect();
    accessor.write(Iova::new(3 * MIB + 1 + 0x1234), &bytes).unwrap();
    assert!(client.peek(0x1234, bytes.len()) == bytes);
    let mut back = vec![0; bytes.len()];
    accessor.read(Iova::new(3 * MIB + 1 + 0x1234), &mut back).unwrap();
    assert!(back == bytes && client.calls.load(Ordering::Relaxed) == 0 && purse.charged() == 0, "memory is touched as it is");
    // Over the border of two areas, the second of which is read-only, and then into a gap.
    client.poke(100, b"abc");
    let mut over = [0; 2 + 3];
    accessor.read(Iova::new(3 * MIB + 1 + 40 * PAGE - 2), &mut over).unwrap();
    assert_eq!(&over[2..], b"abc");
    assert!(matches!(accessor.write(Iova::new(3 * MIB + 1 + 40 * PAGE - 2), b"xyz"), Err(Error::Denied { .. })));
    assert_eq!(client.peek(40 * PAGE - 2, 2), b"xy", "what comes before has been done");
    let mut too_far = [0; 51];
    assert!(matches!(accessor.read(Iova::new(3 * MIB + 1 + 40 * PAGE), &mut too_far), Err(Error::NotMapped { .. })));
    assert_eq!(&too_far[..3], b"abc");
    *client.bad.lock().unwrap() = Some(2);
    assert!(matches!(accessor.read(Iova::new(3 * MIB + 1 + PAGE), &mut back), Err(Error::Fault { page }) if page.get() == 2));
    // What is like a file is pinned for it.
    client.pins_for_access.store(true, Ordering::Relaxed);
    assert!(matches!(accessor.read(Iova::new(3 * MIB + 1 + PAGE), &mut back), Err(Error::Pin(PinError::Fault { .. }))));
    accessor.read(Iova::new(3 * MIB + 1 + 3 * PAGE), &mut [0; 8]).unwrap();
    assert_eq!(client.pins(), "");
}

/// Threads pin and unpin while others unmap and map again: nobody is left with a pin of an area that is gone, and nothing hangs.
#[test]
fn pins_race_with_unmap() {
    let ioas = ioas();
    let (client, purse, source) = source(16, 1 << 20);
    ioas.map_source(&source, at(0), Perm::RW).unwrap();
    let (driver, accessor) = Driver::on(&ioas);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (driver, accessor) = (&driver, &accessor);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..4000 {
                    if let Ok(pin) = accessor.pin(iova(random.u64(..12) * PAGE, 4 * PAGE), random.bool()) {
                        let mut pins = driver.pins.lock().unwrap();
                        pins.push(pin);
                        let surplus = pins.len().saturating_sub(8);
                        drop(pins.drain(..surplus).collect::<Vec<_>>());
                    }
                }
            });
        }
        scope.spawn(|| {
            for round in 0..1000 {
                if round % 16 == 0 {
                    ioas.attach(&ioas.iommu().domain().unwrap()).unwrap();
                } else if round % 16 == 8 {
                    ioas.detach(&ioas.domains()[0]).unwrap();
                }
                match ioas.unmap(iova(0, 16 * PAGE)) {
                    // A pin that is not in the driver's list yet when it is asked.
                    Ok(_) | Err(Error::Deadlock { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
                match ioas.map_source(&source, at(0), Perm::RW) {
                    Ok(_) | Err(Error::Occupied { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    });
    driver.pins.lock().unwrap().clear();
    ioas.unmap_all().unwrap();
    assert_eq!((client.pins(), purse.charged()), (String::new(), 0));
}
