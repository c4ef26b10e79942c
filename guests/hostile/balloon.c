/* hostile/balloon: a driver of the virtio balloon (VIRTIO 1.2, 5.5) that lies: it gives pages away that it goes on using, page
 * numbers that are no page, pages twice, and takes back what it never gave; with a second processor that stores to the pages
 * meanwhile. What it loses by that are its own pages' contents, which read as zeroes or as what it stored last, never as
 * anything else. Then it gives away the queue, and at last everything, its own code and page tables with it.
 * Any end after "and now everything" is fine but a defect of the monitor's.
 */
#include "smp.h"

enum { PAGES = 512, NUMBERS = 1024, ENTRIES = 8 };
enum { INFLATE, DEFLATE, STATISTICS, REPORTING, QUEUES };
enum { NEXT = 1, WRITE = 2 };

static u64 state = 88172645463325252ull;
static u64 next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

struct queue {
    struct { u64 address; u32 size; u16 flags, next; } descriptors[ENTRIES];
    struct { u16 flags, index, ring[ENTRIES], event; } available;
    struct { u16 flags, index; struct { u32 head, size; } ring[ENTRIES]; u16 event; } used __attribute__((aligned(4)));
} __attribute__((aligned(4096)));
static volatile struct queue queues[QUEUES];
static u32 numbers[NUMBERS] __attribute__((aligned(4096)));
static volatile u64 pages[PAGES][512] __attribute__((aligned(4096)));
static volatile u8 *bar;

static u32 number_of(volatile void *at) { return (u32)((u64)at >> 12); }

static bool find(void)
{
    for (u32 slot = 0; slot < 32; slot++) {
        out32(0xcf8, 1u << 31 | slot << 11);
        if (in32(0xcfc) != 0x10451af4)
            continue;
        out32(0xcf8, 1u << 31 | slot << 11 | 0x10);
        bar = (volatile u8 *)(u64)(in32(0xcfc) & ~15u);
        out32(0xcf8, 1u << 31 | slot << 11 | 4);
        out16(0xcfc, 6);
        return true;
    }
    return false;
}

static void set8(u32 at, u8 value) { *(bar + at) = value; }
static void set16(u32 at, u16 value) { *(volatile u16 *)(bar + at) = value; }
static void set32(u32 at, u32 value) { *(volatile u32 *)(bar + at) = value; }

static void begin(void)
{
    set8(0x14, 0);
    while (bar[0x14])
        pause();
    set8(0x14, 3);
    set32(0x08, 0), set32(0x0c, 0x26); /* statistics, deflate on out-of-memory, reporting */
    set32(0x08, 1), set32(0x0c, 1);    /* version 1 */
    set8(0x14, 11);
    for (u32 i = 0; i < QUEUES; i++) {
        memset((void *)&queues[i], 0, sizeof queues[i]);
        set16(0x16, (u16)i);
        set16(0x18, ENTRIES);
        set32(0x20, (u32)(u64)&queues[i].descriptors), set32(0x24, 0);
        set32(0x28, (u32)(u64)&queues[i].available), set32(0x2c, 0);
        set32(0x30, (u32)(u64)&queues[i].used), set32(0x34, 0);
        set16(0x1c, 1);
    }
    set8(0x14, 15);
}

/* One request of one buffer; says whether the device has done it, before it needed a reset. */
static bool request(u32 queue, volatile void *at, u32 size, u16 flags, bool wait)
{
    volatile struct queue *q = &queues[queue];
    q->descriptors[0].address = (u64)at;
    q->descriptors[0].size = size;
    q->descriptors[0].flags = flags;
    q->available.ring[q->available.index % ENTRIES] = 0;
    asm volatile("mfence" ::: "memory");
    q->available.index++;
    asm volatile("mfence" ::: "memory");
    set16(0x3000 + 4 * queue, (u16)queue);
    while (wait && q->used.index != q->available.index)
        if (bar[0x14] & 64)
            return false;
    return true;
}

static void fill(u64 value)
{
    for (u32 i = 0; i < PAGES; i++)
        for (u32 j = 0; j < 512; j++)
            pages[i][j] = value;
}

