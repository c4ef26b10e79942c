/* Code that is written, executed, written again, moved, and copied: what executes is always what was written last. */
#define _GNU_SOURCE
#include "torture.h"

#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

typedef uint32_t function(uint32_t);

/* MOV EAX, value; RET. */
static void write_constant(unsigned char *at, uint32_t value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, sizeof value);
    at[5] = 0xc3;
}

static void expect_call(const void *at, uint32_t argument, uint32_t wanted, const char *what)
{
    uint32_t got = ((function *)(u64)at)(argument);
    if (got != wanted)
        wrong(what, (u64)at, got, wanted);
}

static void protect(void *at, size_t count, int protection)
{
    if (mprotect(at, count * PAGE, protection) != 0)
        refused("mprotect");
}

/* Places of 61 bytes: some lie across the edge of a page. */
#define SLOT 61ul

void written_code(u64 seed)
{
    size_t count = 2 + below(&seed, 6), slots = count * PAGE / SLOT;
    unsigned char *area = pages(count);
    for (int round = 0; round < 6; round++) {
        uint32_t base = (uint32_t)next_random(&seed);
        for (size_t slot = 0; slot < slots; slot++)
            write_constant(area + slot * SLOT, base + (uint32_t)slot);
        protect(area, count, PROT_READ | PROT_EXEC);
        for (size_t slot = 0; slot < 2 * slots; slot++)
            expect_call(area + slot % slots * SLOT, 0, base + (uint32_t)(slot % slots), "written code");
        protect(area, count, PROT_READ | PROT_WRITE);
    }
    unmap(area, count);
}

void rewritten_code(u64 seed)
{
    unsigned char *area = pages(1);
    protect(area, 1, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (size_t slot = 0; slot + SLOT <= PAGE; slot += SLOT)
        write_constant(area + slot, 0);
    /* MOV [RIP+1], EDI; MOV EAX, 0; RET: it writes its own next instruction. */
    static const unsigned char own[] = {0x89, 0x3d, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xc3};
    memcpy(area + 20 * SLOT, own, sizeof own);
    for (int round = 0; round < 300; round++) {
        uint32_t value = (uint32_t)next_random(&seed);
        unsigned char *at = area + below(&seed, 20) * SLOT;
        memcpy(at + 1, &value, sizeof value);
        expect_call(at, 0, value, "rewritten code");
        expect_call(area + 20 * SLOT, value, value, "code that rewrites itself");
    }
    unmap(area, 1);
}

static unsigned char *forbidden;
static volatile u64 forbidden_calls;

/* A call of what may not be executed comes here, before its first instruction: from now on it may. */
static void on_fault(int signal, siginfo_t *info, void *context)
{
    const ucontext_t *user = context;
    u64 page = (u64)forbidden & ~(PAGE - 1);
    scramble_registers();
    if ((u64)info->si_addr - page >= PAGE || mprotect((void *)page, PAGE, PROT_READ | PROT_EXEC) != 0) {
        /* Not ours: let it end the process. */
        struct sigaction action = {.sa_handler = SIG_DFL};
        sigaction(signal, &action, NULL);
        return;
    }
    if ((u64)user->uc_mcontext.gregs[REG_RIP] != (u64)forbidden || (u64)info->si_addr != (u64)forbidden)
        wrong("where code that is forbidden stops", (u64)user->uc_mcontext.gregs[REG_RIP], (u64)info->si_addr,
              (u64)forbidden);
    forbidden_calls++;
}

/* Code whose page is made not executable faults, once, however often it was executed before. */
void forbidden_code(u64 seed)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, before;
    sigaction(SIGSEGV, &action, &before);
    unsigned char *area = pages(1);
    forbidden = area + below(&seed, PAGE - SLOT);
    forbidden_calls = 0;
    for (u64 round = 1; round <= 30; round++) {
        uint32_t value = (uint32_t)next_random(&seed);
        write_constant(forbidden, value);
        expect_call(forbidden, 0, value, "code that was forbidden");
        if (forbidden_calls != round)
            wrong("calls that were stopped", (u64)forbidden, forbidden_calls, round);
        expect_call(forbidden, 0, value, "code that was forbidden, again");
        protect(area, 1, PROT_READ | PROT_WRITE);
    }
    unmap(area, 1);
    sigaction(SIGSEGV, &before, NULL);
}

