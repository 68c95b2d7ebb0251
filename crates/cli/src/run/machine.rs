//! The machine of a run: memory from the best source that the host has, devices, and the guest program, in a KVM guest or as a thread.

use crate::args::{RunArgs, VmArg};
use crate::run::checks::{Checks, Detector, add};
use crate::run::devices::Devices;
use crate::run::vcpu::{self, KvmGuest};
use crate::run::{balloon, guest_findings};
use addr::{Gpa, PAGE_BYTES, Span};
use backing::{Backing, PageState};
use convert::{Auditor, Evidence, Says, Step};
use guest::{Layout, Report, Setup};
use lockstep::{Config, Device, EngineDevice, GuestDma, Policy, RecordedStage2, SDTE_WRITE_BYTES, Sdte, SdteStatus, Stage2, Trust};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::{FromZeros, IntoBytes};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

const ASID: u32 = 1;
/// Below this, regions get too small for 2 MiB conversions.
const LEAST_MEMORY: u64 = 32 << 20;
/// What the guest program works on is at most this much: it is slow where KVM emulates.
const MOST_GUEST_PAGES: u64 = 1 << 14;

/// Who has which part of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) memory: Span<Gpa>,
    /// The host threads'.
    pub(crate) region: Span<Gpa>,
    /// Its pages come and go.
    pub(crate) balloon: Span<Gpa>,
}

/// See the module.
pub(crate) struct Machine {
    pub(crate) dma: Arc<GuestDma>,
    pub(crate) backing: Arc<Backing>,
    pub(crate) trusted: Arc<Device>,
    pub(crate) untrusted: Arc<Device>,
    /// With translation caches of their own: untrusted, trusted, untrusted, and so on.
    pub(crate) ats: Vec<Arc<Device>>,
    pub(crate) plan: Plan,
    kvm: Option<KvmGuest>,
    setup: Setup,
    /// Why the guest does not run where it would run better.
    notes: Vec<String>,
}

/// The guest, ready to run.
pub(crate) struct Guest {
    devices: Devices,
    place: Place,
}

enum Place {
    Vcpu(vcpu::Running),
    Thread(guest::Memory),
}

impl Machine {
    pub(crate) fn new(options: &RunArgs, checks: &Arc<Checks>) -> Result<Self, Failure> {
        if options.memory < LEAST_MEMORY {
            return Err(format!("{:#x} bytes of memory are too little: give at least 32M", options.memory).into());
        }
        if !options.format.hitless().is_allowed() {
            return Err(format!(
                "format {} needs break-before-make: beside every conversion DMA fails for a moment, which a run takes for a fault; \
                 choose another, for example armv8-s2-bbml2",
                options.format
            )
            .into());
        }
        let layout = Layout::new(options.memory)?;
        let layout = layout.with_work_pages((layout.work_pages() / 2).min(MOST_GUEST_PAGES));
        let plan = Plan::new(&layout)?;
        let mut notes = Vec::new();
        let kvm = match options.vm {
            VmArg::Thread => None,
            VmArg::Kvm => Some(KvmGuest::new()?),
            VmArg::Auto => KvmGuest::new().map_err(|error| notes.push(format!("no KVM guest: {error}"))).ok(),
        };
        let backing = match kvm.as_ref().map(|kvm| kvm.guest_memfd(options.memory)) {
            Some(Ok(file)) => Backing::guest_memfd(file, options.memory, options.layout())?,
            other => {
                if let Some(Err(error)) = other {
                    notes.push(format!("no mappable guest_memfd: {error}"));
                }
                Backing::memfd(options.memory, options.layout())?
            }
        };
        // Every page has memory from the start, so a hole is a loss and nothing else.
        backing.populate(backing.pages(), PageState::Shared)?;
        let stage2: Arc<dyn Stage2> = kvm.as_ref().map_or_else(|| Arc::new(RecordedStage2::new()) as _, KvmGuest::stage2);
        let domain = iommu::DomainConfig { format: options.format, ..iommu::DomainConfig::default() };
        let ats_timeout = Duration::from_millis(options.ats_timeout);
        // Devices cache tables as hardware does, so that an edit which forgets to say that a table went shows.
        let iommu = iommu::Config { domain, ats_timeout, walk_cache_entries: 64, ..iommu::Config::default() };
        let dma = Arc::new(GuestDma::new(&Config { policy: options.policy, asid: ASID, reading: options.reading(), iommu }, stage2)?);
        dma.add_memory(Gpa::new(0), options.memory, &backing, 0)?;
        let trusted = dma.add_device("trusted", Trust::Untrusted)?;
        accept(&dma, &trusted, 0)?;
        let untrusted = dma.add_device("untrusted", Trust::Untrusted)?;
        let ats = (0..options.ats).map(|index| {
            let kind = if index % 2 == 0 { "untrusted" } else { "trusted" };
            let device = dma.add_device(&format!("ats {index} {kind}"), Trust::Untrusted)?;
            if index % 2 == 1 {
                accept(&dma, &device, 1 + index as u16)?;
            }
            Ok(device)
        });
        let ats = ats.collect::<Result<_, Failure>>()?;
        watch_transitions(&dma, checks);
        let mut features = kvm.as_ref().map_or(guest::Features::HYPERCALL, KvmGuest::features);
        if options.policy == Policy::SharedOnly {
            features = features.and(guest::Features::SHARED_ONLY);
        }
        let setup = Setup { layout, seed: options.seed, features, initial: guest::PageState::Shared, max_rounds: u64::MAX };
        setup.load(|gpa, bytes| dma.write(gpa, bytes))?;
        Ok(Self { dma, backing, trusted, untrusted, ats, plan, kvm, setup, notes })
    }

