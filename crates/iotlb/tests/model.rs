//! A view beside a model that remembers everything: no stale hit ever, and nothing forgotten that was not unmapped, as long as the log keeps up.
#![cfg(not(loom))]

use addr::{Iova, Lg2, Span};
use lockstep_iotlb::{Identity, Log, Logged, Source, View};
use proptest::prelude::*;
use pt::Perm;
use std::collections::BTreeSet;
use std::sync::Arc;
use sync::Readers;

struct Domain(Log);

impl Logged for Domain {
    fn id(&self) -> u32 {
        1
    }

    fn log(&self) -> &Log {
        &self.0
    }
}

#[derive(Clone)]
struct Device(Arc<Domain>);

impl Source for Device {
    type Identity = Self;

    fn generation(&self) -> u64 {
        0
    }

    fn identity(&self) -> Self {
        self.clone()
    }
}

impl Identity for Device {
    type Domain = Domain;

    fn generation(&self) -> u64 {
        0
    }

    fn domain(&self) -> Option<&Arc<Domain>> {
        Some(&self.0)
    }
}

const PAGES: u64 = 200;
/// Spans that the log keeps.
const KEPT: usize = 1024;

#[derive(Clone, Debug)]
enum Step {
    /// Asks for a page, and fills it when it is mapped and not there.
    Access(u64),
    Map(u64, u64),
    /// Pages from the first on, in one append of so many spans.
    Unmap(u64, u64, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let few = 0..4u64;
    prop_oneof![
        8 => (0..PAGES).prop_map(Step::Access),
        2 => (0..PAGES, few.clone()).prop_map(|(first, more)| Step::Map(first, more)),
        3 => (0..PAGES, few, 1..4usize).prop_map(|(first, more, spans)| Step::Unmap(first, more, spans)),
        1 => (0..PAGES, 0..PAGES, prop_oneof![Just(1), Just(KEPT), Just(KEPT + 1)]).prop_map(|(first, more, spans)| Step::Unmap(first, more, spans)),
    ]
}

fn at(page: u64) -> Iova {
    Iova::new(page << 12)
}

proptest! {
    #[test]
    fn nothing_stale_and_nothing_lost(steps in prop::collection::vec(step(), 1..200)) {
        let domain = Arc::new(Domain(Log::new()));
        let readers = Arc::new(Readers::new());
        let (mut slot, mut view) = (readers.slot(), View::<Device, u64>::new(Device(Arc::clone(&domain)), 4096, 64));
        // What maps to what is told by when it was mapped.
        let (mut mapped, mut time) = ([0u64; PAGES as usize], 1);
        let (mut cached, mut missed) = (BTreeSet::new(), 0);
        (0..PAGES).for_each(|page| mapped[page as usize] = time);
        for step in steps {
            match step {
                Step::Access(page) => {
                    if missed > KEPT {
                        cached.clear();
                    }
                    missed = 0;
                    prop_assert!(view.enter(&mut slot));
                    let hit = view.iotlb_mut().lookup(at(page));
                    prop_assert_eq!(hit.is_some(), cached.contains(&page), "page {}", page);
                    prop_assert!(hit.is_none_or(|hit| hit.value == mapped[page as usize]), "{:?} is stale", hit);
                    if hit.is_none() && mapped[page as usize] != 0 {
                        view.iotlb_mut().fill(at(page), Lg2::K4, Perm::RW, mapped[page as usize]);
                        cached.insert(page);
                    }
                    slot.leave();
                }
                Step::Map(first, more) => {
                    time += 1;
                    for page in first..(first + more + 1).min(PAGES) {
                        if mapped[page as usize] == 0 {
                            mapped[page as usize] = time;
                        }
                    }
                }
                Step::Unmap(first, more, spans) => {
                    let last = (first + more).min(PAGES - 1);
                    for page in first..=last {
                        mapped[page as usize] = 0;
                        cached.remove(&page);
                    }
                    // The span itself, and others where nothing is.
                    let all = Span::of(at(first), Iova::new(at(last + 1).get() - 1));
                    let elsewhere = |number: usize| Span::block(at(PAGES + number as u64), 12);
                    let logged = domain.0.append(std::iter::once(all).chain((1..spans).map(elsewhere)));
                    prop_assert_eq!(logged, spans as u64);
                    missed += spans;
                }
            }
        }
    }
}
