/* flow: calls that do not come back, returns that nobody called for, and flags that outlive a jump.
 *
 * Whatever a processor remembers of calls, RET goes where the stack says (Intel SDM (2024-12) Vol. 1 6.4 Calling Procedures).
 * Cases: a return address that was changed, popped, or pushed by hand; returns over several frames at once, from another
 * stack, through a misaligned one, from deeper than any table of returns; code that is other code by the time it is
 * returned to, because it was written, remapped, or belongs to another address space, in either privilege; arithmetic flags
 * that are set on one side of a jump and read on the other; jumps that count, and address-size prefixes that pad. `hot` on
 * the command line runs the last two often instead. Output: the same on every run and engine.
 */
#include "lib.h"

#define V 0x8000000000ull
#define W 0x8000100000ull

/* Code that can be copied to another place. */
#define PIECE(name, text) CODE(name, text "\n.globl " #name "_end\n" #name "_end:"); LABEL(name##_end)
#define PUT(at, name) memcpy((u8 *)(at), name, (size_t)(name##_end - name))

typedef u64 (*function)(u64, u64);

static u64 run(void *code, u64 a, u64 b) { return ((function)code)(a, b); }

CODE(plain, "call 1f\n addq $1, %rax\n ret\n1: movl $41, %eax\n ret");
CODE(changed, "call 1f\n movl $1, %eax\n ret\n1: leaq 2f(%rip), %rax\n movq %rax, (%rsp)\n ret\n2: movl $2, %eax\n ret");
CODE(popped, "call 1f\n movl $1, %eax\n ret\n1: popq %rdx\n movl $3, %eax\n ret"); /* returns for its caller */
CODE(next, "call 1f\n1: popq %rax\n leaq 1b(%rip), %rdx\n subq %rdx, %rax\n ret");
CODE(pushed, "leaq 1f(%rip), %rax\n pushq %rax\n ret\n movl $1, %eax\n ret\n1: movl $4, %eax\n ret");
CODE(indirect, "leaq 1f(%rip), %rdx\n movl $5, %eax\n call *%rdx\n addl $10, %eax\n ret\n1: addl $100, %eax\n ret");
CODE(cleans_up, "movq %rsp, %rdx\n pushq $7\n pushq $8\n call 1f\n subq %rsp, %rdx\n addq %rdx, %rax\n ret\n"
                "1: movq 8(%rsp), %rax\n addq 16(%rsp), %rax\n ret $16");
/* rdi = depth: the sum of all numbers up to it, each added after its call came back */
CODE(deep, "testq %rdi, %rdi\n jnz 1f\n xorl %eax, %eax\n ret\n"
           "1: pushq %rdi\n decq %rdi\n call deep\n popq %rdi\n addq %rdi, %rax\n ret");
/* rdi = depth: from there back to the first caller at once, then again */
CODE(leaps, "pushq %rbx\n pushq %rbp\n movq %rsp, %rbp\n xorl %ebx, %ebx\n"
            "1: movl $9, %edi\n call 2f\n addl $1000, %ebx\n"
            "3: addl $1, %ebx\n cmpl $50, %ebx\n jb 1b\n movl %ebx, %eax\n popq %rbp\n popq %rbx\n ret\n"
            "2: decl %edi\n jz 4f\n call 2b\n addl $5000, %ebx\n ret\n"
            "4: movq %rbp, %rsp\n jmp 3b");
/* rdi = the top of another stack: two stacks call and return by turns */
CODE(stacks, "pushq %rbx\n xorl %eax, %eax\n movl $40, %ebx\n leaq 3f(%rip), %rdx\n movq %rdx, -8(%rdi)\n subq $8, %rdi\n"
             "1: call 2f\n addl $1, %eax\n decl %ebx\n jnz 1b\n popq %rbx\n ret\n"
             "2: xchgq %rsp, %rdi\n ret\n"
             "3: addl $100, %eax\n call 2b\n jmp 3b");
CODE(misaligned, "movq %rsp, %rdx\n leaq -61(%rsp), %rsp\n call 1f\n addl $1, %eax\n movq %rdx, %rsp\n ret\n"
                 "1: movl $6, %eax\n call 2f\n addl $10, %eax\n ret\n2: addl $100, %eax\n ret");
