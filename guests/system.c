/* system: the instructions between kernel and user, and what only a kernel may do.
 *
 * SYSCALL and SYSRET, SYSENTER and SYSEXIT (Intel), IRET in its forms, SWAPGS and the segment bases, compatibility-mode user
 * code with the instructions that only it has, POPF and IOPL, the I/O bitmap, UMIP, TSD, LAR and its kin, CR8, CMPXCHG16B.
 * Output: the same on every run and engine, but for features that CPUID does not offer (skipped).
 */
#include "lib.h"

/* ---- SYSCALL ---- */

/* The kernel's side: remember what was handed over, then leave as a trap would. */
extern struct called {
    u64 rcx, r11, rsp, cs, ss, flags, rax;
} called;
struct called called; /* global: the assembly below writes it by name */

asm(".pushsection .text\n"
    ".globl syscall_entry\n"
    "syscall_entry:\n"
    "  movq %rcx, called+0(%rip)\n"
    "  movq %r11, called+8(%rip)\n"
    "  movq %rsp, called+16(%rip)\n"
    "  movq %rax, called+48(%rip)\n"
    "  movl %cs, %eax\n movq %rax, called+24(%rip)\n"
    "  movl %ss, %eax\n movq %rax, called+32(%rip)\n"
    "  leaq trap_stack+8192(%rip), %rsp\n"
    "  pushfq\n popq called+40(%rip)\n"
    "  movq called+16(%rip), %rsp\n"
    "  sysretq\n"
    ".globl syscall_entry_32\n"
    "syscall_entry_32:\n"
    "  movq %rcx, called+0(%rip)\n"
    "  movq %r11, called+8(%rip)\n"
    "  movq %rsp, called+16(%rip)\n"
    "  movl %cs, %eax\n movq %rax, called+24(%rip)\n"
    "  sysretl\n"
    ".popsection");
LABEL(syscall_entry);
LABEL(syscall_entry_32);

CODE(user_syscall, "movl $7, %eax\nsyscall\nuser_syscall_after: movl %cs, %ebx\nmovl %ss, %ecx\npushfq\npopq %rdx\nint $0x80");
LABEL(user_syscall_after);
CODE(kernel_syscall, "kernel_syscall_at: syscall\nret");
LABEL(kernel_syscall_at);

CODE(write_lstar, "movl $0xc0000082, %ecx\nmovl %edi, %eax\nmovq %rdi, %rdx\nshrq $32, %rdx\nwrmsr\nret");

static u64 user_top(void) { return (u64)user_stack + sizeof user_stack; }

static void test_syscall(void)
{
    check("syscall-off", run_user((u64)user_syscall, user_top(), USER_CS, 0, NULL), UD);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1);
    wrmsr(MSR_STAR, (u64)(USER_CS32) << 48 | (u64)KERNEL_CS << 32);
    wrmsr(MSR_LSTAR, (u64)syscall_entry);
    wrmsr(MSR_CSTAR, (u64)syscall_entry_32);
    wrmsr(MSR_SFMASK, FLAG_IF | FLAG_DF | FLAG_TF | FLAG_CF);
    check("star-reads-back", rdmsr(MSR_STAR), (u64)USER_CS32 << 48 | (u64)KERNEL_CS << 32);
    u64 flags = FLAG_IF | FLAG_CF | FLAG_ZF | FLAG_DF | 2;
    check("syscall", run_user((u64)user_syscall, user_top(), USER_CS, flags, NULL), 0x80);
    check("syscall-rcx", called.rcx, (u64)user_syscall_after);
    check("syscall-r11", called.r11, flags);
    check("syscall-rsp-kept", called.rsp, user_top());
    check("syscall-cs", called.cs, KERNEL_CS);
    check("syscall-ss", called.ss, KERNEL_DS);
    check("syscall-masked", called.flags, FLAG_ZF | 2);
    check("syscall-rax", called.rax, 7);
    check("sysret-cs", last_trap.frame.rbx, USER_CS);
    check("sysret-ss", last_trap.frame.rcx, USER_DS);
    check("sysret-flags", last_trap.frame.rdx, flags);
    expect_trap("lstar-non-canonical", write_lstar, (void *)0x900000000000ull, GP, 0, 0);
}

/* ---- SYSENTER ---- */

asm(".pushsection .text\n"
    ".globl sysenter_entry\n"
    "sysenter_entry:\n"
    "  movq %rsp, called+16(%rip)\n"
    "  movl %cs, %eax\n movq %rax, called+24(%rip)\n"
    "  movl %ss, %eax\n movq %rax, called+32(%rip)\n"
    "  pushfq\n popq called+40(%rip)\n"
    "  movq %rbx, %rdx\n" /* where to go back to, and with which stack */
    "  movq %rbp, %rcx\n"
    "  sti\n"
    "  rex.W sysexit\n"
    ".popsection");
