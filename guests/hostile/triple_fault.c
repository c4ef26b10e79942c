/* hostile/triple_fault: loads an empty IDT and divides by zero. Must end as a triple fault (exit status 5). */
#include "../lib/lib.h"

void guest_main(const struct start_info *info)
{
    (void)info;
    static const u8 empty[10];
    say("about to fault three times\n");
    asm volatile("lidt %0; xorl %%ecx, %%ecx; divl %%ecx" ::"m"(empty) : "rax", "rcx", "rdx");
    say("FAIL still here\n");
}
