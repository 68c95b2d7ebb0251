//! The threads that serve. One at a time waits for calls and serves each at once, on the client's CPU: handing a call to another thread
//! would cost more than most calls do. Should a call take long, another thread takes over the waiting, and the first one rests when it is done.

use crate::calls::{self, Outcome};
use crate::clients::lock;
use crate::server::Server;
use crate::sys::Notification;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Who waits, who serves, who rests.
#[derive(Debug)]
pub(crate) struct Crew {
    server: Arc<Server>,
    /// Whose turn it is to wait for calls, and how far that thread is: see [`State`].
    state: AtomicU64,
    places: Mutex<Places>,
    wake: Condvar,
    /// The overseer sleeps until a call comes.
    asleep: AtomicBool,
    /// An eventfd that wakes the overseer.
    bell: OwnedFd,
    ended: AtomicBool,
    most: usize,
    /// The wait for a call does not end when the last client does.
    polls_first: bool,
}

/// The number of the thread that waits for calls, above its steps: one more with each call that begins and each that ends, so
/// odd while it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State(u64);

impl State {
    const TURN: u32 = 40;

    fn turn(self) -> u64 {
        self.0 >> Self::TURN
    }

    /// Whether a call is being served.
    pub(crate) fn is_serving(self) -> bool {
        self.0 & 1 == 1
    }
}

#[derive(Debug, Default)]
struct Places {
    threads: usize,
    resting: usize,
    /// A turn that nobody has taken up yet.
    offered: Option<u64>,
}

impl Crew {
    pub(crate) fn new(server: Arc<Server>, bell: OwnedFd, most: usize) -> Arc<Self> {
        Arc::new(Self {
            server,
            state: AtomicU64::new(0),
            places: Mutex::default(),
            wake: Condvar::new(),
            asleep: AtomicBool::new(false),
            bell,
            ended: AtomicBool::new(false),
            most: most.max(1),
            polls_first: !ends_with_clients(),
        })
    }

    /// Has a resting or new thread wait for calls from now on.
    pub(crate) fn relieve(self: &Arc<Self>) {
        let mut places = lock(&self.places);
        let rests = places.resting > 0;
        if !rests && places.threads >= self.most {
            return;
        }
        let before = self.state();
        let turn = before.turn() + 1;
        // Should the waiting thread get on in between, it rests no less after the next call: two wait for a moment.
        self.state.store(turn << State::TURN, Ordering::SeqCst);
        if rests {
            places.offered = Some(turn);
            drop(places);
            self.wake.notify_one();
            return;
        }
        places.threads += 1;
        drop(places);
        let crew = Arc::clone(self);
        let started = std::thread::Builder::new().name("serve".into()).spawn(move || crew.work(turn));
        if started.is_err() {
            lock(&self.places).threads -= 1;
            self.server.warn("no thread can be started: calls wait for each other");
            // Whoever serves goes on waiting afterwards.
            self.state.store(before.0, Ordering::SeqCst);
        }
    }

    /// How far the waiting thread is.
    pub(crate) fn state(&self) -> State {
        State(self.state.load(Ordering::SeqCst))
    }

    /// The thread whose turn it is begins or ends a call.
    fn step(&self, turn: u64) {
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| (State(state).turn() == turn).then(|| state + 1));
    }

    fn has_turn(&self, turn: u64) -> bool {
        self.state().turn() == turn
    }

    /// The overseer is going to sleep: the next call rings the bell. Answers whether it may; it must look again before it does.
    pub(crate) fn going_to_sleep(&self, state: State) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        self.state() == state
    }

    /// It is awake.
    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        let _ = rustix::io::read(&self.bell, &mut [0u8; 8]);
    }

    /// No call can come any more: sends everyone home. Answers when they are.
    pub(crate) fn end(&self) {
        let mut places = lock(&self.places);
        self.ended.store(true, Ordering::Release);
        self.wake.notify_all();
        while places.threads != 0 {
            places = self.wake.wait(places).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    fn work(self: &Arc<Self>, mut turn: u64) {
        // Whatever an observer does in a call to it, the next call of a client finds somebody.
        while catch_unwind(AssertUnwindSafe(|| self.work_on(&mut turn))).is_err() {}
    }

    /// Serves and rests in turn, until the end.
    fn work_on(&self, turn: &mut u64) {
        loop {
            self.serve(*turn);
            let mut places = lock(&self.places);
            places.resting += 1;
            *turn = loop {
                if let Some(offered) = places.offered.take() {
                    places.resting -= 1;
                    break offered;
                }
                if self.ended.load(Ordering::Acquire) {
                    places.resting -= 1;
                    places.threads -= 1;
                    self.wake.notify_all();
                    return;
                }
                places = self.wake.wait(places).unwrap_or_else(PoisonError::into_inner);
            };
        }
    }

    /// Waits for calls and serves them, until it is another's turn or no client is left.
    fn serve(&self, turn: u64) {
        let listener = &self.server.listener;
        while self.has_turn(turn) && !self.ended.load(Ordering::Acquire) {
            if self.polls_first {
                let mut polled = [PollFd::new(&listener.0, PollFlags::IN)];
                if poll(&mut polled, None).is_ok() && polled[0].revents().contains(PollFlags::HUP) {
                    return;
                }
            }
            match listener.receive() {
                Ok(call) => self.one(turn, &call),
                Err(Errno::NOENT) => {
                    // The client was killed before we came to it, or there is no client any more.
                    let mut polled = [PollFd::new(&listener.0, PollFlags::IN)];
                    if poll(&mut polled, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
                        && polled[0].revents().contains(PollFlags::HUP)
                    {
                        return;
                    }
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => {
                    self.server.warn(&format!("no calls can be received any more: {errno}"));
                    return;
                }
            }
        }
    }

    fn one(&self, turn: u64, call: &Notification) {
        self.step(turn);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
        let server = &self.server;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            server.drain();
            calls::handle(server, call)
        }));
        let failed = outcome.is_err();
        let outcome = outcome.unwrap_or(Outcome::Refuse(Errno::IO));
        // A client that was killed in between gets no answer, and needs none.
        let _ = match outcome {
            Outcome::GoOn => server.listener.go_on(call.id),
            Outcome::Value(value) => server.listener.answer(call.id, value),
            Outcome::Refuse(errno) => server.listener.refuse(call.id, errno),
            Outcome::Answered => Ok(()),
        };
        self.step(turn);
        if failed {
            server.warn("a call was answered with EIO because its handler panicked: that is a bug of ours");
        }
    }
}

/// Whether the kernel ends a wait for calls when the last client is gone: Linux 6.11.
fn ends_with_clients() -> bool {
    let name = rustix::system::uname();
    let mut numbers = name.release().to_str().unwrap_or_default().split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 11)
}
