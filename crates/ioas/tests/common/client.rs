//! A client process in small: memory that only its owner can touch, a count of pins for each page, and an account that pays for them.

use addr::{PAGE_BYTES, PAGE_LG2, Page, Span};
use backing::{Backing, CopyFault, Frames, HostAddr, Owner, PageName, PinError};
use lockstep_ioas::{Charge, Source};
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Client {
    bytes: Mutex<Vec<u8>>,
    pins: Mutex<Vec<u32>>,
    /// The page that cannot be pinned.
    pub(crate) bad: Mutex<Option<u64>>,
    pub(crate) pinned_for_writing: AtomicBool,
    pub(crate) pins_for_access: AtomicBool,
    /// Calls of `pin`.
    pub(crate) calls: AtomicU64,
}

impl Client {
    pub(crate) fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; (pages * PAGE_BYTES) as usize]),
            pins: Mutex::new(vec![0; pages as usize]),
            bad: Mutex::new(None),
            pinned_for_writing: AtomicBool::new(false),
            pins_for_access: AtomicBool::new(false),
            calls: AtomicU64::new(0),
        })
    }

    pub(crate) fn backing(self: &Arc<Self>) -> Arc<Backing> {
        let len = self.bytes.lock().unwrap().len() as u64;
        Backing::foreign(len, Arc::clone(self) as Arc<dyn Owner>, Frames::Contiguous).unwrap()
    }

    /// Pins of the pages from the first on, as far as there are any.
    pub(crate) fn pins(&self) -> String {
        let pins = self.pins.lock().unwrap();
        let text: String = pins.iter().map(|count| char::from_digit(*count, 10).unwrap()).collect();
        text.trim_end_matches('0').to_owned()
    }

    pub(crate) fn poke(&self, offset: u64, from: &[u8]) {
        self.bytes.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
    }

    pub(crate) fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[offset as usize..][..len].to_vec()
    }

    fn hits_bad(&self, pages: Span<Page>) -> Option<Page> {
        self.bad.lock().unwrap().map(Page::new).filter(|bad| pages.contains(*bad))
    }

    /// How far an access comes.
    fn reach(&self, offset: u64, len: usize) -> Result<(), CopyFault> {
        let bad = self.bad.lock().unwrap().map(|page| page << PAGE_LG2);
        match bad.filter(|bad| *bad < offset + len as u64 && offset < bad + PAGE_BYTES) {
            Some(bad) => Err(CopyFault { done: bad.saturating_sub(offset) as usize }),
            None => Ok(()),
        }
    }
}

impl Owner for Client {
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if let Some(page) = self.hits_bad(pages) {
            return Err(PinError::Fault { page });
        }
        self.pinned_for_writing.store(write, Ordering::Relaxed);
        let mut pins = self.pins.lock().unwrap();
        pins[pages.start().get() as usize..=pages.last().get() as usize].iter_mut().for_each(|count| *count += 1);
        Ok(())
    }

    fn unpin(&self, pages: Span<Page>) {
        let mut pins = self.pins.lock().unwrap();
        pins[pages.start().get() as usize..=pages.last().get() as usize].iter_mut().for_each(|count| *count -= 1);
    }

    fn host(&self, _: u64, _: u64) -> Option<HostAddr> {
        None
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let reach = self.reach(offset, into.len());
        let len = reach.map_or_else(|fault| fault.done, |()| into.len());
        into[..len].copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..len]);
        reach
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        let reach = self.reach(offset, from.len());
        let len = reach.map_or_else(|fault| fault.done, |()| from.len());
        self.bytes.lock().unwrap()[offset as usize..][..len].copy_from_slice(&from[..len]);
        reach
    }

    fn name(&self, page: Page) -> PageName {
        PageName::Memory { space: 1, page: page.get() }
    }

    fn pins_for_access(&self) -> bool {
        self.pins_for_access.load(Ordering::Relaxed)
    }
}

/// An account with a limit.
#[derive(Debug)]
pub(crate) struct Purse {
    charged: Mutex<u64>,
    limit_pages: u64,
}

impl Purse {
    pub(crate) fn new(limit_pages: u64) -> Arc<Self> {
        Arc::new(Self { charged: Mutex::new(0), limit_pages })
    }

    pub(crate) fn charged(&self) -> u64 {
        *self.charged.lock().unwrap()
    }
}

impl Charge for Purse {
    fn charge(&self, pages: u64) -> Result<(), PinError> {
        let mut charged = self.charged.lock().unwrap();
        if *charged + pages > self.limit_pages {
            return Err(PinError::Limit { pages, limit_pages: self.limit_pages });
        }
        *charged += pages;
        Ok(())
    }

    fn uncharge(&self, pages: u64) {
        *self.charged.lock().unwrap() -= pages;
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A client, an account, and all of the client's memory as a source at a user address.
pub(crate) fn source(pages: u64, limit_pages: u64) -> (Arc<Client>, Arc<Purse>, Arc<Source>) {
    let (client, purse) = (Client::new(pages), Purse::new(limit_pages));
    let charge = Arc::clone(&purse) as Arc<dyn Charge>;
    let source = Source::new(&client.backing(), 0, pages * PAGE_BYTES, 0x7000_0000_0000, true, Some(charge));
    (client, purse, source)
}
