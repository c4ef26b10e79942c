/* Where another processor starts: real mode at the page of a start-up message, then the way to long mode that start.S
 * takes, and the stack of its APIC ID. Intel SDM (2024-12) Vol. 3A 10.4 Multiple-Processor (MP) Initialization. */
    .section .text
    .code16
    .globl ap_start
ap_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl ap_gdt_pointer - ap_start
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $ap_protected
    .balign 4
ap_gdt_pointer:
    .word 0x47
    .long gdt
    .globl ap_end
ap_end:

    .code32
ap_protected:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x620, %eax           /* CR4: PAE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax      /* CR0: PG, WP, NE, ET, MP, PE */
    movl %eax, %cr0
    ljmp $0x10, $ap_long

    .code64
ap_long:
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    lidt idt_pointer(%rip)
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %edi
    leal 1(%rbx), %eax
    shll $14, %eax
    leaq ap_stacks(%rip), %rsp
    addq %rax, %rsp
    xorl %ebp, %ebp
    call ap_main
1:  hlt
    jmp 1b
