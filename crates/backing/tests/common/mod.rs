//! What the tests share: spans by two numbers, and a listener that writes down what it hears.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use addr::{Page, Span};
use lockstep_backing::{Backing, HostAddr, Listener, PageState, RestoreError, SpanGuard};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

pub(crate) const K4: u64 = 4096;
pub(crate) const M2: u64 = 2 << 20;

pub(crate) fn pages(start: u64, last: u64) -> Span<Page> {
    Span::of(Page::new(start), Page::new(last))
}

pub(crate) fn page(index: u64) -> Page {
    Page::new(index)
}

/// All of the backing's memory; it must be contiguous.
pub(crate) fn host(backing: &Backing) -> HostAddr {
    backing.host(backing.window().start(), backing.len_bytes()).expect("mapped and contiguous")
}

pub(crate) fn byte(at: HostAddr, off: u64) -> u8 {
    let mut one = [0xee];
    at.read(off, &mut one).expect("readable");
    one[0]
}

/// A second descriptor of the backing's file: what somebody else has.
pub(crate) fn other_fd(backing: &Backing) -> OwnedFd {
    backing.file().expect("has a file").as_fd().try_clone_to_owned().expect("dup")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// With the state of the first page, and its first byte, at that time.
    Revoke(Span<Page>, PageState, Option<u8>),
    Restore(Span<Page>, PageState),
}

#[derive(Default)]
pub(crate) struct Ear {
    pub(crate) heard: Mutex<Vec<Heard>>,
    /// What `restore` answers.
    pub(crate) refuse: Mutex<bool>,
}

impl Ear {
    pub(crate) fn of(backing: &Backing) -> Arc<Self> {
        let ear = Arc::new(Self::default());
        let weak: Weak<Self> = Arc::downgrade(&ear);
        backing.add_listener(weak);
        ear
    }
    pub(crate) fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

impl Listener for Ear {
    fn revoke(&self, pages: Span<Page>, held: &SpanGuard<'_>) {
        assert!(held.covers(pages), "revoked without holding {pages}");
        let backing = held.backing();
        let mut first = [0];
        let host = backing.host(backing.oa(pages.start()), K4);
        let first = host.and_then(|host| host.read(0, &mut first).ok()).map(|()| first[0]);
        self.heard.lock().unwrap().push(Heard::Revoke(pages, backing.state(pages.start()), first));
    }
    fn restore(&self, pages: Span<Page>, held: &SpanGuard<'_>) -> Result<(), RestoreError> {
        assert!(held.covers(pages), "restored without holding {pages}");
        self.heard.lock().unwrap().push(Heard::Restore(pages, held.backing().state(pages.start())));
        if *self.refuse.lock().unwrap() { Err("no tables".into()) } else { Ok(()) }
    }
}
