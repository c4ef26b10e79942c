/* interrupts: the PICs, the PIT, the I/O APIC and the local APIC, with interrupts really delivered.
 *
 * PIT through the PIC and through the I/O APIC (pin 2), masking, HLT and its wake-up, the shadow of STI and MOV SS, the
 * local APIC's timer one-shot, periodic and by TSC deadline, self-IPIs and their priorities against TPR and CR8, NMI, level
 * and edge from the UART, the PM timer's rate against the PIT. x2APIC where CPUID has it. Times are checked for "not too
 * early" only, since a busy host may delay anything. Output: the same on every run and engine, but for skipped features.
 */
#include "lib.h"

#define PIT_HZ 1193182u
static volatile u64 counts[256], order;
static volatile u64 rip_at[256];

static bool count_pic(struct frame *frame)
{
    counts[frame->vector]++;
    rip_at[frame->vector] = frame->rip;
    if (frame->vector >= 0x28)
        out8(0xa0, 0x20);
    out8(0x20, 0x20);
    return true;
}
static bool x2apic;
static u64 apic_read(u32 offset) { return x2apic ? rdmsr(0x800 + offset / 16) : *apic(offset); }
static void apic_write(u32 offset, u64 value)
{
    if (x2apic)
        wrmsr(0x800 + offset / 16, value);
    else
        *apic(offset) = (u32)value;
}
static bool count_apic(struct frame *frame)
{
    counts[frame->vector]++;
    rip_at[frame->vector] = frame->rip;
    order = order << 8 | frame->vector;
    apic_write(APIC_EOI, 0);
    return true;
}
static bool count_plain(struct frame *frame)
{
    counts[frame->vector]++;
    return true;
}
static void send_nmi(void)
{
    u32 id = (u32)apic_read(APIC_ID);
    if (x2apic) {
        wrmsr(0x830, (u64)id << 32 | 0x400);
    } else {
        *apic(APIC_ICR_HIGH) = id;
        *apic(APIC_ICR) = 0x400;
    }
}
static volatile u64 nested_inside;
/* The first NMI sends another, and notes how many had come when it returns. */
static bool nest_nmi(struct frame *frame)
{
    if (++counts[frame->vector] == 1) {
        send_nmi();
        for (int i = 0; i < 100; i++)
            pause();
        nested_inside = counts[frame->vector];
    }
    return true;
}

/* Wait with interrupts on until counts[vector] reaches want; false when 5 s pass on the PIT's channel 2. */
static bool wait_for(u32 vector, u64 want, bool halt)
{
    for (u32 i = 0; i < 100 && counts[vector] < want; i++) {
        out8(0x61, (in8(0x61) & ~2) | 1);
        out8(0x43, 0xb0);
        out8(0x42, 0xff), out8(0x42, 0xff); /* 55 ms */
        while (counts[vector] < want && !(in8(0x61) & 0x20)) {
            if (halt)
                sti_hlt();
            else
                asm volatile("sti; nop; nop");
        }
    }
    cli();
    return counts[vector] >= want;
}

static void pit_mode(u8 mode, u16 count)
{
    out8(0x43, (u8)(0x30 | mode << 1));
    out8(0x40, (u8)count);
    out8(0x40, (u8)(count >> 8));
}

/* PIT channel 2 for `ms` milliseconds, while interrupts stay as they are. */
static void delay(u32 ms)
{
    for (; ms; ms--) {
        out8(0x61, (in8(0x61) & ~2) | 1);
        out8(0x43, 0xb0);
        out8(0x42, (u8)(PIT_HZ / 1000)), out8(0x42, (u8)(PIT_HZ / 1000 >> 8));
        while (!(in8(0x61) & 0x20))
            pause();
    }
}

