//! IOMMU_HWPT_SET_DIRTY_TRACKING and GET_DIRTY_BITMAP: which pages devices have written to (rules 55 to 60).
//!
//! What is read and cleared of the page table is given to the caller after every lock is gone again, since its memory may take long to
//! touch. What it cannot be given counts as written to still.

use crate::ioas_ops::{FLAGS, RESERVED, check_clear, unsupported};
use crate::table::{Call, Reply};
use crate::uapi::{self, DIRTY_NO_CLEAR, DIRTY_TRACKING_ENABLE};
use crate::{Answer, Caller, Context, Refusal};
use addr::{Address, Iova, Span};
use ioas::{AreaState, Ioas};
use iommu::Domain;
use rustix::io::Errno;

pub(crate) fn set(call: &Call<'_, Context>, arg: &mut uapi::HwptSetDirtyTracking) -> Answer<Reply> {
    check_clear(u64::from(arg.flags & !DIRTY_TRACKING_ENABLE), FLAGS)?;
    let (table, domain) = call.target.paging(arg.hwpt_id)?;
    if !table.notes_dirty() {
        return Err(unsupported(NOT_MADE_FOR_IT));
    }
    table.ioas().ioas().track_dirty(&domain, arg.flags & DIRTY_TRACKING_ENABLE != 0)?;
    Ok(Reply::Done)
}

const NOT_MADE_FOR_IT: &str = "the page table was not made with DIRTY_TRACKING";

pub(crate) fn get(call: &Call<'_, Context>, arg: &mut uapi::HwptGetDirtyBitmap) -> Answer<Reply> {
    check_clear(u64::from(arg.flags & !DIRTY_NO_CLEAR), FLAGS)?;
    check_clear(arg.__reserved.into(), RESERVED)?;
    let (table, domain) = call.target.paging(arg.hwpt_id)?;
    let ioas = table.ioas().ioas();
    let span = check_range(arg, ioas.alignment())?;
    if !table.notes_dirty() {
        return Err(unsupported(NOT_MADE_FOR_IT));
    }
    let clear = arg.flags & DIRTY_NO_CLEAR == 0;
    let mut bitmap = Bitmap::new(call.caller, arg.data, span.start(), arg.page_size.trailing_zeros());
    let Some(mapped) = up_to_gap(ioas, span) else { return Ok(Reply::Done) };
    for part in parts(ioas, &domain, mapped)? {
        let dirty = read(ioas, &domain, part, clear)?;
        let mut rest = dirty.iter();
        let told = rest.by_ref().try_for_each(|found| bitmap.set(*found)).and_then(|()| bitmap.flush());
        if told.is_err() {
            if clear {
                // What has been told may be among it; twice is better than never.
                dirty.iter().for_each(|found| mark_again(ioas, &domain, *found));
            }
            break;
        }
    }
    Ok(Reply::Done)
}

/// The range as a span, checked in the kernel's order (rule 56). The page size counts by its bits, and need not be a power of two.
fn check_range(arg: &uapi::HwptGetDirtyBitmap, align: u64) -> Answer<Span<Iova>> {
    let span = Span::from_len(Iova::new(arg.iova), arg.length).map_err(ioas::Error::from)?;
    let bits = span.start().get() | span.last().get().wrapping_add(1);
    let misaligned = |to: u64| Refusal::new(Errno::INVAL, format!("{span} does not keep to multiples of {to:#x}"));
    if bits & (align - 1) != 0 {
        return Err(misaligned(align));
    }
    if arg.page_size == 0 {
        return Err(Refusal::of(Errno::INVAL, "the page size is 0"));
    }
    if bits & (arg.page_size - 1) != 0 {
        return Err(misaligned(arg.page_size));
    }
    Ok(span)
}

/// The beginning of `span` up to the first byte that is not mapped: what comes behind is not looked at (rule 59).
fn up_to_gap(ioas: &Ioas, span: Span<Iova>) -> Option<Span<Iova>> {
    let mut mapped: Option<Span<Iova>> = None;
    loop {
        let next = mapped.map_or(Some(span.start()), |mapped| mapped.last().checked_add(1)).filter(|next| span.contains(*next));
        let area = next.and_then(|next| ioas.area_at(next)).filter(|area| area.state() == AreaState::Live);
        let Some(area) = area else { return mapped };
        mapped = Some(Span::of(span.start(), area.span().last().min(span.last())));
    }
}

/// The most spans of dirty pages that are kept at once, 16 bytes each.
const MOST_SPANS: usize = 1 << 18;

/// Cuts a range into parts with about as many dirty spans as can be kept, where leaves begin: a leaf that is cut would be cut in the page table.
fn parts(ioas: &Ioas, domain: &Domain, span: Span<Iova>) -> Answer<Vec<Span<Iova>>> {
    if span.last_offset() >> domain.smallest().0 <= MOST_SPANS as u64 {
        return Ok(vec![span]);
    }
    let (mut parts, mut start, mut seen) = (Vec::new(), span.start(), Merged::default());
    let mut spans = 0;
    ioas.read_dirty(domain, span, false, |dirty| {
        spans += usize::from(seen.add(dirty).is_some());
        if spans > MOST_SPANS && dirty.start() > start {
            parts.push(Span::of(start, Iova::new(dirty.start().get() - 1)));
            (start, spans) = (dirty.start(), 0);
        }
    })?;
    parts.push(Span::of(start, span.last()));
    Ok(parts)
}

