/* telling: user code whose hot loops share a page with instructions that tell of the processor, which a machine in the
 * machine must answer itself: CPUID and XGETBV (Intel SDM (2024-12) Vol. 2A chapter 3, Vol. 2D chapter 6).
 *
 * Each answers what it answers the kernel; code is read as it is; instructions that change are what they became. Output:
 * the same on every run and engine.
 */
#include "lib.h"

enum { ROUNDS = 500, WORDS = 4096 / 8, CHANGES = 2, OWN_CHANGES = 16 };

#define PAGE(name, text) \
    asm(".pushsection .text\n.balign 4096\n.globl " #name "\n" #name ":\n" text "\n.balign 4096\n.popsection"); \
    extern u8 name[4096]

/* rdi: rounds. r8: the words of the page, over and over; r9: what CPUID and XGETBV answer. */
#define READ_PAGE(name) "leaq " #name "(%rip), %rsi\nmovl $512, %ecx\n2: addq (%rsi), %r8\nrolq $3, %r8\naddq $8, %rsi\ndecl %ecx\njnz 2b\n"
#define ANSWER "addq %rax, %r9\naddq %rbx, %r9\naddq %rcx, %r9\naddq %rdx, %r9\n"
#define ASK "movl $1, %eax\nxorl %ecx, %ecx\n"

/* Few enough for the breakpoints of a processor, the second one in three bytes that may change. */
PAGE(few, "xorl %r8d, %r8d\nxorl %r9d, %r9d\n1: xorl %ebx, %ebx\n" READ_PAGE(few)
          "xorl %ecx, %ecx\nxgetbv\n" ANSWER ASK "few_changes: cpuid\nnop\n" ANSWER "decl %edi\njnz 1b\nint $0x80");
LABEL(few_changes);

/* Too many for them. */
PAGE(many, "xorl %r8d, %r8d\nxorl %r9d, %r9d\n1: xorl %ebx, %ebx\n" READ_PAGE(many)
           "xorl %ecx, %ecx\nxgetbv\n" ANSWER
           ".rept 8\n" ASK "cpuid\n" ANSWER ".endr\n"
           "decl %edi\njnz 1b\nint $0x80");

/* Writes to its own page: the number that it adds next. */
PAGE(own, "xorl %r9d, %r9d\n1: movl %edi, own_number(%rip)\n.byte 0xb8\nown_number: .long 0\naddq %rax, %r9\n"
          "xorl %ecx, %ecx\nxgetbv\naddq %rax, %r9\ndecl %edi\njnz 1b\nint $0x80");

static u64 read_page(const u8 *page, u64 sum)
{
    const u64 *words = (const u64 *)page;
    for (u32 i = 0; i < WORDS; i++) {
        sum += words[i];
        sum = sum << 3 | sum >> 61;
    }
    return sum;
}

/* What the page adds up to in r8 and r9 in some rounds, each with `answers`. */
static void check_page(const char *name, const char *read, u8 *page, u32 rounds, u64 answers)
{
    struct user_state registers = { .rdi = rounds };
    u64 sum = 0, vector = run_user((u64)page, (u64)user_stack + sizeof user_stack, USER_CS, FLAG_IF, &registers);
    for (u32 i = 0; i < rounds; i++)
        sum = read_page(page, sum);
    check(name, vector == 0x80 ? last_trap.frame.r9 : vector, answers * rounds);
    check(read, last_trap.frame.r8, sum);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    if (!has1c(26) || !has1c(28) || !has7b(0)) {
        skip("telling", "no XSAVE, AVX or FSGSBASE in CPUID");
        return;
    }
    pic_start();
    allow_user();
    write_cr0((read_cr0() | 1 << 5 | 1 << 1) & ~0xcull); /* NE, MP; no EM, no TS */
    write_cr4(read_cr4() | 1 << 18 | 1 << 16 | 3 << 9);  /* OSXSAVE, FSGSBASE, OSFXSR, OSXMMEXCPT */
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1 << 11);          /* NXE */
    xsetbv(0, 7);
    struct cpuid leaf = cpuid(1, 0);
    u64 answer = (u64)leaf.a + leaf.b + leaf.c + leaf.d;

    check_page("few", "few-read", few, ROUNDS, 7 + answer);
    check_page("many", "many-read", many, ROUNDS, 7 + 8 * answer);
    check_page("few-again", "few-again-read", few, ROUNDS, 7 + answer);
    for (u32 i = 0; i < CHANGES; i++) {
        memcpy(few_changes, "\x0f\x01\xd0", 3); /* xgetbv; ECX is 0 */
        check_page("changed-to-xgetbv", "xgetbv-read", few, ROUNDS / 4, 7 + 7);
        memcpy(few_changes, "\x90\x90\x90", 3); /* EAX is 1 */
        check_page("changed-to-nothing", "nothing-read", few, ROUNDS / 4, 7 + 1);
        memcpy(few_changes, "\x0f\xa2\x90", 3);
        check_page("changed-back", "back-read", few, ROUNDS / 4, 7 + answer);
    }
    struct user_state registers = { .rdi = OWN_CHANGES };
    check("own-vector", run_user((u64)own, (u64)user_stack + sizeof user_stack, USER_CS, FLAG_IF, &registers), 0x80);
    check("own", last_trap.frame.r9, OWN_CHANGES * (OWN_CHANGES + 1) / 2 + OWN_CHANGES * 7);
}
