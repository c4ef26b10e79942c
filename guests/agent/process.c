/* Commands that run for the host: started, fed, drained, and reported when they end. */
#include "agent.h"

/* Largest piece of output in one frame: the room of a pipe, so that one read empties it. */
#define OUTPUT_CHUNK OUTPUT_MAX
/* Kept free in the queue for the small frames (EXIT, CREDIT, ACK), so that output never shuts them out. */
#define RESERVE 1024
#define ARGUMENTS_MAX 1024
#define CREDENTIALS_GROUPS 256

struct process {
    int used, pid, ended, status;
    u16 id;
    int in, out, err; /* our ends; -1 when closed. With a terminal, `in` and `out` are both its master side. */
    int terminal, eof, builtin;
    u32 out_left, err_left; /* once ended: what is still to be read from the pipes */
    u32 out_room, err_room; /* what the host still has a place for */
    u32 input_head, input_tail, credit;
    u8 *input;
};

/* Who a command is to be, as EXEC says it. */
#define AS_IT_IS 0xffffffffu
struct credentials {
    u32 user, group, mask, count;
    const u8 *groups;
};

static struct process processes[PROCESS_MAX];
static u8 inputs[PROCESS_MAX][STDIN_WINDOW]; /* beside the table, which is looked through all the time */
static char *arguments[ARGUMENTS_MAX];

static struct process *find(u16 id)
{
    for (int i = 0; i < PROCESS_MAX; i++)
        if (processes[i].used && processes[i].id == id)
            return &processes[i];
    return 0;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        sys_close(*fd);
    *fd = -1;
}

static void close_input(struct process *p)
{
    if (p->terminal)
        p->in = -1; /* the same descriptor as `out` */
    else
        close_fd(&p->in);
}

/* execve along PATH, as execvp does it. Returns errno, and only when nothing could be started. */
static long exec_along_path(char **argv, char **env)
{
    static char candidate[4096];
    const char *name = argv[0], *path = "/usr/sbin:/usr/bin:/sbin:/bin";
    long error = ENOENT;
    for (const char *c = name; *c; c++)
        if (*c == '/')
            return -sys_execve(name, argv, env);
    for (char **e = env; *e; e++)
        if (memcmp(*e, "PATH=", length(*e) < 5 ? length(*e) + 1 : 5) == 0)
            path = *e + 5;
    while (*path) {
        usize size = 0, name_size = length(name);
        while (path[size] && path[size] != ':')
            size++;
        if (size + name_size + 2 <= sizeof candidate) {
            memcpy(candidate, path, size);
            candidate[size] = '/';
            memcpy(candidate + size + 1, name, name_size + 1);
            long result = -sys_execve(candidate, argv, env);
            if (result != ENOENT && result != ENOTDIR)
                error = result;
        }
        path += size + (path[size] == ':');
    }
    return error;
}

static u32 get32(const u8 *at)
{
    return at[0] | at[1] << 8 | at[2] << 16 | (u32)at[3] << 24;
}

/* The groups first: whoever is no longer root may not change them. */
static long become(const struct credentials *who)
{
    static u32 groups[CREDENTIALS_GROUPS];
    long error = 0;
    if (who->count != AS_IT_IS) {
        for (u32 i = 0; i < who->count; i++)
            groups[i] = get32(who->groups + 4 * i);
        error = sys_setgroups(who->count, groups);
    }
    if (error == 0 && who->group != AS_IT_IS)
        error = sys_setresgid(who->group);
    if (error == 0 && who->user != AS_IT_IS)
        error = sys_setresuid(who->user);
    if (who->mask != AS_IT_IS)
        sys_umask(who->mask);
    return -error;
}

/* Runs in the child: never returns. */
static void child(struct process *p, char **argv, char **env, const char *directory, const struct credentials *who, int *ends,
                  int report)
{
    long error = 0;
    sys_setsid();
    child_reset_signals();
    for (int i = 0; i < 3; i++)
        sys_dup2(ends[i], i);
    if (p->terminal)
        sys_ioctl(0, TIOCSCTTY, 0);
    if (*directory && (error = -sys_chdir(directory)) != 0)
        error |= FAILED_DIRECTORY;
    if (error == 0 && (error = become(who)) != 0)
        error |= FAILED_CREDENTIALS;
    if (error == 0 && p->builtin) {
        sys_close_from(3); /* as exec would: it has started, and holds no end of a pipe but its own */
        sys_exit((int)builtin_run(argv));
    }
    if (error == 0)
        error = exec_along_path(argv, env);
    u32 word = (u32)error;
    sys_write(report, &word, sizeof word);
    sys_exit(127);
}

