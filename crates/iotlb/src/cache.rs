//! Cached translations of one DMA context: no lock, no atomics, because nobody else looks at it (D-2).
//!
//! Leaves have many sizes, so an address is looked for once per size that is in the cache; the size of the last hit comes first. Within a size an entry
//! has two homes of two places each, and each home is one cache line. An entry that found its first home full leaves a mark there, so
//! most lookups look at one line. That keeps a cache that is half full nearly free of conflicts.

use addr::{Address, Iova, Lg2, Span};
use pt::Perm;

/// The tag of an entry: its first IOVA, whose low bits are free, and in these the size and four flags.
const LG2: u64 = 0x3f;
const PERM_SHIFT: u32 = 6;
const PERM: u64 = 3 << PERM_SHIFT;
/// The leaf's dirty bit was set through this entry.
const DIRTY: u64 = 1 << 8;
/// On the first place of a home: something that belongs here lives in its second home.
const SPILLED: u64 = 1 << 9;
/// The smallest leaf that leaves the low bits of its first IOVA to the tag.
const LEAST_LG2: u8 = 10;
const KEY: u64 = !(PERM | DIRTY | SPILLED);

const GOLDEN: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];

#[derive(Clone, Copy, Default)]
struct Entry<V> {
    /// 0: empty. No key is 0, because no leaf has size 0.
    tag: u64,
    value: V,
}

/// A home: two entries in one cache line, when `V` takes 24 bytes.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Home<V>([Entry<V>; 2]);

/// A cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit<V> {
    /// First IOVA of the leaf.
    pub start: Iova,
    /// Size of the leaf.
    pub size: Lg2,
    /// What it allows.
    pub perm: Perm,
    /// Whether [`Iotlb::set_dirty`] was called for it since it was filled.
    pub dirty: bool,
    /// What was given to [`Iotlb::fill`].
    pub value: V,
    /// Home and place.
    at: (usize, usize),
}

impl<V: Copy> Hit<V> {
    #[inline(always)]
    fn of(entry: &Entry<V>, at: (usize, usize)) -> Self {
        let lg2 = (entry.tag & LG2) as u8;
        let perm = Perm::of(entry.tag >> PERM_SHIFT & 1 != 0, entry.tag >> PERM_SHIFT & 2 != 0);
        let start = Iova::new(entry.tag >> lg2 << lg2);
        Self { start, size: Lg2(lg2), perm, dirty: entry.tag & DIRTY != 0, value: entry.value, at }
    }

    /// A translation that is in no cache.
    pub fn uncached(start: Iova, size: Lg2, perm: Perm, value: V) -> Self {
        Self { start, size, perm, dirty: false, value, at: (0, 0) }
    }
}

/// How a cache fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IotlbStats {
    /// Lookups that were answered.
    pub hits: u64,
    /// Lookups that were not.
    pub misses: u64,
    /// Entries that made room for others.
    pub evictions: u64,
    /// Times that everything was dropped at once.
    pub flushes: u64,
}

/// A cache of translations; `V` is what they lead to.
///
/// ```
/// use addr::{Address, Iova, Lg2, Span};
/// use pt::Perm;
/// let mut iotlb = lockstep_iotlb::Iotlb::new(16_384);
/// iotlb.fill(Iova::new(0x20_0000), Lg2::M2, Perm::RW, "there");
/// assert_eq!(iotlb.lookup(Iova::new(0x3f_ffff)).unwrap().value, "there");
/// iotlb.invalidate(Span::one(Iova::new(0x30_0000)));
/// assert!(iotlb.lookup(Iova::new(0x3f_ffff)).is_none());
/// ```
pub struct Iotlb<V> {
    homes: Box<[Home<V>]>,
    shift: u32,
    /// Sizes that have entries, and how many each.
    sizes: u64,
    counts: [u32; 64],
    /// Size of the last hit.
    recent: u8,
    /// Which place is given up next.
    turn: bool,
    stats: IotlbStats,
}

impl<V: Copy + Default> Iotlb<V> {
    /// Room for at least `entries` translations, 32 bytes each when `V` takes 24; rounded up to a power of two, at least 16.
    pub fn new(entries: usize) -> Self {
        let homes = (entries.clamp(16, 1 << 28) / 2).next_power_of_two();
        Self {
            homes: vec![Home::default(); homes].into_boxed_slice(),
            shift: 64 - homes.trailing_zeros(),
            sizes: 0,
            counts: [0; 64],
            recent: addr::PAGE_LG2,
            turn: false,
            stats: IotlbStats::default(),
        }
    }

