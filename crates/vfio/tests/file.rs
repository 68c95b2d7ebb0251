//! What a device file answers: before and after BIND, its information, its regions, its end.

mod common;

use common::*;
use iommufd::Mmap;
use iommufd::uapi::{Struct, io};
use lockstep_vfio::config::{DEVICE, VENDOR};
use lockstep_vfio::uapi::*;
use rustix::io::Errno;

fn info(client: &Client, device: i32) -> Result<DeviceInfo, Errno> {
    let mut info = DeviceInfo { argsz: DeviceInfo::SIZE as u32, ..Default::default() };
    client.ioctl(device, GET_INFO, &mut info).map(|_| info)
}

#[test]
fn an_unbound_device_answers_nothing() {
    let client = Client::new(1);
    let device = client.open_device(0);
    assert_eq!(info(&client, device), Err(Errno::INVAL));
    assert_eq!(client.attach(device, 1), Err(Errno::INVAL));
    assert_eq!(client.detach(device), Err(Errno::INVAL));
    for nr in [GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, RESET, GET_PCI_HOT_RESET_INFO, FEATURE, 99 + 100] {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&64u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&SET_DATA_NONE.to_le_bytes());
        assert_eq!(client.ioctl_bytes(device, io(nr), &bytes).0, Err(Errno::INVAL), "{nr}");
    }
    assert_eq!(client.pread(device, CONFIG, 4), Err(Errno::INVAL));
    assert_eq!(client.pwrite(device, BAR0, &[0; 8]), Err(Errno::INVAL));
    let wanted = Mmap { len: 4096, prot: 3, flags: 1, offset: BUFFER };
    assert_eq!(client.mmap(device, wanted), Err(Errno::INVAL));
    client.close(device);
}

#[test]
fn binding() {
    let client = Client::new(1);
    let (device, iommufd) = (client.open_device(0), client.open_iommufd());
    assert_eq!(client.bind(device, -1), Err(Errno::INVAL));
    assert_eq!(client.bind(device, -2), Err(Errno::INVAL));
    assert_eq!(client.bind(device, 77), Err(Errno::BADF));
    let eventfd = client.eventfd();
    assert_eq!(client.bind(device, eventfd), Err(Errno::BADFD));
    assert_eq!(client.bind(device, device), Err(Errno::BADFD));
    for (argsz, flags, expected) in [(15, 0, Errno::INVAL), (24, 2, Errno::INVAL), (24, BIND_TOKEN, Errno::FAULT)] {
        let mut bind = BindIommufd { argsz, flags, iommufd, ..Default::default() };
        assert_eq!(client.ioctl(device, BIND_IOMMUFD, &mut bind), Err(expected), "{argsz} {flags}");
    }
    let mut bind = BindIommufd { argsz: 24, flags: BIND_TOKEN, iommufd, token_uuid_ptr: VA, ..Default::default() };
    assert_eq!(client.ioctl(device, BIND_IOMMUFD, &mut bind), Err(Errno::INVAL));
    assert_eq!(client.ioctl_at(device, io(BIND_IOMMUFD), 8), Err(Errno::FAULT));

    let id = client.bind(device, iommufd).unwrap();
    assert_ne!(id, 0);
    assert!(info(&client, device).is_ok());
    assert_eq!(client.bind(device, iommufd), Err(Errno::INVAL));
    // Another open of the same device works, and cannot be bound until the first is closed.
    let second = client.open_device(0);
    assert_eq!(client.bind(second, iommufd), Err(Errno::INVAL));
    assert_eq!(info(&client, second), Err(Errno::INVAL));
    client.close(device);
    assert!(client.bind(second, iommufd).is_ok());
    client.close(second);
    assert!(client.fleet.open(1).is_err());
}

