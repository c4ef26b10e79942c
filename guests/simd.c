/* simd: x87, MMX, SSE to SSE4.2, AES, PCLMULQDQ, SHA, F16C, AVX, AVX2, FMA: results and MXCSR or status flags.
 *
 * Each instruction runs over pairs of interesting vectors (numbers, denormals, infinities, NaNs, all ones, patterns), from
 * registers and from memory, and the results go into a digest; the wanted digests in simd_digests.h come from the bare
 * processor: `guests/build.py --native simd --append print`. `case=GROUP` prints each case of a group.
 *
 * HOSTED: also a Linux program. Groups that CPUID does not offer are skipped. Approximations (RCPPS, RSQRTPS, x87
 * transcendentals) are left out: processors differ in them. Output: the same on every run and engine.
 */
#include "lib.h"

static const struct wanted {
    const char *name;
    u64 results, status; /* status: MXCSR, or the x87 status word */
} wanted[] = {
#include "simd_digests.h"
};

typedef struct { u64 q[4]; } vector __attribute__((aligned(32)));

static const vector inputs[] = {
    { { 0, 0, 0, 0 } },
    { { 0x3ff0000000000000, 0x4000000000000000, 0xbff8000000000000, 0x4059000000000000 } }, /* 1 2 -1.5 100 */
    { { 0x3f80000040000000, 0xc040000042c80000, 0x3e8000003f000000, 0xbf80000047c35000 } }, /* floats */
    { { 0x7ff0000000000000, 0xfff0000000000000, 0x7ff8000000000000, 0x7ff0000000000001 } }, /* inf -inf qnan snan */
    { { 0x7f800000ff800000, 0x7fc000007f800001, 0x00000001007fffff, 0x8000000000800000 } }, /* the same as floats, denormals */
    { { 0x0000000000000001, 0x000fffffffffffff, 0x8000000000000000, 0x0010000000000000 } },
    { { 0x7fefffffffffffff, 0xffefffffffffffff, 0x41dfffffffc00000, 0xc1e0000000000000 } }, /* largest, int limits */
    { { 0x7f7fffffff7fffff, 0x4effffff4f000000, 0x5f0000005effffff, 0xcf000000cf000001 } },
    { { 0x0102030405060708, 0x090a0b0c0d0e0f10, 0x1112131415161718, 0x191a1b1c1d1e1f20 } },
    { { 0x8080808080808080, 0x7f7f7f7f7f7f7f7f, 0x8000800080008000, 0x7fff7fff7fff7fff } },
    { { 0xffffffffffffffff, 0xffffffffffffffff, 0xffffffffffffffff, 0xffffffffffffffff } },
    { { 0x123456789abcdef0, 0x0fedcba987654321, 0xdeadbeefcafebabe, 0x5555aaaa3333cccc } },
    { { 0x400921fb54442d18, 0x4005bf0a8b145769, 0x3fb999999999999a, 0xc08f400000000000 } },
};

struct simd { vector a, b, c, r; u64 g; u32 mxcsr; };
typedef void (*operation)(struct simd *);

#ifdef HOSTED
#define CLOBBER , "xmm0", "xmm1", "xmm2", "xmm3"
#else
#define CLOBBER
#endif

/* xmm0 = a, xmm1 = b, xmm2 = c; rsi -> a, b at 32(%rsi), c at 64(%rsi); rax = g. The result is xmm0 and rax. */
#define SSE(name, code) \
    static __attribute__((noinline)) void name(struct simd *s) \
    { \
        u64 g = s->g; \
        asm volatile("ldmxcsr %[m]; movups (%[s]), %%xmm0; movups 32(%[s]), %%xmm1; movups 64(%[s]), %%xmm2; " code \
                     "; movups %%xmm0, 96(%[s]); stmxcsr %[m]" \
                     : "+a"(g), [m] "+m"(s->mxcsr), "+m"(*s) : [s] "S"(s) : "memory", "cc", "rcx", "rdx", "rdi" CLOBBER); \
        s->g = g; \
    }
