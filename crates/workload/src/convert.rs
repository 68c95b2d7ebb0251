//! Page state changes: one page out of a 1 GiB leaf, and batches as large as a guest can ask for. The link keeps the attributes itself
//! ([`RecordedStage2`]) and nothing audits, so this is the cost of the transaction without KVM.

mod steps;
mod today;

use crate::{Error, Row, Unit, Work, batches, choices, in_format};
use addr::{Gpa, Iova, Span};
use backing::{Backing, Frames};
use iommu::Access;
use lockstep::{Change, Config, Device, Dma, GuestDma, Owner, RecordedStage2, Step, Trust};
use pt::FormatKind;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const K4: u64 = 4 << 10;
const G1: u64 = 1 << 30;
const G64: u64 = 64 << 30;
const T1: u64 = 1 << 40;
/// Entries of one page state change request (GHCB).
const BATCH: u64 = 253;

macro_rules! row {
    ($name:literal, $unit:expr, $make:expr) => {
        Row { name: $name, format: "amdv1", unit: $unit, kind: FormatKind::AmdV1, make: $make }
    };
}

/// Its rows.
pub fn rows() -> Vec<Row> {
    let pages = Unit::Page(BATCH);
    vec![
        row!("convert_1_in_1g_shared_leaf", Unit::Call, |format| one_page(format, false)),
        row!("convert_1_in_1g_shared_leaf_busy_reader", Unit::Call, |format| one_page(format, true)),
        row!("convert_4k_batch253_to_private", pages, |format| batch(format, in_a_row(), Owner::Private)),
        row!("convert_4k_batch253_to_shared", pages, |format| batch(format, in_a_row(), Owner::Shared)),
        row!("convert_4k_spread253_to_private", pages, |format| batch(format, spread(), Owner::Private)),
        row!("convert_4k_spread253_to_shared", pages, |format| batch(format, spread(), Owner::Shared)),
        row!("today_4k_batch253_to_private", pages, |format| today::batch(format, true)),
        row!("today_4k_batch253_to_shared", pages, |format| today::batch(format, false)),
        row!("step_reserve", Unit::Call, |format| steps::step(format, Step::Reserve, in_a_row())),
        row!("step_freeze", Unit::Call, |format| steps::step(format, Step::Freeze, in_a_row())),
        row!("step_detach", Unit::Call, |format| steps::step(format, Step::Detach, in_a_row())),
        row!("step_settle", Unit::Call, |format| steps::step(format, Step::Settle, in_a_row())),
        row!("step_switch", Unit::Call, |format| steps::step(format, Step::Switch, in_a_row())),
        row!("step_commit", Unit::Call, |format| steps::step(format, Step::Commit, in_a_row())),
        row!("step_discard", Unit::Call, |format| steps::step(format, Step::Discard, in_a_row())),
        row!("step_attach", Unit::Call, |format| steps::step(format, Step::Attach, in_a_row())),
        row!("step_thaw", Unit::Call, |format| steps::step(format, Step::Thaw, in_a_row())),
        row!("step_reserve_spread", Unit::Call, |format| steps::step(format, Step::Reserve, spread())),
        row!("step_freeze_spread", Unit::Call, |format| steps::step(format, Step::Freeze, spread())),
        row!("step_detach_spread", Unit::Call, |format| steps::step(format, Step::Detach, spread())),
        row!("step_settle_spread", Unit::Call, |format| steps::step(format, Step::Settle, spread())),
        row!("step_switch_spread", Unit::Call, |format| steps::step(format, Step::Switch, spread())),
        row!("step_commit_spread", Unit::Call, |format| steps::step(format, Step::Commit, spread())),
        row!("step_discard_spread", Unit::Call, |format| steps::step(format, Step::Discard, spread())),
        row!("step_attach_spread", Unit::Call, |format| steps::step(format, Step::Attach, spread())),
        row!("step_thaw_spread", Unit::Call, |format| steps::step(format, Step::Thaw, spread())),
        row!("convert_64g_of_1g_leaves_to_private", Unit::Page(G64 / K4), |format| all_of_it(format, G64, Owner::Private)),
        row!("convert_64g_of_1g_leaves_to_shared", Unit::Page(G64 / K4), |format| all_of_it(format, G64, Owner::Shared)),
        row!("convert_1t_of_1g_leaves_to_private", Unit::Page(T1 / K4), |format| all_of_it(format, T1, Owner::Private)),
        row!("convert_1t_of_1g_leaves_to_shared", Unit::Page(T1 / K4), |format| all_of_it(format, T1, Owner::Shared)),
    ]
}

/// A guest all of whose memory is shared, in leaves of 1 GiB of the IO page table of one device.
struct Machine {
    guest: GuestDma,
    device: Arc<Device>,
}

impl Machine {
    /// With 1 GiB.
    fn new(format: FormatKind) -> Result<Self, Error> {
        Self::of(format, &Backing::memfd(G1, Frames::Contiguous)?)
    }