LABEL(sysenter_entry);
CODE(user_sysenter, "leaq 1f(%rip), %rbx\nmovq %rsp, %rbp\nsysenter\n1: movl %cs, %ebx\nmovl %ss, %ecx\nint $0x80");

static void test_sysenter(void)
{
    if (!has1d(11) || !is_intel()) {
        skip("sysenter", "only Intel has it in long mode");
        return;
    }
    wrmsr(MSR_SYSENTER_CS, 0);
    check_trap("sysenter-off", run_user((u64)user_sysenter, user_top(), USER_CS, 0, NULL), GP, 0, (u64)user_sysenter + 10);
    wrmsr(MSR_SYSENTER_CS, KERNEL_CS);
    wrmsr(MSR_SYSENTER_EIP, (u64)sysenter_entry);
    wrmsr(MSR_SYSENTER_ESP, (u64)trap_stack + 4096);
    check("sysenter", run_user((u64)user_sysenter, user_top(), USER_CS, FLAG_IF, NULL), 0x80);
    check("sysenter-rsp", called.rsp, (u64)trap_stack + 4096);
    check("sysenter-cs-ss", called.cs << 8 | called.ss, KERNEL_CS << 8 | KERNEL_DS);
    check("sysenter-if", called.flags & FLAG_IF, 0);
    check("sysexit-cs", last_trap.frame.rbx, (KERNEL_CS + 32) | 3);
    check("sysexit-ss", last_trap.frame.rcx, (KERNEL_CS + 40) | 3);
    check("sysexit-rsp", last_trap.frame.rsp, user_top());
}

/* ---- segment bases ---- */

CODE(read_gs, "movq %gs:0, %rax\nmovq %rax, (%rdi)\nret");
CODE(rdfsbase_code, "rdfsbase %rax\nmovq %rax, (%rdi)\nret");
CODE(wrgsbase_code, "wrgsbase %rdi\nret");

static void test_bases(void)
{
    static u64 one[2] = { 0x1111, 0x1112 }, two[2] = { 0x2222, 0x2223 };
    wrmsr(MSR_GS_BASE, (u64)one);
    wrmsr(MSR_KERNEL_GS_BASE, (u64)two);
    u64 value;
    asm volatile("movq %%gs:0, %0" : "=r"(value));
    check("gs-base", value, 0x1111);
    asm volatile("swapgs; movq %%gs:8, %0" : "=r"(value)::"memory");
    check("swapgs", value, 0x2223);
    check("swapgs-msr", rdmsr(MSR_GS_BASE), (u64)two);
    check("swapgs-kernel-msr", rdmsr(MSR_KERNEL_GS_BASE), (u64)one);
    asm volatile("swapgs; addq $1, %%gs:0; movq %%gs:0, %0" : "=r"(value)::"memory");
    check("gs-modify", value, 0x1112);
    wrmsr(MSR_FS_BASE, (u64)two - 0x1000);
    asm volatile("movq $0x1000, %%rax; movq %%fs:8(%%rax), %0" : "=r"(value)::"rax");
    check("fs-base", value, 0x2223);
    asm volatile("movl $-0x1000, %%eax; addr32 movq %%fs:0x2000(%%eax), %0" : "=r"(value)::"rax");
    check("fs-address-32", value, 0x2222);
    asm volatile("movl %0, %%fs" ::"r"(KERNEL_DS));
    check("fs-load-sets-base", rdmsr(MSR_FS_BASE), 0);
    wrmsr(MSR_FS_BASE, (u64)two);
    asm volatile("push %%fs; pop %%fs; mov %%fs, %0" : "=r"(value)::"memory");
    check("fs-push-pop", value & 0xffff, KERNEL_DS);
    asm volatile("lea 0x10(%%rip), %%rax; .byte 0x64; lea 8(%%rax), %%rcx; sub %%rax, %%rcx; mov %%rcx, %0" : "=r"(value)::"rax", "rcx");
    check("lea-ignores-base", value, 8);
    struct { u32 offset; u16 selector; } __attribute__((packed)) far_pointer = { 0x89abcdef, KERNEL_DS };
    asm volatile("lgs (%1), %k0" : "=a"(value) : "b"(&far_pointer), "m"(far_pointer));
    check("lgs", value, 0x89abcdef);
    check("lgs-base", rdmsr(MSR_GS_BASE), 0);
    if (!has7b(0)) {
        skip("fsgsbase", "not in CPUID");
        return;
    }
    expect_trap("fsgsbase-off", rdfsbase_code, &value, UD, 0, (u64)rdfsbase_code);
    write_cr4(read_cr4() | 0x10000);
    asm volatile("wrfsbase %0" ::"r"(one));
    asm volatile("movq %%fs:8, %0" : "=r"(value));
    check("wrfsbase", value, 0x1112);
    asm volatile("rdfsbase %0" : "=r"(value));
    check("rdfsbase", value, (u64)one);
    asm volatile("wrgsbase %0" ::"r"((u32)0x12345678));
    check("wrgsbase-32", rdmsr(MSR_GS_BASE), 0x12345678);
    expect_trap("wrgsbase-non-canonical", wrgsbase_code, (void *)0x900000000000ull, GP, 0, 0);
}