#define AVX(name, code) \
    static __attribute__((noinline)) void name(struct simd *s) \
    { \
        u64 g = s->g; \
        asm volatile("ldmxcsr %[m]; vmovups (%[s]), %%ymm0; vmovups 32(%[s]), %%ymm1; vmovups 64(%[s]), %%ymm2; " code \
                     "; vmovups %%ymm0, 96(%[s]); stmxcsr %[m]; vzeroupper" \
                     : "+a"(g), [m] "+m"(s->mxcsr), "+m"(*s) : [s] "S"(s) : "memory", "cc", "rcx", "rdx", "rdi" CLOBBER); \
        s->g = g; \
    }
/* st(0) = a (double), st(1) = b; the result is st(0) as an 80-bit number, and the status word. */
#define X87(name, code) \
    static __attribute__((noinline)) void name(struct simd *s) \
    { \
        u64 g = s->g; \
        asm volatile("fninit; fldl 32(%[s]); fldl (%[s]); xorl %%eax, %%eax; " code "; fnstsw %%ax; fstpt 96(%[s]); fninit" \
                     : "+a"(g), "+m"(*s) : [s] "S"(s) : "memory", "cc", "rcx", "rdx", "rdi"); \
        s->g = g; \
    }

#define LIST_SSE2(X) \
    X(addps, "addps %%xmm1, %%xmm0") X(addpd, "addpd 32(%[s]), %%xmm0") X(addss, "addss %%xmm1, %%xmm0") X(addsd, "addsd 32(%[s]), %%xmm0") \
    X(subps, "subps 32(%[s]), %%xmm0") X(subpd, "subpd %%xmm1, %%xmm0") X(subss, "subss %%xmm1, %%xmm0") X(subsd, "subsd %%xmm1, %%xmm0") \
    X(mulps, "mulps %%xmm1, %%xmm0") X(mulpd, "mulpd %%xmm1, %%xmm0") X(mulss, "mulss 32(%[s]), %%xmm0") X(mulsd, "mulsd %%xmm1, %%xmm0") \
    X(divps, "divps %%xmm1, %%xmm0") X(divpd, "divpd %%xmm1, %%xmm0") X(divss, "divss %%xmm1, %%xmm0") X(divsd, "divsd %%xmm1, %%xmm0") \
    X(sqrtps, "sqrtps %%xmm1, %%xmm0") X(sqrtpd, "sqrtpd %%xmm1, %%xmm0") X(sqrtss, "sqrtss %%xmm1, %%xmm0") X(sqrtsd, "sqrtsd %%xmm1, %%xmm0") \
    X(minps, "minps %%xmm1, %%xmm0") X(maxpd, "maxpd %%xmm1, %%xmm0") X(minsd, "minsd %%xmm1, %%xmm0") X(maxss, "maxss %%xmm1, %%xmm0") \
    X(cmpps, "cmpltps %%xmm1, %%xmm0") X(cmppd, "cmpunordpd %%xmm1, %%xmm0") X(cmpss, "cmpneqss %%xmm1, %%xmm0") X(cmpsd, "cmpnlesd %%xmm1, %%xmm0") \
    X(comiss, "comiss %%xmm1, %%xmm0; pushfq; popq %%rax") X(ucomisd, "ucomisd 32(%[s]), %%xmm0; pushfq; popq %%rax") \
    X(andps, "andps %%xmm1, %%xmm0") X(andnpd, "andnpd %%xmm1, %%xmm0") X(orps, "orps %%xmm1, %%xmm0") X(xorpd, "xorpd %%xmm1, %%xmm0") \
    X(shufps, "shufps $0x1b, %%xmm1, %%xmm0") X(shufpd, "shufpd $1, %%xmm1, %%xmm0") X(unpcklps, "unpcklps %%xmm1, %%xmm0") X(unpckhpd, "unpckhpd %%xmm1, %%xmm0") \
    X(cvtps2pd, "cvtps2pd %%xmm1, %%xmm0") X(cvtpd2ps, "cvtpd2ps %%xmm1, %%xmm0") X(cvtss2sd, "cvtss2sd %%xmm1, %%xmm0") X(cvtsd2ss, "cvtsd2ss %%xmm1, %%xmm0") \
    X(cvtdq2ps, "cvtdq2ps %%xmm1, %%xmm0") X(cvtdq2pd, "cvtdq2pd %%xmm1, %%xmm0") X(cvtps2dq, "cvtps2dq %%xmm1, %%xmm0") X(cvttps2dq, "cvttps2dq %%xmm1, %%xmm0") \
    X(cvtpd2dq, "cvtpd2dq %%xmm1, %%xmm0") X(cvttpd2dq, "cvttpd2dq %%xmm1, %%xmm0") \
    X(cvtsi2sd, "cvtsi2sdq 32(%[s]), %%xmm0") X(cvtsi2ss, "cvtsi2ssl 32(%[s]), %%xmm0") X(cvtsd2si, "cvtsd2siq %%xmm1, %%rax") X(cvttsd2si, "cvttsd2sil %%xmm1, %%eax") \
    X(cvtss2si, "cvtss2sil 32(%[s]), %%eax") X(cvttss2si, "cvttss2siq %%xmm1, %%rax") \
    X(paddb, "paddb %%xmm1, %%xmm0") X(paddw, "paddw %%xmm1, %%xmm0") X(paddd, "paddd 32(%[s]), %%xmm0") X(paddq, "paddq %%xmm1, %%xmm0") \
    X(paddsb, "paddsb %%xmm1, %%xmm0") X(paddusw, "paddusw %%xmm1, %%xmm0") X(psubb, "psubb %%xmm1, %%xmm0") X(psubsw, "psubsw %%xmm1, %%xmm0") \
    X(psubusb, "psubusb %%xmm1, %%xmm0") X(psubq, "psubq %%xmm1, %%xmm0") X(pmullw, "pmullw %%xmm1, %%xmm0") X(pmulhw, "pmulhw %%xmm1, %%xmm0") \
    X(pmulhuw, "pmulhuw %%xmm1, %%xmm0") X(pmuludq, "pmuludq %%xmm1, %%xmm0") X(pmaddwd, "pmaddwd %%xmm1, %%xmm0") X(psadbw, "psadbw %%xmm1, %%xmm0") \
    X(pavgb, "pavgb %%xmm1, %%xmm0") X(pminub, "pminub %%xmm1, %%xmm0") X(pmaxsw, "pmaxsw %%xmm1, %%xmm0") X(pcmpeqb, "pcmpeqb %%xmm1, %%xmm0") \
    X(pcmpgtd, "pcmpgtd %%xmm1, %%xmm0") X(pand, "pand %%xmm1, %%xmm0") X(pandn, "pandn %%xmm1, %%xmm0") X(por, "por %%xmm1, %%xmm0") X(pxor, "pxor 32(%[s]), %%xmm0") \
    X(psllw, "psllw $5, %%xmm0") X(psrad, "psrad $31, %%xmm0") X(psrlq, "psrlq %%xmm1, %%xmm0") X(pslldq, "pslldq $3, %%xmm0") X(psrldq, "psrldq $9, %%xmm0") \
    X(pshufd, "pshufd $0x4e, %%xmm1, %%xmm0") X(pshuflw, "pshuflw $0x1b, %%xmm1, %%xmm0") X(pshufhw, "pshufhw $0x93, %%xmm1, %%xmm0") \
    X(packsswb, "packsswb %%xmm1, %%xmm0") X(packuswb, "packuswb %%xmm1, %%xmm0") X(packssdw, "packssdw %%xmm1, %%xmm0") \
    X(punpcklbw, "punpcklbw %%xmm1, %%xmm0") X(punpckhdq, "punpckhdq %%xmm1, %%xmm0") X(punpcklqdq, "punpcklqdq %%xmm1, %%xmm0") \
    X(pmovmskb, "pmovmskb %%xmm1, %%eax") X(movmskpd, "movmskpd %%xmm0, %%eax") X(pextrw, "pextrw $5, %%xmm1, %%eax") X(pinsrw, "pinsrw $3, %%eax, %%xmm0") \
    X(movd, "movd %%eax, %%xmm0; movd %%xmm1, %%eax") X(movq, "movq %%rax, %%xmm0; movq %%xmm1, %%rax") X(movlps, "movlps 32(%[s]), %%xmm0; movhlps %%xmm1, %%xmm0") \
    X(movhpd, "movhpd 32(%[s]), %%xmm0; movlhps %%xmm1, %%xmm0") X(movss, "movss %%xmm1, %%xmm0") X(movsd_load, "movsd 32(%[s]), %%xmm0") \
    X(movnt, "movntdq %%xmm1, 96(%[s]); movaps 96(%[s]), %%xmm0; movnti %%rax, 96(%[s])") X(maskmovdqu, "mov %[s], %%rdi; maskmovdqu %%xmm1, %%xmm0; movups (%[s]), %%xmm0")
