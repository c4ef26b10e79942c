"""The Rust core as Python sees it: tiny guests in machine code, run under the interpreter.

The guests run in 32-bit protected mode without paging, which takes nothing but registers to set up.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from ringzero import _core
from ringzero._core import CoreError, Vm

MIB = 1 << 20
CODE = 0x1000
# Flat 32-bit segments: type 0xb (code) or 3 (data), present, 4 KiB granular.
FLAT_CODE, FLAT_DATA = 0xC09B, 0xC093

POWER_OFF = bytes.fromhex("66ba0406 66b80034 66ef")  # mov dx,0x604; mov ax,0x3400; out dx,ax
REBOOT = bytes.fromhex("66baf90c b006 ee")  # mov dx,0xcf9; mov al,6; out dx,al
HALT = bytes.fromhex("f4 ebfd")  # hlt; jmp to it
LOOP = bytes.fromhex("ebfe")  # jmp to itself
COUNT = bytes.fromhex("ff05 00300000 ebf8")  # inc dword [0x3000]; jmp back


def prepare(code: bytes, **options: object) -> Vm:
    """Return a machine that will run `code`."""
    vm = Vm(16 * MIB, **{"engine": "interpret", **options})  # type: ignore[arg-type]
    vm.write_memory(CODE, code)
    registers = {"rip": CODE, "rsp": 0x8000, "cr0": 0x11, "cs": 8, "idtr_limit": 0}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        registers[f"{name}_base"] = 0
        registers[f"{name}_limit"] = 0xFFFFFFFF
        registers[f"{name}_attributes"] = FLAT_CODE if name == "cs" else FLAT_DATA
    vm.set_registers(registers)
    return vm


def prepare64(code: bytes, **options: object) -> Vm:
    """Return a machine that will run `code` in 64-bit mode, its first 1 GiB mapped to itself."""
    vm = prepare(code, **options)
    tables = 0x10000
    for table, entry in [(0, tables + 0x1003), (0x1000, tables + 0x2003), (0x2000, 0x83)]:
        vm.write_memory(tables + table, entry.to_bytes(8, "little"))
    vm.set_registers({"cr3": tables, "cr4": 0x620, "efer": 0x500, "cr0": 0x80000033, "cs_attributes": 0xA09B})
    return vm


def run(code: bytes, **options: object) -> str | None:
    """Run `code` to its end and return why it ended."""
    vm = prepare(code, **options)
    vm.start()
    return vm.wait(60)


@pytest.fixture
def looping() -> Iterator[Vm]:
    """A machine that counts at 0x3000 for ever."""
    vm = prepare(COUNT)
    vm.start()
    yield vm
    vm.stop()
    assert vm.wait(60) == "stopped"


def counted(vm: Vm) -> int:
    """Pause, and return how far the guest has counted."""
    vm.pause()
    return int.from_bytes(vm.read_memory(0x3000, 4), "little")


# ---- what the machine is -----------------------------------------------------------------------------------


def test_engines_and_features_are_told() -> None:
    assert "interpret" in _core.engines()
    features = _core.host_features()
    assert len(str(features["vendor"])) == 12
    assert features["page_size"] == 4096
    assert isinstance(features["kvm"], bool)


def test_memory_map_has_a_hole_below_4_gib() -> None:
    assert Vm(16 * MIB, engine="interpret").memory_map()[0] == (0, 16 * MIB, "ram")
    rows = Vm(4096 * MIB, engine="interpret").memory_map()
    assert rows == [(0, 0xC0000000, "ram"), (0xC0000000, 0x40000000, "mmio"), (1 << 32, 0x40000000, "ram")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"memory": 0}, "guest memory of 0 bytes"),
        ({"memory": 4097 * 1024}, "is not a whole number of 4 KiB pages"),
        ({"memory": -1}, "the size of memory cannot be -1"),
        ({"memory": 1 << 80}, "the size of memory cannot be"),
        ({"cpus": 0}, "machines of 0 processors"),
        ({"cpus": 1000}, "machines of 1000 processors are not supported: give a number from 1 to 16"),
        ({"cpus": -1}, "the number of processors cannot be -1"),
        ({"engine": "turbo"}, "there is no engine 'turbo' here: choose one of"),
        ({"trace_path": "/nowhere/trace"}, "the trace file /nowhere/trace cannot be written"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    options = {"memory": 16 * MIB, "engine": "interpret", **arguments}
    with pytest.raises(CoreError) as caught:
        Vm(**options)  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_types_are_type_errors() -> None:
    with pytest.raises(TypeError):
        Vm("much")  # type: ignore[arg-type]
    vm = Vm(MIB, engine="interpret")
    with pytest.raises(TypeError):
        vm.write_memory(0, "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        vm.add_port_device(0x510, 1, object())  # type: ignore[arg-type]


# ---- memory and registers ----------------------------------------------------------------------------------


def test_memory_reads_back_and_ends_where_ram_ends() -> None:
    vm = Vm(MIB, engine="interpret")
    vm.write_memory(0xFFE, memoryview(bytearray(b"across a page")))
    assert vm.read_memory(0xFFE, 13) == b"across a page"
    assert vm.read_memory(MIB, 0) == b""
    for address, size in [(MIB - 1, 2), (MIB, 1), (1 << 63, 1), (0, 1 << 62)]:
        with pytest.raises(CoreError, match="no guest RAM"):
            vm.read_memory(address, size)
    with pytest.raises(CoreError):
        vm.read_memory(-1, 1)
    with pytest.raises(CoreError, match="no guest RAM"):
        vm.write_memory(MIB - 1, b"xx")


def test_registers_read_back_by_name() -> None:
    vm = Vm(MIB, engine="interpret")
    values = {"rax": (1 << 64) - 1, "r15": 5, "cs": 0x10, "gs_base": 0xFFFF_8000_0000_0000, "cr8": 3}
    vm.set_registers(values)
    registers = vm.registers()
    assert {name: registers[name] for name in values} == values
    assert {"rip", "rflags", "cr2", "efer", "tr_attributes", "ldtr_limit", "idtr_base"} <= registers.keys()


@pytest.mark.parametrize(
    "values", [{"rex": 1}, {"cs": 0x10000}, {"rax": -1}, {"rax": 1 << 64}, {"rbx": 7, "cr8": 16}]
)
def test_registers_that_cannot_be_change_nothing(values: dict[str, int]) -> None:
    vm = Vm(MIB, engine="interpret")
    before = vm.registers()
    with pytest.raises(CoreError):
        vm.set_registers(values)
    assert vm.registers() == before
    with pytest.raises(CoreError, match="no processor 1"):
        vm.registers(1)


# ---- how a machine ends ------------------------------------------------------------------------------------


def test_each_end_has_its_reason() -> None:
    assert run(POWER_OFF + HALT) == "poweroff"
    assert run(REBOOT + HALT) == "reboot"
    assert run(bytes.fromhex("0f0b")) == "triple-fault"  # ud2, without an IDT


def test_the_first_reason_counts() -> None:
    vm = prepare(HALT)
    vm.start()
    vm.request_end("panic")
    vm.stop()
    assert vm.wait(60) == "panic"
    assert vm.wait() == "panic"


def test_a_machine_runs_once() -> None:
    vm = prepare(POWER_OFF + HALT)
    with pytest.raises(CoreError, match="not started"):
        vm.wait()
    vm.start()
    assert vm.wait(60) == "poweroff"
    with pytest.raises(CoreError, match="started already"):
        vm.start()
    assert vm.registers()["rax"] & 0xFFFF == 0x3400


def test_a_halted_machine_costs_nothing_and_can_be_stopped() -> None:
    vm = prepare(HALT)
    vm.start()
    assert vm.wait(0.2) is None
    before = time.process_time()
    assert vm.wait(1) is None
    assert time.process_time() - before < 0.1
    vm.stop()
    assert vm.wait(60) == "stopped"


def test_ctrl_c_ends_a_wait() -> None:
    vm = prepare(HALT)
    vm.start()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vm.wait(60)
    vm.stop()
    assert vm.wait(60) == "stopped"


def test_the_interpreter_can_exit_with_a_machine_running() -> None:
    code = f"""