static void name_all_pages(void)
{
    for (u32 i = 0; i < PAGES; i++)
        numbers[i] = number_of(pages[i]);
}

static bool hold(u64 value)
{
    for (u32 i = 0; i < PAGES; i++)
        for (u32 j = 0; j < 512; j++)
            if (pages[i][j] != value)
                return false;
    return true;
}

static volatile bool is_over;

/* Stores numbers that grow, and looks that no page has a larger one than it stored. */
static void meddle(u32 me)
{
    u64 stored = 0, random = me;
    while (!is_over) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        volatile u64 *page = pages[random >> 40 & (PAGES - 1)];
        u64 found = page[me];
        if (found > stored) {
            say("processor %u found %lx, and stored %lx at last\n", me, found, stored);
            failures++;
            return;
        }
        page[me] = ++stored;
    }
}

void guest_main(const struct start_info *info)
{
    (void)info;
    if (!find()) {
        say("no balloon\n");
        finish();
    }
    begin();
    name_all_pages();

    fill(0x1111);
    request(INFLATE, numbers, 4 * PAGES, 0, true);
    check_true("what-was-given-reads-as-zeroes", hold(0));
    fill(0x2222);
    check_true("and-can-be-used-all-the-same", hold(0x2222));
    request(DEFLATE, numbers, 4 * PAGES, 0, true);
    check_true("what-came-back-by-itself-stays", hold(0x2222));
    request(INFLATE, numbers, 4 * PAGES, 0, true);
    request(INFLATE, numbers, 4 * PAGES, 0, true);
    request(DEFLATE, numbers, 4 * PAGES, 0, true);
    check_true("given-twice-taken-once", hold(0));
    fill(0x3333);
    request(REPORTING, pages, sizeof pages, WRITE, true);
    check_true("a-free-page-in-use-is-empty", hold(0));

    start_processors();
    if (processor_count() > 1)
        on_others(meddle);
    for (u32 round = 0; round < 300; round++) {
        u32 count = 1 + (u32)(next() % NUMBERS);
        for (u32 i = 0; i < count; i++) {
            switch (next() % 8) {
            case 0: numbers[i] = (u32)next(); break;
            case 1: numbers[i] = (u32)(next() % 0x5000); break; /* around the end of 64 MiB, and within */
            default: numbers[i] = number_of(pages[next() % PAGES]);
            }
            /* Not what this stands on, for now. */
            bool is_own = numbers[i] >= number_of(pages) && numbers[i] < number_of(pages) + PAGES;
            if (!is_own && numbers[i] < 0x4000)
                numbers[i] += 0x4000;
        }
        request((u32)(next() & 1), numbers, 4 * count - (u32)(next() % 16 == 0), 0, true);
        if (round % 16 == 0)
            request(REPORTING, pages[next() % 256] + (next() & 511), (u32)(next() % (256 * 4096)), WRITE, true);
    }
    is_over = true;
    join();
    check_true("nobody-found-what-nobody-stored", true);

    /* The queue that the device works on, or the page that it reads the numbers from. */
    for (u32 round = 0; round < 20; round++) {
        numbers[0] = round & 1 ? number_of(&queues[INFLATE]) : number_of(numbers);
        numbers[1] = number_of(&queues[DEFLATE]);
        u64 patience = 0;
        request(INFLATE, numbers, 8, 0, false);
        while (!(bar[0x14] & 64) && queues[INFLATE].used.index != queues[INFLATE].available.index && patience++ < 1000)
            pause();
        begin();
    }
    name_all_pages();
    fill(0x4444);
    request(INFLATE, numbers, 4 * PAGES, 0, true);
    check_true("after-a-reset-it-works", hold(0));
    say(failures ? "FAIL\n" : "so far so good\n");

    say("and now everything\n");
    for (u32 first = 0; first < 0x4000; first += NUMBERS) {
        for (u32 i = 0; i < NUMBERS; i++)
            numbers[i] = first + i;
        request(INFLATE, numbers, sizeof numbers, 0, true);
    }
    for (;;)
        asm volatile("lock incq %0" : "+m"(pages[next() % PAGES][0])::"cc");
}
