/* across: accesses that cross from one page into the next, where the two are not neighbours in memory.
 *
 * Every size and kind of access that compilers make, at every offset that crosses; the second page there, missing, read-only
 * or holding code that ran: values, flags, accessed and dirty bits, the fault's address and error code, and nothing written
 * by an access that faults (Intel SDM (2024-12) Vol. 3A 5.7 "Page-Fault Exceptions"). What is right is what the same code
 * does inside one page. `hot` on the command line runs a few of them often instead. Output: the same on every run and engine.
 */
#include "lib.h"

#define PAGE 0xa000000000ull /* two pages of our own, and a third that is never there */
#define END (PAGE + 0x1000)

struct work {
    u64 at, in[4], out[4], flags;
};

/* rdi: the work; rsi: where to access; rax, and xmm0 or ymm0, from `in`. All of it goes to `out`, and so do the flags, but for
 * AF, which logical instructions leave undefined. */
#define BEFORE "pushq %rdi\nmovq (%rdi), %rsi\nmovq 8(%rdi), %rax\nmovl $0x1234, %ecx\n"
#define AFTER "\npushfq\npopq %rdx\nandq $-17, %rdx\nmovq %rdx, 72(%rdi)\nmovq %rax, 40(%rdi)\nmovq %rcx, 48(%rdi)\npopq %rdi\nret"
#define GENERAL(name, code) CODE(name, BEFORE "cmpl $5, %ecx\nstc\n" code AFTER)
#define SSE(name, code) CODE(name, BEFORE "movups 8(%rdi), %xmm0\n" code "\nmovups %xmm0, 56(%rdi)\nxorl %edx, %edx" AFTER)
#define AVX(name, code) \
    CODE(name, BEFORE "vmovups 8(%rdi), %ymm0\n" code "\nvmovups %ymm0, 40(%rdi)\nmovq 40(%rdi), %rax\nmovq 48(%rdi), %rcx\nxorl %edx, %edx" AFTER)

