//! Fault queues: page requests of devices wait here for the program that handles them, which reads them and writes the answers (rules 61 to 64).

use crate::device::{DeviceObject, WHOLE, lock};
use crate::driver::Driver;
use crate::ioas_ops::{FLAGS, check_clear};
use crate::object::{Head, Object};
use crate::queue_file::{Keeps, with_file};
use crate::table::{Call, Reply};
use crate::uapi::{self, HwptPageResponse, HwptPgfault, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS, PGFAULT_LAST_PAGE, PGFAULT_PASID_VALID};
use crate::{Answer, Caller, Context, File, Ready, Refusal};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, IntoBytes};

/// A page request of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageFault {
    /// Which PASID; `None` for the device as a whole.
    pub pasid: Option<u32>,
    /// The number that ties the parts of one request together.
    pub group: u32,
    /// What the device wants to do: 1 read, 2 write, 4 execute, 8 privileged.
    pub perm: u32,
    /// The address.
    pub addr: u64,
    /// Whether it is the last part.
    pub last: bool,
}

const RECORD: usize = size_of::<HwptPgfault>();
const RESPONSE: usize = size_of::<HwptPageResponse>();
/// The most requests that wait in one queue, as many as a device's interface can have outstanding; what comes then is refused at once.
const MOST_WAITING: usize = 1 << 16;
/// The most parts of unfinished requests that are kept of one device.
const MOST_PARTS: usize = 1 << 12;

/// A request with all its parts.
struct Request {
    /// Of which attachment.
    handle: u64,
    device: u32,
    driver: Arc<dyn Driver>,
    parts: Vec<PageFault>,
}

impl Request {
    fn answer(&self, success: bool) {
        if let Some(last) = self.parts.last() {
            self.driver.respond(last, success);
        }
    }

    fn len(&self) -> usize {
        self.parts.len() * RECORD
    }
}

/// A fault queue with an id.
#[derive(Default)]
pub struct FaultQueue {
    head: Head,
    state: Mutex<State>,
    ready: Ready,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Read and not answered, by cookie.
    asked: BTreeMap<u32, Request>,
    /// Cookies that were given back, below the highest that was ever given.
    free: BTreeSet<u32>,
    highest: u32,
}

impl State {
    /// The lowest free cookie from 1 on.
    fn cookie(&mut self) -> u32 {
        self.free.pop_first().unwrap_or_else(|| {
            self.highest += 1;
            self.highest
        })
    }

    fn take_asked(&mut self, cookie: u32) -> Option<Request> {
        let request = self.asked.remove(&cookie)?;
        self.free.insert(cookie);
        Some(request)
    }
}

impl FaultQueue {
    /// Its id.
    pub fn id(&self) -> u32 {
        self.head.id()
    }

    fn push(&self, request: Request) -> Result<(), Request> {
        let mut state = lock(&self.state);
        if state.waiting.len() + state.asked.len() >= MOST_WAITING {
            return Err(request);
        }
        state.waiting.push_back(request);
        self.ready.set(true);
        Ok(())
    }

    /// Refuses all requests of an attachment that ends.
    pub(crate) fn forget(&self, handle: u64) {
        self.refuse(|request| request.handle == handle);
    }

    fn refuse(&self, mut which: impl FnMut(&Request) -> bool) {
        let gone: Vec<Request> = {
            let mut state = lock(&self.state);
            let State { waiting, asked, free, .. } = &mut *state;
            let (mut gone, kept): (Vec<_>, VecDeque<_>) = (Vec::new(), std::mem::take(waiting));
            for request in kept {
                if which(&request) { gone.push(request) } else { waiting.push_back(request) }
            }
            gone.extend(asked.extract_if(.., |_, request| which(request)).map(|(cookie, request)| {
                free.insert(cookie);
                request
            }));
            self.ready.set(!waiting.is_empty());
            gone
        };
        gone.iter().for_each(|request| request.answer(false));
    }

    /// As many whole requests as fit.
    fn take(&self, room: usize) -> Answer<Vec<u8>> {
        let mut state = lock(&self.state);
        let mut records = Vec::new();
        while let Some(request) = state.waiting.front() {
            if request.len() > room - records.len() {
                if records.is_empty() {
                    let text = format!("the next request has {} records of {RECORD} bytes; read at least as much", request.parts.len());
                    return Err(Refusal::new(Errno::INVAL, text));
                }
                break;
            }
            let Some(request) = state.waiting.pop_front() else { break };
            let cookie = state.cookie();
            for part in &request.parts {
                records.extend_from_slice(record(request.device, part, cookie).as_bytes());
            }
            state.asked.insert(cookie, request);
        }
        self.ready.set(!state.waiting.is_empty());
        Ok(records)
    }

