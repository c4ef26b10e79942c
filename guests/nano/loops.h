/* The loops that need no privilege: the guest and the bench program on the bare machine run the very same bytes. */
#ifndef NANO_LOOPS_H
#define NANO_LOOPS_H

/* u64 loop(u64 times, void *page): returns what it computed. */
asm(".pushsection .text\n"
    ".balign 64\n"
    "loop_callret:\n"
    "  xorl %eax, %eax\n"
    "1: call 2f\n"
    "  decq %rdi\n"
    "  jnz 1b\n"
    "  ret\n"
    ".balign 64\n"
    "2: incq %rax\n"
    "  ret\n"
    /* Stores a constant into `mov $constant, %eax; ret` in the page, and runs that. */
    ".balign 64\n"
    "loop_smc:\n"
    "  xorl %edx, %edx\n"
    "  movb $0xb8, (%rsi)\n"
    "  movb $0xc3, 5(%rsi)\n"
    "1: movl %edi, 1(%rsi)\n"
    "  call *%rsi\n"
    "  addq %rax, %rdx\n"
    "  decq %rdi\n"
    "  jnz 1b\n"
    "  movq %rdx, %rax\n"
    "  ret\n"
    ".popsection");
extern unsigned long loop_callret(unsigned long times, void *page), loop_smc(unsigned long times, void *page);

enum { CALLRET_TIMES = 1000000, SMC_TIMES = 5000 };

#endif