/* A terminal pair: the master to us, the other side to the process. */
static long open_terminal(struct process *p, int *ends, u16 rows, u16 columns)
{
    char name[] = "/dev/pts/\0\0\0\0\0\0\0\0\0\0\0";
    int unlock = 0;
    u32 number = 0;
    struct winsize window = {rows, columns, 0, 0};
    long master = sys_open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (master < 0)
        return master;
    p->out = p->in = (int)master;
    sys_ioctl(p->out, TIOCSPTLCK, &unlock);
    sys_ioctl(p->out, TIOCGPTN, &number);
    if (rows && columns)
        sys_ioctl(p->out, TIOCSWINSZ, &window);
    char digits[10];
    int count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    for (int i = 0; i < count; i++)
        name[9 + i] = digits[count - 1 - i];
    long slave = sys_open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0)
        return slave;
    for (int i = 0; i < 3; i++)
        ends[i] = (int)slave;
    return 0;
}

static long open_pipes(struct process *p, int *ends, int flags)
{
    int pair[2];
    long result;
    if (flags & FLAG_NO_STDIN) {
        result = sys_open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (result < 0)
            return result;
        ends[0] = (int)result;
    } else {
        if ((result = sys_pipe2(pair, O_CLOEXEC)) < 0)
            return result;
        ends[0] = pair[0];
        p->in = pair[1];
        /* Non-blocking on our side only: the flag belongs to the open file, and each end is one of its own. */
        sys_fcntl(p->in, 4 /* F_SETFL */, O_WRONLY | O_NONBLOCK);
    }
    for (int i = 1; i < 3; i++) {
        if (i == 2 && flags & FLAG_JOIN) {
            ends[2] = ends[1];
            continue;
        }
        if (flags & (i == 1 ? FLAG_NO_STDOUT : FLAG_NO_STDERR)) {
            if ((result = sys_open("/dev/null", O_WRONLY | O_CLOEXEC)) < 0)
                return result;
            ends[i] = (int)result;
            continue;
        }
        if ((result = sys_pipe2(pair, O_CLOEXEC)) < 0)
            return result;
        ends[i] = pair[1];
        *(i == 1 ? &p->out : &p->err) = pair[0];
        sys_fcntl(pair[0], 4, O_RDONLY | O_NONBLOCK);
    }
    return 0;
}

static void forget(struct process *p)
{
    close_input(p);
    close_fd(&p->out);
    close_fd(&p->err);
    p->used = 0;
}

/* Split the payload of EXEC in place. Returns 0, or errno for a payload that is not as frame.h says. */
static long parse(u8 flags, u8 *payload, u32 size, struct credentials *who, char **directory, char ***argv, char ***env)
{
    *who = (struct credentials){AS_IT_IS, AS_IT_IS, AS_IT_IS, AS_IT_IS, 0};
    if (size < 8 + 2 || payload[size - 1] != 0)
        return EINVAL;
    u32 argc = payload[0] | payload[1] << 8, envc = payload[2] | payload[3] << 8;
    if (argc == 0 || argc + envc + 2 > ARGUMENTS_MAX)
        return argc == 0 ? EINVAL : E2BIG;
    u32 at = 8, slot = 0;
    if (flags & FLAG_CREDENTIALS) {
        if (size < at + 16 + 2)
            return EINVAL;
        *who = (struct credentials){get32(payload + at), get32(payload + at + 4), get32(payload + at + 8),
                                    get32(payload + at + 12), payload + at + 16};
        at += 16;
        if (who->count != AS_IT_IS) {
            if (who->count > CREDENTIALS_GROUPS || size < at + 4 * who->count + 2)
                return EINVAL;
            at += 4 * who->count;
        }
    }
    *directory = (char *)payload + at;
    at += (u32)length((char *)payload + at) + 1;
    for (u32 i = 0; i < argc + envc; i++) {
        if (at >= size)
            return EINVAL;
        if (i == argc)
            arguments[slot++] = 0;
        arguments[slot++] = (char *)payload + at;
        at += (u32)length((char *)payload + at) + 1;
    }
    if (envc == 0)
        arguments[slot++] = 0;
    arguments[slot] = 0;
    *argv = arguments;
    *env = arguments + argc + 1;
    return 0;
}

