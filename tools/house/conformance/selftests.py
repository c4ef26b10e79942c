"""Linux's own tests of its x86 side, tools/testing/selftests/x86.

They ask for what only a whole processor with a whole kernel can give: segments of their own, single steps through
system calls, signals with odd frames.
"""

from pathlib import Path

from house.conformance.programs import Suite, compile_program
from house.shell import Failed

FOLDER = Path("tools/testing/selftests/x86")
# As its Makefile has them for 64 bits; those in 32 bits want a C library that few machines have. Not here: amx, which
# CPUID does not offer.
PROGRAMS = (
    "check_initial_reg_state",
    "corrupt_xstate_header",
    "fsgsbase",
    "fsgsbase_restore",
    "ioperm",
    "iopl",
    "ldt_gdt",
    "mov_ss_trap",
    "ptrace_syscall",
    "sigaltstack",
    "sigreturn",
    "sigtrap_loop",
    "single_step_syscall",
    "syscall_arg_fault",
    "syscall_nt",
    "syscall_numbering",
    "sysret_rip",
    "sysret_ss_attrs",
    "test_mremap_vdso",
    "test_vsyscall",
)
FLAGS = ("-O2", "-std=gnu99", "-pthread", "-DCAN_BUILD_64", "-lrt", "-ldl")
# What some of them need besides their own source.
MORE = {"sysret_ss_attrs": ("thunks.S",), "check_initial_reg_state": ("-Wl,-ereal_start",)}


def build(linux: Path, out: Path) -> Suite:
    """Compile the programs of a Linux source tree. Raises Failed when there is none, or gcc fails."""
    folder = linux.resolve() / FOLDER
    if not (folder / "helpers.h").exists():
        raise Failed(f"{linux} is no Linux source tree with {FOLDER}", 2)
    programs = [
        compile_program(folder / f"{name}.c", out / f"{name}_64", (*FLAGS, *MORE.get(name, ())))
        for name in PROGRAMS
    ]
    return Suite("selftests", programs, frozenset())
