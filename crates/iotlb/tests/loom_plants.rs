//! Each way to break the order that loom.rs shows to be right, and loom finding it: a check that finds nothing wrong has to be able to.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p lockstep-iotlb --test loom_plants --release`; without the flag this file is empty.
#![cfg(loom)]

#[path = "loom_rig/mod.rs"]
mod rig;

use loom::thread;
use rig::{Context, Device, Domain, explore};
use std::sync::Arc;
use sync::Readers;

/// A writer that does something wrong beside a context that does as it should, its page cached already.
fn beside(writer: impl Fn(&Domain, &Device) + Sync + Send + 'static, reader: impl Fn(&mut Context) + Sync + Send + Copy + 'static) {
    explore(4, move || {
        let readers = Arc::new(Readers::new());
        let domain = Domain::new(1, 1, &readers);
        let device = Device::new(&domain);
        let mut context = Context::new(&device, &readers);
        context.access(0);
        let reader = thread::spawn(move || reader(&mut context));
        writer(&domain, &device);
        reader.join().unwrap();
    });
}

fn twice(context: &mut Context) {
    context.access(0);
    context.access_quickly(0);
}

/// The control: the same two without anything wrong.
#[test]
fn the_right_order() {
    beside(|domain, _| domain.unmap(0..1), twice);
}

#[test]
#[should_panic(expected = "a released frame was used")]
fn without_invalidation() {
    beside(
        |domain, _| {
            domain.clear(0);
            domain.grace();
            domain.release(0);
        },
        twice,
    );
}

#[test]
#[should_panic(expected = "a released frame was used")]
fn without_grace() {
    beside(
        |domain, _| {
            domain.clear(0);
            domain.invalidate(0..1);
            domain.release(0);
        },
        twice,
    );
}

#[test]
#[should_panic(expected = "a released frame was used")]
fn logged_after_the_grace_period() {
    beside(
        |domain, _| {
            domain.clear(0);
            domain.grace();
            domain.invalidate(0..1);
            domain.release(0);
        },
        twice,
    );
}

/// A walk between the log entry and the clear fills what nobody will take out again.
#[test]
#[should_panic(expected = "a released frame was used")]
fn cleared_after_the_log() {
    beside(
        |domain, _| {
            domain.invalidate(0..1);
            domain.clear(0);
            domain.grace();
            domain.release(0);
        },
        twice,
    );
}

/// The log is applied when the access is over, not when its guard is entered.
#[test]
#[should_panic(expected = "a released frame was used")]
fn applied_after_the_lookup() {
    beside(
        |domain, _| domain.unmap(0..1),
        |context| {
            for _ in 0..2 {
                context.slot.enter(1);
                if context.translate(0) {
                    context.use_frame(0);
                }
                context.slot.leave();
                // It does what it should, too late.
                assert!(context.view.enter(&mut context.slot));
                context.slot.leave();
            }
        },
    );
}

/// What a probe found is used in a guard that had something to forget.
#[test]
#[should_panic(expected = "a released frame was used")]
fn a_probe_that_outlives_its_guard() {
    beside(
        |domain, _| domain.unmap(0..1),
        |context| {
            let found = context.view.iotlb().probe(rig::at(0)).is_some();
            assert!(context.view.enter(&mut context.slot));
            if found {
                context.use_frame(0);
            }
            context.slot.leave();
        },
    );
}

/// A walk in one guard whose result is cached in the next.
#[test]
#[should_panic(expected = "a released frame was used")]
fn filled_in_the_guard_after_the_walk() {
    beside(
        |domain, _| {
            domain.unmap(0..1);
        },
        |context| {
            context.view.iotlb_mut().flush();
            assert!(context.view.enter(&mut context.slot));
            let found = context.translate(0);
            context.slot.leave();
            context.view.iotlb_mut().flush();
            assert!(context.view.enter(&mut context.slot));
            if found {
                context.view.iotlb_mut().fill(rig::at(0), addr::Lg2::K4, pt::Perm::RW, ());
            }
            context.slot.leave();
            context.access_quickly(0);
        },
    );
}

/// The device is told of its new domain only when the old one's guards have been waited for.
#[test]
#[should_panic(expected = "a released frame was used")]
fn told_after_the_grace_period() {
    beside(
        |domain, device| {
            device.set(None);
            domain.grace();
            device.tell();
            domain.release(0);
        },
        twice,
    );
}
