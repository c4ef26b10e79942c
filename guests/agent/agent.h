/* What the agent's files share. */
#ifndef RINGZERO_AGENT_H
#define RINGZERO_AGENT_H

#include "frame.h"
#include "sys.h"

/* line.c: frames out and in. */
extern int line_fd; /* -1 when there is no agent port */
void line_find(void);                        /* open what leads to the host; line_fd stays -1 when nothing does */
long line_call(void);                        /* the same, by a socket to the host: 0, or -errno */
int line_port_is_there(int joined);          /* is there a virtio port for us, now, with the host at its other end? */
int line_may_move(void);                     /* is a faster line worth looking for? */
int line_is_busy(void);                      /* and even while there is work to do? */
void line_offer(void);                       /* tell the host of the virtio port, if it is there */
void line_take(int fd);                      /* use this descriptor */
void line_greet(int again);                  /* say READY; `again` when another agent may have spoken on this line before */
int line_ended(void);                        /* the other side of the line is gone */
int line_has_room(usize payload);            /* room for a frame with so much payload? */
u8 *line_payload(void);                      /* where the payload of the next frame goes */
void line_commit(u8 type, u16 id, u32 size); /* the payload is in its place: queue the frame */
void line_send_u32(u8 type, u16 id, u32 value);
int line_pending(void);
void line_flush(void);
void line_drain(void); /* wait until every queued byte has left the machine */
void line_receive(void);

/* process.c: commands that the host asked for. */
void process_exec(u16 id, u8 flags, u8 *payload, u32 size);
void process_stdin(u16 id, const u8 *data, u32 size);
void process_stdin_eof(u16 id);
void process_resize(u16 id, u16 rows, u16 columns);
void process_signal(u16 id, u32 number);
void process_taken(u16 id, int which, u32 size);
void process_close(u16 id, int which);
void process_forget_all(void); /* the host has forgotten them: end them */
int process_reap(int pid, int status); /* 1: it was one of ours */
int process_poll_list(struct pollfd *list);
void process_service(void); /* move what can be moved, report what has ended */
#define PROCESS_MAX 128
#define POLL_MAX (3 * PROCESS_MAX + 4)

/* builtin.c, tar_out.c, tar_in.c: what a child of the agent does itself, instead of another program. They return errno. */
long builtin_run(char **argv);
long builtin_fail(long error, const char *path); /* say on standard error what it was about, and return the errno */
const char *followed(const char *path);          /* where a link leads */
long tar_out(const char *path);
long tar_in(const char *path);
long write_all(int fd, const void *data, usize size); /* 0, or -errno */
long read_exactly(int fd, void *data, usize size);    /* bytes, fewer only at the end; or -errno */

/* agent.c */
void agent_frame(u8 type, u8 flags, u16 id, u8 *payload, u32 size);
void child_reset_signals(void);

/* mount.c: counts the folders of the host that the command line asks for, and mounts them if that is wanted. */
int mount_folders(const char *command_line, int really);

#endif