#define LIST_SSE3(X) X(addsubps, "addsubps %%xmm1, %%xmm0") X(haddpd, "haddpd %%xmm1, %%xmm0") X(hsubps, "hsubps %%xmm1, %%xmm0") X(movddup, "movddup %%xmm1, %%xmm0") \
    X(movshdup, "movshdup %%xmm1, %%xmm0") X(lddqu, "lddqu 35(%[s]), %%xmm0")
#define LIST_SSSE3(X) X(pshufb, "pshufb %%xmm1, %%xmm0") X(phaddw, "phaddw %%xmm1, %%xmm0") X(phsubd, "phsubd %%xmm1, %%xmm0") X(pmaddubsw, "pmaddubsw %%xmm1, %%xmm0") \
    X(pmulhrsw, "pmulhrsw %%xmm1, %%xmm0") X(psignb, "psignb %%xmm1, %%xmm0") X(pabsd, "pabsd %%xmm1, %%xmm0") X(palignr, "palignr $5, %%xmm1, %%xmm0")
#define LIST_SSE41(X) X(pblendw, "pblendw $0x5a, %%xmm1, %%xmm0") X(blendps, "blendps $5, %%xmm1, %%xmm0") X(dpps, "dpps $0xf3, %%xmm1, %%xmm0") X(dppd, "dppd $0x31, %%xmm1, %%xmm0") \
    X(insertps, "insertps $0x9c, %%xmm1, %%xmm0") X(extractps, "extractps $2, %%xmm1, %%eax") X(pextrb, "pextrb $7, %%xmm1, %%eax") X(pextrq, "pextrq $1, %%xmm1, %%rax") \
    X(pinsrb, "pinsrb $9, %%eax, %%xmm0") X(pinsrq, "pinsrq $1, %%rax, %%xmm0") X(pmuldq, "pmuldq %%xmm1, %%xmm0") X(pmulld, "pmulld %%xmm1, %%xmm0") \
    X(pminsb, "pminsb %%xmm1, %%xmm0") X(pmaxud, "pmaxud %%xmm1, %%xmm0") X(packusdw, "packusdw %%xmm1, %%xmm0") X(pcmpeqq, "pcmpeqq %%xmm1, %%xmm0") \
    X(pmovsxbw, "pmovsxbw %%xmm1, %%xmm0") X(pmovzxdq, "pmovzxdq 32(%[s]), %%xmm0") X(ptest, "ptest %%xmm1, %%xmm0; pushfq; popq %%rax") X(mpsadbw, "mpsadbw $5, %%xmm1, %%xmm0") \
    X(phminposuw, "phminposuw %%xmm1, %%xmm0") X(roundps_near, "roundps $0, %%xmm1, %%xmm0") X(roundpd_down, "roundpd $1, %%xmm1, %%xmm0") X(roundss_up, "roundss $2, %%xmm1, %%xmm0") \
    X(roundsd_zero, "roundsd $11, %%xmm1, %%xmm0") X(pblendvb, "movaps %%xmm0, %%xmm3; movaps %%xmm2, %%xmm0; pblendvb %%xmm0, %%xmm1, %%xmm3; movaps %%xmm3, %%xmm0")
