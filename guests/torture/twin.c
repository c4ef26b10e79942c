/* One of two programs that are alike but for WHICH (1 or 2): the same functions at the same addresses compute something
 * else, the same data has other values. It ends with WHICH as its status; with 100 and more if it is not all of one
 * piece: an old translation, or a page of the other. No C library, so that nothing but WHICH makes a difference. */
typedef unsigned long u64;

#define SIX(op) op(0) op(1) op(2) op(3) op(4) op(5)
#define VALUE(n) (WHICH * 0x1234567ul + (n) * 0x9e3779b97f4a7c15ul)
#define FUNCTION(n)                                                                                                    \
    __attribute__((noinline, aligned(4096))) static u64 function_##n(u64 x) { return x * (2 * n + 3) + VALUE(n); }
SIX(FUNCTION)

typedef u64 function(u64);
#define NAME(n) function_##n,
static function *const functions[] = {SIX(NAME)};

#define COUNT 1024
#define ROW(n) [n * 170 ... n * 170 + 169] = VALUE(n),
static const u64 constants[COUNT] = {SIX(ROW)};
static u64 variables[COUNT] = {SIX(ROW)};
static u64 zeros[COUNT];

static u64 wanted(u64 n)
{
    return WHICH * 0x1234567ul + n * 0x9e3779b97f4a7c15ul;
}

static _Noreturn void end(long status)
{
    for (;;)
        __asm__ volatile("syscall" : : "a"(231), "D"(status) : "rcx", "r11", "memory");
}

_Noreturn void _start(void)
{
    for (u64 i = 0; i < 1020; i++) {
        if (*(volatile const u64 *)&constants[i] != wanted(i / 170))
            end(100);
        if (*(volatile u64 *)&variables[i] != wanted(i / 170))
            end(101);
        if (*(volatile u64 *)&zeros[i] != 0)
            end(102);
        zeros[i] = variables[i];
        variables[i] = ~i;
    }
    u64 x = 1;
    for (u64 round = 0; round < 600; round++) {
        u64 n = round % 6;
        u64 before = x;
        x = (*(function *const volatile *)&functions[n])(x);
        if (x != before * (2 * n + 3) + wanted(n))
            end(103);
    }
    for (u64 i = 0; i < 1020; i++)
        if (*(volatile u64 *)&variables[i] != ~i || *(volatile u64 *)&zeros[i] != wanted(i / 170))
            end(104);
    end(WHICH);
}