static long start(struct process *p, u8 flags, u8 *payload, u32 size)
{
    int ends[3] = {-1, -1, -1}, report[2];
    char *directory, **argv, **env;
    struct credentials who;
    u32 child_error = 0;
    long result = parse(flags, payload, size, &who, &directory, &argv, &env);
    if (result)
        return result;
    p->terminal = flags & FLAG_TTY;
    p->builtin = flags & FLAG_BUILTIN;
    result = p->terminal ? open_terminal(p, ends, (u16)(payload[4] | payload[5] << 8), (u16)(payload[6] | payload[7] << 8))
                         : open_pipes(p, ends, flags);
    if (result >= 0)
        result = sys_pipe2(report, O_CLOEXEC);
    if (result >= 0) {
        result = sys_fork();
        if (result == 0)
            child(p, argv, env, directory, &who, ends, report[1]);
        sys_close(report[1]);
        /* The child's end closes on exec, so this waits for either the new program or the reason why not. */
        if (result > 0 && sys_read(report[0], &child_error, sizeof child_error) == sizeof child_error)
            result = -(long)child_error; /* the child itself is reaped like any stranger */
        sys_close(report[0]);
    }
    for (int i = 0; i < 3; i++)
        if (ends[i] >= 0 && (i == 0 || (ends[i] != ends[0] && (i == 1 || ends[2] != ends[1]))))
            sys_close(ends[i]);
    if (result < 0)
        return -result;
    p->pid = (int)result;
    return 0;
}

void process_exec(u16 id, u8 flags, u8 *payload, u32 size)
{
    struct process *p = 0;
    for (int i = 0; i < PROCESS_MAX && !p; i++)
        if (!processes[i].used)
            p = &processes[i];
    if (!p) {
        line_send_u32(FRAME_FAILED, id, EAGAIN);
        return;
    }
    p->used = 1;
    p->id = id;
    p->in = p->out = p->err = -1;
    p->pid = p->ended = p->eof = p->terminal = 0;
    p->input_head = p->input_tail = p->credit = 0;
    p->out_room = p->err_room = OUTPUT_WINDOW;
    p->input = inputs[p - processes];
    long error = start(p, flags, payload, size);
    if (error) {
        forget(p);
        line_send_u32(FRAME_FAILED, id, (u32)error);
    } else if (flags & FLAG_TELL)
        line_send_u32(FRAME_STARTED, id, (u32)p->pid);
}

void process_taken(u16 id, int which, u32 size)
{
    struct process *p = find(id);
    if (!p)
        return;
    u32 *room = which ? &p->err_room : &p->out_room;
    *room = size > OUTPUT_WINDOW - *room ? OUTPUT_WINDOW : *room + size;
}

void process_close(u16 id, int which)
{
    struct process *p = find(id);
    if (p && !p->terminal)
        close_fd(which ? &p->err : &p->out);
}

void process_forget_all(void)
{
    for (int i = 0; i < PROCESS_MAX; i++) {
        struct process *p = &processes[i];
        if (!p->used)
            continue;
        /* One of our own ends by itself when its streams do, and puts what it was doing in order first. */
        if (p->pid > 0 && !p->ended && !p->builtin)
            sys_kill(-p->pid, SIGKILL);
        forget(p);
    }
}

void process_stdin(u16 id, const u8 *data, u32 size)
{
    struct process *p = find(id);
    if (!p)
        return;
    if (p->input_head == p->input_tail)
        p->input_head = p->input_tail = 0;
    if (size > STDIN_WINDOW - p->input_tail) {
        memmove(p->input, p->input + p->input_head, p->input_tail - p->input_head);
        p->input_tail -= p->input_head;
        p->input_head = 0;
    }
    if (size > STDIN_WINDOW - p->input_tail) /* more than was credited: the host does not do this */
        size = STDIN_WINDOW - p->input_tail;
    memcpy(p->input + p->input_tail, data, size);
    p->input_tail += size;
}

void process_stdin_eof(u16 id)
{
    struct process *p = find(id);
    if (p)
        p->eof = 1;
}

void process_resize(u16 id, u16 rows, u16 columns)
{
    struct winsize window = {rows, columns, 0, 0};
    struct process *p = find(id);
    if (p && p->terminal && p->out >= 0)
        sys_ioctl(p->out, TIOCSWINSZ, &window);
}

void process_signal(u16 id, u32 number)
{
    struct process *p = find(id);
    if (p && p->pid > 0 && !p->ended)
        sys_kill(-p->pid, (int)number);
}

