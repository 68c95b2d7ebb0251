/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What Lockstep's /dev/iommu understands beyond Linux's own iommufd. docs/ioctls.md explains each call.
 * Numbers lie far above the kernel's, so that on a kernel's /dev/iommu they answer ENOTTY.
 */
#ifndef LOCKSTEP_H
#define LOCKSTEP_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define LOCKSTEP_TYPE (';')

/* Cut the area at iova into two, under running DMA. */
struct lockstep_ioas_cut {
	__u32 size;
	__u32 flags;      /* 0 */
	__u32 ioas_id;
	__u32 __reserved; /* 0 */
	__aligned_u64 iova;
};
#define LOCKSTEP_IOAS_CUT _IO(LOCKSTEP_TYPE, 0xe0)

enum lockstep_owner {
	LOCKSTEP_TO_PRIVATE = 1,
	LOCKSTEP_TO_SHARED = 2,
};

/* Change the owner of mapped pages in every table that describes them. */
struct lockstep_ioas_convert {
	__u32 size;
	__u32 flags;      /* 0 */
	__u32 ioas_id;
	__u32 to;         /* enum lockstep_owner */
	__aligned_u64 iova;
	__aligned_u64 length;
	__aligned_u64 gpa;
	__u32 asid;
	__u32 __reserved; /* 0 */
	__aligned_u64 out_done;
};
#define LOCKSTEP_IOAS_CONVERT _IO(LOCKSTEP_TYPE, 0xe1)

/* Compare what is mapped with what the page tables and the secure world's table hold. */
struct lockstep_ioas_audit {
	__u32 size;
	__u32 flags;      /* LOCKSTEP_AUDIT_* */
	__u32 ioas_id;
	__u32 data_len;
	__aligned_u64 data_uptr;
	__aligned_u64 out_areas;
	__aligned_u64 out_leaves;
	__aligned_u64 out_entries;
	__aligned_u64 out_differences;
};
/* All mapped memory has been written to, so that a hole in it is a loss. */
#define LOCKSTEP_AUDIT_POPULATED 1
#define LOCKSTEP_IOAS_AUDIT _IO(LOCKSTEP_TYPE, 0xe2)

#endif
