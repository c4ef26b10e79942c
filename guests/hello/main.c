/* hello: says what machine it found itself on, and powers off.
 *
 * The guest inside the wheel: needs no download. It comes up by the PVH entry, goes to long mode itself, and prints on
 * COM1: how it was started, the memory map, what CPUID says, the time-stamp counter's rate against the PIT, periodic
 * interrupts from the PIT (through the PIC) and from the local APIC's timer, each really delivered while it sleeps in
 * HLT, and a page fault caught and reported. Then it powers off through the PM1a control port.
 *
 * Output depends on the machine: not for comparing engines.
 * Command line: `loop=N` prints N numbered lines, a second apart, before it ends (something to watch).
 */
#include "lib.h"

#define PIT_HZ 1193182u

static volatile u32 pit_ticks, apic_ticks;

static bool on_pit(struct frame *frame)
{
    (void)frame;
    pit_ticks++;
    out8(0x20, 0x20); /* end of interrupt */
    return true;
}


static bool on_apic_timer(struct frame *frame)
{
    (void)frame;
    apic_ticks++;
    *apic(0xb0) = 0; /* end of interrupt */
    return true;
}

static void say_how_started(const struct start_info *info)
{
    u64 cr0 = read_cr0(), cr4 = read_cr4(), efer = rdmsr(MSR_EFER);
    say("started by    %s\n", came_by_pvh ? "the PVH entry (32-bit protected mode, paging off)" : "the 64-bit entry");
    say("mode          %s, cr0 %lx, cr3 %lx, cr4 %lx, efer %lx, CPL %lu\n", efer & 0x400 ? "long mode" : "NOT long mode?", cr0,
        read_cr3(), cr4, efer, (u64)KERNEL_CS & 3);
    if (*command_line)
        say("command line  %s\n", command_line);
    if (!info || info->magic != 0x336ec578) {
        say("memory        no start_info was given\n");
        return;
    }
    if (info->version < 1)
        return;
    static const char *const kinds[] = { "?", "RAM", "reserved", "ACPI tables", "ACPI NVS", "unusable" };
    const struct memory_map_entry *rows = (const void *)info->memory_map;
    u64 ram = 0;
    for (u32 i = 0; i < info->memory_map_entries; i++) {
        say("memory        %012lx-%012lx %s\n", rows[i].address, rows[i].address + rows[i].size - 1,
            rows[i].type < ARRAY_LENGTH(kinds) ? kinds[rows[i].type] : "?");
        if (rows[i].type == 1)
            ram += rows[i].size;
    }
    say("              %lu MiB of RAM in all\n", ram >> 20);
    const char *rsdp = (const char *)info->rsdp;
    if (rsdp && starts_with(rsdp, "RSD PTR "))
        say("ACPI          RSDP at %lx\n", info->rsdp);
}

static void say_cpu(void)
{
    struct cpuid leaf = cpuid(0, 0);
    char text[49];
    u32 highest = leaf.a;
    memcpy(text, &leaf.b, 4), memcpy(text + 4, &leaf.d, 4), memcpy(text + 8, &leaf.c, 4);
    text[12] = 0;
    say("processor     %s, ", text);
    if (cpuid(0x80000000, 0).a >= 0x80000004) {
        for (u32 i = 0; i < 3; i++) {
            leaf = cpuid(0x80000002 + i, 0);
            memcpy(text + 16 * i, &leaf, 16);
        }
        text[48] = 0;
        const char *brand = text;
        while (*brand == ' ')
            brand++;
        say("%s", brand);
    }
    leaf = cpuid(1, 0);
    u32 family = leaf.a >> 8 & 15, model = leaf.a >> 4 & 15;
    if (family == 15 || family == 6)
        model |= leaf.a >> 12 & 0xf0;
    if (family == 15)
        family += leaf.a >> 20 & 0xff;
    say("\n              family %u, model %u, stepping %u, highest leaf %x\n", family, model, leaf.a & 15, highest);
    if (leaf.c >> 31) {
        struct cpuid hyper = cpuid(0x40000000, 0);
        memcpy(text, &hyper.b, 12);
        text[12] = 0;
        say("              under a hypervisor: %s\n", text);
    }
    static const struct {
        char leaf, reg, bit;
        const char *name;
    } features[] = {
        { 1, 'd', 0, "x87" }, { 1, 'd', 25, "sse" }, { 1, 'd', 26, "sse2" }, { 1, 'c', 0, "sse3" }, { 1, 'c', 9, "ssse3" },
        { 1, 'c', 19, "sse4.1" }, { 1, 'c', 20, "sse4.2" }, { 1, 'c', 23, "popcnt" }, { 1, 'c', 25, "aes" },
        { 1, 'c', 1, "pclmul" }, { 1, 'c', 22, "movbe" }, { 1, 'c', 26, "xsave" }, { 1, 'c', 28, "avx" }, { 1, 'c', 12, "fma" },
        { 1, 'c', 29, "f16c" }, { 1, 'c', 30, "rdrand" }, { 7, 'b', 3, "bmi1" }, { 7, 'b', 5, "avx2" }, { 7, 'b', 8, "bmi2" },
        { 7, 'b', 9, "erms" }, { 7, 'b', 19, "adx" }, { 7, 'b', 29, "sha" }, { 7, 'b', 7, "smep" }, { 7, 'b', 20, "smap" },
        { 7, 'c', 2, "umip" }, { 7, 'b', 0, "fsgsbase" }, { 1, 'c', 17, "pcid" }, { 7, 'b', 10, "invpcid" },
        { 1, 'c', 21, "x2apic" }, { 1, 'c', 24, "tsc-deadline" }, { 9, 'd', 20, "nx" }, { 9, 'd', 26, "1g-pages" },
        { 9, 'd', 27, "rdtscp" }, { 8, 'd', 8, "invariant-tsc" },
    };
    say("features     ");
    int column = 14;
    for (size_t i = 0; i < ARRAY_LENGTH(features); i++) {
        u32 number = features[i].leaf == 9 ? 0x80000001 : features[i].leaf == 8 ? 0x80000007 : (u32)features[i].leaf;
        if (number == 7 && highest < 7)
            continue;
        leaf = cpuid(number, 0);
        u32 word = features[i].reg == 'b' ? leaf.b : features[i].reg == 'c' ? leaf.c : leaf.d;
        if (!(word >> features[i].bit & 1))
            continue;
        int size = (int)strlen(features[i].name) + 1;
        if (column + size > 78) {
            say("\n             ");
            column = 14;
        }
        say(" %s", features[i].name);
        column += size;
    }
    say("\n");
}