#define LIST_SSE42(X) X(pcmpgtq, "pcmpgtq %%xmm1, %%xmm0") X(pcmpistri, "pcmpistri $0x0c, %%xmm1, %%xmm0; pushfq; popq %%rax; andl $0x8c1, %%eax; shll $8, %%ecx; orl %%ecx, %%eax") \
    X(pcmpistrm, "pcmpistrm $0x44, %%xmm1, %%xmm0") X(pcmpestri, "mov $7, %%eax; mov $9, %%edx; pcmpestri $0x18, %%xmm1, %%xmm0; mov %%ecx, %%eax") \
    X(pcmpestrm, "mov $7, %%eax; mov $9, %%edx; pcmpestrm $0x61, %%xmm1, %%xmm0; mov $0, %%eax")
#define LIST_AES(X) X(aesenc, "aesenc %%xmm1, %%xmm0") X(aesenclast, "aesenclast %%xmm1, %%xmm0") X(aesdec, "aesdec 32(%[s]), %%xmm0") X(aesdeclast, "aesdeclast %%xmm1, %%xmm0") \
    X(aesimc, "aesimc %%xmm1, %%xmm0") X(aeskeygen, "aeskeygenassist $0x1b, %%xmm1, %%xmm0")
#define LIST_CLMUL(X) X(pclmul00, "pclmulqdq $0, %%xmm1, %%xmm0") X(pclmul11, "pclmulqdq $0x11, %%xmm1, %%xmm0")
#define LIST_SHA(X) X(sha1rnds4, "sha1rnds4 $2, %%xmm1, %%xmm0") X(sha1nexte, "sha1nexte %%xmm1, %%xmm0") X(sha1msg1, "sha1msg1 %%xmm1, %%xmm0") X(sha1msg2, "sha1msg2 %%xmm1, %%xmm0") \
    X(sha256rnds2, "movaps %%xmm0, %%xmm3; movaps %%xmm2, %%xmm0; sha256rnds2 %%xmm0, %%xmm1, %%xmm3; movaps %%xmm3, %%xmm0") X(sha256msg1, "sha256msg1 %%xmm1, %%xmm0") X(sha256msg2, "sha256msg2 %%xmm1, %%xmm0")
