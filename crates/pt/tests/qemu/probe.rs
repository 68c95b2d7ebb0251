//! Accesses of the device, held against what [`lockstep_pt::Table::walk`] says: a read brings the bytes of the output address, a write arrives
//! there, and what is refused moves nothing.
//!
//! Each word that is tested with holds its own address and a number, so that a wrong answer says where it is from.

use crate::device::{LEN, TOGETHER, is_nothing, said};
use crate::rig::Rig;
use crate::walker::{Fault, Walker};
use addr::{Address, Iova, Oa, Span};
use lockstep_pt::{Format, Leaf, Perm};
use std::collections::BTreeMap;

/// A place to be tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) iova: Iova,
    /// Where it led before, when that is known.
    pub(crate) was: Option<Oa>,
}

/// The part of an access that lies in one page.
struct Piece {
    span: Span<Iova>,
    leaf: Option<Leaf>,
    allowed: bool,
}

/// An access.
struct Access {
    place: Place,
    wanted: Perm,
    pieces: Vec<Piece>,
}

/// Bytes of memory that were written and are to be found again.
#[derive(Default)]
struct Memory(BTreeMap<u64, u8>);

impl<F: Format, W: Walker> Rig<F, W> {
    /// Reads at each place, then writes.
    pub(crate) fn probe(&mut self, places: &[Place]) {
        for places in places.chunks(TOGETHER) {
            for wanted in [Perm::READ, Perm::WRITE] {
                let accesses = places.iter().filter_map(|place| self.access(*place, wanted)).collect::<Vec<_>>();
                if accesses.is_empty() {
                    continue;
                }
                self.tally.count(accesses.iter().flat_map(|access| &access.pieces).map(|piece| piece.leaf.filter(|_| piece.allowed)));
                let number = (self.tally.allowed + self.tally.refused) << 48;
                let mut memory = Memory::default();
                for oa in accesses.iter().flat_map(|access| access.memory::<W>()) {
                    let bytes = own_bytes(oa.start().get(), oa.len(), number);
                    self.device.qtest.write(oa.start().get(), &bytes);
                    memory.put(oa, &bytes);
                }
                if wanted == Perm::READ { self.reads(&accesses, &memory) } else { self.writes(&accesses, memory, !number) }
            }
        }
    }

    fn reads(&mut self, accesses: &[Access], memory: &Memory) {
        let places = accesses.iter().map(|access| access.place.iova).collect::<Vec<_>>();
        for (access, (bytes, faults)) in accesses.iter().zip(self.device.read(&places)) {
            for piece in &access.pieces {
                let seen = &bytes[access.inside(piece)];
                let right = match piece.oa().filter(|_| piece.allowed) {
                    Some(oa) => seen == memory.get(oa),
                    None => is_nothing(seen),
                };
                if !right {
                    self.fail(access, piece, &format!("the device reads {}", said(seen)));
                }
            }
            self.check_faults(access, &faults);
        }
    }

    fn writes(&mut self, accesses: &[Access], mut memory: Memory, number: u64) {
        let own = |access: &Access| own_bytes(access.place.iova.get(), LEN as u64, number);
        let places = accesses.iter().map(|access| (access.place.iova, *own(access).first_chunk().unwrap())).collect::<Vec<_>>();
        let faults = self.device.write(&places);
        for access in accesses {
            for piece in access.pieces.iter().filter(|piece| piece.allowed) {
                memory.put(piece.oa().unwrap(), &own(access)[access.inside(piece)]);
            }
        }
        for (access, faults) in accesses.iter().zip(faults) {
            for oa in access.memory::<W>() {
                let seen = self.device.qtest.read(oa.start().get(), oa.len() as usize);
                if seen != memory.get(oa) {
                    let piece = access.pieces.iter().find(|piece| piece.oa() == Some(oa)).unwrap_or(&access.pieces[0]);
                    self.fail(
                        access,
                        piece,
                        &format!("memory at {oa} has then {}, and should have {}", said(&seen), said(&memory.get(oa))),
                    );
                }
            }
            self.check_faults(access, &faults);
        }
    }

