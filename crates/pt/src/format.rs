//! The contract between the algorithm and a hardware format: how an entry is read, how leaves and table pointers are written, and what the
//! hardware promises about changes under its eyes.

use addr::{Iova, Lg2, Oa, SizeSet, Span};
use core::fmt;

/// What a device may do through a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Perm(u8);

impl Perm {
    /// No access.
    pub const NONE: Self = Self(0);
    /// The device may read.
    pub const READ: Self = Self(1);
    /// The device may write.
    pub const WRITE: Self = Self(2);
    /// Both.
    pub const RW: Self = Self(3);

    /// From the two answers.
    #[inline]
    pub const fn of(read: bool, write: bool) -> Self {
        Self(read as u8 | (write as u8) << 1)
    }

    /// Whether everything in `wanted` is allowed.
    #[inline]
    pub const fn allows(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }

    /// What both allow.
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Bit 0 read, bit 1 write.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["none", "r", "w", "rw"][usize::from(self.0 & 3)])
    }
}

/// Which [`Perm`]s a format can say.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PermSet(u8);

impl PermSet {
    /// All four.
    pub const ALL: Self = Self::of(&[Perm::NONE, Perm::READ, Perm::WRITE, Perm::RW]);
    /// Those that give something: of formats that have no other way to say "not present".
    pub const SOME: Self = Self::of(&[Perm::READ, Perm::WRITE, Perm::RW]);
    /// Reading, with or without writing: of formats in which whatever is present can be read.
    pub const READABLE: Self = Self::of(&[Perm::READ, Perm::RW]);

    /// From a list.
    pub const fn of(perms: &[Perm]) -> Self {
        let (mut set, mut next) = (0, 0);
        while next < perms.len() {
            set |= 1 << perms[next].0;
            next += 1;
        }
        Self(set)
    }

    /// Whether the format can say exactly this.
    #[inline(always)]
    pub const fn has(self, perm: Perm) -> bool {
        self.0 >> perm.0 & 1 == 1
    }

    /// The least of them that allows all of `perm`: for callers that would rather give a device more than nothing, as hardware drivers do.
    ///
    /// ```
    /// use lockstep_pt::{Perm, PermSet};
    /// assert_eq!(PermSet::READABLE.covering(Perm::WRITE), Some(Perm::RW));
    /// ```
    pub fn covering(self, perm: Perm) -> Option<Perm> {
        self.iter().find(|own| own.allows(perm))
    }

    /// Every one of them, the least first.
    pub fn iter(self) -> impl Iterator<Item = Perm> {
        (0..4).map(Perm).filter(move |perm| self.has(*perm))
    }
}

/// One way in which hardware can be told to use a format; see [`Format::CONFIGS`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// What is chosen, for reports.
    pub name: &'static str,
    /// Level of the top table of a new tree.
    pub start_level: u8,
    /// The leaf sizes that the hardware has; sizes that the format lacks do not matter.
    pub sizes: SizeSet,
}

/// An entry, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// No translation; a device's access faults here.
    Absent,
    /// Points to a table one level down.
    Table(Oa),
    /// Translates.
    Leaf {
        /// Size of the whole leaf, which may fill several slots.
        size: Lg2,
        /// Output address of the leaf's first byte.
        oa: Oa,
        /// What it allows.
        perm: Perm,
        /// Whether this slot's dirty bit is set.
        dirty: bool,
    },
}

/// Whether hardware of this format may walk while a live leaf is replaced by a table, or the reverse.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hitless {
    /// Allowed; the string says where that is written.
    Yes(&'static str),
    /// The entry must be hidden from the hardware and invalidated before it may change (break-before-make): for that moment, DMA to all of
    /// the leaf faults, to the part that does not change as well. The string says where that is written.
    BreakFirst(&'static str),
}

impl Hitless {
    /// Whether it is allowed.
    pub const fn is_allowed(self) -> bool {
        matches!(self, Self::Yes(_))
    }

    /// Where it is written.
    pub const fn source(self) -> &'static str {
        let (Self::Yes(source) | Self::BreakFirst(source)) = self;
        source
    }
}

