//! Random histories of one guest against a plain model: per page whose it is and what it says. After every step the audit is clean; every DMA
//! is allowed or refused as the model says, and reads what the model says. A second IO address space, of a device that sees shared memory alone, maps and unmaps
//! stretches of the same backing, and calls fail on the way. `LOCKSTEP_HISTORIES` asks for so many more histories of each kind.

mod common;

use addr::{Gpa, Iova, PAGE_LG2};
use backing::{Backing, Frames};
use common::{ASID, Guest, MIB, change, iova, span};
use convert::{Auditor, PolicyRule};
use ioas::{Ioas, Place};
use iommu::Device;
use lockstep_iommu::{ConvertError, Dma, Owner, Policy, Tdisp, Trust};
use pt::Perm;
use secure::RmpSize;
use std::sync::Arc;

const STEPS: u32 = 2000;
const FIRST: u64 = 4 * MIB;
const MORE_AT: u64 = 8 * MIB;
const MORE: u64 = 2 * MIB;
const OTHER_AT: u64 = 1 << 32;
const PAGE: u64 = 1 << PAGE_LG2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Is {
    Shared,
    Private { validated: bool },
    Absent,
}

#[derive(Clone, Copy, Debug)]
struct Model {
    is: Is,
    says: u64,
}

struct Run {
    guest: Guest,
    policy: Policy,
    more: Arc<Backing>,
    more_is_there: bool,
    /// By page of the first memslot, then of the second.
    pages: Vec<Model>,
    trusted: Option<(Arc<Device>, Dma)>,
    untrusted: Option<(Arc<Device>, Dma)>,
    /// Shows stretches of the first memslot's backing from `OTHER_AT` on, where they are shared.
    other: Arc<Ioas>,
    mapped: Vec<(u64, u64)>,
    third: Dma,
    random: fastrand::Rng,
    counts: [u64; 4],
}

fn run_trust() -> Trust {
    Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None }
}

impl Run {
    fn new(policy: Policy, frames: Frames, seed: u64) -> Self {
        let guest = Guest::new(FIRST, frames, policy);
        let more = Backing::memfd(MORE, frames).unwrap();
        let with = |device: &Arc<Device>| Some((device.clone(), guest.context(device)));
        let (trusted, untrusted) = (with(&guest.trusted), with(&guest.untrusted));
        let other = Ioas::new(guest.dma.iommu(), PolicyRule::new(Policy::SharedOnly, guest.dma.rmp()));
        let device = guest.dma.iommu().device("third");
        other.attach_device(&device).unwrap();
        let third = Dma::new(&device).unwrap();
        let pages = vec![Model { is: Is::Shared, says: 0 }; ((FIRST + MORE) / PAGE) as usize];
        Self {
            guest,
            policy,
            more,
            more_is_there: false,
            pages,
            trusted,
            untrusted,
            other,
            mapped: Vec::new(),
            third,
            random: fastrand::Rng::with_seed(seed),
            counts: [0; 4],
        }
    }

    /// A stretch of one memslot: a page, a few, whole blocks.
    fn stretch(&mut self) -> (u64, u64) {
        let (start, len) = if self.random.u8(..4) == 0 { (MORE_AT, MORE) } else { (0, FIRST) };
        let pages = len / PAGE;
        match self.random.u8(..8) {
            0 => (start + self.random.u64(..pages / 512) * 512 * PAGE, 512 * PAGE),
            1 => (start, len),
            2..4 => {
                let first = self.random.u64(..pages);
                (start + first * PAGE, self.random.u64(1..=(pages - first).min(700)) * PAGE)
            }
            _ => {
                let first = self.random.u64(..pages);
                (start + first * PAGE, self.random.u64(1..=(pages - first).min(5)) * PAGE)
            }
        }
    }

    fn index(at: u64) -> usize {
        (if at < FIRST { at / PAGE } else { (at - MORE_AT + FIRST) / PAGE }) as usize
    }

    fn there(&self, at: u64) -> bool {
        at < FIRST || self.more_is_there
    }

    fn models(&mut self, at: u64, len: u64) -> &mut [Model] {
        let first = Self::index(at);
        &mut self.pages[first..first + (len / PAGE) as usize]
    }

