//! Every ioctl of the table and every test operation, with its first fallible step failing, then its second, until it succeeds. A call that failed
//! changed nothing that anybody can see (I-10), and works when it is made again.
#![cfg(feature = "test-ops")]

mod client;

use addr::{Iova, Span};
use client::{APERTURE, Client, FIXED_RW, Mock, PAGE};
use lockstep_iommufd::uapi::test::{self, INVALIDATE_ALL};
use lockstep_iommufd::uapi::{self, HWPT_DIRTY_TRACKING, HWPT_NEST_PARENT, HWPT_PASID, io, ours, vfio};
use lockstep_iommufd::{Answer, File, TABLE};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fmt::Write;
use sync::fail;

/// Where the file is mapped, and where nothing is.
const FILE_AT: u64 = APERTURE + (4 << 20);
const FREE_AT: u64 = APERTURE + (8 << 20);

/// Something of everything.
struct Rig {
    client: Client,
    va: u64,
    ioas: u32,
    /// An IOAS with two areas and without a page table.
    bare: u32,
    mock: Mock,
    pasid_table: u32,
    dirty: u32,
    parent: u32,
    nested: u32,
    viommu: u32,
    access: u32,
    item: u32,
    memfd: i32,
    dmabuf: i32,
}

impl Rig {
    fn new() -> Self {
        let client = Client::new();
        let (ioas, bare, va) = (client.ioas(), client.ioas(), client.memory(8));
        let mock = client.mock_with(12, ioas, test::DEVICE_PASID).unwrap();
        client.map(ioas, va, 8 * PAGE, APERTURE).unwrap();
        let file = memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 16 * PAGE).unwrap();
        let memfd = client.local.give(file).unwrap();
        client.map_file(ioas, memfd, 0, 8 * PAGE, FILE_AT).unwrap();
        client.map(bare, va, 4 * PAGE, APERTURE).unwrap();
        client.map_file(bare, memfd, 0, 4 * PAGE, FILE_AT).unwrap();
        let table = |flags| client.hwpt_alloc(mock.device, ioas, flags, None).unwrap();
        let (pasid_table, dirty, parent) = (table(HWPT_PASID), table(HWPT_DIRTY_TRACKING), table(HWPT_NEST_PARENT));
        let data = test::HwptData { iotlb: 7, ..test::HwptData::default() };
        let nested = client.hwpt_alloc(mock.device, parent, 0, Some(data)).unwrap();
        client.op(10, mock.own, test::MockDomainReplace { pt_id: pasid_table }).unwrap();
        client.op(18, mock.own, test::PasidAttach { pasid: 1, pt_id: pasid_table }).unwrap();
        client.call(0x8b, uapi::HwptSetDirtyTracking { hwpt_id: dirty, flags: 1, ..Default::default() }).unwrap();
        let access = client.access(ioas, test::ACCESS_NEEDS_PIN).unwrap();
        let item = client.access_pages(access, APERTURE, 2 * PAGE, va, 1).unwrap();
        let dmabuf = i32::try_from(client.op_value(22, 0, test::DmabufGet { length: 0x4000, open_flags: 0 }).unwrap().0).unwrap();
        client.call(0x88, uapi::VfioIoas { ioas_id: bare, op: uapi::VFIO_IOAS_SET, ..Default::default() }).unwrap();
        let mut rig = Self { client, va, ioas, bare, mock, pasid_table, dirty, parent, nested, viommu: 0, access, item, memfd, dmabuf };
        rig.viommu = viommu(&rig).unwrap().out_viommu_id;
        rig
    }

    /// What anybody can see: objects, areas, leaves, pins, accounts, attachments, descriptors.
    fn dump(&self) -> String {
        let (mut text, context) = (String::new(), &self.client.context);
        for object in (1..80).filter_map(|id| context.find(id)) {
            let _ = writeln!(text, "{} {}: {} users", object.kind(), object.head().id(), object.head().users());
        }
        for object in (1..80).filter_map(|id| context.ioas(id).ok()) {
            let ioas = object.ioas();
            let _ = writeln!(text, "IOAS {}: {:?} align {} large {}", object.id(), ioas.ranges(), ioas.alignment(), ioas.large_leaves());
            for area in ioas.areas() {
                let pinned = area.source().map(|source| (source.pinned(), source.pinned_pages()));
                let _ =
                    writeln!(text, "  area {} {:?} {:?} at {:#x}, {pinned:?}", area.span(), area.perm(), area.state(), area.offset_bytes());
            }
            for domain in ioas.domains() {
                let whole = Span::of(Iova::new(APERTURE), Iova::new(APERTURE + (1 << 28) - 1));
                let _ = writeln!(text, "  domain {} tracks dirty: {}", domain.id(), domain.tracks_dirty());
                // Cut or not, they say the same: only where the bytes are counts.
                let mut runs: Vec<(u64, u64, u64, String)> = Vec::new();
                domain.table().leaves(whole, |leaf| {
                    let (start, last, oa) = (leaf.span().start().get(), leaf.span().last().get(), leaf.oa.get());
                    match runs.last_mut() {
                        Some(run) if run.1 + 1 == start && run.2 + (start - run.0) == oa && run.3 == format!("{:?}", leaf.perm) => {
                            run.1 = last
                        }
                        _ => runs.push((start, last, oa, format!("{:?}", leaf.perm))),
                    }
                });
                runs.iter().for_each(|run| _ = writeln!(text, "    {run:x?}"));
            }
        }
        for device in (1..80).filter_map(|id| context.device(id).ok()) {
            let tables = [None, Some(1), Some(2)].map(|pasid| device.hwpt(pasid).map(|table| table.id()));
            let _ = writeln!(text, "device {} on {tables:?}", device.id());
        }
        let compat = self.client.call(0x88, uapi::VfioIoas::default()).map(|arg| arg.ioas_id).map_err(|refusal| refusal.errno);
        let limits =
            self.client.call(0x87, uapi::Option { op: 1, ..Default::default() }).map(|arg| arg.val64).map_err(|refusal| refusal.errno);
        let _ = writeln!(text, "VFIO {compat:?}, limits {limits:?}, {} pinned", self.client.host.accounts().pinned());
        let _ = writeln!(text, "descriptors {:?}", self.client.local.descriptors());
        text
    }

    /// Closes everything; nothing is left.
    fn close(self) {
        let Client { host, local, context } = self.client;
        local.exit();
        context.released();
        drop(context);
        assert_eq!((host.accounts().pinned(), host.iommu().arena().tables_in_use()), (0, 0));
    }

    fn vfio<S: uapi::Struct>(&self, nr: u32, arg: S) -> Answer {
        self.client.call(nr, arg).map(|_| ())
    }

    fn number(&self, nr: u32, arg: u64) -> Answer {
        self.client.local.call(&*self.client.context, io(nr), arg).map(|_| ())
    }
}

