//! Directories of ours, for clients that list them: real ones, on a file system that nobody else sees and that ends with this process.
//! Where we may not make one, they lie in a directory of their own under /dev/shm, which is removed at the end, or by the next run.

use crate::clients::lock;
use crate::files::Inode;
use crate::namespace::{Namespace, Node};
use crate::{Opening, RemoteCaller};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;

/// All of them, made when they are opened.
#[derive(Debug, Default)]
pub(crate) struct Directories(Mutex<Made>);

#[derive(Debug, Default)]
struct Made {
    root: Option<OwnedFd>,
    /// To be removed.
    place: Option<PathBuf>,
    paths: HashMap<Inode, String>,
}

const FOLDER: Mode = Mode::RWXU.union(Mode::RGRP).union(Mode::XGRP).union(Mode::ROTH).union(Mode::XOTH);
const PLAIN: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::RGRP).union(Mode::ROTH);
const WALK: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Directories {
    /// The path of a directory that a client has got from here.
    pub(crate) fn path_of(&self, inode: Inode) -> Option<String> {
        lock(&self.0).paths.get(&inode).cloned()
    }

    /// A directory with what is in the namespace at `path`, and what really is there.
    pub(crate) fn open(&self, namespace: &Namespace, caller: &RemoteCaller, path: &str) -> Result<OwnedFd, Errno> {
        // Texts are asked for without the lock, since whoever makes them may take long.
        let mut texts = HashMap::new();
        collect_texts(namespace, caller, path, &mut texts);
        let mut made = lock(&self.0);
        let mut directory = rustix::io::dup(made.root()?)?;
        let mut so_far = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            so_far = format!("{so_far}/{part}");
            directory = made.enter(&directory, part, &so_far)?;
        }
        made.fill(&directory, namespace, path, &texts)?;
        Ok(directory)
    }
}

fn collect_texts(namespace: &Namespace, caller: &RemoteCaller, path: &str, texts: &mut HashMap<String, String>) {
    for (name, node) in namespace.children(path) {
        let path = format!("{}/{name}", path.trim_end_matches('/'));
        match node {
            Some(Node::Text(text)) => {
                let opening = Opening { path: path.clone(), flags: libc::O_RDONLY };
                texts.insert(path, text(caller, &opening).unwrap_or_default());
            }
            None | Some(Node::Directory) => collect_texts(namespace, caller, &path, texts),
            Some(_) => {}
        }
    }
}

fn there(made: Result<(), Errno>) -> Result<(), Errno> {
    if made == Err(Errno::EXIST) { Ok(()) } else { made }
}

impl Made {
    /// A directory in another, made when it is not there.
    fn enter(&mut self, parent: &OwnedFd, name: &str, path: &str) -> Result<OwnedFd, Errno> {
        there(rustix::fs::mkdirat(parent, name, FOLDER))?;
        let directory = rustix::fs::openat(parent, name, WALK, Mode::empty())?;
        // Whoever goes on with a relative path from here is found.
        self.paths.insert(Inode::of(&directory)?, path.to_owned());
        Ok(directory)
    }

    /// Puts everything below `path` into its directory, so that links can be read and names listed from there on.
    fn fill(&mut self, directory: &OwnedFd, namespace: &Namespace, path: &str, texts: &HashMap<String, String>) -> Result<(), Errno> {
        let ours = namespace.children(path);
        for (name, node) in &ours {
            let inner = format!("{}/{name}", path.trim_end_matches('/'));
            match node {
                None | Some(Node::Directory) => {
                    let entered = self.enter(directory, name, &inner)?;
                    self.fill(&entered, namespace, &inner, texts)?;
                }
                Some(Node::Link(target)) => there(rustix::fs::symlinkat(target.as_str(), directory, name.as_str()))?,
                Some(_) => {
                    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let file = rustix::fs::openat(directory, name.as_str(), flags, PLAIN)?;
                    rustix::io::write(&file, texts.get(&inner).map_or(&[], |text| text.as_bytes()))?;
                }
            }
        }
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if !ours.iter().any(|(ours, _)| name == ours.as_str()) {
                there(rustix::fs::symlinkat(entry.path(), directory, &name))?;
            }
        }
        Ok(())
    }

    fn root(&mut self) -> Result<&OwnedFd, Errno> {
        let root = match self.root.take() {
            Some(root) => root,
            None => match mount() {
                Ok(root) => root,
                Err(_) => self.folder()?,
            },
        };
        Ok(self.root.insert(root))
    }

    fn folder(&mut self) -> Result<OwnedFd, Errno> {
        sweep();
        let base = if std::path::Path::new(SHM).is_dir() { PathBuf::from(SHM) } else { std::env::temp_dir() };
        for attempt in 0..100 {
            let place = base.join(format!("{PREFIX}{}-{attempt}", std::process::id()));
            match rustix::fs::mkdirat(CWD, &place, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
                Ok(()) => {
                    let root = rustix::fs::open(&place, WALK, Mode::empty());
                    self.place = Some(place);
                    return root;
                }
            }
        }
        Err(Errno::EXIST)
    }
}

const SHM: &str = "/dev/shm";
const PREFIX: &str = "lockstep-";

/// A file system without a place: it ends with its last descriptor.
fn mount() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Removes what servers left that were killed.
fn sweep() {
    for entry in std::fs::read_dir(SHM).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-')?.0.parse::<u32>().ok());
        if pid.is_some_and(|pid| rustix::fs::statat(CWD, format!("/proc/{pid}"), AtFlags::empty()).is_err()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            let _ = std::fs::remove_dir_all(place);
        }
    }
}
