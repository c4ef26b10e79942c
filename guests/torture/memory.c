/* Anonymous memory: it comes as zeros and holds what was written to it, wherever it is moved and whoever has a copy. */
#define _GNU_SOURCE
#include "torture.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Word i is to be base + i; one difference is told. */
static void fill(u64 *words, size_t count, u64 base)
{
    for (size_t i = 0; i < count; i++)
        words[i] = base + i;
}

static void expect(const u64 *words, size_t count, u64 base, const char *what)
{
    for (size_t i = 0; i < count; i++)
        if (words[i] != base + i) {
            wrong(what, (u64)&words[i], words[i], base + i);
            return;
        }
}

static void expect_zeros(const u64 *words, size_t count, const char *what)
{
    for (size_t i = 0; i < count; i++)
        if (words[i] != 0) {
            wrong(what, (u64)&words[i], words[i], 0);
            return;
        }
}

void fresh_memory(u64 seed)
{
    for (int round = 0; round < 10; round++) {
        size_t count = 1 + below(&seed, 200);
        u64 base = next_random(&seed), *area = pages(count);
        if (below(&seed, 2)) {
            /* In any order, so that the page tables are not filled one after the other. */
            size_t step = 1 + 2 * below(&seed, 50), page = 0;
            for (size_t i = 0; i < count; i++, page = (page + step) % count)
                if (area[page * WORDS] > count)
                    wrong("fresh page", (u64)&area[page * WORDS], area[page * WORDS], 0);
                else
                    area[page * WORDS] = page;
            for (page = 0; page < count; page++)
                area[page * WORDS] = 0;
        }
        expect_zeros(area, count * WORDS, "fresh memory");
        fill(area, count * WORDS, base);
        expect(area, count * WORDS, base, "memory");
        unmap(area, count);
    }
}

void copy_on_write(u64 seed)
{
    size_t count = 1 + below(&seed, 200), words = count * WORDS;
    u64 base = next_random(&seed), *area = pages(count);
    fill(area, words, base);
    int child = fork();
    if (child == 0) {
        expect(area, words, base, "memory of a child");
        for (size_t i = 0; i < words; i += 97)
            area[i] = ~area[i];
        for (size_t i = 0; i < words; i++) {
            u64 wanted = i % 97 ? base + i : ~(base + i);
            if (area[i] != wanted) {
                wrong("copy of a child", (u64)&area[i], area[i], wanted);
                break;
            }
        }
        _exit(17);
    }
    for (size_t i = 0; i < words; i += 101)
        area[i] += 1;
    expect_status(child, 17, "status of a child that writes its copy");
    for (size_t i = 0; i < words; i += 101)
        area[i] -= 1;
    expect(area, words, base, "memory of a parent");
    unmap(area, count);
}

