#!/usr/bin/env python3
"""A program that gives pages back and does what it can to keep its device on them. It must not succeed in one way.

    cargo run --release -- iommufd --devices 1 -- python3 examples/hostile.py

Exit status 0 when the device lost every page the moment it was given back, and no page came back by itself.
"""
import ctypes, errno, fcntl, mmap, os, struct, sys, threading

PAGE = 4096
PAGES = 64
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def ioctl(fd, nr, form, *fields):
    data = bytearray(struct.pack(form, struct.calcsize(form), *fields))
    fcntl.ioctl(fd, 0x3B00 | nr, data)
    return struct.unpack(form, data)


def punch(fd, page, count=1):
    if libc.fallocate(fd, PUNCH, page * PAGE, count * PAGE):
        raise OSError(ctypes.get_errno(), "fallocate")


iommu = os.open("/dev/iommu", os.O_RDWR)
device = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
ioctl(device, 118, "=IIiI", 0, iommu, 0)
os.pwrite(device, struct.pack("<H", 6), (7 << 40) + 4)
engine = threading.Lock()


def write_by_dma(iova):
    """Whether the device could write there."""
    with engine:
        for register, value in ((0x08, iova), (0x10, 8), (0x30, 0x6B65657020697421), (0x18, 2)):
            os.pwrite(device, struct.pack("<Q", value), register)
        return struct.unpack("<Q", os.pread(device, 8, 0x20))[0] == 0


def is_hole(memory, page):
    try:
        return os.lseek(memory, page * PAGE, os.SEEK_DATA) >= (page + 1) * PAGE
    except OSError as error:
        return error.errno == errno.ENXIO


class Try:
    """64 pages of a new memfd, full, mapped at one IOVA and copied to another address space."""

    def __init__(self):
        self.memory = os.memfd_create("hostile")
        os.ftruncate(self.memory, PAGES * PAGE)
        os.pwrite(self.memory, b"x" * PAGES * PAGE, 0)
        self.ioas = ioctl(iommu, 0x81, "=III", 0, 0)[2]
        self.other = ioctl(iommu, 0x81, "=III", 0, 0)[2]
        self.iova = ioctl(iommu, 0x8F, "=IIIiQQQ", 6, self.ioas, self.memory, 0, PAGES * PAGE, 0)[6]
        self.twin = ioctl(iommu, 0x83, "=IIIIQQQ", 6, self.other, self.ioas, PAGES * PAGE, 0, self.iova)[5]
        self.attach(self.ioas)
        assert write_by_dma(self.iova + PAGE), "the device works"

    def attach(self, ioas):
        ioctl(device, 119, "=IIII", 0, ioas, 0)

    def still_has(self, page):
        """Every way to the page that the device may have, and what they brought back."""
        found = []
        if write_by_dma(self.iova + page * PAGE):
            found.append("through its mapping")
        self.attach(self.other)
        if write_by_dma(self.twin + page * PAGE):
            found.append("through a copy of it")
        self.attach(self.ioas)
        if not is_hole(self.memory, page):
            found.append("and the page has memory again")
        return found


def by_descriptor(t):
    punch(t.memory, 1)


def by_duplicate(t):
    twin = os.dup(t.memory)
    punch(twin, 1)
    os.close(twin)


def by_another_open(t):
    again = os.open(f"/proc/self/fd/{t.memory}", os.O_RDWR)
    punch(again, 1)
    os.close(again)


def by_a_child(t):
    child = os.fork()
    if child == 0:
        try:
            punch(t.memory, 1)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def by_truncation(t):
    os.ftruncate(t.memory, PAGE)
    os.ftruncate(t.memory, PAGES * PAGE)


def with_all_else(t):
    punch(t.memory, 0, PAGES)


def while_it_is_mapped_here(t):
    view = mmap.mmap(t.memory, PAGES * PAGE)
    view[PAGE] = 1
    punch(t.memory, 1)


def under_dma(t):
    late = []
    over = threading.Event()

    def keep_writing():
        while not over.is_set():
            write_by_dma(t.iova + PAGE)

    threads = [threading.Thread(target=keep_writing) for _ in range(3)]
    [thread.start() for thread in threads]
    punch(t.memory, 1)
    late += [write_by_dma(t.iova + PAGE) for _ in range(50)]
    over.set()
    [thread.join() for thread in threads]
    assert not any(late), "a write that began after the punch went through"


def in_the_middle_of_attaching(t):
    over = threading.Event()

    def attach_back_and_forth():
        while not over.is_set():
            t.attach(t.other)
            t.attach(t.ioas)

    thread = threading.Thread(target=attach_back_and_forth)
    thread.start()
    punch(t.memory, 1)
    over.set()
    thread.join()


ways = [by_descriptor, by_duplicate, by_another_open, by_a_child, by_truncation, with_all_else, while_it_is_mapped_here, under_dma, in_the_middle_of_attaching]
kept = 0
for way in ways:
    t = Try()
    way(t)
    found = t.still_has(1)
    kept += bool(found)
    print(f"{way.__name__.replace('_', ' ')}: {', '.join(found) if found else 'the device has lost it'}")
    if way not in (by_truncation, with_all_else):
        assert write_by_dma(t.iova + 2 * PAGE), "a neighbour was lost, too"

# Behind everybody's back: through a mapping, without a descriptor. Nobody can be told, but it is found.
t = Try()
view = mmap.mmap(t.memory, PAGES * PAGE)
view.madvise(9, PAGE, PAGE)  # MADV_REMOVE
audit = ioctl(iommu, 0xE2, "=IIIIQQQQQ", 1, t.ioas, 0, 0, 0, 0, 0, 0)  # LOCKSTEP_AUDIT_POPULATED
print(f"behind our back: an audit finds {audit[8]} differences")
if audit[8] == 0:
    kept += 1
sys.exit(1 if kept else 0)
