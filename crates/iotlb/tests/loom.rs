//! I-4, in every interleaving: once a writer's grace period is over, no translation, cached or not, reaches what it released. The ring has two
//! slots here, so that everything overruns it.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p lockstep-iotlb --test loom --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use addr::{Iova, Span};
use lockstep_iotlb::{Log, Missed};
use loom::thread;
use rig::{Context, Device, Domain, explore, page};
use std::sync::Arc;
use sync::Readers;

fn machine(pages: usize) -> (Arc<Domain>, Arc<Device>, Context) {
    let readers = Arc::new(Readers::new());
    let domain = Domain::new(1, pages, &readers);
    let device = Device::new(&domain);
    let context = Context::new(&device, &readers);
    (domain, device, context)
}

/// The walk may come before the clear, and the fill after the log entry; the guard that they are in is waited for.
#[test]
fn a_fill_races_an_unmap() {
    explore(4, || {
        let (domain, _device, mut context) = machine(1);
        let reader = thread::spawn(move || {
            context.access(0);
            context.access(0);
        });
        domain.unmap(0..1);
        reader.join().unwrap();
    });
}

/// The cache is asked before the guard is entered, and the log after.
#[test]
fn a_probe_races_an_unmap() {
    explore(4, || {
        let (domain, _device, mut context) = machine(1);
        context.access(0);
        let reader = thread::spawn(move || {
            context.access_quickly(0);
            context.access_quickly(0);
        });
        domain.unmap(0..1);
        reader.join().unwrap();
    });
}

/// What was unmapped and mapped again is found again, and the first unmap's entry in the log does not let the second go unseen.
#[test]
fn unmap_after_unmap() {
    explore(3, || {
        let (domain, _device, mut context) = machine(2);
        context.access(0);
        context.access(1);
        let reader = thread::spawn(move || {
            context.access_quickly(0);
            context.access_quickly(1);
        });
        domain.unmap(0..1);
        domain.unmap(1..2);
        reader.join().unwrap();
    });
}

/// Three spans in a ring of two: the reader cannot know which, and forgets all.
#[test]
fn more_than_the_ring_keeps() {
    explore(4, || {
        let (domain, _device, mut context) = machine(3);
        context.access(0);
        let reader = thread::spawn(move || {
            context.access(0);
            context.access(0);
        });
        domain.unmap(0..3);
        reader.join().unwrap();
    });
}

/// The ring is overrun while the reader is reading it: what it gets is not what it was told to look for.
#[test]
fn the_ring_is_overrun_meanwhile() {
    explore(3, || {
        let (domain, _device, mut context) = machine(3);
        (0..2).for_each(|number| _ = context.access(number));
        domain.clear(0);
        domain.invalidate(0..1);
        let reader = thread::spawn(move || {
            context.access(1);
            context.access(1);
        });
        domain.unmap(1..3);
        reader.join().unwrap();
    });
}

#[test]
fn two_writers() {
    explore(2, || {
        let (domain, _device, mut context) = machine(2);
        (0..2).for_each(|number| _ = context.access(number));
        let other = {
            let domain = Arc::clone(&domain);
            thread::spawn(move || domain.unmap(1..2))
        };
        let reader = thread::spawn(move || {
            context.access(0);
            context.access(1);
        });
        domain.unmap(0..1);
        other.join().unwrap();
        reader.join().unwrap();
    });
}

/// The device gets another domain, and all of the one before is released. The two have a page of the same name, so a translation that is kept
/// too long is a wrong one.
#[test]
fn a_context_changes_its_domain() {
    explore(3, || {
        let (old, device, mut context) = machine(1);
        let new = Domain::new(2, 1, &old.readers);
        context.access(0);
        let reader = thread::spawn(move || {
            context.access_quickly(0);
            context.access_quickly(0);
        });
        device.attach(&old, Some(Arc::clone(&new)));
        old.release(0);
        reader.join().unwrap();
    });
}

/// As above, and the new domain unmaps: what it logged before the context copied it, and after, and in between.
#[test]
fn the_new_domain_unmaps_meanwhile() {
    explore(3, || {
        let (old, device, mut context) = machine(1);
        let new = Domain::new(2, 1, &old.readers);
        let reader = thread::spawn(move || {
            context.access(0);
            context.access(0);
        });
        device.set(Some(Arc::clone(&new)));
        device.tell();
        new.unmap(0..1);
        old.grace();
        old.release(0);
        reader.join().unwrap();
    });
}

/// Nothing translates any more.
#[test]
fn a_detach_waits_for_what_is_in_flight() {
    explore(4, || {
        let (domain, device, mut context) = machine(1);
        let reader = thread::spawn(move || {
            context.access(0);
            context.access_quickly(0)
        });
        device.attach(&domain, None);
        domain.release(0);
        reader.join().unwrap();
    });
}

/// A span that says of itself whether it is whole.
fn whole(number: u64) -> Span<Iova> {
    Span::of(Iova::new(number << 12), Iova::new(number << 12 | 0xfff))
}

/// Whatever the reader makes of the log, it has been told of every span up to the head that it read, and of no span that was never logged.
#[test]
fn a_reader_is_told_of_all_that_was_logged() {
    explore(4, || {
        let log = Arc::new(Log::new());
        log.append([whole(1)].into_iter());
        let writer = {
            let log = Arc::clone(&log);
            thread::spawn(move || {
                log.append([whole(2)].into_iter());
                log.append([whole(3), whole(4)].into_iter());
            })
        };
        let head = log.head();
        let mut told = [false; 5];
        log.catch_up(0, head, |missed| match missed {
            Missed::Everything => told = [true; 5],
            Missed::Span(span) => {
                let number = span.start().get() >> 12;
                assert_eq!(span, whole(number), "half a span");
                told[number as usize] = true;
            }
            Missed::Tables(region) => panic!("{region} was logged as one of leaves"),
        });
        assert!((1..=head).all(|number| told[number as usize]), "up to {head}: {told:?}");
        writer.join().unwrap();
    });
}

/// Two writers get places of their own, and a reader who comes later is told of both.
#[test]
fn two_writers_append() {
    explore(4, || {
        let log = Arc::new(Log::new());
        let other = {
            let log = Arc::clone(&log);
            thread::spawn(move || log.append([page(1)].into_iter()))
        };
        log.append([page(2)].into_iter());
        other.join().unwrap();
        let mut told = Vec::new();
        log.catch_up(0, log.head(), |missed| told.push(missed));
        told.sort_by_key(|missed| matches!(missed, Missed::Span(span) if *span == page(2)));
        assert_eq!(told, [Missed::Span(page(1)), Missed::Span(page(2))]);
    });
}
