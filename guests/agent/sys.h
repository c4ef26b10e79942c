/*
 * The Linux system calls that the agent uses, made directly: the agent has no C library, so that it stays near
 * 10 KiB and starts in microseconds. Numbers and structures are those of the x86-64 kernel's user ABI
 * (arch/x86/entry/syscalls/syscall_64.tbl and include/uapi, Linux 6.1); every wrapper returns -errno on failure.
 */
#ifndef RINGZERO_SYS_H
#define RINGZERO_SYS_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef unsigned long usize;

static inline long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define SYS(number, a, b, c, d, e) syscall6((number), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

#define EINTR 4
#define EAGAIN 11
#define E2BIG 7
#define ENOENT 2
#define EACCES 13
#define EINVAL 22
#define ENOTDIR 20
#define ENOEXEC 8

#define EIO 5
#define EEXIST 17
#define EISDIR 21
#define ENOTTY 25
#define EPIPE 32
#define ENAMETOOLONG 36
#define ENOSYS 38
#define ELOOP 40
#define EBADMSG 74

#define O_RDONLY 0
#define O_WRONLY 1
#define O_RDWR 2
#define O_CREAT 0100
#define O_EXCL 0200
#define O_NOCTTY 0400
#define O_TRUNC 01000
#define O_PATH 010000000
#define O_DIRECTORY 0200000
#define O_NOFOLLOW 0400000
#define O_NONBLOCK 04000
#define O_CLOEXEC 02000000

#define SIGHUP 1
#define SIGINT 2
#define SIGKILL 9
#define SIGUSR1 10
#define SIGUSR2 12
#define SIGPIPE 13
#define SIGTERM 15
#define SIGCHLD 17
#define SIG_BLOCK 0
#define SIG_SETMASK 2
#define WNOHANG 1

#define POLLIN 1
#define POLLOUT 4
#define POLLERR 8
#define POLLHUP 16

#define TCGETS 0x5401
#define TCSETS 0x5402
#define TCSBRK 0x5409
#define TCFLSH 0x540b
#define TIOCSCTTY 0x540e
#define TIOCSWINSZ 0x5414
#define FIONREAD 0x541b
#define TIOCSPTLCK 0x40045431
#define TIOCGPTN 0x80045430

#define REBOOT_MAGIC1 0xfee1deadL
#define REBOOT_MAGIC2 672274793L
#define REBOOT_POWER_OFF 0x4321fedcL
#define REBOOT_RESTART 0x01234567L
#define REBOOT_HALT 0xcdef0123L

#define AF_VSOCK 40
#define AT_FDCWD -100
#define AT_SYMLINK_NOFOLLOW 0x100
#define S_IFMT 0170000
#define S_IFLNK 0120000
#define S_IFREG 0100000
#define S_IFDIR 0040000
#define UTIME_NOW 0x3fffffff

struct timespec {
    long seconds, nanoseconds;
};

/* struct stat of arch/x86/include/uapi/asm/stat.h */
struct stat {
    u64 dev, ino, nlink;
    u32 mode, uid, gid, pad;
    u64 rdev;
    long size, blksize, blocks;
    struct timespec atime, mtime, ctime;
    long unused[3];
};

/* struct linux_dirent64: `name` ends with a NUL, `size` is that of the whole record. */
struct dirent {
    u64 ino;
    long offset;
    u16 size;
    u8 type;
    char name[];
};

struct pollfd {
    int fd;
    short events, revents;
};

struct termios {
    u32 iflag, oflag, cflag, lflag;
    u8 line, cc[19];
};

struct winsize {
    u16 rows, columns, xpixel, ypixel;
};

static inline long sys_read(int fd, void *data, usize size) { return SYS(0, fd, data, size, 0, 0); }
static inline long sys_write(int fd, const void *data, usize size) { return SYS(1, fd, data, size, 0, 0); }
static inline long sys_open(const char *path, int flags) { return SYS(2, path, flags, 0, 0, 0); }
static inline long sys_close(int fd) { return SYS(3, fd, 0, 0, 0, 0); }
static inline long sys_poll(struct pollfd *list, long count, int ms) { return SYS(7, list, count, ms, 0, 0); }
static inline long sys_mask(int how, const u64 *set) { return SYS(14, how, set, 0, 8, 0); }
static inline long sys_ioctl(int fd, long request, void *argument) { return SYS(16, fd, request, argument, 0, 0); }
static inline long sys_dup2(int from, int to) { return SYS(33, from, to, 0, 0, 0); }
static inline long sys_fork(void) { return SYS(56, SIGCHLD, 0, 0, 0, 0); }
static inline long sys_execve(const char *path, char **argv, char **env) { return SYS(59, path, argv, env, 0, 0); }
static inline void sys_exit(int status) { for (;;) SYS(231, status, 0, 0, 0, 0); }
static inline long sys_wait(int pid, int *status, int options) { return SYS(61, pid, status, options, 0, 0); }
static inline long sys_kill(int pid, int number) { return SYS(62, pid, number, 0, 0, 0); }
static inline void sys_close_from(int first)
{
    if (SYS(436 /* close_range, Linux 5.9 */, first, ~0u, 0, 0, 0) < 0)
        for (int fd = first; fd < 1024; fd++)
            sys_close(fd);
}
static inline long sys_getpid(void) { return SYS(39, 0, 0, 0, 0, 0); }
static inline long sys_ftruncate(int fd, long size) { return SYS(77, fd, size, 0, 0, 0); }
static inline long sys_rename(const char *from, const char *to) { return SYS(82, from, to, 0, 0, 0); }
static inline long sys_rmdir(const char *path) { return SYS(84, path, 0, 0, 0, 0); }
static inline long sys_link(const char *from, const char *to) { return SYS(86, from, to, 0, 0, 0); }
static inline long sys_symlink(const char *target, const char *path) { return SYS(88, target, path, 0, 0, 0); }
static inline long sys_readlink(const char *path, char *to, usize size) { return SYS(89, path, to, size, 0, 0); }
static inline long sys_chmod(const char *path, u32 mode) { return SYS(90, path, mode, 0, 0, 0); }
static inline long sys_fchmod(int fd, u32 mode) { return SYS(91, fd, mode, 0, 0, 0); }
static inline long sys_lchown(const char *path, u32 uid, u32 gid) { return SYS(94, path, uid, gid, 0, 0); }
static inline long sys_umask(u32 mask) { return SYS(95, mask, 0, 0, 0, 0); }
static inline long sys_setgroups(long count, const u32 *groups) { return SYS(116, count, groups, 0, 0, 0); }
static inline long sys_setresuid(u32 uid) { return SYS(117, uid, uid, uid, 0, 0); }
static inline long sys_setresgid(u32 gid) { return SYS(119, gid, gid, gid, 0, 0); }
static inline long sys_sigaction(int number, const void *action) { return SYS(13, number, action, 0, 8, 0); }
static inline long sys_getdents(int fd, void *to, usize size) { return SYS(217, fd, to, size, 0, 0); }
static inline long sys_create(const char *path, int flags, u32 mode) { return SYS(2, path, flags, mode, 0, 0); }
static inline long sys_stat_at(const char *path, struct stat *to, int flags) { return SYS(262, AT_FDCWD, path, to, flags, 0); }
static inline long sys_utimens(const char *path, const struct timespec *times, int flags)
{
    return SYS(280, AT_FDCWD, path, times, flags, 0);
}
static inline long sys_getrandom(void *to, usize size) { return SYS(318, to, size, 1 /* GRND_NONBLOCK */, 0, 0); }
static inline long sys_fcntl(int fd, int command, long argument) { return SYS(72, fd, command, argument, 0, 0); }
static inline long sys_chdir(const char *path) { return SYS(80, path, 0, 0, 0, 0); }
static inline long sys_mkdir(const char *path, int mode) { return SYS(83, path, mode, 0, 0, 0); }
static inline long sys_unlink(const char *path) { return SYS(87, path, 0, 0, 0, 0); }
static inline long sys_setsid(void) { return SYS(112, 0, 0, 0, 0, 0); }
static inline long sys_sync(void) { return SYS(162, 0, 0, 0, 0, 0); }
static inline long sys_mount_with(const char *what, const char *where, const char *type, long flags)
{
    return SYS(165, what, where, type, flags, 0);
}
static inline long sys_mount(const char *what, const char *where, const char *type, const char *options)
{
    return SYS(165, what, where, type, 0, options);
}
static inline long sys_reboot(long how) { return SYS(169, REBOOT_MAGIC1, REBOOT_MAGIC2, how, 0, 0); }
static inline long sys_sethostname(const char *name, usize size) { return SYS(170, name, size, 0, 0, 0); }
static inline long sys_signalfd(u64 *set, int flags) { return SYS(289, -1, set, 8, flags, 0); }
static inline long sys_pipe2(int *pair, int flags) { return SYS(293, pair, flags, 0, 0, 0); }
static inline long sys_finit_module(int fd) { return SYS(313, fd, "", 0, 0, 0); }

/* gcc may call these four for copies and comparisons of its own, even without a library. */
void *memcpy(void *to, const void *from, usize size);
void *memmove(void *to, const void *from, usize size);
void *memset(void *to, int value, usize size);
int memcmp(const void *a, const void *b, usize size);

static inline usize length(const char *text)
{
    usize n = 0;
    while (text[n])
        n++;
    return n;
}

#endif