GENERAL(load_2, "movzwl (%rsi), %ecx");
GENERAL(load_4, "movl (%rsi), %ecx");
GENERAL(load_8, "movq (%rsi), %rcx");
GENERAL(load_8_homeless, "movq (%rsi), %r11\nmovq %r11, %rcx");
GENERAL(load_8_from_r10, "movq %rsi, %r10\nmovq (%r10), %rcx");
GENERAL(load_8_r15_index, "pushq %r15\nmovq %rsi, %r15\nmovl $0, %edx\nmovq (%r15,%rdx,4), %r15\nmovq %r15, %rcx\npopq %r15");
GENERAL(load_add_8, "addq (%rsi), %rcx");
GENERAL(load_adc_4, "adcl (%rsi), %ecx");
GENERAL(load_cmp_8, "cmpq %rax, (%rsi)");
GENERAL(store_2, "movw %ax, (%rsi)");
GENERAL(store_4, "movl %eax, (%rsi)");
GENERAL(store_8, "movq %rax, (%rsi)");
GENERAL(store_8_constant, "movq $-5, (%rsi)");
GENERAL(store_8_r11, "movq %rax, %r11\nmovq %r11, (%rsi)");
GENERAL(store_8_keeps_flags, "movq %rax, (%rsi)\nadcq $0, %rcx");
GENERAL(modify_2, "incw (%rsi)");
GENERAL(modify_4, "adcl %eax, (%rsi)");
GENERAL(modify_8, "addq %rax, (%rsi)\nsbbq %rcx, %rcx");
GENERAL(modify_8_shift, "movl $1, %ecx\nshlq %cl, (%rsi)");
GENERAL(modify_8_r10, "movq %rax, %r10\nxorq %r10, (%rsi)");
GENERAL(modify_8_xadd, "xaddq %rax, (%rsi)");
GENERAL(locked_8_add, "lock addq %rax, (%rsi)");
GENERAL(locked_4_xchg, "xchgl %eax, (%rsi)");
GENERAL(compare_8, "cmpxchgq %rcx, (%rsi)");
GENERAL(bit_8, "movl $9, %edx\nbtsq %rdx, (%rsi)\nsbbq %rcx, %rcx");
GENERAL(push_8, "leaq 8(%rsi), %rdx\nxchgq %rdx, %rsp\npushq %rax\nxchgq %rdx, %rsp");
GENERAL(pop_8, "xchgq %rsi, %rsp\npopq %rcx\nxchgq %rsi, %rsp");
GENERAL(call_8, "leaq 8(%rsi), %rdx\nxchgq %rdx, %rsp\ncall 1f\n1: xchgq %rdx, %rsp\nsubq %rdx, %rsi\nmovq %rsi, %rcx\nmovl $0, %edx");
SSE(load_16, "movups (%rsi), %xmm0");
SSE(load_16_lower, "movsd (%rsi), %xmm0");
SSE(store_16, "movups %xmm0, (%rsi)");
SSE(store_8_lower, "movlps %xmm0, (%rsi)");
SSE(x87_10, "fninit\nfldt (%rsi)\nfld1\nfstpt (%rsi)\nfstp %st(0)");
AVX(load_32, "vmovups (%rsi), %ymm0");
AVX(load_and_32, "vandps (%rsi), %ymm0, %ymm0");
AVX(store_32, "vmovups %ymm0, (%rsi)");
/* Accesses off one register, which an engine may check together. */
GENERAL(loads_2_of_8, "movq (%rsi), %rcx\naddq 8(%rsi), %rcx");
GENERAL(loads_4_of_4, "movl 12(%rsi), %ecx\naddl 8(%rsi), %ecx\nadcl 4(%rsi), %ecx\nadcl (%rsi), %ecx");
AVX(loads_4_of_32, "vmovups (%rsi), %ymm0\nvandps 32(%rsi), %ymm0, %ymm0\nvorps 64(%rsi), %ymm0, %ymm0\nvxorps 96(%rsi), %ymm0, %ymm0");

static u8 *first, *second, *plain;
static bool has_avx;

static const struct kind {
    const char *name;
    void *code;
    int size;
    bool writes, avx;
    bool loads_first; /* by an instruction of its own */
    int start;        /* where the first of several accesses is */
} kinds[] = {
#define LOAD(name, size) { #name, name, size, false, false, false, 0 }
#define STORE(name, size) { #name, name, size, true, false, false, 0 }
#define WIDE(name, size, writes) { #name, name, size, writes, true, false, 0 }
    LOAD(load_2, 2), LOAD(load_4, 4), LOAD(load_8, 8), LOAD(load_8_homeless, 8), LOAD(load_8_from_r10, 8),
    LOAD(load_8_r15_index, 8), LOAD(load_add_8, 8), LOAD(load_adc_4, 4), LOAD(load_cmp_8, 8),
    STORE(store_2, 2), STORE(store_4, 4), STORE(store_8, 8), STORE(store_8_constant, 8), STORE(store_8_r11, 8),
    STORE(store_8_keeps_flags, 8), STORE(modify_2, 2), STORE(modify_4, 4), STORE(modify_8, 8), STORE(modify_8_shift, 8),
    STORE(modify_8_r10, 8), STORE(modify_8_xadd, 8), STORE(locked_8_add, 8), STORE(locked_4_xchg, 4),
    STORE(compare_8, 8), STORE(bit_8, 8), STORE(push_8, 8), LOAD(pop_8, 8), STORE(call_8, 8), LOAD(load_16, 16),
    LOAD(load_16_lower, 8), STORE(store_16, 16), STORE(store_8_lower, 8), { "x87_10", x87_10, 10, true, false, true, 0 }, WIDE(load_32, 32, false),
    WIDE(load_and_32, 32, false), WIDE(store_32, 32, true), LOAD(loads_2_of_8, 16), { "loads_4_of_4", loads_4_of_4, 16, false, false, false, 12 },
    WIDE(loads_4_of_32, 128, false),
};