CODE(many, "xorl %eax, %eax\n movl $3000, %ecx\n"
           "1: testb $1, %cl\n jz 2f\n call 3f\n jmp 4f\n2: call 5f\n4: decl %ecx\n jnz 1b\n ret\n"
           "3: addl $1, %eax\n ret\n5: addl $1000, %eax\n jmp 3b");

static void test_returns(void)
{
    static u64 other[64];
    for (int round = 0; round < 3; round++) {
        check("plain", run(plain, 0, 0), 42);
        check("changed", run(changed, 0, 0), 2);
        check("popped", run(popped, 0, 0), 3);
        check("call-next", run(next, 0, 0), 0);
        check("pushed", run(pushed, 0, 0), 4);
        check("indirect", run(indirect, 0, 0), 115);
        check("cleans-up", run(cleans_up, 0, 0), 15);
        check("deep", run(deep, 100 + round, 0), (100 + round) * (101 + round) / 2);
        check("deeper", run(deep, 1000, 0), 1000 * 1001 / 2);
        check("leaps", run(leaps, 0, 0), 50);
        check("stacks", run(stacks, (u64)(other + 64), 0), 40 * 101);
        check("misaligned", run(misaligned, 0, 0), 117);
        check("many", run(many, 0, 0), 3000 + 1500 * 1000);
    }
}

static u8 *page_a, *page_b;

/* At V: calls rdi with rsi, and returns what lies behind the call: 1 in one page, 2 in the other. */
PIECE(caller_1, "pushq %rbx\n movq %rdi, %rax\n movq %rsi, %rdi\n movq %rdx, %rsi\n call *%rax\n movl $1, %eax\n popq %rbx\n ret");
PIECE(caller_2, "pushq %rbx\n movq %rdi, %rax\n movq %rsi, %rdi\n movq %rdx, %rsi\n call *%rax\n movl $2, %eax\n popq %rbx\n ret");
CODE(load_space, "movq %rdi, %cr3\n ret");
CODE(move_page, "movq %rsi, (%rdi)\n movabsq $0x8000000000, %rax\n invlpg (%rax)\n ret");
CODE(write_code, "movl %esi, (%rdi)\n ret");
CODE(nothing, "ret");
/* A call of the same page: what is returned to is in the next one. */
PIECE(before_end, "call 1f\n 1: popq %rax\n movl $3, %eax\n ret");

static u64 call_v(void *what, u64 a, u64 b)
{
    u64 result = V;
    asm volatile("call *%%rax" : "+a"(result), "+D"(what), "+S"(a), "+d"(b)::"rcx", "r8", "r9", "r10", "r11", "memory", "cc");
    return result;
}

static void test_other_code(void)
{
    map(V, (u64)page_a, PTE_P | PTE_W);
    PUT(page_a, caller_1);
    PUT(page_b, caller_2);
    u64 *entry = entry_of(read_cr3(), V, 1), a = (u64)page_a | PTE_P | PTE_W, b = (u64)page_b | PTE_P | PTE_W;
    u64 got = 0;
    for (int i = 0; i < 40; i++)
        got = got * 3 % 1000003 + call_v(nothing, 0, 0);
    u64 want = 0;
    for (int i = 0; i < 40; i++)
        want = want * 3 % 1000003 + 1;
    check("calls", got, want);
    for (int i = 0; i < 3; i++) {
        check("remapped", call_v(move_page, (u64)entry, b), 2);
        check("stays", call_v(nothing, 0, 0), 2);
        check("remapped-back", call_v(move_page, (u64)entry, a), 1);
        check("stays-back", call_v(nothing, 0, 0), 1);
    }
    u8 *number = page_a + 1;
    while (*(u32 *)number != 1)
        number++;
    for (u32 i = 7; i < 10; i++)
        check("written", call_v(write_code, (u64)number, i), i);
    check("written-back", call_v(write_code, (u64)number, 1), 1);
    /* Two address spaces. */
    u64 *root = take_page(), old = read_cr3();
    memcpy(root, (void *)old, 4096);
    root[V >> 39 & 511] = 0;
    write_cr3((u64)root);
    map(V, (u64)page_b, PTE_P | PTE_W);
    write_cr3(old);
    for (int i = 0; i < 4; i++) {
        check("other-space", call_v(load_space, (u64)root, 0), 2);
        check("in-other-space", call_v(nothing, 0, 0), 2);
        check("own-space", call_v(load_space, old, 0), 1);
        check("in-own-space", call_v(nothing, 0, 0), 1);
    }
}

