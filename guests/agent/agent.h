/* What the agent's files share. */
#ifndef RINGZERO_AGENT_H
#define RINGZERO_AGENT_H

#include "frame.h"
#include "sys.h"

/* line.c: frames out and in. */
extern int line_fd; /* -1 when there is no agent port */
void line_open(void);
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
int process_reap(int pid, int status); /* 1: it was one of ours */
int process_poll_list(struct pollfd *list);
void process_service(void); /* move what can be moved, report what has ended */
#define PROCESS_MAX 32
#define POLL_MAX (3 * PROCESS_MAX + 4)

/* agent.c */
void agent_frame(u8 type, u8 flags, u16 id, u8 *payload, u32 size);
void child_reset_signals(void);

/* mount.c: counts the folders of the host that the command line asks for, and mounts them if that is wanted. */
int mount_folders(const char *command_line, int really);

#endif
