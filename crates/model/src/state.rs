//! What there is: one memslot of two pages, and the tables that say whose they are and who reaches them. Small enough for every interleaving, large enough
//! that an entry or a leaf can be *large* (both pages, as 2 MiB are 512), be split, and be joined again.
//!
//! GPA, IOVA and frame of a page are its number. Sets of pages are bit sets.

use crate::device::Device;
use crate::host::Host;

/// Pages by bit.
pub type Set = u8;

/// How many pages there are.
pub const PAGES: usize = 2;

/// Every page.
pub const ALL: Set = 0b11;

/// The set of one page.
pub const fn one(page: usize) -> Set {
    1 << page
}

/// The pages of a set.
pub fn each(set: Set) -> impl Iterator<Item = usize> + Clone {
    (0..PAGES).filter(move |page| set & one(*page) != 0)
}

/// Whose a page is, as the backing records it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Is {
    /// The host's.
    Shared,
    /// The guest's.
    Private,
    /// Nobody's: punched, or leaked.
    Absent,
}

/// An RMP entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Entry {
    /// Guest-owned.
    pub assigned: bool,
    /// The guest has accepted it.
    pub validated: bool,
    /// The page it is for the guest.
    pub gpa: u8,
}

/// The secure world's table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Rmp {
    /// The first entry says large: it speaks for both pages, and the second means nothing.
    pub large: bool,
    /// By frame.
    pub entries: [Entry; PAGES],
    /// The smash sequence is odd: entry and leaf are being split, which is one event for devices.
    pub smashing: bool,
    /// Frames that the secure world kept.
    pub leaked: Set,
}

impl Rmp {
    /// What the table says about a frame.
    pub fn at(&self, frame: usize) -> Entry {
        match self.large {
            true => Entry { gpa: self.entries[0].gpa + frame as u8, ..self.entries[0] },
            false => self.entries[frame],
        }
    }
}

/// A translation: a leaf of the IO page table, or a copy of one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Leaf {
    /// Both pages in one.
    pub large: bool,
    /// IOVA of its first page.
    pub at: u8,
    /// Frame of its first page.
    pub frame: u8,
}

impl Leaf {
    /// The leaf that is right for both pages.
    pub const LARGE: Self = Self { large: true, at: 0, frame: 0 };

    /// The leaf that is right for a page alone.
    pub const fn small(page: usize) -> Self {
        Self { large: false, at: page as u8, frame: page as u8 }
    }

    /// The IOVAs that it translates.
    pub fn covers(self) -> Set {
        if self.large { ALL } else { one(self.at.into()) }
    }

    /// The frames that it reaches.
    pub fn frames(self) -> Set {
        if self.large { ALL } else { one(self.frame.into()) }
    }

    /// Where an IOVA leads.
    pub fn frame_of(self, page: usize) -> usize {
        usize::from(self.frame) + page - usize::from(self.at)
    }
}

/// The IO page table of all devices: one entry that is a large leaf, or points to a table of two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IoTable {
    /// One leaf for both.
    Large,
    /// A frame for each page that has a leaf.
    Small([Option<u8>; PAGES]),
}

impl IoTable {
    /// A walk.
    pub fn walk(&self, page: usize) -> Option<Leaf> {
        match self {
            Self::Large => Some(Leaf::LARGE),
            Self::Small(frames) => frames[page].map(|frame| Leaf { large: false, at: page as u8, frame }),
        }
    }

    /// The pages that have a leaf.
    pub fn mapped(&self) -> Set {
        (0..PAGES).filter(|page| self.walk(*page).is_some()).map(one).sum()
    }

    /// The small leaves, those of a large leaf that is about to be cut among them.
    pub fn frames(&self) -> [Option<u8>; PAGES] {
        match self {
            Self::Large => [Some(0), Some(1)],
            Self::Small(frames) => *frames,
        }
    }
}

/// KVM's stage 2.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Kvm {
    /// GPAs that are private by attribute. There is one more GPA than pages: the planted fault `alias-slot` shows page 0 there, too.
    pub private: u8,
    /// Being invalidated (`in_progress`): nobody installs anything.
    pub frozen: Set,
    /// What is installed, and as what.
    pub leaves: [Option<bool>; PAGES],
    /// Owner changed, but the commit was refused and the error said so: to be told again (I-10).
    pub untold: Set,
}

/// The second GPA of page 0 under `alias-slot`.
pub const ALIAS: usize = PAGES;

/// A vCPU that touches guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Vcpu {
    /// Not in a fault.
    #[default]
    Idle,
    /// Has read sequence and attribute, and is about to install.
    Faulting {
        /// Where.
        page: u8,
        /// What the attribute was.
        private: bool,
        /// The sequence has moved since.
        moved: bool,
    },
}

/// A promise that was seen broken at the moment of an access, where no state shows it afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Broken {
    /// DMA reached a page that had been given back.
    Released,
    /// DMA reached private memory and must not have.
    Private,
    /// DMA was answered otherwise than whose page it is, though nothing was changing.
    Answer,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// Page states of the backing.
    pub is: [Is; PAGES],
    /// Pages whose memory the host has again.
    pub released: Set,
    /// The secure world's table.
    pub rmp: Rmp,
    /// The IO page table.
    pub io: IoTable,
    /// Stage 2.
    pub kvm: Kvm,
    /// Who holds the pages. Work on one large entry takes turns, so there is one lock.
    pub lock: Option<u8>,
    /// Host threads.
    pub hosts: Vec<Host>,
    /// Devices.
    pub devices: Vec<Device>,
    /// A vCPU.
    pub vcpu: Vcpu,
    /// Seen by a device.
    pub broken: Option<Broken>,
}

impl State {
    /// Pages that a request is changing: from when its thread holds them until it is acknowledged.
    pub fn changing(&self) -> Set {
        self.hosts.iter().fold(0, |set, host| set | host.changing)
    }

    /// Something happens to `pages` that a device in the middle of an access may see either way.
    pub(crate) fn disturb(&mut self, pages: Set) {
        self.devices.iter_mut().for_each(|device| device.disturb(pages));
    }
}