/* In user mode: a call, a trap in what is called; behind the call lies 1 or 2. At W: RET. */
PIECE(user_1, "1: call 2f\n addl $1, %eax\n int $0x80\n2: call 3f\n int $0x80\n3: ret");
PIECE(user_2, "1: call 2f\n addl $2, %eax\n int $0x80\n2: call 3f\n int $0x80\n3: ret");
PIECE(user_return, "movl $100, %eax\n ret");

static u64 user_top(void) { return (u64)user_stack + sizeof user_stack; }

static u64 user_ends(u64 rip, u64 rsp)
{
    if (run_user(rip, rsp, USER_CS, 0, NULL) != 0x80)
        return 0;
    return last_trap.frame.rax;
}

static void test_user(void)
{
    allow_user();
    map(V, (u64)page_a, PTE_P | PTE_W | PTE_U);
    u8 *page_c = take_page();
    map(W, (u64)page_c, PTE_P | PTE_W | PTE_U);
    PUT(page_a, user_1);
    PUT(page_b, user_2);
    PUT(page_c, user_return);
    u64 *entry = entry_of(read_cr3(), V, 1), a = (u64)page_a | PTE_P | PTE_W | PTE_U, b = (u64)page_b | PTE_P | PTE_W | PTE_U;
    u64 *root = take_page(), old = read_cr3();
    memcpy(root, (void *)old, 4096);
    root[V >> 39 & 511] = 0;
    write_cr3((u64)root);
    map(V, (u64)page_b, PTE_P | PTE_W | PTE_U);
    map(W, (u64)page_c, PTE_P | PTE_W | PTE_U);
    write_cr3(old);
    invlpg(V);
    invlpg(W);
    for (int i = 0; i < 4; i++) {
        user_ends(V, user_top());
        check("user", user_ends(W, last_trap.frame.rsp), 101);
        user_ends(V, user_top());
        *entry = b;
        invlpg(V);
        check("user-remapped", user_ends(W, last_trap.frame.rsp), 102);
        user_ends(V, user_top());
        *entry = a;
        invlpg(V);
        check("user-remapped-back", user_ends(W, last_trap.frame.rsp), 101);
        user_ends(V, user_top());
        write_cr3((u64)root);
        check("user-other-space", user_ends(W, last_trap.frame.rsp), 102);
        user_ends(V, user_top());
        write_cr3(old);
        check("user-own-space", user_ends(W, last_trap.frame.rsp), 101);
    }
}

/* Flags that are set before a jump and read behind it: a bit of the result for each. rdi, rsi: two numbers to compare. */
CODE(over_jumps, "xorl %eax, %eax\n cmpq %rsi, %rdi\n jmp 1f\n .skip 64, 0x90\n"
                 "1: jb 2f\n jmp 3f\n2: orl $1, %eax\n cmpq %rsi, %rdi\n3: jz 4f\n jmp 5f\n4: orl $2, %eax\n"
                 "5: cmpq %rsi, %rdi\n jl 6f\n js 7f\n jp 8f\n ret\n6: orl $4, %eax\n ret\n7: orl $8, %eax\n ret\n"
                 "8: orl $16, %eax\n ret");
/* CF through INC, moves, a call and its return */
CODE(over_calls, "xorl %eax, %eax\n cmpq %rsi, %rdi\n call 1f\n adcl $0, %eax\n stc\n call 1f\n adcl $0, %eax\n"
                 " clc\n call 2f\n adcl $0, %eax\n ret\n1: incl %ecx\n movq %rsi, %rdx\n pushq %rdx\n popq %rdx\n ret\n"
                 "2: pushq %rdi\n popq %rdx\n cmpq %rdx, %rdi\n stc\n ret");
