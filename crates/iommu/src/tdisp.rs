//! A trusted device interface (TDI): whose it is, where it stands (TDISP), and what its guest says of it in the secure device table entry (sDTE).
//!
//! The host binds and stops, the device's security manager locks and starts, the guest writes the entry; none of them can do another's part. What
//! follows for DMA is [`Trust`] and a pair of permissions, and nothing else is asked when the device accesses memory.
//!
//! | state | left by | DMA |
//! |---|---|---|
//! | UNLOCKED | lock | untrusted |
//! | LOCKED | start, stop, disturbance | untrusted |
//! | RUN | stop, disturbance | trusted while the entry is valid, otherwise none |
//! | ERROR | stop | none |
//!
//! Sources: PCIe base specification 6, chapter 11 (TDISP); SEV-TIO firmware interface 0.91 for the entry and its request, as published with the guest
//! driver. Ours, where these are silent: an entry does not outlive the state in which it was accepted, so whoever locks and starts again asks the guest
//! again; and a valid entry is taken in RUN only.

use crate::{Device, Error, Trust};
use addr::Gpa;
use pt::Perm;
use secure::Vmpl;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};

/// Where a trusted device interface stands (PCIe TDISP). The numbers are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Tdisp {
    /// CONFIG_UNLOCKED: not set up; the host may change it.
    Unlocked = 0,
    /// CONFIG_LOCKED: its configuration is fixed, the guest has not accepted it yet.
    Locked = 1,
    /// RUN: accepted; the only state in which its DMA may be trusted.
    Run = 2,
    /// ERROR: something touched the configuration; nothing goes until it is stopped.
    Error = 3,
}

impl fmt::Display for Tdisp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unlocked => "CONFIG_UNLOCKED",
            Self::Locked => "CONFIG_LOCKED",
            Self::Run => "RUN",
            Self::Error => "ERROR",
        })
    }
}

impl Device {
    /// Gives the interface to the guest with `asid`: the host's part, and the first step. Nothing is trusted yet.
    ///
    /// As every request about the interface: when it returns, no DMA under the old identity is in flight; when it fails, nothing has changed.
    ///
    /// # Errors
    /// [`Error::Asid`]; [`Error::Interface`] when it is bound already or not in CONFIG_UNLOCKED; [`Error::HeldByCaller`].
    pub fn bind(&self, asid: u32) -> Result<(), Error> {
        self.request(|interface| interface.bind(asid))
    }

    /// Takes it away from its guest, in any state. Its sDTE is void.
    ///
    /// # Errors
    /// [`Error::Interface`] when it is not bound; [`Error::HeldByCaller`].
    pub fn unbind(&self) -> Result<(), Error> {
        self.request(Interface::unbind)
    }

    /// LOCK_INTERFACE: from CONFIG_UNLOCKED to CONFIG_LOCKED. The answer is what [`Device::start_interface`] needs.
    ///
    /// # Errors
    /// [`Error::Interface`] in another state, or when it is not bound; [`Error::HeldByCaller`].
    pub fn lock_interface(&self) -> Result<Nonce, Error> {
        let nonce = Nonce::fresh();
        self.request(|interface| interface.lock(nonce))?;
        Ok(nonce)
    }

    /// START_INTERFACE: from CONFIG_LOCKED to RUN. Its DMA is T=1 from now on, and goes nowhere until the guest has written the sDTE.
    ///
    /// # Errors
    /// [`Error::Interface`] in another state, or when it is not bound; [`Error::Nonce`]; [`Error::HeldByCaller`].
    pub fn start_interface(&self, nonce: Nonce) -> Result<(), Error> {
        self.request(|interface| interface.start(nonce))
    }

    /// STOP_INTERFACE: to CONFIG_UNLOCKED, from anywhere. Its sDTE is void.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn stop_interface(&self) -> Result<(), Error> {
        self.request(|interface| {
            interface.stop();
            Ok(())
        })
    }

    /// Its configuration changed, or the encryption of its link failed: to ERROR when it was locked or ran, and its sDTE is void. A function-level reset
    /// ([`Device::reset`]) does the same.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn disturb(&self) -> Result<(), Error> {
        self.request(|interface| {
            interface.disturb();
            Ok(())
        })
    }

    /// The guest's SDTE_WRITE, what makes its DMA trusted: the last step, in RUN. Without the valid bit the guest takes its acceptance back.
    /// What firmware has against it is in the answer; then nothing has changed.
    ///
    /// # Errors
    /// [`Error::HeldByCaller`].
    pub fn write_sdte(&self, entry: Sdte) -> Result<SdteStatus, Error> {
        let written = self.request(|interface| match interface.write(entry) {
            SdteStatus::Success => Ok(()),
            status => Err(Error::Sdte { status }),
        });
        match written {
            Ok(()) => Ok(SdteStatus::Success),
            Err(Error::Sdte { status }) => Ok(status),
            Err(error) => Err(error),
        }
    }

    /// Where its interface stands.
    pub fn interface_state(&self) -> Tdisp {
        self.interface().state
    }

    /// The guest that it is bound to.
    pub fn bound(&self) -> Option<u32> {
        self.interface().bound
    }

    /// Its secure device table entry.
    pub fn sdte(&self) -> Sdte {
        self.interface().sdte
    }
}

