/* hostile/sprayer: writes random values to every I/O port and over the device hole, reads them all, and does it again.
 *
 * Ports that end the machine (0x604 power-off, 0xcf9 and 0x64 reset, 0x505 panic) and the one it prints on come last, in
 * the second pass, so that everything else is sprayed first. Every end is fine but a defect of the monitor's.
 * Output: not for comparing engines.
 */
#include "../lib/lib.h"

static u64 state = 88172645463325252ull;
static u64 next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static bool ends_the_machine(u32 port)
{
    return (port >= 0x3f8 && port <= 0x3ff) || (port >= 0x600 && port <= 0x607) || (port >= 0xcf6 && port <= 0xcff) ||
           (port >= 0x60 && port <= 0x64) || (port >= 0x502 && port <= 0x505) || port == 0x92;
}

static void spray_ports(bool all)
{
    for (u32 port = 0; port < 0x10000; port++) {
        if (ends_the_machine(port) != all)
            continue;
        u64 value = next();
        switch (next() & 3) {
        case 0: out8((u16)port, (u8)value); break;
        case 1: out16((u16)port, (u16)value); break;
        case 2: out32((u16)port, (u32)value); break;
        default: in8((u16)port), in16((u16)port), in32((u16)port);
        }
    }
}

static void spray_memory(u64 from, u64 to, u64 step)
{
    for (u64 at = from; at < to; at += step) {
        u64 value = next();
        switch (next() & 7) {
        case 0: *(volatile u8 *)at = (u8)value; break;
        case 1: *(volatile u16 *)(at + 1) = (u16)value; break;
        case 2: *(volatile u32 *)at = (u32)value; break;
        case 3: *(volatile u64 *)(at + 4) = value; break;
        case 4: asm volatile("lock addl %1, (%0)" ::"r"(at), "r"((u32)value) : "memory", "cc"); break;
        case 5: asm volatile("movups %%xmm0, (%0); movups (%0), %%xmm1" ::"r"(at + 8) : "memory"); break;
        case 6: { u64 di = at, cx = 4; asm volatile("cld; rep stosl" : "+D"(di), "+c"(cx) : "a"((u32)value) : "memory"); break; }
        default: (void)*(volatile u64 *)at;
        }
    }
}

static void run_at(void *address) { ((void (*)(void))address)(); }

void guest_main(const struct start_info *info)
{
    (void)info;
    say("spraying ports\n");
    spray_ports(false);
    say("spraying the device hole\n");
    spray_memory(0xfec00000, 0xfec01000, 4);
    spray_memory(0xfee00000, 0xfee01000, 4);
    spray_memory(0xc0000000, 0x100000000, 0x10fff4);
    spray_memory(0xa0000, 0xe0000, 0x10c);
    say("running in the device hole\n");
    for (u64 at = 0xd0000000; at < 0xfff00000; at += 0x3f00010)
        catch(run_at, (void *)at);
    cli();
    say("spraying the ports that end the machine\n");
    for (int pass = 0; pass < 50; pass++)
        spray_ports(true);
    power_off();
}
