//! A second reader of page tables, for audits. It knows the specifications and nothing of the code that writes the tables: it takes words by
//! physical address, looks at every entry of every table, and calls anything odd by its place and value. Each specification is a file of its
//! own, typed anew; not a constant is shared with the writer's.
//!
//! Odd is also what hardware would put up with and our writer never leaves behind: a bit that is set though nothing uses it, an accessed bit
//! that is clear though it is set beforehand, a leaf that is hidden for a change that has ended.

mod amdv1;
mod armv8;
mod riscv;
mod vtdss;
mod x86_64;

use addr::{Iova, Oa, Span};
use pt::FormatKind;

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

/// What one entry says.
enum Said {
    Nothing,
    Leaf { size_lg2: u32, oa: u64, read: bool, write: bool, dirty: bool },
    Table { oa: u64, read: bool, write: bool },
}

/// An entry as its specification reads it: what it says, and what is wrong with that.
struct Reading {
    said: Said,
    odd: Option<&'static str>,
}

impl Reading {
    fn nothing(value: u64) -> Self {
        Self { said: Said::Nothing, odd: (value != 0).then_some("not present, yet not zero") }
    }

    fn wrong(why: &'static str) -> Self {
        Self { said: Said::Nothing, odd: Some(why) }
    }

    /// The first of the findings whose condition holds.
    fn with(said: Said, findings: &[(bool, &'static str)]) -> Self {
        Self { said, odd: findings.iter().find(|(holds, _)| *holds).map(|(_, why)| *why) }
    }
}

const UNUSED_BIT: &str = "a reserved or unused bit is set";
const NOT_ALIGNED: &str = "the address of a large leaf is not aligned to it";
const NARROW_TABLE: &str = "a pointer to a table with accessed, dirty or narrowed permissions";
const NO_LEAF_HERE: &str = "a leaf where the level holds none";
const NOT_ACCESSED: &str = "a leaf whose accessed bit is clear";

/// One specification.
struct Rules {
    /// What one slot of the lowest table translates.
    granule_lg2: u32,
    /// Width of an input address.
    input_lg2: u32,
    /// How many levels of tables there can be.
    modes: std::ops::RangeInclusive<u8>,
    /// Bits of a leaf that hardware changes, each slot of a leaf for itself.
    marks: u64,
    /// What the value of a leaf over several slots grows by from slot to slot, at a level where one slot translates that much.
    slot_step: fn(item: u64) -> u64,
    /// Reads an entry of a table of mode `mode`, whose slots translate `1 << item_lg2` bytes each.
    read: fn(&Rules, value: u64, mode: u8, item_lg2: u32) -> Reading,
}

fn rules(format: FormatKind) -> Option<Rules> {
    Some(match format {
        FormatKind::AmdV1 => amdv1::rules(12),
        FormatKind::AmdV1K2 => amdv1::rules(11),
        FormatKind::VtdSs3 => vtdss::rules(3),
        FormatKind::VtdSs4 => vtdss::rules(4),
        FormatKind::VtdSs5 => vtdss::rules(5),
        FormatKind::X86Levels4 => x86_64::rules(4),
        FormatKind::X86Levels5 => x86_64::rules(5),
        FormatKind::Sv39 => riscv::rules(3),
        FormatKind::Sv48 => riscv::rules(4),
        FormatKind::Sv57 => riscv::rules(5),
        FormatKind::Armv8S2 | FormatKind::Armv8S2Bbml2 => armv8::rules(4),
        FormatKind::Armv8S2Bits39 => armv8::rules(3),
        _ => return None,
    })
}

struct Walk<'a> {
    rules: Rules,
    word: &'a dyn Fn(Oa) -> Option<u64>,
    within: Span<Iova>,
    tree: RawTree,
}

/// Reads the tree of `format` whose top table is at `root`, of `mode` levels as a device table entry would say it, and answers everything
/// that meets `within`. `word` reads eight bytes of table memory. Of a format that this reader does not know, the whole answer is one
/// oddity.
pub fn read_tree(format: FormatKind, word: &dyn Fn(Oa) -> Option<u64>, root: Oa, mode: u8, within: Span<Iova>) -> RawTree {
    let whole_answer = |why| RawTree { oddities: vec![RawOddity { span: within, at: root, value: 0, why }], ..RawTree::default() };
    match rules(format) {
        None => whole_answer("a page table in a format that the audit cannot read"),
        Some(rules) if !rules.modes.contains(&mode) => whole_answer("a tree of a height that its format does not have"),
        Some(rules) => {
            let mut walk = Walk { rules, word, within, tree: RawTree::default() };
            walk.table(root, mode, 0, (true, true));
            walk.tree
        }
    }
}

impl Walk<'_> {
    fn table(&mut self, table: Oa, mode: u8, first_iova: u64, rights: (bool, bool)) {
        self.tree.tables += 1;
        let item_lg2 = self.item_lg2(mode);
        // Of a top table, what lies within the width of an address: 128 entries in mode 6 of AMDv1, half of them where the upper half of a
        // sign-extended space is not used.
        let entries = ENTRIES.min(1 << (self.rules.input_lg2 - item_lg2));
        let item = 1u64 << item_lg2;
        let last_iova = (u128::from(first_iova) + u128::from(item) * u128::from(entries) - 1) as u64;
        let whole = Span::of(Iova::new(first_iova), Iova::new(last_iova));
        self.tree.places.push((table, whole));
        for index in entries..ENTRIES {
            let at = Oa::new(table.get() + 8 * index);
            if let Some(value) = (self.word)(at).filter(|value| *value != 0) {
                self.odd(whole, at, value, "an entry beyond the last address");
            }
        }
        let Some(part) = whole.intersect(self.within) else { return };
        let mut index = (part.start().get() - first_iova) / item;
        let high = (part.last().get() - first_iova) / item;
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
        let item_lg2 = self.item_lg2(mode);
        let Reading { said, odd } = (self.rules.read)(&self.rules, value, mode, item_lg2);
        if let Some(why) = odd {
            self.odd(span, at, value, why);
        }
        match said {
            Said::Nothing => 1,
            Said::Table { oa, read, write } => {
                self.table(Oa::new(oa), mode - 1, span.start().get(), (rights.0 && read, rights.1 && write));
                1
            }
            Said::Leaf { size_lg2, oa, read, write, dirty } => {
                let span = Span::block(span.start(), size_lg2 as u8);
                let mut leaf = RawLeaf { span, oa: Oa::new(oa), read: rights.0 && read, write: rights.1 && write, dirty };
                let slots = 1u64 << (size_lg2 - item_lg2);
                let first = index / slots * slots;
                if slots > 1 {
                    self.other_slots(table, mode, index, value, first..first + slots, &mut leaf);
                }
                self.tree.leaves.push(leaf);
                first + slots - index
            }
        }
    }

