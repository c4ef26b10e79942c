/* Stacks, pipes between processes, and other programs in the same address space or at the same addresses. */
#define _GNU_SOURCE
#include "torture.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FRAME 40

static __attribute__((noinline)) void recurse(u64 depth, u64 seed)
{
    volatile u64 local[FRAME];
    for (size_t i = 0; i < FRAME; i++)
        local[i] = seed * i + depth;
    if (depth > 0)
        recurse(depth - 1, seed);
    for (size_t i = 0; i < FRAME; i++)
        if (local[i] != seed * i + depth)
            wrong("frame", (u64)&local[i], local[i], seed * i + depth);
}

void deep_stacks(u64 seed)
{
    recurse(50 + below(&seed, 3000), seed);
    /* On the stack of a child, which is a copy. */
    int child = fork();
    if (child == 0) {
        recurse(50 + below(&seed, 1000), seed);
        _exit(4);
    }
    recurse(50 + below(&seed, 1000), ~seed);
    expect_status(child, 4, "status of a child that recurses");
}

static void write_all(int to, const unsigned char *data, size_t size)
{
    while (size > 0) {
        ssize_t done = write(to, data, size);
        if (done <= 0)
            _exit(1);
        data += done;
        size -= (size_t)done;
    }
}

#define PIECE 3000
#define PIECES 40

static unsigned char byte_of(u64 place, u64 seed)
{
    return (unsigned char)(place * 7 + (place >> 8) + seed);
}

void pipes(u64 seed)
{
    int first[2], second[2];
    if (pipe(first) != 0 || pipe(second) != 0)
        refused("pipe");
    int writer = fork();
    if (writer == 0) {
        unsigned char data[PIECE];
        for (u64 place = 0; place < PIECE * PIECES;) {
            for (size_t i = 0; i < PIECE; i++)
                data[i] = byte_of(place++, seed);
            write_all(first[1], data, PIECE);
        }
        _exit(6);
    }
    int copier = fork();
    if (copier == 0) {
        close(first[1]);
        unsigned char data[5000];
        ssize_t size;
        while ((size = read(first[0], data, 1 + below(&seed, sizeof data))) > 0)
            write_all(second[1], data, (size_t)size);
        _exit(7);
    }
    close(first[0]);
    close(first[1]);
    close(second[1]);
    unsigned char data[4096];
    u64 place = 0;
    bool good = true;
    for (ssize_t size; (size = read(second[0], data, sizeof data)) > 0;)
        for (ssize_t i = 0; i < size; i++, place++)
            if (good && data[i] != byte_of(place, seed)) {
                wrong("byte through two pipes", place, data[i], byte_of(place, seed));
                good = false;
            }
    if (place != PIECE * PIECES)
        wrong("bytes through two pipes", 0, place, PIECE * PIECES);
    close(second[0]);
    expect_status(writer, 6, "status of a writer");
    expect_status(copier, 7, "status of a copier");
}

/* A program that lies beside this one. */
static const char *beside(const char *name)
{
    static char path[512];
    ssize_t size = readlink("/proc/self/exe", path, sizeof path - 32);
    if (size <= 0)
        refused("readlink of /proc/self/exe");
    path[size] = 0;
    char *slash = strrchr(path, '/');
    strcpy(slash + 1, name);
    return path;
}

/* The child of vfork borrows this very stack, so nothing else happens here. */
static __attribute__((noinline)) int start_program(const char *path, char *const *words, bool borrow)
{
    int child = borrow ? vfork() : fork();
    if (child == 0) {
        execv(path, words);
        _exit(255);
    }
    return child;
}

/* This program again, at another address (it is position independent): it ends with the status it is told. */
void other_programs(u64 seed)
{
    for (int round = 0; round < 3; round++) {
        int status = 1 + (int)below(&seed, 200);
        char word[16];
        snprintf(word, sizeof word, "%d", status);
        char *words[] = {"torture", "status", word, NULL};
        expect_status(start_program("/proc/self/exe", words, round % 2), status, "status of this program again");
    }
}

/* Two programs that have the same functions and data at the same addresses, with other contents: twin.c. */
void same_place_other_program(u64 seed)
{
    enum { CHILDREN = 6 };
    static char names[2][8] = {"twin-1", "twin-2"};
    int children[CHILDREN], statuses[CHILDREN];
    for (size_t i = 0; i < CHILDREN; i++) {
        size_t which = below(&seed, 2);
        char *words[] = {names[which], NULL};
        statuses[i] = (int)which + 1;
        children[i] = start_program(beside(names[which]), words, below(&seed, 2));
    }
    for (size_t i = 0; i < CHILDREN; i++)
        expect_status(children[i], statuses[i], "which of two programs it was");
}
