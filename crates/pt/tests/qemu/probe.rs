//! One access of the device, held against what [`lockstep_pt::Table::walk`] says: a read brings the bytes of the output address, a write
//! arrives there, and what is refused moves nothing.
//!
//! Each word that is tested with holds its own output address and a number of the access, so that a wrong answer says where it is from.

use crate::device::is_nothing;
use crate::rig::Rig;
use crate::walker::Walker;
use addr::{Address, Iova, Oa, Span};
use lockstep_pt::{Format, Leaf, Perm};

/// Bytes of one access.
pub(crate) const LEN: u64 = 64;

/// The part of an access that lies in one page.
struct Piece {
    span: Span<Iova>,
    leaf: Option<Leaf>,
    allowed: bool,
}

impl Piece {
    fn oa(&self) -> Option<Span<Oa>> {
        let leaf = self.leaf?;
        Some(Span::of(leaf.oa_of(self.span.start()), leaf.oa_of(self.span.last())))
    }
}

impl<F: Format, W: Walker> Rig<F, W> {
    /// Reads and writes at `iova`.
    pub(crate) fn probe(&mut self, iova: Iova) {
        self.probe_after(iova, None);
    }

    /// The same; `was` is an output address that `iova` had before.
    pub(crate) fn probe_after(&mut self, iova: Iova, was: Option<Oa>) {
        for wanted in [Perm::READ, Perm::WRITE] {
            self.access(iova, wanted, was);
        }
    }

    fn access(&mut self, iova: Iova, wanted: Perm, was: Option<Oa>) {
        let Some(span) = iova.checked_add(LEN - 1).map(|last| Span::of(iova, last)) else { return };
        let Some(pieces) = self.pieces(span, wanted) else { return };
        self.tally.allowed += pieces.iter().filter(|piece| piece.allowed).count() as u64;
        self.tally.refused += pieces.iter().filter(|piece| !piece.allowed).count() as u64;
        self.tally.sizes.extend(pieces.iter().filter(|piece| piece.allowed).filter_map(|piece| Some(piece.leaf?.size.0)));
        let number = (self.tally.allowed + self.tally.refused) << 48;

        // Where the bytes must not come from or go to: where they once did, and where they would without an IOMMU.
        let watched = pieces.iter().all(|piece| piece.leaf.is_none()).then_some([was, Some(Oa::new(iova.get()))]);
        let watched = watched.iter().flatten().flatten().map(|oa| Span::from_len(*oa, LEN).unwrap()).filter(|oa| W::BOARD.has(*oa));
        let memory = pieces.iter().filter_map(Piece::oa).chain(watched).collect::<Vec<_>>();
        for oa in &memory {
            self.device.qtest.write(oa.start().get(), &own_bytes(*oa, number));
        }
        if wanted == Perm::READ {
            let bytes = self.device.read(iova, LEN as usize);
            for piece in &pieces {
                let at = piece.span.start().offset_from(iova) as usize;
                let seen = &bytes[at..at + piece.span.len() as usize];
                let right = match piece.oa().filter(|_| piece.allowed) {
                    Some(oa) => seen == own_bytes(oa, number),
                    None => is_nothing(seen),
                };
                if !right {
                    self.fail(piece, wanted, was, &format!("the device reads {seen:02x?}, {}", origin(seen)));
                }
            }
        } else {
            let bytes = own_bytes(span.onto(Oa::new(0)), !number);
            self.device.write(iova, &bytes);
            for piece in &pieces {
                let at = piece.span.start().offset_from(iova) as usize;
                let Some(oa) = piece.oa() else { continue };
                let seen = self.device.qtest.read(oa.start().get(), oa.len() as usize);
                let right = if piece.allowed { bytes[at..at + seen.len()].to_vec() } else { own_bytes(oa, number) };
                if seen != right {
                    self.fail(piece, wanted, was, &format!("in memory at {oa} is then {seen:02x?}, and should be {right:02x?}"));
                }
            }
            for oa in memory.iter().filter(|_| pieces.iter().all(|piece| piece.leaf.is_none())) {
                if self.device.qtest.read(oa.start().get(), oa.len() as usize) != own_bytes(*oa, number) {
                    self.fail(&pieces[0], wanted, was, &format!("the write arrives at {oa}"));
                }
            }
        }
        self.check_faults(&pieces, wanted, was);
    }

    /// The pages of an access; `None` when it cannot be tried: where it ends outside the windows, or does not reach the walker.
    fn pieces(&self, span: Span<Iova>, wanted: Perm) -> Option<Vec<Piece>> {
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
        pieces.iter().all(|piece| piece.oa().is_none_or(|oa| W::BOARD.has(oa))).then_some(pieces)
    }

    /// What was refused, and nothing else, is on record.
    fn check_faults(&mut self, pieces: &[Piece], wanted: Perm, was: Option<Oa>) {
        let faults = self.device.walker.faults(&mut self.device.qtest);
        self.tally.recorded += u64::from(!faults.is_empty());
        let named = |piece: &Piece, iova: Iova| !piece.allowed && piece.span.start().align_down(12) == iova.align_down(12);
        for fault in &faults {
            let direction = fault.write.is_none_or(|write| write == (wanted == Perm::WRITE));
            if !direction || !pieces.iter().any(|piece| named(piece, fault.iova)) {
                self.fail(&pieces[0], wanted, was, &format!("the model records {fault:x?}"));
            }
        }
        // A model with room for one record keeps the first. What is above its address bits some refuse before they walk.
        let must = |piece: &&Piece| W::RECORDS && piece.leaf.is_none() && piece.span.last() <= self.last();
        if let Some(piece) = pieces.iter().find(|piece| !piece.allowed).filter(must)
            && !faults.iter().any(|fault| named(piece, fault.iova))
        {
            self.fail(piece, wanted, was, &format!("the model has no record of the refusal, but {faults:x?}"));
        }
    }

    fn fail(&self, piece: &Piece, wanted: Perm, was: Option<Oa>, seen: &str) -> ! {
        let Piece { span, leaf, allowed } = piece;
        let verb = if wanted == Perm::READ { "read" } else { "write" };
        let right = match (leaf, piece.oa()) {
            (Some(leaf), Some(oa)) => format!("{} at {oa}, through {leaf:x?}", if *allowed { "allowed" } else { "refused" }),
            _ => "refused: nothing is mapped".to_owned(),
        };
        let was = was.map(|oa| format!(" (before it led to {oa})")).unwrap_or_default();
        panic!("{}: {verb} of {span}{was}: our walk says {right}; {seen}", self.name);
    }
}

/// What is written to memory at `oa`: the address of each word, and a number above it.
fn own_bytes(oa: Span<Oa>, number: u64) -> Vec<u8> {
    let byte = |at: u64| ((at & !7) ^ number).to_le_bytes()[(at & 7) as usize];
    (oa.start().get()..=oa.last().get()).map(byte).collect()
}

/// Where bytes come from, as far as they say.
fn origin(bytes: &[u8]) -> String {
    match bytes.first_chunk::<8>() {
        Some(word) if !is_nothing(bytes) => format!("as {} was given", Oa::new(u64::from_le_bytes(*word) & ((1 << 48) - 1))),
        _ => "none of memory's".to_owned(),
    }
}