fn viommu(rig: &Rig) -> Answer<uapi::ViommuAlloc> {
    let data = rig.client.local.put(&test::ViommuData { in_data: 1, ..test::ViommuData::default() });
    let arg = uapi::ViommuAlloc {
        r#type: test::VIOMMU,
        dev_id: rig.mock.device,
        hwpt_id: rig.parent,
        data_len: 24,
        data_uptr: data,
        ..Default::default()
    };
    rig.client.call(0x90, arg)
}

fn vdevice(rig: &Rig) -> Answer {
    let arg = uapi::VdeviceAlloc { viommu_id: rig.viommu, dev_id: rig.mock.device, virt_id: 9, ..Default::default() };
    rig.client.call(0x91, arg).map(|_| ())
}

fn events(rig: &Rig) -> Answer {
    let arg = uapi::VeventqAlloc { viommu_id: rig.viommu, r#type: test::VEVENTQ, veventq_depth: 2, ..Default::default() };
    rig.client.call(0x93, arg).map(|_| ())
}

type Call = fn(&Rig) -> Answer;

/// Name in the table, and the call.
const IOCTLS: &[(&str, Call)] = &[
    ("VFIO_GET_API_VERSION", |rig| rig.number(0x64, 0)),
    ("VFIO_CHECK_EXTENSION", |rig| rig.number(0x65, 3)),
    ("VFIO_SET_IOMMU", |rig| rig.number(0x66, 1)),
    ("VFIO_IOMMU_GET_INFO", |rig| {
        // With room for what follows the structure.
        let mut bytes = [0u8; 256];
        bytes[0] = 255;
        let at = rig.client.local.put(&bytes);
        rig.number(0x70, at)
    }),
    ("VFIO_IOMMU_MAP_DMA", |rig| rig.vfio(0x71, vfio::DmaMap { flags: 3, vaddr: rig.va, iova: FREE_AT, size: PAGE, ..Default::default() })),
    ("VFIO_IOMMU_UNMAP_DMA", |rig| rig.vfio(0x72, vfio::DmaUnmap { iova: APERTURE, size: 4 * PAGE, ..Default::default() })),
    ("IOMMU_DESTROY", |rig| rig.client.destroy(rig.nested)),
    ("IOMMU_IOAS_ALLOC", |rig| rig.client.call(0x81, uapi::IoasAlloc::default()).map(|_| ())),
    ("IOMMU_IOAS_ALLOW_IOVAS", |rig| {
        let list = rig.client.local.put(&[[APERTURE, 2 * APERTURE], [3 * APERTURE, 4 * APERTURE]]);
        rig.vfio(0x82, uapi::IoasAllowIovas { ioas_id: rig.ioas, num_iovas: 2, allowed_iovas: list, ..Default::default() })
    }),
    ("IOMMU_IOAS_COPY", |rig| {
        // Into a page table that has nothing of it: pages are pinned again only if nobody has them.
        let arg = uapi::IoasCopy {
            flags: FIXED_RW,
            dst_ioas_id: rig.ioas,
            src_ioas_id: rig.bare,
            dst_iova: FREE_AT,
            src_iova: FILE_AT,
            length: 4 * PAGE,
            ..Default::default()
        };
        rig.vfio(0x83, arg)
    }),
    ("IOMMU_IOAS_IOVA_RANGES", |rig| {
        let list = rig.client.local.put(&[0u8; 256]);
        rig.vfio(0x84, uapi::IoasIovaRanges { ioas_id: rig.ioas, num_iovas: 16, allowed_iovas: list, ..Default::default() })
    }),
    ("IOMMU_IOAS_MAP", |rig| rig.client.map(rig.ioas, rig.va, 8 * PAGE, FREE_AT).map(|_| ())),
    ("IOMMU_IOAS_UNMAP", |rig| rig.client.unmap(rig.ioas, FILE_AT, 8 * PAGE).map(|_| ())),
    ("IOMMU_OPTION", |rig| rig.vfio(0x87, uapi::Option { option_id: 1, op: 0, object_id: rig.bare, val64: 0, ..Default::default() })),
    ("IOMMU_VFIO_IOAS", |rig| rig.vfio(0x88, uapi::VfioIoas { ioas_id: rig.ioas, op: 1, ..Default::default() })),
    ("IOMMU_HWPT_ALLOC", |rig| rig.client.hwpt_alloc(rig.mock.device, rig.ioas, HWPT_DIRTY_TRACKING, None).map(|_| ())),
    ("IOMMU_GET_HW_INFO", |rig| {
        let data = rig.client.local.put(&[0u8; 64]);
        rig.vfio(0x8a, uapi::HwInfo { dev_id: rig.mock.device, data_len: 64, data_uptr: data, ..Default::default() })
    }),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", |rig| rig.vfio(0x8b, uapi::HwptSetDirtyTracking { hwpt_id: rig.dirty, ..Default::default() })),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", |rig| {
        let data = rig.client.local.put(&[0u8; 64]);
        let arg =
            uapi::HwptGetDirtyBitmap { hwpt_id: rig.dirty, iova: APERTURE, length: 8 * PAGE, page_size: PAGE, data, ..Default::default() };
        rig.vfio(0x8c, arg)
    }),
    ("IOMMU_HWPT_INVALIDATE", |rig| {
        let data = rig.client.local.put(&test::NestedInvalidate { flags: INVALIDATE_ALL, iotlb_id: 0 });
        let arg = uapi::HwptInvalidate {
            hwpt_id: rig.nested,
            data_uptr: data,
            data_type: test::NESTED_INVALIDATE,
            entry_len: 8,
            entry_num: 1,
            ..Default::default()
        };
        rig.vfio(0x8d, arg)
    }),
    ("IOMMU_FAULT_QUEUE_ALLOC", |rig| rig.vfio(0x8e, uapi::FaultAlloc::default())),
    ("IOMMU_IOAS_MAP_FILE", |rig| rig.client.map_file(rig.ioas, rig.memfd, 8 * PAGE, 8 * PAGE, FREE_AT).map(|_| ())),
    ("IOMMU_VIOMMU_ALLOC", |rig| viommu(rig).map(|_| ())),
    ("IOMMU_VDEVICE_ALLOC", vdevice),
    ("IOMMU_IOAS_CHANGE_PROCESS", |rig| {
        // Addresses in memory cannot change hands.
        let only_files = |ioas| _ = rig.client.unmap(ioas, APERTURE, 8 * PAGE);
        rig.client.drop_pages(rig.access, rig.item).ok();
        [rig.ioas, rig.bare].into_iter().for_each(only_files);
        rig.vfio(0x92, uapi::IoasChangeProcess::default())
    }),
    ("IOMMU_VEVENTQ_ALLOC", events),
    ("IOMMU_HW_QUEUE_ALLOC", |rig| {
        let arg = uapi::HwQueueAlloc {
            viommu_id: rig.viommu,
            r#type: test::HW_QUEUE,
            nesting_parent_iova: APERTURE,
            length: PAGE,
            ..Default::default()
        };
        rig.vfio(0x94, arg)
    }),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", |rig| {
        rig.vfio(0x95, uapi::IoasNoiommuGetPa { ioas_id: rig.ioas, iova: APERTURE, length: PAGE, ..Default::default() })
    }),
    ("LOCKSTEP_IOAS_CUT", |rig| {
        rig.vfio(ours::NR_CUT, ours::IoasCut { ioas_id: rig.ioas, iova: FILE_AT + 4 * PAGE, ..Default::default() })
    }),
    ("LOCKSTEP_IOAS_CONVERT", |rig| {
        let arg = ours::IoasConvert {
            ioas_id: rig.ioas,
            to: ours::CONVERT_TO_PRIVATE,
            iova: FILE_AT + PAGE,
            length: 2 * PAGE,
            gpa: 0x10_0000,
            asid: 1,
            ..Default::default()
        };
        rig.vfio(ours::NR_CONVERT, arg)
    }),
    ("LOCKSTEP_IOAS_AUDIT", |rig| rig.vfio(ours::NR_AUDIT, ours::IoasAudit { ioas_id: rig.ioas, ..Default::default() })),
];

