/* Folders of the host, as the words ringzero.mount=TAG:/there and ringzero.mount=TAG:/there:ro ask for them. */
#include "agent.h"

#define MS_RDONLY 1
#define MS_NODEV 4

static const char WORD[] = "ringzero.mount=";

/* Makes the folders on the way to a path, and the last one. */
static void make_folders(char *path)
{
    for (char *at = path + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            sys_mkdir(path, 0755);
            *at = '/';
        }
    sys_mkdir(path, 0755);
}

static void mount_one(char *tag)
{
    char *path = tag;
    long flags = MS_NODEV;
    while (*path && *path != ':')
        path++;
    if (!*path)
        return;
    *path++ = 0;
    usize size = length(path);
    if (size > 3 && memcmp(path + size - 3, ":ro", 3) == 0) {
        path[size - 3] = 0;
        flags |= MS_RDONLY;
    }
    make_folders(path);
    if (sys_mount_with(tag, path, "virtiofs", flags) < 0) {
        static const char sorry[] = "ringzero: a folder of the host could not be mounted at ";
        sys_write(1, sorry, sizeof sorry - 1);
        sys_write(1, path, length(path));
        sys_write(1, "\n", 1);
    }
}

int mount_folders(const char *command_line, int really)
{
    static char word[512];
    int count = 0;
    for (const char *at = command_line; *at;) {
        usize size = 0;
        while (*at == ' ' || *at == '\n')
            at++;
        while (at[size] && at[size] != ' ' && at[size] != '\n')
            size++;
        if (size > sizeof WORD - 1 && size < sizeof word && memcmp(at, WORD, sizeof WORD - 1) == 0) {
            count++;
            if (really) {
                memcpy(word, at + sizeof WORD - 1, size - (sizeof WORD - 1));
                word[size - (sizeof WORD - 1)] = 0;
                mount_one(word);
            }
        }
        at += size;
    }
    return count;
}
