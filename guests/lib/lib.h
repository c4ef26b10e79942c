/* What our guests share: types, instructions, serial output, traps, page tables and the reporting of results.
 *
 * A guest is a file guests/NAME.c (or a folder guests/NAME/ with main.c) with a function guest_main. It prints lines
 *
 *     ok NAME
 *     FAIL NAME got 0x.. want 0x..
 *     skip NAME why
 *
 * then `PASS` or `FAIL n` as its last line, and powers the machine off. Lines end in CR LF as on a real console.
 * What a guest prints must be the same on every engine and every run, except where its header comment says otherwise.
 */
#ifndef GUESTS_LIB_H
#define GUESTS_LIB_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;
typedef int64_t s64;

/* ---- the guest's own entry, called by lib_main in long mode with traps set up and interrupts off ---- */

struct start_info { /* Xen include/public/arch-x86/hvm/start_info.h, version 1 */
    u32 magic, version, flags, module_count;
    u64 modules, command_line, rsdp, memory_map;
    u32 memory_map_entries, reserved;
};
struct memory_map_entry {
    u64 address, size;
    u32 type, reserved;
};
void guest_main(const struct start_info *info);
extern u32 came_by_pvh;
extern const char *command_line;

/* ---- output and results ---- */

void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* %c %s %d %u %x %lx %lu %p, widths, 0, - */
void check(const char *name, u64 got, u64 want);
void check_true(const char *name, bool holds);
void skip(const char *name, const char *why);
void finish(void) __attribute__((noreturn)); /* print PASS or FAIL n, power off */
void power_off(void) __attribute__((noreturn));
extern unsigned failures;

void *memset(void *at, int byte, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);
bool starts_with(const char *text, const char *prefix);
u64 digest(u64 before, u64 value); /* FNV-1a over the eight bytes of value */
#define DIGEST_START 0xcbf29ce484222325ull

/* ---- traps ---- */

struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};
struct trap_record {
    struct frame frame;
    u64 cr2;
    u64 handler_rsp; /* the stack that the handler ran on */
    u64 count;
};
struct user_state {
    u64 ss, rsp, rflags, cs, rip, rax, rbx, rcx, rdx, rsi, rdi;
};
#define NO_TRAP 256
extern struct trap_record last_trap;
extern u64 recover_rsp;
typedef bool (*trap_handler)(struct frame *); /* true: handled, go on; false: treat as a trap to catch */
extern trap_handler trap_handlers[256];
extern u8 trap_stubs[256][16];

