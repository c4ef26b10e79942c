/* The line to the host: found and opened, changed for a better one, frames queued for sending, frames put together from what arrives. */
#include "agent.h"

/* Output of processes is read straight into the queue, so it holds a few frames of the largest useful size. */
#define QUEUE_SIZE (192 * 1024)
#define ACK_EVERY (LINE_WINDOW / 4)

int line_fd = -1;
static u8 queue[QUEUE_SIZE];
static usize queue_head, queue_tail;
static u8 arrived[FRAME_HEADER + FRAME_MAX];
static usize arrived_size;
static u32 unacknowledged;
static u32 number;  /* ours, of the last READY */
static int greeted; /* HELLO has come for it */
static int over;
static int is_serial;
static int port_fd = -1; /* what was offered */
static u32 carried;      /* unacknowledged on the line before this one */
static usize passed;     /* bytes, both ways, over a serial line */

/* So much is worth a better line, whoever works meanwhile. */
#define BUSY 65536

static void put32(u8 *at, u32 value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (u8)(value >> (8 * i));
}

void line_take(int fd)
{
    long flags = sys_fcntl(fd, 3 /* F_GETFL */, 0);
    sys_fcntl(fd, 4 /* F_SETFL */, (flags < 0 ? O_RDWR : flags) | O_NONBLOCK);
    sys_fcntl(fd, 2 /* F_SETFD */, 1 /* FD_CLOEXEC */);
    line_fd = fd;
    is_serial = 0;
}

int line_ended(void)
{
    return over;
}

static int open_serial(const char *path)
{
    struct termios mode;
    int fd = (int)sys_open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return -1;
    /* A port without a chip behind it opens, but refuses its settings with EIO. */
    if (sys_ioctl(fd, TCGETS, &mode) < 0) {
        sys_close(fd);
        return -1;
    }
    mode.iflag = 0;
    mode.oflag = 0;
    mode.lflag = 0;
    mode.cflag = 0x1002 | 0x30 | 0x80 | 0x800; /* B115200, CS8, CREAD, CLOCAL */
    mode.cc[5] = 0;                            /* VTIME */
    mode.cc[6] = 1;                            /* VMIN */
    if (sys_ioctl(fd, TCSETS, &mode) < 0) {
        sys_close(fd);
        return -1;
    }
    return fd;
}

