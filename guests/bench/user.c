/* User-mode items. Buffers are touched before the clock starts: first touch is page-fault-touch's subject. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#define MIB (1024u * 1024u)

uint64_t integer_loop(const struct places *places)
{
    (void)places;
    uint64_t a = 0x9e3779b97f4a7c15u, b = 1, c = 12345;
    clock_start();
    for (uint64_t i = 0; i < 60000000; i++) {
        a += i ^ b;
        b = (b << 5) - b + (a >> 3);
        if (b & 1)
            c += a & 0xff;
        c ^= b * 3;
    }
    clock_stop();
    return a ^ b ^ c;
}

uint64_t random_updates(const struct places *places)
{
    (void)places;
    const uint64_t entries = 64 * MIB / sizeof(uint64_t);
    uint64_t *table = malloc(entries * sizeof *table);
    if (table == NULL)
        die("random-updates: malloc");
    for (uint64_t i = 0; i < entries; i++)
        table[i] = i;
    uint64_t state = 88172645463325252u;
    clock_start();
    for (uint64_t i = 0; i < 4000000; i++) {
        uint64_t value = next_random(&state);
        table[value & (entries - 1)] ^= value;
    }
    clock_stop();
    uint64_t checksum = 0;
    for (uint64_t i = 0; i < entries; i++)
        checksum = checksum * 31 + table[i];
    free(table);
    return checksum;
}

/* noinline, noclone and no tail: every call is a call, at every level. */
__attribute__((noinline, noclone, optimize("no-optimize-sibling-calls"))) static uint64_t fibonacci(uint64_t n)
{
    __asm__ volatile("" : "+r"(n));
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

uint64_t recursive_calls(const struct places *places)
{
    (void)places;
    clock_start();
    uint64_t result = fibonacci(36);
    clock_stop();
    return result;
}

uint64_t dot_product(const struct places *places)
{
    (void)places;
    enum { LENGTH = 4096, ROUNDS = 30000 };
    static double left[LENGTH], right[LENGTH];
    uint64_t state = 362436069;
    for (int i = 0; i < LENGTH; i++) {
        left[i] = (double)(next_random(&state) >> 40) / 16777216.0;
        right[i] = (double)(next_random(&state) >> 40) / 16777216.0 - 0.5;
    }
    double total = 0;
    clock_start();
    for (int round = 0; round < ROUNDS; round++) {
        double sum = 0;
        for (int i = 0; i < LENGTH; i++)
            sum += left[i] * right[i];
        total = total * 0.5 + sum;
        left[round & (LENGTH - 1)] += 0.125;
    }
    clock_stop();
    uint64_t bits;
    memcpy(&bits, &total, sizeof bits);
    return bits;
}

uint64_t memset_memcpy(const struct places *places)
{
    (void)places;
    const size_t size = 64 * MIB;
    unsigned char *from = malloc(size), *to = malloc(size);
    if (from == NULL || to == NULL)
        die("memset-memcpy: malloc");
    memset(from, 1, size);
    memset(to, 2, size);
    clock_start();
    for (int round = 0; round < 4; round++) {
        memset(from, 0x55 + round, size);
        __asm__ volatile("" ::: "memory");
        memcpy(to, from, size);
        __asm__ volatile("" ::: "memory");
    }
    clock_stop();
    uint64_t checksum = FOLD_START;
    for (size_t i = 0; i < size; i += 4093)
        checksum = fold(checksum, to + i, 1);
    free(from);
    free(to);
    return checksum;
}
