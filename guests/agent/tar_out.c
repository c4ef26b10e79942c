/*
 * A tree of the guest as a tar archive on standard output. Names are relative to the tree, which is "." itself. Each member has
 * a pax extended header (IEEE Std 1003.1-2017, pax, "pax Extended Header") with its time to the nanosecond, and its name where
 * that is long. Files, folders and symbolic links only: there is no use for a copy of a device, a pipe or a socket.
 */
#include "tar.h"

static u8 buffer[65536];
static char extended[TAR_EXTENDED_MAX];
static usize extended_size;
static char path[TAR_PATH];
static usize prefix; /* so much of `path` is the tree's own */

static void octal(char *field, usize size, u64 value)
{
    field[size - 1] = 0;
    for (usize i = size - 1; i-- > 0; value /= 8)
        field[i] = (char)('0' + value % 8);
}

static usize decimal(char *to, u64 value)
{
    char digits[20];
    usize count = 0;
    do
        digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    for (usize i = 0; i < count; i++)
        to[i] = digits[count - 1 - i];
    return count;
}

/* A record is its own length, a space, "key=value" and a newline; the length counts its own digits. */
static void record(const char *key, const char *value, usize size)
{
    usize key_size = length(key), rest = 1 + key_size + 1 + size + 1, all = rest + 1;
    char digits[20];
    while (rest + decimal(digits, all) != all)
        all = rest + decimal(digits, all);
    char *at = extended + extended_size;
    at += decimal(at, all);
    *at++ = ' ';
    memcpy(at, key, key_size);
    at += key_size;
    *at++ = '=';
    memcpy(at, value, size);
    at[size] = '\n';
    extended_size += all;
}

static void record_time(const struct timespec *time)
{
    char text[32], *at = text;
    long seconds = time->seconds, rest = time->nanoseconds;
    if (seconds < 0 && rest) { /* -0.25 is a second before with three quarters after it */
        seconds++;
        rest = 1000000000 - rest;
    }
    if (time->seconds < 0)
        *at++ = '-';
    at += decimal(at, (u64)(seconds < 0 ? -seconds : seconds));
    *at++ = '.';
    for (long digit = 100000000; digit; digit /= 10)
        *at++ = (char)('0' + rest / digit % 10);
    record("mtime", text, (usize)(at - text));
}

static long block(struct tar_header *header, char type, u64 size)
{
    header->type = type;
    octal(header->size, sizeof header->size, size >> 33 ? 0 : size); /* the record has those that do not fit */
    memcpy(header->magic, "ustar", 6);
    memcpy(header->version, "00", 2);
    octal(header->sum, 7, tar_sum(header));
    header->sum[7] = ' ';
    return write_all(1, header, TAR_BLOCK);
}

static long pad(u64 size)
{
    static const u8 zeros[TAR_BLOCK];
    return size % TAR_BLOCK ? write_all(1, zeros, TAR_BLOCK - size % TAR_BLOCK) : 0;
}

/* The headers of a member. */
static long head(const struct stat *s, char type, u64 size, const char *link, usize link_size)
{
    struct tar_header header = {0}, extension = {0};
    const char *name = path + prefix;
    usize name_size = length(name);
    if (name_size == 0) {
        name = ".";
        name_size = 1;
    }
    extended_size = 0;
    record_time(&s->mtime);
    if (name_size > sizeof header.name)
        record("path", name, name_size);
    if (link_size > sizeof header.link)
        record("linkpath", link, link_size);
    if (size >> 33) {
        char digits[20];
        record("size", digits, decimal(digits, size));
    }
    long error = block(&extension, 'x', extended_size);
    if (error == 0)
        error = write_all(1, extended, extended_size);
    if (error == 0)
        error = pad(extended_size);
    memcpy(header.name, name, name_size > sizeof header.name ? sizeof header.name : name_size);
    memcpy(header.link, link, link_size > sizeof header.link ? sizeof header.link : link_size);
    octal(header.mode, sizeof header.mode, s->mode & 07777);
    octal(header.uid, sizeof header.uid, s->uid & 07777777);
    octal(header.gid, sizeof header.gid, s->gid & 07777777);
    octal(header.mtime, sizeof header.mtime, s->mtime.seconds < 0 ? 0 : (u64)s->mtime.seconds & 077777777777);
    return error ? error : block(&header, type, size);
}

