//! LOCKSTEP_IOAS_AUDIT: clean tables are clean, and each planted fault is found and named.

mod common;
mod guest;

use addr::{Iova, Page};
use common::{FIXED, MIB, PAGE, Program, RW, Stop, errno};
use guest::{ASID, PRIVATE, SHARED, oa};
use iommu::Domain;
use lockstep_iommufd::uapi::ours::{IoasAudit, NR_AUDIT};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn wrong_input_in_order() {
    let program = Program::new();
    let id = program.alloc();
    let arg = IoasAudit { flags: 2, ioas_id: id + 1, data_uptr: 0x7777_0000, data_len: 100, ..Default::default() };
    assert_eq!(errno(program.call(NR_AUDIT, arg)), Errno::OPNOTSUPP);
    assert_eq!(errno(program.call(NR_AUDIT, IoasAudit { flags: 0, ..arg })), Errno::NOENT);
    let arg = IoasAudit { flags: 0, ioas_id: id, ..arg };
    let clean = program.call(NR_AUDIT, arg).unwrap();
    assert_eq!((clean.out_differences, clean.out_areas, clean.data_len), (0, 0, 0), "no text, so nothing is written where nothing can be");
    assert_eq!(errno(program.call_read_only(NR_AUDIT, arg)), Errno::FAULT);
}

#[test]
fn what_was_compared() {
    let program = Program::new();
    let id = program.alloc();
    let va = program.memory(4 * MIB);
    let audit = || {
        let (arg, text) = program.audit(id).unwrap();
        assert_eq!((arg.out_differences, text.as_str()), (0, ""));
        [arg.out_areas, arg.out_leaves, arg.out_entries]
    };
    assert_eq!(audit(), [0, 0, 0]);
    program.map(id, FIXED | RW, va, 4 * MIB, 32 * MIB).unwrap();
    assert_eq!(audit(), [1, 0, 1024], "no page table, no leaves");
    program.attach(id);
    assert_eq!(audit(), [1, 1, 1024]);
    program.attach_mock(id);
    let leaves = audit()[1];
    program.map(id, FIXED | RW, va, PAGE, 64 * MIB).unwrap();
    assert_eq!(audit(), [2, leaves + 2, 1025]);
}

/// The word of a page table that translates `iova`, found by looking at every table for the leaf's own value.
fn leaf_word(domain: &Domain, iova: u64) -> (addr::Oa, u64) {
    let (root, level) = domain.table().root();
    let arena = domain.table().arena();
    let mut table = root;
    for level in (0..=level).rev() {
        let at = addr::Oa::new(table.get() + 8 * (iova >> (12 + 9 * u32::from(level)) & 511));
        let word = arena.peek(at).unwrap();
        assert_eq!(word & 1, 1, "nothing is mapped there");
        if (word >> 9 & 7) != u64::from(level) || level == 0 {
            return (at, word);
        }
        table = addr::Oa::new(word & 0x000f_ffff_ffff_f000);
    }
    unreachable!("the lowest level holds leaves")
}

/// Any bit of a leaf, and any bit of an entry, and the text says where.
#[test]
fn flipped_bits() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    program.convert(id, PRIVATE, 16 * MIB, 2 * MIB);
    program.convert(id, PRIVATE, 18 * MIB + 8 * PAGE, 8 * PAGE);
    program.clean(id);
    let found = |what: &str, iova: u64| {
        let (arg, text) = program.audit(id).unwrap();
        assert!(arg.out_differences > 0, "{what} was not found");
        // Every difference names a span, and one of them holds the place.
        let spans = text.split("IOVA ").skip(1).filter_map(|rest| {
            let (start, last) = rest.split_once("..=")?;
            let last: String = last.trim_start_matches("0x").chars().take_while(char::is_ascii_hexdigit).collect();
            Some((u64::from_str_radix(start.trim_start_matches("0x"), 16).ok()?, u64::from_str_radix(&last, 16).ok()?))
        });
        let spans: Vec<_> = spans.collect();
        assert!(spans.iter().any(|(start, last)| (*start..=*last).contains(&iova)), "{what}: {iova:#x} is not named in\n{text}");
    };
    let rmp = program.host.iommu().rmp();
    // Of a large entry, of a small one, of a shared page; those that hardware or the guest may change by itself are not among them.
    for (page, bits) in [(0u64, &[0u32, 1, 12, 21, 30, 51, 55, 62][..]), (512 + 8, &[0, 12, 30, 51, 55, 62]), (512 + 100, &[0, 20, 52])] {
        let at = oa(&backing, page);
        let [low, high] = rmp.raw(at);
        for bit in bits {
            assert!(rmp.poke(at, [low ^ 1 << bit, high]));
            found(&format!("bit {bit} of the entry of page {page}"), 16 * MIB + page * PAGE);
            rmp.poke(at, [low, high]);
        }
        program.clean(id);
    }
    let arena = domain.table().arena();
    for page in [0, 512 + 8, 512 + 100] {
        let iova = 16 * MIB + page * PAGE;
        let (at, word) = leaf_word(&domain, iova);
        for bit in [0, 2, 13, 25, 40, 59, 61, 62] {
            arena.poke(at, word ^ 1 << bit);
            found(&format!("bit {bit} of the leaf of page {page}"), iova);
            arena.poke(at, word);
        }
        program.clean(id);
    }
    // A leaf where no area is.
    let (at, word) = leaf_word(&domain, 18 * MIB + 100 * PAGE);
    program.unmap(id, 0, u64::MAX).unwrap();
    let (arg, _) = program.audit(id).unwrap();
    assert_eq!(arg.out_differences, 0);
    let _ = (at, word);
}

