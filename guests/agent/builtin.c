/*
 * What a child of the agent does itself for EXEC with FLAG_BUILTIN: files of the guest, without a program of the guest.
 * argv[0] is a word of the table below. The exit status is 0 or an errno; standard error then names the path it is about.
 *
 *     read PATH                     the file's bytes, to standard output
 *     write PATH MODE SIZE          standard input, of SIZE bytes, to a file that appears whole or not at all; MODE is octal,
 *                                   or - for that of the file it replaces
 *     get PATH, put PATH            a tree as a tar archive (tar_out.c, tar_in.c)
 *     stat PATH, lstat PATH         decimal words: mode ino dev nlink uid gid size atime mtime ctime, the times in nanoseconds
 *     list PATH                     for each entry its type (a digit of dirent's), its name, and a NUL
 *     readlink PATH                 what it points to
 *     mkdir PATH MODE, rmdir PATH, unlink PATH, remove PATH (a whole tree), rename FROM TO, link FROM TO,
 *     symlink TARGET PATH, chmod PATH MODE, chown PATH UID GID, utime PATH ATIME MTIME (in nanoseconds)
 */
#include "agent.h"

static u8 buffer[65536];

long write_all(int fd, const void *data, usize size)
{
    const u8 *from = data;
    while (size) {
        long written = sys_write(fd, from, size);
        if (written == -EINTR)
            continue;
        if (written <= 0)
            return written ? written : -EIO;
        from += written;
        size -= (usize)written;
    }
    return 0;
}

long read_exactly(int fd, void *data, usize size)
{
    usize done = 0;
    while (done < size) {
        long got = sys_read(fd, (u8 *)data + done, size - done);
        if (got == -EINTR)
            continue;
        if (got < 0)
            return got;
        if (got == 0)
            break;
        done += (usize)got;
    }
    return (long)done;
}

long builtin_fail(long error, const char *path)
{
    write_all(2, path, length(path));
    return error < 0 ? -error : error;
}

static u64 number_of(const char *text, u32 base)
{
    u64 value = 0;
    for (; *text >= '0' && *text < (char)('0' + base); text++)
        value = value * base + (u64)(*text - '0');
    return value;
}

static long read_file(char **a)
{
    int fd = (int)sys_open(a[1], O_RDONLY | O_CLOEXEC);
    long got = fd;
    while (fd >= 0 && (got = sys_read(fd, buffer, sizeof buffer)) > 0)
        if ((got = write_all(1, buffer, (usize)got)) < 0)
            break;
    return got < 0 ? builtin_fail(got, a[1]) : 0;
}

static long copy_input(int fd, u64 left)
{
    while (left) {
        long got = read_exactly(0, buffer, left < sizeof buffer ? left : sizeof buffer);
        if (got <= 0)
            return got ? got : -EIO;
        long error = write_all(fd, buffer, (usize)got);
        if (error < 0)
            return error;
        left -= (u64)got;
    }
    return 0;
}

/* Where a path leads when it is a link; the path itself otherwise, and when the link leads nowhere. */
const char *followed(const char *path)
{
    static char target[4096];
    char self[] = "/proc/self/fd/\0\0\0\0";
    struct stat s;
    if (sys_stat_at(path, &s, AT_SYMLINK_NOFOLLOW) < 0 || (s.mode & S_IFMT) != S_IFLNK)
        return path;
    int fd = (int)sys_open(path, O_PATH | O_CLOEXEC);
    if (fd < 0)
        return path;
    char *end = self + 14;
    if (fd >= 100)
        *end++ = (char)('0' + fd / 100 % 10);
    if (fd >= 10)
        *end++ = (char)('0' + fd / 10 % 10);
    *end = (char)('0' + fd % 10);
    long size = sys_readlink(self, target, sizeof target - 1);
    sys_close(fd);
    if (size <= 0)
        return path;
    target[size] = 0;
    return target;
}

