//! Model and code, side by side, action by action.

use super::threads::{DeviceThread, Event, Heard, HostThread};
use crate::real::{self, Eye, REAL, Tables};
use addr::{Iova, PAGE_LG2, Page, Span};
use iommu::FaultKind;
use lockstep::{AtsDma, Device, GuestDma, Trust};
use lockstep_model::device::{At, Device as ModelDevice, Move, moves};
use lockstep_model::host::{Op, Stage, can_time_out};
use lockstep_model::state::{PAGES, State, one};
use lockstep_model::{Action, Fault, Law, Scene, Transaction};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What somebody does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// The host is asked for something.
    Start(Op),
    /// It goes on with detached pages.
    Release,
    /// The device begins an access.
    Access(u8),
    /// It goes on with that.
    Go,
    /// It answers nothing any more.
    Mute,
    /// It answers again.
    Unmute,
    /// It is reset after a quarantine.
    Reset,
}

/// What comes of a device that does not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Silence {
    /// It has as long as it likes.
    IsWaitedFor,
    /// Its time is over at once.
    EndsInQuarantine,
}

/// Where the host thread is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum HostIs {
    Idle,
    Waiting,
    Detached,
}

pub struct Pair {
    pub model: State,
    pub fault: Option<Fault>,
    pub said: Vec<String>,
    pub actions: u64,
    pub waits: u64,
    pub quarantines: u64,
    /// How often something stale was there with pages detached.
    pub stale: u64,
    silence: Silence,
    mute: bool,
    /// Of the access under way.
    page: u8,
    host_is: HostIs,
    host: HostThread,
    device: DeviceThread,
    real: Arc<Device>,
    dma: Arc<GuestDma>,
    eye: Eye,
    seen: HashSet<State>,
}

impl Pair {
    pub fn new(k: u64, silence: Silence, fault: Option<Fault>) -> Self {
        let ats_timeout = if silence == Silence::EndsInQuarantine { Duration::ZERO } else { Duration::from_secs(60) };
        let iommu = iommu::Config { ats_timeout, ..iommu::Config::default() };
        let (dma, [real], eye) = real::guest(k, iommu, [("ats", Trust::Untrusted)]);
        let device = DeviceThread::new(AtsDma::new(&real).unwrap());
        let host = HostThread::new(Arc::clone(&dma), Arc::clone(&real), eye.clone());
        Self {
            model: Scene::Ats.start(),
            fault,
            said: vec![format!("k = {k}, {silence:?}")],
            actions: 0,
            waits: 0,
            quarantines: 0,
            stale: 0,
            silence,
            mute: false,
            page: 0,
            host_is: HostIs::Idle,
            host,
            device,
            real,
            dma,
            eye,
            seen: HashSet::new(),
        }
    }

    fn ats(&self) -> &ModelDevice {
        &self.model.devices[0]
    }

    fn is_busy(&self) -> bool {
        self.ats().at != At::Out
    }

    /// What can be done now.
    pub fn possible(&self, ops: &[Op]) -> Vec<Act> {
        let mut acts = Vec::new();
        match self.host_is {
            HostIs::Idle => acts.extend(ops.iter().copied().map(Act::Start)),
            HostIs::Detached => acts.push(Act::Release),
            HostIs::Waiting => {}
        }
        if self.is_busy() {
            acts.push(Act::Go);
        } else {
            acts.extend([Act::Access(0), Act::Access(1), if self.mute { Act::Unmute } else { Act::Mute }]);
            acts.extend((self.ats().quarantined && self.host_is == HostIs::Idle).then_some(Act::Reset));
        }
        acts
    }

    pub fn act(&mut self, act: Act) {
        self.said.push(format!("{act:?}"));
        self.actions += 1;
        match act {
            Act::Start(op) => {
                self.apply(Action::Start(0, op));
                self.host.device_is_idle.store(!self.is_busy(), Ordering::SeqCst);
                self.host.start(op);
                self.follow_host();
            }
            Act::Release => {
                // Past the stage at which it was stopped.
                self.apply(Action::Host(0));
                self.host.go();
                self.follow_host();
            }
            Act::Access(page) => self.access(page),
            Act::Go => self.go(),
            Act::Mute | Act::Unmute => {
                self.mute = act == Act::Mute;
                self.device.mute(self.mute);
                // Idle as it is, it answers whoever looks.
                if self.host_is == HostIs::Waiting && !self.mute {
                    self.host.device_is_idle.store(true, Ordering::SeqCst);
                    self.follow_host();
                }
            }
            Act::Reset => {
                self.real.reset().unwrap();
                self.model.devices[0] = ModelDevice::new(self.ats().kind);
            }
        }
        self.compare();
    }

