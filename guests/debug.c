/* debug: INT3, single step, breakpoint registers (Intel SDM (2024-12) Vol. 3B chapter 18 Debug).
 *
 * TF steps over every kind of instruction (a REP stops at each element, MOV SS and POP SS hold a step back, a step into a
 * fault does not come), DR6 and DR7 as they must read, data breakpoints on each size and access, on the instruction after;
 * instruction breakpoints before, with RF to get past them; general detect; DR4 and DR5 with and without CR4.DE.
 * Output: the same on every run and engine.
 */
#include "lib.h"

#define DR6_FIXED 0xffff0ff0ull
#define DR6_BS 0x4000
#define DR6_BD 0x2000

static u64 hits, trail, last_dr6, stop_after;
static u64 rips[64];

/* Count, remember where, clear DR6, and go on. */
static bool on_debug(struct frame *frame)
{
    last_dr6 = read_dr6();
    if (hits < ARRAY_LENGTH(rips))
        rips[hits] = frame->rip;
    hits++;
    trail = digest(trail, last_dr6 & 0xe00f);
    write_dr6(DR6_FIXED);
    if (!(last_dr6 & DR6_BS))
        frame->rflags |= FLAG_RF; /* past an instruction breakpoint */
    if (hits >= stop_after)
        frame->rflags &= ~(u64)FLAG_TF;
    return true;
}

static void start(u64 stop) { hits = 0, trail = DIGEST_START, last_dr6 = 0, stop_after = stop; }

#define STEP_ON "pushfq\norq $0x100, (%rsp)\npopfq\n"
#define STEP_OFF "pushfq\nandq $~0x100, (%rsp)\npopfq\n"

CODE(step_plain, STEP_ON "step_plain_1: nop\nstep_plain_2: addl $1, %eax\nstep_plain_3: " STEP_OFF "ret");
LABEL(step_plain_1); LABEL(step_plain_2); LABEL(step_plain_3);
CODE(step_rep, "movl $5, %ecx\nleaq trap_area(%rip), %rdi\n" STEP_ON "step_rep_at: rep stosb\nstep_rep_after: nop\n" STEP_OFF "ret");
LABEL(step_rep_at); LABEL(step_rep_after);
CODE(step_ss, "movl $0x18, %eax\n" STEP_ON "nop\nstep_ss_at: movl %eax, %ss\nstep_ss_1: nop\nstep_ss_2: nop\n" STEP_OFF "ret");
LABEL(step_ss_1); LABEL(step_ss_2);
CODE(step_jump, STEP_ON "jmp 1f\nud2\n1: step_jump_1: call 2f\nstep_jump_2: jmp 3f\n2: step_jump_3: ret\n3: step_jump_4: " STEP_OFF "ret");
LABEL(step_jump_1); LABEL(step_jump_2); LABEL(step_jump_3); LABEL(step_jump_4);
CODE(step_many, "movl $100, %ecx\nxorl %eax, %eax\n" STEP_ON "1: addl %ecx, %eax\ndecl %ecx\njnz 1b\n" STEP_OFF "ret");
CODE(step_fault, STEP_ON "xorl %ecx, %ecx\nstep_fault_at: movl (%rdi), %eax\n" STEP_OFF "ret");
LABEL(step_fault_at);
CODE(step_int3, STEP_ON "nop\nint3\nnop\n" STEP_OFF "ret");
CODE(step_popf, STEP_ON "pushfq\npopfq\ncpuid\nxorl %eax, %eax\n" STEP_OFF "ret");
u8 trap_area[64] __attribute__((aligned(64)));

static bool on_breakpoint(struct frame *frame)
{
    (void)frame;
    return true;
}

static void test_steps(void)
{
    trap_handlers[DB] = on_debug;
    start(100);
    catch((void *)step_plain, NULL);
    /* POPF itself does not trap; the first trap is after the instruction that follows it. STEP_OFF is stepped too. */
    check("step-first", rips[0], (u64)step_plain_2);
    check("step-second", rips[1], (u64)step_plain_3);
    check("step-dr6", last_dr6, DR6_FIXED | DR6_BS);
    check("step-count", hits, 5);
    start(100);
    catch((void *)step_rep, NULL);
    u64 same = 0;
    for (int i = 0; i < 4; i++)
        same += rips[i] == (u64)step_rep_at;
    check("step-rep-each", same, 4);
    check("step-rep-end", rips[4], (u64)step_rep_after);
    start(100);
    catch((void *)step_ss, NULL);
    check("step-ss-held-back", rips[1], (u64)step_ss_2); /* rips[0] is after the first NOP */
    start(100);
    catch((void *)step_jump, NULL);
    check("step-jump", rips[0] == (u64)step_jump_1 && rips[1] == (u64)step_jump_3 && rips[2] == (u64)step_jump_2 && rips[3] == (u64)step_jump_4, 1);
    start(1000);
    catch((void *)step_many, NULL);
    check("step-many", hits, 303);
    start(100);
    u64 vector = catch((void *)step_fault, (void *)0xffff800000000000ull);
    check_trap("step-fault", vector, PF, 0, (u64)step_fault_at);
    check("step-fault-count", hits, 1);
    check("step-fault-tf-saved", last_trap.frame.rflags & FLAG_TF, FLAG_TF);
    trap_handlers[BP] = on_breakpoint;
    start(100);
    catch((void *)step_int3, NULL);
    trap_handlers[BP] = NULL;
    /* INT3's gate clears TF, and the handler's IRET brings it back: no step for the INT3, one for the NOP after it. */
    check("step-int3", hits, 5);
    start(100);
    catch((void *)step_popf, NULL);
    check("step-popf-cpuid", hits, 7);
}

