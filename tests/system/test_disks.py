"""Disks of the Debian images, with the driver that the kernel's package brings."""

import subprocess
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero.errors import InputError

from .conftest import ENGINE, Run

pytestmark = pytest.mark.needs_debian


def test_disks_are_there_for_the_first_command(ringzero: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(1 << 20))
    second.write_bytes(b"read me\n".ljust(4096, b"\0"))
    write = "echo written | dd of=/dev/vda bs=4096 seek=3 conv=fsync 2>/dev/null"
    script = f"head -n 1 /dev/vdb; {write}; echo no >/dev/vdb"
    disks = ("--disk", str(first), "--disk", f"{second},ro")
    done = ringzero("run", *disks, "debian", "--", "sh", "-c", script)
    assert done.stdout == b"read me\n", done.stderr
    assert done.returncode != 0, "it is read-only"
    assert first.read_bytes()[3 * 4096 :].startswith(b"written\n")


def test_a_file_system_goes_from_one_machine_to_the_next(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 << 20))
    try:
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", image], check=True)
    except FileNotFoundError:
        pytest.skip("no mke2fs (apt: e2fsprogs)")
    with Machine("debian", engine=ENGINE, disks=[image]) as first:
        script = "mount /dev/vda /mnt && echo here >/mnt/file && umount /mnt"
        first.run(["sh", "-c", script], check=True)
        with pytest.raises(InputError, match="another machine"), Machine("debian", disks=[image]):
            pass
    # The first may still be looked at, and does not keep the disk.
    assert len(first.read_memory(0, 4096)) == 4096
    with Machine("debian", engine=ENGINE, disks=[image]) as second:
        done = second.run(["sh", "-c", "mount /dev/vda /mnt && cat /mnt/file"], check=True, text=True)
    assert done.stdout == "here\n"
