//! What a host shows of its VFIO devices in sysfs and /dev, as data: a front puts it where its clients look.
//!
//! | who | looks up | for |
//! |---|---|---|
//! | QEMU (`-device vfio-pci,host=` with an iommufd) | the PCI directory, its `vfio-dev/`, `vfio-dev/vfioN/dev`, `subsystem`, `iommu_group` | the path of the device file, whose number must be the one in `dev`; whether it is a mediated device; the group |
//! | the kernel's VFIO selftests | `vfio-dev/`, `vendor`, `device`, `iommu_group`, `driver` | the path of the device file; ids that must equal configuration space |
//! | DPDK, and SPDK on top of it | every directory in /sys/bus/pci/devices: `vendor`, `device`, `subsystem_vendor`, `subsystem_device`, `class`, `numa_node`, `resource`, `driver`; /sys/module/vfio_pci; /sys/module/vfio/parameters/enable_unsafe_noiommu_mode | which devices there are, and which are VFIO's; whether there is an IOMMU |
//! | Cloud Hypervisor and others on vfio-ioctls | `iommu_group`, `vfio-dev/` | the group, the device file |
//! | kvmtool, KubeVirt, VirtualBox | `vfio-dev/`, `iommu_group` | the device file |
//! | who has only a device file | /sys/class/vfio-dev/vfioN, /sys/dev/char/MAJOR:MINOR | the PCI address |
//! | lspci and readiness checks | `config`, `resource`, `irq`, `uevent` | the PCI header |
//!
//! The devices are in a PCI domain of their own, 4c53, so that none takes the place of a real one.

use crate::config::{CLASS, Config, DEVICE, REVISION, VENDOR};
use crate::regions::{BAR0_BYTES, BUFFER_BYTES};
use addr::{Iova, Span};
use iommufd::{Answer, Caller, File};
use std::sync::{Arc, Mutex, PoisonError};

/// Major number of the device files: the highest of those that hosts give out dynamically.
pub const MAJOR: u32 = 511;
/// PCI domain of the devices.
pub const DOMAIN: u16 = 0x4c53;
/// Most devices: 32 on each bus.
pub const MOST: u32 = 32 * 256;

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A file with this text.
    Text(String),
    /// A file with these bytes, which are no text: [`Entry::open`] opens it.
    Bytes(Vec<u8>),
    /// A symbolic link.
    Link(String),
    /// A directory.
    Dir,
}

impl Entry {
    /// Opens what has content, for reading.
    pub fn open(&self) -> Option<Arc<dyn File>> {
        let content = match self {
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
            Self::Link(_) | Self::Dir => return None,
        };
        Some(Arc::new(Content { bytes: content.into(), position: Mutex::new(0) }))
    }
}

/// A file that is only read.
#[derive(Debug)]
struct Content {
    bytes: Box<[u8]>,
    position: Mutex<usize>,
}

impl File for Content {
    fn kind(&self) -> &'static str {
        "sysfs file"
    }

    fn read(&self, _: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        let from = |start: usize| {
            let rest = self.bytes.get(start..).unwrap_or_default();
            rest[..count.min(rest.len())].to_vec()
        };
        if let Some(at) = at {
            return Ok(from(usize::try_from(at).unwrap_or(usize::MAX)));
        }
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let read = from(*position);
        *position += read.len();
        Ok(read)
    }
}

/// Flags of a BAR in `resource`: memory, as the kernel writes them.
const MEMORY_32: u64 = 0x4_0200;
const MEMORY_64_PREFETCH: u64 = 0x14_220c;

/// Where BAR0 and BAR2 of a device would be on a host's bus.
pub(crate) fn bars(index: u32) -> [u64; 2] {
    [0xf000_0000 + u64::from(index) * BAR0_BYTES, 0x70_0000_0000 + u64::from(index) * BUFFER_BYTES]
}

/// The PCI address of a device.
pub(crate) fn address(index: u32) -> String {
    format!("{DOMAIN:04x}:{:02x}:{:02x}.0", index / 32, index % 32)
}

/// The path of a device file.
pub(crate) fn path(index: u32) -> String {
    format!("/dev/vfio/devices/vfio{index}")
}

/// Group of a device: it is alone in it.
fn group(index: u32) -> u32 {
    index + 1000
}

/// What does not belong to a single device.
fn common(entries: &mut Vec<(String, Entry)>) {
    for dir in ["/sys/bus/pci/drivers/vfio-pci", "/sys/class/vfio-dev", "/sys/module/vfio", "/sys/module/vfio_pci", "/sys/module/iommufd"] {
        entries.push((dir.into(), Entry::Dir));
    }
    entries.push(("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode".into(), Entry::Text("N\n".into())));
}

