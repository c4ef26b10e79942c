/* How fast a disk is, past the page cache (O_DIRECT): in sequence with large requests, and at random with small ones, many
 * at a time by Linux's asynchronous I/O (io_submit(2)). Prints `DISK item nanoseconds times checksum` for each round: times
 * is MiB or operations, and the checksum is of what was read. What is written is the same in every round, and comes before
 * what is read, so all rounds must agree, and all guests. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 4096, LARGE = 1 << 20, DEEP = 32, SHALLOW = 4 };

static const struct item {
    const char *name;
    unsigned size;  /* of a request, in bytes */
    unsigned depth; /* requests under way at once */
    int writes;
    int random;
} items[] = {
    {"sequential-write", LARGE, SHALLOW, 1, 0},
    {"random-write", SMALL, DEEP, 1, 1},
    {"sequential-read", LARGE, SHALLOW, 0, 0},
    {"random-read", SMALL, DEEP, 0, 1},
};
#define ITEMS (sizeof items / sizeof *items)

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Carries out `times` requests, `depth` of them at once, gives a sum over what was read, in whatever order it came, and tells
 * how long that took: from the first request to the end of the last, without what makes the buffers and the context (whose
 * end waits for a grace period of RCU, which is no work of a disk's). */
static uint64_t carry_out(int disk, const struct item *item, uint64_t blocks, unsigned times, uint64_t *took)
{
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, item->depth, &context) != 0)
        die("io_setup");
    struct iocb requests[DEEP], *waiting[DEEP];
    struct io_event done[DEEP];
    unsigned char *buffers;
    if (posix_memalign((void **)&buffers, 2 * LARGE, (size_t)item->depth * item->size) != 0)
        die("no memory");
    memset(buffers, 0x5a, (size_t)item->depth * item->size);
    uint64_t sum = 0;
    unsigned begun = 0, ended = 0, ready = 0;
    for (unsigned slot = 0; slot < item->depth; slot++)
        waiting[ready++] = &requests[slot];
    uint64_t began = now();
    while (ended < times) {
        unsigned count = 0;
        for (; count < ready && begun < times; count++, begun++) {
            struct iocb *request = waiting[count];
            uint64_t block = item->random ? mix(begun) % blocks : begun % blocks;
            size_t slot = (size_t)(request - requests);
            unsigned char *buffer = buffers + slot * item->size;
            if (item->writes) {
                uint64_t mark = mix(block * item->size);
                for (unsigned at = 0; at < item->size; at += SMALL)
                    memcpy(buffer + at, &mark, sizeof mark);
            }
            *request = (struct iocb){
                .aio_data = slot,
                .aio_lio_opcode = item->writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                .aio_fildes = (uint32_t)disk,
                .aio_buf = (uint64_t)buffer,
                .aio_nbytes = item->size,
                .aio_offset = (int64_t)(block * item->size),
            };
        }
        for (unsigned given = 0; given < count;) {
            long taken = syscall(SYS_io_submit, context, count - given, waiting + given);
            if (taken <= 0)
                die("io_submit");
            given += (unsigned)taken;
        }
        /* Those that there was nothing more for stay behind. */
        ready = 0;
        long got = syscall(SYS_io_getevents, context, 1, DEEP, done, NULL);
        if (got <= 0)
            die("io_getevents");
        for (long i = 0; i < got; i++) {
            if (done[i].res != (int64_t)item->size) {
                errno = done[i].res < 0 ? (int)-done[i].res : EIO;
                die(item->name);
            }
            uint64_t word;
            memcpy(&word, buffers + done[i].data * item->size, sizeof word);
            sum += item->writes ? 0 : mix(word);
            waiting[ready++] = &requests[done[i].data];
        }
        ended += (unsigned)got;
    }
    *took = now() - began;
    syscall(SYS_io_destroy, context);
    free(buffers);
    return sum;
}

void bench(const char *path, unsigned rounds, unsigned mebibytes, unsigned operations, const char *only)
{
    int disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk < 0)
        die(path);
    uint64_t size = size_of(disk);
    say("BENCH-START");
    uint64_t start = now();
    for (size_t i = 0; i < ITEMS; i++) {
        const struct item *item = &items[i];
        if (only != NULL && strcmp(only, item->name) != 0)
            continue;
        unsigned times = item->random ? operations : mebibytes;
        for (unsigned round = 0; round < rounds; round++) {
            uint64_t took;
            uint64_t sum = carry_out(disk, item, size / item->size, times, &took);
            printf("DISK %s %llu %u %016llx\n", item->name, (unsigned long long)took, times,
                   (unsigned long long)sum);
            /* So that the next round does not wait for what this one wrote. */
            if (item->writes && fdatasync(disk) != 0)
                die("fdatasync");
        }
    }
    uint64_t whole = now() - start;
    say("BENCH-STOP");
    say("DISK-CLOCK %llu", (unsigned long long)whole);
}
