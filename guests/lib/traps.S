/* The 256 interrupt stubs, and the two ways to run a function that may trap.
 *
 * Every stub leaves the same frame (struct frame in lib.h): an error code of 0 is pushed where the processor pushes
 * none (Intel SDM (2024-12) Vol. 3A 6.13 Error Code).
 */
    .text
    .globl trap_stubs
    .balign 16
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !((vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21) | (vector == 29) | (vector == 30))
    pushq $0
    .endif
    pushq $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    movq %rsp, %rbx
    andq $-16, %rsp             /* a stub without error code leaves it odd only on a corrupt stack, but be sure */
    call on_trap
    movq %rbx, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    iretq

/* u64 catch(void (*function)(void *), void *argument)
 *
 * Call function(argument). Return NO_TRAP when it returns, or the vector when anything in it traps and no handler takes
 * the trap; last_trap then says where and why. Nests. */
    .globl catch
catch:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushfq
    pushq recover_rsp(%rip)
    subq $8, %rsp
    movq %rsp, recover_rsp(%rip)
    movq %rdi, %rax
    movq %rsi, %rdi
    call *%rax
    movl $256, %eax
    .globl catch_landing
catch_landing:                  /* on_trap resumes here with rax = vector and rsp = recover_rsp */
    addq $8, %rsp
    popq recover_rsp(%rip)
    popfq
    cld
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

/* void enter_user(struct user_state *): become it by IRETQ; comes back only as a trap. */
    .globl enter_user
enter_user:
    pushq 0(%rdi)               /* ss */
    pushq 8(%rdi)               /* rsp */
    pushq 16(%rdi)              /* rflags */
    pushq 24(%rdi)              /* cs */
    pushq 32(%rdi)              /* rip */
    movq 40(%rdi), %rax
    movq 48(%rdi), %rbx
    movq 56(%rdi), %rcx
    movq 64(%rdi), %rdx
    movq 72(%rdi), %rsi
    movq 80(%rdi), %rdi
    iretq

    .data
    .balign 8
    .globl recover_rsp
recover_rsp:
    .quad 0
