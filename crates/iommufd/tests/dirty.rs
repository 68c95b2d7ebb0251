//! IOMMU_HWPT_SET_DIRTY_TRACKING and IOMMU_HWPT_GET_DIRTY_BITMAP, with real DMA behind.

mod fakes;

use addr::{Iova, Span};
use backing::{Backing, Frames, UserRegion};
use fakes::{Desk, errno};
use ioas::Place;
use iommu::Dma;
use lockstep_iommufd::uapi::{
    DIRTY_NO_CLEAR, DIRTY_TRACKING_ENABLE, HWPT_DIRTY_TRACKING, HWPT_NEST_PARENT, HwptGetDirtyBitmap, HwptSetDirtyTracking,
};
use lockstep_iommufd::{Caller, DeviceObject, EngineDriver, Touch};
use pt::Perm;
use rustix::io::Errno;
use std::sync::Arc;

const BASE: u64 = 0x40_0000;
const PAGES: u64 = 64;

/// A device of the engine's kind, on a table that tracks.
struct Tracked {
    desk: Desk,
    device: Arc<DeviceObject>,
    ioas: u32,
    hwpt: u32,
    dma: Dma,
}

impl Tracked {
    /// With an area of `pages` at [`BASE`], of single pages if not `large`.
    fn new(pages: u64, large: bool) -> Self {
        let desk = Desk::new();
        let device = desk.bind(Arc::into_inner(EngineDriver::new(&desk.host)).unwrap());
        let ioas = desk.ioas();
        desk.context.ioas(ioas).unwrap().ioas().set_large_leaves(large).unwrap();
        let hwpt = desk.hwpt(&device, ioas, HWPT_DIRTY_TRACKING).unwrap();
        device.attach(None, hwpt).unwrap();
        let dma = Dma::new(device.device()).unwrap();
        let own = Self { desk, device, ioas, hwpt, dma };
        own.map(BASE, pages);
        own
    }

    fn map(&self, at: u64, pages: u64) {
        let memory = Backing::memfd(pages << 12, Frames::Contiguous).unwrap();
        let ioas = self.desk.context.ioas(self.ioas).unwrap();
        ioas.ioas().map_file(&memory, 0, pages << 12, Place::Fixed(Iova::new(at)), Perm::RW).unwrap();
    }

    fn track(&self, flags: u32) -> Result<i64, Errno> {
        self.desk.call(0x8b, &mut HwptSetDirtyTracking { size: 16, flags, hwpt_id: self.hwpt, __reserved: 1 })
    }

    fn write(&mut self, at: u64) {
        self.dma.write(Iova::new(at), b"x").unwrap();
    }

    fn arg(&self, flags: u32, iova: u64, length: u64, data: u64) -> HwptGetDirtyBitmap {
        HwptGetDirtyBitmap { size: 48, hwpt_id: self.hwpt, flags, iova, length, page_size: 4096, data, ..Default::default() }
    }

    /// The bits of the first 64 pages.
    fn bits(&self, flags: u32) -> u64 {
        let at = self.desk.local.put(&0u64);
        assert_eq!(self.desk.call(0x8c, &mut self.arg(flags, BASE, PAGES << 12, at)), Ok(0));
        self.desk.local.get(at)
    }
}

fn page(n: u64) -> u64 {
    BASE + (n << 12)
}

#[test]
fn written_pages_are_told_once() {
    let mut own = Tracked::new(PAGES, false);
    own.write(page(1));
    assert_eq!(own.track(DIRTY_TRACKING_ENABLE), Ok(0), "the reserved field is not looked at");
    assert_eq!(own.bits(DIRTY_NO_CLEAR), 0, "what was written before does not count");
    for n in [0, 3, 4, 63] {
        own.write(page(n));
    }
    let expected = 1 << 63 | 1 << 4 | 1 << 3 | 1;
    assert_eq!(own.bits(DIRTY_NO_CLEAR), expected);
    assert_eq!(own.bits(0), expected);
    assert_eq!(own.bits(0), 0);
    own.write(page(9));
    assert_eq!(own.track(DIRTY_TRACKING_ENABLE), Ok(0), "twice is fine, and forgets");
    assert_eq!(own.bits(0), 0);
    assert_eq!(own.track(0), Ok(0));
    own.write(page(9));
    assert_eq!(own.bits(0), 0);
    assert_eq!(own.track(2), Err(Errno::OPNOTSUPP));
}

