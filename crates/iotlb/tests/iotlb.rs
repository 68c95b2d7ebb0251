//! The cache beside a slow oracle: it may forget, it may never be wrong, and an invalidation takes exactly what it names.
#![cfg(not(loom))]

use addr::{Address, Iova, Lg2, Span};
use lockstep_iotlb::Iotlb;
use pt::Perm;

type Leaf = (Span<Iova>, Perm, u64);

/// All leaves that were put in and not invalidated.
#[derive(Default)]
struct Oracle(Vec<Leaf>);

impl Oracle {
    fn fill(&mut self, leaf: Leaf) {
        self.0.retain(|old| old.0 != leaf.0);
        self.0.push(leaf);
    }
    fn knows(&self, leaf: Leaf) -> bool {
        self.0.contains(&leaf)
    }
}

fn random_size(random: &mut fastrand::Rng) -> Lg2 {
    Lg2(*random.choice(&[12, 12, 12, 13, 16, 21, 21, 30, 39, 63]).unwrap())
}

/// Anywhere in 64 bits, but often close together, and at both ends.
fn random_iova(random: &mut fastrand::Rng) -> Iova {
    Iova::new(match random.u8(0..8) {
        0 => random.u64(..),
        1 => u64::MAX - random.u64(0..1 << 24),
        2 => random.u64(0..1 << 32),
        _ => random.u64(0..1 << 22),
    })
}

fn against_the_oracle(entries: usize, steps: usize, forgets: bool, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut iotlb, mut oracle) = (Iotlb::new(entries), Oracle::default());
    for step in 0..steps {
        match random.u8(0..10) {
            0..4 => {
                let size = random_size(&mut random);
                let start = random_iova(&mut random).align_down(size.0);
                let perm = Perm::of(random.bool(), random.bool());
                iotlb.fill(start, size, perm, step as u64);
                oracle.fill((Span::block(start, size.0), perm, step as u64));
            }
            4 => {
                let start = random_iova(&mut random);
                let most_lg2 = if random.u8(0..8) == 0 { 50 } else { 16 };
                let len = 1 << random.u8(0..most_lg2);
                let span = Span::from_len(start, len).unwrap_or(Span::one(start));
                iotlb.invalidate(span);
                oracle.0.retain(|leaf| !leaf.0.overlaps(span));
            }
            5 if random.u8(0..100) == 0 => {
                iotlb.flush();
                oracle.0.clear();
            }
            _ => {
                let iova = if random.bool() || oracle.0.is_empty() {
                    random_iova(&mut random)
                } else {
                    let (span, ..) = oracle.0[random.usize(0..oracle.0.len())];
                    span.start().plus(random.u64(0..=span.last_offset()))
                };
                let known = oracle.0.iter().any(|leaf| leaf.0.contains(iova));
                match iotlb.lookup(iova) {
                    Some(hit) => {
                        let span = Span::block(hit.start, hit.size.0);
                        assert!(span.contains(iova), "seed {seed}, step {step}: {iova} answered by {span}");
                        assert!(
                            oracle.knows((span, hit.perm, hit.value)),
                            "seed {seed}, step {step}: {hit:?} was never put in, or is gone"
                        );
                    }
                    None => assert!(!known || forgets, "seed {seed}, step {step}: {iova} was forgotten"),
                }
            }
        }
    }
    assert!(forgets || iotlb.stats().evictions == 0);
    assert!(forgets || iotlb.len() == oracle.0.len());
}

#[test]
fn a_roomy_cache_knows_everything() {
    (0..20).for_each(|seed| against_the_oracle(1 << 14, 4_000, false, seed));
}

#[test]
fn a_tiny_cache_is_never_wrong() {
    (100..160).for_each(|seed| against_the_oracle(16, 4_000, true, seed));
}

/// Wide spans take the scan, narrow ones the search; both must take the entries at the very edges, and no neighbour.
#[test]
fn edges_of_an_invalidation() {
    for blocks in [2u64, 7, 100_000] {
        let mut iotlb = Iotlb::new(1 << 14);
        let (low, high) = (0x10_0000u64, 0x10_0000 + (blocks + 1) * 0x1000);
        for at in [low, low + 0x1000, high - 0x1000, high] {
            iotlb.fill(Iova::new(at), Lg2::K4, Perm::RW, at);
        }
        iotlb.invalidate(Span::of(Iova::new(low + 0x1fff), Iova::new(high - 0x1000)));
        for (at, stays) in [(low, true), (low + 0x1000, false), (high - 0x1000, false), (high, true)] {
            assert_eq!(iotlb.lookup(Iova::new(at)).is_some(), stays, "{at:#x} of {blocks} blocks");
        }
    }
}

#[test]
fn dirty_is_forgotten_with_the_entry() {
    let mut iotlb = Iotlb::new(64);
    let at = Iova::new(0x5000);
    iotlb.fill(at, Lg2::K4, Perm::RW, ());
    let hit = iotlb.lookup(at).unwrap();
    assert!(!hit.dirty);
    iotlb.set_dirty(&hit);
    assert!(iotlb.lookup(at).unwrap().dirty);
    iotlb.invalidate(Span::one(at));
    iotlb.set_dirty(&hit);
    iotlb.fill(at, Lg2::K4, Perm::RW, ());
    assert!(!iotlb.lookup(at).unwrap().dirty);
}
