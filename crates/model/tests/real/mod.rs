//! The real tables, read back into the model's words. One 2 MiB entry stands for the model's large one; its two pages are the first `k` real pages and the
//! others.
#![allow(dead_code, reason = "each replay uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

use addr::{Gpa, Iova, PAGE_LG2, Page, Span};
use backing::{Backing, Frames, PageState};
use convert::{RecordedStage2, Stage2, Stage2Error};
use iommu::{Domain, SystemRmp};
use lockstep::{Config, Device, GuestDma, Trust};
use lockstep_model::state::{Entry, IoTable, Is, PAGES, Rmp, Set, State, one};
use secure::RmpSize;
use std::sync::{Arc, Mutex};

pub const REAL: u64 = 512;
pub const ASID: u32 = 3;

/// What model and code are compared by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tables {
    pub is: [Is; PAGES],
    pub rmp: Rmp,
    pub io: IoTable,
    pub private: u8,
}

impl Tables {
    pub fn of(state: &State) -> Self {
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
pub struct Stage2Link {
    pub record: RecordedStage2,
    pub refuses: Mutex<Option<Gpa>>,
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

/// A guest of one memslot, and its devices, all behind one page table.
pub fn guest<const N: usize>(k: u64, iommu: iommu::Config, devices: [(&str, Trust); N]) -> (Arc<GuestDma>, [Arc<Device>; N], Eye) {
    let stage2 = Arc::new(Stage2Link::default());
    let iommu = iommu::Config { table_bytes: 4 << 20, ..iommu };
    let dma = Arc::new(GuestDma::new(&Config { asid: ASID, iommu, ..Config::default() }, stage2.clone()).unwrap());
    let backing = Backing::memfd(REAL << PAGE_LG2, Frames::Contiguous).unwrap();
    let devices = devices.map(|(name, trust)| dma.add_device(name, trust).unwrap());
    dma.add_memory(Gpa::new(0), REAL << PAGE_LG2, &backing, 0).unwrap();
    let domain = devices[0].domain().unwrap();
    let eye = Eye { rmp: dma.rmp().clone(), domain, backing, stage2, k };
    (dma, devices, eye)
}

/// The real tables, read.
#[derive(Clone)]
pub struct Eye {
    pub rmp: Arc<SystemRmp>,
    /// Of every device. Asked for beforehand: whoever is stopped in the middle may take no lock.
    pub domain: Arc<Domain>,
    pub backing: Arc<Backing>,
    pub stage2: Arc<Stage2Link>,
    pub k: u64,
}

impl Eye {
    pub fn half(&self, page: usize) -> Span<Page> {
        if page == 0 { Span::of(Page::new(0), Page::new(self.k - 1)) } else { Span::of(Page::new(self.k), Page::new(REAL - 1)) }
    }

    pub fn span(&self, pages: Set) -> Span<Gpa> {
        let hull = match pages {
            0b01 => self.half(0),
            0b10 => self.half(1),
            _ => Span::of(Page::new(0), Page::new(REAL - 1)),
        };
        Span::of(Gpa::new(hull.start().get() << PAGE_LG2), Gpa::new(((hull.last().get() + 1) << PAGE_LG2) - 1))
    }

    /// `None` while something of a half differs from the rest of it.
    pub fn look(&self) -> Option<Tables> {
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
