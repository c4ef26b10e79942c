/* paging: 4-level page tables as the manual has them (Intel SDM (2024-12) Vol. 3A chapter 4 Paging).
 *
 * Accessed and dirty bits, every page-fault error code, CR2, WP, NX, SMEP, SMAP, reserved bits, 2 MiB and 1 GiB pages, what
 * INVLPG, MOV CR3, CR4.PGE and INVPCID must invalidate, accesses that straddle pages, and tables edited while in use.
 *
 * Only what the architecture promises is checked: a stale translation *may* be used until it is invalidated, so no check
 * demands that one is. Output: the same on every run and engine, but for features that CPUID does not offer (skipped).
 */
#include "lib.h"

#define V 0x8000000000ull        /* 512 GiB: PML4 entry 1, ours alone */
#define HIGH 0xffff900000000000ull /* and one in the upper half */

CODE(read_8, "movq (%rdi), %rax\nret");
CODE(write_8, "movq $0x77, (%rdi)\nret");
CODE(add_8, "addq $1, (%rdi)\nret");
CODE(jump_to, "jmp *%rdi");
CODE(a_return, "movl $0x1234, %eax\nret");
CODE(stack_read, "pushq %rbp\nmovq %rdi, %rbp\nmovq (%rbp), %rax\npopq %rbp\nret"); /* rbp: the stack segment */

static u64 *first, *second; /* two machine pages, by their identity addresses */

static u64 pte(u64 address) { return *entry_of(read_cr3(), address, 1); }

static void test_access(void)
{
    first[0] = 0x1111, second[0] = 0x2222;
    map(V, (u64)first, PTE_P | PTE_W);
    for (int level = 2; level <= 4; level++)
        *entry_of(read_cr3(), V, level) &= ~PTE_A;
    check("map-read", load64(V), 0x1111);
    check("read-sets-accessed", pte(V) & (PTE_A | PTE_D), PTE_A);
    u64 upper = 0;
    for (int level = 2; level <= 4; level++)
        upper += !!(*entry_of(read_cr3(), V, level) & PTE_A);
    check("read-sets-accessed-above", upper, 3);
    store64(V + 8, 0x3333);
    check("write-sets-dirty", pte(V) & (PTE_A | PTE_D), PTE_A | PTE_D);
    check("write-through", first[1], 0x3333);
    map(V + 0x1000, (u64)second, PTE_P | PTE_W);
    store64(V + 0x1000, 5);
    check("write-first-sets-both", pte(V + 0x1000) & (PTE_A | PTE_D), PTE_A | PTE_D);
    check("write-first", second[0], 5);
    map(HIGH, (u64)second, PTE_P | PTE_W);
    check("upper-half", load64(HIGH), 5);
    *entry_of(read_cr3(), V, 1) &= ~(PTE_A | PTE_D);
    invlpg(V);
    check("accessed-cleared-read", load64(V + 8), 0x3333);
    check("accessed-set-again", pte(V) & (PTE_A | PTE_D), PTE_A);
    *entry_of(read_cr3(), V, 1) &= ~PTE_A;
    invlpg(V);
    asm volatile("lock cmpxchgq %%rdx, (%%rdi)" ::"D"(V), "a"(0x9999ull), "d"(1ull) : "memory", "cc");
    check("failed-cmpxchg-sets-dirty", pte(V) & (PTE_A | PTE_D), PTE_A | PTE_D);
}

