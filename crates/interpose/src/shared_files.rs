//! Files of clients that hold memory: one backing per inode, whoever names it and however, so that two maps of one file are one memory.
//! And who has to hear of it when a client takes pages out of such a file.

use crate::clients::lock;
use crate::files::{Inode, reopen};
use crate::memory::ClientMemory;
use addr::{PAGE_BYTES, PAGE_LG2, Page, Span};
use backing::{Backing, Frames, Kind, PageState};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

/// All of them, as long as somebody uses them.
#[derive(Debug, Default)]
pub(crate) struct SharedFiles {
    uses: Mutex<HashMap<Inode, Uses>>,
}

#[derive(Debug, Default)]
struct Uses {
    /// The file from its start. The newest comes last.
    backings: Vec<Weak<Backing>>,
    /// Memory of clients with pieces of the file in it.
    mapped: Vec<Weak<ClientMemory>>,
}

impl Uses {
    fn is_used(&mut self) -> bool {
        self.backings.retain(|backing| backing.strong_count() != 0);
        self.mapped.retain(|memory| memory.strong_count() != 0);
        !self.backings.is_empty() || !self.mapped.is_empty()
    }
}

impl SharedFiles {
    /// The backing of the file from its start to at least `end`, which `open` opens when there is none yet. `None` when the file
    /// is not of that kind, or not that long.
    pub(crate) fn backing(&self, inode: Inode, end: u64, open: impl FnOnce() -> Option<OwnedFd>) -> Option<Arc<Backing>> {
        let fits = |backing: &Arc<Backing>| end <= backing.len_bytes();
        let mut uses = lock(&self.uses);
        let place = uses.entry(inode).or_default();
        if let Some(known) = place.backings.iter().rev().find_map(Weak::upgrade).filter(|backing| fits(backing)).filter(is_whole) {
            return Some(known);
        }
        let opened = open().and_then(|file| open_backing(file, inode)).filter(fits);
        if let Some(backing) = &opened {
            place.is_used();
            place.backings.push(Arc::downgrade(backing));
        } else if !place.is_used() {
            uses.remove(&inode);
        }
        if uses.len() > 64 && uses.len().is_power_of_two() {
            uses.retain(|_, place| place.is_used());
        }
        opened
    }

    /// `memory` has pieces of the file in it.
    pub(crate) fn note(&self, inode: Inode, memory: &Weak<ClientMemory>) {
        let mut uses = lock(&self.uses);
        let place = uses.entry(inode).or_default();
        if !place.mapped.iter().any(|known| known.ptr_eq(memory)) {
            place.is_used();
            place.mapped.push(Weak::clone(memory));
        }
    }

    /// Whether anybody has to hear of pages that leave or come.
    pub(crate) fn is_used(&self, inode: Inode) -> bool {
        lock(&self.uses).get_mut(&inode).is_some_and(Uses::is_used)
    }

    /// Pages leave: when this returns, no device reaches whole pages of `len` bytes from `offset` on. Answers what must come back should
    /// they stay after all.
    pub(crate) fn revoke(&self, inode: Inode, offset: u64, len: u64) -> Vec<(Arc<Backing>, Span<Page>)> {
        let mut revoked = Vec::new();
        self.each(inode, offset, len, true, |backing, span| {
            let held = backing.lock(span);
            let was_there = backing.states(span).any(|(_, state)| state != PageState::Absent);
            // Listeners have let go whatever this answers.
            let _ = backing.revoke_held(&held, span);
            drop(held);
            if was_there {
                revoked.push((backing, span));
            }
        });
        revoked
    }

    /// Pages are there again, with memory.
    pub(crate) fn restore(&self, inode: Inode, offset: u64, len: u64) {
        self.each(inode, offset, len, false, |backing, span| restore(&backing, span));
    }

    /// Shows every use of the pages that lie wholly (`whole`) or partly in the bytes.
    fn each(&self, inode: Inode, offset: u64, len: u64, whole: bool, mut show: impl FnMut(Arc<Backing>, Span<Page>)) {
        let end = offset.saturating_add(len);
        let (first, behind) = match whole {
            true => (offset.div_ceil(PAGE_BYTES), end >> PAGE_LG2),
            false => (offset >> PAGE_LG2, end.div_ceil(PAGE_BYTES)),
        };
        let Some(span) = behind.checked_sub(1).and_then(|last| Span::new(Page::new(first), Page::new(last))) else { return };
        let (backings, mapped) = match lock(&self.uses).get(&inode) {
            Some(place) => (place.backings.clone(), place.mapped.clone()),
            None => return,
        };
        for backing in backings.iter().filter_map(Weak::upgrade) {
            if let Some(part) = backing.pages().intersect(span) {
                show(backing, part);
            }
        }
        for memory in mapped.iter().filter_map(Weak::upgrade) {
            for (backing, part) in memory.places_of(inode, span) {
                show(backing, part);
            }
        }
    }
}

/// Has listeners map pages again that are there.
pub(crate) fn restore(backing: &Backing, span: Span<Page>) {
    let state = if backing.kind() == Kind::GuestMemfd && backing.linear_hva().is_none() { PageState::Private } else { PageState::Shared };
    let held = backing.lock(span);
    let absent: Vec<_> = backing.states(span).filter(|(_, state)| *state == PageState::Absent).map(|(run, _)| run).collect();
    for run in absent {
        // What cannot be mapped again stays away; the client maps it anew.
        if backing.set_state(&held, run, state).is_ok() {
            let _ = backing.restore_held(&held, run);
        }
    }
}

/// Pages that were taken away stay away for those who had them. Who comes later gets them as they are then.
fn is_whole(backing: &Arc<Backing>) -> bool {
    backing.kind() == Kind::GuestMemfd || backing.states(backing.pages()).all(|(_, state)| state != PageState::Absent)
}

fn open_backing(file: OwnedFd, inode: Inode) -> Option<Arc<Backing>> {
    // The client may have had it open for reading only, or it may be another file by now.
    let stat = rustix::fs::fstat(&file).ok().filter(|&stat| Inode::from(stat) == inode)?;
    let kind = backing::file_kind(file.as_fd())?;
    let granule = if kind == Kind::HugeMemfd { stat.st_blksize as u64 } else { PAGE_BYTES };
    let len = (stat.st_size as u64).checked_next_multiple_of(granule.max(PAGE_BYTES))?;
    let mode = rustix::fs::fcntl_getfl(&file).ok()?;
    let file = if mode.contains(rustix::fs::OFlags::RDWR) { file } else { reopen(file.as_fd(), libc::O_RDWR).ok()? };
    // Whose pages they are is on record here: until they are converted, a guest_memfd's are nobody's but the host's.
    Backing::open(file, 0, len, Frames::Contiguous.starting(PageState::Shared)).ok()
}