/// The test operations, by number.
const OPERATIONS: &[(u32, Call)] = &[
    (1, |rig| rig.client.op(1, rig.ioas, test::AddReserved { start: 1 << 32, length: PAGE }).map(|_| ())),
    (2, |rig| rig.client.mock(rig.bare).map(|_| ())),
    (3, |rig| rig.client.check_map(rig.mock.hwpt.max(rig.pasid_table), APERTURE, 8 * PAGE, rig.va)),
    (4, |rig| rig.client.check_refs(rig.va, 2 * PAGE, 1)),
    (5, |rig| rig.client.access(rig.bare, test::ACCESS_NEEDS_PIN).map(|_| ())),
    (6, |rig| rig.client.drop_pages(rig.access, rig.item)),
    (7, |rig| rig.client.access_pages(rig.access, FILE_AT, 4 * PAGE, 0, 0).map(|_| ())),
    (8, |rig| rig.client.rw(rig.access, APERTURE, 2 * PAGE, rig.va + 4 * PAGE, test::ACCESS_WRITE)),
    (9, |rig| rig.client.op(9, 0, test::MemoryLimit { limit: 65536 }).map(|_| ())),
    (10, |rig| rig.client.op(10, rig.mock.own, test::MockDomainReplace { pt_id: rig.pasid_table }).map(|_| ())),
    (11, |rig| rig.client.op(11, rig.access, test::AccessReplaceIoas { ioas_id: rig.bare }).map(|_| ())),
    (12, |rig| rig.client.mock_with(12, rig.bare, test::DEVICE_NO_DIRTY).map(|_| ())),
    (13, |rig| {
        let uptr = rig.client.local.put(&[0xffu8]);
        rig.client
            .op(13, rig.dirty, test::Dirty { iova: APERTURE, length: 8 * PAGE, page_size: PAGE, uptr, ..Default::default() })
            .map(|_| ())
    }),
    (14, |rig| rig.client.op(14, rig.nested, test::CheckIotlb { slot: 0, iotlb: 7 }).map(|_| ())),
    (15, |rig| {
        let queue = rig.client.call(0x8e, uapi::FaultAlloc::default())?;
        let (dev_id, flags) = (rig.mock.device, HWPT_PASID | uapi::HWPT_FAULT_ID_VALID);
        let arg = uapi::HwptAlloc { flags, dev_id, pt_id: rig.ioas, fault_id: queue.out_fault_id, ..Default::default() };
        let table = rig.client.call(0x89, arg)?.out_hwpt_id;
        rig.client.op(18, rig.mock.own, test::PasidAttach { pasid: 2, pt_id: table })?;
        rig.client.op(15, 0, test::TriggerIopf { dev_id, pasid: 2, grpid: 1, perm: 1, addr: APERTURE }).map(|_| ())
    }),
    (16, |rig| rig.client.op(16, rig.mock.device, test::CheckCache { slot: 0, cache: test::CACHE_START }).map(|_| ())),
    (17, |rig| {
        vdevice(rig)?;
        events(rig)?;
        let data = test::HwptData { iotlb: 7, ..test::HwptData::default() };
        let nested = rig.client.hwpt_alloc(rig.mock.device, rig.viommu, HWPT_PASID, Some(data))?;
        rig.client.op(10, rig.mock.own, test::MockDomainReplace { pt_id: nested })?;
        rig.client.op(17, 0, test::TriggerVevent { dev_id: rig.mock.device }).map(|_| ())
    }),
    (18, |rig| rig.client.op(18, rig.mock.own, test::PasidAttach { pasid: 2, pt_id: rig.pasid_table }).map(|_| ())),
    (19, |rig| rig.client.op(19, rig.mock.own, test::PasidAttach { pasid: 1, pt_id: rig.pasid_table }).map(|_| ())),
    (20, |rig| rig.client.op(20, rig.mock.own, test::PasidDetach { pasid: 1 }).map(|_| ())),
    (21, |rig| rig.client.op(21, rig.mock.own, test::PasidCheck { pasid: 1, hwpt_id: rig.pasid_table }).map(|_| ())),
    (22, |rig| rig.client.op(22, 0, test::DmabufGet { length: 0x4000, open_flags: 0 }).map(|_| ())),
    (23, |rig| rig.client.op(23, 0, test::DmabufRevoke { dmabuf_fd: rig.dmabuf, revoked: 1 }).map(|_| ())),
];