static long file(const struct stat *s)
{
    int fd = (int)sys_open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return builtin_fail(fd, path);
    u64 size = (u64)s->size, left;
    long got = 0, error;
    /* What is in /proc and /sys has no size that it would tell before it is read. */
    if (size == 0 && (got = read_exactly(fd, buffer, sizeof buffer)) > 0)
        size = (u64)got;
    error = got < 0 ? got : head(s, '0', size, "", 0);
    if (error == 0 && got > 0)
        error = write_all(1, buffer, (usize)got);
    left = got > 0 ? 0 : size;
    while (left && error == 0) {
        got = sys_read(fd, buffer, left < sizeof buffer ? left : sizeof buffer);
        if (got == -EINTR)
            continue;
        if (got <= 0) {
            error = got ? got : -EIO; /* it has become shorter: its header has promised more */
            break;
        }
        error = write_all(1, buffer, (usize)got);
        left -= (u64)got;
    }
    sys_close(fd);
    if (error == 0)
        error = pad(size);
    return error ? builtin_fail(error, path) : 0;
}

static long tree(usize size, int depth)
{
    u8 entries[4096];
    char target[TAR_PATH];
    struct stat s;
    long error = sys_stat_at(path, &s, AT_SYMLINK_NOFOLLOW), got;
    if (error < 0)
        return builtin_fail(error, path);
    switch (s.mode & S_IFMT) {
    case S_IFREG: return file(&s);
    case S_IFLNK:
        if ((got = sys_readlink(path, target, sizeof target)) < 0 || (got = head(&s, '2', 0, target, (usize)got)) < 0)
            return builtin_fail(got, path);
        return 0;
    case S_IFDIR: break;
    default: return size == prefix ? builtin_fail(EINVAL, path) : 0;
    }
    if (depth == 0)
        return builtin_fail(ELOOP, path);
    if ((error = head(&s, '5', 0, "", 0)) < 0)
        return builtin_fail(error, path);
    int fd = (int)sys_open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return builtin_fail(fd, path);
    error = 0;
    while (error == 0 && (got = sys_getdents(fd, entries, sizeof entries)) != 0) {
        if (got < 0) {
            error = builtin_fail(got, path);
            break;
        }
        for (long at = 0; at < got && error == 0;) {
            struct dirent *entry = (struct dirent *)(entries + at);
            const char *name = entry->name;
            usize more = length(name);
            at += entry->size;
            if (name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0)))
                continue;
            if (size + more + 2 > sizeof path) {
                error = builtin_fail(ENAMETOOLONG, path);
                break;
            }
            /* The tree's own path and the slash behind it are no part of a member's name. */
            usize start = size;
            if (start == 0 || path[start - 1] != '/')
                path[start++] = '/';
            if (size == prefix)
                prefix = start;
            memcpy(path + start, name, more + 1);
            error = tree(start + more, depth - 1);
            if (prefix == start)
                prefix = size;
            path[size] = 0;
        }
    }
    sys_close(fd);
    return error;
}

long tar_out(const char *name)
{
    static const u8 end[2 * TAR_BLOCK];
    usize size = length(name);
    if (size >= sizeof path)
        return builtin_fail(ENAMETOOLONG, name);
    memcpy(path, name, size + 1);
    prefix = size;
    /* A link that is named itself is followed; those in the tree are copied as links. */
    struct stat s;
    if (sys_stat_at(path, &s, AT_SYMLINK_NOFOLLOW) == 0 && (s.mode & S_IFMT) == S_IFLNK) {
        if (size + 3 > sizeof path)
            return builtin_fail(ENAMETOOLONG, name);
        if (sys_stat_at(path, &s, 0) == 0 && (s.mode & S_IFMT) == S_IFDIR) {
            memcpy(path + size, "/.", 3);
            prefix = size += 2;
        } else
            return tar_out(followed(name));
    }
    long error = tree(size, TAR_DEPTH);
    if (error)
        return error;
    return -write_all(1, end, sizeof end);
}
