//! Things that threads have each for themselves, so that threads on different processors do not pass a cache line to and fro: parts of a
//! counter, of a free list, copies of a list that is read often.
//!
//! Which one a thread gets is a matter of speed only: there are few of them, so threads share, and any thread may use any.

use crossbeam_utils::CachePadded;

/// How many there are. Under loom a single one: what threads share is what it explores.
pub const SHARDS: usize = if cfg!(loom) { 1 } else { 8 };

/// One `T` for each shard, each on a cache line of its own.
#[derive(Debug)]
pub struct Sharded<T>([CachePadded<T>; SHARDS]);

impl<T> Sharded<T> {
    /// As many as there are shards.
    pub fn new(mut make: impl FnMut() -> T) -> Self {
        Self(core::array::from_fn(|_| CachePadded::new(make())))
    }

    /// The calling thread's.
    #[inline]
    pub fn mine(&self) -> &T {
        &self.0[here()]
    }

    /// All of them, always in the same order.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &**padded)
    }
}

impl<T: Default> Default for Sharded<T> {
    fn default() -> Self {
        Self::new(T::default)
    }
}

/// The calling thread's shard. Threads get them in turn; without feature `std` all have the first.
#[inline]
fn here() -> usize {
    #[cfg(all(feature = "std", not(loom)))]
    return threads::here();
    #[cfg(not(all(feature = "std", not(loom))))]
    return 0;
}

#[cfg(all(feature = "std", not(loom)))]
mod threads {
    use super::SHARDS;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const UNKNOWN: usize = usize::MAX;
    thread_local!(static HERE: Cell<usize> = const { Cell::new(UNKNOWN) });

    #[inline]
    pub(super) fn here() -> usize {
        let here = HERE.get();
        // The mask tells the compiler what the value is anyway.
        if here == UNKNOWN { arrive() } else { here % SHARDS }
    }

    #[cold]
    fn arrive() -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let here = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
        HERE.set(here);
        here
    }
}

#[cfg(all(test, feature = "std", not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_thread_keeps_its_own_and_none_is_lost() {
        let counts = Sharded::<AtomicU64>::default();
        assert!(std::ptr::eq(counts.mine(), counts.mine()));
        std::thread::scope(|scope| {
            for _ in 0..2 * SHARDS {
                scope.spawn(|| (0..1000).for_each(|_| _ = counts.mine().fetch_add(1, Ordering::Relaxed)));
            }
        });
        assert_eq!(counts.all().map(|count| count.load(Ordering::Relaxed)).sum::<u64>(), 2 * SHARDS as u64 * 1000);
        assert!(counts.all().all(|count| count.load(Ordering::Relaxed) > 0), "threads do not spread");
    }
}
