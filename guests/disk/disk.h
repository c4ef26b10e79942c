/* A program that works on a disk of a guest, as /init or as an ordinary program. */
#ifndef DISK_H
#define DISK_H

#include <stdint.h>

/* program.c */
_Noreturn void die(const char *what); /* says what failed, with errno, and ends */
void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* a line that has left when this returns */
uint64_t mix(uint64_t x);             /* the finalizer of splitmix64: other bits for other numbers */

uint64_t size_of(int disk);            /* bytes of a disk, or of a file in its place */

/* bench.c */
void bench(const char *disk, unsigned rounds, unsigned mebibytes, unsigned operations, const char *only);

/* records.c */
void write_records(const char *disk, uint64_t seed);
void check_records(const char *disk, uint64_t seed, uint64_t records);

#endif