/// Each line adds a mistake that is found before those above it (rule 56).
#[test]
fn mistakes_are_found_in_order() {
    let own = Tracked::new(PAGES, false);
    let plain = own.desk.hwpt(&own.device, own.ioas, 0).unwrap();
    let arg = |hwpt_id, iova, length, page_size| HwptGetDirtyBitmap { hwpt_id, page_size, ..own.arg(0, iova, length, 0) };
    for (hwpt_id, iova, length, page_size, expected) in [
        (own.hwpt, BASE, 4096, 4096, Ok(0)),
        (plain, BASE, 4096, 4096, Err(Errno::OPNOTSUPP)),
        (plain, BASE, 4096, 8192, Err(Errno::INVAL)),
        (plain, BASE, 4096, 0, Err(Errno::INVAL)),
        (plain, BASE + 1, 4096, 0, Err(Errno::INVAL)),
        (plain, BASE, 4095, 1, Err(Errno::INVAL)),
        (plain, u64::MAX - 4095, 8192, 4096, Err(Errno::OVERFLOW)),
        (plain, u64::MAX - 4095, 0, 4096, Err(Errno::INVAL)),
        (own.ioas, u64::MAX - 4095, 0, 4096, Err(Errno::NOENT)),
        // The end of the address space is no overflow.
        (own.hwpt, u64::MAX - 4095, 4096, 4096, Ok(0)),
    ] {
        assert_eq!(own.desk.call(0x8c, &mut arg(hwpt_id, iova, length, page_size)), expected, "{hwpt_id} {iova:#x} {length} {page_size}");
    }
    let mut wrong = arg(99, BASE, 0, 0);
    wrong.__reserved = 1;
    assert_eq!(own.desk.call(0x8c, &mut wrong), Err(Errno::OPNOTSUPP));
    (wrong.__reserved, wrong.flags) = (0, 2);
    assert_eq!(own.desk.call(0x8c, &mut wrong), Err(Errno::OPNOTSUPP));
    let mut set = HwptSetDirtyTracking { size: 16, flags: 1, hwpt_id: plain, __reserved: 0 };
    assert_eq!(own.desk.call(0x8b, &mut set), Err(Errno::OPNOTSUPP));
    set.hwpt_id = own.ioas;
    assert_eq!(own.desk.call(0x8b, &mut set), Err(Errno::NOENT));
    let parent = own.desk.bind(own.desk.fake());
    let table = own.desk.hwpt(&parent, own.ioas, HWPT_NEST_PARENT).unwrap();
    set.hwpt_id = own.desk.nested(&parent, table).unwrap();
    assert_eq!(own.desk.call(0x8b, &mut set), Err(Errno::NOENT), "only tables of an IOAS");
}

/// Bits are added to what is in the buffer, wherever it begins, and nothing else is touched.
#[test]
fn bits_are_set_and_never_cleared() {
    let mut own = Tracked::new(PAGES, false);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    for offset in [0, 1, 3, 7] {
        own.write(page(2));
        own.write(page(12));
        let at = own.desk.local.put(&[0x80u8; 24]);
        own.desk.call(0x8c, &mut own.arg(0, BASE, PAGES << 12, at + offset)).unwrap();
        let mut expected = [0x80; 24];
        expected[offset as usize] |= 1 << 2;
        expected[offset as usize + 1] |= 1 << 4;
        assert_eq!(own.desk.local.get::<[u8; 24]>(at), expected, "offset {offset}");
    }
    // Bit 0 is the first page that was asked for.
    own.write(page(12));
    let at = own.desk.local.put(&0u64);
    own.desk.call(0x8c, &mut own.arg(0, page(12), 4096, at)).unwrap();
    assert_eq!(own.desk.local.get::<u64>(at), 1);
}