/// These make several calls: what a failing one leaves is what those before it did.
const SEVERAL: [&str; 3] = ["IOMMU_IOAS_CHANGE_PROCESS", "operation 15", "operation 17"];
/// Steps after which pages cannot go back to what they were (D-6): they stay out of every page table, and the caller is told.
const FOR_GOOD: [&str; 1] = ["convert.stage2"];

/// Fails step after step of a call; answers the names of those that failed.
fn sweep(name: &str, call: Call) -> BTreeSet<&'static str> {
    let mut names = BTreeSet::new();
    for nth in 1..1000 {
        let rig = Rig::new();
        let before = rig.dump();
        let plan = fail::nth(nth);
        let answer = call(&rig);
        let fired = plan.fired();
        drop(plan);
        let Some(step) = fired else {
            assert!(answer.is_ok(), "{name}: {answer:?}");
            rig.close();
            return names;
        };
        names.insert(step);
        if let Err(refusal) = &answer
            && FOR_GOOD.contains(&step)
        {
            assert_eq!(refusal.errno, Errno::IO, "{name}, whose step {nth} failed ({step}): {refusal}");
        } else if answer.is_err() && !SEVERAL.contains(&name) {
            assert_eq!(before, rig.dump(), "{name}, whose step {nth} failed ({step})");
            let again = call(&rig);
            assert!(again.is_ok(), "{name} again, after its step {nth} failed ({step}): {again:?}");
        }
        rig.close();
    }
    panic!("{name} never gets through");
}

