/* keys: protection keys of user and supervisor pages (Intel SDM (2024-12) Vol. 3A 5.6.2 Protection Keys).
 *
 * RDPKRU and WRPKRU and their faults, what each right takes away and from whom, that a change is felt at the next access,
 * IA32_PKRS, and PKRU as state component 9. Processors have the keys only on request: `--cpu +pku,+pks`. Output: the same on
 * every run and engine.
 */
#include "lib.h"

#define V 0x8000000000ull /* 512 GiB: PML4 entry 1, ours alone */
#define KEY(n) ((u64)(n) << 59)
#define NO_ACCESS(n) (1u << 2 * (n))
#define NO_STORE(n) (2u << 2 * (n))
enum { MSR_PKRS = 0x6e1, CR4_OSXSAVE = 1 << 18, CR4_PKE = 1 << 22, CR4_PKS = 1 << 24, CR0_WP = 1 << 16 };

CODE(rdpkru_code, "movl %edi, %ecx\nrdpkru_at: rdpkru\nret");
LABEL(rdpkru_at);
CODE(wrpkru_code, "movl %edi, %ecx\nmovq %rdi, %rdx\nshrq $32, %rdx\nxorl %eax, %eax\nwrpkru_at: wrpkru\nret");
LABEL(wrpkru_at);
CODE(pkrs_code, "movl $0x6e1, %ecx\nmovl %edi, %eax\nmovq %rdi, %rdx\nshrq $32, %rdx\npkrs_at: wrmsr\nret");
LABEL(pkrs_at);
CODE(read_8, "movq (%rdi), %rax\nret");
CODE(write_8, "movq $0x77, (%rdi)\nret");
CODE(jump_to, "jmp *%rdi");

static u8 area[4096] __attribute__((aligned(64)));

INSTRUCTION void wrpkru(u32 value) { asm volatile("wrpkru" ::"a"(value), "c"(0), "d"(0) : "memory"); }
INSTRUCTION u64 rdpkru(void) { u32 a, d; asm volatile("rdpkru" : "=a"(a), "=d"(d) : "c"(0)); return a | (u64)d << 32; }

static bool passes(void *function, u64 address) { return catch(function, (void *)address) == NO_TRAP; }

static void test_instructions(void)
{
    check("ospke-before", has7c(4), 0);
    expect_trap("rdpkru-off", rdpkru_code, NULL, UD, 0, (u64)rdpkru_at);
    expect_trap("wrpkru-off", wrpkru_code, NULL, UD, 0, (u64)wrpkru_at);
    write_cr4(read_cr4() | CR4_PKE);
    check("ospke-after", has7c(4), 1);
    check("pkru-at-reset", rdpkru(), 0);
    wrpkru(0x89abcdef);
    check("pkru-read-back", rdpkru(), 0x89abcdef);
    wrpkru(0);
    expect_trap("rdpkru-ecx", rdpkru_code, (void *)1, GP, 0, (u64)rdpkru_at);
    expect_trap("wrpkru-ecx", wrpkru_code, (void *)1, GP, 0, (u64)wrpkru_at);
    expect_trap("wrpkru-edx", wrpkru_code, (void *)(1ull << 32), GP, 0, (u64)wrpkru_at);
}

static void test_user_pages(u64 page)
{
    map(V, page, PTE_P | PTE_W | PTE_U | KEY(3));
    map(V + 0x1000, page, PTE_P | PTE_W | PTE_U | KEY(15));
    *(u8 *)(page + 0x800) = 0xc3; /* RET */
    check_true("free", passes(write_8, V) && passes(read_8, V));
    wrpkru(NO_ACCESS(3));
    expect_page_fault("no-access-read", read_8, V, 0x21, V);
    expect_page_fault("no-access-write", write_8, V + 8, 0x23, V + 8);
    check_true("no-access-fetch", passes(jump_to, V + 0x800));
    check_true("another-key", passes(write_8, V + 0x1000));
    wrpkru(NO_STORE(3));
    check_true("no-store-read", passes(read_8, V));
    expect_page_fault("no-store-write", write_8, V, 0x23, V);
    write_cr0(read_cr0() & ~(u64)CR0_WP);
    check_true("no-store-without-wp", passes(write_8, V));
    write_cr0(read_cr0() | CR0_WP);
    expect_page_fault("no-store-with-wp-again", write_8, V, 0x23, V);
    wrpkru(NO_ACCESS(15));
    expect_page_fault("the-last-key", read_8, V + 0x1000, 0x21, V + 0x1000);
    wrpkru(0);
    write_cr4(read_cr4() & ~(u64)CR4_PKE);
    map(V, page, PTE_P | PTE_W | PTE_U | KEY(3));
    check_true("ignored-when-off", passes(write_8, V));
    write_cr4(read_cr4() | CR4_PKE);

    /* The same two instructions over and over, as translated code has them. */
    volatile u64 *word = (u64 *)V;
    u64 sum = 0, faults = 0;
    for (int round = 0; round < 200; round++) {
        wrpkru(0);
        *word = round;
        sum += *word;
        wrpkru(NO_STORE(3));
        sum += *word;
        faults += !passes(write_8, V);
    }
    check("rounds-sum", sum, 199 * 200);
    check("rounds-faults", faults, 200);
    wrpkru(0);
}