static void test_faults(void)
{
    u64 gone = V + 0x10000;
    expect_page_fault("missing-read", read_8, gone + 0x123, 0, gone + 0x123);
    expect_page_fault("missing-write", write_8, gone + 0x456, 2, gone + 0x456);
    expect_page_fault("missing-modify", add_8, gone + 0x789, 2, gone + 0x789);
    expect_page_fault("missing-table", read_8, 0x10000000000ull, 0, 0x10000000000ull);
    expect_page_fault("missing-fetch", jump_to, gone, rdmsr(MSR_EFER) & 0x800 ? 0x10 : 0, gone);
    check("missing-fetch-rip", last_trap.frame.rip, gone);
    /* Not-present entries are never cached: no INVLPG is needed (4.10.2.3). */
    map(gone, (u64)first, PTE_P | PTE_W);
    check("appears-without-invlpg", load64(gone + 8), 0x3333);

    u64 only = V + 0x2000;
    map(only, (u64)first, PTE_P);
    check("read-only-read", load64(only + 8), 0x3333);
    expect_page_fault("read-only-write", write_8, only, 3, only);
    check("read-only-not-dirty", pte(only) & PTE_D, 0);
    write_cr0(read_cr0() & ~0x10000ull); /* WP off */
    check("wp-off-write", catch((void *)write_8, (void *)only), NO_TRAP);
    check("wp-off-dirty", pte(only) & PTE_D, PTE_D);
    write_cr0(read_cr0() | 0x10000);
    expect_page_fault("wp-on-write", write_8, only, 3, only);
    u64 *upper = entry_of(read_cr3(), V, 3);
    map(V + 0x3000, (u64)first, PTE_P | PTE_W);
    *upper &= ~PTE_W;
    write_cr3(read_cr3());
    expect_page_fault("read-only-above", write_8, V + 0x3000, 3, V + 0x3000);
    *upper |= PTE_W;
    write_cr3(read_cr3());
    check("writable-again", catch((void *)write_8, (void *)(V + 0x3000)), NO_TRAP);

    /* PS is reserved in a PML4 entry (table 4-15). */
    u64 *top = entry_of(read_cr3(), V, 4);
    *top |= PTE_PS;
    write_cr3(read_cr3());
    expect_page_fault("reserved-bit", read_8, V, 9, V);
    expect_page_fault("reserved-bit-write", write_8, V, 0xb, V);
    *top &= ~PTE_PS;
    write_cr3(read_cr3());
    u32 width = cpuid(0x80000008, 0).a & 0xff;
    if (width < 52) {
        map(V + 0x4000, (u64)first | 1ull << 51, PTE_P | PTE_W);
        expect_page_fault("address-too-wide", read_8, V + 0x4000, 9, V + 0x4000);
        map(V + 0x4000, 0, 0);
    } else {
        skip("address-too-wide", "52 physical address bits");
    }

    expect_trap("non-canonical", read_8, (void *)0x800000000000ull, GP, 0, (u64)read_8);
    expect_trap("non-canonical-high", write_8, (void *)0xffff7ffffffffff8ull, GP, 0, (u64)write_8);
    expect_trap("non-canonical-stack", stack_read, (void *)0x900000000000ull, SS, 0, (u64)stack_read + 4);
    expect_trap("non-canonical-jump", jump_to, (void *)0x900000000000ull, GP, 0, 0);
}

static void test_no_execute(void)
{
    if (!has_ext_d(20)) {
        skip("nx", "not in CPUID");
        return;
    }
    u64 page = V + 0x20000;
    memcpy(second, a_return, 16);
    map(page, (u64)second | PTE_NX, PTE_P | PTE_W);
    expect_page_fault("nx-reserved-when-off", read_8, page, 9, page);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 0x800);
    invlpg(page);
    check("nx-read", load64(page) & 0xff, 0xb8);
    expect_page_fault("nx-fetch", jump_to, page, 0x11, page);
    check("nx-fetch-rip", last_trap.frame.rip, page);
    map(page, (u64)second, PTE_P);
    invlpg(page);
    check("x-fetch", catch((void *)page, NULL), NO_TRAP);
    u64 *above = entry_of(read_cr3(), page, 2);
    *above |= PTE_NX;
    write_cr3(read_cr3());
    expect_page_fault("nx-above", jump_to, page, 0x11, page);
    *above &= ~PTE_NX;
    write_cr3(read_cr3());
    check("x-fetch-again", catch((void *)page, NULL), NO_TRAP);
    expect_page_fault("missing-fetch-nxe", jump_to, V + 0x80000, 0x10, V + 0x80000);
}

CODE(user_read, "movq (%rdi), %rax\nint $0x80");
CODE(user_write, "movq $1, (%rdi)\nint $0x80");
CODE(user_jump, "jmp *%rdi");

static u64 user(u8 *code, u64 argument)
{
    struct user_state registers = { .rdi = argument };
    return run_user((u64)code, (u64)user_stack + sizeof user_stack, USER_CS, 0, &registers);
}

