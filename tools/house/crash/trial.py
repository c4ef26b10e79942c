"""One machine, killed while its guest writes and flushes: all that the guest saw flushed must be on its disk."""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ringzero import _core, images
from ringzero.bench import guests

__all__ = ["KINDS", "Trial", "trial"]

MIB = 1 << 20
SERIES = "6.12"
DISK = 64 * MIB
BOOT = 60.0
"""Seconds after which a guest must have written something."""
DONE = re.compile(rb"^DONE (\d+)\r?$", re.MULTILINE)
RECORD = 8192


@dataclass
class Trial:
    """What came of one: how much the guest saw flushed, what is wrong, and clusters lost until the next start."""

    flushed: int
    wrong: list[str] = field(default_factory=list)
    leaks: int = 0


@dataclass(frozen=True)
class Kind:
    """A guest that writes: how it is started on a disk, and how the disk is looked at, as a raw file."""

    option: Callable[[Path], str]
    words: Callable[[Path, int], list[str]]
    look: Callable[[Path, int, int], list[str]]
    prepare: Callable[[Path], None]


def _make_qcow2(folder: Path) -> None:
    _core.image_create(str(folder / "disk.qcow2"), DISK)


def _make_overlay(folder: Path) -> None:
    with (folder / "base.raw").open("wb") as file:
        file.truncate(DISK)
    _core.image_create(str(folder / "disk.qcow2"), DISK, backing=("base.raw", "raw"))


def _make_raw(folder: Path) -> None:
    with (folder / "disk.raw").open("wb") as file:
        file.truncate(DISK)


def _make_ext4(folder: Path) -> None:
    _make_raw(folder)
    subprocess.run([_tool("mke2fs"), "-q", "-t", "ext4", folder / "disk.raw"], check=True)
    _core.image_convert([(str(folder / "disk.raw"), "raw")], str(folder / "disk.qcow2"), "qcow2")
    (folder / "disk.raw").unlink()


def _tool(name: str) -> str:
    return shutil.which(name) or f"/sbin/{name}"


def _disk(folder: Path) -> Path:
    return next(path for path in (folder / "disk.qcow2", folder / "disk.raw") if path.exists())


def _records(folder: Path, seed: int) -> list[str]:
    initrd = folder / "initrd"
    initrd.write_bytes(guests.disk_initramfs(SERIES))
    append = f"console=ttyS0 quiet panic=-1 -- records /dev/vda {seed}"
    return ["--kernel", str(guests.kernel(SERIES)), "--initrd", str(initrd), "--append", append]


def _look_at_records(raw: Path, seed: int, flushed: int) -> list[str]:
    done = subprocess.run(
        [guests.disk_program(), "check", raw, str(seed), str(flushed)],
        capture_output=True,
        text=True,
        check=False,
    )
    return [] if done.returncode == 0 else [f"of {flushed} records: {done.stdout.strip()}"]


def _files(folder: Path, seed: int) -> list[str]:
    script = (
        "mount /dev/vda /mnt; n=0; while :; do "
        f"yes $n-{seed} | head -c {RECORD} | dd of=/mnt/$n bs={RECORD} iflag=fullblock conv=fsync 2>/dev/null; "
        "[ $? = 0 ] || exit 1; "
        "n=$((n + 1)); echo DONE $n; done"
    )
    return ["debian:6.12", "--", "sh", "-c", script]


