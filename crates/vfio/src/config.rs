//! PCI configuration space: which bytes there are, which bits a client may change, and what follows from a change.
//!
//! The identity is 1af4:10f0: device numbers 10f0 to 10ff of this vendor are set aside for experiments (docs/specs/pci-ids of QEMU), so no driver claims
//! the device by accident. What the revision counts is the register layout.

use crate::interrupts::Mode;
use crate::regions::{BAR0_BYTES, BUFFER_BYTES};

/// Vendor.
pub const VENDOR: u16 = 0x1af4;
/// Device.
pub const DEVICE: u16 = 0x10f0;
/// Layout of the registers.
pub const REVISION: u8 = 1;
/// Base class 08, subclass 80: a system peripheral of no other kind, as other DMA engines say.
pub const CLASS: u32 = 0x08_8000;
/// Bytes of configuration space: a PCI Express device's.
pub const CONFIG_BYTES: usize = 4096;
/// Vectors of MSI, and of MSI-X.
pub const VECTORS: u32 = 8;
/// Where the MSI-X table lies in BAR0.
pub const MSIX_TABLE: u64 = 0x800;
/// Where the MSI-X pending bits lie in BAR0.
pub const MSIX_PENDING: u64 = 0xc00;

/// Offsets, by the PCI Local Bus Specification 3.0, 6.1 and 6.2, and this device's capabilities.
pub mod at {
    /// 16 bits.
    pub const COMMAND: usize = 0x04;
    /// 16 bits.
    pub const STATUS: usize = 0x06;
    /// First of six, 32 bits each.
    pub const BAR0: usize = 0x10;
    /// Power management.
    pub const POWER: usize = 0x40;
    /// MSI.
    pub const MSI: usize = 0x50;
    /// MSI-X.
    pub const MSIX: usize = 0x70;
    /// PCI Express.
    pub const EXPRESS: usize = 0x80;
}

/// Bits of the command register.
pub mod command {
    /// BARs answer.
    pub const MEMORY: u16 = 1 << 1;
    /// The device may access memory.
    pub const MASTER: u16 = 1 << 2;
    /// INTx stays silent.
    pub const NO_INTX: u16 = 1 << 10;
}

/// INTx is pending.
const STATUS_INTX: u16 = 1 << 3;
/// Capabilities exist.
const STATUS_CAPS: u16 = 1 << 4;
/// Starts a function level reset, in the device control register.
const CONTROL_RESET: u16 = 1 << 15;
/// Largest vector count that MSI may use, as a logarithm: [`VECTORS`].
const MSI_LG2: u16 = 3;
const _: () = assert!(1 << MSI_LG2 == VECTORS);

/// The space of one device.
pub(crate) struct Config {
    bytes: Box<[u8; CONFIG_BYTES]>,
    /// Which bits a client may change.
    mask: Box<[u8; CONFIG_BYTES]>,
}

/// What else a write did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// The function is to be reset.
    pub(crate) reset: bool,
}

impl Config {
    /// As it is after the device was opened: memory answers, the device may not yet access memory by itself.
    pub(crate) fn new(bars: [u64; 2]) -> Self {
        let mut new = Self { bytes: Box::new([0; CONFIG_BYTES]), mask: Box::new([0; CONFIG_BYTES]) };
        new.fixed(0x00, &VENDOR.to_le_bytes());
        new.fixed(0x02, &DEVICE.to_le_bytes());
        new.open(at::COMMAND, command::MEMORY, command::MEMORY | command::MASTER | command::NO_INTX | 1 << 6 | 1 << 8);
        new.fixed(at::STATUS, &STATUS_CAPS.to_le_bytes());
        new.fixed(0x08, &[REVISION]);
        new.fixed(0x09, &CLASS.to_le_bytes()[..3]);
        new.open(0x0c, 0, 0x00ff);
        new.fixed(0x2c, &VENDOR.to_le_bytes());
        new.fixed(0x2e, &DEVICE.to_le_bytes());
        new.fixed(0x34, &[at::POWER as u8]);
        new.open(0x3c, 0x0100, 0x00ff);
        // BAR0: 32 bits. BAR2 and BAR3: one of 64 bits, prefetchable. Bits below the size stay 0, which is how clients learn the size.
        new.bar(at::BAR0, bars[0] as u32, !(BAR0_BYTES as u32 - 1), 0);
        new.bar(at::BAR0 + 8, bars[1] as u32, !(BUFFER_BYTES as u32 - 1), 0xc);
        new.bar(at::BAR0 + 12, (bars[1] >> 32) as u32, u32::MAX, 0);
        new.capabilities();
        new
    }

    fn capabilities(&mut self) {
        self.fixed(at::POWER, &[0x01, at::MSI as u8, 0x03, 0x00]);
        self.open(at::POWER + 4, 1 << 3, 0x3);
        self.fixed(at::MSI, &[0x05, at::MSIX as u8]);
        self.open(at::MSI + 2, 1 << 7 | MSI_LG2 << 1, 0x7 << 4);
        for half in [4, 6, 8, 10, 12] {
            self.open(at::MSI + half, 0, if half == 4 { 0xfffc } else { 0xffff });
        }
        self.fixed(at::MSIX, &[0x11, at::EXPRESS as u8, VECTORS as u8 - 1, 0]);
        self.fixed(at::MSIX + 4, &(MSIX_TABLE as u32).to_le_bytes());
        self.fixed(at::MSIX + 8, &(MSIX_PENDING as u32).to_le_bytes());
        // An endpoint, capability version 2, with function level reset; a link of one lane at 2.5 GT/s.
        self.fixed(at::EXPRESS, &[0x10, 0, 0x02, 0x00]);
        self.fixed(at::EXPRESS + 4, &0x1000_8000u32.to_le_bytes());
        self.open(at::EXPRESS + 8, 0x2810, 0x7fff);
        self.fixed(at::EXPRESS + 0xc, &0x11u32.to_le_bytes());
        self.open(at::EXPRESS + 0x10, 0, 0x0003);
        self.fixed(at::EXPRESS + 0x12, &0x11u16.to_le_bytes());
    }

