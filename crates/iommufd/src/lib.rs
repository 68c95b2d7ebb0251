//! The uAPI of /dev/iommu in user space: every ioctl of Linux 7.3, and what the kernel lacks.
//!
//! - *host*: the machine that /dev/iommu is opened on ([`Host`]): an IOMMU, accounts, who watches.
//! - *context*: one open of /dev/iommu ([`Context`]): a table of objects by id.
//! - *caller*: the process that makes a call ([`Caller`]). Each front has its own kind.
//! - *file*: what a descriptor of ours can do ([`File`]); a context is one, fault queues, event queues and accesses are others.
//! - *object*: something with an id ([`object::Object`]); *user*: another object that needs it for long.
//! - *refusal*: an errno with its reason in words ([`Refusal`]).
//!
//! What a call does is in one table ([`TABLE`]) behind one dispatcher ([`table::run`]), whichever front it came through (D-10).

mod account;
mod caller;
mod context;
mod device;
mod dirty;
mod dmabuf;
mod driver;
mod fault;
mod file;
mod group;
mod guests;
mod host;
mod hw_info;
mod hw_queue;
mod hwpt;
mod invalidate;
mod ioas_ops;
mod ioctls;
mod knobs;
mod local;
mod mmap;
mod noiommu;
pub mod object;
mod option;
mod our_ops;
mod queue_file;
mod refusal;
#[cfg(feature = "test-ops")]
mod selftest;
pub mod table;
pub mod uapi;
mod user;
mod vdevice;
mod veventq;
mod vfio_compat;
mod viommu;
pub mod watch;

pub use account::Accounts;
pub use caller::{Caller, Memory, Opened, Process, SpaceId};
pub use context::{Context, Open};
pub use device::{DeviceObject, NewDevice};
pub use dmabuf::DmaBuf;
pub use driver::{Driver, EngineDriver, HwInfo, Nested, QueueMemory, Viommu};
pub use fault::{FaultQueue, PageFault};
pub use file::{File, Mmap, Ready};
pub use group::Group;
pub use host::{Host, HostConfig};
pub use hwpt::Hwpt;
pub use ioas_ops::IoasObject;
pub use ioctls::TABLE;
pub use knobs::Knobs;
pub use local::{Local, Touch};
pub use refusal::{Answer, Refusal};
pub use table::{Observer, Seen};
pub use user::{Entries, UserData};
pub use vdevice::VdeviceObject;
pub use veventq::EventQueue;
pub use viommu::{ViommuObject, ViommuSetup};