u64 catch(void (*function)(void *), void *argument);
void enter_user(void *state);
/* Run `rip` at CPL 3 until it traps (int $0x80 is the polite way); returns the vector. */
u64 run_user(u64 rip, u64 rsp, u64 cs, u64 rflags, struct user_state *registers);
/* Report `ok` when function(argument) traps with this vector, error code and (unless 0) saved rip. */
void expect_trap(const char *name, void *function, void *argument, u64 vector, u64 error, u64 rip);
/* The same for the page fault of an access to `address`. */
void expect_page_fault(const char *name, void *function, u64 address, u64 error, u64 cr2);
/* The last trap, whoever ran into it, against what it should have been. */
void check_trap(const char *name, u64 got_vector, u64 vector, u64 error, u64 rip);
/* Machine code by name, for functions whose every byte matters: rdi is the argument. */
#define CODE(name, text) \
    asm(".pushsection .text\n.balign 16\n.globl " #name "\n" #name ":\n" text "\n.popsection"); \
    extern u8 name[]
#define LABEL(name) extern u8 name[]
void set_gate(unsigned vector, void *handler, unsigned ist, unsigned dpl, unsigned type);

enum { GATE_INTERRUPT = 14, GATE_TRAP = 15 };
enum { DE = 0, DB, NMI, BP, OF, BR, UD, NM, DF, TS = 10, NP, SS, GP, PF, MF = 16, AC, MC, XM };
enum { KERNEL_CS32 = 0x08, KERNEL_CS = 0x10, KERNEL_DS = 0x18, USER_CS32 = 0x23, USER_DS = 0x2b, USER_CS = 0x33, TSS_SELECTOR = 0x38 };

struct tss {
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3, io_map;
    u8 io_bits[8193];
} __attribute__((packed));
extern struct tss tss;
extern u64 gdt[];
extern u8 user_stack[8192], ist_stacks[7][4096], trap_stack[16384];

/* ---- interrupt controllers ---- */

void pic_start(void); /* both PICs at vectors 0x20-0x2f, all lines masked; the local APIC, if any, on and passing them on */
static inline volatile u32 *apic(u32 offset) { return (volatile u32 *)(u64)(0xfee00000u + offset); }
enum { APIC_ID = 0x20, APIC_VERSION = 0x30, APIC_TPR = 0x80, APIC_EOI = 0xb0, APIC_SVR = 0xf0, APIC_ISR = 0x100, APIC_TMR = 0x180,
       APIC_IRR = 0x200, APIC_ICR = 0x300, APIC_ICR_HIGH = 0x310, APIC_LVT_TIMER = 0x320, APIC_LINT0 = 0x350, APIC_LINT1 = 0x360,
       APIC_INITIAL = 0x380, APIC_CURRENT = 0x390, APIC_DIVIDE = 0x3e0 };

/* ---- page tables: identity mapped 0..4 GiB at start; below are tools for experiments ---- */

#define PTE_P 0x1ull
#define PTE_W 0x2ull
#define PTE_U 0x4ull
#define PTE_PWT 0x8ull
#define PTE_PCD 0x10ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_PS 0x80ull
#define PTE_G 0x100ull
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS 0x000ffffffffff000ull
extern u64 boot_pml4[512], boot_pdpt[512], boot_pd[2048];
void *take_page(void);                           /* a zeroed 4 KiB page, never given back */
u64 *entry_of(u64 root, u64 address, int level); /* the entry at level 1..4, making tables on the way (P|W|U) */
void map(u64 address, u64 physical, u64 flags);  /* a 4 KiB page in the current tables; no invlpg */
void allow_user(void);                           /* make 0..4 GiB user-accessible (for CPL 3 experiments) */

/* ---- instructions ---- */

#define INSTRUCTION static inline __attribute__((always_inline))
INSTRUCTION void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
INSTRUCTION void out16(u16 port, u16 value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
INSTRUCTION void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
INSTRUCTION u8 in8(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
INSTRUCTION u16 in16(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
INSTRUCTION u32 in32(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
struct cpuid { u32 a, b, c, d; };
INSTRUCTION struct cpuid cpuid(u32 leaf, u32 sub)
{
    struct cpuid r;
    asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(sub));
    return r;
}
INSTRUCTION u64 rdmsr(u32 index) { u32 a, d; asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(index)); return a | (u64)d << 32; }
INSTRUCTION void wrmsr(u32 index, u64 value) { asm volatile("wrmsr" ::"a"((u32)value), "d"((u32)(value >> 32)), "c"(index) : "memory"); }
INSTRUCTION u64 rdtsc(void) { u32 a, d; asm volatile("rdtsc" : "=a"(a), "=d"(d)); return a | (u64)d << 32; }
#define CONTROL_REGISTER(n) \
    INSTRUCTION u64 read_cr##n(void) { u64 v; asm volatile("mov %%cr" #n ", %0" : "=r"(v)::"memory"); return v; } \
    INSTRUCTION void write_cr##n(u64 v) { asm volatile("mov %0, %%cr" #n ::"r"(v) : "memory"); }
CONTROL_REGISTER(0)
CONTROL_REGISTER(2)
CONTROL_REGISTER(3)
CONTROL_REGISTER(4)
CONTROL_REGISTER(8)
#define DEBUG_REGISTER(n) \
    INSTRUCTION u64 read_dr##n(void) { u64 v; asm volatile("mov %%dr" #n ", %0" : "=r"(v)::"memory"); return v; } \
    INSTRUCTION void write_dr##n(u64 v) { asm volatile("mov %0, %%dr" #n ::"r"(v) : "memory"); }
DEBUG_REGISTER(0)
DEBUG_REGISTER(1)
DEBUG_REGISTER(2)
DEBUG_REGISTER(3)
DEBUG_REGISTER(6)
DEBUG_REGISTER(7)
INSTRUCTION void invlpg(u64 address) { asm volatile("invlpg (%0)" ::"r"(address) : "memory"); }
INSTRUCTION u64 read_flags(void) { u64 v; asm volatile("pushfq; pop %0" : "=r"(v)::"memory"); return v; }
INSTRUCTION void write_flags(u64 v) { asm volatile("push %0; popfq" ::"r"(v) : "memory", "cc"); }
INSTRUCTION u64 xgetbv(u32 i) { u32 a, d; asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(i)); return a | (u64)d << 32; }
INSTRUCTION void xsetbv(u32 i, u64 v) { asm volatile("xsetbv" ::"a"((u32)v), "d"((u32)(v >> 32)), "c"(i) : "memory"); }
INSTRUCTION u32 load32(u64 at) { u32 v; asm volatile("movl (%1), %0" : "=r"(v) : "r"(at) : "memory"); return v; }
INSTRUCTION u64 load64(u64 at) { u64 v; asm volatile("movq (%1), %0" : "=r"(v) : "r"(at) : "memory"); return v; }
INSTRUCTION void store32(u64 at, u32 v) { asm volatile("movl %0, (%1)" ::"r"(v), "r"(at) : "memory"); }
INSTRUCTION void store64(u64 at, u64 v) { asm volatile("movq %0, (%1)" ::"r"(v), "r"(at) : "memory"); }
#define sti() asm volatile("sti" ::: "memory")
#define cli() asm volatile("cli" ::: "memory")
#define pause() asm volatile("pause" ::: "memory")
#define sti_hlt() asm volatile("sti; hlt" ::: "memory")

/* CPUID feature tests, by leaf, register and bit. */
INSTRUCTION bool has1c(int bit) { return cpuid(1, 0).c >> bit & 1; }
INSTRUCTION bool has1d(int bit) { return cpuid(1, 0).d >> bit & 1; }
INSTRUCTION bool has7b(int bit) { return cpuid(0, 0).a >= 7 && (cpuid(7, 0).b >> bit & 1); }
INSTRUCTION bool has7c(int bit) { return cpuid(0, 0).a >= 7 && (cpuid(7, 0).c >> bit & 1); }
INSTRUCTION bool has_ext_c(int bit) { return cpuid(0x80000001, 0).c >> bit & 1; }
INSTRUCTION bool has_ext_d(int bit) { return cpuid(0x80000001, 0).d >> bit & 1; }
bool is_intel(void);
bool under_qemu(void); /* QEMU's TCG: lax where the manual wants a fault, so a few checks would not survive there */

enum { FLAG_CF = 1, FLAG_PF = 4, FLAG_AF = 0x10, FLAG_ZF = 0x40, FLAG_SF = 0x80, FLAG_TF = 0x100, FLAG_IF = 0x200,
       FLAG_DF = 0x400, FLAG_OF = 0x800, FLAG_NT = 0x4000, FLAG_RF = 0x10000, FLAG_AC = 0x40000, FLAG_ID = 0x200000 };
enum { MSR_APIC_BASE = 0x1b, MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_TSC_DEADLINE = 0x6e0 };
#define MSR_EFER 0xc0000080u
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u

#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#endif
