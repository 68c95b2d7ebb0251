//! A guest, and the plain model of it: per page whose it is, what VMPL 1 may do, and what the page says.

use super::dma::Port;
use super::seen::Seen;
use super::step::{Rights, Step, Stretch, Who};
use crate::common::{ASID, Guest, MIB, change, span};
use addr::{Gpa, Iova, PAGE_LG2, Span};
use backing::{Backing, Frames};
use convert::{Auditor, PolicyRule};
use ioas::{Ioas, Place};
use lockstep_iommu::{AtsDma, Change, Config, ConvertError, Device, Difference, Dma, Owner, Policy, Tdisp, Trust};
use proptest::test_runner::TestCaseError;
use proptest::{prop_assert, prop_assert_eq};
use pt::Perm;
use secure::{Perms, RmpSize, Vmpl};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub type Done = Result<(), TestCaseError>;

pub const FIRST: u64 = 4 * MIB;
const MORE: u64 = 2 * MIB;
/// Where the second memslot may be.
const MORE_AT: [u64; 2] = [8 * MIB, 16 * MIB + 0x3000];
pub const OTHER_AT: u64 = 1 << 32;
const PAGE: u64 = 1 << PAGE_LG2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Is {
    Shared,
    Private {
        validated: bool,
        level1: Rights,
    },
    Absent,
    /// The secure world kept it.
    Leaked,
}

impl Is {
    const FRESH: Self = Self::Private { validated: false, level1: Rights::None };

    pub fn is_private(self) -> bool {
        matches!(self, Self::Private { .. })
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub is: Is,
    pub says: u64,
}

pub struct World {
    guest: Guest,
    pub policy: Policy,
    more: Arc<Backing>,
    more_is_there: bool,
    /// By number where the second memslot is, or was last.
    more_at: usize,
    /// Of the first memslot, then of the second.
    pub pages: Vec<Page>,
    /// By [`Who`].
    pub devices: [Option<(Arc<Device>, Port)>; 4],
    pub runs: bool,
    mute: bool,
    pub quarantined: bool,
    /// Shows stretches of the first memslot's backing from `OTHER_AT` on, where they are shared.
    other: Arc<Ioas>,
    pub mapped: Vec<(u64, u64)>,
    pub elsewhere: Dma,
    /// What was wrong in the middle of a conversion.
    middle: Arc<Mutex<Option<Difference>>>,
    pub seen: Seen,
}

fn trust(who: Who, runs: bool) -> Trust {
    let vmpl = if who == Who::Level1 { Vmpl::V1 } else { Vmpl::V0 };
    let tdisp = if runs { Tdisp::Run } else { Tdisp::Locked };
    match who {
        Who::Trusted | Who::Level1 => Trust::Trusted { asid: ASID, vmpl, tdisp, sdte_valid: true, vtom: None },
        Who::Untrusted | Who::Ats | Who::Elsewhere => Trust::Untrusted,
    }
}

/// What must not fail did.
fn failed(error: impl Debug) -> TestCaseError {
    TestCaseError::fail(format!("{error:?}"))
}

impl World {
    pub fn new(policy: Policy, frames: Frames) -> Self {
        // A device that does not answer is given up at once.
        let iommu = iommu::Config { ats_timeout: Duration::ZERO, ..iommu::Config::default() };
        let guest = Guest::configured(Gpa::new(0), FIRST, frames, Config { policy, iommu, ..Config::default() });
        let more = Backing::memfd(MORE, frames).unwrap();
        let other = Ioas::new(guest.dma.iommu(), PolicyRule::new(Policy::SharedOnly, guest.dma.rmp()));
        let middle = Arc::new(Mutex::new(None));
        let (space, found) = (Arc::downgrade(guest.dma.space()), Arc::clone(&middle));
        guest.dma.space().on_transition(move |transition| {
            let report = space.upgrade().map(|space| Auditor::new(&space).check_transition(transition));
            if let Some(difference) = report.and_then(|report| report.differences.into_iter().next()) {
                found.lock().unwrap().get_or_insert(difference);
            }
        });
        let device = guest.dma.iommu().device("elsewhere");
        other.attach_device(&device).unwrap();
        let mut world = Self {
            guest,
            policy,
            more,
            more_is_there: false,
            more_at: 0,
            pages: vec![Page { is: Is::Shared, says: 0 }; ((FIRST + MORE) / PAGE) as usize],
            devices: [const { None }; 4],
            runs: true,
            mute: false,
            quarantined: false,
            other,
            mapped: Vec::new(),
            elsewhere: Dma::new(&device).unwrap(),
            middle,
            seen: Seen::default(),
        };
        for who in [Who::Untrusted, Who::Trusted, Who::Level1, Who::Ats] {
            world.attach(who).unwrap();
        }
        world
    }