    fn of(format: FormatKind, memory: &Arc<Backing>) -> Result<Self, Error> {
        // Addresses only: a request takes in stock what tables it could need, and uses few.
        let iommu = iommu::Config { table_bytes: 8 << 30, domain: in_format(format), ..iommu::Config::default() };
        let guest = GuestDma::new(&Config { iommu, ..Config::default() }, Arc::new(RecordedStage2::new()))?;
        guest.add_memory(Gpa::new(0), memory.len_bytes(), memory, 0)?;
        let device = guest.add_device("bench", Trust::Untrusted)?;
        Ok(Self { guest, device })
    }

    fn convert(&self, changes: &[Change]) {
        let done = self.guest.convert(black_box(changes)).expect("nothing refuses these pages");
        assert_eq!(done.pages, changes.len() as u64);
    }
}

fn changes(pages: &[u64], to: Owner) -> Vec<Change> {
    let page = |page: &u64| Span::of(Gpa::new(page * K4), Gpa::new(page * K4 + (K4 - 1)));
    pages.iter().map(|at| Change { span: page(at), to }).collect()
}

/// What a guest asks for that gives away about a megabyte, page by page.
fn in_a_row() -> Vec<u64> {
    (0x1_2345..0x1_2345 + BATCH).collect()
}

/// All over the guest.
fn spread() -> Vec<u64> {
    let mut pages = choices(2 * BATCH as usize, G1 / K4);
    pages.sort_unstable();
    pages.dedup();
    pages.truncate(BATCH as usize);
    pages
}

/// Batches to one owner; the way back is off the clock.
fn batch(format: FormatKind, pages: Vec<u64>, to: Owner) -> Result<Box<dyn Work>, Error> {
    let mut machine = Machine::new(format)?;
    let back = if to == Owner::Private { Owner::Shared } else { Owner::Private };
    let (there, back) = (changes(&pages, to), changes(&pages, back));
    if to == Owner::Shared {
        machine.convert(&back);
    }
    Ok(Box::new(move |times| {
        batches(&mut machine, times, 1, |_, _| {}, |machine, _| machine.convert(&there), |machine, _| machine.convert(&back))
    }))
}

/// So many bytes in one request, from shared leaves of 1 GiB to private ones of 2 MiB or none, or back. The memory is not touched, but its RMP takes a 256th
/// of it.
fn all_of_it(format: FormatKind, bytes: u64, to: Owner) -> Result<Box<dyn Work>, Error> {
    let (needs, there) = (bytes / 256 + bytes / 1024, crate::scale::available_bytes());
    if there.is_some_and(|there| there < needs) {
        return Err(format!("it needs {} MiB of memory, and fewer are available", needs >> 20).into());
    }
    let mut machine = Machine::of(format, &Backing::simulated(bytes, Frames::Contiguous)?)?;
    let change = move |to| [Change { span: Span::of(Gpa::new(0), Gpa::new(bytes - 1)), to }];
    let back = if to == Owner::Private { Owner::Shared } else { Owner::Private };
    let convert = move |machine: &mut Machine, to| {
        let done = machine.guest.convert(&change(to)).expect("nothing refuses these pages");
        assert_eq!(done.pages, bytes / K4);
    };
    if to == Owner::Shared {
        convert(&mut machine, Owner::Private);
    }
    Ok(Box::new(move |times| {
        batches(&mut machine, times, 1, |_, _| {}, |machine, _| convert(machine, to), |machine, _| convert(machine, back))
    }))
}

/// One page becomes private, and with it a leaf of 1 GiB many small ones; shared again, they are merged off the clock.
struct OnePage {
    machine: Machine,
    there: Vec<Change>,
    back: Vec<Change>,
    reader: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

fn one_page(format: FormatKind, busy: bool) -> Result<Box<dyn Work>, Error> {
    let machine = Machine::new(format)?;
    let page = [0x1_2345];
    let mut work = OnePage { there: changes(&page, Owner::Private), back: changes(&page, Owner::Shared), machine, reader: None };
    if busy {
        let mut dma = Dma::new(&work.machine.device)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let read = move || {
            while !stopped.load(Ordering::Relaxed) {
                // A page whose translation changes its size with every conversion, and never goes: unless the format needs break-before-make.
                let translates = dma.translate(Iova::new(0x1_2346 * K4), Access::Read).is_ok();
                assert!(translates || !format.hitless().is_allowed(), "a neighbour lost its translation");
            }
        };
        work.reader = Some((stop, std::thread::Builder::new().name("reader".into()).spawn(read)?));
    }
    Ok(Box::new(work))
}

impl Work for OnePage {
    fn run(&mut self, times: u64) -> Duration {
        let undo = |work: &mut Self, _| {
            work.machine.convert(&work.back);
            work.machine.guest.merge(Gpa::new(0), G1 / K4);
        };
        batches(self, times, 1, |_, _| {}, |work, _| work.machine.convert(&work.there), undo)
    }

    fn note(&self) -> Option<String> {
        let (cuts, merges) = self.machine.guest.cuts_and_merges();
        Some(format!("{cuts} cuts, {merges} merges"))
    }
}

impl Drop for OnePage {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.reader.take() {
            stop.store(true, Ordering::Relaxed);
            // Its panic has been printed.
            let _ = thread.join();
        }
    }
}
