/* Threads of one address space, on as many processors as there are: locks, and what one thread does to pages and code
 * that another uses. A thread never sees less than what the other had said before. */
#define _GNU_SOURCE
#include "torture.h"

#include <cpuid.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static pthread_t start(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument) != 0)
        refused("pthread_create");
    return thread;
}

#define THREADS 3
#define TURNS 2000

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static u64 counted, counted_too, counted_atomically;
static _Thread_local u64 own[64];

static void *count_up(void *argument)
{
    u64 number = (u64)argument;
    for (u64 turn = 0; turn < TURNS; turn++) {
        pthread_mutex_lock(&lock);
        u64 before = counted++;
        counted_too += 3;
        if (counted_too != 3 * (before + 1))
            wrong("what a lock guards", (u64)&counted_too, counted_too, 3 * (before + 1));
        pthread_mutex_unlock(&lock);
        __atomic_add_fetch(&counted_atomically, number, __ATOMIC_RELAXED);
        own[turn % 64] += number;
    }
    for (u64 i = 0; i < 64; i++) {
        u64 turns = TURNS / 64 + (i < TURNS % 64);
        if (own[i] != turns * number)
            wrong("variable of a thread", (u64)&own[i], own[i], turns * number);
    }
    return NULL;
}

void locks(u64 seed)
{
    pthread_t threads[THREADS];
    u64 sum = 0;
    counted = counted_too = counted_atomically = 0;
    for (size_t i = 0; i < THREADS; i++) {
        u64 number = 1 + below(&seed, 1000);
        sum += number;
        threads[i] = start(count_up, (void *)number);
    }
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (counted != THREADS * TURNS)
        wrong("count under a lock", 0, counted, THREADS * TURNS);
    if (counted_atomically != sum * TURNS)
        wrong("sum of atomic additions", 0, counted_atomically, sum * TURNS);
}

/* What one thread has said, the place it is about, and whether it is over. */
static struct {
    u64 said;
    volatile u64 *place;
    bool over;
} shared;

#define VERSIONS 64

/* Page n of a file begins with n; the pages are mapped at one place, one after the other. */
static void *read_versions(void *argument)
{
    (void)argument;
    while (!__atomic_load_n(&shared.over, __ATOMIC_ACQUIRE)) {
        u64 said = __atomic_load_n(&shared.said, __ATOMIC_ACQUIRE);
        u64 got = *shared.place;
        if (got < said || got > VERSIONS) {
            wrong("page that another thread has replaced", (u64)shared.place, got, said);
            break;
        }
    }
    return NULL;
}

void moved_under_a_thread(u64 seed)
{
    int file = memfd_create("torture", 0);
    if (file < 0 || ftruncate(file, (VERSIONS + 1) * PAGE) != 0)
        refused("memfd_create");
    for (u64 i = 0; i <= VERSIONS; i++)
        if (pwrite(file, &i, sizeof i, (off_t)(i * PAGE)) != sizeof i)
            refused("pwrite");
    void *place = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (place == MAP_FAILED)
        refused("mmap");
    shared.said = 0;
    shared.place = place;
    shared.over = false;
    pthread_t reader = start(read_versions, NULL);
    for (u64 i = 1; i <= VERSIONS; i++) {
        int kind = below(&seed, 2) ? MAP_SHARED : MAP_PRIVATE;
        if (mmap(place, PAGE, PROT_READ | PROT_WRITE, kind | MAP_FIXED, file, (off_t)(i * PAGE)) == MAP_FAILED)
            refused("mmap");
        __atomic_store_n(&shared.said, i, __ATOMIC_RELEASE);
        if (below(&seed, 4) == 0)
            sched_yield();
    }
    __atomic_store_n(&shared.over, true, __ATOMIC_RELEASE);
    pthread_join(reader, NULL);
    unmap(place, 1);
    close(file);
}

