//! What can happen to a guest, as data. A step names places and devices by numbers that are taken modulo what there is when its turn comes, so every part of
//! a history is a history: that is what lets a failing one shrink.

use lockstep_iommu::Owner;
use proptest::collection::vec;
use proptest::prelude::*;

/// One step.
#[derive(Clone, Debug)]
pub enum Step {
    /// Devices access pages.
    Access(Vec<Touch>),
    /// Pages of any sizes change owner in one batch.
    Convert(Vec<(Stretch, Owner)>),
    /// As that, and the fallible step of that number fails, if it has so many.
    ConvertFails(u64, Stretch, Owner),
    /// The guest accepts pages or gives them up, 4 KiB at a time.
    Pvalidate(Stretch, bool),
    /// What VMPL 1 may do with pages.
    Adjust(Stretch, Rights),
    /// Pages go back to the host.
    Punch(Stretch),
    /// Absent ones come back.
    Populate(Stretch),
    /// A pass that merges, from a page on, so many pages.
    Merge(u16, u16),
    /// The second memslot comes or goes, if it is not so already.
    Memory(bool),
    /// It comes to its other address; when it is there it goes first.
    Move,
    /// A device comes or goes, likewise.
    Attach(Who, bool),
    /// The trusted device enters or leaves RUN.
    Run(bool),
    /// A second address space shows a part of the first memslot.
    MapElsewhere(Stretch),
    /// One of those goes.
    UnmapElsewhere(u8),
    /// The device with a cache of its own answers invalidations no more, or does again.
    Mute(bool),
    /// It is reset.
    Reset,
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    /// By whom.
    pub who: Who,
    /// In the second memslot.
    pub more: bool,
    /// Which page.
    pub page: u16,
    /// What is written; 0 reads.
    pub writes: u8,
}

/// Devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// Sees shared memory alone.
    Untrusted,
    /// In RUN, with the rights of VMPL 0.
    Trusted,
    /// In RUN, with the rights of VMPL 1.
    Level1,
    /// Untrusted, with a cache of its own.
    Ats,
    /// Of the second address space.
    Elsewhere,
}

/// What VMPL 1 may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rights {
    None,
    Read,
    Write,
}

/// Pages of one memslot in a row, cut off at its end.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Of the second one.
    pub more: bool,
    /// First.
    pub first: u16,
    /// How many.
    pub pages: u16,
}

/// Mostly among the first, so that steps meet.
fn first() -> impl Strategy<Value = u16> {
    prop_oneof![3 => 0..16u16, 1 => any::<u16>()]
}

/// A page, a few, many, whole 2 MiB blocks, all of it.
fn stretch() -> impl Strategy<Value = Stretch> {
    let shape = prop_oneof![
        20 => (first(), 1..=8u16),
        3 => (first(), 1..=700u16),
        3 => (0..4u16).prop_map(|block| (block * 512, 512)),
        1 => Just((0, u16::MAX)),
    ];
    (proptest::bool::weighted(0.25), shape).prop_map(|(more, (first, pages))| Stretch { more, first, pages })
}

fn owner() -> impl Strategy<Value = Owner> {
    prop_oneof![3 => Just(Owner::Private), 2 => Just(Owner::Shared)]
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![Just(Who::Untrusted), Just(Who::Trusted), Just(Who::Level1), Just(Who::Ats)]
}

fn touch() -> impl Strategy<Value = Touch> {
    let who = prop_oneof![4 => who(), 1 => Just(Who::Trusted), 1 => Just(Who::Level1), 1 => Just(Who::Elsewhere)];
    let writes = prop_oneof![Just(0), 1..=u8::MAX];
    (who, proptest::bool::weighted(0.25), first(), writes).prop_map(|(who, more, page, writes)| Touch { who, more, page, writes })
}

fn step() -> impl Strategy<Value = Step> {
    let rights = prop_oneof![1 => Just(Rights::None), 2 => Just(Rights::Read), 2 => Just(Rights::Write)];
    prop_oneof![
        20 => vec(touch(), 1..=8).prop_map(Step::Access),
        6 => vec((stretch(), owner()), 1..=3).prop_map(Step::Convert),
        1 => (prop_oneof![3 => 1..=3u64, 1 => 4..=8u64], stretch(), owner()).prop_map(|(nth, stretch, to)| Step::ConvertFails(nth, stretch, to)),
        6 => (stretch(), proptest::bool::weighted(0.9)).prop_map(|(stretch, accept)| Step::Pvalidate(stretch, accept)),
        4 => (stretch(), rights).prop_map(|(stretch, rights)| Step::Adjust(stretch, rights)),
        2 => stretch().prop_map(Step::Punch),
        4 => stretch().prop_map(Step::Populate),
        2 => prop_oneof![Just((0, u16::MAX)), any::<(u16, u16)>()].prop_map(|(from, most)| Step::Merge(from, most)),
        2 => proptest::bool::weighted(0.7).prop_map(Step::Memory),
        1 => Just(Step::Move),
        2 => (who(), proptest::bool::weighted(0.8)).prop_map(|(who, there)| Step::Attach(who, there)),
        1 => proptest::bool::weighted(0.8).prop_map(Step::Run),
        2 => stretch().prop_map(Step::MapElsewhere),
        1 => any::<u8>().prop_map(Step::UnmapElsewhere),
        1 => proptest::bool::weighted(0.3).prop_map(Step::Mute),
        2 => Just(Step::Reset),
    ]
}

/// Steps that go together when a history shrinks, before they go alone.
const GROUP: usize = 20;

/// Histories of at most so many steps, in groups. The number is of those that are taken, and comes first: a failure shrinks to its last step, then loses the
/// groups and steps that do not matter, then the rest become simple.
pub fn groups(most: usize) -> impl Strategy<Value = (usize, Vec<Vec<Step>>)> {
    (0..=most, vec(vec(step(), 1..=GROUP), 0..=most / GROUP))
}
