"""The Python API on a running Debian."""

import hashlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ringzero import ConsoleTimeout, Machine
from ringzero.devices import PortRange

from .conftest import ENGINE

PROCESS_MAX = 128
"""As guests/agent/agent.h has it."""

pytestmark = pytest.mark.needs_debian


def test_run_gives_what_subprocess_gives(debian: Machine) -> None:
    done = debian.run(["uname", "-s"], text=True, check=True)
    assert done.stdout == "Linux\n"
    done = debian.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        debian.run(["sh", "-c", "exit 9"], check=True)
    assert caught.value.returncode == 9
    assert debian.run(["sh", "-c", "kill -9 $$"]).returncode == -9


def test_environment_and_directory(debian: Machine) -> None:
    done = debian.run(["sh", "-c", "pwd; echo $A"], env={"A": "b c", "PATH": "/bin"}, cwd="/tmp", text=True)
    assert done.stdout == "/tmp\nb c\n"


@pytest.mark.parametrize(
    ("args", "cwd", "error"),
    [
        (["nonesuch"], None, FileNotFoundError),
        (["/etc/passwd"], None, PermissionError),
        (["true"], "/nonexistent", FileNotFoundError),
    ],
)
def test_what_cannot_be_started(
    debian: Machine, args: list[str], cwd: str | None, error: type[OSError]
) -> None:
    with pytest.raises(error):
        debian.run(args, cwd=cwd)


def test_time_runs_out(debian: Machine) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        debian.run(["sh", "-c", "echo begun; exec sleep 100"], timeout=3)
    assert caught.value.output == b"begun\n"
    assert b"sleep 100" not in debian.run(["ps"]).stdout


def test_a_child_that_stays_does_not_hold_its_parents_end(debian: Machine) -> None:
    began = time.monotonic()
    assert debian.run(["sh", "-c", "sleep 60 & echo hi"]).stdout == b"hi\n"
    assert time.monotonic() - began < 30
    debian.run(["killall", "sleep"])


def test_a_megabyte_both_ways(debian: Machine) -> None:
    data = os.urandom(1_000_000)
    assert debian.run(["cat"], input=data, timeout=300).stdout == data


def test_eight_commands_at_once(debian: Machine) -> None:
    data = os.urandom(100_000)
    results: dict[int, bytes] = {}

    def one(number: int) -> None:
        done = debian.run(["sh", "-c", f"cat | sha1sum; exit {number}"], input=data[number:])
        assert done.returncode == number
        results[number] = done.stdout.split()[0]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: hashlib.sha1(data[n:]).hexdigest().encode() for n in range(8)}


def test_more_processes_than_the_agent_takes_is_an_error_not_a_hang(debian: Machine) -> None:
    sleepers = [debian.spawn(["sleep", "100"], stdin=False) for _ in range(PROCESS_MAX)]
    with pytest.raises(OSError, match="unavailable"):
        debian.run(["true"])
    for sleeper in sleepers:
        sleeper.kill()
    assert [sleeper.wait(60) for sleeper in sleepers] == [-9] * PROCESS_MAX
    assert debian.run(["true"]).returncode == 0


def test_a_terminal_of_its_own(debian: Machine) -> None:
    out: list[bytes] = []
    process = debian.spawn(
        ["sh", "-c", "tty; stty size; read x; stty size"], stdout=out.append, window=(33, 111)
    )
    while b"33 111" not in b"".join(out):
        time.sleep(0.05)
    process.resize(44, 122)
    process.write(b"\n")
    assert process.wait(60) == 0
    text = b"".join(out)
    assert text.startswith(b"/dev/pts/")
    assert b"44 122" in text


def test_the_console_has_a_shell_with_job_control(debian: Machine) -> None:
    console = debian.console
    console.write("\n")
    console.expect(r"# ", timeout=60)
    debian.resize_console(40, 132)
    console.write("stty size; echo answer: $((6 * 7))\n")
    assert "40 132" in console.expect(r"answer: 42").string
    console.expect(r"# ", timeout=60)
    console.write("sleep 1000\n")
    with pytest.raises(ConsoleTimeout):
        console.expect(r"# $", timeout=1)
    console.write(b"\x03")
    console.expect(r"# ", timeout=60)
    console.write("tty\n")
    console.expect("/dev/ttyS0", timeout=60)


def test_paused_it_can_be_looked_into(debian: Machine) -> None:
    debian.pause()
    try:
        before = debian.registers()
        assert before["cr0"] >> 31 == 1, "paging is off?"
        assert before["efer"] >> 10 & 1 == 1, "not in long mode?"
        assert len(debian.read_memory(0x10_0000, 4096)) == 4096
        time.sleep(0.2)
        assert debian.registers() == before
    finally:
        debian.resume()
    assert debian.run(["true"]).returncode == 0


def test_the_guest_knows_the_time(debian: Machine) -> None:
    seconds = int(debian.run(["date", "+%s"]).stdout)
    assert abs(seconds - time.time()) < 60


def test_time_passes_as_on_the_host(debian: Machine) -> None:
    def both() -> tuple[float, float]:
        return time.monotonic(), float(debian.run(["cat", "/proc/uptime"]).stdout.split()[0])

    host, guest = both()
    debian.run(["sleep", "2"])
    host_later, guest_later = both()
    assert guest_later - guest > 1.9
    assert abs((host_later - host) - (guest_later - guest)) < 1.0


def test_pvpanic_is_known_to_the_guest(debian: Machine) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if b"pvpanic_mmio" in debian.run(["cat", "/proc/modules"]).stdout:
            return
        time.sleep(0.5)
    pytest.fail("the agent did not load pvpanic-mmio")


class Dice:
    """A device of somebody's own."""

    name = "dice"
    ports = (PortRange(0x5000, 1),)

    def __init__(self) -> None:
        self.written: list[int] = []

    def read(self, port: int, size: int) -> int:
        return 4

    def write(self, port: int, size: int, value: int) -> None:
        self.written.append(value)


# iopl(3), then roll the dice and put the next number on it; no C library, so that it runs on busybox alone.
PLAYER = """
static long call(long n, long a) {
    long r; __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a) : "rcx", "r11", "memory"); return r;
}
void _start(void) {
    unsigned char seen;
    call(172, 3);
    __asm__ volatile("inb %w1, %0" : "=a"(seen) : "d"(0x5000));
    __asm__ volatile("outb %0, %w1" : : "a"((unsigned char)(seen + 1)), "d"(0x5000));
    for (;;) call(231, seen);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a program for the guest with")
def test_a_device_written_in_python(tmp_path: Path) -> None:
    (tmp_path / "player.c").write_text(PLAYER)
    build = ["gcc", "-nostdlib", "-static", "-O1", "-fno-stack-protector", "-o", "player", "player.c"]
    subprocess.run(build, cwd=tmp_path, check=True)
    dice = Dice()
    with Machine("debian", engine=ENGINE, devices=[dice], shell=False) as machine:
        install = ["sh", "-c", "cat > /root/player && chmod +x /root/player"]
        machine.run(install, input=(tmp_path / "player").read_bytes(), check=True)
        assert machine.run(["/root/player"]).returncode == 4
        assert dice.written == [5]
        assert machine.power_off() == "poweroff"
