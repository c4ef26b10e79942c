/* Mappings of other kinds: large pages, files mapped privately and shared, pages that a handler lets in. */
#define _GNU_SOURCE
#include "torture.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define LARGE (2ul << 20)

/* A sample of the words, some from every page. */
static void expect_sparse(const u64 *words, size_t count, u64 base, const char *what)
{
    for (size_t i = 0; i < count; i += 37)
        if (words[i] != base + i) {
            wrong(what, (u64)&words[i], words[i], base + i);
            return;
        }
}

static void fill_sparse(u64 *words, size_t count, u64 base)
{
    for (size_t i = 0; i < count; i += 37)
        words[i] = base + i;
}

void large_pages(u64 seed)
{
    size_t count = 2 * LARGE / PAGE, words = count * WORDS;
    char *whole = pages(count + LARGE / PAGE);
    u64 *area = (u64 *)(((u64)whole + LARGE - 1) & ~(LARGE - 1));
    /* A kernel without them does as well. */
    madvise(area, 2 * LARGE, MADV_HUGEPAGE);
    u64 base = next_random(&seed);
    fill_sparse(area, words, base);
    int child = fork();
    if (child == 0) {
        expect_sparse(area, words, base, "large pages of a child");
        fill_sparse(area, words, ~base);
        expect_sparse(area, words, ~base, "written large pages of a child");
        _exit(5);
    }
    /* While the child reads and copies, one page of the middle goes, another gets a protection of its own. */
    size_t gone = 1 + below(&seed, count - 2), own = (gone + count / 2) % count;
    madvise(area + gone * WORDS, PAGE, MADV_DONTNEED);
    if (mprotect(area + own * WORDS, PAGE, PROT_READ) != 0)
        refused("mprotect");
    for (size_t i = 0; i < WORDS; i++)
        if (area[gone * WORDS + i] != 0) {
            wrong("page given back in a large one", (u64)&area[gone * WORDS + i], area[gone * WORDS + i], 0);
            break;
        }
    for (size_t i = gone * WORDS; i < (gone + 1) * WORDS; i++)
        area[i] = base + i;
    expect_sparse(area, words, base, "large pages in pieces");
    if (mprotect(area + own * WORDS, PAGE, PROT_READ | PROT_WRITE) != 0)
        refused("mprotect");
    fill_sparse(area + own * WORDS, WORDS, base + own * WORDS);
    expect_status(child, 5, "status of a child with large pages");
    expect_sparse(area, gone * WORDS, base, "large pages of a parent");
    unmap(whole, count + LARGE / PAGE);
}

static int file_of(size_t count, u64 base)
{
    u64 page[WORDS];
    int file = memfd_create("torture", 0);
    for (size_t i = 0; file >= 0 && i < count; i++) {
        for (size_t word = 0; word < WORDS; word++)
            page[word] = base + i * WORDS + word;
        if (write(file, page, PAGE) != (ssize_t)PAGE)
            refused("write");
    }
    if (file < 0)
        refused("memfd_create");
    return file;
}

static u64 *map_file(int file, size_t count, int kind)
{
    void *at = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, kind, file, 0);
    if (at == MAP_FAILED)
        refused("mmap of a file");
    return at;
}

static u64 word_of_file(int file, size_t index)
{
    u64 word;
    if (pread(file, &word, sizeof word, (off_t)(index * sizeof word)) != sizeof word)
        refused("pread");
    return word;
}

void private_file(u64 seed)
{
    size_t count = 2 + below(&seed, 40), words = count * WORDS;
    u64 base = next_random(&seed);
    int file = file_of(count, base);
    u64 *one = map_file(file, count, MAP_PRIVATE), *other = map_file(file, count, MAP_PRIVATE);
    for (size_t i = 0; i < words; i += 29)
        one[i] ^= 1;
    for (size_t i = 0; i < words; i++) {
        u64 wanted = i % 29 ? base + i : (base + i) ^ 1;
        if (one[i] != wanted || other[i] != base + i) {
            wrong("private mapping of a file", (u64)&one[i], one[i], wanted);
            wrong("its untouched twin", (u64)&other[i], other[i], base + i);
            break;
        }
    }
    for (size_t i = 0; i < words; i += 29 * 17)
        if (word_of_file(file, i) != base + i)
            wrong("file behind a private mapping", i, word_of_file(file, i), base + i);
    unmap(one, count);
    unmap(other, count);
    close(file);
}

void shared_file(u64 seed)
{
    size_t count = 2 + below(&seed, 40), words = count * WORDS;
    u64 base = next_random(&seed);
    int file = file_of(count, base);
    volatile u64 *one = map_file(file, count, MAP_SHARED), *other = map_file(file, count, MAP_SHARED);
    int child = fork();
    if (child == 0) {
        /* A third mapping, and odd words only: the parent writes the even ones at the same time. */
        u64 *third = map_file(file, count, MAP_SHARED);
        for (size_t i = 1; i < words; i += 2)
            third[i] ^= base;
        _exit(9);
    }
    for (size_t i = 0; i < words; i += 2) {
        one[i] += 1;
        if (other[i] != base + i + 1)
            wrong("other mapping of a shared page", (u64)&other[i], other[i], base + i + 1);
    }
    expect_status(child, 9, "status of a child that shares");
    for (size_t i = 0; i < words; i++) {
        u64 wanted = i % 2 ? (base + i) ^ base : base + i + 1;
        if (other[i] != wanted || (i % 251 == 0 && word_of_file(file, i) != wanted)) {
            wrong("shared memory", (u64)&other[i], other[i], wanted);
            break;
        }
    }
    unmap((void *)one, count);
    unmap((void *)other, count);
    close(file);
}

