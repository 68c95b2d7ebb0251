//! The model's actions on the real code. One 2 MiB entry stands for the model's large one; its two pages are the first `k` real pages and the others. After every
//! action the real tables, read back, are what the model has, and both devices reach what they reach in the model. Inside of an action every
//! table that a store of the page table's writer leaves behind, and the two moments that a conversion shows, are states that the model passes, in its order.

mod real;

use addr::{Gpa, Iova, PAGE_LG2, Page};
use lockstep::{Change, Dma, GuestDma, Owner, Tdisp, Trust};
use lockstep_model::device::{At, Move};
use lockstep_model::host::{Op, Stage};
use lockstep_model::state::{ALL, IoTable, Is, PAGES, Set, State, each, one};
use lockstep_model::{Action, Scene, Transaction};
use real::{ASID, Eye, Tables};
use secure::RmpSize;
use std::sync::{Arc, Mutex};

const MODEL: Transaction = Transaction { scene: Scene::Devices, fault: None };

/// Model and code, side by side.
struct Pair {
    model: State,
    dma: Arc<GuestDma>,
    eye: Eye,
    contexts: [Dma; 2],
    seen: Arc<Mutex<Vec<Tables>>>,
    said: Vec<String>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    actions: u64,
    failures: u64,
    middles: u64,
    accesses: u64,
}

/// Where the model's operation fails.
type Failure = Option<(Stage, usize)>;

