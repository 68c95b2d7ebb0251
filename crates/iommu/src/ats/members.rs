//! The ports of a domain: whoever flushes it sends to them and waits for them. A domain without any pays one look at a counter.

use super::Port;
use addr::{Iova, Oa, Span};
use iotlb::{Log, Missed};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A port, and how much of the domain's log was sent to it.
struct Member {
    port: Arc<Port>,
    sent: Mutex<u64>,
}

impl Member {
    /// Sends what was logged since the last time.
    fn send(&self, log: &Log) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let head = log.head();
        if *sent != head {
            log.catch_up(*sent, head, |missed| match missed {
                Missed::Span(span) => self.port.send(std::iter::once(span)),
                // Devices keep translations; those are as they were.
                Missed::Tables(_) => {}
                Missed::Everything => self.port.send_all(),
            });
            *sent = head;
        }
    }
}

#[derive(Default)]
pub(crate) struct Members {
    count: AtomicUsize,
    /// Replaced as a whole, so that nobody waits while holding the lock.
    list: Mutex<Arc<Vec<Arc<Member>>>>,
}

impl Members {
    /// Whether there are none: what a flush asks first. Asked after a grace period the answer is exact as far as it matters: a port that has
    /// translated before was in the list before, and its guard was waited for.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// From now on flushes wait for the port, too. Comes before its first translation.
    pub(crate) fn join(&self, port: &Arc<Port>, log: &Log) {
        // What was logged before was cleared before, so the port can't have it.
        let member = Arc::new(Member { port: Arc::clone(port), sent: Mutex::new(log.head()) });
        self.edit(|list| list.push(member));
    }

    /// No longer. Comes after the port's cache was emptied, or its device quarantined.
    pub(crate) fn leave(&self, port: &Arc<Port>) {
        self.edit(|list| list.retain(|member| !Arc::ptr_eq(&member.port, port)));
    }

    fn edit(&self, edit: impl FnOnce(&mut Vec<Arc<Member>>)) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = Vec::with_capacity(list.len() + 1);
        fresh.extend(list.iter().cloned());
        edit(&mut fresh);
        self.count.store(fresh.len(), Ordering::Release);
        *list = Arc::new(fresh);
    }

    fn snapshot(&self) -> Arc<Vec<Arc<Member>>> {
        Arc::clone(&self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends what was logged to every port.
    #[cold]
    pub(crate) fn send(&self, log: &Log) {
        self.snapshot().iter().for_each(|member| member.send(log));
    }

    /// After the grace period: until every port has answered. A device that does not is quarantined before this returns.
    #[cold]
    pub(crate) fn settle(&self, domain: u32, log: &Log) {
        let members = self.snapshot();
        // Also to ports that came between the log and the grace period.
        members.iter().for_each(|member| member.send(log));
        for Member { port, .. } in members.iter().map(Arc::as_ref) {
            if !port.wait()
                && let Some(device) = port.device.upgrade()
            {
                device.quarantine(domain, port);
            }
        }
    }

    /// Shows every translation of any address in `span` that a device still has and may use.
    pub(crate) fn each_cached(&self, span: Span<Iova>, mut show: impl FnMut(u32, Span<Iova>, Oa)) {
        for member in self.snapshot().iter() {
            if let Some(device) = member.port.device.upgrade().filter(|device| !device.is_quarantined()) {
                member.port.cache().each(span, |part, oa| show(device.id(), part, oa));
            }
        }
    }
}