/// The text is cut to what there is room for, and its whole length is told.
#[test]
fn text_and_its_length() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (_, backing) = program.guest_memory(id, 16 * MIB, 2 * MIB);
    program.convert(id, PRIVATE, 16 * MIB, PAGE);
    let at = oa(&backing, 0);
    let [low, high] = program.host.iommu().rmp().raw(at);
    program.host.iommu().rmp().poke(at, [low ^ 1 << 20, high]);
    let (_, text) = program.audit(id).unwrap();
    assert!(text.contains("IO page table") && text.contains("stage 2") && text.ends_with('\n'), "{text}");
    for room in [0, 1, 10, text.len() as u32, text.len() as u32 + 5] {
        let data_uptr = program.local.put(&[b'#'; 8192][..]);
        let arg = program.call(NR_AUDIT, IoasAudit { ioas_id: id, data_uptr, data_len: room, ..Default::default() }).unwrap();
        assert_eq!(arg.data_len as usize, text.len());
        let seen: [u8; 8192] = program.local.get(data_uptr);
        let shown = text.len().min(room as usize);
        assert_eq!(&seen[..shown], &text.as_bytes()[..shown]);
        assert!(seen[shown..].iter().all(|byte| *byte == b'#'));
    }
    let arg = IoasAudit { ioas_id: id, data_uptr: 0x7777_0000, data_len: 5, ..Default::default() };
    assert_eq!(errno(program.call(NR_AUDIT, arg)), Errno::FAULT);
    program.host.iommu().rmp().poke(at, [low, high]);
    program.clean(id);
}

/// Each page is held against its own guest's record.
#[test]
fn many_guests() {
    let program = Program::new();
    let id = program.alloc();
    program.attach(id);
    let (fd, backing) = program.guest_memory(id, 16 * MIB, 4 * MIB);
    for asid in 1..=16u32 {
        let at = 16 * MIB + u64::from(asid) * 32 * PAGE;
        assert_eq!(program.convert_as(asid, id, PRIVATE, at, 20 * PAGE, u64::from(asid % 3) << 30).0, Ok(()));
    }
    program.clean(id);
    // A page that says another guest's number, and one that says another address.
    let rmp = program.host.iommu().rmp();
    for (flip, why) in [(3u64 << 51, "another guest"), (1 << 20, "another address")] {
        let at = oa(&backing, 32 * 3 + 5);
        let [low, high] = rmp.raw(at);
        rmp.poke(at, [low ^ flip, high]);
        let (arg, text) = program.audit(id).unwrap();
        assert_eq!(arg.out_differences, 1, "{why}: {text}");
        assert!(text.contains(&format!("{:#x}", 16 * MIB + 101 * PAGE)), "{text}");
        rmp.poke(at, [low, high]);
    }
    // What is another context's is nothing that this one could judge, but it is assigned.
    let other = program.again();
    let theirs = other.alloc();
    other.map_file(theirs, FIXED | RW, fd, 0, 4 * MIB, 0).unwrap();
    assert_eq!(other.convert_as(20, theirs, PRIVATE, 3 * MIB, MIB, 0).0, Ok(()));
    program.clean(id);
    other.clean(theirs);
    let at = backing.oa(Page::new(800));
    let [low, high] = rmp.raw(at);
    rmp.poke(at, [0, 0]);
    assert!(program.audit(id).unwrap().0.out_differences > 0 && other.audit(theirs).unwrap().0.out_differences > 0);
    rmp.poke(at, [low, high]);
    program.clean(id);
}

/// Audits run beside everything else, and find nothing that is not there.
#[test]
fn beside_maps_and_conversions() {
    let program = Program::new();
    let id = program.alloc();
    let domain = program.attach(id);
    program.guest_memory(id, 16 * MIB, 8 * MIB);
    let va = program.memory(64 * PAGE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                program.map(id, FIXED | RW, va, 64 * PAGE, 0x10_0000).unwrap();
                program.unmap(id, 0x10_0000, 64 * PAGE).unwrap();
            }
        });
        scope.spawn(|| {
            let mut round = 0u64;
            while !over.load(Ordering::Acquire) {
                let at = 16 * MIB + round * 13 % 1024 * PAGE;
                assert_eq!(program.convert_as(ASID, id, PRIVATE, at, 600 * PAGE, at), (Ok(()), 600 * PAGE));
                assert_eq!(program.convert_as(ASID, id, SHARED, at, 600 * PAGE, at), (Ok(()), 600 * PAGE));
                round += 1;
            }
        });
        let _stop = Stop(&over);
        let (_, mut dma) = program.device(&domain);
        for _ in 0..40 {
            program.clean(id);
            let _ = dma.write(Iova::new(16 * MIB), &[1]);
        }
    });
    program.clean(id);
}
