/* hostile/interrupt_storm: the local APIC's timer at its fastest, self-IPIs from its own handler, and no rest.
 *
 * Must make progress or be stoppable; ends by itself after a number of interrupts. Output: not for comparing engines.
 */
#include "../lib/lib.h"

static volatile u64 count;
static bool on_storm(struct frame *frame)
{
    (void)frame;
    if (++count < 20000)
        *apic(APIC_ICR) = 0x40041;
    else
        *apic(APIC_LVT_TIMER) = 0x10000;
    *apic(APIC_EOI) = 0;
    return true;
}

void guest_main(const struct start_info *info)
{
    (void)info;
    pic_start();
    trap_handlers[0x40] = trap_handlers[0x41] = on_storm;
    *apic(APIC_DIVIDE) = 0xb;
    *apic(APIC_LVT_TIMER) = 0x20040;
    *apic(APIC_INITIAL) = 1;
    while (count < 20000) {
        sti();
        for (int i = 0; i < 10; i++)
            pause();
    }
    cli();
    *apic(APIC_LVT_TIMER) = 0x10000;
    check_true("storm-over", count >= 20000);
}
