//! What the same stores cost with nothing around them: the limit that bulk edits come close to. One loop stores entry by entry, as code must
//! that does not know how to do better; the other is the standard library's `fill`, which stores as wide as the processor does.

use super::{K4, LIST, PAGES};
use crate::{Row, Unit, Work, timed};
use pt::FormatKind;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! row {
    ($name:literal, $unit:expr, $make:expr) => {
        Row { name: $name, format: "-", unit: $unit, kind: FormatKind::AmdV1, make: |_| Ok($make) }
    };
}

pub(super) fn rows() -> [Row; 4] {
    [
        row!("plain_stores_256", Unit::Call, stores(LIST)),
        row!("plain_fill_256", Unit::Call, fill(LIST)),
        row!("plain_stores_1g_as_4k", Unit::Page(PAGES), stores(PAGES)),
        row!("plain_fill_1g_as_4k", Unit::Page(PAGES), fill(PAGES)),
    ]
}

fn stores(entries: u64) -> Box<dyn Work> {
    let table: Vec<AtomicU64> = (0..entries).map(AtomicU64::new).collect();
    Box::new(move |times| {
        timed(|| {
            for round in 0..times {
                let mut value = black_box(round * K4);
                for entry in black_box(&table) {
                    entry.store(value, Ordering::Relaxed);
                    value = value.wrapping_add(K4);
                }
            }
        })
    })
}

fn fill(entries: u64) -> Box<dyn Work> {
    let mut table = vec![0u64; entries as usize];
    Box::new(move |times| timed(|| (0..times).for_each(|round| black_box(&mut table).fill(black_box(round)))))
}
