//! A client's eventfd, kept to be signalled later.

use iommufd::{Answer, Refusal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Where an interrupt goes.
///
/// A write to a full eventfd waits, and only its client can end that: one who fills it between our look and our write would hold up whoever writes. So a thread of
/// its own writes, made at the first interrupt, and the device waits for it for a moment only.
pub(crate) struct Signal {
    descriptor: Arc<OwnedFd>,
    ringer: OnceLock<Option<Ringer>>,
}

/// How long a device waits until an interrupt has arrived. Only a client that blocks its own eventfd makes it that long.
const PATIENCE: Duration = Duration::from_millis(50);
/// Writers that wait for clients like that, in all; when there are more, interrupts of new eventfds get lost.
const MOST_STUCK: usize = 64;
static STUCK: AtomicUsize = AtomicUsize::new(0);

/// The thread that writes. It ends with its signal, or when the client lets it.
struct Ringer {
    ring: SyncSender<()>,
    rung: Mutex<Receiver<()>>,
    stuck: AtomicBool,
}

impl Ringer {
    fn new(descriptor: &Arc<OwnedFd>) -> Option<Self> {
        if STUCK.load(Ordering::Relaxed) >= MOST_STUCK {
            return None;
        }
        let ((ring, wanted), (done, rung)) = (sync_channel(1), sync_channel(1));
        let descriptor = Arc::clone(descriptor);
        let write = move || {
            for () in wanted {
                write_one(&descriptor);
                if done.send(()).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name("interrupt".into()).spawn(write).ok()?;
        Some(Self { ring, rung: Mutex::new(rung), stuck: AtomicBool::new(false) })
    }

    fn raise(&self) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        // One that got stuck is asked again when it has answered for the last time.
        if self.stuck.load(Ordering::Relaxed) {
            if rung.try_recv().is_err() {
                return;
            }
            self.free();
        }
        if self.ring.try_send(()).is_ok() && rung.recv_timeout(PATIENCE).is_err() {
            self.stuck.store(true, Ordering::Relaxed);
            STUCK.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn free(&self) {
        self.stuck.store(false, Ordering::Relaxed);
        STUCK.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds one. A count that is full stays full, as when the kernel signals: whoever reads it then learns nothing new.
fn write_one(descriptor: &OwnedFd) {
    let mut wanted = [PollFd::new(descriptor, PollFlags::OUT)];
    if poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1) && wanted[0].revents().contains(PollFlags::OUT) {
        _ = rustix::io::write(descriptor, &1u64.to_ne_bytes());
    }
}

impl Signal {
    /// # Errors
    /// `EINVAL` for what is no eventfd.
    pub(crate) fn new(descriptor: OwnedFd) -> Answer<Self> {
        // Without /proc nothing can be told; then whatever it is gets eight bytes written, as the client asked.
        match std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())) {
            Ok(name) if name.as_os_str() != "anon_inode:[eventfd]" => {
                let text = format!("an interrupt goes to an eventfd, and the descriptor is {}", name.display());
                Err(Refusal::new(Errno::INVAL, text))
            }
            _ => Ok(Self { descriptor: Arc::new(descriptor), ringer: OnceLock::new() }),
        }
    }

    /// Adds one to it.
    pub(crate) fn raise(&self) {
        let ringer = self.ringer.get_or_init(|| Ringer::new(&self.descriptor));
        ringer.iter().for_each(Ringer::raise);
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signal")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_full_count_does_not_block() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let signal = Signal::new(fd.try_clone().unwrap()).unwrap();
        let read = || {
            let mut count = [0; 8];
            rustix::io::read(&fd, &mut count).map(|_| u64::from_ne_bytes(count))
        };
        signal.raise();
        signal.raise();
        assert_eq!(read(), Ok(2));
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        signal.raise();
        assert_eq!(read(), Ok(u64::MAX - 1));
    }

    #[test]
    fn a_writer_that_waits_for_its_client_holds_nobody_up() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let signal = Signal::new(fd.try_clone().unwrap()).unwrap();
        let ringer = signal.ringer.get_or_init(|| Ringer::new(&signal.descriptor)).as_ref().unwrap();
        // As if the client had filled it behind the writer's look: the writer is not there to answer.
        ringer.ring.try_send(()).unwrap();
        let held = ringer.rung.lock().unwrap();
        held.recv_timeout(Duration::from_secs(5)).unwrap();
        drop(held);
        ringer.stuck.store(true, Ordering::Relaxed);
        STUCK.fetch_add(1, Ordering::Relaxed);
        let started = std::time::Instant::now();
        (0..100).for_each(|_| signal.raise());
        assert!(started.elapsed() < PATIENCE, "a stuck writer is not waited for again");
        ringer.free();
        signal.raise();
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    }

    #[test]
    fn other_files_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Signal::new(file.into()).unwrap_err().errno, Errno::INVAL);
    }
}