    /// The model goes on to where the real thread has to be seen next.
    fn follow_host(&mut self) {
        let expected = loop {
            let host = self.model.hosts[0];
            match host.at {
                Stage::Idle => break Event::Done,
                Stage::Switch if host.rest == host.todo && self.host_is != HostIs::Detached => break Event::Detached,
                _ if self.tries(Action::Host(0)) => {}
                // An idle device answers at once, any other after its access, one that is mute never.
                _ if self.is_busy() || self.mute => break Event::Waits,
                _ => self.answer(),
            }
        };
        let event = self.host.event();
        assert_eq!(event, expected, "the host, model {:?}\n{:#?}", self.model.hosts[0].at, self.said);
        self.host_is = match event {
            Event::Done => HostIs::Idle,
            Event::Detached => HostIs::Detached,
            Event::Waits => HostIs::Waiting,
        };
        let found = self.host.found.lock().unwrap().take();
        if let Some(found) = found.filter(|_| event == Event::Detached) {
            // The same law, asked of both.
            let holds = Law::I7.holds(&self.model, self.fault);
            assert_eq!(found > 0, !holds, "{found} differences\n{:#?}", self.said);
            self.stale += u64::from(!holds);
        }
        if event == Event::Waits {
            self.waits += 1;
            self.compare();
            self.host.go();
            if self.silence == Silence::EndsInQuarantine {
                self.time_out();
            }
        }
    }

    /// The host waits no longer.
    fn time_out(&mut self) {
        self.said.push("time out".into());
        let asked = self.eye.span(self.ats().asked);
        assert!(can_time_out(&self.model, 0, self.fault));
        self.apply(Action::TimeOut(0));
        self.quarantines += 1;
        let began = Instant::now();
        while !self.real.is_quarantined() {
            assert!(began.elapsed() < Duration::from_secs(20), "no quarantine\n{:#?}", self.said);
            std::thread::yield_now();
        }
        assert_eq!(self.real.unanswered(), Some(asked.onto(Iova::new(asked.start().get()))), "{:#?}", self.said);
        if self.ats().is_draining() {
            assert!(self.host.is_quiet(), "the host goes on under an access\n{:#?}", self.said);
        } else {
            self.follow_host();
        }
    }

    fn access(&mut self, page: u8) {
        self.page = page;
        let at = Iova::new(self.eye.span(one(page.into())).start().get());
        let expected = if self.ats().quarantined {
            Heard::Over(Err(FaultKind::Quarantined))
        } else if self.ats().atc.lookup(page.into()).is_some() {
            self.use_it(page)
        } else {
            self.ask(page)
        };
        self.hear(expected, |device| device.access(at));
    }

    /// A translation is asked for inside a guard; the answer is given when that is left.
    fn ask(&mut self, page: u8) -> Heard {
        while self.ats().at != At::Ready {
            self.apply(Action::Device(0, Move::Go));
        }
        self.apply(Action::Device(0, Move::Look(page)));
        loop {
            match self.ats().at {
                At::Answering(_) => return Heard::Stopped,
                At::Ready => {
                    self.apply(Action::Device(0, Move::Leave));
                    let mapped = self.model.io.walk(page.into()).is_some();
                    return Heard::Over(Err(if mapped { FaultKind::Secure } else { FaultKind::NotMapped }));
                }
                _ => self.apply(Action::Device(0, Move::Go)),
            }
        }
    }

    fn use_it(&mut self, page: u8) -> Heard {
        self.apply(Action::Device(0, Move::Use(page)));
        if self.is_busy() { Heard::Stopped } else { Heard::Over(Err(FaultKind::SecureTranslated)) }
    }

