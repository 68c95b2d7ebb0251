//! Which frame of its window a page lies in: in a row, or scattered as in a guest_memfd that has 4 KiB folios in no order.
//!
//! Scattering needs no array: it is a permutation computed from a seed, forwards and back, in a fixed number of steps. A round of
//! "multiply by an odd number, add, fold the upper half onto the lower" is invertible on any number of bits; where there are
//! fewer frames than the bits can count, the permutation is applied again until it lands inside, which visits every frame once
//! (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3).

use crate::PageState;

/// How pages lie in their window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Frames {
    /// In a row: one physically contiguous run.
    Contiguous,
    /// Each page in a 4 KiB frame of its own, in an order given by the seed: the worst case for page tables.
    Scattered {
        /// Equal seeds give equal orders for equal lengths.
        seed: u64,
    },
}

impl Frames {
    /// This layout, with all pages in `state` at first.
    pub const fn starting(self, state: PageState) -> Layout {
        Layout { frames: self, initial: Some(state) }
    }
}

/// What a backing is made with, beside its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// How pages lie in the window.
    pub frames: Frames,
    /// The state of every page at first. `None`: shared, or private for a guest_memfd that cannot be mapped.
    pub initial: Option<PageState>,
}

impl From<Frames> for Layout {
    fn from(frames: Frames) -> Self {
        Self { frames, initial: None }
    }
}

const ROUNDS: usize = 3;

/// A permutation of `0..count`.
#[derive(Clone, Debug)]
pub(crate) struct Permutation {
    count: u64,
    mask: u64,
    shift: u32,
    /// Odd factor, its inverse, and what is added.
    rounds: [(u64, u64, u64); ROUNDS],
}

impl Permutation {
    pub(crate) fn new(count: u64, mut seed: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        // SplitMix64 (Steele, Lea, Flood 2014).
        let mut random = || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let rounds = std::array::from_fn(|_| {
            let factor = random() | 1;
            (factor, inverse(factor), random())
        });
        let mask = 1u64.checked_shl(bits).map_or(u64::MAX, |end| end - 1);
        Self { count, mask, shift: bits.div_ceil(2).max(1), rounds }
    }

    /// Where `at`, which is below `count`, goes.
    #[inline]
    pub(crate) fn forward(&self, at: u64) -> u64 {
        debug_assert!(at < self.count);
        self.walk(at, |mut x| {
            for (factor, _, add) in self.rounds {
                x = x.wrapping_mul(factor).wrapping_add(add) & self.mask;
                x ^= x >> self.shift;
            }
            x
        })
    }

    /// What goes to `at`, which is below `count`.
    #[inline]
    pub(crate) fn backward(&self, at: u64) -> u64 {
        debug_assert!(at < self.count);
        self.walk(at, |mut x| {
            for (_, inverse, add) in self.rounds.into_iter().rev() {
                // The shift is at least half of the bits, so the fold undoes itself.
                x ^= x >> self.shift;
                x = x.wrapping_sub(add).wrapping_mul(inverse) & self.mask;
            }
            x
        })
    }

    #[inline]
    fn walk(&self, at: u64, step: impl Fn(u64) -> u64) -> u64 {
        if at >= self.count {
            // Outside, a cycle need not come back inside.
            return at;
        }
        let mut x = step(at);
        while x >= self.count {
            x = step(x);
        }
        x
    }
}

/// Of an odd number modulo 2^64, by Newton's iteration: each step doubles the number of right bits, of which `x * x = 1 (mod 8)` gives
/// three to begin with.
fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    for _ in 0..5 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_frame_once(count in 1u64..5000, seed: u64) {
            let permutation = Permutation::new(count, seed);
            let mut seen = vec![false; count as usize];
            for at in 0..count {
                let to = permutation.forward(at);
                prop_assert!(to < count && !seen[to as usize]);
                seen[to as usize] = true;
                prop_assert_eq!(permutation.backward(to), at);
            }
        }

        #[test]
        fn huge_counts_invert(count in 1u64.., seed: u64, at: u64) {
            let permutation = Permutation::new(count, seed);
            let at = at % count;
            prop_assert_eq!(permutation.backward(permutation.forward(at)), at);
        }
    }

    #[test]
    fn edges() {
        for count in [1, 2, 3, 4, 5, 1 << 18, (1 << 18) + 1, u64::MAX] {
            let permutation = Permutation::new(count, 7);
            for at in [0, count / 2, count - 1] {
                assert_eq!(permutation.backward(permutation.forward(at)), at, "{at} of {count}");
            }
        }
    }

    #[test]
    fn hardly_any_neighbours_stay_neighbours() {
        let permutation = Permutation::new(100_003, 1);
        let kept = (1..100_003).filter(|&at| permutation.forward(at) == permutation.forward(at - 1) + 1).count();
        assert!(kept < 50, "{kept} of 100,002 pairs are still in a row");
    }
}