def _look_at_files(raw: Path, seed: int, flushed: int) -> list[str]:
    # The journal first, as the next mount would.
    replay = subprocess.run([_tool("e2fsck"), "-p", raw], capture_output=True, text=True, check=False)
    check = subprocess.run([_tool("e2fsck"), "-fn", raw], capture_output=True, text=True, check=False)
    wrong = [done.stdout for done, most in ((replay, 1), (check, 0)) if done.returncode > most]
    with tempfile.TemporaryDirectory(prefix="ringzero-crash-") as name:
        subprocess.run(
            [_tool("debugfs"), "-R", f"rdump / {name}", raw], capture_output=True, text=True, check=False
        )
        for number in range(flushed):
            file = Path(name) / str(number)
            line = f"{number}-{seed}\n".encode()
            expected = (line * (RECORD // len(line) + 1))[:RECORD]
            if not file.is_file() or file.read_bytes() != expected:
                wrong.append(f"of {flushed} files, {number} is not what was flushed")
                break
    return wrong


KINDS = {
    "qcow2": Kind(str, _records, _look_at_records, _make_qcow2),
    "overlay": Kind(str, _records, _look_at_records, _make_overlay),
    "raw": Kind(str, _records, _look_at_records, _make_raw),
    "direct": Kind(lambda disk: f"{disk},cache=none", _records, _look_at_records, _make_qcow2),
    "ext4": Kind(str, _files, _look_at_files, _make_ext4),
}


def trial(name: str, seed: int) -> Trial:
    """Start a machine, kill it at a moment that the seed gives, and look at its disk."""
    kind, chance = KINDS[name], random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ringzero-crash-") as folder_name:
        folder = Path(folder_name)
        kind.prepare(folder)
        disk = _disk(folder)
        # As a library would start it: the package is the one that runs this.
        command = [
            sys.executable,
            "-m",
            "ringzero",
            "run",
            "--disk",
            kind.option(disk),
            *kind.words(folder, seed),
        ]
        try:
            flushed = _killed(command, chance.uniform(0.05, 1.0))
        except TimeoutError as error:
            return Trial(0, [str(error)])
        result = Trial(flushed)
        if disk.suffix == ".qcow2":
            _look_at_image(disk, result)
        raw = folder / "looked-at.raw"
        _core.image_convert(
            [(str(path), image_format) for path, image_format in _chain(disk)], str(raw), "raw"
        )
        result.wrong += kind.look(raw, seed, flushed)
    return result


def _chain(disk: Path) -> list[tuple[str, str]]:
    from ringzero.machine.chain import chain

    return chain(disk)


def _killed(command: list[str], after: float) -> int:
    """Run a command, kill it so many seconds after its guest first said that something is on the disk, and return how
    much of that it said. Raises TimeoutError when it says nothing.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    said, end, begun = b"", time.monotonic() + BOOT, False
    try:
        while (left := end - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left)[0]:
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    break
                said += piece
            if not begun and DONE.search(said):
                begun, end = True, time.monotonic() + after
    finally:
        os.kill(process.pid, signal.SIGKILL)
    # What was on its way when it was killed counts, too.
    said += process.stdout.read()
    process.wait()
    process.stdout.close()
    numbers = [int(number) for number in DONE.findall(said)]
    if not numbers:
        raise TimeoutError(f"the guest wrote nothing in {BOOT:g} s: {said[-300:]!r}")
    return max(numbers)


def _look_at_image(disk: Path, result: Trial) -> None:
    """See what the image is now, and what it is after the next start of a machine with it."""
    report = _core.image_check(str(disk))
    result.leaks = report["leaks"]
    result.wrong += report["sentences"]
    if (program := shutil.which("qemu-img")) is not None:
        done = subprocess.run(
            [program, "check", "-f", "qcow2", disk], capture_output=True, text=True, check=False
        )
        # 3 is what it says of clusters that are lost, and of nothing else.
        if done.returncode != (3 if report["leaks"] else 0):
            result.wrong.append(f"qemu-img check: {done.returncode}: {done.stdout}{done.stderr}")
    from ringzero.machine.disk import Disk

    # Opened to be written to, and let go.
    device = Disk.parse(disk).device(1)
    del device
    report = _core.image_check(str(disk))
    if report["leaks"] or report["errors"]:
        result.wrong.append(f"after the next start: {report}")
    if program is not None:
        subprocess.run([program, "check", "-f", "qcow2", disk], check=True, capture_output=True)


def image_is_here() -> bool:
    """Whether the guests' kernel is in the cache."""
    return images.find(f"debian:{SERIES}") is not None