static void test_pic(void)
{
    pic_start();
    for (int i = 0x20; i < 0x30; i++)
        trap_handlers[i] = count_pic;
    check("pic-masks-read-back", in8(0x21) << 8 | in8(0xa1), 0xffff);
    pit_mode(2, PIT_HZ / 200);
    delay(12);
    sti();
    asm volatile("nop; nop");
    cli();
    check("pic-masked", counts[0x20], 0);
    out8(0x20, 0x0a); /* read IRR */
    check("pic-irr", in8(0x20) & 1, 1);
    out8(0x21, 0xfe);
    check("pit-by-pic", wait_for(0x20, 3, true), 1);
    u64 before = counts[0x20];
    check("pit-by-pic-spinning", wait_for(0x20, before + 2, false), 1);
    out8(0x21, 0xff);
    before = counts[0x20];
    sti();
    delay(15);
    cli();
    check("pit-masked-again", counts[0x20] - before, 0);
    /* One-shot: mode 0 raises its line once. */
    pit_mode(0, 1000);
    counts[0x20] = 0;
    out8(0x21, 0xfe);
    wait_for(0x20, 1, true);
    sti();
    delay(5);
    cli();
    check("pit-one-shot", counts[0x20] >= 1 && counts[0x20] <= 2, 1); /* one more may have been latched before */
    out8(0x21, 0xff);
    /* The counter counts down: latch it twice. */
    pit_mode(2, 0);
    out8(0x43, 0);
    u32 first = in8(0x40);
    first |= (u32)in8(0x40) << 8;
    delay(1);
    out8(0x43, 0);
    u32 second = in8(0x40);
    second |= (u32)in8(0x40) << 8;
    u32 passed = (first - second) & 0xffff;
    check_true("pit-latch", passed >= 1000);
    out8(0x43, 0xe2); /* read back: status of channel 0 */
    check("pit-read-back-mode", in8(0x40) & 0x3f, 0x34);
}

CODE(sti_shadow, "cli\nsti\nsti_shadow_1: nop\nsti_shadow_2: nop\ncli\nret");
LABEL(sti_shadow_2);
CODE(sti_cli, "sti\ncli\nnop\nret");
CODE(popf_now, "pushfq\norq $0x200, (%rsp)\npopfq\npopf_now_1: nop\ncli\nret");
LABEL(popf_now_1);

static void test_apic_basics(void)
{
    for (int i = 0x40; i < 0x100; i++)
        trap_handlers[i] = count_apic;
    apic_write(APIC_TPR, 0);
    check("apic-version", apic_read(APIC_VERSION) & 0xf0, 0x10);
    check("apic-enabled", rdmsr(MSR_APIC_BASE) & 0xfffff900, 0xfee00900);
    /* A self-IPI is pending until interrupts are on. */
    apic_write(APIC_ICR, 0x40000 | 0x50);
    check("ipi-pending", apic_read(APIC_IRR + 0x20) >> 16 & 1, 1);
    check("ipi-not-yet", counts[0x50], 0);
    sti();
    asm volatile("nop");
    cli();
    check("ipi", counts[0x50], 1);
    check("ipi-irr-clear", apic_read(APIC_IRR + 0x20) | apic_read(APIC_ISR + 0x20), 0);
    apic_write(APIC_ICR, 0x40000 | 0x51);
    ((void (*)(void))sti_shadow)();
    check("sti-shadow", rip_at[0x51], (u64)sti_shadow_2);
    apic_write(APIC_ICR, 0x40000 | 0x52);
    ((void (*)(void))sti_cli)();
    check("sti-cli", counts[0x52], 0);
    ((void (*)(void))popf_now)();
    check("popf-no-shadow", rip_at[0x52], (u64)popf_now_1);
    /* Higher classes first; within one, higher vectors. */
    order = 0;
    apic_write(APIC_ICR, 0x40000 | 0x61);
    apic_write(APIC_ICR, 0x40000 | 0x92);
    apic_write(APIC_ICR, 0x40000 | 0x63);
    apic_write(APIC_ICR, 0x40000 | 0x83);
    sti();
    asm volatile("nop; nop; nop; nop; nop");
    cli();
    check("ipi-order", order, 0x92836361);
    /* TPR holds back its class and below. */
    write_cr8(8);
    apic_write(APIC_ICR, 0x40000 | 0x84);
    apic_write(APIC_ICR, 0x40000 | 0x94);
    order = 0;
    sti();
    asm volatile("nop; nop");
    check("tpr-holds-back", order, 0x94);
    write_cr8(7);
    asm volatile("nop; nop");
    cli();
    check("tpr-lowered", order, 0x9484);
    write_cr8(0);
    /* A handler is interrupted by a higher class only: seen by EOI order. NMI by the ICR comes with IF clear. */
    trap_handlers[NMI] = count_plain;
    send_nmi();
    for (int i = 0; i < 100 && !counts[NMI]; i++)
        pause();
    check("nmi", counts[NMI], 1);
    /* One that comes while its handler runs waits for the handler's IRET. */
    trap_handlers[NMI] = nest_nmi;
    counts[NMI] = nested_inside = 0;
    send_nmi();
    for (int i = 0; i < 100 && counts[NMI] < 2; i++)
        pause();
    check("nmi-held-back", nested_inside, 1);
    check("nmi-after-iret", counts[NMI], 2);
    trap_handlers[NMI] = NULL;
    /* An interrupt wakes HLT, with the rip after it. */
    apic_write(APIC_ICR, 0x40000 | 0x55);
    sti_hlt();
    cli();
    check("hlt-wakes", counts[0x55], 1);
}