/// What LOCK_INTERFACE answers and START_INTERFACE must bring.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 32]);

impl Nonce {
    /// One that nobody can have seen before. Enough for a model: it comes from the random keys of the standard library's hash tables.
    pub(crate) fn fresh() -> Self {
        let mut bytes = [0; 32];
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes()));
        Self(bytes)
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// A secure device table entry: 512 bits as the firmware interface lays them out, in eight little-endian words.
///
/// | bits | field |
/// |---|---|
/// | 0 | v: valid |
/// | 61 | ir: the device may read |
/// | 62 | iw: the device may write |
/// | 192..=203 | asid, set by firmware when the device is bound |
/// | 241..=242 | vmpl |
/// | 320 | vtom_en |
/// | 321..=351 | vtom, in units of 2 MiB |
///
/// ```
/// use addr::Gpa;
/// use lockstep_iommu_device::Sdte;
/// use pt::Perm;
/// use secure::Vmpl;
/// let entry = Sdte::new(Perm::RW, Vmpl::V1, Some(Gpa::new(1 << 46)));
/// assert!(entry.is_valid() && entry.perm().allows(Perm::WRITE));
/// assert_eq!((entry.vmpl(), entry.vtom()), (Vmpl::V1, Some(Gpa::new(1 << 46))));
/// assert_eq!(entry.words(), [0x6000_0000_0000_0001, 0, 0, 0x2_0000_0000_0000, 0, 0x400_0001, 0, 0]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sdte([u64; 8]);

const VALID: u64 = 1;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
const ASID: (usize, u64) = (3, 0xfff);
const VMPL_SHIFT: u32 = 49;
const VTOM_EN: u64 = 1;
const VTOM_SHIFT: u32 = 1;
const VTOM: u64 = 0x7fff_ffff;
/// vTOM is a multiple of 2 MiB.
const VTOM_LG2: u32 = 21;
/// What a guest may set; all else is firmware's or reserved, and must be zero in its request.
const GUEST: [u64; 8] = [VALID | READ | WRITE, 0, 0, 3 << VMPL_SHIFT, 0, VTOM_EN | VTOM << VTOM_SHIFT, 0, 0];

impl Sdte {
    /// A valid entry as a guest asks for it. A vTOM is rounded down to 2 MiB and has at most 52 bits.
    pub fn new(perm: Perm, vmpl: Vmpl, vtom: Option<Gpa>) -> Self {
        let right = |which, bit| if perm.allows(which) { bit } else { 0 };
        let vtom = vtom.map_or(0, |vtom| VTOM_EN | (vtom.get() >> VTOM_LG2 & VTOM) << VTOM_SHIFT);
        Self([VALID | right(Perm::READ, READ) | right(Perm::WRITE, WRITE), 0, 0, (vmpl as u64) << VMPL_SHIFT, 0, vtom, 0, 0])
    }

    /// From its bytes.
    pub fn from_bytes(bytes: &[u8; 64]) -> Self {
        let mut words = [0; 8];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Self(words)
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes.chunks_exact_mut(8).zip(self.0).for_each(|(chunk, word)| chunk.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// Its words, from the lowest bits up.
    pub fn words(self) -> [u64; 8] {
        self.0
    }

    /// Whether it gives the device an identity.
    pub fn is_valid(self) -> bool {
        self.0[0] & VALID != 0
    }

    /// ir and iw.
    pub fn perm(self) -> Perm {
        Perm::of(self.0[0] & READ != 0, self.0[0] & WRITE != 0)
    }

    /// The level whose permissions count.
    pub fn vmpl(self) -> Vmpl {
        Vmpl::new((self.0[3] >> VMPL_SHIFT & 3) as u8).unwrap_or_default()
    }

    /// The guest; 0 while firmware has not set it.
    pub fn asid(self) -> u32 {
        (self.0[ASID.0] & ASID.1) as u32
    }

    /// First address that means shared memory.
    pub fn vtom(self) -> Option<Gpa> {
        let word = self.0[5];
        (word & VTOM_EN != 0).then(|| Gpa::new((word >> VTOM_SHIFT & VTOM) << VTOM_LG2))
    }

    fn has_reserved_bits(self) -> bool {
        self.0.iter().zip(GUEST).any(|(word, guest)| word & !guest != 0)
    }

    fn with_asid(mut self, asid: u32) -> Self {
        self.0[ASID.0] = self.0[ASID.0] & !ASID.1 | u64::from(asid) & ASID.1;
        self
    }
}

/// What firmware answers to a guest's SDTE_WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum SdteStatus {
    /// The entry is as the guest wrote it.
    Success = 0,
    /// There is no such interface, or not in a state in which the entry could be valid.
    InvalidTdi = 1,
    /// The interface is bound to no guest.
    NotBound = 2,
    /// Bits are set that are reserved or firmware's.
    Reserved = 3,
}

/// ASIDs that fit both an RMP entry and the sDTE.
const ASIDS: std::ops::RangeInclusive<u32> = 1..=0x3fe;

/// An interface. Each request says what becomes of it, or why not; then nothing has changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interface {
    state: Tdisp,
    nonce: Option<Nonce>,
    bound: Option<u32>,
    sdte: Sdte,
}

