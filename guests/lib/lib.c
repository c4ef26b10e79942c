/* The body of lib.h: start-up in C, traps, output, page tables, results. */
#include "lib.h"

const char *command_line = "";
unsigned failures;
struct trap_record last_trap;
trap_handler trap_handlers[256];
struct tss tss;
u8 user_stack[8192] __attribute__((aligned(4096)));
u8 ist_stacks[7][4096] __attribute__((aligned(4096)));
u8 trap_stack[16384] __attribute__((aligned(4096)));

struct gate {
    u16 offset_low, selector;
    u8 ist, attributes;
    u16 offset_middle;
    u32 offset_high, reserved;
} __attribute__((packed));
static struct gate idt[256] __attribute__((aligned(16)));
struct table_pointer {
    u16 limit;
    u64 base;
} __attribute__((packed));

extern u8 catch_landing[];

/* ---- output ---- */

static void put(char c)
{
    while (!(in8(0x3fd) & 0x20)) /* line status: transmitter holding register empty */
        pause();
    out8(0x3f8, (u8)c);
}

static void put_char(char c)
{
    if (c == '\n')
        put('\r');
    put(c);
}

static void put_padded(const char *text, size_t size, int width, bool left)
{
    for (int i = (int)size; !left && i < width; i++)
        put_char(' ');
    for (size_t i = 0; i < size; i++)
        put_char(text[i]);
    for (int i = (int)size; left && i < width; i++)
        put_char(' ');
}

static void put_number(u64 value, unsigned base, bool negative, int width, bool zero, bool left)
{
    char digits[24];
    int at = sizeof digits;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (zero && (int)sizeof digits - at < width && at > 1)
        digits[--at] = '0';
    if (negative)
        digits[--at] = '-';
    put_padded(digits + at, sizeof digits - (size_t)at, width, left);
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (const char *p = format; *p; p++) {
        if (*p != '%') {
            put_char(*p);
            continue;
        }
        bool zero = false, left = false, wide = false;
        int width = 0;
        for (p++; *p == '0' || *p == '-'; p++)
            *p == '0' ? (zero = true) : (left = true);
        for (; *p >= '0' && *p <= '9'; p++)
            width = width * 10 + (*p - '0');
        for (; *p == 'l'; p++)
            wide = true;
        switch (*p) {
        case 'c':
            put_char((char)va_arg(arguments, int));
            break;
        case 's': {
            const char *text = va_arg(arguments, const char *);
            put_padded(text, strlen(text), width, left);
            break;
        }
        case 'd': {
            s64 value = wide ? va_arg(arguments, s64) : va_arg(arguments, int);
            put_number(value < 0 ? -(u64)value : (u64)value, 10, value < 0, width, zero, left);
            break;
        }
        case 'u':
        case 'x': {
            u64 value = wide ? va_arg(arguments, u64) : va_arg(arguments, unsigned);
            put_number(value, *p == 'u' ? 10 : 16, false, width, zero, left);
            break;
        }
        case 'p':
            put_number((u64)va_arg(arguments, void *), 16, false, 16, true, false);
            break;
        case 0:
            p--;
            break;
        default:
            put_char(*p);
        }
    }
    va_end(arguments);
}

void check(const char *name, u64 got, u64 want)
{
    if (got == want) {
        say("ok %s\n", name);
    } else {
        failures++;
        say("FAIL %s got 0x%lx want 0x%lx\n", name, got, want);
    }
}

void check_true(const char *name, bool holds) { check(name, holds, 1); }

void skip(const char *name, const char *why) { say("skip %s %s\n", name, why); }

void power_off(void)
{
    cli();
    while (!(in8(0x3fd) & 0x40)) /* let the last byte leave */
        pause();
    out16(0x604, 0x3400); /* PM1a control, SLP_EN with our S5 type (5) ... */
    out16(0x604, 0x2000); /* ... and with QEMU's PIIX4 type (0) */
    for (;;)
        asm volatile("cli; hlt");
}

void finish(void)
{
    if (failures)
        say("FAIL %u\n", failures);
    else
        say("PASS\n");
    power_off();
}