static void user_fault(const char *name, u8 *code, u64 address, u64 error)
{
    u64 vector = user(code, address);
    if (vector == PF && last_trap.cr2 != address)
        check(name, last_trap.cr2, address);
    else
        check_trap(name, vector, PF, error, 0);
}

static void test_user(void)
{
    allow_user();
    u64 page = V + 0x30000, mine = V + 0x31000;
    map(page, (u64)first, PTE_P | PTE_W);
    map(mine, (u64)second, PTE_P | PTE_U);
    second[4] = 0x4444;
    u64 fetch = rdmsr(MSR_EFER) & 0x800 ? 0x10 : 0;
    check("user-read", user(user_read, mine + 32), 0x80);
    check("user-read-value", last_trap.frame.rax, 0x4444);
    user_fault("user-read-supervisor", user_read, page, 5);
    user_fault("user-write-supervisor", user_write, page, 7);
    user_fault("user-fetch-supervisor", user_jump, page, 5 | fetch);
    user_fault("user-write-read-only", user_write, mine, 7);
    user_fault("user-missing", user_read, V + 0x40000, 4);
    user_fault("user-missing-write", user_write, V + 0x40000, 6);
    user_fault("user-missing-fetch", user_jump, V + 0x40000, 4 | fetch);
    write_cr0(read_cr0() & ~0x10000ull);
    user_fault("user-write-wp-off", user_write, mine, 7); /* WP is for supervisors only */
    write_cr0(read_cr0() | 0x10000);
    u64 vector = user(user_read, 0x800000000000ull);
    check_trap("user-non-canonical", vector, GP, 0, (u64)user_read);
    /* CR2 keeps the last page fault's address through other traps. */
    user_fault("user-again", user_read, page + 8, 5);
    user(user_read, mine);
    check("cr2-kept", read_cr2(), page + 8);

    if (has7b(7)) {
        u64 code = V + 0x32000;
        memcpy(second, a_return, 16);
        map(code, (u64)second, PTE_P | PTE_U);
        check("smep-off-fetch", catch((void *)code, NULL), NO_TRAP);
        /* Our own code is in user pages by now (allow_user), so run SMEP with those taken back. */
        for (int i = 0; i < 2048; i++)
            boot_pd[i] &= ~PTE_U;
        write_cr4(read_cr4() | 1 << 20);
        write_cr3(read_cr3());
        expect_page_fault("smep-fetch", jump_to, code, 0x11, code);
        check("smep-read", load64(code) & 0xff, 0xb8);
        write_cr4(read_cr4() & ~(1ull << 20));
        check("smep-off-again", catch((void *)code, NULL), NO_TRAP);
    } else {
        skip("smep", "not in CPUID");
    }
    if (has7b(20)) {
        u64 data = V + 0x33000;
        for (int i = 0; i < 2048; i++)
            boot_pd[i] &= ~PTE_U;
        write_cr3(read_cr3());
        map(data, (u64)second, PTE_P | PTE_U | PTE_W);
        check("smap-off-read", load64(data) & 0xff, 0xb8);
        write_cr4(read_cr4() | 1 << 21);
        expect_page_fault("smap-read", read_8, data, 1, data);
        expect_page_fault("smap-write", write_8, data + 64, 3, data + 64);
        asm volatile("stac");
        check("smap-ac-read", load64(data) & 0xff, 0xb8);
        asm volatile("clac");
        expect_page_fault("smap-read-clac", read_8, data, 1, data);
        write_flags(read_flags() | FLAG_AC);
        check("smap-popf-ac-read", load64(data) & 0xff, 0xb8);
        write_flags(read_flags() & ~(u64)FLAG_AC);
        expect_page_fault("smap-read-popf", read_8, data, 1, data);
        write_cr4(read_cr4() & ~(1ull << 21));
        check("smap-off-again", load64(data) & 0xff, 0xb8);
    } else {
        skip("smap", "not in CPUID");
    }
    allow_user();
}

#define BIG 0x2000000ull /* 32 MiB: free RAM, by its identity address */

