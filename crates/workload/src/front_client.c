/* A program that uses /dev/iommu as any other does. It reads lines "WHAT TIMES", does that, and prints how many nanoseconds it took. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CALL(nr) _IO(';', nr)
#define AT (1ull << 30)
#define PAGE 4096ull
#define GIB (1ull << 30)
#define BATCH 128

/* As in linux/iommufd.h, which a host may be too old to have. */
struct alloc { uint32_t size, flags, out_ioas_id; };
struct map { uint32_t size, flags, ioas_id, reserved; uint64_t user_va, length, iova; };
struct map_file { uint32_t size, flags, ioas_id; int32_t fd; uint64_t start, length, iova; };
struct unmap { uint32_t size, ioas_id; uint64_t iova, length; };
struct hwpt { uint32_t size, op, id, reserved; uint64_t words[7]; };

static int iommufd, memfd;
static uint32_t ioas;
static char *memory;

static void call(unsigned long command, void *arg, const char *what)
{
	if (ioctl(iommufd, command, arg)) {
		printf("%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static void map(uint64_t page)
{
	struct map arg = { sizeof(arg), 7, ioas, 0, (uintptr_t)memory + page * PAGE, PAGE, AT + page * PAGE };
	call(CALL(0x85), &arg, "map");
}

static void unmap(uint64_t iova, uint64_t length)
{
	struct unmap arg = { sizeof(arg), ioas, iova, length };
	call(CALL(0x86), &arg, "unmap");
}

static void map_file(void)
{
	struct map_file arg = { sizeof(arg), 7, ioas, memfd, 0, GIB, AT };
	call(CALL(0x8f), &arg, "map file");
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t pages(long times, int count_maps)
{
	uint64_t took = 0;
	while (times > 0) {
		long batch = times < BATCH ? times : BATCH, page;
		uint64_t start = now();
		for (page = 0; page < batch; page++)
			map(page);
		if (count_maps)
			took += now() - start;
		start = now();
		for (page = 0; page < batch; page++)
			unmap(AT + page * PAGE, PAGE);
		if (!count_maps)
			took += now() - start;
		times -= batch;
	}
	return took;
}

static uint64_t file(long times, int count_maps)
{
	uint64_t took = 0;
	for (; times > 0; times--) {
		uint64_t start = now(), middle;
		map_file();
		middle = now();
		unmap(AT, GIB);
		took += count_maps ? middle - start : now() - middle;
	}
	return took;
}

int main(void)
{
	struct alloc alloc = { sizeof(alloc), 0, 0 };
	/* The mock device of the test operations: with it, mappings reach a page table. */
	struct hwpt device = { 72, 2, 0, 0, { 0 } };
	char what[64];
	long times;

	iommufd = open("/dev/iommu", O_RDWR);
	memfd = memfd_create("bench", MFD_CLOEXEC);
	memory = mmap(NULL, BATCH * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (iommufd < 0 || memfd < 0 || memory == MAP_FAILED || ftruncate(memfd, GIB)) {
		printf("%s\n", strerror(errno));
		return 1;
	}
	memset(memory, 1, BATCH * PAGE);
	call(CALL(0x81), &alloc, "alloc");
	ioas = alloc.out_ioas_id;
	device.id = ioas;
	call(CALL(0xa0), &device, "mock device");
	while (scanf("%63s %ld", what, &times) == 2) {
		uint64_t took = 0, start = now();
		long i;
		if (!strcmp(what, "getpid")) {
			for (i = 0; i < times; i++)
				syscall(SYS_getpid);
			took = now() - start;
		} else if (!strcmp(what, "unmap_nothing")) {
			for (i = 0; i < times; i++)
				unmap(0, UINT64_MAX);
			took = now() - start;
		} else if (!strcmp(what, "map_4k")) {
			took = pages(times, 1);
		} else if (!strcmp(what, "unmap_4k")) {
			took = pages(times, 0);
		} else if (!strcmp(what, "map_file_1g")) {
			took = file(times, 1);
		} else if (!strcmp(what, "unmap_file_1g")) {
			took = file(times, 0);
		}
		printf("%llu\n", (unsigned long long)took);
		fflush(stdout);
	}
	return 0;
}
