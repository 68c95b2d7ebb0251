//! Who wants to know what the server does: the command prints it.

use iommufd::File;

/// What happens between clients and server. Called from any thread, in the middle of a client's call: be quick. All do nothing by default.
pub trait Observer: Send + Sync {
    /// A process made its first call that is ours to look at.
    fn process_started(&self, pid: i32) {
        let _ = pid;
    }

    /// Such a process is gone.
    fn process_ended(&self, pid: i32) {
        let _ = pid;
    }

    /// A process got a descriptor of ours: by open, with its path, or as the answer of a call.
    fn opened(&self, pid: i32, fd: i32, path: Option<&str>, file: &dyn File) {
        let _ = (pid, fd, path, file);
    }

    /// The last descriptor of a file is gone.
    fn closed(&self, file: &dyn File) {
        let _ = file;
    }

    /// A process takes pages out of a file that somebody has mapped for a device: `len` bytes from `offset` on.
    fn revoked(&self, pid: i32, offset: u64, len: u64) {
        let _ = (pid, offset, len);
    }

    /// Something does not work as it should, and why. The same words come once.
    fn warning(&self, words: &str) {
        let _ = words;
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