    /// What the run stands on, for people.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!(
            "guest: {}, memory: {} of {}, {:?} frames; modelled: system physical addresses, RMP, trusted DMA",
            if self.kvm.is_some() { "KVM, long mode" } else { "the same program as a thread (no KVM)" },
            crate::run::report::bytes(self.backing.len_bytes()),
            self.backing_name(),
            self.backing.frames(),
        );
        for note in &self.notes {
            text += &format!("\n  {note}");
        }
        text
    }

    pub(crate) fn vm_name(&self) -> &'static str {
        if self.kvm.is_some() { "kvm" } else { "thread" }
    }

    pub(crate) fn backing_name(&self) -> &'static str {
        match self.backing.kind() {
            backing::Kind::GuestMemfd => "guest_memfd",
            backing::Kind::HugeMemfd => "hugetlb memfd",
            backing::Kind::Memfd => "memfd",
            backing::Kind::User => "user memory",
            backing::Kind::Foreign => "memory of another process",
            backing::Kind::Pair => "a memfd and a guest_memfd",
            backing::Kind::Simulated => "nothing",
        }
    }

    /// The guest with its devices.
    pub(crate) fn take_guest(&mut self, checks: &Arc<Checks>) -> Result<Guest, Failure> {
        let devices = Devices::new(&self.dma, checks, EngineDevice::new(&self.trusted)?, EngineDevice::new(&self.untrusted)?);
        let place = match &mut self.kvm {
            Some(kvm) => Place::Vcpu(kvm.start(&self.dma, &self.backing, &self.setup.layout)?),
            None => {
                let file = self.backing.file().ok_or("the memory has no file that a thread guest could map")?;
                Place::Thread(guest::Memory::of_file(file, 0, self.backing.len_bytes())?)
            }
        };
        Ok(Guest { devices, place })
    }

    /// What the guest says of itself, after it has stopped.
    pub(crate) fn guest_report(&self, checks: &Checks) -> Result<Report, Failure> {
        let mut report = Report::new_zeroed();
        self.dma.read(guest::REPORT, report.as_mut_bytes())?;
        guest_findings(self, checks, &report);
        Ok(report)
    }

    /// Whether stage 2 leads a vCPU to the bytes at the output addresses: nonces at sampled pages.
    pub(crate) fn probe(&mut self, checks: &Checks) -> Result<(), Failure> {
        let Some(kvm) = &mut self.kvm else { return Ok(()) };
        let mut random = fastrand::Rng::with_seed(self.setup.seed);
        let pages = self.plan.region.len() / PAGE_BYTES;
        let sample: Vec<(Gpa, u64)> =
            (0..64).map(|_| (Gpa::new(self.plan.region.start().get() + random.u64(..pages) * PAGE_BYTES + 16), random.u64(..))).collect();
        // The later of two nonces in one page is the one that stays.
        for (gpa, nonce) in &sample {
            self.dma.write(*gpa, &nonce.to_le_bytes())?;
        }
        let gpas: Vec<Gpa> = sample.iter().map(|(gpa, _)| *gpa).collect();
        let seen = kvm.probe(&self.dma, self.setup.layout.scratch, &gpas)?;
        for (gpa, seen) in gpas.iter().zip(seen) {
            let mut bytes = [0; 8];
            self.dma.read(*gpa, &mut bytes)?;
            if seen != Some(u64::from_le_bytes(bytes)) {
                let what = "a vCPU reads something else than the bytes at the output address";
                let mut difference = Auditor::new(self.dma.space()).describe(self.dma.ioas(), *gpa, "I-11", what);
                let says =
                    format!("{gpa:?} leads a vCPU to {seen:x?}, the bytes at the output address are {:#x}", u64::from_le_bytes(bytes));
                difference.stage2 = Says { evidence: Evidence::Probed, what: says };
                checks.find(Detector::Probe, difference);
            }
            add(&checks.probes, 1);
        }
        Ok(())
    }

    /// Every device.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Arc<Device>> {
        [&self.trusted, &self.untrusted].into_iter().chain(&self.ats)
    }

    /// Exits of the guest's vCPU; none in a thread.
    pub(crate) fn vcpu_exits(&self) -> u64 {
        self.kvm.as_ref().map_or(0, KvmGuest::exits)
    }
}

