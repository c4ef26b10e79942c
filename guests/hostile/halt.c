/* hostile/halt: halts with interrupts off. Nothing wakes it: must be stoppable from outside, and cost the host nothing. */
#include "../lib/lib.h"

void guest_main(const struct start_info *info)
{
    (void)info;
    say("halting with interrupts off\n");
    for (;;)
        asm volatile("cli; hlt");
}