/// One device.
fn device(index: u32, reserved: &[Span<Iova>], entries: &mut Vec<(String, Entry)>) {
    let (address, group, char) = (address(index), group(index), format!("{MAJOR}:{index}"));
    let root = format!("pci{DOMAIN:04x}:{:02x}", index / 32);
    let dir = format!("/sys/devices/{root}/{address}");
    let mut add = |path: String, entry| entries.push((path, entry));
    let text = |text: String| Entry::Text(text + "\n");
    let link = |target: String| Entry::Link(target);

    add(dir.clone(), Entry::Dir);
    add(format!("/sys/bus/pci/devices/{address}"), link(format!("../../../devices/{root}/{address}")));
    add(format!("/sys/bus/pci/drivers/vfio-pci/{address}"), link(format!("../../../../devices/{root}/{address}")));
    let own = |name: &str| format!("{dir}/{name}");
    for (name, id) in [("vendor", VENDOR), ("device", DEVICE), ("subsystem_vendor", VENDOR), ("subsystem_device", DEVICE)] {
        add(own(name), text(format!("{id:#06x}")));
    }
    add(own("class"), text(format!("{CLASS:#08x}")));
    add(own("revision"), text(format!("{REVISION:#04x}")));
    for (name, value) in [("irq", "0"), ("enable", "1"), ("numa_node", "-1"), ("driver_override", "(null)"), ("reset_method", "flr")] {
        add(own(name), text(value.into()));
    }
    add(own("resource"), Entry::Text(resource(index)));
    add(own("config"), Entry::Bytes(Config::new(bars(index)).bytes().to_vec()));
    let modalias = format!(
        "pci:v{VENDOR:08X}d{DEVICE:08X}sv{VENDOR:08X}sd{DEVICE:08X}bc{:02X}sc{:02X}i{:02X}",
        CLASS >> 16,
        CLASS >> 8 & 0xff,
        CLASS & 0xff
    );
    let ids = format!("PCI_CLASS={CLASS:X}\nPCI_ID={VENDOR:04X}:{DEVICE:04X}\nPCI_SUBSYS_ID={VENDOR:04X}:{DEVICE:04X}");
    add(own("uevent"), text(format!("DRIVER=vfio-pci\n{ids}\nPCI_SLOT_NAME={address}\nMODALIAS={modalias}")));
    add(own("modalias"), text(modalias));
    add(own("driver"), link("../../../bus/pci/drivers/vfio-pci".into()));
    add(own("subsystem"), link("../../../bus/pci".into()));
    add(own("iommu_group"), link(format!("../../../kernel/iommu_groups/{group}")));

    let groups = format!("/sys/kernel/iommu_groups/{group}");
    add(format!("{groups}/devices/{address}"), link(format!("../../../../devices/{root}/{address}")));
    add(format!("{groups}/type"), text("DMA".into()));
    add(format!("{groups}/reserved_regions"), Entry::Text(reserved.iter().map(reserved_line).collect()));

    let cdev = format!("{dir}/vfio-dev/vfio{index}");
    add(cdev.clone(), Entry::Dir);
    add(format!("{cdev}/dev"), text(char.clone()));
    add(format!("{cdev}/uevent"), text(format!("MAJOR={MAJOR}\nMINOR={index}\nDEVNAME=vfio/devices/vfio{index}")));
    add(format!("{cdev}/device"), link(format!("../../../{address}")));
    add(format!("{cdev}/subsystem"), link("../../../../../class/vfio-dev".into()));
    add(format!("/sys/class/vfio-dev/vfio{index}"), link(format!("../../devices/{root}/{address}/vfio-dev/vfio{index}")));
    add(format!("/sys/dev/char/{char}"), link(format!("../../devices/{root}/{address}/vfio-dev/vfio{index}")));
    add(format!("/dev/char/{char}"), link(format!("../vfio/devices/vfio{index}")));
}

fn reserved_line(span: &Span<Iova>) -> String {
    let kind = if *span == Span::of(Iova::new(0xfee0_0000), Iova::new(0xfeef_ffff)) { "msi" } else { "reserved" };
    format!("{:#018x} {:#018x} {kind}\n", span.start().get(), span.last().get())
}

/// A line for each BAR, the ROM and the six of virtual functions.
fn resource(index: u32) -> String {
    let [bar0, buffer] = bars(index);
    let line = |start: u64, bytes: u64, flags: u64| format!("{start:#018x} {:#018x} {flags:#018x}\n", start + bytes - 1);
    let none = || line(0, 1, 0);
    let mut lines = [line(bar0, BAR0_BYTES, MEMORY_32), none(), line(buffer, BUFFER_BYTES, MEMORY_64_PREFETCH)].concat();
    (3..13).for_each(|_| lines += &none());
    lines
}

/// Everything that `count` devices show. Directories that only hold other entries are not listed.
pub(crate) fn entries(count: u32, reserved: &[Span<Iova>]) -> Vec<(String, Entry)> {
    let mut entries = Vec::new();
    if count > 0 {
        common(&mut entries);
        (0..count).for_each(|index| device(index, reserved, &mut entries));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn follow(base: &str, target: &str) -> String {
        let mut parts: Vec<&str> = base.split('/').collect();
        parts.pop();
        for part in target.split('/') {
            match part {
                ".." => _ = parts.pop(),
                part => parts.push(part),
            }
        }
        parts.join("/")
    }

    #[test]
    fn links_lead_somewhere() {
        let entries: BTreeMap<String, Entry> = entries(40, &[]).into_iter().collect();
        for (path, entry) in &entries {
            let Entry::Link(target) = entry else { continue };
            let at = follow(path, target);
            let there =
                entries.keys().any(|other| *other == at || other.starts_with(&format!("{at}/"))) || at.starts_with("/dev/vfio/devices/");
            assert!(there, "{path} -> {target}, which is {at}");
        }
        assert!(entries.contains_key("/sys/bus/pci/devices/4c53:01:07.0"));
        assert_eq!(entries["/sys/devices/pci4c53:00/4c53:00:03.0/vfio-dev/vfio3/dev"], Entry::Text("511:3\n".into()));
    }

    #[test]
    fn resources_are_those_of_configuration_space() {
        let lines: Vec<String> = resource(1).lines().map(String::from).collect();
        assert_eq!(lines.len(), 13);
        assert_eq!(lines[0], "0x00000000f0001000 0x00000000f0001fff 0x0000000000040200");
        assert_eq!(lines[1], "0x0000000000000000 0x0000000000000000 0x0000000000000000");
        assert_eq!(lines[2], "0x0000007000010000 0x000000700001ffff 0x000000000014220c");
    }

    #[test]
    fn nothing_without_devices() {
        assert_eq!(entries(0, &[]), []);
    }
}