#[test]
fn a_client_of_an_older_header_can_bind() {
    let client = Client::new(1);
    let (device, iommufd) = (client.open_device(0), client.open_iommufd());
    let mut bytes = [0; 16];
    bytes[0] = 16;
    bytes[8..12].copy_from_slice(&iommufd.to_le_bytes());
    let (answer, back) = client.ioctl_bytes(device, io(BIND_IOMMUFD), &bytes);
    assert_eq!(answer, Ok(0));
    assert_ne!(back[12..], [0; 4]);
}

#[test]
fn information() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    let found = info(&client, device).unwrap();
    assert_eq!((found.flags, found.num_regions, found.num_irqs, found.cap_offset), (DEVICE_RESET | DEVICE_PCI, 9, 5, 0));
    let mut short = DeviceInfo { argsz: 15, ..Default::default() };
    assert_eq!(client.ioctl(device, GET_INFO, &mut short), Err(Errno::INVAL));

    let region = |index| {
        let mut region = RegionInfo { argsz: RegionInfo::SIZE as u32, index, ..Default::default() };
        client.ioctl(device, GET_REGION_INFO, &mut region).map(|_| (region.flags, region.size, region.offset))
    };
    assert_eq!(region(0), Ok((REGION_READ | REGION_WRITE, 0x1000, 0)));
    assert_eq!(region(2), Ok((REGION_READ | REGION_WRITE | REGION_MMAP, 0x1_0000, BUFFER)));
    assert_eq!(region(7), Ok((REGION_READ | REGION_WRITE, 0x1000, CONFIG)));
    for empty in [1, 3, 4, 5, 6] {
        assert_eq!(region(empty), Ok((0, 0, u64::from(empty) << 40)));
    }
    assert_eq!([8, 9, u32::MAX].map(region), [Err(Errno::INVAL); 3]);

    let irqs = |index| {
        let mut irqs = IrqInfo { argsz: 16, index, ..Default::default() };
        client.ioctl(device, GET_IRQ_INFO, &mut irqs).map(|_| (irqs.flags, irqs.count))
    };
    assert_eq!([0, 1, 2, 3, 4].map(irqs), [Ok((7, 1)), Ok((9, 8)), Ok((1, 8)), Ok((9, 1)), Ok((9, 1))]);
    assert_eq!(irqs(5), Err(Errno::INVAL));

    let mut hot = HotResetInfo { argsz: 12, ..Default::default() };
    assert_eq!(client.ioctl(device, GET_PCI_HOT_RESET_INFO, &mut hot), Err(Errno::NODEV));
    let feature = |flags| client.ioctl(device, FEATURE, &mut Feature { argsz: 8, flags });
    assert_eq!(feature(FEATURE_GET | 1), Err(Errno::NOTTY));
    assert_eq!(feature(FEATURE_PROBE | FEATURE_GET | FEATURE_SET | 3), Err(Errno::NOTTY));
    assert_eq!(feature(FEATURE_GET | FEATURE_SET), Err(Errno::INVAL));
    assert_eq!(feature(1 << 30), Err(Errno::INVAL));
    assert_eq!(client.ioctl_bytes(device, io(199), &[0; 8]).0, Err(Errno::NOTTY));
    assert_eq!(client.ioctl_bytes(device, 0x1234, &[0; 8]).0, Err(Errno::NOTTY));
}

#[test]
fn configuration_space() {
    let client = Client::new(1);
    let (device, iommufd) = (client.open_device(0), client.open_iommufd());
    client.bind(device, iommufd).unwrap();
    let word = |at| u16::from_le_bytes(client.pread(device, CONFIG + at, 2).unwrap().try_into().unwrap());
    assert_eq!((word(0), word(2)), (VENDOR, DEVICE));
    assert_eq!(word(4), 2);
    client.make_master(device);
    assert_eq!(word(4), 6);
    assert_eq!(client.pread(device, CONFIG, 4096).unwrap().len(), 4096);
    assert_eq!(client.pread(device, CONFIG, 4097), Err(Errno::FAULT));
    assert_eq!(client.pread(device, CONFIG + 4095, 2), Err(Errno::FAULT));
    assert_eq!(client.pread(device, CONFIG + 4096, 0), Ok(vec![]));
    assert_eq!(client.pwrite(device, CONFIG + 4095, &[1, 2]), Err(Errno::FAULT));
    client.pwrite(device, CONFIG + 0x10, &[0xff; 4]).unwrap();
    assert_eq!(client.pread(device, CONFIG + 0x10, 4), Ok(vec![0, 0xf0, 0xff, 0xff]));
}

