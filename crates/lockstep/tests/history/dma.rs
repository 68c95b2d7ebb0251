//! DMA of every device, and what the model says to it.

use super::step::{Rights, Stretch, Touch, Who};
use super::world::{Done, Is, OTHER_AT, World};
use addr::Iova;
use lockstep_iommu::{AtsDma, Dma, Fault, Policy};
use proptest::prop_assert_eq;

pub enum Port {
    Plain(Dma),
    Ats(AtsDma),
}

impl Port {
    pub fn access(&mut self, at: u64, writes: u8, bytes: &mut [u8; 8]) -> Result<(), Fault> {
        let (at, value) = (Iova::new(at), says(writes).to_le_bytes());
        match self {
            Self::Plain(dma) if writes == 0 => dma.read(at, bytes),
            Self::Plain(dma) => dma.write(at, &value),
            Self::Ats(dma) if writes == 0 => dma.read(at, bytes),
            Self::Ats(dma) => dma.write(at, &value),
        }
    }
}

fn says(writes: u8) -> u64 {
    u64::from(writes) * 0x0101_0101_0101_0101
}

impl World {
    /// Whether the device may, by the model.
    fn may(&self, who: Who, at: u64, writes: bool) -> bool {
        let trusted = matches!(who, Who::Trusted | Who::Level1);
        if !self.there(at) || (who == Who::Ats && self.quarantined) || (trusted && !self.runs) {
            return false;
        }
        match self.pages[self.index(at)].is {
            Is::Shared => who != Who::Elsewhere || self.mapped.iter().any(|&(start, len)| (start..start + len).contains(&at)),
            Is::Private { validated: true, level1 } if self.policy == Policy::Mirror => match who {
                Who::Trusted => true,
                Who::Level1 => level1 == Rights::Write || (level1 == Rights::Read && !writes),
                Who::Untrusted | Who::Ats | Who::Elsewhere => false,
            },
            Is::Private { .. } | Is::Absent | Is::Leaked => false,
        }
    }

    pub fn access(&mut self, Touch { who, more, page, writes }: Touch) -> Done {
        let more = more && who != Who::Elsewhere;
        let (at, _) = self.place(Stretch { more, first: page, pages: 1 });
        let allowed = self.may(who, at, writes > 0);
        let mut bytes = [0; 8];
        let done = match who {
            Who::Elsewhere if writes == 0 => self.elsewhere.read(Iova::new(OTHER_AT + at), &mut bytes),
            Who::Elsewhere => self.elsewhere.write(Iova::new(OTHER_AT + at), &says(writes).to_le_bytes()),
            _ => match &mut self.devices[who as usize] {
                Some((_, port)) => port.access(at, writes, &mut bytes),
                None => return Ok(()),
            },
        };
        let index = self.index(at);
        let page = &mut self.pages[index];
        prop_assert_eq!(done.is_ok(), allowed, "{:?} at {:#x}: {:?}, {:?}", who, at, page, done);
        if writes == 0 {
            prop_assert_eq!(u64::from_le_bytes(bytes), if allowed { page.says } else { 0 }, "{:?} at {:#x}", who, at);
        } else if allowed {
            page.says = says(writes);
        }
        self.seen.private += u64::from(allowed && page.is.is_private());
        *if allowed { &mut self.seen.allowed } else { &mut self.seen.refused } += 1;
        Ok(())
    }
}
