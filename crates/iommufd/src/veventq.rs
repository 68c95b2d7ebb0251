//! Event queues of virtual IOMMUs: events of the hardware wait here for the program that runs the guest (rule 65).

use crate::device::{DeviceObject, lock};
use crate::ioas_ops::{FLAGS, RESERVED, check_clear, unsupported};
use crate::object::{Head, Held, Object};
use crate::queue_file::{Keeps, with_file};
use crate::table::{Call, Reply};
use crate::uapi::{self, VEVENTQ_LOST_EVENTS, VeventHeader};
use crate::viommu::ViommuObject;
use crate::{Answer, Caller, Context, File, Ready, Refusal};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};
use zerocopy::IntoBytes;

/// The most events that a queue can be made for.
const MOST_EVENTS: u32 = 1 << 19;
/// Sequence numbers wrap behind this.
const LAST_SEQUENCE: u32 = u32::MAX >> 1;
const HEADER: usize = size_of::<VeventHeader>();

/// An event queue with an id.
pub struct EventQueue {
    head: Head,
    kind: u32,
    depth: usize,
    viommu: Arc<ViommuObject>,
    keeps: Mutex<Option<Held<ViommuObject>>>,
    state: Mutex<State>,
    ready: Ready,
}

#[derive(Default)]
struct State {
    events: VecDeque<(u32, Box<[u8]>)>,
    /// The last event that found no room; it comes behind the others.
    lost: Option<u32>,
    /// Of the next event.
    sequence: u32,
}

impl State {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.lost.is_none()
    }
}

impl EventQueue {
    /// Its type.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// An event happened. When there is no room, that is noted; the note goes when there is room again, since a gap in the sequence says the same.
    pub(crate) fn push(&self, data: &[u8]) {
        let mut state = lock(&self.state);
        let sequence = state.sequence;
        state.sequence = if sequence == LAST_SEQUENCE { 0 } else { sequence + 1 };
        if state.events.len() < self.depth {
            state.lost = None;
            state.events.push_back((sequence, data.into()));
        } else {
            state.lost = Some(sequence);
        }
        self.ready.set(true);
    }

    fn take(&self, room: usize) -> Answer<Vec<u8>> {
        if room < HEADER {
            return Err(Refusal::new(Errno::INVAL, format!("an event begins with {HEADER} bytes; read at least as much")));
        }
        let mut state = lock(&self.state);
        let mut bytes = Vec::new();
        while !state.is_empty() {
            let next = state.events.front().map_or(0, |(_, data)| data.len());
            if HEADER + next > room - bytes.len() {
                if bytes.is_empty() {
                    return Err(Refusal::new(Errno::INVAL, format!("the next event has {} bytes; read at least as much", HEADER + next)));
                }
                break;
            }
            match state.events.pop_front() {
                Some((sequence, data)) => {
                    bytes.extend_from_slice(VeventHeader { flags: 0, sequence }.as_bytes());
                    bytes.extend_from_slice(&data);
                }
                None => {
                    let sequence = state.lost.take().unwrap_or_default();
                    bytes.extend_from_slice(VeventHeader { flags: VEVENTQ_LOST_EVENTS, sequence }.as_bytes());
                }
            }
        }
        self.ready.set(!state.is_empty());
        Ok(bytes)
    }
}

impl Object for EventQueue {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "event queue"
    }

    fn destroy(&self, _: &Context) {
        self.viommu.remove_events(self);
        drop(lock(&self.keeps).take());
    }
}

impl fmt::Debug for EventQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("EventQueue")
            .field("kind", &self.kind)
            .field("events", &state.events.len())
            .field("lost", &state.lost)
            .finish_non_exhaustive()
    }
}

/// The descriptor of an event queue.
struct EventFile {
    queue: Arc<EventQueue>,
    keeps: Keeps<EventQueue>,
}

impl fmt::Debug for EventFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.queue.fmt(f)
    }
}

impl File for EventFile {
    fn kind(&self) -> &'static str {
        "event queue"
    }

    fn read(&self, _: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        if at.is_some_and(|at| at != 0) {
            return Err(Refusal::of(Errno::SPIPE, "an event queue is read without offset"));
        }
        self.queue.take(count)
    }

    fn ready(&self) -> Option<&Ready> {
        Some(&self.queue.ready)
    }

    fn released(&self) {
        self.keeps.let_go();
    }
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::VeventqAlloc) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    check_clear(arg.__reserved.into(), RESERVED)?;
    if arg.r#type == 0 {
        return Err(unsupported("an event queue has a type"));
    }
    if arg.veventq_depth == 0 || arg.veventq_depth > MOST_EVENTS {
        return Err(Refusal::new(Errno::INVAL, format!("a queue holds 1 to {MOST_EVENTS} events, not {}", arg.veventq_depth)));
    }
    let viommu = call.target.viommu(arg.viommu_id)?;
    let queue = Arc::new(EventQueue {
        head: Head::default(),
        kind: arg.r#type,
        depth: arg.veventq_depth as usize,
        keeps: Mutex::new(Some(Held::new(&viommu)?)),
        viommu: Arc::clone(&viommu),
        state: Mutex::default(),
        ready: Ready::default(),
    });
    viommu.add_events(&queue)?;
    let enrolled = call.target.enroll(&*queue);
    arg.out_veventq_id = enrolled.inspect_err(|_| viommu.remove_events(&queue))?;
    with_file(
        call,
        &queue,
        |keeps| EventFile { queue: Arc::clone(&queue), keeps },
        |fd| {
            arg.out_veventq_fd = fd;
            arg.as_bytes()[..arg.as_bytes().len().min(arg.size as usize)].to_vec()
        },
    )
}

impl DeviceObject {
    /// An event of the device, for the queue of type `kind` of the virtual IOMMU that its page table was made on. `event` gets its number there.
    ///
    /// # Errors
    /// `ENOENT` when it is attached to no such table, or has the number 0; `EOPNOTSUPP` when the virtual IOMMU has no such queue.
    pub fn report_vevent(&self, kind: u32, event: impl FnOnce(u64) -> Vec<u8>) -> Answer {
        let table = self.hwpt(None);
        let viommu = table.as_ref().and_then(|table| table.viommu());
        let virt_id = viommu.and_then(|viommu| viommu.number_of(self)).filter(|virt_id| *virt_id != 0);
        match (viommu, virt_id) {
            (Some(viommu), Some(virt_id)) => viommu.report(kind, &event(virt_id)),
            _ => Err(Refusal::new(Errno::NOENT, format!("device {} has no number in a virtual IOMMU", self.id()))),
        }
    }
}