from ringzero._core import Vm
class Device:
    def read(self, offset, size): return 0
    def write(self, offset, size, value): pass
vm = Vm(16 << 20, engine="interpret")
vm.write_memory({CODE}, bytes.fromhex("66ba1005 ec ebfd"))
flat = {{f"{{n}}_attributes": {FLAT_DATA} for n in ("ss", "ds", "es")}} | {{"cs_attributes": {FLAT_CODE}}}
vm.set_registers(flat | {{"cs_base": 0, "cs_limit": 0xffffffff, "rip": {CODE}, "cr0": 0x11}})
vm.add_port_device(0x510, 1, Device())
vm.start()
assert vm.wait(0.2) is None
print("leaving")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "leaving\n", "")


@pytest.mark.parametrize("engine", _core.engines())
@pytest.mark.parametrize("mode", [prepare, prepare64])
def test_random_bytes_end_or_are_stopped(engine: str, mode: Callable[..., Vm]) -> None:
    for seed in range(25):
        random = Random(seed)
        vm = mode(random.randbytes(4096), engine=engine)
        vm.set_registers({"idtr_base": 0x4000, "idtr_limit": 0xFFF, "rdi": random.getrandbits(64)})
        vm.write_memory(0x4000, random.randbytes(4096))
        vm.start()
        reason = vm.wait(0.02)
        if reason is None:
            vm.stop()
            reason = vm.wait(60)
        assert reason is not None
        assert "defect" not in reason, f"seed {seed}"


