"""`ringzero run` from outside: statuses, streams, the terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ringzero import images

from .conftest import ENGINE, Run

pytestmark = pytest.mark.needs_debian


@pytest.mark.parametrize(
    ("script", "status"), [("true", 0), ("exit 7", 7), ("kill -15 $$", 128 + 15), ("nonesuch", 127)]
)
def test_the_commands_status_is_ours(ringzero: Run, script: str, status: int) -> None:
    assert ringzero("run", "debian", "--", "sh", "-c", script).returncode == status


def test_a_command_that_is_not_there(ringzero: Run) -> None:
    done = ringzero("run", "debian", "--", "nonesuch")
    assert (done.returncode, done.stdout) == (127, b"")
    assert done.stderr == b"ringzero: there is no command 'nonesuch' in the guest\n"
    assert ringzero("run", "debian", "--", "/etc/passwd").returncode == 126


def test_the_guest_finds_the_pci_bus_and_the_entropy_device(ringzero: Run) -> None:
    script = "cd /sys/bus/pci/devices && ls && cat 0000:00:01.0/vendor 0000:00:01.0/device 0000:00:01.0/irq"
    done = ringzero("run", "debian", "--", "sh", "-c", script)
    # The bridge, entropy, the balloon, and the agent's port.
    devices = b"0000:00:00.0\n0000:00:01.0\n0000:00:02.0\n0000:00:03.0\n"
    assert done.stdout == devices + b"0x1af4\n0x1044\n11\n", done.stderr


def test_streams_pass_through(ringzero: Run) -> None:
    done = ringzero("run", "debian", "--", "sh", "-c", "cat; echo err >&2", input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"in\n", b"err\n")


def test_ten_megabytes_come_back_identical(ringzero: Run) -> None:
    data = os.urandom(10_000_000)
    done = ringzero("run", "debian", "--", "cat", input=data, timeout=580)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data


def test_the_kernel_lies_where_it_was_linked_or_where_it_chose(ringzero: Run) -> None:
    linked = ringzero("run", "debian", "--", "grep", "-w", "_text", "/proc/kallsyms")
    assert linked.stdout.split()[0] == b"ffffffff81000000"
    chosen = ringzero("run", "debian", "--kaslr", "--", "grep", "-w", "_text", "/proc/kallsyms")
    assert chosen.stdout.endswith(b" T _text\n")  # at one of 500 places, the linked one among them


def test_a_script_on_standard_input(ringzero: Run) -> None:
    done = ringzero("run", "debian", input=b"echo one\nexit 9\n")
    assert (done.returncode, done.stdout) == (9, b"one\n")


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("poweroff; sleep 100", 0, ""),
        ("reboot; sleep 100", 3, "reboot"),
        ("echo c > /proc/sysrq-trigger", 4, "Kernel panic - not syncing: sysrq triggered crash"),
    ],
)
def test_the_guest_ends_under_its_command(ringzero: Run, script: str, status: int, words: str) -> None:
    done = ringzero("run", "debian", "--", "sh", "-c", script)
    assert done.returncode == status, done.stderr
    assert words in done.stderr.decode()


def test_a_kernel_without_a_root_panics_and_stands_still(ringzero: Run) -> None:
    kernel = images.pull("debian").kernel
    done = ringzero("run", "--kernel", str(kernel), "--append", "console=ttyS0")
    assert done.returncode == 4, done.stderr
    assert b"Kernel panic - not syncing: VFS" in done.stdout
    assert b"VFS" in done.stderr


def test_a_kernel_with_an_initramfs(ringzero: Run) -> None:
    image = images.pull("debian")
    words = "console=ttyS0 panic=-1 ringzero.poweroff"
    done = ringzero("run", "--kernel", str(image.kernel), "--initrd", str(image.initrd), "--append", words)
    assert done.returncode == 0, done.stderr
    assert b"Linux version 6.1" in done.stdout
    assert b"ringzero: /init reached" in done.stdout


@pytest.mark.parametrize("series", ["6.12"])
def test_the_other_kernel(ringzero: Run, series: str) -> None:
    done = ringzero("run", f"debian:{series}", "--", "uname", "-r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith(series)


def test_the_interpreter_boots_it_too(ringzero: Run) -> None:
    done = ringzero("run", "debian", "--", "uname", "-r", engine="interpret", timeout=550)
    assert (done.returncode, done.stdout[:4]) == (0, b"6.1."), done.stderr


def test_the_timeout(ringzero: Run) -> None:
    began = time.monotonic()
    done = ringzero("run", "debian", "--timeout", "0.5", "--", "sleep", "1000")
    assert done.returncode == 124
    assert b"--timeout" in done.stderr
    assert time.monotonic() - began < 30


def test_memory_too_small_for_the_initramfs(ringzero: Run, tmp_path: Path) -> None:
    kernel = images.pull("debian").kernel
    big = tmp_path / "big.cpio"
    with big.open("wb") as file:
        file.truncate(200 << 20)
    done = ringzero("run", "--kernel", str(kernel), "--initrd", str(big), "--memory", "128M")
    assert done.returncode == 2
    assert b"does not fit" in done.stderr


def test_a_damaged_kernel_is_fetched_or_refused(ringzero: Run, tmp_path: Path) -> None:
    whole = images.pull("debian").kernel.read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    done = ringzero("run", "--kernel", str(tmp_path / "half"))
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_a_command_line_that_is_too_long(ringzero: Run) -> None:
    done = ringzero("run", "debian", "--append", "x" * 3000, "--", "true")
    assert done.returncode == 2
    assert b"command line" in done.stderr


def test_output_closed_early() -> None:
    command = [sys.executable, "-m", "ringzero", "run", "debian", "--engine", ENGINE, "--", "yes"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 2
    assert said.startswith(b"ringzero: standard output was closed")
    assert said.count(b"\n") == 1


def test_a_signal_goes_to_the_command() -> None:
    script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 1; done"
    command = [
        sys.executable,
        "-m",
        "ringzero",
        "run",
        "debian",
        "--engine",
        ENGINE,
        "--",
        "sh",
        "-c",
        script,
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(60) == 5


class Terminal:
    """A terminal with `ringzero` on it."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (30, 100)) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(*size)
        self.theirs = theirs
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ringzero", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: bytes, seconds: float = 300) -> bytes:
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} did not come: {self.seen[-400:]!r}"
            if select.select([self.ours], [], [], left)[0]:
                self.seen += os.read(self.ours, 65536)
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def restored(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def open_one(*arguments: str, **options: object) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_a_shell_on_the_terminal(terminal) -> None:
    shell = terminal("run", "debian", "--engine", ENGINE)
    shell.expect(rb"# ")
    assert not shell.restored()
    time.sleep(1)
    shell.type(b"stty size\r")
    shell.expect(rb"30 100")
    shell.resize(50, 120)
    time.sleep(1)
    shell.type(b"stty size\r")
    shell.expect(rb"50 120")
    shell.type(b"sleep 1000\r")
    time.sleep(0.5)
    shell.type(b"\x03")  # goes to the guest: ringzero itself lives on
    shell.expect(rb"# ")
    shell.type(b"echo $TERM; exit\r")
    assert shell.process.wait(60) == 0
    assert shell.restored()


def test_leaving_with_the_escape_key(terminal) -> None:
    shell = terminal("run", "debian", "--engine", ENGINE)
    shell.expect(rb"# ")
    shell.type(b"\x1d")
    assert shell.process.wait(60) == 0
    shell.expect(rb"left the guest", 10)
    assert shell.restored()


def test_a_killed_ringzero_leaves_the_terminal_as_it_was(terminal) -> None:
    shell = terminal("run", "debian", "--engine", ENGINE)
    shell.expect(rb"# ")
    shell.process.send_signal(signal.SIGTERM)
    assert shell.process.wait(60) == 128 + 15
    assert shell.restored()


def test_a_command_with_a_terminal(terminal) -> None:
    shell = terminal("run", "debian", "--engine", ENGINE, "-t", "--", "sh", "-c", "tty; stty size; exit 3")
    shell.expect(rb"/dev/pts/0")
    shell.expect(rb"30 100")
    assert shell.process.wait(60) == 3
    assert shell.restored()
