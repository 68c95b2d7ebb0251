//! Many slots at once. Half of what a large map or unmap costs are its stores, and the compiler keeps atomic stores apart, eight bytes each;
//! here they are made two at a time, and tables are searched for entries two slots at a time.
//!
//! Processors with AVX make aligned accesses of 16 bytes whole (Intel SDM volume 3, section 9.1.1; AMD APM volume 2, section 7.3.2), and all
//! of this architecture never split an aligned 8-byte half of one, so no reader meets half an entry. They are ordered like any
//! others there: what was written before a leaf is seen with it. Elsewhere, under loom and Miri, and where a test stops writers between two
//! stores, slots are written one by one.

use crate::atomic::{AtomicU64, Ordering};
use sync::pause::{is_watched, pause};

/// Whether this build has the two-slot accesses.
const WIDE: bool = cfg!(all(target_arch = "x86_64", target_feature = "sse2", not(loom), not(miri)));

/// Stores `value`, `value + step`, `value + 2 * step` and so on into the slots. Release: a device that sees an entry sees what was done
/// before.
#[inline(always)]
pub(crate) fn fill(entries: &[AtomicU64], value: u64, step: u64) {
    if WIDE && entries.len() > 3 && !is_watched() { pairs::fill(entries, value, step) } else { fill_singly(entries, value, step) }
}

/// Whether every slot is 0.
#[inline(always)]
pub(crate) fn is_empty(entries: &[AtomicU64]) -> bool {
    if WIDE && entries.len() > 3 {
        pairs::union(entries) == 0
    } else {
        entries.iter().fold(0, |all, entry| all | entry.load(Ordering::Relaxed)) == 0
    }
}

#[inline(always)]
fn fill_singly(entries: &[AtomicU64], value: u64, step: u64) {
    let mut value = value;
    for entry in entries {
        pause();
        entry.store(value, Ordering::Release);
        value = value.wrapping_add(step);
    }
}

#[cfg(all(target_arch = "x86_64", target_feature = "sse2", not(loom), not(miri)))]
#[expect(unsafe_code, reason = "the only way to say that two neighbouring slots are stored, or read, by one instruction")]
mod pairs {
    use crate::atomic::{AtomicU64, Ordering};
    use core::arch::asm;
    use core::arch::x86_64::{
        __m128i, _mm_add_epi64, _mm_cvtsi128_si64, _mm_or_si128, _mm_set_epi64x, _mm_setzero_si128, _mm_unpackhi_epi64,
    };

    /// Pairs that one round of a loop takes: enough that the loop itself does not count.
    const ROUND: usize = 4;

    /// Two slots that one access covers.
    #[repr(align(16))]
    struct Pair([AtomicU64; 2]);

    impl Pair {
        #[inline(always)]
        fn store(&self, values: __m128i) {
            // SAFETY: the pair is 16 bytes of memory that may be written through a shared reference, since it is atomic, and it is
            // aligned to 16 bytes by its type. The instruction does what two atomic stores of 8 bytes in one go do.
            unsafe {
                asm!("movdqa xmmword ptr [{at}], {values}", at = in(reg) self.0.as_ptr(), values = in(xmm_reg) values, options(nostack, preserves_flags));
            }
        }

        #[inline(always)]
        fn load(&self) -> __m128i {
            let values;
            // SAFETY: the pair is 16 readable bytes, aligned by its type. The instruction does what two atomic loads of 8 bytes do.
            unsafe {
                asm!("movdqa {values}, xmmword ptr [{at}]", at = in(reg) self.0.as_ptr(), values = out(xmm_reg) values, options(nostack, preserves_flags, readonly));
            }
            values
        }
    }

    /// What stands before the first whole pair, the pairs, and what is left.
    #[inline(always)]
    fn split(entries: &[AtomicU64]) -> (&[AtomicU64], &[Pair], &[AtomicU64]) {
        // SAFETY: a pair is two slots and nothing else, and `align_to` looks after the alignment.
        unsafe { entries.align_to::<Pair>() }
    }

