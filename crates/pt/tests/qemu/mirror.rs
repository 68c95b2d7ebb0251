//! The arena's words, in the RAM of the machine: what was written there so far, so that only changes are written again.

use crate::qtest::Qtest;
use addr::{Address, Oa};
use lockstep_pt::{Arena, AtomicU64};
use std::sync::Arc;

pub(crate) type Words = Box<[AtomicU64]>;

const TABLE: usize = 512;

pub(crate) struct Mirror {
    arena: Arc<Arena<Words>>,
    base: Oa,
    there: Vec<u64>,
}

impl Mirror {
    /// An arena of `tables` tables at `base`, and a mirror of it. RAM is zero to begin with, as the arena is.
    pub(crate) fn new(base: Oa, tables: usize) -> (Arc<Arena<Words>>, Self) {
        let words = (0..tables * (TABLE + 1)).map(|_| AtomicU64::new(0)).collect();
        let arena = Arena::new(words, base, 9);
        (Arc::clone(&arena), Self { arena, base, there: vec![0; tables * TABLE] })
    }

    fn word(&self, index: usize) -> u64 {
        self.arena.peek(self.base.plus(index as u64 * 8)).unwrap_or_else(|| panic!("word {index} is outside the arena"))
    }

    /// Writes what has changed, of the tables that are in the tree or about to be. A table that was taken out keeps in RAM what it held: a
    /// walker that still goes there is seen.
    pub(crate) fn push(&mut self, qtest: &mut Qtest) {
        for table in 0..self.arena.capacity() as usize {
            if !self.arena.is_taken(self.base.plus((table * TABLE * 8) as u64)) {
                continue;
            }
            let (mut index, end) = (table * TABLE, (table + 1) * TABLE);
            while index < end {
                let first = index;
                while index < end && self.word(index) != self.there[index] {
                    self.there[index] = self.word(index);
                    index += 1;
                }
                if index == first {
                    index += 1;
                } else {
                    qtest.write_words(self.base.plus(first as u64 * 8).get(), &self.there[first..index]);
                }
            }
        }
    }

    /// RAM holds what was written, except that a model may have set dirty bits.
    pub(crate) fn check(&self, qtest: &mut Qtest, dirty: u64) -> Result<(), String> {
        for (table, words) in self.there.chunks(TABLE).enumerate().take(self.arena.capacity() as usize) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let at = self.base.plus((table * TABLE * 8) as u64);
            let bytes = qtest.read(at.get(), TABLE * 8);
            for (slot, (now, was)) in bytes.as_chunks::<8>().0.iter().zip(words).enumerate() {
                let now = u64::from_le_bytes(*now);
                if (now ^ was) & !dirty != 0 {
                    return Err(format!("entry {slot} of the table at {at} was {was:#x} and is {now:#x}: not the walker's to change"));
                }
            }
        }
        Ok(())
    }
}
