/* The load of a file server: whole files, small ones more often than large ones, read in random order from a folder that
 * does not fit into the page cache. One round prints `FILES nanoseconds bytes checksum`; the checksum is of every file's
 * first bytes, so that two guests that were given the same words have read the same. */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PATH_SIZE = 512, PIECE = 64 << 10, HEAD = 16 };

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* The files are FOLDER/0, FOLDER/1 and so on, `files` of them. */
void run_files(const char *folder, unsigned files, unsigned reads, uint64_t seed)
{
    static unsigned char piece[PIECE];
    uint64_t state = seed | 1, bytes = 0, checksum = FOLD_START, began = now();
    for (unsigned i = 0; i < reads; i++) {
        char path[PATH_SIZE];
        snprintf(path, sizeof path, "%s/%u", folder, (unsigned)(next_random(&state) % files));
        int file = open(path, O_RDONLY);
        if (file < 0)
            die(path);
        ssize_t got, in_file = 0;
        while ((got = read(file, piece, sizeof piece)) > 0) {
            if (in_file == 0)
                checksum = fold(checksum, piece, got < HEAD ? (uint64_t)got : HEAD);
            in_file += got;
        }
        if (got < 0)
            die(path);
        close(file);
        bytes += (uint64_t)in_file;
    }
    printf("FILES %llu %llu %016llx\n", (unsigned long long)(now() - began), (unsigned long long)bytes,
           (unsigned long long)checksum);
    fflush(stdout);
}
