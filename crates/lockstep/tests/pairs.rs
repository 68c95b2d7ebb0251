//! Memory of two files, one for shared pages and one for private ones that no host program maps: a conversion changes which of the two is behind a
//! page, in all three tables, and gives the memory of the other back.

mod common;

use addr::{Gpa, Page, Span};
use backing::{Backing, CopyFault, Frames, HostAddr, Owner as Bytes, PageName, PageState, PinError};
use common::{ASID, Guest, MIB, change, iova, span};
use convert::{Auditor, Stage2Error, Step};
use iommu::{FaultKind, RefusedBy};
use lockstep_iommu::{ConvertError, Owner, Policy, RecordedStage2, Stage2};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use secure::RmpSize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const BYTES: u64 = 16 * MIB;

fn file() -> OwnedFd {
    let file = memfd_create("side", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, BYTES).unwrap();
    file
}

/// Stands for the vCPU that copies: it alone touches the private file.
#[derive(Debug)]
struct Copier(OwnedFd);

impl Bytes for Copier {
    fn pin(&self, _: Span<Page>, _: bool) -> Result<(), PinError> {
        unreachable!("a copier is not asked for pins")
    }
    fn unpin(&self, _: Span<Page>) {
        unreachable!("a copier is not asked for pins")
    }
    fn host(&self, _: u64, _: u64) -> Option<HostAddr> {
        None
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        rustix::io::pread(&self.0, into, offset).map(drop).map_err(|_| CopyFault { done: 0 })
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        rustix::io::pwrite(&self.0, from, offset).map(drop).map_err(|_| CopyFault { done: 0 })
    }
    fn name(&self, page: Page) -> PageName {
        PageName::Memory { space: 0, page: page.get() }
    }
}

fn guest(frames: Frames, policy: Policy) -> Guest {
    let (shared, private) = (file(), file());
    let copier = Arc::new(Copier(private.try_clone().unwrap()));
    let backing = Backing::pair(shared, private, BYTES, Some(copier), frames).unwrap();
    Guest::of(Gpa::new(0), backing, policy)
}

fn has_data(file: BorrowedFd<'_>, at: u64) -> bool {
    seek(file, SeekFrom::Data(at)).is_ok_and(|found| found < at + 0x1000)
}

/// Bytes of a file, past every check.
fn peek(file: BorrowedFd<'_>, at: u64) -> [u8; 7] {
    let mut bytes = [0; 7];
    rustix::io::pread(file, &mut bytes, at).unwrap();
    bytes
}

#[test]
fn a_page_changes_sides() {
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 3 }] {
        let guest = guest(frames, Policy::Mirror);
        let (shared, private) = (guest.backing.file().unwrap(), guest.backing.private_file().unwrap());
        let (mut trusted, mut untrusted) = (guest.context(&guest.trusted), guest.context(&guest.untrusted));
        guest.clean();
        untrusted.write(iova(0x5000), b"shared!").unwrap();
        untrusted.write(iova(0x6000), b"neighb.").unwrap();
        assert_eq!((peek(shared, 0x5000), has_data(private, 0x5000)), (*b"shared!", false));

        assert_eq!(guest.convert(0x5000, 0x1000, Owner::Private), 1);
        guest.clean();
        assert!(!has_data(shared, 0x5000) && has_data(shared, 0x6000), "the page that it left is given back, and no other");
        let fault = untrusted.write(iova(0x5000), b"x").unwrap_err();
        assert_eq!((fault.table, fault.reason), (RefusedBy::SecureWorld, FaultKind::Secure));
        assert!(trusted.write(iova(0x5000), b"x").is_err(), "the guest has not validated it");
        guest.pvalidate(0x5000, 0x1000, true);
        trusted.write(iova(0x5000), b"private").unwrap();
        let mut bytes = [0; 7];
        trusted.read(iova(0x5000), &mut bytes).unwrap();
        assert_eq!((bytes, peek(private, 0x5000), has_data(shared, 0x5000)), (*b"private", *b"private", false));
        // Across the border of the two files, and from one to the other.
        trusted.write(iova(0x4ffe), &[7; 0x1004]).unwrap();
        assert_eq!((peek(shared, 0x6000), peek(private, 0x5ff9)), (*b"\x07\x07ighb.", [7; 7]));
        trusted.copy(iova(0x6000), iova(0x5000), 7).unwrap();
        assert_eq!(peek(private, 0x5000), *b"\x07\x07ighb.");
        assert!(guest.dma.read(Gpa::new(0x5000), &mut bytes).is_err(), "no program of the host reads private memory");

        guest.pvalidate(0x5000, 0x1000, false);
        assert_eq!(guest.convert(0x5000, 0x1000, Owner::Shared), 1);
        guest.clean();
        assert!(!has_data(private, 0x5000), "private bytes are gone");
        untrusted.read(iova(0x5000), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 7]);
        untrusted.write(iova(0x5000), b"again..").unwrap();
        assert_eq!(peek(shared, 0x5000), *b"again..");
    }
}

