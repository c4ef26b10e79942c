/*
 * The words that the host and the agent speak over the second serial port, in raw mode. The Python side is
 * python/ringzero/machine/exec.py; a test holds the two lists of numbers equal.
 *
 * A frame is an 8-byte header and a payload of at most FRAME_MAX bytes; numbers are little-endian:
 *
 *     u8 type | u8 flags | u16 id | u32 size | payload
 *
 * `id` names a process; the host chooses it, and may use it again after EXIT or FAILED came for it.
 *
 * Two windows keep the host from sending what the guest has no place for. Linux drops bytes that a serial driver
 * received while 64 KiB of them wait for a reader (drivers/tty/tty_buffer.c, Linux 6.1, TTYB_DEFAULT_MEM_LIMIT), and a
 * plain serial line has nothing to say "wait" with:
 *   - the line: of all bytes that the host sends, headers included, at most LINE_WINDOW may lack an ACK;
 *   - a process's standard input: at most STDIN_WINDOW bytes may lack a CREDIT.
 * The other way needs neither: the serial port of the machine waits while the host does not read.
 */
#ifndef RINGZERO_FRAME_H
#define RINGZERO_FRAME_H

#define FRAME_MAGIC "ringzero-agent-1\n" /* payload of READY; the host skips what comes before it */

enum {
    FRAME_HEADER = 8,
    FRAME_MAX = 32768,
    LINE_WINDOW = 32768,
    STDIN_WINDOW = 65536,
    CONSOLE_ID = 0xffff, /* id of RESIZE for the console's window */
};

/* From the host. */
enum {
    FRAME_EXEC = 1,      /* u16 argc, u16 envc, u16 rows, u16 columns, then NUL-ended: directory, argv, env */
    FRAME_STDIN = 2,     /* bytes */
    FRAME_STDIN_EOF = 3, /* nothing */
    FRAME_RESIZE = 4,    /* u16 rows, u16 columns */
    FRAME_SIGNAL = 5,    /* u32 number, for the process's whole group */
    FRAME_POWEROFF = 6,  /* nothing */
    FRAME_REBOOT = 7,    /* nothing */
};

/* From the agent. */
enum {
    FRAME_READY = 0x81,  /* FRAME_MAGIC */
    FRAME_STDOUT = 0x82, /* bytes; with FLAG_TTY all output comes this way */
    FRAME_STDERR = 0x83, /* bytes */
    FRAME_EXIT = 0x84,   /* u32: wait status as waitpid gives it; all output came before */
    FRAME_FAILED = 0x85, /* u32: errno; the process was not started */
    FRAME_CREDIT = 0x86, /* u32: so many more bytes of standard input were taken */
    FRAME_ACK = 0x87,    /* u32: so many more bytes of the line were read (id is 0) */
};

/* Flags of EXEC. */
enum {
    FLAG_TTY = 1,      /* give the process a terminal of its own */
    FLAG_NO_STDIN = 2, /* standard input is /dev/null */
};

#endif
