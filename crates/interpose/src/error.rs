//! Why a program could not be run at all. What goes wrong later is an answer to a client.

use std::ffi::OsString;
use std::io;
use thiserror::Error;

/// Why [`crate::run`] did not run the program.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The program's file was not found, or is none.
    #[error("cannot run {}: {source}", .program.to_string_lossy())]
    Exec {
        /// As it was given.
        program: OsString,
        /// What execve said.
        source: io::Error,
    },
    /// An argument with a NUL in it.
    #[error("an argument of the program contains a NUL byte, which no argument can have")]
    Nul,
    /// The kernel, or a sandbox around us, has no seccomp user notification.
    #[error(
        "this system does not let a program's calls be served by another ({what}: {source}); it takes Linux 5.14 with CONFIG_SECCOMP_FILTER, and no sandbox that forbids seccomp listeners"
    )]
    NoNotification {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The limit of open files leaves no room.
    #[error("the limit of open files, {limit}, leaves no numbers for descriptors of ours; raise it to at least 64 (ulimit -n)")]
    FewFiles {
        /// RLIMIT_NOFILE.
        limit: u64,
    },
    /// A system call of the server failed.
    #[error("{what} failed: {source}")]
    Os {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Os { what, source: source.into() }
    }
}
