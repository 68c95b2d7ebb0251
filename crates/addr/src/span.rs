//! The closed span: a range whose last address is inside, so that no length can overflow and no span can be empty.

use crate::{Address, Iova};
use core::fmt;
use thiserror::Error;

/// A closed, never empty range of one address space.
///
/// ```
/// use lockstep_addr::{Iova, Span};
/// let span = Span::from_len(Iova::new(0x1000), 0x2000).unwrap();
/// assert_eq!(span.last(), Iova::new(0x2fff));
/// assert!(Span::from_len(Iova::new(u64::MAX), 2).is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span<A> {
    start: A,
    last: A,
}

/// Why two numbers do not make a span. Carries them as they were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SpanError {
    /// A length of zero.
    #[error("empty span at {start:#x}")]
    Empty {
        /// Where it would have begun.
        start: u64,
    },
    /// The end lies past the space, or before the start.
    #[error("span of {len:#x} from {start:#x} wraps around the address space")]
    Wraps {
        /// Where it would have begun.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// Start or length is not a multiple of the granule.
    #[error("span of {len:#x} from {start:#x} is not aligned to {:#x}", 1u64 << .align_lg2)]
    Misaligned {
        /// Where it would have begun.
        start: u64,
        /// Its length.
        len: u64,
        /// Logarithm of the granule it should have kept to.
        align_lg2: u8,
    },
}

impl<A: Address> Span<A> {
    /// From first and last address; `None` when `last` lies before `start`.
    #[inline]
    pub fn new(start: A, last: A) -> Option<Self> {
        (start <= last).then_some(Self { start, last })
    }

    /// From first and last address that the caller knows to be in order.
    ///
    /// # Panics
    /// When `last < start`: that is a broken invariant of the caller, never a matter of input.
    #[inline]
    #[track_caller]
    pub fn of(start: A, last: A) -> Self {
        assert!(start <= last, "span from {start} to {last} is backwards");
        Self { start, last }
    }

    /// From a start and a length in the space's own unit.
    ///
    /// # Errors
    /// `Empty` for a length of 0, `Wraps` when the end does not fit.
    #[inline]
    pub fn from_len(start: A, len: u64) -> Result<Self, SpanError> {
        let Some(less_one) = len.checked_sub(1) else {
            return Err(SpanError::Empty { start: start.get() });
        };
        match start.checked_add(less_one) {
            Some(last) => Ok(Self { start, last }),
            None => Err(SpanError::Wraps { start: start.get(), len }),
        }
    }

    /// As [`Span::from_len`], and both start and length must be multiples of `1 << align_lg2`.
    ///
    /// # Errors
    /// As [`Span::from_len`], and `Misaligned`.
    pub fn aligned(start: A, len: u64, align_lg2: u8) -> Result<Self, SpanError> {
        let span = Self::from_len(start, len)?;
        span.check_aligned(align_lg2)?;
        Ok(span)
    }

    /// The one address.
    #[inline]
    pub fn one(at: A) -> Self {
        Self { start: at, last: at }
    }

    /// The whole space.
    #[inline]
    pub fn whole() -> Self {
        Self { start: A::new(0), last: A::new(u64::MAX) }
    }

    /// The naturally aligned block of `1 << lg2` that holds `at`.
    #[inline]
    pub fn block(at: A, lg2: u8) -> Self {
        let mask = if lg2 >= 64 { u64::MAX } else { (1 << lg2) - 1 };
        Self { start: A::new(at.get() & !mask), last: A::new(at.get() | mask) }
    }

    /// First address.
    #[inline]
    pub fn start(self) -> A {
        self.start
    }

    /// Last address, inside the span.
    #[inline]
    pub fn last(self) -> A {
        self.last
    }

    /// Length; the whole 64-bit space answers `u64::MAX`, one less than it is.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a span is never empty")]
    pub fn len(self) -> u64 {
        self.last_offset().saturating_add(1)
    }

    /// `last - start`, which always fits.
    #[inline]
    pub fn last_offset(self) -> u64 {
        self.last.get() - self.start.get()
    }

    /// Whether `at` lies inside.
    #[inline]
    pub fn contains(self, at: A) -> bool {
        self.start <= at && at <= self.last
    }