static long write_file(char **a)
{
    static char temporary[4096 + 16];
    const char *path = followed(a[1]);
    usize size = length(path);
    u64 content = number_of(a[3], 10);
    struct stat before;
    int there = sys_stat_at(path, &before, 0) == 0, by_default = a[2][0] == '-';
    if (size >= 4096)
        return builtin_fail(ENAMETOOLONG, a[1]);
    memcpy(temporary, path, size);
    memcpy(temporary + size, ".ringzero-new", 14);
    int fd = -EEXIST;
    if (!there || (before.mode & S_IFMT) == S_IFREG) {
        sys_unlink(temporary);
        fd = (int)sys_create(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    }
    if (fd < 0 && there) { /* a device, or a folder like those of /proc that takes no new files: written in place */
        long error = fd = (int)sys_open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
        if (fd >= 0)
            error = copy_input(fd, content);
        return error < 0 ? builtin_fail(error, a[1]) : 0;
    }
    if (fd < 0)
        return builtin_fail(fd, a[1]);
    long error = copy_input(fd, content);
    if (error == 0 && there && by_default) {
        sys_lchown(temporary, before.uid, before.gid); /* whoever may not do it keeps it as his own */
        error = sys_fchmod(fd, before.mode & 07777);
    } else if (error == 0 && !by_default)
        error = sys_fchmod(fd, (u32)number_of(a[2], 8));
    sys_close(fd);
    if (error == 0)
        error = sys_rename(temporary, path);
    if (error == 0)
        return 0;
    sys_unlink(temporary);
    return builtin_fail(error, a[1]);
}

static char *put_number(char *at, u64 value)
{
    char digits[20];
    int count = 0;
    do
        digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count)
        *at++ = digits[--count];
    *at++ = ' ';
    return at;
}

static char *put_time(char *at, const struct timespec *time)
{
    long all = time->seconds * 1000000000 + time->nanoseconds; /* until the year 2262 */
    if (all < 0)
        *at++ = '-';
    return put_number(at, (u64)(all < 0 ? -all : all));
}

static long stat_file(char **a)
{
    struct stat s;
    char text[256], *end = text;
    long error = sys_stat_at(a[1], &s, a[0][0] == 'l' ? AT_SYMLINK_NOFOLLOW : 0);
    if (error < 0)
        return builtin_fail(error, a[1]);
    u64 numbers[] = {s.mode, s.ino, s.dev, s.nlink, s.uid, s.gid, (u64)s.size};
    for (usize i = 0; i < sizeof numbers / sizeof *numbers; i++)
        end = put_number(end, numbers[i]);
    end = put_time(put_time(put_time(end, &s.atime), &s.mtime), &s.ctime);
    return -write_all(1, text, (usize)(end - text));
}

static long list_folder(char **a)
{
    int fd = (int)sys_open(a[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    long got = fd;
    while (fd >= 0 && (got = sys_getdents(fd, buffer, sizeof buffer)) > 0)
        for (long at = 0; at < got;) {
            struct dirent *entry = (struct dirent *)(buffer + at);
            const char *name = entry->name;
            char type = (char)('0' + entry->type % 16);
            at += entry->size;
            if (name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0)))
                continue;
            if (write_all(1, &type, 1) < 0 || write_all(1, name, length(name) + 1) < 0)
                return EPIPE;
        }
    return got < 0 ? builtin_fail(got, a[1]) : 0;
}

static long read_link(char **a)
{
    long got = sys_readlink(a[1], (char *)buffer, sizeof buffer);
    return got < 0 ? builtin_fail(got, a[1]) : -write_all(1, buffer, (usize)got);
}