/* BT and a shift by CL, zero or not, keep flags for the other side of a branch not taken */
CODE(kept, "xorl %eax, %eax\n movl $0x80, %edx\n movl %esi, %ecx\n cmpq $1, %rdi\n btl $5, %esi\n jc 1f\n setz %al\n ret\n"
           "1: shll %cl, %edx\n setz %al\n sets %ah\n ret");
/* rdi, rsi: a chain of conditions on one comparison, with loads between them */
CODE(chain, "pushq %rdi\n pushq %rsi\n cmpq %rsi, %rdi\n movq (%rsp), %rax\n ja 1f\n movq 8(%rsp), %rdx\n jb 2f\n"
            " movq (%rsp), %rcx\n jnz 3f\n movl $30, %eax\n jmp 4f\n1: jg 5f\n movl $10, %eax\n jmp 4f\n"
            "5: movl $11, %eax\n jmp 4f\n2: jl 6f\n movl $20, %eax\n jmp 4f\n6: movl $21, %eax\n jmp 4f\n3: ud2\n"
            "4: popq %rsi\n popq %rdi\n ret");

static void test_flags(void)
{
    static const u64 numbers[] = { 0, 1, 2, 3, 5, 8, 32, 40, ~0ull, ~0ull - 1, 1ull << 63, (1ull << 63) - 1 };
    enum { COUNT = sizeof numbers / sizeof *numbers };
    u64 jumps = 0, calls = 0, keeps = 0, chains = 0;
    u64 want_jumps = 0, want_calls = 0, want_keeps = 0, want_chains = 0;
    for (int i = 0; i < COUNT * COUNT; i++) {
        u64 a = numbers[i / COUNT], b = numbers[i % COUNT], difference = a - b;
        jumps = jumps * 31 + run(over_jumps, a, b);
        calls = calls * 31 + run(over_calls, a, b);
        keeps = keeps * 31 + run(kept, a, b);
        chains = chains * 31 + run(chain, a, b);
        u64 bits = (a < b) | (u64)(a == b) << 1;
        if ((s64)a < (s64)b)
            bits |= 4;
        else if (difference >> 63)
            bits |= 8;
        else if (!(__builtin_popcount((u32)(difference & 255)) & 1))
            bits |= 16;
        want_jumps = want_jumps * 31 + bits;
        want_calls = want_calls * 31 + (a < b) + 1 + 1;
        u32 shifted = 0x80u << (b & 31);
        if (!(b & 32))
            want_keeps = want_keeps * 31 + (a == 1);
        else if (!(b & 31))
            want_keeps = want_keeps * 31 + ((a == 1) | (a - 1) >> 63 << 8);
        else
            want_keeps = want_keeps * 31 + ((shifted == 0) | (u64)(shifted >> 31) << 8);
        want_chains = want_chains * 31 + (a > b ? 10 + ((s64)a > (s64)b) : a < b ? 20 + ((s64)a < (s64)b) : 30);
    }
    check("flags-over-jumps", jumps, want_jumps);
    check("flags-over-calls", calls, want_calls);
    check("flags-in-a-chain", chains, want_chains);
    check("flags-kept", keeps, want_keeps);
}

/* rdi: a count; rsi: flags. Each leaves what it did in rax, RCX in the high half, and CF and ZF as they came in its top bits. */
#define COUNTED(name, text) \
    CODE(name, "movq %rdi, %rcx\n xorl %eax, %eax\n pushq %rsi\n popfq\n" text \
               "\n pushfq\n popq %rdx\n andl $0x41, %edx\n shlq $48, %rdx\n shlq $24, %rcx\n addq %rcx, %rax\n addq %rdx, %rax\n ret")
COUNTED(loops, "1: leaq 3(%rax), %rax\n loop 1b");
COUNTED(loops_short, "movabsq $0xffffffff00000000, %rdx\n leaq (%rcx,%rdx), %rcx\n 1: leaq 3(%rax), %rax\n addr32 loop 1b");
COUNTED(loops_equal, "1: leaq 3(%rax), %rax\n loope 1b");
COUNTED(loops_not_equal, "1: leaq 3(%rax), %rax\n loopne 1b");
COUNTED(until_seven, "movl $7, %edx\n 1: leal 1(%rax), %eax\n cmpl %edx, %eax\n loopne 1b\n pushq %rsi\n popfq");
COUNTED(while_zero, "1: leal 1(%rax), %eax\n testb $8, %al\n loope 1b\n pushq %rsi\n popfq");
COUNTED(counts_down, "1: jrcxz 2f\n leaq 5(%rax), %rax\n leaq -1(%rcx), %rcx\n jmp 1b\n2:");
COUNTED(counts_down_short, "movabsq $0x30000000000, %rdx\n leaq (%rcx,%rdx), %rcx\n 1: jecxz 2f\n leaq 5(%rax), %rax\n"
                           " leaq -1(%rcx), %rcx\n jmp 1b\n2: movl %ecx, %ecx");
