/* Several processors; see smp.h. */
#include "smp.h"

#define TRAMPOLINE 0x70000ull

volatile u32 processors_up = 1;
extern u8 ap_start[], ap_end[];
u8 ap_stacks[MOST_PROCESSORS][16384] __attribute__((aligned(16)));
void ap_main(u32 number);
struct __attribute__((packed)) { u16 limit; u64 base; } idt_pointer; /* of the first processor; all share it */

static void (*volatile work_of[MOST_PROCESSORS])(u32);
static volatile u32 parties, waiting, phase;

u32 processor_count(void) { return cpuid(0, 0).a >= 0xb && cpuid(0xb, 1).b ? cpuid(0xb, 1).b : cpuid(1, 0).b >> 16 & 0xff; }

u32 processor_number(void) { return cpuid(1, 0).b >> 24; }

void send_ipi(u32 number, u32 low)
{
    *apic(APIC_ICR_HIGH) = number << 24;
    *apic(APIC_ICR) = low;
    while (*apic(APIC_ICR) & 1 << 12)
        pause();
}

/* Where every other processor ends up: it works when told to, and sleeps a little in between. */
void ap_main(u32 number)
{
    *apic(APIC_SVR) = 0x1ff;
    asm volatile("lock incl %0" : "+m"(processors_up));
    for (;;) {
        void (*work)(u32) = work_of[number];
        if (work) {
            work(number);
            work_of[number] = NULL;
        }
        pause();
    }
}

void start_processor(u32 number)
{
    asm volatile("sidt %0" : "=m"(idt_pointer));
    memcpy((void *)TRAMPOLINE, ap_start, (size_t)(ap_end - ap_start));
    work_of[number] = NULL;
    send_ipi(number, IPI_INIT);
    send_ipi(number, IPI_STARTUP | TRAMPOLINE >> 12);
    send_ipi(number, IPI_STARTUP | TRAMPOLINE >> 12); /* a processor that runs already ignores it */
}

void start_processors(void)
{
    processors_up = 1;
    for (u32 i = 1; i < processor_count(); i++)
        start_processor(i);
    while (processors_up < processor_count())
        pause();
    parties = processor_count();
}

void on_others(void (*work)(u32))
{
    for (u32 i = 1; i < parties; i++)
        work_of[i] = work;
}

void join(void)
{
    for (u32 i = 1; i < parties; i++)
        while (work_of[i])
            pause();
}

void on_all(void (*work)(u32))
{
    on_others(work);
    work(0);
    join();
}

void barrier(void)
{
    u32 now = phase, here = 1;
    asm volatile("lock xaddl %0, %1" : "+r"(here), "+m"(waiting));
    if (here + 1 == parties) {
        waiting = 0;
        phase = now + 1;
    } else {
        while (phase == now)
            pause();
    }
}
