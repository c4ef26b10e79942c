/* alignment: #AC, which user code gets for a misaligned access when CR0.AM and RFLAGS.AC are both set.
 *
 * (Intel SDM (2024-12) Vol. 3A 6.15 "Interrupt 17".) Never at CPL 0, where AC means something else (SMAP). Output: the same
 * on every run and engine. QEMU's TCG does not have it.
 */
#include "lib.h"

CODE(user_read_4, "movl 1(%rdi), %eax\nint $0x80");
CODE(user_write_8, "movq %rax, 4(%rdi)\nint $0x80");
CODE(user_read_1, "movb 1(%rdi), %al\nint $0x80");
CODE(user_read_2, "movw 1(%rdi), %ax\nint $0x80");
CODE(user_aligned, "movq 8(%rdi), %rax\nmovl 4(%rdi), %eax\nmovw 2(%rdi), %ax\nint $0x80");

static u8 data[64] __attribute__((aligned(64)));

static u64 user(void *code, u64 flags)
{
    struct user_state registers = { .rdi = (u64)data };
    return run_user((u64)code, (u64)user_stack + sizeof user_stack, USER_CS, flags, &registers);
}

CODE(kernel_read, "movl 1(%rdi), %eax\nret");

void guest_main(const struct start_info *info)
{
    (void)info;
    allow_user();
    if (under_qemu()) {
        skip("alignment", "QEMU's TCG does not have it");
        return;
    }
    check("off", user(user_read_4, FLAG_AC), 0x80);
    write_cr0(read_cr0() | 1 << 18);
    check("flag-off", user(user_read_4, 0), 0x80);
    check_trap("read-4", user(user_read_4, FLAG_AC), AC, 0, (u64)user_read_4);
    check_trap("write-8", user(user_write_8, FLAG_AC), AC, 0, (u64)user_write_8);
    check_trap("read-2", user(user_read_2, FLAG_AC), AC, 0, (u64)user_read_2);
    check("read-1", user(user_read_1, FLAG_AC), 0x80);
    check("aligned", user(user_aligned, FLAG_AC), 0x80);
    write_flags(read_flags() | FLAG_AC);
    check("kernel", catch((void *)kernel_read, data), NO_TRAP);
    write_flags(2);
    write_cr0(read_cr0() & ~(1ull << 18));
}