    /// The cached translation of `iova`.
    #[inline(always)]
    pub fn lookup(&mut self, iova: Iova) -> Option<Hit<V>> {
        match self.probe(iova) {
            Some(hit) => {
                self.stats.hits += 1;
                Some(hit)
            }
            None => self.lookup_other(iova),
        }
    }

    /// The cached translation of `iova` if it is where most are: of the size that the last lookup had, in its first home. It is counted by
    /// [`Iotlb::count_hit`], when it is used.
    #[inline(always)]
    pub fn probe(&self, iova: Iova) -> Option<Hit<V>> {
        let lg2 = self.recent;
        let block = iova.get() >> lg2;
        let first = self.home(0, block, lg2);
        let places = &self.homes[first].0;
        among(places, key(block, lg2)).map(|place| Hit::of(&places[place], (first, place)))
    }

    /// What a [`Iotlb::probe`] found is used, as if a [`Iotlb::lookup`] had found it.
    #[inline(always)]
    pub fn count_hit(&mut self) {
        self.stats.hits += 1;
    }

    #[cold]
    #[inline(never)]
    fn lookup_other(&mut self, iova: Iova) -> Option<Hit<V>> {
        let mut sizes = self.sizes;
        while sizes != 0 {
            // The size of the last hit first.
            let lg2 = if sizes >> self.recent & 1 != 0 { self.recent } else { sizes.trailing_zeros() as u8 };
            if let Some(at) = self.find(iova.get(), lg2) {
                self.recent = lg2;
                self.stats.hits += 1;
                return Some(Hit::of(&self.homes[at.0].0[at.1], at));
            }
            sizes &= !(1 << lg2);
        }
        self.stats.misses += 1;
        None
    }

    /// Home and place of the entry of this size for `iova`.
    fn find(&self, iova: u64, lg2: u8) -> Option<(usize, usize)> {
        let block = iova >> lg2;
        let first = self.home(0, block, lg2);
        let places = &self.homes[first].0;
        if let Some(place) = among(places, key(block, lg2)) {
            return Some((first, place));
        }
        if places[0].tag & SPILLED == 0 {
            return None;
        }
        let second = self.home(1, block, lg2);
        among(&self.homes[second].0, key(block, lg2)).map(|place| (second, place))
    }

    #[inline(always)]
    fn home(&self, which: usize, block: u64, lg2: u8) -> usize {
        // Multiplication by the golden ratio spreads runs and power-of-two strides evenly.
        ((block ^ u64::from(lg2) << 57).wrapping_mul(GOLDEN[which]) >> self.shift) as usize
    }

    /// Puts in the leaf of `size` that begins at `start`; what was known of exactly this leaf is replaced. Answers what a lookup would.
    pub fn fill(&mut self, start: Iova, size: Lg2, perm: Perm, value: V) -> Hit<V> {
        debug_assert!(start.is_aligned(size.0) && (LEAST_LG2..64).contains(&size.0), "no leaf of {size} at {start}");
        let block = start.get() >> size.0;
        let tag = block << size.0 | u64::from(size.0) | u64::from(perm.bits()) << PERM_SHIFT;
        let at = match self.find(start.get(), size.0) {
            Some(at) => at,
            None => {
                self.counts[usize::from(size.0)] += 1;
                self.sizes |= 1 << size.0;
                self.place(block, size.0)
            }
        };
        let entry = &mut self.homes[at.0].0[at.1];
        *entry = Entry { tag: tag | entry.tag & SPILLED, value };
        Hit { start, size, perm, dirty: false, value, at }
    }

    /// A free place for an entry, or the place of one that goes.
    fn place(&mut self, block: u64, lg2: u8) -> (usize, usize) {
        let empty = |home: &Home<V>| home.0.iter().position(|entry| entry.tag & KEY == 0);
        let first = self.home(0, block, lg2);
        if let Some(place) = empty(&self.homes[first]) {
            return (first, place);
        }
        let second = self.home(1, block, lg2);
        if let Some(place) = empty(&self.homes[second]) {
            self.homes[first].0[0].tag |= SPILLED;
            return (second, place);
        }
        for at in [(first, 0), (first, 1), (second, 0), (second, 1)] {
            if self.move_away(at) {
                if at.0 == second {
                    self.homes[first].0[0].tag |= SPILLED;
                }
                return at;
            }
        }
        self.turn = !self.turn;
        self.stats.evictions += 1;
        let at = (first, usize::from(self.turn));
        self.remove(at);
        at
    }

