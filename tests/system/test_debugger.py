"""A debugger in the guest: what gdb does to a process, done by a small program of ours."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ringzero import Machine

pytestmark = [
    pytest.mark.needs_debian,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the debugger with"),
]

SOURCE = Path(__file__).with_name("ptrace.c")
CHECKS = 9


def test_steps_breakpoints_and_watchpoints(debian: Machine, tmp_path: Path) -> None:
    program = tmp_path / "ptrace"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-o", str(program), str(SOURCE)], check=True)
    # What it finds on the bare processor is what it must find in the guest; a container may forbid ptrace.
    native = subprocess.run([str(program)], capture_output=True, text=True, check=False).stdout
    debian.run(
        ["sh", "-c", "cat > /root/ptrace && chmod +x /root/ptrace"], input=program.read_bytes(), check=True
    )
    done = debian.run(["/root/ptrace"], text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert len([line for line in lines if line.startswith("ok ")]) == CHECKS
    assert lines[-1] == "done"
    if native.endswith("done\n"):
        assert done.stdout == native