static void test_user_step(void)
{
    allow_user();
    static const u8 code[] = { 0x90, 0x90, 0x48, 0xff, 0xc0, 0xcd, 0x80 }; /* nop; nop; inc %rax; int $0x80 */
    static u8 copy[16] __attribute__((aligned(16)));
    memcpy(copy, code, sizeof code);
    start(100);
    u64 vector = run_user((u64)copy, (u64)user_stack + 4096, USER_CS, FLAG_TF, NULL);
    check("user-step", hits << 8 | vector, 3 << 8 | 0x80);
    check("user-step-rips", rips[0] == (u64)copy + 1 && rips[1] == (u64)copy + 2 && rips[2] == (u64)copy + 5, 1);
    check("user-step-tf-saved", last_trap.frame.rflags & FLAG_TF, FLAG_TF);
}

static volatile u64 watched[4] __attribute__((aligned(64)));

/* DR7: enable (L0), type (0 execute, 1 write, 3 access), length (0: 1, 1: 2, 3: 4, 2: 8) for breakpoint n */
static u64 dr7(int n, u64 type, u64 length) { return 0x400 | 1ull << (2 * n) | type << (16 + 4 * n) | length << (18 + 4 * n); }

static void write_byte(volatile void *at) { *(volatile u8 *)at = 1; }
static void read_byte(volatile void *at) { (void)*(volatile u8 *)at; }
static void write_long(volatile void *at) { *(volatile u64 *)at = 1; }

static u64 hits_of(void (*what)(volatile void *), u64 at)
{
    start(100);
    what((volatile void *)at);
    return hits << 16 | (last_dr6 & 0xf);
}

CODE(watch_write, "watch_write_at: movq $5, (%rdi)\nwatch_write_after: nop\nret");
LABEL(watch_write_after);
CODE(watch_rep, "movl $8, %ecx\nleaq -3(%rdi), %rdi\nxorl %eax, %eax\ncld\nwatch_rep_at: rep stosb\nwatch_rep_after: ret");
LABEL(watch_rep_at); LABEL(watch_rep_after);
CODE(watch_push, "movq %rsp, %rax\nmovq %rdi, %rsp\nwatch_push_at: pushq $7\nwatch_push_after: movq %rax, %rsp\nret");
LABEL(watch_push_after);

static void test_data(void)
{
    u64 at = (u64)watched;
    write_dr0(at);
    write_dr7(dr7(0, 1, 0));
    check("dr7-reads-back", read_dr7(), dr7(0, 1, 0));
    check("write-1", hits_of(write_byte, at), 1 << 16 | 1);
    check("write-1-next", hits_of(write_byte, at + 1), 0);
    check("write-1-read", hits_of(read_byte, at), 0);
    check("write-1-by-long", hits_of(write_long, at), 1 << 16 | 1);
    check("write-1-by-long-below", hits_of(write_long, at - 7), 1 << 16 | 1);
    check("write-1-by-long-too-low", hits_of(write_long, at - 8), 0);
    write_dr7(dr7(0, 3, 2));
    check("access-8-read", hits_of(read_byte, at + 7), 1 << 16 | 1);
    check("access-8-write", hits_of(write_byte, at + 3), 1 << 16 | 1);
    check("access-8-beyond", hits_of(read_byte, at + 8), 0);
    write_dr2(at + 16);
    write_dr7(dr7(2, 1, 3));
    check("write-4", hits_of(write_byte, at + 19), 1 << 16 | 4);
    check("write-4-beyond", hits_of(write_byte, at + 20), 0);
    write_dr1(at + 16);
    write_dr7(dr7(2, 1, 3) | dr7(1, 3, 0));
    check("two-at-once", hits_of(write_byte, at + 16), 1 << 16 | 6);
    write_dr3(at + 24);
    write_dr7((dr7(3, 1, 2) & ~0x40ull) | 0x80); /* G3 instead of L3 */
    check("global-enable", hits_of(write_long, at + 24), 1 << 16 | 8);
    start(100);
    catch((void *)watch_write, (void *)(at + 24));
    check("trap-after-write", rips[0], (u64)watch_write_after);
    check("write-done", watched[3], 5);
    start(100);
    catch((void *)watch_push, (void *)(at + 32));
    check("push", hits << 60 | rips[0], 1ull << 60 | (u64)watch_push_after);
    write_dr7(0x400);
    check("disabled", hits_of(write_long, at + 24), 0);
    write_dr0(at + 8);
    write_dr7(dr7(0, 1, 0));
    start(100);
    catch((void *)watch_rep, (void *)(at + 8));
    check("rep-hits", hits, 1);
    check("rep-rip", rips[0], (u64)watch_rep_at);
    write_dr7(0x400);
}

