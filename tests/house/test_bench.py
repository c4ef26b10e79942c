"""The benchmarks' own arithmetic and their readers: a wrong figure is worse than none."""

import io
import os
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from ringzero.bench import (
    clocked,
    compute,
    engines,
    figures,
    guests,
    idle,
    nano,
    profile,
    programs,
    rounds,
    system,
)
from ringzero.bench.engines import Run
from ringzero.errors import FetchError, GuestError, InputError
from ringzero.images.newc import NewcWriter


def whole_run(names: Iterable[str] = tuple(compute.CLASSES), *, status: int = 0, clock: float = 1.0) -> Run:
    """Return a run of one second an item by the host's clock, `clock` seconds by the guest's."""
    lines: list[tuple[float, str]] = []
    for number, name in enumerate(names):
        lines += [
            (2.0 * number, "BENCH-START"),
            (2.0 * number + 1.0, "[    0.1] some kernel message BENCH-STOP"),
            (2.0 * number + 1.1, f"BENCH {name} {int(clock * 1e9)} {number:016x}"),
        ]
    return Run(2.0 * len(lines), status, False, lines)


def test_the_geometric_mean_does_not_care_which_engine_is_the_unit() -> None:
    ratios = [0.5, 2.0, 8.0]
    assert figures.geometric_mean(ratios) == pytest.approx(2.0)
    assert figures.geometric_mean(1 / ratio for ratio in ratios) == pytest.approx(0.5)


def test_a_sample_is_its_median_and_range() -> None:
    sample = figures.sample([4.0, 1.0, 2.0])
    assert (sample.median, sample.low, sample.high, sample.spread) == (2.0, 1.0, 4.0, 0.75)
    with pytest.raises(ValueError, match="nothing"):
        figures.sample([])


def test_a_whole_run_is_parsed() -> None:
    items = compute.parse(whole_run())
    assert set(items) == set(compute.CLASSES)
    assert items["sort"] == compute.Item(1.0, pytest.approx(1.0), f"{len(compute.CLASSES) - 1:016x}")


@pytest.mark.parametrize("run", [whole_run(["awk"]), whole_run(status=4)], ids=["items missing", "panic"])
def test_a_run_that_is_not_whole_gives_no_figure(run: Run) -> None:
    with pytest.raises(GuestError):
        compute.parse(run)


def test_times_of_an_item_in_several_parts_are_added() -> None:
    first = [(0.0, "BENCH-START"), (0.25, "BENCH-STOP"), (5.0, "BENCH-START"), (5.5, "BENCH-STOP")]
    rest = whole_run(name for name in compute.CLASSES if name != "gzip")
    run = Run(9.0, 0, False, [*first, (5.6, f"BENCH gzip 750000000 {0:016x}"), *rest.lines])
    assert compute.parse(run)["gzip"].host_seconds == pytest.approx(0.75)


def test_a_guest_clock_that_flatters_is_called_wrong() -> None:
    results = compute.Results()
    results.add("native", compute.parse(whole_run()))
    results.add("translate", compute.parse(whole_run()))
    assert results.complaints() == []
    results.add("translate", compute.parse(whole_run(clock=0.5)))
    complaints = results.complaints()
    assert len(complaints) == len(compute.CLASSES)
    assert "the guest's clock says 0.500 s, the host's 1.000 s" in complaints[0]


def test_a_wrong_result_is_called_wrong() -> None:
    results = compute.Results()
    results.add("native", compute.parse(whole_run()))
    results.add("translate", compute.parse(whole_run(reversed(compute.CLASSES))))
    assert "the checksums differ" in results.complaints()[0]


def test_means_are_of_qemu_over_ours() -> None:
    results = compute.Results()
    results.add("translate", compute.parse(whole_run()))
    results.add("qemu", compute.parse(whole_run(clock=3.0)))
    assert results.means("qemu", "translate") == {
        group: pytest.approx(3.0) for group in ("all", "user", "float", "kernel")
    }


def test_without_qemu_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InputError, match="qemu-system-x86"):
        engines.qemu_command(engines.Guest(Path("k"), Path("i"), "", 256))


def test_both_engines_get_the_same_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    guest = engines.Guest(Path("/k"), Path("/i"), "console=ttyS0 -- poweroff", 256)
    for command in (engines.qemu_command(guest), engines.ringzero_command(guest)):
        for words in (["/k"], ["/i"], ["console=ttyS0 -- poweroff"], ["256M"]):
            assert set(words) <= set(command)