/// The page size is looked at bit by bit; a bit stands for its lowest one.
#[test]
fn pages_of_any_size() {
    let mut own = Tracked::new(PAGES, false);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    own.write(page(4));
    let bits = |page_size, length| {
        let at = own.desk.local.put(&0u64);
        let mut arg = HwptGetDirtyBitmap { page_size, ..own.arg(DIRTY_NO_CLEAR, BASE, length, at) };
        own.desk.call(0x8c, &mut arg).map(|_| own.desk.local.get::<u64>(at))
    };
    assert_eq!(bits(4096, PAGES << 12), Ok(1 << 4));
    assert_eq!(bits(16384, PAGES << 12), Ok(1 << 1));
    assert_eq!(bits(PAGES << 12, PAGES << 12), Ok(1));
    assert_eq!(bits(1024, 16 << 12), Ok(0xf << 16));
    assert_eq!(bits(0x1800, 0x8000), Ok(0b11 << 8), "0x17ff is the mask, 0x800 the page");
    assert_eq!(bits(0x1800, 0x6000), Ok(0b11 << 8));
    assert_eq!(bits(0x1800, 0x7000), Err(Errno::INVAL));
    assert_eq!(bits(0x2800, 0x7000), Err(Errno::INVAL));
}

/// What comes behind a gap is not looked at, and stays as it is (rule 59).
#[test]
fn a_gap_ends_it() {
    let mut own = Tracked::new(8, false);
    own.map(page(8), 8);
    own.map(page(20), 8);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    for n in [1, 9, 21] {
        own.write(page(n));
    }
    assert_eq!(own.bits(0), 1 << 9 | 1 << 1);
    assert_eq!(own.bits(0), 0);
    let at = own.desk.local.put(&0u64);
    own.desk.call(0x8c, &mut own.arg(0, page(16), 8 << 12, at)).unwrap();
    assert_eq!(own.desk.local.get::<u64>(at), 0, "it begins with a gap");
    own.desk.call(0x8c, &mut own.arg(0, page(20), 8 << 12, at)).unwrap();
    assert_eq!(own.desk.local.get::<u64>(at), 2);
}

/// A bitmap that cannot be written is no error (rule 59), and nothing is lost by it: those pages count as written to still.
#[test]
fn what_cannot_be_told_stays() {
    // Two pages of bitmap, of which the second is not there.
    let mut own = Tracked::new(2 * 32768, false);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    let memory = Backing::user(UserRegion::new(2 << 12).unwrap(), Frames::Contiguous).unwrap();
    own.desk.local.add_at(&memory, 0x70_0000, Touch::Always).unwrap();
    own.desk.local.hide(0x70_1000, 4096).unwrap();
    for n in [5, 32768 + 9, 32768 + 10, 65535] {
        own.write(page(n));
    }
    let whole = (2 * 32768) << 12;
    own.desk.call(0x8c, &mut own.arg(0, BASE, whole, 0x70_0000)).unwrap();
    assert_eq!(own.desk.local.get::<u8>(0x70_0000), 1 << 5);
    let all = own.desk.local.put(&[0u8; 8192][..]);
    own.desk.call(0x8c, &mut own.arg(0, BASE, whole, all)).unwrap();
    let bytes = own.desk.local.get::<[u8; 8192]>(all);
    assert_eq!((bytes[4097], bytes[8191]), (0b110, 0x80));
    own.desk.call(0x8c, &mut own.arg(0, BASE, whole, 0)).unwrap();
    assert_eq!(own.bits(0), 0);
}