void moved_memory(u64 seed)
{
    size_t count = 1 + below(&seed, 100), larger = count + 1 + below(&seed, 100);
    u64 base = next_random(&seed), *area = pages(count);
    fill(area, count * WORDS, base);
    for (int round = 0; round < 4; round++) {
        /* To where something else was a moment ago. */
        u64 *place = pages(larger);
        fill(place, larger * WORDS, ~base);
        area = mremap(area, count * PAGE, larger * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        if (area == MAP_FAILED)
            refused("mremap");
        expect(area, count * WORDS, base, "moved memory");
        expect_zeros(area + count * WORDS, (larger - count) * WORDS, "new part of moved memory");
        area[count * WORDS] = 1;
        area = mremap(area, larger * PAGE, count * PAGE, 0);
        if (area == MAP_FAILED)
            refused("mremap");
    }
    expect(area, count * WORDS, base, "memory moved and cut");
    unmap(area, count);
}

void unneeded_memory(u64 seed)
{
    size_t count = 8 + below(&seed, 100);
    u64 *area = pages(count);
    for (int round = 0; round < 8; round++) {
        u64 base = next_random(&seed);
        fill(area, count * WORDS, base);
        size_t first = below(&seed, count), given = 1 + below(&seed, count - first);
        if (madvise(area + first * WORDS, given * PAGE, MADV_DONTNEED) != 0)
            refused("madvise");
        expect(area, first * WORDS, base, "memory before what was given back");
        expect_zeros(area + first * WORDS, given * WORDS, "memory that was given back");
        size_t after = (first + given) * WORDS;
        expect(area + after, count * WORDS - after, base + after, "memory behind what was given back");
    }
    unmap(area, count);
}

void protected_memory(u64 seed)
{
    size_t count = 8 + below(&seed, 100);
    u64 base = next_random(&seed), *area = pages(count);
    fill(area, count * WORDS, base);
    for (int round = 0; round < 8; round++) {
        size_t first = below(&seed, count), some = 1 + below(&seed, count - first);
        u64 *part = area + first * WORDS;
        int refusal = mprotect(part, some * PAGE, below(&seed, 2) ? PROT_READ : PROT_NONE);
        /* The kernel reads for us what we may not, and says so. */
        int ends[2];
        if (refusal != 0 || mprotect(part, some * PAGE, PROT_READ) != 0 || pipe(ends) != 0)
            refused("mprotect");
        expect(area, count * WORDS, base, "protected memory");
        if (write(ends[1], area, 8) == 8 && read(ends[0], part, 8) >= 0)
            wrong("the kernel wrote to read-only memory", (u64)part, *part, base);
        close(ends[0]);
        close(ends[1]);
        if (mprotect(part, some * PAGE, PROT_READ | PROT_WRITE) != 0)
            refused("mprotect");
        base += 3;
        fill(area, count * WORDS, base);
        expect(area, count * WORDS, base, "memory that was protected");
    }
    unmap(area, count);
}

void heap(u64 seed)
{
    u64 *start = sbrk(0);
    if ((u64)start % PAGE)
        sbrk((intptr_t)(PAGE - (u64)start % PAGE));
    start = sbrk(0);
    for (int round = 0; round < 6; round++) {
        size_t count = 1 + below(&seed, 150);
        u64 base = next_random(&seed);
        if (sbrk((intptr_t)(count * PAGE)) != start)
            refused("sbrk");
        expect_zeros(start, count * WORDS, "fresh heap");
        fill(start, count * WORDS, base);
        size_t kept = below(&seed, count);
        sbrk(-(intptr_t)((count - kept) * PAGE));
        expect(start, kept * WORDS, base, "rest of a heap");
        sbrk((intptr_t)((count - kept) * PAGE));
        expect(start, kept * WORDS, base, "start of a heap that grew again");
        expect_zeros(start + kept * WORDS, (count - kept) * WORDS, "heap that grew again");
        sbrk(-(intptr_t)(count * PAGE));
    }
}

/* REP MOVSB and REP STOSQ over pages that are not there yet: every fault interrupts them in the middle. */
void string_moves(u64 seed)
{
    for (int round = 0; round < 4; round++) {
        size_t count = 2 + below(&seed, 60), shift = below(&seed, PAGE);
        size_t size = (count - 1) * PAGE - below(&seed, 64);
        u64 value = next_random(&seed), repeated = (count - 1) * WORDS;
        unsigned char *from = pages(count), *to = pages(count);
        void *at = from;
        __asm__ volatile("rep stosq" : "+D"(at), "+c"(repeated) : "a"(value) : "memory");
        if ((unsigned char *)at != from + (count - 1) * PAGE || repeated != 0)
            wrong("end of REP STOSQ", (u64)from, (u64)at, (u64)from + (count - 1) * PAGE);
        for (size_t i = 0; i < count - 1; i++)
            from[i * PAGE + i % PAGE] ^= (unsigned char)(i + 1);
        const void *source = from;
        void *target = to + shift;
        size_t left = size;
        __asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(left) : : "memory");
        if (left != 0 || (unsigned char *)source != from + size || (unsigned char *)target != to + shift + size)
            wrong("end of REP MOVSB", (u64)from, (u64)source, (u64)from + size);
        for (size_t i = 0; i < size; i++) {
            unsigned char wanted = (unsigned char)(value >> i % 8 * 8);
            if (i / PAGE == i % PAGE)
                wanted ^= (unsigned char)(i / PAGE + 1);
            if (to[shift + i] != wanted || from[i] != wanted) {
                wrong("moved string", (u64)&to[shift + i], (u64)to[shift + i] << 8 | from[i], wanted);
                break;
            }
        }
        unmap(from, count);
        unmap(to, count);
    }
}
