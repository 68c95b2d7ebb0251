//! A second reader of AMDv1 tables, for audits. It knows the specification (48882, section 2.2.3) and nothing of the code that writes the
//! tables: it takes words by physical address, looks at every entry of every table, and calls anything odd by its place and value.

use addr::{Iova, Oa, Span};

/// A translation as its bytes say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawLeaf {
    /// All that the leaf translates.
    pub span: Span<Iova>,
    /// Where its first byte goes.
    pub oa: Oa,
    /// Device reads, with the permissions on the way down.
    pub read: bool,
    /// Device writes, likewise.
    pub write: bool,
    /// The dirty bit of any of its slots.
    pub dirty: bool,
}

/// An entry that no correct writer leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawOddity {
    /// What the entry answers for.
    pub span: Span<Iova>,
    /// Its physical address.
    pub at: Oa,
    /// Its value.
    pub value: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

/// What the walk found.
#[derive(Clone, Debug, Default)]
pub struct RawTree {
    /// Every leaf, ascending.
    pub leaves: Vec<RawLeaf>,
    /// Everything odd.
    pub oddities: Vec<RawOddity>,
    /// Tables seen.
    pub tables: u64,
    /// Where they lie, and what each translates.
    pub places: Vec<(Oa, Span<Iova>)>,
}

const ENTRIES: u64 = 512;
/// Bits that this format defines and our tables use: present, accessed, dirty, next level, address, read, write.
const KNOWN: u64 = 1 | 1 << 5 | 1 << 6 | 7 << 9 | 0x000f_ffff_ffff_f000 | 1 << 61 | 1 << 62;

struct Walk<'a> {
    word: &'a dyn Fn(Oa) -> Option<u64>,
    within: Span<Iova>,
    tree: RawTree,
}

/// Reads the tree whose top table is at `root`, of `mode` levels as a device table entry would say it, and answers everything that meets
/// `within`. `word` reads eight bytes of table memory.
pub fn read_tree(word: &dyn Fn(Oa) -> Option<u64>, root: Oa, mode: u8, within: Span<Iova>) -> RawTree {
    let mut walk = Walk { word, within, tree: RawTree::default() };
    walk.table(root, mode, 0, (true, true));
    walk.tree
}

impl Walk<'_> {
    fn table(&mut self, table: Oa, mode: u8, first_iova: u64, rights: (bool, bool)) {
        self.tree.tables += 1;
        let item_lg2 = 12 + 9 * (u32::from(mode) - 1);
        // The table of mode 6 translates bits 63:57, which are 128 entries.
        let entries = if mode == 6 { 128 } else { ENTRIES };
        let item = 1u64 << item_lg2;
        let low = (self.within.start().get().max(first_iova) - first_iova) / item;
        let last_iova = (u128::from(first_iova) + u128::from(item) * u128::from(entries) - 1) as u64;
        self.tree.places.push((table, Span::of(Iova::new(first_iova), Iova::new(last_iova))));
        let high = (self.within.last().get().min(last_iova) - first_iova) / item;
        let mut index = low;
        while index <= high {
            let at = Oa::new(table.get() + 8 * index);
            let span = Span::of(Iova::new(first_iova + index * item), Iova::new(first_iova + index * item + (item - 1)));
            let Some(value) = (self.word)(at) else {
                self.odd(span, at, 0, "the table lies outside table memory");
                return;
            };
            index += self.entry(table, mode, index, at, value, span, rights);
        }
    }

    /// Looks at one entry; answers how many slots it speaks for.
    #[expect(clippy::too_many_arguments, reason = "one entry, its place and its surroundings")]
    fn entry(&mut self, table: Oa, mode: u8, index: u64, at: Oa, value: u64, span: Span<Iova>, rights: (bool, bool)) -> u64 {
        if value & 1 == 0 {
            if value != 0 {
                self.odd(span, at, value, "not present, yet not zero");
            }
            return 1;
        }
        if value & !KNOWN != 0 {
            self.odd(span, at, value, "a reserved or unused bit is set");
        }
        let address = value & 0x000f_ffff_ffff_f000;
        let rights = (rights.0 && value >> 61 & 1 == 1, rights.1 && value >> 62 & 1 == 1);
        let next_level = (value >> 9 & 7) as u8;
        let item_lg2 = 12 + 9 * (u32::from(mode) - 1);
        match next_level {
            7 => {
                let size_lg2 = 13 + (address >> 12).trailing_ones();
                if size_lg2 <= item_lg2 || size_lg2 > item_lg2 + 8 || size_lg2 == 39 || mode == 6 {
                    self.odd(span, at, value, "a leaf size that this level cannot hold");
                    return 1;
                }
                self.sized_leaf(table, index, value, size_lg2, item_lg2, span, rights)
            }
            0 if mode == 6 || mode == 4 => {
                self.odd(span, at, value, "a leaf where the level holds none");
                1
            }
            0 => {
                if address & ((1 << item_lg2) - 1) != 0 {
                    self.odd(span, at, value, "the address of a large leaf is not aligned to it");
                }
                self.leaf(RawLeaf { span, oa: Oa::new(address), read: rights.0, write: rights.1, dirty: value >> 6 & 1 == 1 });
                1
            }
            below if below == mode - 1 => {
                if value & (1 << 5 | 1 << 6) != 0 || rights != (true, true) {
                    self.odd(span, at, value, "a pointer to a table with accessed, dirty or narrowed permissions");
                }
                self.table(Oa::new(address), below, span.start().get(), rights);
                1
            }
            _ => {
                self.odd(span, at, value, "a pointer that skips levels or points up");
                1
            }
        }
    }

    /// A leaf over several slots: all of them hold its value, but for the dirty bit.
    #[expect(clippy::too_many_arguments, reason = "one entry, its place and its surroundings")]
    fn sized_leaf(
        &mut self,
        table: Oa,
        index: u64,
        value: u64,
        size_lg2: u32,
        item_lg2: u32,
        span: Span<Iova>,
        rights: (bool, bool),
    ) -> u64 {
        const DIRTY: u64 = 1 << 6;
        let slots = 1u64 << (size_lg2 - item_lg2);
        let first = index / slots * slots;
        let whole = Span::block(span.start(), size_lg2 as u8);
        let (mut dirty, mut odd) = (false, None);
        for slot in first..first + slots {
            let at = Oa::new(table.get() + 8 * slot);
            let other = (self.word)(at).unwrap_or(0);
            dirty |= other & DIRTY != 0;
            if other & !DIRTY != value & !DIRTY {
                odd = odd.or(Some((at, other)));
            }
        }
        if let Some((at, other)) = odd {
            // Which of them is wrong nobody knows: the leaf is.
            self.odd(whole, at, other, "a slot of a large leaf differs from the first");
        }
        let oa = Oa::new((value & 0x000f_ffff_ffff_f000) >> size_lg2 << size_lg2);
        self.leaf(RawLeaf { span: whole, oa, read: rights.0, write: rights.1, dirty });
        first + slots - index
    }

    fn leaf(&mut self, leaf: RawLeaf) {
        self.tree.leaves.push(leaf);
    }

    fn odd(&mut self, span: Span<Iova>, at: Oa, value: u64, why: &'static str) {
        self.tree.oddities.push(RawOddity { span, at, value, why });
    }
}
