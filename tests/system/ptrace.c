/* A small debugger: single-steps, breakpoints and watchpoints on a child, as gdb does them. Prints what it saw. */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile long watched;

/* Seven instructions up to `stepped_end`, the NOP at `stepped` being the first. */
extern char stepped[], stepped_end[];
__attribute__((noinline)) static long work(long n)
{
    long sum = 0;
    for (long i = 0; i < n; i++) {
        sum += i;
        watched = sum;
        asm volatile("" ::: "memory");
    }
    asm volatile(".globl stepped\nstepped: nop\nmov $3, %%ecx\npushf\npop %%rdx\nxor %%eax, %%eax\ncpuid\nnop\n.globl stepped_end\n"
                 "stepped_end: nop" ::: "rax", "rbx", "rcx", "rdx");
    return sum;
}

static int go(int request, pid_t child)
{
    int status;
    if (ptrace(request, child, 0, 0) || waitpid(child, &status, 0) != child) {
        perror("ptrace");
        exit(1);
    }
    return status;
}

static unsigned long rip(pid_t child)
{
    struct user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, 0, &registers);
    return registers.rip;
}

static void debug_register(pid_t child, int number, unsigned long value)
{
    if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + 8 * number, value))
        perror("debug register");
}

static void expect(const char *what, long got, long want)
{
    printf("%s %s %ld\n", got == want ? "ok" : "FAIL", what, got);
}

int main(void)
{
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        work(5);
        _exit(work(10));
    }
    int status;
    waitpid(child, &status, 0);
    expect("stopped", WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, 1);

    /* A breakpoint of one byte. */
    long text = ptrace(PTRACE_PEEKTEXT, child, stepped, 0);
    ptrace(PTRACE_POKETEXT, child, stepped, (text & ~0xffl) | 0xcc);
    status = go(PTRACE_CONT, child);
    expect("breakpoint", WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP && rip(child) == (unsigned long)stepped + 1, 1);
    expect("value-there", ptrace(PTRACE_PEEKDATA, child, &watched, 0), 10);
    struct user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, 0, &registers);
    registers.rip = (unsigned long)stepped;
    ptrace(PTRACE_SETREGS, child, 0, &registers);
    ptrace(PTRACE_POKETEXT, child, stepped, text);

    /* Single steps. */
    long steps = 0;
    while (rip(child) != (unsigned long)stepped_end && steps < 100) {
        status = go(PTRACE_SINGLESTEP, child);
        steps += WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
    }
    expect("single-steps", steps, 7);
    ptrace(PTRACE_GETREGS, child, 0, &registers);
    expect("trap-flag-hidden", registers.rdx >= 0 && !(registers.eflags & 0x100), 1);

    /* A watchpoint for stores of eight bytes: ten in the second run. */
    debug_register(child, 0, (unsigned long)&watched);
    debug_register(child, 7, 1 | 1 << 16 | 2 << 18);
    long hits = 0, last = 0;
    while (status = go(PTRACE_CONT, child), WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP) {
        hits++;
        last = ptrace(PTRACE_PEEKDATA, child, &watched, 0);
        unsigned long dr6 = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg) + 8 * 6, 0);
        if ((dr6 & 0xf) != 1)
            printf("FAIL dr6 %lx\n", dr6);
        if (hits == 10) { /* then a breakpoint in hardware, in its place */
            debug_register(child, 7, 0);
            debug_register(child, 0, (unsigned long)stepped);
            debug_register(child, 7, 1);
            status = go(PTRACE_CONT, child);
            expect("hardware-breakpoint", WIFSTOPPED(status) && rip(child) == (unsigned long)stepped, 1);
            debug_register(child, 7, 0);
        }
    }
    expect("watchpoints", hits, 10);
    expect("last-value", last, 45);
    expect("exit-status", WIFEXITED(status) ? WEXITSTATUS(status) : -1, 45);
    puts("done");
    return 0;
}
