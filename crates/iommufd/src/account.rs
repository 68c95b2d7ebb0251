//! Who pays for pinned memory (rules 36 to 39): every pages object has a payer, chosen when it is mapped; a page is paid for once however many
//! areas and domains show it.

use crate::{Answer, Process, SpaceId};
use addr::PAGE_LG2;
use backing::PinError;
use ioas::Charge;
use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What an address space has pinned, in pages.
#[derive(Debug, Default)]
struct SpaceAccount {
    /// Everything: what the kernel shows as VmPin.
    pinned: AtomicU64,
    /// What counts against its limit: what the kernel shows as VmLck.
    locked: AtomicU64,
}

/// The accounts of a host: by address space, and by user.
#[derive(Debug, Default)]
pub struct Accounts(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    spaces: HashMap<SpaceId, Arc<SpaceAccount>>,
    users: HashMap<u32, Arc<AtomicU64>>,
}

/// How many accounts there may be before those are dropped that nobody uses.
const TIDY_AT: usize = 256;

impl Accounts {
    /// What an address space has pinned, and what of that counts against its limit, in pages.
    pub fn of_space(&self, space: SpaceId) -> (u64, u64) {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let account = books.spaces.get(&space);
        account.map_or((0, 0), |own| (own.pinned.load(Ordering::Relaxed), own.locked.load(Ordering::Relaxed)))
    }

    /// What all of them together have pinned, in pages.
    pub fn pinned(&self) -> u64 {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        books.spaces.values().map(|own| own.pinned.load(Ordering::Relaxed)).sum()
    }

    /// What a user has locked, in pages.
    pub fn of_user(&self, uid: u32) -> u64 {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        books.users.get(&uid).map_or(0, |own| own.load(Ordering::Relaxed))
    }

    fn open(&self, process: &Process, mode: Mode) -> Payer {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if books.spaces.len() >= TIDY_AT {
            books.spaces.retain(|_, own| Arc::strong_count(own) > 1);
        }
        let space = Arc::clone(books.spaces.entry(process.space).or_default());
        let user = (mode == Mode::User).then(|| Arc::clone(books.users.entry(process.uid).or_default()));
        Payer { mode, space, user, limit: process.memlock_bytes >> PAGE_LG2 }
    }
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing: the mapper may lock as much as there is.
    Free,
    /// All of a user's processes together.
    User,
    /// One address space.
    Space,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Free, Self::User, Self::Space];
}

/// Who pays.
#[derive(Clone, Debug)]
struct Payer {
    mode: Mode,
    space: Arc<SpaceAccount>,
    user: Option<Arc<AtomicU64>>,
    limit: u64,
}

impl Payer {
    /// What the limit counts.
    fn limited(&self) -> Option<&AtomicU64> {
        match self.mode {
            Mode::Free => None,
            Mode::User => self.user.as_deref(),
            Mode::Space => Some(&self.space.locked),
        }
    }

    fn pay(&self, pages: u64) -> Result<(), PinError> {
        if let Some(counter) = self.limited() {
            let within = |now: u64| now.checked_add(pages).filter(|sum| *sum <= self.limit);
            counter
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, within)
                .map_err(|_| PinError::Limit { pages, limit_pages: self.limit })?;
        }
        self.space.pinned.fetch_add(pages, Ordering::AcqRel);
        Ok(())
    }

    fn refund(&self, pages: u64) {
        if let Some(counter) = self.limited() {
            counter.fetch_sub(pages, Ordering::AcqRel);
        }
        self.space.pinned.fetch_sub(pages, Ordering::AcqRel);
    }
}

/// Where the pages of a pages object come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// An address in a process.
    User,
    /// A file.
    File,
}

/// What one pages object has been charged.
#[derive(Debug)]
pub(crate) struct Bill {
    pub(crate) origin: Origin,
    state: Mutex<(Payer, u64)>,
}

impl Bill {
    /// Nothing yet; who pays is decided now (rule 36).
    pub(crate) fn new(accounts: &Accounts, origin: Origin, process: &Process, by_space: bool) -> Arc<Self> {
        Arc::new(Self { origin, state: Mutex::new((accounts.open(process, mode(process, by_space)), 0)) })
    }

    /// Moves what these have been charged to `process`: it pays first, then the old payers get theirs back. All or nothing (rule 39). What is limited
    /// stays as it was chosen when the pages were mapped (rule 36).
    pub(crate) fn move_all(bills: &[&Self], accounts: &Accounts, process: &Process) -> Answer {
        let mut states: Vec<_> = bills.iter().map(|bill| bill.state.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let payers = Mode::ALL.map(|mode| accounts.open(process, mode));
        let totals = Mode::ALL.map(|mode| states.iter().filter(|state| state.0.mode == mode).map(|state| state.1).sum::<u64>());
        for index in 0..payers.len() {
            if let Err(error) = payers[index].pay(totals[index]) {
                payers[..index].iter().zip(totals).for_each(|(payer, total)| payer.refund(total));
                return Err(ioas::Error::from(error).into());
            }
        }
        for state in &mut states {
            let pages = state.1;
            let payer = payers.iter().find(|payer| payer.mode == state.0.mode).unwrap_or(&state.0).clone();
            std::mem::replace(&mut state.0, payer).refund(pages);
        }
        Ok(())
    }
}

fn mode(process: &Process, by_space: bool) -> Mode {
    match (process.ipc_lock, by_space) {
        (true, _) => Mode::Free,
        (false, true) => Mode::Space,
        (false, false) => Mode::User,
    }
}

impl Charge for Bill {
    fn charge(&self, pages: u64) -> Result<(), PinError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.pay(pages)?;
        state.1 += pages;
        Ok(())
    }

    fn uncharge(&self, pages: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.refund(pages);
        state.1 -= pages;
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
