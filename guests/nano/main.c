/* nano: what single operations of a kernel cost, in cycles, after Adams and Agesen 2006, section 6.3.
 *
 * Each operation runs in a loop with the least handler that it can have. The word `rounds=N` on the command line says how
 * often each loop is run, `only=NAME` runs one alone. Output: a line `NANO name cycles times checksum` a round (cycles are those of all times together,
 * by RDTSC; the checksum is the same on every engine), `NANO-SKIP name why` for what the processor lacks, then PASS.
 */
#include "lib.h"
#include "loops.h"

#define V 0x8000000000ull /* a part of the address space that nothing else uses */
#define USER_TOP ((u64)user_stack + sizeof user_stack)

/* For the loops, which name them. */
static u64 *pte __attribute__((used)), here[2] __attribute__((used)), spaces[2] __attribute__((used));

/* Handlers: each steps over the instruction that trapped, or counts. */
LABEL(at_page_fault);
LABEL(at_divide);
LABEL(at_ipi);
LABEL(at_syscall);
static volatile u64 handled __attribute__((used));

asm(".pushsection .text\n"
    ".balign 64\n"
    "at_page_fault:\n" /* movb (%rsi), %al has two bytes */
    "  addq $8, %rsp\n"
    "  addq $2, (%rsp)\n"
    "  incq handled(%rip)\n"
    "  iretq\n"
    ".balign 64\n"
    "at_divide:\n" /* divl %ecx has two bytes */
    "  addq $2, (%rsp)\n"
    "  incq handled(%rip)\n"
    "  iretq\n"
    ".balign 64\n"
    "at_ipi:\n"
    "  incq handled(%rip)\n"
    "  movl $0, 0xb0(%r8)\n" /* EOI */
    "  iretq\n"
    ".balign 64\n"
    "at_syscall:\n"
    "  incq handled(%rip)\n"
    "  sysretq\n"
    ".popsection");

/* u64 loop(u64 times, void *argument) */
typedef u64 loop(u64 times, void *argument);



CODE(loop_in, "xorl %r8d, %r8d\n 1: inb $0x80, %al\n movzbl %al, %eax\n addq %rax, %r8\n decq %rdi\n jnz 1b\n movq %r8, %rax\n ret");
CODE(loop_cr8wr, "1: movl %edi, %eax\n andl $7, %eax\n movq %rax, %cr8\n decq %rdi\n jnz 1b\n movq %cr8, %rax\n ret");
CODE(loop_pgfault, "1: movb (%rsi), %al\n decq %rdi\n jnz 1b\n movq handled(%rip), %rax\n ret");
CODE(loop_divzero, "xorl %ecx, %ecx\n 1: divl %ecx\n decq %rdi\n jnz 1b\n movq handled(%rip), %rax\n ret");
CODE(loop_invlpg, "movq (%rsi), %rax\n 1: invlpg (%rsi)\n decq %rdi\n jnz 1b\n addq (%rsi), %rax\n ret");
/* The page table's entry turns from one page to the other; each access must see the page of its turn. */
CODE(loop_ptemod, "xorl %r8d, %r8d\n movq pte(%rip), %rdx\n"
                  "1: movl %edi, %ecx\n andl $1, %ecx\n movq here(,%rcx,8), %rax\n movq %rax, (%rdx)\n"
                  "  invlpg (%rsi)\n addq (%rsi), %r8\n decq %rdi\n jnz 1b\n movq %r8, %rax\n ret");
/* Two address spaces by turns, and eight pages touched in each. */
CODE(loop_switch, "xorl %r8d, %r8d\n movq %cr3, %r9\n"
                  "1: movl %edi, %ecx\n andl $1, %ecx\n movq spaces(,%rcx,8), %rax\n movq %rax, %cr3\n"
                  "  addq (%rsi), %r8\n addq 0x1000(%rsi), %r8\n addq 0x2000(%rsi), %r8\n addq 0x3000(%rsi), %r8\n"
                  "  addq 0x4000(%rsi), %r8\n addq 0x5000(%rsi), %r8\n addq 0x6000(%rsi), %r8\n addq 0x7000(%rsi), %r8\n"
                  "  decq %rdi\n jnz 1b\n movq %r9, %cr3\n movq %r8, %rax\n ret");
/* The interrupt is taken before the loop looks again: a local APIC delivers to itself at once or a little later. */
CODE(loop_ipi, "movl $0xfee00000, %r8d\n xorl %edx, %edx\n sti\n"
               "1: incq %rdx\n movl $0x40071, 0x300(%r8)\n"
               "2: cmpq %rdx, handled(%rip)\n jne 2b\n decq %rdi\n jnz 1b\n cli\n movq handled(%rip), %rax\n ret");