CODE(execute_here, "movl $1, %eax\nexecute_here_at: movl $2, %eax\nexecute_here_after: movl $3, %ecx\nret");
LABEL(execute_here_at);

static bool no_resume(struct frame *frame)
{
    last_dr6 = read_dr6();
    rips[0] = frame->rip;
    return false;
}

static void test_execute(void)
{
    write_dr1((u64)execute_here_at);
    write_dr7(dr7(1, 0, 0));
    write_dr6(DR6_FIXED);
    start(100);
    check("execute", catch((void *)execute_here, NULL), NO_TRAP);
    check("execute-once", hits << 16 | (last_dr6 & 0xf), 1 << 16 | 2);
    check("execute-rip", rips[0], (u64)execute_here_at);
    trap_handlers[DB] = no_resume;
    check("execute-before", catch((void *)execute_here, NULL), DB);
    check("execute-before-rax", last_trap.frame.rax, 1);
    write_dr6(DR6_FIXED);
    trap_handlers[DB] = on_debug;
    write_dr7(0x400);
    start(100);
    check("execute-off", catch((void *)execute_here, NULL) << 8 | hits, NO_TRAP << 8);
    for (int i = 0; i < 3; i++) { /* set and cleared again, over code that has run */
        write_dr7(dr7(1, 0, 0));
        catch((void *)execute_here, NULL);
        write_dr7(0x400);
        catch((void *)execute_here, NULL);
    }
    check("execute-again", hits, 3);
}

CODE(general_detect, "movq %db0, %rax\nret");
CODE(dr4, ".byte 0x0f, 0x21, 0xe0\nret"); /* mov %dr4, %rax */
CODE(dr7_high, "movabsq $0x100000000, %rax\nmovq %rax, %db7\nret");
CODE(dr6_high, "movabsq $0x100000000, %rax\nmovq %rax, %db6\nret");

CODE(fault_here, "ud2");
CODE(trap_here, "int3\nret");

static void test_registers(void)
{
    write_dr6(0);
    check("dr6-fixed-bits", read_dr6(), DR6_FIXED);
    write_dr7(0);
    check("dr7-fixed-bits", read_dr7(), 0x400);
    expect_trap("dr7-high-half", dr7_high, NULL, GP, 0, 0);
    expect_trap("dr6-high-half", dr6_high, NULL, GP, 0, 0);
    check("dr4-is-dr6", catch((void *)dr4, NULL), NO_TRAP);
    write_cr4(read_cr4() | 8);
    expect_trap("dr4-with-de", dr4, NULL, UD, 0, (u64)dr4);
    write_cr4(read_cr4() & ~8ull);
    trap_handlers[DB] = no_resume;
    write_dr7(0x2400);
    u64 vector = catch((void *)general_detect, NULL);
    check_trap("general-detect", vector, DB, 0, (u64)general_detect);
    check("general-detect-dr6", last_dr6 & 0xe00f, DR6_BD);
    check("general-detect-cleared", read_dr7(), 0x400);
    write_dr6(DR6_FIXED);
    /* RF: pushed set by a fault, clear by a trap (18.3.1.1). */
    catch((void *)fault_here, NULL);
    check("rf-of-a-fault", last_trap.frame.rflags & FLAG_RF, FLAG_RF);
    catch((void *)trap_here, NULL);
    check("rf-of-a-trap", last_trap.frame.rflags & FLAG_RF, 0);
}

void guest_main(const struct start_info *info)
{
    (void)info;
    test_steps();
    test_user_step();
    test_data();
    test_execute();
    test_registers();
    trap_handlers[DB] = NULL;
    write_dr7(0x400);
}