    pub fn step(&mut self, step: &Step) -> Done {
        match step {
            Step::Access(touches) => touches.iter().try_for_each(|touch| self.access(*touch)),
            Step::Convert(changes) => self.convert(changes, 0),
            Step::ConvertFails(nth, stretch, to) => self.convert(&[(*stretch, *to)], *nth),
            Step::Pvalidate(stretch, accept) => self.pvalidate(*stretch, *accept),
            Step::Adjust(stretch, rights) => self.adjust(*stretch, *rights),
            Step::Punch(stretch) => self.punch(*stretch),
            Step::Populate(stretch) => self.populate(*stretch),
            Step::Merge(from, most) => self.merge(*from, *most),
            Step::Memory(there) if *there == self.more_is_there => Ok(()),
            Step::Memory(true) => self.add_memory(self.more_at),
            Step::Memory(false) => self.remove_memory(),
            Step::Move => self.move_memory(),
            Step::Attach(who, there) if *there == self.devices[*who as usize].is_some() => Ok(()),
            Step::Attach(who, true) => self.attach(*who),
            Step::Attach(who, false) => self.detach(*who),
            Step::Run(runs) => self.run(*runs),
            Step::MapElsewhere(stretch) => self.map_elsewhere(*stretch),
            Step::UnmapElsewhere(index) => self.unmap_elsewhere(*index),
            Step::Mute(mute) => {
                if let Some((_, Port::Ats(dma))) = &self.devices[Who::Ats as usize] {
                    dma.set_mute(*mute);
                    self.mute = *mute;
                }
                Ok(())
            }
            Step::Reset => {
                let Some((device, _)) = &self.devices[Who::Ats as usize] else { return Ok(()) };
                self.quarantined = false;
                device.reset().map_err(failed)
            }
        }
    }

    /// The audit is clean in both address spaces, as it was in the middle of the step, and who answers is not cut off.
    pub fn check(&mut self) -> Done {
        let middle = self.middle.lock().unwrap().take();
        if let Some(difference) = middle {
            return Err(TestCaseError::fail(format!("in the middle of a conversion: {difference}")));
        }
        for report in [self.guest.dma.audit(), Auditor::new(self.guest.dma.space()).audit(&self.other)] {
            prop_assert!(report.is_clean(), "{} differences, first: {}", report.count, report.differences[0]);
        }
        self.seen.audits += 2;
        if let Some((device, _)) = &self.devices[Who::Ats as usize] {
            let is = device.is_quarantined();
            prop_assert!(
                is == self.quarantined || (is && self.mute),
                "quarantined: {is}, before: {}, mute: {}",
                self.quarantined,
                self.mute
            );
            self.seen.quarantines += u64::from(is && !self.quarantined);
            self.quarantined = is;
        }
        Ok(())
    }

    /// Its first address and its bytes.
    pub fn place(&self, stretch: Stretch) -> (u64, u64) {
        let (start, pages) = if stretch.more { (MORE_AT[self.more_at], MORE / PAGE) } else { (0, FIRST / PAGE) };
        let first = u64::from(stretch.first) % pages;
        (start + first * PAGE, u64::from(stretch.pages).clamp(1, pages - first) * PAGE)
    }

    pub fn index(&self, at: u64) -> usize {
        (if at < FIRST { at / PAGE } else { (at - MORE_AT[self.more_at] + FIRST) / PAGE }) as usize
    }

    pub fn there(&self, at: u64) -> bool {
        at < FIRST || self.more_is_there
    }

    fn pages(&mut self, at: u64, len: u64) -> &mut [Page] {
        let first = self.index(at);
        &mut self.pages[first..first + (len / PAGE) as usize]
    }

