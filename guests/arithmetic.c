/* arithmetic: integer instructions and the flags they leave, at every size and in every operand form.
 *
 * Each group (an instruction, a size, a form) runs over all pairs of the interesting values below with CF clear and set;
 * results and defined flags go into a digest. The wanted digests in arithmetic_digests.h come from the bare processor:
 * `guests/build.py --native arithmetic --append print` prints them as the header's lines.
 *
 * To find which case of a failing group differs, give `case=GROUP` on the command line: every case of it is printed, and
 * the same from the native program can be compared line by line.
 *
 * HOSTED: also a Linux program.
 * Output: the same on every run and engine. Flags that the manual leaves undefined are masked out.
 */
#include "lib.h"

static const struct wanted {
    const char *name;
    u64 digest;
} wanted[] = {
#include "arithmetic_digests.h"
};

static const u64 values[] = {
    0, 1, 2, 3, 7, 0x0f, 0x10, 0x1f, 0x20, 0x3f, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000,
    0xffffffff, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff, 0x123456789abcdef0, 0xfedcba9876543210,
    0x5555555555555555, 0xaaaaaaaaaaaaaaaa,
};

#define ALL (FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF)
#define LOGIC (ALL & ~FLAG_AF)

struct operands { /* in: a, b, c, flags; out: the same after the instruction */
    u64 a, b, c, flags;
};
typedef void (*operation)(struct operands *);

/* One instruction on rax (a), rdx (b), rcx (c); memory forms use what rsi points to, a copy of a or b. */
#define OPERATION(name, code) \
    static __attribute__((noinline)) void name(struct operands *o) \
    { \
        u64 a = o->a, b = o->b, c = o->c, f = o->flags; \
        u64 memory[2] = { a, b }; \
        asm volatile("push %[f]; popfq; " code "; pushfq; pop %[f]" \
                     : "+a"(a), "+d"(b), "+c"(c), [f] "+r"(f), "+m"(memory) : "S"(memory) : "cc", "memory", "rbx", "rdi"); \
        o->a = a, o->b = b, o->c = c ^ memory[0] ^ (memory[1] << 1 | memory[1] >> 63), o->flags = f; \
    }