impl Pair {
    fn new(k: u64) -> Self {
        let trust = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
        let (dma, devices, eye) = real::guest(k, iommu::Config::default(), [("trusted", trust), ("untrusted", Trust::Untrusted)]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (watching, list) = (eye.clone(), Arc::clone(&seen));
        dma.space().on_transition(move |_| list.lock().unwrap().extend(watching.look()));
        let contexts = devices.map(|device| Dma::new(&device).unwrap());
        Self { model: MODEL.scene.start(), dma, eye, contexts, seen, said: vec![format!("k = {k}")], counts: Counts::default() }
    }

    /// Every place where the operation could fail in the model's present state.
    fn failures(&self, op: Op) -> Vec<(Stage, usize)> {
        let mut state = self.model.clone();
        let mut found = Vec::new();
        let mut smashed = false;
        MODEL.apply(&mut state, Action::Start(0, op));
        while state.hosts[0].at != Stage::Idle {
            let host = &state.hosts[0];
            smashed |= host.at == Stage::SmashFlip;
            // What makes RMPUPDATE fail here would have made PSMASH fail before; a table that is missing makes a punch wider, not fail.
            let narrow = self.model.io == IoTable::Large && host.todo != ALL;
            let hidden = (smashed && host.at == Stage::Switch) || (host.at == Stage::Discard && narrow);
            if host.may_fail(&state) && !hidden && op != Op::Smash {
                found.push((host.at, each(host.rest).next().unwrap_or(0)));
            }
            MODEL.apply(&mut state, Action::Host(0));
        }
        found
    }

    /// The operation in the model: the tables that it passes.
    fn in_model(&mut self, op: Op, fails: Failure) -> Vec<Tables> {
        let mut passed = vec![Tables::of(&self.model)];
        MODEL.apply(&mut self.model, Action::Start(0, op));
        while self.model.hosts[0].at != Stage::Idle {
            let host = self.model.hosts[0];
            let here = Some((host.at, each(host.rest).next().unwrap_or(0))) == fails && host.may_fail(&self.model);
            let done = MODEL.apply(&mut self.model, if here { Action::Fails(0) } else { Action::Host(0) });
            assert!(done, "the model is stuck");
            let tables = Tables::of(&self.model);
            if passed.last() != Some(&tables) {
                passed.push(tables);
            }
        }
        passed
    }

    /// The same in the code. Answers whether it said that it failed.
    fn in_code(&self, op: Op, fails: Failure) -> bool {
        let Eye { backing, stage2, .. } = &self.eye;
        let dma = &self.dma;
        let busy = match fails {
            Some((Stage::SmashFlip, _)) => Some(backing.oa(Page::new(0))),
            Some((Stage::Switch, page)) => Some(backing.oa(self.eye.half(page).start())),
            _ => None,
        };
        busy.into_iter().for_each(|oa| dma.rmp().set_in_use(oa, true));
        if let Some((Stage::Tell, page)) = fails {
            *stage2.refuses.lock().unwrap() = Some(self.eye.span(one(page)).start());
        }
        let failed = match op {
            Op::Convert { pages, private } => {
                let plan = matches!(fails, Some((Stage::Reserve, _))).then(|| sync::fail::nth(1));
                let change = Change { span: self.eye.span(pages), to: if private { Owner::Private } else { Owner::Shared } };
                let failed = dma.convert(&[change]).is_err();
                drop(plan);
                failed
            }
            Op::Punch(pages) if fails.is_some() => self.failed_punch(pages),
            Op::Punch(pages) => dma.punch(self.eye.span(pages)).is_err(),
            Op::Populate(pages) => dma.populate(self.eye.span(pages)).is_err(),
            Op::Merge => {
                dma.merge(Gpa::new(0), u64::MAX);
                false
            }
            Op::Smash => convert::smash(dma.rmp(), backing, backing.pages()).is_err(),
            Op::Trust(_) => unreachable!("not in this scene"),
        };
        busy.into_iter().for_each(|oa| dma.rmp().set_in_use(oa, false));
        *stage2.refuses.lock().unwrap() = None;
        failed
    }

    /// Steps before the last one leave everything as it was.
    fn failed_punch(&self, pages: Set) -> bool {
        for nth in 1.. {
            let plan = sync::fail::nth(nth);
            let failed = self.dma.punch(self.eye.span(pages)).is_err();
            let fired = plan.fired();
            drop(plan);
            assert!(failed && fired.is_some(), "a punch has a step that is called backing.punch");
            if fired == Some("backing.punch") {
                break;
            }
        }
        true
    }

    /// Answers whether the two can go on: not when a refusal in the middle has left a half of two kinds.
    fn act(&mut self, op: Op, fails: Failure) -> bool {
        self.said.push(format!("{op:?}, failing at {fails:?}"));
        let passed = self.in_model(op, fails);
        self.seen.lock().unwrap().clear();
        let failed = {
            #[cfg(debug_assertions)]
            let _watching = {
                let (eye, seen, mut stores) = (self.eye.clone(), Arc::clone(&self.seen), 0u64);
                sync::pause::at_every_pause(move || {
                    stores += 1;
                    // A thousand stores of one kind look alike.
                    if stores < 8 || stores.is_multiple_of(128) {
                        seen.lock().unwrap().extend(eye.look());
                    }
                })
            };
            self.in_code(op, fails)
        };
        assert!(fails.is_none() || failed, "nothing failed: {:#?}", self.said);
        let mut rest = passed.iter();
        for middle in self.seen.lock().unwrap().iter() {
            let known = rest.as_slice().iter().position(|tables| tables == middle);
            let Some(at) = known else {
                let passed: String = passed.iter().map(|tables| format!("\n  {tables:?}")).collect();
                panic!("not where the model is:\n  {middle:?}\nof{passed}\n{:#?}", self.said)
            };
            rest = rest.as_slice()[at..].iter();
            self.counts.middles += 1;
        }
        self.counts.actions += 1;
        self.counts.failures += u64::from(fails.is_some());
        let Some(tables) = self.eye.look() else {
            assert!(fails.is_some(), "a half of two kinds: {:#?}", self.said);
            return false;
        };
        assert_eq!(tables, Tables::of(&self.model), "{:#?}", self.said);
        self.audit();
        self.devices();
        true
    }

    fn pvalidate(&mut self, pages: Set, accept: bool) {
        let large = self.model.rmp.large;
        if !MODEL.apply(&mut self.model, Action::Pvalidate(pages, accept)) {
            return;
        }
        self.said.push(format!("PVALIDATE {pages:#b} {accept}"));
        let space = self.dma.space();
        if large {
            space.pvalidate(Gpa::new(0), RmpSize::M2, accept).unwrap();
        } else {
            for page in self.eye.span(pages).blocks(PAGE_LG2) {
                space.pvalidate(page.start(), RmpSize::K4, accept).unwrap();
            }
        }
        assert_eq!(self.eye.look(), Some(Tables::of(&self.model)), "{:#?}", self.said);
        self.audit();
        self.devices();
    }

    /// Clean, but for pages that stage 2 refused: of those the audit speaks, and of no others.
    fn audit(&self) {
        let report = self.dma.audit();
        let untold = |at: Iova| {
            let page = usize::from(at.get() >> PAGE_LG2 >= self.eye.k);
            self.model.kvm.untold & one(page) != 0
        };
        for difference in &report.differences {
            let known = ["I-10", "I-11"].contains(&difference.invariant) && untold(difference.iova.start());
            assert!(known, "{difference}\n{:#?}", self.said);
        }
        // Of a page that is not there the tables need not agree.
        let told = each(self.model.kvm.untold).all(|page| self.model.is[page] == Is::Absent);
        assert_eq!(report.is_clean(), told, "{:#?}", self.said);
    }

    /// What each device reaches, IOTLBs and all.
    fn devices(&mut self) {
        for device in 0..2 {
            for page in 0..PAGES {
                let allowed = access(&mut self.model, device, page);
                let at = Iova::new(self.eye.span(one(page)).start().get());
                let done = self.contexts[device].read(at, &mut [0; 8]);
                assert_eq!(done.is_ok(), allowed, "device {device}, page {page}: {done:?}\n{:#?}", self.said);
                self.counts.accesses += 1;
            }
        }
        assert_eq!(self.model.broken, None, "{:#?}", self.said);
    }
}

/// One access from guard to guard, in the model.
fn access(model: &mut State, device: usize, page: usize) -> bool {
    let mut allowed = false;
    let go = |model: &mut State, step| MODEL.apply(model, Action::Device(device, step));
    while model.devices[device].at != At::Ready {
        go(model, Move::Go);
    }
    go(model, Move::Look(page as u8));
    while model.devices[device].at != At::Ready {
        allowed |= matches!(model.devices[device].at, At::Allowed { .. });
        go(model, Move::Go);
    }
    go(model, Move::Leave);
    allowed
}

fn ops() -> Vec<Op> {
    Scene::Device.ops(0)
}

const VALIDATES: [(Set, bool); 6] = [(0b01, true), (0b10, true), (ALL, true), (0b01, false), (0b10, false), (ALL, false)];

/// Every sequence of two operations, with every failure of the second, from every kind of start.
#[test]
fn every_short_path() {
    let mut sum = Counts::default();
    for k in [1, 256, 511] {
        for first in ops() {
            for second in ops() {
                let replay = |fails: Option<usize>| {
                    let mut pair = Pair::new(k);
                    assert!(pair.act(first, None));
                    pair.pvalidate(ALL, true);
                    let places = pair.failures(second);
                    let chosen = fails.map(|index| places[index]);
                    if pair.act(second, chosen) && chosen.is_some() {
                        // A retry, of all of it and of a part.
                        let _ = pair.act(second, None) && pair.act(ops()[0], None);
                    }
                    (places.len(), pair.counts)
                };
                let (places, counts) = replay(None);
                sum.add(&counts);
                (0..places).for_each(|index| sum.add(&replay(Some(index)).1));
            }
        }
    }
    sum.print("every short path");
}

/// Long ones, by seed. `LOCKSTEP_REPLAYS` asks for more of them.
#[test]
fn random_paths() {
    let replays = std::env::var("LOCKSTEP_REPLAYS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let mut sum = Counts::default();
    for seed in 0..replays {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut pair = Pair::new([1, 256, 511, 37][seed as usize % 4]);
        pair.said.push(format!("seed {seed}"));
        for _ in 0..40 {
            if random.u8(..4) == 0 {
                let (pages, accept) = VALIDATES[random.usize(..VALIDATES.len())];
                pair.pvalidate(pages, accept);
                continue;
            }
            let op = ops()[random.usize(..ops().len())];
            let places = pair.failures(op);
            let fails = if places.is_empty() || random.u8(..3) > 0 { None } else { Some(places[random.usize(..places.len())]) };
            if !pair.act(op, fails) {
                break;
            }
        }
        sum.add(&pair.counts);
    }
    sum.print("random paths");
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.actions += other.actions;
        self.failures += other.failures;
        self.middles += other.middles;
        self.accesses += other.accesses;
    }

    fn print(&self, name: &str) {
        let Self { actions, failures, middles, accesses } = self;
        println!("{name}: {actions} actions, {failures} with a failure, {middles} states in the middle, {accesses} accesses");
        assert!(*failures > 0 && *accesses > 0 && *middles > 0);
    }
}