/* ---- compatibility mode ---- */

/* 32-bit user code: everything it finds goes into registers, for the trap to show. */
asm(".pushsection .text\n.code32\n"
    ".globl compat_basic\n"
    "compat_basic:\n"
    "  movl $0x11111111, %eax\n"
    "  pushl %eax\n"
    "  pushl $0x22222222\n"
    "  popl %ebx\n"
    "  popl %ecx\n"
    "  call 1f\n"
    "1: popl %edx\n"
    "  subl $1b, %edx\n"
    "  movl %esp, %esi\n"
    "  .byte 0x40\n"             /* inc %eax: a REX prefix in 64-bit mode */
    "  .byte 0x4b\n"             /* dec %ebx */
    "  movl %cs, %edi\n"
    "  int $0x80\n"
    ".globl compat_pusha\n"
    "compat_pusha:\n"
    "  movl $1, %eax\n movl $2, %ecx\n movl $3, %edx\n movl $4, %ebx\n movl $6, %esi\n movl $7, %edi\n"
    "  pusha\n"
    "  movl 28(%esp), %eax\n"    /* eax */
    "  shll $8, %eax\n"
    "  orl (%esp), %eax\n"       /* edi */
    "  xorl %ecx, %ecx\n xorl %edi, %edi\n"
    "  popa\n"
    "  int $0x80\n"
    ".globl compat_bcd\n"
    "compat_bcd:\n"
    "  movl $0x79, %eax\n addb $0x35, %al\n daa\n"
    "  movl %eax, %ebx\n"
    "  movl $0x47, %eax\n subb $0x28, %al\n das\n"
    "  movl %eax, %ecx\n"
    "  movl $0x3f, %eax\n aam\n"
    "  movl %eax, %edx\n"
    "  movl $0x0307, %eax\n aad\n"
    "  movl %eax, %esi\n"
    "  movl $0x000f, %eax\n aaa\n"
    "  movl %eax, %edi\n"
    "  movl $0x020f, %eax\n aas\n"
    "  int $0x80\n"
    ".globl compat_segments\n"
    "compat_segments:\n"
    "  movl $0x2b, %eax\n movl %eax, %ds\n movl %eax, %es\n"
    "  pushl %es\n popl %ebx\n"
    "  pushl %ds\n movl (%esp), %ecx\n popl %ds\n"
    "  movl $user_stack, %esi\n movl $user_stack+64, %edi\n"
    "  movl $0x55667788, (%esi)\n"
    "  movl $1, %ecx\n rep movsl\n"
    "  movl user_stack+64, %edx\n"
    "  lds user_stack+128, %ebp\n"
    "  .byte 0x67\n movw 0x12, %cx\n" /* 16-bit addressing: reads below 64 KiB, which is mapped */
    "  xorl %ecx, %ecx\n"
    "  int $0x80\n"
    ".globl compat_word\n"
    "compat_word:\n"
    "  movl $0xaaaa5555, %eax\n"
    "  addw $0x1111, %ax\n"
    "  pushw %ax\n popw %bx\n"
    "  movl %esp, %ecx\n"
    "  pushf\n popl %edx\n"
    "  enter $16, $0\n movl %ebp, %esi\n subl %esp, %esi\n leave\n"
    "  xorl %edi, %edi\n"
    "  .byte 0xe8, 0, 0, 0, 0\n addl $4, %esp\n"
    "  int $0x80\n"
    ".globl compat_into\n"
    "compat_into: movb $0x7f, %al\n incb %al\n into\n"
    ".globl compat_into_after\n"
    "compat_into_after: int $0x80\n"
    ".globl compat_bound\n"
    "compat_bound: movl $user_stack, %ebx\n movl $1, (%ebx)\n movl $5, 4(%ebx)\n movl $3, %eax\n bound %eax, (%ebx)\n"
    "  movl $6, %eax\n"
    ".globl compat_bound_at\n"
    "compat_bound_at: bound %eax, (%ebx)\n int $0x80\n"
    ".globl compat_far\n"
    "compat_far: movl $0x99, %ebx\n ljmp $0x33, $compat_far_64\n"
    ".code64\n"
    "compat_far_64:\n"
    "  movabsq $0x1234567890, %rbx\n"
    "  movl %cs, %ecx\n"
    "  pushq $0x23\n pushq $compat_far_32\n lretq\n"
    ".code32\n"
    "compat_far_32: movl %cs, %edx\n incl %ebx\n int $0x80\n"
    ".globl compat_syscall\n"
    "compat_syscall: movl $9, %eax\n syscall\n"
    ".globl compat_syscall_after\n"
    "compat_syscall_after: movl %cs, %ebx\n int $0x80\n"
    ".globl compat_wrap\n"
    "compat_wrap: movl $user_stack+16, %ebx\n movl $0x13579bdf, (%ebx)\n movl $0x80000000, %ecx\n"
    "  addl $0x80000000, %ebx\n movl (%ebx,%ecx), %eax\n" /* the sum wraps at 32 bits */
    "  movl 4(%ebx,%ecx), %edx\n xorl %edx, %edx\n int $0x80\n"
    ".globl compat_gate\n"
    "compat_gate: pushl $0x23\n pushl $1f\n lret\n 1: movl $0x77, %eax\n int $0x80\n"
    ".globl compat_loop\n"
    "compat_loop: movl $5, %ecx\n xorl %eax, %eax\n 1: addl %ecx, %eax\n loop 1b\n jecxz 2f\n movl $0, %eax\n 2: xlatb\n int $0x80\n"
    ".globl compat_arpl\n"
    "compat_arpl: movl $0x28, %eax\n movl $0x3, %ebx\n arpl %bx, %ax\n setz %cl\n movzbl %cl, %ecx\n int $0x80\n"
    ".globl compat_limit\n"
    "compat_limit: movl $0x4b, %eax\n movl %eax, %es\n movl %es:0xffc, %ebx\n"
    ".globl compat_limit_at\n"
    "compat_limit_at: movl %es:0xffd, %ebx\n int $0x80\n"
    ".globl compat_null\n"
    "compat_null: xorl %eax, %eax\n movl %eax, %es\n"
    ".globl compat_null_at\n"
    "compat_null_at: movl %es:0x100, %ebx\n int $0x80\n"
    ".globl compat_base\n"
    "compat_base: movl $0x4b, %eax\n movl %eax, %fs\n movl %fs:4, %ebx\n int $0x80\n"
    ".code64\n.popsection");
