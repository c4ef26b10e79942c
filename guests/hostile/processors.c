/* hostile_processors: what several processors can do to each other and to themselves. The command line says what:
 * `nowhere` starts the others where nothing is, `init-self` takes the ground from under the first one's feet, `triple` has
 * all fault three times at once, `storm` has them send INIT, start-up messages, NMIs and interrupts to anybody at random.
 */
#include "smp.h"

static u32 random_of(u64 *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(*state >> 33);
}

static void fault_three_times(u32 number)
{
    (void)number;
    static const u8 nothing[10] __attribute__((aligned(16)));
    barrier();
    asm volatile("lidt (%0); ud2" ::"r"(nothing));
}

static bool on_anything(struct frame *frame)
{
    if (frame->vector >= 32)
        eoi();
    return true;
}

static void send_anything(u32 number)
{
    u64 state = number + 7;
    sti();
    for (u32 i = 0; number || i < 3000; i++) {
        u32 what = random_of(&state), to = random_of(&state) % (processor_count() + 2);
        switch (what % 8) {
        case 0: send_ipi(to ? to : 1, IPI_INIT); break;
        case 1: send_ipi(to ? to : 1, IPI_STARTUP | (what & 0x100 ? 0x70 : what >> 16 & 0xff)); break;
        case 2: send_ipi(to, IPI_NMI); break;
        case 3: send_ipi(to, 0x40 + (what >> 8 & 0x3f)); break;
        case 4: send_ipi(0, IPI_OTHERS | 0x40); break;
        case 5: send_ipi(0, IPI_ALL | 0x41); break;
        case 6: send_ipi(what >> 8 & 0xff, (what & 0xfff) | 1 << 11); break;
        default: invlpg(what); break;
        }
    }
    cli();
}

void guest_main(const struct start_info *info)
{
    (void)info;
    pic_start();
    say("%s\n", command_line);
    start_processors();
    if (starts_with(command_line, "nowhere")) {
        for (u32 round = 0; round < 20; round++)
            for (u32 i = 1; i < processor_count(); i++) {
                send_ipi(i, IPI_INIT);
                send_ipi(i, IPI_STARTUP | ((0xa0 + round * 7 + i) & 0xff));
                for (u32 j = 0; j < 100; j++)
                    pause();
            }
    } else if (starts_with(command_line, "init-self")) {
        send_ipi(0, IPI_INIT);
        for (;;)
            pause();
    } else if (starts_with(command_line, "triple")) {
        on_all(fault_three_times);
    } else {
        trap_handlers[NMI] = on_anything;
        for (u32 vector = 0x40; vector < 256; vector++)
            trap_handlers[vector] = on_anything;
        on_others(send_anything);
        send_anything(0);
    }
    say("survived\n");
    power_off();
}
