"""Translations outlive a machine: the next one of the same user takes them, and no damage to them hurts it."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero.bench.guests import nano

SCRIPT = ["sh", "-c", "seq 1 2000 | sort -r | sort -n | sha256sum"]


def _boot(folder: Path | bool) -> tuple[str, dict[str, int]]:
    """Boot Debian, run the script, and give what it printed and the machine's counters at its end."""
    # Room for all of it: what has to make way is translated again.
    with Machine("debian", engine="translate", translation_cache=folder, translation_memory="64M") as machine:
        text = machine.run(SCRIPT, check=True, text=True).stdout
        machine.stop()
        return text, machine.stats()


@pytest.mark.needs_debian
def test_a_second_boot_translates_next_to_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "translations"
    first, cold = _boot(folder)
    assert (cold["kept.blocks"], cold["kept.noted"] > 50_000) == (0, True)
    second, warm = _boot(folder)
    assert second == first
    assert warm["kept.blocks"] > 50_000
    assert warm["translate.instructions"] < cold["translate.instructions"] / 5
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}

    # Bytes changed all over the file: those groups are refused, and translated again.
    (file,) = folder.glob("*.code")
    data = bytearray(file.read_bytes())
    for at in range(100_000, len(data) * 3 // 4, 100_000):
        data[at] ^= 1
    file.write_bytes(data)
    third, damaged = _boot(folder)
    assert third == first
    assert damaged["kept.groups_refused"] > 10
    assert warm["kept.blocks"] > damaged["kept.blocks"] > 0


@pytest.mark.needs_debian
def test_a_kernel_at_a_random_address_leaves_nothing_for_others(tmp_path: Path) -> None:
    folder = tmp_path / "translations"
    with Machine("debian", kaslr=True, translation_cache=folder) as machine:
        machine.run(["true"], check=True)
        machine.stop()
        assert machine.stats()["kept.noted"] == 0
    assert not folder.exists()


def _kill_while_writing(folder: Path, *options: str) -> None:
    """Boot Debian in a process of its own, and end that by SIGKILL in the middle of what it writes."""
    words = [
        sys.executable,
        "-m",
        "ringzero",
        "run",
        *options,
        "--engine",
        "translate",
        "debian",
        "--",
        "true",
    ]
    environment = os.environ | {"RINGZERO_TRANSLATION_CACHE": str(folder)}
    unfinished = folder / "new"
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (unfinished.exists() and unfinished.stat().st_size > 1 << 20):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
        process.kill()
    assert process.returncode == -9
    assert unfinished.exists()


@pytest.mark.needs_debian
def test_a_process_that_is_killed_while_it_writes_hurts_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "translations"
    _kill_while_writing(folder)
    assert list(folder.glob("*.code")) == []
    first, cold = _boot(folder)
    assert (cold["kept.blocks"], cold["kept.noted"] > 50_000) == (0, True)
    (file,) = folder.glob("*.code")
    assert not (folder / "new").exists()
    whole = file.read_bytes()
    # Counting instructions is other code: all of it is new.
    _kill_while_writing(folder, "--stats")
    assert file.read_bytes() == whole
    second, warm = _boot(folder)
    assert second == first
    assert warm["kept.blocks"] > 50_000
    assert warm["kept.groups_refused"] == 0


@pytest.mark.needs_debian
def test_nothing_is_kept_where_it_must_not_or_cannot_be(tmp_path: Path) -> None:
    text, counters = _boot(False)
    assert counters["kept.noted"] == 0
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    again, counters = _boot(open_to_all)
    assert (again, counters["kept.noted"], list(open_to_all.iterdir())) == (text, 0, [])


def test_code_that_is_written_over_and_over_is_not_kept(tmp_path: Path) -> None:
    def modify() -> dict[str, int]:
        with Machine(
            kernel=nano(),
            append="only=smc rounds=1",
            memory="64M",
            engine="translate",
            translation_cache=tmp_path,
        ) as machine:
            assert machine.wait(60) == "poweroff"
            return machine.stats()

    tmp_path.chmod(0o700)
    # The guest makes 6000 variants of one instruction.
    assert 0 < modify()["kept.noted"] < 1000
    assert modify()["kept.groups"] < 100