    /// Whether all of `other` lies inside.
    #[inline]
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether the two share an address.
    #[inline]
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// What the two share.
    #[inline]
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.last.min(other.last))
    }

    /// Whether `other` begins right after this one ends.
    #[inline]
    pub fn touches(self, other: Self) -> bool {
        self.last.checked_add(1) == Some(other.start)
    }

    /// Whether start and end keep to blocks of `1 << lg2`.
    #[inline]
    pub fn is_aligned(self, lg2: u8) -> bool {
        self.start.is_aligned(lg2) && A::new(self.last.get().wrapping_add(1)).is_aligned(lg2)
    }

    /// The smallest span of whole blocks of `1 << lg2` that covers this one.
    #[inline]
    pub fn widen(self, lg2: u8) -> Self {
        Self { start: Self::block(self.start, lg2).start, last: Self::block(self.last, lg2).last }
    }

    /// # Errors
    /// `Misaligned` when the span does not keep to blocks of `1 << align_lg2`.
    pub fn check_aligned(self, align_lg2: u8) -> Result<(), SpanError> {
        if self.is_aligned(align_lg2) {
            return Ok(());
        }
        Err(SpanError::Misaligned { start: self.start.get(), len: self.len(), align_lg2 })
    }

    /// The same stretch in another space: `base` stands for this span's start.
    ///
    /// # Panics
    /// In debug builds, when it does not fit there.
    #[inline]
    pub fn onto<B: Address>(self, base: B) -> Span<B> {
        Span { start: base, last: base.plus(self.last_offset()) }
    }

    /// A part of this span, by its place in an equally long span `whole` of another space.
    #[inline]
    pub fn project<B: Address>(self, whole: Span<B>, part: Span<B>) -> Self {
        debug_assert!(whole.covers(part) && whole.last_offset() == self.last_offset());
        part.onto(self.start.plus(part.start.offset_from(whole.start)))
    }

    /// The same span counted in blocks of `1 << lg2`, in the space `B` of their indices.
    #[inline]
    pub fn index<B: Address>(self, lg2: u8) -> Span<B> {
        Span { start: B::new(self.start.get() >> lg2), last: B::new(self.last.get() >> lg2) }
    }

    /// The bytes that a span of block indices covers; the inverse of [`Span::index`].
    #[inline]
    pub fn unindex<B: Address>(self, lg2: u8) -> Span<B> {
        Span { start: B::new(self.start.get() << lg2), last: B::new((self.last.get() << lg2) | ((1 << lg2) - 1)) }
    }

    /// What is left of this span without `hole`: the part before, the part after.
    pub fn without(self, hole: Self) -> [Option<Self>; 2] {
        if !self.overlaps(hole) {
            return [Some(self), None];
        }
        let before = (self.start < hole.start).then(|| Self::of(self.start, A::new(hole.start.get() - 1)));
        let after = (hole.last < self.last).then(|| Self::of(A::new(hole.last.get() + 1), self.last));
        [before, after]
    }

    /// The span in pieces, each ending where a block of `1 << lg2` ends.
    pub fn blocks(self, lg2: u8) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        core::iter::from_fn(move || {
            let span = rest?;
            let piece = Self { start: span.start, last: Self::block(span.start, lg2).last.min(span.last) };
            rest = piece.last.checked_add(1).and_then(|next| Self::new(next, span.last));
            Some(piece)
        })
    }
}

impl Span<Iova> {
    /// The span of address 0 alone, as a constant: a filler for arrays.
    pub const fn zero() -> Self {
        Self { start: Iova::new(0), last: Iova::new(0) }
    }
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}..={}", A::SPACE, self.start, self.last)
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gfn, Gpa, Oa};
    use alloc::vec::Vec;

    fn span(start: u64, last: u64) -> Span<Iova> {
        Span::of(Iova::new(start), Iova::new(last))
    }

    #[test]
    fn edges_of_the_space() {
        assert_eq!(Span::from_len(Iova::new(5), 0), Err(SpanError::Empty { start: 5 }));
        assert_eq!(Span::from_len(Iova::new(u64::MAX), 1), Ok(span(u64::MAX, u64::MAX)));
        assert_eq!(Span::from_len(Iova::new(2), u64::MAX), Err(SpanError::Wraps { start: 2, len: u64::MAX }));
        assert_eq!(Span::<Iova>::whole().len(), u64::MAX);
        assert!(Span::<Iova>::whole().is_aligned(12));
        assert_eq!(Span::block(Iova::new(u64::MAX), 64), Span::whole());
    }

    #[test]
    fn parts() {
        assert_eq!(span(0, 9).without(span(3, 5)), [Some(span(0, 2)), Some(span(6, 9))]);
        assert_eq!(span(0, 9).without(span(0, 9)), [None, None]);
        assert_eq!(span(0, 9).without(span(20, 30)), [Some(span(0, 9)), None]);
        assert_eq!(span(0x800, 0x27ff).blocks(12).collect::<Vec<_>>(), [span(0x800, 0xfff), span(0x1000, 0x1fff), span(0x2000, 0x27ff)]);
        assert_eq!(span(u64::MAX - 1, u64::MAX).blocks(12).count(), 1);
        assert_eq!(span(0x1000, 0x1fff).project(Span::of(Oa::new(0), Oa::new(0xfff)), Span::one(Oa::new(4))), span(0x1004, 0x1004));
    }

    #[test]
    fn indices() {
        let gfns = Span::of(Gpa::new(0x1000), Gpa::new(0x2fff)).index::<Gfn>(12);
        assert_eq!((gfns.start().get(), gfns.last().get()), (1, 2));
        assert_eq!(gfns.unindex::<Gpa>(12), Span::of(Gpa::new(0x1000), Gpa::new(0x2fff)));
    }
}
