/* processors: several of them on one memory.
 *
 * Start-up from real mode, what CPUID and the APIC IDs say, LOCKed instructions of every kind against each other (aligned,
 * unaligned, across lines and pages, on pages that hold code), single-copy atomicity, MFENCE, first touches of a page,
 * accessed and dirty bits set against LOCKed changes of the same entry, interrupts between processors, a TLB shoot-down,
 * code that one processor writes and others run, NMI, INIT and a second start. Words on the command line: `start` ends
 * after the start-up; `bench` tells how long interrupts take instead. Output: the same for every number of processors above
 * one, engine and run, but for `bench`.
 */
#include "smp.h"

#define ROUNDS 2000u
#define V 0x8000000000ull /* where nothing is mapped */
#define FRESH 0x2000000ull /* RAM at 32 MiB that nobody has touched */

static u32 count;
static volatile u32 seen[MOST_PROCESSORS];

static void note_number(u32 number) { seen[processor_number()] += number == processor_number(); }

static void test_start(void)
{
    start_processors();
    check("all-started", processors_up, count);
    on_all(note_number);
    u32 numbers = 0;
    for (u32 i = 0; i < MOST_PROCESSORS; i++)
        numbers += seen[i] == 1;
    check("numbers-differ", numbers, count);
    check("apic-id", *apic(APIC_ID) >> 24, processor_number());
    check("leaf-0xb", cpuid(0xb, 0).d, processor_number());
    check_true("leaf-0xb-bits", 1u << (cpuid(0xb, 1).a & 31) >= count);
    check("htt", has1d(28), 1);
}

/* ---- LOCK ---- */

static struct {
    volatile u64 increment, add, exchange, compare, bits[64], eight, locked_plain, unlocked;
    volatile u32 lock;
    u8 gap[52];
    volatile u64 pair[2] __attribute__((aligned(16)));
} shared __attribute__((aligned(4096)));
static u8 straddle[3 * 4096] __attribute__((aligned(4096)));
static u8 code_page[4096] __attribute__((aligned(4096)));

static void lock_all(u32 number)
{
    for (u32 i = 0; i < ROUNDS; i++) {
        asm volatile("lock incq %0" : "+m"(shared.increment));
        u64 one = 1;
        asm volatile("lock xaddq %0, %1" : "+r"(one), "+m"(shared.add));
        u64 old = shared.compare, new;
        do
            new = old + 1;
        while (!({ bool done; asm volatile("lock cmpxchgq %3, %1" : "=@ccz"(done), "+m"(shared.compare), "+a"(old) : "r"(new)); done; }));
        /* A pair whose halves must stay equal. */
        u64 low = shared.pair[0], high = shared.pair[1];
        bool done;
        do
            asm volatile("lock cmpxchg16b %1" : "=@ccz"(done), "+m"(shared.pair), "+a"(low), "+d"(high) : "b"(low + 1), "c"(high + 1));
        while (!done);
        u32 a = (u32)shared.eight, d = (u32)(shared.eight >> 32);
        do
            asm volatile("lock cmpxchg8b %1" : "=@ccz"(done), "+m"(shared.eight), "+a"(a), "+d"(d) : "b"(a + 1), "c"(d + 1));
        while (!done);
        /* XCHG locks by itself: a spin lock around plain memory. */
        u32 taken = 1;
        for (;;) {
            asm volatile("xchgl %0, %1" : "+r"(taken), "+m"(shared.lock)::"memory");
            if (!taken)
                break;
            while (shared.lock)
                pause();
            taken = 1;
        }
        shared.locked_plain++;
        asm volatile("" ::: "memory");
        shared.lock = 0;
        asm volatile("lock btsq %1, %0" : "+m"(shared.bits[i & 63]) : "r"((u64)number) : "cc");
        asm volatile("lock addl $1, %0" : "+m"(*(u32 *)(straddle + 1)) :: "cc");
        asm volatile("lock addl $1, %0" : "+m"(*(u32 *)(straddle + 62)) :: "cc");
        asm volatile("lock addq $1, %0" : "+m"(*(u64 *)(straddle + 4092)) :: "cc");
        asm volatile("lock incl %0" : "+m"(*(u32 *)(code_page + 2048)) :: "cc");
        if (i % 64 == 0)
            ((void (*)(void))code_page)();
    }
}

