#!/usr/bin/env python3
"""A first use of /dev/iommu: map a memfd, let a device write into it, see the bytes arrive, cut, audit, unmap.

Where there is no IOMMU, run it under Lockstep, unmodified:

    cargo run --release -- iommufd --devices 1 -- python3 examples/first-use.py
"""
import fcntl, mmap, os, struct


def ioctl(fd, nr, form, *fields):
    """Calls ioctl `nr` with a structure whose first field is its size; returns its fields as they are afterwards."""
    size = struct.calcsize(form)
    data = bytearray(struct.pack(form, size, *fields))
    fcntl.ioctl(fd, 0x3B00 | nr, data)
    return struct.unpack(form, data)


iommu = os.open("/dev/iommu", os.O_RDWR)
ioas = ioctl(iommu, 0x81, "=III", 0, 0)[2]
print(f"IOAS {ioas}")

memory = os.memfd_create("memory")
os.ftruncate(memory, 4 << 20)
iova = ioctl(iommu, 0x8F, "=IIIiQQQ", 6, ioas, memory, 0, 4 << 20, 0)[6]
print(f"4 MiB of a memfd are at IOVA {iova:#x}")

device = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
devid = ioctl(device, 118, "=IIiI", 0, iommu, 0)[3]
ioctl(device, 119, "=IIII", 0, ioas, 0)
print(f"device {devid} is attached")

# Its BAR0 holds a DMA engine. Let it master the bus (region 7 is PCI configuration space), then fill 64 bytes at the IOVA with a pattern.
os.pwrite(device, struct.pack("<H", 6), (7 << 40) + 4)
for register, value in ((0x08, iova + 0x1000), (0x10, 64), (0x30, int.from_bytes(b"lockstep", "little")), (0x18, 2)):
    os.pwrite(device, struct.pack("<Q", value), register)
status = struct.unpack("<Q", os.pread(device, 8, 0x20))[0]
view = mmap.mmap(memory, 4 << 20)
print(f"DMA status {status}, memory has {view[0x1000:0x1010]!r}")

ioctl(iommu, 0xE0, "=IIIIQ", 0, ioas, 0, iova + (2 << 20))
audit = ioctl(iommu, 0xE2, "=IIIIQQQQQ", 0, ioas, 0, 0, 0, 0, 0, 0)
print(f"cut in two; audit: {audit[5]} areas, {audit[6]} leaves, {audit[8]} differences")
gone = ioctl(iommu, 0x86, "=IIQQ", ioas, iova, 2 << 20)[3]
print(f"unmapped {gone >> 20} MiB")