impl Default for Interface {
    fn default() -> Self {
        Self { state: Tdisp::Unlocked, nonce: None, bound: None, sdte: Sdte::default() }
    }
}

impl Interface {
    pub(crate) fn bind(&mut self, asid: u32) -> Result<(), Error> {
        if !ASIDS.contains(&asid) {
            return Err(Error::Asid { asid });
        }
        if self.bound.is_some() || self.state != Tdisp::Unlocked {
            return Err(self.illegal("BIND"));
        }
        self.bound = Some(asid);
        Ok(())
    }

    /// The host takes the interface away from the guest; it may do so in any state.
    pub(crate) fn unbind(&mut self) -> Result<(), Error> {
        if self.bound.is_none() {
            return Err(self.illegal("UNBIND"));
        }
        (self.bound, self.sdte) = (None, Sdte::default());
        Ok(())
    }

    pub(crate) fn lock(&mut self, nonce: Nonce) -> Result<(), Error> {
        if self.state != Tdisp::Unlocked || self.bound.is_none() {
            return Err(self.illegal("LOCK_INTERFACE"));
        }
        (self.state, self.nonce) = (Tdisp::Locked, Some(nonce));
        Ok(())
    }

    pub(crate) fn start(&mut self, nonce: Nonce) -> Result<(), Error> {
        if self.state != Tdisp::Locked || self.bound.is_none() {
            return Err(self.illegal("START_INTERFACE"));
        }
        if self.nonce != Some(nonce) {
            return Err(Error::Nonce);
        }
        (self.state, self.nonce) = (Tdisp::Run, None);
        Ok(())
    }

    /// STOP_INTERFACE is legal everywhere, and the only way out of ERROR.
    pub(crate) fn stop(&mut self) {
        self.leave(Tdisp::Unlocked);
    }

    /// A change of configuration, a failure of the link's encryption or a function-level reset.
    /// Answers whether that made a difference.
    pub(crate) fn disturb(&mut self) -> bool {
        let counts = matches!(self.state, Tdisp::Locked | Tdisp::Run);
        if counts {
            self.leave(Tdisp::Error);
        }
        counts
    }

    fn leave(&mut self, to: Tdisp) {
        (self.state, self.nonce, self.sdte) = (to, None, Sdte::default());
    }

    /// The guest's request. Only success changes anything.
    pub(crate) fn write(&mut self, entry: Sdte) -> SdteStatus {
        let Some(asid) = self.bound else { return SdteStatus::NotBound };
        if entry.has_reserved_bits() {
            return SdteStatus::Reserved;
        }
        if entry.is_valid() && self.state != Tdisp::Run {
            return SdteStatus::InvalidTdi;
        }
        self.sdte = entry.with_asid(asid);
        SdteStatus::Success
    }

    /// What its DMA is (I-13).
    pub(crate) fn trust(&self) -> Trust {
        match self.state {
            Tdisp::Unlocked | Tdisp::Locked => Trust::Untrusted,
            Tdisp::Run | Tdisp::Error => Trust::Trusted {
                asid: self.sdte.asid(),
                vmpl: self.sdte.vmpl(),
                tdisp: self.state,
                sdte_valid: self.sdte.is_valid(),
                vtom: self.sdte.vtom(),
            },
        }
    }

    /// What a valid entry leaves of the page table's permissions.
    pub(crate) fn rights(&self) -> Perm {
        if self.sdte.is_valid() { self.sdte.perm() } else { Perm::RW }
    }

    fn illegal(&self, request: &'static str) -> Error {
        Error::Interface { request, state: self.state, bound: self.bound }
    }
}