static void test_apic_timer(void)
{
    apic_write(APIC_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, 0x10000);
    apic_write(APIC_INITIAL, 0xffffffff);
    u32 start = (u32)apic_read(APIC_CURRENT);
    delay(10);
    u32 per_10ms = start - (u32)apic_read(APIC_CURRENT);
    check_true("timer-counts", per_10ms > 1000);
    apic_write(APIC_INITIAL, 0);
    check("timer-stopped", apic_read(APIC_CURRENT), 0);
    apic_write(APIC_LVT_TIMER, 0x70);
    apic_write(APIC_INITIAL, per_10ms / 5);
    check("timer-one-shot", wait_for(0x70, 1, true), 1);
    check("timer-one-shot-zero", apic_read(APIC_CURRENT), 0);
    sti();
    delay(6);
    cli();
    check("timer-one-shot-once", counts[0x70], 1);
    apic_write(APIC_LVT_TIMER, 0x20071);
    apic_write(APIC_INITIAL, per_10ms / 5);
    check("timer-periodic", wait_for(0x71, 5, true), 1);
    check("timer-periodic-spinning", wait_for(0x71, counts[0x71] + 3, false), 1);
    apic_write(APIC_LVT_TIMER, 0x30071); /* masked */
    sti();
    delay(3); /* what was pending comes */
    u64 before = counts[0x71];
    delay(6);
    cli();
    check("timer-masked", counts[0x71] - before, 0);
    /* The interrupt of a moment in which CR8 keeps changing above it comes when CR8 is below its class, and not before. */
    apic_write(APIC_LVT_TIMER, 0x73);
    write_cr8(7);
    sti();
    apic_write(APIC_INITIAL, per_10ms / 5);
    for (u32 i = 0; i < 20000 || apic_read(APIC_CURRENT); i++)
        write_cr8(7 + i % 9);
    write_cr8(12);
    delay(3);
    for (u32 i = 15; i >= 7; i--)
        write_cr8(i);
    check("cr8-holds-timer", counts[0x73], 0);
    write_cr8(6);
    cli();
    check("cr8-lowered", wait_for(0x73, 1, false), 1);
    check("cr8-still", read_cr8() << 8 | apic_read(APIC_TPR), 0x660);
    write_cr8(0);
    apic_write(APIC_INITIAL, 0);
    apic_write(APIC_DIVIDE, 0x3); /* by 16: slower */
    apic_write(APIC_LVT_TIMER, 0x10000);
    u32 slower = 0;
    bool divides = false;
    /* A host that takes the processor away in the middle makes one try worthless, but not all of them. */
    for (u32 tries = 0; tries < 50 && !divides; tries++) {
        apic_write(APIC_INITIAL, 0xffffffff);
        start = (u32)apic_read(APIC_CURRENT);
        delay(10);
        slower = start - (u32)apic_read(APIC_CURRENT);
        divides = slower < per_10ms / 4 && slower > per_10ms / 64;
    }
    check_true("timer-divides", divides);
    apic_write(APIC_INITIAL, 0);
    if (!has1c(24)) {
        skip("tsc-deadline", "not in CPUID");
        return;
    }
    apic_write(APIC_LVT_TIMER, 0x40072);
    asm volatile("mfence");
    u64 now = rdtsc();
    delay(5);
    u64 per_5ms = rdtsc() - now;
    u64 deadline, armed;
    u32 passed = 0;
    do {
        asm volatile("sti; nop; nop; cli"); /* what an earlier try made pending */
        counts[0x72] = 0;
        deadline = rdtsc() + per_5ms;
        wrmsr(MSR_TSC_DEADLINE, deadline);
        armed = rdmsr(MSR_TSC_DEADLINE);
    } while (rdtsc() >= deadline && ++passed < 50);
    check("tsc-deadline-armed", armed, deadline);
    check("tsc-deadline", wait_for(0x72, 1, true), 1);
    check_true("tsc-deadline-not-early", rdtsc() >= deadline);
    check("tsc-deadline-cleared", rdmsr(MSR_TSC_DEADLINE), 0);
    wrmsr(MSR_TSC_DEADLINE, 1); /* long past */
    check("tsc-deadline-past", wait_for(0x72, 2, true), 1);
    u64 came;
    passed = 0;
    do {
        came = counts[0x72];
        deadline = rdtsc() + per_5ms;
        wrmsr(MSR_TSC_DEADLINE, deadline);
        wrmsr(MSR_TSC_DEADLINE, 0);
        armed = rdtsc() < deadline;
        sti();
        delay(10);
        cli();
    } while (!armed && ++passed < 50);
    check("tsc-deadline-disarmed", counts[0x72] - came, 0);
    apic_write(APIC_LVT_TIMER, 0x10000);
}