/* The virtio console port that is named for us. Its device is /dev/NAME, whether or not udev has made better names. */
static int open_port(void)
{
    static const char ours[] = "org.ringzero.agent\n";
    static u8 entries[2048];
    char path[320], name[32];
    int folder = (int)sys_open("/sys/class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = -1;
    long got;
    if (folder < 0)
        return -1;
    while (found < 0 && (got = sys_getdents(folder, entries, sizeof entries)) > 0)
        for (long at = 0; at < got && found < 0;) {
            struct dirent *entry = (struct dirent *)(entries + at);
            usize size = length(entry->name);
            at += entry->size;
            if (entry->name[0] == '.')
                continue;
            memcpy(path, "/sys/class/virtio-ports/", 24);
            memcpy(path + 24, entry->name, size);
            memcpy(path + 24 + size, "/name", 6);
            int fd = (int)sys_open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0)
                continue;
            long read = sys_read(fd, name, sizeof name);
            sys_close(fd);
            if (read != sizeof ours - 1 || memcmp(name, ours, sizeof ours - 1) != 0)
                continue;
            memcpy(path, "/dev/", 5);
            memcpy(path + 5, entry->name, size + 1);
            found = (int)sys_open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
    sys_close(folder);
    return found;
}

/* Is somebody at the other end of the port? drivers/char/virtio_console.c, port_fops_poll, Linux 6.1. */
static int is_joined(int fd)
{
    struct pollfd port = {fd, 0, 0};
    return sys_poll(&port, 1, 0) == 0;
}

int line_port_is_there(int joined)
{
    int fd = open_port(), there = fd >= 0 && (!joined || is_joined(fd));
    if (fd >= 0)
        sys_close(fd);
    return there;
}

void line_find(void)
{
    line_fd = open_port();
    if (line_fd >= 0 && is_joined(line_fd))
        return;
    if (line_fd >= 0)
        sys_close(line_fd);
    line_fd = open_serial("/dev/ttyS1");
    is_serial = line_fd >= 0;
}

/* The host is 2, and we are expected there: python/ringzero/machine/agent_lines.py. */
long line_call(void)
{
    struct {
        u16 family, reserved;
        u32 port, cid, rest;
    } host = {AF_VSOCK, 0, 29274, 2, 0};
    long fd = SYS(41 /* socket */, AF_VSOCK, 1 /* SOCK_STREAM */, 0, 0, 0);
    if (fd < 0)
        return fd;
    long error = SYS(42 /* connect */, fd, &host, sizeof host, 0, 0);
    if (error < 0) {
        sys_close((int)fd);
        return error;
    }
    line_take((int)fd);
    return 0;
}

int line_may_move(void)
{
    return line_fd >= 0 && is_serial && greeted && port_fd < 0;
}

int line_is_busy(void)
{
    return passed >= BUSY;
}

/* More than the largest frame: whatever another agent was in the middle of saying ends in it. */
#define FILLING (OUTPUT_MAX + 64 * FRAME_HEADER)

static void say_ready(void)
{
    usize size = sizeof FRAME_MAGIC - 1;
    memcpy(line_payload(), FRAME_MAGIC, size);
    put32(line_payload() + size, number);
    line_commit(FRAME_READY, 0, (u32)size + 4);
    line_flush();
}

void line_greet(int again)
{
    queue_head = queue_tail = arrived_size = 0;
    unacknowledged = carried = 0;
    greeted = over = 0;
    number = (u32)__builtin_ia32_rdtsc() | 1;
    if (again) {
        memset(queue, 0, FILLING);
        queue_tail = FILLING;
    }
    say_ready();
}

int line_has_room(usize payload)
{
    if (queue_head == queue_tail)
        queue_head = queue_tail = 0;
    if (QUEUE_SIZE - queue_tail >= payload + FRAME_HEADER)
        return 1;
    /* Move what waits to the front once that is worth it: at most once for half a queue of bytes. */
    if (queue_head >= QUEUE_SIZE / 2) {
        memmove(queue, queue + queue_head, queue_tail - queue_head);
        queue_tail -= queue_head;
        queue_head = 0;
        return QUEUE_SIZE - queue_tail >= payload + FRAME_HEADER;
    }
    return 0;
}

u8 *line_payload(void)
{
    return queue + queue_tail + FRAME_HEADER;
}

void line_commit(u8 type, u16 id, u32 size)
{
    u8 *header = queue + queue_tail;
    header[0] = type;
    header[1] = 0;
    header[2] = (u8)id;
    header[3] = (u8)(id >> 8);
    put32(header + 4, size);
    queue_tail += FRAME_HEADER + size;
}

/* Small frames come from a bounded number of events, and output leaves room for them (see process.c). */
static void wait_for_room(void)
{
    while (!line_has_room(4)) {
        struct pollfd ready = {line_fd, POLLOUT, 0};
        sys_poll(&ready, 1, -1);
        line_flush();
    }
}

void line_send_u32(u8 type, u16 id, u32 value)
{
    wait_for_room();
    put32(line_payload(), value);
    line_commit(type, id, 4);
}

int line_pending(void)
{
    return queue_head != queue_tail;
}

void line_flush(void)
{
    while (queue_head != queue_tail) {
        long sent = sys_write(line_fd, queue + queue_head, queue_tail - queue_head);
        if (sent <= 0)
            return; /* the port is full: poll says when it is not */
        queue_head += (usize)sent;
        passed += (usize)sent;
    }
}

static void flush_all(void)
{
    while (line_fd >= 0 && line_pending()) {
        struct pollfd ready = {line_fd, POLLOUT, 0};
        sys_poll(&ready, 1, -1);
        line_flush();
    }
}

void line_offer(void)
{
    if (!line_may_move() || (port_fd = open_port()) < 0)
        return;
    wait_for_room();
    line_commit(FRAME_OFFER, 0, 0);
    line_flush();
}

/* The host has said MOVE, and nothing after it. */
static void move(void)
{
    wait_for_room();
    line_commit(FRAME_MOVED, 0, 0);
    flush_all();
    sys_close(line_fd); /* which waits for what is still on its way (drivers/tty/tty_port.c, tty_port_close_start) */
    line_fd = port_fd;
    port_fd = -1;
    is_serial = 0;
    /* The driver learns by another queue that the host has joined the port, and until then gives an end of file. */
    for (int tries = 1000; tries && !is_joined(line_fd); tries--)
        sys_poll(0, 0, 1);
    arrived_size = 0;
    greeted = 0;
    carried = unacknowledged;
    say_ready();
}

void line_drain(void)
{
    flush_all();
    if (line_fd >= 0)
        sys_ioctl(line_fd, TCSBRK, (void *)1);
}

/* Look for HELLO in what has arrived, and drop what comes before it. Returns whether it was there. */
static int find_hello(void)
{
    u8 hello[FRAME_HEADER + sizeof FRAME_MAGIC - 1 + 4] = {FRAME_HELLO, 0, 0, 0, sizeof FRAME_MAGIC - 1 + 4};
    usize at = 0;
    memcpy(hello + FRAME_HEADER, FRAME_MAGIC, sizeof FRAME_MAGIC - 1);
    put32(hello + sizeof hello - 4, number);
    while (at + sizeof hello <= arrived_size && memcmp(arrived + at, hello, sizeof hello) != 0)
        at++;
    greeted = at + sizeof hello <= arrived_size;
    memmove(arrived, arrived + at, arrived_size - at);
    arrived_size -= at;
    if (greeted)
        unacknowledged = carried + (u32)arrived_size;
    return greeted;
}

void line_receive(void)
{
    for (;;) {
        long got = sys_read(line_fd, arrived + arrived_size, sizeof arrived - arrived_size);
        if (got <= 0) {
            over = got != -EAGAIN && got != -EINTR;
            break;
        }
        arrived_size += (usize)got;
        unacknowledged += (u32)got;
        passed += (usize)got;
        if (!greeted && !find_hello())
            continue;
        usize at = 0;
        while (arrived_size - at >= FRAME_HEADER) {
            u8 *frame = arrived + at;
            u32 size = frame[4] | frame[5] << 8 | frame[6] << 16 | (u32)frame[7] << 24;
            if (size > FRAME_MAX) { /* the host does not do this: the line lost its place, start afresh */
                process_forget_all();
                line_greet(1);
                return;
            }
            if (arrived_size - at < FRAME_HEADER + size)
                break;
            if (frame[0] == FRAME_MOVE && port_fd >= 0) {
                move();
                return;
            }
            agent_frame(frame[0], frame[1], (u16)(frame[2] | frame[3] << 8), frame + FRAME_HEADER, size);
            at += FRAME_HEADER + size;
        }
        memmove(arrived, arrived + at, arrived_size - at);
        arrived_size -= at;
        if (unacknowledged >= ACK_EVERY) {
            line_send_u32(FRAME_ACK, 0, unacknowledged);
            unacknowledged = 0;
        }
    }
}