#define COMPAT(name) LABEL(compat_##name)
COMPAT(basic); COMPAT(pusha); COMPAT(bcd); COMPAT(segments); COMPAT(word); COMPAT(into); COMPAT(into_after); COMPAT(bound); COMPAT(bound_at);
COMPAT(far); COMPAT(syscall); COMPAT(syscall_after); COMPAT(wrap); COMPAT(gate); COMPAT(loop); COMPAT(arpl); COMPAT(limit); COMPAT(limit_at);
COMPAT(null); COMPAT(null_at); COMPAT(base);

CODE(sysretl_code, "movq %rdi, %rcx\nmovl $2, %r11d\nleaq user_stack+4096(%rip), %rsp\nsysretl");

static u64 compat(const u8 *code)
{
    struct user_state registers = { .rbx = 0xffffffff00000000ull };
    return run_user((u64)code, user_top(), USER_CS32, 0, &registers);
}

static u64 spread(void) /* all registers of the last trap in one number */
{
    const struct frame *f = &last_trap.frame;
    u64 sum = DIGEST_START;
    u64 all[] = { f->rax, f->rbx, f->rcx, f->rdx, f->rsi, f->rdi };
    for (size_t i = 0; i < ARRAY_LENGTH(all); i++)
        sum = digest(sum, all[i] & 0xffffffff);
    return sum;
}
static u64 want(u64 a, u64 b, u64 c, u64 d, u64 si, u64 di)
{
    u64 sum = DIGEST_START, all[] = { a, b, c, d, si, di };
    for (size_t i = 0; i < ARRAY_LENGTH(all); i++)
        sum = digest(sum, all[i]);
    return sum;
}

