/* The kernel's own latencies, each measured as lmbench's lat_* measures it (McVoy and Staelin 1996, sections 6.3 to 6.8):
 * the least work that a program can ask for, many times over, on one processor. `SYSTEM name nanoseconds times checksum`
 * for each round; what is computed is the same on every engine. */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096 };

/* What an item asks for `times` times; returns a checksum. Who has more to do than what is measured says in
 * `passed` how long that took; else all of it counts. */
typedef uint64_t system_function(uint64_t times, const struct places *places, int64_t *passed);

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static uint64_t null_call(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++)
        sum += syscall(SYS_getppid) >= 0;
    return sum;
}

static uint64_t read_zero(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    int zero = open("/dev/zero", O_RDONLY);
    uint64_t sum = 0;
    char byte;
    for (uint64_t i = 0; i < times; i++)
        sum += (uint64_t)read(zero, &byte, 1);
    close(zero);
    return sum;
}

static uint64_t write_null(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    int null = open("/dev/null", O_WRONLY);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++)
        sum += (uint64_t)write(null, "x", 1);
    close(null);
    return sum;
}

static uint64_t stat_file(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)passed;
    struct stat about;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++)
        sum += stat(places->self, &about) == 0;
    return sum;
}

static uint64_t open_close(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)passed;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++) {
        int file = open(places->self, O_RDONLY);
        sum += file >= 0 && close(file) == 0;
    }
    return sum;
}

static volatile sig_atomic_t caught;

static void count(int number)
{
    caught += number == SIGUSR1;
}

static uint64_t signal_install(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    struct sigaction action = {.sa_handler = count};
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++)
        sum += sigaction(SIGUSR1, &action, NULL) == 0;
    return sum;
}

static uint64_t signal_catch(uint64_t times, const struct places *places, int64_t *passed)
{
    signal_install(1, places, passed);
    pid_t self = getpid();
    caught = 0;
    for (uint64_t i = 0; i < times; i++)
        kill(self, SIGUSR1);
    return (uint64_t)caught;
}

static void step_over(int number, siginfo_t *about, void *context)
{
    (void)about;
    caught += number == SIGSEGV;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 3; /* movb $0, (%rdi) */
}

static uint64_t signal_fault(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    struct sigaction action = {.sa_sigaction = step_over, .sa_flags = SA_SIGINFO}, before;
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        die("signal-fault: mmap");
    sigaction(SIGSEGV, &action, &before);
    caught = 0;
    for (uint64_t i = 0; i < times; i++)
        __asm__ volatile(".byte 0xc6, 0x07, 0x00" ::"D"(page) : "memory");
    sigaction(SIGSEGV, &before, NULL);
    munmap(page, PAGE);
    return (uint64_t)caught;
}

/* A ball goes to another process and back. */
static uint64_t ping_pong(uint64_t times, int ours[2], int theirs[2], int64_t *passed)
{
    uint32_t ball = 1;
    pid_t child = fork();
    if (child < 0)
        die("ping-pong: fork");
    if (child == 0) {
        close(ours[0]);
        close(ours[1]);
        while (read(theirs[0], &ball, sizeof ball) == sizeof ball) {
            ball = ball * 3 + 1;
            if (write(theirs[1], &ball, sizeof ball) != sizeof ball)
                break;
        }
        _exit(0);
    }
    close(theirs[0]);
    if (theirs[1] != theirs[0])
        close(theirs[1]);
    int64_t began = now();
    for (uint64_t i = 0; i < times; i++)
        if (write(ours[1], &ball, sizeof ball) != sizeof ball || read(ours[0], &ball, sizeof ball) != sizeof ball)
            die("ping-pong: the ball is lost");
    *passed = now() - began;
    close(ours[1]);
    if (ours[0] != ours[1])
        close(ours[0]);
    waitpid(child, NULL, 0);
    return ball;
}

static uint64_t pipe_trip(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    int there[2], back[2];
    if (pipe(there) != 0 || pipe(back) != 0)
        die("pipe");
    return ping_pong(times, (int[2]){back[0], there[1]}, (int[2]){there[0], back[1]}, passed);
}

static uint64_t unix_trip(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0)
        die("unix: socketpair");
    return ping_pong(times, (int[2]){ends[0], ends[0]}, (int[2]){ends[1], ends[1]}, passed);
}

enum { MOST_PROCESSES = 8 };

/* What a process of the ring does whenever the token comes: it looks at its own data. */
static uint64_t look_at(const uint64_t *data, size_t size)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < size / sizeof *data; i++)
        sum += data[i];
    return sum;
}

/* A token goes round a ring of processes, through pipes. What the pipe and the data cost without a switch is measured in
 * one process and taken off, as lat_ctx does. */