    fn step(&mut self) {
        match self.random.u8(..23) {
            0..5 => self.convert(),
            5..7 => self.pvalidate(),
            7 => self.punch(),
            8 => self.populate(),
            9 => {
                self.guest.dma.merge(Gpa::new(0), u64::MAX);
            }
            10 => self.memory(),
            11 => self.device(),
            12 => self.map_elsewhere(),
            13 => self.unmap_elsewhere(),
            14 => self.convert_without_memory(),
            _ => (0..4).for_each(|_| {
                self.access();
                self.access_elsewhere();
            }),
        }
    }

    fn convert(&mut self) {
        let (at, len) = self.stretch();
        let to = if self.random.bool() { Owner::Private } else { Owner::Shared };
        let done = self.guest.dma.convert(&[change(at, len, to)]);
        if !self.there(at) {
            assert!(matches!(done, Err(ConvertError::NoMemory { .. })));
            return;
        }
        let mut changed = 0;
        for page in self.models(at, len) {
            let wanted = matches!((page.is, to), (Is::Shared, Owner::Shared) | (Is::Private { .. }, Owner::Private));
            if !wanted {
                page.is = if to == Owner::Private { Is::Private { validated: false } } else { Is::Shared };
                changed += 1;
            }
        }
        assert_eq!(done.unwrap().pages, changed);
        self.counts[0] += changed;
    }

    /// The first fallible step of a conversion fails: nothing has changed.
    fn convert_without_memory(&mut self) {
        let (at, len) = self.stretch();
        let to = if self.random.bool() { Owner::Private } else { Owner::Shared };
        let plan = sync::fail::nth(1);
        let done = self.guest.dma.convert(&[change(at, len, to)]);
        let fired = plan.fired().is_some();
        drop(plan);
        assert_eq!(matches!(done, Err(ConvertError::Reserve { .. })), fired, "{done:?}");
    }

    fn map_elsewhere(&mut self) {
        let (at, len) = self.stretch();
        if at >= FIRST {
            return;
        }
        let free = self.mapped.iter().all(|&(start, long)| at + len <= start || start + long <= at);
        let done = self.other.map_file(&self.guest.backing, at, len, Place::Fixed(Iova::new(OTHER_AT + at)), Perm::RW);
        assert_eq!(done.is_ok(), free, "{done:?}");
        if free {
            self.mapped.push((at, len));
        }
    }

    fn unmap_elsewhere(&mut self) {
        if self.mapped.is_empty() {
            return;
        }
        let (at, len) = self.mapped.swap_remove(self.random.usize(..self.mapped.len()));
        self.other.unmap(addr::Span::from_len(Iova::new(OTHER_AT + at), len).unwrap()).unwrap();
    }

    /// The device of the second address space.
    fn access_elsewhere(&mut self) {
        let at = self.random.u64(..FIRST / PAGE) * PAGE;
        let model = self.pages[Self::index(at)];
        let allowed = model.is == Is::Shared && self.mapped.iter().any(|&(start, len)| (start..start + len).contains(&at));
        let mut bytes = [0; 8];
        let done = self.third.read(Iova::new(OTHER_AT + at), &mut bytes);
        assert_eq!(done.is_ok(), allowed, "{at:#x}, elsewhere: {model:?}, {done:?}");
        assert_eq!(u64::from_le_bytes(bytes), if allowed { model.says } else { 0 });
    }

    fn clean(&self) {
        self.guest.clean();
        let report = Auditor::new(self.guest.dma.space()).audit(&self.other);
        assert!(report.is_clean(), "{:#?}", report.differences);
    }

    fn pvalidate(&mut self) {
        let (at, len) = self.stretch();
        let validate = self.random.u8(..4) > 0;
        for page in span(at, len.min(16 * PAGE)).blocks(PAGE_LG2) {
            let done = self.guest.dma.space().pvalidate(page.start(), RmpSize::K4, validate);
            let there = self.there(at);
            let model = &mut self.models(page.start().get(), PAGE)[0];
            match model.is {
                Is::Private { validated } if there => {
                    assert_eq!(done.unwrap().changed, validated != validate);
                    model.is = Is::Private { validated: validate };
                }
                _ => assert!(done.is_err()),
            }
        }
    }