    #[inline(always)]
    pub(super) fn fill(entries: &[AtomicU64], value: u64, step: u64) {
        // SAFETY: this module is there only where every function may use SSE2.
        unsafe { fill_pairs(entries, value, step) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn fill_pairs(entries: &[AtomicU64], value: u64, step: u64) {
        let (head, pairs, tail) = split(entries);
        super::fill_singly(head, value, step);
        let at = |slot: usize| value.wrapping_add(step.wrapping_mul(slot as u64));
        let both = |slot: usize| _mm_set_epi64x(at(slot + 1) as i64, at(slot) as i64);
        // Each with a register of its own, so that the additions need not wait for each other.
        let mut values: [__m128i; ROUND] = core::array::from_fn(|pair| both(head.len() + 2 * pair));
        let stride = step.wrapping_mul(2 * ROUND as u64) as i64;
        let stride = _mm_set_epi64x(stride, stride);
        let rounds = pairs.chunks_exact(ROUND);
        let rest = rounds.remainder();
        for round in rounds {
            for (pair, value) in round.iter().zip(&mut values) {
                pair.store(*value);
                *value = _mm_add_epi64(*value, stride);
            }
        }
        for (pair, value) in rest.iter().zip(values) {
            pair.store(value);
        }
        super::fill_singly(tail, at(entries.len() - tail.len()), step);
    }

    /// Every bit that is set in some slot.
    #[inline(always)]
    pub(super) fn union(entries: &[AtomicU64]) -> u64 {
        // SAFETY: as in `fill`.
        unsafe { union_of_pairs(entries) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn union_of_pairs(entries: &[AtomicU64]) -> u64 {
        let (head, pairs, tail) = split(entries);
        let single = head.iter().chain(tail).fold(0, |all, entry| all | entry.load(Ordering::Relaxed));
        let mut all = [_mm_setzero_si128(); ROUND];
        let rounds = pairs.chunks_exact(ROUND);
        let rest = rounds.remainder();
        for round in rounds {
            for (pair, all) in round.iter().zip(&mut all) {
                *all = _mm_or_si128(*all, pair.load());
            }
        }
        for (pair, all) in rest.iter().zip(&mut all) {
            *all = _mm_or_si128(*all, pair.load());
        }
        let all = all.into_iter().fold(_mm_setzero_si128(), |a, b| _mm_or_si128(a, b));
        single | (_mm_cvtsi128_si64(all) | _mm_cvtsi128_si64(_mm_unpackhi_epi64(all, all))) as u64
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2", not(loom), not(miri))))]
use singles as pairs;

/// In the place of what this build does not have; never called.
#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2", not(loom), not(miri))))]
mod singles {
    use crate::atomic::{AtomicU64, Ordering};

    pub(super) fn fill(entries: &[AtomicU64], value: u64, step: u64) {
        super::fill_singly(entries, value, step);
    }

    pub(super) fn union(entries: &[AtomicU64]) -> u64 {
        entries.iter().fold(0, |all, entry| all | entry.load(Ordering::Relaxed))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const SLOTS: usize = 40;

    fn values(slots: &[AtomicU64]) -> Vec<u64> {
        slots.iter().map(|slot| slot.load(Ordering::Relaxed)).collect()
    }

    /// Every beginning and every length, so every alignment; what stands beside is left alone.
    #[test]
    fn fills_what_it_is_given_and_nothing_else() {
        for first in 0..8 {
            for len in 0..SLOTS - first {
                let [wide, single] = [0; 2].map(|_| (0..SLOTS as u64).map(|slot| AtomicU64::new(slot ^ 0x55)).collect::<Vec<_>>());
                fill(&wide[first..first + len], u64::MAX - 5, 0x1_0001);
                fill_singly(&single[first..first + len], u64::MAX - 5, 0x1_0001);
                assert_eq!(values(&wide), values(&single), "{len} slots from {first}");
            }
        }
    }

    #[test]
    fn finds_a_bit_wherever_it_is() {
        for first in 0..8 {
            for len in 0..SLOTS - first {
                let slots = (0..SLOTS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
                for slot in 0..SLOTS {
                    slots[slot].store(1 << (slot + 20), Ordering::Relaxed);
                    let inside = (first..first + len).contains(&slot);
                    assert_eq!(is_empty(&slots[first..first + len]), !inside, "{len} slots from {first}, a bit in {slot}");
                    slots[slot].store(0, Ordering::Relaxed);
                }
            }
        }
    }
}
