//! The device file: what reads, writes, mappings and its end do. Its ioctls are in `calls`.

use crate::binding::Binding;
use crate::buffer::Buffer;
use crate::calls;
use crate::config::Config;
use crate::fleet::Place;
use crate::interrupts::Interrupts;
use crate::regions::{Region, accesses, locate};
use crate::registers::Registers;
use addr::PAGE_BYTES;
use iommufd::table::{self, Reply, Target};
use iommufd::{Answer, Caller, File, Mmap, Refusal};
use rustix::io::Errno;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

const MAP_SHARED: u32 = 1;
const MAP_SHARED_VALIDATE: u32 = 3;

/// One open of a device file. Until it is bound to an iommufd it answers nothing else.
///
/// Locks, in this order: `binding` (under which page tables are attached), `hardware` (under which DMA runs). So a page table can be replaced while a
/// command runs.
pub struct Cdev {
    own: Weak<Self>,
    pub(crate) place: Arc<Place>,
    binding: Mutex<Option<Binding>>,
    /// There while it is bound.
    hardware: Mutex<Option<Hardware>>,
    /// Of reads and writes that name none.
    position: AtomicU64,
}

/// The device as its client sees it.
pub(crate) struct Hardware {
    pub(crate) config: Config,
    pub(crate) registers: Registers,
    pub(crate) interrupts: Interrupts,
    pub(crate) buffer: Buffer,
}

impl Hardware {
    pub(crate) fn new(place: &Place, caller: &dyn Caller) -> Answer<Self> {
        Ok(Self {
            config: Config::new(place.bars()),
            registers: Registers::new(place.device())?,
            interrupts: Interrupts::default(),
            buffer: Buffer::new(caller)?,
        })
    }

    /// Registers as at the start. Configuration space, the buffer and where interrupts go stay as they are, as VFIO keeps them.
    pub(crate) fn reset(&mut self, place: &Place) -> Answer {
        self.registers = Registers::new(place.device())?;
        self.settle();
        Ok(())
    }

    /// Has the interrupt line and configuration space follow what has changed.
    pub(crate) fn settle(&mut self) {
        let level = self.registers.level();
        self.interrupts.set_level(level && self.config.intx_enabled());
        self.config.show(self.interrupts.mode(), level);
    }
}

impl Cdev {
    pub(crate) fn new(place: &Arc<Place>) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            place: Arc::clone(place),
            binding: Mutex::default(),
            hardware: Mutex::default(),
            position: AtomicU64::new(0),
        })
    }

    pub(crate) fn lock_binding(&self) -> MutexGuard<'_, Option<Binding>> {
        self.binding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_hardware(&self) -> MutexGuard<'_, Option<Hardware>> {
        self.hardware.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the device.
    ///
    /// # Errors
    /// `EINVAL` before it is bound.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Hardware) -> Answer<T>) -> Answer<T> {
        act(self.lock_hardware().as_mut().ok_or_else(unbound)?)
    }

    /// Gives the device back.
    pub(crate) fn unbind(&self) {
        let binding = self.lock_binding().take();
        if binding.is_some() {
            drop(binding);
            *self.lock_hardware() = None;
            self.place.give_back();
        }
    }

    fn offset(&self, at: Option<u64>) -> u64 {
        at.unwrap_or_else(|| self.position.load(Ordering::Relaxed))
    }

    fn moved(&self, at: Option<u64>, offset: u64, count: usize) {
        if at.is_none() {
            self.position.store(offset.saturating_add(count as u64), Ordering::Relaxed);
        }
    }
}

pub(crate) fn unbound() -> Refusal {
    Refusal::of(Errno::INVAL, "the device is not bound; VFIO_DEVICE_BIND_IOMMUFD comes first")
}

/// The region, the offset in it, and how much of `count` bytes is in it.
fn clamp(offset: u64, count: usize) -> Answer<(Region, u64, usize)> {
    let no = || Refusal::new(Errno::INVAL, format!("no region of the device is at offset {offset:#x}"));
    if count == 0 {
        return Ok((Region::Empty(0), 0, 0));
    }
    let (region, at) = locate(offset).ok_or_else(no)?;
    let left = region.size().saturating_sub(at);
    match region {
        Region::Config if (count as u64) > left => {
            Err(Refusal::new(Errno::FAULT, format!("{count} bytes at {at:#x} are not all in configuration space")))
        }
        _ if left == 0 => Err(no()),
        _ => Ok((region, at, count.min(left as usize))),
    }
}

