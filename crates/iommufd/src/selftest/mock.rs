//! Hardware that does not exist: a device and the IOMMU in front of it, whose caches are four words each, so that a test can see what was
//! invalidated.

use super::SELFTEST;
use crate::driver::{Driver, HwInfo, Nested, QueueMemory, Viommu};
use crate::hwpt::Hwpt;
use crate::ioas_ops::unsupported;
use crate::uapi::test::{self, DeviceInvalidate, HwInfoData, HwptData, NestedInvalidate, SLOTS, ViommuData};
use crate::uapi::{self, HWPT_DIRTY_TRACKING, HWPT_NEST_PARENT, HWPT_PASID};
use crate::user::{Entries, UserData};
use crate::viommu::{ViommuObject, ViommuSetup};
use crate::{Answer, Host, Refusal};
use addr::{Iova, PAGE_BYTES, SizeSet, Span};
use iommu::{Domain, DomainConfig};
use pt::FormatKind;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use sync::fail;
use zerocopy::IntoBytes;

/// All mock devices are behind one IOMMU.
const UNIT: u32 = 0xd0c;

/// Bits of a PASID.
const PASID_BITS: u8 = 20;
/// The PASID with which a failing attach can be tried: every second one fails.
const UNRELIABLE_PASID: u32 = 1024;

/// Four words of hardware.
#[derive(Debug)]
struct Slots([AtomicU32; SLOTS]);

impl Slots {
    fn new(value: u32) -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(value)))
    }

    fn is(&self, slot: u32, value: u32) -> bool {
        self.0.get(slot as usize).is_some_and(|own| own.load(Ordering::Relaxed) == value)
    }

    /// # Errors
    /// `EOPNOTSUPP` for a flag, `EINVAL` for a slot that is not there.
    fn check(flags: u32, slot: u32) -> Answer {
        if flags & !test::INVALIDATE_ALL != 0 {
            return Err(unsupported("an entry invalidates one slot or all of them"));
        }
        if slot as usize >= SLOTS {
            return Err(Refusal::new(Errno::INVAL, format!("there is no slot {slot}; slots are 0 to {}", SLOTS - 1)));
        }
        Ok(())
    }

    fn clear(&self, flags: u32, slot: u32) {
        let all = flags & test::INVALIDATE_ALL != 0;
        let gone = self.0.iter().enumerate().filter(|(own, _)| all || *own == slot as usize);
        gone.for_each(|(_, own)| own.store(0, Ordering::Relaxed));
    }
}

/// The IOMMU in front of one mock device.
#[derive(Debug)]
pub(super) struct MockDriver {
    host: Arc<Host>,
    flags: u32,
    cache: Slots,
    /// The next attach of [`UNRELIABLE_PASID`] fails.
    fails_next: AtomicBool,
}

impl MockDriver {
    /// # Errors
    /// `EINVAL` for a flag that is not known.
    pub(super) fn new(host: &Arc<Host>, flags: u32) -> Answer<Arc<Self>> {
        if flags & !(test::DEVICE_NO_DIRTY | test::DEVICE_PASID) != 0 {
            return Err(Refusal::new(Errno::INVAL, format!("{flags:#x} has bits that no mock device knows")));
        }
        fail::step(SELFTEST)?;
        Ok(Arc::new(Self { host: Arc::clone(host), flags, cache: Slots::new(test::CACHE_START), fails_next: AtomicBool::new(false) }))
    }

    pub(super) fn cache_is(&self, slot: u32, value: u32) -> bool {
        self.cache.is(slot, value)
    }
}

