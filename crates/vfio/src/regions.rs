//! Where regions lie in the device's file, and how a read or write of any length becomes accesses that hardware knows.

use crate::config::CONFIG_BYTES;
use crate::uapi::{REGION_MMAP, REGION_READ, REGION_WRITE};

/// A region's index is in the offset from this bit on, as in vfio-pci.
pub const SHIFT: u32 = 40;
/// Bytes of the registers.
pub const BAR0_BYTES: u64 = iommu::engine::WINDOW_BYTES;
/// Bytes of the buffer, a power of two.
pub const BUFFER_BYTES: u64 = 64 << 10;
/// Regions of a PCI device.
pub const COUNT: u32 = 9;

/// A region of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Registers.
    Bar0,
    /// The buffer.
    Buffer,
    /// Configuration space.
    Config,
    /// One that this device does not have.
    Empty(u32),
}

impl Region {
    /// The region `index`.
    pub fn new(index: u32) -> Option<Self> {
        match index {
            0 => Some(Self::Bar0),
            2 => Some(Self::Buffer),
            7 => Some(Self::Config),
            1..=6 => Some(Self::Empty(index)),
            // VGA registers are no region of a device that is no display.
            _ => None,
        }
    }

    /// Its index.
    pub fn index(self) -> u32 {
        match self {
            Self::Bar0 => 0,
            Self::Buffer => 2,
            Self::Config => 7,
            Self::Empty(index) => index,
        }
    }

    /// Its bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::Bar0 => BAR0_BYTES,
            Self::Buffer => BUFFER_BYTES,
            Self::Config => CONFIG_BYTES as u64,
            Self::Empty(_) => 0,
        }
    }

    /// Where it begins in the file.
    pub fn offset(self) -> u64 {
        u64::from(self.index()) << SHIFT
    }

    /// What can be done with it.
    pub fn flags(self, mappable: bool) -> u32 {
        match self {
            Self::Bar0 | Self::Config => REGION_READ | REGION_WRITE,
            Self::Buffer => REGION_READ | REGION_WRITE | if mappable { REGION_MMAP } else { 0 },
            Self::Empty(_) => 0,
        }
    }
}

/// The region of a file offset, and the offset in it.
pub fn locate(offset: u64) -> Option<(Region, u64)> {
    let index = u32::try_from(offset >> SHIFT).ok()?;
    Some((Region::new(index)?, offset & ((1 << SHIFT) - 1)))
}

/// Cuts `len` bytes at `at` into naturally aligned accesses of at most `widest` bytes, in order: offset in the whole, and length.
pub fn accesses(at: u64, len: usize, widest: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let (now, left) = (at + done as u64, len - done);
        let width = [8, 4, 2, 1].into_iter().find(|width| *width <= left.min(widest) && now.is_multiple_of(*width as u64))?;
        done += width;
        Some((done - width, width))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_those_of_vfio_pci() {
        assert_eq!(Region::Buffer.offset(), 0x200_0000_0000);
        assert_eq!(locate(0x700_0000_0004), Some((Region::Config, 4)));
        assert_eq!(locate(0x100_0000_0000), Some((Region::Empty(1), 0)));
        assert_eq!(locate(0x800_0000_0000), None);
        assert_eq!(locate(u64::MAX), None);
        for index in 0..8 {
            assert_eq!(Region::new(index).map(Region::index), Some(index));
        }
    }

    #[test]
    fn accesses_are_natural() {
        let cut = |at, len| accesses(at, len, 8).collect::<Vec<_>>();
        assert_eq!(cut(0, 8), [(0, 8)]);
        assert_eq!(cut(4, 12), [(0, 4), (4, 8)]);
        assert_eq!(cut(1, 8), [(0, 1), (1, 2), (3, 4), (7, 1)]);
        assert_eq!(cut(0, 0), []);
        assert_eq!(accesses(0, 8, 4).collect::<Vec<_>>(), [(0, 4), (4, 4)]);
    }
}