    fn respond(&self, response: HwptPageResponse) -> Answer {
        let success = match response.code {
            PAGE_RESP_SUCCESS => true,
            PAGE_RESP_INVALID => false,
            code => return Err(Refusal::new(Errno::INVAL, format!("a request succeeds (0) or stays a fault (1), not {code}"))),
        };
        let request = lock(&self.state).take_asked(response.cookie);
        match request {
            Some(request) => request.answer(success),
            None => return Err(Refusal::new(Errno::INVAL, format!("no request waits for an answer under cookie {}", response.cookie))),
        }
        Ok(())
    }
}

fn record(device: u32, part: &PageFault, cookie: u32) -> HwptPgfault {
    let pasid = if part.pasid.is_some() { PGFAULT_PASID_VALID } else { 0 };
    let last = if part.last { PGFAULT_LAST_PAGE } else { 0 };
    HwptPgfault {
        flags: pasid | last,
        dev_id: device,
        pasid: part.pasid.unwrap_or_default(),
        grpid: part.group,
        perm: part.perm,
        addr: part.addr,
        cookie,
        ..HwptPgfault::default()
    }
}

impl Object for FaultQueue {
    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> &'static str {
        "fault queue"
    }

    fn destroy(&self, _: &Context) {
        self.refuse(|_| true);
    }
}

impl fmt::Debug for FaultQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("FaultQueue").field("waiting", &state.waiting.len()).field("asked", &state.asked.len()).finish_non_exhaustive()
    }
}

/// The descriptor of a fault queue.
struct FaultFile {
    queue: Arc<FaultQueue>,
    keeps: Keeps<FaultQueue>,
}

impl fmt::Debug for FaultFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.queue.fmt(f)
    }
}

/// # Errors
/// `ESPIPE`, as the kernel has it, for an offset and for a part of a record.
fn check_whole(count: usize, of: usize, at: Option<u64>) -> Answer {
    if at.is_some_and(|at| at != 0) || !count.is_multiple_of(of) {
        return Err(Refusal::new(Errno::SPIPE, format!("a fault queue is read and written without offset, in multiples of {of} bytes")));
    }
    Ok(())
}

impl File for FaultFile {
    fn kind(&self) -> &'static str {
        "fault queue"
    }

    fn read(&self, _: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        check_whole(count, RECORD, at)?;
        self.queue.take(count)
    }

    /// What was answered before a bad answer stays answered, and counts.
    fn write(&self, _: &dyn Caller, data: &[u8], at: Option<u64>) -> Answer<usize> {
        check_whole(data.len(), RESPONSE, at)?;
        let mut done = 0;
        for response in data.chunks_exact(RESPONSE) {
            let response = HwptPageResponse::read_from_bytes(response).unwrap_or_default();
            match self.queue.respond(response) {
                Err(refusal) if done == 0 => return Err(refusal),
                Err(_) => break,
                Ok(()) => done += RESPONSE,
            }
        }
        Ok(done)
    }

    fn ready(&self) -> Option<&Ready> {
        Some(&self.queue.ready)
    }

    fn released(&self) {
        self.keeps.let_go();
    }
}

pub(crate) fn alloc(call: &Call<'_, Context>, arg: &mut uapi::FaultAlloc) -> Answer<Reply> {
    check_clear(arg.flags.into(), FLAGS)?;
    let queue = Arc::<FaultQueue>::default();
    arg.out_fault_id = call.target.enroll(&*queue)?;
    with_file(
        call,
        &queue,
        |keeps| FaultFile { queue: Arc::clone(&queue), keeps },
        |fd| {
            arg.out_fault_fd = fd;
            arg.as_bytes()[..arg.as_bytes().len().min(arg.size as usize)].to_vec()
        },
    )
}

impl DeviceObject {
    /// A page request of the device. It waits in the fault queue of the page table that its PASID is attached to; if that is none, of the user's own
    /// table that the device as a whole is attached to, which has PASIDs of its own. Nothing is done before its last part comes.
    ///
    /// # Errors
    /// `EINVAL` when nobody handles page requests there: the device is told that it failed.
    pub fn report_fault(&self, fault: PageFault) -> Answer {
        let parts = {
            let mut partial = lock(&self.partial);
            if !fault.last {
                if partial.len() < MOST_PARTS {
                    partial.push(fault);
                }
                return Ok(());
            }
            let mut parts: Vec<PageFault> = partial.extract_if(.., |part| part.group == fault.group).collect();
            parts.push(fault);
            parts
        };
        let places = self.group.places();
        let whole = || places.get(&WHOLE);
        let place = match fault.pasid {
            Some(pasid) => places.get(&pasid).or_else(|| whole().filter(|place| place.table.nested().is_some())),
            None => whole(),
        };
        let place = place.and_then(|place| Some((place.table.fault_queue()?, place.seats.get(place.seat_of(self)?)?.handle())));
        let request = |handle| Request { handle, device: self.id(), driver: Arc::clone(self.driver()), parts };
        let refused = match place {
            Some((queue, handle)) => queue.push(request(handle)),
            None => Err(request(0)),
        };
        drop(places);
        refused.map_err(|request| {
            request.answer(false);
            Refusal::of(Errno::INVAL, "no fault queue takes page requests of this device")
        })
    }
}
