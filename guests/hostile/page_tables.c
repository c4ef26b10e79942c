/* hostile/page_tables: rewrites its own page tables, GDT and IDT at random while it runs on them.
 *
 * First a part that stays recoverable: random entries in a region of its own, tables that map themselves and each other,
 * with every access caught. Then large pages, tables in device space and beyond RAM, and jumps into all of it. Then the
 * tables that it stands on, until it falls over.
 * Every end is fine but a defect of the monitor's. Output: not for comparing engines.
 */
#include "../lib/lib.h"

#define V 0x8000000000ull

static u64 state = 88172645463325252ull;
static u64 next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static volatile u64 ticks;
static bool on_tick(struct frame *frame) /* gets it out of an endless loop that it wrote for itself */
{
    (void)frame;
    out8(0x20, 0x20);
    return !recover_rsp || ++ticks % 4 != 0;
}

static bool wild; /* jump as well, and map anything */

static void touch(void *at)
{
    sti();
    switch (wild ? next() & 3 : next() & 1) {
    case 0: (void)*(volatile u64 *)at; break;
    case 1: *(volatile u64 *)at = next() & 0xfff; break;
    case 2: ((void (*)(void))at)(); break;
    default: asm volatile("lock incq (%0)" ::"r"(at) : "memory", "cc");
    }
}

void guest_main(const struct start_info *info)
{
    (void)info;
    for (int v = 8; v < 15; v++)
        set_gate((unsigned)v, trap_stubs[v], 1, 0, GATE_INTERRUPT);
    pic_start();
    trap_handlers[0x20] = on_tick;
    set_gate(0x20, trap_stubs[0x20], 2, 0, GATE_INTERRUPT);
    out8(0x43, 0x34), out8(0x40, 0x00), out8(0x40, 0x10); /* 3.4 ms */
    out8(0x21, 0xfe);
    u64 *table[3] = { take_page(), take_page(), take_page() };
    u8 *page = take_page();
    memset(page, 0xc3, 4096); /* RET */
    say("random page tables\n");
    boot_pml4[1] = (u64)table[0] | PTE_P | PTE_W | PTE_U;
    u64 seen[257] = { 0 };
    for (u64 round = 0; round < 20000; round++) {
        wild = round >= 15000;
        u64 *in = table[next() % 3];
        u64 targets[] = { (u64)page, (u64)table[0], (u64)table[1], (u64)table[2], (u64)boot_pml4, 0xfee00000, 0xfec00000, 0xd0000000,
                          0x123456789000, next() & PTE_ADDRESS };
        u64 target = targets[next() % (wild ? ARRAY_LENGTH(targets) : 4)];
        /* Tables may not become writable data by chance while the kernel still wants to go on: RET bytes are harmless. */
        in[next() & 7] = target | (next() & (PTE_P | PTE_W | PTE_U | PTE_A | PTE_D | PTE_G | (wild && !(next() & 7) ? PTE_PS : 0))) | (next() & 31 ? PTE_P : 0);
        if (next() & 1)
            write_cr3(read_cr3());
        u64 address = V | (next() & 7) << 30 | (next() & 7) << 21 | (next() & 7) << 12 | (next() & 0xff8);
        seen[catch(touch, (void *)address) & 0x1ff]++;
        boot_pml4[1] = (u64)table[0] | PTE_P | PTE_W | PTE_U;
        if (round % 1000 == 999)
            say("round %lu\n", round + 1);
    }
    say("page faults %lu, protection faults %lu, none %lu\n", seen[PF], seen[GP], seen[NO_TRAP]);
    say("now the ground that it stands on\n");
    for (;;) {
        u64 *tables[] = { boot_pml4, boot_pdpt, boot_pd, gdt };
        u64 *in = tables[next() & 3];
        in[next() & 511] = next() & 1 ? next() : in[next() & 511];
        write_cr3(read_cr3());
        catch(touch, (void *)(next() & 0xffffff));
    }
}