    /// With `fails`, the fallible step of that number fails, if the conversion has so many.
    fn convert(&mut self, changes: &[(Stretch, Owner)], fails: u64) -> Done {
        let places: Vec<_> = changes.iter().map(|(stretch, to)| (self.place(*stretch), *to)).collect();
        let asked: Vec<_> = places.iter().map(|&((at, len), to)| change(at, len, to)).collect();
        let plan = (fails > 0).then(|| sync::fail::nth(fails));
        let mut done = self.guest.dma.convert(&asked);
        let fired = plan.as_ref().and_then(|plan| plan.fired());
        drop(plan);
        self.seen.failed += u64::from(fired.is_some());
        if fired.is_some() && matches!(done, Err(ConvertError::Reserve { .. } | ConvertError::Busy { .. })) {
            return Ok(());
        }
        if !places.iter().all(|((at, _), _)| self.there(*at)) {
            prop_assert!(matches!(done, Err(ConvertError::NoMemory { .. })), "{done:?}");
            return Ok(());
        }
        let meet = |(index, change): (usize, &Change)| asked[..index].iter().any(|other| other.span.overlaps(change.span));
        if asked.iter().enumerate().any(meet) {
            prop_assert!(matches!(done, Err(ConvertError::Twice { .. })), "{done:?}");
            return Ok(());
        }
        if places.iter().any(|&((at, len), _)| self.pages(at, len).iter().any(|page| page.is == Is::Leaked)) {
            prop_assert!(matches!(done, Err(ConvertError::Leaked { .. })), "{done:?}");
            return Ok(());
        }
        // A split that failed once is tried again.
        prop_assert!(done.is_ok() || fired.is_some(), "{:?}", done);
        let (at_most, leaked) = match done {
            Ok(_) => (u64::MAX, None),
            Err(ConvertError::Refused { done_pages, .. }) => (done_pages, None),
            Err(ConvertError::Leaks { done_pages, span, .. }) => (done_pages, Some(span)),
            // The error says what to do. Until then two tables differ, and the pages are mapped for nobody.
            Err(ConvertError::Stage2 { .. }) => {
                self.middle.lock().unwrap().take_if(|found| ["I-10", "I-11"].contains(&found.invariant));
                done = Ok(self.guest.dma.convert(&asked).map_err(failed)?);
                (u64::MAX, None)
            }
            Err(error) => return Err(failed(error)),
        };
        let mut changed = 0;
        for ((at, len), to) in places {
            for page in self.pages(at, len) {
                let wanted = if to == Owner::Private { page.is.is_private() } else { page.is == Is::Shared };
                if !wanted && changed < at_most {
                    page.is = if to == Owner::Private { Is::FRESH } else { Is::Shared };
                    changed += 1;
                }
            }
        }
        if let Some(span) = leaked {
            self.pages(span.start().get(), span.len()).iter_mut().for_each(|page| page.is = Is::Leaked);
            self.seen.leaked += span.len() / PAGE;
        }
        if fired.is_none() {
            prop_assert_eq!(done.map_err(failed)?.pages, changed);
        } else if at_most < u64::MAX {
            prop_assert_eq!(changed, at_most, "{:?}", done);
        }
        self.seen.converted += changed;
        self.seen.batches += u64::from(asked.len() > 1);
        Ok(())
    }

    fn pvalidate(&mut self, stretch: Stretch, accept: bool) -> Done {
        let (at, len) = self.place(stretch);
        for page in span(at, len.min(16 * PAGE)).blocks(PAGE_LG2) {
            let done = self.guest.dma.space().pvalidate(page.start(), RmpSize::K4, accept);
            let there = self.there(at);
            match &mut self.pages(page.start().get(), PAGE)[0].is {
                Is::Private { validated, .. } if there => {
                    prop_assert_eq!(done.map_err(failed)?.changed, *validated != accept);
                    *validated = accept;
                }
                // Its entry still says that it is the guest's, and is nobody's concern.
                Is::Leaked => {}
                _ => prop_assert!(done.is_err()),
            }
        }
        Ok(())
    }

    /// A level can only be given what is accepted.
    fn adjust(&mut self, stretch: Stretch, rights: Rights) -> Done {
        let (at, len) = self.place(stretch);
        let perms = match rights {
            Rights::None => Perms::NONE,
            Rights::Read => Perms::READ,
            Rights::Write => Perms(Perms::READ.0 | Perms::WRITE.0),
        };
        for page in span(at, len.min(16 * PAGE)).blocks(PAGE_LG2) {
            let done = self.guest.dma.space().rmpadjust(Vmpl::V0, page.start(), RmpSize::K4, Vmpl::V1, perms);
            let there = self.there(at);
            match &mut self.pages(page.start().get(), PAGE)[0].is {
                Is::Private { validated: true, level1 } if there => {
                    done.map_err(failed)?;
                    *level1 = rights;
                    self.seen.adjusted += 1;
                }
                Is::Leaked => {}
                _ => prop_assert!(done.is_err()),
            }
        }
        Ok(())
    }

