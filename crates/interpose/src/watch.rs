//! One place where everything arrives that happens without a call: descriptors closed, threads and processes ended.

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// An epoll set with a name for each member.
#[derive(Debug)]
pub(crate) struct Watch(pub(crate) OwnedFd);

/// Who has something to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// Files that live in memory: see [`crate::files`].
    Inotify,
    /// The other end of an event descriptor.
    Event(u32),
    /// A thread has ended.
    Thread(i32),
    /// A process has ended.
    Process(i32),
}

impl Watch {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// From now on until the descriptor is closed.
    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let (kind, number, wanted) = match token {
            Token::Inotify => (0, 0, EventFlags::IN),
            // Errors and hang-ups are told anyway.
            Token::Event(number) => (1, number, EventFlags::empty()),
            Token::Thread(tid) => (2, tid.cast_unsigned(), EventFlags::IN),
            Token::Process(pid) => (3, pid.cast_unsigned(), EventFlags::IN),
        };
        epoll::add(&self.0, fd, EventData::new_u64(kind << 32 | u64::from(number)), wanted)
    }

    /// What is to be told now, without waiting; a part of it when it is much.
    pub(crate) fn look(&self, tokens: &mut Vec<Token>) {
        tokens.clear();
        let mut events = [MaybeUninit::uninit(); 64];
        let Ok((events, _)) = epoll::wait(&self.0, &mut events, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) else { return };
        tokens.extend(events.iter().map(|event: &epoll::Event| {
            let data = { event.data }.u64();
            let number = data as u32;
            match data >> 32 {
                0 => Token::Inotify,
                1 => Token::Event(number),
                2 => Token::Thread(number.cast_signed()),
                _ => Token::Process(number.cast_signed()),
            }
        }));
    }
}
