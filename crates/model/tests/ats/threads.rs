//! The two real threads, each stopped at its own places until it is told to go on. One whose test is over runs on to its end.

use crate::real::Eye;
use addr::{Gpa, Iova};
use convert::Auditor;
use iommu::FaultKind;
use lockstep::{AtsDma, AtsStats, Change, Device, GuestDma, Owner, Step};
use lockstep_model::host::Op;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use sync::pause::at_every_pause;

/// Longer than anything takes here: whoever says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the device says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// It is stopped in the middle of an access.
    Stopped,
    /// The access is over.
    Over(Result<(), FaultKind>),
}

enum Order {
    Access(Iova),
    Mute(bool),
    Go,
}

/// A device that stops at every pause.
pub struct DeviceThread {
    orders: Sender<Order>,
    heard: Receiver<Heard>,
}

impl DeviceThread {
    pub fn new(mut dma: AtsDma) -> Self {
        let ((orders, ordered), (says, heard)) = (channel(), channel());
        std::thread::spawn(move || {
            let ordered = Rc::new(ordered);
            let (stopped, go) = (Sender::clone(&says), Rc::clone(&ordered));
            let _stops = at_every_pause(move || {
                let _ = stopped.send(Heard::Stopped).is_ok().then(|| go.recv());
            });
            while let Ok(order) = ordered.recv() {
                let result = match order {
                    Order::Access(at) => dma.read(at, &mut [0; 8]).map_err(|fault| fault.reason),
                    Order::Mute(mute) => {
                        dma.set_mute(mute);
                        Ok(())
                    }
                    Order::Go => continue,
                };
                if says.send(Heard::Over(result)).is_err() {
                    return;
                }
            }
        });
        Self { orders, heard }
    }

    /// Begins an access.
    pub fn access(&self, at: Iova) -> Heard {
        self.order(Order::Access(at))
    }

    /// Lets it go on from where it is stopped.
    pub fn go(&self) -> Heard {
        self.order(Order::Go)
    }

    pub fn mute(&self, mute: bool) {
        assert_eq!(self.order(Order::Mute(mute)), Heard::Over(Ok(())));
    }

    fn order(&self, order: Order) -> Heard {
        self.orders.send(order).unwrap();
        self.heard.recv_timeout(PATIENCE).expect("the device hangs")
    }
}

/// What the host thread says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It has asked the device to forget, looked for the answer, and found none; it is stopped before it looks again.
    Waits,
    /// The pages of a conversion are in nobody's tables; it is stopped.
    Detached,
    /// The request has come to its end.
    Done,
}

/// A host thread that stops when its pages are detached.
pub struct HostThread {
    ops: Sender<Op>,
    events: Receiver<Event>,
    go: Sender<()>,
    /// The device is in no access, so that its cache can be looked at.
    pub device_is_idle: Arc<AtomicBool>,
    /// How much an audit has found with the pages detached, if it could look.
    pub found: Arc<Mutex<Option<u64>>>,
}

impl HostThread {
    pub fn new(dma: Arc<GuestDma>, device: Arc<Device>, eye: Eye) -> Self {
        let ((ops, asked), (says, events), (go, released)) = (channel(), channel(), channel());
        let (device_is_idle, found) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(None)));
        let released = Arc::new(Mutex::new(released));
        {
            let (space, says, released) = (Arc::downgrade(dma.space()), Sender::clone(&says), Arc::clone(&released));
            let (idle, found) = (Arc::clone(&device_is_idle), Arc::clone(&found));
            dma.space().on_transition(move |transition| {
                if transition.step() != Step::Detach {
                    return;
                }
                if let Some(space) = space.upgrade().filter(|_| idle.load(Ordering::SeqCst)) {
                    *found.lock().unwrap() = Some(Auditor::new(&space).check_transition(transition).count);
                }
                let _ = says.send(Event::Detached).is_ok().then(|| released.lock().unwrap().recv());
            });
        }
        std::thread::spawn(move || {
            let began = Rc::new(Cell::new(Some(AtsStats::default())));
            let (waiter, since) = (Sender::clone(&says), Rc::clone(&began));
            let (watched, held) = (Arc::clone(&device), released);
            let _waits = at_every_pause(move || {
                let now = watched.ats();
                let unanswered = since.get().is_some_and(|then| now.sent > then.sent && now.answers == then.answers);
                // Nobody waits for one that is cut off; what pauses then is a store.
                if unanswered && !watched.is_quarantined() {
                    since.set(None);
                    let _ = waiter.send(Event::Waits).is_ok().then(|| held.lock().unwrap().recv());
                }
            });
            while let Ok(op) = asked.recv() {
                began.set(Some(device.ats()));
                run(&dma, &eye, op);
                if says.send(Event::Done).is_err() {
                    return;
                }
            }
        });
        Self { ops, events, go, device_is_idle, found }
    }

    pub fn start(&self, op: Op) {
        self.ops.send(op).unwrap();
    }

    /// Lets it go on from where it is stopped.
    pub fn go(&self) {
        self.go.send(()).unwrap();
    }

    pub fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("the host hangs")
    }

    /// Whether it says nothing, for a moment that would be long enough.
    pub fn is_quiet(&self) -> bool {
        self.events.recv_timeout(Duration::from_millis(3)).is_err()
    }
}

/// What it answers is to be seen in the tables.
fn run(dma: &GuestDma, eye: &Eye, op: Op) {
    match op {
        Op::Convert { pages, private } => {
            let to = if private { Owner::Private } else { Owner::Shared };
            let _ = dma.convert(&[Change { span: eye.span(pages), to }]);
        }
        Op::Punch(pages) => drop(dma.punch(eye.span(pages))),
        Op::Populate(pages) => drop(dma.populate(eye.span(pages))),
        Op::Merge => drop(dma.merge(Gpa::new(0), u64::MAX)),
        Op::Smash | Op::Trust(_) => unreachable!("not in this scene"),
    }
}
