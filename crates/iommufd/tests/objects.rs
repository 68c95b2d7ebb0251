//! Objects: ids, tombstones, users, the order in which they go, and threads that look for what others destroy.

mod common;

use common::{Program, Stop, errno};
use lockstep_iommufd::object::{Head, Held, Object};
use lockstep_iommufd::{Context, File, uapi};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// Something that may need another one, and notes when it goes.
#[derive(Default)]
struct Thing {
    head: Head,
    needs: Mutex<Vec<Held<Thing>>>,
    gone: Arc<Mutex<Vec<u32>>>,
    destroyed: AtomicU32,
}

impl Object for Thing {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "thing"
    }

    fn destroy(&self, _: &Context) {
        self.destroyed.fetch_add(1, Ordering::Relaxed);
        self.gone.lock().unwrap().push(self.head.id());
        self.needs.lock().unwrap().clear();
    }
}

fn thing(gone: &Arc<Mutex<Vec<u32>>>, needs: &[&Arc<Thing>]) -> Arc<Thing> {
    let needs = needs.iter().map(|other| Held::new(other).unwrap()).collect();
    Arc::new(Thing { needs: Mutex::new(needs), gone: Arc::clone(gone), ..Thing::default() })
}

#[test]
fn an_id_in_the_making_is_taken_and_not_found() {
    let program = Program::new();
    let context = &program.context;
    let half = thing(&Arc::default(), &[]);
    assert_eq!(context.enroll(&*half).unwrap(), 1);
    assert_eq!(errno(context.get::<Thing>(1, "thing").map(|_| ())), Errno::NOENT);
    assert!(context.find(1).is_none());
    assert_eq!(errno(program.destroy(1)), Errno::NOENT);
    assert_eq!(program.alloc(), 2, "nobody else gets it");
    program.destroy(2).unwrap();
    assert_eq!(errno(program.option(uapi::OPTION_RLIMIT_MODE, uapi::OPTION_SET, 0, 1)), Errno::BUSY, "the table is not empty");
    context.publish(Arc::clone(&half) as _);
    assert!(Arc::ptr_eq(&context.get::<Thing>(1, "thing").unwrap(), &half));
    let other = thing(&Arc::default(), &[]);
    assert_eq!(context.enroll(&*other).unwrap(), 2);
    context.abandon(&*other);
    assert_eq!(program.alloc(), 2);
}

#[test]
fn a_wrong_kind_is_not_found() {
    let program = Program::new();
    let id = program.context.add(thing(&Arc::default(), &[])).unwrap();
    let ioas = program.alloc();
    assert_eq!(errno(program.map(id, 7, 0, 4096, 0)), Errno::NOENT);
    assert_eq!(errno(program.context.get::<Thing>(ioas, "thing").map(|_| ())), Errno::NOENT);
    assert_eq!((program.context.all::<Thing>().len(), program.context.find(ioas).unwrap().kind()), (1, "IOAS"));
    program.destroy(id).unwrap();
}

#[test]
fn a_tombstone_stays_for_ever() {
    let program = Program::new();
    let context = &program.context;
    let (one, two) = (thing(&Arc::default(), &[]), thing(&Arc::default(), &[]));
    context.add(Arc::clone(&one) as _).unwrap();
    context.add(Arc::clone(&two) as _).unwrap();
    let user = Held::new(&one).unwrap();
    assert!(!context.entomb(1), "somebody needs it");
    drop(user);
    assert!(context.entomb(1) && !context.entomb(1) && !context.entomb(9));
    assert_eq!(one.destroyed.load(Ordering::Relaxed), 1);
    assert_eq!(errno(program.destroy(1)), Errno::NOENT);
    assert!(Held::new(&one).is_err());
    program.destroy(2).unwrap();
    assert_eq!((program.alloc(), program.alloc()), (2, 3), "the number is never anybody's again");
    for id in [2, 3] {
        program.destroy(id).unwrap();
    }
    assert_eq!(errno(program.option(uapi::OPTION_RLIMIT_MODE, uapi::OPTION_SET, 0, 1)), Errno::BUSY, "the table is not empty");
    program.close();
}

