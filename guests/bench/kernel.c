/* Items that are the kernel's work: entering it, making processes, switching between them, giving memory. */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

uint64_t null_syscall(const struct places *places)
{
    (void)places;
    uint64_t checksum = 0;
    clock_start();
    for (int i = 0; i < 400000; i++)
        checksum += (uint64_t)(syscall(SYS_getppid) >= 0);
    clock_stop();
    return checksum;
}

uint64_t fork_exec_wait(const struct places *places)
{
    uint64_t checksum = 0;
    clock_start();
    for (int i = 0; i < 150; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork-exec-wait: fork");
        if (child == 0) {
            execl(places->self, places->self, "true", (char *)NULL);
            _exit(127);
        }
        int status;
        if (waitpid(child, &status, 0) != child || status != 0)
            die("fork-exec-wait: the child failed");
        checksum++;
    }
    clock_stop();
    return checksum;
}

uint64_t pipe_ping_pong(const struct places *places)
{
    (void)places;
    enum { TRIPS = 15000 };
    int there[2], back[2];
    if (pipe(there) != 0 || pipe(back) != 0)
        die("pipe-ping-pong: pipe");
    pid_t child = fork();
    if (child < 0)
        die("pipe-ping-pong: fork");
    uint32_t ball;
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &ball, sizeof ball) == sizeof ball) {
            ball = ball * 3 + 1;
            if (write(back[1], &ball, sizeof ball) != sizeof ball)
                break;
        }
        _exit(0);
    }
    ball = 1;
    clock_start();
    for (int i = 0; i < TRIPS; i++)
        if (write(there[1], &ball, sizeof ball) != sizeof ball || read(back[0], &ball, sizeof ball) != sizeof ball)
            die("pipe-ping-pong: the ball is lost");
    clock_stop();
    close(there[0]);
    close(there[1]);
    close(back[0]);
    close(back[1]);
    waitpid(child, NULL, 0);
    return ball;
}

uint64_t page_fault_touch(const struct places *places)
{
    (void)places;
    const size_t size = 64u * 1024 * 1024, page = 4096;
    uint64_t checksum = 0;
    for (int round = 0; round < 6; round++) {
        unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            die("page-fault-touch: mmap");
        /* One fault a page, whatever the machine thinks of huge pages. */
        madvise(memory, size, MADV_NOHUGEPAGE);
        clock_start();
        for (size_t at = 0; at < size; at += page)
            memory[at] = (unsigned char)(at >> 12) | 1;
        clock_stop();
        for (size_t at = 0; at < size; at += page)
            checksum = checksum * 31 + memory[at];
        munmap(memory, size);
    }
    return checksum;
}
