"""Disks in images, and what becomes of a guest when the host cannot do what it wants of its disk."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ringzero import Machine, _core

from .conftest import ENGINE, Run

pytestmark = pytest.mark.needs_debian
MIB = 1 << 20


def make(path: Path, size: int = 64 * MIB) -> Path:
    _core.image_create(str(path), size)
    return path


def qemu_check(path: Path) -> None:
    if program := shutil.which("qemu-img"):
        subprocess.run([program, "check", "-f", "qcow2", path], check=True, capture_output=True)


def test_a_guest_writes_and_reads_back_through_overlays(ringzero: Run, tmp_path: Path) -> None:
    base, overlay = make(tmp_path / "base.qcow2"), tmp_path / "work.qcow2"
    write = (
        "yes {} | head -c 3000000 >/tmp/{}; dd if=/tmp/{} of=/dev/vda bs=1M seek={} conv=fsync 2>/dev/null"
    )
    read = "dd if=/dev/vda bs=1M skip={} count=3 2>/dev/null | head -c 3000000 | sha256sum"

    def guest(disk: str, *words: str) -> bytes:
        done = ringzero("run", "debian", "--disk", disk, "--", "sh", "-c", "; ".join(words))
        assert done.returncode == 0, done.stderr
        return done.stdout

    in_base = guest(str(base), write.format("base", "a", "a", 5), read.format(5))
    in_overlay = guest(
        f"{base},overlay={overlay}",
        read.format(5),
        write.format("over", "b", "b", 6),
        read.format(5),
        read.format(9),
    )
    first, mixed, zeroes = in_overlay.splitlines()
    assert [first] == in_base.splitlines()
    assert len({first, mixed, zeroes}) == 3
    # What is written to an overlay without a name is gone; the named one has it still.
    guest(f"{overlay},overlay", write.format("gone", "c", "c", 5))
    assert guest(str(overlay), read.format(5)).splitlines() == [mixed]
    assert guest(f"{base},ro", read.format(5)) == in_base
    for image in (base, overlay):
        qemu_check(image)


def test_a_discard_in_the_guest_shrinks_the_image(ringzero: Run, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    fill = "dd if=/dev/urandom of=/dev/vda bs=1M count=24 conv=fsync 2>/dev/null"
    script = f"{fill}; blkdiscard -o 0 -l 16777216 /dev/vda"
    done = ringzero("run", "debian", "--disk", str(image), "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert image.stat().st_blocks * 512 < 12 * MIB
    qemu_check(image)


def test_a_full_host_pauses_the_guest_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Machine("debian", engine=ENGINE, disks=[disk]) as machine:
        machine.wait_ready()
        # As if the disk were full from 8 MiB on.
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, hard))
        try:
            script = "yes full | head -c 1048576 | dd of=/dev/vda bs=4k seek=2560 conv=fsync"
            process = machine.popen(["sh", "-c", script], stdin=False)
            end = time.monotonic() + 60
            while not machine.disk_troubles():
                assert time.monotonic() < end, "nobody was told"
                time.sleep(0.01)
            assert str(disk) in machine.disk_troubles()[0]
            assert disk.read_bytes()[10 * MIB :] == bytes(54 * MIB)
            machine.resume()
            while not machine.disk_troubles():
                assert time.monotonic() < end, "there is no more room than before"
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        machine.resume()
        assert process.wait(60) == 0
        assert machine.disk_stats()[0]["pauses"] >= 2
    assert disk.read_bytes()[10 * MIB : 11 * MIB] == b"full\n" * 209715 + b"f"


def test_a_guest_is_told_of_a_full_host_if_it_shall_be(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Machine("debian", engine=ENGINE, disks=[f"{disk},on-error=report"]) as machine:
        machine.wait_ready()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, hard))
        try:
            script = "dd if=/dev/zero of=/dev/vda bs=4k seek=2560 count=1 conv=fsync"
            done = machine.run(["sh", "-c", script], text=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert done.returncode != 0 and "error" in done.stderr.lower()
        assert machine.disk_troubles() == []


def test_an_image_that_shrinks_is_an_error_of_the_guests(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"x" * (16 * MIB))
    with Machine("debian", engine=ENGINE, disks=[disk]) as machine:
        os.truncate(disk, MIB)
        script = "dd if=/dev/vda of=/dev/null bs=4k skip=2048 count=1"
        assert machine.run(["sh", "-c", script]).returncode != 0
        assert machine.run(["sh", "-c", "dd if=/dev/vda bs=4k skip=9 count=1 | head -c 3"]).stdout == b"xxx"


def test_a_limited_disk_is_slow_and_its_guest_is_not(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MIB))
    with Machine("debian", engine=ENGINE, disks=[f"{disk},iops=1"]) as machine:
        read = "dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$((i * 16)) iflag=direct"
        reading = machine.popen(["sh", "-c", f"for i in 1 2 3 4 5 6 7 8; do {read}; done"], stdin=False)
        while machine.disk_stats()[0]["delayed"] == 0:
            assert reading.poll() is None
        # The machine itself is not held up.
        assert machine.run(["echo", "here"], text=True).stdout == "here\n"
        machine.limit_disk(0)
        assert reading.wait(60) == 0