#define LIST_AVX(X) X(vaddps, "vaddps %%ymm1, %%ymm2, %%ymm0") X(vmulpd, "vmulpd 32(%[s]), %%ymm2, %%ymm0") X(vdivps, "vdivps %%ymm1, %%ymm0, %%ymm0") X(vsubsd, "vsubsd %%xmm1, %%xmm2, %%xmm0") \
    X(vsqrtpd, "vsqrtpd %%ymm1, %%ymm0") X(vminps, "vminps %%ymm1, %%ymm2, %%ymm0") X(vcmpps, "vcmpps $0x1d, %%ymm1, %%ymm2, %%ymm0") X(vcmpsd, "vcmpsd $0x0a, %%xmm1, %%xmm2, %%xmm0") \
    X(vandps, "vandps %%ymm1, %%ymm2, %%ymm0") X(vxorpd, "vxorpd %%ymm1, %%ymm2, %%ymm0") X(vblendvps, "vblendvps %%ymm2, %%ymm1, %%ymm0, %%ymm0") \
    X(vperm2f128, "vperm2f128 $0x21, %%ymm1, %%ymm2, %%ymm0") X(vpermilps, "vpermilps $0x1b, %%ymm1, %%ymm0") X(vinsertf128, "vinsertf128 $1, %%xmm1, %%ymm2, %%ymm0") \
    X(vextractf128, "vextractf128 $1, %%ymm1, %%xmm0") X(vbroadcastss, "vbroadcastss 36(%[s]), %%ymm0") X(vbroadcastsd, "vbroadcastsd 40(%[s]), %%ymm0") \
    X(vcvtps2pd, "vcvtps2pd %%xmm1, %%ymm0") X(vcvtpd2dq, "vcvtpd2dqy %%ymm1, %%xmm0") X(vroundps, "vroundps $3, %%ymm1, %%ymm0") X(vhaddpd, "vhaddpd %%ymm1, %%ymm2, %%ymm0") \
    X(vmaskmovps, "vmaskmovps 32(%[s]), %%ymm2, %%ymm0") X(vtestps, "vtestps %%ymm1, %%ymm2; pushfq; popq %%rax") X(vmovmskps, "vmovmskps %%ymm1, %%eax") \
    X(vzeroupper, "vzeroupper") X(sse_keeps_upper, "addps %%xmm1, %%xmm0") X(vex_clears_upper, "vaddps %%xmm1, %%xmm0, %%xmm0") X(vpaddd_128, "vpaddd %%xmm1, %%xmm2, %%xmm0") \
    X(vdpps, "vdpps $0xf1, %%ymm1, %%ymm2, %%ymm0") X(vunpcklps, "vunpcklps %%ymm1, %%ymm2, %%ymm0") X(vshufpd, "vshufpd $9, %%ymm1, %%ymm2, %%ymm0")
