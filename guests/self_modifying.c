/* self_modifying: code that is written and then run, with nothing but a jump in between.
 *
 * x86 promises that a processor sees its own writes to code at the next branch, and in practice at the next instruction
 * (Intel SDM (2024-12) Vol. 3A 12.1.3 Handling Self- and Cross-Modifying Code). Cases: another page, the own page, the next
 * instruction of the same straight line, an instruction that straddles two pages, code reached under two addresses,
 * writes by REP MOVS, a page that is code and data by turns, code in a page that is remapped. Output: the same on every
 * run and engine.
 */
#include "lib.h"

#define V 0x8000000000ull

typedef u32 (*code)(void);

/* mov $value, %eax; ret */
static void put_code(u8 *at, u32 value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static u8 *page_a, *page_b;

static void test_other_page(void)
{
    put_code(page_a, 1);
    check("first", ((code)page_a)(), 1);
    put_code(page_a, 2);
    check("rewritten", ((code)page_a)(), 2);
    u64 sum = 0;
    for (u32 i = 0; i < 300; i++) {
        *(volatile u32 *)(page_a + 1) = i;
        sum += ((code)page_a)();
    }
    check("rewritten-often", sum, 299 * 300 / 2);
    for (u32 i = 0; i < 40; i++) {
        page_a[1] = (u8)i; /* a byte at a time */
        sum += ((code)page_a)();
    }
    check("rewritten-bytes", sum, 299 * 300 / 2 + 40 * 256 + 39 * 40 / 2);
    for (u32 i = 0; i < 64; i++)
        put_code(page_a + 64 * i, i);
    sum = 0;
    for (u32 i = 0; i < 64; i++)
        sum += ((code)(page_a + 64 * i))();
    put_code(page_a + 64 * 7, 1000);
    for (u32 i = 0; i < 64; i++)
        sum += ((code)(page_a + 64 * i))();
    check("one-of-many", sum, 2 * (63 * 64 / 2) + 1000 - 7);
    u8 with[6];
    put_code(with, 0x7777);
    memcpy(page_a, with, 6);
    check("by-rep-movs", ((code)page_a)(), 0x7777);
    u32 *number = (u32 *)(page_a + 1);
    asm volatile("lock addl $1, %0" : "+m"(*number));
    check("by-locked-add", ((code)page_a)(), 0x7778);
    asm volatile("lock cmpxchgl %2, %0" : "+m"(*number), "+a"((u32){ 0x7778 }) : "r"(0x9999) : "cc");
    check("by-cmpxchg", ((code)page_a)(), 0x9999);
    asm volatile("push %1; popq %0" : "=m"(*(u64 *)(page_a + 1)) : "r"(0xc312345678ull));
    check("by-pop", ((code)page_a)(), 0x12345678);
    asm volatile("movl $0x4321, %%eax; movd %%eax, %%xmm0; movss %%xmm0, %0" : "=m"(*number)::"eax");
    check("by-movss", ((code)page_a)(), 0x4321);
}

/* Code in a writable page that writes into itself. edi = how often. */
extern u8 own_start[], own_end[], own_next_start[], own_next_end[], own_loop_start[], own_loop_end[];
asm(".pushsection .text\n"
    "own_start:\n"                          /* own page: write the immediate of a later instruction, far enough on */
    "  movl $0x55, own_value - own_start(%rax)\n"
    "  jmp 1f\n  .skip 64, 0x90\n"
    "1: .byte 0xb8\n"
    "own_value: .long 0x11\n"
    "  ret\n"
    "own_end:\n"
    "own_next_start:\n"                     /* the very next instruction */
    "  movl $0x66, own_next_value - own_next_start(%rax)\n"
    "  .byte 0xb8\n"
    "own_next_value: .long 0x11\n"
    "  ret\n"
    "own_next_end:\n"
    "own_loop_start:\n"                     /* a loop that changes its own body each time round */
    "  xorl %ecx, %ecx\n  xorl %edx, %edx\n"
    "2: .byte 0x81, 0xc2\n"                 /* add $n, %edx */
    "own_loop_value: .long 1\n"
    "  incl own_loop_value - own_loop_start(%rax)\n"
    "  incl %ecx\n  cmpl $100, %ecx\n  jb 2b\n"
    "  movl %edx, %eax\n"
    "  ret\n"
    "own_loop_end:\n"
    ".popsection");

static u32 call_with_own_address(u8 *at)
{
    u32 result;
    asm volatile("call *%1" : "=a"(result) : "r"(at), "a"(at) : "rcx", "rdx", "memory", "cc");
    return result;
}

static void test_own_page(void)
{
    memcpy(page_a, own_start, (size_t)(own_end - own_start));
    check("own-page", call_with_own_address(page_a), 0x55);
    check("own-page-again", call_with_own_address(page_a), 0x55);
    memcpy(page_a, own_next_start, (size_t)(own_next_end - own_next_start));
    check("next-instruction", call_with_own_address(page_a), 0x66);
    memcpy(page_a, own_loop_start, (size_t)(own_loop_end - own_loop_start));
    check("own-loop", call_with_own_address(page_a), 5050);
    /* Data that lies beside code in one page, written often. */
    put_code(page_a, 3);
    volatile u64 *data = (volatile u64 *)(page_a + 2048);
    *data = 0;
    u64 sum = 0;
    for (u32 i = 0; i < 500; i++) {
        *data += i;
        sum += ((code)page_a)();
    }
    check("data-beside-code", *data + (sum << 32), 499 * 500 / 2 | 1500ull << 32);
}

static void test_straddling(void)
{
    u64 at = V + 0x1000 - 3;
    map(V, (u64)page_a, PTE_P | PTE_W);
    map(V + 0x1000, (u64)page_b, PTE_P | PTE_W);
    put_code((u8 *)at, 0x01020304);
    check("straddles", ((code)at)(), 0x01020304);
    page_b[0] = 0x99; /* the second half only: the third byte of the number */
    check("second-half-written", ((code)at)(), 0x01990304);
    page_a[0xfff] = 0x77; /* the first half only */
    check("first-half-written", ((code)at)(), 0x01997704);
    store32(at + 1, 0xa1b2c3d4); /* both by one store */
    check("both-halves-written", ((code)at)(), 0xa1b2c3d4);
    u8 *page_c = take_page();
    memcpy(page_c, page_b, 16);
    page_c[0] = 0x55;
    map(V + 0x1000, (u64)page_c, PTE_P | PTE_W);
    invlpg(V + 0x1000);
    check("second-half-remapped", ((code)at)(), 0xa155c3d4);
    map(V + 0x1000, (u64)page_b, PTE_P | PTE_W);
    invlpg(V + 0x1000);
    check("second-half-back", ((code)at)(), 0xa1b2c3d4);
    /* Reached by jumps, from the same page and from another, which an engine may have made direct. */
    const u64 from[] = { V + 0xf00, V + 0x3000 };
    map(V + 0x3000, (u64)take_page(), PTE_P | PTE_W);
    for (u32 i = 0; i < 2; i++) {
        memcpy(page_c, page_b, 16);
        page_c[0] = 0x55;
        *(volatile u8 *)from[i] = 0xe9;
        store32(from[i] + 1, (u32)(at - from[i] - 5));
        u64 sum = 0;
        for (u32 round = 0; round < 40; round++) {
            page_b[0] = (u8)round;
            sum += ((code)from[i])() >> 16 & 0xff;
            sum += ((code)from[i])() >> 16 & 0xff;
            map(V + 0x1000, (u64)page_c, PTE_P | PTE_W);
            invlpg(V + 0x1000);
            sum += ((code)from[i])() >> 16 & 0xff;
            map(V + 0x1000, (u64)page_b, PTE_P | PTE_W);
            invlpg(V + 0x1000);
        }
        check(i ? "straddles-behind-far-jump" : "straddles-behind-near-jump", sum, 2 * (39 * 40 / 2) + 40 * 0x55);
    }
    /* A block that runs on from one page into the next without a branch. */
    memset(page_a + 0xf00, 0x90, 0x100);
    put_code(page_b, 12);
    check("runs-on", ((code)(V + 0xf00))(), 12);
    put_code(page_b, 13);
    check("runs-on-rewritten", ((code)(V + 0xf00))(), 13);
    map(V + 0x1000, (u64)page_c, PTE_P | PTE_W);
    put_code(page_c, 14);
    invlpg(V + 0x1000);
    check("runs-on-remapped", ((code)(V + 0xf00))(), 14);
}

static void test_aliases(void)
{
    map(V + 0x10000, (u64)page_a, PTE_P | PTE_W);
    map(V + 0x20000, (u64)page_a, PTE_P);
    put_code(page_a, 21);
    check("alias-1", ((code)(V + 0x10000))() << 8 | ((code)(V + 0x20000))(), 21 << 8 | 21);
    put_code(page_a, 22); /* through the identity mapping */
    check("alias-2", ((code)(V + 0x10000))() << 8 | ((code)(V + 0x20000))(), 22 << 8 | 22);
    put_code((u8 *)V + 0x10000, 23);
    check("alias-3", ((code)page_a)() << 8 | ((code)(V + 0x20000))(), 23 << 8 | 23);
    /* One address, two pages in turn. */
    put_code(page_b, 31);
    u64 sum = 0;
    for (u32 i = 0; i < 20; i++) {
        map(V + 0x10000, (u64)(i & 1 ? page_a : page_b), PTE_P | PTE_W);
        invlpg(V + 0x10000);
        sum += ((code)(V + 0x10000))();
    }
    check("turns", sum, 10 * 31 + 10 * 23);
    u64 *root = take_page(), old = read_cr3();
    memcpy(root, (void *)old, 4096);
    root[V >> 39 & 511] = 0;
    map(V + 0x10000, (u64)page_a, PTE_P | PTE_W);
    write_cr3((u64)root);
    map(V + 0x10000, (u64)page_b, PTE_P | PTE_W);
    sum = 0;
    for (u32 i = 0; i < 20; i++) {
        write_cr3(i & 1 ? (u64)root : old);
        sum += ((code)(V + 0x10000))();
        put_code(page_a, 100 + i);
    }
    write_cr3(old);
    u64 want = 23;
    for (u32 i = 2; i < 20; i += 2)
        want += 100 + i - 1;
    check("spaces-in-turn", sum, want + 10 * 31);
}

static void test_modes(void)
{
    /* The same bytes mean other things in 32-bit code: 0x48 is DEC EAX there and REX.W here. */
    static const u8 bytes[] = { 0xb8, 5, 0, 0, 0, 0x48, 0x83, 0xc0, 1, 0xcd, 0x80 };
    allow_user();
    memcpy(page_a, bytes, sizeof bytes);
    u64 top = (u64)user_stack + sizeof user_stack;
    run_user((u64)page_a, top, USER_CS, 0, NULL);
    u64 here = last_trap.frame.rax;
    run_user((u64)page_a, top, USER_CS32, 0, NULL);
    check("same-bytes-two-modes", here << 8 | last_trap.frame.rax, 6 << 8 | 5);
    run_user((u64)page_a, top, USER_CS, 0, NULL);
    check("and-back", last_trap.frame.rax, 6);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    page_a = take_page(), page_b = take_page();
    test_other_page();
    test_own_page();
    test_straddling();
    test_aliases();
    test_modes();
}