static void *map_code(void *at, int file, size_t page, int protection)
{
    void *got = mmap(at, PAGE, protection, MAP_SHARED | (at ? MAP_FIXED : 0), file, (off_t)(page * PAGE));
    if (got == MAP_FAILED)
        refused("mmap of code");
    return got;
}

/* Other pages of code come to one address, one page of code to other addresses, and it is written from elsewhere. */
void moved_code(u64 seed)
{
    enum { PAGES = 4 };
    int file = memfd_create("torture", 0);
    if (file < 0 || ftruncate(file, PAGES * PAGE) != 0)
        refused("memfd_create");
    uint32_t base = (uint32_t)next_random(&seed);
    unsigned char *writable[PAGES], *place = pages(1);
    for (size_t i = 0; i < PAGES; i++) {
        writable[i] = map_code(NULL, file, i, PROT_READ | PROT_WRITE);
        write_constant(writable[i] + 100, base + (uint32_t)i);
    }
    for (int round = 0; round < 100; round++) {
        size_t i = below(&seed, PAGES);
        map_code(place, file, i, PROT_READ | PROT_EXEC);
        uint32_t value;
        memcpy(&value, writable[i] + 101, sizeof value);
        expect_call(place + 100, 0, value, "code mapped over other code");
        if (round % 3 == 0) {
            value += PAGES;
            memcpy(writable[i] + 101, &value, sizeof value);
            /* SDM (2024-12) Vol. 3A 9.1.3 "Handling Self- and Cross-Modifying Code": by another linear address, the
             * processor has to be serialized. */
            unsigned a, b, c, d;
            __cpuid(0, a, b, c, d);
            expect_call(place + 100, 0, value, "code written by its other address");
        }
        if (round % 5 == 0) {
            unsigned char *fresh = pages(1);
            void *there = mremap(place, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, fresh);
            if (there == MAP_FAILED)
                refused("mremap");
            expect_call(fresh + 100, 0, value, "code that was moved");
            map_code(place, file, (i + 1) % PAGES, PROT_READ | PROT_EXEC);
            memcpy(&value, writable[(i + 1) % PAGES] + 101, sizeof value);
            expect_call(place + 100, 0, value, "code where code was moved away");
            unmap(fresh, 1);
        }
    }
    for (size_t i = 0; i < PAGES; i++)
        unmap(writable[i], 1);
    unmap(place, 1);
    close(file);
}

void code_of_a_child(u64 seed)
{
    unsigned char *area = pages(2);
    protect(area, 2, PROT_READ | PROT_WRITE | PROT_EXEC);
    uint32_t value = (uint32_t)next_random(&seed);
    /* The child changes the second page, the parent the first. */
    write_constant(area, value);
    write_constant(area + PAGE, value + 1);
    expect_call(area + PAGE, 0, value + 1, "code before there is a child");
    int child = fork();
    if (child == 0) {
        expect_call(area + PAGE, 0, value + 1, "code of a child");
        for (uint32_t i = 2; i < 50; i++) {
            write_constant(area + PAGE, value + i);
            expect_call(area + PAGE, 0, value + i, "code that a child rewrites");
            expect_call(area, 0, value, "code that a child leaves alone");
        }
        _exit(2);
    }
    for (uint32_t i = 0; i < 100; i++) {
        expect_call(area + PAGE, 0, value + 1, "code of a parent");
        write_constant(area, value + i);
        expect_call(area, 0, value + i, "code that a parent rewrites");
    }
    expect_status(child, 2, "status of a child that rewrites code");
    expect_call(area + PAGE, 0, value + 1, "code of a parent, later");
    unmap(area, 2);
}
