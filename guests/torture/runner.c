/* Processes that do what they know the outcome of, and check it: registers over interrupts, faults and system calls,
 * memory of every kind, code that is written, programs one after the other at the same addresses, threads.
 *
 *     torture SECONDS [WORKERS [TEST...]]
 *
 * Each worker goes once through the tests (its own first), then picks them at random until the time is over. Half of
 * them have a timer that interrupts them all the time. A line `WRONG test what pid ...` for whatever comes out wrong, a
 * line `ran TEST N` for each test, and a last line `torture: N tests, M wrong`. Exit status 1 if anything was wrong.
 * A native run has nothing to say: whatever is wrong in a guest is the machine's fault. */
#define _GNU_SOURCE
#include "torture.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    test_function *run;
} tests[] = {
    {"registers-in-calls", registers_in_calls},
    {"registers-in-system-calls", registers_in_system_calls},
    {"registers-in-faults", registers_in_faults},
    {"fresh-memory", fresh_memory},
    {"copy-on-write", copy_on_write},
    {"moved-memory", moved_memory},
    {"unneeded-memory", unneeded_memory},
    {"protected-memory", protected_memory},
    {"heap", heap},
    {"string-moves", string_moves},
    {"large-pages", large_pages},
    {"private-file", private_file},
    {"shared-file", shared_file},
    {"cut-file", cut_file},
    {"faults-in-handlers", faults_in_handlers},
    {"written-code", written_code},
    {"rewritten-code", rewritten_code},
    {"forbidden-code", forbidden_code},
    {"moved-code", moved_code},
    {"code-of-a-child", code_of_a_child},
    {"deep-stacks", deep_stacks},
    {"pipes", pipes},
    {"other-programs", other_programs},
    {"same-place-other-program", same_place_other_program},
    {"locks", locks},
    {"moved-under-a-thread", moved_under_a_thread},
    {"protected-under-a-thread", protected_under_a_thread},
    {"code-under-a-thread", code_under_a_thread},
    {"one-clock", one_clock},
    {"counter-waits", counter_waits},
};
#define TESTS (sizeof tests / sizeof *tests)

/* What all processes count in. */
static struct {
    u64 ran[TESTS];
    u64 wrong;
} *counts;

static size_t chosen[TESTS], chosen_count;
static size_t current;
static u64 current_seed;

void wrong(const char *what, u64 where, u64 got, u64 wanted)
{
    char line[256];
    int size = snprintf(line, sizeof line, "WRONG %s %s: pid %d, at %#lx %#lx, wanted %#lx (seed %#lx)\n",
                        tests[current].name, what, getpid(), where, got, wanted, current_seed);
    __atomic_add_fetch(&counts->wrong, 1, __ATOMIC_RELAXED);
    if (write(STDOUT_FILENO, line, (size_t)size) != size)
        _exit(1);
}

_Noreturn void refused(const char *what)
{
    char line[256];
    int size = snprintf(line, sizeof line, "REFUSED %s %s: %s\n", tests[current].name, what, strerror(errno));
    __atomic_add_fetch(&counts->wrong, 1, __ATOMIC_RELAXED);
    _exit(write(STDOUT_FILENO, line, (size_t)size) == size ? 3 : 4);
}

u64 next_random(u64 *state)
{
    /* Marsaglia's xorshift64 with the shifts 13, 7, 17. */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

u64 below(u64 *state, u64 limit)
{
    return (next_random(state) >> 11) % limit;
}

void *pages(size_t count)
{
    void *at = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        refused("mmap");
    return at;
}

void unmap(void *at, size_t count)
{
    if (munmap(at, count * PAGE) != 0)
        refused("munmap");
}

void expect_status(int child, int status, const char *what)
{
    int got;
    if (child < 0)
        refused("fork");
    while (waitpid(child, &got, 0) < 0)
        if (errno != EINTR)
            refused("waitpid");
    if (got != status << 8)
        wrong(what, (u64)child, (u64)got, (u64)status << 8);
}

/* The kernel puts back what the handler changes: every register is one that a test may be holding. */
static void on_tick(int signal)
{
    (void)signal;
    scramble_registers();
}

static void set_timer(u64 *seed)
{
    struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    suseconds_t period = 1500 + (suseconds_t)below(seed, 4000);
    struct itimerval timer = {.it_interval.tv_usec = period, .it_value.tv_usec = period};
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void run(size_t test, u64 *seed)
{
    current = test;
    current_seed = next_random(seed);
    tests[test].run(current_seed);
    __atomic_add_fetch(&counts->ran[test], 1, __ATOMIC_RELAXED);
}

static void work(size_t worker, size_t workers, time_t end)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    u64 seed = ((u64)now.tv_sec * 1000000007 + (u64)now.tv_nsec) * 64 + worker + 1;
    for (int i = 0; i < 8; i++)
        next_random(&seed);
    if (worker % 2)
        set_timer(&seed);
    for (size_t i = 0; i < chosen_count; i++)
        run(chosen[(worker * chosen_count / workers + i) % chosen_count], &seed);
    while (time(NULL) < end)
        run(chosen[below(&seed, chosen_count)], &seed);
}

/* Returns whether all names are those of tests. */
static bool choose(int count, char **names)
{
    for (size_t test = 0; count == 0 && test < TESTS; test++)
        chosen[chosen_count++] = test;
    for (int i = 0; i < count && chosen_count < TESTS; i++) {
        size_t test = 0;
        while (test < TESTS && strcmp(tests[test].name, names[i]) != 0)
            test++;
        if (test == TESTS)
            return false;
        chosen[chosen_count++] = test;
    }
    return true;
}

int main(int count, char **words)
{
    if (count == 3 && strcmp(words[1], "status") == 0)
        return atoi(words[2]);
    int seconds = count > 1 ? atoi(words[1]) : 0;
    size_t workers = count > 2 ? (size_t)atoi(words[2]) : 6;
    if (count < 2 || workers < 1 || workers > 64 || !choose(count > 3 ? count - 3 : 0, words + 3)) {
        fprintf(stderr, "usage: %s SECONDS [WORKERS [TEST...]]; tests:\n", words[0]);
        for (size_t test = 0; test < TESTS; test++)
            fprintf(stderr, "    %s\n", tests[test].name);
        return 2;
    }
    if (!__builtin_cpu_supports("avx")) {
        fprintf(stderr, "torture: this processor has no AVX\n");
        return 2;
    }
    counts = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counts == MAP_FAILED) {
        perror("torture");
        return 2;
    }
    time_t end = time(NULL) + seconds;
    for (size_t worker = 0; worker < workers; worker++) {
        if (fork() == 0) {
            work(worker, workers, end);
            exit(0);
        }
    }
    int status;
    for (pid_t child; (child = wait(&status)) > 0;) {
        if (status == 0)
            continue;
        printf("WRONG worker %d ended with status %#x\n", child, status);
        counts->wrong++;
    }
    u64 all = 0;
    for (size_t i = 0; i < chosen_count; i++) {
        printf("ran %s %lu\n", tests[chosen[i]].name, counts->ran[chosen[i]]);
        all += counts->ran[chosen[i]];
    }
    printf("torture: %lu tests, %lu wrong\n", all, counts->wrong);
    return counts->wrong != 0;
}