/// Joins spans that come one behind the other.
#[derive(Default)]
struct Merged(Option<Span<Iova>>);

impl Merged {
    /// Answers a span that nothing was joined to any more.
    fn add(&mut self, span: Span<Iova>) -> Option<Span<Iova>> {
        match &mut self.0 {
            Some(last) if last.last().checked_add(1) == Some(span.start()) => {
                *last = Span::of(last.start(), span.last());
                None
            }
            last => last.replace(span),
        }
    }
}

fn read(ioas: &Ioas, domain: &Domain, span: Span<Iova>, clear: bool) -> Answer<Vec<Span<Iova>>> {
    let (mut found, mut merged) = (Vec::new(), Merged::default());
    ioas.read_dirty(domain, span, clear, |dirty| found.extend(merged.add(dirty)))?;
    found.extend(merged.0);
    Ok(found)
}

fn mark_again(ioas: &Ioas, domain: &Domain, span: Span<Iova>) {
    let mut slot = ioas.iommu().readers().slot();
    let _guard = slot.guard(domain.id());
    let mut at = Some(span.start());
    while let Some(next) = at.filter(|at| span.contains(*at)) {
        domain.table().mark_dirty(next);
        let last = domain.table().walk(next).map_or_else(|| next.plus(domain.smallest().bytes() - 1), |leaf| leaf.span().last());
        at = last.checked_add(1);
    }
}

/// Bytes of the caller's bitmap that are changed at once: those of one page of its memory.
const CHUNK: u64 = 4096;

/// The caller's bitmap. Bit n of the byte array stands for `base` + n pages; bits are set, never cleared (rule 57).
struct Bitmap<'a> {
    caller: &'a dyn Caller,
    at: u64,
    base: Iova,
    page_lg2: u32,
    /// Bytes to be changed, from this one on; within one page of the caller's memory.
    first: u64,
    bytes: Vec<u8>,
}

impl<'a> Bitmap<'a> {
    fn new(caller: &'a dyn Caller, at: u64, base: Iova, page_lg2: u32) -> Self {
        Self { caller, at, base, page_lg2, first: 0, bytes: Vec::new() }
    }

    /// Sets the bits of every page that meets `span`.
    fn set(&mut self, span: Span<Iova>) -> Answer {
        let bit_of = |at: Iova| at.offset_from(self.base) >> self.page_lg2;
        let (mut bit, last) = (bit_of(span.start()), bit_of(span.last()));
        loop {
            let byte = bit / 8;
            // Where the caller's page ends.
            let end = byte + (CHUNK - self.at.wrapping_add(byte) % CHUNK);
            if !self.reaches(byte) {
                self.flush()?;
                self.first = byte;
            }
            let stop = last.min(end * 8 - 1);
            self.bytes.resize(self.bytes.len().max((stop / 8 - self.first + 1) as usize), 0);
            set_bits(&mut self.bytes, bit - self.first * 8, stop - self.first * 8);
            if stop == last {
                return Ok(());
            }
            bit = stop + 1;
        }
    }

    /// Whether a byte belongs to what is being changed.
    fn reaches(&self, byte: u64) -> bool {
        let page = |byte: u64| self.at.wrapping_add(byte) / CHUNK;
        !self.bytes.is_empty() && byte >= self.first && page(byte) == page(self.first)
    }

    fn flush(&mut self) -> Answer {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let at = self.at.wrapping_add(self.first);
        let mut bytes = std::mem::take(&mut self.bytes);
        if bytes.iter().any(|byte| *byte != u8::MAX) {
            let mut before = vec![0; bytes.len()];
            self.caller.read(at, &mut before)?;
            bytes.iter_mut().zip(before).for_each(|(byte, before)| *byte |= before);
        }
        self.caller.write(at, &bytes)
    }
}

fn set_bits(bytes: &mut [u8], first: u64, last: u64) {
    let (low, high) = ((first / 8) as usize, (last / 8) as usize);
    let (head, tail) = (u8::MAX << (first % 8), u8::MAX >> (7 - last % 8));
    if low == high {
        bytes[low] |= head & tail;
        return;
    }
    bytes[low] |= head;
    bytes[low + 1..high].fill(u8::MAX);
    bytes[high] |= tail;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        for first in 0..40u64 {
            for last in first..40 {
                let mut bytes = [0; 5];
                set_bits(&mut bytes, first, last);
                let expected = (0..40).filter(|bit| (first..=last).contains(bit)).fold(0u64, |bits, bit| bits | 1 << bit);
                assert_eq!(bytes, expected.to_le_bytes()[..5], "{first}..={last}");
            }
        }
    }
}
