//! Interrupts as VFIO has them: which kind is in use, where each goes, and what SET_IRQS may ask. The order of checks is vfio-pci's.

use crate::config::VECTORS;
use crate::signal::Signal;
use crate::uapi::{
    IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IRQ_NORESIZE, IrqSet, SET_DATA_BOOL, SET_DATA_EVENTFD, SET_DATA_NONE, SET_MASK, SET_TRIGGER,
    SET_UNMASK,
};
use iommufd::uapi::Struct;
use iommufd::{Answer, Refusal};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Kinds of interrupts of a PCI device.
pub(crate) const KINDS: u32 = 5;

/// A kind of interrupt, by VFIO's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Intx,
    Msi,
    Msix,
    /// The device has failed.
    Error,
    /// The device is wanted back.
    Request,
}

impl Kind {
    pub(crate) fn new(index: u32) -> Option<Self> {
        [Self::Intx, Self::Msi, Self::Msix, Self::Error, Self::Request].get(index as usize).copied()
    }

    /// How many there are.
    pub(crate) fn count(self) -> u32 {
        if matches!(self, Self::Msi | Self::Msix) { VECTORS } else { 1 }
    }

    pub(crate) fn flags(self) -> u32 {
        IRQ_EVENTFD
            | match self {
                Self::Intx => IRQ_MASKABLE | IRQ_AUTOMASKED,
                Self::Msix => 0,
                _ => IRQ_NORESIZE,
            }
    }
}

/// Which kind is in use; one at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    #[default]
    Off,
    Intx,
    Msi,
    Msix,
}

/// What follows a [`IrqSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    None,
    Bools(Vec<u8>),
    Descriptors(Vec<i32>),
}

impl Data {
    /// Bytes that a request needs, after all checks that need no more than its head.
    pub(crate) fn bytes_of(request: &IrqSet) -> Answer<usize> {
        let no = |text: &'static str| Err(Refusal::of(Errno::INVAL, text));
        let Some(kind) = Kind::new(request.index) else { return no("a PCI device has five kinds of interrupts") };
        if request.count >= u32::MAX - request.start {
            return no("count and start of the interrupts overflow");
        }
        if request.flags & !(SET_DATA_NONE | SET_DATA_BOOL | SET_DATA_EVENTFD | SET_MASK | SET_UNMASK | SET_TRIGGER) != 0 {
            return no("unknown flags for interrupts");
        }
        if request.start >= kind.count() || request.start + request.count > kind.count() {
            return no("this kind of interrupt has fewer vectors; VFIO_DEVICE_GET_IRQ_INFO says how many");
        }
        let each = match request.flags & (SET_DATA_NONE | SET_DATA_BOOL | SET_DATA_EVENTFD) {
            SET_DATA_NONE => 0,
            SET_DATA_BOOL => 1,
            SET_DATA_EVENTFD => 4,
            _ => return no("exactly one of DATA_NONE, DATA_BOOL and DATA_EVENTFD is to be set"),
        };
        let bytes = each * request.count;
        if request.argsz - (IrqSet::SIZE as u32) < bytes { no("argsz does not cover the data") } else { Ok(bytes as usize) }
    }

    pub(crate) fn new(request: &IrqSet, bytes: Vec<u8>) -> Self {
        match request.flags & (SET_DATA_NONE | SET_DATA_BOOL | SET_DATA_EVENTFD) {
            SET_DATA_BOOL => Self::Bools(bytes),
            SET_DATA_EVENTFD => Self::Descriptors(bytes.as_chunks().0.iter().map(|descriptor| i32::from_ne_bytes(*descriptor)).collect()),
            _ => Self::None,
        }
    }

    /// Whether the action is for the interrupt at this place of the request.
    fn wants(&self, place: usize) -> bool {
        match self {
            Self::None => true,
            Self::Bools(bools) => bools.get(place).is_some_and(|wanted| *wanted != 0),
            Self::Descriptors(_) => false,
        }
    }
}

/// A client's descriptor by its number.
pub(crate) type Descriptors<'a> = &'a dyn Fn(i32) -> Answer<OwnedFd>;

/// A negative number means no descriptor.
fn signal(descriptors: Descriptors<'_>, number: i32) -> Answer<Option<Signal>> {
    if number < 0 { Ok(None) } else { descriptors(number).and_then(Signal::new).map(Some) }
}

fn bad(text: &'static str) -> Answer {
    Err(Refusal::of(Errno::INVAL, text))
}

/// Where interrupts of a device go.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    mode: Mode,
    intx: Option<Signal>,
    /// INTx was signalled and not unmasked since, or was masked.
    masked: bool,
    /// The device asserts INTx, and its command register lets it.
    level: bool,
    /// Of MSI or MSI-X.
    vectors: Vec<Option<Signal>>,
    error: Option<Signal>,
    request: Option<Signal>,
}