#define LIST_AVX2(X) X(vpaddb, "vpaddb %%ymm1, %%ymm2, %%ymm0") X(vpmulld, "vpmulld %%ymm1, %%ymm2, %%ymm0") X(vpshufb, "vpshufb %%ymm1, %%ymm2, %%ymm0") X(vpermq, "vpermq $0x39, %%ymm1, %%ymm0") \
    X(vpermd, "vpermd %%ymm1, %%ymm2, %%ymm0") X(vpsllvd, "vpsllvd %%ymm1, %%ymm2, %%ymm0") X(vpsravd, "vpsravd %%ymm1, %%ymm2, %%ymm0") X(vpsrlvq, "vpsrlvq %%ymm1, %%ymm2, %%ymm0") \
    X(vpbroadcastb, "vpbroadcastb %%xmm1, %%ymm0") X(vpmovsxbd, "vpmovsxbd %%xmm1, %%ymm0") X(vpmovmskb, "vpmovmskb %%ymm1, %%eax") X(vpcmpgtq, "vpcmpgtq %%ymm1, %%ymm2, %%ymm0") \
    X(vpalignr, "vpalignr $7, %%ymm1, %%ymm2, %%ymm0") X(vperm2i128, "vperm2i128 $0x13, %%ymm1, %%ymm2, %%ymm0") X(vpsadbw, "vpsadbw %%ymm1, %%ymm2, %%ymm0") \
    X(vpgatherdd, "vpcmpeqd %%ymm3, %%ymm3, %%ymm3; vpsrld $29, %%ymm1, %%ymm1; vpgatherdd %%ymm3, (%[s],%%ymm1,4), %%ymm0") X(vpmaskmovq, "vpmaskmovq 32(%[s]), %%ymm2, %%ymm0") \
    X(vpblendd, "vpblendd $0xa5, %%ymm1, %%ymm2, %%ymm0")
#define LIST_FMA(X) X(vfmadd132ps, "vfmadd132ps %%ymm1, %%ymm2, %%ymm0") X(vfmadd213pd, "vfmadd213pd %%ymm1, %%ymm2, %%ymm0") X(vfmsub231sd, "vfmsub231sd %%xmm1, %%xmm2, %%xmm0") \
    X(vfnmadd231ps, "vfnmadd231ps 32(%[s]), %%ymm2, %%ymm0") X(vfmaddsub213ps, "vfmaddsub213ps %%ymm1, %%ymm2, %%ymm0")
#define LIST_F16C(X) X(vcvtph2ps, "vcvtph2ps %%xmm1, %%ymm0") X(vcvtps2ph, "vcvtps2ph $0, %%ymm1, %%xmm0")
#define LIST_MMX(X) X(mmx_paddb, "movq (%[s]), %%mm0; paddb 32(%[s]), %%mm0; movq %%mm0, %%rax; emms") X(mmx_pmaddwd, "movq (%[s]), %%mm1; pmaddwd 32(%[s]), %%mm1; movq %%mm1, %%rax; emms") \
    X(mmx_packsswb, "movq (%[s]), %%mm2; packsswb 32(%[s]), %%mm2; movq %%mm2, %%rax; emms") X(mmx_psrlq, "movq (%[s]), %%mm7; psrlq $13, %%mm7; movq %%mm7, %%rax; emms") \
    X(movdq2q, "movdq2q %%xmm1, %%mm3; movq2dq %%mm3, %%xmm0; emms") X(cvtps2pi, "cvttps2pi %%xmm1, %%mm0; movq %%mm0, %%rax; emms") X(mmx_pshufw, "pshufw $0x1b, 32(%[s]), %%mm5; movq %%mm5, %%rax; emms")