int process_reap(int pid, int status)
{
    for (int i = 0; i < PROCESS_MAX; i++) {
        struct process *p = &processes[i];
        if (!p->used || p->pid != pid || p->ended)
            continue;
        p->ended = 1;
        p->status = status;
        /*
         * What the process wrote is in its pipes by now. Exactly that much is still passed on: a grandchild which
         * keeps the pipe open must not hold the end back, nor may it add to it for ever.
         */
        p->out_left = p->err_left = 0;
        if (p->out >= 0)
            sys_ioctl(p->out, FIONREAD, &p->out_left);
        if (p->err >= 0)
            sys_ioctl(p->err, FIONREAD, &p->err_left);
        return 1;
    }
    return 0;
}

static void take_input(struct process *p)
{
    while (p->input_head != p->input_tail) {
        u32 waiting = p->input_tail - p->input_head, taken = waiting;
        if (p->in >= 0 && !p->ended) {
            long written = sys_write(p->in, p->input + p->input_head, waiting);
            if (written == -EAGAIN)
                break;
            if (written > 0)
                taken = (u32)written;
            else
                close_input(p); /* nobody reads: what comes is let go, and credited, so that the host goes on */
        }
        p->input_head += taken;
        p->credit += taken;
    }
    if (p->input_head == p->input_tail && p->eof) {
        u8 end = 4; /* Ctrl-D: how a terminal says end of input */
        if (p->terminal && p->in >= 0)
            sys_write(p->in, &end, 1);
        close_input(p);
    }
    if (p->credit >= STDIN_WINDOW / 4) {
        line_send_u32(FRAME_CREDIT, p->id, p->credit);
        p->credit = 0;
    }
}

enum pass { NOTHING, PASSED, NO_ROOM };

/* Pass on one read's worth. */
static enum pass pass_output(struct process *p, int *fd, u8 type, u32 *left, u32 *window)
{
    u32 room = OUTPUT_CHUNK;
    if (*fd < 0)
        return NOTHING;
    if (!p->ended || (!p->terminal && *left > OUTPUT_LEFT)) {
        if (*window == 0)
            return NOTHING; /* TAKEN comes when the host has a place for it */
        if (room > *window)
            room = *window;
    }
    if (p->ended && !p->terminal) {
        if (*left == 0) {
            close_fd(fd);
            return NOTHING;
        }
        if (room > *left)
            room = *left;
    }
    if (!line_has_room(room + RESERVE))
        return NO_ROOM;
    long got = sys_read(*fd, line_payload(), room);
    if (got > 0) {
        line_commit(type, p->id, (u32)got);
        *window -= (u32)got < *window ? (u32)got : *window;
        if (p->ended && !p->terminal)
            *left -= (u32)got;
        return PASSED;
    }
    /* A terminal gives EIO after its last user; a pipe gives 0. An ended process has nothing more to say. */
    if (got != -EAGAIN || p->ended) {
        if (p->terminal)
            p->in = -1;
        close_fd(fd);
    }
    return NOTHING;
}

void process_service(void)
{
    for (int i = 0; i < PROCESS_MAX; i++) {
        struct process *p = &processes[i];
        if (!p->used)
            continue;
        enum pass out, err;
        do { /* poll does not wake for a process that has ended: empty its pipes now, or when the line has room */
            out = pass_output(p, &p->out, FRAME_STDOUT, &p->out_left, &p->out_room);
            err = pass_output(p, &p->err, FRAME_STDERR, &p->err_left, &p->err_room);
        } while (p->ended && (out == PASSED || err == PASSED));
        take_input(p);
        if (p->ended && p->out < 0 && p->err < 0) {
            line_send_u32(FRAME_EXIT, p->id, (u32)p->status);
            forget(p);
        }
    }
}

int process_poll_list(struct pollfd *list)
{
    int count = 0, room = line_has_room(OUTPUT_CHUNK + RESERVE);
    for (int i = 0; i < PROCESS_MAX; i++) {
        struct process *p = &processes[i];
        if (!p->used)
            continue;
        if (room && p->out >= 0 && p->out_room)
            list[count++] = (struct pollfd){p->out, POLLIN, 0};
        if (room && p->err >= 0 && p->err_room)
            list[count++] = (struct pollfd){p->err, POLLIN, 0};
        if (p->in >= 0 && p->input_head != p->input_tail)
            list[count++] = (struct pollfd){p->in, POLLOUT, 0};
    }
    return count;
}
