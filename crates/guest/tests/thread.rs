//! The guest program in a thread: satisfied by a right host, and never satisfied by a wrong one.

use addr::{Address, Gpa};
use lockstep_guest::model::Host;
use lockstep_guest::registers::{self, bell, dma};
use lockstep_guest::{Features, Layout, Memory, PageState, Platform, REPORT, Report, STOP, Setup, error, thread};
use zerocopy::{FromZeros, IntoBytes};

const MEMORY: u64 = 32 << 20;

/// Runs the program on a right host that `wrap` stands in front of.
fn run<P: Platform>(setup: Setup, patience: u64, wrap: impl FnOnce(Host, &Memory) -> P) -> (Report, P) {
    let memory = Memory::anonymous(setup.layout.memory.len()).unwrap();
    setup.load(|gpa, bytes| memory.write(gpa, bytes)).unwrap();
    let host = Host::new(memory.clone(), &setup.layout, setup.initial).with_patience(patience);
    let mut platform = wrap(host, &memory);
    thread::run(&memory, &mut platform).unwrap();
    let mut report = Report::new_zeroed();
    memory.read(REPORT, report.as_mut_bytes()).unwrap();
    (report, platform)
}

fn setup(seed: u64, rounds: u64) -> Setup {
    let layout = Layout::new(MEMORY).unwrap();
    Setup { layout, seed, features: Features::HYPERCALL, initial: PageState::Private, max_rounds: rounds }
}

#[test]
fn a_right_host_satisfies_it() {
    for (seed, initial, patience) in
        [(1, PageState::Private, 0), (2, PageState::Shared, 0), (3, PageState::Private, 7), (4, PageState::Shared, 1)]
    {
        let (report, host) = run(Setup { initial, ..setup(seed, 5000) }, patience, |host, _| host);
        assert!(report.is_clean(), "seed {seed}: {report:?}");
        assert_eq!((report.rounds, host.done()), (5000, Some(0)), "seed {seed}");
        assert!(host.all_validated(), "seed {seed}");
        assert_eq!(host.unrescinded(), 0, "seed {seed}");
        // Every kind of thing it can do was done.
        for (what, count) in [
            ("entries", report.psc_entries),
            ("2 MiB entries", report.psc_large),
            ("refused requests", report.psc_refused),
            ("hypercalls", report.hypercalls),
            ("validations", report.pvalidate_calls),
            ("size mismatches", report.size_mismatches),
            ("transfers", report.dma_ok),
            ("refused transfers", report.dma_refused_untrusted),
            ("verified bytes", report.bytes_verified),
        ] {
            assert!(count > 0, "seed {seed}: no {what}: {report:?}");
        }
        assert_eq!(report.psc_resumed > 0, patience > 0, "seed {seed}: {report:?}");
        assert_eq!(report.dma_started, report.dma_ok + report.dma_refused_untrusted);
    }
}

#[test]
fn a_work_span_of_few_pages() {
    for pages in 1..6 {
        let mut setup = setup(pages, 2000);
        setup.layout = setup.layout.with_work_pages(pages);
        let (report, host) = run(setup, 0, |host, _| host);
        assert!(report.is_clean() && host.all_validated(), "{pages} pages: {report:?}");
    }
}

#[test]
fn its_requests_depend_on_the_seed_alone() {
    let digest = |seed| {
        let (report, host) = run(setup(seed, 500), 0, |host, _| host);
        (report, host.requests(), host.log_hash())
    };
    assert_eq!(digest(7), digest(7));
    assert_ne!(digest(7).2, digest(8).2);
}

#[test]
fn without_hypercalls_it_makes_none() {
    let (report, _) = run(Setup { features: Features::default(), ..setup(5, 1000) }, 0, |host, _| host);
    assert_eq!((report.hypercalls, report.errors), (0, 0));
}