static void test_compat(void)
{
    asm volatile("movl %0, %%ds; movl %0, %%es" ::"r"(USER_DS)); /* IRET to CPL 3 keeps segments of level 3 */
    u64 top = user_top() & 0xffffffff;
    check("compat-basic", compat(compat_basic), 0x80);
    check("compat-basic-state", spread(), want(0x11111112, 0x22222221, 0x11111111, 0, top, USER_CS32));
    check("compat-cs", last_trap.frame.cs << 8 | last_trap.frame.ss, USER_CS32 << 8 | USER_DS);
    check("compat-high-halves", last_trap.frame.rbx >> 32, 0);
    check("compat-pusha", compat(compat_pusha), 0x80);
    check("compat-pusha-state", spread(), want(1, 4, 2, 3, 6, 7));
    check("compat-bcd", compat(compat_bcd), 0x80);
    check("compat-bcd-state", spread(), want(0x0109, 0x14, 0x19, 0x0603, 0x25, 0x0105));
    *(u64 *)(user_stack + 128) = (u64)USER_DS << 32 | 0x01020304;
    check("compat-segments", compat(compat_segments), 0x80);
    check("compat-segments-state", last_trap.frame.rbx << 32 | last_trap.frame.rdx, (u64)USER_DS << 32 | 0x55667788);
    check("compat-lds", last_trap.frame.rbp, 0x01020304);
    check("compat-word", compat(compat_word), 0x80);
    check("compat-word-state", last_trap.frame.rax << 32 | (last_trap.frame.rbx & 0xffff) << 16 | last_trap.frame.rsi,
          0xaaaa6666ull << 32 | 0x6666u << 16 | 16);
    check("compat-rsp", last_trap.frame.rsp, top);
    check_trap("compat-into", compat(compat_into), OF, 0, (u64)compat_into_after);
    check_trap("compat-bound", compat(compat_bound), BR, 0, (u64)compat_bound_at);
    check("compat-far", compat(compat_far), 0x80);
    check("compat-far-state", last_trap.frame.rbx << 16 | last_trap.frame.rcx << 8 | last_trap.frame.rdx, 0x34567891ull << 16 | USER_CS << 8 | USER_CS32);
    check("compat-wrap", compat(compat_wrap), 0x80);
    check("compat-wrap-value", last_trap.frame.rax, 0x13579bdf);
    check("compat-gate", compat(compat_gate), 0x80);
    check("compat-gate-value", last_trap.frame.rax, 0x77);
    static u8 table[256];
    table[15] = 0xcc;
    struct user_state registers = { .rbx = (u64)table };
    run_user((u64)compat_loop, user_top(), USER_CS32, 0, &registers);
    check("compat-loop-xlat", last_trap.frame.rax, 0xcc);
    check("compat-arpl", compat(compat_arpl), 0x80);
    check("compat-arpl-state", last_trap.frame.rax << 8 | last_trap.frame.rcx, 0x2b << 8 | 1);
    /* A 4 KiB data segment at `table`: limits and bases count in compatibility mode. */
    static u32 small[1024] __attribute__((aligned(4096)));
    small[1] = 0x600df00d;
    u64 base = (u64)small;
    gdt[9] = 0xfff | (base & 0xffffff) << 16 | 0xf3ull << 40 | 0x4ull << 52 | (base >> 24 & 0xff) << 56;
    check("compat-base", compat(compat_base), 0x80);
    check("compat-base-value", last_trap.frame.rbx, 0x600df00d);
    check("compat-base-msr", rdmsr(MSR_FS_BASE), base);
    check_trap("compat-limit", compat(compat_limit), GP, 0, (u64)compat_limit_at);
    check_trap("compat-null", compat(compat_null), GP, 0, (u64)compat_null_at);
    asm volatile("movl %0, %%es; movl %0, %%ds; movl %1, %%fs" ::"r"(KERNEL_DS), "r"(0));
    if (is_intel()) {
        check("compat-syscall", compat(compat_syscall), UD); /* Intel: SYSCALL is for 64-bit mode only */
    } else {
        check("compat-syscall", compat(compat_syscall), 0x80);
        check("compat-syscall-rcx", called.rcx, (u64)compat_syscall_after);
        check("compat-syscall-cs", last_trap.frame.rbx, USER_CS32);
    }
    /* SYSRET without REX.W goes to 32-bit code. */
    u64 vector = catch((void *)sysretl_code, (void *)compat_basic);
    check("sysretl", vector, 0x80);
    check("sysretl-cs", last_trap.frame.cs << 8 | last_trap.frame.ss, USER_CS32 << 8 | USER_DS);
}

/* ---- IRET ---- */

CODE(iret_same, "movq %rsp, %rcx\npushq $0x18\npushq %rcx\npushfq\npushq $0x10\nleaq 1f(%rip), %rax\npushq %rax\niretq\n"
                "1: subq %rsp, %rcx\nmovq %rcx, (%rdi)\nret");
CODE(iret_null_ss_user, "pushq $0\npushq $0x1000\npushq $2\npushq $0x33\npushq $0x1000\niret_null_ss_user_at: iretq");
LABEL(iret_null_ss_user_at);
CODE(iret_non_canonical, "pushq $0x18\nleaq 8(%rsp), %rax\npushq %rax\npushq $2\npushq $0x10\nmovabsq $0x900000000000, %rax\npushq %rax\niret_non_canonical_at: iretq");
LABEL(iret_non_canonical_at);
CODE(iret_data_cs, "pushq $0x18\npushq %rsp\npushq $2\npushq $0x18\npushq $0x1000\niret_data_cs_at: iretq");
LABEL(iret_data_cs_at);
CODE(iret_flags, "movq %rsp, %rcx\npushq $0x18\npushq %rcx\npushq $0x244cd7\npushq $0x10\nleaq 1f(%rip), %rax\npushq %rax\niretq\n"
                 "1: pushfq\npopq (%rdi)\ncld\npushq $2\npopfq\nret");
CODE(iretl, "movq %rsp, %rcx\nsubq $20, %rsp\nmovl $0x18, 16(%rsp)\nmovl %ecx, 12(%rsp)\nmovl $2, 8(%rsp)\nmovl $0x10, 4(%rsp)\nleal 1f(%rip), %eax\nmovl %eax, (%rsp)\niretl\n"
            "1: movq $0x55, (%rdi)\nret");