/* A page's end and the start of the next, as bytes that differ from run to run. */
enum { SIDE = 128 };

static u8 byte_at(int index, u32 round) { return (u8)(index * 7 + round * 13 + (round >> 3) + 1); }

static void fill(u8 *before, u8 *after, u32 round)
{
    for (int i = 0; i < SIDE; i++) {
        before[i] = byte_at(i, round);
        after[i] = byte_at(SIDE + i, round);
    }
}

static struct work work_at(u64 at, u32 round)
{
    struct work work = { .at = at };
    for (int i = 0; i < 4; i++)
        work.in[i] = 0x9e3779b97f4a7c15ull * (round + 1) + 0x0123456789abcdefull * (u64)i;
    return work;
}

static bool same(const struct work *a, const struct work *b)
{
    return memcmp(a->out, b->out, sizeof a->out) == 0 && a->flags == b->flags;
}

static u64 run(void *code, struct work *work) { return catch((void (*)(void *))code, work); }

static void set_second(u64 flags)
{
    map(END, flags ? (u64)second : 0, flags);
    invlpg(END);
}

static void report(const struct kind *kind, const char *what, u64 wrong)
{
    char name[64];
    size_t size = strlen(kind->name);
    memcpy(name, kind->name, size);
    name[size] = '-';
    memcpy(name + size + 1, what, strlen(what) + 1);
    check(name, wrong, 0);
}

/* Both pages there: as inside a page. */
static u64 there(const struct kind *kind, int before, u32 round)
{
    u8 *middle = plain + 2048;
    fill(middle - SIDE, middle, round);
    struct work wanted = work_at((u64)middle - (u64)before, round);
    run(kind->code, &wanted);
    fill(first + 4096 - SIDE, second, round);
    struct work got = work_at(END - (u64)before, round);
    u64 wrong = run(kind->code, &got) != NO_TRAP;
    /* The address that a call pushes is the same; all else depends on no address. */
    wrong |= !same(&wanted, &got);
    wrong |= memcmp(middle - SIDE, first + 4096 - SIDE, SIDE) != 0 || memcmp(middle, second, SIDE) != 0;
    return wrong;
}

/* The second page faults: its address, the right error code, nothing written. */
static u64 faults(const struct kind *kind, int before, u32 round, u64 error)
{
    fill(first + 4096 - SIDE, second, round);
    struct work work = work_at(END - (u64)before, round);
    u64 address = work.at + (u64)kind->start;
    u64 wrong = run(kind->code, &work) != PF || last_trap.frame.error != error;
    wrong |= last_trap.cr2 != (address > END ? address : END);
    for (int i = 0; i < SIDE; i++)
        wrong |= first[4096 - SIDE + i] != byte_at(i, round) || second[i] != byte_at(SIDE + i, round);
    return wrong;
}

static u64 bits_of(const struct kind *kind, int before)
{
    u64 *one = entry_of(read_cr3(), PAGE, 1), *two = entry_of(read_cr3(), END, 1);
    *one &= ~(PTE_A | PTE_D), *two &= ~(PTE_A | PTE_D);
    invlpg(PAGE), invlpg(END);
    struct work work = work_at(END - (u64)before, 1);
    run(kind->code, &work);
    u64 wanted = kind->writes ? PTE_A | PTE_D : PTE_A;
    return (*one & (PTE_A | PTE_D)) != wanted || (*two & (PTE_A | PTE_D)) != wanted;
}

static void test(const struct kind *kind)
{
    u64 wrong_there = 0, wrong_bits = 0, wrong_missing = 0, wrong_read_only = 0;
    u32 round = 0;
    for (int before = 1; before < kind->size; before++) {
        set_second(PTE_P | PTE_W);
        for (int i = 0; i < 3; i++)
            wrong_there += there(kind, before, round++);
        wrong_bits += bits_of(kind, before);
        set_second(0);
        for (int i = 0; i < 2; i++)
            wrong_missing += faults(kind, before, round++, kind->writes && !kind->loads_first ? 2 : 0);
        set_second(PTE_P);
        for (int i = 0; i < 2; i++)
            wrong_read_only += kind->writes ? faults(kind, before, round++, 3) : there(kind, before, round++);
    }
    report(kind, "there", wrong_there);
    report(kind, "bits", wrong_bits);
    report(kind, "missing", wrong_missing);
    report(kind, "read-only", wrong_read_only);
}