/// A host that is wrong in one way, from the `after`th chance on and `times` times.
struct Wrong {
    host: Host,
    memory: Memory,
    how: How,
    after: u64,
    times: u64,
    /// The untrusted engine's last transfer was let through.
    let_through: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// A bit of the destination is wrong after a transfer.
    CorruptByte,
    /// One word too much is written.
    WriteBehind,
    /// The untrusted engine has the rights of the trusted one.
    IgnoreRefusal,
    /// A refused transfer writes all the same.
    RefuseButWrite,
    /// The trusted engine is refused.
    RefuseTrusted,
    /// A refusal names another page.
    FaultElsewhere,
    /// A transfer is reported done and was not.
    SkipTransfer,
    /// A bad request gets the other error code.
    WrongError,
    /// A bad request is called good.
    AcceptBad,
    /// A good request is called bad.
    RefuseGood,
    /// The list is moved back after it was worked on.
    Backwards,
    /// The host never gets on with a list.
    NoProgress,
    /// A PVALIDATE list that was carried out is called bad.
    RefusePvalidate,
    /// An engine stays busy.
    Busy,
    /// A hypercall fails.
    RefuseHypercall,
    /// A page state change to shared is called done and was not.
    ForgetConversion,
}

impl Wrong {
    fn strikes(&mut self) -> bool {
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        let strikes = self.times > 0;
        self.times = self.times.saturating_sub(1);
        strikes
    }

    fn flip(&self, gpa: u64) {
        let mut byte = [0];
        self.memory.read(Gpa::new(gpa), &mut byte).unwrap();
        self.memory.write(Gpa::new(gpa), &[byte[0] ^ 0x10]).unwrap();
    }

    fn register(&mut self, bar: Gpa, offset: u64) -> u64 {
        self.host.mmio_read(bar.plus(offset), 8)
    }
}

impl Platform for Wrong {
    fn mmio_read(&mut self, gpa: Gpa, len: u8) -> u64 {
        let right = self.host.mmio_read(gpa, len);
        let status = gpa == registers::TRUSTED.plus(dma::STATUS);
        let refused = [registers::BAD_HEADER, registers::BAD_ENTRY].contains(&right);
        let psc = gpa == registers::DOORBELL.plus(bell::PSC_RESULT);
        let how = self.how;
        match how {
            How::IgnoreRefusal if self.let_through && gpa == registers::UNTRUSTED.plus(dma::STATUS) => dma::OK,
            How::RefuseTrusted if status && self.strikes() => dma::FAULTED,
            How::Busy if status && self.strikes() => dma::BUSY,
            How::FaultElsewhere if gpa == registers::UNTRUSTED.plus(dma::FAULT_IOVA) && self.strikes() => right ^ 0x4000,
            How::WrongError if psc && refused && self.strikes() => right ^ 3,
            How::AcceptBad if psc && refused && self.strikes() => 0,
            How::RefusePvalidate if gpa == registers::DOORBELL.plus(bell::PVALIDATE_RESULT) && right == 0 && self.strikes() => 2,
            How::RefuseGood if psc && right == 0 && self.strikes() => registers::GENERIC_ERROR,
            _ => right,
        }
    }

    fn mmio_write(&mut self, gpa: Gpa, len: u8, value: u64) {
        let bar = Gpa::new(gpa.get() & !0xfff);
        let command = bar != registers::DOORBELL && gpa.get() & 0xfff == dma::CMD;
        let list = gpa == registers::DOORBELL.plus(bell::PSC);
        let how = self.how;
        match how {
            How::SkipTransfer if command && bar == registers::TRUSTED && self.strikes() => return,
            How::IgnoreRefusal if command && bar == registers::UNTRUSTED && self.strikes() => {
                for offset in [dma::SRC, dma::DST, dma::LEN, dma::VALUE] {
                    let set = self.register(bar, offset);
                    self.host.mmio_write(registers::TRUSTED.plus(offset), 8, set);
                }
                self.host.mmio_write(registers::TRUSTED.plus(dma::CMD), len, value);
                self.let_through = true;
                return;
            }
            How::NoProgress if list && self.strikes() => return,
            How::ForgetConversion if list => {
                let mut header = [0u8; 16];
                self.memory.read(Gpa::new(value), &mut header).unwrap();
                let entry = registers::Entry(u64::from_le_bytes(header[8..].try_into().unwrap()));
                // One page that turns shared: only then can nothing but an untrusted transfer tell.
                if header[2..4] == [0, 0] && entry.op() == registers::OP_SHARED && entry.cur_page() == 0 && !entry.large() && self.strikes()
                {
                    self.memory.write(Gpa::new(value), &1u16.to_le_bytes()).unwrap();
                    return;
                }
            }
            _ => {}
        }
        self.let_through &= !command;
        self.host.mmio_write(gpa, len, value);
        if list && self.how == How::Backwards && self.strikes() {
            self.memory.write(Gpa::new(value + 2), &200u16.to_le_bytes()).unwrap();
        }
        if command {
            let (dst, len, status) = (self.register(bar, dma::DST), self.register(bar, dma::LEN), self.register(bar, dma::STATUS));
            let how = self.how;
            match how {
                How::CorruptByte if status == dma::OK && self.strikes() => self.flip(dst + len / 2),
                How::RefuseButWrite if status == dma::FAULTED && self.strikes() => self.flip(dst),
                How::WriteBehind if status == dma::OK && (dst + len) & 0xfff != 0 && self.strikes() => self.flip(dst + len),
                _ => {}
            }
        }
    }

    fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64 {
        let wrong = self.how == How::RefuseHypercall && self.strikes();
        if wrong { 0u64.wrapping_sub(22) } else { self.host.hypercall(nr, args) }
    }
}

fn run_wrong(how: How, after: u64, times: u64) -> (Report, Wrong) {
    run(setup(11, 1500), 0, |host, memory| Wrong { host, memory: memory.clone(), how, after, times, let_through: false })
}

#[test]
fn one_wrong_byte_is_found_and_named() {
    for how in [How::CorruptByte, How::WriteBehind] {
        let (report, _) = run_wrong(how, 700, 1);
        assert_eq!((report.mismatches, report.errors, report.rounds), (1, 0, 1500), "{how:?}: {report:?}");
        assert_eq!((report.mismatch_expected ^ report.mismatch_got).count_ones(), 1, "{how:?}: {report:?}");
        assert!(report.mismatch_gpa >= setup(11, 0).layout.work.start().get(), "{how:?}");
    }
    assert_eq!(run_wrong(How::CorruptByte, 700, 5).0.mismatches, 5);
}

#[test]
fn each_way_to_be_wrong_shows_where_it_belongs() {
    let wrong = |how, after| run_wrong(how, after, 1).0;
    let report = run_wrong(How::IgnoreRefusal, 100, 20).0;
    assert!(report.dma_wrong > 0 && report.mismatches > 0 && report.last_error == error::NOT_REFUSED, "{report:?}");
    let report = wrong(How::RefuseButWrite, 50);
    assert_eq!((report.dma_wrong, report.mismatches), (0, 1), "{report:?}");
    let report = wrong(How::RefuseTrusted, 50);
    assert_eq!((report.dma_wrong, report.last_error), (1, error::DMA_FAILED + dma::FAULTED), "{report:?}");
    let report = wrong(How::FaultElsewhere, 50);
    assert_eq!((report.dma_wrong, report.last_error), (1, error::FAULT_ELSEWHERE), "{report:?}");
    let report = wrong(How::SkipTransfer, 50);
    assert!(report.mismatches > 0, "{report:?}");
    for how in [How::WrongError, How::AcceptBad] {
        let report = wrong(how, 10);
        assert_eq!((report.psc_wrong_answers, report.errors, report.mismatches), (1, 1, 0), "{how:?}: {report:?}");
    }
    let report = wrong(How::RefusePvalidate, 30);
    assert_eq!((report.errors, report.last_error, report.psc_errors), (1, 2, 0), "{report:?}");
    let report = wrong(How::Backwards, 30);
    assert!(report.last_error == error::BACKWARDS && report.psc_errors == 1, "{report:?}");
    let report = run_wrong(How::NoProgress, 30, u64::MAX).0;
    assert!(report.last_error == error::STUCK && report.psc_errors > 0, "{report:?}");
    let report = run_wrong(How::Busy, 30, 1 << 20).0;
    assert_eq!((report.dma_wrong, report.last_error), (1, error::DMA_FAILED + dma::BUSY), "{report:?}");
}

