/* exceptions: every vector that software can raise, with its error code and the exact saved state.
 *
 * Faults save the rip of the instruction, traps the next one (Intel SDM (2024-12) Vol. 3A table 6-1); frames are 16-byte
 * aligned and always hold SS:RSP in 64-bit mode (6.14.2); interrupt gates clear IF, trap gates do not; IST stacks are
 * switched to; a fault in a handler nests; a contributory fault while delivering one is a double fault (table 6-5).
 * #AC is in alignment.c, debug exceptions in debug.c. Output: the same on every run and engine.
 */
#include "lib.h"

CODE(divide_zero, "xorl %ecx, %ecx\nmovl $1, %eax\nxorl %edx, %edx\ndivide_zero_at: divl %ecx\nret");
LABEL(divide_zero_at);
CODE(divide_zero_r10, "movl $0x1234, %ecx\nmovl $1, %eax\nxorl %r10d, %r10d\nmovl %r10d, %edx\nstc\n"
                      "divide_zero_r10_at: divq %r10\nret");
LABEL(divide_zero_r10_at);
CODE(divide_overflow, "movl $2, %edx\nmovl $1, %ecx\ndivide_overflow_at: divl %ecx\nret");
LABEL(divide_overflow_at);
CODE(divide_minimum, "movabsq $0x8000000000000000, %rax\ncqto\nmovq $-1, %rcx\ndivide_minimum_at: idivq %rcx\nret");
LABEL(divide_minimum_at);
CODE(divide_8, "movw $0x7fff, %ax\nmovb $1, %cl\ndivide_8_at: idivb %cl\nret");
LABEL(divide_8_at);
CODE(divide_memory, "movl $1, %eax\nxorl %edx, %edx\npushq $0\ndivide_memory_at: divq (%rsp)\nret");
LABEL(divide_memory_at);
CODE(breakpoint, "int3\nbreakpoint_after: ret");
LABEL(breakpoint_after);
CODE(breakpoint_2, ".byte 0xcd, 3\nbreakpoint_2_after: ret");
LABEL(breakpoint_2_after);
CODE(overflow, "int $4\noverflow_after: ret");
LABEL(overflow_after);
CODE(icebp, ".byte 0xf1\nicebp_after: ret");
LABEL(icebp_after);
CODE(undefined_2, "ud2\nret");
CODE(undefined_1, ".byte 0x0f, 0xb9, 0xc0\nret");
CODE(lock_register, ".byte 0xf0, 0x01, 0xc0\nret");           /* lock add %eax, %eax */
CODE(lock_load, ".byte 0xf0, 0x8b, 0x07\nret");               /* lock mov (%rdi), %eax */
CODE(push_es, ".byte 0x06\nret");
CODE(daa, ".byte 0x27\nret");
CODE(pusha, ".byte 0x60\nret");
CODE(far_jump_direct, ".byte 0xea, 0, 0, 0, 0, 8, 0\nret");
CODE(mov_cr1, ".byte 0x0f, 0x20, 0xc8\nret");
CODE(mov_cs, ".byte 0x8e, 0xc8\nret");
CODE(x87, "fnop\nret");
CODE(wait_x87, "fwait\nret");
CODE(sse, "movaps %xmm0, %xmm1\nret");
CODE(misaligned_sse, "movaps 1(%rdi), %xmm0\nret");
CODE(aligned_sse, "movaps (%rdi), %xmm0\nret");
CODE(unaligned_sse, "movups 1(%rdi), %xmm0\nret");
CODE(too_long, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90\nret");
CODE(just_fits, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90\nret");
CODE(load_ds, "movl %edi, %ds\nret");
CODE(load_ss, "movl %edi, %ss\nload_ss_after: ret");
CODE(load_fs, "movl %edi, %fs\nret");
CODE(load_tr, "ltr %di\nret");
CODE(load_ldt, "lldt %di\nret");
CODE(interrupt_absent, "int $0x90\nret");
CODE(interrupt_beyond, "int $0xf0\nret");
CODE(read_unknown_msr, "movl $0x12345678, %ecx\nread_unknown_msr_at: rdmsr\nret");
LABEL(read_unknown_msr_at);
CODE(write_unknown_msr, "movl $0x12345678, %ecx\nxorl %eax, %eax\nxorl %edx, %edx\nwrite_unknown_msr_at: wrmsr\nret");
LABEL(write_unknown_msr_at);
CODE(write_cr0_code, "movq %rdi, %cr0\nret");
CODE(write_cr4_code, "movq %rdi, %cr4\nret");
CODE(write_cr8_code, "movq %rdi, %cr8\nret");
CODE(jump_rdi, "jmp *%rdi");
CODE(far_return, "pushq %rdi\nleaq 1f(%rip), %rax\npushq %rax\nfar_return_at: lretq\n1: ret");
LABEL(far_return_at);
CODE(interrupt_return_null, "pushq $0\npushq %rsp\npushfq\npushq $0\npushq $0\ninterrupt_return_null_at: iretq");
LABEL(interrupt_return_null_at);
CODE(interrupt_return_nt, "pushfq\norl $0x4000, (%rsp)\npopfq\ninterrupt_return_nt_at: iretq");
LABEL(interrupt_return_nt_at);

static void test_simple(void)
{
    expect_trap("divide-by-zero", divide_zero, NULL, DE, 0, (u64)divide_zero_at);
    expect_trap("divide-zero-r10", divide_zero_r10, NULL, DE, 0, (u64)divide_zero_r10_at);
    check("divide-zero-keeps-rcx", last_trap.frame.rcx, 0x1234);
    check("divide-zero-keeps-flags", last_trap.frame.rflags & 0x8d5, 0x45);
    expect_trap("divide-overflow", divide_overflow, NULL, DE, 0, (u64)divide_overflow_at);
    check("divide-registers-kept", last_trap.frame.rdx << 8 | last_trap.frame.rcx, 0x201);
    expect_trap("divide-minimum", divide_minimum, NULL, DE, 0, (u64)divide_minimum_at);
    expect_trap("divide-8", divide_8, NULL, DE, 0, (u64)divide_8_at);
    expect_trap("divide-memory", divide_memory, NULL, DE, 0, (u64)divide_memory_at);
    expect_trap("int3", breakpoint, NULL, BP, 0, (u64)breakpoint_after);
    expect_trap("int-3", breakpoint_2, NULL, BP, 0, (u64)breakpoint_2_after);
    expect_trap("int-4", overflow, NULL, OF, 0, (u64)overflow_after);
    expect_trap("icebp", icebp, NULL, DB, 0, (u64)icebp_after);
    static const struct { const char *name; void *code; } undefined[] = {
        { "ud2", undefined_2 }, { "ud1", undefined_1 }, { "lock-register", lock_register }, { "lock-load", lock_load },
        { "push-es", push_es }, { "daa", daa }, { "pusha", pusha }, { "far-jump-direct", far_jump_direct },
        { "mov-cr1", mov_cr1 }, { "mov-cs", mov_cs },
    };
    for (size_t i = 0; i < ARRAY_LENGTH(undefined); i++)
        expect_trap(undefined[i].name, undefined[i].code, NULL, UD, 0, (u64)undefined[i].code);
    expect_trap("16-bytes-long", too_long, NULL, GP, 0, (u64)too_long);
    check("15-bytes-long", catch((void *)just_fits, NULL), NO_TRAP);
}

static void test_x87_sse(void)
{
    static u8 data[64] __attribute__((aligned(16)));
    u64 cr0 = read_cr0();
    write_cr0(cr0 | 8); /* TS */
    expect_trap("nm-x87", x87, NULL, NM, 0, (u64)x87);
    expect_trap("nm-sse", sse, NULL, NM, 0, (u64)sse);
    expect_trap("nm-wait", wait_x87, NULL, NM, 0, (u64)wait_x87);
    asm volatile("clts");
    check("clts", read_cr0(), cr0);
    check("x87-runs", catch((void *)x87, NULL), NO_TRAP);
    write_cr0(cr0 | 4); /* EM */
    expect_trap("em-x87", x87, NULL, NM, 0, (u64)x87);
    expect_trap("em-sse", sse, NULL, UD, 0, (u64)sse);
    write_cr0(cr0);
    write_cr4(read_cr4() & ~0x200ull); /* OSFXSR */
    expect_trap("osfxsr-off", sse, NULL, UD, 0, (u64)sse);
    write_cr4(read_cr4() | 0x200);
    expect_trap("misaligned-sse", misaligned_sse, data, GP, 0, (u64)misaligned_sse);
    check("aligned-sse", catch((void *)aligned_sse, data), NO_TRAP);
    check("unaligned-sse", catch((void *)unaligned_sse, data), NO_TRAP);
}

CODE(unmasked_x87, "fninit\npushq $0x37b\nfldcw (%rsp)\npopq %rax\nfld1\nfldz\nfdivrp %st, %st(1)\nunmasked_x87_at: fwait\nret");
LABEL(unmasked_x87_at);
CODE(unmasked_sse, "pushq $0x1d80\nldmxcsr (%rsp)\npopq %rax\nxorps %xmm1, %xmm1\npcmpeqd %xmm0, %xmm0\npsrld $25, %xmm0\npslld $23, %xmm0\nunmasked_sse_at: divss %xmm1, %xmm0\nret");
LABEL(unmasked_sse_at);

static void test_floating(void)
{
    /* 0x37b: zero-divide unmasked. The fault is pending until the next waiting x87 instruction. */
    expect_trap("mf", unmasked_x87, NULL, MF, 0, (u64)unmasked_x87_at);
    asm volatile("fnclex; fninit");
    expect_trap("xm", unmasked_sse, NULL, XM, 0, (u64)unmasked_sse_at);
    u32 mxcsr;
    asm volatile("stmxcsr %0" : "=m"(mxcsr));
    check("xm-mxcsr", mxcsr, 0x1d84); /* ZE is set, the divide did not happen */
    mxcsr = 0x1f80;
    asm volatile("ldmxcsr %0" ::"m"(mxcsr));
    write_cr4(read_cr4() & ~0x400ull); /* OSXMMEXCPT off: #UD instead */
    expect_trap("xm-off", unmasked_sse, NULL, UD, 0, (u64)unmasked_sse_at);
    asm volatile("ldmxcsr %0" ::"m"(mxcsr));
    write_cr4(read_cr4() | 0x400);
}

enum { SPARE = 0x48 };

static void descriptor(u64 low, u64 high)
{
    gdt[SPARE / 8] = low;
    gdt[SPARE / 8 + 1] = high;
}

static void test_segments(void)
{
    void *spare = (void *)(u64)SPARE;
    descriptor(0x00cf13000000ffff, 0); /* data, not present */
    expect_trap("np-ds", load_ds, spare, NP, SPARE, (u64)load_ds);
    expect_trap("ss-not-present", load_ss, spare, SS, SPARE, (u64)load_ss);
    descriptor(0x00cff3000000ffff, 0); /* DPL 3 */
    expect_trap("ss-wrong-level", load_ss, spare, GP, SPARE, (u64)load_ss);
    check("ds-outer-level", catch((void *)load_ds, spare), NO_TRAP);
    catch((void *)load_ds, (void *)KERNEL_DS);
    descriptor(0x00af99000000ffff, 0); /* execute-only code */
    expect_trap("ds-execute-only", load_ds, spare, GP, SPARE, (u64)load_ds);
    descriptor(0, 0);
    expect_trap("ds-empty-descriptor", load_ds, spare, GP, SPARE, (u64)load_ds);
    expect_trap("ds-beyond-gdt", load_ds, (void *)0x200, GP, 0x200, (u64)load_ds);
    expect_trap("fs-beyond-gdt", load_fs, (void *)0x203, GP, 0x200, (u64)load_fs);
    check("lldt-null", catch((void *)load_ldt, NULL), NO_TRAP);
    expect_trap("ds-no-ldt", load_ds, (void *)0x1c, GP, 0x1c, (u64)load_ds);
    check("ds-null", catch((void *)load_ds, NULL), NO_TRAP);
    check("ss-null", catch((void *)load_ss, NULL), NO_TRAP); /* legal at CPL 0 in 64-bit mode */
    catch((void *)load_ss, (void *)KERNEL_DS);
    expect_trap("ltr-busy", load_tr, (void *)TSS_SELECTOR, GP, TSS_SELECTOR, (u64)load_tr);
    expect_trap("ltr-null", load_tr, NULL, GP, 0, (u64)load_tr);
    gdt[TSS_SELECTOR / 8] &= ~(2ull << 40); /* available again */
    check("ltr-available", catch((void *)load_tr, (void *)TSS_SELECTOR), NO_TRAP);
    check("ltr-makes-busy", gdt[TSS_SELECTOR / 8] >> 40 & 0xff, 0x8b);
    expect_trap("ltr-data", load_tr, (void *)KERNEL_DS, GP, KERNEL_DS, (u64)load_tr);
    expect_trap("lldt-data", load_ldt, (void *)KERNEL_DS, GP, KERNEL_DS, (u64)load_ldt);
    expect_trap("far-return-data", far_return, (void *)KERNEL_DS, GP, KERNEL_DS, (u64)far_return_at);
    expect_trap("far-return-null", far_return, NULL, GP, 0, (u64)far_return_at);
    expect_trap("iret-null-cs", interrupt_return_null, NULL, GP, 0, (u64)interrupt_return_null_at);
    expect_trap("iret-nested-task", interrupt_return_nt, NULL, GP, 0, (u64)interrupt_return_nt_at);
    set_gate(0x90, trap_stubs[0x90], 0, 0, 0); /* type 0 is no gate */
    expect_trap("gate-bad-type", interrupt_absent, NULL, GP, 0x90 * 8 + 2, (u64)interrupt_absent);
}

struct table_pointer {
    u16 limit;
    u64 base;
} __attribute__((packed));

static void test_gates(void)
{
    struct table_pointer pointer;
    asm volatile("sidt %0" : "=m"(pointer));
    u8 *gate = (u8 *)pointer.base + 0x90 * 16;
    set_gate(0x90, trap_stubs[0x90], 0, 0, GATE_INTERRUPT);
    gate[5] &= 0x7f;
    expect_trap("gate-not-present", interrupt_absent, NULL, NP, 0x90 * 8 + 2, (u64)interrupt_absent);
    struct table_pointer shorter = { 0xf0 * 16 - 1, pointer.base };
    asm volatile("lidt %0" ::"m"(shorter));
    expect_trap("gate-beyond-idt", interrupt_beyond, NULL, GP, 0xf0 * 8 + 2, (u64)interrupt_beyond);
    asm volatile("lidt %0" ::"m"(pointer));
    set_gate(0x90, trap_stubs[0x90], 0, 0, GATE_INTERRUPT);
    write_flags(0x202);
    catch((void *)interrupt_absent, NULL);
    cli();
    check("saved-if", last_trap.frame.rflags & FLAG_IF, FLAG_IF);
    check("saved-cs-ss", last_trap.frame.cs << 8 | last_trap.frame.ss, KERNEL_CS << 8 | KERNEL_DS);
    check("frame-aligned", (last_trap.handler_rsp + sizeof(struct frame)) & 15, 0);
}

static u64 seen_if, seen_stack;
static bool look(struct frame *frame)
{
    seen_if = read_flags() & (FLAG_IF | FLAG_TF | FLAG_NT);
    seen_stack = (u64)frame;
    return false;
}

CODE(odd_stack, "movq %rsp, %rcx\nsubq $3, %rsp\nint $0x91\nmovq %rcx, %rsp\nret");
CODE(with_interrupts, "sti\nnop\nint $0x91\ncli\nret");

static void test_stacks(void)
{
    trap_handlers[0x91] = look;
    set_gate(0x91, trap_stubs[0x91], 0, 0, GATE_INTERRUPT);
    catch((void *)with_interrupts, NULL);
    check("interrupt-gate-clears-if", seen_if, 0);
    set_gate(0x91, trap_stubs[0x91], 0, 0, GATE_TRAP);
    catch((void *)with_interrupts, NULL);
    check("trap-gate-keeps-if", seen_if, FLAG_IF);
    cli();
    catch((void *)odd_stack, NULL);
    check("odd-stack-aligned", (seen_stack + sizeof(struct frame)) & 15, 0);
    check("odd-stack-saved", last_trap.frame.rsp - last_trap.frame.rcx, (u64)-3);
    set_gate(0x91, trap_stubs[0x91], 3, 0, GATE_INTERRUPT);
    catch((void *)odd_stack, NULL);
    check("ist-stack", seen_stack + sizeof(struct frame), (u64)(ist_stacks[2] + 4096));
    set_gate(0x91, trap_stubs[0x91], 0, 0, GATE_INTERRUPT);
}

static u64 nested_seen[3];
static bool nested(struct frame *frame)
{
    (void)frame;
    u64 vector = catch((void *)divide_zero, NULL);
    nested_seen[0] = vector;
    nested_seen[1] = last_trap.frame.rip == (u64)divide_zero_at;
    vector = catch((void *)jump_rdi, (void *)0x900000000000ull);
    nested_seen[2] = vector;
    frame->rip += 2; /* over the ud2 */
    return true;
}

CODE(touch_missing, "movq (%rdi), %rax\nret");

static void test_nested(void)
{
    trap_handlers[UD] = nested;
    check("nested-returns", catch((void *)undefined_2, NULL), NO_TRAP);
    check("nested-first", nested_seen[0] << 8 | nested_seen[1], DE << 8 | 1);
    check("nested-second", nested_seen[2], GP);
    trap_handlers[UD] = NULL;

    /* A page fault whose gate is not present: #NP while delivering #PF is a double fault, on its own stack. */
    struct table_pointer pointer;
    asm volatile("sidt %0" : "=m"(pointer));
    u8 *gate = (u8 *)pointer.base + PF * 16;
    set_gate(DF, trap_stubs[DF], 1, 0, GATE_INTERRUPT);
    gate[5] &= 0x7f;
    expect_trap("double-fault", touch_missing, (void *)0xffff800000000000ull, DF, 0, 0);
    check("double-fault-stack", last_trap.handler_rsp + sizeof(struct frame), (u64)(ist_stacks[0] + 4096));
    check("double-fault-cr2", last_trap.cr2, 0xffff800000000000ull);
    gate[5] |= 0x80;
    /* A benign first (#UD) followed by #NP is handled serially: the handler sees #NP. */
    gate = (u8 *)pointer.base + UD * 16;
    gate[5] &= 0x7f;
    expect_trap("serial-fault", undefined_2, NULL, NP, UD * 8 + 3, (u64)undefined_2);
    gate[5] |= 0x80;
    /* A contributory one (#DE) followed by #NP is a double fault. */
    gate = (u8 *)pointer.base + DE * 16;
    gate[5] &= 0x7f;
    expect_trap("double-fault-contributory", divide_zero, NULL, DF, 0, 0);
    gate[5] |= 0x80;
    /* The page fault handler's stack is missing: #PF while delivering #PF. */
    u64 stack = tss.ist[4];
    tss.ist[4] = 0xffff800000010000ull;
    set_gate(PF, trap_stubs[PF], 5, 0, GATE_INTERRUPT);
    expect_trap("double-fault-stack-missing", touch_missing, (void *)0xffff800000020000ull, DF, 0, 0);
    tss.ist[4] = stack;
    set_gate(PF, trap_stubs[PF], 0, 0, GATE_INTERRUPT);
}

CODE(user_int_80, "movl $0x1234, %ebx\nint $0x80");
CODE(user_hlt, "hlt");
CODE(user_in, "inb $0x80, %al");
CODE(user_cli, "cli");
CODE(user_lgdt, "lgdt (%rsp)");
CODE(user_mov_cr0, "movq %cr0, %rax");
CODE(user_mov_dr0, "movq %rax, %db0");
CODE(user_rdmsr, "rdmsr");
CODE(user_invlpg, "invlpg (%rsp)");
CODE(user_clts, "clts");
CODE(user_int_90, "int $0x90");
CODE(user_swapgs, "swapgs");
CODE(user_wbinvd, "wbinvd");
CODE(user_ud2, "ud2");
CODE(user_int3, "int3");
CODE(user_ltr, "ltr %ax");
CODE(user_load_ss, "movl $0x18, %eax\nmovl %eax, %ss");
CODE(user_iret_inward, "pushq $0x18\npushq $0x1000\npushfq\npushq $0x10\npushq $0x1000\nuser_iret_inward_at: iretq");
LABEL(user_iret_inward_at);

static u64 user(void *code) { return run_user((u64)code, (u64)user_stack + sizeof user_stack, USER_CS, FLAG_IF, NULL); }

static void test_user(void)
{
    allow_user();
    set_gate(0x90, trap_stubs[0x90], 0, 0, GATE_INTERRUPT);
    write_flags(2);
    check("user-int", user(user_int_80), 0x80);
    check("user-int-rbx", last_trap.frame.rbx, 0x1234);
    check("user-int-cs-ss", last_trap.frame.cs << 8 | last_trap.frame.ss, USER_CS << 8 | USER_DS);
    check("user-int-rsp", last_trap.frame.rsp, (u64)user_stack + sizeof user_stack);
    check("user-int-stack", last_trap.handler_rsp + sizeof(struct frame), tss.rsp[0]);
    check("user-int-rip", last_trap.frame.rip, (u64)user_int_80 + 7);
    static const struct { const char *name; void *code; u64 error; u64 skip; } privileged[] = {
        { "user-hlt", user_hlt, 0, 0 }, { "user-in", user_in, 0, 0 }, { "user-cli", user_cli, 0, 0 }, { "user-lgdt", user_lgdt, 0, 0 },
        { "user-mov-cr", user_mov_cr0, 0, 0 }, { "user-mov-dr", user_mov_dr0, 0, 0 }, { "user-rdmsr", user_rdmsr, 0, 0 },
        { "user-invlpg", user_invlpg, 0, 0 }, { "user-clts", user_clts, 0, 0 }, { "user-int-gate-level", user_int_90, 0x90 * 8 + 2, 0 },
        { "user-swapgs", user_swapgs, 0, 0 }, { "user-wbinvd", user_wbinvd, 0, 0 },
        { "user-ltr", user_ltr, 0, 0 }, { "user-load-ss", user_load_ss, 0x18, 5 },
    };
    for (size_t i = 0; i < ARRAY_LENGTH(privileged); i++) {
        u64 vector = user(privileged[i].code);
        check_trap(privileged[i].name, vector, GP, privileged[i].error, (u64)privileged[i].code + privileged[i].skip);
    }
    check_trap("user-ud2", user(user_ud2), UD, 0, (u64)user_ud2);
    check_trap("user-int3", user(user_int3), BP, 0, (u64)user_int3 + 1);
    check_trap("user-iret-inward", user(user_iret_inward), GP, KERNEL_CS, (u64)user_iret_inward_at);
}

static void test_control_registers(void)
{
    if (under_qemu()) {
        skip("control-registers", "QEMU's TCG takes any value");
        return;
    }
    expect_trap("rdmsr-unknown", read_unknown_msr, NULL, GP, 0, (u64)read_unknown_msr_at);
    expect_trap("wrmsr-unknown", write_unknown_msr, NULL, GP, 0, (u64)write_unknown_msr_at);
    u64 cr0 = read_cr0();
    expect_trap("cr0-pg-without-pe", write_cr0_code, (void *)(cr0 & ~1ull), GP, 0, 0);
    expect_trap("cr0-nw-without-cd", write_cr0_code, (void *)(cr0 | 1ull << 29), GP, 0, 0);
    expect_trap("cr0-high-bits", write_cr0_code, (void *)(cr0 | 1ull << 40), GP, 0, 0);
    check("cr0-unchanged", read_cr0(), cr0);
    u64 cr4 = read_cr4();
    expect_trap("cr4-pae-off-in-long-mode", write_cr4_code, (void *)(cr4 & ~0x20ull), GP, 0, 0);
    expect_trap("cr4-reserved", write_cr4_code, (void *)(cr4 | 1ull << 40), GP, 0, 0);
    check("cr4-unchanged", read_cr4(), cr4);
    expect_trap("cr8-reserved", write_cr8_code, (void *)16, GP, 0, 0);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    test_simple();
    test_x87_sse();
    test_floating();
    test_segments();
    test_gates();
    test_stacks();
    test_nested();
    test_control_registers();
    test_user();
}