CODE(user_segments, "movl %ds, %eax\nmovl %es, %ebx\nmovl %fs, %ecx\nmovl %gs, %edx\nint $0x80");

CODE(iret_user, "pushq $0x2b\npushq $0x1000\npushq $2\npushq $0x33\npushq $0x1000\niret_user_at: iretq");
LABEL(iret_user_at);

/* The descriptors are read anew at each IRET, whatever it found the last time. */
static void test_iret_descriptors(void)
{
    u64 code = gdt[USER_CS / 8], stack = gdt[USER_DS / 8];
    asm volatile("movl %0, %%ds; movl %0, %%es; movl %0, %%fs; movl %0, %%gs" ::"r"(0));
    for (int round = 0; round < 3; round++) {
        run_user((u64)user_segments, user_top(), USER_CS, FLAG_CF, NULL);
        check("iret-user", last_trap.frame.cs << 8 | last_trap.frame.ss, USER_CS << 8 | USER_DS);
        check("iret-user-flags", last_trap.frame.rflags & 0xfff, FLAG_CF | 2);
        gdt[USER_CS / 8] = code & ~(1ull << 47);
        expect_trap("iret-cs-absent", iret_user, NULL, NP, USER_CS & ~3u, (u64)iret_user_at);
        gdt[USER_CS / 8] = code | 1ull << 54;
        expect_trap("iret-cs-two-sizes", iret_user, NULL, GP, USER_CS & ~3u, (u64)iret_user_at);
        gdt[USER_CS / 8] = code & ~(3ull << 45);
        expect_trap("iret-cs-inner", iret_user, NULL, GP, USER_CS & ~3u, (u64)iret_user_at);
        gdt[USER_CS / 8] = code;
        gdt[USER_DS / 8] = stack & ~(1ull << 41);
        expect_trap("iret-ss-read-only", iret_user, NULL, GP, USER_DS & ~3u, (u64)iret_user_at);
        gdt[USER_DS / 8] = stack & ~(1ull << 47);
        expect_trap("iret-ss-absent", iret_user, NULL, SS, USER_DS & ~3u, (u64)iret_user_at);
        gdt[USER_DS / 8] = stack & ~(1ull << 40);
        run_user((u64)user_segments, user_top(), USER_CS, 0, NULL);
        check("iret-marks-accessed", gdt[USER_DS / 8], stack | 1ull << 40);
        gdt[USER_DS / 8] = stack;
    }
    asm volatile("movl %0, %%ds; movl %0, %%es" ::"r"(KERNEL_DS));
}

static void test_iret(void)
{
    u64 value = 1;
    check("iret-same-level", catch((void *)iret_same, &value), NO_TRAP);
    check("iret-same-level-rsp", value, 0);
    expect_trap("iret-null-ss-user", iret_null_ss_user, NULL, GP, 0, (u64)iret_null_ss_user_at);
    expect_trap("iret-data-cs", iret_data_cs, NULL, GP, KERNEL_DS, (u64)iret_data_cs_at);
    check("iret-flags", catch((void *)iret_flags, &value), NO_TRAP);
    check("iret-flags-value", value & ~(u64)FLAG_RF, 0x244cd7);
    check("iret-32", catch((void *)iretl, &value), NO_TRAP);
    check("iret-32-value", value, 0x55);
    u64 vector = catch((void *)iret_non_canonical, NULL);
    check("iret-non-canonical", vector, GP);
    check("iret-non-canonical-error", last_trap.frame.error, 0);
    /* DS and ES of a more privileged level are nulled on the way out (Vol. 2A IRET). */
    asm volatile("movl %0, %%ds; movl %0, %%es; movl %0, %%fs; movl %0, %%gs" ::"r"(KERNEL_DS));
    run_user((u64)user_segments, user_top(), USER_CS, 0, NULL);
    check("iret-nulls-segments", last_trap.frame.rax | last_trap.frame.rbx | last_trap.frame.rcx | last_trap.frame.rdx, 0);
    asm volatile("movl %0, %%ds; movl %0, %%es" ::"r"(KERNEL_DS));
}

/* ---- flags and I/O privilege ---- */

CODE(user_popf, "pushq $0x3202\npopfq\npushfq\npopq %rax\npushq $0\npopfq\npushfq\npopq %rbx\nint $0x80");
CODE(user_out, "movb $0x41, %al\nuser_out_at: outb %al, $0x80\nint $0x80");
LABEL(user_out_at);
CODE(user_cli_sti, "cli\npushfq\npopq %rax\nsti\npushfq\npopq %rbx\nint $0x80");
CODE(user_smsw, "smsw %rax\nint $0x80");
CODE(user_sgdt, "subq $16, %rsp\nuser_sgdt_at: sgdt (%rsp)\nmovzwl (%rsp), %eax\naddq $16, %rsp\nint $0x80");
LABEL(user_sgdt_at);
CODE(user_str, "str %eax\nint $0x80");
CODE(user_rdtsc, "rdtsc\nint $0x80");
CODE(user_rdtscp, "rdtscp\nint $0x80");
CODE(user_rdpmc, "xorl %ecx, %ecx\nuser_rdpmc_at: rdpmc\nint $0x80");
LABEL(user_rdpmc_at);

