/* The line to the host: found and opened, frames queued for sending, frames put together from what arrives. */
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

int line_port_is_there(void)
{
    int fd = open_port();
    if (fd >= 0)
        sys_close(fd);
    return fd >= 0;
}

void line_find(void)
{
    line_fd = open_port();
    if (line_fd < 0)
        line_fd = open_serial("/dev/ttyS1");
}

/* More than the largest frame: whatever another agent was in the middle of saying ends in it. */
#define FILLING (OUTPUT_MAX + 64 * FRAME_HEADER)

void line_greet(int again)
{
    usize size = sizeof FRAME_MAGIC - 1;
    queue_head = queue_tail = arrived_size = 0;
    unacknowledged = 0;
    greeted = 0;
    number = (u32)__builtin_ia32_rdtsc() | 1;
    if (again) {
        memset(queue, 0, FILLING);
        queue_tail = FILLING;
    }
    memcpy(line_payload(), FRAME_MAGIC, size);
    put32(line_payload() + size, number);
    line_commit(FRAME_READY, 0, (u32)size + 4);
    line_flush();
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

void line_send_u32(u8 type, u16 id, u32 value)
{
    /* Small frames come from a bounded number of events, and output leaves room for them (see process.c). */
    while (!line_has_room(4)) {
        struct pollfd ready = {line_fd, POLLOUT, 0};
        sys_poll(&ready, 1, -1);
        line_flush();
    }
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
    }
}

void line_drain(void)
{
    while (line_fd >= 0 && line_pending()) {
        struct pollfd ready = {line_fd, POLLOUT, 0};
        sys_poll(&ready, 1, -1);
        line_flush();
    }
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
        unacknowledged = (u32)arrived_size;
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