/* A file that is cut: what was mapped of it goes from all address spaces, and comes back as zeros when it grows. */
void cut_file(u64 seed)
{
    size_t count = 4 + below(&seed, 40);
    u64 base = next_random(&seed) | 1;
    int file = file_of(count, base), to_child[2], to_parent[2];
    if (pipe(to_child) != 0 || pipe(to_parent) != 0)
        refused("pipe");
    u64 *area = map_file(file, count, MAP_SHARED);
    size_t kept = below(&seed, count);
    char byte = 0;
    int child = fork();
    if (child == 0) {
        expect_sparse(area, count * WORDS, base, "file of a child");
        if (write(to_parent[1], &byte, 1) != 1 || read(to_child[0], &byte, 1) != 1)
            _exit(1);
    } else {
        expect_sparse(area, count * WORDS, base, "file");
        if (child < 0 || read(to_parent[0], &byte, 1) != 1 || ftruncate(file, (off_t)(kept * PAGE)) != 0 ||
            ftruncate(file, (off_t)(count * PAGE)) != 0 || write(to_child[1], &byte, 1) != 1)
            refused("ftruncate");
    }
    expect_sparse(area, kept * WORDS, base, "file before the cut");
    for (size_t i = kept * WORDS; i < count * WORDS; i += 37)
        if (area[i] != 0) {
            wrong("file behind the cut", (u64)&area[i], area[i], 0);
            break;
        }
    if (child == 0)
        _exit(8);
    expect_status(child, 8, "status of a child whose file is cut");
    unmap(area, count);
    close(file);
    for (int end = 0; end < 2; end++) {
        close(to_child[end]);
        close(to_parent[end]);
    }
}

static char *guarded;
static size_t guarded_count;
static volatile u64 let_in;

/* Lets a page in, with every register changed meanwhile; the instruction is then executed again. */
static void on_fault(int signal, siginfo_t *info, void *context)
{
    const ucontext_t *user = context;
    u64 page = ((u64)info->si_addr - (u64)guarded) / PAGE;
    scramble_registers();
    if ((u64)info->si_addr < (u64)guarded || page >= guarded_count) {
        /* Not one of ours: let it end the process. */
        struct sigaction action = {.sa_handler = SIG_DFL};
        sigaction(signal, &action, NULL);
        return;
    }
    if (user->uc_mcontext.gregs[REG_TRAPNO] != 14 || (u64)user->uc_mcontext.gregs[REG_CR2] != (u64)info->si_addr)
        wrong("fault's number and address", (u64)info->si_addr, (u64)user->uc_mcontext.gregs[REG_CR2], 14);
    if (mprotect(guarded + page * PAGE, PAGE, PROT_READ | PROT_WRITE) != 0)
        _exit(3);
    let_in++;
}

void faults_in_handlers(u64 seed)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, before;
    sigaction(SIGSEGV, &action, &before);
    guarded_count = 2 + below(&seed, 40);
    guarded = pages(guarded_count);
    /* One kind of access for every edge between two pages. */
    for (int kind = 0; kind < 4; kind++) {
        if (mprotect(guarded, guarded_count * PAGE, PROT_NONE) != 0)
            refused("mprotect");
        let_in = 0;
        u64 value = next_random(&seed);
        for (size_t page = 1; page < guarded_count; page++) {
            char *at = guarded + page * PAGE - 1 - below(&seed, 7);
            u64 bytes = value + page, got, old;
            switch (kind) {
            case 0:
                __asm__ volatile("mov %1, (%2)\nmov (%2), %0" : "=&r"(got) : "r"(bytes), "r"(at) : "memory");
                break;
            case 1: {
                u64 count = 8;
                const void *source = &bytes;
                void *target = at;
                __asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
                memcpy(&got, at, sizeof got);
                break;
            }
            case 2:
                /* The rest of both pages has the words of the round before. */
                memcpy(&old, at, sizeof old);
                __asm__ volatile("add %1, (%2)\nmov (%2), %0" : "=&r"(got) : "r"(bytes), "r"(at) : "memory", "cc");
                bytes += old;
                break;
            default: {
                u64 low;
                char *whole = at - 12;
                __asm__ volatile("vmovq %2, %%xmm1\nvpunpcklqdq %%xmm1, %%xmm1, %%xmm1\n"
                                 "vinsertf128 $1, %%xmm1, %%ymm1, %%ymm1\nvmovdqu %%ymm1, (%3)\n"
                                 "vmovdqu (%3), %%ymm2\nvextractf128 $1, %%ymm2, %%xmm3\nvmovq %%xmm3, %0\n"
                                 "vmovq %%xmm2, %1\nvzeroupper"
                                 : "=&r"(got), "=&r"(low) : "r"(bytes), "r"(whole)
                                 : "memory", "xmm1", "xmm2", "xmm3");
                if (low != got)
                    wrong("lower part of a vector across two pages", (u64)whole, low, got);
                break;
            }
            }
            if (got != bytes)
                wrong("access that faults twice", (u64)at, got, bytes);
        }
        if (let_in != guarded_count)
            wrong("pages let in", (u64)kind, let_in, guarded_count);
    }
    unmap(guarded, guarded_count);
    sigaction(SIGSEGV, &before, NULL);
}