/// A dirty leaf is dirty as a whole, and the read does not reach behind the range (rule 58).
#[test]
fn large_leaves() {
    let mut own = Tracked::new(1024, true);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    own.write(page(700));
    let at = own.desk.local.put(&[0u8; 256][..]);
    own.desk.call(0x8c, &mut own.arg(DIRTY_NO_CLEAR, BASE, 1024 << 12, at)).unwrap();
    let told: u32 = own.desk.local.get::<[u8; 256]>(at).iter().map(|byte| byte.count_ones()).sum();
    let leaf = own.device.device().domain().unwrap().table().walk(Iova::new(page(700))).unwrap();
    assert_eq!(u64::from(told), leaf.size.bytes() >> 12);
    // Half of it: the other half is told later.
    let at = own.desk.local.put(&[0u8; 256][..]);
    own.desk.call(0x8c, &mut own.arg(0, BASE, 768 << 12, at)).unwrap();
    own.desk.call(0x8c, &mut own.arg(0, page(768), 256 << 12, at + 96)).unwrap();
    let told: u32 = own.desk.local.get::<[u8; 256]>(at).iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(u64::from(told), leaf.size.bytes() >> 12);
    own.desk.call(0x8c, &mut own.arg(0, BASE, 1024 << 12, at + 128)).unwrap();
    assert_eq!(own.desk.local.get::<[u8; 128]>(at + 128), [0; 128]);
}

/// Against a model: random writes and reads of random ranges.
#[test]
fn random_reads_against_a_model() {
    let mut own = Tracked::new(PAGES, false);
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    let mut model = 0u64;
    for _ in 0..2000 {
        let n = random.u64(..PAGES);
        if random.bool() {
            own.write(page(n));
            model |= 1 << n;
            continue;
        }
        let len = random.u64(1..=PAGES - n);
        let mask = if len == 64 { u64::MAX } else { ((1 << len) - 1) << n };
        let keep = random.bool();
        let at = own.desk.local.put(&0u64);
        own.desk.call(0x8c, &mut own.arg(u32::from(keep), page(n), len << 12, at)).unwrap();
        assert_eq!(own.desk.local.get::<u64>(at), (model & mask) >> n);
        model &= if keep { u64::MAX } else { !mask };
    }
}

/// More dirty spans than are kept at once: every second page of 4 GiB, on one page of memory over and over.
#[test]
fn a_large_range_is_read_in_parts() {
    let own = Tracked::new(1, false);
    let memory = Backing::simulated(4 << 30, Frames::Contiguous).unwrap();
    let ioas = own.desk.context.ioas(own.ioas).unwrap();
    let at = 1u64 << 32;
    ioas.ioas().map_file(&memory, 0, 4 << 30, Place::Fixed(Iova::new(at)), Perm::RW).unwrap();
    own.track(DIRTY_TRACKING_ENABLE).unwrap();
    let domain = own.device.device().domain().unwrap();
    let pages = (4u64 << 30) >> 12;
    {
        let mut slot = own.desk.host.iommu().readers().slot();
        let _guard = slot.guard(domain.id());
        for n in (0..pages).step_by(2) {
            assert!(domain.table().mark_dirty(Iova::new(at + (n << 12))));
        }
    }
    let bitmap = Backing::user(UserRegion::new(pages / 8).unwrap(), Frames::Contiguous).unwrap();
    own.desk.local.add_at(&bitmap, 0x7000_0000, Touch::Always).unwrap();
    let cuts = domain.table().cuts();
    assert_eq!(own.desk.call(0x8c, &mut own.arg(0, at, 4 << 30, 0x7000_0000)), Ok(0));
    let mut bytes = vec![0; (pages / 8) as usize];
    own.desk.local.read(0x7000_0000, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0x55));
    assert_eq!(domain.table().cuts(), cuts, "no leaf was cut");
    let mut left = false;
    ioas.ioas().read_dirty(&domain, Span::from_len(Iova::new(at), 4 << 30).unwrap(), false, |_| left = true).unwrap();
    assert!(!left);
    assert_eq!(errno(own.device.attach(None, own.hwpt)), Err(Errno::BUSY));
}