static void test_large(void)
{
    u64 page = V + 0x40000000; /* 1 GiB on */
    *entry_of(read_cr3(), page, 2) = BIG | PTE_P | PTE_W | PTE_PS;
    store64(BIG + 0x1ff000, 0xabcd);
    check("2m-read", load64(page + 0x1ff000), 0xabcd);
    check("2m-accessed", *entry_of(read_cr3(), page, 2) & (PTE_A | PTE_D), PTE_A);
    store64(page + 0x12340, 0xef);
    check("2m-write", load64(BIG + 0x12340), 0xef);
    check("2m-dirty", *entry_of(read_cr3(), page, 2) & (PTE_A | PTE_D), PTE_A | PTE_D);
    *entry_of(read_cr3(), page + 0x200000, 2) = (BIG + 0x2000) | PTE_P | PTE_W | PTE_PS;
    expect_page_fault("2m-misaligned-reserved", read_8, page + 0x200000, 9, page + 0x200000);
    *entry_of(read_cr3(), page, 2) = BIG | PTE_P | PTE_PS;
    invlpg(page + 0x1000); /* any address in the page does (4.10.4.1) */
    expect_page_fault("2m-read-only", write_8, page + 0x12340, 3, page + 0x12340);
    /* From a large page to small ones: the table is linked in, then INVLPG. */
    u64 *table = take_page();
    for (u64 i = 0; i < 512; i++)
        table[i] = (BIG + 0x200000 - 0x1000 * (i + 1)) | PTE_P | PTE_W;
    *entry_of(read_cr3(), page, 2) = (u64)table | PTE_P | PTE_W;
    invlpg(page);
    write_cr3(read_cr3());
    check("2m-split", load64(page), 0xabcd);
    if (!has_ext_d(26)) {
        skip("1g", "not in CPUID");
        return;
    }
    u64 huge = V + 0x80000000;
    *entry_of(read_cr3(), huge, 3) = PTE_P | PTE_W | PTE_PS;
    check("1g-read", load64(huge + BIG + 0x12340), 0xef);
    check("1g-accessed", *entry_of(read_cr3(), huge, 3) & (PTE_A | PTE_D), PTE_A);
    store64(huge + BIG + 0x12348, 0x55);
    check("1g-write", load64(BIG + 0x12348), 0x55);
    check("1g-dirty", *entry_of(read_cr3(), huge, 3) & (PTE_A | PTE_D), PTE_A | PTE_D);
    *entry_of(read_cr3(), huge, 3) = 0;
    invlpg(huge);
    expect_page_fault("1g-gone", read_8, huge + BIG, 0, huge + BIG);
}

static void test_invalidation(void)
{
    u64 page = V + 0x50000, other = V + 0x51000;
    first[0] = 1, second[0] = 2;
    map(page, (u64)first, PTE_P | PTE_W);
    check("before", load64(page), 1);
    map(page, (u64)second, PTE_P | PTE_W);
    invlpg(page + 0xfff);
    check("invlpg", load64(page), 2);
    map(page, (u64)first, PTE_P | PTE_W);
    write_cr3(read_cr3());
    check("mov-cr3", load64(page), 1);
    map(page, 0, 0);
    invlpg(page);
    expect_page_fault("unmapped", read_8, page, 0, page);
    map(page, (u64)first, PTE_P | PTE_W);
    store64(page, 1);
    map(page, (u64)first, PTE_P);
    invlpg(page);
    expect_page_fault("write-protected", write_8, page, 3, page);

    /* Global pages: outlive MOV CR3 at the processor's pleasure, never INVLPG or a change of CR4.PGE. */
    write_cr4(read_cr4() | 0x80);
    map(page, (u64)first, PTE_P | PTE_W | PTE_G);
    map(other, (u64)first, PTE_P | PTE_W);
    invlpg(page);
    check("global", load64(page) + load64(other), 2);
    map(page, (u64)second, PTE_P | PTE_W | PTE_G);
    map(other, (u64)second, PTE_P | PTE_W);
    write_cr3(read_cr3());
    check("global-others", load64(other), 2);
    invlpg(page);
    check("global-invlpg", load64(page), 2);
    map(page, (u64)first, PTE_P | PTE_W | PTE_G);
    write_cr4(read_cr4() & ~0x80ull);
    check("global-pge-off", load64(page), 1);
    map(page, (u64)second, PTE_P | PTE_W | PTE_G);
    write_cr4(read_cr4() | 0x80);
    check("global-pge-on", load64(page), 2);
    write_cr4(read_cr4() & ~0x80ull);

    /* A table edited through a mapping of itself, then used at once. */
    u64 *table_page = (u64 *)(*entry_of(read_cr3(), V, 2) & PTE_ADDRESS);
    map(V + 0x60000, (u64)table_page, PTE_P | PTE_W);
    u64 through = V + 0x60000 + 8 * 0x61;
    store64(through, (u64)first | PTE_P | PTE_W);
    check("edited-through-alias", load64(V + 0x61000), 1);
    store64(through, (u64)second | PTE_P | PTE_W);
    invlpg(V + 0x61000);
    check("edited-again", load64(V + 0x61000), 2);
    asm volatile("lock btrq $1, (%0)" ::"r"(through) : "memory", "cc");
    invlpg(V + 0x61000);
    expect_page_fault("edited-by-locked", write_8, V + 0x61000, 3, V + 0x61000);
    asm volatile("xchgq %0, (%1)" ::"r"(0ull), "r"(through) : "memory");
    invlpg(V + 0x61000);
    expect_page_fault("edited-by-xchg", read_8, V + 0x61000, 0, V + 0x61000);

    /* Two address spaces that differ in one entry, back and forth. */
    u64 *root = take_page();
    memcpy(root, (void *)(read_cr3() & PTE_ADDRESS), 4096);
    root[V >> 39 & 511] = 0;
    u64 old = read_cr3();
    map(page, (u64)first, PTE_P | PTE_W);
    u64 sum = 0;
    for (int i = 0; i < 10; i++) {
        write_cr3((u64)root);
        if (i == 0)
            map(page, (u64)second, PTE_P | PTE_W);
        sum += load64(page);
        write_cr3(old);
        sum += load64(page) << 8;
    }
    check("two-spaces", sum, 10 * (2 + (1 << 8)));
    write_cr3((u64)root);
    expect_page_fault("other-space", read_8, other, 0, other);
    write_cr3(old);
}