static void test_locks(void)
{
    code_page[0] = 0xc3; /* ret */
    on_all(lock_all);
    u64 want = (u64)ROUNDS * count;
    check("lock-inc", shared.increment - want, 0);
    check("lock-xadd", shared.add - want, 0);
    check("lock-cmpxchg", shared.compare - want, 0);
    check("lock-cmpxchg8b", (shared.eight & 0xffffffff) - want + (shared.eight >> 32) - want, 0);
    check("lock-cmpxchg16b", shared.pair[0] - want + shared.pair[1] - want, 0);
    check("xchg-as-lock", shared.locked_plain - want, 0);
    u64 bits = (1ull << count) - 1;
    for (u32 i = 0; i < 64; i++)
        bits ^= shared.bits[i] ^ ((1ull << count) - 1);
    check("lock-bts", bits, (1ull << count) - 1);
    check("lock-unaligned", *(u32 *)(straddle + 1) - want, 0);
    check("lock-across-lines", *(u32 *)(straddle + 62) - want, 0);
    check("lock-across-pages", *(u64 *)(straddle + 4092) - want, 0);
    check("lock-beside-code", *(u32 *)(code_page + 2048) - want, 0);
}

/* ---- atomicity and order ---- */

static volatile u64 whole, torn, both_early;
static volatile u32 x, y, read_x, read_y;

static void flip_and_look(u32 number)
{
    if (number == 0) {
        for (u32 i = 0; i < 20 * ROUNDS; i++)
            whole = i & 1 ? ~0ull : 0;
    } else {
        for (u32 i = 0; i < 20 * ROUNDS; i++) {
            u64 now = whole;
            if (now != 0 && now != ~0ull)
                torn++;
        }
    }
}

/* Each stores, then loads what the other stores: with MFENCE between, at least one sees the other. */
static void store_and_look(u32 number)
{
    for (u32 i = 0; i < ROUNDS / 4; i++) {
        barrier();
        if (number == 0) {
            x = i + 1;
            asm volatile("mfence" ::: "memory");
            read_y = y;
        } else if (number == 1) {
            y = i + 1;
            asm volatile("mfence" ::: "memory");
            read_x = x;
        }
        barrier();
        if (number == 0 && read_x != i + 1 && read_y != i + 1)
            both_early++;
    }
}

static void touch(u32 number)
{
    for (u64 page = 0; page < 64; page++) {
        if (page % 8 == 0)
            barrier();
        store64(FRESH + page * 4096 + number * 8, page * 100 + number + 1);
    }
}

static void test_memory(void)
{
    on_all(flip_and_look);
    check("no-torn-value", torn, 0);
    on_all(store_and_look);
    check("mfence", both_early, 0);
    on_all(touch);
    u32 wrong = 0;
    for (u64 page = 0; page < 64; page++)
        for (u32 i = 0; i < count; i++)
            wrong += load64(FRESH + page * 4096 + i * 8) != page * 100 + i + 1;
    check("first-touch-together", wrong, 0);
}

/* ---- page tables ---- */

static volatile u32 lost;

static void use_entry(u32 number)
{
    u64 *entry = entry_of(read_cr3(), V, 1);
    for (u32 i = 0; i < ROUNDS / 4; i++) {
        if (number == 0)
            *entry = (FRESH + 0x100000) | PTE_P | PTE_W;
        barrier();
        if (number == 1) {
            invlpg(V);
            store64(V + 8, i); /* sets accessed and dirty */
        } else if (number == 0) {
            asm volatile("lock orq $0x200, %0" : "+m"(*entry) :: "cc"); /* a bit of software's own */
        }
        barrier();
        if (number == 0 && (*entry & (PTE_A | PTE_D | 0x200)) != (PTE_A | PTE_D | 0x200))
            lost++;
    }
}