/* ---- small things that C wants ---- */

void *memset(void *at, int byte, size_t size)
{
    void *start = at;
    asm volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *start = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const u8 *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i])
            return x[i] < y[i] ? -1 : 1;
    return 0;
}

size_t strlen(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

bool starts_with(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

u64 digest(u64 before, u64 value)
{
    for (int i = 0; i < 8; i++) {
        before = (before ^ (value & 0xff)) * 0x100000001b3ull;
        value >>= 8;
    }
    return before;
}

bool is_intel(void) { return cpuid(0, 0).b == 0x756e6547; } /* "Genu" */

bool under_qemu(void) { return has1c(31) && cpuid(0x40000000, 0).b == 0x54474354; } /* "TCGT" */

/* ---- traps ---- */

void set_gate(unsigned vector, void *handler, unsigned ist, unsigned dpl, unsigned type)
{
    u64 at = (u64)handler;
    idt[vector] = (struct gate){ .offset_low = (u16)at, .selector = KERNEL_CS, .ist = (u8)ist,
                                 .attributes = (u8)(0x80 | dpl << 5 | type),
                                 .offset_middle = (u16)(at >> 16), .offset_high = (u32)(at >> 32) };
}

void on_trap(struct frame *frame);
void on_trap(struct frame *frame)
{
    u64 cr2 = read_cr2();
    trap_handler handler = trap_handlers[frame->vector];
    if (handler && handler(frame))
        return;
    last_trap.frame = *frame;
    last_trap.cr2 = cr2;
    last_trap.handler_rsp = (u64)frame;
    last_trap.count++;
    if (recover_rsp) {
        frame->rax = frame->vector;
        frame->rip = (u64)catch_landing;
        frame->cs = KERNEL_CS;
        frame->rflags = 2;
        frame->rsp = recover_rsp;
        frame->ss = KERNEL_DS;
        return;
    }
    say("FAIL unexpected-trap vector %lu error 0x%lx rip 0x%lx cr2 0x%lx rsp 0x%lx cs 0x%lx rflags 0x%lx\n", frame->vector,
        frame->error, frame->rip, cr2, frame->rsp, frame->cs, frame->rflags);
    failures++;
    finish();
}

u64 run_user(u64 rip, u64 rsp, u64 cs, u64 rflags, struct user_state *registers)
{
    struct user_state state = { 0 };
    if (registers)
        state = *registers;
    state.rip = rip;
    state.rsp = rsp;
    state.cs = cs;
    state.ss = USER_DS;
    state.rflags = rflags | 2;
    u64 vector = catch(enter_user, &state);
    /* DS and ES keep whatever user code left in them, which no 64-bit code looks at. */
    return vector;
}

void check_trap(const char *name, u64 got, u64 vector, u64 error, u64 rip)
{
    const struct frame *frame = &last_trap.frame;
    if (got == vector && (got == NO_TRAP || (frame->error == error && (!rip || frame->rip == rip)))) {
        say("ok %s\n", name);
        return;
    }
    failures++;
    if (got == NO_TRAP)
        say("FAIL %s got no trap want vector %lu error 0x%lx\n", name, vector, error);
    else
        say("FAIL %s got vector %lu error 0x%lx rip 0x%lx cr2 0x%lx want vector %lu error 0x%lx rip 0x%lx\n", name, got, frame->error,
            frame->rip, last_trap.cr2, vector, error, rip);
}

void expect_trap(const char *name, void *function, void *argument, u64 vector, u64 error, u64 rip)
{
    u64 got = catch((void (*)(void *))function, argument);
    check_trap(name, got, vector, error, rip);
}

void expect_page_fault(const char *name, void *function, u64 address, u64 error, u64 cr2)
{
    u64 got = catch((void (*)(void *))function, (void *)address);
    if (got == PF && last_trap.cr2 != cr2) {
        failures++;
        say("FAIL %s got cr2 0x%lx want 0x%lx\n", name, last_trap.cr2, cr2);
        return;
    }
    check_trap(name, got, PF, error, 0);
}

static void set_up_traps(void)
{
    for (unsigned vector = 0; vector < 256; vector++)
        set_gate(vector, trap_stubs[vector], 0, vector == 3 || vector == 4 || vector == 0x80 ? 3 : 0, GATE_INTERRUPT);
    for (int i = 0; i < 7; i++)
        tss.ist[i] = (u64)(ist_stacks[i] + sizeof ist_stacks[i]);
    tss.rsp[0] = (u64)(trap_stack + sizeof trap_stack);
    tss.io_map = sizeof tss; /* beyond the limit: no port for user code */
    u64 base = (u64)&tss, limit = sizeof tss - 1;
    gdt[TSS_SELECTOR / 8] = (limit & 0xffff) | (base & 0xffffff) << 16 | 0x89ull << 40 | (limit >> 16 & 0xf) << 48 | (base >> 24 & 0xff) << 56;
    gdt[TSS_SELECTOR / 8 + 1] = base >> 32;
    struct table_pointer pointer = { sizeof idt - 1, (u64)idt };
    asm volatile("lidt %0" ::"m"(pointer));
    asm volatile("ltr %w0" ::"r"(TSS_SELECTOR));
}

/* ---- interrupt controllers ---- */

void pic_start(void)
{
    out8(0x20, 0x11), out8(0xa0, 0x11); /* ICW1: edge, cascade, ICW4 follows */
    out8(0x21, 0x20), out8(0xa1, 0x28); /* ICW2: vectors 0x20.. and 0x28.. */
    out8(0x21, 4), out8(0xa1, 2);       /* ICW3: the second on line 2 */
    out8(0x21, 1), out8(0xa1, 1);       /* ICW4: 8086 mode */
    out8(0x21, 0xff), out8(0xa1, 0xff);
    if (!has1d(9))
        return;
    /* Virtual wire mode (MultiProcessor Specification 1.4, 3.6.2.2), which firmware may have left, or not. */
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | 0x800);
    *apic(APIC_SVR) = 0x1ff;   /* on, spurious vector 0xff */
    *apic(APIC_LINT0) = 0x700; /* ExtINT */
}

/* ---- page tables ---- */

static u8 pages[256][4096] __attribute__((aligned(4096)));
static unsigned pages_taken;

void *take_page(void)
{
    if (pages_taken == ARRAY_LENGTH(pages)) {
        say("FAIL out-of-pages\n");
        failures++;
        finish();
    }
    return memset(pages[pages_taken++], 0, 4096);
}

u64 *entry_of(u64 root, u64 address, int level)
{
    u64 *table = (u64 *)(root & PTE_ADDRESS);
    for (int at = 4;; at--) {
        u64 *entry = &table[address >> (3 + 9 * at) & 511];
        if (at == level)
            return entry;
        if (!(*entry & PTE_P))
            *entry = (u64)take_page() | PTE_P | PTE_W | PTE_U;
        table = (u64 *)(*entry & PTE_ADDRESS);
    }
}

void map(u64 address, u64 physical, u64 flags) { *entry_of(read_cr3(), address, 1) = physical | flags; }

void allow_user(void)
{
    boot_pml4[0] |= PTE_U;
    for (int i = 0; i < 4; i++)
        boot_pdpt[i] |= PTE_U;
    for (int i = 0; i < 2048; i++)
        boot_pd[i] |= PTE_U;
    write_cr3(read_cr3());
}

/* ---- start ---- */

void lib_main(const struct start_info *info);
void lib_main(const struct start_info *info)
{
    out8(0x3f9, 0);    /* no UART interrupts */
    out8(0x3fb, 0x80); /* divisor latch */
    out8(0x3f8, 1);    /* 115200 baud */
    out8(0x3f9, 0);
    out8(0x3fb, 3); /* 8 data bits, no parity, 1 stop bit */
    out8(0x3fa, 7); /* FIFOs on and empty */
    out8(0x3fc, 3); /* DTR, RTS */
    out8(0x21, 0xff); /* both PICs silent until a guest wants them */
    out8(0xa1, 0xff);
    set_up_traps();
    if (info && info->magic == 0x336ec578 && info->command_line)
        command_line = (const char *)info->command_line;
    guest_main(info);
    finish();
}
