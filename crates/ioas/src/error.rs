//! What an IOAS refuses, with the span that was wrong. One variant for each answer that callers of iommufd can tell apart; the errno is
//! chosen above.

use addr::{Iova, Lg2, Page, Span};
use backing::{PageState, PinError};
use thiserror::Error;

/// Why a call failed. Unless a variant says otherwise, everything is as it was (I-10).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither read nor write was asked for.
    #[error("a mapping needs read or write access")]
    NoAccess,
    /// A length of zero, or a span that wraps or is misaligned.
    #[error(transparent)]
    Span(#[from] addr::SpanError),
    /// The length cannot be placed automatically: it is half of the address space or more.
    #[error("{len:#x} bytes are too many to place automatically; give a fixed IOVA")]
    TooLong {
        /// Bytes asked for.
        len: u64,
    },
    /// The source's place inside its page does not fit the alignment of this IOAS.
    #[error("source offset {offset:#x} is not a multiple of {align:#x}, which this address space needs")]
    SourceMisaligned {
        /// Byte offset in the backing, or the user address.
        offset: u64,
        /// The alignment of the IOAS.
        align: u64,
    },
    /// The backing ends before.
    #[error("{len:#x} bytes at offset {offset:#x} reach behind the end of the backing, {size:#x}")]
    Beyond {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// How many there are.
        size: u64,
    },
    /// The fixed IOVA lies in a reserved range.
    #[error("{span} meets the reserved range {reserved}; choose another place")]
    Reserved {
        /// As it was given.
        span: Span<Iova>,
        /// What it met.
        reserved: Span<Iova>,
    },
    /// The fixed IOVA is taken.
    #[error("{span} meets the area at {area}; unmap that first, or choose another place")]
    Occupied {
        /// As it was given.
        span: Span<Iova>,
        /// What it met.
        area: Span<Iova>,
    },
    /// No gap is large enough.
    #[error("no free IOVA range for {len:#x} bytes aligned to {align:#x}; unmap something or widen the allowed ranges")]
    NoRoom {
        /// Bytes asked for.
        len: u64,
        /// How they had to be aligned.
        align: u64,
    },
    /// Write access to pages that were first mapped for reading only.
    #[error("{span} cannot be mapped for writing: its pages were mapped read-only")]
    ReadOnlyPages {
        /// The span that asked for it, in the source of a copy.
        span: Span<Iova>,
    },
    /// Something in the span is not mapped. An access or an unmap may have done the part before `at`, as its own text says.
    #[error("{at} is not mapped")]
    NotMapped {
        /// The first stretch without an area.
        at: Span<Iova>,
    },
    /// An unmap would cut an area in two. Areas below it are gone already, as in the kernel.
    #[error("unmapping {span} would cut the area at {area}; unmap whole areas")]
    CutsArea {
        /// What was left to unmap.
        span: Span<Iova>,
        /// The area that sticks out.
        area: Span<Iova>,
    },
    /// Another thread is building or removing the area, or a hardware queue lives in it. Areas below it are gone already.
    #[error("the area at {area} is being built or removed, or locked by a hardware queue; try again later")]
    Busy {
        /// Which.
        area: Span<Iova>,
    },
    /// The area does not allow this access. The part before has been done.
    #[error("the area at {area} does not allow this access")]
    Denied {
        /// Which.
        area: Span<Iova>,
    },
    /// An unmap has begun to wait for this area's pins: there are no new ones, and no other access.
    #[error("the area at {area} is about to be unmapped; nothing can be done with it but that")]
    Shut {
        /// Which.
        area: Span<Iova>,
    },
    /// An accessor did not let go of the area, however often it was asked. Areas below it are gone already; it takes no new pins.
    #[error("the area at {area} is still pinned by an accessor that was asked to let go of it; unpin, then unmap again")]
    Deadlock {
        /// Which.
        area: Span<Iova>,
    },
    /// The area has pins, and cannot be split.
    #[error("the area at {area} is pinned; unpin it first")]
    Pinned {
        /// Which.
        area: Span<Iova>,
    },
    /// The area is another device's memory: software can neither pin, touch nor split it.
    #[error("the area at {area} is memory of another device, which only devices can use")]
    DeviceMemory {
        /// Which.
        area: Span<Iova>,
    },
    /// Something to pin does not begin or end with a page, where pages of different areas meet or at the start.
    #[error("{at} does not stand for whole pages; pin from the first byte of a page on, in areas that end with one")]
    NotWholePages {
        /// The piece of the span that lies in one area.
        at: Span<Iova>,
    },
    /// A leaf's size is tied to something else, so it cannot be cut.
    #[error("the leaf at {leaf} cannot be cut at {at}: the rule of this address space allows no smaller leaves there")]
    Uncuttable {
        /// Where to.
        at: Iova,
        /// The leaf.
        leaf: Span<Iova>,
    },
    /// Pages could not be pinned, or not be paid for.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// Writes through the domain are not noted.
    #[error("domain {domain} does not track dirty pages; switch that on first")]
    NotTracking {
        /// The domain.
        domain: u32,
    },
    /// The accessor uses no address space.
    #[error("the accessor uses no address space; move it to one first")]
    Homeless,
    /// A reserved range, an allowed range or an alignment does not go with what is mapped or allowed.
    #[error("{what} does not fit with {span}, which is in use; unmap or free that first")]
    InUse {
        /// What was asked for.
        what: &'static str,
        /// What is in the way.
        span: Span<Iova>,
    },
    /// Two allowed ranges overlap.
    #[error("allowed ranges overlap at {span}")]
    AllowedOverlap {
        /// The second of them.
        span: Span<Iova>,
    },
    /// Large pages cannot be switched off under a domain with areas.
    #[error("large leaves cannot be switched off while {areas} areas are mapped in a domain; do it before the first attach")]
    LargeLeavesInUse {
        /// How many areas there are.
        areas: usize,
    },
    /// The domain's smallest page is larger than the host's.
    #[error("the domain's smallest page is {smallest}, larger than the host's 4 KiB")]
    DomainPages {
        /// Its smallest page.
        smallest: Lg2,
    },
    /// The domain, or the device, is attached already.
    #[error("{what} {id} is attached already; detach it first")]
    Attached {
        /// Domain or device.
        what: &'static str,
        /// Its number.
        id: u32,
    },
    /// The domain, or the device, is not attached here.
    #[error("{what} {id} is not attached to this address space")]
    NotAttached {
        /// Domain or device.
        what: &'static str,
        /// Its number.
        id: u32,
    },
    /// The host may not touch the page. The part before has been done.
    #[error("{page} is {state:?}; software reaches shared pages only")]
    NotShared {
        /// The first such page of the backing.
        page: Page,
        /// What it is.
        state: PageState,
    },
    /// The memory behind the page could not be touched: truncated, punched by somebody else, or never mapped. The part before has been done.
    #[error("the memory of {page} cannot be touched; has the file been truncated?")]
    Fault {
        /// The page of the backing.
        page: Page,
    },
    /// A leaf could not be installed: no table, or the format cannot say it.
    #[error(transparent)]
    Leaf(#[from] pt::MapError),
    /// What the user address lies in has no user address, or another one.
    #[error("user address {hva} lies outside the backing; give one of its own addresses")]
    NoSuchHva {
        /// As it was given.
        hva: addr::Hva,
    },
    /// The calling thread holds a zero-copy slice of a domain, and what it asks for would wait until the slice is gone.
    #[error("this thread holds a DMA slice of domain {domain}; drop it first")]
    HeldByCaller {
        /// The domain.
        domain: u32,
    },
    /// The domain belongs to another IOMMU than this address space.
    #[error("domain {domain} belongs to another IOMMU than this address space")]
    Foreign {
        /// The domain.
        domain: u32,
    },
    /// The IOMMU refused.
    #[error(transparent)]
    Iommu(#[from] iommu::Error),
    /// No memory.
    #[error(transparent)]
    OutOfMemory(#[from] addr::OutOfMemory),
    /// A test made this step fail.
    #[error(transparent)]
    Injected(#[from] sync::fail::Injected),
}

impl From<pt::NoTable> for Error {
    fn from(error: pt::NoTable) -> Self {
        Self::Leaf(error.into())
    }
}
