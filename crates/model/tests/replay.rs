//! The model's actions on the real code. One 2 MiB entry stands for the model's large one; its two pages are the first `k` real pages and the others. After every
//! action the real tables, read back, are what the model has, and both devices reach what they reach in the model. Inside of an action every
//! table that a store of the page table's writer leaves behind, and the two moments that a conversion shows, are states that the model passes, in its order.

use addr::{Gpa, Iova, PAGE_LG2, Page, Span};
use backing::{Backing, Frames, PageState};
use convert::{RecordedStage2, Stage2, Stage2Error};
use iommu::{Domain, SystemRmp};
use lockstep::{Change, Config, Dma, GuestDma, Owner, Tdisp, Trust};
use lockstep_model::device::{At, Move};
use lockstep_model::host::{Op, Stage};
use lockstep_model::state::{ALL, Entry, IoTable, Is, PAGES, Rmp, Set, State, each, one};
use lockstep_model::{Action, Scene, Transaction};
use secure::RmpSize;
use std::sync::{Arc, Mutex};

const REAL: u64 = 512;
const ASID: u32 = 3;
const MODEL: Transaction = Transaction { scene: Scene::Devices, fault: None };

/// What model and code are compared by.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Tables {
    is: [Is; PAGES],
    rmp: Rmp,
    io: IoTable,
    private: u8,
}

impl Tables {
    fn of(state: &State) -> Self {
        let mut rmp = Rmp { smashing: false, ..state.rmp };
        if rmp.large {
            // Means nothing while the first is large.
            rmp.entries[1] = Entry::default();
        }
        Self { is: state.is, rmp, io: state.io, private: state.kvm.private }
    }
}

/// A stage 2 that refuses the span that begins where the test says.
#[derive(Default)]
struct Stage2Link {
    record: RecordedStage2,
    refuses: Mutex<Option<Gpa>>,
}

impl Stage2 for Stage2Link {
    fn freeze(&self, _: &[Span<Gpa>]) {}

    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), Stage2Error> {
        if *self.refuses.lock().unwrap() == Some(span.start()) {
            return Err(Stage2Error { span, private, reason: "told to".into() });
        }
        self.record.commit(span, private)
    }

    fn thaw(&self, _: &[Span<Gpa>]) {}

    fn is_private(&self, gpa: Gpa) -> bool {
        self.record.is_private(gpa)
    }

    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.record.runs(span)
    }
}

/// The real tables, read.
#[derive(Clone)]
struct Eye {
    rmp: Arc<SystemRmp>,
    /// Of both devices. Asked for beforehand: whoever is stopped in the middle may take no lock.
    domain: Arc<Domain>,
    backing: Arc<Backing>,
    stage2: Arc<Stage2Link>,
    k: u64,
}

impl Eye {
    fn half(&self, page: usize) -> Span<Page> {
        if page == 0 { Span::of(Page::new(0), Page::new(self.k - 1)) } else { Span::of(Page::new(self.k), Page::new(REAL - 1)) }
    }

    fn span(&self, pages: Set) -> Span<Gpa> {
        let hull = match pages {
            0b01 => self.half(0),
            0b10 => self.half(1),
            _ => Span::of(Page::new(0), Page::new(REAL - 1)),
        };
        Span::of(Gpa::new(hull.start().get() << PAGE_LG2), Gpa::new(((hull.last().get() + 1) << PAGE_LG2) - 1))
    }

    /// `None` while something of a half differs from the rest of it.
    fn look(&self) -> Option<Tables> {
        let mut tables = Tables { is: [Is::Shared; PAGES], rmp: Rmp::default(), io: IoTable::Small([None; PAGES]), private: 0 };
        let rmp = &self.rmp;
        tables.rmp.large = rmp.size_at(self.backing.oa(Page::new(0))) == RmpSize::M2;
        let leaked = rmp.leaked();
        for page in 0..PAGES {
            let half = self.half(page);
            let mut states = self.backing.states(half);
            tables.is[page] = match (states.next()?.1, states.next()) {
                (PageState::Shared, None) => Is::Shared,
                (PageState::Private, None) => Is::Private,
                (PageState::Absent, None) => Is::Absent,
                _ => return None,
            };
            let entry = |at: Page| {
                let raw = rmp.entry(self.backing.oa(at));
                let own = raw.gpa().get() == at.get() << PAGE_LG2 && raw.asid() == ASID;
                let gpa = if own { page as u8 } else { u8::MAX };
                if raw.assigned() { Entry { assigned: true, validated: raw.validated(), gpa } } else { Entry::default() }
            };
            let mut entries = half.blocks(0).map(|at| entry(at.start()));
            let first = entries.next()?;
            if !entries.all(|entry| entry == first) {
                return None;
            }
            tables.rmp.entries[page] = if tables.rmp.large && page == 1 { Entry::default() } else { first };
            let lost = leaked.iter().filter(|oa| self.backing.page_of(**oa).is_some_and(|at| half.contains(at))).count() as u64;
            tables.rmp.leaked |= match lost {
                0 => 0,
                lost if lost == half.len() => one(page),
                _ => return None,
            };
            tables.private |= if self.stage2.is_private(self.span(one(page)).start()) { one(page) } else { 0 };
        }
        self.look_at_leaves(&mut tables)?;
        Some(tables)
    }

    fn look_at_leaves(&self, tables: &mut Tables) -> Option<()> {
        let domain = &self.domain;
        let table = domain.table();
        let (root, level) = table.root();
        let bytes = Span::of(Iova::new(0), Iova::new((REAL << PAGE_LG2) - 1));
        let tree = convert::read_tree(domain.format(), &|at| table.arena().peek(at), root, level + 1, bytes);
        let mut mapped = [0; PAGES];
        for leaf in tree.leaves {
            if leaf.span.len() >= bytes.len() {
                assert_eq!(leaf.oa, self.backing.oa(Page::new(0)));
                tables.io = IoTable::Large;
                return Some(());
            }
            let first = Page::new(leaf.span.start().get() >> PAGE_LG2);
            let page = usize::from(first.get() >= self.k);
            let last = Page::new(leaf.span.last().get() >> PAGE_LG2);
            // Of a size between the model's two.
            if !self.half(page).contains(last) {
                return None;
            }
            assert_eq!(leaf.oa, self.backing.oa(first), "a leaf that leads elsewhere");
            mapped[page] += leaf.span.len() >> PAGE_LG2;
        }
        let mut frames = [None; PAGES];
        for (page, count) in mapped.into_iter().enumerate() {
            frames[page] = match count {
                0 => None,
                count if count == self.half(page).len() => Some(page as u8),
                _ => return None,
            };
        }
        tables.io = IoTable::Small(frames);
        Some(())
    }
}

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
        let stage2 = Arc::new(Stage2Link::default());
        let iommu = iommu::Config { table_bytes: 4 << 20, ..iommu::Config::default() };
        let dma = Arc::new(GuestDma::new(&Config { asid: ASID, iommu, ..Config::default() }, stage2.clone()).unwrap());
        let backing = Backing::memfd(REAL << PAGE_LG2, Frames::Contiguous).unwrap();
        let trust = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
        let devices = [dma.add_device("trusted", trust).unwrap(), dma.add_device("untrusted", Trust::Untrusted).unwrap()];
        dma.add_memory(Gpa::new(0), REAL << PAGE_LG2, &backing, 0).unwrap();
        let domain = devices[0].domain().unwrap();
        let eye = Eye { rmp: dma.rmp().clone(), domain, backing, stage2, k };
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
