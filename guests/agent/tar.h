/* The header of a tar archive (IEEE Std 1003.1-2017, pax, "ustar Interchange Format"), and what both directions share. */
#ifndef RINGZERO_TAR_H
#define RINGZERO_TAR_H

#include "agent.h"

#define TAR_BLOCK 512
#define TAR_EXTENDED_MAX 16384 /* of a pax extended header: a path and the target of a link, each of at most 4 KiB, and numbers */
#define TAR_PATH 4096
#define TAR_DEPTH 128

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100], magic[6], version[2], user[32],
        group[32], major[8], minor[8], prefix[155], rest[12];
};

/* The sum of all bytes, those of the sum itself taken as spaces. */
static inline u32 tar_sum(const struct tar_header *header)
{
    const u8 *bytes = (const u8 *)header;
    u32 sum = 8 * ' ';
    for (usize i = 0; i < TAR_BLOCK; i++)
        sum += bytes[i];
    for (usize i = 0; i < sizeof header->sum; i++)
        sum -= (u8)header->sum[i];
    return sum;
}

#endif
