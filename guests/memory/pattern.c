/*
 * Fills memory with a pattern that a seed gives, changes parts of it, and looks whether it is still right.
 *
 *   pattern check MIB CHANGES SEED [PAUSE]   fill MIB, change CHANGES random pages, read as many others and compare them,
 *                                            then compare all; PAUSE milliseconds after every 256 changes
 *   pattern walk MIB SECONDS SEED [ACTIVE]   fill MIB, then read and change random pages of the first ACTIVE MiB, and say
 *                                            how many in each second; one in which the guest was held up is longer
 *   pattern hold MIB SECONDS SEED            fill MIB, and sleep
 *
 * Every fourth page has only random words, two have few different ones, so that they can be compressed, and of every
 * four one is the same whatever the seed, so that it can be shared. What a page holds follows from its number, its
 * generation (how often it was changed) and the seed; the generations follow from the seed, so they are derived again at
 * the end instead of being trusted to memory. The last line has a checksum of all pages, which is the same wherever the
 * program runs.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 512 };
typedef uint64_t page[WORDS];

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t next(uint64_t *state)
{
    *state += 1;
    return mix(*state);
}

static uint64_t word(uint64_t start, unsigned kind, unsigned i)
{
    return kind == 0 ? mix(start + i) : start ^ (i & 0x1c);
}

static uint64_t start_of(uint64_t seed, uint64_t number, uint32_t generation)
{
    /* Pages of the third kind have no seed in them until they are changed. */
    uint64_t whose = number % 4 == 3 && generation == 0 ? 0 : seed;
    return mix(mix(whose) ^ number << 32 ^ generation);
}

static void fill(page *at, uint64_t seed, uint64_t number, uint32_t generation)
{
    uint64_t start = start_of(seed, number, generation);
    for (unsigned i = 0; i < WORDS; i++)
        (*at)[i] = word(start, number % 4, i);
}

static uint64_t compare(const page *at, uint64_t seed, uint64_t number, uint32_t generation)
{
    uint64_t start = start_of(seed, number, generation), sum = 0;
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t wanted = word(start, number % 4, i), found = ((const volatile uint64_t *)*at)[i];
        if (found != wanted) {
            printf("PATTERN WRONG page %llu generation %u word %u: %016llx, not %016llx\n", (unsigned long long)number,
                   generation, i, (unsigned long long)found, (unsigned long long)wanted);
            exit(1);
        }
        sum = sum * 31 + found;
    }
    return sum;
}

static void *memory(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("PATTERN: mmap");
        exit(2);
    }
    /* Pages of 4 KiB: what the monitor shares and takes away. */
    madvise(at, size, MADV_NOHUGEPAGE);
    return at;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int check(uint64_t pages, uint64_t changes, uint64_t seed, unsigned pause)
{
    page *all = memory(pages * sizeof(page));
    uint32_t *generations = memory(pages * sizeof(uint32_t));
    for (uint64_t i = 0; i < pages; i++)
        fill(&all[i], seed, i, 0);
    uint64_t state = mix(seed);
    for (uint64_t done = 0; done < changes; done++) {
        uint64_t changed = next(&state) % pages, read = next(&state) % pages;
        fill(&all[changed], seed, changed, ++generations[changed]);
        compare(&all[read], seed, read, generations[read]);
        if (pause && done % 256 == 255)
            usleep(pause * 1000);
    }
    memset(generations, 0, pages * sizeof(uint32_t));
    state = mix(seed);
    for (uint64_t done = 0; done < changes; done++) {
        generations[next(&state) % pages]++;
        next(&state);
    }
    uint64_t sum = 0;
    for (uint64_t i = 0; i < pages; i++)
        sum = sum * 31 + compare(&all[i], seed, i, generations[i]);
    printf("PATTERN RIGHT %llu pages, %llu changes, sum %016llx\n", (unsigned long long)pages,
           (unsigned long long)changes, (unsigned long long)sum);
    return 0;
}

static int walk(uint64_t pages, double seconds, uint64_t seed, uint64_t active)
{
    page *all = memory(pages * sizeof(page));
    for (uint64_t i = 0; i < pages; i++)
        fill(&all[i], seed, i, 0);
    uint64_t state = mix(seed), sum = 0;
    printf("PATTERN FILLED\n");
    fflush(stdout);
    if (!active) {
        sleep(seconds);
        return 0;
    }
    for (double begun = now(); now() - begun < seconds;) {
        uint64_t steps = 0;
        double second = now();
        while (now() - second < 1.0)
            for (unsigned i = 0; i < 64; i++, steps++) {
                uint64_t *at = all[next(&state) % active];
                sum += at[steps % WORDS];
                at[1] += 1;
            }
        printf("PATTERN STEPS %llu IN %.3f\n", (unsigned long long)steps, now() - second);
        fflush(stdout);
    }
    return sum == 1;
}

int main(int count, char **words)
{
    if (count < 5)
        return 2;
    uint64_t pages = strtoull(words[2], NULL, 10) << 8, seed = strtoull(words[4], NULL, 10);
    uint64_t last = count > 5 ? strtoull(words[5], NULL, 10) : 0;
    if (strcmp(words[1], "check") == 0)
        return check(pages, strtoull(words[3], NULL, 10), seed, last);
    uint64_t active = strcmp(words[1], "hold") == 0 ? 0 : last ? last << 8 : pages;
    return walk(pages, strtod(words[3], NULL), seed, active);
}