#define FOUR_FORMS(op, size, A, D, imm) \
    OPERATION(op##size##_rr, #op " " D ", " A) \
    OPERATION(op##size##_rm, #op " 8(%%rsi), " A) \
    OPERATION(op##size##_mr, #op " " D ", (%%rsi)") \
    OPERATION(op##size##_ri, #op " $" imm ", " A) \
    OPERATION(op##size##_mi, #op SUFFIX##size " $" imm ", (%%rsi)")
#define SUFFIX8 "b"
#define SUFFIX16 "w"
#define SUFFIX32 "l"
#define SUFFIX64 "q"
#define FOUR_SIZES(op) \
    FOUR_FORMS(op, 8, "%%al", "%%dl", "0x85") \
    FOUR_FORMS(op, 16, "%%ax", "%%dx", "0x7ffe") \
    FOUR_FORMS(op, 32, "%%eax", "%%edx", "0x7ffffff3") \
    FOUR_FORMS(op, 64, "%%rax", "%%rdx", "-5")
FOUR_SIZES(add)
FOUR_SIZES(adc)
FOUR_SIZES(sub)
FOUR_SIZES(sbb)
FOUR_SIZES(cmp)
FOUR_SIZES(and)
FOUR_SIZES(or)
FOUR_SIZES(xor)
#undef FOUR_FORMS
#define FOUR_FORMS(op, size, A, D, imm) \
    OPERATION(op##size##_rr, #op " " D ", " A) \
    OPERATION(op##size##_mr, #op " " D ", (%%rsi)") \
    OPERATION(op##size##_mi, #op SUFFIX##size " $" imm ", (%%rsi)")
FOUR_SIZES(test)

/* High byte registers: only without REX. */
OPERATION(add_ah_dl, "add %%dl, %%ah")
OPERATION(sub_dh_ah, "sub %%dh, %%ah")
OPERATION(xor_ah_m, "xor 8(%%rsi), %%ah")
OPERATION(mov_ah_dh, "mov %%dh, %%ah")
OPERATION(movzx_ah, "movzbl %%ah, %%edx")
OPERATION(sil_dil, "mov %%rsi, %%rbx; mov %%rax, %%rsi; mov %%rdx, %%rdi; add %%dil, %%sil; mov %%rsi, %%rax; mov %%rbx, %%rsi; mov $0, %%edi; mov $0, %%ebx")

#define ONE(op, size, A) \
    OPERATION(op##size##_r, #op " " A) \
    OPERATION(op##size##_m, #op SUFFIX##size " (%%rsi)") \
    OPERATION(lock_##op##size, "lock " #op SUFFIX##size " (%%rsi)")
#define ONE_SIZES(op) ONE(op, 8, "%%al") ONE(op, 16, "%%ax") ONE(op, 32, "%%eax") ONE(op, 64, "%%rax")
ONE_SIZES(inc)
ONE_SIZES(dec)
ONE_SIZES(neg)
ONE_SIZES(not)

#define SHIFT(op, size, A) \
    OPERATION(op##size##_cl, #op " %%cl, " A) \
    OPERATION(op##size##_1, #op " $1, " A) \
    OPERATION(op##size##_i, #op " $5, " A) \
    OPERATION(op##size##_m, #op SUFFIX##size " %%cl, (%%rsi)")
#define SHIFT_SIZES(op) SHIFT(op, 8, "%%al") SHIFT(op, 16, "%%ax") SHIFT(op, 32, "%%eax") SHIFT(op, 64, "%%rax")
SHIFT_SIZES(shl)
SHIFT_SIZES(shr)
SHIFT_SIZES(sar)
SHIFT_SIZES(rol)
SHIFT_SIZES(ror)
SHIFT_SIZES(rcl)
SHIFT_SIZES(rcr)

#define DOUBLE(op, size, A, D) \
    OPERATION(op##size##_cl, #op " %%cl, " D ", " A) \
    OPERATION(op##size##_i, #op " $5, " D ", " A) \
    OPERATION(op##size##_m, #op " %%cl, " D ", (%%rsi)")
DOUBLE(shld, 32, "%%eax", "%%edx")
DOUBLE(shld, 64, "%%rax", "%%rdx")
DOUBLE(shrd, 32, "%%eax", "%%edx")
DOUBLE(shrd, 64, "%%rax", "%%rdx")
OPERATION(shld16_i, "shld $5, %%dx, %%ax")
OPERATION(shrd16_i, "shrd $5, %%dx, %%ax")

#define MULTIPLY(size, A, D) \
    OPERATION(mul##size, "mul " D) \
    OPERATION(imul##size, "imul " D) \
    OPERATION(mul##size##_m, "mul" SUFFIX##size " 8(%%rsi)")
MULTIPLY(8, "%%al", "%%dl")
MULTIPLY(16, "%%ax", "%%dx")
MULTIPLY(32, "%%eax", "%%edx")
MULTIPLY(64, "%%rax", "%%rdx")
OPERATION(imul2_16, "imul %%dx, %%ax")
OPERATION(imul2_32, "imul %%edx, %%eax")
OPERATION(imul2_64, "imul 8(%%rsi), %%rax")
OPERATION(imul3_32, "imul $-77, %%edx, %%eax")
OPERATION(imul3_64, "imul $0x12345678, %%rdx, %%rax")

/* Divisions that cannot overflow: the high half is below the divisor (or the sign of the low half), divisor never 0. */
OPERATION(div8, "movzbl %%al, %%eax; orb $1, %%dl; div %%dl")
OPERATION(div16, "mov %%edx, %%ebx; orl $1, %%ebx; xor %%edx, %%edx; div %%bx; mov $0, %%ebx")
OPERATION(div32, "mov %%edx, %%ebx; orl $1, %%ebx; mov %%ebx, %%edx; shr $1, %%edx; div %%ebx; mov $0, %%ebx")
OPERATION(div64, "mov %%rdx, %%rbx; orq $1, %%rbx; mov %%rbx, %%rdx; shr $1, %%rdx; div %%rbx; mov $0, %%ebx")
OPERATION(idiv8, "movsbw %%al, %%ax; orb $3, %%dl; and $0x7f, %%dl; idiv %%dl")
OPERATION(idiv32, "mov %%edx, %%ebx; orl $3, %%ebx; and $0x7fffffff, %%ebx; cltd; idiv %%ebx; mov $0, %%ebx")
OPERATION(idiv64, "mov %%rdx, %%rbx; orq $3, %%rbx; btr $63, %%rbx; cqto; idiv %%rbx; mov $0, %%ebx")

#define BITS(op) \
    OPERATION(op##16_r, #op " %%dx, %%ax") \
    OPERATION(op##32_r, #op " %%edx, %%eax") \
    OPERATION(op##64_r, #op " %%rdx, %%rax") \
    OPERATION(op##32_i, #op " $13, %%eax") \
    OPERATION(op##64_i, #op " $47, %%rax") \
    OPERATION(op##32_m, "and $63, %%edx; " #op " %%edx, (%%rsi)") \
    OPERATION(op##64_m, "and $127, %%edx; " #op " %%rdx, (%%rsi)") \
    OPERATION(op##64_neg, "or $-64, %%rdx; " #op " %%rdx, 8(%%rsi)") \
    OPERATION(op##32_mi, #op "l $21, (%%rsi)")
BITS(bt)
BITS(bts)
BITS(btr)
BITS(btc)
OPERATION(lock_bts, "and $127, %%edx; lock bts %%rdx, (%%rsi)")
OPERATION(bsf32, "or $0x1000, %%edx; bsf %%edx, %%eax")
OPERATION(bsf64, "btsq $44, %%rdx; bsf %%rdx, %%rax")
OPERATION(bsr32, "or $1, %%edx; bsr %%edx, %%eax")
OPERATION(bsr64, "or $1, %%rdx; bsr %%rdx, %%rax")
OPERATION(bsf64_zero, "xor %%edx, %%edx; bsf %%rdx, %%rax; mov $0, %%eax")
OPERATION(popcnt32, "popcnt %%edx, %%eax")
OPERATION(popcnt64, "popcnt 8(%%rsi), %%rax")
OPERATION(bswap32, "bswap %%eax")
OPERATION(bswap64, "bswap %%rax")

OPERATION(xadd8, "xadd %%dl, %%al")
OPERATION(xadd32, "xadd %%edx, %%eax")
OPERATION(xadd64_m, "xadd %%rdx, (%%rsi)")
OPERATION(lock_xadd16, "lock xadd %%dx, (%%rsi)")
OPERATION(lock_xadd64, "lock xadd %%rdx, (%%rsi)")
OPERATION(xchg8, "xchg %%dl, %%al")
OPERATION(xchg32, "xchg %%edx, %%eax")
OPERATION(xchg64_m, "xchg %%rdx, (%%rsi)")
OPERATION(cmpxchg8, "cmpxchg %%cl, %%dl")
OPERATION(cmpxchg32, "cmpxchg %%ecx, %%edx")
OPERATION(cmpxchg32_m, "cmpxchg %%ecx, 8(%%rsi)")
OPERATION(cmpxchg64_m, "lock cmpxchg %%rcx, 8(%%rsi)")
OPERATION(cmpxchg64_equal, "lock cmpxchg %%rcx, (%%rsi)")
OPERATION(cmpxchg8b, "mov $0x11111111, %%ebx; lock cmpxchg8b (%%rsi); mov $0, %%ebx")
OPERATION(lock_add, "lock add %%edx, (%%rsi)")
OPERATION(lock_or, "lock orb $0x18, 3(%%rsi)")
OPERATION(lock_sub, "lock sub %%rdx, (%%rsi)")

OPERATION(movsx8, "movsbq %%dl, %%rax")
OPERATION(movsx16, "movswl %%dx, %%eax")
OPERATION(movsxd, "movslq 8(%%rsi), %%rax")
OPERATION(movzx8, "movzbw 8(%%rsi), %%ax")
OPERATION(movzx16, "movzwq %%dx, %%rax")
OPERATION(mov32_clears, "mov %%edx, %%eax")
OPERATION(cbw, "cbtw")
OPERATION(cwde, "cwtl")
OPERATION(cdqe, "cltq")
OPERATION(cwd, "cwtd")
OPERATION(cdq, "cltd")
OPERATION(cqo, "cqto")
OPERATION(lea, "lea 0x12345(%%rax,%%rdx,4), %%rcx")
OPERATION(lea32, "lea -7(%%eax,%%edx,8), %%ecx")
OPERATION(lahf_sahf, "lahf; add %%edx, %%edx; sahf")
OPERATION(cmc, "cmc")
OPERATION(clc_stc, "clc; stc")

#define CONDITION(cc) \
    OPERATION(set##cc, "cmp %%rdx, %%rax; set" #cc " %%al") \
    OPERATION(cmov##cc, "cmp %%edx, %%eax; cmov" #cc " %%rdx, %%rax") \
    OPERATION(cmov32##cc, "sub %%edx, %%ecx; cmov" #cc " %%edx, %%eax") \
    OPERATION(j##cc, "add %%rdx, %%rcx; mov $0, %%eax; j" #cc " 1f; mov $1, %%eax; 1:")
CONDITION(o) CONDITION(no) CONDITION(b) CONDITION(ae) CONDITION(e) CONDITION(ne) CONDITION(be) CONDITION(a)
CONDITION(s) CONDITION(ns) CONDITION(p) CONDITION(np) CONDITION(l) CONDITION(ge) CONDITION(le) CONDITION(g)
/* Flags must survive what does not write them: moves, loads, stores, lea, not, jumps. */
OPERATION(flags_live, "add %%edx, %%eax; mov (%%rsi), %%rbx; lea 4(%%rbx), %%rdi; mov %%rdi, 8(%%rsi); not %%rbx; movzbl %%bl, %%ebx; jmp 1f; 1: adc %%rbx, %%rcx; mov $0, %%ebx; mov $0, %%edi")
OPERATION(flags_inc, "add %%edx, %%eax; inc %%ecx; adc $0, %%rcx; dec %%ecx; sbb $0, %%rcx")
OPERATION(loop, "and $15, %%ecx; inc %%ecx; xor %%eax, %%eax; 1: add %%rdx, %%rax; loop 1b")
OPERATION(loope, "mov $9, %%ecx; 1: add $3, %%eax; test $0x40, %%al; loope 1b")
OPERATION(jrcxz, "mov $0, %%eax; jrcxz 1f; inc %%eax; 1: jecxz 2f; add $2, %%eax; 2:")
OPERATION(push_pop, "push %%rax; push %%rdx; pushq $-9; pushw %%cx; popw %%dx; popq %%rcx; pop %%rax; pop %%rdx")
OPERATION(push_mem, "pushq (%%rsi); popq 8(%%rsi); push %%rsp; pop %%rbx; sub %%rsp, %%rbx; mov %%rbx, %%rcx; mov $0, %%ebx")
OPERATION(enter_leave, "mov %%rsp, %%rbx; enter $32, $0; mov %%rax, -8(%%rbp); mov -8(%%rbp), %%rcx; leave; sub %%rsp, %%rbx; add %%rbx, %%rcx; mov $0, %%ebx")
OPERATION(call_ret, "call 1f; jmp 2f; 1: add %%rdx, %%rax; ret; 2: lea 3f(%%rip), %%rbx; push %%rbx; ret; ud2; 3: mov $0, %%ebx")
OPERATION(call_indirect, "lea 1f(%%rip), %%rbx; call *%%rbx; jmp 2f; 1: sub %%rdx, %%rax; ret; 2: mov $0, %%ebx")

#define BMI_OPERATIONS(X) \
    X(andn32, "andn %%edx, %%eax, %%ecx") X(andn64, "andn 8(%%rsi), %%rax, %%rcx") \
    X(blsi, "blsi %%rdx, %%rax") X(blsr, "blsr %%edx, %%eax") X(blsmsk, "blsmsk %%rdx, %%rax") \
    X(bextr, "bextr %%rdx, %%rax, %%rcx") X(tzcnt32, "tzcnt %%edx, %%eax") X(tzcnt64, "tzcnt %%rdx, %%rax") \
    X(bzhi, "bzhi %%rdx, %%rax, %%rcx") X(mulx, "mulx %%rax, %%rcx, %%rbx; xor %%ebx, %%ecx; mov $0, %%ebx") \
    X(pdep, "pdep %%rdx, %%rax, %%rcx") X(pext, "pext %%rdx, %%rax, %%rcx") X(rorx, "rorx $13, %%rdx, %%rax") \
    X(sarx, "sarx %%rdx, %%rax, %%rcx") X(shlx, "shlx %%edx, %%eax, %%ecx") X(shrx, "shrx %%rdx, 8(%%rsi), %%rcx")
BMI_OPERATIONS(OPERATION)
OPERATION(lzcnt32, "lzcnt %%edx, %%eax")
OPERATION(lzcnt64, "lzcnt %%rdx, %%rax")
OPERATION(adcx, "adcx %%rdx, %%rax")
OPERATION(adox, "adox 8(%%rsi), %%rax")
OPERATION(movbe32, "movbe 8(%%rsi), %%eax")
OPERATION(movbe64, "movbe %%rax, (%%rsi)")
OPERATION(crc32_8, "crc32b %%dl, %%eax")
OPERATION(crc32_64, "crc32q %%rdx, %%rax")

enum { BASE, POPCNT, BMI1, BMI2, LZCNT, ADX, MOVBE, SSE42 };
static const struct group {
    const char *name;
    operation run;
    u32 flags, needs;
    u64 count_mask; /* not 0: c, the shift count, takes 0..count_mask + 1 instead of a constant */
} groups[] = {
#define G(name, flags) { #name, name, flags, BASE, 0 },
#define G4(op, size, flags) G(op##size##_rr, flags) G(op##size##_rm, flags) G(op##size##_mr, flags) G(op##size##_ri, flags) G(op##size##_mi, flags)
#define G16(op, flags) G4(op, 8, flags) G4(op, 16, flags) G4(op, 32, flags) G4(op, 64, flags)
    G16(add, ALL) G16(adc, ALL) G16(sub, ALL) G16(sbb, ALL) G16(cmp, ALL) G16(and, LOGIC) G16(or, LOGIC) G16(xor, LOGIC)
#define GT(size) G(test##size##_rr, LOGIC) G(test##size##_mr, LOGIC) G(test##size##_mi, LOGIC)
    GT(8) GT(16) GT(32) GT(64)
    G(add_ah_dl, ALL) G(sub_dh_ah, ALL) G(xor_ah_m, LOGIC) G(mov_ah_dh, ALL) G(movzx_ah, ALL) G(sil_dil, ALL)
#define G1(op, size) G(op##size##_r, ALL) G(op##size##_m, ALL) G(lock_##op##size, ALL)
#define G1S(op) G1(op, 8) G1(op, 16) G1(op, 32) G1(op, 64)
    G1S(inc) G1S(dec) G1S(neg) G1S(not)
/* Shifts: AF is undefined, OF too unless the count is 1, CF too when the count passes the width (8 and 16 bit SHL, SHR). */
#define GS(op, size, many, width) { #op #size "_cl", op##size##_cl, many, BASE, width }, G(op##size##_1, LOGIC) G(op##size##_i, many) { #op #size "_m", op##size##_m, many, BASE, width },
#define GSS(op, small, large) GS(op, 8, small, 31) GS(op, 16, small, 31) GS(op, 32, large, 63) GS(op, 64, large, 127)
    GSS(shl, LOGIC & ~(FLAG_OF | FLAG_CF), LOGIC & ~FLAG_OF) GSS(shr, LOGIC & ~(FLAG_OF | FLAG_CF), LOGIC & ~FLAG_OF)
    GSS(sar, LOGIC & ~FLAG_OF, LOGIC & ~FLAG_OF)
    GSS(rol, ALL & ~FLAG_OF, ALL & ~FLAG_OF) GSS(ror, ALL & ~FLAG_OF, ALL & ~FLAG_OF)
    GSS(rcl, ALL & ~FLAG_OF, ALL & ~FLAG_OF) GSS(rcr, ALL & ~FLAG_OF, ALL & ~FLAG_OF)
#define GD(op, size, width) { #op #size "_cl", op##size##_cl, LOGIC & ~FLAG_OF, BASE, width }, G(op##size##_i, LOGIC & ~FLAG_OF) { #op #size "_m", op##size##_m, LOGIC & ~FLAG_OF, BASE, width },
    GD(shld, 32, 63) GD(shld, 64, 127) GD(shrd, 32, 63) GD(shrd, 64, 127) G(shld16_i, LOGIC & ~FLAG_OF) G(shrd16_i, LOGIC & ~FLAG_OF)
#define GM(size) G(mul##size, FLAG_CF | FLAG_OF) G(imul##size, FLAG_CF | FLAG_OF) G(mul##size##_m, FLAG_CF | FLAG_OF)
    GM(8) GM(16) GM(32) GM(64)
    G(imul2_16, FLAG_CF | FLAG_OF) G(imul2_32, FLAG_CF | FLAG_OF) G(imul2_64, FLAG_CF | FLAG_OF) G(imul3_32, FLAG_CF | FLAG_OF) G(imul3_64, FLAG_CF | FLAG_OF)
    G(div8, 0) G(div16, 0) G(div32, 0) G(div64, 0) G(idiv8, 0) G(idiv32, 0) G(idiv64, 0)
/* BT and its kin define CF only, and leave ZF as it was. */
#define GB(op) G(op##16_r, FLAG_CF | FLAG_ZF) G(op##32_r, FLAG_CF | FLAG_ZF) G(op##64_r, FLAG_CF | FLAG_ZF) G(op##32_i, FLAG_CF | FLAG_ZF) G(op##64_i, FLAG_CF | FLAG_ZF) \
    G(op##32_m, FLAG_CF) G(op##64_m, FLAG_CF) G(op##64_neg, FLAG_CF) G(op##32_mi, FLAG_CF | FLAG_ZF)
    GB(bt) GB(bts) GB(btr) GB(btc) G(lock_bts, FLAG_CF)
    G(bsf32, FLAG_ZF) G(bsf64, FLAG_ZF) G(bsr32, FLAG_ZF) G(bsr64, FLAG_ZF) G(bsf64_zero, FLAG_ZF)
    { "popcnt32", popcnt32, ALL, POPCNT, 0 }, { "popcnt64", popcnt64, ALL, POPCNT, 0 }, G(bswap32, ALL) G(bswap64, ALL)
    G(xadd8, ALL) G(xadd32, ALL) G(xadd64_m, ALL) G(lock_xadd16, ALL) G(lock_xadd64, ALL) G(xchg8, ALL) G(xchg32, ALL) G(xchg64_m, ALL)
    G(cmpxchg8, ALL) G(cmpxchg32, ALL) G(cmpxchg32_m, ALL) G(cmpxchg64_m, ALL) G(cmpxchg64_equal, ALL) G(cmpxchg8b, ALL)
    G(lock_add, ALL) G(lock_or, LOGIC) G(lock_sub, ALL)
    G(movsx8, ALL) G(movsx16, ALL) G(movsxd, ALL) G(movzx8, ALL) G(movzx16, ALL) G(mov32_clears, ALL) G(cbw, ALL) G(cwde, ALL) G(cdqe, ALL)
    G(cwd, ALL) G(cdq, ALL) G(cqo, ALL) G(lea, ALL) G(lea32, ALL) G(lahf_sahf, ALL) G(cmc, ALL) G(clc_stc, ALL)
#define GC(cc) G(set##cc, ALL) G(cmov##cc, ALL) G(cmov32##cc, ALL) G(j##cc, ALL)
    GC(o) GC(no) GC(b) GC(ae) GC(e) GC(ne) GC(be) GC(a) GC(s) GC(ns) GC(p) GC(np) GC(l) GC(ge) GC(le) GC(g)
    G(flags_live, ALL) G(flags_inc, ALL) G(loop, ALL) G(loope, LOGIC) G(jrcxz, ALL) G(push_pop, ALL) G(push_mem, 0) G(enter_leave, 0)
    G(call_ret, ALL) G(call_indirect, ALL)
    { "andn32", andn32, LOGIC & ~FLAG_PF, BMI1, 0 }, { "andn64", andn64, LOGIC & ~FLAG_PF, BMI1, 0 },
    { "blsi", blsi, LOGIC & ~FLAG_PF, BMI1, 0 }, { "blsr", blsr, LOGIC & ~FLAG_PF, BMI1, 0 },
    { "blsmsk", blsmsk, LOGIC & ~FLAG_PF, BMI1, 0 }, { "bextr", bextr, FLAG_CF | FLAG_ZF | FLAG_OF, BMI1, 0 },
    { "tzcnt32", tzcnt32, FLAG_CF | FLAG_ZF, BMI1, 0 }, { "tzcnt64", tzcnt64, FLAG_CF | FLAG_ZF, BMI1, 0 },
    { "bzhi", bzhi, LOGIC & ~FLAG_PF, BMI2, 0 }, { "mulx", mulx, 0, BMI2, 0 }, { "pdep", pdep, ALL, BMI2, 0 }, { "pext", pext, ALL, BMI2, 0 },
    { "rorx", rorx, ALL, BMI2, 0 }, { "sarx", sarx, ALL, BMI2, 0 }, { "shlx", shlx, ALL, BMI2, 0 }, { "shrx", shrx, ALL, BMI2, 0 },
    { "lzcnt32", lzcnt32, FLAG_CF | FLAG_ZF, LZCNT, 0 }, { "lzcnt64", lzcnt64, FLAG_CF | FLAG_ZF, LZCNT, 0 },
    { "adcx", adcx, ALL, ADX, 0 }, { "adox", adox, ALL, ADX, 0 }, { "movbe32", movbe32, ALL, MOVBE, 0 }, { "movbe64", movbe64, ALL, MOVBE, 0 },
    { "crc32_8", crc32_8, ALL, SSE42, 0 }, { "crc32_64", crc32_64, ALL, SSE42, 0 },
};

static bool present(u32 needs)
{
    switch (needs) {
    case POPCNT: return has1c(23);
    case BMI1: return has7b(3);
    case BMI2: return has7b(8);
    case LZCNT: return has_ext_c(5);
    case ADX: return has7b(19);
    case MOVBE: return has1c(22);
    case SSE42: return has1c(20);
    default: return true;
    }
}

static u64 run_one(const struct group *group, u64 sum, u64 a, u64 b, u64 c, u64 flags, bool print)
{
    struct operands o = { a, b, c, flags };
    group->run(&o);
    u64 mask = group->flags;
    /* A count of zero after masking leaves every flag alone, a count of one defines OF: neither matters to the mask,
     * which leaves out what is undefined for any count. */
    o.flags &= mask;
    if (print)
        say("%s %016lx %016lx %016lx %03lx -> %016lx %016lx %016lx %03lx\n", group->name, a, b, c, flags, o.a, o.b, o.c, o.flags);
    sum = digest(sum, o.a);
    sum = digest(sum, o.b);
    sum = digest(sum, o.c);
    return digest(sum, o.flags);
}

static u64 run_group(const struct group *group, bool print)
{
    u64 sum = DIGEST_START;
    static const u32 before[] = { 2, 2 | FLAG_CF, 2 | ALL };
    for (size_t f = 0; f < ARRAY_LENGTH(before); f++) {
        u32 flags = before[f];
        if (group->count_mask) {
            for (size_t i = 0; i < ARRAY_LENGTH(values); i++)
                for (u64 count = 0; count <= group->count_mask; count++)
                    sum = run_one(group, sum, values[i], values[(i * 7 + 3) % ARRAY_LENGTH(values)], count, flags, print);
        } else {
            for (size_t i = 0; i < ARRAY_LENGTH(values); i++)
                for (size_t j = 0; j < ARRAY_LENGTH(values); j++)
                    sum = run_one(group, sum, values[i], values[j], values[(i + j) % ARRAY_LENGTH(values)], flags, print);
        }
    }
    return sum;
}

void guest_main(const struct start_info *info)
{
    (void)info;
    bool print_header = starts_with(command_line, "print");
    const char *one = starts_with(command_line, "case=") ? command_line + 5 : NULL;
    for (size_t i = 0; i < ARRAY_LENGTH(groups); i++) {
        const struct group *group = &groups[i];
        if (one && !(starts_with(one, group->name) && starts_with(group->name, one)))
            continue;
        if (!present(group->needs)) {
            skip(group->name, "not in CPUID");
            continue;
        }
        u64 sum = run_group(group, one != NULL);
        if (print_header) {
            say("{ \"%s\", 0x%016lx },\n", group->name, sum);
            continue;
        }
        u64 want = 0;
        for (size_t k = 0; k < ARRAY_LENGTH(wanted); k++)
            if (starts_with(wanted[k].name, group->name) && starts_with(group->name, wanted[k].name))
                want = wanted[k].digest;
        check(group->name, sum, want);
    }
}
