//! A format that no hardware has: four entries to a table, two levels, a 2 KiB granule, one multi-slot size. It keeps state spaces small
//! enough for loom, and since its sizes never coincide with the host's pages, it catches code that mixes the two up.

use super::AlignDown;
use crate::{Config, Entry, Format, Hitless, Perm, PermSet};
use addr::{Lg2, Oa, SizeSet};

/// The toy format; see the module's head. `BREAKS` makes it one of those that need break-before-make.
#[derive(Clone, Copy, Debug)]
pub struct ToyOf<const BREAKS: bool>;

/// The toy format that can change under a walking device.
pub type Toy = ToyOf<false>;

/// The one that cannot.
pub type ToyBreaking = ToyOf<true>;

const PRESENT: u64 = 1;
const TABLE: u64 = 1 << 1;
const READ: u64 = 1 << 2;
const WRITE: u64 = 1 << 3;
const DIRTY: u64 = 1 << 4;
/// Two slots, one leaf of twice the item's size.
const PAIR: u64 = 1 << 52;
const ADDRESS: u64 = (1 << 52) - (1 << 5);

impl<const BREAKS: bool> Format for ToyOf<BREAKS> {
    const NAME: &'static str = if BREAKS { "toy-breaking" } else { "toy" };
    const GRANULE_LG2: u8 = 11;
    const INDEX_LG2: u8 = 2;
    const START_LEVEL: u8 = 0;
    const MAX_LEVEL: u8 = 1;
    const INPUT_LG2: u8 = 15;
    const OUTPUT_LG2: u8 = 52;
    const SIZES: SizeSet = SizeSet(0b1111 << 11);
    const PERMS: PermSet = PermSet::ALL;
    const DIRTY: u64 = DIRTY;
    const HITLESS: Hitless =
        if BREAKS { Hitless::BreakFirst("no hardware walks it, but some might") } else { Hitless::Yes("no hardware walks it") };
    const CONFIGS: &'static [Config] = &[
        Config { name: "growing", start_level: 0, sizes: SizeSet::ALL },
        Config { name: "two levels", start_level: 1, sizes: SizeSet::ALL },
        Config { name: "two levels, without pairs", start_level: 1, sizes: SizeSet(1 << 11 | 1 << 13) },
    ];

    #[inline]
    fn decode(entry: u64, level: u8) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        if entry & TABLE != 0 {
            return if level == 0 { Entry::Absent } else { Entry::Table(Oa::new(entry & ADDRESS)) };
        }
        let size = Lg2(Self::item_lg2(level) + u8::from(entry & PAIR != 0));
        Entry::Leaf {
            size,
            oa: Oa::new(entry & ADDRESS).align_down_to(size.0),
            perm: Perm::of(entry & READ != 0, entry & WRITE != 0),
            dirty: entry & DIRTY != 0,
        }
    }

    #[inline]
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 {
        let pair = if size.0 > Self::item_lg2(level) { PAIR } else { 0 };
        PRESENT | pair | oa.get() | u64::from(perm.bits()) << 2
    }

    #[inline]
    fn table(_level: u8, oa: Oa) -> u64 {
        PRESENT | TABLE | oa.get()
    }
}
