//! Foreign pages, and what kind of backing a file can be.

mod common;

use addr::{Address, Page, Span};
use common::*;
use lockstep_backing::{Backing, CopyFault, Error, Frames, HostAddr, Kind, Owner, PageName, PageState, PinError, Windows, file_kind};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

/// Keeps its bytes in a memfd of this process, so they can be seen, and a diary.
#[derive(Debug)]
struct Keeper {
    memory: Arc<Backing>,
    diary: Mutex<Vec<String>>,
}

impl Keeper {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self { memory: Backing::memfd(len, Frames::Contiguous).unwrap(), diary: Mutex::default() })
    }

    fn backing(self: &Arc<Self>, frames: Frames) -> Arc<Backing> {
        Backing::foreign(self.memory.len_bytes(), Arc::clone(self) as Arc<dyn Owner>, frames).unwrap()
    }
}

impl Owner for Keeper {
    fn pin(&self, pages: Span<Page>, write: bool) -> Result<(), PinError> {
        self.diary.lock().unwrap().push(format!("pin {pages} {write}"));
        Ok(())
    }

    fn unpin(&self, pages: Span<Page>) {
        self.diary.lock().unwrap().push(format!("unpin {pages}"));
    }

    fn host(&self, offset: u64, len: u64) -> Option<HostAddr> {
        self.memory.host(self.memory.window().start().plus(offset), len)
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), CopyFault> {
        Err(CopyFault { done: 0 })
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), CopyFault> {
        Err(CopyFault { done: 0 })
    }

    fn name(&self, page: Page) -> PageName {
        self.memory.page_name(page)
    }
}

#[test]
fn the_owner_is_asked() {
    let keeper = Keeper::new(M2);
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 9 }] {
        let backing = keeper.backing(frames);
        assert_eq!((backing.kind(), backing.state(page(3)), backing.linear_hva()), (Kind::Foreign, PageState::Shared, None));
        let oa = backing.oa(page(3));
        let found = Windows::find(oa).unwrap();
        assert!(Arc::ptr_eq(&found, &backing) && Windows::all().iter().any(|one| Arc::ptr_eq(one, &backing)));
        found.host(oa.plus(16), 100).unwrap().write(0, b"seen").unwrap();
        assert_eq!(byte(keeper.memory.host(keeper.memory.oa(page(3)), 4096).unwrap(), 16), b's');
        assert_eq!(
            (backing.offset_of(oa.plus(16), 100), backing.page_name(page(3))),
            (Some(3 * K4 + 16), keeper.memory.page_name(page(3)))
        );
        assert_eq!(backing.host(oa.plus(4000), 200).is_some(), frames == Frames::Contiguous, "what does not lie in a row has no address");
        assert_eq!(backing.offset_of(oa.plus(4000), 200).is_some(), frames == Frames::Contiguous);
    }
    let backing = keeper.backing(Frames::Contiguous);
    backing.pin(pages(1, 2), true).unwrap();
    backing.unpin(pages(1, 2));
    assert!(matches!(backing.pin(pages(1, 512), true), Err(PinError::Outside { .. })));
    assert_eq!(keeper.diary.lock().unwrap().len(), 2, "pages that the backing does not have are nobody's");
    assert!(matches!(backing.punch(pages(0, 0)), Err(Error::Unsupported { .. })), "it is not ours to give back");
    assert!(matches!(backing.populate(pages(0, 0), PageState::Shared), Err(Error::Unsupported { .. })));
    backing.close();
    assert_eq!(backing.state(page(0)), PageState::Absent);
    let oa = backing.window().start();
    drop(backing);
    assert!(Windows::find(oa).is_none());
    assert!(keeper.backing(Frames::Contiguous).window().start() != oa, "the latest window is not used again at once");
}

#[test]
fn addresses_never_run_out() {
    let keeper = Keeper::new(K4);
    let first = keeper.backing(Frames::Contiguous).window().start();
    let again = (0..1000).any(|_| keeper.backing(Frames::Contiguous).window().start() == first);
    assert!(again, "windows of foreign backings are used again");
}

#[test]
fn kinds_of_files() {
    let memory = Backing::memfd(M2, Frames::Contiguous).unwrap();
    assert_eq!(file_kind(memory.file().unwrap()), Some(Kind::Memfd));
    let other = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(file_kind(other.as_fd()), None);
    assert!(matches!(Backing::open(other.into(), 0, K4, Frames::Contiguous), Err(Error::NotMemory { .. })));
    let (read, _write) = std::io::pipe().unwrap();
    assert_eq!(file_kind(read.as_fd()), None);
}

#[test]
fn a_file_may_end_before_until_it_is_pinned() {
    let memory = Backing::memfd(4 * K4, Frames::Contiguous).unwrap();
    assert!(matches!(Backing::from_file(other_fd(&memory), K4, 4 * K4, Frames::Contiguous), Err(Error::Outside { .. })));
    let longer = Backing::open(other_fd(&memory), K4, 4 * K4, Frames::Contiguous).unwrap();
    longer.pin(pages(0, 2), true).unwrap();
    assert_eq!(longer.pin(pages(2, 3), true), Err(PinError::Outside { pages: pages(2, 3), size: 4 * K4 }));
    assert!(longer.host(longer.oa(page(3)), K4).unwrap().read(0, &mut [0]).is_err());
    std::fs::File::from(other_fd(&memory)).set_len(5 * K4).unwrap();
    longer.pin(pages(2, 3), true).unwrap();
    std::fs::File::from(other_fd(&memory)).set_len(5 * K4 - 1).unwrap();
    assert!(longer.pin(pages(3, 3), true).is_err(), "a page that the file has in part only");
    memory.pin(pages(0, 3), false).unwrap();
    let own = Backing::simulated(M2, Frames::Contiguous).unwrap();
    own.pin(own.pages(), true).unwrap();
    own.unpin(own.pages());
}