static u64 user(void *code, u64 flags) { return run_user((u64)code, user_top(), USER_CS, flags, NULL); }

static void test_flags(void)
{
    user(user_popf, 2);
    check("user-popf-if-ignored", last_trap.frame.rax & 0x3200, 0);
    user(user_popf, FLAG_IF);
    check("user-popf-if-stays", (last_trap.frame.rax & 0x3200) << 16 | (last_trap.frame.rbx & 0x3200), 0x200 << 16 | 0x200);
    user(user_popf, FLAG_IF | 0x3000);
    check("user-popf-iopl-3", (last_trap.frame.rax & 0x3200) << 16 | (last_trap.frame.rbx & 0x3200), 0x3200 << 16 | 0x3000);
    check("user-cli-iopl-3", user(user_cli_sti, FLAG_IF | 0x3000), 0x80);
    check("user-cli-sti-value", (last_trap.frame.rax & 0x200) << 16 | (last_trap.frame.rbx & 0x200), 0x200);
    check("user-out-iopl-3", user(user_out, 0x3000), 0x80);
    check_trap("user-out-iopl-0", user(user_out, 0), GP, 0, (u64)user_out_at);
    tss.io_map = offsetof(struct tss, io_bits);
    memset(tss.io_bits, 0xff, sizeof tss.io_bits);
    check_trap("user-out-bitmap-denies", user(user_out, 0), GP, 0, (u64)user_out_at);
    tss.io_bits[0x80 / 8] &= ~1;
    check("user-out-bitmap-allows", user(user_out, 0), 0x80);
    tss.io_map = sizeof tss;
    write_flags(0x246 | 0xcd5);
    u64 all = read_flags();
    write_flags(2);
    check("popf", all, 0xed7);
    write_flags(FLAG_ID | FLAG_AC | 2);
    check("popf-id-ac", read_flags(), FLAG_ID | FLAG_AC | 2);
    write_flags(2);
}

static void test_umip(void)
{
    check("user-smsw", user(user_smsw, 0), 0x80);
    check("user-smsw-value", last_trap.frame.rax & 0xffff, read_cr0() & 0xffff);
    check("user-sgdt", user(user_sgdt, 0), 0x80);
    extern struct { u16 limit; u64 base; } __attribute__((packed)) gdt_pointer;
    check("user-sgdt-limit", last_trap.frame.rax, gdt_pointer.limit);
    check("user-str", user(user_str, 0), 0x80);
    check("user-str-value", last_trap.frame.rax, TSS_SELECTOR);
    if (!has7c(2)) {
        skip("umip", "not in CPUID");
        return;
    }
    write_cr4(read_cr4() | 0x800);
    check_trap("umip-smsw", user(user_smsw, 0), GP, 0, (u64)user_smsw);
    check_trap("umip-sgdt", user(user_sgdt, 0), GP, 0, (u64)user_sgdt_at);
    check_trap("umip-str", user(user_str, 0), GP, 0, (u64)user_str);
    write_cr4(read_cr4() & ~0x800ull);
}

static void test_time(void)
{
    check("user-rdtsc", user(user_rdtsc, 0), 0x80);
    write_cr4(read_cr4() | 4); /* TSD */
    check_trap("user-rdtsc-tsd", user(user_rdtsc, 0), GP, 0, (u64)user_rdtsc);
    u64 before = rdtsc(), after = rdtsc();
    check_true("tsc-moves", after > before || after == before);
    write_cr4(read_cr4() & ~4ull);
    if (has_ext_d(27)) {
        wrmsr(0xc0000103, 0x1234);
        check("user-rdtscp", user(user_rdtscp, 0), 0x80);
        check("user-rdtscp-aux", last_trap.frame.rcx, 0x1234);
    } else {
        skip("rdtscp", "not in CPUID");
    }
    check_trap("user-rdpmc", user(user_rdpmc, 0), GP, 0, (u64)user_rdpmc_at);
}