static volatile u32 flushed, pings;

static bool on_flush(struct frame *frame)
{
    (void)frame;
    invlpg(V);
    asm volatile("lock incl %0" : "+m"(flushed));
    eoi();
    return true;
}

static volatile u32 stop, stale;
static volatile u64 settled;

/* Each page behind V holds a greater number than the one before. */
static void read_mapped(u32 number)
{
    if (number == 0)
        return;
    sti();
    while (!stop) {
        u64 least = settled;
        if (load64(V) < least)
            stale++;
        pause();
    }
    cli();
}

static void test_tables(void)
{
    map(V, FRESH + 0x100000, PTE_P | PTE_W);
    on_all(use_entry);
    check("no-bit-lost", lost, 0);
    map(V, FRESH + 0x200000, PTE_P | PTE_W);
    invlpg(V);
    trap_handlers[0x50] = on_flush;
    on_others(read_mapped);
    for (u32 i = 1; i < 100; i++) {
        u64 page = FRESH + 0x200000 + (i & 3) * 4096;
        store64(page, i);
        map(V, page, PTE_P | PTE_W);
        invlpg(V);
        flushed = 0;
        send_ipi(0, IPI_OTHERS | 0x50);
        while (flushed < count - 1)
            pause();
        settled = i; /* nobody may see an earlier page any more */
        for (u32 j = 0; j < 20; j++)
            pause();
    }
    stop = 1;
    join();
    check("shoot-down", stale, 0);
}

/* ---- interrupts ---- */

static bool on_ping(struct frame *frame)
{
    (void)frame;
    eoi();
    asm volatile("lock incl %0" : "+m"(pings));
    send_ipi(0, 0x52);
    return true;
}
static volatile u32 pongs;
static bool on_pong(struct frame *frame)
{
    (void)frame;
    pongs++;
    eoi();
    return true;
}
static void wait_halted(u32 number)
{
    (void)number;
    while (!stop)
        sti_hlt();
    cli();
}
static volatile u32 nmis;
static bool on_nmi(struct frame *frame)
{
    (void)frame;
    asm volatile("lock incl %0" : "+m"(nmis));
    return true;
}
static bool on_wake(struct frame *frame)
{
    (void)frame;
    eoi();
    return true;
}
static void ping(u32 rounds)
{
    for (u32 i = 0; i < rounds; i++)
        for (u32 number = 1; number < count; number++) {
            u32 before = pongs;
            send_ipi(number, 0x51);
            while (pongs == before)
                asm volatile("sti; nop; nop; cli" ::: "memory");
        }
}
static void let_go(void)
{
    stop = 1;
    send_ipi(0, IPI_OTHERS | 0x53);
    join();
    stop = 0;
}

static void test_interrupts(void)
{
    trap_handlers[0x51] = on_ping;
    trap_handlers[0x52] = on_pong;
    trap_handlers[0x53] = on_wake;
    trap_handlers[NMI] = on_nmi;
    stop = 0;
    on_others(wait_halted);
    ping(50);
    check("ping-pong-halted", pings - 50 * (count - 1) + pongs - 50 * (count - 1), 0);
    send_ipi(0, IPI_OTHERS | IPI_NMI);
    while (nmis < count - 1)
        pause();
    check("nmi-to-others", nmis - (count - 1), 0);
    let_go();
}

/* ---- code ---- */

static u8 *patch;
static volatile u32 synced, bad, go;
static bool on_sync(struct frame *frame)
{
    (void)frame; /* the IRET behind this serializes */
    asm volatile("lock incl %0" : "+m"(synced));
    eoi();
    return true;
}
typedef u32 (*code)(void);