/* The tree at `path`, which has room for more. Links are removed, never followed. */
static long remove_tree(char *path, usize size, int depth)
{
    u8 entries[2048];
    long error = sys_unlink(path), got;
    if (error != -EISDIR)
        return error < 0 ? builtin_fail(error, path) : 0;
    if (depth == 0)
        return builtin_fail(ELOOP, path);
    int fd = (int)sys_open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), removed = 1;
    if (fd < 0)
        return builtin_fail(fd, path);
    error = 0;
    /* A folder that changes while it is read may hide entries: it is read again until there is nothing to remove. */
    while (removed && error == 0) {
        removed = 0;
        SYS(8 /* lseek */, fd, 0, 0, 0, 0);
        while (error == 0 && (got = sys_getdents(fd, entries, sizeof entries)) > 0)
            for (long at = 0; at < got && error == 0;) {
                struct dirent *entry = (struct dirent *)(entries + at);
                const char *name = entry->name;
                usize more = length(name);
                at += entry->size;
                if (name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0)))
                    continue;
                if (size + more + 2 > 4096) {
                    error = builtin_fail(ENAMETOOLONG, path);
                    break;
                }
                path[size] = '/';
                memcpy(path + size + 1, name, more + 1);
                error = remove_tree(path, size + 1 + more, depth - 1);
                path[size] = 0;
                removed = 1;
            }
    }
    sys_close(fd);
    if (error)
        return error;
    error = sys_rmdir(path);
    return error < 0 ? builtin_fail(error, path) : 0;
}

static long remove_all(char **a)
{
    static char path[4096];
    usize size = length(a[1]);
    if (size >= sizeof path)
        return builtin_fail(ENAMETOOLONG, a[1]);
    memcpy(path, a[1], size + 1);
    return remove_tree(path, size, 128);
}

static long tell(long result, const char *path)
{
    return result < 0 ? builtin_fail(result, path) : 0;
}

static struct timespec time_of(const char *text)
{
    int before = *text == '-';
    long all = (long)number_of(text + before, 10);
    if (before)
        all = -all;
    long seconds = all / 1000000000, rest = all % 1000000000;
    if (rest < 0)
        return (struct timespec){seconds - 1, rest + 1000000000};
    return (struct timespec){seconds, rest};
}

static long set_times(char **a)
{
    struct timespec times[2] = {time_of(a[2]), time_of(a[3])};
    return tell(sys_utimens(a[1], times, 0), a[1]);
}

static long make_folder(char **a) { return tell(sys_mkdir(a[1], (int)number_of(a[2], 8)), a[1]); }
static long remove_folder(char **a) { return tell(sys_rmdir(a[1]), a[1]); }
static long unlink_file(char **a) { return tell(sys_unlink(a[1]), a[1]); }
static long rename_file(char **a) { return tell(sys_rename(a[1], a[2]), a[1]); }
static long link_file(char **a) { return tell(sys_link(a[1], a[2]), a[2]); }
static long make_symlink(char **a) { return tell(sys_symlink(a[1], a[2]), a[2]); }
static long change_mode(char **a) { return tell(sys_chmod(a[1], (u32)number_of(a[2], 8)), a[1]); }
static long change_owner(char **a)
{
    return tell(sys_lchown(a[1], (u32)number_of(a[2], 10), (u32)number_of(a[3], 10)), a[1]);
}
static long get_tree(char **a) { return tar_out(a[1]); }
static long put_tree(char **a) { return tar_in(a[1]); }

static const struct {
    const char *name;
    int arguments;
    long (*run)(char **argv);
} builtins[] = {
    {"read", 1, read_file},     {"write", 3, write_file},   {"get", 1, get_tree},        {"put", 1, put_tree},
    {"stat", 1, stat_file},     {"lstat", 1, stat_file},    {"list", 1, list_folder},    {"readlink", 1, read_link},
    {"mkdir", 2, make_folder},  {"rmdir", 1, remove_folder}, {"unlink", 1, unlink_file}, {"remove", 1, remove_all},
    {"rename", 2, rename_file}, {"link", 2, link_file},     {"symlink", 2, make_symlink}, {"chmod", 2, change_mode},
    {"chown", 3, change_owner}, {"utime", 3, set_times},
};

long builtin_run(char **argv)
{
    int count = 0;
    while (argv[count])
        count++;
    for (usize i = 0; i < sizeof builtins / sizeof *builtins; i++) {
        usize size = length(builtins[i].name);
        if (count == builtins[i].arguments + 1 && length(argv[0]) == size && memcmp(argv[0], builtins[i].name, size) == 0)
            return builtins[i].run(argv);
    }
    return builtin_fail(ENOSYS, argv[0]);
}
