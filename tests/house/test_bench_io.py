"""The arithmetic of `ringzero bench io`, and the program that guests run for it. Nothing is timed."""

import json
import subprocess
from pathlib import Path

import pytest

from ringzero.bench import guests
from ringzero.bench.engines import Run
from ringzero.bench.figures import sample
from ringzero.bench.io.block import AIO, ITEMS, BlockBench
from ringzero.bench.io.command import ITEMS as IO_ITEMS
from ringzero.bench.io.command import SMALL, IoBench
from ringzero.bench.io.network import BAR, BARRED, NetworkBench, measured
from ringzero.bench.io.network import ITEMS as NETWORK_ITEMS
from ringzero.bench.io.network_guest import Words
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


def _said(item: str, status: int, *lines: str) -> list[str]:
    return [f"NETWORK-ITEM {item}", *lines, f"NETWORK-STATUS {status}"]


def test_what_arrived_counts_in_the_seconds_of_the_host() -> None:
    end = {"sum_sent": {"bytes": 3e9, "seconds": 2.0}, "sum_received": {"bytes": 1e9, "seconds": 4.0}}
    told = json.dumps({"end": end}, indent=1).splitlines()
    half = "  0:       1 bytes   2000 times -->      0.20 Mbps in      25.00 usec"
    lines = _said("up", 0, *told) + _said("down", 0, *told) + _said("latency", 0, "NetPIPE", half)
    assert measured(_run(*lines)) == {"up": 2.0, "down": 4.0, "latency": 20000.0}
    for broken in (
        _run(*lines, status=1),
        _run(*_said("up", 1, "iperf3: error")),
        _run(*_said("up", 0, '{"error": "refused"}')),
        _run(*_said("up", 0, *told), *_said("latency", 0, "nothing")),
        _run(*_said("latency", 0, half)),
    ):
        with pytest.raises(GuestError, match=r"did not come to its end|failed|understood"):
            measured(broken)


def test_two_guests_are_compared_with_two_guests() -> None:
    rates = {item: {"ringzero": 30.0, "qemu stream": 10.0, "qemu dgram": 20.0} for item in NETWORK_ITEMS}
    samples = {item: {way: sample([rate]) for way, rate in ways.items()} for item, ways in rates.items()}
    outcome = NetworkBench()._outcome(samples, [])
    ratios = [figure for figure in outcome.figures if figure.name == "  times QEMU's best"]
    assert [figure.value for figure in ratios] == [1.5] * len(NETWORK_ITEMS)
    assert [figure.bar for figure in ratios if figure.bar is not None] == [BAR] * len(BARRED)
    assert not any(figure.meets for figure in ratios if figure.bar is not None)


def test_a_guest_is_told_what_to_do_on_its_command_line() -> None:
    line = Words("up,down", "10.0.2.15/24", "10.0.2.2", 5301, seconds=3).append()
    assert {"net.do=up,down", "net.peer=10.0.2.2", "net.port=5301", "net.seconds=3"} <= set(line.split())
    assert "net.peer" not in Words("serve", "192.0.2.1/24").append()
