/* strings: MOVS, STOS, LODS, SCAS, CMPS, INS and OUTS, with and without REP, in both directions.
 *
 * Results, final RSI, RDI and RCX, flags; overlapping copies; 32-bit addresses; counts of zero; a page fault in the middle
 * of a REP, which must leave the registers at the first element not done (Intel SDM (2024-12) Vol. 2B "REP"); crossing from
 * one page to another that is not its neighbour in memory. Output: the same on every run and engine.
 */
#include "lib.h"

static u8 source[4096] __attribute__((aligned(4096))), target[4096] __attribute__((aligned(4096)));

static void fill(void)
{
    for (u32 i = 0; i < sizeof source; i++)
        source[i] = (u8)(i * 7 + (i >> 8) + 1), target[i] = 0xee;
}

static u64 sum(const void *at, size_t size)
{
    const u8 *p = at;
    u64 value = DIGEST_START;
    for (size_t i = 0; i < size; i++)
        value = (value ^ p[i]) * 0x100000001b3ull;
    return value;
}

struct state { u64 si, di, cx, ax, flags; };

#define STRING(name, code) \
    static __attribute__((noinline, unused)) struct state name(struct state s) \
    { \
        asm volatile(code "; pushfq; popq %4; cld" : "+S"(s.si), "+D"(s.di), "+c"(s.cx), "+a"(s.ax), "+r"(s.flags)::"memory", "cc"); \
        return s; \
    }