static void test_descriptors(void)
{
    u64 rights = 0, limit = 0;
    u8 zero;
    asm volatile("larl %2, %k0; setz %1" : "=r"(rights), "=q"(zero) : "r"(KERNEL_CS) : "cc");
    check("lar", (rights & 0xf0ff00) | (u64)zero << 32, 0xa09b00 | 1ull << 32); /* bits 16-19 are undefined */
    asm volatile("lsll %2, %k0; setz %1" : "=r"(limit), "=q"(zero) : "r"(USER_DS) : "cc");
    check("lsl", limit | (u64)zero << 32, 0x1ffffffff);
    asm volatile("larl %1, %%eax; setz %0" : "=q"(zero) : "r"(0x200) : "cc", "rax");
    check("lar-beyond", zero, 0);
    asm volatile("verr %w1; setz %0" : "=q"(zero) : "r"(KERNEL_CS) : "cc");
    check("verr", zero, 1);
    asm volatile("verw %w1; setz %0" : "=q"(zero) : "r"(KERNEL_CS) : "cc");
    check("verw-code", zero, 0);
    asm volatile("verw %w1; setz %0" : "=q"(zero) : "r"(KERNEL_DS) : "cc");
    check("verw-data", zero, 1);
    u16 selector;
    asm volatile("str %0" : "=m"(selector));
    check("str", selector, TSS_SELECTOR);
    asm volatile("sldt %0" : "=m"(selector));
    check("sldt", selector, 0);
    /* An LDT of one data segment. */
    static u64 ldt[2];
    u64 base = (u64)ldt;
    ldt[1] = 0x00cf93000000ffff;
    gdt[10] = (sizeof ldt - 1) | (base & 0xffffff) << 16 | 0x82ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[11] = base >> 32;
    asm volatile("lldt %w0" ::"r"(0x50));
    asm volatile("movl %1, %%es; movl %%es, %k0" : "=r"(limit) : "r"(0x0c));
    check("ldt-segment", limit, 0x0c);
    asm volatile("movl %0, %%es; lldt %w1" ::"r"(KERNEL_DS), "r"(0));
    /* The accessed bit is set by a load. */
    gdt[9] = 0x00cf92000000ffff;
    asm volatile("movl %0, %%es" ::"r"(0x48) : "memory");
    check("descriptor-accessed", gdt[9], 0x00cf93000000ffff);
    asm volatile("movl %0, %%es" ::"r"(KERNEL_DS));
}

CODE(misaligned_cmpxchg16b, "lock cmpxchg16b 8(%rdi)\nret");

static void test_rest(void)
{
    write_cr8(9);
    check("cr8", read_cr8(), 9);
    if (has1d(9)) {
        check("cr8-is-tpr", load32(0xfee00080), 0x90);
        store32(0xfee00080, 0x40);
        check("tpr-is-cr8", read_cr8(), 4);
    }
    write_cr8(0);
    if (has1c(13)) {
        static u64 pair[2] __attribute__((aligned(16))) = { 1, 2 };
        u64 a = 1, d = 2;
        u8 zero;
        asm volatile("lock cmpxchg16b %2; setz %3" : "+a"(a), "+d"(d), "+m"(pair), "=q"(zero) : "b"(0x10ull), "c"(0x20ull) : "cc");
        check("cmpxchg16b", pair[0] | pair[1] << 16 | (u64)zero << 32, 0x100200010ull);
        asm volatile("lock cmpxchg16b %2; setz %3" : "+a"(a), "+d"(d), "+m"(pair), "=q"(zero) : "b"(0ull), "c"(0ull) : "cc");
        check("cmpxchg16b-differs", a | d << 16 | (u64)zero << 32, 0x200010);
        expect_trap("cmpxchg16b-misaligned", misaligned_cmpxchg16b, pair, GP, 0, (u64)misaligned_cmpxchg16b);
    }
    asm volatile("mfence; lfence; sfence; clflush (%0); prefetcht0 (%0); prefetchw (%0); wbinvd; nopw 0x1234(%%rax,%%rax)" ::"r"(gdt) : "memory");
    check_true("fences-and-hints", true);
    u32 mxcsr = 0x1fa0, got;
    asm volatile("ldmxcsr %1; stmxcsr %0" : "=m"(got) : "m"(mxcsr));
    check("mxcsr", got, 0x1fa0);
    mxcsr = 0x1f80;
    asm volatile("ldmxcsr %0" ::"m"(mxcsr));
    u64 value;
    asm volatile("smsw %0" : "=r"(value));
    check("smsw", value & 0xffff, read_cr0() & 0xffff);
    asm volatile("lmsw %w0" ::"r"((u16)(read_cr0() | 8)));
    check("lmsw", read_cr0() & 8, 8);
    asm volatile("clts");
    struct cpuid a = cpuid(0x80000000, 0), b = cpuid(0x80000000, 7);
    check("cpuid-ignores-subleaf", a.a ^ b.a, 0);
    check("cpuid-long-mode", has_ext_d(29), 1);
    check("cpuid-osxsave-off", has1c(27), 0);
    check("efer-lma", rdmsr(MSR_EFER) & 0x500, 0x500);
    if (has1c(30)) {
        u8 carry = 0;
        for (int i = 0; i < 10 && !carry; i++)
            asm volatile("rdrand %0; setc %1" : "=r"(value), "=q"(carry)::"cc");
        check("rdrand", carry, 1);
    }
}

void guest_main(const struct start_info *info)
{
    (void)info;
    allow_user();
    test_syscall();
    test_sysenter();
    test_bases();
    test_compat();
    test_iret();
    test_iret_descriptors();
    test_flags();
    test_umip();
    test_time();
    test_descriptors();
    test_rest();
}
