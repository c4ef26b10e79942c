/* Those loops of guests/nano that a program can run, on the bare machine. */
#define _GNU_SOURCE
#include "bench.h"
#include "../nano/loops.h"

#include <stdio.h>
#include <sys/mman.h>
#include <x86intrin.h>

static void measure(const char *name, unsigned long (*loop)(unsigned long, void *), unsigned long times, void *page,
                    unsigned rounds)
{
    loop(1000, page);
    for (unsigned round = 0; round < rounds; round++) {
        uint64_t before = __rdtsc();
        unsigned long result = loop(times, page);
        printf("NANO %s %llu %lu %016lx\n", name, (unsigned long long)(__rdtsc() - before), times, result);
    }
}

int nano(unsigned rounds)
{
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        die("nano: mmap");
    measure("callret", loop_callret, CALLRET_TIMES, page, rounds);
    measure("smc", loop_smc, SMC_TIMES, page, rounds);
    puts("PASS");
    return 0;
}