    fn punch(&mut self, stretch: Stretch) -> Done {
        let (at, len) = self.place(stretch);
        let there = self.there(at);
        let done = self.guest.dma.punch(span(at, len));
        let pages = self.pages(at, len);
        let may = there && !pages.iter().any(|page| page.is.is_private() || page.is == Is::Leaked);
        prop_assert_eq!(done.is_ok(), may, "{:?}", done);
        if may {
            pages.fill(Page { is: Is::Absent, says: 0 });
            self.seen.punched += len / PAGE;
        }
        Ok(())
    }

    fn populate(&mut self, stretch: Stretch) -> Done {
        let (at, len) = self.place(stretch);
        let there = self.there(at);
        let done = self.guest.dma.populate(span(at, len));
        let may = there && self.pages(at, len).iter().all(|page| page.is != Is::Leaked);
        prop_assert_eq!(done.is_ok(), may, "{:?}", done);
        if may {
            self.pages(at, len).iter_mut().filter(|page| page.is == Is::Absent).for_each(|page| page.is = Is::Shared);
        }
        Ok(())
    }

    fn merge(&mut self, from: u16, most: u16) -> Done {
        let (_, before) = self.guest.dma.cuts_and_merges();
        self.guest.dma.merge(Gpa::new(u64::from(from) % (FIRST / PAGE) * PAGE), most.into());
        self.seen.merged += self.guest.dma.cuts_and_merges().1 - before;
        Ok(())
    }

    fn remove_memory(&mut self) -> Done {
        self.more_is_there = false;
        self.guest.dma.remove_memory(Gpa::new(MORE_AT[self.more_at])).map_err(failed)
    }

    /// A private page is the guest's at one address for good (I-8).
    fn add_memory(&mut self, place: usize) -> Done {
        let done = self.guest.dma.add_memory(Gpa::new(MORE_AT[place]), MORE, &self.more, 0);
        let aliases = place != self.more_at && self.pages[(FIRST / PAGE) as usize..].iter().any(|page| page.is.is_private());
        prop_assert_eq!(done.is_err(), aliases, "{:?}", done);
        if aliases {
            self.seen.aliases += 1;
        } else {
            self.seen.moved += u64::from(place != self.more_at);
            (self.more_is_there, self.more_at) = (true, place);
        }
        Ok(())
    }

    fn move_memory(&mut self) -> Done {
        if self.more_is_there {
            self.remove_memory()?;
        }
        self.add_memory(1 - self.more_at)
    }

    fn attach(&mut self, who: Who) -> Done {
        let device = self.guest.dma.add_device(&format!("{who:?}"), trust(who, self.runs)).map_err(failed)?;
        let port = if who == Who::Ats {
            (self.mute, self.quarantined) = (false, false);
            Port::Ats(AtsDma::new(&device).map_err(failed)?)
        } else {
            Port::Plain(Dma::new(&device).map_err(failed)?)
        };
        self.devices[who as usize] = Some((device, port));
        Ok(())
    }

    fn detach(&mut self, who: Who) -> Done {
        let Some((device, mut port)) = self.devices[who as usize].take() else { return Ok(()) };
        self.guest.dma.remove_device(&device).map_err(failed)?;
        prop_assert!(port.access(0, 0, &mut [0; 8]).is_err(), "a device that is gone reads");
        Ok(())
    }

    fn run(&mut self, runs: bool) -> Done {
        self.runs = runs;
        for who in [Who::Trusted, Who::Level1] {
            if let Some((device, _)) = &self.devices[who as usize] {
                device.set_trust(trust(who, runs)).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn map_elsewhere(&mut self, stretch: Stretch) -> Done {
        let (at, len) = self.place(Stretch { more: false, ..stretch });
        let free = self.mapped.iter().all(|&(start, long)| at + len <= start || start + long <= at);
        let done = self.other.map_file(&self.guest.backing, at, len, Place::Fixed(Iova::new(OTHER_AT + at)), Perm::RW);
        prop_assert_eq!(done.is_ok(), free, "{:?}", done);
        if free {
            self.mapped.push((at, len));
        }
        Ok(())
    }

    fn unmap_elsewhere(&mut self, index: u8) -> Done {
        if self.mapped.is_empty() {
            return Ok(());
        }
        let (at, len) = self.mapped.swap_remove(usize::from(index) % self.mapped.len());
        self.other.unmap(Span::from_len(Iova::new(OTHER_AT + at), len).map_err(failed)?).map_err(failed).map(drop)
    }
}