CODE(set_pcide, "movq %cr4, %rax\nbtsq $17, %rax\nmovq %rax, %cr4\nret");
CODE(load_cr3, "movq %rdi, %cr3\nret");
CODE(invalidate_4, "movl $4, %eax\ninvpcid (%rdi), %rax\nret");
CODE(invalidate_0, "xorl %eax, %eax\ninvpcid (%rdi), %rax\nret");

static void invpcid(u64 type, u64 pcid, u64 address)
{
    struct { u64 pcid, address; } what = { pcid, address };
    asm volatile("invpcid %0, %1" ::"m"(what), "r"(type) : "memory");
}

static void test_pcid(void)
{
    if (!has1c(17)) {
        skip("pcid", "not in CPUID");
        return;
    }
    u64 old = read_cr3(), page = V + 0x50000;
    write_cr3(old | 0x18); /* PWT and PCD are legal without PCIDE */
    expect_trap("pcide-with-low-bits", set_pcide, NULL, GP, 0, 0);
    write_cr3(old);
    write_cr4(read_cr4() | 1 << 17);
    u64 *root = take_page();
    memcpy(root, (void *)old, 4096);
    root[V >> 39 & 511] = 0;
    u64 a = old | 1, b = (u64)root | 2, keep = 1ull << 63;
    map(page, (u64)first, PTE_P | PTE_W);
    write_cr3(b);
    map(page, (u64)second, PTE_P | PTE_W);
    u64 sum = 0;
    for (int i = 0; i < 8; i++) {
        write_cr3(a | (i & 1 ? keep : 0));
        sum += load64(page) << 8;
        write_cr3(b | (i & 2 ? keep : 0));
        sum += load64(page);
    }
    check("pcid-switch", sum, 8 * (2 + (1 << 8)));
    check("pcid-cr3-reads-back", read_cr3(), b);
    map(page, (u64)first, PTE_P | PTE_W); /* in b */
    invlpg(page);
    check("pcid-invlpg", load64(page), 1);
    if (!has7b(10)) {
        skip("invpcid", "not in CPUID");
    } else {
        *entry_of(a, page, 1) = (u64)second | PTE_P | PTE_W;
        invpcid(0, 1, page);
        write_cr3(a | keep);
        check("invpcid-address", load64(page), 2);
        *entry_of(b, page, 1) = (u64)second | PTE_P | PTE_W;
        invpcid(1, 2, 0);
        write_cr3(b | keep);
        check("invpcid-context", load64(page), 2);
        *entry_of(a, page, 1) = (u64)first | PTE_P | PTE_W;
        invpcid(3, 0, 0);
        write_cr3(a | keep);
        check("invpcid-all-but-global", load64(page), 1);
        *entry_of(b, page, 1) = (u64)first | PTE_P | PTE_W;
        invpcid(2, 0, 0);
        write_cr3(b | keep);
        check("invpcid-all", load64(page), 1);
        u64 what[2] = { 1, 0 };
        expect_trap("invpcid-bad-type", invalidate_4, what, GP, 0, (u64)invalidate_4 + 5);
        what[0] = 0x1001;
        expect_trap("invpcid-reserved", invalidate_0, what, GP, 0, (u64)invalidate_0 + 2);
        what[0] = 1, what[1] = 0x800000000000ull;
        expect_trap("invpcid-non-canonical", invalidate_0, what, GP, 0, (u64)invalidate_0 + 2);
    }
    /* Without bit 63 the load invalidates its own PCID. */
    write_cr3(a);
    check("pcid-flush-1", load64(page), 1);
    map(page, (u64)second, PTE_P | PTE_W);
    write_cr3(a);
    check("pcid-flush-2", load64(page), 2);
    write_cr3(old);
    write_cr4(read_cr4() & ~(1ull << 17));
    expect_trap("cr3-bit-63-without-pcide", load_cr3, (void *)(old | keep), GP, 0, 0);
}

