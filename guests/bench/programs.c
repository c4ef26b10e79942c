/* Programs of Debian's, each run to its end: what to run is in the file `programs` of a folder, one a line, its fields
 * between tabs: name, kind, the file that is its standard input or "-", and its words.
 *
 * `PROGRAM name nanoseconds 1 checksum` is said of each. Kind `sum`: the checksum is of all that it printed. `crc`: only of
 * the lines that name a CRC, because the others hold times. `speed`: it measures itself, and its lines that begin with
 * "+F" are passed on behind `PROGRAM-TOLD name`. */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_WORDS = 32, OUTPUT_SIZE = 1 << 22 };

static char output[OUTPUT_SIZE + 1];

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Runs it with standard output into the file `output`, and returns how long that took. */
static int64_t run_one(const char *name, const char *from, char *const words[])
{
    static char *const environment[] = {"LC_ALL=C", "PATH=/usr/bin:/bin", "OPENSSL_CONF=/dev/null", "PYTHONHASHSEED=0",
                                        "PYTHONDONTWRITEBYTECODE=1", NULL};
    int64_t began = now();
    pid_t child = fork();
    if (child < 0)
        die("programs: fork");
    if (child == 0) {
        int in = open(strcmp(from, "-") == 0 ? "/dev/null" : from, O_RDONLY);
        int out = open("output", O_WRONLY | O_CREAT | O_TRUNC, 0600), said = open("errors", O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (in < 0 || out < 0 || said < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(said, 2) < 0)
            _exit(126);
        execve(words[0], words, environment);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) {
        FILE *said = fopen("errors", "r");
        if (said == NULL || fgets(output, 200, said) == NULL)
            strcpy(output, "nothing\n");
        printf("BENCH-FAILED %s: wait status %#x; it said %s", name, (unsigned)status, output);
        fflush(stdout);
        die(name);
    }
    return now() - began;
}

static uint64_t read_output(const char *name, const char *kind)
{
    int file = open("output", O_RDONLY);
    size_t size = 0;
    ssize_t got;
    while (file >= 0 && size < OUTPUT_SIZE && (got = read(file, output + size, OUTPUT_SIZE - size)) > 0)
        size += (size_t)got;
    close(file);
    output[size] = 0;
    if (strcmp(kind, "sum") == 0)
        return fold(FOLD_START, output, size);
    uint64_t checksum = FOLD_START;
    for (char *line = strtok(output, "\n"); line != NULL; line = strtok(NULL, "\n"))
        if (strcmp(kind, "crc") == 0 && strstr(line, "crc") != NULL)
            checksum = fold(checksum, line, strlen(line));
        else if (strcmp(kind, "speed") == 0 && strncmp(line, "+F", 2) == 0)
            printf("PROGRAM-TOLD %s %s\n", name, line);
    return checksum;
}

void run_programs(const char *folder)
{
    static char line[4096];
    if (chdir(folder) != 0)
        die(folder);
    FILE *list = fopen("programs", "r");
    if (list == NULL)
        die("programs: no list");
    clock_start();
    int64_t began = now();
    while (fgets(line, sizeof line, list) != NULL) {
        char *words[MOST_WORDS + 1] = {0}, *rest = line;
        line[strcspn(line, "\n")] = 0;
        for (int i = 0; i < MOST_WORDS && rest != NULL; i++)
            words[i] = strsep(&rest, "\t");
        if (words[3] == NULL)
            die("programs: a line is too short");
        int64_t passed = run_one(words[0], words[2], words + 3);
        uint64_t checksum = read_output(words[0], words[1]);
        printf("PROGRAM %s %lld 1 %016llx\n", words[0], (long long)passed, (unsigned long long)checksum);
        fflush(stdout);
    }
    int64_t passed = now() - began;
    fclose(list);
    clock_stop();
    printf("PROGRAM-CLOCK %lld\nPASS\n", (long long)passed);
    fflush(stdout);
}