#[test]
fn large_private_pages_lie_in_a_row_of_their_own() {
    let guest = guest(Frames::Contiguous, Policy::Mirror);
    let mut trusted = guest.context(&guest.trusted);
    assert_eq!(guest.convert(4 * MIB, 4 * MIB, Owner::Private), 1024);
    guest.clean();
    let page = Page::new((4 * MIB) >> 12);
    let oa = guest.backing.oa(page);
    assert_eq!(guest.dma.rmp().size_at(oa), RmpSize::M2);
    assert_ne!(oa, guest.backing.oa_as(page, PageState::Shared));
    assert_eq!(guest.backing.page_of(oa), Some(page));
    guest.dma.space().pvalidate(Gpa::new(4 * MIB), RmpSize::M2, true).unwrap();
    trusted.write(iova(4 * MIB + 5), b"through a 2 MiB leaf").unwrap();
    assert_eq!(guest.convert(4 * MIB + 0x7000, 0x1000, Owner::Shared), 1);
    guest.clean();
    trusted.write(iova(4 * MIB + 5), b"still valid").unwrap();
    guest.convert(0, BYTES, Owner::Private);
    guest.clean();
    guest.convert(0, BYTES, Owner::Shared);
    guest.dma.merge(Gpa::new(0), u64::MAX);
    guest.clean();
    let mut leaves = 0;
    guest.dma.ioas().domains()[0].table().leaves(Span::whole(), |_| leaves += 1);
    assert_eq!(leaves, 1, "16 MiB of one file are one leaf again");
}

/// What is true of a page after a step, in every table and in both files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    step: Step,
    leaf: Option<PageState>,
    assigned: bool,
    told: bool,
    shared_bytes: bool,
    private_bytes: bool,
}

