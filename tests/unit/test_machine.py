"""The Machine, on a core played by the test: what it composes, how it ends, how it cleans up."""

import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import ClassVar

import pytest

import ringzero
from ringzero.errors import GuestEnded, InputError
from ringzero.images import Image
from ringzero.machine import assemble as assemble_module
from ringzero.machine import machine as machine_module
from ringzero.machine.frames import (
    ACK,
    CREDIT,
    EXEC,
    EXIT,
    HEADER,
    MAGIC,
    POWEROFF,
    READY,
    STDIN,
    STDIN_EOF,
    STDOUT,
    WORD,
)
from ringzero.machine.machine import Machine


class CoreError(Exception):
    pass


class FakeVm:
    """Says what a guest would say: a console, and an agent that knows `echo`, `cat`, `sleep` and `false`."""

    made: ClassVar[list["FakeVm"]] = []

    def __init__(self, memory: int, **options: object) -> None:
        self.memory, self.options = memory, options
        self.ports = [socket.socketpair() for _ in range(2)]
        self.taken: list[int] = []
        self.reason: str | None = None
        self.over = threading.Event()
        self.paused = False
        FakeVm.made.append(self)

    def serial_fd(self, index: int) -> int:
        self.taken.append(index)
        return self.ports[index][0].detach()

    def start(self) -> None:
        threading.Thread(target=self.agent, daemon=True).start()

    def say(self, text: bytes) -> None:
        self.ports[0][1].sendall(text)

    def request_end(self, reason: str) -> None:
        if not self.over.is_set():
            self.reason = reason
            for port in self.ports:
                port[1].shutdown(socket.SHUT_RDWR)
            self.over.set()

    def stop(self) -> None:
        self.request_end("stopped")

    def wait(self, timeout: float | None = None) -> str | None:
        return self.reason if self.over.wait(timeout) else None

    def pause(self) -> None:
        if self.over.is_set():
            raise CoreError("the machine has ended")
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def registers(self, cpu: int = 0) -> dict[str, int]:
        if not self.paused:
            raise CoreError("the machine runs: pause it first")
        return {"rip": 0x1000}

    def read_memory(self, address: int, size: int) -> bytes:
        return bytes(size)

    def stats(self) -> dict[str, int]:
        return {"tlb.misses": 1}

    def agent(self) -> None:
        line = self.ports[1][1]

        def send(kind: int, number: int, payload: bytes = b"") -> None:
            line.sendall(HEADER.pack(kind, 0, number, len(payload)) + payload)

        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                piece = line.recv(size - len(data))
                if not piece:
                    raise ConnectionResetError
                data += piece
            return data

        try:
            send(READY, 0, MAGIC + WORD.pack(1))
            while True:
                kind, _, number, size = HEADER.unpack(exactly(HEADER.size))
                payload = exactly(size)
                send(ACK, 0, WORD.pack(HEADER.size + size))
                words = payload[8:].split(b"\0")
                if kind == POWEROFF:
                    self.request_end("poweroff")
                elif kind == EXEC and words[1] == b"echo":
                    send(STDOUT, number, b" ".join(words[2:-1]).partition(b"HOME=")[0].strip() + b"\n")
                    send(EXIT, number, WORD.pack(0))
                elif kind == EXEC and words[1] == b"false":
                    send(EXIT, number, WORD.pack(1 << 8))
                elif kind == EXEC and words[1] == b"die":
                    self.request_end("panic")
                elif kind == STDIN:
                    send(CREDIT, number, WORD.pack(size))
                    send(STDOUT, number, payload)
                elif kind == STDIN_EOF:
                    send(EXIT, number, WORD.pack(0))
        except OSError:
            pass


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A way to make machines on the fake core; gives (make, the vms that were made)."""
    core = types.ModuleType("ringzero._core")
    core.Vm, core.CoreError, core.engines = FakeVm, CoreError, lambda: ["direct", "translate", "interpret"]
    core.Disk, core.Console = type("Disk", (), {}), lambda names, consoles: object()
    monkeypatch.setitem(sys.modules, "ringzero._core", core)
    monkeypatch.setattr(ringzero, "_core", core, raising=False)
    monkeypatch.setattr(assemble_module, "attach_devices", lambda vm, devices: None)
    plan = types.SimpleNamespace(load=lambda vm, sealed: None)
    plans: list[dict[str, object]] = []

    def plan_boot(kernel: bytes, **options: object) -> object:
        plans.append(options)
        return plan

    monkeypatch.setattr(assemble_module, "plan_boot", plan_boot)
    monkeypatch.setattr(FakeVm, "made", [])
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    image = Image("test", tmp_path / "kernel", tmp_path / "initrd", "console=ttyS0", agent=True)

    def make(**options: object) -> Machine:
        options.setdefault("image", image)
        machine = Machine(options.pop("image"), **options)
        machine.plans = plans
        return machine

    return make


def test_run_is_like_subprocess_run(vm) -> None:
    with vm() as machine:
        done = machine.run(["echo", "a", "b"], text=True)
        assert isinstance(done, subprocess.CompletedProcess)
        assert (done.returncode, done.stdout, done.stderr) == (0, "a b\n", "")
        assert machine.run(["cat"], input=b"x" * 200_000).stdout == b"x" * 200_000
        assert machine.run(["cat"], input="caf\u00e9", text=True).stdout == "caf\u00e9"
        assert machine.run(["false"]).returncode == 1
        with pytest.raises(subprocess.CalledProcessError):
            machine.run(["false"], check=True)
        with pytest.raises(subprocess.TimeoutExpired):
            machine.run(["sleep"], timeout=0.2)


def test_the_command_line_of_an_image(vm) -> None:
    with vm(append="debug") as machine:
        assert machine.plans[0]["command_line"] == "console=ttyS0 quiet ringzero.agent ringzero.shell debug"
    with vm(shell=False, quiet=False) as machine:
        assert machine.plans[1]["command_line"] == "console=ttyS0 ringzero.agent"


def test_a_kernel_alone(vm, tmp_path: Path) -> None:
    with vm(image=None, kernel=tmp_path / "kernel", append="x=1") as machine:
        assert machine.plans[0]["command_line"] == "x=1"
        assert machine.plans[0]["initrd"] is None
        assert not machine.has_agent
        assert FakeVm.made[0].taken == [0]
        with pytest.raises(InputError, match="no agent"):
            machine.run(["true"])


def test_a_kernel_in_the_place_of_an_images(vm, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    with vm(kernel=tmp_path / "mine") as machine:
        assert machine.plans[0]["name"] == str(tmp_path / "mine")
        assert machine.plans[0]["initrd"] == b"initrd"
        assert machine.has_agent


def test_the_end_by_power_off(vm) -> None:
    with vm() as machine:
        assert machine.end_reason is None
        assert machine.wait(0) is None
        assert machine.power_off() == "poweroff"
    assert machine.end_reason == "poweroff"


def test_leaving_the_block_stops_and_cleans_up(vm) -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeError), vm() as machine:
        raise RuntimeError
    assert machine.end_reason == "stopped"
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    machine.stop()  # again does nothing


def test_a_reset_after_a_panic_is_a_panic(vm) -> None:
    with vm() as machine:
        FakeVm.made[0].say(
            b"[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    1.6] Call Trace:\r\n"
        )
        machine.console.expect("Trace")
        FakeVm.made[0].request_end("reboot")
        assert machine.wait(20) == "panic"
        assert machine.panic_message() == "Kernel panic - not syncing: VFS: Unable to mount root fs"


def test_a_reset_is_a_reboot(vm) -> None:
    with vm() as machine:
        FakeVm.made[0].say(b"# echo Kernel panic - not syncing\r\n[    2.0] reboot: Restarting system\r\n")
        FakeVm.made[0].request_end("reboot")
        assert machine.wait(20) == "reboot"


def test_a_panicked_kernel_that_stands_still_is_ended(vm) -> None:
    with vm() as machine:
        FakeVm.made[0].say(
            b"[    1.5] Kernel panic - not syncing: Attempted to kill init!\r\n"
            b"[    1.6] ---[ end Kernel panic - not syncing: Attempted to kill init! ]---\r\n"
        )
        assert machine.wait(20) == "panic"


def test_somebody_who_prints_an_old_panic_is_left_alone(vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "PANIC_SILENCE", 0.0)
    with vm() as machine:
        FakeVm.made[0].say(b"[    1.6] ---[ end Kernel panic - not syncing: x ]---\r\nroot@ringzero:~# ")
        assert machine.wait(2.5) is None


def test_the_guest_ends_under_a_command(vm) -> None:
    with vm() as machine:
        with pytest.raises(GuestEnded) as caught:
            machine.run(["die"])
        assert caught.value.reason == "panic"


def test_what_the_core_refuses_is_one_sentence(vm) -> None:
    with vm() as machine:
        with pytest.raises(InputError, match="pause it first"):
            machine.registers()
        machine.pause()
        assert machine.registers()["rip"] == 0x1000
        assert machine.read_memory(0, 4) == bytes(4)
        machine.resume()


def test_a_machine_that_was_not_started(vm) -> None:
    machine = vm()
    for call in (machine.wait, machine.pause, lambda: machine.run(["true"]), lambda: machine.console):
        with pytest.raises(InputError, match="not started"):
            call()
    machine.stop()


def test_a_machine_lives_once(vm) -> None:
    with vm() as machine, pytest.raises(InputError, match="another one"):
        machine.start()


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "banana"},
        {"memory": "-1"},
        {"memory": "9999T"},
        {"memory": "0"},
        {"cpus": 0},
        {"engine": "warp"},
        {"image": "windows"},
    ],
)
def test_what_can_be_seen_to_be_wrong_is_refused_at_once(vm, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        vm(**options)


def test_memory_too_small_for_linux_is_refused_at_start(vm) -> None:
    with pytest.raises(InputError, match="64M"):
        vm(memory="8M").start()


def test_the_package_names_what_it_offers() -> None:
    for name in ringzero.__all__:
        assert getattr(ringzero, name) is not None
    with pytest.raises(AttributeError):
        ringzero.nothing  # noqa: B018
