//! What a run did, for people and for programs.

use crate::args::RunArgs;
use crate::run::checks::{Checks, Detector, Finding, read};
use crate::run::machine::Machine;
use iommu::FaultKind;
use lockstep::{AtsStats, Device};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// The JSON object, and what the text is made of.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    vm: &'static str,
    backing: &'static str,
    memory: u64,
    policy: String,
    borders: String,
    strict: bool,
    format: &'static str,
    frames: String,
    seed: u64,
    seconds: f64,
    planted: Option<String>,
    pub(crate) bytes_moved: u64,
    bytes_verified: u64,
    vcpu_exits: u64,
    pub(crate) conversions: u64,
    to_private: u64,
    to_shared: u64,
    pub(crate) batches: u64,
    pub(crate) smashes: u64,
    leaked_pages: u64,
    pub(crate) cuts: u64,
    pub(crate) merges: u64,
    pub(crate) punches: u64,
    /// By device, then by kind.
    faults: BTreeMap<String, BTreeMap<String, u64>>,
    /// Devices with translation caches of their own.
    ats: BTreeMap<String, Cache>,
    pub(crate) untrusted_faults: u64,
    guest_rounds: u64,
    pub(crate) guest_requests: u64,
    guest_dma: u64,
    guest_dma_refused: u64,
    pub(crate) dma_checks: u64,
    pub(crate) audits: u64,
    pub(crate) audited_pages: u64,
    pub(crate) transitions: u64,
    stage2_probes: u64,
    pub(crate) differences: u64,
    page_table_bytes: u64,
    rmp_bytes: u64,
    findings: Vec<Found>,
    missing: Vec<&'static str>,
}

/// What a device's cache had to forget.
#[derive(Debug, Serialize)]
struct Cache {
    sent: u64,
    answers: u64,
    timeouts: u64,
    quarantined: bool,
}

impl Cache {
    fn of(device: &Device) -> Self {
        let AtsStats { sent, answers, timeouts, .. } = device.ats();
        Self { sent, answers, timeouts, quarantined: device.is_quarantined() }
    }
}

/// A finding.
#[derive(Debug, Serialize)]
struct Found {
    detector: Detector,
    invariant: &'static str,
    what: String,
    span: String,
    io_page_table: Said,
    secure_world: Said,
    stage2: Said,
}

#[derive(Debug, Serialize)]
struct Said {
    says: String,
    evidence: String,
}

impl Summary {
    pub(crate) fn new(options: &RunArgs, machine: &Machine, checks: &Checks, guest: &guest::Report, took: Duration) -> Self {
        let counters = machine.dma.counters();
        let (cuts, merges) = machine.dma.cuts_and_merges();
        let (findings, differences) = checks.findings();
        let mut summary = Self {
            vm: machine.vm_name(),
            backing: machine.backing_name(),
            memory: options.memory,
            policy: options.policy.to_string(),
            borders: options.borders.to_string(),
            strict: options.strict,
            format: options.format.name(),
            frames: format!("{:?}", machine.backing.frames()),
            seed: options.seed,
            seconds: took.as_secs_f64(),
            planted: options.plant.clone(),
            bytes_moved: read(&checks.bytes_moved),
            bytes_verified: guest.bytes_verified,
            vcpu_exits: machine.vcpu_exits(),
            conversions: counters.to_private + counters.to_shared,
            to_private: counters.to_private,
            to_shared: counters.to_shared,
            batches: counters.batches,
            smashes: counters.smashed,
            leaked_pages: counters.leaked,
            cuts,
            merges,
            punches: read(&checks.punches),
            faults: machine.devices().map(|device| (device.name().to_owned(), by_kind(device))).collect(),
            ats: machine.ats.iter().map(|device| (device.name().to_owned(), Cache::of(device))).collect(),
            untrusted_faults: machine.untrusted.faults().total(),
            guest_rounds: guest.rounds,
            guest_requests: guest.psc_calls + guest.hypercalls,
            guest_dma: guest.dma_ok,
            guest_dma_refused: guest.dma_refused_untrusted,
            dma_checks: read(&checks.dma_checks),
            audits: read(&checks.audits),
            audited_pages: read(&checks.audited_pages),
            transitions: read(&checks.transitions),
            stage2_probes: read(&checks.probes),
            differences,
            page_table_bytes: u64::from(machine.dma.iommu().arena().tables_in_use()) * machine.dma.iommu().arena().table_bytes(),
            rmp_bytes: machine.dma.rmp().bytes(),
            findings: findings.iter().map(Found::new).collect(),
            missing: Vec::new(),
        };
        summary.missing = summary.what_is_missing();
        summary
    }

