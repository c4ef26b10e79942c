"""Pages that are put into the swap store: they come back as they were, or the guest does not run on."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import _core

MEMORY = 16 << 20
FIRST, COUNT = 256, 400
CODE, MARK = 0x1000, 0x3000
# 32-bit: goes through FIRST..FIRST+COUNT and reads a word of each page, for ever; [MARK] counts the rounds.
SWEEP = bytes.fromhex("be00001000 8b06 81c600100000 81fe00002900 75f0 ff05 00300000 ebe3")


def content(number: int, compresses: bool) -> bytes:
    """Return a page of which there is one for each number."""
    numbers = random.Random(number)
    return numbers.randbytes(900).ljust(4096, b"-") if compresses else numbers.randbytes(4096)


def machine() -> tuple[_core.Vm, dict[int, bytes]]:
    """Return a VM that sweeps through its pages when it is started, and these pages: every third does not compress."""
    vm = _core.Vm(MEMORY, engine="interpret")
    vm.write_memory(CODE, SWEEP)
    registers = {"rip": CODE, "rsp": 0x8000, "cr0": 0x11, "cs": 8, "idtr_limit": 0}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        registers |= {f"{name}_base": 0, f"{name}_limit": 0xFFFFFFFF, f"{name}_attributes": 0xC093}
    vm.set_registers(registers | {"cs_attributes": 0xC09B})
    pages = {page: content(page, page % 3 > 0) for page in range(FIRST, FIRST + COUNT)}
    for page, data in pages.items():
        vm.write_memory(page * 4096, data)
    return vm, pages


def check(vm: _core.Vm, pages: dict[int, bytes]) -> None:
    assert vm.memory_audit() == []
    for page, data in pages.items():
        assert vm.read_memory(page * 4096, 4096) == data, f"page {page}"
    assert vm.memory_audit() == []


def evict_all(vm: _core.Vm) -> str | None:
    """Evict until nothing is private any more, or nothing goes; return why not."""
    why = None
    for _ in range(50):
        if not vm.memory_counts()["private"]:
            return None
        gone, why = vm.memory_evict(1000)
        if not gone and why is not None:
            break
    return why


def swap_file(folder: Path) -> int:
    """Return a descriptor of our own of the file without a name in `folder`."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith(f"{folder}/"):
                return os.open(link, os.O_RDWR)
        except OSError:
            continue
    raise AssertionError(f"there is no swap file in {folder}")


@pytest.fixture
def swapped(tmp_path: Path) -> Iterator[tuple[_core.Vm, dict[int, bytes], int]]:
    """A VM all of whose pages are in the store, and the store's file."""
    vm, pages = machine()
    vm.set_swap(MEMORY, str(tmp_path), MEMORY)
    assert evict_all(vm) is None
    file = swap_file(tmp_path)
    yield vm, pages, file
    os.close(file)


def test_pages_come_back_from_memory_and_file(swapped: tuple[_core.Vm, dict[int, bytes], int]) -> None:
    vm, pages, file = swapped
    counts, known = vm.memory_counts(), vm.memory_swap()
    assert counts["private"] == 0
    assert counts["swapped"] == known["in_file"] == known["incompressible"] >= COUNT // 3
    assert counts["compressed"] == known["compressed"] >= COUNT // 2
    assert known["compressed_bytes"] < counts["compressed"] * 1200
    raw = os.pread(file, MEMORY, 0)
    assert len(raw) == counts["swapped"] * 4096
    assert not any(data[:64] in raw for data in pages.values()), "nothing of a guest is readable on the disk"
    check(vm, pages)
    known = vm.memory_swap()
    assert (known["compressed"], known["in_file"], known["lost"]) == (1, 0, 0), "all but that of the code"
    assert os.fstat(file).st_size == 0