/// The page tables that a test can choose.
fn config(kind: u32) -> Answer<DomainConfig> {
    let span = |start, last| Some(Span::of(Iova::new(start), Iova::new(last)));
    Ok(match kind {
        // Half of the host's pages, so that the two are never confused; not from address 0, so that a forgotten address is noticed.
        0 => DomainConfig { format: FormatKind::AmdV1K2, aperture: span(16 << 20, (2 << 30) - 1), ..DomainConfig::default() },
        1 => DomainConfig {
            format: FormatKind::AmdV1K2,
            sizes: SizeSet(1 << 20 | PAGE_BYTES),
            aperture: span(0, (1 << 38) - 1),
            ..DomainConfig::default()
        },
        2 => DomainConfig::default(),
        _ => return Err(unsupported("mock page tables are default (0), huge (1) and AMDv1 (2)")),
    })
}

/// What a page table is made with, by the words that the caller gave.
fn hwpt_data(data: &UserData<'_>) -> Answer<HwptData> {
    if data.kind() != test::HWPT_DATA {
        return Err(unsupported("data for a mock page table has type 0xdead"));
    }
    data.read(test::HWPT_DATA, 4)
}

impl Driver for MockDriver {
    fn unit(&self) -> u32 {
        UNIT
    }

    fn hw_info(&self, wanted: Option<u32>) -> Answer<HwInfo> {
        if wanted.is_some_and(|kind| kind != 0 && kind != test::HW_INFO) {
            return Err(unsupported("mock hardware describes itself as type 0xfeedbeef only"));
        }
        let info = HwInfoData { flags: 0, test_reg: test::HW_INFO_WORD };
        Ok(HwInfo { kind: test::HW_INFO, bytes: info.as_bytes().to_vec() })
    }

    fn capabilities(&self) -> u64 {
        let dirty = if self.flags & test::DEVICE_NO_DIRTY == 0 { uapi::HW_CAP_DIRTY_TRACKING } else { 0 };
        dirty | uapi::HW_CAP_ATS_NOT_SUPPORTED
    }

    fn pasid_bits(&self) -> u8 {
        if self.flags & test::DEVICE_PASID != 0 { PASID_BITS } else { 0 }
    }

    fn paging(&self, flags: u32, data: Option<&UserData<'_>>) -> Answer<Arc<Domain>> {
        if flags & !(HWPT_DIRTY_TRACKING | HWPT_NEST_PARENT | HWPT_PASID) != 0 {
            return Err(unsupported("mock page tables know dirty tracking, nesting and PASIDs"));
        }
        let kind = data.map_or(Ok(0), |data| hwpt_data(data).map(|data| data.pagetable_type))?;
        let config = DomainConfig { tracks_dirty: flags & HWPT_DIRTY_TRACKING != 0, ..config(kind)? };
        Ok(self.host.iommu().domain_with(&config)?)
    }

    fn nested(&self, _: &Arc<Hwpt>, flags: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        Ok(MockNested::new(flags, data)?)
    }

    fn attach(&self, pasid: Option<u32>, _: &Hwpt) -> Answer {
        if pasid == Some(UNRELIABLE_PASID) && self.fails_next.fetch_xor(true, Ordering::Relaxed) {
            return Err(Refusal::of(Errno::NOMEM, "every second attach of PASID 1024 fails, for tests"));
        }
        Ok(())
    }

    fn detach(&self, pasid: Option<u32>) {
        if pasid == Some(UNRELIABLE_PASID) {
            self.fails_next.store(false, Ordering::Relaxed);
        }
    }

    fn has_viommu(&self, kind: u32) -> bool {
        kind == test::VIOMMU
    }

    fn viommu(&self, setup: &mut ViommuSetup<'_>) -> Answer<Arc<dyn Viommu>> {
        fail::step(SELFTEST)?;
        let given = setup.data().map(|data| data.read::<ViommuData>(test::VIOMMU, 8)).transpose()?;
        if let Some(mut words) = given {
            words.out_mmap_length = 2 * PAGE_BYTES;
            words.out_mmap_offset = setup.share(words.out_mmap_length, words.in_data.as_bytes())?;
            words.out_data = words.in_data;
            setup.data().map_or(Ok(()), |data| data.write(test::VIOMMU, size_of::<ViommuData>(), &words))?;
        }
        Ok(Arc::new(MockViommu))
    }
}

