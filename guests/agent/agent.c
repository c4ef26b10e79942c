/*
 * /init of the guest images: makes the file systems ready, then serves the console, the host, or both. Started as any other
 * process (a service of a whole system) it serves the host alone, and with --fd N over that descriptor.
 *
 * What it does is chosen by words on the kernel command line (the kernel keeps words with a dot from init's
 * environment, so they are read from /proc/cmdline):
 *   ringzero.shell      a login shell on the console; the machine powers off when it ends
 *   ringzero.agent      commands from the host (frame.h), over the second serial port, and from soon after the
 *                       first one over a virtio console port named org.ringzero.agent, where there is one
 *   ringzero.agent=port the same over that port, which is waited for
 *   ringzero.agent=vsock
 *                       the same over a socket to the host
 *   ringzero.disks      the drivers of disks, before anything else
 *   ringzero.mmio       that of devices without a bus, too
 *   ringzero.ports      the driver of named ports, likewise
 *   ringzero.vsock      that of sockets between guest and host, likewise
 *   ringzero.mount=...  a folder of the host, likewise (mount.c)
 *   ringzero.net        the drivers of network cards, and an address for each, before anything else
 *   ringzero.poweroff   power off at once: what the boot bench measures
 * With none of them: a shell, so that the image also works in another machine.
 *
 * busybox's poweroff, reboot and halt ask process 1 by signal (busybox 1.35, init/halt.c), and are answered.
 */
#include "agent.h"

static char command_line[4096];
static int console_pid;
static int others_loaded;
static int seeker; /* the child that looks for a better line: 0 none yet, -1 when it has ended */
static int is_init;

void *memcpy(void *to, const void *from, usize size)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return start;
}

void *memmove(void *to, const void *from, usize size)
{
    if (to <= from || (u8 *)to >= (u8 *)from + size)
        return memcpy(to, from, size);
    for (usize i = size; i > 0; i--)
        ((volatile u8 *)to)[i - 1] = ((const u8 *)from)[i - 1];
    return to;
}

