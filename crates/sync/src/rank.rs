//! Lock ranks: the one order in which locks are taken (I-12), asserted in debug builds so that a wrong order fails on its first
//! run and not on its first deadlock. Release builds carry nothing, nor does a shuttle run, whose threads share one of the system's.

/// The locks in the order in which a thread may take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rank {
    /// The object table of an iommufd context.
    Objects,
    /// The list of an IOAS's domains.
    Domains,
    /// An IOAS's area tree: who is where.
    AreaTree,
    /// The span lock of one backing's pages: what the leaves say. Several at once in the order of the backings' ids.
    PagesSpan,
    /// A segment of the secure world's table.
    Segment,
    /// Whatever takes no further lock: counters, logs, lists.
    Leaf,
}

/// Notes that the calling thread takes a lock of this rank. Keep the answer as long as the lock.
///
/// # Panics
/// In debug builds, when the thread holds a lock of this rank or of a later one.
#[inline]
#[track_caller]
pub fn enter(rank: Rank) -> RankGuard {
    enter_ordered(rank, u64::MAX)
}

/// As [`enter`], for locks of one rank that are taken in the order of an id: [`Rank::PagesSpan`].
///
/// # Panics
/// In debug builds, when the thread holds a later rank, or this rank with the same or a higher id.
#[inline]
#[track_caller]
pub fn enter_ordered(rank: Rank, id: u64) -> RankGuard {
    #[cfg(all(debug_assertions, not(shuttle)))]
    return held::push(rank, id);
    #[cfg(any(not(debug_assertions), shuttle))]
    {
        let _ = (rank, id);
        RankGuard { not_send: core::marker::PhantomData }
    }
}

/// A noted lock; dropping it notes that the lock is given back.
#[must_use]
#[derive(Debug)]
pub struct RankGuard {
    #[cfg(all(debug_assertions, not(shuttle)))]
    entry: (Rank, u64),
    not_send: core::marker::PhantomData<*const ()>,
}

#[cfg(all(debug_assertions, not(shuttle)))]
mod held {
    use super::{Rank, RankGuard};
    use std::cell::RefCell;

    thread_local!(static HELD: RefCell<Vec<(Rank, u64)>> = const { RefCell::new(Vec::new()) });

    #[track_caller]
    pub(super) fn push(rank: Rank, id: u64) -> RankGuard {
        let entry = (rank, id);
        let latest = HELD.with_borrow(|held| held.iter().copied().max());
        if let Some(latest) = latest {
            assert!(latest < entry, "lock order: {entry:?} after {latest:?}");
        }
        HELD.with_borrow_mut(|held| held.push(entry));
        RankGuard { entry, not_send: core::marker::PhantomData }
    }

    impl Drop for RankGuard {
        fn drop(&mut self) {
            // The thread may be ending; then nothing is left to keep.
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(at) = held.iter().rposition(|entry| *entry == self.entry) {
                    held.remove(at);
                }
            });
        }
    }
}

#[cfg(all(test, debug_assertions, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn upwards_is_fine() {
        let tree = enter(Rank::AreaTree);
        let first = enter_ordered(Rank::PagesSpan, 4);
        let second = enter_ordered(Rank::PagesSpan, 5);
        let leaf = enter(Rank::Leaf);
        drop(first);
        drop((leaf, second));
        let _objects_after = {
            drop(tree);
            enter(Rank::Objects)
        };
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn downwards_is_not() {
        let _pages = enter_ordered(Rank::PagesSpan, 1);
        let _tree = enter(Rank::AreaTree);
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn ids_go_up() {
        let _five = enter_ordered(Rank::PagesSpan, 5);
        let _four = enter_ordered(Rank::PagesSpan, 4);
    }
}
