/* A firmware of a few bytes with which QEMU starts exactly as one of our boot plans says: the oracle for the loaders.
 *
 * guests/firmware/oracle.py puts the plan's pieces into memory with QEMU's own loader, fills in the numbers marked
 * PATCHED, and gives this as `-bios`, 128 KiB mapped at 0xE0000 (where the plan's ACPI tables lie) and below 4 GiB.
 * From the reset vector: PIIX4 power management at port 0x600 as our tables say, protected mode, and then either the
 * PVH state (32-bit) or long mode on the plan's page tables.
 */
    .section .text
    .code16
    .globl _start
_start:
    cli
    cld
    /* PIIX4 function 3 (bus 0, device 1): PMBASE = 0x600, enabled, as 0x604 must be PM1a control. */
    movl $0x80000b40, %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movl $0x601, %eax
    movw $0xcfc, %dx
    outl %eax, %dx
    movl $0x80000b80, %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movb $1, %al
    movw $0xcfc, %dx
    outb %al, %dx
    movl $0x80000b04, %eax      /* command register: I/O space */
    movw $0xcf8, %dx
    outl %eax, %dx
    movw $1, %ax
    movw $0xcfc, %dx
    outw %ax, %dx
    /* SCI_EN: the machine is in ACPI mode from the start. */
    movw $0x604, %dx
    movw $1, %ax
    outw %ax, %dx

    movw %cs, %ax
    movw %ax, %ds
    lgdtl %cs:plan_gdt - _start
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $0xf0000 + protected - _start

    .code32
protected:
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    movl 0xf0000 + plan_long - _start, %eax
    testl %eax, %eax
    jnz 1f
    movl 0xf0000 + plan_rbx - _start, %ebx
    movl 0xf0000 + plan_entry - _start, %eax
    pushl $2
    popfl
    jmp *%eax
1:  movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl 0xf0000 + plan_cr3 - _start, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80010000, %eax
    movl %eax, %cr0
    ljmp $0x10, $0xf0000 + long_mode - _start

    .code64
long_mode:
    movq 0xf0000 + plan_rsi - _start, %rsi
    movq 0xf0000 + plan_rdi - _start, %rdi
    movq 0xf0000 + plan_rbx - _start, %rbx
    movq 0xf0000 + plan_rsp - _start, %rsp
    movq 0xf0000 + plan_entry - _start, %rax
    jmp *%rax

    .org 0x1000                 /* PATCHED by oracle.py: */
plan_long:
    .quad 0                     /* not 0: long mode */
plan_entry:
    .quad 0
plan_rbx:
    .quad 0
plan_rsi:
    .quad 0
plan_rdi:
    .quad 0
plan_rsp:
    .quad 0
plan_cr3:
    .quad 0
plan_gdt:
    .word 31
    .long 0                     /* the plan's GDT */

    .org 0xfff0
    .code16
    ljmp $0xf000, $0            /* the reset vector */
    .org 0x10000
