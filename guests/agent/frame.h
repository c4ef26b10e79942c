/*
 * The words that the host and the agent speak over a raw stream: the second serial port, or a virtio console port. The
 * Python side is python/ringzero/machine/frames.py; a test holds the two lists of numbers equal.
 *
 * A frame is an 8-byte header and a payload of at most FRAME_MAX bytes to the agent and OUTPUT_MAX from it; numbers are
 * little-endian:
 *
 *     u8 type | u8 flags | u16 id | u32 size | payload
 *
 * `id` names a process; the host chooses it, and may use it again after EXIT or FAILED came for it.
 *
 * The agent begins with READY: a magic word and a number of its own. The host answers with HELLO, the same word and number:
 * whatever came before it was meant for an agent that is gone. An agent that was started again cannot know in the middle of
 * which frame the last one ended: it sends enough zeros first to fill any (header type 0 says: look for READY).
 *
 * A serial port is there at once, but slow; the driver of a console port is one that the first command would have to wait
 * for. So an agent begins on the one, and says OFFER when it has found the other. When the host has joined that, it says MOVE,
 * and the agent MOVED: the last that either sends on the one line, and what follows goes over the other, where it begins with
 * READY and HELLO, of the same number as before. The windows are those of both lines together. An agent that was started again
 * begins on the first line.
 *
 * Three windows keep either side from sending what the other has no place for. Linux drops bytes that a serial driver
 * received while 64 KiB of them wait for a reader (drivers/tty/tty_buffer.c, Linux 6.1, TTYB_DEFAULT_MEM_LIMIT), and a
 * plain serial line has nothing to say "wait" with:
 *   - the line: of all bytes that the host sends, headers included, at most LINE_WINDOW may lack an ACK;
 *   - a process's standard input: at most STDIN_WINDOW bytes may lack a CREDIT;
 *   - each of a process's outputs: at most OUTPUT_WINDOW bytes may lack a TAKEN. Further output waits in the process's own
 *     pipe, and then the process does, as under a shell: a stream that nobody reads holds up its writer alone. What is in
 *     the pipe of a process that has ended comes at once, up to OUTPUT_LEFT, so that its end is known.
 */
#ifndef RINGZERO_FRAME_H
#define RINGZERO_FRAME_H

#define FRAME_MAGIC "ringzero-agent-2\n" /* READY and HELLO: this, then u32 number */

enum {
    FRAME_HEADER = 8,
    FRAME_MAX = 32768,
    OUTPUT_MAX = 65536,
    LINE_WINDOW = 32768,
    STDIN_WINDOW = 65536,
    OUTPUT_WINDOW = 262144,
    OUTPUT_LEFT = 1048576, /* the largest pipe of a user who is not root (pipe(7), "/proc files") */
    CONSOLE_ID = 0xffff, /* id of RESIZE for the console's window */
};

/* From the host. */
enum {
    FRAME_EXEC = 1,      /* u16 argc, u16 envc, u16 rows, u16 columns, credentials if any, then NUL-ended: directory,
                            argv, env */
    FRAME_STDIN = 2,     /* bytes */
    FRAME_STDIN_EOF = 3, /* nothing */
    FRAME_RESIZE = 4,    /* u16 rows, u16 columns */
    FRAME_SIGNAL = 5,    /* u32 number, for the process's whole group */
    FRAME_POWEROFF = 6,  /* nothing */
    FRAME_REBOOT = 7,    /* nothing */
    FRAME_TAKEN = 8,     /* u32: so many more bytes of an output were taken; flags: of which, 0 stdout or 1 stderr */
    FRAME_CLOSE = 9,     /* nobody reads an output any more: its writer gets SIGPIPE; flags as of TAKEN */
    FRAME_HELLO = 10,    /* FRAME_MAGIC and the number of READY */
    FRAME_MOVE = 11,     /* nothing: what follows comes over the port that was offered */
};

/* From the agent. */
enum {
    FRAME_READY = 0x81,   /* FRAME_MAGIC, u32 number */
    FRAME_STDOUT = 0x82,  /* bytes; with FLAG_TTY all output comes this way */
    FRAME_STDERR = 0x83,  /* bytes */
    FRAME_EXIT = 0x84,    /* u32: wait status as waitpid gives it; all output came before */
    FRAME_FAILED = 0x85,  /* u32: errno, and what it was about; the process was not started */
    FRAME_CREDIT = 0x86,  /* u32: so many more bytes of standard input were taken */
    FRAME_ACK = 0x87,     /* u32: so many more bytes of the line were read (id is 0) */
    FRAME_STARTED = 0x88, /* u32: the process's number in the guest; for FLAG_TELL */
    FRAME_OFFER = 0x89,   /* nothing: the console port is there */
    FRAME_MOVED = 0x8a,   /* nothing: what follows comes over it */
};

/* With the errno of FAILED: it was not the command itself. */
enum {
    FAILED_DIRECTORY = 0x10000,
    FAILED_CREDENTIALS = 0x20000,
};

/* Flags of EXEC. */
enum {
    FLAG_TTY = 1,          /* give the process a terminal of its own */
    FLAG_NO_STDIN = 2,     /* standard input is /dev/null */
    FLAG_NO_STDOUT = 4,    /* so is standard output */
    FLAG_NO_STDERR = 8,    /* and standard error */
    FLAG_JOIN = 16,        /* standard error goes where standard output does */
    FLAG_CREDENTIALS = 32, /* after the columns: u32 user, u32 group, u32 umask, u32 count, u32 groups[count]; 0xffffffff
                              leaves one as it is, and as count the groups */
    FLAG_BUILTIN = 64,     /* argv names one of the agent's own (builtin.c): its exit status is an errno */
    FLAG_TELL = 128,       /* say STARTED: whoever waits for the end alone is spared it */
};

#endif
