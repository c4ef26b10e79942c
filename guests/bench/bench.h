/* The compute benchmark: one static program that is /init in a guest and an ordinary program on the host, so that
 * ringzero, QEMU and the bare machine run the very same instructions. Each item returns a checksum of what it
 * computed; the checksums of all engines must agree. */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>

struct places {
    const char *self;    /* this program, for fork+exec */
    const char *busybox; /* a static busybox */
    const char *folder;  /* a folder in memory (ramfs, tmpfs) for made data */
};

typedef uint64_t item_function(const struct places *places);

/* user.c: user mode, no system calls between the clock's two readings */
item_function integer_loop, random_updates, recursive_calls, dot_product, memset_memcpy;

/* kernel.c: the kernel's work on behalf of a program */
item_function null_syscall, fork_exec_wait, pipe_ping_pong, page_fault_touch;

/* tools.c: busybox over made data */
item_function busybox_sha256sum, busybox_gzip, busybox_bunzip2, busybox_awk, busybox_sort;
void make_data(const struct places *places);
void remove_data(const struct places *places);

/* system.c */
void run_system(const struct places *places, unsigned rounds, const char *only); /* all items when only is NULL */

/* programs.c */
void run_programs(const char *folder);

/* files.c */
void run_files(const char *folder, unsigned files, unsigned reads, uint64_t seed);

/* nano.c */
int nano(unsigned rounds);

/* runner.c */
_Noreturn void die(const char *what); /* says what failed, with errno, and ends with 1 */
void clock_start(void);               /* an item calls these around the part that counts */
void clock_stop(void);
uint64_t next_random(uint64_t *state); /* the same numbers everywhere */
uint64_t fold(uint64_t hash, const void *data, uint64_t size);
#define FOLD_START 0xcbf29ce484222325u

#endif