#[test]
fn offsets_that_lead_nowhere() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    for at in [0x1000, 1 << 40, (2 << 40) + 0x1_0000, 6 << 40, 8 << 40, 9 << 40, u64::MAX, u64::MAX - 7, i64::MAX as u64] {
        assert_eq!(client.pread(device, at, 4), Err(Errno::INVAL), "{at:#x}");
        assert_eq!(client.pwrite(device, at, &[0; 4]), Err(Errno::INVAL), "{at:#x}");
    }
    // A read over the end is cut there.
    assert_eq!(client.pread(device, 0xffc, 64).unwrap().len(), 4);
    assert_eq!(client.pwrite(device, BUFFER + 0xfffe, &[5; 8]), Ok(2));
}

#[test]
fn the_buffer_is_what_a_mapping_shows() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    assert_eq!(client.pwrite(device, BUFFER + 3, b"through write"), Ok(13));
    let mut seen = [0; 13];
    rustix::io::pread(client.shared(device), &mut seen, BUFFER + 3).unwrap();
    assert_eq!(&seen, b"through write");
    rustix::io::pwrite(client.shared(device), b"mapped", BUFFER + 0xfffa).unwrap();
    assert_eq!(client.pread(device, BUFFER + 0xfffa, 100), Ok(b"mapped".to_vec()));
    let map = |offset, len, flags| client.mmap(device, Mmap { len, prot: 3, flags, offset });
    assert_eq!(map(BUFFER, 0x1_0000, 1), Ok(()));
    assert_eq!(map(BUFFER + 0x1000, 0xf000, 3), Ok(()));
    assert_eq!(map(BUFFER, 100, 1), Ok(()));
    let refused = [
        (BUFFER, 0x1_1000, 1),
        (BUFFER + 0x1000, 0x1_0000, 1),
        (BUFFER + 0x1_0000, 0x1000, 1),
        (BUFFER, 0x1_0001, 1),
        (BUFFER, u64::MAX, 1),
        (BUFFER, 0, 1),
        (BUFFER, 0x1000, 2),
        (BAR0, 0x1000, 1),
        (CONFIG, 0x1000, 1),
        (1 << 40, 0x1000, 1),
        (u64::MAX - 4095, 0x1000, 1),
    ];
    for (offset, len, flags) in refused {
        assert_eq!(map(offset, len, flags), Err(Errno::INVAL), "{offset:#x} {len:#x} {flags}");
    }
}

#[test]
fn a_front_without_memory_behind_descriptors_has_a_buffer_too() {
    let client = Client::with(1, false);
    let (device, ..) = client.ready(0);
    let mut region = RegionInfo { argsz: 32, index: 2, ..Default::default() };
    client.ioctl(device, GET_REGION_INFO, &mut region).unwrap();
    assert_eq!(region.flags, REGION_READ | REGION_WRITE);
    client.pwrite(device, BUFFER, b"bytes").unwrap();
    assert_eq!(client.pread(device, BUFFER, 5), Ok(b"bytes".to_vec()));
    assert_eq!(client.mmap(device, Mmap { len: 4096, prot: 3, flags: 1, offset: BUFFER }), Err(Errno::INVAL));
}

#[test]
fn memory_that_was_truncated_is_an_error() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    rustix::fs::ftruncate(client.shared(device), BUFFER + 0x1000).unwrap();
    assert_eq!(client.pread(device, BUFFER, 8).unwrap().len(), 8);
    assert_eq!(client.pread(device, BUFFER + 0x1000, 8), Err(Errno::IO));
}

