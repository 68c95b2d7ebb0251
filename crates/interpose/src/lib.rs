//! Gives an unmodified program descriptors that are served by this process: the front that a program needs to open /dev/iommu.
//!
//! - *client*: a process of the program, or of what it started.
//! - *filter*: what in the kernel decides which calls of a client are held up for us ([seccomp user notification]).
//! - *call*: one system call that is held up. It is served and answered here, or goes on in the kernel as if we were not there.
//! - *file of ours*: an `iommufd::File` that clients have open. The descriptor they hold is a memfd or a pipe of its own, whose inode says which
//!   file it is, and whose end says that the last descriptor is gone.
//! - *base*: descriptors of ours have numbers from here on, by which the filter knows them.
//! - *node*: what a client finds at a path ([`Node`]).
//!
//! [`run`] does everything:
//!
//! ```no_run
//! use lockstep_interpose::{Namespace, Node, Options, Program, Silent, run};
//! # fn main() -> Result<(), lockstep_interpose::Error> {
//! let mut namespace = Namespace::new();
//! namespace.add("/etc/greeting", Node::text("hello\n"));
//! let program = Program { name: "cat".into(), arguments: vec!["/etc/greeting".into()] };
//! let status = run(&program, namespace, &Options::default(), std::sync::Arc::new(Silent))?;
//! std::process::exit(status.code());
//! # }
//! ```
//!
//! # What is held up
//!
//! open, openat, openat2 and creat; ioctl with the type byte `;`, by which all of IOMMUFD's and VFIO's are known; ftruncate and fallocate. read,
//! write and their relatives, mmap, dup and its relatives only on numbers at or above the base. Everything else is let through by its number.
//! An ioctl takes about 10 microseconds, an open of another file as much; a call that is not held up takes some 50 nanoseconds more than without
//! a filter (`cargo run --release -p lockstep-interpose --example filter_cost`).
//!
//! # What a client may notice
//!
//! - Other calls with a path are not held up: they do not find what only we have, but in a directory of ours that is open. stat, access and
//!   readlink are, when [`Options::serves_looks`] says so; each then costs as much as an open.
//! - A descriptor of ours is a memfd or a pipe to fstat, where looks are not served. One with a number below the base knows ioctls only, and read, write and mmap are refused
//!   there: dup2 can ask for that, and a client that lowers its limit of open files. An event file cannot be there at all.
//! - A descriptor that arrives over a socket has a low number, and is what it was to ioctls; but the kernel itself reads and maps it there: an
//!   empty file, or the byte that makes an event file readable. dup gives it a number that is served. A process that is no client gets a plain
//!   file, and keeps ours open.
//! - io_uring opens, reads and writes without system calls, so it never meets us. 32-bit programs do not either.
//! - What is done with the memory of a file by madvise, truncate, O_TRUNC, or from outside, is not seen, so nothing is revoked. What ftruncate
//!   cuts off and brings back again stays away from devices until fallocate puts memory there, or it is mapped anew.
//! - Private memory is not pinned: when a client unmaps it, or ends, what was mapped of it is gone for devices. Shared memory stays.
//! - Numbers of processes are those of our own namespace of them.
//! - A program ends with its server, by SIGKILL. A debugger works as ever; a program under one that serves seccomp notifications itself, or within
//!   another of these servers, cannot be served.
//!
//! [seccomp user notification]: https://docs.kernel.org/userspace-api/seccomp_filter.html#userspace-notification

mod caller;
mod calls;
mod clients;
mod crew;
mod directories;
mod error;
mod files;
mod filter;
mod launch;
mod look;
mod memory;
mod namespace;
mod observer;
mod open;
mod paths;
mod run;
mod server;
mod shared_files;
mod space;
mod sys;
mod transfer;
mod truncate;
mod watch;

pub use caller::RemoteCaller;
pub use error::Error;
pub use namespace::{Charged, Knob, Namespace, Node, OpenFile, OpenKnob, OpenText, Opening, Program, Rewrite, Rewriting};
pub use observer::{Observer, Silent};
pub use run::{Options, Status, run};
