/* How a guest of ours comes up: from the PVH entry (32-bit protected mode, no paging) to C in long mode.
 *
 * PVH start state (Xen docs/misc/pvh.pandoc, "x86/HVM direct boot ABI"): paging off, flat 4 GiB segments,
 * ebx = guest physical address of hvm_start_info, no usable stack, GDT contents unknown.
 *
 * `start_long`, the ELF entry, is the same machine entered in long mode already, with low memory identity mapped
 * and rdi = hvm_start_info: for a loader that wants to skip the 32-bit part, and for debugging an engine.
 *
 * Both end in guest_main(start_info) on our own GDT and our own page tables:
 * 0..4 GiB identity mapped with 2 MiB pages, supervisor, writable.
 */

    .section .note.pvh, "a", @note
    .balign 4
    .long 4                     /* name size */
    .long 8                     /* descriptor size */
    .long 18                    /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad start_pvh

    .section .text.start, "ax"
    .code32
    .globl start_pvh
start_pvh:
    cld
    movl %ebx, start_info_address
    movl $boot_stack_top, %esp

    /* PML4[0] -> PDPT; PDPT[0..3] -> four page directories; 2048 entries of 2 MiB. */
    movl $boot_pdpt + 3, boot_pml4
    movl $boot_pd + 3, %eax
    movl $boot_pdpt, %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $4096, %eax
    addl $8, %edi
    loop 1b
    movl $0x83, %eax            /* present, writable, page size */
    movl $boot_pd, %edi
    movl $2048, %ecx
2:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 2b

    movl %cr4, %eax
    orl $0x20, %eax             /* PAE */
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      /* EFER */
    rdmsr
    orl $0x100, %eax            /* LME */
    wrmsr
    lgdt gdt_pointer
    movl %cr0, %eax
    orl $0x80000001, %eax       /* PG, PE */
    movl %eax, %cr0
    ljmp $0x10, $from_pvh

    .code64
from_pvh:
    movl $1, came_by_pvh(%rip)
    jmp enter_main

    .globl start_long
start_long:
    cld
    movq %rdi, start_info_address(%rip)
    lgdt gdt_pointer(%rip)
    /* The loader's tables may be anywhere, so build ours before leaving them. */
    leaq boot_stack_top(%rip), %rsp
    leaq boot_pdpt+3(%rip), %rax
    movq %rax, boot_pml4(%rip)
    leaq boot_pd+3(%rip), %rax
    leaq boot_pdpt(%rip), %rdi
    movl $4, %ecx
1:  movq %rax, (%rdi)
    addq $4096, %rax
    addq $8, %rdi
    decl %ecx
    jnz 1b
    movl $0x83, %eax
    leaq boot_pd(%rip), %rdi
    movl $2048, %ecx
2:  movq %rax, (%rdi)
    addq $0x200000, %rax
    addq $8, %rdi
    decl %ecx
    jnz 2b
    leaq boot_pml4(%rip), %rax
    movq %rax, %cr3
    pushq $0x10
    leaq enter_main(%rip), %rax
    pushq %rax
    lretq

enter_main:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    leaq boot_stack_top(%rip), %rsp
    xorl %ebp, %ebp
    /* CR0: PE, MP, ET, NE, WP, PG. EM and TS clear so that SSE and x87 run. */
    movl $0x80010033, %eax
    movq %rax, %cr0
    /* CR4: PAE, OSFXSR, OSXMMEXCPT. */
    movl $0x620, %eax
    movq %rax, %cr4
    movq start_info_address(%rip), %rdi
    call lib_main
3:  cli
    hlt
    jmp 3b

    .data
    .balign 16
    .globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* 0x08 kernel code, 32-bit */
    .quad 0x00af9b000000ffff    /* 0x10 kernel code, 64-bit */
    .quad 0x00cf93000000ffff    /* 0x18 kernel data */
    .quad 0x00cffb000000ffff    /* 0x20 user code, 32-bit */
    .quad 0x00cff3000000ffff    /* 0x28 user data */
    .quad 0x00affb000000ffff    /* 0x30 user code, 64-bit */
    .quad 0                     /* 0x38 TSS, low half, filled in by lib.c */
    .quad 0                     /*      TSS, high half */
    .fill 7, 8, 0               /* 0x48.. for the guests' own experiments */
gdt_end:
    .globl gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .balign 8
start_info_address:
    .quad 0
    .globl came_by_pvh
came_by_pvh:
    .long 0

    .bss
    .balign 4096
    .globl boot_pml4
boot_pml4:
    .skip 4096
    .globl boot_pdpt
boot_pdpt:
    .skip 4096
    .globl boot_pd
boot_pd:
    .skip 4 * 4096
    .skip 64 * 1024
boot_stack_top:
    .skip 4096