/// A page table of a user: its cache is all there is of it.
#[derive(Debug)]
pub(super) struct MockNested {
    iotlb: Slots,
}

impl MockNested {
    fn new(flags: u32, data: &UserData<'_>) -> Answer<Arc<Self>> {
        if flags & !HWPT_PASID != 0 {
            return Err(unsupported("a nested mock page table knows PASIDs, and nothing else"));
        }
        fail::step(SELFTEST)?;
        Ok(Arc::new(Self { iotlb: Slots::new(hwpt_data(data)?.iotlb) }))
    }

    pub(super) fn iotlb_is(&self, slot: u32, value: u32) -> bool {
        self.iotlb.is(slot, value)
    }
}

impl Nested for MockNested {
    /// Entry by entry: those before a bad one are carried out.
    fn invalidate(&self, entries: &Entries<'_>, done: &mut u32) -> Answer {
        check_kind(entries, test::NESTED_INVALIDATE)?;
        for index in 0..entries.count() {
            if entries.entry_len() as usize != size_of::<NestedInvalidate>() {
                return Err(Refusal::new(Errno::INVAL, format!("an entry has 8 bytes, not {}", entries.entry_len())));
            }
            let NestedInvalidate { flags, iotlb_id } = entries.read(index)?;
            Slots::check(flags, iotlb_id)?;
            self.iotlb.clear(flags, iotlb_id);
            *done += 1;
        }
        Ok(())
    }
}

fn check_kind(entries: &Entries<'_>, kind: u32) -> Answer {
    if entries.kind() == kind {
        return Ok(());
    }
    Err(Refusal::new(Errno::INVAL, format!("the entries have type {:#x}, and {kind:#x} is taken", entries.kind())))
}

/// A virtual IOMMU.
#[derive(Debug)]
pub(super) struct MockViommu;

impl Viommu for MockViommu {
    fn nested(&self, flags: u32, data: &UserData<'_>) -> Answer<Arc<dyn Nested>> {
        Ok(MockNested::new(flags, data)?)
    }

    /// All entries are read before the first is carried out.
    fn invalidate(&self, owner: &ViommuObject, entries: &Entries<'_>, done: &mut u32) -> Answer {
        check_kind(entries, test::VIOMMU_INVALIDATE)?;
        let list: Vec<DeviceInvalidate> = (0..entries.count()).map(|index| entries.read(index)).collect::<Answer<_>>()?;
        for DeviceInvalidate { flags, vdev_id, cache_id } in list {
            Slots::check(flags, cache_id)?;
            let device = owner.find_device(vdev_id.into());
            let unknown = || Refusal::new(Errno::INVAL, format!("no device has the number {vdev_id} in this virtual IOMMU"));
            let driver = device.as_ref().and_then(|device| device.driver().downcast::<MockDriver>()).ok_or_else(unknown)?;
            driver.cache.clear(flags, cache_id);
            *done += 1;
        }
        Ok(())
    }

    fn has_queues(&self, kind: u32) -> bool {
        kind == test::HW_QUEUE
    }

    /// From 0 up, each on top of the one before.
    fn add_queue(&self, queue: &QueueMemory, exists: &dyn Fn(u32) -> bool) -> Answer<Option<u32>> {
        let index = queue.index;
        let refused = |errno, why: &str| Err(Refusal::new(errno, format!("hardware queue {index} {why}")));
        if index >= test::HW_QUEUES {
            return refused(Errno::INVAL, "is more than there are");
        }
        if exists(index) {
            return refused(Errno::EXIST, "is there already");
        }
        let before = index.checked_sub(1);
        if before.is_some_and(|before| !exists(before)) {
            return refused(Errno::IO, "comes after one that is not there yet");
        }
        Ok(before)
    }
}