CODE(write_straddle, "movabsq $0x1122334455667788, %rax\nmovq %rax, (%rdi)\nret");
CODE(add_straddle, "movabsq $0x0101010101010101, %rax\naddq %rax, (%rdi)\nret");

static void test_straddle(void)
{
    u64 page = V + 0x70000;
    map(page, (u64)first, PTE_P | PTE_W);
    map(page + 0x1000, (u64)second, PTE_P | PTE_W); /* neighbours by address, not in memory */
    map(page + 0x2000, 0, 0);
    first[511] = 0, second[0] = 0;
    u64 at = page + 0xffd;
    store64(at, 0x8877665544332211);
    check("straddle-write-low", first[511], 0x3322110000000000);
    check("straddle-write-high", second[0], 0x8877665544);
    check("straddle-read", load64(at), 0x8877665544332211);
    check("straddle-add", catch((void *)add_straddle, (void *)at), NO_TRAP);
    check("straddle-add-value", load64(at), 0x8978675645342312);
    u64 end = page + 0x1ffb;
    store64(page + 0x1ff0, 0), second[511] = 0x7777;
    expect_page_fault("straddle-missing", write_straddle, end, 2, page + 0x2000);
    check("straddle-missing-untouched", second[511], 0x7777);
    expect_page_fault("straddle-missing-add", add_straddle, end, 2, page + 0x2000);
    check("straddle-add-untouched", second[511], 0x7777);
    map(page + 0x2000, (u64)first, PTE_P);
    expect_page_fault("straddle-read-only", write_straddle, end, 3, page + 0x2000);
    check("straddle-read-only-untouched", second[511], 0x7777);
    check("straddle-word", (load32(end) >> 24 & 0xff) + (u64)*(volatile u16 *)(end + 4), (u64)(second[511] >> 48 & 0xff) + (u64)((second[511] >> 56) | (first[0] & 0xff) << 8));
    /* Code that straddles: the second half of the instruction on a page that is not there. */
    map(page + 0x2000, 0, 0);
    invlpg(page + 0x2000);
    memcpy((u8 *)second + 0xffd, a_return, 3);
    u64 fetch = rdmsr(MSR_EFER) & 0x800 ? 0x10 : 0;
    expect_page_fault("straddle-fetch", jump_to, page + 0x1ffd, fetch, page + 0x2000);
    check("straddle-fetch-rip", last_trap.frame.rip, page + 0x1ffd);
    memcpy(first, a_return + 3, 3);
    map(page + 0x2000, (u64)first, PTE_P);
    check("straddle-fetch-whole", catch((void *)(page + 0x1ffd), NULL), NO_TRAP);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    first = take_page(), second = take_page();
    test_access();
    test_faults();
    test_no_execute();
    test_user();
    test_large();
    test_invalidation();
    test_pcid();
    test_straddle();
}