/* How many TSC ticks pass while the PIT's channel 2 counts 10 ms down; no interrupt is needed for that. */
static u64 tsc_per_10ms(void)
{
    u32 count = PIT_HZ / 100;
    out8(0x61, (in8(0x61) & ~2) | 1); /* gate on, speaker off */
    out8(0x43, 0xb0);                 /* channel 2, low then high byte, mode 0 */
    out8(0x42, (u8)count);
    out8(0x42, (u8)(count >> 8));
    u64 start = rdtsc();
    while (!(in8(0x61) & 0x20))
        pause();
    return rdtsc() - start;
}

static void say_timers(void)
{
    u64 ticks = tsc_per_10ms();
    say("TSC           %lu.%03lu MHz by the PIT\n", ticks / 10000, ticks / 10 % 1000);

    pic_start();
    trap_handlers[0x20] = on_pit;
    out8(0x43, 0x34); /* channel 0, low then high byte, mode 2: rate generator */
    out8(0x40, (u8)(PIT_HZ / 100));
    out8(0x40, (u8)(PIT_HZ / 100 >> 8));
    out8(0x21, 0xfe);
    u64 start = rdtsc();
    while (pit_ticks < 10)
        sti_hlt();
    cli();
    u64 passed = (rdtsc() - start) / (ticks / 10 + 1);
    out8(0x21, 0xff);
    say("PIT           10 interrupts at 100 Hz through the PIC took %lu ms\n", passed);

    if (!has1d(9)) {
        say("local APIC    none\n");
        return;
    }
    say("local APIC    id %u, version %x, ", *apic(0x20) >> 24, *apic(0x30) & 0xff);
    trap_handlers[0x40] = on_apic_timer;
    *apic(0xf0) = 0x1ff;   /* enabled, spurious vector 0xff */
    *apic(0x3e0) = 0xb;    /* divide by 1 */
    *apic(0x320) = 0x10000; /* masked */
    *apic(0x380) = 0xffffffff;
    tsc_per_10ms();
    u32 rate = 0xffffffff - *apic(0x390);
    say("timer %u.%03u MHz\n", rate / 10000, rate / 10 % 1000);
    *apic(0x320) = 0x20040; /* periodic */
    *apic(0x380) = rate ? rate : 1;
    start = rdtsc();
    while (apic_ticks < 10)
        sti_hlt();
    cli();
    passed = (rdtsc() - start) / (ticks / 10 + 1);
    *apic(0x320) = 0x10000;
    *apic(0x380) = 0;
    say("              10 interrupts at 100 Hz from its timer took %lu ms\n", passed);
}

static void touch(void *address) { store32((u64)address, 42); }

static void say_page_fault(void)
{
    u64 vector = catch(touch, (void *)0xffff800012345678ull);
    if (vector == PF)
        say("page fault    caught: %s by %s code to a %s page at %lx, rip %lx\n", last_trap.frame.error & 2 ? "write" : "read",
            last_trap.frame.error & 4 ? "user" : "kernel", last_trap.frame.error & 1 ? "protected" : "missing", last_trap.cr2,
            last_trap.frame.rip);
    else
        say("page fault    NOT raised: vector %lu\n", vector);
}

void guest_main(const struct start_info *info)
{
    say("\nhello from ring zero\n\n");
    say_how_started(info);
    say_cpu();
    say_timers();
    say_page_fault();
    if (starts_with(command_line, "loop=")) {
        u32 lines = 0;
        for (const char *p = command_line + 5; *p >= '0' && *p <= '9'; p++)
            lines = lines * 10 + (u32)(*p - '0');
        for (u32 i = 1; i <= lines; i++) {
            pit_ticks = 0;
            out8(0x21, 0xfe);
            while (pit_ticks < 100)
                sti_hlt();
            cli();
            out8(0x21, 0xff);
            say("tick          %u\n", i);
        }
    }
    say("\npowering off through the PM1a control port\n");
    power_off();
}
