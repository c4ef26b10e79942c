/* Registers keep their values over calls, system calls, page faults, and whatever interrupts these. */
#include "torture.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R15 = 15 };

/* What the loops below load all registers from and save them to. The assembler knows the offsets. */
struct registers {
    u64 general[16]; /* in the manual's order; RSP is left alone */
    u64 carry;
    u64 loops;
    uint32_t mxcsr;
    uint16_t control;
    uint16_t unused[5];
    unsigned char x87[3][16];
    u64 vector[16][4];
};
_Static_assert(offsetof(struct registers, carry) == 128 && offsetof(struct registers, loops) == 136 &&
               offsetof(struct registers, mxcsr) == 144 && offsetof(struct registers, control) == 148 &&
               offsetof(struct registers, x87) == 160 && offsetof(struct registers, vector) == 208, "offsets");

/* The loop counts in the stack, with DEC, and holds the carry flag, which DEC leaves alone. */
#define ALL(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define LOAD(n) "vmovdqu 208+32*" #n "(%rdi), %ymm" #n "\n"
#define SAVE(n) "vmovdqu %ymm" #n ", 208+32*" #n "(%rdi)\n"
#define LOOP(name, body)                                                                                               \
    __asm__(".text\n.type " #name ", @function\n" #name ":\n"                                                          \
            "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"                                       \
            "push %rdi\npush 136(%rdi)\n" ALL(LOAD)                                                                    \
            "ldmxcsr 144(%rdi)\nfldcw 148(%rdi)\nfldt 160(%rdi)\nfldt 176(%rdi)\nfldt 192(%rdi)\n"                     \
            "mov (%rdi), %rax\nmov 8(%rdi), %rcx\nmov 16(%rdi), %rdx\nmov 24(%rdi), %rbx\nmov 40(%rdi), %rbp\n"        \
            "mov 48(%rdi), %rsi\nmov 64(%rdi), %r8\nmov 72(%rdi), %r9\nmov 80(%rdi), %r10\nmov 88(%rdi), %r11\n"       \
            "mov 96(%rdi), %r12\nmov 104(%rdi), %r13\nmov 112(%rdi), %r14\nmov 120(%rdi), %r15\n"                      \
            "btl $0, 128(%rdi)\nmov 56(%rdi), %rdi\n"                                                                  \
            "1:\n" body "decq (%rsp)\njnz 1b\n"                                                                        \
            "push %rdi\nmov 16(%rsp), %rdi\n"                                                                          \
            "mov %rax, (%rdi)\nmov %rcx, 8(%rdi)\nmov %rdx, 16(%rdi)\nmov %rbx, 24(%rdi)\nmov %rbp, 40(%rdi)\n"        \
            "mov %rsi, 48(%rdi)\nmov %r8, 64(%rdi)\nmov %r9, 72(%rdi)\nmov %r10, 80(%rdi)\nmov %r11, 88(%rdi)\n"       \
            "mov %r12, 96(%rdi)\nmov %r13, 104(%rdi)\nmov %r14, 112(%rdi)\nmov %r15, 120(%rdi)\n"                      \
            "setc 128(%rdi)\npop %rax\nmov %rax, 56(%rdi)\npop 136(%rdi)\n" ALL(SAVE)                                  \
            "stmxcsr 144(%rdi)\nfnstcw 148(%rdi)\nfstpt 192(%rdi)\nfstpt 176(%rdi)\nfstpt 160(%rdi)\n"                 \
            "fninit\nvzeroupper\npush $0x1f80\nldmxcsr (%rsp)\npop %rax\npop %rdi\n"                                   \
            "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n"                                        \
            ".size " #name ", . - " #name "\n");                                                                       \
    void name(struct registers *)

LOOP(hold_in_calls, "push %r12\ncall 2f\npop %r12\njmp 3f\n2: push %r13\nxchg %r13, (%rsp)\npop %r13\nret\n3:\n");
/* getpid: RAX comes back with the number, RCX and R11 hold what SYSCALL puts there. */
LOOP(hold_in_system_calls, "mov $39, %eax\nsyscall\n");
/* A page is touched for the first time: by a general register, by a vector across its middle. */
LOOP(hold_in_faults, "mov %rsi, (%rbx)\nvmovdqu %ymm5, 2048(%rbx)\nlea 4096(%rbx), %rbx\n");

void scramble_registers(void)
{
#define ONES(n) "vpcmpeqd %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\nvinsertf128 $1, %%xmm" #n ", %%ymm" #n ", %%ymm" #n "\n"
    __asm__ volatile(ALL(ONES) "fninit\nfldpi\nfldl2e\nfmulp\nfstp %%st(0)\nstd\ncld\nstc\n" ::
                         : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                           "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef ONES
}

static struct registers random_registers(u64 *seed, u64 loops)
{
    struct registers state = {.loops = loops, .carry = below(seed, 2)};
    for (size_t i = 0; i < 16; i++)
        state.general[i] = next_random(seed);
    for (size_t i = 0; i < 64; i++)
        state.vector[i / 4][i % 4] = next_random(seed);
    for (size_t i = 0; i < 3; i++) {
        /* A normal number: the integer bit set, an exponent from the middle. */
        u64 fraction = next_random(seed) | (u64)1 << 63;
        uint16_t exponent = (uint16_t)(0x3f00 + below(seed, 0x200));
        memcpy(state.x87[i], &fraction, sizeof fraction);
        memcpy(state.x87[i] + 8, &exponent, sizeof exponent);
    }
    /* All exceptions masked; precision, rounding, flushing to zero as they come. */
    static const uint16_t precisions[] = {0x000, 0x200, 0x300};
    state.mxcsr = 0x1f80 | (uint32_t)(below(seed, 4) << 13) | (uint32_t)(below(seed, 2) << 15);
    state.control = (uint16_t)(0x7f | precisions[below(seed, 3)] | below(seed, 4) << 10);
    return state;
}

/* Bit n of `kept` stands for general register n. */
static void compare(const struct registers *before, const struct registers *after, unsigned kept)
{
    for (size_t i = 0; i < 16; i++)
        if (kept >> i & 1 && after->general[i] != before->general[i])
            wrong("general register", i, after->general[i], before->general[i]);
    for (size_t i = 0; i < 64; i++)
        if (after->vector[i / 4][i % 4] != before->vector[i / 4][i % 4])
            wrong("vector register (times 4)", i, after->vector[i / 4][i % 4], before->vector[i / 4][i % 4]);
    for (size_t i = 0; i < 3; i++)
        if (memcmp(after->x87[i], before->x87[i], 10) != 0)
            wrong("x87 register", i, *(const u64 *)after->x87[i], *(const u64 *)before->x87[i]);
    if (after->mxcsr != before->mxcsr)
        wrong("MXCSR", 0, after->mxcsr, before->mxcsr);
    if (after->control != before->control)
        wrong("x87 control word", 0, after->control, before->control);
    if ((after->carry & 1) != before->carry)
        wrong("carry flag", 0, after->carry, before->carry);
}

#define KEPT (0xffffu & ~(1u << RSP))

void registers_in_calls(u64 seed)
{
    struct registers before = random_registers(&seed, 20000 + below(&seed, 200000)), after = before;
    hold_in_calls(&after);
    compare(&before, &after, KEPT);
}

void registers_in_system_calls(u64 seed)
{
    struct registers before = random_registers(&seed, 500 + below(&seed, 3000)), after = before;
    before.general[RAX] = (u64)syscall(SYS_getpid);
    hold_in_system_calls(&after);
    compare(&before, &after, KEPT & ~(1u << RCX) & ~(1u << 11));
}

void registers_in_faults(u64 seed)
{
    size_t count = 100 + below(&seed, 400);
    char *area = pages(count);
    struct registers before = random_registers(&seed, count), after = before;
    before.general[RBX] = (u64)area + count * PAGE;
    after.general[RBX] = (u64)area;
    hold_in_faults(&after);
    compare(&before, &after, KEPT);
    for (size_t page = 0; page < count; page++) {
        const char *at = area + page * PAGE;
        if (*(const u64 *)at != before.general[RSI])
            wrong("word stored", (u64)at, *(const u64 *)at, before.general[RSI]);
        if (memcmp(at + 2048, before.vector[5], 32) != 0)
            wrong("vector stored", (u64)at + 2048, *(const u64 *)(at + 2048), before.vector[5][0]);
    }
    unmap(area, count);
}
