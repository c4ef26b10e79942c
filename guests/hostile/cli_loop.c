/* hostile/cli_loop: loops with interrupts off, in one instruction, for ever. Must be stoppable from outside. */
#include "../lib/lib.h"

void guest_main(const struct start_info *info)
{
    (void)info;
    say("looping with interrupts off\n");
    asm volatile("cli; 1: jmp 1b");
}