#[test]
fn plain_reads_and_writes_move_on() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    client.set_register(device, engine::SRC, 11);
    client.set_register(device, engine::DST, 22);
    assert_eq!(client.read(device, 8, None).unwrap(), 11u64.to_le_bytes());
    assert_eq!(client.write(device, &33u64.to_le_bytes(), None), Ok(8));
    assert_eq!(client.register(device, engine::DST), 33);
}

#[test]
fn bars_are_silent_when_memory_is_off() {
    let client = Client::new(1);
    let (device, ..) = client.ready(0);
    client.pwrite(device, CONFIG + 4, &4u16.to_le_bytes()).unwrap();
    assert_eq!(client.pread(device, BAR0, 8), Err(Errno::IO));
    assert_eq!(client.pwrite(device, BUFFER, &[1]), Err(Errno::IO));
    client.make_master(device);
    client.pwrite(device, CONFIG + 0x44, &[3]).unwrap();
    assert_eq!(client.pread(device, BAR0, 8), Err(Errno::IO));
    client.pwrite(device, CONFIG + 0x44, &[0]).unwrap();
    assert!(client.pread(device, BAR0, 8).is_ok());
}

#[test]
fn pasids_are_checked_and_there_are_none() {
    let client = Client::new(1);
    let (device, _, ioas) = client.ready(0);
    let attach = |argsz, flags, pasid| {
        let mut attach = AttachPt { argsz, flags, pt_id: ioas, pasid };
        client.ioctl(device, ATTACH_IOMMUFD_PT, &mut attach)
    };
    assert_eq!(attach(11, 0, 0), Err(Errno::INVAL));
    assert_eq!(attach(12, 0, 0), Ok(0));
    assert_eq!(attach(15, PT_PASID, 1), Err(Errno::INVAL));
    assert_eq!(attach(16, PT_PASID, 1), Err(Errno::INVAL));
    assert_eq!(attach(16, 2, 0), Err(Errno::INVAL));
    let detach = |argsz, flags| client.ioctl(device, DETACH_IOMMUFD_PT, &mut DetachPt { argsz, flags, pasid: 1 });
    assert_eq!(detach(8, PT_PASID), Err(Errno::INVAL));
    assert_eq!(detach(12, PT_PASID), Ok(0));
    assert_eq!(detach(8, 2), Err(Errno::INVAL));
    // None of this has touched the device's own address space.
    assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
}

#[test]
fn an_iommufd_of_another_host() {
    let (client, other) = (Client::new(1), Client::new(1));
    let (device, foreign) = (client.open_device(0), client.install(other.host.open()));
    assert_eq!(client.bind(device, foreign), Err(Errno::INVAL));
    let own = client.open_iommufd();
    assert!(client.bind(device, own).is_ok());
}

#[test]
fn sysfs_and_the_device_agree() {
    let client = Client::new(3);
    let (device, ..) = client.ready(2);
    client.pwrite(device, CONFIG + 4, &2u16.to_le_bytes()).unwrap();
    let entries: std::collections::BTreeMap<_, _> = client.fleet.entries().into_iter().collect();
    let dir = format!("/sys/devices/pci4c53:00/{}", client.fleet.addresses()[2]);
    let lockstep_vfio::Entry::Bytes(config) = &entries[&format!("{dir}/config")] else { panic!("no bytes") };
    assert_eq!(client.pread(device, CONFIG, 4096).unwrap(), *config);
    let vendor = entries[&format!("{dir}/vendor")].open().unwrap();
    let fd = client.install(vendor);
    assert_eq!(client.read(fd, 4, None).unwrap(), b"0x1a");
    assert_eq!(client.read(fd, 100, None).unwrap(), b"f4\n");
    assert_eq!(client.read(fd, 100, None).unwrap(), b"");
    assert_eq!(client.pread(fd, 2, 2).unwrap(), b"1a");
    assert_eq!(client.fleet.paths(), ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1", "/dev/vfio/devices/vfio2"]);
}