#define SIZES(name, before, op) \
    STRING(name##b, before op "b") STRING(name##w, before op "w") STRING(name##l, before op "l") STRING(name##q, before op "q")
SIZES(movs, "cld;", "movs")
SIZES(stos, "cld;", "stos")
SIZES(lods, "cld;", "lods")
SIZES(scas, "cld;", "scas")
SIZES(cmps, "cld;", "cmps")
SIZES(rep_movs, "cld; rep ", "movs")
SIZES(rep_stos, "cld; rep ", "stos")
SIZES(rep_lods, "cld; rep ", "lods")
SIZES(repe_cmps, "cld; repe ", "cmps")
SIZES(repne_scas, "cld; repne ", "scas")
SIZES(repe_scas, "cld; repe ", "scas")
SIZES(back_movs, "std; rep ", "movs")
SIZES(back_stos, "std; rep ", "stos")
SIZES(back_scas, "std; repne ", "scas")
STRING(movs_32, "cld; addr32 rep movsb")
STRING(stos_32, "cld; addr32 rep stosl")
STRING(lods_single, "std; lodsw")

#define FLAGS (FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF)

typedef struct state (*string)(struct state);

static void test_copies(void)
{
    static const struct { const char *name; string once, rep, back; u64 size; } all[] = {
        { "movsb", movsb, rep_movsb, back_movsb, 1 }, { "movsw", movsw, rep_movsw, back_movsw, 2 },
        { "movsl", movsl, rep_movsl, back_movsl, 4 }, { "movsq", movsq, rep_movsq, back_movsq, 8 },
    };
    for (size_t i = 0; i < ARRAY_LENGTH(all); i++) {
        u64 size = all[i].size, from = (u64)source + 3, to = (u64)target + 5;
        say("# %s\n", all[i].name);
        fill();
        struct state s = all[i].once((struct state){ .si = from, .di = to });
        check("once", s.si - from + (s.di - to), 2 * size);
        check("once-bytes", (u64)memcmp(target + 5, source + 3, size) | target[5 + size], 0xee);
        fill();
        s = all[i].rep((struct state){ .si = from, .di = to, .cx = 100 });
        check("rep", s.si - from == 100 * size && s.di - to == 100 * size && s.cx == 0, 1);
        check("rep-bytes", (u64)memcmp(target + 5, source + 3, 100 * size) | target[4] << 8 | target[5 + 100 * size], 0xeeee);
        s = all[i].rep((struct state){ .si = from, .di = to, .cx = 0 });
        check("rep-zero", s.si == from && s.di == to && s.cx == 0, 1);
        fill();
        s = all[i].back((struct state){ .si = (u64)source + 1600, .di = (u64)target + 2000, .cx = 60 });
        check("back", s.si == (u64)source + 1600 - 60 * size && s.di == (u64)target + 2000 - 60 * size && s.cx == 0, 1);
        check("back-bytes", (u64)memcmp(target + 2000 - 59 * size, source + 1600 - 59 * size, 60 * size), 0);
        /* Overlapping upwards by one element: the first repeats itself. */
        fill();
        all[i].rep((struct state){ .si = (u64)target, .di = (u64)target + size, .cx = 0 });
        memcpy(target, source, size);
        all[i].rep((struct state){ .si = (u64)target, .di = (u64)target + size, .cx = 40 });
        u64 same = 1;
        for (u64 k = 0; k < 41; k++)
            same &= !memcmp(target + k * size, source, size);
        check("overlap", same, 1);
        /* Overlapping by less than an element. */
        fill();
        memcpy(target, source, 256);
        u8 model[300];
        memcpy(model, target, sizeof model);
        for (u64 k = 0; k < 20; k++) {
            u8 element[8];
            for (u64 b = 0; b < size; b++)
                element[b] = model[k * size + b];
            for (u64 b = 0; b < size; b++)
                model[k * size + b + 3] = element[b];
        }
        all[i].rep((struct state){ .si = (u64)target, .di = (u64)target + 3, .cx = 20 });
        check("overlap-3", (u64)memcmp(target, model, 256), 0);
    }
    fill();
    struct state s = movs_32((struct state){ .si = 0xabcd00000000ull | (u64)source, .di = 0xffff00000000ull | (u64)target, .cx = 0x100000010ull });
    check("address-32", s.si == (u64)source + 16 && s.di == (u64)target + 16 && s.cx == 0, 1);
    check("address-32-bytes", (u64)memcmp(source, target, 16) | target[16], 0xee);
}

static void test_stores(void)
{
    static const struct { const char *name; string rep, back, once; u64 size; } all[] = {
        { "stosb", rep_stosb, back_stosb, stosb, 1 }, { "stosw", rep_stosw, back_stosw, stosw, 2 },
        { "stosl", rep_stosl, back_stosl, stosl, 4 }, { "stosq", rep_stosq, back_stosq, stosq, 8 },
    };
    u64 value = 0x1122334455667788;
    for (size_t i = 0; i < ARRAY_LENGTH(all); i++) {
        u64 size = all[i].size, to = (u64)target + 7;
        say("# %s\n", all[i].name);
        fill();
        struct state s = all[i].rep((struct state){ .di = to, .cx = 33, .ax = value });
        check("rep", s.di - to == 33 * size && s.cx == 0 && s.ax == value, 1);
        u64 same = target[6] == 0xee && target[7 + 33 * size] == 0xee;
        for (u64 k = 0; k < 33; k++)
            same &= !memcmp(target + 7 + k * size, &value, size);
        check("rep-bytes", same, 1);
        s = all[i].back((struct state){ .di = (u64)target + 3000, .cx = 9, .ax = ~value });
        check("back", (u64)target + 3000 - s.di, 9 * size);
        s = all[i].once((struct state){ .di = to, .ax = 0 });
        check("once", s.di - to, size);
    }
    struct state s = stos_32((struct state){ .di = (u64)target | 1ull << 40, .cx = 3ull | 5ull << 32, .ax = 1 });
    check("address-32", s.di == (u64)target + 12 && s.cx == 0, 1);
}

static void test_loads(void)
{
    fill();
    u64 value = *(u64 *)(source + 16), a = 0xffffffffffffffffull;
    check("lodsb", lodsb((struct state){ .si = (u64)source + 16, .ax = a }).ax, (a & ~0xffull) | (value & 0xff));
    check("lodsw", lodsw((struct state){ .si = (u64)source + 16, .ax = a }).ax, (a & ~0xffffull) | (value & 0xffff));
    check("lodsl", lodsl((struct state){ .si = (u64)source + 16, .ax = a }).ax, value & 0xffffffff);
    check("lodsq", lodsq((struct state){ .si = (u64)source + 16, .ax = a }).ax, value);
    struct state s = rep_lodsl((struct state){ .si = (u64)source, .cx = 5, .ax = a });
    check("rep-lodsl", s.ax == *(u32 *)(source + 16) && s.si == (u64)source + 20 && !s.cx, 1);
    s = rep_lodsl((struct state){ .si = (u64)source, .cx = 0, .ax = a });
    check("rep-lodsl-zero", s.ax, a);
    s = lods_single((struct state){ .si = (u64)source + 16, .ax = 0 });
    check("lodsw-back", s.si == (u64)source + 14 && s.ax == (value & 0xffff), 1);
}

static void test_scans(void)
{
    fill();
    memset(target, 0x20, 256);
    target[100] = 0x41;
    struct state s = repne_scasb((struct state){ .di = (u64)target, .cx = 256, .ax = 0x41 });
    check("repne-scasb", s.di == (u64)target + 101 && s.cx == 155 && (s.flags & FLAG_ZF), 1);
    s = repe_scasb((struct state){ .di = (u64)target, .cx = 256, .ax = 0x20 });
    check("repe-scasb", s.di == (u64)target + 101 && s.cx == 155 && !(s.flags & FLAG_ZF), 1);
    check("repe-scasb-flags", s.flags & FLAGS, FLAG_CF | FLAG_AF | FLAG_SF); /* 0x20 - 0x41 = 0xdf: 7 bits, odd parity */
    s = repne_scasb((struct state){ .di = (u64)target, .cx = 50, .ax = 0x41 });
    check("repne-scasb-absent", s.di == (u64)target + 50 && s.cx == 0 && !(s.flags & FLAG_ZF), 1);
    s = repne_scasw((struct state){ .di = (u64)target, .cx = 128, .ax = 0x2041 });
    check("repne-scasw", s.di == (u64)target + 102 && s.cx == 77, 1);
    s = repne_scasl((struct state){ .di = (u64)target, .cx = 64, .ax = 0x20202041 });
    check("repne-scasl", s.di == (u64)target + 104 && s.cx == 38, 1);
    s = repne_scasq((struct state){ .di = (u64)target, .cx = 32, .ax = 0x2020204120202020 });
    check("repne-scasq", s.di == (u64)target + 104 && s.cx == 19, 1);
    s = back_scasb((struct state){ .di = (u64)target + 200, .cx = 256, .ax = 0x41 });
    check("back-scasb", s.di == (u64)target + 99 && s.cx == 155, 1);
    s = scasl((struct state){ .di = (u64)target, .ax = 0x20202020 });
    check("scasl", s.di == (u64)target + 4 && (s.flags & FLAGS) == (FLAG_ZF | FLAG_PF), 1);

    memcpy(target, source, 512);
    target[300] ^= 0x80;
    s = repe_cmpsb((struct state){ .si = (u64)source, .di = (u64)target, .cx = 512 });
    check("repe-cmpsb", s.si == (u64)source + 301 && s.di == (u64)target + 301 && s.cx == 211 && !(s.flags & FLAG_ZF), 1);
    s = repe_cmpsb((struct state){ .si = (u64)source, .di = (u64)target, .cx = 300 });
    check("repe-cmpsb-equal", s.cx == 0 && (s.flags & FLAG_ZF), 1);
    s = repe_cmpsq((struct state){ .si = (u64)source, .di = (u64)target, .cx = 64 });
    check("repe-cmpsq", s.si == (u64)source + 304 && s.cx == 26, 1);
    s = repe_cmpsl((struct state){ .si = (u64)source, .di = (u64)target, .cx = 0, .flags = 0 });
    check("repe-cmpsl-zero", s.si == (u64)source && s.cx == 0, 1);
    s = cmpsw((struct state){ .si = (u64)source, .di = (u64)target });
    check("cmpsw", s.flags & FLAGS, FLAG_ZF | FLAG_PF);
}

#ifndef HOSTED

CODE(flags_kept, "xorl %eax, %eax\nsubl $1, %eax\nmovl $0, %ecx\nrepe cmpsb\npushfq\npopq (%rdi)\nret");
CODE(segment_copy, "pushq %rsi\npushq %rdi\nmovq %rdi, %rsi\naddq $64, %rdi\nmovl $8, %ecx\nsubq $0x100, %rsi\nrep movsb %fs:(%rsi), (%rdi)\npopq %rdi\npopq %rsi\nret");

static struct state faulting;
static void run_fault(void *function) { faulting = ((string)function)(faulting); }

#define HOLE 0x8000000000ull

/* Run a string instruction into a hole, and see where the registers stand at the fault. */
static void fault(const char *name, string function, struct state s, u64 cr2, u64 error, u64 si, u64 di, u64 cx)
{
    faulting = s;
    u64 vector = catch(run_fault, function);
    check_trap(name, vector, PF, error, 0);
    struct frame *f = &last_trap.frame;
    check("  cr2", last_trap.cr2, cr2);
    check("  registers", f->rsi == si && f->rdi == di && f->rcx == cx, 1);
}

static void test_faults(void)
{
    say("# faults\n");
    fill();
    u64 hole = HOLE + 0x1000, s = (u64)source, t = (u64)target;
    map(HOLE, t, PTE_P | PTE_W);
    fault("movsb-into-hole", rep_movsb, (struct state){ .si = s, .di = hole - 100, .cx = 300 }, hole, 2, s + 100, hole, 200);
    check("  done-before", (u64)memcmp(target + 4096 - 100, source, 100), 0);
    fault("movsq-into-hole", rep_movsq, (struct state){ .si = s, .di = hole - 80, .cx = 30 }, hole, 2, s + 80, hole, 20);
    fault("movsq-straddles", rep_movsq, (struct state){ .si = s, .di = hole - 84, .cx = 30 }, hole, 2, s + 80, hole - 4, 20);
    fault("movsb-from-hole", rep_movsb, (struct state){ .si = hole - 16, .di = s, .cx = 17 }, hole, 0, hole, s + 16, 1);
    fault("stosl-into-hole", rep_stosl, (struct state){ .si = 5, .di = hole - 40, .cx = 1000, .ax = 9 }, hole, 2, 5, hole, 990);
    memset(target + 4088, 0x11, 8);
    fault("scasb-into-hole", repne_scasb, (struct state){ .si = 5, .di = hole - 4, .cx = 9, .ax = 0x12 }, hole, 0, 5, hole, 5);
    fault("lodsq-from-hole", rep_lodsq, (struct state){ .si = hole - 16, .di = 6, .cx = 4 }, hole, 0, hole, 6, 2);
    fault("back-into-hole", back_stosb, (struct state){ .si = 5, .di = HOLE + 3, .cx = 10, .ax = 9 }, HOLE - 1, 2, 5, HOLE - 1, 6);
    fault("cmpsb-into-hole", repe_cmpsb, (struct state){ .si = t + 4096 - 8, .di = hole - 8, .cx = 20 }, hole, 0, t + 4096, hole, 12);
    asm volatile("cld");
    map(hole, (u64)take_page(), PTE_P | PTE_W);
    struct state r = rep_movsb((struct state){ .si = s, .di = hole - 2000, .cx = 4000 });
    check("across-pages", r.cx | (u64)memcmp((void *)(hole - 2000), source, 4000), 0);
    r = rep_stosq((struct state){ .di = hole - 1004, .cx = 250, .ax = 0x0123456789abcdef });
    check("stos-straddles", load64(hole - 4), 0x0123456789abcdef);
    u64 flags = 0;
    ((void (*)(u64 *))flags_kept)(&flags);
    check("zero-count-keeps-flags", flags & FLAGS, FLAG_CF | FLAG_PF | FLAG_AF | FLAG_SF);
    wrmsr(MSR_FS_BASE, 0x100);
    ((void (*)(u8 *, u64))segment_copy)(source, 0);
    check("fs-source", (u64)memcmp(source, source + 64, 8), 0);
    wrmsr(MSR_FS_BASE, 0);
}

static void test_ports(void)
{
    say("# ports\n");
    out8(0x3ff, 0x5a); /* COM1 scratch */
    u8 bytes[4] = { 1, 2, 3, 4 };
    u64 di = (u64)bytes, cx = 3;
    asm volatile("cld; rep insb" : "+D"(di), "+c"(cx) : "d"(0x3ff) : "memory");
    check("rep-insb", bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (u32)bytes[3] << 24, 0x045a5a5a);
    check("rep-insb-registers", di - (u64)bytes + cx, 3);
    u64 si = (u64)bytes + 3;
    cx = 1;
    asm volatile("rep outsb" : "+S"(si), "+c"(cx) : "d"(0x3ff) : "memory");
    check("rep-outsb", in8(0x3ff), 4);
    check("rep-outsb-registers", si - (u64)bytes + cx, 4);
    bytes[0] = 0x77;
    asm volatile("outsb" : "=S"(si) : "S"(bytes), "d"(0x3ff) : "memory");
    check("outsb", in8(0x3ff), 0x77);
}
#endif

void guest_main(const struct start_info *info)
{
    (void)info;
    test_copies();
    test_stores();
    test_loads();
    test_scans();
#ifndef HOSTED
    test_faults();
    test_ports();
#endif
    say("# digest %lx\n", sum(target, 64));
}
