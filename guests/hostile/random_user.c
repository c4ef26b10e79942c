/* hostile/random_user: runs random bytes as user code: a sandboxed attacker that can only compute.
 *
 * As hostile/random, but at CPL 3, in 64-bit and compatibility mode by turns, with its code and stack the only pages that
 * it may write. The kernel around it must stay whole: it checks a checksum of itself after every round. A PASS means that
 * no round touched what it must not. Output: which traps came; the same on every engine for the same seed, but for the few
 * rounds that branch on a flag that the manual leaves undefined.
 */
#include "../lib/lib.h"

static u64 state = 88172645463325252ull;
static u64 next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

#define V 0x7000000000ull /* 448 GiB: for 64-bit code */
#define LOW 0xd0000000ull /* below 4 GiB, for compatibility mode: page directory entry 1664 is given a table */
static volatile u64 ticks; /* in this round */

static bool on_tick(struct frame *frame)
{
    out8(0x20, 0x20);
    /* Out of user code, which may loop for ever. The first tick may have waited since before the round, and a busy host
     * may delay a round that ends: so not the first ones. */
    return (frame->cs & 3) == 0 || ++ticks < 4;
}

CODE(store_at_0, "movq (%rsi), %rax\nmovq %rax, 0x40\nstore_at_0_end:");
LABEL(store_at_0_end);

static u64 checksum(void)
{
    u64 sum = DIGEST_START;
    for (u64 *at = (u64 *)0x100000; at < (u64 *)0x102000; at++)
        sum = digest(sum, *at);
    return sum;
}

void guest_main(const struct start_info *info)
{
    (void)info;
    pic_start();
    trap_handlers[0x20] = on_tick;
    out8(0x43, 0x34), out8(0x40, 0x00), out8(0x40, 0x10);
    u8 *code = take_page(), *stack = take_page();
    boot_pml4[0] |= PTE_U;
    boot_pdpt[3] |= PTE_U;
    boot_pd[LOW >> 21] = (u64)take_page() | PTE_P | PTE_W | PTE_U;
    write_cr3(read_cr3());
    map(LOW, (u64)code, PTE_P | PTE_W | PTE_U);
    map(LOW + 0x2000, (u64)stack, PTE_P | PTE_W | PTE_U);
    boot_pdpt[V >> 30 & 511] |= PTE_U;
    map(V, (u64)code, PTE_P | PTE_W | PTE_U);
    map(V + 0x2000, (u64)stack, PTE_P | PTE_W | PTE_U);
    /* A store to page 0, in a small TLB the neighbour of the page at V, which holds code and was just read. */
    memcpy(code, store_at_0, store_at_0_end - store_at_0);
    struct user_state at_v = { .rsi = V };
    check_trap("store-at-0", run_user(V, V + 0x2800, USER_CS, 0, &at_v), PF, 7, V + 3);
    u64 before = checksum(), seen[257] = { 0 };
    for (u64 round = 0; round < 3000; round++) {
        bool compat = round & 1;
        for (size_t i = 0; i < 4096; i += 8)
            *(u64 *)(code + i) = next();
        struct user_state registers = { .rdi = compat ? LOW + 0x2000 : V + 0x2000, .rbx = next(), .rcx = 64, .rdx = next(), .rax = next() };
        registers.rsi = registers.rdi + 512;
        u64 base = compat ? LOW : V;
        ticks = 0;
        out8(0x21, 0xfe);
        u64 vector = run_user(base + (round * 64 & 0xfc0), base + 0x2800, compat ? USER_CS32 : USER_CS, FLAG_IF, &registers);
        out8(0x21, 0xff);
        asm volatile("movl %0, %%ds; movl %0, %%es" ::"r"(KERNEL_DS));
        seen[vector & 0x1ff]++;
        if (checksum() != before) {
            say("FAIL kernel-changed in round %lu\n", round);
            failures++;
            finish();
        }
    }
    for (u32 i = 0; i < 257; i++)
        if (seen[i])
            say("vector %u: %lu\n", i, seen[i]);
}