impl Guest {
    /// Runs until [`stop_guest`], or until the guest gives up.
    pub(crate) fn run(mut self, checks: &Checks) -> Result<(), Failure> {
        let done = match self.place {
            Place::Vcpu(vcpu) => vcpu.run(&mut self.devices),
            Place::Thread(memory) => guest::thread::run(&memory, &mut self.devices).map_err(Into::into),
        };
        // A guest that gave up has said why in its report; the others need not wait for the clock.
        checks.stop();
        done
    }
}

/// A guest accepts a device: bound and locked, started, and then its own word to firmware.
fn accept(dma: &GuestDma, device: &Arc<Device>, id: u16) -> Result<(), Failure> {
    let nonce = dma.bind_device(device, id)?;
    dma.start_device(id, nonce)?;
    let mut message = [0; SDTE_WRITE_BYTES];
    message[..2].copy_from_slice(&id.to_le_bytes());
    message[16..].copy_from_slice(&Sdte::new(pt::Perm::RW, secure::Vmpl::V0, None).to_bytes());
    let answer = dma.sdte_write(&message)?;
    let accepted = answer[2..4] == (SdteStatus::Success as u16).to_le_bytes();
    if accepted { Ok(()) } else { Err(format!("firmware does not let the guest accept '{}': {answer:x?}", device.name()).into()) }
}

/// Asks the guest to stop: it looks after each round.
pub(crate) fn stop_guest(dma: &GuestDma) {
    // Without memory there is no guest that would look.
    let _ = dma.write(guest::STOP, &1u64.to_le_bytes());
}

/// Every conversion is looked at while its pages are in transition.
fn watch_transitions(dma: &Arc<GuestDma>, checks: &Arc<Checks>) {
    let (space, checks) = (Arc::downgrade(dma.space()), Arc::clone(checks));
    dma.space().on_transition(move |transition| {
        // When the owner has just changed, and at the end.
        if matches!(transition.step(), Step::Switch | Step::Attach)
            && let Some(space) = space.upgrade()
        {
            checks.take(Auditor::new(&space).check_transition(transition));
            add(&checks.transitions, 1);
        }
    });
}

impl Plan {
    fn new(layout: &Layout) -> Result<Self, Failure> {
        const HUGE: u64 = 2 << 20;
        let start = (layout.work.last().get() + 1).next_multiple_of(HUGE);
        let balloon = (layout.memory.last().get() + 1) - HUGE;
        let region = Span::from_len(Gpa::new(start), balloon.saturating_sub(start))?;
        Ok(Self { memory: layout.memory, region, balloon: Span::from_len(Gpa::new(balloon), balloon::PAGES * PAGE_BYTES)? })
    }
}
