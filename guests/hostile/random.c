/* hostile/random: runs random bytes as kernel code, again and again.
 *
 * Each round fills a page with bytes from a generator (seed: `seed=N` on the command line, so that a round can be repeated),
 * jumps into it, and lets whatever trap comes bring it back. Rounds end after `rounds=N` (default 2000) or when the bytes
 * manage to lose the way back: a triple fault, a halt with interrupts off, a port that ends the machine, a loop.
 * The monitor must survive: every end is fine but a defect of its own. Output: not for comparing engines.
 */
#include "../lib/lib.h"

static u64 state = 88172645463325252ull;
static u64 next(void) /* xorshift64 */
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static u64 number_after(const char *text, const char *key, u64 otherwise)
{
    for (; *text; text++) {
        if (!starts_with(text, key))
            continue;
        u64 value = 0;
        for (text += strlen(key); *text >= '0' && *text <= '9'; text++)
            value = value * 10 + (u64)(*text - '0');
        return value;
    }
    return otherwise;
}

static u8 code[4096] __attribute__((aligned(4096)));
static volatile u64 ticks;

static bool on_tick(struct frame *frame) /* gets a round out of an endless loop */
{
    (void)frame;
    out8(0x20, 0x20);
    return ++ticks % 4 != 0; /* false: as a trap, back to catch() */
}

CODE(run, "sti\nmovq %rdi, %rax\nmovl $0x1000000, %edi\nmovl $0x1010000, %esi\nmovl $64, %ecx\nxorl %ebx, %ebx\ncall *%rax\nret");

void guest_main(const struct start_info *info)
{
    (void)info;
    u64 seed = number_after(command_line, "seed=", 1), rounds = number_after(command_line, "rounds=", 2000);
    state ^= seed * 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < 16; i++)
        next();
    pic_start();
    trap_handlers[0x20] = on_tick;
    out8(0x43, 0x34), out8(0x40, 0x00), out8(0x40, 0x10); /* 3.4 ms */
    out8(0x21, 0xfe);
    set_gate(DF, trap_stubs[DF], 1, 0, GATE_INTERRUPT);
    set_gate(PF, trap_stubs[PF], 2, 0, GATE_INTERRUPT);
    set_gate(GP, trap_stubs[GP], 3, 0, GATE_INTERRUPT);
    set_gate(SS, trap_stubs[SS], 4, 0, GATE_INTERRUPT);
    set_gate(0x20, trap_stubs[0x20], 5, 0, GATE_INTERRUPT);
    say("random bytes, seed %lu, %lu rounds\n", seed, rounds);
    u64 seen[257] = { 0 };
    for (u64 round = 0; round < rounds; round++) {
        for (size_t i = 0; i < sizeof code; i += 8)
            *(u64 *)(code + i) = next();
        code[sizeof code - 1] = 0xcc;
        seen[catch((void (*)(void *))run, code + (round * 64 & 0xfc0)) & 0x1ff]++;
        cli();
        if (round % 100 == 99)
            say("round %lu\n", round + 1);
    }
    for (u32 i = 0; i < 257; i++)
        if (seen[i])
            say("vector %u: %lu\n", i, seen[i]);
    say("PASS\n");
    power_off();
}