    fn punch(&mut self) {
        let (at, len) = self.stretch();
        let there = self.there(at);
        let done = self.guest.dma.punch(span(at, len));
        let pages = self.models(at, len);
        if !there || pages.iter().any(|page| matches!(page.is, Is::Private { .. })) {
            assert!(done.is_err());
            return;
        }
        done.unwrap();
        pages.fill(Model { is: Is::Absent, says: 0 });
    }

    fn populate(&mut self) {
        let (at, len) = self.stretch();
        let there = self.there(at);
        let done = self.guest.dma.populate(span(at, len));
        assert_eq!(done.is_ok(), there, "{done:?}");
        if there {
            self.models(at, len).iter_mut().filter(|page| page.is == Is::Absent).for_each(|page| page.is = Is::Shared);
        }
    }

    fn memory(&mut self) {
        if self.more_is_there {
            self.guest.dma.remove_memory(Gpa::new(MORE_AT)).unwrap();
        } else {
            self.guest.dma.add_memory(Gpa::new(MORE_AT), MORE, &self.more, 0).unwrap();
        }
        self.more_is_there ^= true;
    }

    fn device(&mut self) {
        let trusted = self.random.bool();
        let (place, trust) = if trusted { (&mut self.trusted, run_trust()) } else { (&mut self.untrusted, Trust::Untrusted) };
        match place.take() {
            Some((device, mut context)) => {
                self.guest.dma.remove_device(&device).unwrap();
                assert!(context.read(iova(0), &mut [0]).is_err());
            }
            None => {
                let device = self.guest.dma.add_device("again", trust).unwrap();
                let context = Dma::new(&device).unwrap();
                *place = Some((device, context));
            }
        }
    }

    fn access(&mut self) {
        let (at, _) = self.stretch();
        let trusted = self.random.bool();
        let write = self.random.bool();
        let (there, policy, value) = (self.there(at), self.policy, self.random.u64(1..));
        let index = Self::index(at);
        let Some((_, context)) = (if trusted { &mut self.trusted } else { &mut self.untrusted }) else { return };
        let model = &mut self.pages[index];
        let allowed = there
            && match model.is {
                Is::Shared => true,
                Is::Private { validated } => trusted && validated && policy == Policy::Mirror,
                Is::Absent => false,
            };
        let at = Iova::new(at);
        if write {
            let done = context.write(at, &value.to_le_bytes());
            assert_eq!(done.is_ok(), allowed, "{at}, trusted {trusted}: {model:?}, {done:?}");
            if allowed {
                model.says = value;
            }
        } else {
            let mut bytes = [0; 8];
            let done = context.read(at, &mut bytes);
            assert_eq!(done.is_ok(), allowed, "{at}, trusted {trusted}: {model:?}, {done:?}");
            assert_eq!(u64::from_le_bytes(bytes), if allowed { model.says } else { 0 }, "{at}");
        }
        self.counts[if allowed { 1 } else { 2 }] += 1;
    }
}

fn history(policy: Policy, frames: Frames, seed: u64) {
    let mut run = Run::new(policy, frames, seed);
    for _ in 0..STEPS {
        run.step();
        run.clean();
        run.counts[3] += 1;
    }
    let [changed, allowed, refused, audits] = run.counts;
    assert!(changed > 0 && allowed > 100 && refused > 100);
    println!("{policy}, {frames:?}, seed {seed}: {changed} pages converted, DMA {allowed} allowed and {refused} refused, {audits} audits");
}

fn histories(policy: Policy, frames: fn(u64) -> Frames, first: u64) {
    let more = std::env::var("LOCKSTEP_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    (first..first + 2).chain(100..100 + more).for_each(|seed| history(policy, frames(seed), seed));
}

#[test]
fn mirror() {
    histories(Policy::Mirror, |_| Frames::Contiguous, 1);
}

#[test]
fn shared_only() {
    histories(Policy::SharedOnly, |_| Frames::Contiguous, 3);
}

#[test]
fn scattered() {
    histories(Policy::Mirror, |seed| Frames::Scattered { seed }, 5);
    histories(Policy::SharedOnly, |seed| Frames::Scattered { seed }, 6);
}
