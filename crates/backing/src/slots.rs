//! Windows of foreign backings: they come and go with every map call of a client, so each size has its own row of slots, and finding, taking and
//! giving back one costs the same however many there are.
//!
//! Unlike other windows these are used again, the one that has been free for longest first and never one of the last few: a backing goes when
//! nothing maps it any more, so after its last flush no device has its addresses, and software that kept one by mistake finds nothing for a while.

use crate::{Backing, Error};
use addr::{Address, Oa, Span};
use std::collections::VecDeque;
use std::sync::{PoisonError, RwLock, Weak};

/// Where they begin; all other windows lie below. Every format reaches them, that with the 51 bits of mock devices too.
pub(crate) const BASE: Oa = Oa::new(1 << 50);
/// Sizes from 2 MiB to 1 TiB. Larger windows are like any other.
const LEAST_LG2: u8 = 21;
const MOST_LG2: u8 = 40;
/// What the slots of one size have together.
const ROW_LG2: u8 = 45;
/// How many slots of a size rest before one is used again.
const RESTING: usize = 64;

static ROWS: [RwLock<Row>; (MOST_LG2 - LEAST_LG2 + 1) as usize] = [const { RwLock::new(Row::new()) }; _];

/// The slots of one size. Half of each slot is left out, so that running over an end hits nothing.
struct Row {
    slots: Vec<Option<Weak<Backing>>>,
    free: VecDeque<u32>,
}

impl Row {
    const fn new() -> Self {
        Self { slots: Vec::new(), free: VecDeque::new() }
    }
}

/// A taken slot; it is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    class: u8,
    index: u32,
}

impl Slot {
    /// A slot for `len_bytes`, nobody's yet; `None` when that is too much for a slot, or its row is full.
    pub(crate) fn take(len_bytes: u64) -> Result<Option<Self>, Error> {
        let class = (u64::BITS - (len_bytes - 1).leading_zeros()).max(LEAST_LG2.into()) as u8 - LEAST_LG2;
        let Some(row) = ROWS.get(usize::from(class)) else { return Ok(None) };
        let mut row = row.write().unwrap_or_else(PoisonError::into_inner);
        if row.free.len() > RESTING
            && let Some(index) = row.free.pop_front()
        {
            return Ok(Some(Self { class, index }));
        }
        let index = row.slots.len() as u32;
        if index >> (ROW_LG2 - LEAST_LG2 - class - 1) != 0 {
            return Ok(row.free.pop_front().map(|index| Self { class, index }));
        }
        row.slots.try_reserve(1).map_err(|_| addr::OutOfMemory)?;
        // Giving it back must not need memory.
        let room = row.slots.len() + 1 - row.free.len();
        row.free.try_reserve(room).map_err(|_| addr::OutOfMemory)?;
        row.slots.push(None);
        Ok(Some(Self { class, index }))
    }

    /// Its output addresses.
    pub(crate) fn window(&self) -> Span<Oa> {
        let lg2 = LEAST_LG2 + self.class;
        Span::block(BASE.plus((u64::from(self.class) << ROW_LG2) + (u64::from(self.index) << (lg2 + 1))), lg2)
    }

    pub(crate) fn register(&self, backing: Weak<Backing>) {
        let mut row = ROWS[usize::from(self.class)].write().unwrap_or_else(PoisonError::into_inner);
        row.slots[self.index as usize] = Some(backing);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut row = ROWS[usize::from(self.class)].write().unwrap_or_else(PoisonError::into_inner);
        let before = row.slots[self.index as usize].take();
        row.free.push_back(self.index);
        drop(row);
        drop(before);
    }
}

/// The backing in whose slot `oa` lies.
pub(crate) fn find(oa: Oa) -> Option<Weak<Backing>> {
    let at = oa.offset_from(BASE);
    let class = usize::try_from(at >> ROW_LG2).ok()?;
    let row = ROWS.get(class)?.read().unwrap_or_else(PoisonError::into_inner);
    let slot_lg2 = LEAST_LG2 + class as u8 + 1;
    let index = (at & ((1 << ROW_LG2) - 1)) >> slot_lg2;
    let inside = at & (1 << (slot_lg2 - 1)) == 0;
    row.slots.get(index as usize).filter(|_| inside)?.clone()
}

/// All of them, by ascending address.
pub(crate) fn all() -> impl Iterator<Item = Weak<Backing>> {
    ROWS.iter().flat_map(|row| {
        let row = row.read().unwrap_or_else(PoisonError::into_inner);
        row.slots.iter().flatten().cloned().collect::<Vec<_>>()
    })
}

const ROWS_END: u64 = BASE.get() + (((MOST_LG2 - LEAST_LG2 + 1) as u64) << ROW_LG2);
const _: () = assert!(ROW_LG2 > MOST_LG2 + 1 && ROWS_END <= 1 << 51);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_stay_apart_and_are_found() {
        let sizes = [4096, 2 << 20, (2 << 20) + 4096, 1 << 30, 1 << 40];
        let slots: Vec<Slot> = sizes.iter().chain(&sizes).map(|&len| Slot::take(len).unwrap().unwrap()).collect();
        for (slot, len) in slots.iter().zip(sizes.iter().chain(&sizes)) {
            let window = slot.window();
            assert!(window.len() >= *len && window.start() >= BASE && window.last() <= crate::OA_LAST);
            assert!(window.start().is_aligned(crate::window::align_lg2(*len)), "{window}");
            assert_eq!(slots.iter().filter(|other| other.window().overlaps(window)).count(), 1);
            assert!(find(window.start()).is_none(), "nobody's yet");
        }
        assert!(Slot::take((1 << 40) + 1).unwrap().is_none());
    }

    #[test]
    fn the_latest_free_ones_rest() {
        let len = 5 << 30;
        let mut seen: Vec<u32> = (0..=RESTING).map(|_| Slot::take(len).unwrap().unwrap().index).collect();
        seen.dedup();
        assert_eq!(seen.len(), RESTING + 1, "a slot was used again at once");
        assert_eq!(Slot::take(len).unwrap().unwrap().index, seen[0], "and not the one that has been free for longest");
    }
}
