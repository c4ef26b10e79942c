"""The arithmetic of `ringzero bench io`, and the program that guests run for it. Nothing is timed."""

import subprocess
from pathlib import Path

import pytest

from ringzero.bench import guests
from ringzero.bench.engines import Run
from ringzero.bench.figures import sample
from ringzero.bench.io.block import AIO, ITEMS, BlockBench
from ringzero.bench.io.command import ITEMS as IO_ITEMS
from ringzero.bench.io.command import SMALL, IoBench
from ringzero.errors import GuestError, InputError


def test_there_is_a_small_one_of_each_item_and_no_other() -> None:
    assert set(IO_ITEMS) == set(SMALL)
    with pytest.raises(InputError, match="there is no item 'tape'"):
        IoBench(["tape"])


def _run(*lines: str, status: int = 0) -> Run:
    return Run(1.0, status, False, [(0.0, line) for line in lines])


def test_the_best_round_counts_and_a_run_that_is_not_whole_is_refused() -> None:
    lines = [
        f"DISK {item} {nanoseconds} 1000 {7:016x}" for item in ITEMS for nanoseconds in (4000000, 2000000)
    ]
    sums: dict[str, set[str]] = {item: set() for item in ITEMS}
    rates = BlockBench()._rates(_run(*lines, "PASS"), "ringzero", sums)
    assert rates == dict.fromkeys(ITEMS, 500000.0)
    assert all(found == {f"{7:016x}"} for found in sums.values())
    for broken in (_run(*lines), _run(*lines[:2], "PASS"), _run(*lines, "PASS", status=1)):
        with pytest.raises(GuestError, match="did not come to its end"):
            BlockBench()._rates(broken, "ringzero", sums)


def test_ours_is_compared_with_the_best_of_qemus() -> None:
    rates = {"ringzero": 300.0, "native": 600.0} | dict.fromkeys(AIO, 50.0) | {"qemu threads": 100.0}
    samples = {engine: {item: sample([rate]) for item in ITEMS} for engine, rate in rates.items()}
    outcome = BlockBench()._outcome(samples, ["a clock is wrong"])
    ratios = [figure.value for figure in outcome.figures if figure.name == "  times QEMU's best"]
    assert ratios == [3.0] * 4
    assert [figure.name for figure in outcome.figures if not figure.meets] == ["complaints"]


def test_the_program_reads_what_it_wrote_and_finds_records_that_are_not_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    program = str(guests.disk_program())

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], capture_output=True, text=True, check=False)

    written = run("records", str(disk), "5")
    assert written.stdout.splitlines()[-2:] == ["DONE 256", "PASS"], "all pages of the disk"
    assert run("check", str(disk), "5", "256").returncode == 0
    assert "LOST 0" in run("check", str(disk), "6", "256").stdout
    content = bytearray(disk.read_bytes())
    content[100 * 4096 + 9] ^= 1
    disk.write_bytes(content)
    assert "LOST" in run("check", str(disk), "5", "256").stdout