    /// What should have happened and did not: a run that did nothing proves nothing.
    fn what_is_missing(&self) -> Vec<&'static str> {
        [
            (self.conversions, "no page was converted"),
            (self.audits, "no audit was made"),
            (self.cuts, "no leaf was cut"),
            (self.untrusted_faults, "the untrusted device was never refused"),
            (self.guest_dma, "the guest drove no DMA"),
            (self.bytes_verified, "the guest verified nothing"),
        ]
        .into_iter()
        .chain(self.ats.values().map(|cache| (cache.answers, "a device with a cache of its own answered no invalidation")))
        // Scattered frames have no leaf that could be cut.
        .filter(|(count, what)| *count == 0 && !(self.frames != "Contiguous" && *what == "no leaf was cut"))
        .map(|(_, what)| what)
        .collect()
    }

    /// Whether every check held.
    pub(crate) fn is_good(&self) -> bool {
        self.differences == 0 && self.missing.is_empty()
    }

    pub(crate) fn print(&self, json: bool) {
        if json {
            match serde_json::to_string_pretty(self) {
                Ok(text) => println!("{text}"),
                Err(error) => eprintln!("lockstep: the summary could not be written: {error}"),
            }
            return;
        }
        let strict = if self.strict { ", no shared leaf above 2 MiB" } else { "" };
        println!(
            "ran {:.1} s, seed {}, policy {}, borders in the {}{strict}, page tables {}",
            self.seconds, self.seed, self.policy, self.borders, self.format
        );
        println!(
            "  conversions     {} pages in {} batches ({} to private, {} to shared), {} entries smashed",
            self.conversions, self.batches, self.to_private, self.to_shared, self.smashes
        );
        println!("  leaves          {} cut, {} merged", self.cuts, self.merges);
        println!("  DMA             {} moved, {} checks of what devices got", bytes(self.bytes_moved), self.dma_checks);
        println!(
            "  guest           {} rounds, {} page state requests, {} DMAs driven, {} refused as they must be, {} verified",
            self.guest_rounds,
            self.guest_requests,
            self.guest_dma,
            self.guest_dma_refused,
            bytes(self.bytes_verified)
        );
        if self.vm == "kvm" {
            println!("  vCPU exits      {}, stage 2 probed at {} pages", self.vcpu_exits, self.stage2_probes);
        }
        for (device, faults) in &self.faults {
            let kinds: Vec<String> = faults.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            println!("  faults          {device}: {}", if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") });
        }
        for (device, Cache { sent, answers, timeouts, quarantined }) in &self.ats {
            let end = if *quarantined { "; QUARANTINED" } else { "" };
            println!("  ATS cache       {device}: {sent} invalidations sent, {answers} answers, {timeouts} time-outs{end}");
        }
        println!("  memory given back {} times under DMA", self.punches);
        println!("  audits          {}, {} pages compared, {} transitions watched", self.audits, self.audited_pages, self.transitions);
        println!("  tables          {} of IO page tables, {} of RMP", bytes(self.page_table_bytes), bytes(self.rmp_bytes));
        println!("  differences     {}", self.differences);
        for found in &self.findings {
            println!("{:?}: {}: {} at {}", found.detector, found.invariant, found.what, found.span);
            for (table, said) in
                [("IO page table", &found.io_page_table), ("secure world", &found.secure_world), ("stage 2", &found.stage2)]
            {
                println!("    {table:<14} {} ({})", said.says, said.evidence);
            }
        }
        for missing in &self.missing {
            println!("incomplete: {missing}");
        }
        println!("{}", if self.is_good() { "every check held" } else { "NOT every check held" });
    }
}

impl Found {
    fn new(finding: &Finding) -> Self {
        let difference = &finding.difference;
        let said = |says: &convert::Says| Said { says: says.what.clone(), evidence: says.evidence.to_string() };
        Self {
            detector: finding.detector,
            invariant: difference.invariant,
            what: difference.what.clone(),
            span: difference.iova.to_string(),
            io_page_table: said(&difference.io_page_table),
            secure_world: said(&difference.secure),
            stage2: said(&difference.stage2),
        }
    }
}

fn by_kind(device: &Device) -> BTreeMap<String, u64> {
    let count = |kind: FaultKind| (format!("{kind:?}"), device.faults().of(kind));
    FaultKind::ALL.into_iter().map(count).filter(|(_, count)| *count > 0).collect()
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (count.max(1).ilog2() / 10).min(4);
    format!("{:.1} {}", count as f64 / f64::from(1u32 << (10 * unit.min(3))) / if unit == 4 { 1024.0 } else { 1.0 }, UNITS[unit as usize])
}
