//! Hardware queues: memory of the guest that an IOMMU reads its commands from. It is pinned, in one piece, and cannot be unmapped (rule 67).

use crate::device::lock;
use crate::driver::QueueMemory;
use crate::ioas_ops::{FLAGS, check_clear, unsupported};
use crate::object::{Head, Held, Object};
use crate::table::{Call, Reply};
use crate::uapi;
use crate::viommu::ViommuObject;
use crate::{Answer, Context, Refusal};
use addr::{Address, Iova, Oa, PAGE_BYTES, PAGE_LG2, Span};
use ioas::{Accessor, AreaLocks, Ioas, Pin};
use rustix::io::Errno;
use std::fmt;
use std::sync::{Arc, Mutex};

/// A hardware queue with an id.
pub(crate) struct HwQueue {
    head: Head,
    kind: u32,
    index: u32,
    viommu: Arc<ViommuObject>,
    keeps: Mutex<Option<Keeps>>,
}

/// What it needs for long; goes in this order.
#[expect(dead_code, reason = "held, not read")]
struct Keeps {
    memory: Memory,
    /// Another queue that must not go first.
    before: Option<Held<HwQueue>>,
    viommu: Held<ViommuObject>,
}

/// The queue's memory, in place as long as this lives.
#[expect(dead_code, reason = "held, not read")]
struct Memory {
    locks: AreaLocks,
    pin: Pin,
    accessor: Arc<Accessor>,
}

impl HwQueue {
    /// Its type and number.
    pub(crate) fn name(&self) -> (u32, u32) {
        (self.kind, self.index)
    }
}

impl Object for HwQueue {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "hardware queue"
    }

    fn destroy(&self, _: &Context) {
        self.viommu.own().remove_queue(self.kind, self.index);
        self.viommu.remove_queue(self.name());
        drop(lock(&self.keeps).take());
    }
}

impl fmt::Debug for HwQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HwQueue").field("kind", &self.kind).field("index", &self.index).finish_non_exhaustive()
    }
}

/// Pins the pages of `span`, which must lie one behind the other; answers the output address of its first byte.
fn pin(ioas: &Arc<Ioas>, span: Span<Iova>) -> Answer<(Memory, Oa)> {
    // Unmaps are refused, so nobody is ever told to let go.
    let accessor = ioas.accessor(true, Arc::new(|_| ()))?;
    let pages = span.widen(PAGE_LG2);
    let pin = accessor.pin(pages, false)?;
    let locks = ioas.lock_areas(pages)?;
    let base = in_one_piece(&pin).ok_or(Refusal::of(
        Errno::FAULT,
        "the pages of the queue do not lie one behind the other; use a huge page, or a file in one piece",
    ))?;
    Ok((Memory { locks, pin, accessor }, base.plus(span.start().get() % PAGE_BYTES)))
}

/// Where the pages begin, if each begins where the one before ends.
fn in_one_piece(pin: &Pin) -> Option<Oa> {
    let mut piece: Option<(Oa, Oa)> = None;
    for (backing, pages) in pin.pages() {
        for (extent, oa) in backing.extents(pages) {
            let (start, end) = piece.unwrap_or((oa, oa));
            if oa != end {
                return None;
            }
            piece = Some((start, oa.plus(extent.len() << PAGE_LG2)));
        }
    }
    piece.map(|(start, _)| start)
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::HwQueueAlloc) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    if arg.r#type == 0 {
        return Err(unsupported("a hardware queue has a type"));
    }
    if arg.length == 0 {
        return Err(Refusal::of(Errno::INVAL, "the queue has no memory"));
    }
    let span = Span::from_len(Iova::new(arg.nesting_parent_iova), arg.length).map_err(ioas::Error::from)?;
    let context = call.target;
    let viommu = context.viommu(arg.viommu_id)?;
    if !viommu.own().has_queues(arg.r#type) {
        return Err(unsupported("the virtual IOMMU has no hardware queues of this type"));
    }
    let _attaching = context.lock_attaching();
    let held = Held::new(&viommu)?;
    let (memory, base) = pin(viommu.parent().ioas().ioas(), span)?;
    let queue = Arc::new(HwQueue {
        head: Head::default(),
        kind: arg.r#type,
        index: arg.index,
        viommu: Arc::clone(&viommu),
        keeps: Mutex::default(),
    });
    arg.out_hw_queue_id = context.enroll(&*queue)?;
    let wanted = QueueMemory { kind: arg.r#type, index: arg.index, base, len: arg.length };
    let added = viommu.own().add_queue(&wanted, &|index| viommu.queue(arg.r#type, index).is_some());
    let before = added.and_then(|before| {
        let before = before.and_then(|index| viommu.queue(arg.r#type, index));
        before.map(|queue| Held::new(&queue)).transpose().inspect_err(|_| viommu.own().remove_queue(arg.r#type, arg.index))
    });
    let before = before.inspect_err(|_| context.abandon(&*queue))?;
    *lock(&queue.keeps) = Some(Keeps { memory, before, viommu: held });
    viommu.add_queue(&queue);
    context.publish(queue);
    Ok(Reply::New(arg.out_hw_queue_id))
}