#[test]
fn a_call_that_fails_changes_nothing() {
    let mut never = Vec::new();
    for entry in TABLE.iter().filter(|entry| entry.name != "IOMMU_TEST_CMD") {
        let found = IOCTLS.iter().find(|(name, _)| *name == entry.name);
        let (_, call) = found.unwrap_or_else(|| panic!("{} has no scenario here", entry.name));
        let steps = sweep(entry.name, *call);
        eprintln!("{}: {steps:?}", entry.name);
        if steps.is_empty() {
            never.push(entry.name);
        }
    }
    // Nothing of theirs can fail.
    assert_eq!(
        never,
        ["VFIO_GET_API_VERSION", "VFIO_CHECK_EXTENSION", "VFIO_SET_IOMMU", "VFIO_IOMMU_GET_INFO", "VFIO_IOMMU_UNMAP_DMA"],
        "calls without a fallible step"
    );
}

#[test]
fn a_test_operation_that_fails_changes_nothing() {
    for op in 1..=23 {
        let (_, call) = OPERATIONS.iter().find(|(own, _)| *own == op).unwrap_or_else(|| panic!("operation {op} has no scenario here"));
        let steps = sweep(&format!("operation {op}"), *call);
        eprintln!("operation {op}: {steps:?}");
    }
}

/// What the comparisons compare is there.
#[test]
fn the_rig_has_something_of_everything() {
    let rig = Rig::new();
    let dump = rig.dump();
    for part in ["IOAS", "virtual IOMMU", "access", "page table", "mock device", "area", "domain"] {
        assert!(dump.contains(part), "no {part} in\n{dump}");
    }
    assert_eq!(dump, rig.dump());
    rig.close();
}
