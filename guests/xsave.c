/* xsave: FXSAVE and the XSAVE family (Intel SDM (2024-12) Vol. 1 chapter 13 Managing State Using the XSAVE Feature Set).
 *
 * Sizes in CPUID leaf 0DH, what each form saves and leaves alone, the init state, compaction, and the faults; user code whose
 * state outlives system calls, of which `hot` on the command line makes many. Output: the same on every run and engine, but for
 * components that CPUID does not offer (skipped).
 */
#include "lib.h"

static u8 area[4096] __attribute__((aligned(64))), other[4096] __attribute__((aligned(64)));
static const u64 pattern[4] __attribute__((aligned(32))) = { 0x1111111122222222, 0x3333333344444444, 0x5555555566666666, 0x7777777788888888 };
static const u64 zeros[4] __attribute__((aligned(32)));

#define SAVE(op, at, mask) asm volatile(op " (%0)" ::"r"(at), "a"((u32)(mask)), "d"((u32)((u64)(mask) >> 32)) : "memory")

CODE(fxsave_misaligned, "fxsave64 8(%rdi)\nret");
CODE(xsave_code, "movl $7, %eax\nxorl %edx, %edx\nxsave_code_at: xsave64 (%rdi)\nret");
LABEL(xsave_code_at);
CODE(xrstor_code, "movl $-1, %eax\nmovl %eax, %edx\nxrstor_code_at: xrstor64 (%rdi)\nret");
LABEL(xrstor_code_at);
CODE(xsetbv_code, "xorl %ecx, %ecx\nmovl %edi, %eax\nmovq %rdi, %rdx\nshrq $32, %rdx\nxsetbv_code_at: xsetbv\nret");
LABEL(xsetbv_code_at);
CODE(xgetbv_code, "movl %edi, %ecx\nxgetbv_code_at: xgetbv\nret");
LABEL(xgetbv_code_at);
CODE(vex_code, "vpxor %xmm0, %xmm0, %xmm0\nret");
CODE(vex_code_2, "vandps %ymm0, %ymm0, %ymm0\nret");

CODE(fxrstor_code, "fxrstor64 (%rdi)\nret");
CODE(ldmxcsr_code, "ldmxcsr 24(%rdi)\nret");
static void test_fxsave(void)
{
    u32 mxcsr = 0x1f81;
    u16 control = 0x027f;
    asm volatile("fninit; fldcw %0; ldmxcsr %1; fld1; fldpi" ::"m"(control), "m"(mxcsr));
    asm volatile("movups %0, %%xmm0; movups %0, %%xmm15" ::"m"(pattern));
    memset(area, 0xcc, 512);
    asm volatile("fxsave64 %0" : "=m"(area));
    check("fxsave-control", *(u16 *)area, 0x027f);
    check("fxsave-status", *(u16 *)(area + 2) & 0x3800, 0x3000); /* TOP is 6 */
    check("fxsave-tags", area[4], 0xc0);
    check("fxsave-mxcsr", *(u32 *)(area + 24), 0x1f81);
    check("fxsave-st0", *(u64 *)(area + 32), 0xc90fdaa22168c235);
    check("fxsave-st1", *(u64 *)(area + 48) | *(u16 *)(area + 56), 0x8000000000003fff);
    check("fxsave-xmm0", *(u64 *)(area + 160), pattern[0]);
    check("fxsave-xmm15", *(u64 *)(area + 160 + 15 * 16 + 8), pattern[1]);
    check("fxsave-rest-untouched", area[464] | area[511] << 8, 0xcccc);
    *(u64 *)(area + 160) = 0xabcdef;
    *(u32 *)(area + 24) = 0x1fa0;
    asm volatile("fninit; xorps %%xmm0, %%xmm0; fxrstor64 %0" ::"m"(area));
    u64 value;
    asm volatile("movq %%xmm0, %0" : "=r"(value));
    check("fxrstor-xmm0", value, 0xabcdef);
    asm volatile("stmxcsr %0" : "=m"(mxcsr));
    check("fxrstor-mxcsr", mxcsr, 0x1fa0);
    asm volatile("fstp %%st(0); fstpl %0; fninit" : "=m"(value));
    check("fxrstor-st1", value, 0x3ff0000000000000);
    expect_trap("fxsave-misaligned", fxsave_misaligned, area, GP, 0, (u64)fxsave_misaligned);
    *(u32 *)(area + 24) = 0x80000000;
    expect_trap("fxrstor-reserved-mxcsr", fxrstor_code, area, GP, 0, (u64)fxrstor_code);
    expect_trap("ldmxcsr-reserved", ldmxcsr_code, area, GP, 0, (u64)ldmxcsr_code);
    mxcsr = 0x1f80;
    asm volatile("ldmxcsr %0" ::"m"(mxcsr));
}

