//! VFIO devices in user space: files that an unmodified VFIO user opens, binds to its iommufd, attaches to an address space, and drives. Behind BAR0 is a
//! DMA engine ([`iommu::engine`], [`registers`]) whose accesses really go through the IOMMU, so what arrives is what the IOAS maps.
//!
//! - *fleet*: the devices of a host. Each is alone in its IOMMU group.
//! - *device file*: one open of `/dev/vfio/devices/vfioN`. It answers only BIND_IOMMUFD until it is bound; closing it gives the device back.
//! - *region*: a stretch of the file, its index in the offset's upper bits: 0 the registers, 2 a buffer that can be mapped, 7 configuration space.
//! - *kind of interrupt*: INTx, MSI, MSI-X, error, request, each signalled through eventfds of the client.
//!
//! The window of x86 interrupts and what else the IOMMU keeps for itself is reserved in an address space as long as a device is attached to it.
//!
//! What is left out: VFIO groups and containers (/dev/vfio/N), anybody who raises the request interrupt, unmasking INTx through an eventfd (`ENOTTY`),
//! dynamic features such as migration (`ENOTTY`), reset of a whole bus (`ENODEV`).

mod binding;
mod buffer;
mod calls;
pub mod config;
mod device;
mod fleet;
mod interrupts;
pub mod regions;
pub mod registers;
mod signal;
mod sysfs;
pub mod uapi;

pub use calls::TABLE;
pub use device::Cdev;
pub use fleet::Fleet;
pub use sysfs::{DOMAIN, Entry, MAJOR, MOST};
