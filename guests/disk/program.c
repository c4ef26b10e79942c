/* disk bench DISK ROUNDS MIB OPERATIONS [ITEM]   how fast DISK is read and written: MIB in sequence, OPERATIONS at random
 * disk records DISK SEED                         write records for ever, and say which are on the disk
 * disk check DISK SEED RECORDS                   whether the first RECORDS records are there
 *
 * As /init it loads /modules/0, /modules/1 and so on, and powers the machine off at the end. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { MODULES = 32, PATH = 64, LOOKS = 500 };

_Noreturn static void leave(int status)
{
    fflush(stdout);
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    _exit(status);
}

_Noreturn void die(const char *what)
{
    printf("FAIL %s: %s\n", what, strerror(errno));
    leave(1);
}

void say(const char *format, ...)
{
    va_list words;
    va_start(words, format);
    vprintf(format, words);
    va_end(words);
    putchar('\n');
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
}

uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t size_of(int disk)
{
    uint64_t size;
    struct stat facts;
    if (ioctl(disk, BLKGETSIZE64, &size) == 0)
        return size;
    if (fstat(disk, &facts) != 0)
        die("fstat");
    return (uint64_t)facts.st_size;
}

static void load_modules(void)
{
    for (int number = 0; number < MODULES; number++) {
        char path[PATH];
        snprintf(path, sizeof path, "/modules/%d", number);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0)
            return;
        if (syscall(SYS_finit_module, file, "", 0) != 0)
            die(path);
        close(file);
    }
}

/* A driver finds its devices after it has been loaded. */
static void wait_for(const char *path)
{
    for (int look = 0; access(path, F_OK) != 0; look++) {
        if (look == LOOKS)
            die(path);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}

static uint64_t number(const char *word)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(word, &end, 0);
    if (errno != 0 || end == word || *end != 0) {
        errno = EINVAL;
        die(word);
    }
    return value;
}

int main(int count, char **words)
{
    if (getpid() == 1) {
        mkdir("/dev", 0755);
        mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
        load_modules();
        if (count > 2)
            wait_for(words[2]);
    }
    const char *what = count > 1 ? words[1] : "";
    if ((count == 6 || count == 7) && strcmp(what, "bench") == 0)
        bench(words[2], (unsigned)number(words[3]), (unsigned)number(words[4]), (unsigned)number(words[5]), words[6]);
    else if (count == 4 && strcmp(what, "records") == 0)
        write_records(words[2], number(words[3]));
    else if (count == 5 && strcmp(what, "check") == 0)
        check_records(words[2], number(words[3]), number(words[4]));
    else {
        fprintf(stderr, "usage: %s bench DISK ROUNDS MIB OPERATIONS [ITEM] | records DISK SEED | check DISK SEED RECORDS\n",
                words[0]);
        leave(2);
    }
    say("PASS");
    leave(0);
}