fn steps_of(to: Owner) -> (Vec<Seen>, u64) {
    let guest = guest(Frames::Contiguous, Policy::Mirror);
    let (gpa, page) = (Gpa::new(0x9000), Page::new(9));
    guest.dma.write(gpa, b"shared").unwrap();
    if to == Owner::Shared {
        guest.convert(0x9000, 0x1000, Owner::Private);
        guest.pvalidate(0x9000, 0x1000, true);
        guest.context(&guest.trusted).write(iova(0x9000), b"private").unwrap();
        guest.pvalidate(0x9000, 0x1000, false);
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (space, log) = (Arc::downgrade(guest.dma.space()), Arc::clone(&seen));
    let (domain, backing, differences) = (guest.dma.ioas().domains().remove(0), Arc::clone(&guest.backing), Arc::new(Mutex::new(0)));
    let count = Arc::clone(&differences);
    guest.dma.space().on_transition(move |transition| {
        if !(transition.is_detached() || transition.is_done()) || transition.step() == Step::Settle {
            return;
        }
        let space = space.upgrade().unwrap();
        *count.lock().unwrap() += Auditor::new(&space).check_transition(transition).count;
        let sides = [PageState::Shared, PageState::Private];
        let leaf = domain.table().walk(iova(0x9000));
        let leaf = leaf.map(|leaf| sides.into_iter().find(|side| backing.oa_as(page, *side) == leaf.oa_of(iova(0x9000))).unwrap());
        log.lock().unwrap().push(Seen {
            step: transition.step(),
            leaf,
            assigned: space.rmp().entry(backing.oa_as(page, PageState::Private)).assigned(),
            told: space.stage2().is_private(gpa),
            shared_bytes: has_data(backing.file().unwrap(), 0x9000),
            private_bytes: has_data(backing.private_file().unwrap(), 0x9000),
        });
    });
    guest.convert(0x9000, 0x1000, to);
    guest.clean();
    let seen = seen.lock().unwrap().clone();
    let differences = *differences.lock().unwrap();
    (seen, differences)
}

/// Removed, completion seen, owner changed, stage 2 told, memory given back, added: in this order and no other.
fn right(to: Owner) -> Vec<Seen> {
    let private = to == Owner::Private;
    let start = Seen { step: Step::Detach, leaf: None, assigned: !private, told: !private, shared_bytes: private, private_bytes: !private };
    let switched = Seen { step: Step::Switch, assigned: private, ..start };
    let told = Seen { step: Step::Commit, told: private, ..switched };
    let discarded = Seen { step: Step::Discard, shared_bytes: false, private_bytes: false, ..told };
    let attached = Seen { step: Step::Attach, leaf: Some(to.into()), ..discarded };
    vec![start, switched, told, discarded, attached]
}

#[test]
fn the_order_of_a_change_of_sides() {
    for to in [Owner::Private, Owner::Shared] {
        assert_eq!(steps_of(to), (right(to), 0), "{to:?}");
    }
}

/// The stage 2 of a guest without KVM: its processors are threads of this process, which look up where a page is and wait while it is frozen.
#[derive(Default)]
struct ThreadStage2 {
    told: RecordedStage2,
    frozen: Mutex<Vec<Span<Gpa>>>,
    thawed: Condvar,
}

impl Stage2 for ThreadStage2 {
    fn freeze(&self, spans: &[Span<Gpa>]) {
        // Whoever is in the middle of an access has the lock.
        self.frozen.lock().unwrap().extend(spans);
    }
    fn commit(&self, span: Span<Gpa>, private: bool) -> Result<(), Stage2Error> {
        self.told.commit(span, private)
    }
    fn thaw(&self, spans: &[Span<Gpa>]) {
        self.frozen.lock().unwrap().retain(|frozen| !spans.contains(frozen));
        self.thawed.notify_all();
    }
    fn is_private(&self, gpa: Gpa) -> bool {
        self.told.is_private(gpa)
    }
    fn runs(&self, span: Span<Gpa>) -> Vec<(Span<Gpa>, bool)> {
        self.told.runs(span)
    }
}

impl ThreadStage2 {
    /// One instruction of the guest: adds one to the word at `gpa`, wherever that is now. Answers what it was.
    fn increment(&self, files: [BorrowedFd<'_>; 2], gpa: u64) -> u64 {
        let frozen = self.frozen.lock().unwrap();
        let inside = |frozen: &mut Vec<Span<Gpa>>| frozen.iter().any(|span| span.contains(Gpa::new(gpa)));
        let _held = self.thawed.wait_while(frozen, inside).unwrap();
        let file = files[usize::from(self.told.is_private(Gpa::new(gpa)))];
        let mut word = [0; 8];
        rustix::io::pread(file, &mut word, gpa).unwrap();
        let value = u64::from_le_bytes(word);
        rustix::io::pwrite(file, &(value + 1).to_le_bytes(), gpa).unwrap();
        value
    }
}

/// A guest without KVM that increments words while its pages change sides: a word counts on, or begins again at zero where its page has changed
/// sides, and never goes back to what it was on the other side.
#[test]
fn a_guest_of_threads_under_conversions() {
    const COUNT: u64 = 16;
    let (shared, private) = (file(), file());
    let copier = Arc::new(Copier(private.try_clone().unwrap()));
    let backing = Backing::pair(shared, private, BYTES, Some(copier), Frames::Contiguous).unwrap();
    let stage2 = Arc::new(ThreadStage2::default());
    let guest = Guest::with(Gpa::new(0), backing, Policy::Mirror, Arc::clone(&stage2) as Arc<dyn Stage2>);
    let files = [guest.backing.file().unwrap(), guest.backing.private_file().unwrap()];
    let (stop, started_anew) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut changes = 0;
    std::thread::scope(|scope| {
        let (stage2, stop, started_anew, guest) = (&stage2, &stop, &started_anew, &guest);
        scope.spawn(move || {
            let mut last = [0; COUNT as usize];
            while !stop.load(Ordering::SeqCst) {
                for page in 0..COUNT {
                    let value = stage2.increment(files, page * 0x1000);
                    assert!(value == last[page as usize] || value == 0, "page {page} has {value} after {}", last[page as usize]);
                    started_anew.fetch_add(u64::from(value < last[page as usize]), Ordering::Relaxed);
                    last[page as usize] = value + 1;
                }
            }
        });
        scope.spawn(move || {
            let mut dma = guest.context(&guest.untrusted);
            while !stop.load(Ordering::SeqCst) {
                // Beside the words, where the pages are shared.
                let _refused_where_private = dma.write(iova(8), &[7; 0x1000 - 8]);
            }
        });
        let mut random = fastrand::Rng::with_seed(11);
        let until = Instant::now() + Duration::from_millis(700);
        while Instant::now() < until {
            let first = random.u64(..COUNT);
            let to = if random.bool() { Owner::Private } else { Owner::Shared };
            changes += guest.convert(first * 0x1000, random.u64(1..=COUNT - first) * 0x1000, to);
        }
        stop.store(true, Ordering::SeqCst);
    });
    guest.clean();
    println!("{changes} pages changed sides, {} words began anew", started_anew.load(Ordering::Relaxed));
    assert!(changes > 100 && started_anew.load(Ordering::Relaxed) > 10);
}

#[test]
fn punched_and_populated_on_the_shared_side() {
    let guest = guest(Frames::Contiguous, Policy::Mirror);
    guest.dma.write(Gpa::new(0x8000), b"shared!").unwrap();
    guest.convert(0xa000, 0x1000, Owner::Private);
    assert!(guest.dma.punch(span(0x8000, 0x3000)).is_err(), "the guest gives private pages up first");
    guest.dma.punch(span(0x8000, 0x2000)).unwrap();
    guest.clean();
    assert!(!has_data(guest.backing.file().unwrap(), 0x8000));
    assert!(guest.context(&guest.untrusted).write(iova(0x8000), b"x").is_err());
    guest.dma.populate(span(0x8000, 0x3000)).unwrap();
    guest.clean();
    guest.context(&guest.untrusted).write(iova(0x8000), b"x").unwrap();
}

/// Every step of a change of sides, failed once.
#[test]
fn a_step_that_fails() {
    let mut fired = Vec::new();
    for nth in 1.. {
        let guest = guest(Frames::Contiguous, Policy::Mirror);
        guest.dma.write(Gpa::new(0x3000), b"before!").unwrap();
        let shared = guest.backing.file().unwrap();
        let before = guest.dump();
        let plan = sync::fail::nth(nth);
        let result = guest.dma.convert(&[change(0x3000, 0x1000, Owner::Private)]);
        let Some(step) = plan.fired() else {
            result.unwrap();
            break;
        };
        drop(plan);
        match result.map_err(|error| (error.step(), error)) {
            // Stage 2 has been told already, or the instruction was tried again.
            Ok(_) => {}
            // The owner has changed and nothing is rolled back; what was left behind goes when it is asked for again.
            Err((Step::Discard, error)) => {
                assert!(matches!(error, ConvertError::NotDiscarded { .. }) && step == "backing.punch", "{error}");
                guest.clean();
                assert_eq!((guest.backing.state(Page::new(3)), peek(shared, 0x3000)), (PageState::Private, *b"before!"));
                guest.dma.space().restore(span(0x3000, 0x1000)).unwrap();
            }
            // A vCPU may still reach the old side, so it stays until stage 2 knows.
            Err((Step::Commit, _)) => {
                assert!(has_data(shared, 0x3000));
                guest.convert(0x3000, 0x1000, Owner::Private);
            }
            // A refusal after the leaves were cut leaves smaller ones that say the same.
            Err((at, error)) => {
                assert!(matches!(at, Step::Settle | Step::Switch) || guest.dump() == before, "step {nth}, {step}: {error}");
                guest.clean();
                assert_eq!((guest.backing.state(Page::new(3)), peek(shared, 0x3000)), (PageState::Shared, *b"before!"));
                guest.convert(0x3000, 0x1000, Owner::Private);
            }
        }
        guest.clean();
        assert!(!has_data(shared, 0x3000), "step {nth}, {step}");
        fired.push(step);
    }
    println!("failed {fired:?}");
    assert!(fired.contains(&"backing.punch") && fired.contains(&"secure.rmpupdate"), "{fired:?}");
}

#[test]
fn without_a_copier_private_bytes_are_out_of_reach() {
    let backing = Backing::pair(file(), file(), BYTES, None, Frames::Contiguous).unwrap();
    let guest = Guest::of(Gpa::new(0), backing, Policy::Mirror);
    guest.convert(0, 0x1000, Owner::Private);
    guest.pvalidate(0, 0x1000, true);
    let fault = guest.context(&guest.trusted).write(iova(0), b"x").unwrap_err();
    assert_eq!((fault.table, fault.reason), (RefusedBy::Backing, FaultKind::NoHostMemory));
    assert_eq!(guest.dma.rmp().entry(guest.backing.oa(Page::new(0))).asid(), ASID);
}

#[test]
fn sides_of_the_wrong_kind_or_length_are_refused() {
    let short = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
    assert!(Backing::pair(file(), short, BYTES, None, Frames::Contiguous).is_err());
    let disk = OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap());
    assert!(Backing::pair(disk, file(), BYTES, None, Frames::Contiguous).is_err());
    assert!(Backing::pair(file(), file(), 0x800, None, Frames::Contiguous).is_err());
}

/// A hole that somebody else made in the file of shared pages is found, and the device has lost the page; a page that has only just changed sides
/// is a hole and none of anybody's making.
#[test]
fn a_punch_behind_our_back_is_found() {
    use rustix::fs::{FallocateFlags, fallocate};
    let guest = guest(Frames::Contiguous, Policy::Mirror);
    let (shared, all) = (guest.backing.file().unwrap().try_clone_to_owned().unwrap(), guest.backing.pages());
    let mut untrusted = guest.context(&guest.untrusted);
    let lost = || guest.backing.recheck(all).unwrap().lost;
    let punch = |page: u64| {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&shared, how, page << 12, 0x1000).unwrap();
    };
    let pages = |first, last| Span::of(Page::new(first), Page::new(last));
    for page in [3u64, 4, 5] {
        untrusted.write(iova(page << 12), b"shared!").unwrap();
    }
    assert_eq!(lost(), [], "never touched is not lost");
    // Page 3 leaves, and comes back with no memory; page 4 is taken by somebody; page 5 stays.
    guest.convert(0x3000, 0x1000, Owner::Private);
    assert_eq!(lost(), []);
    guest.convert(0x3000, 0x1000, Owner::Shared);
    punch(4);
    assert_eq!(lost(), [pages(4, 4)]);
    assert_eq!(untrusted.read(iova(0x4000), &mut [0]).unwrap_err().reason, FaultKind::NotMapped);
    assert!(!has_data(shared.as_fd(), 0x4000), "DMA to a hole does not bring the page back");
    untrusted.read(iova(0x5000), &mut [0]).unwrap();
    // What came back is known once it has memory.
    untrusted.write(iova(0x3000), b"again!!").unwrap();
    assert_eq!(lost(), []);
    punch(3);
    assert_eq!(lost(), [pages(3, 3)]);
    guest.clean();
}

