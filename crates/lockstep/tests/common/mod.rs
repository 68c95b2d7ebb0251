//! A guest of memfd memory with one trusted and one untrusted device, and the dump that failed calls are held against.
#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(unreachable_pub, reason = "a module shared by test binaries")]

use addr::{Gpa, Iova, PAGE_LG2, Span};
use backing::{Backing, Frames};
use lockstep_iommu::{Change, Config, Device, Dma, GuestDma, Owner, Policy, RecordedStage2, Stage2, Tdisp, Trust};
use std::fmt::Write;
use std::sync::Arc;

pub const MIB: u64 = 1 << 20;
pub const ASID: u32 = 7;

pub struct Guest {
    pub dma: GuestDma,
    pub backing: Arc<Backing>,
    pub trusted: Arc<Device>,
    pub untrusted: Arc<Device>,
    pub stage2: Arc<dyn Stage2>,
}

impl Guest {
    pub fn new(bytes: u64, frames: Frames, policy: Policy) -> Self {
        Self::at(Gpa::new(0), bytes, frames, policy)
    }

    pub fn at(gpa: Gpa, bytes: u64, frames: Frames, policy: Policy) -> Self {
        Self::of(gpa, Backing::memfd(bytes, frames).unwrap(), policy)
    }

    pub fn of(gpa: Gpa, backing: Arc<Backing>, policy: Policy) -> Self {
        Self::with(gpa, backing, policy, Arc::new(RecordedStage2::new()))
    }

    pub fn with(gpa: Gpa, backing: Arc<Backing>, policy: Policy, stage2: Arc<dyn Stage2>) -> Self {
        Self::make(gpa, backing, Config { policy, ..Config::default() }, stage2)
    }

    /// With `config`, but for the ASID and the memory of page tables.
    pub fn configured(gpa: Gpa, bytes: u64, frames: Frames, config: Config) -> Self {
        Self::make(gpa, Backing::memfd(bytes, frames).unwrap(), config, Arc::new(RecordedStage2::new()))
    }

    /// Of any size: its memory is simulated, and tables have the room of the default configuration.
    pub fn simulated(bytes: u64) -> Self {
        let backing = Backing::simulated(bytes, Frames::Contiguous).unwrap();
        Self::build(Gpa::new(0), backing, Config::default(), Arc::new(RecordedStage2::new()))
    }

    fn make(gpa: Gpa, backing: Arc<Backing>, config: Config, stage2: Arc<dyn Stage2>) -> Self {
        let iommu = iommu::Config { table_bytes: 64 * MIB, ..config.iommu };
        Self::build(gpa, backing, Config { iommu, ..config }, stage2)
    }

    fn build(gpa: Gpa, backing: Arc<Backing>, config: Config, stage2: Arc<dyn Stage2>) -> Self {
        let dma = GuestDma::new(&Config { asid: ASID, ..config }, Arc::clone(&stage2)).unwrap();
        dma.add_memory(gpa, backing.len_bytes(), &backing, 0).unwrap();
        let run = Trust::Trusted { asid: ASID, vmpl: secure::Vmpl::V0, tdisp: Tdisp::Run, sdte_valid: true, vtom: None };
        let trusted = dma.add_device("trusted", run).unwrap();
        let untrusted = dma.add_device("untrusted", Trust::Untrusted).unwrap();
        Self { dma, backing, trusted, untrusted, stage2 }
    }

    pub fn convert(&self, start: u64, len: u64, to: Owner) -> u64 {
        self.dma.convert(&[change(start, len, to)]).unwrap().pages
    }

    /// The guest accepts or gives up pages, 4 KiB at a time.
    pub fn pvalidate(&self, start: u64, len: u64, validate: bool) {
        for page in span(start, len).blocks(PAGE_LG2) {
            self.dma.space().pvalidate(page.start(), secure::RmpSize::K4, validate).unwrap();
        }
    }

    pub fn clean(&self) {
        let report = self.dma.audit();
        assert!(
            report.is_clean(),
            "{} differences:\n{}",
            report.count,
            report.differences.iter().map(|d| format!("{d}\n")).collect::<String>()
        );
        assert!(report.pages > 0 && report.entries > 0);
    }

    pub fn context(&self, device: &Arc<Device>) -> Dma {
        Dma::new(device).unwrap()
    }

    /// Raw tables, RMP, page states, counters and allocator balance, as text.
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for domain in self.dma.ioas().domains() {
            let (root, level) = domain.table().root();
            writeln!(out, "domain {} root {root} level {level}", domain.id()).unwrap();
            let tree = convert::read_tree(domain.format(), &|at| domain.table().arena().peek(at), root, level + 1, Span::whole());
            writeln!(out, "{} tables, {:?}", tree.tables, tree.oddities).unwrap();
            for leaf in tree.leaves {
                writeln!(out, "{leaf:?}").unwrap();
            }
        }
        writeln!(out, "tables in use {}", self.dma.iommu().arena().tables_in_use()).unwrap();
        writeln!(out, "areas {:?}", self.dma.ioas().areas().iter().map(|area| area.span()).collect::<Vec<_>>()).unwrap();
        for page in self.backing.pages().unindex::<addr::Page>(0).blocks(0) {
            let raw = self.dma.rmp().raw(self.backing.oa(page.start()));
            if raw != [0, 0] {
                writeln!(out, "rmp {page:?} {raw:x?}").unwrap();
            }
        }
        for (run, state) in self.backing.states(self.backing.pages()) {
            writeln!(out, "{run:?} {state:?}").unwrap();
        }
        for (gpa, _, _) in self.dma.space().slots() {
            writeln!(out, "slot {gpa:?} {:?}", self.dma.space().stage2().runs(gpa)).unwrap();
            writeln!(out, "validated {:?}", self.dma.space().validated_runs(gpa)).unwrap();
        }
        writeln!(
            out,
            "segments {:?}, {} assigned, leaked {:?}",
            self.dma.rmp().segments(),
            self.dma.rmp().assigned_pages(),
            self.dma.rmp().leaked()
        )
        .unwrap();
        let counters = convert::Counters { failed: 0, ..self.dma.counters() };
        writeln!(out, "{counters:?}").unwrap();
        out
    }
}

pub fn span(start: u64, len: u64) -> Span<Gpa> {
    Span::from_len(Gpa::new(start), len).unwrap()
}

pub fn change(start: u64, len: u64, to: Owner) -> Change {
    Change { span: span(start, len), to }
}

pub fn iova(at: u64) -> Iova {
    Iova::new(at)
}