def test_a_run_that_hangs_is_stopped() -> None:
    run = engines.run(
        [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"], timeout=2
    )
    assert run.timed_out
    assert run.seconds < 30
    assert run.has("here")


def test_a_run_keeps_status_and_lines() -> None:
    run = engines.run(["sh", "-c", "printf 'one\\r\\ntwo\\n'; exit 3"], timeout=30)
    assert (run.status, run.timed_out, [line for _, line in run.lines]) == (3, False, ["one", "two"])


def test_a_file_comes_out_of_an_initramfs_as_it_went_in() -> None:
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        archive.file("init", b"first")
        archive.file("bin/busybox", b"second, of another length", 0o755)
    assert guests.member(out.getvalue(), "bin/busybox") == b"second, of another length"
    assert guests.member(out.getvalue(), "bin/sh") is None
    assert guests.member(out.getvalue()[:50], "init") is None


def nano_run(*lines: str, status: int = 0) -> Run:
    return Run(1.0, status, False, [(0.0, line) for line in (*lines, "PASS")])


def test_a_run_counts_with_its_least_round_and_checksums_are_compared() -> None:
    results = rounds.Results(nano.OPERATIONS)
    ours = nano_run(*(f"NANO in {cycles} 100 0000000000000007" for cycles in (1000, 9000, 2000)))
    results.add("translate", rounds.parse(ours, "NANO"))
    results.add("qemu", rounds.parse(nano_run("NANO in 4000 100 0000000000000007"), "NANO"))
    assert results.names == ["in"]
    cycles = results.sample("translate", "in")
    assert cycles is not None
    assert (cycles.median, results.ratio("qemu", "translate", "in")) == (10.0, 4.0)
    assert results.sample("native", "in") is None
    assert results.complaints() == []
    results.add("translate", rounds.parse(nano_run("NANO in 4000 100 0000000000000008"), "NANO"))
    assert "the checksums differ" in results.complaints()[0]


@pytest.mark.parametrize("run", [nano_run(status=5), Run(1.0, 0, False, [(0.0, "NANO in 1 1 0")])])
def test_a_nano_run_that_is_not_whole_gives_no_figure(run: Run) -> None:
    with pytest.raises(GuestError):
        rounds.parse(run, "NANO")


def test_nano_computes_the_same_on_both_engines_and_natively() -> None:
    results = nano.NanoBench(runs=1, with_qemu=False).measure(Console(quiet=True))
    assert set(results.names) == set(nano.OPERATIONS)
    assert set(results.runs["native"]) == {"callret", "smc"}
    assert results.complaints() == []


def system_run(clock: float) -> Run:
    lines = [(1.0, "BENCH-START"), (1.5, "[ 1.0] SYSTEM pipe 300 3 00000000000000ff"), (3.0, "BENCH-STOP")]
    return Run(4.0, 0, False, [*lines, (3.1, f"SYSTEM-CLOCK {int(clock * 1e9)}"), (3.2, "PASS")])


def test_a_system_run_is_read_and_its_clock_checked() -> None:
    assert rounds.parse(system_run(2.0), "SYSTEM")["pipe"].rounds == (100.0,)
    assert clocked.clock_complaint(system_run(2.0), "SYSTEM") is None
    assert "says 3.000 s, the host's 2.000 s" in (clocked.clock_complaint(system_run(3.0), "SYSTEM") or "")
    with pytest.raises(GuestError):
        clocked.clock_complaint(nano_run(), "SYSTEM")


def test_the_system_items_are_those_of_the_program() -> None:
    done = engines.run([str(guests.program()), "system", "1"], timeout=60)
    assert list(rounds.parse(done, "SYSTEM")) == list(system.ITEMS)


@pytest.mark.needs_debian
def test_the_guest_and_the_bare_machine_compute_the_same() -> None:
    bench = system.SystemBench(kernel=guests.kernel("6.1"), runs=1, with_qemu=False)
    results = bench.measure(Console(quiet=True)).results
    assert results.complaints() == []
    assert set(results.runs[bench.engine]) == set(results.runs["native"]) == set(system.ITEMS)


def test_openssl_says_how_fast_it_was() -> None:
    lines = [
        (0.0, "PROGRAM-TOLD openssl-sha256 +F:25:sha256:500000000.00"),
        (0.0, "PROGRAM-TOLD openssl-rsa2048 +F2:2:2048:1000.000000:19560.000000"),
        (0.0, "PROGRAM openssl-sha256 1026301012 1 cbf29ce484222325"),
        (0.0, "PROGRAM openssl-rsa2048 2010921744 1 cbf29ce484222325"),
        (0.0, "PASS"),
    ]
    items = programs.measured(Run(1.0, 0, False, lines))
    assert (items["openssl-sha256"].rounds, items["openssl-rsa2048"].rounds) == ((2e6,), (1e6,))
    with pytest.raises(GuestError, match="openssl-sha256 did not say"):
        programs.measured(Run(1.0, 0, False, lines[1:]))


@pytest.mark.needs_debian
def test_debians_programs_run_on_the_bare_machine(tmp_path: Path) -> None:
    bench = programs.ProgramsBench(kernel=Path("none"), only=["sqlite3", "python3"])
    try:
        bench.prepare(tmp_path)
    except FetchError as error:
        pytest.skip(f"no programs: {error}")
    done = engines.run([str(guests.program()), "programs", str(tmp_path)], timeout=60)
    assert set(programs.measured(done)) == {"sqlite3", "python3"}
    # The last of them was sqlite3: Python's own must say the same.
    *_, last = (tmp_path / "output").read_text().splitlines()
    database = sqlite3.connect(":memory:", isolation_level=None)
    rows = [database.execute(query).fetchall() for query in programs.QUERIES.split(";") if query.strip()]
    assert last == "|".join(map(str, rows[-1][0]))


def test_shares_of_a_profile_are_of_busy_time() -> None:
    report = profile.Report("x")
    before = {"profile.user": 5, "profile.idle": 100, "exits.fault": 1}
    after = {
        "profile.user": 35,
        "profile.walk": 10,
        "profile.idle": 160,
        "profile.user_block.40": 30,
        "profile.instruction.Cpuid": 2,
        "interpreted.Cpuid": 7,
        "interpreted.Hlt": 9,
        "exits.fault": 4,
    }
    report.add(0.5, before, after)
    assert (report.busy, report.idle, report.share(10)) == (40, 0.6, 0.25)
    assert report.blocks() == [("user", "40", 30)]
    assert report.instructions() == [("Cpuid", 2, 7), ("Hlt", 0, 9)]
    assert (report.count("signals"), report.count("user")) == (3, None)
    report.add(0.5, before, after)
    assert (report.seconds, report.samples("walk")) == (1.0, 20)


def test_every_row_of_a_profile_has_counters_that_exist() -> None:
    from ringzero import _core

    vm = _core.Vm(16 << 20, profile=True)
    vm.stop()
    names = vm.stats().keys()
    for row, (_, counters) in profile.ROWS.items():
        assert {f"profile.{row}", *counters} <= names


@pytest.mark.needs_debian
def test_a_workload_is_profiled_between_its_marks() -> None:
    bench = profile.ProfileBench(kernel=guests.kernel("6.1"), items=["null-syscall"])
    [report] = bench.measure(Console(quiet=True))
    assert report.busy > 0
    assert report.count("walk") is not None
    # A boot translates some fifty thousand blocks.
    assert report.counters["translate.blocks"] < 5000


@pytest.mark.needs_debian
def test_the_bench_program_runs_on_the_bare_machine(tmp_path: Path) -> None:
    tools = tmp_path / "busybox"
    tools.write_bytes(guests.busybox())
    tools.chmod(0o755)
    first, second = (
        compute.parse(engines.run([str(guests.program()), "all", str(tools), str(tmp_path)], timeout=120))
        for _ in range(2)
    )
    assert {name: item.checksum for name, item in first.items()} == {
        name: item.checksum for name, item in second.items()
    }
    assert not list(tmp_path.glob("text*"))


@pytest.mark.needs_debian
@pytest.mark.needs_qemu
def test_the_boot_guest_powers_qemu_off(tmp_path: Path) -> None:
    from ringzero.bench import boot

    initrd = tmp_path / "initrd"
    initrd.write_bytes(guests.boot_initramfs())
    guest = engines.Guest(guests.kernel("6.1"), initrd, boot.APPEND, 256)
    outcome = boot.Outcome("6.1", "qemu", (engines.run(engines.qemu_command(guest), timeout=120),))
    assert outcome.good, outcome.runs[0].tail()


def test_touched_memory_is_that_of_the_pool_alone() -> None:
    def memfd(name: str, pages: int) -> int:
        descriptor = os.memfd_create(name)
        os.write(descriptor, bytes(4096 * pages))
        return descriptor

    before = idle.touched(os.getpid())
    descriptors = [memfd(idle.POOL, 3), memfd("ringzero-code", 5)]
    try:
        # The same memfd through another descriptor is the same memory.
        descriptors.append(os.dup(descriptors[0]))
        assert idle.touched(os.getpid()) - before == 3 * 4096
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_memory_and_processor_time_of_a_process_are_read() -> None:
    resident, proportional = idle.memory_of(os.getpid())
    assert resident >= proportional > 1024 * 1024
    assert idle.processor_seconds(os.getpid()) > 0