/// On close each object goes once, and after everybody who needs it.
#[test]
fn close_goes_from_the_leaves() {
    let program = Program::new();
    let gone: Arc<Mutex<Vec<u32>>> = Arc::default();
    let context = Arc::clone(&program.context);
    let add = |needs: &[&Arc<Thing>]| {
        let thing = thing(&gone, needs);
        context.add(Arc::clone(&thing) as _).unwrap();
        thing
    };
    let (root, other) = (add(&[]), add(&[]));
    let middle = add(&[&root]);
    let leaf = add(&[&middle, &other]);
    // One whose user has a lower number.
    let late = add(&[]);
    other.needs.lock().unwrap().push(Held::new(&late).unwrap());
    let all = [&root, &other, &middle, &leaf, &late];
    let ioas = program.alloc();
    let weak = Arc::downgrade(&program.ioas(ioas));
    program.close();
    let order = gone.lock().unwrap().clone();
    let place = |thing: &Arc<Thing>| order.iter().position(|id| *id == thing.head.id()).unwrap();
    assert_eq!(order.len(), all.len());
    assert!(place(&leaf) < place(&middle) && place(&middle) < place(&root) && place(&leaf) < place(&other) && place(&other) < place(&late));
    assert!(all.iter().all(|thing| thing.destroyed.load(Ordering::Relaxed) == 1));
    assert!(weak.upgrade().is_none() && context.all::<Thing>().is_empty());
}

/// Other descriptors keep what is behind the iommufd when that is closed.
#[test]
fn the_last_descriptor_closes() {
    let program = Program::new();
    let gone: Arc<Mutex<Vec<u32>>> = Arc::default();
    program.context.add(thing(&gone, &[])).unwrap();
    let (one, two) = (program.context.hold(), program.context.hold());
    let context = Arc::clone(&program.context);
    context.released();
    drop(one);
    assert!(gone.lock().unwrap().is_empty() && two.context().find(1).is_some());
    drop(two);
    assert_eq!(*gone.lock().unwrap(), [1]);
}

/// Threads become users of what another one destroys: each has it whole or not at all, and what somebody has is not destroyed.
#[test]
fn users_against_destroyers() {
    let program = Program::new();
    let context = &program.context;
    let over = AtomicBool::new(false);
    let busy = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    let Ok(thing) = context.get::<Thing>(1, "thing") else { continue };
                    let Ok(user) = Held::new(&thing) else { continue };
                    assert_eq!(user.destroyed.load(Ordering::Acquire), 0, "destroyed under a user's hands");
                    assert!(user.head.users() >= 1);
                }
            });
        }
        let _stop = Stop(&over);
        for _ in 0..5000 {
            let thing = thing(&Arc::default(), &[]);
            assert_eq!(context.add(Arc::clone(&thing) as _).unwrap(), 1);
            while let Err(refusal) = program.destroy(1) {
                assert_eq!(refusal.errno, Errno::BUSY);
                busy.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            assert_eq!((thing.destroyed.load(Ordering::Acquire), thing.head.users()), (1, 0));
        }
    });
}

/// Calls on an IOAS that goes away: `ENOENT`, or as if they had come before.
#[test]
fn calls_against_destroy() {
    let program = Program::new();
    let va = program.memory(4096);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..3000 {
                let id = program.alloc();
                std::thread::yield_now();
                program.destroy(id).unwrap();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..3000 {
                    match program.map(1, 7, va, 4096, 0x10000) {
                        Ok(_) => {}
                        Err(refusal) => assert!([Errno::NOENT, Errno::EXIST].contains(&refusal.errno), "{refusal}"),
                    }
                    let _ = program.unmap(1, 0, u64::MAX);
                }
            });
        }
    });
    assert_eq!(program.alloc(), 1);
    assert_eq!(program.areas(1), []);
}