#[test]
fn a_side_that_became_shorter_is_found() {
    let (shared, private) = (file(), file());
    let files = [shared.try_clone().unwrap(), private.try_clone().unwrap()];
    let guest = Guest::of(Gpa::new(0), Backing::pair(shared, private, BYTES, None, Frames::Contiguous).unwrap(), Policy::Mirror);
    let all = guest.backing.pages();
    guest.convert(BYTES - 0x2000, 0x1000, Owner::Private);
    let last = all.last().get();
    let pages = |first, last| Span::of(Page::new(first), Page::new(last));
    // The shared file has lost two pages' room, of which one lies in the other file.
    ftruncate(&files[0], BYTES - 0x2000).unwrap();
    let found = guest.backing.recheck(all).unwrap();
    assert_eq!((found.lost, found.truncated_to), (vec![pages(last, last)], Some(BYTES - 0x2000)));
    ftruncate(&files[1], BYTES - 0x2000).unwrap();
    assert_eq!(guest.backing.recheck(all).unwrap().lost, [pages(last - 1, last - 1)]);
    assert_eq!(guest.backing.state(Page::new(last - 1)), PageState::Absent);
    assert!(guest.context(&guest.trusted).read(iova(BYTES - 0x2000), &mut [0]).is_err());
    // Only the guest can give the page up to the secure world, so that is what an audit still sees.
    let report = guest.dma.audit();
    assert!(matches!(&report.differences[..], [one] if one.to_string().starts_with("I-6")), "{report:?}");
}
