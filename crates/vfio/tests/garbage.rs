//! Nothing that a client passes does harm: random bytes to every ioctl, random reads and writes, random mappings.

mod common;

use common::*;
use fastrand::Rng;
use iommufd::Mmap;
use iommufd::uapi::io;
use lockstep_vfio::uapi::{BASE, GET_INFO};

/// Numbers that mean something more often than others do.
fn number(random: &mut Rng) -> u32 {
    match random.u8(..6) {
        0 => random.u32(..),
        1 => 1 << random.u32(..32),
        2 => random.u32(..64),
        3 => 0,
        4 => 32,
        _ => random.u32(..8),
    }
}

fn offset(random: &mut Rng) -> u64 {
    match random.u8(..4) {
        0 => random.u64(..),
        1 => random.u64(..10) << 40 | random.u64(..0x1_0010),
        2 => random.u64(..0x1000),
        _ => CONFIG + random.u64(..0x1010),
    }
}

#[test]
fn a_client_cannot_break_a_device() {
    for seed in 0..8 {
        let mut random = Rng::with_seed(seed);
        let client = Client::new(2);
        let (bound, iommufd, _) = client.ready(0);
        let unbound = client.open_device(1);
        let eventfd = client.eventfd();
        for _ in 0..4000 {
            let fd = *random.choice([&bound, &bound, &unbound]).unwrap();
            match random.u8(..6) {
                0..3 => {
                    let mut words: Vec<u32> = (0..16).map(|_| number(&mut random)).collect();
                    words[0] = *random.choice([&0, &8, &12, &16, &20, &24, &32, &64, &u32::MAX, &words[0]]).unwrap();
                    if random.u8(..3) == 0 {
                        words[2] = iommufd as u32;
                        words[5] = eventfd as u32;
                    }
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    let command = if random.u8(..10) == 0 { random.u32(..) } else { io(BASE + random.u32(..24)) };
                    let _ = client.ioctl_bytes(fd, command, &bytes);
                }
                3 => _ = client.pread(fd, offset(&mut random), random.usize(..5000)),
                4 => {
                    let data: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
                    let _ = client.pwrite(fd, offset(&mut random), &data);
                }
                _ => {
                    let wanted =
                        Mmap { len: random.u64(..) >> random.u32(..64), prot: 3, flags: number(&mut random), offset: offset(&mut random) };
                    let _ = client.mmap(fd, wanted);
                }
            }
            if random.u16(..500) == 0 {
                let _ = client.ioctl_at(fd, io(GET_INFO), random.u64(..));
            }
        }
        client.close(bound);
        client.close(unbound);
        // A fresh open works as ever.
        let (device, ..) = client.ready(0);
        assert_eq!(client.command(device, IOVA, IOVA + 0x1000, 8, cmd::COPY), status::IDLE);
    }
}
