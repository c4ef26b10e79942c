/* Runs the items one by one and prints `BENCH name nanoseconds checksum` for each. `BENCH-START` and `BENCH-STOP` stand
 * where the clock is read, so that the host can check a guest's clock against its own. As process 1 it powers the
 * machine off at the end; with the argument `poweroff`, at once, which is the guest of the boot benchmark. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    item_function *run;
} items[] = {
    {"integer-loop", integer_loop},
    {"random-updates", random_updates},
    {"recursive-calls", recursive_calls},
    {"dot-product", dot_product},
    {"memset-memcpy", memset_memcpy},
    {"null-syscall", null_syscall},
    {"fork-exec-wait", fork_exec_wait},
    {"pipe-ping-pong", pipe_ping_pong},
    {"page-fault-touch", page_fault_touch},
    {"sha256sum", busybox_sha256sum},
    {"gzip", busybox_gzip},
    {"bzip2-d", busybox_bunzip2},
    {"awk", busybox_awk},
    {"sort", busybox_sort},
};
#define ITEMS (sizeof items / sizeof *items)

static struct timespec started;
static int64_t elapsed;

_Noreturn void die(const char *what)
{
    printf("BENCH-FAILED %s: %s\n", what, strerror(errno));
    fflush(stdout);
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    _exit(1);
}

/* Waits until the line has left the serial port, so that sending it is no part of what is timed. */
static void say(const char *line)
{
    puts(line);
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
}

void clock_start(void)
{
    say("BENCH-START");
    clock_gettime(CLOCK_MONOTONIC, &started);
}

void clock_stop(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    elapsed += (now.tv_sec - started.tv_sec) * 1000000000 + (now.tv_nsec - started.tv_nsec);
    say("BENCH-STOP");
}

uint64_t next_random(uint64_t *state)
{
    /* Marsaglia's xorshift64 with the shifts 13, 7, 17. */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

uint64_t fold(uint64_t hash, const void *data, uint64_t size)
{
    /* FNV-1a, 64 bits. */
    for (const unsigned char *byte = data, *end = byte + size; byte < end; byte++)
        hash = (hash ^ *byte) * 0x100000001b3u;
    return hash;
}

static void run(size_t index, const struct places *places)
{
    elapsed = 0;
    uint64_t checksum = items[index].run(places);
    printf("BENCH %s %lld %016llx\n", items[index].name, (long long)elapsed, (unsigned long long)checksum);
    fflush(stdout);
}

/* The guest has one processor; on the host, stay on one too, so that the pipe's two ends share it alike. */
static void stay_on_one_processor(void)
{
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int cpu = CPU_SETSIZE - 1; cpu >= 0; cpu--)
            if (CPU_ISSET(cpu, &allowed)) {
                CPU_ZERO(&one);
                CPU_SET(cpu, &one);
                sched_setaffinity(0, sizeof one, &one);
                break;
            }
    }
}

static int is_named(const char *name, int count, char **names)
{
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0)
            return 1;
    return 0;
}

/* Runs the named items; all of them when none is named. */
static int run_some(const struct places *places, int count, char **names)
{
    stay_on_one_processor();
    make_data(places);
    for (size_t index = 0; index < ITEMS; index++)
        if (count == 0 || is_named(items[index].name, count, names))
            run(index, places);
    remove_data(places);
    return 0;
}

/* The words are the number of rounds, and the one item to run if not all. */
static int system_items(const struct places *places, int count, char **words)
{
    stay_on_one_processor();
    run_system(places, (unsigned)strtoul(words[0], NULL, 10), count > 1 ? words[1] : NULL);
    return 0;
}

static int as_process_one(int count, char **words)
{
    static const struct places places = {"/init", "/bin/busybox", "/data"};
    say("BENCH-INIT");
    if (count == 1 && strcmp(words[0], "poweroff") == 0)
        reboot(RB_POWER_OFF);
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mkdir("/data", 0755);
    if (count >= 2 && strcmp(words[0], "system") == 0)
        system_items(&places, count - 1, words + 1);
    else if (count == 2 && strcmp(words[0], "programs") == 0)
        run_programs(words[1]);
    else
        run_some(&places, count, words);
    say("BENCH-END");
    reboot(RB_POWER_OFF);
    return 1;
}

int main(int count, char **words)
{
    if (count == 2 && strcmp(words[1], "true") == 0)
        return 0;
    if (getpid() == 1)
        return as_process_one(count - 1, words + 1);
    if (count == 2 && strcmp(words[1], "list") == 0) {
        for (size_t index = 0; index < ITEMS; index++)
            puts(items[index].name);
        return 0;
    }
    if (count == 3 && strcmp(words[1], "programs") == 0) {
        stay_on_one_processor();
        run_programs(words[2]);
        return 0;
    }
    if (count >= 3 && strcmp(words[1], "system") == 0) {
        struct places places = {words[0], "", ""};
        return system_items(&places, count - 2, words + 2);
    }
    if (count == 3 && strcmp(words[1], "nano") == 0)
        return nano((unsigned)strtoul(words[2], NULL, 10));
    if (count == 6 && strcmp(words[1], "files") == 0) {
        run_files(words[2], (unsigned)strtoul(words[3], NULL, 10), (unsigned)strtoul(words[4], NULL, 10),
                  strtoull(words[5], NULL, 10));
        return 0;
    }
    if (count == 4 && strcmp(words[1], "all") == 0) {
        struct places places = {words[0], words[2], words[3]};
        return run_some(&places, 0, NULL);
    }
    fprintf(stderr, "usage: %s all BUSYBOX FOLDER | nano ROUNDS | system ROUNDS [ITEM] | programs FOLDER | files FOLDER FILES READS SEED | list | true\n", words[0]);
    return 2;
}