    fn fixed(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn open(&mut self, at: usize, value: u16, mask: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.mask[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    fn bar(&mut self, at: usize, value: u32, mask: u32, kind: u32) {
        self.bytes[at..at + 4].copy_from_slice(&(value & mask | kind).to_le_bytes());
        self.mask[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_bits(&mut self, at: usize, bits: u16, on: bool) {
        let old = self.u16(at);
        self.fixed(at, &(if on { old | bits } else { old & !bits }).to_le_bytes());
    }

    /// Every byte, as a client reads them.
    pub(crate) fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    /// Changes what a client may change. The caller has checked the range.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) -> Effect {
        for (at, new) in (at..).zip(data) {
            let mask = self.mask[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
        let used = self.u16(at::MSI + 2) >> 4 & 7;
        if used > MSI_LG2 {
            self.set_bits(at::MSI + 2, 7 << 4, false);
            self.set_bits(at::MSI + 2, MSI_LG2 << 4, true);
        }
        let high = at::EXPRESS + 9;
        let reset = (at..at + data.len()).contains(&high) && u16::from(data[high - at]) << 8 & CONTROL_RESET != 0;
        Effect { reset }
    }

    /// Whether BARs answer: memory is enabled and the power state is D0.
    pub(crate) fn answers(&self) -> bool {
        self.u16(at::COMMAND) & command::MEMORY != 0 && self.u16(at::POWER + 4) & 3 == 0
    }

    /// Whether the device may access memory.
    pub(crate) fn is_master(&self) -> bool {
        self.u16(at::COMMAND) & command::MASTER != 0 && self.u16(at::POWER + 4) & 3 == 0
    }

    /// Whether INTx may be signalled.
    pub(crate) fn intx_enabled(&self) -> bool {
        self.u16(at::COMMAND) & command::NO_INTX == 0
    }

    /// Shows which interrupts are in use: like VFIO, the client sets them up with an ioctl and reads the result here.
    pub(crate) fn show(&mut self, mode: Mode, intx_pending: bool) {
        self.set_bits(at::MSI + 2, 1, mode == Mode::Msi);
        self.set_bits(at::MSIX + 2, 1 << 15, mode == Mode::Msix);
        self.set_bits(at::STATUS, STATUS_INTX, intx_pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(config: &Config, at: usize) -> u32 {
        u32::from_le_bytes(config.bytes()[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn bars_say_their_size() {
        let mut config = Config::new([0xfe00_0000, 0x80_0001_0000]);
        assert_eq!([0, 2, 3].map(|bar| dword(&config, at::BAR0 + 4 * bar)), [0xfe00_0000, 0x0001_000c, 0x80]);
        for bar in 0..6 {
            config.write(at::BAR0 + 4 * bar, &[0xff; 4]);
        }
        let sizes = [0, 1, 2, 3, 4, 5].map(|bar| dword(&config, at::BAR0 + 4 * bar));
        assert_eq!(sizes, [0xffff_f000, 0, 0xffff_000c, 0xffff_ffff, 0, 0]);
        assert_eq!((!(sizes[0] & !0xf)).wrapping_add(1), BAR0_BYTES as u32);
        assert_eq!((!(u64::from(sizes[3]) << 32 | u64::from(sizes[2] & !0xf))).wrapping_add(1), BUFFER_BYTES);
    }

    #[test]
    fn the_identity_stays_and_bits_of_no_meaning_too() {
        let mut config = Config::new([0, 0]);
        let before = config.bytes().to_vec();
        config.write(0, &[0xff; 4]);
        config.write(0x40, &[0xff; 4]);
        config.write(0x100, &[0xff; 0xf00]);
        assert_eq!(config.bytes()[..], before[..]);
        assert_eq!(dword(&config, 0), 0x10f0_1af4);
    }

    #[test]
    fn the_list_of_capabilities_ends() {
        let config = Config::new([0, 0]);
        let (mut at, mut seen) = (usize::from(config.bytes()[0x34]), Vec::new());
        while at != 0 && seen.len() < 10 {
            seen.push(config.bytes()[at]);
            at = usize::from(config.bytes()[at + 1]);
        }
        assert_eq!(seen, [1, 5, 0x11, 0x10]);
    }

    #[test]
    fn switches() {
        let mut config = Config::new([0, 0]);
        assert!(config.answers() && !config.is_master() && config.intx_enabled());
        config.write(at::COMMAND, &(command::MASTER | command::NO_INTX).to_le_bytes());
        assert!(!config.answers() && config.is_master() && !config.intx_enabled());
        config.write(at::POWER + 4, &[3]);
        assert!(!config.is_master());
        assert_eq!(config.write(at::EXPRESS + 8, &[0, 0x80]), Effect { reset: true });
        assert_eq!(config.write(at::EXPRESS + 9, &[0x7f]), Effect::default());
        assert_eq!(config.write(at::EXPRESS + 10, &[0xff]), Effect::default());
        config.write(at::MSI + 2, &[0xff, 0xff]);
        config.show(Mode::Msi, true);
        assert_eq!(dword(&config, at::MSI) >> 16, 0x00b7);
        assert_eq!(dword(&config, at::COMMAND) >> 16, 0x0018);
    }
}
