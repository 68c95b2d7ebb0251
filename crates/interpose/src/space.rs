//! Address spaces of clients: which one a thread has, what is mapped in it, and what its bytes are.
//!
//! A space is known by an open `/proc/PID/maps`. The kernel ties that to the address space and not to the process, so it tells when the space
//! is gone: by exit, or because the process executes another program under the same number.

use crate::sys::{self, Vma};
use iommufd::SpaceId;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// An address space that is, or was, a client's.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    /// The process it was first seen in.
    pub(crate) pid: i32,
    maps: OwnedFd,
}

/// The address space has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone;

impl Space {
    /// The one that the process has now.
    pub(crate) fn of(pid: i32) -> Result<Self, Errno> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let maps = rustix::fs::open(format!("/proc/{pid}/maps"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { id: SpaceId(NEXT.fetch_add(1, Ordering::Relaxed)), pid, maps })
    }

    /// Whether any process has it still.
    pub(crate) fn is_alive(&self) -> bool {
        match sys::procmap_query(self.maps.as_fd(), 0) {
            Ok(_) | Err(Errno::NOENT) => true,
            Err(Errno::NOTTY) => rustix::io::pread(&self.maps, &mut [0u8; 1], 0).is_ok_and(|count| count != 0),
            Err(_) => false,
        }
    }

    /// The mapping at `at`, or the next one behind it.
    pub(crate) fn vma(&self, at: u64) -> Result<Option<Vma>, Gone> {
        match sys::procmap_query(self.maps.as_fd(), at) {
            Ok(vma) => Ok(Some(vma)),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTTY) => Ok(self.text()?.lines().filter_map(parse).find(|vma| vma.end > at)),
            Err(_) => Err(Gone),
        }
    }

    /// Every line of the kernel's list.
    fn text(&self) -> Result<String, Gone> {
        let mut text = Vec::new();
        loop {
            let mut chunk = [0u8; 4096];
            match rustix::io::pread(&self.maps, &mut chunk, text.len() as u64) {
                Ok(0) if text.is_empty() => return Err(Gone),
                Ok(0) => return String::from_utf8(text).map_err(|_| Gone),
                Ok(count) => text.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
    }

    /// Copies from it; answers how much.
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> usize {
        let count = self.with_thread(|tid| sys::read_memory(tid, at, into));
        // Otherwise the bytes may be another program's, under the same number.
        if self.is_alive() { count } else { 0 }
    }

    /// Copies to it; answers how much.
    pub(crate) fn write(&self, at: u64, from: &[u8]) -> usize {
        if self.is_alive() { self.with_thread(|tid| sys::write_memory(tid, at, from)) } else { 0 }
    }

    /// Has the kernel bring pages in, from `at` on; answers how many were there.
    pub(crate) fn touch(&self, at: u64, pages: usize) -> usize {
        let each = (0..pages).map(|index| at + ((index as u64) << addr::PAGE_LG2));
        let touched = self.with_thread(|tid| Ok(sys::touch_memory(tid, each.clone())));
        if self.is_alive() { touched } else { 0 }
    }

    /// A process whose first thread has ended is found through the others.
    fn with_thread(&self, mut copy: impl FnMut(i32) -> Result<usize, Errno>) -> usize {
        match copy(self.pid) {
            Err(Errno::SRCH) => {}
            other => return other.unwrap_or(0),
        }
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find_map(|tid| copy(tid).ok()).unwrap_or(0)
    }
}

/// One line of `/proc/PID/maps`.
pub(crate) fn parse(line: &str) -> Option<Vma> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = rustix::fs::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = fields.next()?.parse().ok()?;
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        offset,
        device,
        inode,
    })
}

/// Whether any process of this system that we can look at maps a byte of `len` from `offset` on of a file.
pub(crate) fn is_mapped_anywhere(device: u64, inode: u64, offset: u64, len: u64) -> bool {
    let overlaps = |vma: Vma| {
        let file_end = vma.offset.saturating_add(vma.end - vma.start);
        vma.inode == inode && vma.device == device && vma.offset < offset.saturating_add(len) && offset < file_end
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.any(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|text| text.lines().filter_map(parse).any(overlaps)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let line = "7f00aa000000-7f00aa400000 rw-s 00200000 00:01 4711                       /memfd:x y (deleted)";
        let vma = parse(line).unwrap();
        assert_eq!((vma.start, vma.end, vma.offset, vma.inode), (0x7f00_aa00_0000, 0x7f00_aa40_0000, 0x20_0000, 4711));
        assert!(vma.readable && vma.writable && vma.shared && vma.device == rustix::fs::makedev(0, 1));
        assert!(parse("garbage").is_none() && parse("").is_none() && parse("1-2 r 3").is_none());
    }

    #[test]
    fn both_ways_of_looking_agree() {
        let space = Space::of(std::process::id() as i32).unwrap();
        let place = Box::new(7u8);
        let at = std::ptr::from_ref(&*place) as u64;
        let parsed = space.text().unwrap().lines().filter_map(parse).find(|vma| vma.end > at).unwrap();
        assert_eq!(space.vma(at).unwrap(), Some(parsed));
        assert!(parsed.start <= at && parsed.writable && !parsed.shared && space.is_alive());
        let mut byte = [0];
        assert_eq!((space.read(at, &mut byte), byte), (1, [7]));
        assert_eq!(space.read(8, &mut byte), 0);
    }
}
