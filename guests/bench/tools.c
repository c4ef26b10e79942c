/* Items that are ordinary programs: busybox over data that is made here, the same on every machine. */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PATH_SIZE = 512, OUTPUT = 1 << 16 };

static const char *const WORDS[] = {
    "page",  "frame", "trace", "probe", "shadow", "guest", "host",  "ring",   "clock", "timer", "queue",
    "table", "entry", "fault", "mode",  "port",   "byte",  "block", "chain",  "exit",  "call",  "return",
};
#define WORD_COUNT (sizeof WORDS / sizeof *WORDS)

static void path_of(char *path, const struct places *places, const char *name)
{
    if (snprintf(path, PATH_SIZE, "%s/%s", places->folder, name) >= PATH_SIZE)
        die("the folder's name is too long");
}

static FILE *create(const struct places *places, const char *name)
{
    char path[PATH_SIZE];
    path_of(path, places, name);
    FILE *file = fopen(path, "w");
    if (file == NULL)
        die(path);
    return file;
}

/* Run busybox with stdin from a made file and stdout to another; its own start is part of the time, as in life. */
static void busybox(const struct places *places, const char *from, const char *to, char *const words[])
{
    char source[PATH_SIZE], target[PATH_SIZE];
    path_of(source, places, from);
    path_of(target, places, to);
    pid_t child = fork();
    if (child < 0)
        die("busybox: fork");
    if (child == 0) {
        int in = open(source, O_RDONLY), out = open(target, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        char *const environment[] = {"LC_ALL=C", NULL};
        if (in < 0 || out < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0)
            _exit(126);
        execve(places->busybox, words, environment);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) {
        printf("BENCH-FAILED busybox %s: wait status %#x\n", words[1], (unsigned)status);
        fflush(stdout);
        die("busybox");
    }
}

static uint64_t checksum_of(const struct places *places, const char *name)
{
    static unsigned char buffer[OUTPUT];
    char path[PATH_SIZE];
    path_of(path, places, name);
    int file = open(path, O_RDONLY);
    if (file < 0)
        die(path);
    uint64_t checksum = FOLD_START;
    ssize_t got;
    while ((got = read(file, buffer, sizeof buffer)) > 0)
        checksum = fold(checksum, buffer, (uint64_t)got);
    close(file);
    return checksum;
}

static uint64_t timed(const struct places *places, const char *from, char *const words[])
{
    clock_start();
    busybox(places, from, "output", words);
    clock_stop();
    return checksum_of(places, "output");
}

void make_data(const struct places *places)
{
    uint64_t state = 521288629;
    FILE *text = create(places, "text");
    for (int line = 0; line < 40000; line++) {
        fprintf(text, "%llu", (unsigned long long)(next_random(&state) % 1000000));
        for (int word = 0; word < 6; word++)
            fprintf(text, " %s", WORDS[next_random(&state) % WORD_COUNT]);
        fputc('\n', text);
    }
    fclose(text);

    FILE *noise = create(places, "noise");
    for (int i = 0; i < 12 * 1024 * 1024 / 8; i++) {
        uint64_t value = next_random(&state);
        fwrite(&value, sizeof value, 1, noise);
    }
    fclose(noise);

    busybox(places, "text", "text.bz2", (char *const[]){"busybox", "bzip2", "-c", NULL});
}

void remove_data(const struct places *places)
{
    static const char *const names[] = {"text", "text.bz2", "noise", "output"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[PATH_SIZE];
        path_of(path, places, names[i]);
        unlink(path);
    }
}

uint64_t busybox_sha256sum(const struct places *places)
{
    return timed(places, "noise", (char *const[]){"busybox", "sha256sum", NULL});
}

uint64_t busybox_gzip(const struct places *places)
{
    return timed(places, "text", (char *const[]){"busybox", "gzip", "-c", NULL});
}

uint64_t busybox_bunzip2(const struct places *places)
{
    return timed(places, "text.bz2", (char *const[]){"busybox", "bzip2", "-d", "-c", NULL});
}

uint64_t busybox_awk(const struct places *places)
{
    static char program[] = "{ sum += $1 * 0.5; for (i = 2; i <= NF; i++) seen[$i]++ }"
                            "END { print sum; n = 0; for (word in seen) n += seen[word] * length(word); print n }";
    return timed(places, "text", (char *const[]){"busybox", "awk", program, NULL});
}

uint64_t busybox_sort(const struct places *places)
{
    return timed(places, "text", (char *const[]){"busybox", "sort", NULL});
}