static void test_supervisor_pages(u64 page)
{
    map(V + 0x2000, page, PTE_P | PTE_W | KEY(5));
    wrmsr(MSR_PKRS, NO_ACCESS(5));
    check_true("pkrs-off", passes(write_8, V + 0x2000));
    write_cr4(read_cr4() | CR4_PKS);
    expect_page_fault("pkrs-no-access", read_8, V + 0x2000, 0x21, V + 0x2000);
    wrmsr(MSR_PKRS, NO_STORE(5) | NO_ACCESS(3));
    check_true("pkrs-no-store-read", passes(read_8, V + 0x2000));
    expect_page_fault("pkrs-no-store-write", write_8, V + 0x2000, 0x23, V + 0x2000);
    check_true("pkrs-is-not-for-user-pages", passes(write_8, V));
    wrmsr(MSR_PKRS, 0);
    wrpkru(NO_ACCESS(5));
    check_true("pkru-is-not-for-supervisor-pages", passes(write_8, V + 0x2000));
    wrpkru(0);
    expect_trap("pkrs-reserved", pkrs_code, (void *)(1ull << 32), GP, 0, (u64)pkrs_at);
    check("pkrs-read-back", rdmsr(MSR_PKRS), 0);
}

#define BV(at) (*(volatile u64 *)((at) + 512))
#define SAVE(op, at) asm volatile(op " (%0)" ::"r"(at), "a"(1 << 9), "d"(0) : "memory")

static void test_state(void)
{
    if (!has1c(26)) {
        skip("state", "no xsave");
        return;
    }
    write_cr4(read_cr4() | CR4_OSXSAVE);
    struct cpuid leaf = cpuid(0xd, 9);
    check("component-size", leaf.a, 8);
    xsetbv(0, 1 << 9 | 3);
    u8 *place = area + leaf.b;
    wrpkru(NO_STORE(3));
    check("in-use", xgetbv(1) >> 9 & 1, 1);
    SAVE("xsave64", area);
    check("saved-bv", BV(area), 1 << 9);
    check("saved", *(u32 *)place, NO_STORE(3));
    wrpkru(0);
    check("not-in-use", xgetbv(1) >> 9 & 1, 0);
    check_true("store-before-restore", passes(write_8, V));
    SAVE("xrstor64", area);
    check("restored", rdpkru(), NO_STORE(3));
    expect_page_fault("restored-is-felt", write_8, V, 0x23, V);
    BV(area) = 0;
    SAVE("xrstor64", area);
    check("restored-initial", rdpkru(), 0);
    check_true("restored-initial-is-felt", passes(write_8, V));
    if (!(cpuid(0xd, 1).a & 2)) {
        skip("compacted", "no xsavec");
        return;
    }
    memset(area, 0, sizeof area);
    wrpkru(0x1230);
    SAVE("xsavec64", area);
    check("compacted", *(u32 *)(area + 576), 0x1230);
    wrpkru(0);
    SAVE("xrstor64", area);
    check("compacted-restored", rdpkru(), 0x1230);
    wrpkru(0);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    check("cpuid-pku", has7c(3), 1);
    check("cpuid-pks", has7c(31), 1);
    u64 page = (u64)take_page();
    test_instructions();
    test_user_pages(page);
    test_supervisor_pages(page);
    test_state();
    finish();
}
