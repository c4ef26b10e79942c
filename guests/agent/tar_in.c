/*
 * A tar archive from standard input, put at a path of the guest: "." in it is that path itself. A file appears whole or not at
 * all, in the place of one that may be there; a folder that is there is gone into, unless it is a link. Folders get their
 * times and modes when all that is in them is there.
 */
#include "tar.h"

#define FOLDERS_MAX 8192 /* times and modes of more are set at once: theirs change again as files come */

struct folder {
    u32 mode;
    struct timespec mtime;
    char *path;
};

static u8 buffer[65536];
static char extended[TAR_EXTENDED_MAX];
static char root[TAR_PATH], path[TAR_PATH], link[TAR_PATH], temporary[TAR_PATH + 16];
static struct folder folders[FOLDERS_MAX];
static usize folder_count;
static char names[512 * 1024];
static usize names_size;

/* What the headers of a member say. */
struct member {
    char type;
    u32 mode;
    u64 size;
    struct timespec mtime;
    const char *name, *link;
};

static u64 octal(const char *field, usize size)
{
    u64 value = 0;
    for (usize i = 0; i < size; i++)
        if (field[i] >= '0' && field[i] <= '7')
            value = value * 8 + (u64)(field[i] - '0');
    return value;
}

static struct timespec time_of(const char *text)
{
    int before = *text == '-';
    struct timespec time = {0, 0};
    for (text += before; *text >= '0' && *text <= '9'; text++)
        time.seconds = time.seconds * 10 + *text - '0';
    if (*text == '.')
        for (long digit = 100000000; digit && *++text >= '0' && *text <= '9'; digit /= 10)
            time.nanoseconds += digit * (*text - '0');
    if (before) {
        time.seconds = -time.seconds;
        if (time.nanoseconds) {
            time.seconds--;
            time.nanoseconds = 1000000000 - time.nanoseconds;
        }
    }
    return time;
}

static long fill(void *to, usize size)
{
    long got = read_exactly(0, to, size);
    return got < 0 ? got : (usize)got == size ? 0 : -EIO;
}