static void test_control(bool avx)
{
    expect_trap("xsave-off", xsave_code, area, UD, 0, (u64)xsave_code_at);
    expect_trap("xgetbv-off", xgetbv_code, NULL, UD, 0, (u64)xgetbv_code_at);
    check("cpuid-osxsave-before", has1c(27), 0);
    if (avx)
        expect_trap("avx-off", vex_code, NULL, UD, 0, (u64)vex_code);
    write_cr4(read_cr4() | 1 << 18);
    check("cpuid-osxsave-after", has1c(27), 1);
    check("xcr0-at-reset", xgetbv(0), 1);
    if (avx)
        expect_trap("avx-not-enabled", vex_code_2, NULL, UD, 0, (u64)vex_code_2);
    expect_trap("xsetbv-without-x87", xsetbv_code, (void *)2, GP, 0, (u64)xsetbv_code_at);
    expect_trap("xsetbv-avx-without-sse", xsetbv_code, (void *)5, GP, 0, (u64)xsetbv_code_at);
    expect_trap("xsetbv-unknown", xsetbv_code, (void *)(1ull << 62 | 1), GP, 0, (u64)xsetbv_code_at);
    expect_trap("xgetbv-unknown", xgetbv_code, (void *)5, GP, 0, (u64)xgetbv_code_at);
    xsetbv(0, avx ? 7 : 3);
    check("xcr0", xgetbv(0), avx ? 7 : 3);
    if (avx)
        check("avx-on", catch((void *)vex_code_2, NULL), NO_TRAP);
    struct cpuid leaf = cpuid(0xd, 0);
    check("size-enabled", leaf.b, avx ? 576 + 256 : 576);
    check_true("size-supported", leaf.c >= leaf.b);
    check("supported-has-enabled", leaf.a & (avx ? 7 : 3), avx ? 7 : 3);
    if (avx) {
        leaf = cpuid(0xd, 2);
        check("avx-component", (u64)leaf.a << 32 | leaf.b, 256ull << 32 | 576);
    }
}

static void load_state(bool avx)
{
    asm volatile("fninit; fld1");
    asm volatile("movups %0, %%xmm3" ::"m"(pattern));
    if (avx)
        asm volatile("vmovups %0, %%ymm3" ::"m"(pattern));
}

static void clear_state(bool avx)
{
    asm volatile("fninit");
    asm volatile("xorps %%xmm3, %%xmm3" ::);
    if (avx)
        asm volatile("vzeroall" ::);
}

static u64 xmm3(void)
{
    u64 value;
    asm volatile("movq %%xmm3, %0" : "=r"(value));
    return value;
}
static u64 ymm3_high(void)
{
    u64 value[2];
    asm volatile("vextractf128 $1, %%ymm3, %0" : "=m"(value));
    return value[1];
}

#define BV(at) (*(volatile u64 *)((at) + 512))
#define COMPACT(at) (*(volatile u64 *)((at) + 520))

static void test_save(bool avx)
{
    u64 all = avx ? 7 : 3;
    memset(area, 0, sizeof area);
    clear_state(avx);
    load_state(avx);
    SAVE("xsave64", area, ~0ull);
    check("xsave-bv", BV(area), all);
    check("xsave-xmm3", *(u64 *)(area + 160 + 48), pattern[0]);
    if (avx)
        check("xsave-ymm3", *(u64 *)(area + 576 + 48 + 8), pattern[3]);
    clear_state(avx);
    SAVE("xrstor64", area, ~0ull);
    check("xrstor-xmm3", xmm3(), pattern[0]);
    if (avx)
        check("xrstor-ymm3", ymm3_high(), pattern[3]);
    /* Components that are not asked for stay as they are, in registers and in memory. */
    clear_state(avx);
    SAVE("xrstor64", area, 1);
    check("xrstor-x87-only", xmm3(), 0);
    u64 one;
    asm volatile("fstpl %0" : "=m"(one));
    check("xrstor-x87-value", one, 0x3ff0000000000000);
    load_state(avx); /* in its init state, SSE might be left out of XSTATE_BV */
    memset(other, 0x5a, sizeof other);
    memset(other + 512, 0, 64);
    SAVE("xsave64", other, 2);
    check("xsave-sse-only", BV(other), 2);
    check("xsave-x87-untouched", other[0] | other[32] << 8, 0x5a5a);
    /* A clear bit in XSTATE_BV restores the component's init state. */
    load_state(avx);
    BV(area) = all & ~2ull;
    SAVE("xrstor64", area, ~0ull);
    check("xrstor-init-sse", xmm3(), 0);
    if (avx)
        check("xrstor-init-keeps-avx", ymm3_high(), pattern[3]);
    BV(area) = all;
    /* x87 in its init state. */
    clear_state(avx);
    SAVE("xrstor64", area, 0);
    check("xrstor-nothing", xmm3(), 0);
    SAVE("xsave64", area, ~0ull);
    check_true("xsave-init-bv", !(BV(area) & ~all));

    BV(area) = all;
    BV(area) = 1ull << 40;
    expect_trap("xrstor-unknown-component", xrstor_code, area, GP, 0, (u64)xrstor_code_at);
    BV(area) = all;
    *(u64 *)(area + 528) = 1;
    expect_trap("xrstor-reserved-header", xrstor_code, area, GP, 0, (u64)xrstor_code_at);
    *(u64 *)(area + 528) = 0;
    expect_trap("xsave-misaligned", xsave_code, area + 16, GP, 0, (u64)xsave_code_at);
    write_cr0(read_cr0() | 8);
    expect_trap("xsave-ts", xsave_code, area, NM, 0, (u64)xsave_code_at);
    asm volatile("clts");
    expect_trap("xsave-missing", xsave_code, (void *)0xffff800000000000ull, PF, 2, (u64)xsave_code_at);
    check("xsave-missing-page", last_trap.cr2 >> 12, 0xffff800000000ull); /* which part is written first is not said */
}