# ---- pause and go on ---------------------------------------------------------------------------------------


def test_a_paused_machine_stands_still(looping: Vm) -> None:
    with pytest.raises(CoreError, match="pause the machine first"):
        looping.read_memory(0, 1)
    with pytest.raises(CoreError, match="pause the machine first"):
        looping.registers()
    before = counted(looping)
    time.sleep(0.05)
    assert counted(looping) == before
    assert looping.registers()["rip"] in (CODE, CODE + 6)
    looping.resume()
    looping.resume()
    deadline = time.monotonic() + 30
    while counted(looping) == before:
        looping.resume()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_page_moves_under_a_running_guest(looping: Vm) -> None:
    last, moved = 0, 0
    for _ in range(50):
        for page in (CODE, 0x3000):
            moved += looping.remap_page(page)
        now = counted(looping)
        looping.resume()
        assert now >= last
        last = now
    # On a busy machine the guest may not have had its turn between two stops yet.
    deadline = time.monotonic() + 30
    while counted(looping) == 0:
        looping.resume()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert looping.stats()["memory.moved"] == moved > 50, "a page stays only while it is in use all the time"
    with pytest.raises(CoreError, match="no guest RAM"):
        looping.remap_page(1 << 40)


def test_counters_have_names(looping: Vm) -> None:
    time.sleep(0.05)
    stats = looping.stats()
    assert stats["memory.ram_bytes"] == 16 * MIB
    assert 0 < stats["memory.touched_bytes"] <= MIB
    assert stats["interpret.instructions"] > 0


@pytest.mark.parametrize(
    ("engine", "where"), [("translate", "profile.kernel"), ("interpret", "profile.interpret")]
)
def test_a_profile_says_what_a_processor_did(engine: str, where: str) -> None:
    # cpuid; jmp back: the translator leaves it to the interpreter
    vm = prepare64(bytes.fromhex("0fa2 ebfc"), engine=engine, profile=True)
    vm.start()
    deadline = time.monotonic() + 60
    while (stats := vm.stats())[where] == 0:
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)
    vm.stop()
    assert stats["profile.idle"] == stats["profile.user"] == stats["profile.lost"] == 0
    if engine == "translate":
        assert stats["interpreted.Cpuid"] > 0
        blocks = {f"profile.kernel_block.{rip:x}" for rip in (CODE, CODE + 2)}
        assert sum(stats.get(block, 0) for block in blocks) == stats["profile.kernel"]