#define LIST_X87(X) X(fadd, "faddp") X(fsub, "fsubp") X(fsubr, "fsubrp") X(fmul, "fmulp") X(fdiv, "fdivp") X(fdivr, "fdivrp") X(fsqrt, "fsqrt") X(fabs_, "fabs") X(fchs, "fchs") \
    X(frndint, "frndint") X(fscale, "fscale") X(fprem, "fprem") X(fprem1, "fprem1") X(fxtract, "fxtract") X(fxam, "fxam; fnstsw %%ax; movzwl %%ax, %%eax") \
    X(fcom, "fcom") X(fucomi, "fucomi %%st(1), %%st; pushfq; popq %%rcx; fldz; fstp %%st(0)") X(fcmovb, "comisd %%xmm0, %%xmm0; fcmovb %%st(1), %%st") X(ftst, "ftst") X(fxch, "fxch") \
    X(fild, "fildll 32(%[s])") X(fist, "fistl 64(%[s])") X(fisttp, "fisttpll 64(%[s]); fldl 64(%[s])") X(fbld, "fbstp 64(%[s]); fbld 64(%[s])") X(fstps, "fstps 64(%[s]); flds 64(%[s])") \
    X(fldcw_down, "movl $0x77f, 64(%[s]); fldcw 64(%[s]); frndint") X(fldcw_single, "movl $0x07f, 64(%[s]); fldcw 64(%[s]); faddp") X(fldpi, "fldpi; faddp") X(faddm, "faddl 64(%[s])") X(fidiv, "fidivl 64(%[s])") \
    X(stack_underflow, "fstp %%st(0); fstp %%st(0); fadd %%st(1), %%st; fnstsw %%ax; movzwl %%ax, %%eax; fldz")

LIST_SSE2(SSE) LIST_SSE3(SSE) LIST_SSSE3(SSE) LIST_SSE41(SSE) LIST_SSE42(SSE) LIST_AES(SSE) LIST_CLMUL(SSE) LIST_SHA(SSE)
LIST_AVX(AVX) LIST_AVX2(AVX) LIST_FMA(AVX) LIST_F16C(AVX) LIST_MMX(SSE) LIST_X87(X87)

enum kind { SSE2, SSE3, SSSE3, SSE41, SSE42, AES, CLMUL, SHA, AVX1, AVX2, FMA, F16C, X87FPU };
static const struct group {
    const char *name;
    operation run;
    u32 kind;
} groups[] = {
#define ENTRY_SSE2(name, code) { #name, name, SSE2 },
#define ENTRY_SSE3(name, code) { #name, name, SSE3 },
#define ENTRY_SSSE3(name, code) { #name, name, SSSE3 },
#define ENTRY_SSE41(name, code) { #name, name, SSE41 },
#define ENTRY_SSE42(name, code) { #name, name, SSE42 },
#define ENTRY_AES(name, code) { #name, name, AES },
#define ENTRY_CLMUL(name, code) { #name, name, CLMUL },
#define ENTRY_SHA(name, code) { #name, name, SHA },
#define ENTRY_AVX(name, code) { #name, name, AVX1 },
#define ENTRY_AVX2(name, code) { #name, name, AVX2 },
#define ENTRY_FMA(name, code) { #name, name, FMA },
#define ENTRY_F16C(name, code) { #name, name, F16C },
#define ENTRY_X87(name, code) { #name, name, X87FPU },
    LIST_SSE2(ENTRY_SSE2) LIST_SSE3(ENTRY_SSE3) LIST_SSSE3(ENTRY_SSSE3) LIST_SSE41(ENTRY_SSE41) LIST_SSE42(ENTRY_SSE42)
    LIST_AES(ENTRY_AES) LIST_CLMUL(ENTRY_CLMUL) LIST_SHA(ENTRY_SHA) LIST_AVX(ENTRY_AVX) LIST_AVX2(ENTRY_AVX2)
    LIST_FMA(ENTRY_FMA) LIST_F16C(ENTRY_F16C) LIST_MMX(ENTRY_SSE2) LIST_X87(ENTRY_X87)
};