    /// A leaf over several slots: each holds what it must, but for what hardware has marked there.
    fn other_slots(&mut self, table: Oa, mode: u8, index: u64, value: u64, slots: std::ops::Range<u64>, leaf: &mut RawLeaf) {
        let item_lg2 = self.item_lg2(mode);
        let step = (self.rules.slot_step)(1 << item_lg2);
        let mut odd = None;
        for slot in slots {
            let at = Oa::new(table.get() + 8 * slot);
            let other = (self.word)(at).unwrap_or(0);
            let wanted = value.wrapping_add(slot.wrapping_sub(index).wrapping_mul(step));
            if (other ^ wanted) & !self.rules.marks != 0 {
                odd = odd.or(Some((at, other)));
            } else if let Said::Leaf { dirty, .. } = (self.rules.read)(&self.rules, other, mode, item_lg2).said {
                leaf.dirty |= dirty;
            }
        }
        if let Some((at, other)) = odd {
            // Which of them is wrong nobody knows: the leaf is.
            self.odd(leaf.span, at, other, "a slot of a large leaf differs from the first");
        }
    }

    fn item_lg2(&self, mode: u8) -> u32 {
        self.rules.granule_lg2 + 9 * (u32::from(mode) - 1)
    }

    fn odd(&mut self, span: Span<Iova>, at: Oa, value: u64, why: &'static str) {
        self.tree.oddities.push(RawOddity { span, at, value, why });
    }
}