def test_a_full_store_takes_no_more_and_loses_nothing(tmp_path: Path) -> None:
    vm, pages = machine()
    vm.set_swap(128 << 10, str(tmp_path), 50 * 4096)
    why = evict_all(vm)
    assert why is not None and "reached its size of 204800 bytes" in why
    counts = vm.memory_counts()
    assert counts["swapped"] == 50 and counts["compressed"] > 50 and counts["private"] > 100
    check(vm, pages)
    # There is room again for others.
    assert vm.memory_evict(100)[0] > 20
    check(vm, pages)


def test_without_a_file_pages_that_do_not_compress_stay() -> None:
    vm, pages = machine()
    assert vm.memory_evict(10) == (0, None), "there is no store"
    vm.set_swap(MEMORY)
    with pytest.raises(_core.CoreError, match="has a swap store already"):
        vm.set_swap(MEMORY)
    why = evict_all(vm)
    assert why is not None and "does not compress" in why
    counts = vm.memory_counts()
    assert counts["compressed"] > COUNT // 2 and counts["private"] >= COUNT // 3
    check(vm, pages)


def test_a_file_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    vm, _ = machine()
    with pytest.raises(_core.CoreError, match=r"swap store: .*No such file"):
        vm.set_swap(MEMORY, str(tmp_path / "gone"), MEMORY)
    vm.set_swap(MEMORY, str(tmp_path), MEMORY)


@pytest.mark.parametrize("damage", ["a bit", "cut off", "exchanged", "zeroes"])
def test_a_guest_whose_page_is_lost_ends_and_never_reads_another(
    swapped: tuple[_core.Vm, dict[int, bytes], int], damage: str
) -> None:
    vm, pages, file = swapped
    size = os.fstat(file).st_size
    if damage == "cut off":
        os.truncate(file, 0)
    for at in range(0, size, 4096):
        block = os.pread(file, 4096, at)
        if damage == "a bit":
            os.pwrite(file, bytes([block[9] ^ 4]), at + 9)
        elif damage == "zeroes":
            os.pwrite(file, bytes(4096), at)
        elif damage == "exchanged" and at % 8192 == 0:
            os.pwrite(file, os.pread(file, 4096, at + 4096) + block, at)
    in_file = [
        page for page in pages if vm.memory_states()[page] == list(vm.memory_counts()).index("swapped")
    ]
    assert in_file
    vm.start()
    why = vm.wait(20)
    assert why is not None and why.startswith("error: the guest's page at ")
    assert why.endswith("cannot be brought back from the swap store")
    assert vm.memory_swap()["lost"] > 0
    # What was compressed in memory is whole still.
    for page in pages:
        if page not in in_file:
            assert vm.read_memory(page * 4096, 4096) == pages[page]


def test_a_guest_runs_while_its_pages_go_and_come(tmp_path: Path) -> None:
    vm, pages = machine()
    vm.set_swap(64 << 10, str(tmp_path), MEMORY)
    vm.start()
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            vm.memory_evict(50)

    evictors = [threading.Thread(target=evict) for _ in range(2)]
    for evictor in evictors:
        evictor.start()
    while vm.memory_swap()["file_loads"] < 2000 and vm.wait(0.01) is None:
        pass
    stop.set()
    for evictor in evictors:
        evictor.join()
    vm.pause()
    assert int.from_bytes(vm.read_memory(MARK, 4), "little") > 3
    check(vm, pages)
    known = vm.memory_swap()
    assert known["spills"] > 10 and known["lost"] == 0
    vm.resume()
    vm.stop()
    assert vm.wait(20) == "stopped"


def test_a_killed_vm_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_swap as tests; from pathlib import Path\n"
        "vm, _ = tests.machine(); vm.set_swap(1 << 20, sys.argv[2], 16 << 20); tests.evict_all(vm)\n"
        "print(vm.memory_swap()['in_file'], flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > 100
        assert list(tmp_path.iterdir()) == []
        child.kill()
    assert list(tmp_path.iterdir()) == []