static bool avx_on;

static bool present(u32 kind)
{
    switch (kind) {
    case SSE3: return has1c(0);
    case SSSE3: return has1c(9);
    case SSE41: return has1c(19);
    case SSE42: return has1c(20);
    case AES: return has1c(25);
    case CLMUL: return has1c(1);
    case SHA: return has7b(29);
    case AVX1: return avx_on;
    case AVX2: return avx_on && has7b(5);
    case FMA: return avx_on && has1c(12);
    case F16C: return avx_on && has1c(29);
    default: return true;
    }
}

static u64 run_group(const struct group *group, bool print, u64 *status)
{
    static const u32 controls[] = { 0x1f80, 0x7f80, 0x9fc0 }; /* nearest; towards zero; nearest, FTZ and DAZ */
    u64 sum = DIGEST_START;
    *status = DIGEST_START;
    for (size_t m = 0; m < (group->kind == X87FPU ? 1 : ARRAY_LENGTH(controls)); m++) {
        for (size_t i = 0; i < ARRAY_LENGTH(inputs); i++) {
            for (size_t j = 0; j < ARRAY_LENGTH(inputs); j++) {
                static struct simd s __attribute__((aligned(32)));
                s.a = inputs[i], s.b = inputs[j], s.c = inputs[(i + 2 * j + 5) % ARRAY_LENGTH(inputs)];
                s.r = (vector){ { 0 } }, s.g = 0x0123456789abcdef, s.mxcsr = controls[m];
                group->run(&s);
                if (print)
                    say("%s %u %u %x -> %016lx %016lx %016lx %016lx rax %lx mxcsr %x\n", group->name, (u32)i, (u32)j, controls[m],
                        s.r.q[0], s.r.q[1], s.r.q[2], s.r.q[3], s.g, s.mxcsr);
                for (int k = 0; k < 4; k++)
                    sum = digest(sum, s.r.q[k]);
                if (group->kind == X87FPU)
                    s.mxcsr = (u32)s.g;
                else
                    sum = digest(sum, s.g & ~(u64)FLAG_IF);
                *status = digest(*status, s.mxcsr);
                sum = digest(sum, s.a.q[0] ^ s.c.q[0]);
            }
        }
    }
    return sum;
}

void guest_main(const struct start_info *info)
{
    (void)info;
#ifdef HOSTED
    bool lax = false;
    avx_on = has1c(28);
#else
    bool lax = under_qemu();
    if (has1c(26)) {
        write_cr4(read_cr4() | 1 << 18); /* OSXSAVE */
        avx_on = has1c(28);
        xsetbv(0, avx_on ? 7 : 3);
    }
#endif
    bool print_header = starts_with(command_line, "print");
    const char *one = starts_with(command_line, "case=") ? command_line + 5 : NULL;
    for (size_t i = 0; i < ARRAY_LENGTH(groups); i++) {
        const struct group *group = &groups[i];
        if (one && !(starts_with(one, group->name) && starts_with(group->name, one)))
            continue;
        if (!present(group->kind)) {
            skip(group->name, "not in CPUID");
            continue;
        }
        u64 status, sum = run_group(group, one != NULL, &status);
        if (print_header) {
            say("{ \"%s\", 0x%016lx, 0x%016lx },\n", group->name, sum, status);
            continue;
        }
        const struct wanted *want = &wanted[0];
        for (size_t k = 0; k < ARRAY_LENGTH(wanted); k++)
            if (starts_with(wanted[k].name, group->name) && starts_with(group->name, wanted[k].name))
                want = &wanted[k];
        check(group->name, sum, want->results);
        if (lax) /* QEMU's status flags differ in many places from any processor's */
            continue;
        check("  status", status, want->status);
    }
}
