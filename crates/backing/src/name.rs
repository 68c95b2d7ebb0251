//! What a page *is*, whatever window or address shows it: two mappings of one file's page have one name.

use crate::{Backing, BackingId};
use addr::{PAGE_LG2, Page};

/// Names a page of memory in the whole system, as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageName {
    /// A page of a file, in 4 KiB from its start.
    File {
        /// Its file system.
        device: u64,
        /// Its inode there.
        inode: u64,
        /// Which page.
        page: u64,
    },
    /// Memory of a process that has no file, by address in 4 KiB.
    Memory {
        /// Whose address space, as the front counts them.
        space: u64,
        /// Which page.
        page: u64,
    },
    /// A page of a backing that nobody else can name.
    Own {
        /// Which backing.
        backing: BackingId,
        /// Which page.
        page: u64,
    },
}

impl Backing {
    /// What `page` is.
    pub fn page_name(&self, page: Page) -> PageName {
        let own = PageName::Own { backing: self.id(), page: page.get() };
        if let Some(owner) = &self.memory.owner {
            return owner.name(page);
        }
        let Some(source) = &self.memory.file else { return own };
        rustix::fs::fstat(&source.fd).map_or(own, |stat| PageName::File {
            device: stat.st_dev,
            inode: stat.st_ino,
            page: (source.offset >> PAGE_LG2) + page.get(),
        })
    }
}