static void run_patched(u32 number)
{
    if (number == 0)
        return;
    sti();
    while (!stop) {
        u32 before = go, got = ((code)patch)(), after = go;
        if (got < before || got > after + 1)
            bad++;
    }
    cli();
}

static void run_when_told(u32 number)
{
    for (u32 i = 1; i <= 200; i++) {
        if (number == 0) {
            *(volatile u32 *)(patch + 1) = i;
            go = i;
        }
        while (go != i)
            pause();
        cpuid(0, 0); /* serializes */
        if (((code)patch)() != i)
            bad++;
        barrier();
    }
}

/* Everybody writes whole instructions into one page and runs them. */
static void write_and_run(u32 number)
{
    for (u32 i = 0; i < 300; i++) {
        *(volatile u32 *)(patch + 65) = number << 16 | i; /* aligned to no line end: one store, seen whole */
        u32 got = ((code)(patch + 64))();
        if (got >> 16 >= count || (got & 0xffff) >= 300)
            bad++;
    }
}

static void test_code(void)
{
    patch = take_page();
    patch[0] = patch[64] = 0xb8, patch[5] = patch[69] = 0xc3; /* mov $n, %eax; ret */
    trap_handlers[0x54] = on_sync;
    stop = 0;
    on_others(run_patched);
    for (u32 i = 1; i <= 150; i++) {
        *(volatile u32 *)(patch + 1) = i;
        synced = 0;
        send_ipi(0, IPI_OTHERS | 0x54);
        while (synced < count - 1)
            pause();
        go = i; /* everybody has seen the new code */
    }
    stop = 1;
    join();
    check("modified-with-interrupt", bad, 0);
    go = bad = 0;
    on_all(run_when_told);
    check("modified-with-flag", bad, 0);
    on_all(write_and_run);
    check("modified-by-all", bad, 0);
}

/* ---- INIT ---- */

static void spin(u32 number)
{
    (void)number;
    for (;;)
        ;
}

static void test_init(void)
{
    send_ipi(1, IPI_STARTUP | 0x70); /* it runs: nothing happens */
    for (u32 i = 0; i < 1000; i++)
        pause();
    check("start-up-ignored", processors_up - count, 0);
    on_others(spin);
    for (u32 round = 0; round < 5; round++)
        for (u32 number = 1; number < count; number++) {
            u32 before = processors_up;
            start_processor(number);
            while (processors_up == before)
                pause();
        }
    check("started-again", processors_up - count, 5 * (count - 1));
    for (u32 i = 0; i < MOST_PROCESSORS; i++)
        seen[i] = 0;
    on_all(note_number);
    u32 numbers = 0;
    for (u32 i = 0; i < MOST_PROCESSORS; i++)
        numbers += seen[i] == 1;
    check("and-work-again", numbers, count);
}

static void bench(void)
{
    trap_handlers[0x51] = on_ping;
    trap_handlers[0x52] = on_pong;
    trap_handlers[0x53] = on_wake;
    for (u32 halted = 0; halted < 2; halted++) {
        on_others(halted ? wait_halted : run_patched);
        ping(100);
        u64 begin = rdtsc();
        ping(1000);
        u64 end = rdtsc();
        say("%s round trip %lu cycles\n", halted ? "halted" : "running", (end - begin) / 1000 / (count - 1));
        let_go();
    }
}

void guest_main(const struct start_info *info)
{
    (void)info;
    pic_start();
    count = processor_count();
    if (count < 2) {
        say("this guest wants 2 processors or more\n");
        failures++;
        return;
    }
    test_start();
    if (starts_with(command_line, "start"))
        return;
    if (starts_with(command_line, "bench")) {
        patch = take_page();
        patch[0] = 0xb8, patch[5] = 0xc3;
        return bench();
    }
    test_locks();
    test_memory();
    test_tables();
    test_interrupts();
    test_code();
    test_init();
}
