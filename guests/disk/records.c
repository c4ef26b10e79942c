/* Records, one a page, each written to a place of its own and then flushed: what was said to be on the disk must be there
 * after the machine was killed, whenever that was. `DONE n` says that all records before the n-th are. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MOST_AT_ONCE = 8 };

/* A record's place: an odd factor goes through all pages of a disk whose number of pages is a power of two before it
 * comes back, and seldom to a neighbour. */
static uint64_t place(uint64_t seed, uint64_t record, uint64_t pages)
{
    return (record * (mix(seed) | 1)) % pages;
}

static void make(uint64_t *page, uint64_t seed, uint64_t record)
{
    for (unsigned i = 0; i < WORDS; i++)
        page[i] = mix(mix(seed) ^ record << 16 ^ i);
}

static uint64_t *buffer(void)
{
    void *page;
    if (posix_memalign(&page, PAGE, PAGE) != 0)
        die("no memory");
    return page;
}

void write_records(const char *path, uint64_t seed)
{
    int disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk < 0)
        die(path);
    uint64_t *page = buffer(), pages = size_of(disk) / PAGE;
    for (uint64_t record = 0; record < pages;) {
        /* One to several before each flush. */
        uint64_t end = record + 1 + mix(seed ^ record) % MOST_AT_ONCE;
        for (; record < end && record < pages; record++) {
            make(page, seed, record);
            if (pwrite(disk, page, PAGE, (off_t)(place(seed, record, pages) * PAGE)) != PAGE)
                die("write");
        }
        if (fdatasync(disk) != 0)
            die("fdatasync");
        say("DONE %llu", (unsigned long long)record);
    }
}

void check_records(const char *path, uint64_t seed, uint64_t records)
{
    int disk = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (disk < 0)
        die(path);
    uint64_t *page = buffer(), *wanted = buffer(), pages = size_of(disk) / PAGE;
    for (uint64_t record = 0; record < records; record++) {
        if (pread(disk, page, PAGE, (off_t)(place(seed, record, pages) * PAGE)) != PAGE)
            die("read");
        make(wanted, seed, record);
        if (memcmp(page, wanted, PAGE) != 0) {
            say("LOST %llu", (unsigned long long)record);
            errno = EIO;
            die("a record that was flushed is not there");
        }
    }
}