    /// Moves an entry to its other home, if that has a place.
    fn move_away(&mut self, at: (usize, usize)) -> bool {
        let entry = self.homes[at.0].0[at.1];
        let lg2 = (entry.tag & LG2) as u8;
        let homes = [0, 1].map(|which| self.home(which, entry.tag >> lg2, lg2));
        let other = homes[usize::from(homes[0] == at.0)];
        let Some(place) = self.homes[other].0.iter().position(|entry| entry.tag & KEY == 0) else { return false };
        let to = &mut self.homes[other].0[place];
        *to = Entry { tag: entry.tag & !SPILLED | to.tag & SPILLED, ..entry };
        if other == homes[1] {
            self.homes[homes[0]].0[0].tag |= SPILLED;
        }
        self.homes[at.0].0[at.1].tag &= SPILLED;
        true
    }

    fn remove(&mut self, (home, place): (usize, usize)) {
        let tag = &mut self.homes[home].0[place].tag;
        let lg2 = *tag & LG2;
        *tag &= SPILLED;
        let count = &mut self.counts[lg2 as usize];
        *count -= 1;
        if *count == 0 {
            self.sizes &= !(1 << lg2);
        }
    }

    /// Notes that the leaf's dirty bit is set, so that later writes need not set it again. `hit` is what the latest lookup answered.
    #[inline]
    pub fn set_dirty(&mut self, hit: &Hit<V>) {
        let tag = &mut self.homes[hit.at.0].0[hit.at.1].tag;
        if *tag & KEY == hit.start.get() | u64::from(hit.size.0) {
            *tag |= DIRTY;
        }
    }

    /// Drops every translation of any address in `span`, and nothing else.
    pub fn invalidate(&mut self, span: Span<Iova>) {
        // Looking for each block costs about as much as looking at a home or two.
        let most = self.homes.len() as u64 / 4;
        let mut scan = 0;
        let mut sizes = self.sizes;
        while sizes != 0 {
            let lg2 = sizes.trailing_zeros() as u8;
            sizes &= sizes - 1;
            let (first, last) = (span.start().get() >> lg2, span.last().get() >> lg2);
            if last - first >= most {
                scan |= 1 << lg2;
                continue;
            }
            for block in first..=last {
                if let Some(at) = self.find(block << lg2, lg2) {
                    self.remove(at);
                }
            }
        }
        if scan != 0 {
            self.scan(span, scan);
        }
    }

    fn scan(&mut self, span: Span<Iova>, sizes: u64) {
        for home in 0..self.homes.len() {
            for place in 0..2 {
                let tag = self.homes[home].0[place].tag;
                let lg2 = (tag & LG2) as u8;
                if lg2 != 0 && sizes >> lg2 & 1 != 0 && span.overlaps(Span::block(Iova::new(tag >> lg2 << lg2), lg2)) {
                    self.remove((home, place));
                }
            }
        }
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        self.stats.flushes += 1;
        if self.sizes != 0 {
            self.homes.iter_mut().for_each(|home| home.0.iter_mut().for_each(|entry| entry.tag = 0));
            self.counts = [0; 64];
            self.sizes = 0;
        }
    }

    /// Translations that are cached.
    pub fn len(&self) -> usize {
        self.counts.iter().map(|&count| count as usize).sum()
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.sizes == 0
    }

    /// How many translations fit.
    pub fn capacity(&self) -> usize {
        self.homes.len() * 2
    }

    /// Counters since the cache was made.
    pub fn stats(&self) -> IotlbStats {
        self.stats
    }
}

#[inline(always)]
fn key(block: u64, lg2: u8) -> u64 {
    block << lg2 | u64::from(lg2)
}

/// Which of a home's two places has the key. It cannot be guessed, so it is not branched on.
#[inline(always)]
fn among<V>(places: &[Entry<V>; 2], key: u64) -> Option<usize> {
    let (here, there) = (places[0].tag & KEY == key, places[1].tag & KEY == key);
    (here | there).then_some(usize::from(there))
}

impl<V> std::fmt::Debug for Iotlb<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iotlb").field("homes", &self.homes.len()).field("stats", &self.stats).finish_non_exhaustive()
    }
}