static u32 ioapic_read(u32 index) { return store32(0xfec00000, index), load32(0xfec00010); }
static void ioapic_write(u32 index, u32 value) { store32(0xfec00000, index), store32(0xfec00010, value); }
static void route(u32 pin, u32 low)
{
    ioapic_write(0x10 + 2 * pin, 0x10000);
    ioapic_write(0x11 + 2 * pin, x2apic ? 0 : (u32)apic_read(APIC_ID) & 0xff000000);
    ioapic_write(0x10 + 2 * pin, low);
}

static void test_ioapic(void)
{
    check("ioapic-pins", ioapic_read(1) >> 16 & 0xff, 23);
    check("ioapic-masked-at-start", ioapic_read(0x14) & 0x10000, 0x10000);
    ioapic_write(0x14, 0x10000 | 0xa0);
    check("ioapic-reads-back", ioapic_read(0x14) & 0x1ffff, 0x100a0);
    pit_mode(2, PIT_HZ / 200);
    route(2, 0xa0);
    check("pit-by-ioapic", wait_for(0xa0, 3, true), 1);
    route(2, 0x100a0);
    sti();
    delay(1);
    u64 before = counts[0xa0];
    delay(12);
    cli();
    check("ioapic-masks", counts[0xa0] - before, 0);
    pit_mode(0, 0);
    /* COM1's transmitter: an interrupt when the holding register is empty. Pin 4. */
    route(4, 0xa4);
    in8(0x3fa);
    out8(0x3fc, in8(0x3fc) | 8); /* OUT2 lets the line out */
    out8(0x3f9, 2);
    bool came = wait_for(0xa4, 1, false);
    u32 which = in8(0x3fa) & 0xf, after = in8(0x3fa) & 0xf; /* before anything is printed through the same UART */
    out8(0x3f9, 0);
    check("uart-by-ioapic", came, 1);
    check("uart-says-which", which << 8 | after, 0x201);
    route(4, 0x10000);
}

static void test_pm_timer(void)
{
    u32 start = in32(0x608) & 0xffffff;
    delay(20);
    u32 passed = (in32(0x608) - start) & 0xffffff;
    check_true("pm-timer-not-slow", passed >= 3579545 / 50 * 9 / 10);
    u64 tsc = rdtsc();
    delay(1);
    check_true("tsc-moves", rdtsc() > tsc);
}

CODE(x2apic_reserved, "movl $0x802, %ecx\nxorl %eax, %eax\nxorl %edx, %edx\nx2apic_reserved_at: wrmsr\nret");
LABEL(x2apic_reserved_at);

static void test_x2apic(void)
{
    if (!has1c(21)) {
        skip("x2apic", "not in CPUID");
        return;
    }
    u32 id = *apic(APIC_ID) >> 24;
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | 0x400);
    x2apic = true;
    check("x2apic-id", apic_read(APIC_ID), id);
    check("x2apic-cpuid-id", cpuid(0xb, 0).d, id);
    for (int i = 0; i < 256; i++)
        counts[i] = 0;
    wrmsr(0x83f, 0x56); /* SELF IPI */
    sti();
    asm volatile("nop");
    cli();
    check("x2apic-self-ipi", counts[0x56], 1);
    test_apic_basics();
    test_apic_timer();
    test_ioapic();
    expect_trap("x2apic-read-only", x2apic_reserved, NULL, GP, 0, (u64)x2apic_reserved_at);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    test_pic();
    if (!has1d(9)) {
        skip("apic", "not in CPUID");
        return;
    }
    *apic(APIC_LINT0) = 0x10000; /* the PICs are done */
    test_apic_basics();
    test_apic_timer();
    test_ioapic();
    test_pm_timer();
    test_x2apic();
}
