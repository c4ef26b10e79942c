"""Pages move to other machine pages under a running guest, and it never notices."""

import fcntl
import os
import time
from pathlib import Path

import pytest

from ringzero import _core
from ringzero._core import CoreError, Vm

MIB = 1 << 20
CODE, RESULT, STACK, TABLES, DATA = 0x1000, 0x3000, 0x8000, 0x10000, 0x100000
WORDS = 0x8000
ROUNDS = {"interpret": 25, "translate": 200, "direct": 200}
ROUNDS_AT = CODE + 14
PAGES = WORDS * 8 // 4096
MULTIPLIER = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1

# Each round goes over 256 KiB: sum = (sum + word) * multiplier; word ^= sum. So one byte of an old copy of a page
# spoils the rest. The multiplication is called, so that the stack page matters too. Then it powers off.
PROGRAM = bytes.fromhex(
    "31c0"  # xor eax, eax
    "49b8 157c4a7fb979379e"  # mov r8, MULTIPLIER
    "41b9 00000000"  # mov r9d, ROUNDS
    f"be {DATA.to_bytes(4, 'little').hex()}"  # round: mov esi, DATA
    f"b9 {WORDS.to_bytes(4, 'little').hex()}"  # mov ecx, WORDS
    "480306"  # word: add rax, [rsi]
    "e823000000"  # call multiply
    "483106"  # xor [rsi], rax
    "4883c608"  # add rsi, 8
    "ffc9"  # dec ecx
    "75ed"  # jnz word
    "41ffc9"  # dec r9d
    "75de"  # jnz round
    "48890425 00300000"  # mov [RESULT], rax
    "66ba0406 66b80034 66ef f4"  # power off; hlt
    "490fafc0 c3"  # multiply: imul rax, r8; ret
)


@pytest.fixture(scope="module")
def answers() -> dict[int, int]:
    """What the guest computes, by the number of rounds."""
    words, total, answers = [n * n for n in range(WORDS)], 0, {}
    for done in range(1, max(ROUNDS.values()) + 1):
        for index, word in enumerate(words):
            total = (total + word) * MULTIPLIER & MASK
            words[index] = word ^ total
        answers[done] = total
    return answers


def prepare(engine: str, *, loaded: bool = True) -> Vm:
    """Return a machine in 64-bit mode, its first 16 MiB mapped by small pages."""
    vm = Vm(16 * MIB, engine=engine)
    if loaded:
        vm.write_memory(CODE, PROGRAM)
        vm.write_memory(ROUNDS_AT, ROUNDS[engine].to_bytes(4, "little"))
        vm.write_memory(DATA, b"".join((n * n).to_bytes(8, "little") for n in range(WORDS)))
    entries = [TABLES + 0x1003, TABLES + 0x2003, *(TABLES + 0x3003 + (n << 12) for n in range(8))]
    for address, entry in zip(
        [TABLES, TABLES + 0x1000, *(TABLES + 0x2000 + 8 * n for n in range(8))], entries, strict=True
    ):
        vm.write_memory(address, entry.to_bytes(8, "little"))
    vm.write_memory(TABLES + 0x3000, b"".join((n << 12 | 3).to_bytes(8, "little") for n in range(4096)))
    registers = {"rip": CODE, "rsp": STACK, "idtr_limit": 0, "cs": 8, "cr3": TABLES, "cr4": 0x620}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        registers[f"{name}_base"] = 0
        registers[f"{name}_limit"] = 0xFFFFFFFF
        registers[f"{name}_attributes"] = 0xA09B if name == "cs" else 0xC093
    vm.set_registers(registers | {"efer": 0x500, "cr0": 0x80000033})
    return vm