impl Interrupts {
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// What SET_IRQS does.
    ///
    /// # Errors
    /// `EINVAL`, `ENOTTY` for what this kind cannot do, `EBADF`.
    pub(crate) fn set(&mut self, request: &IrqSet, data: &Data, descriptors: Descriptors<'_>) -> Answer {
        let action = request.flags & (SET_MASK | SET_UNMASK | SET_TRIGGER);
        match (Kind::new(request.index), action) {
            (Some(Kind::Intx), SET_MASK | SET_UNMASK) => self.mask(action == SET_MASK, request, data),
            (Some(Kind::Intx), SET_TRIGGER) => self.trigger_intx(request, data, descriptors),
            (Some(Kind::Msi), SET_TRIGGER) => self.trigger_vectors(Mode::Msi, request, data, descriptors),
            (Some(Kind::Msix), SET_TRIGGER) => self.trigger_vectors(Mode::Msix, request, data, descriptors),
            (Some(Kind::Error), SET_TRIGGER) => single(&mut self.error, request, data, descriptors),
            (Some(Kind::Request), SET_TRIGGER) => single(&mut self.request, request, data, descriptors),
            _ => Err(Refusal::of(Errno::NOTTY, "this kind of interrupt cannot do this; exactly one action is to be set")),
        }
    }

    fn mask(&mut self, mask: bool, request: &IrqSet, data: &Data) -> Answer {
        if self.mode != Mode::Intx || request.start != 0 || request.count != 1 {
            return bad("INTx is one interrupt, and is masked only while it is in use");
        }
        if let Data::Descriptors(_) = data {
            return Err(Refusal::of(Errno::NOTTY, "INTx is masked and unmasked by calls only, not through an eventfd"));
        }
        if data.wants(0) {
            self.masked = mask;
            self.deliver_intx();
        }
        Ok(())
    }

    fn trigger_intx(&mut self, request: &IrqSet, data: &Data, descriptors: Descriptors<'_>) -> Answer {
        if self.mode == Mode::Intx && request.count == 0 && *data == Data::None {
            self.disable();
            return Ok(());
        }
        if !matches!(self.mode, Mode::Intx | Mode::Off) || request.start != 0 || request.count != 1 {
            return bad("INTx is one interrupt, and no other kind may be in use beside it");
        }
        if let Data::Descriptors(numbers) = data {
            let number = numbers.first().copied().unwrap_or(-1);
            (self.intx, self.mode, self.masked) = (signal(descriptors, number)?, Mode::Intx, false);
            self.deliver_intx();
            return Ok(());
        }
        if self.mode != Mode::Intx {
            return bad("INTx is not in use");
        }
        if let (true, Some(intx)) = (data.wants(0), &self.intx) {
            intx.raise();
        }
        Ok(())
    }

    fn trigger_vectors(&mut self, mode: Mode, request: &IrqSet, data: &Data, descriptors: Descriptors<'_>) -> Answer {
        let (start, count) = (request.start as usize, request.count as usize);
        if self.mode == mode && count == 0 && *data == Data::None {
            self.disable();
            return Ok(());
        }
        if self.mode != mode && self.mode != Mode::Off {
            return bad("another kind of interrupt is in use; disable it first");
        }
        let fresh = self.mode == Mode::Off;
        let Data::Descriptors(numbers) = data else {
            if fresh || mode == Mode::Msi && start + count > self.vectors.len() {
                return bad("these vectors are not in use");
            }
            let places = self.vectors.iter().skip(start).take(count).enumerate();
            places.filter(|(place, _)| data.wants(*place)).filter_map(|(_, signal)| signal.as_ref()).for_each(Signal::raise);
            return Ok(());
        };
        if fresh {
            if start + count == 0 {
                return bad("no vectors to use");
            }
            self.vectors.resize_with(start + count, || None);
            self.mode = mode;
        } else if start + count > self.vectors.len() {
            if mode == Mode::Msi {
                return bad("MSI vectors are set up all at once; disable MSI to use more");
            }
            self.vectors.resize_with(start + count, || None);
        }
        for (place, number) in numbers.iter().enumerate() {
            match signal(descriptors, *number) {
                Ok(signal) => self.vectors[start + place] = signal,
                Err(refusal) => {
                    self.vectors[start..start + place].fill_with(|| None);
                    if fresh {
                        self.disable();
                    }
                    return Err(refusal);
                }
            }
        }
        Ok(())
    }

    fn disable(&mut self) {
        (self.mode, self.intx, self.masked) = (Mode::Off, None, false);
        self.vectors.clear();
    }

    /// The device's own interrupt: `vector` of MSI and MSI-X. INTx is a level, see [`Self::set_level`].
    pub(crate) fn raise(&self, vector: usize) {
        if let Some(Some(signal)) = self.vectors.get(vector) {
            signal.raise();
        }
    }

    /// Whether the device asserts INTx, and its command register lets it.
    pub(crate) fn set_level(&mut self, level: bool) {
        self.level = level;
        self.deliver_intx();
    }

    fn deliver_intx(&mut self) {
        if let (true, Mode::Intx, Some(intx)) = (self.level && !self.masked, self.mode, &self.intx) {
            // The line stays asserted until the device is served, so VFIO masks it until the client says that it has.
            self.masked = true;
            intx.raise();
        }
    }

    /// The device has failed.
    pub(crate) fn raise_error(&self) {
        self.error.iter().for_each(Signal::raise);
    }
}

/// An interrupt that is one of its kind and independent of the others.
fn single(own: &mut Option<Signal>, request: &IrqSet, data: &Data, descriptors: Descriptors<'_>) -> Answer {
    match data {
        _ if request.start != 0 || request.count > 1 => return bad("this interrupt is the only one of its kind"),
        Data::None if request.count == 0 => *own = None,
        _ if request.count == 0 => return bad("data for no interrupt"),
        Data::Descriptors(numbers) => *own = signal(descriptors, numbers.first().copied().unwrap_or(-1))?,
        _ if data.wants(0) => own.iter().for_each(Signal::raise),
        _ => {}
    }
    Ok(())
}