    /// What should become of an access; `None` when it cannot be tried: where it ends outside the windows, or does not reach the walker.
    fn access(&self, place: Place, wanted: Perm) -> Option<Access> {
        let span = Span::of(place.iova, place.iova.checked_add(LEN as u64 - 1)?);
        let aside = W::ASIDE.is_some_and(|(start, last)| span.overlaps(Span::of(Iova::new(start), Iova::new(last))));
        if aside || (!W::REFUSES_ABOVE && span.last() > self.last()) {
            return None;
        }
        let pieces = span.blocks(12).map(|span| {
            let leaf = self.table.walk(span.start());
            let allowed = leaf.is_some_and(|leaf| self.device.walker.allows(&leaf).allows(wanted));
            Piece { span, leaf, allowed }
        });
        let pieces = pieces.collect::<Vec<_>>();
        pieces.iter().all(|piece| piece.oa().is_none_or(|oa| W::BOARD.has(oa))).then_some(Access { place, wanted, pieces })
    }

    /// What was refused, and nothing else, is on record.
    fn check_faults(&mut self, access: &Access, faults: &[Fault]) {
        let Access { wanted, pieces, .. } = access;
        self.tally.recorded += u64::from(!faults.is_empty());
        let named = |piece: &Piece, iova: Iova| !piece.allowed && piece.span.start().align_down(12) == iova.align_down(12);
        for fault in faults {
            if fault.write != (*wanted == Perm::WRITE) || !pieces.iter().any(|piece| named(piece, fault.iova)) {
                self.fail(access, &pieces[0], &format!("the model records {fault:x?}"));
            }
        }
        // A model with room for one record keeps the first. What is above its address bits some refuse before they walk.
        let must = |piece: &&Piece| W::RECORDS && piece.leaf.is_none() && piece.span.last() <= self.last();
        if let Some(piece) = pieces.iter().find(|piece| !piece.allowed).filter(must)
            && !faults.iter().any(|fault| named(piece, fault.iova))
        {
            self.fail(access, piece, &format!("the model has no record of the refusal, but {faults:x?}"));
        }
    }

    fn fail(&self, access: &Access, piece: &Piece, seen: &str) -> ! {
        let Piece { span, leaf, allowed } = piece;
        let verb = if access.wanted == Perm::READ { "read" } else { "write" };
        let right = match (leaf, piece.oa()) {
            (Some(leaf), Some(oa)) => format!("{} at {oa}, through {leaf:x?}", if *allowed { "allowed" } else { "refused" }),
            _ => "refused: nothing is mapped".to_owned(),
        };
        let was = access.place.was.map(|oa| format!(" (before, it led to {oa})")).unwrap_or_default();
        panic!("{}: {verb} of {span}{was}: our walk says {right}; {seen}", self.name);
    }
}

impl Piece {
    fn oa(&self) -> Option<Span<Oa>> {
        let leaf = self.leaf?;
        Some(Span::of(leaf.oa_of(self.span.start()), leaf.oa_of(self.span.last())))
    }
}

impl Access {
    fn inside(&self, piece: &Piece) -> std::ops::Range<usize> {
        let at = piece.span.start().offset_from(self.place.iova) as usize;
        at..at + piece.span.len() as usize
    }

    /// The memory that it reaches. Where nothing is mapped, what it must not reach: where it led before, and where it would without an IOMMU.
    fn memory<W: Walker>(&self) -> Vec<Span<Oa>> {
        let mut memory = self.pieces.iter().filter_map(Piece::oa).collect::<Vec<_>>();
        if memory.is_empty() {
            let places = [self.place.was, Some(Oa::new(self.place.iova.get()))].into_iter().flatten();
            memory.extend(places.filter_map(|oa| Span::from_len(oa, LEN as u64).ok()).filter(|oa| W::BOARD.has(*oa)));
        }
        memory
    }
}

impl Memory {
    fn put(&mut self, oa: Span<Oa>, bytes: &[u8]) {
        self.0.extend((oa.start().get()..).zip(bytes.iter().copied()));
    }

    fn get(&self, oa: Span<Oa>) -> Vec<u8> {
        self.0.range(oa.start().get()..=oa.last().get()).map(|(_, byte)| *byte).collect()
    }
}

/// The address of each word, and a number above it.
fn own_bytes(at: u64, len: u64, number: u64) -> Vec<u8> {
    let byte = |at: u64| ((at & !7) ^ number).to_le_bytes()[(at & 7) as usize];
    (at..=at + (len - 1)).map(byte).collect()
}