@pytest.mark.parametrize("engine", _core.engines())
def test_all_pages_move_while_a_guest_computes(engine: str, answers: dict[int, int]) -> None:
    vm = prepare(engine)
    vm.start()
    pages = [CODE, STACK - 0x1000, *(TABLES + (n << 12) for n in range(11))]
    pages += [DATA + (n << 12) for n in range(PAGES)]
    moved, tried, deadline = 0, 0, time.monotonic() + 60
    while vm.wait(0) is None:
        assert time.monotonic() < deadline
        moved += vm.remap_page(pages[tried % len(pages)])
        tried += 1
    assert vm.wait() == "poweroff"
    assert int.from_bytes(vm.read_memory(RESULT, 8), "little") == answers[ROUNDS[engine]]
    assert moved > 50, "the guest was too fast to be disturbed"


@pytest.mark.parametrize("engine", _core.engines())
def test_pages_come_and_go_while_a_guest_computes(
    engine: str, answers: dict[int, int], tmp_path: Path
) -> None:
    """Pages are put into the swap store, and come back, and those of zeroes go."""
    vm = prepare(engine)
    vm.set_swap(1 << 20, str(tmp_path), 1 << 20)
    vm.start()
    evicted, deadline = 0, time.monotonic() + 60
    while vm.wait(0) is None:
        assert time.monotonic() < deadline
        pages, full = vm.memory_evict(4)
        assert full is None
        evicted += pages
        vm.memory_scan(64)
        vm.memory_sample(8)
    assert vm.wait() == "poweroff"
    assert int.from_bytes(vm.read_memory(RESULT, 8), "little") == answers[ROUNDS[engine]]
    assert evicted > 50, "the guest was too fast to be disturbed"
    assert vm.memory_audit() == []
    counts, swap = vm.memory_counts(), vm.memory_swap()
    assert sum(counts.values()) == 4096
    assert (counts["compressed"], counts["swapped"]) == (swap["compressed"], swap["in_file"])


@pytest.mark.parametrize("engine", _core.engines())
def test_a_guest_begins_with_pages_that_others_have(engine: str, answers: dict[int, int]) -> None:
    data = b"".join((n * n).to_bytes(8, "little") for n in range(WORDS))
    code = PROGRAM[:14] + ROUNDS[engine].to_bytes(4, "little") + PROGRAM[18:]
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    os.write(fd, code.ljust(4096, b"\0") + data)
    unused = Vm(16 * MIB)
    with pytest.raises(CoreError, match="sealed"):
        unused.map_image(fd, [(0, 0, 1)])
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    for runs, sentence in (
        ([(16 * MIB - 4096, 0, 2)], "no guest RAM"),
        ([(DATA + 1, 0, 1)], "no guest RAM"),
        ([(DATA, PAGES, 2)], "source"),
        ([(DATA, 0, 1), (DATA, 1, 1)], "written to already"),
    ):
        with pytest.raises(CoreError, match=sentence):
            unused.map_image(fd, runs)
    vms = [prepare(engine, loaded=False) for _ in range(2)]
    for vm in vms:
        vm.map_image(fd, [(CODE, 0, 1), (DATA, 1, PAGES)])
        assert vm.memory_counts()["image"] == PAGES + 1
    for vm in vms:
        vm.start()
    for vm in vms:
        assert vm.wait(60) == "poweroff"
        assert int.from_bytes(vm.read_memory(RESULT, 8), "little") == answers[ROUNDS[engine]]
        assert vm.memory_counts()["image"] == 1, "the code is common still"
        assert vm.memory_audit() == []
        with pytest.raises(CoreError, match="started"):
            vm.map_image(fd, [])
    os.close(fd)


@pytest.mark.parametrize("engine", _core.engines())
def test_a_machine_stands_still_again_and_again(engine: str, answers: dict[int, int]) -> None:
    vm = prepare(engine)
    vm.start()
    pauses = 0
    while vm.wait(0.001) is None:
        vm.pause()
        registers = vm.registers()
        assert registers["rip"] - CODE in range(len(PROGRAM))
        assert registers["r8"] in (0, MULTIPLIER)
        word = vm.read_memory(DATA, 8)
        assert vm.read_memory(DATA, 8) == word
        vm.resume()
        pauses += 1
    assert vm.wait() == "poweroff"
    assert int.from_bytes(vm.read_memory(RESULT, 8), "little") == answers[ROUNDS[engine]]
    assert pauses > 2
