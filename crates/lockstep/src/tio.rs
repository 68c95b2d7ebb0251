//! Trusted devices of a guest (SEV-TIO): from binding an interface to the guest's acceptance of it, as a VMM passes the steps on.
//!
//! The VMM binds; the interface is locked then, and the guest looks at its report and measurements, which are not modelled. When the guest asks
//! for it the VMM starts the interface. Last comes the guest's own word, the secure device table entry, which no host can write: a message to
//! firmware that the VMM only carries. The way back is the same in reverse.

use crate::{Error, GuestDma};
use iommu::{Device, Nonce, Sdte, SdteStatus};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, MutexGuard, PoisonError};

/// Bytes of a guest's SDTE_WRITE message: its number of the interface (2), 14 that are reserved, the entry (64).
pub const SDTE_WRITE_BYTES: usize = 80;
/// Bytes of the answer: the number (2), a [`SdteStatus`] (2), 12 that are reserved.
pub const SDTE_WRITTEN_BYTES: usize = 16;

impl GuestDma {
    /// Binds the interface of `device` to the guest, who will call it `id`, and locks it. What comes back starts it.
    ///
    /// ```
    /// # use backing::{Backing, Frames};
    /// # use addr::{Gpa, Iova, Span};
    /// use lockstep_iommu::{Config, Dma, GuestDma, RecordedStage2, Sdte, SdteStatus, Trust};
    /// use pt::Perm;
    /// use secure::Vmpl;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let guest = GuestDma::new(&Config::default(), std::sync::Arc::new(RecordedStage2::new()))?;
    /// # let backing = Backing::memfd(2 << 20, Frames::Contiguous)?;
    /// # guest.add_memory(Gpa::new(0), 2 << 20, &backing, 0)?;
    /// let nic = guest.add_device("nic", Trust::Untrusted)?;
    /// let nonce = guest.bind_device(&nic, 0x100)?;
    /// guest.start_device(0x100, nonce)?;
    /// // What the guest sends, and the VMM passes on.
    /// let mut message = [0; lockstep_iommu::SDTE_WRITE_BYTES];
    /// message[..2].copy_from_slice(&0x100u16.to_le_bytes());
    /// message[16..].copy_from_slice(&Sdte::new(Perm::RW, Vmpl::V0, None).to_bytes());
    /// let answer = guest.sdte_write(&message)?;
    /// assert_eq!(answer[2..4], (SdteStatus::Success as u16).to_le_bytes());
    /// Dma::new(&nic)?.write(Iova::new(0x1000), b"trusted now")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The number is taken; the interface is another guest's, or not in CONFIG_UNLOCKED.
    pub fn bind_device(&self, device: &Arc<Device>, id: u16) -> Result<Nonce, Error> {
        match self.interfaces().entry(id) {
            Entry::Occupied(_) => Err(Error::Interface { id, taken: true }),
            Entry::Vacant(place) => {
                device.bind(self.space().asid())?;
                let nonce = device.lock_interface().inspect_err(|_| {
                    // It was bound by us, a moment ago.
                    let _ = device.unbind();
                })?;
                place.insert(Arc::clone(device));
                Ok(nonce)
            }
        }
    }

    /// The guest has seen enough of the interface: to RUN. Its DMA goes nowhere until the guest has written the entry.
    ///
    /// # Errors
    /// No such interface, a wrong nonce, or not in CONFIG_LOCKED.
    pub fn start_device(&self, id: u16, nonce: Nonce) -> Result<(), Error> {
        Ok(self.interface(id)?.start_interface(nonce)?)
    }

    /// Passes on a guest's SDTE_WRITE message, as it came. All of it is untrusted.
    ///
    /// # Errors
    /// The caller holds a slice of the device's memory. What firmware has against the message is in its answer.
    pub fn sdte_write(&self, message: &[u8; SDTE_WRITE_BYTES]) -> Result<[u8; SDTE_WRITTEN_BYTES], Error> {
        let (head, entry) = message.split_at(16);
        let id = u16::from_le_bytes([head[0], head[1]]);
        let entry: &[u8; 64] = entry.try_into().unwrap_or(&[0; 64]);
        let status = match self.interface(id) {
            Err(_) => SdteStatus::InvalidTdi,
            Ok(_) if head[2..].iter().any(|byte| *byte != 0) => SdteStatus::Reserved,
            Ok(device) => device.write_sdte(Sdte::from_bytes(entry))?,
        };
        let mut answer = [0; SDTE_WRITTEN_BYTES];
        answer[..2].copy_from_slice(&id.to_le_bytes());
        answer[2..4].copy_from_slice(&(status as u16).to_le_bytes());
        Ok(answer)
    }

    /// Takes the interface away from the guest and stops it. When this returns, none of its trusted DMA is in flight.
    ///
    /// # Errors
    /// No such interface, or the caller holds a slice of the device's memory.
    pub fn unbind_device(&self, id: u16) -> Result<(), Error> {
        let mut interfaces = self.interfaces();
        let device = interfaces.get(&id).ok_or(Error::Interface { id, taken: false })?;
        device.stop_interface()?;
        // Whoever unbound it past us has done our work.
        let unbound = device.unbind();
        if !matches!(unbound, Err(iommu::Error::Interface { .. })) {
            unbound?;
        }
        interfaces.remove(&id);
        Ok(())
    }

    fn interface(&self, id: u16) -> Result<Arc<Device>, Error> {
        self.interfaces().get(&id).cloned().ok_or(Error::Interface { id, taken: false })
    }

    fn interfaces(&self) -> MutexGuard<'_, HashMap<u16, Arc<Device>>> {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
