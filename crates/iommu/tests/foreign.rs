//! DMA to memory that this process sees nowhere: its owner makes the copies.

mod common;

use addr::{Address, PAGE_BYTES, Page, SizeSet, Span};
use backing::{Backing, CopyFault, Frames, HostAddr, Owner, PageName, PinError};
use common::{BASE, Machine, map_in};
use lockstep_iommu_device::{Access, FaultKind};
use pt::Perm;
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;
/// Of the client's bytes, the first that cannot be touched any more.
const GONE: usize = 600 << 10;

/// Bytes that only this owner has.
#[derive(Debug)]
struct Client(Mutex<Vec<u8>>);

impl Owner for Client {
    fn pin(&self, _: Span<Page>, _: bool) -> Result<(), PinError> {
        Ok(())
    }

    fn unpin(&self, _: Span<Page>) {}

    fn host(&self, _: u64, _: u64) -> Option<HostAddr> {
        None
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyFault> {
        let done = into.len().min(GONE.saturating_sub(offset as usize));
        into[..done].copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..done]);
        if done == into.len() { Ok(()) } else { Err(CopyFault { done }) }
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyFault> {
        let done = from.len().min(GONE.saturating_sub(offset as usize));
        self.0.lock().unwrap()[offset as usize..][..done].copy_from_slice(&from[..done]);
        if done == from.len() { Ok(()) } else { Err(CopyFault { done }) }
    }

    fn name(&self, page: Page) -> PageName {
        PageName::Memory { space: 1, page: page.get() }
    }
}

/// A machine with 1 MiB of its own memory at `BASE` and 1 MiB of a client's behind it.
fn machine(frames: Frames) -> (Machine, Arc<Client>, Arc<Backing>) {
    let machine = Machine::new(MIB, Frames::Contiguous);
    machine.map(BASE, 0, MIB, Perm::RW, SizeSet::ALL);
    let client = Arc::new(Client(Mutex::new(vec![0; MIB as usize])));
    let backing = Backing::foreign(MIB, Arc::clone(&client) as Arc<dyn Owner>, frames).unwrap();
    for (pages, oa) in backing.extents(backing.pages()) {
        map_in(&machine.domain, BASE.plus(MIB + pages.start().bytes()), oa, pages.len() * PAGE_BYTES, Perm::RW, SizeSet::ALL);
    }
    (machine, client, backing)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 13 + at / 257) as u8).collect()
}

#[test]
fn bytes_arrive_on_both_sides_of_the_border() {
    for frames in [Frames::Contiguous, Frames::Scattered { seed: 4 }] {
        let (machine, client, _backing) = machine(frames);
        let mut dma = machine.dma();
        let bytes = pattern(300 << 10);
        let at = BASE.plus(MIB - (100 << 10) + 3);
        dma.write(at, &bytes).unwrap();
        let own = (100 << 10) - 3;
        assert_eq!(machine.peek(MIB - own as u64, own), bytes[..own]);
        assert_eq!(client.0.lock().unwrap()[..bytes.len() - own], bytes[own..]);
        let mut back = vec![0; bytes.len()];
        dma.read(at, &mut back).unwrap();
        assert!(back == bytes);
        // From ours to theirs, from theirs to theirs, and back.
        let there = BASE.plus(MIB + (300 << 10) + 77);
        dma.copy(at, there, 200 << 10).unwrap();
        assert_eq!(client.0.lock().unwrap()[(300 << 10) + 77..][..200 << 10], bytes[..200 << 10]);
        dma.copy(there, BASE, 200 << 10).unwrap();
        assert_eq!(machine.peek(0, 200 << 10), bytes[..200 << 10]);
    }
}

#[test]
fn what_the_owner_cannot_reach_is_a_fault_that_says_how_far_it_came() {
    let (machine, _client, backing) = machine(Frames::Contiguous);
    let mut dma = machine.dma();
    let (at, reach) = (BASE.plus(MIB + (500 << 10)), 100 << 10);
    let fault = dma.write(at, &pattern(200 << 10)).unwrap_err();
    assert_eq!((fault.reason, fault.access, fault.done, fault.iova), (FaultKind::HostMemoryGone, Access::Write, reach, at.plus(reach)));
    assert_eq!(fault.oa.and_then(|oa| backing.page_of(oa)), Some(Page::new(150)));
    let mut back = vec![0; 200 << 10];
    let fault = dma.read(at, &mut back).unwrap_err();
    assert_eq!((fault.reason, fault.done), (FaultKind::HostMemoryGone, reach));
    assert_eq!(back[..reach as usize], pattern(200 << 10)[..reach as usize]);
    let fault = dma.copy(at, BASE, 200 << 10).unwrap_err();
    assert_eq!((fault.reason, fault.access, fault.done, fault.iova), (FaultKind::HostMemoryGone, Access::Read, reach, at.plus(reach)));
    assert_eq!(machine.peek(0, reach as usize), back[..reach as usize]);
    let fault = dma.copy(BASE, at, 200 << 10).unwrap_err();
    assert_eq!((fault.access, fault.done, fault.iova), (Access::Write, reach, at.plus(reach)));
    // In place it can be used by nobody here.
    assert_eq!(dma.slice(at, 16, Access::Read).unwrap_err().reason, FaultKind::NoHostMemory);
    drop(backing);
    assert_eq!(dma.read(at, &mut [0; 8]).unwrap_err().reason, FaultKind::NoHostMemory, "leaves do not keep an owner alive");
}