void *memset(void *to, int value, usize size)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, usize size)
{
    const volatile u8 *x = a, *y = b;
    for (usize i = 0; i < size; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

/* The kernel gives process 1 the console as its descriptors 0, 1 and 2 (init/main.c console_on_rootfs, Linux 6.1). */
static void say(const char *text)
{
    sys_write(1, text, length(text));
}

static void read_command_line(void)
{
    int fd = (int)sys_open("/proc/cmdline", O_RDONLY);
    if (fd >= 0) {
        sys_read(fd, command_line, sizeof command_line - 1);
        sys_close(fd);
    }
}

/* Is `word` on the command line, alone or as word=1? */
static int asked(const char *word)
{
    usize size = length(word);
    for (char *at = command_line; *at;) {
        while (*at == ' ' || *at == '\n')
            at++;
        if (memcmp(at, word, size) == 0) {
            char after = at[size];
            if (after == 0 || after == ' ' || after == '\n' || (after == '=' && at[size + 1] != '0'))
                return 1;
        }
        while (*at && *at != ' ' && *at != '\n')
            at++;
    }
    return 0;
}

/* A system with an init of its own is asked: systemd's signals (systemd(1), version 252, "SIGNALS"), as halt and poweroff use
 * them; the first real-time signal is 34. */
#define SYSTEMD_POWEROFF (34 + 4)
#define SYSTEMD_REBOOT (34 + 5)

static void end(long how)
{
    if (!is_init) {
        sys_kill(1, how == REBOOT_RESTART ? SYSTEMD_REBOOT : SYSTEMD_POWEROFF);
        return;
    }
    line_drain();
    /* The kernel does not wait for a terminal's queue before it powers off: the last words would be lost. */
    sys_ioctl(1, TCSBRK, (void *)1);
    sys_sync();
    sys_reboot(how);
    for (;;)
        sys_poll(0, 0, -1);
}

void child_reset_signals(void)
{
    u64 none = 0, as_by_default[4] = {0};
    sys_mask(SIG_SETMASK, &none);
    sys_sigaction(SIGPIPE, as_by_default); /* systemd starts its services with it ignored, and that is inherited */
}

static void prepare(void)
{
    sys_mount("devtmpfs", "/dev", "devtmpfs", "mode=0755");
    sys_mkdir("/dev/pts", 0755);
    sys_mkdir("/dev/shm", 01777);
    sys_mount("devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666");
    sys_mount("tmpfs", "/dev/shm", "tmpfs", "mode=1777");
    sys_mount("sysfs", "/sys", "sysfs", 0);
    sys_mount("tmpfs", "/run", "tmpfs", "mode=0755");
    sys_mount("tmpfs", "/tmp", "tmpfs", "mode=1777");
    sys_symlink("/proc/self/fd", "/dev/fd");
    sys_symlink("fd/0", "/dev/stdin");
    sys_symlink("fd/1", "/dev/stdout");
    sys_symlink("fd/2", "/dev/stderr");
    sys_sethostname("ringzero", 8);
}

static int load(const char *path)
{
    int fd = (int)sys_open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    long result = sys_finit_module(fd);
    sys_close(fd);
    return result == 0;
}

/* Each after those that it needs. What is built into the kernel has no file here. */
static const char *const virtio_modules[] = {
    "/lib/modules/virtio_ring.ko",
    "/lib/modules/virtio.ko",
    "/lib/modules/virtio_pci_legacy_dev.ko",
    "/lib/modules/virtio_pci_modern_dev.ko",
    "/lib/modules/virtio_pci.ko",
    0,
};
static const char *const mmio_modules[] = {"/lib/modules/virtio_mmio.ko", 0};
static const char *const disk_modules[] = {"/lib/modules/virtio_blk.ko", 0};
static const char *const port_modules[] = {"/lib/modules/virtio_console.ko", 0};
static const char *const folder_modules[] = {"/lib/modules/fuse.ko", "/lib/modules/virtiofs.ko", 0};
static const char *const vsock_modules[] = {
    "/lib/modules/vsock.ko",
    "/lib/modules/vmw_vsock_virtio_transport_common.ko",
    "/lib/modules/vmw_vsock_virtio_transport.ko",
    0,
};
static const char *const network_modules[] = {
    "/lib/modules/failover.ko",
    "/lib/modules/net_failover.ko",
    "/lib/modules/virtio_net.ko",
    0,
};
/* The first two tell the machine of a panic through its pvpanic port. */
static const char *const other_modules[] = {
    "/lib/modules/pvpanic.ko",
    "/lib/modules/pvpanic-mmio.ko",
    "/lib/modules/virtio_balloon.ko",
    "/lib/modules/virtio-rng.ko",
    0,
};

/* The files go when they are loaded: they are memory, and nobody loads them again. */
static void load_all(const char *const *paths)
{
    for (; *paths; paths++)
        if (load(*paths))
            sys_unlink(*paths);
}

static void load_virtio(void)
{
    load_all(virtio_modules);
    if (asked("ringzero.mmio"))
        load_all(mmio_modules);
}

/* What nobody waits for, when the machine first idles: a child does it, and commands go on meanwhile. */
static void load_others(void)
{
    others_loaded = 1;
    if (sys_fork() != 0)
        return;
    load_virtio();
    load_all(other_modules);
    sys_exit(0);
}

/*
 * The virtio port's driver comes when the host has spoken, so that a machine that nobody asks for anything is spared it; and no
 * command waits for it. A system with an init of its own has its drivers loaded, if it wants any.
 */
static void seek_port(void)
{
    seeker = (int)sys_fork();
    if (seeker != 0)
        return;
    if (is_init) {
        load_virtio();
        load_all(port_modules);
    }
    /* The port has its name a moment after its driver is loaded, when the device has answered. */
    for (int tries = 400; tries && !line_port_is_there(0); tries--)
        sys_poll(0, 0, 5);
    sys_exit(0);
}

/* The first command finds the network there, so it is waited for: a few hundredths of a second. */
static void start_network(void)
{
    static char *argv[] = {"/etc/network", 0};
    static char *env[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", 0};
    int status, pid = (int)sys_fork();
    if (pid == 0) {
        sys_execve("/etc/network", argv, env);
        sys_exit(127);
    }
    if (pid > 0)
        sys_wait(pid, &status, 0);
}

static void start_shell(void)
{
    static char term[64] = "TERM=linux";
    static char *argv[] = {"-sh", 0};
    static char *env[] = {"HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "USER=root", "LOGNAME=root",
                          "SHELL=/bin/sh", term, 0};
    console_pid = (int)sys_fork();
    if (console_pid != 0)
        return;
    for (char *at = command_line; *at; at++)
        if ((at == command_line || at[-1] == ' ') && memcmp(at, "TERM=", 5) == 0)
            for (usize i = 5; i < sizeof term - 1; i++) {
                term[i] = at[i] > ' ' ? at[i] : 0;
                if (!term[i])
                    break;
            }
    sys_setsid();
    child_reset_signals();
    /* /dev/console cannot be a controlling terminal (no job control, no Ctrl-C); the port behind it can. */
    int fd = (int)sys_open("/dev/ttyS0", O_RDWR);
    if (fd < 0)
        fd = (int)sys_open("/dev/console", O_RDWR);
    sys_ioctl(fd, TIOCSCTTY, (void *)1);
    for (int i = 0; i < 3; i++)
        sys_dup2(fd, i);
    if (fd > 2)
        sys_close(fd);
    sys_chdir("/root");
    sys_execve("/bin/sh", argv, env);
    say("ringzero: /bin/sh could not be started\n");
    sys_exit(127);
}

static void reap(void)
{
    int status, pid;
    while ((pid = (int)sys_wait(-1, &status, WNOHANG)) > 0)
        if (process_reap(pid, status))
            continue;
        else if (pid == seeker) {
            seeker = -1;
            line_offer();
        } else if (pid == console_pid)
            end(REBOOT_POWER_OFF);
}

static void read_signals(int fd)
{
    u32 info[32]; /* struct signalfd_siginfo: 128 bytes, the number first */
    while (sys_read(fd, info, sizeof info) == sizeof info) {
        if (!is_init && info[0] == SIGTERM) {
            process_forget_all();
            sys_exit(0);
        }
        switch (is_init ? info[0] : 0) {
        case SIGUSR2: end(REBOOT_POWER_OFF); break;
        case SIGUSR1: end(REBOOT_POWER_OFF); break; /* halt: a halted machine is of no use to anyone */
        case SIGTERM: end(REBOOT_RESTART); break;
        }
    }
    reap(); /* SIGCHLD, of which one may stand for several */
}

void agent_frame(u8 type, u8 flags, u16 id, u8 *payload, u32 size)
{
    u16 rows = 0, columns = 0;
    switch (type) {
    case FRAME_EXEC: process_exec(id, flags, payload, size); break;
    case FRAME_STDIN: process_stdin(id, payload, size); break;
    case FRAME_STDIN_EOF: process_stdin_eof(id); break;
    case FRAME_RESIZE:
        if (size < 4)
            break;
        rows = (u16)(payload[0] | payload[1] << 8);
        columns = (u16)(payload[2] | payload[3] << 8);
        if (id == CONSOLE_ID) {
            struct winsize window = {rows, columns, 0, 0};
            int console = (int)sys_open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_NONBLOCK);
            if (console >= 0) {
                sys_ioctl(console, TIOCSWINSZ, &window);
                sys_close(console);
            }
        } else
            process_resize(id, rows, columns);
        break;
    case FRAME_SIGNAL:
        if (size >= 4)
            process_signal(id, payload[0]);
        break;
    case FRAME_TAKEN:
        if (size >= 4)
            process_taken(id, flags, payload[0] | payload[1] << 8 | payload[2] << 16 | (u32)payload[3] << 24);
        break;
    case FRAME_CLOSE: process_close(id, flags); break;
    case FRAME_POWEROFF: end(REBOOT_POWER_OFF); break;
    case FRAME_REBOOT: end(REBOOT_RESTART); break;
    }
}

/* One look for what leads to the host, as the command line wants it. */
static void find_host(void)
{
    if (asked("ringzero.agent=vsock"))
        line_call();
    else
        line_find();
}

static void serve(int signals)
{
    static struct pollfd list[POLL_MAX];
    for (;;) {
        int count = 0;
        list[count++] = (struct pollfd){signals, POLLIN, 0};
        if (line_fd >= 0)
            list[count++] = (struct pollfd){line_fd, (short)(POLLIN | (line_pending() ? POLLOUT : 0)), 0};
        count += process_poll_list(list + count);
        int may_seek = seeker == 0 && line_may_move();
        long ready = sys_poll(list, count, may_seek || (!others_loaded && seeker <= 0) ? 50 : -1);
        if (may_seek && (ready == 0 || line_is_busy()))
            seek_port();
        else if (ready == 0) {
            load_others();
            continue;
        }
        if (line_fd >= 0)
            line_receive();
        if (line_fd >= 0 && line_ended()) {
            process_forget_all();
            if (!is_init)
                sys_exit(0); /* a service is started again, and looks for its port again */
            sys_close(line_fd);
            line_fd = -1;
            for (int tries = 200; tries && line_fd < 0; tries--) {
                find_host();
                if (line_fd < 0)
                    sys_poll(0, 0, 10);
            }
            if (line_fd >= 0)
                line_greet(1);
        }
        read_signals(signals);
        process_service();
        if (line_fd >= 0)
            line_flush();
    }
}

static u64 watch(void)
{
    return 1UL << (SIGUSR1 - 1) | 1UL << (SIGUSR2 - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGCHLD - 1);
}

static int watch_signals(void)
{
    u64 watched = watch(), blocked = watched | 1UL << (SIGPIPE - 1);
    sys_mask(SIG_BLOCK, &blocked);
    return (int)sys_signalfd(&watched, O_NONBLOCK | O_CLOEXEC);
}

/* Life as a service, or as a test's other side. */
static void serve_beside_others(int count, char **arguments)
{
    int signals = watch_signals();
    others_loaded = 1;
    if (count == 3 && length(arguments[1]) == 4 && memcmp(arguments[1], "--fd", 4) == 0) {
        int fd = 0;
        for (const char *c = arguments[2]; *c >= '0' && *c <= '9'; c++)
            fd = 10 * fd + *c - '0';
        line_take(fd);
        line_greet(0);
        serve(signals);
    }
    read_command_line();
    for (find_host(); line_fd < 0; find_host()) {
        struct pollfd end = {signals, POLLIN, 0}; /* the port's driver may not be there yet */
        sys_poll(&end, 1, 1000);
        read_signals(signals);
    }
    line_greet(1);
    serve(signals);
}

/* Called by _start below, with the stack as the kernel made it: the number of arguments, and pointers to them. */
__attribute__((used)) static void agent_main(long *stack)
{
    int fd, shell, agent;
    is_init = sys_getpid() == 1;
    if (!is_init)
        serve_beside_others((int)stack[0], (char **)(stack + 1));
    /* Without a console the first descriptors would be taken for other things, and given to commands as theirs. */
    while ((fd = (int)sys_open("/dev/null", O_RDWR)) >= 0 && fd < 3)
        ;
    if (fd >= 0)
        sys_close(fd);
    sys_mount("proc", "/proc", "proc", 0);
    read_command_line();
    if (asked("ringzero.poweroff")) {
        say("ringzero: /init reached\n");
        end(REBOOT_POWER_OFF);
    }
    prepare();
    if (asked("ringzero.disks")) {
        load_virtio();
        load_all(disk_modules);
    }
    if (asked("ringzero.ports") || asked("ringzero.agent=port")) {
        load_virtio();
        load_all(port_modules);
    }
    if (asked("ringzero.vsock") || asked("ringzero.agent=vsock")) {
        load_virtio();
        load_all(vsock_modules);
    }
    if (mount_folders(command_line, 0)) {
        load_virtio();
        load_all(folder_modules);
        mount_folders(command_line, 1);
    }
    if (asked("ringzero.net")) {
        load_virtio();
        load_all(network_modules);
        start_network();
    }
    int signals = watch_signals();
    agent = asked("ringzero.agent");
    shell = asked("ringzero.shell") || !agent;
    if (agent) {
        for (int tries = 200; tries && asked("ringzero.agent=port") && !line_port_is_there(1); tries--)
            sys_poll(0, 0, 5);
        find_host();
        if (line_fd < 0)
            say("ringzero: nothing here leads the agent to the host\n");
        else
            line_greet(0);
    }
    if (shell)
        start_shell();
    serve(signals);
}

/* The kernel enters here with the stack pointer on argc: align it as the ABI wants it before a call. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall agent_main\n\thlt\n");