static bool may_write;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    if ((u64)info->si_addr != (u64)shared.place) {
        /* Not ours: let it end the process. */
        struct sigaction action = {.sa_handler = SIG_DFL};
        sigaction(signal, &action, NULL);
        return;
    }
    while (!__atomic_load_n(&may_write, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void *write_on(void *argument)
{
    (void)argument;
    while (!__atomic_load_n(&shared.over, __ATOMIC_ACQUIRE))
        ++*shared.place;
    return NULL;
}

/* When the page is read-only, nobody writes to it any more. */
void protected_under_a_thread(u64 seed)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, before;
    sigaction(SIGSEGV, &action, &before);
    shared.place = pages(1);
    shared.over = false;
    may_write = true;
    pthread_t writer = start(write_on, NULL);
    for (int round = 0; round < 40; round++) {
        for (u64 wait = below(&seed, 2000); wait > 0; wait--)
            __asm__ volatile("pause");
        __atomic_store_n(&may_write, false, __ATOMIC_RELEASE);
        if (mprotect((void *)shared.place, PAGE, PROT_READ) != 0)
            refused("mprotect");
        u64 value = *shared.place;
        if (below(&seed, 2))
            sched_yield();
        for (int look = 0; look < 2000; look++)
            if (*shared.place != value) {
                wrong("page that another thread may not write", (u64)shared.place, *shared.place, value);
                break;
            }
        if (mprotect((void *)shared.place, PAGE, PROT_READ | PROT_WRITE) != 0)
            refused("mprotect");
        __atomic_store_n(&may_write, true, __ATOMIC_RELEASE);
        if (below(&seed, 2))
            sched_yield();
    }
    __atomic_store_n(&shared.over, true, __ATOMIC_RELEASE);
    pthread_join(writer, NULL);
    unmap((void *)shared.place, 1);
    sigaction(SIGSEGV, &before, NULL);
}

static void *call_on(void *argument)
{
    uint32_t (*function)(void) = (uint32_t (*)(void))argument;
    while (!__atomic_load_n(&shared.over, __ATOMIC_ACQUIRE)) {
        u64 said = __atomic_load_n(&shared.said, __ATOMIC_ACQUIRE);
        /* SDM (2024-12) Vol. 3A 9.1.3 "Handling Self- and Cross-Modifying Code": the processor that is to execute what
         * another has written serializes itself. */
        unsigned a, b, c, d;
        __cpuid(0, a, b, c, d);
        u64 got = function();
        if (got < said) {
            wrong("code that another thread has written", (u64)argument, got, said);
            break;
        }
    }
    return NULL;
}

void code_under_a_thread(u64 seed)
{
    unsigned char *area = pages(1);
    if (mprotect(area, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
        refused("mprotect");
    /* MOV EAX, 0; RET, with the number where it is written at once. */
    unsigned char *code = area + 64 * below(&seed, 60) + 3;
    memcpy(code, "\xb8\0\0\0\0\xc3", 6);
    shared.said = 0;
    shared.over = false;
    pthread_t caller = start(call_on, code);
    for (uint32_t i = 1; i < 200; i++) {
        __atomic_store_n((uint32_t *)(code + 1), i, __ATOMIC_RELEASE);
        __atomic_store_n(&shared.said, i, __ATOMIC_RELEASE);
        for (u64 wait = below(&seed, 500); wait > 0; wait--)
            __asm__ volatile("pause");
        if (below(&seed, 8) == 0)
            sched_yield();
    }
    __atomic_store_n(&shared.over, true, __ATOMIC_RELEASE);
    pthread_join(caller, NULL);
    unmap(area, 1);
}

static u64 monotonic(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (u64)time.tv_sec * 1000000000 + (u64)time.tv_nsec;
}

/* RDTSCP waits for the loads before it, RDTSC only behind an LFENCE: SDM (2024-12) Vol. 2B "RDTSC", "RDTSCP". */
static u64 counter(void)
{
    u64 low, high;
    __asm__ volatile("rdtscp" : "=a"(low), "=d"(high) : : "rcx", "memory");
    return high << 32 | low;
}

static u64 fenced_counter(void)
{
    u64 low, high;
    __asm__ volatile("lfence\nrdtsc" : "=a"(low), "=d"(high) : : "memory");
    return high << 32 | low;
}

static const struct {
    const char *what;
    u64 (*read)(void);
} clocks[] = {
    {"CLOCK_MONOTONIC after another thread has said it", monotonic},
    {"RDTSCP after another thread has said it", counter},
    {"LFENCE and RDTSC after another thread has said it", fenced_counter},
};
#define CLOCKS (sizeof clocks / sizeof *clocks)

/* What each thread has seen last of each clock, in a line of its own. */
static struct {
    u64 seen[CLOCKS];
} __attribute__((aligned(64))) times[THREADS];

static pthread_barrier_t gathered;

static void *look_at_clocks(void *argument)
{
    u64 number = (u64)argument, other = (number + 1) % THREADS;
    for (size_t clock = 0; clock < CLOCKS; clock++) {
        /* Long enough for the others to come to their processors. */
        for (int turn = 0; turn < 20000; turn++) {
            u64 said = __atomic_load_n(&times[other].seen[clock], __ATOMIC_ACQUIRE);
            u64 time = clocks[clock].read();
            if (time < said) {
                wrong(clocks[clock].what, number, time, said);
                break;
            }
            __atomic_store_n(&times[number].seen[clock], time, __ATOMIC_RELEASE);
        }
        pthread_barrier_wait(&gathered);
    }
    return NULL;
}

/* No thread sees a time before one that another has seen: there is one clock, whatever the processor. */
void one_clock(u64 seed)
{
    (void)seed;
    pthread_t threads[THREADS];
    memset(times, 0, sizeof times);
    pthread_barrier_init(&gathered, NULL, THREADS);
    for (u64 i = 0; i < THREADS; i++)
        threads[i] = start(look_at_clocks, (void *)i);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

/* Square roots, each of the one before: some 500 cycles that RDTSCP has to wait for, and RDTSC alone would not. */
void counter_waits(u64 seed)
{
    enum { LEAST = 150 };
    double number = 1.0 + (double)below(&seed, 1000);
    u64 least = ~0ul;
    for (int round = 0; round < 500; round++) {
        u64 before = fenced_counter();
        __asm__ volatile("lfence\n.rept 40\nsqrtsd %0, %0\n.endr" : "+x"(number));
        u64 passed = counter() - before;
        if (passed < least)
            least = passed;
    }
    if (least < LEAST)
        wrong("ticks that RDTSCP waited", 0, least, LEAST);
}