COUNTED(padded, "1: .byte 0x67\n leaq 2(%rax), %rax\n .byte 0x67\n .byte 0x66\n pxor %xmm0, %xmm0\n .byte 0x67\n movq %rcx, %rdx\n"
                " pushfq\n .byte 0x67\n decq %rdx\n .byte 0x67\n popfq\n .byte 0x67\n xchgq %rdx, %rcx\n jrcxz 2f\n jmp 1b\n2:");
/* Where the prefix means something: the address is EDI, whatever the upper half of RDI is. */
CODE(short_address, "movq $-1, %rax\n shlq $32, %rax\n orq %rax, %rdi\n movq (%edi), %rax\n leaq 1(%edi), %rdx\n shlq $32, %rdx\n"
                    " addq %rdx, %rax\n ret");

static void test_counts(void)
{
    static const u64 flags[] = { 2, 3, 0x42, 0x43 };
    for (u64 i = 0; i < 4; i++) {
        u64 kept = (flags[i] & 0x41) << 48, zero = flags[i] >> 6 & 1;
        for (u64 n = 1; n < 30; n += 7) {
            u64 wrong = (u64)(run(loops, n, flags[i]) != 3 * n + kept);
            wrong |= (u64)(run(loops_short, n, flags[i]) != 3 * n + kept) << 1;
            wrong |= (u64)(run(loops_equal, n, flags[i]) != (zero ? 3 * n : 3 + ((n - 1) << 24)) + kept) << 2;
            wrong |= (u64)(run(loops_not_equal, n, flags[i]) != (zero ? 3 + ((n - 1) << 24) : 3 * n) + kept) << 3;
            wrong |= (u64)(run(until_seven, n, flags[i]) != (n < 7 ? n : 7 + ((n - 7) << 24)) + kept) << 4;
            wrong |= (u64)(run(while_zero, n, flags[i]) != (n < 8 ? n : 8 + ((n - 8) << 24)) + kept) << 5;
            wrong |= (u64)(run(counts_down, n, flags[i]) != 5 * n + kept) << 6;
            wrong |= (u64)(run(counts_down_short, n, flags[i]) != 5 * n + kept) << 7;
            wrong |= (u64)(run(padded, n, flags[i]) != 2 * n + kept) << 8;
            check("counts", wrong, 0);
        }
        check("counts-none", run(counts_down, 0, flags[i]), kept);
    }
    static u64 number = 5;
    check("short-address", run(short_address, (u64)&number, 0), 5 + (((u64)&number + 1) << 32));
}

/* `hot`: each often, so that what leaves translated code for it can be counted. */
static void run_hot(void)
{
    static const u8 *const codes[] = { loops, loops_short, loops_equal, loops_not_equal, counts_down, padded };
    u64 sum = 0;
    for (u64 i = 0; i < sizeof codes / sizeof *codes; i++)
        sum += run((void *)(u64)codes[i], 4000, i == 2 ? 0x42 : 2) & 0xffffff;
    check("hot", sum, 4000 * (3 * 4 + 5 + 2));
}

void guest_main(const struct start_info *info)
{
    (void)info;
    write_cr0((read_cr0() | 2) & ~0xcull); /* MP; no EM, no TS */
    write_cr4(read_cr4() | 0x600);         /* OSFXSR, OSXMMEXCPT */
    if (starts_with(command_line, "hot")) {
        run_hot();
        finish();
    }
    page_a = take_page(), page_b = take_page();
    PUT(page_a, before_end);
    check("call-of-own-page", run(page_a, 0, 0), 3);
    test_returns();
    test_other_code();
    test_flags();
    test_counts();
    test_user();
}