fn silent(region: Region) -> Refusal {
    let text = format!("{region:?} does not answer: memory is switched off in the command register, or the power state is not D0");
    Refusal::new(Errno::IO, text)
}

fn gone(errno: Errno) -> Refusal {
    Refusal::of(errno, "the memory behind the device's buffer cannot be reached")
}

impl Target for Cdev {
    fn undo(&self, reply: Reply) {
        if let Reply::New(_) = reply {
            self.unbind();
        }
    }
}

impl File for Cdev {
    fn kind(&self) -> &'static str {
        "vfio device"
    }

    fn ioctl(&self, caller: &dyn Caller, command: u32, arg: u64) -> Answer<i64> {
        let own = self.own.upgrade().ok_or_else(unbound)?;
        match calls::find(command) {
            Some(entry) => table::run(entry, self.kind(), &own, caller, arg, self.place.observer()),
            None => self.with(|_| Err(Refusal::new(Errno::NOTTY, format!("the device has no ioctl {command:#x}")))),
        }
    }

    fn read(&self, caller: &dyn Caller, count: usize, at: Option<u64>) -> Answer<Vec<u8>> {
        let offset = self.offset(at);
        let read = self.with(|hardware| {
            let (region, at, count) = clamp(offset, count)?;
            let mut data = vec![0; count];
            match region {
                Region::Config => {
                    hardware.settle();
                    data.copy_from_slice(&hardware.config.bytes()[at as usize..at as usize + count]);
                }
                Region::Empty(_) => {}
                _ if !hardware.config.answers() => return Err(silent(region)),
                Region::Buffer => hardware.buffer.open(caller).read(at, &mut data).map_err(gone)?,
                Region::Bar0 => {
                    for (part, width) in accesses(at, count, 8) {
                        let value = hardware.registers.read(at + part as u64, width);
                        data[part..part + width].copy_from_slice(&value.to_le_bytes()[..width]);
                    }
                }
            }
            Ok(data)
        })?;
        self.moved(at, offset, read.len());
        Ok(read)
    }

    fn write(&self, caller: &dyn Caller, data: &[u8], at: Option<u64>) -> Answer<usize> {
        let offset = self.offset(at);
        let count = self.with(|hardware| {
            let (region, at, count) = clamp(offset, data.len())?;
            match region {
                Region::Config => {
                    if hardware.config.write(at as usize, &data[..count]).reset {
                        hardware.reset(&self.place)?;
                    }
                }
                Region::Empty(_) => {}
                _ if !hardware.config.answers() => return Err(silent(region)),
                Region::Buffer => hardware.buffer.open(caller).write(at, &data[..count]).map_err(gone)?,
                Region::Bar0 => {
                    let Hardware { config, registers, interrupts, buffer } = hardware;
                    for (part, width) in accesses(at, count, 8) {
                        let mut value = [0; 8];
                        value[..width].copy_from_slice(&data[part..part + width]);
                        let master = config.is_master();
                        registers.write((at + part as u64, width), u64::from_le_bytes(value), master, || buffer.open(caller), interrupts);
                    }
                }
            }
            hardware.settle();
            Ok(count)
        })?;
        self.moved(at, offset, count);
        Ok(count)
    }

    fn mmap(&self, _: &dyn Caller, wanted: &Mmap) -> Answer {
        self.with(|hardware| {
            let no = |text: &'static str| Err(Refusal::of(Errno::INVAL, text));
            let bytes = wanted.len.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
            match locate(wanted.offset) {
                _ if ![MAP_SHARED, MAP_SHARED_VALIDATE].contains(&(wanted.flags & 0xf)) => no("a region is mapped shared"),
                _ if wanted.len == 0 => no("a mapping of no bytes"),
                Some((Region::Buffer, at)) if hardware.buffer.is_mappable() => {
                    if bytes > Region::Buffer.size().saturating_sub(at) {
                        no("the mapping reaches beyond the region")
                    } else {
                        Ok(())
                    }
                }
                _ => no("only the buffer, region 2, can be mapped"),
            }
        })
    }

    fn released(&self) {
        self.unbind();
    }
}

impl fmt::Debug for Cdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cdev").field("place", &self.place).finish_non_exhaustive()
    }
}