/* Read the records of a pax extended header into `m`; its texts stay where they are, ended by a NUL. */
static long extend(struct member *m, u64 size, int *has_size)
{
    if (size > sizeof extended)
        return -EBADMSG;
    long error = fill(buffer, (size + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK);
    if (error < 0)
        return error;
    memcpy(extended, buffer, size);
    for (usize at = 0; at < size;) {
        usize all = 0, from = at;
        while (from < size && extended[from] >= '0' && extended[from] <= '9' && all < sizeof extended)
            all = all * 10 + (usize)(extended[from++] - '0');
        if (from == size || extended[from] != ' ' || all > size - at || all < from - at + 3 || extended[at + all - 1] != '\n')
            return -EBADMSG;
        char *key = extended + from + 1, *end = extended + at + all - 1, *value = key;
        *end = 0;
        while (value < end && *value != '=')
            value++;
        if (value == end)
            return -EBADMSG;
        *value++ = 0;
        if (memcmp(key, "path", 5) == 0)
            m->name = value;
        else if (memcmp(key, "linkpath", 9) == 0)
            m->link = value;
        else if (memcmp(key, "mtime", 6) == 0)
            m->mtime = time_of(value);
        else if (memcmp(key, "size", 5) == 0) {
            *has_size = 1;
            for (m->size = 0; *value >= '0' && *value <= '9'; value++)
                m->size = m->size * 10 + (u64)(*value - '0');
        }
        at += all;
    }
    return 0;
}

/* Returns 1 for a member, 0 at the end of the archive, or -errno. */
static long next(struct member *m)
{
    static struct tar_header header;
    static char short_name[sizeof header.prefix + 1 + sizeof header.name + 1], short_link[sizeof header.link + 1];
    int has_time = 0, has_size = 0;
    m->name = m->link = 0;
    for (;;) {
        long error = fill(&header, TAR_BLOCK);
        if (error < 0)
            return error;
        if (header.name[0] == 0 && header.magic[0] == 0)
            return 0;
        if (octal(header.sum, sizeof header.sum) != tar_sum(&header))
            return -EBADMSG;
        u64 size = octal(header.size, sizeof header.size);
        if (header.type == 'x') {
            m->mtime.seconds = -1;
            m->mtime.nanoseconds = -1;
            if ((error = extend(m, size, &has_size)) < 0)
                return error;
            has_time = m->mtime.nanoseconds >= 0;
            continue;
        }
        m->type = header.type;
        m->mode = (u32)octal(header.mode, sizeof header.mode) & 07777;
        if (!has_size)
            m->size = size;
        if (!has_time)
            m->mtime = (struct timespec){(long)octal(header.mtime, sizeof header.mtime), 0};
        if (!m->link) {
            memcpy(short_link, header.link, sizeof header.link);
            m->link = short_link;
        }
        if (!m->name) {
            usize before = 0;
            while (before < sizeof header.prefix && header.prefix[before])
                before++;
            memcpy(short_name, header.prefix, before);
            if (before)
                short_name[before++] = '/';
            memcpy(short_name + before, header.name, sizeof header.name);
            short_name[before + sizeof header.name] = 0;
            m->name = short_name;
        }
        return 1;
    }
}

/* Put `path` together. Names that lead out of the tree are refused. */
static long place(const char *name)
{
    usize root_size = length(root), size = length(name);
    memcpy(path, root, root_size + 1);
    while (size && name[size - 1] == '/')
        size--;
    if (size == 1 && name[0] == '.')
        return 0;
    if (size == 0 || name[0] == '/')
        return -EBADMSG;
    for (usize at = 0; at < size; at++) /* each component */
        if ((at == 0 || name[at - 1] == '/') && name[at] == '.' && name[at + 1] == '.' && (at + 2 == size || name[at + 2] == '/'))
            return -EBADMSG;
    if (root_size + 1 + size + 1 > sizeof path)
        return -ENAMETOOLONG;
    path[root_size] = '/';
    memcpy(path + root_size + 1, name, size);
    path[root_size + 1 + size] = 0;
    return 0;
}

static void finish_folder(const struct folder *folder)
{
    struct timespec times[2] = {{0, UTIME_NOW}, folder->mtime};
    sys_chmod(folder->path, folder->mode);
    sys_utimens(folder->path, times, 0);
}

static long make_folder(const struct member *m)
{
    struct folder folder = {m->mode, m->mtime, path};
    usize size = length(path) + 1;
    long error = sys_mkdir(path, 0700);
    struct stat s;
    if (error == -EEXIST) {
        /* The root may be a link to where it all goes; within the tree a link is somebody else's place. */
        error = sys_stat_at(path, &s, length(root) + 1 == size ? 0 : AT_SYMLINK_NOFOLLOW);
        if (error == 0 && (s.mode & S_IFMT) != S_IFDIR)
            error = -ENOTDIR;
    }
    if (error < 0)
        return error;
    if (folder_count == FOLDERS_MAX || names_size + size > sizeof names) {
        finish_folder(&folder);
        return 0;
    }
    folder.path = names + names_size;
    memcpy(folder.path, path, size);
    names_size += size;
    folders[folder_count++] = folder;
    return 0;
}

static long make_file(const struct member *m)
{
    struct timespec times[2] = {{0, UTIME_NOW}, m->mtime};
    usize size = length(path);
    u64 left = m->size;
    memcpy(temporary, path, size);
    memcpy(temporary + size, ".ringzero-new", 14);
    sys_unlink(temporary);
    int fd = (int)sys_create(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return fd;
    long error = 0;
    while (left && error == 0) {
        usize piece = left < sizeof buffer ? left : sizeof buffer;
        error = fill(buffer, piece);
        if (error == 0)
            error = write_all(fd, buffer, piece);
        left -= piece;
    }
    if (error == 0 && m->size % TAR_BLOCK)
        error = fill(buffer, TAR_BLOCK - m->size % TAR_BLOCK);
    if (error == 0)
        error = sys_fchmod(fd, m->mode);
    sys_close(fd);
    if (error == 0)
        error = sys_utimens(temporary, times, 0);
    if (error == 0)
        error = sys_rename(temporary, path);
    if (error < 0)
        sys_unlink(temporary);
    return error;
}

static long make_link(const struct member *m)
{
    struct timespec times[2] = {{0, UTIME_NOW}, m->mtime};
    usize size = length(m->link);
    if (size >= sizeof link)
        return -ENAMETOOLONG;
    memcpy(link, m->link, size + 1);
    sys_unlink(path);
    long error = sys_symlink(link, path);
    if (error == 0)
        sys_utimens(path, times, AT_SYMLINK_NOFOLLOW);
    return error;
}

long tar_in(const char *name)
{
    struct member m = {0};
    usize size = length(name);
    long error;
    if (size >= sizeof root)
        return builtin_fail(ENAMETOOLONG, name);
    while (size > 1 && name[size - 1] == '/')
        size--;
    memcpy(root, name, size);
    memcpy(path, name, size);
    while ((error = next(&m)) > 0) {
        if ((error = place(m.name)) < 0)
            break;
        switch (m.type) {
        case '0':
        case 0: error = make_file(&m); break;
        case '2': error = make_link(&m); break;
        case '5': error = make_folder(&m); break;
        default: error = -EBADMSG;
        }
        if (error < 0)
            break;
    }
    while (folder_count)
        finish_folder(&folders[--folder_count]);
    return error < 0 ? builtin_fail(error, path) : 0;
}
