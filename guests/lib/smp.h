/* Several processors: how a guest starts the others, gives them work, and sends them interrupts. */
#ifndef GUESTS_SMP_H
#define GUESTS_SMP_H

#include "lib.h"

#define MOST_PROCESSORS 16
extern volatile u32 processors_up; /* how many started since the last INIT of all, the first one included */

u32 processor_count(void);         /* as CPUID says */
u32 processor_number(void);        /* the APIC ID of the processor that asks */
void start_processors(void);       /* INIT and two start-up messages to all others; waits until they are here */
void start_processor(u32 number);  /* the same for one, without waiting */
/* Every processor, this one included, calls work(number); returns when all have come back. */
void on_all(void (*work)(u32 number));
/* The others call work(number) while this processor goes on; `join` waits for them. */
void on_others(void (*work)(u32 number));
void join(void);
void barrier(void);                /* waits until all processors are here; for use inside on_all */
void send_ipi(u32 number, u32 low); /* low: vector, delivery mode << 8, shorthand << 18 */
enum { IPI_NMI = 4 << 8, IPI_INIT = 5 << 8 | 1 << 14, IPI_STARTUP = 6 << 8 | 1 << 14, IPI_ALL = 2 << 18, IPI_OTHERS = 3 << 18 };
INSTRUCTION void eoi(void) { *apic(APIC_EOI) = 0; }

#endif