CODE(user_syscalls, "1: syscall\n decq %rdi\n jnz 1b\n int $0x80");

static u64 loop_syscall(u64 times, void *argument)
{
    (void)argument;
    struct user_state registers = { .rdi = times };
    u64 vector = run_user((u64)user_syscalls, USER_TOP, USER_CS, 0, &registers);
    return vector << 32 | handled;
}

static unsigned rounds = 3;
static const char *only = "";

static void measure(const char *name, loop *run, u64 times, void *argument)
{
    size_t size = strlen(name);
    if (*only && !(starts_with(only, name) && (only[size] == 0 || only[size] == ' ')))
        return;
    run(times < 1000 ? times : 1000, argument); /* not the first time that counts */
    for (unsigned round = 0; round < rounds; round++) {
        handled = 0;
        u64 before = rdtsc();
        u64 result = run(times, argument);
        u64 cycles = rdtsc() - before;
        say("NANO %s %lu %lu %016lx\n", name, cycles, times, result);
    }
}

static void measure_syscall(void)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1);
    wrmsr(MSR_STAR, (u64)KERNEL_CS << 32 | (u64)(USER_CS - 16) << 48);
    wrmsr(MSR_LSTAR, (u64)at_syscall);
    wrmsr(MSR_SFMASK, FLAG_IF | FLAG_DF | FLAG_TF | FLAG_AC);
    measure("syscall", loop_syscall, 100000, NULL);
}

static void measure_faults(void)
{
    *entry_of(read_cr3(), V, 1) = 0;
    set_gate(PF, at_page_fault, 0, 0, GATE_INTERRUPT);
    measure("pgfault", (loop *)loop_pgfault, 20000, (void *)V);
    set_gate(PF, trap_stubs[PF], 0, 0, GATE_INTERRUPT);
    set_gate(DE, at_divide, 0, 0, GATE_INTERRUPT);
    measure("divzero", (loop *)loop_divzero, 20000, NULL);
    set_gate(DE, trap_stubs[DE], 0, 0, GATE_INTERRUPT);
}

static void measure_mappings(void)
{
    for (u64 i = 0; i < 2; i++) {
        u64 *page = take_page();
        page[0] = 3 + 4 * i;
        here[i] = (u64)page | PTE_P | PTE_W | PTE_A | PTE_D;
    }
    pte = entry_of(read_cr3(), V, 1);
    *pte = here[0];
    measure("invlpg", (loop *)loop_invlpg, 50000, (void *)V);
    measure("ptemod", (loop *)loop_ptemod, 20000, (void *)V);
    /* Each space has a page table of its own for eight pages, and shares the rest. */
    for (u64 space = 0; space < 2; space++) {
        u64 *root = take_page();
        memcpy(root, boot_pml4, 4096);
        root[V >> 39 & 511] = 0;
        for (u64 i = 0; i < 8; i++) {
            u64 *page = take_page();
            page[0] = 100 * space + i;
            *entry_of((u64)root, V + i * 4096, 1) = (u64)page | PTE_P | PTE_W;
        }
        spaces[space] = (u64)root;
    }
    measure("switch", (loop *)loop_switch, 20000, (void *)V);
    if (!has1c(17)) {
        say("NANO-SKIP switch-pcid not in CPUID\n");
        return;
    }
    write_cr4(read_cr4() | 1 << 17);
    for (u64 space = 0; space < 2; space++)
        spaces[space] |= (space + 1) | 1ull << 63; /* keep what the processor knows of this PCID */
    measure("switch-pcid", (loop *)loop_switch, 20000, (void *)V);
    write_cr4(read_cr4() & ~(1ull << 17));
}

static void measure_ipi(void)
{
    if (!has1d(9)) {
        say("NANO-SKIP ipi-self not in CPUID\n");
        return;
    }
    pic_start();
    set_gate(0x71, at_ipi, 0, 0, GATE_INTERRUPT);
    measure("ipi-self", (loop *)loop_ipi, 20000, NULL);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    for (const char *word = command_line; *word; word++) {
        if (starts_with(word, "only="))
            only = word + 5;
        if (starts_with(word, "rounds=")) {
            rounds = 0;
            for (const char *digit = word + 7; *digit >= '0' && *digit <= '9'; digit++)
                rounds = rounds * 10 + (unsigned)(*digit - '0');
        }
    }
    allow_user();
    measure_syscall();
    measure("in", (loop *)loop_in, 20000, NULL);
    measure("cr8wr", (loop *)loop_cr8wr, 50000, NULL);
    measure("callret", (loop *)loop_callret, CALLRET_TIMES, NULL);
    measure_faults();
    measure_mappings();
    measure_ipi();
    measure("smc", (loop *)loop_smc, SMC_TIMES, take_page());
}