    fn go(&mut self) {
        let at = self.ats().at;
        self.apply(Action::Device(0, Move::Go));
        let expected = match at {
            // It is cut off before it has used what it was given.
            At::Answering(_) if self.ats().quarantined => Heard::Over(Err(FaultKind::Quarantined)),
            At::Answering(_) => self.use_it(self.page),
            _ => Heard::Over(Ok(())),
        };
        self.hear(expected, DeviceThread::go);
        if !self.is_busy() && self.host_is == HostIs::Waiting {
            let answers = self.ats().asked == 0 || !self.mute;
            self.host.device_is_idle.store(true, Ordering::SeqCst);
            if answers {
                self.follow_host();
            }
        }
    }

    fn hear(&mut self, expected: Heard, order: impl FnOnce(&DeviceThread) -> Heard) {
        let heard = order(&self.device);
        // It may ask where nothing is mapped any more, and a walk comes before the look at who asks.
        let unmapped = self.model.io.walk(self.page.into()).is_none();
        if self.ats().quarantined && unmapped && heard == Heard::Over(Err(FaultKind::NotMapped)) {
            return;
        }
        assert_eq!(heard, expected, "the device, model {:?}\n{:#?}", self.ats().at, self.said);
    }

    /// The device answers, if the model lets it.
    fn answer(&mut self) {
        let mut possible = Vec::new();
        moves(&self.model, 0, self.fault, &mut possible);
        assert!(possible.contains(&Move::Ack), "the model's device cannot answer: {:?}\n{:#?}", self.model, self.said);
        self.apply(Action::Device(0, Move::Ack));
    }

    fn apply(&mut self, action: Action) {
        assert!(self.tries(action), "not possible in the model: {action:?}\n{:#?}", self.said);
    }

    fn tries(&mut self, action: Action) -> bool {
        let done = Transaction { scene: Scene::Ats, fault: self.fault }.apply(&mut self.model, action);
        self.seen.insert(self.model.clone());
        done
    }

    /// Tables, and what the device has.
    fn compare(&self) {
        let real = self.eye.look();
        assert_eq!(real, Some(Tables::of(&self.model)), "{:#?}", self.said);
        assert_eq!(self.real.is_quarantined(), self.ats().quarantined, "{:#?}", self.said);
        assert!(self.fault.is_some() || self.model.broken.is_none(), "{:#?}", self.said);
        // Who is in an access has its cache to itself.
        if !self.is_busy() && !self.ats().quarantined {
            let model = [0, 1].map(|page| self.ats().atc.lookup(page).map(|leaf| leaf.large));
            assert_eq!(self.cached(), model, "the device's cache\n{:#?}", self.said);
        }
    }

    /// What the real device has of each page, and whether it is the large leaf.
    fn cached(&self) -> [Option<bool>; PAGES] {
        let mut cached = [None; PAGES];
        let whole = Span::of(Iova::new(0), Iova::new((REAL << PAGE_LG2) - 1));
        self.eye.domain.each_cached_by_devices(whole, |_, span, oa| {
            let pages = [span.start(), span.last()].map(|at| Page::new(at.get() >> PAGE_LG2));
            assert_eq!(oa, self.eye.backing.oa(pages[0]), "a translation that leads elsewhere");
            if span == whole {
                cached = [Some(true); PAGES];
                return;
            }
            let half = (0..PAGES).find(|half| pages.iter().all(|page| self.eye.half(*half).contains(*page)));
            cached[half.expect("a translation of a size between the model's")] = Some(false);
        });
        cached
    }

    /// Everybody comes to their end; then an audit is clean. The states that the model has passed.
    pub fn finish(mut self) -> HashSet<State> {
        while self.is_busy() {
            self.act(Act::Go);
        }
        if self.mute {
            self.act(Act::Unmute);
        }
        while self.host_is != HostIs::Idle {
            self.act(Act::Release);
        }
        let report = self.dma.audit();
        assert!(self.fault.is_some() || report.is_clean(), "{:#?}\n{:#?}", report.differences, self.said);
        let stats = self.real.ats();
        assert_eq!((stats.quarantines, stats.timeouts), (self.quarantines, self.quarantines), "{:#?}", self.said);
        std::mem::take(&mut self.seen)
    }
}