static void test_extensions(bool avx)
{
    u32 extensions = cpuid(0xd, 1).a;
    if (extensions & 1) {
        memset(area, 0, sizeof area);
        load_state(avx);
        SAVE("xsaveopt64", area, ~0ull);
        check("xsaveopt-xmm3", *(u64 *)(area + 160 + 48), pattern[0]);
        clear_state(avx);
        SAVE("xrstor64", area, ~0ull);
        check("xsaveopt-back", xmm3(), pattern[0]);
    } else {
        skip("xsaveopt", "not in CPUID");
    }
    if (extensions & 2) {
        memset(area, 0, sizeof area);
        load_state(avx);
        SAVE("xsavec64", area, avx ? 6 : 2);
        check("xsavec-compact", COMPACT(area), 1ull << 63 | (avx ? 6 : 2));
        check("xsavec-xmm3", *(u64 *)(area + 160 + 48), pattern[0]);
        if (avx)
            check("xsavec-ymm3", *(u64 *)(area + 576 + 48), pattern[2]);
        clear_state(avx);
        SAVE("xrstor64", area, ~0ull);
        check("xsavec-back", xmm3(), pattern[0]);
        COMPACT(area) |= 1ull << 50;
        expect_trap("xrstor-compact-unknown", xrstor_code, area, GP, 0, (u64)xrstor_code_at);
    } else {
        skip("xsavec", "not in CPUID");
    }
    if (extensions & 4) {
        load_state(avx);
        check("xgetbv-1", xgetbv(1) & 2, 2);
    } else {
        skip("xgetbv-1", "not in CPUID");
    }
}

/* rdi: how often. Sums of the count in XMM0 and of ones in ST(0), and of the carry that outlives the system call and what
 * comes behind it. The kernel's part does nothing. */
CODE(user_sums, "pxor %xmm0, %xmm0\nfninit\nfldz\nxorl %edx, %edx\n"
                "1: movq %rdi, %xmm1\npaddq %xmm1, %xmm0\nfld1\nfaddp\nstc\nsyscall\n"
                "movq %xmm0, %rax\nadcq $0, %rdx\nsyscall\nfst %st(1)\ndecq %rdi\njnz 1b\n"
                "subq $8, %rsp\nfistpq (%rsp)\npopq %rsi\nint $0x80");
CODE(user_first, "user_first_at: pxor %xmm0, %xmm0\nint $0x80");
LABEL(user_first_at);
CODE(at_syscall, "sysretq");

static void test_user(u64 times)
{
    allow_user();
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1);
    wrmsr(MSR_STAR, (u64)KERNEL_CS << 32 | (u64)(USER_CS - 16) << 48);
    wrmsr(MSR_LSTAR, (u64)at_syscall);
    wrmsr(MSR_SFMASK, FLAG_IF | FLAG_DF | FLAG_TF | FLAG_AC);
    u64 top = (u64)user_stack + sizeof user_stack;
    struct user_state registers = { .rdi = times };
    check("user-vector", run_user((u64)user_sums, top, USER_CS, 0, &registers), 0x80);
    check("user-xmm", last_trap.frame.rax, times * (times + 1) / 2);
    check("user-carry", last_trap.frame.rdx, times);
    check("user-x87", last_trap.frame.rsi, times);
    check("user-again", run_user((u64)user_first, top, USER_CS, 0, NULL), 0x80);
    write_cr0(read_cr0() | 8); /* TS */
    check_trap("user-not-available", run_user((u64)user_first, top, USER_CS, 0, NULL), NM, 0, (u64)user_first_at);
    write_cr0(read_cr0() & ~8ull);
}

void guest_main(const struct start_info *info)
{
    (void)info, (void)zeros;
    test_fxsave();
    if (!has1c(26)) {
        skip("xsave", "not in CPUID");
        return;
    }
    bool avx = has1c(28);
    if (starts_with(command_line, "hot")) {
        write_cr0((read_cr0() | 2) & ~0xcull); /* MP; no EM, no TS */
        write_cr4(read_cr4() | 0x600);         /* OSFXSR, OSXMMEXCPT */
        test_user(5000);
        finish();
    }
    test_control(avx);
    test_save(avx);
    test_extensions(avx);
    test_user(10);
}