/// A page-table format of some hardware. Functions are pure; nothing here touches memory.
///
/// What cannot work does not compile: a format that lists no configuration, or one whose top table is not a table of its own.
///
/// ```compile_fail,E0080
/// use lockstep_pt::*;
/// # use addr::{Lg2, Oa, SizeSet};
/// #[derive(Clone, Copy)]
/// struct Untested;
/// impl Format for Untested {
///     const CONFIGS: &'static [Config] = &[];
///     // The rest is that of another format.
/// #   const NAME: &'static str = "untested";
/// #   const GRANULE_LG2: u8 = Toy::GRANULE_LG2;
/// #   const INDEX_LG2: u8 = Toy::INDEX_LG2;
/// #   const START_LEVEL: u8 = Toy::START_LEVEL;
/// #   const MAX_LEVEL: u8 = Toy::MAX_LEVEL;
/// #   const INPUT_LG2: u8 = Toy::INPUT_LG2;
/// #   const OUTPUT_LG2: u8 = Toy::OUTPUT_LG2;
/// #   const SIZES: SizeSet = Toy::SIZES;
/// #   const PERMS: PermSet = Toy::PERMS;
/// #   const DIRTY: u64 = Toy::DIRTY;
/// #   const HITLESS: Hitless = Toy::HITLESS;
/// #   fn decode(entry: u64, level: u8) -> Entry { Toy::decode(entry, level) }
/// #   fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64 { Toy::leaf(level, size, oa, perm) }
/// #   fn table(level: u8, oa: Oa) -> u64 { Toy::table(level, oa) }
/// }
/// let arena = Arena::new(Vec::new().into_boxed_slice(), Oa::new(0), Untested::INDEX_LG2);
/// let _table = Table::<Untested, Box<[AtomicU64]>>::new(arena);
/// ```
pub trait Format: Copy + Send + Sync + 'static {
    /// Name on the command line and in reports.
    const NAME: &'static str;
    /// Size of the smallest leaf.
    const GRANULE_LG2: u8;
    /// Entries per table.
    const INDEX_LG2: u8;
    /// Level of the top table of a new tree.
    const START_LEVEL: u8;
    /// Highest level that a tree can grow to.
    const MAX_LEVEL: u8;
    /// Width of an input address at the highest level.
    const INPUT_LG2: u8;
    /// Width of an output address.
    const OUTPUT_LG2: u8;
    /// Every leaf size, multi-slot ones included.
    const SIZES: SizeSet;
    /// The permissions that a leaf can say. Others are refused, never rounded.
    const PERMS: PermSet;
    /// The dirty bit of a leaf; 0 when the format has none. Every leaf carries it down to its pieces and up into what it becomes part of,
    /// so a bit that says something else in some leaf must not be this one.
    const DIRTY: u64;
    /// Whether a leaf may be cut and merged under a walking device.
    const HITLESS: Hitless;
    /// Where [`HITLESS`](Self::HITLESS) says break-before-make: the bit without which a device finds nothing, while the other bits, which
    /// hardware then ignores, still tell what the leaf was. Without meaning otherwise.
    const VALID: u64 = 1;
    /// The configurations in which hardware can be told to use the format: what the conformance suite goes through. One at least.
    const CONFIGS: &'static [Config];

    /// Reads an entry found at `level`. Reserved or impossible encodings are `Absent`: hardware faults on them.
    fn decode(entry: u64, level: u8) -> Entry;
    /// The value of a leaf at `level`. `oa` is a multiple of `size`, which is one of the level's sizes.
    fn leaf(level: u8, size: Lg2, oa: Oa, perm: Perm) -> u64;
    /// The value of a pointer, at `level`, to the table at `oa`.
    fn table(level: u8, oa: Oa) -> u64;

    /// The same leaf, written to by a device. A leaf in which the bit would say something else stays what it is.
    #[inline(always)]
    fn dirtied(leaf: u64) -> u64 {
        leaf | Self::DIRTY
    }

    /// What the value of a leaf over several slots of a table at `level` grows by from slot to slot: 0 where all slots hold one value.
    #[inline(always)]
    fn slot_step(_level: u8) -> u64 {
        0
    }

    /// What the value of a leaf grows by from one leaf of `size` to the next, where output addresses go up with it.
    #[inline(always)]
    fn step(size: Lg2) -> u64 {
        size.bytes()
    }

    /// Logarithm of what one slot of a table at `level` covers.
    #[inline(always)]
    fn item_lg2(level: u8) -> u8 {
        Self::GRANULE_LG2 + Self::INDEX_LG2 * level
    }

    /// The level whose tables hold leaves of `size`.
    #[inline(always)]
    fn level_of(size: Lg2) -> u8 {
        (size.0 - Self::GRANULE_LG2) / Self::INDEX_LG2
    }

    /// Which slot of a table at `level` answers for `iova`.
    #[inline(always)]
    fn slot(iova: Iova, level: u8) -> usize {
        ((iova.get() >> Self::item_lg2(level)) & ((1 << Self::INDEX_LG2) - 1)) as usize
    }

    /// Last IOVA that a top table at `level` reaches.
    #[inline(always)]
    fn reach(level: u8) -> Iova {
        let lg2 = (Self::item_lg2(level) + Self::INDEX_LG2).min(Self::INPUT_LG2);
        Iova::new(if lg2 >= 64 { u64::MAX } else { (1 << lg2) - 1 })
    }

    /// Everything that the format can translate.
    fn aperture() -> Span<Iova> {
        Span::of(Iova::new(0), Self::reach(Self::MAX_LEVEL))
    }
}

/// What a format says about itself, checked where a table of it is made. A constant, so that what is wrong does not compile.
pub(crate) const fn check<F: Format>() {
    assert!(!F::CONFIGS.is_empty(), "a format lists the configurations that it can be used in");
    let mut next = 0;
    while next < F::CONFIGS.len() {
        assert!(F::CONFIGS[next].start_level <= F::MAX_LEVEL, "a configuration begins above the format's highest level");
        assert!(F::CONFIGS[next].sizes.0 & F::SIZES.0 != 0, "a configuration has none of the format's leaf sizes");
        next += 1;
    }
    assert!(F::START_LEVEL <= F::MAX_LEVEL, "a new tree is higher than a tree can be");
    assert!(F::MAX_LEVEL < 7, "a level does not fit the low bits of a top word");
    assert!(F::SIZES.0.trailing_zeros() == F::GRANULE_LG2 as u32, "the granule is the smallest leaf");
    assert!(F::SIZES.0 >> F::OUTPUT_LG2 == 0, "a leaf is larger than all that it can point to");
    assert!(F::OUTPUT_LG2 <= 58, "an output address leaves no room for the size of a region");
    assert!(F::HITLESS.is_allowed() || F::VALID.count_ones() == 1, "break-before-make takes one bit that hides a leaf");
    assert!(F::DIRTY == 0 || F::DIRTY.count_ones() == 1 && F::DIRTY != F::VALID, "the dirty bit is one bit");
}