def test_the_profile_of_a_sleeping_guest_is_idle() -> None:
    vm = prepare(HALT, profile=True)
    vm.start()
    deadline = time.monotonic() + 60
    while vm.stats()["profile.idle"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    vm.stop()


def test_nobody_is_sampled_unasked(looping: Vm) -> None:
    assert not [name for name in looping.stats() if name.startswith("profile.")]


def test_a_trace_has_a_line_an_instruction(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert run(POWER_OFF + HALT, trace_path=str(path)) == "poweroff"
    lines = path.read_text().splitlines()
    assert lines[:3] == ["0 1000 rdx=604", "1 1004 rax=3400", "2 1008"]


# mov ecx,10; again: add rax,rcx; imul rbx,rax,3; movd xmm0,eax; paddd xmm1,xmm0; push rax; pop rdx;
# mov [0x3000],rdx; xor [0x3004],edx; dec ecx; jnz again
COMPUTE = bytes.fromhex(
    "b90a000000 4801c8 486bd803 660f6ec0 660ffec8 50 5a 48891425 00300000 31142504300000 ffc9 75dc"
)


@pytest.mark.skipif("translate" not in _core.engines(), reason="no translator in this build")
def test_both_engines_make_the_same_trace(tmp_path: Path) -> None:
    traces = {}
    for engine in ("interpret", "translate"):
        path = tmp_path / engine
        vm = prepare64(COMPUTE + POWER_OFF + HALT, engine=engine, trace_path=str(path))
        vm.start()
        assert vm.wait(60) == "poweroff"
        traces[engine] = path.read_text().splitlines()
    assert len(traces["interpret"]) == 104
    assert traces["translate"] == traces["interpret"]


# ---- devices -----------------------------------------------------------------------------------------------


class Recorder:
    """Remembers what it was asked; reads answer with what `answer` returns."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.seen: list[tuple[int, ...]] = []
        self.threads: set[int] = set()

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        self.threads.add(threading.get_ident())
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))
        self.threads.add(threading.get_ident())


# mov dx,0x512; in eax,dx; mov [0x3000],eax; mov al,0x5a; out dx,al
READ_AND_WRITE = bytes.fromhex("66ba1205 ed a300300000 b05a ee")


def test_a_python_device_is_asked_by_one_thread() -> None:
    device = Recorder(0x11223344)
    vm = prepare(READ_AND_WRITE + POWER_OFF + HALT)
    vm.add_port_device(0x510, 8, device)
    vm.start()
    assert vm.wait(60) == "poweroff"
    assert device.seen == [(2, 4), (2, 1, 0x5A)]
    assert len(device.threads) == 1
    assert threading.get_ident() not in device.threads
    assert vm.read_memory(0x3000, 4) == bytes.fromhex("44332211")


def test_ports_that_are_taken_are_refused() -> None:
    vm = prepare(HALT)
    with pytest.raises(CoreError, match="overlap"):
        vm.add_port_device(0x3F8, 8, Recorder())
    with pytest.raises(CoreError):
        vm.add_port_device(0xFFFF, 2, Recorder())
    with pytest.raises(CoreError):
        vm.add_port_device(0x10000, 1, Recorder())
    vm.start()
    with pytest.raises(CoreError, match="started already"):
        vm.add_port_device(0x510, 8, Recorder())
    vm.stop()
    assert vm.wait(60) == "stopped"


def test_an_exception_in_a_device_ends_the_machine_with_a_sentence() -> None:
    class Broken(Recorder):
        def read(self, offset: int, size: int) -> int:
            raise ValueError("no such register")

    vm = prepare(READ_AND_WRITE + POWER_OFF + HALT)
    vm.add_port_device(0x510, 8, Broken())
    vm.start()
    reason = vm.wait(60)
    assert reason is not None
    assert reason.startswith("error: device Broken: ValueError: no such register (")
    assert Path(__file__).name in reason


def test_an_answer_that_is_no_value_ends_the_machine() -> None:
    vm = prepare(READ_AND_WRITE + POWER_OFF + HALT)
    vm.add_port_device(0x510, 8, Recorder(1 << 32))
    vm.start()
    assert vm.wait(60) == "error: device Recorder: read returned 0x100000000, which is more than 4 bytes hold"


def test_a_machine_can_be_stopped_while_a_device_hangs() -> None:
    called, free = threading.Event(), threading.Event()

    class Hanging(Recorder):
        def read(self, offset: int, size: int) -> int:
            called.set()
            free.wait(60)
            return 0

    vm = prepare(READ_AND_WRITE + POWER_OFF + HALT)
    vm.add_port_device(0x510, 8, Hanging())
    vm.start()
    assert called.wait(60)
    vm.stop()
    assert vm.wait(60) == "stopped"
    free.set()


def test_a_device_can_end_its_machine_but_not_wait_for_it() -> None:
    class Ending(Recorder):
        refused: str = ""

        def read(self, offset: int, size: int) -> int:
            try:
                vm.wait()
            except CoreError as error:
                self.refused = str(error)
            assert vm.stats()["memory.ram_bytes"] == 16 * MIB
            vm.request_end("panic")
            return 0

    device = Ending()
    vm = prepare(READ_AND_WRITE + POWER_OFF + HALT)
    vm.add_port_device(0x510, 8, device)
    vm.start()
    assert vm.wait(60) == "panic"
    assert device.refused.startswith("wait cannot be called from a device")


def test_dropping_a_running_machine_ends_it() -> None:
    device = Recorder()
    vm = prepare(bytes.fromhex("66ba1205 ed ebfd"))  # in eax,dx for ever
    vm.add_port_device(0x510, 8, device)
    vm.start()
    while not device.seen:
        time.sleep(0.01)
    del vm
    gc.collect()
    count = len(device.seen)
    time.sleep(0.05)
    assert len(device.seen) == count


def test_a_serial_port_is_a_socket() -> None:
    # mov dx,0x3f8; mov al,'h'; out dx,al; mov al,'i'; out dx,al
    vm = prepare(bytes.fromhex("66baf803 b068 ee b069 ee") + HALT)
    line = socket.socket(fileno=vm.serial_fd(0))
    line.settimeout(60)
    with line:
        with pytest.raises(CoreError):
            vm.serial_fd(0)
        with pytest.raises(CoreError):
            vm.serial_fd(4)
        vm.start()
        data = b""
        while len(data) < 2:
            data += line.recv(100)
        assert data == b"hi"
        vm.stop()
        assert vm.wait(60) == "stopped"


def test_all_that_was_sent_arrives_before_the_end_of_the_stream() -> None:
    # mov dx,0x3f8; mov ecx,10000; mov al,'x'; out dx,al; loop; then power off
    code = bytes.fromhex("66baf803 b910270000 b078 ee e2fd") + POWER_OFF + HALT
    vm = prepare(code)
    line = socket.socket(fileno=vm.serial_fd(0))
    line.settimeout(60)
    with line:
        vm.start()
        assert vm.wait(60) == "poweroff"
        data = b""
        while block := line.recv(65536):
            data += block
    # A guest that does not look whether the transmitter is free loses bytes, as on hardware.
    assert 0 < len(data) <= 10000
    assert set(data) == {ord("x")}


def test_interrupt_lines_have_numbers() -> None:
    vm = prepare(HALT)
    vm.raise_irq(5, True)
    vm.raise_irq(5, False)
    with pytest.raises(CoreError, match="interrupt lines are 0 to 15"):
        vm.raise_irq(16, True)