static uint64_t context_switch(uint64_t times, int processes, size_t size, int64_t *passed)
{
    int pipes[MOST_PROCESSES][2];
    uint64_t token = 0, *data = malloc(size + sizeof *data);
    if (data == NULL)
        die("context switch: malloc");
    memset(data, 1, size);
    for (int i = 0; i < processes; i++)
        if (pipe(pipes[i]) != 0)
            die("context switch: pipe");
    int64_t began = now();
    for (uint64_t i = 0; i < times; i++) {
        if (write(pipes[0][1], &token, sizeof token) != sizeof token ||
            read(pipes[0][0], &token, sizeof token) != sizeof token)
            die("context switch: pipe");
        token += look_at(data, size) != 1;
    }
    int64_t alone = now() - began;
    token = 0;
    pid_t children[MOST_PROCESSES];
    for (int i = 1; i < processes; i++) {
        children[i] = fork();
        if (children[i] < 0)
            die("context switch: fork");
        if (children[i] == 0) {
            memset(data, 1, size);
            while (read(pipes[i][0], &token, sizeof token) == sizeof token) {
                token += look_at(data, size) != 1;
                if (write(pipes[(i + 1) % processes][1], &token, sizeof token) != sizeof token || token >= times)
                    break;
            }
            _exit(0);
        }
    }
    /* Until the ring has taken the token on `times` times: the data is no 1, so each process adds one. */
    began = now();
    while (token < times) {
        if (write(pipes[1][1], &token, sizeof token) != sizeof token ||
            read(pipes[0][0], &token, sizeof token) != sizeof token)
            die("context switch: the token is lost");
        token += look_at(data, size) != 1;
    }
    *passed = now() - began - alone;
    for (int i = 1; i < processes; i++)
        kill(children[i], SIGKILL);
    for (int i = 1; i < processes; i++)
        waitpid(children[i], NULL, 0);
    for (int i = 0; i < processes; i++) {
        close(pipes[i][0]);
        close(pipes[i][1]);
    }
    free(data);
    return token;
}

static uint64_t switch_two(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places;
    return context_switch(times, 2, 0, passed);
}

static uint64_t switch_eight(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places;
    return context_switch(times, 8, 16384, passed);
}

static uint64_t start(uint64_t times, char *const words[])
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork");
        if (child == 0) {
            if (words != NULL)
                execv(words[0], words);
            _exit(words == NULL ? 0 : 127);
        }
        int status;
        sum += waitpid(child, &status, 0) == child && status == 0;
    }
    return sum;
}

static uint64_t fork_exit(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places, (void)passed;
    return start(times, NULL);
}

static uint64_t fork_exec(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)passed;
    return start(times, (char *const[]){(char *)places->self, "true", NULL});
}

/* A file in memory, all of whose pages are there. */
static int file_of(size_t size)
{
    static char page[PAGE];
    int file = memfd_create("bench", 0);
    if (file < 0)
        die("memfd_create");
    for (size_t at = 0; at < size; at += PAGE)
        if (write(file, page, PAGE) != PAGE)
            die("memfd: write");
    return file;
}

static uint64_t map_file(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places;
    const size_t size = 1 << 20;
    int file = file_of(size);
    uint64_t sum = 0;
    int64_t began = now();
    for (uint64_t i = 0; i < times; i++) {
        unsigned char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (at == MAP_FAILED)
            die("mmap");
        for (size_t offset = 0; offset < size; offset += 4 * PAGE)
            sum += ++at[offset];
        munmap(at, size);
    }
    *passed = now() - began;
    close(file);
    return sum;
}

/* A store into each page of new memory, in an order in which nobody reads ahead, and one fault a page. */
static uint64_t page_fault(uint64_t times, const struct places *places, int64_t *passed)
{
    (void)places;
    const size_t pages = 1024;
    uint64_t sum = 0;
    *passed = 0;
    for (uint64_t i = 0; i < times; i += pages) {
        unsigned char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            die("page-fault: mmap");
        madvise(at, pages * PAGE, MADV_NOHUGEPAGE);
        int64_t began = now();
        for (size_t page = 0; page < pages; page++)
            sum += ++at[page * 421 % pages * PAGE];
        *passed += now() - began;
        munmap(at, pages * PAGE);
    }
    return sum;
}

static const struct {
    const char *name;
    system_function *run;
    uint64_t times;
} items[] = {
    {"null-syscall", null_call, 50000},    {"read", read_zero, 30000},           {"write", write_null, 30000},
    {"stat", stat_file, 10000},            {"open-close", open_close, 5000},     {"signal-install", signal_install, 20000},
    {"signal-catch", signal_catch, 5000},  {"signal-fault", signal_fault, 2000}, {"pipe", pipe_trip, 4000},
    {"unix", unix_trip, 3000},             {"switch-2p-0k", switch_two, 6000},   {"switch-8p-16k", switch_eight, 3000},
    {"fork", fork_exit, 100},              {"exec", fork_exec, 60},              {"mmap", map_file, 60},
    {"page-fault", page_fault, 4096},
};

void run_system(const struct places *places, unsigned rounds, const char *only)
{
    clock_start();
    int64_t began = now();
    for (size_t index = 0; index < sizeof items / sizeof *items; index++) {
        if (only != NULL && strcmp(only, items[index].name) != 0)
            continue;
        int64_t passed;
        items[index].run(items[index].times / 8 + 1, places, &passed); /* not the first time that counts */
        for (unsigned round = 0; round < rounds; round++) {
            passed = -1;
            int64_t before = now();
            uint64_t checksum = items[index].run(items[index].times, places, &passed);
            if (passed < 0)
                passed = now() - before;
            printf("SYSTEM %s %lld %llu %016llx\n", items[index].name, (long long)(passed < 1 ? 1 : passed),
                   (unsigned long long)items[index].times, (unsigned long long)checksum);
            fflush(stdout);
        }
    }
    int64_t passed = now() - began;
    clock_stop();
    printf("SYSTEM-CLOCK %lld\nPASS\n", (long long)passed);
    fflush(stdout);
}