/* Stores across pages into code that has run: the next call runs what was written. */
static void test_code(void)
{
    static const u8 returns[] = { 0xb8, 0, 0, 0, 0, 0xc3 }; /* mov eax, imm32; ret */
    set_second(PTE_P | PTE_W);
    u64 (*at_start)(void) = (u64(*)(void))END, (*at_end)(void) = (u64(*)(void))(END - 6);
    u64 wrong = 0;
    for (u32 round = 0; round < 8; round++) {
        memcpy(second, returns, sizeof returns);
        u64 wanted = 0x1000 + round;
        wrong += at_start() != 0;
        struct work work = { .at = END - 3, .in[0] = wanted << 32 | 0xb8000000 };
        wrong += run(store_8, &work) != NO_TRAP || at_start() != wanted;
    }
    check("code-in-second-page", wrong, 0);
    wrong = 0;
    for (u32 round = 0; round < 8; round++) {
        memcpy(first + 4096 - 6, returns, sizeof returns);
        u64 wanted = 0x2000 + round;
        wrong += at_end() != 0;
        struct work work = { .at = END - 5, .in[0] = wanted | 0xc300000000 };
        wrong += run(store_8, &work) != NO_TRAP || at_end() != wanted;
    }
    check("code-in-first-page", wrong, 0);
}

/* Where canonical addresses end, the second half of an access is not canonical. */
static void test_hole(void)
{
    u64 last = 0x7ffffffff000;
    map(last, (u64)first, PTE_P | PTE_W);
    u64 wrong = 0;
    for (int before = 1; before < 8; before++) {
        struct work work = work_at(last + 0x1000 - (u64)before, 1);
        wrong += run(load_8, &work) != GP || last_trap.frame.error != 0;
        wrong += run(store_8, &work) != GP || last_trap.frame.error != 0;
    }
    check("end-of-canonical", wrong, 0);
}

/* `hot`: each of these often, so that who leaves translated code for it can be counted. */
static void run_hot(void)
{
    static const u8 *const codes[] = { load_8, load_4, store_8, store_8_r11, modify_8, loads_2_of_8, load_16, store_16 };
    set_second(PTE_P | PTE_W);
    for (size_t i = 0; i < ARRAY_LENGTH(codes); i++)
        for (u32 round = 0; round < 2000; round++) {
            struct work work = { .at = END - 3 };
            ((void (*)(struct work *))(u64)codes[i])(&work);
        }
    check("hot", second[0], 0);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    write_cr0((read_cr0() | 0x10002) & ~0xcull); /* WP, MP; no EM, no TS */
    write_cr4(read_cr4() | 0x600);               /* OSFXSR, OSXMMEXCPT */
    if (has1c(26)) {
        write_cr4(read_cr4() | 1 << 18);
        xsetbv(0, 7);
        has_avx = has1c(28);
    }
    set_gate(PF, trap_stubs[PF], 1, 0, GATE_INTERRUPT); /* a stack of its own: RSP is part of what is tested */
    first = take_page(), second = take_page(), plain = take_page();
    if (first + 4096 == second) {
        u8 *third = take_page();
        second = third;
    }
    map(PAGE, (u64)first, PTE_P | PTE_W);
    if (starts_with(command_line, "hot")) {
        run_hot();
        finish();
    }
    for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
        if (kinds[i].avx && !has_avx)
            skip(kinds[i].name, "no AVX");
        else
            test(&kinds[i]);
    }
    test_code();
    test_hole();
    finish();
}