#[test]
fn a_failed_change_leaves_the_guest_in_step() {
    // Refused without a change: the guest validates again what it had rescinded, and nothing else goes wrong.
    let (report, wrong) = run_wrong(How::RefuseHypercall, 3, 10);
    assert_eq!((report.psc_errors, report.errors, report.dma_wrong, report.mismatches), (10, 10, 0, 0), "{report:?}");
    assert!(wrong.host.all_validated());
    // A good request that was done and is called bad: the list says how far it came, and the guest believes it.
    let (report, wrong) = run_wrong(How::RefuseGood, 30, 10);
    assert_eq!((report.psc_errors, report.errors, report.dma_wrong, report.mismatches), (10, 10, 0, 0), "{report:?}");
    assert!(wrong.host.all_validated());
}

#[test]
fn a_conversion_that_never_was_is_found() {
    // One forgotten page of thousands may never be met again; a small work span makes sure that it is.
    let mut setup = setup(13, 3000);
    setup.layout = setup.layout.with_work_pages(16);
    let (report, _) = run(setup, 0, |host, memory| Wrong {
        host,
        memory: memory.clone(),
        how: How::ForgetConversion,
        after: 5,
        times: 3,
        let_through: false,
    });
    assert!(report.errors > 0, "{report:?}");
}

#[test]
fn parameters_are_checked_before_it_runs() {
    let memory = Memory::anonymous(MEMORY).unwrap();
    let mut host = Host::new(memory.clone(), &Layout::new(MEMORY).unwrap(), PageState::Private);
    assert_eq!(thread::run(&memory, &mut host), Err(thread::RunError::NoMagic(0)));
    let mut bad = setup(1, 1);
    bad.layout = Layout::new(2 * MEMORY).unwrap();
    bad.load(|gpa, bytes| memory.write(gpa, bytes)).unwrap();
    let error = thread::run(&memory, &mut host).unwrap_err();
    assert!(error.to_string().contains("work span"), "{error}");
}

/// Sets the stop flag, or panics, at a certain request.
struct At(Host, Memory, u64, bool);

impl Platform for At {
    fn mmio_read(&mut self, gpa: Gpa, len: u8) -> u64 {
        if self.0.requests() > self.2 {
            assert!(!self.3, "planted");
            self.1.write(STOP, &1u64.to_le_bytes()).unwrap();
        }
        self.0.mmio_read(gpa, len)
    }
    fn mmio_write(&mut self, gpa: Gpa, len: u8, value: u64) {
        self.0.mmio_write(gpa, len, value);
    }
    fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64 {
        self.0.hypercall(nr, args)
    }
}

#[test]
fn it_stops_when_told_and_survives_a_panic_of_the_host() {
    let (report, at) = run(setup(3, 0), 0, |host, memory| At(host, memory.clone(), 10_000, false));
    assert!(report.rounds > 10 && report.is_clean() && at.0.done() == Some(0), "{report:?}");
    let panic = std::panic::catch_unwind(|| run(setup(3, 0), 0, |host, memory| At(host, memory.clone(), 10_000, true)).0);
    assert!(panic.unwrap_err().downcast_ref::<&str>().is_some_and(|text| text.contains("planted")));
}

#[test]
fn garbage_in_all_of_guest_memory_does_not_lead_it_outside() {
    /// Before every answer, rubbish is written over all that the program reads back.
    struct Rubbish(Host, Memory, u64);
    impl Rubbish {
        fn spill(&mut self) {
            for gpa in (0x2000..0x4000u64).chain(0x10_0000..0x10_2000).step_by(8) {
                self.2 = self.2.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                self.1.write(Gpa::new(gpa), &self.2.to_le_bytes()).unwrap();
            }
        }
    }
    impl Platform for Rubbish {
        fn mmio_read(&mut self, gpa: Gpa, len: u8) -> u64 {
            self.spill();
            self.0.mmio_read(gpa, len)
        }
        fn mmio_write(&mut self, gpa: Gpa, len: u8, value: u64) {
            self.0.mmio_write(gpa, len, value);
            self.spill();
        }
        fn hypercall(&mut self, nr: u64, args: [u64; 3]) -> u64 {
            self.spill();
            self.0.hypercall(nr, args)
        }
    }
    let (report, _) = run(setup(17, 300), 0, |host, memory| Rubbish(host, memory.clone(), 1));
    assert_eq!(report.rounds, 300);
    assert!(report.errors > 0);
}
